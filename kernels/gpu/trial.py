"""Each op's kernel run once on a GPU, on small input, and held to its reference within what its contract allows.

Where a kernel rounds its results to a type, or to codes, half a step of these is allowed beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rtx.kernels import add_norm_quantize, info_nce, int8_linear, maxsim, packed_attention, pool, quantize
from rtx.kernels.gpu import add_norm_quantize as gpu_add_norm_quantize
from rtx.kernels.gpu import info_nce as gpu_info_nce
from rtx.kernels.gpu import int8_linear as gpu_int8_linear
from rtx.kernels.gpu import maxsim as gpu_maxsim
from rtx.kernels.gpu import packed_attention as gpu_packed_attention
from rtx.kernels.gpu import pool as gpu_pool
from rtx.kernels.rounding import ROUNDING

Array = NDArray[np.floating[Any]]


class Held(NamedTuple):
    """A result and what it is held to.

    Attributes:
        name: of the result.
        found: what the kernel gave.
        expected: what the reference gave, of the same shape.
        allowed: how far apart they may be; broadcasts.
    """

    name: str
    found: Tensor
    expected: Array
    allowed: Array | float


def try_kernel(op: str, device: torch.device) -> str | None:
    """What is wrong with an op's kernel on a GPU; None for nothing.

    Raises:
        Exception: of any kind, where it cannot be compiled or started.
    """
    for name, found, expected, allowed in _TRIALS[op](device):
        far = np.abs(found.detach().cpu().double().numpy() - expected)
        # NaN is not within anything.
        if not (far <= allowed).all():
            most = np.broadcast_to(allowed, far.shape)
            worst = np.unravel_index(np.argmax(np.where(np.isnan(far), np.inf, far - most)), far.shape)
            return f"{name}: {far[worst]:.3g} from the reference, of {most[worst]:.3g} that its contract allows"
    return None


def _pool(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((3, 19, 100)).astype(np.float16)
    mask = (np.arange(19) < np.array([[19], [7], [0]])).astype(np.int64)
    states, held = _moved(device, hidden, mask)
    for mode in pool.MODES:
        expected, allowed = (of(hidden, mask, [mode]) for of in (pool.pool, pool.bound))
        yield Held(mode, gpu_pool.pool(states, held, mode), expected, allowed)
        if mode == "mean":
            found = gpu_pool.pool(states.bfloat16(), held, mode)
            # The states themselves are rounded.
            off = ROUNDING["bfloat16"].of(pool.pool(np.abs(hidden), mask, [mode]))
            yield Held("mean of bfloat16", found, expected, allowed + off)
    cut, moved = (of(hidden[..., :64], mask, ["mean"]) for of in (pool.pool, pool.bound))
    expected, allowed = pool.l2_normalize(cut), pool.normalized_bound(cut, moved)
    options: dict[str, Any] = {"dimension": 64, "normalize": True}
    yield Held("normalised", gpu_pool.pool(states, held, "mean", **options), expected, allowed)
    halves = gpu_pool.pool(states, held, "mean", **options, output="float16")
    yield Held("float16", halves, expected, allowed + ROUNDING["float16"].of(np.abs(expected) + allowed))
    codes = gpu_pool.pool(states, held, "mean", **options, output="int8")
    limit = np.float32(quantize.INT8_LIMIT)
    yield Held("int8", codes, expected * limit, 0.5 + limit * allowed)
    bits = gpu_pool.pool(states, held, "mean", **options, output="binary")
    signs = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=1))
    # Whatever is that near to 0 may have either sign.
    near = (np.abs(expected) <= allowed).astype(np.float32) * (expected != 0)
    yield Held("binary", signs, (expected > 0).astype(np.float32), near)


def _add_norm_quantize(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    for kind, width in ((np.float16, 384), (np.float32, 1000)):
        x, residual = (_typed(random.standard_normal((5, width)), kind) for _ in range(2))
        weight, bias = (random.standard_normal(width).astype(np.float32) for _ in range(2))
        for norm in add_norm_quantize.NORMS:
            options: dict[str, Any] = {"norm": norm, "epsilon": 1e-5}
            sides: list[Array] = [x, residual, weight]
            given = bias if norm == "layer_norm" else None
            found = gpu_add_norm_quantize.add_norm_quantize(
                *_moved(device, *sides),
                *_moved(device, *([] if given is None else [given])),
                **options,
                give_sum=True,
                give_y=True,
            )
            assert found.sum is not None
            assert found.y is not None
            expected = add_norm_quantize.add_norm_quantize(sides[0], sides[1], sides[2], given, **options)
            t = add_norm_quantize.bound(expected, weight, **options)
            name = f"{norm} of {np.dtype(kind).name}"
            # The reference's is rounded to float32, too.
            of_scale = t.max(axis=1) / int8_linear.LEVELS + 2 * ROUNDING["float32"].of(expected.scale)
            yield Held(f"{name}: scale", found.scale, expected.scale, of_scale)
            scale = found.scale[:, None]
            steps = (1 / 2 + 2.0**-16) * scale.cpu().double().numpy()  # by the contract
            yield Held(f"{name}: codes", found.codes.double() * scale.double(), expected.y, steps + t)
            rounding = ROUNDING[np.dtype(kind).name]
            yield Held(f"{name}: y", found.y, expected.y, t + rounding.of(np.abs(expected.y) + t))
            added = ROUNDING["float32"].of(expected.sum)
            yield Held(f"{name}: sum", found.sum, expected.sum, added + rounding.of(np.abs(expected.sum) + added))


def _int8_linear(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    wq = random.integers(-127, 128, (130, 1024), dtype=np.int8)
    bias = random.standard_normal(130).astype(np.float32)
    for tokens in (3, 70):  # the small tile, the large one
        xq = random.integers(-127, 128, (tokens, 1024), dtype=np.int8)
        ones = [np.ones(count, dtype=np.float32) for count in (tokens, 130)]
        found = gpu_int8_linear.int8_linear(*_moved(device, xq, ones[0], wq, ones[1]), dtype=torch.float32)
        # 1,024 * 127**2 < 2**24: each sum is a number of float32.
        yield Held(f"{tokens} tokens", found, int8_linear.multiply_rows(xq, ones[0], wq, ones[1]), 0.0)
        small = [np.full(count, 2.0**-9, dtype=np.float32) for count in (tokens, 130)]
        expected = int8_linear.multiply_rows(xq, small[0], wq, small[1], bias)
        for activation, apply in _ACTIVATIONS.items():
            found = gpu_int8_linear.int8_linear(
                *_moved(device, xq, small[0], wq, small[1], bias), activation=activation
            )
            right = apply(torch.from_numpy(expected)).numpy()
            allowed = int8_linear.rows_bound(expected, bias, activated=activation != "none")
            rounded = ROUNDING["float16"].of(np.abs(right) + allowed)
            yield Held(f"{tokens} tokens, {activation}", found, right, allowed + rounded)


def _packed_attention(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    offsets = np.array([0, 5, 175], dtype=np.int64)
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        name = str(kind).removeprefix("torch.")
        rounding = ROUNDING[name].relative
        sides = [torch.from_numpy(random.standard_normal((175, heads, 64))).to(kind) for heads in (4, 2, 2)]
        query, key, value = (side.double().numpy() for side in sides)
        allowed = packed_attention.bound(query, key, value, scale=0.125, longest=170, rounding=rounding)
        for causal, window in ((False, -1), (True, -1), (False, 70)):
            options: dict[str, Any] = {"scale": 0.125, "causal": causal, "window": window}
            moved = [side.to(device) for side in (*sides, torch.from_numpy(offsets))]
            found = gpu_packed_attention.packed_attention(*moved, **options)
            expected = packed_attention.packed_attention(query, key, value, offsets, **options)
            how = ("causal" if causal else "both ways") + (f" within {window}" if window >= 0 else "")
            yield Held(f"{how} in {name}", found, expected, allowed)


def _maxsim(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    offsets = np.array([0, 65, 65, 66, 200], dtype=np.int64)
    for kind in (np.float16, np.float32):
        sides: list[Array] = [_unit(random.standard_normal((count, 96))).astype(kind) for count in (33, 200)]
        found = gpu_maxsim.maxsim(*_moved(device, *sides, offsets))
        allowed = maxsim.bound(sides[0], sides[1], offsets)
        yield Held(np.dtype(kind).name, found, maxsim.maxsim(sides[0], sides[1], offsets), allowed)


def _info_nce(device: torch.device) -> Iterator[Held]:
    """Of one case more than a run of documents, and columns of a gradient in more than one part."""
    for queries, documents, dim, margin in ((70, 40, 33, None), (20, 1056, 160, 0.1)):
        random = np.random.default_rng(0)
        sides = [_unit(random.standard_normal((count, dim))) for count in (queries, documents)]
        positives = random.integers(documents, size=queries)
        upstream = random.uniform(0.5, 1.5, queries).astype(np.float32)
        options: dict[str, Any] = {"scale": 20.0, "false_negative_margin": margin}
        moved = _moved(device, *sides, positives)
        losses, of_positives = gpu_info_nce.info_nce(*moved, **options)
        given = [*moved, losses, of_positives, *_moved(device, upstream)]
        gradients = gpu_info_nce.info_nce_backward(*given, **options)
        expected, allowed = (
            of(sides[0], sides[1], positives, **options, upstream=upstream)
            for of in (info_nce.info_nce, info_nce.bounds)
        )
        for name, found, right, most in zip(expected._fields, (losses, *gradients), expected, allowed, strict=True):
            yield Held(f"{name} of {queries} x {documents}", found, right, most)


def _moved(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def _typed(array: Array, kind: type[np.floating[Any]]) -> Array:
    found: Array = array.astype(kind)
    return found


def _unit(vectors: Array) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
_TRIALS: Mapping[str, Callable[[torch.device], Iterator[Held]]] = {
    "add_norm_quantize": _add_norm_quantize,
    "info_nce": _info_nce,
    "int8_linear": _int8_linear,
    "maxsim": _maxsim,
    "packed_attention": _packed_attention,
    "pool": _pool,
}
