"""`trueup tokens grant`, `grants`, `revoke` and `import-payments`."""

import pytest

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from trueup.cli.options import this_user

pytestmark = pytest.mark.dated

NEXT_YEAR = "2999-01-31"


def give(user: int, tokens: object, *more: object, code: int = 0) -> str:
    result = trueup(
        "tokens", "grant", user, tokens, "--reason", "a gift", *(more or ("--reference", "tx-1")), code=code
    )
    return result.stdout if code == 0 else result.stderr


def test_a_grant_is_given_once_and_listed_with_who_gave_it(host: Host) -> None:
    user = host.subscriber(1_000)
    assert f"Granted 500 tokens to user {user}: grant 1." in give(user, 500)
    assert "Already granted: grant 1. Nothing was added." in give(user, 500)
    (grant,) = trueup_json("tokens", "grants", user)["grants"]
    assert (grant["tokens"], grant["tokens_left"], grant["status"]) == (500, 500, "live")
    assert (grant["granted_by"], grant["reason"], grant["reference"]) == (this_user(), "a gift", "tx-1")
    assert trueup_json("tokens", "show", user)["original"] == 1_500
    table = trueup("tokens", "grants", user).stdout
    assert "tx-1" in table
    assert "live" in table


def test_a_reference_that_granted_something_else_is_refused(host: Host) -> None:
    user = host.subscriber(1_000)
    give(user, 500)
    assert "'tx-1' belongs to grant 1" in give(user, 501, code=1)
    assert "another expiry" in give(user, 500, "--reference", "tx-1", "--expires", NEXT_YEAR, code=1)


def test_a_grant_may_expire_and_somebody_else_may_have_given_it(host: Host) -> None:
    user = host.subscriber(1_000)
    give(user, 500, "--reference", "a", "--expires", NEXT_YEAR, "--by", "ann")
    (grant,) = trueup_json("tokens", "grants", user)["grants"]
    assert (grant["expires_at"], grant["granted_by"]) == ("2999-01-31T00:00:00+00:00", "ann")


@pytest.mark.parametrize("tokens", ["0", "1.5", "many", "9223372036854775808", ""])
def test_a_malformed_size_is_wrong_usage(host: Host, tokens: str) -> None:
    assert "Invalid value for 'TOKENS'" in give(host.subscriber(), tokens, code=2)


@pytest.mark.parametrize(
    ("when", "said"),
    [("2020-01-01", "has passed"), ("soon", "is no time"), ("0001-01-01T00:00+14:00", "is no time"), ("", "no time")],
)
def test_a_malformed_end_is_wrong_usage(host: Host, when: str, said: str) -> None:
    error = give(host.subscriber(), 5, "--reference", "a", "--expires", when, code=2)
    assert "Invalid value for '--expires'" in error
    assert said in error


def test_reason_and_reference_are_asked_for(host: Host) -> None:
    user = host.subscriber()
    assert "Missing option '--reference'" in trueup("tokens", "grant", user, 5, "--reason", "r", code=2).stderr
    assert "Missing option '--reason'" in trueup("tokens", "grant", user, 5, "--reference", "r", code=2).stderr
    assert "reference: '' can't be stored" in give(user, 5, "--reference", " ", code=2)


def test_a_user_without_a_subscription_is_refused(host: Host) -> None:
    assert "has no subscription. Nothing was granted" in give(host.user(), 5, code=1)


def test_a_revoke_reports_its_tokens_and_may_be_repeated(host: Host) -> None:
    user = host.subscriber(1_000)
    give(user, 500)
    host.log(user, 1_100)
    revoke = ("tokens", "revoke", user, 1, "--reason", "bounced")
    # The grant has paid for 100 tokens: the usage before it, less the plan's 1,000.
    assert trueup(*revoke).stdout == "Revoked grant 1: 400 tokens taken back.\n"
    assert "was revoked before" in trueup(*revoke).stdout
    (grant,) = trueup_json("tokens", "grants", user)["grants"]
    assert (grant["status"], grant["tokens_used"], grant["tokens_left"]) == ("revoked", 100, 0)
    assert "revoked: bounced" in trueup("tokens", "grants", user).stdout
    assert "no grant 2" in trueup("tokens", "revoke", user, 2, "--reason", "r", code=1).stderr


def test_an_empty_list_of_grants_is_reported(host: Host) -> None:
    user = host.subscriber()
    assert trueup("tokens", "grants", user).stdout == "No grants.\n"
    assert trueup_json("tokens", "grants", user) == {"schema_version": 1, "user": str(user), "grants": []}


def test_an_import_without_mapped_payments_names_the_setting(host: Host) -> None:
    assert "host.payment.table is not set" in trueup("tokens", "import-payments", code=1).stderr
