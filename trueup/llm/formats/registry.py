"""Which wire format a request has, and which requests are free."""

import re
from urllib.parse import unquote

from trueup.llm.formats.anthropic_messages import Messages
from trueup.llm.formats.gemini import EmbedContent, GenerateContent
from trueup.llm.formats.openai_chat import ChatCompletions
from trueup.llm.formats.openai_embeddings import Embeddings
from trueup.llm.formats.openai_responses import Responses
from trueup.llm.formats.wire_format import WireFormat

# By the end of the path, so that any base URL, gateway or version prefix is understood.
_FORMATS: tuple[tuple[str, WireFormat], ...] = (
    ("/chat/completions", ChatCompletions()),
    ("/responses", Responses()),
    ("/embeddings", Embeddings()),
    ("/messages", Messages()),
    (":generatecontent", GenerateContent()),
    (":streamgeneratecontent", GenerateContent()),
    (":embedcontent", EmbedContent()),
    (":batchembedcontents", EmbedContent()),
)

# The makers' own counters of tokens, moderation, and llama.cpp's tokenizer.
_FREE = (
    "/responses/input_tokens",
    "/messages/count_tokens",
    ":counttokens",
    "/moderations",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/cancel",
)
_FREE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "DELETE"))

_SLASHES = re.compile(r"/+")


def normal_path(path: str) -> str:
    """Return the path decoded, in lower case, without doubled, `.` or trailing slashes.

    Servers take a path in each of these disguises.
    """
    parts = [part for part in _SLASHES.split(unquote(path).lower()) if part not in ("", ".")]
    return "/" + "/".join(parts)


def format_of(path: str) -> WireFormat | None:
    """Return the format of the requests to a normal path; None: it is not known."""
    return next((known for ending, known in _FORMATS if path.endswith(ending)), None)


def is_free(method: str, path: str) -> bool:
    """Return whether a request to a normal path certainly costs no tokens."""
    return method.upper() in _FREE_METHODS or path.endswith(_FREE)
