"""The operators of kernels/cpu, each by itself on one thread, against what this machine could do: its roofline.

The least time of a call is the larger of two: its operations at the peak rate of the instruction set, and the bytes
that it must move at the bandwidth of where they lie. Peaks are measured in the same rounds: int8 by the kernel's own
tile on data in the first cache, bfloat16 as half of it (tiles are half as deep), float32 by independent multiplications
with additions, bandwidth by a loop that only reads. Operations are those of the products (of attention, both); what is
done around them, quantising, norms, GELU and softmax, counts as time lost. Where there is no product, additions and
multiplications are counted. Each operand counts once, wherever a kernel reads it again, and what is written as if it
was read.

"L2" weights are those of calls that repeat; "far" ones are read again only after so many others as do not fit into L2,
as in a model. The other operands are those of the last call, in the smallest cache that holds them all: where they are
little larger than L2 much of them stays in it, and more than 100 % is possible. Rows of an embedding table come one by
one, of which no loop that reads on and on tells the price. Times are without those of a call that does nothing, as
Python makes them.

    python benchmarks/bench_kernels.py
    python benchmarks/bench_kernels.py --isa avx2 --only attention
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from rtx.kernels.int8_linear import Int8Weight, int8_linear, pack_weight, quantize_rows
from rtx.kernels.library import ISAS, Isa, load_library
from rtx.kernels.maxsim import maxsim
from rtx.kernels.norm import layer_norm, rms_norm
from rtx.kernels.packed_attention import packed_attention
from rtx.kernels.packed_pool import packed_pool
from rtx.kernels.rotary_embedding import rotary_embedding
from rtx.runtime.machine import describe_machine
from rtx.runtime.rounds import fitting_count, run_rounds

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.isa import isa_option

ROUNDS = 9
# Of each measurement: long enough for the clock, short enough for many rounds.
SECONDS = 0.004
TOKENS = (10, 82, 1000)
# A tile of 32 rows and 16 columns so deep fits into the first cache of a machine with AMX, and smaller ones anywhere.
TILE_DEPTH = 768
TILES, MULTIPLY_ADDS = 50, 20_000
READ_BYTES = 4 << 20
LENGTHS = (10, 82, 256, 512)
LEAST_TILED = 64  # tokens: attention over fewer is in float32 everywhere
VOCABULARY = 30_522
LINE = 64
# Where the system does not tell.
L1_BYTES, L2_BYTES = 32 << 10, 1 << 20
EPSILON = 1e-5
# Distance from the reference, of its norm: a number at the edge of a step may fall on either side of it.
TOLERANCE = 1e-3
# As that, where weights and values are rounded to bfloat16.
ROUNDED_TOLERANCE = 5e-3
NORMS, ACTIVATIONS, POOLINGS = ("", "layer", "rms"), ("", "gelu", "gelu_tanh", "silu"), ("cls", "max", "mean")
INT8, BF16, FP32, L1, L2, FAR = "int8", "bf16", "fp32", "L1", "L2", "far"
NOTHING = "nothing"
WITH_WEIGHTS = ("int8_linear", "int8_embedding")

Floats = NDArray[np.float32]
Arguments = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that is measured.

    Attributes:
        kernel, shape, tokens: what it is.
        function: a plain function of the library.
        turn: its arguments, without end.
        operations: of a call, at the rate `peak`.
        near_bytes: that are where the last call left them.
        far_bytes: that come from beyond L2.
        check: raises AssertionError where the first call gave something else than the reference; None if another case
            has told.
        kept: what only addresses in the arguments refer to.
    """

    kernel: str
    shape: str
    tokens: int
    function: Callable[..., object]
    turn: Iterator[Arguments]
    operations: float = 0.0
    peak: str = FP32
    near_bytes: float = 0.0
    far_bytes: float = 0.0
    check: Callable[[], None] | None = None
    kept: object = None

    @property
    def name(self) -> str:
        where = f", {FAR}" if self.far_bytes else ""
        return f"{self.kernel}: {self.shape}, {self.tokens:,} tokens{where}" if self.shape else self.kernel


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer of a model, with what is done around it."""

    model: str
    inputs: int
    outputs: tuple[int, ...]
    activation: str = ""
    gated: bool = False
    norm: str = ""
    norm_at: str = "output"
    residual: bool = False

    @property
    def around(self) -> str:
        norm = {"": "", "layer": "LayerNorm", "rms": "RMSNorm"}[self.norm]
        activation = {"": "", "gelu": "GELU", "silu": "SiLU"}[self.activation]
        before = norm if self.norm_at == "input" else ""
        gate = "gate" if self.gated else ""
        after = norm if self.norm_at == "output" else ""
        return " ".join(filter(None, (before, activation, gate, "residual" if self.residual else "", after)))


def bert(model: str, width: int) -> tuple[Layer, ...]:
    after: dict[str, Any] = {"residual": True, "norm": "layer"}
    return (
        Layer(model, width, (width,) * 3),
        Layer(model, width, (width,), **after),
        Layer(model, width, (4 * width,), "gelu"),
        Layer(model, 4 * width, (width,), **after),
    )


LAYERS = (
    *bert("MiniLM", 384),
    *bert("bge-base", 768),
    Layer("Qwen3-0.6B", 1024, (2048, 1024, 1024), norm="rms", norm_at="input"),
    Layer("Qwen3-0.6B", 2048, (1024,), residual=True),
    Layer("Qwen3-0.6B", 1024, (3072, 3072), "silu", gated=True, norm="rms", norm_at="input"),
    Layer("Qwen3-0.6B", 3072, (1024,), residual=True),
)


@click.command()
@isa_option
@click.option("--only", default="", help="Kernels in whose names this is.")
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=1))
def main(isa: Isa, only: str, rounds: int) -> None:
    """Print the time of each kernel, and how much of the roofline that is."""
    operators = load_library()
    operators.rtx_weight.restype = ctypes.c_void_p
    operators.rtx_int8_tiles.restype = operators.rtx_multiply_add.restype = ctypes.c_int64
    caches = cache_bytes()
    ways = (linear_cases, attention_cases, row_cases, maxsim_cases)
    cases = [case for way in ways for case in way(operators, caches) if only in case.kernel]
    if not cases:
        raise click.UsageError(f"--only: no kernel has {only} in its name")
    for case in cases:
        if case.check is not None:
            run(case, 1)
            case.check()
    limits = limit_cases(operators, caches)
    counts = {case.name: fitting_count([case], run, SECONDS, least=1, most=100_000) for case in (*limits, *cases)}

    def timed(case: Case) -> Mapping[str, float]:
        run(case, 1)  # caches still hold what the case before has left
        begun = perf_counter()
        run(case, counts[case.name])
        return {"seconds": (perf_counter() - begun) / counts[case.name]}

    measured = run_rounds({case.name: case for case in (*limits, *cases)}, {"all": timed}, rounds)
    nothing = float(np.median(measured[NOTHING]["seconds"]))
    taken = {name: np.array(numbers["seconds"]) - nothing for name, numbers in measured.items()}
    rates = {
        case.name: (case.operations or case.near_bytes) / float(np.median(taken[case.name]))
        for case in limits
        if case.name != NOTHING
    }
    rates[BF16] = rates[INT8] / 2
    show(cases, taken, rates, caches)
    found = {"isa": isa, "rates": rates, "nothing_s": nothing, "cache_bytes": caches}
    rounds_s = {name: values.tolist() for name, values in taken.items()}
    print(json.dumps({**found, "rounds_s": rounds_s, "machine": dataclasses.asdict(describe_machine())}))


def run(case: Case, count: int) -> None:
    function = case.function
    for arguments in itertools.islice(case.turn, count):
        function(*arguments)


# -- what is measured ----------------------------------------------------------------------------------------------


def limit_cases(operators: ctypes.CDLL, caches: Mapping[str, int]) -> list[Case]:
    """What the others are compared with, by names that these know."""

    def case(name: str, function: Callable[..., object], *arguments: Any, **counts: Any) -> Case:
        return Case(name, "", 0, function, itertools.repeat(arguments), **counts)

    # Half of a cache: all of it is hardly ever one array's.
    sizes = {L1: caches[L1] // 2, L2: caches[L2] // 2, FAR: caches[FAR]}
    arrays = {level: aligned((size // 4,), np.float32) for level, size in sizes.items()}
    for array in arrays.values():
        array[:] = 1.0
    # With no sequence, and as many arguments as any kernel has.
    idle = (
        *[None] * 3,
        *pointers(np.zeros(1, np.int64)),
        *longs(0, 1, 1, 1),
        ctypes.c_float(1),
        0,
        *longs(-1),
        0,
        None,
    )
    tile, adds = longs(TILE_DEPTH, TILES), longs(MULTIPLY_ADDS)
    return [
        case(NOTHING, operators.rtx_packed_attention, *idle),
        case(INT8, operators.rtx_int8_tiles, *tile, operations=operators.rtx_int8_tiles(*tile)),
        case(FP32, operators.rtx_multiply_add, *adds, operations=operators.rtx_multiply_add(*adds)),
        *(
            case(
                level, operators.rtx_read, *pointers(array), *longs(array.size, times), near_bytes=times * array.nbytes
            )
            for level, array in arrays.items()
            for times in [max(1, READ_BYTES // array.nbytes)]
        ),
    ]


def linear_cases(operators: ctypes.CDLL, caches: Mapping[str, int]) -> Iterator[Case]:
    random = np.random.default_rng(0)
    for layer in LAYERS:
        plain = Layer(layer.model, layer.inputs, layer.outputs)
        weight = random_weight(random, layer)
        copies = copies_of(weight, layer, caches)
        packed = [packed_weight(operators, weight, layer.outputs, copy) for copy in copies]
        for kind, tokens in itertools.product([layer] if layer == plain else [plain, layer], TOKENS):
            # Many tokens read a weight so often that it matters little where it lay before.
            near = tokens < TOKENS[-1] and weight.values.nbytes <= 3 * caches[L2] // 4
            for used in [packed[:1], packed] if near else [packed]:
                yield linear_case(operators, kind, weight, used, tokens, copies)


def random_weight(random: np.random.Generator, layer: Layer) -> Int8Weight:
    columns = sum(layer.outputs)
    values = random.integers(1, 256, (layer.inputs, columns), dtype=np.uint8)
    scale = np.full(columns, 0.01 / math.sqrt(layer.inputs), dtype=np.float32)
    return Int8Weight(values, scale, (values - 128.0).sum(axis=0).astype(np.float32) * scale)


def copies_of(weight: Int8Weight, layer: Layer, caches: Mapping[str, int]) -> NDArray[np.int8]:
    """So many of it that together they lie beyond L2."""
    packed = pack_weight(weight, layer.outputs)
    copies = aligned((max(2, -(-caches[FAR] // packed.nbytes)), packed.size), np.int8)
    copies[:] = packed.reshape(-1)
    return copies


def packed_weight(
    operators: ctypes.CDLL, weight: Int8Weight, outputs: tuple[int, ...], values: NDArray[np.int8]
) -> ctypes.c_void_p:
    """A weight of the library, which lives as long as the process; values must live as long as it is used."""
    parts = np.array(outputs, dtype=np.int64)
    arrays = pointers(values, weight.scale, weight.column_sum, None)
    rows = longs(len(weight.values))
    return ctypes.c_void_p(operators.rtx_weight(*arrays, *rows, *pointers(parts), *longs(len(parts))))


def linear_case(
    operators: ctypes.CDLL, layer: Layer, weight: Int8Weight, packed: list[ctypes.c_void_p], tokens: int, copies: object
) -> Case:
    random = np.random.default_rng(1)
    x, residual = normal(random, tokens, layer.inputs), normal(random, tokens, layer.outputs[0])
    width = layer.inputs if layer.norm_at == "input" else layer.outputs[0]
    factor = normal(random, width) if layer.norm else None
    bias = normal(random, width) if layer.norm == "layer" else None
    y = [aligned((tokens, columns), np.float32) for columns in (layer.outputs[:1] if layer.gated else layer.outputs)]
    addresses = (ctypes.c_void_p * len(y))(*(one.ctypes.data for one in y))
    rest = (
        ACTIVATIONS.index(layer.activation),
        int(layer.gated),
        NORMS.index(layer.norm),
        int(layer.norm_at == "output"),
        ctypes.c_float(EPSILON),
        *pointers(factor, bias, residual if layer.residual else None),
        *longs(tokens),
        addresses,
    )

    def check() -> None:
        assert_near(np.concatenate(y, axis=1), linear_reference(layer, x, weight, residual, factor, bias))

    moved = x.nbytes + sum(one.nbytes for one in y) + (residual.nbytes if layer.residual else 0)
    far = weight.values.nbytes if len(packed) > 1 else 0
    return Case(
        "int8_linear",
        " ".join(filter(None, (layer.model, f"{layer.inputs} → {'+'.join(map(str, layer.outputs))}", layer.around))),
        tokens,
        operators.rtx_int8_linear,
        itertools.cycle([(*pointers(x), one, *rest) for one in packed]),
        operations=2.0 * tokens * weight.values.size,
        peak=INT8,
        near_bytes=moved + weight.values.nbytes - far,
        far_bytes=far,
        check=check if tokens == TOKENS[0] else None,
        kept=(y, copies),
    )


def linear_reference(
    layer: Layer, x: Floats, weight: Int8Weight, residual: Floats, factor: Floats | None, bias: Floats | None
) -> NDArray[Any]:
    def normalized(values: NDArray[Any]) -> NDArray[Any]:
        if factor is None:
            return values
        if layer.norm == "rms":
            return rms_norm(values, factor, epsilon=EPSILON)
        return layer_norm(values, factor, bias, epsilon=EPSILON)

    y: NDArray[Any] = int8_linear(normalized(x).astype(np.float32) if layer.norm_at == "input" else x, weight)
    gate, up = (y[:, : layer.outputs[0]], y[:, layer.outputs[0] :]) if layer.gated else (y, 1.0)
    if layer.activation == "gelu":
        gate = 0.5 * gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    elif layer.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    y = gate * up + (residual if layer.residual else 0)
    return normalized(y) if layer.norm_at == "output" else y


def attention_cases(operators: ctypes.CDLL, _: Mapping[str, int]) -> Iterator[Case]:
    """As many sequences as a batch of about a thousand tokens has, in float32, and with tiles in bfloat16."""
    random = np.random.default_rng(2)
    has_tiles = ISAS[operators.rtx_isa()] == "avx512-amx"
    shapes = ((12, 12, 32), (12, 12, 64), (16, 8, 128))
    for (heads, key_heads, width), length, bfloat16 in itertools.product(shapes, LENGTHS, (False, True)):
        if bfloat16 and (not has_tiles or length < LEAST_TILED):
            continue
        offsets = np.arange(0, TOKENS[-1] + length // 2, length)
        tokens = int(offsets[-1])
        query, y = normal(random, tokens, heads, width), aligned((tokens, heads, width), np.float32)
        key, value = normal(random, tokens, key_heads, width), normal(random, tokens, key_heads, width)
        arguments = (
            *pointers(query, key, value, offsets),
            *longs(len(offsets) - 1, heads, key_heads, width),
            ctypes.c_float(width**-0.5),
            0,
            *longs(-1),
            int(bfloat16),
            *pointers(y),
        )

        def check(
            y: Floats = y,
            inputs: Any = (query, key, value, offsets),
            scale: float = width**-0.5,
            tolerance: float = ROUNDED_TOLERANCE if bfloat16 else TOLERANCE,
        ) -> None:
            assert_near(y, packed_attention(*inputs, scale=scale), tolerance)

        keys, kind = f", {key_heads} keys" * (key_heads < heads), ", bfloat16" * bfloat16
        yield Case(
            "packed_attention",
            f"{len(offsets) - 1} × {length}, {heads} heads of {width}{keys}{kind}",
            tokens,
            operators.rtx_packed_attention,
            itertools.repeat(arguments),
            # Queries and keys are two numbers each: three products for one.
            operations=(8.0 if bfloat16 else 4.0) * tokens * length * heads * width,
            peak=BF16 if bfloat16 else FP32,
            near_bytes=sum(side.nbytes for side in (query, key, value, y)),
            check=check,
        )


def row_cases(operators: ctypes.CDLL, caches: Mapping[str, int]) -> Iterator[Case]:
    """What has no product, and moves more than it computes."""
    for width, norm, tokens in itertools.product((384, 1024), ("", "layer"), TOKENS):
        yield embedding_case(operators, caches, width, norm, tokens)
    for (width, norm), tokens in itertools.product(((384, "layer"), (768, "layer"), (1024, "rms")), TOKENS):
        yield norm_case(operators, width, norm, tokens)
    for tokens in TOKENS:
        yield rotary_case(operators, 16, 128, tokens)
    for width, mode in itertools.product((384, 1024), ("max", "mean")):
        yield pool_case(operators, width, mode)


def embedding_case(operators: ctypes.CDLL, caches: Mapping[str, int], width: int, norm: str, tokens: int) -> Case:
    random = np.random.default_rng(3)
    table = quantize_rows(normal(random, VOCABULARY, width))
    # Other rows each time, so that none is still in L2 when its turn comes again.
    sets = min(VOCABULARY // tokens, -(-caches[FAR] // (tokens * width)))
    ids = random.permutation(VOCABULARY)[: sets * tokens].reshape(sets, tokens)
    added, y = normal(random, tokens, width), aligned((tokens, width), np.float32)
    factor, bias = normal(random, width), normal(random, width)

    def call(row: NDArray[np.int64]) -> Arguments:
        kind = (NORMS.index(norm), ctypes.c_float(EPSILON))
        sizes = (*longs(width), *pointers(row, added), *longs(tokens))
        return (*pointers(table.values, table.scale), *sizes, *kind, *pointers(factor, bias, y))

    def check() -> None:
        plain = table.values[ids[0]] * table.scale[ids[0]] + added
        assert_near(y, layer_norm(plain, factor, bias, epsilon=EPSILON) if norm else plain)

    return Case(
        "int8_embedding",
        f"{VOCABULARY:,} × {width}" + (", LayerNorm" if norm else ""),
        tokens,
        operators.rtx_int8_embedding,
        itertools.cycle([call(row) for row in ids]),
        operations=(10.0 if norm else 2.0) * y.size,
        near_bytes=added.nbytes + y.nbytes,
        far_bytes=tokens * (width + 4),
        check=check,
    )


def norm_case(operators: ctypes.CDLL, width: int, norm: str, tokens: int) -> Case:
    random = np.random.default_rng(4)
    x, factor, bias = normal(random, tokens, width), normal(random, width), normal(random, width)
    y = aligned((tokens, width), np.float32)
    is_layer = norm == "layer"

    def check() -> None:
        some = layer_norm(x, factor, bias, epsilon=EPSILON) if is_layer else rms_norm(x, factor, epsilon=EPSILON)
        assert_near(y, some)

    arguments = (
        *pointers(x),
        *longs(tokens, width),
        NORMS.index(norm),
        ctypes.c_float(EPSILON),
        *pointers(factor, bias if is_layer else None, y),
    )
    return Case(
        "layer_norm" if is_layer else "rms_norm",
        str(width),
        tokens,
        operators.rtx_normalize,
        itertools.repeat(arguments),
        operations=(8.0 if is_layer else 4.0) * x.size,
        near_bytes=x.nbytes + y.nbytes,
        check=check,
    )


def rotary_case(operators: ctypes.CDLL, heads: int, width: int, tokens: int) -> Case:
    random = np.random.default_rng(5)
    x, cos, sin = normal(random, tokens, heads, width), normal(random, tokens, width), normal(random, tokens, width)
    y = aligned(x.shape, np.float32)
    return Case(
        "rotary_embedding",
        f"{heads} heads of {width}",
        tokens,
        operators.rtx_rotary_embedding,
        itertools.repeat((*pointers(x, cos, sin), *longs(tokens, heads, width), *pointers(y))),
        operations=3.0 * x.size,
        near_bytes=2 * x.nbytes + 2 * cos.nbytes,
        check=lambda: assert_near(y, rotary_embedding(x, cos, sin)),
    )


def pool_case(operators: ctypes.CDLL, width: int, mode: str) -> Case:
    random = np.random.default_rng(6)
    length = TOKENS[1]
    offsets = np.arange(0, TOKENS[-1], length)
    x, y = normal(random, int(offsets[-1]), width), aligned((len(offsets) - 1, width), np.float32)
    sizes = (*longs(width), *pointers(offsets), *longs(len(y)), None)
    return Case(
        "packed_pool",
        f"{mode}, {len(y)} × {length} of {width}",
        len(x),
        operators.rtx_packed_pool,
        itertools.repeat((*pointers(x), *sizes, POOLINGS.index(mode), *pointers(y))),
        operations=float(x.size),
        near_bytes=x.nbytes + y.nbytes,
        check=lambda: assert_near(y, packed_pool(x, offsets, mode)),
    )


def maxsim_cases(operators: ctypes.CDLL, caches: Mapping[str, int]) -> Iterator[Case]:
    """Passages and pages of ColBERT's and ColPali's sizes."""
    random = np.random.default_rng(7)
    dim = 128
    for query_tokens, count, length in ((32, 8, 180), (32, 100, 180), (20, 10, 1030)):
        offsets = np.arange(0, count * length + 1, length)
        query, documents = normal(random, query_tokens, dim), normal(random, count * length, dim)
        scores = np.empty(count, dtype=np.float32)
        sizes = (*longs(query_tokens), *pointers(documents, offsets), *longs(count, dim))

        def check(scores: Floats = scores, inputs: Any = (query, documents, offsets)) -> None:
            assert_near(scores, maxsim(*inputs))

        far = documents.nbytes if documents.nbytes > caches[L2] else 0
        yield Case(
            "maxsim",
            f"{query_tokens} by {count} × {length} of {dim}",
            len(documents),
            operators.rtx_maxsim,
            itertools.repeat((*pointers(query), *sizes, *pointers(scores))),
            operations=2.0 * query_tokens * documents.size,
            near_bytes=query.nbytes + documents.nbytes - far,
            far_bytes=far,
            check=check,
        )


# -- arrays --------------------------------------------------------------------------------------------------------


def aligned(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """As ONNX Runtime lays its tensors: at the begin of a line of a cache."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + LINE, dtype=np.uint8)
    start = -buffer.ctypes.data % LINE
    array: NDArray[Any] = buffer[start : start + size].view(dtype).reshape(shape)
    return array


