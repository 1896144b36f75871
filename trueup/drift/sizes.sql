-- Evidence where the host keeps no rows of its decrements: rows of the log that are as large as a drift, or as what is
-- left of it once a purchase is taken out. Sizes are a weaker proof than rows: see what explain_by_amounts.py makes of them.

-- One document for each user:
--   `matches`: rows of the log as large as one of the sizes in question, counted and failed ones, the newest three of each.
--   `pairs`: where no single row is, how many pairs of the newest 400 add up to it, by kind, and one of them.
--   `young`: counted rows whose decrement may still come. `used_before`: the user used something before the window.
--   `carried`: what may have been kept of the window before.
CREATE OR REPLACE FUNCTION trueup.size_evidence(
    p_users {{user_id_type}}[], p_bases timestamptz[], p_windows timestamptz[], p_kinds text[], p_surplus bigint[],
    p_at timestamptz, p_min_age interval
) RETURNS TABLE (user_id {{user_id_type}}, evidence jsonb) LANGUAGE sql STABLE AS $$
    WITH wanted AS MATERIALIZED (
        SELECT w.user_id, w.base_at, w.window_start, w.kind, w.surplus, w.surplus - coalesce(o.tokens, 0) AS open
        FROM unnest(p_users, p_bases, p_windows, p_kinds, p_surplus)
            AS w (user_id, base_at, window_start, kind, surplus)
        LEFT JOIN LATERAL (
            SELECT sum(c.tokens_total) AS tokens FROM trueup.charge c
            WHERE c.user_id = w.user_id AND c.charged_at >= w.base_at AND c.counter_lowered = false) o ON true
    ), events AS MATERIALIZED (
        SELECT e.*, e.kind = 'L' AS counted FROM trueup.log_rows(p_users, p_bases) e
    ), questions AS (
        SELECT w.user_id, w.open AS tokens FROM wanted w
        UNION
        SELECT w.user_id, w.open - p.tokens
        FROM trueup.purchase_rows(p_users, p_bases, p_windows, p_at) p JOIN wanted w ON w.user_id = p.user_id
        WHERE NOT p.granted
        UNION
        SELECT w.user_id, w.open - s.size FROM wanted w, trueup.plan_sizes() AS s (size)
        WHERE NOT trueup.purchases_mapped() AND w.open >= s.size
    ), placed AS (
        SELECT q.user_id, q.tokens AS question, e.counted, e.at,
               jsonb_build_object('log_id', e.id, 'tokens', e.tokens, 'created_at', e.at) AS found,
               row_number() OVER (PARTITION BY q.user_id, q.tokens, e.counted ORDER BY e.at DESC, e.id) AS place
        FROM questions q JOIN events e ON e.user_id = q.user_id AND e.tokens = abs(q.tokens)
    ), matches AS (
        SELECT m.user_id, jsonb_agg(m.found ORDER BY m.question) AS found
        FROM (SELECT p.user_id, p.question,
                     jsonb_build_object(
                         'tokens', p.question, 'counted', count(*) FILTER (WHERE p.counted),
                         'counted_rows', coalesce(jsonb_agg(p.found ORDER BY p.place)
                                                  FILTER (WHERE p.counted AND p.place <= 3), '[]'),
                         'failed', count(*) FILTER (WHERE NOT p.counted),
                         'failed_rows', coalesce(jsonb_agg(p.found ORDER BY p.place)
                                                 FILTER (WHERE NOT p.counted AND p.place <= 3), '[]')) AS found
              FROM placed p GROUP BY p.user_id, p.question) m
        GROUP BY m.user_id
    ), newest AS (
        SELECT e.*, w.open
        FROM (SELECT e.*, row_number() OVER (PARTITION BY e.user_id ORDER BY e.at DESC, e.id) AS place FROM events e) e
        JOIN wanted w ON w.user_id = e.user_id AND w.open <> 0
        WHERE e.place <= 400 AND NOT EXISTS (SELECT FROM placed p WHERE p.user_id = w.user_id AND p.question = w.open)
    ), pairs AS (
        SELECT p.user_id, jsonb_agg(p.found ORDER BY p.kinds) AS found
        FROM (SELECT a.user_id, least(a.kind, b.kind) || greatest(a.kind, b.kind) AS kinds,
                     jsonb_build_object(
                         'kinds', least(a.kind, b.kind) || greatest(a.kind, b.kind), 'count', count(*),
                         'rows', (array_agg(jsonb_build_array(
                             jsonb_build_object('kind', a.kind, 'log_id', a.id, 'tokens', a.tokens, 'created_at', a.at),
                             jsonb_build_object('kind', b.kind, 'log_id', b.id, 'tokens', b.tokens, 'created_at', b.at))
                             ORDER BY a.at DESC))[1]) AS found
              FROM newest a JOIN newest b ON b.user_id = a.user_id AND b.tokens = abs(a.open) - a.tokens
                                         AND b.place > a.place
              GROUP BY a.user_id, least(a.kind, b.kind), greatest(a.kind, b.kind)) p
        GROUP BY p.user_id
    ), young AS (
        SELECT e.user_id, jsonb_build_object('count', count(*), 'tokens', sum(e.tokens)) AS found
        FROM events e WHERE e.counted AND e.at > p_at - p_min_age AND e.at <= p_at + p_min_age
        GROUP BY e.user_id
    ), carried AS (
        SELECT c.user_id, jsonb_agg(c.found) AS found
        FROM (SELECT array_agg(w.user_id) AS users, array_agg(w.window_start) AS windows FROM wanted w
              WHERE w.kind = 'window' AND w.open > 0) a,
             trueup.carried_rows(a.users, a.windows) c
        GROUP BY c.user_id
    )
    SELECT w.user_id,
           jsonb_build_object(
               'matches', coalesce(m.found, '[]'), 'pairs', coalesce(p.found, '[]'), 'young', y.found,
               'carried', coalesce(r.found, '[]'),
               'used_before', w.kind = 'window' AND w.open > 0 AND isfinite(w.window_start) AND EXISTS (
                   SELECT FROM {{usage_log}} l
                   WHERE l.{{usage_log.user_id}} = w.user_id AND l.{{usage_log.success}}
                     AND l.{{usage_log.created_at}} >= trueup.shortly_before(w.window_start) - interval '400 days'
                     AND l.{{usage_log.created_at}} < w.window_start))
    FROM wanted w
    LEFT JOIN matches m ON m.user_id = w.user_id
    LEFT JOIN pairs p ON p.user_id = w.user_id
    LEFT JOIN young y ON y.user_id = w.user_id
    LEFT JOIN carried r ON r.user_id = w.user_id
$$;
