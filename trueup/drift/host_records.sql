{% from "host/rows.sql" import in_range, used_since %}

{# The host's rows about drifted counters: log rows, decrements, payments, plans. The CTEs are over `known`
   (evidence_query.sql) and read by user and time, so that only rows of drifted users are read. OFFSET 0 keeps the
   planner from reading a whole table, however many users it expects. #}

{# The largest value that the counter's column can hold. #}
{% macro counter_limit() -%}
SELECT CASE format_type(a.atttypid, NULL)
               WHEN 'smallint' THEN 32767 WHEN 'integer' THEN 2147483647 ELSE 9223372036854775807 END
    FROM pg_attribute a
    WHERE a.attrelid = CAST({{ subscription | literal }} AS regclass)
      AND '"' || replace(a.attname, '"', '""') || '"' = {{ subscription.tokens_remaining | literal }}
{%- endmacro %}

{# The tokens that plans include (`size`): a drift of such a size may be a purchase. #}
{% macro plan_sizes() -%}
SELECT p.{{ token_plan.tokens_included }}::bigint AS size FROM {{ token_plan }} p
    WHERE p.{{ token_plan.tokens_included }} > 0
    UNION
    SELECT p.{{ full_plan.tokens_included }}::bigint FROM {{ full_plan }} p WHERE p.{{ full_plan.tokens_included }} > 0
{%- endmacro %}

{# The completed payments: user_id, id, reference, at, tokens, own_plan, kind, ends; none if payments are not mapped.
   `reference`: the name that a grant made from this payment has. `tokens`: of the plan that was bought, 0 without one.
   `own_plan`: it is the subscription's present plan. `ends`: when a plan with a duration ends; null: never. #}
{% macro purchases() -%}
{% if payment %}
SELECT p.{{ payment.user_id }} AS user_id, p.{{ payment.id }}::text AS id,
           coalesce(nullif(p.{{ payment.transaction_id }}::text, ''), p.{{ payment.id }}::text) AS reference,
           p.{{ payment.payment_date }}::timestamptz AS at,
           greatest(coalesce(tp.{{ token_plan.tokens_included }}, fp.{{ full_plan.tokens_included }}, 0), 0)::bigint
               AS tokens,
           CASE WHEN {{ payment.token_plan_id("p") }} IS NOT NULL
                THEN coalesce({{ payment.token_plan_id("p") }} = {{ subscription.token_plan_id("s") }}, false)
                ELSE {% if not subscription.adds_plans %}{{ subscription.token_plan_id("s") }} IS NULL
                     AND {% endif %}coalesce({{ payment.full_plan_id("p") }} = {{ subscription.full_plan_id("s") }}, false)
           END AS own_plan,
           CASE WHEN {{ payment.token_plan_id("p") }} IS NOT NULL THEN 'token plan'
                WHEN {{ payment.full_plan_id("p") }} IS NOT NULL THEN 'full plan' ELSE 'no plan' END AS kind,
           CASE WHEN {{ payment.token_plan_id("p") }} IS NULL
                THEN p.{{ payment.payment_date }}::timestamptz
                     + make_interval(days => {{ full_plan.duration_days("fp") }}::int) END AS ends
    FROM {{ payment }} p
    LEFT JOIN {{ subscription }} s ON s.{{ subscription.user_id }} = p.{{ payment.user_id }}
    LEFT JOIN {{ token_plan }} tp ON tp.{{ token_plan.id }} = {{ payment.token_plan_id("p") }}
    LEFT JOIN {{ full_plan }} fp ON fp.{{ full_plan.id }} = {{ payment.full_plan_id("p") }}
    WHERE p.{{ payment.status }}::text = {{ payment.completed_status | literal }}
{%- else %}
SELECT NULL::{{ user_id_type }} AS user_id, NULL::text AS id, NULL::text AS reference, NULL::timestamptz AS at,
           NULL::bigint AS tokens, NULL::boolean AS own_plan, NULL::text AS kind, NULL::timestamptz AS ends
    WHERE false
{%- endif %}
{%- endmacro %}

{# Whether the purchase `p` is a pack: a token plan other than the subscription's, bought in the window. An earlier
   payment opened the window. #}
{% macro is_pack(p, window) -%}
{{ p }}.kind = 'token plan' AND NOT {{ p }}.own_plan AND {{ p }}.tokens > 0
      AND {{ p }}.at > {{ window }} + interval '5 minutes'
{%- endmacro %}

{# Ten minutes before a time: rows of one size that are at most so far apart belong together. (The earliest times that
   PostgreSQL has can't be lowered.) #}
{% macro shortly_before(at) -%}
CASE WHEN {{ at }} < '0001-01-03' THEN '-infinity'::timestamptz ELSE {{ at }} - interval '10 minutes' END
{%- endmacro %}

{# The host's decrement rows: user_id, id, tokens, at. `described`: also `description`, at most 100 characters; empty if
   the host has no such column. The column may be missing although the mapping names it: then the name means
   `absent`'s. #}
{% macro decrements(described=false) -%}
{% if token_usage and described %}
SELECT s.{{ subscription.user_id }} AS user_id, t.id, t.tokens, t.at, t.description
        FROM {{ subscription }} s
        CROSS JOIN LATERAL (
            SELECT t.*
            FROM (SELECT NULL::text AS {{ token_usage.description }}) absent
            CROSS JOIN LATERAL (
                SELECT t.{{ token_usage.id }}::text AS id, t.{{ token_usage.used_tokens }}::bigint AS tokens,
                       t.{{ token_usage.usage_date }}::timestamptz AS at,
                       left(coalesce({{ token_usage.description }}::text, ''), 100) AS description
                FROM {{ token_usage }} t
                WHERE t.{{ token_usage.subscription_id }} = s.{{ subscription.id }}) t) t
{%- elif token_usage %}
SELECT s.{{ subscription.user_id }} AS user_id, t.{{ token_usage.id }}::text AS id,
               t.{{ token_usage.used_tokens }}::bigint AS tokens, t.{{ token_usage.usage_date }}::timestamptz AS at
        FROM {{ subscription }} s
        JOIN {{ token_usage }} t ON t.{{ token_usage.subscription_id }} = s.{{ subscription.id }}
{%- else %}
SELECT NULL::{{ user_id_type }} AS user_id, NULL::text AS id, NULL::bigint AS tokens, NULL::timestamptz AS at,
               NULL::text AS description
        WHERE false
{%- endif %}
{%- endmacro %}

{# `own_charges`: trueup's charges since `known.since`. `log_rows`: the host's log rows since then; kind L counts, F
   does not (failed, or not known). `decrement_rows`: the decrements since then, kind D. #}
{% macro log_and_decrements() %}
    own_charges AS MATERIALIZED (
        SELECT c.user_id, c.log_id, c.tokens_total AS tokens, c.charged_at AS at, c.counter_lowered,
               c.charged_at >= k.base_at AS since_base
        FROM known k JOIN {{ trueup.charge }} c ON c.user_id = k.user_id AND c.charged_at >= k.since
        {% if usage_log.is_written_by_host %}
        -- The other calls have a row and a decrement of the host's.
        WHERE c.counter_lowered = false
        {% endif %}
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

{# `purchase_rows`: each user's newest twelve purchases since shortly before the base point, and grants since then
   without such a payment (kind "grant"): the host may have raised the counter for these too. `granted`: a grant covers
   it. `settled`: before the base point. `opened_window`: of the purchases of the subscription's own plan, this one is
   nearest to the beginning of the period. #}
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

{# `carried`: the tokens that an upgrade may have kept of the previous period: up to three earlier payments, and the
   tokens used and subtracted from each one to the period's beginning. `ran_out`: that plan had ended before.
   `same_plan`: it is the present plan. Without an earlier payment (a trial), `tokens` is null: unknown. `rows`: the CTE
   with the users, as `w`, of whom those count for whom `condition` is true. #}
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
