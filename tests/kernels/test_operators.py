"""The ops as operators of PyTorch: by the reference here, in Triton's interpreter where the CPU stands in for a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from rtx.kernels import info_nce as info_nce_contract
from rtx.kernels import operators
from rtx.kernels import pool as pool_contract
from rtx.kernels.quantize import quantize_binary, quantize_int8
from rtx.trainer.losses import embed
from rtx.trainer.losses.targets import Targets

CPU = torch.device("cpu")


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU: kernels are tried on it, and used."""
    pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86-64")
    monkeypatch.setattr(operators, "_is_gpu", lambda device: device.type == "cpu")


@pytest.fixture
def untried() -> Iterator[None]:
    """No kernel was tried yet, and what this test finds is forgotten."""
    operators._is_sound.cache_clear()
    yield
    operators._is_sound.cache_clear()


def _random(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kind)


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)


def _unit(*shape: int) -> torch.Tensor:
    return F.normalize(_random(*shape), dim=1)


MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
CALLS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "add_norm_quantize": [
        (
            (_random(3, 16), _random(3, 16), _random(16), _random(16)),
            {"norm": "layer_norm", "epsilon": 1e-5, "give_y": True},
        ),
        (
            (_random(3, 16, kind=torch.bfloat16), None, _random(16)),
            {"norm": "rms_norm", "epsilon": 1e-5, "give_sum": True},
        ),
    ],
    "info_nce": [
        ((_unit(3, 8), _unit(5, 8), torch.tensor([4, 0, 1])), {"scale": 20.0}),
        ((_unit(3, 8), _unit(5, 8), torch.tensor([4, 0, 1])), {"scale": 20.0, "false_negative_margin": 0.1}),
    ],
    "int8_linear": [
        ((_codes(3, 16), torch.full((3,), 0.01), _codes(5, 16), torch.full((5,), 0.01)), {}),
        (
            (_codes(3, 16), torch.full((3,), 0.01), _codes(5, 16), torch.full((5,), 0.01), _random(5)),
            {"activation": "gelu", "dtype": torch.float32},
        ),
    ],
    "maxsim": [((_random(3, 8), _random(5, 8), torch.tensor([0, 2, 2, 5])), {})],
    "packed_attention": [
        ((_random(6, 2, 8), _random(6, 1, 8), _random(6, 1, 8), torch.tensor([0, 4, 6])), {"scale": 0.3}),
        (
            (*(_random(6, 2, 8, kind=torch.float16) for _ in range(3)), torch.tensor([0, 4, 6])),
            {"scale": 0.3, "causal": True, "window": 2, "longest": 4},
        ),
    ],
    "pool": [
        ((_random(2, 4, 9), MASK, "mean"), {"normalize": True}),
        ((_random(2, 4, 9, kind=torch.bfloat16), MASK, "weightedmean", MASK), {"dimension": 5, "output": "float16"}),
        ((_random(2, 4, 9), MASK, "cls"), {"normalize": True, "output": "int8"}),
        ((_random(2, 4, 9), MASK, "max"), {"output": "binary"}),
    ],
}
EACH = [(op, *call) for op, calls in CALLS.items() for call in calls]


def _operator(op: str) -> Callable[..., Any]:
    return getattr(operators, op)  # type: ignore[no-any-return]


