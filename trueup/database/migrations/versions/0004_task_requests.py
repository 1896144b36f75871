"""Tasks that were asked for over HTTP."""

from alembic import context, op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# What each constraint prevents stands beside its twin in trueup/database/schema.
REQUESTS = """
CREATE TABLE trueup.task_request (
    user_id {user_id} NOT NULL,
    idempotency_key text NOT NULL,
    fingerprint text NOT NULL,
    task_id text NOT NULL,
    task text NOT NULL,
    created_at timestamptz NOT NULL,
    sent_at timestamptz,
    CONSTRAINT task_request_pkey PRIMARY KEY (user_id, idempotency_key),
    CONSTRAINT task_request_by_task UNIQUE (user_id, task_id)
);
CREATE INDEX task_request_by_age ON trueup.task_request (created_at);
"""


def upgrade() -> None:
    op.execute(REQUESTS.format(user_id=context.config.attributes["mapping"].user_id_type))
