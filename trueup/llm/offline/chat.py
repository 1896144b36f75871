"""Chat without a model: replies and answers from the prompt's own sentences, and a rearranged draft."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trueup.llm.languages import FUNCTION_WORDS, detect
from trueup.llm.model import Message
from trueup.llm.offline.messages import closest_sentences
from trueup.llm.prompts import REPLY_CHARACTERS, Job, block
from trueup.llm.texts import cut_at_word, sentences, words


@dataclass(frozen=True, kw_only=True)
class _Phrases:
    unknown: str
    not_in_context: str
    role: str
    do: str
    do_not: str


_PHRASES = {
    "en": _Phrases(
        unknown="Thank you for your message. We will get back to you shortly.",
        not_in_context="The context does not hold the answer.",
        role="You are the assistant of {name}.",
        do="What to do:",
        do_not="Use only what stands here; when it does not answer, say that someone will get back to the customer.",
    ),
    "fa": _Phrases(
        unknown="از پیام شما سپاسگزاریم. به‌زودی پاسخ می‌دهیم.",
        not_in_context="پاسخ این پرسش در متن نیست.",
        role="شما دستیار {name} هستید.",
        do="چه باید کرد:",
        do_not="تنها از آنچه اینجا آمده است استفاده کنید؛ اگر پاسخ نبود، بگویید همکاران ما پیگیری می‌کنند.",
    ),
    "ar": _Phrases(
        unknown="شكراً لرسالتك. سنرد عليك قريباً.",
        not_in_context="الإجابة ليست في النص.",
        role="أنت مساعد {name}.",
        do="ما يجب فعله:",
        do_not="استخدم ما ورد هنا فقط، وإن لم تجد الإجابة فقل إن أحداً سيتواصل مع العميل.",
    ),
    "tr": _Phrases(
        unknown="Mesajınız için teşekkürler. En kısa sürede dönüş yapacağız.",
        not_in_context="Metinde bu sorunun yanıtı yok.",
        role="Sen {name} asistanısın.",
        do="Yapılacaklar:",
        do_not="Yalnızca burada yazanları kullan; yanıt yoksa müşteriye dönüş yapılacağını söyle.",
    ),
}
_SOMEONE = {"en": "the business", "fa": "فروشگاه", "ar": "المتجر", "tr": "işletmenin"}


def chat_reply(messages: Sequence[Message], job: Job) -> str:
    """Return the answer to a prompt of `trueup.llm.prompts.reply_messages`."""
    asked = block(messages, "message")
    own = [said["text"] for said in _json_lines(block(messages, "conversation")) if said["from"] == "business"]
    known = "\n".join([_facts(block(messages, "business")), *own])
    found = [line for line in closest_sentences(asked, known) if _content(asked) & _content(line)]
    language = _language(job, asked)
    return cut_at_word(" ".join(found) or _PHRASES[language].unknown, REPLY_CHARACTERS)


def question_answer(messages: Sequence[Message], job: Job) -> str:
    """Return the JSON answer to a prompt of `trueup.llm.prompts.question_messages`."""
    asked = block(messages, "question")
    wanted = _content(asked)
    found = {
        line["passage"]: closest_sentences(asked, line["text"]) for line in _json_lines(block(messages, "context"))
    }
    shared = {place: max((len(wanted & _content(part)) for part in parts), default=0) for place, parts in found.items()}
    most = max(shared.values(), default=0)
    best = [place for place in shared if shared[place] == most > 0][:2]
    text = " ".join(part for place in best for part in found[place] if wanted & _content(part))
    answer = {
        "answered": bool(best),
        "passages": best,
        "answer": cut_at_word(text, REPLY_CHARACTERS) or _PHRASES[_language(job, asked)].not_in_context,
    }
    return json.dumps(answer, ensure_ascii=False)


def better_prompt(messages: Sequence[Message], job: Job) -> str:
    """Return the answer to a prompt of `prompts.enhancement_messages`: the draft, with one line per sentence."""
    draft, business = block(messages, "draft"), block(messages, "business")
    language = _language(job, draft)
    phrases = _PHRASES[language]
    known = dict(line.split(": ", 1) for line in business.splitlines() if ": " in line)
    about = [known[part] for part in ("description", "persona") if part in known]
    wishes = [f"- {sentence}" for sentence in sentences(draft)]
    role = phrases.role.format(name=known.get("name") or _SOMEONE[language])
    return "\n".join([role, *about, phrases.do, *wishes, f"- {phrases.do_not}"])


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _facts(business: str) -> str:
    """Return a business's facts for customers, without its instructions and persona, which address the assistant."""
    own = [line for line in business.splitlines() if not line.startswith(("instructions: ", "persona: "))]
    return "\n".join(line.removeprefix("name: ").removeprefix("description: ") for line in own)


def _content(text: str) -> set[str]:
    """Return the content words of a text: longer than two letters, and no function words."""
    stop = FUNCTION_WORDS.get(detect(text), frozenset())
    return {word for word in words(text) if len(word) > 2 and word not in stop}


def _language(job: Job, text: str) -> str:
    language = job.arguments.get("language", "auto")
    language = language if language in _PHRASES else detect(text)
    return language if language in _PHRASES else "en"
