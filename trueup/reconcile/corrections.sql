{% from "host/search_path.sql" import own_search_path, role_search_path %}
{% from "gate/store_balance.sql" import store_balance %}
{% from "host/rows.sql" import counter, raw_counter, window_start %}
-- The tokens by which a drifted counter was off, minus the tokens in flight.
CREATE OR REPLACE FUNCTION trueup.off_by(d trueup.drift) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(d.observed, 0) - d.expected - coalesce((d.evidence->>'in_flight')::bigint, 0)
$$;

-- Refresh the balances of these users, so that counters can be compared without reading the log. A balance that another
-- transaction has locked is skipped: reads are exact without the refresh, and waiting would block the gates of all
-- users locked so far. The commit does not wait for the disk either. If a server crash undoes it, the balance goes back
-- to an earlier state that agrees with the log and its deltas.
CREATE OR REPLACE FUNCTION trueup.refresh_balances(p_users {{ user_id_type }}[], at timestamptz)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_user {{ user_id_type }};
    v_refreshed bigint := 0;
    a record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    FOR v_user IN
        SELECT s.{{ subscription.user_id }}
        FROM {{ subscription }} s
        LEFT JOIN trueup.balance b ON b.user_id = s.{{ subscription.user_id }}
        WHERE s.{{ subscription.user_id }} = ANY (refresh_balances.p_users)
          AND (b.user_id IS NULL
               OR b.window_start <> {{ window_start("s", "coalesce(refresh_balances.at, clock_timestamp())") }}
               OR b.log_epoch <> (SELECT trueup.log_epoch())
               OR EXISTS (SELECT FROM trueup.usage_delta d WHERE d.user_id = s.{{ subscription.user_id }})
               -- A grant has ended in this window, and the tokens it paid for are not recorded yet.
               OR EXISTS (SELECT FROM trueup.token_grant g
                          WHERE g.user_id = s.{{ subscription.user_id }}
                            AND least(g.expires_at, g.revoked_at) > b.window_start
                            AND least(g.expires_at, g.revoked_at)
                                <= coalesce(refresh_balances.at, clock_timestamp())
                            AND NOT EXISTS (SELECT FROM trueup.grant_use u
                                            WHERE u.user_id = g.user_id AND u.grant_id = g.id
                                              AND u.window_start = b.window_start)))
        ORDER BY s.{{ subscription.user_id }}  -- every run locks in the same order
    LOOP
        PERFORM FROM trueup.balance b WHERE b.user_id = v_user FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND AND EXISTS (SELECT FROM trueup.balance b WHERE b.user_id = v_user);
        SELECT * INTO a FROM trueup.lock_account(v_user, at);
{{ store_balance("v_user") }}
        v_refreshed := v_refreshed + 1;
    END LOOP;
    RETURN v_refreshed;
END $$;

