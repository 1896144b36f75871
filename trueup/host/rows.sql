{# Facts about the host's rows. Each macro defines one fact for all statements that need it. #}

{# The start of the window of the subscription `s`. Usage before it does not count. #}
{% macro window_start(s) -%}
coalesce({{ s }}.{{ subscription.start_date }}, '-infinity'::timestamptz)
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

{# The sum of a user's usage from `since` on, before `until` if it is given. The arguments must not name a row `l`. #}
{% macro used_since(user, since, until=none) -%}
SELECT coalesce(sum(l.{{ usage_log.total_tokens }}), 0) AS tokens FROM {{ usage_log }} l
WHERE {{ is_counted("l", user, since) }}
{%- if until %} AND l.{{ usage_log.created_at }} < {{ until }}{% endif %}
{%- endmacro %}

{# The usage of each subscription `w` in its window, if it has any: key, tokens. `key`: the column of `w` that names it.
   `range`: a condition on the log rows `l`, which begins with AND. #}
{% macro used_in_windows(key, range) -%}
SELECT {{ key }} AS key, CAST(sum(l.{{ usage_log.total_tokens }}) AS bigint) AS tokens
FROM {{ subscription }} w
JOIN {{ usage_log }} l ON {{ is_counted("l", "w." ~ subscription.user_id, window_start("w")) }}
WHERE true{{ range }}
GROUP BY {{ key }}
{%- endmacro %}
