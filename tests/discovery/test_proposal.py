"""Discovery finds a host's tables by the catalog, under any names, and names missing ones."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from trueup.discovery import Proposal, propose, read_catalog
from trueup.discovery.match_columns import nearness, plain
from trueup.discovery.toml import host_section, merged, read_host
from trueup.errors import InvalidInputError
from trueup.host.catalog import missing_host_columns, missing_host_tables
from trueup.host.fields import PaymentTable, SubscriptionTable, TokenUsageTable
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata

BOOKS = {"token_usage": TokenUsageTable(table="billing_tokenusage"), "payment": PaymentTable(table="billing_payment")}

# A host without Django: uuid user ids, one kind of plan, a partitioned log, its own names.
UUID_HOST = """
    CREATE SCHEMA app;
    CREATE TABLE app.customers (id uuid PRIMARY KEY, name text, email text);
    CREATE TABLE app.plans (id int PRIMARY KEY, title text, tokens_per_month bigint, period_days int, active boolean);
    CREATE TABLE app.memberships (
        id uuid PRIMARY KEY, customer_id uuid UNIQUE REFERENCES app.customers, plan_id int REFERENCES app.plans,
        started_at timestamptz NOT NULL, expires_at timestamptz, tokens_left bigint, enabled boolean);
    CREATE TABLE app.llm_calls (
        call_id uuid DEFAULT gen_random_uuid(), customer_id uuid NOT NULL, feature text, input_tokens int,
        output_tokens int, tokens int NOT NULL, latency_ms int, succeeded boolean, model text,
        extra jsonb, called_at timestamptz NOT NULL,
        PRIMARY KEY (call_id, called_at)) PARTITION BY RANGE (called_at);
    CREATE TABLE app.ai_usage_log PARTITION OF app.llm_calls DEFAULT;
    CREATE INDEX ON app.llm_calls (customer_id, called_at);
    CREATE TABLE app.sessions (
        id int PRIMARY KEY, customer_id uuid UNIQUE REFERENCES app.customers, hits int, at timestamptz);
    CREATE TABLE app.audit (id int PRIMARY KEY, customer_id uuid, bytes int, created_at timestamptz);
"""
UUID_MAPPING = {
    "user_id_type": "uuid",
    "user": {"table": "app.customers", "username": "name"},
    "token_plan": {
        "table": "app.plans", "name": "title", "tokens_included": "tokens_per_month", "is_active": "active"
    },
    "full_plan": {
        "table": "app.plans", "name": "title", "tokens_included": "tokens_per_month", "is_active": "active",
        "duration_days": "period_days"
    },
    "subscription": {
        "table": "app.memberships", "user_id": "customer_id", "token_plan_id": "plan_id", "full_plan_id": "plan_id",
        "start_date": "started_at", "end_date": "expires_at", "tokens_remaining": "tokens_left", "is_active": "enabled"
    },
    "usage_log": {
        "table": "app.llm_calls", "id": "call_id", "user_id": "customer_id", "section": "feature",
        "prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "tokens",
        "response_time_ms": "latency_ms", "success": "succeeded", "model_name": "model", "metadata": "extra",
        "created_at": "called_at"
    },
}  # fmt: skip

CAMEL_HOST = """
    CREATE SCHEMA "Acme AI";
    CREATE TABLE "Acme AI"."Users" ("Id" text PRIMARY KEY, "UserName" text, "Email" text);
    CREATE TABLE "Acme AI"."TokenPacks" ("Id" int PRIMARY KEY, "Name" text, "Tokens" int, "IsActive" bool);
    CREATE TABLE "Acme AI"."Plans" (
        "Id" int PRIMARY KEY, "Name" text, "Tokens" int, "DurationDays" int, "IsActive" bool);
    CREATE TABLE "Acme AI"."UserSubscriptions" (
        "Id" int PRIMARY KEY, "UserId" text UNIQUE REFERENCES "Acme AI"."Users",
        "PackId" int REFERENCES "Acme AI"."TokenPacks", "PlanId" int REFERENCES "Acme AI"."Plans",
        "StartsAt" timestamptz, "EndsAt" timestamptz, "TokenBalance" int, "IsActive" bool);
    CREATE TABLE "Acme AI"."AiRequests" (
        "Id" varchar(40) PRIMARY KEY, "UserId" text REFERENCES "Acme AI"."Users", "Category" text, "PromptTokens" int,
        "CompletionTokens" int, "TotalTokens" int, "DurationMs" int, "Success" bool, "Model" text, "Error" text,
        "Meta" jsonb, "CreatedAt" timestamptz);
