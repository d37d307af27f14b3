"""Fixed layouts, little-endian, by which ranks reach the arena."""

import enum
import struct

# Rank to store, once, over the arena's socket: magic, version, arena id, lease.
ATTACH = struct.Struct("<4sH2x16sQ")
ATTACH_MAGIC, ATTACH_VERSION = b"AKVA", 1
# Store to rank: status, arena bytes; with OK comes the arena's descriptor.
ATTACHED = struct.Struct("<B7xQ")

# KvStore/Data, rank to store: id, lease, offset, bytes of header and payload, operation; a write's header and payload.
DATA_REQUEST = struct.Struct("<QQQIB3x")
# Store to rank, in order: id, status; with a read that is OK, header and payload.
DATA_REPLY = struct.Struct("<QB7x")

DATA_METHOD = "/albireo.v1.KvStore/Data"


class Status(enum.IntEnum):
    OK = 0
    REFUSED = 1  # the lease does not cover it
    ENDED = 2  # there is no such lease, or no longer


class Operation(enum.IntEnum):
    READ = 1
    WRITE = 2
