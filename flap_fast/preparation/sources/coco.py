"""COCO captions: Karpathy's splits (test: 5,000 images) where their JSON exists, else the official.

    FOLDER/dataset_coco.json                       Karpathy's; images in FOLDER/{train,val}2014/
    FOLDER/annotations/captions_{train,val}YEAR.json    official; images in FOLDER/{train,val}YEAR/

Source: Chen et al., "Microsoft COCO Captions", arXiv 1504.00325.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from flap_fast.files import ManifestError
from flap_fast.preparation.manifest import Entry, Row, collect
from flap_fast.preparation.sources.karpathy import karpathy, read_json
from flap_fast.preparation.sources.layout import Source


def read(folder: Path) -> list[Entry]:
    """All images, five captions or more each; raises `ManifestError` without a JSON."""
    names = ("dataset_coco.json", "karpathy/dataset_coco.json")
    splits = next((folder / name for name in names if (folder / name).is_file()), None)
    if splits is not None:
        return collect(karpathy(splits, ""), folder, str(splits))
    files = sorted((folder / "annotations").glob("captions_*.json"))
    if not files:
        raise ManifestError(
            f"COCO must have dataset_coco.json or annotations/captions_*.json, got '{folder}' "
            "without"
        )
    return collect(_official(files), folder, str(folder))


def _official(files: list[Path]) -> Iterator[Row]:
    numbers = count(1)
    for file in files:
        images = file.stem.removeprefix("captions_")  # train2017
        data = read_json(file, "images", "annotations")
        captions: dict[int, list[str]] = {}
        try:
            for caption in data["annotations"]:
                captions.setdefault(caption["image_id"], []).append(caption["caption"])
            for image in data["images"]:
                clip = {
                    "audio": f"{images}/{image['file_name']}",
                    "captions": captions.get(image["id"], []),
                    "id": Path(image["file_name"]).stem,
                    "split": images.rstrip("0123456789"),
                }
                yield file, next(numbers), clip
        except (KeyError, TypeError) as error:
            raise ManifestError(f"{file}: an image or a caption lacks {error}") from None


COCO = Source(
    name="coco",
    kind="images",
    folder="dataset_coco.json (Karpathy's), or COCO's annotations/",
    splits="Karpathy's train, val, test; or train, val",
    read=read,
)
