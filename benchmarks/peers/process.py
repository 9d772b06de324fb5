"""The driver's side of a worker: a process that is asked, and stands still in between.

A worker that waits must not take time from the one that runs: ONNX Runtime's threads go on looking for work for a
while. So it is stopped by a signal after each answer and goes on when it is asked again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rtx.runtime.errors import EngineError

_LOG_LINES = 3


class Worker:
    """A process that runs `worker.serve`; not started before it is asked for the first time.

    Args:
        name: in errors.
        command: of the process.
        environment: of the process.
        log: file for what it writes besides answers.
    """

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._command = list(command)
        self._environment = dict(environment)
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process, which `ask` does by itself."""
        if self._process is not None:
            return
        with self._log.open("a", encoding="utf-8") as log:
            # A session of its own: Ctrl-C reaches the driver alone, which then ends what it has started.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=self._environment,
                start_new_session=True,
            )

    def ask(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            EngineError: the worker says why it could not, ended, or took longer than `timeout_s`; the last two end it.
        """
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(timeout_s, self._give_up, [late])
        timer.daemon = True
        timer.start()
        try:
            self._signal(signal.SIGCONT)
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            self._signal(signal.SIGSTOP)
        finally:
            timer.cancel()
        if not line:
            self.close()
            reason = f"no answer within {timeout_s:g} s" if late.is_set() else self._last_words(process.returncode)
            raise EngineError(f"{self.name}: {request['do']}: {reason}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {request['do']}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process and those that it started; calling it twice is allowed."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _give_up(self, late: threading.Event) -> None:
        late.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _last_words(self, returncode: int) -> str:
        killed = ", as when memory runs out" if returncode == -signal.SIGKILL else ""
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return f"the process ended with {returncode}{killed}: {' / '.join(lines[-_LOG_LINES:])}"
