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
  --from NAME            another base from a registry (python:3.12-slim-bookworm); NAME@sha256:… does not move as a tag does
  --base-rootfs DIR      a base that is a folder, where no registry can be reached: Debian with python3 and
                         python3-venv, owned by you (tests/apptainer/rootfs.sh makes one)
  --update IMAGE         start from an afina image; from the same lock only afina itself is installed, in seconds
  --torch-version X      2.13.0; container/lock.sh locks PyTorch's dependencies for this one
  --torch-index URL      the package index to take PyTorch from, e.g. PyTorch's own for CUDA 12 (older drivers)
  --torch-wheels DIR     or a folder with the wheels of PyTorch and its CUDA libraries; no index is used for them
  --apt-packages "A B"   Debian packages to add; "" for none
  --compress KIND        gzip (default) opens everywhere; zstd packs 15 times faster, old installations cannot open it.
                         With a level: gzip:1 to gzip:9, zstd:1 to zstd:22 (gzip:9, zstd:3)
  --sign KEY             sign it: the file of a PEM private key, or the number of a PGP key (apptainer key list --secret)
  --push ADDRESS         push it, and print the address with its digest for AFINA_IMAGE: oras://HOST/NAME:TAG as it is, or
                         docker://HOST/NAME:TAG as an OCI image of the same files, for Docker, Podman, pyxis, Charliecloud and
                         Kubernetes. May be repeated. Log in first: apptainer registry login
  --commit TEXT          the revision to label the image with (git's HEAD)
  --no-test              skip %test at the end: imports, and two steps of training on the CPU
  -h, --help

Written beside the image: FILE.sha256, and FILE.packages.json, the Python packages in it with versions and licences.

Temporary files take about twice the image: APPTAINER_TMPDIR, or else SLURM_TMPDIR or TMPDIR, must be on a local disk, not on
Lustre, GPFS or NFS. Packages and base layers that were downloaded are kept in APPTAINER_CACHEDIR (default: under the
same folder), and an interrupted build reuses them. pip's index, proxy and certificates of this machine are used inside the
build; they do not stay in the image. SOURCE_DATE_EPOCH, by default the commit's time, is the latest time of a file in it.

examples:
  container/build.sh                                             CUDA 13.0, drivers 580 and newer
  container/build.sh --torch-index "$PYTORCH_CUDA12_INDEX"       CUDA 12, drivers 525 and newer
  container/build.sh --cpu --torch-wheels wheels --output cpu.sif
  container/build.sh --update afina.sif                          after a change in src/
  container/build.sh --compress zstd:19 --sign private.pem       small, and signed
TEXT
}

say() { printf 'build: %s\n' "$*" >&2; }
# fail CODE TEXT: 2 is the caller's input, 3 the environment.
fail() { printf 'build: %s\n' "$2" >&2; exit "$1"; }

caller=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=afina.sif device=cuda bootstrap=docker from=python:3.12-slim-bookworm compress=gzip commit='' test=1 sign=''
push=()
torch_version='' torch_index='' torch_wheels='' apt_packages=default update=''

while (($#)); do
    case $1 in
        --cpu) device=cpu ;;
        --no-test) test='' ;;
        -h | --help) usage; exit 0 ;;
        --output | --from | --base-rootfs | --update | --torch-version | --torch-index | --torch-wheels | \
            --apt-packages | --compress | --compression | --commit | --sign | --push)
            (($# > 1)) || fail 2 "$1 needs a value; --help shows examples"
            case $1 in
                --output) output=$2 ;;
                --from) from=$2 ;;
                --base-rootfs) bootstrap=localimage from=$2 ;;
                --update) bootstrap=localimage from=$2 update=1 ;;
                --torch-version) torch_version=$2 ;;
                --torch-index) torch_index=$2 ;;
                --torch-wheels) torch_wheels=$2 ;;
                --apt-packages) apt_packages=$2 ;;
                --compress | --compression) compress=$2 ;;
                --sign) sign=$2 ;;
                --commit) commit=$2 ;;
                --push) push+=("$2") ;;
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
kind=${compress%%:*} level=''
if [[ $compress == *:* ]]; then level=${compress#*:}; fi
case $kind,${level:-3} in
    gzip,[1-9]) mksquashfs=(--mksquashfs-args "-comp gzip -Xcompression-level ${level:-9}") ;;
    zstd,[1-9] | zstd,1[0-9] | zstd,2[0-2]) mksquashfs=(--mksquashfs-args "-comp zstd -Xcompression-level ${level:-3}") ;;
    *) fail 2 "--compress $compress: gzip, gzip:1 to gzip:9, zstd, zstd:1 to zstd:22" ;;
