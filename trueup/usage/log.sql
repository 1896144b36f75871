{% from "gate/shared.sql" import by_index, queue_for %}
{% from "gate/store_balance.sql" import store_balance %}
{% from "host/search_path.sql" import own_search_path, role_search_path %}
-- Usage that host code reports about its own calls: no hold, no task, one log row for each idempotency key.

-- Record usage once for its key: log row, charge row, balance and counter in one transaction. If the key was recorded
-- before, nothing changes: `recorded` is false, and `differs` is true if its log row has other figures than these.
-- `log_id`: the id of the existing or the new log row. `owed_because`: why the log refused the row, which is owed then.
-- p_created_at NULL: now. A host's clock may be ahead of the database's: a time up to p_skew after now becomes now;
-- with a later time `in_future` is true, and nothing is written. Nothing is written either of a figure that its column
-- of the log can't hold, and `too_large` names it. The charge has the tokens that count in the current window: 0 if the
-- call failed, or was made before the window.
CREATE OR REPLACE FUNCTION trueup.record_usage(
    p_user {{ user_id_type }}, p_task text, p_call_key text, p_log_id text, p_section text, p_prompt bigint,
    p_completion bigint, p_total bigint, p_response_ms bigint, p_success boolean, p_model text, p_error text,
    p_metadata jsonb, p_created_at timestamptz, p_skew interval, INOUT at timestamptz,
    OUT recorded boolean, OUT differs boolean, OUT in_future boolean, OUT too_large text, OUT log_id text,
    OUT owed_because text
) LANGUAGE plpgsql {{ by_index }} AS $$
DECLARE
    a record;
    o trueup.owed_charge;
    w record;
    v_at timestamptz;
BEGIN
    {{ queue_for("p_user") }}
    SELECT * INTO a FROM trueup.lock_charged_account(p_user, at, false);
    at := a.at;
    v_at := coalesce(least(p_created_at, at), trueup.log_time(at, CASE WHEN a.subscribed THEN a.window_start END));
    in_future := coalesce(p_created_at > at + p_skew, false);
    SELECT c.log_id INTO log_id FROM trueup.charge c
    WHERE c.user_id = p_user AND c.task_id = p_task AND c.call_key = p_call_key;
    o := trueup.row_to_log(p_user, p_task, p_call_key, p_log_id, p_section, p_model, p_prompt, p_completion, p_total,
                           p_response_ms, p_success, p_error, p_metadata, v_at);
    too_large := CASE WHEN o.prompt_tokens < p_prompt THEN 'prompt_tokens'
                      WHEN o.completion_tokens < p_completion THEN 'completion_tokens'
                      WHEN o.total_tokens < p_total THEN 'total_tokens'
                      WHEN o.response_time_ms < p_response_ms THEN 'response_time_ms' END;
    recorded := NOT in_future AND too_large IS NULL AND log_id IS NULL;
    differs := false;
    IF recorded THEN
        SELECT * INTO w FROM trueup.log_or_owe(o, a.window_start, a.consumed IS NOT NULL, false);
        a.consumed := a.consumed + w.own;
        log_id := w.log_id;
        owed_because := w.refusal;
        INSERT INTO trueup.charge (user_id, task_id, call_key, attempt, log_id, section, model_name,
                                   tokens_total, tokens_covered, late, charged_at, counter_lowered)
        -- Reported usage has no hold, so all of it counts as covered.
        VALUES (p_user, p_task, p_call_key, 1, log_id, p_section, o.model_name, greatest(w.counted, 0),
                greatest(w.counted, 0), false, at,
                w.counted <= 0 OR w.may_lower AND trueup.lower_counter(p_user, w.counted));
    {% if not usage_log.is_written_by_host %}
    ELSIF log_id IS NOT NULL THEN
        SELECT ({{ usage_log.prompt_tokens.column("l") or "record_usage.p_prompt" }},
                {{ usage_log.completion_tokens.column("l") or "record_usage.p_completion" }}, l.{{ usage_log.total_tokens }},
                {% if usage_log.section.column("l") %}{{ usage_log.section("l") }}::text{% else %}record_usage.p_section{% endif %},
                {{ usage_log.model_name.column("l") or "record_usage.p_model" }})
               IS DISTINCT FROM (record_usage.p_prompt, record_usage.p_completion, record_usage.p_total,
                                 record_usage.p_section, o.model_name) INTO differs
        FROM {{ usage_log }} l WHERE l.{{ usage_log.id }} = trueup.as_log_id(record_usage.log_id);
        differs := coalesce(differs, false);
    {% endif %}
    END IF;
{{ store_balance("p_user") }}
END $$;

-- Store a call's error in its log row, for trueup.try_log_row: in the error column, else in the metadata; if the log
-- has neither, or the host refuses the update, the error is not stored.
CREATE OR REPLACE FUNCTION trueup.note_error(p_log_id text, p_error text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_error text;
BEGIN
    IF EXISTS (SELECT FROM pg_attribute t
               WHERE t.attrelid = CAST({{ usage_log | literal }} AS regclass) AND t.attnum > 0 AND NOT t.attisdropped
                 AND '"' || replace(t.attname, '"', '""') || '"' = {{ usage_log.error_message | literal }}) THEN
        v_error := trueup.fitting(p_error, {{ usage_log.error_message | literal }});
        UPDATE {{ usage_log }} AS l SET {{ usage_log.error_message }} = v_error
        FROM {{ role_search_path() }}
        WHERE l.{{ usage_log.id }} = note_error.p_log_id::{{ usage_log_id_type }};
    {% if usage_log.metadata %}
    ELSE
        UPDATE {{ usage_log }} AS l
        SET {{ usage_log.metadata() }} = {{ usage_log.metadata("l") }}::jsonb || jsonb_build_object('error', note_error.p_error)
        FROM {{ role_search_path() }}
        WHERE l.{{ usage_log.id }} = note_error.p_log_id::{{ usage_log_id_type }};
    {% endif %}
    END IF;
    {{ own_search_path() }}
EXCEPTION WHEN query_canceled OR OTHERS THEN
    -- A host may keep its log append-only, or its trigger may take too long. The row counts more than its text. The
    -- rollback restores the search path.
    IF trueup.is_transient(SQLSTATE) THEN
        RAISE;
    END IF;
END $$;
