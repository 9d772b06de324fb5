"""Names that are loaded when they are first used, and absent packages named by the extra that brings them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rtx.runtime.errors import MissingExtraError


@contextmanager
def naming_the_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn the absence of a package in the block into a MissingExtraError.

    Args:
        extra: the optional dependencies that bring it; "" leaves the error as it is.
        purpose: what needs it, as the beginning of a sentence.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        package = (missing.name or "").split(".")[0]
        # A module of rtx that is not found is our own mistake.
        if not extra or package in ("", "rtx"):
            raise
        raise MissingExtraError(package, extra, purpose) from missing


def load(package: str, modules: Mapping[str, str], name: str, *, extra: str = "") -> object:
    """A public name of a package, from the module that defines it: the body of a module's `__getattr__` (PEP 562).

    Args:
        package: whose name it is.
        modules: public name to module.
        name: what is asked for.
        extra: the optional dependencies that the modules need.

    Raises:
        AttributeError: the package has no such name.
        MissingExtraError: a package that its module needs is not installed.
    """
    if name not in modules:
        raise AttributeError(f"module '{package}' has no attribute '{name}'")
    with naming_the_extra(extra, f"{package}.{name}"):
        return getattr(importlib.import_module(modules[name]), name)
