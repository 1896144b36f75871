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

-- Refuse (SQLSTATE TU001) unless all that the host writes is counted. A charge does not ask: it is for tokens spent.
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
    RAISE EXCEPTION USING ERRCODE = 'TU001', MESSAGE = coalesce(
        'trigger ' || v_wrong,
        'triggers were made anew or switched off for a while, or columns were replaced, since trueup was set up');
END $$;
