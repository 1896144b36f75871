"""Balances, usage deltas, grants, holds, charges, reconcile runs and drift."""

from alembic import context, op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# What each constraint prevents stands beside its twin in trueup/database/schema.
TABLES = """
CREATE TABLE trueup.installation (
    singleton boolean DEFAULT true NOT NULL,
    mapping_fingerprint text NOT NULL,
    mapping jsonb NOT NULL,
    installed_at timestamptz DEFAULT now() NOT NULL,
    PRIMARY KEY (singleton),
    CONSTRAINT installation_is_one_row CHECK (singleton)
);
CREATE TABLE trueup.balance (
    user_id {user_id} NOT NULL,
    window_start timestamptz NOT NULL,
    log_epoch bigint NOT NULL,
    consumed bigint DEFAULT 0 NOT NULL,
    held bigint DEFAULT 0 NOT NULL,
    CONSTRAINT balance_pkey PRIMARY KEY (user_id),
    CONSTRAINT balance_held_not_negative CHECK (held >= 0)
) WITH (fillfactor = 50);
CREATE TABLE trueup.usage_delta (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    used_at timestamptz NOT NULL,
    tokens bigint NOT NULL,
    CONSTRAINT usage_delta_pkey PRIMARY KEY (user_id, id)
);
CREATE TABLE trueup.log_truncation (
    id bigint GENERATED ALWAYS AS IDENTITY,
    truncated_at timestamptz DEFAULT clock_timestamp() NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE trueup.token_grant (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    tokens bigint NOT NULL,
    reason text NOT NULL,
    reference text,
    granted_at timestamptz DEFAULT now() NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    CONSTRAINT token_grant_pkey PRIMARY KEY (user_id, id),
    CONSTRAINT token_grant_once_per_reference UNIQUE (user_id, reference),
    CONSTRAINT token_grant_adds_tokens CHECK (tokens > 0)
);
CREATE TABLE trueup.hold (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    task_id text NOT NULL,
    attempt integer NOT NULL,
    feature_name text NOT NULL,
    section text NOT NULL,
    owner text NOT NULL,
    status text NOT NULL,
    tokens_reserved bigint NOT NULL,
    tokens_covered bigint DEFAULT 0 NOT NULL,
    tokens_charged bigint DEFAULT 0 NOT NULL,
    calls integer DEFAULT 0 NOT NULL,
    opened_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    closed_at timestamptz,
    CONSTRAINT hold_pkey PRIMARY KEY (user_id, task_id, id),
    CONSTRAINT hold_status_is_known CHECK (status IN ('open', 'settled', 'released', 'expired')),
    CONSTRAINT hold_closed_when_not_open CHECK ((status = 'open') = (closed_at IS NULL)),
    CONSTRAINT hold_covers_what_it_has CHECK (tokens_covered BETWEEN 0 AND tokens_reserved)
);
CREATE UNIQUE INDEX hold_one_open_per_task ON trueup.hold (user_id, task_id) WHERE status = 'open';
CREATE INDEX hold_overdue ON trueup.hold (expires_at) WHERE status = 'open';
CREATE TABLE trueup.charge (
    user_id {user_id} NOT NULL,
    task_id text NOT NULL,
    call_key text NOT NULL,
    attempt integer NOT NULL,
    log_id text NOT NULL,
    section text NOT NULL,
    model_name text NOT NULL,
    tokens_total bigint NOT NULL,
    tokens_covered bigint NOT NULL,
    late boolean NOT NULL,
    answer jsonb,
    charged_at timestamptz NOT NULL,
    CONSTRAINT charge_pkey PRIMARY KEY (user_id, task_id, call_key),
    CONSTRAINT charge_covered_within_total CHECK (tokens_covered BETWEEN 0 AND tokens_total)
);
CREATE TABLE trueup.reconcile_run (
    id bigint GENERATED ALWAYS AS IDENTITY,
    dry_run boolean NOT NULL,
    only_user text,
    status text NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz,
    checked bigint DEFAULT 0 NOT NULL,
    drifted bigint DEFAULT 0 NOT NULL,
    corrected bigint DEFAULT 0 NOT NULL,
    tokens_overstated bigint DEFAULT 0 NOT NULL,
    tokens_understated bigint DEFAULT 0 NOT NULL,
    error text,
    PRIMARY KEY (id),
    CONSTRAINT reconcile_run_status_is_known
        CHECK (status IN ('running', 'finished', 'failed', 'interrupted'))
);
CREATE TABLE trueup.drift (
    user_id {user_id} NOT NULL,
    id bigint GENERATED ALWAYS AS IDENTITY,
    run_id bigint NOT NULL,
    subscription_id text NOT NULL,
    observed bigint,
    expected bigint NOT NULL,
    written bigint,
    cause text NOT NULL,
    action text NOT NULL,
    evidence jsonb NOT NULL,
    found_at timestamptz NOT NULL,
    CONSTRAINT drift_pkey PRIMARY KEY (user_id, id),
    CONSTRAINT drift_written_when_corrected CHECK ((action = 'corrected') = (written IS NOT NULL)),
    CONSTRAINT drift_action_is_known
        CHECK (action IN ('corrected', 'reported', 'review', 'lost_race'))
);
CREATE INDEX drift_by_run ON trueup.drift (run_id);
"""


def upgrade() -> None:
    user_id_type = context.config.attributes["mapping"].user_id_type
    op.execute(TABLES.format(user_id=user_id_type))
