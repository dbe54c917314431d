"""captions.jsonl beside the shards: drawn in training as data.captions says, never scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config import Config, Data, check_before_loading
from flap_fast.data.enriched import CaptionChoice, caption_key, clip_id
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.shards import ShardError, Shards, open_shards
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.evaluation.embed import read_texts
from flap_fast.ranks import Ranks
from tests.tiny import tiny


def write_captions(folder: Path) -> Path:
    """A enriched caption for each of a folder's: the same between stars."""
    shards, lines = open_shards([folder]), []
    for clip in range(len(shards)):
        record = shards.record(clip)
        for text in record["text"]:
            row = {"id": clip_id(shards, clip, record), "original": text, "caption": f"*{text}*"}
            lines.append(json.dumps(row) + "\n")
    (folder / "captions.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def rich(prepared: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rich")
    shutil.copytree(prepared / "train", folder / "train")
    return write_captions(folder / "train")


class Seen(Tokenizer):
    """Notes the captions that are read."""

    def __call__(self, captions):
        self.inner.seen.append(list(captions))
        return super().__call__(captions)


def read(config: Config, first: int, last: int, rank: int = 0, world: int = 1):
    """The captions and the clips of each step."""
    inner = tokenizer(config.text).inner
    inner.seen = []
    shards = open_shards(config.data.train)
    loader = TrainingLoader(config, shards, Seen(inner, 77), Ranks(rank, world, world))
    clips = [batch.clips.tolist() for batch in loader.batches(first, last)]
    return inner.seen, clips, loader


def settings(folder: Path, captions: str, *more: str) -> Config:
    name = f"data.captions={captions}"
    return tiny(f"data.train={folder}", "frontend.backend=torch", name, *more)


def test_replacing_reads_the_enriched_form_of_the_caption_that_was_drawn(rich):
    own, clips, _ = read(settings(rich, "original"), 0, 4)
    enriched, same, _ = read(settings(rich, "replace"), 0, 4)
    assert same == clips
    assert enriched == [[f"*{text}*" for text in batch] for batch in own]
    assert not any(text.startswith("*") for batch in own for text in batch)


