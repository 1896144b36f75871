{% from "host/search_path.sql" import own_search_path, role_search_path %}
{# Write trueup's own row into the usage log, and add it to the consumed tokens of the account `a`. In PL/pgSQL, with the
   parameters of trueup.record_charge; sets v_counted, the tokens that count in the window, and v_logged_id, the id of
   the row; both are null if a trigger of the host's dropped the row. #}
{% macro write_log_row(success, created_at) %}
        p_log_id := trueup.new_log_id(p_log_id);
        -- Without a balance this transaction holds no lock, and another may create the balance meanwhile. Then the row is
        -- not marked as trueup's own, and its trigger appends a delta.
        PERFORM set_config('trueup.own_log_id', CASE WHEN a.consumed IS NULL THEN '' ELSE p_log_id END, true);
        -- Check the row's foreign keys with the row, before the counter is locked. Django defers foreign keys to the commit,
        -- and a host that locks the user's row and then the counter's would deadlock with this transaction. Triggers that the
        -- host defers run now too, in the role's search path.
        SET CONSTRAINTS ALL IMMEDIATE;
        INSERT INTO {{ usage_log }} AS l ({{ usage_log.written() }})
        OVERRIDING SYSTEM VALUE  -- p_log_id comes from the column's sequence even if the column is GENERATED ALWAYS
        SELECT {{ usage_log.written("r") }}
        FROM (SELECT p_log_id::{{ usage_log_id_type }} AS id, p_user AS user_id, p_section AS section,
                     p_prompt AS prompt_tokens, p_completion AS completion_tokens, p_total AS total_tokens,
                     p_response_ms AS response_time_ms, {{ success }} AS success, p_model AS model_name,
                     p_metadata AS metadata, {{ created_at }} AS created_at) r
        CROSS JOIN {{ role_search_path() }}
        -- A failed call gets no row if the log has no way to mark it as failed.
        WHERE {{ success }} OR {{ usage_log.tells_failure() }}
        -- Read the row as stored: a trigger of the host's may have changed or dropped it.
        RETURNING coalesce(CASE WHEN {{ usage_log.success("l") }}
                                     AND l.{{ usage_log.created_at }} >= coalesce(a.window_start, '-infinity')
                                THEN l.{{ usage_log.total_tokens }} END, 0),
                  l.{{ usage_log.id }}::text INTO v_counted, v_logged_id;
        {{ own_search_path() }}
        PERFORM set_config('trueup.own_log_id', '', true);
        IF v_logged_id = p_log_id THEN  -- with another id, the log's trigger has appended a delta, as for a host's row
            a.consumed := a.consumed + v_counted;
        END IF;
{% endmacro %}
