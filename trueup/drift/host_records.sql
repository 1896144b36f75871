{% from "drift/purchases.sql" import purchases %}
{% from "host/rows.sql" import in_range, is_counted, used_since %}

{# The rows that tell of drifted counters: CTEs over `known` (evidence.sql), each read by user and time, so that only
   rows of drifted users are read. OFFSET 0 keeps the planner from reading a whole table at once, however many users it
   expects. #}

{# Ten minutes before a time: rows of one size that are no further apart belong together. (Times before any calendar's
   have no minutes before them.) #}
{% macro shortly_before(at) -%}
CASE WHEN {{ at }} < '0001-01-03' THEN '-infinity'::timestamptz ELSE {{ at }} - interval '10 minutes' END
{%- endmacro %}

{# The host's rows of its decrements, one for each time that it lowered a counter: user_id, id, tokens, at. #}
{% macro decrements() -%}
{% if token_usage %}
SELECT s.{{ subscription.user_id }} AS user_id, t.{{ token_usage.id }}::text AS id,
               t.{{ token_usage.used_tokens }}::bigint AS tokens, t.{{ token_usage.usage_date }}::timestamptz AS at
        FROM {{ subscription }} s
        JOIN {{ token_usage }} t ON t.{{ token_usage.subscription_id }} = s.{{ subscription.id }}
{%- else %}
SELECT NULL::{{ user_id_type }} AS user_id, NULL::text AS id, NULL::bigint AS tokens, NULL::timestamptz AS at WHERE false
{%- endif %}
{%- endmacro %}

{# `own_charges`: trueup's charges since `known.since`. `log_rows`: the log rows since then but those of these charges;
   kind L counts, F does not (failed, or not known). `decrement_rows`: the decrements since then, kind D. #}
{% macro log_and_decrements() %}
    own_charges AS MATERIALIZED (
        SELECT c.user_id, c.log_id, c.tokens_total AS tokens, c.charged_at AS at, c.counter_lowered,
               c.charged_at >= k.base_at AS since_base
        FROM known k JOIN {{ trueup.charge }} c ON c.user_id = k.user_id AND c.charged_at >= k.since
    ), log_rows AS (
        SELECT k.user_id, k.base_at, CASE WHEN l.success THEN 'L' ELSE 'F' END AS kind, l.id, l.tokens, l.at
        FROM known k
        CROSS JOIN LATERAL (
            SELECT l.{{ usage_log.id }}::text AS id, {{ in_range("l." ~ usage_log.total_tokens) }}::bigint AS tokens,
                   l.{{ usage_log.created_at }}::timestamptz AS at, {{ usage_log.success("l") }} AS success
            FROM {{ usage_log }} l
            WHERE l.{{ usage_log.user_id }} = k.user_id AND l.{{ usage_log.created_at }} >= k.since
              AND l.{{ usage_log.total_tokens }} <> 0
            OFFSET 0) l
        WHERE NOT EXISTS (SELECT FROM own_charges o WHERE o.user_id = k.user_id AND o.log_id = l.id)
    ), decrement_rows AS (
        SELECT k.user_id, k.base_at, 'D' AS kind, t.id, t.tokens, t.at
        FROM known k
        CROSS JOIN LATERAL (
            SELECT d.id, d.tokens, d.at FROM ({{ decrements() }}) d
            WHERE d.user_id = k.user_id AND d.at >= k.since AND d.tokens <> 0
            OFFSET 0) t
    )
{%- endmacro %}

{# `purchase_rows`: what was paid for since shortly before the base points, the newest twelve of each user; and what was
   granted since without a payment in sight (kind "grant"), for a host may have raised the counter by that as well.
   `granted`: a grant was made of it. `settled`: before the base point. `opened_window`: it is the subscription's own
   plan, and of those the one bought nearest to when the window began. #}
{% macro purchase_rows(at) %}
    purchase_rows AS (
        SELECT p.user_id, p.id, p.tokens, p.at, p.granted,
               jsonb_build_object(
                   'id', p.id, 'reference', p.reference, 'tokens', p.tokens, 'at', p.at, 'kind', p.kind,
                   'own_plan', p.own_plan, 'granted', p.granted, 'settled', p.settled,
                   'opened_window', p.near_window AND p.nearest = 1) AS found
        FROM (
            SELECT k.user_id, p.id, p.reference, p.at, p.tokens, p.own_plan, p.kind, p.granted, p.at < k.base_at AS settled,
                   p.own_plan AND p.at <= least(k.window_start, '9999-12-31'::timestamptz) + interval '5 minutes'
                       AS near_window,
                   row_number() OVER (
                       PARTITION BY k.user_id, p.own_plan
                       ORDER BY abs(extract(epoch FROM p.at) - extract(epoch FROM k.window_start)), p.id) AS nearest
            FROM known k
            CROSS JOIN LATERAL (
                (SELECT p.id, p.reference, p.at, p.tokens, p.own_plan, p.kind,
                        EXISTS (SELECT FROM {{ trueup.token_grant }} g
                                WHERE g.user_id = k.user_id AND g.reference = p.reference
                                  AND g.revoked_at IS NULL) AS granted
                 FROM ({{ purchases() }}) p
                 WHERE p.user_id = k.user_id AND p.at >= {{ shortly_before("k.base_at") }} AND p.at <= {{ at }}
                   AND p.tokens > 0
                 ORDER BY p.at DESC LIMIT 12)
                UNION ALL
                (SELECT g.id::text, coalesce(g.reference, ''), g.granted_at, g.tokens, false, 'grant', true
                 FROM {{ trueup.token_grant }} g
                 WHERE g.user_id = k.user_id AND g.granted_at > k.base_at AND g.granted_at <= {{ at }}
                   AND g.revoked_at IS NULL AND (g.expires_at > {{ at }}) IS NOT FALSE
                   AND NOT EXISTS (SELECT FROM ({{ purchases() }}) p
                                   WHERE p.user_id = k.user_id AND p.reference = g.reference
                                     AND p.at >= {{ shortly_before("k.base_at") }} AND p.at <= {{ at }})
                 ORDER BY g.granted_at DESC LIMIT 12)) p) p
    )
{%- endmacro %}

{# `carried`: what may have been left of the window before, where an upgrade began this one: the payments up to three
   back, and what was used and what was subtracted from there to the window's beginning. `ran_out`: the plan that was
   bought then had ended before. `same_plan`: it is the one of now. Without an earlier payment (a trial), `tokens` is
   null: what was given is unknown. `rows`: the CTE whose users are asked about, its rows called `w`, where `condition`
   holds. #}
{% macro carried(rows, condition) %}
    carried_rows AS (
        SELECT w.user_id, f.place,
               jsonb_build_object('since', f.since, 'tokens', f.tokens, 'used', u.tokens, 'lowered', t.lowered,
                                  'payment', f.id, 'upgrade', n.found, 'place', f.place,
                                  'ran_out', coalesce(f.ends < w.window_start, false), 'same_plan', f.own_plan) AS found
        FROM {{ rows }} w
        CROSS JOIN LATERAL (
            SELECT jsonb_build_object('id', p.id, 'tokens', p.tokens, 'at', p.at) AS found, p.at
            FROM ({{ purchases() }}) p
            WHERE p.user_id = w.user_id AND p.at BETWEEN w.window_start - interval '5 minutes'
                                                     AND w.window_start + interval '5 minutes'
            ORDER BY p.own_plan DESC, p.at LIMIT 1) n
        CROSS JOIN LATERAL (
            (SELECT p.id, p.at AS since, sum(p.tokens) OVER (ORDER BY p.at DESC, p.id DESC) AS tokens, p.ends, p.own_plan,
                    row_number() OVER (ORDER BY p.at DESC, p.id DESC) AS place
             FROM ({{ purchases() }}) p
             WHERE p.user_id = w.user_id AND p.at < w.window_start - interval '5 minutes'
             ORDER BY p.at DESC, p.id DESC LIMIT 3)
            UNION ALL
            SELECT NULL, w.window_start - interval '400 days', NULL, NULL, false, 1
            WHERE NOT EXISTS (SELECT FROM ({{ purchases() }}) p
                              WHERE p.user_id = w.user_id AND p.at < w.window_start - interval '5 minutes')) f
        CROSS JOIN LATERAL ({{ used_since("w.user_id", "f.since", until="w.window_start") }} OFFSET 0) u
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(d.tokens), 0) AS lowered FROM ({{ decrements() }}) d
            WHERE d.user_id = w.user_id AND d.at >= f.since AND d.at < w.window_start
            OFFSET 0) t
        WHERE {{ condition }} AND isfinite(w.window_start) AND (f.tokens IS NOT NULL OR u.tokens > 0)
    ), carried AS (
        SELECT c.user_id, jsonb_agg(c.found ORDER BY c.place) AS found FROM carried_rows c GROUP BY c.user_id
    )
{%- endmacro %}
