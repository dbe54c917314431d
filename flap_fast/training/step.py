"""The gradients of a step: in one pass, or by cached gradients where the batch does not fit.

    batch -> augment, mask -> model -> losses -> backward

    one pass            total_loss(model(batch)).backward()
    cached gradients    1. embeddings of every micro-batch m, without graphs       A, T (B, d), s
    (accumulation:      2. the loss over the whole batch of all ranks, once        dA, dT, ds
    exact)              3. every micro-batch again, and backward from its surrogate loss
                               M (<dA_m, A_m> + <dT_m, T_m>) + ds s + M B_m / B weight recon_m
    accumulation:       the loss within each micro-batch (of all ranks), averaged:
    local               fewer negatives for each clip

    B clips of this rank   M micro-batches   B_m clips of one   d joint width   s the logit scale

M is the same on every rank, and may differ from step to step; so may B_m within a step. Pass 3
draws what pass 1 drew: crops, masks and SpecAug depend on a clip's sample index; dropout on the
step, the rank and the micro-batch. So cached gradients equal those of one pass, for one more
forward. Of the whole batch only embeddings are held, and log-mels if inputs are cached too
(train.replay). Layers that mix clips do differ: BatchNorm normalises each micro-batch by itself,
and counts it twice in its running averages.

Source: Gao et al., GradCache, arXiv 2101.06983, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import Batch, PackedMels
from flap_fast.data.preprocess.spec_augment import spec_augment, spec_augment_packed, stripes
from flap_fast.data.shards import ShardError
from flap_fast.encoders.base import AnyMask
from flap_fast.losses import total_loss
from flap_fast.model.masking import packed_patch_mask, patch_mask
from flap_fast.model.two_towers import ModelInputs, Outputs
from flap_fast.ranks import Ranks
from flap_fast.training.engine import Engine
from flap_fast.training.frozen import Frozen
from flap_fast.training.teacher import Teacher


class Gradients:
    """Runs a rank's micro-batches of a step forward and backward; the engine holds the gradients.

    Args:
        steps: of the whole run.
        per_epoch: steps of an epoch.
        frozen: outputs of frozen encoders; those that it has none of run in each step.
        teacher: of loss.distill, if it has a weight.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        steps: int,
        per_epoch: int,
        frozen: Frozen | None = None,
        teacher: Teacher | None = None,
    ):
        self._config, self._ranks, self._engine = config, ranks, engine
        self._frozen, self._teacher = frozen or Frozen(), teacher
        self._steps, self._per_epoch = steps, per_epoch
        self._local = config.train.accumulation == "local"
        replay, on_gpu = config.train.replay, ranks.device.type == "cuda"
        self._cache_inputs = replay == "keep" or (replay == "auto" and on_gpu)
        if config.train.micro_batches(ranks.world) > 1 and self._local and ranks.first:
            _warn_of_fewer_negatives(config, ranks.world)

    @property
    def reads(self) -> int:
        """How many times the loader yields a step's micro-batches, where there are several."""
        return 1 if self._local or self._cache_inputs else 2

    def __call__(self, step: int, batches: Iterator[Batch]) -> tuple[Outputs, dict[str, Tensor]]:
        """Add a step's gradients; returns outputs of this rank's clips and loss terms, detached."""
        first = [next(batches)]
        micro_batches = first[0].micro_batches
        cached = micro_batches > 1 and not self._local
        run = self._cached_gradients if cached else self._one_pass
        # Popped: the list would hold the first batch until the step has ended.
        return run(step, micro_batches, chain((first.pop() for _ in range(1)), batches))

    def _one_pass(
        self, step: int, micro_batches: int, batches: Iterator[Batch]
    ) -> tuple[Outputs, dict[str, Tensor]]:
        all_outputs, all_terms = [], []
        for micro in range(micro_batches):
            batch = next(batches)
            outputs = self._taught(batch, self._forward(batch, step, micro))
            terms = total_loss(outputs, self._config)
            self._backward(terms["total"], micro, micro_batches)
            all_outputs.append(_detached(outputs))
            all_terms.append(_detached(terms))
        return cast(Outputs, _joined(all_outputs)), _joined(all_terms)

    def _cached_gradients(
        self, step: int, micro_batches: int, batches: Iterator[Batch]
    ) -> tuple[Outputs, dict[str, Tensor]]:
        inputs, clips, embedded = [], [], []
        with torch.no_grad():
            for micro in range(micro_batches):
                batch = next(batches)
                outputs = self._forward(batch, step, micro, decode=False)
                embedded.append(self._taught(batch, outputs))
                clips.append(batch.clips)
                inputs += [batch] * self._cache_inputs

        outputs = _joined(embedded)
        for value in outputs.values():
            value.requires_grad_(value.is_floating_point())
        terms = total_loss(cast(Outputs, outputs), self._config)
        terms["total"].backward()
        cache = {name: value.grad for name, value in outputs.items() if value.grad is not None}
        outputs, terms = _detached(outputs), _detached(terms)

        recon = []
        again = iter(inputs) if self._cache_inputs else batches
        ends = np.cumsum([len(some) for some in clips]).tolist()
        for micro, end in enumerate(ends):
            rows = slice(end - len(clips[micro]), end)
            recon_weight = micro_batches * len(clips[micro]) / ends[-1]
            batch = next(again)
            if (batch.clips != clips[micro]).any():
                raise ShardError(
                    f"step {step}: a clip was readable in the first pass but not in the second; "
                    "set train.replay=keep"
                )
            micro_outputs = self._forward(batch, step, micro)
            loss = _surrogate_loss(micro_outputs, cache, rows, micro_batches, recon_weight)
            self._backward(loss, micro, micro_batches)
            recon.append(micro_outputs["recon"].detach() * recon_weight)
        if "recon" in terms:  # the first pass skips the decoder
            outputs["recon"] = terms["recon"] = torch.stack(recon).mean()
            terms["total"] = terms["total"] + cache["recon"] * terms["recon"]
        return cast(Outputs, outputs), terms

    def _backward(self, loss: Tensor, micro: int, micro_batches: int) -> None:
        self._engine.backward(loss, micro_batches, last=micro == micro_batches - 1)

    def _forward(self, batch: Batch, step: int, micro: int, *, decode: bool = True) -> Outputs:
        config = self._config
        torch.manual_seed(dropout_seed(config.run.seed, step, self._ranks.rank, micro))
        mask = patch_mask_of(batch, config, self._steps, self._per_epoch)
        inputs = model_inputs(batch, mask, config)
        self._frozen.fill(inputs, batch)
        if not decode:
            inputs["target"] = None
        return self._engine.model(**inputs)

    def _taught(self, batch: Batch, outputs: Outputs) -> Outputs:
        """The outputs with the teacher's, which have no gradient: a second pass needs none."""
        if self._teacher is None:
            return outputs
        return cast(Outputs, outputs | self._teacher(batch))


