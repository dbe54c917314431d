"""Triples of sentences by formula."""

from __future__ import annotations

import json
from pathlib import Path


def write_triples(folder: Path, count: int) -> Path:
    """FOLDER/triples.jsonl, as `flap prepare` would write it; gives the folder."""
    rows = (
        {
            "premise": f"here is premise {n}",
            "entailment": f"it follows from {n}",
            "contradiction": f"it contradicts {n}",
        }
        for n in range(count)
    )
    folder.mkdir(exist_ok=True)
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
