"""NVIDIA DALI's decoder, and its graphs for sounds and for images. The only file that imports DALI.

    bytes -> decode, downmix, resample -> crop -> fill -> waves (samples,)       `dali_wave`
                                               ... -> log-mels (frames, F)       `dali_mel`
    bytes -> decode -> shorter side R, bicubic -> the middle -> (B, R, R, 3)     images

CPU operators, the same graph with a GPU. Clips come in through an external source, not a reader of
DALI's, so that the order of clips is the sampler's for any number of ranks and any restart.

With fusion, or audio.length = variable, clips are whole, of lengths of their own.
`dali_mel` is exact for CLAP's mel and approximates Kaldi's and YAMNet's: its triangles are linear
in Hz, and it does not remove a frame's mean.

Images are decoded to the same bits as by the reference implementation, `image.read_image`. Resized
pixels differ by a rounding, since Pillow rounds (and clips) between the two axes and DALI does not;
by more along the edges, beyond which DALI repeats them and Pillow sees nothing.
"""

# DALI's stubs know neither its types nor that an operator gives one node unless asked for more.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from flap_fast.config import Audio, Fusion
from flap_fast.data.batch import DecodedBatch, EncodedBatch
from flap_fast.data.preprocess import clap_mel, yamnet_mel
from flap_fast.data.preprocess.kaldi_mel import FLOOR, PREEMPHASIS, fft_size, hann
from flap_fast.data.preprocess.waveform import Unusable

Graph = Callable[[Any, Any, bool], tuple[Any, ...]]
"""Encoded clips, their positions, whether to give the result on a GPU -> media, their lengths, and,
where it can be infinite, a mean to check."""


class DaliDecoder:
    """Decodes batches in order, several ahead of the one taken by `next`.

    Args:
        batches: read from ahead of time.
        graph: `audio_graph(...)` or `image_graph(...)`.
        error: raised for a batch with a clip that cannot be decoded.
        batch: the most clips of a batch.
        device: a CUDA device moves what follows the decoding there.
    """

    def __init__(
        self,
        batches: Iterator[EncodedBatch],
        graph: Graph,
        *,
        error: type[Unusable],
        batch: int,
        threads: int,
        prefetch: int,
        device: torch.device,
    ):
        self._error = error
        self._source_error: Exception | None = None

        def source() -> tuple[list[np.ndarray], list[np.ndarray]]:
            try:
                clips, positions, *_ = next(batches)
            except Exception as raised:  # StopIteration too; DALI hands it on as it is
                self._source_error = raised
                raise
            return (
                [np.frombuffer(clip, np.uint8) for clip in clips],
                [np.asarray(row, np.float64).reshape(-1) for row in positions],
            )

        on_gpu = device.type == "cuda"
        self._pipe = _pipeline(
            source,
            graph,
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

    def __next__(self) -> DecodedBatch:
        """The next batch.

        Raises:
            Unusable: a clip of this batch cannot be decoded; the batches after it are not hurt.
            StopIteration: `batches` has ended.
        """
        try:
            positions, media, lengths, *means = self._pipe.run()
        except (RuntimeError, ValueError) as raised:
            if raised is self._source_error:
                raise
            raise self._error(f"DALI: {_reason(raised)}") from raised
        if not all(np.isfinite(np.asarray(mean.as_tensor())).all() for mean in means):
            raise self._error("DALI: no samples, or samples that are not finite")
        # A copy, also of one clip: on a GPU DALI's stream might use the memory again too early.
        batch = torch.cat([torch.from_dlpack(clip) for clip in media])
        lengths = torch.from_dlpack(lengths.as_tensor()).flatten()
        return DecodedBatch(batch, lengths, torch.from_dlpack(positions.as_tensor()))


def _reason(error: Exception) -> str:
    """DALI's message between the operator's traceback and the line in its sources."""
    text = str(error)
    return (text.partition("encountered:")[2].partition("C++ context")[0] or text).strip()


@pipeline_def
def _pipeline(source, graph: Graph, on_gpu: bool):
    encoded, positions = fn.external_source(
        source=source, num_outputs=2, dtype=[types.UINT8, types.FLOAT64], ndim=1
    )
    return positions, *graph(encoded, positions, on_gpu)


def image_graph(resolution: int) -> Graph:
    """Encoded images -> (B, R, R, 3) uint8."""

    def graph(encoded, _, on_gpu: bool):
        image = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
        sides = fn.cast(image.shape(), dtype=types.INT64)[0:2]
        sides = resolution * sides // fn.reductions.min(sides)
        image = fn.resize(
            image,
            size=fn.cast(sides, dtype=types.FLOAT),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.UINT8,
        )
        spare = sides - resolution
        # Halves to even: 1 -> 0, 3 -> 2. DALI has no remainder.
        start = spare // 2 + fn.cast(spare - 4 * (spare // 4) == 3, dtype=types.INT64)
        start, size = fn.cast(start, dtype=types.INT32), [resolution, resolution]
        middle = fn.slice(image, start, size, axes=[0, 1], **_ABSOLUTE)
        return middle.gpu() if on_gpu else middle, _length(middle)[0:1]

    return graph


def audio_graph(audio: Audio, fusion: Fusion | None = None, *, mel: bool) -> Graph:
    """Encoded sounds -> waveforms, or with `mel` log-mels."""
    fused = fusion or Fusion()

    def graph(encoded, positions, on_gpu: bool):
        wave, _ = fn.decoders.audio(encoded, downmix=True, sample_rate=float(audio.sample_rate_hz))
        mean = fn.reductions.mean(wave, axes=[0])
        wave = _crop(wave, positions[0:1], fused.longest(audio))
        wave = _fill(wave, audio.least_samples, audio.filling)
        out = wave.gpu() if on_gpu else wave
        if mel:
            out = _log_mel(out, audio)
        return out, _length(out)[0:1], mean

    return graph


def _crop(wave, position, samples: int):
    length = _length(wave)
    spare = dali_math.max(length - samples, 0)
    start = dali_math.floor(position * (spare + 1))
    start = dali_math.min(fn.cast(start, dtype=types.INT64), spare)
    return fn.slice(wave, start, dali_math.min(length, samples), axes=[0], **_ABSOLUTE)


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
        wave, first, whole, axes=[0], out_of_bounds_policy="pad", fill_values=0.0, **_ABSOLUTE
    )


