"""How the graphs of a variant are derived from the plain ones, and written."""

from __future__ import annotations

import gc
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType

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
from rtx.export.variants import Files, Form, VariantName, external_files, files_of, is_packed, recipe_of
from rtx.runtime.errors import ExportError

# From here on weights lie in a file of their own. A protobuf message ends at 2 GiB, and is dear long before that: it is
# in memory three times while it is written, and copied when it is loaded, where a file is written piece by piece and
# mapped.
_EXTERNAL_FROM_BYTES = 500_000_000


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
    recipe, files = recipe_of(name), files_of(name, images=plain.image is not None)
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


def remove_unused(folder: Path, kept: set[str]) -> None:
    """Remove the graphs of a bundle's folder, with their weights, that are not among `kept`."""
    for file in (folder / "onnx").glob("*.onnx"):
        if file.relative_to(folder).as_posix() not in kept:
            for path in (file, *external_files(file)):
                path.unlink()
