"""The HTTP clients that a body gives to the makers' SDKs."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, overload

from trueup.extras import require_extra
from trueup.llm.running import running_now
from trueup.llm.transport.pools import CONNECTION_OPTIONS, Pools
from trueup.llm.transport.purchases import Meter

if TYPE_CHECKING:
    import httpx
    import httpx2

Library = Literal["httpx2", "httpx"]

# The makers' own default: an answer may take minutes.
_TIMEOUT_SECONDS, _CONNECT_SECONDS = 600.0, 5.0


@overload
def http_client(
    *, library: Literal["httpx2"] = ..., allow: Sequence[str] = ..., prompt_tokens: int | None = ..., **options: Any
) -> "httpx2.Client": ...
@overload
def http_client(
    *, library: Literal["httpx"], allow: Sequence[str] = ..., prompt_tokens: int | None = ..., **options: Any
) -> "httpx.Client": ...
def http_client(
    *, library: Library = "httpx2", allow: Sequence[str] = (), prompt_tokens: int | None = None, **options: Any
) -> Any:
    """Return an HTTP client for a maker's SDK. Its calls spend from the running hold, are capped to it, and recorded.

    Each call is begun in the database under a bound, and its usage is recorded once; a redelivered task gets the
    answers again that it has paid for. Outside of a metered task or block a call is refused with `NoHoldError`. The
    client may be made outside of a task, and used in many.

    `library`: the SDK's HTTP library; the current ones take httpx2. `allow`: ends of paths, such as "/files", whose
    requests pass without being recorded; any other request that may cost tokens and that trueup can't read raises
    `UnmeteredCallError`. `prompt_tokens`: what the images, audio and files in a prompt cost together, at most; None: a
    prompt with such parts is refused with `UnboundedCallError`. One request may say it by the header
    `trueup-prompt-tokens`. `options`: of the library's client.
    """
    module = _module(library)
    transport = _transport(module, allow, prompt_tokens, options)
    return module.Transport.http.Client(transport=transport, **_defaults(module.Transport.http) | options)


@overload
def async_http_client(
    *, library: Literal["httpx2"] = ..., allow: Sequence[str] = ..., prompt_tokens: int | None = ..., **options: Any
) -> "httpx2.AsyncClient": ...
@overload
def async_http_client(
    *, library: Literal["httpx"], allow: Sequence[str] = ..., prompt_tokens: int | None = ..., **options: Any
) -> "httpx.AsyncClient": ...
def async_http_client(
    *, library: Library = "httpx2", allow: Sequence[str] = (), prompt_tokens: int | None = None, **options: Any
) -> Any:
    """Do as `http_client`, for an asynchronous SDK."""
    module = _module(library)
    transport = _transport(module, allow, prompt_tokens, options)
    return module.Transport.http.AsyncClient(transport=transport, **_defaults(module.Transport.http) | options)


def genai_http_options(*, allow: Sequence[str] = (), prompt_tokens: int | None = None) -> Any:
    """Return `http_options` for `google.genai.Client`, with a metered client for its calls of both kinds.

    It needs both: with one alone, `client.aio` may use another library, whose calls are not seen.
    """
    return import_module("google.genai.types").HttpOptions(
        httpx_client=http_client(allow=allow, prompt_tokens=prompt_tokens),
        httpx_async_client=async_http_client(allow=allow, prompt_tokens=prompt_tokens),
    )


def _module(library: Library) -> Any:
    """Return the module with the transport's classes for an HTTP library."""
    if library not in ("httpx2", "httpx"):
        raise ValueError(f'library: {library!r} is not known. Use "httpx2", or "httpx" for an SDK that still wants it.')
    require_extra("sdks", "http_client()", library, consequence="No client was made.")
    return import_module(f"trueup.llm.transport.on_{library}")


def _transport(module: Any, allow: Sequence[str], prompt_tokens: int | None, options: dict[str, Any]) -> Any:
    """Take the options of the connections out of `options`, and return the transport with them."""
    if isinstance(allow, str):
        raise ValueError(f"allow: {allow!r} is one string. Give a list of ends of paths.")
    inner = options.pop("transport", None)
    connections = {name: options.pop(name) for name in CONNECTION_OPTIONS & options.keys()}
    pools = Pools(module.Transport.http, inner, connections, trust_env=options.get("trust_env", True))
    # Threads that a body starts have no context of their own: its client knows the hold all the same.
    return module.Transport(Meter(allow, prompt_tokens, made_in=running_now()), pools)


def _defaults(http: Any) -> dict[str, Any]:
    return {"timeout": http.Timeout(_TIMEOUT_SECONDS, connect=_CONNECT_SECONDS), "follow_redirects": True}
