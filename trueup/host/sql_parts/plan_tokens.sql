                   -- Of a subscription s and its plans tp and fp.
                   greatest(coalesce(
                       {{if subscription.tokens_included}}s.{{subscription.tokens_included}}
                       {{else}}tp.{{token_plan.tokens_included}}, fp.{{full_plan.tokens_included}}{{end}}, 0), 0)
