"""Gives an image file the identity and the times that follow from its contents, so that the same build is the same file.

    stamp.py IMAGE SECONDS        SECONDS since 1970, usually SOURCE_DATE_EPOCH

Apptainer (before 1.5's --reproducible) draws a random identity and writes the time of the build into the header of the file and
into each entry of its table (SIF, all little-endian: https://github.com/apptainer/sif), and the time once more into the labels that are kept
beside the file system; build.sh has put the same text into those within it. All of it is what a signature covers: stamp first,
sign then.
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
import time
import uuid
from pathlib import Path

IDENTITY, TIMES = 48, 64  # in the header: 16 bytes, then created and modified
TABLE = 96  # offset and size of the table of objects
ENTRY_SIZE, ENTRY_TIMES = 585, 41
ENTRY_DATA = 17  # offset, size, size with the padding in front of it
ENTRY_NAME = 73
METADATA = b"inspect-metadata.json"
BUILT = re.compile(rb'("org\.label-schema\.build-date":\s*")[^"]*')


def date(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


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
            if not table[entry + 4]:  # not in use
                continue
            table[entry + ENTRY_TIMES : entry + ENTRY_TIMES + 16] = times
            if table[entry + ENTRY_NAME : entry + ENTRY_NAME + 128].rstrip(b"\0") == METADATA:
                place, length, padded = struct.unpack_from("<3q", table, entry + ENTRY_DATA)
                file.seek(place)
                text = BUILT.sub(rb"\g<1>" + date(seconds).encode(), file.read(length))
                if len(text) > length:
                    raise SystemExit(f"{path}: its labels have no room for the time")
                file.seek(place)
                file.write(text.ljust(length, b"\0"))
                struct.pack_into("<3q", table, entry + ENTRY_DATA, place, len(text), padded - length + len(text))
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
