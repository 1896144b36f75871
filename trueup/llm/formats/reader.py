"""What the readers of all formats have in common."""

from collections.abc import Iterable

from trueup.llm.formats.usage import TokenUsage


class Reader:
    """Collects an answer's text and usage. Implements `AnswerReader` but for `add`."""

    def __init__(self) -> None:
        self.model_name: str | None = None
        self.has_begun = False
        self.is_complete = False
        self.texts: list[str] = []
        self.events = 0
        self.prompt_tokens: int | None = None
        self._usage: TokenUsage | None = None
        self._is_finished = False  # the answer has ended; what the server reports may follow

    @property
    def usage(self) -> TokenUsage | None:
        return self._usage

    def end(self) -> None:
        self.is_complete |= self._is_finished or self._usage is not None

    def _note_model(self, name: object) -> None:
        if isinstance(name, str) and name:
            self.model_name = name

    def _note_texts(self, parts: Iterable[str]) -> bool:
        """Add the parts that are not empty. Returns whether there are any."""
        new = [part for part in parts if part]
        if new:
            self.events += 1
            self.texts += new
        return bool(new)
