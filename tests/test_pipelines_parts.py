"""Parts and audit: complete queries only, every entry accounted for, a lost part noticed."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store import FeatureStore, StoreSettings
from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines import DeadLetter, QuerySequence, SearchResult, ToolIdentity
from foldfeed.pipelines.errors import AuditError
from foldfeed.pipelines.planning.plan import Plan, make_plan, part_of, read_queries, resolve_duplicates
from foldfeed.pipelines.programs.subprocess_runner import Usage
from foldfeed.pipelines.records.parts import PartReceipt, audit, completed, write_one_part
from foldfeed.pipelines.searches.id_set import IdSet
from foldfeed.pipelines.searches.results import ResultStore
from foldfeed.pipelines.searches.search import JobContext, Receipt, units_of
from foldfeed.pipelines.sequences import Coverage, coverage_of, dead_letter
from foldfeed.pipelines.tools.search_tool import SearchedDatabase

TOOL = ToolIdentity(name="hhblits", version="3", binary_sha256="0" * 64, argv_template=())


@dataclasses.dataclass(frozen=True)
class Answering:
    """A tool whose answers are in the result store already; it is never run."""

    identity: ToolIdentity = TOOL
    binary: str = "/bin/true"
    max_residues: int | None = None

    def search(self, sequence: str) -> SearchResult:
        raise AssertionError("not to be searched")


def make_context(tmp_path, num_parts=1) -> JobContext:
    store = FeatureStore.create(tmp_path / "store")
    names = ("uniref90", "mgnify")
    databases = tuple(
        SearchedDatabase(name=name, digest=name, tool=Answering(), max_hits=None, files=()) for name in names
    )
    return JobContext(
        store_url=store.url,
        settings=StoreSettings(),
        results_url=str(tmp_path / "results"),
        databases=databases,
        job_id="job",
        run_id="run",
        num_parts=num_parts,
        max_residues=1000,
    )


def make_query(number: int, name: str, sequence: str = "ACD") -> QuerySequence:
    return QuerySequence(
        file_index=0,
        item_index=number,
        source="q.fa",
        line=2 * number + 1,
        record_id=name,
        description="",
        sequence=sequence,
    )


def answer(context: JobContext, sequence: str, text: str) -> None:
    usage = Usage(wall_s=0, cpu_s=0, max_rss_bytes=0)
    result = SearchResult(tool=TOOL, format="a3m", alignment=text.encode(), table=b"", usage=usage)
    for unit_id in units_of(sequence, context.databases):
        ResultStore(context.results_url).put(unit_id, result)


def plan_of(entries) -> Plan:
    coverage = coverage_of(entries)
    return Plan(coverage=coverage, num_queries=1, rejects=(), unit_ids=IdSet(), content_digest="")


def test_a_part_holds_sorted_records_and_names_those_it_could_not_build(tmp_path):
    context = make_context(tmp_path)
    answer(context, "ACD", ">query\nACD\n>h\nA-D\n")
    answer(context, "AAA", ">query\nAAA\n>h\nA\n")
    entries = [
        *(make_query(0, "b"), make_query(1, "bad", "AAA"), make_query(2, "a"), make_query(3, "gone", "CCC")),
        dead_letter(make_query(4, "x"), "read", "because"),
    ]
    # An answer that is not there at this stage means that the result store lost it: the run must fail.
    with pytest.raises(KeyError):
        write_one_part(0, entries, context)
    receipt = write_one_part(0, [entry for entry in entries if entry.record_id != "gone"], context)
    assert receipt.num_records == 2
    assert [(letter.record_id, letter.stage) for letter in receipt.dead_letters] == [
        ("bad", "features"),
        ("x", "read"),
    ]
    store = FeatureStore.open(context.store_url)
    store.commit([receipt.part_id], job_id="j")
    assert store.ids == ["a", "b"]
    assert audit(plan_of(entries[:3] + entries[4:]), context) == [receipt]


def test_a_part_without_records_has_a_receipt_and_no_part(tmp_path):
    context = make_context(tmp_path)
    receipt = write_one_part(0, [], context)
    assert receipt.part_id is None
    assert audit(plan_of([]), context) == [receipt]


def test_audit_refuses_a_missing_part_and_a_lost_or_doubled_entry(tmp_path):
    context = make_context(tmp_path, num_parts=2)
    letters = [dead_letter(make_query(number, f"r{number}"), "read", "x") for number in range(3)]
    write_one_part(0, letters[:2], context)
    with pytest.raises(AuditError, match="part 1 of 2 has no receipt"):
        audit(plan_of(letters), context)
    write_one_part(1, [], context)
    with pytest.raises(AuditError, match=r"account for 2 entries .* hold 3"):
        audit(plan_of(letters), context)
    write_one_part(1, letters[1:2], context)
    with pytest.raises(AuditError, match=r"account for 3 entries .* hold 3"):
        audit(plan_of(letters), context)
    write_one_part(1, letters[2:], context)
    assert len(audit(plan_of(letters), context)) == 2


def test_a_receipt_comes_back_from_json(tmp_path):
    receipt = write_one_part(0, [dead_letter(make_query(0, "r"), "read", "x")], make_context(tmp_path))
    assert PartReceipt.from_json(receipt.to_json()) == receipt


def test_a_query_is_complete_only_with_an_answer_of_every_database(tmp_path):
    context, query = make_context(tmp_path), make_query(0, "a")

    def receipt(index, status="ok", reason=""):
        return Receipt(unit_id="u", database_index=index, record_ids=("a",), status=status, reason=reason)

    assert completed(query, [receipt(1), receipt(0)], context) is query
    missing = completed(query, [receipt(0)], context)
    assert isinstance(missing, DeadLetter)
    assert missing.reason == "search in 'mgnify': no report"
    failed = completed(query, [receipt(0, "poison", "why"), receipt(1, "retryable", "killed")], context)
    assert failed.reason == "why; killed"


@given(st.permutations(range(6)))
@settings(deadline=None, max_examples=30)
def test_the_first_of_an_id_wins_in_whatever_order_entries_arrive(order):
    entries = [make_query(number, "same", "ACD" if number % 2 else "AAA") for number in range(6)]
    winner, letters = resolve_duplicates(entries[number] for number in order)
    assert winner == entries[0]
    assert [letter.item_index for letter in letters] == [1, 2, 3, 4, 5]
    assert coverage_of([winner, *letters]) == coverage_of(entries)


@given(st.lists(st.integers(0, 50)), st.integers(1, 7))
@settings(deadline=None)
def test_coverage_adds_up_over_any_split(numbers, num_parts):
    entries = [make_query(number, f"r{number}") for number in numbers]
    parts = [
        coverage_of(entry for entry in entries if part_of(entry.record_id, num_parts) == part)
        for part in range(num_parts)
    ]
    assert sum(parts, Coverage()) == coverage_of(entries)


def test_the_plan_counts_every_entry_and_every_distinct_search(tmp_path):
    (tmp_path / "1.fa").write_text(">a\nACD\n>b\nACD\n>bad\n1\n>a\nCCC\n")
    (tmp_path / "2.fa").write_text(">c\nAAA\n")
    urls = [str(tmp_path / "1.fa"), str(tmp_path / "2.fa")]
    context = make_context(tmp_path)
    plan = make_plan(urls, context.databases, 100)
    assert plan.coverage == coverage_of(read_queries(urls, 100))
    assert plan.coverage.count == 5
    assert plan.num_queries == 3
    assert [letter.record_id for letter in plan.rejects] == ["bad"]
    # ACD and AAA in two databases; the second a is a duplicate and needs no search.
    assert set(plan.unit_ids) == {*units_of("ACD", context.databases), *units_of("AAA", context.databases)}
    assert make_plan(urls, context.databases, 100) == plan
    assert make_plan(urls[::-1], context.databases, 100).content_digest != plan.content_digest


def test_receipts_of_another_run_do_not_count(tmp_path):
    context = make_context(tmp_path)
    write_one_part(0, [], context)
    later = dataclasses.replace(context, run_id="later")
    with pytest.raises(AuditError, match="no receipt"):
        audit(plan_of([]), later)
    assert open_blobs(context.results_url).list("jobs/job") == ["run"]
