-- Evidence for the causes of drift: what the host's rows say of each drifted counter, since it was last known to be
-- right. One call serves a whole batch in the snapshot of its caller, and reads the rows of the drifted users alone, by
-- user and time. Where the host's tables are in scope, every name is qualified: a host may have a column of any name.

-- Ten minutes before a time: rows of one size that are no further apart belong together. (Times before any calendar's
-- have no minutes before them.)
CREATE OR REPLACE FUNCTION trueup.shortly_before(at timestamptz) RETURNS timestamptz LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN at < '0001-01-03' THEN '-infinity'::timestamptz ELSE at - interval '10 minutes' END
$$;

-- Since when each counter is known to have been right: it was corrected or decided about, or a full run saw it and
-- found no drift; at the latest since its window began. `written` and `seen_before`: what the correction wrote and saw;
-- `kept`: what of it was for decrements in flight. A correction that was undone counts for nothing.
CREATE OR REPLACE FUNCTION trueup.base_points(
    p_users {{user_id_type}}[], p_subscriptions text[], p_windows timestamptz[]
) RETURNS TABLE (
    user_id {{user_id_type}}, at timestamptz, kind text, written bigint, seen_before bigint, kept bigint
) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT * FROM unnest(p_users, p_subscriptions, p_windows) AS w (user_id, subscription_id, window_start)
    ), drifts AS MATERIALIZED (
        SELECT w.user_id, w.window_start, d.id, d.run_id, d.last_run_id, d.action, d.found_at, d.written, d.observed,
               d.written - d.expected AS kept
        FROM wanted w
        JOIN trueup.drift d ON d.user_id = w.user_id AND d.subscription_id = w.subscription_id
    ), runs AS (
        -- The newest run that did not see a drift is the newest of all, or the one before a drift was first seen.
        SELECT w.user_id, r.id, r.started_at
        FROM (SELECT user_id, window_start, NULL::bigint AS before FROM wanted
              UNION ALL SELECT user_id, window_start, run_id FROM drifts) w
        CROSS JOIN LATERAL (
            SELECT r.id, r.started_at FROM trueup.reconcile_run r
            WHERE r.status = 'finished' AND NOT r.dry_run AND r.only_user IS NULL
              AND (w.before IS NULL OR r.id < w.before)
            ORDER BY r.id DESC LIMIT 1) r
        WHERE r.started_at > w.window_start
          AND NOT EXISTS (SELECT FROM drifts d
                          WHERE d.user_id = w.user_id AND r.id BETWEEN d.run_id AND d.last_run_id)
          -- Nor does a run that could not look at this counter, or set it right.
          AND NOT EXISTS (SELECT FROM trueup.defect f
                          WHERE f.run_id = r.id AND f.user_id = w.user_id
                            AND f.kind IN ('counter_too_slow', 'counter_refused'))
    ), known AS (
        SELECT user_id, window_start AS at, 'window' AS kind, NULL::bigint AS written, NULL::bigint AS seen_before,
               NULL::bigint AS kept
        FROM wanted
        UNION ALL
        SELECT user_id, started_at, 'run', NULL, NULL, NULL FROM runs
        UNION ALL
        SELECT d.user_id, d.found_at, 'correction', d.written, d.observed, d.kept FROM drifts d
        WHERE d.action = 'corrected' AND d.found_at > d.window_start
          AND NOT EXISTS (SELECT FROM trueup.drift_decision u
                          WHERE u.user_id = d.user_id AND u.drift_id = d.id AND u.decision = 'undo')
        UNION ALL
        SELECT w.user_id, u.decided_at, 'decision', NULL, NULL, NULL
        FROM wanted w JOIN trueup.drift_decision u ON u.user_id = w.user_id
        WHERE u.decision IN ('accept', 'grant') AND u.decided_at > w.window_start
    )
    SELECT DISTINCT ON (user_id) user_id, at, kind, written, seen_before, kept
    FROM known ORDER BY user_id, at DESC, kind
$$;

