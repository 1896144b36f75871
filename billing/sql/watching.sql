-- Whether what the host writes is counted: its log is the table that it was, with the triggers that were there when the
-- balances were compared with it.

-- The triggers at work on the mapped tables, each with the version of its row in the catalog: one that was switched off
-- and on again, or made anew, has another, and nobody knows what was written meanwhile. And the numbers and types of the
-- columns that they count: a column that takes the name of another is not the one that was added up.
CREATE OR REPLACE FUNCTION trueup.trigger_marks() RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN concat_ws(' of ', (
        SELECT string_agg(g.oid || ':' || g.xmin, ' ' ORDER BY g.oid) FROM pg_trigger g
        WHERE g.tgrelid IN (to_regclass({{literal usage_log}}), to_regclass({{literal subscription}}))
          AND g.tgname IN ('trueup_inserted', 'trueup_updated', 'trueup_deleted', 'trueup_truncated',
                           'trueup_window_changed')
          AND g.tgenabled IN ('O', 'A')
    ), (
        SELECT string_agg(t.attnum || ':' || t.atttypid, ' ' ORDER BY t.attnum) FROM pg_attribute t
        WHERE t.attrelid = to_regclass({{literal usage_log}}) AND t.attname IN ({{usage_log.counted}})
    ));
END $$;

-- The versions of the counted columns' rows in the catalog. A column that is given a type with USING, be it the one that
-- it had, has another then; so has one that gets a default. `computed`: one of them is made of others by an expression.
CREATE OR REPLACE FUNCTION trueup.column_versions(OUT versions text, OUT computed boolean) LANGUAGE plpgsql STABLE AS $$
BEGIN
    SELECT string_agg(t.attnum || ':' || t.xmin, ' ' ORDER BY t.attnum), bool_or(t.attgenerated <> '')
    INTO versions, computed
    FROM pg_attribute t
    WHERE t.attrelid = to_regclass({{literal usage_log}}) AND t.attname IN ({{usage_log.counted}});
END $$;

-- The files that the log's rows are in, those of all partitions. USING writes each of them anew; so does VACUUM FULL.
-- (Not by pg_partition_tree, which waits for whoever has one of them locked.)
CREATE OR REPLACE FUNCTION trueup.log_files() RETURNS oid[] LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce((
        SELECT array_agg(c.relfilenode ORDER BY c.relfilenode) FROM pg_class c
        WHERE c.relfilenode <> 0 AND (c.oid = to_regclass({{literal usage_log}})
            OR c.oid IN (SELECT l.id FROM trueup.log_partitions() l))
    ), '{}');
END $$;

-- Whether the log has its old rows still: a column's new version and new files, both since this was written down, may
-- mean other values, of which no trigger tells. (Where values are computed, a new version is enough.)
CREATE OR REPLACE FUNCTION trueup.has_old_values() RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM trueup.installation i, trueup.column_versions() c
        WHERE
{{include old_values}}
    );
END $$;

-- Whether all that the host writes is counted.
CREATE OR REPLACE FUNCTION trueup.is_watched() RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM trueup.installation i, trueup.column_versions() c
        WHERE i.triggers = trueup.trigger_marks() AND
{{include old_values}}
    );
END $$;

-- The tables that partitions of the log, or tables that inherit from it, can be added to: itself, and those among them.
CREATE OR REPLACE FUNCTION trueup.log_parents() RETURNS oid[] LANGUAGE sql STABLE AS $$
    SELECT array_agg(c.oid ORDER BY c.oid) FROM pg_class c
    WHERE c.oid = to_regclass({{literal usage_log}})
       OR c.oid IN (SELECT l.id FROM trueup.log_partitions() l)
          AND (c.relkind = 'p' OR EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid))
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

-- Whether a table may have rows. One that somebody keeps locked has some for all we know.
CREATE OR REPLACE FUNCTION trueup.may_have_rows(p_table oid) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '100ms' AS $$
BEGIN
    RETURN pg_relation_size(p_table::regclass) > 0;
EXCEPTION WHEN lock_not_available THEN
    RETURN true;
END $$;

-- Write down what has become of the log, as far as it closes no gate; those who come at once take turns.
-- New versions of columns, or new files, that alone change no value: else one of each, months apart, would be taken for a
-- change of values. In one statement, so that nothing comes between look and write.
-- And its partitions. Rows of a new one may have come with it, and nobody has told of them: then each balance is stale.
CREATE OR REPLACE FUNCTION trueup.note_log() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_noted text[];
    v_parents oid[];
    v_partitions text[];
BEGIN
    SELECT coalesce(i.partitions, '{}') INTO v_noted FROM trueup.installation i FOR UPDATE;
    UPDATE trueup.installation i SET column_versions = c.versions, log_files = f.files
    FROM trueup.column_versions() c, (SELECT trueup.log_files() AS files) f
    WHERE trueup.is_watched()
      AND ((i.column_versions = c.versions AND i.log_files <> f.files)
           OR (i.column_versions <> c.versions AND i.log_files && f.files));
    v_parents := trueup.log_parents();
    v_partitions := trueup.partition_marks(v_parents);
    INSERT INTO trueup.log_truncation (truncated_at)
    SELECT clock_timestamp()
    WHERE EXISTS (SELECT FROM trueup.balance)
      AND EXISTS (SELECT FROM unnest(v_partitions) p (mark)
                  WHERE p.mark <> ALL (v_noted) AND trueup.may_have_rows(split_part(p.mark, ':', 1)::oid));
    UPDATE trueup.installation i SET log_parents = v_parents, partitions = v_partitions
    WHERE (i.log_parents, i.partitions) IS DISTINCT FROM (v_parents, v_partitions);
END $$;

-- Refuse (SQLSTATE TU001) unless all that the host writes is counted. A charge does not ask: it is for tokens spent.
CREATE OR REPLACE FUNCTION trueup.require_watched() RETURNS void LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_wrong text;
BEGIN
    IF trueup.is_watched() THEN
        RETURN;
    END IF;
    SELECT string_agg(t.name || ' is ' || CASE t.state WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'for replicas alone'
                                                       ELSE t.state END, ', ' ORDER BY t.name)
    INTO v_wrong FROM trueup.idle_triggers() t;
    RAISE EXCEPTION USING ERRCODE = 'TU001', MESSAGE = CASE
        WHEN v_wrong IS NOT NULL THEN 'trigger ' || v_wrong
        WHEN trueup.has_old_values() THEN
            'triggers were made anew or switched off for a while, or columns were replaced, since trueup was set up'
        ELSE 'columns that are counted were given a type or an expression anew, and with it maybe other values' END;
END $$;

-- Refuse as well (SQLSTATE TU002) when partitions came or went since that was noted. Nothing else tells of rows that come
-- with a partition: who is refused has them noted (trueup.note_log), and asks again.
CREATE OR REPLACE FUNCTION trueup.require_counted() RETURNS void LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF EXISTS (
        SELECT FROM trueup.installation i, trueup.column_versions() c
        WHERE i.triggers = trueup.trigger_marks() AND i.partitions = trueup.partition_marks(i.log_parents) AND
{{include old_values}}
    ) THEN
        RETURN;
    END IF;
    PERFORM trueup.require_watched();
    RAISE EXCEPTION USING ERRCODE = 'TU002', MESSAGE = 'partitions of the usage log came or went';
END $$;
