"""One completion's life, without I/O and without a clock: tokens and the planner's verdict in, deltas out.

Both client APIs run on it. Tokens gather until a delta is taken, so that a slow client gets fewer and larger ones.
"""

from dataclasses import dataclass, field

from albireo.logprobs import Logprobs
from albireo.v1 import frontend_pb2, generation_pb2
from scheduler_svc.frontend.logprobs import TokenLogprobs, WaitingLogprobs
from scheduler_svc.frontend.text import StopMatcher, TextStream

_BYTES_PER_TOKEN = 40  # an int and its place in a list


@dataclass(frozen=True)
class Finish:
    """How a completion ended. Timings are absent when a stop string ended it: the planner reports none then."""

    reason: generation_pb2.FinishReason
    num_output_tokens: int
    matched_token_id: int | None = None
    matched_stop_str: str | None = None
    timings: generation_pb2.Timings | None = None


@dataclass(slots=True)
class Delta:
    """What is new in one completion. False when there is nothing to tell.

    Attributes:
        logprobs: parallel to the tokens where they are wanted, else empty.
        prompt_logprobs: of the prompt's tokens but the first, in a completion's first delta, where they are wanted.
    """

    index: int
    is_first: bool
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    num_cached_tokens: int = 0  # of the prompt
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: WaitingLogprobs | None = None

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.text or self.finish)


class Completion:
    """Args:
    index: which of the request's completions.
    end_ids: the token ids that end the sequence at the planner; their text is never given out.
    wants_end_token: whether the token ids include the one of ``end_ids`` that ended the sequence.
    min_tokens: a stop string that is complete before so many tokens does not count.
    text: absent when neither text nor stop strings are wanted, which saves detokenising.
    matcher: absent without stop strings.
    """

    def __init__(
        self,
        index: int,
        end_ids: frozenset[int],
        wants_end_token: bool,
        min_tokens: int = 0,
        text: TextStream | None = None,
        matcher: StopMatcher | None = None,
    ) -> None:
        self.index = index
        self.finish: Finish | None = None
        self.num_tokens = 0  # received, but for one that ended it
        self.num_cached_tokens = 0  # of the prompt
        self.num_waiting_bytes = 0  # about what was received and not taken
        self._end_ids = end_ids
        self._wants_end_token = wants_end_token
        self._min_tokens = min_tokens
        self._text = text
        self._matcher = matcher
        self._suspect: int | None = None  # one of end_ids; the planner's verdict on it is still to come
        self._end_token: int | None = None
        self._token_ids: list[int] = []  # not taken yet
        self._logprobs: WaitingLogprobs | None = None  # of all tokens that came, whatever becomes of them
        self._pieces: list[str] = []  # text of _token_ids; only kept here with a matcher
        self._is_first = True

    def receive(self, token_ids: list[int], logprobs: Logprobs | None = None) -> int | None:
        """Adds tokens, with logprobs of all of them or none. Returns how many tokens the completion keeps when a stop
        string ends it here, else None.

        Only a request with stop strings is detokenised here, so that its sequence ends at once even when its client is
        slow; all others are when a delta is taken, many tokens at a time.
        """
        if self.finish is not None or not token_ids:
            return None
        if logprobs is not None:
            self._add_logprobs(logprobs, len(token_ids))
        if self._suspect is not None:
            token_ids = [self._suspect, *token_ids]
            self._suspect = None
        if token_ids[-1] in self._end_ids:
            self._suspect = token_ids[-1]
            token_ids = token_ids[:-1]
        return self._add(token_ids)

    def end(self, ended: frontend_pb2.Ended) -> None:
        """The planner says that the sequence is over; it sent all of its tokens before."""
        if self.finish is not None:
            return
        matched_token_id = ended.matched_token_id if ended.HasField("matched_token_id") else None
        if self._suspect is not None and self._suspect != matched_token_id:
            suspect, self._suspect = self._suspect, None
            if self._add([suspect]) is not None:
                return
        if self._matcher is not None and self._text is not None:
            if self._match(self._text.finish()):
                self._finish_at_stop_string()
                return
            self._pieces.append(self._matcher.finish())
        self._end_token = self._suspect
        self.finish = Finish(
            reason=ended.reason,
            num_output_tokens=ended.num_output_tokens,
            matched_token_id=matched_token_id,
            timings=ended.timings if ended.HasField("timings") else None,
        )

    def take(self) -> Delta:
        """All that is new since the last delta."""
        token_ids, self._token_ids = self._token_ids, []
        self.num_waiting_bytes = 0
        if self._matcher is not None:
            text = "".join(self._pieces)
            self._pieces = []
        elif self._text is not None:
            text = self._text.push(token_ids) if token_ids else ""
            if self.finish is not None:
                text += self._text.finish()
        else:
            text = ""
        if self._end_token is not None and self._wants_end_token:
            token_ids.append(self._end_token)
        logprobs = self._logprobs.take(len(token_ids)) if self._logprobs is not None else []
        delta = Delta(self.index, self._is_first, token_ids, text, self.finish, self.num_cached_tokens, logprobs)
        self._is_first = self._is_first and not delta
        return delta

    def _add_logprobs(self, logprobs: Logprobs, num_tokens: int) -> None:
        if len(logprobs.logprobs) != num_tokens:
            raise ValueError(f"{len(logprobs.logprobs)} logprobs came with {num_tokens} tokens")
        if self._logprobs is None:
            self._logprobs = WaitingLogprobs()
        self.num_waiting_bytes += self._logprobs.add(logprobs)

    def _add(self, token_ids: list[int]) -> int | None:
        self.num_waiting_bytes += _BYTES_PER_TOKEN * len(token_ids)
        if self._matcher is None or self._text is None:
            self.num_tokens += len(token_ids)
            self._token_ids.extend(token_ids)
            return None
        for token_id in token_ids:
            self.num_tokens += 1
            self._token_ids.append(token_id)
            if self._match(self._text.push((token_id,))):
                return self._finish_at_stop_string()
        return None

    def _match(self, piece: str) -> bool:
        """Passes text through the matcher; true when a stop string ends it."""
        assert self._matcher is not None
        if piece:
            self.num_waiting_bytes += len(piece)
            self._pieces.append(self._matcher.push(piece, armed=self.num_tokens >= self._min_tokens))
        return self._matcher.matched is not None

    def _finish_at_stop_string(self) -> int:
        assert self._matcher is not None
        self.finish = Finish(
            reason=generation_pb2.FINISH_REASON_STOP,
            num_output_tokens=self.num_tokens,
            matched_stop_str=self._matcher.matched,
        )
        return self.num_tokens
