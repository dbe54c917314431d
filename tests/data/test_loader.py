"""Batches: a function of seed and step alone, for any number of ranks and any restart."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.data.enriched import text_key
from flap_fast.data.evaluation import evaluation_batches
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.preprocess.kaldi_mel import kaldi_log_mel
from flap_fast.data.preprocess.log_mel import normalise
from flap_fast.data.preprocess.waveform import crop, fill, read_sound
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.shards import ShardError, open_shards, pack
from flap_fast.data.tokenize import tokenizer
from flap_fast.ranks import Ranks
from tests.sounds import encode, noise
from tests.tiny import crops, tiny

RATE = 16_000
ANY_BACK_END = pytest.mark.parametrize("backend", ["torch", "dali_wave"])


def loader(config: Config, rank: int = 0, world: int = 1) -> TrainingLoader:
    shards = open_shards(config.data.train)
    return TrainingLoader(config, shards, tokenizer(config.text), Ranks(rank, world, world))


def batches(config: Config, first: int, last: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(loader(config, rank, world).batches(first, last))


def captions(batch: Batch) -> list[list[int]]:
    """Each caption's tokens, without its padding."""
    return [
        row[keep == 1].tolist() for row, keep in zip(batch.ids, batch.attention_mask, strict=True)
    ]


