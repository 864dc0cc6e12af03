"""Random but repeatable records for tests."""

import numpy as np

from foldfeed.feature_store import DatabaseUse, MsaRecord, RowProvenance, alphabet


def make_record(name: str, depth: int, length: int, seed: int = 1, big_deletions: bool = True) -> MsaRecord:
    """Returns a valid record of that size; some deletion counts are above 255."""
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
    )
