# ruff: noqa: RUF012 - as Django makes them

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = [
        ("billing", "0001_initial"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.CreateModel(
            name="CounterChange",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("subscription_id", models.BigIntegerField()),
                ("before", models.IntegerField()),
                ("after", models.IntegerField()),
                ("who", models.CharField(max_length=64)),
            ],
            options={
                "db_table": "sales_counterchange",
            },
        ),
        migrations.CreateModel(
            name="Payment",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("status", models.CharField(default="completed", max_length=20)),
                ("payment_date", models.DateTimeField()),
                ("transaction_id", models.CharField(max_length=100, unique=True)),
                (
                    "full_plan",
                    models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, to="billing.fullplan"),
                ),
                (
                    "subscription",
                    models.ForeignKey(
                        null=True, on_delete=django.db.models.deletion.SET_NULL, to="billing.subscription"
                    ),
                ),
                (
                    "token_plan",
                    models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, to="billing.tokenplan"),
                ),
                ("user", models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, to=settings.AUTH_USER_MODEL)),
            ],
            options={
                "db_table": "billing_payment",
            },
        ),
        migrations.CreateModel(
            name="TokenUsage",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("used_tokens", models.IntegerField()),
                ("usage_date", models.DateTimeField()),
                ("description", models.CharField(default="", max_length=200)),
                (
                    "subscription",
                    models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, to="billing.subscription"),
                ),
            ],
            options={
                "db_table": "billing_tokenusage",
            },
        ),
    ]
