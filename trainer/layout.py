"""A retrieval model but for its weights and its tokenizer: what is pooled, what follows, how it is used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rtx.runtime.contract import Activation, Pooling, Similarity, Task

_EMBEDDING = "sentence_embedding"


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
class Layout:
    """A checkpoint's Sentence Transformers side.

    Attributes:
        task: "embed" or "rerank".
        backbone_folder: where the transformer and the tokenizer lie in the checkpoint; "" for its root.
        new_classifier: the reranker's classification head is not in the checkpoint and starts at random.
        pooling: modes of an embedder.
        pooling_dimension: width that the pooling module expects of the backbone; None if it does not say.
        include_prompt: False if pooling leaves out the prompt.
        head: what follows pooling, in order.
        max_tokens: limit on length; None for the tokenizer's and the backbone's own.
        do_lower_case: lowercase before the tokenizer, whatever it does by itself.
        prompts, default_prompt: texts put before items, by name.
        similarity: how vectors are compared.
        truncate_dim: the Matryoshka cut; None for none.
        activation: what turns a reranker's logit into its score.
        model_kwargs, tokenizer_kwargs, config_kwargs: passed to `from_pretrained`.
    """

    task: Task
    backbone_folder: str = ""
    new_classifier: bool = False
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
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    config_kwargs: dict[str, Any] = field(default_factory=dict)


def _check_names(*names: str | None) -> None:
    wrong = [name for name in names if name not in (None, _EMBEDDING)]
    if wrong:
        raise ValueError(
            f"module_input_name, module_output_name: expected {_EMBEDDING}, got {', '.join(map(str, wrong))}"
        )
