"""What a build leaves in the result store: its dead letters, and a mark that nothing is left to do.

Owns ``jobs/JOB_ID/dead_letters.jsonl`` and ``jobs/JOB_ID/finished-STORE.json``. Does not own the commit.
Neither Beam nor the reader of parts is imported here: a build that finds a mark ends within a second.

Invariant: a mark is believed only when the store still knows its commit and every search of the plan still
has its answer, so that the general way would search nothing and commit nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from foldfeed.feature_store.errors import NotAStoreError
from foldfeed.feature_store.format.settings import SETTINGS_FILE, StoreSettings
from foldfeed.feature_store.index.transactions import Index
from foldfeed.feature_store.storage import Blobs, open_blobs
from foldfeed.pipelines.build_config import BuildConfig
from foldfeed.pipelines.costs import DatabaseCost
from foldfeed.pipelines.planning.plan import Plan
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.sequences import DeadLetter

# Of the mark's fields; another number is as good as no mark.
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A build that searched everything and committed.

    Attributes:
      store: URL of the feature store.
      job_id: of the build.
      commit_id: of its transaction.
      part_ids: parts that it wrote.
      num_records: records in them.
      dead_letters: entries that are not in the store, in file order.
      costs: of its searches, by database.
      ledger_path: the same by record and database.
    """

    store: str
    job_id: str
    commit_id: str
    part_ids: tuple[str, ...]
    num_records: int
    dead_letters: tuple[DeadLetter, ...]
    costs: tuple[DatabaseCost, ...]
    ledger_path: str


def write_dead_letters(letters: Sequence[DeadLetter], results_url: str, job_id: str) -> str:
    """Writes the list of a job's dead letters and returns where it lies."""
    path = f"jobs/{job_id}/dead_letters.jsonl"
    blobs = open_blobs(results_url)
    data = "".join(json.dumps(letter.to_json()) + "\n" for letter in letters).encode()
    blobs.write_atomic(path, data)
    return f"{blobs.url}/{path}"


def write_completeness(
    plan: Plan,
    letters: Sequence[DeadLetter],
    *,
    num_records: int,
    num_answered: int,
    num_failed: int,
    results_url: str,
    job_id: str,
) -> None:
    """Writes ``jobs/JOB_ID/completeness.json``: what became of every entry and search."""
    kinds = Counter((letter.stage, letter.kind, letter.retry) for letter in letters)
    content = {
        "entries": plan.coverage.count,
        "records": num_records,
        "dead_letters": [
            {"stage": stage, "kind": kind, "retry": retry, "count": count}
            for (stage, kind, retry), count in sorted(kinds.items())
        ],
        "searches": {"planned": len(plan.unit_ids), "answered": num_answered, "failed": num_failed},
        "complete": num_records == plan.coverage.count,
    }
    data = json.dumps(content, indent=1).encode()
    open_blobs(results_url).write_atomic(f"jobs/{job_id}/completeness.json", data)


def mark_finished(finished: Finished, results_url: str) -> None:
    """Leaves the mark; call it only after the commit, and only if no search failed."""
    text = json.dumps({"format": _FORMAT, **dataclasses.asdict(finished)}, indent=1)
    open_blobs(results_url).write_atomic(_path(finished.store, finished.job_id), text.encode())


def may_be_finished(config: BuildConfig) -> bool:
    """Returns whether a build into an existing store may have nothing to do; cheap, and often wrong."""
    has_jobs = bool(open_blobs(config.results_url).list("jobs"))
    return has_jobs and open_blobs(config.store).exists(SETTINGS_FILE)


def find_finished(config: BuildConfig, job_id: str, plan: Plan) -> tuple[Finished, int] | None:
    """Returns the mark of a job and the newest version of the store, or None when there is something to do.

    Raises:
      CorruptDataError: the store's log is damaged.
    """
    store = open_blobs(config.store)
    finished = _read(open_blobs(config.results_url), store.url, job_id)
    if finished is None or not store.exists(SETTINGS_FILE):
        return None
    settings = StoreSettings.from_json(store.read(SETTINGS_FILE), store.url)
    # Options that the store contradicts are refused by the general way, in its words.
    if config.row_order not in (None, settings.row_order):
        return None
    if config.row_order_seed is not None and config.row_order_seed != settings.row_order_seed:
        return None
    if ResultStore(config.results_url).count_present(plan.unit_ids) < len(plan.unit_ids):
        return None
    try:
        index = Index.open(store.url, None)
    except NotAStoreError:
        return None
    return (finished, index.version) if index.knows_job(finished.commit_id) else None


def _read(results: Blobs, store_url: str, job_id: str) -> Finished | None:
    path = _path(store_url, job_id)
    if not results.exists(path):
        return None
    try:
        fields: dict[str, Any] = json.loads(results.read(path))
        if fields.pop("format") != _FORMAT:
            return None
        fields["part_ids"] = tuple(fields["part_ids"])
        fields["dead_letters"] = tuple(DeadLetter(**letter) for letter in fields["dead_letters"])
        # Nothing of what is reported was done in the run that reports it.
        fields["costs"] = tuple(
            DatabaseCost(**{**cost, "num_new": 0, "new_cpu_s": 0.0}) for cost in fields["costs"]
        )
        return Finished(**fields)
    except (ValueError, TypeError, KeyError):
        # A damaged mark is no mark: the general way finds out what is done and leaves a new one.
        return None


def _path(store_url: str, job_id: str) -> str:
    """Returns the place of a mark: several stores may share one result store."""
    return f"jobs/{job_id}/finished-{hashlib.sha256(store_url.encode()).hexdigest()[:16]}.json"
