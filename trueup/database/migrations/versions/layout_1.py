"""Every table of trueup, as `trueup.database.schema` states them.

Only a database without trueup's tables runs this revision, and it gets the tables of the version that runs it. Then
`trueup.database.migrate` marks it as being at the newest revision. So the tables are stated once, and a release that
changes them does two things:

1. It changes the statement in `trueup.database.schema`.
2. It adds a revision here, `layout_2.py`, which alters the tables of the release before, by statements of its own. That
   revision runs in databases that are in use and never in a new one, so it may not import `trueup.database.schema`.

A test of such a release then compares a new database with one that was upgraded, by `pg_dump --schema-only`.
"""

from alembic import context, op
from sqlalchemy.schema import CreateIndex, CreateTable

from trueup.database.schema import build_metadata

revision = "layout_1"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    metadata = build_metadata(context.config.attributes["user_id_type"])
    for table in metadata.tables.values():
        op.execute(CreateTable(table))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            op.execute(CreateIndex(index))
