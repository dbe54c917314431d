"""Image data sets: Karpathy's splits, every sentence, and files kept as they are."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from flap_fast.data.preprocess.image import read_image
from flap_fast.data.shards import ShardError, open_shards
from flap_fast.files import ManifestError
from flap_fast.preparation.prepare import prepare
from flap_fast.preparation.shard_tasks import Prepared
from flap_fast.preparation.sources import SOURCES
from tests.preparation.sources.layouts import JPEG, PNG, WEBP, sound, table, write
from tests.sounds import write_manifest
from tests.tars import tar_of

IMAGES = ("images",)


def karpathy(*images: tuple[str, str, str, int]) -> str:
    """The JSON of images: folder, file, split, number of sentences."""
    rows = [
        {
            **({"filepath": folder} if folder else {}),
            "filename": name,
            "split": split,
            "sentences": [{"raw": f"{name} {n}", "tokens": []} for n in range(count)],
        }
        for folder, name, split, count in images
    ]
    return json.dumps({"images": rows, "dataset": "mini"})


def test_coco_is_in_karpathys_splits_and_rests_are_trained_on(tmp_path):
    images = [
        ("val2014", "COCO_val2014_000000391895.jpg", "test", 5),
        ("train2014", "COCO_train2014_000000057870.jpg", "train", 6),
        ("val2014", "COCO_val2014_000000522418.jpg", "restval", 5),
    ]
    files = {f"{folder}/{name}": JPEG + name.encode() for folder, name, *_ in images}
    folder = write(tmp_path / "coco", {"dataset_coco.json": karpathy(*images), **files})
    done = prepare(SOURCES["coco"].read(folder), tmp_path / "out", show=False)
    assert done == Prepared(3, 2, 3, 0)
    train, test = (open_shards([tmp_path / "out" / split], IMAGES) for split in ("train", "test"))
    assert train.kind == test.kind == "images"
    assert [len(train.record(clip)["text"]) for clip in range(2)] == [6, 5]
    assert test.record(0)["text"] == [f"{images[0][1]} {n}" for n in range(5)]
    assert test.encoded(0) == JPEG + images[0][1].encode()


def test_cocos_official_splits_serve_where_karpathys_are_not(tmp_path):
    files = {
        f"annotations/captions_{split}2017.json": json.dumps(
            {
                "images": [{"id": n, "file_name": f"00{n}.jpg"} for n in (7, 8)],
                "annotations": [
                    {"image_id": 7 + n % 2, "id": n, "caption": f"{split} {n}"} for n in range(4)
                ],
            }
        )
        for split in ("train", "val")
    }
    clips = SOURCES["coco"].read(write(tmp_path, files))
    assert [(c.split, str(c.audio.relative_to(tmp_path)), c.captions) for c in clips] == [
        ("train", "train2017/007.jpg", ["train 0", "train 2"]),
        ("train", "train2017/008.jpg", ["train 1", "train 3"]),
        ("val", "val2017/007.jpg", ["val 0", "val 2"]),
        ("val", "val2017/008.jpg", ["val 1", "val 3"]),
    ]


def test_flickr30k_is_in_karpathys_splits(tmp_path):
    images = [("", "1007129816.jpg", "test", 5), ("", "1009434119.jpg", "train", 5)]
    folder = write(
        tmp_path,
        {"dataset_flickr30k.json": karpathy(*images), "flickr30k_images/1007129816.jpg": JPEG},
    )
    clips = SOURCES["flickr30k"].read(folder)
    assert [(c.split, c.audio.name, c.audio.is_file(), len(c.captions)) for c in clips] == [
        ("test", "1007129816.jpg", True, 5),
        ("train", "1009434119.jpg", False, 5),
    ]


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": 1}', "no JSON", '{"images": [{}]}'])
def test_a_json_of_another_kind_is_refused(text, tmp_path):
    with pytest.raises(ManifestError, match=r"dataset_coco\.json"):
        SOURCES["coco"].read(write(tmp_path, {"dataset_coco.json": text}))


def test_cc3m_takes_what_was_fetched_and_lists_the_rest(tmp_path):
    """One of each kind by its bytes, not by its name; a page saved as an image; one missing."""
    files = {
        "train.csv": table(
            "image,caption",
            ("images/0.jpg", "a jpeg"),
            ("images/1.jpg", "a png, by its bytes"),
            ("images/2.webp", "a webp"),
            ("images/3.jpg", "a page"),
            ("images/4.jpg", "gone"),
            ("images/5.jpg", " "),
        ),
        "train_2.csv": table("image,caption", ("images/6.jpg", "on line 2 as well")),
        "images/6.jpg": JPEG,
        "val.csv": table("filepath,title", ("images/0.jpg", "in val, too")),
        "images/0.jpg": JPEG,
        "images/1.jpg": PNG,
        "images/2.webp": WEBP,
        "images/3.jpg": b"<html>404</html>",
        "images/5.jpg": JPEG,
    }
    folder = write(tmp_path / "cc3m", files)
    out = tmp_path / "out"
    assert prepare(SOURCES["cc3m"].read(folder), out, show=False) == Prepared(8, 2, 5, 3)
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in rows] == [
        ("images/3.jpg", "unreadable: unknown image format"),
        ("images/4.jpg", "missing: no such file"),
        ("images/5.jpg", "captionless"),
    ]
    with tarfile.open(out / "train/0.tar") as tar:
        names = [name.split(".")[1] for name in tar.getnames()]
    assert names == ["jpg", "json", "png", "json", "png", "json", "jpg", "json"]
    shards = open_shards([out / "train"], IMAGES)
    jpeg, png, made_anew, last = (shards.encoded(clip) for clip in range(4))
    assert (jpeg, png, last) == (JPEG, PNG, JPEG)
    assert (read_image(made_anew, 8) == read_image(WEBP, 8)).all()
    (out / "train/0.idx").unlink()  # and the same without an index
    assert (open_shards([out / "train"], IMAGES).locations == shards.locations).all()


def test_shards_of_images_that_img2dataset_wrote_are_read(tmp_path):
    record = json.dumps({"caption": "a house", "url": "x", "key": "000000001"}).encode()
    files = {"jpg": JPEG, "json": record, "txt": b"a house"}
    tar = tar_of({f"000000001.{ending}": data for ending, data in files.items()})
    folder = write(tmp_path / "cc3m", {"00000.tar": tar})
    prepare(SOURCES["shards"].read(folder), tmp_path / "out", show=False)
    shards = open_shards([tmp_path / "out/cc3m"], IMAGES)
    assert shards.kind == "images"
    assert shards.encoded(0) == JPEG
    record = shards.record(0)
    assert (record["text"], record["url"]) == (["a house"], "x")


def test_a_manifest_may_name_images_as_it_names_sounds(tmp_path):
    write(tmp_path, {"a.PNG": PNG, "b.wav": sound(300)})
    rows = [{"audio": "a.PNG", "captions": ["a stamp"]}]
    prepare(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", show=False)
    assert open_shards([tmp_path / "out/train"], IMAGES).encoded(0) == PNG
    rows.append({"audio": "b.wav", "captions": ["a tone"]})
    with pytest.raises(ManifestError, match="must name sounds or images throughout, got both"):
        prepare(write_manifest(tmp_path / "n.jsonl", rows), tmp_path / "both", show=False)


def test_shards_of_two_kinds_are_not_opened_as_one(tmp_path):
    write(tmp_path, {"a.png": PNG, "b.wav": sound(300)})
    for name in ("a.png", "b.wav"):
        rows = [{"audio": name, "caption": "a stamp"}]
        prepare(write_manifest(tmp_path / f"{name}.jsonl", rows), tmp_path / name[0], show=False)
    folders = [tmp_path / "a/train", tmp_path / "b/train"]
    with pytest.raises(ShardError, match=r"of one kind, got .*images in .*, sounds in"):
        open_shards(folders, (*IMAGES, "sounds"))


def test_labels_named_for_an_image_are_enough(tmp_path: Path):
    write(tmp_path, {"a.png": PNG})
    rows = [{"audio": "a.png", "labels": ["tench"]}]
    done = prepare(write_manifest(tmp_path / "m.jsonl", rows), tmp_path / "out", show=False)
    assert done.kept == 1
