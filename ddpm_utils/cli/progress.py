"""How far a long command is, on stderr, so that stdout stays clean: a line that renews itself in a terminal, else a few lines."""

import shutil
import sys
import time


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """`update(done, words)` after each piece of work, `close()` at the end. Where nobody watches, only `note` prints.

    `done` counts from `first` to `total`; the time left assumes that what is left goes as fast as what was done here.
    """

    def __init__(self, name: str, total: int, first: int = 0):
        self.name, self.total, self.first = name, total, first
        self.began, self.drawn = time.monotonic(), -1.0
        self.live = sys.stderr.isatty()

    def update(self, done: int, words: str = "") -> None:
        """Draw the line anew, ten times a second at most."""
        now = time.monotonic()
        if not self.live or (now - self.drawn < 0.1 and done < self.total):
            return
        self.drawn = now
        self._draw(self.line(done, words))

    def left(self, done: int) -> float:
        """The seconds still to go."""
        return (time.monotonic() - self.began) * (self.total - done) / max(done - self.first, 1)

    def line(self, done: int, words: str = "") -> str:
        """`train ━━━━──────  34 %  1,150/3,375  0:41 left  loss 0.123`."""
        share = done / self.total
        filled = round(20 * share)
        bar = "━" * filled + "─" * (20 - filled)
        passed = time.monotonic() - self.began
        times = f"{clock(self.left(done))} left" if done < self.total else f"{clock(passed)} in all"
        return f"{self.name} {bar} {share:4.0%}  {done:,}/{self.total:,}  {times}  {words}".rstrip()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self.live:
            self._draw("")
            sys.stderr.write("\r")
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line as it stands."""
        if self.live and self.drawn >= 0:
            print(file=sys.stderr, flush=True)

    def _draw(self, text: str) -> None:
        room = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r" + text[:room].ljust(room))
        sys.stderr.flush()
