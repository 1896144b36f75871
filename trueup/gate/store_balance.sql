{# Create a user's balance, unless there is one. Without a window or an epoch it is stale, and is built from the log. #}
{% macro create_balance(user) -%}
INSERT INTO trueup.balance (user_id, window_start, log_epoch) VALUES ({{ user }}, 'infinity', -1) ON CONFLICT DO NOTHING;
{%- endmacro %}

{# Store what trueup.lock_account returned for a user. `account`: the variable or function that has its columns; `held`:
   the tokens held by now. If the consumed tokens can't be counted, the balance is stored as stale, so that it is built from
   the log at each look until the log's rows can be counted again. #}
{% macro store_balance(user, account="a", held=none) %}
    UPDATE trueup.balance b
    SET window_start = {{ account }}.window_start,
        log_epoch = CASE WHEN {{ account }}.consumed < {{ uncountable }} THEN {{ account }}.log_epoch ELSE -1 END,
        consumed = least({{ account }}.consumed, {{ uncountable }}), held = {{ held or account ~ ".held" }}
    -- If there was no balance, a concurrent transaction may have created one: keep that one.
    WHERE b.user_id = {{ user }} AND {{ account }}.consumed IS NOT NULL;
{% endmacro %}
