-- Evidence where the host keeps rows of its decrements: the log and they are two books of the same usage, so that a row
-- in one without its partner in the other says which it was, and when.

-- Log rows (L), failed ones (F) and decrements (D) of the users, from shortly before their base points. `settled`: before
-- the base point. `young`: the partner may still come.
CREATE OR REPLACE FUNCTION trueup.ledger_rows(
    p_users {{user_id_type}}[], p_bases timestamptz[], p_at timestamptz, p_min_age interval
) RETURNS TABLE (
    user_id {{user_id_type}}, kind text, id text, tokens bigint, at timestamptz, settled boolean, young boolean
) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT w.user_id, w.base_at, trueup.shortly_before(w.base_at) AS since
        FROM unnest(p_users, p_bases) AS w (user_id, base_at)
    ), arrays AS (
        SELECT array_agg(w.user_id) AS users, array_agg(w.since) AS since FROM wanted w
    ), both_books AS (
        SELECT l.user_id, l.kind, l.id, l.tokens, l.at FROM arrays a, trueup.log_rows(a.users, a.since) l
        UNION ALL
        SELECT t.user_id, 'D', t.id, t.tokens, t.at FROM arrays a, trueup.decrement_rows(a.users, a.since) t
    )
    SELECT b.user_id, b.kind, b.id, b.tokens, b.at, b.at < w.base_at,
           b.at > p_at - p_min_age AND b.at <= p_at + p_min_age
    FROM both_books b JOIN wanted w ON w.user_id = b.user_id
$$;

