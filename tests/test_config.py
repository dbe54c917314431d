"""Settings: what is refused and in which words, what is kept, and what comes back from a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flap_fast.checks import ConfigError, require
from flap_fast.config import Config, Data, Fusion, Train, check_before_loading
from flap_fast.config.file import dump_config, load_config, parse_config
from flap_fast.encoders.clip_resnet.settings import ClipResNetSettings
from flap_fast.encoders.htsat.settings import HTSATSettings
from flap_fast.encoders.vit.settings import ViTSettings
from tests.tiny import htsat_of


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Writes a config file and names it."""

    def write(text: str, name: str = "config.yaml") -> Path:
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask: {kind: 3d}", "mask.kind must be 'none', '1d' or '2d', got '3d'"),
        ("mask: {ratio: 1.5}", "mask.ratio must be less than 1, got 1.5"),
        ("train: {steps: -1}", "train.steps must be greater than or equal to 0, got -1"),
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
        ("data: {train: [a, 3]}", "data.train.1 must be a path or a URL, got 3"),
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
            "audio: {length: variable, frames: 8, pos_grid: audiomae_legacy}",
            "audio.frames must be a multiple of 16 with audio.pos_grid = audiomae_legacy, got 8",
        ),
        (
            "audio: {length: variable, max_duration_s: 0.1}",
            "audio.max_duration_s must hold one patch of 175 ms, got 0.1",
        ),
        (
            "audio: {length: variable, max_duration_s: 1.0e+9}",  # its positions would be held
            "audio.max_duration_s must be less than or equal to 3600, got 1000000000.0",
        ),
        (
            "audio: {use_cls: false, pool: cls}",
            "audio.pool must not be 'cls' without audio.use_cls, got 'cls'",
        ),
        (
            "audio: {depths: [2, 2]}",
            r"audio.depths must be left out with audio.encoder = vit, got \[2, 2\]; it is a "
            r"setting of audio.encoder = htsat \(audio.depths=null leaves it out\)",
        ),
        (
            "audio: {mel: clap, high_hz: 30000}",
            r"audio.high_hz must be in \(audio.low_hz = 50, half .*\], got 30000.0",
        ),
        (
            "audio: {encoder: htsat}\nmask: {kind: 2d}",
            "mask.kind must be 'none' with audio.encoder = htsat, whose windows need every patch, "
            "got '2d'; set mask.kind=none",
        ),
        (
            "audio: {encoder: htsat}\nloss: {recon: {weight: 1}}",
            "loss.recon.weight must be 0 with audio.encoder = htsat, which drops no patches to "
            "reconstruct, got 1.0; set loss.recon.weight=0",
        ),
        (
            "audio: {encoder: htsat}\ntrain: {compile: true}",
            "train.compile must be off with audio.encoder = htsat, .*, got True; set .*",
        ),
        (
            "audio: {encoder: htsat, frames: 1024}",
            "audio.frames must be the 1001 frames of audio.duration_s = 10 for HTSAT, got 1024; "
            "set audio.frames=1001",
        ),
        (
            "audio: {encoder: htsat, depth: 3}",
            "audio.depth must be left out with audio.encoder = htsat, got 3; it is .* = vit .*",
        ),
        (
            "audio: {encoder: htsat, size: small}",
            "audio.size must be 'tiny', 'base' or 'large', got 'small'",
        ),
        ("audio: {encoder: htsat, width: 98}", "audio.width must be a multiple .*, got 98"),
        (
            "audio: {encoder: htsat, attention: xformers}",
            "audio.attention must be left out with audio.encoder = htsat, got 'xformers'; .*",
        ),
        ("audio: {mel: [1]}", r"audio.mel must be 'kaldi', 'clap' or 'yamnet', got \[1\]"),
        ("audio: {encoder: null}", "audio.encoder must be 'vit', 'htsat' or 'yamnet', got None"),
        ("audio: {encoder: [1]}", r"audio.encoder must be 'vit', 'htsat' or 'yamnet', got \[1\]"),
        ("text: clip", "text must be a section of settings, got 'clip'"),
        (
            "image: {}\naudio: {encoder: htsat}",
            "audio must be left out where image is set, .*, got '.*encoder.*'",
        ),
        (
            "image: {}\nfusion: {type: aff_2d}",
            "fusion.type must be 'none' with image.encoder = resnet50, which cannot fuse, got .*",
        ),
        (
            "audio: {encoder: htsat, window_patches: 13}",
            "audio.window_patches must divide each of 4 stages .*, got 13; change it, or .*",
        ),
        (
            "fusion: {type: aff_2d, max_duration_s: 5}",
            "fusion.max_duration_s must be at least audio.duration_s = 10, got 5.0",
        ),
        (
            "fusion: {type: daf_1d, force_one: false}\ntrain: {zero_stage: 3}",
            "fusion.force_one must be true with train.zero_stage = 3, .*, got False",
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


def test_another_encoder_takes_a_files_place_where_null_leaves_out_what_it_lacks(yaml_file):
    """The command line cannot leave out a line of the file."""
    file = yaml_file("audio: {depth: 2, use_cls: false}\ntext: {pool: mean}")
    nulls = ("audio.depth=null", "audio.use_cls=null", "text.pool=null")
    config = load_config(file, ["audio.encoder=htsat", "text.encoder=clip", *nulls])
    assert config == load_config(None, ["audio.encoder=htsat", "text.encoder=clip"])
    with pytest.raises(ConfigError, match=r"audio\.deep is not a setting"):
        load_config(file, ["audio.deep=null"])


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
    assert config.text.tokenizer_files == ("text.folder", "x=y")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mask.kind", "an override must have the form section.name=value, got 'mask.kind'"),
        ("=3", "an override must have the form section.name=value, got '=3'"),
        ("mask.kind=[", "the value of mask.kind must be YAML: "),
        ("mask.kind=3d", "mask.kind must be 'none', '1d' or '2d', got '3d'"),
        ("run.name=2024", "run.name must be a valid string, got 2024"),
        ("train.steps=true", "train.steps must not be true or false, got True"),
        ("optim.betas=[0.9, false]", "optim.betas must not be true or false, got "),
        ("loss.contrastive.prefixes=[true]", "loss.contrastive.prefixes must not be true or"),
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
        ["audio.encoder=htsat", "audio.depths=[2, 2]", "specaug.stripes=3"],
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
    assert Train(epochs=None, steps=7).steps == 7


def test_of_steps_and_epochs_the_one_said_last_counts(yaml_file):
    assert load_config("configs/demo.yaml", ["train.epochs=3"]).train.epochs == 3
    dumped = yaml_file(dump_config(load_config("configs/flap.yaml")))
    assert load_config(dumped, ["train.steps=20"]).train.steps == 20
    derived = yaml_file(f"base: {dumped.name}\ntrain: {{steps: 7}}", "derived.yaml")
    assert load_config(derived).train.steps == 7
    message = (
        r"^train\.epochs must be left out with train\.steps = 20, got 3; set train\.steps=null"
    )
    with pytest.raises(ConfigError, match=message):
        load_config(derived, ["train.epochs=3", "train.steps=20"])


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
    audio = ViTSettings()
    assert (audio.grid, audio.samples, audio.window, audio.hop) == ((64, 8), 160_000, 400, 160)
    shapes = {
        "tiny": (192, 4, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
    }
    found = {size: ViTSettings.model_validate({"size": size}).shape for size in shapes}
    assert found == shapes
    assert ViTSettings(size="base", width=64, heads=2).shape == (64, 12, 2)


def test_htsat_brings_its_front_end_its_specaug_and_no_mask():
    config = load_config(None, ["audio.encoder=htsat"])
    audio, specaug = htsat_of(config), config.specaug
    assert (audio.mel, audio.sample_rate_hz, audio.samples) == ("clap", 48_000, 480_000)
    assert (audio.window, audio.hop, audio.mel_bins, audio.frames) == (1024, 480, 64, 1001)
    assert (audio.low_hz, audio.high_hz, audio.int16_roundtrip) == (50, 14_000, True)
    assert (audio.mel_variant, audio.mean, audio.std) == ("slaney_norm", 0, 0.5)
    assert (audio.patch, audio.image_side, audio.grid) == (4, 256, (64, 64))
    assert audio.stages == ((96, 2, 4), (192, 2, 8), (384, 6, 16), (768, 2, 32))
    assert (audio.drop_path, config.mask.kind) == (0.1, "none")
    assert (specaug.time_frames, specaug.freq_bins, specaug.stripes) == (64, 8, 2)


def test_what_follows_the_encoder_can_be_set_and_a_ViT_has_none_of_it():
    tree = {"audio": {"encoder": "htsat", "drop_path": 0.0}, "specaug": {"freq_bins": 3}}
    config = parse_config(tree)
    assert (htsat_of(config).drop_path, htsat_of(config).patch) == (0, 4)
    assert (config.specaug.freq_bins, config.specaug.time_frames) == (3, 64)
    assert Config(audio=HTSATSettings()).mask.kind == "none"
    plain = Config()
    assert (plain.mask.kind, plain.specaug.stripes, plain.audio.mel) == ("2d", 1, "kaldi")
    assert not plain.audio.int16_roundtrip


def test_fusion_brings_torchaudios_mel_matrix():
    fused = ["audio.encoder=htsat", "fusion.type=aff_2d"]
    assert load_config(None, fused).audio.mel_variant == "htk_none"
    kept = load_config(None, [*fused, "audio.mel_variant=slaney_norm"])
    assert kept.audio.mel_variant == "slaney_norm"
    assert load_config(None, fused[:1]).audio.mel_variant == "slaney_norm"


def test_fusion_says_how_much_of_a_clip_is_decoded():
    audio = ViTSettings()
    assert Fusion().longest(audio) == audio.samples == 160_000
    assert Fusion(type="aff_2d").longest(audio) == 480_000
    assert Fusion(type="aff_2d", max_duration_s=12.5).longest(audio) == 200_000


def test_five_seconds_fold_into_the_square_of_ten():
    """501 frames of 64 bins would fit into 192 x 192, which four stages of windows cannot halve."""
    assert HTSATSettings(duration_s=5.0, frames=501).image_side == 256
    assert HTSATSettings(duration_s=20.0, frames=2001).image_side == 512


def test_998_frames_of_ten_seconds_fit_into_1008_and_not_into_992():
    assert ViTSettings(frames=1008).frames == 1008
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


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("audio.width=8388608", "audio.width"),
        ("text.width=8388608", "text.width and text.depth"),
        ("joint.width=10000000000", "joint.width"),
        ("audio={encoder: htsat, width: 8388608, depths: [2, 2]}", "audio.width and audio.depths"),
        ("image={width: 8388608}", "image.width and image.layers"),
    ],
)
def test_weights_that_no_memory_holds_are_refused_before_they_are_built(override, names, tmp_path):
    small = ["audio.heads=1", "text.heads=1"] if "{" not in override else []
    config = load_config(None, [f"data.train={tmp_path}", *small, override])
    with pytest.raises(ConfigError, match=rf"^{names} must give weights that fit in this machine"):
        check_before_loading(config, world=1)


