"""Sets with weights: each clip as often as its weight says, by seed and epoch alone."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flap_fast.checks import ConfigError
from flap_fast.config.file import dump_config, load_config, parse_config
from flap_fast.data.lengths import clip_seconds
from flap_fast.data.listing import ShardsOfSet
from flap_fast.data.mixing import Mixture, mixture
from flap_fast.data.sampler import Sampler
from flap_fast.data.shards import open_shards
from flap_fast.places import Weighted
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.lengths import length_mix
from tests.data.test_enriched import read
from tests.data.test_enriched import write_captions as with_enriched
from tests.data.test_loader import assert_same, batches, loader
from tests.serving import serving
from tests.tiny import tiny

# Three sets of two, one and two shards: of 10, 7 and 9 clips.
FILES = np.repeat([0, 1, 2, 3, 4], [6, 4, 7, 5, 4])


def mixed(*weights: float) -> Mixture:
    names = zip((2, 1, 2), weights, "abc", strict=True)
    return mixture([ShardsOfSet(*one) for one in names], FILES, FILES)


def sampler(found: Mixture, batch: int = 1, window: int = 0) -> Sampler:
    return Sampler(found.files, batch, 3407, window, parts=found.parts)


def counts(found: Mixture, order: Sampler, epoch: int) -> list[int]:
    """How often each of the 26 clips comes in an epoch's steps."""
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    samples = np.concatenate([order.samples(step) for step in steps])
    return np.bincount(found.base[samples], minlength=26).tolist()


@pytest.mark.parametrize("window", [0, 1, 2])
def test_an_epoch_has_each_clip_as_often_as_its_weight_says(window):
    found = mixed(2, 0.5, 2.3)
    order = sampler(found, window=window)
    # 2 x 10, half of 7, and 2.3 x 9 = 20.7.
    assert (order.epoch_samples, order.steps_per_epoch) == (20 + 4 + 21, 45)
    for epoch in range(4):
        of_clip = counts(found, order, epoch)
        assert of_clip[:10] == [2] * 10
        assert sorted(of_clip[10:17]) == [0] * 3 + [1] * 4
        assert sorted(of_clip[17:]) == [2] * 6 + [3] * 3


@pytest.mark.parametrize(
    ("weight", "epochs", "each"), [(0.5, 2, 1), (0.2, 5, 1), (0.8, 5, 4), (1.5, 2, 3), (1.0, 1, 1)]
)
def test_over_the_epochs_of_a_round_each_clip_comes_equally_often(weight, epochs, each):
    found = mixed(weight, 1, 1)
    order = sampler(found)
    for first in (0, epochs, 4 * epochs):
        of_clip = [counts(found, order, first + n)[:10] for n in range(epochs)]
        assert np.sum(of_clip, 0).tolist() == [each] * 10
    rounds = {tuple(counts(found, order, epochs * n)[:10]) for n in range(8)}
    assert len(rounds) > 1 or weight == 1  # drawn anew in each round


def test_an_odd_set_is_also_covered_by_its_halves():
    found = mixed(1, 0.5, 1)
    order = sampler(found)
    both = np.array([counts(found, order, epoch)[10:17] for epoch in (0, 1)])
    assert both.sum(1).tolist() == [4, 4]
    assert both.sum(0).min() == 1


def test_copies_of_a_shard_are_shards_of_their_own_in_a_window():
    found = mixed(3, 1, 1)
    order = sampler(found, window=1)
    files = found.files[np.concatenate([order.samples(s) for s in range(order.steps_per_epoch)])]
    visits = 1 + np.count_nonzero(np.diff(files))
    assert visits == len(set(files.tolist())) == 3 * 2 + 1 + 2


def test_a_step_is_the_same_for_whoever_comes_at_once():
    through = sampler(mixed(2, 0.5, 0.3), 4, 2)
    wanted = [through.samples(step).tolist() for step in range(40)]
    for step in (39, 7, 21):
        assert sampler(mixed(2, 0.5, 0.3), 4, 2).samples(step).tolist() == wanted[step]


def test_a_set_of_which_an_epoch_takes_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"one clip of each set .* weight 0\.05 for the 7 clips"):
        mixed(1, 0.05, 1)
    sampler(mixed(1, 0.08, 1))


@pytest.fixture
def sets(prepared: Path, tmp_path: Path) -> tuple[Path, Path]:
    """24 clips in four shards, and 6 in one."""
    for split in ("train", "val"):
        shutil.copytree(prepared / split, tmp_path / split)
    return tmp_path / "train", tmp_path / "val"


def mix_of(sets: tuple[Path, Path], *weights: float) -> str:
    entries = (f"{{path: {p}, weight: {w}}}" for p, w in zip(sets, weights, strict=True))
    return f"data.train=[{', '.join(entries)}]"


BACKEND = "frontend.backend=torch"


