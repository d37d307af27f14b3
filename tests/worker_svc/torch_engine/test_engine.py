"""What the eager engine alone does."""

import pytest
import torch

from albireo.errors import ConfigError
from worker_svc.torch_engine.engine import choose_device


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_device("auto"), choose_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(ConfigError, match="no GPU"):
        choose_device("cuda")
