"""`run [CHAPTER …]` executes chapters, `book` builds the book, `verify` runs cells of the kept long runs again, `cache`
says what is kept and frees what no chapter needs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Stopped(KeyboardInterrupt):
    """A signal that asks to end; libraries clean up after it as after Ctrl-C."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 1 when a chapter or the build failed, 2 when asked wrongly."""
    args = _parser().parse_args(arguments)
    # Imported late: --help and a mistyped option answer at once.
    from helpers.press import chapters

    console = _console()
    try:
        if args.command == "verify":
            from helpers.press import verify

            return 1 if verify.run_again(args.chapters, console, args.all) else 0
        if args.command == "cache":
            from helpers.press import cached

            cached.show(console, args.free)
            return 0
        quick = args.profile == "quick" and not getattr(args, "parameter", None)
        at_once = chapters.side_by_side(args.jobs, quick)
        if args.command == "book":
            jobs = chapters.plan((), args.profile)
            chapters.make_ready(jobs)
            from helpers.press import build  # needs jupyter-book, which `run` does not

            return build.make(jobs, args.profile, console, at_once)
        overrides = {name: chapters.parse_value(name, value) for name, value in args.parameter}
        jobs = chapters.plan(args.chapters, args.profile, overrides)
        chapters.make_ready(jobs)
        from helpers.press import execution  # a second of imports, after all is checked

        failures = execution.run(jobs, console, args.force, at_once)
        return 0 if not failures else 2 if all(failure.asked_wrongly for failure in failures) else 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: the package {error.name!r} is missing; make setup installs it", file=sys.stderr)
        return 1


def _console() -> Console:
    from rich.console import Console

    class Heedless(Console):
        """Where nobody reads any more, or no disk takes what is said, the work goes on without a word."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            _point_at_nothing()

        def print(self, *args, **options) -> None:
            try:
                super().print(*args, **options)
            except OSError as error:
                print(f"nothing more can be written to the output: {error.strerror}", file=sys.stderr)
                self.on_broken_pipe()

    return Heedless(highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    status = "Status: 0 all went well, 1 a chapter or the build failed, 2 refused, 130 or 143 stopped by a signal."
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__, epilog=status)
    commands = parser.add_subparsers(dest="command", required=True)
    book = commands.add_parser("book", help="execute what has changed, then build _build/html/index.html")
    run = commands.add_parser("run", help="execute chapters only")
    verify = commands.add_parser(
        "verify", help="run a stated cheap cell of each long run in results/ again, and compare"
    )
    kept = commands.add_parser("cache", help="say what is kept, and how much of it no chapter's last run asked for")
    kept.add_argument("--free", action="store_true", help="delete that; what is asked for again is made anew")
    for command in (run, book):
        command.add_argument("--profile", default="quick", help="a file of profiles/ (default: quick)")
        command.add_argument(
            "--jobs", type=int, metavar="N", help="chapters side by side (2 in the quick profile, else 1)"
        )
    for command in (run, verify):
        command.add_argument("chapters", nargs="*", metavar="CHAPTER", help="number or slug; none means all")
    verify.add_argument("--all", action="store_true", help="also cells that take longer than 20 s")
    run.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter of the chapter (VALUE is YAML); the copy goes to _build/executed/PROFILE+custom",
    )
    run.add_argument("--force", action="store_true", help="run again even what is still valid")
    return parser


# -- as a command of a shell: signals, and an output that cannot take what is said ------------------------------------


def command() -> int:
    """`main`, and what a shell needs beside it: 130 after Ctrl-C, 143 after SIGTERM, with no traceback."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt as stop:
        number = stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}; the same command goes on", file=sys.stderr)
        return 128 + number
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"error: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        _point_at_nothing()
        return 1


def _stop(number: int, _: object) -> None:
    raise Stopped(number)


def _point_at_nothing() -> None:
    """What is still to be written to the output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(command())
