from collections.abc import Iterator

import pytest

from tests.support.scripted import completion
from trueup.errors import ProviderError
from trueup.llm.model import Completion, CompletionStream


class Source:
    """Chunks that may end in an error, with a count of the calls of `finish`."""

    def __init__(self, *chunks: str, error: BaseException | None = None) -> None:
        self._chunks = chunks
        self._error = error
        self.given = ""
        self.finished = 0

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            self.given += chunk
            yield chunk
        if self._error:
            raise self._error

    def finish(self) -> Completion:
        self.finished += 1
        return completion(self.given)


def test_an_exhausted_stream_has_the_completion_of_all_its_chunks() -> None:
    source = Source("a", "", "b")
    stream = CompletionStream(source, source.finish)
    assert not stream.exhausted
    assert list(stream) == ["a", "b"]
    assert stream.exhausted
    assert source.finished == 1
    assert stream.completion().text == "ab"
    assert source.finished == 1
    assert list(stream) == []


def test_a_stream_closed_early_has_the_received_part_and_yields_no_more() -> None:
    source = Source("a", "b")
    with CompletionStream(source, source.finish) as stream:
        assert next(stream) == "a"
    stream.close()
    assert source.finished == 1
    assert not stream.exhausted
    assert list(stream) == []
    assert stream.completion().text == "a"


def test_reading_the_completion_ends_a_stream() -> None:
    source = Source("a", "b")
    stream = CompletionStream(source, source.finish)
    next(stream)
    assert stream.completion().text == "a"
    assert list(stream) == []


def test_a_stream_that_was_never_read_is_finished_too() -> None:
    source = Source("a")
    CompletionStream(source, source.finish).close()
    assert source.finished == 1


@pytest.mark.parametrize("error", [ProviderError("broke off"), SystemExit(1)], ids=repr)
def test_a_broken_stream_is_finished_before_its_error_is_raised(error: BaseException) -> None:
    source = Source("a", error=error)
    stream = CompletionStream(source, source.finish)
    assert next(stream) == "a"
    with pytest.raises(type(error)):
        next(stream)
    assert source.finished == 1
    assert not stream.exhausted
    assert stream.completion().text == "a"


def test_finish_is_called_again_only_if_it_raised() -> None:
    tries = iter([RuntimeError("no database"), None])
    asked = 0

    def finish() -> Completion:
        nonlocal asked
        asked += 1
        if error := next(tries):
            raise error
        return completion("a")

    stream = CompletionStream(["a"], finish)
    with pytest.raises(RuntimeError, match="no database"):
        list(stream)
    stream.close()
    stream.close()
    assert asked == 2
    assert stream.completion().text == "a"


def test_a_stream_can_wrap_another() -> None:
    source = Source("a", "b", error=ProviderError("broke off"))
    inner = CompletionStream(source, source.finish)
    charged = []

    def charge() -> Completion:
        charged.append((inner.completion(), inner.exhausted))
        return inner.completion()

    outer = CompletionStream(inner, charge)
    with pytest.raises(ProviderError), outer:
        list(outer)
    assert charged == [(completion("ab"), False)]
