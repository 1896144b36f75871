-- Functions run with a fixed search path, in whatever session they are called: no function or operator that another
-- role has made can take the place of one of PostgreSQL's. The clause keeps PostgreSQL from merging a function into the
-- query that calls it. So SQL functions that only read have none: trueup's sessions and functions, which call them,
-- have this path. (Trigger functions are called in the host's sessions, and state the clause themselves.)
DO $$
DECLARE
    f regprocedure;
BEGIN
    FOR f IN SELECT p.oid FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
             WHERE p.pronamespace = 'trueup'::regnamespace AND p.prorettype <> 'trigger'::regtype
               AND (l.lanname = 'plpgsql' OR p.provolatile = 'v')
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET search_path = pg_catalog, pg_temp', f);
    END LOOP;
END $$;
