"""The usage tracker and request holds on hosts with other names and other types of ids."""

from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.host.test_mapped_hosts import (  # noqa: F401 - two are fixtures
    USERS,
    mapped_host,
    mapping,
    subscribe,
)
from tests.support.books import assert_true
from tests.support.host import Host
from trueup.billing.decorators import ai_tokens
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.host.fields import UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_statement
from trueup.install.install import install
from trueup.settings.settings import get_settings
from trueup.usage.log import track_ai_usage

FIGURES = {"section": "chat", "prompt_tokens": 200, "completion_tokens": 100, "model_name": "m"}


def test_usage_is_recorded_once_under_the_hosts_names(mapped_host: Host, mapping: HostMapping) -> None:  # noqa: F811
    users = USERS[mapping.user_id_type]
    for number, user in enumerate(users, 1):
        subscribe(mapped_host, mapping, user, number)
    user = users[0]
    assert track_ai_usage(user, **FIGURES, key="it's :a %s").recorded
    again = track_ai_usage(user, **FIGURES, key="it's :a %s")
    assert (again.recorded, again.differs) == (False, False)
    assert track_ai_usage(user, **FIGURES | {"prompt_tokens": 5}, key="it's :a %s").differs
    assert track_ai_usage(user, **FIGURES, key="2", success=False, error_message="no answer").recorded
    with ai_tokens(user, 1_000) as hold:
        hold.charge(prompt_tokens=1, completion_tokens=1, model_name="m")
    assert get_accurate_tokens_remaining(user) == (10_000, 302, 9_698)
    assert get_accurate_tokens_remaining(users[1]) == (10_000, 0, 10_000)
    counters = render_statement(
        "SELECT {{ subscription.tokens_remaining }} FROM {{ subscription }} ORDER BY {{ subscription.id }}", mapping
    )
    assert list(mapped_host.connection.execute(counters).scalars()) == [9_698, 10_000]
    assert_true(mapped_host, mapping)


@pytest.fixture
def odd_error_host(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    named = HostMapping(usage_log=UsageLogTable(error_message='what " went :wrong'))
    monkeypatch.setenv("TRUEUP_HOST", named.model_dump_json())
    get_settings.cache_clear()
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, named, with_host_tables=True)
    with Host(engine) as host:
        yield host
    engine.dispose()


def test_the_hosts_column_for_errors_is_found_under_any_name(odd_error_host: Host) -> None:
    user = odd_error_host.subscriber()
    track_ai_usage(user, **FIGURES, key="1", success=False, error_message="no answer")
    row = odd_error_host.execute("SELECT * FROM ai_usage_log").mappings().one()
    assert row['what " went :wrong'] == "no answer"
    assert row["metadata"] == {"usage_key": "1"}


@pytest.mark.parametrize("column_type", ["json", "jsonb", "text"])
def test_without_a_column_for_errors_they_are_stored_in_metadata_of_any_type(host: Host, column_type: str) -> None:
    user = host.subscriber()
    host.execute("ALTER TABLE ai_usage_log ALTER metadata DROP DEFAULT, DROP error_message")
    host.execute(f"ALTER TABLE ai_usage_log ALTER metadata TYPE {column_type} USING metadata::text::{column_type}")
    assert track_ai_usage(user, **FIGURES, key="1", success=False, error_message="no answer").recorded
    said = host.value("SELECT metadata::text::jsonb FROM ai_usage_log")
    assert said == {"usage_key": "1", "error": "no answer"}
