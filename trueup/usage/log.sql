{% from "host/search_path.sql" import own_search_path, role_search_path %}
{% from "gate/store_balance.sql" import store_balance %}
{% from "usage/log_row.sql" import write_log_row %}
-- Usage that host code reports about its own calls: no hold, no task, one log row for each idempotency key.

-- Lower the legacy counter, so that usage recorded by trueup causes no drift. If the host has locked the row, this does
-- not wait: it returns false, and the next reconcile run corrects the counter. The counter stops at zero, as the host's
-- own decrements do. A counter that is 0, null or below 0 cannot be lowered, and counts as done (true).
CREATE OR REPLACE FUNCTION trueup.lower_counter(p_user {{ user_id_type }}, p_tokens bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_lowered boolean;
BEGIN
    UPDATE {{ subscription }} s
    SET {{ subscription.tokens_remaining }} = greatest(s.{{ subscription.tokens_remaining }} - lower_counter.p_tokens, 0)
    FROM {{ role_search_path() }}
    WHERE s.{{ subscription.id }} = (
        SELECT f.{{ subscription.id }} FROM {{ subscription }} f WHERE f.{{ subscription.user_id }} = lower_counter.p_user
        ORDER BY f.{{ subscription.id }} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
      AND s.{{ subscription.tokens_remaining }} > 0;
    v_lowered := FOUND;
    {{ own_search_path() }}
    RETURN v_lowered OR NOT EXISTS (
        SELECT FROM {{ subscription }} s
        WHERE s.{{ subscription.user_id }} = lower_counter.p_user AND s.{{ subscription.tokens_remaining }} > 0);
END $$;

-- Record usage once for its key: log row, charge row, balance and counter in one transaction. If the key was recorded
-- before, nothing changes: `recorded` is false, and `differs` is true if its log row has other figures than these.
-- `log_id`: the id of the existing or the new log row.
-- p_created_at NULL: now. A host's clock may be ahead of the database's: a time up to p_skew after now becomes now; with
-- a later time `in_future` is true, and nothing is written.
-- The charge has the tokens that count in the current window: 0 if the call failed, or was made before the window.
CREATE OR REPLACE FUNCTION trueup.record_usage(
    p_user {{ user_id_type }}, p_task text, p_call_key text, p_log_id text, p_section text, p_prompt integer,
    p_completion integer, p_total integer, p_response_ms integer, p_success boolean, p_model text, p_error text,
    p_metadata jsonb, p_created_at timestamptz, p_skew interval, INOUT at timestamptz,
    OUT recorded boolean, OUT differs boolean, OUT in_future boolean, OUT log_id text
) LANGUAGE plpgsql AS $$
DECLARE
    a record;
    v_at timestamptz;
    v_counted bigint;
    v_logged_id text;
    v_lowered boolean := true;
BEGIN
    PERFORM trueup.queue_for(p_user);
    SELECT * INTO a FROM trueup.lock_account(p_user, at);
    at := a.at;
    v_at := coalesce(least(p_created_at, at), trueup.dated(at, CASE WHEN a.subscribed THEN a.window_start END));
    in_future := coalesce(p_created_at > at + p_skew, false);
    SELECT c.log_id INTO log_id FROM trueup.charge c
    WHERE c.user_id = p_user AND c.task_id = p_task AND c.call_key = p_call_key;
    recorded := NOT in_future AND log_id IS NULL;
    differs := false;
    p_model := trueup.fitting(p_model, {{ usage_log.model_name() | literal }});
    IF recorded THEN
{{ write_log_row("p_success", "v_at") }}
        log_id := coalesce(v_logged_id, p_log_id);
        PERFORM trueup.note_error(log_id, p_error);
        v_counted := coalesce(v_counted, 0);
        IF v_counted > 0 THEN
            v_lowered := trueup.lower_counter(p_user, v_counted);
        END IF;
        INSERT INTO trueup.charge (user_id, task_id, call_key, attempt, log_id, section, model_name,
                                   tokens_total, tokens_covered, late, charged_at, counter_lowered)
        -- Reported usage has no hold, so all of it counts as covered.
        VALUES (p_user, p_task, p_call_key, 1, log_id, p_section, p_model,
                greatest(v_counted, 0), greatest(v_counted, 0), false, at, v_lowered);
    ELSIF NOT in_future THEN
        SELECT ({{ usage_log.prompt_tokens.column("l") or "record_usage.p_prompt" }},
                {{ usage_log.completion_tokens.column("l") or "record_usage.p_completion" }}, l.{{ usage_log.total_tokens }},
                {{ usage_log.section.column("l") or "record_usage.p_section" }},
                {{ usage_log.model_name.column("l") or "record_usage.p_model" }})
               IS DISTINCT FROM (record_usage.p_prompt, record_usage.p_completion, record_usage.p_total,
                                 record_usage.p_section, record_usage.p_model) INTO differs
        FROM {{ usage_log }} l WHERE l.{{ usage_log.id }} = trueup.as_log_id(record_usage.log_id);
        differs := coalesce(differs, false);
    END IF;
{{ store_balance("p_user") }}
END $$;

-- Store a call's error in its log row, for trueup.record_usage: in the error column, else in the metadata; if the log has
-- neither, the error is not stored.
CREATE OR REPLACE FUNCTION trueup.note_error(p_log_id text, p_error text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_error text;
BEGIN
    IF p_error IS NULL THEN
        RETURN;
    END IF;
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
END $$;
