"""CLIP's ResNet beside PyTorch's own parts, small enough to be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from flap_fast.encoders.clip_resnet.model import AttentionPool, Bottleneck, ClipResNet
from flap_fast.encoders.clip_resnet.settings import ClipResNetSettings
from flap_fast.model.two_towers import TwoTowers
from tests.tiny import tiny_clip

SMALL = ClipResNetSettings(width=8, layers=(1, 2, 1, 1), resolution=64)


def test_resnet_50_has_as_many_parameters_as_openais():
    with torch.device("meta"):
        tower = ClipResNet(ClipResNetSettings(), 1024)
    assert sum(p.numel() for p in tower.parameters()) == 38_316_896


def test_clip_with_resnet_50_has_as_many_parameters_as_openais():
    config = tiny_clip(
        *("image.width=64", "image.layers=[3,4,6,3]", "image.resolution=224", "joint.width=1024"),
        *("text.width=512", "text.heads=8", "text.depth=12", "text.max_tokens=77"),
    )
    with torch.device("meta"):
        model = TwoTowers(config)
    bytes_ = len(model.text.get_parameter("token_embedding.weight"))
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers + (49_408 - bytes_) * 512 == 102_007_137


def test_pooling_is_multi_head_attention_of_the_mean_to_all():
    torch.manual_seed(0)
    pool, cells = AttentionPool(side=2, width=12, heads=3, joint_width=5), torch.randn(4, 4, 12)
    mha = nn.MultiheadAttention(12, 3, batch_first=True)
    three = (pool.q_proj, pool.k_proj, pool.v_proj)
    mha.in_proj_weight.data = torch.cat([p.weight for p in three])
    mha.in_proj_bias.data = torch.cat([p.bias for p in three])
    mha.out_proj = pool.c_proj  # type: ignore[assignment] - it leads elsewhere than to 12
    x = torch.cat([cells.mean(1, keepdim=True), cells], 1) + pool.positional_embedding
    torch.testing.assert_close(pool(cells), mha(x[:, :1], x, x)[0][:, 0])


def test_a_new_bottleneck_is_its_shortcut():
    block, x = Bottleneck(32, 8, stride=1), torch.randn(2, 32, 4, 4)
    torch.testing.assert_close(block(x), x.relu())


def test_a_stride_is_the_mean_of_squares():
    block, x = Bottleneck(8, 4, stride=2).eval(), torch.randn(2, 8, 4, 4)
    nn.init.ones_(block.bn3.weight)
    assert block.downsample is not None
    quiet = 1 / (1 + block.bn1.eps) ** 0.5  # a new BatchNorm in evaluation
    y = functional.conv2d(x, block.conv1.weight).mul(quiet).relu()
    y = functional.conv2d(y, block.conv2.weight, padding=1).mul(quiet).relu()
    mean = y.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    y = functional.conv2d(mean, block.conv3.weight).mul(quiet)
    of_input = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    y = y + functional.conv2d(of_input, block.get_parameter("downsample.0.weight")).mul(quiet)
    torch.testing.assert_close(block(x), y.relu())


def test_the_last_grid_is_a_32nd_of_the_image():
    torch.manual_seed(0)
    pooled, tokens = ClipResNet(SMALL, 6)(torch.randn(3, 3, 64, 64))
    assert pooled.shape == (3, 6)
    assert tokens.shape == (3, 4, 256)
    assert (tokens >= 0).all()


def test_first_weights_are_spread_as_openais():
    torch.manual_seed(0)
    tower = ClipResNet(SMALL, 512)
    pool = tower.attnpool
    for part in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert part.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert pool.positional_embedding.std().item() == pytest.approx(256**-0.5, rel=0.1)
    for name, weight in tower.named_parameters():
        if ".bn3.weight" in name:
            assert (weight == 0).all(), name
    assert (tower.bn3.weight == 1).all()  # the stem's is no bottleneck's


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"media must be \(B, 3, 64, 64\), got \(1, 3, 32, 64\)"):
        ClipResNet(SMALL, 6)(torch.zeros(1, 3, 32, 64))
