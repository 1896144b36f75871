"""All errors that trueup raises. A message gives the cause, the consequence and the remedy."""

from typing import TypedDict


class TrueupError(Exception):
    """Root of all errors that trueup raises."""


class SettingsError(TrueupError):
    """A setting is missing, misspelt or malformed. Nothing was started."""


class MissingExtraError(TrueupError):
    """A feature needs packages that only an extra of trueup installs.

    `missing`: the modules that can't be imported. `otherwise`: a second remedy, as the end of a sentence; empty: none.
    """

    def __init__(
        self, feature: str, extra: str, missing: tuple[str, ...], consequence: str, otherwise: str = ""
    ) -> None:
        super().__init__(feature, extra, missing, consequence, otherwise)  # pickle needs the arguments

    def __str__(self) -> str:
        feature, extra, missing, consequence, otherwise = self.args
        other = f"; or {otherwise}" if otherwise else ""
        return (
            f"{feature} needs the extra [{extra}], which is not installed (no module {', '.join(missing)}). "
            f"{consequence} Install it: pip install 'trueup[{extra}]'{other}."
        )


class InvalidInputError(TrueupError, ValueError):
    """The caller's input is wrong. The message names the field and the remedy. Nothing was written."""


class ServiceUnavailableError(TrueupError):
    """A server that trueup needs does not answer. Nothing ran unmetered; a retry is safe."""

    def __init__(self, service: str, where: str, cause: str) -> None:
        self.service = service
        self.where = where
        self.cause = cause
        super().__init__(service, where, cause)  # pickle needs the arguments

    def __str__(self) -> str:
        return (
            f"{self.service} at {self.where} does not answer ({self.cause}). "
            "No AI task runs without it. Start the server, or correct its URL in the settings."
        )


class NotInstalledError(TrueupError):
    """The database has no trueup schema, or its schema was made for another mapping. Run `trueup db attach`."""


class GateClosedError(NotInstalledError):
    """The gate admits no task until `trueup db attach` has succeeded. Tasks are requeued until then."""


class HostChangedError(GateClosedError):
    """The host changed a table, a column or a trigger that trueup depends on. No task was run."""


class OldLayoutError(GateClosedError):
    """A version before the first release made trueup's tables in this database. Nothing was changed.

    `revision`: the layout's name in `trueup.alembic_version`. The message consists of `what` and `remedy`.
    """

    remedy = (
        "Run `trueup db detach` with the version that made the tables (--keep-history FILE keeps their history), then "
        "`trueup db attach` with this version."
    )

    def __init__(self, revision: str) -> None:
        self.revision = revision
        super().__init__(revision)  # pickle needs the argument

    @property
    def what(self) -> str:
        return (
            f"This database has trueup's tables in the layout of an earlier version (revision {self.revision}). This "
            "version can neither use nor upgrade them. Nothing was changed, and no AI task runs."
        )

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


class LogChangedError(GateClosedError):
    """The usage log's partitions or values changed. The change is recorded now; retry the operation."""


class MissingRightError(NotInstalledError):
    """The database role lacks a right that trueup needs. The message names the right and who can grant it."""


class NotFoundError(TrueupError):
    """What a person asked for by its number or id does not exist."""


class UnknownUserError(NotFoundError):
    """No subscription belongs to this user."""


class DenialPayload(TypedDict):
    """The specification's error body, as an HTTP 402 or a denied task carries it. Tokens are counts."""

    success: bool
    error: str
    error_code: str
    tokens_remaining: int
    original_tokens: int
    consumed_tokens: int
    days_remaining: int | None


class TokensDenied(TrueupError):  # noqa: N818 - an answer of the gate, not a fault
    """The gate denied the task. The work was not started and nothing was spent.

    `payload` is the specification's error body; `error_code` is one of its reason codes.
    """

    def __init__(self, payload: DenialPayload) -> None:
        self.payload = payload
        super().__init__(payload)

    @property
    def error_code(self) -> str:
        return self.payload["error_code"]

    def __str__(self) -> str:
        return f"{self.payload['error']} ({self.payload['error_code']})"


class TaskIdReusedError(TrueupError):
    """A task with this id and another request is running, waits for its retry or came later. Nothing was run."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(task_id)

    def __str__(self) -> str:
        return (
            f"The task id {self.task_id} is in use: a task with this id and other arguments, or of another name, is "
            "running, waits for its retry, or came after this one. Nothing was run or spent for this request now. Give "
            "each request its own task id, or send this one again when that task has ended."
        )


class ResultNotKeptError(TrueupError):
    """An earlier delivery has done the task's work, and neither its result nor its answers are kept."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(task_id)

    def __str__(self) -> str:
        return (
            f"An earlier delivery of task {self.task_id} has done its work. Its result is no longer stored, and the "
            "answers are not kept, so the result can't be made again. Nothing was spent. Send the work with a new task "
            "id, and set TRUEUP_STORE_ANSWERS=true to have answers kept."
        )


class HoldError(TrueupError):
    """The hold does not allow this model call. The call spent nothing."""


