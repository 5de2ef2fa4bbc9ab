"""The spool of a tracked run: its records, on disk before anyone sends them.

Owns the JSON lines in the run folder, the thread that sends them, what the user is told about it,
and what must not get into either: secrets and URI credentials. Must not import MLflow: a function
that it is given sends. The file is the truth: it also says what was sent, so that a later process
sends the rest.
"""

import json
import re
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rlgen.storage import without_credentials

SPOOL_NAME = "mlflow_spool.jsonl"
FLUSH_INTERVAL_S = 2.0
MAX_BACKOFF_S = 15.0
OUTAGE_PATIENCE_S = 5.0
"""Wait at the end for a server that does not answer; records stay in the spool."""
SECRET_NAME = re.compile(r"(?i)passw|secret|credential|(api|access|private)_?key|(^|_)token$")
MAX_LIST_CHARS = 2000

Record = dict[str, Any]
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Spool:
    """Takes records at once and sends them, in order, from one daemon thread.

    A record counts as sent when `send` returns. If `send` raises, it gets the same records again,
    after a pause that doubles.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        send: Callable[[list[Record]], None],
        *,
        tell: Callable[[str], None],
    ) -> None:
        """Open the file; what an earlier attempt left unsent goes first.

        Args:
            run_dir: the run folder; made if it isn't there.
            uri: where MLflow is.
            send: called on the thread with all that waits, which may be nothing.
            tell: called on the thread with a line for the user, once for each outage.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / SPOOL_NAME
        earlier = list(read_spool(run_dir))
        self.shown_uri = without_password(uri)
        runs = [r for r in earlier if r["kind"] == "run" and r["uri"] == self.shown_uri]
        self.run_id: str | None = runs[-1]["run_id"] if runs else None
        self._uri, self._tell = uri, tell
        self._away_since_s: float | None = None
        self._outage = self._disk_warning = self._late_warning = ""
        self._send = send
        self._waiting = _unsent(earlier)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        if earlier:
            self._file.write("\n")  # a killed process may have left half a line
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    @property
    def num_waiting(self) -> int:
        """Records that are not sent yet."""
        return len(self._waiting)

    @property
    def is_abandoned(self) -> bool:
        """Whether `close` gave up; `send` should return soon."""
        return self._abandoned.is_set()

    @property
    def is_away(self) -> bool:
        """Whether the last call to MLflow failed."""
        return self._away_since_s is not None

    @property
    def warnings(self) -> list[str]:
        """What the user should be told, one line per problem."""
        outage = self._late_warning or self._outage_warning
        return [text for text in (self._disk_warning, outage) if text]

    @property
    def _outage_warning(self) -> str:
        return self._outage and (
            f"MLflow at {self.shown_uri} doesn't take records ({self._outage}); the run goes on, "
            f"and they wait in {self.path}."
        )

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, kind: str, **fields: Any) -> None:
        """Write a record, and queue it to be sent."""
        assert not self.is_closed, f"{kind} logged after the tracker was closed"
        record: Record = {"kind": kind, "time_ms": int(time.time() * 1000), **fields}
        with self._lock:
            self._write(record)
            self._waiting.append(record)

    def put_run(self, run_id: str) -> None:
        """Write down which MLflow run takes the records."""
        with self._lock:
            self._write({"kind": "run", "uri": self.shown_uri, "run_id": run_id})

    def answered(self) -> None:
        """Note that MLflow answers, so that `close` waits for what it is still to take."""
        self._away_since_s = None

    def close(self, timeout_s: float) -> None:
        """Send what is left; give up with a warning after `timeout_s`, or sooner in an outage."""
        self._closing.set()
        began = time.monotonic()
        while self._thread.is_alive() and not self._is_hopeless(began, timeout_s):
            self._thread.join(0.05)
        if not self._thread.is_alive():
            try:
                self._file.close()
            except OSError as error:
                self._note_disk(error)
            return
        self._abandoned.set()
        self._late_warning = (
            f"MLflow at {self.shown_uri} didn't take every record within "
            f"{time.monotonic() - began:.0f} s ({self._outage or 'it is too slow'}). All are in "
            f"{self.path}; send the rest with `python -m rlgen.tracking "
            f"{shlex.quote(str(self.path.parent))} {shlex.quote(self.shown_uri)}`."
        )

    def _is_hopeless(self, began: float, timeout_s: float) -> bool:
        now, away_since = time.monotonic(), self._away_since_s
        if away_since is not None and now > max(began, away_since) + OUTAGE_PATIENCE_S:
            return True
        return now > began + timeout_s

    def _write(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            self._note_disk(error)

    def _note_disk(self, error: OSError) -> None:
        self._disk_warning = f"{self.path} can't be written ({error}); free space."

    def _work(self) -> None:
        delay_s = 0.0
        while not self.is_abandoned:
            self._closing.wait(delay_s)
            try:
                self._send_waiting()
            except Exception as error:
                # The thread's boundary: whatever `send` raises must not reach training.
                self._note_outage(error)
                delay_s = min(max(1.0, 2 * delay_s), MAX_BACKOFF_S)
                if self.is_closed:
                    self._abandoned.wait(1.0)
                continue
            self._outage, self._away_since_s = "", None
            delay_s = FLUSH_INTERVAL_S
            if self.is_closed and not self._waiting:
                return

    def _note_outage(self, error: Exception) -> None:
        is_new = not self._outage
        self._outage = self._described(error)
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
        if is_new and not self.is_closed:  # at the end, `close` tells
            self._tell(self._outage_warning)

    def _described(self, error: Exception) -> str:
        first_line = (str(error).splitlines() or [""])[0].replace(self._uri, self.shown_uri)
        return f"{type(error).__name__}: {first_line[:400]}"

    def _send_waiting(self) -> None:
        with self._lock:
            batch = list(self._waiting)
        self._send(batch)
        if not batch:
            return
        with self._lock:
            for _ in batch:
                self._waiting.popleft()
            self._write({"kind": "sent", "count": len(batch)})


def read_spool(run_dir: Path) -> Iterator[Record]:
    """Yield the records of a run folder, oldest first; none if it has no spool."""
    path = run_dir / SPOOL_NAME
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that a killed process did not finish


def last_status(run_dir: Path) -> Status:
    """Return how a run said that it ended; a run that didn't say so has failed."""
    ends = [record["status"] for record in read_spool(run_dir) if record["kind"] == "end"]
    return ends[-1] if ends else "FAILED"


def flatten_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to dotted names, secrets and URI credentials removed."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten_params(value, f"{path}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            flat |= flatten_params({str(i): item for i, item in enumerate(value)}, f"{path}.")
        elif isinstance(value, (list, tuple)):
            text = json.dumps([redacted(name, item) for item in value])
            # The config.yaml beside it has the whole list, such as a thousand class names.
            flat[path] = text if len(text) <= MAX_LIST_CHARS else f"{text[:MAX_LIST_CHARS]}..."
        else:
            flat[path] = str(redacted(name, value))
    return flat


def redacted(name: str, value: Any) -> Any:
    """Return a setting as it may be shown."""
    if value is not None and SECRET_NAME.search(name):
        return "***"
    return without_password(value) if isinstance(value, str) else value


def without_password(text: str) -> str:
    """Return a URI without credentials and query; other text, which may hold a ?, as it is."""
    return (
        without_credentials(text) if re.match(r"[a-z0-9+]+://[^/?]*@|https?:.*\?", text) else text
    )


def _unsent(records: list[Record]) -> deque[Record]:
    waiting: deque[Record] = deque()
    for record in records:
        if record["kind"] == "sent":
            for _ in range(min(record["count"], len(waiting))):
                waiting.popleft()
        elif record["kind"] != "run":
            waiting.append(record)
    return waiting
