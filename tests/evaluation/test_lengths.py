"""A model trained on clips of one kind of length, evaluated on the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flap_fast import load
from flap_fast.checks import ConfigError
from flap_fast.commands.score import open_model
from flap_fast.config import Config
from flap_fast.data.batch import EncodedBatch, MediaInput
from flap_fast.data.evaluation import crops_of, evaluation_batches
from flap_fast.data.shards import Shards, open_shards
from flap_fast.data.tokenize import tokenizer
from flap_fast.evaluation.embed import embed
from flap_fast.model.first_weights import put_first_weights
from flap_fast.model.model_folder import load_weights, save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from tests.ranks import on_ranks
from tests.sounds import encode, noise, write_manifest
from tests.tiny import HTSAT, tiny

RATE = 16_000
VARIABLE = ("audio.length=variable", "audio.max_duration_s=2")
RECON = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
SECONDS = (0.1, 1.0, 1.7, 2.0, 4.5)


def saved(folder: Path, config: Config) -> Path:
    torch.manual_seed(0)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    rows = []
    for n, seconds in enumerate(SECONDS):
        (folder / f"{n}.flac").write_bytes(encode(noise(n, seconds, RATE), RATE))
        rows.append({"audio": f"{n}.flac", "caption": f"noise {n}"})
    prepare(write_manifest(folder / "m.jsonl", rows), folder / "shards", show=False)
    return folder / "shards/train"


def embedded(config: Config, shards: Path, ranks: Ranks) -> torch.Tensor:
    torch.manual_seed(0)
    model = TwoTowers(config)
    return embed(model, config, tokenizer(config.text), open_shards([shards]), ranks).media


def embedded_on_a_rank(config: Config, shards: Path) -> torch.Tensor:
    import torch.distributed as dist

    return embedded(config, shards, Ranks(dist.get_rank(), dist.get_world_size()))


def test_clips_are_embedded_whole_and_in_windows_beyond_the_bound(shards: Path):
    """As the Embedder embeds them: 4.5 s in three windows of 2 s."""
    config = tiny(*VARIABLE, "eval.batch=2")
    assert config.eval.crop == "whole"
    found = embedded(config, shards, Ranks())
    folder = saved(shards.parent / "model", config)
    waves = [noise(n, seconds, RATE) for n, seconds in enumerate(SECONDS)]
    model = load(folder, "cpu")
    assert (found - model.embed_audio(waves)).abs().max() < 1e-4  # of 16 bits
    # Repeating a short clip changes a model of clips of their own lengths.
    alone = model.embed_audio([np.tile(waves[0], 9)])
    assert (alone[0] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "backend"),
    [
        ((), "torch"),
        (("frontend.backend=dali_wave",), "torch"),
        (("frontend.backend=dali_mel",), "dali_mel"),  # its log-mels are others
        (("eval.crop=center",), "auto"),
    ],
)
def test_windows_of_a_clip_share_its_bytes_and_are_decoded_by_themselves(
    shards: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], backend: str
):
    """Memory would else grow with the square of a recording's length."""
    config, found = tiny(*VARIABLE, *overrides), open_shards([shards])
    taken: list[str] = []
    streamed: list[EncodedBatch] = []

    class Fake:
        def stream(self, batches: Iterator[EncodedBatch], batch: int) -> Iterator[MediaInput]:
            for part in batches:
                streamed.append(part)
                yield MediaInput(torch.empty(0), None)

    def fake(config: Config, ranks: Ranks, shards: Shards) -> Fake:
        taken.append(config.frontend.backend)
        return Fake()

    monkeypatch.setattr("flap_fast.data.evaluation.make_preprocessor", fake)
    crops = crops_of(config, found, Ranks())
    list(evaluation_batches(config, found, crops, Ranks()))
    ((clips, *_),) = streamed
    assert taken == [backend]
    assert len(clips) == len(crops.clips)
    assert len(set(map(id, clips))) == len(found)


def test_ranks_share_windows(shards: Path):
    config = tiny(*VARIABLE, "eval.batch=2")
    alone = embedded(config, shards, Ranks())
    for rank in on_ranks(2, embedded_on_a_rank, config, shards):
        assert (rank - alone).abs().max() < 1e-6


