"""One request of an SDK as a call of the running hold: admitted, rewritten under its cap, and charged once."""

import json
import threading
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from trueup.errors import UnboundedCallError, UnmeteredCallError
from trueup.llm.bounds import ClassCounter, bounding_counter, learn, learns, likely_counter
from trueup.llm.calls import Bill, Call, begin, charge, end_without_usage, fingerprint_of
from trueup.llm.formats.reading import object_of, parsed
from trueup.llm.formats.registry import format_of, is_free, normal_path
from trueup.llm.formats.usage import TokenUsage, split_usage
from trueup.llm.formats.wire_format import AnswerReader, Count, Sent, WireFormat
from trueup.llm.outcomes import may_be_billed
from trueup.llm.output_cap import Demand
from trueup.llm.running import RunningHold, running_now, running_or_refuse
from trueup.llm.tokens import TokenCounter
from trueup.llm.traced_calls import Operation
from trueup.llm.weights import weighted
from trueup.settings.settings import get_settings

# A caller's bound for images, audio and files, on one request. It is not sent on.
MEDIA_HEADER = "trueup-prompt-tokens"
REPLAYED_HEADER = "trueup-replayed"

# The makers call their counts estimates: a hundredth is added, and a few tokens.
_COUNT_MARGIN, _LEAST_MARGIN = 100, 16

# A longer answer is stored compressed: the events of a stream repeat themselves, and shrink to a tenth.
_PLAIN_BYTES = 4_096

_usage_refusers: set[tuple[str, str]] = set()  # hosts and models that refuse to report a stream's usage


