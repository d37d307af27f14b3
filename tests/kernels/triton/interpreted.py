"""Checks that run in Triton's interpreter, in a process of their own: it must be chosen before triton is imported.

``python interpreted.py [NAME ...]`` prints a line of JSON for each: its name, CPU seconds, and what went wrong. SEED=1
... checks other cases. The interpreter takes some 10 ms for each program of a grid: sizes are as small as makes sense.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl

from albireo_kernels.reference import sampling as reference
from albireo_kernels.reference.sampling import Params
from albireo_kernels.triton import arithmetic, logprobs
from albireo_kernels.triton import candidates as candidates_module
from albireo_kernels.triton.candidates import candidates, sort_keys
from albireo_kernels.triton.draw import best, merge_and_draw
from albireo_kernels.triton.edits import count_tokens, edit
from albireo_kernels.triton.rows import Shard, make_rows
from triton_cases import (
    compare,
    draw_from_candidates,
    draw_in_rounds,
    expect,
    make_edits,
    make_shards,
    random_edits,
    random_logits,
    random_params,
    tile_of,
)

TP_SIZES = (1, 2, 4)
SEED = int(os.environ.get("SEED", "0")) * 100
MIN_KEY = -(1 << 63)


@triton.jit
def noise_kernel(ids, k0, k1, noise, hashes, N: tl.constexpr):
    lanes = tl.arange(0, N)
    row_ids, row_k0, row_k1 = tl.load(ids + lanes), tl.load(k0 + lanes), tl.load(k1 + lanes)
    tl.store(noise + lanes, arithmetic.gumbel_noise(row_ids, row_k0, row_k1))
    unsigned = row_ids.to(tl.uint32, bitcast=True)
    tl.store(hashes + lanes, arithmetic.fmix32(unsigned).to(tl.int32, bitcast=True))


@triton.jit
def masses_kernel(values, largest, weights, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(weights + lanes, arithmetic.masses(tl.load(values + lanes), tl.load(largest)))


@triton.jit
def log_kernel(values, logs, N: tl.constexpr):
    lanes = tl.arange(0, N)
    tl.store(logs + lanes, arithmetic.log(tl.load(values + lanes)))


def check_noise_is_the_oracles() -> None:
    """The hash bit for bit; both logarithms to 3e-7 of the noise or 1.2e-7, where noise is near 0."""
    rng = np.random.default_rng(SEED + 0)
    count = 1 << 16
    ids = torch.from_numpy(rng.integers(2**22, size=count).astype(np.int32))
    rows = make_rows([Params(seed=int(seed)) for seed in rng.integers(2**63, size=count)], range(count))
    noise, hashes = torch.empty(count), torch.empty(count, dtype=torch.int32)
    noise_kernel[(1,)](ids, rows.k0, rows.k1, noise, hashes, N=count)
    k0, k1 = rows.k0.long() & 0xFFFFFFFF, rows.k1.long() & 0xFFFFFFFF
    expected = reference.gumbel_noise(ids.long()[:, None], k0, k1)[:, 0]
    torch.testing.assert_close(noise, expected, rtol=5e-7, atol=2e-7)
    assert torch.equal(hashes.long() & 0xFFFFFFFF, reference.fmix32(ids.long()))


def check_logarithm_is_good_to_an_ulp() -> None:
    rng = np.random.default_rng(SEED + 0)
    near_one = 1 + rng.uniform(-0.3, 0.4, size=1 << 15)
    values = np.concatenate([near_one, 2.0 ** rng.uniform(-34, 6, size=1 << 15)]).astype(np.float32)
    logs = torch.empty(len(values))
    log_kernel[(1,)](torch.from_numpy(values), logs, N=len(values))
    exact = np.log(values.astype(np.float64))
    ulps = np.abs(logs.numpy() - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert ulps.max() < 1.5, ulps.max()


def check_masses_are_good_to_1e_7() -> None:
    rng = np.random.default_rng(SEED + 0)
    values = np.concatenate([rng.uniform(-40, 3, size=4093), [3, -1e30, -np.inf]]).astype(np.float32)
    weights = torch.empty(len(values), dtype=torch.int64)
    masses_kernel[(1,)](torch.from_numpy(values), torch.tensor([3.0]), weights, N=len(values))
    # The difference is rounded to float32 first, which the oracle's is not.
    exact = np.exp((values - np.float32(3)).astype(np.float64)) * 2.0**44
    assert np.all(np.abs(weights.numpy() - exact) <= 2e-7 * exact + 1)
    assert weights[-3:].tolist() == [1 << 44, 0, 0]
    infinite = torch.full((4,), torch.inf)
    masses_kernel[(1,)](infinite, infinite, weights, N=4)
    assert weights[:4].tolist() == [1 << 44] * 4


def check_edits_are_the_oracles() -> None:
    """Bit for bit, NaN as NaN, over shards with tiles that have no entries."""
    rng = np.random.default_rng(SEED + 1)
    for vocab_size in (1003, 4096):
        params = [random_edits(rng, vocab_size, index) for index in range(10)]
        logits = random_logits(rng, len(params), vocab_size)
        expected = torch.stack([reference.edit(row, each) for row, each in zip(logits, params, strict=True)])
        for tp_size in TP_SIZES:
            for shard in make_shards(logits, tp_size):
                edit(shard, make_edits(params, shard, vocab_size))
                part = expected[:, shard.first_id : shard.first_id + shard.width]
                torch.testing.assert_close(shard.logits, part, rtol=0, atol=0, equal_nan=True)


def check_counting_of_sampled_tokens() -> None:
    """Each token in the shard that has it, in the row's own line; rows without a line are left alone."""
    params = [Params(repetition_penalty=2.0, prompt=[3], output=[3, 900]), Params(), Params(presence_penalty=1.0)]
    tokens = torch.tensor([900, 3, 17])
    for shard in make_shards(torch.zeros(3, 1003), 4):
        edits = make_edits(params, shard, 1003)
        before = edits.counts.clone()
        count_tokens(tokens, shard, edits)
        for row, token in ((0, 900), (2, 17)):
            column = token - shard.first_id
            if 0 <= column < shard.width:
                before[2 - row, column] += 2
        assert torch.equal(edits.counts, before)


