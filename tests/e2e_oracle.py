"""What transformers generates, what a server does, and the test of equality at the float32 level."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from albireo.rpc import make_channel
from albireo.v1 import generation_pb2, generation_pb2_grpc

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


async def generate_completions(target: str, case: Case, num: int) -> tuple[list[list[int]], list[int]]:
    """Several completions of one request; token ids of each, and how much of its prompt was cached."""
    params = generation_pb2.SamplingParams(temperature=0, max_tokens=case.max_tokens, n=num)
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=case.prompt), sampling_params=params)
    tokens: list[list[int]] = [[] for _ in range(num)]
    cached = [0] * num
    async with make_channel(target) as channel:
        async for response in generation_pb2_grpc.GenerationStub(channel).Generate(request):
            tokens[response.index] += response.token_ids
            if response.HasField("finish"):
                cached[response.index] = response.finish.usage.cached_tokens
    return tokens, cached
