"""Affinity distillation: InfoNCE whose targets are the probabilities of a frozen teacher.

    q = softmax(teacher_scale * TA TT^T)      of the teacher's embeddings of the same batch
    L = mean(-sum_j q_ij log softmax_j(S)_ij), S = scale * A T^T; by row, by column, or the mean

It reaches the entropy of q where both have the same probabilities. No B x B matrix is stored.

Source: TinyCLIP, arXiv 2309.12314, section 3.1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.losses.base import Loss, Outputs
from flap_fast.losses.pairs import ProductPrecision, product_precision
from flap_fast.section import NAMES_FILES, NAMES_MODEL, Positive, Weight

if TYPE_CHECKING:
    from torch import Tensor


class Distill(Loss):
    weight: Weight = 0.0
    """Weight in the total. The teacher embeds each batch once, unmasked."""
    teacher: Annotated[Path | None, NAMES_FILES, NAMES_MODEL] = None
    """A model folder, a run or `hf://OWNER/NAME` with this config's front end and tokenizer, whose
    last weights are the frozen teacher, whole in the memory of each rank."""
    scale: Positive | None = None
    """What the teacher's cosines are multiplied by; null: its own scale."""
    direction: Literal["symmetric", "a2t", "t2a"] = "symmetric"
    """Probabilities of captions for each clip (a2t), of clips for each caption, or both."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks divide the logits; the numbers are the same."""
    precision: ProductPrecision = "auto"
    """Precision of the embeddings in products, as in loss.contrastive."""

    @model_validator(mode="after")
    def _has_a_teacher(self):
        rule, remedy = "be 0 without loss.distill.teacher", "name a model folder or a run"
        require(
            not self.weight or bool(self.teacher), "loss.distill.weight", rule, self.weight, remedy
        )
        return self

    @property
    def weights(self) -> dict[str, float]:
        return {"distill": self.weight}

    def terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """`distill`: the mean over the global batch, the same on every rank, ()."""
        from flap_kernels.soft_infonce import soft_infonce

        names = "media", "text", "scale", "teacher_media", "teacher_text", "teacher_scale"
        found = cast("dict[str, Tensor]", outputs)  # the trainer adds the teacher's
        loss = soft_infonce(
            *(found[name] for name in names),
            direction=self.direction,
            scheme=self.scheme,
            equal_sizes=True,  # the loader's are; asking would wait for the device
            precision=product_precision(self.precision, found["media"].device),
        )
        return {"distill": loss}
