"""Sections are the host's own: any text that fits the column, or the values of its CHECK, enum or foreign key."""

import pytest
from sqlalchemy import Connection

from tests.support.host import Host
from tests.support.mapped import Remap
from trueup.billing.token_hold import ai_tokens
from trueup.database.engine import get_engine
from trueup.discovery import propose, read_catalog
from trueup.errors import InvalidInputError
from trueup.host.sections import usable_sections
from trueup.usage.tracker import track_ai_usage

LOG = "ALTER TABLE ai_usage_log"
ENUM = f"CREATE TYPE feature AS ENUM ('faq', 'it''s'); {LOG} ALTER section TYPE feature USING NULL"
KEY = (
    "CREATE TABLE kinds (name varchar(50) PRIMARY KEY); INSERT INTO kinds VALUES ('faq'), ('it''s'); "
    f"{LOG} ADD FOREIGN KEY (section) REFERENCES kinds"
)
ENUM_SETTINGS = "[host.usage_log]\nsection_type = 'feature'"


def report(user: int, section: str) -> None:
    track_ai_usage(user, section=section, prompt_tokens=1, completion_tokens=1, model_name="m", key=section)


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ("", f"{LOG} ADD CHECK (section IN ('faq', 'it''s'))", "Use one of faq, it's"),
        ("", f"{LOG} ADD CHECK (section IS NULL OR section = ANY (ARRAY['faq', 'it''s']))", "Use one of faq, it's"),
        ("", KEY, "Use one of faq, it's"),
        (ENUM_SETTINGS, ENUM, "Use one of faq, it's"),
        ("", f"{LOG} ALTER section TYPE varchar(4)", "Use at most 4 characters"),
    ],
)
def test_the_hosts_sections_are_taken_and_others_refused_before_any_work(
    host: Host,
    remap: Remap,
    settings: str,
    change: str,
    said: str,
) -> None:
    remap(settings, change)
    user = host.subscriber(1_000)
    for section in ("faq", "it's"):
        report(user, section)
        report(user, section)  # the second report finds the first
        with ai_tokens(user, 100, "Answers", section=section) as block:
            block.charge(prompt_tokens=5, completion_tokens=5, model_name="m")
    assert set(host.execute("SELECT section::text FROM ai_usage_log").scalars()) == {"faq", "it's"}
    assert host.value("SELECT count(*) FROM trueup.owed_charge") == 0
    with pytest.raises(InvalidInputError, match=f"ai_usage_log.section does not take 'billing'. {said}"):
        report(user, "billing")
    with pytest.raises(InvalidInputError, match="does not take 'billing'"), ai_tokens(user, 1, "A", section="billing"):
        pytest.fail("the block ran")
    assert host.value("SELECT count(*) FROM trueup.hold WHERE status = 'open'") == 0


def test_any_text_is_a_section_of_a_log_without_rules(host: Host) -> None:
    user = host.subscriber(1_000)
    report(user, "Rechnungen: täglich %s")
    assert host.value("SELECT section FROM ai_usage_log") == "Rechnungen: täglich %s"


def test_a_section_that_the_host_adds_is_taken_at_once(
    host: Host,
    connection: Connection,
    remap: Remap,
) -> None:
    mapping = remap("", KEY)
    user = host.subscriber(1_000)
    with pytest.raises(InvalidInputError):
        report(user, "new")
    host.execute("INSERT INTO kinds VALUES ('new')")
    report(user, "new")
    assert usable_sections(connection, mapping) == ["faq", "it's", "new"]


def test_discovery_names_the_enum_of_the_section(host: Host) -> None:
    for statement in ENUM.split("; "):
        host.execute(statement)
    with get_engine().connect() as connection:
        proposal = propose(connection, read_catalog(connection))
    assert proposal.settings["usage_log"] == {"section_type": "public.feature"}
