from __future__ import annotations

import subprocess
import sys

import pytest

from rtx.runtime.errors import UsageError
from rtx.trainer.config import FinetuneConfig, TrainingArguments, options

NEEDED = {"task": "embed", "model": "base", "train": ["pairs.jsonl"], "output": "tuned"}


def read(file=None, **flags):
    return FinetuneConfig.read(file, {**NEEDED, **flags})


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'task = "embed"\nmodel = "base"\ntrain = ["a.jsonl", "b.csv"]\noutput = "tuned"\nepochs = 3\nseed = 7\n'
    )
    config = FinetuneConfig.read(file, {"epochs": 2.5, "bf16": True})
    assert (config.train, config.epochs, config.seed, config.bf16) == (("a.jsonl", "b.csv"), 2.5, 7, True)
    assert config.batch_size == 64  # the default


def test_unknown_keys_name_the_nearest_and_all_problems_come_at_once(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('epoch = 3\nlerning_rate = 1e-4\nseed = "one"\n')
    with pytest.raises(UsageError) as error:
        FinetuneConfig.read(file, {"task": "embed", "model": "base", "output": "tuned", "batch_size": 0})
    message = str(error.value)
    assert message.startswith(f"{file}: unknown key 'epoch' (did you mean 'epochs'?")
    assert "unknown key 'lerning_rate' (did you mean 'learning_rate'?" in message
    assert "seed: expected int, got str 'one'" in message
    assert "missing key 'train'" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected more than 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number, got nan"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: expected at most 0.99, got 1.0"),
        ({"schedule": "lineer"}, "schedule: expected one of 'linear', 'cosine', 'constant', got 'lineer'"),
        ({"train": []}, "train: expected at least one file"),
        ({"task": "embed", "eval": "e", "candidates": "c"}, "candidates: only a reranker has them"),
        ({"task": "rerank", "eval": "e"}, "eval and candidates: a reranker is evaluated on both together"),
        ({"task": "rerank", "candidates": "c"}, "eval and candidates: a reranker is evaluated on both together"),
    ],
)
def test_values_out_of_bounds_are_named(flags, expected):
    with pytest.raises(UsageError, match=f"^options: {expected}"):
        read(**flags)


def test_several_values_out_of_bounds_come_at_once():
    with pytest.raises(UsageError, match=r"epochs: expected more than 0, got 0\.0; batch_size: expected at least 1"):
        read(epochs=0.0, batch_size=-1)


def test_a_file_that_is_missing_or_no_toml_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read: No such file"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(UsageError, match=r"bad\.toml: is not valid TOML: .*line 1"):
        read(tmp_path / "bad.toml")


def test_the_recipe_holds_what_the_weights_depend_on_and_no_paths():
    recipe = read(output="elsewhere", log_steps=3).recipe()
    assert recipe["learning_rate"] == 2e-5
    assert {"seed", "batch_size", "chunk_tokens", "metric", "scale", "max_tokens", "task"} <= recipe.keys()
    assert not {"output", "model", "train", "eval", "log_steps", "save_steps", "keep_checkpoints"} & recipe.keys()


def test_every_option_has_a_sentence_for_its_help():
    for name, option in options(FinetuneConfig).items():
        assert option.help.endswith("."), name
    with pytest.raises(ValueError, match="epochs: expected more than 0"):
        TrainingArguments(output="o", epochs=0)


def test_the_configuration_is_free_of_torch():
    code = "import sys, rtx.trainer.config, rtx.trainer.data; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_is_in_one_group_of_the_help():
    from rtx.trainer.command import SECTIONS

    grouped = [name for names in SECTIONS.values() for name in names]
    assert sorted(grouped) == sorted(options(FinetuneConfig))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"loss": "info_nse"}, "loss: 'info_nse' does not exist for the task 'embed' (did you mean 'info_nce'? "),
        ({"loss": "bce"}, "loss: 'bce' does not exist for the task 'embed'"),
        ({"margin": 0.2}, "margin: is no option of the loss info_nce; it has: scale, directions, partition, "),
        ({"loss": "gist"}, "guide: the loss gist needs one"),
        ({"guide": "model"}, "guide: the loss info_nce takes none"),
        ({"matryoshka": [64, 0]}, "matryoshka: expected dimensions of at least 1, got [64, 0]"),
        ({"task": "rerank", "matryoshka": [64]}, "matryoshka: only an embedder has dimensions"),
        ({"learning_rates": ["head"]}, "learning_rates: expected PATTERN=RATE with a rate above 0, got 'head'"),
        ({"learning_rates": ["head.*=0"]}, "learning_rates: expected PATTERN=RATE with a rate above 0, got 'head.*=0'"),
        ({"learning_rates": ["*=inf"]}, "learning_rates: expected PATTERN=RATE with a rate above 0, got '*=inf'"),
        ({"patience": 3}, "patience: expected with eval, whose metric it waits for"),
        ({"task": "rerank", "document_prompt": "d: "}, "document_prompt: a reranker has one prompt for a pair"),
        ({"lora_alpha": 8.0}, "lora_rank: expected with the other options of LoRA"),
        ({"directions": ["sideways"]}, "directions"),
        ({"mixing": "both"}, "mixing"),
    ],
)
def test_options_that_do_not_fit_the_loss_are_named(flags, expected):
    given = {"task": "embed", "model": "m", "train": ["t.jsonl"], "output": "o", **flags}
    with pytest.raises(UsageError) as error:
        FinetuneConfig.read(None, given)
    assert expected in str(error.value)


def test_every_option_of_a_loss_is_a_keyword_of_its_function():
    pytest.importorskip("torch")
    import inspect

    from rtx.trainer import losses
    from rtx.trainer.loss_table import LOSSES, spec_of

    for task, room in (("embed", losses.embed), ("rerank", losses.rerank)):
        for name, spec in LOSSES[task].items():
            function = getattr(room, name)
            keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
            assert keywords == set(spec.options), name
            assert spec_of(function, task) is spec
    assert spec_of(losses.matryoshka(losses.info_nce, [4]), "embed") is LOSSES["embed"]["info_nce"]
    assert spec_of(lambda *_: None, "embed") is None
    # Both tasks have one of this name.
    with pytest.raises(UsageError, match=r"^loss margin_mse: is one of rtx.trainer.losses.embed; expected one of rer"):
        spec_of(losses.margin_mse, "rerank")