def patch_mask_of(batch: Batch, config: Config, steps: int, per_epoch: int) -> AnyMask | None:
    """The batch's patch mask; None without masking, and in the unmasked epochs at the end."""
    if not config.mask.masks(batch.epoch, epochs=-(-steps // per_epoch)):
        return None
    media, seed, grid = batch.media, config.run.seed, config.encoder.grid
    if isinstance(media, PackedMels):
        times = [patches // grid[1] for patches in config.audio.patches_of(media.frames)]
        index = media.in_order(batch.sample_index)
        return packed_patch_mask(config.mask, times, grid[1], seed, index)
    return patch_mask(config.mask, grid, seed, batch.sample_index)


def model_inputs(batch: Batch, mask: AnyMask | None, config: Config) -> ModelInputs:
    """The model's arguments: augmented media, and what the decoder is to reconstruct."""
    specaug, seed, media, erase = config.specaug, config.run.seed, batch.media, None
    if isinstance(media, PackedMels):
        index = media.in_order(batch.sample_index)
        media = spec_augment_packed(media, specaug, config.audio, seed, index)
    elif config.encoder.specaug == "inside":
        shape = (media.shape[2], media.shape[3])
        erase = stripes(specaug, seed, batch.sample_index, shape, whole=True)
    elif config.encoder.specaug == "before":
        media = spec_augment(media, specaug, config.audio, seed, batch.sample_index)
    else:
        media = media.contiguous()  # images come channels-last, which convolves to other bits
    clean = config.loss.recon.target == "clean"
    return {
        "media": media,
        "ids": batch.ids.to(media.device, non_blocking=True),
        "attention_mask": batch.attention_mask,
        "mask": mask,
        "target": (batch.media if clean else media) if config.loss.recon.weight > 0 else None,
        "erase": erase,
        "longer": batch.longer,
        "text_pooled": None,
        "media_pooled": None,
        "pair_ids": batch.pair_ids,
    }


def dropout_seed(seed: int, step: int, rank: int, micro: int = 0) -> int:
    """Reseeds dropout for each micro-batch: the same in a resumed run and in a second pass."""
    # The odd multiplier spreads micro-batches over the 32 bits that a CPU's generator takes.
    return ((seed * 1_000_003 + step) * 65_537 + rank + micro * 0x9E3779B1) % 2**63


def _surrogate_loss(
    outputs: Outputs,
    cache: Mapping[str, Tensor],
    rows: slice,
    micro_batches: int,
    recon_weight: float,
) -> Tensor:
    """Surrogate loss: its gradients, averaged over micro-batches, equal the full batch's.

    Args:
        cache: the full batch's gradients with respect to the outputs.
        rows: those of the full batch that are this micro-batch.
        recon_weight: the micro-batch's clips over the mean micro-batch's.
    """
    total = outputs["scale"].new_zeros(())
    for name, gradient in cache.items():
        value = cast(dict[str, Tensor], outputs)[name]
        if gradient.ndim:
            total = total + micro_batches * (gradient[rows] * value).sum()
        else:
            total = total + (recon_weight if name == "recon" else 1) * gradient * value
    return total


def _joined(micro_batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of all micro-batches: rows concatenated, scalars averaged."""
    columns = {name: [results[name] for results in micro_batches] for name in micro_batches[0]}
    return {
        name: torch.cat(values) if values[0].ndim else torch.stack(values).mean()
        for name, values in columns.items()
    }


def _detached(values: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in values.items()}


def _warn_of_fewer_negatives(config: Config, world: int) -> None:
    clips = world * config.train.micro_clips(world)
    Console(stderr=True).print(
        f"train.accumulation=local contrasts a clip with the {clips} of its micro-batch over all "
        f"ranks, not with the {config.train.global_batch} of train.global_batch; "
        "exact contrasts it with all, for one more forward",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
