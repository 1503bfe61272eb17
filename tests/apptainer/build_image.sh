#!/usr/bin/env bash
# Builds the image that the cluster tests run in, from nothing, as the ordinary user: Apptainer is installed, a Debian
# base is made with debootstrap (no registry is needed), and container/build.sh makes the CPU image on it. Run as root
# on a Debian 12 machine; the first build takes minutes, and one after a change in src/ only seconds.
#
#   tests/apptainer/build_image.sh OUT.sif
#
# OUT.sif is left alone if it was made from the same files. Beside it, OUT.sif.d holds the base, the first image with
# these dependencies, and the digest of what OUT.sif was made from; it may be deleted at any time.
#
#   AFINA_TEST_USER     who builds (researcher)
#   AFINA_TORCH_INDEX   an index with PyTorch for the CPU; without it, pip's find-links must have a wheel
set -euo pipefail

[[ $# -eq 1 && $1 != -* ]] || { sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 2; }
((EUID == 0)) || { echo 'build_image: run it as root: it installs packages; the build itself runs as an ordinary user' >&2; exit 3; }

out=$(realpath -m "$1")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
user=${AFINA_TEST_USER:-researcher}
readonly out root user
readonly aside=$out.d
readonly packed=(pyproject.toml README.md LICENSE src slurm container Apptainer.def docs)
cd "$root"

# digest FILE-OR-FOLDER…: of names and contents.
digest() {
    find "$@" -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}

"$root/tests/apptainer/install.sh" >&2
inputs=$(digest "${packed[@]}" tests/apptainer/rootfs.sh)
if [[ -f $out && $(cat "$aside/inputs" 2>/dev/null) == "$inputs" ]]; then
    echo "$out: up to date"
    exit 0
fi

mkdir -p "$(dirname "$out")"
install -d -o "$user" "$aside" "$aside/tmp"
"$root/tests/apptainer/rootfs.sh" "$aside/rootfs" "$user"

# A copy, since the user may not be able to read the checkout.
rm -rf "$aside/checkout"
mkdir -p "$aside/checkout"
for path in "${packed[@]}"; do cp -R "$path" "$aside/checkout/$path"; done
chown -R "$user:" "$aside/checkout"

commit=$(git -C "$root" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null) || commit=unknown
epoch=$(git -C "$root" log -1 --format=%ct 2>/dev/null) || epoch=0
options=(--cpu --compress zstd --no-test --commit "$commit" --output "$aside/new.sif")
if [[ -n ${AFINA_TORCH_INDEX:-} ]]; then options+=(--torch-index "$AFINA_TORCH_INDEX"); fi
dependencies=$aside/base-$(digest container/requirements.txt container/prune.sh Apptainer.def tests/apptainer/rootfs.sh).sif
if [[ -f $dependencies ]]; then
    options+=(--update "$dependencies")
else
    rm -f "$aside"/base-*.sif
    options+=(--base-rootfs "$aside/rootfs")
fi

# The user's own HOME and a PATH that it can read, and root's pip settings, whose files it cannot.
mapfile -t -d '' settings < <(python3 container/pip_settings.py variables)
home=$(getent passwd "$user" | cut -d: -f6)
runuser -u "$user" -- env HOME="$home" PATH=/usr/local/bin:/usr/bin:/bin TMPDIR="$aside/tmp" SOURCE_DATE_EPOCH="$epoch" \
    ${settings[@]+"${settings[@]}"} "$aside/checkout/container/build.sh" "${options[@]}" >&2
[[ -f $dependencies ]] || ln "$aside/new.sif" "$dependencies"
mv -f "$aside/new.sif" "$out"
for beside in sha256 packages.json; do mv -f "$aside/new.sif.$beside" "$out.$beside"; done
sed -i "s/  .*/  $(basename "$out")/" "$out.sha256"
printf '%s\n' "$inputs" >"$aside/inputs"
printf '%s: %d MB in %d s\n' "$out" "$(($(stat -c %s "$out") / 1000000))" "$SECONDS"
