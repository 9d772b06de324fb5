"""The layout as data: folders of JSON files alone, read and written without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtx.runtime.errors import CheckpointError
from rtx.trainer.checkpoint import read_layout, write_layout
from rtx.trainer.layout import DenseConfig, HeadModule, Layout, LogitScoreConfig, NormalizeConfig

BERT = {"model_type": "bert", "architectures": ["BertModel"]}
CLASSIFIER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
VERSIONS = {"transformers": "5.0.0", "pytorch": "2.9.0"}


def modules(*chain: tuple[str, str], package: str = "sentence_transformers.models") -> list[dict[str, Any]]:
    return [
        {"idx": i, "name": str(i), "path": path, "type": f"{package}.{name}"} for i, (name, path) in enumerate(chain)
    ]


EMBEDDER = modules(("Transformer", ""), ("Pooling", "1_Pooling"))
LEGACY_POOLING = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
DENSE = {
    "in_features": 32,
    "out_features": 8,
    "bias": True,
    "activation_function": "torch.nn.modules.activation.Tanh",
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_files(files: dict[str, Any]) -> Path:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write_files


def test_a_folder_of_version_2(write: Any) -> None:
    """As all-MiniLM-L6-v2 is published: booleans for the pooling, old type names, no folder for Normalize."""
    folder = write(
        {
            "modules.json": modules(("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")),
            "config.json": BERT,
            "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
            "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
            "1_Pooling/config.json": {**LEGACY_POOLING, "pooling_mode_max_tokens": False},
        }
    )
    assert read_layout(folder) == Layout(
        task="embed",
        pooling=("mean",),
        pooling_dimension=32,
        head=(HeadModule(config=NormalizeConfig(), folder="2_Normalize"),),
        max_tokens=256,
    )


def test_a_folder_with_the_transformer_beside_the_other_modules(write: Any) -> None:
    folder = write(
        {
            "modules.json": modules(("Transformer", "0_Transformer"), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")),
            "0_Transformer/config.json": BERT,
            "0_Transformer/sentence_roberta_config.json": {
                "max_seq_length": 128,
                "do_lower_case": True,
                "model_args": {"add_pooling_layer": False, "trust_remote_code": True, "torch_dtype": "float16"},
                "tokenizer_args": {"use_fast": True},
            },
            "1_Pooling/config.json": LEGACY_POOLING,
            "2_Dense/config.json": DENSE,
        }
    )
    layout = read_layout(folder)
    assert layout.backbone_folder == "0_Transformer"
    assert (layout.max_tokens, layout.do_lower_case) == (128, True)
    assert layout.head == (HeadModule(config=DenseConfig(in_features=32, out_features=8), folder="2_Dense"),)
    # Neither running code nor the type of the weights is the checkpoint's to decide.
    assert (layout.model_kwargs, layout.tokenizer_kwargs) == ({"add_pooling_layer": False}, {"use_fast": True})


@pytest.mark.parametrize(
    ("config", "modes", "include_prompt"),
    [
        ({"pooling_mode_lasttoken": True, "include_prompt": False}, ("lasttoken",), False),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean"), True),
        ({"pooling_mode_weightedmean_tokens": True, "pooling_mode_max_tokens": True}, ("max", "weightedmean"), True),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len_tokens",), True),
        ({"pooling_mode_mean_tokens": False}, ("mean",), True),
        ({"pooling_mode": "cls"}, ("cls",), True),
        ({"pooling_mode": ["mean", "cls"], "include_prompt": False}, ("mean", "cls"), False),
    ],
)
def test_pooling_modes_old_and_new(write: Any, config: Any, modes: Any, include_prompt: bool) -> None:
    layout = read_layout(write({"modules.json": EMBEDDER, "config.json": BERT, "1_Pooling/config.json": config}))
    assert (layout.pooling, layout.include_prompt) == (modes, include_prompt)


def test_prompts_similarity_and_cut_are_kept(write: Any) -> None:
    folder = write(
        {
            "modules.json": EMBEDDER,
            "config.json": BERT,
            "1_Pooling/config.json": {"pooling_mode": "cls"},
            "config_sentence_transformers.json": {
                "model_type": "SentenceTransformer",
                "prompts": {"query": "query: ", "document": None},
                "default_prompt_name": "query",
                "similarity_fn_name": "dot",
                "truncate_dim": 16,
                "requirements": ["something>=1"],
            },
        }
    )
    layout = read_layout(folder)
    assert layout.prompts == {"query": "query: ", "document": ""}
    assert (layout.default_prompt, layout.similarity, layout.truncate_dim) == ("query", "dot", 16)


@pytest.mark.parametrize(
    ("backbone", "model", "activation"),
    [
        ({}, None, "sigmoid"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, None, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, None, "identity"),
        ({}, {"activation_fn": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Identity"}}, {"activation_fn": None}, "identity"),
        ({"sentence_transformers": {"activation_fn": "x"}}, {"activation_fn": "torch.nn.Sigmoid"}, "sigmoid"),
    ],
)
def test_a_cross_encoder_and_where_its_activation_stands(
    write: Any, backbone: Any, model: Any, activation: str
) -> None:
    files = {"config.json": {**CLASSIFIER, **backbone}}
    if model is not None:
        files["modules.json"] = modules(("Transformer", ""), package="sentence_transformers.base.modules.transformer")
        files["config_sentence_transformers.json"] = {"model_type": "CrossEncoder", **model}
    # Without a Sentence Transformers side, the tokenizer says whether there is a chat template.
    message_format: Any = "auto" if model is None else None
    expected = Layout(task="rerank", activation=activation, message_format=message_format)  # type: ignore[arg-type]
    assert read_layout(write(files)) == expected


NORMALIZED = (HeadModule(config=NormalizeConfig()),)


@pytest.mark.parametrize(
    ("backbone", "task", "expected"),
    [
        (BERT, None, Layout(task="embed", pooling=("mean",), head=NORMALIZED)),
        (BERT, "rerank", Layout(task="rerank", new_classifier=True, activation="sigmoid")),
        (CLASSIFIER, None, Layout(task="rerank", activation="sigmoid", message_format="auto")),
        (CLASSIFIER, "embed", Layout(task="embed", pooling=("mean",), head=NORMALIZED)),
        ({"architectures": ["Qwen3ForCausalLM"]}, None, Layout(task="embed", pooling=("lasttoken",), head=NORMALIZED)),
        (
            {"architectures": ["Qwen3ForCausalLM"]},
            "rerank",
            Layout(task="rerank", new_logit_score=True, message_format="auto", activation="sigmoid"),
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "is_causal": False},
            None,
            Layout(task="embed", pooling=("mean",), head=NORMALIZED),
        ),
        ({"architectures": None}, None, Layout(task="embed", pooling=("mean",), head=NORMALIZED)),
    ],
)
def test_a_bare_hugging_face_folder(write: Any, backbone: Any, task: Any, expected: Layout) -> None:
    assert read_layout(write({"config.json": backbone}), task) == expected


TEXT = {"method": "forward", "method_output_name": "logits"}
MESSAGE = {**TEXT, "format": "structured"}
LOGIT_SCORE = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": "1_LogitScore",
        "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
    },
]
CAUSAL = {
    "modules.json": LOGIT_SCORE,
    "config.json": {"architectures": ["Qwen3ForCausalLM"]},
    "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
    "1_LogitScore/config.json": {"true_token_id": 7, "false_token_id": 3, "module_input_name": "causal_logits"},
    "sentence_bert_config.json": {
        "transformer_task": "text-generation",
        "modality_config": {"text": TEXT, "message": MESSAGE},
        "module_output_name": "causal_logits",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True, "restore_suffix": False}},
    },
}


def test_a_language_model_scored_by_two_tokens(write: Any) -> None:
    assert read_layout(write(CAUSAL)) == Layout(
        task="rerank",
        logit_score=LogitScoreConfig(true_token_id=7, false_token_id=3),
        message_format="structured",
        chat_template_kwargs={"add_generation_prompt": True},
        activation="sigmoid",
    )


@pytest.mark.parametrize(
    ("message", "chosen"), [({**TEXT, "format": "flat"}, "flat"), ({**TEXT, "format": "auto"}, "auto"), (TEXT, "auto")]
)
def test_the_form_of_messages_may_be_left_open(write: Any, message: Any, chosen: str) -> None:
    use = {**CAUSAL["sentence_bert_config.json"], "modality_config": {"text": TEXT, "message": message}}
    assert read_layout(write({**CAUSAL, "sentence_bert_config.json": use})).message_format == chosen


def test_a_language_model_with_other_ideas_is_refused(write: Any) -> None:
    def refused(name: str, content: Any) -> str:
        folder = write({**CAUSAL, name: content})
        if content is None:
            (folder / name).unlink()
        with pytest.raises(CheckpointError) as caught:
            read_layout(folder)
        return str(caught.value)

    use = CAUSAL["sentence_bert_config.json"]
    assert 'transformer_task: expected "text-generation", got "fill-mask"' in refused(
        "sentence_bert_config.json", {**use, "transformer_task": "fill-mask"}
    )
    assert "modality_config: expected image among the modalities, got text" in refused(
        "sentence_bert_config.json", {**use, "transformer_task": "any-to-any"}
    )
    assert 'transformer_task: expected "text-generation", got null' in refused("sentence_bert_config.json", {})
    assert "processing_kwargs: expected" in refused(
        "sentence_bert_config.json", {**use, "processing_kwargs": {"chat_template": {"max_length": 8}}}
    )
    assert "processing_kwargs: expected" in refused(
        "sentence_bert_config.json", {**use, "processing_kwargs": {"text": {"max_length": 8}}}
    )
    assert "modality_config: expected" in refused(
        "sentence_bert_config.json", {**use, "modality_config": {"text": TEXT, "image": TEXT}}
    )
    write(CAUSAL)
    assert "module_input_name: expected causal_logits, got logits" in refused(
        "1_LogitScore/config.json", {"true_token_id": 7, "module_input_name": "logits"}
    )
    assert "true_token_id" in refused("1_LogitScore/config.json", {"false_token_id": 7})
    assert "1_LogitScore/config.json: missing; expected the configuration of a LogitScore module" in refused(
        "1_LogitScore/config.json", None
    )


def test_another_task_starts_from_the_backbone_alone(write: Any) -> None:
    folder = write(
        {
            "modules.json": modules(("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")),
            "0_Transformer/config.json": BERT,
            "1_Pooling/config.json": LEGACY_POOLING,
            "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
        }
    )
    expected = Layout(task="rerank", backbone_folder="0_Transformer", new_classifier=True, activation="sigmoid")
    assert read_layout(folder, "rerank") == expected


LAYOUTS = [
    Layout(task="embed", pooling=("mean",), pooling_dimension=32),
    Layout(
        task="embed",
        pooling=("cls", "lasttoken"),
        pooling_dimension=16,
        include_prompt=False,
        head=(
            HeadModule(config=DenseConfig(in_features=32, out_features=8, bias=False, use_residual=True)),
            HeadModule(config=DenseConfig(in_features=8, out_features=4, activation_function="torch.nn.ReLU")),
            *NORMALIZED,
        ),
        do_lower_case=True,
        prompts={"query": "Frage: “", "document": ""},
        default_prompt="query",
        similarity="euclidean",
        truncate_dim=2,
    ),
    Layout(task="rerank", activation="sigmoid", prompts={"query": "q"}),
    Layout(task="rerank", activation="identity"),
    Layout(task="rerank", activation="identity", first_stage_weight=20.5),
    Layout(task="rerank", activation="identity", message_format="flat", chat_template_kwargs={"instruct": "judge"}),
    Layout(
        task="rerank",
        logit_score=LogitScoreConfig(true_token_id=9, false_token_id=4),
        message_format="structured",
        prompts={"judge": "Is it?"},
        default_prompt="judge",
        activation="sigmoid",
    ),
    Layout(task="rerank", logit_score=LogitScoreConfig(true_token_id=9)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_reads_the_same(write: Any, layout: Layout) -> None:
    folder = write({"config.json": BERT})
    written = write_layout(folder, layout, VERSIONS)
    assert read_layout(folder) == written
    folders = [module.folder for module in written.head]
    assert folders == ["2_Dense", "3_Dense", "4_Normalize"][: len(folders)]


def test_version_6_files_to_the_letter(write: Any) -> None:
    folder = write({"config.json": BERT})
    write_layout(folder, LAYOUTS[1], VERSIONS)
    assert json.loads((folder / "2_Dense/config.json").read_text()) == {
        "in_features": 32,
        "out_features": 8,
        "bias": False,
        "activation_function": "torch.nn.modules.activation.Tanh",
        "use_residual": True,
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    }
    assert "use_residual" not in json.loads((folder / "3_Dense/config.json").read_text())
    assert json.loads((folder / "1_Pooling/config.json").read_text()) == {
        "embedding_dimension": 16,
        "pooling_mode": ["cls", "lasttoken"],
        "include_prompt": False,
    }
    assert json.loads((folder / "config_sentence_transformers.json").read_text()) == {
        "__version__": {"sentence_transformers": "6.0.0", **VERSIONS},
        "model_type": "SentenceTransformer",
        "prompts": {"query": "Frage: “", "document": ""},
        "default_prompt_name": "query",
        "similarity_fn_name": "euclidean",
        "truncate_dim": 2,
    }


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"modules.json": "{"}, r"modules\.json: not readable as JSON: Expecting property name"),
    ({"modules.json": {}}, r"modules\.json: expected a list of modules"),
    ({"modules.json": [{"type": "x"}]}, r"modules\.json: expected a list of modules, each with the keys type and path"),
    (
        {"modules.json": modules(("Transformer", ""), ("Pooling", "../elsewhere"))},
        r"modules\.json: expected paths inside the folder, got \.\./elsewhere",
    ),
    (
        {"modules.json": modules(("Transformer", ""), ("Pooling", "1_Pooling"), ("LSTM", "2_LSTM"))},
        r"modules\.json: a SentenceTransformer of Transformer, Pooling, LSTM is not supported; supported are: "
        r"SentenceTransformer of Transformer, Pooling, then any of Dense, Normalize; SentenceTransformer of "
        r"Transformer, then any of Dense, Normalize; .*; CrossEncoder of Transformer; "
        r"CrossEncoder of Transformer, LogitScore$",
    ),
    ({"modules.json": modules(("Router", ""))}, "router_config.json: missing; expected the configuration of a Router"),
    (
        {
            "modules.json": modules(
                (
                    "Transformer",
                    "",
                ),
                package="custom_st",
            )
        },
        "of custom_st.Transformer is not supported",
    ),
    (
        {"config_sentence_transformers.json": {"model_type": "SparseEncoder"}},
        "a SparseEncoder of Transformer, Pooling is not supported",
    ),
    (
        {
            "modules.json": modules(("Transformer", ""), ("LogitScore", "1_LogitScore"), ("Dense", "2_Dense")),
            "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
        },
        "a CrossEncoder of Transformer, LogitScore, Dense is not supported; supported are",
    ),
    ({"config.json": None}, r"config\.json: missing; expected a Sentence Transformers checkpoint or"),
    ({"config.json": "[]"}, r"config\.json: expected a JSON object, got list"),
    (
        {"adapter_config.json": {"base_model_name_or_path": "some/base"}},
        r"holds a PEFT adapter of some/base, not a whole model; merge them first: load some/base, .*merge_and_unload",
    ),
    ({"adapter_config.json": {}}, "holds a PEFT adapter of its base model"),
    (
        {"1_Pooling/config.json": None},
        r"1_Pooling/config\.json: missing; expected the configuration of a Pooling module",
    ),
    (
        {"1_Pooling/config.json": {"pooling_mode": "median", "pooling_mode_first": True}},
        r"1_Pooling/config\.json: unknown key 'pooling_mode_first'.*; pooling_mode\[0\]: expected one of .*'median'",
    ),
    ({"modules.json": [*EMBEDDER, *modules(("Dense", "2_Dense"))]}, r"2_Dense/config\.json: missing"),
    (
        {
            "modules.json": [*EMBEDDER, *modules(("Dense", "2_Dense"))],
            "2_Dense/config.json": {**DENSE, "in_features": "32", "dropout": 0.1},
        },
        r"2_Dense/config\.json: unknown key 'dropout' .*; in_features: expected int, got str '32'",
    ),
    (
        {
            "modules.json": [*EMBEDDER, *modules(("Normalize", "2_Normalize"))],
            "2_Normalize/config.json": {"module_input_name": "token_embeddings"},
        },
        r"2_Normalize/config\.json: .*expected sentence_embedding, got token_embeddings",
    ),
    (
        {"config_sentence_transformers.json": {"prompts": {"query": 1}}},
        r"config_sentence_transformers\.json: prompts: expected texts by name",
    ),
    (
        {"config_sentence_transformers.json": {"default_prompt_name": "q", "prompts": {"query": ""}}},
        r"default_prompt_name: 'q' is not in prompts \(query\)",
    ),
    (
        {"config_sentence_transformers.json": {"similarity_fn_name": "maxsim"}},
        r"similarity_fn_name: expected one of cosine, dot, euclidean, manhattan, got 'maxsim'",
    ),
    ({"config_sentence_transformers.json": {"truncate_dim": True}}, "truncate_dim: expected int, got True"),
    (
        {
            "sentence_bert_config.json": {
                "transformer_task": "fill-mask",
                "modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "processing_kwargs": {"text": {"max_length": 8}},
                "query_length": 32,
            }
        },
        r"not supported: transformer_task: expected \"feature-extraction\", got \"fill-mask\"; "
        r"query_length: expected null, got 32; modality_config: expected text .*, got message; "
        r"processing_kwargs: expected \{\}, got \{\"text\"",
    ),
    ({"sentence_bert_config.json": {"max_seq_len": 12}}, r"unknown key 'max_seq_len' \(did you mean 'max_seq_length'"),
    (
        {
            "modules.json": modules(("Transformer", "")),
            "config_sentence_transformers.json": {"model_type": "CrossEncoder", "activation_fn": "torch.nn.ReLU"},
        },
        r"activation_fn: expected torch\.nn\.modules\.activation\.Sigmoid or .*Identity, got 'torch\.nn\.ReLU'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_broken_folder_is_one_clear_error(write: Any, changes: dict[str, Any], message: str) -> None:
    files = {"modules.json": EMBEDDER, "config.json": BERT, "1_Pooling/config.json": LEGACY_POOLING, **changes}
    folder = write({name: content for name, content in files.items() if content is not None})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_layout(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.exit_code == 5
