"""The frozen text encoder's output for each caption, computed once and kept in a file.

    token ids -> digest -> row of node-N.float32 -> vectors (R, D), for the trained text head
                 new: text encoder on the first rank that has it -> rows of all nodes

    FOLDER/node-N.keys      for each row a digest of 16 bytes and a checksum of 4
           node-N.float32   rows of D numbers

R sentences   D width of the text encoder   N number of the node

The files grow with the captions, memory by about 200 bytes a caption for the index of digests. The
ranks of a node share its files without locks: all write the same bytes to the same place.
A resumed run reads what the first one computed, so it gets the same bits.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.config import Config
from flap_fast.data.batch import to_device
from flap_fast.files import is_full
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks, all_gather_single

_KEY, _CHECKSUM = 16, 4


@contextmanager
def frozen_text(
    config: Config,
    model: TwoTowers,
    ranks: Ranks,
    folder: Path | None = None,
    *,
    keep: bool = False,
) -> Iterator[FrozenText | None]:
    """A context with the outputs of a model's text encoder; None if the encoder is trained.

    Args:
        folder: of the files; None makes a temporary one.
        keep: see `FrozenText`.
    """
    if not config.text.freeze:
        yield None
        return
    with ExitStack() as stack:
        folder = folder or Path(stack.enter_context(TemporaryDirectory()))
        found = FrozenText(model, ranks, folder, keep=keep)
        stack.callback(found.close)
        yield found


class FrozenText:
    """Outputs of a model's frozen text encoder. Collective: call on every rank.

    Args:
        folder: of the files; made if it is missing.
        keep: read the rows that are there, those of this run; else start without any.
    """

    def __init__(self, model: TwoTowers, ranks: Ranks, folder: Path, *, keep: bool):
        self._model, self._ranks = model, ranks
        self._width: int = model.text.width  # type: ignore[assignment]
        # Over gloo on the CPU: the host never waits for the GPU to learn that nothing is new.
        self._group: Any = dist.new_group(backend="gloo") if ranks.world > 1 else None
        folder.mkdir(parents=True, exist_ok=True)
        node = f"node-{ranks.rank // ranks.local_world}"
        self._paths = folder / f"{node}.keys", folder / f"{node}.float32"
        for path in self._paths:
            with path.open("ab" if keep else "wb"):
                pass
        self._keys, self._vectors = (path.open("r+b") for path in self._paths)
        self._row_of = {key: n for n, key in enumerate(self._read())}
        self._keys.truncate(len(self._row_of) * (_KEY + _CHECKSUM))
        self._vectors.truncate(len(self._row_of) * 4 * self._width)
        ranks.barrier()  # all ranks of a node have the same rows before the first is added

    @property
    def captions(self) -> int:
        """Number of captions that are kept."""
        return len(self._row_of)

    def __call__(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(R, L) ids and mask, best on the CPU -> (R, D) float32 on the ranks' device.

        Raises:
            OSError: no space for the rows.
        """
        ids, attention_mask = ids.cpu(), attention_mask.cpu()
        keys = [_digest(row[kept]) for row, kept in zip(ids, attention_mask.bool(), strict=True)]
        new = {key: row for row, key in enumerate(keys) if key not in self._row_of}
        if most := self._most(len(new)):
            self._add(new, most, ids, attention_mask)
        file, size = self._vectors.fileno(), 4 * self._width
        rows = b"".join(os.pread(file, size, size * self._row_of[key]) for key in keys)
        vectors = torch.frombuffer(bytearray(rows), dtype=torch.float32)
        return to_device(vectors.unflatten(0, (-1, self._width)), self._ranks.device)

    def close(self) -> None:
        """Close the files."""
        self._keys.close()
        self._vectors.close()

    def delete(self) -> None:
        """Delete this node's files, once nothing more is asked."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # other nodes' files are still there
            self._paths[0].parent.rmdir()

    def _add(self, new: dict[bytes, int], most: int, ids: Tensor, attention_mask: Tensor) -> None:
        """Embed the new captions of all ranks, each on the first rank that has it."""
        of_ranks = self._shared(list(new), most)
        rows = [new[key] for key in of_ranks[self._ranks.rank]]
        # ZeRO 3 gathers weights in step: a rank without a caption of its own repeats one.
        some = rows or [0]
        on_device = to_device(ids[some], self._ranks.device)
        vectors = self._model.pool_text(on_device, attention_mask[some])
        longest = max(map(len, of_ranks))
        padded = vectors.new_zeros(longest, self._width)
        padded[: len(rows)] = vectors[: len(rows)]
        found = self._ranks.gather(padded).cpu().numpy().reshape(-1, longest, self._width)
        self._append(
            {
                key: row
                for keys, rows_of_rank in zip(of_ranks, found, strict=True)
                for key, row in zip(keys, rows_of_rank, strict=False)
                if key not in self._row_of  # another node may lack what this one has
            }
        )

    def _read(self) -> Iterator[bytes]:
        """The keys in the files, up to where a machine that went down left a row incomplete."""
        while record := self._keys.read(_KEY + _CHECKSUM):
            if record[_KEY:] != _checksum(self._vectors.read(4 * self._width)):
                return
            yield record[:_KEY]

    def _append(self, vectors: dict[bytes, np.ndarray]) -> None:
        if not vectors:
            return
        count = len(self._row_of)
        rows = {key: vector.tobytes() for key, vector in vectors.items()}
        records = [key + _checksum(row) for key, row in rows.items()]
        try:
            for file, data in ((self._vectors, list(rows.values())), (self._keys, records)):
                file.seek(count * len(data[0]))
                file.write(b"".join(data))
                file.flush()
        except OSError as error:
            room = "make room and " if is_full(error) else ""
            remedy = f"{room}run the same command with --resume"
            raise OSError(f"{self._paths[1]}: {error}; {remedy}") from error
        self._row_of |= {key: count + n for n, key in enumerate(rows)}

    def _most(self, count: int) -> int:
        """The largest count of all ranks."""
        if self._group is None:
            return count
        most = torch.tensor(count)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return int(most)

    def _shared(self, keys: Sequence[bytes], most: int) -> list[list[bytes]]:
        """The keys that each rank embeds: its own without those of the ranks before it."""
        if self._group is None:
            return [list(keys)]
        own = np.frombuffer(b"".join(keys), np.uint8)
        sent = torch.zeros(most * _KEY, dtype=torch.uint8)
        sent[: len(own)] = torch.from_numpy(own.copy())
        received = sent.new_empty(self._ranks.world * len(sent))
        all_gather_single(received, sent, group=self._group)
        seen = {bytes(_KEY)}  # padding
        of_ranks: list[list[bytes]] = []
        for data in map(bytes, received.numpy().reshape(self._ranks.world, -1)):
            one = [data[_KEY * n : _KEY * (n + 1)] for n in range(most)]
            of_ranks.append([key for key in one if key not in seen])
            seen.update(one)
        return of_ranks


def _checksum(row: bytes) -> bytes:
    return zlib.crc32(row).to_bytes(_CHECKSUM, "little")


def _digest(ids: Tensor) -> bytes:
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=_KEY).digest()
