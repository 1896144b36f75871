{% from "host/rows.sql" import counter, has_negative_plan, plan_tokens, window_start %}

{# How far a host's clock may be ahead. A window that begins later than this has not begun. If a window begins within
   this time, trueup's own usage is dated at its begin, so that it counts. #}
{% set clock_tolerance = "interval '5 minutes'" %}

{# The gate's decision whether a task may run. NULL: it may. Otherwise one of the specification's reason codes, or
   'usage_uncountable': the log's rows add up to more than can be counted. #}
{% macro decision(subscribed, is_active, end_date, original, consumed, held, estimate, at) -%}
CASE
        WHEN {{ subscribed }} IS NOT TRUE THEN 'no_subscription'
        WHEN {{ is_active }} IS NOT TRUE THEN 'subscription_deactivated'
        WHEN {{ end_date }} < {{ at }} THEN 'subscription_expired'
        WHEN {{ consumed }} >= {{ uncountable }} THEN 'usage_uncountable'
        WHEN {{ original }} <= {{ consumed }} THEN 'no_tokens_remaining'
        WHEN {{ original }} - {{ consumed }} - {{ held }} < {{ estimate }} THEN 'insufficient_tokens'
    END
{%- endmacro %}

{# The number of the last truncation or setup of the log. A balance with an earlier number is stale. #}
{% macro log_epoch() -%}
(SELECT coalesce(max(t.id), 0) FROM trueup.log_truncation t)
{%- endmacro %}

{# The entitlements of each subscription at a time: user_id, subscription_id, is_active, window_start, end_date,
   original, counter, plan_tokens, plan_kind.
   `plan_tokens`: the tokens that the subscription itself includes, if the host has such a column; else those of its
   token plan, else of its full plan, else 0; or of both plans (`tokens_included = "sum"`).
   `original`: these, and the tokens of the user's grants (grants.sql), among them the packs that
   accounts/payments.py has imported. A user without grants costs one index lookup.
   `plan_kind`: 'unlimited', or 'negative' for a figure below zero that the mapping does not explain; NULL: a number.
   `counter`: as remaining tokens, whichever way the host counts.
   The argument `at` is qualified with its function's name, because the host may have a column of that name. #}
{% macro entitlements(at) -%}
{% set original -%}
{% if trueup.installed %}
{# Half of the range of bigint, so that sums with usage and refunds can't overflow. #}
CASE WHEN EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = s.{{ subscription.user_id }})
                THEN least(w.plan_tokens + trueup.granted(s.{{ subscription.user_id }}, w.window_start, w.plan_tokens,
                                                          {{ at }}), {{ no_limit }})::bigint
                ELSE w.plan_tokens END
{%- else -%}
w.plan_tokens
{%- endif %}
{%- endset -%}
SELECT s.{{ subscription.user_id }} AS user_id,
           s.{{ subscription.id }}::text AS subscription_id,
           -- A subscription that can't be limited is not active: no usage counts before its window begins, and if a
           -- user has two subscriptions, it is unknown which one counts.
           {{ subscription.is_active("s") }} AND w.window_start <= {{ at }} + {{ clock_tolerance }}
               AND NOT EXISTS (SELECT FROM {{ subscription }} o
                               WHERE o.{{ subscription.user_id }} = s.{{ subscription.user_id }}
                                 AND o.{{ subscription.id }} <> s.{{ subscription.id }}) AS is_active,
           w.window_start,
           -- An end after the years that clients can represent is no end; an end before them becomes their first day.
           CASE WHEN {{ subscription.end_date("s") }} < '9999-12-31'
                THEN greatest({{ subscription.end_date("s") }}, '0001-01-03') END AS end_date,
           {{ original }} AS original,
           {{ counter("s", original) }} AS counter,
           w.plan_tokens,
           CASE {% if subscription.unlimited %}WHEN w.plan_tokens = {{ no_limit }} THEN 'unlimited' {% endif -%}
                WHEN {{ has_negative_plan() }} THEN 'negative' END AS plan_kind
    FROM {{ subscription }} s
    LEFT JOIN {{ token_plan }} tp ON tp.{{ token_plan.id }} = {{ subscription.token_plan_id("s") }}
    LEFT JOIN {{ full_plan }} fp ON fp.{{ full_plan.id }} = {{ subscription.full_plan_id("s") }}
    CROSS JOIN LATERAL (
        SELECT {{ window_start("s", at) }} AS window_start, CAST({{ plan_tokens() }} AS bigint) AS plan_tokens
    ) w
{%- endmacro %}
