"""Kills a process at the n-th change of a store's files, or at any moment, and says what must hold then.

A server process imports foldfeed once and forks a child per kill, so a kill costs a fork and not an import.
The child counts every libc call that changes a file under the store (`killer.c`, preloaded; also those of
delta-rs) or, where there is no C compiler, every file operation that Python's audit hooks see. Nothing of
this is in foldfeed itself.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
_AUDITED = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree"}


def compile_killer(folder: Path) -> Path | None:
    """Returns the library to preload; None without a C compiler."""
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None
    library = folder / "killer.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "killer.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


class Server:
    """The process that forks; one request at a time."""

    def __init__(self, library: Path | None) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "crash_harness.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, scenario: str, root: Path, *, step: int = -1, torn: bool = False, after_s: float = -1.0
    ) -> tuple[int, int]:
        """Runs a scenario in a child; returns its exit status (negative: signal) and the steps it took.

        Args:
          scenario: name of a function in `SCENARIOS`.
          root: the store.
          step: kill at that step, counted from 1; never when -1.
          torn: do half of a write before the kill.
          after_s: kill after that time, from outside; never when negative.
        """
        request = {"scenario": scenario, "root": str(root), "step": step, "torn": torn, "after_s": after_s}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["status"], answer["steps"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@contextlib.contextmanager
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        running = Server(compile_killer(Path(folder)))
        try:
            yield running
        finally:
            running.close()


def scenarios() -> dict:
    """Returns what can be interrupted, by name; each is a function of the store's path."""
    from records import make_record, make_structure

    from foldfeed.feature_store import (
        AttachOptions,
        FeatureStore,
        StoreSettings,
        attach_structures,
        write_part,
    )
    from foldfeed.feature_store.care.compact import compact
    from foldfeed.feature_store.care.copy import copy_store
    from foldfeed.feature_store.care.garbage import collect_garbage
    from foldfeed.feature_store.exporters.mmcif import to_mmcif
    from foldfeed.feature_store.exporters.rows import rows_of_msa
    from foldfeed.feature_store.index.tags import set_tag

    settings = StoreSettings(tile_rows=8, tile_cols=8)

    def job(root: Path, names: str, job_id: str, seed: int, **options: str) -> None:
        store = FeatureStore.create(root, settings)
        records = [make_record(name, 9 + seed, 13, seed=seed) for name in names]
        part = write_part(root, records, settings)
        store.commit([part.part_id], job_id=job_id, **options)

    # Imported once here, and not by every child; pyarrow imports pandas at its first array.
    for name in ("gemmi", "pandas", "pyarrow.pandas_compat", "pyarrow.dataset", "pyarrow.acero"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

    def attach(root: Path) -> None:
        # Beside the stores of all kills: what is under the root counts as a step.
        folder = root.parents[1] / "entries"
        folder.mkdir(exist_ok=True)
        for name, seed in (("a", 1), ("d", 2)):
            record = make_record(name, 9 + seed, 13, seed=seed)
            rows = rows_of_msa(dataclasses.replace(record, structure=make_structure(13, seed=9)))
            (folder / f"{name}.cif").write_bytes(to_mmcif(rows))
        report = attach_structures(root, folder, AttachOptions(by="sequence", on_existing="replace"))
        assert (report.num_matched, report.rejects) == (4, ())

    return {
        "old": lambda root: (job(root, "ab", "old", 1), job(root, "cd", "older", 2)),
        "create": lambda root: FeatureStore.create(root, settings),
        "commit": lambda root: job(root, "ef", "new", 3),
        "replace": lambda root: job(root, "ae", "new", 4, on_existing="replace"),
        "delete": lambda root: FeatureStore.open(root).delete(["a", "d"], job_id="new"),
        "compact": lambda root: compact(root),
        "gc": lambda root: collect_garbage(root, grace_s=0),
        "drop": lambda root: collect_garbage(root, grace_s=0, keep_days=0),
        "structures": attach,
        "tag": lambda root: set_tag(root, "named", 1),
        "copy": lambda root: copy_store(Path(f"{root}-source"), root),
    }


def _arm(root: str, step: int, torn: bool) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "killer_arm"):
        library.killer_arm(root.encode(), ctypes.c_long(step), int(torn))
        return
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (event in _AUDITED or writes) and str(args[0]).startswith(root):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    sys.audited_steps = lambda: seen  # type: ignore[attr-defined]


def _steps() -> int:
    library = ctypes.CDLL(None)
    if hasattr(library, "killer_seen"):
        library.killer_seen.restype = ctypes.c_long
        return library.killer_seen()
    return sys.audited_steps()  # type: ignore[attr-defined]


def _child(run, request: dict, report: int) -> None:
    status = 1
    try:
        _arm(request["root"], request["step"], request["torn"])
        run(Path(request["root"]))
        os.write(report, str(_steps()).encode())
        status = 0
    except BaseException as error:  # noqa: BLE001 -- the child must not run the parent's code
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def serve() -> None:
    """Answers requests until the input ends."""
    known = scenarios()
    # What is there now is never garbage; looking at it would copy every page of it in every fork.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _child(known[request["scenario"]], request, write)
        os.close(write)
        if request["after_s"] >= 0:
            _kill_after(child, request["after_s"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        steps = int(os.read(read, 64) or 0)
        os.close(read)
        print(json.dumps({"status": status, "steps": steps}), flush=True)


def _kill_after(child: int, seconds: float) -> None:
    import time

    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)


def files_of(root: Path) -> set[str]:
    """Returns the paths of all files under a folder."""
    return {path.removeprefix(f"{root}/") for path in _paths_of_files(root)}


def bytes_of_parts(root: Path) -> dict[str, bytes]:
    """Returns the files of all parts by path."""
    return {
        path.removeprefix(f"{root}/"): Path(path).read_bytes() for path in _paths_of_files(root / "parts")
    }


def _paths_of_files(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        yield from (f"{where}/{name}" for name in names)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    serve()
