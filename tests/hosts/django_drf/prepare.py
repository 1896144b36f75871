"""Make the project's tables by its migrations, and sign up its users: `python -m tests.hosts.django_drf.prepare`."""

import os
from datetime import timedelta

import django

from tests.hosts.people import PASSWORD, PEOPLE, Person

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.hosts.django_drf.settings")
django.setup()

from accounts.models import User  # noqa: E402 - after the setup
from billing.models import AIUsageLog, Subscription, TokenPlan  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.utils import timezone  # noqa: E402


def sign_up(person: Person) -> None:
    user = User.objects.create_user(person.name, f"{person.name}@example.com", PASSWORD, id=person.id)
    if person.tokens is None:
        return
    start = timezone.now() - timedelta(days=10)
    Subscription.objects.create(
        user=user,
        token_plan=TokenPlan.objects.create(name=person.name, tokens_included=person.tokens),
        start_date=start,
        end_date=start + timedelta(days=5) if person.expired else None,
        tokens_remaining=person.tokens - person.used,
        is_active=person.active,
    )
    if person.used:
        AIUsageLog.objects.create(user=user, section="chat", total_tokens=person.used, model_name="m")


if __name__ == "__main__":
    call_command("migrate", verbosity=0)
    for person in PEOPLE:
        sign_up(person)
