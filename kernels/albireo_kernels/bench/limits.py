"""How fast a kernel can be at best: as fast as the machine reads what it needs, and does the arithmetic."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from albireo_kernels.cpu import Dtype

_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Cost:
    """What a kernel has to move and to compute.

    Attributes:
        num_bytes: that come from memory, or go there: weights, blocks of the KV cache, logits.
        num_cached_bytes: that a step's kernels leave each other in the cache: activations.
        num_flops: of products; a multiplication with its addition is two.
        dtype: of the weights in these products.
    """

    num_bytes: int
    num_cached_bytes: int = 0
    num_flops: int = 0
    dtype: Dtype = Dtype.FLOAT32


@dataclass(frozen=True, slots=True)
class Rate:
    """What measurements came to, per second; the best one is what the machine can do."""

    values: tuple[float, ...]

    @property
    def best(self) -> float:
        return max(self.values)

    def __add__(self, other: "Rate") -> "Rate":
        """Of all measurements."""
        return Rate(self.values + other.values)

    def to_json(self) -> dict[str, float]:
        """In units of a billion."""
        return {"best": self.best / _GIGA, "median": statistics.median(self.values) / _GIGA}


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a number of threads together.

    Attributes:
        memory: bytes read from memory.
        cache: bytes read from the second-level cache.
        multiply: flops of products in the first-level cache, by the weights' type.
    """

    memory: Rate
    cache: Rate
    multiply: Mapping[Dtype, Rate] = field(default_factory=dict)

    def __add__(self, other: "Rates") -> "Rates":
        """Of all measurements."""
        multiply = {dtype: rate + other.multiply[dtype] for dtype, rate in self.multiply.items()}
        return Rates(self.memory + other.memory, self.cache + other.cache, multiply)

    def to_json(self) -> dict[str, Any]:
        return {
            "read_gb_s": self.memory.to_json(),
            "read_cache_gb_s": self.cache.to_json(),
            "multiply_gflop_s": {dtype.name.lower(): rate.to_json() for dtype, rate in self.multiply.items()},
        }


@dataclass(frozen=True, slots=True)
class Limit:
    """The shortest time possible, and what sets it: memory, cache or arithmetic."""

    seconds: float
    bound: str


def limit_of(cost: Cost, rates: Rates) -> Limit:
    """The largest of what reading from memory, reading from the cache, and multiplying take at least."""
    seconds = {
        "memory": cost.num_bytes / rates.memory.best,
        "cache": cost.num_cached_bytes / rates.cache.best,
        "arithmetic": cost.num_flops / rates.multiply[cost.dtype].best if cost.num_flops else 0.0,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return Limit(seconds[bound], bound)
