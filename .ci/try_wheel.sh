#!/usr/bin/env bash
# Installs a wheel into a fresh environment, away from the sources, and tries it out: `try_wheel.sh WHEEL [CONSTRAINT...]`,
# such as `try_wheel.sh dist/*.whl peft==0.21.0 transformers==5.20.0`. It fetches PyTorch; some minutes.
set -euo pipefail
wheel=$(realpath "$1")
sources=$(realpath "$(dirname "$0")/..")
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${SYSTEM_PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet "$wheel" "$@"
unzip -l "$wheel" | grep -q peft_talan/py.typed
venv/bin/peft-talan --version
venv/bin/peft-talan doctor
# The tests' hub on loopback stands in for the real one: push, forget, pull, compare.
if [ -f "$sources/tests/test_hub.py" ]; then
  cp -r "$sources/tests" tests
  venv/bin/pip install --quiet pytest hypothesis datasets trl
  venv/bin/python -m pytest -q -p no:cacheprovider tests/test_hub.py -k pushed_and_pulled
fi
