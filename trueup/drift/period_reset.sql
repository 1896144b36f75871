{% from "host/rows.sql" import is_counted, used_since, window_start %}

{# What the reset of a counter at the beginning of a repeating period may have done, for the row `k` of `known`: found.
   `used_before`: the usage of the period before, which the counter still shows if the reset has not come. `used_until`:
   the usage of this period up to each of its first rows, which a late reset has put back. #}
{% macro period_reset(k) -%}
SELECT jsonb_build_object(
           'used_before', ({{ used_since(k ~ ".user_id", "p.since", until=k ~ ".window_start") }}),
           'used_until', (
               SELECT coalesce(jsonb_agg(r.used ORDER BY r.used), '[]') FROM (
                   SELECT sum(l.{{ usage_log.total_tokens }}) OVER (ORDER BY l.{{ usage_log.created_at }},
                                                                             l.{{ usage_log.id }}) AS used
                   FROM {{ usage_log }} l
                   WHERE {{ is_counted("l", k ~ ".user_id", k ~ ".window_start") }}
                   ORDER BY l.{{ usage_log.created_at }}, l.{{ usage_log.id }} LIMIT 1000) r)) AS found
FROM {{ subscription }} w
CROSS JOIN LATERAL (SELECT {{ window_start("w", "(" ~ k ~ ".window_start - interval '1 microsecond')") }} AS since) p
WHERE w.{{ subscription.user_id }} = {{ k }}.user_id AND isfinite({{ k }}.window_start) AND p.since < {{ k }}.window_start
LIMIT 1
{%- endmacro %}
