"""Which part of the work a process does, and who else does it: of `flap prepare`, `flap embed`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from flap_fast.checks import require

if TYPE_CHECKING:
    from flap_fast.preparation.prepare import Distributor
    from flap_fast.preparation.shard_tasks import Part

ShardRange = Annotated[str | None, typer.Option(help="A/B: do the A-th of B parts; one a machine.")]
Distributors = Annotated[
    str, typer.Option(help="threads of this process, or ray: the cluster that is running.")
]


def shares(shard_range: str | None, distributor: str) -> tuple[Part | None, Distributor]:
    """This process' part, None for all, and where it is done.

    Under a launcher such as torchrun its ranks share the part that --shard-range names.
    """
    from flap_fast.preparation.prepare import Distributor
    from flap_fast.preparation.shard_tasks import Part, part

    kinds = get_args(Distributor)
    require(distributor in kinds, "--distributor", f"be one of {', '.join(kinds)}", distributor)
    named = part(shard_range) if shard_range is not None else None
    with_ray = distributor == "ray"
    require(not (named and with_ray), "--shard-range", "be left out with ray", named)
    rank, ranks = (int(os.environ.get(*name)) for name in (("RANK", "0"), ("WORLD_SIZE", "1")))
    require(
        not (ranks > 1 and with_ray), "--distributor ray", "run in one process", f"{ranks} ranks"
    )
    if ranks > 1:
        whole = named or Part()
        named = Part((whole.number - 1) * ranks + rank + 1, whole.of * ranks)
    return named, distributor  # type: ignore[return-value] - checked above
