#!/usr/bin/env bash
# Writes the three locked requirement files, with a hash for every file that may be installed:
#
#   tests/requirements.txt        what `make test` and `make demo` install: the extras train, trackers, onnx, demo and dev
#   container/requirements.txt    what the image holds: the extras train and trackers and the build backend; versions as above
#   docs/requirements.txt         what `make docs` installs beside the first: the extra docs
#
# All are for Python 3.10 and newer (docs: 3.11, as Sphinx) on any platform, and leave out torch and its CUDA libraries: which
# build of torch is right depends on the machine, so it is installed by itself. Its ordinary dependencies are in, and its
# version is the one in Apptainer.def.
#
#   container/lock.sh                         lock again, keeping the versions that still fit
#   container/lock.sh --upgrade               take the newest versions
#   container/lock.sh --upgrade-package NAME  …of one package (repeatable); other options of `uv pip compile` too
#   container/lock.sh --check                 no network: do the files belong to pyproject.toml as it stands?
#
# Needs uv (extra dev): on PATH, in .venv/bin, or in the variable UV.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly oldest_python=3.10
torch=torch==$(sed -n 's/^ *TORCH_VERSION=//p' Apptainer.def)
readonly torch
readonly locks=(container/requirements.txt docs/requirements.txt tests/requirements.txt)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d'
    exit 0
fi

# Python 3.11 or newer for tomllib.
python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi

# The requirements that the locks were made from, one a line; the digest of this text is in their first lines.
declared() {
    "$python" - "$oldest_python" "$torch" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    data = tomllib.load(file)
print("python", sys.argv[1], sys.argv[2])
for name, requirements in {
    "build": data["build-system"]["requires"],
    "project": data["project"]["dependencies"],
    **{extra: data["project"]["optional-dependencies"][extra] for extra in ("train", "trackers", "onnx", "demo", "docs", "dev")},
}.items():
    for requirement in sorted(requirements):
        print(name, requirement)
PYTHON
}

requirements=$(declared)
# digest FILE: of what that lock is made from; the extra docs concerns its own lock alone.
digest() {
    if [[ $1 == docs/* ]]; then cat; else grep -v '^docs '; fi <<<"$requirements" | sha256sum | cut -c1-16
}

if [[ ${1:-} == --check ]]; then
    for file in "${locks[@]}"; do
        if ! grep -qs "^# inputs: $(digest "$file")\$" "$file"; then
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

# compile PYTHON OUTPUT TITLE ARGUMENT…: the file as it is gives the versions to keep, then it is replaced in one step.
compile() {
    local python_version=$1 output=$2 title=$3
    shift 3
    if [[ -f $output ]]; then cp "$output" "$work/lock"; else rm -f "$work/lock"; fi
    "$uv" pip compile --quiet --universal --python-version "$python_version" --generate-hashes --no-header \
        --no-emit-index-url --no-emit-find-links --no-annotate --output-file "$work/lock" "$@" \
        pyproject.toml >/dev/null
    {
        printf '# %s\n# Made by container/lock.sh; change pyproject.toml and run it again.\n' "$title"
        printf '# inputs: %s\n' "$(digest "$output")"
        awk '/^[^ #]/ { keep = $1 !~ /^(torch|triton|nvidia-[^=]*|cuda-[^=]*)==/ } keep' "$work/lock"
    } >"$output.new"
    mv "$output.new" "$output"
    echo "lock: $output: $(grep -c '^[^ #]' "$output") requirements" >&2
}

compile "$oldest_python" tests/requirements.txt 'Everything for tests and demo (extras train, trackers, onnx, demo, dev) but torch and its CUDA libraries.' \
    "$work/also.in" --extra train --extra trackers --extra onnx --extra demo --extra dev "$@"
compile "$oldest_python" container/requirements.txt 'Everything in the image but torch, its CUDA libraries and afina itself.' \
    "$work/also.in" --extra train --extra trackers --constraints tests/requirements.txt "$@"
compile 3.11 docs/requirements.txt 'Everything for the documentation: afina without PyTorch, and the extra docs.' \
    --extra docs --constraints tests/requirements.txt "$@"
