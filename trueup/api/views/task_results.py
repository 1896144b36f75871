"""The state of a task that was requested over HTTP: `GET /api/tasks/{id}`, for its owner only."""

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar
from uuid import UUID

from celery import Celery
from fastapi import APIRouter, Path, Request
from kombu.exceptions import OperationalError
from pydantic import Field
from redis.exceptions import RedisError

from trueup.api.auth import CurrentUser
from trueup.api.errors import AUTHENTICATED, ApiError, Denial, responses
from trueup.api.schemas import Body
from trueup.database.retry import retrying
from trueup.errors import (
    AnswerFormatError,
    HoldExhaustedError,
    InvalidInputError,
    ProviderError,
    ServiceUnavailableError,
    SettingsError,
    TokensDenied,
)
from trueup.features.enhancement import PromptResult
from trueup.features.questions import QuestionResult
from trueup.usage.task_requests import TaskRequest, find_request_of_task

State = Literal["pending", "running", "done", "denied", "failed"]
ENDED: frozenset[State] = frozenset({"done", "denied", "failed"})
TASKS_PATH = "/api/tasks"

_Result = TypeVar("_Result")

# Texts of failures for clients. An error's own message may name servers, so it goes to the log only. The first class
# that matches counts.
_FAILURES: tuple[tuple[type[BaseException], str, str], ...] = (
    (AnswerFormatError, "unusable_answer", "The model's answer could not be used; its tokens are charged"),
    (ProviderError, "provider_failed", "The model provider failed"),
    (HoldExhaustedError, "tokens_exhausted", "The tokens held did not cover the work"),
    (SettingsError, "not_configured", "The worker lacks a setting; its log names it"),
)
_STATES: dict[str, State] = {"PENDING": "pending", "SUCCESS": "done", "FAILURE": "failed", "REVOKED": "failed"}

router = APIRouter(tags=["ai"], responses=responses(*AUTHENTICATED, 404))


class Failure(Body):
    """The reason of a task's failure."""

    error: str = Field(examples=["The model provider failed"])
    error_code: str = Field(examples=["provider_failed"])


class TaskBody(Body, Generic[_Result]):
    """A task. `result` is set if it is done, `denial` if the gate denied it, `failure` if it failed."""

    task_id: str = Field(examples=["6f1c2f0e-6b8e-4e5b-9f0a-0d6a3c1b2a4d"])
    task: str = Field(examples=["trueup.ask_question"])
    state: State
    created_at: datetime
    result: _Result | None = None
    denial: Denial | None = None
    failure: Failure | None = None


@router.get(TASKS_PATH + "/{task_id}")
def task_result(
    request: Request,
    user_id: CurrentUser,
    task_id: Annotated[UUID, Path(description="the `task_id` in the answer to the POST, also in its Location")],
) -> TaskBody[QuestionResult | PromptResult]:
    """Show the state of one's own task. It is known for 24 hours."""
    found = retrying(lambda connection: find_request_of_task(connection, user_id, str(task_id)))
    if found is None:
        raise ApiError(404, "not_found", "You have no task with this id, or it is more than 24 hours old")
    return TaskBody[QuestionResult | PromptResult].model_validate(read_task(request.app.state.celery, found))


def read_task(celery: Celery, asked: TaskRequest) -> dict[str, Any]:
    """Return the task's state, with the fields of `TaskBody`. Raises `ServiceUnavailableError` if Redis is down."""
    try:
        # An AsyncResult would subscribe to the result and never unsubscribe.
        meta = celery.backend.get_task_meta(asked.task_id, cache=False)
    except (OperationalError, RedisError, OSError) as error:
        raise ServiceUnavailableError("Redis", "the result backend", str(error)) from error
    state, outcome = _STATES.get(meta["status"], "running"), meta["result"]
    body = body_of(asked, state)
    if state == "done":
        return body | {"result": outcome}
    if isinstance(outcome, TokensDenied):
        return body | {"state": "denied", "denial": outcome.payload}
    if state == "failed":
        return body | {"failure": _failure(outcome)}
    return body


def body_of(asked: TaskRequest, state: State) -> dict[str, Any]:
    """Return the fields of `TaskBody` that a task has in every state."""
    return {"task_id": asked.task_id, "task": asked.task, "state": state, "created_at": asked.created_at}


def _failure(error: object) -> dict[str, str]:
    if isinstance(error, InvalidInputError):
        return {"error_code": "invalid_input", "error": str(error)}
    for kind, code, text in _FAILURES:
        if isinstance(error, kind):
            return {"error_code": code, "error": text}
    return {"error_code": "task_failed", "error": "The task failed; the worker's log names the cause"}
