-- All that is known of these counters, as one document each: what `trueup.drift.evidence` reads.
CREATE OR REPLACE FUNCTION trueup.drift_evidence(
    p_users {{user_id_type}}[], p_subscriptions text[], p_windows timestamptz[], p_original bigint[],
    p_consumed bigint[], p_observed bigint[], p_at timestamptz, p_min_age interval
) RETURNS TABLE (user_id {{user_id_type}}, evidence jsonb) LANGUAGE sql STABLE AS $$
    WITH known AS MATERIALIZED (
        SELECT b.user_id, b.at AS base_at, b.kind, b.written, b.seen_before, b.kept, w.window_start,
               w.original - w.consumed AS remaining, w.observed
        FROM trueup.base_points(p_users, p_subscriptions, p_windows) b
        JOIN unnest(p_users, p_windows, p_original, p_consumed, p_observed)
            AS w (user_id, window_start, original, consumed, observed) ON w.user_id = b.user_id
    ), arrays AS MATERIALIZED (
        SELECT array_agg(k.user_id) AS users, array_agg(k.base_at) AS bases, array_agg(k.window_start) AS windows,
               array_agg(k.remaining) AS remaining, array_agg(coalesce(k.observed, 0) - k.remaining) AS surplus,
               array_agg(k.kind) AS kinds
        FROM known k
    ), purchases AS (
        SELECT p.user_id, jsonb_agg(p.found ORDER BY p.at, p.id) AS found
        FROM arrays a, trueup.purchase_rows(a.users, a.bases, a.windows, p_at) p GROUP BY p.user_id
    ), late AS (
        -- Begun and dated before the counter was last right, its money and its credit may have come only since.
        SELECT k.user_id, jsonb_agg(DISTINCT p.tokens) AS found
        FROM known k CROSS JOIN LATERAL (
            SELECT p.* FROM trueup.purchases() p
            WHERE p.user_id = k.user_id AND p.at > k.window_start AND p.at < trueup.shortly_before(k.base_at)
              AND p.tokens > 0 AND NOT p.own_plan OFFSET 0) p
        WHERE NOT EXISTS (SELECT FROM trueup.token_grant g
                          WHERE g.user_id = k.user_id AND g.reference = p.reference AND g.revoked_at IS NULL)
        GROUP BY k.user_id
    ), grants AS (
        -- Those that came, went or go on from the window before: the counter need not have followed. `tokens`: what they
        -- had left when the window began, or when they ended.
        SELECT k.user_id,
               jsonb_agg(jsonb_build_object(
                   'id', g.id, 'tokens', g.rest - CASE WHEN g.ends > p_at THEN 0 ELSE coalesce(g.settled, 0) END,
                   'reference', t.reference, 'granted_at', g.begins, 'given_since', g.begins > k.base_at,
                   'ended_since', g.ends <= p_at) ORDER BY g.id) AS found
        FROM (SELECT k.* FROM known k
              WHERE EXISTS (SELECT FROM trueup.token_grant t WHERE t.user_id = k.user_id) OFFSET 0) k
        CROSS JOIN LATERAL trueup.grants_at(k.user_id, k.window_start, 0) g
        JOIN trueup.token_grant t ON t.user_id = k.user_id AND t.id = g.id
        WHERE g.begins <= p_at AND g.rest > 0
          AND (g.ends BETWEEN k.base_at AND p_at
               OR g.ends > p_at AND (g.begins > k.base_at OR k.kind = 'window'))
        GROUP BY k.user_id
    ), own AS (
        SELECT c.user_id, count(*) AS charges, sum(c.tokens_total) AS tokens,
               jsonb_agg(jsonb_build_object('id', c.log_id, 'tokens', c.tokens_total, 'at', c.charged_at)
                         ORDER BY c.charged_at) FILTER (WHERE c.place <= 3) AS found
        FROM (SELECT c.user_id, c.log_id, c.tokens_total, c.charged_at,
                     row_number() OVER (PARTITION BY c.user_id ORDER BY c.charged_at) AS place
              FROM known k JOIN trueup.charge c ON c.user_id = k.user_id AND c.charged_at >= k.base_at
              WHERE c.counter_lowered = false AND c.tokens_total > 0) c
        GROUP BY c.user_id
    ), ledger AS (
        SELECT e.user_id, e.evidence
        FROM arrays a, trueup.ledger_evidence(a.users, a.bases, a.windows, a.kinds, a.remaining, a.surplus,
                                              p_at, p_min_age) e
        WHERE trueup.decrements_mapped()
    ), sizes AS (
        SELECT e.user_id, e.evidence
        FROM arrays a, trueup.size_evidence(a.users, a.bases, a.windows, a.kinds, a.surplus, p_at, p_min_age) e
        WHERE NOT trueup.decrements_mapped()
    )
    SELECT k.user_id,
           jsonb_build_object(
               'decrements_mapped', trueup.decrements_mapped(), 'purchases_mapped', trueup.purchases_mapped(),
               'base', jsonb_build_object('at', k.base_at, 'kind', k.kind, 'written', k.written,
                                          'seen_before', k.seen_before, 'kept', k.kept),
               'purchases', coalesce(p.found, '[]'), 'grants', coalesce(g.found, '[]'),
               'credit_may_be_late', coalesce(f.found, '[]'),
               'own_missed', CASE WHEN o.charges > 0 THEN jsonb_build_object(
                   'count', o.charges, 'tokens', o.tokens, 'rows', o.found) END)
           || coalesce(l.evidence, s.evidence, '{}')
    FROM known k
    LEFT JOIN purchases p ON p.user_id = k.user_id
    LEFT JOIN grants g ON g.user_id = k.user_id
    LEFT JOIN late f ON f.user_id = k.user_id
    LEFT JOIN own o ON o.user_id = k.user_id
    LEFT JOIN ledger l ON l.user_id = k.user_id
    LEFT JOIN sizes s ON s.user_id = k.user_id
$$;
