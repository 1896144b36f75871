"""The page of `trueup drift report --format html`: whole, safe with anything a host writes, readable by machines."""

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.cli.conftest import trueup
from tests.support.drift_history import add_drift, add_run
from tests.support.host import Host
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reports.display import compact
from trueup.settings.settings import get_settings

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'-alert(3)-'",
    "</script><script>alert(4)</script>",
    "${7*7}",
    "% for x in y:",
    "javascript:alert(5)",
    "\u202egnp.exe",
)


class Page(HTMLParser):
    """What a browser would see of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def hostile_host(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host whose user ids are arbitrary texts."""
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, HostMapping(user_id_type="text"), with_host_tables=True)
    monkeypatch.setenv("TRUEUP_HOST__USER_ID_TYPE", "text")
    get_settings.cache_clear()
    with Host(engine) as host:
        run = add_run(host, checked=9, tokens_overstated=36)
        for number, user in enumerate(HOSTILE, 1):
            add_drift(host, run, user, 10 + number, 10, (HOSTILE[0], number), reason=user, action="review")
        yield host
    engine.dispose()


def page(*arguments: str) -> str:
    return trueup("drift", "report", "--format", "html", *arguments).stdout


def test_nothing_of_a_host_becomes_markup_or_script(hostile_host: Host) -> None:
    text = page()
    found = Page(text)
    assert [len(found.all(tag)) for tag in ("script", "style", "img", "iframe", "a", "link", "form")] == [1, 1] + [
        0
    ] * 5
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on") or name == "style"]
    assert "alert" not in "".join(found.text["script"])
    rows = [attributes for attributes in found.all("tr") if "data-text" in attributes]
    assert len(rows) == len(HOSTILE)
    shown = [attributes["data-value"] for attributes in found.all("th") if "data-value" in attributes]
    assert sorted(map(str, shown)) == sorted(HOSTILE)
    assert "\u202e" not in "".join(found.text["bdi"])


def test_the_pages_policy_allows_its_own_style_and_script_and_no_request(hostile_host: Host) -> None:
    text = page()
    [policy] = [meta["content"] for meta in Page(text).all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        content = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    found = Page(text)
    assert not {name for _, attributes in found.tags for name in attributes} & {"src", "href", "action", "srcset"}
    assert not re.findall(r"url\(|@import", "".join(found.text["style"]))


def test_markdown_and_csv_hold_any_user_id(hostile_host: Host) -> None:
    add_drift(hostile_host, 1, "a|b\n| c *d* `e`", 99, 10, action="review")
    shown = trueup("drift", "report", "--format", "markdown").stdout
    rows = [line for line in shown.partition("## Drifts")[2].splitlines() if line.startswith("|")]
    assert len(rows) == len(HOSTILE) + 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8}
    # Nothing of a user's id stands outside of code, where it would count.
    outside = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", shown)
    for live in ("<", "*d*", "javascript:"):
        assert live in shown
        assert live not in outside.replace("\\<", "")
    cells = list(csv.DictReader(io.StringIO(trueup("drift", "report", "--format", "csv").stdout)))
    assert {cell["user_id"] for cell in cells} >= {"a|b\n| c *d* `e`", HOSTILE[0]}


def test_the_page_has_the_content_of_the_report(host: Host) -> None:
    first = add_run(host, checked=100, tokens_overstated=300, tokens_understated=40)
    add_run(host, only_user="7", tokens_overstated=9_999)
    run = add_run(host, checked=12_345_678, tokens_overstated=5_000)
    add_drift(host, first, 1, 400, 100, ("missed_decrement", 300))
    add_drift(host, run, 2, None, 7_000, action="review", certainty="inferred")
    add_drift(host, run, 3, 6_000, 1_000, ("credit_without_grant", 5_000), action="review")
    text = page()
    found = Page(text)
    figures = "".join(found.text["dd"]).split("\n")[0]
    for figure in ("12.3 M", "5,000", "7,000", "41.7 %"):
        assert figure in figures
    assert found.text["title"][0] == f"Drift of {host.engine.url.database}, run {run}"
    # One group for each run over all users.
    assert len(found.all("g")) == 2
    headings = [head["data-kind"] for head in found.all("th") if head.get("data-kind")]
    assert headings == ["text", "number", "number", "number", "text", "text", "text", "number"]
    assert [row.get("class") for row in found.all("tr") if row.get("class")] == ["drift", "more"] * 2
    assert "null" in text
    assert "−7,000" in text


def test_a_page_without_drift_says_that_all_is_right(host: Host) -> None:
    add_run(host, checked=10)
    text = page()
    assert "every counter is right" in text
    assert 'id="drifts"' not in text
    assert "1 of" not in page("--since", "1m")


