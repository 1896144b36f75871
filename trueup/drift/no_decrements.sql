-- The host keeps no rows of its decrements, or they are not mapped.
CREATE OR REPLACE FUNCTION trueup.decrements_mapped() RETURNS boolean LANGUAGE sql IMMUTABLE AS $$ SELECT false $$;

CREATE OR REPLACE FUNCTION trueup.decrements() RETURNS TABLE (
    user_id {{user_id_type}}, id text, tokens bigint, at timestamptz
) LANGUAGE sql STABLE AS $$
    SELECT NULL::{{user_id_type}}, NULL::text, NULL::bigint, NULL::timestamptz WHERE false
$$;
