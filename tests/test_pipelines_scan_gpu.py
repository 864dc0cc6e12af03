"""The fast scan's CUDA kernel without a GPU: it compiles, and on an emulated device its scores are right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.pipelines.errors import ConfigError, DeviceError
from foldfeed.pipelines.fast_scan import choice as scan_choice
from foldfeed.pipelines.fast_scan import cuda_device
from foldfeed.pipelines.fast_scan import kernels as scan_kernels
from foldfeed.pipelines.fast_scan.choice import VARIABLE, best_kernel, describe_kernel, scan_kernel
from foldfeed.pipelines.fast_scan.cuda_device import compile_source
from foldfeed.pipelines.fast_scan.gpu import Layout, layout_of, source

if scan_kernels.library_path() is None:
    pytest.skip("installed without the scan's kernels (no C compiler)", allow_module_level=True)

LARGEST = Layout(32, 64, stretches=True)
# Of a block of usual kernels, of A10 and L4, of A100, of H100.
SHARED_BYTES = (48 << 10, 99 << 10, 163 << 10, 227 << 10)


def why_no_compiler() -> str:
    try:
        compile_source("", (8, 0), ())
    except (DeviceError, MissingExtraError) as error:
        return str(error)
    return ""


NO_COMPILER = why_no_compiler()
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "it is there")


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "layout"),
    [((8, 0), LARGEST), ((9, 0), Layout(8, 40)), ((9, 0), LARGEST), ((12, 0), LARGEST)],
)
def test_the_kernel_compiles_without_spilling_registers(capability, layout):
    from cuda.bindings import nvrtc

    # The compiler's own report, which is kept nowhere.
    _, program = nvrtc.nvrtcCreateProgram(source().encode(), b"scan_gpu.cu", 0, [], [])
    target = f"--gpu-architecture=sm_{capability[0]}{capability[1]}"
    words = [word.encode() for word in (target, "--ptxas-options=-v", *layout.options)]
    assert nvrtc.nvrtcCompileProgram(program, len(words), words)[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS
    log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    assert "0 bytes spill stores, 0 bytes spill loads" in log.decode()
    registers = int(re.search(r"Used (\d+) registers", log.decode())[1])
    # A block of its threads fits a multiprocessor twice, or it is large.
    assert registers * layout.threads <= 65536 // (2 if layout.threads == 256 else 1)


@needs_compiler
def test_code_is_a_devices_own_or_where_the_compiler_is_older_portable():
    layout = Layout(8, 16)
    image = compile_source(source(), (8, 0), layout.options)
    assert image[:4] == b"\x7fELF"
    assert layout.name.encode() in image
    assert b".target sm_" in compile_source("__global__ void f() {}", (99, 0), ())


@needs_compiler
def test_what_the_compiler_refuses_is_said():
    with pytest.raises(DeviceError, match=r'NVRTC: sm_90: (?s:.*)identifier "nonsense" is undefined'):
        compile_source("__global__ void f() { nonsense; }", (9, 0), ())
    with pytest.raises(DeviceError, match="not for compute capability"):
        compile_source("", (1, 0), ())


@pytest.mark.parametrize("shared_bytes", SHARED_BYTES)
def test_a_query_gets_the_layout_with_the_fewest_positions_to_spare(shared_bytes):
    most = layout_of(10**6, shared_bytes)
    assert most.stretches
    assert shared_bytes // 2 < most.shared_bytes <= shared_bytes or most.positions == LARGEST.positions
    spare = []
    for residues in range(1, most.positions + 1):
        layout = layout_of(residues, shared_bytes)
        assert not layout.stretches
        assert residues <= layout.positions
        assert layout.shared_bytes <= shared_bytes
        spare.append(layout.positions - residues)
    assert max(spare) < 256
    assert layout_of(most.positions + 1, shared_bytes) == most


def test_the_device_that_is_asked_for_is_used_or_missed(monkeypatch):
    def choose(wanted: str):
        monkeypatch.setenv(VARIABLE, wanted)
        return scan_kernel()

    scan_choice._chosen.cache_clear()
    try:
        for wanted in ("", "cpu"):
            assert choose(wanted) is best_kernel()
        assert describe_kernel() == f"{best_kernel().name} kernel"
        for wanted in ("gpu", "cuda:", "cuda:x", "CUDA"):
            with pytest.raises(ConfigError, match="must be cpu, cuda, cuda:N or auto"):
                choose(wanted)
        with pytest.raises((DeviceError, MissingExtraError)):
            choose("cuda:9999")
        if not has_device():
            with pytest.raises((DeviceError, MissingExtraError)):
                choose("cuda")
            assert choose("auto") is best_kernel()
            assert re.search(r" kernel; no device, because \w", describe_kernel())
    finally:
        scan_choice._chosen.cache_clear()


def has_device() -> bool:
    try:
        return cuda_device.num_devices() > 0
    except (DeviceError, MissingExtraError):
        return False


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    cuda_device._bindings.cache_clear()
    try:
        with pytest.raises(MissingExtraError, match=r"foldfeed\[gpu\]"):
            compile_source("", (9, 0), ())
    finally:
        cuda_device._bindings.cache_clear()


# Shared memory of the emulated device, so small that middling queries take several parts.
EMULATED_SHARED_BYTES = 40 << 10
# Of the tests that a GPU runs: those of scores again where an access outside a buffer ends the program.
SCORES = "scores_are_those"


@needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("sanitize", [False, True])
def test_a_gpus_tests_pass_on_an_emulated_device(tmp_path, sanitize):
    from gpu_emulation import build_device

    if has_device():
        pytest.skip("there is a GPU, on which the same tests run")
    lengths = (128, 320, 600, 1 << 20)
    layouts = {layout_of(length, EMULATED_SHARED_BYTES) for length in lengths}
    assert len(layouts) == len(lengths)
    variables = build_device(tmp_path, layouts, sanitize=sanitize)
    done = run_cuda_tests(tmp_path, variables, "-k", SCORES if sanitize else f"not {SCORES}")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    # One of them is for devices with all layouts.
    assert all("some layouts only" in line or "HMMER" in line for line in skipped), skipped
    if not sanitize:
        # And they can fail.
        broken = variables | {"FOLDFEED_EMULATED_FAULT": "cuLaunchKernel"}
        done = run_cuda_tests(tmp_path, broken, "-k", "threads_take_turns")
        assert done.returncode == 1
        assert "CUDA_ERROR_EMULATED: the emulated device says so" in done.stdout


def run_cuda_tests(folder: Path, variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).with_name("test_pipelines_scan_cuda.py")
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        f"--basetemp={folder / 'pytest'}",
        *words,
        str(tests),
    ]
    settings = {"FOLDFEED_EMULATED_SHARED": str(EMULATED_SHARED_BYTES)}
    environment = {**os.environ, **settings, **variables}
    return subprocess.run(
        argv, env=environment, cwd=tests.parents[1], capture_output=True, text=True, timeout=280, check=False
    )
