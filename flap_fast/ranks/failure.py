"""Joins the ranks of a command, and lets one error that ends them all be said once."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from flap_fast.ranks import Ranks, join_ranks, leave_ranks
from flap_fast.ranks.agreement import RanksError

# How long rank 0 waits for the reason of a rank that ended.
_REASON_S = 2.0


class Ended(Exception):
    """The end of a command that is no error, the same on all ranks."""


class SaidElsewhere(RuntimeError):
    """This rank ends because of an error that another one prints."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the launcher, while entered; a rank that is in them already stays there.

    Raises:
        SaidElsewhere: in place of an error that another rank prints: the same one, or its own
            where it ended first and this rank lost the connection.
        RanksError: a rank ended without an error of its own; on rank 0.
    """
    inside = dist.is_initialized()
    ranks = join_ranks()
    try:
        yield ranks
    except (Ended, RanksError):
        raise
    except Exception as error:
        if inside or ranks.world == 1:
            raise
        if not _lost_connection(error):
            if _first_to_say(error):
                raise
            raise SaidElsewhere from error
        if ranks.first and not _said():
            raise RanksError(
                f"a rank ended without an error of its own: killed, or out of memory? "
                f"({str(error).splitlines()[0]}); --resume goes on from the last checkpoint",
                code=1,
            ) from error
        raise SaidElsewhere from error
    finally:
        if not inside:
            leave_ranks()


def _lost_connection(error: Exception) -> bool:
    """Whether a collective failed, or the store, because a rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _first_to_say(error: Exception) -> bool:
    """Whether no other rank has said this error; notes that one says it."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set("failed", "1")
        return store.add(f"failed/{zlib.crc32(str(error).encode())}", 1) == 1
    except dist.DistError:
        return True  # the store is gone, with rank 0: better said twice than not at all


def _said() -> bool:
    """Whether a rank said why it ended, within a short time."""
    until = time.monotonic() + _REASON_S
    try:
        store = dist.distributed_c10d._get_default_store()
        while time.monotonic() < until:
            if store.check(["failed"]):
                return True
            time.sleep(0.05)
    except dist.DistError:
        pass
    return False
