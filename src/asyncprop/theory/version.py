"""Version: which reading of a formula is meant, the paper's own or the one that its premises give."""

from __future__ import annotations

from typing import Literal

Version = Literal["as printed", "corrected"]
"""`"as printed"` is the formula as it stands in the paper; `"corrected"` is what the paper's own premises lead to."""

VERSIONS: tuple[Version, ...] = ("as printed", "corrected")


def check_version(version: Version) -> None:
    """Raise ValueError unless it is one of the two."""
    if version not in VERSIONS:
        raise ValueError(f"version must be 'as printed' or 'corrected' (got {version!r})")
