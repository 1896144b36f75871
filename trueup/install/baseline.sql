{% from "gate/shared.sql" import require_counted %}
-- The baseline: the state of the log's triggers, counted columns, files and partitions when the balances were verified.
-- While it holds, trueup counts every write of the host.

-- The enabled triggers on the mapped tables, each with the xmin of its catalog row: a trigger that was disabled for a
-- while or re-created has another xmin, and may have missed writes. Then the numbers and types of the counted columns:
-- a column that takes over the name of a counted one does not hold the values that were added up.
CREATE OR REPLACE FUNCTION trueup.trigger_marks() RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN concat_ws(' of ', (
        SELECT string_agg(g.oid || ':' || g.xmin, ' ' ORDER BY g.oid) FROM pg_trigger g
        WHERE g.tgrelid IN (to_regclass({{ usage_log | literal }}), to_regclass({{ subscription | literal }}))
          AND g.tgname IN ('trueup_inserted', 'trueup_updated', 'trueup_deleted', 'trueup_truncated',
                           'trueup_window_changed')
          AND g.tgenabled IN ('O', 'A')
    ), (
        SELECT string_agg(t.attnum || ':' || t.atttypid, ' ' ORDER BY t.attnum) FROM pg_attribute t
        WHERE t.attrelid = to_regclass({{ usage_log | literal }}) AND t.attname IN ({{ usage_log.counted() }})
    ));
END $$;

-- The counted columns, each with the xmin of its catalog row. ALTER COLUMN … TYPE … USING changes it, even to the same
-- type; so does a new default. `computed`: an expression generates one of the columns.
CREATE OR REPLACE FUNCTION trueup.column_versions(OUT versions text, OUT computed boolean) LANGUAGE plpgsql STABLE AS $$
BEGIN
    SELECT coalesce(string_agg(t.attnum || ':' || t.xmin, ' ' ORDER BY t.attnum), ''), bool_or(t.attgenerated <> '')
    INTO versions, computed
    FROM pg_attribute t
    WHERE t.attrelid = to_regclass({{ usage_log | literal }}) AND t.attname IN ({{ usage_log.counted() }});
END $$;

