"""What the doctor's checks are made of: findings, deadlines, and processes of their own.

Owns the rule that a check ends in time, leaves no process behind, and never raises.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from rlgen.config.secrets import scrubbed
from rlgen.errors import RlgenError
from rlgen.storage import in_background

Verdict = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
    """What to do about a warning or a failure."""


@dataclass(frozen=True)
class Check:
    """Findings about one thing, to be made."""

    name: str
    find: Callable[[], Sequence[Finding]]


@dataclass(frozen=True)
class Answer:
    """What a process of a check's own said before it ended or was ended."""

    value: Any
    """From the JSON on the last line that it printed; None if there was none."""
    errors: str
    """Its stderr."""
    is_late: bool


def from_error(name: str, error: RlgenError, *, verdict: Verdict = "failure") -> Finding:
    """A finding out of an error, whose last clause is the way out."""
    what, separator, way_out = str(error).strip().rpartition("; ")
    return Finding(name, verdict, what if separator else way_out, way_out if separator else "")


def run_checks(checks: Sequence[Check], *, timeout_s: float) -> Iterator[Finding]:
    """Make all checks beside each other; yield their findings in the checks' order.

    A check that isn't done in time, or breaks, is a failure.

    Args:
        checks: what to find out.
        timeout_s: for all of them together.
    """
    end = time.monotonic() + timeout_s
    futures = [in_background(check.find, name=f"doctor-{check.name}") for check in checks]
    for check, future in zip(checks, futures, strict=True):
        try:
            findings = future.result(max(0.0, end - time.monotonic()))
        except RlgenError as error:
            findings = [from_error(check.name, error)]
        except TimeoutError:
            late = f"the check was not done after {timeout_s:g} s"
            findings = [Finding(check.name, "failure", late, "see whether what it asks hangs")]
        except Exception as error:  # one broken check must not hide the others
            broken = f"the check broke: {type(error).__name__}: {error}"
            findings = [Finding(check.name, "failure", broken, "report this as a bug of rlgen")]
        for finding in findings:
            yield Finding(
                finding.name, finding.verdict, scrubbed(finding.found), scrubbed(finding.remedy)
            )


def ask_process(
    module: str,
    *arguments: str,
    timeout_s: float,
    given: str = "",
    give_up_on: str | None = None,
) -> Answer:
    """Run a module as a process; what it takes, such as GPU memory, goes with it.

    Args:
        module: run by `python -m`; prints JSON on its last line.
        arguments: its command line.
        timeout_s: after that the process and its children are killed.
        given: its stdin.
        give_up_on: words on its stderr after which waiting is no use.
    """
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its children can be ended with it
    ) as process:
        assert process.stdin is not None and process.stdout is not None, "they are pipes"
        assert process.stderr is not None, "it is a pipe"
        errors: list[str] = []
        is_hopeless = threading.Event()

        def watch(stream: Any) -> None:
            for line in stream:
                errors.append(line)
                if give_up_on is not None and give_up_on in line:
                    is_hopeless.set()

        output = in_background(process.stdout.read, name=f"{module}-stdout")
        watching = in_background(lambda: watch(process.stderr), name=f"{module}-stderr")
        with suppress(BrokenPipeError):  # it ended before it read; its stderr says why
            process.stdin.write(given)
            process.stdin.close()
        end = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < end and not is_hopeless.is_set():
            time.sleep(0.05)
        is_late = process.poll() is None and not is_hopeless.is_set()
        _end_session(process)
        lines = output.result().strip().splitlines()
        watching.result()
    return Answer(_json_or_none(lines[-1]) if lines else None, "".join(errors), is_late)


def _end_session(process: "subprocess.Popen[str]") -> None:
    """Kill what is left of a process and of those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        return


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
