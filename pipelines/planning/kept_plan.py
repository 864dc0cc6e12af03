"""Plans of many queries, kept in the result store, so that the same build again need not read every sequence.

Owns ``plans/KEY.json`` and ``plans/KEY-NUMBER.ids``. Does not own the plan. The key is the content of the
query files with all that a plan depends on, so a kept plan is the one that would be made. Files are hashed
anew each time, which takes a twentieth of the time of planning. Invariants: the ids are written first, and
the other file holds a digest of all: a plan that was cut or damaged is none. Memory: one file of ids (2 MiB).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from foldfeed.feature_store.storage import Blobs
from foldfeed.pipelines.fasta import CHUNK_BYTES, open_query_file
from foldfeed.pipelines.planning.plan import Plan, make_plan
from foldfeed.pipelines.searches.id_set import DIGEST_BYTES, IdSet
from foldfeed.pipelines.searches.search import shard_ids_of
from foldfeed.pipelines.sequences import Coverage, DeadLetter
from foldfeed.pipelines.tools.search_tool import SearchedDatabase
from foldfeed.pipelines.tools.template_tool import TemplateDatabase

# Raise it when the same files may give another plan.
_FORMAT = 1

# Fewer entries are planned in less time than it takes to load this software.
KEPT_FROM_ENTRIES = 5_000
_IDS_PER_FILE = 1 << 16


def plan_of(
    urls: Sequence[str],
    databases: tuple[SearchedDatabase, ...],
    max_residues: int,
    results: Blobs,
    templates: TemplateDatabase | None = None,
) -> Plan:
    """Returns the plan of some files: the kept one, else a new one, which is kept if it was much work.

    Args:
      urls: FASTA files.
      databases: in merge order.
      max_residues: longer queries are not searched.
      results: the result store.
      templates: what is searched with the alignments.
    Raises:
      QueryFileError: a file cannot be opened.
      StorageFullError: no space left.
    """
    if results.list("plans"):
        kept = _read(
            results, _key(urls, list(map(_digest_of, urls)), databases, max_residues, templates), templates
        )
        if kept is not None:
            return kept
    digests: list[str] = []
    plan = make_plan(urls, databases, max_residues, templates, digests)
    if plan.coverage.count >= KEPT_FROM_ENTRIES:
        _write(results, _key(urls, digests, databases, max_residues, templates), plan)
    return plan


def _digest_of(url: str) -> str:
    digest = hashlib.sha256()
    with open_query_file(url) as raw:
        while chunk := raw.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _key(
    urls: Sequence[str],
    digests: Sequence[str],
    databases: tuple[SearchedDatabase, ...],
    max_residues: int,
    templates: TemplateDatabase | None,
) -> str:
    # Dead letters name the file, so the names belong to it.
    searched = [
        [database.digest, database.tool.identity.digest, shard_ids_of("", database)] for database in databases
    ]
    words: list[object] = [_FORMAT, list(urls), list(digests), searched, max_residues]
    if templates is not None:
        # Their searches are named by what they take of which alignments.
        taken = [[index, databases[index].max_hits] for index in templates.msa]
        words.append([templates.digest, templates.tool.identity.digest, taken])
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _write(results: Blobs, key: str, plan: Plan) -> None:
    digest = hashlib.sha256()
    num_files = 0
    for ids in (plan.unit_ids, plan.shard_unit_ids):
        for chunk in ids.chunks(_IDS_PER_FILE):
            results.write_atomic(_ids_path(key, num_files), chunk)
            digest.update(chunk)
            num_files += 1
    content: dict[str, Any] = {
        "coverage": dataclasses.asdict(plan.coverage),
        "num_queries": plan.num_queries,
        "rejects": [letter.to_json() for letter in plan.rejects],
        "content_digest": plan.content_digest,
        "num_files": num_files,
        "num_units": len(plan.unit_ids),
        "num_shard_units": len(plan.shard_unit_ids),
    }
    digest.update(json.dumps(content, sort_keys=True).encode())
    content["sha256"] = digest.hexdigest()
    results.write_atomic(f"plans/{key}.json", json.dumps(content).encode())


def _read(results: Blobs, key: str, templates: TemplateDatabase | None) -> Plan | None:
    try:
        content: dict[str, Any] = json.loads(results.read(f"plans/{key}.json"))
        expected = content.pop("sha256")
        digest = hashlib.sha256()
        ids = _ids(results, key, content["num_files"], digest)
        plan = Plan(
            coverage=Coverage(**content["coverage"]),
            num_queries=content["num_queries"],
            rejects=tuple(DeadLetter(**letter) for letter in content["rejects"]),
            unit_ids=IdSet(itertools.islice(ids, content["num_units"])),
            content_digest=content["content_digest"],
            shard_unit_ids=IdSet(itertools.islice(ids, content["num_shard_units"])),
            templates=templates,
        )
        digest.update(json.dumps(content, sort_keys=True).encode())
        # Nothing may be left, so that all of it is in the digest.
        is_whole = next(ids, None) is None and digest.hexdigest() == expected
        return plan if is_whole else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        # No plan, or a damaged one: it is made anew.
        return None


def _ids(results: Blobs, key: str, num_files: int, digest: hashlib._Hash) -> Iterator[bytes]:
    for number in range(num_files):
        data = results.read(_ids_path(key, number))
        digest.update(data)
        for start in range(0, len(data), DIGEST_BYTES):
            yield data[start : start + DIGEST_BYTES]


def _ids_path(key: str, number: int) -> str:
    return f"plans/{key}-{number:05d}.ids"