def _length(wave):
    return fn.cast(wave.shape(), dtype=types.INT64)


def _log_mel(wave, audio: Audio):
    if audio.int16_roundtrip:
        wave = dali_math.clamp(wave, -1, 1) * 32767
        whole = dali_math.floor(dali_math.max(wave, 0)) - dali_math.floor(dali_math.max(-wave, 0))
        wave = whole / 32767
    log = {"clap": _clap, "kaldi": _kaldi, "yamnet": _yamnet}[audio.mel](wave, audio)
    return fn.transpose(log, perm=[1, 0])


def _clap(wave, audio: Audio):
    power = fn.spectrogram(
        wave,
        nfft=audio.window,
        window_length=audio.window,
        window_step=audio.hop,
        window_fn=clap_mel.hann(audio.window).astype(np.float32).tolist(),
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
    cutoff = 10 * math.log10(clap_mel.FLOOR)
    return fn.to_decibels(mel, multiplier=10.0, reference=1.0, cutoff_db=cutoff)


def _kaldi(wave, audio: Audio):
    wave = wave - fn.reductions.mean(wave, axes=[0])
    # A global filter equals Kaldi's in each frame: the window is zero where they differ.
    wave = fn.preemphasis_filter(wave, preemph_coeff=PREEMPHASIS)
    mel = _htk_mel(wave, audio, hann(audio.window), 2)
    return fn.to_decibels(mel, multiplier=math.log(10), reference=1.0, cutoff_db=math.log(FLOOR))


def _yamnet(wave, audio: Audio):
    wave = fn.cat(wave, types.Constant(np.zeros(audio.window - 1, np.float32)), axis=0)
    mel = _htk_mel(wave, audio, clap_mel.hann(audio.window), 1)
    return dali_math.log(mel + yamnet_mel.OFFSET)


def _htk_mel(wave, audio: Audio, window: np.ndarray, power: int):
    """Of whole frames: magnitudes (`power` 1) or their squares (2), through triangles in mel."""
    low_hz, high_hz = audio.range_hz
    spectrum = fn.spectrogram(
        wave,
        nfft=fft_size(audio.window),
        window_length=audio.window,
        window_step=audio.hop,
        window_fn=window.astype(np.float32).tolist(),
        center_windows=False,
        power=power,
        layout="ft",
    )
    return fn.mel_filter_bank(
        spectrum,
        sample_rate=float(audio.sample_rate_hz),
        nfilter=audio.mel_bins,
        freq_low=low_hz,
        freq_high=high_hz,
        mel_formula="htk",
        normalize=False,
    )


_ABSOLUTE = {"normalized_anchor": False, "normalized_shape": False}
