{% from "host/rows.sql" import countable, is_counted, owed_since, period_starts, window_start, worth_of_plans %}
-- Grants: tokens on top of a plan. While a grant lives, it adds to `original` in a window the tokens that it had left
-- when the window began. After its expiry or revocation, it adds the tokens that it has paid for in this window, so its
-- end never takes away used tokens. Tokens left at the end of a window carry over into the next one.
--
-- Order of use: grants with an expiry (soonest first), then the plan, then grants without an expiry (oldest first). A
-- grant with an expiry pays for usage logged while it lived, and for the user's overdraft at the time it was given.
--
-- A grant never pays for usage that a plan paid for. So each window is compared with its own plan, even if several
-- windows passed between two reads of trueup: a trigger records each in trueup.window_change, in the host's own
-- transaction. Within a window, usage counts against the plan of its time: a larger plan counts from the first row
-- logged under it, and usage that a larger plan paid for stays paid under a smaller one. So the order in which the host
-- changes window and plan does not matter.
--
-- trueup.grant_use stores a window's use of a grant. It is written under the balance's lock, when the window has ended
-- (for all grants) or when a grant has ended (for that grant).

-- Counted tokens of the log and of owed charges between neighbouring times. Place n is from time n to time n + 1.
CREATE OR REPLACE FUNCTION trueup.usage_between(p_user {{ user_id_type }}, p_times timestamptz[])
RETURNS TABLE (place integer, tokens bigint) LANGUAGE sql STABLE AS $$
    SELECT t.place, {{ countable("sum(t.tokens)") }}
    FROM (
        SELECT width_bucket(l.{{ usage_log.created_at }}::timestamptz, usage_between.p_times) AS place,
               l.{{ usage_log.total_tokens }} AS tokens
        FROM {{ usage_log }} l
        WHERE {{ is_counted("l", "usage_between.p_user", "(usage_between.p_times)[1]") }}
          AND l.{{ usage_log.created_at }} < (usage_between.p_times)[cardinality(usage_between.p_times)]
          AND l.{{ usage_log.total_tokens }} IS NOT NULL
        UNION ALL
        SELECT width_bucket(o.used_at, usage_between.p_times), o.total_tokens
        {{ owed_since("usage_between.p_user", "(usage_between.p_times)[1]") }}
          AND o.used_at < (usage_between.p_times)[cardinality(usage_between.p_times)]
    ) t
    GROUP BY 1
$$;

