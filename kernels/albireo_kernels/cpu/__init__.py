"""Compiled kernels for CPUs: operations over packed buffers, replayed by teams of pinned threads.

The C++ sources lie in src, where albireo_cpu.h is the interface, and are compiled when they are first used. Nothing
here imports torch.
"""

from albireo_kernels.cpu.buffers import KvBlocks, Matrix, Rows, address, allocate
from albireo_kernels.cpu.build import Isa, NoCompilerError, detect_isa, library_path
from albireo_kernels.cpu.device import UNPINNED, Device, GroupMemory
from albireo_kernels.cpu.library import Library, load_library
from albireo_kernels.cpu.program import (
    MAX_GROUP,
    MAX_HEAD_DIM,
    Op,
    Program,
    add_norm,
    attention,
    embed,
    gemm,
    quantize,
    rope,
    silu_mul_outputs,
)
from albireo_kernels.cpu.sampling import Edits, Histories, Logprobs, Sampling, SlotTokens
from albireo_kernels.cpu.sampling_ops import SCHEMES, RankSampling, SharedSampling, sampling_ops
from albireo_kernels.cpu.step import StepData, make_step
from albireo_kernels.cpu.structs import (
    BLOCK,
    CANDIDATES,
    MAX_TOP,
    NUM_RECENT,
    PANEL,
    TOKEN_LOGPROBS,
    Dtype,
    Epilogue,
    Extent,
    Status,
)

__all__ = [
    "BLOCK",
    "CANDIDATES",
    "MAX_GROUP",
    "MAX_HEAD_DIM",
    "MAX_TOP",
    "NUM_RECENT",
    "PANEL",
    "SCHEMES",
    "TOKEN_LOGPROBS",
    "UNPINNED",
    "Device",
    "Dtype",
    "Edits",
    "Epilogue",
    "Extent",
    "GroupMemory",
    "Histories",
    "Isa",
    "KvBlocks",
    "Library",
    "Logprobs",
    "Matrix",
    "NoCompilerError",
    "Op",
    "Program",
    "RankSampling",
    "Rows",
    "Sampling",
    "SharedSampling",
    "SlotTokens",
    "Status",
    "StepData",
    "add_norm",
    "address",
    "allocate",
    "attention",
    "detect_isa",
    "embed",
    "gemm",
    "library_path",
    "load_library",
    "make_step",
    "quantize",
    "rope",
    "sampling_ops",
    "silu_mul_outputs",
]
