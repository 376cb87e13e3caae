#!/usr/bin/env bash
# Runs some hundred of the tests once in each of several environments and prints a row for each, for docs/changelog.md:
#
#     benchmarks/versions.sh 'python3.11 transformers==5.19.0' 'python3.10 torch==2.6.0 peft==0.21.0'
#
# A row is an interpreter and what pip is asked for beside the package. Each row gets an environment of its own, which
# is removed afterwards. OVER=.venv lays the environment over another one of the same interpreter, so that only what
# differs is installed. FILES and FILTER choose the tests.
set -euo pipefail
root=$(realpath "$(dirname "$0")/..")
: "${FILES:=tests/test_config.py tests/functional/test_one_token.py tests/memory tests/tuner/test_model.py
    tests/tuner/test_merge.py tests/checkpoint/test_save_load.py tests/checkpoint/test_transformers_path.py}"
# Two architectures of ten.
: "${FILTER:=not opt and not gpt2 and not neox and not mistral and not mixtral and not moe and not qwen2 and not gemma3}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
echo "| Python | PyTorch | PEFT | transformers | tests |"
echo "|---|---|---|---|---|"
for row in "$@"; do
    read -r interpreter requirements <<<"$row"
    read -ra wanted <<<"$requirements"
    "$interpreter" -m venv "$work/venv"
    python=$work/venv/bin/python
    if [ -n "${OVER:-}" ]; then
        packages=$("$OVER/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        here=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "import site; site.addsitedir('$packages')" >"$here/over.pth"
        [ ${#wanted[@]} -eq 0 ] || "$python" -m pip install --quiet "${wanted[@]}" >&2
    else
        torch=torch==2.13.0
        for requirement in "${wanted[@]}"; do
            case $requirement in torch==*) torch=$requirement ;; esac
        done
        .ci/install_torch.sh "$python" "$torch" >&2
        "$python" -m pip install --quiet --editable . pytest hypothesis accelerate datasets "${wanted[@]}" >&2
    fi
    # shellcheck disable=SC2086
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider --tb=short \
        -W ignore -k "$FILTER" $FILES >"$work/tests.log" 2>&1 || cat "$work/tests.log" >&2
    "$python" - "$(tail -n 1 "$work/tests.log" | sed 's/ in .*//; s/=//g')" <<'PYTHON'
import platform, sys
from importlib.metadata import version

versions = [platform.python_version(), *(version(name) for name in ("torch", "peft", "transformers"))]
print("|", " | ".join([*versions, sys.argv[1].strip()]), "|", flush=True)
PYTHON
    rm -rf "$work/venv"
done