@pytest.mark.parametrize("trained", [VARIABLE, (*VARIABLE, "train.micro_tokens=900"), ()])
def test_a_model_opens_with_either_length(shards: Path, tmp_path: Path, trained):
    """With a decoder, whose table of positions is as long as the encoder's, too."""
    folder = saved(tmp_path / "model", tiny(*trained, *RECON, "audio.max_duration_s=2"))
    for length in ("variable", "fixed", None):
        model = load(folder, "cpu", length=length)
        wanted = length or ("variable" if trained else "fixed")
        assert model.config.audio.length == wanted
        found = model.embed_audio([noise(1, 1.7, RATE)])
        fresh = tiny(*(VARIABLE if wanted == "variable" else ()), *RECON)
        torch.manual_seed(0)
        other = saved(tmp_path / f"{length}", fresh)
        assert torch.equal(found, load(other, "cpu").embed_audio([noise(1, 1.7, RATE)]))
        evaluated = open_model(str(folder), {}, "mean", Ranks(), length=length)
        crop = {"variable": "whole", "fixed": "random"}[wanted]
        assert evaluated.config.eval.crop == crop


@pytest.mark.parametrize(
    ("trained", "length", "why"),
    [
        (HTSAT, "variable", r"audio\.length must be 'fixed' with audio\.encoder = htsat, .*"),
        (("fusion.type=aff_2d",), "variable", r"audio\.length must be fixed with fusion, .*"),
        (
            (*VARIABLE, "audio.attention_window_s=1"),
            "fixed",
            r"audio\.attention_window_s must be left out with audio\.length = fixed, .*",
        ),
    ],
)
def test_a_model_of_one_length_says_so(tmp_path: Path, trained, length: str, why: str):
    """With a remedy for who opens it: the settings that it was trained with are no choice."""
    folder = saved(tmp_path / "model", tiny(*trained))
    rule = rf"^length must be \w+ with this model, got {length}: "
    with pytest.raises(ConfigError, match=rf"{rule}{why}; leave it out$") as raised:
        load(folder, "cpu", length=length)
    assert "set " not in str(raised.value)
    load(folder, "cpu")


def test_another_table_of_positions_is_not_taken_for_one_of_another_length(tmp_path: Path):
    config = tiny()
    torch.manual_seed(0)
    model = TwoTowers(config)
    weights = model.state_dict()
    weights["audio.pos_embed"] = weights["audio.pos_embed"] + 0.1
    save_model(tmp_path, config, model, weights)
    with pytest.raises(ConfigError, match=r"audio\.pos_embed"):
        load(tmp_path, "cpu", length="variable")


def test_audiomaes_table_goes_on_for_clips_of_any_length(tmp_path: Path):
    """Row n is patch n's in both, and every patch of a longer clip has a position of its own."""
    legacy = (*RECON, "audio.pos_grid=audiomae_legacy")
    folder = saved(tmp_path, tiny(*legacy))
    settings = ("audio.length=variable", "audio.max_duration_s=3", f"train.init_from={folder}")
    config = tiny(*settings, *legacy)
    model = TwoTowers(config)
    put_first_weights(model, config)
    opened = load(folder, "cpu", length="variable").model
    for name in ("audio.pos_embed", "decoder.pos_embed"):
        table, trained = model.get_buffer(name), load_weights(folder)[name]
        assert len(table) > len(trained)
        assert torch.equal(table[: len(trained)], trained)
        assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1
        assert torch.equal(opened.get_buffer(name)[: len(trained)], trained)


def test_audiomaes_table_is_not_taken_for_another(tmp_path: Path):
    folder = saved(tmp_path, tiny("audio.pos_grid=audiomae_legacy"))
    remedy = r"set audio\.pos_grid and audio\.frames as in the config\.yaml beside it"
    for setting in ("audio.pos_grid=correct", "audio.frames=1024"):
        other = (*VARIABLE, "audio.pos_grid=audiomae_legacy", setting)
        config = tiny(*other, f"train.init_from={folder}")
        with pytest.raises(ConfigError, match=remedy):
            put_first_weights(TwoTowers(config), config)
    fixed = tiny(f"train.init_from={folder}")
    model = TwoTowers(fixed)
    put_first_weights(model, fixed)
    table = model.get_buffer("audio.pos_embed")
    assert torch.equal(table, load_weights(folder)["audio.pos_embed"])


def test_the_remedy_for_a_setting_that_weights_do_not_have_can_be_typed(tmp_path: Path):
    folder = saved(tmp_path, tiny(*VARIABLE))
    config = tiny(*VARIABLE, "audio.attention_window_s=1", f"train.init_from={folder}")
    with pytest.raises(ConfigError, match=r"got 1\.0; set audio\.attention_window_s=null, or"):
        put_first_weights(TwoTowers(config), config)
    tiny(*VARIABLE, "audio.attention_window_s=null")
