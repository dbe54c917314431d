"""Settings: what is refused and in which words, what is kept, and what comes back from a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flap_fast.checks import ConfigError, need
from flap_fast.config import Audio, Config, Data, Train, check_before_loading
from flap_fast.configfile import dump_config, load_config, parse_config


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Writes a config file and names it."""

    def write(text: str) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask: {kind: 3d}", "mask.kind must be 'none', '1d' or '2d', got '3d'"),
        ("mask: {ratio: 1.5}", "mask.ratio must be less than 1, got 1.5"),
        ("train: {steps: 0}", "train.steps must be greater than or equal to 1, got 0"),
        ("train: {zero_stage: 4}", "train.zero_stage must be 0, 1, 2 or 3, got 4"),
        (
            "train: {offload: all}",
            "train.zero_stage must be at least 3 with train.offload = all, got 1; "
            "set train.zero_stage=3",
        ),
        (
            "train: {offload: optimizer, zero_stage: 0}",
            "train.zero_stage must be at least 1 with train.offload = optimizer, got 0; "
            "set train.zero_stage=1",
        ),
        (
            "train: {checkpoint_activations: [audio, head]}",
            "train.checkpoint_activations.1 must be 'audio', 'text' or 'decoder', got 'head'",
        ),
        ("train: {epochs: null}", "train.epochs must be set when train.steps is not, got None"),
        ("optim: {lr: fast}", "optim.lr must be a valid number, .* got 'fast'"),
        ("optim: {lr: .inf}", "optim.lr must be a finite number, got inf"),
        ("audio: {mean: .nan}", "audio.mean must be a finite number, got nan"),
        ("optim: {betas: [0.9]}", r"optim.betas.1 must be given, got \[0.9\]"),
        ("joint: {max_scale: 0.5}", "joint.max_scale must be greater than or equal to 1, got 0.5"),
        ("run: {name: a/b}", "run.name must match pattern .*, got 'a/b'"),
        ("data: {train: [a, 3]}", "data.train.1 must be a path, got 3"),
        ("mask: {1: 2}", "mask.1 must be strings, got 1"),
        ("audio: {width: 190}", "audio.width must be a multiple of audio.heads = 12, got 190"),
        ("audio: {frames: 1000}", "audio.frames must be a multiple of 16, got 1000"),
        ("audio: {sample_rate_hz: 99}", "audio.sample_rate_hz must be greater .* 1000, got 99"),
        (
            "audio: {duration_s: 20}",
            "audio.frames must hold the 1998 frames of audio.duration_s = 20, got 1024; "
            "set audio.frames=2000",
        ),
        (
            "audio: {duration_s: 0.02, frames: 16}",
            "audio.duration_s must hold one window of 25 ms, got 0.02",
        ),
        (
            "audio: {use_cls: false, pool: cls}",
            "audio.pool must not be 'cls' without audio.use_cls, got 'cls'",
        ),
        ("text: {width: 770}", "text.width must be a multiple of text.heads = 12, got 770"),
        (
            "text: {packing: padded, attention: xformers}",
            "text.attention must be 'sdpa' with text.packing = padded, got 'xformers'; "
            "set text.packing=auto",
        ),
        (
            "{loss: {simcse: {weight: 0.1}}, text: {dropout: 0}}",
            "text.dropout must be above 0 with loss.simcse, whose two views of a sentence differ "
            "by dropout alone, got 0.0; 0.1 is usual",
        ),
        (
            "{loss: {simcse: {weight: 0.1}}, text: {freeze: true}}",
            "text.freeze must be off with loss.simcse, whose .* by dropout alone, got True",
        ),
        ("loss: {nli: {temperature: 0}}", "loss.nli.temperature must be greater than 0, got 0"),
        ("loss: {simcse: {on: joint}}", "loss.simcse.on must be 'captions' or 'nli', got 'joint'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_rule_and_value(yaml_file, text, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        load_config(yaml_file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask: {ratoi: 0.5}", "mask.ratoi is not a setting: did you mean mask.ratio"),
        ("maks: {ratio: 0.5}", "maks is not a setting: did you mean mask"),
        ("mask: {zzz: 0.5}", "mask.zzz is not a setting. Known here: kind, ratio, unit, "),
        ("loss: {contrastive: {wait: 1}}", "loss.contrastive.wait is not a setting: did you mean "),
        ("zzz: 1", "zzz is not a setting. Known here: run, data, frontend, audio, "),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(yaml_file, text, message):
    with pytest.raises(ConfigError) as error:
        load_config(yaml_file(text))
    assert str(error.value).startswith(message)
    assert "Known here: " in str(error.value)


