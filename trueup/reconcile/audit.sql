{% from "gate/shared.sql" import queue_for %}
{% from "host/rows.sql" import countable, used_since, window_start %}
-- The deep pass: repairs, and defects of trueup's own tables other than different sums (audit.py finds those).
-- The finders only read. Their range is the users after p_after, up to and including p_last; null: no bound. Each
-- finding is checked again under the balance's lock before anything is written.

-- Repair one user's balance under its lock, from the log and the open holds, and record the defects found.
-- Returns how many defects were recorded.
CREATE OR REPLACE FUNCTION trueup.repair_balance(p_run bigint, p_user {{ user_id_type }}) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    b trueup.balance;
    v_stale boolean;
    v_deltas bigint;
    v_logged bigint;
    v_in_holds bigint;
    v_defects integer := 0;
BEGIN
    {{ queue_for("p_user") }}
    SELECT * INTO b FROM trueup.balance t WHERE t.user_id = p_user FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    SELECT (b.window_start, b.log_epoch) IS DISTINCT FROM
           ({{ window_start("s") }}, trueup.log_epoch())
    INTO v_stale FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = repair_balance.p_user;
    IF v_stale IS FALSE THEN
        -- One statement has one snapshot: it sees both a log row and its delta, or neither.
        WITH cleared AS (DELETE FROM trueup.usage_delta t WHERE t.user_id = p_user RETURNING t.used_at, t.tokens)
        SELECT (SELECT {{ countable("coalesce(sum(c.tokens), 0)") }} FROM cleared c WHERE c.used_at >= b.window_start),
               ({{ used_since("repair_balance.p_user", "b.window_start") }})
        INTO v_deltas, v_logged;
        v_defects := v_defects + trueup.note_defect(
            p_run, 'balance_untrue', p_user, b.consumed + v_deltas, v_logged, true, '{}');
    END IF;
    SELECT coalesce(sum(h.tokens_reserved - h.tokens_covered), 0) INTO v_in_holds
    FROM trueup.hold h WHERE h.user_id = p_user AND h.status = 'open';
    v_defects := v_defects + trueup.note_defect(p_run, 'held_untrue', p_user, b.held, v_in_holds, true, '{}');
    UPDATE trueup.balance t
    SET consumed = coalesce(v_logged, b.consumed), held = v_in_holds,
        log_epoch = CASE WHEN v_logged = {{ uncountable }} THEN -1 ELSE t.log_epoch END
    WHERE t.user_id = p_user;
    RETURN v_defects;
END $$;

-- Record a defect, unless p_seen equals p_expected. A defect that was not repaired is recorded once in a run. Returns
-- how many were recorded: 0 or 1.
CREATE OR REPLACE FUNCTION trueup.note_defect(
    p_run bigint, p_kind text, p_user {{ user_id_type }}, p_seen bigint, p_expected bigint, p_repaired boolean,
    p_detail jsonb
) RETURNS integer LANGUAGE sql AS $$
    WITH noted AS (
        INSERT INTO trueup.defect (run_id, kind, user_id, seen, expected, repaired, detail, found_at)
        SELECT p_run, p_kind, p_user, p_seen, p_expected, p_repaired, p_detail, clock_timestamp()
        WHERE (p_seen IS DISTINCT FROM p_expected OR p_seen IS NULL) AND NOT EXISTS (
            SELECT FROM trueup.defect f
            WHERE f.run_id = p_run AND f.kind = p_kind AND f.user_id IS NOT DISTINCT FROM p_user
              AND f.detail = p_detail AND NOT p_repaired)
        RETURNING 1
    )
    SELECT count(*)::integer FROM noted
$$;

