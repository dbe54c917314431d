"""Encoded pictures -> the squares that the model sees, in NVIDIA DALI.

    bytes -> decode -> shorter side R, bicubic -> the middle -> (B, R, R, 3) uint8

CPU operators, the same graph with a GPU. Files are decoded to the same bits as by the twin. Resized
pixels differ by a rounding, since Pillow rounds (and clips) between the two axes and DALI does not;
by more along the edges, beyond which DALI repeats them and Pillow sees nothing. As in `dali`, the
order of pictures is ours: bytes come in through an external source.
"""

# DALI's stubs know neither its types nor that an operator gives one node unless asked for more.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from flap_fast.data.preprocess.dali import reason
from flap_fast.data.preprocess.image import BadImage
from flap_fast.encoders.settings import ImageEncoder


class DaliImageDecoder:
    """Decodes batches in order, several ahead of the one taken by `next`.

    Args:
        batches: gives encoded pictures; drawn from ahead of time.
        batch: the most pictures of a batch.
        device: a CUDA device gets the squares.
    """

    def __init__(
        self,
        batches: Iterator[list[bytes]],
        image: ImageEncoder,
        *,
        batch: int,
        threads: int,
        prefetch: int,
        device: torch.device,
    ):
        self._no_more: Exception | None = None

        def source() -> list[np.ndarray]:
            try:
                return [np.frombuffer(picture, np.uint8) for picture in next(batches)]
            except Exception as error:  # StopIteration too; DALI hands it on as it is
                self._no_more = error
                raise

        on_gpu = device.type == "cuda"
        self._pipe = _graph(
            source,
            image.resolution,
            on_gpu,
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=prefetch,
            # The one executor that goes on after a picture that cannot be decoded.
            exec_dynamic=True,
        )

    def __iter__(self) -> DaliImageDecoder:
        return self

    def __next__(self) -> Tensor:
        """(B, R, R, 3) uint8.

        Raises:
            BadImage: a picture of this batch cannot be decoded; the batches after it are not hurt.
            StopIteration: `batches` has ended.
        """
        try:
            (out,) = self._pipe.run()
        except (RuntimeError, ValueError) as error:
            if error is self._no_more:
                raise
            raise BadImage(f"DALI: {reason(error)}") from error
        batch = torch.from_dlpack(out.as_tensor())
        # On the CPU it owns its memory; on a GPU DALI's stream might use that again too early.
        return batch.clone() if batch.is_cuda else batch


@pipeline_def
def _graph(source, resolution: int, on_gpu: bool):
    encoded = fn.external_source(source=source, dtype=types.UINT8, ndim=1)
    picture = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
    sides = fn.cast(picture.shape(), dtype=types.INT64)[0:2]
    sides = resolution * sides // fn.reductions.min(sides)
    picture = fn.resize(
        picture,
        size=fn.cast(sides, dtype=types.FLOAT),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        dtype=types.UINT8,
    )
    spare = sides - resolution
    # Halves to even: 1 -> 0, 3 -> 2. DALI has no remainder.
    start = spare // 2 + fn.cast(spare - 4 * (spare // 4) == 3, dtype=types.INT64)
    middle = fn.slice(
        picture,
        fn.cast(start, dtype=types.INT32),
        [resolution, resolution],
        axes=[0, 1],
        normalized_anchor=False,
        normalized_shape=False,
    )
    return middle.gpu() if on_gpu else middle
