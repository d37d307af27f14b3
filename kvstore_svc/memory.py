"""The arena: one memfd, which vanishes with the processes that map it, however they die."""

import fcntl
import mmap
import os
from dataclasses import dataclass

import numpy as np

from albireo.errors import ConfigError
from albireo.kv.arena import map_arena
from albireo.kv.part import Bytes


@dataclass(frozen=True)
class Memory:
    """The arena in this process.

    Attributes:
        descriptor: of the memfd; it can neither grow nor shrink, so no process can make another one fault.
        bytes: all of it.
    """

    descriptor: int
    mapping: mmap.mmap
    bytes: Bytes

    @classmethod
    def create(cls, num_bytes: int) -> "Memory":
        """Raises ConfigError when the system does not give it."""
        descriptor = os.memfd_create("albireo-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, num_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls.of(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise ConfigError(f"an arena of {num_bytes} bytes: {error.strerror}") from error

    @classmethod
    def of(cls, descriptor: int) -> "Memory":
        """The arena that another process has made."""
        mapping = map_arena(descriptor, os.fstat(descriptor).st_size)
        return cls(descriptor, mapping, np.frombuffer(mapping, dtype=np.uint8))
