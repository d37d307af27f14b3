"""Compiles every kernel for GPUs that are not here: ``python compiled.py`` prints a line of JSON for each."""

import json
import sys
import time
from types import ModuleType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from albireo_kernels.triton import candidates, draw, edits, filters, logprobs
from albireo_kernels.triton.arithmetic import LAUNCH
from albireo_kernels.triton.registry import TYPES, VARIANTS, Variant

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200
MODULES = (edits, draw, candidates, filters, logprobs)


def kernels_of(module: ModuleType) -> set[str]:
    return {name for name, value in vars(module).items() if name.endswith("_kernel") and isinstance(value, JITFunction)}


def compile_for(variant: Variant, capability: int) -> int:
    """The size of the machine code in bytes."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else TYPES[name] for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants)
    options = {"num_warps": variant.num_warps, **LAUNCH}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return len(compiled.asm["cubin"])


if __name__ == "__main__":
    registered = {variant.kernel.__name__ for variant in VARIANTS}
    missing = sorted(set().union(*map(kernels_of, MODULES)) - registered)
    sys.stdout.write(
        json.dumps({"name": "registry", "error": f"not registered: {missing}" if missing else None}) + "\n"
    )
    for variant in VARIANTS:
        for capability in CAPABILITIES:
            name, start = f"{variant.kernel.__name__} for sm_{capability}", time.process_time()
            try:
                num_bytes = compile_for(variant, capability)
                error = None if num_bytes else "no machine code"
            except Exception as failure:  # noqa: BLE001 - it is reported
                error = repr(failure)
            seconds = round(time.process_time() - start, 2)
            sys.stdout.write(json.dumps({"name": name, "seconds": seconds, "error": error}) + "\n")
            sys.stdout.flush()
