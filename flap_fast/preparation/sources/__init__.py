"""The registry of sources: published data sets that `flap prepare --source NAME` reads.

One line here adds the `Source` of a file, in the order of messages and of docs/data.md.
"""

# ruff: noqa: F401 - SOURCES finds the records by their type
# isort: off
from flap_fast.preparation.sources.layout import Source
from flap_fast.preparation.sources.audiocaps import AUDIOCAPS
from flap_fast.preparation.sources.clotho import CLOTHO
from flap_fast.preparation.sources.musiccaps import MUSICCAPS, MUSICCAPS_BY_NAME
from flap_fast.preparation.sources.wavcaps import WAVCAPS, WAVCAPS_CLEAN
from flap_fast.preparation.sources.audiosetcaps import AUDIOSETCAPS
from flap_fast.preparation.sources.autoacd import AUTOACD
from flap_fast.preparation.sources.laion import LAION
from flap_fast.preparation.sources.esc50 import ESC50
from flap_fast.preparation.sources.urbansound8k import URBANSOUND8K
from flap_fast.preparation.sources.labels import LABELS
from flap_fast.preparation.sources.sounds import SOUNDS
from flap_fast.preparation.sources.folder import FOLDER
from flap_fast.preparation.sources.tars import SHARDS
from flap_fast.preparation.sources.cc3m import CC3M
from flap_fast.preparation.sources.coco import COCO
from flap_fast.preparation.sources.flickr30k import FLICKR30K
from flap_fast.preparation.sources.nli import NLI

SOURCES = {source.name: source for source in list(globals().values()) if isinstance(source, Source)}


def sources_table() -> str:
    """The table of sources in docs/data.md."""
    rows = ["| source | what FOLDER holds | splits |", "|---|---|---|"]
    rows += [f"| `{s.name}` | {s.folder} | {s.splits} |" for s in SOURCES.values()]
    return "\n".join(rows)
