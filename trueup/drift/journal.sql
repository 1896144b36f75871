-- Delete at most p_limit entries from before p_before that a run over all users has settled since: that run found the
-- counter right, or its drift row has the causes. Returns how many were deleted.
CREATE OR REPLACE FUNCTION trueup.prune_journal(p_before timestamptz, p_limit integer) RETURNS bigint LANGUAGE sql AS $$
    WITH deleted AS (
        DELETE FROM trueup.counter_entry e
        USING (SELECT t.user_id, t.id FROM trueup.counter_entry t
               WHERE t.at < p_before
                 AND t.at < (SELECT max(r.started_at) FROM trueup.reconcile_run r
                             WHERE r.status = 'finished' AND r.only_user IS NULL AND NOT r.dry_run)
               LIMIT p_limit) old
        WHERE e.user_id = old.user_id AND e.id = old.id
        RETURNING 1
    )
    SELECT count(*) FROM deleted
$$;
