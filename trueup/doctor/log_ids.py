"""The sequence that the ids of trueup's rows in the log come from: whether it has any left, and none that are taken."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.log_ids import log_id_sequence
from trueup.host.mapping import quote_identifier, quote_table
from trueup.host.setting_values import quote_literal
from trueup.settings.settings import Settings

NEAR_ITS_END = 0.9

# `most`: the sequence's end or the column's, whichever comes first. `highest` is looked for where an index has it.
_STATE = """
    SELECT s.last, least(s.seqmax, CASE a.atttypid WHEN CAST('smallint' AS regtype) THEN 32767
                                                   WHEN CAST('integer' AS regtype) THEN 2147483647
                                                   ELSE s.seqmax END) AS most,
           EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum
                                            AND i.indisvalid AND i.indpred IS NULL) AS indexed
    FROM pg_attribute a, (
        SELECT coalesce(pg_sequence_last_value(q.seqrelid), q.seqstart - q.seqincrement) AS last, q.seqmax
        FROM pg_sequence q WHERE q.seqrelid = CAST(:sequence AS regclass) AND q.seqincrement > 0
          AND has_sequence_privilege(q.seqrelid, 'USAGE, SELECT')) s
    WHERE a.attrelid = to_regclass(:table) AND a.attname = :column
"""


def check_log_ids(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield whether the next ids of the log are there, and free."""
    log, sequence = settings.host.usage_log, log_id_sequence(connection, settings.host)
    values = {"sequence": sequence, "table": quote_table(log.table), "column": log.id}
    state = connection.execute(text(_STATE), values).one_or_none() if sequence else None
    if state is None:
        yield ok("log_ids", f"Ids of trueup's rows in {log.table} come from no sequence that could end.")
        return
    column, table = quote_identifier(log.id), quote_table(log.table)
    ends = text(f"SELECT CAST(max({column}) AS bigint) FROM {table}".replace(":", r"\:"))
    highest = connection.scalar(ends) if state.indexed else None
    used = round(state.last / state.most, 3)
    if highest is not None and highest > state.last:
        yield error(
            "log_ids",
            f"{sequence} stands at {state.last}, below the highest id {highest}: charges that draw a taken one fail.",
            f"Run: SELECT setval({quote_literal(str(sequence))}, (SELECT max({column}) FROM {table}));",
            sequence=sequence,
            last=state.last,
            highest_id=highest,
        )
    elif used >= NEAR_ITS_END:
        yield warning(
            "log_ids",
            f"{used:.1%} of the ids that {sequence} and its column can hold are used; after the last, charges fail.",
            "When the host can wait for it, run: "
            f"ALTER TABLE {table} ALTER {column} TYPE bigint; ALTER SEQUENCE {sequence} AS bigint;",
            sequence=sequence,
            used=used,
        )
    else:
        yield ok(
            "log_ids", f"{sequence} has ids left, and is above those that there are.", sequence=sequence, used=used
        )