def check_best_of_rows_without_filters() -> None:
    rng = np.random.default_rng(SEED + 2)
    num_close = 0
    for vocab_size, num_rows in ((1003, 8), (9001, 4)):
        params = [random_params(rng, max_top_k=1, no_filters=True) for _ in range(num_rows)]
        positions = rng.integers(2000, size=len(params)).tolist()
        logits = random_logits(rng, len(params), vocab_size)
        rows = make_rows(params, positions)
        draws = {}
        for tp_size in TP_SIZES:
            records = [best(shard, rows) for shard in make_shards(logits, tp_size)]
            draws[tp_size] = merge_and_draw(*(torch.stack(part) for part in zip(*records, strict=True)), None, rows)
        num_close += compare(logits, params, positions, draws)
    assert num_close <= 3, num_close


def check_records_of_shards_without_values() -> None:
    """(-inf, NO_ID): of empty and masked shards; a row without any draws token 0."""
    rows = make_rows([Params(temperature=0.0), Params(), Params(top_k=3)], [0, 0, 0])
    masked = Shard(torch.full((3, 70), -torch.inf), 100)
    empty = Shard(torch.empty(3, 0), 170)
    records = [best(shard, rows) for shard in (masked, empty)]
    for scores, ids in records:
        assert scores.tolist() == [-np.inf] * 3
        assert ids.tolist() == [arithmetic.NO_ID] * 3
    keys = torch.stack([candidates(shard, rows, rows.top_k, 4) for shard in (masked, empty)])
    assert keys[1, 2].tolist() == [MIN_KEY] * 4
    tokens = merge_and_draw(*(torch.stack(part) for part in zip(*records, strict=True)), keys, rows)
    assert tokens.tolist() == [0, 0, 0]


def check_candidates_are_the_first_in_order() -> None:
    """As sets, of rows that want different numbers; ties, NaN, shards with fewer values, and both stages."""
    rng = np.random.default_rng(SEED + 3)
    for vocab_size, width, chunk in ((1003, 16, 4096), (9001, 256, 4096), (5003, 256, 1024)):
        logits = random_logits(rng, 4, vocab_size)
        logits[0] = 1.0
        wanted = torch.from_numpy(rng.integers(1, width + 1, size=4).astype(np.int32))
        rows = make_rows([Params(temperature=0.7)] * 4, [0] * 4)
        candidates_module.CHUNK = chunk  # small ones: more rounds
        for tp_size in (1, 4) if vocab_size < 2000 else (1,):
            for shard in make_shards(logits, tp_size):
                keys = candidates(shard, rows, wanted, width)
                for row, count in enumerate(wanted.tolist()):
                    values = torch.where(shard.logits[row].isnan(), -torch.inf, shard.logits[row] / 0.7)
                    order = values.sort(descending=True, stable=True).indices[:count] + shard.first_id
                    ids = 2**22 - 1 - (keys[row][keys[row] != MIN_KEY] & (2**22 - 1))
                    assert sorted(ids.tolist()) == sorted(order.tolist()), (vocab_size, row)
    candidates_module.CHUNK = 4096


