"""Files are data: no folder and no file of others has its code run."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError, refuse_code
from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.encoders.roberta.settings import RobertaSettings
from flap_fast.tools.enrich.classifier import Classifier
from flap_fast.tools.enrich.rewrite import _load
from tests.test_layout import ROOT, SOURCES

# The calls that could run code of a file, and the keyword with which they do not.
RULES = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_loader_says_that_it_runs_no_code(file: Path):
    for name, call in calls(file):
        rule = RULES.get(name) or RULES.get(name.rpartition(".")[2])
        if rule:
            given = {
                word.arg: ast.literal_eval(word.value)
                for word in call.keywords
                if word.arg == rule[0]
            }
            assert given == dict([rule]), f"{file}:{call.lineno}: {name} must have {rule}"
        assert name.partition(".")[0] not in {"pickle", "joblib", "dill"}, f"{file}:{call.lineno}"
        assert name not in {"eval", "exec"}, f"{file}:{call.lineno}"


CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: pass\n"


def with_code(folder: Path, file: str, nested: bool = False) -> Path:
    (folder / "own.py").write_text(CODE)
    there = folder / file
    tree = json.loads(there.read_text()) if there.is_file() else {}
    auto_map = {
        "auto_map": dict.fromkeys(
            (
                "AutoConfig",
                "AutoModel",
                "AutoModelForCausalLM",
                "AutoTokenizer",
                "AutoFeatureExtractor",
                "AutoModelForAudioClassification",
            ),
            "own.Own",
        )
    }
    there.write_text(json.dumps({**tree, **({"inner": auto_map} if nested else auto_map)}))
    return folder


def settings(folder: Path) -> RobertaSettings:
    return RobertaSettings(folder=str(folder), dropout=0)


LOADERS = {
    "tokenizer": lambda folder: tokenizer(settings(folder)),
    "encoder": lambda folder: TransformersText(settings(folder), weights=False),
    "rewriter": lambda folder: _load("a", folder, None, None),  # type: ignore[arg-type]
    "tagger": lambda folder: Classifier("a", folder),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("key", ["attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["owner/kernel", {"": "eager", "text": "owner/kernel@v1:layer"}])
def test_a_folder_that_names_a_kernel_of_a_hub_is_refused(
    loader, key, value, roberta_folder, tmp_path
):
    folder = shutil.copytree(roberta_folder, tmp_path / "model")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"name no code of its own to run, got '{key} in .*json'"):
        LOADERS[loader](folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "sdpa"}))
    refuse_code("text.folder", folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_with_code_is_refused_by_name_and_not_asked_about(
    loader, file, nested, roberta_folder, tmp_path, monkeypatch
):
    folder = with_code(shutil.copytree(roberta_folder, tmp_path / "model"), file, nested)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match=f"must name no code of its own to run, .*{file}'; if"):
        LOADERS[loader](folder)
    assert not list(tmp_path.rglob("ran"))
