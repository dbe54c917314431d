"""The splits of Karpathy and Li for COCO and Flickr30K: one JSON of images and their sentences.

    {"images": [{"filename", "split", "sentences": [{"raw"}, ...], "filepath" (COCO)}, ...]}

`restval`, COCO's validation images that neither `val` nor `test` took, is trained on.

Source: "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR 2015.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flap_fast.files import ManifestError, parsed_json
from flap_fast.preparation.manifest import Row


def read_json(file: Path, *lists: str) -> dict[str, list]:
    """A JSON object with these lists in it; raises `ManifestError` for any other."""
    try:
        data = parsed_json(file.read_text(encoding="utf-8-sig"))
        if not all(isinstance(data[name], list) for name in lists):
            raise TypeError("no lists of these names")
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{file} must be a JSON with {', '.join(lists)}: {error}") from None
    return data


def karpathy(file: Path, images: str) -> Iterator[Row]:
    """The rows of such a JSON, numbered from 1; paths begin with `images`."""
    for number, image in enumerate(read_json(file, "images")["images"], 1):
        try:
            path = Path(images, image.get("filepath", ""), image["filename"])
            split = {"restval": "train"}.get(image["split"], image["split"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"{file}: image {number} lacks {error}") from None
        clip = {
            "audio": str(path),
            "captions": captions,
            "id": path.stem,
            "split": split,
        }
        yield file, number, clip