def check_rows_of_candidates() -> None:
    rng = np.random.default_rng(SEED + 4)
    num_close = 0
    for vocab_size, width, num_rows in ((1003, 256, 5), (5003, 64, 3)):
        params = [random_params(rng, max_top_k=width) for _ in range(num_rows)]
        params = [each if has_only_candidates(each) else Params(seed=each.seed) for each in params]
        positions = rng.integers(2000, size=len(params)).tolist()
        logits = random_logits(rng, len(params), vocab_size)
        rows = make_rows(params, positions)
        draws = {
            t: draw_from_candidates(make_shards(logits, t), rows, width) for t in (TP_SIZES if num_rows > 3 else (1, 4))
        }
        num_close += compare(logits, params, positions, draws)
    assert num_close <= 3, num_close


def has_only_candidates(params: Params) -> bool:
    """Greedy, of top_k, or without filters: what needs no rounds."""
    return params.top_k > 0 or params.temperature < 1e-5 or (params.top_p >= 1 and params.min_p == 0)


def check_rows_of_any_filter_in_rounds() -> None:
    """The radix select: any top-k, top-p over the whole vocabulary, min-p alone, all of them, and none."""
    rng = np.random.default_rng(SEED + 5)
    num_close = 0
    for vocab_size, num_rows in ((1003, 6), (4096, 2)):
        params = [random_params(rng, max_top_k=vocab_size) for _ in range(num_rows)]
        positions = rng.integers(2000, size=len(params)).tolist()
        logits = random_logits(rng, len(params), vocab_size)
        rows = make_rows(params, positions)
        draws = {t: draw_in_rounds(make_shards(logits, t), rows) for t in (TP_SIZES if num_rows > 2 else (1, 4))}
        num_close += compare(logits, params, positions, draws)
    assert num_close <= 3, num_close


def check_a_nucleus_that_ends_among_equals() -> None:
    """p cuts equal values by id, over shards: 0.31 of 100 equal tokens is the first 31, whatever noise says."""
    vocab_size = 100
    logits = torch.zeros(1, vocab_size)
    for seed in (1, 2):
        params = [Params(top_p=0.305, seed=seed)]
        rows = make_rows(params, [0])
        tokens = {int(draw_in_rounds(make_shards(logits, t), rows)[0]) for t in (1, 4)}
        assert tokens == {expect(logits[0], params[0], 0).token}
        assert max(tokens) < 31


def check_logprobs() -> None:
    """Normaliser, ranks, first tokens against the oracle; the same bits for every number of shards."""
    rng = np.random.default_rng(SEED + 6)
    for vocab_size in (1003, 3001):
        logits = random_logits(rng, 4, vocab_size)
        logits[:3] = torch.from_numpy(rng.normal(size=(3, vocab_size)).astype(np.float32) * 4)
        logits[2, 100:300] = 7.0
        logits = logits.nan_to_num(nan=torch.nan, posinf=3.0, neginf=-torch.inf)
        tokens = torch.from_numpy(rng.integers(vocab_size, size=4))
        tokens[2] = 200
        raw = make_rows([Params()] * 4, [0] * 4)
        wanted = torch.full((4,), 20, dtype=torch.int32)
        first: logprobs.TokenLogprobs | None = None
        for tp_size in (1, 4) if vocab_size < 2000 else (1, 2):
            shards = make_shards(logits, tp_size)
            values = torch.stack([logprobs.token_logits(shard, tokens) for shard in shards]).amax(0)
            ranks = 1 + sum(logprobs.count_before(shard, tokens, values) for shard in shards)
            parts = [logprobs.tile_sums(shard, tile_of(vocab_size)) for shard in shards]
            keys = sort_keys(torch.stack([candidates(shard, raw, wanted, 32) for shard in shards]))
            found = logprobs.combine(parts, values, keys[:, :20])
            for row in range(4):
                expected = reference.token_logprobs(logits[row], int(tokens[row]), 20)
                assert int(ranks[row]) == expected.rank
                if torch.where(logits[row].isnan(), -torch.inf, logits[row]).max() > -torch.inf:
                    assert found.top_ids[row].tolist() == expected.top_ids
                    np.testing.assert_allclose(float(found.logprobs[row]), expected.logprob, rtol=0, atol=2e-7)
                    np.testing.assert_allclose(found.top_logprobs[row], expected.top_logprobs, rtol=0, atol=2e-7)
            first = first or found
            for mine, others in zip(found, first, strict=True):
                assert torch.equal(mine.nan_to_num(), others.nan_to_num())


def checks() -> dict[str, Callable[[], None]]:
    return {name: each for name, each in globals().items() if name.startswith("check_")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # infinities and NaN are part of the data
    for name, check in checks().items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        start = time.process_time()
        try:
            check()
            error = None
        except Exception:  # noqa: BLE001 - it is reported
            error = traceback.format_exc()
        seconds = round(time.process_time() - start, 2)
        sys.stdout.write(json.dumps({"name": name, "seconds": seconds, "error": error}) + "\n")
        sys.stdout.flush()
