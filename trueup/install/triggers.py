"""What tells of the host's writes, and how what did when all was counted is written down: see watching.sql."""

from sqlalchemy import Connection, text

LOG_TRIGGERS = ("trueup_inserted", "trueup_updated", "trueup_deleted", "trueup_truncated")
WINDOW_TRIGGER = "trueup_window_changed"

# What the gate compares, by its column in trueup.installation.
_MARKS = {
    "triggers": "trueup.trigger_marks()",
    "column_versions": "(SELECT c.versions FROM trueup.column_versions() c)",
    "log_files": "trueup.log_files()",
    "log_parents": "trueup.log_parents()",
    "partitions": "trueup.partition_marks(trueup.log_parents())",
}


def _set(values: dict[str, str]) -> str:
    return "UPDATE trueup.installation SET\n    " + ",\n    ".join(
        f"{mark} = {value}" for mark, value in values.items()
    )


SAVE_WATCHED = f"{_set(_MARKS)};\n"
# The rest stays as it was compared: what has come of it since would be taken for counted.
SAVE_TRIGGERS = f"{_set({'triggers': _MARKS['triggers']})};\n"
# Where nothing keeps the host from changing them meanwhile, what was compared stays written; unless nothing is.
KEEP_WATCHED = (
    _set({mark: f"coalesce({mark}, {value})" for mark, value in _MARKS.items()})
    + f"\nWHERE {' OR '.join(f'{mark} IS NULL' for mark in _MARKS)};\n"
)


def is_untouched(connection: Connection) -> bool:
    """Return whether the triggers are the very ones that were there when the database was made ready.

    Or when it was last begun to make it so. Also where a version of trueup did that which did not write them down. Not
    where what compares them went with a detach that was given up: who knows what was written since.
    """
    condition = "to_jsonb(i)->>'triggers' IS NULL"
    if connection.scalar(text("SELECT to_regproc('trueup.trigger_marks') IS NOT NULL")):
        condition = "triggers IS NULL OR triggers = trueup.trigger_marks()"
    return connection.scalar(text(f"SELECT {condition} FROM trueup.installation i")) is not False
