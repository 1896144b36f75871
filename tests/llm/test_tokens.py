import base64
import gzip
import hashlib
import importlib.util
import subprocess
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueup.llm.model import Message
from trueup.llm.tokens import BoundCounter, EncodingCounter, count_prompt_tokens, counter_for, scaled_estimate

# Counted with tiktoken 0.14.0 (encode with disallowed_special=()): text, cl100k_base, o200k_base.
COUNTED_BY_TIKTOKEN = [
    ("Hello, world!", 4, 4),
    ("The parcel's label isn't free: it costs £4.50 (incl. VAT).", 19, 18),
    ("سفارش شما تا دو روز کاری دیگر به دستتان می‌رسد.", 33, 17),
    ("يستغرق الشحن العادي من ثلاثة إلى خمسة أيام عمل.", 33, 15),
    ("Siparişiniz iki iş günü içinde İstanbul'a ulaşır.", 20, 12),
    ('{"pairs": [{"question": "Why?", "confidence": 0.9}]}', 18, 18),
    ("def f(x):\n\treturn x ** 2  # square\n", 13, 13),
    ("👩‍👩‍👧‍👦 🇮🇷 😀", 25, 16),
    ("订单将在两天内送达。", 9, 8),
    ("\ufdfa", 3, 2),
    ("<|endoftext|> and <|im_start|>user", 14, 15),
    ("   \n\n  \t ", 2, 3),
    ("1234567890 3.14159", 9, 9),
]
ENCODINGS = ("cl100k_base", "o200k_base", "voyage3_base")


@pytest.mark.parametrize(("text", "cl100k", "o200k"), COUNTED_BY_TIKTOKEN)
def test_counts_equal_those_of_openais_own_tokenizer(text: str, cl100k: int, o200k: int) -> None:
    assert EncodingCounter("cl100k_base").count(text) == cl100k
    assert EncodingCounter("o200k_base").count(text) == o200k


@pytest.mark.parametrize(
    ("encoding", "published_sha256"),
    [
        ("cl100k_base", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
        ("o200k_base", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
    ],
)
def test_the_shipped_vocabularies_equal_openais_published_ones(encoding: str, published_sha256: str) -> None:
    assert hashlib.sha256(gzip.decompress(_vocabulary_file(encoding).read_bytes())).hexdigest() == published_sha256


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "word",
    ["internationalization", "warehouse", "بازپرداخت", "فروشگاه", "المستودع", "siparişlerinizden", "güncelleştirme"],
)
def test_a_words_count_equals_a_byte_pair_merge_by_rank(encoding: str, word: str) -> None:
    assert EncodingCounter(encoding).count(word) == _merged(_ranks(encoding), word.encode())


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4o-2024-08-06", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("gpt-5-mini", "o200k_base"),
        ("gpt-5.1-chat-latest", "o200k_base"),
        ("o1", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("o4-mini-2025-04-16", "o200k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-turbo-2024-04-09", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("gpt-3.5-turbo-0125", "cl100k_base"),
        ("gpt-35-turbo", "cl100k_base"),
        ("openai/GPT-4o-mini", "o200k_base"),
        ("ft:gpt-4o-mini-2024-07-18:acme::abc123", "o200k_base"),
        ("ft:gpt-3.5-turbo-0125:acme::abc123", "cl100k_base"),
    ],
)
def test_openais_chat_models_are_counted_exactly(model: str, encoding: str) -> None:
    counter = counter_for(model)
    assert isinstance(counter, EncodingCounter)
    assert counter.exact
    assert counter.encoding == encoding


@pytest.mark.parametrize(
    "model",
    ["llama-3.3-70b", "qwen2.5:14b", "mistral-small", "gpt-oss-120b", "gpt-6", "gpt-40", "o10", "gemini-2.5", ""],
)
def test_every_other_model_is_counted_by_the_upper_bound(model: str) -> None:
    counter = counter_for(model)
    assert isinstance(counter, BoundCounter)
    assert not counter.exact


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", [row[0] for row in COUNTED_BY_TIKTOKEN])
def test_the_bound_is_at_least_the_exact_count(encoding: str, text: str) -> None:
    assert BoundCounter().count(text) >= EncodingCounter(encoding).count(text)


@given(st.text(max_size=200))
def test_the_bound_is_at_least_the_exact_count_of_any_text(text: str) -> None:
    bound = BoundCounter().count(text)
    assert all(bound >= EncodingCounter(encoding).count(text) for encoding in ENCODINGS)


@pytest.mark.parametrize("text", ["\ufdfa", "ﬁ" * 20, "İ" * 20, "\u0390" * 20, "ẞ" * 20])
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_the_bound_covers_the_normalised_text(text: str, form: str) -> None:
    normal = unicodedata.normalize(form, text)  # type: ignore[arg-type]
    assert BoundCounter().count(text) > max(
        len(normal.encode()), len(normal.casefold().encode()) if form == "NFKC" else 0
    )


def test_concurrent_threads_load_the_tokenizer_once() -> None:
    program = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from trueup.llm.tokens import EncodingCounter
start = threading.Barrier(8)
def count(_):
    start.wait()
    return EncodingCounter("o200k_base").count("Hello, world!")
with ThreadPoolExecutor(8) as threads:
    assert list(threads.map(count, range(8))) == [4] * 8
assert "bpe_openai" not in sys.modules
import bpe_openai
assert len(bpe_openai.get_encoding("o200k_base").encode("Hello, world!")) == 4
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_lone_surrogate_is_counted() -> None:
    assert EncodingCounter("o200k_base").count("a\ud800b") > 0
    assert BoundCounter().count("a\ud800b") >= 5


def test_a_long_text_is_counted_whole() -> None:
    assert EncodingCounter("o200k_base").count("word " * 400_000) > 400_000


def test_an_empty_text_costs_nothing() -> None:
    assert EncodingCounter("o200k_base").count("") == 0
    assert BoundCounter().count("") == 0


def test_a_prompt_costs_its_messages_and_their_overhead() -> None:
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Hello")]
    # OpenAI's cookbook: 3 tokens for the answer, and 3 for each message besides its role and content.
    assert count_prompt_tokens(messages, EncodingCounter("o200k_base")) == 3 + (3 + 1 + 3) + (3 + 1 + 1)


def test_the_bounds_message_overhead_is_larger_than_the_exact_one() -> None:
    messages = [Message(role="user", content="Hello")]
    assert count_prompt_tokens(messages, BoundCounter()) > 3 * count_prompt_tokens(
        messages, EncodingCounter("o200k_base")
    )


def test_a_fixed_estimate_is_scaled_up_for_a_bounded_counter() -> None:
    assert scaled_estimate(1000, EncodingCounter("o200k_base")) == 1000
    assert scaled_estimate(1000, BoundCounter()) == 4000


def _vocabulary_file(encoding: str) -> Path:
    package = importlib.util.find_spec("bpe_openai")
    assert package
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "data" / f"{encoding}.tiktoken.gz"


@lru_cache(maxsize=4)
def _ranks(encoding: str) -> dict[bytes, int]:
    lines = gzip.decompress(_vocabulary_file(encoding).read_bytes()).split(b"\n")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _merged(ranks: dict[bytes, int], word: bytes) -> int:
    """Reference byte pair encoding: merge the neighbours of lowest rank until no pair has a rank."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        rank, index = min((ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
        if rank == 1 << 30:
            break
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return len(parts)
