-- The host's own rows of its decrements, one for each time that it lowered a counter.
CREATE OR REPLACE FUNCTION trueup.decrements_mapped() RETURNS boolean LANGUAGE sql IMMUTABLE AS $$ SELECT true $$;

-- Inlined by the planner, so that a user and a time reach the indexes.
CREATE OR REPLACE FUNCTION trueup.decrements() RETURNS TABLE (
    user_id {{user_id_type}}, id text, tokens bigint, at timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT s.{{subscription.user_id}}, t.{{token_usage.id}}::text, t.{{token_usage.used_tokens}}::bigint,
           t.{{token_usage.usage_date}}::timestamptz
    FROM {{subscription}} s
    JOIN {{token_usage}} t ON t.{{token_usage.subscription_id}} = s.{{subscription.id}}
$$;