def test_every_fault_of_a_file_is_named_at_once(yaml_file):
    with pytest.raises(ConfigError) as error:
        load_config(yaml_file("mask: {kind: 3d, ratio: 1.5}\noptim: {lr: 0, speed: 1}"))
    names = [line.split()[0] for line in str(error.value).splitlines()]
    assert names == ["mask.kind", "mask.ratio", "optim.lr", "optim.speed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audio: [", "must be YAML: "),
        ("- audio", "must hold sections, got 'list'"),
        ("mask: {kind: 1d}\nmask: {ratio: 0.5}", "'mask' must stand once"),
        ("mask: {kind: 1d, kind: 2d}", "'kind' must stand once"),
    ],
)
def test_a_file_that_cannot_be_read_as_settings_is_named(yaml_file, text, message):
    file = yaml_file(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"the config must be an existing YAML file, got '.*/no'"):
        load_config(tmp_path / "no")


def test_a_file_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match=r"c\.yaml must be YAML: "):
        load_config(tmp_path / "c.yaml")


def test_scientific_notation_without_a_point_is_a_number(yaml_file):
    """PyYAML reads `1e-4` as a string."""
    assert yaml.safe_load("1e-4") == "1e-4"
    assert load_config(yaml_file("optim: {lr: 1e-4}"), ["optim.eps=1e-6"]).optim.lr == 1e-4
    assert load_config(None, ["optim.eps=1e-6"]).optim.eps == 1e-6


def test_an_empty_file_or_section_means_the_defaults(yaml_file):
    assert load_config(yaml_file("# nothing\n")) == Config()
    assert load_config(yaml_file("mask:\n  # kind: 1d\n")) == Config()
    assert load_config(yaml_file("mask:\n"), ["mask.kind=1d"]).mask.kind == "1d"


def test_overrides_win_over_the_file_and_later_ones_over_earlier(yaml_file):
    file = yaml_file("mask: {kind: 1d, ratio: 0.3}\ndata: {train: a}")
    config = load_config(
        file, ["mask.ratio=0.5", "mask.ratio=0.6", "data.train=[b, c]", "text.folder=x=y"]
    )
    assert (config.mask.kind, config.mask.ratio) == ("1d", 0.6)
    assert config.data.train == (Path("b"), Path("c"))
    assert config.text.folder == "x=y"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask.kind", "an override must have the form section.name=value, got 'mask.kind'"),
        ("=3", "an override must have the form section.name=value, got '=3'"),
        ("mask.kind=[", "the value of mask.kind must be YAML: "),
        ("mask.kind=3d", "mask.kind must be 'none', '1d' or '2d', got '3d'"),
        ("run.name=2024", "run.name must be a valid string, got 2024"),
        ("mask.knid=1d", "mask.knid is not a setting: did you mean mask.kind"),
    ],
)
def test_a_wrong_override_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    assert str(error.value).startswith(message)


def test_an_override_inside_a_value_is_refused(yaml_file):
    with pytest.raises(ConfigError, match=r"mask.kind.x must name a setting inside a section"):
        load_config(yaml_file("mask: {kind: 1d}"), ["mask.kind.x=1"])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.steps=20"],
        ["optim.lr=1e-5", "optim.betas=[0.99, 0.9]", "data.train=[a, b]", "text.folder=models/x"],
        ["audio.size=small", "audio.frames=256", "audio.duration_s=2.5", "mask.kind=none"],
        ["loss.simcse.on=nli", "loss.simcse.weight=0.1", "data.nli=data/nli"],
    ],
)
def test_a_dumped_config_reads_back_equal(yaml_file, overrides):
    config = load_config(None, overrides)
    text = dump_config(config)
    again = load_config(yaml_file(text))
    assert again == config
    assert dump_config(again) == text


