"""`trueup drift review`, accept, grant, ignore and undo."""

import pytest

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from trueup.cli.options import this_user


def held(host: Host, tokens: int = 500) -> int:
    """A user whose counter shows that many too many, as after buying a pack. Returns the drift's number."""
    host.plan(tokens)
    user = host.subscriber(10_000, counter=10_000 + tokens)
    trueup("reconcile")
    return next(item["id"] for item in trueup_json("drift", "review")["drifts"] if item["user_id"] == user)


def test_a_review_shows_the_effect_of_each_choice(host: Host) -> None:
    drift = held(host)
    (item,) = trueup_json("drift", "review")["drifts"]
    assert (item["id"], item["tokens"], item["cause"]) == (drift, 500, "credit_without_grant")
    assert item["choices"] == {"accept": {"counter": 10_000}, "grant": {"tokens": 500}, "ignore": {"tokens": 500}}
    shown = trueup("drift", "review").stdout
    for part in ("10,500 → 10,000", "+500", "credit without grant", "trueup drift accept DRIFT"):
        assert part in shown
    other = host.subscriber()
    assert trueup_json("drift", "review", "--user", other)["drifts"] == []


def test_an_empty_review_queue_is_reported(host: Host) -> None:
    trueup("reconcile")
    assert trueup("drift", "review").stdout == "No drift awaits review.\n"


def test_a_drift_that_has_changed_is_shown_as_such(host: Host) -> None:
    drift = held(host)
    host.execute("UPDATE billing_subscription SET tokens_remaining = 1")
    assert "changed: reconcile again" in trueup("drift", "review").stdout
    (item,) = trueup_json("drift", "review")["drifts"]
    assert item["choices"] == {"accept": None, "grant": None, "ignore": None}
    result = trueup("drift", "accept", drift, "--note", "n", code=1)
    assert "the counter is now 1 and should be 10000," in result.stderr
    assert "trueup reconcile --user" in result.stderr


def test_several_drifts_are_accepted_and_refusals_are_reported(host: Host) -> None:
    first = held(host)
    second = held(host, 700)
    result = trueup("drift", "accept", first, 999, second, "--note", "refunded", code=1)
    assert [line.partition(",")[0] for line in result.stdout.splitlines()] == [f"Drift {first}", f"Drift {second}"]
    assert "counter 10,500 → 10,000" in result.stdout
    assert "Drift 999: it does not exist" in result.stderr
    assert trueup_json("drift", "review")["drifts"] == []
    assert "decided 'accept'" in trueup("drift", "accept", first, "--note", "n").stdout
    assert f"{this_user()} decided 'accept'" in trueup("drift", "ignore", first, "--note", "n", code=1).stderr


def test_a_grant_of_a_drift_keeps_the_counter(host: Host) -> None:
    drift = held(host)
    told = trueup("drift", "grant", drift, "--reason", "pack", "--reference", "tx-1", "--by", "ann").stdout
    assert "granted 500 tokens (grant 1); counter stays 10,500" in told
    user = host.value("SELECT user_id FROM trueup.token_grant")
    assert (host.counter(user), trueup_json("tokens", "show", user)["drift"]) == (10_500, 0)
    assert trueup_json("tokens", "grants", user)["grants"][0]["granted_by"] == "ann"
    (again,) = trueup_json("drift", "grant", drift, "--reason", "pack", "--reference", "tx-1")["decisions"]
    assert (again["already"], again["by"]) == (True, "ann")


def test_an_ignored_drift_is_not_raised_again(host: Host) -> None:
    drift = held(host)
    assert "ignored; counter stays 10,500" in trueup("drift", "ignore", drift, "--note", "ours").stdout
    trueup("reconcile")
    assert trueup_json("drift", "review")["drifts"] == []


def test_an_undone_run_is_left_to_a_person(host: Host) -> None:
    user = host.subscriber(10_000)
    host.log(user, 300)
    trueup("reconcile")
    told = trueup("drift", "undo", 1, "--note", "wrong").stdout
    assert told.startswith("Restored: 1. Unchanged: 0, ")
    assert host.counter(user) == 10_000
    assert trueup_json("drift", "undo", 1, "--note", "wrong") == {"schema_version": 1, "counters": 0, "left": 0}
    trueup("reconcile")
    assert host.counter(user) == 10_000
    (item,) = trueup_json("drift", "review")["drifts"]
    assert "undid" in item["reason"]
    assert "Run 99 does not exist" in trueup("drift", "undo", 99, "--note", "n", code=1).stderr


def test_many_are_counted_and_accepted_when_the_question_is_answered(host: Host) -> None:
    for tokens in (500, 700, 900):
        held(host, tokens)
    many = ("drift", "ignore", "--cause", "credit_without_grant", "--max", 700, "--note", "refunded")
    asked = trueup(*many, code=1, stdin="n\n")
    question = "Ignore 2 drifts of credit without grant? It leaves counters as they are, 1,200 tokens too high"
    assert question in asked.stderr
    assert len(trueup_json("drift", "review")["drifts"]) == 3
    # Without an answer to the question, nothing is decided.
    trueup(*many, code=1)
    assert len(trueup_json("drift", "review", "--max", 700)["drifts"]) == 2
    # What may be paid is accepted one by one.
    accepting = trueup("drift", "accept", *many[2:], "--yes", code=1).stdout
    assert "Undecided: 2, it shows tokens that the user may have paid for" in accepting
    assert "Ignored: 2 of 2." in trueup(*many, stdin="y\n").stdout
    assert "No drift awaiting review matches" in trueup(*many, "--yes").stdout
    [left] = trueup_json("drift", "review", "--cause", "credit_without_grant")["drifts"]
    assert left["tokens"] == 900
    host.execute("UPDATE billing_subscription SET tokens_remaining = tokens_remaining + 1")
    run = ("drift", "ignore", "--run", left["run_id"], "--limit", 5, "--yes", "--note", "n")
    assert trueup_json(*run, code=1) == {
        "schema_version": 1,
        "chosen": 1,
        "decided": 0,
        "left": {"changed": 1},
    }
    assert "Undecided: 1, the difference has changed" in trueup(*run, code=1).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("accept", 1), "Missing option '--note'"),
        (("accept", "--note", "n"), "Missing argument 'DRIFT...'"),
        (("accept", 1, "--cause", "missed_decrement", "--note", "n"), "exclude each other"),
        (("ignore", 1, "--limit", 3, "--note", "n"), "exclude each other"),
        (("accept", "--limit", 3, "--note", "n"), "select by --cause, --max or --run"),
        (("accept", "--cause", "missed_decremnt", "--note", "n"), "Did you mean missed_decrement?"),
        (("accept", "--run", 1, "--note", " ", "--yes"), "note: '' can't be stored"),
        (("accept", 0, "--note", "n"), "Invalid value for 'DRIFT...'"),
        (("accept", "x", "--note", "n"), "Invalid value for 'DRIFT...'"),
        (("accept", 1, "--note", " "), "note: '' can't be stored"),
        (("grant", 1, "--reason", "r"), "Missing option '--reference'"),
        (("grant", 1, "--reason", "r", "--reference", "x", "--expires", "2001-01-01"), "has passed"),
        (("undo", "--note", "n"), "Missing argument 'RUN'"),
    ],
)
def test_wrong_usage_is_reported(database: str, arguments: tuple[object, ...], said: str) -> None:
    assert said in trueup("drift", *arguments, code=2).stderr
