"""`manage.py summarize ada "A text."`: send the task, and wait for its result."""

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError

import trueup
from tasks.summaries import summarize


class Command(BaseCommand):
    help = "Summarize a text for a user, by a worker."

    def add_arguments(self, parser):
        parser.add_argument("name")
        parser.add_argument("text")

    def handle(self, name, text, **options):
        user = get_user_model().objects.get(username=name)
        try:
            self.stdout.write(summarize.delay(user_id=user.pk, text=text).get(timeout=60))
        except trueup.TokensDenied as denied:
            raise CommandError(f"denied: {denied.payload['message']}") from None
