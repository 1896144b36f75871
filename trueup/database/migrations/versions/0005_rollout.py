"""How strict the gate is for each feature, who said so, and what it let pass."""

from alembic import context, op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# What each constraint prevents stands beside its twin in trueup/database/schema.
ROLLOUT = """
CREATE TABLE trueup.gate_mode (
    feature_name text NOT NULL,
    mode text NOT NULL,
    CONSTRAINT gate_mode_pkey PRIMARY KEY (feature_name),
    CONSTRAINT gate_mode_is_known CHECK (mode IN ('enforce', 'observe', 'off'))
);
CREATE TABLE trueup.gate_mode_change (
    id bigint GENERATED ALWAYS AS IDENTITY,
    feature_name text NOT NULL,
    mode_before text,
    mode text,
    changed_by text NOT NULL,
    note text NOT NULL,
    changed_at timestamptz NOT NULL,
    CONSTRAINT gate_mode_change_pkey PRIMARY KEY (id)
);
CREATE TABLE trueup.observed_denial (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    task_id text NOT NULL,
    feature_name text NOT NULL,
    reason text NOT NULL,
    tokens bigint NOT NULL,
    denied_at timestamptz NOT NULL,
    CONSTRAINT observed_denial_pkey PRIMARY KEY (user_id, id)
);
CREATE INDEX observed_denial_by_time ON trueup.observed_denial (denied_at);
"""


def upgrade() -> None:
    op.execute(ROLLOUT.format(user_id=context.config.attributes["mapping"].user_id_type))
