"""`trueup usage find-unmetered` reads a code base and names what spends tokens unseen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trueup.llm.transport.unmetered import find_unmetered

LITELLM = "Set litellm.client_session = trueup.http_client() before the first call."
SOCKET = "A WebSocket does not pass an HTTP client: hold and charge it with ai_tokens."
FIND = (Path(sys.executable).with_name("trueup"), "usage", "find-unmetered")


def found(folder: Path, code: str) -> list[str]:
    (folder / "module.py").write_text(code)
    return [f"{call.call}: {call.remedy}" for call in find_unmetered(folder)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from openai import OpenAI\nclient = OpenAI()", "OpenAI: Give it http_client=trueup.http_client()."),
        ("import openai as o\no.AsyncOpenAI()", "o.AsyncOpenAI: Give it http_client=trueup.async_http_client()."),
        ("import anthropic\nanthropic.Anthropic()", "anthropic.Anthropic: Give it http_client=trueup.http_client()."),
        ("from google import genai\ngenai.Client()", "genai.Client: Give it http_options=trueup.genai_http_options()."),
        ("import litellm\nlitellm.completion()", f"litellm.completion: {LITELLM}"),
        ("import openai\nmine.realtime.connect(model='m')", f"mine.realtime.connect: {SOCKET}"),
    ],
)
def test_a_call_that_trueup_does_not_see_is_found(code: str, expected: str, tmp_path: Path) -> None:
    assert found(tmp_path, code) == [expected]


@pytest.mark.parametrize(
    "code",
    [
        "from openai import OpenAI\nimport trueup\nOpenAI(http_client=trueup.http_client())",
        "from openai import OpenAI\nOpenAI(**options)",
        "from ours import OpenAI\nOpenAI()",
        "class OpenAI: ...\nOpenAI()",
        "import openai\nopenai.APIError('x')",
        "not python (",
    ],
)
def test_metered_and_other_calls_are_not(code: str, tmp_path: Path) -> None:
    assert found(tmp_path, code) == []


def test_installed_packages_and_hidden_folders_are_left_out(tmp_path: Path) -> None:
    for folder in (".venv", "lib/site-packages/openai"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("from openai import OpenAI\nOpenAI()")
    assert find_unmetered(tmp_path) == []


def test_the_command_exits_1_if_it_found_calls(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1")
    assert subprocess.run([*FIND, tmp_path], check=False).returncode == 0
    (tmp_path / "bad.py").write_text("from openai import OpenAI\nOpenAI()")
    done = subprocess.run([*FIND, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bad.py:2" in done.stdout
    done = subprocess.run([*FIND, tmp_path, "--json"], capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    assert answer["schema_version"] == 1
    assert [(call["line"], call["call"]) for call in answer["calls"]] == [(2, "OpenAI")]
