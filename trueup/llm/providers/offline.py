"""The provider `offline`: trueup's own server of answers in this process, asked in the format of OpenAI's chats."""

import json
from collections.abc import Iterator, Sequence

from trueup.llm.formats.reading import object_of
from trueup.llm.model import Message
from trueup.llm.offline.server import OfflineServer
from trueup.llm.providers.chat_format import ChatAnswers, chat_messages
from trueup.llm.providers.failures import Failures
from trueup.llm.providers.maker import MakerProvider, Part
from trueup.llm.providers.paying_client import PayingClient
from trueup.llm.tokens import OFFLINE_MODEL

# Nothing is sent there: the server takes the requests of the client.
_URL = "http://offline.invalid/v1/chat/completions"
_ANSWER_SECONDS = 60.0


def offline_provider() -> MakerProvider:
    """Return the provider."""
    http = PayingClient(root=None, answer_seconds=_ANSWER_SECONDS, inner=OfflineServer())
    return MakerProvider(_Offline(http), http, Failures(_URL, "", key_name="", url_name=""))


class _Offline(ChatAnswers):
    """Implements `Maker`."""

    errors: tuple[type[Exception], ...] = ()

    def __init__(self, http: PayingClient) -> None:
        self._http = http

    def whole(self, messages: Sequence[Message], cap: int) -> Part:
        return object_of(self._http.post(_URL, json=_body(messages, cap)).json())

    def events(self, messages: Sequence[Message], cap: int) -> Iterator[Part]:
        with self._http.stream("POST", _URL, json=_body(messages, cap, stream=True)) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data and data != "[DONE]":
                    yield object_of(json.loads(data))


def _body(messages: Sequence[Message], cap: int, *, stream: bool = False) -> Part:
    return {"model": OFFLINE_MODEL, "messages": chat_messages(messages), "max_tokens": cap, "stream": stream}
