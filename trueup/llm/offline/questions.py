"""Form a question about a sentence, in its own language: English, Persian, Arabic or Turkish."""

import re
from collections import Counter
from collections.abc import Callable

from trueup.llm.languages import FUNCTION_WORDS
from trueup.llm.prompts import QUESTION_CHARACTERS
from trueup.llm.texts import cut_at_word, fold

Weights = Counter[str]
_PART = r"[^,،;:.!?؟]{4,90}"
_CLAUSE = rf"({_PART})"
_WORD = re.compile(r"[^\s,،;؛:.!?؟()\[\]\"«»“”]+")


def question_about(sentence: str, language: str, weights: Weights) -> str:
    """Return a question that the sentence answers. `weights`: counts of the content words in its passage."""
    ask = _LANGUAGES.get(language, _ask_in_english)
    return cut_at_word(ask(" ".join(sentence.split()), weights), QUESTION_CHARACTERS)


# English

_YOUR_TO_MY = (
    (re.compile(r"\byou are\b", re.I), "I am"), (re.compile(r"\byou're\b", re.I), "I'm"),
    (re.compile(r"\byour\b", re.I), "my"), (re.compile(r"\byours\b", re.I), "mine"),
    (re.compile(r"\byourself\b", re.I), "myself"), (re.compile(r"\byou\b", re.I), "I"),
)  # fmt: skip
_OUR_TO_YOUR = ((re.compile(r"\bour\b", re.I), "your"), (re.compile(r"\b(?:we|us)\b", re.I), "you"))
_NOT_NOUN = r"(?!(?:can|could|will|would|may|must|should|do|does|that|which|who|when|if|because)\b)"
_SUBJECT = rf"((?:{_NOT_NOUN}[\w'’-]+ ){{0,5}}?{_NOT_NOUN}[\w'’-]+)"
_TAKES_TIME = re.compile(
    rf"^{_SUBJECT} (?:can |may |will )?(takes?|lasts?) .*\b(?:day|hour|week|minute|month)s?\b", re.I
)
_COSTS = re.compile(rf"^{_SUBJECT} costs? ", re.I)
_AUXILIARY = re.compile(
    rf"^{_SUBJECT} (is|are|was|were|can be|will be|must be) (not )?(\w+(?:ed|en|nt|ld|id|de))\b", re.I
)
_IS_SOMETHING = re.compile(rf"^{_SUBJECT} (is|are) (?:an?|the|one|our) ", re.I)
_VERB = re.compile(
    rf"^{_SUBJECT} (?:is|are|was|were|has|have|can|cannot|can't|will|must|may|should|do|does|includes?|covers?|works?"
    r"|starts?|ends?|applies|apply|arrives?|shows?|depends?|requires?|lets?|comes?|goes|sends?|opens?|takes?) ",
    re.I,
)
_LOWERED = re.compile(r"^(?:The|A|An|All|Any|Each|Every|Most|Some|Standard|Express|Free|Your|Our|My|Its|Their)\b")


def _ask_in_english(sentence: str, weights: Weights) -> str:
    if found := re.match(rf"(If|When) {_CLAUSE}, ", sentence):
        return f"What happens {found[1].lower()} {_swap(found[2], _YOUR_TO_MY)}?"
    if found := re.match(rf"To {_CLAUSE}, ", sentence):
        return f"How do I {_swap(found[1], _YOUR_TO_MY)}?"
    if found := re.match(rf"You can(?: also)? {_CLAUSE}", sentence):
        return f"Can I {_swap(found[1], _YOUR_TO_MY).strip()}?"
    if found := re.match(rf"(?:You (?:must|need to|have to)|Please) {_CLAUSE}", sentence):
        return f"Do I have to {_swap(found[1], _YOUR_TO_MY).strip()}?"
    topic = _leading_phrase(sentence, "en", most=3) or _topic(sentence, "en", weights)
    return _ask_about_subject(sentence) or f"What should I know about {_subject(topic)}?"


def _ask_about_subject(sentence: str) -> str | None:
    if found := _TAKES_TIME.match(sentence):
        return f"How long {_do(found[1])} {_subject(found[1])} {found[2].rstrip('s')}?"
    if found := _COSTS.match(sentence):
        return f"How much {_do(found[1])} {_subject(found[1])} cost?"
    if (found := _AUXILIARY.match(sentence)) and _is_noun_phrase(found[1]):
        auxiliary, _, be = found[2].lower().partition(" ")
        be = f"{be} " if be else ""
        return f"{'Why' if found[3] else 'How'} {auxiliary} {_subject(found[1])} {found[3] or ''}{be}{found[4]}?"
    if (found := _IS_SOMETHING.match(sentence)) and _is_noun_phrase(found[1]):
        return f"What {found[2].lower()} {_subject(found[1])}?"
    if (found := _VERB.match(sentence)) and _is_noun_phrase(found[1]):
        return f"What should I know about {_subject(found[1])}?"
    return None


