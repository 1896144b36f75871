{% from "host/rows.sql" import counter, raw_counter, right_counter, window_start %}
-- Decisions about drifts, and undoing a run's corrections. Each decision is a compare-and-set on the drift row's
-- values. It is recorded with the person, the note, and the counter before and after.

-- Decide about a drift in review: "accept" corrects the counter, "grant" gives the tokens that it shows too much as a
-- grant, "ignore" accepts the difference while it stays the same in this window. The function locks the user's balance,
-- so that one of two concurrent decisions wins and the expected value cannot change. It does not wait for the host's
-- row. Usage since the drift was found lowers counter and expected value alike, so only their difference is compared.
-- p_component: the place of a component, from 1; the decision is then about its tokens alone, and the other components
-- continue in a new drift row. Null: the decision is about the whole drift. `outcome`: decided; already (the same
-- decision was made before); or the reason of a refusal: unknown, not_in_review, decided_otherwise, superseded, gone,
-- busy, changed, no_component, out_of_range, nothing_to_grant, or "grant_" and the outcome of trueup.grant_tokens.
-- Longer than 70 lines: each refusal needs the state that the lines before it have read and locked.
CREATE OR REPLACE FUNCTION trueup.decide_drift(
    p_drift bigint, p_decision text, p_by text, p_note text, p_reference text, p_expires_at timestamptz,
    at timestamptz, p_component integer,
    OUT outcome text, OUT drift_user {{ user_id_type }}, OUT counter bigint, OUT expected bigint, OUT off_by bigint,
    OUT counter_after bigint, OUT grant_id bigint, OUT tokens_granted bigint, OUT decision text, OUT decided_by text,
    OUT decided_at timestamptz, OUT newer_drift bigint
) LANGUAGE plpgsql AS $$
DECLARE
    a record;
    d trueup.drift;
    c trueup.drift_decision;
    v_in_flight bigint;
    v_part jsonb;
BEGIN
    SELECT * INTO d FROM trueup.find_drift(p_drift);
    IF NOT FOUND THEN
        outcome := 'unknown';
        RETURN;
    END IF;
    drift_user := d.user_id;
    a := trueup.lock_and_store(d.user_id, decide_drift.at);
    PERFORM trueup.require_counted();  -- balances that miss the host's writes must not correct counters
    SELECT * INTO c FROM trueup.drift_decision t
    WHERE t.user_id = d.user_id AND t.drift_id = d.id AND t.decision <> 'undo' ORDER BY t.id DESC LIMIT 1;
    IF FOUND THEN
        newer_drift := (SELECT max(t.id) FROM trueup.drift t WHERE t.user_id = d.user_id AND t.id > d.id);
        outcome := CASE WHEN c.decision = p_decision AND c.component IS NOT DISTINCT FROM p_component THEN 'already'
                        WHEN c.component IS NOT NULL THEN 'superseded' ELSE 'decided_otherwise' END;
        decision := c.decision;
        decided_by := c.decided_by;
        decided_at := c.decided_at;
        counter := c.counter_before;
        counter_after := c.counter_after;
        grant_id := c.grant_id;
        RETURN;
    ELSIF d.action <> 'review' THEN
        outcome := 'not_in_review';
        decision := d.action;
        RETURN;
    END IF;
    newer_drift := (SELECT max(t.id) FROM trueup.drift t WHERE t.user_id = d.user_id AND t.id > d.id);
    IF newer_drift IS NOT NULL THEN
        outcome := 'superseded';
        RETURN;
    END IF;
    SELECT x.problem, x.counter INTO outcome, counter
    FROM trueup.lock_counter_of(d, a.subscribed, a.original, a.window_start, a.at) x;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;
    expected := {{ right_counter("a.original", "a.consumed") }};
    off_by := coalesce(counter, 0) - expected;
    v_in_flight := off_by - trueup.off_by(d);
    IF (counter IS NULL) <> (d.observed IS NULL)
       OR v_in_flight NOT IN (0, coalesce(d.observed, 0) - d.expected - trueup.off_by(d)) THEN
        outcome := 'changed';
        RETURN;
    END IF;
    v_part := d.evidence -> 'components' -> (p_component - 1);
    IF p_component IS NOT NULL AND (v_part IS NULL OR p_component < 1 OR NOT d.evidence ? 'journal') THEN
        outcome := 'no_component';
        RETURN;
    END IF;
    SELECT x.outcome, x.counter_after, x.tokens_granted, x.grant_id
    INTO outcome, counter_after, tokens_granted, grant_id
    FROM trueup.carry_out(d, p_decision, p_by, p_note, p_reference, p_expires_at, counter, v_in_flight,
                          a.original - a.consumed, a.original, a.at, (v_part ->> 'tokens')::bigint) x;
    IF outcome <> 'decided' THEN
        RETURN;
    END IF;
    IF p_component IS NOT NULL THEN
        PERFORM trueup.keep_other_components(d, p_decision, p_component, counter_after, v_in_flight,
                                             a.original + coalesce(tokens_granted, 0), a.consumed, a.at);
    END IF;
    decision := p_decision;
    decided_by := p_by;
    decided_at := a.at;
    INSERT INTO trueup.drift_decision (user_id, drift_id, decision, component, decided_by, note, counter_before,
                                       counter_after, grant_id, decided_at, window_start)
    VALUES (d.user_id, d.id, p_decision, p_component, p_by, p_note, counter, counter_after, grant_id, a.at,
            a.window_start);
