"""Complete bundles around a hand-made graph: no torch, no weights, built in a fraction of a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from rtx.runtime.contract import Contract
from rtx.runtime.golden import Golden, tokenize
from rtx.runtime.manifest import (
    CONTRACT_KEY,
    FORMAT_VERSION,
    GOLDEN_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Manifest,
    Provenance,
    Tolerance,
    Variant,
)
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

_DIMENSION = 32
_MAX_TOKENS = 64
_WORDS = """
a and array boil broken button calibrate cat check clean code coffee connect copy cup data delete device dog
error file filter find fish for function grind hold how i image in index is it key light list load lost machine make
manual map menu model motor my name of off oil on open paper parse path pump read red replace reset return run save
search send set sort start steam step stop string table tank text the then time to tree turn update user valve water
what when where why with write
"""


# Of the report that an export writes, what the runtime reads.
_REPORT = {
    "verdicts": {
        "fp32": {"parity": {"mean_cosine": 1.0, "min_cosine": 1.0, "max_abs": 9e-08, "worst": 4}, "ranking": None},
        "int8": {
            "parity": {"mean_cosine": 0.99998, "min_cosine": 0.999968, "max_abs": 0.0032, "worst": 3},
            "ranking": {"k": 10, "difference": -0.0012, "interval": [-0.003, 0.0006], "confidence": 0.95},
        },
    }
}


@dataclass(frozen=True)
class Toy:
    """The weights of the hand-made model, and the model itself in numpy: the reference that graphs are held against."""

    tokens: NDArray[np.float32]
    types: NDArray[np.float32]
    positions: NDArray[np.float32]

    def embed(self, item: Encoded) -> NDArray[np.float64]:
        """[dimension], norm 1: the mean over all tokens that do not belong to a prompt left out."""
        pooled = self._hidden(item)[item.prompt_tokens :].mean(axis=0)
        return np.asarray(pooled / np.linalg.norm(pooled))

    def score(self, item: Encoded) -> float:
        """The dot product of the means over the first and the second segment."""
        hidden, second = self._hidden(item), np.array(item.type_ids) == 1
        return float(hidden[~second].mean(axis=0) @ hidden[second].mean(axis=0))

    def _hidden(self, item: Encoded) -> NDArray[np.float64]:
        total = self.tokens[item.ids] + self.types[item.type_ids] + self.positions[: len(item.ids)]
        return np.tanh(total.astype(np.float64))


@pytest.fixture(scope="session")
def toy_tokenizer() -> str:
    """tokenizer.json of a WordPiece tokenizer: some words, and every letter, so that few characters are unknown."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"?!.,:;()[]{}=+-*/_<>'\"", *letters, *(f"##{c}" for c in letters)]
    pieces += [word for word in _WORDS.split() if len(word) > 1]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def toy_model(toy_tokenizer: str) -> Toy:
    random = np.random.default_rng(7)
    size = Tokenizer.from_str(toy_tokenizer).get_vocab_size()
    # Positions are small beside tokens: order matters, and texts that share words are still near to each other.
    return Toy(
        tokens=random.normal(size=(size, _DIMENSION)).astype(np.float32),
        types=0.05 * random.normal(size=(2, _DIMENSION)).astype(np.float32),
        positions=0.2 * random.normal(size=(_MAX_TOKENS, _DIMENSION)).astype(np.float32),
    )


@pytest.fixture(scope="session")
def embed_contract() -> Contract:
    return Contract(
        task="embed",
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        max_tokens=_MAX_TOKENS,
        pad_token_id=0,
        pooling=("mean",),
        dimension=_DIMENSION,
        normalize=True,
        prompts={"query": "find code: ", "document": "code: "},
    )


@pytest.fixture(scope="session")
def rerank_contract() -> Contract:
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return Contract(task="rerank", inputs=inputs, max_tokens=_MAX_TOKENS, pad_token_id=0)


@pytest.fixture(scope="session")
def write_bundle(toy_model: Toy, toy_tokenizer: str) -> Callable[[Path, Contract], Path]:
    """Writes a bundle of a contract's task into a new folder: variants fp32 (default) and int8."""
    return lambda folder, contract: _write_bundle(folder, contract, toy_model, toy_tokenizer)


@pytest.fixture(scope="session")
def toy_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    write_bundle: Callable[[Path, Contract], Path],
    embed_contract: Contract,
) -> Path:
    """An embedder: dimension 32, at most 64 tokens, prompts "query" and "document". Read-only: copy it to change it."""
    return write_bundle(tmp_path_factory.mktemp("toy") / "toy.rtx", embed_contract)


@pytest.fixture(scope="session")
def toy_reranker_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    write_bundle: Callable[[Path, Contract], Path],
    rerank_contract: Contract,
) -> Path:
    """A reranker: documents that share words with the query score higher. Read-only: copy it to change it."""
    return write_bundle(tmp_path_factory.mktemp("toy") / "toy-reranker.rtx", rerank_contract)


