"""The command line `peft-talan`: reads words, calls one command, turns its errors into one line and an exit code.

Importing torch and PEFT costs seconds: `--help` answers at once, and a command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from . import analyze, compare, demo, doctor, export_lora, generate, inspect_adapter, merge, train
from .console import FAILED, MISUSED, one_line

app = typer.Typer(
    name="peft-talan",
    help="TALAN adapters for Hugging Face PEFT: train them, compare them, look into them, use them, take them apart.",
    epilog="Results go to stdout, progress and errors to stderr. Exit codes: 0, 1 where a run or a check failed, "
    "2 where options, files or packages are not usable, 130 for Ctrl-C. "
    "--traceback before the command shows where an error arose.",
    no_args_is_help=True,
    # Rich would cut long option names and take what stands in brackets for markup.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (inspect_adapter, train, compare, generate, analyze, export_lora, merge, doctor, demo):
    module.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"peft-talan {version('peft-talan')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    traceback: bool = typer.Option(False, "--traceback", help="Show where an error arose, not its line alone."),
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_print_version, is_eager=True),
) -> None:
    context.obj = traceback


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The words after the program's name. Default: the process's own.

    Returns:
        The exit code: 0, 1 where a run or a check failed, 2 where options, files or packages are not usable.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.warnoptions:
        # Other packages' notes to their own callers; python -W default shows them.
        warnings.simplefilter("ignore", FutureWarning)
    if "--traceback" in words[:1]:
        return int(app(words, prog_name="peft-talan", standalone_mode=False) or 0)
    try:
        return int(app(words, prog_name="peft-talan", standalone_mode=False) or 0)
    except typer.TyperException as error:
        message, code = error.format_message(), error.exit_code
        if not message:  # No command was given: the help was shown.
            return code
    except typer.Abort:
        message, code = "stopped", FAILED
    except ModuleNotFoundError as error:
        message, code = f"package {error.name!r} is missing; pip install {error.name}", MISUSED
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough; Python would complain at its own end.
        sys.stdout = None
        return 0
    except (OSError, ValueError, TypeError) as error:
        message, code = str(error), MISUSED
    except (RuntimeError, NotImplementedError) as error:
        message, code = str(error), FAILED
    command = next((f" {word}" for word in words if not word.startswith("-")), "")
    print(f"peft-talan{command}: {one_line(message)}", file=sys.stderr)
    return code
