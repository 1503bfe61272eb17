#!/usr/bin/env bash
# Installs a real Slurm, munge and MariaDB on Debian and creates the ordinary user whose jobs the test cluster runs.
# Starts no service: tests/slurm/cluster.py starts every daemon by hand, in a folder of its own.
# Usage (as root): tests/slurm/install.sh        AFINA_TEST_USER names the user (default: researcher).
set -euo pipefail

user="${AFINA_TEST_USER:-researcher}"
packages=(slurm-wlm slurmdbd munge mariadb-server uidmap procps iproute2)

die() {
    printf 'install.sh: %s\n' "$1" >&2
    exit 1
}

[[ "$(id -u)" == 0 ]] || die "must run as root (it installs packages and creates the user '$user'): sudo $0"
command -v apt-get >/dev/null ||
    die "this machine has no apt-get: the test cluster is built on Debian 12 (a container of it will do)"
[[ "$user" =~ ^[a-z_][a-z0-9_-]*$ && "$user" != root ]] || die "AFINA_TEST_USER must name an ordinary user, not '$user'"

installed() {
    [[ "$(dpkg-query --show --showformat='${db:Status-Abbrev}' "$1" 2>/dev/null)" == ii* ]]
}

missing=()
for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
done

if ((${#missing[@]})); then
    # Exit code 101 of policy-rc.d means "do not start": a slurmctld or mariadbd of the system's own would hold
    # the ports and the database while the test cluster runs. A policy that is already there is left alone.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e "$policy" ]]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f "$policy"' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt=(apt-get --quiet --quiet --yes --option DPkg::Lock::Timeout=300)
    install=("${apt[@]}" install --no-install-recommends "${missing[@]}")
    # The package lists are fetched only when the ones at hand do not do.
    "${install[@]}" >/dev/null 2>&1 || {
        # `apt-get update` does not wait for the lock that another apt-get may hold.
        for attempt in 1 2 3 4 5; do
            if "${apt[@]}" update; then break; fi
            ((attempt < 5)) || die "apt-get update failed five times; its last message is above"
            sleep 5
        done
        "${install[@]}" || die "apt-get could not install: ${missing[*]}"
    }
fi

if ! id "$user" >/dev/null 2>&1; then
    useradd --create-home --home-dir "/home/$user" --shell /bin/bash "$user"
fi
home="$(getent passwd "$user" | cut -d: -f6)"
install -d -o "$user" -g "$(id -gn "$user")" -m 755 "$home"

# Rootless Apptainer maps the image's users into this range. useradd adds one by itself only where login.defs asks
# for it, and an older account has none.
next_range() {
    awk -F: 'BEGIN { next_id = 100000 } $2 + $3 > next_id { next_id = $2 + $3 } END { print next_id }' "$1"
}
for kind in uid gid; do
    file="/etc/sub$kind"
    touch "$file"
    if ! grep -q "^$user:" "$file"; then
        first="$(next_range "$file")"
        usermod "--add-sub${kind}s" "$first-$((first + 65535))" "$user"
    fi
done

for program in slurmctld slurmd slurmdbd sbatch munged mariadbd mariadb-install-db newuidmap; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" >/dev/null || die "'$program' is missing after the installation"
done
printf 'Slurm %s, user %s (%s)\n' "$(dpkg-query --show --showformat='${Version}' slurmctld)" "$user" "$home"
