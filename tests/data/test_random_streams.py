"""Draws are a function of what they are for."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import flap_fast
from flap_fast.data.random_streams import Stream, permutation, uniforms
from flap_kernels.philox import philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, words):
    """Salmon et al. 2011, the test vectors of Philox4x32-10 that come with Random123."""
    counter, key, words = (
        [int(word, 16) for word in hexadecimal.split()] for hexadecimal in (counter, key, words)
    )
    given = philox([torch.tensor([word]) for word in counter], *key)
    assert [word.item() for word in given] == words


def test_uniforms_are_the_upper_24_bits_of_the_words():
    """The first known answer again, through the door that everybody uses."""
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    given = uniforms(0, Stream.ORDER, torch.tensor([0]), 4)
    assert given.dtype == torch.float32
    assert given[0].double().tolist() == ((words >> 8) / 2**24).tolist()


def test_the_counter_holds_the_whole_sample_index_and_the_block():
    """A sample index beyond 32 bits, and numbers beyond the first four."""
    index = 5 + (7 << 32)
    given = uniforms(11, Stream.MASK, torch.tensor([index]), 8)[0, 4:]
    words = philox([torch.tensor([word]) for word in (5, 7, 1, 0)], 11, int(Stream.MASK))
    assert given.tolist() == [(int(word.item()) >> 8) / 2**24 for word in words]


def test_a_sample_draws_the_same_alone_and_among_others():
    sample_index = torch.tensor([3, 2**40, 0, 9])
    together = uniforms(1, Stream.CROP, sample_index, 7)
    alone = torch.cat([uniforms(1, Stream.CROP, index[None], 7) for index in sample_index])
    assert torch.equal(together, alone)
    assert torch.equal(uniforms(1, Stream.CROP, sample_index, 3), together[:, :3])


def test_seeds_streams_and_samples_never_share_numbers():
    draws = [
        uniforms(seed, stream, torch.arange(50), 4)
        for seed in (0, 1, 2**32 - 1)
        for stream in Stream
    ]
    assert len(torch.cat(draws).flatten().unique()) > 0.999 * torch.cat(draws).numel()


def test_uniforms_lie_in_the_unit_interval_evenly():
    u = uniforms(3407, Stream.SPECAUG, torch.arange(20_000), 5).double()
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()


def test_a_permutation_has_every_number_once_and_is_its_own_each_epoch():
    orders = {
        (seed, epoch, salt): permutation(seed, epoch, 100, salt)
        for seed in (0, 3407)
        for epoch in (0, 1)
        for salt in (0, 1)
    }
    for order in orders.values():
        assert order.dtype == np.int64
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert (permutation(3407, 1, 100) == orders[3407, 1, 0]).all()
    assert (permutation(0, 0, 100) != np.arange(100)).any()


def test_no_two_modules_draw_from_one_stream():
    """Negatives drawn with the captions' numbers would follow the captions."""
    used = []
    for file in sorted(Path(flap_fast.__file__).parent.rglob("*.py")):
        if file.name != "random_streams.py":
            used += sorted(set(re.findall(r"\bStream\.([A-Z_]+)", file.read_text())))
    assert sorted(used) == sorted(Stream.__members__)
