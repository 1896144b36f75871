"""What the driver's errors mean: by psycopg's class of each error, in one place."""

from psycopg import DataError, IntegrityError, OperationalError, errors
from sqlalchemy.exc import DBAPIError

# trueup's own SQLSTATEs: raised by trueup.require_watched() and trueup.require_counted().
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
# Other transactions stood in the way: a deadlock; on a standby, rows that the replay had to remove.
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
# SQLSTATE classes of the same meaning, for a code that this psycopg has no class of its own for.
_TRANSIENT_CLASSES = ("08", "40", "53", "57")

# The database refuses a value: its type, a constraint, or an exception of a trigger.
REFUSED = (DataError, IntegrityError, errors.WithCheckOptionViolation, errors.RaiseException)

# A function that was replaced between its lookup and its call, or a statement prepared for what it returned before. The
# same statement succeeds on a connection that has not prepared it.
_REPLACED = (
    "cache lookup failed for ",
    "tuple concurrently ",
    "cached plan must not change result type",
    "could not open relation with OID",
)


def is_transient(error: DBAPIError) -> bool:
    """Return whether the same statement may succeed later: no connection, a deadlock, a lock or a limit."""
    # psycopg raises a plain OperationalError when the server did not answer, and for a code that it does not know.
    unknown = type(error.orig) is OperationalError and (error.orig.sqlstate or "08").startswith(_TRANSIENT_CLASSES)
    return unknown or isinstance(error.orig, TRANSIENT) or is_replaced(error)


def is_replaced(error: DBAPIError) -> bool:
    """Return whether a statement met a function or a table that another session replaced just then."""
    return isinstance(error.orig, errors.InternalError_ | errors.FeatureNotSupported) and any(
        known in str(error.orig) for known in _REPLACED
    )


def sqlstate_of(error: DBAPIError) -> str | None:
    """Return the server's code for the error; None: the server did not answer."""
    return getattr(error.orig, "sqlstate", None)


def reason_of(error: BaseException) -> str:
    """Return an error in one line that may leave this machine: no SQL, no parameters, no row of the host's."""
    return (str(error.orig) if isinstance(error, DBAPIError) else str(error)).strip().partition("\n")[0][:500]
