"""The meaning of the driver's errors."""

import re
from importlib import resources

import pytest
from psycopg import OperationalError, errors
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.database.driver_errors import LOG_CHANGED, REFUSED, UNWATCHED, is_transient


def failed(error: Exception) -> DBAPIError:
    return DBAPIError("SELECT 1", {}, error)


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("the connection is lost"),
        errors.DeadlockDetected(),
        errors.AdminShutdown(),
        errors.QueryCanceled(),
        errors.LockNotAvailable(),
        errors.ReadOnlySqlTransaction(),
        errors.InternalError_("cache lookup failed for function 1"),
    ],
)
def test_an_error_after_which_a_retry_may_succeed_is_transient(error: Exception) -> None:
    assert is_transient(failed(error))


@pytest.mark.parametrize(
    "error",
    [
        errors.UndefinedTable(),
        errors.InsufficientPrivilege(),
        errors.ProgramLimitExceeded(),
        errors.ObjectNotInPrerequisiteState(),
        errors.InternalError_("unexpected chunk number"),
    ],
)
def test_an_error_after_which_each_retry_fails_is_not_transient(error: Exception) -> None:
    assert not is_transient(failed(error))


def test_errors_of_a_constraint_a_value_and_a_trigger_are_refusals() -> None:
    for refusal in (errors.CheckViolation, errors.NumericValueOutOfRange, errors.RaiseException):
        assert issubclass(refusal, REFUSED)
    assert not issubclass(errors.QueryCanceled, REFUSED)


def test_the_sql_functions_raise_the_sqlstates_of_this_module() -> None:
    sql = resources.files("trueup.install").joinpath("baseline.sql").read_text()
    assert set(re.findall(r"ERRCODE = '(\w+)'", sql)) == {UNWATCHED, LOG_CHANGED}


@pytest.mark.parametrize(("code", "transient"), [("57P99", True), ("53999", True), ("55P99", False), ("22P99", False)])
def test_a_code_that_psycopg_does_not_know_is_judged_by_its_class(
    connection: Connection, code: str, transient: bool
) -> None:
    with pytest.raises(DBAPIError) as raised:
        connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{code}'; END $$"))
    assert is_transient(raised.value) is transient
