import json
from collections.abc import Iterator

import pytest
from pytest_httpserver import HTTPServer

from tests.support.scripted import AtOnce, ScriptedModel
from trueup.features.instagram.buttons import MAX_TEXT_CHARACTERS, Button, split_buttons
from trueup.features.instagram.comments import ActionConfig, CommentEvent, action_config, comment_event
from trueup.features.instagram.direct_message import build_message, send_instagram_dm
from trueup.features.instagram.graph import GraphClient
from trueup.features.links import KnownLinks, without_foreign_links

ACCOUNT, COMMENT = "17841405822304914", "17870913679156914"
LARCH = Button(title="Buy now", url="https://shop.example/larch")


def event(text: str = "How much?") -> CommentEvent:
    comment = {"id": COMMENT, "text": text, "from": {"id": "1", "username": "nina"}}
    return comment_event({"entry": [{"id": ACCOUNT, "changes": [{"field": "comments", "value": comment}]}]})


def static(message: str) -> ActionConfig:
    return action_config({"mode": "STATIC", "static_message": message})


def about_products() -> ActionConfig:
    return action_config({"mode": "PRODUCT", "products": [{"name": "Larch", "url": LARCH.url}]})


def split(text: str) -> tuple[str, tuple[Button, ...], list[str]]:
    warnings: list[str] = []
    return (*split_buttons(text, warnings), warnings)


def test_markers_become_buttons_and_leave_the_text() -> None:
    text = (
        "Look:\n\n[[CTA:Buy now|https://shop.example/larch]]\n[[CTA: خرید آنلاین‌ها | https://shop.example/fa ]]\n\nBye."
    )
    assert split(text) == ("Look:\n\nBye.", (LARCH, Button(title="خرید آنلاین‌ها", url="https://shop.example/fa")), [])


def test_a_text_without_markers_is_not_changed() -> None:
    text = "  Look [[here]]\n\n\n[CTA:Buy|https://shop.example/]  \n"
    assert split(text) == (text, (), [])


def test_equal_buttons_become_one() -> None:
    assert split("Look [[CTA:Buy now|https://shop.example/larch]]" * 4)[1:] == ((LARCH,), [])


@pytest.mark.parametrize(
    ("marker", "fault"),
    [
        ("[[CTA:|https://shop.example/]]", "title is empty"),
        ("[[CTA:Buy\nnow|https://shop.example/]]", "more than one line"),
        ("[[CTA:Buy this lantern today|https://shop.example/]]", "title has 22 characters"),
        ("[[CTA:Buy|http://shop.example/]]", "not an https"),
        ("[[CTA:Buy|javascript:alert(1)]]", "not an https"),
        ("[[CTA:Buy|https://]]", "not an https"),
        ("[[CTA:Buy|https://shop.example/a b]]", "not an https"),
        ("[[CTA:Buy|https://shop.example@evil.example/]]", "not an https"),
        ("[[CTA:Buy|https://[::1/]]", "not written as"),
        ("[[CTA:Buy|https://shop.example/" + "x" * 2000 + "]]", "not an https"),
        ("[[CTA:Buy]]", "not written as"),
        ("[[CTA:Buy|https://shop.example/", "not written as"),
        ("[[ cta:Buy|https://shop.example/]]", "not written as"),
        ("[[CTA:A|B|https://shop.example/]]", "not written as"),
    ],
)
def test_an_invalid_marker_stays_in_the_text_with_a_warning(marker: str, fault: str) -> None:
    text, buttons, warnings = split(f"Look: {marker}")
    assert (text, buttons) == (f"Look: {marker}", ())
    assert len(warnings) == 1
    assert fault in warnings[0]
    text, buttons, warnings = split(f"Look: {marker} [[CTA:Buy now|https://shop.example/larch]]")
    assert (text, buttons, len(warnings)) == (f"Look: {marker}", (LARCH,), 1)


def test_a_fourth_button_stays_in_the_text() -> None:
    markers = [f"[[CTA:Number {number}|https://shop.example/{number}]]" for number in range(4)]
    text, buttons, warnings = split("Look " + " ".join(markers))
    assert [button.title for button in buttons] == ["Number 0", "Number 1", "Number 2"]
    assert markers[3] in text
    assert "at most 3 buttons" in warnings[0]


