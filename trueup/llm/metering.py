"""The metered model client. It spends only from the running task's hold, and charges every call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property

from trueup.database.retry import once
from trueup.errors import ProviderError
from trueup.gate.provider_calls import extend_hold
from trueup.llm.awaitable import AwaitableModel, InFlight
from trueup.llm.bounds import ClassCounter, bounding_counter, learn, learns
from trueup.llm.calls import Bill, Call, begin, charge, end_without_usage, fingerprint_of
from trueup.llm.formats.usage import TokenUsage, split_usage
from trueup.llm.model import Completion, CompletionStream, Message, Provider
from trueup.llm.output_cap import Demand
from trueup.llm.running import RunningHold, running_or_refuse
from trueup.llm.tokens import count_prompt_tokens
from trueup.llm.traced_calls import Operation
from trueup.llm.weights import weighted
from trueup.settings.settings import Settings


class MeteredModel(AwaitableModel):
    """A `Model` that asks a provider for at most the tokens that the hold covers, and charges the real usage.

    A redelivered task repeats its calls, in any order. Calls already paid for are replayed from their charges.
    `make_provider` is called on first use.
    """

    def __init__(self, make_provider: Callable[[], Provider], settings: Settings) -> None:
        self._make_provider = make_provider
        self._settings = settings

    @cached_property
    def provider(self) -> Provider:
        """The provider, made on first use, because a task that calls no model needs none.

        Raises `SettingsError` as `make_provider` does. A task reads this before it holds tokens, to fail early.
        """
        return self._make_provider()

    @property
    def tokens_left(self) -> int:
        """Tokens that the running task may still spend. Raises `NoHoldError` outside a metered task."""
        return running_or_refuse().tokens_left

    def in_flight(self) -> InFlight:
        """Return the calls in threads of the running hold. Raises `NoHoldError` outside a metered task."""
        return running_or_refuse().in_flight

    def extend(self, tokens: int) -> bool:
        """Add `tokens` to the running task's hold. Returns False if the budget denies it; the hold is then unchanged.

        Raises `NoHoldError` outside a metered task, `HoldOvertakenError` if another attempt has the hold.
        """
        running = running_or_refuse()
        reason, running.tokens_left = once(lambda connection: extend_hold(connection, running.hold, tokens))
        return reason is None

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        """Return one completion, charged to the running task's hold.

        `max_completion_tokens`: None means as many as the hold still covers.
        Raises `NoHoldError` outside a metered task, `HoldExhaustedError` if the hold does not cover the prompt and
        one token of the answer, `HoldOvertakenError` if a later attempt has the hold, `ProviderError` if the provider
        fails, `ServiceUnavailableError` if the database can't record the call intent or the usage.
        """
        running = running_or_refuse()
        with running.calling():
            call = self._begin(running, messages, max_completion_tokens)
            if call.paid is not None:
                return Completion(**call.paid)
            with _noted_failure(call):
                completion = self.provider.complete(messages, max_completion_tokens=call.limit)
            self._charge(call, messages, completion)
            return completion

    def stream(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> CompletionStream:
        """Return one completion in chunks, charged when the stream ends, breaks or is closed early.

        `max_completion_tokens` and errors are as in `complete`. Iterating raises `ProviderError` if the stream breaks,
        after the received part was charged.
        """
        running = running_or_refuse()
        with running.calling():
            return self._stream(running, messages, max_completion_tokens)

    def _stream(
        self, running: RunningHold, messages: Sequence[Message], max_completion_tokens: int | None
    ) -> CompletionStream:
        call = self._begin(running, messages, max_completion_tokens)
        if call.paid is not None:
            paid = Completion(**call.paid)
            return CompletionStream([paid.text], lambda: paid)
        with _noted_failure(call):
            source = self.provider.stream(messages, max_completion_tokens=call.limit)

        def finish() -> Completion:
            completion = source.completion()
            # A stream that broke or was closed early is incomplete, so it must not be replayed as the whole answer.
            self._charge(call, messages, completion, keep_answer=source.exhausted)
            call.running.remove_stream(stream)
            return completion

        stream = CompletionStream(source, finish)
        call.running.add_stream(stream)
        return stream

    def _begin(self, running: RunningHold, messages: Sequence[Message], max_completion_tokens: int | None) -> Call:
        """Return the call's paid answer, or admit the call and record its intent."""
        return begin(
            running,
            call_fingerprint(self._settings.model_name, messages),
            lambda: weighted(
                Demand(prompt_tokens=self._prompt_tokens(messages), wanted=max_completion_tokens),
                self._settings.model_name,
                self._settings,
            ),
            self._settings,
            Operation.of_settings(self._settings),
        )

    def _prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return what the prompt costs at most: by the provider's counter, or less by what was learned."""
        name, most = self._settings.model_name, self.provider.count_prompt_tokens(messages)
        if not learns(name, self._settings):
            return most
        return min(most, count_prompt_tokens(messages, bounding_counter(name, self._settings)))

    def _charge(
        self, call: Call, messages: Sequence[Message], completion: Completion, *, keep_answer: bool = True
    ) -> None:
        charge(
            call,
            _bill(completion, self._settings),
            self._settings,
            answer=asdict(completion) if keep_answer else None,
        )
        if completion.usage_reported and learns(self._settings.model_name, self._settings):
            sizes = ClassCounter()
            count_prompt_tokens(messages, sizes)
            learn(self._settings.model_name, sizes.sizes, completion.prompt_tokens)


@contextmanager
def _noted_failure(call: Call) -> Iterator[None]:
    """Record the outcome of a call that failed without usage. After any other end, such as a kill, it stays started."""
    try:
        yield
    except ProviderError as error:
        end_without_usage(call, unknown=error.outcome_unknown, error_type=type(error).__name__)
        raise


def call_fingerprint(model_name: str, messages: Sequence[Message]) -> str:
    """Return the fingerprint of a chat call."""
    return fingerprint_of([model_name, *([message.role, message.content] for message in messages)])


def _bill(completion: Completion, settings: Settings) -> Bill:
    prompt, tokens = completion.prompt_tokens, completion.tokens
    known = TokenUsage(prompt=prompt, **tokens) if tokens else None
    counted = split_usage(prompt=prompt, completion=completion.completion_tokens)
    return Bill(
        tokens=known or counted.at_least(completion.total_tokens),
        is_reported=completion.usage_reported,
        model_asked=settings.model_name,
        model_name=completion.model_name,
        response_time_ms=completion.response_time_ms,
    )
