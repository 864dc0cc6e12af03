"""How much crop_first differs from af2: cluster assignments, profiles, and what each reads.

    python bench/recipe_difference.py [--samples N] [--crop R]

Both recipes draw the same crop, rows and masks. Per sample: the share of extra rows that both give to the
same centre (rows of `crop_first`; `af2` clusters them too), the distance of the cluster profiles, and the
stored bytes and cells that each reads. Then what the rows of `crop_first` are like from stores of both row
orders: from a permuted one they are a uniform sample of the hits, as many as block deletion leaves. One JSON
row.
"""

import argparse
import tempfile
from pathlib import Path

import loader_store
import numpy as np
import torch
from rows import emit

from foldfeed.feature_store import Slab
from foldfeed.feature_store.format import alphabet
from foldfeed.loader import CropLoader, Recipe
from foldfeed.loader.features import bit_counters
from foldfeed.loader.features.featurise import replace_masked
from foldfeed.loader.features.raw import RawSample
from foldfeed.loader.reading.fetch import fetch

NAME = "recipe_difference"
RESULTS = Path(__file__).parent / "results"
NAMES = ("af2", "crop_first")


def assignment_by_rank(loader: CropLoader, sample: int) -> dict[int, int]:
    """Returns the centre of every row that is no centre, by rank."""
    plan = loader.plan(sample)
    raw = RawSample.of(fetch(loader.store.at(plan.address.record), plan).arrays)
    centres = replace_masked(raw.msa[raw.centre_at], raw.action, raw.profile, raw.profile_at, raw.profile_u)
    found = bit_counters.nearest(raw.msa[raw.member_at].numpy(), centres.numpy())
    return dict(zip(plan.rows[raw.member_at.numpy()].tolist(), found.tolist(), strict=True))


def compare(loaders: dict[str, CropLoader], num_samples: int) -> dict[str, float]:
    same, profile, deletion, crop_share = [], [], [], []
    read = {name: {"cells": [], "stored_bytes": []} for name in NAMES}
    for g in range(num_samples):
        full, cropped = (assignment_by_rank(loaders[name], g) for name in NAMES)
        plan = loaders["af2"].plan(g)
        crop_share.append((plan.crop[1] - plan.crop[0]) / plan.length)
        if cropped:
            same.append(np.mean([full[rank] == centre for rank, centre in cropped.items()]))
        a, b = (loaders[name].sample(g) for name in NAMES)
        here = a["msa_mask"] > 0
        apart = (a["msa_feat"] - b["msa_feat"]).abs()[here]
        profile.append(float(apart[:, 25:48].sum(dim=-1).mean()) / 2)
        deletion.append(float(apart[:, 48].mean()))
        for name in NAMES:
            plan = loaders[name].plan(g)
            record = loaders[name].store.at(plan.address.record)
            read[name]["cells"].append(plan.num_cells)
            read[name]["stored_bytes"].append(record.crop_bytes(slice(*plan.columns), plan.selection))
    row = {
        "assignment_agreement": float(np.mean(same)),
        "assignment_agreement_p10": float(np.quantile(same, 0.1)),
        "profile_total_variation": float(np.mean(profile)),
        "deletion_value_mean_abs_difference": float(np.mean(deletion)),
        "crop_share_of_length": float(np.mean(crop_share)),
    }
    for name in NAMES:
        row |= {f"{name}_{key}_per_sample": float(np.mean(values)) for key, values in read[name].items()}
    return row


def rows_of_samples(loader: CropLoader, num_samples: int) -> dict[str, float]:
    """Returns what the hits of samples are like: where they rank, how close to the query, how full."""
    rank, identity, gaps, count = [], [], [], []
    for g in range(num_samples):
        plan = loader.plan(g)
        record = loader.store.at(plan.address.record)
        columns = slice(*plan.columns)
        crop = record.crop(columns, plan.selection)
        ranks = crop.ranks if isinstance(crop, Slab) else plan.rows
        if len(ranks) > 1:
            rank.append(ranks[1:].mean() / record.depth)
            identity.append((crop.msa[1:] == crop.msa[0]).mean())
            gaps.append((crop.msa[1:] == alphabet.GAP).mean())
        count.append(len(ranks) - 1)
    return {
        "hits": float(np.mean(count)),
        "mean_rank_share": float(np.mean(rank)),
        "mean_rank_share_sd": float(np.std(rank)),
        "identity_to_query": float(np.mean(identity)),
        "gaps": float(np.mean(gaps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--min-depth", type=int, default=200)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--crop", type=int, default=64, help="residues of a crop")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{NAME}.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, about = loader_store.build(f"{folder}/store", arguments.min_depth)
        recipes = {name: Recipe.named(name, crop_residues=arguments.crop) for name in NAMES}
        loaders = {name: CropLoader(store, recipes[name], seed=0, global_batch=1) for name in NAMES}
        config = {
            "samples": arguments.samples,
            "crop_residues": arguments.crop,
            "num_clusters": recipes["af2"].num_clusters,
            "num_extra": recipes["af2"].num_extra,
        }
        results = compare(loaders, arguments.samples)
        permuted, _ = loader_store.build(f"{folder}/permuted", arguments.min_depth, "permuted")
        for name, chosen in (("rank", store), ("permuted", permuted)):
            loader = CropLoader(chosen, recipes["crop_first"], seed=0, global_batch=1)
            found = rows_of_samples(loader, 5 * arguments.samples)
            results |= {f"crop_first_{name}_{key}": value for key, value in found.items()}
        emit(NAME, config | about, results, arguments.output)


if __name__ == "__main__":
    main()