def normal(random: np.random.Generator, *shape: int) -> Floats:
    made = aligned(shape, np.float32)
    made[:] = random.standard_normal(shape, dtype=np.float32)
    return made


def pointers(*arrays: NDArray[Any] | None) -> tuple[ctypes.c_void_p | None, ...]:
    """Each keeps its array."""
    return tuple(None if array is None else array.ctypes.data_as(ctypes.c_void_p) for array in arrays)


def longs(*numbers: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, numbers))


def assert_near(found: NDArray[Any], expected: NDArray[Any], tolerance: float = TOLERANCE) -> None:
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert distance <= tolerance, f"{distance} from the reference"


def cache_bytes() -> dict[str, int]:
    """Of the first two caches of a core, and so many that lie beyond."""
    found = {L1: L1_BYTES, L2: L2_BYTES}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        if f"L{level}" in found and kind != "Instruction":
            found[f"L{level}"] = int(size.removesuffix("K")) << 10
    return {**found, FAR: max(16 << 20, 4 * found[L2])}


# -- what is shown -------------------------------------------------------------------------------------------------


def least_s(case: Case, rates: Mapping[str, float], caches: Mapping[str, int]) -> tuple[float, str]:
    """What the roofline allows, and which side of it."""
    near = L1 if case.near_bytes <= caches[L1] else L2 if case.near_bytes <= caches[L2] else FAR
    moving = case.near_bytes / rates[near] + case.far_bytes / rates[FAR]
    computing = case.operations / rates[case.peak]
    return (computing, case.peak) if computing > moving else (moving, FAR if case.far_bytes else near)


def show(
    cases: list[Case], taken: Mapping[str, NDArray[np.float64]], rates: Mapping[str, float], caches: Mapping[str, int]
) -> None:
    print(
        ", ".join(
            f"{name} {rate / 1e9:,.0f} {'GOP/s' if name in (INT8, BF16, FP32) else 'GB/s'}"
            for name, rate in rates.items()
        )
    )
    print("\n| kernel | of | tokens | weights | µs | quartiles | GOP/s | bound | % of roofline | quartiles |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        least, bound = least_s(case, rates, caches)
        low, median, high = np.percentile(taken[case.name], (25, 50, 75)).tolist()
        weights = "" if case.kernel not in WITH_WEIGHTS else FAR if case.far_bytes else L2
        print(
            f"| {case.kernel} | {case.shape} | {case.tokens:,} | {weights} | {median * 1e6:,.1f} "
            f"| {low * 1e6:,.1f}–{high * 1e6:,.1f} | {case.operations / median / 1e9:,.0f} | {bound} "
            f"| **{least / median:.0%}** | {least / high:.0%}–{least / low:.0%} |"
        )
    print()


if __name__ == "__main__":
    main()
