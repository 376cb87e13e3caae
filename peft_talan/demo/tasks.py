"""What the demo can fine-tune on: generated questions whose answers a program has computed."""

from __future__ import annotations

from ..sft.data import DataError, Rows

DEFAULT_TASK = "chain_sum"
SETTINGS = {DEFAULT_TASK: {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}
"""By task: what makes it of a difficulty that a small model learns in minutes."""


def make_rows(task: str, count: int, seed: int, system: str | None = None) -> Rows:
    """Generate conversational rows of a reasoning-gym task, each question once, or raise `DataError` without one."""
    import reasoning_gym

    try:
        # Questions repeat, so more are drawn than are needed.
        items = reasoning_gym.create_dataset(task, size=3 * count, seed=seed, **SETTINGS.get(task, {}))
    except ValueError as error:
        raise DataError(f"--task {task}: {error}") from None
    answers: dict[str, str] = {}
    for item in items:
        answers.setdefault(item["question"], str(item["answer"]))
    first = [] if system is None else [{"role": "system", "content": system}]
    rows = [
        {
            "prompt": [*first, {"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in list(answers.items())[:count]
    ]
    return Rows(task, rows, [f"{task}, item {number}" for number in range(1, len(rows) + 1)])
