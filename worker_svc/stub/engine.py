"""The stub engine of a rank: real blocks, real block tables, a hash for a transformer."""

import time
from dataclasses import dataclass

import numpy as np

from albireo.arrays import Int32Array, UInt64Array
from albireo.errors import ConfigError
from albireo.model_spec import load_model_spec
from albireo.v1 import plan_pb2
from worker_svc.batch import InputBatch
from worker_svc.engine import EngineConfig, EngineInfo, Progress, StepOutput
from worker_svc.stub import truth
from worker_svc.stub.collective import StarCollective


@dataclass(frozen=True, slots=True)
class _Done:
    output: StepOutput

    def resolve(self) -> StepOutput:
        return self.output


class StubEngine:
    """Writes the tokens it is given into its blocks, samples from the history it reads back through the block table.

    A block reused too early, a wrong slot or a lost token changes the output: tests compare with `truth.true_tokens`.
    Steps last ``stub_step_ms`` at least (modelled), from max(previous end, launch).
    """

    def __init__(self, config: EngineConfig) -> None:
        if truth.NUM_HEADS % config.tp_size:
            raise ConfigError(f"--tp {config.tp_size}: the stub engine takes 1, 2, 4 or 8")
        self._config = config
        self._collective = StarCollective(config.run_dir / "collective.sock", config.rank, config.tp_size)
        width = truth.NUM_HEADS // config.tp_size
        self._heads = range(config.rank * width, (config.rank + 1) * width)
        self._last_tokens = np.zeros(config.max_num_seqs, dtype=np.int32)
        self._cache: UInt64Array = np.zeros((0, config.block_size, width), dtype=np.uint64)
        self._vocab_size = 0
        self._last_end_s = 0.0

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
        )

    def join(self, meeting: int) -> None:
        self._collective.join(meeting)

    def allocate(self, num_blocks: int) -> None:
        if num_blocks != len(self._cache):
            self._cache = np.zeros((num_blocks, self._config.block_size, len(self._heads)), dtype=np.uint64)

    def launch(self, batch: InputBatch) -> _Done:
        start = time.perf_counter_ns()
        digests = self._collective.all_reduce(self.forward(batch))
        forward_end = time.perf_counter_ns()
        tokens = self.sample(batch, digests)
        sample_end = time.perf_counter_ns()
        self._wait_for_device()
        timings = plan_pb2.StepTimings(forward_ns=forward_end - start, sample_ns=sample_end - forward_end)
        return _Done(StepOutput(tokens, timings))

    def forward(self, batch: InputBatch) -> UInt64Array:
        """Writes the step's tokens and reads the sampling rows' histories; [S], this rank's part of their digests."""
        token_ids = np.where(batch.from_last_token, self._last_tokens[batch.token_slots], batch.token_ids)
        self._cache.reshape(-1, len(self._heads))[batch.slot_mapping] = truth.kv_words(token_ids, self._heads)
        lens = batch.context_lens[batch.sample_rows]
        num_blocks = -(-int(lens.max(initial=0)) // self._config.block_size)
        # Entries past a row's context are stale: masked by the digest, but they must be readable.
        tables = np.clip(batch.block_tables[batch.sample_rows, :num_blocks], 0, len(self._cache) - 1)
        words = self._cache[tables].reshape(len(lens), num_blocks * self._config.block_size, len(self._heads))
        return truth.digest(words, lens)

    def sample(self, batch: InputBatch, digests: UInt64Array) -> Int32Array:
        """[S] whole digests -> [S] tokens, kept as the slots' last ones."""
        suppressed = [np.zeros(0, dtype=np.int32)] * len(digests)
        for row, ids in batch.sampling.suppressed:
            suppressed[row] = ids
        tokens = truth.choose_tokens(
            digests,
            batch.output_positions,
            batch.sampling.temperature,
            batch.sampling.seed,
            suppressed,
            self._vocab_size,
        )
        self._last_tokens[batch.sample_slots] = tokens
        return tokens

    def abort(self) -> None:
        self._collective.abort()

    def leave(self) -> None:
        self._collective.leave()

    def close(self) -> None:
        self.leave()

    def _wait_for_device(self) -> None:
        """The modelled part of the step: nothing for the truth machine, ``stub_step_ms`` for load tests."""
        if not self._config.stub_step_ms:
            return
        end = max(self._last_end_s, time.monotonic()) + self._config.stub_step_ms / 1e3
        time.sleep(max(0.0, end - time.monotonic()))
        self._last_end_s = end
