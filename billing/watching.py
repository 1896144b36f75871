"""What tells of the host's writes, and how what did when all was counted is written down: see sql/watching.sql."""

from sqlalchemy import Connection, text

LOG_TRIGGERS = ("trueup_inserted", "trueup_updated", "trueup_deleted", "trueup_truncated")
WINDOW_TRIGGER = "trueup_window_changed"

SAVE_WATCHED = """
UPDATE trueup.installation SET triggers = trueup.trigger_marks(), column_versions = c.versions,
                               log_files = trueup.log_files(), log_parents = trueup.log_parents(),
                               partitions = trueup.partition_marks(trueup.log_parents())
FROM trueup.column_versions() c;
"""
# Where nothing keeps the host from changing them meanwhile, what was compared stays written; unless nothing is.
KEEP_WATCHED = """
UPDATE trueup.installation SET triggers = coalesce(triggers, trueup.trigger_marks()),
                               column_versions = coalesce(column_versions, c.versions),
                               log_files = coalesce(log_files, trueup.log_files()),
                               log_parents = coalesce(log_parents, trueup.log_parents()),
                               partitions = coalesce(partitions, trueup.partition_marks(trueup.log_parents()))
FROM trueup.column_versions() c
WHERE triggers IS NULL OR column_versions IS NULL OR log_files IS NULL OR log_parents IS NULL OR partitions IS NULL;
"""
# By the functions that are there, which may be of an older version; the later ones say more.
_UNTOUCHED = (
    ("trigger_marks", "triggers IS NULL OR triggers = trueup.trigger_marks()"),
    ("is_watched", "triggers IS NULL OR trueup.is_watched()"),
)


def is_untouched(connection: Connection) -> bool:
    """Return whether the triggers are the very ones that were there when the database was made ready.

    Or when it was last begun to make it so. Also where a version of trueup did that which did not write them down. Not
    where what compares them went with a detach that was given up: who knows what was written since.
    """
    statement = "to_jsonb(i)->>'triggers' IS NULL"
    for function, condition in _UNTOUCHED:
        if connection.scalar(text(f"SELECT to_regproc('trueup.{function}') IS NOT NULL")):
            statement = condition
    return connection.scalar(text(f"SELECT {statement} FROM trueup.installation i")) is not False