def assert_same(a: Batch, b: Batch) -> None:
    for name in ("media", "ids", "attention_mask", "sample_index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.clips.tolist(), a.epoch) == (b.clips.tolist(), b.epoch)


@pytest.fixture
def config(prepared: Path) -> Config:
    """24 clips in batches of 8: three steps an epoch."""
    return tiny(f"data.train={prepared / 'train'}", "frontend.backend=torch")


def with_(config: Config, section: str, **settings: object) -> Config:
    changed = getattr(config, section).model_copy(update=settings)
    return config.model_copy(update={section: changed})


def test_a_batch_has_the_shapes_it_promises(config):
    (batch,) = batches(config, 4, 5)
    assert (batch.stacked.shape, batch.stacked.dtype) == ((8, 1, 112, 128), torch.float32)
    assert batch.ids.shape == batch.attention_mask.shape
    assert batch.ids.shape[1] % 8 == 0
    assert batch.ids.dtype == batch.attention_mask.dtype == torch.int64
    assert batch.sample_index.tolist() == list(range(32, 40))
    assert (batch.clips.shape, batch.epoch) == ((8,), 1)


def test_a_batch_is_what_its_sample_indices_say(config):
    """By hand from the shards: clip, crop, filling, caption, mel, statistics."""
    shards, seed = open_shards(config.data.train), config.run.seed
    for batch in batches(config, 2, 5):
        where = uniforms(seed, Stream.CROP, batch.sample_index, 1)[:, 0].tolist()
        which = uniforms(seed, Stream.CAPTION, batch.sample_index, 1)[:, 0].tolist()
        waves, texts = [], []
        for clip, w, c in zip(batch.clips.tolist(), where, which, strict=True):
            wave = crop(read_sound(shards.encoded(clip), RATE), RATE, w)
            waves.append(fill(wave, RATE, "repeatpad"))
            several = shards.record(clip)["text"]
            texts.append(several[int(c * len(several))])
        mel = kaldi_log_mel(config.audio)(torch.from_numpy(np.stack(waves)))
        assert torch.equal(batch.stacked[:, 0], normalise(mel, config.audio))
        ids, mask = tokenizer(config.text)(texts)
        assert torch.equal(batch.ids, ids)
        assert torch.equal(batch.attention_mask, mask)


@ANY_BACK_END
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_batches(config, backend, world):
    config = with_(config, "frontend", backend=backend)
    whole = batches(config, 0, 4)
    by_rank = [batches(config, 0, 4, rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        parts = [rank_batches[step] for rank_batches in by_rank]
        assert torch.cat([part.sample_index for part in parts]).equal(batch.sample_index)
        assert np.concatenate([part.clips for part in parts]).tolist() == batch.clips.tolist()
        assert [*chain.from_iterable(map(captions, parts))] == captions(batch)
        # Another number of rows may sum a product in another order: not more than a rounding.
        assert (torch.cat([part.stacked for part in parts]) - batch.stacked).abs().max() < 1e-4


@ANY_BACK_END
def test_beginning_at_a_step_is_having_run_to_it(config, backend):
    config = with_(config, "frontend", backend=backend)
    through = batches(config, 0, 8)
    for first in (1, 3, 5):
        for a, b in zip(batches(config, first, 8), through[first:], strict=True):
            assert_same(a, b)


def test_micro_batches_are_a_step_cut_in_order_and_may_come_again(config):
    parts = with_(config, "train", micro_batch=2)
    for rank, world in ((0, 1), (1, 2)):
        count = 8 // world // 2
        stream = list(loader(parts, rank, world).batches(1, 3, times=2))
        assert len(stream) == 2 * 2 * count
        for step, batch in enumerate(batches(config, 1, 3, rank, world)):
            first, second = (stream[(2 * step + time) * count :][:count] for time in (0, 1))
            assert torch.cat([part.sample_index for part in first]).equal(batch.sample_index)
            assert np.concatenate([part.clips for part in first]).tolist() == batch.clips.tolist()
            assert [*chain.from_iterable(map(captions, first))] == captions(batch)
            assert (torch.cat([part.stacked for part in first]) - batch.stacked).abs().max() < 1e-4
            for once, again in zip(first, second, strict=True):
                assert_same(once, again)


def test_what_is_wrong_with_a_clip_is_reported_once_though_it_comes_again(good, tmp_path):
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", {5: b"", 7: BAD["cut"]}),))
    reader = loader(with_(spoilt, "train", micro_batch=2))
    assert len(list(reader.batches(0, 3, times=2))) == 3 * 2 * 2
    assert sorted(entry.clip for entry in reader.bad) == [reader._shards.name(n) for n in (5, 7)]


def test_threads_and_prefetch_do_not_change_a_batch(config):
    more = with_(config, "frontend", threads=3, prefetch=4)
    for a, b in zip(batches(config, 0, 5), batches(more, 0, 5), strict=True):
        assert_same(a, b)


def test_dali_and_its_reference_load_the_same(config):
    for a, b in zip(
        batches(config, 0, 3),
        batches(with_(config, "frontend", backend="dali_wave"), 0, 3),
        strict=True,
    ):
        assert_same(a, b)


def test_an_epoch_has_every_clip_and_the_next_in_another_order(config):
    steps = batches(config, 0, 6)
    epochs = [np.concatenate([b.clips for b in steps[a : a + 3]]).tolist() for a in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(24))] * 2
    assert epochs[0] != epochs[1]
    assert [batch.epoch for batch in steps] == [0, 0, 0, 1, 1, 1]


def test_every_caption_of_a_clip_gets_its_turn(config):
    shards, seen = open_shards(config.data.train), {}
    for batch in batches(config, 0, 30):
        for clip, tokens in zip(batch.clips.tolist(), captions(batch), strict=True):
            seen.setdefault(clip, set()).add(tuple(tokens))
    for clip, tokens in seen.items():
        texts = shards.record(clip)["text"]
        ids, mask = tokenizer(config.text)(texts)
        assert tokens == {
            tuple(row[keep == 1].tolist()) for row, keep in zip(ids, mask, strict=True)
        }


FLAC = [encode(noise(n, 0.5 + 0.1 * n, RATE), RATE) for n in range(12)]
BAD = {
    "cut": FLAC[5][:3000],
    "nothing": b"",
    "nan": encode(np.full(999, np.nan), RATE, "WAV", "FLOAT"),
}


def shards_of(folder: Path, sounds: dict[int, bytes], *, caption: int | None = None) -> Path:
    """Twelve noises as shards of six, some of the sounds replaced, one caption left out."""
    folder.mkdir()
    for shard in range(2):
        samples = []
        for n in range(6 * shard, 6 * shard + 6):
            text = [] if n == caption else [f"noise {n}"]
            samples.append((f"{n:03d}", sounds.get(n, FLAC[n]), {"text": text}))
        (folder / f"{shard}.tar").write_bytes(pack(samples)[0])
    return folder


@pytest.fixture
def good(tmp_path: Path) -> Config:
    folder = shards_of(tmp_path / "good", {})
    return tiny(f"data.train={folder}", "train.global_batch=4", "frontend.backend=torch")


@ANY_BACK_END
@pytest.mark.parametrize("bad", BAD)
def test_a_corrupt_clip_is_replaced_reported_and_the_run_goes_on(good, tmp_path, backend, bad):
    good = with_(good, "frontend", backend=backend)
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", {5: BAD[bad]}),))
    reader = loader(spoilt)
    found, reported = [], []
    for batch in reader.batches(0, 6):
        found.append(batch)
        reported += reader.bad
        reader.bad.clear()
    wanted = batches(good, 0, 6)
    at = [(s, r) for s, b in enumerate(wanted) for r, clip in enumerate(b.clips) if clip == 5]
    assert len(at) == 2
    assert [(entry.step, entry.clip) for entry in reported] == [
        (step, reader._shards.name(5)) for step, _ in at
    ]
    assert all(entry.replaced_by == reader._shards.name(6) and entry.reason for entry in reported)
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        same = b.clips != 5
        assert (a.clips[same] == b.clips[same]).all()
        assert torch.equal(a.stacked[same], b.stacked[same])
        for row in np.flatnonzero(~same):
            assert (step, row) in at
            assert a.clips[row] == 6
            assert captions(a)[row] == tokenizer(good.text)(["noise 6"])[0][0, :8].tolist()
            # The clip that took its place has its own sound, cropped as its row says.
            assert a.stacked[row].isfinite().all()
            assert not torch.equal(a.stacked[row], b.stacked[row])


@pytest.mark.parametrize("world", [2, 4])
def test_a_corrupt_clip_is_replaced_alike_on_any_number_of_ranks(good, tmp_path, world):
    bad = {5: BAD["cut"], 6: BAD["nothing"], 11: BAD["cut"]}
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", bad),))
    spoilt = with_(spoilt, "frontend", backend="dali_wave")
    whole = batches(spoilt, 0, 6)
    by_rank = [batches(spoilt, 0, 6, rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        clips = np.concatenate([rank_batches[step].clips for rank_batches in by_rank])
        assert clips.tolist() == batch.clips.tolist()
        assert not {5, 6, 11} & set(clips.tolist())
        mel = torch.cat([rank_batches[step].stacked for rank_batches in by_rank])
        assert (mel - batch.stacked).abs().max() < 1e-4


def test_the_last_clip_is_replaced_by_the_first(good, tmp_path):
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", {11: b"", 0: b""}),))
    assert sorted(np.concatenate([b.clips for b in batches(spoilt, 0, 3)])) == [
        1,
        1,
        1,
        *range(2, 11),
    ]


def test_a_clip_without_a_caption_is_replaced_before_it_is_decoded(good, tmp_path):
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", {}, caption=3),))
    reader = loader(spoilt)
    clips = np.concatenate([batch.clips for batch in reader.batches(0, 3)])
    assert sorted(clips) == [0, 1, 2, 4, 4, *range(5, 12)]
    assert [entry.reason for entry in reader.bad] == ["captionless: its JSON holds no text"]


@ANY_BACK_END
def test_a_run_may_stop_at_a_bad_clip(good, tmp_path, backend):
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", {5: b""}),), on_bad_clip="stop")
    spoilt = with_(spoilt, "frontend", backend=backend)
    with pytest.raises(
        ShardError, match=r"0\.tar at byte \d+ cannot be used .*data.on_bad_clip=replace takes the"
    ):
        batches(spoilt, 0, 3)


def test_data_without_any_good_clip_stops_the_run(good, tmp_path):
    sounds = dict.fromkeys(range(12), b"")
    spoilt = with_(good, "data", train=(shards_of(tmp_path / "bad", sounds),))
    with pytest.raises(ShardError, match=r"cannot be used .*; nor can the 99 clips after it"):
        batches(spoilt, 0, 1)


def test_what_only_the_reference_can_decode_is_decoded_by_it(good, tmp_path, monkeypatch):
    """DALI reads no MP3: not a bad clip, and not a reason to stop or to train on the others."""
    mp3 = encode(noise(0, 1, RATE), RATE, "MP3")
    config = with_(good, "data", train=(shards_of(tmp_path / "bad", {5: mp3}),))
    wanted = [batch.stacked for batch in batches(config, 0, 3)]
    config = with_(config, "frontend", backend="dali_wave")
    for batch, mels in zip(batches(config, 0, 3), wanted, strict=True):
        assert (batch.stacked - mels).abs().max() < 1e-4
    # Where DALI's failure was not foreseen.
    monkeypatch.setattr("flap_fast.data.preprocess.audio.dali_input", lambda clip: clip)
    with pytest.warns(UserWarning, match=r"decoded without DALI: the clips of step .*Failed to op"):
        found = batches(config, 0, 3)
    for batch, mels in zip(found, wanted, strict=True):
        assert (batch.stacked - mels).abs().max() < 1e-4


@ANY_BACK_END
def test_a_shard_that_shrinks_stops_the_run(good, tmp_path, backend):
    """Its clips are not replaced by others."""
    folder = shards_of(tmp_path / "short", {})
    config = with_(with_(good, "data", train=(folder,)), "frontend", backend=backend)
    reader = loader(config)
    with (folder / "1.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(ShardError, match=r"1\.tar ends before byte"):
        list(reader.batches(0, 3))


CLIPS = np.array([3, 0, 5, 1, 4])


@ANY_BACK_END
def test_evaluation_gives_the_clips_named_in_their_order(prepared, backend):
    config = tiny("eval.batch=2", f"frontend.backend={backend}")
    shards = open_shards([prepared / "train"])
    found = [
        batch.stacked for batch in evaluation_batches(config, shards, crops(config, CLIPS), Ranks())
    ]
    assert [len(mel) for mel in found] == [2, 2, 1]
    keys = torch.tensor([text_key(shards.record(clip)["id"]) for clip in CLIPS])
    where = uniforms(0, Stream.EVAL_CROP, keys, 1)[:, 0].tolist()
    waves = [
        fill(crop(read_sound(shards.encoded(clip), RATE), RATE, w), RATE, "repeatpad")
        for clip, w in zip(CLIPS, where, strict=True)
    ]
    wanted = normalise(kaldi_log_mel(config.audio)(torch.from_numpy(np.stack(waves))), config.audio)
    assert torch.cat(found).shape == (5, 1, 112, 128)
    assert (torch.cat(found)[:, 0] - wanted).abs().max() < 1e-4


def test_an_evaluations_random_crop_is_the_clips_and_not_the_runs(prepared):
    shards = open_shards([prepared / "train"])
    long = np.flatnonzero(
        [len(read_sound(shards.encoded(n), RATE)) > 1.3 * RATE for n in range(24)]
    )
    first = tiny("eval.batch=3", "frontend.backend=torch")
    other = with_(with_(first, "run", seed=1), "eval", batch=2)
    centre = with_(first, "eval", crop="center")
    a, b, c = (
        torch.cat(
            [
                batch.stacked
                for batch in evaluation_batches(config, shards, crops(config, clips), Ranks())
            ]
        )
        for config, clips in ((first, long), (other, long[::-1].copy()), (centre, long))
    )
    assert (a - b.flip(0)).abs().max() < 1e-4
    assert ((a - c).abs().amax((1, 2, 3)) > 0.1).all()


def test_an_evaluations_random_crop_is_the_same_with_a_clip_more_or_less(tmp_path):
    samples = [(f"{n:03d}", FLAC[n], {"text": "x", "id": f"clip {n}"}) for n in (9, 10, 11)]
    (tmp_path / "all").mkdir()
    (tmp_path / "all/0.tar").write_bytes(pack(samples)[0])
    (tmp_path / "few").mkdir()
    (tmp_path / "few/0.tar").write_bytes(pack(samples[1:])[0])
    whole, few = (
        next(
            evaluation_batches(
                tiny("frontend.backend=torch"),
                shards,
                crops(tiny("frontend.backend=torch"), np.arange(len(shards))),
                Ranks(),
            )
        )
        for shards in (open_shards([tmp_path / name]) for name in ("all", "few"))
    )
    assert (whole.stacked[1:] - few.stacked).abs().max() < 1e-4


@pytest.mark.parametrize(("rate", "said"), [(RATE // 2, 1), (RATE, 0), (2 * RATE, 0)])
def test_sounds_at_a_lower_rate_than_the_front_ends_are_told_of_once(tmp_path, capsys, rate, said):
    (tmp_path / "0.tar").write_bytes(
        pack([("a", encode(noise(0, 1, rate), rate), {"text": "x"})])[0]
    )
    shards, config = open_shards([tmp_path]), tiny("frontend.backend=torch")
    for rank in (1, 0, 0):
        list(evaluation_batches(config, shards, crops(config, np.arange(1)), Ranks(rank)))
    err = capsys.readouterr().err
    assert (
        err.count("holds sounds at 8000 Hz and audio.sample_rate_hz is 16000: above 4000") == said
    )
    assert err.count("flap prepare --config") == said


@ANY_BACK_END
def test_evaluation_leaves_no_clip_out(tmp_path, backend):
    shards = open_shards([shards_of(tmp_path / "bad", {5: BAD["cut"], 4: BAD["nan"]})])
    config = tiny("eval.batch=3", f"frontend.backend={backend}")
    mels = evaluation_batches(config, shards, crops(config, np.arange(12)), Ranks())
    assert len(next(mels).stacked) == 3
    with pytest.raises(ShardError) as error:
        next(mels)
    assert str(error.value).count(str(tmp_path)) == 2
    assert str(error.value).endswith("flap prepare --source shards FOLDER OUT")
    assert f"{shards.name(4)} (unreadable: samples are not finite)" in str(error.value)
    assert f"{shards.name(5)} (unreadable: " in str(error.value)
    (tmp_path / ".prepare").mkdir()  # they are ours
    with pytest.raises(ShardError, match="; delete the tar and run the same flap prepare again"):
        list(evaluation_batches(config, shards, crops(config, np.arange(12)), Ranks()))


def test_evaluation_decodes_what_dali_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr("flap_fast.data.preprocess.audio.dali_input", lambda clip: clip)
    shards = open_shards([shards_of(tmp_path / "x", {1: encode(noise(0, 1, RATE), RATE, "MP3")})])
    found = []
    for backend in ("torch", "dali_wave"):
        config = tiny("eval.batch=3", f"frontend.backend={backend}")
        mels = evaluation_batches(config, shards, crops(config, np.arange(6)), Ranks())
        found.append(torch.cat([media.stacked for media in mels]))
    assert (found[0] - found[1]).abs().max() < 1e-4
