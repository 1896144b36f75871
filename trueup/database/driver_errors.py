"""What the driver's errors mean: by psycopg's class of each error, in one place."""

import psycopg
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

# The database refuses a value: its type, a constraint, or an exception of a trigger.
REFUSED = (DataError, IntegrityError, errors.WithCheckOptionViolation, errors.RaiseException)

# A function that was replaced between its lookup and its call, or a statement prepared for what it returned before. The
# same statement succeeds on a connection that has not prepared it. PostgreSQL does not translate internal errors.
_REPLACED = ("cache lookup failed for ", "tuple concurrently ", "could not open relation with OID")
# The functions of PostgreSQL's source that raise an error: they tell errors of one SQLSTATE apart in a server of any
# language, which their messages do not.
CHECK_PREPARED = "RevalidateCachedQuery"
FIND_OPERATOR = "op_error"
CHECK_ROW_SECURITY = "check_enable_rls"


def is_transient(error: DBAPIError) -> bool:
    """Return whether the same statement may succeed later: no connection, a deadlock, a lock or a limit."""
    # psycopg raises a plain OperationalError when the server did not answer, and for a code that it does not know.
    unknown = type(error.orig) is OperationalError and (error.orig.sqlstate or "08").startswith(_TRANSIENT_CLASSES)
    timed_out = sqlstate_of(error) == _TRANSACTION_TIMEOUT
    return unknown or timed_out or isinstance(error.orig, TRANSIENT) or is_replaced(error)


def is_replaced(error: DBAPIError) -> bool:
    """Return whether a statement met a function or a table that another session replaced just then."""
    if isinstance(error.orig, errors.FeatureNotSupported):
        return is_raised_by(error, CHECK_PREPARED)
    return isinstance(error.orig, errors.InternalError_) and any(known in str(error.orig) for known in _REPLACED)


def is_raised_by(error: DBAPIError, function: str) -> bool:
    """Return whether that function of the server's source raised the error."""
    return isinstance(error.orig, psycopg.Error) and error.orig.diag.source_function == function


def sqlstate_of(error: DBAPIError) -> str | None:
    """Return the server's code for the error; None: the server did not answer."""
    return getattr(error.orig, "sqlstate", None)


def reason_of(error: BaseException) -> str:
    """Return an error in one line that may leave this machine: no SQL, no parameters, no row of the host's."""
    return (str(error.orig) if isinstance(error, DBAPIError) else str(error)).strip().partition("\n")[0][:500]
