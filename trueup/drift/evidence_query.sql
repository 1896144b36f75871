{% from "drift/base_points.sql" import base_points %}
{% from "drift/host_records.sql" import log_and_decrements, purchase_rows, shortly_before %}
{% from "drift/ledger.sql" import ledger_evidence %}
{% from "drift/purchases.sql" import purchases %}
{% from "drift/sizes.sql" import size_evidence %}

{# The rest of a statement that begins with `WITH wanted AS (…),` where `wanted` has a row for each drifted counter:
   user_id, subscription_id, window_start, original, consumed, observed. Returns user_id, evidence. `at`: the time of the
   snapshot; `min_age`: how long a decrement of usage may take. Every name is qualified where the host's tables are in
   scope: a host may have a column of any name. #}
{% macro evidence(at, min_age) -%}
{{ base_points() }}, known AS MATERIALIZED (
        SELECT b.user_id, b.at AS base_at, {{ shortly_before("b.at") if token_usage else "b.at" }} AS since, b.kind,
               b.written, b.seen_before, b.kept, w.window_start, w.original - w.consumed AS remaining,
               coalesce(w.observed, 0) - (w.original - w.consumed) AS surplus
        FROM base_points b JOIN wanted w ON w.user_id = b.user_id
    ), {{ log_and_decrements() }}, {{ purchase_rows(at) }}, {{ purchases_and_grants(at) }}, own_missed AS (
        SELECT o.user_id, count(*) AS charges, sum(o.tokens) AS tokens,
               jsonb_agg(jsonb_build_object('id', o.log_id, 'tokens', o.tokens, 'at', o.at) ORDER BY o.at)
                   FILTER (WHERE o.place <= 3) AS found
        FROM (SELECT o.*, row_number() OVER (PARTITION BY o.user_id ORDER BY o.at) AS place FROM own_charges o
              WHERE o.since_base AND o.counter_lowered = false AND o.tokens > 0) o
        GROUP BY o.user_id
    ), {{ ledger_evidence(at, min_age) if token_usage else size_evidence(at, min_age) }}
    SELECT k.user_id,
           jsonb_build_object(
               'decrements_mapped', {{ "true" if token_usage else "false" }},
               'purchases_mapped', {{ "true" if payment else "false" }},
               'base', jsonb_build_object('at', k.base_at, 'kind', k.kind, 'written', k.written,
                                          'seen_before', k.seen_before, 'kept', k.kept),
               'purchases', coalesce(p.found, '[]'), 'grants', coalesce(g.found, '[]'),
               'credit_may_be_late', coalesce(f.found, '[]'),
               'own_missed', CASE WHEN o.charges > 0 THEN jsonb_build_object(
                   'count', o.charges, 'tokens', o.tokens, 'rows', o.found) END)
           || coalesce(b.evidence, '{}') AS evidence
    FROM known k
    LEFT JOIN purchases_found p ON p.user_id = k.user_id
    LEFT JOIN grants_found g ON g.user_id = k.user_id
    LEFT JOIN late_credit f ON f.user_id = k.user_id
    LEFT JOIN own_missed o ON o.user_id = k.user_id
    LEFT JOIN book_evidence b ON b.user_id = k.user_id
{%- endmacro %}

{# `purchases_found`; `late_credit`: tokens of purchases begun and dated before the counter was last right, whose money
   and credit may have come only since; `grants_found`: grants that came, went or go on from the window before, which the
   counter need not have followed, with what they had left when the window began, or when they ended. #}
{% macro purchases_and_grants(at) %}
    purchases_found AS (
        SELECT p.user_id, jsonb_agg(p.found ORDER BY p.at, p.id) AS found FROM purchase_rows p GROUP BY p.user_id
    ), late_credit AS (
        SELECT k.user_id, jsonb_agg(DISTINCT p.tokens) AS found
        FROM known k CROSS JOIN LATERAL (
            SELECT p.* FROM ({{ purchases() }}) p
            WHERE p.user_id = k.user_id AND p.at > k.window_start AND p.at < {{ shortly_before("k.base_at") }}
              AND p.tokens > 0 AND NOT p.own_plan OFFSET 0) p
        WHERE NOT EXISTS (SELECT FROM {{ trueup.token_grant }} g
                          WHERE g.user_id = k.user_id AND g.reference = p.reference AND g.revoked_at IS NULL)
        GROUP BY k.user_id
    ), grants_found AS (
        {% if trueup.installed %}
        SELECT k.user_id,
               jsonb_agg(jsonb_build_object(
                   'id', g.id, 'tokens', g.rest - CASE WHEN g.ends > {{ at }} THEN 0 ELSE coalesce(g.settled, 0) END,
                   'reference', t.reference, 'granted_at', g.begins, 'given_since', g.begins > k.base_at,
                   'ended_since', g.ends <= {{ at }}) ORDER BY g.id) AS found
        FROM (SELECT k.* FROM known k
              WHERE EXISTS (SELECT FROM trueup.token_grant t WHERE t.user_id = k.user_id) OFFSET 0) k
        CROSS JOIN LATERAL trueup.grants_at(k.user_id, k.window_start, 0) g
        JOIN trueup.token_grant t ON t.user_id = k.user_id AND t.id = g.id
        WHERE g.begins <= {{ at }} AND g.rest > 0
          AND (g.ends BETWEEN k.base_at AND {{ at }}
               OR g.ends > {{ at }} AND (g.begins > k.base_at OR k.kind = 'window'))
        GROUP BY k.user_id
        {% else %}
        SELECT NULL::{{ user_id_type }} AS user_id, NULL::jsonb AS found WHERE false
        {% endif %}
    )
{%- endmacro %}
