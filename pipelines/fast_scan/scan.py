"""Which targets pass HMMER's first filter, exactly, for a batch of queries: the heart of ``--engine fast``.

Owns profiles, thresholds and the decision. Does not own kernels, reading (`fast_scan.database`) or the search
of what is left (`fast_jackhmmer`).

Why the result is JackHMMER's own
---------------------------------
1. In HMMER 3 a target that fails the MSV filter at ``--F1`` is dropped before anything is recorded but the
   count of targets (``p7_Pipeline``). So HMMER on *any* file that holds at least the passing targets, in
   their order and with ``-Z`` set to the number of targets of the whole file, compares the same pairs, and
   every later number depends on one pair alone: scores, bias, domains, P-values; random draws start from
   the same seed for every pair. E-values need Z, which is given; domain E-values need domZ, the number of
   reported targets, which is the same, because the same targets are reported. One iteration only: a second
   would search the whole file anew.
2. The filter is arithmetic on bytes. For residues ``x`` of the target and positions ``k`` of the query
   ``M(i,k) = max(M(i-1,k-1), B) - cost(k, x_i)`` in saturating steps; sums and maxima of integers are the
   same in any order, on any vector width. SSV, HMMER's short form, has a constant B, so a cell depends on
   its diagonal alone; its best cell is MSV's score unless a hit so good occurs that leaving through J and
   beginning again could pay: ``E - tec > base``. HMMER then computes MSV; so do we, where SSV has not
   passed already (MSV can only be higher). A cell of 0 or more in signed bytes means HMMER's overflow, a
   pass, or MSV decides.
3. Profile, bias, costs, mu and lambda come from HMMER's own code (pyhmmer's builder with jackhmmer's
   defaults: BLOSUM62, popen 0.02, pextend 0.4, seed 42), unpacked from its vectors. Only the simulations for
   the later filters are shorter than jackhmmer's: they come after that for MSV, from the same generator, and
   nothing here rests on them (jackhmmer makes its own on what passes). Null model, P-value and
   length cost follow HMMER's formulas in its precisions; because libraries' logarithms may differ in the
   last bit, a target passes already `SAFETY_BITS` below the threshold. Scores are multiples of 1/3 bit, so
   this lets hardly any more through, and more is harmless by 1.
4. A CUDA device (`fast_scan.gpu`, where `FOLDFEED_SCAN_DEVICE` asks for one) computes SSV's best cells alone,
in
   half-precision floats, which hold these integers exactly; thresholds and MSV stay with the processor.
5. Nothing rests on these words: tests compare 8-bit scores with HMMER's filters, passing targets with
   HMMER's own count, and whole outputs with jackhmmer's; a kernel that differs from plain C refuses to run.

The one thing that is not kept is white space in the table: without ``-Z``, HMMER pads the name column to the
longest name (of 20 letters or more) in a list that also holds targets it will not report, those whose
E-value was good enough against the targets read so far. The result is that of jackhmmer with ``-Z``, byte
for byte, and that of jackhmmer without ``-Z`` word for word.

Where it is no faster: few targets (starting jackhmmer and calibrating a profile takes 0.03 s and more, with
nothing to search too); queries whose homologs are a large part of the database, or low-complexity queries
that pass thousands by chance (the survivors cost what they cost); more than one iteration, which it does not
do. A database without room in memory is read again for every batch of queries, which costs about as much as
scanning it for one or two of them (`fast_scan.memory`; bench/README.md has the numbers). A device shortens
the first filter alone, so it helps little where jackhmmer on what passes is most of a search.

Source: Eddy 2011, PLoS Comput Biol 7:e1002195 (MSV, P-values); comments of HMMER 3.3.2
``impl_sse/ssvfilter.c`` (Knudsen) and ``msvfilter.c``; user guide of HMMER 3.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan.database import SYMBOLS
from foldfeed.pipelines.fast_scan.kernels import MAX_LETTERS, NUM_CODES, Chunk, DeviceKernel, Kernel

if TYPE_CHECKING:
    from pyhmmer.plan7 import OptimizedProfile, Pipeline

# A target passes this much below the threshold, 1/30 of a score's step.
SAFETY_BITS = 0.01

# HMMER refuses targets beyond it with an error of its own, which it must be given the chance to report.
MAX_TARGET = 100_000

# Queries whose scores are in memory at a time: one byte for each target and query.
BATCH = 32

# HMMER's vectors of a profile: 16 lanes, at least two vectors, position k in vector k % Q.
_PROFILE_LANES = 16
_SCORES = 256
# Steps above the begin score from where signed bytes are of the other sign.
_WRAPPED = 128

# Mu and lambda of Viterbi and Forward are simulated after MSV's, with the same generator, and are not used
# here: nine tenths of a profile's time. The builder has no way to leave them out.
_SHORT_SIMULATIONS = {"EvL": 2, "EvN": 2, "EfL": 10, "EfN": 10}

_local = threading.local()


@dataclasses.dataclass(frozen=True, slots=True)
class FilterProfile:
    """What HMMER's first filter knows of a query.

    Attributes:
      columns: uint8 (different, `NUM_CODES`), cost of every code at positions that are alike, plus `bias`; a
        single sequence has at most 27 different ones.
      letters: uint8 (residues,), which of them a position has.
      base: score of the begin state.
      bias: added to every cost.
      tbm: cost of B to a match state.
      tec: cost of E to C and E to J.
      scale: score units per nat.
      mu: of the Gumbel distribution of MSV scores, bits.
      slope: its lambda.
    """

    columns: NDArray[np.uint8]
    letters: NDArray[np.uint8]
    base: int
    bias: int
    tbm: int
    tec: int
    scale: float
    mu: float
    slope: float

    def __len__(self) -> int:
        return len(self.letters)

    @property
    def biased(self) -> NDArray[np.uint8]:
        """HMMER's rbv: uint8 (residues, `NUM_CODES`), cost of a code at a position, plus `bias`."""
        return self.columns[self.letters]

    @property
    def signed_columns(self) -> NDArray[np.int8]:
        """int8 (different, `NUM_CODES`), `columns` without bias, at most 127."""
        return np.minimum(self.columns.astype(np.int16) - self.bias, 127).astype(np.int8)

    @property
    def signed(self) -> NDArray[np.int8]:
        """HMMER's sbv: int8 (residues, `NUM_CODES`), the costs without bias."""
        return self.signed_columns[self.letters]


