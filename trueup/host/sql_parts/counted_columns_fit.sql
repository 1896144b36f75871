    -- A host that has renamed or dropped a column, or given it another type, goes on too: its rows are not counted then, and
    -- the gate is closed by that (trueup.require_watched) until it is attached anew. Where the mapping's condition fits its
    -- columns no more, it may also be a function that is gone, which closes nothing: each balance is stale then. This looks
    -- at the columns, reads no row, and is planned once; to ask the catalog with each statement made a host's insert half as
    -- dear again.
    BEGIN
        PERFORM r.{{usage_log.user_id}}, r.{{usage_log.created_at}}, r.{{usage_log.total_tokens}}, r.{{usage_log.success}},
                r.{{usage_log.id}}::text FROM {{row}} r WHERE false
        UNION ALL SELECT NULL::{{user_id_type}}, NULL::timestamptz, NULL::bigint, NULL::boolean, NULL WHERE false;
    EXCEPTION
        WHEN undefined_column OR datatype_mismatch THEN
            RETURN NULL;
        WHEN undefined_function THEN
            INSERT INTO trueup.log_truncation DEFAULT VALUES;
            RETURN NULL;
    END;
