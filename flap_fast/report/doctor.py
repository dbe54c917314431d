"""The page's section of what `flap doctor RUN` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flap_fast.checks import ConfigError, in_one_line


def doctor_section(run: Path) -> dict[str, Any] | None:
    """RUN/doctor.json, errors and warnings with their sentences; None where there is none.

    Raises:
        ConfigError: it is no answer of `flap doctor`.
    """
    file = run / "doctor.json"
    if not file.is_file():
        return None
    try:
        answer = json.loads(file.read_bytes())
        bad = [row for row in answer["findings"] if row["severity"] != "note"]
        notes = [row for row in answer["findings"] if row["severity"] == "note"]
        return {
            "counts": ", ".join(f"{n} {name}s" for name, n in answer["counts"].items()),
            "bad": [
                {
                    "severity": row["severity"],
                    "what": f"{row['check']}, {row['where']}: {row['got']}",
                    "why": f"must {row['rule']}; {row['remedy']}",
                    "examples": ", ".join(row["examples"]),
                }
                for row in bad
            ],
            "notes": [f"{row['check']}, {row['where']}: {row['got']}" for row in notes],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} must be an answer of flap doctor: {in_one_line(error)}; run it again"
        ) from None
