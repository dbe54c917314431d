"""What a text is, what a sound is, and what is refused in a sentence."""

from __future__ import annotations

import io
from collections import UserDict, UserList
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flap_fast.checks import ConfigError, read_text
from flap_fast.data.preprocess.image import BadImage
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.data.tokenize import tokenizer
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import Embedder
from tests.pictures import draw, encoded
from tests.sounds import chirp, encode
from tests.tiny import tiny, tiny_clip

RATE = 16_000
WAVE = chirp(200, 2000, 1.0, RATE)
FILE = encode(WAVE, RATE, "WAV", "FLOAT")


def of(config) -> Embedder:
    torch.manual_seed(0)
    return Embedder(TwoTowers(config), config, tokenizer(config.text), torch.device("cpu"))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return of(tiny("frontend.threads=2"))


class Column:
    """A column of a table: an order and a length, but no Sequence, as pandas and datasets have."""

    ndim = 1

    def __init__(self, *cells: object):
        self._cells = cells

    def __iter__(self):
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a column is ambiguous")


class Decoder:
    """As torchcodec's, which datasets 4 gives for a cell of an Audio column."""

    def __init__(self, error: str = ""):
        self._error = error

    def get_all_samples(self) -> SimpleNamespace:
        if self._error:
            raise RuntimeError(self._error)
        return SimpleNamespace(data=torch.from_numpy(WAVE)[None], sample_rate=RATE)


@pytest.mark.parametrize(
    "several",
    [
        ("a dog", "rain"),
        np.array(["a dog", "rain"]),
        np.array(["a dog", "rain"], object),
        Column("a dog", "rain"),
        UserList(["a dog", "rain"]),
        {"a dog": 0, "rain": 1}.keys(),
        iter(["a dog", "rain"]),
        ["\ufeffa dog", "rain"],
    ],
)
def test_any_list_of_texts_is_taken(embedder: Embedder, several):
    assert torch.equal(embedder.embed_text(several), embedder.embed_text(["a dog", "rain"]))
    if not isinstance(several, Iterator):
        ranked = embedder.rank(WAVE, several)
        assert sorted(text for text, _ in ranked) == ["a dog", "rain"]
        assert all(type(text) is str for text, _ in ranked)


