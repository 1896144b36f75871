"""Every error trueup raises: one root, and messages that give cause, consequence and remedy."""

from typing import TypedDict


class TrueupError(Exception):
    """Root of all errors raised by trueup."""


class SettingsError(TrueupError):
    """A setting is missing, misspelt or malformed. Nothing was started."""


class MissingExtraError(TrueupError):
    """A feature needs packages that only an extra of trueup installs.

    `missing`: the modules that can't be imported. `otherwise`: a remedy beside installing the extra; empty: none.
    """

    def __init__(
        self, feature: str, extra: str, missing: tuple[str, ...], consequence: str, otherwise: str = ""
    ) -> None:
        self.feature = feature
        self.extra = extra
        self.missing = tuple(missing)
        self.consequence = consequence
        self.otherwise = otherwise
        super().__init__(feature, extra, self.missing, consequence, otherwise)  # the arguments, so that it pickles

    def __str__(self) -> str:
        other = f"; or {self.otherwise}" if self.otherwise else ""
        return (
            f"{self.feature} needs the extra [{self.extra}], which is not installed (no module "
            f"{', '.join(self.missing)}). {self.consequence} Install it: pip install 'trueup[{self.extra}]'{other}."
        )


class InvalidInputError(TrueupError, ValueError):
    """Input from outside is wrong; the message names the field and the remedy. Nothing was written."""


class ServiceUnavailableError(TrueupError):
    """A server trueup needs does not answer. Nothing ran unmetered; trying again is safe."""

    def __init__(self, service: str, where: str, cause: str) -> None:
        self.service = service
        self.where = where
        self.cause = cause
        super().__init__(service, where, cause)  # the arguments, so that the error pickles

    def __str__(self) -> str:
        return (
            f"{self.service} at {self.where} does not answer ({self.cause}). "
            "No AI work is done without it. Start the server, or correct its URL in the settings."
        )


class NotInstalledError(TrueupError):
    """The database lacks trueup's schema, or has one made for another mapping. Run `trueup db init`."""


class GateClosedError(NotInstalledError):
    """The gate admits nobody until `trueup db attach` is through. Tasks wait for it: what they need may come back."""


class HostChangedError(GateClosedError):
    """The host has changed what trueup reads or counts by: a table, a column, a trigger. Nothing was run."""


class OldLayoutError(GateClosedError):
    """The database has trueup's tables in the layout of a version before the first release. Nothing was changed.

    `revision`: the layout's name in `trueup.alembic_version`. `what` and `remedy` are the two parts of the message.
    """

    remedy = (
        "Run `trueup db detach` with the version that made the tables (--keep-history FILE keeps their history), then "
        "`trueup db attach` with this version."
    )

    def __init__(self, revision: str) -> None:
        self.revision = revision
        super().__init__(revision)  # the argument, so that the error pickles

    @property
    def what(self) -> str:
        return (
            f"This database has trueup's tables in the layout of an earlier version (revision {self.revision}). This "
            "version can neither use nor upgrade them. Nothing was changed, and no AI task runs."
        )

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}"


class LogChangedError(GateClosedError):
    """Partitions of the log came or went, or its values may be others. Noted by now: who asks again is answered."""


class MissingRightError(NotInstalledError):
    """The database role may not do what trueup needs. The message names the right, and who gives it."""


class UnknownUserError(TrueupError):
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
    """The gate said no: the work was not started and nothing was spent.

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
    """A task with this id and another request is running or waits for its retry. Nothing was run for this request."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        super().__init__(task_id)

    def __str__(self) -> str:
        return (
            f"The task id {self.task_id} is in use: a task with this id and other arguments, or of another name, is "
            "running or waits for its retry. Nothing was run or spent for this request. Give each request its own task "
            "id, or send this one again when that task has ended."
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
    """A model call that its hold does not allow. Nothing was spent by this call."""


class NoHoldError(HoldError):
    """A model call outside a metered task: there is no hold to spend from."""


class HoldExhaustedError(HoldError):
    """What is left of the hold does not cover the prompt and one token of answer."""


class HoldBusyError(HoldError):
    """Another attempt of this task is at work, so this one is a duplicate. It may ask again in `seconds`.

    `redundant`: another duplicate waits already, so this one need not. `waits`: the number to come back with.
    """

    def __init__(self, task_id: str, seconds: float, *, redundant: bool = False, waits: int = 1) -> None:
        self.task_id = task_id
        self.seconds = seconds
        self.redundant = redundant
        self.waits = waits
        super().__init__(task_id, seconds)

    def __str__(self) -> str:
        return f"another attempt of task {self.task_id} is at work; this one asks again in {self.seconds:.0f} s"


class HoldOvertakenError(HoldError):
    """This attempt's hold has ended, or a later attempt of its task has it. It may not spend any more."""

    def __init__(self, task_id: str, attempt: int) -> None:
        self.task_id = task_id
        self.attempt = attempt
        super().__init__(task_id, attempt)

    def __str__(self) -> str:
        return (
            f"attempt {self.attempt} of task {self.task_id} has lost its hold: it took longer than its lease and a "
            "later attempt goes on, or its time ran out. Nothing more is spent by this one."
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
            f"Task {self.task_id} has lost its hold in each of {self.attempts} attempts: its body works longer between "
            f"two model calls than a hold lives ({self.ttl_seconds} s without a heartbeat, {self.max_seconds} s with "
            "one). What it paid for stays charged, and nothing more is spent. Raise TRUEUP_HOLD_MAX_SECONDS for bodies "
            "that work longer, or TRUEUP_HOLD_TTL_SECONDS where the worker's pool leaves no time for the heartbeat."
        )


class ProviderError(TrueupError):
    """The model provider failed, or answered with something unusable.

    `retryable` says whether the same request may succeed later. `outcome_unknown` says whether it may have been served
    and billed although no usage is known: no answer in time, a broken connection, a success that is no completion.
    It is False when the request never left, and when an error status came back: providers bill nothing for 4xx and
    5xx answers, which is taken for granted here.
    """

    def __init__(self, message: str, *, retryable: bool = False, outcome_unknown: bool = False) -> None:
        self.message = message
        self.retryable = retryable
        self.outcome_unknown = outcome_unknown
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        return _provider_error, (type(self), self.message, self.retryable, self.outcome_unknown)


class AnswerFormatError(ProviderError):
    """The model's answer is not in the shape that was asked for. Its tokens are charged all the same."""


def _provider_error(
    kind: type[ProviderError], message: str, retryable: bool, outcome_unknown: bool = False
) -> ProviderError:
    return kind(message, retryable=retryable, outcome_unknown=outcome_unknown)