-- The tokens that a subscription with these plans includes. A plan id is NULL if there is no plan of that kind. If the
-- subscription itself states the tokens, the plan id is "tokens:" and their number.
CREATE OR REPLACE FUNCTION trueup.plan_size(p_token_plan text, p_full_plan text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN plan_size.p_token_plan LIKE 'tokens:%' THEN substr(plan_size.p_token_plan, 8)::bigint
                ELSE {{ worth_of_plans("tp.tokens", "fp.tokens", "tp.id IS NOT NULL", "fp.id IS NOT NULL") }} END::bigint
    FROM (SELECT) AS one
    LEFT JOIN (SELECT t.{{ token_plan.id }}::text AS id, t.{{ token_plan.tokens_included }} AS tokens
               FROM {{ token_plan }} t) tp ON tp.id = plan_size.p_token_plan
    LEFT JOIN (SELECT t.{{ full_plan.id }}::text AS id, t.{{ full_plan.tokens_included }} AS tokens
               FROM {{ full_plan }} t) fp ON fp.id = plan_size.p_full_plan
$$;

{% if subscription.anchor %}
-- The repeating periods of a user between the newest record and the period of p_at, with the record's plan.
CREATE OR REPLACE FUNCTION trueup.passed_periods(p_user {{ user_id_type }}, p_at timestamptz)
RETURNS TABLE (at timestamptz, plan_tokens bigint) LANGUAGE sql STABLE AS $$
    SELECT t.at, coalesce(n.plan_tokens, trueup.plan_size(n.token_plan_id, n.full_plan_id))
    FROM {{ subscription }} s
    CROSS JOIN LATERAL (SELECT * FROM trueup.window_change c
                        WHERE c.user_id = passed_periods.p_user ORDER BY c.id DESC LIMIT 1) n
    CROSS JOIN LATERAL (SELECT {{ window_start("s", "passed_periods.p_at") }} AS present) w
    CROSS JOIN LATERAL ({{ period_starts("s", "n.window_start", "w.present") }}) t
    WHERE s.{{ subscription.user_id }} = passed_periods.p_user
$$;
{% endif %}

-- A user's windows, oldest first. The last is p_window, with p_plan if trueup.window_change does not have it yet.
-- `until`: the begin of the next window, NULL for the last. `settled`: the window's use of grants has been recorded.
-- `written_until`: the end up to which it was recorded; NULL: each grant's own end. `since`, `plans`: the begin and the
-- tokens of each plan. A window that moved back makes the windows after it void.
CREATE OR REPLACE FUNCTION trueup.windows(p_user {{ user_id_type }}, p_window timestamptz, p_plan bigint)
RETURNS TABLE (
    window_start timestamptz, until timestamptz, settled boolean, written_until timestamptz,
    since timestamptz[], plans bigint[]
) LANGUAGE sql STABLE AS $$
    WITH recorded AS (
        SELECT c.id, c.window_start, c.changed_at, c.settled_until,
               coalesce(c.plan_tokens, trueup.plan_size(c.token_plan_id, c.full_plan_id)) AS plan
        FROM trueup.window_change c WHERE c.user_id = windows.p_user
    ), known AS (
        SELECT * FROM recorded
        UNION ALL
        {% if subscription.anchor %}
        SELECT 9223372036854770000 + row_number() OVER (ORDER BY t.at), t.at, t.at, NULL, t.plan_tokens
        FROM trueup.passed_periods(windows.p_user, windows.p_window) t
        UNION ALL
        {% endif %}
        SELECT 9223372036854775807, windows.p_window, 'infinity', NULL, windows.p_plan
        WHERE windows.p_window IS DISTINCT FROM (SELECT n.window_start FROM recorded n ORDER BY n.id DESC LIMIT 1)
    ), ordered AS (
        SELECT k.*, min(k.window_start) OVER (ORDER BY k.id ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS lowest,
               max(k.changed_at) OVER (ORDER BY k.id) AS since  -- the maximum, because a clock may be set back
        FROM known k
    ), kept AS (
        SELECT p.window_start, lead(p.window_start) OVER (ORDER BY p.window_start) AS until,
               max(p.settled_until) AS settled_until, array_agg(p.since ORDER BY p.id) AS since,
               array_agg(p.plan ORDER BY p.id) AS plans
        FROM ordered p WHERE p.window_start = p.lowest GROUP BY p.window_start
    )
    SELECT k.window_start, k.until, coalesce(k.settled_until = k.until, false), least(k.until, k.settled_until),
           k.since, k.plans
    FROM kept k
$$;

-- The grants among p_ids that may pay for usage of a window until that time. `place`: the order in which they pay.
-- `rest`: the tokens that each has left, from p_rest.
CREATE OR REPLACE FUNCTION trueup.paying_grants(
    p_user {{ user_id_type }}, p_window timestamptz, p_until timestamptz, p_ids bigint[], p_rest bigint[]
) RETURNS TABLE (place bigint, id bigint, begins timestamptz, ends timestamptz, expiring boolean, rest bigint)
LANGUAGE sql STABLE AS $$
    SELECT row_number() OVER (ORDER BY g.expires_at NULLS LAST, g.granted_at, g.id),
           g.id, g.granted_at, least(g.expires_at, g.revoked_at, 'infinity'), g.expires_at IS NOT NULL, r.rest
    FROM unnest(p_ids, p_rest) AS r (id, rest)
    JOIN trueup.token_grant g ON g.user_id = p_user AND g.id = r.id
    WHERE g.granted_at < p_until AND least(g.expires_at, g.revoked_at, 'infinity') > p_window
$$;

-- Counted tokens between each pair of neighbouring times, and the number of the plan under which they were logged,
-- among the plans that began at p_since. The first known plan also applies to all times before it.
CREATE OR REPLACE FUNCTION trueup.usage_by_plan(p_user {{ user_id_type }}, p_times timestamptz[], p_since timestamptz[])
RETURNS TABLE (place integer, tokens bigint, plan_number integer) LANGUAGE sql STABLE AS $$
    SELECT t.place, coalesce(l.tokens, 0), p.number
    FROM generate_series(1, cardinality(p_times) - 1) AS t (place)
    LEFT JOIN trueup.usage_between(p_user, p_times) l ON l.place = t.place
    CROSS JOIN LATERAL (SELECT coalesce(max(c.number), 1)::integer AS number
                        FROM unnest(p_since) WITH ORDINALITY AS c (at, number) WHERE c.at <= p_times[t.place]) p
$$;

-- The tokens that a window used of the grants p_ids until that time, in their order. p_rest: the tokens that each had
-- left when the window began. The loop goes over the begins and ends of grants and the changes of the plan; in each
-- step, the grants that live in the interval pay for its usage.
-- Longer than 70 lines, because each step of the one loop changes the remaining tokens of the grants and the plan.
CREATE OR REPLACE FUNCTION trueup.used_in_window(
    p_user {{ user_id_type }}, p_window timestamptz, p_until timestamptz, p_since timestamptz[], p_plans bigint[],
    p_ids bigint[], p_rest bigint[]
) RETURNS bigint[] LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_ids bigint[];
    v_begins timestamptz[];
    v_ends timestamptz[];
    v_expiring boolean[];
    v_rest bigint[];
    v_used bigint[];
    v_times timestamptz[];
    v_logged bigint[];
    v_of_plan integer[];  -- the number of the plan under which each was logged
    v_plan bigint := p_plans[1];
    v_number integer;  -- the plan that counts: the last plan with usage
    v_spent numeric := 0;  -- the usage that the plan and grants without an expiry pay for
    v_funds numeric;  -- the tokens that these have
    v_due bigint;
    v_take bigint;
BEGIN
    SELECT array_agg(g.id ORDER BY g.place), array_agg(g.begins ORDER BY g.place), array_agg(g.ends ORDER BY g.place),
           array_agg(g.expiring ORDER BY g.place), array_agg(g.rest ORDER BY g.place), array_agg(0::bigint)
    INTO v_ids, v_begins, v_ends, v_expiring, v_rest, v_used
    FROM trueup.paying_grants(p_user, p_window, p_until, p_ids, p_rest) g;
    IF v_ids IS NULL OR p_until <= p_window THEN
        RETURN array_fill(0::bigint, ARRAY[cardinality(p_ids)]);
    END IF;
    SELECT array_agg(DISTINCT t.at ORDER BY t.at) INTO v_times
    FROM unnest(v_begins || v_ends || p_since || ARRAY[p_window, p_until]) AS t (at)
    WHERE t.at BETWEEN p_window AND p_until;
    SELECT array_agg(u.tokens ORDER BY u.place), array_agg(u.plan_number ORDER BY u.place) INTO v_logged, v_of_plan
    FROM trueup.usage_by_plan(p_user, v_times, p_since) u;
    FOR s IN 1 .. cardinality(v_logged) LOOP
        -- A new grant takes over the user's overdraft. The overdraft is measured with the larger of the plan that
        -- counts and the current plan, because no grant pays for usage that the current plan is going to cover.
        v_funds := greatest(v_plan, p_plans[v_of_plan[s]]);
        FOR i IN 1 .. cardinality(v_ids) LOOP
            IF NOT v_expiring[i] AND v_begins[i] <= v_times[s] AND v_ends[i] > v_times[s] THEN
                v_funds := v_funds + v_rest[i];
            END IF;
        END LOOP;
        FOR i IN 1 .. cardinality(v_ids) LOOP
            IF v_expiring[i] AND v_begins[i] = v_times[s] AND v_ends[i] > v_times[s] THEN
                v_used[i] := least(v_rest[i], greatest(v_spent - v_funds, 0));
                v_spent := v_spent - v_used[i];
            END IF;
        END LOOP;
        IF v_logged[s] <> 0 AND v_of_plan[s] IS DISTINCT FROM v_number THEN
            v_number := v_of_plan[s];
            v_plan := greatest(p_plans[v_number], least(v_spent, v_plan));
        END IF;
        v_due := greatest(v_logged[s], 0);
        v_spent := v_spent + v_logged[s];
        FOR i IN 1 .. cardinality(v_ids) LOOP
            IF v_expiring[i] AND v_begins[i] <= v_times[s] AND v_ends[i] > v_times[s] THEN
                v_take := least(v_rest[i] - v_used[i], v_due);
                v_used[i] := v_used[i] + v_take;
                v_due := v_due - v_take;
                v_spent := v_spent - v_take;
            END IF;
        END LOOP;
        -- A grant without an expiry pays at its revocation or at the end, for usage beyond the plan and older grants.
        v_funds := v_plan;
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
    RETURN ARRAY(SELECT coalesce(u.used, 0) FROM unnest(p_ids) WITH ORDINALITY AS p (id, place)
                 LEFT JOIN unnest(v_ids, v_used) AS u (id, used) ON u.id = p.id ORDER BY p.place);
END $$;

-- The recorded use of grants that ended in a window. It is valid whether or not the window has ended.
-- p_until: the end up to which it was recorded; NULL: each grant's own end. Grants that end later are left out.
CREATE OR REPLACE FUNCTION trueup.written_use(p_user {{ user_id_type }}, p_window timestamptz, p_until timestamptz)
RETURNS TABLE (grant_id bigint, tokens bigint) LANGUAGE sql STABLE AS $$
    SELECT u.grant_id, u.tokens FROM trueup.grant_use u
    JOIN trueup.token_grant g ON g.user_id = u.user_id AND g.id = u.grant_id
    WHERE u.user_id = p_user AND u.window_start = p_window
      AND least(g.expires_at, g.revoked_at) <= coalesce(p_until, 'infinity')
$$;

-- The use of each grant by windows that have ended and have not been settled.
CREATE OR REPLACE FUNCTION trueup.unsettled_uses(p_user {{ user_id_type }}, p_window timestamptz, p_plan bigint)
RETURNS TABLE (window_start timestamptz, until timestamptz, grant_id bigint, tokens bigint)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    w record;
    v_ids bigint[];
    v_rest bigint[];
    v_written bigint[];  -- the recorded use of grants that ended in the window before its own end
    v_used bigint[];
BEGIN
    FOR w IN SELECT * FROM trueup.windows(p_user, p_window, p_plan) t WHERE NOT t.settled AND t.until IS NOT NULL
             ORDER BY t.window_start LOOP
        IF v_ids IS NULL THEN
            SELECT array_agg(g.id ORDER BY g.id),
                   array_agg(g.tokens - coalesce((
                       SELECT sum(u.tokens) FROM trueup.grant_use u
                       WHERE u.user_id = p_user AND u.grant_id = g.id AND u.window_start < w.window_start), 0)::bigint
                       ORDER BY g.id)
            INTO v_ids, v_rest FROM trueup.token_grant g WHERE g.user_id = p_user;
        END IF;
        SELECT array_agg(x.tokens ORDER BY i.place) INTO v_written
        FROM unnest(v_ids) WITH ORDINALITY AS i (id, place)
        LEFT JOIN trueup.written_use(p_user, w.window_start, w.written_until) x ON x.grant_id = i.id;
        v_used := trueup.used_in_window(
            p_user, w.window_start, w.until, w.since, w.plans, v_ids,
            ARRAY(SELECT coalesce(x.written, x.rest)
                  FROM unnest(v_written, v_rest) WITH ORDINALITY AS x (written, rest, place) ORDER BY x.place));
        v_used := ARRAY(SELECT coalesce(x.written, x.used)
                        FROM unnest(v_written, v_used) WITH ORDINALITY AS x (written, used, place) ORDER BY x.place);
        v_rest := ARRAY(SELECT greatest(x.rest - x.used, 0)
                        FROM unnest(v_rest, v_used) WITH ORDINALITY AS x (rest, used, place) ORDER BY x.place);
        RETURN QUERY SELECT w.window_start, w.until, u.id, u.used FROM unnest(v_ids, v_used) AS u (id, used);
    END LOOP;
END $$;

-- A user's grants in the newest window. `rest`: the tokens left when it began. `settled`: the recorded use, in this
-- window, of a grant that ended in it; NULL until it is recorded.
CREATE OR REPLACE FUNCTION trueup.grants_at(p_user {{ user_id_type }}, p_window timestamptz, p_plan bigint)
RETURNS TABLE (
    id bigint, begins timestamptz, ends timestamptz, expires_at timestamptz, rest bigint, settled bigint
) LANGUAGE sql STABLE AS $$
    WITH w AS MATERIALIZED (
        SELECT * FROM trueup.windows(p_user, p_window, p_plan) t
    ), used AS (
        SELECT u.grant_id, sum(u.tokens) AS tokens
        FROM (SELECT u.grant_id, u.tokens FROM w JOIN trueup.grant_use u
                  ON u.user_id = p_user AND u.window_start = w.window_start
              WHERE w.settled
              UNION ALL
              SELECT u.grant_id, u.tokens FROM trueup.unsettled_uses(p_user, p_window, p_plan) u
              WHERE EXISTS (SELECT FROM w WHERE w.until IS NOT NULL AND NOT w.settled)) u
        GROUP BY u.grant_id
    )
    SELECT g.id, g.granted_at, least(g.expires_at, g.revoked_at, 'infinity'), g.expires_at,
           greatest(g.tokens - coalesce(used.tokens, 0), 0)::bigint, x.tokens
    FROM trueup.token_grant g
    LEFT JOIN used ON used.grant_id = g.id
    LEFT JOIN w ON w.until IS NULL
    LEFT JOIN LATERAL trueup.written_use(p_user, w.window_start, w.written_until) x ON x.grant_id = g.id
    WHERE g.user_id = p_user
$$;

-- The newest window's use of each grant until that time. No rows if the time is NULL.
CREATE OR REPLACE FUNCTION trueup.grant_uses(
    p_user {{ user_id_type }}, p_window timestamptz, p_until timestamptz, p_plan bigint
) RETURNS TABLE (grant_id bigint, tokens bigint) LANGUAGE sql STABLE AS $$
    SELECT u.id, u.used
    FROM (SELECT array_agg(g.id) AS ids, array_agg(coalesce(g.settled, g.rest)) AS rest
          FROM trueup.grants_at(p_user, p_window, p_plan) g) a
    JOIN trueup.windows(p_user, p_window, p_plan) w ON w.until IS NULL
    CROSS JOIN LATERAL unnest(a.ids, trueup.used_in_window(p_user, p_window, p_until, w.since, w.plans, a.ids, a.rest))
        AS u (id, used)
    WHERE p_until > p_window AND a.ids IS NOT NULL
$$;

-- The tokens that a user's grants add to the plan in that window at that time. The log is read only if a grant or a
-- window has ended and its use has not been recorded yet; the next gate or reconcile run records it.
CREATE OR REPLACE FUNCTION trueup.granted(
    p_user {{ user_id_type }}, p_window timestamptz, p_plan bigint, p_at timestamptz
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
