from datetime import timedelta

from sqlalchemy import Connection

from billing.accounts import read_account
from billing.utils import get_accurate_tokens_remaining
from tests.support.host import START, Host


def test_remaining_is_the_plan_less_the_logs_sum(host: Host) -> None:
    user = host.subscriber(10_000)
    host.log(user, 1_500)
    host.log(user, 500)
    assert get_accurate_tokens_remaining(user) == (10_000, 2_000, 8_000)
