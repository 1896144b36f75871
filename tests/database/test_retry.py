"""Retries: an operation is retried after each pause if its error passes, and after no other error."""

from collections.abc import Callable, Iterator

import pytest

from trueup.database.retry import growing_pauses, retry
from trueup.errors import NotInstalledError, ServiceUnavailableError, TrueupError


def away() -> TrueupError:
    return ServiceUnavailableError("PostgreSQL", "here", "no connection")


def failing(*errors: TrueupError) -> tuple[Callable[[], int], list[int]]:
    """Return an operation that fails with these errors, one at a time, then succeeds; and its calls."""
    calls: list[int] = []
    left: Iterator[TrueupError] = iter(errors)

    def operation() -> int:
        calls.append(len(calls))
        for error in left:
            raise error
        return len(calls)

    return operation, calls


def passes(error: TrueupError) -> bool:
    return isinstance(error, ServiceUnavailableError)


def test_an_operation_whose_error_passes_is_retried_after_each_pause() -> None:
    operation, calls = failing(away(), away())
    assert retry(operation, passes, (0, 0)) == 3
    assert len(calls) == 3


def test_when_the_pauses_are_used_up_the_last_error_is_raised() -> None:
    operation, calls = failing(away(), away(), away())
    with pytest.raises(ServiceUnavailableError):
        retry(operation, passes, (0, 0))
    assert len(calls) == 3


def test_an_error_that_does_not_pass_is_raised_at_once() -> None:
    operation, calls = failing(NotInstalledError("no schema"))
    with pytest.raises(NotInstalledError):
        retry(operation, passes, (0, 0))
    assert len(calls) == 1


def test_pauses_grow_and_end_when_the_time_is_over() -> None:
    assert list(growing_pauses(0.05, 1.0, seconds=0)) == []
    pauses = growing_pauses(0.05, 0.1, seconds=60)
    first, second, third = (next(pauses) for _ in range(3))
    assert 0.025 <= first <= 0.05
    assert 0.0375 <= second <= 0.075
    assert 0.05 <= third <= 0.1
