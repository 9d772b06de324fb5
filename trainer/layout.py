"""A retrieval model but for its weights and its tokenizer: what is pooled, what follows, how it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rtx.runtime.contract import Activation, Pooling, Similarity, Task

_EMBEDDING = "sentence_embedding"

MessageFormat = Literal["flat", "structured", "auto"]
"""How a chat template takes the content of a message: as a text, or as a list of parts; "auto" for what it carries."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """`config.json` of a Dense module; `activation_function` is the dotted name of a class of torch.nn."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False
    module_input_name: str = _EMBEDDING
    module_output_name: str | None = _EMBEDDING

    def __post_init__(self) -> None:
        _check_names(self.module_input_name, self.module_output_name)


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """`config.json` of a Normalize module."""

    module_input_name: str = _EMBEDDING
    module_output_name: str | None = _EMBEDDING

    def __post_init__(self) -> None:
        _check_names(self.module_input_name, self.module_output_name)


@dataclass(frozen=True, kw_only=True)
class HeadModule:
    """A link of the chain after pooling, and the folder that holds it."""

    config: DenseConfig | NormalizeConfig
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class LogitScoreConfig:
    """`config.json` of a LogitScore module: logit of the true token, less that of the false one if it is not None."""

    true_token_id: int
    false_token_id: int | None = None
    module_input_name: str = "causal_logits"

    def __post_init__(self) -> None:
        if self.module_input_name != "causal_logits":
            raise ValueError(f"module_input_name: expected causal_logits, got {self.module_input_name}")


@dataclass(frozen=True, kw_only=True)
class ImageTower:
    """What turns images into vectors in a model that has a tower for each modality (a Router).

    Attributes:
        folder: where its transformer and image processor lie in the checkpoint.
        pooling: modes.
        pooling_dimension: width that the pooling module expects of the transformer; None if it does not say.
        head: what follows pooling, in order.
    """

    folder: str
    pooling: tuple[Pooling, ...]
    pooling_dimension: int | None = None
    head: tuple[HeadModule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A checkpoint's Sentence Transformers side.

    Attributes:
        task: "embed" or "rerank".
        backbone_folder: where the transformer and the tokenizer lie in the checkpoint; "" for its root.
        new_classifier: the reranker's classification head is not in the checkpoint and starts at random.
        logit_score: the tokens that a causal language model is scored by, as a reranker; None for any other model.
        new_logit_score: the checkpoint is such a language model and does not say by which tokens; loading settles it.
        message_format: a reranker's pairs go through the tokenizer's chat template, as messages of the roles query and
            document, or an embedder's items, as messages of the role user; None if nothing goes through a template.
            "auto" is settled by loading.
        chat_template_kwargs: variables of the chat template.
        images: whether the transformer takes images beside texts.
        features: whether the transformer is a dual encoder (CLIP, SigLIP) that pools by itself: texts go through its
            get_text_features, images through its get_image_features.
        image_tower: of a Router, where images have a transformer of their own; None for any other model.
        fixed_tokens: every text is padded to this length; 0 for no such length.
        pooling: modes of an embedder; empty for a dual encoder.
        pooling_dimension: width that the pooling module expects of the backbone; None if it does not say.
        include_prompt: False if pooling leaves out the prompt.
        head: what follows pooling, in order.
        max_tokens: limit on length; None for the tokenizer's and the backbone's own.
        do_lower_case: lowercase before the tokenizer, whatever it does by itself.
        prompts, default_prompt: texts put before items, by name.
        similarity: how vectors are compared.
        truncate_dim: the Matryoshka cut; None for none.
        activation: what turns a reranker's logit into its score.
        first_stage_weight: what a reranker adds to its logit for each unit of the first stage's score.
        model_kwargs, tokenizer_kwargs, config_kwargs: passed to `from_pretrained`.
    """

    task: Task
    backbone_folder: str = ""
    new_classifier: bool = False
    logit_score: LogitScoreConfig | None = None
    new_logit_score: bool = False
    message_format: MessageFormat | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    images: bool = False
    features: bool = False
    image_tower: ImageTower | None = None
    fixed_tokens: int = 0
    pooling: tuple[Pooling, ...] = ()
    pooling_dimension: int | None = None
    include_prompt: bool = True
    head: tuple[HeadModule, ...] = ()
    max_tokens: int | None = None
    do_lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: Similarity = "cosine"
    truncate_dim: int | None = None
    activation: Activation = "identity"
    first_stage_weight: float = 0.0
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    config_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_language_model(self) -> bool:
        """Whether the reranker is a causal language model that is scored by the logits of its tokens."""
        return self.new_logit_score or self.logit_score is not None

    @property
    def takes_images(self) -> bool:
        return self.images or self.image_tower is not None

    @property
    def prompt(self) -> str:
        """Text of the default prompt; "" for none."""
        return self.prompts.get(self.default_prompt, "") if self.default_prompt is not None else ""


def _check_names(*names: str | None) -> None:
    wrong = [name for name in names if name not in (None, _EMBEDDING)]
    if wrong:
        raise ValueError(
            f"module_input_name, module_output_name: expected {_EMBEDDING}, got {', '.join(map(str, wrong))}"
        )
