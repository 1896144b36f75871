-- Build the balances of the next users, in the order of their ids after p_after (NULL: from the first), from the log: as
-- trueup.lock_account does for one. A balance that is up to date, or that a gate has just now, is left as it is; one of a
-- user with grants is left to the gate. `last` is NULL when there are no more users. The log's triggers must be there.
CREATE OR REPLACE FUNCTION trueup.fill_balances(
    p_after {{user_id_type}}, p_limit integer, OUT last {{user_id_type}}, OUT filled bigint
) LANGUAGE plpgsql AS $$
<<fill>>
DECLARE
    v_users {{user_id_type}}[];
    v_at timestamptz := clock_timestamp();
BEGIN
    SELECT array_agg(t.u ORDER BY t.u) INTO v_users
    FROM (SELECT DISTINCT s.{{subscription.user_id}} AS u FROM {{subscription}} s
          WHERE s.{{subscription.user_id}} IS NOT NULL
            AND (fill_balances.p_after IS NULL OR s.{{subscription.user_id}} > fill_balances.p_after)
          ORDER BY 1 LIMIT fill_balances.p_limit) t;
    last := v_users[cardinality(v_users)];
    -- A balance of no window and no epoch: stale by construction.
    INSERT INTO trueup.balance (user_id, window_start, log_epoch)
    SELECT u, 'infinity', -1 FROM unnest(v_users) u ON CONFLICT DO NOTHING;
    SELECT array_agg(t.user_id) INTO v_users
    FROM (SELECT b.user_id FROM trueup.balance b
          WHERE b.user_id = ANY (v_users) AND b.log_epoch <> trueup.log_epoch()
            AND NOT EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = b.user_id)
          ORDER BY b.user_id FOR UPDATE SKIP LOCKED) t;
    -- One statement, one snapshot: a log row and its delta are both seen here or both left for later.
    WITH cleared AS (DELETE FROM trueup.usage_delta d WHERE d.user_id = ANY (fill.v_users)),
    sums AS (
        SELECT e.user_id, e.window_start, coalesce(sum(l.{{usage_log.total_tokens}}), 0)::bigint AS tokens
        FROM trueup.entitlements(fill.v_at) e
        LEFT JOIN {{usage_log}} l ON l.{{usage_log.user_id}} = e.user_id AND l.{{usage_log.success}}
                                  AND l.{{usage_log.created_at}} >= e.window_start
        WHERE e.user_id = ANY (fill.v_users)
        GROUP BY e.user_id, e.window_start
    )
    UPDATE trueup.balance b SET window_start = s.window_start, log_epoch = trueup.log_epoch(), consumed = s.tokens
    FROM sums s WHERE b.user_id = s.user_id;
    GET DIAGNOSTICS filled = ROW_COUNT;
END $$;
