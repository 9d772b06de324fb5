"""fused variant: float32 with ONNX Runtime's own operators for attention, norms and GELU.

For ONNX Runtime only: no other engine knows these operators. On the CPU that was measured it gains some 5 % over the
plain graph (docs/benchmarks.md).
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort

from rtx.export.graph import quiet
from rtx.runtime.errors import ExportError


def fuse(model: ir.Model) -> list[str]:
    """Fuse a plain graph in place.

    Returns:
        The operators it uses now that are not ONNX's own.

    Raises:
        ExportError: there is nothing to fuse.
    """
    with quiet():
        optimize_for_ort(model)
    fused = sorted({node.op_type for node in model.graph if node.domain == "com.microsoft"})
    if not fused:
        raise ExportError("fused: ONNX Runtime has no operators for what this graph is made of")
    return fused
