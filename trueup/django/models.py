"""trueup's tables as Django models, to read. Django never creates, changes or migrates them, and trueup writes them.

There is no folder `migrations` on purpose: `makemigrations` and `migrate` then leave these models alone, and Django
still makes their permissions.
"""

from typing import Any

from django.conf import settings
from django.db import models


def _table(name: str) -> str:
    # The quotes keep Django from quoting the schema and the name as one.
    return f'"trueup"."{name}"'


def _user() -> Any:
    """Return the key to the project's user. Deleting a user runs no query on trueup's tables."""
    given = getattr(settings, "TRUEUP", None)
    user = given.get("USER", settings.AUTH_USER_MODEL) if isinstance(given, dict) else settings.AUTH_USER_MODEL
    return models.ForeignKey(user, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+")


class Hold(models.Model):
    """Tokens that a task has reserved."""

    id = models.BigIntegerField(primary_key=True)
    user = _user()
    task_id = models.TextField()
    feature_name = models.TextField("feature")
    section = models.TextField()
    status = models.TextField()
    tokens_reserved = models.BigIntegerField()
    tokens_charged = models.BigIntegerField()
    calls = models.IntegerField()
    opened_at = models.DateTimeField()
    expires_at = models.DateTimeField()
    closed_at = models.DateTimeField(null=True)

    class Meta:
        managed = False
        db_table = _table("hold")

    def __str__(self) -> str:
        return f"{self.feature_name} {self.task_id}"


class Charge(models.Model):
    """A provider call whose usage is in the usage log."""

    log_id = models.TextField(primary_key=True)
    user = _user()
    task_id = models.TextField()
    call_key = models.TextField("call")
    section = models.TextField()
    model_name = models.TextField("model")
    tokens_total = models.BigIntegerField("tokens")
    late = models.BooleanField()
    charged_at = models.DateTimeField()

    class Meta:
        managed = False
        db_table = _table("charge")

    def __str__(self) -> str:
        return f"{self.model_name} {self.log_id}"


class ReconcileRun(models.Model):
    """A pass over the counters."""

    id = models.BigIntegerField(primary_key=True)
    kind = models.TextField()
    dry_run = models.BooleanField()
    status = models.TextField()
    started_at = models.DateTimeField()
    finished_at = models.DateTimeField(null=True)
    checked = models.BigIntegerField()
    drifted = models.BigIntegerField()
    corrected = models.BigIntegerField()
    in_review = models.BigIntegerField()
    tokens_overstated = models.BigIntegerField()
    tokens_understated = models.BigIntegerField()
    error = models.TextField(null=True)

    class Meta:
        managed = False
        db_table = _table("reconcile_run")

    def __str__(self) -> str:
        return f"{self.id} ({self.kind})"


class Drift(models.Model):
    """A counter that differed from the usage log, with the causes and what was done."""

    id = models.BigIntegerField(primary_key=True)
    user = _user()
    run = models.ForeignKey(ReconcileRun, on_delete=models.DO_NOTHING, db_constraint=False, related_name="+")
    observed = models.BigIntegerField("counter", null=True)
    expected = models.BigIntegerField()
    written = models.BigIntegerField(null=True)
    cause = models.TextField()
    certainty = models.TextField()
    action = models.TextField()
    reason = models.TextField()
    found_at = models.DateTimeField()
    last_seen_at = models.DateTimeField()

    class Meta:
        managed = False
        db_table = _table("drift")
        permissions = (("review_drift", "Can decide drifts in review"),)

    def __str__(self) -> str:
        return f"{self.id}"


class GateMode(models.Model):
    """The mode of a feature's gate that `trueup rollout set` chose."""

    feature_name = models.TextField("feature", primary_key=True)
    mode = models.TextField()

    class Meta:
        managed = False
        db_table = _table("gate_mode")

    def __str__(self) -> str:
        return f"{self.feature_name}"
