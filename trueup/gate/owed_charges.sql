{% from "gate/shared.sql" import by_index, queue_for %}
{% from "gate/store_balance.sql" import store_balance %}
-- Owed charges: usage that a provider was paid for, and whose row the host's log lacks: it refused the row, or the host
-- has not written it yet. An owed charge counts as usage wherever the log's rows do (host/rows.sql), until the log has
-- its row.

-- Lock a user's balance for a charge: as trueup.lock_account, which also reads the host's tables. If that fails, the
-- balance as it is stored: what a provider was paid for is recorded whatever the host has done to its tables.
-- p_timed_out: the statement's time is over, so the host's tables are not read.
CREATE OR REPLACE FUNCTION trueup.lock_charged_account(
    p_user {{ user_id_type }}, INOUT at timestamptz, p_timed_out boolean,
    OUT subscribed boolean, OUT is_active boolean, OUT end_date timestamptz, OUT original bigint,
    OUT window_start timestamptz, OUT log_epoch bigint, OUT consumed bigint, OUT held bigint
) LANGUAGE plpgsql AS $$
BEGIN
    -- Before the subtransaction, so that the lock outlives its failure.
    PERFORM FROM trueup.balance b WHERE b.user_id = p_user FOR UPDATE;
    BEGIN
        IF p_timed_out THEN
            RAISE query_canceled;
        END IF;
        SELECT t.at, t.subscribed, t.is_active, t.end_date, t.original, t.window_start, t.log_epoch, t.consumed, t.held
        INTO at, subscribed, is_active, end_date, original, window_start, log_epoch, consumed, held
        FROM trueup.lock_account(p_user, lock_charged_account.at) t;
        RETURN;
    EXCEPTION WHEN query_canceled OR OTHERS THEN
        IF trueup.is_transient(SQLSTATE) THEN
            RAISE;
        END IF;
    END;
    SELECT true, b.window_start, b.log_epoch, b.consumed, b.held
    INTO subscribed, window_start, log_epoch, consumed, held
    FROM trueup.balance b WHERE b.user_id = p_user;
    at := coalesce(at, clock_timestamp());
END $$;

-- Write the row of `o` into the log, or keep it as an owed charge. Parameters and results: as of trueup.try_log_row.
-- `refusal`: why it is owed, NULL: it is in the log. `may_lower`: there is time to lower the counter too, or the host
-- has lowered it with the row.
CREATE OR REPLACE FUNCTION trueup.log_or_owe(
    o trueup.owed_charge, p_window timestamptz, p_has_balance boolean, p_timed_out boolean,
    OUT log_id text, OUT counted bigint, OUT own bigint, OUT refusal text, OUT may_lower boolean
) LANGUAGE plpgsql AS $$
DECLARE
    w record;
BEGIN
    SELECT * INTO w FROM trueup.try_log_row(o, p_window, p_has_balance, p_timed_out);
    log_id := w.log_id;
    counted := w.counted;
    own := w.own;
    -- The limit on the statement's time has been reached, and does not apply a second time in this statement.
    may_lower := {% if subscription.is_kept_by_host %}w.refused_with IS NULL
                 {%- else %}w.refused_with IS DISTINCT FROM '57014'{% endif %};
    IF w.refused_with IS NULL THEN
        RETURN;
    END IF;
    refusal := w.refused_with || ' ' || left(w.refusal, 500);
    INSERT INTO trueup.owed_charge
    VALUES (o.user_id, o.task_id, o.call_key, o.log_id, o.section, o.model_name, o.prompt_tokens, o.completion_tokens,
            o.total_tokens, o.response_time_ms, o.success, o.error, o.metadata, o.used_at, w.refused_with,
            left(w.refusal, 500), 1, clock_timestamp(), clock_timestamp());
    -- Without a balance this transaction holds no lock, and another may build the balance without this charge. The
    -- delta tells it then, as the log's trigger does for a row.
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT o.user_id, o.used_at, o.total_tokens
    WHERE NOT p_has_balance AND o.success AND o.total_tokens <> 0;
END $$;

-- Try again to write the row of an owed charge. True: the charge is owed no more, because the log has its row, or
-- because the host has deleted the user. False: the host refused the row again.
CREATE OR REPLACE FUNCTION trueup.settle_owed_charge(
    p_user {{ user_id_type }}, p_task text, p_call_key text, at timestamptz
) RETURNS boolean LANGUAGE plpgsql {{ by_index }} AS $$
DECLARE
    a record;
    o trueup.owed_charge;
    w record;
    v_log_id text;
    v_own bigint;
BEGIN
    {{ queue_for("p_user") }}
    SELECT * INTO a FROM trueup.lock_charged_account(p_user, at, false);
    SELECT * INTO o FROM trueup.owed_charge t
    WHERE t.user_id = p_user AND t.task_id = p_task AND t.call_key = p_call_key FOR UPDATE;
    IF NOT FOUND THEN
        RETURN true;
    END IF;
    SELECT NULL AS refused_with, NULL AS refusal INTO w;
    BEGIN
        -- The host may have brought the row itself, from a backup for example. Its trigger has counted it.
        SELECT l.{{ usage_log.id }}::text INTO v_log_id
        FROM {{ usage_log }} l WHERE l.{{ usage_log.id }} = trueup.as_log_id(o.log_id);
        IF v_log_id IS NULL THEN
            SELECT * INTO w FROM trueup.try_log_row(o, a.window_start, a.consumed IS NOT NULL, false);
            v_log_id := w.log_id;
            v_own := w.own;
        END IF;
    EXCEPTION
        WHEN foreign_key_violation THEN
            NULL;  -- the host has deleted the user, and a log row needs one
        WHEN undefined_table OR undefined_column THEN
            SELECT SQLSTATE AS refused_with, SQLERRM AS refusal INTO w;
    END;
    IF w.refused_with IS NOT NULL THEN
        UPDATE trueup.owed_charge t
        SET sqlstate = w.refused_with, refusal = left(w.refusal, 500), tries = t.tries + 1, tried_at = clock_timestamp()
        WHERE t.user_id = p_user AND t.task_id = p_task AND t.call_key = p_call_key;
        RETURN false;
    END IF;
    DELETE FROM trueup.owed_charge t WHERE t.user_id = p_user AND t.task_id = p_task AND t.call_key = p_call_key;
    UPDATE trueup.charge c SET log_id = coalesce(v_log_id, c.log_id)
    {%- if subscription.is_kept_by_host %}, counter_lowered = true{% endif %}

    WHERE c.user_id = p_user AND c.task_id = p_task AND c.call_key = p_call_key;
    -- The charge no longer counts as owed, and its row counts.
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT o.user_id, o.used_at, -o.total_tokens WHERE a.consumed IS NULL AND o.success AND o.total_tokens <> 0;
    a.consumed := a.consumed + coalesce(v_own, 0)
        - CASE WHEN o.success AND o.used_at >= a.window_start THEN o.total_tokens ELSE 0 END;
{{ store_balance("p_user") }}
    RETURN true;
END $$;