def test_every_setting_is_explained():
    """A knob is a field with a docstring."""

    def fields(section):
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if hasattr(value, "model_fields_set"):
                yield from fields(value)
            else:
                yield name, field.description

    assert [name for name, text in fields(Config()) if not text] == []


def test_settings_cannot_be_changed_after_the_check():
    with pytest.raises(ValueError, match="frozen"):
        Config().mask.ratio = 0.5  # type: ignore[misc]


def test_steps_take_the_place_of_epochs():
    assert Train().epochs == 45
    assert (Train(steps=7).epochs, Train(steps=7).steps) == (None, 7)
    assert Train(epochs=3, steps=None).epochs == 3


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("true", ("audio", "text", "decoder")),
        ("false", ()),
        ("text", ("text",)),
        ("[audio, decoder]", ("audio", "decoder")),
    ],
)
def test_towers_whose_activations_are_recomputed_have_names(value, names):
    config = load_config(None, [f"train.checkpoint_activations={value}"])
    assert config.train.checkpoint_activations == names
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_sizes_follow_the_papers():
    audio = Audio()
    assert (audio.grid, audio.samples, audio.window, audio.hop) == ((64, 8), 160_000, 400, 160)
    shapes = {
        "tiny": (192, 4, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
    }
    found = {size: Audio.model_validate({"size": size}).shape for size in shapes}
    assert found == shapes
    assert Audio(size="base", width=64, heads=2).shape == (64, 12, 2)


def test_998_frames_of_ten_seconds_fit_into_1008_and_not_into_992():
    assert Audio(frames=1008).frames == 1008
    with pytest.raises(ConfigError, match=r"998 frames .* got 992; set audio.frames=1008"):
        parse_config({"audio": {"frames": 992}})


def test_a_batch_that_ranks_do_not_divide_is_refused_with_one_that_they_do(tmp_path):
    config = Config(train=Train(global_batch=100), data=Data(train=(tmp_path,)))
    check_before_loading(config, world=4)
    with pytest.raises(ConfigError) as error:
        check_before_loading(config, world=8)
    assert str(error.value) == (
        "train.global_batch must be a multiple of the 8 ranks, got 100; for example 96"
    )


def test_a_run_without_data_is_refused():
    with pytest.raises(ConfigError, match=r"data.train must name at least one folder of shards"):
        check_before_loading(Config(), world=1)


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_missing_folder_is_refused_with_the_command_that_makes_it(tmp_path, name):
    folders = {"train": (tmp_path,), name: (tmp_path, tmp_path / "no")}
    with pytest.raises(ConfigError, match=rf"data.{name} must be .*/no'; write them .* flap prepa"):
        check_before_loading(Config(data=Data(**folders)), world=1)


def test_a_wrong_config_dies_before_anything_is_loaded(yaml_file):
    """In milliseconds, not after torch and a model came up."""
    file = yaml_file("data: {train: nowhere}\nmask: {kind: 3d}")
    program = (
        "import sys; from flap_fast.configfile import load_config\n"
        f"try: load_config({str(file)!r})\n"
        "except ValueError as error: print(error)\n"
        "print([m for m in ('torch', 'transformers', 'nvidia', 'soundfile') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["mask.kind must be 'none', '1d' or '2d', got '3d'", "[]"]


def test_parsing_does_not_change_what_it_is_given():
    tree = {"data": {"train": "a"}, "train": {"steps": 3}}
    parse_config(tree)
    assert tree == {"data": {"train": "a"}, "train": {"steps": 3}}


def test_need_says_name_rule_value_and_remedy():
    need(True, "a.b", "be 1", 1)
    with pytest.raises(ConfigError, match=r"^a.b must be 1, got 'x'; write 1$"):
        need(False, "a.b", "be 1", "x", "write 1")
