{% from "gate/shared.sql" import in_flight, turn_of %}
{% from "gate/store_balance.sql" import create_balance %}
{% from "host/rows.sql" import countable, used_since %}
-- The balance under its lock. A function locks the user's balance row first and reads everything else afterwards, in
-- separate statements. Under READ COMMITTED, each of them sees the data that was committed while the function waited
-- for the lock. A single statement that locks and reads would decide on the data from before the wait. `at`: the
-- injected clock; NULL means the database's, which all workers share. Where a host table is in scope, parameters are
-- qualified with the function's name: the host may have a column of any name.

-- Wait for the user's turn at the advisory lock: see gate/shared.sql. Any role that may connect can take this lock and
-- keep it, so after lock_timeout the transaction relies on the row lock alone.
CREATE OR REPLACE FUNCTION trueup.wait_for_turn(p_user {{ user_id_type }}) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
BEGIN
    PERFORM pg_advisory_xact_lock({{ turn_of("p_user") }});
EXCEPTION WHEN lock_not_available THEN
    RETURN;
END $$;

-- Lock the user's balance and bring it up to date: fold the deltas, or rebuild it from the log if the window moved or
-- the log was truncated; end overdue holds. The caller stores window_start, log_epoch, consumed and held.
CREATE OR REPLACE FUNCTION trueup.lock_account(
    p_user {{ user_id_type }}, INOUT at timestamptz,
    OUT subscribed boolean, OUT is_active boolean, OUT end_date timestamptz, OUT original bigint,
    OUT window_start timestamptz, OUT log_epoch bigint, OUT consumed bigint, OUT held bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    b trueup.balance;
    e record;
    v_consumed numeric;
    v_largest bigint;
    v_is_stale boolean;
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
        -- Read everything again after the settlement: tokens of one window must not be compared with usage of another.
        SELECT t.*, trueup.log_epoch() AS log_epoch INTO e FROM trueup.entitlements(at) t WHERE t.user_id = p_user;
        subscribed := FOUND;
    END IF;
    {% if usage_log.is_written_by_host %}
    PERFORM trueup.match_host_rows(p_user);
    {% endif %}
    v_is_stale := subscribed AND (b.window_start, b.log_epoch) IS DISTINCT FROM (e.window_start, e.log_epoch);
    IF NOT v_is_stale THEN
        WITH folded AS (DELETE FROM trueup.usage_delta WHERE user_id = p_user RETURNING used_at, tokens)
        SELECT b.consumed + coalesce(sum(tokens) FILTER (WHERE used_at >= b.window_start), 0), max(abs(tokens))
        INTO v_consumed, v_largest FROM folded;
        -- The delta of a row beyond the range has another figure than the row.
        v_is_stale := subscribed AND v_largest >= {{ uncountable }};
    END IF;
    IF v_is_stale THEN
        -- One statement has one snapshot: it sees both a log row and its delta, or neither.
        WITH cleared AS (DELETE FROM trueup.usage_delta WHERE user_id = p_user)
        SELECT u.tokens INTO v_consumed FROM ({{ used_since("lock_account.p_user", "e.window_start") }}) u;
        b.window_start := e.window_start;
        b.log_epoch := e.log_epoch;
    END IF;
    IF EXISTS (SELECT FROM trueup.hold WHERE user_id = p_user AND status = 'open' AND expires_at <= at) THEN
        SELECT sum(o.freed) INTO v_overdue FROM trueup.end_overdue_holds(ARRAY[p_user], at) o;
    END IF;
    is_active := e.is_active;
    end_date := e.end_date;
    original := coalesce(e.original, 0);
    window_start := b.window_start;
    log_epoch := b.log_epoch;
    consumed := {{ countable("v_consumed") }};
    held := b.held - coalesce(v_overdue, 0);
END $$;

-- The maximum cost of this task's calls in flight, without the named call.
CREATE OR REPLACE FUNCTION trueup.in_flight(
    p_user {{ user_id_type }}, p_task text, p_call_key text, p_attempt integer
) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT {{ in_flight("p_call_key", "p_attempt") }}
$$;
