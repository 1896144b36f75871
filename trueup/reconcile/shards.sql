-- Reconcile runs and their shards. Each has an owner and a lease, in a row and by the database's clock. A lease works
-- through a connection pooler, expires when its owner dies, and is visible to every machine.

-- Whether the run, or one of its shards, has a lease that has not expired. Then no other process may take over the run.
CREATE OR REPLACE FUNCTION trueup.run_is_alive(p_run bigint) RETURNS boolean LANGUAGE sql AS $$
    SELECT EXISTS (SELECT FROM trueup.reconcile_run r WHERE r.id = p_run AND r.lease_until > clock_timestamp())
        OR EXISTS (SELECT FROM trueup.reconcile_shard s
                   WHERE s.run_id = p_run AND s.status = 'running' AND s.lease_until > clock_timestamp())
$$;

-- The last user of each shard, except of the last shard, which has no bound and so includes users added later. It jumps
-- from end to end along the index; numbering all subscriptions takes four times as long.
CREATE OR REPLACE FUNCTION trueup.shard_ends(p_size bigint) RETURNS SETOF {{ user_id_type }} LANGUAGE plpgsql STABLE AS $$
<<ends>>
DECLARE
    v_last {{ user_id_type }};
BEGIN
    SELECT s.{{ subscription.user_id }} INTO v_last FROM {{ subscription }} s
    WHERE s.{{ subscription.user_id }} IS NOT NULL
    ORDER BY s.{{ subscription.user_id }} OFFSET shard_ends.p_size - 1 LIMIT 1;
    WHILE EXISTS (SELECT FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} > ends.v_last) LOOP
        RETURN NEXT v_last;
        SELECT s.{{ subscription.user_id }} INTO v_last FROM {{ subscription }} s
        WHERE s.{{ subscription.user_id }} > ends.v_last
        ORDER BY s.{{ subscription.user_id }} OFFSET shard_ends.p_size - 1 LIMIT 1;
    END LOOP;
END $$;

