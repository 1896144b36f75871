"""For what watches the process: is it alive, can it serve, how is it doing."""

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
from trueup.api.responses import AUTHENTICATED, responses_to_text
from trueup.api.schemas import Body
from trueup.api.views import metrics
from trueup.database.retry import retrying
from trueup.errors import NotInstalledError, ServiceUnavailableError
from trueup.install.install import check_installed

logger = logging.getLogger(__name__)

# Whoever asks more often is answered from the last look.
LOOK_EVERY_SECONDS = 2.0
LOOK_IS_OLD_SECONDS = 15.0
PING_EVERY_SECONDS = 10.0
PING_SECONDS = 1.0
WORKER_SEEN_SECONDS = 60.0

State = Literal["ok", "unavailable", "not_installed", "unseen"]

router = APIRouter(tags=["health"])


class Alive(Body):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Readiness(Body):
    """Whether each part is there. `worker`: one has answered within the last minute."""

    ready: bool
    database: State = Field(examples=["ok"])
    broker: State = Field(examples=["ok"])
    worker: State = Field(examples=["ok"])


class Watch:
    """Looks at what the API needs, seldom enough that asking often costs nothing."""

    def __init__(self, celery: Celery) -> None:
        self._celery = celery
        self._lock = threading.Lock()
        self._last: Readiness | None = None
        self._looked_at = 0.0
        self._pinged_at = float("-inf")
        self._seen_at = float("-inf")

    def read(self) -> Readiness:
        """Return what was seen by the last look, or by one that is taken now.

        Who comes while another looks is answered from the last one, unless that is old: anybody may ask, and a server
        that does not answer would hold up as many threads as there are.
        """
        last, age = self._last, monotonic() - self._looked_at
        if last is not None and age < LOOK_EVERY_SECONDS:
            return last
        is_mine = self._lock.acquire(blocking=last is None or age >= LOOK_IS_OLD_SECONDS)
        if not is_mine and last is not None:
            return last
        try:
            if self._last is last or self._last is None:
                self._last = self._read()
                self._looked_at = monotonic()
            return self._last
        finally:
            self._lock.release()

    def _read(self) -> Readiness:
        database, broker = self._database(), self._broker()
        worker: State = "ok" if broker == "ok" and self._worker_seen() else "unseen"
        return Readiness(ready=database == broker == worker == "ok", database=database, broker=broker, worker=worker)

    def _database(self) -> State:
        try:
            retrying(check_installed)
        except ServiceUnavailableError:
            return "unavailable"
        except NotInstalledError as error:
            logger.warning("not ready: %s", error)
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
                logger.warning("no worker could be asked: %s", error)
        return monotonic() - self._seen_at < WORKER_SEEN_SECONDS


@router.get("/healthz")
async def healthz() -> Alive:
    """Say that the process is alive; asks nobody else."""
    return Alive()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Something is not there"}})
def readyz(request: Request) -> Response:
    """Say whether the API can serve: database, schema, broker and a worker are there."""
    readiness = cast(Watch, request.app.state.watch).read()
    return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)


def metrics_router(*, public: bool) -> APIRouter:
    """Return the route to the metrics: for all, or for operators."""
    answers = responses_to_text(*AUTHENTICATED, 403)
    closed = APIRouter(dependencies=[Depends(operator)], responses=answers, tags=["health"])
    router = APIRouter(tags=["health"]) if public else closed

    @router.get("/metrics", response_class=PlainTextResponse)
    def exposition(request: Request) -> Response:
        """Show requests, decisions and how the books stand, in Prometheus' text format."""
        return Response(metrics.of(request).exposition(), media_type=CONTENT_TYPE_LATEST)

    return router
