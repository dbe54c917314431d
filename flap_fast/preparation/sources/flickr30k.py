"""Flickr30K: 31,014 images, five captions each, in Karpathy's splits (test: 1,000).

    FOLDER/dataset_flickr30k.json
    FOLDER/flickr30k-images/*.jpg

Source: Young et al., "From image descriptions to visual denotations", TACL 2014.
"""

from __future__ import annotations

from pathlib import Path

from flap_fast.preparation.manifest import Entry, collect
from flap_fast.preparation.sources.karpathy import karpathy
from flap_fast.preparation.sources.layout import Source, first_file


def read(folder: Path) -> list[Entry]:
    """All images; raises `ManifestError` without the JSON."""
    names = ("dataset_flickr30k.json", "karpathy/dataset_flickr30k.json")
    file = first_file(folder, names, "Flickr30K")
    folders = ("flickr30k-images", "flickr30k_images", "images")
    images = next((name for name in folders if (folder / name).is_dir()), folders[0])
    return collect(karpathy(file, images), folder, str(file))


FLICKR30K = Source(
    name="flickr30k",
    kind="images",
    folder="dataset_flickr30k.json (Karpathy's), flickr30k-images/",
    splits="Karpathy's train, val, test",
    read=read,
)