def test_sizes_that_a_text_folder_replaces_are_not_counted(tmp_path):
    given = [f"data.train={tmp_path}", f"text.folder={tmp_path}", "text.width=8388608"]
    check_before_loading(load_config(None, given), world=1)


@pytest.mark.parametrize(
    "name",
    [
        *("audio.mel_bins", "audio.frames", "audio.depth", "text.max_tokens", "text.depth"),
        *("decoder.depth", "frontend.threads"),
    ],
)
def test_counts_that_no_memory_holds_are_refused(name):
    with pytest.raises(ConfigError, match=f"^{name} must be less than or equal to"):
        load_config(None, [f"{name}=1000000000000"])


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
        "import sys; from flap_fast.config.file import load_config\n"
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
    require(True, "a.b", "be 1", 1)
    with pytest.raises(ConfigError, match=r"^a.b must be 1, got 'x'; write 1$"):
        require(False, "a.b", "be 1", "x", "write 1")


def test_an_image_tower_replaces_the_audio_tower_and_nothing_of_it_is_masked():
    config = load_config(None, ["image.width=8", "eval.batch=3"])
    assert config.image is not None
    assert isinstance(config.image, ClipResNetSettings)
    assert (config.image.heads, config.image.resolution) == (4, 224)
    assert (config.mask.kind, config.specaug.time_frames, config.specaug.freq_bins) == (
        "none",
        0,
        0,
    )
    assert (config.eval.crop, config.eval.templates, config.eval.batch) == (
        "center",
        "imagenet80",
        3,
    )
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert load_config(None, ["image={}"]).image == ClipResNetSettings()
    assert load_config(None, ["image=null"]).image is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("mask.kind=1d", "mask.kind must be 'none' with image.encoder = resnet50, .*, got '1d'"),
        ("specaug.freq_bins=2", "specaug.freq_bins must be 0 with image.encoder = .*, got 2"),
        ("loss.recon.weight=1", "loss.recon.weight must be 0 with image.encoder = .*, got 1.0"),
        ("eval.crop=multi:3", "eval.crop must be center with image.encoder = .*, got 'multi:3'"),
        ("audio.size=tiny", "audio must be left out where image is set, .*, got 'size'"),
        ("train.compile=true", "train.compile must be off with image.encoder = resnet50"),
        ("train.checkpoint_activations=true", "train.checkpoint_activations must not name audio"),
        ("frontend.backend=dali_mel", "frontend.backend must not be dali_mel with image.encoder"),
        ("image.resolution=100", "image.resolution must be a multiple of 32, got 100"),
        ("image.resolutoin=64", "did you mean image.resolution"),
    ],
)
def test_what_an_image_tower_cannot_have_is_refused(override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_config(None, ["image.width=8", override])


def test_clips_text_tower_has_clips_sizes_and_its_own_end_of_text():
    text = load_config(None, ["text.encoder=clip"]).text
    assert (text.width, text.depth, text.heads) == (512, 12, 8)
    for override in ("folder=x", "pool=mean", "packing=packed", "attention=xformers"):
        name = override.partition("=")[0]
        with pytest.raises(ConfigError, match=f"text.{name} must .*, got .* = roberta"):
            load_config(None, ["text.encoder=clip", f"text.{override}"])


def test_a_config_takes_from_its_base_what_it_leaves_out(tmp_path: Path):
    (tmp_path / "far.yaml").write_text("run: {name: far, seed: 1}\nmask: {kind: 1d, ratio: 0.3}\n")
    (tmp_path / "near.yaml").write_text("base: far.yaml\nmask: {ratio: 0.5}\n")
    (tmp_path / "own.yaml").write_text("base: near.yaml\nrun: {name: own}\n")
    config = load_config(tmp_path / "own.yaml", ["mask.unit=frame"])
    assert (config.run.name, config.run.seed) == ("own", 1)
    assert (config.mask.kind, config.mask.ratio, config.mask.unit) == ("1d", 0.5, "frame")
    assert "base:" not in dump_config(config)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", r"the base of .*a\.yaml must be an existing YAML file, got '.*nowhere"),
        ("a.yaml", "the base of .*a.yaml must not lead back to itself"),
        ("[a.yaml]", "base in .*a.yaml must name a YAML file in the same folder"),
    ],
)
def test_a_base_that_cannot_be_is_refused(base: str, message: str, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml")
