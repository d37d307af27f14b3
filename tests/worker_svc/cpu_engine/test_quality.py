"""What 8-bit weights and activations cost on text that the demo model was not trained on; the measure is right."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from albireo.arrays import Int32Array
from albireo.model_spec import resolve_model
from worker_svc.cpu_engine import quality
from worker_svc.cpu_engine.quality import measure

HELD_OUT = ("wave.py", "zipapp.py")  # by tools/demo_model/corpus.py


@pytest.fixture(scope="module")
def demo() -> Path:
    return resolve_model("demo")


@pytest.fixture(scope="module")
def held_out(demo: Path) -> Int32Array:
    folder = Path(sysconfig.get_path("stdlib"))
    text = "\n".join((folder / name).read_text(encoding="utf-8") for name in HELD_OUT)
    return np.array(Tokenizer.from_file(str(demo / "tokenizer.json")).encode(text).ids, dtype=np.int32)


def test_w8a8_keeps_the_demo_models_quality(demo: Path, held_out: Int32Array) -> None:
    result = measure(demo, held_out)
    assert result.num_tokens > 5000
    assert 2 < result.perplexity < 60
    assert result.quantised_perplexity < 1.01 * result.perplexity
    assert result.top1_agreement > 0.95
    assert 0 < result.logit_error < 0.06


def test_the_measure_tells_a_bad_model(demo: Path, held_out: Int32Array, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are wrong in every second row halve the agreement."""
    real = quality._logits

    def spoilt(model_path: Path, quantize: str, windows: list[Int32Array]):  # type: ignore[no-untyped-def]
        for logits in real(model_path, "none", windows):
            if quantize != "none":
                logits[::2] = np.roll(logits[::2], 1, axis=-1)
            yield logits

    monkeypatch.setattr(quality, "_logits", spoilt)
    result = measure(demo, held_out[:2048])
    assert result.top1_agreement == pytest.approx(0.5, abs=0.02)
    assert result.quantised_perplexity > 2 * result.perplexity
    assert result.logit_error > 0.5


def test_perplexity_is_that_of_transformers(demo: Path, held_out: Int32Array) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    window = held_out[:200]
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    ids = torch.from_numpy(window.astype(np.int64))[None]
    with torch.inference_mode():
        expected = float(model(ids, labels=ids).loss.exp())
    assert measure(demo, window).perplexity == pytest.approx(expected, rel=0.01)
