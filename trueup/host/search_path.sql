{# The search path of statements that write a table of the host. A trigger of the host runs in trueup's session, and may
   name its tables without a schema: it needs the search path that the role has by itself. #}

{# A source of one row, to be joined to the rows that a statement writes: it sets the role's own search path before the
   first of them is written. PostgreSQL has resolved the names of the statement by then, so its functions and operators
   stay those of pg_catalog. Nothing that is called in the statement may be a function that resolves names when it runs.
   `setting`, `value`: a setting of trueup's that the host's triggers read, set at the same time. #}
{% macro role_search_path(setting=none, value=none) -%}
(SELECT set_config('search_path', NULL, true){% if setting %}, set_config('{{ setting }}', {{ value }}, true){% endif %}) AS role_search_path
{%- endmacro %}

{# Set trueup's search path again, and clear the setting. This statement is resolved in the role's path, and so names
   its schema. #}
{% macro own_search_path(setting=none) -%}
PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)
        {%- if setting %}, pg_catalog.set_config('{{ setting }}', '', true){% endif %};
{%- endmacro %}
