#!/usr/bin/env bash
# The proof on one NVIDIA GPU, in one command and within eight minutes: tests, speed beside peers, a decoder with LoRA. Writes JSON.
#
#   tests/gpu/prove.sh --out proof.json                      in the checkout's .venv, or with the python3 of this machine
#   tests/gpu/prove.sh --out proof.json --wheels FOLDER      without a package index: installs tests/requirements.txt and torch from FOLDER
#   tests/gpu/prove.sh --out proof.json --dry-run            tiny models on the CPU: does it run
#
# Fill FOLDER where there is an index: pip download -d FOLDER -r tests/requirements.txt torch==VERSION
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
arguments=() wheels=""
while (($#)); do
    case $1 in
        --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
        *) arguments+=("$1"); shift ;;
    esac
done
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
if [[ -n $wheels ]]; then
    place=$(mktemp -d)
    trap 'rm -rf "$place"' EXIT
    python3 -m venv "$place"
    python=$place/bin/python
    "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps -r tests/requirements.txt
    "$python" -m pip install -q --no-index --find-links "$wheels" "torch==$(sed -n 's/^ *TORCH_VERSION=//p' Apptainer.def)"
    "$python" -m pip install -q --no-index --find-links "$wheels" --no-deps --no-build-isolation -e . || export PYTHONPATH=$PWD/src
fi
"$python" tests/gpu/prove.py "${arguments[@]}"
