import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scripted import HeldModel, ScriptedModel, completion
from trueup.errors import AnswerFormatError, HoldExhaustedError, InvalidInputError
from trueup.features.qa import QaResult, estimate_tokens, generate_qa, plan_qa
from trueup.llm.tokens import BoundCounter, EncodingCounter, TokenCounter

EXAMPLES = Path(__file__).parents[2] / "examples"
ENGLISH = (EXAMPLES / "help_en.txt").read_text()
PERSIAN = (EXAMPLES / "help_fa.txt").read_text()
TURKISH = (
    "Standart teslimat Türkiye genelinde iki ila dört iş günü sürer. 500 TL üzerindeki siparişlerde kargo ücretsizdir. "
    "Şifrenizi sıfırlamak için, giriş sayfasındaki bağlantıya tıklayın. İade süresi teslimattan sonra 14 gündür."
)
ARABIC = (
    "يستغرق الشحن العادي من ثلاثة إلى خمسة أيام عمل داخل المملكة. إذا وصلتك الشحنة تالفة، التقط صورة للصندوق "
    "وأرسلها إلينا خلال يومين. تتم إعادة المبلغ إلى البطاقة نفسها خلال سبعة أيام عمل."
)
SHORT = "Standard delivery takes two to four working days. Every item can be returned within 45 days of delivery, free."


def _answer(*pairs: dict[str, object]) -> str:
    return json.dumps({"language": "en", "pairs": list(pairs)})


def _pair(question: str = "How long does delivery take?", **values: object) -> dict[str, object]:
    return {
        "question": question,
        "answer": "Two to four working days.",
        "context": "Standard delivery takes two to four working days.",
        "confidence": 0.9,
        **values,
    }


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH, "en"), (PERSIAN, "fa"), (TURKISH, "tr"), (ARABIC, "ar")],
    ids=["en", "fa", "tr", "ar"],
)
def test_pairs_are_made_from_the_text_in_its_language(text: str, language: str) -> None:
    result = generate_qa(HeldModel(estimate_tokens(text, 3)), text=text, max_pairs=3)
    assert len(result.pairs) == 3
    assert result.complete
    assert result.language == language
    assert {pair.language for pair in result.pairs} == {language}
    assert all(pair.context in text and 0 <= pair.confidence <= 1 for pair in result.pairs)


@pytest.mark.parametrize("text", [SHORT, ENGLISH, PERSIAN, ARABIC, ENGLISH * 5 + PERSIAN * 5])
@pytest.mark.parametrize("max_pairs", [1, 7, 50])
def test_the_estimate_suffices_for_the_work(text: str, max_pairs: int) -> None:
    estimate = estimate_tokens(text, max_pairs, page_title="Help")
    model = HeldModel(estimate)
    result = generate_qa(model, text=text, page_title="Help", max_pairs=max_pairs)
    assert model.tokens_left >= 0
    assert result.complete
    assert not any(done.truncated for done in model.completions)


