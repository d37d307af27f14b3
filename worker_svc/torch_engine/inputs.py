"""A step's inputs on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from albireo_kernels.reference import AttentionGroup, group_rows, to_device
from worker_svc.batch import InputBatch
from worker_svc.engine import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Inputs of one step of N tokens, after S of which comes a sampling row; all but the groups are int64 tensors.

    Attributes:
        token_ids, positions, slot_mapping: [N].
        sample_tokens: [S], which ones.
        sample_slots: [K], of those rows that draw: the first ones.
        attention_groups: the rows, grouped for attention.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    sample_tokens: Tensor
    sample_slots: Tensor
    attention_groups: tuple[AttentionGroup, ...]


def prepare_inputs(
    batch: InputBatch, last_tokens: Tensor, sliding_window: int | None, device: torch.device
) -> StepInputs:
    """Moves a batch to the device, where tokens sampled by earlier steps are filled in.

    Args:
        last_tokens: [max_num_seqs] int64, the token last sampled in each slot.
    """
    token_ids = to_device(batch.token_ids, device)
    if batch.from_last_token.any():
        sampled = last_tokens[to_device(batch.token_slots, device)]
        token_ids = torch.where(to_device(batch.from_last_token, device, torch.bool), sampled, token_ids)
    return StepInputs(
        token_ids=token_ids,
        positions=to_device(batch.positions, device),
        slot_mapping=to_device(batch.slot_mapping, device),
        sample_tokens=to_device(batch.sample_tokens, device),
        sample_slots=to_device(batch.sample_slots, device),
        attention_groups=group_rows(
            batch.query_starts, batch.context_lens, batch.block_tables, BLOCK_SIZE, sliding_window, device
        ),
    )
