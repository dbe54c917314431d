"""The folder of any model that can be opened: a run's, a checkpoint's, the Hub's, transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from flap_fast.checksums import verified
from flap_fast.hub import local_folder
from flap_fast.interchange.convert import import_checkpoint, importable


@contextmanager
def opened(path: str | Path, *, verify: bool = True) -> Iterator[Path]:
    """A model's folder as this project has it, which may be gone when the context ends.

    A model on the Hub is downloaded; a folder of transformers' `ClapModel` is imported.

    Args:
        verify: compare an imported folder's files with its SHA256SUMS, if it has one.

    Raises:
        ConfigError: it cannot be downloaded, imported, or changed since it was written.
    """
    folder = local_folder(path)
    if not importable(folder):
        yield folder
        return
    with TemporaryDirectory(prefix="flap-") as work:
        with verified(folder, on=verify):
            import_checkpoint(folder, Path(work) / "model")
        yield Path(work) / "model"
