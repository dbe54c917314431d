"""The gradients of a step: in one pass, or in two where the batch does not fit.

    one pass   total_loss(model(batch)).backward()
    exact      1. every micro-batch through the model, its embeddings kept     A, T (B, d), s
               2. the loss over the whole batch of all ranks, once             dA, dT, ds
               3. every micro-batch m again, and backward from
                      <dA_m, A_m> + <dT_m, T_m> + (ds s + weight recon_m) / M
    local      the loss within each micro-batch (of all ranks), averaged: fewer negatives

    B clips of this rank   M micro-batches   d joint width   s the logit scale

Pass 3 draws what pass 1 drew: crops, masks and SpecAug belong to a clip's visit, dropout to the
step, the rank and the micro-batch. So `exact` gives the gradients of one pass, for a forward more.
Of the whole batch it holds embeddings, and log-mels unless they are decoded again. Only layers that
mix clips can tell the difference: BatchNorm normalises by its micro-batch, and counts it twice in
its averages.

Source: Gao et al., GradCache, arXiv 2101.06983 (SPEC 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from flap_fast.config import Config, Mask
from flap_fast.data.batch import Batch
from flap_fast.data.preprocess.mel import spec_augment, stripes
from flap_fast.data.shards import ShardError
from flap_fast.losses import total_loss
from flap_fast.model.masking import patch_mask
from flap_fast.model.two_towers import ModelInputs, Outputs
from flap_fast.ranks import Ranks
from flap_fast.train.engine import Engine
from flap_kernels.draw_plan import MaskPlan


class Gradients:
    """Takes a rank's micro-batches of a step through the model; gradients stay in the engine.

    Args:
        steps: of the whole run, of which `per_epoch` make an epoch.
    """

    def __init__(self, config: Config, ranks: Ranks, engine: Engine, steps: int, per_epoch: int):
        self._config, self._ranks, self._engine = config, ranks, engine
        self._steps, self._per_epoch = steps, per_epoch
        self._micro_batches = config.train.micro_batches(ranks.world)
        local = config.train.accumulation == "local"
        self._two = self._micro_batches > 1 and not local
        replay, on_gpu = config.train.replay, ranks.device.type == "cuda"
        self._keep = replay == "keep" or (replay == "auto" and on_gpu)
        if self._micro_batches > 1 and local and ranks.first:
            _warn(config, ranks.world)

    @property
    def reads(self) -> int:
        """How often the micro-batches of a step are to come, one time after the other."""
        return 2 if self._two and not self._keep else 1

    def __call__(self, step: int, batches: Iterator[Batch]) -> tuple[Outputs, dict[str, Tensor]]:
        """What the model gave for this rank's clips of a step, and the terms; without graphs."""
        return (self._two_passes if self._two else self._one_pass)(step, batches)

    def _one_pass(self, step: int, batches: Iterator[Batch]) -> tuple[Outputs, dict[str, Tensor]]:
        given, terms = [], []
        for micro in range(self._micro_batches):
            outputs = self._forward(next(batches), step, micro)
            found = total_loss(outputs, self._config)
            self._engine.backward(found["total"])
            given.append(_detached(outputs))
            terms.append(_detached(found))
        return cast(Outputs, _joined(given)), _joined(terms)

    def _two_passes(self, step: int, batches: Iterator[Batch]) -> tuple[Outputs, dict[str, Tensor]]:
        kept, clips, given = [], [], []
        with torch.no_grad():
            for micro in range(self._micro_batches):
                batch = next(batches)
                given.append(self._forward(batch, step, micro, rebuild=False))
                clips.append(batch.clips)
                kept += [batch] * self._keep
        outputs = {name: value.requires_grad_() for name, value in _joined(given).items()}
        terms = total_loss(cast(Outputs, outputs), self._config)
        terms["total"].backward()
        pulls = {name: value.grad for name, value in outputs.items() if value.grad is not None}
        outputs, terms = _detached(outputs), _detached(terms)

        recon = []
        second = iter(kept) if self._keep else batches
        for micro in range(self._micro_batches):
            batch = next(second)
            if (batch.clips != clips[micro]).any():
                raise ShardError(
                    f"step {step}: a clip was read once and not again; set train.replay=keep"
                )
            again = self._forward(batch, step, micro)
            self._engine.backward(_pulled(again, pulls, micro, self._micro_batches))
            recon.append(again["recon"].detach())
        if "recon" in terms:  # the decoder rested in the first pass
            outputs["recon"] = terms["recon"] = torch.stack(recon).mean()
            terms["total"] = terms["total"] + pulls["recon"] * terms["recon"]
        return cast(Outputs, outputs), terms

    def _forward(self, batch: Batch, step: int, micro: int, *, rebuild: bool = True) -> Outputs:
        config = self._config
        torch.manual_seed(dropout_seed(config.run.seed, step, self._ranks.rank, micro))
        mask = patch_mask_of(batch, config, self._steps, self._per_epoch)
        inputs = model_inputs(batch, mask, config)
        if not rebuild:
            inputs["target"] = None
        return self._engine.model(**inputs)


