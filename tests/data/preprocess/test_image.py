"""Pictures: CLIP's preprocessing by hand, DALI beside it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pillow

from flap_fast.data.batch import DecodedBatch, EncodedBatch
from flap_fast.data.preprocess.dali import DaliDecoder, image_graph
from flap_fast.data.preprocess.decoders import ThreadedDecoder
from flap_fast.data.preprocess.image import (
    BadImage,
    any_square,
    normalise_image,
    read_image,
)
from tests.pictures import encoded

CPU = torch.device("cpu")


def smooth(width: int, height: int, seed: int = 0) -> pillow.Image:
    """Colours that change slowly and stay where no filter rings beyond 0 or 255."""
    few = np.random.default_rng(seed).integers(60, 196, (height // 8 + 2, width // 8 + 2, 3))
    return pillow.fromarray(few.astype(np.uint8)).resize((width, height), pillow.Resampling.BICUBIC)


def dali(files: list[list[bytes]]) -> Iterator[torch.Tensor]:
    settings = {"batch": 4, "threads": 1, "prefetch": 2}
    decoder = DaliDecoder(batches(files), image_graph(32), error=BadImage, device=CPU, **settings)
    return map(media, decoder)


def threaded(files: list[list[bytes]]) -> Iterator[torch.Tensor]:
    def decode(clip: bytes, _: float) -> np.ndarray:
        return read_image(clip, 32)

    return map(media, ThreadedDecoder(batches(files), decode, threads=1, prefetch=2))


def batches(files: list[list[bytes]]) -> Iterator[EncodedBatch]:
    return (EncodedBatch(some, np.zeros(len(some))) for some in files)


def media(decoded: DecodedBatch) -> torch.Tensor:
    assert (decoded.lengths == 32).all()
    return decoded.stacked


BOTH = pytest.mark.parametrize("decoder", [dali, threaded])


@pytest.mark.parametrize(
    ("size", "first"),
    [((32, 32), (0, 0)), ((33, 32), (0, 0)), ((32, 35), (0, 2)), ((34, 32), (1, 0))],
)
def test_a_picture_of_the_right_height_is_cut_as_torchvision_cuts(size, first):
    """Half of what is too much is cut in front, halves rounded to even: of 1, 0; of 3, 2."""
    picture = smooth(*size)
    left, top = first
    expected = np.asarray(picture)[top : top + 32, left : left + 32]
    assert (read_image(encoded(picture), 32) == expected).all()
    assert (next(dali([[encoded(picture)]]))[0].numpy() == expected).all()


def test_the_shorter_side_is_brought_to_the_resolution_and_the_longer_one_cut_down():
    """67 x 100 becomes 32 x 47 (47.76 cut off), of which the rows 8 to 39 stay."""
    picture = smooth(67, 100)
    expected = picture.resize((32, 47), pillow.Resampling.BICUBIC).crop((0, 8, 32, 40))
    assert (read_image(encoded(picture), 32) == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(67, 100), (300, 200), (20, 25), (32, 32), (47, 150)])
def test_dali_sees_what_the_reference_sees(kind, size):
    data = encoded(smooth(*size), kind)
    ours, theirs = read_image(data, 32).astype(int), next(dali([[data]]))[0].numpy()
    assert np.abs(ours - theirs).max() <= 2  # of 255: Pillow rounds once more, between the axes
    assert np.abs(ours - theirs).mean() < 0.4


def test_dali_sees_grey_as_the_reference_does():
    data = encoded(smooth(40, 50).convert("L"), "JPEG")
    ours, theirs = read_image(data, 32).astype(int), next(dali([[data]]))[0].numpy()
    assert np.abs(ours - theirs).max() <= 2
    assert (ours[..., 0] == ours[..., 2]).all()


def test_pixels_are_normalised_by_channel():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    x = normalise_image(pixels, torch.tensor([0.5, 0.2, 0.0]), torch.tensor([0.5, 0.1, 0.25]))
    expected = torch.tensor([-1.0, 0.0, 4.0])[None, :, None, None].expand(1, 3, 2, 2)
    torch.testing.assert_close(x, expected)
    assert x.is_contiguous(memory_format=torch.channels_last)


@BOTH
def test_batches_come_in_order_and_end(decoder):
    files = [encoded(smooth(40, 40, seed)) for seed in range(5)]
    found = list(decoder([files[:2], files[2:4], files[4:]]))
    assert [len(batch) for batch in found] == [2, 2, 1]
    for seen, file in zip(torch.cat(found), files, strict=True):
        assert (seen.int() - torch.tensor(read_image(file, 32)).int()).abs().max() <= 2
    assert all(batch.dtype == torch.uint8 for batch in found)


CUT = encoded(smooth(90, 90), "JPEG")
DDS = encoded(smooth(8, 8), "DDS")


@BOTH
@pytest.mark.parametrize("bad", [b"", b"no picture", CUT[: len(CUT) // 2]])
def test_a_bad_picture_costs_its_batch_and_no_other(decoder, bad):
    good = encoded(smooth(40, 40))
    decoded = decoder([[good, good], [good, bad], [good]])
    assert len(next(decoded)) == 2
    with pytest.raises(BadImage):
        next(decoded)
    assert len(next(decoded)) == 1
    with pytest.raises(StopIteration):
        next(decoded)


@BOTH
def test_an_error_of_the_source_is_not_a_bad_picture(decoder):
    def source():
        yield [encoded(smooth(40, 40))]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(decoder(source()))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (Path("nowhere.png"), "missing: no such file"),
        (Path("n" * 300), "missing: no such file"),
        (b"GIF no more", "unreadable: unknown image format"),
        (CUT[: len(CUT) // 2], "unreadable: image file is truncated"),
        (DDS[:80] + b"\4\0\0\0ABCD" + DDS[88:], "unreadable: Unimplemented pixel format"),
        (encoded(pillow.new("RGB", (51, 1))), "a strip: 51 x 1 pixels"),
        (encoded(pillow.new("F", (9, 9)), "TIFF"), "pixels of 32 bits"),
    ],
)
def test_what_cannot_be_used_says_why(source, reason):
    with pytest.raises(BadImage, match=reason):
        read_image(source, 32)


def test_a_picture_that_would_fill_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 32 * 32)
    read_image(encoded(pillow.new("RGB", (32, 32))), 32)
    with pytest.raises(BadImage, match="too large"):  # above twice the limit; between, it warns
        read_image(encoded(pillow.new("RGB", (64, 33))), 32)


def test_sixteen_bits_keep_their_upper_eight():
    deep = pillow.fromarray(np.full((32, 32), 0x1234, np.uint16))
    assert (read_image(encoded(deep), 32) == 0x12).all()


def test_files_arrays_and_pillows_images_are_one_picture(tmp_path):
    picture = smooth(40, 50)
    picture.save(tmp_path / "a.png")
    expected = read_image(tmp_path / "a.png", 32)
    for given in (str(tmp_path / "a.png"), tmp_path / "a.png", picture, np.asarray(picture)):
        assert (any_square(given, 0, 32) == expected).all()
    assert (any_square(picture.convert("RGBA"), 0, 32) == expected).all()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("nowhere.png", "nowhere.png: missing"),
        (np.zeros((4, 4), np.uint8), r"image number 7: an array must be .* got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3)), "image number 7: an array must be .* float64"),
    ],
)
def test_a_picture_that_cannot_be_embedded_is_named(picture, message):
    with pytest.raises(BadImage, match=message):
        any_square(picture, 7, 32)
