{% from "accounts/entitlements.sql" import clock_tolerance, entitlements %}
{% from "host/rows.sql" import countable, used_since %}
-- Reads. These are functions and not views: a view on a host table would make the host's own
-- ALTER TABLE fail. Simple SQL functions are inlined by the planner, so a WHERE reaches the indexes.

-- The one decision "may this run?". NULL: yes. Otherwise one of the specification's reason codes, or
-- 'usage_uncountable': the log's rows add up to more than can be counted.
CREATE OR REPLACE FUNCTION trueup.decide(
    subscribed boolean, is_active boolean, end_date timestamptz,
    original bigint, consumed bigint, held bigint, estimate bigint, at timestamptz
) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN subscribed IS NOT TRUE THEN 'no_subscription'
        WHEN is_active IS NOT TRUE THEN 'subscription_deactivated'
        WHEN end_date < at THEN 'subscription_expired'
        WHEN consumed >= {{ uncountable }} THEN 'usage_uncountable'
        WHEN original <= consumed THEN 'no_tokens_remaining'
        WHEN original - consumed - held < estimate THEN 'insufficient_tokens'
    END
$$;

-- When usage of ours counts as logged that comes at that time in that window (NULL: there is none). Not in the window's
-- first part of a second: a log that keeps whole seconds would have it before the window, where it counts for nothing.
CREATE OR REPLACE FUNCTION trueup.dated(at timestamptz, p_window timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_window <= at + {{ clock_tolerance }}
                THEN greatest(at, date_trunc('second', p_window + interval '999999 microseconds')) ELSE at END
$$;

-- What each subscription entitles to: see entitlements.sql.
CREATE OR REPLACE FUNCTION trueup.entitlements(at timestamptz) RETURNS TABLE (
    user_id {{ user_id_type }}, subscription_id text, is_active boolean,
    window_start timestamptz, end_date timestamptz, original bigint, counter bigint, plan_tokens bigint
) LANGUAGE sql STABLE AS $$
    {{ entitlements("entitlements.at") }}
$$;

-- How often the log was truncated, or set up anew: a balance built before the last time is stale.
CREATE OR REPLACE FUNCTION trueup.log_epoch() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT coalesce(max(id), 0) FROM trueup.log_truncation
$$;

-- What a hold keeps when its time runs out, and until when: what its calls in flight may cost, for as long again as it
-- had been given since the last of them began. One whose body has ended has had that time.
CREATE OR REPLACE FUNCTION trueup.kept_past_expiry(h trueup.hold, at timestamptz, OUT kept bigint, OUT kept_until timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN h.body_ended_at IS NULL AND h.expires_at + (h.expires_at - max(c.started_at)) > at
                THEN least(sum(c.tokens_bound), h.tokens_reserved - h.tokens_covered) ELSE 0 END::bigint,
           h.expires_at + (h.expires_at - max(c.started_at))
    FROM trueup.call_intent c
    WHERE c.user_id = h.user_id AND c.task_id = h.task_id AND c.outcome = 'started'
$$;

-- Each subscription with its consumed and held tokens, exact at the reader's snapshot, without a lock:
-- a log row and its delta become visible together. A stale balance is passed over for the log itself.
-- `held` leaves out what overdue holds give back: the next gate takes it.
CREATE OR REPLACE FUNCTION trueup.accounts(at timestamptz) RETURNS TABLE (
    user_id {{ user_id_type }}, subscription_id text, is_active boolean, window_start timestamptz,
    end_date timestamptz, original bigint, counter bigint, consumed bigint, held bigint
) LANGUAGE sql STABLE AS $$
    SELECT e.user_id, e.subscription_id, e.is_active, e.window_start, e.end_date, e.original, e.counter,
           CASE WHEN b.window_start = e.window_start AND b.log_epoch = (SELECT trueup.log_epoch())
                      AND coalesce(d.largest, 0) < {{ uncountable }}
                THEN {{ countable("b.consumed + coalesce(d.tokens, 0)") }}
                ELSE ({{ used_since("e.user_id", "e.window_start") }})
           END,
           coalesce(b.held - coalesce((
               SELECT sum(h.tokens_reserved - h.tokens_covered - k.kept)
               FROM trueup.hold h CROSS JOIN LATERAL trueup.kept_past_expiry(h, at) k
               WHERE h.user_id = e.user_id AND h.status = 'open' AND h.expires_at <= at), 0), 0)::bigint
    FROM trueup.entitlements(at) e
    LEFT JOIN trueup.balance b ON b.user_id = e.user_id
    LEFT JOIN LATERAL (
        SELECT sum(t.tokens) AS tokens, max(abs(t.tokens)) AS largest FROM trueup.usage_delta t
        WHERE t.user_id = e.user_id AND t.used_at >= e.window_start) d ON true
$$;
