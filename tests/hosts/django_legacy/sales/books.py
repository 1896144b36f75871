"""The project's own record of its writes, each entered after its commit."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from django.db import DatabaseError


@dataclass
class Books:
    """One thread's entries.

    `logs`: id, user, tokens, success. `counters`: subscription, written value. `decrements`: subscription, tokens.
    `payments`: their transactions. `errors`: refusals of the database, ignored by the project or not. `slowest`:
    seconds of its longest transaction, and its name.
    """

    logs: list[tuple[str, int, int, bool]] = field(default_factory=list)
    counters: list[tuple[int, int]] = field(default_factory=list)
    decrements: list[tuple[int, int]] = field(default_factory=list)
    payments: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    steps: int = 0

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Time a transaction with its commit, and keep its error."""
        begun = time.monotonic()
        try:
            yield
        except DatabaseError as error:
            self.errors.append(f"{what}: {error!r}")
            raise
        finally:
            self.slowest = max(self.slowest, (time.monotonic() - begun, what))
            self.steps += 1


def write(books: Iterable[Books], path: Path) -> None:
    path.write_text(json.dumps([asdict(each) for each in books]))
