    -- A partition's triggers have an argument. Once it is detached its rows are not the log's, and they pass them over.
    IF TG_NARGS > 0 THEN
        IF NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = pg_partition_root(TG_RELID)
                                                  AND g.tgname = TG_NAME AND g.tgnargs = 0) THEN
            RETURN NULL;
        END IF;
    END IF;