@pytest.mark.parametrize(
    ("several", "error", "message"),
    [
        ("dog", TypeError, r"must be a list, got one: \['dog'\]"),
        (Path("dog"), TypeError, r"must be a list, got one: \['dog'\]"),
        (b"dog", TypeError, r"must be a list, got one bytes: put it in \[\]"),
        (None, TypeError, "must be a list, got None"),
        (5, TypeError, "must be a list, got int"),
        ({"dog", "cat"}, TypeError, "must be a list, got set"),
        ({"dog": 0}, TypeError, r"must be a list, got one dict: put it in \[\]"),
        (io.StringIO("dog"), TypeError, "must be a list, got one StringIO"),
        (np.array("dog"), TypeError, "got ndarray of 0 axes"),
        (np.array([["dog", "cat"]]), TypeError, "one column of a table, got ndarray of 2 axes"),
        ([["a", "b"], ["c", "d"]], TypeError, r"\[0\] must be a text, got list"),
        ([("a", "b")], TypeError, r"\[0\] must be a text, got tuple"),
        (["a", None], TypeError, r"\[1\] must be a text, got None"),
        (Column("a", float("nan")), TypeError, r"\[1\] must be a text, got nan"),
        ([b"a"], TypeError, r"\[0\] must be a text, got b'a'"),
        (torch.zeros(2), TypeError, r"\[0\] must be a text, got Tensor"),
        (["a", "caf\udce9"], ValueError, r"\[1\] must be valid Unicode, got 'caf\\udce9'"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_by_name(embedder: Embedder, several, error, message):
    for name, call in (
        ("captions", embedder.embed_text),
        ("captions", lambda several: embedder.rank(WAVE, several)),
        ("labels", embedder.embed_labels),
        ("labels", lambda several: embedder.classify(WAVE, several)),
    ):
        with pytest.raises(error, match=f"^{name} ?.*{message}"):
            call(several)


def test_a_class_has_a_name_and_templates_are_a_text(embedder: Embedder, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^labels\[1\] must name a class, got ' '"):
        embedder.classify(WAVE, ["dog", " "])
    for templates in (["a {label}"], 5, b"{label}"):
        with pytest.raises(TypeError, match=r"^templates must be a prompt with {label}"):
            embedder.classify(WAVE, ["dog", "cat"], templates)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^eval.templates must contain {label}"):
        embedder.classify(WAVE, ["dog", "cat"], "x" * 5000)
    with pytest.raises(ConfigError, match=r"^eval.templates must contain {label}.* got ''"):
        embedder.classify(WAVE, ["dog", "cat"], "")
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbfA sound of {label}\n")
    wanted = embedder.classify(WAVE, ["dog", "cat"], "A sound of {label}")
    assert embedder.classify(WAVE, ["dog", "cat"], tmp_path / "mine.txt") == wanted


def test_every_way_to_hand_over_an_encoded_sound_gives_the_same_row(
    embedder: Embedder, tmp_path: Path
):
    file = tmp_path / "a.wav"
    file.write_bytes(FILE)
    with file.open("rb") as opened:
        ways = [
            *(FILE, bytearray(FILE), memoryview(FILE), io.BytesIO(FILE), opened),
            {"bytes": FILE, "path": None},  # a row of Audio(decode=False)
            {"bytes": FILE, "path": "gone.wav"},
            {"bytes": None, "path": str(file)},
            UserDict({"path": file, "array": WAVE, "sampling_rate": RATE}),
            *(Decoder(), Decoder().get_all_samples()),
        ]
        # Twice: an open file is left where it stood.
        for _ in range(2):
            for row in embedder.embed_audio(ways):
                assert (row - embedder.embed_audio([file])[0]).abs().max() < 1e-5
    assert torch.equal(embedder.embed_audio(iter([file])), embedder.embed_audio([file]))


@pytest.mark.parametrize(
    ("sound", "why"),
    [
        (None, "a sound must be a file, its bytes, a waveform, .* got None"),
        (5, "got 5"),
        (["a.wav"], "got list"),
        ((RATE, WAVE), "hertz above 0, got ndarray"),  # as SciPy returns them
        (("a.wav", RATE), "a waveform, .* got 'a.wav'"),
        (object(), "got object"),
        (io.StringIO("a"), "a file object must give bytes, got str; open it with mode 'rb'"),
        ({"bytes": None, "path": None}, r"must have 'array' .*, or 'bytes' or 'path'"),
        ({"audio": {"path": "a.wav"}, "text": "a"}, "; pass the cell of its column 'audio'"),
        (Decoder("no stream"), "unreadable: no stream"),
        (b"", "empty: the file has no bytes"),
        ((WAVE, 1), "a waveform's rate must be 1000 Hz or more, got 1 Hz"),
    ],
)
def test_what_is_no_sound_is_refused_by_number(embedder: Embedder, sound: Any, why: str):
    with pytest.raises(BadSound, match=f"^sound number 1: .*{why}"):
        embedder.embed_audio([WAVE, sound])
    closed = io.BytesIO(FILE)
    closed.close()
    with pytest.raises(BadSound, match=r"^sound number 0: unreadable: .*closed"):
        embedder.embed_audio([closed])


@pytest.mark.parametrize(
    "one", ["a.wav", Path("a.wav"), FILE, io.BytesIO(FILE), {"path": "a.wav"}, (WAVE, RATE)]
)
def test_one_sound_is_no_list(embedder: Embedder, one: Any):
    for call in (embedder.embed_audio, embedder.embed_each):
        with pytest.raises(TypeError, match=r"^sounds must be a list, got one"):
            call(one)


@pytest.mark.parametrize("channels", [0, 1, 2, 64])
@pytest.mark.parametrize("array", [np.zeros, torch.zeros])
def test_one_waveform_is_no_list_of_its_samples(embedder: Embedder, array, channels: int):
    shape = (RATE, channels) if channels else (RATE,)
    for call in (embedder.embed_audio, embedder.embed_each):
        with pytest.raises(TypeError, match=r"^sounds must be a list, got one waveform of shape"):
            call(array(shape))


def test_a_file_in_an_array_of_no_axis_is_no_list(embedder: Embedder):
    with pytest.raises(TypeError, match=r"^sounds must be a list, got one ndarray"):
        embedder.embed_audio(np.array("a.wav"))


def test_an_array_of_waveforms_is_a_list(embedder: Embedder):
    assert embedder.embed_audio(np.stack([WAVE, WAVE])).shape == (2, 16)


def test_a_batch_is_an_integer_of_any_kind(embedder: Embedder):
    assert embedder.embed_text(["a", "b"], batch=np.int64(1)).shape == (2, 16)  # type: ignore
    for call in (
        lambda batch: embedder.embed_text(["a"], batch),
        lambda batch: embedder.embed_audio([WAVE], batch),
    ):
        with pytest.raises(TypeError, match=r"^batch must be an integer, got '3'"):
            call("3")
        with pytest.raises(ConfigError, match=r"^batch must be at least 1, got 0"):
            call(0)


def test_images_are_handed_over_as_sounds_are(tmp_path: Path):
    embedder = of(tiny_clip())
    picture = draw("red", "square", 1)
    file = encoded(picture)
    (tmp_path / "a.png").write_bytes(file)
    ways = [file, io.BytesIO(file), {"bytes": file, "path": None}, {"path": tmp_path / "a.png"}]
    wanted = embedder.embed_image([picture])[0]
    for row in embedder.embed_image(ways):
        torch.testing.assert_close(row, wanted)
    for image, why in ((None, "must be a file, .* got NoneType"), (io.StringIO(), "got str")):
        with pytest.raises(BadImage, match=f"^image number 0: .*{why}"):
            embedder.embed_image([image])
    with pytest.raises(TypeError, match=r"^images must be a list, got one bytes"):
        embedder.embed_image(file)


def test_a_text_file_has_no_byte_order_mark_and_is_utf8(tmp_path: Path):
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffdog\n\ufeffcat\n".encode())
    assert read_text("--classes", file) == "dog\ncat\n"
    for data in ("café".encode("latin-1"), "dog".encode("utf-16"), "dog".encode("utf-16-le")):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"^--classes must be a UTF-8 text file, got .*iconv"):
            read_text("--classes", file)
    with pytest.raises(ConfigError, match=r"^--classes must name an existing file, got"):
        read_text("--classes", "x" * 5000)
