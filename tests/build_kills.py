"""SIGKILL for a build at any moment, what must hold then, and that the same command ends it."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipelines_data import GLOBINS, globins, tree_bytes, write_fasta

from foldfeed.feature_store import FeatureStore, NotAStoreError
from foldfeed.feature_store.care.verify import verify
from foldfeed.feature_store.storage import TEMPORARY_PREFIX

NUM_QUERIES = 6


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an undisturbed build left, and its time: seconds until its first result, and until its end."""

    parts: dict[str, bytes]
    answers: dict[str, bytes]
    begun_s: float
    ended_s: float


class Builds:
    """Builds in one folder, whose queries and databases they share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "tmp").mkdir()
        write_fasta(folder / "q.fasta", {**globins(NUM_QUERIES), "bad": "AC7"})
        entries = [f">{entry}" for entry in GLOBINS.read_text().split(">")[1:]]
        (folder / "u.fasta").write_text("".join(entries))
        for number in range(3):
            (folder / f"m-0000{number}-of-00003").write_text("".join(entries[number::3]))
        started = time.monotonic()
        with self._start("undisturbed") as build:
            while not (folder / "undisturbed.results" / "units").exists():
                assert build.poll() is None
                time.sleep(0.01)
            begun_s = time.monotonic() - started
            assert build.wait() == 0
        self.reference = Reference(
            self._parts("undisturbed"), self._answers("undisturbed"), begun_s, time.monotonic() - started
        )
        assert len(self.reference.answers) == 5 * NUM_QUERIES

    def kill_after(self, store: str, seconds: float) -> str:
        """Kills a build after so many seconds and checks what it left; returns what the kill met."""
        with self._start(store) as build:
            try:
                build.wait(seconds)
            except subprocess.TimeoutExpired:
                build.send_signal(signal.SIGKILL)
            return self._met(store, build.wait())

    def kill_at(self, store: str, num_answers: int) -> str:
        """Kills a build when it has so many answers and checks what it left; returns what the kill met."""
        folder = self._folder / f"{store}.results" / "units"
        with self._start(store) as build:
            while len(list(folder.rglob("*.json"))) < num_answers:
                assert build.poll() is None, "it ended before"
                time.sleep(0.005)
            build.send_signal(signal.SIGKILL)
            return self._met(store, build.wait())

    def finish(self, store: str) -> None:
        """Runs the same command to its end; everything must be as if nothing had been killed."""
        with self._start(store) as build:
            assert build.wait() == 0
        assert self._ids(store) == sorted(globins(NUM_QUERIES))
        assert self._parts(store) == self.reference.parts
        assert self._answers(store) == self.reference.answers
        assert not verify(self._folder / store).problems

    def _met(self, store: str, code: int) -> str:
        assert code in (0, -signal.SIGKILL), code
        self._no_tool_is_left()
        visible = self._ids(store)
        # A commit is there or not; never some of the records.
        assert visible in ([], sorted(globins(NUM_QUERIES))), visible
        if code == 0:
            return "after its end"
        if visible:
            return "after its commit"
        all_are_there = len(self._answers(store)) == len(self.reference.answers)
        return "between searches and commit" if all_are_there else "in its searches"

    def _start(self, store: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "foldfeed.feature_store.cli.main", "build", "--queries", "q.fasta"]
        line += ["--database", "uniref90=u.fasta", "--database", "mgnify=m@3", "--parts", "3"]
        return subprocess.Popen(
            [*line, "--workers", "2", "--store", store],
            cwd=self._folder,
            # Their command lines name this folder then.
            env={**os.environ, "TMPDIR": str(self._folder / "tmp")},
            stdout=subprocess.DEVNULL,
        )

    def _no_tool_is_left(self) -> None:
        piece, end = str(self._folder / "tmp").encode(), time.monotonic() + 20
        while any(piece in _command_line(folder) for folder in Path("/proc").glob("[0-9]*")):
            assert time.monotonic() < end, "a search outlives its build"
            time.sleep(0.05)

    def _ids(self, store: str) -> list[str]:
        try:
            return sorted(FeatureStore.open(str(self._folder / store)).ids)
        except NotAStoreError:
            return []

    def _parts(self, store: str) -> dict[str, bytes]:
        files = tree_bytes(self._folder / store / "parts")
        # What a writer that was killed had begun is garbage of that name, which `gc` removes.
        return {name: data for name, data in files.items() if not name.startswith(TEMPORARY_PREFIX)}

    def _answers(self, store: str) -> dict[str, bytes]:
        folder = self._folder / f"{store}.results" / "units"
        return {path.name: path.with_suffix(".zst").read_bytes() for path in folder.rglob("*.json")}


def _command_line(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""
