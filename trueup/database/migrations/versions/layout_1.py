"""Create all tables of `trueup.database.schema`.

Only a database without trueup's tables runs this revision, and it gets the tables of the installed version. Then
`trueup.database.migrate` marks the database as being at the newest revision. So the tables are defined once. A release
that changes them does two things:

1. It changes the definition in `trueup.database.schema`.
2. It adds a revision here, `layout_2.py`, with explicit statements that alter the tables of the previous release. This
   revision runs only in databases in use, so it must not import `trueup.database.schema`.

A test of that release compares a new database with an upgraded database by `pg_dump --schema-only`.
"""

from alembic import context, op
from sqlalchemy.schema import CreateIndex, CreateTable

from trueup.database.schema import build_metadata
from trueup.database.schema.columns import OPTIONS

revision = "layout_1"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    metadata = build_metadata(context.config.attributes["user_id_type"])
    for table in metadata.tables.values():
        op.execute(CreateTable(table))
        if OPTIONS in table.info:
            op.execute(f"ALTER TABLE {table} {table.info[OPTIONS]}")
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            op.execute(CreateIndex(index))
