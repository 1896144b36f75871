"""Language detection by script and function words."""

import re
from collections import Counter

from trueup.llm.texts import fold

UNKNOWN = "und"

FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(fold(word) for word in text.split())
    for language, text in {
        "en": "a an and any are as at be but by can do does for from had has have how if in into is it its may more "
        "must no not of on one or our per so such than that the their them then there these they this to up was we "
        "were what when where which while who will with within without would you your",
        "tr": "ama ancak bir bu çok da daha de değil en gibi göre her hem hangi için ile ise kadar ki mı mi mu mü ne "
        "nasıl o olan önce olarak olur sizin siz sonra şu tarafından tüm üzere var ve veya ya yok iki üç",
        "fa": "از است اگر اما آن آنها این با باید بر برای بود بودن به بی پس پیش تا تر چه خود دارد دارند در را روی شد "
        "شده شما شود که کرد کردن کنید کنیم کند گر ما می نمی نیز نیست هر هم همه همین هیچ و ولی یا یک است",
        "ar": "إذا إلى إن أن أو أي التي الذي الذين أنت بعد بعض بل بين تلك تم ثم حتى حيث ذلك عبر عن على عند غير في قبل "
        "قد كان كل كما لا لم لن له لها ليس ما مع من منذ نحن هذا هذه هو هي هل و يتم يمكن يمكنك يكون",
    }.items()
}

_WORDS = re.compile(r"[^\W\d_]+")
_ARABIC = re.compile(r"[\u0620-\u06ff\ufb50-\ufdff\ufe70-\ufefc]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_LETTER = re.compile(r"[^\W\d_]")
_OWN_LETTERS = {
    "fa": re.compile(r"[پچژگکی]"),
    "ar": re.compile(r"[ةيكىأإ]"),
    "ur": re.compile(r"[ٹڈڑےں]"),
    "tr": re.compile(r"[ığşİĞŞ]"),
}


def detect(text: str) -> str:
    """Return "en", "tr", "fa", "ar" or "ur", or "und" if the text is in none of these languages."""
    sample = text[:20_000]
    letters = len(_LETTER.findall(sample))
    if not letters:
        return UNKNOWN
    if len(_ARABIC.findall(sample)) * 2 > letters:
        return _detect_arabic_script(sample)
    if len(_LATIN.findall(sample)) * 2 > letters:
        return _detect_latin_script(sample)
    return UNKNOWN


def _detect_arabic_script(text: str) -> str:
    letters = {code: len(pattern.findall(text)) for code, pattern in _OWN_LETTERS.items()}
    if letters["ur"] * 50 > len(text):
        return "ur"
    hits = _function_word_hits(text)
    # Words weigh more than letters, because Persian typed on an Arabic keyboard has ي and ك instead of ی and ک.
    persian = letters["fa"] + 3 * hits["fa"]
    arabic = letters["ar"] + 3 * hits["ar"]
    return "fa" if persian >= arabic else "ar"


def _detect_latin_script(text: str) -> str:
    hits = _function_word_hits(text)
    turkish = len(_OWN_LETTERS["tr"].findall(text)) + 3 * hits["tr"]
    english = 3 * hits["en"]
    if max(turkish, english) == 0:
        return UNKNOWN
    return "tr" if turkish > english else "en"


def _function_word_hits(text: str) -> Counter[str]:
    hits: Counter[str] = Counter()
    for word in _WORDS.findall(fold(text)):
        hits.update(code for code, known in FUNCTION_WORDS.items() if word in known)
    return hits
