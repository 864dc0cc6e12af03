"""``python -m MODULE`` and ``python FILE``, forked from a process that has imported torch and the trainer.

Importing them costs five seconds of CPU a process, which is most of what a short run costs. A *nursery*, one
for each process of `make test`, imports them once and forks; the fork gets arguments, environment and files
of its own, runs module or file as ``__main__``, and waits for threads and exit functions at its end. The
nursery has made no tensor and started no thread of ours, so nothing is lost in a fork; it refuses to fork
otherwise.

What needs a process that a shell or torchrun started, or one that outlives a call, is started so by its test.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve()
# torch imports its compiler, nine hundred modules, where the first optimizer is made.
IMPORTED = (
    *("torch", "torch._dynamo", "torch._inductor.config", "torch.utils.tensorboard", "deltalake", "zarr"),
    *("foldfeed.trainer.cli", "foldfeed.trainer.gradients.ddp", "foldfeed.trainer.training.launch"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One ``python -m MODULE ARGUMENTS``, or a file where its name ends in ``.py``; output goes to files.

    Modules of this folder are found, too.
    """

    module: str
    arguments: Sequence[str]
    environment: dict[str, str]
    stdout: Path
    stderr: Path


def run_programs(programs: Sequence[Program], *, timeout_s: float) -> list[int]:
    """Runs programs at the same time and returns their exit codes, as Popen gives them.

    Raises:
      TimeoutError: some had not ended after ``timeout_s``. None of them is left.
    """
    nursery = _nursery()
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    wanted = [dataclasses.asdict(program) for program in programs]
    nursery.stdin.write(json.dumps({"programs": wanted, "timeout_s": timeout_s}, default=str) + "\n")
    nursery.stdin.flush()
    line = nursery.stdout.readline()
    assert line, "the nursery of warm_python.py died; its standard error says why"
    answer = json.loads(line)
    if answer["late"]:
        said = "\n".join(f"{number}: {programs[number].stderr.read_text()}" for number in answer["late"])
        raise TimeoutError(f"programs {answer['late']} had not ended after {timeout_s} s\n{said}")
    codes: list[int] = answer["codes"]
    return codes


def run_module(
    module: str, arguments: Sequence[object], folder: Path, *, timeout_s: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs one program and returns what `subprocess.run` would; output goes to a new folder below."""
    here = Path(tempfile.mkdtemp(dir=folder, prefix="said-"))
    words = [str(argument) for argument in arguments]
    program = Program(
        module=module,
        arguments=words,
        environment={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=here / "out",
        stderr=here / "err",
    )
    (code,) = run_programs([program], timeout_s=timeout_s)
    said, complained = program.stdout.read_text(), program.stderr.read_text()
    return subprocess.CompletedProcess([module, *words], code, said, complained)


@functools.cache
def _nursery() -> subprocess.Popen[str]:
    nursery = subprocess.Popen(
        [sys.executable, str(HERE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # One thread: OpenMP reads it when it is loaded.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # It ends when its input does.
    atexit.register(nursery.communicate)
    return nursery


# ---------------------------------------------------------------- the nursery's side


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    # What is there now is never garbage; looking at it would copy every page of it in every fork.
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    while line := sys.stdin.readline():
        request = json.loads(line)
        pids: dict[int, int] = {}
        for number, program in enumerate(request["programs"]):
            assert not (threads := _threads_that_a_fork_loses()), threads
            pid = os.fork()
            if pid == 0:
                answers.close()
                _be(Program(**program))
            pids[pid] = number
        answers.write(json.dumps(_ends(pids, request["timeout_s"])) + "\n")


def _threads_that_a_fork_loses() -> list[str]:
    """Names threads but the first; jemalloc (pyarrow's and delta-rs's) starts its own again in the fork."""
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    names = [(task / "comm").read_text().strip() for task in others]
    return [name for name in names if name != "jemalloc_bg_thd"]


def _be(program: Program) -> NoReturn:
    os.environ.clear()
    os.environ.update(program.environment)
    for fd, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, program.stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, program.stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, fd)
        os.close(opened)
    sys.argv[1:] = program.arguments
    code: Any = 0
    try:
        if program.module.endswith(".py"):
            sys.path.insert(0, str(Path(program.module).parent))
            sys.argv[0] = program.module
            runpy.run_path(program.module, run_name="__main__")
        else:
            runpy.run_module(program.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter does; the child must not go on as its parent
        traceback.print_exc()
        code = 1
    # What an interpreter does at its end, but for taking modules apart that are the nursery's, too, which is
    # a second of CPU. A thread that stays shows as a program that does not end.
    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _ends(pids: dict[int, int], timeout_s: float) -> dict[str, Any]:
    """Waits for the forks; after the timeout it kills those that run."""
    deadline = time.monotonic() + timeout_s
    codes: dict[int, int] = {}
    late: list[int] = []
    while len(codes) < len(pids):
        if not late and time.monotonic() > deadline:
            late = [number for pid, number in pids.items() if number not in codes]
            for pid, number in pids.items():
                if number in late:
                    os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(-1, 0 if late else os.WNOHANG)
        if pid:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.005)
    return {"codes": [codes[number] for number in sorted(codes)], "late": late}


if __name__ == "__main__":
    main()
