"""The compiled operators for ONNX Runtime (kernels/cpu), where installation found a compiler.

Their kernels are compiled for several instruction sets; which one runs is decided on the machine that runs it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

Isa = Literal["portable", "avx2", "avx-vnni", "avx512-vnni", "avx512-amx"]
ISAS: tuple[Isa, ...] = get_args(Isa)
"""In the order of preference, the best last; the library counts them so."""

DOMAIN = "rtx"
"""Of the operators in a graph; its version is 1."""

OLDEST_ONNXRUNTIME = (1, 21)
"""The first whose C interface has all that the operators ask for."""

NOT_BUILT = "needs the operators of rtx, which are built where a C++ compiler is there at installation"
"""Why a packed variant cannot be had or run, after its name."""

_ENDINGS = (".so", ".pyd", ".dylib")


@lru_cache
def library_file() -> Path | None:
    """The library, for `SessionOptions.register_custom_ops_library`; None where it was not built."""
    here = Path(__file__).resolve().parent
    return next((file for file in sorted(here.glob("_cpu.*")) if file.suffix in _ENDINGS), None)


def load_library() -> ctypes.CDLL:
    """The library for calls of its plain functions, as tests and benchmarks make them.

    Raises:
        FileNotFoundError: it was not built.
        OSError: it cannot be loaded.
    """
    file = library_file()
    if file is None:
        raise FileNotFoundError("the operators of rtx were not built; that needs a C++ compiler at installation")
    return ctypes.CDLL(str(file))


def use_isa(isa: Isa | None) -> Isa:
    """Let the operators of this process use another instruction set than the best, as tests and benchmarks do.

    Args:
        isa: to use; None for the one in use.

    Returns:
        The one in use now.

    Raises:
        FileNotFoundError: there are no operators.
        ValueError: this machine does not have it.
    """
    operators = load_library()
    if isa is not None and operators.rtx_use_isa(ISAS.index(isa)):
        raise ValueError(f"this machine does not have {isa}")
    return ISAS[int(operators.rtx_isa())]


def best_isa() -> Isa | None:
    """The instruction set that the operators use on this machine; None where there is no library that can be loaded."""
    try:
        return ISAS[int(load_library().rtx_best_isa())]
    except OSError:
        return None
