"""Random but repeatable records for tests."""

import datetime

import numpy as np

from foldfeed.feature_store import DatabaseUse, MsaRecord, RowProvenance, Structure, TemplateHit, Templates
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.format.effective_rows import measure_effective_rows
from foldfeed.feature_store.format.structure import NO_NUMBER, NUM_ATOMS
from foldfeed.feature_store.format.templates import runs_of


def make_record(
    name: str,
    depth: int,
    length: int,
    seed: int = 1,
    big_deletions: bool = True,
    templates: bool = False,
) -> MsaRecord:
    """Returns a valid record of that size; some deletion counts are above 255.

    Odd lengths come with a structure, depths that three divides with N_eff, depths of two more than a
    multiple of four with pairing keys. Templates are there when they are asked for.
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
        templates=make_templates(length, seed) if templates else None,
    )


def make_templates(length: int, seed: int = 1) -> Templates:
    """Returns random hits of a query of that length, none for one seed in five.

    Some say nothing but an alignment; alignments have gaps on both sides.
    """
    rng = np.random.default_rng((seed, length, 20))
    hits = []
    for number in range(0 if seed % 5 == 4 else int(rng.integers(1, 6))):
        sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWYX"), int(rng.integers(1, 3 * length + 2))))
        most = min(length, len(sequence))
        num_pairs = int(rng.integers(1, most + 1))
        pairs = [np.sort(rng.choice(size, num_pairs, replace=False)) for size in (length, len(sequence))]
        known = number % 3 != 1
        hits.append(
            TemplateHit(
                template_id=f"{number + 1}ab{'c' * number}_{'A' * (number + 1)}·é",
                sequence=sequence,
                runs=runs_of(np.stack(pairs, axis=1)),
                release_date=datetime.date(1960 + 20 * number, 1 + number, 28) if known else None,
                resolution_angstrom=1.74 + number if known else None,
                e_value=float(rng.random()) if known else None,
                score=float(rng.normal(0, 100)),
                probability=99.5 if number == 2 else None,
                sum_probs=87.25 if number == 2 else None,
            )
        )
    return Templates(hits=tuple(hits), source={"database": "pdb", "tool": "hmmsearch", "num_hits": "77"})


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
