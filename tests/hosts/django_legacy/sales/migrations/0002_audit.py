from django.db import migrations

# The row's lock puts the changes of one counter in order.
AUDIT = """
    CREATE FUNCTION sales_audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
    BEGIN
        INSERT INTO sales_counterchange (subscription_id, before, after, who)
        VALUES (new.id, old.tokens_remaining, new.tokens_remaining, current_setting('application_name'));
        RETURN NULL;
    END $$;
    CREATE TRIGGER sales_audit AFTER UPDATE OF tokens_remaining ON billing_subscription
        FOR EACH ROW EXECUTE FUNCTION sales_audit();
"""


class Migration(migrations.Migration):
    dependencies = [  # noqa: RUF012 - as Django makes them
        ("sales", "0001_initial"),
    ]

    operations = [  # noqa: RUF012 - as Django makes them
        migrations.RunSQL(AUDIT, "DROP FUNCTION sales_audit() CASCADE"),
    ]
