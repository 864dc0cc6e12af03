"""A CUDA device: its memory, kernels compiled from source where they run, launches.

Owns the calls of NVIDIA's driver and compiler, through the package ``cuda-bindings`` (which torch's CUDA
wheels bring along, too; torch itself is not needed). Does not own what is computed
(`fast_scan.gpu`). Invariants: every call that fails is a `DeviceError` with the driver's words;
the context is the one that others in this process share, and is the current one of a thread only inside
`Device.used`; who waits sleeps.

Safe from any thread, one at a time (`Device.used`); a forked child may not use its parent's device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldfeed.feature_store.errors import MissingExtraError
from foldfeed.pipelines.errors import DeviceError

# Arguments of a kernel: values and their C types.
Argument = tuple[int, Any]


@functools.cache
def _bindings() -> tuple[ModuleType, ModuleType]:
    try:
        from cuda.bindings import driver, nvrtc
    except ModuleNotFoundError as error:
        raise MissingExtraError("cuda-bindings", "gpu") from error
    return driver, nvrtc


class Buffer:
    """Memory of a device; given back when nothing refers to it any more."""

    def __init__(self, device: Device, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._device = device
        # None of it can be asked for.
        self.address = device.call("cuMemAlloc", max(1, size_bytes))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._device.give_back(self.address)


class Function:
    """A kernel that is loaded."""

    def __init__(self, device: Device, image: bytes, name: str) -> None:
        self._device = device
        self._module = device.call("cuModuleLoadData", image)
        self._handle = device.call("cuModuleGetFunction", self._module, name.encode())

    def blocks_at_a_time(self, threads: int, shared_bytes: int) -> int:
        """Returns how many blocks of a size the whole device runs together; allows them the shared memory."""
        driver, device = _bindings()[0], self._device
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device.call("cuFuncSetAttribute", self._handle, most, shared_bytes)
        each = device.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", self._handle, threads, shared_bytes)
        return max(1, each) * device.num_multiprocessors

    def launch(self, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Argument]) -> None:
        """Starts the kernel behind what was started before."""
        values, types = tuple(zip(*arguments, strict=True))
        self._device.call(
            "cuLaunchKernel",
            *(self._handle, blocks, 1, 1, threads, 1, 1, shared_bytes),
            *(self._device.stream, (values, types), 0),
        )


class Device:
    """One CUDA device of this machine, opened once per process."""

    def __init__(self, number: int) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()
        # Addresses whose owners are gone; freed by the next user, because that may not be done anywhere.
        self._dropped: list[Any] = []
        driver = _bindings()[0]
        attributes = driver.CUdevice_attribute
        self._device = self.call("cuDeviceGet", number)
        self.name = self.call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self.num_multiprocessors = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.capability = (
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )
        # That a block may have, once the kernel asked for more than the usual 48 KiB.
        self.shared_bytes = self._attribute(attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        with self.used():
            self.stream = self.call("cuStreamCreate", driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            # A thread that waits for it sleeps; jackhmmer has the processor meanwhile.
            self._event = self.call("cuEventCreate", driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Makes the device this thread's, and nobody else's, for a while.

        Raises:
          DeviceError: this process was forked from the one that opened the device.
        """
        if os.getpid() != self._process:
            raise DeviceError("cuCtxPushCurrent", "a forked process cannot use its parent's device; spawn it")
        with self._lock:
            self.call("cuCtxPushCurrent", self._context)
            try:
                self.collect()
                yield
            finally:
                self.call("cuCtxPopCurrent")

    def collect(self) -> None:
        """Frees memory whose owners are gone; inside `used`."""
        while self._dropped:
            self.call("cuMemFree", self._dropped.pop())

    def give_back(self, address: Any) -> None:
        """Frees memory the next time that somebody uses the device; may be called anywhere."""
        self._dropped.append(address)

    def free_bytes(self) -> int:
        """Returns how much memory nobody has, other processes included."""
        return int(self.call("cuMemGetInfo")[0])

    def upload(self, array: NDArray[Any]) -> Buffer:
        """Returns a copy of an array; the array may be changed after that."""
        array = np.ascontiguousarray(array)
        buffer = Buffer(self, array.nbytes)
        if array.nbytes:
            self.call("cuMemcpyHtoDAsync", buffer.address, array.ctypes.data, array.nbytes, self.stream)
        return buffer

    def clear(self, buffer: Buffer) -> None:
        """Sets all bytes to 0."""
        self.call("cuMemsetD8Async", buffer.address, 0, max(1, buffer.size_bytes), self.stream)

    def download(self, buffer: Buffer, out: NDArray[Any]) -> None:
        """Waits for everything that was started, and copies a buffer into an array of its size."""
        if out.nbytes != buffer.size_bytes or not out.flags.c_contiguous:
            raise ValueError(f"{buffer.size_bytes} bytes do not fit an array of {out.nbytes}")
        self.wait()
        if out.nbytes:
            self.call("cuMemcpyDtoHAsync", out.ctypes.data, buffer.address, out.nbytes, self.stream)
            self.wait()

    def wait(self) -> None:
        """Waits, asleep, for everything that was started."""
        self.call("cuEventRecord", self._event, self.stream)
        self.call("cuEventSynchronize", self._event)

    def function(self, source: str, name: str, options: Sequence[str]) -> Function:
        """Compiles CUDA C for this device and loads one of its kernels.

        Raises:
          DeviceError: the compiler or the driver refuses it.
        """
        return Function(self, compile_source(source, self.capability, options), name)

    def call(self, name: str, *words: Any) -> Any:
        """Calls a function of the driver and returns what it gives, none, one or several values.

        Raises:
          DeviceError: it failed, or the driver does not know it.
        """
        driver = _bindings()[0]
        try:
            code, *found = getattr(driver, name)(*words)
        except RuntimeError as error:
            raise DeviceError(name, f"the driver is too old for it, or not there: {error}") from error
        if code != driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(name, self._words_of(code))
        return found[0] if len(found) == 1 else found or None

    @staticmethod
    def _words_of(code: Any) -> str:
        driver = _bindings()[0]
        texts = [driver.cuGetErrorName(code)[1], driver.cuGetErrorString(code)[1]]
        return ": ".join(text.decode() for text in texts if text) or str(code)

    def _attribute(self, which: Any) -> int:
        return int(self.call("cuDeviceGetAttribute", which, self._device))


