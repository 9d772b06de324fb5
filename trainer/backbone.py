"""The transformer and the tokenizer of a checkpoint, loaded through transformers and checked.

transformers goes on with random weights where a checkpoint's are misspelt and with an empty vocabulary where the
tokenizer's files are missing. Here each of these is an error that names what is wrong.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from torch import Tensor, nn

from rtx.runtime.contract import GraphInput
from rtx.runtime.errors import CheckpointError
from rtx.trainer.json_files import read_object, typed
from rtx.trainer.layout import Layout

# What `from_pretrained` raises for a checkpoint that it cannot use.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError)
# Where older processors of images and texts keep their chat template; they prefer it to the tokenizer's.
_PROCESSOR_TEMPLATE_FILE = "chat_template.json"
# What torch's allocator for the CPU guarantees.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk or on the Hugging Face hub.

    Attributes:
        name: the folder, or the repository's name.
        folder: where its JSON files lie on this machine.
        revision: the repository's commit; None for a folder.
    """

    name: str
    folder: Path
    revision: str | None = None

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Source:
        """Find a checkpoint; the small files of one on the hub are fetched.

        Raises:
            CheckpointError: it is neither a folder nor a repository that can be fetched.
        """
        if Path(name).is_dir():
            return cls(name, Path(name))
        if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise CheckpointError(f"{name}: no such folder")
        try:
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=["*.json"]))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as broken:
            raise CheckpointError(
                f"{name}: neither a folder nor a repository that can be fetched: {_summary(broken)}"
            ) from broken
        return cls(name, folder, folder.name)

    def find(self, file: str) -> Path | None:
        """A file of the checkpoint; None if it does not have it."""
        if self.revision is None:
            path = self.folder / file
            return path if path.is_file() else None
        try:
            return Path(huggingface_hub.hf_hub_download(self.name, file, revision=self.revision))
        except EntryNotFoundError:
            return None

    def arguments(self, layout: Layout) -> dict[str, Any]:
        """What tells `from_pretrained` where to look."""
        return {"revision": self.revision, "subfolder": layout.backbone_folder}

    def path_of(self, layout: Layout, file: str = "") -> str:
        """For messages."""
        return "/".join(part for part in (self.name.rstrip("/"), layout.backbone_folder, file) if part)


def load_backbone(
    source: Source,
    layout: Layout,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """The transformer: without a head for an embedder, with one logit or a language model's head for a reranker. In
    evaluation mode.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing, left over or of another shape.
    """
    location = {**source.arguments(layout), "trust_remote_code": trust_remote_code}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source.name, **{**layout.config_kwargs, **location})
            _check_config(config, source, layout)
            # The cache is for generation. Of a model of images it is the language model that has one.
            for part in (config, config.get_text_config()):
                if hasattr(part, "use_cache"):
                    part.use_cache = False
            if layout.new_classifier:
                config.num_labels = 1
            loader = _loader(layout)
            options = {**layout.model_kwargs, **location, "config": config, "dtype": dtype}
            if attn_implementation is not None:
                options["attn_implementation"] = attn_implementation
            # Weights of another shape are told with the other ones that do not fit, by _check_weights.
            options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
            backbone, info = loader.from_pretrained(source.name, **options)
    except _LOADING_ERRORS as broken:
        raise CheckpointError(f"{source.path_of(layout)}: transformers cannot load it: {_summary(broken)}") from broken
    _check_images(backbone, source, layout)
    _check_weights(backbone, info, source, layout)
    _align(backbone)
    return backbone.eval()


