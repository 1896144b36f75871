"""The meaning of the driver's errors, by psycopg's error classes, in one place."""

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
    errors.ReadOnlySqlTransaction,  # a standby, until the failover is over
    errors.IdleInTransactionSessionTimeout,
)
TRANSIENT = (*_CONNECTION, *DEADLOCK_OR_CONFLICT, *_RESOURCES, *_OPERATOR, *_SESSION)
# SQLSTATE classes of the same meaning, for codes for which this psycopg has no error class.
_TRANSIENT_CLASSES = ("08", "40", "53", "57")

# The database refuses a value: by its type, a constraint, or an exception that a trigger raises.
REFUSED = (DataError, IntegrityError, errors.WithCheckOptionViolation, errors.RaiseException)

# A function was replaced between its lookup and its call, or a prepared statement expects the old result type. The same
# statement succeeds on a connection that has not prepared it.
_REPLACED = (
    "cache lookup failed for ",
    "tuple concurrently ",
    "cached plan must not change result type",
    "could not open relation with OID",
)


def is_transient(error: DBAPIError) -> bool:
    """Return whether the same statement may succeed later: after a lost connection, a deadlock, a lock or a limit."""
    # psycopg raises a plain OperationalError if the server did not answer, and for codes that it does not know.
    unknown = type(error.orig) is OperationalError and (error.orig.sqlstate or "08").startswith(_TRANSIENT_CLASSES)
    return unknown or isinstance(error.orig, TRANSIENT) or is_replaced(error)


def is_replaced(error: DBAPIError) -> bool:
    """Return whether the statement failed because another session replaced a function or a table at that moment."""
    return isinstance(error.orig, errors.InternalError_ | errors.FeatureNotSupported) and any(
        known in str(error.orig) for known in _REPLACED
    )


def sqlstate_of(error: DBAPIError) -> str | None:
    """Return the server's SQLSTATE for the error; None if the server did not answer."""
    return getattr(error.orig, "sqlstate", None)


def reason_of(error: BaseException) -> str:
    """Return an error as one line without SQL, parameters or rows of the host, so that it may leave this machine."""
    return (str(error.orig) if isinstance(error, DBAPIError) else str(error)).strip().partition("\n")[0][:500]
