"""README tells the truth: its paths exist, its commands parse, its Python runs."""

from __future__ import annotations

import inspect
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from flap_fast.__main__ import app
from flap_fast.config import Config
from flap_fast.encoders import ENCODERS
from flap_fast.training.loop import train
from flap_fast.training.run_folder import flat
from tests.tiny import tiny

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md", "demo/README.md"),
    *sorted(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md") if f.name != "settings.md"),
)
# What a user brings, or a run leaves.
MADE = ("runs/", "data/", "models/", "mine", ".venv/", "hosts", "stsb/")


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def paths(page: str) -> set[str]:
    """What looks like a file or a folder of the project, in backticks, links and commands."""
    found = set(
        re.findall(r"`([\w./-]+(?:/|\.(?:py|md|yaml|toml|txt|png|jsonl|json)))`", text_of(page))
    )
    found |= set(re.findall(r"\]\(([\w./-]+)\)", text_of(page)))
    found |= {
        word for command in commands(page) for word in command if re.search(r"\.ya?ml$", word)
    }
    return {path for path in found if not path.startswith(MADE)}


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    lines += re.findall(r"`((?:make|flap|deepspeed|DS_ACCELERATOR|srun) [^`]+)`", text_of(page))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str):
    made_by_a_run = {
        "config.yaml",
        "state.json",
        "metrics.jsonl",
        "environment.json",
        "eval.json",
        "masking.png",
        "report.html",
        "rejected.jsonl",
        "mine.jsonl",
        "captions.jsonl",
        "classes.txt",
    }
    for path in paths(page) - made_by_a_run:
        examples = {"losses/": "contrastive", "evaluation/": "retrieval", "kernels/": "cyclic"}
        examples |= {
            "interchange/": "laion",
            "encoders/": "vit",
            "programs/": "infonce",
            "sources/": "clotho",
        }
        name = next((name for folder, name in examples.items() if folder in path), "NAME")
        path = path.replace("NAME", name)
        beside = ROOT / page
        # A bare file name stands for the one of that name among the sources.
        places = (ROOT / path, beside.parent / path, *ROOT.glob(f"flap_fast/**/{path}"))
        assert any(place.exists() for place in places), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_from_their_page_to_a_file(page: str):
    links = re.findall(r"\]\(([\w./-]+)\)", text_of(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_site_has_every_page_once():
    nav = yaml.safe_load(text_of("mkdocs.yml"))["nav"]
    assert sorted(nav) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 160


def test_the_patterns_find_what_they_should():
    assert {"flap_fast/config/", "demo/README.md", "CONTRIBUTING.md"} <= paths("README.md")
    assert ["make", "demo"] in commands("README.md")
    assert len(commands("README.md")) >= 9


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page: str):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, words
        elif words[0] == "flap":
            parse(words[1:])
        elif "flap_fast" in words:
            parse(words[words.index("flap_fast") + 1 :])


def parse(words: list[str]) -> None:
    """Read a command with its options and arguments, as `flap` would; run nothing.

    A command's name alone is a mention of it, and `...` stands for anything.
    """
    command, rest = get_command(app), words
    while isinstance(command, TyperGroup):
        name, *rest = rest
        if name == "...":
            return
        assert name in command.commands, words
        command = command.commands[name]
    try:
        command.make_context(words[0], list(rest), resilient_parsing=not rest)
    except Exception as error:
        raise AssertionError(f"{' '.join(words)}: {error}") from None


def test_a_command_with_an_option_that_is_not_there_is_seen():
    parse(["prepare", "mine.jsonl", "data", "--threads", "8"])
    for words in (
        ["prepare", "a", "b", "--jobs", "8"],
        ["eval", "--pool", "cls"],
        ["config", "list"],
    ):
        with pytest.raises(AssertionError):
            parse(words)


@pytest.mark.parametrize("page", PAGES)
def test_settings_on_command_lines_are_settings(page: str):
    from flap_fast.config.file import load_config

    for words in commands(page):
        if "train" in words:
            file = next((w for w in words if w.endswith(".yaml")), None)
            overrides = [w for w in words if re.match(r"^[a-z_]+\.[a-z_.]+=", w)]
            load_config(ROOT / file if file else None, overrides)


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_the_text_are_settings(page: str):
    from flap_fast.config.file import load_config

    setting = rf"`((?:{'|'.join(Config.model_fields)})\.(?!json|yaml|py|onnx)[a-z_]+)(?:=([^`]+))?`"
    for name, value in re.findall(setting, text_of(page)):
        load_config(None, [f"{name}={value}", "train.zero_stage=3"] if value else [])
        arms = ENCODERS.get(name.partition(".")[0], {}).values()
        of_an_arm = any(name.partition(".")[2] in arm.model_fields for arm in arms)
        assert of_an_arm or name in flat(Config().model_dump(mode="json")), name


@pytest.mark.parametrize("page", PAGES)
def test_options_of_the_launchers_are_theirs(page: str):
    for words in commands(page):
        for launcher in ("deepspeed", "torchrun"):
            if launcher in words:
                end = words.index("flap_fast") if "flap_fast" in words else len(words)
                options = {w for w in words[words.index(launcher) : end] if w.startswith("--")}
                assert not options - options_of(launcher), words


@cache
def options_of(launcher: str) -> set[str]:
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        return set(get_args_parser()._option_string_actions)
    source = inspect.getsource(pytest.importorskip("deepspeed.launcher.runner"))
    return set(re.findall(r'"(--\w+)"', source))


@pytest.mark.parametrize("file", sorted(f.name for f in ROOT.glob("configs/*.yaml")))
def test_every_config_is_valid_and_listed(file: str):
    from flap_fast.config.file import load_config

    load_config(ROOT / "configs" / file)
    assert f"`{file}`" in text_of("configs/README.md")


def test_help_explains_every_command():
    names = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
    assert {"prepare", "train", "eval", "embed", "search", "classify", "rank", "show"} <= set(names)
    for command in (*names, "config show"):
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, result.output


def test_the_python_of_the_readme_runs(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    overrides = (f"run.folder={tmp_path}/runs", "run.name=demo", f"data.train={prepared}/train")
    train(tiny(*overrides, "train.steps=1"))
    (code,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.split(maxsplit=1)[1] for line in printed[:3]) == [
        "a choir sings a chord",
        "a snare drum",
        "an electric guitar",
    ]
    cosines = [float(line.split()[0]) for line in printed[:3]]
    assert cosines == sorted(cosines, reverse=True)
