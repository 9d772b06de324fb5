"""The variants of a bundle: what graphs each consists of, in which files. `rtx.export.derive` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rtx.runtime.manifest import Precision

VariantName = Literal[
    "fp32",
    "fused",
    "fp32-packed",
    "fp16",
    "bf16",
    "int8",
    "int8-packed",
    "int8-text",
    "int8-image",
    "int8-static",
    "int4",
    "int4-half",
]
Form = Literal[
    "fp32", "fused", "fp32-packed", "fp16", "bf16", "int8", "int8-packed", "int8-static", "int4", "int4-half"
]
"""What a graph is derived to."""

VARIANTS: tuple[VariantName, ...] = get_args(VariantName)
"""In the order of closeness to PyTorch."""


ON_CPU: tuple[VariantName, ...] = ("fp32", "fp32-packed", "int8", "int8-packed")
"""What is worth trying where a CPU serves and ONNX Runtime is what loads the graphs."""


class Recipe(NamedTuple):
    """What the graphs of a variant are derived to; `image` is of no consequence where there is no such graph."""

    tokens: Form
    image: Form


_RECIPES: dict[VariantName, Recipe] = {
    "fp32": Recipe("fp32", "fp32"),
    "fused": Recipe("fused", "fp32"),
    "fp32-packed": Recipe("fp32-packed", "fp32"),
    "fp16": Recipe("fp16", "fp16"),
    "bf16": Recipe("bf16", "bf16"),
    "int8": Recipe("int8", "int8"),
    "int8-packed": Recipe("int8-packed", "int8"),
    "int8-text": Recipe("int8", "fp32"),
    "int8-image": Recipe("fp32", "int8"),
    "int8-static": Recipe("int8-static", "int8-static"),
    "int4": Recipe("int4", "fp32"),
    "int4-half": Recipe("int4-half", "fp16"),
}
_ENDINGS: dict[Form, str] = {
    "fp32": "",
    "fused": "_fused",
    "fp32-packed": "_packed",
    "fp16": "_fp16",
    "bf16": "_bf16",
    "int8": "_int8",
    "int8-packed": "_int8_packed",
    "int8-static": "_int8_static",
    "int4": "_int4",
    "int4-half": "_int4_half",
}
_PRECISIONS: dict[Form, Precision] = {
    "fp32": "fp32",
    "fused": "fp32",
    "fp32-packed": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "int8-packed": "int8",
    "int8-static": "int8",
    "int4": "int4",
    "int4-half": "int4",
}
# Variants that treat texts and images apart.
_FOR_IMAGES: tuple[VariantName, ...] = ("int8-text", "int8-image")


class Files(NamedTuple):
    """Paths of a variant's graphs in the bundle; `image` is None for a model that takes no images."""

    tokens: str
    image: str | None


def variants_of(*, images: bool) -> tuple[VariantName, ...]:
    """The variants that a model can have: those that treat texts and images apart need both."""
    return VARIANTS if images else tuple(name for name in VARIANTS if name not in _FOR_IMAGES)


def recipe_of(name: VariantName) -> Recipe:
    """What a variant's graphs are derived to."""
    return _RECIPES[name]


def is_packed(name: VariantName) -> bool:
    """Whether a variant is derived from the packed graph, and needs the operators of `rtx.kernels.library`."""
    return _RECIPES[name].tokens in ("fp32-packed", "int8-packed")


def can_be_mixed(name: VariantName) -> bool:
    """Whether layers of a variant may be left as they are: of the graph for what has tokens, if that is in int8."""
    return _RECIPES[name].tokens in ("int8", "int8-packed", "int8-static")


def is_calibrated(name: VariantName) -> bool:
    """Whether a variant has scales that are found on items of its user's."""
    return "int8-static" in _RECIPES[name]


def learns_from_items(name: VariantName) -> bool:
    """Whether a variant is better for items of its user's, whether or not it needs them."""
    return is_calibrated(name) or "int4-half" in _RECIPES[name]


def has_half_precision(name: VariantName) -> bool:
    """Whether a graph of a variant computes in half precision, which rounds on a GPU and hardly does on a CPU."""
    return "bf16" in _RECIPES[name] or can_overflow(name)


def can_overflow(name: VariantName) -> bool:
    """Whether a graph of a variant computes in fp16, which ends at 65,504."""
    return not {"fp16", "int8-static", "int4-half"}.isdisjoint(_RECIPES[name])


def runs_on_cpu(name: VariantName) -> bool:
    """Whether ONNX Runtime has a variant's operators on the CPU: it has none in bf16."""
    return "bf16" not in _RECIPES[name]


def form_of(name: VariantName) -> Form:
    """What the graph for what has tokens is derived to: of a packed one, the plain one with the same arithmetic."""
    tokens = _RECIPES[name].tokens
    return "int8" if tokens == "int8-packed" else tokens


def kept_in(name: VariantName) -> Precision:
    """The precision of layers that are left as they are."""
    return "fp16" if form_of(name) == "int8-static" else "fp32"


def files_of(name: VariantName, *, images: bool) -> Files:
    """Where a variant's graphs are; two variants may have one in common."""
    recipe = _RECIPES[name]
    image = f"onnx/vision{_ENDINGS[recipe.image]}.onnx" if images else None
    return Files(f"onnx/model{_ENDINGS[recipe.tokens]}.onnx", image)


def precisions_of(name: VariantName) -> tuple[Precision, Precision]:
    """Precisions of the linear layers of what has tokens, and of what has images."""
    recipe = _RECIPES[name]
    return _PRECISIONS[recipe.tokens], _PRECISIONS[recipe.image]


def precision_of(name: VariantName, *, images: bool) -> Precision:
    """The lowest precision of a variant, by which it is held."""
    order: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8", "int4")
    tokens, image = precisions_of(name)
    return max(tokens, image, key=order.index) if images else tokens


def external_files(path: Path) -> list[Path]:
    """The files beside a graph that hold its weights."""
    beside = path.with_name(f"{path.name}.data")
    return [beside] if beside.exists() else []
