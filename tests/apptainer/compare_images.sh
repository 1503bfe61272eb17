#!/usr/bin/env bash
# Compares two images of afina file by file: names, kinds, owners, modes, times, contents. For two builds of one commit on one base.
#
#   tests/apptainer/compare_images.sh ONE.sif TWO.sif
#
# Says whether the files are the same byte for byte, whether their file systems are, and lists the files that differ. Exit code 0:
# the same files; 1: they differ; 2: not two images. Needs unsquashfs 4.4 or newer (package squashfs-tools), and room for both,
# unpacked, in TMPDIR.
set -euo pipefail

[[ $# -eq 2 && $1 != -* ]] || { sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d' >&2; exit 2; }
command -v unsquashfs >/dev/null || { echo 'compare_images: unsquashfs is missing (package squashfs-tools)' >&2; exit 3; }
work=$(mktemp -d)
trap 'chmod -R u+rwX "$work" && rm -rf "$work"' EXIT

# The offset of the file system, from the table of the image file.
offset() {
    apptainer sif list "$1" | sed -nE 's/.*\|([0-9]+)-[0-9]+ +\|FS \(Squashfs\/\*System.*/\1/p'
}

# list IMAGE NAME: what there is, one line each, in NAME.list; with the digest of each file in NAME.sums.
list() {
    local from
    from=$(offset "$1") && [[ $from ]] || { echo "compare_images: $1 is no image with a squashfs" >&2; exit 2; }
    # Seconds, owners by number.
    TZ=UTC unsquashfs -quiet -offset "$from" -lln "$1" | LC_ALL=C sort -k6 >"$work/$2.list"
    unsquashfs -quiet -no-progress -no-xattrs -offset "$from" -dest "$work/$2" "$1" >/dev/null 2>"$work/$2.errors" ||
        grep -v 'because you.re not superuser' "$work/$2.errors" >&2 || true
    chmod -R u+rX "$work/$2"
    (cd "$work/$2" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) >"$work/$2.sums"
    tail -c "+$((from + 1))" "$1" | sha256sum | cut -d' ' -f1 >"$work/$2.system"
    rm -rf "${work:?}/$2"
}

list "$1" one
list "$2" two
printf 'entries: %d and %d; files: %d and %d\n' "$(wc -l <"$work/one.list")" "$(wc -l <"$work/two.list")" \
    "$(wc -l <"$work/one.sums")" "$(wc -l <"$work/two.sums")"
if cmp -s "$1" "$2"; then echo 'the image files: the same, byte for byte'; else echo 'the image files: differ'; fi
if cmp -s "$work/one.system" "$work/two.system"; then echo 'the file systems: the same, byte for byte'; else echo 'the file systems: differ'; fi
status=0
for what in list sums; do
    if ! cmp -s "$work/one.$what" "$work/two.$what"; then
        status=1
        case $what in list) echo 'names, kinds, owners, modes, sizes or times that differ:' ;; sums) echo 'contents that differ:' ;; esac
        diff --unified=0 --label "$1" --label "$2" "$work/one.$what" "$work/two.$what" | head -n 60 || true
    fi
done
if ((status == 0)); then echo 'every entry and every digest: the same'; fi
exit "$status"
