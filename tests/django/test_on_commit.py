"""A metered task in a Django project's Celery application has the methods that Celery gives to all tasks there."""

from pathlib import Path

import pytest

from tests.django.test_driver import project
from tests.support.books import assert_true
from tests.support.host import Host

APPLICATION = """
import os, sys
import django
django.setup()
from celery import Celery
from django.db import connection, transaction
from trueup import Message, metered_task

app = Celery("proj", broker=os.environ["TRUEUP_BROKER_URL"])
app.set_default()
app.conf.task_always_eager = True

@metered_task(name="proj.summarize", feature_name="Summaries", section="chat", estimated_tokens=500)
def summarize(model, user_id: int, text: str) -> str:
    return model.complete([Message(role="user", content=text)], max_completion_tokens=20).text

user, ends, way = {user}, {ends!r}, {way!r}

def calls():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM trueup.charge")
        return cursor.fetchone()[0]

try:
    with transaction.atomic():
        if way == "delay_on_commit":
            summarize.delay_on_commit(user_id=user, text="Orders are sent in two days.")
        else:
            summarize.apply_async_on_commit(kwargs=dict(user_id=user, text="Orders are sent in two days."))
        print(calls())
        if ends == "rollback":
            raise ZeroDivisionError
except ZeroDivisionError:
    pass
print(calls())
"""


@pytest.mark.parametrize("way", ["delay_on_commit", "apply_async_on_commit"])
@pytest.mark.parametrize(("ends", "charges"), [("commit", 1), ("rollback", 0)])
def test_a_metered_task_is_sent_when_the_projects_transaction_commits(
    ends: str, charges: int, way: str, host: Host, tmp_path: Path
) -> None:
    user = host.subscriber()
    done = project(tmp_path, "", APPLICATION.format(user=user, ends=ends, way=way))
    assert done.stdout.split() == ["0", str(charges)], done.stderr
    assert_true(host)


def test_without_django_a_metered_task_has_no_such_methods() -> None:
    from tests.support import model_tasks

    assert not hasattr(model_tasks.spend, "delay_on_commit")