class OutOfMemoryError(TrueupError):
    """A task's body ran out of memory. The task fails; its paid calls are recorded."""

    def __init__(self, task: str) -> None:
        self.task = task
        super().__init__(task)

    def __str__(self) -> str:
        return (
            f"The body of task {self.task} ran out of memory. The task has failed; its paid calls are charged and its "
            "hold is released. Give the worker more memory, or lower its concurrency."
        )


class NoHoldError(HoldError):
    """The model was called outside a metered task, so there is no hold to spend from."""


class HoldExhaustedError(HoldError):
    """The tokens left in the hold do not cover the prompt and one token of output."""


class UnboundedCallError(HoldError):
    """What a call may cost can't be told from its request, so no hold can cover it.

    `cause`: what can't be told, as the beginning of a sentence. `remedy`: a sentence. `is_countable`: the provider's
    own counter of tokens can tell, if it has one.
    """

    def __init__(self, cause: str, remedy: str, is_countable: bool = False) -> None:
        self.cause = cause
        self.remedy = remedy
        self.is_countable = is_countable
        super().__init__(cause, remedy, is_countable)

    def __str__(self) -> str:
        return f"What this call may cost is not known: {self.cause}. Nothing was spent. {self.remedy}"


class UnmeteredCallError(HoldError):
    """A client made a request that may cost money and whose usage trueup can't read."""

    def __init__(self, method: str, url: str) -> None:
        self.method = method
        self.url = url
        super().__init__(method, url)

    def __str__(self) -> str:
        return (
            f"{self.method} {self.url} may cost tokens, and trueup knows no way to cap and record them. Nothing was "
            "sent. If the call is free or is recorded elsewhere, name its path: http_client(allow=[…])."
        )


class HoldBusyError(HoldError):
    """Another attempt of this task holds the lease, so this one is a duplicate. It may retry in `seconds`.

    `redundant`: another duplicate waits already, so this one can be dropped. `waits`: the count to requeue it with.
    """

    def __init__(self, task_id: str, seconds: float, *, redundant: bool = False, waits: int = 1) -> None:
        self.task_id = task_id
        self.seconds = seconds
        self.redundant = redundant
        self.waits = waits
        super().__init__(task_id, seconds)

    def __str__(self) -> str:
        return f"another attempt of task {self.task_id} is running; this one retries in {self.seconds:.0f} s"


class HoldOvertakenError(HoldError):
    """This attempt's hold has ended or belongs to a later attempt. This attempt may not spend any more."""

    def __init__(self, task_id: str, attempt: int) -> None:
        self.task_id = task_id
        self.attempt = attempt
        super().__init__(task_id, attempt)

    def __str__(self) -> str:
        return (
            f"attempt {self.attempt} of task {self.task_id} has lost its hold: its lease ended and a later attempt "
            "took over, or the hold expired. This attempt spends nothing more."
        )


class HoldLifetimeError(HoldError):
    """A task has lost its hold in attempt after attempt. It was not started again."""

    def __init__(self, task_id: str, attempts: int, ttl_seconds: int, max_seconds: int) -> None:
        self.task_id = task_id
        self.attempts = attempts
        self.ttl_seconds = ttl_seconds
        self.max_seconds = max_seconds
        super().__init__(task_id, attempts, ttl_seconds, max_seconds)

    def __str__(self) -> str:
        return (
            f"Task {self.task_id} has lost its hold in {self.attempts} attempts: its body works longer between "
            f"two model calls than a hold lives ({self.ttl_seconds} s without a heartbeat, {self.max_seconds} s with "
            "it). Its paid calls stay charged, and nothing more is spent. Raise TRUEUP_HOLD_MAX_SECONDS for bodies "
            "that work longer, or TRUEUP_HOLD_TTL_SECONDS where the worker's pool leaves no time for the heartbeat."
        )


class ProviderError(TrueupError):
    """The model provider failed, or its answer is unusable.

    `retryable`: the same request may succeed later. `outcome_unknown`: the provider may have served and billed the
    request, but its usage is unknown (a timeout, a broken connection, a success without a completion). It is False when
    the request was never sent, and for an error status: trueup assumes that providers bill nothing for 4xx and 5xx.
    """

    def __init__(self, message: str, *, retryable: bool = False, outcome_unknown: bool = False) -> None:
        self.message = message
        self.retryable = retryable
        self.outcome_unknown = outcome_unknown
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _provider_error, (type(self), self.message, self.retryable, self.outcome_unknown)


class AnswerFormatError(ProviderError):
    """The model's answer does not have the requested format. Its tokens are still charged."""


def _provider_error(
    kind: type[ProviderError], message: str, retryable: bool, outcome_unknown: bool = False
) -> ProviderError:
    return kind(message, retryable=retryable, outcome_unknown=outcome_unknown)


def hidden_in(error: BaseException, kinds: tuple[type[TrueupError], ...]) -> TrueupError | None:
    """Return the error of these kinds from which another one was made, by its cause or context; None: there is none."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        if isinstance(found, kinds):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None
