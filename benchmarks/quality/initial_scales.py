"""Whether wider initial slot logits and queries help `attention`: the default side path on the task `code`.

python -m benchmarks.quality.initial_scales --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
from unittest import mock

import torch

from peft_talan.functional.initialization import initial_parameters
from peft_talan.functional.parameters import SidePathOptions
from peft_talan.tuner import tensors as tuner_tensors

from .one_run import Settings, run
from .study import RESULTS, finished

SCALES = {"slots x3": (3, 1), "queries x4": (1, 4), "slots x3 queries x4": (3, 4), "slots x3 queries x10": (3, 10)}
SCALES_RESULTS = RESULTS.with_name("quality_initial_scales.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        for name, (slots, queries) in SCALES.items():

            def widened(
                options: SidePathOptions,
                hidden_size: int,
                slots: int,
                width: int,
                zero_write: bool = True,
                slots_factor: int = slots,
                queries_factor: int = queries,
            ) -> dict[str, torch.Tensor]:
                tensors = initial_parameters(options, hidden_size, slots, width, zero_write)
                tensors["read"][width : 2 * width] *= queries_factor
                tensors["read"][2 * width :] *= slots_factor
                return tensors

            settings = Settings("tiny-qwen3", "code", "lora+talan", seed, variant=f"init {name}")
            if settings.key() in finished(SCALES_RESULTS):
                continue
            with mock.patch.object(tuner_tensors, "initial_parameters", widened):
                row = run(settings)
            with SCALES_RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(name, seed, row["loss"], flush=True)


if __name__ == "__main__":
    main()
