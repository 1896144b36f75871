-- The trigger that tells of windows, on the subscriptions.

-- Subscriptions that were mapped before are let go. (A partition's is its parent's.)
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

-- The log is locked by now. A host that has a subscription and waits for the log must not be the one that a deadlock
-- ends: we give up before it is looked for.
DO $$
DECLARE
    v_before text := current_setting('lock_timeout');
BEGIN
    IF v_before::interval NOT BETWEEN '1 ms' AND '500 ms' THEN
        PERFORM set_config('lock_timeout', '500ms', true);
    END IF;
    CREATE OR REPLACE TRIGGER trueup_window_changed AFTER INSERT OR UPDATE ON {{ subscription }}
        FOR EACH ROW EXECUTE FUNCTION trueup.append_window();
    PERFORM set_config('lock_timeout', v_before, true);
END $$;
