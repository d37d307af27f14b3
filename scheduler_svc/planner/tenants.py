"""Fair shares between tenants: who has been served how much.

Service is counted in tokens, those of outputs twice (they cost more). Whoever has been served least goes first. A
tenant that comes (again) begins where the least served of the others is: idling saves nothing up.

Source: virtual token counter, "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024).
"""

import numpy as np

from albireo.arrays import Int32Array, Int64Array

_OUTPUT_WEIGHT = 2.0
_MAX_IDLE = 1024  # tenants without work whose counters are kept


class Tenants:
    """Tenants by index. Those without work are forgotten when there are many.

    Args:
        counts_tokens: `take_tokens` will ask.
    """

    def __init__(self, counts_tokens: bool = False) -> None:
        self._counts_tokens = counts_tokens
        self._indices: dict[str, int] = {}
        self._names: list[str] = []
        self._unused: list[int] = []
        self._served = np.zeros(8, dtype=np.float64)
        self._num_tokens = np.zeros(8, dtype=np.float64)  # served since they were taken
        self._num_sequences = np.zeros(8, dtype=np.int32)
        self.num_active = 0  # tenants with sequences that have not ended

    def enter(self, name: str) -> int:
        """A sequence of this tenant arrives; returns the tenant's index."""
        index = self._indices.get(name)
        if index is None:
            index = self._add(name)
        if self._num_sequences[index] == 0:
            active = self._num_sequences > 0
            if active.any():
                self._served[index] = max(self._served[index], self._served[active].min())
            self.num_active += 1
        self._num_sequences[index] += 1
        return index

    def leave(self, index: int) -> None:
        """A sequence of this tenant has ended."""
        self._num_sequences[index] -= 1
        if self._num_sequences[index] == 0:
            self.num_active -= 1
            if len(self._indices) - self.num_active > _MAX_IDLE:
                self._forget(index)

    def served(self, index: int) -> float:
        return float(self._served[index])

    def charge(self, index: int, num_tokens: int) -> None:
        """Prompt tokens are computed for this tenant."""
        self._served[index] += num_tokens
        self._num_tokens[index] += num_tokens

    def charge_outputs(self, tenant_of_slot: Int32Array, slots: Int64Array) -> None:
        """One output token for each of ``slots``. With one tenant at work there is nothing to compare."""
        if self.num_active > 1 or self._counts_tokens:
            num_tokens = np.bincount(tenant_of_slot[slots], minlength=len(self._served))
            self._served += _OUTPUT_WEIGHT * num_tokens
            self._num_tokens += num_tokens

    def name_of(self, index: int) -> str:
        return self._names[index]

    def index_of(self, name: str) -> int | None:
        """None: it is not known, so none of its sequences is here."""
        return self._indices.get(name)

    def take_tokens(self) -> dict[str, float]:
        """Prompt and output tokens by tenant, since the last time."""
        taken = {self._names[index]: float(self._num_tokens[index]) for index in self._num_tokens.nonzero()[0]}
        self._num_tokens[:] = 0
        return taken

    def _add(self, name: str) -> int:
        if self._unused:
            index = self._unused.pop()
            self._names[index] = name
        else:
            index = len(self._names)
            self._names.append(name)
            if index == len(self._served):
                self._served = np.concatenate([self._served, np.zeros_like(self._served)])
                self._num_tokens = np.concatenate([self._num_tokens, np.zeros_like(self._num_tokens)])
                self._num_sequences = np.concatenate([self._num_sequences, np.zeros_like(self._num_sequences)])
        self._served[index] = self._num_tokens[index] = 0.0
        self._indices[name] = index
        return index

    def _forget(self, index: int) -> None:
        del self._indices[self._names[index]]
        self._unused.append(index)
