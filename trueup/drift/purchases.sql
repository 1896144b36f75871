{# What the host's plans sell, and what was bought, as its payments say. #}

{# The token amounts that plans sell (`size`): a counter too high by one of them may show a purchase. #}
{% macro plan_sizes() -%}
SELECT p.{{ token_plan.tokens_included }}::bigint AS size FROM {{ token_plan }} p
    WHERE p.{{ token_plan.tokens_included }} > 0
    UNION
    SELECT p.{{ full_plan.tokens_included }}::bigint FROM {{ full_plan }} p WHERE p.{{ full_plan.tokens_included }} > 0
{%- endmacro %}

{# The completed payments: user_id, id, reference, at, tokens, own_plan, kind, ends; none where payments are not mapped.
   `reference`: by what a grant made of this payment is known. `tokens`: of the plan that was bought, 0 without one.
   `own_plan`: it is the plan that the subscription has now. `ends`: when a plan with a duration runs out; null: never. #}
{% macro purchases() -%}
{% if payment %}
SELECT p.{{ payment.user_id }} AS user_id, p.{{ payment.id }}::text AS id,
           coalesce(nullif(p.{{ payment.transaction_id }}::text, ''), p.{{ payment.id }}::text) AS reference,
           p.{{ payment.payment_date }}::timestamptz AS at,
           greatest(coalesce(tp.{{ token_plan.tokens_included }}, fp.{{ full_plan.tokens_included }}, 0), 0)::bigint
               AS tokens,
           CASE WHEN {{ payment.token_plan_id("p") }} IS NOT NULL
                THEN coalesce({{ payment.token_plan_id("p") }} = {{ subscription.token_plan_id("s") }}, false)
                ELSE {{ subscription.token_plan_id("s") }} IS NULL
                     AND coalesce({{ payment.full_plan_id("p") }} = {{ subscription.full_plan_id("s") }}, false)
           END AS own_plan,
           CASE WHEN {{ payment.token_plan_id("p") }} IS NOT NULL THEN 'token plan'
                WHEN {{ payment.full_plan_id("p") }} IS NOT NULL THEN 'full plan' ELSE 'no plan' END AS kind,
           CASE WHEN {{ payment.token_plan_id("p") }} IS NULL
                THEN p.{{ payment.payment_date }}::timestamptz
                     + make_interval(days => {{ full_plan.duration_days("fp") }}::int) END AS ends
    FROM {{ payment }} p
    LEFT JOIN {{ subscription }} s ON s.{{ subscription.user_id }} = p.{{ payment.user_id }}
    LEFT JOIN {{ token_plan }} tp ON tp.{{ token_plan.id }} = {{ payment.token_plan_id("p") }}
    LEFT JOIN {{ full_plan }} fp ON fp.{{ full_plan.id }} = {{ payment.full_plan_id("p") }}
    WHERE p.{{ payment.status }}::text = {{ payment.completed_status | literal }}
{%- else %}
SELECT NULL::{{ user_id_type }} AS user_id, NULL::text AS id, NULL::text AS reference, NULL::timestamptz AS at,
           NULL::bigint AS tokens, NULL::boolean AS own_plan, NULL::text AS kind, NULL::timestamptz AS ends
    WHERE false
{%- endif %}
{%- endmacro %}
