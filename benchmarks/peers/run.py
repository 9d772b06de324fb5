"""rtx beside its peers, on a CPU or a GPU: the same weights, the same texts, each peer in an environment of its own.

    python benchmarks/peers/run.py                          # about 25 minutes on two cores, once all is installed
    python benchmarks/peers/run.py --brief                  # MiniLM alone, two rounds
    python benchmarks/peers/run.py --peers onnx,rtx --models minilm --rounds 3
    python benchmarks/peers/run.py --gpu                    # on an NVIDIA GPU; nobody has run it yet

Every peer is a process that stays open and is stopped while another one runs. Each finds its best batch size first;
then they take turns in every round, and a ratio is to sentence-transformers on PyTorch in the same round. Tables go to
standard output, progress to standard error, all numbers to a JSON file.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.catalogue import CHECKPOINTS, OURS, OURS_ON_GPU, ModelName, chosen
from benchmarks.peers.comparison import BRIEF, Comparison, Plan, elapsed
from benchmarks.peers.environments import CHECKOUT
from benchmarks.peers.report import plain, tables
from rtx.runtime.atomic import atomic_file
from rtx.runtime.backends.onnx import usable_cores
from rtx.runtime.errors import EngineError
from rtx.runtime.gpu import find_gpu
from rtx.runtime.machine import describe_machine


def models_of(given: str) -> list[ModelName]:
    """Names of models, separated by commas.

    Raises:
        click.BadParameter: there is no such model.
    """
    names = words_of(given)
    if unknown := [name for name in names if name not in CHECKPOINTS]:
        raise click.BadParameter(f"--models: expected some of {', '.join(CHECKPOINTS)}, got {', '.join(unknown)}")
    return [name for name in CHECKPOINTS if name in names]


def _end_on_sigterm() -> None:
    """As Ctrl-C does, so that workers are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def words_of(given: str) -> tuple[str, ...]:
    return tuple(word for part in given.split(",") if (word := part.strip()))


@click.command()
@click.option("--models", default="minilm,base,qwen3", show_default=True, help="Of these three, separated by commas.")
@click.option("--peers", default="", help="Words of the names of peers, separated by commas.  [default: all]")
@click.option("--rounds", type=click.IntRange(min=1), help="[default: 5, of larger models 3]")
@click.option("--threads", type=click.IntRange(min=1), default=usable_cores, show_default="usable cores")
@click.option(
    "--gpu",
    is_flag=True,
    help="On the first NVIDIA GPU, in fp16, with vLLM and the like.",
)
@click.option("--brief", is_flag=True, help="MiniLM, few texts, two rounds.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=CHECKOUT / "build" / "peers.json")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=CHECKOUT / "build" / "peers",
    help="For checkpoints and what peers make of them; kept between runs.",
)
def main(
    models: str, peers: str, rounds: int | None, threads: int, gpu: bool, brief: bool, out: Path, folder: Path
) -> None:
    """Measure rtx and its peers side by side."""
    try:
        machine_gpu = find_gpu(0) if gpu else None
    except EngineError as none:
        raise click.ClickException(f"--gpu: {none}") from none
    plan = BRIEF if brief else Plan()
    if rounds is not None:
        plan = dataclasses.replace(plan, rounds=rounds, large_rounds=rounds)
    names = models_of("minilm" if brief else models)
    _end_on_sigterm()
    begun = time.monotonic()
    ours = OURS_ON_GPU if gpu else OURS
    comparison = Comparison(plan, chosen(words_of(peers), gpu=gpu), folder, threads, ours)
    # Before anything runs: its load is part of it.
    machine = describe_machine()
    report: dict[str, Any] = {"threads": threads, "plan": dataclasses.asdict(plan), "models": []}
    report |= {"machine": dataclasses.asdict(machine), "not_installed": comparison.missing}
    out.parent.mkdir(parents=True, exist_ok=True)
    for result in comparison.run(names):
        for line in tables(result):
            click.echo(line)
        report["models"].append(plain(result))
        # After each model: what comes later may be interrupted.
        with atomic_file(out) as stream:
            stream.write((json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    for environment, reason in comparison.missing.items():
        click.echo(f"- {environment}: not installed: {reason}")
    where = f"{machine_gpu.name}, " if machine_gpu is not None else ""
    sets = ", ".join(machine.instruction_sets)
    click.echo(f"\n{where}{machine.cpu}, {threads} threads, {sets}; {elapsed(begun)}; {out}")


if __name__ == "__main__":
    main()
