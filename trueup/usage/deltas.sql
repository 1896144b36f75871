-- The usage log's triggers only append to trueup.usage_delta: there is no row for two writers to meet at, so a
-- host's transaction never waits for us. SECURITY DEFINER: the host's role needs no right on our schema.
-- A row of ours, written by trueup.record_charge, has been added to its balance already and is passed over.
-- They call no function of ours: that could be missing for a moment, and the host's statement would fail.
-- Times without a zone are UTC, whatever zone the host's session is in.

{% macro return_unless_of_the_log() %}
    -- A partition's triggers, or those of a table that inherits, have an argument. Once it is detached its rows are not the
    -- log's, and they pass them over; so while it is being detached, when nobody who reads the log sees them any more.
    IF TG_NARGS > 0 THEN
        IF NOT EXISTS (
            WITH RECURSIVE above (id) AS (
                SELECT TG_RELID
                UNION
                SELECT i.inhparent FROM pg_inherits i JOIN above a ON i.inhrelid = a.id WHERE NOT i.inhdetachpending
            )
            SELECT FROM above a JOIN pg_trigger g ON g.tgrelid = a.id AND g.tgname = TG_NAME AND g.tgnargs = 0
        ) THEN
            RETURN NULL;
        END IF;
    END IF;
{% endmacro %}

{% macro return_unless_columns_fit(rows) %}
    -- A host that has renamed or dropped a column, or given it another type, goes on too: its rows are not counted then, and
    -- the gate is closed by that (trueup.require_watched) until it is attached anew. Where the mapping's condition fits its
    -- columns no more, it may also be a function that is gone, which closes nothing: each balance is stale then. This looks
    -- at the columns, reads no row, and is planned once; to ask the catalog with each statement made a host's insert half as
    -- dear again.
    BEGIN
        PERFORM r.{{ usage_log.user_id }}, r.{{ usage_log.created_at }}, r.{{ usage_log.total_tokens }},
                {{ usage_log.success("r") }}, r.{{ usage_log.id }}::text FROM {{ rows }} r WHERE false
        UNION ALL SELECT NULL::{{ user_id_type }}, NULL::timestamptz, NULL::bigint, NULL::boolean, NULL WHERE false;
    EXCEPTION
        WHEN undefined_column OR datatype_mismatch THEN
            RETURN NULL;
        WHEN undefined_function THEN
            INSERT INTO trueup.log_truncation DEFAULT VALUES;
            RETURN NULL;
    END;
{% endmacro %}

CREATE OR REPLACE FUNCTION trueup.append_inserted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
{{ return_unless_of_the_log() }}
{{ return_unless_columns_fit("new_rows") }}
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT n.{{ usage_log.user_id }}, n.{{ usage_log.created_at }}, n.{{ usage_log.total_tokens }}
    FROM new_rows n
    WHERE {{ usage_log.success("n") }} AND n.{{ usage_log.total_tokens }} <> 0
      AND n.{{ usage_log.user_id }} IS NOT NULL AND n.{{ usage_log.created_at }} IS NOT NULL
      AND n.{{ usage_log.id }}::text IS DISTINCT FROM current_setting('trueup.own_log_id', true);
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION trueup.append_updated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
{{ return_unless_of_the_log() }}
{{ return_unless_columns_fit("old_rows") }}
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT changed.user_id, changed.used_at, sum(changed.tokens)
    FROM (
        SELECT o.{{ usage_log.user_id }}, o.{{ usage_log.created_at }}, -o.{{ usage_log.total_tokens }}::bigint
        FROM old_rows o WHERE {{ usage_log.success("o") }}
        UNION ALL
        SELECT n.{{ usage_log.user_id }}, n.{{ usage_log.created_at }}, n.{{ usage_log.total_tokens }}::bigint
        FROM new_rows n WHERE {{ usage_log.success("n") }}
    ) AS changed (user_id, used_at, tokens)
    WHERE changed.user_id IS NOT NULL AND changed.used_at IS NOT NULL
    GROUP BY changed.user_id, changed.used_at
    HAVING sum(changed.tokens) <> 0;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION trueup.append_deleted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
{{ return_unless_of_the_log() }}
{{ return_unless_columns_fit("old_rows") }}
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT o.{{ usage_log.user_id }}, o.{{ usage_log.created_at }}, -o.{{ usage_log.total_tokens }}::bigint
    FROM old_rows o
    WHERE {{ usage_log.success("o") }} AND o.{{ usage_log.total_tokens }} <> 0
      AND o.{{ usage_log.user_id }} IS NOT NULL AND o.{{ usage_log.created_at }} IS NOT NULL;
    RETURN NULL;
END $$;

-- One row makes every balance stale at once; each is rebuilt from the log when next read.
CREATE OR REPLACE FUNCTION trueup.append_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
{{ return_unless_of_the_log() }}
    INSERT INTO trueup.log_truncation DEFAULT VALUES;
    RETURN NULL;
END $$;

-- The partitions of the log, at any depth, and tables that inherit from it. A statement that names one of them fires its
-- triggers, not the log's. `covered`: it has all of its own, at work.
CREATE OR REPLACE FUNCTION trueup.log_partitions() RETURNS TABLE (id oid, covered boolean) LANGUAGE sql STABLE AS $$
    WITH RECURSIVE family (id) AS (
        SELECT to_regclass({{ usage_log | literal }})::oid
        UNION
        SELECT i.inhrelid FROM pg_inherits i JOIN family f ON i.inhparent = f.id
    )
    SELECT f.id, 4 = (
        SELECT count(*) FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
        WHERE g.tgrelid = f.id AND g.tgenabled IN ('O', 'A') AND g.tgnargs > 0
          AND p.pronamespace = 'trueup'::regnamespace AND p.proname <> 'append_window')
    FROM family f
    WHERE f.id <> to_regclass({{ usage_log | literal }})
$$;

-- Their owner makes the triggers, and whoever writes the log then needs no right to call them. Who has it could put
-- them on a table of his own, and write deltas with their owner's rights.
DO $$
DECLARE
    f record;
BEGIN
    FOR f IN
        SELECT p.oid::regprocedure AS name,
               CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS who
        FROM pg_proc p CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.pronamespace = 'trueup'::regnamespace AND p.prorettype = 'trigger'::regtype
          AND a.grantee <> p.proowner
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM %s', f.name, f.who);
    END LOOP;
END $$;
