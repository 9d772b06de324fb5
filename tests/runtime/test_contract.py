from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from rtx.runtime.contract import Contract
from rtx.runtime.errors import BundleError, CheckpointError, UsageError

EMBED = Contract(
    task="embed",
    inputs=("input_ids", "attention_mask"),
    max_tokens=256,
    pad_token_id=1,
    padding_side="left",
    pooling=("mean", "cls"),
    dimension=768,
    normalize=True,
    similarity="dot",
    prompts={"query": "Q: ", "title": "T: "},
    default_prompt="title",
)
RERANK = Contract(task="rerank", inputs=("input_ids",), max_tokens=8, pad_token_id=0, activation="sigmoid")

RENDERED = dataclasses.replace(RERANK, rendered=("Q: ", "\nD: ", "\n"), strip_sides=True)


@pytest.mark.parametrize("contract", [EMBED, RERANK, RENDERED])
def test_a_contract_survives_json(contract: Contract):
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


def test_output_and_its_shape():
    assert (EMBED.output, EMBED.output_shape(3)) == ("sentence_embedding", (3, 768))
    assert (RERANK.output, RERANK.output_shape(3)) == ("scores", (3,))


def test_prompts_resolve():
    assert EMBED.prompt_text("query") == "Q: "
    assert EMBED.prompt_text("title") == EMBED.prompt_text(None) == "T: "
    assert EMBED.prompt_text("document") == ""  # "query" and "document" always resolve
    assert RERANK.prompt_text(None) == RERANK.prompt_text("query") == ""


def test_an_unknown_prompt_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        EMBED.prompt_text("tilte")
    expected = "prompt 'tilte' does not exist (did you mean 'title'? known: document, query, title)"
    assert str(caught.value) == expected
    with pytest.raises(UsageError, match=r"prompt '' does not exist \(known: document, query\)"):
        RERANK.prompt_text("")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"dimension": 0}, "dimension: expected at least 1, got 0"),
        ({"default_prompt": "x"}, "default_prompt: 'x' is not in prompts (query, title)"),
        (
            {"rendered": ("a", "b", "c")},
            "rendered, rendered_prompt: expected 2 and 2 texts of task embed, got 3 and 0",
        ),
        ({"fixed_tokens": 64}, "fixed_tokens: expected 0 or at least max_tokens, 256; got 64"),
        ({"include_prompt": False}, "inputs: pooling_mask has to be there if and only if include_prompt is false"),
        (
            {"inputs": ("input_ids", "pooling_mask")},
            "inputs: pooling_mask has to be there if and only if include_prompt is false",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        dataclasses.replace(EMBED, **changes)
    assert str(caught.value) == message
    with pytest.raises(BundleError) as refused:
        Contract.from_dict(EMBED.to_dict() | changes)
    assert str(refused.value) == f"contract: {message}"


def test_a_rendered_pair_has_three_parts():
    with pytest.raises(ValueError, match="expected 3 and 0 texts of task rerank, got 2 and 0"):
        dataclasses.replace(RENDERED, rendered=("Q: ", "D: "))
    # As a bundle has it that was written before there were chat templates.
    older = {key: value for key, value in RERANK.to_dict().items() if key not in ("rendered", "strip_sides")}
    assert Contract.from_dict(older) == RERANK


def test_a_mistyped_contract_is_an_error_of_the_callers_class():
    data = RERANK.to_dict() | {"padding_side": "middle", "inputs": ["input_id"]}
    with pytest.raises(CheckpointError) as caught:
        Contract.from_dict(data, source="rtx.json", error=CheckpointError)
    assert str(caught.value) == (
        "rtx.json: inputs[0]: expected one of 'input_ids', 'attention_mask', 'token_type_ids', 'pooling_mask', "
        "got 'input_id'; padding_side: expected one of 'left', 'right', got 'middle'"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_stage_weight": -1.0}, "first_stage_weight: expected a number of at least 0, got -1.0"),
        ({"first_stage_weight": float("inf")}, "first_stage_weight: expected a number of at least 0, got inf"),
        ({"first_stage_weight": 20.0}, "first_stage_weight: only a reranker without activation adds to its logit"),
    ],
)
def test_what_a_first_stage_may_add_to(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(RERANK, **changes)
    with pytest.raises(ValueError, match="first_stage_weight: only a reranker without activation"):
        dataclasses.replace(EMBED, first_stage_weight=20.0)
    found = dataclasses.replace(RERANK, activation="identity", first_stage_weight=20.0)
    assert Contract.from_dict(json.loads(json.dumps(found.to_dict()))) == found
