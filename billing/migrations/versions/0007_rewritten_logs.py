"""In which files the log's rows were, and of which versions its counted columns, when all that it has was counted."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE trueup.installation ADD COLUMN column_versions text, ADD COLUMN log_files oid[]")
