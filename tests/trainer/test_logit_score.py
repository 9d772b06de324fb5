"""Causal language models that rerank by two tokens' logits, against sentence-transformers both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rtx.runtime.engine import Budget
from rtx.runtime.errors import CheckpointError
from rtx.runtime.reranker import Reranker
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

TOLERANCE = 1e-5
MODELS = ("qwen3-chat", "qwen3-plain")
TEXTS = [
    "how to list the files of a folder in code.",
    "The Model is for query text!",
    "s",
    "naïve café 日本語\n",
    "beyond the limit. " * 30,
    "",
    "  two  spaces\n\tnew line ",
    "2026",
]
PAIRS = [(query, document) for query in (*TEXTS[:4], TEXTS[7]) for document in TEXTS]

Tiny = Callable[..., Path]


def score(model: RetrievalModel, pairs: list[tuple[str, str]] = PAIRS, **options: Any) -> Any:
    return Reranker(model.preprocessor, model.engine(), **options).score(pairs)


def cross_encoder(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu")


def tensors(model: RetrievalModel, pairs: list[tuple[str, str]] = PAIRS) -> dict[str, torch.Tensor]:
    batch = model.preprocessor.collate(model.preprocessor.encode_pairs(pairs))  # type: ignore[arg-type]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def their_tokens(theirs: Any, pair: tuple[str, str], **options: Any) -> list[int]:
    return list(theirs[0].preprocess([pair], **options)["input_ids"][0].tolist())


def our_tokens(model: RetrievalModel, pair: tuple[str, str]) -> list[int]:
    (encoded,) = model.preprocessor.encode_pairs([pair])
    assert isinstance(encoded, Encoded)
    return encoded.ids


def copied(source: Path, target: Path, *, template: str | None = None, **config: Any) -> Path:
    """A copy with another chat template or other values in config.json."""
    shutil.copytree(source, target)
    if template is not None:
        (target / "chat_template.jinja").write_text(template)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


# ---------------------------------------------------------------- both ways with sentence-transformers


@pytest.mark.parametrize(("architecture", "activation"), [("qwen3-chat", "sigmoid"), ("qwen3-plain", "identity")])
def test_both_ways(tiny_checkpoint: Tiny, tmp_path: Path, architecture: str, activation: str) -> None:
    ours = tiny_checkpoint(architecture, "rerank", activation=activation)
    model = RetrievalModel.load(ours)
    assert bool(model.contract.rendered) == (architecture == "qwen3-chat")
    scores = score(model)
    assert np.ptp(scores) > 0.3, "the pairs' scores differ, or the test shows nothing"

    theirs = cross_encoder(ours)
    np.testing.assert_allclose(theirs.predict(PAIRS), scores, atol=TOLERANCE)
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    again = RetrievalModel.load(tmp_path / "theirs")
    np.testing.assert_allclose(score(again), scores, atol=TOLERANCE)
    # They pad causal models on the left.
    assert again.contract.padding_side == "left"
    names = [str(path.relative_to(tmp_path / "theirs")) for path in (tmp_path / "theirs").rglob("*") if path.is_file()]
    assert "1_LogitScore/config.json" in names
    for name in names:
        if name.endswith(".json") and not name.startswith("token"):
            mine, other = (json.loads((folder / name).read_text()) for folder in (ours, tmp_path / "theirs"))
            for written in (mine, other):
                if isinstance(written, dict):
                    written.pop("__version__", None)
            assert mine == other, name


@pytest.mark.parametrize("architecture", MODELS)
def test_a_bare_language_model_starts_as_theirs(tiny_checkpoint: Tiny, architecture: str) -> None:
    folder = tiny_checkpoint(architecture, "rerank", bare=True)
    model = RetrievalModel.load(folder, task="rerank")
    chosen = model.layout.logit_score
    assert chosen is not None
    vocabulary = model.tokenizer.get_vocab()
    assert (chosen.true_token_id, chosen.false_token_id) == (vocabulary["yes"], vocabulary["no"])
    assert model.contract.activation == "sigmoid"
    np.testing.assert_allclose(cross_encoder(folder).predict(PAIRS), score(model), atol=TOLERANCE)
    # As an embedder it is what it was before.
    assert RetrievalModel.load(folder).contract.pooling == ("lasttoken",)


def test_one_token_alone_is_its_logit(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny_checkpoint("qwen3-chat", "rerank", activation="identity"), tmp_path / "one")
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": 40}))
    model = RetrievalModel.load(folder)
    np.testing.assert_allclose(cross_encoder(folder).predict(PAIRS), score(model), atol=TOLERANCE)
    model.save(tmp_path / "again")
    np.testing.assert_array_equal(score(RetrievalModel.load(tmp_path / "again")), score(model))


def test_the_default_prompt_is_the_system_message(tiny_checkpoint: Tiny) -> None:
    prompts = {"judge": "Find the code of the query."}
    folder = tiny_checkpoint("qwen3-chat", "rerank", prompts=prompts, default_prompt="judge")
    model, theirs = RetrievalModel.load(folder), cross_encoder(folder)
    np.testing.assert_allclose(theirs.predict(PAIRS), score(model), atol=TOLERANCE)
    assert "<I>: Find the code of the query.\n<Q>: " in model.contract.rendered[0]
    model.configure(default_prompt=None)
    assert "<I>: the query\n<Q>: " in model.contract.rendered[0]
    theirs.default_prompt_name = None
    np.testing.assert_allclose(theirs.predict(PAIRS), score(model), atol=TOLERANCE)


FIRST = "{{ (messages | selectattr('role', 'eq', '%s') | first).content[0].text%s }}"
TEMPLATES = {
    "messages as lists of parts": f"Q: {FIRST % ('query', '')}\nD: {FIRST % ('document', '')}\nyes?",
    "whitespace dropped": f"Q: {FIRST % ('query', ' | trim')}\nD: {FIRST % ('document', ' | trim')}\nyes?",
    "roles passed through": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("bare", [True, False])
def test_chat_templates_of_all_kinds(tiny_checkpoint: Tiny, tmp_path: Path, template: str, bare: bool) -> None:
    source = tiny_checkpoint("qwen3-chat", "rerank", bare=True)
    folder = copied(source, tmp_path / "bare", template=TEMPLATES[template])
    if not bare:
        # With variables of the template, which a bare folder has none of.
        theirs = cross_encoder(folder)
        theirs[0].processing_kwargs = {"chat_template": {"add_generation_prompt": True}}
        theirs.save(str(tmp_path / "saved"))
        folder = tmp_path / "saved"
    model = RetrievalModel.load(folder, task="rerank")
    assert model.contract.strip_sides == (template == "whitespace dropped")
    theirs = cross_encoder(folder)
    for pair in PAIRS:
        assert our_tokens(model, pair) == their_tokens(theirs, pair)
    np.testing.assert_allclose(theirs.predict(PAIRS), score(model), atol=TOLERANCE)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(cross_encoder(tmp_path / "ours").predict(PAIRS), score(model), atol=TOLERANCE)


def test_a_classifier_with_a_chat_template(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """As the published Qwen3-Reranker that was turned into a sequence classifier."""
    folder = copied(tiny_checkpoint("qwen3", "rerank"), tmp_path / "bare", template=TEMPLATES["whitespace dropped"])
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    model = RetrievalModel.load(folder)
    assert model.contract.rendered
    pairs = [pair for pair in PAIRS if len(pair[0] + pair[1]) < 40]
    assert len(pairs) > 10
    np.testing.assert_allclose(cross_encoder(folder).predict(pairs), score(model, pairs), atol=TOLERANCE)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(cross_encoder(tmp_path / "ours").predict(pairs), score(model, pairs), atol=TOLERANCE)
    # A template that knows no pairs is not asked.
    (folder / "chat_template.jinja").write_text("{{ messages[0].role }}")
    assert RetrievalModel.load(folder).contract.rendered == ()


# ---------------------------------------------------------------- tokens


def test_tokens_are_theirs_wherever_the_document_alone_is_cut(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("qwen3-chat", "rerank")
    model, theirs = RetrievalModel.load(folder), cross_encoder(folder)
    for pair in PAIRS:
        assert our_tokens(model, pair) == their_tokens(theirs, pair)
    assert len(our_tokens(model, PAIRS[4])) == model.contract.max_tokens


@pytest.mark.parametrize("architecture", MODELS)
def test_truncation_keeps_the_template_and_some_of_both_sides(tiny_checkpoint: Tiny, architecture: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, "rerank"))
    special = len(our_tokens(model, ("", "")))
    model.configure(max_tokens=special + 10)
    ids = our_tokens(model, ("the query of a file " * 50, "a code " * 50))
    assert len(ids) == special + 10
    fixed = [part.split() for part in model.contract.template.replace("$B:1", "$B").split("$")]
    behind = [int(token.partition(":")[0]) for token in fixed[-1][1:]]
    assert ids[-len(behind) :] == behind
    assert behind, "there is something behind the document, or the test shows nothing"
    text = model.tokenizer.decode(ids)
    assert "the q" in text
    assert "a co" in text


def test_the_published_format_of_qwen3_reranker(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A language model whose chat template knows no queries and documents is given this one, and saved with it."""
    source = tiny_checkpoint("qwen3-chat", "rerank", bare=True)
    chatty = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    folder = copied(source, tmp_path / "chatty", template=chatty, max_position_embeddings=1024)
    model = RetrievalModel.load(folder, task="rerank")
    judge = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    expected = (
        f"<|im_start|>system\n{judge}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: ",
        "\n<Document>: ",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    )
    assert model.contract.rendered == expected
    model.save(tmp_path / "ours")
    theirs = cross_encoder(tmp_path / "ours")
    np.testing.assert_allclose(theirs.predict(PAIRS), score(model), atol=TOLERANCE)
    model.configure(prompts={"code": "Find the function."}, default_prompt="code")
    assert "<Instruct>: Find the function.\n<Query>: " in model.contract.rendered[0]
    prompted = theirs.predict(PAIRS, prompt="Find the function.")
    np.testing.assert_allclose(prompted, score(model), atol=TOLERANCE)


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_pair_alone_is_the_pair_in_a_batch(tiny_checkpoint: Tiny, architecture: str, side: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, "rerank"))
    model.tokenizer.padding_side = side
    model = RetrievalModel(model.backbone, model.tokenizer, [], layout=model.layout).eval()
    assert model.contract.padding_side == side
    together = score(model, budget=Budget(max_batch_tokens=100_000))
    alone = np.concatenate([score(model, [pair]) for pair in PAIRS])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    np.testing.assert_allclose(
        score(RetrievalModel.load(tiny_checkpoint(architecture, "rerank"))), alone, atol=TOLERANCE
    )


