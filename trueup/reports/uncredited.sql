{% from "accounts/entitlements.sql" import entitlements %}
{% from "drift/host_records.sql" import is_pack, purchases %}
{% from "host/rows.sql" import used_since %}

{# A payment and the change of the counter are at most so far apart. #}
{% set apart = "interval '1 hour'" %}
{# The tokens by which the journal's entry `e` raised the remaining tokens. #}
{% macro raised(e) -%}
({{ e }}.old_counter - {{ e }}.new_counter) * {{ 1 if subscription.counts_up else -1 }}
{%- endmacro %}

{# The packs that were paid for in the present windows, more than an hour before :at, and that neither a grant nor the
   counter has: user_id, payment_id, reference, tokens, paid_at, certainty. One row for each reference.

   proven: the journal reaches back to the payment, has fewer raises of this size than there are such packs, and none
   that is larger within an hour of it. inferred: the counter shows no more than plan and usage leave, because the pack
   was never credited, or because a stale write has overwritten it. #}
{% macro uncredited_packs(condition) -%}
WITH packs AS (
        SELECT p.user_id, p.id, p.reference, p.tokens, p.at, e.original, e.counter, e.window_start,
               row_number() OVER (PARTITION BY p.user_id, p.reference ORDER BY p.at, p.id) AS copy,
               {{ "coalesce(trueup.journal_since() <= p.at - " ~ apart ~ ", false)" if trueup.installed else "false" }}
                   AS has_journal
        FROM ({{ purchases() }}) p
        JOIN ({{ entitlements("CAST(:at AS timestamptz)") }}) e ON e.user_id = p.user_id
        WHERE {{ is_pack("p", "e.window_start") }} AND p.at <= CAST(:at AS timestamptz) - {{ apart }}
          AND e.plan_kind IS DISTINCT FROM 'unlimited'{{ condition("p.user_id") }}
    ), ranked AS (
        SELECT k.*, row_number() OVER same AS place, min(k.at) OVER same AS first_at
        FROM packs k WHERE k.copy = 1
        WINDOW same AS (PARTITION BY k.user_id, k.tokens, k.has_journal ORDER BY k.at, k.id)
    ), judged AS (
        SELECT k.*, k.has_journal
               AND k.place > (SELECT count(*) FROM {{ trueup.counter_entry }} e
                              WHERE e.user_id = k.user_id AND e.at >= k.first_at - {{ apart }} AND {{ raised("e") }} = k.tokens)
               AND NOT EXISTS (SELECT FROM {{ trueup.counter_entry }} e
                               WHERE e.user_id = k.user_id AND e.at BETWEEN k.at - {{ apart }} AND k.at + {{ apart }}
                                 AND {{ raised("e") }} > k.tokens) AS is_proven,
               -- Unless a person has taken the surplus away since, because of a refund for example.
               coalesce(k.counter, 0) <= k.original - u.tokens
               AND NOT EXISTS (SELECT FROM {{ trueup.drift_decision }} c
                               WHERE c.user_id = k.user_id AND c.decision = 'accept' AND c.decided_at > k.at) AS shows_none
        FROM ranked k
        CROSS JOIN LATERAL ({{ used_since("k.user_id", "k.window_start") }} OFFSET 0) u
        WHERE NOT EXISTS (SELECT FROM {{ trueup.token_grant }} g
                          WHERE g.user_id = k.user_id
                            AND (g.reference = k.reference
                                 OR g.tokens = k.tokens AND g.granted_at >= k.at - {{ apart }}
                                    AND NOT EXISTS (SELECT FROM packs o
                                                    WHERE o.user_id = k.user_id AND o.reference = g.reference)))
    ), missing AS (
        SELECT j.user_id, j.id AS payment_id, j.reference, j.tokens, j.at AS paid_at,
               CASE WHEN j.is_proven THEN 'proven' ELSE 'inferred' END AS certainty
        FROM judged j WHERE j.is_proven OR j.shows_none
    )
    SELECT m.*, count(*) OVER () AS packs, sum(m.tokens) OVER ()::bigint AS all_tokens
    FROM missing m ORDER BY m.paid_at DESC, m.user_id LIMIT :most
{%- endmacro %}