def _list(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize(("op", "arguments", "options"), EACH)
def test_compilers_of_torch_know_shapes_and_types(op: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert set(CALLS) == set(operators.OPS)
    torch.library.opcheck(_operator(op), arguments, options)


@pytest.mark.parametrize(("op", "arguments", "options"), EACH)
@pytest.mark.usefixtures("as_gpu")
def test_a_gpu_gives_what_the_reference_gives(
    op: str, arguments: tuple[Any, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_kernel = _list(_operator(op)(*arguments, **options))
    assert operators.in_triton(op, CPU)
    monkeypatch.setattr(operators, "_is_gpu", lambda _: False)
    by_reference = _list(_operator(op)(*arguments, **options))
    assert not operators.in_triton(op, CPU)
    for found, expected in zip(by_kernel, by_reference, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        # A step of the coarsest type: codes and half precision may be rounded the other way.
        whole = found.dtype in (torch.int8, torch.uint8)
        near = {"rtol": 2.0**-7, "atol": 2.0**-12} if found.dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(found, expected, **({"rtol": 0, "atol": 1} if whole else near))


def test_pooled_codes_are_those_of_the_reference() -> None:
    hidden, mask = _random(2, 4, 9), MASK
    vectors = pool_contract.truncate(pool_contract.pool(hidden.numpy(), mask.numpy(), ["mean"]), 5, normalize=True)
    for output, expected in {
        "float32": vectors,
        "float16": vectors.astype(np.float16),
        "int8": quantize_int8(vectors),
        "binary": quantize_binary(vectors),
    }.items():
        found = operators.pool(hidden, mask, "mean", dimension=5, normalize=True, output=output)
        np.testing.assert_array_equal(found.numpy(), expected)
    with pytest.raises(ValueError, match="output: expected float32, float16, int8 or binary, got 'int4'"):
        operators.pool(hidden, mask, "mean", output="int4")
    with pytest.raises(ValueError, match="activation: expected none, gelu, gelu_tanh or silu, got 'relu'"):
        operators.int8_linear(*CALLS["int8_linear"][0][0], activation="relu")


@pytest.mark.parametrize("op", operators.OPS)
@pytest.mark.usefixtures("as_gpu", "untried")
def test_a_kernel_that_is_off_is_not_used(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"rtx.kernels.gpu.{op}")
    right = getattr(module, op)

    def off(*arguments: Any, **options: Any) -> Any:
        found = right(*arguments, **options)
        for tensor in found if isinstance(found, tuple) else [found]:
            if tensor is not None and tensor.is_floating_point():
                tensor.reshape(-1)[-1:] += 0.05
        return found

    arguments, options = CALLS[op][0]
    with monkeypatch.context() as reference:
        reference.setattr(operators, "_is_gpu", lambda _: False)
        expected = _list(_operator(op)(*arguments, **options))
    monkeypatch.setattr(module, op, off)
    told = rf"{op}: the Triton kernel is not used on cpu: .*: \S+ from the reference, of \S+ that its contract allows"
    with pytest.warns(RuntimeWarning, match=told) as warned:
        found = [_list(_operator(op)(*arguments, **options)) for _ in range(2)][1]
    assert len([message for message in warned if "not used" in str(message.message)]) == 1
    assert not operators.in_triton(op, CPU)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("as_gpu", "untried")
def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("PassManager::run failed\nand a page of code")

    monkeypatch.setattr("rtx.kernels.gpu.maxsim.maxsim", broken)
    with pytest.warns(RuntimeWarning, match=r"not used on cpu: RuntimeError: PassManager::run failed$"):
        found = operators.maxsim(*CALLS["maxsim"][0][0])
    assert found.shape == (3,)
    # The others are.
    assert operators.in_triton("pool", CPU)


@pytest.mark.usefixtures("untried")
def test_a_kernel_that_breaks_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, errors = torch.device("cuda:0"), []

    def astray(op: str, _: torch.device) -> str | None:
        raise RuntimeError(f"CUDA error: an illegal memory access was encountered in {op}\nand advice")

    def synchronize(device: torch.device) -> None:
        assert device == gpu
        for error in errors:
            raise error

    monkeypatch.setattr(operators, "_is_gpu", lambda _: True)
    monkeypatch.setattr("rtx.kernels.gpu.trial.try_kernel", astray)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.warns(RuntimeWarning, match="pool: the Triton kernel is not used on cuda:0: RuntimeError: CUDA error"):
        assert not operators.in_triton("pool", gpu)
    errors.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    message = (
        "maxsim: trying the Triton kernel broke CUDA: RuntimeError: CUDA error: an illegal memory access .* maxsim;"
    )
    with pytest.raises(RuntimeError, match=message):
        operators.in_triton("maxsim", gpu)


@pytest.mark.usefixtures("as_gpu", "untried")
def test_memory_that_is_short_for_once_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as short:
        short.setattr("rtx.kernels.gpu.maxsim.maxsim", full)
        with pytest.raises(torch.OutOfMemoryError):
            operators.in_triton("maxsim", CPU)
    assert operators.in_triton("maxsim", CPU)


@pytest.mark.usefixtures("as_gpu", "untried")
def test_a_question_within_what_is_traced_is_answered_once_and_right() -> None:
    def scores(query: torch.Tensor, documents: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = operators.maxsim(query, documents, offsets)
        return found if operators.in_triton("maxsim", query.device) else -found

    arguments = CALLS["maxsim"][0][0]
    found = torch.compile(scores, backend="aot_eager", fullgraph=True)(*arguments)
    assert torch.equal(found, operators.maxsim(*arguments))
    operators._is_sound.cache_clear()
    with FakeTensorMode():
        assert operators.in_triton("maxsim", CPU)


@pytest.mark.usefixtures("as_gpu", "untried")
def test_a_graph_that_is_captured_has_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="maxsim: expected to be used once before a CUDA graph is captured"):
        operators.in_triton("maxsim", CPU)


def _faults(op: str) -> list[tuple[str, Callable[..., Any]]]:
    """Kernels that are wrong in one of their options or in one of their results alone."""

    def where(result: int | None = None, **wanted: Any) -> Callable[..., Any]:
        def wrong(right: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            found = right(*arguments, **options)
            if not wanted.items() <= options.items():
                return found
            if result is None:
                return torch.zeros_like(found)
            changed = [torch.zeros_like(one) if at == result else one for at, one in enumerate(found)]
            return type(found)(*changed) if hasattr(found, "_fields") else tuple(changed)

        return wrong

    def without_margin(right: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return right(*arguments, **{**options, "false_negative_margin": None})

    def one_document(right: Callable[..., Any], query: Any, documents: Any, offsets: Any) -> Any:
        found = right(query, documents, offsets)
        found[-1] = right(query, documents[:-1], torch.clamp(offsets, max=len(documents) - 1))[-1]
        return found

    faults: dict[str, list[Callable[..., Any]]] = {
        "pool": [where(normalize=True), *(where(output=output) for output in ("float16", "int8", "binary"))],
        "int8_linear": [where(activation="gelu"), where(activation="silu"), where(dtype=torch.float32)],
        "packed_attention": [where(causal=True), where(window=70)],
        "add_norm_quantize": [where(result, norm=norm) for result in range(4) for norm in ("layer_norm", "rms_norm")],
        "info_nce": [without_margin, where(0)],
        "maxsim": [one_document],
    }
    return [(f"{op} {number}", fault) for number, fault in enumerate(faults[op])]


@pytest.mark.usefixtures("as_gpu", "untried")
@pytest.mark.parametrize("op", operators.OPS)
def test_a_fault_in_one_option_or_result_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = importlib.import_module("rtx.kernels.gpu.trial")
    module = importlib.import_module(f"rtx.kernels.gpu.{op}")
    right = getattr(module, op)
    for name, fault in _faults(op):
        monkeypatch.setattr(module, op, functools.partial(fault, right))
        assert trial.try_kernel(op, CPU) is not None, name


@pytest.mark.usefixtures("as_gpu")
@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_that_is_off_is_seen(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("rtx.kernels.gpu.info_nce")
    trial = importlib.import_module("rtx.kernels.gpu.trial")
    right = module.info_nce_backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = list(right(*arguments, **options))
        found[place] = found[place] * 1.001
        return tuple(found)

    monkeypatch.setattr(module, "info_nce_backward", wrong)
    problem = trial.try_kernel("info_nce", CPU)
    assert problem is not None
    assert problem.startswith(("of_queries", "of_documents")[place])


def test_without_triton_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_is_gpu", lambda _: True)
    monkeypatch.setattr(operators.importlib.util, "find_spec", lambda _: None)
    assert not operators.in_triton("maxsim", CPU)


def _loss(queries: torch.Tensor, documents: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    losses, _ = operators.info_nce(F.normalize(queries, dim=1), F.normalize(documents, dim=1), positives, scale=20.0)
    return losses.mean()


@pytest.mark.parametrize("where", ["reference", "triton"])
def test_a_compiled_loss_has_the_same_gradients(where: str, request: pytest.FixtureRequest) -> None:
    if where == "triton":
        request.getfixturevalue("as_gpu")
    positives = torch.tensor([3, 0, 6])
    found = []
    for loss in (_loss, torch.compile(_loss, backend="aot_eager", fullgraph=True)):
        sides = [_random(count, 8).requires_grad_() for count in (3, 7)]
        value = loss(*sides, positives)
        found.append([value.detach(), *torch.autograd.grad(value, sides)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-6, atol=1e-7)
    wide = [F.normalize(side.detach(), dim=1).numpy() for side in sides]
    right = info_nce_contract.info_nce(wide[0], wide[1], positives.numpy(), scale=20.0)
    assert found[0][0].item() == pytest.approx(right.losses.mean(), rel=1e-5)


def test_shapes_and_strides_of_views_are_known() -> None:
    columns = _random(16, 3).T
    torch.library.opcheck(
        operators.add_norm_quantize, (columns, None, _random(16)), {"norm": "rms_norm", "epsilon": 1e-5, "give_y": True}
    )
    sides = [_random(1, 6, 8).transpose(0, 1) for _ in range(3)]
    torch.library.opcheck(operators.packed_attention, (*sides, torch.tensor([0, 4, 6])), {"scale": 0.3})
    compiled = torch.compile(_loss, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for count in (3, 5, 8, 11):
        compiled(_random(count, 8), _random(7, 8), torch.zeros(count, dtype=torch.int64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_info_nce_takes_and_what_has_no_gradient() -> None:
    queries, documents, positives = CALLS["info_nce"][0][0]
    with pytest.raises(ValueError, match=r"expected vectors of float32, got torch\.float64 and torch\.float32"):
        operators.info_nce(queries.double(), documents, positives, scale=2.0)
    losses, of_positives = operators.info_nce(queries.clone().requires_grad_(), documents, positives, scale=2.0)
    assert losses.requires_grad
    assert not of_positives.requires_grad
    for index in (-1, 5):
        losses, _ = operators.info_nce(queries, documents, torch.tensor([0, index, 1]), scale=2.0)
        assert losses.isnan().tolist() == [False, True, False]


def test_a_row_beyond_float32_has_no_scale() -> None:
    x = torch.ones(2, 4)
    x[1, 0] = 1e30
    _, scale, _, _ = operators.add_norm_quantize(x, None, torch.ones(4), norm="rms_norm", epsilon=1e-5)
    assert scale.isnan().tolist() == [False, True]


def test_there_is_no_second_gradient() -> None:
    queries, documents, positives = CALLS["info_nce"][0][0]
    queries = queries.clone().requires_grad_()
    losses, _ = operators.info_nce(queries, documents, positives, scale=2.0)
    (gradient,) = torch.autograd.grad(losses.sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="info_nce: its gradients have no gradients"):
        torch.autograd.grad(gradient.sum(), queries)


@pytest.mark.parametrize("labels", [[(1,)] * 5, [(1, 0, 0), (1,), (1, 0)]], ids=["one", "several"])
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.usefixtures("as_gpu")
def test_a_large_batch_has_the_trainers_loss_without_its_matrix(
    labels: Any, margin: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = Targets.of(labels)
    wide = [
        torch.randn(count, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for seed, count in enumerate((len(labels), len(targets.owner)))
    ]
    options: dict[str, Any] = {"scale": 20.0, "false_negative_margin": margin}
    right = embed.info_nce(wide[0], wide[1], targets, **options)
    narrow = [side.detach().float().requires_grad_() for side in wide]
    monkeypatch.setattr(embed, "_LARGE", len(labels) * len(targets.owner))
    monkeypatch.setattr(embed, "_cosines", None)
    found = embed.info_nce(narrow[0], narrow[1], targets, **options)
    # A norm in float32 moves a vector by (dim / 2 + 2) * 2**-24, and so a product as dim more terms of it would: three
    # times as much for all. The gradient goes back through the norm once more and is multiplied by 1 / norm.
    units = [F.normalize(side.detach(), dim=1).numpy() for side in wide]
    allowed = info_nce_contract.bounds(units[0], units[1], targets.first.numpy(), **options)
    assert abs(found.item() - right.item()) <= 3 * allowed.losses.max()
    gradients = torch.autograd.grad(found, narrow), torch.autograd.grad(right, wide)
    for side, one, other, most in zip(wide, *gradients, allowed[1:], strict=True):
        bound = 3 * most.max() / side.detach().norm(dim=1).min()
        assert (one - other).abs().max() <= bound
        assert other.abs().max() > 100 * bound


@pytest.mark.usefixtures("as_gpu")
def test_an_estimate_knows_that_a_large_batch_has_no_matrix() -> None:
    targets = Targets.of([(1,)] * 8)
    sides = [_random(8, 9).requires_grad_() for _ in range(2)]
    plain = embed.info_nce(sides[0], sides[1], targets)
    with embed.as_part_of(1 << 26):
        part = embed.info_nce(sides[0], sides[1], targets)
    assert [name for name in _names(plain) if "NllLoss" in name]
    assert not [name for name in _names(part) if "NllLoss" in name]
    torch.testing.assert_close(part, plain, rtol=1e-5, atol=1e-6)


def _names(loss: torch.Tensor) -> list[str]:
    nodes, names = [loss.grad_fn], []
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.append(node.name())
            nodes += [one for one, _ in node.next_functions]
    return names


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"_LARGE": 16}, {}),
        ({"MAX_DIM": 8}, {}),
        ({}, {"directions": ("query_to_doc", "doc_to_query")}),
        ({}, {"dtype": torch.float64}),
    ],
    ids=["small", "wide", "directions", "float64"],
)
@pytest.mark.usefixtures("as_gpu")
def test_what_the_operator_is_not_for_has_the_matrix(
    change: dict[str, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_LARGE": 1, **change}.items():
        monkeypatch.setattr(embed, name, value)
    monkeypatch.setattr(operators, "info_nce", None)
    kind = options.pop("dtype", torch.float32)
    embed.info_nce(_random(3, 9).to(kind), _random(5, 9).to(kind), Targets.of([(1, 0, 0), (1,), (1,)]), **options)
