#!/usr/bin/env bash
# Compare rlgen's HPSv2 scores with those of the package `hpsv2`, on the same weights and images.
#
#     PYTHON=.venv/bin/python tests/numerics/hpsv2_package/compare.sh
#
# PYTHON is an interpreter with rlgen installed. The package is installed without its pins
# (protobuf<4, pytest==7.2.0) into an environment of its own, which borrows torch and the rest from
# PYTHON's; both are deleted at the end. The weights are made by rlgen's weight rule and written as
# HPS_v2.1_compressed.pt is: no published weights are needed, only a package index.
#
# Exit status 0 if the largest deviation is within the tolerance. Takes 4.5 minutes of CPU time,
# memory for two ViT-H-14 in float32 (8 GB) and 2 GB of disk, and is therefore no part of the test suite.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=$(command -v "${PYTHON:-python}")

work=$(mktemp -d "${TMPDIR:-/tmp}/rlgen-hpsv2.XXXXXX")
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
isolated=$work/venv/bin/python
site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
site=$(site_of "$isolated")
"$isolated" -m pip install --quiet --disable-pip-version-check --no-deps hpsv2 clint args
# Read after the environment's own packages, so that those win.
site_of "$python" >"$site/borrowed.pth"
# The wheel forgets its tokenizer's vocabulary; open_clip, from which it was copied, has it.
cp "$(site_of "$python")/open_clip/bpe_simple_vocab_16e6.txt.gz" "$site/hpsv2/src/open_clip/"

PYTHONPATH=$root "$python" "$here/compare.py" make "$work"
"$isolated" -W ignore::FutureWarning "$here/compare.py" package "$work"
PYTHONPATH=$root "$python" "$here/compare.py" rlgen "$work"
