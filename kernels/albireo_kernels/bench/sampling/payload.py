"""What is compared, and what each scheme makes a rank receive."""

from dataclasses import dataclass

from albireo.model_spec import shard_vocab
from albireo_kernels.bench.steps import Sampling

SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.8),
    "top_k_top_p": Sampling(temperature=0.8, top_k=50, top_p=0.95),
    "top_p": Sampling(temperature=0.8, top_p=0.95),
}

_LOGIT_BYTES = 4  # float32
_TOKEN_BYTES = 4
_SCORE_BYTES = 8  # of a shard's best token: its score and its id
_COUNT_BYTES = 4  # how many keys follow
_KEY_BYTES = 8  # a token of a shard's best k: its value and its id


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of logits, whose columns are split over the ranks of a group."""

    vocab_size: int
    batch: int
    tp: int

    def ids(self, rank: int) -> range:
        """The rank's columns."""
        return shard_vocab(self.vocab_size, rank, self.tp)

    @property
    def num_own_rows(self) -> int:
        """That rank 0 draws where rows are shared out: no rank has more."""
        return -(-self.batch // self.tp)


def received_bytes(scheme: str, shape: Shape, sampling: Sampling) -> int:
    """What rank 0 receives from others in a step: logits, candidates and tokens, without the cost of any transport."""
    own = shape.num_own_rows
    logits = _LOGIT_BYTES * (shape.vocab_size - len(shape.ids(0)))  # of a row
    if scheme == "gather":
        return shape.batch * logits
    tokens = _TOKEN_BYTES * (shape.batch - own)
    if scheme == "batch-sharded" or _needs_whole_rows(sampling):
        return own * logits + tokens
    return own * sum(_record_bytes(sampling, len(shape.ids(rank))) for rank in range(1, shape.tp)) + tokens


def _needs_whole_rows(sampling: Sampling) -> bool:
    """Whether the best tokens of each shard are not enough: top-p alone may have any number of survivors."""
    return sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p < 1


def _record_bytes(sampling: Sampling, num_ids: int) -> int:
    if sampling.temperature == 0 or sampling.top_k == 0:
        return _SCORE_BYTES
    return _COUNT_BYTES + _KEY_BYTES * min(sampling.top_k, num_ids)
