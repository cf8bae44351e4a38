"""`loss.csv`: a row a step, appended as the run goes, cut back to the checkpoint when it is
resumed.
"""

import re
import warnings
from pathlib import Path

from .. import runtime
from ..runs import losses

COLUMNS = ("step", "loss", "lr", "images_per_second", "held_out")


class LossLog:
    """Appends rows to the file at `path`, of which those up to `step` are kept: no step twice, no
    torn row.

    A row that cannot be written, since the disk is full, is a warning; it is kept and tried again
    with the next. A process that is killed between a checkpoint and its row leaves that row out.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.waiting = path, []
        kept = [row for row in whole_rows(path) if int(row.split(",")[0]) <= step]
        content = "".join([",".join(COLUMNS) + "\n", *kept]).encode()
        with runtime.whole_file(path) as file:
            file.write(content)
        self.size = len(content)  # of what is known to be whole

    def add(self, records) -> None:
        """Write a row for each StepRecord. Nine digits bring a float32 back to its last bit."""
        for r, loss in zip(records, losses(records), strict=True):
            held_out = "" if r.held_out is None else f"{r.held_out:.9g}"
            self.waiting.append(
                f"{r.step},{loss:.9g},{r.lr:.6g},{r.images_per_second:.1f},{held_out}\n"
            )
        content = "".join(self.waiting).encode()
        try:
            with open(self.path, "r+b") as file:
                # over what a write that failed has left: it began with the same rows
                file.seek(self.size)
                file.write(content)
        except OSError as error:
            message = f"{self.path.name} was not written ({error.strerror}); its rows wait"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return
        self.size += len(content)
        self.waiting.clear()


def whole_rows(path: Path) -> list[str]:
    """The rows of the file at `path`, line ends and all; none if there is no file.

    What a kill has torn is left out.
    """
    text = path.read_text(errors="replace") if path.is_file() else ""
    return re.findall(rf"^\d+(?:,[^,\n]*){{{len(COLUMNS) - 1}}}\n", text, re.MULTILINE)
