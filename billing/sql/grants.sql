-- Grants: tokens on top of a plan. What a grant adds to `original` in a window is what it had left when the window
-- began, as long as it lives; once it has expired or was revoked, what it has paid for in this window, so that an end
-- never takes away tokens that were used. What is left when a window ends goes on into the next one.
--
-- Order of use: grants with an expiry (soonest first), then the plan, then grants without one (oldest first). A grant
-- with an expiry pays for usage logged while it lived, and for what the user was over budget by when it came.
--
-- trueup.grant_use keeps what a window used of a grant. It is written under the balance's lock, when the window moves
-- forward (for all grants) or when a grant is found ended (for that one). No row is of a window after the balance's;
-- a row of the balance's own window is of a grant that has ended in it.

-- Counted tokens of the log between each two neighbours of these times; `place` 1: between the first two.
CREATE OR REPLACE FUNCTION trueup.usage_between(p_user {{user_id_type}}, p_times timestamptz[])
RETURNS TABLE (place integer, tokens bigint) LANGUAGE sql STABLE AS $$
    SELECT width_bucket(l.{{usage_log.created_at}}::timestamptz, usage_between.p_times),
           coalesce(sum(l.{{usage_log.total_tokens}}), 0)::bigint
    FROM {{usage_log}} l
    WHERE l.{{usage_log.user_id}} = usage_between.p_user AND l.{{usage_log.success}}
      AND l.{{usage_log.created_at}} >= (usage_between.p_times)[1]
      AND l.{{usage_log.created_at}} < (usage_between.p_times)[cardinality(usage_between.p_times)]
    GROUP BY 1
$$;

