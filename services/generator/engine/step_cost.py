"""Learn what steps cost, so that the chunks of a prompt do not hold up streams."""

from __future__ import annotations

from collections import deque
from statistics import median

_NUM_SAMPLES = 8
_MIN_PREFILL_TOKENS = 16
_UNBOUNDED = 1 << 62


class StepCost:
    """How many prompt tokens fit into a step beside those that decode.

    A step takes as long as its decodes alone, and so much more for every prompt token; both are
    medians of the last steps. Prompts may bring a step to ``max_step_s``, or to twice its decodes
    where these alone take half of that or more: whatever the model, a stream keeps at least half of
    its pace, and prompts get on.
    """

    def __init__(self, max_step_s: float = 0.0) -> None:
        """Know nothing yet.

        Args:
            max_step_s: Seconds of a step with prompts in it; 0 never bounds them.
        """
        self._max_step_s = max_step_s
        # Seconds of steps that only decode, by the number of binary digits of their sequences.
        self._decode_s: dict[int, deque[float]] = {}
        self._prefill_token_s: deque[float] = deque(maxlen=_NUM_SAMPLES)

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from a step of ``num_decodes`` decodes and so many prompt tokens."""
        if not num_prefill_tokens:
            size = num_decodes.bit_length()
            samples = self._decode_s.setdefault(size, deque(maxlen=_NUM_SAMPLES))
            samples.append(seconds)
        elif num_prefill_tokens >= _MIN_PREFILL_TOKENS:
            # A few tokens cost what reading the weights costs, as decodes do.
            extra_s = max(0.0, seconds - self._seconds_of(max(1, num_decodes)))
            self._prefill_token_s.append(extra_s / num_prefill_tokens)

    def max_prefill_tokens(self, num_decodes: int) -> int:
        """Return how many prompt tokens to compute beside ``num_decodes`` decodes.

        Without bound if nothing decodes, if nothing is known yet, or if no bound was asked for.
        """
        if not self._max_step_s or not num_decodes or not self._prefill_token_s:
            return _UNBOUNDED
        token_s, decode_s = median(self._prefill_token_s), self._seconds_of(num_decodes)
        room_s = max(self._max_step_s - decode_s, decode_s)
        if room_s >= token_s * _UNBOUNDED:
            return _UNBOUNDED
        return max(_MIN_PREFILL_TOKENS, int(room_s / token_s))

    def _seconds_of(self, num_decodes: int) -> float:
        """Return what a step of ``num_decodes`` takes: as the measured ones nearest in size."""
        if not self._decode_s:
            return 0.0
        size = num_decodes.bit_length()
        return median(self._decode_s[min(self._decode_s, key=lambda known: abs(known - size))])
