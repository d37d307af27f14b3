"""What quantisation costs in quality: ``python -m worker_svc.cpu_engine.quality MODEL --text FILE``.

The text goes through the model twice, with the weights as they are and quantised, window by window. Every token of a
window is scored.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from albireo.arrays import EMPTY_INT32, Float32Array, Int32Array
from albireo.model_spec import resolve_model
from albireo_kernels.cpu import load_library
from worker_svc.batch import InputBatch
from worker_svc.cpu_engine.engine import CpuEngine
from worker_svc.engine import BLOCK_SIZE, EngineConfig
from worker_svc.row_sampling import RowSampling

_WINDOW = 256  # tokens that are scored together


@dataclass(frozen=True, slots=True)
class Quality:
    """Of the quantised model, against the one with its weights as they are.

    Attributes:
        num_tokens: scored.
        perplexity, quantised_perplexity: of the text, each token given those before it in its window.
        top1_agreement: share of positions with the same most likely token.
        logit_error: root of the mean squared difference of logits, by their standard deviation.
    """

    num_tokens: int
    perplexity: float
    quantised_perplexity: float
    top1_agreement: float
    logit_error: float


def measure(model_path: Path, token_ids: Int32Array, progress: bool = False) -> Quality:
    """Scores a text with one rank.

    Args:
        token_ids: [n], cut into windows of 256; a rest shorter than two tokens is left out.
    """
    windows = [token_ids[start : start + _WINDOW] for start in range(0, len(token_ids) - 1, _WINDOW)]
    losses, quantised_losses, agreeing, squares, variance = 0.0, 0.0, 0, 0.0, 0.0
    num_tokens = 0
    passes = zip(_logits(model_path, "none", windows), _logits(model_path, "w8a8", windows), windows, strict=True)
    for logits, quantised, window in tqdm(passes, total=len(windows), unit="window", disable=not progress):
        losses += _loss(logits[:-1], window[1:])
        quantised_losses += _loss(quantised[:-1], window[1:])
        agreeing += int((logits[:-1].argmax(-1) == quantised[:-1].argmax(-1)).sum())
        squares += float(np.square(quantised[:-1] - logits[:-1]).mean(-1).sum())
        variance += float(logits[:-1].var(-1).sum())
        num_tokens += len(window) - 1
    return Quality(
        num_tokens=num_tokens,
        perplexity=math.exp(losses / num_tokens),
        quantised_perplexity=math.exp(quantised_losses / num_tokens),
        top1_agreement=agreeing / num_tokens,
        logit_error=math.sqrt(squares / variance),
    )


def _loss(logits: Float32Array, targets: Int32Array) -> float:
    """The sum of -log p of the targets [n] under logits [n, vocab_size]."""
    largest = logits.max(-1)
    log_sums = largest + np.log(np.exp((logits - largest[:, None]).astype(np.float64)).sum(-1))
    return float((log_sums - logits[np.arange(len(targets)), targets]).sum())


def _logits(model_path: Path, quantize: str, windows: Sequence[Int32Array]) -> Iterator[Float32Array]:
    """[tokens, vocab_size] of each window."""
    with tempfile.TemporaryDirectory(prefix="albireo-quality-") as run_dir:
        config = EngineConfig(
            model_path=model_path,
            rank=0,
            tp_size=1,
            run_dir=Path(run_dir),
            device="cpu",
            dtype="auto",
            max_num_seqs=_WINDOW,
            max_model_len=_WINDOW,
            max_num_batched_tokens=_WINDOW,
            kv_cache_gib=0.0,
            quantize=quantize,
        )
        engine = CpuEngine(config, load_library())
        try:
            engine.load(lambda _stage, _progress: None)
            engine.join(0)
            engine.allocate(_WINDOW // BLOCK_SIZE)
            for window in windows:
                yield engine.logits(_batch(window))
        finally:
            engine.close()


def _batch(window: Int32Array) -> InputBatch:
    """A row for each token of one sequence: the keys and values of all are written before the first row reads any."""
    count = len(window)
    rows = np.arange(count)
    zeros = np.zeros(count, dtype=np.int32)
    blocks = np.arange(-(-count // BLOCK_SIZE), dtype=np.int32)
    return InputBatch(
        slots=rows.astype(np.int32),
        query_starts=np.arange(count + 1),
        context_lens=(rows + 1).astype(np.int32),
        block_tables=np.ascontiguousarray(np.broadcast_to(blocks, (count, len(blocks)))),
        token_ids=window,
        from_last_token=np.zeros(count, dtype=np.bool_),
        token_slots=zeros,
        positions=rows,
        slot_mapping=rows,
        sample_tokens=rows,
        sample_slots=zeros,
        scored_token_ids=EMPTY_INT32,
        output_positions=rows,
        sampling=RowSampling.greedy(count),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="model directory, Hub id, or 'demo'")
    parser.add_argument("--text", required=True, type=Path, help="file with text that the model was not trained on")
    args = parser.parse_args()
    path = resolve_model(args.model)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    token_ids = np.array(tokenizer.encode(args.text.read_text(encoding="utf-8")).ids, dtype=np.int32)
    print(json.dumps(asdict(measure(path, token_ids, progress=True)), indent=2))  # noqa: T201  # its output


if __name__ == "__main__":
    main()
