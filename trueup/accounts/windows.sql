{% from "host/rows.sql" import window_start %}
-- Windows: which ones users with grants have had, and by which plans. The host's writes tell of each, in their own
-- transaction, so that none goes by unseen.

{# Append the window of the subscription row `s`, if its user has grants.

A trigger dates the change by the server's clock. So do all functions of trueup whose clock is NULL, and only tests give
them another. The usage log may have a second clock, the host's: what the host logs within the seconds by which the two
differ can count against the plan before the change, or after it. No more depends on it: windows go by `start_date`. #}
{% macro note_window(s) %}
    INSERT INTO trueup.window_change (user_id, window_start, token_plan_id, full_plan_id, changed_at)
    SELECT {{ s }}.{{ subscription.user_id }}, {{ window_start(s) }},
           {% if subscription.tokens_included %}
           'tokens:' || greatest(coalesce({{ subscription.tokens_included(s) }}, 0), 0), NULL,
           {% else %}
           {{ subscription.token_plan_id(s) }}, {{ subscription.full_plan_id(s) }},
           {% endif %}
           clock_timestamp()
    WHERE EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = {{ s }}.{{ subscription.user_id }});
{% endmacro %}

-- The trigger only appends: it waits for nobody. It fails nobody either: what can't be told, the next look finds, though
-- not what came and went before it. What has changed is compared here and not in the trigger's own condition, for that
-- would make the host's ALTER TABLE fail. SECURITY DEFINER: the host's role needs no right on our schema.
-- Where a subscription says itself what it includes, that is told in place of its plan: see trueup.plan_size.
CREATE OR REPLACE FUNCTION trueup.append_window() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF OLD.{{ subscription.start_date }} IS NOT DISTINCT FROM NEW.{{ subscription.start_date }}
           {% if subscription.tokens_included %}
           AND {{ subscription.tokens_included("OLD") }} IS NOT DISTINCT FROM {{ subscription.tokens_included("NEW") }}
           {% else %}
           AND {{ subscription.token_plan_id("OLD") }} IS NOT DISTINCT FROM {{ subscription.token_plan_id("NEW") }}
           AND {{ subscription.full_plan_id("OLD") }} IS NOT DISTINCT FROM {{ subscription.full_plan_id("NEW") }}
           {% endif %}
           AND OLD.{{ subscription.user_id }} IS NOT DISTINCT FROM NEW.{{ subscription.user_id }} THEN
            RETURN NULL;
        END IF;
        -- The old one too: it may be the first that anybody tells of.
{{ note_window("OLD") }}
    END IF;
{{ note_window("NEW") }}
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END $$;

-- Write down what windows that have ended have used, and what grants that ended in the newest one have paid for. For
-- whoever has locked the user's balance; idempotent.
CREATE OR REPLACE FUNCTION trueup.settle_grants(p_user {{ user_id_type }}, p_at timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    e record;
    v_news boolean;
    v_ended timestamptz;
BEGIN
    -- What a change of the host's meant in tokens, while the host knows it.
    UPDATE trueup.window_change c SET plan_tokens = trueup.plan_size(c.token_plan_id, c.full_plan_id)
    WHERE c.user_id = p_user AND c.plan_tokens IS NULL;
    v_news := FOUND;
    -- And what no trigger told of: the first window that is looked at, a plan of another size. One statement, one
    -- snapshot: a change by the host is seen in both tables or in neither.
    INSERT INTO trueup.window_change (user_id, window_start, plan_tokens, changed_at)
    SELECT p_user, t.window_start, t.plan_tokens, p_at
    FROM (SELECT * FROM trueup.entitlements(p_at) t WHERE t.user_id = p_user ORDER BY t.subscription_id LIMIT 1) t
    LEFT JOIN (SELECT * FROM trueup.window_change c WHERE c.user_id = p_user ORDER BY c.id DESC LIMIT 1) n ON true
    WHERE n.window_start IS DISTINCT FROM t.window_start OR n.plan_tokens <> t.plan_tokens;
    v_news := v_news OR FOUND;
    SELECT c.window_start, c.plan_tokens INTO e
    FROM trueup.window_change c WHERE c.user_id = p_user ORDER BY c.id DESC LIMIT 1;
    IF v_news THEN
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

-- Forget windows that the host took back, and what was written of them or beyond them; write down the use of those that
-- have ended.
CREATE OR REPLACE FUNCTION trueup.settle_windows(p_user {{ user_id_type }}, p_window timestamptz, p_plan bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    w record;
    v_uses trueup.grant_use[];
BEGIN
    DELETE FROM trueup.window_change c
    USING (SELECT t.id, t.window_start > min(t.window_start) OVER (
                            ORDER BY t.id ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS taken_back
           FROM trueup.window_change t WHERE t.user_id = p_user) x
    WHERE c.user_id = p_user AND c.id = x.id AND x.taken_back;
    -- Neighbours that say the same.
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
