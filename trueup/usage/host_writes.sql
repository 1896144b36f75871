{% from "host/rows.sql" import can_be_lowered, lowered_counter %}
{% from "host/search_path.sql" import own_search_path, role_search_path %}
{# trueup's own writes to the host's tables, in functions of PL/pgSQL. The caller runs them in a subtransaction, because
   the host may refuse them. #}

{# Check the host's constraints with each statement. A constraint or a trigger of the host's that waits for the commit
   would refuse the charge with it. And the row's foreign keys are checked before the counter is locked: Django defers
   foreign keys to the commit, and a host that locks the user's row and then the counter's would deadlock with this
   transaction. #}
{% macro check_at_once() -%}
SET CONSTRAINTS ALL IMMEDIATE;
{%- endmacro %}

{# The tokens of the log row `l` that count in a window that begins at `window`. #}
{% macro counted(window) -%}
CASE WHEN {{ usage_log.success("l") }} AND l.{{ usage_log.created_at }} >= coalesce({{ window }}, '-infinity')
                     THEN l.{{ usage_log.total_tokens }}::bigint END
{%- endmacro %}

{# Insert the row of `o` (trueup.owed_charge) with the id `v_id` into the log. Sets the variables `log_id` and
   `counted`, both NULL if a trigger of the host's dropped the row or wrote it into another table. `mark`: by which the
   log's triggers recognise trueup's row; NULL: they append a delta for it. #}
{% macro insert_log_row(mark, window, log_id="log_id", tokens="counted") -%}
INSERT INTO {{ usage_log }} AS l ({{ usage_log.written() }})
    OVERRIDING SYSTEM VALUE  -- the id comes from the column's sequence even if the column is GENERATED ALWAYS
    SELECT {{ usage_log.written("r") }}
    FROM (SELECT v_id::{{ usage_log_id_type }} AS id, o.user_id AS user_id, o.section AS section,
                 o.prompt_tokens AS prompt_tokens, o.completion_tokens AS completion_tokens,
                 o.total_tokens AS total_tokens, o.response_time_ms AS response_time_ms, o.success AS success,
                 o.model_name AS model_name, o.metadata AS metadata, o.used_at AS created_at) r
    CROSS JOIN {{ role_search_path("trueup.own_row", "coalesce(" ~ mark ~ ", '')") }}
    -- A failed call gets no row if the log has no way to mark it as failed.
    WHERE o.success OR {{ usage_log.records_failure() }}
    -- Read the row as stored: a trigger of the host's may have changed it.
    RETURNING l.{{ usage_log.id }}::text, {{ counted(window) }} INTO {{ log_id }}, {{ tokens }};
    {{ own_search_path("trueup.own_row") }}
{%- endmacro %}

{# Whether the user has a limit. #}
{% macro is_limited(user) -%}
{% if subscription.unlimited %}
NOT EXISTS (SELECT FROM trueup.entitlements(clock_timestamp()) e
                      WHERE e.user_id = {{ user }} AND e.plan_kind = 'unlimited')
{%- else -%}
true
{%- endif %}
{%- endmacro %}

{# Lower the legacy counter by these tokens, so that usage recorded by trueup causes no drift. If the host has locked
   the row, this does not wait: `lowered` becomes false, and the next reconcile run corrects the counter. The counter
   stops at zero, as the host's own decrements do; a counter that counts up is raised. A counter that is 0, null or
   below 0 cannot be lowered, and one without a limit is left alone: these count as done (true). `user`, `tokens`:
   qualified, because the host may have columns of any name. `mark`: by which the journal recognises trueup's write. It
   must call no function of trueup's, which would resolve its names in the role's path. #}
{% macro lower_counter(user, tokens, mark, lowered) -%}
UPDATE {{ subscription }} s
    SET {{ subscription.tokens_remaining }} = {{ lowered_counter("s", tokens) }}
    FROM {{ role_search_path("trueup.own_counter", mark) }}
    WHERE s.{{ subscription.id }} = (
        SELECT f.{{ subscription.id }} FROM {{ subscription }} f WHERE f.{{ subscription.user_id }} = {{ user }}
        ORDER BY f.{{ subscription.id }} LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
      AND {{ can_be_lowered("s") }} AND {{ is_limited(user) }};
    {{ lowered }} := FOUND;
    {{ own_search_path("trueup.own_counter") }}
    IF NOT {{ lowered }} THEN
        {{ lowered }} := NOT EXISTS (
            SELECT FROM {{ subscription }} s
            WHERE s.{{ subscription.user_id }} = {{ user }} AND {{ can_be_lowered("s") }} AND {{ is_limited(user) }});
    END IF;
{%- endmacro %}
