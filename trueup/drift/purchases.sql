-- What was bought and paid for, as the host's payments say.
CREATE OR REPLACE FUNCTION trueup.purchases_mapped() RETURNS boolean LANGUAGE sql IMMUTABLE AS $$ SELECT true $$;

-- `tokens`: of the plan that was bought, 0 without one. `own_plan`: it is the plan that the subscription has now.
-- `ends`: when a plan with a duration runs out; null: it does not.
-- `reference`: what a grant made of this payment is known by. Inlined by the planner, as the decrements are.
CREATE OR REPLACE FUNCTION trueup.purchases() RETURNS TABLE (
    user_id {{user_id_type}}, id text, reference text, at timestamptz, tokens bigint, own_plan boolean, kind text,
    ends timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT p.{{payment.user_id}}, p.{{payment.id}}::text,
           coalesce(nullif(p.{{payment.transaction_id}}::text, ''), p.{{payment.id}}::text),
           p.{{payment.payment_date}}::timestamptz,
           greatest(coalesce(tp.{{token_plan.tokens_included}}, fp.{{full_plan.tokens_included}}, 0), 0)::bigint,
           CASE WHEN p.{{payment.token_plan_id}} IS NOT NULL
                THEN coalesce(p.{{payment.token_plan_id}} = s.{{subscription.token_plan_id}}, false)
                ELSE s.{{subscription.token_plan_id}} IS NULL
                     AND coalesce(p.{{payment.full_plan_id}} = s.{{subscription.full_plan_id}}, false) END,
           CASE WHEN p.{{payment.token_plan_id}} IS NOT NULL THEN 'token plan'
                WHEN p.{{payment.full_plan_id}} IS NOT NULL THEN 'full plan' ELSE 'no plan' END,
           CASE WHEN p.{{payment.token_plan_id}} IS NULL
                THEN p.{{payment.payment_date}}::timestamptz + make_interval(days => fp.{{full_plan.duration_days}}::int) END
    FROM {{payment}} p
    LEFT JOIN {{subscription}} s ON s.{{subscription.user_id}} = p.{{payment.user_id}}
    LEFT JOIN {{token_plan}} tp ON tp.{{token_plan.id}} = p.{{payment.token_plan_id}}
    LEFT JOIN {{full_plan}} fp ON fp.{{full_plan.id}} = p.{{payment.full_plan_id}}
    WHERE p.{{payment.status}}::text = {{literal payment.completed_status}}
$$;
