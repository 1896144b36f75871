"""Completions by a maker's own SDK. The transport under it caps and charges them; here the text is read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

import httpx2

from trueup.errors import SettingsError, TrueupError
from trueup.llm.calls import Bill
from trueup.llm.credentials import header_value
from trueup.llm.formats.wire_format import AnswerReader
from trueup.llm.model import Completion, CompletionStream, Message
from trueup.llm.output_cap import UNLIMITED
from trueup.llm.providers.failures import Failures, status_of
from trueup.llm.providers.paying_client import PayingClient, receipt_of
from trueup.llm.texts import without_lone_surrogates
from trueup.llm.transport.refusals import restored
from trueup.settings.model_keys import model_key
from trueup.settings.settings import PREFIX, Settings

NO_KEY = "none"  # for a server without keys; the SDKs require one

# Errors of reading an answer: it is not UTF-8, not JSON, not of the maker's form, or nested too deep.
_UNREADABLE = (ValueError, RecursionError)

Part = dict[str, Any]
"""A whole answer, or one event of a stream, as the server's JSON."""


_HIGH_SURROGATES = ("\ud800", "\udbff")


class NotAnAnswerError(ValueError):
    """A success whose body is no answer. Its argument is the body."""


class BrokenAnswerError(Exception):
    """The server had accepted the request when its answer broke off. `error`: the SDK's."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Maker(Protocol):
    """One maker's SDK, or another source of answers."""

    errors: tuple[type[Exception], ...]
    """The SDK's errors, without those of its HTTP client."""

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        """Buy one answer of at most `cap` tokens."""
        ...

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        """Buy one answer as a stream. Closing the generator closes the connection.

        Raises `NotAnAnswerError`, and `BrokenAnswerError` if the SDK's error does not tell that the request was served.
        """
        ...

    def reader(self) -> AnswerReader:
        """Return the wire format's reader of a stream."""
        ...

    def text_of(self, part: Part) -> str:
        """Return the text for the user, without reasoning."""
        ...

    def is_cut(self, part: Part) -> bool:
        """Return whether the part says that the answer was cut off at its cap."""
        ...


class SdkMaker(Maker, Protocol):
    """One maker's SDK."""

    url: str
    """The maker's own server. Always passed to the SDK, so that no variable can send the key to another one."""
    url_setting: str
    """The setting that names another server."""
    root: type[Exception] | None
    """The root class of the SDK's errors, as `PayingClient` takes it."""
    connection_errors: tuple[type[Exception], ...]
    """The SDK's errors around an error of its HTTP client."""

    def __init__(self, url: str, key: str, settings: Settings, http: PayingClient) -> None: ...


def sdk_provider(settings: Settings, make: type[SdkMaker]) -> "MakerProvider":
    """Return a provider over a maker's SDK, without connecting.

    Raises `SettingsError` if no key is set and the server is the maker's.
    """
    name, secret = model_key(settings)
    key = header_value(name, secret)
    server = getattr(settings, make.url_setting)
    url_name = f"{PREFIX}{make.url_setting.upper()}"
    if not key and not server:
        raise SettingsError(
            f"{name} is not set, and the provider {settings.model_provider} refuses calls without a key. Nothing "
            f"was spent. Set it for the workers and restart them, or set {url_name} for a server that needs no key."
        )
    url = (server or make.url).rstrip("/")
    http = PayingClient(root=make.root, answer_seconds=settings.model_timeout_seconds)
    failures = Failures(url, key, key_name=name, url_name=url_name, connection_errors=make.connection_errors)
    return MakerProvider(make(url, key or NO_KEY, settings, http), http, failures)


