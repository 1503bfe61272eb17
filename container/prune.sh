#!/bin/sh
# Removes the test suites of the installed packages (147 MB, 84 MB of them PyTorch's), which nothing in the packages imports, and
# bitsandbytes' libraries (120 MB) for other CUDA versions than PyTorch's, for ROCm and for Intel's GPUs.
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

cuda=$(sed -n "s/^cuda[^']*'\([0-9]*\)[.].*/\1/p" "$1/torch/version.py")
find "$1/bitsandbytes" -name "libbitsandbytes_*.so" ! -name libbitsandbytes_cpu.so ! -name "libbitsandbytes_cuda${cuda:-none}?.so" -delete
