{# Store what trueup.lock_account returned for a user. `account`: the variable or function that has its columns; `held`:
   the tokens held by now. #}
{% macro store_balance(user, account="a", held=none) %}
    UPDATE trueup.balance b
    SET window_start = {{ account }}.window_start, log_epoch = {{ account }}.log_epoch,
        consumed = {{ account }}.consumed, held = {{ held or account ~ ".held" }}
    -- If there was no balance, a concurrent transaction may have created one: keep that one.
    WHERE b.user_id = {{ user }} AND {{ account }}.consumed IS NOT NULL;
{% endmacro %}
