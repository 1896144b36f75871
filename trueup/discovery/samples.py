"""Reads a few of the host's rows if the role may. Values are only compared, and never shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, TextClause, text

from trueup.discovery.catalog import HostTable
from trueup.host.mapping import quote_identifier, quote_table

ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Reads at most `ROWS` rows of a table. Without the right to read it, the answers are None."""

    connection: Connection

    def word(self, table: HostTable, column: str, words: Sequence[str]) -> str | None:
        """Return the one value of the column that is one of these words, in any case. None: no value, or several."""
        labels = list(table.columns[column].labels)
        if not labels and table.readable:
            labels = [str(value) for value in self._values(table, column) if value is not None]
        used = [label for label in dict.fromkeys(labels) if label.lower() in words]
        return used[0] if len(used) == 1 else None

    def adds_up(self, table: HostTable, prompt: str, completion: str, total: str) -> bool | None:
        """Return whether most totals are the sum of both parts. None: not known."""
        if not table.readable:
            return None
        parts = [quote_identifier(name) for name in (prompt, completion, total)]
        found = self.connection.execute(
            self._sample(table, f"avg(CASE WHEN {parts[0]} + {parts[1]} = {parts[2]} THEN 1 ELSE 0 END)", parts)
        ).scalar_one()
        return None if found is None else bool(found > 0.5)

    def _values(self, table: HostTable, column: str) -> list[object]:
        name = quote_identifier(column)
        return list(self.connection.scalars(self._sample(table, f"DISTINCT CAST({name} AS text)", [name])))

    def _sample(self, table: HostTable, wanted: str, names: list[str]) -> TextClause:
        query = (
            f"SELECT {wanted} FROM (SELECT {', '.join(names)} FROM {quote_table(table.setting)} LIMIT {ROWS}) sample"
        )
        return text(query.replace(":", "\\:"))
