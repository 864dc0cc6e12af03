"""AlphaFold 2's features of one sample in plain loops: slow, obvious, independent of the loader's code.

It takes the whole alignment and the draws of a plan (which rows, which window, what is masked) and follows
the text of the supplement step by step. Only numbers drawn by chance are shared with the loader.
"""

import math

import numpy as np
import torch

GAP, MASK = 21, 22


def mean_one_hot(msa: np.ndarray) -> np.ndarray:
    """float64 (L, 22) share of each token over all rows."""
    depth, length = msa.shape
    profile = np.zeros((length, 22))
    for row in range(depth):
        for column in range(length):
            profile[column, msa[row, column]] += 1
    return profile / depth


def replaced(code: int, action: int, profile_column: np.ndarray, u: float | None) -> int:
    if action in (255, 24):
        return code
    if action != 25:
        return action
    total = 0.0
    for token in range(22):
        total += profile_column[token]
        if u < total / profile_column.sum():
            return token
    raise AssertionError("u is below 1")


def nearest(member: list[int], centres: list[list[int]]) -> int:
    best, best_score = 0, -1
    for number, centre in enumerate(centres):
        score = sum(a == b and a not in (GAP, MASK) for a, b in zip(member, centre, strict=True))
        if score > best_score:
            best, best_score = number, score
    return best


def value(count: float) -> float:
    return 2.0 / math.pi * math.atan(count / 3.0)


def reference_sample(msa: np.ndarray, deletions: np.ndarray, plan, recipe) -> dict[str, np.ndarray]:
    columns = list(range(*plan.columns))
    crop = list(range(*plan.crop))
    profile = mean_one_hot(msa).astype(np.float32)
    u_of = dict(zip(plan.masking.profile_at.tolist(), plan.masking.profile_u.tolist(), strict=True))
    centres = [
        [
            replaced(
                int(msa[rank, column]),
                int(plan.masking.action[slot, place]),
                profile[column].astype(np.float64),
                u_of.get(slot * len(columns) + place),
            )
            for place, column in enumerate(columns)
        ]
        for slot, rank in enumerate(plan.centres)
    ]
    member_ranks = [int(rank) for rank in plan.rows if rank not in plan.centres]
    groups: list[list[int]] = [[] for _ in centres]
    for rank in member_ranks:
        groups[nearest([int(msa[rank, column]) for column in columns], centres)].append(rank)

    size_c, size_e, size_r = recipe.num_clusters, recipe.num_extra, recipe.crop_residues
    out = {
        "aatype": np.zeros(size_r, np.int64),
        "residue_index": np.zeros(size_r, np.int64),
        "seq_mask": np.zeros(size_r, np.float32),
        "target_feat": np.zeros((size_r, 22), np.float32),
        "msa_feat": np.zeros((size_c, size_r, 49), np.float32),
        "msa_mask": np.zeros((size_c, size_r), np.float32),
        "true_msa": np.zeros((size_c, size_r), np.int64),
        "bert_mask": np.zeros((size_c, size_r), np.float32),
        "extra_msa": np.zeros((size_e, size_r), np.int64),
        "extra_has_deletion": np.zeros((size_e, size_r), np.float32),
        "extra_deletion_value": np.zeros((size_e, size_r), np.float32),
        "extra_msa_mask": np.zeros((size_e, size_r), np.float32),
    }
    for place, column in enumerate(crop):
        out["aatype"][place] = msa[0, column]
        out["residue_index"][place] = column
        out["seq_mask"][place] = 1
        out["target_feat"][place, 1 + msa[0, column]] = 1
        read_place = columns.index(column)
        for slot, rank in enumerate(plan.centres):
            code = centres[slot][read_place]
            channels = out["msa_feat"][slot, place]
            channels[code] = 1
            channels[23] = deletions[rank, column] > 0
            channels[24] = value(deletions[rank, column])
            members = groups[slot]
            size = np.float32(np.float32(1e-6) + np.float32(1)) + np.float32(len(members))
            counts = np.zeros(23, np.float32)
            counts[code] += 1
            deleted = int(deletions[rank, column])
            for member in members:
                counts[msa[member, column]] += 1
                deleted += int(deletions[member, column])
            channels[25:48] = counts / size
            channels[48] = value(np.float32(deleted) / size)
            out["msa_mask"][slot, place] = 1
            out["true_msa"][slot, place] = msa[rank, column]
            out["bert_mask"][slot, place] = plan.masking.action[slot, read_place] != 255
        for slot, rank in enumerate(plan.extras):
            out["extra_msa"][slot, place] = msa[rank, column]
            out["extra_has_deletion"][slot, place] = deletions[rank, column] > 0
            out["extra_deletion_value"][slot, place] = value(deletions[rank, column])
            out["extra_msa_mask"][slot, place] = 1
    return out


def assert_same_features(have, want, *, rtol: float = 0.0) -> None:
    """Two feature dictionaries agree in names, dtypes, shapes, NaN and values, wherever they lie.

    Comparing only the names of one side, or with equal_nan, has hidden a missing feature and a NaN.
    """
    assert sorted(have) == sorted(want), sorted({*have} ^ {*want})
    for key, tensor in want.items():
        other = have[key].cpu()
        assert other.dtype == tensor.dtype, f"{key}: {other.dtype}, not {tensor.dtype}"
        assert other.shape == tensor.shape, f"{key}: {tuple(other.shape)}, not {tuple(tensor.shape)}"
        for name, one in (("left", other), ("right", tensor.cpu())):
            if one.is_floating_point():
                assert not bool(torch.isnan(one).any()), f"{key}: NaN on the {name}"
        same = torch.allclose(other.double(), tensor.cpu().double(), rtol=rtol, atol=0)
        assert same, f"{key}: other values"
