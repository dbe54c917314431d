"""The front ends by their names in `audio.mel`."""

from __future__ import annotations

import torch

from flap_fast.config import Audio
from flap_fast.data.mel import LogMel, kaldi_log_mel
from flap_fast.data.mel_clap import ClapLogMel, clap_log_mel

FRONT_ENDS = {"kaldi": kaldi_log_mel, "clap": clap_log_mel}


def log_mel(audio: Audio, device: torch.device | str = "cpu") -> LogMel | ClapLogMel:
    """The front end that the settings ask for: (B, samples) -> (B, T, F), not normalised."""
    return FRONT_ENDS[audio.mel](audio, device)
