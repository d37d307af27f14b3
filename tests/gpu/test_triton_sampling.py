"""The Triton kernels on a GPU, at a real vocabulary: every row against the oracle, for 1 to 8 shards in one process."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU and triton"),
]

if find_spec("triton") is not None:
    from albireo_kernels.reference import sampling as reference
    from albireo_kernels.reference.sampling import Params
    from albireo_kernels.triton import logprobs
    from albireo_kernels.triton.candidates import candidates, sort_keys
    from albireo_kernels.triton.draw import best, merge_and_draw
    from albireo_kernels.triton.edits import edit
    from albireo_kernels.triton.rows import make_rows
    from triton_cases import (
        compare,
        draw_from_candidates,
        draw_in_rounds,
        make_edits,
        make_shards,
        random_edits,
        random_logits,
        random_params,
        tile_of,
    )

VOCAB_SIZE = 151936
BATCHES = (1, 7, 64, 256)
TP_SIZES = (1, 2, 8)


@pytest.mark.parametrize("num_rows", BATCHES)
def test_rows_without_filters(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    params = [random_params(rng, max_top_k=1, no_filters=True) for _ in range(num_rows)]
    positions = rng.integers(2000, size=num_rows).tolist()
    logits = random_logits(rng, num_rows, VOCAB_SIZE).cuda()
    rows = make_rows(params, positions, "cuda")
    draws = {}
    for tp_size in TP_SIZES:
        records = [best(shard, rows) for shard in make_shards(logits, tp_size)]
        draws[tp_size] = merge_and_draw(*(torch.stack(part) for part in zip(*records, strict=True)), None, rows)
    assert compare(logits, params, positions, draws) <= 1 + num_rows // 20


@pytest.mark.parametrize("num_rows", BATCHES)
@pytest.mark.parametrize("width", [64, 256])
def test_rows_of_candidates(num_rows: int, width: int) -> None:
    rng = np.random.default_rng(num_rows)
    params = [random_params(rng, max_top_k=width) for _ in range(num_rows)]
    params = [each if 0 < each.top_k <= width else Params(seed=each.seed) for each in params]
    positions = rng.integers(2000, size=num_rows).tolist()
    logits = random_logits(rng, num_rows, VOCAB_SIZE).cuda()
    rows = make_rows(params, positions, "cuda")
    draws = {t: draw_from_candidates(make_shards(logits, t), rows, width) for t in TP_SIZES}
    assert compare(logits, params, positions, draws) <= 1 + num_rows // 20


@pytest.mark.parametrize("num_rows", BATCHES)
def test_rows_of_any_filter(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    params = [random_params(rng, max_top_k=VOCAB_SIZE) for _ in range(num_rows)]
    positions = rng.integers(2000, size=num_rows).tolist()
    logits = random_logits(rng, num_rows, VOCAB_SIZE).cuda()
    rows = make_rows(params, positions, "cuda")
    draws = {t: draw_in_rounds(make_shards(logits, t), rows) for t in TP_SIZES}
    assert compare(logits, params, positions, draws) <= 1 + num_rows // 20


def test_edits() -> None:
    """Bit for bit: no fused multiply-add, divisions correctly rounded."""
    rng = np.random.default_rng(0)
    params = [random_edits(rng, VOCAB_SIZE, index) for index in range(24)]
    logits = random_logits(rng, len(params), VOCAB_SIZE)
    expected = torch.stack([reference.edit(row, each) for row, each in zip(logits, params, strict=True)])
    for shard in make_shards(logits.cuda(), 4):
        edit(shard, make_edits(params, shard, VOCAB_SIZE))
        part = expected[:, shard.first_id : shard.first_id + shard.width]
        torch.testing.assert_close(shard.logits.cpu(), part, rtol=0, atol=0, equal_nan=True)


def test_logprobs() -> None:
    """Of finite logits: normalisers of the same bits for every number of shards; ranks and first tokens exact."""
    rng = np.random.default_rng(0)
    num_rows = 32
    logits = torch.from_numpy(rng.normal(size=(num_rows, VOCAB_SIZE)).astype(np.float32) * 4).round(decimals=2)
    tokens = torch.from_numpy(rng.integers(VOCAB_SIZE, size=num_rows))
    tokens[::2] = logits[::2].argmax(1)
    rows = make_rows([Params()] * num_rows, [0] * num_rows, "cuda")
    wanted = torch.full((num_rows,), 20, dtype=torch.int32, device="cuda")
    normalisers = []
    for tp_size in TP_SIZES:
        shards = make_shards(logits.cuda(), tp_size)
        values = torch.stack([logprobs.token_logits(shard, tokens.cuda()) for shard in shards]).amax(0)
        ranks = 1 + sum(logprobs.count_before(shard, tokens.cuda(), values) for shard in shards)
        parts = [logprobs.tile_sums(shard, tile_of(VOCAB_SIZE)) for shard in shards]
        keys = sort_keys(torch.stack([candidates(shard, rows, wanted, 32) for shard in shards]))
        found = logprobs.combine(parts, values, keys[:, :20])
        normalisers.append(logprobs.log_sum_exp(parts))
        for row in range(num_rows):
            expected = reference.token_logprobs(logits[row], int(tokens[row]), 20)
            assert int(ranks[row]) == expected.rank
            assert found.top_ids[row].tolist() == expected.top_ids
            assert float(found.logprobs[row]) == pytest.approx(expected.logprob, abs=2e-6)
    assert all(torch.equal(each, normalisers[0]) for each in normalisers)
