from pathlib import Path

import pytest

from trueup.errors import SettingsError
from trueup.settings.settings import (
    Settings,
    broker_url,
    database_url,
    get_settings,
    read_settings,
    result_backend_url,
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def refusal() -> str:
    with pytest.raises(SettingsError) as refused:
        read_settings()
    return str(refused.value)


def test_with_no_settings_at_all_everything_has_a_default(tmp_path: Path) -> None:
    settings = read_settings()
    assert settings.database_url is None
    assert settings.home == tmp_path / "data" / "trueup"
    assert settings.host.subscription.table == "billing_subscription"


def test_a_variable_comes_before_the_file_and_the_file_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trueup.toml").write_text("worker_concurrency = 7\nhold_ttl_seconds = 999\n")
    monkeypatch.setenv("TRUEUP_WORKER_CONCURRENCY", "3")
    settings = read_settings()
    assert (settings.worker_concurrency, settings.hold_ttl_seconds) == (3, 999)
    assert settings.statement_timeout_seconds == 30


def test_the_file_may_be_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("worker_concurrency = 7")
    monkeypatch.setenv("TRUEUP_CONFIG", str(tmp_path / "other.toml"))
    assert read_settings().worker_concurrency == 7


def test_a_file_that_was_asked_for_and_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silently taking the defaults would run against another database."""
    monkeypatch.setenv("TRUEUP_CONFIG", "/nowhere/trueup.toml")
    assert "/nowhere/trueup.toml" in refusal()


@pytest.mark.parametrize("content", [b"worker_concurrency =", b"[host", b"\xff\xfe\x00"])
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trueup.toml").write_bytes(content)
    assert "trueup.toml cannot be read" in refusal()


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("TRUEUP_DATABSE_URL", "Did you mean TRUEUP_DATABASE_URL?"),
        ("TRUEUP_HOLD_TTL", "Did you mean TRUEUP_HOLD_TTL_SECONDS?"),
        ("TRUEUP_ZZZ", "`trueup settings` lists the settings"),
    ],
)
def test_an_unknown_variable_is_refused_and_the_nearest_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, hint: str
) -> None:
    monkeypatch.setenv(variable, "1")
    message = refusal()
    assert variable in message
    assert hint in message


def test_an_unknown_name_in_the_file_is_refused_and_the_nearest_named(tmp_path: Path) -> None:
    (tmp_path / "trueup.toml").write_text("worker_concurency = 2")
    message = refusal()
    assert "worker_concurency" in message
    assert "worker_concurrency" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKER_CONCURRENCY", "0"),
        ("WORKER_CONCURRENCY", "many"),
        ("LOG_LEVEL", "LOUD"),
        ("STORE_ANSWERS", "perhaps"),
        ("MODEL_TIMEOUT_SECONDS", "-1"),
        ("DATABASE_URL", "mysql://localhost/x"),
        ("DATABASE_URL", "localhost"),
        ("DATABASE_URL", "postgresql://user@host:port/name"),
        ("BROKER_URL", "amqp://localhost"),
        ("HOST", "not json"),
        ("HOST__USER_ID_TYPE", "varchar"),
    ],
)
def test_a_malformed_value_is_refused_by_the_settings_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"TRUEUP_{name}", value)
    assert name.split("__")[0].lower() in refusal().lower()


def test_a_model_provider_that_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings().model_provider is None
    monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "")
    assert read_settings().model_provider is None
    monkeypatch.setenv("TRUEUP_MODEL_PROVIDER", "opneai")
    assert "'offline' or 'openai'" in refusal()


@pytest.mark.parametrize(("name", "value"), [("TASK_TIME_LIMIT_SECONDS", "1200"), ("HOLD_TTL_SECONDS", "600")])
def test_a_task_may_not_outlive_its_hold(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"TRUEUP_{name}", value)
    assert "TASK_TIME_LIMIT_SECONDS" in refusal()
    assert "hold_ttl_seconds" in refusal()
    monkeypatch.setenv("TRUEUP_HOLD_TTL_SECONDS", "1201")
    assert read_settings().hold_ttl_seconds == 1201


def test_a_refusal_does_not_repeat_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "mysql://me:s3cret@localhost/x")
    assert "s3cret" not in refusal()
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://me:s3cret@localhost:port/x")
    assert "s3cret" not in refusal()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_the_usual_database_urls_name_our_driver(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("TRUEUP_DATABASE_URL", f"{scheme}://me:p%40ss@db:5433/app?sslmode=require")
    assert read_settings().database_url == "postgresql+psycopg://me:p%40ss@db:5433/app?sslmode=require"


def test_the_hosts_names_come_from_the_file_or_from_nested_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trueup.toml").write_text(
        '[host]\nuser_id_type = "uuid"\n[host.subscription]\ntable = "app.Subs"\ntokens_remaining = "left over"\n'
    )
    monkeypatch.setenv("TRUEUP_HOST__USAGE_LOG__TABLE", "app.log")
    host = read_settings().host
    assert (host.user_id_type, host.subscription.table, host.subscription.tokens_remaining) == (
        "uuid",
        "app.Subs",
        "left over",
    )
    assert host.usage_log.table == "app.log"
    assert host.user.table == "accounts_user"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('[host.subscripton]\ntable = "x"', ("host.subscripton", "host.subscription")),
        ('[host.subscription]\ntabel = "x"', ("host.subscription.tabel", "host.subscription.table")),
        ('[host.subscription]\ntable = ""', ("host.subscription.table",)),
        ('[host.subscription]\ntable = "a.b.c"', ("host.subscription.table",)),
        (f'[host.usage_log]\nsuccess = "{"x" * 64}"', ("host.usage_log.success",)),
        ('host = "public"', ("host",)),
    ],
)
def test_a_malformed_mapping_names_the_field(tmp_path: Path, content: str, named: tuple[str, ...]) -> None:
    (tmp_path / "trueup.toml").write_text(content)
    message = refusal()
    assert [name for name in named if name not in message] == []


def test_settings_are_read_once_until_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    get_settings.cache_clear()
    first = get_settings()
    monkeypatch.setenv("TRUEUP_WORKER_CONCURRENCY", "9")
    assert get_settings() is first
    get_settings.cache_clear()
    assert get_settings().worker_concurrency == 9
    get_settings.cache_clear()


def test_without_a_url_the_running_embedded_stacks_is_taken(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for read in (database_url, broker_url):
        with pytest.raises(SettingsError, match="trueup up"):
            read(settings)
    settings.stack_file.parent.mkdir(parents=True)
    settings.stack_file.write_text('{"database_url": "postgresql+psycopg:///x", "broker_url": "redis://h/0"}')
    assert database_url(settings) == "postgresql+psycopg:///x"
    assert broker_url(settings) == result_backend_url(settings) == "redis://h/0"
    settings.stack_file.write_text("{half")
    with pytest.raises(SettingsError, match="trueup up"):
        database_url(settings)


def test_a_url_that_is_set_comes_before_the_embedded_stacks(tmp_path: Path) -> None:
    settings = Settings(
        home=tmp_path, database_url="postgresql://db/x", broker_url="redis://r", result_backend_url="redis://b"
    )
    settings.stack_file.parent.mkdir(parents=True)
    settings.stack_file.write_text('{"database_url": "no", "broker_url": "no"}')
    assert database_url(settings) == "postgresql+psycopg://db/x"
    assert (broker_url(settings), result_backend_url(settings)) == ("redis://r", "redis://b")


def test_the_rules_of_reconciling_are_settings_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "trueup.toml").write_text(
        '[reconcile]\ntolerance = 5\n[reconcile.policies]\nmissed_decrement = "review"\n'
    )
    monkeypatch.setenv("TRUEUP_RECONCILE__MAX_CORRECTION", "1000")
    monkeypatch.setenv("TRUEUP_RECONCILE__POLICIES__CHARGED_NOT_LOGGED", "correct")
    rules = read_settings().reconcile.rules()
    assert (rules.max_correction, rules.tolerance, rules.min_age_seconds) == (1_000, 5, 60)
    assert [rules.policy_of(cause) for cause in ("missed_decrement", "charged_not_logged", "manual_edit")] == [
        "review",
        "correct",
        "review",
    ]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("POLICIES__CREDIT_WITHOUT_GRANT", "correct", "trueup drift accept"),
        ("POLICIES__BURNED_AT_EXPIRY", "correct", "policies.burned_at_expiry"),
        ("POLICIES__MISSED_DECREMNT", "review", "did you mean missed_decrement"),
        ("POLICIES__MISSED_DECREMENT", "fix", "TRUEUP_RECONCILE__POLICIES__MISSED_DECREMENT"),
        ("MAX_CORRECTION", "-1", "TRUEUP_RECONCILE__MAX_CORRECTION"),
        ("TOLERANCE", "few", "TRUEUP_RECONCILE__TOLERANCE"),
        ("MAX_CORECTION", "1", "Did you mean reconcile.max_correction?"),
    ],
)
def test_rules_that_are_not_allowed_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(f"TRUEUP_RECONCILE__{name}", value)
    assert said in refusal()


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("TRUEUP_BROKER_URL", "redis://:hush/hush@redis:6379/0"),
        ("TRUEUP_BROKER_URL", "redis://:hush#hush@redis:6379/0"),
        ("TRUEUP_BROKER_URL", "redis://:hush?hush@redis:6379/0"),
        ("TRUEUP_BROKER_URL", "rediss://user:12/hush@redis:6379/0"),
        ("TRUEUP_BROKER_URL", "redis://redis:hush/0"),
        ("TRUEUP_RESULT_BACKEND_URL", "sentinel://:x@one:1;sentinel://:hush/hush@two:2"),
        ("TRUEUP_DATABASE_URL", "postgresql://app:hush@hush@db/app"),
        ("TRUEUP_DATABASE_URL", "postgresql://app:x@db:hush/app"),
        ("TRUEUP_OPENAI_BASE_URL", "https://app:hush/hush@models/v1"),
        ("TRUEUP_OPENAI_BASE_URL", "https://app:hush#hush@models/v1"),
        ("TRUEUP_INSTAGRAM_GRAPH_URL", "https://app:hush?hush@graph/v1"),
        ("TRUEUP_API__JWKS_URL", "https://app:hush/hush@issuer/jwks.json"),
        ("TRUEUP_ALERTS__WEBHOOK_URL", "https://app:hush/hush@alerts/"),
    ],
)
def test_a_url_with_an_unquoted_character_in_its_password_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, variable: str, url: str
) -> None:
    monkeypatch.setenv(variable, url)
    said = refusal()
    assert variable in said
    assert "hush" not in said
    assert "percent-encode" in said or "give a URL" in said


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("TRUEUP_BROKER_URL", "redis://:a%2Fb%23c%40d@redis:6379/0"),
        ("TRUEUP_BROKER_URL", "redis+socket:///run/a@b/redis.sock?virtual_host=0"),
        ("TRUEUP_BROKER_URL", "sentinel://:x@one:1;sentinel://:y@two:2"),
        ("TRUEUP_DATABASE_URL", "postgresql://app:a%2Fb%40c@db:5432/app"),
        ("TRUEUP_DATABASE_URL", "postgresql:///app?host=/run/postgresql&user=a@b"),
        ("TRUEUP_OPENAI_BASE_URL", "https://models.example/v1/a@b"),
    ],
)
def test_a_url_that_is_written_right_is_taken(monkeypatch: pytest.MonkeyPatch, variable: str, url: str) -> None:
    monkeypatch.setenv(variable, url)
    read_settings()
