"""A power cut at any moment: what the log names is on the disk before the log names it."""

import posixpath
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from power_cut import TRACED, Call, Disk, calls

PROGRAM = """
    import os, sys
    import pyarrow as pa
    from records import make_record
    from foldfeed.feature_store import FeatureStore, write_part
    from foldfeed.feature_store.care.compact import compact
    from foldfeed.feature_store.index.tags import set_tag

    root, marks = sys.argv[1], sys.argv[2]

    def done(what):
        os.mkdir(f"{marks}/{what}")

    store = FeatureStore.create(root)
    done("create")
    for number in range(2):
        records = [make_record(f"r{number}", 3, 5), make_record(f"s{number}", 1, 9)]
        part = write_part(root, records, store.settings)
        done(f"part-{number}")
        store.commit([part.part_id], job_id=f"job-{number}")
        done(f"commit-{number}")
    part = write_part(root, [make_record("r0", 4, 6)], store.settings)
    store.commit([part.part_id], job_id="again", on_existing="replace")
    done("replace")
    store.annotate(pa.table({"record_id": ["r0"], "note": ["x"]}), job_id="note")
    done("annotate")
    store.delete(["s1"])
    done("delete")
    set_tag(root, "paper")
    done("tag")
    store.save_set("deep", "select record_id from records")
    done("set")
    store.save_split("cut", {name: name for name in store.ids}, fractions={"a": 0.5, "b": 0.5}, seed=1)
    done("split")
    compact(root)
    done("compact")
    while not os.path.exists(f"{root}/index/_delta_log/_last_checkpoint"):
        store.annotate(pa.table({"record_id": ["r0"], "note": [str(store.version)]}))
    done("checkpoint")
"""
LOG = "index/_delta_log"
# delta-rs writes and links the log's files; it never forces them to the disk, we do right after.
BY_DELTA = re.compile(
    rf"{LOG}/(\d{{20}}\.json(#\d+)?|\d{{20}}\.checkpoint\.parquet(#\d+)?|_last_checkpoint.*)"
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> tuple[str, list[Call]]:
    """The store's path, and the calls of a program that does everything that commits."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("power")
    (folder / "marks").mkdir()
    program = folder / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    output = folder / "trace"
    root = str(folder / "store")
    command = [strace, "-f", "--seccomp-bpf", "-y", "-s", "4096", "-e", f"trace={TRACED}", "-o", str(output)]
    command += [sys.executable, str(program), root, str(folder / "marks")]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"},
    )
    if "ptrace" in ran.stderr and "not permitted" in ran.stderr:
        pytest.skip(f"strace may not trace here: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stderr
    with output.open(errors="replace") as lines:
        return root, list(calls(lines))


def is_temporary(path: str) -> bool:
    return any(name.startswith(".tmp-") for name in path.split("/"))


def test_data_is_on_the_disk_before_its_name(trace):
    root, found = trace
    disk = Disk(root)
    checked = set()
    for call in found:
        target = call.target.removeprefix(root + "/")
        published = call.name in ("link", "rename") and call.target.startswith(root + "/")
        if published and not is_temporary(target) and not BY_DELTA.fullmatch(target):
            # Of what becomes visible only the new name itself may still be open.
            at_risk = [
                name for name in disk.at_risk(call.path) if name != f"name of {_short(call.path, root)}"
            ]
            assert [name for name in at_risk if _short(call.path, root) in name] == [], call
            checked.add(target.split("/")[0])
        disk.apply(call)
    assert checked == {"foldfeed.json", "index", "parts", "tags", "sets", "splits"}


def test_what_the_log_names_is_on_the_disk_before_the_log(trace):
    root, found = trace
    disk = Disk(root)
    versions = []
    for call in found:
        target = call.target.removeprefix(root + "/")
        if call.name in ("link", "rename") and re.fullmatch(rf"{LOG}/\d{{20}}\.json", target):
            versions.append(int(posixpath.basename(target).split(".")[0]))
            at_risk = [
                name
                for name in disk.at_risk(root)
                if not is_temporary(name) and not BY_DELTA.fullmatch(name.removeprefix("name of "))
            ]
            if versions[-1] == 0:
                # The folder of the log is made by delta-rs, with the first entry in it.
                at_risk = [name for name in at_risk if name not in ("name of index", f"name of {LOG}")]
            assert at_risk == [], f"version {versions[-1]}"
        disk.apply(call)
    assert versions == list(range(len(versions)))
    assert len(versions) >= 8


def test_what_is_reported_as_done_is_on_the_disk(trace):
    root, found = trace
    disk = Disk(root)
    done = []
    for call in found:
        if call.name == "mkdir" and posixpath.dirname(call.path).endswith("/marks"):
            done.append(posixpath.basename(call.path))
            assert [name for name in disk.at_risk(root) if not is_temporary(name)] == [], done[-1]
        disk.apply(call)
    assert done[0] == "create"
    assert done[-1] == "checkpoint"
    assert len(done) == 13


def test_the_log_entry_is_the_last_thing_that_a_commit_writes(trace):
    root, found = trace
    after_entry: list[str] = []
    in_commit = False
    for call in found:
        target = (call.target or call.path).removeprefix(root + "/")
        if call.name == "mkdir" and "/marks/" in call.path:
            in_commit = False
        elif call.name in ("link", "rename") and re.fullmatch(rf"{LOG}/\d{{20}}\.json", target):
            in_commit, after_entry = True, []
        elif in_commit and call.name in ("link", "rename") and call.target.startswith(root):
            after_entry.append(target)
            # Compact makes two commits, and other writers' files come before their own entry.
            assert BY_DELTA.fullmatch(target) or target.startswith(("index/", "tags/", "sets/", "splits/")), (
                call
            )


def _short(path: str, root: str) -> str:
    return path.removeprefix(root + "/")


@pytest.mark.parametrize(
    ("steps", "lost"),
    [
        ([Call("write", "/s/a", creates=True)], ["a", "name of a"]),
        ([Call("write", "/s/a", creates=True), Call("fsync", "/s/a")], ["name of a"]),
        ([Call("write", "/s/a", creates=True), Call("fsync", "/s/a"), Call("fsync", "/s")], []),
        (
            [Call("write", "/s/a", creates=True), Call("fsync", "/s/a"), Call("write", "/s/a")],
            ["a", "name of a"],
        ),
        (
            [
                Call("mkdir", "/s/d"),
                Call("write", "/s/d/a", creates=True),
                Call("fsync", "/s/d/a"),
                Call("fsync", "/s/d"),
                Call("rename", "/s/d", "/s/e"),
            ],
            ["name of e"],
        ),
        (
            [Call("write", "/s/a", creates=True), Call("link", "/s/a", "/s/b"), Call("fsync", "/s/a")],
            ["name of a", "name of b"],
        ),
        ([Call("write", "/s/a", creates=True), Call("unlink", "/s/a")], []),
        ([Call("write", "/t/a", creates=True)], []),
    ],
)
def test_the_model_knows_what_fsync_promises(steps, lost):
    disk = Disk("/s")
    for call in steps:
        disk.apply(call)
    assert disk.at_risk("/s") == lost


def test_a_trace_is_read_as_strace_writes_it():
    lines = """
        7 openat(AT_FDCWD</x>, "/s/a", O_WRONLY|O_CREAT|O_EXCL|O_CLOEXEC, 0666) = 3</s/a>
        7 write(3</s/a>, "{\\"a\\": \\">= 4\\"}", 12) = 12
        8 fsync(3</s/a> <unfinished ...>
        7 linkat(AT_FDCWD</x>, "/s/a", AT_FDCWD</x>, "/s/b", 0) = 0
        8 <... fsync resumed>) = 0
        7 rename("/s/b", "/s/c") = -1 ENOENT (No such file or directory)
        7 renameat2(AT_FDCWD</x>, "/s/b", AT_FDCWD</x>, "/s/c", RENAME_NOREPLACE) = 0
        7 openat(AT_FDCWD</x>, "/s", O_RDONLY|O_CLOEXEC) = 4</s>
        7 mkdir("/s/d", 0777) = 0
        9 +++ exited with 0 +++
    """
    assert list(calls(textwrap.dedent(lines).strip().splitlines())) == [
        Call("open", "/s/a", creates=True),
        Call("write", "/s/a"),
        Call("link", "/s/a", "/s/b"),
        Call("fsync", "/s/a"),
        Call("rename", "/s/b", "/s/c"),
        Call("open", "/s"),
        Call("mkdir", "/s/d"),
    ]
