"""When this process tries an endpoint that is DOWN for itself, and what came of it last.

The first try of an outage comes at once, those after it later and later, up to about as seldom as the coordinator looks
itself (`downinter`): in `t` seconds `n` processes connect at most `n * (4 + t / 5)` times to an endpoint, however many
of their threads and groups want it.

Threads.  Any thread asks; single item stores carry what is shared.  Two threads that ask at the same instant may both
    try.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shmpool.chance import chance
from shmpool.clock import monotonic

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 5.0
JITTER: Final = 0.5  # of the pause, on top of it
_DOUBLINGS: Final = 10  # more than it takes to the longest pause
_TOLD_CHARS: Final = 300


class _Trial(NamedTuple):
    epoch: int  # of the endpoint: another one is another outage
    at: float  # monotonic: when it ended, or began if it is under way
    pause: float  # until the next one
    failures: int
    told: str


class Trials:
    """Made by each attachment; endpoints by index."""

    def __init__(self) -> None:
        self._last: dict[int, _Trial] = {}

    def is_due(self, endpoint: int, epoch: int) -> bool:
        """Whether an endpoint may be tried now."""
        last = self._of(endpoint, epoch)
        return last is None or monotonic() >= last.at + last.pause

    def begin(self, endpoint: int, epoch: int) -> bool:
        """Note that a try begins; False: another thread was faster."""
        if not self.is_due(endpoint, epoch):
            return False
        last = self._of(endpoint, epoch)
        failures, told = (0, "") if last is None else (last.failures, last.told)
        self._last[endpoint] = _Trial(epoch, monotonic(), LONGEST_PAUSE_S, failures, told)
        return True

    def failed(self, endpoint: int, error: Exception) -> None:
        """Note why the try that began last was in vain; the next one has to wait."""
        last = self._last.get(endpoint)
        if last is not None:
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(last.failures, _DOUBLINGS)) * (1 + JITTER * chance())
            told = " ".join(str(error).split())[:_TOLD_CHARS]
            self._last[endpoint] = _Trial(last.epoch, monotonic(), pause, last.failures + 1, told)

    def succeeded(self, endpoint: int) -> None:
        """Forget what was: the endpoint served."""
        self._last.pop(endpoint, None)

    def told(self, endpoint: int, epoch: int) -> str:
        """Say what came of the last try, "" if there was none in this outage."""
        last = self._of(endpoint, epoch)
        return f"tried {monotonic() - last.at:.1f} s ago: {last.told}" if last is not None and last.told else ""

    def _of(self, endpoint: int, epoch: int) -> _Trial | None:
        last = self._last.get(endpoint)
        return last if last is not None and last.epoch == epoch else None
