"""A fake of Instagram's Graph API on loopback. It follows its script and keeps its own ledger."""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress

from tests.faults.ledger import EFFECTS, GraphLedger, Posting
from tests.faults.loopback import QUICK_SECONDS, SLOW_SECONDS, STALLED_SECONDS, LoopbackHandler, LoopbackServer

Script = Callable[[str, int, int], str]
"""Comment, message (0) or public reply (1), and how often it has come before. Returns the behaviour to show."""

_MESSAGE, _REPLY = EFFECTS
_PATH = re.compile(r"/(?P<id>\w+)/(?P<what>messages|replies)")
_NOT_ACCEPTED = {"graph_500": (500, 2), "graph_429": (429, 4)}


class FakeGraph(LoopbackServer):
    """Takes messages and public replies."""

    def __init__(self, script: Script) -> None:
        super().__init__(_Handler)
        self.script = script
        self.ledger = GraphLedger()


class _Handler(LoopbackHandler):
    server: FakeGraph

    def answer(self) -> None:
        path = _PATH.fullmatch(self.path)
        assert path is not None, self.path
        request = self.read()
        if path["what"] == "messages":
            effect, comment_id, text = _MESSAGE, request["recipient"]["comment_id"], request["message"]["text"]
        else:
            effect, comment_id, text = _REPLY, path["id"], request["message"]
        posting, times = self.server.ledger.open(effect=effect, comment_id=comment_id, text=text, pid=self.asked_by)
        posting.behaviour = self.server.script(comment_id, EFFECTS.index(effect), times)
        try:
            with suppress(OSError):
                self._do(posting)
        finally:
            posting.ended_at = time.monotonic()

    def _do(self, posting: Posting) -> None:
        seconds = {"slow": SLOW_SECONDS, "graph_timeout": STALLED_SECONDS}.get(posting.behaviour, QUICK_SECONDS)
        if posting.behaviour in _NOT_ACCEPTED:
            self.server.closing.wait(seconds)
            status, code = _NOT_ACCEPTED[posting.behaviour]
            self.send(status, json.dumps({"error": {"message": "not now", "code": code}}))
            return
        if posting.behaviour == "graph_broken_before":
            self.hang_up()
            return
        # From here on it counts as sent, even if the answer is lost. (During a wait, the exact moment is unknown.)
        posting.accepted = True
        self.server.closing.wait(seconds)
        body = json.dumps({"message_id": f"m_{posting.comment_id}", "id": f"r_{posting.comment_id}"})
        if posting.behaviour == "graph_broken_after":
            self.hang_up()
        elif posting.behaviour == "graph_broken_body":
            self.send(200, body, bytes_sent=len(body) // 2)
            self.hang_up()
        elif posting.behaviour == "graph_504":
            self.send(504, "<html>The gateway has waited long enough.</html>")
        else:
            self.send(200, body)
