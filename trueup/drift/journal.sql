{% from "drift/evidence_query.sql" import base_points %}
{% from "drift/host_records.sql" import decrements, purchases %}
{% from "host/rows.sql" import in_range %}
-- The journal, read for the causes of drift, and its pruning.

{# So many entries, and so many log rows, are read for one counter at most. Rows alone explain a longer story. #}
{% set most = 20000 %}

{# `anchors`: the last point of each wanted counter that is known, as base_points() or as the newest drift row says it:
   `kind`, `at`, `ended` (of a run), `position` (the last entry then), `seen` (that row). `since`: the time from which
   the story is read; rows and entries shortly before the anchor belong to each other. #}
{% macro anchors() %}
    newest AS (
        SELECT w.user_id, d.found_at, jsonb_build_object(
                   'id', d.id, 'action', d.action, 'observed', d.observed, 'written', d.written, 'evidence', d.evidence) AS row,
               (d.evidence -> 'journal' ->> 'at')::timestamptz AS at,
               (d.evidence -> 'journal' ->> 'position')::bigint AS position
        FROM wanted w
        CROSS JOIN LATERAL (
            SELECT n.* FROM trueup.drift n WHERE n.user_id = w.user_id AND n.subscription_id = w.subscription_id
            ORDER BY n.id DESC LIMIT 1) d
        WHERE d.evidence ? 'journal' AND d.found_at > w.window_start
          AND NOT EXISTS (SELECT FROM trueup.drift_decision c
                          WHERE c.user_id = w.user_id AND c.drift_id = d.id AND c.component IS NULL
                            AND c.decision <> 'ignore')
    ), anchors AS MATERIALIZED (
        SELECT w.user_id, w.subscription_id, w.window_start, a.kind, a.at, b.ended, a.position, a.seen, j.since AS journal_since,
               greatest(CASE WHEN a.kind = 'window' THEN {{ "a.at" if subscription.anchor else "'-infinity'" }}
                             ELSE a.at - interval '10 minutes' END, j.since) AS since
        FROM wanted w
        CROSS JOIN (SELECT trueup.journal_since() AS since) j
        JOIN base_points b ON b.user_id = w.user_id
        LEFT JOIN newest n ON n.user_id = w.user_id AND n.found_at >= b.at
        CROSS JOIN LATERAL (
            SELECT CASE WHEN n.at IS NULL THEN b.kind ELSE 'drift' END AS kind, coalesce(n.at, b.at) AS at, n.position,
                   n.row AS seen) a
        WHERE j.since IS NOT NULL
    )
{% endmacro %}

-- The journal's entries of a counter since that time, and the sizes of the plans that they name.
CREATE OR REPLACE FUNCTION trueup.story_entries(
    p_user {{ user_id_type }}, p_subscription text, p_since timestamptz, OUT found jsonb, OUT plans jsonb
) LANGUAGE sql STABLE AS $$
    WITH entries AS MATERIALIZED (
        SELECT e.*, concat_ws('/', coalesce(e.token_plan_id, ''), coalesce(e.full_plan_id, '')) AS plan
        FROM trueup.counter_entry e
        WHERE e.user_id = p_user AND e.subscription_id = p_subscription AND e.at >= p_since
        ORDER BY e.at LIMIT {{ most }}
    )
    SELECT (SELECT jsonb_agg(jsonb_build_array(
                       e.id, coalesce(e.old_counter, 0), coalesce(e.new_counter, 0), extract(epoch FROM e.at), e.kind,
                       e.window_start, e.plan, e.transaction_id::text::bigint, e.application_name, e.written_by) ORDER BY e.id)
            FROM entries e),
           (SELECT jsonb_object_agg(d.plan, trueup.plan_size(d.token_plan_id, d.full_plan_id))
            FROM (SELECT DISTINCT e.plan, e.token_plan_id, e.full_plan_id FROM entries e
                  UNION
                  SELECT concat_ws('/', coalesce(e.token_plan_id, ''), coalesce(e.full_plan_id, '')), e.token_plan_id,
                         e.full_plan_id
                  FROM (SELECT * FROM trueup.counter_entry e
                        WHERE e.user_id = p_user AND e.subscription_id = p_subscription AND e.at < p_since
                        ORDER BY e.at DESC LIMIT 1) e) d)
$$;

-- The last entry of a counter before that time: it tells the period and the plan then. Null: there is none.
CREATE OR REPLACE FUNCTION trueup.entry_before(p_user {{ user_id_type }}, p_subscription text, p_since timestamptz)
RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_array(
               e.id, coalesce(e.old_counter, 0), coalesce(e.new_counter, 0), extract(epoch FROM e.at), e.kind, e.window_start,
               concat_ws('/', coalesce(e.token_plan_id, ''), coalesce(e.full_plan_id, '')), e.transaction_id::text::bigint,
               e.application_name, e.written_by)
    FROM trueup.counter_entry e
    WHERE e.user_id = p_user AND e.subscription_id = p_subscription AND e.at < p_since
    ORDER BY e.at DESC LIMIT 1
$$;

{# Whether trueup lowers the counter for its calls. Else the host does, as for its own. #}
{% set lowers = "false" if subscription.is_kept_by_host or usage_log.is_written_by_host else "true" %}

-- The log rows of a user since that time, and the owed charges: id, tokens, time, whether it counts, whether trueup
-- lowers the counter for it, section.
CREATE OR REPLACE FUNCTION trueup.story_usage(
    p_user {{ user_id_type }}, p_since timestamptz, p_window timestamptz, OUT found jsonb
) LANGUAGE sql STABLE AS $$
    WITH own AS MATERIALIZED (
        SELECT c.log_id FROM trueup.charge c WHERE c.user_id = p_user AND c.charged_at >= p_since - interval '10 minutes'
    ), rows AS (
        SELECT l.{{ usage_log.id }}::text AS id, {{ in_range("l." ~ usage_log.total_tokens) }}::bigint AS tokens,
               l.{{ usage_log.created_at }}::timestamptz AS at, {{ usage_log.success("l") }} AS success,
               coalesce({{ usage_log.section("l") }}::text, '') AS section
        FROM {{ usage_log }} l
        WHERE l.{{ usage_log.user_id }} = story_usage.p_user AND l.{{ usage_log.created_at }} >= story_usage.p_since
          AND l.{{ usage_log.total_tokens }} <> 0
        LIMIT {{ most }}
    )
    SELECT jsonb_agg(t.found) FROM (
        SELECT jsonb_build_array(r.id, r.tokens, extract(epoch FROM r.at), coalesce(r.success, false) AND r.at >= p_window,
                                 {{ lowers }} AND r.id IN (SELECT o.log_id FROM own o), r.section) AS found
        FROM rows r
        UNION ALL
        SELECT jsonb_build_array(o.log_id, o.total_tokens, extract(epoch FROM o.used_at), o.success AND o.used_at >= p_window,
                                 {{ lowers }}, o.section)
        FROM trueup.owed_charge o WHERE o.user_id = p_user AND o.used_at >= p_since) t
$$;

-- The grants that began or ended after the anchor: id, the tokens by which the counter should have changed, and when.
CREATE OR REPLACE FUNCTION trueup.story_grants(
    p_user {{ user_id_type }}, p_window timestamptz, p_since timestamptz, p_at timestamptz, OUT found jsonb
) LANGUAGE sql STABLE AS $$
    SELECT jsonb_agg(jsonb_build_array(
               g.id::text, CASE WHEN g.ends <= p_at THEN -(g.rest - coalesce(g.settled, 0)) ELSE g.rest END,
               extract(epoch FROM CASE WHEN g.ends <= p_at THEN g.ends ELSE g.begins END)))
    FROM (SELECT WHERE EXISTS (SELECT FROM trueup.token_grant t WHERE t.user_id = p_user) OFFSET 0) k
    CROSS JOIN LATERAL trueup.grants_at(p_user, p_window, 0) g
    WHERE g.begins <= p_at AND g.rest > 0
      AND (g.ends > p_since AND g.ends <= p_at AND g.begins <= p_since OR g.begins > p_since AND (g.ends > p_at) IS NOT FALSE)
$$;

-- The story of each of these counters, as one JSON document: `trueup.drift.history` parses it. Rows are arrays, because
-- there are many. In the caller's snapshot, so that it agrees with the figures of the drift.
CREATE OR REPLACE FUNCTION trueup.counter_stories(
    p_users {{ user_id_type }}[], p_subscriptions text[], p_windows timestamptz[], p_at timestamptz
) RETURNS TABLE (user_id {{ user_id_type }}, story jsonb) LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT * FROM unnest(p_users, p_subscriptions, p_windows) AS w (user_id, subscription_id, window_start)
    ), {{ base_points() }}, {{ anchors() }}
    SELECT a.user_id,
           jsonb_build_object(
               'kind', a.kind, 'at', extract(epoch FROM a.at), 'ended', extract(epoch FROM a.ended), 'position', a.position, 'seen', a.seen,
               'journal_since', extract(epoch FROM a.journal_since), 'snapshot_at', p_at,
               'repeats', {{ "true" if subscription.anchor else "false" }},
               'last_entry', (SELECT max(e.id) FROM trueup.counter_entry e
                              WHERE e.user_id = a.user_id AND e.subscription_id = a.subscription_id),
               'context', c.found, 'entries', coalesce(e.found, '[]'), 'plans', coalesce(e.plans, '{}'),
               'usage', coalesce(l.found, '[]'), 'decrements', coalesce(t.found, '[]'),
               'payments', coalesce(p.found, '[]'), 'grants', coalesce(g.found, '[]'))
    FROM anchors a
    CROSS JOIN LATERAL trueup.story_entries(a.user_id, a.subscription_id, a.since) e
    CROSS JOIN LATERAL (SELECT trueup.entry_before(a.user_id, a.subscription_id, a.since) AS found) c
    CROSS JOIN LATERAL trueup.story_usage(a.user_id, greatest(a.window_start, a.since), a.window_start) l
    CROSS JOIN LATERAL (
        SELECT jsonb_agg(jsonb_build_array(d.id, d.tokens, extract(epoch FROM d.at), d.description)) AS found
        FROM (SELECT d.* FROM ({{ decrements(described=true) }}) d
              WHERE d.user_id = a.user_id AND d.at >= greatest(a.window_start, a.since) AND d.tokens > 0
              LIMIT {{ most }}) d) t
    CROSS JOIN LATERAL (
        SELECT jsonb_agg(jsonb_build_array(
                   p.id, p.tokens, extract(epoch FROM p.at), p.own_plan,
                   EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = a.user_id AND g.reference = p.reference
                             AND g.revoked_at IS NULL))) AS found
        FROM (SELECT p.* FROM ({{ purchases() }}) p
              WHERE p.user_id = a.user_id AND p.at >= a.since - interval '1 hour' AND p.tokens > 0
              ORDER BY p.at LIMIT 200) p) p
    CROSS JOIN LATERAL trueup.story_grants(a.user_id, a.window_start, a.at, p_at) g
$$;

-- Whether a drift's surplus may be tokens that the user has paid for: a purchase, tokens of an earlier period, or an
-- amount that is the size of a plan on sale or of one of the user's payments. Only a decision about this single drift
-- takes them.
CREATE OR REPLACE FUNCTION trueup.may_be_paid(d trueup.drift) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT trueup.off_by(d) > 0 AND (
        d.cause ~ '(credit_without_grant|credited_twice|renewal_without_new_window|carried_over_tokens)'
        OR EXISTS (
            SELECT FROM (SELECT trueup.off_by(d) AS tokens
                         UNION ALL
                         SELECT (c ->> 'tokens')::bigint
                         FROM jsonb_array_elements(coalesce(d.evidence -> 'components', '[]')) c) c
            WHERE c.tokens IN (SELECT trueup.plan_sizes())
               OR c.tokens IN (SELECT p.tokens FROM trueup.purchases() p WHERE p.user_id = d.user_id)))
$$;

-- Decide about a drift as one of many. Returns the outcome of trueup.decide_drift, or 'may_be_paid': no bulk decision
-- takes such tokens away.
CREATE OR REPLACE FUNCTION trueup.decide_in_bulk(p_drift bigint, p_decision text, p_by text, p_note text) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    IF p_decision = 'accept' AND EXISTS (SELECT FROM trueup.find_drift(p_drift) d WHERE trueup.may_be_paid(d)) THEN
        RETURN 'may_be_paid';
    END IF;
    RETURN (SELECT d.outcome FROM trueup.decide_drift(p_drift, p_decision, p_by, p_note, NULL, NULL, NULL, NULL) d);
END $$;

-- Delete at most p_limit entries from before p_before that a run over all users has settled since: that run found the
-- counter right, or its drift row has the causes. Returns how many were deleted.
CREATE OR REPLACE FUNCTION trueup.prune_journal(p_before timestamptz, p_limit integer) RETURNS bigint LANGUAGE sql AS $$
    WITH RECURSIVE users (user_id) AS (
        -- One step in the index for each user. An index by time would cost the host's writers more.
        (SELECT e.user_id FROM trueup.counter_entry e ORDER BY e.user_id LIMIT 1)
        UNION ALL
        SELECT (SELECT e.user_id FROM trueup.counter_entry e WHERE e.user_id > u.user_id ORDER BY e.user_id LIMIT 1)
        FROM users u WHERE u.user_id IS NOT NULL
    ), old AS MATERIALIZED (
        SELECT t.* FROM users u
        CROSS JOIN LATERAL (
            SELECT e.user_id, e.at, e.id FROM trueup.counter_entry e
            WHERE e.user_id = u.user_id AND e.at < p_before
              AND e.at < (SELECT max(r.started_at) FROM trueup.reconcile_run r
                          WHERE r.status = 'finished' AND r.only_user IS NULL AND NOT r.dry_run)) t
        LIMIT p_limit
    ), deleted AS (
        DELETE FROM trueup.counter_entry e USING old
        WHERE e.user_id = old.user_id AND e.at = old.at AND e.id = old.id
        RETURNING 1
    )
    SELECT count(*) FROM deleted
$$;
