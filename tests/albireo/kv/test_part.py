"""A part in its slot: what was written comes back, and nothing else does."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.kv.chain import anchors_of, split
from albireo.kv.fingerprint import Namespace, fingerprint_of
from albireo.kv.part import HEADER_BYTES, Bytes, PartName, Piece, holds_part, read_part, slot_bytes, write_part

NAME = PartName(b"f" * 32, b"h" * 32, 3)
RNG = np.random.default_rng(0)


def random_bytes(num: int) -> Bytes:
    return RNG.integers(0, 256, num, dtype=np.uint8)


def new_slot(num_bytes: int) -> Bytes:
    return random_bytes(slot_bytes(num_bytes))


@pytest.mark.parametrize("num_bytes", [1, 63, 64, 4096, 3 << 20])
def test_a_part_comes_back(num_bytes: int):
    payload, slot, target = random_bytes(num_bytes), new_slot(num_bytes), np.zeros(num_bytes, dtype=np.uint8)
    write_part(slot, NAME, [payload])
    assert read_part(slot, NAME, [target])
    np.testing.assert_array_equal(target, payload)


def test_pieces_are_strided_and_of_any_type():
    """A rank's part: some heads of some layers of one block, in the layout of its cache."""
    cache = RNG.standard_normal((4, 8, 6, 16)).astype(np.float32)  # [layers, blocks, heads, head_dim]
    other = np.zeros_like(cache)
    pieces = [cache[layer, 5, 2:4] for layer in range(4)] + [cache[:, 3, ::2, 1]]
    targets = [other[layer, 5, 2:4] for layer in range(4)] + [other[:, 3, ::2, 1]]
    num_bytes = sum(piece.nbytes for piece in pieces)
    slot = new_slot(num_bytes)
    write_part(slot, NAME, pieces)
    assert read_part(slot, NAME, targets)
    for piece, target in zip(pieces, targets, strict=True):
        np.testing.assert_array_equal(piece, target)
    assert np.count_nonzero(other) == num_bytes // 4


def test_cut_differently_it_is_the_same_part():
    """TP 2 writes what TP 1 reads."""
    payload, slot, target = random_bytes(6000), new_slot(6000), np.zeros((2, 3000), dtype=np.uint8)
    write_part(slot, NAME, [payload[:100], payload[100:]])
    assert read_part(slot, NAME, [target])
    np.testing.assert_array_equal(target.reshape(-1), payload)


@given(st.integers(0, 8 * (HEADER_BYTES + 500) - 1))
def test_any_flipped_bit_is_a_miss(bit: int):
    slot = new_slot(500)
    write_part(slot, NAME, [random_bytes(500)])
    slot[bit // 8] ^= 1 << bit % 8
    assert not read_part(slot, NAME, [np.zeros(500, dtype=np.uint8)])


@pytest.mark.parametrize(
    "other",
    [
        PartName(b"g" + b"f" * 31, NAME.block_hash, 3),
        PartName(NAME.fingerprint, b"h" * 31 + b"i", 3),
        PartName(NAME.fingerprint, NAME.block_hash, 2),
    ],
)
def test_another_part_is_a_miss(other: PartName):
    slot = new_slot(500)
    write_part(slot, NAME, [random_bytes(500)])
    assert holds_part(slot, NAME, 500)
    assert not holds_part(slot, other, 500)


@pytest.mark.parametrize("num_bytes", [499, 501, 576, 4096])
def test_another_length_is_a_miss(num_bytes: int):
    slot = new_slot(500)
    write_part(slot, NAME, [random_bytes(500)])
    assert not read_part(slot, NAME, [np.zeros(num_bytes, dtype=np.uint8)])


def test_a_slot_that_nobody_wrote_is_a_miss():
    assert not holds_part(np.zeros(slot_bytes(500), dtype=np.uint8), NAME, 500)


def test_a_torn_part_is_a_miss():
    """A writer that dies on the way leaves no header."""

    slot = new_slot(500)
    write_part(slot, NAME, [random_bytes(500)])
    pieces: list[Piece] = [random_bytes(250), np.array("no bytes", dtype=object)]
    with pytest.raises((TypeError, ValueError)):
        write_part(slot, NAME, pieces)
    assert not holds_part(slot, NAME, 500)


def test_a_reader_beside_a_writer_gets_one_part_or_none():
    """Two payloads are written by turns under one name: no read mixes them."""
    num_bytes = 64 << 10
    slot = new_slot(num_bytes)
    payloads = [np.full(num_bytes, value, dtype=np.uint8) for value in (1, 2)]
    write_part(slot, NAME, payloads[:1])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for payload in payloads:
                write_part(slot, NAME, [payload])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            target = np.zeros(num_bytes, dtype=np.uint8)
            if read_part(slot, NAME, [target]):
                assert (target == target[0]).all()
    finally:
        stop.set()
        writer.join()


def test_fingerprints_depend_on_every_fact_and_not_on_their_order():
    facts = {"model": "m", "dtype": "bfloat16", "layers": 2}
    assert fingerprint_of(facts) == fingerprint_of(dict(reversed(facts.items())))
    assert len({fingerprint_of(facts | {key: "other"}) for key in facts} | {fingerprint_of(facts)}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"short", 1, 1), "fingerprint of 5 bytes: 32"),
        ((b"f" * 32, 0, 1), "num_parts 0: 1 to 4096"),
        ((b"f" * 32, 1, (4 << 20) + 1), "part_bytes 4194305: 1 to 4194304"),
    ],
)
def test_namespaces_out_of_their_ranges(arguments: tuple[bytes, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        Namespace(*arguments)


def test_anchors_begin_every_run_of_64():
    hashes = [i.to_bytes(32, "little") for i in range(130)]
    anchors = anchors_of(hashes)
    assert anchors[:64] == [hashes[0][:8]] * 64
    assert anchors[64:128] == [hashes[64][:8]] * 64
    assert anchors[128:] == [hashes[128][:8]] * 2


def test_packed_ranges_are_whole():
    assert split(b"aabb", 2) == [b"aa", b"bb"]
    assert split(b"", 2) == []
    with pytest.raises(ValueError, match="3 bytes: no multiple of 2"):
        split(b"aab", 2)
