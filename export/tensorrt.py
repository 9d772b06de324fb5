"""A graph to a TensorRT engine, ahead of time: with TensorRT-RTX on a machine without a GPU.

    onnx -> network, strongly typed -> checked against the graph -> one profile per bucket of lengths -> engine

Every number has the type that the graph gives it: what stays float32 in an fp16 graph does so in its engine. An engine
belongs to the graph that it was built from, the version of TensorRT, the compute capabilities and the profiles; it is
never built when a request comes.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir

from rtx.export.buckets import Range
from rtx.runtime.backends import tensorrt
from rtx.runtime.caching import cache_file, read_cache, write_cache
from rtx.runtime.errors import EngineError, ExportError, UsageError
from rtx.runtime.gpu import find_gpu
from rtx.runtime.manifest import Target

TARGETS: tuple[Target, ...] = get_args(Target)
Profile = dict[str, Range]
"""Of one bucket: ranges by the graph's names of its axes."""

_TYPES = {
    ir.DataType.FLOAT: "FLOAT",
    ir.DataType.FLOAT16: "HALF",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "INT64",
    ir.DataType.INT32: "INT32",
    ir.DataType.BOOL: "BOOL",
}
# What an axis is called that is so many times another one: "4*image_tokens".
_MULTIPLE = re.compile(r"(?:(\d+)\s*\*\s*)?(\w+)")
# What TensorRT tells while it builds, once for each profile. Only an engine on a GPU can be asked for it.
_WORKSPACE = re.compile(r"Total Activation Memory: (\d+) bytes")


@dataclass(frozen=True)
class Network:
    """What TensorRT has read of a graph.

    Attributes:
        inputs, outputs: type and shape by name; -1 for an axis of any size.
        layers: how many there are of each kind and type of what they give, "SOFTMAX FLOAT".
    """

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    layers: dict[str, int]


@dataclass(frozen=True)
class Built:
    """A serialised engine, and what is known of it.

    Attributes:
        content: the engine.
        network: that it was built of.
        version: of TensorRT.
        workspace_bytes: by profile, what TensorRT plans to compute in; empty where it does not say.
    """

    content: bytes
    network: Network
    version: str
    workspace_bytes: tuple[int, ...]


def load_tensorrt(target: Target) -> Any:
    """TensorRT's module.

    Raises:
        ExportError: it is not installed, or cannot be loaded; says how to install it.
    """
    try:
        return tensorrt.load_tensorrt(target)
    except EngineError as missing:
        raise ExportError(str(missing)) from missing


