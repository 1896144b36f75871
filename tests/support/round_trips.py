"""A count of the round trips to the database."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event

from trueup.database.engine import get_engine


@contextmanager
def round_trips(trace: Path) -> Iterator[list[str]]:
    """Give a list. After the block it has the server's state after each answer; "I" means that no transaction is open.

    It covers this process's connections to the database, which must exist before the block. `trace`: a file for it.
    """
    engine, used, seen = get_engine(), [], []
    with trace.open("wb") as file:

        def watch(connection: Any, _record: Any, _proxy: Any) -> None:
            connection.pgconn.trace(file.fileno())
            used.append(connection.pgconn)

        event.listen(engine, "checkout", watch)
        try:
            yield seen
        finally:
            event.remove(engine, "checkout", watch)
            for pgconn in used:
                pgconn.untrace()  # flushes its buffer
    seen += [line.split()[-1] for line in trace.read_text().splitlines() if "ReadyForQuery" in line]
