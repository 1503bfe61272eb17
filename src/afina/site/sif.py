"""The size that an image's header declares: a shorter file is cut off, which Apptainer itself notices only when it reads that far.

Read without Apptainer, so that a truncated image is refused before a job is queued. Everything else about an image comes
from Apptainer (`afina.site.image`).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["declared_size"]

_HEADER_BYTES = 128


def declared_size(path: Path) -> int | None:
    """Bytes that the file must have at least; None where it is not an Apptainer image (SIF).

    The header ends with the offset and the size of the data, two little-endian 64-bit numbers, signatures included
    (https://github.com/apptainer/sif, pkg/sif).

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or header[32:42] != b"SIF_MAGIC\0":
        return None
    return sum(int.from_bytes(header[place : place + 8], "little", signed=True) for place in (112, 120))
