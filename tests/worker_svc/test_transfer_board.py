"""A transfer is over when all ranks have told."""

import numpy as np
from arena_server import places, transfer

from albireo.transfers import KvLease, Transfer, TransferKind, TransferResult
from worker_svc.transfer_board import TransferBoard


def store(num_blocks: int) -> Transfer:
    blocks = list(range(num_blocks))
    return transfer(TransferKind.STORE, blocks, blocks, places(0, num_blocks, 8, 256), KvLease(bytes(16), 0, 0))


def result_of(transfer: Transfer, succeeded: list[int], num_bytes: int, duration_ns: int) -> TransferResult:
    return TransferResult(transfer.transfer_id, np.array(succeeded, np.bool_), num_bytes, duration_ns)


def test_a_block_has_moved_where_all_ranks_have_moved_it():
    board, first, second = TransferBoard(2), store(3), store(1)
    board.put([first, second])
    assert board.add(result_of(first, [1, 1, 0], 20, 5)) is None
    assert board.add(result_of(second, [1], 10, 8)) is None
    combined = board.add(result_of(first, [0, 1, 1], 30, 4))
    assert combined is not None
    assert (combined.transfer_id, combined.succeeded.tolist()) == (first.transfer_id, [False, True, False])
    assert (combined.num_bytes, combined.duration_ns) == (50, 5)
    assert not board.is_clear.is_set()
    assert board.add(result_of(second, [1], 10, 8)) is not None
    assert board.is_clear.is_set()


def test_of_a_broken_group_nothing_counts():
    board, first = TransferBoard(2), store(1)
    board.put([first])
    board.add(result_of(first, [1], 10, 1))
    board.clear()
    assert board.is_clear.is_set()
    assert board.add(result_of(first, [1], 10, 1)) is None
