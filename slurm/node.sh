#!/bin/bash
# Runs a node's worker in an image that stays mounted when Slurm signals the job.
#
#   node.sh IMAGE COMMAND…        IMAGE, as a word of COMMAND, is replaced by the path of the mounted image
#
# Apptainer without setuid mounts the image by a FUSE process inside the job step. USR1, USR2 or TERM to every process of
# the step (a preemption under proctrack/linuxproc or pgid) ends that process while Python runs on without its files: the
# next import fails, or reading a new page is a bus error. So the image is mounted here, once per node, by a
# process that has left the step's tree and its session and ignores those signals, and COMMAND runs from the mount.
#
# It costs 0.06 s at the start (medians of 10, in turn: `apptainer exec IMAGE true` 0.12 s, through here 0.18 s).
#
# The image is unmounted when COMMAND ends; the exit code is COMMAND's, and TERM, USR1, USR2, INT and HUP are forwarded to it. A
# watcher outside the tree unmounts if the whole step is killed. If the watcher is killed too (SIGKILL under
# proctrack/cgroup reaches all), a dead mount point remains in TMPDIR, and this user's next start on the node clears it.
#
# Where that is impossible, one line gives the reason and COMMAND runs unchanged. Not covered: a setuid Apptainer (root cannot
# see a user's FUSE mount), an Apptainer that adds a fuse-overlayfs of its own (kernels before 5.11), SIGKILL of the mount.
#
# Needs bash 4.1, coreutils, setsid, and the tools that Apptainer itself mounts with.

set -u

readonly pattern="afina-image-$UID-"

say() { printf 'afina: %s\n' "$*" >&2; }

# Lazily (-z): a container that is still ending keeps its own copy of the mount, and the FUSE process ends with the last copy
# (measured: imports still work after it).
unmount() { # FOLDER
  local tool
  for tool in fusermount3 fusermount; do
    if command -v "$tool" >/dev/null; then
      "$tool" -u -z -q -- "$1/afina.sif" 2>/dev/null
      break
    fi
  done
  rm -f -- "$1/log"
  rmdir -- "$1/afina.sif" "$1" 2>/dev/null
}

# Standard input is a pipe that the step holds open. Its end without the word `unmounted` means that the whole step was killed.
# shellcheck disable=SC2329 # called by name, in a shell of its own
watch() { # FOLDER
  local word=
  cd / || return
  read -r word
  [ "$word" = unmounted ] || unmount "$1"
}

# A mount whose FUSE process was killed answers "Transport endpoint is not connected".
clear_dead() {
  local mounts line point options
  mapfile -t mounts </proc/self/mounts
  for line in "${mounts[@]}"; do
    read -r _ point _ options _ <<<"$line"
    case $point,$options, in */"$pattern"??????/afina.sif,*,user_id=$UID,*) ;; *) continue ;; esac
    printf -v point %b "${point//\\/\\0}" # a space is \040 there
    # One that only hangs (its process is stopped, or starved) may belong to another job: 137 is stat, killed by timeout.
    { timeout -s KILL 5 stat -- "$point"; } >/dev/null 2>&1
    case $? in 0 | 137) continue ;; esac
    unmount "${point%/*}"
    say "cleared the dead mount point $point of an earlier job"
  done
}

