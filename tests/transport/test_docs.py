"""docs/sdks.md: each example runs as it stands, capped and recorded."""

import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from celery import Celery

from tests.support.host import Host
from tests.support.makers import WORD, Maker
from tests.support.worker import own_application
from trueup.settings.settings import Settings

MANUAL = (Path(__file__).parents[2] / "docs" / "sdks.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```", MANUAL, re.MULTILINE | re.DOTALL))
# `make test-frameworks` installs these.
FRAMEWORKS = {"LangChain": "langchain_openai", "LlamaIndex": "llama_index.llms.openai", "LiteLLM": "litellm"}


@pytest.fixture
def app(database: str) -> Celery:
    return own_application()


@pytest.mark.filterwarnings("ignore:Items? .* using the `ReadOnly` qualifier:UserWarning")  # LiteLLM's own types
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_makes_a_capped_and_recorded_call(
    name: str, app: Celery, maker: Maker, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it loads prices from the network
    if name in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[name], reason=f"{name} is missing: run `make test-frameworks`")
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(variable, "test")
    for variable in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):  # LlamaIndex reads the older name
        monkeypatch.setenv(variable, f"{maker.url}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", maker.url)
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", maker.url)
    module = ModuleType(f"example_{len(name)}_{abs(hash(name))}")
    exec(EXAMPLES[name], vars(module))  # noqa: S102 - our own manual
    user = host.subscriber(10_000)
    assert module.summarize(user, text="a text to summarize") == WORD * 20
    assert host.used(user) == maker.billed
    [request] = maker.requests
    config = request.get("generationConfig") or request
    caps = [config.get(cap) for cap in ("max_output_tokens", "maxOutputTokens", "max_completion_tokens", "max_tokens")]
    assert max(cap for cap in caps if cap) <= 4_000
    body = EXAMPLES[name].partition("def summarize")[2]
    assert len(inspect.cleandoc(body).splitlines()) <= 5


def test_there_is_an_example_for_each_sdk() -> None:
    makers = ["OpenAI, and servers with its API", "Anthropic", "Gemini", "pydantic-ai"]
    assert list(EXAMPLES) == [*makers, *FRAMEWORKS]


@pytest.mark.parametrize("block", re.findall(r"^```toml\n(.*?)^```", MANUAL, re.MULTILINE | re.DOTALL))
def test_the_settings_of_the_manual_are_valid(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in re.findall(r'"file:(.*)"', block):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    Settings.model_validate(tomllib.loads(block))
