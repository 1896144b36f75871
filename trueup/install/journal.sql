{% from "host/rows.sql" import own_row_mark, period_starts, plan_ids, window_start %}
-- The function of the subscriptions' trigger. It appends every change of a counter to the journal (trueup.counter_entry), and
-- the windows and plans of users with grants to trueup.window_change, in the host's own transaction, so none is missed.

{# The columns of a subscription whose change is recorded. The cast fails if the counter does not fit into an entry. #}
{% macro recorded(s) -%}
{{ s }}.{{ subscription.tokens_remaining }}::bigint, {{ s }}.{{ subscription.user_id }}, {{ window_start(s, "clock_timestamp()") }}, {{ plan_ids(s) }},
                                  {{ s }}.{{ subscription.id }}
{%- endmacro %}

{# Append the repeating periods of `s` between the newest record and the present one, if its user has grants. #}
{% macro record_passed_periods(s) -%}
INSERT INTO trueup.window_change (user_id, window_start, token_plan_id, full_plan_id, changed_at)
            SELECT {{ s }}.{{ subscription.user_id }}, t.at, {{ plan_ids(s) }}, t.at
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
            SELECT {{ s }}.{{ subscription.user_id }}, {{ window_start(s, "clock_timestamp()") }}, {{ plan_ids(s) }}, clock_timestamp()
            WHERE EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = {{ s }}.{{ subscription.user_id }});
{%- endmacro %}

{# Append an entry of the journal about the row `s`. #}
{% macro append(s, kind, before, after, writer) -%}
INSERT INTO trueup.counter_entry (user_id, subscription_id, kind, old_counter, new_counter, window_start, token_plan_id,
                                          full_plan_id, at, transaction_id, backend_pid, application_name, written_by)
        VALUES ({{ s }}.{{ subscription.user_id }}, {{ s }}.{{ subscription.id }}::text, '{{ kind }}', {{ before }}, {{ after }},
                {{ window_start(s, "clock_timestamp()") }}, {{ plan_ids(s) }}, clock_timestamp(), pg_current_xact_id()::text::bigint,
                pg_backend_pid(), current_setting('application_name'), {{ writer }});
{%- endmacro %}
{% set before, after = "OLD." ~ subscription.tokens_remaining, "NEW." ~ subscription.tokens_remaining %}

-- The trigger only appends, so the host never waits for it. It never makes the host's statement fail: the first block tries
-- all columns, and an error there (a column that the host renamed, a figure too large for an entry) leaves the change
-- unseen. The journal's insert is outside of that block: a subtransaction that writes, for each row, would make a statement
-- over many rows slow for every session of the server. PL/pgSQL prepares each expression anew in each transaction, so the
-- host's update of a counter has as few expressions as possible.
-- The function compares the columns itself, because a condition or a column list of the trigger would make the host's
-- ALTER TABLE fail, and would miss what another trigger of the host changes. SECURITY DEFINER: the host's role needs no
-- right on trueup's schema. If the subscription itself states the tokens, they are recorded in place of the plan: see
-- trueup.plan_size. An entry is trueup's own if its transaction has the mark, which only trueup can compute.
CREATE OR REPLACE FUNCTION trueup.append_window() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = {{ time_zone }} AS $$
DECLARE
    v_state text;
BEGIN
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            v_state := CASE WHEN ({{ recorded("OLD") }})
                                 IS NOT DISTINCT FROM ({{ recorded("NEW") }})
                                 OR to_regclass('trueup.counter_entry') IS NULL THEN 'same'
                            WHEN (OLD.{{ subscription.user_id }}, {{ window_start("OLD", "clock_timestamp()") }}, {{ plan_ids("OLD") }})
                                 IS NOT DISTINCT FROM (NEW.{{ subscription.user_id }}, {{ window_start("NEW", "clock_timestamp()") }},
                                                       {{ plan_ids("NEW") }})
                                 AND NEW.{{ subscription.user_id }} IS NOT NULL THEN 'counter' ELSE 'window' END
                       || coalesce(current_setting('trueup.own_counter', true), '');
        ELSE
            -- num_nulls reads all columns.
            v_state := CASE WHEN to_regclass('trueup.counter_entry') IS NULL
                                 OR CASE TG_OP WHEN 'INSERT' THEN num_nulls({{ recorded("NEW") }})
                                               ELSE num_nulls({{ recorded("OLD") }}) END < 0 THEN 'same' ELSE 'window' END;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        RETURN NULL;
    END;
    IF v_state = 'counter' THEN
        {{ append("NEW", "changed", before, after, "'host'") }}
        RETURN NULL;
    ELSIF v_state LIKE 'same%' THEN
        RETURN NULL;
    ELSIF v_state LIKE 'counter%' THEN
        v_state := CASE substr(v_state, 8) WHEN {{ own_row_mark("'charge'") }} THEN 'charge'
                                           WHEN {{ own_row_mark("'correction'") }} THEN 'correction' ELSE 'host' END;
        {{ append("NEW", "changed", before, after, "v_state") }}
        RETURN NULL;
    END IF;
    BEGIN
        IF TG_OP = 'UPDATE' THEN
            -- The old window too, because it may be the user's first record.
            {{ record_window("OLD") }}
        END IF;
        IF TG_OP <> 'DELETE' THEN
            {{ record_window("NEW") }}
        END IF;
    EXCEPTION WHEN OTHERS THEN
        NULL;  -- the next settlement finds a change that is not recorded, but not changes in between
    END;
    IF TG_OP = 'UPDATE' THEN
        IF OLD.{{ subscription.user_id }} = NEW.{{ subscription.user_id }} THEN
            {{ append("NEW", "changed", before, after, "'host'") }}
            RETURN NULL;
        END IF;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        IF OLD.{{ subscription.user_id }} IS NOT NULL THEN
            {{ append("OLD", "deleted", before, "NULL", "'host'") }}
        END IF;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        IF NEW.{{ subscription.user_id }} IS NOT NULL THEN
            {{ append("NEW", "created", "NULL", after, "'host'") }}
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