# Sets `mount` to the mounted image and `folder` to its parent folder, or `why` to the reason for the failure.
mount_image() { # IMAGE RUNTIME
  local name value libexec=/usr/libexec suid=0 tool='' candidate span kind offset='' log
  [ -f "$1" ] || { why='it is not a file'; return 1; }
  [ -r /dev/fuse ] && [ -w /dev/fuse ] || { why='/dev/fuse cannot be used here'; return 1; }
  while IFS='=' read -r name value; do
    case $name in
      LIBEXECDIR) libexec=$value ;;
      *_SUID_INSTALL) suid=$value ;;
    esac
  done < <("$2" buildcfg 2>/dev/null)
  [ "$suid" != 1 ] || { why="this $2 is installed setuid, and root cannot see a user's mount"; return 1; }
  for candidate in "$libexec/$2/bin/squashfuse_ll" squashfuse_ll squashfuse; do
    tool=$(command -v -- "$candidate") && break
  done
  [ -n "$tool" ] || { why='there is no squashfuse_ll and no squashfuse'; return 1; }
  command -v fusermount3 >/dev/null || command -v fusermount >/dev/null || { why='there is no fusermount'; return 1; }
  while IFS='|' read -r _ _ _ span kind; do
    case $kind in 'FS (Squashfs/*System/'*) offset=${span%%-*} && break ;; esac
  done < <("$2" sif list "$1" 2>/dev/null)
  [ -n "$offset" ] || { why='it has no squashfs partition to mount'; return 1; }
  folder=$(mktemp -d "${TMPDIR:-/tmp}/${pattern}XXXXXX" 2>/dev/null) || { why="cannot write in ${TMPDIR:-/tmp}"; return 1; }
  mount=$folder/afina.sif
  mkdir "$mount"
  # After mounting it goes into the background and so leaves the step's tree; ignored signals stay ignored.
  (trap '' TERM USR1 USR2 HUP INT; exec setsid "$tool" -o "ro,offset=$offset" "$1" "$mount") </dev/null >"$folder/log" 2>&1
  if [ "$(stat -c %d -- "$mount" 2>/dev/null)" = "$(stat -c %d -- "$folder")" ]; then
    log=$(tr '\n' ' ' <"$folder/log")
    why="${tool##*/} failed: ${log:-without a message}"
    unmount "$folder"
    return 1
  fi
}

# shellcheck disable=SC2329 # called by traps
forward() { # SIGNAL
  interrupted=1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; else pending+=("$1"); fi
}

main() { # IMAGE COMMAND…
  local image=$1 word code why='' mount='' folder='' child='' interrupted='' watching pending=() command=()
  shift
  # A site's or a profile's settings that would keep variables or folders out of the container (`site/settings.py` has the same list).
  for word in CLEANENV CONTAIN CONTAINALL COMPAT NO_MOUNT HOME PWD CWD WORKDIR SCRATCH PID NET; do unset "APPTAINER_$word" "SINGULARITY_$word"; done
  command -v -- "$1" >/dev/null || {
    printf 'error: %s is not on PATH of %s\n  remedy: load its module in site.env, or have it installed on the nodes\n' "$1" "${HOSTNAME:-this node}" >&2
    exit 3
  }
  # Absolute, as in /proc/self/mounts, where clear_dead searches.
  case ${TMPDIR:-/tmp} in /*) ;; *) TMPDIR=$PWD/$TMPDIR ;; esac
  for word in TERM USR1 USR2 HUP INT; do
    # shellcheck disable=SC2064
    trap "forward $word" "$word"
  done
  clear_dead
  if ! mount_image "$image" "$1"; then
    say "$1 mounts the image itself, and a signal to the whole job step may unmount it: $why"
    trap - TERM USR1 USR2 HUP INT
    # Signals that came before the command are forwarded too.
    for word in ${pending[@]+"${pending[@]}"}; do kill -s "$word" $$; done
    exec "$@"
  fi
  for word in "$@"; do
    if [ "$word" = "$image" ]; then word=$mount; fi
    command+=("$word")
  done
  # Forked twice, so that it leaves the tree; passed as text, since this file may be gone by then.
  exec {watching}> >(
    trap '' TERM USR1 USR2 HUP INT
    setsid bash -c "$(declare -f unmount watch)"$'\nwatch "$1"' afina-watch "$folder" <&0 >/dev/null 2>&1 &
  )
  # Bash makes a background command ignore INT and read from /dev/null: undo both.
  (trap - TERM USR1 USR2 HUP INT QUIT; exec "${command[@]}") <&0 &
  child=$!
  for word in ${pending[@]+"${pending[@]}"}; do kill -s "$word" "$child"; done
  # A signal ends `wait` early; only an uninterrupted `wait` returns the exit code.
  while :; do
    interrupted=
    wait "$child" 2>/dev/null
    code=$?
    [ -n "$interrupted" ] || break
  done
  unmount "$folder"
  trap '' PIPE
  { echo unmounted >&"$watching"; } 2>/dev/null
  exit "$code"
}

# Never returns: bash reads a script while running it, and the file may be changed or purged by then.
main "$@"
