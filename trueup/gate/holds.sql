{% from "accounts/entitlements.sql" import decision, log_epoch %}
{% from "gate/shared.sql" import by_index, queue_for, require_counted %}
{% from "gate/store_balance.sql" import create_balance, store_balance %}
{# The parameters of the functions that open a hold, and their answer. #}
{% set parameters %}
    p_user {{ user_id_type }}, p_task text, p_request text, p_fresh integer, p_retries integer, p_feature text,
    p_section text, p_owner text, p_tokens bigint, p_lease interval, p_ttl interval, p_waits integer, p_mode text,
    INOUT at timestamptz,
    OUT reason text, OUT overridden text, OUT reused boolean, OUT follows boolean, OUT busy_until timestamptz,
    OUT redundant boolean, OUT waits integer, OUT hold_attempt integer, OUT tokens_left bigint, OUT reattached boolean,
    OUT replay boolean, OUT fresh integer, OUT expiry timestamptz,
    OUT original bigint, OUT consumed bigint, OUT held bigint, OUT end_date timestamptz
{%- endset %}

{# Insert a hold, in a function with these parameters. #}
{% macro insert_hold(fresh, attempt, retries, tokens, expiry, completed) -%}
INSERT INTO trueup.hold (user_id, task_id, request, fresh_retries, attempt, retries, feature_name, section, owner, status,
                             tokens_reserved, opened_at, lease_until, expires_at, completed)
    VALUES (p_user, p_task, p_request, {{ fresh }}, {{ attempt }}, {{ retries }}, p_feature, p_section, p_owner, 'open',
            {{ tokens }}, at, at + p_lease, {{ expiry }}, {{ completed }})
{%- endmacro %}
-- Holds, from the gate to their end. balances.sql describes how the balance row is locked.

-- Reserve tokens for a task, or return the `reason` of the denial (NULL: admitted). `overridden`: the reason of a
-- denial that the feature's mode overrode; the task then gets all its tokens, even beyond the budget. `original`,
-- `consumed`, `held` and `end_date` explain a denial; they may be NULL otherwise.
--
-- If the task has an open hold, one of these cases applies:
--   * p_retries is higher: the attempt that asked for this retry has ended, or its worker saw it die. Or the lease has
--     run out: the previous attempt is dead, or too slow. Then this attempt takes the hold over, with the next attempt
--     number, which fences the previous attempt. That attempt may still be in a call, because the retry may stem from
--     an even earlier one. So the call's maximum cost stays reserved, and the same amount is added if the budget allows
--     it; otherwise a task whose worker died in a call for its whole hold could never continue. (A worker that saw the
--     process die reports it with trueup.abandon_calls.) A mode that overrides denials adds the amount whatever the
--     budget has left, and records nothing: the task's own gate has recorded it.
--   * Otherwise the previous attempt is running, and this delivery is a duplicate. `busy_until`: when to try again. One
--     waiting duplicate is enough in case the running attempt dies; any other is `redundant`, or they would multiply.
--     The waiting duplicate gets a number, `waits`, and returns it as p_waits: copies of its message carry older
--     numbers.
-- A task whose body has returned gets a hold without tokens. Its charged calls are replayed, and it produces its result
-- again without buying anything.
-- p_request: the fingerprint of the task's request. Another request with this id gets a hold of its own (`follows`)
-- once the earlier request's hold has ended, and is refused (`reused`) while that hold is open. A replay is `redundant`
-- instead: it is a copy of a message whose work is done, and the id's result belongs to the other request. `follows` is
-- also true for a redelivery of this request, if another request has had a hold since its own.
-- p_fresh: the number of retries by which the body asked for new answers. Each has calls of its own.
-- A hold whose body has ended is open only for calls in flight (see trueup.close_hold). Its task passes the gate like a
-- new one, and gets the hold back with the new tokens added.
--
-- This function decides the common case in as few statements as the lock allows: a new task of a user whose balance is
-- up to date. trueup.open_other_hold decides all others.
CREATE OR REPLACE FUNCTION trueup.open_hold(
{{ parameters }}
) LANGUAGE plpgsql {{ by_index }} AS $$
#variable_conflict use_column
DECLARE
    b trueup.balance;
    v_is_common boolean;
BEGIN
    {{ queue_for("p_user") }}
    SELECT * INTO b FROM trueup.balance t WHERE t.user_id = p_user FOR UPDATE;
    at := coalesce(at, clock_timestamp());
    SELECT {{ decision("true", "e.is_active", "e.end_date", "e.plan_tokens", "b.consumed", "b.held", "p_tokens",
                       "open_hold.at") }} IS NULL
           AND (b.window_start, b.log_epoch) = (e.window_start, {{ log_epoch() }})
           AND NOT EXISTS (SELECT FROM trueup.usage_delta d WHERE d.user_id = p_user)
           AND NOT EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = p_user)
           {%- if usage_log.is_written_by_host %}
           AND NOT EXISTS (SELECT FROM trueup.owed_charge o WHERE o.user_id = p_user)
           {%- endif %}
           AND NOT EXISTS (SELECT FROM trueup.hold t WHERE t.user_id = p_user AND t.task_id = p_task)
           AND NOT EXISTS (SELECT FROM trueup.hold t
                           WHERE t.user_id = p_user AND t.status = 'open' AND t.expires_at <= open_hold.at)
    INTO v_is_common FROM trueup.entitlements(open_hold.at) e WHERE e.user_id = p_user;
    {{ require_counted() }}  -- after the look at the deltas, so that a write they missed is noticed here
    IF v_is_common THEN
        expiry := at + p_ttl;
        WITH opened AS (
    {{ insert_hold("p_fresh", "1", "p_retries", "p_tokens", "open_hold.expiry", "false") }}
        )
        UPDATE trueup.balance t SET held = b.held + p_tokens WHERE t.user_id = p_user;
        SELECT false, false, 1, p_tokens, false, false, p_fresh
        INTO reused, follows, hold_attempt, tokens_left, reattached, replay, fresh;
        RETURN;
    END IF;
    SELECT o.* INTO at, reason, overridden, reused, follows, busy_until, redundant, waits, hold_attempt, tokens_left,
                    reattached, replay, fresh, expiry, original, consumed, held, end_date
    FROM trueup.open_other_hold(p_user, p_task, p_request, p_fresh, p_retries, p_feature, p_section, p_owner, p_tokens,
                                p_lease, p_ttl, p_waits, p_mode, at) o;
END $$;

-- Decide whatever trueup.open_hold finds no common case, under its lock.
-- Longer than 70 lines, because one decision under one row lock fills all of the answer.
CREATE OR REPLACE FUNCTION trueup.open_other_hold(
{{ parameters }}
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    a record;
    f record;
    h trueup.hold;
    v_tokens bigint;
    v_kept bigint;
    v_running boolean;
BEGIN
    SELECT * INTO a FROM trueup.lock_account(p_user, at);
    SELECT a.at, a.at + p_ttl, coalesce(a.original, 0), coalesce(a.consumed, 0), coalesce(a.held, 0), a.end_date
    INTO at, expiry, original, consumed, held, end_date;
    SELECT * INTO f FROM trueup.find_hold(p_user, p_task, p_request);
    h := f.own;
    hold_attempt := f.attempts + 1;
    follows := f.attempts > coalesce(h.attempt, 0);
    fresh := greatest(coalesce(h.fresh_retries, 0), p_fresh);
    reattached := coalesce(h.status = 'open', false);
    v_running := reattached AND h.body_ended_at IS NULL;
    replay := coalesce(h.completed, false);
    v_tokens := CASE WHEN replay THEN 0 ELSE p_tokens END;
    IF f.in_use_until IS NOT NULL THEN
        SELECT NOT replay, replay, 0, CASE WHEN replay THEN f.in_use_until END
        INTO reused, redundant, waits, busy_until;
    ELSIF v_running AND p_retries <= h.retries AND h.lease_until > at THEN
        SELECT w.* INTO redundant, waits, busy_until FROM trueup.record_duplicate(h, p_waits, at) w;
    ELSIF v_running THEN
        v_kept := trueup.tokens_in_call(h);
        IF v_kept > 0 AND (trueup.gate_mode_of(p_feature, p_mode) <> 'enforce' OR trueup.decide(
            a.subscribed, a.is_active, a.end_date, original, consumed, held, v_kept, at) IS NULL) THEN
            held := held + trueup.raise_hold(h, v_kept);
        END IF;
        tokens_left := trueup.take_over(p_user, p_task, h.id, p_retries, p_fresh, p_owner, at + p_lease, expiry);
    ELSE
        reason := CASE WHEN NOT replay THEN trueup.decide(
            a.subscribed, a.is_active, a.end_date, original, consumed, held, v_tokens, at) END;
        IF reason IS NOT NULL AND trueup.override_denial(p_user, p_task, p_feature, p_mode, reason, v_tokens, at) THEN
            overridden := reason;
            reason := NULL;
            IF a.consumed IS NULL THEN
                -- A user without a subscription has no balance yet; the balance must count the hold.
                {{ create_balance("p_user") }}
                SELECT * INTO a FROM trueup.lock_account(p_user, at);
                held := coalesce(a.held, 0);
            END IF;
        END IF;
        IF reason IS NULL AND reattached THEN
            held := held + trueup.raise_hold(h, v_tokens);
            tokens_left := trueup.take_over(p_user, p_task, h.id, p_retries, p_fresh, p_owner, at + p_lease, expiry);
        ELSIF reason IS NULL THEN
            -- A replay's hold is completed from the start, however its attempts end: the work is done.
            {{ insert_hold("open_other_hold.fresh", "hold_attempt",
                           "CASE WHEN h.completed THEN h.retries ELSE p_retries END", "v_tokens",
                           "open_other_hold.expiry", "coalesce(h.completed, false)") }};
            -- Calls in flight of an ended hold are not covered by this one: their tokens were released.
            UPDATE trueup.call_intent c SET outcome = 'unknown'
            WHERE c.user_id = p_user AND c.task_id = p_task AND c.outcome = 'started';
            held := held + v_tokens;
            tokens_left := v_tokens;
        END IF;
    END IF;
{{ store_balance("p_user", held="open_other_hold.held") }}
END $$;

-- The maximum cost of the calls in flight of the attempt that has this hold. NULL: it has none.
CREATE OR REPLACE FUNCTION trueup.tokens_in_call(h trueup.hold) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT sum(c.tokens_bound)::bigint FROM trueup.call_intent c
    WHERE c.user_id = h.user_id AND c.task_id = h.task_id AND c.attempt = h.attempt AND c.outcome = 'started'
$$;

-- Add tokens to a hold and return their number. trueup.open_other_hold calls this under its lock.
CREATE OR REPLACE FUNCTION trueup.raise_hold(h trueup.hold, p_tokens bigint) RETURNS bigint LANGUAGE sql AS $$
    UPDATE trueup.hold t SET tokens_reserved = t.tokens_reserved + p_tokens
    WHERE t.user_id = h.user_id AND t.task_id = h.task_id AND t.id = h.id
    RETURNING p_tokens
$$;

-- The last hold of a task's request (NULL: it has none), the number of attempts of all requests with this id, and the
-- end of the lease of another request's open hold (NULL: there is none). No attempt number is used twice for an id.
CREATE OR REPLACE FUNCTION trueup.find_hold(
    p_user {{ user_id_type }}, p_task text, p_request text,
    OUT own trueup.hold, OUT attempts integer, OUT in_use_until timestamptz
) LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_last trueup.hold;
BEGIN
    SELECT * INTO v_last FROM trueup.hold h WHERE h.user_id = p_user AND h.task_id = p_task ORDER BY h.id DESC LIMIT 1;
    IF v_last.request = p_request THEN
        own := v_last;
    ELSIF FOUND THEN
        SELECT * INTO own FROM trueup.hold h
        WHERE h.user_id = p_user AND h.task_id = p_task AND h.request = p_request ORDER BY h.id DESC LIMIT 1;
        in_use_until := CASE WHEN v_last.status = 'open' THEN v_last.lease_until END;
    END IF;
    attempts := coalesce(v_last.attempt, 0);
END $$;

-- Record a duplicate of a running task, unless another duplicate waits. trueup.open_other_hold calls this under its
-- lock.
CREATE OR REPLACE FUNCTION trueup.record_duplicate(
    h trueup.hold, p_waits integer, at timestamptz, OUT redundant boolean, OUT waits integer, OUT busy_until timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    redundant := coalesce(h.duplicate_until > at, false) AND p_waits < h.duplicate_waits;
    waits := greatest(h.duplicate_waits, p_waits) + 1;
    busy_until := least(h.lease_until, at + interval '1 minute');
    UPDATE trueup.hold t SET duplicate_until = busy_until, duplicate_waits = waits
    WHERE NOT redundant AND t.user_id = h.user_id AND t.task_id = h.task_id AND t.id = h.id;
END $$;

-- Give an open hold to the next attempt and return the tokens that it may spend. trueup.open_other_hold calls this
-- under its lock.
CREATE OR REPLACE FUNCTION trueup.take_over(
    p_user {{ user_id_type }}, p_task text, p_id bigint, p_retries integer, p_fresh integer, p_owner text,
    p_lease_until timestamptz, p_expires_at timestamptz
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    v_tokens bigint;
BEGIN
    UPDATE trueup.hold h
    SET attempt = h.attempt + 1, retries = greatest(h.retries, p_retries),
        fresh_retries = greatest(h.fresh_retries, p_fresh), owner = p_owner,
        lease_until = p_lease_until, expires_at = p_expires_at, body_ended_at = NULL
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.id = p_id
    RETURNING h.tokens_reserved - h.tokens_covered INTO v_tokens;
    RETURN greatest(v_tokens - trueup.in_flight(p_user, p_task, NULL, NULL), 0);
END $$;

-- Renew the open holds of living attempts and return their number. A process's heartbeat calls this for all its holds
-- (user_id, task_id, attempt). A hold is not renewed after p_most since its opening, so that a body that hangs can't
-- keep it for ever. This locks only the rows of the holds, as trueup.begin_call does. The next beat renews a row that
-- is locked now, so a heartbeat never waits and never deadlocks.
CREATE OR REPLACE FUNCTION trueup.keep_holds(
    p_holds jsonb, p_lease interval, p_ttl interval, p_most interval, at timestamptz
) RETURNS bigint LANGUAGE sql {{ by_index }} AS $$
    WITH clock AS MATERIALIZED (
        SELECT coalesce(keep_holds.at, clock_timestamp()) AS now
    ), living AS (
        SELECT h.user_id, h.task_id, h.id, clock.now
        FROM clock, jsonb_to_recordset(p_holds) AS k (user_id {{ user_id_type }}, task_id text, attempt integer)
        JOIN trueup.hold h USING (user_id, task_id, attempt)
        WHERE h.status = 'open' AND h.body_ended_at IS NULL AND h.opened_at + p_most > clock.now
        FOR UPDATE OF h SKIP LOCKED
    ), kept AS (
        UPDATE trueup.hold h
        SET lease_until = greatest(h.lease_until, l.now + p_lease), expires_at = greatest(h.expires_at, l.now + p_ttl)
        FROM living l WHERE (h.user_id, h.task_id, h.id) = (l.user_id, l.task_id, l.id)
        RETURNING 1
    )
    SELECT count(*) FROM kept
$$;

-- A worker saw a process die: the calls of that process are no longer in flight, and their outcome is unknown.
-- Does nothing if the process has lost the hold: then its attempt number is not known.
CREATE OR REPLACE FUNCTION trueup.abandon_calls(p_user {{ user_id_type }}, p_task text, p_owner text)
RETURNS void LANGUAGE sql {{ by_index }} AS $$
    UPDATE trueup.call_intent c SET outcome = 'unknown'
    FROM trueup.hold h
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.status = 'open' AND h.owner = p_owner
      AND c.user_id = p_user AND c.task_id = p_task AND c.attempt = h.attempt AND c.outcome = 'started'
$$;

-- Close a hold, release its remaining tokens and return its status. NULL: the hold is closed, or belongs to another
-- attempt. p_attempt NULL: the attempt of p_owner, who has died, as the caller knows. p_completed: the body has
-- returned. Attempts that lost their lease may still be in calls, which are charged late. The tokens of these calls
-- stay held, and the function returns 'open'. The hold ends when they are charged, or when it expires: its time is
-- extended by the time from the start of the last call to the expiry, as in trueup.kept_past_expiry. The commit does
-- not wait for the disk. If a crash of the server loses it, the hold is open again until it expires; no token is
-- promised twice.
CREATE OR REPLACE FUNCTION trueup.close_hold(
    p_user {{ user_id_type }}, p_task text, p_attempt integer, p_owner text, p_completed boolean, at timestamptz
) RETURNS text LANGUAGE plpgsql {{ by_index }} AS $$
DECLARE
    v_commit text := set_config('synchronous_commit', 'off', true);
    c record;
    v_at timestamptz;
    v_kept bigint;
    v_status text;
BEGIN
    {{ queue_for("p_user") }}
    PERFORM FROM trueup.balance b WHERE b.user_id = p_user FOR UPDATE;
    v_at := coalesce(at, clock_timestamp());
    SELECT h.attempt, h.tokens_reserved - h.tokens_covered AS rest, f.bound, f.started_at INTO c
    FROM trueup.hold h CROSS JOIN LATERAL (
        SELECT sum(i.tokens_bound) AS bound, max(i.started_at) AS started_at FROM trueup.call_intent i
        WHERE i.user_id = p_user AND i.task_id = p_task AND i.outcome = 'started' AND i.attempt <> h.attempt) f
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.status = 'open' AND h.body_ended_at IS NULL
      AND (h.attempt = p_attempt OR (p_attempt IS NULL AND h.owner = p_owner));
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    v_kept := least(coalesce(c.bound, 0), c.rest);
    IF v_kept > 0 THEN
        -- This attempt's own calls ended with its body, so no tokens are kept for them.
        UPDATE trueup.call_intent i SET outcome = 'unknown'
        WHERE i.user_id = p_user AND i.task_id = p_task AND i.outcome = 'started' AND i.attempt = c.attempt;
    END IF;
    WITH lowered AS (
        UPDATE trueup.balance b SET held = b.held - (c.rest - v_kept) WHERE b.user_id = p_user
    )
    UPDATE trueup.hold h
    SET status = CASE WHEN v_kept > 0 THEN 'open' WHEN h.calls > 0 THEN 'settled' ELSE 'released' END,
        closed_at = CASE WHEN v_kept = 0 THEN v_at END,
        body_ended_at = CASE WHEN v_kept > 0 THEN v_at END,
        tokens_reserved = h.tokens_reserved - CASE WHEN v_kept > 0 THEN c.rest - v_kept ELSE 0 END,
        expires_at = CASE WHEN v_kept > 0 THEN h.expires_at + (h.expires_at - c.started_at) ELSE h.expires_at END,
        completed = h.completed OR p_completed
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.status = 'open'
    RETURNING h.status INTO v_status;
    RETURN v_status;
END $$;

-- End the overdue holds of these users. The caller has locked their balances, and lowers `held` by `freed`. A frozen
-- process may still return from a call. The maximum cost of calls in flight therefore stays held for a second period,
-- as long as the time from the start of the last call to the expiry (trueup.kept_past_expiry); then `expired` is false.
-- A call that began in the meantime has renewed the hold: PostgreSQL checks the conditions on `h` again under the lock
-- of its row.
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

-- End overdue holds, at most p_limit. Returns the number of ended holds and all released tokens, including those of
-- holds that stay open for calls in flight. Users whose balance row is locked are skipped: the transaction that has the
-- lock, or the next sweep, ends their holds.
CREATE OR REPLACE FUNCTION trueup.expire_holds(p_limit integer, at timestamptz)
RETURNS TABLE (holds bigint, tokens bigint) LANGUAGE plpgsql {{ by_index }} AS $$
DECLARE
    v_at timestamptz := coalesce(at, clock_timestamp());
    v_users {{ user_id_type }}[];
BEGIN
    -- Lock first, in a separate statement: the next statement then sees the holds as they are under the locks.
    SELECT array_agg(locked.user_id) INTO v_users FROM (
        SELECT b.user_id FROM trueup.balance b
        WHERE b.user_id = ANY (ARRAY(
            SELECT h.user_id FROM trueup.hold h WHERE h.status = 'open' AND h.expires_at <= v_at
            ORDER BY h.expires_at LIMIT p_limit))
        FOR UPDATE SKIP LOCKED
    ) AS locked;
    RETURN QUERY
    WITH ended AS (
        SELECT * FROM trueup.end_overdue_holds(v_users, v_at)
    ), given_back AS (
        UPDATE trueup.balance b SET held = b.held - e.freed
        FROM (SELECT x.user_id, sum(x.freed) AS freed FROM ended x GROUP BY x.user_id) e
        WHERE b.user_id = e.user_id AND b.user_id = ANY (v_users)
    )
    SELECT count(*) FILTER (WHERE ended.expired), coalesce(sum(ended.freed), 0)::bigint FROM ended;
END $$;
