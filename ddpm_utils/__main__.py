"""The command line: `python -m ddpm_utils train | sample | evaluate | doctor`."""

import contextlib
import importlib
import os
import sys
import warnings


def main(arguments: list[str] | None = None) -> int:
    """Run the command in `arguments` (or `sys.argv`) and return the exit status.

    The status is 0 if the command succeeded, 1 if `doctor` found something to fix, 2 on bad input
    or a failed run (with one line on stderr that says why), and 130 if the run was stopped.
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
    """Let waiting OpenMP threads sleep soon instead of spinning, unless the user has chosen.

    Call it before torch loads libgomp. Beside other busy programs, spinning threads make a run
    several times slower (measurements in benchmarks/README.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "200")


class Quiet:
    """A stream that ignores writes if its reader has closed it or if there is no stream.

    The program then continues without a message, as in `doctor | head -1`.
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
    if words == ["doctor"]:  # must work even if nothing is installed
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
    """Return True if the message of `error` is all that a user needs.

    That is the case for the package's own exceptions, ValueError, OSError and OutOfMemoryError. A
    bug in the program should show its traceback instead.
    """
    ours = type(error).__module__.startswith(__package__ + ".")
    return (
        ours
        or isinstance(error, ValueError | OSError)
        or type(error).__name__ == "OutOfMemoryError"
    )


if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # a terminal without "…" must not stop a run
    sys.exit(main())
