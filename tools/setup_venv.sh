#!/usr/bin/env bash
# Make a virtual environment with PyTorch and this package in it.
#   tools/setup_venv.sh DIRECTORY EXTRAS      e.g. tools/setup_venv.sh .venv test,tools
# PYTHON names the interpreter (3.11 or newer), TORCH_VERSION the PyTorch to install instead of the
# one that results are of.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
extras=$2
gpu_torch=${TORCH_VERSION:-2.11.0}
cpu_torch=${TORCH_VERSION:-2.13.0}
cpu_index=https://download.pytorch.org/whl/cpu

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: need Python 3.11 or newer; name one: make PYTHON=/path/to/python3" >&2
    return 1
}

# -qq: errors still show; the progress of each of some forty packages does not.
install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"
}

python=$(find_python)
echo "setup: $("$python" --version) in $venv"
"$python" -m venv --clear "$venv"

if nvidia-smi -L >/dev/null 2>&1; then
    # Every GPU result is of this version. What PyPI has of it for Linux is the build for CUDA 13.0.
    echo "setup: NVIDIA GPU found, installing PyTorch $gpu_torch for CUDA"
    extras=$extras,fused
    wanted=torch==$gpu_torch
    install "$wanted"
    echo "setup: PyTorch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
elif [ "$(uname -s)" = Darwin ]; then
    echo "setup: installing PyTorch $cpu_torch"
    wanted=torch==$cpu_torch
    install "$wanted"
else
    # "+cpu" names the CPU build, so that no index can hand over gigabytes of CUDA libraries.
    echo "setup: no NVIDIA GPU, installing PyTorch $cpu_torch for the CPU"
    wanted=torch==$cpu_torch+cpu
    # First from the indexes that pip is set up with (a mirror, a local wheel), then PyTorch's own.
    install "$wanted" 2>/dev/null || install --extra-index-url "$cpu_index" --retries 2 "$wanted"
fi

echo "setup: installing nsa with extras $extras"
# Naming torch again keeps pip from replacing the build chosen above.
install "$wanted" --editable ".[$extras]"
