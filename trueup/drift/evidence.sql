{% from "drift/base_points.sql" import base_points %}
{% from "drift/evidence_query.sql" import evidence %}
{% from "drift/limits.sql" import counter_limit %}
{% from "drift/purchases.sql" import plan_sizes, purchases %}
-- Evidence for the causes of drift: what the host's rows say of each drifted counter, since it was last known to be
-- right. What stands in macros is asked as well by the preview, in a database without these functions.

-- The token amounts that plans sell.
CREATE OR REPLACE FUNCTION trueup.plan_sizes() RETURNS SETOF bigint LANGUAGE sql STABLE AS $$
    {{ plan_sizes() }}
$$;

-- The largest value that the counter's column can take.
CREATE OR REPLACE FUNCTION trueup.counter_limit() RETURNS bigint LANGUAGE sql STABLE AS $$
    {{ counter_limit() }}
$$;

-- What was bought and paid for. The planner inlines it, so that a user and a time reach the indexes.
CREATE OR REPLACE FUNCTION trueup.purchases() RETURNS TABLE (
    user_id {{ user_id_type }}, id text, reference text, at timestamptz, tokens bigint, own_plan boolean, kind text,
    ends timestamptz
) LANGUAGE sql STABLE AS $$
    {{ purchases() }}
$$;

-- Since when each counter is known to have been right.
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

-- All that is known of these counters, one document for each: what `trueup.drift.evidence` reads. One call serves a
-- whole batch in the snapshot of its caller.
CREATE OR REPLACE FUNCTION trueup.drift_evidence(
    p_users {{ user_id_type }}[], p_subscriptions text[], p_windows timestamptz[], p_original bigint[],
    p_consumed bigint[], p_observed bigint[], p_at timestamptz, p_min_age interval
) RETURNS TABLE (user_id {{ user_id_type }}, evidence jsonb) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT * FROM unnest(p_users, p_subscriptions, p_windows, p_original, p_consumed, p_observed)
            AS w (user_id, subscription_id, window_start, original, consumed, observed)
    ), {{ evidence("p_at", "p_min_age") }}
$$;
