"""From a checkpoint to a bundle: one plain ONNX graph, its variants, and the gate that each has to pass.

Needs the extra `export`. Names are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtx.runtime.lazy import load

if TYPE_CHECKING:
    from rtx.export.pipeline import ExportOptions as ExportOptions
    from rtx.export.pipeline import Outcome as Outcome
    from rtx.export.pipeline import export_bundle as export_bundle

# Public name -> the module that defines it.
_MODULES = dict.fromkeys(("ExportOptions", "Outcome", "export_bundle"), "rtx.export.pipeline")

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    return load(__name__, _MODULES, name, extra="export")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