@dataclasses.dataclass(frozen=True, slots=True)
class Survivors:
    """What a scan of one chunk let through for one query.

    Attributes:
      records: int64 (passing,), places in the chunk, ascending.
      num_msv: targets whose MSV had to be computed.
    """

    records: NDArray[np.int64]
    num_msv: int


def profile_of(sequence: str) -> FilterProfile:
    """Returns the profile that jackhmmer makes of one sequence of upper-case residues.

    Raises:
      MissingExtraError: pyhmmer is not installed.
    """
    _prepare()
    query = _digital(sequence)
    try:
        built = _local.quick.build(query, _local.background)
    except ValueError:
        # So few scores of the later filters, all equal perhaps, may fit no distribution.
        built = _local.builder.build(query, _local.background)
    return unpack_profile(built[2])


def hmmer_profile(sequence: str) -> OptimizedProfile:
    """Returns the same for all of HMMER's filters, with mu, lambda and tau simulated as jackhmmer does.

    Raises:
      MissingExtraError: pyhmmer is not installed.
    """
    _prepare()
    return _local.builder.build(_digital(sequence), _local.background)[2]


def pipeline(**settings: float) -> Pipeline:
    """Returns HMMER's filters and what follows them, with some settings; of this thread alone."""
    plan7, easel = _pyhmmer()
    alphabet = easel.Alphabet.amino()
    return plan7.Pipeline(alphabet, plan7.Background(alphabet), **settings)


