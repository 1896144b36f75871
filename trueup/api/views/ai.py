"""AI features over HTTP. An endpoint checks the user's tokens, then sends a metered task, whose hold reserves them."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

from celery import Celery
from fastapi import APIRouter, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from kombu.exceptions import OperationalError
from pydantic import AfterValidator, Field
from redis.exceptions import RedisError

from trueup.accounts.user_ids import UserId
from trueup.api.access import require_tokens
from trueup.api.auth import CurrentUser
from trueup.api.errors import AUTHENTICATED, ApiError, Problem, responses, unavailable
from trueup.api.schemas import Body
from trueup.api.views.task_results import ENDED, TASKS_PATH, TaskBody, body_of, read_task
from trueup.database.retry import retrying
from trueup.errors import ServiceUnavailableError, TokensDenied, TrueupError
from trueup.extras import require_extra
from trueup.features import enhancement, questions
from trueup.features.inputs import Business, Prose
from trueup.llm.texts import cleaned_text
from trueup.usage.task_requests import TaskRequest, begin_request, find_request, fingerprint_of, mark_sent

logger = logging.getLogger(__name__)

POLL_SECONDS = (0.05, 1.0)
_SAYS_SOMETHING = re.compile(r"[^\s\x00-\x1f\x7f-\x9f]")
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:$|[,;])", re.IGNORECASE)

_FAILED: dict[str, Any] = {"model": Problem, "description": "The request waited, and its task failed"}
_SENT_HEADERS = {
    "Location": {"description": "Address of the task's state and result", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait before asking", "schema": {"type": "integer", "minimum": 1}},
}

router = APIRouter(tags=["ai"], responses={**responses(*AUTHENTICATED, 402, 409, 413, 501), 502: _FAILED})

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="For 24 hours, requests with the same key share one task. A new key, or none, starts a new task.",
    ),
]
Prefer = Annotated[
    str | None, Header(max_length=255, description="`wait=N`: wait up to N seconds for the result, and answer with it.")
]


def _said(text: str) -> str:
    if not _SAYS_SOMETHING.search(text):
        raise ValueError("it has no readable characters. Send text")
    return cleaned_text(text)


Said = Annotated[str, Field(json_schema_extra={"pattern": _SAYS_SOMETHING.pattern}), AfterValidator(_said)]


class QuestionBody(Body):
    """A question, and passages to answer it from, the most relevant first."""

    question: Said = Field(max_length=questions.MAX_QUESTION_CHARACTERS, examples=["Are returns free?"])
    context: list[Annotated[Prose, Field(max_length=questions.MAX_PASSAGE_CHARACTERS)]] = Field(
        default=[], max_length=questions.MAX_PASSAGES, examples=[["Returns are free for 45 days."]]
    )


class PromptBody(Body):
    """A draft of a prompt, and the business whose assistant will use it."""

    prompt: Said = Field(
        max_length=enhancement.MAX_DRAFT_CHARACTERS, examples=["Answer politely. Always tell the price."]
    )
    business: Business | None = None


@router.post(
    "/api/ai/ask-question/",
    responses={
        200: {"model": TaskBody[questions.QuestionResult], "description": "The request waited; the result"},
        202: {"model": TaskBody[questions.QuestionResult], "description": "Task sent", "headers": _SENT_HEADERS},
    },
)
async def ask_question(
    request: Request, body: QuestionBody, user_id: CurrentUser, key: IdempotencyKey = None, prefer: Prefer = None
) -> JSONResponse:
    """Ask a question. Estimate: 1,500 tokens."""
    return await _answer(request, user_id, "trueup.ask_question", body.model_dump(), key=key, prefer=prefer)


@router.post(
    "/api/web-knowledge/generate-prompt/",
    responses={
        200: {"model": TaskBody[enhancement.PromptResult], "description": "The request waited; the result"},
        202: {"model": TaskBody[enhancement.PromptResult], "description": "Task sent", "headers": _SENT_HEADERS},
    },
)
async def generate_prompt(
    request: Request, body: PromptBody, user_id: CurrentUser, key: IdempotencyKey = None, prefer: Prefer = None
) -> JSONResponse:
    """Write a better prompt from a draft. Estimate: 700 tokens, more for a long draft."""
    return await _answer(request, user_id, "trueup.generate_prompt", body.model_dump(), key=key, prefer=prefer)


async def _answer(
    request: Request, user_id: UserId, task: str, arguments: dict[str, Any], *, key: str | None, prefer: str | None
) -> JSONResponse:
    asked = await run_in_threadpool(_ask, request, user_id, task, arguments, key)
    seconds = _wait_seconds(prefer, request.app.state.settings.api.max_wait_seconds)
    state = await _wait(request, asked, seconds or 0)
    if state["state"] == "denied":
        raise TokensDenied(state["denial"])
    if state["state"] == "failed" and seconds is not None:
        raise ApiError(502, state["failure"]["error_code"], state["failure"]["error"])
    headers = {} if seconds is None else {"Preference-Applied": f"wait={seconds}"}
    headers["Location"] = f"{TASKS_PATH}/{asked.task_id}"
    body = TaskBody[Any].model_validate(state).model_dump(mode="json")
    if state["state"] in ENDED:
        return JSONResponse(body, 200, headers)
    return JSONResponse(body, 202, headers | {"Retry-After": "1"})


def _ask(request: Request, user_id: UserId, task: str, arguments: dict[str, Any], key: str | None) -> TaskRequest:
    """Send the task, once per idempotency key, and return its request.

    `key` None: the request can't be repeated. Raises `TokensDenied` before anything is written, `ApiError` 409 for a
    key of another request, and `ApiError` 503 if the broker does not answer; then the next request with the key sends
    the task. Raises `MissingExtraError` without the extra [features].
    """
    require_extra("features", f"Task {task}", consequence="Nothing was sent.")
    celery: Celery = request.app.state.celery
    fingerprint = fingerprint_of(task, arguments)
    # The task's own estimate also refuses input that the task would refuse.
    metered = celery.tasks[task]
    tokens: int = metered.estimated_tokens(arguments)
    known = retrying(lambda connection: find_request(connection, user_id, key)) if key else None
    # A request with a known key was admitted before. Its task may have run already, even if `sent_at` was not recorded,
    # so the tokens that are left now say nothing about it. If it was not sent yet, the task's own gate decides.
    if known is None:
        require_tokens(request, user_id, tokens, metered.feature_name)
    task_id = str(uuid.uuid4())
    asked = known or retrying(
        lambda connection: begin_request(
            connection,
            user_id=user_id,
            # A request without a key can't be repeated, so any unique key will do.
            idempotency_key=key or task_id,
            fingerprint=fingerprint,
            task_id=task_id,
            task=task,
        )
    )
    if asked.fingerprint != fingerprint:
        problem = "Idempotency-Key: another request used this key within 24 hours. Send a new key, or the same request"
        raise ApiError(409, "conflict", problem)
    if asked.sent_at is None:
        _send(celery, asked, arguments)
        _record_sent(asked)
    return asked


def _send(celery: Celery, asked: TaskRequest, arguments: Mapping[str, Any]) -> None:
    """Send the task's message to the broker. Raises `ApiError` 503 if the broker does not answer.

    It does not use `apply_async`, which subscribes to the result. The API polls results instead, so every request would
    leave one more subscription behind.
    """
    user_id = asked.user_id if isinstance(asked.user_id, int) else str(asked.user_id)
    kwargs = {"user_id": user_id, **arguments}
    amqp = celery.amqp
    message = amqp.create_task_message(asked.task_id, asked.task, (), kwargs)
    options = amqp.router.route({}, asked.task, (), kwargs, celery.tasks[asked.task])
    try:
        with celery.producer_or_acquire() as producer:
            amqp.send_task_message(producer, asked.task, message, **options)
    except (OperationalError, RedisError, OSError) as error:
        logger.error("answered 503, the task may have been sent task=%s error=%s", asked.task_id, error)
        raise unavailable(
            "Redis does not answer, so it is not known whether the task was sent. Repeat the request with the same "
            "Idempotency-Key; without a key the repeated request starts another task"
        ) from error


def _record_sent(asked: TaskRequest) -> None:
    """Record that the broker has the task.

    A failure is only logged, because the broker has the task anyway, and an error would make the client ask again. The
    next request with the key then sends a duplicate message, and the gate runs one of the two.
    """
    try:
        retrying(lambda connection: mark_sent(connection, asked))
    except TrueupError as error:
        logger.warning("sent task not recorded as sent task=%s error=%s", asked.task_id, error)


async def _wait(request: Request, asked: TaskRequest, seconds: int) -> dict[str, Any]:
    """Poll the task and return its state once it has ended, the time is up, or the client has disconnected."""
    deadline = time.monotonic() + seconds
    pause, longest = POLL_SECONDS
    while True:
        # A waiting request uses a thread only to read the state, so that waiting requests do not exhaust the pool.
        state = await run_in_threadpool(_read_state, request.app.state.celery, asked)
        left = deadline - time.monotonic()
        if state["state"] in ENDED or left <= 0 or await request.is_disconnected():
            return state
        await asyncio.sleep(min(pause, left))
        pause = min(2 * pause, longest)


def _read_state(celery: Celery, asked: TaskRequest) -> dict[str, Any]:
    """Return the task's state. While Redis does not answer it is pending; an error would make the client ask again."""
    try:
        return read_task(celery, asked)
    except ServiceUnavailableError as error:
        logger.warning("task state unknown, answered pending task=%s error=%s", asked.task_id, error)
        return body_of(asked, "pending")


def _wait_seconds(prefer: str | None, limit: int) -> int | None:
    """Return how many seconds the client prefers to wait, at most `limit`; None: it states no preference.

    A malformed preference is ignored, as RFC 7240 requires.
    """
    wanted = _WAIT.search(prefer or "")
    return min(int(wanted[1]), limit) if wanted else None
