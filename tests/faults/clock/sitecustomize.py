"""A wrong clock for one process: put this folder on PYTHONPATH and set FAULTS_CLOCK_SKEW_SECONDS.

Python's own functions for the time of day are shifted before any other import. The monotonic clock is not shifted, as
on a machine with a wrong date.
"""

import datetime
import os
import time

# psycopg's compiled part is built against the real class and refuses any other.
import psycopg  # noqa: F401

_SKEW_SECONDS = float(os.environ.get("FAULTS_CLOCK_SKEW_SECONDS") or 0)
_real_time, _real_time_ns, _real_datetime = time.time, time.time_ns, datetime.datetime


class _Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _real_datetime)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _real_datetime)


class _SkewedDatetime(_real_datetime, metaclass=_Meta):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
        return _real_datetime.now(tz) + datetime.timedelta(seconds=_SKEW_SECONDS)

    @classmethod
    def utcnow(cls) -> datetime.datetime:  # type: ignore[override]
        return cls.now(datetime.UTC).replace(tzinfo=None)


if _SKEW_SECONDS:
    time.time = lambda: _real_time() + _SKEW_SECONDS
    time.time_ns = lambda: _real_time_ns() + int(_SKEW_SECONDS * 1e9)
    datetime.datetime = _SkewedDatetime  # type: ignore[misc]
