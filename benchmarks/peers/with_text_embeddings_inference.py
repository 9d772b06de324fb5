"""Text Embeddings Inference: its server, started here, and asked over HTTP on this machine, in half precision.

It comes as a container or is built with cargo, and has to be on the PATH as `text-embeddings-router`. Requests of
`batch_size` items are sent at once; the server puts them together by tokens. Nobody has run it here.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.worker import Run, Source, end_with_parent, serve

PROGRAM = "text-embeddings-router"
# At once; the server takes 512.
_MOST_REQUESTS = 256
_START_S, _ANSWER_S = 300.0, 300.0
# The server is on this machine, whatever proxies there are.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_VERSIONS: dict[str, str] = {}


def load(source: Source, _form: str, _threads: int) -> Run:
    if shutil.which(PROGRAM) is None:
        raise FileNotFoundError(f"{PROGRAM} is not on the PATH: github.com/huggingface/text-embeddings-inference")
    url = f"http://127.0.0.1:{_start(source.checkpoint)}"
    with _OPENER.open(f"{url}/info", timeout=_ANSWER_S) as answer:
        _VERSIONS[PROGRAM] = str(json.load(answer)["version"])
    pool = ThreadPoolExecutor(_MOST_REQUESTS)

    def ask(items: Sequence[Any], batch_size: int, path: str, **options: object) -> list[Any]:
        parts = [list(items[at : at + batch_size]) for at in range(0, len(items), batch_size)]
        answers = pool.map(lambda part: _post(f"{url}{path}", {"inputs": part, "truncate": True, **options}), parts)
        return [one for answer in answers for one in answer]

    def embed(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        return np.array(ask(items, batch_size, "/embed", normalize=True), dtype=np.float32)

    def score(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        found = ask(items, batch_size, "/predict", raw_scores=True)
        return np.array([classes[0]["score"] for classes in found], dtype=np.float32)

    return embed if source.task == "embed" else score


def _start(checkpoint: Path) -> int:
    """Start the server, which ends with this process, and wait until it answers: its port.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    place = ["--hostname", "127.0.0.1", "--port", str(port)]
    # By default a request may have 32 items.
    command = [PROGRAM, "--model-id", str(checkpoint), "--dtype", "float16", "--max-client-batch-size", "1024", *place]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"{PROGRAM} ended with {server.returncode}")
        try:
            with _OPENER.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return port
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"{PROGRAM} did not answer within {_START_S:g} s")


def _post(url: str, content: dict[str, Any]) -> list[Any]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=_ANSWER_S) as answer:
            found: list[Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as refused:
        raise RuntimeError(f"{refused.code}: {refused.read().decode(errors='replace')}") from refused


if __name__ == "__main__":
    serve(load=load, packages=(), versions=lambda: _VERSIONS)