@functools.cache
def open_device(number: int) -> Device:
    """Returns a device of this machine; the same object for every caller.

    Raises:
      MissingExtraError: the package ``cuda-bindings`` is not installed.
      DeviceError: no driver, or no such device.
    """
    count = num_devices()
    if not 0 <= number < count:
        raise DeviceError("cuDeviceGet", f"there is no device {number}; this machine shows {count}")
    return Device(number)


@functools.cache
def num_devices() -> int:
    """Returns how many devices the driver shows.

    Raises:
      MissingExtraError: the package ``cuda-bindings`` is not installed.
      DeviceError: there is no driver, or it does not start.
    """
    driver = _bindings()[0]
    # The package finds the driver's library at the first call.
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:
        raise DeviceError("cuInit", f"no driver of NVIDIA on this machine ({error})") from error
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError("cuInit", Device._words_of(code))
    return int(driver.cuDeviceGetCount()[1])


def compile_source(source: str, capability: tuple[int, int], options: Sequence[str]) -> bytes:
    """Returns CUDA C compiled for a compute capability; needs no device.

    Where the compiler is older than the device, it is the newest portable code that it makes, which the
    driver compiles to its end.

    Raises:
      MissingExtraError: the package ``cuda-bindings`` is not installed.
      DeviceError: the compiler is not there, or refuses the source.
    """
    nvrtc = _bindings()[1]
    try:
        known = _compiler_call("nvrtcGetSupportedArchs")
    except RuntimeError as error:
        raise DeviceError(
            "NVRTC", f"the compiler is not there; pip install 'foldfeed[gpu]' ({error})"
        ) from error
    wanted = 10 * capability[0] + capability[1]
    native = wanted in known
    older = [one for one in known if one < wanted]
    if not native and not older:
        raise DeviceError("NVRTC", f"it compiles for {known}, not for compute capability {capability}")
    target = f"sm_{wanted}" if native else f"compute_{max(older)}"
    program = _compiler_call("nvrtcCreateProgram", source.encode(), b"foldfeed.cu", 0, [], [])
    words = [f"--gpu-architecture={target}".encode(), *(option.encode() for option in options)]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _compiler_call("nvrtcGetProgramLogSize", program)
        _compiler_call("nvrtcGetProgramLog", program, log)
        raise DeviceError("NVRTC", f"{target}: {log.decode(errors='replace').strip(chr(0)).strip()}")
    kind = "CUBIN" if native else "PTX"
    image = b" " * _compiler_call(f"nvrtcGet{kind}Size", program)
    _compiler_call(f"nvrtcGet{kind}", program, image)
    _compiler_call("nvrtcDestroyProgram", program)
    return image


def _compiler_call(name: str, *words: Any) -> Any:
    nvrtc = _bindings()[1]
    code, *found = getattr(nvrtc, name)(*words)
    if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError("NVRTC", f"{name}: {nvrtc.nvrtcGetErrorString(code)[1].decode()}")
    if name == "nvrtcGetSupportedArchs":
        return found[-1]
    return found[0] if found else None


# C types of a kernel's arguments.
POINTER, INT = ctypes.c_void_p, ctypes.c_int
