"""Settings that all tests share."""

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from checkpoints import write_tokenizer
from needs import NO_REDIS

# A shell without job control starts background jobs with SIGINT ignored, nohup ignores SIGHUP, and the servers under
# test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A loaded machine is slow, not wrong; and a run in CI must not depend on its luck.
settings.register_profile("albireo", deadline=None, derandomize=True)
settings.load_profile("albireo")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was left out is said at the end, where nobody can miss it."""
    left_out = [report for report in terminalreporter.stats.get("skipped", ()) if NO_REDIS in str(report.longrepr)]
    if left_out:
        terminalreporter.write_line(f"LEFT OUT: {len(left_out)} tests of the KV store's Redis: {NO_REDIS}", red=True)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for those of unix sockets."""
    with tempfile.TemporaryDirectory(prefix="albireo-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def stub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory for the stub engine: a shape and a tokenizer, no weights."""
    directory = tmp_path_factory.mktemp("stub-model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1003,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory, vocab_size=1003)
    return directory