class MakerProvider:
    """A provider over a source of answers. Make one per process, because it keeps connections open."""

    def __init__(self, maker: Maker, http: PayingClient, failures: Failures) -> None:
        """`http`: the client that the maker sends its requests with."""
        self._maker = maker
        self._http = http
        self._failures = failures
        self._errors: tuple[type[Exception], ...] = (*maker.errors, httpx2.HTTPError)
        self._breaks: tuple[type[Exception], ...] = (*self._errors, *_UNREADABLE)

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Buy one completion of at most `max_completion_tokens` tokens; None: as many as the hold still covers.

        Raises `ProviderError`, and `HoldError` if the hold does not cover the call.
        """
        try:
            with restored():
                part = self._maker.whole(_sendable(messages), _cap(max_completion_tokens))
        except TrueupError:
            raise
        except _UNREADABLE as error:
            raise self._failures.no_completion(str(error)) from None
        except self._errors as error:
            raise self._failures.of(error) from None  # the SDK's text may quote part of the key
        answer = _Answer(self._maker, self._http.latest_response)
        answer.add(part)
        answer.end()
        if answer.bill is None:
            raise self._failures.no_completion(str(part))
        return answer.completion(answer.bill)

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Do as `complete`, in chunks. Returns once the answer has begun.

        Iterating raises `ProviderError` if the answer breaks. The usage is the provider's if the answer was complete;
        otherwise it is counted.
        """
        answer = _Answer(self._maker)
        events = self._maker.events(_sendable(messages), _cap(max_completion_tokens))
        chunks = self._chunks(answer, events)
        first = next(chunks)

        def finish() -> Completion:
            events.close()  # type: ignore[attr-defined]  # a generator
            if answer.bill is None:
                raise self._failures.broken_stream(None, begun=False)
            return answer.completion(answer.bill)

        return CompletionStream(chain((first,), chunks), finish)

    def _chunks(self, answer: "_Answer", events: Iterator[Part]) -> Iterator[str]:
        """Yield the text of each event. A break after the end of the answer is not an error."""
        broken: Exception | None = None
        is_accepted = False
        try:
            with restored():
                for event in events:
                    if answer.response is None:
                        answer.response = self._http.latest_response
                    text = answer.add(event)
                    if answer.reader.has_begun:
                        yield text
        except TrueupError:
            raise
        except NotAnAnswerError as error:
            raise self._failures.no_completion(str(error)) from None
        except BrokenAnswerError as error:
            broken, is_accepted = error.error, True
        except self._breaks as error:
            broken = error
        rest = answer.end()
        if answer.reader.is_complete or (broken is None and answer.ended_with_usage):
            yield rest
            return
        is_accepted |= answer.reader.has_begun
        if broken is not None and not is_accepted and self._is_before_answer(broken):
            raise self._failures.of(broken) from None
        raise self._failures.broken_stream(broken, begun=answer.reader.has_begun) from None

    def _is_before_answer(self, error: Exception) -> bool:
        return status_of(error) is not None or self._failures.is_of_connection(error)


def _sendable(messages: Sequence[Message]) -> list[Message]:
    return [replace(message, content=without_lone_surrogates(message.content)) for message in messages]


def system_and_rest(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """Return the system's text, empty if there is none, and the other messages: some makers take them apart."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    return system, [message for message in messages if message.role != "system"]


def _cap(wanted: int | None) -> int:
    """Return the cap to send. The transport lowers it to what the hold covers."""
    return UNLIMITED if wanted is None else wanted


class _Answer:
    """The received part of an answer: its text for the user, and whether it was cut off at its cap."""

    def __init__(self, maker: Maker, response: httpx2.Response | None = None) -> None:
        self.response = response  # of a stream: None until its first event
        self.reader = maker.reader()
        self._maker = maker
        self._is_cut = False
        self._texts: list[str] = []
        self._half = ""  # of a surrogate pair, whose other half the next part has

    @property
    def bill(self) -> Bill | None:
        """What the answer has cost. None: it is not charged, or not yet."""
        return None if self.response is None else receipt_of(self.response).bill

    @property
    def ended_with_usage(self) -> bool:
        """True if the server has reported the usage at the end. The transport hides that event of a stream."""
        if self.response is None:
            return False
        receipt = receipt_of(self.response)
        return receipt.bill is not None and receipt.bill.is_reported and receipt.is_complete

    def completion(self, bill: Bill) -> Completion:
        """Return the received part and what it has cost."""
        return Completion(
            text="".join(self._texts),
            prompt_tokens=bill.tokens.prompt,
            completion_tokens=bill.tokens.completion,
            total_tokens=bill.tokens.total,
            model_name=bill.model_name,
            response_time_ms=bill.response_time_ms,
            truncated=self._is_cut,
            usage_reported=bill.is_reported,
            tokens=bill.tokens.classes(),
        )

    def add(self, part: Part) -> str:
        """Add a part, and return its text."""
        self.reader.add(None, part)
        self._is_cut |= self._maker.is_cut(part)
        text, self._half = self._half + self._maker.text_of(part), ""
        if text and _HIGH_SURROGATES[0] <= text[-1] <= _HIGH_SURROGATES[1]:
            text, self._half = text[:-1], text[-1]
        return self._keep(text)

    def end(self) -> str:
        """Note that no part follows, and return the text that waited for one."""
        self.reader.end()
        rest, self._half = self._half, ""
        return self._keep(rest)

    def _keep(self, text: str) -> str:
        # Joins surrogate pairs. A lone surrogate has no UTF-8 form, so PostgreSQL could not store the answer.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        self._texts.append(text)
        return text