-- The users' log rows since a time, without trueup's own: kind L counts, F does not (failed, or not known).
CREATE OR REPLACE FUNCTION trueup.log_rows(p_users {{user_id_type}}[], p_since timestamptz[]) RETURNS TABLE (
    user_id {{user_id_type}}, kind text, id text, tokens bigint, at timestamptz
) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT * FROM unnest(p_users, p_since) AS w (user_id, since)
    ), own AS MATERIALIZED (
        SELECT c.user_id, c.log_id
        FROM wanted w JOIN trueup.charge c ON c.user_id = w.user_id AND c.charged_at >= w.since
    )
    SELECT w.user_id, CASE WHEN l.success THEN 'L' ELSE 'F' END, l.id, l.tokens, l.at
    FROM wanted w
    -- OFFSET 0 keeps the planner from reading the whole log at once, however many users it expects.
    CROSS JOIN LATERAL (
        SELECT l.{{usage_log.id}}::text AS id, l.{{usage_log.total_tokens}}::bigint AS tokens,
               l.{{usage_log.created_at}}::timestamptz AS at, l.{{usage_log.success}} AS success
        FROM {{usage_log}} l
        WHERE l.{{usage_log.user_id}} = w.user_id AND l.{{usage_log.created_at}} >= w.since
          AND l.{{usage_log.total_tokens}} <> 0
        OFFSET 0) l
    WHERE NOT EXISTS (SELECT FROM own o WHERE o.user_id = w.user_id AND o.log_id = l.id)
$$;

