"""What follows a transformer and its pooling: a chain of Dense and Normalize modules, as data and loaded."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rtx.runtime.errors import CheckpointError
from rtx.trainer import pooling
from rtx.trainer.backbone import Source
from rtx.trainer.layout import DenseConfig, HeadModule, ImageTower, Layout


def output_width(described: Layout | ImageTower, hidden: int) -> int:
    """Width of the vectors at the chain's end, for a transformer whose token vectors are `hidden` wide."""
    widths = [module.config.out_features for module in described.head if isinstance(module.config, DenseConfig)]
    return widths[-1] if widths else hidden * max(1, len(described.pooling))


def normalizes(described: Layout | ImageTower) -> bool:
    """Whether the vectors at the chain's end have L2 norm 1."""
    return bool(described.head) and not isinstance(described.head[-1].config, DenseConfig)


def check_widths(described: Layout | ImageTower, hidden: int, where: str) -> None:
    """Raise CheckpointError unless each module takes what the one before it gives."""
    if described.pooling_dimension not in (None, hidden):
        raise CheckpointError(
            f"{where}: pooling expects {described.pooling_dimension} dimensions, the model has {hidden}"
        )
    width = hidden * max(1, len(described.pooling))
    for module in described.head:
        if isinstance(module.config, DenseConfig):
            if module.config.in_features != width:
                raise CheckpointError(
                    f"{where}/{module.folder}: in_features: expected {width}, got {module.config.in_features}"
                )
            width = module.config.out_features


def make_dense(config: DenseConfig, where: str) -> pooling.Dense:
    """A Dense module with random weights.

    Raises:
        CheckpointError: its activation is no module of torch.nn.
    """
    return pooling.Dense(
        config.in_features,
        config.out_features,
        bias=config.bias,
        activation=_activation(config.activation_function, where),
        use_residual=config.use_residual,
    )


def load_module(source: Source, module: HeadModule) -> nn.Module:
    """A module of the chain with its weights.

    Raises:
        CheckpointError: they are missing, damaged or of another shape.
    """
    if not isinstance(module.config, DenseConfig):
        return pooling.Normalize()
    where = f"{source.name}/{module.folder}"
    dense = make_dense(module.config, where)
    weights = _read_weights(source, module.folder, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    if shapes != expected:
        raise CheckpointError(f"{where}: weights: expected {expected}, got {shapes}")
    dense.load_state_dict(weights)
    return dense


def _read_weights(source: Source, folder: str, where: str) -> dict[str, Tensor]:
    try:
        if file := source.find(f"{folder}/model.safetensors"):
            return load_file(file)
        if file := source.find(f"{folder}/pytorch_model.bin"):
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, SafetensorError, ValueError) as broken:
        raise CheckpointError(f"{file}: the weights cannot be read: {broken}") from broken
    raise CheckpointError(f"{where}: the weights are missing; expected model.safetensors")


def _activation(dotted: str, where: str) -> nn.Module:
    """A module of torch.nn by its dotted name, such as torch.nn.modules.activation.Tanh."""
    found = getattr(nn, dotted.rpartition(".")[2], None)
    if isinstance(found, type) and issubclass(found, nn.Module):
        try:
            if dotted in (f"torch.nn.{found.__name__}", f"{found.__module__}.{found.__name__}"):
                return found()
        except TypeError:
            pass
    raise CheckpointError(
        f"{where}: activation_function: expected a class of torch.nn that needs no arguments, got {dotted!r}"
    )
