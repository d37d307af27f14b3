"""How long steps take, as measured: what deadlines are judged by and what decoding sequences can wait for."""

import math

_DECAY = 0.98  # a step counts half as much 35 steps later
_LEAST_SPREAD = 1.0  # of prompt tokens: below it, their cost cannot be told from the rest


class StepRates:
    """A step's duration as base + slope * prompt tokens, by least squares over recent steps.

    Decoding sequences are part of the base, which follows their number as it changes.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.base_s = 0.0
        self.s_per_prefill_token = 0.0
        self.knows_prefill = False  # whether s_per_prefill_token is measured

    def observe(self, num_prefill_tokens: int, duration_s: float) -> None:
        x, y = float(num_prefill_tokens), duration_s
        self._weight = _DECAY * self._weight + 1
        self._x = _DECAY * self._x + x
        self._y = _DECAY * self._y + y
        self._xx = _DECAY * self._xx + x * x
        self._xy = _DECAY * self._xy + x * y
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance > _LEAST_SPREAD:
            self.knows_prefill = True
            self.s_per_prefill_token = max(0.0, (self._xy / self._weight - mean_x * mean_y) / variance)
        self.base_s = max(0.0, mean_y - self.s_per_prefill_token * mean_x)

    def least_s(self, num_prompt_tokens: int, num_output_tokens: int, max_step_tokens: int) -> float:
        """What a sequence takes at least when it starts now and nothing is in its way."""
        num_prefill_steps = max(1, math.ceil(num_prompt_tokens / max_step_tokens))
        num_steps = num_prefill_steps + max(0, num_output_tokens - 1)
        return num_steps * self.base_s + num_prompt_tokens * self.s_per_prefill_token

    def prefill_tokens_within(self, duration_s: float) -> int:
        """How many prompt tokens a step may have to last no longer; 0 when it lasts longer anyway."""
        if not self.s_per_prefill_token:
            return 1 << 30
        return max(0, int((duration_s - self.base_s) / self.s_per_prefill_token))
