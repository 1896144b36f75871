{# `concurrent` of the evidence (ledger.sql): two decrements within two seconds whose requests overlapped, as far as the
   log shows; one of them may be lost. `overlapped`: the other decrement came later and its log row came before this
   decrement, so its request may have read the counter before this decrement was written. `called_lost`: an earlier run
   that explained the whole drift named it. Only for users whose drift the log and decrements do not explain
   completely. #}
{% macro concurrency() -%}
{{ requests() }}, {{ neighbours() }}, concurrent AS (
        SELECT p.user_id,
               jsonb_agg(jsonb_build_object('lost', p.found, 'overlapped', p.overlapped, 'called_lost', p.called_lost,
                                            'kept', CASE WHEN p.after IS NULL OR p.near_before AND NOT p.overlapped
                                                         THEN p.before ELSE p.after END)
                         ORDER BY p.at) AS found
        FROM (SELECT p.*, row_number() OVER (PARTITION BY p.user_id
                                             ORDER BY p.called_lost DESC, p.overlapped DESC,
                                                      p.tokens = t.surplus - t.difference DESC, p.at DESC) AS place
              FROM paired p JOIN totals t ON t.user_id = p.user_id
              -- Requests that did not overlap are left out.
              WHERE p.called_lost
                 OR (p.looked_at IS NULL OR p.at >= p.looked_at)
                    AND (p.overlapped OR p.unknown_after
                         OR p.near_before AND NOT p.own AND coalesce(p.began_at < p.at_before, true))) p
        WHERE p.place <= 60 GROUP BY p.user_id
    )
{%- endmacro %}

{# `requests`: the beginning of a decrement's request, which is the last log row of its size before it. A second
   decrement of one log row has no request, and trueup's charges have none: they lower the counter in one step. #}
{% macro requests() %}
    turns AS (
        SELECT t.*, sum(t.opens) OVER (PARTITION BY t.user_id, t.tokens ORDER BY t.at, t.kind DESC, t.id) AS turn
        FROM (SELECT e.user_id, e.id, e.kind, e.tokens, e.at,
                     (e.kind <> 'D' AND coalesce(lag(e.kind) OVER w, 'L') = 'D')::int AS opens
              FROM events e JOIN totals t ON t.user_id = e.user_id AND t.surplus <> t.difference
              WINDOW w AS (PARTITION BY e.user_id, e.tokens ORDER BY e.at, e.kind DESC, e.id)) t
    ), requests AS (
        SELECT r.user_id, r.id, r.began_at
        FROM (SELECT t.*, max(t.at) FILTER (WHERE t.kind <> 'D') OVER turn AS began_at,
                     count(*) FILTER (WHERE t.kind <> 'D') OVER turn AS begun,
                     count(*) FILTER (WHERE t.kind = 'D') OVER (turn ORDER BY t.at, t.kind DESC, t.id) AS place
              FROM turns t WINDOW turn AS (PARTITION BY t.user_id, t.tokens, t.turn)) r
        WHERE r.kind = 'D' AND r.place <= r.begun
    )
{%- endmacro %}

{# `paired`: each change with the changes before and after it, and the finding of the last run about it. #}
{% macro neighbours() %}
    looks AS (
        -- The last drift since the base point that was explained completely and left nothing to a person: decrements
        -- before it that it did not call lost were not lost.
        SELECT DISTINCT ON (d.user_id) d.user_id, d.found_at - interval '2 seconds' AS at,
               ARRAY(SELECT p.part #>> '{rows,0,id}' FROM jsonb_array_elements(d.evidence -> 'components') AS p (part)
                     WHERE p.part ->> 'cause' = 'lost_update') AS lost
        FROM totals t JOIN {{ trueup.drift }} d ON d.user_id = t.user_id AND d.found_at > t.base_at
        WHERE t.surplus <> t.difference AND d.action <> 'review' AND NOT d.evidence -> 'alternatives' ? 'manual_edit'
          AND NOT string_to_array(d.cause, '+') && ARRAY['manual_edit', 'unexplained', 'clamped_at_zero',
                                                         'burned_at_expiry', 'counter_null', 'counter_negative',
                                                         'counter_out_of_range']
        ORDER BY d.user_id, d.found_at DESC
    ), neighbours AS (
        SELECT c.*, jsonb_build_object('id', c.id, 'tokens', c.tokens, 'at', c.at, 'own', c.own) AS found,
               lag(c.at) OVER w AS at_before,
               coalesce(min(r.began_at) OVER moment < c.at, false) AS overlapped, r.began_at,
               count(*) FILTER (WHERE r.began_at IS NULL AND NOT c.own) OVER moment > 0 AS unknown_after
        FROM (SELECT c.*, least(c.at, '9999-12-31'::timestamptz) AS about FROM changes c) c
        LEFT JOIN requests r ON r.user_id = c.user_id AND r.id = c.id AND NOT c.own
        WINDOW w AS (PARTITION BY c.user_id ORDER BY c.at, c.id),
               -- The changes in the two seconds after this one. (Rows of one time have no order, so all of them count.)
               moment AS (PARTITION BY c.user_id ORDER BY c.about
                          RANGE BETWEEN CURRENT ROW AND '2 seconds' FOLLOWING EXCLUDE CURRENT ROW)
    ), paired AS (
        SELECT n.*, lag(n.found) OVER w AS before, lead(n.found) OVER w AS after, k.at AS looked_at,
               coalesce(n.id = ANY (k.lost), false) AS called_lost,
               n.at_before IS NOT NULL
               AND n.at <= least(n.at_before, '9999-12-31'::timestamptz) + interval '2 seconds' AS near_before
        FROM neighbours n LEFT JOIN looks k ON k.user_id = n.user_id
        WINDOW w AS (PARTITION BY n.user_id ORDER BY n.at, n.id)
    )
{%- endmacro %}
