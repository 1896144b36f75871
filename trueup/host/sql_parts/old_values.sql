            CASE WHEN i.column_versions = c.versions THEN true WHEN c.computed THEN false
                 ELSE i.log_files && trueup.log_files() END
