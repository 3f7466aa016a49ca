"""Data loading processes that outlive a Ctrl-C, and whose errors read like any other.

Imported in every loading process: nothing here is heavy.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children, resource_tracker

from leafseg.errors import DataError

_HELD_BACK = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 5.0  # seconds
_CAN_HOLD_BACK = hasattr(signal, "sigwaitinfo")  # not on macOS


@contextmanager
def signals_held_back(wanted: bool = True) -> Iterator[None]:
    """Processes started inside start with SIGINT and SIGTERM blocked; here the signals arrive when the block ends.

    A Ctrl-C, and a cluster's notice that time is up, reach the whole process group. A loading process that ended by
    them would end the training as well, before its last checkpoint.
    """
    if not (wanted and _CAN_HOLD_BACK):
        yield
        return
    resource_tracker.ensure_running()  # when started on demand it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def none_left_behind() -> Iterator[None]:
    """End the processes that the block started and that did not end with it.

    Python waits at exit for every process of its own, for ever. One that no longer listens to SIGTERM (its interpreter
    is ending, and stuck) would turn the end of a training into a hang; and a traceback in hand keeps loaders alive.
    """
    before = {process.pid for process in active_children()}
    try:
        yield
    finally:
        for process in active_children():
            if process.pid not in before:
                process.terminate()
                process.join(_PATIENCE)
                process.kill()
                process.join(_PATIENCE)


def obey_the_trainer_alone(_worker: int) -> None:
    """Let a loading process, whose signals are held back, end by its parent's SIGTERM and nobody else's.

    Python ends what is left of its processes at exit, and would wait for one that does not listen for ever.
    """
    if not _CAN_HOLD_BACK:
        return

    def wait() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def loading_errors() -> Iterator[None]:
    """Errors of loading processes as one sentence.

    torch wraps a traceback around what they raise, and raises a RuntimeError at any moment when one dies.

    Raises:
        DataError: instead of both.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught "):
            raise
        sentence = str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        raise DataError(sentence) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data loading process ended ({str(error).splitlines()[0]}); if memory ran out, lower data.workers or "
            "data.cache_mb, then continue from the last checkpoint with --resume auto"
        ) from error
