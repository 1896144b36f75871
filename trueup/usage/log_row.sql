{% from "host/rows.sql" import is_counted, own_row_mark %}
{% from "host/search_path.sql" import own_search_path, role_search_path %}
{% from "usage/host_writes.sql" import check_at_once, counted, insert_log_row, lower_counter %}
-- trueup's own writes to the usage log and the counter. The host may refuse one: by a constraint, a trigger, a missing
-- sequence, a lock. The provider has been paid by then, so a refused row becomes an owed charge, which counts as usage
-- until the log has its row.

-- The mark of trueup's own row in this transaction, by which the log's triggers recognise it.
CREATE OR REPLACE FUNCTION trueup.own_row_mark(p_log_id text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT {{ own_row_mark("p_log_id") }}
$$;

-- Whether an error is none of the host's, and may pass: no connection, a deadlock, no memory or disk, an internal
-- error. Then the whole transaction fails, and the caller tries it again. A statement that took too long is the host's.
CREATE OR REPLACE FUNCTION trueup.is_transient(p_sqlstate text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT left(p_sqlstate, 2) IN ('08', '25', '40', '53', '57', '58', 'XX') AND p_sqlstate <> '57014'
$$;

-- Whether a foreign key of the log leads to its user. A user whom the host has deleted can have no log row.
CREATE OR REPLACE FUNCTION trueup.is_user_key(p_constraint text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM pg_constraint c JOIN pg_attribute t ON t.attrelid = c.conrelid AND t.attnum = ANY (c.conkey)
        WHERE c.contype = 'f' AND c.conname = p_constraint
          AND '"' || replace(t.attname, '"', '""') || '"' = {{ usage_log.user_id | literal }})
$$;

{% if usage_log.is_written_by_host %}
-- The host's row of a call, among rows of the user that no other charge has: a row of the call's tokens, at most
-- 5 s older than the call's start. After ten minutes, any row of that time: one of the call's tokens first, then the
-- nearest. NULL: the host has not logged the call.
CREATE OR REPLACE FUNCTION trueup.find_host_row(o trueup.owed_charge) RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_is_old boolean := o.used_at < clock_timestamp() - interval '10 minutes';
    v_since timestamptz := o.used_at - CASE WHEN v_is_old THEN interval '10 minutes'
                                            ELSE make_interval(secs => 5 + o.response_time_ms / 1000.0) END;
BEGIN
    RETURN (
        SELECT l.{{ usage_log.id }}::text FROM {{ usage_log }} l
        WHERE {{ is_counted("l", "o.user_id", "v_since") }}
          AND l.{{ usage_log.created_at }} <= o.used_at + interval '10 minutes'
          AND (v_is_old OR l.{{ usage_log.total_tokens }} = o.total_tokens)
          AND NOT EXISTS (SELECT FROM trueup.charge c
                          WHERE c.user_id = o.user_id AND c.log_id = l.{{ usage_log.id }}::text)
        ORDER BY l.{{ usage_log.total_tokens }} <> o.total_tokens,
                 abs(extract(epoch FROM l.{{ usage_log.created_at }} - o.used_at)) LIMIT 1);
END $$;

-- Match the user's charges that wait for the host's row with the rows that have come. The caller has locked the
-- balance, and folds the deltas afterwards: the host's row counts from now on, and the charge no more.
CREATE OR REPLACE FUNCTION trueup.match_host_rows(p_user {{ user_id_type }}) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    o trueup.owed_charge;
    v_log_id text;
BEGIN
    FOR o IN SELECT * FROM trueup.owed_charge t WHERE t.user_id = p_user ORDER BY t.used_at LOOP
        v_log_id := trueup.find_host_row(o);
        CONTINUE WHEN v_log_id IS NULL;
        DELETE FROM trueup.owed_charge t
        WHERE t.user_id = p_user AND t.task_id = o.task_id AND t.call_key = o.call_key;
        UPDATE trueup.charge c SET log_id = v_log_id, counter_lowered = true
        WHERE c.user_id = p_user AND c.task_id = o.task_id AND c.call_key = o.call_key;
        INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
        SELECT p_user, o.used_at, -o.total_tokens WHERE o.success AND o.total_tokens <> 0;
    END LOOP;
END $$;

-- The host's log row of `o`, in place of a row of trueup's. Parameters and results: as below. A call whose row has not
-- come is owed: it counts as usage until the row comes.
CREATE OR REPLACE FUNCTION trueup.try_log_row(
    o trueup.owed_charge, p_window timestamptz, p_has_balance boolean, p_timed_out boolean,
    OUT log_id text, OUT counted bigint, OUT own bigint, OUT refused_with text, OUT refusal text
) LANGUAGE plpgsql AS $$
BEGIN
    counted := CASE WHEN o.success AND o.used_at >= coalesce(p_window, '-infinity') THEN o.total_tokens ELSE 0 END;
    log_id := trueup.find_host_row(o);
    own := 0;
    IF log_id IS NULL AND NOT o.success THEN
        log_id := o.log_id;  -- a failed call owes nothing
    ELSIF log_id IS NULL THEN
        log_id := o.log_id;
        own := CASE WHEN p_has_balance THEN counted ELSE 0 END;
        refused_with := 'TU003';
        refusal := 'the host has not logged this call yet';
    END IF;
END $$;
{% else %}
-- Write the row of `o` into the log, in a subtransaction. p_window: the begin of the user's window. p_has_balance: the
-- caller has locked the user's balance, so the row is marked as trueup's own and its triggers append no delta.
-- `log_id`: the id of the row. `counted`: its tokens that count in the window. `own`: of these, the tokens that the
-- caller adds to the balance. `refused_with`: the SQLSTATE if the host refused the row; then the figures are those of
-- `o`. p_timed_out: the limit on the statement's time has been reached, and does not apply a second time, so nothing
-- may wait for the host any more: the row is refused. Raises what is transient, a violation of the foreign key to the
-- user, and any refusal of a failed call, which owes nothing.
CREATE OR REPLACE FUNCTION trueup.try_log_row(
    o trueup.owed_charge, p_window timestamptz, p_has_balance boolean, p_timed_out boolean,
    OUT log_id text, OUT counted bigint, OUT own bigint, OUT refused_with text, OUT refusal text
) LANGUAGE plpgsql AS $$
DECLARE
    v_id text;
    v_mark text;
    v_constraint text;
BEGIN
    IF p_timed_out THEN
        RAISE query_canceled USING MESSAGE = 'canceling statement due to statement timeout';
    END IF;
    v_id := trueup.new_log_id(o.log_id);
    v_mark := CASE WHEN p_has_balance THEN trueup.own_row_mark(v_id) END;
    {{ check_at_once() }}
    {{ insert_log_row("v_mark", "try_log_row.p_window") }}
    IF log_id IS NULL AND (o.success OR {{ usage_log.records_failure() }}) THEN
        -- A trigger of the host's wrote the row into a table that inherits from the log, or dropped it.
        SELECT l.{{ usage_log.id }}::text, {{ counted("try_log_row.p_window") }} INTO log_id, counted
        FROM {{ usage_log }} l WHERE l.{{ usage_log.id }} = v_id::{{ usage_log_id_type }};
        IF log_id IS NULL THEN
            RAISE EXCEPTION 'a trigger of the usage log dropped the row';
        END IF;
    END IF;
    IF o.error IS NOT NULL THEN
        PERFORM trueup.note_error(log_id, o.error);
    END IF;
    -- Again: a trigger of the host's may have deferred its constraints.
    PERFORM FROM {{ role_search_path() }};
    {{ check_at_once() }}
    {{ own_search_path() }}
    counted := coalesce(counted, 0);
    own := CASE WHEN log_id = v_id AND v_mark IS NOT NULL THEN counted ELSE 0 END;
    log_id := coalesce(log_id, o.log_id);
EXCEPTION WHEN query_canceled OR OTHERS THEN
    GET STACKED DIAGNOSTICS refused_with = RETURNED_SQLSTATE, refusal = MESSAGE_TEXT, v_constraint = CONSTRAINT_NAME;
    IF NOT o.success OR trueup.is_transient(refused_with)
       OR refused_with = '23503' AND trueup.is_user_key(v_constraint) THEN
        RAISE;
    END IF;
    log_id := o.log_id;
    counted := CASE WHEN o.success AND o.used_at >= coalesce(p_window, '-infinity') THEN o.total_tokens ELSE 0 END;
    own := CASE WHEN p_has_balance THEN counted ELSE 0 END;
END $$;
{% endif %}

-- Lower the legacy counter. Returns whether that is done; false also if the host refuses the update, by a trigger for
-- example.
{% if subscription.is_kept_by_host %}
-- This host lowers the counter itself, for the log's row of each call (`counter_kept_by`), so nothing is left to do.
CREATE OR REPLACE FUNCTION trueup.lower_counter(p_user {{ user_id_type }}, p_tokens bigint)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$ SELECT true $$;
{% else %}
CREATE OR REPLACE FUNCTION trueup.lower_counter(p_user {{ user_id_type }}, p_tokens bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_mark text := trueup.own_row_mark('charge');
    v_lowered boolean;
BEGIN
    {{ check_at_once() }}
    {{ lower_counter("lower_counter.p_user", "lower_counter.p_tokens", "v_mark", "v_lowered") }}
    RETURN v_lowered;
EXCEPTION WHEN query_canceled OR OTHERS THEN
    IF trueup.is_transient(SQLSTATE) THEN
        RAISE;
    END IF;
    RETURN false;
END $$;
{% endif %}
