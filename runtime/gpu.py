"""The NVIDIA GPUs of this machine, as the driver itself tells them: nothing of CUDA has to be installed to ask.

Functions and attributes are those of the CUDA driver API (docs.nvidia.com/cuda/cuda-driver-api).
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from rtx.runtime.errors import EngineError

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        index: N of the device "cuda:N".
        name: what NVIDIA calls it.
        capability: compute capability, as 89 for 8.9.
        memory_bytes: of the GPU.
    """

    index: int
    name: str
    capability: int
    memory_bytes: int


@dataclass(frozen=True)
class Gpus:
    """What the driver tells.

    Attributes:
        cuda: the newest version of CUDA that the driver takes, "12.8".
        devices: in the driver's order; may be none.
    """

    cuda: str
    devices: tuple[Gpu, ...]


def find_gpus() -> Gpus:
    """Ask the driver.

    Raises:
        EngineError: there is no driver, or it does not answer; says why.
    """
    try:
        driver = _load()
    except OSError as missing:
        raise EngineError(f"no NVIDIA driver: {_LIBRARY} cannot be loaded ({missing})") from missing
    started = driver.cuInit(0)
    version = ctypes.c_int()
    _check(driver, driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if started == _NO_DEVICE:
        return Gpus(cuda, ())
    _check(driver, started, "cuInit")
    count = ctypes.c_int()
    _check(driver, driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    return Gpus(cuda, tuple(_describe(driver, index) for index in range(count.value)))


def find_gpu(index: int) -> Gpu:
    """
    Raises:
        EngineError: there is no driver, or no such GPU.
    """
    devices = find_gpus().devices
    if index >= len(devices):
        raise EngineError(f"there is no GPU {index}; the NVIDIA driver finds {len(devices)}")
    return devices[index]


def _load() -> Any:
    return ctypes.CDLL(_LIBRARY)


def _describe(driver: Any, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES), ctypes.c_size_t()
    _check(driver, driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    _check(driver, driver.cuDeviceGetName(name, _NAME_BYTES, device), "cuDeviceGetName")
    _check(driver, driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "cuDeviceTotalMem")
    major, minor = (_attribute(driver, which, device) for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR))
    return Gpu(index, name.value.decode(errors="replace"), 10 * major + minor, memory.value)


def _attribute(driver: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(driver, driver.cuDeviceGetAttribute(ctypes.byref(value), which, device), "cuDeviceGetAttribute")
    return value.value


def _check(driver: Any, result: int, call: str) -> None:
    if result == 0:
        return
    text = ctypes.c_char_p()
    known = driver.cuGetErrorString(result, ctypes.byref(text)) == 0 and text.value
    reason = text.value.decode(errors="replace") if known and text.value else "an unknown error"
    raise EngineError(f"the NVIDIA driver answers {call} with error {result}: {reason}")