{# Whether the user of a row is in the range: after p_after, up to and including p_last; NULL: no bound. #}
{% macro in_range(row) -%}
(anomalies.p_after IS NULL OR {{ row }}.user_id > anomalies.p_after)
       AND (anomalies.p_last IS NULL OR {{ row }}.user_id <= anomalies.p_last)
{%- endmacro %}

-- Defects that trueup cannot repair, at most p_most of each kind, in a range of users: balances below zero, caused by
-- negative log rows; balances that were computed after a later log truncation than any on record; holds of users
-- without a balance; and charges since p_since (null: all) whose log row is missing, unless the host has deleted the
-- user with all rows.
CREATE OR REPLACE FUNCTION trueup.anomalies(
    p_after {{ user_id_type }}, p_last {{ user_id_type }}, p_since timestamptz, p_most integer
) RETURNS TABLE (kind text, user_id {{ user_id_type }}, seen bigint, expected bigint, detail jsonb)
LANGUAGE sql STABLE AS $$
    (SELECT 'balance_negative', b.user_id, b.consumed, 0::bigint, '{}'::jsonb
     FROM trueup.balance b
     WHERE b.consumed < 0
       AND {{ in_range("b") }}
     ORDER BY b.user_id LIMIT anomalies.p_most)
    UNION ALL
    (SELECT 'balance_of_the_future', b.user_id, b.log_epoch, trueup.log_epoch(), '{}'::jsonb
     FROM trueup.balance b
     WHERE b.log_epoch > trueup.log_epoch()
       AND {{ in_range("b") }}
     ORDER BY b.user_id LIMIT anomalies.p_most)
    UNION ALL
    (SELECT 'hold_without_balance', h.user_id, sum(h.tokens_reserved - h.tokens_covered)::bigint, NULL::bigint,
            jsonb_build_object('holds', count(*))
     FROM trueup.hold h
     WHERE h.status = 'open' AND NOT EXISTS (SELECT FROM trueup.balance b WHERE b.user_id = h.user_id)
       AND {{ in_range("h") }}
     GROUP BY h.user_id ORDER BY h.user_id LIMIT anomalies.p_most)
    UNION ALL
    (SELECT 'charge_without_log_row', c.user_id, c.tokens_total, NULL::bigint,
            jsonb_build_object('task_id', c.task_id, 'call_key', c.call_key, 'log_id', c.log_id)
     FROM trueup.charge c
     WHERE (anomalies.p_since IS NULL OR c.charged_at >= anomalies.p_since) AND c.tokens_total > 0
       AND trueup.as_log_id(c.log_id) IS NOT NULL
       AND NOT EXISTS (SELECT FROM {{ usage_log }} l WHERE l.{{ usage_log.id }} = trueup.as_log_id(c.log_id))
       AND NOT EXISTS (SELECT FROM trueup.owed_charge o
                       WHERE o.user_id = c.user_id AND o.task_id = c.task_id AND o.call_key = c.call_key)
       AND EXISTS (SELECT FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = c.user_id)
       AND {{ in_range("c") }}
     ORDER BY c.charged_at LIMIT anomalies.p_most)
$$;

-- The missing or disabled triggers. Without those on the log, balances miss usage. Without the one on the
-- subscriptions, a window that came and went unseen is not noticed. `state`: 'missing', or pg_trigger.tgenabled ('D':
-- disabled, 'R': fires only in replica mode).
CREATE OR REPLACE FUNCTION trueup.disabled_triggers() RETURNS TABLE (name text, state text) LANGUAGE sql STABLE AS $$
    SELECT wanted.name, coalesce(g.tgenabled::text, 'missing')
    FROM (VALUES ('trueup_inserted', {{ usage_log | literal }}), ('trueup_updated', {{ usage_log | literal }}),
                 ('trueup_deleted', {{ usage_log | literal }}), ('trueup_truncated', {{ usage_log | literal }}),
                 ('trueup_window_changed', {{ subscription | literal }})) AS wanted (name, host_table)
    LEFT JOIN pg_trigger g ON g.tgname = wanted.name AND g.tgrelid = CAST(wanted.host_table AS regclass)
                          AND g.tgnargs = 0
    WHERE g.tgenabled IS NULL OR g.tgenabled NOT IN ('O', 'A')
$$;

{# Whether the user of the delta `d` has neither a subscription nor a balance: no balance will ever get it. #}
{% macro is_lost(d) -%}
NOT EXISTS (SELECT FROM trueup.balance b WHERE b.user_id = {{ d }}.user_id)
      AND NOT EXISTS (SELECT FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = {{ d }}.user_id)
{%- endmacro %}

-- The number of deltas that no balance will ever get.
CREATE OR REPLACE FUNCTION trueup.count_lost_deltas() RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM trueup.usage_delta d
    WHERE {{ is_lost("d") }}
$$;

-- Delete the deltas that trueup.count_lost_deltas counts. No usage is lost: if the user subscribes, the balance is
-- built from the log. No concurrent transaction can be building a balance that needs a deleted delta, because this
-- statement's snapshot shows no subscription of the user.
CREATE OR REPLACE FUNCTION trueup.delete_lost_deltas() RETURNS bigint LANGUAGE sql AS $$
    WITH deleted AS (
        DELETE FROM trueup.usage_delta d
        WHERE {{ is_lost("d") }}
        RETURNING 1
    )
    SELECT count(*) FROM deleted
$$;
