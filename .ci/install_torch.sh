#!/usr/bin/env bash
# Installs PyTorch's CPU build: `install_torch.sh PYTHON [WHAT...]`, WHAT being what pip is asked for, such as `torch==2.6.0`.
# On Linux, PyPI's own build comes with several GB of CUDA packages, so PyTorch's index of CPU builds is asked, unless the
# index that pip is set up with offers a CPU build itself. Other platforms' builds on PyPI have no CUDA.
# Options among WHAT, such as `torch --index-url https://download.pytorch.org/whl/cu130`, are taken as they are.
set -euo pipefail
python=$1
shift
[ $# -gt 0 ] || set -- torch==2.13.0
case "$*" in
*" --"*) ;;
*)
    found=$("$python" -m pip install --quiet --dry-run --no-deps --report - "$@" || true)
    if [ "$(uname)" = Linux ] && ! grep -q '"version": ".*+cpu"' <<<"$found"; then
        set -- "$@" --index-url https://download.pytorch.org/whl/cpu
    fi
    ;;
esac
exec "$python" -m pip install --quiet "$@"
