{% from "gate/shared.sql" import by_index, queue_for %}
{% from "gate/store_balance.sql" import store_balance %}
-- Provider calls. The intent of a call whose cost is not known stays as evidence.

-- Record the intent of a call that costs at most p_bound tokens, and renew the lease and the hold for the time that the
-- call may take. `granted` is false, and no intent is recorded, if the hold has ended or belongs to a later attempt
-- (`overtaken`), or if it has only `tokens_left` for this call, without those of other calls in flight.
-- This locks only the hold's row. The balance does not change, so other transactions of the user need not wait.
CREATE OR REPLACE FUNCTION trueup.begin_call(
    p_user {{ user_id_type }}, p_task text, p_attempt integer, p_call_key text, p_bound bigint,
    p_lease interval, p_ttl interval, at timestamptz,
    OUT granted boolean, OUT overtaken boolean, OUT tokens_left bigint
) LANGUAGE plpgsql {{ by_index }} AS $$
DECLARE
    v_at timestamptz := coalesce(at, clock_timestamp());
BEGIN
    UPDATE trueup.hold h
    SET lease_until = greatest(h.lease_until, v_at + p_lease), expires_at = greatest(h.expires_at, v_at + p_ttl)
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.status = 'open' AND h.attempt = p_attempt
      AND h.body_ended_at IS NULL
    RETURNING h.tokens_reserved - h.tokens_covered INTO tokens_left;
    overtaken := NOT FOUND;
    tokens_left := greatest(coalesce(tokens_left, 0) - trueup.in_flight(p_user, p_task, p_call_key, p_attempt), 0);
    granted := NOT overtaken AND p_bound <= tokens_left;
    IF granted THEN
        INSERT INTO trueup.call_intent AS c (user_id, task_id, call_key, attempt, tokens_bound, outcome, started_at)
        VALUES (p_user, p_task, p_call_key, p_attempt, p_bound, 'started', v_at)
        ON CONFLICT (user_id, task_id, call_key, attempt)
        DO UPDATE SET tokens_bound = excluded.tokens_bound, outcome = 'started', started_at = excluded.started_at;
    END IF;
END $$;

-- End a call without usage. p_unknown: its cost is not known, so its intent is kept. Otherwise it cost nothing.
CREATE OR REPLACE FUNCTION trueup.end_call(
    p_user {{ user_id_type }}, p_task text, p_attempt integer, p_call_key text, p_unknown boolean
) RETURNS void LANGUAGE plpgsql {{ by_index }} AS $$
BEGIN
    IF p_unknown THEN
        UPDATE trueup.call_intent c SET outcome = 'unknown'
        WHERE c.user_id = p_user AND c.task_id = p_task AND c.call_key = p_call_key AND c.attempt = p_attempt;
    ELSE
        DELETE FROM trueup.call_intent c
        WHERE c.user_id = p_user AND c.task_id = p_task AND c.call_key = p_call_key AND c.attempt = p_attempt;
    END IF;
END $$;

-- Add tokens to a task's open hold by the same decision as at the gate, or return the `reason` of a denial (NULL:
-- added). A replay is never denied, so that it takes the same path as the original work, but it gets no tokens: it buys
-- nothing.
CREATE OR REPLACE FUNCTION trueup.extend_hold(
    p_user {{ user_id_type }}, p_task text, p_attempt integer, p_feature text, p_tokens bigint, p_mode text,
    INOUT at timestamptz, OUT overtaken boolean, OUT reason text, OUT tokens_left bigint
) LANGUAGE plpgsql {{ by_index }} AS $$
DECLARE
    a record;
    v_replay boolean;
    v_added bigint;
BEGIN
    {{ queue_for("p_user") }}
    SELECT * INTO a FROM trueup.lock_account(p_user, at);
    PERFORM trueup.require_counted();
    at := a.at;
    reason := trueup.decide(a.subscribed, a.is_active, a.end_date, coalesce(a.original, 0), coalesce(a.consumed, 0),
                            coalesce(a.held, 0), p_tokens, at);
    IF reason IS NOT NULL AND EXISTS (
        SELECT FROM trueup.hold h WHERE h.user_id = p_user AND h.task_id = p_task AND h.status = 'open'
                                    AND h.attempt = p_attempt AND h.body_ended_at IS NULL AND NOT h.completed)
       AND trueup.override_denial(p_user, p_task, p_feature, p_mode, reason, p_tokens, at) THEN
        reason := NULL;
    END IF;
    UPDATE trueup.hold h
    SET tokens_reserved = h.tokens_reserved + CASE WHEN reason IS NULL AND NOT h.completed THEN p_tokens ELSE 0 END
    WHERE h.user_id = p_user AND h.task_id = p_task AND h.status = 'open' AND h.attempt = p_attempt
      AND h.body_ended_at IS NULL
    RETURNING h.tokens_reserved - h.tokens_covered, h.completed INTO tokens_left, v_replay;
    overtaken := NOT FOUND;
    v_added := CASE WHEN reason IS NULL AND NOT v_replay THEN p_tokens ELSE 0 END;  -- v_replay NULL: overtaken
    IF v_replay THEN
        reason := NULL;
    END IF;
    tokens_left := greatest(coalesce(tokens_left, 0) - trueup.in_flight(p_user, p_task, NULL, NULL), 0);
{{ store_balance("p_user", held="a.held + v_added") }}
END $$;

-- Delete stored answers of charges older than p_before, at most p_limit. Returns the number deleted.
CREATE OR REPLACE FUNCTION trueup.prune_answers(p_before timestamptz, p_limit integer)
RETURNS bigint LANGUAGE sql AS $$
    WITH old AS (
        SELECT c.user_id, c.task_id, c.call_key FROM trueup.charge c
        WHERE c.charged_at < p_before AND c.answer IS NOT NULL
        LIMIT p_limit FOR UPDATE SKIP LOCKED
    ), pruned AS (
        UPDATE trueup.charge c SET answer = NULL FROM old o
        WHERE (c.user_id, c.task_id, c.call_key) = (o.user_id, o.task_id, o.call_key) RETURNING 1
    )
    SELECT count(*) FROM pruned
$$;
