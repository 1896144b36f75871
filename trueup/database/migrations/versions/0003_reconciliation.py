"""Grants used across windows, drift with certainty and decisions, runs in shards, defects, alerts."""

from alembic import context, op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# What each constraint prevents stands beside its twin in database/schema. The defaults are for rows that are there.
HOLDS = """
ALTER TABLE trueup.hold
    ADD COLUMN body_ended_at timestamptz,
    ADD COLUMN duplicate_waits integer DEFAULT 0 NOT NULL;
ALTER TABLE trueup.outbox ADD COLUMN tries integer DEFAULT 1 NOT NULL;
"""

GRANTS = """
ALTER TABLE trueup.charge ADD COLUMN counter_lowered boolean;
ALTER TABLE trueup.token_grant
    ADD COLUMN granted_by text DEFAULT '' NOT NULL,
    ADD COLUMN revoked_by text,
    ADD COLUMN revoke_reason text;
UPDATE trueup.token_grant SET revoked_by = '' WHERE revoked_at IS NOT NULL;
ALTER TABLE trueup.token_grant
    ADD CONSTRAINT token_grant_revoked_by_someone CHECK ((revoked_at IS NULL) = (revoked_by IS NULL));
CREATE TABLE trueup.grant_use (
    user_id {user_id} NOT NULL,
    grant_id bigint NOT NULL,
    window_start timestamptz NOT NULL,
    tokens bigint NOT NULL,
    CONSTRAINT grant_use_pkey PRIMARY KEY (user_id, grant_id, window_start),
    CONSTRAINT grant_use_not_negative CHECK (tokens >= 0)
);
CREATE TABLE trueup.window_change (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    window_start timestamptz NOT NULL,
    token_plan_id text,
    full_plan_id text,
    plan_tokens bigint,
    changed_at timestamptz NOT NULL,
    settled_until timestamptz,
    CONSTRAINT window_change_pkey PRIMARY KEY (user_id, id)
);
"""

DRIFTS = """
ALTER TABLE trueup.drift
    ADD COLUMN certainty text DEFAULT 'likely' NOT NULL,
    ADD COLUMN tokens_explained bigint DEFAULT 0 NOT NULL,
    ADD COLUMN reason text DEFAULT '' NOT NULL,
    ADD COLUMN last_run_id bigint,
    ADD COLUMN last_seen_at timestamptz;
UPDATE trueup.drift SET last_run_id = run_id, last_seen_at = found_at;
ALTER TABLE trueup.drift
    ALTER COLUMN last_run_id SET NOT NULL,
    ALTER COLUMN last_seen_at SET NOT NULL,
    DROP CONSTRAINT drift_action_is_known,
    ADD CONSTRAINT drift_action_is_known CHECK (
        action IN ('corrected', 'reported', 'review', 'lost_race', 'waiting', 'tolerated', 'ignored')),
    ADD CONSTRAINT drift_certainty_is_known CHECK (certainty IN ('certain', 'likely', 'possible'));
CREATE INDEX drift_by_last_run ON trueup.drift (last_run_id);
CREATE INDEX drift_in_review ON trueup.drift (id) WHERE action = 'review';
CREATE TABLE trueup.drift_decision (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    drift_id bigint NOT NULL,
    decision text NOT NULL,
    decided_by text NOT NULL,
    note text NOT NULL,
    counter_before bigint,
    counter_after bigint,
    grant_id bigint,
    decided_at timestamptz NOT NULL,
    window_start timestamptz,
    CONSTRAINT drift_decision_pkey PRIMARY KEY (user_id, id),
    CONSTRAINT drift_decision_is_known CHECK (decision IN ('accept', 'grant', 'ignore', 'undo')),
    CONSTRAINT drift_decision_once UNIQUE (user_id, drift_id, decision)
);
"""

RUNS = """
ALTER TABLE trueup.reconcile_run
    ADD COLUMN kind text DEFAULT 'quick' NOT NULL,
    ADD COLUMN period timestamptz,
    ADD COLUMN requested_by text DEFAULT '' NOT NULL,
    ADD COLUMN found_new bigint DEFAULT 0 NOT NULL,
    ADD COLUMN in_review bigint DEFAULT 0 NOT NULL,
    ADD COLUMN tokens_explained bigint DEFAULT 0 NOT NULL,
    ADD COLUMN defects bigint DEFAULT 0 NOT NULL,
    ADD COLUMN alerted_at timestamptz,
    ADD COLUMN rules jsonb DEFAULT '{{}}' NOT NULL,
    ADD COLUMN owner text,
    ADD COLUMN lease_until timestamptz,
    ADD CONSTRAINT reconcile_run_kind_is_known CHECK (kind IN ('quick', 'deep')),
    ADD CONSTRAINT reconcile_run_once_per_period UNIQUE (kind, period);
UPDATE trueup.reconcile_run SET status = 'interrupted', finished_at = clock_timestamp() WHERE status = 'running';
CREATE UNIQUE INDEX reconcile_run_one_at_work ON trueup.reconcile_run (status) WHERE status = 'running';
CREATE TABLE trueup.reconcile_shard (
    run_id bigint NOT NULL,
    number integer NOT NULL,
    first_user {user_id},
    last_user {user_id},
    cursor_user {user_id},
    status text NOT NULL,
    owner text,
    lease_until timestamptz,
    attempts integer DEFAULT 0 NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    total bigint,
    checked bigint DEFAULT 0 NOT NULL,
    updated_at timestamptz NOT NULL,
    error text,
    CONSTRAINT reconcile_shard_pkey PRIMARY KEY (run_id, number),
    CONSTRAINT reconcile_shard_status_is_known CHECK (status IN ('waiting', 'running', 'finished', 'failed'))
);
CREATE TABLE trueup.defect (
    id bigint GENERATED ALWAYS AS IDENTITY,
    run_id bigint NOT NULL,
    user_id {user_id},
    kind text NOT NULL,
    seen bigint,
    expected bigint,
    repaired boolean NOT NULL,
    detail jsonb DEFAULT '{{}}' NOT NULL,
    found_at timestamptz NOT NULL,
    PRIMARY KEY (id)
);
CREATE INDEX defect_by_run ON trueup.defect (run_id);
"""

ALERTS = """
CREATE TABLE trueup.alert (
    id bigint GENERATED ALWAYS AS IDENTITY,
    key text NOT NULL,
    kind text NOT NULL,
    channel text NOT NULL,
    payload jsonb NOT NULL,
    status text NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    next_attempt_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    sent_at timestamptz,
    error text,
    PRIMARY KEY (id),
    CONSTRAINT alert_once UNIQUE (key, channel),
    CONSTRAINT alert_status_is_known CHECK (status IN ('waiting', 'sent', 'failed'))
);
"""


def upgrade() -> None:
    user_id_type = context.config.attributes["mapping"].user_id_type
    for part in (HOLDS, GRANTS, DRIFTS, RUNS, ALERTS):
        op.execute(part.format(user_id=user_id_type))
