"""`tokenizer = "file:tokenizer.json"`: prompts are counted with the model's own tokenizer, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.test_extras import environment
from trueup.doctor.versions import check_extras
from trueup.errors import SettingsError
from trueup.llm.bounds import assigned_counter, learns, likely_counter
from trueup.llm.tokens import FileCounter, offline_counter
from trueup.settings.models import ModelSettings
from trueup.settings.settings import Settings, read_settings

TEXTS = ["برای بازگرداندن کالا تا هفت روز فرصت دارید. " * 20, "The return of goods is free within seven days. " * 20]
END = "<|end|>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer as models have it, trained on the texts. The file asks for truncation and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=64)
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def settings(tokenizer: str) -> Settings:
    return Settings(models={"llama*": ModelSettings(tokenizer=tokenizer)})


@pytest.mark.parametrize("text", [*TEXTS, "😀 unseen 漢字", "a\ud800b", ""])
def test_a_count_is_that_of_the_whole_text(file: Path, text: str) -> None:
    counter = assigned_counter("llama-3-8b", settings(f"file:{file}"))
    assert isinstance(counter, FileCounter)
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    assert counter.count(text) == len(own.encode(text.replace("\ud800", "�")).ids)
    assert len(text.encode(errors="replace")) // 30 <= counter.count(text) <= len(text.encode(errors="replace")) + 2
    assert not counter.exact
    assert not learns("llama-3-8b", settings(f"file:{file}"))
    assert assigned_counter("mistral", settings(f"file:{file}")) is None


def test_an_estimate_uses_the_file_too_and_never_a_ratio_because_that_is_a_bound(file: Path) -> None:
    assert isinstance(likely_counter("llama-3-8b", settings(f"file:{file}")), FileCounter)
    with_ratio = Settings(models={"llama*": ModelSettings(ratio=1.0)})
    for text in TEXTS:
        assert likely_counter("llama-3-8b", with_ratio).count(text) == offline_counter().count(text)
    assert likely_counter("gpt-4", with_ratio).exact


def test_a_special_token_in_a_text_counts_as_text(file: Path) -> None:
    assert FileCounter(file).count(END) > 1


def test_a_path_is_relative_to_the_process_and_a_missing_file_is_refused_at_start(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("TRUEUP_MODELS", json.dumps({"llama*": {"tokenizer": "file:tokenizer.json"}}))
    assert read_settings().models["llama*"].tokenizer_file == file
    for given, said in (
        ("file:absent.json", f"no file {file.parent}/absent.json"),
        ("o300k", "o200k_base, cl100k_base"),
    ):
        monkeypatch.setenv("TRUEUP_MODELS", json.dumps({"llama*": {"tokenizer": given}}))
        with pytest.raises(SettingsError, match=rf"models\.llama\*\.tokenizer .*{said}"):
            read_settings()


def test_a_file_that_is_no_tokenizer_is_one_error_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 1}')
    with pytest.raises(
        SettingsError, match=r"tokenizer .*tokenizer\.json can't be read .*Nothing was spent\. Download"
    ):
        assigned_counter("llama-3-8b", settings(f"file:{path}"))


def test_without_the_library_nothing_is_spent_and_doctor_names_the_extra(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "from trueup.llm.bounds import assigned_counter\n"
        "from trueup.settings.settings import get_settings\n"
        "try:\n"
        "    assigned_counter('llama-3-8b', get_settings())\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    variables = environment(tmp_path) | {"TRUEUP_MODELS": json.dumps({"llama*": {"tokenizer": f"file:{file}"}})}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert 'tokenizer = "file:tokenizer.json" needs the extra [tokenizers]' in done.stdout
    assert "pip install 'trueup[tokenizers]'; or set a ratio instead." in done.stdout
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    [finding] = check_extras(settings(f"file:{file}"))
    assert (finding.level, finding.detail) == ("error", {"extra": "tokenizers"})
    assert os.fspath(file) in finding.what
