{% from "drift/evidence_query.sql" import base_points, evidence %}
{% from "drift/host_records.sql" import counter_limit, plan_sizes, purchases %}
-- The evidence for the causes of drift: the host's rows about each drifted counter since it was last known to be right.
-- The preview renders the same macros, for a database without these functions.

-- The tokens that plans include.
CREATE OR REPLACE FUNCTION trueup.plan_sizes() RETURNS SETOF bigint LANGUAGE sql STABLE AS $$
    {{ plan_sizes() }}
$$;

-- The largest value that the counter's column can hold.
CREATE OR REPLACE FUNCTION trueup.counter_limit() RETURNS bigint LANGUAGE sql STABLE AS $$
    {{ counter_limit() }}
$$;

-- The completed payments. The planner inlines this function, so conditions on user and time use the indexes.
CREATE OR REPLACE FUNCTION trueup.purchases() RETURNS TABLE (
    user_id {{ user_id_type }}, id text, reference text, at timestamptz, tokens bigint, own_plan boolean, kind text,
    ends timestamptz
) LANGUAGE sql STABLE AS $$
    {{ purchases() }}
$$;

-- When each counter was last known to be right.
CREATE OR REPLACE FUNCTION trueup.base_points(
    p_users {{ user_id_type }}[], p_subscriptions text[], p_windows timestamptz[]
) RETURNS TABLE (
    user_id {{ user_id_type }}, at timestamptz, kind text, written bigint, seen_before bigint, kept bigint
) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT * FROM unnest(p_users, p_subscriptions, p_windows) AS w (user_id, subscription_id, window_start)
    ), {{ base_points() }}
    SELECT b.user_id, b.at, b.kind, b.written, b.seen_before, b.kept FROM base_points b
$$;

-- One evidence document for each of these counters; `trueup.drift.evidence` parses it. One call serves a whole batch in
-- its caller's snapshot. `p_min_age`: how long a decrement may take.
CREATE OR REPLACE FUNCTION trueup.drift_evidence(
    p_users {{ user_id_type }}[], p_subscriptions text[], p_windows timestamptz[], p_original bigint[],
    p_consumed bigint[], p_observed bigint[], p_at timestamptz, p_min_age interval
) RETURNS TABLE (user_id {{ user_id_type }}, evidence jsonb) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT * FROM unnest(p_users, p_subscriptions, p_windows, p_original, p_consumed, p_observed)
            AS w (user_id, subscription_id, window_start, original, consumed, observed)
    ), {{ evidence("p_at", "p_min_age") }}
$$;
