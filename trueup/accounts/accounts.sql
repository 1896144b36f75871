-- Reads. These are functions and not views: a view on a host table would make the host's own
-- ALTER TABLE fail. Simple SQL functions are inlined by the planner, so a WHERE reaches the indexes.

-- The one decision "may this run?". NULL: yes. Otherwise one of the specification's reason codes.
CREATE OR REPLACE FUNCTION trueup.decide(
    subscribed boolean, is_active boolean, end_date timestamptz,
    original bigint, consumed bigint, held bigint, estimate bigint, at timestamptz
) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN subscribed IS NOT TRUE THEN 'no_subscription'
        WHEN is_active IS NOT TRUE THEN 'subscription_deactivated'
        WHEN end_date < at THEN 'subscription_expired'
        WHEN original <= consumed THEN 'no_tokens_remaining'
        WHEN original - consumed - held < estimate THEN 'insufficient_tokens'
    END
$$;

-- How far ahead a host's clock may be: a window that it begins later than this has not begun. trueup's own usage before
-- a window that begins within it is dated at its begin, so that it counts.
CREATE OR REPLACE FUNCTION trueup.clock_tolerance() RETURNS interval LANGUAGE sql IMMUTABLE AS $$
    SELECT interval '5 minutes'
$$;

-- When usage of ours counts as logged that comes at that time in that window (NULL: there is none). Not in the window's
-- first part of a second: a log that keeps whole seconds would have it before the window, where it counts for nothing.
CREATE OR REPLACE FUNCTION trueup.dated(at timestamptz, p_window timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN p_window <= at + trueup.clock_tolerance()
                THEN greatest(at, date_trunc('second', p_window + interval '999999 microseconds')) ELSE at END
$$;

-- What each subscription entitles to. original = what the subscription itself says, where a host has that there; else the
-- token plan's tokens, else the full plan's, else 0. Plus what the user's grants add (grants.sql says what that is); a
-- user without grants costs one look at an index.
-- (`entitlements.at`: a bare `at` would be the host's column if one of its tables had one of that name.)
CREATE OR REPLACE FUNCTION trueup.entitlements(at timestamptz) RETURNS TABLE (
    user_id {{user_id_type}}, subscription_id text, is_active boolean,
    window_start timestamptz, end_date timestamptz, original bigint, counter bigint, plan_tokens bigint
) LANGUAGE sql STABLE AS $$
    SELECT s.{{subscription.user_id}},
           s.{{subscription.id}}::text,
           -- In a window that has not begun no usage counts, and with two subscriptions nobody knows which one does: what
           -- can't be limited is not active.
           s.{{subscription.is_active}} AND w.window_start <= entitlements.at + trueup.clock_tolerance()
               AND NOT EXISTS (SELECT FROM {{subscription}} o
                               WHERE o.{{subscription.user_id}} = s.{{subscription.user_id}}
                                 AND o.{{subscription.id}} <> s.{{subscription.id}}),
           w.window_start,
           -- No end within the years that clients can hold is no end; one before them is long past.
           CASE WHEN s.{{subscription.end_date}} < '9999-12-31'
                THEN greatest(s.{{subscription.end_date}}, '0001-01-03') END,
           -- Half of what bigint holds, so that no sum with usage, refunds among it, can run over.
           CASE WHEN EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = s.{{subscription.user_id}})
                THEN least(w.plan_tokens + trueup.granted(s.{{subscription.user_id}}, w.window_start, w.plan_tokens,
                                                          entitlements.at), 4611686018427387904)::bigint
                ELSE w.plan_tokens END,
           s.{{subscription.tokens_remaining}}::bigint,
           w.plan_tokens
    FROM {{subscription}} s
    LEFT JOIN {{token_plan}} tp ON tp.{{token_plan.id}} = s.{{subscription.token_plan_id}}
    LEFT JOIN {{full_plan}} fp ON fp.{{full_plan.id}} = s.{{subscription.full_plan_id}}
    CROSS JOIN LATERAL (
        SELECT coalesce(s.{{subscription.start_date}}, '-infinity'::timestamptz) AS window_start,
               CAST(
                   {{include plan_tokens}}
               AS bigint) AS plan_tokens
    ) w
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
    user_id {{user_id_type}}, subscription_id text, is_active boolean, window_start timestamptz,
    end_date timestamptz, original bigint, counter bigint, consumed bigint, held bigint
) LANGUAGE sql STABLE AS $$
    SELECT e.user_id, e.subscription_id, e.is_active, e.window_start, e.end_date, e.original, e.counter,
           CASE WHEN b.window_start = e.window_start AND b.log_epoch = (SELECT trueup.log_epoch())
                THEN b.consumed + coalesce((
                    SELECT sum(d.tokens) FROM trueup.usage_delta d
                    WHERE d.user_id = e.user_id AND d.used_at >= e.window_start), 0)::bigint
                ELSE coalesce((
                    SELECT sum(l.{{usage_log.total_tokens}}) FROM {{usage_log}} l
                    WHERE l.{{usage_log.user_id}} = e.user_id AND l.{{usage_log.success}}
                      AND l.{{usage_log.created_at}} >= e.window_start), 0)::bigint
           END,
           coalesce(b.held - coalesce((
               SELECT sum(h.tokens_reserved - h.tokens_covered - k.kept)
               FROM trueup.hold h CROSS JOIN LATERAL trueup.kept_past_expiry(h, at) k
               WHERE h.user_id = e.user_id AND h.status = 'open' AND h.expires_at <= at), 0), 0)::bigint
    FROM trueup.entitlements(at) e
    LEFT JOIN trueup.balance b ON b.user_id = e.user_id
$$;
