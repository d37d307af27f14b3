"""The stub engine of a rank: real blocks, real block tables, a hash for a transformer."""

import time
from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array, UInt64Array
from albireo.errors import ConfigError
from albireo.logprobs import Logprobs
from albireo.model_spec import load_model_spec
from worker_svc.batch import InputBatch
from worker_svc.engine import EngineConfig, EngineInfo, PendingStep, Progress, StepOutput, StepTimes
from worker_svc.kv_parts import HostCopies, KvCopies, cut_blocks
from worker_svc.stub import truth
from worker_svc.stub.clock import Clock, Launched
from worker_svc.stub.collective import StarCollective
from worker_svc.stub.roofline import StepModel, make_step_model
from worker_svc.stub.sampler import Sampler, step_logprobs, with_scored

_NO_TOKENS = np.zeros(0, dtype=np.int32)


class StubEngine:
    """A truth machine, a clock, or both.

    As a *truth machine* it writes the tokens it is given into its blocks and samples from the history it reads back
    through the block table: a block reused too early, a wrong slot or a lost token changes the output, which tests
    compare with `truth.true_tokens`. As a *clock* its steps take modelled time, and it is asynchronous. In mode "clock"
    it computes nothing else: its tokens tell nothing of the history.
    """

    name = "stub"

    def __init__(self, config: EngineConfig) -> None:
        if truth.NUM_HEADS % config.tp_size:
            raise ConfigError(f"--tp {config.tp_size}: the stub engine takes 1, 2, 4 or 8")
        self._config = config
        self._collective = StarCollective(config.run_dir / "collective.sock", config.rank, config.tp_size)
        width = truth.NUM_HEADS // config.tp_size
        self._heads = range(config.rank * width, (config.rank + 1) * width)
        self._last_tokens = np.zeros(config.max_num_seqs, dtype=np.int32)
        self._sampler = Sampler()
        self._cache: UInt64Array = np.zeros((0, config.block_size, width), dtype=np.uint64)
        self._kv = cut_blocks("words 1", 1, truth.NUM_HEADS, 8 * config.block_size, self._heads, writes=True)
        self._vocab_size = 0
        self._is_truthful = config.stub_mode == "truth"
        step_model = make_step_model(config.stub_step_ms, config.stub_device, config.stub_model, config.tp_size)
        self._step_model = step_model or StepModel()
        self._clock: Clock | None = None
        if step_model is not None or not self._is_truthful:
            self._clock = Clock(config.run_dir, config.rank, config.tp_size, may_lag=not self._is_truthful)
        self.is_asynchronous = self._clock is not None

    def load(self, report: Progress) -> EngineInfo:
        config = self._config
        spec = load_model_spec(config.model_path)
        self._vocab_size = spec.vocab_size
        max_model_len = config.max_model_len or spec.max_position_embeddings
        wanted = config.max_num_seqs * -(-max_model_len // config.block_size)
        bytes_per_block = config.block_size * len(self._heads) * 8
        fitting = int((config.kv_cache_gib or 1) * 2**30) // bytes_per_block
        report("stub", 1.0)
        return EngineInfo(
            device="modelled",
            dtype="none",
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            max_model_len=max_model_len,
            num_blocks=fitting if config.kv_cache_gib else min(wanted, fitting),
            kv=self._kv,
        )

    def join(self, meeting: int) -> None:
        if self._is_truthful:
            self._collective.join(meeting)
        if self._clock is not None:
            self._clock.join(meeting)

    def allocate(self, num_blocks: int) -> None:
        if num_blocks != len(self._cache):
            self._cache = np.zeros((num_blocks, self._config.block_size, len(self._heads)), dtype=np.uint64)

    def copies(self) -> KvCopies:
        return HostCopies(self._kv, [self._cache[None]], head_axis=3)

    def launch(self, batch: InputBatch) -> PendingStep:
        if self._clock is None:
            return _TrueStep(self, batch)
        return _TimedStep(self, self._clock, self._step_model, self._clock.launch(), batch)

    def compute(self, batch: InputBatch) -> StepOutput:
        """The truth, with the times that it took."""
        start_ns = time.monotonic_ns()
        part = self.forward(batch)
        reduce_ns = time.monotonic_ns()
        digests = self._collective.all_reduce(part)
        forward_end_ns = time.monotonic_ns()
        tokens = self.sample(batch, digests)
        end_ns = time.monotonic_ns()
        times = StepTimes(
            start_ns, end_ns, forward_end_ns - start_ns, end_ns - forward_end_ns, forward_end_ns - reduce_ns
        )
        return StepOutput(tokens, times, self.logprobs(batch, digests, tokens))

    def sampled(self, batch: InputBatch) -> tuple[Int32Array, Logprobs | None]:
        """What a step whose times are the clock's brings: [S] tokens."""
        if self._is_truthful:
            output = self.compute(batch)
            return output.token_ids, output.logprobs
        if self._config.rank:  # nobody reads them
            return _NO_TOKENS, None
        tokens = with_scored(truth.noise_tokens(batch.sampling.seed, batch.output_positions, self._vocab_size), batch)
        return tokens, self.logprobs(batch, batch.sampling.seed, tokens)

    def forward(self, batch: InputBatch) -> UInt64Array:
        """Writes the step's tokens and reads the sampling rows' histories; [S], this rank's part of their digests."""
        token_ids = np.where(batch.from_last_token, self._last_tokens[batch.token_slots], batch.token_ids)
        self._cache.reshape(-1, len(self._heads))[batch.slot_mapping] = truth.kv_words(token_ids, self._heads)
        rows = np.searchsorted(batch.query_starts, batch.sample_tokens, side="right") - 1
        lens = (batch.positions[batch.sample_tokens] + 1).astype(np.int32)
        num_blocks = -(-int(lens.max(initial=0)) // self._config.block_size)
        # Entries past a row's context are stale: masked by the digest, but they must be readable.
        tables = np.clip(batch.block_tables[rows, :num_blocks], 0, len(self._cache) - 1)
        words = self._cache[tables].reshape(len(lens), num_blocks * self._config.block_size, len(self._heads))
        return truth.digest(words, lens)

    def sample(self, batch: InputBatch, digests: UInt64Array) -> Int32Array:
        """[S] whole digests -> [S] tokens; those drawn are kept as the slots' last ones. Called in the order of the
        steps."""
        tokens = self._sampler.choose(batch, digests, self._vocab_size)
        self._last_tokens[batch.sample_slots] = tokens[: len(batch.sample_slots)]
        return tokens

    def logprobs(self, batch: InputBatch, digests: UInt64Array, tokens: Int32Array) -> Logprobs | None:
        """Of the sampling rows that want them."""
        return step_logprobs(batch.sampling, digests, tokens, self._vocab_size)

    def abort(self) -> None:
        self._collective.abort()
        if self._clock is not None:
            self._clock.abort()

    def leave(self) -> None:
        self._collective.leave()
        if self._clock is not None:
            self._clock.leave()

    def close(self) -> None:
        self.leave()


@dataclass(frozen=True, slots=True)
class _TrueStep:
    """A step that takes the time that it takes."""

    engine: StubEngine
    batch: InputBatch

    def resolve(self) -> StepOutput:
        return self.engine.compute(self.batch)


@dataclass(frozen=True, slots=True)
class _TimedStep:
    """A step that the modelled device has been given."""

    engine: StubEngine
    clock: Clock
    model: StepModel
    launched: Launched
    batch: InputBatch

    def resolve(self) -> StepOutput:
        tokens, logprobs = self.engine.sampled(self.batch)
        seconds = self.model.seconds(self.batch)
        forward_ns, sample_ns = _nanoseconds(seconds.forward_s), _nanoseconds(seconds.sample_s)
        span = self.clock.finish(self.launched, forward_ns + sample_ns)
        times = StepTimes(span.start_ns, span.end_ns, forward_ns, sample_ns, _nanoseconds(seconds.collective_s))
        return StepOutput(tokens, times, logprobs)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
