#!/usr/bin/env bash
# Builds the image as an ordinary user.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: container/build.sh [options]

Builds the image from Apptainer.def, as the calling user (apptainer build --fakeroot).

  --output FILE          the image to write (afina.sif); replaced only when the new one is complete
  --cpu                  PyTorch for the CPU, and no InfiniBand libraries or compiler; needs one of --torch-index,
                         --torch-wheels, or a folder of wheels in pip's configuration (find-links)
  --from NAME            another base from a registry (python:3.12-slim-bookworm)
  --base-rootfs DIR      a base that is a folder, where no registry can be reached: Debian with python3 and
                         python3-venv, owned by you (tests/apptainer/rootfs.sh makes one)
  --update IMAGE         start from an afina image; from the same lock only afina itself is installed, in seconds
  --torch-version X      2.13.0; container/lock.sh locks PyTorch's dependencies for this one
  --torch-index URL      the package index to take PyTorch from, e.g. PyTorch's own for CUDA 12 (older drivers)
  --torch-wheels DIR     …or a folder with the wheels of PyTorch and its CUDA libraries; no index is asked for them
  --apt-packages "A B"   Debian packages to add; "" for none
  --compress gzip|zstd   gzip (default) opens everywhere; zstd packs 15 times faster, old installations cannot open it
  --commit TEXT          the revision to label the image with (git's HEAD)
  --no-test              do not run %test at the end
  -h, --help

Temporary files take about twice the image: APPTAINER_TMPDIR, or else TMPDIR, must be on a local disk, not on Lustre,
GPFS or NFS. What is downloaded for a registry base is kept in APPTAINER_CACHEDIR (default: under the same folder).
pip's index, proxy and certificates of this machine are used inside the build; they do not stay in the image.

examples:
  container/build.sh                                             CUDA 13.0, drivers 580 and newer
  container/build.sh --torch-index "$PYTORCH_CUDA12_INDEX"       CUDA 12, drivers 525 and newer
  container/build.sh --cpu --torch-wheels wheels --output cpu.sif
  container/build.sh --update afina.sif                          after a change in src/
TEXT
}

say() { printf 'build: %s\n' "$*" >&2; }
# fail CODE TEXT: 2 is the caller's input, 3 the environment.
fail() { printf 'build: %s\n' "$2" >&2; exit "$1"; }

caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=afina.sif device=cuda bootstrap=docker from=python:3.12-slim-bookworm compress=gzip commit='' test=1
torch_version='' torch_index='' torch_wheels='' apt_packages=default update=''

while (($#)); do
    case $1 in
        --cpu) device=cpu ;;
        --no-test) test='' ;;
        -h | --help) usage; exit 0 ;;
        --output | --from | --base-rootfs | --update | --torch-version | --torch-index | --torch-wheels | \
            --apt-packages | --compress | --commit)
            (($# > 1)) || fail 2 "$1 wants a value; --help shows examples"
            case $1 in
                --output) output=$2 ;;
                --from) from=$2 ;;
                --base-rootfs) bootstrap=localimage from=$2 ;;
                --update) bootstrap=localimage from=$2 update=1 ;;
                --torch-version) torch_version=$2 ;;
                --torch-index) torch_index=$2 ;;
                --torch-wheels) torch_wheels=$2 ;;
                --apt-packages) apt_packages=$2 ;;
                --compress) compress=$2 ;;
                --commit) commit=$2 ;;
            esac
            shift
            ;;
        *) fail 2 "unknown option $1; --help lists them" ;;
    esac
    shift
done

absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$caller" "$1" ;; esac; }
output=$(absolute "$output")
[[ -d $(dirname "$output") && -w $(dirname "$output") ]] || fail 2 "cannot write in $(dirname "$output"): make it, or name another --output"
case $compress in
    gzip) mksquashfs=() ;;
    zstd) mksquashfs=(--mksquashfs-args '-comp zstd -Xcompression-level 3') ;;
    *) fail 2 "--compress $compress: gzip or zstd" ;;
esac
command -v apptainer >/dev/null || fail 3 'apptainer is not on PATH: load its module, or install Apptainer 1.2 or newer'
command -v python3 >/dev/null || fail 3 'python3 is not on PATH: it reads the configuration of pip for the build'

work=$(mktemp -d "${TMPDIR:-/tmp}/afina-build.XXXXXX")
# The unfinished image lies beside the final one, so that the last step is a rename within one file system.
unfinished="$output.$$.unfinished"
trap 'rm -rf "$work" "$unfinished"' EXIT

if [[ $bootstrap == localimage ]]; then
    from=$(absolute "$from")
    [[ -r $from ]] || fail 2 "the base $from is not there or not readable"
fi

mkdir "$work/host"
mapfile -t binds < <(python3 "$root/container/pip_settings.py" stage "$work/host")
[[ -f $work/host/pip.conf ]] || fail 3 'the configuration of pip could not be read: see the message above'
if [[ $torch_wheels ]]; then
    torch_wheels=$(absolute "$torch_wheels")
    compgen -G "$torch_wheels/torch-*.whl" >/dev/null || fail 2 "no torch-*.whl in $torch_wheels"
    mkdir "$work/host/torch-wheels"
    binds+=("$torch_wheels:/mnt/torch-wheels:ro")
elif [[ $device == cpu && -z $torch_index && -z $update ]] && ! grep -q '^find-links' "$work/host/pip.conf"; then
    fail 2 '--cpu: the package index serves PyTorch for CUDA; name PyTorch'"'"'s index for the CPU with --torch-index'
fi
bind_options=(--bind "$work/host:/mnt:ro")
for bind in "${binds[@]}"; do [[ -z $bind ]] || bind_options+=(--bind "$bind"); done

if [[ $apt_packages == default && $device == cpu ]]; then apt_packages=''; fi
if [[ -z $commit ]]; then
    commit=$(git -C "$root" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null) || commit=unknown
fi
# A file: on the command line Apptainer splits a build argument at its commas.
{
    printf 'BOOTSTRAP=%s\nFROM=%s\nDEVICE=%s\nCOMMIT=%s\n' "$bootstrap" "$from" "$device" "$commit"
    if [[ $torch_version ]]; then printf 'TORCH_VERSION=%s\n' "$torch_version"; fi
    if [[ $torch_index ]]; then printf 'TORCH_INDEX=%s\n' "$torch_index"; fi
    if [[ $apt_packages != default ]]; then printf 'APT_PACKAGES=%s\n' "$apt_packages"; fi
} >"$work/arguments"

export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-${TMPDIR:-/tmp}}
export APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$APPTAINER_TMPDIR/apptainer-cache-$(id -u)}
options=(--fakeroot --build-arg-file "$work/arguments" "${bind_options[@]}" ${mksquashfs[@]+"${mksquashfs[@]}"})
if [[ -z $test ]]; then options+=(--notest); fi

cd "$root"
if ! apptainer build "${options[@]}" "$unfinished" Apptainer.def; then
    if ((EUID == 0)); then
        fail 3 'the build failed, and it ran as root, which some machines do not allow: try as an ordinary user who has a line in /etc/subuid and /etc/subgid'
    fi
    grep -qs "^$(id -un):" /etc/subuid ||
        say 'you have no line in /etc/subuid: without one, apt-get fails in the build (usermod --add-subuids, by an administrator)'
    fail 3 'the build failed; nothing was written'
fi
mv -f "$unfinished" "$output"
printf '%s: %d MB in %d s\n' "$output" "$(($(stat -c %s "$output") / 1000000))" "$SECONDS"