def patch_mask_of(batch: Batch, config: Config, steps: int, per_epoch: int) -> MaskPlan | None:
    """The patches that masking leaves and drops; None without masking, and in the unmasked tail."""
    tail = config.mask.unmasked_tail_epochs
    epochs = -(-steps // per_epoch)
    mask = Mask(kind="none") if batch.epoch >= epochs - tail else config.mask
    if mask.kind == "none":
        return None
    return patch_mask(mask, config.encoder.grid, config.run.seed, batch.sample_index)


def model_inputs(batch: Batch, mask: MaskPlan | None, config: Config) -> ModelInputs:
    """What the model is called with: media augmented, and what the decoder is to reconstruct."""
    specaug, seed, media, erase = config.specaug, config.run.seed, batch.media, None
    if config.encoder.specaug == "inside":
        shape = (media.shape[2], media.shape[3])
        erase = stripes(specaug, seed, batch.sample_index, shape, whole=True)
    elif config.encoder.specaug == "before":
        media = spec_augment(media, specaug, config.audio, seed, batch.sample_index)
    clean = config.loss.recon.target == "clean"
    return {
        "media": media,
        "ids": batch.ids,
        "attention_mask": batch.attention_mask,
        "mask": mask,
        "target": (batch.media if clean else media) if config.loss.recon.weight > 0 else None,
        "erase": erase,
        "longer": batch.longer,
    }


def dropout_seed(seed: int, step: int, rank: int, micro: int = 0) -> int:
    """Sown anew for each micro-batch: a resumed run and a second pass draw what was drawn."""
    # The odd multiplier spreads micro-batches over the 32 bits that a CPU's generator takes.
    return ((seed * 1_000_003 + step) * 65_537 + rank + micro * 0x9E3779B1) % 2**63


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of the micro-batches: rows one below the other, numbers () averaged."""
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: torch.cat(values) if values[0].ndim else torch.stack(values).mean()
        for name, values in columns.items()
    }


def _pulled(
    outputs: Outputs, pulls: Mapping[str, Tensor], micro: int, micro_batches: int
) -> Tensor:
    """A number whose gradient, over the micro-batches as engines average, is the whole loss's."""
    total = outputs["scale"].new_zeros(())
    for name, pull in pulls.items():
        value = cast(dict[str, Tensor], outputs)[name]
        if pull.ndim:
            rows = slice(micro * len(value), (micro + 1) * len(value))
            total = total + micro_batches * (pull[rows] * value).sum()
        else:
            total = total + pull * value
    return total


def _detached(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _warn(config: Config, world: int) -> None:
    clips = world * (config.train.micro_batch or 0)
    Console(stderr=True).print(
        f"train.accumulation=local contrasts a clip with the {clips} of its micro-batch over all "
        f"ranks, not with the {config.train.global_batch} of train.global_batch; "
        "exact contrasts with all, for one more forward",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
