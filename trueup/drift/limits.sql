{# The largest value that the counter's column can take. #}
{% macro counter_limit() -%}
SELECT CASE format_type(a.atttypid, NULL)
               WHEN 'smallint' THEN 32767 WHEN 'integer' THEN 2147483647 ELSE 9223372036854775807 END
    FROM pg_attribute a
    WHERE a.attrelid = CAST({{ subscription | literal }} AS regclass)
      AND '"' || replace(a.attname, '"', '""') || '"' = {{ subscription.tokens_remaining | literal }}
{%- endmacro %}
