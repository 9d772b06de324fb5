"""The contract: the input side of a model frozen as data, and what its output means.

Trainer, export gate and server read the same contract and preprocess with the same code (`rtx.runtime.preprocessor`),
so that a template, a truncation, a prompt or the size of an image cannot differ between them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rtx.runtime.errors import BundleError, RtxError, UsageError, nearest
from rtx.runtime.image_rules import ImageRules
from rtx.runtime.schema import parse
from rtx.runtime.visual_tokens import VisualTokens

Task = Literal["embed", "rerank"]
Side = Literal["left", "right"]
Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
Activation = Literal["identity", "sigmoid"]
GraphInput = Literal["input_ids", "attention_mask", "token_type_ids", "pooling_mask"]

OUTPUT_OF_TASK: dict[Task, str] = {"embed": "sentence_embedding", "rerank": "scores"}


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a caller has to put into the graph and what comes out.

    Attributes:
        task: "embed" (one vector an item) or "rerank" (one score a query–document pair).
        inputs: names of the graph's inputs, each [batch, tokens] int64. `pooling_mask` is there only where pooling
            leaves out the prompt.
        max_tokens: longest row, special tokens included. Truncation cuts content, never special tokens, so that the
            pooled token stays.
        padding_side, pad_token_id, pad_token_type_id: how shorter rows of a batch are filled.
        template: special tokens around an item by their ids, "101 $A 102", or of a pair "101 $A 102 $B:1 102:1" with
            segment ids other than 0 behind a colon; of a rendered pair all its fixed tokens; "" if it was not recorded.
        fixed_tokens: every row is padded to this length; 0 where a batch is as long as its longest row.
        rendered: what a chat template makes of a pair, with the default prompt in it: the texts before the query,
            between query and document, and behind the document; of an embedder's item without a prompt: the texts
            before and behind it. The whole is tokenised as one text, and no special tokens are added to it. Empty where
            there is no chat template.
        rendered_prompt: what stands before an embedder's item where there is a prompt: the texts around the prompt.
        rendered_image: what a chat template writes for an image, each before the text of its item.
        strip_sides: whether the chat template drops the whitespace around a text.
        images: how an image is prepared; None for a model that takes none.
        visual: how images become tokens among those of texts; None where an image becomes a vector by itself, in a
            graph of its own whose input is `pixel_values`.
        image_tokens: tokens that an image becomes inside such a graph, by which its cost is counted.
        pooling: modes, concatenated in this order; empty for a reranker.
        dimension: width of the output vector, after the Matryoshka cut; 1 for a reranker.
        normalize: whether the graph's vectors have L2 norm 1.
        similarity: how two vectors are compared.
        prompts: text put before an item, or into the chat template, by name. "query" and "document" always resolve, to
            "" if they are not here.
        default_prompt: name of the prompt used where the caller names none; None for no prompt.
        include_prompt: False if pooling leaves out the prompt's tokens.
        activation: what the graph already applied to the reranker's logit.
        first_stage_weight: what a reranker adds to its logit for each unit of the score that the first stage gave the
            document. It was trained to be added, so that it needs the first stage's scores; 0 for one that does not.
    """

    task: Task
    inputs: tuple[GraphInput, ...]
    max_tokens: int
    pad_token_id: int
    pad_token_type_id: int = 0
    padding_side: Side = "right"
    template: str = ""
    fixed_tokens: int = 0
    rendered: tuple[str, ...] = ()
    rendered_prompt: tuple[str, ...] = ()
    rendered_image: str = ""
    strip_sides: bool = False
    images: ImageRules | None = None
    visual: VisualTokens | None = None
    image_tokens: int = 0
    pooling: tuple[Pooling, ...] = ()
    dimension: int = 1
    normalize: bool = False
    similarity: Similarity = "cosine"
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    include_prompt: bool = True
    activation: Activation = "identity"
    first_stage_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")
        if self.dimension < 1:
            raise ValueError(f"dimension: expected at least 1, got {self.dimension}")
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            raise ValueError(f"default_prompt: '{self.default_prompt}' is not in prompts ({', '.join(self.prompts)})")
        self._check_rendered()
        if self.fixed_tokens and self.fixed_tokens < self.max_tokens:
            raise ValueError(
                f"fixed_tokens: expected 0 or at least max_tokens, {self.max_tokens}; got {self.fixed_tokens}"
            )
        if self.visual is not None and (self.images is None or not self.rendered_image):
            raise ValueError("visual: images have to be prepared and to have a place in the chat template")
        if not 0 <= self.first_stage_weight < math.inf:
            raise ValueError(f"first_stage_weight: expected a number of at least 0, got {self.first_stage_weight}")
        if self.first_stage_weight and (self.task != "rerank" or self.activation != "identity"):
            raise ValueError("first_stage_weight: only a reranker without activation adds to its logit")
        if ("pooling_mask" in self.inputs) == self.include_prompt:
            raise ValueError("inputs: pooling_mask has to be there if and only if include_prompt is false")

    def _check_rendered(self) -> None:
        parts, around_prompt = (3, 0) if self.task == "rerank" else (2, 2)
        found = len(self.rendered), len(self.rendered_prompt)
        if self.rendered and found != (parts, around_prompt):
            raise ValueError(
                f"rendered, rendered_prompt: expected {parts} and {around_prompt} texts of task {self.task}, got "
                f"{found[0]} and {found[1]}"
            )
        if self.rendered and not self.include_prompt:
            raise ValueError("include_prompt: a prompt inside a chat template is always pooled")

    @property
    def takes_images(self) -> bool:
        return self.images is not None

    @property
    def output(self) -> str:
        """Name of the graph's output: `sentence_embedding` [batch, dimension] or `scores` [batch], float32."""
        return OUTPUT_OF_TASK[self.task]

    def output_shape(self, rows: int) -> tuple[int, ...]:
        """Shape of the output of so many rows: (rows, dimension) of an embedder, (rows,) of a reranker."""
        return (rows, self.dimension) if self.task == "embed" else (rows,)

    def prompt_text(self, name: str | None) -> str:
        """The text of a named prompt, "" for none.

        Raises:
            UsageError: no prompt has that name.
        """
        if name is None:
            return self.prompts[self.default_prompt] if self.default_prompt is not None else ""
        if name in self.prompts:
            return self.prompts[name]
        if name in ("query", "document"):
            return ""
        raise UsageError(f"prompt '{name}' does not exist ({nearest(name, {*self.prompts, 'query', 'document'})})")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: object, *, source: str = "contract", error: type[RtxError] = BundleError) -> Contract:
        return parse(cls, data, source=source, error=error)
