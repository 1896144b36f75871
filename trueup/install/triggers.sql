-- The log's triggers, which report usage. Their functions are in usage/deltas.sql.

-- Drop the triggers of a log that was mapped before: its rows no longer count. (The triggers of a detached partition
-- stay: they ignore its rows, and only its owner could drop them.)
DO $$
DECLARE
    old record;
BEGIN
    FOR old IN
        SELECT g.tgname, g.tgrelid::regclass AS log FROM pg_trigger g JOIN pg_proc p ON p.oid = g.tgfoid
        WHERE p.pronamespace = 'trueup'::regnamespace AND p.proname <> 'append_window'
          AND g.tgnargs = 0 AND g.tgrelid <> CAST({{ usage_log | literal }} AS regclass)
          AND g.tgrelid NOT IN (SELECT l.id FROM trueup.log_partitions() l)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', old.tgname, old.log);
    END LOOP;
END $$;

CREATE OR REPLACE TRIGGER trueup_inserted AFTER INSERT ON {{ usage_log }}
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_inserted();
CREATE OR REPLACE TRIGGER trueup_updated AFTER UPDATE ON {{ usage_log }}
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_updated();
CREATE OR REPLACE TRIGGER trueup_deleted AFTER DELETE ON {{ usage_log }}
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_deleted();
CREATE OR REPLACE TRIGGER trueup_truncated AFTER TRUNCATE ON {{ usage_log }}
    FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_truncated();
