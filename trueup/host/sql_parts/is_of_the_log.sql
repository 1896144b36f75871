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
