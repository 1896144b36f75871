{% from "gate/shared.sql" import queue_for %}
{% from "gate/store_balance.sql" import store_balance %}
-- Grants are given and revoked here. Each function locks the user's balance first, as the gate does.

-- Lock a user's account with trueup.lock_account, and store the result. The lock lasts until the transaction ends.
CREATE OR REPLACE FUNCTION trueup.lock_and_store(
    p_user {{ user_id_type }}, INOUT at timestamptz,
    OUT subscribed boolean, OUT is_active boolean, OUT end_date timestamptz, OUT original bigint,
    OUT window_start timestamptz, OUT log_epoch bigint, OUT consumed bigint, OUT held bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    {{ queue_for("p_user") }}
    SELECT t.at, t.subscribed, t.is_active, t.end_date, t.original, t.window_start, t.log_epoch, t.consumed, t.held
    INTO at, subscribed, is_active, end_date, original, window_start, log_epoch, consumed, held
    FROM trueup.lock_account(p_user, at) t;
{{ store_balance("p_user", "lock_and_store") }}
END $$;

-- A user's grants: the tokens that they had left when this window began (`rest`), and the tokens that this window
-- (`used`) and earlier windows (`used_before`) used of them.
CREATE OR REPLACE FUNCTION trueup.list_grants(p_user {{ user_id_type }}, p_at timestamptz) RETURNS TABLE (
    id bigint, rest bigint, used bigint, used_before bigint, ends timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT g.id, t.rest, coalesce(t.settled, u.tokens, 0), g.tokens - t.rest, t.ends
    FROM trueup.token_grant g
    LEFT JOIN trueup.entitlements(p_at) e ON e.user_id = p_user
    JOIN trueup.grants_at(p_user, coalesce(e.window_start, 'infinity'), coalesce(e.plan_tokens, 0)) t ON t.id = g.id
    LEFT JOIN trueup.grant_uses(p_user, e.window_start, p_at, e.plan_tokens) u ON u.grant_id = g.id
    WHERE g.user_id = p_user
$$;

-- Grant a user tokens on top of the plan. `outcome`: granted; already (the same grant exists under the reference);
-- other_figures or revoked (the reference has another grant, or a revoked one); no_subscription; past (the expiry is
-- not in the future).
CREATE OR REPLACE FUNCTION trueup.grant_tokens(
    p_user {{ user_id_type }}, p_tokens bigint, p_reason text, p_reference text, p_expires_at timestamptz, p_by text,
    at timestamptz, OUT outcome text, OUT grant_id bigint, OUT granted_at timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    a record;
    g trueup.token_grant;
BEGIN
    a := trueup.lock_and_store(p_user, grant_tokens.at);
    IF a.subscribed IS NOT TRUE THEN
        outcome := 'no_subscription';
        RETURN;
    END IF;
    SELECT * INTO g FROM trueup.token_grant t WHERE t.user_id = p_user AND t.reference = p_reference;
    IF FOUND THEN
        outcome := CASE WHEN (g.tokens, g.expires_at) IS DISTINCT FROM (p_tokens, p_expires_at) THEN 'other_figures'
                        WHEN g.revoked_at IS NOT NULL THEN 'revoked' ELSE 'already' END;
    ELSIF p_expires_at <= a.at THEN
        outcome := 'past';
        RETURN;
    ELSE
        INSERT INTO trueup.token_grant (user_id, tokens, reason, reference, granted_at, expires_at, granted_by)
        VALUES (p_user, p_tokens, p_reason, p_reference, a.at, p_expires_at, p_by) RETURNING * INTO g;
        -- Record the window in which the grant begins, before the host can change it.
        PERFORM trueup.settle_grants(p_user, a.at);
        outcome := 'granted';
    END IF;
    grant_id := g.id;
    granted_at := g.granted_at;
END $$;

-- Revoke the unused tokens of a grant; usage that it has paid for stays paid. `outcome`: revoked; already; ended (it
-- has expired); unknown. `tokens`: the count of revoked tokens.
CREATE OR REPLACE FUNCTION trueup.revoke_grant(
    p_user {{ user_id_type }}, p_grant bigint, p_reason text, p_by text, at timestamptz,
    OUT outcome text, OUT tokens bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    a record;
    g trueup.token_grant;
BEGIN
    a := trueup.lock_and_store(p_user, revoke_grant.at);
    tokens := 0;
    SELECT * INTO g FROM trueup.token_grant t WHERE t.user_id = p_user AND t.id = p_grant;
    IF NOT FOUND THEN
        outcome := 'unknown';
    ELSIF g.revoked_at IS NOT NULL THEN
        outcome := 'already';
    ELSIF g.expires_at <= a.at THEN
        outcome := 'ended';
    ELSE
        UPDATE trueup.token_grant t
        -- At least the begin of the grant: after a clock was set back, the grant would end before it began.
        SET revoked_at = greatest(a.at, t.granted_at), revoked_by = p_by, revoke_reason = p_reason
        WHERE t.user_id = p_user AND t.id = p_grant;
        PERFORM trueup.lock_and_store(p_user, a.at);
        outcome := 'revoked';
        tokens := (SELECT u.rest - u.used FROM trueup.list_grants(p_user, a.at) u WHERE u.id = p_grant);
    END IF;
END $$;
