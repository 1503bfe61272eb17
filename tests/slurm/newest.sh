#!/usr/bin/env bash
# Runs tests of tests/slurm against the newest Slurm and Apptainer that a Debian suite holds, in a root file system of its own.
# As root on a Debian machine. Takes minutes the first time and about 2.5 GB of disk; not part of CI.
#
#   tests/slurm/newest.sh [--suite sid] [--root DIR] [--no-accounting] [--print] [PYTEST ARGUMENT…]
#
# Without arguments for pytest it runs the selection below. --print only says the versions. --no-accounting: without slurmdbd and
# sacct, where the suite's slurmdbd and MariaDB do not get on (26.05.5 with 11.8.9: "null result from query"). The image is AFINA_TEST_IMAGE
# (/var/tmp/afina-test/afina.sif), made on this machine; the virtual environment is this checkout's .venv: its Python runs
# on a newer C library as it is. The suite's packages come from the mirror of this machine's own apt sources; apt verifies what it hands out.
#
# Inside, the new root is the root of a mount namespace (pivot_root), since Linux makes no user namespace in a chroot and
# Apptainer needs one; a process namespace ends whatever the tests leave behind.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
suite=sid root='' only_print='' accounting=1
selection=(tests/slurm/test_cluster.py tests/slurm/test_signals.py tests/slurm/test_jobs.py tests/slurm/test_variants.py)
readonly packages=(ca-certificates python3-venv squashfs-tools squashfuse fuse3 fuse-overlayfs apptainer openssl)

die() { printf 'newest: %s\n' "$1" >&2; exit 3; }

while (($#)); do
    case $1 in
        --suite) suite=$2; shift 2 ;;
        --root) root=$2; shift 2 ;;
        --print) only_print=1; shift ;;
        --no-accounting) accounting=0; shift ;;
        -h | --help) sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        *) break ;;
    esac
done
if (($#)); then
    selection=("$@")
elif ((accounting == 0)); then
    selection+=(-k 'not accounting and not preempt')
fi
((EUID == 0)) || die 'run it as root: it makes a root file system and mounts'
root=$(realpath -m "${root:-/var/tmp/afina-newest/$suite}")
image=$(realpath -m "${AFINA_TEST_IMAGE:-/var/tmp/afina-test/afina.sif}")
[[ -x $repository/.venv/bin/python ]] || die 'there is no .venv: make .venv/made'
prefix=$("$repository/.venv/bin/python" -c 'import sys; print(sys.base_prefix)')
command -v debootstrap >/dev/null || die 'debootstrap is missing: tests/apptainer/install.sh'

# --- the root file system ---------------------------------------------------------------------------------------------
if [[ ! -f $root.complete ]]; then
    rm -rf --one-file-system "$root"
    mkdir -p "$(dirname "$root")"
    debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$("$repository/tests/apptainer/mirror.sh")" >"$root.log" 2>&1 ||
        { tail -n 20 "$root.log" >&2; die 'debootstrap failed'; }
    touch "$root.complete"
fi
if [[ ! -f $root.packages || $(cat "$root.packages") != "${packages[*]}" ]]; then
    # shellcheck disable=SC2016 # for the shell inside
    unshare --mount --pid --fork bash -euc '
        mount --bind "$1" "$1"
        mount -t proc proc "$1/proc"
        cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
        install -D "$2/install.sh" "$1/afina/install.sh"
        printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"
        chmod 755 "$1/usr/sbin/policy-rc.d"
        root=$1
        shift 2
        export DEBIAN_FRONTEND=noninteractive
        chroot "$root" apt-get -qq -o Acquire::Check-Valid-Until=false update
        chroot "$root" apt-get -qq -y --no-install-recommends install "$@" >/dev/null
        chroot "$root" bash /afina/install.sh' newest "$root" "$here" "${packages[@]}" >>"$root.log" 2>&1 ||
        { tail -n 20 "$root.log" >&2; die 'the packages could not be installed'; }
    printf '%s\n' "${packages[*]}" >"$root.packages"
fi
# --- inside -----------------------------------------------------------------------------------------------------------
# shellcheck disable=SC2016
versions='printf "%s, Apptainer %s, %s, Linux %s\n" "$(slurmctld -V)" "$(apptainer version)" "$(. /etc/os-release; echo "$PRETTY_NAME")" "$(uname -r)"'
if [[ $only_print ]]; then exec chroot "$root" bash -c "$versions"; fi
[[ -f $image ]] || die "there is no image $image: tests/apptainer/build_image.sh $image"
mapfile -t -d '' settings < <(python3 "$repository/container/pip_settings.py" variables)
# Folders that must be seen inside: this checkout, its Python, what pip is told to look in.
folders=()
if [[ $prefix == /usr ]]; then
    python=$(readlink -f "$repository/.venv/bin/python")
    cp -a "$python" "$root$python"
    cp -aT "/usr/lib/${python##*/}" "$root/usr/lib/${python##*/}"
else
    folders+=("$prefix")
fi
while IFS= read -r folder; do
    folder=${folder%/}
    folder=${folder%/simple} # an index names files that lie beside its pages
    if [[ -d $folder ]]; then folders+=("$folder"); fi
done < <(printf '%s\n' ${settings[@]+"${settings[@]}"} | grep -oE '(file://|=| )/[^ ]+' | sed -E 's#^(file://|=| )##')
folders+=("$repository")
bundle=$(python3 -c 'import ssl; print(ssl.get_default_verify_paths().cafile or "")')
# shellcheck disable=SC2016
exec unshare --mount --pid --fork --propagation private bash -euc '
    root=$1 image=$2 bundle=$3 versions=$4 folders=$5
    shift 5
    mount --bind "$root" "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount -t tmpfs -o mode=1777,size=4g tmpfs "$root/tmp"
    mount -t tmpfs -o mode=1777 tmpfs "$root/var/tmp"
    mkdir -p "$root/run/lock" "$root$(dirname "$image")" "$root/afina/old"
    for ((; folders > 0; folders--)); do
        mkdir -p "$root$1"
        mount --bind "$1" "$root$1"
        repository=$1 # the last one
        shift
    done
    touch "$root$image"
    mount --bind "$image" "$root$image"
    if [ -n "$bundle" ]; then cat "$bundle" >"$root/etc/ssl/certs/ca-certificates.crt"; fi
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    cd "$root"
    pivot_root . afina/old
    cd "$repository"
    umount -l /afina/old
    bash -c "$versions"
    exec "$@"' newest "$root" "$image" "$bundle" "$versions" "${#folders[@]}" "${folders[@]}" \
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 AFINA_REQUIRE_CLUSTER=1 AFINA_CLUSTER_ACCOUNTING="$accounting" \
    AFINA_TEST_IMAGE="$image" \
    ${settings[@]+"${settings[@]}"} "$repository/.venv/bin/python" -m pytest -p no:cacheprovider "${selection[@]}"
