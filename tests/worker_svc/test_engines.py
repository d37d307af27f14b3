"""What the engines make of their configuration, and steps at the edges."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_story import Kind, Story, engine_config, make_engine
from transformers import AutoModelForCausalLM

from albireo.errors import ConfigError
from albireo.plan import NewSequence
from albireo.v1 import plan_pb2
from checkpoints import make_checkpoint
from worker_svc.engine import EngineConfig


@pytest.fixture(params=["eager", "compiled"])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    torch.set_num_threads(1)
    yield request.param
    while Story.untold:
        Story.untold.pop().engine.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen3")


def load(kind: Kind, config: EngineConfig) -> tuple[str, int, int]:
    engine = make_engine(kind, config)
    info = engine.load(lambda _stage, _progress: None)
    engine.close()
    return info.dtype, info.max_model_len, info.num_blocks


def test_info_tells_what_the_model_is(kind: Kind, checkpoint: Path, tmp_path: Path) -> None:
    info = Story(kind, engine_config(checkpoint, tmp_path)).info
    assert (info.device, info.dtype, info.vocab_size, info.eos_token_ids) == ("cpu", "float32", 1003, (2,))
    assert (info.max_model_len, info.num_blocks) == (128, 6 * 4)


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        (torch.float32, "auto", "float32"),
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "bfloat16"),  # on a CPU
        (torch.bfloat16, "float32", "float32"),
        (torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_dtype(kind: Kind, stored: torch.dtype, wanted: str, expected: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2", dtype=stored)
    assert load(kind, engine_config(tmp_path, tmp_path, dtype=wanted))[0] == expected


def test_max_model_len_is_the_model_s_and_not_above_it(kind: Kind, checkpoint: Path, tmp_path: Path) -> None:
    assert load(kind, engine_config(checkpoint, tmp_path, max_model_len=0))[1] == 512
    with pytest.raises(ConfigError, match=r"--max-model-len 513: .* has 512 positions"):
        load(kind, engine_config(checkpoint, tmp_path, max_model_len=513))


def test_a_tp_size_that_does_not_divide_the_model(kind: Kind, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tp 3"):
        load(kind, engine_config(checkpoint, tmp_path, tp_size=3))


def test_steps_without_sampling_rows_and_without_rows(kind: Kind, checkpoint: Path, tmp_path: Path) -> None:
    story = Story(kind, engine_config(checkpoint, tmp_path))
    times = story.step([(1, 20, False)], (story.new_sequence(1, 40),))
    assert times.forward_ns > 0
    assert times.end_at_ns - times.start_at_ns == times.forward_ns + times.sample_ns
    assert times.collective_ns == 0  # of one rank
    story.step([])
    story.step([(1, 20, True)])
    assert len(story.sequences[1].output) == 1


def test_closing_twice_is_closing_once(kind: Kind, checkpoint: Path, tmp_path: Path) -> None:
    story = Story(kind, engine_config(checkpoint, tmp_path))
    story.engine.close()
    story.engine.close()


@pytest.mark.parametrize("chunks", [[90], [1, 89], [31, 1, 1, 57], [32, 32, 26], [7] * 12 + [6]])
def test_logits_do_not_depend_on_the_chunks_of_a_prompt(
    kind: Kind, chunks: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    whole, chunked = (Story(kind, engine_config(checkpoint, tmp_path)) for _ in range(2))
    whole.step([(2, 90, True)], (whole.new_sequence(2, 90),))
    new = (chunked.new_sequence(2, 90),)
    for index, count in enumerate(chunks):
        chunked.step([(2, count, index == len(chunks) - 1)], new if index == 0 else ())
    torch.testing.assert_close(chunked.sequences[2].logits[0], whole.sequences[2].logits[0], rtol=0, atol=1e-4)


def test_a_resumed_sequence_goes_on_in_another_slot_as_if_never_preempted(
    kind: Kind, checkpoint: Path, tmp_path: Path
) -> None:
    """Noise goes by seed and output position, and the new slot's last token is not read before it is written."""
    sampling = plan_pb2.Sampling(temperature=1.0, top_p=1.0, seed=5)
    story = Story(kind, engine_config(checkpoint, tmp_path))
    story.step([(0, 30, True)], (story.new_sequence(0, 30, sampling),))
    for _ in range(7):
        story.step([(0, 1, True)])
    first = story.sequences[0]
    again = story.new_sequence(4, 33, sampling)
    tokens = np.array(first.prompt + first.output[:3], np.int32)
    story.step([(4, 33, True)], (NewSequence(4, tokens, 30, 0, again.block_table, sampling),))
    for _ in range(4):
        story.step([(4, 1, True)])
    assert story.sequences[4].output == first.output[3:]


def test_a_slot_s_next_sequence_starts_afresh(kind: Kind, checkpoint: Path, tmp_path: Path) -> None:
    story = Story(kind, engine_config(checkpoint, tmp_path))
    outputs = []
    for prompt in ([5, 6, 7], [8, 9], [5, 6, 7]):
        new = story.new_sequence(1, len(prompt))
        tokens = np.array(prompt, np.int32)
        story.step([(1, len(prompt), True)], (NewSequence(1, tokens, len(prompt), 0, new.block_table, new.sampling),))
        for _ in range(5):
            story.step()
        outputs.append(story.sequences[1].output)
    assert outputs[0] == outputs[2] != outputs[1]


def test_bfloat16_stays_near_transformers_in_bfloat16(kind: Kind, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    story = Story(kind, engine_config(tmp_path, tmp_path))
    story.step([(0, 60, True)], (story.new_sequence(0, 60),))
    story.step()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    sequence = story.sequences[0]
    with torch.inference_mode():
        expected = model(torch.tensor([sequence.prompt + sequence.output])).logits[0, 59:61].float()
    torch.testing.assert_close(torch.from_numpy(np.stack(sequence.logits)), expected, rtol=0, atol=0.15)
