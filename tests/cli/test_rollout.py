"""`trueup rollout`: modes of the gate, set while it runs."""

import getpass
import re

from sqlalchemy import Connection

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from tests.support.work import hold_tokens

FEATURE = "Test"  # of tests.support.work


def test_a_feature_is_observed_listed_and_enforced_again(host: Host, connection: Connection) -> None:
    user = host.subscriber(100)
    assert trueup("rollout", "set", FEATURE, "observe", "--note", "first week").stdout == f"{FEATURE}: observe\n"
    hold_tokens(connection, user, 500)
    listed = trueup_json("rollout", "list")
    (feature,) = [f for f in listed["features"] if f["feature_name"] == FEATURE]
    assert (feature["mode"], feature["source"], feature["denied"], feature["denied_tokens"]) == (
        "observe",
        "run time",
        1,
        500,
    )
    assert [(d["reason"], d["times"]) for d in listed["observed_denials"]] == [("insufficient_tokens", 1)]
    assert trueup("rollout", "reset", FEATURE, "--note", "done").stdout == f"{FEATURE}: as in the settings\n"
    history = trueup_json("rollout", "history")["changes"]
    assert [(c["mode_before"], c["mode"], c["note"]) for c in history] == [
        ("observe", None, "done"),
        (None, "observe", "first week"),
    ]
    assert history[0]["changed_by"] == getpass.getuser()
    assert re.search(r"observed denials +1$", trueup("status").stdout, re.MULTILINE)


def test_the_features_of_the_tasks_are_listed_without_anything_set(host: Host) -> None:
    listed = trueup_json("rollout", "list")
    assert {"Instagram Product DM", "Product Extractor", "*"} <= {f["feature_name"] for f in listed["features"]}
    assert {f["mode"] for f in listed["features"]} == {"enforce"}
    assert "* (all others)" in trueup("rollout", "list").stdout


def test_a_known_feature_is_set_without_a_note_on_its_name(host: Host) -> None:
    assert trueup("rollout", "set", "Product Extractor", "off", "--note", "x").stderr == ""
    assert trueup("rollout", "set", "*", "observe", "--note", "x").stderr == ""


def test_wrong_words_are_refused(host: Host) -> None:
    assert "'enforced' is not one of" in trueup("rollout", "set", FEATURE, "enforced", "--note", "x", code=2).stderr
    assert "--note" in trueup("rollout", "set", FEATURE, "off", code=2).stderr
    assert "feature: '' can't be stored" in trueup("rollout", "set", " ", "off", "--note", "x", code=2).stderr
    assert trueup_json("rollout", "history")["changes"] == []


def test_an_unknown_feature_is_set_with_a_note_on_its_name(host: Host) -> None:
    assert "check the name" in trueup("rollout", "set", "No Such Feature", "off", "--note", "x").stderr
