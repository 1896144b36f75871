-- Bring the balances of these users up to date, so that comparing counters needs no look at the log. A balance in use
-- now is passed over: reads are exact without this, and waiting would make the gates of all users locked so far wait too.
CREATE OR REPLACE FUNCTION trueup.refresh_balances(p_users {{user_id_type}}[], at timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_user {{user_id_type}};
    v_refreshed bigint := 0;
    a record;
BEGIN
    FOR v_user IN
        SELECT s.{{subscription.user_id}}
        FROM {{subscription}} s
        LEFT JOIN trueup.balance b ON b.user_id = s.{{subscription.user_id}}
        WHERE s.{{subscription.user_id}} = ANY (refresh_balances.p_users)
          AND (b.user_id IS NULL
               OR b.window_start <> coalesce(s.{{subscription.start_date}}, '-infinity'::timestamptz)
               OR b.log_epoch <> (SELECT trueup.log_epoch())
               OR EXISTS (SELECT FROM trueup.usage_delta d WHERE d.user_id = s.{{subscription.user_id}}))
        ORDER BY s.{{subscription.user_id}}  -- every run locks in the same order
    LOOP
        PERFORM FROM trueup.balance b WHERE b.user_id = v_user FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND AND EXISTS (SELECT FROM trueup.balance b WHERE b.user_id = v_user);
        SELECT * INTO a FROM trueup.lock_account(v_user, at);
        UPDATE trueup.balance b SET window_start = a.window_start, log_epoch = a.log_epoch,
                                    consumed = a.consumed, held = a.held
        WHERE b.user_id = v_user;
        v_refreshed := v_refreshed + 1;
    END LOOP;
    RETURN v_refreshed;
END $$;

-- Set counters right, each only if it still shows the value that was seen (compare-and-set). A row that the host
-- has locked is passed over: we never wait for the host, nor make others wait behind our locks.
-- Returns the users whose counter was corrected.
CREATE OR REPLACE FUNCTION trueup.correct_counters(
    p_users {{user_id_type}}[], p_subscriptions text[], p_observed bigint[], p_expected bigint[]
) RETURNS SETOF {{user_id_type}} LANGUAGE sql AS $$
    WITH locked AS (
        SELECT s.{{subscription.id}} AS id, w.expected
        FROM unnest(p_users, p_subscriptions, p_observed, p_expected)
            AS w (user_id, subscription_id, observed, expected)
        JOIN {{subscription}} s ON s.{{subscription.user_id}} = w.user_id
        WHERE s.{{subscription.id}}::text = w.subscription_id
          AND s.{{subscription.tokens_remaining}} IS NOT DISTINCT FROM w.observed
        FOR NO KEY UPDATE OF s SKIP LOCKED
    )
    UPDATE {{subscription}} s SET {{subscription.tokens_remaining}} = l.expected
    FROM locked l WHERE s.{{subscription.id}} = l.id
    RETURNING s.{{subscription.user_id}}
$$;

-- Rows of the log, within the window, that alone are as large as a user's drift: evidence for its cause. `counted`
-- tells rows that count (success) from failed ones. At most three are kept of each kind, newest first, with how many
-- there are.
CREATE OR REPLACE FUNCTION trueup.rows_of_size(
    p_users {{user_id_type}}[], p_windows timestamptz[], p_tokens bigint[]
) RETURNS TABLE (user_id {{user_id_type}}, counted boolean, matches bigint, log_rows jsonb) LANGUAGE sql STABLE AS $$
    SELECT m.user_id, m.counted, count(*),
           jsonb_agg(jsonb_build_object('log_id', m.log_id, 'tokens', m.tokens, 'created_at', m.created_at)
                     ORDER BY m.created_at DESC) FILTER (WHERE m.place <= 3)
    FROM (
        SELECT w.user_id, l.{{usage_log.success}} AS counted, l.{{usage_log.id}}::text AS log_id,
               l.{{usage_log.total_tokens}} AS tokens, l.{{usage_log.created_at}} AS created_at,
               row_number() OVER (PARTITION BY w.user_id, l.{{usage_log.success}}
                                  ORDER BY l.{{usage_log.created_at}} DESC) AS place
        FROM unnest(p_users, p_windows, p_tokens) AS w (user_id, window_start, tokens)
        JOIN {{usage_log}} l ON l.{{usage_log.user_id}} = w.user_id
         AND l.{{usage_log.created_at}} >= w.window_start
         AND l.{{usage_log.total_tokens}} = w.tokens
    ) AS m
    GROUP BY m.user_id, m.counted
$$;

-- The token amounts that plans sell: a counter too high by one of them may show a purchase.
CREATE OR REPLACE FUNCTION trueup.plan_sizes() RETURNS SETOF bigint LANGUAGE sql STABLE AS $$
    SELECT {{token_plan.tokens_included}}::bigint FROM {{token_plan}} WHERE {{token_plan.tokens_included}} > 0
    UNION
    SELECT {{full_plan.tokens_included}}::bigint FROM {{full_plan}} WHERE {{full_plan.tokens_included}} > 0
$$;

-- The largest value that the counter's column can take.
CREATE OR REPLACE FUNCTION trueup.counter_limit() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT CASE format_type(a.atttypid, NULL)
               WHEN 'smallint' THEN 32767 WHEN 'integer' THEN 2147483647 ELSE 9223372036854775807 END
    FROM pg_attribute a
    WHERE a.attrelid = CAST({{literal subscription}} AS regclass)
      AND '"' || replace(a.attname, '"', '""') || '"' = {{literal subscription.tokens_remaining}}
$$;
