"""Each op's kernel run once on a GPU, on small input, and held to its reference within what its contract allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtx.kernels import add_norm_quantize, info_nce, int8_linear, maxsim, packed_attention, pool
from rtx.kernels.gpu import add_norm_quantize as gpu_add_norm_quantize
from rtx.kernels.gpu import info_nce as gpu_info_nce
from rtx.kernels.gpu import int8_linear as gpu_int8_linear
from rtx.kernels.gpu import maxsim as gpu_maxsim
from rtx.kernels.gpu import packed_attention as gpu_packed_attention
from rtx.kernels.gpu import pool as gpu_pool

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
    for mode in pool.MODES:
        states, held = _moved(device, hidden, mask)
        found = gpu_pool.pool(states, held, mode)
        yield Held(mode, found, pool.pool(hidden, mask, [mode]), pool.bound(hidden, mask, [mode]))


def _add_norm_quantize(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    x, residual = (random.standard_normal((5, 384)).astype(np.float16) for _ in range(2))
    weight = random.standard_normal(384).astype(np.float32)
    for norm in add_norm_quantize.NORMS:
        options: dict[str, Any] = {"norm": norm, "epsilon": 1e-5}
        found = gpu_add_norm_quantize.add_norm_quantize(*_moved(device, x, residual, weight), **options)
        expected = add_norm_quantize.add_norm_quantize(x, residual, weight, **options)
        allowed = add_norm_quantize.bound(expected, weight, **options)
        scale = found.scale[:, None]
        of_scale = allowed.max(axis=1) / int8_linear.LEVELS + 2.0**-24 * expected.scale
        yield Held(f"{norm}: scale", found.scale, expected.scale, of_scale)
        steps = (1 / 2 + 2.0**-16) * scale.cpu().double().numpy()
        yield Held(f"{norm}: codes", found.codes.double() * scale.double(), expected.y, steps + allowed)


def _int8_linear(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    wq = random.integers(-127, 128, (130, 160), dtype=np.int8)
    for tokens in (3, 70):  # the small tile, the large one
        xq = random.integers(-127, 128, (tokens, 160), dtype=np.int8)
        ones = [np.ones(count, dtype=np.float32) for count in (tokens, 130)]
        found = gpu_int8_linear.int8_linear(*_moved(device, xq, ones[0], wq, ones[1]), dtype=torch.float32)
        # 160 * 127**2 < 2**24: each sum is a number of float32.
        yield Held(f"{tokens} tokens", found, int8_linear.multiply_rows(xq, ones[0], wq, ones[1]), 0.0)


def _packed_attention(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    offsets = np.array([0, 5, 75], dtype=np.int64)
    query, key, value = (random.standard_normal((75, heads, 64)).astype(np.float16) for heads in (4, 2, 2))
    for causal in (False, True):
        options: dict[str, Any] = {"scale": 0.125, "causal": causal}
        found = gpu_packed_attention.packed_attention(*_moved(device, query, key, value, offsets), **options)
        expected = packed_attention.packed_attention(query, key, value, offsets, **options)
        allowed = packed_attention.bound(query, key, value, scale=0.125, longest=70, rounding=2.0**-11)
        yield Held("causal" if causal else "both ways", found, expected, allowed)


def _maxsim(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    offsets = np.array([0, 65, 65, 66, 130], dtype=np.int64)
    for kind in (np.float16, np.float32):
        sides: list[Array] = [_unit(random.standard_normal((count, 96))).astype(kind) for count in (33, 130)]
        found = gpu_maxsim.maxsim(*_moved(device, *sides, offsets))
        allowed = maxsim.bound(sides[0], sides[1], offsets)
        yield Held(np.dtype(kind).name, found, maxsim.maxsim(sides[0], sides[1], offsets), allowed)


def _info_nce(device: torch.device) -> Iterator[Held]:
    random = np.random.default_rng(0)
    queries, documents = (_unit(random.standard_normal((count, 64))) for count in (40, 70))
    positives = random.integers(70, size=40)
    upstream = random.uniform(0.5, 1.5, 40).astype(np.float32)
    for margin, tf32 in ((None, False), (0.1, False), (None, True)):
        options: dict[str, Any] = {"scale": 20.0, "false_negative_margin": margin}
        sides = _moved(device, queries, documents, positives)
        losses, of_positives = gpu_info_nce.info_nce(*sides, **options, allow_tf32=tf32)
        given = [*sides, losses, of_positives, *_moved(device, upstream)]
        gradients = gpu_info_nce.info_nce_backward(*given, **options, allow_tf32=tf32)
        expected = info_nce.info_nce(queries, documents, positives, **options, upstream=upstream)
        rounding = 2.0**-10 if tf32 else 0.0
        allowed = info_nce.bounds(expected.losses, 70, 64, scale=20.0, upstream=upstream, rounding=rounding)
        suffix = (" with a margin" if margin else "") + (" in TF32" if tf32 else "")
        for name, found, right, most in zip(expected._fields, (losses, *gradients), expected, allowed, strict=True):
            yield Held(f"{name}{suffix}", found, right, most)


def _moved(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def _unit(vectors: Array) -> NDArray[np.float32]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


_TRIALS: Mapping[str, Callable[[torch.device], Iterator[Held]]] = {
    "add_norm_quantize": _add_norm_quantize,
    "info_nce": _info_nce,
    "int8_linear": _int8_linear,
    "maxsim": _maxsim,
    "packed_attention": _packed_attention,
    "pool": _pool,
}
