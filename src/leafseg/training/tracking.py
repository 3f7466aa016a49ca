"""Loss parts and figures to JSON lines and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from leafseg.errors import DataError
from leafseg.files import write_text_atomic


class Tracker:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of a run.

    A resumed run drops the lines after the checkpoint it continues from, so that no step stands twice.
    """

    def __init__(self, run: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        path = run / "metrics.jsonl"
        try:
            if path.is_file():
                kept = [line for line in path.read_text().splitlines() if 0 <= _step_of(line) <= start_step]
                write_text_atomic(path, "".join(line + "\n" for line in kept))
            self._lines = path.open("a")
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        except OSError as error:
            raise DataError(f"{run}: cannot write the training log ({error.strerror}); choose another --out") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line.

        Raises:
            DataError: if the system refuses to write.
        """
        try:
            self._lines.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in values.items()}}) + "\n")
            self._lines.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise DataError(
                f"{self._run}: cannot write the training log ({error.strerror}); free space, then continue with "
                "--resume auto"
            ) from error

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._lines, self._board):
            with suppress(OSError):  # what matters was flushed line by line; a full disk was told already
                stream.close()


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The logged lines of a run, in order; a line cut off by a kill is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _step_of(line) >= 0]


def _step_of(line: str) -> int:
    """-1 for a line that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
