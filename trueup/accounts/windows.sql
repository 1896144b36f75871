-- What grants pay for in windows that have ended. The trigger of install/journal.sql records each window.

-- Record how many tokens of each grant each ended window used, and the newest window of grants that have ended.
-- Idempotent. The caller has locked the user's balance.
CREATE OR REPLACE FUNCTION trueup.settle_grants(p_user {{ user_id_type }}, p_at timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    e record;
    v_changed boolean;
    v_ended timestamptz;
BEGIN
    -- Store the size of each recorded plan, while the host still has the plan.
    UPDATE trueup.window_change c SET plan_tokens = trueup.plan_size(c.token_plan_id, c.full_plan_id)
    WHERE c.user_id = p_user AND c.plan_tokens IS NULL;
    v_changed := FOUND;
    {% if subscription.anchor %}
    -- Periods that came and went since the newest record, with its plan.
    INSERT INTO trueup.window_change (user_id, window_start, plan_tokens, changed_at)
    SELECT p_user, t.at, t.plan_tokens, t.at FROM trueup.passed_periods(p_user, p_at) t ORDER BY t.at;
    v_changed := v_changed OR FOUND;
    {% endif %}
    -- Record changes without a trigger's record: the first window of a grant, or a new size of the plan. One statement
    -- has one snapshot: it sees a change by the host in both tables or in neither.
    INSERT INTO trueup.window_change (user_id, window_start, plan_tokens, changed_at)
    SELECT p_user, t.window_start, t.plan_tokens, p_at
    FROM (SELECT * FROM trueup.entitlements(p_at) t WHERE t.user_id = p_user ORDER BY t.subscription_id LIMIT 1) t
    LEFT JOIN (SELECT * FROM trueup.window_change c WHERE c.user_id = p_user ORDER BY c.id DESC LIMIT 1) n ON true
    WHERE n.window_start IS DISTINCT FROM t.window_start OR n.plan_tokens <> t.plan_tokens;
    v_changed := v_changed OR FOUND;
    SELECT c.window_start, c.plan_tokens INTO e
    FROM trueup.window_change c WHERE c.user_id = p_user ORDER BY c.id DESC LIMIT 1;
    IF v_changed THEN
        PERFORM trueup.settle_windows(p_user, e.window_start, e.plan_tokens);
    END IF;
    SELECT max(least(g.expires_at, g.revoked_at)) INTO v_ended
    FROM trueup.token_grant g
    WHERE g.user_id = p_user AND least(g.expires_at, g.revoked_at) > e.window_start
      AND least(g.expires_at, g.revoked_at) <= p_at
      AND NOT EXISTS (SELECT FROM trueup.grant_use u
                      WHERE u.user_id = p_user AND u.grant_id = g.id AND u.window_start = e.window_start);
    IF v_ended IS NOT NULL THEN
        INSERT INTO trueup.grant_use (user_id, grant_id, window_start, tokens)
        SELECT p_user, g.id, e.window_start, coalesce(u.tokens, 0)
        FROM trueup.token_grant g
        LEFT JOIN trueup.grant_uses(p_user, e.window_start, v_ended, e.plan_tokens) u ON u.grant_id = g.id
        WHERE g.user_id = p_user AND least(g.expires_at, g.revoked_at) > e.window_start
          AND least(g.expires_at, g.revoked_at) <= v_ended
        ON CONFLICT DO NOTHING;
    END IF;
END $$;

-- Delete windows that the host moved back, with the recorded uses that are no longer valid, and record the use of the
-- windows that have ended.
CREATE OR REPLACE FUNCTION trueup.settle_windows(p_user {{ user_id_type }}, p_window timestamptz, p_plan bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_uses trueup.grant_use[];
BEGIN
    DELETE FROM trueup.window_change c
    USING (SELECT t.id, t.window_start > min(t.window_start) OVER (
                            ORDER BY t.id ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS taken_back
           FROM trueup.window_change t WHERE t.user_id = p_user) x
    WHERE c.user_id = p_user AND c.id = x.id AND x.taken_back;
    -- Delete a record that repeats its predecessor.
    DELETE FROM trueup.window_change c
    USING (SELECT t.id, (t.window_start, t.plan_tokens) = (lag(t.window_start) OVER o, lag(t.plan_tokens) OVER o) AS again
           FROM trueup.window_change t WHERE t.user_id = p_user WINDOW o AS (ORDER BY t.id)) x
    WHERE c.user_id = p_user AND c.id = x.id AND x.again;
    SELECT array_agg((p_user, u.grant_id, u.window_start, u.tokens)::trueup.grant_use) INTO v_uses
    FROM trueup.unsettled_uses(p_user, p_window, p_plan) u WHERE u.tokens > 0;
    DELETE FROM trueup.grant_use u
    WHERE u.user_id = p_user
      AND NOT EXISTS (SELECT FROM trueup.windows(p_user, p_window, p_plan) t
                      WHERE t.window_start = u.window_start
                        AND (t.settled OR EXISTS (
                            SELECT FROM trueup.written_use(p_user, t.window_start, t.written_until) x
                            WHERE x.grant_id = u.grant_id)));
    INSERT INTO trueup.grant_use SELECT * FROM unnest(v_uses) ON CONFLICT DO NOTHING;
    UPDATE trueup.window_change c SET settled_until = t.until
    FROM trueup.windows(p_user, p_window, p_plan) t
    WHERE c.user_id = p_user AND c.window_start = t.window_start AND c.settled_until IS DISTINCT FROM t.until;
END $$;
