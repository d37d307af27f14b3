"""The compiled kernels as Python sees them: typed calls of the functions of src/albireo_cpu.h."""

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from albireo_kernels.cpu.build import Isa, NoCompilerError, Progress, detect_isa, library_path
from albireo_kernels.cpu.structs import (
    ABI,
    CANDIDATES,
    MAX_RANKS,
    NUM_RECENT,
    TOKEN_LOGPROBS,
    DrawStruct,
    Dtype,
    EditsStruct,
    ExchangeStruct,
    HistoriesStruct,
    LogprobsStruct,
    MatrixStruct,
    OpStruct,
    ProgramStruct,
    PublishStruct,
    RowsStruct,
    SelectStruct,
    StepStruct,
)

# Results and arguments of each function.
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "albireo_abi": (c_int, (POINTER(c_int64),)),
    "albireo_isa": (c_int, ()),
    "albireo_allow_isa": (c_int, ()),
    "albireo_input_dtype": (c_int, (c_int,)),
    "albireo_matrix_bytes": (c_int64, (c_int, c_int32, c_int32, POINTER(c_int32))),
    "albireo_pack": (None, (POINTER(MatrixStruct), c_void_p, c_int, c_int64, c_int32, c_int32, c_int32)),
    "albireo_unpack": (None, (POINTER(MatrixStruct), c_void_p, c_int64)),
    "albireo_sample_scratch_bytes": (c_int64, (c_int32,)),
    "albireo_device_open": (c_void_p, (POINTER(c_int32), c_int32)),
    "albireo_device_close": (None, (c_void_p,)),
    "albireo_group_bytes": (c_int64, ()),
    "albireo_join": (c_int, (c_void_p, c_void_p, c_int32, c_int32, c_int64)),
    "albireo_leave": (None, (c_void_p,)),
    "albireo_submit": (
        None,
        (c_void_p, POINTER(ProgramStruct), POINTER(ProgramStruct), POINTER(StepStruct)),
    ),
    "albireo_wait": (c_int, (c_void_p, POINTER(StepStruct), c_int64)),
    "albireo_abort": (None, (c_void_p,)),
    "albireo_read_memory": (c_uint64, (c_void_p, c_int64)),
    "albireo_multiply_in_cache": (c_int64, (c_int, c_int64)),
}


class Library:
    """The kernels of one instruction set. Calls release the interpreter lock.

    Attributes:
        c: the C functions, with their types.
        isa: what it was built for.
        path: where it lies.
    """

    def __init__(self, path: Path) -> None:
        """Raises NoCompilerError where the library is of another interface than this module."""
        self.path = path
        self.c = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self._check_abi()
        self.isa = Isa(self.c.albireo_isa())

    def allow(self) -> bool:
        """Asks the system for what the instruction set needs; whether it agrees."""
        return bool(self.c.albireo_allow_isa())

    def input_dtype(self, weight_dtype: Dtype) -> Dtype:
        """The type of activations that a product with such weights reads."""
        return Dtype(self.c.albireo_input_dtype(weight_dtype))

    def matrix_bytes(self, dtype: Dtype, num_out: int, num_in: int) -> tuple[int, int]:
        """Bytes of a packed matrix, and its padded_in."""
        padded_in = c_int32()
        num_bytes = self.c.albireo_matrix_bytes(dtype, num_out, num_in, byref(padded_in))
        return int(num_bytes), padded_in.value

    def sample_scratch_bytes(self, vocab_size: int) -> int:
        """Scratch memory of one thread."""
        return int(self.c.albireo_sample_scratch_bytes(vocab_size))

    def group_bytes(self) -> int:
        """Bytes of the memory that ranks meet in."""
        return int(self.c.albireo_group_bytes())

    def _check_abi(self) -> None:
        first: list[type[Structure]] = [MatrixStruct, RowsStruct, StepStruct, OpStruct, ProgramStruct]
        first += [EditsStruct, HistoriesStruct, LogprobsStruct]
        last: list[type[Structure]] = [ExchangeStruct, SelectStruct, DrawStruct, PublishStruct]
        expected = [ctypes.sizeof(struct) for struct in first]
        expected += [CANDIDATES.itemsize, TOKEN_LOGPROBS.itemsize]
        expected += [ctypes.sizeof(struct) for struct in last] + [MAX_RANKS, NUM_RECENT]
        sizes = (c_int64 * len(expected))()
        version = self.c.albireo_abi(sizes)
        if version != ABI or list(sizes) != expected:
            raise NoCompilerError(f"{self.path} has interface {version} {list(sizes)}, not {ABI} {expected}")


def load_library(isa: Isa | None = None, *, emulate: bool = False, report: Progress | None = None) -> Library:
    """The kernels of an instruction set, by default the machine's highest; compiled if need be.

    Where the system refuses AMX, they are those of AVX-512.

    Args:
        emulate, report: as of `build.library_path`.
    Raises:
        NoCompilerError: they cannot be compiled.
    """
    wanted = detect_isa() if isa is None else isa
    library = _open(library_path(wanted, emulate=emulate, report=report))
    if wanted is Isa.AMX and not library.allow():
        return load_library(Isa.AVX512, emulate=emulate, report=report)
    return library


@functools.cache
def _open(path: Path) -> Library:
    return Library(path)
