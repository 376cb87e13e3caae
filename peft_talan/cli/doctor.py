"""`peft-talan doctor`: whether this installation works."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import NamedTuple

import typer

from ..autoload import prepare
from .console import FAILED, AsJson, print_json, print_rows

PACKAGES = ("torch", "peft", "transformers", "safetensors", "huggingface-hub", "accelerate", "trl", "bitsandbytes")


class Check(NamedTuple):
    """One thing that works, or doesn't, or of which that is unknown (None)."""

    name: str
    passed: bool | None
    note: str


def doctor(as_json: AsJson = False) -> None:
    """Show versions, registration and autoload, and run a small self-test; exit code 1 where a check fails."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "peft-talan": version("peft-talan")}
    versions |= {package: _version(package) for package in PACKAGES}
    checks = [check_ranges(versions), check_autoload(), check_registration()]
    if checks[-1].passed:
        checks += check_model()
    passed = all(check.passed is not False for check in checks)
    if as_json:
        print_json({"versions": versions, "checks": [check._asdict() for check in checks], "passed": passed})
    else:
        print_rows("Versions", versions)
        words = {True: "ok", False: "FAILED", None: "-"}
        print_rows("Checks", {check.name: f"{words[check.passed]}  {check.note}" for check in checks})
    if not passed:
        raise typer.Exit(FAILED)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_ranges(versions: dict[str, str | None]) -> Check:
    """Compare the installed versions with the supported ones."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("peft-talan") or () if "extra ==" not in text]
    outside = [
        f"{need.name} {versions[need.name]} (supported: {need.specifier})"
        for need in wanted
        if versions.get(need.name) and not need.specifier.contains(str(versions[need.name]), prereleases=True)
    ]
    return Check("versions are supported", not outside, ", ".join(outside) or "all of them")


def check_autoload() -> Check:
    """See whether `import peft` alone makes PEFT know TALAN: torch finds the entry point, and what it names works."""
    name = "autoload"
    if os.environ.get("PEFT_TALAN_AUTOLOAD") == "0":
        return Check(name, None, "switched off by PEFT_TALAN_AUTOLOAD=0; programs must import peft_talan")
    called = f"{prepare.__module__}:{prepare.__name__}"
    if called not in [entry.value for entry in entry_points(group="torch.backends")]:
        return Check(name, False, "the entry point is missing; install the package again with pip")
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return Check(name, None, "switched off by TORCH_DEVICE_BACKEND_AUTOLOAD=0; programs must import peft_talan")
    import peft

    worked = "TALAN" in peft.PeftType.__members__
    return Check(name, worked, "import peft registers TALAN" if worked else "import peft did not register TALAN")


def check_registration() -> Check:
    """See whether PEFT knows the tuner."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType

    from ..config import TalanConfig
    from ..tuner.model import TalanModel

    classes = [
        (PEFT_TYPE_TO_CONFIG_MAPPING.get(member), PEFT_TYPE_TO_TUNER_MAPPING.get(member)) for member in PeftType
    ]
    known = (TalanConfig, TalanModel) in classes
    return Check("registration", known, f"PEFT {'knows' if known else 'does not know'} the type TALAN")


def check_model() -> list[Check]:
    """Run the two promises that matter most on a tiny model."""
    from .self_test import cached_equals_uncached, fresh_equals_lora

    checks = []
    for name, test in (("fresh == LoRA", fresh_equals_lora), ("cached == uncached", cached_equals_uncached)):
        started = time.perf_counter()
        passed, difference = test()
        checks.append(Check(name, passed, f"{difference}, {time.perf_counter() - started:.2f} s"))
    return checks
