"""Every optimizer by its name: as PyTorch's own, resumed bit for bit, and under ZeRO the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.train import OptimizerName
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.engine import Engine, check_engine, make_engine
from flap_fast.training.optimizers import optimizer
from flap_fast.training.torch_optimizers import (
    check_optimizer,
    elementwise,
    kept_numbers,
    muon_flop,
    torch_optimizer,
)
from tests.ranks import on_ranks
from tests.tiny import tiny

NAMES = get_args(OptimizerName)
# Where its own defaults leave a part of it unused.
OPTIONS = {
    "adafactor": "{eps: [null, 0.01]}",
    "adamw": "{amsgrad: true}",
    "muon": "{momentum: 0.9, ns_steps: 4}",
    "rmsprop": "{momentum: 0.9, centered: true}",
    "sgd": "{momentum: 0.9, nesterov: true}",
}
DIVIDED = [name for name in NAMES if elementwise(name)]
ZERO = [*((name, 1 + n % 3) for n, name in enumerate(DIVIDED)), ("adamw", 3), ("sgd", 2)]
ZERO += [(name, 0) for name in NAMES if not elementwise(name)]


def settings(name: str, stage: int = 0) -> Config:
    """One that decays weights where it can, with two factors of the learning rate."""
    return tiny(
        *(f"optim.name={name}", f"optim.options={OPTIONS.get(name, '{}')}", "run.folder=nowhere"),
        *(
            "audio.depth=1",
            "text.depth=1",
            "optim.media_lr_factor=0.5",
            f"train.zero_stage={stage}",
        ),
        *(["optim.weight_decay=0.1"] if name not in ("adam", "rprop") else []),
        # Adam makes a step of what is only rounding (a key's bias has no gradient).
        *(["optim.eps=0.00001"] if name not in ("adafactor", "asgd", "rprop", "sgd") else []),
    )


def step(engine: Engine, config: Config, ranks: Ranks, number: int) -> None:
    """One on 8 random pairs."""
    torch.manual_seed(number)
    mel, ids = torch.randn(8, 1, 112, 128), torch.randint(5, 200, (8, 16))
    rows = slice(8 // ranks.world * ranks.rank, 8 // ranks.world * (ranks.rank + 1))
    outputs = engine.model(mel[rows], ids[rows], torch.ones_like(ids[rows]))
    engine.backward(total_loss(outputs, config)["total"])
    engine.step(1e-3)


def started(config: Config, ranks: Ranks) -> Engine:
    torch.manual_seed(0)
    return make_engine(config, TwoTowers(config), ranks)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, tmp_path: Path):
    config, ranks, file = settings(name), Ranks(), tmp_path / "optimizer.safetensors"
    whole = started(config, ranks)
    for number in range(2):
        step(whole, config, ranks, number)
    saved = {n: w.clone() for n, w in whole.weights().items()}
    whole.optimizer_state.save(file)
    assert load_file(file)
    resumed = started(config, ranks)
    resumed.module.load_state_dict(saved)
    resumed.optimizer_state.load(file)
    for engine in (whole, resumed):
        step(engine, config, ranks, 2)
    ours, theirs = resumed.weights(), whole.weights()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert all(not torch.equal(ours[n], saved[n]) for n in saved if n.endswith("fc1.weight"))


def on_two(folder: Path) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Weights after three steps of each under its stage, its state saved and loaded on the way."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), launched=True)
    found = {}
    for name, stage in ZERO:
        config, file = settings(name, stage), folder / f"{name}-{stage}.safetensors"
        engine = started(config, ranks)
        for number in range(3):
            step(engine, config, ranks, number)
            if number:
                engine.optimizer_state.save(file)
                ranks.barrier()
                engine.optimizer_state.load(file)
        found[name, stage] = engine.weights()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Any]]:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("two")
    return folder, on_ranks(2, on_two, folder)[0]


@pytest.mark.parametrize(("name", "stage"), ZERO)
def test_two_ranks_give_the_weights_and_the_state_of_one(name: str, stage: int, two, tmp_path):
    config, ranks, file = settings(name), Ranks(), tmp_path / "optimizer.safetensors"
    whole = started(config, ranks)
    for number in range(3):
        step(whole, config, ranks, number)
    whole.optimizer_state.save(file)
    folder, weights = two
    ours, theirs, first = weights[name, stage], whole.weights(), started(config, ranks).weights()
    for part in ("audio.", "text.", "text_head", "logit_scale"):
        some = [n for n in theirs if n.startswith(part)]
        # Of all of a part: a single gradient may be rounding alone, whose sign Rprop goes by.
        error = norm([ours[n] - theirs[n] for n in some])
        assert error < 0.05 * norm([theirs[n] - first[n] for n in some]), part
    ours, theirs = load_file(folder / f"{name}-{stage}.safetensors"), load_file(file)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
    for kept in {n.rpartition("/")[2] for n in theirs}:
        some = [n for n in theirs if n.endswith(f"/{kept}")]
        error = norm([ours[n] - theirs[n] for n in some])
        assert error <= 0.02 * norm([theirs[n] for n in some]), kept


def norm(values: list[Tensor]) -> float:
    return torch.nn.utils.get_total_norm(values).item()


def test_muon_updates_the_matrices_of_blocks_and_adamw_all_else():
    config = settings("muon")
    torch.manual_seed(0)
    model = TwoTowers(config)
    ours = optimizer(config, model, torch.device("cpu"))
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 2 and (".blocks." in name or ".layer." in name)
    }
    assert "audio.blocks.0.attn.qkv.weight" in matrices
    assert "text.inner.encoder.layer.0.output.dense.weight" in matrices
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    ours.step()
    copies = {name: torch.nn.Parameter(value) for name, value in before.items()}
    for name, p in model.named_parameters():
        copies[name].grad = p.grad
        decay = 0.1 if p.ndim > 1 and "token" not in name else 0.0
        if name in matrices:
            options: Any = {"momentum": 0.9, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
            torch.optim.Muon([copies[name]], config.optim.lr, decay, **options).step()
        else:
            lr, eps = config.optim.lr, config.optim.eps
            torch.optim.AdamW([copies[name]], lr, eps=eps, weight_decay=decay).step()
        torch.testing.assert_close(p, copies[name], msg=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("optim.name=lbfgs", "optim.name must be 'adam', 'adamw', 'muon'"),
        ("optim.name=sgd optim.betas=[0.9,0.99]", "optim.betas must be left out with .* = sgd"),
        ("optim.name=asgd optim.eps=0.1", "optim.eps must be left out with optim.name = asgd"),
        ("optim.name=rprop optim.weight_decay=1", "optim.weight_decay must be 0 with .* = rprop"),
        ("optim.name=sgd optim.options={momentun: 1}", "must name arguments of SGD: momentum, dam"),
        ("optim.name=sgd optim.options={momentum: -1}", "must suit optim.name = sgd: Invalid mom"),
        ("optim.name=sgd optim.options={momentum: high}", "options.momentum must be .*'high'"),
        ("optim.name=sgd optim.options={momentum: true}", "options.momentum must not be true or"),
        ("optim.name=muon optim.options={ns_steps: x}", "optim.options.ns_steps must be .*'x'"),
        ("optim.name=asgd optim.options={lambd: .nan}", "optim.options.lambd must be .*, got nan"),
        ("optim.options={amsgrad: ja}", "optim.options.amsgrad must be a valid boolean.*got 'ja'"),
        ("optim.name=adafactor optim.eps=1", "optim.eps must be left out with .* = adafactor"),
        ("optim.options={lr: 1}", "optim.options must name arguments of Adam: amsgrad, got 'lr'"),
    ],
)
def test_what_an_optimizer_does_not_take_is_named_before_a_model_is_loaded(
    given: str, message: str
):
    with pytest.raises(ConfigError, match=message):
        check_optimizer(tiny(*given.replace(" optim", "\noptim").split("\n")).optim)


@pytest.mark.parametrize(
    ("name", "options", "group"),
    [
        ("sgd", "{momentum: 9e-1, nesterov: 'false'}", {"momentum": 0.9, "nesterov": False}),
        ("adamw", "{amsgrad: 'no'}", {"amsgrad": False}),
        ("adafactor", "{eps: [null, 1e-3]}", {"eps": (None, 1e-3)}),
    ],
)
def test_a_number_or_a_truth_value_that_is_a_text_is_what_it_says(name, options, group):
    optim = tiny(f"optim.name={name}", f"optim.options={options}").optim
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    made = torch_optimizer(optim, [{"params": [matrix], "muon": False}], fused=False)
    assert {n: made.param_groups[0][n] for n in group} == group


@pytest.mark.parametrize("name", NAMES)
def test_zero_is_refused_where_it_cannot_divide_the_work(name: str, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("RANK", "0")
    assert check_engine(settings(name, 0), 2) == "deepspeed"
    if elementwise(name):
        assert check_engine(settings(name, 2), 2) == "deepspeed"
        return
    with pytest.raises(ConfigError, match=f"zero_stage must be 0 with optim.name = {name}.*got 2"):
        check_engine(settings(name, 2), 2)


def test_what_each_keeps_is_counted():
    shape = (30, 50)
    kept = {name: kept_numbers(settings(name).optim, shape) for name in NAMES}
    assert kept["adam"] == kept["nadam"] == kept["muon"] == 2 * 1500
    assert kept["adamw"] == 3 * 1500  # amsgrad
    assert kept["sgd"] == kept_numbers(settings("muon").optim, shape, muon=True) == 1500
    assert kept["adafactor"] == 30 + 50
    assert kept_numbers(tiny("optim.name=sgd").optim, shape) == 0
    assert muon_flop(tiny("optim.name=muon").optim, shape) == 5 * (4 * 900 * 50 + 2 * 27000)
