"""The worker's side of a round, loaded with `-I tests.faults.spending`: its task, and some impatience.

Nothing here changes what a task may spend or how that is recorded: waits are shortened, so that a round takes seconds,
and each request to the provider says which process asked.
"""

import inspect
import os
import time
from typing import Any

import httpx2
import openai
import psycopg
import sqlalchemy.dialects.postgresql.psycopg  # noqa: F401
from kombu import Connection

import billing.settings
import tasks.base
from ai.model import Message, Model
from ai.tokens import offline_counter
from billing.users import UserId
from tasks import metered_task
from tests.faults.plans import LEASE_MARGIN_SECONDS, VISIBILITY_SECONDS
from tests.faults.provider import PID_HEADER, prompt_of
from worker.celery import app

TASK = "faults.spend"


@metered_task(
    name=TASK,
    feature_name="Faults",
    section="chat",
    estimated_tokens=lambda arguments: arguments["tokens"],
    default_retry_delay=0.3,
)
def spend(
    model: Model,
    user_id: UserId,
    label: str,
    tokens: int,
    calls: int = 1,
    words: int = 10,
    seconds: float = 0,
    cap: int | None = None,
) -> int:
    """Make the calls, with a pause after each. Returns the tokens spent."""
    spent = 0
    for call in range(1, calls + 1):
        prompt = prompt_of(label, call, user_id, words)
        spent += model.complete([Message(role="user", content=prompt)], max_completion_tokens=cap).total_tokens
        time.sleep(seconds)
    return spent


def _hurry() -> None:
    tasks.base.PROVIDER_RETRY_BASE_SECONDS = 0.2  # type: ignore[assignment]
    # A hold's lease is then 3 s: shorter than the longest stop of a process, longer than any call.
    billing.settings.LEASE_MARGIN_SECONDS = LEASE_MARGIN_SECONDS
    options: dict[str, Any] = app.conf.broker_transport_options
    options.update(
        visibility_timeout=VISIBILITY_SECONDS,
        unacked_restore_interval=1,
        # A worker killed in the middle of its sweep keeps all others from sweeping for as long.
        unacked_mutex_expire=2,
    )


def _reconnect_soon() -> None:
    """A worker that lost Redis would wait 2, 4, 6 s between its tries."""
    names = inspect.getfullargspec(Connection._ensure_connection).args[1:]
    defaults = dict(zip(names, Connection._ensure_connection.__defaults__, strict=True))
    defaults |= {"interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.5}
    Connection._ensure_connection.__defaults__ = tuple(defaults.values())


def _warm_up() -> None:
    """Load before the fork what each pool child would load with its first task: that takes seconds of a round."""
    offline_counter().count("warm")
    with openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1/v1") as client:
        _ = client.chat.completions.with_raw_response
    assert psycopg.pq.__impl__


def _sign_requests() -> None:
    send = httpx2.Client.send

    def signed(self: httpx2.Client, request: httpx2.Request, **options: Any) -> httpx2.Response:
        request.headers[PID_HEADER] = str(os.getpid())
        return send(self, request, **options)

    httpx2.Client.send = signed  # type: ignore[method-assign,assignment]


_warm_up()
_hurry()
_reconnect_soon()
_sign_requests()
