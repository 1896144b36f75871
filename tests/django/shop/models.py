import uuid

from django.conf import settings
from django.db import models


class Pack(models.Model):
    title = models.CharField(max_length=50)
    token_count = models.PositiveIntegerField()


class Membership(models.Model):
    owner = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    referred_by = models.ForeignKey(settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="+")
    pack = models.ForeignKey(Pack, on_delete=models.PROTECT)
    started_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True)
    tokens_left = models.BigIntegerField()
    active = models.BooleanField(default=True)

    class Meta:
        db_table = '"sales"."membership"'


class ModelCall(models.Model):
    uid = models.UUIDField(primary_key=True, default=uuid.uuid4)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, db_column="whose")
    tokens_used = models.IntegerField()
    succeeded = models.BooleanField(default=True)
    note = models.CharField(max_length=20)
    logged_at = models.DateTimeField()


class SpecialCall(ModelCall):
    reason = models.CharField(max_length=20)


class Elsewhere(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, db_constraint=False)
    total_tokens = models.IntegerField()
    success = models.BooleanField()
    created_at = models.DateTimeField()


class Vague(models.Model):
    """A subscription whose counter only a person can tell."""

    owner = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    pack = models.ForeignKey(Pack, on_delete=models.PROTECT)
    started_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True)
    amount_of_something = models.BigIntegerField()
    active = models.BooleanField(default=True)


class Purchase(models.Model):
    buyer = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    pack = models.ForeignKey(Pack, on_delete=models.PROTECT)
    state = models.CharField(max_length=10, choices=[("OPEN", "Open"), ("PAID", "Paid")])
    paid_at = models.DateTimeField()
    reference = models.CharField(max_length=40)


class Deduction(models.Model):
    membership = models.ForeignKey(Membership, on_delete=models.CASCADE)
    amount = models.IntegerField()
    created_at = models.DateTimeField()


class Transfer(models.Model):
    """A subscription that one user gives to another."""

    giver = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    to = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    pack = models.ForeignKey(Pack, on_delete=models.PROTECT)
    started_at = models.DateTimeField()
    expires_at = models.DateTimeField(null=True)
    tokens_left = models.BigIntegerField()
    active = models.BooleanField(default=True)
