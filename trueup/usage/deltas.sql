{% from "host/rows.sql" import in_range, own_row_mark %}
-- The usage log's triggers only append, to trueup.usage_delta and trueup.log_truncation. Two writers never need the
-- same row, so a host's transaction never waits for trueup. SECURITY DEFINER: the host's role needs no right on
-- trueup's schema. The triggers skip a row that trueup writes itself, because trueup adds it to the balance. Its
-- transaction has the row's mark in the setting trueup.own_row. Only trueup can compute a mark, so a role that sets it
-- to anything else hides no row. Figures are brought into the range of what can be counted, so that a host's row of any
-- figure can be written and deleted. They call no function of trueup's: an upgrade could remove it for a moment, and
-- the host's statement would fail. Times without a zone are in the mapping's zone, whatever the time zone of the host's
-- session.

{% macro return_unless_of_the_log() %}
    -- The triggers of a partition, or of a table that inherits, have an argument. After the partition is detached, its
    -- rows are not part of the log, and its triggers skip them; also while it is being detached, when reads of the log
    -- no longer see its rows.
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
    -- A host that has renamed or dropped a column, or changed its type, must not get an error. Its rows are not counted
    -- then, and the gate denies every task (trueup.require_watched) until `trueup db attach` is run again. If the
    -- mapping's condition calls a function that no longer exists, the gate stays open and every balance becomes stale
    -- instead. This check names the columns, reads no row and is planned once. Reading the catalog in each statement
    -- made a host's insert 1.5 times as slow.
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
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = {{ time_zone }} AS $$
DECLARE
    v_mark text := nullif(current_setting('trueup.own_row', true), '');
BEGIN
    IF v_mark IS NOT NULL THEN  -- in a statement of its own, which a host's insert does not pay for
        -- trueup writes one row in a statement, and has named its columns.
        IF EXISTS (SELECT FROM new_rows n WHERE v_mark = {{ own_row_mark("n." ~ usage_log.id ~ "::text") }}) THEN
            RETURN NULL;
        END IF;
    END IF;
{{ return_unless_of_the_log() }}
{{ return_unless_columns_fit("new_rows") }}
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT n.{{ usage_log.user_id }}, n.{{ usage_log.created_at }}, {{ in_range("n." ~ usage_log.total_tokens) }}
    FROM new_rows n
    WHERE {{ usage_log.success("n") }} AND n.{{ usage_log.total_tokens }} <> 0
      AND n.{{ usage_log.user_id }} IS NOT NULL AND n.{{ usage_log.created_at }} IS NOT NULL;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION trueup.append_updated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = {{ time_zone }} AS $$
BEGIN
{{ return_unless_of_the_log() }}
{{ return_unless_columns_fit("old_rows") }}
    BEGIN
        INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
        SELECT changed.user_id, changed.used_at, {{ in_range("sum(changed.tokens)") }}
        FROM (
            SELECT o.{{ usage_log.user_id }}, o.{{ usage_log.created_at }}, -{{ in_range("o." ~ usage_log.total_tokens) }}
            FROM old_rows o WHERE {{ usage_log.success("o") }}
            UNION ALL
            SELECT n.{{ usage_log.user_id }}, n.{{ usage_log.created_at }}, {{ in_range("n." ~ usage_log.total_tokens) }}
            FROM new_rows n WHERE {{ usage_log.success("n") }}
        ) AS changed (user_id, used_at, tokens)
        WHERE changed.user_id IS NOT NULL AND changed.used_at IS NOT NULL
        GROUP BY changed.user_id, changed.used_at
        HAVING sum(changed.tokens) <> 0;
    EXCEPTION WHEN configuration_limit_exceeded THEN
        -- The host's limit on temporary files is too low for the sums. Every balance becomes stale instead.
        INSERT INTO trueup.log_truncation DEFAULT VALUES;
    END;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION trueup.append_deleted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = {{ time_zone }} AS $$
BEGIN
{{ return_unless_of_the_log() }}
{{ return_unless_columns_fit("old_rows") }}
    INSERT INTO trueup.usage_delta (user_id, used_at, tokens)
    SELECT o.{{ usage_log.user_id }}, o.{{ usage_log.created_at }}, -{{ in_range("o." ~ usage_log.total_tokens) }}
    FROM old_rows o
    WHERE {{ usage_log.success("o") }} AND o.{{ usage_log.total_tokens }} <> 0
      AND o.{{ usage_log.user_id }} IS NOT NULL AND o.{{ usage_log.created_at }} IS NOT NULL;
    RETURN NULL;
END $$;

-- One row makes all balances stale; each is rebuilt from the log when it is next read.
CREATE OR REPLACE FUNCTION trueup.append_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = {{ time_zone }} AS $$
BEGIN
{{ return_unless_of_the_log() }}
    INSERT INTO trueup.log_truncation DEFAULT VALUES;
    RETURN NULL;
END $$;

-- The partitions of the log, at any depth, and tables that inherit from it. A statement that names a partition fires
-- the partition's triggers, not the log's. `covered`: the partition has all four triggers, and they are enabled.
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

-- Only the owner may execute the trigger functions. The owner creates the triggers, and roles that write the log need
-- no right to call the functions. With that right, a role could put them on a table of its own, and write deltas with
-- the owner's rights.
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
