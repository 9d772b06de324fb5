"""The program that `rtx.runtime.coldstart` starts: it opens a model and runs what it is sent.

It imports nothing that a program which only embeds would not import: that would count.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def peak_rss_bytes() -> int | None:
    """Most resident memory of this process so far; None where the system does not tell."""
    try:
        # Not ru_maxrss: on Linux a process inherits the peak of the one that started it.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _main() -> None:
    """The process: reads a request and then items, a line each, and answers each with a line."""
    request = json.loads(sys.stdin.readline())
    with _open(request["path"], request["variant"], request["threads"], request["device"]) as model:
        run = model.embed if model.contract.task == "embed" else model.logits
        run(request["first"])
        print("{}", flush=True)
        further = json.loads(sys.stdin.readline())
        if further:
            run(further)
        print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}), flush=True)


def _open(path: str, variant: str | None, threads: int | None, device: str) -> Any:
    """As a program that serves a bundle does, without what only the command line needs."""
    if variant is None:
        from rtx.runtime.cli import open_model

        return open_model(path, threads=threads, device=device)
    from rtx.runtime.bundle import Bundle
    from rtx.runtime.embedder import Embedder
    from rtx.runtime.reranker import Reranker

    kind = Embedder if Bundle.open(path).manifest.contract.task == "embed" else Reranker
    return kind.open(path, variant=variant, threads=threads, device=device)


if __name__ == "__main__":
    _main()
