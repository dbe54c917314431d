"""MultipleNegativesRankingLoss with sentence-transformers' signature, without a matrix of scores.

In place of that of `sentence_transformers.sentence_transformer.losses`. It needs no
sentence-transformers itself: of a model it takes `model(features)["sentence_embedding"]`.

    b anchors, as many positives and sets of hard negatives   W ranks   D width

With `gather_across_devices` it returns the mean loss over the anchors of all ranks, the same on
every rank; sentence-transformers' is the mean over this rank's anchors, whose mean over ranks it
is. The gradients, which DDP averages, are equal.

Source: https://github.com/huggingface/sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flap_kernels.checks import check_choice, check_shape
from flap_kernels.infonce.backend import Direction, Precision
from flap_kernels.infonce.distributed import distributed_infonce
from flap_kernels.infonce.op import infonce

FORWARD, BACKWARD = "query_to_doc", "doc_to_query"


class MultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of anchors over positives and hard negatives, by cosine.

    Takes the arguments of sentence-transformers' loss of this name, and of their values:
    `similarity_fct` cos_sim, also as None; `directions` ("query_to_doc",), or with "doc_to_query"
    and `partition_mode` "per_direction", the symmetric loss; no `hardness_mode`. Ranks may hold
    batches of different sizes. `precision` and `workspace_mib` are those of `infonce`.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = (FORWARD,),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        precision: Precision = "ieee",
        workspace_mib: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("partition_mode", partition_mode, ("joint", "per_direction"))
        similarity = "cos_sim" if similarity_fct is None else _name(similarity_fct)
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        if similarity not in ("cos_sim", "pytorch_cos_sim"):
            raise ValueError(f"similarity_fct must be cos_sim, got {similarity}")
        if hardness_mode is not None:
            raise ValueError(f"hardness_mode must be None, got {hardness_mode!r}")
        both = set(directions) == {FORWARD, BACKWARD} and partition_mode == "per_direction"
        if not both and set(directions) != {FORWARD}:
            raise ValueError(
                f"directions must be ({FORWARD!r},), or with partition_mode='per_direction' "
                f"({FORWARD!r}, {BACKWARD!r}), got {tuple(directions)} and {partition_mode!r}"
            )
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.precision: Precision = precision
        self.workspace_mib = workspace_mib

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:
        """The loss, (), of the columns anchor, positive, negative_1, ...; labels are not used."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """The loss, (), of each column's embeddings (b, D)."""
        if len(embeddings) < 2:
            raise ValueError(
                f"embeddings must be of anchors and positives at least, got {len(embeddings)} "
                "column(s)"
            )
        for i, x in enumerate(embeddings):
            check_shape(f"embeddings[{i}]", x, embeddings[0].shape, "(b, D) like the anchors'")
        # In float16 normalize's own eps is 0, and an embedding of zeros would be NaN.
        eps = max(1e-12, *(torch.finfo(x.dtype).smallest_normal for x in embeddings))
        anchors, *documents = (F.normalize(x, dim=1, eps=eps) for x in embeddings)
        direction: Direction = "symmetric" if BACKWARD in self.directions else "a2t"
        # Hard negatives are captions without a clip of their own: negatives of every anchor.
        candidates = torch.cat(documents)
        loss = distributed_infonce if self.gather_across_devices else infonce
        return loss(
            anchors,
            candidates,
            self.scale,
            direction=direction,
            precision=self.precision,
            workspace_mib=self.workspace_mib,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for a model card."""
        return {
            "scale": self.scale,
            "similarity_fct": "cos_sim",
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1.0 / self.scale


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
