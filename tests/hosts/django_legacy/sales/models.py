from django.conf import settings
from django.db import models


class TokenUsage(models.Model):
    """One decrement of a counter."""

    subscription = models.ForeignKey("billing.Subscription", on_delete=models.CASCADE)
    used_tokens = models.IntegerField()
    usage_date = models.DateTimeField()
    description = models.CharField(max_length=200, default="")

    class Meta:
        db_table = "billing_tokenusage"


class Payment(models.Model):
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    subscription = models.ForeignKey("billing.Subscription", null=True, on_delete=models.SET_NULL)
    token_plan = models.ForeignKey("billing.TokenPlan", null=True, on_delete=models.SET_NULL)
    full_plan = models.ForeignKey("billing.FullPlan", null=True, on_delete=models.SET_NULL)
    status = models.CharField(max_length=20, default="completed")
    payment_date = models.DateTimeField()
    transaction_id = models.CharField(max_length=100, unique=True)

    class Meta:
        db_table = "billing_payment"


class CounterChange(models.Model):
    """The old and new value of a counter, for a change by any process. A trigger of the project's own writes it."""

    subscription_id = models.BigIntegerField()
    before = models.IntegerField()
    after = models.IntegerField()
    who = models.CharField(max_length=64)

    class Meta:
        db_table = "sales_counterchange"
