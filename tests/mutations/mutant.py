"""A mutant: one changed place of the code."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine

ROOT = Path(__file__).parents[2]


class Mutable(Protocol):
    """A function of the code that can be replaced by a mutant of it."""

    name: str

    def install(self, mutant: Any) -> None:
        """Replace the function. Raises `InvalidMutantError` if the mutant is no code."""

    def install_again(self, mutant: Any, engine: Engine) -> None:
        """Replace the function in another database too, if it is the same function there."""

    def restore(self) -> None:
        """Install the function itself again."""


class InvalidMutantError(Exception):
    """The changed text is no code that PostgreSQL or Python accepts."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A changed place. `was`, `now`: the lines with it, each space as one. `code`: the changed function."""

    function: Mutable
    kind: str
    was: str
    now: str
    code: Any

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what names this mutant in `equivalents.toml`. It stays true when lines move: it has no line number."""
        return self.function.name, self.was, self.now


def changed(text: str, start: int, end: int, new: str) -> tuple[str, str, str]:
    """Replace text[start:end]. Returns the whole text, and the changed lines before and after, each space as one."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", end)
    last = len(text) if last < 0 else last
    was, now = text[first:last], text[first:start] + new + text[end:last]
    return text[:start] + new + text[end:], " ".join(was.split()), " ".join(now.split())


def unique(code: str, mutants: Iterable[Mutant]) -> Iterator[Mutant]:
    """Leave out a mutant that two kinds make, or that is the code itself."""
    seen = {code}
    for mutant in mutants:
        if mutant.code not in seen:
            seen.add(mutant.code)
            yield mutant
