"""The meaning of the driver's errors, by psycopg's error classes, in one place."""

import psycopg
from psycopg import DataError, IntegrityError, OperationalError, errors
from sqlalchemy.exc import DBAPIError

# trueup's own SQLSTATEs, which trueup.require_watched() and trueup.require_counted() raise.
UNWATCHED = "TU001"
LOG_CHANGED = "TU002"

# The server can't do the work now, though the same statement may succeed later.
_CONNECTION = (
    errors.ConnectionException,
    errors.SqlclientUnableToEstablishSqlconnection,
    errors.ConnectionDoesNotExist,
    errors.SqlserverRejectedEstablishmentOfSqlconnection,
    errors.ConnectionFailure,
    errors.TransactionResolutionUnknown,
    errors.ProtocolViolation,
)
# A conflict with other transactions: a deadlock, or on a standby, rows that the replay had to remove.
DEADLOCK_OR_CONFLICT = (
    errors.TransactionRollback,
    errors.SerializationFailure,
    errors.TransactionIntegrityConstraintViolation,
    errors.StatementCompletionUnknown,
    errors.DeadlockDetected,
)
_RESOURCES = (
    errors.InsufficientResources,
    errors.DiskFull,
    errors.OutOfMemory,
    errors.TooManyConnections,
    errors.ConfigurationLimitExceeded,
)
_OPERATOR = (
    errors.OperatorIntervention,
    errors.QueryCanceled,
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.DatabaseDropped,
    errors.IdleSessionTimeout,
)
_SESSION = (
    errors.LockNotAvailable,
    errors.ObjectInUse,
    errors.ReadOnlySqlTransaction,  # a standby, until the failover is over
    errors.IdleInTransactionSessionTimeout,
)
_STORAGE = (errors.SystemError, errors.IoError)
TRANSIENT = (*_CONNECTION, *DEADLOCK_OR_CONFLICT, *_RESOURCES, *_OPERATOR, *_SESSION, *_STORAGE)
# The same for codes that this psycopg has no class for: the SQLSTATE classes whose every code is transient, and
# transaction_timeout of PostgreSQL 17.
_TRANSIENT_CLASSES = ("08", "40", "53", "57")
_TRANSACTION_TIMEOUT = "25P04"

# The database refuses a value: by its type, a constraint, or an exception that a trigger raises.
REFUSED = (DataError, IntegrityError, errors.WithCheckOptionViolation, errors.RaiseException)

# A function was replaced between its lookup and its call, or a prepared statement expects the old result type. The same
# statement succeeds on a connection that has not prepared it. PostgreSQL does not translate internal errors.
_REPLACED = ("cache lookup failed for ", "tuple concurrently ", "could not open relation with OID")
# The functions of PostgreSQL's source that raise an error: they tell errors of one SQLSTATE apart in a server of any
# language, which their messages do not.
CHECK_PREPARED = "RevalidateCachedQuery"
FIND_OPERATOR = "op_error"
CHECK_ROW_SECURITY = "check_enable_rls"


def is_transient(error: DBAPIError) -> bool:
    """Return whether the same statement may succeed later: after a lost connection, a deadlock, a lock or a limit."""
    # psycopg raises a plain OperationalError if the server did not answer, and for codes that it does not know.
    unknown = type(error.orig) is OperationalError and (error.orig.sqlstate or "08").startswith(_TRANSIENT_CLASSES)
    timed_out = sqlstate_of(error) == _TRANSACTION_TIMEOUT
    return unknown or timed_out or isinstance(error.orig, TRANSIENT) or is_replaced(error)


def is_replaced(error: DBAPIError) -> bool:
    """Return whether the statement failed because another session replaced a function or a table at that moment."""
    if isinstance(error.orig, errors.FeatureNotSupported):
        return is_raised_by(error, CHECK_PREPARED)
    return isinstance(error.orig, errors.InternalError_) and any(known in str(error.orig) for known in _REPLACED)


def is_raised_by(error: DBAPIError, function: str) -> bool:
    """Return whether that function of the server's source raised the error."""
    return isinstance(error.orig, psycopg.Error) and error.orig.diag.source_function == function


def sqlstate_of(error: DBAPIError) -> str | None:
    """Return the server's SQLSTATE for the error; None if the server did not answer."""
    return getattr(error.orig, "sqlstate", None)


def reason_of(error: BaseException) -> str:
    """Return an error as one line without SQL, parameters or rows of the host, so that it may leave this machine."""
    return (str(error.orig) if isinstance(error, DBAPIError) else str(error)).strip().partition("\n")[0][:500]
