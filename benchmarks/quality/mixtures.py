"""The study of mixtures: one adapter per run for the four tasks together, every arm tuned by equally many tries.

    python -m benchmarks.quality.backbones small-qwen3
    python -m benchmarks.quality.mixtures                          # runs what is not in the results yet
    python -m benchmarks.quality.mixtures --backbones SmolLM2-135M-Instruct --mixture mixture --batch-size 8 \\
        --steps 40 --tries 3 --held-out 50
    python -m benchmarks.quality.inside --study benchmarks/results/mixtures.jsonl \\
        --results benchmarks/results/mixtures_inside.jsonl         # sizes of both parts
    python -m benchmarks.quality.mixtures_report --page docs/evidence-tables.md

Arms without a side path try `--tries` learning rates on the development seed. Arms with one try the first two with the
default side path, more of them as long as none keeps plain text, and the best of these with other axes. Of the tries
that keep the perplexity of plain text within 10% of the backbone's, the one with the lowest loss on the development
items is taken for the fresh seeds. One JSON line per finished run, so a study that was stopped continues there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..runs import DEVELOPMENT_SEED, Row, Rows, finished, run_missing
from .arms import MATCHED, SIDE_PATH_TRIES, configured
from .backbones import cache_folder
from .one_run import Settings
from .study import RESULTS, common_settings, make_parser, run_in_worker, scores_text
from .tasks import MIXTURES

MIXTURE_RESULTS = RESULTS.with_name("mixtures.jsonl")
LEARNING_RATES = (1e-3, 2e-3, 5e-4, 1.5e-3, 7e-4, 3e-4)
"""In the order in which they are tried."""
GROUPS = (("base",), ("lora", "lora+talan"), (MATCHED,), ("dora", "dora+talan"), ("rslora", "rslora+talan"))
"""The order of the runs, so that a part of a study has whole comparisons. `lora-matched` follows `lora+talan`."""
PERPLEXITY_MARGIN = 0.1


def keeps_text(row: Row, base: Row) -> bool:
    return bool(row["text_loss"] <= base["text_loss"] + math.log1p(PERPLEXITY_MARGIN))


def best(found: Sequence[Row], base: Row) -> Row:
    """The try with the lowest loss of those that keep plain text; the one that keeps it best if none does."""
    kept = [row for row in found if keeps_text(row, base)]
    return min(kept, key=lambda row: row["loss"]) if kept else min(found, key=lambda row: row["text_loss"])


class Plan:
    """The runs of one backbone; which come next depends on those that are finished."""

    def __init__(self, backbone: str, options: argparse.Namespace, done: Rows) -> None:
        self.options, self.done = options, done
        self.common = Settings(backbone, options.mixture, "base", 0, **common_settings(options))

    def row(self, settings: Settings) -> Row | None:
        return self.done.get(settings.key())

    def _try(self, arm: str, rate: float, name: str = "default", axes: dict[str, Any] | None = None) -> Settings:
        return replace(
            self.common, adapter=arm, seed=DEVELOPMENT_SEED, learning_rate=rate, variant=name, axes=axes or {}
        )

    def _best(self, tries: Sequence[Settings]) -> Row | None:
        """The best try, as soon as all are done."""
        base, found = self.row(self.common), [self.row(settings) for settings in tries]
        rows = [row for row in found if row is not None]
        return best(rows, base) if base is not None and len(rows) == len(tries) else None

    def tries(self, arm: str) -> list[Settings]:
        """The tries of an arm that can be named so far: all of them, unless they wait for other runs."""
        count, rates = self.options.tries, self.options.learning_rates
        if arm == "base":
            return []
        if arm == MATCHED:
            side_path = self.chosen("lora+talan")
            if side_path is None:
                return []
            # As many parameters as the side path that was chosen.
            axes = configured(side_path.axes)
            return [self._try(arm, rate, side_path.variant, axes) for rate in rates[:count]]
        if not arm.endswith("+talan"):
            return [self._try(arm, rate) for rate in rates[:count]]
        tries = [self._try(arm, rate) for rate in rates[: min(2, count)]]
        first, base = self._best(tries), self.row(self.common)
        while first is not None and base is not None and len(tries) < count and not keeps_text(first, base):
            tries.append(self._try(arm, rates[len(tries)]))
            first = self._best(tries)
        if first is None:
            return tries
        others = list(SIDE_PATH_TRIES.items())[: count - len(tries)]
        return tries + [self._try(arm, first["settings"]["learning_rate"], name, axes) for name, axes in others]

    def chosen(self, arm: str) -> Settings | None:
        """The settings for the fresh seeds, as soon as all tries are done."""
        tries = self.tries(arm)
        taken = self._best(tries) if len(tries) == self.options.tries else None
        if taken is None:
            return None
        found = taken["settings"]
        rate, name, axes = found["learning_rate"], found["variant"], found["axes"]
        return replace(self.common, adapter=arm, learning_rate=rate, variant=name, axes=axes)

    def ready(self) -> Iterator[Settings]:
        """The runs that are missing and wait for no other, in order."""
        for group in GROUPS:
            arms = [arm for arm in group if arm in ("base", *self.options.adapters)]
            wanted = [settings for arm in arms for settings in self.tries(arm)]
            if arms == ["base"]:
                wanted = [self.common]
            fresh = [settings for arm in arms if (settings := self.chosen(arm)) is not None and arm != "base"]
            wanted += [replace(settings, seed=seed) for seed in self.options.seeds for settings in fresh]
            yield from (settings for settings in wanted if self.row(settings) is None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(
        __doc__,
        backbones=["small-qwen3"],
        learning_rate=LEARNING_RATES[0],
        steps=240,
        # Seed 0 was used to choose tasks, prompt and steps.
        seeds=[1, 2, 3, 4, 5],
        target_modules=["all-linear"],
        held_out=100,
        results=MIXTURE_RESULTS,
        adapters_folder=cache_folder() / "mixtures",
    )
    most = 2 + len(SIDE_PATH_TRIES)
    parser.add_argument("--mixture", choices=list(MIXTURES), default="asked mixture")
    parser.add_argument("--tries", type=int, choices=range(1, most + 1), default=4, help="of each arm")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES), help="in this order")
    options = parser.parse_args(arguments)
    if options.tries > len(options.learning_rates):
        parser.error(f"--tries {options.tries}: give as many --learning-rates")
    done = finished(options.results)
    plans = [Plan(backbone, options, done) for backbone in options.backbones]
    arms = [arm for group in GROUPS[1:] for arm in group if arm in options.adapters]
    name = "{backbone} {adapter} {seed} {learning_rate:g} {variant}: "
    run_missing(
        lambda: (settings for plan in plans for settings in plan.ready()),
        partial(run_in_worker, options=options),
        options.results,
        done,
        lambda row: name.format(**row["settings"]) + scores_text(row),
        total=len(plans) * (1 + len(arms) * (options.tries + len(options.seeds))),
        jobs=options.jobs,
        seconds=options.limit_seconds,
    )


if __name__ == "__main__":
    main()