def test_a_message_of_only_buttons_has_their_titles_as_text() -> None:
    text, buttons, _ = split("[[CTA:One|https://shop.example/1]] [[CTA:Two|https://shop.example/2]]")
    assert text == "One · Two"
    assert len(buttons) == 2


@pytest.mark.parametrize("words", ["word " * 300, "سلام " * 300, "🧿 " * 400])
def test_the_text_above_buttons_is_cut_to_instagrams_limit(words: str) -> None:
    built = build_message(None, event=event(), config=static(f"{words}[[CTA:Buy now|{LARCH.url}]]"))
    assert built.buttons == (LARCH,)
    assert len(built.text.encode("utf-16-le")) <= 2 * MAX_TEXT_CHARACTERS
    assert len(built.text.encode("utf-16-le")) > 2 * MAX_TEXT_CHARACTERS - 20
    assert words.startswith(built.text)
    assert "640 characters" in built.warnings[0]


@pytest.fixture
def graph(httpserver: HTTPServer) -> Iterator[GraphClient]:
    httpserver.expect_oneshot_request(f"/{ACCOUNT}/messages", method="POST").respond_with_json({"message_id": "m1"})
    with GraphClient(base_url=httpserver.url_for("/"), access_token="t", timeout_seconds=5) as client:
        yield client


def test_buttons_are_sent_as_metas_button_template(httpserver: HTTPServer, graph: GraphClient) -> None:
    config = static(f"Look: [[CTA:Buy now|{LARCH.url}]]")
    result = send_instagram_dm(None, event=event(), config=config, graph=graph, outbox=AtOnce())
    assert (result.message, result.buttons) == ("Look:", (LARCH,))
    assert json.loads(httpserver.log[0][0].data) == {
        "recipient": {"comment_id": COMMENT},
        "message": {
            "attachment": {
                "type": "template",
                "payload": {
                    "template_type": "button",
                    "text": "Look:",
                    "buttons": [{"type": "web_url", "url": LARCH.url, "title": "Buy now"}],
                },
            }
        },
    }


def test_a_model_may_write_buttons_with_the_shops_own_links(httpserver: HTTPServer, graph: GraphClient) -> None:
    text = f"It is £38. [[CTA:Buy now|{LARCH.url}]] [[CTA:Win|https://evil.example/]] [[CTA:Win http|http://evil.example/]]"
    model = ScriptedModel(text)
    result = send_instagram_dm(model, event=event(), config=about_products(), graph=graph, outbox=AtOnce())
    assert (result.message, result.buttons) == ("It is £38.", (LARCH,))
    assert b"evil" not in httpserver.log[0][0].data
    assert "[[CTA:Title|https://...]]" in model.prompts[0][0].content


@pytest.mark.parametrize(
    ("link", "known"),
    [
        ("https://shop.example/larch", True),
        ("https://SHOP.example/larch/", True),
        ("www.shop.example", True),
        ("https://shop.example", True),
        ("https://shop.exam", False),
        ("https://shop.example/lar", False),
        ("https://shop.example.evil.example/larch", False),
        ("http://shop.example/larch", False),
        ("https://shop.example/larch/other", False),
        ("shop.example/larch", True),
        ("shop.example/other", False),
        ("https://bare.example/x", True),
        ("http://bare.example/x", False),
        ("pay.evil.example/x", False),
        ("https:// evil.example/x", False),
        ("bit.ly/3xyz", False),
        ("tg://resolve?domain=evil", False),
        ("x1https://evil.example/", False),
    ],
)
def test_a_link_is_known_if_the_business_gave_it_or_a_page_below_it(link: str, known: bool) -> None:
    links = KnownLinks("See https://shop.example/larch. Or https://www.shop.example/x?y=1! Or bare.example/x")
    warnings: list[str] = []
    kept = without_foreign_links(f"At {link}!", links, warnings)
    assert (kept == f"At {link}!") is known
    assert "evil.example" not in kept
    assert kept.endswith("!")
    assert bool(warnings) is not known


@pytest.mark.parametrize(
    "text",
    ["e.g. 24/7 and/or 2.5/kg", "Node.js, tomorrow.We deliver", "a@shop.example/x", "U.S./EU", "٢.٥/kg", "x" * 20_000],
)
def test_text_without_a_link_is_not_changed(text: str) -> None:
    warnings: list[str] = []
    assert without_foreign_links(text, KnownLinks(), warnings) == text
    assert warnings == []
