"""The command line `peft-talan`: reads words, calls one command, turns its errors into one line and an exit code.

Importing torch and PEFT costs seconds: `--help` answers at once, and a command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence

import typer

from .analyze import analyze
from .compare import compare
from .console import FAILED, MISUSED
from .demo import demo
from .doctor import doctor
from .export_lora import export_lora
from .generate import generate
from .inspect_adapter import inspect
from .merge import merge
from .train import train

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
COMMANDS: dict[Callable[..., None], str] = {
    inspect: "Examples: peft-talan inspect outputs/demo/LoRA+TALAN  |  "
    "peft-talan inspect user/adapter --json | jq .axes.talan_layers",
    train: "Example: peft-talan train --model Qwen/Qwen3-0.6B --data data.jsonl --output adapter "
    "--talan-layers 0.33,0.66",
    compare: "Example: peft-talan compare --model Qwen/Qwen3-0.6B --data data.jsonl --output comparison --seeds 3",
    generate: "Examples: peft-talan generate outputs/demo/LoRA+TALAN 'What is 27 + 48?'  |  "
    "peft-talan generate user/adapter --json < prompts.txt",
    analyze: "Example: peft-talan analyze user/adapter data.jsonl analysis",
    export_lora: "Example: peft-talan export-lora user/adapter plain-lora",
    merge: "Examples: peft-talan merge user/adapter merged  |  peft-talan merge user/adapter plain --side-path drop",
    doctor: "Example: peft-talan doctor --json > report.json",
    demo: "Example: peft-talan demo --steps 40 --talan-slots 16",
}
"""The commands with their examples; each has the name of its function."""

for command, example in COMMANDS.items():
    app.command(epilog=example)(command)


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
    """Run the command line with some words, or with the own ones of the process; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.warnoptions:
        # Other packages' notes to their own callers; python -W default shows them.
        warnings.simplefilter("ignore", FutureWarning)

    def run() -> int:
        return int(app(words, prog_name="peft-talan", standalone_mode=False) or 0)

    if "--traceback" in words[:1]:
        return run()
    try:
        return run()
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
    name = next((f" {word}" for word in words if not word.startswith("-")), "")
    print(f"peft-talan{name}: {' '.join(message.split())}", file=sys.stderr)
    return code
