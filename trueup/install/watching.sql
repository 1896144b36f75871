-- Whether what the host writes is counted: its log is the table that it was, with the triggers that were there when the
-- balances were compared with it.

-- The triggers at work on the mapped tables, each with the version of its row in the catalog: one that was switched off
-- and on again, or made anew, has another, and nobody knows what was written meanwhile. And the numbers and types of the
-- columns that they count: a column that takes the name of another is not the one that was added up.
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

-- The versions of the counted columns' rows in the catalog. A column that is given a type with USING, be it the one that
-- it had, has another then; so has one that gets a default. `computed`: one of them is made of others by an expression.
CREATE OR REPLACE FUNCTION trueup.column_versions(OUT versions text, OUT computed boolean) LANGUAGE plpgsql STABLE AS $$
BEGIN
    SELECT coalesce(string_agg(t.attnum || ':' || t.xmin, ' ' ORDER BY t.attnum), ''), bool_or(t.attgenerated <> '')
    INTO versions, computed
    FROM pg_attribute t
    WHERE t.attrelid = to_regclass({{ usage_log | literal }}) AND t.attname IN ({{ usage_log.counted() }});
END $$;

-- The files that the log's rows are in, those of all partitions. USING writes each of them anew; so does VACUUM FULL.
-- (Not by pg_partition_tree, which waits for whoever has one of them locked.)
CREATE OR REPLACE FUNCTION trueup.log_files() RETURNS oid[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce((
        SELECT array_agg(c.relfilenode ORDER BY c.relfilenode) FROM pg_class c
        WHERE c.relfilenode <> 0 AND (c.oid = to_regclass({{ usage_log | literal }})
            OR c.oid IN (SELECT l.id FROM trueup.log_partitions() l))
    ), '{}');
END $$;

{# Of the installation `i` and trueup.column_versions() `c`. #}
{% macro has_old_values() %}
    CASE WHEN i.column_versions = c.versions THEN true WHEN c.computed THEN false
         ELSE i.log_files && trueup.log_files() END
{% endmacro %}

-- Whether the log has its old rows still: a column's new version and new files, both since this was written down, may
-- mean other values, of which no trigger tells. (Where values are computed, a new version is enough.) Or they mean none:
-- VACUUM FULL of a log by itself does both, where a column was once added with a default.
CREATE OR REPLACE FUNCTION trueup.has_old_values() RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM trueup.installation i, trueup.column_versions() c
        WHERE
{{ has_old_values() }}
    );
END $$;

-- The tables that partitions of the log, or tables that inherit from it, can be added to: itself, and those among them.
-- (To any table that is no partition: one without such tables today may have some tomorrow.)
CREATE OR REPLACE FUNCTION trueup.log_parents() RETURNS oid[] LANGUAGE sql STABLE AS $$
    SELECT array_agg(c.oid ORDER BY c.oid) FROM pg_class c
    WHERE c.oid = to_regclass({{ usage_log | literal }})
       OR c.oid IN (SELECT l.id FROM trueup.log_partitions() l)
          AND (c.relkind = 'p' OR NOT c.relispartition)
$$;

-- What is a partition of these, each with the version of its row in the catalog: one that went and came again, with other
-- rows maybe, has another.
CREATE OR REPLACE FUNCTION trueup.partition_marks(p_parents oid[]) RETURNS text[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce((
        SELECT array_agg(i.inhrelid || ':' || i.xmin ORDER BY i.inhrelid, i.inhparent) FROM pg_inherits i
        WHERE i.inhparent = ANY (p_parents)
    ), '{}');
END $$;

-- Whether a table may have rows. One that somebody keeps locked has some for all we know, and so has a foreign one.
CREATE OR REPLACE FUNCTION trueup.may_have_rows(p_table oid) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
BEGIN
    RETURN pg_relation_size(p_table::regclass) > 0
        OR EXISTS (SELECT FROM pg_class c WHERE c.oid = p_table AND c.relkind = 'f');
EXCEPTION WHEN lock_not_available THEN
    RETURN true;
END $$;

-- Write down what has become of the log; those who come at once take turns. Where rows may have come with a partition, or
-- values may be others, nobody has told of them: then each balance is stale, and built from the log when next read.
-- Noted in time, new versions of columns and new files, months apart, are not taken for a change of values.
CREATE OR REPLACE FUNCTION trueup.note_log() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    i trueup.installation;
    v record;
BEGIN
    SELECT * INTO i FROM trueup.installation FOR UPDATE;
    -- Of one that is renamed for a moment nothing is there to note: when it is back, all would be counted anew.
    IF to_regclass({{ usage_log | literal }}) IS NULL THEN
        RETURN;
    END IF;
    -- In one statement, so that nothing comes between these looks.
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
                        -- One that was away has lost rows maybe, or has other ones below it, or in an old file.
                        AND (EXISTS (SELECT FROM unnest(i.partitions) n (mark) WHERE split_part(n.mark, ':', 1) = p_id)
                             OR trueup.may_have_rows(p_id::oid))));
    UPDATE trueup.installation n
    SET column_versions = v.versions, log_files = v.files, log_parents = v.parents, partitions = v.partitions
    WHERE (n.column_versions, n.log_files, n.log_parents, n.partitions)
          IS DISTINCT FROM (v.versions, v.files, v.parents, v.partitions);
END $$;

-- Refuse (SQLSTATE TU001) unless what the host writes is told of, and has been since the balances were compared with the
-- log. A charge does not ask: it is for tokens spent.
CREATE OR REPLACE FUNCTION trueup.require_watched() RETURNS void LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_wrong text;
BEGIN
    IF EXISTS (SELECT FROM trueup.installation i WHERE i.triggers = trueup.trigger_marks()) THEN
        RETURN;
    END IF;
    SELECT string_agg(t.name || ' is ' || CASE t.state WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'for replicas alone'
                                                       ELSE t.state END, ', ' ORDER BY t.name)
    INTO v_wrong FROM trueup.idle_triggers() t;
    RAISE EXCEPTION USING ERRCODE = 'TU001', MESSAGE = coalesce('trigger ' || v_wrong,
        'triggers were made anew or switched off for a while, or columns were replaced, since trueup was set up');
END $$;

-- Refuse as well (SQLSTATE TU002) when partitions came or went, or values may be others, since that was noted. Nothing else
-- tells of it: who is refused has it noted (trueup.note_log), and asks again.
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
        WHEN trueup.has_old_values() THEN 'partitions of the usage log came or went'
        ELSE 'the usage log was written anew, maybe with other values' END;
END $$;
