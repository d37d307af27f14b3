"""What the eager engine alone does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_story import Story, engine_config

from albireo.errors import ConfigError
from albireo.plan import Rows, StepPlan
from albireo.v1 import plan_pb2
from albireo_kernels import reference
from checkpoints import make_checkpoint
from sampling_rows import SCHEMES
from worker_svc.torch_engine.engine import choose_device


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_device("auto"), choose_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_steps_tell_logprobs_and_remember_what_they_sampled(scheme: str, tmp_path: Path) -> None:
    """A sequence that never says a token twice, beside one that wants no logprobs."""
    make_checkpoint(tmp_path, "llama")
    story = Story("eager", replace(engine_config(tmp_path, tmp_path), sampler=scheme))
    never_twice = plan_pb2.Sampling(temperature=0.3, top_p=0.9, presence_penalty=1000.0, num_logprobs=2)
    new = story.new_sequence(0, 9), story.new_sequence(4, 5, never_twice)
    rows = Rows(np.array([0, 4], np.int32), np.array([9, 5], np.int32), np.ones(2, np.bool_))
    sampled = []
    for step in range(12):
        plan = StepPlan(0, step, rows, new_sequences=new) if step == 0 else StepPlan(0, step, None)
        output = story.engine.launch(story.state.apply(plan)).resolve()
        sampled.append(int(output.token_ids[1]))
        logprobs = output.logprobs
        assert logprobs is not None
        assert logprobs.indices.tolist() == [1]
        logits = torch.from_numpy(story.engine.recorded[-1][1])
        expected = reference.token_logprobs(logits, sampled[-1], 2)
        assert (logprobs.ranks.tolist(), logprobs.top_token_ids.tolist()) == ([expected.rank], expected.top_ids)
        actual = [*logprobs.logprobs, *logprobs.top_logprobs]
        np.testing.assert_allclose(actual, [expected.logprob, *expected.top_logprobs], rtol=0, atol=1e-5)
    story.engine.close()
    assert len(set(sampled)) == 12
