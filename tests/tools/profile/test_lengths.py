"""Lengths of clips that plans and synthetic batches are for, and the work that follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flap_fast.__main__ import app
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.batch import PackedMels
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.shards import open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile import measure
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.lengths import LengthMix, frames_of, length_mix, wavcaps_like
from flap_fast.tools.profile.measure import profile
from flap_fast.tools.profile.plan import Machine, plan
from flap_fast.tools.profile.synthetic import SyntheticLoader
from flap_fast.tools.profile.work import rank_work
from flap_fast.training.setup import clip_tokens
from tests.tiny import tiny

VARIABLE = ("audio.length=variable", "audio.max_duration_s=2")
MIX = LengthMix("a test", np.array([0.05, 0.3, 0.7, 0.7, 1.1, 1.9, 3.0]))


def test_a_file_of_seconds_and_a_manifest_give_the_same_mix(tmp_path: Path):
    numbers, manifest = tmp_path / "seconds.txt", tmp_path / "clips.jsonl"
    numbers.write_text("3.5\n\n1\n2e0\n")
    rows = [{"audio": f"{s}.wav", "caption": "x", "duration_s": s} for s in (3.5, 1, 2)]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    for file in (numbers, manifest):
        mix = length_mix(tiny(*VARIABLE), file)
        assert mix is not None
        assert mix.seconds.tolist() == [1, 2, 3.5]
        assert mix.source == str(file)


@pytest.mark.parametrize("line", ["long", "0", "-1", "Infinity", "NaN", "[1]", '{"audio": "a"}'])
def test_a_line_that_is_no_length_is_named(tmp_path: Path, line: str):
    file = tmp_path / "seconds.txt"
    file.write_text(f"1.5\n{line}\n")
    with pytest.raises(
        ConfigError, match=r"line 2, must be seconds above 0, or .* duration_s, got"
    ):
        length_mix(tiny(*VARIABLE), file)


def test_lengths_are_refused_where_they_mean_nothing(tmp_path: Path):
    file = tmp_path / "seconds.txt"
    with pytest.raises(ConfigError, match="--lengths must name an existing file"):
        length_mix(tiny(*VARIABLE), file)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="--lengths must hold at least one length"):
        length_mix(tiny(*VARIABLE), file)
    with pytest.raises(ConfigError, match="--lengths must be left out where all clips have one"):
        length_mix(tiny(), file)
    assert length_mix(tiny()) is None


def test_without_a_file_the_lengths_are_those_of_the_shards(prepared: Path):
    mix = length_mix(tiny(*VARIABLE, f"data.train={prepared}/train"))
    assert mix is not None
    assert mix.source == "data.train"
    shards = open_shards([prepared / "train"])
    assert len(mix.seconds) == len(shards)
    assert mix.seconds[0] < mix.seconds[-1]


def test_the_default_mix_has_the_published_means():
    """67.59 s over all of WavCaps, 10 s of AudioSet; quantiles cut a lognormal's last tail."""
    mix = wavcaps_like()
    assert mix.seconds.mean() == pytest.approx(67.59, rel=0.03)
    assert (mix.seconds == 10).mean() == pytest.approx(108_317 / 403_050, rel=1e-3)
    assert length_mix(tiny(*VARIABLE, "data.train=nowhere")) is not None


def test_any_number_of_clips_stands_for_the_mix():
    mix = LengthMix("a test", np.arange(1.0, 101.0))
    assert mix.spread(4).tolist() == [13, 38, 63, 88]
    for clips in (10, 64, 100, 1000):
        assert mix.spread(clips).mean() == pytest.approx(50.5, rel=0.02)