-- Correct counters by compare-and-set: each only if it still has the value that was seen, in the window in which it was
-- seen, because a renewal may set the same value again. p_windows null: in any window. A row that the host has locked
-- is skipped: trueup never waits for the host while it holds locks that others wait for. A counter without a limit is
-- never written. p_observed, p_expected: as remaining tokens. Returns the users whose counter was corrected.
CREATE OR REPLACE FUNCTION trueup.correct_counters(
    p_users {{ user_id_type }}[], p_subscriptions text[], p_observed bigint[], p_expected bigint[],
    p_windows text[] DEFAULT NULL
) RETURNS SETOF {{ user_id_type }} LANGUAGE plpgsql AS $$
BEGIN
    SET CONSTRAINTS ALL IMMEDIATE;  -- triggers that the host defers run now, in the role's search path
    PERFORM set_config('trueup.own_counter', trueup.own_row_mark('correction'), true);  -- for the journal
    RETURN QUERY
    WITH locked AS (
        SELECT s.{{ subscription.id }} AS id, {{ raw_counter("w.expected", "e.original") }} AS written
        FROM unnest(p_users, p_subscriptions, p_observed, p_expected, p_windows)
            AS w (user_id, subscription_id, observed, expected, window_start)
        JOIN {{ subscription }} s ON s.{{ subscription.user_id }} = w.user_id
        {% if subscription.counts_up or subscription.unlimited %}
        JOIN LATERAL (SELECT t.original, t.plan_kind FROM trueup.entitlements(clock_timestamp()) t
                      WHERE t.user_id = w.user_id AND t.subscription_id = w.subscription_id) e
            ON e.plan_kind IS DISTINCT FROM 'unlimited'
        {% endif %}
        WHERE s.{{ subscription.id }}::text = w.subscription_id
          AND (w.window_start IS NULL
               OR {{ window_start("s") }}::text = w.window_start)
          AND {{ counter("s", "e.original") }} IS NOT DISTINCT FROM w.observed
        FOR NO KEY UPDATE OF s SKIP LOCKED
    )
    UPDATE {{ subscription }} s SET {{ subscription.tokens_remaining }} = l.written
    FROM locked l CROSS JOIN {{ role_search_path() }}
    WHERE s.{{ subscription.id }} = l.id
    RETURNING s.{{ subscription.user_id }}::{{ user_id_type }};
    {{ own_search_path() }}
    PERFORM set_config('trueup.own_counter', '', true);
END $$;

-- Earlier findings and decisions about these users' counters. `row_id` and the columns after it: the newest drift row,
-- if the last finished run over all users saw it (otherwise the drift had disappeared meanwhile, and this is a new
-- one). `ignored`: the differences that a person decided to ignore. `undone`: a person undid a correction, and no
-- decision followed. Both apply within a window.
CREATE OR REPLACE FUNCTION trueup.drift_past(p_users {{ user_id_type }}[]) RETURNS TABLE (
    user_id {{ user_id_type }}, row_id bigint, subscription_id text, observed bigint, expected bigint, off_by bigint,
    cause text, action text, decision text, found_at timestamptz, ignored bigint[], undone boolean, reason text
) LANGUAGE sql STABLE AS $$
    WITH newest_run AS (
        SELECT coalesce(max(r.id), 0) AS id FROM trueup.reconcile_run r
        WHERE r.status = 'finished' AND r.only_user IS NULL AND NOT r.dry_run
    )
    SELECT u.user_id, d.id, d.subscription_id, d.observed, d.expected, d.off_by, d.cause, d.action,
           d.decision, d.found_at, i.ignored, coalesce(x.undone, false), d.reason
    FROM unnest(p_users) AS u (user_id)
    CROSS JOIN newest_run
    LEFT JOIN LATERAL (
        SELECT {{ window_start("t") }} AS window_start
        FROM {{ subscription }} t WHERE t.{{ subscription.user_id }} = u.user_id
    ) s ON true
    LEFT JOIN LATERAL (
        SELECT n.*, trueup.off_by(n) AS off_by,
               (SELECT max(c.decision) FROM trueup.drift_decision c
                WHERE c.user_id = n.user_id AND c.drift_id = n.id) AS decision
        FROM trueup.drift n WHERE n.user_id = u.user_id ORDER BY n.id DESC LIMIT 1
    ) d ON d.last_run_id >= newest_run.id
    LEFT JOIN LATERAL (
        SELECT array_agg(trueup.off_by(o)) AS ignored
        FROM trueup.drift_decision c JOIN trueup.drift o ON o.user_id = c.user_id AND o.id = c.drift_id
        WHERE c.user_id = u.user_id AND c.decision = 'ignore' AND c.component IS NULL
          AND coalesce(c.window_start = s.window_start, c.decided_at >= s.window_start)
    ) i ON true
    LEFT JOIN LATERAL (
        SELECT c.decision = 'undo' AS undone FROM trueup.drift_decision c
        WHERE c.user_id = u.user_id AND c.decision <> 'ignore'
          AND coalesce(c.window_start = s.window_start, c.decided_at >= s.window_start)
        ORDER BY c.id DESC LIMIT 1
    ) x ON true
$$;
