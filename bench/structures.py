"""How fast protein chains come from mmCIF text and from a store, beside Biopython as AlphaFold 2 reads it.

Ways: `gemmi` parses the text and stops (the ceiling), `foldfeed` gives sequence and atoms of every chain,
`biopython` the atoms alone, `store` reads the same structures back. Needs gemmi and the real entries of
FOLDFEED_TEST_DATA; without Biopython its column is missing.
Run: python bench/structures.py [--output bench/results/structures.jsonl]
Prints one JSON row. Times are medians of CPU time on one thread; files are unpacked before.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gemmi
import numpy as np
import rows

from foldfeed.feature_store import FeatureStore, import_into, read_mmcif
from foldfeed.feature_store.format.structure import ATOM_NAMES
from foldfeed.feature_store.importers.layouts import AlignmentImport

ROUNDS = 5
SLOT = {name: slot for slot, name in enumerate(ATOM_NAMES)}


def biopython_atoms(text: str) -> int:
    """Atoms of the first model in 37 slots, as AlphaFold 2 takes them from Biopython's objects."""
    from Bio.PDB.MMCIFParser import MMCIFParser

    num_atoms = 0
    for chain in next(MMCIFParser(QUIET=True).get_structure("x", io.StringIO(text)).get_models()):
        for residue in chain:
            positions, mask = np.zeros((37, 3), np.float32), np.zeros(37, np.float32)
            for atom in residue:
                slot = SLOT.get(atom.name)
                if slot is not None:
                    positions[slot], mask[slot] = atom.coord, 1
            num_atoms += int(mask.sum())
    return num_atoms


def seconds(work: Callable[[], object]) -> float:
    """Median CPU time of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shared = Path(os.environ.get("FOLDFEED_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    paths = sorted((shared / "structures").glob("*.cif*"))
    if not paths:
        print(f"no entries in {shared / 'structures'}; set FOLDFEED_TEST_DATA")
        return
    texts = [
        gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for data in map(Path.read_bytes, paths)
    ]
    chains = [chain for text in texts for chain in read_mmcif(text)]
    took = {
        "gemmi": seconds(lambda: [gemmi.cif.read_string(text) for text in texts]),
        "foldfeed": seconds(lambda: [list(read_mmcif(text)) for text in texts]),
    }
    if importlib.util.find_spec("Bio") is not None:
        decoded = [text.decode() for text in texts]
        took["biopython"] = seconds(lambda: [biopython_atoms(text) for text in decoded])
    with tempfile.TemporaryDirectory() as folder:
        import_into(f"{folder}/store", AlignmentImport(shared / "structures", "mmcif"))
        store = FeatureStore.open(f"{folder}/store")
        took["store"] = seconds(lambda: [store[name].structure() for name in store.ids])
    size_mb = sum(map(len, texts)) / 1e6
    rows.emit(
        "structures",
        {
            "entries": len(texts),
            "chains": len(chains),
            "text_mb": round(size_mb, 1),
            "rounds": ROUNDS,
            "gemmi": gemmi.__version__,
            "biopython": importlib.metadata.version("biopython") if "biopython" in took else None,
        },
        {f"{way}_mb_per_s": round(size_mb / took[way], 1) for way in took}
        | {f"{way}_chains_per_s": round(len(chains) / took[way]) for way in took}
        | {f"{way}_over_foldfeed": round(took[way] / took["foldfeed"], 3) for way in took},
        arguments.output,
    )


if __name__ == "__main__":
    main()
