{% from "accounts/entitlements.sql" import clock_tolerance, decision, entitlements, log_epoch %}
{% from "host/rows.sql" import countable, right_counter, used_since %}
-- Reads. These are functions, because a view on a host table would make the host's own ALTER TABLE fail. The planner
-- inlines simple SQL functions, so a WHERE clause can use the indexes.

-- The gate's decision whether a task may run: see entitlements.sql.
CREATE OR REPLACE FUNCTION trueup.decide(
    subscribed boolean, is_active boolean, end_date timestamptz,
    original bigint, consumed bigint, held bigint, estimate bigint, at timestamptz
) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT {{ decision("subscribed", "is_active", "end_date", "original", "consumed", "held", "estimate", "at") }}
$$;

-- The tokens that the host's counter should show, as remaining tokens.
CREATE OR REPLACE FUNCTION trueup.right_counter(original bigint, consumed bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT {{ right_counter("original", "consumed") }}
$$;

-- Whether the host may still log calls of the user's, and lower the counter for them: for an hour after each call.
CREATE OR REPLACE FUNCTION trueup.awaits_host(p_user {{ user_id_type }}) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT {% if usage_log.is_written_by_host %}EXISTS (
        SELECT FROM trueup.owed_charge o WHERE o.user_id = p_user AND o.used_at > clock_timestamp() - interval '1 hour')
    {%- else %}false{% endif %}

$$;

-- The time that trueup writes into the log for its own usage at `at`, in that window (NULL: there is none). It is never
-- in the first fraction of a second of the window: a log with whole seconds would date the usage before the window,
-- where it does not count.
CREATE OR REPLACE FUNCTION trueup.log_time(at timestamptz, p_window timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_window <= at + {{ clock_tolerance }}
                THEN greatest(at, date_trunc('second', p_window + interval '999999 microseconds')) ELSE at END
$$;

-- The entitlements of each subscription: see entitlements.sql.
CREATE OR REPLACE FUNCTION trueup.entitlements(at timestamptz) RETURNS TABLE (
    user_id {{ user_id_type }}, subscription_id text, is_active boolean,
    window_start timestamptz, end_date timestamptz, original bigint, counter bigint, plan_tokens bigint, plan_kind text
) LANGUAGE sql STABLE AS $$
    {{ entitlements("entitlements.at") }}
$$;

-- See entitlements.sql.
CREATE OR REPLACE FUNCTION trueup.log_epoch() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT {{ log_epoch() }}
$$;

-- The tokens that a hold keeps when it expires, and until when. It keeps the maximum cost of its calls in flight for
-- some more time: as long as from the last call's start to the expiry. A hold whose body has ended gets no such time.
CREATE OR REPLACE FUNCTION trueup.kept_past_expiry(h trueup.hold, at timestamptz, OUT kept bigint, OUT kept_until timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN h.body_ended_at IS NULL AND h.expires_at + (h.expires_at - max(c.started_at)) > at
                THEN least(sum(c.tokens_bound), h.tokens_reserved - h.tokens_covered) ELSE 0 END::bigint,
           h.expires_at + (h.expires_at - max(c.started_at))
    FROM trueup.call_intent c
    WHERE c.user_id = h.user_id AND c.task_id = h.task_id AND c.outcome = 'started'
$$;

-- Each subscription with its consumed and held tokens, exact at the reader's snapshot, without a lock: a log row and
-- its delta become visible together. If a balance is stale, the log is summed instead. `held` excludes the tokens that
-- the next gate will release from overdue holds.
CREATE OR REPLACE FUNCTION trueup.accounts(at timestamptz) RETURNS TABLE (
    user_id {{ user_id_type }}, subscription_id text, is_active boolean, window_start timestamptz,
    end_date timestamptz, original bigint, counter bigint, consumed bigint, held bigint, plan_kind text
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
               WHERE h.user_id = e.user_id AND h.status = 'open' AND h.expires_at <= at), 0), 0)::bigint,
           e.plan_kind
    FROM trueup.entitlements(at) e
    LEFT JOIN trueup.balance b ON b.user_id = e.user_id
    LEFT JOIN LATERAL (
        SELECT sum(t.tokens) AS tokens, max(abs(t.tokens)) AS largest FROM trueup.usage_delta t
        WHERE t.user_id = e.user_id AND t.used_at >= e.window_start) d ON true
$$;
