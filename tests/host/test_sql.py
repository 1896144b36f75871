"""SQL templates: the names that they may use, and the SQL that they get."""

import pytest
from jinja2 import TemplateRuntimeError

from trueup.host.fields import PaymentTable, SubscriptionTable, TokenPlanTable, UsageLogTable
from trueup.host.mapping import HostMapping
from trueup.host.sql import OwnTables, fields_read, render_sql, render_statement

CONSTANT_SECTION = HostMapping.model_validate({"usage_log": {"section": {"value": "chat"}}})


def test_a_field_that_may_be_no_column_needs_the_alias_of_a_row() -> None:
    with pytest.raises(TemplateRuntimeError, match=r"host\.usage_log\.section may be no column"):
        render_sql("l.{{ usage_log.section }}", HostMapping())
    asked = '{{ usage_log.section("l") }}, {{ usage_log.section() }}'
    assert render_sql(asked, HostMapping()) == 'l."section", "section"'
    assert render_sql(asked, CONSTANT_SECTION) == "CAST('chat' AS text), CAST('chat' AS text)"


def test_a_template_can_replace_a_column_that_the_host_lacks() -> None:
    asked = '{{ usage_log.section.column("l") or "p_section" }}'
    assert render_sql(asked, HostMapping()) == 'l."section"'
    assert render_sql(asked, CONSTANT_SECTION) == "p_section"


def test_a_template_can_test_whether_the_host_has_a_field() -> None:
    asked = (
        "{% if payment %}payments{% endif %} {% if usage_log.section %}sections{% endif %} "
        "{% if subscription.tokens_included %}own tokens{% endif %}"
    )
    assert render_sql(asked, HostMapping()).split() == ["sections"]
    assert render_sql(asked, CONSTANT_SECTION).split() == []
    mapping = HostMapping.model_validate({"payment": {"table": "p"}, "subscription": {"tokens_included": {"value": 5}}})
    assert render_sql(asked, mapping).split() == ["payments", "sections", "own", "tokens"]


def test_a_table_that_is_not_mapped_is_refused_or_is_a_subquery_without_rows() -> None:
    with pytest.raises(TemplateRuntimeError, match=r"host\.payment is not mapped"):
        render_sql("SELECT FROM {{ payment }}", HostMapping())
    without = HostMapping(token_plan=TokenPlanTable(table=None))
    assert "WHERE false" in render_sql("{{ token_plan }}", without)
    assert render_sql('{{ subscription.token_plan_id("s") }}', without) == "CAST(NULL AS text)"


def test_a_colon_in_a_name_begins_no_parameter() -> None:
    mapping = HostMapping(subscription=SubscriptionTable(table="a:b", user_id="c:d"))
    statement = render_statement("SELECT {{ subscription.user_id }} FROM {{ subscription }} WHERE 1 = :one", mapping)
    assert list(statement.compile().params) == ["one"]
    assert str(statement.compile()).startswith('SELECT "c:d" FROM "public"."a:b"')


def test_the_fields_that_a_template_reads_are_known() -> None:
    mapping = HostMapping(payment=PaymentTable(table="p"), usage_log=UsageLogTable(table="log"))
    template = (
        '{% from "host/rows.sql" import used_since %}{{ used_since(subscription.user_id, since) }}'
        "{% if usage_log.metadata %}{% endif %}"
    )
    assert set(fields_read([template], mapping, OwnTables(), since="now()")) == {
        ("subscription", "user_id"),
        *(("usage_log", field) for field in ("user_id", "success", "created_at", "total_tokens")),
    }