def test_every_row_beyond_the_bound_is_counted(host: Host) -> None:
    run = add_run(host)
    for user in range(4):
        add_drift(host, run, user, 10 + user, 10, ("missed_decrement", user))
    assert "2 of 4." in page("--rows", "2")


def test_the_page_is_readable_by_a_screen_reader(host: Host) -> None:
    add_drift(host, add_run(host, tokens_overstated=5), 1, 10, 5, ("missed_decrement", 5))
    found = Page(page())
    assert found.all("html")[0]["lang"] == "en"
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        for label in (attributes.get("aria-labelledby") or "").split():
            assert label in ids
    for svg in found.all("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    for head in found.all("th"):
        assert head["scope"] in ("col", "row")
    assert [p for p in found.all("p") if p.get("role") == "status"]


def test_the_title_has_the_hosts_own_name(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_NAME", "Kestrel & <Pine>")
    get_settings.cache_clear()
    run = add_run(host)
    assert Page(page()).text["title"][0] == f"Drift of Kestrel & <Pine>, run {run}"


def test_evidence_is_told_in_sentences(host: Host) -> None:
    drift = add_drift(host, add_run(host), 1, 900, 600, ("missed_decrement", 300))
    part = {
        "cause": "missed_decrement",
        "tokens": 300,
        "certainty": "proven",
        "count": 9,
        "note": "seen twice",
        "rows": [
            {"log_id": f"<{number}>", "tokens": 50, "created_at": "2024-11-02T12:00:00+00:00"} for number in range(6)
        ],
        "entries": [{"old": 1000, "new": 900, "at": "2024-11-02T11:00:00+00:00", "application_name": "django"}],
        "alternatives": ["lost_update"],
    }
    evidence = {"components": [part], "original": 1000, "consumed": 400, "plans_of_this_size": True, "in_flight": 0}
    host.execute(
        "UPDATE trueup.drift SET evidence = CAST(:e AS jsonb) WHERE id = :id", e=json.dumps(evidence), id=drift
    )
    text = page()
    for sentence in (
        "+300 tokens: the host logged usage, but did not subtract it from the counter; the journal of the counter",
        "Log row &lt;0&gt;: 50 tokens, at 2024-11-02 12:00:00 UTC.",
        "The counter changed from 1,000 to 900 at 2024-11-02 11:00:00 UTC by &#39;django&#39;.",
        "And 4 more.",
        "Note: seen twice.",
        "It may also be: lost update.",
        "Plan and grants: 1,000. Used: 400.",
        "Plans of this size: yes.",
    ):
        assert sentence in text
    assert "{&#34;" not in text
    assert "<pre>" not in text


def test_a_report_on_several_runs_counts_each_counter_once(host: Host) -> None:
    for _ in range(3):
        run = add_run(host, checked=200, started_at=datetime.now(UTC) - timedelta(hours=1))
        add_drift(host, run, 7, 110, 10, ("missed_decrement", 100))
    figures = "".join(Page(page("--since", "2h")).text["dd"])
    assert figures.startswith("200each in up to 3 runs10.5 % · 3 drifts, 3 new")


def test_bars_stand_at_their_true_place_in_time(host: Host) -> None:
    start = datetime(2024, 11, 2, tzinfo=UTC)
    for hours in (0, 1, 2, 8):
        add_run(host, started_at=start + timedelta(hours=hours), tokens_overstated=100)
    bars = [float(rect["x"] or 0) for rect in Page(page()).all("rect") if rect.get("class") == "o"]
    steps = [later - earlier for earlier, later in pairwise(bars)]
    assert steps == pytest.approx([steps[0], steps[0], 6 * steps[0]], abs=0.05)
    [dates] = re.findall(r'<div class="dates">(.*?)</div>', page())
    assert re.findall("<span>(.*?)</span>", dates) == ["2024-11-02 00:00", "2024-11-02 04:00", "2024-11-02 08:00"]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [(0, "0"), (9_999_999, "9,999,999"), (12_345_678, "12.3 M"), (4_500_000_000, "4.5 bn"), (2**63, "9,223,372.0 tn")],
)
def test_a_tile_holds_any_count(tokens: int, shown: str) -> None:
    assert compact(tokens) == shown


def test_a_drift_that_is_absurdly_large_is_shown(host: Host) -> None:
    run = add_run(host, tokens_overstated=2**62, started_at=datetime(2024, 1, 1, tzinfo=UTC))
    add_drift(host, run, 1, 2**62, 0, ("manual_edit", 2**62))
    assert f"{2**62:,}" in page()
