"""A model as an encoder of mteb, for its audio tasks (MAEB): `pip install 'flap_fast[mteb]'`.

    import mteb
    from flap_fast.tools.mteb_encoder import MtebEncoder

    tasks = mteb.get_tasks(tasks=["ESC50", "ESC50_Zeroshot"])
    mteb.evaluate(MtebEncoder("runs/mine"), tasks)

mteb downloads its data sets and scores them by its own rules: of classification, a logistic
regression on the embeddings, which search uses, too. Rates are converted as elsewhere here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports] - an extra
from mteb.models.abs_encoder import AbsEncoder  # pyright: ignore[reportMissingImports]
from mteb.models.model_meta import ScoringFunction  # pyright: ignore[reportMissingImports]
from torch import Tensor

from flap_fast.checks import require
from flap_fast.tools.embedder import Embedder, load

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import (  # pyright: ignore[reportMissingImports]
        TaskMetadata,
    )
    from mteb.types import BatchedInput, PromptType  # pyright: ignore[reportMissingImports]


class MtebEncoder(AbsEncoder):
    """Embeds the sounds and texts of mteb's tasks: (N, d) unit rows, float32, on the CPU.

    A document that has both is the sum of its two embeddings, as mteb's CLAP has it.

    Args:
        model: what `flap_fast.load` gives or takes.
        name: ORGANISATION/NAME of mteb's files of results.
        crop: how long sounds are cropped, see `Embedder.embed_each`.

    Raises:
        ConfigError: no model, or one of images.
    """

    def __init__(
        self,
        model: Embedder | str | Path,
        *,
        name: str = "flap_fast/model",
        crop: str | None = None,
    ):
        self.model = model if isinstance(model, Embedder) else load(model)
        modality = self.model.config.encoder.modality
        require(modality == "audio", "the model", "have an audio encoder", modality)
        self._crop = crop
        facts = {
            "name": name,
            "modalities": ["audio", "text"],
            "framework": ["PyTorch"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "embed_dim": self.model.config.joint.width,
            "n_parameters": sum(p.numel() for p in self.model.model.parameters()),
        }
        self.mteb_model_meta = ModelMeta.create_empty(facts)

    def encode(
        self,
        inputs: Iterable[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Embed the batches of a loader, whose columns are `audio`, `text` or both."""
        return torch.cat([self._rows(batch, task_metadata.name) for batch in inputs])

    def _rows(self, batch: BatchedInput, task: str) -> Tensor:
        found: list[Tensor] = []
        if "audio" in batch:
            found.append(self.model.embed_audio(batch["audio"], crop=self._crop))
        if "text" in batch:
            found.append(self.model.embed_text(batch["text"]))
        require(bool(found), f"the task {task}", "have sounds or texts", ", ".join(batch))
        return torch.stack(found).sum(0)
