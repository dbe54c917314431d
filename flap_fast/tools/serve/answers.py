"""What the endpoints compute and answer, whoever asks: one request at a time."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel
from torch import Tensor

from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.files import visible
from flap_fast.tools.embedder import Embedder
from flap_fast.tools.search import Index, stat_sound
from flap_fast.tools.serve.gate import Limits
from flap_fast.tools.serve.uploads import Refused, decodable, required
from flap_fast.tools.windows import (
    WindowRows,
    chosen_crop,
    embed_cropped,
    is_windows,
    window_seconds,
)


class Texts(BaseModel, extra="forbid"):
    texts: list[str]


class Row(BaseModel):
    """An embedding of a sound, or of one of its windows."""

    start_s: float | None
    end_s: float | None
    embedding: list[float]


class Rows(BaseModel):
    rows: list[Row]


class Embeddings(BaseModel):
    embeddings: list[list[float]]


class Caption(BaseModel):
    caption: str
    cosine: float


class Ranking(BaseModel):
    captions: list[Caption]


class Class(BaseModel):
    label: str
    probability: float


class ClassRow(BaseModel):
    """The classes of a sound, or of one of its windows, the most likely first."""

    start_s: float | None
    end_s: float | None
    classes: list[Class]


class Classes(BaseModel):
    rows: list[ClassRow]


class Result(BaseModel):
    number: int
    """Its sound is at /sounds/NUMBER."""
    name: str
    start_s: float | None
    end_s: float | None
    cosine: float


class Results(BaseModel):
    results: list[Result]
    more: bool
    """Whether there are further ones."""


class Health(BaseModel):
    model: str
    """SHA-256 of what embeddings depend on."""
    sounds: int
    limits: dict[str, float]


@dataclass(frozen=True)
class Served:
    """A model, and the sounds of an index below a folder."""

    embedder: Embedder
    index: Index | None
    folder: Path | None
    limits: Limits
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever computes."""

    @property
    def query_crop(self) -> str | None:
        """The crops of a sound to search by: the index's; with windows None, the default."""
        crop = self.index.crop if self.index else ""
        return None if not crop or is_windows(crop) else crop

    def sound(self, number: int) -> Path:
        """Return the file of a sound's number; no name that a client sends leads to one.

        Raises:
            Refused: no such sound, or another or none is there since the index was made.
        """
        files = self.index.files if self.index else []
        required(0 <= number < len(files), "the number", "be a sound's", number, status=404)
        assert self.index is not None
        path = self.index.path(files[number])
        same = stat_sound(path, self.index.file.parent) == files[number]
        rule = "be as it was when the server started, which finds changes when it is started again"
        required(same, "the sound", rule, path.name, status=404)
        return path


def texts_within(limits: Limits, texts: list[str], name: str) -> list[str]:
    """Return texts, of which there are not too many nor too long ones; raises `Refused`."""
    rule = f"be at most {limits.texts} texts, and one at least"
    required(0 < len(texts) <= limits.texts, name, rule, len(texts))
    longest, rule = max(map(len, texts)), f"have at most {limits.text_characters} characters"
    required(longest <= limits.text_characters, f"each of {name}", rule, longest)
    return texts


def embedding(served: Served, data: bytes, crop: str | None = None) -> Tensor:
    """Embed a sound as commands do: (d,); raises `Refused`."""
    data, _ = decodable(data, served.limits.sound_s)
    found = _embedded(served, data, chosen_crop(served.embedder.config, crop, None))
    assert isinstance(found, Tensor)
    return found


def timed_rows(
    served: Served, data: bytes, windows: str | None
) -> list[tuple[float | None, float | None, Tensor]]:
    """Return the start, the end and the row of each window, or of the sound, without times."""
    if windows is None:
        return [(None, None, embedding(served, data))]
    data, seconds = decodable(data, served.limits.sound_s)
    config = served.embedder.config
    hop_s, rule = window_seconds(windows, config)[1], f"give at most {served.limits.windows}"
    count = int(seconds / hop_s) + 1
    required(count <= served.limits.windows, "windows", rule, count)
    found = _embedded(served, data, chosen_crop(config, None, windows))
    assert isinstance(found, WindowRows)
    return [(*span, row) for span, row in zip(found.spans_s.tolist(), found.rows, strict=True)]


def _embedded(served: Served, data: bytes, crop: str) -> Tensor | WindowRows:
    (found,) = embed_cropped(served.embedder, [data], 64, crop)
    if isinstance(found, BadSound):
        why = str(found).removeprefix("sound number 0: ")
        raise Refused(422, f"the sound must be usable, got one that is {why}")
    return found


def results(served: Served, query: Tensor, offset: int, most: int) -> Results:
    """Return the sounds nearest to a query (d,); raises `Refused`."""
    required(most <= served.limits.results, "limit", f"be at most {served.limits.results}", most)
    index, folder = served.index, served.folder
    if index is None or folder is None:
        raise Refused(404, "the server must have sounds to search; start it with --audio FOLDER")
    (matches,) = index.nearest(query[None], offset + most + 1)
    shown = []
    for path, cosine, span_s, number in matches[offset : offset + most]:
        name = visible(os.path.relpath(path, folder), document=True)
        start_s, end_s = span_s or (None, None)
        shown.append(Result(number=number, name=name, start_s=start_s, end_s=end_s, cosine=cosine))
    return Results(results=shown, more=len(matches) > offset + most)
