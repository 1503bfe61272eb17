#!/usr/bin/env bash
# Prints the address of the Debian bookworm mirror that this machine's own apt sources name, so that no address
# stands in the repository. Fails if there is none.
set -euo pipefail

# What apt replaces in --format is written $(NAME), which must reach it as it stands.
# shellcheck disable=SC2016
origin_known=$(apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "Debian" && $2 == "bookworm" { print $3; exit }')
# Before the first `apt-get update` apt knows an archive's address and suite, not yet whose it is.
# shellcheck disable=SC2016
mirror=${origin_known:-$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "bookworm" && $2 == "main" { print $3; exit }')}
[[ -n $mirror ]] || { echo "mirror: no Debian bookworm mirror in this machine's apt sources" >&2; exit 3; }
printf '%s\n' "$mirror"
