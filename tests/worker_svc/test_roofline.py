"""The modelled length of a step, against numbers worked out by hand."""

import numpy as np
import pytest

from albireo.errors import ConfigError
from albireo.plan import NewSequence, Rows, StepPlan
from albireo.v1 import plan_pb2
from worker_svc.batch import BatchState
from worker_svc.stub.roofline import (
    DEVICES,
    MODELS,
    StepSeconds,
    StepShape,
    all_reduce_seconds,
    make_step_model,
    shape_of,
    step_seconds,
)

H100, QWEN_32B = DEVICES["h100"], MODELS["qwen2.5-32b"]


def decode(num_rows: int, context: int) -> StepShape:
    return StepShape(num_rows, num_rows, num_rows * context, num_rows * context)


@pytest.mark.parametrize(
    ("name", "billions"),  # the published sizes less the embedding table, which forward does not multiply by
    [("qwen2.5-7b", 7.07), ("qwen2.5-14b", 13.99), ("qwen2.5-32b", 31.98), ("llama-3.1-70b", 69.50)],
)
def test_models_have_the_published_number_of_weights(name: str, billions: float):
    model = MODELS[name]
    assert (model.layer_params + model.head_params) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_small_decode_takes_the_time_to_read_the_weights():
    """32B in bfloat16 at t = 4: 63.97 GB of weights and 0.13 GB of KV at 4 x 3.35 TB/s take 4.78 ms; 128 all-reduces of
    10 KiB, 6 us each and 34 ns of transfer, .77 ms; launching 20 us."""
    seconds = step_seconds(decode(1, 512), QWEN_32B, H100, 4)
    assert QWEN_32B.kv_bytes_per_token == 262_144
    assert seconds.collective_s == pytest.approx(128 * (6e-6 + 1.5 * 10_240 / 450e9))
    assert seconds.forward_s == pytest.approx(4.784e-3 + 0.772e-3 + 0.02e-3, rel=1e-3)
    assert seconds.sample_s < 30e-6
    assert seconds.total_s == seconds.forward_s + seconds.sample_s


def test_a_large_prefill_takes_the_time_to_multiply():
    """8192 tokens of 31.2e9 weights: 511 TFLOP, and 33.6e6 pairs of attention, 44 TFLOP, at 989 TFLOP/s."""
    pairs = 8192 * 8193 // 2
    seconds = step_seconds(StepShape(8192, 0, 8192, pairs), QWEN_32B, H100, 1)
    flops = 2 * 8192 * QWEN_32B.layer_params + 4 * 64 * 5120 * pairs
    assert flops / 1e12 == pytest.approx(511.3 + 44.0, rel=1e-3)
    assert seconds.forward_s == pytest.approx(flops / 989e12 + 20e-6)
    assert (seconds.sample_s, seconds.collective_s) == (0, 0)


def test_reading_kv_stops_to_scale_where_ranks_share_heads():
    """Qwen2.5-7B has 4 KV heads: at t = 8 each is read twice."""
    model = MODELS["qwen2.5-7b"]
    shape = decode(256, 8192)
    kv_s = 256 * 8192 * model.kv_bytes_per_token / 3.35e12
    weights_s = 2 * (model.layer_params + model.head_params) / 3.35e12
    times = {tp: step_seconds(shape, model, H100, tp) for tp in (4, 8)}
    without = {tp: time.forward_s - time.collective_s - 20e-6 for tp, time in times.items()}
    assert without[4] == pytest.approx((weights_s + kv_s) / 4)
    assert without[8] == pytest.approx((weights_s + 2 * kv_s) / 8)


def test_sampling_is_sharded_over_the_ranks():
    """256 rows of 152064 float32 logits, 156 MB, three passes: 139 us on one H100, a quarter of that on each of four,
    where the candidates have to be gathered, too."""
    alone = step_seconds(decode(256, 1), QWEN_32B, H100, 1).sample_s
    shared = step_seconds(decode(256, 1), QWEN_32B, H100, 4).sample_s
    assert alone == pytest.approx(139.4e-6 + 20e-6, rel=1e-3)
    assert shared == pytest.approx(34.86e-6 + 20e-6 + 6e-6 + 3 * 256 * 16 / 450e9, rel=1e-3)


def test_an_all_reduce_of_one_rank_is_none():
    assert all_reduce_seconds(1e9, H100, 1) == 0
    assert all_reduce_seconds(450e6, H100, 2) == pytest.approx(6e-6 + 1e-3)


def test_a_step_without_tokens_is_a_launch():
    assert step_seconds(StepShape(0, 0, 0, 0), QWEN_32B, H100, 4).total_s == pytest.approx(20e-6)


def test_the_shape_of_a_batch():
    """A chunk of 3 tokens after 2 attends to 3 + 4 + 5 of them, a decode of the sixth token to 6."""
    state = BatchState(4, 64, 4, 64, 100, 64)
    tokens, blocks = np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)
    new = [
        NewSequence(slot, tokens, 5, computed, blocks, plan_pb2.Sampling())
        for slot, computed in ((0, 2), (1, 0), (2, 4))
    ]
    rows = Rows(np.array([0, 2], np.int32), np.array([3, 1], np.int32), np.array([False, True]))
    assert shape_of(state.apply(StepPlan(1, 0, rows, new_sequences=tuple(new)))) == StepShape(4, 1, 10, 3 + 4 + 5 + 5)
    rows = Rows(np.array([2], np.int32), np.array([1], np.int32), np.array([True]))
    assert shape_of(state.apply(StepPlan(1, 1, rows))) == StepShape(1, 1, 6, 6)


def test_flags_that_do_not_go_together():
    assert make_step_model(0, "none", "none", 4) is None
    fixed = make_step_model(20, "none", "none", 4)
    assert fixed is not None
    assert fixed.fixed_s == StepSeconds(0.02).total_s
    with pytest.raises(ConfigError, match="go together"):
        make_step_model(0, "h100", "none", 4)
    with pytest.raises(ConfigError, match="--stub-step-ms"):
        make_step_model(5, "h100", "qwen2.5-7b", 4)
