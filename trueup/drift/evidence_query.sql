{% from "drift/host_records.sql" import log_and_decrements, purchase_rows, purchases, shortly_before %}
{% from "drift/ledger.sql" import ledger_evidence %}
{% from "drift/period_reset.sql" import period_reset %}
{% from "drift/sizes.sql" import size_evidence %}

{# The rest of a statement that begins with `WITH wanted AS (…),`. `wanted` has a row for each drifted counter: user_id,
   subscription_id, window_start, original, consumed, observed. Returns user_id, evidence. `at`: the time of the
   snapshot; `min_age`: how long a decrement may take. Names are qualified wherever the host's tables are in scope,
   because a host may have a column of any name. #}
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
           {% if subscription.anchor %}
           || jsonb_build_object('reset', r.found)
           {% endif %}
           || coalesce(b.evidence, '{}') AS evidence
    FROM known k
    LEFT JOIN purchases_found p ON p.user_id = k.user_id
    LEFT JOIN grants_found g ON g.user_id = k.user_id
    LEFT JOIN late_credit f ON f.user_id = k.user_id
    LEFT JOIN own_missed o ON o.user_id = k.user_id
    LEFT JOIN book_evidence b ON b.user_id = k.user_id
    {% if subscription.anchor %}
    LEFT JOIN LATERAL ({{ period_reset("k") }}) r ON true
    {% endif %}
{%- endmacro %}

{# `purchases_found`. `late_credit`: tokens of purchases from before the base point that the host may have credited
   after it. `grants_found`: grants that began or ended since the base point, or continue from the previous period, so
   the counter may not show them; with the tokens that they had left when the period began, or when they ended. #}
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

{# When each counter was last known to be right: at a correction, a person's decision, a full run that found no drift,
   or the beginning of its period. CTEs over `wanted` (user_id, subscription_id, window_start). The last one,
   `base_points`, has a row for each user: user_id, at, kind and, for a correction, the new value (`written`), the old
   one (`seen_before`), and the tokens left for decrements in flight (`kept`). A run compared the counter between `at`,
   when it began, and `ended`. An undone correction does not count. #}
{% macro base_points() %}
    past_drifts AS MATERIALIZED (
        SELECT w.user_id, w.window_start, d.id, d.run_id, d.last_run_id, d.action, d.found_at, d.written, d.observed,
               d.written - d.expected AS kept
        FROM wanted w
        JOIN {{ trueup.drift }} d ON d.user_id = w.user_id AND d.subscription_id = w.subscription_id
    ), clean_runs AS (
        -- The newest run without a drift of this counter: the newest run of all, or the one before a drift was first
        -- found.
        SELECT w.user_id, r.id, r.started_at, r.finished_at
        FROM (SELECT user_id, window_start, NULL::bigint AS before FROM wanted
              UNION ALL SELECT user_id, window_start, run_id FROM past_drifts) w
        CROSS JOIN LATERAL (
            SELECT r.id, r.started_at, r.finished_at FROM {{ trueup.reconcile_run }} r
            WHERE r.status = 'finished' AND NOT r.dry_run AND r.only_user IS NULL
              AND (w.before IS NULL OR r.id < w.before)
            ORDER BY r.id DESC LIMIT 1) r
        WHERE r.started_at > w.window_start
          AND NOT EXISTS (SELECT FROM past_drifts d
                          WHERE d.user_id = w.user_id AND r.id BETWEEN d.run_id AND d.last_run_id)
          -- A run that could not compare or correct this counter does not count.
          AND NOT EXISTS (SELECT FROM {{ trueup.defect }} f
                          WHERE f.run_id = r.id AND f.user_id = w.user_id
                            AND f.kind IN ('counter_too_slow', 'counter_refused'))
    ), right_points AS (
        SELECT user_id, window_start AS at, 'window' AS kind, NULL::bigint AS written, NULL::bigint AS seen_before,
               NULL::bigint AS kept, NULL::timestamptz AS ended
        FROM wanted
        UNION ALL
        SELECT user_id, started_at, 'run', NULL, NULL, NULL, finished_at FROM clean_runs
        UNION ALL
        SELECT d.user_id, d.found_at, 'correction', d.written, d.observed, d.kept, NULL FROM past_drifts d
        WHERE d.action = 'corrected' AND d.found_at > d.window_start
          AND NOT EXISTS (SELECT FROM {{ trueup.drift_decision }} u
                          WHERE u.user_id = d.user_id AND u.drift_id = d.id AND u.decision = 'undo')
        UNION ALL
        SELECT w.user_id, u.decided_at, 'decision', NULL, NULL, NULL, NULL
        FROM wanted w JOIN {{ trueup.drift_decision }} u ON u.user_id = w.user_id
        WHERE u.decision IN ('accept', 'grant') AND u.component IS NULL AND u.decided_at > w.window_start
    ), base_points AS (
        SELECT DISTINCT ON (user_id) user_id, at, kind, written, seen_before, kept, ended
        FROM right_points ORDER BY user_id, at DESC, kind
    )
{% endmacro %}
