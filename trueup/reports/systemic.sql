{% from "accounts/entitlements.sql" import entitlements %}
{% from "drift/host_records.sql" import decrements %}
{% from "host/rows.sql" import in_range %}

{# Rows for the rules of systemic.py. Each macro is one statement over the host's tables, for a database with trueup and
   for one without. #}

{# A decrement is at most so far from its log row. #}
{% set near = "interval '10 minutes'" %}
{# The host's counter before a decrement is the one after it, plus the tokens times this. #}
{% set direction = -1 if subscription.counts_up else 1 %}

{# Whether trueup wrote the log row `l` and lowers the counter for it itself. #}
{% macro is_own(l) -%}
{% if subscription.is_kept_by_host or usage_log.is_written_by_host -%}
false
{%- else -%}
EXISTS (SELECT FROM {{ trueup.charge }} c
                WHERE c.user_id = {{ l }}.{{ usage_log.user_id }} AND c.log_id = {{ l }}.{{ usage_log.id }}::text)
{%- endif -%}
{%- endmacro %}

{# Whether the journal shows that the host lowered the counter for the row `r`: an entry near it has its size, or the
   counter was at zero. #}
{% macro has_entry(r) -%}
EXISTS (SELECT FROM {{ trueup.counter_entry }} e
                WHERE e.user_id = {{ r }}.user_id AND e.at BETWEEN {{ r }}.at - {{ near }} AND {{ r }}.at + {{ near }}
                  AND e.written_by = 'host' AND e.new_counter + {{ direction }} * {{ r }}.tokens = e.old_counter)
        {% if not subscription.counts_up %}
        OR 0 = (SELECT e.new_counter FROM {{ trueup.counter_entry }} e
                WHERE e.user_id = {{ r }}.user_id AND e.at < {{ r }}.at ORDER BY e.at DESC, e.id DESC LIMIT 1)
        {% endif %}
{%- endmacro %}

{# The host's log rows from :since to :until, by `dimension` (host, section or model) and `name`: `log_rows`, of which
   so many are `missing` their decrement, their `tokens` and `users`, and the `first` one. In a group with at least
   :least missing ones, only the rows from the point on are counted at which these outweigh the others most; :weight is
   how many missing rows outweigh one decrement. Fewer missing ones are not counted.

   A row is missing its decrement if a run (or the preview: :drifted) found missed decrements on its user's counter
   since, and neither a decrement row nor the journal shows a decrement. Users without a limit, and users whose counter
   shows nothing that could be subtracted, are left out. #}
{% macro decrements_by_group() -%}
WITH logged AS MATERIALIZED (
        SELECT l.{{ usage_log.user_id }} AS user_id, {{ in_range("l." ~ usage_log.total_tokens) }}::bigint AS tokens,
               l.{{ usage_log.created_at }}::timestamptz AS at,
               coalesce({{ usage_log.section("l") }}::text, '') COLLATE "C" AS section,
               coalesce({{ usage_log.model_name("l") }}::text, '') COLLATE "C" AS model
        FROM ({{ entitlements("CAST(:until AS timestamptz)") }}) e
        JOIN {{ usage_log }} l ON l.{{ usage_log.user_id }} = e.user_id
        WHERE l.{{ usage_log.created_at }} >= greatest(e.window_start, CAST(:since AS timestamptz))
          AND l.{{ usage_log.created_at }} < CAST(:until AS timestamptz)
          AND {{ usage_log.success("l") }} AND l.{{ usage_log.total_tokens }} > 0
          AND e.plan_kind IS DISTINCT FROM 'unlimited' AND e.counter {{ "IS NOT NULL" if subscription.counts_up else "> 0" }}
          AND NOT {{ is_own("l") }}
    ), drifted AS MATERIALIZED (
        SELECT f.user_id, max(f.seen_at) AS seen_at
        FROM (SELECT u.user_id, 'infinity'::timestamptz AS seen_at
              FROM unnest(CAST(:drifted AS {{ user_id_type }}[])) u (user_id)
              UNION ALL
              SELECT d.user_id, d.last_seen_at FROM {{ trueup.drift }} d
              WHERE d.last_seen_at >= CAST(:since AS timestamptz)
                AND 'missed_decrement' = ANY (string_to_array(d.cause, '+'))) f
        GROUP BY f.user_id
    ), judged AS MATERIALIZED (
        SELECT r.*, coalesce(f.seen_at >= r.at, false)
               {% if token_usage %}
               AND NOT EXISTS (SELECT FROM ({{ decrements() }}) d
                               WHERE d.user_id = r.user_id AND d.tokens = r.tokens
                                 AND d.at BETWEEN r.at - {{ near }} AND r.at + {{ near }})
               {% endif %}
               AND NOT coalesce({{ has_entry("r") }}, false) AS is_missing
        FROM logged r LEFT JOIN drifted f ON f.user_id = r.user_id
    ), grouped AS (
        SELECT 'host' AS dimension, '' COLLATE "C" AS name, j.* FROM judged j
        UNION ALL SELECT 'section', j.section, j.* FROM judged j
        UNION ALL SELECT 'model', j.model, j.* FROM judged j
    ), {{ faulty_end() }}
    SELECT t.dimension, t.name, coalesce(e.log_rows, t.log_rows) AS log_rows, coalesce(e.missing, 0) AS missing,
           coalesce(e.tokens, 0)::bigint AS tokens, coalesce(u.users, 0) AS users, e.first
    FROM totals t
    LEFT JOIN ends e ON e.dimension = t.dimension AND e.name = t.name
    LEFT JOIN end_users u ON u.dimension = t.dimension AND u.name = t.name
    ORDER BY t.dimension, t.name
{%- endmacro %}

{# CTEs over `grouped`. `totals`: all rows of each group. `ends`: of the groups with at least :least missing rows, the
   rows from the point on at which the missing ones outweigh the others most. `end_users`: the users of the missing
   ones. Only such groups are sorted. #}
{% macro faulty_end() -%}
totals AS MATERIALIZED (
        SELECT g.dimension, g.name, count(*) AS log_rows, count(*) FILTER (WHERE g.is_missing) AS missing
        FROM grouped g GROUP BY g.dimension, g.name
    ), suspects AS MATERIALIZED (
        SELECT g.* FROM grouped g JOIN totals t ON t.dimension = g.dimension AND t.name = g.name
        WHERE t.missing >= :least
    ), running AS (
        SELECT s.dimension, s.name, s.at, s.is_missing,
               sum(CASE WHEN s.is_missing THEN 1 ELSE -CAST(:weight AS integer) END) OVER (
                   PARTITION BY s.dimension, s.name ORDER BY s.at DESC RANGE UNBOUNDED PRECEDING) AS excess
        FROM suspects s
    ), begun AS (
        SELECT DISTINCT ON (r.dimension, r.name) r.dimension, r.name, r.at
        FROM running r WHERE r.is_missing ORDER BY r.dimension, r.name, r.excess DESC, r.at
    ), ends AS (
        SELECT s.dimension, s.name, count(*) AS log_rows, count(*) FILTER (WHERE s.is_missing) AS missing,
               sum(s.tokens) FILTER (WHERE s.is_missing) AS tokens, min(s.at) FILTER (WHERE s.is_missing) AS first
        FROM suspects s JOIN begun b ON b.dimension = s.dimension AND b.name = s.name AND s.at >= b.at
        GROUP BY s.dimension, s.name
    ), end_users AS (
        SELECT m.dimension, m.name, count(*) AS users
        FROM (SELECT DISTINCT s.dimension, s.name, s.user_id
              FROM suspects s JOIN begun b ON b.dimension = s.dimension AND b.name = s.name AND s.at >= b.at
              WHERE s.is_missing) m
        GROUP BY m.dimension, m.name
    )
{%- endmacro %}

{# The stale writes that runs from :since to :until found, by `dimension` (application, section, or description of the
   decrement row) and `name`: how many (`stale`), their `tokens` and `users`, the `first` one, and how many writes there
   were since it (`writes`; null for fewer than :least stale ones). `descriptions`: the most frequent ones, each of a
   tenth of them at least. A component that a later drift row carries along is counted once. #}
{% macro stale_writes_by_writer() -%}
WITH parts AS MATERIALIZED (
        SELECT DISTINCT d.user_id, p.part ->> 'at' AS at, p.part -> 'writers' AS writers
        FROM trueup.reconcile_run r
        JOIN trueup.drift d ON d.run_id = r.id
        CROSS JOIN LATERAL jsonb_array_elements(
            CASE WHEN jsonb_typeof(d.evidence -> 'components') = 'array' THEN d.evidence -> 'components' END) p (part)
        WHERE r.started_at >= CAST(:since AS timestamptz) AND r.started_at <= CAST(:until AS timestamptz)
          AND p.part ->> 'cause' = 'stale_write' AND jsonb_typeof(p.part -> 'writers') = 'array'
    ), stale AS MATERIALIZED (
        SELECT p.user_id, w.* FROM parts p
        CROSS JOIN LATERAL jsonb_to_recordset(p.writers) AS w (
            application_name text, section text, description text, count bigint, tokens bigint, first_at timestamptz)
        WHERE w.first_at >= CAST(:since AS timestamptz)
    ), named AS MATERIALIZED (
        SELECT d.dimension, d.name, s.user_id, s.description, s.count, s.tokens, s.first_at
        FROM stale s
        CROSS JOIN LATERAL (VALUES ('application', s.application_name), ('section', nullif(s.section, '')),
                                   ('description', nullif(s.description, ''))) d (dimension, name)
        WHERE d.name IS NOT NULL
    ), by_name AS (
        SELECT n.dimension, n.name, sum(n.count)::bigint AS stale, sum(n.tokens)::bigint AS tokens,
               count(DISTINCT n.user_id) AS users, min(n.first_at) AS first
        FROM named n GROUP BY n.dimension, n.name
    ), described AS (
        SELECT c.dimension, c.name, (array_agg(c.description ORDER BY c.count DESC, c.description))[1 : 3] AS descriptions
        FROM (SELECT n.dimension, n.name, n.description, sum(n.count) AS count
              FROM named n WHERE n.description <> '' AND n.dimension <> 'description'
              GROUP BY n.dimension, n.name, n.description) c
        JOIN by_name b ON b.dimension = c.dimension AND b.name = c.name AND 10 * c.count >= b.stale
        GROUP BY c.dimension, c.name
    ), writes AS (
        SELECT b.dimension, b.name, count(*) AS writes
        FROM by_name b
        JOIN trueup.counter_entry e ON e.application_name = b.name AND e.at >= b.first
        WHERE b.dimension = 'application' AND b.stale >= :least AND e.at <= CAST(:until AS timestamptz) AND e.written_by = 'host'
          AND e.kind = 'changed' AND e.new_counter IS DISTINCT FROM e.old_counter
        GROUP BY b.dimension, b.name
        UNION ALL
        SELECT b.dimension, b.name, count(*)
        FROM by_name b
        JOIN {{ usage_log }} l ON {{ usage_log.section("l") }}::text = b.name AND l.{{ usage_log.created_at }} >= b.first
        WHERE b.dimension = 'section' AND b.stale >= :least AND l.{{ usage_log.created_at }} <= CAST(:until AS timestamptz)
          AND {{ usage_log.success("l") }} AND NOT {{ is_own("l") }}
        GROUP BY b.dimension, b.name
        {% if token_usage %}
        UNION ALL
        SELECT b.dimension, b.name, count(*)
        FROM by_name b
        JOIN ({{ decrements(described=true) }}) t ON t.description = b.name AND t.at >= b.first
        WHERE b.dimension = 'description' AND b.stale >= :least AND t.at <= CAST(:until AS timestamptz)
        GROUP BY b.dimension, b.name
        {% endif %}
    )
    SELECT b.dimension, b.name, b.stale, b.tokens, b.users, b.first, w.writes,
           coalesce(d.descriptions, ARRAY[]::text[]) AS descriptions
    FROM by_name b
    LEFT JOIN writes w ON w.dimension = b.dimension AND w.name = b.name
    LEFT JOIN described d ON d.dimension = b.dimension AND d.name = b.name
    ORDER BY b.dimension, b.name
{%- endmacro %}