-- A user's grants as a window finds them. `rest`: what they had left when it began. `settled`: what this window has
-- used of one that ended in it, once that is written down. A window that the balance has not seen yet comes after the
-- balance's own, whose use is then worked out from the log; one before the balance's ignores the use of those after it.
CREATE OR REPLACE FUNCTION trueup.grants_at(p_user {{user_id_type}}, p_window timestamptz, p_plan bigint)
RETURNS TABLE (
    id bigint, begins timestamptz, ends timestamptz, expires_at timestamptz, rest bigint, settled bigint
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    b trueup.balance;
BEGIN
    SELECT * INTO b FROM trueup.balance t WHERE t.user_id = p_user;
    RETURN QUERY
    SELECT g.id, g.granted_at, least(coalesce(g.expires_at, 'infinity'), coalesce(g.revoked_at, 'infinity')),
           g.expires_at,
           greatest(g.tokens - coalesce((
               SELECT sum(u.tokens) FROM trueup.grant_use u
               WHERE u.user_id = p_user AND u.grant_id = g.id AND u.window_start < least(p_window, b.window_start)
           ), 0) - coalesce(m.tokens, 0), 0)::bigint,
           (SELECT u.tokens FROM trueup.grant_use u
            WHERE b.window_start = p_window AND u.user_id = p_user AND u.grant_id = g.id
              AND u.window_start = p_window)
    FROM trueup.token_grant g
    LEFT JOIN (
        SELECT x.grant_id, x.tokens
        FROM trueup.grant_uses(p_user, b.window_start,
                               CASE WHEN b.window_start < p_window THEN p_window END,
                               coalesce(b.plan_tokens, p_plan)) x
    ) m ON m.grant_id = g.id
    WHERE g.user_id = p_user;
END $$;

-- What a window used of each grant from its begin until that time (NULL: nothing is asked, nothing is returned). Goes
-- from one begin or end of a grant to the next, and lets the grants that live in between pay for what was logged then.
CREATE OR REPLACE FUNCTION trueup.grant_uses(
    p_user {{user_id_type}}, p_window timestamptz, p_until timestamptz, p_plan bigint
) RETURNS TABLE (grant_id bigint, tokens bigint) LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_ids bigint[];
    v_begins timestamptz[];
    v_ends timestamptz[];
    v_expiring boolean[];
    v_rest bigint[];
    v_used bigint[];
    v_times timestamptz[];
    v_logged bigint[];
    v_spent bigint := 0;  -- by the plan and by grants without an expiry
    v_funds numeric;  -- what those have
    v_due bigint;
    v_take bigint;
BEGIN
    IF p_until IS NULL OR p_window IS NULL OR p_until <= p_window THEN
        RETURN;
    END IF;
    -- In the order in which they pay.
    SELECT array_agg(o.id), array_agg(o.begins), array_agg(o.ends), array_agg(o.expires_at IS NOT NULL),
           array_agg(coalesce(o.settled, o.rest)), array_agg(0::bigint)
    INTO v_ids, v_begins, v_ends, v_expiring, v_rest, v_used
    FROM (SELECT * FROM trueup.grants_at(p_user, p_window, p_plan) t
          WHERE t.begins < p_until AND t.ends > p_window ORDER BY t.expires_at NULLS LAST, t.begins, t.id) o;
    IF v_ids IS NULL THEN
        RETURN;
    END IF;
    SELECT array_agg(DISTINCT t.at ORDER BY t.at) INTO v_times
    FROM unnest(v_begins || v_ends || ARRAY[p_window, p_until]) AS t (at)
    WHERE t.at BETWEEN p_window AND p_until;
    SELECT array_agg(coalesce(l.tokens, 0) ORDER BY t.place) INTO v_logged
    FROM generate_series(1, cardinality(v_times) - 1) AS t (place)
    LEFT JOIN trueup.usage_between(p_user, v_times) l ON l.place = t.place;
    FOR s IN 1 .. cardinality(v_logged) LOOP
        v_funds := p_plan;
        FOR i IN 1 .. cardinality(v_ids) LOOP
            IF NOT v_expiring[i] AND v_begins[i] <= v_times[s] AND v_ends[i] > v_times[s] THEN
                v_funds := v_funds + v_rest[i];
            END IF;
        END LOOP;
        v_due := greatest(v_logged[s] + greatest(v_spent - v_funds, 0), 0);
        v_spent := v_spent + v_logged[s];
        FOR i IN 1 .. cardinality(v_ids) LOOP
            IF v_expiring[i] AND v_begins[i] <= v_times[s] AND v_ends[i] > v_times[s] THEN
                v_take := least(v_rest[i] - v_used[i], v_due);
                v_used[i] := v_used[i] + v_take;
                v_due := v_due - v_take;
                v_spent := v_spent - v_take;
            END IF;
        END LOOP;
        -- One without an expiry pays when it is revoked, or at the end: for what the plan and older ones don't cover.
        v_funds := p_plan;
        FOR i IN 1 .. cardinality(v_ids) LOOP
            IF NOT v_expiring[i] AND v_begins[i] <= v_times[s] AND v_ends[i] > v_times[s] THEN
                IF v_ends[i] = v_times[s + 1] OR v_times[s + 1] = p_until THEN
                    v_used[i] := least(v_rest[i], greatest(v_spent - v_funds, 0));
                END IF;
                IF v_ends[i] = v_times[s + 1] THEN
                    v_spent := v_spent - v_used[i];
                ELSE
                    v_funds := v_funds + v_rest[i];
                END IF;
            END IF;
        END LOOP;
    END LOOP;
    RETURN QUERY SELECT u.id, u.used FROM unnest(v_ids, v_used) AS u (id, used);
END $$;

-- What a user's grants add to the plan in that window at that time. The log is read only for a grant that has ended in
-- this window, or for a window that has ended, until the next gate or reconcile writes their use down.
CREATE OR REPLACE FUNCTION trueup.granted(
    p_user {{user_id_type}}, p_window timestamptz, p_plan bigint, p_at timestamptz
) RETURNS numeric LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_tokens numeric;
    v_ended timestamptz;
BEGIN
    SELECT coalesce(sum(CASE WHEN g.ends > p_at THEN g.rest ELSE g.settled END), 0),
           max(g.ends) FILTER (WHERE g.ends <= p_at AND g.settled IS NULL)
    INTO v_tokens, v_ended
    FROM trueup.grants_at(p_user, p_window, p_plan) g WHERE g.begins <= p_at AND g.ends > p_window;
    IF v_ended IS NOT NULL THEN
        v_tokens := v_tokens + (
            SELECT coalesce(sum(u.tokens), 0)
            FROM trueup.grants_at(p_user, p_window, p_plan) g
            JOIN trueup.grant_uses(p_user, p_window, v_ended, p_plan) u ON u.grant_id = g.id
            WHERE g.ends <= v_ended AND g.settled IS NULL);
    END IF;
    RETURN v_tokens;
END $$;

-- Write down what the window that was has used, and what grants that ended in the one that is have paid for. For
-- trueup.lock_account, under the balance's lock; idempotent by key. A window that moved back makes the use of those
-- from it on void.
CREATE OR REPLACE FUNCTION trueup.settle_grants(
    p_user {{user_id_type}}, p_old timestamptz, p_new timestamptz, p_old_plan bigint, p_new_plan bigint,
    p_at timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_ended timestamptz;
BEGIN
    IF p_old < p_new THEN
        INSERT INTO trueup.grant_use (user_id, grant_id, window_start, tokens)
        SELECT p_user, u.grant_id, p_old, u.tokens FROM trueup.grant_uses(p_user, p_old, p_new, p_old_plan) u
        WHERE u.tokens > 0
        ON CONFLICT DO NOTHING;
    ELSIF p_old > p_new THEN
        DELETE FROM trueup.grant_use u WHERE u.user_id = p_user AND u.window_start >= p_new;
    END IF;
    -- (The balance may still show the window that was: its rows say what is written, not trueup.grants_at.)
    SELECT max(least(g.expires_at, g.revoked_at)) INTO v_ended
    FROM trueup.token_grant g
    WHERE g.user_id = p_user AND least(g.expires_at, g.revoked_at) > p_new
      AND least(g.expires_at, g.revoked_at) <= p_at
      AND NOT EXISTS (SELECT FROM trueup.grant_use u
                      WHERE u.user_id = p_user AND u.grant_id = g.id AND u.window_start = p_new);
    IF v_ended IS NOT NULL THEN
        INSERT INTO trueup.grant_use (user_id, grant_id, window_start, tokens)
        SELECT p_user, g.id, p_new, coalesce(u.tokens, 0)
        FROM trueup.token_grant g
        LEFT JOIN trueup.grant_uses(p_user, p_new, v_ended, p_new_plan) u ON u.grant_id = g.id
        WHERE g.user_id = p_user AND least(g.expires_at, g.revoked_at) > p_new
          AND least(g.expires_at, g.revoked_at) <= v_ended
        ON CONFLICT DO NOTHING;
    END IF;
END $$;
