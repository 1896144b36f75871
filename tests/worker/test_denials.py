"""A denied task's answer on the side of its caller: the payload arrives, whatever that side has installed."""

import json
import subprocess
import sys
from typing import Any

import pytest
from celery import Celery

from tests.support.host import Host
from tests.support.worker import WorkerProcess

CALLER = """
import json, sys
%s
from celery import Celery

broker, backend, user = json.loads(sys.stdin.read())
app = Celery("shop", broker=broker, backend=backend, set_as_current=False)
result = app.send_task("test.spend", kwargs={"user_id": user}, queue="trueup-ai")
try:
    result.get(timeout=120)
except Exception as error:
    kind = f"{type(error).__module__}.{type(error).__name__}"
    print(json.dumps([kind, error.args[0], getattr(error, "payload", None)]))
"""


@pytest.mark.parametrize(
    ("setup", "kind"),
    [
        ("sys.modules['trueup'] = None  # as where it is not installed", "celery.exceptions.TokensDenied"),
        ("import trueup", "trueup.errors.TokensDenied"),
    ],
)
def test_the_payload_of_a_denial_reaches_a_caller_with_and_without_trueup(
    setup: str, kind: str, app: Celery, worker: WorkerProcess, shared_host: Host
) -> None:
    user = shared_host.subscriber(10)
    given = json.dumps([app.conf.broker_url, app.conf.result_backend, user])
    script = [sys.executable, "-c", CALLER % setup]
    done = subprocess.run(script, input=given, capture_output=True, text=True, check=True, timeout=150)
    found, argument, payload = json.loads(done.stdout)
    expected: dict[str, Any] = {
        "success": False,
        "error": "Insufficient tokens for Spender: 100 needed, 10 available",
        "error_code": "insufficient_tokens",
        "tokens_remaining": 10,
        "original_tokens": 10,
        "consumed_tokens": 0,
        "days_remaining": None,
    }
    assert (found, argument) == (kind, expected)
    assert payload == (expected if kind.startswith("trueup.") else None)
