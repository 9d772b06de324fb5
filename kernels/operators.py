"""The ops as operators of PyTorch, `torch.ops.rtx.*`: in Triton on an NVIDIA GPU, by the reference everywhere else.

Before a kernel is used on a GPU it runs there on small inputs, and is held to its reference within what its contract
allows (`rtx.kernels.gpu.trial`). One that cannot be compiled or started, or is too far off, is not used in this
process: a warning says why, and the reference takes its place. That computes on the CPU, in float64: right, and slow.
`in_triton` tells beforehand, for a caller who has something faster. What is tried are some sizes and options; others
are compiled when they come, and an error there is the caller's.

Arguments are those of the function of the same name in `rtx.kernels.gpu`, which checks them (`attention_mask` of `pool`
by its place, as PyTorch has no tensors that are given by name alone); on other devices only what
the reference cannot compute is an error, and NaN and infinity have no codes. Of `info_nce` there are gradients, but not
of those; of the others there are none. Importing this module needs torch, and not triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rtx.kernels import add_norm_quantize as _add_norm_quantize
from rtx.kernels import info_nce as _info_nce
from rtx.kernels import int8_linear as _int8_linear
from rtx.kernels import maxsim as _maxsim
from rtx.kernels import packed_attention as _packed_attention
from rtx.kernels import pool as _pool
from rtx.kernels.gpu import OPS as OPS
from rtx.kernels.quantize import quantize_binary, quantize_int8


# For `torch.compile`, whose graphs are of one device: asked once, while it traces.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_triton(op: str, device: torch.device) -> bool:
    """Whether an op's kernel is used on a device. The first question for a GPU compiles and tries it there.

    Args:
        op: of OPS.
        device: any; of GPUs those of NVIDIA from compute capability 8.0 on.

    Raises:
        RuntimeError: the first question comes while a CUDA graph is captured, which trying would break; or trying broke
            CUDA in this process, so that nothing else would run either.
        OutOfMemoryError: the GPU has not the memory for the trial. The next question tries again.
    """
    return _is_gpu(device) and importlib.util.find_spec("triton") is not None and _is_sound(op, device)


def _is_gpu(device: torch.device) -> bool:
    # AMD's GPUs have the same name in PyTorch.
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _is_sound(op: str, device: torch.device) -> bool:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: expected to be used once before a CUDA graph is captured, as it is tried first")
    try:
        # Not as part of what calls it: neither its tensors nor its modes are the trial's.
        with unset_fake_temporarily(), torch.autocast(device.type, enabled=False), torch.no_grad():
            problem = importlib.import_module("rtx.kernels.gpu.trial").try_kernel(op, device)
    except torch.OutOfMemoryError:
        raise  # another time it may be sound
    except Exception as broken:  # noqa: BLE001 of Triton, its compiler, the driver
        problem = f"{type(broken).__name__}: {broken}".splitlines()[0]
        if device.type == "cuda":
            try:  # a kernel that went astray ends all that this process has on the GPU
                torch.cuda.synchronize(device)
            except Exception as lost:
                again = "the process has to be started again, and uninstalling triton leaves this kernel out"
                raise RuntimeError(f"{op}: trying the Triton kernel broke CUDA: {problem}; {again}") from lost
    if problem is not None:
        warnings.warn(f"{op}: the Triton kernel is not used on {device}: {problem}", RuntimeWarning, stacklevel=3)
    return problem is None


def _kernel(op: str, tensor: Tensor, name: str | None = None) -> Any:
    """An op's function in Triton, or one with its name in the same file; None where the reference computes."""
    if not in_triton(op, tensor.device):
        return None
    return getattr(importlib.import_module(f"rtx.kernels.gpu.{op}"), name or op)


