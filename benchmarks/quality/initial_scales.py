"""Whether wider initial slot logits and queries help `attention`: the default side path on the task `code`.

python -m benchmarks.quality.initial_scales --seeds 0 1 2
"""

from __future__ import annotations

from collections.abc import Sequence

from .arms import INITIAL_SCALES
from .study import RESULTS, make_parser, run_grid

SCALES_RESULTS = RESULTS.with_name("quality_initial_scales.jsonl")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, backbones=["tiny-qwen3"], seeds=[0, 1, 2], results=SCALES_RESULTS)
    # These adapters are not looked into afterwards.
    options = parser.parse_args(arguments)
    options.adapters_folder = None
    run_grid(options, ["code"], [("lora+talan", name, {}) for name in INITIAL_SCALES])


if __name__ == "__main__":
    main()
