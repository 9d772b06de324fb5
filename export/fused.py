"""fused variant: float32 with ONNX Runtime's own operators for attention, norms and GELU.

For ONNX Runtime only: no other engine knows these operators. On the CPUs that were measured it is no faster than the
plain graph (docs/benchmarks.md); it is here for those on which it is.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions import optimize_for_ort


def fuse(model: ir.Model) -> list[str]:
    """Fuse a plain graph in place.

    Returns:
        The operators it uses now that are not ONNX's own.
    """
    optimize_for_ort(model)
    return sorted({node.op_type for node in model.graph if node.domain == "com.microsoft"})
