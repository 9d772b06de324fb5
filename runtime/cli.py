"""The command `rtx`: a table of commands, each loaded only when it is called.

This is the one place in the runtime that names the rooms `trainer` and `export`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from rtx.runtime.atomic import FULL
from rtx.runtime.errors import INTERRUPTED, ArtifactError, BundleError, RtxError, UsageError, nearest
from rtx.runtime.lazy import naming_the_extra

if TYPE_CHECKING:
    from rtx.runtime.contract import Task
    from rtx.runtime.embedder import Embedder
    from rtx.runtime.reranker import Reranker


class _Command(NamedTuple):
    target: str
    help: str
    extra: str = ""


_COMMANDS = {
    "data": _Command("rtx.trainer.data_command:data", "Look at training data: counts, lengths, duplicates, leaks."),
    "compose": _Command("rtx.trainer.compose_command:compose", "Put a text and a vision model together.", "train"),
    "finetune": _Command("rtx.trainer.command:finetune", "Finetune an embedder or a reranker.", "train"),
    "export": _Command("rtx.export.command:export", "Turn a checkpoint into a bundle, through the gate.", "export"),
    "build": _Command(
        "rtx.export.build_command:build", "TensorRT engines, or models for Triton, of a bundle.", "build"
    ),
    "verify": _Command("rtx.runtime.commands.verify:verify", "Check a bundle: hashes, contract, golden vectors."),
    "info": _Command("rtx.runtime.commands.info:info", "Show what is in a bundle or a checkpoint."),
    "doctor": _Command("rtx.runtime.commands.doctor:doctor", "Show what this machine can run, and what is missing."),
    "embed": _Command("rtx.runtime.commands.embed:embed", "Embed texts, images and the pages of PDFs."),
    "rerank": _Command("rtx.runtime.commands.rerank:rerank", "Score or order the documents of each query of a file."),
    "mine": _Command("rtx.runtime.commands.mine:mine_negatives", "Find hard negatives for training rows."),
    "eval": _Command("rtx.runtime.commands.eval:evaluate", "Measure ranking quality on an evaluation set."),
    "bench": _Command("rtx.runtime.commands.bench:bench", "Measure latency, throughput and parity; write a report."),
}


class _LazyGroup(click.Group):
    """Shows help without importing a command, and turns RtxError into one line and its exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].target.split(":")
        with naming_the_extra(_COMMANDS[cmd_name].extra, f"rtx {cmd_name}"):
            return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not ctx.resilient_parsing:
            raise UsageError(f"command '{args[0]}' does not exist ({nearest(args[0], _COMMANDS)})")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except RtxError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as broken:
            # A name that is too long, a full disk behind standard output. Click ends quietly after EPIPE.
            if broken.filename is None and broken.errno not in FULL:
                raise
            item = "standard output or a file" if broken.filename is None else broken.filename
            click.echo(f"error: {item}: cannot be read or written: {broken.strerror}", err=True)
            ctx.exit(ArtifactError.exit_code)
        except KeyboardInterrupt:
            # Click would exit with 1, which is RtxError's.
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError:
            # Only now does the context know the command: what it missed while it ran is missed by it.
            name = ctx.invoked_subcommand or ""
            with naming_the_extra(_COMMANDS[name].extra if name in _COMMANDS else "", f"rtx {name}"):
                raise


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rtx-retrieval", prog_name="rtx")
def main() -> None:
    """Retrieval models from finetuning to production without losing what they learned.

    \b
    rtx finetune → a checkpoint → rtx export → a bundle → rtx embed, rerank, bench
    """
    # What Pillow says of damaged metadata is of no use to who has thousands of images, none of them named.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def open_model(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    task: Task | None = None,
) -> Embedder | Reranker:
    """A bundle on its engine, or a checkpoint on PyTorch: what measures models takes both.

    Args:
        path: the folder.
        variant: of a bundle.
        threads: of one run; None for all cores.
        device: of a bundle, as for `Session.open`.
        task: what a checkpoint is that does not say so itself; None to tell it by what is in it.

    Raises:
        BundleError, CheckpointError: the folder is neither, or is damaged.
        UsageError: a variant or a device of what is no bundle.
        MissingExtraError: it is a checkpoint and torch is not installed.
    """
    from rtx.runtime.bundle import Bundle
    from rtx.runtime.embedder import Embedder
    from rtx.runtime.manifest import MANIFEST_FILE
    from rtx.runtime.reranker import Reranker

    folder = Path(path)
    if (folder / MANIFEST_FILE).exists():
        task = Bundle.open(folder).manifest.contract.task
        kind = Embedder if task == "embed" else Reranker
        return kind.open(folder, variant=variant, threads=threads, device=device)
    if variant is not None:
        raise UsageError(f"{folder}: has no {MANIFEST_FILE}; variants ('{variant}') exist in bundles only")
    if device != "cpu":
        raise UsageError(f"{folder}: has no {MANIFEST_FILE}; bundles alone run on a device ('{device}')")
    if not folder.exists() and (folder.is_absolute() or folder.suffix == ".rtx"):
        raise BundleError(f"{folder}: does not exist; expected a bundle or a checkpoint")
    with naming_the_extra("train", f"opening the checkpoint {folder}"):
        from rtx.trainer.model import RetrievalModel
    if threads is not None:
        import torch

        from rtx.runtime.engine import check_threads

        check_threads(threads)
        torch.set_num_threads(threads)
    model = RetrievalModel.load(path, task=task)
    kind = Embedder if model.contract.task == "embed" else Reranker
    return kind(model.preprocessor, model.engine())
