"""`rtx finetune`: its flags are the fields of FinetuneConfig."""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from rtx.runtime.errors import INTERRUPTED
from rtx.trainer.config import FinetuneConfig, Option, options
from rtx.trainer.run import RunFolder

if TYPE_CHECKING:
    from rtx.trainer.train import Outcome


# How `--help` groups the flags, by field.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Run": ("task", "model", "train", "eval", "candidates", "output", "metric"),
    "Texts and images": (
        "max_tokens",
        "max_pixels",
        "min_pixels",
        "query_prompt",
        "document_prompt",
        "batch_size",
        "mixing",
        "workers",
    ),
    "Loss": (
        "loss",
        "scale",
        "directions",
        "partition",
        "false_negative_margin",
        "guide",
        "guide_margin",
        "guide_margin_strategy",
        "similarity",
        "distance",
        "margin",
        "temperature",
        "pos_weight",
        "sigma",
        "mu",
        "k",
        "first_stage_weight",
        "matryoshka",
    ),
    "Optimizer": (
        "epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "learning_rate",
        "learning_rates",
        "layer_decay",
        "schedule",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "dropout",
        "freeze",
        "seed",
    ),
    "LoRA": ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    "Memory and speed": ("bf16", "activation_tokens", "chunk_tokens", "gradient_checkpointing", "threads"),
    "Evaluation, checkpoints and log": (
        "eval_steps",
        "patience",
        "save_steps",
        "keep_checkpoints",
        "log_steps",
        "tensorboard",
    ),
}


class _Sections(click.Command):
    """Shows the flags in groups: there are too many for one list."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {option.name: option.get_help_record(ctx) for option in self.get_params(ctx)}
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([record for name in names if (record := records.pop(name))])
        with formatter.section("This command"):
            formatter.write_dl([record for record in records.values() if record])


def _flags() -> list[click.Option]:
    """One flag a field."""
    hints = typing.get_type_hints(FinetuneConfig)
    described = options(FinetuneConfig)
    return [_flag(item, hints[item.name], described[item.name]) for item in dataclasses.fields(FinetuneConfig)]


def _flag(item: dataclasses.Field[Any], hint: Any, option: Option) -> click.Option:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    numbers = hint == tuple[int, ...]
    repeated = typing.get_origin(hint) is tuple and not numbers
    single = typing.get_args(hint)[0] if repeated else hint
    choices = typing.get_args(single) if typing.get_origin(single) is typing.Literal else ()
    kind: Any = _Numbers() if numbers else click.Choice(choices) if choices else single
    name = _spelling(item.name)
    words = option.help
    if item.default not in (dataclasses.MISSING, None, ()):
        words += f"  [default: {str(item.default).lower() if hint is bool else item.default}]"
    return click.Option(
        [item.name, f"{name}/--no-{name[2:]}" if hint is bool else name, *([option.short] if option.short else [])],
        type=kind,
        multiple=repeated,
        # None for all, so that a flag which was not given leaves the file's value alone.
        default=None,
        help=words,
    )


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers with commas between them."""

    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return value if isinstance(value, tuple) else tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected whole numbers with commas between them, got {value!r}", param, ctx)


def _spelling(field: str) -> str:
    return "--" + field.replace("_", "-")


def _command(config: str | None, given: Mapping[str, Any]) -> str:
    """The command line that these flags make."""
    words = ["rtx", "finetune", *(["--config", config] if config is not None else [])]
    for name, value in given.items():
        if isinstance(value, bool):
            words.append(_spelling(name if value else f"no_{name}"))
        else:
            several = value if isinstance(value, tuple) else (value,)
            if several and isinstance(several[0], int):
                several = (",".join(map(str, several)),)
            for single in several:
                words += [_spelling(name), str(single)]
    return shlex.join(words)


@click.command(cls=_Sections, params=_flags())
@click.option(
    "--config", type=click.Path(dir_okay=False), help="TOML file with any of these options; flags win over it."
)
@click.option(
    "--resume", is_flag=True, help="Continue from the newest checkpoint in the output folder, if there is one."
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output folder.")
@click.option(
    "--dry-run", is_flag=True, help="Train nothing: show parameters, steps, tokens a step and the memory it will take."
)
def finetune(config: str | None, resume: bool, overwrite: bool, dry_run: bool, **flags: Any) -> None:
    """Finetune an embedder or a reranker on your own data.

    \b
    rtx finetune --task embed --model BASE --train pairs.jsonl --eval beir/ -o tuned/
    rtx finetune --config run.toml --seed 7
    """
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    run = FinetuneConfig.read(config, given)
    if dry_run:
        _show_needs(run)
        return
    command = _command(config, given)
    try:
        # torch takes seconds to import: a misspelt option should not.
        from rtx.trainer.finetune import finetune as train
        from rtx.trainer.processes import is_main

        outcome = train(run, resume=resume, overwrite=overwrite, command=command)
    except KeyboardInterrupt:
        newest = RunFolder(run.output).newest()
        click.echo(
            f"\ninterrupted; newest checkpoint: {newest or 'none yet'}\ncontinue with: {command} --resume", err=True
        )
        raise SystemExit(INTERRUPTED) from None
    if is_main():
        _show(outcome, run.output)


def _show_needs(run: FinetuneConfig) -> None:
    from rich.console import Console

    from rtx.trainer.estimate import render
    from rtx.trainer.finetune import dry_run
    from rtx.trainer.processes import is_main

    needs = dry_run(run)
    if is_main():
        Console(highlight=False).print(render(needs))


def _show(outcome: Outcome, output: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if outcome.after:
        table = Table("metric")
        columns = [("first stage", outcome.first_stage)] if outcome.first_stage else []
        columns += [("before", outcome.before), ("after", outcome.after)]
        for name in (*(name for name, _ in columns), "change"):
            table.add_column(name, justify="right")
        for metric, after in outcome.after.items():
            values = [f"{values[metric]:.4f}" for _, values in columns]
            table.add_row(metric, *values, f"{after - outcome.before[metric]:+.4f}")
        console.print(table)
        ndcg = next(metric for metric in outcome.after if metric.startswith("ndcg@"))
        for interval, what in (
            (outcome.interval, f"{ndcg} changed by"),
            (outcome.first_stage_interval, f"{ndcg} differs from the first stage's order by"),
        ):
            if interval is not None:
                low, high = interval
                console.print(f"{what} {low:+.4f} to {high:+.4f} (95 % interval over the queries)", markup=False)
    console.print(f"{output}: weights of step {outcome.best_step} of {outcome.steps}", markup=False, soft_wrap=True)
