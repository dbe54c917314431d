"""Settings of a transformers text encoder: RoBERTa, or the model in a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import model_validator

from flap_fast.checks import require
from flap_fast.encoders.settings import TextEncoder
from flap_fast.section import MEANS_WEIGHTS, NAMES_FILES

if TYPE_CHECKING:
    from torch import nn


class RobertaSettings(TextEncoder):
    encoder: Annotated[Literal["roberta"], MEANS_WEIGHTS] = "roberta"
    """RoBERTa, or what `folder` holds."""
    folder: Annotated[str | None, NAMES_FILES] = None
    """A transformers encoder and its tokenizer: a folder, or `package:NAME/sub/folder` inside an
    installed Python package. Without one: a RoBERTa of random weights, of the sizes here."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """`packed` lays a batch's captions end to end, without padding (BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT); the numbers are the same within rounding. `auto` packs where that is faster: on a
    CPU, and on a GPU whose variable-length attention serves (bf16, or xformers)."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """For packed captions on a GPU: PyTorch's variable-length attention, or xformers'."""
    pool: Annotated[Literal["pooler", "mean", "cls"], MEANS_WEIGHTS] = "pooler"
    """RoBERTa's pooler (tanh of a linear layer on <s>), the mean over tokens, or plain <s>."""

    @property
    def tokenizer_files(self) -> tuple[str, str]:
        if self.folder is not None:
            return "text.folder", self.folder
        return super().tokenizer_files

    def with_files(self, folder: str) -> RobertaSettings:
        return self.model_copy(update={"folder": folder, "tokenizer": "bytes"})

    def meaning(self) -> dict[str, Any]:
        sizes = {"heads": self.heads} if self.folder is None else {}
        return super().meaning() | sizes

    def build(self, *, recompute: bool = False, weights: bool = True) -> nn.Module:
        from flap_fast.encoders.roberta.model import TransformersText

        return TransformersText(self, recompute=recompute, weights=weights)

    @model_validator(mode="after")
    def _fits(self):
        require(
            self.folder is not None or self.width % self.heads == 0,
            "text.width",
            f"be a multiple of text.heads = {self.heads}",
            self.width,
        )
        rule = "be 'sdpa' with text.packing = padded"
        supported = self.attention == "sdpa" or self.packing != "padded"
        require(supported, "text.attention", rule, self.attention, "set text.packing=auto")
        return self
