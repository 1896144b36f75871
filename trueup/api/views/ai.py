"""The AI features over HTTP: a check at the door, then a metered task, whose own gate reserves."""

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
from trueup.api.errors import ApiError, unavailable
from trueup.api.responses import AUTHENTICATED, Problem, responses
from trueup.api.schemas import Body
from trueup.api.views.task_results import ENDED, TASKS_PATH, TaskBody, body_of, read_task
from trueup.database.retry import retrying
from trueup.errors import ServiceUnavailableError, TokensDenied, TrueupError
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
    "Location": {"description": "Where the task's state and result are", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait before a look", "schema": {"type": "integer", "minimum": 1}},
}

router = APIRouter(tags=["ai"], responses={**responses(*AUTHENTICATED, 402, 409, 413), 502: _FAILED})

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Requests with the same key are one task, for 24 hours; a new key, or none, is a new task.",
    ),
]
Prefer = Annotated[
    str | None,
    Header(max_length=255, description="`wait=N`: answer with the result if it is there within N seconds."),
]


def _said(text: str) -> str:
    if not _SAYS_SOMETHING.search(text):
        raise ValueError("it holds nothing that can be read. Send text")
    return cleaned_text(text)


Said = Annotated[str, Field(json_schema_extra={"pattern": _SAYS_SOMETHING.pattern}), AfterValidator(_said)]


class QuestionBody(Body):
    """A question, and passages to answer it from, the nearest first."""

    question: Said = Field(max_length=questions.MAX_QUESTION_CHARACTERS, examples=["Are returns free?"])
    context: list[Annotated[Prose, Field(max_length=questions.MAX_PASSAGE_CHARACTERS)]] = Field(
        default=[], max_length=questions.MAX_PASSAGES, examples=[["Returns are free for 45 days."]]
    )


class PromptBody(Body):
    """A draft of a prompt, and the business whose assistant it is for."""

    prompt: Said = Field(
        max_length=enhancement.MAX_DRAFT_CHARACTERS, examples=["Answer politely. Always tell the price."]
    )
    business: Business | None = None


@router.post(
    "/api/ai/ask-question/",
    responses={
        200: {"model": TaskBody[questions.QuestionResult], "description": "The request waited: the result"},
        202: {"model": TaskBody[questions.QuestionResult], "description": "The task is sent", "headers": _SENT_HEADERS},
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
        200: {"model": TaskBody[enhancement.PromptResult], "description": "The request waited: the result"},
        202: {"model": TaskBody[enhancement.PromptResult], "description": "The task is sent", "headers": _SENT_HEADERS},
    },
)
async def generate_prompt(
    request: Request, body: PromptBody, user_id: CurrentUser, key: IdempotencyKey = None, prefer: Prefer = None
) -> JSONResponse:
    """Make a better prompt of a draft. Estimate: 700 tokens, more for a long draft."""
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
    """Have the task sent, once for each key, and return its request.

    Raises `TokensDenied` before anything is written, `ApiError` 409 for a key that another request had, and 503 when
    the broker does not answer: then the next request of the same key sends the task.
    """
    celery: Celery = request.app.state.celery
    fingerprint = fingerprint_of(task, arguments)
    # The task's own estimate, which also refuses what the work would refuse.
    metered = celery.tasks[task]
    tokens: int = metered.estimated_tokens(arguments)
    known = retrying(lambda connection: find_request(connection, user_id, key)) if key else None
    # A known key was let in once. Its task may have run, though that it was sent was not noted: then what is left now
    # says nothing of it. If it was not sent, its own gate decides.
    if known is None:
        require_tokens(request, user_id, tokens, metered.feature_name)
    task_id = str(uuid.uuid4())
    asked = known or retrying(
        lambda connection: begin_request(
            connection,
            user_id=user_id,
            # No key: nobody can repeat it, and the task's id is as good as any.
            idempotency_key=key or task_id,
            fingerprint=fingerprint,
            task_id=task_id,
            task=task,
        )
    )
    if asked.fingerprint != fingerprint:
        problem = "Idempotency-Key: another request had this key within 24 hours. Send a new key, or the same request"
        raise ApiError(409, "conflict", problem)
    if asked.sent_at is None:
        _send(celery, asked, arguments)
        _note_sent(asked)
    return asked


def _send(celery: Celery, asked: TaskRequest, arguments: Mapping[str, Any]) -> None:
    """Give the task to the broker.

    `apply_async` would subscribe to the result, whose reader here comes by itself: with each request there would be
    one subscription more. Raises `ApiError` 503.
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
        logger.error("answered 503: nobody knows whether task %s was sent (%s)", asked.task_id, error)
        raise unavailable(
            "Redis does not answer, so that nobody knows whether the task was sent. Repeat the request with the same "
            "Idempotency-Key; without one it is another task"
        ) from error


def _note_sent(asked: TaskRequest) -> None:
    """Note that the broker has the task. If that fails it has it all the same: an error would have it asked for again.

    The next request of the key then sends it a second time, and the gate makes one of both.
    """
    try:
        retrying(lambda connection: mark_sent(connection, asked))
    except TrueupError as error:
        logger.warning("task %s is sent, which could not be noted: %s", asked.task_id, error)


async def _wait(request: Request, asked: TaskRequest, seconds: int) -> dict[str, Any]:
    """Return how the task stands: when it has ended, when the time is over, or when nobody waits any more."""
    deadline = time.monotonic() + seconds
    pause, longest = POLL_SECONDS
    while True:
        # A thread for the look alone: those who wait must not keep others from theirs.
        state = await run_in_threadpool(_read_state, request.app.state.celery, asked)
        left = deadline - time.monotonic()
        if state["state"] in ENDED or left <= 0 or await request.is_disconnected():
            return state
        await asyncio.sleep(min(pause, left))
        pause = min(2 * pause, longest)


def _read_state(celery: Celery, asked: TaskRequest) -> dict[str, Any]:
    """Return how the task stands: pending too while Redis can't tell, for an error would have it asked for again."""
    try:
        return read_task(celery, asked)
    except ServiceUnavailableError as error:
        logger.warning("how task %s stands is not known: %s", asked.task_id, error)
        return body_of(asked, "pending")


def _wait_seconds(prefer: str | None, most: int) -> int | None:
    """Return how long the caller prefers to wait, at most what the settings allow; None: not at all.

    RFC 7240: a preference that can't be read is passed over.
    """
    wanted = _WAIT.search(prefer or "")
    return min(int(wanted[1]), most) if wanted else None
