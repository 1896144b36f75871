"""OpenAI Embeddings, and the same format of compatible servers."""

from trueup.errors import UnboundedCallError
from trueup.llm.formats.reader import Reader
from trueup.llm.formats.reading import count_of, first_count, list_of, object_of
from trueup.llm.formats.usage import split_usage
from trueup.llm.formats.wire_format import AnswerReader, Body, BodyFormat, Count, Sent
from trueup.llm.output_cap import Demand
from trueup.llm.tokens import TokenCounter

# What a model puts around a text: a mark at each end.
_PER_INPUT = 2


class Embeddings(BodyFormat):
    """POST …/embeddings"""

    name = "openai embeddings"

    def is_stream(self, sent: Sent) -> bool:
        return False

    def demand(self, sent: Sent, counter: TokenCounter) -> Demand:
        given = sent.body.get("input")
        texts = given if isinstance(given, list) and not all(isinstance(item, int) for item in given) else [given]
        return Demand(prompt_tokens=sum(_PER_INPUT + _tokens_of(text, counter) for text in texts), choices=0)

    def count_request(self, sent: Sent) -> Count | None:
        return None

    def capped(self, sent: Sent, limit: int, *, adds_usage: bool) -> Body:
        return sent.body

    def adds_usage(self, sent: Sent) -> bool:
        return False

    def reader(self, sent: Sent) -> AnswerReader:
        return EmbeddingsReader()


def _tokens_of(given: object, counter: TokenCounter) -> int:
    if isinstance(given, str):
        return counter.count(given)
    if isinstance(given, list):  # the client has made the tokens itself
        return len(given)
    raise UnboundedCallError(
        f"its input is {type(given).__name__}, neither text nor tokens", "Send texts, or name the path in `allow`."
    )


class EmbeddingsReader(Reader):
    """Reads the usage of embeddings."""

    def add(self, event: str | None, data: object) -> bool:
        body = object_of(data)
        self._note_model(body.get("model"))
        self.has_begun |= bool(list_of(body.get("data"))) or "usage" in body
        figures = object_of(body.get("usage"))
        prompt = first_count(figures, "prompt_tokens", "total_tokens")
        if prompt:
            self._usage = split_usage(prompt=prompt, completion=0).at_least(count_of(figures.get("total_tokens")))
        return False

    def end(self) -> None:
        self.is_complete = True
