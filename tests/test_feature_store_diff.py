"""What changed between two versions: records, reasons, commits; against a model of whole records."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import range_server
from records import make_record, make_structure, make_templates

from foldfeed.feature_store import CorruptDataError, FeatureStore, StoreSettings, write_part
from foldfeed.feature_store.care.compact import compact
from foldfeed.feature_store.care.garbage import collect_garbage
from foldfeed.feature_store.cli.main import main
from foldfeed.feature_store.format import alphabet
from foldfeed.feature_store.index.tags import set_tag
from foldfeed.feature_store.store import version_diff


def changed(record, what, rng):
    """Returns a record that differs from another in one thing."""
    if what == "description":
        return dataclasses.replace(record, description=record.description + "!")
    if what == "extra":
        return dataclasses.replace(record, extra={**record.extra, "n": str(rng.integers(1 << 30))})
    if what == "databases":
        use = dataclasses.replace(record.databases[0], tool_version=str(rng.integers(1 << 30)))
        return dataclasses.replace(record, databases=(use, *record.databases[1:]))
    row, column = rng.integers(1, record.depth), rng.integers(record.length)
    if what == "token":
        msa = record.msa.copy()
        # Residues only, so that the share of gaps says nothing.
        row, column = np.argwhere(msa[1:] < 20)[0] + [1, 0]
        msa[row, column] = (msa[row, column] + 1) % 20
        return dataclasses.replace(record, msa=msa, neff=None)
    if what == "deletion":
        deletions = record.deletions.copy()
        deletions[row, column] += 300
        return dataclasses.replace(record, deletions=deletions)
    if what == "sequence":
        # B is a D with another letter: the alignment stays.
        at = int(np.flatnonzero(record.msa[0] == alphabet.RESIDUES.index("D"))[0])
        letter = "D" if record.sequence[at] == "B" else "B"
        return dataclasses.replace(record, sequence=record.sequence[:at] + letter + record.sequence[at + 1 :])
    if what in ("hit_id", "species", "e_value"):
        values = list(getattr(record.rows, what))
        if what == "e_value":
            values = np.array([*values[:row], 2 + rng.random(), *values[row + 1 :]])
        else:
            values[row] = f"{values[row]}x" if what == "hit_id" else "X" * (1 + len(values[row]) % 8)
        return dataclasses.replace(record, rows=dataclasses.replace(record.rows, **{what: values}))
    if what == "depth":
        other = make_record(record.record_id, record.depth + 1, record.length, int(rng.integers(1 << 30)))
        names = ("msa", "deletions", "rows", "sequence", "databases")
        return dataclasses.replace(record, **{name: getattr(other, name) for name in names}, neff=None)
    if what == "templates":
        return dataclasses.replace(record, templates=make_templates(record.length, int(rng.integers(99))))
    if what == "no structure":
        return dataclasses.replace(record, structure=None)
    structure = record.structure or make_structure(record.length, 5)
    if what == "facts":
        structure = dataclasses.replace(structure, source={"entry_id": str(rng.integers(1 << 30))})
    if what == "atoms":
        structure = dataclasses.replace(structure, b_factor=structure.b_factor * np.float32(0.5))
    return dataclasses.replace(record, structure=structure)


KINDS = ["description", "extra", "databases", "token", "deletion", "sequence", "hit_id", "species", "e_value"]
KINDS += ["depth", "no structure", "facts", "atoms", "templates"]


def equal_arrays(a, b) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def reasons(a, b) -> set[str]:
    """In what two records differ, by looking at all of both."""
    found = {
        name for name in ("description", "sequence", "databases") if getattr(a, name) != getattr(b, name)
    }
    if dict(a.extra) != dict(b.extra):
        found.add("extra")
    if a.depth != b.depth:
        found.add("depth")
    else:
        if not (equal_arrays(a.msa, b.msa) and equal_arrays(a.deletions, b.deletions)):
            found.add("alignment")
        names = [[use.name for use in one.databases] for one in (a, b)]
        same = names[0] == names[1] and all(
            equal_arrays(np.asarray(getattr(a.rows, name)), np.asarray(getattr(b.rows, name)))
            for name in ("database", "e_value", "bit_score", "hit_id", "species")
        )
        if not same:
            found.add("rows")
    if (a.structure and a.structure.fingerprint) != (b.structure and b.structure.fingerprint):
        found.add("structure")
    if (a.templates and a.templates.fingerprint) != (b.templates and b.templates.fingerprint):
        found.add("templates")
    return found


def model_diff(old, new) -> dict[str, tuple[str, set[str]]]:
    """What `diff` must say of two states: records by id, and their annotations by id."""
    (a, notes_a), (b, notes_b) = old, new
    found = {name: ("added", set()) for name in b.keys() - a.keys()}
    found |= {name: ("removed", set()) for name in a.keys() - b.keys()}
    for name in a.keys() & b.keys():
        if a[name].fingerprint != b[name].fingerprint:
            found[name] = ("replaced", reasons(a[name], b[name]))
        elif notes_a.get(name) != notes_b.get(name):
            found[name] = ("annotated", {"cluster"})
    return found


def as_dict(diff) -> dict[str, tuple[str, set[str]]]:
    rows = diff.table.to_pylist()
    assert [row["record_id"] for row in rows] == sorted(row["record_id"] for row in rows)
    return {row["record_id"]: (row["change"], set(row["why"])) for row in rows}


@pytest.mark.parametrize("order", ["rank", "permuted"])
def test_any_two_versions_differ_as_their_records_do(tmp_path, order):
    rng = np.random.default_rng(5)
    store = FeatureStore.create(tmp_path / "s", StoreSettings(tile_rows=4, tile_cols=8, row_order=order))
    records, notes = {}, {}
    states = {0: ({}, {})}
    jobs = {0: ""}

    def commit(new, job):
        part = write_part(store.url, [new[name] for name in sorted(new)], store.settings).part_id
        store.commit([part], job_id=job, on_existing="replace")
        records.update(new)

    def seen(job):
        # Columns that come first make a version of their own.
        for version in range(max(states) + 1, store.version + 1):
            states[version] = states[version - 1] if version < store.version else (dict(records), dict(notes))
            jobs[version] = job if version == store.version else ""

    commit({f"r{n}": make_record(f"r{n}", 4 + n % 5, 61 + n % 2, seed=n) for n in range(len(KINDS))}, "first")
    seen("first")
    commit({f"r{n}": changed(records[f"r{n}"], kind, rng) for n, kind in enumerate(KINDS)}, "each")
    seen("each")
    notes |= {"r1": "A", "r5": "B"}
    store.annotate(pa.table({"record_id": list(notes), "cluster": list(notes.values())}), job_id="notes")
    seen("notes")
    store.delete(["r2", "r5"])
    del records["r2"], records["r5"], notes["r5"]
    seen("")
    compact(store.url, min_live=1.0)
    store = FeatureStore.open(store.url)
    seen("")
    two = changed(changed(records["r3"], "token", rng), "hit_id", rng)
    commit({"r3": two, "r5": make_record("r5", 3, 9), "z": make_record("z", 1, 5)}, "last")
    seen("last")
    steps = {at: model_diff(states[at - 1], states[at]) for at in range(1, store.version + 1)}
    for old, new in itertools.product(states, repeat=2):
        diff = store.diff(old, new)
        want = model_diff(states[old], states[new])
        assert as_dict(diff) == want, (old, new)
        first, last = sorted((old, new))
        assert [entry.version for entry in diff.commits] == list(range(first + 1, last + 1))
        for row in diff.table.to_pylist():
            touched = [v for v in range(first + 1, last + 1) if row["record_id"] in steps[v]]
            assert row["versions"] == touched
            assert row["job_ids"] == [jobs[v] for v in touched if jobs[v]]
        assert sum(diff.counts.values()) == len(want)
    assert {why for row in store.diff(1, 2).table.to_pylist() for why in row["why"]} == {
        *("description", "extra", "databases", "alignment", "sequence", "rows", "depth", "structure"),
        "templates",
    }
    assert store.diff(4).new == store.version


@pytest.mark.parametrize("kind", KINDS)
def test_one_change_has_one_reason(tmp_path, kind):
    rng = np.random.default_rng(1)
    store = FeatureStore.create(tmp_path / "s")
    old = make_record("a", 8, 61)
    for job, record in (("1", old), ("2", changed(old, kind, rng))):
        part = write_part(store.url, [record], store.settings).part_id
        store.commit([part], job_id=job, on_existing="replace")
    word = {"token": "alignment", "deletion": "alignment", "hit_id": "rows", "species": "rows"}
    word |= {"e_value": "rows", "facts": "structure", "atoms": "structure", "no structure": "structure"}
    (row,) = store.diff(1, 2).table.to_pylist()
    if kind == "depth":
        assert row["why"] == ["sequence", "depth", "databases"]
    else:
        assert row["why"] == [word.get(kind, kind)]
    assert (row["change"], row["versions"], row["job_ids"]) == ("replaced", [2], ["2"])


def test_parts_are_not_opened_where_the_index_suffices(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    first = {name: make_record(name, 3, 10) for name in "abc"}
    second = {"a": make_record("a", 4, 10), "d": make_record("d", 2, 8)}
    for job, records in (("1", first), ("2", second)):
        part = write_part(store.url, [records[name] for name in records], store.settings).part_id
        store.commit([part], job_id=job, on_existing="replace")
    store.delete(["b"])
    store.annotate(pa.table({"record_id": ["c"], "score": [1.5]}))
    shutil.rmtree(tmp_path / "s" / "parts")
    store = FeatureStore.open(store.url)
    assert as_dict(store.diff(1)) == {
        "a": ("replaced", {"sequence", "depth", "databases"}),
        "b": ("removed", set()),
        "c": ("annotated", {"score"}),
        "d": ("added", set()),
    }


def test_a_long_alignment_is_compared_band_by_band(tmp_path, monkeypatch):
    monkeypatch.setattr(version_diff, "_BAND_CELLS", 1)
    for order in ("rank", "permuted"):
        store = FeatureStore.create(
            tmp_path / order, StoreSettings(tile_rows=8, tile_cols=8, row_order=order)
        )
        old = make_record("a", 30, 20)
        for depth_at in (1, 8, 17, 29):
            msa = old.msa.copy()
            msa[depth_at, 3] = (msa[depth_at, 3] + 1) % 20
            deletions = old.deletions.copy()
            deletions[depth_at, 4] += 1
            other_msa = dataclasses.replace(old, msa=msa, neff=None)
            other_deletions = dataclasses.replace(old, deletions=deletions)
            for number, record in enumerate((old, other_msa, other_deletions)):
                part = write_part(store.url, [record], store.settings).part_id
                store.commit([part], job_id=f"{depth_at}-{number}", on_existing="replace")
            for low, high in ((2, 1), (1, 0)):
                diff = store.diff(store.version - low, store.version - high)
                assert as_dict(diff) == {"a": ("replaced", {"alignment"})}


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([1, 2, None]), max_size=8),
    others=st.lists(st.sampled_from([1, 2, None]), max_size=8) | st.none(),
    cuts=st.lists(st.integers(0, 8), max_size=4),
    other_cuts=st.lists(st.integers(0, 8), max_size=4),
)
def test_streams_are_equal_however_they_are_cut(values, others, cuts, other_cuts):
    others = values if others is None else others

    def cut(numbers, places):
        ends = sorted({0, len(numbers), *(place for place in places if place < len(numbers))})
        whole = pa.record_batch({"v": pa.array(numbers, pa.int64())})
        return (whole.slice(low, high - low) for low, high in itertools.pairwise(ends))

    same = version_diff._same_batches(cut(values, cuts), cut(others, other_cuts))
    assert same == (values == others)


def test_damage_is_an_error_and_not_a_difference(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    old = make_record("a", 8, 20)
    for job, record in (("1", old), ("2", dataclasses.replace(old, description="new"))):
        part = write_part(store.url, [record], store.settings).part_id
        store.commit([part], job_id=job, on_existing="replace")
    shard = next((tmp_path / "s" / "parts").glob("*/deletion/c/0/0/0"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptDataError, match="deletion"):
        FeatureStore.open(store.url).diff(1, 2)


def test_what_gc_has_removed_is_not_guessed(tmp_path):
    store = FeatureStore.create(tmp_path / "s")
    for number in range(4):
        part = write_part(store.url, [make_record(f"r{number}", 2, 5)], store.settings).part_id
        store.commit([part], job_id=str(number))
    set_tag(store.url, "early", 1)
    store.delete(["r1"])
    collect_garbage(store.url, keep_days=0, grace_s=0)
    diff = FeatureStore.open(store.url).diff("early")
    assert as_dict(diff) == {"r2": ("added", set()), "r3": ("added", set())}
    assert diff.table["versions"].to_pylist() == diff.table["job_ids"].to_pylist() == [None, None]
    assert len(diff.commits) == 4


def test_a_web_server_is_enough(small_store):
    part = write_part(small_store.url, [make_record("a1", 1, 9, seed=4)], small_store.settings)
    small_store.commit([part.part_id], job_id="job-2", on_existing="replace")
    set_tag(small_store.url, "paper", 1)
    want = small_store.diff(1, 2)
    with range_server(small_store._blobs.root) as (url, _):
        got = FeatureStore.open(url).diff("paper")
        residues = FeatureStore.open(url).query("from residues order by all", timeout_s=60)
    assert got.table.equals(want.table)
    assert as_dict(got)["a1"][0] == "replaced"
    assert residues.equals(small_store.query("from residues order by all"))


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_the_command(small_store):
    part = write_part(
        small_store.url, [make_record("a1", 2, 9), make_record("x", 1, 4)], small_store.settings
    )
    small_store.commit([part.part_id], job_id="job-2", on_existing="replace")
    set_tag(small_store.url, "paper", 2)
    small_store.delete(["c3"])
    out = run("diff", small_store.url, 1).stdout.splitlines()
    assert out[0] == "version 1 to 3, 2 commits: 1 added, 1 removed, 1 replaced, 0 annotated"
    assert [line.split() for line in out[2:]] == [
        ["a1", "replaced", "sequence", "depth", "databases", "2", "job-2"],
        ["c3", "removed", "3"],
        ["x", "added", "2", "job-2"],
    ]
    out = run("diff", small_store.url, 1, "paper", "--format", "json").stdout
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == small_store.diff(1, 2).table.to_pylist()
    csv = run("diff", small_store.url, "paper", 3, "--format", "csv")
    assert csv.stdout == "record_id,change,why,versions,job_ids\nc3,removed,,3,\n"
    same = run("diff", small_store.url, 2, "paper")
    nothing = "0 added, 0 removed, 0 replaced, 0 annotated"
    assert (same.exit_code, same.stdout) == (0, f"version 2 to 2, 0 commits: {nothing}\n")
    for old, message in ((9, "version 9 does not exist"), ("nope", "there is no tag 'nope'")):
        bad = run("diff", small_store.url, old)
        assert bad.exit_code == 2
        assert message in bad.stderr
