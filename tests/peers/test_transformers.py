"""transformers' ClapProcessor and ClapModel on an exported folder, from sounds to embeddings."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ClapModel, ClapProcessor

from flap_fast.interchange.convert import export_checkpoint


def test_sounds_and_captions_have_the_same_embeddings(clips, exact, rounded, largest, tmp_path):
    export_checkpoint(exact.folder, tmp_path / "hf")
    processor: Any = ClapProcessor.from_pretrained(tmp_path / "hf")
    model: Any = ClapModel.from_pretrained(tmp_path / "hf")
    inputs = processor(
        text=clips.captions,
        audio=clips.waves,
        sampling_rate=48_000,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        theirs = model.eval()(**inputs)
    ours = exact.opened
    audio, text = ours.embed_audio(clips.files), ours.embed_text(clips.captions)
    assert (audio - audio.mean(0)).abs().max() > 0.01  # so that a small difference says something

    def compared(what: str, found: torch.Tensor, most: float, why: str = "float32") -> None:
        largest("transformers", what, found.abs().max().item(), most, why)

    compared("embeddings of sounds", theirs.audio_embeds - audio, 1e-5)
    compared("embeddings of captions", theirs.text_embeds - text, 1e-6)
    logits = ours.model.logit_scale.exp() * audio @ text.T
    compared("logits", (theirs.logits_per_audio - logits) / logits.abs().max(), 1e-5)
    off = theirs.audio_embeds - rounded.opened.embed_audio(clips.files)
    why = "transformers does not round samples to 16 bits, as LAION-CLAP and we do"
    compared("embeddings of sounds, rounded here", off, 5e-2, why)
