"""What the log was like when all that it has was counted: its columns' versions, its files, its partitions."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "ALTER TABLE trueup.installation ADD COLUMN column_versions text, ADD COLUMN log_files oid[], "
        "ADD COLUMN log_parents oid[], ADD COLUMN partitions text[]"
    )