-- The users' decrement rows since a time.
CREATE OR REPLACE FUNCTION trueup.decrement_rows(p_users {{user_id_type}}[], p_since timestamptz[]) RETURNS TABLE (
    user_id {{user_id_type}}, id text, tokens bigint, at timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT w.user_id, t.id, t.tokens, t.at
    FROM unnest(p_users, p_since) AS w (user_id, since)
    CROSS JOIN LATERAL (
        SELECT d.id, d.tokens, d.at FROM trueup.decrements() d
        WHERE d.user_id = w.user_id AND d.at >= w.since AND d.tokens <> 0
        OFFSET 0) t
$$;

-- What was paid for since shortly before the base points, the newest twelve of each user; and what was granted since
-- without a payment in sight (kind "grant"), for a host may have raised the counter by that as well. `granted`: a grant
-- was made of it. `settled`: before the base point. `opened_window`: it is the subscription's own plan, and of those the one bought
-- nearest to when the window began.
CREATE OR REPLACE FUNCTION trueup.purchase_rows(
    p_users {{user_id_type}}[], p_bases timestamptz[], p_windows timestamptz[], p_at timestamptz
) RETURNS TABLE (
    user_id {{user_id_type}}, id text, tokens bigint, at timestamptz, granted boolean, found jsonb
) LANGUAGE sql STABLE AS $$
    SELECT p.user_id, p.id, p.tokens, p.at, p.granted,
           jsonb_build_object(
               'id', p.id, 'reference', p.reference, 'tokens', p.tokens, 'at', p.at, 'kind', p.kind,
               'own_plan', p.own_plan, 'granted', p.granted, 'settled', p.settled,
               'opened_window', p.near_window AND p.nearest = 1)
    FROM (
        SELECT w.user_id, p.id, p.reference, p.at, p.tokens, p.own_plan, p.kind, p.granted, p.at < w.base_at AS settled,
               p.own_plan AND p.at <= least(w.window_start, '9999-12-31'::timestamptz) + interval '5 minutes' AS near_window,
               row_number() OVER (
                   PARTITION BY w.user_id, p.own_plan
                   ORDER BY abs(extract(epoch FROM p.at) - extract(epoch FROM w.window_start)), p.id) AS nearest
        FROM unnest(p_users, p_bases, p_windows) AS w (user_id, base_at, window_start)
        CROSS JOIN LATERAL (
            (SELECT p.id, p.reference, p.at, p.tokens, p.own_plan, p.kind,
                    EXISTS (SELECT FROM trueup.token_grant g
                            WHERE g.user_id = w.user_id AND g.reference = p.reference
                              AND g.revoked_at IS NULL) AS granted
             FROM trueup.purchases() p
             WHERE p.user_id = w.user_id AND p.at >= trueup.shortly_before(w.base_at) AND p.at <= p_at AND p.tokens > 0
             ORDER BY p.at DESC LIMIT 12)
            UNION ALL
            (SELECT g.id::text, coalesce(g.reference, ''), g.granted_at, g.tokens, false, 'grant', true
             FROM trueup.token_grant g
             WHERE g.user_id = w.user_id AND g.granted_at > w.base_at AND g.granted_at <= p_at
               AND g.revoked_at IS NULL AND (g.expires_at > p_at) IS NOT FALSE
               AND NOT EXISTS (SELECT FROM trueup.purchases() p
                               WHERE p.user_id = w.user_id AND p.reference = g.reference
                                 AND p.at >= trueup.shortly_before(w.base_at) AND p.at <= p_at)
             ORDER BY g.granted_at DESC LIMIT 12)) p) p
$$;

-- What may have been left of the window before, where an upgrade began this one: the payments up to three back, and what
-- was used and what was subtracted from there to the window's beginning. `ran_out`: the plan that was bought then had ended
-- before. `same_plan`: it is the one of now. Without an earlier payment (a trial), `tokens` is null: nobody knows what was
-- given.
CREATE OR REPLACE FUNCTION trueup.carried_rows(p_users {{user_id_type}}[], p_windows timestamptz[])
RETURNS TABLE (user_id {{user_id_type}}, found jsonb) LANGUAGE sql STABLE AS $$
    SELECT w.user_id,
           jsonb_build_object('since', f.since, 'tokens', f.tokens, 'used', u.used, 'lowered', t.lowered,
                              'payment', f.id, 'upgrade', n.found, 'place', f.place,
                              'ran_out', coalesce(f.ends < w.window_start, false), 'same_plan', f.own_plan)
    FROM unnest(p_users, p_windows) AS w (user_id, window_start)
    CROSS JOIN LATERAL (
        SELECT jsonb_build_object('id', p.id, 'tokens', p.tokens, 'at', p.at) AS found, p.at
        FROM trueup.purchases() p
        WHERE p.user_id = w.user_id AND p.at BETWEEN w.window_start - interval '5 minutes'
                                                 AND w.window_start + interval '5 minutes'
        ORDER BY p.own_plan DESC, p.at LIMIT 1) n
    CROSS JOIN LATERAL (
        (SELECT p.id, p.at AS since, sum(p.tokens) OVER (ORDER BY p.at DESC, p.id DESC) AS tokens, p.ends, p.own_plan,
                row_number() OVER (ORDER BY p.at DESC, p.id DESC) AS place
         FROM trueup.purchases() p
         WHERE p.user_id = w.user_id AND p.at < w.window_start - interval '5 minutes'
         ORDER BY p.at DESC, p.id DESC LIMIT 3)
        UNION ALL
        SELECT NULL, w.window_start - interval '400 days', NULL, NULL, false, 1
        WHERE NOT EXISTS (SELECT FROM trueup.purchases() p
                          WHERE p.user_id = w.user_id AND p.at < w.window_start - interval '5 minutes')) f
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(l.{{usage_log.total_tokens}}), 0) AS used FROM {{usage_log}} l
        WHERE l.{{usage_log.user_id}} = w.user_id AND l.{{usage_log.success}}
          AND l.{{usage_log.created_at}} >= f.since AND l.{{usage_log.created_at}} < w.window_start
        OFFSET 0) u
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(d.tokens), 0) AS lowered FROM trueup.decrements() d
        WHERE d.user_id = w.user_id AND d.at >= f.since AND d.at < w.window_start
        OFFSET 0) t
    WHERE isfinite(w.window_start) AND (f.tokens IS NOT NULL OR u.used > 0)
$$;
