"""The base of a loss over all pairs of clips and captions: what it is given, and how.

Duplicates, hard negatives, the division over ranks and the precision of the products are the same
settings for each such loss, and arguments of its kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.losses.base import Loss, Outputs
from flap_fast.section import FREE_ON_RESUME, CountOrZero, Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Duplicates = Literal["ignore", "mask", "positive"]
"""What pairs of one clip, or of equal captions, are to each other in a loss over pairs."""

ProductPrecision = Annotated[Literal["auto", "ieee", "tf32", "bf16"], FREE_ON_RESUME]
"""Precision of the embeddings in products, summed in fp32; another GPU may want another."""


class PairLoss(Loss):
    weight: Weight = 0.0
    """Weight in the total."""
    duplicates: Duplicates = "ignore"
    """Pairs of one clip, or of captions that are equal but for case, punctuation and white space:
    negatives of each other as all others are (`ignore`), not compared (`mask`), or `positive`s."""
    negatives: CountOrZero = 0
    """Captions of each clip that are wrong, `negatives` of its shard, drawn at each step: columns
    of all clips, and rows of none (NegCLIP). Where two losses have some, they are the same."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks divide the logits; the numbers are the same."""
    precision: ProductPrecision = "auto"
    """Precision of the embeddings in products, summed in fp32: as they are (`ieee`), or rounded for
    a GPU's tensor cores (`tf32` is exact on a CPU). `auto`: tf32 on an NVIDIA GPU that has it, else
    ieee. `python -m bench.infonce_precision` prints the cost."""

    @property
    def sentences(self) -> tuple[str, ...]:
        return negative_names(self.negatives)

    @property
    def pair_ids(self) -> bool:
        return self.duplicates != "ignore"

    @model_validator(mode="after")
    def _negatives_fit(self):
        name = f"loss.{type(self).__name__.lower()}"
        rule, fits = f"be ignore or mask with {name}.negatives", self.duplicates != "positive"
        require(not self.negatives or fits, f"{name}.duplicates", rule, self.duplicates)
        return self

    def kernel_arguments(self, outputs: Outputs) -> dict[str, Any]:
        """The arguments of a kernel over pairs, by name: embeddings, scale, ids and settings."""
        return {
            "audio": outputs["media"],
            "text": with_negatives(outputs, self.negatives),
            "scale": outputs["scale"],
            **ids_of_pairs(outputs, self.duplicates, self.negatives),
            "scheme": self.scheme,
            "equal_sizes": True,  # the loader's are; asking would wait for the device
            "precision": product_precision(self.precision, outputs["media"].device),
        }


def negative_names(negatives: int) -> tuple[str, ...]:
    """What `sentences` and `Outputs` call so many negatives of each clip."""
    return tuple(f"negative_{number}" for number in range(1, negatives + 1))


def with_negatives(outputs: Outputs, negatives: int) -> Tensor:
    """(B + n B, d): the captions, then each clip's first negative, each one's second, ..."""
    import torch

    found = cast("dict[str, Tensor]", outputs)  # an active loss has what it asks for
    if not negatives:
        return found["text"]
    return torch.cat([found[name] for name in ("text", *negative_names(negatives))])


def ids_of_pairs(outputs: Outputs, duplicates: Duplicates, negatives: int = 0) -> dict[str, Any]:
    """Arguments of a kernel over pairs that say which are duplicates; none to ignore them.

    The ids are of the rows of `with_negatives`. A negative shares its words with a caption, or
    nothing: it is of no clip, also not of the one that it was written for.
    """
    import torch

    if duplicates == "ignore":
        return {}
    ids = cast("dict[str, Tensor]", outputs)["pair_ids"]
    if negatives:
        captions = ids[:, 2 : 2 + negatives].T.reshape(-1)
        no_clip = torch.full_like(captions, -1)
        ids = torch.cat([ids[:, :2], torch.stack([no_clip, captions], dim=1)])
    return {"ids": ids, "duplicates": duplicates}


def product_precision(
    precision: ProductPrecision, device: torch.device
) -> Literal["ieee", "tf32", "bf16"]:
    """The precision of the products on this device: what `auto` is there."""
    import torch

    if precision != "auto":
        return precision
    # Triton's kernels have tf32 on few of AMD's GPUs.
    has_tf32 = device.type == "cuda" and not torch.version.hip
    return "tf32" if has_tf32 and torch.cuda.is_tf32_supported() else "ieee"
