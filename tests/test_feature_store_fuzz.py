"""Short fuzzing of every importer: typed errors only, quickly, in little memory.

The long version is a command: ``python tests/fuzz_feature_store.py --seconds 600``, with ``--coverage`` by
atheris.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fuzz_feature_store import attempt
from fuzz_inputs import Target, mutate, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcif_samples import HEAD, MONOMERS

ROW_TEXT = st.text(alphabet="ACDEFX-acde.>\n# \t\0/é*", max_size=30)
A3M = st.lists(st.tuples(ROW_TEXT, ROW_TEXT), max_size=6).map(
    lambda rows: "".join(f">{name}\n{row}\n" for name, row in rows)
)
STOCKHOLM = st.lists(st.tuples(ROW_TEXT, ROW_TEXT), max_size=6).map(
    lambda rows: "# STOCKHOLM 1.0\n" + "".join(f"{name} {row}\n" for name, row in rows) + "//\n"
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ROW_TEXT | A3M,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "sequence", "x"]), inner)
    ),
    max_leaves=12,
)
CHAIN = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from(["A", ["A", "B"], [], 3]) | JSON,
        "sequence": st.just("ACDE") | JSON,
        "unpairedMsa": A3M | JSON,
        "pairedMsa": A3M | JSON,
        "unpairedMsaPath": ROW_TEXT | JSON,
        "description": JSON,
    },
)
JOB = st.fixed_dictionaries(
    {
        "sequences": st.lists(
            st.fixed_dictionaries({}, optional={"protein": CHAIN | JSON, "rna": JSON}), max_size=3
        )
        | JSON
    },
    optional={"name": JSON, "dialect": JSON, "version": JSON},
)
INDEX = st.dictionaries(
    ROW_TEXT,
    st.fixed_dictionaries(
        {},
        optional={
            "db": st.just("x.db") | ROW_TEXT | JSON,
            "files": st.lists(st.tuples(st.just("mgnify_hits.a3m"), st.integers(), st.integers())) | JSON,
        },
    )
    | JSON,
    max_size=3,
)


CELL = st.sampled_from([*"?.ABHX1230", "-5", "CA", "SE", "MSE", "ALA", "ARG", "1e999", "9" * 20])
ATOM = st.lists(CELL, min_size=18, max_size=18).map(" ".join)
ENTITY = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["ALA", "MSE", "ARG", "?"])), max_size=5).map(
    lambda rows: "".join(f"1 {number} {name}\n" for number, name in rows)
)
ENTRY = st.tuples(ENTITY, st.lists(ATOM, max_size=5)).map(
    lambda pieces: (
        HEAD.format(name="9ABC", date="2020-02-01").replace(MONOMERS, pieces[0]) + "\n".join(pieces[1]) + "\n"
    )
)


def run(file: str, layout: str, data: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return attempt(Target(file, layout, ()), data, Path(folder))


@settings(max_examples=150, deadline=None)
@given(text=A3M | ROW_TEXT, kind=st.sampled_from(["a3m", "a2m", "colabfold"]))
def test_any_a3m(text, kind):
    head = "#4\t1\n" if kind == "colabfold" else ""
    run("x.a2m" if kind == "a2m" else "x.a3m", kind, (head + text).encode())


@settings(max_examples=150, deadline=None)
@given(text=STOCKHOLM | ROW_TEXT)
def test_any_stockholm(text):
    run("x.sto", "sto", text.encode())


@settings(max_examples=200, deadline=None)
@given(job=JOB | JSON)
def test_any_alphafold_3_job(job):
    run("x.json", "alphafold3-json", json.dumps(job).encode())


@settings(max_examples=100, deadline=None)
@given(index=INDEX | JSON)
def test_any_alignment_index(index):
    run("x.index", "openfold-db", json.dumps(index).encode())


@settings(max_examples=200, deadline=None)
@given(text=ENTRY | ROW_TEXT)
def test_any_mmcif(text):
    pytest.importorskip("gemmi", reason="gemmi is not installed; pip install 'foldfeed[structures]'")
    run("x.cif", "mmcif", text.encode())


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), name=st.sampled_from(sorted(targets())))
def test_any_bytes(data, name):
    target = targets_once()[name]
    for head in (b"", target.seeds[0][:40]):
        run(target.file, target.layout, head + data)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        ("a3m", ">{}\n>x\nAC\n"),
        ("a3m", "{}\n>x\nAC\n"),
        ("sto", "# STOCKHOLM 1.0\n{} AC\nx A\n//\n"),
        ("sto", "# STOCKHOLM 1.0\n{} --\n//\n"),
        ("sto", "# STOCKHOLM 1.0\n{} A?\n//\n"),
    ],
)
def test_messages_stay_short_however_long_a_name_is(layout, text, tmp_path):
    target = Target(f"x.{layout}", layout, ())
    assert attempt(target, text.format("n" * 100_000).encode(), tmp_path) != "accepted"


def targets_once(made: dict[str, Target] = {}) -> dict[str, Target]:  # noqa: B006 (made once on purpose)
    made.update(made or targets())
    return made


@pytest.mark.parametrize("name", sorted(targets()))
def test_seeds_are_accepted(tmp_path, name):
    target = targets_once()[name]
    for seed in target.seeds:
        assert attempt(target, seed, tmp_path) == "accepted"


# Parquet is left to the process of its own below: Arrow's C++ reader is not ours to trust in this one.
@pytest.mark.parametrize("name", sorted(set(targets()) - {"chai-pqt"}))
def test_changed_files(tmp_path, name):
    target = targets_once()[name]
    answers = {
        attempt(target, mutate(random.Random(f"suite-{number}"), target), tmp_path) for number in range(1000)
    }
    assert "accepted" in answers
    assert len(answers) > 5


def test_a_short_campaign_in_a_process_of_its_own(tmp_path, root):
    command = [sys.executable, str(root / "tests" / "fuzz_feature_store.py"), "--seconds", "6", "--seed", "3"]
    command += ["--targets", "chai-pqt,boltz-npz,features-pkl", "--keep", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].endswith(" inputs, 0 findings")
    assert list(tmp_path.iterdir()) == []
