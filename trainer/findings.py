"""What a check of training data reports: something that occurs, how often, and some examples."""

from __future__ import annotations

from dataclasses import dataclass, field

from rtx.runtime.items import Content, describe

SHOWN = 3
_TEXT_CHARACTERS = 60


@dataclass
class Finding:
    """Something that occurs in the data.

    Attributes:
        kind: short name, for programs.
        text: what it is, as "rows that cannot be used".
        count: how often.
        examples: the first, each with file and line.
    """

    kind: str
    text: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if example and len(self.examples) < SHOWN:
            self.examples.append(example)


def quoted(text: str) -> str:
    """The beginning of a text, on one line."""
    if isinstance(text, Content):
        return describe(text)
    line = " ".join(text[: 4 * _TEXT_CHARACTERS].split())
    return f'"{line[: _TEXT_CHARACTERS - 1]}…"' if len(line) > _TEXT_CHARACTERS else f'"{line}"'
