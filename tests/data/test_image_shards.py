"""Pictures through manifest, shards and loader, with the guarantees that sounds have."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pillow

from flap_fast.config import Config
from flap_fast.data.batch import Batch
from flap_fast.data.evaluation import evaluation_batches
from flap_fast.data.loader import TrainingLoader
from flap_fast.data.preprocess.image import normalise_image, read_image
from flap_fast.data.shards import ShardError, open_shards, pack
from flap_fast.data.tokenize import tokenizer
from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import read_manifest
from flap_fast.preparation.prepare import prepare
from flap_fast.ranks import Ranks
from tests.pictures import draw, encoded, write_pictures
from tests.tiny import crops, tiny_clip

ANY_BACK_END = pytest.mark.parametrize("backend", ["torch", "dali_wave"])
DRAWN = draw("red", "disc", 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in shards of 7."""
    folder = tmp_path_factory.mktemp("pictures")
    prepare(write_pictures(folder / "files", 24), folder / "shards", shard_clips=7, show=False)
    return folder / "shards" / "train"


def config_of(folder: Path, *overrides: str) -> Config:
    return tiny_clip(f"data.train={folder}", *overrides)


def batches(config: Config, first: int, last: int, rank: int = 0, world: int = 1) -> list[Batch]:
    return list(loader(config, rank, world).batches(first, last))


def loader(config: Config, rank: int = 0, world: int = 1) -> TrainingLoader:
    shards = open_shards(config.data.train, ("images",))
    return TrainingLoader(config, shards, tokenizer(config.text), Ranks(rank, world, world))


def write_manifest(folder: Path, rows: list[dict]) -> Path:
    file = folder / "manifest.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def test_shards_keep_the_bytes_of_pictures_that_every_decoder_reads_alike(tmp_path):
    kept = {
        "rgb.png": encoded(DRAWN),
        "rgb.jpg": encoded(DRAWN, "JPEG"),
        "grey.png": encoded(DRAWN.convert("L")),
        "grey.jpg": encoded(DRAWN.convert("L"), "JPEG"),
    }
    made_anew = {
        "alpha.png": encoded(DRAWN.convert("RGBA")),
        "palette.png": encoded(DRAWN.convert("P")),
        "cmyk.jpg": encoded(DRAWN.convert("CMYK"), "JPEG"),
        "deep.png": encoded(pillow.fromarray(np.full((40, 48), 0x1234, np.uint16))),
        "other.webp": encoded(DRAWN, "WEBP", lossless=1),
    }
    for name, data in {**kept, **made_anew}.items():
        (tmp_path / name).write_bytes(data)
    rows = [{"image": name, "caption": "a disc", "id": name} for name in (*kept, *made_anew)]
    done = prepare(write_manifest(tmp_path, rows), tmp_path / "out", show=False)
    assert (done.kept, done.rejected) == (9, 0)
    found = open_shards([tmp_path / "out" / "train"], ("images",))
    for clip, (name, data) in enumerate([*kept.items(), *made_anew.items()]):
        assert found.record(clip)["id"] == name
        assert found.record(clip)["original_data"] == {"file": name}
        if name in kept:
            assert found.encoded(clip) == data
        else:
            picture = pillow.open(io.BytesIO(found.encoded(clip)))
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert (read_image(found.encoded(clip), 32) == read_image(data, 32)).all()
    with tarfile.open(tmp_path / "out" / "train" / "0.tar") as members:
        endings = {name.partition(".")[2] for name in members.getnames()}
    assert endings == {"jpg", "png", "json"}


def test_pictures_that_cannot_be_used_are_rejected_with_the_reason(tmp_path):
    whole = encoded(DRAWN, "JPEG")
    (tmp_path / "good.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_bytes(b"no picture")
    (tmp_path / "strip.png").write_bytes(encoded(pillow.new("RGB", (120, 2))))
    rows = [
        {"image": "good.jpg", "labels": ["disc"]},
        *({"image": name, "caption": "a"} for name in ("cut.jpg", "text.png", "strip.png", "no")),
        {"image": "good.jpg", "split": "other"},
    ]
    done = prepare(write_manifest(tmp_path, rows), tmp_path / "out", show=False)
    assert (done.kept, done.rejected) == (1, 5)
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    rejected = {Path(row["image"]).name: row["reason"] for row in map(json.loads, lines)}
    assert "runcated" in rejected["cut.jpg"]
    assert rejected["text.png"].startswith("unreadable: unknown image format")
    assert rejected["strip.png"] == "a strip: 120 x 2 pixels"
    assert rejected["no"] == "missing: no such file"
    assert rejected["good.jpg"] == "captionless"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.png"}, {"audio": "a.wav"}], ":2: a manifest must name sounds or images"),
        ([{"image": "a.png", "audio": "a.wav"}], ":1: a row must have audio or image, got both"),
        ([{"image": 3}], ":1: image must name an image file, got 3"),
        ([{"image": "a.png", "start_s": 1}], ":1: start_s and duration_s are for sounds"),
    ],
)
def test_a_manifest_that_mixes_sounds_and_images_is_refused(tmp_path, rows, message):
    with pytest.raises(ManifestError, match=message):
        read_manifest(write_manifest(tmp_path, rows))


