"""The section `loss`: a section for each loss, with its weight."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.config.section import Positive, Section


class Contrastive(Section):
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its weight in the total."""
    direction: Literal["symmetric", "a2t", "t2a"] = "symmetric"
    """Mean of both directions (the toolkit), or one (FLAP's Eq. 1 is a2t)."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks share the work; the numbers are the same."""
    precision: Literal["ieee", "tf32", "bf16"] = "ieee"
    """Of the embeddings in its products, summed in fp32: as they are, or rounded for a GPU's tensor
    cores (`tf32` is exact on a CPU). `python -m bench.infonce_precision` prints what each costs."""


class Cyclic(Section):
    cross_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of `cyclic_cross`: sound j with caption k as sound k with caption j (C-cyclic)."""
    in_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of `cyclic_in`: sounds j and k as alike as their captions (I-cyclic)."""
    form: Literal["auto", "tiled", "gram"] = "auto"
    """How it is computed; the numbers are the same. `auto` takes what does less for the batch."""


class SimCSE(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its weight in the total. The sentences go through the text tower twice."""
    temperature: Positive = 0.05
    """Divides the cosines; fixed."""
    on: Literal["captions", "nli"] = "captions"
    """Of which sentences: the clips' captions, or as many premises of data.nli (CLIPe)."""

    @property
    def views(self) -> tuple[str, str]:
        """The two embeddings of a sentence, by name."""
        return {"captions": ("text", "text_again"), "nli": ("premise", "premise_again")}[self.on]


class NLI(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its weight in the total. Three sentences of data.nli for each clip."""
    temperature: Positive = 0.05
    """Divides the cosines; fixed."""


class Recon(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its weight in the total; 0 builds no decoder. FLAP gives none; AudioMAE's is 1."""
    norm_pix: bool = True
    """Compare with patches brought to mean 0 and variance 1 each (as AudioMAE trains)."""
    target: Literal["clean", "augmented"] = "clean"
    """What is to be rebuilt: the log-mel before SpecAug, or after it."""


class Loss(Section):
    contrastive: Contrastive = Contrastive()
    cyclic: Cyclic = Cyclic()
    simcse: SimCSE = SimCSE()
    nli: NLI = NLI()
    recon: Recon = Recon()

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the text tower reads for each clip, in its rows' order: `text` is the caption.

        `_again` names the same sentence, under a dropout of its own; the others are data.nli's.
        """
        views = self.simcse.views if self.simcse.weight else ()
        triple = ("premise", "entailment", "contradiction") if self.nli.weight else ()
        return tuple(dict.fromkeys(("text", *views, *triple)))

    @model_validator(mode="after")
    def _something(self):
        cyclic = self.cyclic.cross_weight + self.cyclic.in_weight
        of_text = self.simcse.weight + self.nli.weight
        weight = self.contrastive.weight + cyclic + of_text + self.recon.weight
        require(weight > 0, "loss.contrastive.weight", "be above 0 where no other loss is", 0)
        return self