END $$;

-- Insert the drift row in which the components go on that a decision about one component has left. An ignored component
-- stays in it: the counter keeps its tokens. Without another component, nothing is left to decide.
CREATE OR REPLACE FUNCTION trueup.keep_other_components(
    d trueup.drift, p_decision text, p_component integer, p_counter bigint, p_in_flight bigint, p_original bigint,
    p_consumed bigint, at timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_parts jsonb;
BEGIN
    SELECT jsonb_agg(CASE WHEN c.place = p_component THEN c.part || '{"ignored": true}' ELSE c.part END ORDER BY c.place)
    INTO v_parts
    FROM jsonb_array_elements(d.evidence -> 'components') WITH ORDINALITY AS c (part, place)
    WHERE c.place <> p_component OR p_decision = 'ignore';
    IF v_parts IS NULL THEN
        RETURN;
    END IF;
    INSERT INTO trueup.drift (user_id, run_id, subscription_id, observed, expected, cause, certainty, tokens_explained,
                              action, reason, evidence, found_at, last_run_id, last_seen_at)
    SELECT d.user_id, d.run_id, d.subscription_id, p_counter, {{ right_counter("p_original", "p_consumed") }}, c.causes,
           d.certainty, c.tokens, CASE WHEN c.waits THEN 'review' ELSE 'ignored' END, d.reason,
           d.evidence - 'after_correction' - 'held_components' || jsonb_build_object(
               'components', v_parts, 'original', p_original, 'consumed', p_consumed, 'in_flight', p_in_flight,
               'journal', d.evidence -> 'journal' || jsonb_build_object(
                   'at', clock_timestamp(), 'position', (
                       SELECT max(e.id) FROM trueup.counter_entry e
                       WHERE e.user_id = d.user_id AND e.subscription_id = d.subscription_id))),
           keep_other_components.at, d.last_run_id, keep_other_components.at
    FROM (SELECT string_agg(DISTINCT p ->> 'cause', '+') AS causes, abs(sum((p ->> 'tokens')::bigint)) AS tokens,
                 bool_or(NOT p ? 'ignored') AS waits
          FROM jsonb_array_elements(v_parts) p) c;
END $$;

-- A drift by its id alone. A drift in review is found by its index; any other by a scan of the table, to tell why it
-- cannot be decided.
CREATE OR REPLACE FUNCTION trueup.find_drift(p_drift bigint) RETURNS SETOF trueup.drift LANGUAGE sql STABLE AS $$
    SELECT * FROM trueup.drift t WHERE t.id = p_drift AND t.action = 'review'
    UNION ALL
    SELECT * FROM trueup.drift t WHERE t.id = p_drift
    LIMIT 1
$$;

-- Lock the counter of a drift. p_original, p_window: the user's account as read before. `problem`: 'gone' (no such
-- subscription), 'busy' (the host has locked it or changed the account), or null.
CREATE OR REPLACE FUNCTION trueup.lock_counter_of(
    d trueup.drift, p_subscribed boolean, p_original bigint, p_window timestamptz, at timestamptz,
    OUT problem text, OUT counter bigint
) LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    c := trueup.lock_counter(d.user_id, d.subscription_id, p_original);
    IF p_subscribed IS NOT TRUE OR c.is_there IS NOT TRUE THEN
        problem := CASE WHEN p_subscribed AND c.is_there IS NULL THEN 'busy' ELSE 'gone' END;
        RETURN;
    END IF;
    -- The host's row is locked now. The account was read before that, so its plan and window may have changed
    -- meanwhile.
    IF NOT EXISTS (SELECT FROM trueup.entitlements(lock_counter_of.at) e
                   WHERE e.user_id = d.user_id AND e.original = p_original AND e.window_start = p_window
                     AND e.plan_kind IS DISTINCT FROM 'unlimited') THEN
        problem := 'busy';
        RETURN;
    END IF;
    counter := c.counter;
END $$;