def load_image_backbone(
    source: Source, folder: str, *, dtype: torch.dtype, trust_remote_code: bool = False, attn_implementation: str | None
) -> Any:
    """The transformer of an image tower, in evaluation mode.

    Args:
        source: the checkpoint.
        folder: the transformer's folder in it.
        dtype: of the weights.
        trust_remote_code, attn_implementation: as for `load_backbone`.

    Raises:
        CheckpointError: it cannot be loaded, its weights are not whole, or it takes no images.
    """
    layout = Layout(task="embed", backbone_folder=folder)
    location = {**source.arguments(layout), "trust_remote_code": trust_remote_code}
    options: dict[str, Any] = {**location, "dtype": dtype, "ignore_mismatched_sizes": True, "output_loading_info": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with _quiet():
            backbone, info = transformers.AutoModel.from_pretrained(source.name, **options)
    except _LOADING_ERRORS as broken:
        raise CheckpointError(f"{source.path_of(layout)}: transformers cannot load it: {_summary(broken)}") from broken
    kind = backbone.config.model_type
    if backbone.main_input_name != "pixel_values":
        raise CheckpointError(f"{source.path_of(layout)}: {kind} is no model of images alone")
    if not isinstance(getattr(backbone.config, "hidden_size", None), int):
        raise CheckpointError(f"{source.path_of(layout)}: {kind} has no hidden_size; expected a vision transformer")
    _check_weights(backbone, info, source, layout)
    _align(backbone)
    return backbone.eval()


def hidden_size(backbone: Any, layout: Layout) -> int:
    """Width of the backbone's token vectors, or of the vectors that a dual encoder gives."""
    config = backbone.config
    if not layout.features:
        return int(config.get_text_config().hidden_size)
    width = getattr(config, "projection_dim", None)
    return int(width or getattr(config.text_config, "projection_size", None) or config.text_config.hidden_size)


def _loader(layout: Layout) -> Any:
    if layout.task == "embed":
        return transformers.AutoModel
    if layout.is_language_model:
        return transformers.AutoModelForImageTextToText if layout.images else transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


def _align(module: nn.Module) -> None:
    """Move weights that lie in a mapped file, at any offset, to where an allocator would have put them.

    Matrix kernels take other paths for unaligned memory and round differently there: without this a model that was
    saved and loaded again need not give the same bits.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.data_ptr() % _ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()


def _check_config(config: Any, source: Source, layout: Layout) -> None:
    where = source.path_of(layout, "config.json")
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{where}: {config.model_type} is an encoder-decoder; expected an encoder or a decoder")
    if not isinstance(getattr(config.get_text_config(), "hidden_size", None), int):
        raise CheckpointError(f"{where}: {config.model_type} has no hidden_size; expected a model of texts")
    classifies = layout.task == "rerank" and not layout.is_language_model and not layout.new_classifier
    if classifies and config.num_labels != 1:
        raise CheckpointError(f"{where}: expected a reranker with one label, got {config.num_labels} labels")


def _check_images(backbone: Any, source: Source, layout: Layout) -> None:
    """Raise CheckpointError for a model that takes images in another way than those that are known here."""
    where = source.path_of(layout, "config.json")
    if layout.features and not all(hasattr(backbone, f"get_{kind}_features") for kind in ("text", "image")):
        raise CheckpointError(
            f"{where}: {backbone.config.model_type} is no dual encoder; expected CLIP, SigLIP or the like, with "
            "features of texts and of images"
        )
    if layout.images and not layout.features:
        reads = inspect.signature(backbone.forward).parameters
        known = {"pixel_values", "image_grid_thw"} <= set(reads) and hasattr(backbone.config, "image_token_id")
        if not known:
            raise CheckpointError(
                f"{where}: {backbone.config.model_type} takes images in a way that is not supported; expected "
                "Qwen3-VL, Qwen2.5-VL or the like"
            )


def _check_weights(backbone: Any, info: Mapping[str, Any], source: Source, layout: Layout) -> None:
    prefix = f"{backbone.base_model_prefix}."
    inner = getattr(backbone, backbone.base_model_prefix, backbone)
    inner_names = {name for name, _ in inner.named_children()} | {name for name, _ in inner.named_parameters()}

    def inside(key: str) -> bool:
        """Whether a weight belongs to the transformer itself, and not to a head of some task."""
        return key.removeprefix(prefix).partition(".")[0] in inner_names

    def needed(key: str) -> bool:
        # The pooler is BERT's own pooling: an embedder never runs it, and a new classifier trains it.
        return inside(key) and not key.removeprefix(prefix).startswith("pooler.")

    missing = sorted(key for key in info["missing_keys"] if not (_starts_new(layout) and not needed(key)))
    unexpected = sorted(key for key in info["unexpected_keys"] if inside(key))
    mismatched = sorted(
        f"{key} ({list(found)}, not {list(expected)})" for key, found, expected in info["mismatched_keys"]
    )
    found = [
        f"{what}: {_shorten(keys)}"
        for what, keys in (("missing", missing), ("not of this model", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if found:
        raise CheckpointError(
            f"{source.path_of(layout)}: the weights are not those of {type(backbone).__name__} as config.json describes"
            f" it; {'; '.join(found)}"
        )


def _summary(error: BaseException, limit_characters: int = 400) -> str:
    """The beginning of a message, on one line: transformers may add a report or advice of many."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit_characters else f"{text[:limit_characters]}…"


def _starts_new(layout: Layout) -> bool:
    return layout.task == "embed" or layout.new_classifier


def _shorten(keys: list[str], shown: int = 8) -> str:
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + more


def load_tokenizer(source: Source, layout: Layout, *, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer, with `do_lower_case` applied and a padding token.

    Raises:
        CheckpointError: it is missing, cannot be loaded, or has no fast form.
    """
    where = source.path_of(layout)
    options = {**layout.tokenizer_kwargs, **source.arguments(layout), "trust_remote_code": trust_remote_code}
    has_fast_form = source.find(str(Path(layout.backbone_folder) / "tokenizer.json")) is not None
    try:
        with _quiet():
            tokenizer = _auto_tokenizer(source.name, options, has_fast_form=has_fast_form)
    except (*_LOADING_ERRORS, ImportError) as broken:
        raise CheckpointError(f"{where}: no tokenizer that transformers can load: {_summary(broken)}") from broken
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if not any(source.find(str(Path(layout.backbone_folder) / name)) for name in files):
        raise CheckpointError(f"{where}: the tokenizer is missing; expected one of {', '.join(files)}")
    if not tokenizer.is_fast:
        raise CheckpointError(f"{where}: {type(tokenizer).__name__} has no fast form; expected a tokenizer.json")
    if layout.images and (file := source.find(str(Path(layout.backbone_folder) / _PROCESSOR_TEMPLATE_FILE))):
        tokenizer.chat_template = typed(file, read_object(file) or {}, "chat_template", str)
    if layout.do_lower_case:
        _lowercase_first(tokenizer.backend_tokenizer)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"{where}: the tokenizer has neither a padding token nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _auto_tokenizer(name: str, options: Mapping[str, Any], *, has_fast_form: bool) -> Any:
    """As transformers chooses it, but a class that needs sentencepiece (SigLIP's) gives way to tokenizer.json."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except ImportError:
        if not has_fast_form:
            raise
    else:
        if tokenizer.is_fast or not has_fast_form:
            return tokenizer
    return transformers.PreTrainedTokenizerFast.from_pretrained(name, **options)


def _lowercase_first(backend: Tokenizer) -> None:
    normalizer = backend.normalizer
    steps: list[Any] = []
    if normalizer is not None:
        steps = [*cast(Any, normalizer)] if isinstance(normalizer, NormalizerSequence) else [normalizer]
    if not any(isinstance(step, Lowercase) for step in steps):
        backend.normalizer = NormalizerSequence([Lowercase(), *steps])


def tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as transformers runs it, as the content of a tokenizer.json without padding and truncation."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str())


def graph_inputs(backbone: Any, tokenizer: Any, layout: Layout) -> tuple[GraphInput, ...]:
    """The inputs that the backbone reads and the tokenizer gives."""
    if layout.features:
        # SigLIP attends to its padding, and is told so by a tokenizer that gives no mask.
        return ("input_ids", "attention_mask") if "attention_mask" in tokenizer.model_input_names else ("input_ids",)
    names: list[GraphInput] = ["input_ids", "attention_mask"]
    reads = inspect.signature(backbone.forward).parameters
    # DeBERTa takes segment ids and ignores them unless it has embeddings for them.
    segments = getattr(backbone.config, "type_vocab_size", None) != 0
    if "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in reads and segments:
        names.append("token_type_ids")
    return tuple(names)


def position_limit(backbone: Any) -> int | None:
    """The number of positions that the backbone has embeddings for; None if it computes positions.

    RoBERTa and its kin count positions from behind the padding index: of 514 embeddings 512 can be used.
    """
    if hasattr(backbone, "get_text_features"):
        return getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    limits = [
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        for module in backbone.modules()
        if isinstance(table := getattr(module, "position_embeddings", None), nn.Embedding)
    ]
    return min(limits, default=None)


def depends_on_padding(backbone: Any, tokenizer: Any, layout: Layout) -> bool:
    """Whether a dual encoder's vector of a text is another one where the text is padded further.

    SigLIP's is: it takes the vector of the last token, padding or not. Such a model has seen texts of one length only.
    """
    ids = tokenizer("a")["input_ids"]
    with torch.no_grad(), eager_attention(backbone):
        alone, padded = (_features(backbone, tokenizer, layout, ids, padding) for padding in (0, 1))
    tolerance = 1e-4 if alone.dtype in (torch.float32, torch.float64) else 3e-2
    return not bool((alone - padded).abs().max() <= tolerance * alone.abs().max())


def _features(backbone: Any, tokenizer: Any, layout: Layout, ids: list[int], padding: int) -> Tensor:
    empty, zeros = [tokenizer.pad_token_id] * padding, [0] * padding
    left = tokenizer.padding_side == "left"
    rows = {
        "input_ids": empty + ids if left else ids + empty,
        "attention_mask": zeros + [1] * len(ids) if left else [1] * len(ids) + zeros,
    }
    batch = {name: torch.tensor([rows[name]]) for name in graph_inputs(backbone, tokenizer, layout)}
    features: Tensor = backbone.get_text_features(**batch).pooler_output
    return features


@contextlib.contextmanager
def eager_attention(backbone: Any) -> Iterator[None]:
    """Runs where other implementations of attention would need a GPU."""
    chosen = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.set_attn_implementation(chosen)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report on weights, which is checked here instead."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_backbone(backbone: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write config.json and the weights, by the names of a backbone without adapters."""
    with _quiet():
        backbone.save_pretrained(folder, state_dict=dict(state))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files."""
    with _quiet():
        tokenizer.save_pretrained(folder)


def input_embeddings(backbone: Any) -> Any:
    """The table of token embeddings."""
    # transformers asks a dual encoder as a whole, and does not know which tower is meant.
    return getattr(backbone, "text_model", backbone).get_input_embeddings()


def check_vocabulary(backbone: Any, tokenizer: Any, where: str) -> None:
    """Raise CheckpointError if the tokenizer gives ids that the backbone has no embedding for."""
    largest, rows = max(_ids(tokenizer), default=0), input_embeddings(backbone).num_embeddings
    if largest >= rows:
        raise CheckpointError(f"{where}: the tokenizer gives ids up to {largest}, but the model has {rows} embeddings")


def _ids(tokenizer: Any) -> Iterable[int]:
    ids: Iterable[int] = tokenizer.get_vocab().values()
    return ids
