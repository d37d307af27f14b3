"""One thread: the tensors are tiny, and ranks share the machine."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # for engine_story, which the rank processes import as well


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