-- Carry out a decision about a drift. The caller has locked the user's balance and counter. p_remaining: p_original -
-- consumed. p_tokens: of the component that is decided; null: the whole drift. `outcome`: 'decided', or the reason of a
-- refusal, as in trueup.decide_drift.
CREATE OR REPLACE FUNCTION trueup.carry_out(
    d trueup.drift, p_decision text, p_by text, p_note text, p_reference text, p_expires_at timestamptz,
    p_counter bigint, p_in_flight bigint, p_remaining bigint, p_original bigint, at timestamptz, p_tokens bigint,
    OUT outcome text, OUT counter_after bigint, OUT tokens_granted bigint, OUT grant_id bigint
) LANGUAGE plpgsql AS $$
DECLARE
    g record;
BEGIN
    outcome := 'decided';
    counter_after := p_counter;
    IF p_decision = 'accept' THEN
        {% if subscription.counts_up %}
        counter_after := coalesce(p_counter - p_tokens, p_remaining + p_in_flight);
        {% else %}
        counter_after := greatest(coalesce(p_counter - p_tokens, greatest(p_remaining, 0) + p_in_flight), 0);
        {% endif %}
        IF {{ raw_counter("counter_after", "p_original") }} > trueup.counter_limit() THEN
            outcome := 'out_of_range';
            RETURN;
        END IF;
        PERFORM trueup.correct_counters(ARRAY[d.user_id], ARRAY[d.subscription_id], ARRAY[p_counter],
                                        ARRAY[counter_after]);
    ELSIF p_decision = 'grant' THEN
        -- The grant includes the user's overdraft, so that the remaining tokens become what the counter shows.
        tokens_granted := coalesce(p_tokens, p_counter - p_in_flight - p_remaining);
        IF tokens_granted IS NULL OR coalesce(p_tokens, trueup.off_by(d)) <= 0 THEN
            outcome := 'nothing_to_grant';
            RETURN;
        END IF;
        g := trueup.grant_tokens(d.user_id, tokens_granted, p_note, p_reference, p_expires_at, p_by, at);
        grant_id := g.grant_id;
        IF g.outcome <> 'granted' THEN
            outcome := 'grant_' || g.outcome;
        {% if subscription.counts_up %}
        ELSE
            -- The counter shows used tokens, which a grant does not change: it must show the granted ones too.
            PERFORM trueup.correct_counters(ARRAY[d.user_id], ARRAY[d.subscription_id],
                                            ARRAY[p_counter + tokens_granted], ARRAY[p_counter]);
        {% endif %}
        END IF;
    ELSIF p_tokens IS NULL THEN
        UPDATE trueup.drift t SET action = 'ignored' WHERE t.user_id = d.user_id AND t.id = d.id;
    END IF;
END $$;

