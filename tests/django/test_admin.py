"""Django's admin shows trueup's tables, and a person with the permission decides drifts there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.conftest import cloned_database
from trueup.stack import StackUrls

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said(stack: StackUrls, admin_engine: Engine) -> dict[str, Any]:
    """What `admin_cases.py` prints. It runs in a process of its own, because a process has one Django project."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")}
    with cloned_database(stack, admin_engine, "template1") as url:
        plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        done = subprocess.run(
            [sys.executable, "-m", "tests.django.admin_cases"],
            cwd=ROOT / "examples" / "django",
            env=own | {"DATABASE_URL": plain, "PYTHONPATH": str(ROOT), "CELERY_BROKER_URL": str(stack.broker_url)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_each_list_opens_and_is_searched_by_a_users_id(said: dict[str, Any]) -> None:
    assert set(said["lists"].values()) == {200}
    assert said["drifts"] == 4
    assert said["searched"] == {"1": 1, "2": 0, "' OR 1=1": 0, "9" * 30: 0}


def test_a_drifts_page_tells_its_counters_story(said: dict[str, Any]) -> None:
    for words in ("the counter should show", "4990", "6500", "Why they differ", "the whole drift", "Decide"):
        assert words in said["page"]


def test_who_may_only_read_sees_no_form_and_decides_nothing(said: dict[str, Any]) -> None:
    reader = said["reader"]
    assert reader == {"page": 200, "has a form": False, "posts": 403, "adds": 403, "deletes": 403}


def test_a_decision_needs_a_note_corrects_the_counter_once_and_is_in_the_log(said: dict[str, Any]) -> None:
    assert said["without a note"] == [["note: This field is required. Nothing was written."], 6_500]
    assert said["no reference"] == ["reference: A grant needs a reference. Nothing was written."]
    [[message], counter] = said["accepted"]
    assert (message.endswith(": accept."), counter) == (True, 4_990)
    assert said["again"] == [[message.replace(": accept.", " is not in review any more. Nothing was written.")], 4_990]
    [[by, number, change]] = said["log"]
    assert (by, change) == ("root", "accept: typo")
    assert message.startswith(f"Drift {number}:")


def test_several_drifts_are_decided_after_a_page_that_asks_why(said: dict[str, Any]) -> None:
    assert said["asked"] == ["admin/trueup/drift/decide_selected.html", 6_500]
    messages, *counters = said["chosen"]
    assert (len(messages), counters) == (2, [4_990, 4_990, 6_500])
    assert said["everything"] == ["Select drifts of one page. Nothing was written."]


def test_a_deleted_user_leaves_trueups_rows_and_no_migration_is_wanted(said: dict[str, Any]) -> None:
    rows, drifts = said["deleted"]
    assert rows["auth.User"] == 1
    assert not [name for name in rows if name.startswith("trueup")]
    assert drifts == 4