def _is_noun_phrase(phrase: str) -> bool:
    """Return whether the phrase is a noun phrase. A question about a clause or a pronoun would not stand alone."""
    first = phrase.split()[0].lower()
    pronouns = {"it", "this", "that", "these", "those", "they", "there", "we", "you", "he", "she", "i", "if", "when"}
    return first not in pronouns | {"after", "before", "once", "while", "in", "on", "at", "for", "to", "and", "but"}


def _subject(phrase: str) -> str:
    # Lower a capital letter that only marks the start of the sentence.
    if _LOWERED.match(phrase) or re.match(r"[A-Z][a-z]+(?: [a-z]|$)", phrase):
        phrase = phrase[0].lower() + phrase[1:]
    return _swap(_swap(phrase, _YOUR_TO_MY), _OUR_TO_YOUR)


def _do(subject: str) -> str:
    last = subject.split()[-1].lower()
    return "do" if last.endswith("s") and not last.endswith(("ss", "us", "is")) else "does"


def _swap(text: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


# Persian

_PERSIAN_RELATIVE = re.compile(r"(\S+ی که [^،.]{3,60}?(?:می‌\w+د|شده‌اند|است|هستند))(?= )")


def _ask_in_persian(sentence: str, weights: Weights) -> str:
    if found := re.match(rf"برای {_CLAUSE}[،,] ", sentence):
        return f"برای {found[1].strip()} چه باید کرد؟"
    if found := re.match(rf"(اگر|چنانچه|در صورتی[ \u200c]که) {_CLAUSE}[،,] ", sentence):
        return f"{found[1]} {found[2].strip()} چه می‌شود؟"
    if found := _PERSIAN_RELATIVE.match(sentence):
        return f"دربارهٔ {found[1]} چه باید بدانم؟"
    topic = _leading_phrase(sentence, "fa", most=4) or _topic(sentence, "fa", weights)
    return f"دربارهٔ {topic} چه باید بدانم؟"


# Arabic


def _ask_in_arabic(sentence: str, weights: Weights) -> str:
    if found := re.match(rf"(?:إذا|في حال) {_CLAUSE}[،,] ", sentence):
        return f"ماذا يحدث إذا {found[1].strip()}؟"
    # An Arabic sentence often begins with its verb, so the topic is a noun with the article, not the first word.
    nouns = [word for word in _WORD.findall(sentence) if word.startswith("ال") and len(word) > 4]
    if nouns:
        topic = max(nouns, key=lambda noun: weights[fold(noun)])
        return f"ماذا يجب أن أعرف عن {topic}؟"
    return f"ماذا يجب أن أعرف عن {_topic(sentence, 'ar', weights)}؟"


# Turkish


def _ask_in_turkish(sentence: str, weights: Weights) -> str:
    if found := re.match(rf"{_CLAUSE} için, ", sentence):
        return f"{found[1]} için ne yapmalıyım?"
    if found := re.match(rf"(?:Eğer )?({_PART}s[ae](?:nız|niz|m|n|k|lar|ler)?), ", sentence):
        return f"{found[1]} ne olur?"
    topic = _leading_phrase(sentence, "tr", most=2) or _topic(sentence, "tr", weights)
    return f"{topic} hakkında ne bilmeliyim?"


_ENDS_PHRASE = {
    "en": re.compile(r"(?:also|only|always|never|working|days?|hours?|weeks?|\w+ed|sent|made|paid|kept|sold)$", re.I),
    "tr": re.compile(r"\w{3,}(?:[yz][aeıiuü]|d[ae]n?|[dt][ea]ki|ndeki|ndaki|irsiniz|ebilirsiniz|dir|dır)$"),
    "fa": re.compile("فقط|تنها|بلافاصله|حداکثر|حداقل|معمولا|معمولاً|دیگر|نیز|همیشه"),
}


def _leading_phrase(sentence: str, language: str, *, most: int) -> str:
    """Return at most `most` words before the first function word, number or comma; may be empty."""
    phrase: list[str] = []
    ends = _ENDS_PHRASE.get(language)
    for word in _WORD.finditer(sentence):
        text = word.group()
        number = any(letter.isdecimal() for letter in text)
        if number or fold(text) in FUNCTION_WORDS[language] or (ends and ends.match(text)):
            break
        phrase.append(text)
        if len(phrase) == most or sentence[word.end() : word.end() + 1] in "،,؛;:.":
            break
    return " ".join(phrase)


def _topic(sentence: str, language: str, weights: Weights) -> str:
    """Return the word of the sentence that its passage uses most."""
    stop = FUNCTION_WORDS.get(language, frozenset())
    ends = _ENDS_PHRASE.get(language)
    found = [word for word in _WORD.findall(sentence) if fold(word) not in stop and not (ends and ends.match(word))]
    return max(found, key=lambda word: weights[fold(word)], default=cut_at_word(sentence, 60))


_LANGUAGES: dict[str, Callable[[str, Weights], str]] = {
    "en": _ask_in_english,
    "fa": _ask_in_persian,
    "ar": _ask_in_arabic,
    "tr": _ask_in_turkish,
}
