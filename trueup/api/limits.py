"""The rate limit of each user. All processes count in Redis; while it is unavailable, each counts in memory."""

import logging
import threading
import time

from fastapi import Request
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from trueup.api.errors import ApiError
from trueup.settings.settings import Settings, broker_url

logger = logging.getLogger(__name__)

REDIS_TIMEOUT_SECONDS = 0.5
# After a failure, requests skip Redis for this long, so that they do not all wait for its timeout.
PAUSE_SECONDS = 5.0


class RateLimit:
    """A limit per user over a sliding window of one minute. 0 requests a minute means no limit."""

    def __init__(self, settings: Settings) -> None:
        limit = settings.api.rate_limit_per_minute
        self._item = RateLimitItemPerMinute(limit) if limit else None
        self._memory = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self._url = _storage_url(broker_url(settings)) if limit else None

    def check(self, subject: str) -> None:
        """Count a request of `subject`. Raises `ApiError` 429 if it exceeds the limit."""
        if self._item is None:
            return
        limiter, taken = self._hit(subject)
        if not taken:
            seconds = self._seconds_left(limiter, subject)
            raise ApiError(
                429,
                "too_many_requests",
                f"More than {self._item.amount} requests within a minute. Wait {seconds} s and try again",
                headers={"Retry-After": str(seconds)},
            )

    def _hit(self, subject: str) -> tuple[SlidingWindowCounterRateLimiter, bool]:
        assert self._item is not None  # noqa: S101 - for the type checker: check() tested it
        if time.monotonic() >= self._retry_at:
            try:
                shared = self._connected()
                if shared is not None:
                    return shared, shared.hit(self._item, subject)
            except RedisError as error:
                self._retry_at = time.monotonic() + PAUSE_SECONDS
                logger.warning("Redis does not answer, rate limits are counted in this process error=%s", error)
        return self._memory, self._memory.hit(self._item, subject)

    def _seconds_left(self, limiter: SlidingWindowCounterRateLimiter, subject: str) -> int:
        assert self._item is not None  # noqa: S101 - for the type checker: check() tested it
        try:
            reset_at = limiter.get_window_stats(self._item, subject).reset_time
        except RedisError:  # Redis failed after it counted the request
            return 60
        return max(1, min(60, round(reset_at - time.time())))

    def _connected(self) -> SlidingWindowCounterRateLimiter | None:
        """Return the limiter in Redis; None for a broker that `limits` can't use."""
        if self._shared is None and self._url is not None:
            with self._lock:
                self._shared = self._shared or _shared_limiter(self._url)
        return self._shared


def _shared_limiter(url: str) -> SlidingWindowCounterRateLimiter:
    # No retries: they would delay a request that can be counted in memory instead.
    pool = ConnectionPool.from_url(
        url.replace("redis+unix", "unix", 1),
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
    return SlidingWindowCounterRateLimiter(RedisStorage(url, connection_pool=pool, key_prefix="trueup-limits"))


def _storage_url(url: str) -> str | None:
    """Return the broker's URL in the form that `limits` expects; None: Sentinel, where each process counts alone."""
    if url.startswith("redis+socket://"):
        return url.replace("redis+socket://", "redis+unix://", 1).replace("virtual_host=", "db=")
    return url if url.startswith(("redis://", "rediss://")) else None


def of(request: Request) -> RateLimit:
    """Return the rate limit of the request's application."""
    limit: RateLimit = request.app.state.rate_limit
    return limit
