#!/bin/sh
# Removes the test suites of the installed packages (147 MB, 84 MB of them PyTorch's); nothing in the packages imports them.
#
#   prune.sh SITE-PACKAGES
#
# A suite is a folder named test or tests that holds test_* somewhere, below a package; torch/test holds programs instead.
set -eu
find "$1" -mindepth 2 -type d \( -name test -o -name tests \) -prune -exec sh -c '
    for folder; do
        case $folder in
            "$0/torch/test") rm -rf "$folder" ;;
            *) [ -z "$(find "$folder" -name "test_*" -print -quit)" ] || rm -rf "$folder" ;;
        esac
    done' "$1" {} +
