"""What transformers generates, and the test of equality at the float32 level."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

# Where the two best logits of the oracle are closer than this, another order of float32 sums may choose the other.
MIN_GAP = 1e-3


@dataclass(frozen=True)
class Case:
    """A greedy request and its answer."""

    prompt: list[int]
    max_tokens: int
    expected: list[int]


class Oracle:
    """A checkpoint in transformers, float32, greedy."""

    def __init__(self, directory: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.vocab_size: int = self._model.config.vocab_size

    @torch.inference_mode()
    def generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Output tokens, the end-of-sequence token included."""
        ids = torch.tensor([prompt])
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
        )
        return output[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def gap(self, tokens: list[int]) -> float:
        """Between the two best logits after ``tokens``."""
        best = self._model(torch.tensor([tokens])).logits[0, -1].topk(2).values
        return float(best[0] - best[1])

    def assert_equal(self, case: Case, got: list[int]) -> None:
        """Equal tokens, or a first divergence at a near tie."""
        if got == case.expected:
            return
        pairs = zip(got, case.expected, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(case.expected)))
        gap = self.gap([*case.prompt, *case.expected[:first]])
        assert gap < MIN_GAP, f"prompt of {len(case.prompt)}: token {first} differs at a gap of {gap:.4f}"
