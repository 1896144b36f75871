-- Usage that host code reports of calls it made itself: no hold, no task; one row in the log for each key.

-- Lower the legacy counter, so that usage of ours never drifts. A host that has the row locked is not waited for: then
-- this returns false, and the next reconcile sets the counter right. Like the host's, the counter stops at zero. One that
-- has nothing to lower (0, null, below 0) misses nothing.
CREATE OR REPLACE FUNCTION trueup.lower_counter(p_user {{user_id_type}}, p_tokens bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE {{subscription}} s
    SET {{subscription.tokens_remaining}} = greatest(s.{{subscription.tokens_remaining}} - lower_counter.p_tokens, 0)
    WHERE s.{{subscription.id}} = (
        SELECT f.{{subscription.id}} FROM {{subscription}} f WHERE f.{{subscription.user_id}} = lower_counter.p_user
        ORDER BY f.{{subscription.id}} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
      AND s.{{subscription.tokens_remaining}} > 0;
    RETURN FOUND OR NOT EXISTS (
        SELECT FROM {{subscription}} s
        WHERE s.{{subscription.user_id}} = lower_counter.p_user AND s.{{subscription.tokens_remaining}} > 0);
END $$;

-- Record usage once for its key: log row, charge row, balance and counter in one transaction. A key that is there already
-- is left alone: `recorded` false, and `differs` says whether its row in the log shows other figures than these.
-- `log_id`: that row, or the one written now.
-- p_created_at NULL: now. A host's clock may be ahead of ours: up to p_skew later than now is now, later is `in_future`,
-- and nothing is written.
-- The charge says what counts against the window of now: nothing, if the usage failed or lies before it.
CREATE OR REPLACE FUNCTION trueup.record_usage(
    p_user {{user_id_type}}, p_task text, p_call_key text, p_log_id text, p_section text, p_prompt integer,
    p_completion integer, p_total integer, p_response_ms integer, p_success boolean, p_model text, p_error text,
    p_metadata jsonb, p_created_at timestamptz, p_skew interval, INOUT at timestamptz,
    OUT recorded boolean, OUT differs boolean, OUT in_future boolean, OUT log_id text
) LANGUAGE plpgsql AS $$
DECLARE
    a record;
    v_at timestamptz;
    v_counted bigint;
    v_own boolean;
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
    p_model := trueup.fitting(p_model, {{literal usage_log.model_name}});
    IF recorded THEN
        p_log_id := trueup.new_log_id(p_log_id);
        -- Without a balance we hold no lock, and one may be built beside us: then the row makes its delta as anyone's.
        PERFORM set_config('trueup.own_log_id', CASE WHEN a.consumed IS NULL THEN '' ELSE p_log_id END, true);
        INSERT INTO {{usage_log}} AS l ({{usage_log.written}})
        OVERRIDING SYSTEM VALUE  -- an id that is GENERATED ALWAYS is drawn from its sequence all the same
        SELECT r.{{usage_log.written}}
        FROM (SELECT p_log_id::{{usage_log_id_type}} AS id, p_user AS user_id, p_section AS section,
                     p_prompt AS prompt_tokens, p_completion AS completion_tokens, p_total AS total_tokens,
                     p_response_ms AS response_time_ms, p_success AS success, p_model AS model_name,
                     p_metadata AS metadata, v_at AS created_at) r
        -- A log that can't say of a row that its call failed has no rows of such calls.
        WHERE p_success OR {{usage_log.tells_failure}}
        -- As it was logged: a trigger of the host's may have changed or dropped the row.
        RETURNING CASE WHEN l.{{usage_log.success}}
                            AND l.{{usage_log.created_at}} >= coalesce(a.window_start, '-infinity'::timestamptz)
                       THEN l.{{usage_log.total_tokens}} END,
                  l.{{usage_log.id}}::text INTO v_counted, log_id;
        PERFORM set_config('trueup.own_log_id', '', true);
        v_own := log_id = p_log_id;
        log_id := coalesce(log_id, p_log_id);
        PERFORM trueup.note_error(log_id, p_error);
        v_counted := coalesce(v_counted, 0);
        IF v_own THEN  -- else it has another id by now, and has made its delta as anyone's
            a.consumed := a.consumed + v_counted;
        END IF;
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
        SELECT (l.{{usage_log.prompt_tokens else record_usage.p_prompt}},
                l.{{usage_log.completion_tokens else record_usage.p_completion}}, l.{{usage_log.total_tokens}},
                l.{{usage_log.section else record_usage.p_section}},
                l.{{usage_log.model_name else record_usage.p_model}})
               IS DISTINCT FROM (record_usage.p_prompt, record_usage.p_completion, record_usage.p_total,
                                 record_usage.p_section, record_usage.p_model) INTO differs
        FROM {{usage_log}} l WHERE l.{{usage_log.id}} = trueup.as_log_id(record_usage.log_id);
        differs := coalesce(differs, false);
    END IF;
    UPDATE trueup.balance b SET window_start = a.window_start, log_epoch = a.log_epoch,
                                consumed = a.consumed, held = a.held
    WHERE b.user_id = p_user AND a.consumed IS NOT NULL;  -- or one was built beside us, and is right as it is
END $$;

-- Say in a row of the log what went wrong; for trueup.record_usage. A host may lack the column: then among its metadata;
-- and those as well: then nowhere.
CREATE OR REPLACE FUNCTION trueup.note_error(p_log_id text, p_error text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF p_error IS NULL THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM pg_attribute t
               WHERE t.attrelid = CAST({{literal usage_log}} AS regclass) AND t.attnum > 0 AND NOT t.attisdropped
                 AND '"' || replace(t.attname, '"', '""') || '"' = {{literal usage_log.error_message}}) THEN
        UPDATE {{usage_log}} AS l
        SET {{usage_log.error_message}} = trueup.fitting(note_error.p_error, {{literal usage_log.error_message}})
        WHERE l.{{usage_log.id}} = note_error.p_log_id::{{usage_log_id_type}};
    {{if usage_log.metadata}}
    ELSE
        UPDATE {{usage_log}} AS l
        SET {{usage_log.metadata}} = l.{{usage_log.metadata}}::jsonb || jsonb_build_object('error', note_error.p_error)
        WHERE l.{{usage_log.id}} = note_error.p_log_id::{{usage_log_id_type}};
    {{end}}
    END IF;
END $$;