"""
CAMEL_SUBSCRIPTION = {
    "table": "Acme AI.UserSubscriptions", "id": "Id", "user_id": "UserId", "token_plan_id": "PackId",
    "full_plan_id": "PlanId", "start_date": "StartsAt", "end_date": "EndsAt", "tokens_remaining": "TokenBalance",
    "is_active": "IsActive",
}  # fmt: skip


@pytest.fixture
def catalog_of(empty_database: str) -> Iterator[Connection]:
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.connect() as connection:
        yield connection.execution_options(isolation_level="AUTOCOMMIT")
    engine.dispose()


def discovered(connection: Connection, *schemas: str) -> Proposal:
    return propose(connection, read_catalog(connection, schemas))


def script(connection: Connection, statements: str) -> None:
    connection.exec_driver_sql(statements)


def certainties(proposal: Proposal) -> dict[str, str]:
    return {choice.setting: choice.certainty for choice in proposal.choices}


@pytest.mark.parametrize(
    "mapping",
    [
        HostMapping(),
        HostMapping(**BOOKS),  # type: ignore[arg-type]
        HostMapping(user_id_type="uuid"),
        HostMapping(user_id_type="text", usage_log_id_type="text"),
    ],
    ids=["bigint", "with books", "uuid", "text"],
)
def test_djangos_default_names_are_found_and_certain(catalog_of: Connection, mapping: HostMapping) -> None:
    build_host_metadata(mapping).create_all(catalog_of)
    proposal = discovered(catalog_of)
    assert proposal.mapping == mapping
    assert set(certainties(proposal).values()) == {"certain"}
    assert not [gap for gap in proposal.gaps if gap.stops]


def test_a_host_with_other_names_is_found_by_names_types_and_keys(catalog_of: Connection) -> None:
    script(catalog_of, UUID_HOST)
    proposal = discovered(catalog_of)
    assert proposal.settings == UUID_MAPPING
    assert proposal.mapping == HostMapping.model_validate(UUID_MAPPING)
    sure = certainties(proposal)
    assert sure["host.subscription.user_id"] == "certain"
    assert sure["host.usage_log.table"] == sure["host.subscription.tokens_remaining"] == "likely"
    why = {choice.setting: choice.why for choice in proposal.choices}
    assert "foreign key" in why["host.user.table"]
    assert "one kind of plan" in why["host.subscription.token_plan_id"]
    assert {gap.setting for gap in proposal.gaps if gap.stops == "everything"} == set()
    assert [gap.setting for gap in proposal.gaps if gap.stops] == ["host.usage_log.error_message"]


# Model names with Django's labels, and further tables that have a user, a number and a time too.
LABELLED_HOST = """
    CREATE TABLE auth_user (id serial PRIMARY KEY, username text, email text, is_active bool, date_joined timestamptz);
    CREATE TABLE django_admin_log (
        id serial PRIMARY KEY, action_time timestamptz, action_flag smallint, user_id int REFERENCES auth_user);
    CREATE TABLE profiles_profile (
        id serial PRIMARY KEY, user_id int UNIQUE REFERENCES auth_user, points int, created_at timestamptz);
    CREATE TABLE coupons_coupon (id serial PRIMARY KEY, tokens int);
    CREATE TABLE subs_plan (id serial PRIMARY KEY, name text, tokens int, is_active bool);
    CREATE TABLE subs_usersubscription (
        id serial PRIMARY KEY, user_id int UNIQUE REFERENCES auth_user, plan_id int REFERENCES subs_plan,
        coupon_id int REFERENCES coupons_coupon, start_date timestamptz, end_date timestamptz, tokens_left int,
        messages_left int, is_active bool, created_at timestamptz);
    CREATE TABLE assistant_aiusage (
        id bigserial PRIMARY KEY, user_id int REFERENCES auth_user, prompt_tokens int, total_tokens int, success bool,
        created_at timestamptz);
    CREATE TABLE ai_usage_log (
        id serial PRIMARY KEY, user_id int UNIQUE REFERENCES auth_user, prompt_tokens int, completion_tokens int,
        total_tokens int, success bool, model_name text, created_at timestamptz);
    CREATE TABLE news_subscription (id serial PRIMARY KEY, user_id int REFERENCES auth_user, letter text);
    CREATE TABLE news_tokendeduction (
        id serial PRIMARY KEY, subscription_id int REFERENCES news_subscription, amount int, created_at timestamptz);
    CREATE TABLE shop_payment (
        id serial PRIMARY KEY, user_id int REFERENCES auth_user, plan_id int REFERENCES subs_plan, status text,
        transaction_id text, payment_date timestamptz);