def test_no_logits_over_the_vocabulary_are_computed(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("qwen3-plain", "rerank"))
    called: list[object] = []
    model.backbone.get_output_embeddings().register_forward_hook(lambda *_: called.append(1))
    score(model, PAIRS[:2])
    model(tensors(model, PAIRS[:2]))
    assert not called


@pytest.mark.parametrize("architecture", MODELS)
def test_gradients_reach_the_rows_of_both_answers(tiny_checkpoint: Tiny, architecture: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, "rerank")).train()
    config, batch = model.layout.logit_score, tensors(model)
    assert config is not None
    weight = model.backbone.get_output_embeddings().weight
    assert (weight is model.backbone.get_input_embeddings().weight) == (architecture == "qwen3-chat")
    model(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert weight.grad is not None
    found = weight.grad.clone()
    # Less what flows through the embeddings, where they are the same matrix.
    model.zero_grad()
    hidden = model.encode_tokens(batch)
    direction, bias = model.score_direction()
    model.score_last_token(hidden, batch, direction.detach(), bias).sum().backward()
    found -= weight.grad if weight.grad is not None else 0.0
    last = torch.stack([row[count - 1] for row, count in zip(hidden, batch["attention_mask"].sum(dim=1), strict=True)])
    expected = torch.zeros_like(found)
    expected[config.true_token_id] = last.detach().sum(dim=0)
    expected[config.false_token_id] = -last.detach().sum(dim=0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("architecture", MODELS)
def test_what_was_trained_is_a_language_model(tiny_checkpoint: Tiny, tmp_path: Path, architecture: str) -> None:
    folder = tiny_checkpoint(architecture, "rerank", bare=True)
    model = RetrievalModel.load(folder, task="rerank").train()
    before = score(model)
    labels = torch.tensor([float(query == document) for query, document in PAIRS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(tensors(model)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = score(model.eval())
    assert np.abs(after - before).max() > 0.1
    model.save(tmp_path / "trained")
    np.testing.assert_allclose(cross_encoder(tmp_path / "trained").predict(PAIRS), after, atol=TOLERANCE)
    np.testing.assert_array_equal(score(RetrievalModel.load(tmp_path / "trained")), after)
    weights = load_file(tmp_path / "trained" / "model.safetensors")
    assert ("lm_head.weight" in weights) == (architecture == "qwen3-plain")
    language_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    trained = model.backbone.get_output_embeddings().weight
    assert torch.equal(language_model.get_output_embeddings().weight, trained)


def test_adapters_in_a_language_model(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from rtx.trainer.adapters import add_lora

    model = RetrievalModel.load(tiny_checkpoint("qwen3-plain", "rerank"))
    before = score(model)
    add_lora(model, rank=2, alpha=4)
    model.train()(tensors(model)).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    after = score(model.eval())
    assert np.abs(after - before).max() > 0.05
    model.save(tmp_path / "merged")
    np.testing.assert_allclose(cross_encoder(tmp_path / "merged").predict(PAIRS), after, atol=TOLERANCE)


def test_from_the_command_line(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Finetuned from a bare language model, exported, and served without PyTorch."""
    from click.testing import CliRunner

    from rtx.runtime.cli import main

    rows = [{"query": f"file {i}", "positive": f"the file {i}", "negative": f"a {i}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: object) -> None:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    base, tuned, bundle = tiny_checkpoint("qwen3-chat", "rerank", bare=True), tmp_path / "tuned", tmp_path / "tuned.rtx"
    options = ("--batch-size", 4, "--epochs", 1, "--threads", 1, "--learning-rate", 1e-3)
    run("finetune", "--task", "rerank", "--model", base, "--train", tmp_path / "train.jsonl", "-o", tuned, *options)
    run("export", tuned, "-o", bundle, "--threads", 1)
    run("verify", bundle, "--threads", 1)
    model = RetrievalModel.load(tuned)
    scores = score(model)
    assert np.abs(scores - score(RetrievalModel.load(base, task="rerank"))).max() > 1e-3
    with Reranker.open(bundle, threads=1) as reranker:
        assert reranker.contract == model.contract
        np.testing.assert_allclose(reranker.score(PAIRS), scores, atol=TOLERANCE)


def test_half_precision_scores_in_float32(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("qwen3-chat", "rerank")
    low, model = RetrievalModel.load(folder, dtype=torch.bfloat16), RetrievalModel.load(folder)
    found = low(tensors(low))
    assert found.dtype == torch.float32
    # bfloat16 has 8 bits: some rounding errors of 2^-8 relative, by two layers.
    np.testing.assert_allclose(score(low), score(model), atol=16 * 2.0**-8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = model(tensors(model))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.to(torch.bfloat16).float())


# ---------------------------------------------------------------- what is refused


def test_a_tokenizer_without_yes_and_no(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("qwen3", bare=True)
    with pytest.raises(
        CheckpointError, match=r"the tokenizer has no single token for yes and no; expected both"
    ) as caught:
        RetrievalModel.load(folder, task="rerank")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1].content }}", "expected the messages of the roles query and document, each once .* got 'xdoc"),
        ("{{ messages[1].content }} {{ messages[0].content }}", "each once and in this order"),
        ("{{ raise_exception('only users') }}", "cannot render the roles query and document: only users"),
        ("{% for %}", "cannot render the roles query and document: .*"),
        (
            "{% for m in messages %} {{ m.content | replace(' ', '_') }}{% endfor %}",
            "writes something else around or in place of some texts",
        ),
    ],
)
def test_a_chat_template_that_carries_no_pair(
    tiny_checkpoint: Tiny, tmp_path: Path, template: str, message: str
) -> None:
    saved = copied(tiny_checkpoint("qwen3-chat", "rerank"), tmp_path / "saved", template=template)
    with pytest.raises(CheckpointError, match=message) as caught:
        RetrievalModel.load(saved)
    assert str(saved) in str(caught.value)


def test_a_bare_language_model_with_turns_of_another_kind(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny_checkpoint("qwen3-plain", "rerank", bare=True), tmp_path / "x", template="{{ 1 }}")
    with pytest.raises(
        CheckpointError, match=r"chat_template: expected .*; set one that does, in chat_template\.jinja"
    ):
        RetrievalModel.load(folder, task="rerank")


def test_a_head_that_scales_its_logits(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = RetrievalModel.load(tiny_checkpoint("qwen3-chat", "rerank", bare=True), task="rerank")
    sizes = {name: getattr(source.backbone.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = transformers.GraniteConfig(
        **sizes, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0
    )
    torch.manual_seed(0)
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="GraniteForCausalLM does more to its logits than a product with the head"
    ):
        RetrievalModel.load(tmp_path, task="rerank")
    granite = transformers.GraniteForCausalLM.from_pretrained(tmp_path)
    granite.config.logits_scaling = 1.0
    granite.save_pretrained(tmp_path)
    np.testing.assert_allclose(
        cross_encoder(tmp_path).predict(PAIRS), score(RetrievalModel.load(tmp_path, task="rerank")), atol=TOLERANCE
    )


def test_weights_and_tokens_that_do_not_fit(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    headless = copied(tiny_checkpoint("qwen3-plain", "rerank"), tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Qwen3ForCausalLM as config.json .*; missing: lm_head\.weight"):
        RetrievalModel.load(headless)
    beyond = copied(tiny_checkpoint("qwen3-chat", "rerank"), tmp_path / "beyond")
    (beyond / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": 5, "false_token_id": 5000}))
    with pytest.raises(CheckpointError, match=r"1_LogitScore: expected ids of tokens below \d+, .*; got \[5, 5000\]"):
        RetrievalModel.load(beyond)
