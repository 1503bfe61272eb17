#!/usr/bin/env bash
# Writes the two locked requirement files, with a hash for every file that may be installed:
#
#   tests/requirements.txt        what `make test` and `make demo` install: the extras train, trackers, onnx, demo and dev
#   container/requirements.txt    what the image holds: the extras train and trackers and the build backend; versions as above
#
# Both are for Python 3.10 and newer on any platform, and leave out torch and its CUDA libraries: which build of torch
# is right depends on the machine, so it is installed by itself. Its ordinary dependencies are in, and its version is
# the one in Apptainer.def.
#
#   container/lock.sh                         lock again, keeping the versions that still fit
#   container/lock.sh --upgrade               take the newest versions
#   container/lock.sh --upgrade-package NAME  …of one package (repeatable); other options of `uv pip compile` too
#   container/lock.sh --check                 no network: do the files belong to pyproject.toml as it stands?
#
# Needs uv (extra dev): on PATH, in .venv/bin, or in the variable UV.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly python_version=3.10
torch=torch==$(sed -n 's/^ *TORCH_VERSION=//p' Apptainer.def)
readonly torch
readonly locks=(container/requirements.txt tests/requirements.txt)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d'
    exit 0
fi

# Python 3.11 or newer for tomllib.
python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi

# The requirements that the locks were made from, one a line; the digest of this text is in their first lines.
declared() {
    "$python" - "$python_version" "$torch" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    data = tomllib.load(file)
print("python", sys.argv[1], sys.argv[2])
for name, requirements in {
    "build": data["build-system"]["requires"],
    "project": data["project"]["dependencies"],
    **{extra: data["project"]["optional-dependencies"][extra] for extra in ("train", "trackers", "onnx", "demo", "dev")},
}.items():
    for requirement in sorted(requirements):
        print(name, requirement)
PYTHON
}

requirements=$(declared)
digest=$(sha256sum <<<"$requirements" | cut -c1-16)

if [[ ${1:-} == --check ]]; then
    for file in "${locks[@]}"; do
        if ! grep -qs "^# inputs: $digest\$" "$file"; then
            echo "lock: $file was not made from pyproject.toml as it stands; run container/lock.sh" >&2
            exit 1
        fi
    done
    exit 0
fi

uv=${UV:-uv}
if [[ -z ${UV:-} && -x .venv/bin/uv ]]; then uv=.venv/bin/uv; fi
command -v "$uv" >/dev/null || { echo 'lock: uv is missing; pip install uv, or name it in the variable UV' >&2; exit 3; }
while IFS= read -r -d '' setting; do export "${setting?}"; done < <("$python" container/pip_settings.py uv)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{ printf '%s\n' "$torch"; sed -n 's/^build //p' <<<"$requirements"; } >"$work/also.in"

# compile OUTPUT TITLE ARGUMENT…: the file as it is gives the versions to keep, then it is replaced in one step.
compile() {
    local output=$1 title=$2
    shift 2
    if [[ -f $output ]]; then cp "$output" "$work/lock"; else rm -f "$work/lock"; fi
    "$uv" pip compile --quiet --universal --python-version "$python_version" --generate-hashes --no-header \
        --no-emit-index-url --no-emit-find-links --no-annotate --output-file "$work/lock" "$@" \
        pyproject.toml "$work/also.in" >/dev/null
    {
        printf '# %s\n# Made by container/lock.sh; change pyproject.toml and run it again.\n' "$title"
        printf '# inputs: %s\n' "$digest"
        awk '/^[^ #]/ { keep = $1 !~ /^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==/ } keep' "$work/lock"
    } >"$output.new"
    mv "$output.new" "$output"
    echo "lock: $output: $(grep -c '^[^ #]' "$output") requirements" >&2
}

compile tests/requirements.txt 'Everything for tests and demo (extras train, trackers, onnx, demo, dev) but torch and its CUDA libraries.' \
    --extra train --extra trackers --extra onnx --extra demo --extra dev "$@"
compile container/requirements.txt 'Everything in the image but torch, its CUDA libraries and afina itself.' \
    --extra train --extra trackers --constraints tests/requirements.txt "$@"
