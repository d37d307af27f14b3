"""Compiled kernels for CPUs: operations over packed buffers, replayed by teams of pinned threads.

The C++ sources lie in src, where albireo_cpu.h is the interface, and are compiled when they are first used. Nothing
here imports torch.
"""

from albireo_kernels.cpu.buffers import KvBlocks, Matrix, Rows, address, allocate
from albireo_kernels.cpu.build import Isa, NoCompilerError, detect_isa, library_path
from albireo_kernels.cpu.device import UNPINNED, Device, GroupMemory
from albireo_kernels.cpu.library import BLOCK, PANEL, Dtype, Epilogue, Extent, Library, Status, load_library
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
    sample,
    silu_mul_outputs,
)
from albireo_kernels.cpu.step import StepData, make_step

__all__ = [
    "BLOCK",
    "MAX_GROUP",
    "MAX_HEAD_DIM",
    "PANEL",
    "UNPINNED",
    "Device",
    "Dtype",
    "Epilogue",
    "Extent",
    "GroupMemory",
    "Isa",
    "KvBlocks",
    "Library",
    "Matrix",
    "NoCompilerError",
    "Op",
    "Program",
    "Rows",
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
    "sample",
    "silu_mul_outputs",
]
