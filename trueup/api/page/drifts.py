"""The page of one drift: what is known about its counter, and the form for a person's decision."""

from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.database.retry import retrying
from trueup.drift.causes import ACTION_SENTENCES, cause_title
from trueup.errors import InvalidInputError
from trueup.reports.display import show, signed
from trueup.reports.evidence import component_sentences, figure_sentences
from trueup.reports.user_report import CounterStory, report_counter
from trueup.review.decisions import Choice, Decision, ReviewItem, decide_drift, list_reviews
from trueup.settings.settings import Settings

CHOICES = ("accept", "grant", "ignore")
_USER = text("SELECT user_id FROM trueup.find_drift(:id)")


@dataclass(frozen=True, kw_only=True)
class DriftPage:
    """A drift with its user's counter. `item` None: it is not in review. `next` None: no other drift is in review."""

    user_id: UserId
    story: CounterStory
    item: ReviewItem | None
    next: int | None


def read_drift(settings: Settings, number: int) -> DriftPage | None:
    """Return a drift; None: there is none with this number. Raises `ServiceUnavailableError` or `NotInstalledError`."""

    def read(connection: Connection) -> DriftPage | None:
        user = connection.execute(_USER, {"id": number}).scalar_one_or_none()
        if user is None:
            return None
        kind = settings.host.user_id_type
        story = report_counter(connection, settings.host, user, rules=settings.reconcile.rules())
        items = list_reviews(connection, kind, user_id=user)
        others = [item.id for item in list_reviews(connection, kind, limit=2) if item.id != number]
        item = next((item for item in items if item.id == number), None)
        return DriftPage(user_id=user, story=story, item=item, next=others[0] if others else None)

    return retrying(read)


def decide(number: int, form: dict[str, str], operator: str) -> Decision:
    """Make the decision of a form. Idempotent. Raises `InvalidInputError` or `DecisionRefusedError`."""
    choice, component = form.get("choice", ""), form.get("component", "")
    if choice not in CHOICES:
        raise InvalidInputError("choice: choose accept, grant or ignore.")
    if component and not (component.isascii() and component.isdigit() and len(component) < 5):
        raise InvalidInputError("component: choose one of the list.")
    return retrying(
        lambda connection: decide_drift(
            connection,
            number,
            cast(Choice, choice),
            by=operator,
            note=form.get("note", ""),
            reference=form.get("reference", "").strip() or None if choice == "grant" else None,
            component=int(component) if component else None,
        )
    )


def values_of(page: DriftPage, number: int) -> dict[str, Any]:
    """Return the values of the page's template."""
    story, item = page.story, page.item
    row = next((row for row in story.past if row.drift_id == number), None)
    evidence = item.evidence if item else row.evidence if row else {}
    components = evidence.get("components") or []
    return {
        "number": number,
        "user": str(page.user_id),
        "item": item,
        "next": page.next,
        "action": ACTION_SENTENCES.get(row.action, row.action).replace("`", "") if row else "",
        "decided": [one for one in story.decisions if one.drift_id == number],
        "figures": [
            ("plan and grants", show(story.original)),
            ("used, by the usage log", show(story.consumed)),
            ("the counter should show", show(story.expected)),
            ("the counter shows", "null" if story.observed is None else show(story.observed)),
        ],
        "choices": _choices(item) if item else [],
        # The causes of a drift without a journal can't be decided one by one.
        "components": [
            (place, show(f"{place}: {cause_title(one['cause'])} {signed(one['tokens'])}"))
            for place, one in enumerate(components, 1)
        ]
        if len(components) > 1 and "journal" in evidence
        else [],
        "parts": [component_sentences(one) for one in components],
        "others": figure_sentences(evidence),
        "told": story.told,
    }


def _choices(item: ReviewItem) -> list[tuple[str, str]]:
    """Return the choices that are possible, each with its effect."""
    counter = "null" if item.counter is None else show(item.counter)
    found = [("accept", f"correct the counter, {counter} → {show(item.expected)}.")]
    if item.tokens_to_grant is not None:
        found.append(("grant", f"give the user {show(item.tokens_to_grant)} tokens; the counter is then right."))
    found.append(("ignore", "leave this difference as it is while it does not change, until the user's next period."))
    return found
