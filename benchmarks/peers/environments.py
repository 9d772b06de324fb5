"""Each peer's virtual environment, below .venvs/peers and kept between runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from rtx.runtime.errors import EngineError
from rtx.runtime.machine import describe_machine

_HERE = Path(__file__).parent
CHECKOUT = _HERE.parents[1]
REQUIREMENTS = _HERE / "requirements"
OWN = "rtx"
"""The environment that the driver itself runs in."""


def ensure_environment(name: str, folder: Path = CHECKOUT / ".venvs" / "peers") -> tuple[Path, str]:
    """Python of an environment with the packages of requirements/NAME.txt, made anew when these change.

    Packages of NAME.no_deps.txt come without what they ask for, and NAME.constraints.txt takes the place of
    the common constraints.

    Returns:
        The interpreter, and what it is known by: as long as that is the same, what was made in it can be kept.

    Raises:
        EngineError: a package could not be installed.
    """
    if name == OWN:
        commit = describe_machine().commit
        # What this project exports changes with its code.
        return Path(sys.executable), commit if commit and not commit.endswith("+") else str(time.time())
    listed, own = REQUIREMENTS / f"{name}.txt", REQUIREMENTS / f"{name}.constraints.txt"
    constraints = own if own.exists() else REQUIREMENTS / "constraints.txt"
    alone = REQUIREMENTS / f"{name}.no_deps.txt"
    wanted = "".join(file.read_text(encoding="utf-8") for file in (constraints, listed, alone) if file.exists())
    place = folder / name
    ready, python = place / ".ready", place / "bin" / "python"
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        _install(python, ["-c", str(constraints), "-r", str(listed)])
        if alone.exists():
            _install(python, ["--no-deps", "-r", str(alone)])
        ready.write_text(wanted, encoding="utf-8")
    return python, wanted


def _install(python: Path, arguments: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise EngineError(f"pip: {errors[-1] if errors else f'exit code {done.returncode}'}")
