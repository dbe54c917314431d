"""Encoded clips -> waveforms or log-mels in NVIDIA DALI: CPU operators, the same graph with a GPU.

    bytes, where -> decode, downmix, resample -> crop -> fill -> wave (B, samples)      `dali_wave`
                                                           ... -> log-mel (B, T, F)    `dali_mel`

With fusion clips are whole, of lengths of their own, with zeros behind the shorter ones of a batch.

`dali_mel` is exact for CLAP's mel and approximates Kaldi's: DALI has no removal of a frame's mean
and its triangles are linear in Hz (SPEC 3.3). The order of clips is ours, not a DALI reader's:
bytes come in through an external source, so that any number of ranks and any restart see the same.

The only file that imports nvidia.dali.
"""

# DALI's stubs know neither its types nor that an operator gives one node unless asked for more.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from flap_fast.config import Audio, Fusion
from flap_fast.data.preprocess import mel_clap
from flap_fast.data.preprocess.front_end import Decoded
from flap_fast.data.preprocess.mel import FLOOR, LOW_HZ, PREEMPHASIS, hann
from flap_fast.data.preprocess.waveform import BadSound

Encoded = tuple[list[bytes], np.ndarray]


class DaliDecoder:
    """Decodes batches in order, several ahead of the one taken by `next`.

    Args:
        batches: gives (encoded clips, draws of each in [0, 1), the first of them where to crop it);
            drawn from ahead of time.
        batch: the most clips of a batch.
        mel: give log-mels, not waveforms.
        device: a CUDA device moves what follows the decoding there.
    """

    def __init__(
        self,
        batches: Iterator[Encoded],
        audio: Audio,
        *,
        batch: int,
        threads: int,
        prefetch: int,
        device: torch.device,
        mel: bool,
        fusion: Fusion | None = None,
    ):
        self._no_more: Exception | None = None

        def source() -> tuple[list[np.ndarray], list[np.ndarray]]:
            try:
                sounds, where = next(batches)
            except Exception as error:  # StopIteration too; DALI hands it on as it is
                self._no_more = error
                raise
            return (
                [np.frombuffer(sound, np.uint8) for sound in sounds],
                [np.asarray(draws, np.float64).reshape(-1) for draws in where],
            )

        on_gpu = device.type == "cuda"
        self._pipe = _graph(
            source,
            audio,
            fusion or Fusion(),
            mel,
            on_gpu,
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=prefetch,
            # The one executor that goes on after a clip that cannot be decoded.
            exec_dynamic=True,
        )

    def __iter__(self) -> DaliDecoder:
        return self

    def __next__(self) -> Decoded:
        """The next batch: waveforms, or log-mels.

        Raises:
            BadSound: a clip of this batch cannot be decoded; the batches after it are not hurt.
            StopIteration: `batches` has ended.
        """
        try:
            out, mean, lengths, where = self._pipe.run()
        except (RuntimeError, ValueError) as error:
            if error is self._no_more:
                raise
            raise BadSound(f"DALI: {reason(error)}") from error
        if not np.isfinite(np.asarray(mean.as_tensor())).all():
            raise BadSound("DALI: no samples, or samples that are not finite")
        batch = torch.from_dlpack(out.as_tensor())
        # On the CPU it owns its memory; on a GPU DALI's stream might use that again too early.
        batch = batch.clone() if batch.is_cuda else batch
        lengths = torch.from_dlpack(lengths.as_tensor()).flatten()
        return Decoded(batch, lengths, torch.from_dlpack(where.as_tensor()))


def reason(error: Exception) -> str:
    """What DALI's message says between the operator's traceback and the place in its sources."""
    text = str(error)
    return (text.partition("encountered:")[2].partition("C++ context")[0] or text).strip()


