"""SIGTERM and SIGINT: finish the step, save, say how to go on.

`ray job stop`, Kubernetes and a preempted node send SIGTERM, and kill after a while. The training
loop asks at the end of each step; a step that takes too long is given up.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rlgen.errors import Stopped

_PATIENCE_S = 20
"""How long a running step may take to its end; Kubernetes kills after 30 s by default."""


class Stoppable(Protocol):
    """What has to know that the run is to end, such as a Recorder."""

    is_stopping: bool

    def note(self, text: str) -> None:
        """Print a line that stays."""


@contextmanager
def stop_on_signals(recorder: Stoppable) -> Iterator[None]:
    """While this context is open, the first signal asks for a stop; a second one insists.

    Opened after Ray is started, which installs handlers of its own. Outside the main thread, where
    Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        signal.alarm(0)
        raise Stopped("stopped before the step was finished: its work is lost.")

    def ask(*_: object) -> None:
        if recorder.is_stopping:
            give_up()
        recorder.is_stopping = True
        recorder.note(f"stopping after this step, in at most {_PATIENCE_S} s")
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(_PATIENCE_S)

    before = {kind: signal.signal(kind, ask) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        signal.alarm(0)
        for kind, handler in before.items():
            signal.signal(kind, handler)