-- Lock a user's counter and read it, as tokens that remain of p_original. `is_there` false: no such subscription; NULL:
-- the host has locked its row.
CREATE OR REPLACE FUNCTION trueup.lock_counter(
    p_user {{ user_id_type }}, p_subscription text, p_original bigint, OUT is_there boolean, OUT counter bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    SELECT true, {{ counter("s", "p_original") }} INTO lock_counter.is_there, lock_counter.counter
    FROM {{ subscription }} s
    WHERE s.{{ subscription.user_id }} = lock_counter.p_user AND s.{{ subscription.id }}::text = lock_counter.p_subscription
    FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND NOT EXISTS (
        SELECT FROM {{ subscription }} s
        WHERE s.{{ subscription.user_id }} = lock_counter.p_user
          AND s.{{ subscription.id }}::text = lock_counter.p_subscription) THEN
        lock_counter.is_there := false;
    END IF;
END $$;

-- The drifts in review: undecided, the newest of their user, and seen by the last finished run over all users. Each
-- argument that is not null is a filter. p_causes: exactly these causes; p_max: off by at most this many tokens; p_run:
-- the first run that found the drift.
CREATE OR REPLACE FUNCTION trueup.undecided_drifts(
    p_user {{ user_id_type }}, p_causes text[], p_max bigint, p_run bigint
) RETURNS SETOF trueup.drift LANGUAGE sql STABLE AS $$
    SELECT t.* FROM trueup.drift t
    WHERE t.action = 'review' AND (p_user IS NULL OR t.user_id = p_user) AND (p_run IS NULL OR t.run_id = p_run)
      AND (p_causes IS NULL
           OR string_to_array(t.cause, '+') @> p_causes AND string_to_array(t.cause, '+') <@ p_causes)
      AND (p_max IS NULL OR abs(trueup.off_by(t)) <= p_max)
      AND t.last_run_id >= (SELECT coalesce(max(n.id), 0) FROM trueup.reconcile_run n
                            WHERE n.status = 'finished' AND n.only_user IS NULL AND NOT n.dry_run)
      AND NOT EXISTS (SELECT FROM trueup.drift_decision c WHERE c.user_id = t.user_id AND c.drift_id = t.id)
      AND NOT EXISTS (SELECT FROM trueup.drift n WHERE n.user_id = t.user_id AND n.id > t.id)
$$;

-- The same drifts with their accounts, the oldest first. `counter` and `expected`: the values at p_at. `changed`: the
-- difference is now another one.
CREATE OR REPLACE FUNCTION trueup.drifts_in_review(
    p_user {{ user_id_type }}, p_causes text[], p_max bigint, p_run bigint, p_limit integer, p_at timestamptz
) RETURNS TABLE (
    drift trueup.drift, off_by bigint, counter bigint, expected bigint, overdraft bigint, changed boolean
) LANGUAGE sql STABLE AS $$
    SELECT d.r, trueup.off_by(d.r), a.counter, {{ right_counter("a.original", "a.consumed") }},
           greatest(a.consumed - a.original, 0),
           a.user_id IS NULL OR (a.counter IS NULL) <> ((d.r).observed IS NULL)
               OR a.subscription_id <> (d.r).subscription_id
               OR coalesce(a.counter, 0) - {{ right_counter("a.original", "a.consumed") }}
                  NOT IN (trueup.off_by(d.r), coalesce((d.r).observed, 0) - (d.r).expected)
    FROM (
        SELECT t AS r FROM trueup.undecided_drifts(p_user, p_causes, p_max, p_run) t
        ORDER BY t.found_at, t.id LIMIT p_limit
    ) d
    LEFT JOIN trueup.accounts(p_at) a ON a.user_id = (d.r).user_id
    ORDER BY (d.r).found_at, (d.r).id
$$;

-- Undo at most p_limit corrections of a run, after (p_after_user, p_after_id): set each counter back to the value that
-- the run saw, if it still has the value that the run wrote. `last_user` NULL: no correction is left.
CREATE OR REPLACE FUNCTION trueup.undo_corrections(
    p_run bigint, p_after_user {{ user_id_type }}, p_after_id bigint, p_limit integer, p_by text, p_note text,
    OUT undone bigint, OUT seen bigint, OUT last_user {{ user_id_type }}, OUT last_id bigint
) LANGUAGE sql AS $$
    WITH wanted AS MATERIALIZED (
        SELECT t.user_id, t.id, t.subscription_id, t.observed, t.written, t.found_at FROM trueup.drift t
        WHERE t.run_id = p_run AND t.action = 'corrected'
          AND (p_after_id IS NULL OR (t.user_id, t.id) > (p_after_user, p_after_id))
          AND NOT EXISTS (SELECT FROM trueup.drift_decision c
                          WHERE c.user_id = t.user_id AND c.drift_id = t.id AND c.decision = 'undo')
        ORDER BY t.user_id, t.id LIMIT p_limit
    ), put_back AS MATERIALIZED (
        SELECT x.user_id FROM (
            SELECT array_agg(w.user_id) AS users, array_agg(w.subscription_id) AS subscriptions,
                   array_agg(w.written) AS written, array_agg(w.observed) AS observed,
                   array_agg(v.window_start::text) AS windows
            FROM wanted w
            -- Only in the window of the correction, because a renewal may have written the same value again.
            JOIN (SELECT s.{{ subscription.user_id }} AS user_id,
                         {{ window_start("s") }} AS window_start
                  FROM {{ subscription }} s) v ON v.user_id = w.user_id AND v.window_start <= w.found_at
            WHERE NOT EXISTS (SELECT FROM trueup.drift n
                              WHERE n.user_id = w.user_id AND n.id > w.id AND n.action = 'corrected')
              -- Skip counters that a person has accepted or granted since.
              AND NOT EXISTS (SELECT FROM trueup.drift_decision c
                              WHERE c.user_id = w.user_id AND c.drift_id > w.id AND c.decision IN ('accept', 'grant'))
        ) w, trueup.correct_counters(w.users, w.subscriptions, w.written, w.observed, w.windows) AS x (user_id)
    ), noted AS (
        INSERT INTO trueup.drift_decision (user_id, drift_id, decision, decided_by, note, counter_before,
                                           counter_after, decided_at)
        SELECT w.user_id, w.id, 'undo', p_by, p_note, w.written, w.observed, clock_timestamp()
        FROM wanted w JOIN put_back p ON p.user_id = w.user_id
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM noted), count(*),
           (array_agg(w.user_id ORDER BY w.user_id DESC, w.id DESC))[1],
           (array_agg(w.id ORDER BY w.user_id DESC, w.id DESC))[1]
    FROM wanted w
$$;
