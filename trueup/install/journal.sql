{% from "host/rows.sql" import own_row_mark, period_starts, plan_ids, window_start %}
-- The function of the subscriptions' trigger. It appends every change of a counter to the journal
-- (trueup.counter_entry), and the windows and plans of users with grants to trueup.window_change, in the host's own
-- transaction, so none is missed.

{# Whether period and plans are plain columns and times are in UTC. Then the function reads them by names of pg_catalog
   alone, and needs no settings of its own: to change settings and back took a fifth of the time of a host's update. #}
{% set is_plain = subscription.has_plain_period %}

{# The facts of a subscription that an entry records, in its types. A cast fails where the host has changed the type of
   a column. #}
{% macro user(s) -%}
{{ s }}.{{ subscription.user_id }}::{{ {"bigint": "bigint", "uuid": "pg_catalog.uuid", "text": "pg_catalog.text"}[user_id_type] }}
{%- endmacro %}
{% macro counter(s) -%}
{{ s }}.{{ subscription.tokens_remaining }}::bigint
{%- endmacro %}
{% macro window(s) -%}
{% if is_plain -%}
coalesce(pg_catalog.to_timestamp(pg_catalog.date_part('epoch', {{ s }}.{{ subscription.start_date }})), '-infinity')
{%- else -%}
{{ window_start(s, "clock_timestamp()") }}
{%- endif %}
{%- endmacro %}
{% macro plans(s) -%}
{% if is_plain -%}
{{ subscription.token_plan_id(s) }}::pg_catalog.text, {{ subscription.full_plan_id(s) }}::pg_catalog.text
{%- else -%}
{{ plan_ids(s) }}
{%- endif %}
{%- endmacro %}

{# All columns that an entry records, in its types. #}
{% macro recorded(s) -%}
{{ counter(s) }}, {{ user(s) }}, {{ window(s) }}, {{ plans(s) }}, 'trueup.counter_entry'::pg_catalog.regclass
{%- endmacro %}

{# Whether OLD and NEW have the same user, window and plans. It compares bytes, and so needs no operator of a type. #}
{% macro same_window() -%}
NEW.{{ subscription.user_id }} IS NOT NULL
                AND pg_catalog.record_image_eq(ROW({{ compared("NEW") }}),
                                               ROW({{ compared("OLD") }}))
{%- endmacro %}
{% macro compared(s) -%}
{{ user(s) }}, {% if is_plain %}pg_catalog.date_part('epoch', {{ s }}.{{ subscription.start_date }}){% else %}{{ window(s) }}{% endif %}, {{ plans(s) }}
{%- endmacro %}

{# Append the repeating periods of `s` between the newest record and the present one, if its user has grants. #}
{% macro record_passed_periods(s) -%}
INSERT INTO trueup.window_change (user_id, window_start, token_plan_id, full_plan_id, changed_at)
            SELECT {{ s }}.{{ subscription.user_id }}, t.at, {{ plans(s) }}, t.at
            FROM (SELECT c.window_start FROM trueup.window_change c WHERE c.user_id = {{ s }}.{{ subscription.user_id }}
                  ORDER BY c.id DESC LIMIT 1) n
            CROSS JOIN LATERAL (
                {{ period_starts(s, "n.window_start", window_start(s, "clock_timestamp()")) }}) t
            WHERE EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = {{ s }}.{{ subscription.user_id }})
            ORDER BY t.at;
{%- endmacro %}

{# Append the window of the subscription row `s`, if its user has grants.

A trigger dates the change by the server's clock, as all functions of trueup do outside of tests. The usage log may have
the host's clock. If the clocks differ by some seconds, usage in these seconds may count against the plan before or
after the change. Nothing else depends on it, because windows begin at `start_date`. #}
{% macro record_window(s) -%}
{% if subscription.anchor -%}
-- First the periods that came and went since the newest record, with the plan that counted until now.
            {{ record_passed_periods(s) }}
            {% endif -%}
INSERT INTO trueup.window_change (user_id, window_start, token_plan_id, full_plan_id, changed_at)
            SELECT {{ user(s) }}, {{ window(s) }}, {{ plans(s) }}, pg_catalog.clock_timestamp()
            WHERE EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id OPERATOR(pg_catalog.=) {{ user(s) }});
{%- endmacro %}

{# Append an entry of the journal about the row `s`. #}
{% macro append(s, kind, before, after) -%}
INSERT INTO trueup.counter_entry (user_id, subscription_id, kind, old_counter, new_counter, window_start, token_plan_id,
                                      full_plan_id, at, transaction_id, backend_pid, application_name, written_by)
    VALUES ({{ user(s) }}, {{ s }}.{{ subscription.id }}::pg_catalog.text, '{{ kind }}', {{ before }}, {{ after }},
            {{ window(s) }}, {{ plans(s) }}, pg_catalog.clock_timestamp(), pg_catalog.pg_current_xact_id(),
            pg_catalog.pg_backend_pid(), pg_catalog.current_setting('application_name'),
            v_writer);
{%- endmacro %}

-- Who writes the counter. An entry is trueup's own if its transaction has the mark, which only trueup can compute.
CREATE OR REPLACE FUNCTION trueup.counter_writer() RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN CASE current_setting('trueup.own_counter', true)
        WHEN {{ own_row_mark("'charge'") }} THEN 'charge' WHEN {{ own_row_mark("'correction'") }} THEN 'correction'
        ELSE 'host' END;
END $$;

-- The trigger only appends, so the host never waits for it. It never makes the host's statement fail: the first block
-- tries all columns, their casts and the journal's name, and an error there (a column that the host renamed, a figure
-- too large for an entry) leaves the change unseen. The journal's insert is outside of that block: a subtransaction
-- that writes, for each row, would make a statement over many rows slow for every session of the server. The function
-- compares the columns itself, because a condition or a column list of the trigger would make the host's ALTER TABLE
-- fail, and would miss what another trigger of the host changes. PL/pgSQL prepares each expression anew in each
-- transaction, so the update of a counter alone has as few and as small expressions as possible. SECURITY DEFINER: the
-- host's role needs no right on trueup's schema. Without a search path of its own, so each name, operator and type in
-- it names its schema: otherwise the session would choose what runs with the owner's rights.
CREATE OR REPLACE FUNCTION trueup.append_window() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER{% if not is_plain %} SET search_path = pg_catalog, pg_temp SET timezone = {{ time_zone }}{% endif %} AS $$
DECLARE
    v_writer pg_catalog.text := 'host';
BEGIN
    -- In a statement of its own, which a host's transaction never runs: after half a detach the function is gone.
    IF pg_catalog.current_setting('trueup.own_counter', true) OPERATOR(pg_catalog.<>) '' THEN
        v_writer := trueup.counter_writer();
    END IF;
    <<more_than_the_counter>>
    BEGIN
        BEGIN
            -- No subscription is the journal. Its name is here so that a journal that is gone is an error here.
            EXIT more_than_the_counter WHEN (TG_OP OPERATOR(pg_catalog.=) 'UPDATE' AND {{ same_window() }}
                AND TG_RELID OPERATOR(pg_catalog.<>) 'trueup.counter_entry'::pg_catalog.regclass) IS NOT TRUE;
            IF coalesce({{ counter("NEW") }} OPERATOR(pg_catalog.=) {{ counter("OLD") }},
                        {{ counter("NEW") }} IS NULL AND {{ counter("OLD") }} IS NULL) THEN
                RETURN NULL;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            RETURN NULL;
        END;
        {{ append("NEW", "changed", counter("OLD"), counter("NEW")) }}
        RETURN NULL;
    END;
    BEGIN
        -- num_nulls reads all columns.
        IF TG_OP OPERATOR(pg_catalog.<>) 'INSERT' AND pg_catalog.num_nulls({{ recorded("OLD") }}) OPERATOR(pg_catalog.<) 0
           OR TG_OP OPERATOR(pg_catalog.<>) 'DELETE' AND pg_catalog.num_nulls({{ recorded("NEW") }}) OPERATOR(pg_catalog.<) 0
        THEN
            RETURN NULL;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        RETURN NULL;
    END;
    BEGIN
        IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
            -- The old window too, because it may be the user's first record.
            {{ record_window("OLD") }}
        END IF;
        IF TG_OP OPERATOR(pg_catalog.<>) 'DELETE' THEN
            {{ record_window("NEW") }}
        END IF;
    EXCEPTION WHEN OTHERS THEN
        NULL;  -- the next settlement finds a change that is not recorded, but not changes in between
    END;
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
        IF {{ user("OLD") }} OPERATOR(pg_catalog.=) {{ user("NEW") }} THEN
            {{ append("NEW", "changed", counter("OLD"), counter("NEW")) }}
            RETURN NULL;
        END IF;
    END IF;
    IF TG_OP OPERATOR(pg_catalog.<>) 'INSERT' THEN
        IF OLD.{{ subscription.user_id }} IS NOT NULL THEN
            {{ append("OLD", "deleted", counter("OLD"), "NULL") }}
        END IF;
    END IF;
    IF TG_OP OPERATOR(pg_catalog.<>) 'DELETE' THEN
        IF NEW.{{ subscription.user_id }} IS NOT NULL THEN
            {{ append("NEW", "created", "NULL", counter("NEW")) }}
        END IF;
    END IF;
    RETURN NULL;
END $$;

-- Since when no change of a counter goes unseen; null: the trigger is not there, or it was replaced since.
CREATE OR REPLACE FUNCTION trueup.journal_since() RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT j.started_at FROM trueup.journal_start j
    JOIN pg_trigger g ON j.trigger_mark = g.oid || ':' || g.xmin
    WHERE g.tgrelid = to_regclass({{ subscription | literal }}) AND g.tgname = 'trueup_window_changed'
      AND g.tgenabled IN ('O', 'A')
    ORDER BY j.id DESC LIMIT 1
$$;
