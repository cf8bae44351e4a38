"""The command line: `python -m ddpm_utils train | sample | evaluate | doctor`."""

import contextlib
import importlib
import os
import sys
import warnings


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (or `sys.argv`) name; returns the exit status.

    0: done. 1: `doctor` found something to fix. 2: bad input or a failed run, told in one line on
    stderr. 130: stopped.
    """
    share_the_cores()
    out, err = Quiet(sys.stdout), Quiet(sys.stderr)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.showwarning = _show_warning
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is not an error


def share_the_cores() -> None:
    """Let waiting threads of OpenMP sleep soon instead of spinning on, unless the user has chosen:
    before torch loads libgomp.

    Beside other busy programs, threads that spin slow a run several times (figures in
    benchmarks/README.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")


class Quiet:
    """A stream that goes on in silence when its reader has closed it, as in `doctor | head -1`, or
    if there is none.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def _attempt(self, method: str, *arguments) -> None:
        try:
            if self.stream is not None:
                getattr(self.stream, method)(*arguments)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                # what is still buffered goes there, too
                os.dup2(nowhere.fileno(), self.stream.fileno())


def _show_warning(message, *place) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(arguments: list[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["doctor"]:  # which must work where nothing is installed
        from .cli import doctor

        return doctor.run()
    try:
        from .cli import flags

        options = flags.parse(words)
        command = type(options).__name__.lower()
        return importlib.import_module(f".cli.{command}", __package__).run(options)
    except SystemExit as leaving:  # --help, or an error that the parser has told
        return leaving.code or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_plain(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def is_plain(error: Exception) -> bool:
    """True if the message says all that a user needs; a mistake of the program's own deserves its
    traceback.
    """
    ours = type(error).__module__.startswith(__package__ + ".")
    return (
        ours
        or isinstance(error, ValueError | OSError)
        or type(error).__name__ == "OutOfMemoryError"
    )


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal that knows no "…" shall not stop a run
    sys.exit(main())
