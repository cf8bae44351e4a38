"""`loss.csv`: one row per step.

Rows are appended during the run. When a run is resumed, the file is cut back to the checkpoint.
"""

import re
import warnings
from pathlib import Path

from .. import runtime
from ..runs import losses

COLUMNS = ("step", "loss", "lr", "images_per_second", "held_out")


class LossLog:
    """Appends rows to the file at `path`, of which the rows up to `step` are kept.

    So no step appears twice, and no row is incomplete. If a row cannot be written because the disk
    is full, a warning is issued, and the row is kept and tried again with the next one. If a
    process is killed between a checkpoint and its row, that row is missing.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.waiting = path, []
        kept = [row for row in whole_rows(path) if int(row.split(",")[0]) <= step]
        content = "".join([",".join(COLUMNS) + "\n", *kept]).encode()
        with runtime.whole_file(path) as file:
            file.write(content)
        self.size = len(content)  # of the part that is known to be complete

    def add(self, records) -> None:
        """Write a row for each StepRecord; nine digits restore a float32 exactly."""
        for r, loss in zip(records, losses(records), strict=True):
            held_out = "" if r.held_out is None else f"{r.held_out:.9g}"
            self.waiting.append(
                f"{r.step},{loss:.9g},{r.lr:.6g},{r.images_per_second:.1f},{held_out}\n"
            )
        content = "".join(self.waiting).encode()
        try:
            with open(self.path, "r+b") as file:
                # overwrite what a failed write has left: it began with the same rows
                file.seek(self.size)
                file.write(content)
        except OSError as error:
            message = f"{self.path.name} was not written ({error.strerror}); its rows wait"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return
        self.size += len(content)
        self.waiting.clear()


def whole_rows(path: Path) -> list[str]:
    """Return the complete rows of the file at `path`, with their line ends.

    The list is empty if there is no file. A row that is incomplete because the process was killed
    is left out.
    """
    text = path.read_text(errors="replace") if path.is_file() else ""
    return re.findall(rf"^\d+(?:,[^,\n]*){{{len(COLUMNS) - 1}}}\n", text, re.MULTILINE)
