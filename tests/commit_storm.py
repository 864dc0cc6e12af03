"""Many processes that commit to one store at once, and the check that what happened has one order.

Every worker writes down what each of its transactions did. A replay of all notes in the order of the versions
must give the store as it is in the end, and every version must be somebody's.
"""

import dataclasses
import multiprocessing
import random
import time
import traceback
from pathlib import Path

from records import make_record

from foldfeed.feature_store import CommitConflictError, FeatureStore, RecordNotFoundError, write_part
from foldfeed.feature_store.care.verify import verify


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What one transaction did: fingerprint by id for records that came, None for those that went."""

    version: int
    changes: dict[str, str | None]


def _run(url: str, worker: int, seconds: float, answers: multiprocessing.Queue) -> None:
    try:
        answers.put(_storm(url, worker, seconds))
    except BaseException:
        answers.put(traceback.format_exc())
        raise


def _storm(url: str, worker: int, seconds: float) -> tuple[list[Note], dict[str, int]]:
    rng = random.Random(worker)
    notes: list[Note] = []
    tries = {"commit": 0, "replace": 0, "delete": 0, "again": 0, "conflict": 0, "lost": 0}
    deadline = time.monotonic() + seconds
    number = 0
    while time.monotonic() < deadline or not notes:
        number += 1
        kind = rng.choices(["commit", "replace", "delete", "again"], [70, 15, 10, 5])[0]
        tries[kind] += 1
        note = _ACTIONS[kind](url, worker, number, rng, tries)
        if note is not None:
            notes.append(note)
    return notes, tries


def _commit(url, worker, number, rng, tries):
    """A record of one's own, and one that every worker brings, with the same content or another."""
    store = FeatureStore.open(url)
    own = make_record(f"own{worker}_{number}", 2, 5, seed=number)
    same = make_record(f"same{number}", 2, 5, seed=7)
    records = {own.record_id: own, same.record_id: same}
    if rng.random() < 0.3:
        fought = make_record(f"fought{number}", 2, 5, seed=worker)
        records[fought.record_id] = fought
    part = write_part(url, [records[name] for name in sorted(records)], store.settings)
    try:
        result = store.commit([part.part_id], job_id=f"{worker}-{number}")
    except CommitConflictError:
        tries["conflict"] += 1
        result = store.commit([part.part_id], job_id=f"{worker}-{number}", on_existing="skip")
    assert result.num_added >= 1
    new = _changes(url, result.version)
    assert own.record_id in new
    return Note(version=result.version, changes=new)


def _replace(url, worker, number, rng, tries):
    store = FeatureStore.open(url)
    record = make_record(f"hot{rng.randrange(3)}", 2, 5, seed=1000 * worker + number)
    part = write_part(url, [record], store.settings)
    result = store.commit([part.part_id], job_id=f"{worker}-{number}", on_existing="replace")
    return Note(version=result.version, changes={record.record_id: record.fingerprint})


def _delete(url, worker, number, rng, tries):
    store = FeatureStore.open(url)
    name = rng.choice(store.ids) if store.ids else "none"
    try:
        result = store.delete([name], job_id=f"{worker}-{number}")
    except RecordNotFoundError:
        tries["lost"] += 1
        return None
    return Note(version=result.version, changes={name: None})


def _again(url, worker, number, rng, tries):
    """A job that was done, by whoever, done once more."""
    store = FeatureStore.open(url)
    jobs = [entry.job_id for entry in store.log()[:50] if entry.job_id]
    if jobs:
        record = make_record(f"again{number}", 2, 5, seed=worker)
        part = write_part(url, [record], store.settings)
        result = store.commit([part.part_id], job_id=rng.choice(jobs))
        assert result.already_done
        assert result.num_added == 0
    return None


_ACTIONS = {"commit": _commit, "replace": _replace, "delete": _delete, "again": _again}


def _changes(url: str, version: int) -> dict[str, str | None]:
    now, then = (_content(FeatureStore.open(url, version=number)) for number in (version, version - 1))
    return {name: fingerprint for name, fingerprint in now.items() if then.get(name) != fingerprint}


def _content(store: FeatureStore) -> dict[str, str]:
    rows = store.table(["record_id", "fingerprint"])
    return dict(zip(rows["record_id"].to_pylist(), rows["fingerprint"].to_pylist(), strict=True))


def run_storm(folder: Path, num_workers: int, seconds: float) -> dict[str, int]:
    """Runs the workers on a store in a folder, checks the outcome, returns counts."""
    return storm_at(folder / "storm", num_workers, seconds)


def storm_at(url: str | Path, num_workers: int, seconds: float) -> dict[str, int]:
    """Runs the workers on a new store, checks the outcome, returns counts."""
    store = FeatureStore.create(url)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [
        context.Process(target=_run, args=(store.url, n, seconds, answers)) for n in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=seconds + 240) for _ in workers]
    for worker in workers:
        worker.join(60)
    failed = [answer for answer in found if isinstance(answer, str)]
    assert not failed, failed[0]
    notes = sorted((note for of_worker, _ in found for note in of_worker), key=lambda note: note.version)
    return check_storm(store.url, notes) | {
        kind: sum(tries[kind] for _, tries in found) for kind in found[0][1]
    }


def check_storm(url: str, notes: list[Note]) -> dict[str, int]:
    """Holds the store against the workers' notes."""
    after = FeatureStore.open(url)
    log = after.log()
    assert [entry.version for entry in log] == list(range(after.version, -1, -1))
    assert [note.version for note in notes] == list(range(1, after.version + 1)), "a version is nobody's"
    model: dict[str, str] = {}
    for note in notes:
        for name, fingerprint in note.changes.items():
            if fingerprint is None:
                del model[name]
            else:
                model[name] = fingerprint
    assert _content(after) == model
    assert len(after.ids) == len(set(after.ids))
    jobs = [entry.job_id for entry in log if entry.job_id]
    assert len(jobs) == len(set(jobs)), "a job committed twice"
    assert verify(url, level="quick").problems == ()
    return {"versions": after.version, "records": len(after)}
