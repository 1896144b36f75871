"""`trueup run`: real tasks on a real worker."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import Host
from tests.support.sessions import in_background
from tests.support.waiting import wait_for
from tests.support.worker import WorkerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"
CELERY = Path(sys.executable).with_name("celery")
ARTICLE = EXAMPLES / "help_en.txt"
CHAT = json.loads((EXAMPLES / "chat.json").read_text())
SHOP = ("--url", "https://shop.example/")


@pytest.fixture
def waiting(app: Celery) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Give a function that takes the messages which wait in the queue of AI tasks; no worker must run."""
    yield lambda: list(take(app))
    app.control.purge()


def take(app: Celery) -> Iterator[dict[str, Any]]:
    with app.connection_for_read() as connection:
        while message := connection.default_channel.basic_get("trueup-ai", no_ack=True):
            yield {"task": message.headers["task"], "id": message.headers["id"], **message.payload[1]}


class TestWithoutAWorker:
    """Commands that enqueue a task, and commands that are refused."""

    def test_without_wait_the_task_is_enqueued_and_named(self, waiting: Callable[[], list[dict[str, Any]]]) -> None:
        output = trueup("run", "qa", "--user", 7, "--max-pairs", 3, ARTICLE).stdout
        [message] = waiting()
        assert f"Enqueued trueup.generate_qa as {message['id']}." in output
        assert (message["user_id"], message["max_pairs"], message["text"]) == (7, 3, ARTICLE.read_text())

    def test_enqueueing_prints_json_when_asked_to(self, waiting: Callable[[], list[dict[str, Any]]]) -> None:
        printed = trueup_json("run", "dm", "--user", 7, EXAMPLES / "comment_product.json")
        [message] = waiting()
        assert printed == {
            "schema_version": 1,
            "task_id": message["id"],
            "task": "trueup.send_instagram_dm",
            "state": "ENQUEUED",
        }

    @pytest.mark.parametrize(("suffix", "argument"), [("html", "html"), ("txt", "text")])
    def test_a_text_file_of_products_is_sent_as_text_and_any_other_as_html(
        self, waiting: Callable[[], list[dict[str, Any]]], tmp_path: Path, suffix: str, argument: str
    ) -> None:
        page = tmp_path / f"page.{suffix}"
        page.write_text("Mug, 5 EUR")
        trueup("run", "products", "--user", 7, *SHOP, page)
        [message] = waiting()
        assert message[argument] == "Mug, 5 EUR"

    def test_a_dash_means_standard_input(self, waiting: Callable[[], list[dict[str, Any]]]) -> None:
        trueup("run", "qa", "--user", 7, "-", stdin="سلام")
        trueup("run", "dm", "--user", 7, "-", stdin='{"event": {}, "config": {}}')
        assert [message.get("text") for message in waiting()] == ["سلام", None]

    def test_a_question_takes_the_paragraphs_of_its_file_for_context(
        self, waiting: Callable[[], list[dict[str, Any]]], tmp_path: Path
    ) -> None:
        file = tmp_path / "help.txt"
        file.write_text("\n\nReturns are free.\nFor 45 days.\n \n\nسلام\n")
        trueup("run", "ask", "--user", 7, "--question", "Free?", file)
        trueup("run", "ask", "--user", 7, "--question", "Free?", "-", stdin="")
        [with_context, without] = waiting()
        assert with_context["task"] == "trueup.ask_question"
        assert (with_context["question"], with_context["context"]) == (
            "Free?",
            ["Returns are free.\nFor 45 days.", "سلام"],
        )
        assert without["context"] == []

    def test_a_chat_and_a_draft_are_sent_as_they_are(self, waiting: Callable[[], list[dict[str, Any]]]) -> None:
        trueup("run", "reply", "--user", 7, EXAMPLES / "chat.json")
        trueup("run", "prompt", "--user", 7, "--name", "Kestrel", EXAMPLES / "prompt_draft.txt")
        [reply, prompt] = waiting()
        assert {name: reply[name] for name in CHAT} == CHAT
        assert (reply["task"], prompt["task"]) == ("trueup.reply_to_message", "trueup.generate_prompt")
        assert prompt["prompt"] == (EXAMPLES / "prompt_draft.txt").read_text()
        assert prompt["business"] == {"name": "Kestrel", "description": None}

    @pytest.mark.parametrize(
        ("command", "content", "named"),
        [
            (("qa",), b"\xff\xfe\x00", "not UTF-8 text"),
            (("products", *SHOP), b"\x89PNG\r\n\x1a\n\xff", "not UTF-8 text"),
            (("dm",), b"{", "no JSON"),
            (("dm",), b"[" * 100_000, "no JSON"),
            (("dm",), b"[]", 'with "event" and "config"'),
            (("dm",), b'{"event": {}}', 'with "event" and "config"'),
            (("dm",), b'{"event": {}, "config": {}, "x": 1}', 'with "event" and "config"'),
            (("dm",), b"\xff\xfe", "not UTF-8 text"),
            (("reply",), b'{"history": []}', 'with "message" and optionally "history", "business"'),
            (("reply",), b'{"message": "Hi", "mesage": ""}', "examples/chat.json"),
        ],
    )
    def test_a_file_that_cant_be_used_is_wrong_usage_and_named(
        self,
        waiting: Callable[[], list[dict[str, Any]]],
        tmp_path: Path,
        command: tuple[str, ...],
        content: bytes,
        named: str,
    ) -> None:
        file = tmp_path / "input"
        file.write_bytes(content)
        for name, stdin in ((file, None), ("-", content)):
            result = trueup("run", *command, "--user", 7, name, code=2, stdin=stdin)
            assert f"{name}: " in result.stderr
            assert named in result.stderr
        assert waiting() == []

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("qa", "--user", 7, "missing.txt"), "'missing.txt' does not exist"),
            (("qa", "--user", 7, EXAMPLES), "is a directory"),
            (("qa", ARTICLE), "Missing option '--user'"),
            (("qa", "--user", "x", ARTICLE), "user id"),
            (("qa", "--user", 7, "--max-pairs", 51, ARTICLE), "1<=x<=50"),
            (("qa", "--user", 7, "--timeout", 0, ARTICLE), "1<=x<=86400"),
            (("products", "--user", 7, EXAMPLES / "shop.html"), "Missing option '--url'"),
            (("ask", "--user", 7, ARTICLE), "Missing option '--question'"),
        ],
    )
    def test_wrong_usage_is_explained(self, shared_database: str, arguments: tuple[object, ...], named: str) -> None:
        assert named in trueup("run", *arguments, code=2).stderr

    def test_the_wait_ends_after_the_timeout_and_the_task_continues(
        self, waiting: Callable[[], list[dict[str, Any]]]
    ) -> None:
        result = trueup("run", "qa", "--user", 7, "--wait", "--timeout", 1, ARTICLE, code=1)
        [message] = waiting()
        assert f"Task {message['id']} has not ended within 1 s (state PENDING). It continues" in result.stderr
        assert "Start one with `celery -A trueup.worker worker -Q trueup-ai -n trueup-ai@%h`" in result.stderr

    @pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # by Celery, as a worker would
    def test_a_result_of_megabytes_arrives_whole(
        self, waiting: Callable[[], list[dict[str, Any]]], app: Celery
    ) -> None:
        result = ["x" * 1_000] * 3_000

        def work() -> None:
            [message] = wait_for(waiting, "the task is enqueued")
            app.backend.store_result(message["id"], result, "SUCCESS")

        with in_background() as submit:
            worked = submit(work)
            shown = trueup_json("run", "qa", "--user", 7, "--wait", "--timeout", 20, ARTICLE)
            worked.result()
        assert shown["result"] == result

    def test_a_worker_for_other_queues_is_none_for_this_task(
        self, waiting: Callable[[], list[dict[str, Any]]], app: Celery
    ) -> None:
        command = [
            CELERY,
            "-b",
            app.conf.broker_url,
            "worker",
            "-Q",
            "trueup-reconcile",
            "-P",
            "solo",
            "--without-mingle",
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
            try:
                wait_for(lambda: app.control.ping(timeout=0.5), "the worker answers")
                result = trueup("run", "qa", "--user", 7, "--wait", "--timeout", 1, ARTICLE, code=1)
            finally:
                other.terminate()
        assert "No worker answers" in result.stderr


class TestWithAWorker:
    """The result of a task."""

    def test_waiting_shows_the_result(self, worker: WorkerProcess, shared_host: Host) -> None:
        user = shared_host.subscriber()
        shown = trueup_json("run", "qa", "--user", user, "--max-pairs", 2, "--wait", ARTICLE)
        assert shown["state"] == "SUCCESS"
        assert len(shown["result"]["pairs"]) == 2
        assert (
            shared_host.value("SELECT metadata->>'task_id' FROM ai_usage_log WHERE user_id = :user", user=user)
            == shown["task_id"]
        )

    def test_without_json_the_result_alone_is_shown(self, worker: WorkerProcess, shared_host: Host) -> None:
        user = shared_host.subscriber()
        output = trueup("run", "products", "--user", user, *SHOP, "--wait", EXAMPLES / "shop.html").stdout
        assert len(json.loads(output)["products"]) == 5

    def test_a_chat_a_question_and_a_draft_are_answered(self, worker: WorkerProcess, shared_host: Host) -> None:
        user = ("--user", shared_host.subscriber(), "--wait")
        reply = trueup_json("run", "reply", *user, EXAMPLES / "chat.json")["result"]
        answer = trueup_json("run", "ask", *user, "--question", "Are returns free?", ARTICLE)["result"]
        prompt = trueup_json("run", "prompt", *user, EXAMPLES / "prompt_draft.txt")["result"]
        assert "four working days" in reply["reply"]
        assert answer["passages_used"]
        assert "Amira" in prompt["prompt"]

    def test_a_denial_ends_with_code_3_and_its_payload(self, worker: WorkerProcess, shared_host: Host) -> None:
        user = shared_host.subscriber(100)
        command = ("run", "qa", "--user", user, "--wait", ARTICLE)
        assert "Denied: Insufficient tokens for Q&A Generator" in trueup(*command, code=3).stderr
        shown = trueup_json(*command, code=3)
        assert (shown["state"], shown["error_code"], shown["success"]) == ("DENIED", "insufficient_tokens", False)
        assert shown["tokens_remaining"] == 100

    def test_a_failed_task_ends_with_code_1_and_its_error(self, worker: WorkerProcess, shared_host: Host) -> None:
        command = ("run", "qa", "--user", shared_host.subscriber(), "--wait", "-")
        result = trueup(*command, code=1, stdin="too short")
        assert "Error: the task failed (InvalidInputError): " in result.stderr
        shown = trueup_json(*command, code=1, stdin="too short")
        assert (shown["state"], shown["type"]) == ("FAILURE", "InvalidInputError")

    def test_a_large_page_arrives(self, worker: WorkerProcess, shared_host: Host) -> None:
        page = (EXAMPLES / "shop.html").read_text() + "<!-- " + "x" * 2_000_000 + " -->"
        user = shared_host.subscriber()
        assert trueup_json("run", "products", "--user", user, *SHOP, "--wait", "-", stdin=page)["state"] == "SUCCESS"
