{% from "drift/concurrency.sql" import concurrency %}
{% from "drift/host_records.sql" import carried %}

{# Evidence for a host with decrement rows: log and decrements record the same usage, so a row without a match in the
   other table shows which usage drifted, and when. CTEs over those of evidence_query.sql. #}

{# One document for each user, in `book_evidence`:
     parts        rows without a match, by class: `missed` (more log rows than decrements), `double` (more
                  decrements than log rows), `failed` (only a failed log row), `unlogged` (no log row), `mixed` (failed
                  and counted rows); at most four samples of each, and how many there are
     edges        groups of rows near the base point, or so recent that a match may still arrive, row by row
     concurrent   see concurrency.sql
     overwriting  the first decrement between the comparison of the last correction and two seconds after its write: its
                  request may have read the counter before
     segments     the counter replayed from purchase to purchase: its `change`, its `lowest` value, and the newest
                  twelve decrements
     carried      tokens that may have been kept of the previous period #}
{% macro ledger_evidence(at, min_age) -%}
{{ clusters(at, min_age) }}, {{ parts_and_edges() }}, {{ totals(at) }}, {{ changes() }}, {{ concurrency() }},
    {{ segments() }}, {{ carried("totals", "w.kind = 'window' AND w.surplus > w.difference") }}, book_evidence AS (
        SELECT t.user_id,
               jsonb_build_object(
                   'logged_rows', t.logged_rows, 'lowered_rows', t.lowered_rows, 'start', t.start,
                   'parts', coalesce(p.found, '[]'), 'edges', coalesce(e.found, '[]'),
                   'concurrent', coalesce(c.found, '[]'), 'overwriting', o.found,
                   'segments', coalesce(s.found, '[]'), 'carried', coalesce(r.found, '[]')) AS evidence
        FROM totals t
        LEFT JOIN parts p ON p.user_id = t.user_id
        LEFT JOIN edges e ON e.user_id = t.user_id
        LEFT JOIN concurrent c ON c.user_id = t.user_id
        LEFT JOIN overwriting o ON o.user_id = t.user_id
        LEFT JOIN segments s ON s.user_id = t.user_id
        LEFT JOIN carried r ON r.user_id = t.user_id
    )
{%- endmacro %}

{# `events`: log rows and decrements. `settled`: before the base point. `young`: the match may still arrive. `clusters`:
   rows of one user and size at most ten minutes apart, if log and decrements differ: how many of each kind, and the
   first sixty. #}
{% macro clusters(at, min_age) %}
    events AS MATERIALIZED (
        SELECT b.user_id, b.kind, b.id, b.tokens, b.at, b.at < b.base_at AS settled,
               b.at > {{ at }} - {{ min_age }} AND b.at <= {{ at }} + {{ min_age }} AS young
        FROM (SELECT * FROM log_rows UNION ALL SELECT * FROM decrement_rows) b
    ), differing AS (
        -- Sizes with as many decrements as log rows at about the same times have no drift and are left out.
        SELECT e.user_id, e.tokens FROM events e WHERE e.kind <> 'F'
        GROUP BY e.user_id, e.tokens
        HAVING count(*) FILTER (WHERE e.kind = 'L') <> count(*) FILTER (WHERE e.kind = 'D')
            OR count(*) FILTER (WHERE e.kind = 'L' AND NOT e.settled)
               <> count(*) FILTER (WHERE e.kind = 'D' AND NOT e.settled)
            OR abs(sum(CASE e.kind WHEN 'L' THEN -1 ELSE 1 END * extract(epoch FROM e.at)::float8)) > 600
    ), opened AS (
        SELECT e.*, (e.at > least(lag(e.at) OVER w, '9999-12-31'::timestamptz) + interval '10 minutes')::int AS opens
        FROM events e JOIN differing s ON s.user_id = e.user_id AND s.tokens = e.tokens
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
    )
{%- endmacro %}

{# `parts` and `edges` of the document, from the clusters. #}
{% macro parts_and_edges() %}
    named AS (
        SELECT c.*, CASE WHEN c.surplus > 0 THEN 'missed' WHEN c.l = 0 AND c.f = 0 THEN 'unlogged'
                         WHEN c.l = 0 AND -c.surplus <= c.f THEN 'failed' WHEN c.f = 0 THEN 'double' ELSE 'mixed' END AS class,
               sum(c.l + c.f) OVER (PARTITION BY c.user_id, c.tokens) AS logged
        FROM clusters c WHERE NOT c.edge
    ), netted AS (
        -- A decrement within a day is late, and no drift: it matches the log row that lacked one.
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
        -- Groups with a row since the base point have their own, larger limit: such a row may be the only evidence.
        SELECT c.user_id,
               jsonb_agg(jsonb_build_object('tokens', c.tokens, 'rows', c.found) ORDER BY c.since, c.first_at) AS found
        FROM (SELECT c.*, row_number() OVER (PARTITION BY c.user_id, c.since ORDER BY c.first_at DESC) AS place
              FROM clusters c WHERE c.edge AND c.l + c.f + c.d <= 60) c
        WHERE c.place <= CASE WHEN c.since THEN 40 ELSE 8 END GROUP BY c.user_id
    )
{%- endmacro %}

{# `totals`: tokens logged and subtracted since the base point. `start`: the counter at the base point. `lowered`: all
   decrements, trueup's charges included. `difference`: the part of the drift that the host's log and decrements
   explain. #}
{% macro totals(at) %}
    totals AS MATERIALIZED (
        SELECT k.user_id, k.base_at, k.window_start, k.kind, k.surplus, t.logged_rows, t.lowered_rows,
               t.logged - t.lowered AS difference,
               greatest(k.remaining + t.logged + coalesce(o.tokens, 0) - coalesce(g.tokens, 0), 0) AS start,
               t.lowered + coalesce(o.tokens, 0) AS lowered
        FROM known k
        JOIN (SELECT k.user_id, count(e.user_id) FILTER (WHERE e.kind = 'L') AS logged_rows,
                     count(e.user_id) FILTER (WHERE e.kind = 'D') AS lowered_rows,
                     coalesce(sum(e.tokens) FILTER (WHERE e.kind = 'L'), 0) AS logged,
                     coalesce(sum(e.tokens) FILTER (WHERE e.kind = 'D'), 0) AS lowered
              FROM known k LEFT JOIN events e ON e.user_id = k.user_id AND NOT e.settled
              GROUP BY k.user_id) t ON t.user_id = k.user_id
        LEFT JOIN (SELECT c.user_id, sum(c.tokens) AS tokens FROM own_charges c WHERE c.since_base
                   GROUP BY c.user_id) o ON o.user_id = k.user_id
        LEFT JOIN (SELECT g.user_id, sum(g.tokens) AS tokens
                   FROM known k
                   JOIN {{ trueup.token_grant }} g ON g.user_id = k.user_id AND g.granted_at > k.base_at
                   WHERE g.revoked_at IS NULL AND (g.expires_at > {{ at }}) IS NOT FALSE
                   GROUP BY g.user_id) g ON g.user_id = k.user_id
    )
{%- endmacro %}

{# `changes`: all decrements since the base point, of users whose drift the log and decrements do not explain
   completely. `overwriting` of the document. #}
{% macro changes() %}
    changes AS MATERIALIZED (
        SELECT c.user_id, c.id, c.tokens, c.at, c.own
        FROM (SELECT e.user_id, e.id, e.tokens, e.at, false AS own FROM events e WHERE e.kind = 'D' AND NOT e.settled
              UNION ALL
              SELECT o.user_id, o.log_id, o.tokens, o.at, true FROM own_charges o
              WHERE o.since_base AND o.counter_lowered IS NOT FALSE AND o.tokens > 0) c
        JOIN totals t ON t.user_id = c.user_id AND t.surplus <> t.difference
    ), overwriting AS (
        SELECT DISTINCT ON (c.user_id) c.user_id, jsonb_build_object('id', c.id, 'tokens', c.tokens, 'at', c.at) AS found
        FROM changes c
        JOIN totals t ON t.user_id = c.user_id AND t.kind = 'correction'
        JOIN {{ trueup.drift }} d ON d.user_id = t.user_id AND d.found_at = t.base_at AND d.action = 'corrected'
        WHERE NOT c.own AND c.at <= coalesce(CAST(d.evidence ->> 'written_at' AS timestamptz), d.found_at)
                                    + interval '2 seconds'
        ORDER BY c.user_id, c.at, c.id
    )
{%- endmacro %}

{# `segments` of the document, of users whose counter must have reached zero in between. #}
{% macro segments() %}
    path AS (
        SELECT s.*, sum(s.change) OVER (PARTITION BY s.user_id, s.segment ORDER BY s.at, s.id) AS height
        FROM (SELECT s.*, count(*) FILTER (WHERE s.change IS NULL)
                              OVER (PARTITION BY s.user_id ORDER BY s.at, s.id) AS segment
              FROM (SELECT c.user_id, c.id, -c.tokens AS change, c.at FROM changes c
                    JOIN totals t ON t.user_id = c.user_id AND t.lowered > t.start
                    UNION ALL
                    SELECT p.user_id, p.id, NULL, p.at FROM purchase_rows p
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
    )
{%- endmacro %}