@pipeline_def
def _graph(source, audio: Audio, fusion: Fusion, mel: bool, on_gpu: bool):
    sound, where = fn.external_source(
        source=source, num_outputs=2, dtype=[types.UINT8, types.FLOAT64], ndim=1
    )
    wave, _ = fn.decoders.audio(sound, downmix=True, sample_rate=float(audio.sample_rate_hz))
    mean = fn.reductions.mean(wave, axes=[0])
    wave = _crop(wave, where[0:1], fusion.longest(audio))
    wave = _fill(wave, audio.samples, audio.filling)
    out = wave.gpu() if on_gpu else wave
    if mel:
        out = _log_mel(out, audio)
    length = _length(out)[0:1]
    if fusion.on:
        out = fn.pad(out, axes=[0], fill_value=0.0)
    elif mel:
        out = fn.pad(out, axes=[0], shape=[audio.frames], fill_value=0.0)
    return out, mean, length, where


def _crop(wave, where, samples: int):
    length = _length(wave)
    spare = dali_math.max(length - samples, 0)
    start = dali_math.floor(where * (spare + 1))
    start = dali_math.min(fn.cast(start, dtype=types.INT64), spare)
    return fn.slice(wave, start, dali_math.min(length, samples), axes=[0], **_WHOLE)


def _fill(wave, samples: int, filling: str):
    """The repeats as a broadcast product, so that each clip may have its own number of them."""
    whole = dali_math.max(_length(wave), samples)
    if filling != "pad":
        repeats = whole // _length(wave) + (1 if filling == "repeat" else 0)
        shape = fn.cat(fn.cast(repeats, dtype=types.INT32), types.Constant([1]), axis=0)
        ones = fn.full(np.float32(1), shape=shape)
        wave = fn.reshape(ones * fn.expand_dims(wave, axes=[0]), shape=[-1])
    first = types.Constant([0], dtype=types.INT64)
    return fn.slice(
        wave, first, whole, axes=[0], out_of_bounds_policy="pad", fill_values=0.0, **_WHOLE
    )


def _length(wave):
    return fn.cast(wave.shape(), dtype=types.INT64)


def _log_mel(wave, audio: Audio):
    if audio.int16_roundtrip:
        wave = dali_math.clamp(wave, -1, 1) * 32767
        whole = dali_math.floor(dali_math.max(wave, 0)) - dali_math.floor(dali_math.max(-wave, 0))
        wave = whole / 32767
    log = (_clap if audio.mel == "clap" else _kaldi)(wave, audio)
    return fn.transpose(log, perm=[1, 0])


def _clap(wave, audio: Audio):
    power = fn.spectrogram(
        wave,
        nfft=audio.window,
        window_length=audio.window,
        window_step=audio.hop,
        window_fn=mel_clap.hann(audio.window).astype(np.float32).tolist(),
        layout="ft",
    )
    slaney = audio.mel_variant == "slaney_norm"
    mel = fn.mel_filter_bank(
        power,
        sample_rate=float(audio.sample_rate_hz),
        nfilter=audio.mel_bins,
        freq_low=audio.low_hz,
        freq_high=audio.high_hz,
        mel_formula="slaney" if slaney else "htk",
        normalize=slaney,
    )
    cutoff = 10 * math.log10(mel_clap.FLOOR)
    return fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=cutoff)


def _kaldi(wave, audio: Audio):
    wave = wave - fn.reductions.mean(wave, axes=[0])
    # A global filter equals Kaldi's in each frame: the window is zero where they differ.
    wave = fn.preemphasis_filter(wave, preemph_coeff=PREEMPHASIS)
    power = fn.spectrogram(
        wave,
        nfft=1 << (audio.window - 1).bit_length(),
        window_length=audio.window,
        window_step=audio.hop,
        window_fn=hann(audio.window).astype(np.float32).tolist(),
        center_windows=False,
        layout="ft",
    )
    mel = fn.mel_filter_bank(
        power,
        sample_rate=float(audio.sample_rate_hz),
        nfilter=audio.mel_bins,
        freq_low=LOW_HZ,
        freq_high=audio.sample_rate_hz / 2,
        mel_formula="htk",
        normalize=False,
    )
    return fn.to_decibels(mel, multiplier=math.log(10), reference=1.0, cutoff_db=math.log(FLOOR))


_WHOLE = {"normalized_anchor": False, "normalized_shape": False}