def _write_bundle(folder: Path, contract: Contract, toy: Toy, tokenizer_json: str) -> Path:
    preprocessor = Preprocessor(contract, tokenizer_json)
    files = {
        "onnx/model.onnx": _graph(toy, contract, int8=False),
        "onnx/model_int8.onnx": _graph(toy, contract, int8=True),
        TOKENIZER_FILE: tokenizer_json.encode(),
        GOLDEN_FILE: _golden(toy, preprocessor).to_bytes(),
        "report.json": json.dumps(_REPORT).encode(),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=folder.stem,
        contract=contract,
        variants={
            "fp32": Variant(file="onnx/model.onnx", precision="fp32", tolerance=_tolerance(1e-6, 1e-5)),
            "int8": Variant(file="onnx/model_int8.onnx", precision="int8", tolerance=_tolerance(1e-2, 0.05)),
        },
        default_variant="fp32",
        files={name: FileEntry(sha256=hashlib.sha256(c).hexdigest(), bytes=len(c)) for name, c in files.items()},
        provenance=Provenance(
            source="toy",
            source_sha256="0" * 64,
            created="2026-01-01T00:00:00Z",
            command="rtx export toy -o toy.rtx",
            versions={"rtx": "0.1.0"},
        ),
        rejected={"fp16": "NDCG@10 fell by 0.0100, more than 0.0050"},
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return folder


def _tolerance(cosine: float, max_abs: float) -> Tolerance:
    return Tolerance(min_cosine=1 - cosine, max_abs=max_abs)


def _golden(toy: Toy, preprocessor: Preprocessor) -> Golden:
    long = " ".join(_WORDS.split())
    items: Sequence[Any]
    prompts: tuple[str | None, ...]
    if preprocessor.contract.task == "embed":
        items = ("how do i reset the device?", "", "parse a file", "Sort THE list", long, "Größe 東京 \U0001f600", "x")
        prompts = ("query", None, "document", None, "query", "document", None)
    else:
        items = (("reset device", "hold the button"), ("sort", "sort the list"), ("", "x"), ("find text", long))
        prompts = (None,) * len(items)
    tokens = [item for item in tokenize(preprocessor, items, prompts) if isinstance(item, Encoded)]
    outputs = [toy.embed(t) if preprocessor.contract.task == "embed" else toy.score(t) for t in tokens]
    return Golden(tuple(items), prompts, tuple(tokens), np.array(outputs, dtype=np.float32))


def _graph(toy: Toy, contract: Contract, *, int8: bool) -> bytes:
    """The toy as an ONNX graph; int8 stores the token table as int8 with a scale a row."""
    weights: dict[str, NDArray[Any]] = {
        "types": toy.types,
        "positions": toy.positions,
        "one": np.array(1, dtype=np.int64),
        "zero": np.array(0, dtype=np.int64),
        "axis_tokens": np.array(1, dtype=np.int64),
        "axes_tokens": np.array([1], dtype=np.int64),
        "axes_last": np.array([-1], dtype=np.int64),
    }
    if int8:
        scale = np.abs(toy.tokens).max(axis=1, keepdims=True) / 127
        weights |= {"tokens": np.rint(toy.tokens / scale).astype(np.int8), "scale": scale}
        look_up = [
            helper.make_node("Gather", ["tokens", "input_ids"], ["quantized"]),
            helper.make_node("Cast", ["quantized"], ["rounded"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["scale", "input_ids"], ["row_scale"]),
            helper.make_node("Mul", ["rounded", "row_scale"], ["token"]),
        ]
    else:
        weights["tokens"] = toy.tokens
        look_up = [helper.make_node("Gather", ["tokens", "input_ids"], ["token"])]
    nodes = [
        *look_up,
        helper.make_node("Gather", ["types", "token_type_ids"], ["type"]),
        # Positions count attended tokens, so that padding on either side leaves them as they are.
        helper.make_node("CumSum", ["attention_mask", "axis_tokens"], ["count"]),
        helper.make_node("Sub", ["count", "one"], ["from_zero"]),
        helper.make_node("Max", ["from_zero", "zero"], ["position_ids"]),
        helper.make_node("Gather", ["positions", "position_ids"], ["position"]),
        helper.make_node("Sum", ["token", "type", "position"], ["total"]),
        helper.make_node("Tanh", ["total"], ["hidden"]),
    ]
    if contract.task == "embed":
        mask = "attention_mask" if contract.include_prompt else "pooling_mask"
        nodes += [
            *_masked_mean(mask, "pooled"),
            helper.make_node("ReduceL2", ["pooled", "axes_last"], ["norm"]),
            helper.make_node("Div", ["pooled", "norm"], [contract.output]),
        ]
        shape = ["batch", contract.dimension]
    else:
        nodes += [
            helper.make_node("Mul", ["attention_mask", "token_type_ids"], ["second_mask"]),
            helper.make_node("Sub", ["attention_mask", "second_mask"], ["first_mask"]),
            *_masked_mean("first_mask", "first"),
            *_masked_mean("second_mask", "second"),
            helper.make_node("Mul", ["first", "second"], ["product"]),
            helper.make_node("ReduceSum", ["product", "axes_last"], [contract.output], keepdims=0),
        ]
        shape = ["batch"]
    return _serialized(nodes, weights, contract, shape)


def _masked_mean(mask: str, out: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [mask], [f"{out}_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", [f"{out}_float", "axes_last"], [f"{out}_weights"]),
        helper.make_node("Mul", ["hidden", f"{out}_weights"], [f"{out}_kept"]),
        helper.make_node("ReduceSum", [f"{out}_kept", "axes_tokens"], [f"{out}_sum"], keepdims=0),
        helper.make_node("ReduceSum", [f"{out}_weights", "axes_tokens"], [f"{out}_count"], keepdims=0),
        helper.make_node("Div", [f"{out}_sum", f"{out}_count"], [out]),
    ]


def _serialized(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, NDArray[Any]],
    contract: Contract,
    shape: Sequence[str | int],
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"]) for name in contract.inputs],
        [helper.make_tensor_value_info(contract.output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {CONTRACT_KEY: json.dumps(contract.to_dict())})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