def forget_usage_refusers() -> None:
    """Ask each server again to report a stream's usage."""
    _usage_refusers.clear()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request that costs tokens, and the hold that it will spend from."""

    running: RunningHold
    format: WireFormat
    sent: Sent
    ask: Callable[[Count], int | None]
    """Asks the provider's own counter for the tokens of a prompt. None: it gave no count."""

    def begin(self) -> "Purchase":
        """Return the admitted call, or a paid one. Raises `HoldError` if the hold does not cover it."""
        sent = self.sent
        model = self.format.model_of(sent)
        settings = get_settings()
        call = begin(
            self.running,
            fingerprint_of([sent.host, sent.path, self.format.capped(sent, 0, adds_usage=False)]),
            lambda: weighted(self._demand(bounding_counter(model, settings)), model, settings),
            settings,
            Operation.of_request(self.format.name, sent.host, model),
        )
        return Purchase(call, self.format, sent, model)

    def _demand(self, counter: TokenCounter) -> Demand:
        """Return what the call may cost. What the request does not tell is asked of the provider's own counter."""
        try:
            return self.format.demand(self.sent, counter)
        except UnboundedCallError as error:
            count = self.format.count_request(self.sent) if error.is_countable else None
            tokens = self.ask(count) if count is not None else None
            if tokens is None:
                raise
        known = self.format.demand(replace(self.sent, media_tokens=0), counter)
        return replace(known, prompt_tokens=tokens + tokens // _COUNT_MARGIN + _LEAST_MARGIN)


class Meter:
    """Decides which requests of one client are metered.

    `made_in`: the hold in which the client was made; None: each of its calls must find one.
    """

    def __init__(
        self, allow: Sequence[str] = (), prompt_tokens: int | None = None, *, made_in: RunningHold | None = None
    ) -> None:
        self._allowed = tuple(normal_path(path) for path in allow)
        self._media_tokens = prompt_tokens
        self._made_in = made_in

    def plan(
        self, method: str, url: Any, headers: Any, content: bytes, ask: Callable[[Count], int | None]
    ) -> Planned | None:
        """Return the metered request; None: it is free or allowed. `ask`: as in `Planned`.

        Raises `UnmeteredCallError` for a request that may cost tokens and that no format describes, `NoHoldError`
        where no tokens are held.
        """
        path = normal_path(url.path)
        method = headers.get("x-http-method-override") or method
        if is_free(method, path) or (self._allowed and path.endswith(self._allowed)):
            return None
        known = format_of(path)
        body = parsed(content) if known is not None else None
        if known is None or not isinstance(body, dict):
            raise UnmeteredCallError(method, f"{url.scheme}://{url.host}{url.path}")
        sent = Sent(host=url.host.lower(), path=path, body=body, media_tokens=self._media(headers))
        return Planned(running=self._running(), format=known, sent=sent, ask=ask)

    def _running(self) -> RunningHold:
        made_in = self._made_in
        if running_now() is None and made_in is not None:
            made_in.refuse_if_over()
            return made_in
        return running_or_refuse()

    def _media(self, headers: Any) -> int | None:
        given = headers.get(MEDIA_HEADER)
        if given is None:
            return self._media_tokens
        if not given.isdecimal():
            raise UnboundedCallError(f"the header {MEDIA_HEADER} is {given!r:.40}", "Give a count of tokens.")
        return int(given)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The state of an answer. `bill` None: it is not charged, or not yet. `is_complete`: its end was received."""

    bill: Bill | None
    is_complete: bool = True


class Purchase:
    """An admitted call, from its request to its charge. `settle` and `fail` act once, whatever comes first."""

    def __init__(self, call: Call, known: WireFormat, sent: Sent, model: str) -> None:
        self.call = call
        self._format = known
        self._sent = sent
        self._model = model
        self._host_and_model = (sent.host, model)
        self.adds_usage = known.adds_usage(sent) and self._host_and_model not in _usage_refusers
        self.is_stream = known.is_stream(sent)
        self.reader: AnswerReader = known.reader(sent)
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._usage_refused = False
        self._bill: Bill | None = None
        self.is_settled = False

    def receipt(self) -> Receipt:
        """Return the state of the answer now."""
        return Receipt(bill=self._bill, is_complete=self.reader.is_complete)

    def content(self, original: bytes, headers: Any) -> bytes:
        """Return the body to send. Raises `UnboundedCallError` if it is signed and would have to change."""
        body = self._format.capped(self._sent, self.call.limit, adds_usage=self.adds_usage)
        if body is self._sent.body:
            return original
        if headers.get("authorization", "").startswith("AWS4-HMAC"):
            self.fail(unknown=False)
            raise UnboundedCallError(
                "its body is signed, so the cap on the answer can't be written into it",
                "Set the answer's cap in the request, low enough for the task's estimate.",
            )
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    def refuses_usage(self, status: int, raw: bytes) -> bool:
        """Return whether the server may have refused the option that was added: the request is then sent without it.

        A refusal is free. It names the option or no parameter at all.
        """
        if not self.adds_usage or status not in (400, 422):
            return False
        error = object_of(object_of(parsed(raw)).get("error"))
        if b"stream_options" not in raw and (error.get("code") or error.get("param")):
            return False
        self.adds_usage = False
        # A refusal without a reason may be of this request alone: the next stream asks again.
        self._usage_refused = b"stream_options" in raw
        return True

    def fail(self, *, unknown: bool, error_type: str = "_OTHER") -> None:
        """Record that the call has no answer. `unknown`: it may have been billed. `error_type`: for traces."""
        with self._lock:
            if not self.is_settled:
                self.is_settled = True
                end_without_usage(self.call, unknown=unknown, error_type=error_type)

    def answer(self, status: int, content_type: str, decoded: bytes) -> None:
        """Charge a whole answer, or record that it cost nothing."""
        data = parsed(decoded)
        for part in data if isinstance(data, list) else [data]:
            self.reader.add(None, part)
        self.reader.end()
        if status >= 400 and self.reader.usage is None:
            self.fail(unknown=may_be_billed(status), error_type=str(status))
        elif status < 400 and not self.reader.has_begun:
            self.fail(unknown=status < 300)  # a redirect costs nothing; another success is no answer that we know
        else:
            self.settle(stored(status, content_type, decoded))

    def settle(self, answer: dict[str, Any] | None = None) -> None:
        """Charge what the answer reports, or an estimate of what was received. `answer`: to store for a replay."""
        with self._lock:
            if self.is_settled:
                return
            usage = self.reader.usage
            bill = Bill(
                tokens=usage or self._estimate(),
                is_reported=usage is not None,
                model_asked=self._model,
                model_name=self.reader.model_name or self._model,
                response_time_ms=round((time.monotonic() - self._started) * 1000),
            )
            kept = None if answer is None else answer | {"bill": bill.as_json()}
            charge(self.call, bill, get_settings(), answer=kept)
            self._bill, self.is_settled = bill, True
            if self._usage_refused:
                _usage_refusers.add(self._host_and_model)
            if usage is not None:
                self._learn(usage)

    def _learn(self, usage: TokenUsage) -> None:
        """Learn what a prompt of this kind costs, if all of it is text."""
        if not learns(self._model, get_settings()) or self._sent.media_tokens is not None:
            return
        counter = ClassCounter()
        with suppress(UnboundedCallError):  # it has parts that are no text
            self._format.demand(self._sent, counter)
            learn(self._model, counter.sizes, usage.prompt)

    def _estimate(self) -> TokenUsage:
        """Return what the received part has probably cost: at most what was asked for."""
        counter = likely_counter(self._model, get_settings())
        prompt = self.reader.prompt_tokens
        # Parts that could not be counted here were counted by the provider, or bounded by the caller.
        demand = self._format.demand(replace(self._sent, media_tokens=self._sent.media_tokens or 0), counter)
        if prompt is None:
            prompt = demand.prompt_tokens
        output = max(self.reader.events, counter.count("".join(self.reader.texts)))
        return split_usage(prompt=prompt, completion=min(output, demand.choices * (self.call.limit + demand.beside)))


def stored(status: int, content_type: str, body: bytes) -> dict[str, Any] | None:
    """Return an answer as it is stored; None if it is short and no text."""
    head: dict[str, Any] = {"status": status, "content_type": content_type}
    if len(body) > _PLAIN_BYTES:
        return head | {"deflated": b64encode(zlib.compress(body)).decode()}
    try:
        return head | {"body": body.decode()}
    except UnicodeDecodeError:
        return None


def stored_body(answer: dict[str, Any]) -> bytes:
    """Return the body of a stored answer."""
    if "deflated" in answer:
        return zlib.decompress(b64decode(answer["deflated"]))
    return str(answer["body"]).encode()