def capability_names(trt: Any) -> list[int]:
    """Compute capabilities that engines can be built for ahead of time, as in `--sm`; none with classic TensorRT."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return sorted(int(name.removeprefix("SM")) for name in names if name.startswith("SM"))


def check_capabilities(trt: Any, target: Target, capabilities: Sequence[int]) -> None:
    """
    Raises:
        UsageError: there are none where some are needed, or some that this TensorRT does not build for.
    """
    if target == "tensorrt":
        if capabilities:
            raise UsageError(
                "--sm: classic TensorRT builds for the GPU of this machine alone; --target tensorrt-rtx "
                "builds for others"
            )
        return
    known = capability_names(trt)
    if not capabilities or (unknown := [sm for sm in capabilities if sm not in known]):
        given = ", ".join(map(str, unknown if capabilities else [])) or "none"
        hint = "; sm_90 and sm_100 need --target tensorrt, on such a GPU" if {90, 100} & {*capabilities} else ""
        raise UsageError(f"--sm: expected some of {', '.join(map(str, known))}, got {given}{hint}")


def read_network(trt: Any, graph: Path, logger: Any, *, target: Target) -> tuple[Any, Any, Any]:
    """A graph as TensorRT reads it: builder, network and parser, which live as long as the network is used.

    Raises:
        ExportError: TensorRT does not take the graph, or has no GPU and needs one.
    """
    try:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    except Exception as broken:  # its bindings raise classes of their own, and TypeError where there is no GPU
        needs = " Classic TensorRT builds on a machine with the GPU that it builds for." if target == "tensorrt" else ""
        raise ExportError(f"{target}: cannot start: {broken}.{needs}") from broken
    parser = trt.OnnxParser(network, logger)
    try:
        str(graph).encode()
    except UnicodeEncodeError as broken:  # its bindings take such a path for no path at all
        raise ExportError(f"{target}: {str(graph)!a}: expected a path in UTF-8") from broken
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(at)).strip() for at in range(parser.num_errors))
        raise ExportError(f"{target}: does not take {graph.name}: {errors}")
    return builder, network, parser


def describe_network(network: Any) -> Network:
    """What is in a parsed network."""

    def sides(count: int, of: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
        tensors = [of(at) for at in range(count)]
        return {tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors}

    layers: Counter[str] = Counter()
    for at in range(network.num_layers):
        layer = network.get_layer(at)
        dtype = layer.get_output(0).dtype.name if layer.num_outputs else "NONE"
        layers[f"{layer.type.name} {dtype}"] += 1
    return Network(
        inputs=sides(network.num_inputs, network.get_input),
        outputs=sides(network.num_outputs, network.get_output),
        layers=dict(sorted(layers.items())),
    )


def check_network(described: Network, graph: ir.Model) -> None:
    """Hold what TensorRT has read against the graph: names, types and fixed sizes of all inputs and outputs.

    Raises:
        ExportError: something is another.
    """
    for kind, found, wanted in (
        ("input", described.inputs, graph.graph.inputs),
        ("output", described.outputs, graph.graph.outputs),
    ):
        expected = {str(value.name): (_type_of(value), _sizes(value)) for value in wanted}
        if found != expected:
            names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
            raise ExportError(
                "; ".join(
                    f"{kind} '{name}': the graph has {expected.get(name)}, TensorRT read {found.get(name)}"
                    for name in names
                )
            )


def build_engine(
    graph: Path, profiles: Sequence[Profile], *, target: Target, capabilities: Sequence[int] = ()
) -> Built:
    """Build a graph's engine.

    Args:
        graph: in ONNX, in the precision that the engine is to have.
        profiles: one for each bucket: a range for each of the graph's axes of any size.
        target: which TensorRT.
        capabilities: compute capabilities to build for, as 89; none with classic TensorRT, which takes this machine's.

    Raises:
        UsageError: the capabilities are not those that it builds for.
        EngineError: the driver does not tell which GPU classic TensorRT builds for.
        ExportError: TensorRT is not there, does not take the graph, reads it otherwise than it is, or cannot build it.
    """
    trt = load_tensorrt(target)
    check_capabilities(trt, target, capabilities)
    with _signals_wait() as came:
        return _build(trt, graph, profiles, target, capabilities, came)


def _build(
    trt: Any, graph: Path, profiles: Sequence[Profile], target: Target, capabilities: Sequence[int], came: Sequence[int]
) -> Built:
    """As `build_engine`, until a signal has come."""
    try:
        model = ir.load(graph)
    except Exception as broken:  # protobuf's, which share no base
        raise ExportError(f"{graph.name}: is no graph in ONNX: {broken}") from broken
    told: list[int] = []
    logger = tensorrt.quiet_logger(trt, lambda line: told.extend(map(int, _WORKSPACE.findall(line))))
    builder, network, _parser = read_network(trt, graph, logger, target=target)
    described = describe_network(network)
    check_network(described, model)
    config = builder.create_builder_config()
    # Without it float32 is multiplied with 10 bits after the point.
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: no memory of its own while it runs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for at, capability in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability}"], at)
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        for value in model.graph.inputs:
            if any(not isinstance(axis, int) for axis in value.shape or ()):
                profile.set_shape(str(value.name), *shapes_of(value, ranges))
        config.add_optimization_profile(profile)
    timing = None
    if target == "tensorrt":
        timing = cache_file("timing", str(trt.__version__), find_gpu(0).name)
        use_timings(config, timing)
    config.progress_monitor = _monitor(trt, came)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise ExportError(f"{target}: could not build {graph.name}: {logger.last or 'it does not say why'}")
    if timing is not None:
        keep_timings(config, timing)
    workspaces = tuple(told) if len(told) == len(profiles) else ()
    return Built(bytes(content), described, str(trt.__version__), workspaces)


@contextlib.contextmanager
def _signals_wait() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM take effect when the block ends: TensorRT swallows what its callbacks raise, and goes on.

    Gives a list that has those in it which came. What the block raises because of them is not what is told.
    """
    came: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # What is ignored stays so, and what is not Python's cannot be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda found, _: came.append(found))
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if came:
            signal.raise_signal(came[0])


def _monitor(trt: Any, came: Sequence[int]) -> Any:
    """Ends a build when a signal came."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, *_: Any) -> None:
            pass

        def phase_finish(self, *_: Any) -> None:
            pass

        def step_complete(self, *_: Any) -> bool:
            return not came

    return Monitor()


def use_timings(config: Any, file: Path) -> None:
    """Let a build do without timing what an earlier one on such a GPU has timed. TensorRT-RTX times nothing.

    Args:
        config: of the build.
        file: where timings are kept. Those of another GPU or version are left, and all is timed anew.
    """
    for content in (read_cache(file), b""):
        timings = config.create_timing_cache(content)
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return


def keep_timings(config: Any, file: Path) -> None:
    """Keep what a build has timed; where that cannot be written, the next one times again."""
    if (timings := config.get_timing_cache()) is not None:
        write_cache(file, bytes(timings.serialize()))


def shapes_of(value: ir.Value, ranges: Profile) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, best and largest shape of an input.

    Raises:
        ExportError: the graph has an axis of which no range is known.
    """
    axes = [_range(str(value.name), axis, ranges) for axis in value.shape or ()]
    least, best, largest = (tuple(axis[at] for axis in axes) for at in range(3))
    return least, best, largest


def _range(name: str, axis: int | ir.SymbolicDim, ranges: Profile) -> Range:
    if isinstance(axis, int):
        return axis, axis, axis
    found = _MULTIPLE.fullmatch(str(axis.value).strip("()"))
    if found is None or found[2] not in ranges:
        raise ExportError(f"input '{name}': no range is known of its axis '{axis.value}'")
    times = int(found[1] or 1)
    least, best, largest = ranges[found[2]]
    return times * least, times * best, times * largest


def _type_of(value: ir.Value) -> str:
    return str(value.dtype) if value.dtype is None else _TYPES.get(value.dtype, value.dtype.name)


def _sizes(value: ir.Value) -> tuple[int, ...]:
    return tuple(axis if isinstance(axis, int) else -1 for axis in value.shape or ())