-- The files of the log and all its partitions. ALTER … USING rewrites each of them, and so does VACUUM FULL.
-- (pg_partition_tree is no choice here: it waits for a locked partition.)
CREATE OR REPLACE FUNCTION trueup.log_files() RETURNS oid[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce((
        SELECT array_agg(c.relfilenode ORDER BY c.relfilenode) FROM pg_class c
        WHERE c.relfilenode <> 0 AND (c.oid = to_regclass({{ usage_log | literal }})
            OR c.oid IN (SELECT l.id FROM trueup.log_partitions() l))
    ), '{}');
END $$;

{# A condition on trueup.installation `i` and trueup.column_versions() `c`. #}
{% macro has_old_values() %}
    CASE WHEN i.column_versions = c.versions THEN true WHEN c.computed THEN false
         ELSE i.log_files && trueup.log_files() END
{% endmacro %}

-- Whether the log's values are unchanged. No trigger fires for a rewrite: new column versions together with new files
-- since the baseline may mean other values. (For generated columns a new version is enough.) They may also mean none:
-- VACUUM FULL rewrites the files and, if a column was once added with a default, its catalog row.
CREATE OR REPLACE FUNCTION trueup.has_old_values() RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM trueup.installation i, trueup.column_versions() c
        WHERE
{{ has_old_values() }}
    );
END $$;

-- The tables that a partition or an inheriting table can be added to: the log, and those below it. (Any table that is
-- no partition can be inherited from.)
CREATE OR REPLACE FUNCTION trueup.log_parents() RETURNS oid[] LANGUAGE sql STABLE AS $$
    SELECT array_agg(c.oid ORDER BY c.oid) FROM pg_class c
    WHERE c.oid = to_regclass({{ usage_log | literal }})
       OR c.oid IN (SELECT l.id FROM trueup.log_partitions() l)
          AND (c.relkind = 'p' OR NOT c.relispartition)
$$;

-- The partitions of these tables, each with the xmin of its catalog row: a partition that was detached and attached
-- again, maybe with other rows, has another xmin.
CREATE OR REPLACE FUNCTION trueup.partition_marks(p_parents oid[]) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce((
        SELECT array_agg(i.inhrelid || ':' || i.xmin ORDER BY i.inhrelid, i.inhparent) FROM pg_inherits i
        WHERE i.inhparent = ANY (p_parents)
    ), '{}');
END $$;

-- Whether a table may have rows. A locked table and a foreign table count as if they had some.
CREATE OR REPLACE FUNCTION trueup.may_have_rows(p_table oid) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
BEGIN
    RETURN pg_relation_size(p_table::regclass) > 0
        OR EXISTS (SELECT FROM pg_class c WHERE c.oid = p_table AND c.relkind = 'f');
EXCEPTION WHEN lock_not_available THEN
    RETURN true;
END $$;

-- Save the log's present state in the baseline; a row lock serializes concurrent calls. If a partition may have brought
-- rows that no trigger saw, or values may have changed, every balance becomes stale and is rebuilt from the log when
-- next read. Frequent calls keep a new column version and a new file from months apart from looking like one rewrite.
CREATE OR REPLACE FUNCTION trueup.record_log_state() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    i trueup.installation;
    v record;
BEGIN
    SELECT * INTO i FROM trueup.installation FOR UPDATE;
    -- While the log is renamed there is no state to save: saving "nothing" would make every balance stale later.
    IF to_regclass({{ usage_log | literal }}) IS NULL THEN
        RETURN;
    END IF;
    -- One statement has one snapshot of all parts.
    SELECT c.versions, f.files, p.parents, trueup.partition_marks(p.parents) AS partitions,
           i.column_versions <> c.versions AS changed, trueup.has_old_values() AS old
    INTO v
    FROM trueup.column_versions() c, (SELECT trueup.log_files() AS files) f, (SELECT trueup.log_parents() AS parents) p;
    INSERT INTO trueup.log_truncation (truncated_at)
    SELECT clock_timestamp()
    WHERE EXISTS (SELECT FROM trueup.balance)
      AND (v.changed AND NOT v.old
           OR EXISTS (SELECT FROM unnest(v.partitions) p (mark), split_part(p.mark, ':', 1) p_id
                      WHERE p.mark <> ALL (coalesce(i.partitions, '{}'))
                        -- A re-attached partition may have lost or changed rows, and so may those below it.
                        AND (EXISTS (SELECT FROM unnest(i.partitions) n (mark) WHERE split_part(n.mark, ':', 1) = p_id)
                             OR trueup.may_have_rows(p_id::oid))));
    UPDATE trueup.installation n
    SET column_versions = v.versions, log_files = v.files, log_parents = v.parents, partitions = v.partitions
    WHERE (n.column_versions, n.log_files, n.log_parents, n.partitions)
          IS DISTINCT FROM (v.versions, v.files, v.parents, v.partitions);
END $$;

-- Refuse (SQLSTATE TU001) unless the triggers have reported every host write since the balances were verified. A charge
-- does not call this: its tokens are spent already.
CREATE OR REPLACE FUNCTION trueup.require_watched() RETURNS void LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_wrong text;
BEGIN
    IF EXISTS (SELECT FROM trueup.installation i WHERE i.triggers = trueup.trigger_marks()) THEN
        RETURN;
    END IF;
    SELECT string_agg(t.name || ' is ' || CASE t.state WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'for replicas alone'
                                                       ELSE t.state END, ', ' ORDER BY t.name)
    INTO v_wrong FROM trueup.disabled_triggers() t;
    RAISE EXCEPTION USING ERRCODE = 'TU001', MESSAGE = coalesce('trigger ' || v_wrong,
        'triggers were re-created or disabled for a while, or columns were replaced, since trueup was set up');
END $$;

-- Refuse as well (SQLSTATE TU002) if the log's partitions or values changed since the baseline was saved. No trigger
-- reports this: the caller calls trueup.record_log_state and retries.
CREATE OR REPLACE FUNCTION trueup.require_counted() RETURNS void LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF EXISTS (
        SELECT FROM trueup.installation i, trueup.column_versions() c
        WHERE i.triggers = trueup.trigger_marks() AND i.partitions = trueup.partition_marks(i.log_parents) AND
{{ has_old_values() }}
    ) THEN
        RETURN;
    END IF;
    PERFORM trueup.require_watched();
    RAISE EXCEPTION USING ERRCODE = 'TU002', MESSAGE = CASE
        WHEN trueup.has_old_values() THEN 'partitions of the usage log were added or removed'
        ELSE 'the usage log was rewritten, maybe with other values' END;
END $$;

-- The same, once a second in each session: see gate/shared.sql.
CREATE OR REPLACE FUNCTION trueup.require_counted_lately() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    {{ require_counted() }}
END $$;
