"""The triggers that report host writes, and the baseline saved when balances were verified: see baseline.sql."""

from sqlalchemy import Connection, text

LOG_TRIGGERS = ("trueup_inserted", "trueup_updated", "trueup_deleted", "trueup_truncated")
WINDOW_TRIGGER = "trueup_window_changed"

# The baseline that the gate compares with, by column of trueup.installation.
_BASELINE = {
    "triggers": "trueup.trigger_marks()",
    "column_versions": "(SELECT c.versions FROM trueup.column_versions() c)",
    "log_files": "trueup.log_files()",
    "log_parents": "trueup.log_parents()",
    "partitions": "trueup.partition_marks(trueup.log_parents())",
}


def _set(values: dict[str, str]) -> str:
    pairs = ",\n    ".join(f"{column} = {value}" for column, value in values.items())
    return f"UPDATE trueup.installation SET\n    {pairs}"


SAVE_BASELINE = f"{_set(_BASELINE)};\n"
# Only the triggers: a change of the log since the last comparison must still be found.
SAVE_TRIGGER_BASELINE = f"{_set({'triggers': _BASELINE['triggers']})};\n"
# Only values that are missing: no lock keeps the host from changing its tables here, so saved values stay.
FILL_BASELINE = (
    _set({column: f"coalesce({column}, {value})" for column, value in _BASELINE.items()})
    + f"\nWHERE {' OR '.join(f'{column} IS NULL' for column in _BASELINE)};\n"
)


def are_triggers_unchanged(connection: Connection) -> bool:
    """Return whether the triggers are the same as when the baseline was saved.

    True for a version of trueup that saved none. False if an interrupted detach dropped the function that compares
    them: nothing shows which writes were missed since.
    """
    condition = "to_jsonb(i)->>'triggers' IS NULL"
    if connection.scalar(text("SELECT to_regproc('trueup.trigger_marks') IS NOT NULL")):
        condition = "triggers IS NULL OR triggers = trueup.trigger_marks()"
    return connection.scalar(text(f"SELECT {condition} FROM trueup.installation i")) is not False


def is_installed(connection: Connection) -> bool:
    """Return whether this database has trueup's schema, complete or not."""
    return connection.scalar(text("SELECT to_regclass('trueup.installation') IS NOT NULL")) is True