-- One document for each user:
--   `parts`: rows without a partner, by class: `missed` (a log row more than decrements), `double` (a decrement more than
--     log rows), `failed` (only a failed log row), `unlogged` (no log row), `mixed` (failed and counted ones). At most
--     four samples of each, and how many there are.
--   `edges`: groups of rows at the base point, or so young that partners may come: read one by one.
--   `concurrent`: decrements within two seconds of another's, whose requests were at work at the same time, as far as the
--     log tells; of such two, one may be lost. `overlapped`: the other one came later, and its log row before this one: it
--     may have read the counter before this one was written. `called_lost`: by an earlier look that accounted for all.
--   `overwriting`: the first decrement between the look of the last correction and two seconds after its write: its
--     request may have read the counter before.
--   `segments`: the counter replayed from purchase to purchase: its `change`, the `lowest` it came to on the way, and the
--     newest twelve decrements.
--   `carried`: what may have been kept of the window before.
CREATE OR REPLACE FUNCTION trueup.ledger_evidence(
    p_users {{user_id_type}}[], p_bases timestamptz[], p_windows timestamptz[], p_kinds text[], p_remaining bigint[],
    p_surplus bigint[], p_at timestamptz, p_min_age interval
) RETURNS TABLE (user_id {{user_id_type}}, evidence jsonb) LANGUAGE sql STABLE AS $$
    WITH wanted AS MATERIALIZED (
        SELECT * FROM unnest(p_users, p_bases, p_windows, p_kinds, p_remaining, p_surplus)
            AS w (user_id, base_at, window_start, kind, remaining, surplus)
    ), events AS MATERIALIZED (
        SELECT * FROM trueup.ledger_rows(p_users, p_bases, p_at, p_min_age) r
    ), own AS MATERIALIZED (
        SELECT c.user_id, c.log_id AS id, c.tokens_total AS tokens, c.charged_at AS at
        FROM wanted w JOIN trueup.charge c ON c.user_id = w.user_id AND c.charged_at >= w.base_at
        WHERE c.counter_lowered IS NOT FALSE AND c.tokens_total > 0
    ), sizes AS (
        -- Where as many of a size were subtracted as were logged, and at about the same times, all came out right.
        SELECT e.user_id, e.tokens FROM events e WHERE e.kind <> 'F'
        GROUP BY e.user_id, e.tokens
        HAVING count(*) FILTER (WHERE e.kind = 'L') <> count(*) FILTER (WHERE e.kind = 'D')
            OR count(*) FILTER (WHERE e.kind = 'L' AND NOT e.settled)
               <> count(*) FILTER (WHERE e.kind = 'D' AND NOT e.settled)
            OR abs(sum(CASE e.kind WHEN 'L' THEN -1 ELSE 1 END * extract(epoch FROM e.at)::float8)) > 600
    ), opened AS (
        SELECT e.*, (e.at > least(lag(e.at) OVER w, '9999-12-31'::timestamptz) + interval '10 minutes')::int AS opens
        FROM events e JOIN sizes s ON s.user_id = e.user_id AND s.tokens = e.tokens
        WINDOW w AS (PARTITION BY e.user_id, e.tokens ORDER BY e.at, e.kind DESC, e.id)
    ), numbered AS (
        SELECT o.*, sum(o.opens) OVER (PARTITION BY o.user_id, o.tokens ORDER BY o.at, o.kind DESC, o.id) AS number
        FROM opened o
    ), clusters AS MATERIALIZED (
        SELECT n.user_id, n.tokens, n.number, n.first_at, n.edge, n.since, n.l, n.f, n.d, n.l - n.d AS surplus, n.found
        FROM (
            SELECT n.user_id, n.tokens, n.number, min(n.at) AS first_at, bool_or(n.settled OR n.young) AS edge,
                   bool_or(NOT n.settled) AS since,
                   count(*) FILTER (WHERE n.kind = 'L') AS l, count(*) FILTER (WHERE n.kind = 'F') AS f,
                   count(*) FILTER (WHERE n.kind = 'D') AS d,
                   jsonb_agg(jsonb_build_object('kind', n.kind, 'id', n.id, 'at', n.at, 'settled', n.settled,
                                                'young', n.young) ORDER BY n.at, n.kind DESC, n.id)
                       FILTER (WHERE n.place <= 60) AS found
            FROM (SELECT n.*, row_number() OVER (PARTITION BY n.user_id, n.tokens, n.number
                                                 ORDER BY n.at, n.kind DESC, n.id) AS place
                  FROM numbered n) n
            GROUP BY n.user_id, n.tokens, n.number) n
    ), named AS (
        SELECT c.*, CASE WHEN c.surplus > 0 THEN 'missed' WHEN c.l = 0 AND c.f = 0 THEN 'unlogged'
                         WHEN c.l = 0 AND -c.surplus <= c.f THEN 'failed' WHEN c.f = 0 THEN 'double' ELSE 'mixed' END AS class,
               sum(c.l + c.f) OVER (PARTITION BY c.user_id, c.tokens) AS logged
        FROM clusters c WHERE NOT c.edge
    ), netted AS (
        -- A decrement that came within a day is late, and no drift: it cancels the log row that lacked it.
        SELECT n.*, n.class IN ('missed', 'unlogged') AND n.surplus <> 0
                    AND max(n.first_at) OVER pool <= least(min(n.first_at) OVER pool, '9999-12-31'::timestamptz)
                                                     + interval '1 day' AS pooled,
               sum(n.surplus) OVER pool AS net, bool_or(n.class = 'unlogged') OVER pool
                                                AND bool_or(n.class = 'missed') OVER pool AS both_ways
        FROM named n WHERE n.surplus <> 0
        WINDOW pool AS (PARTITION BY n.user_id, n.tokens, n.class IN ('missed', 'unlogged'))
    ), taken AS (
        SELECT n.*, n.both_ways AS late, CASE WHEN NOT n.pooled THEN abs(n.surplus) ELSE
                   least(abs(n.surplus), abs(n.net) - coalesce(sum(abs(n.surplus)) OVER (
                       PARTITION BY n.user_id, n.tokens, n.pooled ORDER BY n.number
                       ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)) END AS times
        FROM netted n WHERE NOT n.pooled OR sign(n.surplus) = sign(n.net)
    ), parts AS (
        SELECT t.user_id, jsonb_agg(t.found ORDER BY t.first_at) AS found
        FROM (
            SELECT t.user_id, min(t.first_at) AS first_at,
                   jsonb_build_object(
                       'class', t.class, 'count', sum(t.times), 'tokens', sum(sign(t.surplus) * t.times * t.tokens),
                       'first_at', min(t.first_at), 'elsewhere', bool_or(t.logged > t.l + t.f), 'late', bool_or(t.late),
                       'samples', jsonb_agg(jsonb_build_object('tokens', t.tokens, 'times', t.times, 'rows', t.found)
                                            ORDER BY t.first_at) FILTER (WHERE t.place <= 4)) AS found
            FROM (SELECT t.*, row_number() OVER (PARTITION BY t.user_id, t.class ORDER BY t.first_at) AS place
                  FROM taken t WHERE t.times > 0) t
            GROUP BY t.user_id, t.class) t
        GROUP BY t.user_id
    ), edges AS (
        -- Those with a row since the base point first: one of them may be all that tells what it did.
        SELECT c.user_id,
               jsonb_agg(jsonb_build_object('tokens', c.tokens, 'rows', c.found) ORDER BY c.since, c.first_at) AS found
        FROM (SELECT c.*, row_number() OVER (PARTITION BY c.user_id, c.since ORDER BY c.first_at DESC) AS place
              FROM clusters c WHERE c.edge AND c.l + c.f + c.d <= 60) c
        WHERE c.place <= CASE WHEN c.since THEN 40 ELSE 8 END GROUP BY c.user_id
    ), totals AS MATERIALIZED (
        SELECT w.user_id, w.base_at, w.window_start, w.kind, w.surplus, t.logged_rows, t.lowered_rows,
               t.logged - t.lowered AS difference,
               greatest(w.remaining + t.logged + coalesce(o.tokens, 0) - coalesce(g.tokens, 0), 0) AS start,
               t.lowered + coalesce(o.tokens, 0) AS lowered
        FROM wanted w
        JOIN (SELECT w.user_id, count(e.user_id) FILTER (WHERE e.kind = 'L') AS logged_rows,
                     count(e.user_id) FILTER (WHERE e.kind = 'D') AS lowered_rows,
                     coalesce(sum(e.tokens) FILTER (WHERE e.kind = 'L'), 0) AS logged,
                     coalesce(sum(e.tokens) FILTER (WHERE e.kind = 'D'), 0) AS lowered
              FROM wanted w LEFT JOIN events e ON e.user_id = w.user_id AND NOT e.settled
              GROUP BY w.user_id) t ON t.user_id = w.user_id
        LEFT JOIN (SELECT c.user_id, sum(c.tokens_total) AS tokens
                   FROM wanted w JOIN trueup.charge c ON c.user_id = w.user_id AND c.charged_at >= w.base_at
                   GROUP BY c.user_id) o ON o.user_id = w.user_id
        LEFT JOIN (SELECT g.user_id, sum(g.tokens) AS tokens
                   FROM wanted w JOIN trueup.token_grant g ON g.user_id = w.user_id AND g.granted_at > w.base_at
                   WHERE g.revoked_at IS NULL AND (g.expires_at > p_at) IS NOT FALSE
                   GROUP BY g.user_id) g ON g.user_id = w.user_id
    ), changes AS MATERIALIZED (
        -- Only where the two books don't account for all of the drift.
        SELECT c.user_id, c.id, c.tokens, c.at, c.own
        FROM (SELECT e.user_id, e.id, e.tokens, e.at, false AS own FROM events e WHERE e.kind = 'D' AND NOT e.settled
              UNION ALL SELECT o.user_id, o.id, o.tokens, o.at, true FROM own o) c
        JOIN totals t ON t.user_id = c.user_id AND t.surplus <> t.difference
    ), looks AS (
        -- The last look since then that accounted for all of the drift of then, and left nothing to a person: what it did
        -- not call lost was not.
        SELECT DISTINCT ON (d.user_id) d.user_id, d.found_at - interval '2 seconds' AS at,
               ARRAY(SELECT p.part #>> '{rows,0,id}' FROM jsonb_array_elements(d.evidence -> 'components') AS p (part)
                     WHERE p.part ->> 'cause' = 'lost_update') AS lost
        FROM totals t JOIN trueup.drift d ON d.user_id = t.user_id AND d.found_at > t.base_at
        WHERE t.surplus <> t.difference AND d.action <> 'review' AND NOT d.evidence -> 'alternatives' ? 'manual_edit'
          AND NOT string_to_array(d.cause, '+') && ARRAY['manual_edit', 'unexplained', 'clamped_at_zero',
                                                         'burned_at_expiry', 'counter_null', 'counter_negative',
                                                         'counter_out_of_range']
        ORDER BY d.user_id, d.found_at DESC
    ), turns AS (
        SELECT t.*, sum(t.opens) OVER (PARTITION BY t.user_id, t.tokens ORDER BY t.at, t.kind DESC, t.id) AS turn
        FROM (SELECT e.user_id, e.id, e.kind, e.tokens, e.at,
                     (e.kind <> 'D' AND coalesce(lag(e.kind) OVER w, 'L') = 'D')::int AS opens
              FROM events e JOIN totals t ON t.user_id = e.user_id AND t.surplus <> t.difference
              WINDOW w AS (PARTITION BY e.user_id, e.tokens ORDER BY e.at, e.kind DESC, e.id)) t
    ), requests AS (
        -- When a decrement's request began: at the last log row of its size before it. A second decrement of one log row
        -- has none, nor has a charge of ours, which lowers the counter in one step.
        SELECT r.user_id, r.id, r.began_at
        FROM (SELECT t.*, max(t.at) FILTER (WHERE t.kind <> 'D') OVER turn AS began_at,
                     count(*) FILTER (WHERE t.kind <> 'D') OVER turn AS begun,
                     count(*) FILTER (WHERE t.kind = 'D') OVER (turn ORDER BY t.at, t.kind DESC, t.id) AS place
              FROM turns t WINDOW turn AS (PARTITION BY t.user_id, t.tokens, t.turn)) r
        WHERE r.kind = 'D' AND r.place <= r.begun
    ), neighbours AS (
        SELECT c.*, jsonb_build_object('id', c.id, 'tokens', c.tokens, 'at', c.at, 'own', c.own) AS found,
               lag(c.at) OVER w AS at_before,
               coalesce(min(r.began_at) OVER moment < c.at, false) AS overlapped, r.began_at,
               count(*) FILTER (WHERE r.began_at IS NULL AND NOT c.own) OVER moment > 0 AS unknown_after
        FROM (SELECT c.*, least(c.at, '9999-12-31'::timestamptz) AS about FROM changes c) c
        LEFT JOIN requests r ON r.user_id = c.user_id AND r.id = c.id AND NOT c.own
        WINDOW w AS (PARTITION BY c.user_id ORDER BY c.at, c.id),
               -- Those that came after this one, but for it. (The rows of one moment have no order.)
               moment AS (PARTITION BY c.user_id ORDER BY c.about
                          RANGE BETWEEN CURRENT ROW AND '2 seconds' FOLLOWING EXCLUDE CURRENT ROW)
    ), paired AS (
        SELECT n.*, lag(n.found) OVER w AS before, lead(n.found) OVER w AS after, k.at AS looked_at,
               coalesce(n.id = ANY (k.lost), false) AS called_lost,
               n.at_before IS NOT NULL AND n.at <= least(n.at_before, '9999-12-31'::timestamptz) + interval '2 seconds' AS near_before
        FROM neighbours n LEFT JOIN looks k ON k.user_id = n.user_id
        WINDOW w AS (PARTITION BY n.user_id ORDER BY n.at, n.id)
    ), concurrent AS (
        SELECT p.user_id,
               jsonb_agg(jsonb_build_object('lost', p.found, 'overlapped', p.overlapped, 'called_lost', p.called_lost,
                                            'kept', CASE WHEN p.after IS NULL OR p.near_before AND NOT p.overlapped
                                                         THEN p.before ELSE p.after END)
                         ORDER BY p.at) AS found
        FROM (SELECT p.*, row_number() OVER (PARTITION BY p.user_id
                                             ORDER BY p.called_lost DESC, p.overlapped DESC,
                                                      p.tokens = t.surplus - t.difference DESC, p.at DESC) AS place
              FROM paired p JOIN totals t ON t.user_id = p.user_id
              -- Not those beside a request that began after they were done, or was done before theirs began.
              WHERE p.called_lost
                 OR (p.looked_at IS NULL OR p.at >= p.looked_at)
                    AND (p.overlapped OR p.unknown_after
                         OR p.near_before AND NOT p.own AND coalesce(p.began_at < p.at_before, true))) p
        WHERE p.place <= 60 GROUP BY p.user_id
    ), overwriting AS (
        SELECT DISTINCT ON (c.user_id) c.user_id, jsonb_build_object('id', c.id, 'tokens', c.tokens, 'at', c.at) AS found
        FROM changes c
        JOIN totals t ON t.user_id = c.user_id AND t.kind = 'correction'
        JOIN trueup.drift d ON d.user_id = t.user_id AND d.found_at = t.base_at AND d.action = 'corrected'
        WHERE NOT c.own AND c.at <= coalesce(CAST(d.evidence ->> 'written_at' AS timestamptz), d.found_at)
                                    + interval '2 seconds'
        ORDER BY c.user_id, c.at, c.id
    ), path AS (
        SELECT s.*, sum(s.change) OVER (PARTITION BY s.user_id, s.segment ORDER BY s.at, s.id) AS height
        FROM (SELECT s.*, count(*) FILTER (WHERE s.change IS NULL)
                              OVER (PARTITION BY s.user_id ORDER BY s.at, s.id) AS segment
              FROM (SELECT c.user_id, c.id, -c.tokens AS change, c.at FROM changes c
                    JOIN totals t ON t.user_id = c.user_id AND t.lowered > t.start
                    UNION ALL
                    SELECT p.user_id, p.id, NULL, p.at FROM trueup.purchase_rows(p_users, p_bases, p_windows, p_at) p
                    JOIN totals t ON t.user_id = p.user_id AND t.lowered > t.start) s) s
    ), segments AS (
        SELECT s.user_id, jsonb_agg(s.found ORDER BY s.segment) AS found
        FROM (SELECT s.user_id, s.segment,
                     jsonb_build_object(
                         'number', s.segment, 'change', coalesce(sum(s.change), 0),
                         'lowest', coalesce(min(s.height), 0),
                         'newest', coalesce(jsonb_agg(jsonb_build_object('id', s.id, 'tokens', -s.change, 'at', s.at)
                                                      ORDER BY s.place)
                                            FILTER (WHERE s.change IS NOT NULL AND s.place <= 12), '[]')) AS found
              FROM (SELECT p.*, row_number() OVER (PARTITION BY p.user_id, p.segment ORDER BY p.at DESC, p.id DESC) AS place
                    FROM path p) s
              GROUP BY s.user_id, s.segment) s
        GROUP BY s.user_id
    ), carried AS (
        SELECT c.user_id, jsonb_agg(c.found) AS found
        FROM (SELECT array_agg(t.user_id) AS users, array_agg(t.window_start) AS windows FROM totals t
              WHERE t.kind = 'window' AND t.surplus > t.difference) a,
             trueup.carried_rows(a.users, a.windows) c
        GROUP BY c.user_id
    )
    SELECT t.user_id,
           jsonb_build_object(
               'logged_rows', t.logged_rows, 'lowered_rows', t.lowered_rows, 'start', t.start,
               'parts', coalesce(p.found, '[]'), 'edges', coalesce(e.found, '[]'),
               'concurrent', coalesce(c.found, '[]'), 'overwriting', o.found,
               'segments', coalesce(s.found, '[]'),
               'carried', coalesce(r.found, '[]'))
    FROM totals t
    LEFT JOIN parts p ON p.user_id = t.user_id
    LEFT JOIN edges e ON e.user_id = t.user_id
    LEFT JOIN concurrent c ON c.user_id = t.user_id
    LEFT JOIN overwriting o ON o.user_id = t.user_id
    LEFT JOIN segments s ON s.user_id = t.user_id
    LEFT JOIN carried r ON r.user_id = t.user_id
$$;
