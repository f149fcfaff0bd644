#!/usr/bin/env bash
# Build sdist and wheel, install the wheel in a new environment, and use it there.
#   tools/check_package.sh PYTHON DIRECTORY      e.g. tools/check_package.sh .venv/bin/python dist
# PYTHON has the packages torch and build. The new environment borrows its packages but nsa, so that
# torch is not downloaded again. The wheel is built from the sdist, so both are complete.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath -s "$1")
directory=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# With the checkout in it, pip would take nsa for installed.
unset PYTHONPATH
rm -rf "$directory"
"$python" -m build --outdir "$directory" . >"$work/log" || { cat "$work/log"; exit 1; }
wheel=$(realpath "$directory"/nsa-*.whl)
ls "$directory"

"$python" -m venv "$work/venv"
new=$work/venv/bin/python
where='import sysconfig; print(sysconfig.get_path("purelib"))'
# Paths in a .pth file come last, and .pth files in them, such as an editable nsa's, do nothing.
"$python" -c "$where" >"$("$new" -c "$where")/borrowed.pth"
"$new" -m pip install -q --disable-pip-version-check "$wheel"

cd "$work"
"$new" -I - "$work/venv" <<'PYTHON'
import sys
from importlib import metadata
from pathlib import Path

import torch

import nsa

assert Path(nsa.__file__).is_relative_to(sys.argv[1]), nsa.__file__
assert metadata.version("nsa") == nsa.__version__
assert (Path(nsa.__file__).parent / "py.typed").exists()
q = torch.randn(1, 300, 4, 64, requires_grad=True)
k, v = torch.randn(1, 300, 2, 64), torch.randn(1, 300, 2, 64)
for config in (nsa.NSAConfig(), nsa.NSAConfig.paper()):
    out = nsa.forward(q, k, v, config=config)
    out.sum().backward()
    assert out.shape == q.shape
    assert q.grad.isfinite().all()
print(f"nsa {nsa.__version__} works from {nsa.__file__}")
PYTHON
"$new" -I -m nsa
