-- The host keeps no payments, or they are not mapped.
CREATE OR REPLACE FUNCTION trueup.purchases_mapped() RETURNS boolean LANGUAGE sql IMMUTABLE AS $$ SELECT false $$;

CREATE OR REPLACE FUNCTION trueup.purchases() RETURNS TABLE (
    user_id {{user_id_type}}, id text, reference text, at timestamptz, tokens bigint, own_plan boolean, kind text,
    ends timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT NULL::{{user_id_type}}, NULL::text, NULL::text, NULL::timestamptz, NULL::bigint, NULL::boolean, NULL::text,
           NULL::timestamptz
    WHERE false
$$;
