{% from "drift/host_records.sql" import carried, plan_sizes, shortly_before %}
{% from "host/rows.sql" import is_counted %}

{# Evidence for a host without decrement rows: log rows of the drift's size, or of its size without a purchase. Sizes
   are a weaker proof than rows; see explain_by_amounts.py. CTEs over those of evidence_query.sql. #}

{# One document for each user, in `book_evidence`:
     matches      log rows that have one of the sizes in question, counted and failed ones, the newest three of each
     pairs        if no single row matches: how many pairs of the newest 400 rows add up to the drift, by kind, and
                  one pair
     young        counted rows whose decrement may still arrive
     used_before  the user has usage before this period
     carried      tokens that may have been kept of the previous period #}
{% macro size_evidence(at, min_age) -%}
{{ matches() }}, {{ pairs() }}, {{ carried("unsolved", "w.kind = 'window' AND w.open > 0") }}, young AS (
        SELECT e.user_id, jsonb_build_object('count', count(*), 'tokens', sum(e.tokens)) AS found
        FROM events e WHERE e.counted AND e.at > {{ at }} - {{ min_age }} AND e.at <= {{ at }} + {{ min_age }}
        GROUP BY e.user_id
    ), book_evidence AS (
        SELECT w.user_id,
               jsonb_build_object(
                   'matches', coalesce(m.found, '[]'), 'pairs', coalesce(p.found, '[]'), 'young', y.found,
                   'carried', coalesce(r.found, '[]'),
                   'used_before', w.kind = 'window' AND w.open > 0 AND isfinite(w.window_start) AND EXISTS (
                       SELECT FROM {{ usage_log }} l
                       WHERE {{ is_counted("l", "w.user_id", shortly_before("w.window_start") ~ " - interval '400 days'") }}
                         AND l.{{ usage_log.created_at }} < w.window_start)) AS evidence
        FROM unsolved w
        LEFT JOIN matches m ON m.user_id = w.user_id
        LEFT JOIN pairs p ON p.user_id = w.user_id
        LEFT JOIN young y ON y.user_id = w.user_id
        LEFT JOIN carried r ON r.user_id = w.user_id
    )
{%- endmacro %}

{# `unsolved`: each drift without trueup's charges that did not lower the counter (`open`). `events`: the log rows since
   the base point. `questions`: the sizes in question. `matches` of the document. #}
{% macro matches() %}
    unsolved AS MATERIALIZED (
        SELECT k.user_id, k.base_at, k.window_start, k.kind, k.surplus - coalesce(o.tokens, 0) AS open
        FROM known k
        LEFT JOIN (SELECT c.user_id, sum(c.tokens) AS tokens FROM own_charges c
                   WHERE c.since_base AND c.counter_lowered = false GROUP BY c.user_id) o ON o.user_id = k.user_id
    ), events AS MATERIALIZED (
        SELECT e.*, e.kind = 'L' AS counted FROM log_rows e
    ), questions AS (
        SELECT w.user_id, w.open AS tokens FROM unsolved w
        UNION
        SELECT w.user_id, w.open - p.tokens FROM purchase_rows p JOIN unsolved w ON w.user_id = p.user_id
        WHERE NOT p.granted
        {% if not payment %}
        UNION
        SELECT w.user_id, w.open - s.size FROM unsolved w, ({{ plan_sizes() }}) AS s WHERE w.open >= s.size
        {% endif %}
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
    )
{%- endmacro %}

{# `pairs` of the document. #}
{% macro pairs() %}
    newest AS (
        SELECT e.*, w.open
        FROM (SELECT e.*, row_number() OVER (PARTITION BY e.user_id ORDER BY e.at DESC, e.id) AS place FROM events e) e
        JOIN unsolved w ON w.user_id = e.user_id AND w.open <> 0
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
    )
{%- endmacro %}
