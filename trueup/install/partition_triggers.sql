-- The same triggers on each partition of the log that lacks them: they fire for statements that name the partition
-- itself. No trigger has seen a partition's existing rows, so every balance becomes stale. An empty partition changes
-- nothing.
DO $$
DECLARE
    part record;
BEGIN
    PERFORM trueup.record_log_state();
    FOR part IN
        SELECT c.oid AS id, c.oid::regclass AS name
        FROM trueup.log_partitions() l JOIN pg_class c ON c.oid = l.id
        WHERE NOT l.covered AND c.relkind IN ('r', 'p') ORDER BY c.oid
    LOOP
        EXECUTE format('CREATE OR REPLACE TRIGGER trueup_inserted AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows '
                       'FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_inserted(''partition'')', part.name);
        EXECUTE format('CREATE OR REPLACE TRIGGER trueup_updated AFTER UPDATE ON %s '
                       'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows '
                       'FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_updated(''partition'')', part.name);
        EXECUTE format('CREATE OR REPLACE TRIGGER trueup_deleted AFTER DELETE ON %s REFERENCING OLD TABLE AS old_rows '
                       'FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_deleted(''partition'')', part.name);
        EXECUTE format('CREATE OR REPLACE TRIGGER trueup_truncated AFTER TRUNCATE ON %s '
                       'FOR EACH STATEMENT EXECUTE FUNCTION trueup.append_truncated(''partition'')', part.name);
        -- CREATE TRIGGER has locked out its writers: an empty partition stays empty until this commits.
        IF pg_relation_size(part.id) > 0 THEN
            INSERT INTO trueup.log_truncation (truncated_at)
            SELECT clock_timestamp() WHERE EXISTS (SELECT FROM trueup.balance);
        END IF;
    END LOOP;
END $$;
