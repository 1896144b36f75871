{% from "gate/store_balance.sql" import create_balance %}
{% from "host/rows.sql" import used_since %}
-- Writes to the balance. Each takes the user's balance row first and reads everything else after it, in
-- statements of their own: under READ COMMITTED each sees what was committed while it waited for the lock. (One
-- statement that locks and reads at once would decide on what was true before the wait.)
-- `at`: the injected clock; NULL means the database's, which all workers share.
-- Where a host table is in scope, parameters are named in full: the host may have a column of any name.

-- Stand in line for the user's balance, until the transaction ends. The row's own lock is the gate and would do; but a
-- crowd that waits for a row which each of them updates is woken all at once, and falls steeply with its size. Here one
-- is woken at a time. (Two users may share a number: then one waits a moment for the other.) The number is taken before
-- the row and by whoever takes one row only, so nobody waits for it with a row in hand.
-- Any role that may connect can take that number and keep it. So nobody waits for it longer than lock_timeout says: after
-- that the balance's row alone is the gate.
CREATE OR REPLACE FUNCTION trueup.queue_for(p_user {{ user_id_type }}) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
BEGIN
    IF pg_try_advisory_xact_lock(1953658213, hashtext(p_user::text)) THEN  -- "true" in ASCII
        RETURN;
    END IF;
    BEGIN
        PERFORM pg_advisory_xact_lock(1953658213, hashtext(p_user::text));
    EXCEPTION WHEN lock_not_available THEN
        RETURN;
    END;
END $$;

-- Lock the user's balance, and bring it up to date: fold the deltas, or rebuild it from the log if the window
-- moved or the log was truncated; take back overdue holds. The caller stores window_start, log_epoch, consumed, held.
CREATE OR REPLACE FUNCTION trueup.lock_account(
    p_user {{ user_id_type }}, INOUT at timestamptz,
    OUT subscribed boolean, OUT is_active boolean, OUT end_date timestamptz, OUT original bigint,
    OUT window_start timestamptz, OUT log_epoch bigint, OUT consumed bigint, OUT held bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    b trueup.balance;
    e record;
    v_consumed bigint;
    v_overdue bigint;
BEGIN
    SELECT * INTO b FROM trueup.balance WHERE user_id = p_user FOR UPDATE;
    IF NOT FOUND AND EXISTS (SELECT FROM {{ subscription }} s WHERE s.{{ subscription.user_id }} = lock_account.p_user) THEN
        {{ create_balance("p_user") }}
        SELECT * INTO b FROM trueup.balance WHERE user_id = p_user FOR UPDATE;
    END IF;
    at := coalesce(at, clock_timestamp());
    SELECT t.*, trueup.log_epoch() AS log_epoch INTO e FROM trueup.entitlements(at) t WHERE t.user_id = p_user;
    subscribed := FOUND;
    IF b.user_id IS NULL THEN
        RETURN;
    END IF;
    IF subscribed AND EXISTS (SELECT FROM trueup.token_grant WHERE user_id = p_user) THEN
        PERFORM trueup.settle_grants(p_user, at);
        -- As settled, and all of it anew: the tokens of one window must not be held against the usage of another.
        SELECT t.*, trueup.log_epoch() AS log_epoch INTO e FROM trueup.entitlements(at) t WHERE t.user_id = p_user;
        subscribed := FOUND;
    END IF;
    IF subscribed AND (b.window_start, b.log_epoch) IS DISTINCT FROM (e.window_start, e.log_epoch) THEN
        -- One statement, one snapshot: a log row and its delta are both seen here or both left for later.
        WITH cleared AS (DELETE FROM trueup.usage_delta WHERE user_id = p_user)
        SELECT u.tokens INTO v_consumed FROM ({{ used_since("lock_account.p_user", "e.window_start") }}) u;
        b.window_start := e.window_start;
        b.log_epoch := e.log_epoch;
    ELSE
        WITH folded AS (DELETE FROM trueup.usage_delta WHERE user_id = p_user RETURNING used_at, tokens)
        SELECT b.consumed + coalesce(sum(tokens) FILTER (WHERE used_at >= b.window_start), 0)
        INTO v_consumed FROM folded;
    END IF;
    IF EXISTS (SELECT FROM trueup.hold WHERE user_id = p_user AND status = 'open' AND expires_at <= at) THEN
        SELECT sum(o.freed) INTO v_overdue FROM trueup.end_overdue_holds(ARRAY[p_user], at) o;
    END IF;
    is_active := e.is_active;
    end_date := e.end_date;
    original := coalesce(e.original, 0);
    window_start := b.window_start;
    log_epoch := b.log_epoch;
    consumed := v_consumed;
    held := b.held - coalesce(v_overdue, 0);
END $$;

-- End the holds of these users whose time has run out; the caller has locked their balances, and lowers `held` by `freed`.
-- A process may be frozen in a call and still come back with it: what such calls may cost stays held for as long again as
-- it is since the last of them began (trueup.kept_past_expiry), and `expired` is false. One that began a call of the
-- hold meanwhile has renewed it: the conditions on `h` are looked at again under its row's lock.
CREATE OR REPLACE FUNCTION trueup.end_overdue_holds(p_users {{ user_id_type }}[], at timestamptz)
RETURNS TABLE (user_id {{ user_id_type }}, expired boolean, freed bigint) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    UPDATE trueup.hold h
    SET status = CASE WHEN o.kept = 0 THEN 'expired' ELSE 'open' END,
        closed_at = CASE WHEN o.kept = 0 THEN at END,
        body_ended_at = CASE WHEN o.kept = 0 THEN h.body_ended_at ELSE at END,
        tokens_reserved = CASE WHEN o.kept = 0 THEN h.tokens_reserved ELSE h.tokens_covered + o.kept END,
        expires_at = CASE WHEN o.kept = 0 THEN h.expires_at ELSE o.kept_until END
    FROM (
        SELECT t.user_id, t.task_id, t.id, t.tokens_reserved - t.tokens_covered AS rest, k.kept, k.kept_until
        FROM trueup.hold t CROSS JOIN LATERAL trueup.kept_past_expiry(t, at) k
        WHERE t.user_id = ANY (p_users) AND t.status = 'open' AND t.expires_at <= at
    ) o
    WHERE (h.user_id, h.task_id, h.id) = (o.user_id, o.task_id, o.id) AND h.status = 'open' AND h.expires_at <= at
    RETURNING h.user_id, o.kept = 0, o.rest - o.kept;
END $$;

-- What calls of this task that are in flight may cost at most, other than the one named.
CREATE OR REPLACE FUNCTION trueup.in_flight(
    p_user {{ user_id_type }}, p_task text, p_call_key text, p_attempt integer
) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(c.tokens_bound), 0)::bigint FROM trueup.call_intent c
    WHERE c.user_id = p_user AND c.task_id = p_task AND c.outcome = 'started'
      AND (c.call_key, c.attempt) IS DISTINCT FROM (p_call_key, p_attempt)
$$;
