"""Who owns which bytes of the arena: segments of shelves, cut into frames of one block each."""

from kvstore_svc.blocks import Block, Segment, Shelf


class Frames:
    """The arena's segments. A frame is named by its offset in the arena, bytes.

    A segment that is empty belongs to nobody, and the next shelf that needs room cuts it into frames of its own size.
    """

    def __init__(self, arena_bytes: int, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.segments = [Segment(base) for base in range(0, arena_bytes - segment_bytes + 1, segment_bytes)]
        self._unowned = self.segments[::-1]
        # Owned ones with a free frame; a dict keeps the order in which they came.
        self._open: dict[Shelf, dict[int, Segment]] = {}

    @property
    def num_bytes(self) -> int:
        return len(self.segments) * self.segment_bytes

    def per_segment(self, shelf: Shelf) -> int:
        return self.segment_bytes // shelf.namespace.frame_bytes

    def num_free(self, shelf: Shelf) -> int:
        """Frames that the shelf can have without an eviction."""
        own = sum(len(segment.free) for segment in self._open.get(shelf, {}).values())
        return own + len(self._unowned) * self.per_segment(shelf)

    def take(self, shelf: Shelf) -> int | None:
        """A free frame; None when there is none."""
        opened = self._open.setdefault(shelf, {})
        if not opened:
            if not self._unowned:
                return None
            self._hand_over(self._unowned.pop(), shelf)
        segment = next(iter(opened.values()))
        frame = segment.free.pop()
        if not segment.free:
            del opened[segment.base]
        shelf.num_frames += 1
        return frame

    def give_back(self, frame: int) -> None:
        segment = self.segment_of(frame)
        shelf = segment.shelf
        assert shelf is not None
        segment.free.append(frame)
        shelf.num_frames -= 1
        opened = self._open.setdefault(shelf, {})
        opened[segment.base] = segment
        if len(segment.free) == segment.num_frames:
            del opened[segment.base]
            segment.shelf, segment.free, segment.num_frames = None, [], 0
            shelf.num_segments -= 1
            self._unowned.append(segment)
        if not opened:
            del self._open[shelf]

    def place(self, block: Block) -> None:
        self.segment_of(block.frame).blocks[block.frame] = block

    def remove(self, block: Block) -> None:
        del self.segment_of(block.frame).blocks[block.frame]

    def segment_of(self, offset: int) -> Segment:
        return self.segments[offset // self.segment_bytes]

    def frame_bytes_at(self, frame: int) -> int:
        shelf = self.segment_of(frame).shelf
        return shelf.namespace.frame_bytes if shelf else 0

    def block_at(self, offset: int) -> tuple[Block, int] | None:
        """The block whose frame holds this byte, and the byte's place in the frame; None: there is no block."""
        if not 0 <= offset < self.num_bytes:
            return None
        segment = self.segment_of(offset)
        if segment.shelf is None:
            return None
        place = (offset - segment.base) % segment.shelf.namespace.frame_bytes
        block = segment.blocks.get(offset - place)
        return None if block is None else (block, place)

    def idle_elsewhere(self, shelf: Shelf) -> list[Segment]:
        """Segments of other shelves in which everything may be evicted."""
        if len(self.segments) == len(self._unowned) + shelf.num_segments:
            return []  # as a rule: one model has all
        return [each for each in self.segments if each.shelf not in (shelf, None) and each.is_idle]

    def _hand_over(self, segment: Segment, shelf: Shelf) -> None:
        frame_bytes = shelf.namespace.frame_bytes
        segment.shelf, segment.num_frames = shelf, self.per_segment(shelf)
        shelf.num_segments += 1
        segment.free = [segment.base + frame_bytes * i for i in reversed(range(segment.num_frames))]
        self._open[shelf][segment.base] = segment
