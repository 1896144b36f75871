-- The subscriptions' trigger, which reports changes of counters, windows and plans.

-- Drop the trigger of a table that was mapped before. (A partition's trigger belongs to its parent's.)
DO $$
DECLARE
    old record;
BEGIN
    FOR old IN
        SELECT g.tgname, g.tgrelid::regclass AS subscription FROM pg_trigger g
        WHERE g.tgfoid = 'trueup.append_window'::regproc AND g.tgparentid = 0
          AND g.tgrelid <> CAST({{ subscription | literal }} AS regclass)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', old.tgname, old.subscription);
    END LOOP;
END $$;

-- This transaction may hold a lock on the log. A host transaction may hold a subscription and wait for the log. The
-- short timeout makes this transaction give up before PostgreSQL detects the deadlock and cancels the host's. A working
-- trigger stays as it is, because the journal has a hole whenever the trigger is replaced.
DO $$
DECLARE
    v_before text := current_setting('lock_timeout');
BEGIN
    IF v_before::interval NOT BETWEEN '1 ms' AND '500 ms' THEN
        PERFORM set_config('lock_timeout', '500ms', true);
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_trigger g
        WHERE g.tgrelid = CAST({{ subscription | literal }} AS regclass) AND g.tgname = 'trueup_window_changed'
          AND g.tgfoid = 'trueup.append_window'::regproc AND g.tgenabled IN ('O', 'A')
          AND pg_get_triggerdef(g.oid) LIKE '%AFTER INSERT OR DELETE OR UPDATE ON %') THEN
        CREATE OR REPLACE TRIGGER trueup_window_changed AFTER INSERT OR UPDATE OR DELETE ON {{ subscription }}
            FOR EACH ROW EXECUTE FUNCTION trueup.append_window();
    END IF;
    PERFORM set_config('lock_timeout', v_before, true);
    INSERT INTO trueup.journal_start (trigger_mark)
    SELECT g.oid || ':' || g.xmin FROM pg_trigger g
    WHERE g.tgrelid = CAST({{ subscription | literal }} AS regclass) AND g.tgname = 'trueup_window_changed'
      AND NOT EXISTS (SELECT FROM trueup.journal_start j WHERE j.trigger_mark = g.oid || ':' || g.xmin);
END $$;
