"""A rank by itself: attaches to the lease on its command line, writes the same part again and again until the lease
ends, and tells by lines on stdout."""

import sys

import numpy as np

from albireo.kv.arena import Lease, LocalArena, PartCopy
from albireo.kv.part import PartName


def main() -> None:
    socket, arena_id, lease, offset, num_bytes = sys.argv[1:]
    arena = LocalArena.attach(Lease(bytes.fromhex(arena_id), socket, 0, int(lease)))
    payload = np.full(int(num_bytes), 7, dtype=np.uint8)
    copy = PartCopy(int(offset), PartName(b"f" * 32, b"z" * 32, 0), [payload])
    assert arena.write([copy]) == [True]
    sys.stdout.write("writing\n")
    sys.stdout.flush()
    while arena.write([copy]) == [True]:
        pass
    sys.stdout.write("stopped\n")
    sys.stdout.flush()
    sys.stdin.read()


main()
