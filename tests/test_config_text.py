"""What is wrong with the text of a config, and what a wrong name may have meant."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("2001-99-99", "not a value of timestamp: month must be in 1..12"),
        ("2001-01-01T99:00:00", "not a value of timestamp: hour must be in 0..23"),
        ("!!int x", "not a value of int: invalid literal"),
        ("!!timestamp x", "not a value of timestamp"),
        ("9" * 5000, "not a value of int: Exceeds the limit"),
        ("&a [*a]", "found unconstructable recursive node"),
        ("&a {name: *a}", "found unconstructable recursive node"),
        ('"\\ud800"', r"a text must be valid Unicode, got '\\ud800'"),
        ("{[a]: b}", "while constructing a mapping, found unhashable key"),
        ("!!python/name:os.system x", "could not determine a constructor"),
        ("[", "while parsing a flow node"),
        ("0100", "a number must not begin with 0, which YAML takes for octal, got 0100"),
    ],
)
def test_whatever_yaml_cannot_read_is_a_sentence_with_line_and_setting(
    value: str, reason: str, tmp_path: Path
):
    with pytest.raises(
        ConfigError, match=f"^the value of run.name must be YAML: {reason}"
    ) as error:
        load_config(None, [f"run.name={value}"])
    assert "\n" not in str(error.value)
    file = tmp_path / "c.yaml"
    file.write_text(f"# a comment\nmask: {{}}\nrun:\n  seed: 1\n  name: {value}\n")
    with pytest.raises(ConfigError, match=f"^{file} must be YAML: {reason}") as error:
        load_config(file)
    assert "\n" not in str(error.value)
    assert ", in line " in str(error.value)
    if value != "[":  # which swallows the rest
        assert str(error.value).endswith(", in line 5, setting run.name")


@pytest.mark.parametrize("value", ["[" * 3000, "{a: " * 3000])
def test_a_value_that_is_nested_too_deeply_is_refused(value: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(f"run: {value}")
    with pytest.raises(ConfigError, match=r"c.yaml must be YAML: nested too deeply$"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x00b", b"a\x1bb"])
def test_bytes_that_are_no_text_are_named_with_their_line(name: bytes, tmp_path: Path):
    (tmp_path / "c.yaml").write_bytes(b"run:\n  name: " + name)
    with pytest.raises(ConfigError, match=r"c.yaml must be YAML: .*, in line 2, setting name$"):
        load_config(tmp_path / "c.yaml")


def test_a_name_that_is_too_long_for_a_file_is_refused():
    with pytest.raises(ConfigError, match=r"^the config must be an existing YAML file"):
        load_config("x" * 5000)


@pytest.mark.parametrize("overrides", ["run.name=x", {"run.name": "x"}])
def test_overrides_are_a_list(overrides):
    with pytest.raises(
        TypeError, match=r"^overrides must be a list such as \['mask.kind=1d'\], got"
    ):
        load_config(None, overrides)


def test_aliases_that_grow_exponentially_are_shown_in_short(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(8 * [f'*a{n - 1}'])}]" for n in range(1, 5)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "run: {name: *a4}"]))
    with pytest.raises(ConfigError, match=r"run.name must be a valid string, got") as error:
        load_config(tmp_path / "c.yaml")
    assert len(str(error.value)) < 60_000


@pytest.mark.parametrize("name", ["audio.duration_s", "fusion.max_duration_s"])
@pytest.mark.parametrize("value", ["1e308", "1.0e308", "1e6"])
def test_a_duration_is_at_most_a_day(name: str, value: str):
    with pytest.raises(ConfigError, match=f"^{name} must be less than or equal to 86400, got"):
        load_config(None, [f"{name}={value}"])


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("train.batch_size", "train.global_batch"),
        ("batch_size", "train.global_batch"),
        ("optim.learning_rate", "optim.lr"),
        ("seed", "run.seed"),
        ("train.seed", "run.seed"),
        ("epochs", "train.epochs"),
        ("train.max_steps", "train.steps"),
        ("train.warmup_steps", "sched.warmup_steps"),
        ("data.num_workers", "frontend.threads"),
        ("optim.wd", "optim.weight_decay"),
        ("optim.weight_decy", "optim.weight_decay"),
        ("weight_decy", "optim.weight_decay"),
        ("name", "run.name or optim.name or sched.name"),
        ("contrastive", "loss.contrastive"),
        ("n_mels", "audio.mel_bins"),
        ("optim.LR", "optim.lr"),
        ("Batch-Size", "train.global_batch"),
    ],
)
def test_an_unknown_name_suggests_the_setting_that_it_means(wrong: str, meant: str):
    with pytest.raises(
        ConfigError, match=f"^{wrong} is not a setting: did you mean {meant}. Known"
    ):
        load_config(None, [f"{wrong}=1"])


def test_a_section_in_capitals_is_told_its_name():
    with pytest.raises(ConfigError, match=r"^Train is not a setting: did you mean train. Known"):
        load_config(None, ["Train.steps=1"])


def test_every_suggestion_is_a_setting():
    from flap_fast.config import Config
    from flap_fast.config.faults import _ELSEWHERE, _settings

    assert set(_ELSEWHERE.values()) <= set(_settings(Config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\nglobal_batch: 8", r"global_batch .* train.global_batch\? Indent it below train:"),
        (
            "mask:\nkind: 2d\nratio: 0.5",
            r"kind is .*\nratio is .* mask.ratio\? Indent it below mask:",
        ),
        (
            "run:\n  name: x\n  train:\n    steps: 3",
            "run.train is not a setting: did you mean train.",
        ),
        ("data:\ntrain: x", "train must be a section of settings, got 'x'; indent it below data:"),
        ("text:\nencoder: clip", r"encoder is not .* text.encoder\? Indent it below text:"),
        (
            "optim: {lr:1.0}",
            r"optim.lr:1.0 is not a setting: in a file write lr: 1.0, with a space",
        ),
        ("run.name: x", r"run.name is not a setting: in a file write run: {name: ...}"),
    ],
)
def test_a_key_that_is_not_indented_is_named(text: str, message: str, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s)^{message}"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.contrastive.prefixes=8,16", r"must be a list, got '8,16'; write \[8,16\]$"),
        ("optim.betas=0.9, 0.98", r"must be a list, got '0.9, 0.98'; write \[0.9,0.98\]$"),
        ("train.checkpoint_activations=audio,text", r"got 'audio,text'; write \[audio,text\]$"),
        ("optim.betas=(0.9, 0.98)", r"must be a list, .*; write \[0.9,0.98\]$"),
        ("optim.betas=0.9 0.98", r"must be a list, .*; write \[0.9,0.98\]$"),
        ('optim.betas="[0.9, 0.98]"', r"must be a list, .*; write \[0.9,0.98\]$"),
        (
            "optim.betas=[1, 2, 3]",
            r"optim.betas must have at most 2 items, not 3, got \[1, 2, 3\]$",
        ),
    ],
)
def test_a_list_that_is_written_otherwise_is_told_how(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("data.train", text) for text in ("{a,b}/0.tar", "{0..7}.tar", "*.tar", "a #1", "#1")),
        *(("text.folder", text) for text in ("@x", "%x", "`x", "[a, b", "'it", "!x", "|x")),
        ("eval.templates", "Sound: {label}, no: 1"),
        ("eval.templates", "Sound #1 of {label}"),
    ],
)
def test_an_override_that_yaml_reads_otherwise_is_told_what_to_type(name: str, text: str):
    with pytest.raises(
        ConfigError, match=f"^the value of {name} must .*; in quotes it is"
    ) as error:
        load_config(None, [f"{name}={text}"])
    typed = shlex.split(str(error.value).partition("it is a text: ")[2])
    section, last = name.split(".")
    value = getattr(getattr(load_config(None, typed), section), last)
    assert value == ((Path(text),) if name == "data.train" else text)


@pytest.mark.parametrize(
    "line",
    ["train: {a,b}/0.tar", "train: *.tar", "train: @x", "train: a: b", "train:\n    - {a,b}/0.tar"],
)
def test_a_line_that_yaml_cannot_read_is_told_in_quotes(line: str, tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text(f"data:\n  {line}\n  cache_gib: 1\n")
    with pytest.raises(ConfigError, match=r"in line [23]; in quotes it is a text: ") as error:
        load_config(file)
    right = str(error.value).partition("it is a text: ")[2]
    file.write_text(file.read_text().replace(line.partition("\n    ")[2] or line, right))
    assert load_config(file).data.train == (Path(re.split("[ -]+", line, maxsplit=1)[1]),)


@pytest.mark.parametrize("value", ["2001-01-01", "12", "a: b", "{a, b}"])
def test_a_path_that_yaml_takes_for_something_else_is_told_the_quotes(value: str):
    remedy = """; in quotes it is a text: 'run.folder="..."'$"""
    with pytest.raises(ConfigError, match=f"^run.folder must be a path, got .*{remedy}"):
        load_config(None, [f"run.folder={value}"])
    with pytest.raises(ConfigError, match=r"""got .*; in quotes it is a text: 'data.val="..."'$"""):
        load_config(None, ["data.val={a,b}"])


@pytest.mark.parametrize("value", ["2001-01-01", "12", "1.5", "yes"])
def test_a_name_that_yaml_takes_for_something_else_is_told_the_quotes(value: str):
    remedy = """; in quotes it is a text: 'run.name="..."'$"""
    with pytest.raises(ConfigError, match=f"^run.name must be a valid string, got .*{remedy}"):
        load_config(None, [f"run.name={value}"])
    assert load_config(None, [f'run.name="{value}"']).run.name == value


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("[{a,b}/0.tar, data/x]", '["{a,b}/0.tar", data/x]'),
        ("[data/x, s3://b/{0..7}.tar, *.tar]", '[data/x, "s3://b/{0..7}.tar", "*.tar"]'),
        ("{path: {a,b}/0.tar, weight: 2}", '{path: "{a,b}/0.tar", weight: 2}'),
    ],
)
def test_what_is_in_a_list_is_told_in_quotes_not_the_list(value: str, right: str, tmp_path: Path):
    right_one = load_config(None, [f"data.train={right}"])
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"data.train={value}"])
    typed = shlex.split(str(error.value).partition("it is a text: ")[2])
    assert load_config(None, typed) == right_one
    file = tmp_path / "c.yaml"
    file.write_text(f"data:\n  train: {value}\n")
    with pytest.raises(ConfigError, match=f"{re.escape(f'train: {right}')}$"):
        load_config(file)


def test_a_list_with_quotes_in_it_is_not_quoted_as_a_whole():
    with pytest.raises(ConfigError, match=r"; put the texts inside of it in quotes$"):
        load_config(None, ['data.train=["{a,b}/0.tar", {c,d}/0.tar]'])
