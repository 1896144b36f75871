{# The user's number among advisory locks; the first is "true" in ASCII. #}
{% macro turn_of(user) -%}
1953658213, hashtext({{ user }}::text)
{%- endmacro %}

{# Queue for the user's balance until the transaction ends. The row lock alone would be correct, but PostgreSQL wakes
   all transactions that wait for a row that each of them updates, so throughput falls steeply with their number. An
   advisory lock wakes one at a time. (Two users may share a number; then one waits briefly for the other.) A
   transaction takes this lock before the row, and only if it locks a single user's row, so it never waits here while it
   holds a row lock. #}
{% macro queue_for(user) -%}
IF NOT pg_try_advisory_xact_lock({{ turn_of(user) }}) THEN
        PERFORM trueup.wait_for_turn({{ user }});
    END IF;
{%- endmacro %}

{# A clause of the functions that tasks and workers call, which read a few rows of large tables. A session may plan them
   while PostgreSQL knows the tables as empty: without it, they would read each table from end to end until autovacuum
   has seen its rows. Compiling a plan takes longer than any of them. #}
{% set by_index = "SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan" %}

{# Refuse as trueup.require_counted() does, which a session asks once a second, or once in `trueup.recount_after` if a
   role or a database sets that: a change of the host's tables is noticed by then. #}
{% macro require_counted() -%}
IF (clock_timestamp() - nullif(current_setting('trueup.counted_at', true), '')::timestamptz BETWEEN interval '0' AND
            coalesce(nullif(current_setting('trueup.recount_after', true), '')::interval, interval '1 second')) IS NOT TRUE
    THEN
        PERFORM trueup.require_counted();
        PERFORM set_config('trueup.counted_at', clock_timestamp()::text, false);
    END IF;
{%- endmacro %}

{# The maximum cost of the calls in flight of the task `p_task` of `p_user`, without the named call. #}
{% macro in_flight(call_key, attempt) -%}
(SELECT coalesce(sum(i.tokens_bound), 0)::bigint FROM trueup.call_intent i
     WHERE i.user_id = p_user AND i.task_id = p_task AND i.outcome = 'started'
       AND (i.call_key, i.attempt) IS DISTINCT FROM ({{ call_key }}, {{ attempt }}))
{%- endmacro %}
