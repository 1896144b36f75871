{# Create a user's balance if it does not exist. It has no window and no epoch, so the next read rebuilds it from the
   log. #}
{% macro create_balance(user) -%}
INSERT INTO trueup.balance (user_id, window_start, log_epoch) VALUES ({{ user }}, 'infinity', -1) ON CONFLICT DO NOTHING;
{%- endmacro %}

{# Store the result of trueup.lock_account. `account`: the variable or function that has its columns. `held`: the
   tokens held now. If the consumed tokens can't be counted, the balance is stored as stale, so each read builds it from
   the log until the log's rows can be counted again. #}
{% macro store_balance(user, account="a", held=none) %}
    UPDATE trueup.balance b
    SET window_start = {{ account }}.window_start,
        log_epoch = CASE WHEN {{ account }}.consumed < {{ uncountable }} THEN {{ account }}.log_epoch ELSE -1 END,
        consumed = least({{ account }}.consumed, {{ uncountable }}), held = {{ held or account ~ ".held" }}
    -- If there was no balance, a concurrent transaction may have created one: keep that one.
    WHERE b.user_id = {{ user }} AND {{ account }}.consumed IS NOT NULL;
{% endmacro %}