@torch.library.custom_op("rtx::pool", mutates_args=())
def pool(
    hidden: Tensor,
    mask: Tensor,
    mode: str,
    attention_mask: Tensor | None = None,
    *,
    dimension: int | None = None,
    normalize: bool = False,
    output: str = "float32",
) -> Tensor:
    """One vector for each row of token vectors, cut, normalised and coded: [rows, dimension], or bits of it."""
    if kernel := _kernel("pool", hidden):
        options = {"attention_mask": attention_mask, "dimension": dimension, "normalize": normalize, "output": output}
        return _tensor(kernel(hidden, mask, mode, **options))
    kept = hidden.shape[2] if dimension is None else dimension
    attended = None if attention_mask is None else _array(attention_mask)
    found = _pool.pool(_array(hidden), _array(mask), [mode], attention_mask=attended)
    found = _pool.truncate(found, kept, normalize=normalize)
    coded: NDArray[Any] = found
    if output == "int8":
        coded = quantize_int8(found)
    elif output == "binary":
        coded = quantize_binary(found)
    elif output == "float16":
        coded = found.astype(np.float16)
    elif output != "float32":
        raise ValueError(f"output: expected float32, float16, int8 or binary, got '{output}'")
    return _like(hidden, coded)


@pool.register_fake
def _(hidden: Tensor, *_: Any, dimension: int | None = None, output: str = "float32", **__: Any) -> Tensor:
    kept = hidden.shape[2] if dimension is None else dimension
    dtype = torch.uint8 if output == "binary" else getattr(torch, output)
    return hidden.new_empty((hidden.shape[0], (kept + 7) // 8 if output == "binary" else kept), dtype=dtype)


@torch.library.custom_op("rtx::add_norm_quantize", mutates_args=())
def add_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str,
    epsilon: float,
    give_sum: bool = False,
    give_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """norm(x + residual) in 8 bits: codes, scale, sum and y; of the last two, one that is not asked for is [0]."""
    if kernel := _kernel("add_norm_quantize", x):
        given = kernel(x, residual, weight, bias, norm=norm, epsilon=epsilon, give_sum=give_sum, give_y=give_y)
        return given.codes, given.scale, *(x.new_empty(0) if side is None else side for side in (given.sum, given.y))
    arrays = [None if side is None else _array(side) for side in (residual, bias)]
    found = _add_norm_quantize.add_norm_quantize(
        _array(x), arrays[0], _array(weight), arrays[1], norm=norm, epsilon=epsilon
    )
    total, y = (
        _like(x, side).to(x.dtype) if wanted else x.new_empty(0)
        for side, wanted in ((found.sum, give_sum), (found.y, give_y))
    )
    return _like(x, found.codes), _like(x, found.scale), total, y


@add_norm_quantize.register_fake
def _(
    x: Tensor, *_: Any, give_sum: bool = False, give_y: bool = False, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total, y = (x.new_empty(x.shape if wanted else (0,)) for wanted in (give_sum, give_y))
    return codes, scale, total, y


@torch.library.custom_op("rtx::int8_linear", mutates_args=())
def int8_linear(
    xq: Tensor,
    scale_x: Tensor,
    wq: Tensor,
    scale_w: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """A linear layer of rows that are in 8 bits, with bias and activation: [..., out] of `dtype`."""
    if kernel := _kernel("int8_linear", xq):
        return _tensor(kernel(xq, scale_x, wq, scale_w, bias, activation=activation, dtype=dtype))
    codes, scale, weight, steps = (_array(side) for side in (xq, scale_x, wq, scale_w))
    found = _int8_linear.multiply_rows(codes, scale, weight, steps, None if bias is None else _array(bias))
    y = _like(xq, found)
    if activation == "silu":
        y = F.silu(y)
    elif activation in ("gelu", "gelu_tanh"):
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    elif activation != "none":
        raise ValueError(f"activation: expected none, gelu, gelu_tanh or silu, got '{activation}'")
    return y.to(dtype)


@int8_linear.register_fake
def _(xq: Tensor, scale_x: Tensor, wq: Tensor, *_: Any, dtype: torch.dtype = torch.float16, **__: Any) -> Tensor:
    return xq.new_empty((*scale_x.shape, wq.shape[0]), dtype=dtype)


@torch.library.custom_op("rtx::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: int = -1,
    longest: int | None = None,
) -> Tensor:
    """Attention within each of several sequences that lie one behind the other: as query."""
    if kernel := _kernel("packed_attention", query):
        return _tensor(kernel(query, key, value, offsets, scale=scale, causal=causal, window=window, longest=longest))
    arrays = [_array(side) for side in (query, key, value, offsets)]
    return _like(query, _packed_attention.packed_attention(*arrays, scale=scale, causal=causal, window=window)).to(
        query.dtype
    )


@packed_attention.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("rtx::maxsim", mutates_args=())
def maxsim(query: Tensor, documents: Tensor, offsets: Tensor) -> Tensor:
    """Score of each document: the sum, over the query's tokens, of the largest product with one of its tokens."""
    if kernel := _kernel("maxsim", query):
        return _tensor(kernel(query, documents, offsets))
    return _like(query, _maxsim.maxsim(_array(query), _array(documents), _array(offsets))).float()


@maxsim.register_fake
def _(query: Tensor, _: Tensor, offsets: Tensor) -> Tensor:
    return query.new_empty(offsets.shape[0] - 1, dtype=torch.float32)


@torch.library.custom_op("rtx::info_nce", mutates_args=())
def info_nce(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    *,
    scale: float,
    false_negative_margin: float | None = None,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each query's loss, and its product with its positive: [queries] float32 each. Of the second is no gradient.

    Raises:
        ValueError: vectors are not float32.
    """
    if queries.dtype != torch.float32 or documents.dtype != torch.float32:
        raise ValueError(f"info_nce: expected vectors of float32, got {queries.dtype} and {documents.dtype}")
    if kernel := _kernel("info_nce", queries):
        options = {"scale": scale, "false_negative_margin": false_negative_margin, "allow_tf32": allow_tf32}
        losses, of_positives = kernel(queries, documents, positives, **options)
        return losses, of_positives
    arrays = [_array(side) for side in (queries, documents, positives)]
    found = _info_nce.info_nce(*arrays, scale=scale, false_negative_margin=false_negative_margin)
    known = (positives >= 0) & (positives < len(documents))
    of_positives = (queries * documents[torch.where(known, positives, 0)]).sum(dim=1)
    return _like(queries, found.losses).float(), torch.where(known, of_positives, torch.nan)


@torch.library.custom_op("rtx::info_nce_backward", mutates_args=())
def _info_nce_backward(
    queries: Tensor,
    documents: Tensor,
    positives: Tensor,
    losses: Tensor,
    of_positives: Tensor,
    upstream: Tensor,
    scale: float,
    false_negative_margin: float | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    sides = (queries, documents, positives, losses, of_positives, upstream)
    if kernel := _kernel("info_nce", queries, "info_nce_backward"):
        options = {"scale": scale, "false_negative_margin": false_negative_margin, "allow_tf32": allow_tf32}
        of_queries, of_documents = kernel(*sides, **options)
        return of_queries, of_documents
    arrays = [_array(side) for side in sides[:3]]
    margin = false_negative_margin
    found = _info_nce.info_nce(*arrays, scale=scale, false_negative_margin=margin, upstream=_array(upstream))
    return _like(queries, found.of_queries).float(), _like(queries, found.of_documents).float()


@info_nce.register_fake
def _(queries: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape[0]), queries.new_empty(queries.shape[0])


@_info_nce_backward.register_fake
def _(queries: Tensor, documents: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), documents.new_empty(documents.shape)


def _keep(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)
    ctx.options = [keyword_only_inputs[name] for name in ("scale", "false_negative_margin", "allow_tf32")]


def _gradients(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_info_nce_backward(*ctx.saved_tensors, upstream, *ctx.options), None


def _no_second_gradients(*_: Any) -> None:
    raise RuntimeError("info_nce: its gradients have no gradients; expected one backward, without create_graph")


info_nce.register_autograd(_gradients, setup_context=_keep)
_info_nce_backward.register_autograd(_no_second_gradients)


def _array(tensor: Tensor) -> NDArray[Any]:
    """The numbers of a tensor, on the CPU; NumPy has no bfloat16."""
    held = tensor.detach().cpu()
    return (held.float() if held.dtype == torch.bfloat16 else held).numpy()


def _like(tensor: Tensor, array: NDArray[Any]) -> Tensor:
    """An array where a tensor is."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(tensor.device)


def _tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found
