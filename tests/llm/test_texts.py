import pytest

from trueup.errors import InvalidInputError
from trueup.features.answers import objects_under, share_of
from trueup.features.qa import passages
from trueup.llm import languages
from trueup.llm.texts import cut_at_word, cut_to_bytes, readable, sentences
from trueup.llm.tokens import BoundCounter, EncodingCounter

COUNTER = EncodingCounter("o200k_base")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("You can return every item within 45 days of delivery.", "en"),
        ("سفارش‌های شما تا سه روز کاری دیگر تحویل داده می‌شود.", "fa"),
        ("هزينه ارسال براي همه سفارش ها رايگان است و شما مي توانيد آن را پيگيري کنيد", "fa"),
        ("يمكنك إلغاء الطلب قبل شحنه من صفحة حسابك.", "ar"),
        ("Siparişinizi kargoya verilmeden önce iptal edebilirsiniz.", "tr"),
        ("订单将在两天内送达。", "und"),
        ("12345 !!!", "und"),
        ("", "und"),
    ],
)
def test_a_language_is_detected_by_script_and_function_words(text: str, language: str) -> None:
    assert languages.detect(text) == language


def test_sentences_end_at_the_marks_of_their_script() -> None:
    text = "It costs £4.50. Is it free? No.\nآیا رایگان است؟ نه. 第一句。第二句。"
    assert sentences(text) == [
        "It costs £4.50.", "Is it free?", "No.", "آیا رایگان است؟", "نه.", "第一句。", "第二句。",
    ]  # fmt: skip


def test_an_abbreviation_does_not_end_a_sentence() -> None:
    assert sentences("Orders placed before 2 p.m. are sent today, e.g. by train.") == [
        "Orders placed before 2 p.m. are sent today, e.g. by train."
    ]


def test_a_text_is_cut_at_a_word() -> None:
    assert cut_at_word("one two three", 9) == "one two"
    assert cut_at_word("one two", 7) == "one two"
    assert cut_at_word("abcdefghij", 4) == "abcd"


def test_a_cut_to_bytes_splits_no_character() -> None:
    cut = cut_to_bytes("سلام " * 100, 99)
    assert len(cut.encode()) <= 99
    assert set(cut.split()) == {"سلام"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("  \n\t ", "readable characters"),
        ("short", "at least 100"),
        ("\x00\x01\x02" * 50, "binary"),
        ("%PDF-1.7 " + "x" * 200, "binary"),
        ("\ufffd" * 200, "binary"),
        ("x" * 2000, "the limit is 1000"),
        (None, "not text"),
    ],
)
def test_an_unreadable_text_is_refused_with_field_and_remedy(text: object, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^body .*{reason}"):
        readable("body", text, minimum=100, maximum=1000)


def test_stray_control_characters_and_lone_surrogates_are_removed() -> None:
    assert readable("body", "a\x00b\ud800" + "x" * 100, minimum=1, maximum=1000).startswith("a b\ufffdx")


def test_passages_are_verbatim_slices_within_the_budget() -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "It says a few things. " * 10 for number in range(20))
    found = passages(text, tokens=200, counter=COUNTER)
    assert len(found) > 5
    assert all(passage in text for passage in found)
    assert all(COUNTER.count(passage) <= 220 for passage in found)
    assert "".join("".join(found).split()) == "".join(text.split())


@pytest.mark.parametrize("counter", [COUNTER, BoundCounter()])
@pytest.mark.parametrize(
    "text",
    [
        "One sentence after another. " * 200,
        "nowheretosplit" * 500,
        "یک جملهٔ فارسی که تکرار می‌شود. " * 100,
        "😀" * 1000,
        "words without any mark " * 300,
    ],
)
def test_a_huge_paragraph_is_split_at_sentences_then_anywhere(text: str, counter: EncodingCounter) -> None:
    found = passages(text, tokens=300, counter=counter)
    assert len(found) > 1
    assert all(passage in text for passage in found)
    assert all(counter.count(passage) <= 330 for passage in found)
    assert "".join("".join(found).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "answer",
    [
        '{"pairs": [{"q": 1}]}',
        '```json\n{"pairs": [{"q": 1}]}\n```',
        'Sure {here} you are: [see below]\n{"pairs": [{"q": 1}]} Anything else?',
        '[{"q": 1}]',
        '{"pairs": {"q": 1}}',
        '{"language": "en", "pairs": [{"q": 1}, {"q": "cut of',
        '[{"q": 1}, {"q": "cut of',
    ],
)
def test_a_list_is_found_in_an_answer_in_any_wrapping(answer: str) -> None:
    assert objects_under(answer, "pairs") == [{"q": 1}]


@pytest.mark.parametrize(
    "answer", ["", "I can't help with that.", '{"other": 1}', "[" * 50_000, '{"a":' * 50_000, "null"]
)
def test_an_answer_without_the_list_returns_none(answer: str) -> None:
    assert objects_under(answer, "pairs") is None


def test_an_empty_list_is_an_answer() -> None:
    assert objects_under('{"pairs": []}', "pairs") == []


@pytest.mark.parametrize(
    ("value", "share"),
    [(0.7, 0.7), ("0.7", 0.7), (70, 0.7), (1, 1.0), (0, 0.0), (None, 0.5), (True, 0.5), (-1, 0.5), (float("nan"), 0.5),
     (10**400, 0.5), ([], 0.5)],
)  # fmt: skip
def test_a_confidence_is_read_as_a_share(value: object, share: float) -> None:
    assert share_of(value, default=0.5) == share
