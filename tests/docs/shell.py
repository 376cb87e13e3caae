"""Checks the commands in the shell blocks of Markdown pages, and runs those of `peft-talan` in this process.

Checked are programs, subcommands, options and files. A command runs if it has no pipe, no redirection and no hub id
that nobody has (`user/...`), and does not train several times.
"""

from __future__ import annotations

import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from functools import cache
from importlib.metadata import metadata
from pathlib import Path

import typer
from packaging.requirements import Requirement

from peft_talan.cli import app, main

ROOT = Path(__file__).parents[2]
PLACEHOLDER = "user/"
"""Hub ids that begin so are examples."""
PROGRAMS = {
    "lm_eval": ["-m", "lm_eval"],
    "transformers": ["-m", "transformers.cli.transformers"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}
"""Programs of other packages, as Python runs them."""
UNCHECKED = {"head", "jq", "shuf", "tail", "vllm"}
"""Programs that are not there in every environment."""
LONG = {"compare"}
"""Commands of `peft-talan` that train several times: tests/cli runs them on a tiny model."""


def commands(block: str) -> list[tuple[list[str], bool]]:
    """The commands of a block, each with whether it stands alone: without a pipe or a redirection."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = _words(line)
        if not words:
            continue
        alone = not any(word in ("|", "<", ">") for word in words)
        command: list[str] = []
        for word in [*words, "|"]:
            if word == "|":
                found.append((command, alone))
                command = []
            else:
                command.append(word)
    return [(_without_redirections(command), alone) for command, alone in found]


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>")
    lexer.whitespace_split = True
    return list(lexer)


def _without_redirections(command: list[str]) -> list[str]:
    places = [place for place, word in enumerate(command) if word in ("<", ">")]
    return command[: places[0]] if places else command


@cache
def help_of(*words: str) -> str:
    """What a program answers to --help; it runs in this process, which has imported already what takes seconds."""
    answer, arguments, path = io.StringIO(), sys.argv, sys.path
    script = ROOT / words[0]
    # As `python` does it for a file and for a module.
    sys.path = [str(script.parent if words[0] != "-m" else ROOT), *path]
    sys.argv = [*words[words[0] == "-m" :], "--help"]
    try:
        with redirect_stdout(answer):
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, answer.getvalue()
    finally:
        sys.argv, sys.path = arguments, path
    return answer.getvalue()


def check_options(words: list[str], options: list[str]) -> None:
    """Every option of a command is one that its program knows."""
    text = help_of(*words)
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
    if words[0].startswith("benchmarks/recipes/"):
        known.add("--config")  # TRL's parser takes it before the parser that writes the help
    for option in options:
        assert option.split("=")[0] in known, f"{' '.join(words)}: no option {option}"


def is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1


def check_own(words: list[str]) -> None:
    """`peft-talan` parses these words; nothing runs."""
    name, *rest = words
    typer.main.get_command(app).commands[name].make_context(name, rest)


def check_install(words: list[str]) -> None:
    """What pip is asked for exists: a folder or a package with these extras."""
    extras = metadata("peft-talan").get_all("Provides-Extra")
    for word in words:
        if is_option(word) or word.startswith("https://"):
            continue
        own = re.fullmatch(r"(\.|\./peft_talan)(?:\[([\w,]+)\])?", word)
        if own:
            assert set((own[2] or "").split(",")) - {""} <= set(extras), word
        else:
            assert Requirement(word).name != "peft-talan", "there is no release: install from a clone"


def check(words: list[str]) -> None:
    """A command of a page names programs, options and files that exist."""
    program, *rest = words
    if re.match("[A-Z_]+=", program):  # A variable of the environment.
        check(rest)
        return
    options = [word for word in rest if is_option(word)]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in rest), words
    elif program == "pip":
        assert rest[0] == "install"
        check_install(rest[1:])
    elif program == "peft-talan":
        check_own(rest)
    elif program == "python":
        script = 2 if rest[0] == "-m" else 1
        check_options(rest[:script], [option for option in options if option not in rest[:script]])
    elif program in ("accelerate", "transformers"):
        own = next((place for place, word in enumerate(rest) if word.endswith(".py")), len(rest))
        check_options([*PROGRAMS[program], rest[0]], [word for word in rest[:own] if is_option(word)])
        if own < len(rest):
            check(["python", *rest[own:]])
    elif program in PROGRAMS:
        check_options(PROGRAMS[program], options)
    else:
        assert program in UNCHECKED, f"no check for the program {program!r}"
    for word in rest:
        if word.startswith(("benchmarks/", "examples/")) and "results" not in word:
            assert (ROOT / word).exists(), word


def run_block(block: str) -> None:
    """Check every command of a shell block, and run those of `peft-talan`."""
    for words, alone in commands(block):
        check(words)
        runs = words[0] == "peft-talan" and words[1] not in LONG and alone
        if runs and not any(word.startswith(PLACEHOLDER) for word in words):
            assert main(["--traceback", *words[1:]]) == 0, words
