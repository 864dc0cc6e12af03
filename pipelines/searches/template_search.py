"""One search of templates: the alignment of a query against known structures, its answer in the result store.

Owns what is asked (`template_unit_id`), the decision what happens to a unit, and what a record says of the
answer. Does not own tools or storage. No Beam here; the DoFn of `beam.template_graph` is a
shell over `search_template_unit`. Invariants: a unit is named before any search is done, by the names of the
searches that give its alignment, because equal names mean equal answers; so a plan counts it, and a build
that finds its answer makes neither search again. An answer is stored only after it was parsed.
"""

from __future__ import annotations

import hashlib
import json

from foldfeed.feature_store.errors import AlignmentParseError
from foldfeed.feature_store.format.templates import Templates
from foldfeed.pipelines.databases.unchanged import as_planned
from foldfeed.pipelines.errors import CorruptResultError, SearchError
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.search import (
    JobContext,
    Receipt,
    WorkUnit,
    facts_of,
    once_more_after_a_signal,
    receipt_of,
    receipt_of_failure,
    units_of,
    write_failure,
)
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, SearchResult
from foldfeed.pipelines.tools.template_profile import profile_rows
from foldfeed.pipelines.tools.template_tool import TemplateDatabase, read_template_hits


def template_unit_id(
    sequence: str, databases: tuple[SearchedDatabase, ...], templates: TemplateDatabase
) -> str:
    """Returns the name of a search of templates: sha256 (hex) of everything its answer depends on.

    Args:
      sequence: the query.
      databases: of the build, in merge order.
      templates: of the build.
    """
    units = units_of(sequence, databases)
    rows = [(units[index], databases[index].max_hits) for index in templates.msa]
    words = json.dumps([sequence, rows, templates.digest, templates.tool.identity.digest])
    return hashlib.sha256(f"foldfeed template unit 1\x00{words}".encode()).hexdigest()


def template_unit(query: QuerySequence, context: JobContext) -> WorkUnit:
    """Returns the search of templates that one query needs."""
    assert context.templates is not None
    return WorkUnit(
        unit_id=template_unit_id(query.sequence, context.databases, context.templates),
        database_index=len(context.databases),
        sequence=query.sequence,
        record_ids=(query.record_id,),
    )


def search_template_unit(unit: WorkUnit, context: JobContext) -> Receipt:
    """Makes sure that the answer to a unit is in the result store, or says why it is not.

    Args:
      unit: what to search; the searches that give its alignment are done.
      context: of the build.
    Raises:
      StorageFullError: no space for the tool's files or for the answer.
      CancelledError: the run was stopped.
    """
    results, templates = ResultStore(context.results_url), context.templates
    assert templates is not None
    if results.holds(unit.unit_id):
        return receipt_of(unit, "ok")
    try:
        rows = _alignment(unit.sequence, context, results)
        with as_planned(templates, context.results_url):
            found = once_more_after_a_signal(lambda: templates.tool.search(unit.sequence, rows))
        _, num_hits = read_template_hits(found, unit.sequence)
    except CorruptResultError as error:
        # The next run searches the alignment anew.
        reason = f"search in {templates.name!r}: {error}"
        receipt = receipt_of(unit, "retryable", reason, type(error).__name__)
        write_failure(receipt, context)
        return receipt
    except (SearchError, AlignmentParseError) as error:
        receipt = receipt_of_failure(unit, context, error)
        write_failure(receipt, context)
        return receipt
    facts = facts_of(unit, context, templates.name, templates.digest, num_hits)
    results.put(unit.unit_id, found, facts)
    return receipt_of(unit, "ok")


def templates_of(result: SearchResult, sequence: str, templates: TemplateDatabase) -> Templates:
    """Returns what a record says of a search of templates.

    Args:
      result: the answer.
      sequence: the query.
      templates: what was searched, and which hits a record keeps.
    Raises:
      AlignmentParseError, ToolOutputError: the answer cannot be used.
    """
    hits, num_rows = read_template_hits(result, sequence)
    source = {
        "database": templates.name,
        "digest": templates.digest,
        "tool": result.tool.name,
        "tool_version": result.tool.version,
        "msa": templates.msa_name,
        "num_hits": str(num_rows),
        "max_hits": str(templates.max_hits),
    }
    if templates.max_date is not None:
        source["max_date"] = templates.max_date.isoformat()
    everything = Templates(hits=tuple(hits), source=source)
    return everything.select(sequence, max_date=templates.max_date, max_hits=templates.max_hits)


def _alignment(sequence: str, context: JobContext, results: ResultStore) -> list[bytes]:
    """Returns the rows that the profile is built of.

    Raises:
      CorruptResultError: an answer is damaged, or is gone since it was reported.
    """
    assert context.templates is not None
    units, databases = units_of(sequence, context.databases), context.databases
    answers = []
    for index in context.templates.msa:
        try:
            answers.append(results.get(units[index]))
        except KeyError as error:
            raise CorruptResultError(units[index], "it is gone since its search was reported") from error
    return profile_rows(sequence, answers, [databases[index].max_hits for index in context.templates.msa])
