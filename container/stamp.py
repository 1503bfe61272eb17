"""Gives an image file the identity and the times that follow from its contents, so that the same build is the same file.

    stamp.py IMAGE SECONDS        SECONDS since 1970, usually SOURCE_DATE_EPOCH

Apptainer (before 1.5's --reproducible) draws a random identity and writes the time of the build into the header of the file and
into each entry of its table (SIF, all little-endian: https://github.com/apptainer/sif). Both are part of what a signature
covers: stamp first, sign then. Nothing of what is in the image is touched.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import uuid
from pathlib import Path

IDENTITY, TIMES = 48, 64  # in the header: 16 bytes, then created and modified
TABLE = 96  # offset and size of the table of objects
ENTRY_SIZE, ENTRY_TIMES = 585, 41


def stamp(path: Path, seconds: int) -> str:
    """Stamp the file; returns its new identity."""
    times = struct.pack("<2q", seconds, seconds)
    with path.open("r+b") as file:
        head = bytearray(file.read(128))
        if head[32:42] != b"SIF_MAGIC\0":
            raise SystemExit(f"{path}: not an Apptainer image (SIF)")
        offset, size = struct.unpack_from("<2q", head, TABLE)
        file.seek(offset)
        table = bytearray(file.read(size))
        for entry in range(0, size - ENTRY_SIZE + 1, ENTRY_SIZE):
            if table[entry + 4]:  # in use
                table[entry + ENTRY_TIMES : entry + ENTRY_TIMES + 16] = times
        head[TIMES : TIMES + 16] = times
        head[IDENTITY : IDENTITY + 16] = bytes(16)
        digest = hashlib.sha256(head + table)
        file.seek(offset + size)
        while block := file.read(1 << 22):
            digest.update(block)
        identity = uuid.UUID(bytes=digest.digest()[:16], version=4)
        head[IDENTITY : IDENTITY + 16] = identity.bytes
        file.seek(0)
        file.write(head)
        file.seek(offset)
        file.write(table)
    return str(identity)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(stamp(Path(sys.argv[1]), int(sys.argv[2])))
