#!/usr/bin/env bash
# Installs what the image tests need on a Debian 12 machine, as root: Apptainer, the tools it calls, debootstrap, a registry,
# and an ordinary user to build and run as. Does nothing to what is there already; meant for a machine that may be
# thrown away (it opens /dev/fuse to everyone and creates a user).
#
# Debian 12 has no Apptainer package. The one in Debian's sid suite wants a newer C library than Debian 12's, so the
# package and the three libraries that it links are unpacked aside, and the two dynamically linked programs are told
# to use those. The mirror is the one that the machine's own apt sources name; apt verifies what it hands out.
#
#   tests/apptainer/install.sh            install, then print the version as the ordinary user
#   AFINA_TEST_USER=name …/install.sh     another user than "researcher"
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly test_user=${AFINA_TEST_USER:-researcher}
readonly lib_dir=/usr/local/lib/apptainer-sid
readonly starter=/usr/lib/x86_64-linux-gnu/apptainer/bin/starter
readonly tools=(squashfs-tools squashfuse fuse3 fuse-overlayfs uidmap fakeroot debootstrap patchelf ca-certificates docker-registry openssl python3)

say() { printf 'install: %s\n' "$*" >&2; }
die() { say "$*"; exit 3; }

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -qq "$@"; }

# `apt-get update` takes another lock than dpkg and does not wait for it.
update_lists() {
    local attempt
    for attempt in 1 2 3 4 5; do
        if apt_get update; then return; fi
        say "apt-get update failed (attempt $attempt of 5); waiting 10 s"
        sleep 10
    done
    die 'apt-get update fails: see its message above'
}

install_tools() {
    local missing=() package
    for package in "${tools[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    if ((${#missing[@]})); then
        say "packages: ${missing[*]}"
        update_lists
        apt_get install -y --no-install-recommends "${missing[@]}" >/dev/null
    fi
}

# An apt of its own, with its own lists, so that the machine never sees sid as a source to upgrade from.
sid_apt() {
    apt_get -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
        -o Dir::Etc::sourcelist="$work/sid.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=root "$@"
}

install_apptainer() {
    local mirror library
    mirror=$("$here/mirror.sh")
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work"/{state/lists/partial,cache/archives/partial,packages,root}
    : >"$work/status"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s sid main\n' "$mirror" >"$work/sid.list"
    say "Apptainer and its libraries from Debian's sid suite"
    sid_apt update
    (cd "$work/packages" && sid_apt download apptainer libc6 libseccomp2 libsqlite3-0)

    install -d "$lib_dir"
    for library in libc6 libseccomp2 libsqlite3-0; do
        dpkg-deb -x "$work/packages/$library"_*.deb "$work/root/$library"
        find "$work/root/$library" -path '*/x86_64-linux-gnu/*' -name '*.so.*' ! -path '*/gconv/*' \
            -exec cp -P --remove-destination {} "$lib_dir/" \;
    done

    dpkg-deb -x "$work/packages"/apptainer_*.deb "$work/root/apptainer"
    local program
    for program in "usr/bin/apptainer" "${starter#/}"; do
        patchelf --set-interpreter "$lib_dir/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$lib_dir" \
            "$work/root/apptainer/$program"
    done
    # cp -T merges the trees; the paths are compiled into the programs, so they cannot live elsewhere.
    cp -aT "$work/root/apptainer/etc/apptainer" /etc/apptainer
    cp -aT "$work/root/apptainer/usr/lib/x86_64-linux-gnu/apptainer" /usr/lib/x86_64-linux-gnu/apptainer
    cp -aT --remove-destination "$work/root/apptainer/usr/bin" /usr/bin
    install -d -m 755 /var/lib/apptainer/mnt/session
}

create_user() {
    # Another installer may create the same user at the same moment: what counts is that it is there afterwards.
    id -u "$test_user" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$test_user" || sleep 1
    id -u "$test_user" >/dev/null || die "the user $test_user could not be created"
    local file option
    for option in subuids subgids; do
        file=/etc/${option%s}
        grep -q "^$test_user:" "$file" 2>/dev/null || usermod "--add-$option" 100000-165535 "$test_user"
    done
}

((EUID == 0)) || die 'run it as root: it installs packages'
# shellcheck disable=SC1091
[[ $(. /etc/os-release && printf %s "$ID-$VERSION_ID-$(uname -m)") == debian-12-x86_64 ]] ||
    die 'written for Debian 12 on x86_64; elsewhere install Apptainer 1.2 or newer from its own packages'

install_tools
if ! command -v apptainer >/dev/null || ! apptainer version >/dev/null 2>&1; then install_apptainer; fi
create_user
[[ -e /dev/fuse ]] || mknod /dev/fuse c 10 229
chmod 0666 /dev/fuse
(($(cat /proc/sys/user/max_user_namespaces) > 0)) || die 'no user namespaces: sysctl user.max_user_namespaces is 0'

version=$(cd / && runuser -u "$test_user" -- apptainer version) || die "apptainer does not run as $test_user"
printf 'apptainer %s runs as %s\n' "$version" "$test_user"
