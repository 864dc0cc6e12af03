"""Random numbers of the trainer: every draw is keyed by what it is for, no generator state is carried along.

A snapshot therefore holds no RNG state, and a virtual shard meets the same dropout masks on whichever rank
runs it. Keys are (run seed, purpose, step, virtual shard), hashed to the seed of torch's global generators.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Returns a 63-bit seed for one purpose; equal keys give equal seeds on every machine."""
    key = ":".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"foldfeed").digest()
    return int.from_bytes(digest, "little") >> 1


def seed_shard(seed: int, step: int, shard: int) -> None:
    """Seeds torch (all devices) for the forward pass of one virtual shard."""
    torch.manual_seed(derive_seed(seed, "dropout", step, shard))


def seed_look(seed: int, step: int, shard: int) -> None:
    """Seeds torch (all devices) for one virtual shard of a look at held-out records; every look alike."""
    torch.manual_seed(derive_seed(seed, "look", step, shard))


def seed_initial_weights(seed: int) -> None:
    """Seeds torch for building the model, so that every rank builds equal weights."""
    torch.manual_seed(derive_seed(seed, "weights"))
