"""The fast scan on a CUDA device gives the processor's scores, bit for bit, and jackhmmer's own output.

They run on a GPU where there is one, and without one on the emulated device of `gpu_emulator.cpp`
(`test_pipelines_scan_gpu.py` starts them there).
"""

import concurrent.futures
import gc
import json
import math
import os

import numpy as np
import pytest

pytest.importorskip("pyhmmer", reason="pip install 'foldfeed[fast]'")

from pipelines_data import config_of, globins, needs_hmmer, write_fasta
from scan_data import RESIDUES, digital, drawn, drawn_targets, hmmer_profile, write_targets

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.pipelines import run_build
from foldfeed.pipelines.cli.search_speed import lines_of
from foldfeed.pipelines.errors import DeviceError, KernelError
from foldfeed.pipelines.fast_scan import choice as scan_choice
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan import scan
from foldfeed.pipelines.fast_scan.choice import best_kernel, scan_kernel
from foldfeed.pipelines.fast_scan.cuda_device import num_devices
from foldfeed.pipelines.fast_scan.database import ScanDatabase
from foldfeed.pipelines.fast_scan.gpu import GpuKernel, Layout, layout_of, open_gpu_kernel
from foldfeed.pipelines.fast_scan.kernels import MAX_LETTERS, NUM_CODES, PAD, kernels
from foldfeed.pipelines.search_speed import measure_search
from foldfeed.pipelines.tools.fast_jackhmmer import FastJackhmmer
from foldfeed.pipelines.tools.jackhmmer import Jackhmmer


def why_no_device() -> str:
    if scan_kernels.library_path() is None:
        return "installed without the scan's kernels (no C compiler)"
    try:
        return "" if num_devices() else "the driver shows no device"
    except (DeviceError, MissingExtraError) as error:
        return str(error)


pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", autouse=True)
def a_device() -> None:
    """Not at collection: a process that has started the driver forks no others that use it."""
    if reason := why_no_device():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def gpu() -> GpuKernel:
    return open_gpu_kernel(0, best_kernel())


def largest(gpu: GpuKernel) -> int:
    return layout_of(1 << 20, gpu._device.shared_bytes).positions


def query_lengths(gpu: GpuKernel) -> list[int]:
    """Lengths at the edges of strips and layouts, and ones that take several parts."""
    found = [1, 2, 15, 16, 17, 127, 128, 257, 313, 320, 600, largest(gpu) + 1, 2 * largest(gpu) + 37]
    if "emulated" not in gpu.name:
        # That device has some layouts only.
        found += [number for size in range(64, largest(gpu), 64) for number in (size - 1, size, size + 1)]
    return found


def some_targets(random: np.random.Generator, letters: np.ndarray, edge: int) -> list[np.ndarray]:
    """Codes: none, one, odd numbers, runs of one letter, pieces of a query (letters are codes there).

    Many of the pieces lie across the place of a query where a part of it may end.
    """
    found = [np.empty(0, np.uint8), np.array([3], np.uint8), np.full(37, 26, np.uint8)]
    for number in range(60):
        length = int(random.integers(1, 50))
        start = int(random.integers(len(letters)))
        if number % 2 and edge < len(letters):
            start = max(0, edge - int(random.integers(length + 1)))
        piece = np.minimum(letters[start : start + length], 28)
        before, behind = (random.integers(0, 29, size=int(random.integers(8))) for _ in range(2))
        found.append(np.concatenate([before, piece, behind]).astype(np.uint8))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_plain_c(gpu, seed):
    """Random costs, so high and low that both ends of the scale occur, or HMMER-like ones."""
    random = np.random.default_rng(seed)
    ends = set()
    for length in query_lengths(gpu) if seed == 0 else (1, 128, 313, largest(gpu) + 300):
        letters = random.integers(0, MAX_LETTERS, size=length, dtype=np.uint8)
        # Gains as of one residue of HMMER's, or so high that few of them saturate.
        low, high, gain = ((-128, 128, -128), (-30, 40, -40), (0, 20, -6))[int(random.integers(3))]
        table = random.integers(low, high, size=(MAX_LETTERS, NUM_CODES)).astype(np.int8)
        table[np.arange(29), np.arange(29)] = gain
        table[:, PAD] = 127
        targets = sorted(some_targets(random, letters, largest(gpu)), key=len)
        starts = np.concatenate([[0], np.cumsum([len(one) for one in targets])]).astype(np.int64)
        packed = (np.concatenate(targets), starts, np.arange(len(targets)))
        query = np.array([0, length])
        plain = kernels()[0]
        expected = scan_kernels.ssv(plain, scan_kernels.pack(*packed, plain.lanes), table, letters, query)
        found = gpu.ssv(scan_kernels.pack(*packed, gpu.lanes), table, letters, query)
        assert (found == expected[:, : len(targets)]).all(), length
        ends |= {int(found.min()), int(found.max())}
    assert {-128, 127} <= ends


