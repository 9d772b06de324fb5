"""The variants of a bundle: what graphs each consists of, and how those are derived from the plain ones."""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import onnx_ir as ir

from rtx.export.fp16 import to_bf16, to_fp16
from rtx.export.fused import fuse
from rtx.export.graph import strip_notes
from rtx.export.graphs import Graphs
from rtx.export.int4 import quantize_int4
from rtx.export.int4_blocks import Factors
from rtx.export.int4_half import quantize_int4_half
from rtx.export.int8 import quantize_int8
from rtx.export.int8_fused import quantize_int8_fused
from rtx.export.int8_static import quantize_int8_static
from rtx.export.scales import Scales
from rtx.runtime.errors import ExportError
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
# From here on weights lie in a file of their own. A protobuf message ends at 2 GiB, and is dear long before that: it is
# in memory three times while it is written, and copied when it is loaded, where a file is written piece by piece and
# mapped.
_EXTERNAL_FROM_BYTES = 500_000_000


class Files(NamedTuple):
    """Paths of a variant's graphs in the bundle; `image` is None for a model that takes no images."""

    tokens: str
    image: str | None


def variants_of(*, images: bool) -> tuple[VariantName, ...]:
    """The variants that a model can have: those that treat texts and images apart need both."""
    return VARIANTS if images else tuple(name for name in VARIANTS if name not in _FOR_IMAGES)


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


def write_variant(name: VariantName, plain: Graphs, folder: Path, keep: Collection[str] = ()) -> None:
    """Derive a variant's graphs and write those that are not there yet.

    Args:
        name: of the variant.
        plain: what they are derived from, which stays as it is.
        folder: of the bundle.
        keep: modules that are left as they are in the graph for what has tokens; if there are any, it is written anew.

    Raises:
        ExportError: a graph does not lend itself to it.
    """
    recipe, files = _RECIPES[name], files_of(name, images=plain.image is not None)
    tokens = plain.packed if is_packed(name) else plain.tokens
    if isinstance(tokens, ExportError):
        raise tokens
    if keep:
        for path in (folder / files.tokens, *external_files(folder / files.tokens)):
            path.unlink(missing_ok=True)
    for form, graph, file, kept, scales, factors in (
        (recipe.tokens, tokens, files.tokens, keep, plain.scales, plain.factors),
        (recipe.image, plain.image, files.image, (), plain.image_scales, {}),
    ):
        if graph is not None and file is not None and not (folder / file).exists():
            save(derive(form, graph, kept, scales, factors), folder / file)
            if external_files(folder / file):
                # A graph refers to itself: large weights of its own would stay until Python looks for such circles.
                gc.collect()


def map_weights(plain: Graphs, folder: Path, files: Files) -> None:
    """Let graphs have, in place of weights in memory, those that were written: of large ones nothing is read yet.

    Args:
        plain: changed in place.
        folder: of the bundle.
        files: what the graphs were written to.
    """
    for graph, file in ((plain.tokens, files.tokens), (plain.image, files.image)):
        if graph is not None and file is not None:
            written = ir.load(folder / file).graph.initializers
            for name, value in graph.graph.initializers.items():
                value.const_value = written[name].const_value


def derive(
    form: Form,
    plain: ir.Model,
    keep: Collection[str] = (),
    scales: Scales = MappingProxyType({}),
    factors: Factors = MappingProxyType({}),
) -> ir.Model:
    """A plain graph in another form, or the packed one for a form of that; it stays as it is.

    Args:
        form: what to.
        plain: what of.
        keep: for a form in int8, modules whose weights are left as they are.
        scales: for int8-static, of what its layers read.
        factors: for int4-half, likewise, if there are any.

    Raises:
        ExportError: the graph does not lend itself to it.
    """
    variant = plain.clone()
    if form == "fp16":
        to_fp16(variant)
    elif form == "bf16":
        to_bf16(variant)
    elif form == "int8":
        quantize_int8(variant, keep)
    elif form == "int8-packed":
        quantize_int8_fused(variant, keep)
    elif form == "int8-static":
        quantize_int8_static(variant, scales, keep)
    elif form == "int4":
        quantize_int4(variant)
    elif form == "int4-half":
        quantize_int4_half(variant, factors)
    elif form == "fused":
        fuse(variant)
    return variant


def save(graph: ir.Model, path: Path) -> None:
    """Write a graph without the exporter's notes; large weights go to a file beside it, all others into the graph."""
    strip_notes(graph)
    values = list(graph.graph.initializers.values())
    if sum(value.const_value.nbytes for value in values if value.const_value is not None) > _EXTERNAL_FROM_BYTES:
        ir.save(graph, path, external_data=f"{path.name}.data")
        return
    for value in values:
        # As it is, such a weight would go on pointing to another graph's file.
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    ir.save(graph, path)


def external_files(path: Path) -> list[Path]:
    """The files beside a graph that hold its weights."""
    beside = path.with_name(f"{path.name}.data")
    return [beside] if beside.exists() else []


def remove_unused(folder: Path, kept: set[str]) -> None:
    """Remove the graphs of a bundle's folder, with their weights, that are not among `kept`."""
    for file in (folder / "onnx").glob("*.onnx"):
        if file.relative_to(folder).as_posix() not in kept:
            for path in (file, *external_files(file)):
                path.unlink()
