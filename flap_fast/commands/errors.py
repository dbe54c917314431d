"""How commands print errors: one sentence, without a traceback where a user can fix it."""

from __future__ import annotations

import os
import time

from flap_fast.checks import ConfigError
from flap_fast.files import say
from flap_fast.launcher import TasksError, first_of_its_node

# Launchers end all ranks once one has ended: rank 0 gets this long to say why.
_SAID_S = 1.0


def print_error(message: str) -> None:
    """Print a line to stderr, with the rank if there are several."""
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    say(message if world == "1" else f"[rank {rank}] {message}", error=True)


def print_and_status(error: Exception) -> int:
    """Print an error that ends the command; returns the exit status. Raises it if it is a bug."""
    if isinstance(error, ConfigError):
        # Ranks have the same one each, but nodes can differ in their files.
        alike = isinstance(error, TasksError) or "RANK" in os.environ
        if not alike or first_of_its_node():
            print_error(f"error: {error}")
        return 2
    if isinstance(error, OSError):
        print_error(f"error: {error}; everything completed before it is kept")
        return 1
    if not isinstance(error, (ValueError, ArithmeticError, RuntimeError)):
        raise error
    from flap_fast.data.preprocess.waveform import Unusable
    from flap_fast.data.shards import ShardError
    from flap_fast.files import ManifestError
    from flap_fast.ranks.agreement import RanksError
    from flap_fast.ranks.failure import SaidElsewhere

    if isinstance(error, SaidElsewhere):
        return 1
    if not isinstance(error, (ManifestError, ShardError, Unusable, ArithmeticError, RanksError)):
        raise error  # a bug: with its traceback
    if not isinstance(error, RanksError):
        print_error(f"error: {error}")
        return 1
    if os.environ.get("RANK", "0") == "0":
        print_error(f"error: {error}")
    else:
        time.sleep(_SAID_S)
    return error.code