"""


def test_a_django_application_with_its_own_labels_is_found_among_djangos_tables(catalog_of: Connection) -> None:
    script(catalog_of, LABELLED_HOST)
    proposal = discovered(catalog_of)
    tables = {noun: names["table"] for noun, names in proposal.settings.items() if "table" in names}
    assert tables == {
        "user": "auth_user",
        "token_plan": "subs_plan",
        "full_plan": "subs_plan",
        "subscription": "subs_usersubscription",
        "usage_log": "assistant_aiusage",
    }
    assert proposal.settings["subscription"]["tokens_remaining"] == "tokens_left"
    assert certainties(proposal)["host.usage_log.table"] == "likely"
    # Payments need a plan's duration: a mapping with payments alone would be refused.
    (left_out,) = [gap for gap in proposal.gaps if gap.setting == "host.payment.table"]
    assert "no column was found for host.full_plan.duration_days" in left_out.why


def test_names_of_any_case_and_schema_are_found(catalog_of: Connection) -> None:
    script(catalog_of, CAMEL_HOST)
    mapping = discovered(catalog_of).mapping
    assert mapping is not None
    assert (mapping.user_id_type, mapping.usage_log_id_type) == ("text", "text")
    assert mapping.subscription.model_dump(exclude_none=True) == CAMEL_SUBSCRIPTION
    assert (mapping.token_plan.table, mapping.full_plan.table) == ("Acme AI.TokenPacks", "Acme AI.Plans")
    assert (mapping.usage_log.table, mapping.usage_log.metadata) == ("Acme AI.AiRequests", "Meta")
    assert (mapping.user.table, mapping.user.username) == ("Acme AI.Users", "UserName")


def test_an_installation_accepts_the_proposed_mapping(catalog_of: Connection) -> None:
    script(catalog_of, CAMEL_HOST)
    mapping = discovered(catalog_of).mapping
    assert mapping is not None
    assert missing_host_tables(catalog_of, mapping) == missing_host_columns(catalog_of, mapping) == []


def test_only_the_given_schemas_are_searched(catalog_of: Connection) -> None:
    build_host_metadata(HostMapping()).create_all(catalog_of)
    script(catalog_of, UUID_HOST)
    # trueup's own tables are never the host's.
    script(catalog_of, "CREATE SCHEMA trueup; CREATE TABLE trueup.ai_usage_log (LIKE ai_usage_log INCLUDING ALL)")
    # Django's default names come first.
    assert discovered(catalog_of).mapping == HostMapping()
    assert certainties(discovered(catalog_of))["host.usage_log.table"] == "certain"
    assert discovered(catalog_of, "app").settings == UUID_MAPPING
    assert discovered(catalog_of, "app", "public").mapping == HostMapping()
    with pytest.raises(InvalidInputError, match="schema: the database has no schema 'App'"):
        read_catalog(catalog_of, ["App"])


def test_the_proposal_for_an_empty_database_names_every_gap_and_its_remedy(catalog_of: Connection) -> None:
    proposal = discovered(catalog_of)
    assert proposal.mapping is None
    assert (proposal.choices, proposal.settings) == ([], {})
    stopping = {gap.setting: gap.remedy for gap in proposal.gaps if gap.stops == "everything"}
    assert set(stopping) == {
        f"host.{noun}.table" for noun in ("user", "token_plan", "full_plan", "subscription", "usage_log")
    }
    assert "under [host.usage_log]" in stopping["host.usage_log.table"]


@pytest.mark.parametrize(
    ("change", "setting", "said"),
    [
        ("DROP success", "host.usage_log.success", "no column like success"),
        ("ALTER success DROP DEFAULT, ALTER success TYPE text", "host.usage_log.success", "success is of type text"),
        # Neither prompt or completion tokens nor another number count as the total.
        (
            "ALTER total_tokens DROP DEFAULT, ALTER total_tokens TYPE numeric",
            "host.usage_log.total_tokens",
            "its total_tokens is of type numeric",
        ),
        (
            "DROP total_tokens, ADD http_status integer",
            "host.usage_log.total_tokens",
            "no column with the sum of prompt_tokens and completion_tokens",
        ),
    ],
)
def test_a_missing_required_column_is_named(catalog_of: Connection, change: str, setting: str, said: str) -> None:
    build_host_metadata(HostMapping()).create_all(catalog_of)
    script(catalog_of, f"ALTER TABLE ai_usage_log {change}")
    proposal = discovered(catalog_of)
    found = {gap.setting: gap.why for gap in proposal.gaps if gap.stops == "everything"}
    assert proposal.mapping is None
    assert said in found[setting]


def test_a_counter_or_a_quota_with_an_unknown_name_is_never_guessed(catalog_of: Connection) -> None:
    build_host_metadata(HostMapping()).create_all(catalog_of)
    script(catalog_of, "ALTER TABLE billing_subscription RENAME tokens_remaining TO guthaben")
    script(catalog_of, "ALTER TABLE billing_tokenplan RENAME tokens_included TO punkte")
    asked = discovered(catalog_of)
    assert asked.mapping is None
    assert {gap.setting for gap in asked.gaps if gap.stops == "everything"} == {
        "host.subscription.tokens_remaining",
        "host.token_plan.tokens_included",
    }
    answers = {"subscription": {"tokens_remaining": "guthaben"}, "token_plan": {"tokens_included": "punkte"}}
    assert propose(catalog_of, read_catalog(catalog_of), answers).settings == answers


def test_two_plans_of_one_subscription_are_asked_about(catalog_of: Connection) -> None:
    build_host_metadata(HostMapping()).create_all(catalog_of)
    script(
        catalog_of,
        "INSERT INTO accounts_user (username, email) VALUES ('ann', ''); "
        "INSERT INTO billing_tokenplan (name, tokens_included) VALUES ('pack', 20000); "
        "INSERT INTO billing_fullplan (name, tokens_included, duration_days) VALUES ('trial', 15000, 7); "
        "INSERT INTO billing_subscription (user_id, token_plan_id, full_plan_id, start_date) "
        "SELECT u.id, t.id, f.id, now() FROM accounts_user u, billing_tokenplan t, billing_fullplan f",
    )
    asked = discovered(catalog_of)
    [gap] = [gap for gap in asked.gaps if gap.stops == "everything"]
    assert (asked.mapping, gap.setting) == (None, "host.subscription.tokens_included")
    for rule in ("sum", "first"):
        given = SubscriptionTable.model_validate({"tokens_included": rule}).model_dump(exclude_unset=True)
        answered = propose(catalog_of, read_catalog(catalog_of), {"subscription": given})
        assert read_host(host_section(answered.settings)) == answered.mapping
        assert answered.mapping is not None
        assert answered.mapping.subscription.plans == rule


def test_two_equally_good_tables_are_a_guess(catalog_of: Connection) -> None:
    script(catalog_of, UUID_HOST)
    script(catalog_of, "CREATE TABLE app.ai_calls (LIKE app.llm_calls INCLUDING ALL)")
    tables = {choice.setting: choice for choice in discovered(catalog_of).choices}
    log = tables["host.usage_log.table"]
    assert log.certainty == "guess"
    assert "would fit nearly as well" in log.why


def test_obstacles_are_named_with_their_remedies(catalog_of: Connection) -> None:
    build_host_metadata(HostMapping(**BOOKS)).create_all(catalog_of)  # type: ignore[arg-type]
    script(
        catalog_of,
        """
        ALTER TABLE billing_subscription DROP CONSTRAINT billing_subscription_user_id_key,
            ALTER start_date TYPE timestamp;
        DROP INDEX ai_usage_log_user_created;
        ALTER TABLE ai_usage_log ALTER id DROP DEFAULT;
        ALTER TABLE ai_usage_log DROP id, ADD id bigint PRIMARY KEY, ADD tenant int NOT NULL;
        CREATE TABLE "odd.name" (id int);
        """,
    )
    proposal = discovered(catalog_of)
    notes = "\n".join(proposal.notes)
    for said in (
        "billing_subscription.user_id is not unique",
        'CREATE INDEX CONCURRENTLY ON "public"."ai_usage_log" ("user_id", "created_at");',
        "ai_usage_log.id is bigint and has no default",
        "ai_usage_log.tenant: each row must have a value",
        "billing_subscription.start_date has no time zone",
        "billing_payment.status: trueup could not tell which value marks a completed payment",
        '"public"."odd.name" was left out',
    ):
        assert said in notes
    assert proposal.mapping == HostMapping(**BOOKS, usage_log_id_type="bigint")  # type: ignore[arg-type]
    script(catalog_of, "ALTER TABLE ai_usage_log ALTER id ADD GENERATED BY DEFAULT AS IDENTITY")
    assert "ai_usage_log.id" not in "\n".join(discovered(catalog_of).notes)


def test_the_word_for_a_paid_payment_comes_from_its_rows_or_its_type(catalog_of: Connection) -> None:
    build_host_metadata(HostMapping(**BOOKS)).create_all(catalog_of)  # type: ignore[arg-type]
    script(catalog_of, "INSERT INTO accounts_user VALUES (1, 'u', 'e')")
    pay = "INSERT INTO billing_payment (user_id, status) VALUES (1, '{}')"
    for status in ("new", "Paid"):
        script(catalog_of, pay.format(status))
    mapping = discovered(catalog_of).mapping
    assert mapping is not None
    assert mapping.payment.completed_status == "Paid"
    # With two fitting words a person decides.
    script(catalog_of, pay.format("completed"))
    assert "could not tell which value" in "\n".join(discovered(catalog_of).notes)
    script(
        catalog_of,
        "TRUNCATE billing_payment; CREATE TYPE state AS ENUM ('open', 'succeeded');"
        "ALTER TABLE billing_payment ALTER status TYPE state USING 'open'",
    )
    assert discovered(catalog_of).settings["payment"]["completed_status"] == "succeeded"


def test_no_row_is_shown_and_none_is_needed(catalog_of: Connection) -> None:
    """A role without rights still gets the mapping, and the grants that it needs."""
    build_host_metadata(HostMapping(**BOOKS)).create_all(catalog_of)  # type: ignore[arg-type]
    role = f"blind_{catalog_of.engine.url.database}"
    script(catalog_of, "INSERT INTO accounts_user VALUES (1, 'secret name', 'e')")
    script(catalog_of, "INSERT INTO billing_payment (user_id, status) VALUES (1, 'secret status')")
    assert "secret" not in str(discovered(catalog_of))
    script(catalog_of, f"CREATE ROLE {role}")
    try:
        script(catalog_of, f"SET ROLE {role}")
        proposal = discovered(catalog_of)
        assert proposal.mapping == HostMapping(**BOOKS)  # type: ignore[arg-type]
        assert f'GRANT SELECT ON "public"."ai_usage_log" TO "{role}";' in "\n".join(proposal.notes)
    finally:
        script(catalog_of, f"RESET ROLE; DROP ROLE {role}")


def test_totals_that_are_not_sums_are_questioned(catalog_of: Connection) -> None:
    build_host_metadata(HostMapping()).create_all(catalog_of)
    script(catalog_of, "INSERT INTO accounts_user VALUES (1, 'u', 'e')")
    add = (
        "INSERT INTO ai_usage_log (user_id, section, prompt_tokens, completion_tokens, total_tokens) "
        "VALUES (1, 'chat', 10, 5, {})"
    )
    script(catalog_of, add.format(15))
    assert "not the sum" not in "\n".join(discovered(catalog_of).notes)
    for total in (3, 4):
        script(catalog_of, add.format(total))
    assert "ai_usage_log.total_tokens is not the sum of prompt_tokens and completion_tokens" in "\n".join(
        discovered(catalog_of).notes
    )


@pytest.mark.parametrize(
    ("name", "is_like"),
    [("tokensLeft", "tokens_left"), ("Tokens Left", "tokens_left"), ("AIUsageLog", "ai_usage_log"), ("id", "id")],
)
def test_a_name_is_compared_by_its_words(name: str, is_like: str) -> None:
    assert plain(name) == is_like


def test_djangos_name_fits_best_and_an_unknown_name_does_not_fit() -> None:
    names = ("tokens_left", "balance")
    near = ("tokens_remaining", "TokensRemaining", "tokens_left", "balance", "my_tokens_left", "tokens_remainin")
    scores = [nearness(name, "tokens_remaining", names)[0] for name in near]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 1
    assert scores[-1] > nearness("height", "tokens_remaining", names)[0] == 0


SETTINGS: dict[str, Any] = {"user_id_type": "uuid", "usage_log": {"table": 'My "App".log', "id": "\\x\x7fü"}}
SECTION = host_section(SETTINGS, ["one\ntwo"])


def test_the_section_has_the_found_settings() -> None:
    assert read_host(SECTION) == HostMapping.model_validate(SETTINGS)
    assert SECTION.startswith("[host]\n# one\n# two\n")
    assert read_host(host_section({})) == HostMapping()


def test_a_file_keeps_its_other_sections_and_comments() -> None:
    others = '# mine\nhome = "x" # here\n\n[reconcile]\ntolerance = 5\n'
    assert merged(others, SECTION, force=False) == f"{others}\n{SECTION}"
    assert merged("", SECTION, force=False) == SECTION
    around = "[host]\n# old\nid = 'x'\n# old\n[host.'user']\nid = '[x]'\n# kept\n\n"
    around += '[reconcile.policies]\n[ "host" . payment ]\n'
    with pytest.raises(InvalidInputError, match=r"has a \[host\] already.*--force"):
        merged(around, SECTION, force=False)
    again = merged(f"{others}\n{around}", SECTION, force=True)
    assert again == f"{others}\n# kept\n\n[reconcile.policies]\n\n{SECTION}"
    assert merged(again, SECTION, force=True) == again


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("home = ", "not TOML"),
        ("host.user_id_type = 'uuid'\n", "section of its own"),
        ("host = {user_id_type = 'uuid'}\n", "section of its own"),
        ("[host]\n[reconcile]\nnote = '''\n[host]\nkeep\n'''\n", "section of its own"),
    ],
)
def test_a_file_that_can_not_be_changed_safely_is_refused(content: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        merged(content, SECTION, force=True)