def easel_alphabet() -> tuple[Any, Any]:
    """Returns pyhmmer's module of sequences and the alphabet of proteins."""
    easel = _pyhmmer()[1]
    return easel, easel.Alphabet.amino()


def _prepare() -> None:
    """Makes this thread's builders."""
    plan7, easel = _pyhmmer()
    if not hasattr(_local, "builder"):
        alphabet = easel.Alphabet.amino()
        words = {"seed": 42, "popen": 0.02, "pextend": 0.4, "score_matrix": "BLOSUM62"}
        _local.builder = plan7.Builder(alphabet, **words)
        _local.quick = plan7.Builder(alphabet, **words, **_SHORT_SIMULATIONS)
        _local.background = plan7.Background(alphabet)


def _digital(sequence: str) -> Any:
    easel, alphabet = easel_alphabet()
    # A pipeline wants a query to have a name.
    return easel.TextSequence(name=b"query", sequence=sequence).digitize(alphabet)


def pyhmmer_version() -> str:
    """Returns the version of the library that makes the profiles.

    Raises:
      MissingExtraError: pyhmmer is not installed.
    """
    _pyhmmer()
    import pyhmmer

    return pyhmmer.__version__


def _pyhmmer() -> tuple[Any, Any]:
    try:
        from pyhmmer import easel, plan7
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyhmmer", "fast") from error
    return plan7, easel