-- Begin a run, or resume one of the same kind, rules and users whose owner died or was interrupted less than p_resume
-- ago. `refused`: 'busy' if another run is in progress (`run_id` is its number), 'done' if this period has had its run.
-- Any number of schedulers may call this at once: an advisory lock admits one at a time, and a (kind, period) gets one
-- run. p_size: subscriptions in a shard; null: one shard for all.
CREATE OR REPLACE FUNCTION trueup.begin_run(
    p_kind text, p_every interval, p_offset interval, p_only_user text, p_rules jsonb, p_by text, p_owner text,
    p_lease interval, p_resume interval, p_size bigint,
    OUT run_id bigint, OUT resumed boolean, OUT refused text
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    r trueup.reconcile_run;
    v_period timestamptz;
    v_now timestamptz;
    v_ends {{ user_id_type }}[];
BEGIN
    PERFORM pg_advisory_xact_lock(8243107351036553580);  -- "reconcil" in ASCII; held until the end of this transaction
    v_now := clock_timestamp();
    resumed := false;
    v_period := to_timestamp(floor(extract(epoch FROM v_now - p_offset) / extract(epoch FROM p_every))
                             * extract(epoch FROM p_every)) + p_offset;
    SELECT * INTO r FROM trueup.reconcile_run t WHERE t.status = 'running';
    IF FOUND AND trueup.run_is_alive(r.id) THEN
        run_id := r.id;
        refused := 'busy';
        RETURN;
    END IF;
    IF r.id IS NULL THEN
        SELECT * INTO r FROM trueup.reconcile_run t ORDER BY t.id DESC LIMIT 1;
    END IF;
    IF r.status IN ('running', 'interrupted') AND r.kind = p_kind AND r.only_user IS NOT DISTINCT FROM p_only_user
       AND r.rules = p_rules AND coalesce(r.finished_at, v_now) > v_now - p_resume AND r.started_at > v_now - p_resume
       AND EXISTS (SELECT FROM trueup.reconcile_shard s WHERE s.run_id = r.id AND s.status IN ('waiting', 'running'))
    THEN
        UPDATE trueup.reconcile_run t
        SET status = 'running', finished_at = NULL, owner = p_owner, lease_until = v_now + p_lease
        WHERE t.id = r.id;
        run_id := r.id;
        resumed := true;
        RETURN;
    END IF;
    -- Fence an owner that still works on the old run after its lease expired, and free the run's period for another
    -- run.
    UPDATE trueup.reconcile_run t SET status = 'interrupted', finished_at = v_now, period = NULL
    WHERE t.status = 'running';
    UPDATE trueup.reconcile_shard s SET status = 'waiting', owner = NULL, lease_until = NULL, updated_at = v_now
    WHERE s.run_id = r.id AND s.status = 'running';
    INSERT INTO trueup.reconcile_run AS t (dry_run, kind, period, only_user, rules, status, started_at, requested_by,
                                           owner, lease_until)
    VALUES (false, p_kind, v_period, p_only_user, p_rules, 'running', v_now, p_by, p_owner, v_now + p_lease)
    ON CONFLICT (kind, period) DO NOTHING
    RETURNING t.id INTO run_id;
    IF run_id IS NULL THEN
        refused := 'done';
        RETURN;
    END IF;
    IF p_size IS NOT NULL THEN
        v_ends := ARRAY(SELECT trueup.shard_ends(p_size));  -- in order; reads the whole table, so only once
    END IF;
    -- An array element before the first or after the last is NULL, which means no bound.
    INSERT INTO trueup.reconcile_shard (run_id, number, first_user, last_user, status, updated_at)
    SELECT begin_run.run_id, n, v_ends[n - 1], v_ends[n], 'waiting', v_now
    FROM generate_series(1, coalesce(cardinality(v_ends), 0) + 1) AS n;
    -- Reading the table may have taken longer than the lease.
    UPDATE trueup.reconcile_run t SET lease_until = clock_timestamp() + p_lease WHERE t.id = begin_run.run_id;
END $$;

-- Give up the run's shards that wait, or whose lease has expired, and that failed p_most times in a row without
-- progress.
CREATE OR REPLACE FUNCTION trueup.give_up_shards(p_run bigint, p_most integer) RETURNS void LANGUAGE sql AS $$
    UPDATE trueup.reconcile_shard s
    SET status = 'failed', error = coalesce(s.error, 'its worker died on every attempt'), updated_at = clock_timestamp()
    WHERE s.run_id = p_run AND s.failures + (s.status = 'running')::integer >= p_most
      AND (s.status = 'waiting' OR s.status = 'running' AND s.lease_until <= clock_timestamp())
$$;

-- Claim a waiting shard, or one whose lease has expired. p_number null: any shard. Returns no row if there is none to
-- claim. The new attempt number fences the previous owner: its later writes are refused. p_most: see give_up_shards.
CREATE OR REPLACE FUNCTION trueup.claim_shard(
    p_run bigint, p_number integer, p_owner text, p_lease interval, p_most integer
) RETURNS SETOF trueup.reconcile_shard LANGUAGE plpgsql AS $$
DECLARE
    v_number integer;
BEGIN
    PERFORM trueup.give_up_shards(p_run, p_most);
    SELECT s.number INTO v_number FROM trueup.reconcile_shard s
    JOIN trueup.reconcile_run r ON r.id = s.run_id AND r.status = 'running'
    WHERE s.run_id = p_run AND (p_number IS NULL OR s.number = p_number)
      AND (s.status = 'waiting' OR s.status = 'running' AND s.lease_until <= clock_timestamp())
    ORDER BY s.number LIMIT 1 FOR UPDATE OF s SKIP LOCKED;
    RETURN QUERY
    UPDATE trueup.reconcile_shard s
    SET failures = s.failures + (s.status = 'running')::integer, status = 'running', owner = p_owner,
        attempts = s.attempts + 1, lease_until = clock_timestamp() + p_lease, updated_at = clock_timestamp()
    WHERE s.run_id = p_run AND s.number = v_number
    RETURNING s.*;
END $$;

-- Record the progress of this attempt at a shard, in the transaction that did the work. False: another process has
-- taken over the shard, and nothing may be written. The commit does not wait for the disk, so that rows are not locked
-- meanwhile. If a server crash undoes the commit, it undoes work and cursor together; the commit that ends the shard
-- does wait.
CREATE OR REPLACE FUNCTION trueup.move_shard(
    p_run bigint, p_number integer, p_attempt integer, p_cursor {{ user_id_type }}, p_checked bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE trueup.reconcile_shard s
    SET cursor_user = p_cursor, checked = p_checked, failures = 0,
        error = NULL, updated_at = clock_timestamp()
    WHERE s.run_id = p_run AND s.number = p_number AND s.attempts = p_attempt AND s.status = 'running';
    RETURN FOUND;
END $$;

-- End this attempt at a shard. p_status: 'finished', or 'waiting' if work is left. p_error: the reason why it is left;
-- null: the attempt was stopped, not failed. False: another process has taken over the shard.
CREATE OR REPLACE FUNCTION trueup.end_shard(
    p_run bigint, p_number integer, p_attempt integer, p_status text, p_checked bigint, p_error text
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE trueup.reconcile_shard s
    SET status = p_status, owner = NULL, lease_until = NULL, checked = coalesce(p_checked, s.checked),
        failures = s.failures + (p_error IS NOT NULL)::integer, error = p_error, updated_at = clock_timestamp()
    WHERE s.run_id = p_run AND s.number = p_number AND s.attempts = p_attempt AND s.status = 'running';
    RETURN FOUND;
END $$;

-- An owner's heartbeat: extend the leases of its run and its running shards to p_lease from now, and update the run's
-- number of checked counters.
CREATE OR REPLACE FUNCTION trueup.keep_run(p_run bigint, p_owner text, p_lease interval) RETURNS void LANGUAGE sql AS $$
    UPDATE trueup.reconcile_run r SET lease_until = clock_timestamp() + p_lease
    WHERE r.id = p_run AND r.owner = p_owner AND r.status = 'running';
    UPDATE trueup.reconcile_shard s SET lease_until = clock_timestamp() + p_lease
    WHERE s.run_id = p_run AND s.owner = p_owner AND s.status = 'running';
    UPDATE trueup.reconcile_run r
    SET checked = (SELECT coalesce(sum(s.checked), 0) FROM trueup.reconcile_shard s WHERE s.run_id = p_run)
    WHERE r.id = p_run AND r.status = 'running';
$$;

-- End a run. Its figures are counted from its rows, so each row counts once, whichever process wrote it and however
-- often the run was interrupted. p_status null: derived from its shards, if all have ended. p_owner: only if the run
-- still belongs to this owner; null: always. False: the run has ended before, belongs to another owner, or shards are
-- left.
CREATE OR REPLACE FUNCTION trueup.end_run(
    p_run bigint, p_status text, p_error text, p_owner text DEFAULT NULL
) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    d record;
    v_failed bigint;
    v_left bigint;
    v_checked bigint;
    v_error text;
BEGIN
    PERFORM FROM trueup.reconcile_run r
    WHERE r.id = p_run AND r.status = 'running' AND (p_owner IS NULL OR r.owner = p_owner) FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT count(*) FILTER (WHERE s.status = 'failed'), count(*) FILTER (WHERE s.status IN ('waiting', 'running')),
           coalesce(sum(s.checked), 0), min(s.error) FILTER (WHERE s.status = 'failed')
    INTO v_failed, v_left, v_checked, v_error
    FROM trueup.reconcile_shard s WHERE s.run_id = p_run;
    IF p_status IS NULL AND v_left > 0 THEN
        RETURN false;
    END IF;
    SELECT count(DISTINCT t.user_id) AS drifted, count(*) FILTER (WHERE t.run_id = p_run) AS found_new,
           count(*) FILTER (WHERE t.run_id = p_run AND t.action = 'corrected') AS corrected,
           count(*) FILTER (WHERE t.action = 'review') AS in_review,
           coalesce(sum(greatest(coalesce(t.observed, 0) - t.expected, 0)), 0) AS overstated,
           coalesce(sum(greatest(t.expected - coalesce(t.observed, 0), 0)), 0) AS understated,
           coalesce(sum(t.tokens_explained), 0) AS explained
    INTO d FROM trueup.drift t WHERE t.last_run_id = p_run;
    UPDATE trueup.reconcile_run r
    SET status = coalesce(p_status, CASE WHEN v_failed > 0 THEN 'failed' ELSE 'finished' END),
        error = coalesce(p_error, v_error), finished_at = clock_timestamp(), owner = NULL, lease_until = NULL,
        checked = v_checked, drifted = d.drifted, found_new = d.found_new, corrected = d.corrected,
        in_review = d.in_review, tokens_overstated = d.overstated, tokens_understated = d.understated,
        tokens_explained = d.explained,
        defects = (SELECT count(*) FROM trueup.defect f WHERE f.run_id = p_run)
    WHERE r.id = p_run;
    RETURN true;
END $$;

-- Return the abandoned shards of runs planned under these rules, so that the caller sends their messages again, and
-- renew those runs' leases. Swept are the scheduled runs, and other runs whose leases have expired. End the runs that
-- have no shard left. p_most: failures in a row after which a shard is given up.
CREATE OR REPLACE FUNCTION trueup.sweep_runs(p_rules jsonb, p_lease interval, p_most integer)
RETURNS TABLE (run_id bigint, number integer) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    r record;
BEGIN
    FOR r IN SELECT t.id FROM trueup.reconcile_run t
             WHERE t.status = 'running' AND t.only_user IS NULL AND t.rules = p_rules
               AND (t.period IS NOT NULL OR NOT trueup.run_is_alive(t.id))
             FOR UPDATE SKIP LOCKED
    LOOP
        PERFORM trueup.give_up_shards(r.id, p_most);
        IF NOT trueup.end_run(r.id, NULL, NULL) THEN
            UPDATE trueup.reconcile_run t SET lease_until = clock_timestamp() + p_lease WHERE t.id = r.id;
            RETURN QUERY
            SELECT s.run_id, s.number FROM trueup.reconcile_shard s
            WHERE s.run_id = r.id
              AND (s.status = 'waiting' OR s.status = 'running' AND s.lease_until <= clock_timestamp())
            ORDER BY s.number;
        END IF;
    END LOOP;
END $$;
