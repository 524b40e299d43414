"""`run [CHAPTER …]` executes chapters, `book` builds the book, `verify` runs cells of the kept long runs again."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 1 when a chapter or the build failed, 2 when asked wrongly."""
    args = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    # Imported late: --help and a mistyped option answer at once.
    from helpers.press import chapters

    try:
        if args.command == "book":
            from helpers.press import build  # needs jupyter-book, which `run` does not

            return build.make(args.profile, console)
        if args.command == "verify":
            from helpers.press import verify

            return 1 if verify.run_again(args.chapters, console, args.all) else 0
        overrides = {name: chapters.parse_value(name, value) for name, value in args.parameter}
        jobs = chapters.plan(args.chapters, args.profile, overrides)
        from helpers.press import execution  # a second of imports, after all is checked

        return 1 if execution.run(jobs, console, args.force) else 0
    except ValueError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    book = commands.add_parser("book", help="execute what has changed, then build _build/html/index.html")
    run = commands.add_parser("run", help="execute chapters only")
    verify = commands.add_parser(
        "verify", help="run a stated cheap cell of each long run in results/ again, and compare"
    )
    for command in (run, book):
        command.add_argument("--profile", default="quick", help="a file of profiles/ (default: quick)")
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


if __name__ == "__main__":
    sys.exit(main())