def unpack_profile(profile: OptimizedProfile) -> FilterProfile:
    """Returns the first filter's part of a profile of HMMER, out of its striped vectors."""
    striped = np.asarray(profile.rbv).reshape(len(SYMBOLS), -1, _PROFILE_LANES)
    vectors = max(2, -(-profile.M // _PROFILE_LANES))
    position = np.arange(profile.M)
    biased = np.full((profile.M, NUM_CODES), 255, dtype=np.uint8)
    biased[:, : len(SYMBOLS)] = striped[:, position % vectors, position // vectors].T
    columns, letters = np.unique(biased, axis=0, return_inverse=True)
    # The order is HMMER's: mu and lambda of MSV, then of Viterbi, then of Forward.
    parameters = profile.evalue_parameters.as_vector()
    return FilterProfile(
        columns=columns,
        letters=np.ascontiguousarray(letters.ravel(), dtype=np.uint8),
        base=profile.base_b,
        bias=profile.bias_b,
        tbm=profile.tbm,
        tec=profile.tec,
        scale=float(np.float32(profile.scale_b)),
        mu=float(parameters[0]),
        slope=float(parameters[1]),
    )


def survivors(
    profiles: Sequence[FilterProfile],
    chunk: Chunk,
    *,
    f1: float,
    kernel: Kernel | DeviceKernel,
    threads: int = 1,
    safety_bits: float = SAFETY_BITS,
) -> list[Survivors]:
    """Returns, for each query, the targets of a chunk that HMMER's MSV filter lets through.

    Args:
      profiles: of the queries.
      chunk: packed for `kernel`.
      f1: HMMER's ``--F1``, the largest P-value that passes.
      kernel: which to use.
      threads: that share the targets.
      safety_bits: how far below the threshold a target passes too.
    """
    found: list[Survivors] = []
    for start in range(0, len(profiles), BATCH):
        batch = profiles[start : start + BATCH]
        best = best_cells(batch, chunk, kernel=kernel, threads=threads)
        found += [
            _passing(profile, row, chunk, f1, kernel, safety_bits)
            for profile, row in zip(batch, best, strict=True)
        ]
    return found


def best_cells(
    profiles: Sequence[FilterProfile], chunk: Chunk, *, kernel: Kernel | DeviceKernel, threads: int = 1
) -> NDArray[np.int8]:
    """Returns int8 (queries, lanes), the best SSV cell of every query and lane; -128 is the begin score.

    Raises:
      ValueError: the profiles have more than 32 different columns; those of single sequences have at most 27.
      DeviceError, KernelError: of a device.
    """
    table, codes = _joined(profiles)
    starts = np.concatenate([[0], np.cumsum([len(profile) for profile in profiles])]).astype(np.int64)
    blocks = chunk.blocks
    if not isinstance(kernel, Kernel):
        return kernel.ssv(blocks, table, codes, starts)
    out = np.empty((len(profiles), len(blocks) * kernel.lanes), dtype=np.int8)
    # Blocks of equal numbers of rows take equal times.
    rows = np.cumsum(blocks.rows, dtype=np.int64)
    cuts = np.searchsorted(rows, np.linspace(0, rows[-1] if len(rows) else 0, threads + 1)[1:-1])
    ends = [0, *(int(cut) for cut in cuts), len(blocks)]

    def scan(part: int) -> float:
        started = time.thread_time()
        scan_kernels.ssv(kernel, blocks, table, codes, starts, first=ends[part], last=ends[part + 1], out=out)
        return time.thread_time() - started

    if threads == 1:
        scan(0)
    else:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            add_helped(sum(pool.map(scan, range(threads))))
    return out


def _joined(profiles: Sequence[FilterProfile]) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Returns the different signed columns of some profiles, and which of them each position has."""
    if len(profiles) == 1:
        return profiles[0].signed_columns, profiles[0].letters
    columns = np.concatenate([profile.signed_columns for profile in profiles])
    table, places = np.unique(columns, axis=0, return_inverse=True)
    if len(table) > MAX_LETTERS:
        raise ValueError(f"{len(table)} different columns; profiles of single sequences have at most 27")
    places = places.ravel().astype(np.uint8)
    before = np.cumsum([0, *(len(profile.columns) for profile in profiles)])
    letters = [places[first + profile.letters] for first, profile in zip(before, profiles, strict=False)]
    return table, np.concatenate(letters)


def add_helped(seconds: float) -> None:
    """Counts CPU seconds of another thread that scanned for this one."""
    _local.helped_s = getattr(_local, "helped_s", 0.0) + seconds


def thread_seconds() -> float:
    """Returns CPU seconds of this thread and of those that scanned for it."""
    return time.thread_time() + getattr(_local, "helped_s", 0.0)


def _passing(
    profile: FilterProfile,
    best: NDArray[np.int8],
    chunk: Chunk,
    f1: float,
    kernel: Kernel | DeviceKernel,
    safety_bits: float,
) -> Survivors:
    lengths, counts = chunk.distinct_lengths
    least_j, length_costs = _least_j(profile, lengths, f1, safety_bits)
    begin_costs = length_costs.astype(np.int64) + profile.tbm
    # In steps above the begin score: what passes or overflows, and from where J may have been used.
    least = np.minimum(least_j + profile.tec, 255 - profile.bias) - (profile.base - begin_costs)
    j_used = begin_costs + profile.tec
    # Nearly all targets end here, so this is one comparison of bytes; lanes lie by length.
    floors = np.clip(np.minimum(least, j_used + 1), 0, _WRAPPED).astype(np.uint8)
    all_steps = best[: chunk.num_records].view(np.uint8) ^ np.uint8(128)
    near = np.flatnonzero(all_steps >= np.repeat(floors, counts))
    steps, kind = all_steps[near].astype(np.int64), np.searchsorted(lengths, chunk.lengths[near])
    # From 128 on a cell may have wrapped past what it stands for, but came from one of at least 128 - bias.
    exact = steps < _WRAPPED
    passes = np.where(exact, steps, _WRAPPED - profile.bias) >= least[kind]
    doubtful = np.flatnonzero(~passes & (~exact | (steps > j_used[kind])))
    if len(doubtful):
        ends = msv_scores(profile, chunk, near[doubtful], kernel=kernel)
        passes[doubtful] = (ends >= least_j[kind[doubtful]]) | (ends == 255)
    passes &= chunk.lengths[near] > 0
    # Left to HMMER.
    refused = np.arange(np.searchsorted(chunk.lengths, MAX_TARGET, side="right"), chunk.num_records)
    return Survivors(np.unique(chunk.order[np.concatenate([near[passes], refused])]), len(doubtful))


def msv_scores(
    profile: FilterProfile, chunk: Chunk, lanes: NDArray[np.int64], *, kernel: Kernel | DeviceKernel
) -> NDArray[np.uint8]:
    """Returns uint8 (chosen,): xJ at the end of HMMER's MSV recurrence for chosen lanes; 255 on overflow."""
    # A device leaves these few to the processor.
    kernel = kernel if isinstance(kernel, Kernel) else kernel.host
    lengths = chunk.lengths[lanes]
    blocks = scan_kernels.gather(chunk.blocks, lanes, lengths, kernel.lanes)
    begin_costs = np.zeros(len(blocks) * kernel.lanes, dtype=np.uint8)
    # HMMER adds the two in bytes; for targets it accepts the sum never reaches 255.
    begin_costs[: len(lanes)] = scan_kernels.length_costs(lengths, profile.scale) + np.uint8(profile.tbm)
    return scan_kernels.msv(
        kernel,
        blocks,
        profile.columns,
        profile.letters,
        base=profile.base,
        bias=profile.bias,
        tec=profile.tec,
        begin_costs=begin_costs,
    )[: len(lanes)]


def _least_j(
    profile: FilterProfile, lengths: NDArray[np.int64], f1: float, safety_bits: float
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Returns, for target lengths, the smallest xJ that passes (256: none does) and tjb."""
    costs = scan_kernels.length_costs(lengths, profile.scale)
    least_bits = least_score(f1, profile.mu, profile.slope) - safety_bits
    null = _null_scores(lengths)
    # The score grows with xJ, in its rounded form too, so where it reaches the threshold is found by halving.
    low, high = np.zeros(len(lengths), dtype=np.int64), np.full(len(lengths), _SCORES)
    for _ in range(_SCORES.bit_length()):
        middle = (low + high) // 2
        bits = _bits(middle, costs, null, profile.base, profile.scale)
        below = (middle < high) & (bits < least_bits)
        low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
    return low, costs


def filter_bits(
    j: NDArray[Any], length_cost: NDArray[Any], length: NDArray[Any], base: int, scale: float
) -> NDArray[np.float32]:
    """Returns the bit score that HMMER's P-value of the first filter is computed from; arguments broadcast.

    Args:
      j: xJ at the end of the recurrence.
      length_cost: tjb.
      length: residues of the target.
      base: score of the begin state.
      scale: score units per nat.
    """
    return _bits(j, length_cost, _null_scores(length), base, scale)


def _null_scores(length: NDArray[Any]) -> NDArray[np.float32]:
    """Returns HMMER's null model of target lengths, nats."""
    one = length.astype(np.float32)
    stay = (one / (one + np.float32(1))).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (one.astype(np.float64) * np.log(stay) + np.log(1.0 - stay)).astype(np.float32)


def _bits(
    j: NDArray[Any], length_cost: NDArray[Any], null: NDArray[np.float32], base: int, scale: float
) -> NDArray[np.float32]:
    score = (j.astype(np.int64) - length_cost).astype(np.float32) - np.float32(base)
    score = (score / np.float32(scale)).astype(np.float64) - 3.0
    return ((score.astype(np.float32) - null).astype(np.float64) / math.log(2)).astype(np.float32)


@functools.lru_cache(maxsize=1024)
def least_score(f1: float, mu: float, slope: float) -> float:
    """Returns the score (bits) from which on the Gumbel survival function is at most `f1`."""
    if f1 >= 1:
        return -math.inf
    return mu - math.log(-math.log1p(-f1)) / slope
