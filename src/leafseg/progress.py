"""Progress of long work: a bar with the remaining time on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from leafseg.runs import is_main_process

log = logging.getLogger(__name__)

_LOG_EVERY_SECONDS = 30.0


class Bar:
    """What a loop calls: ``advance`` after each unit, ``note`` for a line that stays."""

    def __init__(self, name: str, *, total: int, done: int, progress: Progress | None, show: bool) -> None:
        self._name, self._total, self._done, self._progress, self._show = name, total, done, progress, show
        self._first, self._started, self._logged = done, time.monotonic(), time.monotonic()
        self._task = progress.add_task(name, total=total, completed=done, status="") if progress else None

    def advance(self, status: str = "", count: int = 1) -> None:
        self._done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, status=status)
        elif self._show and time.monotonic() - self._logged > _LOG_EVERY_SECONDS:
            self._logged = time.monotonic()
            left = (self._logged - self._started) / (self._done - self._first) * (self._total - self._done)
            log.info("%s %d/%d, %s, %s left", self._name, self._done, self._total, status, _duration(left))

    def reach(self, done: int, total: int) -> None:
        """For work that reports (done, in all), and whose total only it knows."""
        if self._progress is not None and self._task is not None and total != self._total:
            self._progress.update(self._task, total=total)
        self._total = total
        self.advance(count=done - self._done)

    def note(self, line: str) -> None:
        if self._show:
            log.info("%s %d/%d: %s", self._name, self._done, self._total, line)


@contextmanager
def progress_bar(name: str, *, total: int, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """A bar on standard error when that is a terminal; otherwise log lines about every half minute.

    Of several processes only the main one shows it.
    """
    show = show and is_main_process()
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield Bar(name, total=total, done=done, progress=None, show=show)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(name, total=total, done=done, progress=progress, show=show)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
