"""The tasks of benchmarks/guarded_task.py."""

from celery import shared_task

from trueup.accounts.user_ids import UserId
from trueup.llm.model import Message, Model
from trueup.tasks import metered_task


@shared_task(name="bench.bare", acks_late=True)
def bare(user_id: int) -> None:
    """Do nothing."""


@metered_task(name="bench.held", feature_name="Bench", section="other", estimated_tokens=100)
def held(model: Model, user_id: UserId) -> None:
    """Do nothing, with a hold."""


@metered_task(name="bench.charged", feature_name="Bench", section="other", estimated_tokens=100)
def charged(model: Model, user_id: UserId) -> None:
    """Make one call of the offline model."""
    model.complete([Message(role="user", content="ping")], max_completion_tokens=1)
