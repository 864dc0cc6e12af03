"""Random but repeatable records for tests."""

import numpy as np

from foldfeed.feature_store import DatabaseUse, MsaRecord, RowProvenance, Structure
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.effective_rows import measure_effective_rows
from foldfeed.feature_store.format.structure import NO_NUMBER, NUM_ATOMS


def make_record(name: str, depth: int, length: int, seed: int = 1, big_deletions: bool = True) -> MsaRecord:
    """Returns a valid record of that size; some deletion counts are above 255.

    Odd lengths come with a structure, depths that three divides with N_eff, depths of two more than a
    multiple of four with pairing keys.
    """
    rng = np.random.default_rng((seed, depth, length))
    msa = rng.integers(0, alphabet.NUM_TOKENS, (depth, length)).astype(np.uint8)
    msa[0] = rng.integers(0, 21, length)
    deletions = rng.integers(1, 700 if big_deletions else 200, (depth, length)).astype(np.int32)
    deletions[rng.random((depth, length)) > 0.03] = 0
    hits = depth - 1
    rows = RowProvenance(
        database=np.concatenate([[-1], rng.integers(0, 2, hits)]).astype(np.int16),
        e_value=np.concatenate([[np.nan], rng.random(hits)]),
        bit_score=np.concatenate([[np.nan], rng.random(hits)]).astype(np.float32),
        hit_id=[name, *(f"Hit_{number}/1-{length}·é" for number in range(hits))],
        species=["", *rng.choice(["HUMAN", "ECOLI", "", "9BACT"], hits).tolist()],
        pairing_key=["", *(str(row) if row % 3 else "" for row in range(hits))] if depth % 4 == 2 else (),
    )
    databases = tuple(
        DatabaseUse(
            name=database,
            digest="0" * 64,
            tool="jackhmmer",
            tool_version="3.3.2",
            num_hits=hits,
            num_rows=int((rows.database == code).sum()),
        )
        for code, database in enumerate(("uniref90", "mgnify"))
    )
    return MsaRecord(
        record_id=name,
        description=f"record {name}",
        sequence=alphabet.decode(msa[0]),
        msa=msa,
        deletions=deletions,
        rows=rows,
        databases=databases,
        extra={"source": "test"},
        structure=make_structure(length, seed) if length % 2 else None,
        neff=measure_effective_rows(msa) if depth % 3 == 0 else None,
    )


def make_structure(length: int, seed: int = 1) -> Structure:
    """Returns random atoms; some residues have none, some have no number."""
    rng = np.random.default_rng((seed, length, 37))
    mask = (rng.random((length, NUM_ATOMS)) < 0.2) & (rng.random((length, 1)) < 0.8)
    numbers = np.arange(-3, length - 3, dtype=np.int32)
    numbers[rng.random(length) < 0.1] = NO_NUMBER
    return Structure(
        atom_positions=np.where(mask[..., None], rng.normal(0, 40, (length, NUM_ATOMS, 3)), 0).astype("f4"),
        atom_mask=mask.astype(np.uint8),
        b_factor=np.where(mask, rng.random((length, NUM_ATOMS)) * 90, 0).astype("f4"),
        residue_number=numbers,
        insertion_code=rng.choice([0, 0, 0, ord("A")], length).astype(np.uint8),
        source={"entry_id": "1ABC", "label_asym_id": "A", "model": "1"},
    )