def a_query(random: np.random.Generator) -> str:
    length = int(random.choice([1, 5, 33, 100, 290]))
    return drawn(random, length, RESIDUES if length > 5 else "WC") + "XBZ" * int(random.integers(2))


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_hmmers_filter(gpu, seed, tmp_path):
    random = np.random.default_rng(seed)
    query = a_query(random)
    targets = drawn_targets(random, query, 60)
    write_targets(tmp_path / "t.fasta", targets)
    (chunk,) = ScanDatabase(str(tmp_path / "t.fasta"), gpu).chunks()
    profile, hmmer = scan.profile_of(query), hmmer_profile(query)
    best = scan.best_cells([profile], chunk, kernel=gpu)[0]
    compared = 0
    for lane, number in enumerate(chunk.order):
        hmmer.L = len(targets[number])
        theirs = hmmer.ssv_filter(digital(targets[number]))
        begin = profile.base - hmmer.tjb - profile.tbm
        end = begin + int(best[lane]) + 128 - profile.tec
        if theirs is None or math.isnan(theirs) or theirs == math.inf:
            # HMMER leaves those to MSV, or they overflow: nothing below the range of its bytes does.
            assert (
                end > profile.base
                or best[lane] >= -1 - profile.bias
                or end + profile.tec >= 255 - profile.bias
            )
            continue
        score = np.float32(end - hmmer.tjb) - np.float32(profile.base)
        assert float(np.float32(np.float64(score / np.float32(profile.scale)) - 3.0)) == theirs
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("f1", [0.9, 0.02, 0.0005])
def test_what_passes_is_what_passes_on_the_processor(gpu, f1, tmp_path):
    """Several batches of queries and chunks; targets of 0 to 35,000 residues."""
    random = np.random.default_rng(7)
    queries = [a_query(random) for _ in range({0.02: scan.BATCH + 3, 0.0005: 1}.get(f1, 3))]
    targets = [text for query in queries[:2] for text in drawn_targets(random, query, 12)]
    targets += ["", "ACDEF", drawn(random, 35_000 if f1 == 0.0005 else 12) + queries[0]]
    path = tmp_path / "t.fasta"
    write_targets(path, targets)
    profiles = [scan.profile_of(query) for query in queries]
    answers = []
    for kernel in (best_kernel(), gpu):
        found = [
            [
                (one.records.tolist(), one.num_msv)
                for one in scan.survivors(profiles, chunk, f1=f1, kernel=kernel)
            ]
            for chunk in ScanDatabase(str(path), kernel, chunk_bytes=path.stat().st_size // 2).chunks()
        ]
        answers.append(found)
    assert answers[0] == answers[1]
    assert sum(len(records) for chunk in answers[0] for records, _ in chunk) > 1
    assert len(answers[0]) > 1


def test_nothing_to_do(gpu):
    nothing = scan_kernels.pack(np.empty(0, np.uint8), np.zeros(1, np.int64), np.empty(0, np.int64), 1)
    table = np.full((1, NUM_CODES), 127, np.int8)
    assert gpu.ssv(nothing, table, np.zeros(3, np.uint8), np.array([0, 3])).shape == (1, 0)
    wide = scan_kernels.pack(np.zeros(9, np.uint8), np.array([0, 9]), np.array([0]), 16)
    with pytest.raises(ValueError, match="blocks of 16 lanes"):
        gpu.ssv(wide, table, np.zeros(3, np.uint8), np.array([0, 3]))


def test_memory_is_bounded_and_given_back(gpu, tmp_path, monkeypatch):
    random = np.random.default_rng(3)
    profile = scan.profile_of(drawn(random, 50))
    write_targets(tmp_path / "t.fasta", [drawn(random, 90) for _ in range(300)])
    database = ScanDatabase(str(tmp_path / "t.fasta"), gpu, chunk_bytes=2500)
    chunks = list(database.chunks())
    gc.collect()
    with gpu._device.used():
        gpu._resident.clear()
        gpu._device.collect()
        before = gpu._device.free_bytes()
    scores = [scan.best_cells([profile], chunk, kernel=gpu) for chunk in chunks]
    assert len(gpu._resident) == len(chunks) > 9
    size = max(one.size_bytes for one in gpu._resident.values())
    monkeypatch.setattr(gpu, "_limit_bytes", 3 * size)
    gpu._resident.clear()
    for _ in range(2):
        again = [scan.best_cells([profile], chunk, kernel=gpu) for chunk in chunks]
        assert all((one == other).all() for one, other in zip(scores, again, strict=True))
        assert 1 < len(gpu._resident) < 5
    database.forget()
    del chunks, database
    gc.collect()
    tiny = scan_kernels.pack(np.zeros(9, np.uint8), np.array([0, 9]), np.array([0]), 1)
    gpu.ssv(tiny, np.full((1, NUM_CODES), 127, np.int8), np.zeros(3, np.uint8), np.array([0, 3]))
    assert len(gpu._resident) == 1
    with gpu._device.used():
        # Drivers take memory in large pieces.
        assert before - gpu._device.free_bytes() < (4 << 20)


def test_threads_take_turns(gpu, tmp_path):
    random = np.random.default_rng(4)
    profiles = [scan.profile_of(drawn(random, length)) for length in (20, 100, 300)]
    write_targets(tmp_path / "t.fasta", [drawn(random, int(n)) for n in random.integers(5, 90, 40)])
    (chunk,) = ScanDatabase(str(tmp_path / "t.fasta"), gpu).chunks()
    expected = [scan.best_cells([profile], chunk, kernel=gpu) for profile in profiles]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda profile: scan.best_cells([profile], chunk, kernel=gpu), profiles * 3))
    assert all((one == expected[number % 3]).all() for number, one in enumerate(found))


