"""A keyed, invertible permutation of ``range(n)`` in O(1) memory.

An epoch visits every record once in an order that anyone can compute from ``(seed, epoch)``: no shuffled
list is held, sent between ranks or saved in a checkpoint, and position ``i`` costs the same at the start
and at the end of an epoch of a billion records. The same permutation gives a store its permuted row order.

How: a Feistel network over the smallest power of two that holds ``n`` (each round XORs one half of the bits
with a keyed hash of the other half, then adds a key to the whole, both of which can be undone), then cycle
walking: a result outside ``range(n)`` is put through the network again until it falls inside. Both keep a
bijection. The network is not a cipher to keep secrets with; it has to look random to statistics, which the
tests check.

Positions go through a compiled form of the same arithmetic where that was built (`permute_kernel`); the
Python here is the general path, and the description of both.

The module owns no state besides the round keys, is immutable and therefore thread-safe. The round keys, and
with them every order ever recorded, are frozen under `SCHEME`: change the arithmetic and you must change it.

Source: M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
SIAM J. Comput. 17 (1988); J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002
(cycle walking, method 2); the mixing function is the finaliser of SplitMix64, G. Steele et al., "Fast
splittable pseudorandom number generators", OOPSLA 2014, with the constants of D. Stafford's variant 13.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foldfeed.feature_store.format.permute_kernel import permute, permute_one

SCHEME = "foldfeed/permutation/1"
# Four rounds are enough for Luby and Rackoff when halves are wide; stores of a few records need more.
# Measured over 24,000 keys: all n! orders of n = 4, 5, 6 come out evenly from 6 rounds of a 4-bit network
# on. That needs the additions: with XOR alone two-bit halves stay off by 9 sigma at any number of rounds (8
# to 24, true random functions), and a 3-bit network is off by 3 sigma at 12 rounds even with additions.
NUM_ROUNDS = 12
MIN_BITS = 4
MAX_SIZE = 2**62
# Positions that go through the network together: with their scratch they stay in a core's second-level cache.
# Of 2**10 to 2**17, 2**14 was the fastest on a Zen 3 core (2**10: a quarter of its speed, all calls).
BLOCK = 2**14
# Where halves are short, their hashes are looked up: tables of up to 2**13 words (12 of them, 0.8 MB, for the
# call), once at least so many times more values are asked for than a table has entries.
MAX_TABLE_BITS = 13
TABLE_GAIN = 8
# SplitMix64's finaliser, D. Stafford's variant 13.
FIRST_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
SECOND_MULTIPLIER = np.uint64(0x94D049BB133111EB)
WORD = 2**64 - 1

Tables: TypeAlias = "list[NDArray[np.uint64]]"


def round_keys(key: Sequence[int]) -> NDArray[np.uint64]:
    """Returns the round keys of a tuple of integers.

    The tuple is hashed as a whole, so ``(seed, epoch + 1)`` and ``(seed + 1, epoch)`` are unrelated; adding
    them up, as ``seed + epoch`` would, makes epoch 1 of run 0 the epoch 0 of run 1.

    Args:
      key: any number of integers of any size, e.g. ``(seed, epoch)``.
    Returns: uint64 (2, `NUM_ROUNDS`): the keys of the hashes and those of the additions.
    Raises:
      TypeError: an entry is no integer.
    """
    message = json.dumps([SCHEME, *(operator.index(part) for part in key)], separators=(",", ":"))
    digest = hashlib.shake_256(message.encode()).digest(2 * 8 * NUM_ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64).reshape(2, NUM_ROUNDS)


class KeyedPermutation:
    """The permutation of ``range(size)`` that belongs to a key.

    ``KeyedPermutation(5, (0, 0)).forward(range(5))`` holds each of 0..4 once, and ``inverse`` undoes it.

    Args:
      size: n, 1 to 2**62.
      key: integers such as ``(seed, epoch)``; see `round_keys`.

    Raises:
      ValueError: size is outside 1..2**62.
    """

    __slots__ = ("_add_keys", "_bits", "_hash_keys", "_keys", "_round_keys", "key", "size")

    def __init__(self, size: int, key: Sequence[int]) -> None:
        self.size = operator.index(size)
        if not 1 <= self.size <= MAX_SIZE:
            raise ValueError(
                f"size {size} of a permutation must be 1 to {MAX_SIZE}; an empty set has no order"
            )
        self.key = tuple(operator.index(part) for part in key)
        self._keys = round_keys(self.key)
        self._hash_keys, self._add_keys = self._keys
        self._round_keys = tuple(zip(self._hash_keys.tolist(), self._add_keys.tolist(), strict=True))
        # The domain is below 2n for n > 8, so walks are short.
        self._bits = max(MIN_BITS, (self.size - 1).bit_length())

    def forward(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Returns what stands at each position.

        Args:
          positions: integers in ``range(size)``, any shape.
        Returns: int64, the same shape, a fresh array.
        Raises:
          IndexError: a position outside ``range(size)``.
          TypeError: positions are no integers.
        """
        return self._walk(positions, inverse=False)

    def inverse(self, items: ArrayLike) -> NDArray[np.int64]:
        """Returns the position of each item: ``inverse(forward(i)) == i``.

        Args:
          items: integers in ``range(size)``, any shape.
        Returns: int64, the same shape, a fresh array.
        Raises:
          IndexError: an item outside ``range(size)``.
          TypeError: items are no integers.
        """
        return self._walk(items, inverse=True)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        """Returns ``forward`` of one position, without an array.

        Raises:
          IndexError: outside ``range(size)``; negative positions do not count from the end.
        """
        value = operator.index(position)
        if not 0 <= value < self.size:
            raise IndexError(f"position {value} leaves range({self.size}), the set this permutation orders")
        found = permute_one(value, self.size, self._bits, self._keys)
        return self._walk_one(value) if found is None else found

    def _walk_one(self, value: int) -> int:
        """Returns ``forward`` of one position, in plain integers."""
        value = self._encrypt_one(value)
        while value >= self.size:
            value = self._encrypt_one(value)
        return value

    def _walk(self, values: ArrayLike, *, inverse: bool) -> NDArray[np.int64]:
        indices = np.asarray(values)
        if indices.size and indices.dtype.kind not in "iu":
            raise TypeError(f"positions must be integers, not {indices.dtype}; use .astype(numpy.int64)")
        walked = indices.astype(np.uint64).ravel()
        # A negative number has become a huge one.
        if walked.size and int(walked.max()) >= self.size:
            raise IndexError(
                f"positions {int(indices.min())}..{int(indices.max())} leave range({self.size}), "
                "the set this permutation orders"
            )
        if not permute(walked, self.size, self._bits, self._keys, inverse=inverse):
            self._walk_by_numpy(walked, inverse=inverse)
        return walked.view(np.int64).reshape(indices.shape)

    def _walk_by_numpy(self, walked: NDArray[np.uint64], *, inverse: bool) -> None:
        tables = self._tables(walked.size)
        step = self._decrypt if inverse else self._encrypt
        step(walked, tables)
        # Each pass leaves less than half outside (for n > 8), so this ends quickly; it ends at all because
        # a cycle of the network that starts inside the range comes back to it.
        outside = np.flatnonzero(walked >= np.uint64(self.size))
        while outside.size:
            again = walked[outside]
            step(again, tables)
            walked[outside] = again
            outside = outside[again >= np.uint64(self.size)]

    def _encrypt(self, values: NDArray[np.uint64], tables: Tables | None) -> None:
        mask = np.uint64((1 << self._bits) - 1)
        for block, *scratch in _blocks(values):
            for index in range(NUM_ROUNDS):
                self._mix(block, index, tables, *scratch)
                np.add(block, self._add_keys[index], out=block)
                np.bitwise_and(block, mask, out=block)

    def _decrypt(self, values: NDArray[np.uint64], tables: Tables | None) -> None:
        mask = np.uint64((1 << self._bits) - 1)
        for block, *scratch in _blocks(values):
            for index in reversed(range(NUM_ROUNDS)):
                np.subtract(block, self._add_keys[index], out=block)
                np.bitwise_and(block, mask, out=block)
                self._mix(block, index, tables, *scratch)

    def _tables(self, num_values: int) -> Tables | None:
        """Returns what each round XORs for every value of a half, where that is less work than hashing."""
        half_bits = (self._bits + 1) // 2
        if half_bits > MAX_TABLE_BITS or num_values < TABLE_GAIN << half_bits:
            return None
        tables = [np.arange(1 << half_bits, dtype=np.uint64) for _ in range(NUM_ROUNDS)]
        for index, table in enumerate(tables):
            self._hash_half(table, index, np.empty_like(table))
        return tables

    def _mix(
        self,
        values: NDArray[np.uint64],
        index: int,
        tables: Tables | None,
        half: NDArray[np.uint64],
        scratch: NDArray[np.uint64],
    ) -> None:
        """XORs one half of values with a hash of the other, in place; its own inverse."""
        # No swap of halves: even rounds change the left (high) one, odd rounds the right one.
        right_bits = np.uint64((self._bits + 1) // 2)
        if index % 2 == 0:
            np.bitwise_and(values, (np.uint64(1) << right_bits) - np.uint64(1), out=half)
        else:
            np.right_shift(values, right_bits, out=half)
        if tables is None:
            self._hash_half(half, index, scratch)
            np.bitwise_xor(values, half, out=values)
        else:
            # Every index is in range; any mode but "raise" spares a copy.
            np.take(tables[index], half.view(np.int64), out=scratch, mode="clip")
            np.bitwise_xor(values, scratch, out=values)

    def _hash_half(self, half: NDArray[np.uint64], index: int, scratch: NDArray[np.uint64]) -> None:
        """Replaces halves by what the round XORs to the other half, at its place."""
        right_bits = np.uint64((self._bits + 1) // 2)
        if index % 2 == 0:
            _hash_bits(half, self._hash_keys[index], np.uint64(self._bits // 2), scratch)
            np.left_shift(half, right_bits, out=half)
        else:
            _hash_bits(half, self._hash_keys[index], right_bits, scratch)

    def _encrypt_one(self, value: int) -> int:
        right_bits, left_bits = (self._bits + 1) // 2, self._bits // 2
        right_mask, mask = (1 << right_bits) - 1, (1 << self._bits) - 1
        for index, (hash_key, add_key) in enumerate(self._round_keys):
            if index % 2 == 0:
                value ^= _hash_one(value & right_mask, hash_key, left_bits) << right_bits
            else:
                value ^= _hash_one(value >> right_bits, hash_key, right_bits)
            value = (value + add_key) & mask
        return value


def _blocks(values: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.uint64], ...]]:
    """Yields views of consecutive values, each with two scratch arrays of its size."""
    first_scratch, second_scratch = np.empty((2, min(values.size, BLOCK)), dtype=np.uint64)
    for first in range(0, values.size, BLOCK):
        block = values[first : first + BLOCK]
        yield block, first_scratch[: block.size], second_scratch[: block.size]


def _hash_bits(
    values: NDArray[np.uint64], key: np.uint64, bits: np.uint64, scratch: NDArray[np.uint64]
) -> None:
    """Replaces each value by the top ``bits`` bits of its keyed 64-bit hash (wrapping arithmetic).

    The finaliser ends in ``x ^ (x >> 31)``, which leaves the top 31 bits as they are. No half is wider
    (`MAX_SIZE`), so that step is left out.
    """
    np.add(values, key, out=values)
    np.right_shift(values, np.uint64(30), out=scratch)
    np.bitwise_xor(values, scratch, out=values)
    np.multiply(values, FIRST_MULTIPLIER, out=values)
    np.right_shift(values, np.uint64(27), out=scratch)
    np.bitwise_xor(values, scratch, out=values)
    np.multiply(values, SECOND_MULTIPLIER, out=values)
    np.right_shift(values, np.uint64(64) - bits, out=values)


def _hash_one(value: int, key: int, bits: int) -> int:
    """Returns the top ``bits`` bits of the keyed 64-bit hash of a value, whole finaliser included."""
    value = (value + key) & WORD
    value = ((value ^ (value >> 30)) * int(FIRST_MULTIPLIER)) & WORD
    value = ((value ^ (value >> 27)) * int(SECOND_MULTIPLIER)) & WORD
    return (value ^ (value >> 31)) >> (64 - bits)
