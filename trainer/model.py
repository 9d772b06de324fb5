"""A retrieval model in PyTorch: a transformer, and for an embedder the pooling and what follows it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from rtx.runtime.contract import Contract, Task
from rtx.runtime.errors import CheckpointError, UsageError, nearest
from rtx.runtime.folder import replace_folder
from rtx.runtime.image_rules import CHANNELS, ImageRules
from rtx.runtime.preprocessor import Preprocessor
from rtx.trainer import logit_score, pooling
from rtx.trainer.adapters import merged
from rtx.trainer.backbone import (
    Source,
    check_vocabulary,
    depends_on_padding,
    hidden_size,
    load_backbone,
    load_tokenizer,
    position_limit,
    save_backbone,
    save_tokenizer,
    tokenizer_json,
)
from rtx.trainer.checkpoint import read_layout, write_layout
from rtx.trainer.contracts import build_contract
from rtx.trainer.engine import TorchEngine
from rtx.trainer.head import check_widths, load_module, normalizes, output_width
from rtx.trainer.image_processing import ImageProcessing
from rtx.trainer.image_tower import ImageEncoder, load_image_tower
from rtx.trainer.layout import Layout

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
        images: how images are prepared; None for a model that takes none.
        image_tower: what images go through, where that is not the backbone.
        source: what it was loaded from, for messages.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        head: Sequence[nn.Module],
        *,
        layout: Layout,
        images: ImageProcessing | None = None,
        image_tower: ImageEncoder | None = None,
        source: str = "model",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleList(head)
        self.image_tower = image_tower
        self.tokenizer = tokenizer
        self.images = images
        self.layout = layout
        self._tokenizer_json = tokenizer_json(tokenizer)
        try:
            self.contract = self._build_contract(layout)
        except ValueError as wrong:
            raise CheckpointError(f"{source}: {wrong}") from wrong
        self.preprocessor = Preprocessor(self.contract, self._tokenizer_json)

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
        processor_kwargs: Mapping[str, Any] | None = None,
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
            processor_kwargs: settings of the image processor in place of the checkpoint's, such as `max_pixels`; they
                go into the contract and into what is saved.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or not supported.
            UsageError: `max_tokens` is more than the model has positions for, or `processor_kwargs` are none of the
                image processor's, or make images of a size that the model does not take.
        """
        source = Source.open(os.fspath(path), revision)
        layout = read_layout(source.folder, task)
        images = _load_images(source, layout, processor_kwargs)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "attn_implementation": attn_implementation}
        backbone = load_backbone(source, layout, dtype=dtype, **options)
        tokenizer = load_tokenizer(source, layout, trust_remote_code=trust_remote_code)
        layout = _settle(layout, backbone, tokenizer, source)
        tower = None
        if layout.image_tower is not None:
            tower = load_image_tower(source, layout.image_tower, dtype=dtype, **options)
            layout = dataclasses.replace(layout, image_tower=tower.layout)
            _check_towers(layout, tower, hidden_size(backbone, layout), source.name)
        head = [load_module(source, module) for module in layout.head]
        model = cls(
            backbone, tokenizer, head, layout=layout, images=images, image_tower=tower, source=source.name
        ).eval()
        if processor_kwargs:
            model.check_image_size()
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
        if "max_tokens" in settings and contract.max_tokens < contract.fixed_tokens:
            fixed = contract.fixed_tokens
            raise UsageError(f"max_tokens: this model's texts are filled to {fixed} tokens; expected {fixed}")
        self.layout, self.contract = layout, contract
        self.preprocessor = Preprocessor(contract, self._tokenizer_json)

    def check_image_size(self) -> None:
        """Look whether the model takes images of the size that they are prepared in.

        Raises:
            UsageError: it does not.
        """
        rules = self._image_rules
        if rules is None or rules.layout != "pixels":
            return
        black = torch.zeros(1, CHANNELS, rules.height, rules.width, device=self.device)
        try:
            with torch.no_grad():
                self.encode_images(black)
        except (RuntimeError, ValueError) as wrong:
            reason = " ".join(str(wrong).split())
            raise UsageError(
                f"the model does not take images of {rules.height} × {rules.width} pixels (height × width): {reason}"
            ) from wrong

    @property
    def task(self) -> Task:
        return self.layout.task

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _image_rules(self) -> ImageRules | None:
        return self.images.rules if self.images is not None else None

    @property
    def full_dimension(self) -> int:
        """Width of what `forward` gives an embedder, before the Matryoshka cut."""
        return output_width(self.layout, hidden_size(self.backbone, self.layout))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Run the model as it is trained.

        Args:
            batch: tensors by name (see `rtx.runtime.text.Batch`).

        Returns:
            An embedder's vectors [rows, full_dimension], or a reranker's logits [rows], float32.
        """
        if "input_ids" not in batch:
            return self.encode_images(batch["pixel_values"])
        if self.layout.features:
            return self.apply_head(self.backbone.get_text_features(**self._backbone_inputs(batch)).pooler_output)
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

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Images that become vectors by themselves: [images, 3, height, width] to [images, full_dimension] float32."""
        if self.image_tower is not None:
            vectors: Tensor = self.image_tower(pixel_values)
            return vectors
        pixel_values = pixel_values.to(self.backbone.dtype)
        return self.apply_head(self.backbone.get_image_features(pixel_values=pixel_values).pooler_output)

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
        return self.apply_head(vectors)

    def apply_head(self, vectors: Tensor) -> Tensor:
        """What follows pooling: [rows, pooled dimension] to [rows, full_dimension], at least float32."""
        vectors = pooling.at_least_float32(vectors)
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
        # A model with two towers has each one's config.json in a folder of its own.
        target = Path(path)
        marker = next((name for name in ("modules.json", "config.json") if (target / name).is_file()), "config.json")
        with replace_folder(target, marker=marker) as folder:
            self.write(folder)

    def write(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the checkpoint's files into a folder that exists. Adapters are merged into the weights below them.

        Args:
            folder: where to.
            state: the weights, by the names of `state_dict`; None for the model's own. Of a sharded model it is the
                gathered one.
        """
        weights = merged(self, state)
        written = self.write_around(folder, weights)
        save_backbone(self.backbone, folder / written.backbone_folder, _part(weights, "backbone"))
        if self.image_tower is not None and written.image_tower is not None:
            part = _part(weights, "image_tower.backbone")
            save_backbone(self.image_tower.backbone, folder / written.image_tower.folder, part)

    def write_around(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> Layout:
        """Write all but the transformers, as `write` does: tokenizer, image processor, layout and weights of heads.

        Returns:
            The layout with the folders that its modules have now.
        """
        versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
        written = write_layout(folder, self.layout, versions)
        self.tokenizer.model_max_length = self.contract.fixed_tokens or self.contract.max_tokens
        save_tokenizer(self.tokenizer, folder / written.backbone_folder)
        tower = written.image_tower
        if self.images is not None:
            place = written.backbone_folder if tower is None else tower.folder
            self.images.save(folder / place, alone=tower is not None)
        state = self.state_dict() if state is None else state
        heads = {"head": written.head, "image_tower.head": tower.head if tower is not None else ()}
        for name, head in heads.items():
            for number, description in enumerate(head):
                if weights := _part(state, f"{name}.{number}"):
                    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
                    save_file(weights, folder / description.folder / "model.safetensors")
        return written

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Trade time for memory in the transformers, as transformers' Trainer asks for it.

        Raises:
            UsageError: this kind of model cannot.
        """
        for transformer in self._transformers:
            if not transformer.supports_gradient_checkpointing:
                raise UsageError(f"gradient_checkpointing: {type(transformer).__name__} of transformers cannot do it")
        for transformer in self._transformers:
            transformer.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        """Take `activation_checkpointing_enable` back."""
        for transformer in self._transformers:
            transformer.activation_checkpointing_disable()

    @property
    def _transformers(self) -> list[Any]:
        return [self.backbone] if self.image_tower is None else [self.backbone, self.image_tower.backbone]

    @property
    def _no_split_modules(self) -> Any:
        """The classes that a sharded model is split at; accelerate asks a model for them by this name."""
        if self.image_tower is None:
            return self.backbone._no_split_modules
        return [name for transformer in self._transformers for name in transformer._no_split_modules or ()]

    def _backbone_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs: dict[str, Tensor] = {name: batch[name] for name in self.contract.inputs if name != "pooling_mask"}
        if "pixel_values" in batch:
            assert self.contract.visual is not None
            inputs["pixel_values"] = batch["pixel_values"].to(self.backbone.dtype)
            inputs["image_grid_thw"] = batch["image_grid_thw"]
            inputs["mm_token_type_ids"] = (batch["input_ids"] == self.contract.visual.image_token_id).int()
        return inputs

    def _build_contract(self, layout: Layout) -> Contract:
        """Raises ValueError for a setting that does not fit the model."""
        return build_contract(
            layout,
            self.backbone,
            self.tokenizer,
            self._tokenizer_json,
            full_dimension=self.full_dimension,
            images=self._image_rules,
            image_backbone=self.image_tower.backbone if self.image_tower is not None else None,
        )


def _part(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The weights of a module, by their names in it."""
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _load_images(source: Source, layout: Layout, processor_kwargs: Mapping[str, Any] | None) -> ImageProcessing | None:
    """How images are prepared; None for a model that takes none."""
    if layout.image_tower is not None:
        return ImageProcessing.load(source, layout.image_tower.folder, {}, settings=processor_kwargs)
    if layout.images:
        return ImageProcessing.load(source, layout.backbone_folder, layout.tokenizer_kwargs, settings=processor_kwargs)
    if processor_kwargs:
        raise UsageError(f"processor_kwargs ({', '.join(processor_kwargs)}): {source.name} takes no images")
    return None


def _settle(layout: Layout, backbone: Any, tokenizer: Any, source: Source) -> Layout:
    """The layout with what the transformer and the tokenizer decide, which are checked against each other."""
    where = source.path_of(layout)
    check_vocabulary(backbone, tokenizer, where)
    layout = logit_score.settle(layout, tokenizer, where)
    if layout.logit_score is not None:
        logit_score.check_head(backbone, layout.logit_score, where)
    elif layout.task == "rerank" and backbone.config.pad_token_id is None:
        # Causal classifiers look for the last token that is no padding.
        backbone.config.pad_token_id = tokenizer.pad_token_id
    limit = _max_tokens(layout, backbone, tokenizer, where)
    if layout.task == "embed":
        width = hidden_size(backbone, layout)
        check_widths(layout, width, source.name)
        layout = dataclasses.replace(layout, pooling_dimension=width if layout.pooling else None)
    fixed = limit if layout.features and depends_on_padding(backbone, tokenizer, layout) else 0
    return dataclasses.replace(layout, max_tokens=limit, fixed_tokens=fixed)


def _max_tokens(layout: Layout, backbone: Any, tokenizer: Any, where: str) -> int:
    """The limit on length: the checkpoint's, else the tokenizer's, and never more than the model has positions for."""
    limits = [tokenizer.model_max_length, getattr(backbone.config.get_text_config(), "max_position_embeddings", None)]
    known = [layout.max_tokens] if layout.max_tokens else [limit for limit in limits if limit and 0 < limit < 1 << 31]
    known.append(position_limit(backbone))
    found = [limit for limit in known if limit is not None]
    if not found:
        raise CheckpointError(
            f"{where}: says nowhere how long a text may be; expected model_max_length in tokenizer_config.json"
        )
    return min(found)


def _check_towers(layout: Layout, tower: ImageEncoder, hidden: int, where: str) -> None:
    """Raise CheckpointError unless texts and images come to vectors of one kind."""
    texts = output_width(layout, hidden), normalizes(layout)
    images = tower.dimension, tower.normalizes
    if texts != images:
        raise CheckpointError(
            f"{where}: expected vectors of one width from both towers, both normalised or neither; texts come to "
            f"{texts[0]} dimensions{' normalised' * texts[1]}, images to {images[0]}{' normalised' * images[1]}"
        )
