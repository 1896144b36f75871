{% from "gate/shared.sql" import by_index, in_flight, queue_for %}
{% from "gate/store_balance.sql" import store_balance %}
{% from "host/rows.sql" import mark, window_start %}
{% from "usage/host_writes.sql" import check_at_once, insert_log_row, lower_counter %}
{# Insert the row of a charge, in a function with the parameters of trueup.record_charge. #}
{% macro insert_charge(total, log_id, model, hold, covered, late, lowered) -%}
        INSERT INTO trueup.charge (user_id, task_id, call_key, attempt, log_id, section, model_name,
                                   hold_id, tokens_total, tokens_covered, late, answer, charged_at, counter_lowered,
                                   tokens_input, tokens_cached_input, tokens_cache_write, tokens_output,
                                   tokens_reasoning, tokens_audio)
        VALUES (p_user, p_task, p_call_key, p_attempt, {{ log_id }}, p_section, {{ model }},
                {{ hold }}, {{ total }}, {{ covered }}, {{ late }}, p_answer, at, {{ lowered }},
                (p_classes->>'input')::bigint, (p_classes->>'cached_input')::bigint, (p_classes->>'cache_write')::bigint,
                (p_classes->>'output')::bigint, (p_classes->>'reasoning')::bigint, (p_classes->>'audio')::bigint)
{%- endmacro %}

{# The call is no longer in flight. #}
{% macro end_call() -%}
        DELETE FROM trueup.call_intent i
        WHERE i.user_id = p_user AND i.task_id = p_task AND i.attempt = p_attempt AND i.call_key = v_first_key
{%- endmacro %}
-- Record the usage of one provider call: log row, charge row, hold and balance in one transaction. An existing charge
-- stays unchanged (recorded = false), so any number of redeliveries pay once. `bought_twice`: another attempt recorded
-- this key, because this attempt lost its lease; the caller must record its own call under another key.
--
-- Usage counts even if its hold has ended (expired, or taken over by a later attempt): it is recorded and flagged late.
-- tokens_over: the tokens that the hold did not cover. p_last: close the hold with this charge, as trueup.close_hold
-- does, if no other call is in flight (`closed`; not true: the caller closes it). p_classes: the billed tokens by
-- class, such as cached input, before the settings' weights; NULL: not known.
--
-- This function records the common case in as few statements as the lock allows: a new call under an open hold, whose
-- row and counter the host takes. trueup.record_other_charge records all others.
-- Longer than 70 lines, because a subtransaction must hold all that the host may refuse.
CREATE OR REPLACE FUNCTION trueup.record_charge(
    p_user {{ user_id_type }}, p_task text, p_attempt integer, p_call_key text, p_log_id text, p_section text,
    p_prompt bigint, p_completion bigint, p_total bigint, p_response_ms bigint, p_model text,
    p_metadata jsonb, p_answer jsonb, INOUT at timestamptz, p_classes jsonb DEFAULT NULL,
    p_last boolean DEFAULT false,
    OUT recorded boolean, OUT bought_twice boolean, OUT late boolean, OUT tokens_over bigint, OUT tokens_left bigint,
    OUT owed_because text, OUT closed boolean
) LANGUAGE plpgsql {{ by_index }} AS $$
#variable_conflict use_column
DECLARE
    c record;
    o trueup.owed_charge;
    v_first_key text := split_part(p_call_key, '~', 1);  -- the key of the first call, if the call was bought twice
    v_consumed bigint;
    v_window timestamptz;
    v_hold bigint;
    v_covered bigint;
    v_id text;
    v_log_id text;
    v_counted bigint;
    v_lowered boolean := true;
    v_refused_with text;
BEGIN
    {{ queue_for("p_user") }}
    SELECT b.consumed, b.window_start INTO v_consumed, v_window FROM trueup.balance b WHERE b.user_id = p_user FOR UPDATE;
    at := coalesce(at, clock_timestamp());
    {% if not usage_log.is_written_by_host %}
    BEGIN
        SELECT h.id, h.tokens_reserved - h.tokens_covered AS free, trueup.log_time(record_charge.at, v_window) AS used_at,
               {{ in_flight("v_first_key", "p_attempt") }} AS in_flight, n.mark_secret
        INTO c
        FROM trueup.hold h
        CROSS JOIN trueup.installation n
        WHERE h.user_id = p_user AND h.task_id = p_task AND h.attempt = p_attempt AND h.status = 'open'
          AND h.body_ended_at IS NULL AND h.expires_at > record_charge.at
          AND v_consumed < {{ uncountable }} - p_total
          AND EXISTS (SELECT FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = record_charge.p_user
                                                         AND {{ window_start("s", "record_charge.at") }} = v_window)
          AND NOT EXISTS (SELECT FROM trueup.charge x
                          WHERE x.user_id = p_user AND x.task_id = p_task AND x.call_key = p_call_key);
        IF FOUND THEN
            o := (p_user, p_task, p_call_key, p_log_id, p_section, p_model, p_prompt, p_completion, p_total, p_response_ms,
                  true, NULL, p_metadata, c.used_at, '', '', 1, at, at);
            v_id := {% if usage_log_id_type == "bigint" %}trueup.new_log_id(p_log_id){% else %}p_log_id{% endif %};
            {{ check_at_once() }}
    {{ insert_log_row(mark("c.mark_secret", "v_id"), "v_window", "v_log_id", "v_counted") }}
            IF v_log_id IS DISTINCT FROM v_id THEN
                RAISE EXCEPTION 'a trigger of the usage log moved the row';
            END IF;
            {% if not subscription.is_kept_by_host %}
    {{ lower_counter("record_charge.p_user", "record_charge.p_total", mark("c.mark_secret", "'charge'"), "v_lowered") }}
            {% endif %}
            v_hold := c.id;
        END IF;
    EXCEPTION WHEN query_canceled OR OTHERS THEN
        -- The host refused something, or has changed its tables. The rollback has undone all; now do it step by step.
        IF trueup.is_transient(SQLSTATE) THEN
            RAISE;
        END IF;
        v_refused_with := SQLSTATE;
    END;
    {% endif %}
    IF v_hold IS NULL THEN
        SELECT r.* INTO at, recorded, bought_twice, late, tokens_over, tokens_left, owed_because
        FROM trueup.record_other_charge(
            p_user, p_task, p_attempt, p_call_key, p_log_id, p_section, p_prompt, p_completion, p_total, p_response_ms,
            p_model, p_metadata, p_answer, at, p_classes, v_refused_with = '57014') r;
        RETURN;
    END IF;
    closed := p_last AND c.in_flight = 0;
    v_covered := least(p_total, c.free);
    WITH charged AS (
{{ insert_charge("p_total", "v_log_id", "p_model", "v_hold", "v_covered", "false", "v_lowered") }}
    ), ended AS (
{{ end_call() }}
    ), used AS (
        UPDATE trueup.hold t SET tokens_covered = t.tokens_covered + v_covered,
                                 tokens_charged = least(t.tokens_charged + p_total, {{ uncountable }}), calls = t.calls + 1,
                                 status = CASE WHEN closed THEN 'settled' ELSE t.status END,
                                 closed_at = CASE WHEN closed THEN at END
        WHERE t.user_id = p_user AND t.task_id = p_task AND t.id = v_hold
    )
    UPDATE trueup.balance b SET consumed = b.consumed + coalesce(v_counted, 0),
                                held = b.held - CASE WHEN closed THEN c.free ELSE v_covered END
    WHERE b.user_id = p_user;
    SELECT true, false, false, p_total - v_covered,
           CASE WHEN closed THEN 0 ELSE greatest(c.free - v_covered - c.in_flight, 0) END
    INTO recorded, bought_twice, late, tokens_over, tokens_left;
END $$;

-- Record whatever trueup.record_charge finds no common case, under its lock. p_timed_out: the statement's time is over:
-- nothing may wait for the host any more, so the charge is owed.
CREATE OR REPLACE FUNCTION trueup.record_other_charge(
    p_user {{ user_id_type }}, p_task text, p_attempt integer, p_call_key text, p_log_id text, p_section text,
    p_prompt bigint, p_completion bigint, p_total bigint, p_response_ms bigint, p_model text,
    p_metadata jsonb, p_answer jsonb, INOUT at timestamptz, p_classes jsonb, p_timed_out boolean,
    OUT recorded boolean, OUT bought_twice boolean, OUT late boolean, OUT tokens_over bigint, OUT tokens_left bigint,
    OUT owed_because text
) LANGUAGE plpgsql AS $$
DECLARE
    a record;
    h trueup.hold;
    v_covered bigint;
    o trueup.owed_charge;
    w record;
    v_kept bigint;
    v_first_key text := split_part(p_call_key, '~', 1);  -- the key of the first call, if the call was bought twice
BEGIN
    SELECT * INTO a FROM trueup.lock_charged_account(p_user, at, p_timed_out);
    at := a.at;
    SELECT * INTO h FROM trueup.hold t
    WHERE t.user_id = p_user AND t.task_id = p_task AND t.status = 'open'
      AND (t.attempt = p_attempt OR t.request = trueup.request_of(p_user, p_task, p_attempt));
    SELECT c.late, c.tokens_total - c.tokens_covered, c.attempt <> p_attempt INTO late, tokens_over, bought_twice
    FROM trueup.charge c WHERE c.user_id = p_user AND c.task_id = p_task AND c.call_key = p_call_key;
    recorded := NOT FOUND;
    bought_twice := coalesce(bought_twice, false);
    IF recorded THEN
        late := h.id IS NULL OR h.attempt <> p_attempt OR h.body_ended_at IS NOT NULL;
        -- A late charge also uses the open hold of its request, if there is one, so that both attempts together stay
        -- within it. If the task's body has ended, the hold keeps the tokens that other calls in flight may cost.
        v_covered := coalesce(h.tokens_reserved - h.tokens_covered, 0);
        IF h.body_ended_at IS NOT NULL THEN
            v_covered := greatest(v_covered - trueup.in_flight(p_user, p_task, v_first_key, p_attempt), 0);
        END IF;
        o := trueup.row_to_log(p_user, p_task, p_call_key, p_log_id, p_section, p_model, p_prompt, p_completion, p_total,
                               p_response_ms, true, NULL, p_metadata,
                               trueup.log_time(at, CASE WHEN a.subscribed THEN a.window_start END));
        p_total := o.total_tokens;
        v_covered := least(p_total, v_covered);
        tokens_over := p_total - v_covered;
        SELECT * INTO w FROM trueup.log_or_owe(o, a.window_start, a.consumed IS NOT NULL, p_timed_out);
        owed_because := w.refusal;
        a.consumed := a.consumed + w.own;
        a.held := a.held - v_covered;
{{ insert_charge("p_total", "w.log_id", "o.model_name", "h.id", "v_covered", "late",
                 "w.may_lower AND trueup.lower_counter(p_user, p_total)") }};
{{ end_call() }};
        UPDATE trueup.hold t SET tokens_covered = t.tokens_covered + v_covered,
                                 tokens_charged = least(t.tokens_charged + p_total, {{ uncountable }}), calls = t.calls + 1
        WHERE t.user_id = p_user AND t.task_id = p_task AND t.id = h.id RETURNING * INTO h;
        IF h.body_ended_at IS NOT NULL THEN
            -- The hold was open only for calls in flight; it ends with the last of them.
            v_kept := least(trueup.in_flight(p_user, p_task, NULL, NULL), h.tokens_reserved - h.tokens_covered);
            a.held := a.held - (h.tokens_reserved - h.tokens_covered - v_kept);
            UPDATE trueup.hold t SET tokens_reserved = t.tokens_covered + v_kept,
                                     status = CASE WHEN v_kept = 0 THEN 'settled' ELSE t.status END,
                                     closed_at = CASE WHEN v_kept = 0 THEN at END
            WHERE t.user_id = p_user AND t.task_id = p_task AND t.id = h.id;
        END IF;
    END IF;
    tokens_left := CASE WHEN h.id IS NOT NULL AND h.attempt = p_attempt AND h.body_ended_at IS NULL
                        THEN greatest(h.tokens_reserved - h.tokens_covered
                                      - trueup.in_flight(p_user, p_task, NULL, NULL), 0) ELSE 0 END;
{{ store_balance("p_user") }}
END $$;

-- The fingerprint of the request that this attempt of a task worked for. Holds of one id follow each other, and
-- attempts are numbered through all of them.
CREATE OR REPLACE FUNCTION trueup.request_of(p_user {{ user_id_type }}, p_task text, p_attempt integer)
RETURNS text LANGUAGE sql STABLE AS $$
    SELECT h.request FROM trueup.hold h
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.attempt >= p_attempt ORDER BY h.id LIMIT 1
$$;

-- The figure, lowered to what a column of the usage log can hold. p_column: the column's name as quoted in SQL. Every
-- type of number that a host may have holds 2147483647; the setup refuses a smaller one.
CREATE OR REPLACE FUNCTION trueup.fitting(p_value bigint, p_column text) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF p_value <= 2147483647 THEN
        RETURN p_value;
    END IF;
    RETURN least(p_value, (
        SELECT CASE coalesce(nullif(t.typbasetype, 0), t.oid) WHEN 'int4'::regtype THEN 2147483647
                                                             WHEN 'int2'::regtype THEN 32767 END
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = to_regclass({{ usage_log | literal }}) AND a.attnum > 0 AND NOT a.attisdropped
          AND '"' || replace(a.attname, '"', '""') || '"' = p_column));
END $$;

-- The text, cut to the length of a column of the usage log, so that a long model name never stops a charge. p_column:
-- the column's name as quoted in SQL.
CREATE OR REPLACE FUNCTION trueup.fitting(p_value text, p_column text) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN left(p_value, coalesce((
        WITH RECURSIVE kind (id, typmod, base) AS (  -- the column's type, and the base types of a domain
            SELECT t.oid, greatest(a.atttypmod, t.typtypmod), t.typbasetype
            FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
            WHERE a.attrelid = to_regclass({{ usage_log | literal }}) AND a.attnum > 0 AND NOT a.attisdropped
              AND '"' || replace(a.attname, '"', '""') || '"' = p_column
            UNION ALL
            SELECT t.oid, t.typtypmod, t.typbasetype FROM kind k JOIN pg_type t ON t.oid = k.base
        )
        SELECT nullif(max(k.typmod), -1) - 4 FROM kind k
        HAVING bool_or(k.id IN ('varchar'::regtype, 'bpchar'::regtype))
    ), length(p_value)));
END $$;

-- The log row of a call. A value that its column can't hold is changed to fit: the text is cut, the figure is lowered.
CREATE OR REPLACE FUNCTION trueup.row_to_log(
    p_user {{ user_id_type }}, p_task text, p_call_key text, p_log_id text, p_section text, p_model text, p_prompt bigint,
    p_completion bigint, p_total bigint, p_response_ms bigint, p_success boolean, p_error text, p_metadata jsonb,
    p_used_at timestamptz
) RETURNS trueup.owed_charge LANGUAGE sql STABLE AS $$
    SELECT p_user, p_task, p_call_key, p_log_id, p_section, trueup.fitting(p_model, {{ usage_log.model_name() | literal }}),
           trueup.fitting(p_prompt, {{ usage_log.prompt_tokens() | literal }}),
           trueup.fitting(p_completion, {{ usage_log.completion_tokens() | literal }}),
           trueup.fitting(p_total, {{ usage_log.total_tokens() | literal }}),
           trueup.fitting(p_response_ms, {{ usage_log.response_time_ms() | literal }}),
           p_success, p_error, p_metadata, p_used_at, '', '', 1, clock_timestamp(), clock_timestamp()
$$;

-- The id of trueup's next log row. p_derived: the id derived from the call, used if the log's ids are uuid or text.
-- Integer ids come from the column's own sequence, like the host's; they are drawn before the row is written, so that
-- the log's triggers recognise trueup's row. The charge row names the call's log row.
CREATE OR REPLACE FUNCTION trueup.new_log_id(p_derived text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_sequence regclass;
BEGIN
    IF {{ usage_log_id_type | literal }} <> 'bigint' THEN
        RETURN p_derived;
    END IF;
    v_sequence := pg_get_serial_sequence({{ usage_log | literal }}, (parse_ident({{ usage_log.id | literal }}))[1]);
    IF v_sequence IS NULL THEN
        RAISE undefined_column USING MESSAGE = format(
            'column %s of %s no longer owns a sequence', {{ usage_log.id | literal }}, {{ usage_log | literal }});
    END IF;
    RETURN nextval(v_sequence);
END $$;

-- A charge's log id in the type of the log's column. NULL: the charge was recorded when the log's ids had another type.
CREATE OR REPLACE FUNCTION trueup.as_log_id(p_log_id text) RETURNS {{ usage_log_id_type }} LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN p_log_id ~ CASE {{ usage_log_id_type | literal }}
                         WHEN 'uuid' THEN '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                         WHEN 'bigint' THEN '^-?[0-9]{1,19}$' ELSE '' END
                THEN p_log_id::{{ usage_log_id_type }} END
$$;
