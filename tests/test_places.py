"""Places: URLs keep their slashes, braces mean what they mean in bash."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from inspect import Parameter, signature
from itertools import chain
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from typer import Context
from typer.models import OptionInfo
from typer.testing import CliRunner

from flap_fast import prepare
from flap_fast.__main__ import app, config_app
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config, parse_config
from flap_fast.hub import local_folder, on_hub
from flap_fast.places import Url, expanded, is_glob, is_pattern, without_secrets
from flap_fast.section import NAMES_FILES


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("flap train x.yaml data.train=https://h/a/0.tar?sig=s3cret", "https://h/a/0.tar"),
        ("'data.train=https://ann:s3cret@h/{0..7}.tar?a=s3cret&b=s3cret'", "https://h/{0..7}.tar'"),
        ('data.train=["HTTPS://h/0.tar?s3cret","https://h/1.tar?s3cret"]', '.tar","https://h/1'),
        ("[https://h/0.tar?s3cret, https://h/1.tar?s3cret]", "[https://h/0.tar, https://h/1.tar]"),
        ("- https://h/0.tar?s=s3cret\n- data/mine\n", "- https://h/0.tar\n- data/mine\n"),
        ("s3://bucket/a?b data/what?.tar", "s3://bucket/a?b data/what?.tar"),
    ],
)
def test_a_text_without_secrets_has_no_login_and_no_query(text: str, left: str):
    found = without_secrets(text)
    assert "s3cret" not in found
    assert left in found


@pytest.mark.parametrize(
    "text",
    [
        *("a/{0..3}.tar", "{08..11}.tar", "x{3..1}", "{a,b}/{0..1}.tar", "{-1..1}", "{a,b{1..2}}"),
        *("no/braces.tar", "{0..0}", "{a}", "{}", "a{,b}c", "{01..3}", "{0..x}"),
    ],
)
def test_braces_are_those_of_bash(text: str):
    bash = subprocess.run(["bash", "-c", f"echo {text}"], capture_output=True, text=True)
    assert [*expanded(text)] == bash.stdout.split()


def test_a_range_of_endless_names_is_refused():
    with pytest.raises(ConfigError, match="at most 1000000 names, got 100000000000"):
        expanded("{0..99999999999}.tar")


def test_a_url_has_the_parts_of_a_path():
    url = Url("https://host/a/0.tar?key=1")
    assert (url.name, url.stem, url.suffix, url.scheme) == ("0.tar", "0", ".tar", "https")
    assert url.parent == "https://host/a?key=1"
    assert url.parent / "sizes.json" == "https://host/a/sizes.json?key=1"
    assert url.with_suffix(".idx") == "https://host/a/0.idx?key=1"
    assert url.shown == "https://host/a/0.tar"
    assert Url("s3://bucket/a/").name == "a"
    login = Url("https://ann:secret@host/a/0.tar")
    assert (login.shown, login.parent) == ("https://host/a/0.tar", "https://ann:secret@host/a")
    assert Url("s3://bucket/what?.tar").name == "what?.tar"


def test_patterns_are_told_from_names():
    assert is_glob(Url("s3://b/?.tar"))
    assert not is_glob(Url("https://h/0.tar?a=[1]"))
    assert is_pattern(Path("a/{0..3}.tar"))
    assert is_pattern(Path("a/[0-3].tar"))
    assert not is_pattern(Path("a/{x}/0.tar"))


def test_the_scheme_of_a_url_may_be_in_capitals():
    config = load_config(None, ["data.train=['S3://Bucket/A', 'FILE:///data/B']"])
    assert config.data.train == (Url("s3://Bucket/A"), Path("/data/B"))


@pytest.mark.parametrize("url", ["s3://", "http://"])
def test_a_url_of_nothing_is_refused(url):
    with pytest.raises(ConfigError, match=r"data\.train\.0 must name a server or a bucket, as s3"):
        load_config(None, [f"data.train={url}"])


def test_a_config_keeps_urls_as_they_were_written():
    urls = ("s3://bucket/a/{0000..0127}.tar", "https://h/0.tar?k=v&w=//", "data/a")
    config = load_config(None, [f"data.train=['{urls[0]}', '{urls[1]}', {urls[2]}]"])
    assert config.data.train == (*urls[:2], Path("data/a"))
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert parse_config(config.model_dump()) == config
    assert load_config(None, ["data.val=file:///a/b%20c"]).data.val == (Path("/a/b c"),)


def test_a_scheme_may_be_in_capitals():
    config = load_config(None, ["data.train=[S3://B/x, HTTPS://H/0.tar]", "data.val=FILE:///a"])
    assert config.data.train == ("s3://B/x", "https://H/0.tar")
    assert config.data.val == (Path("/a"),)
    model = load_config(None, ["train.init_from=HF://me/X"]).train.init_from
    assert model is not None
    assert on_hub(model)
    with pytest.raises(ConfigError, match="a model on the Hub must be hf://OWNER/NAME"):
        local_folder("HF://X")


@pytest.mark.parametrize("value", ["s3:/bucket/x", Path("s3://bucket/x")])
def test_a_url_that_lost_a_slash_is_refused_with_the_whole_one(value: str | Path):
    with pytest.raises(ConfigError, match=r"data\.train\.0 must have .* as s3://bucket/x, got"):
        parse_config({"data": {"train": [value]}})


def test_braces_that_the_shell_expanded_are_refused():
    words = ["data.train=a/0.tar", "data.train=a/1.tar"]
    with pytest.raises(ConfigError, match=r"data\.train must be given once, .*quotes"):
        load_config(None, words)
    assert load_config(None, ["data.train=a", "data.train=b"]).data.train == (Path("b"),)


def test_a_shared_config_has_only_the_last_part_of_places():
    places = "s3://private-bucket/sets/train?key=abc", "/home/ann/{0..7}.tar", "https://h/x/y?sig=z"
    data = Config(data={"train": places, "val": "hf://datasets/a/b"}).shareable().data  # type: ignore[arg-type]
    assert list(map(str, data.train)) == ["train?key=abc", "{0..7}.tar", "y"]
    assert str(data.val[0]) == "hf://datasets/a/b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prepare", "s3://b/x", "out"],
            "DATA must be a path on this machine, got 's3://b/x'; copy it here; shards alone are",
        ),
        (
            ["enrich", "in", "https://h/x", "--model", "m"],
            "OUT must be a path on this machine, got",
        ),
        (
            ["report", "hf://me/run"],
            "RUN must be a path on this machine, got 'hf://me/run'; hf download OWNER/NAME --local",
        ),
        (["export", "s3://b/x", "out"], "a model must be a path on this machine, got 's3://b/x'"),
        (["eval", "s3://b/x", "data"], "a model must be a path on this machine, got 's3://b/x'"),
        (["rank", "s3://b/x", "a.wav", "b"], "a model must be a path on this machine, got 's3:"),
        (
            ["eval", "M", "s3:/b/x"],
            "DATA must have two slashes after s3:, as s3://b/x, got 's3:/b/x'",
        ),
        (
            ["doctor", "s3:/b/x"],
            "DATA must have two slashes after s3:, as s3://b/x, got 's3:/b/x'",
        ),
    ],
)
def test_commands_that_read_no_urls_say_so(words: list[str], message: str):
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(message)


def path_parameters() -> Iterator[tuple[list[str], str]]:
    """A call of each command with a URL for each parameter of a path, and what it is called."""
    for above, one in [([], c) for c in app.registered_commands] + [
        (["config"], c) for c in config_app.registered_commands
    ]:
        assert one.callback is not None
        command, parameters = one.name or one.callback.__name__.strip("_"), {}
        for name, hint in get_type_hints(one.callback, include_extras=True).items():
            if name != "return" and hint is not Context:
                (info,) = hint.__metadata__
                needed = signature(one.callback).parameters[name].default is Parameter.empty
                declared = str(info.default) if str(info.default)[:2] == "--" else None
                option = [declared or f"--{name.replace('_', '-')}"]
                words = option if isinstance(info, OptionInfo) else []
                parameters[name] = (words, needed, "Path" in str(hint))
        for name, (option, _, is_path) in parameters.items():
            if is_path:
                words = [
                    [*words, "s3://b/x" if other == name else "x"]
                    for other, (words, needed, _) in parameters.items()
                    if needed or other == name
                ]
                called = option[0] if option else name.upper()
                yield [*above, command, *chain.from_iterable(words)], called


@pytest.mark.parametrize(("words", "name"), [*path_parameters()], ids=lambda x: "".join(x[:2]))
def test_every_argument_of_a_path_refuses_a_url(words: list[str], name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(f"{name} must be a path on this machine, got 's3://b/x'")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "name", sorted({*Config().marked(NAMES_FILES)} - {"data.train", "data.val"})
)
def test_every_setting_of_a_path_refuses_a_url(name: str):
    rule = "must be a path on this machine, got .*s3://b/x'; copy it here"
    with pytest.raises(ConfigError, match=f"^{name}.* {rule}"):
        load_config(None, [f"{name}=s3://b/x"])


def test_models_of_the_hub_and_prompts_are_no_such_urls():
    given = {"train.init_from": "hf://me/x", "eval.templates": "A {label}, see http://x."}
    config = load_config(None, [f"{name}={value!r}" for name, value in given.items()])
    assert str(config.train.init_from) == "hf:/me/x"
    assert config.eval.templates == given["eval.templates"]
    with pytest.raises(ConfigError, match=r"run\.folder must .*; hf download OWNER/NAME"):
        load_config(None, ["run.folder=hf://me/x"])


def test_prepare_refuses_a_url_in_python(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (("s3://b/m.csv", "out"), ("m.csv", "s3://b/x")):
        with pytest.raises(ConfigError, match="must be a path on this machine, got 's3://b/"):
            prepare(*arguments)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("url", ["file:/a/b", "file:///a/b", Path("file:///a/b")])
def test_a_file_url_with_one_slash_is_the_whole_path(url: str | Path, tmp_path: Path):
    assert parse_config({"data": {"train": [url]}}).data.train == (Path("/a/b"),)
    with pytest.raises(ConfigError, match=r"^manifest must be .*, got 'file:.*'; write /a/b$"):
        prepare(url, tmp_path)


def test_a_page_of_the_hub_is_told_how_it_is_copied():
    with pytest.raises(ConfigError, match=r"train\.init_from must .*; hf download OWNER/NAME"):
        load_config(None, ["train.init_from=https://huggingface.co/me/x"])