@pytest.mark.parametrize("more", [(), ("data.shuffle_shards=2", "train.micro_batch=2")])
def test_batches_are_the_same_on_ranks_in_micro_batches_and_resumed(sets, more):
    config = tiny(mix_of(sets, 0.5, 3), BACKEND, *more)  # 12 + 18 samples: 3 steps of 8
    whole, steps = tiny(mix_of(sets, 0.5, 3), BACKEND, more[0] if more else "run.seed=3407"), 7
    wanted = batches(whole, 0, steps)
    found = [batches(config, 0, steps, rank, 2) for rank in range(2)]
    for step, batch in enumerate(wanted):
        of_step = [b for rank in found for b in rank if b.sample_index[0] // 8 == step]
        assert torch.cat([b.sample_index for b in of_step]).equal(batch.sample_index)
        assert np.concatenate([b.clips for b in of_step]).tolist() == batch.clips.tolist()
    for a, b in zip(batches(whole, 4, steps), wanted[4:], strict=True):
        assert_same(a, b)
    assert [batch.epoch for batch in wanted] == [0, 0, 0, 1, 1, 1, 2]


def test_batches_by_url_are_those_of_the_disk(sets, tmp_path):
    wanted = batches(tiny(mix_of(sets, 0.5, 2), BACKEND), 0, 6)
    with serving(tmp_path) as served:
        urls = served.url / "train/{0..3}.tar", served.url / "val/0.tar"
        places = ", ".join(
            f"{{path: '{url}', weight: {w}}}" for url, w in zip(urls, (0.5, 2), strict=True)
        )
        config = tiny(f"data.train=[{places}]", BACKEND, f"data.cache={tmp_path / 'cache'}")
        for a, b in zip(batches(config, 0, 6), wanted, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("window", [0, 2])
def test_enriched_captions_are_copied_with_their_clips(sets, window):
    """Each clip with either caption, twice or in half of the samples."""
    with_enriched(sets[0])
    more = ("data.captions=concat", f"data.shuffle_shards={window}", BACKEND)
    texts, clips, order = read(tiny(mix_of(sets, 2, 1), *more, "train.global_batch=6"), 0, 17)
    assert order.sampler.epoch_samples == 2 * 48 + 6 == 17 * 6
    seen = Counter(
        (clip, text.startswith("*"))
        for batch in zip(clips, texts, strict=True)
        for clip, text in zip(*batch, strict=True)
    )
    wanted = {(clip, form): 2 for clip in range(24) for form in (False, True)}
    assert seen == wanted | {(clip, False): 1 for clip in range(24, 30)}
    texts, clips, order = read(tiny(mix_of(sets, 0.5, 1), *more, "train.global_batch=6"), 0, 10)
    starred = (text.startswith("*") for batch in texts for text in batch)
    halves = [*zip(np.concatenate(clips).tolist(), starred, strict=True)]
    assert sorted(pair for pair in halves if pair[0] < 24) == sorted(wanted)


def test_weights_of_one_change_nothing(sets):
    plain = tiny(f"data.train=[{sets[0]},{sets[1]}]", BACKEND)
    ones = tiny(mix_of(sets, 1, 1.0), BACKEND)
    assert plain == ones
    assert dump_config(plain) == dump_config(ones)
    assert open_shards(ones.data.train).sets == ()


def test_the_lengths_of_a_plan_are_those_of_an_epoch(sets):
    variable = ("audio.length=variable", "audio.max_duration_s=2")
    config = tiny(mix_of(sets, 2, 0.5), BACKEND, *variable)
    mix = length_mix(config)
    assert mix is not None
    train, val = (clip_seconds(open_shards([folder]), Ranks()) for folder in sets)
    assert len(mix.seconds) == 2 * 24 + 3
    of_val = Counter(mix.seconds.tolist()) - Counter([*train, *train])
    assert of_val.total() == 3
    assert of_val < Counter(val.tolist())
    assert loader(config).sampler.epoch_samples == 51


def test_a_config_keeps_weights(tmp_path):
    config = load_config(None, ["data.train=[{path: 's3://b/{0..7}.tar', weight: 2}, data/b]"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    assert parse_config(config.model_dump()) == config
    assert list(map(str, config.data.train_places)) == ["s3://b/{0..7}.tar", "data/b"]
    written = load_config(None, ["data.train=[{path: a, weight: 5e-1}, {path: b, weight: '2'}]"])
    assert written.data.train == (Weighted(Path("a"), 0.5), Weighted(Path("b"), 2))
    alone = load_config(None, ["data.train={path: /home/ann/a, weight: 0.5}"]).shareable()
    assert alone.data.train == (Weighted(Path("a"), 0.5),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        *(
            (f"{{path: a, weight: {weight}}}", "must have a weight above 0 and at most 1000, got")
            for weight in ("0", "-1", ".nan", ".inf", "true", "two", "9" * 400)
        ),
        ("{path: a, wieght: 2}", r"must be a path, a URL or \{path: ..., weight: ...\}, got"),
        ("{weight: 2}", r"must be a path, a URL or \{path: ..., weight: ...\}, got"),
        ("{path: 3}", "must be a path or a URL, got"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry, message):
    with pytest.raises(ConfigError, match=rf"data\.train\.1 {message}"):
        load_config(None, [f"data.train=[b, {entry}]"])
