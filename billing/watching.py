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
# The rest stays as it was compared: what has come of it since would be taken for counted.
SAVE_TRIGGERS = "UPDATE trueup.installation SET triggers = trueup.trigger_marks();"
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


def is_untouched(connection: Connection) -> bool:
    """Return whether the triggers are the very ones that were there when the database was made ready.

    Or when it was last begun to make it so. Also where a version of trueup did that which did not write them down. Not
    where what compares them went with a detach that was given up: who knows what was written since.
    """
    condition = "to_jsonb(i)->>'triggers' IS NULL"
    if connection.scalar(text("SELECT to_regproc('trueup.trigger_marks') IS NOT NULL")):
        condition = "triggers IS NULL OR triggers = trueup.trigger_marks()"
    return connection.scalar(text(f"SELECT {condition} FROM trueup.installation i")) is not False
