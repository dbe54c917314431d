"""The ViT of the audio side: positions, pooling, drop-path, first weights, kept counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flap_fast.encoders.vit.model import Encoded, ViT
from flap_fast.encoders.vit.patches import sine_positions
from flap_fast.encoders.vit.settings import ViTSettings
from flap_fast.model.decoder import Decoder
from flap_fast.model.masking import kept
from tests.tiny import tiny, vit_of


@pytest.mark.parametrize("given", [None, 3])
def test_positions_are_sines_and_cosines_of_frequency_then_of_time(given: int | None):
    """Token n = 2 time + frequency of a 3 x 2 grid; AudioMAE's table took it for 2 x 3."""
    columns = given or 2
    wanted = []
    for n in range(6):
        row: list[float] = []
        for place in (n % columns, n // columns):
            angles = [place / 10_000 ** (i / 2) for i in range(2)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        wanted.append(row)
    found = sine_positions(8, (3, 2), given)
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-7)


def test_a_count_that_is_whole_but_for_rounding_is_whole():
    """100 (1 - 0.9) is 9.999999999999998, and 10 (1 - 0.7) is 3.0000000000000004."""
    assert kept(100, 0.9, "floor") == 10
    assert kept(10, 0.7, "ceil") == 3
    assert [kept(51, 0.5, rounding) for rounding in ("floor", "round", "ceil")] == [25, 26, 26]
    assert kept(8, 0.2, "floor") == 6
    assert kept(3, 0.9, "floor") == 1


def encoded(*overrides: str) -> Encoded:
    torch.manual_seed(0)
    model = ViT(vit_of(tiny(*overrides))).eval()
    with torch.no_grad():
        return model(torch.randn(3, 1, 112, 128))


def test_the_clips_vector_is_what_pool_says():
    tokens = encoded().tokens
    wanted: dict[str, Tensor] = {
        "cls": tokens[:, 0],
        "mean_patch": tokens[:, 1:].mean(1),
        "mean_all": tokens.mean(1),
    }
    for pool, vector in wanted.items():
        torch.testing.assert_close(encoded(f"audio.pool={pool}").pooled, vector)
    bare = encoded("audio.use_cls=false")
    torch.testing.assert_close(bare.pooled, bare.tokens.mean(1))


def test_drop_path_grows_linearly_over_the_blocks():
    blocks = ViT(ViTSettings(width=8, heads=1, depth=4, drop_path=0.3)).blocks
    assert [block.drop_path for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_first_weights_are_xavier_uniform():
    """Within the square root of 6 over inputs and outputs, and all of it; biases are 0."""
    torch.manual_seed(0)
    config = tiny("loss.recon.weight=1")
    vit = ViT(vit_of(config))
    for part in (vit, Decoder(config, vit_of(config), vit.width)):
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Linear):
                bound = math.sqrt(6 / sum(layer.weight.shape))
                assert 0.98 * bound < layer.weight.abs().max() <= bound, name
                assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), (
                    name
                )
                assert not layer.bias.any(), name
    assert vit.cls_token is not None
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