def test_mixing_reads_either_by_the_sample(rich):
    """Which caption of a clip is drawn stays as it was; the same over ranks, and from any step."""
    own, clips, _ = read(settings(rich, "original"), 0, 6)
    mixed, same, _ = read(settings(rich, "mix"), 0, 6)
    assert same == clips
    assert [[text.strip("*") for text in batch] for batch in mixed] == own
    enriched = np.array([[text.startswith("*") for text in batch] for batch in mixed])
    second = uniforms(3407, Stream.CAPTION, torch.arange(48), 2)[:, 1]
    assert enriched.flatten().tolist() == (second < 0.5).tolist()
    assert 14 <= enriched.sum() <= 34  # of 48, a half is expected; three deviations
    assert 0 < enriched[:2].sum() < 16
    assert read(settings(rich, "mix"), 4, 6)[0] == mixed[4:]
    halves = [read(settings(rich, "mix"), 0, 3, rank, 2)[0] for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == mixed[:3]
    assert read(settings(rich, "mix", "run.seed=1"), 0, 1)[0] != mixed[:1]


@pytest.mark.parametrize(("ratio", "mode"), [("0", "original"), ("1", "replace")])
def test_mixing_none_or_all(rich, ratio, mode):
    mixed = read(settings(rich, "mix", f"data.enriched_ratio={ratio}"), 0, 3)[0]
    assert mixed == read(settings(rich, mode), 0, 3)[0]


@pytest.mark.parametrize("shuffle", ["0", "2"])
def test_concatenating_shows_each_clip_with_either_once_an_epoch(rich, shuffle):
    config = settings(rich, "concat", f"data.shuffle_shards={shuffle}")
    texts, clips, loader = read(config, 0, 6)
    assert loader.sampler.steps_per_epoch == 6  # twice 24 clips in batches of 8
    seen = [
        (clip, text.startswith("*"))
        for batch in zip(clips, texts, strict=True)
        for clip, text in zip(*batch, strict=True)
    ]
    assert sorted(seen) == [(clip, enriched) for clip in range(24) for enriched in (False, True)]
    assert {enriched for _, enriched in seen[:16]} == {False, True}


@pytest.fixture
def two_folders(prepared: Path, rich: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Of the corpus' 6 other clips, without enriched captions; and the 24 with them."""
    shutil.copytree(prepared / "val", tmp_path / "plain")
    return tmp_path / "plain", rich


def test_a_folder_without_the_file_keeps_its_captions(two_folders):
    shards = open_shards(two_folders)
    for mode in ("replace", "mix", "concat"):
        choice = CaptionChoice(Data(train=two_folders, captions=mode, enriched_ratio=1), shards)
        assert len(choice.files) == (54 if mode == "concat" else 30)
        assert (np.diff(choice.files) >= 0).all()
        drawn = np.arange(len(choice.files))
        clips, enriched = choice.clips(drawn, [0.0] * len(drawn))
        texts = [
            choice.texts(int(clip), shards.record(int(clip)), enriched=bool(r))
            for clip, r in zip(clips, enriched, strict=True)
        ]
        starred = [all(text.startswith("*") for text in several) for several in texts]
        own = [False] * 6 + [mode != "concat"] * 24 + [True] * (24 * (mode == "concat"))
        assert starred == own
        assert clips.tolist() == [*range(30), *range(6, len(drawn) - 24)]


def test_half_an_emoji_in_a_enriched_caption_is_a_mark_in_its_place(rich, tmp_path):
    shutil.copytree(rich, tmp_path / "train")
    file = tmp_path / "train/captions.jsonl"
    file.write_text(file.read_text().replace('*"}', '\\ud83d"}'))
    seen = read(settings(tmp_path / "train", "replace"), 0, 1)[0][0]
    assert all(text.endswith("\ufffd") for text in seen)


def test_a_caption_without_a_line_is_an_error_and_not_left_out(rich, tmp_path):
    shutil.copytree(rich, tmp_path / "train")
    file = tmp_path / "train/captions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        ShardError, match=r"captions.jsonl has no line for each caption of 'clip-0'"
    ):
        read(settings(tmp_path / "train", "replace"), 0, 3)
    file.write_text('{"id": "clip-0"}\n')
    with pytest.raises(ConfigError, match=r"captions.jsonl:1 must hold id, original and caption"):
        read(settings(tmp_path / "train", "replace"), 0, 1)


def test_a_run_is_refused_where_no_folder_has_enriched_captions(prepared, rich, two_folders):
    check_before_loading(settings(rich, "mix"), 1)
    check_before_loading(tiny(f"data.train=[{two_folders[0]},{rich}]", "data.captions=concat"), 1)
    with pytest.raises(ConfigError) as error:
        check_before_loading(settings(prepared / "train", "mix"), 1)
    assert str(error.value) == (
        "data.captions must be 'original' where no folder of data.train has a captions.jsonl, got "
        f"'mix'; write it with: flap enrich {prepared}/train {prepared}/train --model none, "
        "or name a model"
    )
    check_before_loading(settings(prepared, "mix"), 1)  # no shards: it is refused when opened


def test_evaluation_reads_its_own_captions_whatever_lies_beside(prepared, tmp_path):
    shutil.copytree(prepared / "val", tmp_path / "val")
    plain = read_texts(open_shards([prepared / "val"]))
    assert read_texts(open_shards([write_captions(tmp_path / "val")])) == plain


def test_a_clips_name_is_its_records_or_its_place():
    shards = Shards((Path("a/3.tar"),), np.array([[0, 512, 1, 1024, 1]]))
    assert clip_id(shards, 0, {"id": "x"}) == "x"
    assert clip_id(shards, 0, {"id": ""}) == clip_id(shards, 0, {}) == "3.tar@512"
    assert caption_key("a", "b") != caption_key("ab", "")
    assert 0 <= caption_key("a", "b\ud83d") < 2**63
