"""What a module asks of objects that are not there to be asked."""

from __future__ import annotations

import ast
import inspect
from typing import Any


def called(module: Any, owner: str) -> set[str]:
    """Names of what a module reads of something that it calls so: `owner.name`."""
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and (node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")) == owner
    }
