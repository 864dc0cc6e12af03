"""Trains twice on a store and shows that a killed run ends with the same weights as an uninterrupted one.

    python deploy/demo/train_demo.py --store demo-output/store --output demo-output/training

Both runs have four ranks on the CPU under torchrun, one thread each. In the second, one worker process is
killed with SIGKILL as soon as a snapshot exists; torchrun restarts the ranks and they continue from it. The
script exits with 1 if the weights differ or the loss did not fall. A second call with the same store, options
and code shows the finished result instead of training again.

Only processes that this script started are signalled, each by its pid.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import foldfeed.loader
import foldfeed.trainer

RANKS = 4
KILLED_RANK = 2
# Neither run takes two minutes on two cores; a hang must not stop the demo for longer than this.
TIMEOUT_S = 400
DONE = "demo.json"
# Small enough for a laptop: about 57,000 parameters, eight crops of 64 residues per step.
SETTINGS = [
    *("--recipe", "af2", "--device", "cpu", "--crop-residues", "64", "--num-clusters", "16"),
    *("--num-extra", "64", "--global-batch", "8", "--lr", "0.003", "--warmup-steps", "5", "--seed", "7"),
    *("--snapshot-every", "10", "--log-every", "10", "--loader-threads", "1"),
]


def main() -> int:
    """Runs the demo; returns the exit code."""
    arguments = parse_arguments()
    output: Path = arguments.output
    key = demo_key(arguments.store, arguments.steps)
    whole, killed = output / "uninterrupted", output / "killed"
    if finished(output, key):
        print(f"already trained on this store with these settings and this code; results from {output}")
    else:
        for folder in (whole, killed):
            forget_run(folder)
        print(f"an uninterrupted run: {RANKS} ranks, {arguments.steps} steps")
        train(arguments.store, whole, arguments.steps, kill=False)
        print(f"the same run again; rank {KILLED_RANK} will be killed after the first snapshot")
        restarts = train(arguments.store, killed, arguments.steps, kill=True)
        if not restarts:
            print("error: the killed run did not resume from a snapshot", file=sys.stderr)
            return 1
        output.joinpath(DONE).write_text(json.dumps({"key": key}) + "\n")
    return compare(whole, killed)


def parse_arguments() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--store", required=True, help="folder or URL of a feature store")
    parser.add_argument("--output", required=True, type=Path, help="folder for the two runs")
    parser.add_argument("--steps", default=60, type=int, help="steps of each run (default: 60)")
    arguments = parser.parse_args()
    if arguments.steps < 20:
        parser.error(f"--steps {arguments.steps}: use at least 20, the first snapshot comes after 10.")
    return arguments


def demo_key(store: str, steps: int) -> str:
    """Returns a digest of all that decides the result: content of the store, settings, code."""
    key = hashlib.sha256()
    key.update(json.dumps([SETTINGS, RANKS, steps]).encode())
    key.update(foldfeed.loader.FeatureStore.open(store).fingerprint.encode())
    for package in (foldfeed.loader, foldfeed.trainer):
        for source in sorted(Path(package.__path__[0]).glob("*.py")):
            key.update(source.read_bytes())
    return key.hexdigest()


def finished(output: Path, key: str) -> bool:
    """Returns whether both runs of this key are complete."""
    results = [output / DONE, *(output / run / "result.json" for run in ("uninterrupted", "killed"))]
    if not all(path.exists() for path in results):
        return False
    found: str = json.loads(results[0].read_text())["key"]
    return found == key


def forget_run(folder: Path) -> None:
    """Removes an earlier demo run; anything else in the way is left alone and reported by the trainer."""
    if (folder / "run.json").exists():
        shutil.rmtree(folder)
    folder.parent.joinpath(DONE).unlink(missing_ok=True)


def train(store: str, output: Path, steps: int, *, kill: bool) -> int:
    """Runs torchrun to its end and returns how often ranks resumed from a snapshot.

    Raises:
      SystemExit: the run failed.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["--max-restarts=2", "-m", "foldfeed.trainer", "--store", store, "--output", str(output)]
    command += ["--steps", str(steps), *SETTINGS]
    shown = ["torchrun", *command[3:]]
    print(f"  $ {shlex.join(shown)}", flush=True)
    log = output.with_suffix(".log")
    started, resumed = time.monotonic(), 0
    with started_process(command, log) as torchrun:
        assert torchrun.stdout is not None, "stdout is a pipe"
        for line in torchrun.stdout:
            print(f"  {line}", end="", flush=True)
            resumed += line.startswith("resumed:")
            if kill and line.startswith("snapshot:"):
                kill = False
                pid = workers(torchrun.pid)[KILLED_RANK]
                os.kill(pid, signal.SIGKILL)
                print(
                    f"  killed rank {KILLED_RANK} (pid {pid}) with SIGKILL; torchrun restarts the ranks",
                    flush=True,
                )
        code = torchrun.wait()
    if code != 0:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
        sys.exit(
            f"{tail}error: training in {output} ended with code {code}; all of its messages are in {log}"
        )
    print(f"  took {time.monotonic() - started:.0f} s")
    return resumed


@contextlib.contextmanager
def started_process(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts torchrun; whatever happens, it and its workers are gone afterwards, also after a hang."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    watchdog = threading.Timer(TIMEOUT_S, end, [process])
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        end(process)
        if process.stdout is not None:
            process.stdout.close()


def end(process: subprocess.Popen[str]) -> None:
    """Ends torchrun and the workers it started, by pid."""
    if process.poll() is not None:
        return
    for pid in workers(process.pid).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def workers(parent: int) -> dict[int, int]:
    """Returns the pid of each rank whose parent is that torchrun."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the command's name, which may hold anything, come the state and the parent's pid.
            fields = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            variables = folder.joinpath("environ").read_text() if int(fields[1]) == parent else ""
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or not ours
        rank = [text for text in variables.split("\0") if text.startswith("RANK=")]
        if rank:
            found[int(rank[0].removeprefix("RANK="))] = int(folder.name)
    return found


def compare(whole: Path, killed: Path) -> int:
    """Prints what the two runs show; returns the exit code."""
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_metrics/global_avg_loss"] for line in lines]
    # Single steps are noisy (eight random crops): compare means over a tenth of the run.
    window = max(1, len(losses) // 10)
    first, last = sum(losses[:window]) / window, sum(losses[-window:]) / window
    print(f"loss of the masked MSA: {first:.4f} (mean of steps 1-{window})", end="")
    print(f" -> {last:.4f} (mean of the last {window} of {len(losses)})")
    digests = [json.loads((run / "result.json").read_text())["weights_digest"] for run in (whole, killed)]
    if digests[0] != digests[1]:
        print(
            f"error: weights differ: {digests[0]} uninterrupted, {digests[1]} after the kill", file=sys.stderr
        )
        return 1
    print(f"weights after kill + resume equal the uninterrupted run: {digests[0]}")
    if not last < first:
        print(f"error: the loss did not fall ({first:.4f} -> {last:.4f})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
