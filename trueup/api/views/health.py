"""Health endpoints: liveness, readiness and metrics."""

import logging
import threading
from time import monotonic
from typing import Literal, cast

from celery import Celery
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from kombu.exceptions import OperationalError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from redis.exceptions import RedisError

from trueup.api.auth import operator
from trueup.api.errors import AUTHENTICATED, responses_to_text
from trueup.api.schemas import Body
from trueup.api.views import metrics
from trueup.database.retry import retrying
from trueup.errors import NotInstalledError, ServiceUnavailableError
from trueup.install.install import check_installed

logger = logging.getLogger(__name__)

# Requests within this time are answered from the last check.
CHECK_EVERY_SECONDS = 2.0
CHECK_IS_STALE_SECONDS = 15.0
PING_EVERY_SECONDS = 10.0
PING_SECONDS = 1.0
WORKER_SEEN_SECONDS = 60.0

State = Literal["ok", "unavailable", "not_installed", "unseen"]

router = APIRouter(tags=["health"])


class Alive(Body):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Body):
    """Whether each part is available. `worker` ok: a worker has answered within the last minute."""

    ready: bool
    database: State = Field(examples=["ok"])
    broker: State = Field(examples=["ok"])
    worker: State = Field(examples=["ok"])


class Watch:
    """Checks the services that the API needs. It caches the result, so that frequent requests cost little."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._lock = threading.Lock()
        self._last: Readiness | None = None
        self._checked_at = 0.0
        self._pinged_at = float("-inf")
        self._seen_at = float("-inf")

    def check(self) -> Readiness:
        """Return the result of the last check, or of a new one.

        While another thread checks, a request gets the last result unless it is stale. The endpoint needs no token, so
        a server that does not answer could otherwise block every thread.
        """
        last, age = self._last, monotonic() - self._checked_at
        if last is not None and age < CHECK_EVERY_SECONDS:
            return last
        is_mine = self._lock.acquire(blocking=last is None or age >= CHECK_IS_STALE_SECONDS)
        if not is_mine and last is not None:
            return last
        try:
            if self._last is last or self._last is None:
                self._last = self._check()
                self._checked_at = monotonic()
            return self._last
        finally:
            self._lock.release()

    def _check(self) -> Readiness:
        database, broker = self._database(), self._broker()
        worker: State = "ok" if broker == "ok" and self._worker_seen() else "unseen"
        return Readiness(ready=database == broker == worker == "ok", database=database, broker=broker, worker=worker)

    def _database(self) -> State:
        try:
            retrying(check_installed)
        except ServiceUnavailableError:
            return "unavailable"
        except NotInstalledError as error:
            logger.warning("database not ready reason=%s", error)
            return "not_installed"
        return "ok"

    def _broker(self) -> State:
        try:
            with self._celery.connection_for_write() as connection:
                connection.ensure_connection(max_retries=0, timeout=PING_SECONDS)
        except (OperationalError, RedisError, OSError):
            return "unavailable"
        return "ok"

    def _worker_seen(self) -> bool:
        now = monotonic()
        if now - self._pinged_at >= PING_EVERY_SECONDS:
            self._pinged_at = now
            try:
                if self._celery.control.ping(timeout=PING_SECONDS, limit=1):
                    self._seen_at = monotonic()
            except (OperationalError, RedisError, OSError) as error:
                logger.warning("workers not pinged error=%s", error)
        return monotonic() - self._seen_at < WORKER_SEEN_SECONDS


@router.get("/healthz")
async def healthz() -> Alive:
    """Answer that the process is alive. It contacts no other service."""
    return Alive()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "A part is not available"}})
def readyz(request: Request) -> Response:
    """Answer whether the API can serve: database, schema, broker and a worker are available."""
    readiness = cast(Watch, request.app.state.watch).check()
    return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)


def metrics_router(*, public: bool) -> APIRouter:
    """Return the route of the metrics. `public` True: without a token; False: for operators only."""
    answers = responses_to_text(*AUTHENTICATED, 403)
    closed = APIRouter(dependencies=[Depends(operator)], responses=answers, tags=["health"])
    router = APIRouter(tags=["health"]) if public else closed

    @router.get("/metrics", response_class=PlainTextResponse)
    def exposition(request: Request) -> Response:
        """Show requests, gate decisions, holds and drift in Prometheus' text format."""
        return Response(metrics.of(request).exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
