"""Cut a text into passages within a token budget: at paragraphs, else at sentences, else anywhere."""

from collections.abc import Iterator

from trueup.llm.texts import paragraph_spans, sentence_spans
from trueup.llm.tokens import TokenCounter

Span = tuple[int, int]


def passages(text: str, *, tokens: int, counter: TokenCounter) -> list[str]:
    """Return slices of the text, verbatim, in order and complete, of at most about `tokens` tokens each."""
    found: list[str] = []
    begin = end = used = 0
    for (start, stop), cost in _pieces(text, tokens, counter):
        if used and used + cost > tokens:
            found.append(text[begin:end])
            used = 0
        if not used:
            begin = start
        end = stop
        used += cost
    if used:
        found.append(text[begin:end])
    return found


def _pieces(text: str, tokens: int, counter: TokenCounter) -> Iterator[tuple[Span, int]]:
    """Yield spans within the budget and their costs. A span above the budget is split further."""
    for paragraph in paragraph_spans(text):
        cost = _cost(text, paragraph, counter)
        if cost <= tokens:
            yield paragraph, cost
            continue
        for sentence in sentence_spans(text, *paragraph):
            cost = _cost(text, sentence, counter)
            if cost <= tokens:
                yield sentence, cost
            else:
                yield from _hard_pieces(text, sentence, tokens, counter)


def _hard_pieces(text: str, span: Span, tokens: int, counter: TokenCounter) -> Iterator[tuple[Span, int]]:
    """Split a span without sentences, at spaces if possible. Each piece is shrunk until it fits."""
    start, end = span
    while start < end:
        stop = end
        while (cost := _cost(text, (start, stop), counter)) > tokens and stop - start > 1:
            middle = start + max(1, (stop - start) * tokens // (cost + 1))
            space = text.rfind(" ", start + (middle - start) // 2, middle)
            stop = space if space > start else middle
        yield (start, stop), cost
        start = stop
        while start < end and text[start].isspace():
            start += 1


def _cost(text: str, span: Span, counter: TokenCounter) -> int:
    return max(1, counter.count(text[span[0] : span[1]]))
