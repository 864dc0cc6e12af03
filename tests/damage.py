"""Damages files of a store, one byte or one cut at a time, and says what a reader made of it.

The store is small and has everything: several parts and versions, a replaced and a deleted record, a
checkpoint, tags, own columns, a named set, a split, retention. What may happen to a reader: the right values,
or a typed error. Nothing else.
"""

import collections
import dataclasses
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from records import make_record

from foldfeed.feature_store import FeatureStore, FoldfeedError, StoreSettings, write_part
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.index.tags import list_tags, set_oldest_version, set_tag
from foldfeed.feature_store.storage import open_blobs

VERSIONS_READ = (None, "paper", 4)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One change to one file.

    Attributes:
      path: relative to the store.
      start: first byte that differs.
      mask: what is XORed to it; 0 cuts the file off there.
    """

    path: str
    start: int
    mask: int

    def apply(self, data: bytes) -> bytes:
        if self.mask == 0:
            return data[: self.start]
        return data[: self.start] + bytes([data[self.start] ^ self.mask]) + data[self.start + 1 :]


def make_store(root: Path) -> FeatureStore:
    store = FeatureStore.create(root, StoreSettings(tile_rows=16, tile_cols=8))

    def commit(names: str, job: str, seed: int, **options: str) -> None:
        records = [make_record(name, 20 + seed, 13, seed=seed, templates=True) for name in names]
        part = write_part(store.url, records, store.settings)
        store.commit([part.part_id], job_id=job, **options)

    commit("abc", "job-1", 1)
    commit("de", "job-2", 2)
    set_tag(store.url, "paper", message="as printed")
    commit("bf", "job-3", 3, on_existing="replace")
    DeltaTable(f"{store.url}/index").create_checkpoint()
    store.delete(["d"], job_id="job-4", message="wrong chain")
    store.annotate(pa.table({"record_id": ["a", "e"], "cluster": ["x", "y"]}), job_id="job-5")
    store.save_set("deep", "select record_id from records where depth > 21")
    set_oldest_version(open_blobs(store.url), 1)
    return FeatureStore.open(root)


def read_everything(root: Path) -> list:
    """Returns all that a store says, in a form that compares exactly."""
    found: list = []
    for version in VERSIONS_READ:
        store = FeatureStore.open(root, version)
        found.append((store.version, store.ids, store.fingerprint, store.settings, len(store)))
        found.append(store.table().to_pylist())
    store = FeatureStore.open(root)
    for name in store.ids:
        record = store[name]
        for array in (record.msa(), record.deletions(), *record.features().values()):
            found.append((array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes()))
        found.append(record.rows().to_pylist())
        found.append(record.templates().fingerprint)
    found.append(
        [(entry.version, entry.time, entry.message, entry.job_id, entry.tags) for entry in store.log()]
    )
    found.append(list_tags(store.url))
    chosen = store.set("deep")
    found.append((chosen.fingerprint, chosen.ids, chosen.sql, chosen.store_version, chosen.within))
    return found


def files_of(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def kind_of(path: str) -> str:
    """Returns the group of files that a report counts it with."""
    name = path.rsplit("/", 1)[-1]
    if path.startswith("parts/"):
        return "part metadata" if name == "zarr.json" else "part shard"
    if path.startswith("index/_delta_log/"):
        return "commit log" if name.endswith(".json") else f"checkpoint ({name.rsplit('.', 1)[-1]})"
    return "index file" if path.startswith("index/") else path


def draw(rng: random.Random, paths: list[str], root: Path, number: int) -> Damage:
    """Returns a damage: the files one after the other, every fifth a cut."""
    path = paths[number % len(paths)]
    size = (root / path).stat().st_size
    start = rng.randrange(size) if size else 0
    return Damage(path=path, start=start, mask=0 if number % 5 == 0 else rng.randrange(1, 256))


def outcome_of(root: Path, damage: Damage, truth: list) -> str:
    """Applies a damage, looks, takes it back.

    Returns: ``read`` or ``verify`` (where it was detected), ``harmless`` (every value is right and `verify`
      is content), or a description of what must not be.
    """
    path = root / damage.path
    original = path.read_bytes()
    if damage.mask == 0 and damage.start >= len(original):
        return "harmless"
    path.write_bytes(damage.apply(original))
    try:
        if read_everything(root) != truth:
            return f"WRONG VALUE after {damage}"
        return "verify" if verify(root, level="full").problems else "harmless"
    except (FoldfeedError, ValueError) as error:
        # ValueError: "there is no such version" is right when the log is cut.
        return "read" if isinstance(error, FoldfeedError) or "does not exist" in str(error) else repr(error)
    except BaseException as error:  # noqa: BLE001 -- a panic of a library is what we look for
        return f"UNTYPED {type(error).__name__}: {error} after {damage}"
    finally:
        path.write_bytes(original)


def campaign(
    root: Path, number: int, seed: int, tell=lambda done, counts: None, paths: list[str] | None = None
) -> dict:
    """Returns outcomes counted by kind of file, of damages to all files in turn or to some of them."""
    rng = random.Random(seed)
    truth = read_everything(root)
    paths = files_of(root) if paths is None else paths
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    wrong = []
    for done in range(number):
        damage = draw(rng, paths, root, done)
        outcome = outcome_of(root, damage, truth)
        if outcome not in ("read", "verify", "harmless"):
            wrong.append(outcome)
            outcome = "FAULT"
        counts[kind_of(damage.path)][outcome] += 1
        tell(done + 1, counts)
    assert read_everything(root) == truth
    return {"counts": {kind: dict(found) for kind, found in sorted(counts.items())}, "faults": wrong}