@pytest.mark.parametrize("micro", ["train.micro_batch=null", "train.micro_tokens=90"])
def test_work_is_that_of_synthetic_batches_of_the_rank_that_has_most(micro: str):
    config, world = tiny(*VARIABLE, "train.global_batch=12", micro), 3
    work, text = rank_work(config, world, MIX), TwoTowers(config).text
    assert work.lengths is not None
    steps = [
        list(SyntheticLoader(config, text, Ranks(rank, world), MIX).batches(0, 1))
        for rank in range(world)
    ]
    frames = [sorted(frames_in(config, batches)) for batches in steps]
    assert tuple(work.lengths.frames) in {tuple(some) for some in frames}
    assert sorted(n for some in frames for n in some) == list(frames_of(config, MIX.spread(12)))
    assert {len(batches) for batches in steps} == {work.micro_batches}
    rows = np.concatenate([batch.clips for batches in steps for batch in batches])
    assert sorted(rows.tolist()) == list(range(12))


def frames_in(config: Config, batches: list) -> list[int]:
    found = []
    for batch in batches:
        assert isinstance(batch.media, PackedMels)
        assert batch.media.mel.shape == (sum(batch.media.frames), config.audio.mel_bins)
        assert len(batch.ids) == len(batch.attention_mask) == len(batch.sample_index)
        found += batch.media.frames
    return found


def test_work_is_that_of_the_trainers_loader_on_clips_of_these_lengths(prepared: Path):
    """An epoch that is one step, so that its clips are all of the mix."""
    data = (f"data.train={prepared}/train", "frontend.backend=torch")
    shards = open_shards([prepared / "train"])
    batch = f"train.global_batch={len(shards)}"
    config = tiny(*VARIABLE, *data, batch, "train.micro_tokens=200")
    tokens = clip_tokens(config, shards, Ranks())
    loader = TrainingLoader(config, shards, tokenizer(config.text), Ranks(), tokens)
    work = rank_work(config, 1, length_mix(config))
    assert work.lengths is not None
    assert loader.work(0) == {
        "media_tokens": work.lengths.tokens,
        "micro_batches": work.micro_batches,
        "rank_balance": work.lengths.balance,
    }


def test_bytes_of_many_clips_follow_from_a_few_that_stand_for_them():
    """The line through two packs against the pack itself, as on a GPU, to 2 %."""
    config = tiny(*VARIABLE, "audio.width=64", "audio.depth=4", "train.global_batch=96")
    counts, work = StepCounts(config, half=True, mix=MIX), rank_work(config, 1, MIX)
    assert work.lengths is not None
    line = counts.towers(work.at_once, 16)
    whole = counts._traced(96, 16, work.lengths.frames)[1]
    assert line.kept.max() == pytest.approx(whole.kept.max(), rel=0.02)
    assert line.batch.max() == pytest.approx(whole.batch.max(), rel=0.02)


SMALL = (
    *("audio.width=96", "audio.depth=3", "audio.heads=3", "text.folder=null", "text.width=64"),
    *("text.depth=2", "text.heads=2", "text.tokenizer=bytes"),
)


def test_a_budget_that_fits_is_named_where_the_batch_does_not():
    less = (*SMALL, "audio.length=variable", "train.global_batch=256")
    whole = plan(load_config(None, less), Machine(gpus=1)).memory.peak
    machine = Machine(gpus=1, memory_gib=0.4 * whole / 2**30)
    small = plan(load_config(None, less), machine)
    assert not small.fits
    assert small.largest_micro_batch > 0
    assert f"set train.micro_tokens={small.largest_micro_batch}, " in small.remedy()
    taken = load_config(None, [*less, f"train.micro_tokens={small.largest_micro_batch}"])
    parts = plan(taken, machine)
    assert parts.fits
    assert parts.micro_batches > 1
    assert parts.lengths is not None
    assert parts.lengths["micro_tokens"] <= small.largest_micro_batch
    assert parts.step_s > small.step_s
    best = load_config(None, [*less, f"train.global_batch={small.largest_clips}"])
    assert plan(best, machine).fits


def test_longer_clips_take_more_of_everything():
    config = load_config(None, [*SMALL, "audio.length=variable"])
    short, long = (plan(config, Machine(), LengthMix("", np.full(9, s))) for s in (5.0, 20.0))
    assert short.lengths is not None
    assert long.lengths is not None
    assert 3.8 < long.lengths["tokens"] / short.lengths["tokens"] < 4.2
    flop = [planned.flop["audio tower"].total for planned in (short, long)]
    assert flop[1] > 4 * flop[0]
    assert long.memory.activations["audio tower"] > 3.5 * short.memory.activations["audio tower"]
    assert short.clips_per_s > long.clips_per_s