esac
signing=()
if [[ $sign =~ ^[0-9]+$ ]]; then
    signing=(--keyidx "$sign")
elif [[ $sign ]]; then
    sign=$(absolute "$sign")
    [[ -f $sign && -r $sign ]] || fail 2 "--sign $sign: no such key file; a PEM private key, or the number of a PGP key"
    signing=(--key "$sign")
fi
for address in ${push[@]+"${push[@]}"}; do
    [[ $address =~ ^(oras|docker)://[^@]+$ ]] || fail 2 "--push $address: oras://HOST/NAME:TAG or docker://HOST/NAME:TAG"
done
command -v apptainer >/dev/null || fail 3 'apptainer is not on PATH: load its module, or install Apptainer 1.2 or newer'
command -v python3 >/dev/null || fail 3 'python3 is not on PATH: it reads the configuration of pip for the build'

afina() { PYTHONPATH=$root/src python3 -m afina "$@"; }
if ((${#push[@]})) && ! afina image push --help >/dev/null 2>&1; then
    fail 3 "--push needs afina's own packages in $(command -v python3): pip install . (without PyTorch); or push later: afina image push IMAGE ADDRESS"
fi

export APPTAINER_TMPDIR=${APPTAINER_TMPDIR:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
export APPTAINER_CACHEDIR=${APPTAINER_CACHEDIR:-$APPTAINER_TMPDIR/apptainer-cache-$(id -u)}
[[ -d $APPTAINER_TMPDIR && -w $APPTAINER_TMPDIR ]] || fail 3 "cannot write in $APPTAINER_TMPDIR: set APPTAINER_TMPDIR to a folder on a local disk"
disk=$(stat --file-system --format %T "$APPTAINER_TMPDIR")
case $disk in
    lustre | nfs | gpfs | beegfs | panfs | ceph | afs)
        fail 3 "$APPTAINER_TMPDIR is on $disk, where a build as an ordinary user fails: set APPTAINER_TMPDIR to a folder on a local disk"
        ;;
esac
if [[ $device == cuda ]]; then needed=14 files=130000; else needed=4 files=80000; fi
read -r free inodes < <(df --output=avail,iavail --block-size=1G "$APPTAINER_TMPDIR" | tail -n 1)
((free >= needed)) || say "only $free GB are free in $APPTAINER_TMPDIR; about $needed are needed"
[[ $inodes == - || $inodes == 0 ]] || ((inodes >= files)) || say "only $inodes inodes are free in $APPTAINER_TMPDIR; about $files are needed"
mkdir -p "$APPTAINER_CACHEDIR/pip"

work=$(mktemp -d "$APPTAINER_TMPDIR/afina-build.XXXXXX")
# The unfinished image lies beside the final one, so that the last step is a rename within one file system.
unfinished="$output.$$.unfinished"
trap 'rm -rf "$work" "$unfinished"*' EXIT

if [[ $bootstrap == localimage ]]; then
    from=$(absolute "$from")
    [[ -r $from ]] || fail 2 "the base $from does not exist or cannot be read"
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
mkdir "$work/host/cache"
bind_options=(--bind "$work/host:/mnt:ro" --bind "$APPTAINER_CACHEDIR/pip:/mnt/cache")
for bind in "${binds[@]}"; do [[ -z $bind ]] || bind_options+=(--bind "$bind"); done

if [[ $apt_packages == default && $device == cpu ]]; then apt_packages=''; fi
if [[ -z $commit ]]; then
    commit=$(git -C "$root" describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null) || commit=unknown
fi
epoch=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null)} || epoch=''
[[ $epoch =~ ^[0-9]*$ ]] || fail 2 "SOURCE_DATE_EPOCH=$epoch: give seconds since 1970"
# mksquashfs reads it, and so does Apptainer 1.5, which then makes the same file of the same contents.
if [[ $epoch ]]; then export SOURCE_DATE_EPOCH=$epoch; fi

# The base, for the labels: an afina image has them already, and a folder is identified by its list of packages.
base_name='' base_digest=''
if [[ $bootstrap == docker ]]; then
    base_name=${from%@*}
    if [[ $from == *@sha256:* ]]; then base_digest=${from##*@}; else say "the tag $base_name moves: --from NAME@sha256:… does not"; fi
elif [[ -z $update ]]; then
    base_name=$(basename "$from")
    if [[ -f $from/var/lib/dpkg/status ]]; then base_digest=dpkg-status:$(sha256sum <"$from/var/lib/dpkg/status" | cut -d' ' -f1); fi
fi

# A file: on the command line Apptainer splits a build argument at its commas.
{
    printf 'BOOTSTRAP=%s\nFROM=%s\nDEVICE=%s\nCOMMIT=%s\n' "$bootstrap" "$from" "$device" "$commit"
    printf 'BASE_NAME=%s\nBASE_DIGEST=%s\n' "$base_name" "$base_digest"
    if [[ $torch_version ]]; then printf 'TORCH_VERSION=%s\n' "$torch_version"; fi
    if [[ $torch_index ]]; then printf 'TORCH_INDEX=%s\n' "$torch_index"; fi
    if [[ $apt_packages != default ]]; then printf 'APT_PACKAGES=%s\n' "$apt_packages"; fi
} >"$work/arguments"

options=(--fakeroot --build-arg-file "$work/arguments" "${bind_options[@]}" ${mksquashfs[@]+"${mksquashfs[@]}"})
if [[ -z $test ]]; then options+=(--notest); fi

cd "$root"
if ! apptainer build "${options[@]}" "$unfinished" Apptainer.def; then
    if ((EUID == 0)); then
        fail 3 'the build failed, and it ran as root, which some machines do not allow: try as an ordinary user who has a line in /etc/subuid and /etc/subgid'
    fi
    grep -qs "^$(id -un):" /etc/subuid ||
        say 'you have no line in /etc/subuid: without one, apt-get fails in the build (usermod --add-subuids, by an administrator)'
    [[ $bootstrap != docker ]] || say "if $from cannot be fetched: --from names another base, --base-rootfs a folder, --update an afina image"
    fail 3 'the build failed; nothing was written'
fi
apptainer --quiet exec --no-home "$unfinished" cat /opt/afina/packages.json >"$unfinished.packages.json" || fail 3 'the new image does not start; nothing was written'
if ((${#signing[@]})); then
    apptainer --quiet sign "${signing[@]}" "$unfinished" || fail 3 'the image could not be signed; nothing was written'
fi
digest=$(sha256sum <"$unfinished" | cut -d' ' -f1)
printf '%s  %s\n' "$digest" "$(basename "$output")" >"$unfinished.sha256"
# An image never lies beside the checksum of another one.
rm -f "$output.sha256" "$output.packages.json"
mv -f "$unfinished" "$output"
mv -f "$unfinished.packages.json" "$output.packages.json"
mv -f "$unfinished.sha256" "$output.sha256"
printf '%s: %d MB in %d s, sha256 %s\n' "$output" "$(($(stat -c %s "$output") / 1000000))" "$SECONDS" "$digest"
for address in ${push[@]+"${push[@]}"}; do
    TMPDIR=$APPTAINER_TMPDIR afina image push "$output" "$address" ||
        fail 3 "$output is complete, and was not pushed; again with: afina image push $(printf %q "$output") $(printf %q "$address")"
done
