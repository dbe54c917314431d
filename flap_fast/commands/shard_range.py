"""Options that divide work among machines: of `flap prepare` and `flap embed`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from flap_fast.checks import require

if TYPE_CHECKING:
    from flap_fast.preparation.prepare import Distributor
    from flap_fast.preparation.shard_tasks import ShardRange

ShardRangeOption = Annotated[
    str | None, typer.Option(help="A/B: do the A-th of B parts; one a machine.")
]
DistributorOption = Annotated[
    str, typer.Option(help="threads of this process, or ray: the cluster that is running.")
]


def work_division(text: str | None, distributor: str) -> tuple[ShardRange | None, Distributor]:
    """This process' shard range, None for all shards, and its distributor.

    Under a launcher such as torchrun the ranks divide the range that --shard-range names.
    """
    from flap_fast.preparation.prepare import Distributor
    from flap_fast.preparation.shard_tasks import ShardRange, shard_range

    kinds = get_args(Distributor)
    require(distributor in kinds, "--distributor", f"be one of {', '.join(kinds)}", distributor)
    named = shard_range(text) if text is not None else None
    with_ray = distributor == "ray"
    require(not (named and with_ray), "--shard-range", "be left out with ray", named)
    rank, ranks = (int(os.environ.get(*name)) for name in (("RANK", "0"), ("WORLD_SIZE", "1")))
    require(
        not (ranks > 1 and with_ray), "--distributor ray", "run in one process", f"{ranks} ranks"
    )
    if ranks > 1:
        whole = named or ShardRange()
        named = ShardRange((whole.number - 1) * ranks + rank + 1, whole.of * ranks)
    return named, distributor  # type: ignore[return-value] - checked above
