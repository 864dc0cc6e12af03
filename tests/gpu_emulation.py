"""Builds the emulated CUDA device of `gpu_emulator.cpp`, and says how a program finds it."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cuda.pathfinder import load_nvidia_dynamic_lib

from foldfeed.pipelines.fast_scan.gpu import Layout

TESTS = Path(__file__).parent
KERNEL = TESTS.parent / "pipelines" / "fast_scan" / "scan_gpu.cu"
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build_device(folder: Path, layouts: Iterable[Layout], *, sanitize: bool = False) -> dict[str, str]:
    """Compiles the device with some layouts of the kernel; returns environment variables for its users.

    Args:
      folder: for the library, which has the driver's name.
      layouts: that programs will ask for.
      sanitize: whether an access outside of what was allocated ends the program.
    """
    common = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    common += ["-Wno-unknown-pragmas", "-Wno-unused-parameter", *(SANITIZED if sanitize else ())]
    objects = {folder / "emulator.o": ["-Werror", str(TESTS / "gpu_emulator.cpp")]}
    for layout in layouts:
        words = ["-include", str(TESTS / "gpu_emulator.h"), *layout.options, "-x", "c++", str(KERNEL)]
        objects[folder / f"{layout.name}.o"] = ["-fvisibility=default", *words]
    compilers = [subprocess.Popen([*common, "-c", *words, "-o", str(out)]) for out, words in objects.items()]
    assert [one.wait(timeout=120) for one in compilers] == [0] * len(objects)
    library = folder / "libcuda.so.1"
    link = [*common, "-shared", *map(str, objects), "-ldl", "-o", str(library), f"-Wl,-soname,{library.name}"]
    subprocess.run(link, check=True, timeout=120)
    folders = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    found = {}
    if sanitize:
        # Loaded through the sanitizer, the compiler does not find its own parts.
        folders.insert(1, str(Path(load_nvidia_dynamic_lib("nvrtc").abs_path).parent))
        words = ["g++", "-print-file-name=libasan.so"]
        runtime = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        # Python has leaks of its own; memory of the size asked for that cannot be had is no error.
        found |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    return found | {"LD_LIBRARY_PATH": os.pathsep.join(folders)}
