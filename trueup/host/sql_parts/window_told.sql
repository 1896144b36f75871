    INSERT INTO trueup.window_change (user_id, window_start, token_plan_id, full_plan_id, changed_at)
    SELECT {{row}}.{{subscription.user_id}}, coalesce({{row}}.{{subscription.start_date}}, '-infinity'::timestamptz),
           {{if subscription.tokens_included}}
           'tokens:' || greatest(coalesce({{row}}.{{subscription.tokens_included}}, 0), 0), NULL,
           {{else}}
           {{row}}.{{subscription.token_plan_id}}, {{row}}.{{subscription.full_plan_id}},
           {{end}}
           clock_timestamp()
    WHERE EXISTS (SELECT FROM trueup.token_grant g WHERE g.user_id = {{row}}.{{subscription.user_id}});
