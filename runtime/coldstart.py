"""From the start of a process to its first result, and the most memory that it took: measured on a process of its own.

The process is the program `rtx.runtime.first_result`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from rtx.runtime.errors import EngineError
from rtx.runtime.items import Content


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        first_result_s: from just before the process is started to the arrival of its first result.
        peak_rss_bytes: most resident memory at its end; None where the system does not tell.
    """

    first_result_s: float
    peak_rss_bytes: int | None


def measure(
    path: str,
    *,
    variant: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    first: Sequence[Any],
    further: Sequence[Any] = (),
) -> Start:
    """Start a process that opens a model, runs `first`, then `further`, and ends.

    Args:
        path: a bundle, or a checkpoint for PyTorch.
        variant: of the bundle; None for a checkpoint, or for the bundle's default.
        threads: of one run; None for all cores.
        device: of a bundle, as for `Session.open`.
        first: the first call's items: texts, images as `Content`, or pairs of these.
        further: items that are run afterwards, for the peak of memory under load.

    Raises:
        EngineError: the process failed; with the last lines that it wrote.
    """
    request = {"path": path, "variant": variant, "threads": threads, "device": device, "first": _plain(first)}
    # -P: what lies in the working directory is not importable by the process, as in any installed program.
    command = [sys.executable, "-P", "-m", "rtx.runtime.first_result"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        start = time.monotonic()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _send(process.stdin, request)
                answer = process.stdout.readline()
                elapsed_s = time.monotonic() - start
                _send(process.stdin, _plain(further))
                process.stdin.close()
                last = process.stdout.readline()
            except BrokenPipeError:
                answer = last = ""
                with suppress(BrokenPipeError):  # what could not be sent is still in the buffer
                    process.stdin.close()
        if process.returncode != 0 or not answer or not last:
            log.seek(0)
            raise EngineError(f"{path}: a process that opens it failed:\n{log.read()[-2000:].strip()}")
        return Start(elapsed_s, json.loads(last)["peak_rss_bytes"])


def _plain(items: Sequence[Any]) -> list[Any]:
    """Items as JSON has them; a `Content` would come out of it as a text."""
    return [
        {"text": item.item.text, "image": list(item.item.images)}
        if isinstance(item, Content)
        else item
        if isinstance(item, str)
        else _plain(item)
        for item in items
    ]


def _send(stream: IO[str], message: object) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
