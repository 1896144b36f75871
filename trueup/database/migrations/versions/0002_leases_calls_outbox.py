"""Leases of holds, calls in flight, the outbox of side effects."""

from alembic import context, op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# What each constraint prevents stands beside its twin in database/schema. The defaults are for rows that are there.
CHANGES = """
ALTER TABLE trueup.hold
    ADD COLUMN retries integer DEFAULT 0 NOT NULL,
    ADD COLUMN lease_until timestamptz DEFAULT '-infinity' NOT NULL,
    ADD COLUMN completed boolean DEFAULT false NOT NULL,
    ADD COLUMN duplicate_until timestamptz;
ALTER TABLE trueup.charge ADD COLUMN hold_id bigint;
CREATE INDEX charge_by_time ON trueup.charge USING brin (charged_at);
CREATE TABLE trueup.call_intent (
    user_id {user_id} NOT NULL,
    task_id text NOT NULL,
    call_key text NOT NULL,
    attempt integer NOT NULL,
    tokens_bound bigint NOT NULL,
    outcome text NOT NULL,
    started_at timestamptz NOT NULL,
    CONSTRAINT call_intent_pkey PRIMARY KEY (user_id, task_id, call_key, attempt),
    CONSTRAINT call_intent_outcome_is_known CHECK (outcome IN ('started', 'unknown'))
);
CREATE TABLE trueup.outbox (
    user_id {user_id} NOT NULL,
    task_id text NOT NULL,
    effect text NOT NULL,
    status text NOT NULL,
    detail jsonb DEFAULT '{{}}' NOT NULL,
    created_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL,
    CONSTRAINT outbox_pkey PRIMARY KEY (user_id, task_id, effect),
    CONSTRAINT outbox_status_is_known CHECK (status IN ('sending', 'sent', 'unknown', 'failed'))
);
"""


def upgrade() -> None:
    op.execute(CHANGES.format(user_id=context.config.attributes["mapping"].user_id_type))
