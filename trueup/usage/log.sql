{% from "gate/store_balance.sql" import store_balance %}
{% from "usage/log_row.sql" import write_log_row %}
-- Usage that host code reports of calls it made itself: no hold, no task; one row in the log for each key.

-- Lower the legacy counter, so that usage of ours never drifts. A host that has the row locked is not waited for: then
-- this returns false, and the next reconcile sets the counter right. Like the host's, the counter stops at zero. One that
-- has nothing to lower (0, null, below 0) misses nothing.
CREATE OR REPLACE FUNCTION trueup.lower_counter(p_user {{ user_id_type }}, p_tokens bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE {{ subscription }} s
    SET {{ subscription.tokens_remaining }} = greatest(s.{{ subscription.tokens_remaining }} - lower_counter.p_tokens, 0)
    WHERE s.{{ subscription.id }} = (
        SELECT f.{{ subscription.id }} FROM {{ subscription }} f WHERE f.{{ subscription.user_id }} = lower_counter.p_user
        ORDER BY f.{{ subscription.id }} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
      AND s.{{ subscription.tokens_remaining }} > 0;
    RETURN FOUND OR NOT EXISTS (
        SELECT FROM {{ subscription }} s
        WHERE s.{{ subscription.user_id }} = lower_counter.p_user AND s.{{ subscription.tokens_remaining }} > 0);
END $$;

-- Record usage once for its key: log row, charge row, balance and counter in one transaction. A key that is there already
-- is left alone: `recorded` false, and `differs` says whether its row in the log shows other figures than these.
-- `log_id`: that row, or the one written now.
-- p_created_at NULL: now. A host's clock may be ahead of ours: up to p_skew later than now is now, later is `in_future`,
-- and nothing is written.
-- The charge says what counts against the window of now: nothing, if the usage failed or lies before it.
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
        -- The row's foreign key is checked now, before the counter is locked: Django's are deferred to the commit, and
        -- a host that has the user's row and then wants the counter's would deadlock with us.
        SET CONSTRAINTS ALL IMMEDIATE;
        IF v_counted > 0 THEN
            v_lowered := trueup.lower_counter(p_user, v_counted);
        END IF;
        INSERT INTO trueup.charge (user_id, task_id, call_key, attempt, log_id, section, model_name,
                                   tokens_total, tokens_covered, late, charged_at, counter_lowered)
        -- No hold was to cover it, so none is exceeded.
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

-- Say in a row of the log what went wrong; for trueup.record_usage. A host may lack the column: then among its metadata;
-- and those as well: then nowhere.
CREATE OR REPLACE FUNCTION trueup.note_error(p_log_id text, p_error text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF p_error IS NULL THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM pg_attribute t
               WHERE t.attrelid = CAST({{ usage_log | literal }} AS regclass) AND t.attnum > 0 AND NOT t.attisdropped
                 AND '"' || replace(t.attname, '"', '""') || '"' = {{ usage_log.error_message | literal }}) THEN
        UPDATE {{ usage_log }} AS l
        SET {{ usage_log.error_message }} = trueup.fitting(note_error.p_error, {{ usage_log.error_message | literal }})
        WHERE l.{{ usage_log.id }} = note_error.p_log_id::{{ usage_log_id_type }};
    {% if usage_log.metadata %}
    ELSE
        UPDATE {{ usage_log }} AS l
        SET {{ usage_log.metadata() }} = {{ usage_log.metadata("l") }}::jsonb || jsonb_build_object('error', note_error.p_error)
        WHERE l.{{ usage_log.id }} = note_error.p_log_id::{{ usage_log_id_type }};
    {% endif %}
    END IF;
END $$;
