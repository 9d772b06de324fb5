"""A model whose weights are sharded over the processes: torch's FSDP2, as accelerate's launcher asks for it.

What is sharded is a copy. The model that was given stays whole in main memory: checkpoints are read into it, and it has
the trained weights at the end. On disk there are whole states only, of the model and of the optimizer, so that a
checkpoint does not tell whether its run was sharded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from rtx.runtime.errors import UsageError

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel


class _Setting(NamedTuple):
    """What the launcher hands on in the environment, and what it has to be.

    Attributes:
        name: in accelerate's configuration.
        default: what accelerate takes where the variable is not set.
        expected: what it has to be.
        reason: why, in words.
    """

    name: str
    default: str
    expected: str
    reason: str


_SETTINGS = {
    "FSDP_VERSION": _Setting("fsdp_version", "1", "2", "version 1 joins parameters that may have different rates"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": _Setting(
        "fsdp_cpu_ram_efficient_loading", "false", "false", "each process reads the whole model"
    ),
    "FSDP_OFFLOAD_PARAMS": _Setting("fsdp_offload_params", "false", "false", "never tried"),
    "FSDP_ACTIVATION_CHECKPOINTING": _Setting(
        "fsdp_activation_checkpointing", "false", "false", "--gradient-checkpointing does it"
    ),
    "ACCELERATE_MIXED_PRECISION": _Setting("mixed_precision", "no", "no", "--bf16 does it"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _Setting(
        "use_parallelism_config", "false", "false", "the processes differ in their rows alone"
    ),
}


def check_launcher(environment: Mapping[str, str]) -> None:
    """Look at what accelerate's launcher was told, before anything is read.

    Args:
        environment: variables as `accelerate launch` sets them.

    Raises:
        UsageError: DeepSpeed, or FSDP with settings that it cannot have here; lists all of them.
    """
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "DeepSpeed: not supported, since it steps inside its own backward pass, and here a batch may have several "
            "(the gradient cache); use FSDP, which shards alike (distributed_type: FSDP, fsdp_version: 2)"
        )
    if not is_wanted(environment):
        return
    found = {name: environment.get(name, setting.default).lower() for name, setting in _SETTINGS.items()}
    wrong = [
        f"{setting.name}: expected {setting.expected}, got {found[name]} ({setting.reason})"
        for name, setting in _SETTINGS.items()
        if found[name] != setting.expected
    ]
    if wrong:
        raise UsageError(f"FSDP: accelerate's configuration: {'; '.join(wrong)}")


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher was told to shard."""
    return _is_on(environment, "ACCELERATE_USE_FSDP")


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def copy_to_shard(model: RetrievalModel) -> RetrievalModel:
    """A copy that can be sharded in place while the model itself stays as it is.

    Until then its parameters lie in the model's memory. Tokenizer and preprocessor are shared.
    """
    # What deepcopy finds in its notes it takes from there.
    notes: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    notes |= {id(shared): shared for shared in (model.tokenizer, model.preprocessor)}
    return copy.deepcopy(model, notes)


def is_sharded(module: nn.Module) -> bool:
    """Whether the processes have shares of the module, gathered at the moment or not."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the processes have shares of. If it is sharded, all of them have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_weights(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """The whole state of a module, in main memory. If it is sharded, all processes have to call it.

    Args:
        module: sharded or not.
        keep: False for a process that only takes part; it is given nothing.
    """
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    # As parameters, so that what is tied is known by its identity, and stays tied.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            # One at a time: together they may not fit where they are gathered.
            complete = whole(tensor.detach())
            gathered[id(tensor)] = complete.cpu() if keep else complete.new_empty(0)
        if keep:
            found[name] = gathered[id(tensor)]
    return found


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module the weights of a whole state; if it is sharded, each process takes its own share of them."""
    own = module.state_dict()
    module.load_state_dict({name: _share(tensor, own[name]) for name, tensor in state.items()})


def gather_optimizer(optimizer: Any, *, keep: bool = True) -> dict[str, Any]:
    """The state of an optimizer, as of one that has the whole parameters. If they are sharded, all processes have to
    call it.

    Args:
        optimizer: of torch, or accelerate's around one.
        keep: as in `gather_weights`.
    """
    found: dict[str, Any] = optimizer.state_dict()
    for place, values in found["state"].items():
        complete = {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        found["state"][place] = {
            name: value.cpu() if isinstance(value, Tensor) else value for name, value in complete.items() if keep
        }
    return found


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Go on from what `gather_optimizer` gave.

    Raises:
        ValueError, KeyError, IndexError: it is that of another optimizer.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(place: int, value: Any) -> Any:
        # A moment has its parameter's shape; a count of steps has none.
        moment = isinstance(value, Tensor) and value.shape == parameters[place].shape
        return _share(value, parameters[place]) if moment else value

    shares = {
        place: {name: share(place, value) for name, value in values.items()} for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})


def _share(tensor: Tensor, own: Tensor) -> Tensor:
    """What this process holds of a whole tensor where it holds `own`. All have the whole, so that none has to send."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
