"""Messages without a model: a direct message about the product that a comment names, and an extractive reply."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trueup.llm.languages import detect
from trueup.llm.model import Message
from trueup.llm.prompts import DM_CHARACTERS, Job, block
from trueup.llm.texts import cut_at_word, sentences, words

_MAX_PRODUCTS = 3
_REPLY_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class _Phrases:
    hello: str
    hello_author: str
    price: str
    none_known: str


_PHRASES = {
    "en": _Phrases(
        hello="Hello! Thanks for your comment.",
        hello_author="Hello @{author}! Thanks for your comment.",
        price="{name}: {price}.",
        none_known="We will get back to you with the details shortly.",
    ),
    "fa": _Phrases(
        hello="سلام! از نظر شما سپاسگزاریم.",
        hello_author="سلام @{author}! از نظر شما سپاسگزاریم.",
        price="{name}: {price}.",
        none_known="به‌زودی جزئیات را برایتان می‌فرستیم.",
    ),
    "ar": _Phrases(
        hello="مرحباً! شكراً لتعليقك.",
        hello_author="مرحباً @{author}! شكراً لتعليقك.",
        price="{name}: {price}.",
        none_known="سنوافيك بالتفاصيل قريباً.",
    ),
    "tr": _Phrases(
        hello="Merhaba! Yorumunuz için teşekkürler.",
        hello_author="Merhaba @{author}! Yorumunuz için teşekkürler.",
        price="{name}: {price}.",
        none_known="Ayrıntıları kısa süre içinde size ileteceğiz.",
    ),
}


def direct_message(messages: Sequence[Message], job: Job) -> str:
    """Return the answer to a prompt of `trueup.llm.prompts.dm_messages`."""
    comment, author = block(messages, "comment"), block(messages, "author")
    products = [json.loads(line) for line in block(messages, "products").splitlines()]
    notes = block(messages, "notes")
    language = job.arguments.get("language", "auto")
    if language not in _PHRASES:
        language = detect(comment)
    if language not in _PHRASES:
        language = detect(notes + " ".join(product["name"] for product in products))
    phrases = _PHRASES.get(language, _PHRASES["en"])
    hello = phrases.hello_author.format(author=author) if author else phrases.hello
    facts = _about(comment, products, phrases) or closest_sentences(comment, notes)
    return cut_at_word("\n".join([hello, *(facts or [phrases.none_known])]), DM_CHARACTERS)


def plain_reply(messages: Sequence[Message]) -> str:
    """Return the prompt's sentences that share words with its last message; otherwise that message's first two."""
    asked = next((message.content for message in reversed(messages) if message.role == "user"), "")
    known = "\n".join(message.content for message in messages if message.content != asked)
    wanted = set(words(asked))
    found = [line for line in closest_sentences(asked, known) if wanted & set(words(line))]
    return cut_at_word(" ".join(found or sentences(asked)[:2]), _REPLY_CHARACTERS)


def _about(comment: str, products: Sequence[Mapping[str, str]], phrases: _Phrases) -> list[str]:
    """Return a line for each product that the comment names, or for the first products if it names none."""
    asked = set(words(comment))
    named = [product for product in products if asked & set(words(product["name"]))]
    return [_line(product, phrases) for product in (named or products)[:_MAX_PRODUCTS]]


def _line(product: Mapping[str, str], phrases: _Phrases) -> str:
    name, price = product["name"], product.get("price")
    start = phrases.price.format(name=name, price=price) if price else f"{name}."
    described = sentences(product.get("description", ""))[:1]
    return " ".join([start, *described, product.get("url", "")]).strip()


def closest_sentences(asked: str, known: str) -> list[str]:
    """Return the two sentences of `known` that share most words with `asked`, in their order."""
    wanted = set(words(asked))
    found = sentences(known)
    ranked = sorted(found, key=lambda sentence: -len(wanted & set(words(sentence))))[:2]
    return [sentence for sentence in found if sentence in ranked]
