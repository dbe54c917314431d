"""Vectors of inputs that are the same in each step, computed once and kept in files.

    key -> row of NAME/node-N.float32 -> vectors (R, D)
      new: embedded on the first rank that has it -> rows of all nodes

    FOLDER/node-N.keys      for each row a key of 16 bytes and a checksum of 4
           node-N.float32   rows of D numbers

R inputs   D width of a vector   N number of the node

The files grow with the inputs, memory by about 200 bytes an input for the index of keys. The
ranks of a node share its files without locks: all write the same bytes to the same place.
A resumed run reads what the first one computed, so it gets the same bits.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flap_fast.data.batch import to_device
from flap_fast.files import is_full
from flap_fast.ranks import Ranks, all_gather_single

KEY_BYTES = 16
_CHECKSUM = 4
# Inputs of a pass, so that a large batch of new ones needs no more memory than training does.
_AT_ONCE = 256


class FrozenVectors:
    """A frozen encoder's vectors by key. Collective: call on every rank.

    Args:
        width: of a vector.
        folder: of the files; made if it is missing.
        keep: read the rows that are there, those of this run; else start without any.
    """

    def __init__(self, width: int, ranks: Ranks, folder: Path, *, keep: bool):
        self._width, self._ranks = width, ranks
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
        self._keys.truncate(len(self._row_of) * (KEY_BYTES + _CHECKSUM))
        self._vectors.truncate(len(self._row_of) * 4 * self._width)
        ranks.barrier()  # all ranks of a node have the same rows before the first is added

    def __len__(self) -> int:
        """How many inputs are kept."""
        return len(self._row_of)

    def of(self, keys: Sequence[bytes | None], embed: Callable[[list[int]], Tensor]) -> Tensor:
        """(R, D) float32 on the ranks' device.

        Args:
            keys: of the R inputs, `KEY_BYTES` each; None embeds an input each time.
            embed: gives the vectors of some inputs, by their numbers in `keys`.

        Raises:
            OSError: no space for the rows.
        """
        new = {key: n for n, key in enumerate(keys) if key and key not in self._row_of}
        passing = [n for n, key in enumerate(keys) if key is None]
        most, most_passing = self._most(len(new), len(passing))

        def embedded(some: list[int], most: int) -> Tensor:
            """Their vectors, in as many passes on each rank: ZeRO 3 gathers weights in step."""
            passes = (some[n : n + _AT_ONCE] or [0] for n in range(0, most, _AT_ONCE))
            return torch.cat([embed(each) for each in passes])[: len(some)]

        if most:
            of_ranks = self._shared(list(new), most)
            mine = [new[key] for key in of_ranks[self._ranks.rank]]
            self._append(self._gathered(embedded(mine, most), of_ranks))
        file, size = self._vectors.fileno(), 4 * self._width
        places = [size * self._row_of[key] if key else None for key in keys]
        rows = [bytes(size) if at is None else os.pread(file, size, at) for at in places]
        vectors = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float32)
        vectors = to_device(vectors.unflatten(0, (-1, self._width)), self._ranks.device)
        if most_passing:
            # In a pass of their own, whose rows are the same in a resumed run.
            found = embedded(passing, most_passing)
            rows_of = to_device(torch.tensor(passing, dtype=torch.int64), found.device)
            vectors = vectors.index_copy(0, rows_of, found)
        return vectors

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

    def _gathered(self, vectors: Tensor, of_ranks: list[list[bytes]]) -> dict[bytes, np.ndarray]:
        """The rows of all ranks' new inputs that are not here yet."""
        longest = max(map(len, of_ranks))
        padded = vectors.new_zeros(longest, self._width)
        padded[: len(vectors)] = vectors
        found = self._ranks.gather(padded).cpu().numpy().reshape(-1, longest, self._width)
        return {
            key: row
            for keys, rows_of_rank in zip(of_ranks, found, strict=True)
            for key, row in zip(keys, rows_of_rank, strict=False)
            if key not in self._row_of  # another node may lack what this one has
        }

    def _read(self) -> Iterator[bytes]:
        """The keys in the files, up to where a machine that went down left a row incomplete."""
        while record := self._keys.read(KEY_BYTES + _CHECKSUM):
            if record[KEY_BYTES:] != _checksum(self._vectors.read(4 * self._width)):
                return
            yield record[:KEY_BYTES]

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

    def _most(self, *counts: int) -> list[int]:
        """The largest counts of all ranks."""
        if self._group is None:
            return list(counts)
        most = torch.tensor(counts)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return most.tolist()

    def _shared(self, keys: Sequence[bytes], most: int) -> list[list[bytes]]:
        """The keys that each rank embeds: its own without those of the ranks before it."""
        if self._group is None:
            return [list(keys)]
        own = np.frombuffer(b"".join(keys), np.uint8)
        sent = torch.zeros(most * KEY_BYTES, dtype=torch.uint8)
        sent[: len(own)] = torch.from_numpy(own.copy())
        received = sent.new_empty(self._ranks.world * len(sent))
        all_gather_single(received, sent, group=self._group)
        seen = {bytes(KEY_BYTES)}  # padding
        of_ranks: list[list[bytes]] = []
        for data in map(bytes, received.numpy().reshape(self._ranks.world, -1)):
            one = [data[KEY_BYTES * n : KEY_BYTES * (n + 1)] for n in range(most)]
            of_ranks.append([key for key in one if key not in seen])
            seen.update(one)
        return of_ranks


def _checksum(row: bytes) -> bytes:
    return zlib.crc32(row).to_bytes(_CHECKSUM, "little")
