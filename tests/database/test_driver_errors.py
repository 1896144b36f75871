"""The meaning of the driver's errors."""

import re
from importlib import resources

import pytest
from psycopg import InternalError, OperationalError, errors
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.database.driver_errors import LOG_CHANGED, REFUSED, UNWATCHED, is_transient


def failed(error: Exception) -> DBAPIError:
    return DBAPIError("SELECT 1", {}, error)


# Every SQLSTATE about the connection, the transaction or the server: may the same statement succeed later?
SORTED_CODES = {
    True: (
        "08000 08001 08003 08004 08006 08007 08P01 25006 25P03 25P04 40000 40001 40002 40003 40P01 53000 53100 53200 "
        "53300 53400 55006 55P03 57000 57014 57P01 57P02 57P03 57P04 57P05 58000 58030"
    ),
    # A mistake of the caller, a state that stays, or a damaged server.
    False: ("25000 25001 25002 25003 25004 25005 25007 25008 25P01 25P02 55000 55P02 55P04 58P01 58P02 58P03"),
}
CODES = [(code, transient) for transient, codes in SORTED_CODES.items() for code in codes.split()]


@pytest.mark.parametrize(("code", "transient"), CODES)
def test_each_code_of_the_connection_the_transaction_and_the_server_is_sorted(code: str, transient: bool) -> None:
    try:
        error = errors.lookup(code)()
    except KeyError:  # an older psycopg
        error = InternalError()
        error.sqlstate = code
    assert is_transient(failed(error)) is transient


def test_no_code_of_these_classes_is_left_out() -> None:
    named = {kind.sqlstate for kind in vars(errors).values() if isinstance(getattr(kind, "sqlstate", None), str)}
    sorted_codes = {code for code, _ in CODES}
    classes = {code[:2] for code in sorted_codes}
    assert {code for code in named if code[:2] in classes} - {"25P04"} == sorted_codes - {"25P04"}


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (OperationalError("the connection is lost"), True),
        (errors.InternalError_("cache lookup failed for function 1"), True),
        (errors.InternalError_("unexpected chunk number"), False),
        (errors.UndefinedTable(), False),
        (errors.InsufficientPrivilege(), False),
        (errors.ProgramLimitExceeded(), False),
    ],
)
def test_other_errors_are_sorted_by_their_kind(error: Exception, transient: bool) -> None:
    assert is_transient(failed(error)) is transient


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