def test_clips_of_the_fixed_length_are_planned_as_fixed_ones_are():
    """10 s have 63 columns, of which 50 stay; 1024 frames have 64, of which 51 do."""
    mix = LengthMix("10 s", np.full(5, 10.0))
    settings = ["audio.size=base", "text.folder=models/nowhere", "train.global_batch=64"]
    fixed = plan(load_config(None, settings), Machine(gpus=1))
    variable = plan(load_config(None, [*settings, "audio.length=variable"]), Machine(gpus=1), mix)
    ratio = variable.flop["audio tower"].total / fixed.flop["audio tower"].total
    assert 0.97 * 50 / 51 < ratio < 1.0
    assert variable.memory.peak == pytest.approx(fixed.memory.peak, rel=0.04)


def test_the_command_says_which_lengths_it_assumed(tmp_path: Path):
    file = tmp_path / "seconds.txt"
    file.write_text("\n".join(["4", "5", "6", "45"]))
    command = ["plan", "configs/flap_variable.yaml", "--gpus", "2", "train.global_batch=64"]
    result = CliRunner().invoke(app, [*command, "--lengths", str(file)])
    assert result.exit_code == 0, result.output
    for words in ("lengths of 4 clips", "mean 15.0 s", "longest 45.0 s, 25.0 % are cropped"):
        assert words in result.output
    assert "largest train.micro_tokens that fits" in result.output
    result = CliRunner().invoke(app, command)
    assert "a WavCaps-like default" in result.output


def test_a_profile_of_synthetic_clips_has_their_lengths(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(measure, "_SEARCH_S", 4.0)
    file, out = tmp_path / "seconds.txt", tmp_path / "profile"
    file.write_text("\n".join(map(str, MIX.seconds)))
    setting = ["audio.length=variable", "audio.max_duration_s=2", "train.micro_tokens=2000"]
    command = ["profile", "configs/tiny.yaml", "--synthetic", "--steps", "1", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--lengths", str(file), *setting])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "profile.json").read_text())
    assert found["lengths"]["clips"] == len(MIX.seconds)
    assert found["micro_batch"]["micro_tokens"] > 0
    assert "largest train.micro_tokens: " in result.output
    assert "longest 3.0 s" in result.output


@pytest.mark.slow
def test_a_profile_on_shards_deals_clips_as_training_does(prepared: Path, tmp_path: Path):
    data = (f"data.train={prepared}/train", "frontend.backend=torch", "train.global_batch=12")
    config = tiny(*VARIABLE, *data, "train.micro_tokens=200")
    found = profile(config, steps=2, search=False, out=tmp_path)
    assert found is not None
    shards = open_shards([prepared / "train"])
    tokens = clip_tokens(config, shards, Ranks())
    loader = TrainingLoader(config, shards, tokenizer(config.text), Ranks(), tokens)
    # After three steps of warm-up.
    works = [loader.work(step)["micro_batches"] for step in (3, 4)]
    assert found["micro_batches"] == round(np.mean(works)) > 1
    assert found["passes"] == 2
    assert found["lengths"]["source"] == "data.train"
    assert found["flop"]["audio tower"]["first_pass"] > 0


def test_the_largest_micro_batch_of_short_clips_is_one_that_a_config_takes():
    """It must hold a clip of audio.max_duration_s, though none is so long."""
    config = tiny("audio.length=variable", "train.engine=plain")
    short = LengthMix("short clips", np.full(9, 0.2))
    largest = plan(config, Machine(gpus=1), short).largest_micro_batch
    assert plan(
        tiny("audio.length=variable", "train.engine=plain", f"train.micro_tokens={largest}"),
        Machine(gpus=1),
        short,
    ).fits
