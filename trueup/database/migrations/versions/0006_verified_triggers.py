"""Which triggers were at work, and what columns they counted, when the balances were compared with the log."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE trueup.installation ADD COLUMN triggers text")
