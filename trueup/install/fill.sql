{% from "host/rows.sql" import countable, is_counted, window_start %}
-- Build the balances of the next p_limit users from the log, in the order of their ids after p_after (NULL: from the
-- first), as trueup.lock_account does for one user. Returns the last user's id (NULL: no user is left) and how many
-- balances were built. It skips balances that are up to date or locked, and users with grants, whom the gate rebuilds.
-- The log's triggers must exist. Users are a range of ids, and the plan is made for each range: for many users the
-- planner then reads the log once from end to end.
CREATE OR REPLACE FUNCTION trueup.fill_balances(
    p_after {{ user_id_type }}, p_limit integer, OUT last {{ user_id_type }}, OUT filled bigint
) LANGUAGE plpgsql SET plan_cache_mode = 'force_custom_plan' SET work_mem = '64MB' AS $$
<<fill>>
DECLARE
    v_users {{ user_id_type }}[];
    v_epoch bigint := trueup.log_epoch();
BEGIN
    SELECT t.u INTO last
    FROM (SELECT DISTINCT s.{{ subscription.user_id }} AS u FROM {{ subscription }} s
          WHERE s.{{ subscription.user_id }} IS NOT NULL
            AND (fill_balances.p_after IS NULL OR s.{{ subscription.user_id }} > fill_balances.p_after)
          ORDER BY 1 LIMIT fill_balances.p_limit) t
    ORDER BY 1 DESC LIMIT 1;
    filled := 0;
    IF last IS NULL THEN
        RETURN;
    END IF;
    -- A balance with no window and no epoch is stale, so it is built below.
    INSERT INTO trueup.balance (user_id, window_start, log_epoch)
    SELECT DISTINCT s.{{ subscription.user_id }}, 'infinity'::timestamptz, -1 FROM {{ subscription }} s
    WHERE (fill_balances.p_after IS NULL OR s.{{ subscription.user_id }} > fill_balances.p_after)
      AND s.{{ subscription.user_id }} <= fill_balances.last
    ON CONFLICT DO NOTHING;
    SELECT array_agg(t.user_id) INTO v_users
    FROM (SELECT b.user_id FROM trueup.balance b
          WHERE (fill_balances.p_after IS NULL OR b.user_id > fill_balances.p_after) AND b.user_id <= fill_balances.last
            AND b.log_epoch <> fill.v_epoch
            AND NOT EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = b.user_id)
          FOR UPDATE SKIP LOCKED) t;
    -- One statement has one snapshot: it sees a log row together with its delta, or neither.
    WITH mine AS MATERIALIZED (
        SELECT m.user_id, {{ window_start("s") }} AS window_start
        FROM unnest(v_users) m (user_id) JOIN {{ subscription }} s ON s.{{ subscription.user_id }} = m.user_id
    ),
    cleared AS (DELETE FROM trueup.usage_delta d USING mine m WHERE d.user_id = m.user_id),
    -- Users without usage come below: an inner join lets the planner choose which side to hash, at best the users.
    sums AS (
        SELECT t.user_id, t.window_start, {{ countable("sum(t.tokens)") }} AS tokens
        FROM (
            SELECT m.user_id, m.window_start, sum(l.{{ usage_log.total_tokens }}) AS tokens
            FROM mine m
            JOIN {{ usage_log }} l ON {{ is_counted("l", "m.user_id", "m.window_start") }}
            GROUP BY m.user_id, m.window_start
            UNION ALL
            SELECT m.user_id, m.window_start, o.total_tokens
            FROM mine m
            JOIN trueup.owed_charge o ON o.user_id = m.user_id AND o.success AND o.used_at >= m.window_start
        ) t
        GROUP BY t.user_id, t.window_start
    )
    UPDATE trueup.balance b
    SET window_start = m.window_start,
        log_epoch = CASE WHEN s.tokens = {{ uncountable }} THEN -1 ELSE fill.v_epoch END,
        consumed = coalesce(s.tokens, 0)
    FROM mine m LEFT JOIN sums s ON s.user_id = m.user_id AND s.window_start = m.window_start
    WHERE b.user_id = m.user_id;
    GET DIAGNOSTICS filled = ROW_COUNT;
END $$;
