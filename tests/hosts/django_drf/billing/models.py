import uuid

from django.conf import settings
from django.db import models
from django.utils import timezone


class TokenPlan(models.Model):
    name = models.CharField(max_length=100)
    tokens_included = models.IntegerField()
    is_active = models.BooleanField(default=True)


class FullPlan(models.Model):
    name = models.CharField(max_length=100)
    tokens_included = models.IntegerField()
    duration_days = models.IntegerField()
    is_active = models.BooleanField(default=True)


class Subscription(models.Model):
    user = models.OneToOneField(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="subscription")
    token_plan = models.ForeignKey(TokenPlan, null=True, on_delete=models.SET_NULL)
    full_plan = models.ForeignKey(FullPlan, null=True, on_delete=models.SET_NULL)
    start_date = models.DateTimeField(default=timezone.now)
    end_date = models.DateTimeField(null=True)
    tokens_remaining = models.IntegerField(default=0)
    is_active = models.BooleanField(default=True)
    status = models.CharField(max_length=20, default="active")
    trial_end = models.DateTimeField(null=True)
    cancel_at_period_end = models.BooleanField(default=False)
    updated_at = models.DateTimeField(auto_now=True)


class AIUsageLog(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE)
    section = models.CharField(max_length=50)
    prompt_tokens = models.IntegerField(default=0)
    completion_tokens = models.IntegerField(default=0)
    total_tokens = models.IntegerField(default=0)
    response_time_ms = models.IntegerField(default=0)
    success = models.BooleanField(default=True)
    model_name = models.CharField(max_length=100)
    error_message = models.TextField(null=True)
    metadata = models.JSONField(default=dict)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        db_table = "ai_usage_log"
