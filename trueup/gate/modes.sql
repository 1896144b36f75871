-- The mode of the gate for each feature, at run time. The gate reads it only after a denial, so admitted tasks pay
-- nothing.

-- A feature's mode: from its own row, from the row of every feature ('*'), or from the settings.
CREATE OR REPLACE FUNCTION trueup.gate_mode_of(p_feature text, p_settings text) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT m.mode FROM trueup.gate_mode m WHERE m.feature_name = p_feature),
                    (SELECT m.mode FROM trueup.gate_mode m WHERE m.feature_name = '*'),
                    p_settings)
$$;

-- Whether the feature's mode overrides a denial. The denial is recorded, except in mode "off".
CREATE OR REPLACE FUNCTION trueup.override_denial(
    p_user {{ user_id_type }}, p_task text, p_feature text, p_settings text, p_reason text, p_tokens bigint, at timestamptz
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    v_mode text := trueup.gate_mode_of(p_feature, p_settings);
BEGIN
    IF v_mode = 'observe' THEN
        INSERT INTO trueup.observed_denial (user_id, task_id, feature_name, reason, tokens, denied_at)
        VALUES (p_user, p_task, p_feature, p_reason, p_tokens, coalesce(at, clock_timestamp()));
    ELSIF v_mode = 'enforce' THEN
        INSERT INTO trueup.denial (user_id, task_id, feature_name, reason, tokens, denied_at)
        VALUES (p_user, p_task, p_feature, p_reason, p_tokens, coalesce(at, clock_timestamp()));
    END IF;
    RETURN v_mode IN ('observe', 'off');
END $$;

-- Set the mode of a feature, and return the previous one. p_mode NULL: the settings decide from now on.
CREATE OR REPLACE FUNCTION trueup.set_gate_mode(
    p_feature text, p_mode text, p_by text, p_note text, at timestamptz
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    v_before text;
BEGIN
    -- Concurrent changes take turns, so that each records the mode that it replaced.
    LOCK TABLE trueup.gate_mode IN SHARE ROW EXCLUSIVE MODE;
    SELECT m.mode INTO v_before FROM trueup.gate_mode m WHERE m.feature_name = p_feature;
    IF v_before IS NOT DISTINCT FROM p_mode THEN
        RETURN v_before;
    END IF;
    IF p_mode IS NULL THEN
        DELETE FROM trueup.gate_mode m WHERE m.feature_name = p_feature;
    ELSE
        INSERT INTO trueup.gate_mode (feature_name, mode) VALUES (p_feature, p_mode)
        ON CONFLICT (feature_name) DO UPDATE SET mode = excluded.mode;
    END IF;
    INSERT INTO trueup.gate_mode_change (feature_name, mode_before, mode, changed_by, note, changed_at)
    VALUES (p_feature, v_before, p_mode, p_by, p_note, coalesce(at, clock_timestamp()));
    RETURN v_before;
END $$;
