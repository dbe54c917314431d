"""Encoded clips -> the encoder's input.

preprocessor.py    the interface, and the choice by the config's modality
audio.py           bytes -> waveform.py -> front_end.py (kaldi_mel, clap_mel, fusion) -> log-mel
image.py           bytes -> the middle square -> pixels
decoders.py        decoding ahead on threads, or in NVIDIA DALI (dali.py)
"""
