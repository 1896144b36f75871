{# Since when each counter is known to have been right. #}

{# CTEs over `wanted` (user_id, subscription_id, window_start): a counter was right when it was corrected or decided
   about, or when a full run saw it and found no drift; at the latest when its window began. The last of them,
   `base_points`, has a row for each user: user_id, at, kind, and what a correction wrote (`written`) and had seen
   (`seen_before`), and what of it was for decrements in flight (`kept`). A correction that was undone counts for
   nothing. #}
{% macro base_points() %}
    past_drifts AS MATERIALIZED (
        SELECT w.user_id, w.window_start, d.id, d.run_id, d.last_run_id, d.action, d.found_at, d.written, d.observed,
               d.written - d.expected AS kept
        FROM wanted w
        JOIN {{ trueup.drift }} d ON d.user_id = w.user_id AND d.subscription_id = w.subscription_id
    ), clean_runs AS (
        -- The newest run that did not see a drift is the newest of all, or the one before a drift was first seen.
        SELECT w.user_id, r.id, r.started_at
        FROM (SELECT user_id, window_start, NULL::bigint AS before FROM wanted
              UNION ALL SELECT user_id, window_start, run_id FROM past_drifts) w
        CROSS JOIN LATERAL (
            SELECT r.id, r.started_at FROM {{ trueup.reconcile_run }} r
            WHERE r.status = 'finished' AND NOT r.dry_run AND r.only_user IS NULL
              AND (w.before IS NULL OR r.id < w.before)
            ORDER BY r.id DESC LIMIT 1) r
        WHERE r.started_at > w.window_start
          AND NOT EXISTS (SELECT FROM past_drifts d
                          WHERE d.user_id = w.user_id AND r.id BETWEEN d.run_id AND d.last_run_id)
          -- Nor does a run that could not look at this counter, or set it right.
          AND NOT EXISTS (SELECT FROM {{ trueup.defect }} f
                          WHERE f.run_id = r.id AND f.user_id = w.user_id
                            AND f.kind IN ('counter_too_slow', 'counter_refused'))
    ), right_points AS (
        SELECT user_id, window_start AS at, 'window' AS kind, NULL::bigint AS written, NULL::bigint AS seen_before,
               NULL::bigint AS kept
        FROM wanted
        UNION ALL
        SELECT user_id, started_at, 'run', NULL, NULL, NULL FROM clean_runs
        UNION ALL
        SELECT d.user_id, d.found_at, 'correction', d.written, d.observed, d.kept FROM past_drifts d
        WHERE d.action = 'corrected' AND d.found_at > d.window_start
          AND NOT EXISTS (SELECT FROM {{ trueup.drift_decision }} u
                          WHERE u.user_id = d.user_id AND u.drift_id = d.id AND u.decision = 'undo')
        UNION ALL
        SELECT w.user_id, u.decided_at, 'decision', NULL, NULL, NULL
        FROM wanted w JOIN {{ trueup.drift_decision }} u ON u.user_id = w.user_id
        WHERE u.decision IN ('accept', 'grant') AND u.decided_at > w.window_start
    ), base_points AS (
        SELECT DISTINCT ON (user_id) user_id, at, kind, written, seen_before, kept
        FROM right_points ORDER BY user_id, at DESC, kind
    )
{% endmacro %}
