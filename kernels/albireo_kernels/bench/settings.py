"""What is measured, and for how long."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Settings:
    """The shapes of a model, the sizes of its steps, and the effort of a measurement.

    Attributes:
        rows: tokens of a step, where a kernel works on each of them alone.
        max_sampled: more rows than these are not sampled from.
        decode: sequences and their context, in tokens, of steps with a token of each.
        prefill: tokens of a prompt.
        copies_bytes: a kernel's weights are copied until they take so much.
        program_s: a program repeats a kernel, each time on other weights, until it should take so long.
        budget_s: repetitions of a program end after so long, but not before `min_reps`.
        memory_bytes: what bandwidth is measured on, at least.
        multiply_s: how long a measurement of multiplications takes.
        rate_reps: measurements of each of the machine's rates.
        is_quick: sizes are too small to mean anything.
    """

    hidden: int = 1024
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 3072
    vocab_size: int = 151_936
    rows: tuple[int, ...] = (1, 8, 32, 512)
    max_sampled: int = 64
    decode: tuple[tuple[int, int], ...] = ((1, 129), (8, 129), (32, 129), (8, 2048))
    prefill: tuple[int, ...] = (512, 1024)
    copies_bytes: int = 128 << 20
    max_copies: int = 64
    program_s: float = 0.02
    budget_s: float = 0.5
    min_reps: int = 3
    max_reps: int = 11
    memory_bytes: int = 512 << 20
    multiply_s: float = 0.02
    rate_reps: int = 25  # many short ones: on a shared machine some of them are undisturbed
    is_quick: bool = False

    @property
    def sampled(self) -> tuple[int, ...]:
        return tuple(count for count in self.rows if count <= self.max_sampled)


FULL = Settings()  # the shapes of Qwen3-0.6B
QUICK = replace(
    FULL,
    hidden=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate=256,
    vocab_size=2048,
    rows=(1, 8),
    decode=((1, 40), (4, 70)),
    prefill=(48,),
    copies_bytes=1 << 20,
    max_copies=4,
    budget_s=0.0,
    min_reps=2,
    memory_bytes=32 << 20,
    multiply_s=0.004,
    rate_reps=3,
    is_quick=True,
)
