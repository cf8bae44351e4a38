"""The command line: `python -m ddpm_utils train | sample | evaluate | doctor`."""

import importlib
import sys
import warnings

from .cli import flags


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (or `sys.argv`) name; returns the exit status.

    0: done. 1: `doctor` found something to mend. 2: bad input or a failed run, told in one line on stderr. 130: stopped.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(arguments)


def _show_warning(message, *place) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(arguments: list[str] | None) -> int:
    try:
        options = flags.parse(arguments)
        return importlib.import_module(f".cli.{options.command}", __package__).run(options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_plain(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def is_plain(error: Exception) -> bool:
    """True if the message says all that a user needs; a mistake of the program's own deserves its traceback."""
    ours = type(error).__module__.startswith(__package__ + ".")
    return ours or isinstance(error, ValueError | OSError) or type(error).__name__ == "OutOfMemoryError"


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "…" shall not stop a run
    sys.exit(main())
