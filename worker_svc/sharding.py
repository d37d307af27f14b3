"""Which part of the model a rank holds."""

from dataclasses import dataclass

from albireo.model_spec import ModelSpec, shard_vocab


@dataclass(frozen=True)
class ModelShard:
    """The heads, MLP columns and token ids of one rank, as ranges of the whole model's.

    With more ranks than KV heads, neighbouring ranks hold the same KV head.
    """

    rank: int
    tp_size: int
    heads: range
    kv_heads: range
    intermediate: range
    vocab: range
    vocab_widths: tuple[int, ...]  # of every rank's ``vocab``


def shard_model(spec: ModelSpec, rank: int, tp_size: int) -> ModelShard:
    """Raises ConfigError when the model cannot be split over ``tp_size`` ranks."""
    spec.check_tp(tp_size)
    return ModelShard(
        rank=rank,
        tp_size=tp_size,
        heads=_part(spec.num_heads, rank, tp_size),
        kv_heads=_part(spec.num_kv_heads, rank, tp_size),
        intermediate=_part(spec.intermediate_size, rank, tp_size),
        vocab=shard_vocab(spec.vocab_size, rank, tp_size),
        vocab_widths=tuple(len(shard_vocab(spec.vocab_size, other, tp_size)) for other in range(tp_size)),
    )


def _part(count: int, rank: int, tp_size: int) -> range:
    if count < tp_size:
        first = rank // (tp_size // count)
        return range(first, first + 1)
    width = count // tp_size
    return range(rank * width, (rank + 1) * width)