def test_a_kernel_with_other_scores_is_refused(monkeypatch):
    scores = scan_kernels.ssv

    def wrong(*args, **words):
        out = scores(*args, **words)
        out[0, 0] += 1
        return out

    monkeypatch.setattr(scan_kernels, "ssv", wrong)
    fresh = open_gpu_kernel(0, best_kernel())
    tiny = scan_kernels.pack(np.zeros(9, np.uint8), np.array([0, 9]), np.array([0]), 1)
    table = np.full((1, NUM_CODES), 127, np.int8)
    for _ in range(2):
        with pytest.raises(KernelError, match=r"cuda \(.*\), ssv_8_16, kernel .* 1 of \d+ scores"):
            fresh.ssv(tiny, table, np.zeros(3, np.uint8), np.array([0, 3]))


def test_a_forked_process_may_not_use_its_parents_device(gpu, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(DeviceError, match="forked"), gpu._device.used():
        pass


@pytest.fixture
def on_the_device(monkeypatch):
    monkeypatch.setenv(scan_choice.VARIABLE, "cuda:0")
    scan_choice._chosen.cache_clear()
    yield scan_kernel()
    scan_choice._chosen.cache_clear()


@needs_hmmer
def test_searches_give_jackhmmers_output(on_the_device, tmp_path):
    random = np.random.default_rng(1)
    family = globins(30)
    targets = list(family.values()) + [drawn(random, 200) for _ in range(60)]
    write_targets(tmp_path / "t.fasta", [targets[i] for i in random.permutation(len(targets))])
    words = {"database": str(tmp_path / "t.fasta"), "cpus": 1, "timeout_s": 100.0}
    plain, fast = Jackhmmer.find(**words), FastJackhmmer.find(**words)
    assert fast.describe_scan().startswith(
        f"the fast scan ({on_the_device.name} kernel, what it leaves by the "
    )
    # Their layout is one that the emulated device has.
    for query in [text[:128] for text in list(family.values())[:2]]:
        expected, found = plain.search(query), fast.search(query)
        assert found.alignment == expected.alignment
        assert found.table.split() == expected.table.split()
        assert found.table.count(b"\n") > 20


@needs_hmmer
def test_a_build_says_that_a_device_scanned(on_the_device, tmp_path):
    database = write_fasta(tmp_path / "uniref90.fasta", globins(9))
    queries = write_fasta(tmp_path / "q.fasta", {name: text[:120] for name, text in globins(2).items()})
    said: list[str] = []
    config = config_of(tmp_path, queries, [f"uniref90={database}"], engine="fast", workers=1)
    assert run_build(config, say=said.append).num_records == 2
    receipts = [json.loads(path.read_text()) for path in tmp_path.rglob("units/*/*.json")]
    assert [one["search"]["scan"] for one in receipts] == [on_the_device.name] * 2
    assert any(on_the_device.name in line for line in said)


@needs_hmmer
def test_the_benchmark_says_what_a_device_does(on_the_device, tmp_path):
    database = write_fasta(tmp_path / "d.fasta", globins(9))
    counts = (9, sum(map(len, globins(9).values())))
    speed = measure_search(str(database), counts, [text[:100] for text in globins(2).values()], ("fast",))
    (line,) = [line for line in lines_of(speed, None) if "by the clock" in line]
    assert line.startswith(f"  {on_the_device.name}: the first filter does ")
    assert f" times one core ({best_kernel().name}, " in line


def test_every_layout_of_short_queries_is_right(gpu):
    """The first use compares with plain C; on a device of one's own all layouts are used."""
    if "emulated" in gpu.name:
        pytest.skip("the emulated device has some layouts only")
    with gpu._device.used():
        for residues in range(1, largest(gpu) + 2, 8):
            gpu._function(layout_of(residues, gpu._device.shared_bytes))
        assert Layout(32, 64) in gpu._functions or gpu._device.shared_bytes < Layout(32, 64).shared_bytes
