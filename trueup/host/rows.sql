{# Facts about the host's rows. Each macro defines one fact for all statements that need it. #}

{# The start of the window of the subscription `s`. Usage before it does not count. #}
{% macro window_start(s) -%}
coalesce({{ s }}.{{ subscription.start_date }}, '-infinity'::timestamptz)
{%- endmacro %}

{# The plans of the subscription `s` as two texts, for rows that outlive the plan: see trueup.plan_size. #}
{% macro plan_ids(s) -%}
{% if subscription.tokens_included -%}
'tokens:' || greatest(coalesce({{ subscription.tokens_included(s) }}, 0), 0), NULL::text
{%- else -%}
{{ subscription.token_plan_id(s) }}::text, {{ subscription.full_plan_id(s) }}::text
{%- endif %}
{%- endmacro %}

{# The tokens that the subscription `s` itself states, or that its plans `tp` and `fp` include. #}
{% macro plan_tokens() -%}
greatest(coalesce(
{%- if subscription.tokens_included %}{{ subscription.tokens_included("s") }}
{%- else %}tp.{{ token_plan.tokens_included }}, fp.{{ full_plan.tokens_included }}
{%- endif %}, 0), 0)
{%- endmacro %}

{# Whether the log row `l` is usage of that user that counts, at or after that time. #}
{% macro is_counted(l, user, since) -%}
{{ l }}.{{ usage_log.user_id }} = {{ user }} AND {{ usage_log.success(l) }} AND {{ l }}.{{ usage_log.created_at }} >= {{ since }}
{%- endmacro %}

{# A sum of tokens as a bigint; `uncountable` if it is no smaller, or not larger than its negative. #}
{% macro countable(sum) -%}
CASE WHEN abs({{ sum }}) < {{ uncountable }} THEN CAST({{ sum }} AS bigint) ELSE {{ uncountable }} END
{%- endmacro %}

{# One row's tokens, brought into the range of what can be counted. #}
{% macro in_range(value) -%}
greatest(least({{ value }}, {{ uncountable }}), -{{ uncountable }})
{%- endmacro %}

{# A user's owed charges `o` that count from that time on: an expression's FROM and WHERE. #}
{% macro owed_since(user, since) -%}
FROM {{ trueup.owed_charge }} o WHERE o.user_id = {{ user }} AND o.success AND o.used_at >= {{ since }}
{%- endmacro %}

{# The sum of a user's usage from that time on, owed charges among it; `until`: and before that time. The arguments must
   not name a row `l`, `o` or `t`. #}
{% macro used_since(user, since, until=none) -%}
SELECT {{ countable("t.tokens") }} AS tokens FROM (
    SELECT coalesce(sum(l.{{ usage_log.total_tokens }}), 0) + (
               SELECT coalesce(sum(o.total_tokens), 0) {{ owed_since(user, since) }}
               {%- if until %} AND o.used_at < {{ until }}{% endif %}) AS tokens
    FROM {{ usage_log }} l
    WHERE {{ is_counted("l", user, since) }}
    {%- if until %} AND l.{{ usage_log.created_at }} < {{ until }}{% endif %}) t
{%- endmacro %}

{# The usage of each subscription `w` in its window, where it has any: key, tokens; owed charges among it. `key`: what of
   `w` names it. `range`: which log rows `l` are read, as a condition that begins with AND. #}
{% macro used_in_windows(key, range) -%}
SELECT t.key, {{ countable("sum(t.tokens)") }} AS tokens
FROM (
    SELECT {{ key }} AS key, sum(l.{{ usage_log.total_tokens }}) AS tokens
    FROM {{ subscription }} w
    JOIN {{ usage_log }} l ON {{ is_counted("l", "w." ~ subscription.user_id, window_start("w")) }}
    WHERE true{{ range }}
    GROUP BY {{ key }}
    UNION ALL
    SELECT {{ key }}, o.total_tokens
    FROM {{ subscription }} w
    JOIN {{ trueup.owed_charge }} o ON o.user_id = w.{{ subscription.user_id }} AND o.success
                                    AND o.used_at >= {{ window_start("w") }}
) t
GROUP BY t.key
{%- endmacro %}

{# The mark of trueup's own log row of that id in this transaction, as text. Only trueup's roles can read the secret, and
   the transaction's number makes a mark useless in any other. In pg_catalog's names, for triggers. #}
{% macro own_row_mark(id) -%}
(SELECT encode(sha256(convert_to(i.mark_secret || ' ' || {{ id }} || ' ' || pg_current_xact_id()::text, 'UTF8')), 'hex')
 FROM trueup.installation i)
{%- endmacro %}
