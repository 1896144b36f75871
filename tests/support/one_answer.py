"""A process that asks the wire server for one answer, for tests that stop it. Prints its text, or its error."""

import json
import sys

from tests.support.wire import provider_at
from tests.support.work import hold_tokens
from trueup.database.engine import connect
from trueup.errors import ProviderError
from trueup.llm.model import Message
from trueup.llm.running import spending_from

PROMPT = [Message(role="user", content="How are you?")]


def main() -> None:
    url, way, seconds, user = sys.argv[1:]
    provider = provider_at(url, model_timeout_seconds=float(seconds), model_max_retries=0)
    try:
        with connect() as connection, spending_from(hold_tokens(connection, int(user))):
            if way == "stream":
                text = "".join(provider.stream(PROMPT, max_completion_tokens=50))
            else:
                text = provider.complete(PROMPT, max_completion_tokens=50).text
    except ProviderError as error:
        sys.stdout.write(json.dumps({"error": str(error)}))
    else:
        sys.stdout.write(json.dumps({"text": text}))


if __name__ == "__main__":
    main()
