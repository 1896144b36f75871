from billing.decorators import check_tokens_for_function
from billing.utils import check_ai_access_for_user
from tests.support.host import Host


def test_the_check_for_functions_is_the_check_for_users(host: Host) -> None:
    user = host.subscriber(1_000)
    assert check_tokens_for_function(user, 900, "Mine") == check_ai_access_for_user(user, 900, "Mine")
    assert check_tokens_for_function(user, 1_001, "Mine") == check_ai_access_for_user(user, 1_001, "Mine")


def test_without_an_estimate_1500_tokens_are_meant(host: Host) -> None:
    user = host.subscriber(1_500)
    assert check_tokens_for_function(user)["has_access"]
    host.log(user, 1)
    assert check_tokens_for_function(user)["reason"] == "insufficient_tokens"
    assert check_tokens_for_function(user, feature_name="Mine")["message"].startswith("Insufficient tokens for Mine")