def test_shards_as_img2dataset_writes_them_are_read_as_they_are(tmp_path):
    """The caption is in KEY.json, or alone in KEY.txt."""
    tar(
        tmp_path / "0.tar",
        {
            "1.jpg": encoded(DRAWN, "JPEG"),
            "1.txt": b"not this one",
            "1.json": json.dumps({"caption": "from the JSON", "url": "x"}).encode(),
            "2.PNG": encoded(DRAWN),
            "2.txt": b' {"text": "as it is"}\n',
        },
    )
    found = open_shards([tmp_path], ("images",))
    assert [found.record(clip)["text"] for clip in (0, 1)] == [
        ["from the JSON"],
        ['{"text": "as it is"}'],
    ]
    assert found.encoded(1) == encoded(DRAWN)


def test_shards_of_the_other_sense_are_refused(tmp_path, shards):
    with pytest.raises(ShardError, match=r"must have a sound and a .json, got \['png', 'json'\]"):
        open_shards([shards])
    tar(tmp_path / "0.tar", {"1.flac": b"fLaC", "1.json": b"{}"})
    with pytest.raises(ShardError, match=r"must have an image \(jpg, jpeg, png\) and a .json"):
        open_shards([tmp_path], ("images",))


def test_a_batch_is_what_its_sample_indices_say(shards):
    config = config_of(shards, "frontend.backend=torch")
    (batch,) = batches(config, 2, 3)
    found = open_shards([shards], ("images",))
    assert (batch.stacked.shape, batch.stacked.dtype) == ((8, 3, 32, 32), torch.float32)
    assert config.image is not None
    squares = torch.tensor(
        np.stack([read_image(found.encoded(clip), 32) for clip in batch.clips.tolist()])
    )
    statistics = (torch.tensor(of) for of in (config.image.mean, config.image.std))
    torch.testing.assert_close(batch.stacked, normalise_image(squares, *statistics))
    for ids, mask, clip in zip(batch.ids, batch.attention_mask, batch.clips.tolist(), strict=True):
        (text,) = found.record(clip)["text"]
        assert ids[mask == 1].tolist() == tokenizer(config.text).inner(text)["input_ids"]


@ANY_BACK_END
def test_ranks_and_restarts_see_the_same_batches(shards, backend):
    config = config_of(shards, f"frontend.backend={backend}", "train.micro_batch=2")
    whole = batches(config, 1, 4)
    assert torch.equal(torch.cat([b.stacked for b in whole[4:]]), torch.cat(mels(config, 2, 4)))
    parts = [batches(config, 1, 4, rank, 2) for rank in (0, 1)]
    for step in range(3):
        of_step = [b for part in parts for b in part[2 * step : 2 * step + 2]]
        alone = whole[4 * step : 4 * step + 4]
        for ranked, single in zip(of_step, alone, strict=True):
            assert ranked.clips.tolist() == single.clips.tolist()
            assert torch.equal(ranked.stacked, single.stacked)


def mels(config: Config, first: int, last: int) -> list[torch.Tensor]:
    return [batch.stacked for batch in batches(config, first, last)]


@ANY_BACK_END
def test_a_bad_picture_is_replaced_by_the_next_and_reported(tmp_path, backend):
    pictures = [encoded(draw("red", "disc", n)) for n in range(8)]
    pictures[3] = pictures[3][: len(pictures[3]) // 2]
    samples = [(f"{n}.png", data, {"text": [f"{n}"]}) for n, data in enumerate(pictures)]
    data, index, _ = pack((key, sound, record) for key, sound, record in samples)
    (tmp_path / "0.tar").write_bytes(data)
    (tmp_path / "0.idx").write_text(index)
    config = config_of(tmp_path, f"frontend.backend={backend}")
    loading = loader(config)
    (batch,) = loading.batches(0, 1)
    assert sorted(batch.clips.tolist()) == [0, 1, 2, 4, 4, 5, 6, 7]
    first, second = (batch.stacked[n] for n in np.flatnonzero(batch.clips == 4))
    assert torch.equal(first, second)
    (bad,) = loading.bad
    assert "truncated" in bad.reason
    found = open_shards([tmp_path], ("images",))
    assert (bad.clip, bad.replaced_by) == (found.name(3), found.name(4))
    with pytest.raises(ShardError, match=r"cannot be decoded: .*0.tar at byte \d+ \(unreadable"):
        list(evaluation_batches(config, found, crops(config, np.arange(8)), Ranks()))


@ANY_BACK_END
def test_evaluation_sees_the_pictures_named_in_their_order(shards, backend):
    config = config_of(shards, f"frontend.backend={backend}", "eval.batch=2")
    found = open_shards([shards], ("images",))
    seen = [
        part.stacked
        for part in evaluation_batches(config, found, crops(config, np.array([5, 0, 9])), Ranks())
    ]
    assert [len(part) for part in seen] == [2, 1]
    for clip, picture in zip((5, 0, 9), torch.cat(seen), strict=True):
        alone = next(
            evaluation_batches(config, found, crops(config, np.array([clip])), Ranks())
        ).stacked[0]
        assert torch.equal(picture, alone)
