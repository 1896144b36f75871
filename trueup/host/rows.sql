{# Facts about the host's rows. Each macro defines one fact for all statements that need it. #}

{# The start of the window of the subscription `s` at a time. Usage before it does not count. If periods repeat, it is
   the start of the present one: it never lies after `at`, unless the subscription begins later, also where a change of
   clocks repeats an hour. A start before the years that clients can represent does not repeat. #}
{% macro window_start(s, at="statement_timestamp()") -%}
{%- set start = s ~ "." ~ subscription.start_date -%}
{%- if not subscription.anchor -%}
coalesce({{ start }}, '-infinity'::timestamptz)
{%- elif subscription.anchor == "first" -%}
greatest({{ start }}, {{ latest_of(at, "0", "date_trunc('month', timezone(" ~ subscription.period_zone ~ ", " ~ at ~ "))") }})
{%- else -%}
CASE WHEN {{ start }} >= '0001-01-03'::timestamptz AND {{ start }} <= {{ at }} AND {{ at }} < '9999-12-31'
     THEN greatest({{ start }}, {{ latest_of(at, months_between(start, at), local_start(s)) }})
     ELSE coalesce({{ start }}, '-infinity'::timestamptz) END
{%- endif -%}
{%- endmacro %}

{# The start of the subscription `s` by the clocks of its periods' zone, as a timestamp. #}
{% macro local_start(s) -%}
timezone({{ subscription.period_zone }}, {{ s }}.{{ subscription.start_date }}::timestamptz)
{%- endmacro %}

{# The calendar months from a time's month to that of `at`, in the zone of the periods. #}
{% macro months_between(start, at) -%}
CAST(12 * (extract(year FROM timezone({{ subscription.period_zone }}, {{ at }}))
           - extract(year FROM timezone({{ subscription.period_zone }}, {{ start }}::timestamptz)))
     + extract(month FROM timezone({{ subscription.period_zone }}, {{ at }}))
     - extract(month FROM timezone({{ subscription.period_zone }}, {{ start }}::timestamptz)) AS integer)
{%- endmacro %}

{# That many months after a local time, as a time with a zone; a month earlier if that is after `at`. #}
{% macro latest_of(at, months, local) -%}
CASE WHEN timezone({{ subscription.period_zone }}, {{ local }} + make_interval(months => {{ months }})) <= {{ at }}
     THEN timezone({{ subscription.period_zone }}, {{ local }} + make_interval(months => {{ months }}))
     ELSE timezone({{ subscription.period_zone }}, {{ local }} + make_interval(months => {{ months }} - 1)) END
{%- endmacro %}

{# The starts of the repeating periods of `s` after one time and before another: at. A subquery's SELECT. #}
{% macro period_starts(s, after, before) -%}
SELECT p.at FROM (
    SELECT timezone({{ subscription.period_zone }}, b.local + make_interval(months => k.months)) AS at
    FROM (SELECT {% if subscription.anchor == "first" -%}
                 date_trunc('month', timezone({{ subscription.period_zone }}, {{ after }})) AS local, {{ after }} AS since
                 {%- else %}{{ local_start(s) }} AS local, {{ s }}.{{ subscription.start_date }} AS since{% endif %}) b
    CROSS JOIN LATERAL generate_series(0, CASE
        WHEN {{ after }} >= '0001-01-03' AND {{ before }} < '9999-12-31' AND b.since >= '0001-01-03'
        THEN {{ months_between("b.since", before) }} END) k (months)) p
WHERE p.at > {{ after }} AND p.at < {{ before }} AND p.at >= coalesce({{ s }}.{{ subscription.start_date }}, '-infinity')
{%- endmacro %}

{# The tokens that a host's figure of included tokens is worth: `no_limit` for a value that the mapping calls unlimited;
   0 for null and for a negative figure. #}
{% macro worth(figure) -%}
{%- if subscription.means_unlimited("included") -%}
CASE WHEN {{ figure }} {{ subscription.means_unlimited("included") }} THEN {{ no_limit }}
     ELSE greatest(coalesce({{ figure }}, 0), 0) END
{%- else -%}
greatest(coalesce({{ figure }}, 0), 0)
{%- endif -%}
{%- endmacro %}

{# The tokens of two plans, of which a subscription may have none, one or both: `token`, `full`: their figures;
   `has_token`, `has_full`: whether it has them. Each counts at most a quarter of the range of bigint, so that the sum
   can't overflow. #}
{% macro worth_of_plans(token, full, has_token, has_full) -%}
{%- if subscription.adds_plans -%}
CASE WHEN {{ has_token }} AND {{ worth(token) }} = {{ no_limit }} OR {{ has_full }} AND {{ worth(full) }} = {{ no_limit }}
     THEN {{ no_limit }}
     ELSE least(greatest(coalesce({{ token }}, 0), 0), {{ no_limit // 2 - 1 }})::bigint
          + least(greatest(coalesce({{ full }}, 0), 0), {{ no_limit // 2 - 1 }})::bigint END
{%- elif subscription.means_unlimited("included") == "IS NULL" -%}
CASE WHEN {{ has_token }} THEN {{ worth(token) }} WHEN {{ has_full }} THEN {{ worth(full) }} ELSE 0 END
{%- else -%}
{{ worth("coalesce(" ~ token ~ ", " ~ full ~ ")") }}
{%- endif -%}
{%- endmacro %}

{# The plans of the subscription `s` as two texts, for rows that outlive the plan: see trueup.plan_size. #}
{% macro plan_ids(s) -%}
{% if subscription.tokens_included -%}
'tokens:' || {{ worth(subscription.tokens_included(s)) }}, NULL::text
{%- else -%}
{{ subscription.token_plan_id(s) }}::text, {{ subscription.full_plan_id(s) }}::text
{%- endif %}
{%- endmacro %}

{# The tokens that the subscription `s` itself states, or that its plans `tp` and `fp` include. #}
{% macro plan_tokens() -%}
{%- if subscription.means_unlimited("counter") %}CASE WHEN {{ is_free_counter("s") }} THEN {{ no_limit }} ELSE {% endif -%}
{%- if subscription.tokens_included %}{{ worth(subscription.tokens_included("s")) }}
{%- else %}{{ worth_of_plans("tp." ~ token_plan.tokens_included, "fp." ~ full_plan.tokens_included,
                             "tp." ~ token_plan.id ~ " IS NOT NULL", "fp." ~ full_plan.id ~ " IS NOT NULL") }}
{%- endif %}
{%- if subscription.means_unlimited("counter") %} END{% endif -%}
{%- endmacro %}

{# Whether the counter of `s` has the value that the mapping calls unlimited. #}
{% macro is_free_counter(s) -%}
{{ s }}.{{ subscription.tokens_remaining }} {{ subscription.means_unlimited("counter") }}
{%- endmacro %}

{# Whether the figure of included tokens that counts for `s`, `tp` and `fp` is below zero: it means something else than
   a number of tokens, and the mapping does not say what. #}
{% macro has_negative_plan() -%}
{%- if subscription.tokens_included %}{{ subscription.tokens_included("s") }} < 0
{%- elif subscription.adds_plans -%}
(tp.{{ token_plan.tokens_included }} < 0 OR fp.{{ full_plan.tokens_included }} < 0)
{%- else %}coalesce(tp.{{ token_plan.tokens_included }}, fp.{{ full_plan.tokens_included }}) < 0
{%- endif -%}
{%- endmacro %}

{# The counter of the subscription `s`, as tokens that remain of `original`. This macro, `raw_counter`, `can_be_lowered`
   and `lowered_counter` are all that know which way the host counts. The sum, unlike a cast, refuses a column that the
   host has made a text. #}
{% macro counter(s, original) -%}
{%- if subscription.counts_up -%}
CASE WHEN {{ s }}.{{ subscription.tokens_remaining }} IS NOT NULL
     THEN {{ original }} - {{ in_range(s ~ "." ~ subscription.tokens_remaining) }} END
{%- else -%}
({{ s }}.{{ subscription.tokens_remaining }} + 0::bigint)
{%- endif -%}
{%- endmacro %}

{# The value of the host's counter that shows `remaining` tokens of `original`. #}
{% macro raw_counter(remaining, original) -%}
{%- if subscription.counts_up %}{{ original }} - {{ remaining }}{% else %}{{ remaining }}{% endif -%}
{%- endmacro %}

{# The tokens that the counter should show. A counter that counts up shows an overdraft too. #}
{% macro right_counter(original, consumed) -%}
{%- if subscription.counts_up %}({{ original }} - {{ consumed }}){% else %}greatest({{ original }} - {{ consumed }}, 0)
{%- endif -%}
{%- endmacro %}

{# Whether usage can lower the remaining tokens that the counter of `s` shows: a counter that counts down stops at 0. #}
{% macro can_be_lowered(s) -%}
{{ s }}.{{ subscription.tokens_remaining }} {% if subscription.counts_up %}IS NOT NULL{% else %}> 0{% endif %}
{%- endmacro %}

{# The host's counter of `s` after the use of some tokens. #}
{% macro lowered_counter(s, tokens) -%}
{%- if subscription.counts_up -%}
{{ s }}.{{ subscription.tokens_remaining }} + {{ tokens }}
{%- else -%}
greatest({{ s }}.{{ subscription.tokens_remaining }} - {{ tokens }}, 0)
{%- endif -%}
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

{# The usage of each subscription `w` in its window, where it has any: key, tokens; owed charges among it. `key`: what
   of `w` names it. `range`: which log rows `l` are read, as a condition that begins with AND. `at`: the time of the
   window. #}
{% macro used_in_windows(key, range, at="statement_timestamp()") -%}
SELECT t.key, {{ countable("sum(t.tokens)") }} AS tokens
FROM (
    SELECT {{ key }} AS key, sum(l.{{ usage_log.total_tokens }}) AS tokens
    FROM {{ subscription }} w
    JOIN {{ usage_log }} l ON {{ is_counted("l", "w." ~ subscription.user_id, window_start("w", at)) }}
    WHERE true{{ range }}
    GROUP BY {{ key }}
    UNION ALL
    SELECT {{ key }}, o.total_tokens
    FROM {{ subscription }} w
    JOIN {{ trueup.owed_charge }} o ON o.user_id = w.{{ subscription.user_id }} AND o.success
                                    AND o.used_at >= {{ window_start("w", at) }}
) t
GROUP BY t.key
{%- endmacro %}

{# The mark of trueup's own log row of that id in this transaction, as text. Only trueup's roles can read the secret,
   and the transaction's number makes a mark useless in any other. In pg_catalog's names, for triggers. #}
{% macro own_row_mark(id) -%}
(SELECT {{ mark("i.mark_secret", id) }} FROM trueup.installation i)
{%- endmacro %}

{% macro mark(secret, id) -%}
encode(sha256(convert_to({{ secret }} || ' ' || {{ id }} || ' ' || pg_current_xact_id()::text, 'UTF8')), 'hex')
{%- endmacro %}
