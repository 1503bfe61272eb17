#!/usr/bin/env bash
# Makes the base of the test image where no registry can be reached: a minimal Debian 12 with Python 3.11, as a plain
# folder that the named user owns. Runs as root (debootstrap needs chroot and mounts). What it leaves out: apt sources
# with updates, a compiler, everything that the image proper adds.
#
#   tests/apptainer/rootfs.sh DIR [USER]      USER: AFINA_TEST_USER, or "researcher"
#
# A folder that is already complete is left alone.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly include=python3,python3-venv,ca-certificates

[[ $# -ge 1 && $1 != -* ]] || { sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
rootfs=$1
user=${2:-${AFINA_TEST_USER:-researcher}}
((EUID == 0)) || { echo 'rootfs: run it as root: debootstrap needs it' >&2; exit 3; }
# Written last, beside the folder: a debootstrap that was interrupted is made anew.
stamp="$rootfs.complete"
wanted="bookworm $include $user"
if [[ -d $rootfs && -f $stamp && $(cat "$stamp") == "$wanted" ]]; then exit 0; fi

rm -rf --one-file-system "$rootfs" "$stamp"
mkdir -p "$(dirname "$rootfs")"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! debootstrap --variant=minbase --include="$include" bookworm "$rootfs" "$("$here/mirror.sh")" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo 'rootfs: debootstrap failed' >&2
    exit 3
fi
# Device nodes cannot be copied by an ordinary user, and every container gets its own /dev.
find "$rootfs/dev" -mindepth 1 -delete
rm -rf "$rootfs"/var/cache/apt/* "$rootfs"/var/lib/apt/lists/* "$rootfs"/var/log/*
# In the user namespace of `apptainer build --fakeroot` the caller's files are root's.
chown -R --no-dereference "$user:" "$rootfs"
printf '%s\n' "$wanted" >"$stamp"