@given(text=st.text(min_size=100, max_size=3000), max_pairs=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_the_estimate_suffices_for_any_text(text: str, max_pairs: int) -> None:
    try:
        estimate = estimate_tokens(text, max_pairs)
    except InvalidInputError:
        return
    model = HeldModel(estimate)
    assert generate_qa(model, text=text, max_pairs=max_pairs).complete
    assert model.tokens_left >= 0


@pytest.mark.parametrize("counter", [None, EncodingCounter("cl100k_base"), BoundCounter()])
def test_the_calls_are_exactly_those_of_the_estimate(counter: TokenCounter | None) -> None:
    text = ENGLISH * 4
    model = ScriptedModel(*[_answer(_pair(f"Question {number}?")) for number in range(20)])
    generate_qa(model, text=text, page_title="Help", max_pairs=20, counter=counter)
    plan = plan_qa(text, 20, page_title="Help", counter=counter)
    assert estimate_tokens(text, 20, page_title="Help", counter=counter) == plan.estimated_tokens
    assert model.caps == [chunk.answer_tokens for chunk in plan.chunks]
    assert model.prompts == [chunk.messages for chunk in plan.chunks]
    assert sum(chunk.pairs for chunk in plan.chunks) == 20


def test_a_long_text_with_few_pairs_has_a_warning_about_unread_parts() -> None:
    text = ENGLISH * 30
    result = generate_qa(HeldModel(estimate_tokens(text, 2)), text=text, max_pairs=2)
    assert result.chunks_planned == 2
    assert any("not read" in warning for warning in result.warnings)


def test_a_question_asked_twice_is_kept_once() -> None:
    answer = _answer(
        _pair(), _pair("how long does delivery take"), _pair("What about 2 items?"), _pair("What about 3 items?")
    )
    result = generate_qa(ScriptedModel(answer), text=SHORT, max_pairs=5)
    assert [pair.question for pair in result.pairs] == [
        "How long does delivery take?", "What about 2 items?", "What about 3 items?",
    ]  # fmt: skip


def test_surplus_pairs_are_dropped() -> None:
    answer = _answer(*[_pair(f"Question {number}?") for number in range(9)])
    assert len(generate_qa(ScriptedModel(answer), text=SHORT, max_pairs=2).pairs) == 2


@pytest.mark.parametrize(
    ("quoted", "context"),
    [
        ("Standard  delivery takes\ntwo to four WORKING days", "Standard delivery takes two to four working days"),
        ("“Standard delivery takes two to four working days.”", "Standard delivery takes two to four working days"),
        ("", "Standard delivery takes two to four working days."),
        ("Something the model made up.", "Standard delivery takes two to four working days."),
        (None, "Standard delivery takes two to four working days."),
    ],
)
def test_the_context_is_always_the_texts_own_words(quoted: object, context: str) -> None:
    result = generate_qa(ScriptedModel(_answer(_pair(context=quoted))), text=SHORT, max_pairs=1)
    assert result.pairs[0].context == context


def test_an_invented_context_lowers_the_confidence() -> None:
    result = generate_qa(ScriptedModel(_answer(_pair(context="Made up."))), text=SHORT, max_pairs=1)
    assert result.pairs[0].confidence == 0.5


def test_the_stated_language_counts_if_it_cannot_be_detected() -> None:
    german = _pair("Wie lange dauert die Lieferung?", answer="Zwei bis vier Werktage.")
    answer = json.dumps({"language": "de", "pairs": [german]})
    assert generate_qa(ScriptedModel(answer), text=SHORT, max_pairs=1).language == "de"


def test_a_part_without_json_is_a_warning_when_others_gave_pairs() -> None:
    text = ENGLISH * 4
    chunks = len(plan_qa(text, 10).chunks)
    answers = ["I'm sorry, I can't.", *[_answer(_pair(f"Question {number}?")) for number in range(chunks - 1)]]
    result = generate_qa(ScriptedModel(*answers), text=text, max_pairs=10)
    assert len(result.pairs) == chunks - 1
    assert result.complete
    assert result.warnings[0].startswith("Part 1 of the text gave no pairs")


@pytest.mark.parametrize(
    "answer", ["I'm sorry, I can't.", "", '{"pairs": [{"question": "Only a question?"}]}', '{"a": 1}']
)
def test_only_answers_in_the_wrong_format_are_an_error(answer: str) -> None:
    with pytest.raises(AnswerFormatError, match="charged") as caught:
        generate_qa(ScriptedModel(answer), text=SHORT, max_pairs=1)
    assert not caught.value.retryable


def test_a_part_without_facts_is_no_error() -> None:
    result = generate_qa(ScriptedModel('{"language": "en", "pairs": []}'), text=SHORT, max_pairs=1)
    assert result.pairs == ()
    assert result.complete


def test_the_complete_pairs_of_an_answer_that_was_cut_off_are_kept() -> None:
    whole = _answer(_pair("First?"), _pair("Second?"))
    cut = completion(whole[:-40], truncated=True)
    result = generate_qa(ScriptedModel(cut), text=SHORT, max_pairs=2)
    assert [pair.question for pair in result.pairs] == ["First?"]


def test_the_pairs_so_far_are_returned_if_the_hold_is_exhausted() -> None:
    result = generate_qa(ScriptedModel(_answer(_pair())), text=ENGLISH * 4, max_pairs=10)
    assert len(result.pairs) == 1
    assert not result.complete
    assert result.chunks_done == 1
    assert "tokens were used up after 1 of" in result.warnings[0]


def test_a_hold_that_covers_no_call_is_an_error() -> None:
    with pytest.raises(HoldExhaustedError):
        generate_qa(ScriptedModel(), text=ENGLISH, max_pairs=10)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"text": "Too short."}, "text"),
        ({"text": " \n" * 200}, "text"),
        ({"text": "\x00\x07" * 200}, "text"),
        ({"text": "1 2 3 . " * 50}, "text"),
        ({"text": "x" * 500_001}, "text"),
        ({"max_pairs": 0}, "max_pairs"),
        ({"max_pairs": 51}, "max_pairs"),
        ({"max_pairs": True}, "max_pairs"),
        ({"max_pairs": "5"}, "max_pairs"),
        ({"page_title": "x" * 501}, "page_title"),
        ({"page_title": None}, "page_title"),
    ],
)
def test_unusable_input_is_refused_before_the_model_is_called(values: dict[str, object], field: str) -> None:
    model = ScriptedModel()
    arguments: dict[str, object] = {"text": SHORT, "page_title": "", "max_pairs": 3, **values}
    with pytest.raises(InvalidInputError, match=f"^{field} "):
        generate_qa(model, **arguments)  # type: ignore[arg-type]
    assert not model.prompts


def test_a_result_survives_json() -> None:
    result = generate_qa(ScriptedModel(_answer(_pair())), text=SHORT, max_pairs=1)
    assert QaResult.model_validate(json.loads(json.dumps(result.model_dump(mode="json")))) == result
