"""The provider `offline`: trueup's own server of answers in this process, asked in the format of OpenAI's chats."""

import json
from collections.abc import Iterator, Sequence

import httpx2

from trueup.llm.formats.reading import object_of
from trueup.llm.model import Message
from trueup.llm.offline.server import OfflineServer
from trueup.llm.providers.chat_answers import ChatAnswers
from trueup.llm.providers.failures import Failures
from trueup.llm.providers.maker import MakerProvider, Part
from trueup.llm.providers.paying_client import PayingClient
from trueup.llm.tokens import OFFLINE_MODEL

# Nothing is sent there: the server takes the requests of the client.
_URL = "http://offline.invalid/v1/chat/completions"
_ANSWER_SECONDS = 60.0


def offline_provider(server: httpx2.BaseTransport | None = None) -> MakerProvider:
    """Return the provider. `server`: answers instead of the offline one."""
    http = PayingClient(root=None, answer_seconds=_ANSWER_SECONDS, inner=server or OfflineServer())
    return MakerProvider(_Offline(http), http, Failures(_URL, "", key_name="", url_name=""))


class _Offline(ChatAnswers):
    """Implements `Maker`."""

    errors: tuple[type[Exception], ...] = ()

    def __init__(self, http: PayingClient) -> None:
        self._http = http

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        response = self._http.post(_URL, json=_body(messages, cap))
        return object_of(response.raise_for_status().json())

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        with self._http.stream("POST", _URL, json=_body(messages, cap, stream=True)) as response:
            for line in response.raise_for_status().iter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    yield object_of(json.loads(data))


def _body(messages: Sequence[Message], cap: int, *, stream: bool = False) -> Part:
    asked = [{"role": message.role, "content": message.content} for message in messages]
    return {"model": OFFLINE_MODEL, "messages": asked, "max_tokens": cap, "stream": stream}
