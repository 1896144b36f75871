"""Find the places in a code base where a maker's SDK works without trueup's HTTP client. No code of it is run."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Where the client goes, for each class that sends requests.
_CLIENTS = {
    "openai": (("OpenAI", "AsyncOpenAI", "AzureOpenAI", "AsyncAzureOpenAI", "Client", "AsyncClient"), "http_client"),
    "anthropic": (("Anthropic", "AsyncAnthropic", "Client", "AsyncClient"), "http_client"),
    "google.genai": (("Client",), "http_options"),
    "pydantic_ai.providers.openai": (("OpenAIProvider",), "http_client"),
    "pydantic_ai.providers.anthropic": (("AnthropicProvider",), "http_client"),
    "pydantic_ai.providers.google": (("GoogleProvider",), "http_client"),
    "langchain_openai": (("ChatOpenAI", "AzureChatOpenAI", "OpenAIEmbeddings"), "http_client"),
    "llama_index.llms.openai": (("OpenAI",), "http_client"),
}
# Functions that buy an answer without a client of the caller's.
_FUNCTIONS = {"litellm": ("completion", "acompletion", "embedding", "aembedding", "responses", "aresponses")}
# Connections that no HTTP client sees.
_SOCKETS = ("realtime.connect", "live.connect")
_SKIPPED = ("site-packages", "node_modules", "__pycache__")


@dataclass(frozen=True, kw_only=True)
class UnmeteredCall:
    """A place where tokens may be spent unseen. `call`: the name of what is called. `remedy`: what to do."""

    file: str
    line: int
    call: str
    remedy: str


def find_unmetered(place: Path) -> list[UnmeteredCall]:
    """Return the unmetered calls in a Python file, or in all files of a folder, by file and line.

    A file that is no valid Python is left out.
    """
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = []
    for file in files:
        if any(part in _SKIPPED or part.startswith(".") for part in file.relative_to(place).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        found += sorted(_in_module(tree, str(file)), key=lambda call: call.line)
    return found


def _in_module(tree: ast.Module, file: str) -> Iterator[UnmeteredCall]:
    names = _imported(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        first, _, rest = call.partition(".")
        origin = ".".join(filter(None, (names.get(first), rest)))
        remedy = _remedy(origin, node) if first in names else None
        if remedy is None and call.endswith(_SOCKETS) and names:
            remedy = "A WebSocket does not pass an HTTP client: hold and charge it with ai_tokens."
        if remedy is not None:
            yield UnmeteredCall(file=file, line=node.lineno, call=call, remedy=remedy)


def _imported(tree: ast.Module) -> dict[str, str]:
    """Return what each name of the module stands for, if it comes from a known SDK."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    known = {*_CLIENTS, *_FUNCTIONS}
    roots = {module.partition(".")[0] for module in known}
    return {name: origin for name, origin in names.items() if origin.partition(".")[0] in roots}


def _remedy(origin: str, node: ast.Call) -> str | None:
    """Return what to do about a call of an SDK's object; None if it is metered or sends nothing."""
    module, _, name = origin.rpartition(".")
    classes, keyword = _CLIENTS.get(module, ((), ""))
    given = {word.arg for word in node.keywords}
    if name in classes and None not in given and keyword not in given:  # None: `**options`, which may have it
        value = "genai_http_options()" if keyword == "http_options" else "http_client()"
        value = f"async_{value}" if name.startswith("Async") or module.startswith("pydantic_ai") else value
        return f"Give it {keyword}=trueup.{value}."
    if name in _FUNCTIONS.get(module, ()):
        return f"Set {module}.client_session = trueup.http_client() before the first call."
    return None
