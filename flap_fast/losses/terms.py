"""What a loss gives."""

from __future__ import annotations

from torch import Tensor

Terms = dict[str, tuple[float, Tensor]]
"""Its named terms: the weight of each, above 0, and its value (), unweighted."""
