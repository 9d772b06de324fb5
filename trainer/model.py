"""A retrieval model in PyTorch: a transformer, and for an embedder the pooling and what follows it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from rtx.runtime.contract import Activation, Contract, Task
from rtx.runtime.errors import CheckpointError, UsageError, nearest
from rtx.runtime.folder import replace_folder
from rtx.runtime.pairs import RenderedPair, special_token_template
from rtx.runtime.text import TextPreprocessor
from rtx.trainer import logit_score, pooling
from rtx.trainer.adapters import merged
from rtx.trainer.backbone import (
    Source,
    check_vocabulary,
    graph_inputs,
    load_backbone,
    load_tokenizer,
    position_limit,
    save_backbone,
    save_tokenizer,
    tokenizer_json,
)
from rtx.trainer.checkpoint import read_layout, write_layout
from rtx.trainer.engine import TorchEngine
from rtx.trainer.layout import DenseConfig, HeadModule, Layout
from rtx.trainer.rendering import Rendered, render_pair

# What `configure` may change: the rest follows from the weights.
_SETTINGS: dict[Task, tuple[str, ...]] = {
    "embed": ("max_tokens", "prompts", "default_prompt", "similarity", "truncate_dim", "include_prompt"),
    "rerank": ("max_tokens", "prompts", "default_prompt", "activation", "first_stage_weight"),
}


class RetrievalModel(nn.Module):
    """An embedder or a reranker; `load` makes one.

    Args:
        backbone: a model of transformers, without a head for an embedder, with one logit or a language model's head for
            a reranker.
        tokenizer: its fast tokenizer.
        head: the modules after pooling, as `layout.head` describes them.
        layout: everything else; `max_tokens` and, for an embedder, `pooling_dimension` are set.
        source: what it was loaded from, for messages.
    """

    def __init__(
        self, backbone: Any, tokenizer: Any, head: Sequence[nn.Module], *, layout: Layout, source: str = "model"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleList(head)
        self.tokenizer = tokenizer
        self.layout = layout
        self._tokenizer_json = tokenizer_json(tokenizer)
        try:
            self.contract = self._build_contract(layout)
        except ValueError as wrong:
            raise CheckpointError(f"{source}: {wrong}") from wrong
        self.preprocessor = TextPreprocessor(self.contract, self._tokenizer_json)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        task: Task | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> RetrievalModel:
        """Load a Sentence Transformers checkpoint or a bare Hugging Face model.

        Args:
            path: a folder, or the name of a repository on the Hugging Face hub.
            task: None for the checkpoint's own. "rerank" on a causal language model scores by its yes and no, and on
                anything else but a reranker starts a classification head at random (seed it with torch.manual_seed);
                "embed" on anything but an embedder starts with mean pooling, or the last token's vector for a causal
                model, and normalisation.
            max_tokens: limit on length, special tokens included; None for the checkpoint's own.
            dtype: of the backbone; pooling, head and logits are float32.
            revision: branch, tag or commit, on the hub.
            trust_remote_code: run Python code that the checkpoint brings.
            attn_implementation: "eager", "sdpa", ...; None for what transformers chooses.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or not supported.
            UsageError: `max_tokens` is more than the model has positions for.
        """
        source = Source.open(os.fspath(path), revision)
        layout = read_layout(source.folder, task)
        backbone = load_backbone(
            source, layout, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
        )
        tokenizer = load_tokenizer(source, layout, trust_remote_code=trust_remote_code)
        check_vocabulary(backbone, tokenizer, source.path_of(layout))
        layout = logit_score.settle(layout, tokenizer, source.path_of(layout))
        if layout.logit_score is not None:
            logit_score.check_head(backbone, layout.logit_score, source.path_of(layout))
        if layout.task == "rerank" and backbone.config.pad_token_id is None:
            # Causal classifiers look for the last token that is no padding.
            backbone.config.pad_token_id = tokenizer.pad_token_id
        limit = _max_tokens(layout, backbone, tokenizer, source.path_of(layout))
        if layout.task == "embed":
            _check_widths(layout, backbone.config.hidden_size, source.name)
            layout = dataclasses.replace(layout, pooling_dimension=backbone.config.hidden_size)
        head = [_load_module(source, module) for module in layout.head]
        layout = dataclasses.replace(layout, max_tokens=limit)
        model = cls(backbone, tokenizer, head, layout=layout, source=source.name).eval()
        if max_tokens is not None:
            model.configure(max_tokens=max_tokens)
        return model

    def configure(self, **settings: Any) -> None:
        """Change what does not depend on the weights.

        Args:
            settings: max_tokens, prompts, default_prompt; for an embedder also similarity, truncate_dim and
                include_prompt, for a reranker activation and first_stage_weight. Their meaning is that of `Layout`.

        Raises:
            UsageError: a setting does not exist or is out of range; the model is as before.
        """
        known = _SETTINGS[self.task]
        unknown = [
            f"setting '{name}' does not exist ({nearest(name, known)})" for name in settings if name not in known
        ]
        if unknown:
            raise UsageError("; ".join(unknown))
        layout = dataclasses.replace(self.layout, **settings)
        try:
            contract = self._build_contract(layout)
        except ValueError as wrong:
            raise UsageError(str(wrong)) from wrong
        self.layout, self.contract = layout, contract
        self.preprocessor = TextPreprocessor(contract, self._tokenizer_json)

    @property
    def task(self) -> Task:
        return self.layout.task

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def full_dimension(self) -> int:
        """Width of what `forward` gives an embedder, before the Matryoshka cut."""
        widths = [module.config.out_features for module in self.layout.head if isinstance(module.config, DenseConfig)]
        return widths[-1] if widths else int(self.backbone.config.hidden_size) * len(self.layout.pooling)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Run the model as it is trained.

        Args:
            batch: by input name of the contract, [rows, tokens] int64.

        Returns:
            An embedder's vectors [rows, full_dimension], or a reranker's logits [rows], float32.
        """
        if self.layout.logit_score is not None:
            return self.score_last_token(self.encode_tokens(batch), batch, *self.score_direction())
        if self.task == "rerank":
            logits: Tensor = self.backbone(**self._backbone_inputs(batch)).logits
            return pooling.at_least_float32(logits).squeeze(-1)
        return self.pool(self.encode_tokens(batch), batch)

    def encode_tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The transformer's last hidden states [rows, tokens, hidden], in its dtype."""
        transformer = self.backbone if self.layout.logit_score is None else logit_score.decoder_of(self.backbone)
        hidden: Tensor = transformer(**self._backbone_inputs(batch)).last_hidden_state
        return hidden

    def score_direction(self) -> tuple[Tensor, Tensor]:
        """Of a language model that reranks: what last hidden states are projected on [hidden], and what is added []."""
        assert self.layout.logit_score is not None
        return logit_score.score_direction(self.backbone, self.layout.logit_score)

    def score_last_token(self, hidden: Tensor, batch: Mapping[str, Tensor], direction: Tensor, bias: Tensor) -> Tensor:
        """Token vectors [rows, tokens, hidden] to logits [rows], by what `score_direction` gives."""
        return logit_score.score_last_token(hidden, batch["attention_mask"], direction, bias)

    def pool(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Token vectors [rows, tokens, hidden] through pooling and the head: [rows, full_dimension] float32."""
        vectors = pooling.pool(
            hidden, batch["attention_mask"], self.layout.pooling, pooling_mask=batch.get("pooling_mask")
        )
        for module in self.head:
            vectors = module(vectors)
        return vectors

    def finish(self, vectors: Tensor) -> Tensor:
        """The Matryoshka cut: [rows, full_dimension] to [rows, dimension], normalised again if the model normalises."""
        if self.contract.dimension == self.full_dimension:
            return vectors
        cut = vectors[..., : self.contract.dimension]
        return pooling.l2_normalize(cut) if self.contract.normalize else cut

    def activate(self, logits: Tensor) -> Tensor:
        """A reranker's logits [rows] as its scores."""
        return torch.sigmoid(logits) if self.contract.activation == "sigmoid" else logits

    def engine(self) -> TorchEngine:
        """This model as an engine of the runtime: `Embedder(model.preprocessor, model.engine())`."""
        return TorchEngine(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Sentence Transformers folder, version 6, atomically: it is there whole, or as it was before.

        Raises:
            UsageError: something that is no checkpoint is in the way.
        """
        with replace_folder(Path(path)) as folder:
            self.write(folder)

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint's files into a folder that exists. Adapters are merged into the weights below them.

        Args:
            folder: where to.
            state: the weights, by the names of `state_dict`; None for the model's own. Of a sharded model it is the
                gathered one.
        """
        weights = merged(self, state)
        save_backbone(self.backbone, folder, _part(weights, "backbone"))
        self.write_around(folder, weights)

    def write_around(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write all but the backbone, as `write` does: tokenizer, layout and the weights of the head."""
        self.tokenizer.model_max_length = self.contract.max_tokens
        save_tokenizer(self.tokenizer, folder)
        versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
        written = write_layout(folder, self.layout, versions)
        state = self.state_dict() if state is None else state
        for number, description in enumerate(written.head):
            if weights := _part(state, f"head.{number}"):
                weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
                save_file(weights, folder / description.folder / "model.safetensors")

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Trade time for memory in the backbone, as transformers' Trainer asks for it.

        Raises:
            UsageError: this kind of model cannot.
        """
        if not self.backbone.supports_gradient_checkpointing:
            raise UsageError(f"gradient_checkpointing: {type(self.backbone).__name__} of transformers cannot do it")
        self.backbone.activation_checkpointing_enable(**options)

    @property
    def _no_split_modules(self) -> Any:
        """The classes that a sharded model is split at; accelerate asks a model for them by this name."""
        return self.backbone._no_split_modules

    def _backbone_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.contract.inputs if name != "pooling_mask"}

    def _render(self, layout: Layout) -> Rendered | None:
        """What the chat template makes of a pair; None if pairs do not go through one."""
        if layout.message_format is None:
            return None
        return render_pair(self.tokenizer, layout.message_format, layout.prompt, layout.chat_template_kwargs)

    def _build_contract(self, layout: Layout) -> Contract:
        """Raises ValueError for a setting that does not fit the model."""
        if layout.activation not in get_args(Activation):
            raise ValueError(f"activation: expected {' or '.join(get_args(Activation))}, got {layout.activation!r}")
        if type(layout.first_stage_weight) not in (int, float):
            raise ValueError(f"first_stage_weight: expected a number, got {layout.first_stage_weight!r}")
        embeds = layout.task == "embed"
        rendered = self._render(layout)
        if rendered is not None:
            around = RenderedPair(Tokenizer.from_str(self._tokenizer_json), rendered.parts)
            special, template = around.special_tokens, around.template
        else:
            special = self.tokenizer.num_special_tokens_to_add(pair=not embeds)
            template = special_token_template(self.tokenizer.backend_tokenizer, pair=not embeds)
        if layout.max_tokens is None or layout.max_tokens <= special:
            raise ValueError(f"max_tokens: expected more than the {special} special tokens, got {layout.max_tokens}")
        positions = position_limit(self.backbone)
        if positions is not None and layout.max_tokens > positions:
            raise ValueError(
                f"max_tokens: expected at most {positions}, the model's positions; got {layout.max_tokens}"
            )
        if layout.truncate_dim is not None and not 1 <= layout.truncate_dim <= self.full_dimension:
            raise ValueError(f"truncate_dim: expected 1 to {self.full_dimension}, got {layout.truncate_dim}")
        inputs = graph_inputs(self.backbone, self.tokenizer)
        return Contract(
            task=layout.task,
            inputs=inputs if layout.include_prompt else (*inputs, "pooling_mask"),
            max_tokens=layout.max_tokens,
            padding_side=self.tokenizer.padding_side,
            pad_token_id=self.tokenizer.pad_token_id,
            pad_token_type_id=self.tokenizer.pad_token_type_id,
            template=template,
            rendered=rendered.parts if rendered is not None else (),
            strip_sides=rendered is not None and rendered.strip_sides,
            pooling=layout.pooling,
            dimension=(layout.truncate_dim or self.full_dimension) if embeds else 1,
            normalize=bool(layout.head) and not isinstance(layout.head[-1].config, DenseConfig),
            similarity=layout.similarity,
            prompts=dict(layout.prompts),
            default_prompt=layout.default_prompt,
            include_prompt=layout.include_prompt,
            activation=layout.activation,
            first_stage_weight=float(layout.first_stage_weight),
        )


def _part(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The weights of a module, by their names in it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _max_tokens(layout: Layout, backbone: Any, tokenizer: Any, where: str) -> int:
    """The limit on length: the checkpoint's, else the tokenizer's, and never more than the model has positions for."""
    limits = [tokenizer.model_max_length, getattr(backbone.config, "max_position_embeddings", None)]
    known = [layout.max_tokens] if layout.max_tokens else [limit for limit in limits if limit and 0 < limit < 1 << 31]
    known.append(position_limit(backbone))
    found = [limit for limit in known if limit is not None]
    if not found:
        raise CheckpointError(
            f"{where}: says nowhere how long a text may be; expected model_max_length in tokenizer_config.json"
        )
    return min(found)


def _check_widths(layout: Layout, hidden: int, where: str) -> None:
    """Raise CheckpointError unless each module takes what the one before it gives."""
    if layout.pooling_dimension not in (None, hidden):
        raise CheckpointError(f"{where}: pooling expects {layout.pooling_dimension} dimensions, the model has {hidden}")
    width = hidden * len(layout.pooling)
    for module in layout.head:
        if isinstance(module.config, DenseConfig):
            if module.config.in_features != width:
                raise CheckpointError(
                    f"{where}/{module.folder}: in_features: expected {width}, got {module.config.in_features}"
                )
            width = module.config.out_features


def _load_module(source: Source, module: HeadModule) -> nn.Module:
    config = module.config
    if not isinstance(config, DenseConfig):
        return pooling.Normalize()
    where = f"{source.name}/{module.folder}"
    dense = pooling.Dense(
        config.in_features,
        config.out_features,
        bias=config.bias,
        activation=_activation(config.activation_function, where),
        use_residual=config.use_residual,
    )
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
