"""The torch-free runtime: open a bundle, embed, rerank, measure.

The public names are those of `__all__`. Each is loaded from its module when it is first used, so that importing
`rtx.runtime` costs nothing and a program that only reads errors never loads a tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rtx.runtime.lazy import load

if TYPE_CHECKING:
    from rtx.runtime.bundle import Bundle
    from rtx.runtime.contract import Contract
    from rtx.runtime.embedder import Embedder
    from rtx.runtime.engine import Budget, Engine
    from rtx.runtime.errors import (
        ArtifactError,
        BundleError,
        CheckpointError,
        DataError,
        EngineError,
        ExportError,
        GateError,
        InvalidItemsError,
        ItemError,
        MissingExtraError,
        RtxError,
        TrainingError,
        UsageError,
    )
    from rtx.runtime.images import ImageLimits
    from rtx.runtime.pdf import PdfPages
    from rtx.runtime.reranker import Ranked, Reranker

__all__ = [
    "ArtifactError",
    "Budget",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Contract",
    "DataError",
    "Embedder",
    "Engine",
    "EngineError",
    "ExportError",
    "GateError",
    "ImageLimits",
    "InvalidItemsError",
    "ItemError",
    "MissingExtraError",
    "PdfPages",
    "Ranked",
    "Reranker",
    "RtxError",
    "TrainingError",
    "UsageError",
]

_MODULE_OF = {
    "Budget": "engine",
    "Bundle": "bundle",
    "Contract": "contract",
    "Embedder": "embedder",
    "Engine": "engine",
    "ImageLimits": "images",
    "PdfPages": "pdf",
    "Ranked": "reranker",
    "Reranker": "reranker",
}
_MODULES = {name: f"rtx.runtime.{_MODULE_OF.get(name, 'errors')}" for name in __all__}


def __getattr__(name: str) -> object:
    value = globals()[name] = load(__name__, _MODULES, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
