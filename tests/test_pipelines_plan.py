"""A plan against a plain one in memory: sorted on disk, kept with the results, never older than the files."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldfeed.feature_store.storage import open_blobs
from foldfeed.pipelines import fasta
from foldfeed.pipelines.planning import kept_plan
from foldfeed.pipelines.planning.kept_plan import plan_of
from foldfeed.pipelines.planning.plan import make_plan, read_queries
from foldfeed.pipelines.searches import id_set
from foldfeed.pipelines.searches.id_set import IdSet, Sorter
from foldfeed.pipelines.searches.results import ResultStore, unit_id_of
from foldfeed.pipelines.searches.search import units_of
from foldfeed.pipelines.sequences import QuerySequence
from foldfeed.pipelines.tools.search_tool import SearchedDatabase, ToolIdentity


class Tool:
    identity = ToolIdentity(name="jackhmmer", version="1", binary_sha256="a" * 64, argv_template=("x",))


DATABASES = tuple(
    SearchedDatabase(name=name, digest=name * 64, tool=Tool(), max_hits=None, files=()) for name in "ab"
)


@pytest.fixture
def small_runs(monkeypatch):
    """Runs of a few records and files on the disk, so that small sets go every way."""
    monkeypatch.setattr(id_set, "MAX_WAITING", 7)
    monkeypatch.setattr(id_set, "MAX_IN_MEMORY_BYTES", 64)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=3, max_size=3)), st.integers(1, 20))
def test_records_come_back_sorted_whatever_the_runs(records, waiting):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_set, "MAX_WAITING", waiting)
        sorter = Sorter(3)
        for record in records:
            sorter.add(record)
        buckets = list(sorter.buckets())
    assert [record for bucket in buckets for record in bucket] == sorted(records)
    assert all(record[0] == first for first, bucket in enumerate(buckets) for record in bucket)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300)))
def test_a_set_of_ids_is_a_set(numbers):
    names = [unit_id_of(str(number), "d", "t") for number in numbers]
    ids = IdSet.of(names)
    assert list(ids) == sorted(set(names))
    assert len(ids) == len(set(names))
    assert b"".join(ids.chunks(7)).hex() == "".join(ids)
    assert ids == IdSet.of(names[::-1])
    assert all(name.startswith(two) for two, bucket in ids.buckets() for name in bucket)
    assert unit_id_of("absent", "d", "t") not in ids
    assert (IdSet.of([*names, unit_id_of("absent", "d", "t")]) == ids) is False


def write_entries(path: Path, count: int) -> Path:
    """Entries of which every third repeats an earlier id, and some an earlier sequence."""
    names = [number // 2 if number % 3 == 2 else number for number in range(count)]
    texts = ["ACDEFGHIKL"[number % 7 :] * (1 + number % 5) for number in range(count)]
    path.write_text("".join(f">r{name}\n{text}\n" for name, text in zip(names, texts, strict=True)))
    return path


@pytest.mark.usefixtures("small_runs")
def test_the_plan_is_that_of_dictionaries_in_memory(tmp_path):
    urls = [str(write_entries(tmp_path / "a.fa", 100)), str(write_entries(tmp_path / "b.fa", 150))]
    first = {}
    for entry in read_queries(urls, 1000):
        assert isinstance(entry, QuerySequence)
        first.setdefault(entry.record_id, entry.sequence)
    plan = make_plan(urls, DATABASES, 1000)
    assert plan.num_queries == len(first)
    assert set(plan.unit_ids) == {name for text in first.values() for name in units_of(text, DATABASES)}


def test_memory_does_not_grow_with_the_number_of_queries(tmp_path, monkeypatch):
    monkeypatch.setattr(id_set, "MAX_WAITING", 700)
    monkeypatch.setattr(id_set, "MAX_IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(fasta, "CHUNK_BYTES", 4096)

    def peak(count: int) -> int:
        path = tmp_path / "q.fa"
        path.write_text("".join(f">r{number}\nACD{'ACDEFGHIKL'[number % 10]}\n" for number in range(count)))
        tracemalloc.start()
        make_plan([str(path)], DATABASES, 1000)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(8_000) < 1.5 * peak(2_000)


def test_units_are_counted_folder_by_folder(tmp_path):
    names = [unit_id_of(str(number), "d", "t") for number in range(40)]
    for name in names[:30]:
        folder = tmp_path / "units" / name[:2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.zst").touch()
    for name in names[:25]:
        (tmp_path / "units" / name[:2] / f"{name}.json").touch()
    # An answer without its receipt is not visible.
    assert ResultStore(str(tmp_path)).count_present(IdSet.of(names)) == 25
    assert ResultStore(str(tmp_path)).count_present(IdSet()) == 0


class TestKept:
    """A plan in the result store."""

    @pytest.fixture
    def kept(self, tmp_path, monkeypatch):
        """Queries, result store and a kept plan; making another one fails."""
        monkeypatch.setattr(kept_plan, "KEPT_FROM_ENTRIES", 10)
        monkeypatch.setattr(kept_plan, "_IDS_PER_FILE", 8)
        path = write_entries(tmp_path / "q.fa", 50)
        with path.open("a") as file:
            file.write(">bad\nAC7\n")
        results = open_blobs(str(tmp_path / "results"))
        plan = plan_of([str(path)], DATABASES, 1000, results)
        assert plan.rejects
        monkeypatch.setattr(kept_plan, "make_plan", self.fail)
        return path, results, plan

    def fail(self, *_):
        raise AssertionError("planned anew")

    def test_the_same_files_are_not_planned_again(self, kept):
        path, results, plan = kept
        assert plan_of([str(path)], DATABASES, 1000, results) == plan

    def test_anything_that_a_plan_depends_on_makes_another(self, kept, tmp_path):
        path, results, _ = kept
        other = tmp_path / "other.fa"
        other.write_bytes(path.read_bytes())
        for urls, databases, limit in (
            ([str(other)], DATABASES, 1000),
            ([str(path), str(path)], DATABASES, 1000),
            ([str(path)], DATABASES[:1], 1000),
            ([str(path)], DATABASES, 12),
        ):
            with pytest.raises(AssertionError, match="planned anew"):
                plan_of(urls, databases, limit, results)
        # In place, of the same size and time.
        path.write_bytes(path.read_bytes().replace(b"ACDE", b"ACDF", 1))
        with pytest.raises(AssertionError, match="planned anew"):
            plan_of([str(path)], DATABASES, 1000, results)

    @pytest.mark.parametrize("suffix", ["json", "ids"])
    @pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
    def test_a_damaged_plan_is_none(self, kept, tmp_path, suffix, damage):
        path, results, _ = kept
        *_, file = sorted((tmp_path / "results" / "plans").glob(f"*.{suffix}"))
        data = file.read_bytes()
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(data[:-3] if damage == "cut" else data[:40] + bytes([data[40] ^ 1]) + data[41:])
        with pytest.raises(AssertionError, match="planned anew"):
            plan_of([str(path)], DATABASES, 1000, results)

    def test_few_queries_leave_no_plan(self, tmp_path):
        path = write_entries(tmp_path / "q.fa", 50)
        results = open_blobs(str(tmp_path / "results"))
        plan_of([str(path)], DATABASES, 1000, results)
        assert results.list("plans") == []
