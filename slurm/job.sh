# shellcheck shell=bash
# The work of a batch job around srun; finetune.sbatch and submitit's script source it from the run directory.
# Needs $run (the run directory), inside a job. Uses bash, coreutils and Slurm's commands; no container, no Python.
# shellcheck disable=SC2154,SC2034 # the caller sets run and reads code

# Both numbers for an array's task: one task of an array has the array's own job id.
afina_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
afina_job=${afina_job:-$SLURM_JOB_ID}
export AFINA_ATTEMPT="$afina_job.${SLURM_RESTART_COUNT:-0}"

afina_say() { printf 'afina: %s\n' "$*"; }

# [D-]H:M:S or M:S, as squeue prints times -> seconds; empty for UNLIMITED, INVALID, NOT_SET
afina_seconds() {
  [[ $1 =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0
  local -a part=("${BASH_REMATCH[2]:-0}" "${BASH_REMATCH[4]:-0}" "${BASH_REMATCH[5]}" "${BASH_REMATCH[6]}")
  echo $((((10#${part[0]} * 24 + 10#${part[1]}) * 60 + 10#${part[2]}) * 60 + 10#${part[3]}))
}

# Slurm's list of nodes (n[1-3,07],gpu[1-2]r1) -> one name a line, in order; used where scontrol is missing.
afina_expand() {
  local list=$1 item before after low i
  local -a ranges
  while [ -n "$list" ]; do
    # Up to a comma outside brackets.
    [[ $list =~ ^(([^][,]|\[[^][]*\])+),?(.*)$ ]] || return 1
    item=${BASH_REMATCH[1]} list=${BASH_REMATCH[3]}
    if [[ $item =~ ^([^[]*)\[([^]]*)\](.*)$ ]]; then
      before=${BASH_REMATCH[1]} after=${BASH_REMATCH[3]}
      IFS=, read -ra ranges <<<"${BASH_REMATCH[2]}"
      for item in "${ranges[@]}"; do
        low=${item%%-*}
        for ((i = 10#$low; i <= 10#${item##*-}; i++)); do
          afina_expand "$before$(printf '%0*d' "${#low}" "$i")$after" || return 1
        done
      done
    else
      printf '%s\n' "$item"
    fi
  done
}

# With AFINA_IMAGE_KEY (a PEM public key, or a PGP fingerprint): exit with 3 unless that key has signed all of the image.
afina_check_image() { # RUNTIME IMAGE
  [ -n "${AFINA_IMAGE_KEY:-}" ] || return 0
  local answer='' signer fingerprint=${AFINA_IMAGE_KEY//[[:space:]]/} how=(--key "$AFINA_IMAGE_KEY")
  fingerprint=${fingerprint,,}
  fingerprint=${fingerprint#0x}
  if [[ $fingerprint =~ ^[0-9a-f]{40}$ ]]; then how=(--local --json); else fingerprint=; fi
  if answer=$("$1" verify "${how[@]}" "$2" 2>&1 </dev/null); then
    [ -n "$fingerprint" ] || return 0
    signer=$(sed -nE 's/^ *"Fingerprint": "([^"]*)",?$/\1/p' <<<"$answer" | tr '[:upper:]' '[:lower:]' | sort -u | paste -sd ' ' -)
    [ "$signer" != "$fingerprint" ] || return 0
    answer="signed by ${signer:-an unknown key}"
  fi
  printf 'error: AFINA_IMAGE=%s is not the image that AFINA_IMAGE_KEY=%s signed: %s\n' "$2" "$AFINA_IMAGE_KEY" "${answer##*$'\n'}" >&2
  printf '  remedy: fetch the image again from its signer; see also: %s verify%s\n' "$1" "$(printf ' %q' "${how[@]}" "$2")" >&2
  exit 3
}

# Set the address where the nodes meet, and the time at which the job ends.
afina_meet() {
  local head address port left
  export AFINA_LAUNCH=slurm
  AFINA_NODES=$({ scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null || afina_expand "${SLURM_JOB_NODELIST:-}"; } | tr '\n' ' ')
  head=${AFINA_NODES%% *}
  # The first node's address in Slurm; never localhost, which is another machine on every node.
  address=$(scontrol show node "$head" --oneliner 2>/dev/null | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
  AFINA_HEAD=${address:-$head}
  # The first free port from one that depends on the job: a fixed port collides on shared nodes.
  port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_ARRAY_TASK_ID:-0}) % 20000))
  while (exec 3<>"/dev/tcp/$AFINA_HEAD/$port") 2>/dev/null; do port=$((port + 1)); done
  # From the time left, not the time of the end: this node's clock may differ from Slurm's.
  left=$(afina_seconds "$(squeue --noheader --jobs "$afina_job" --format %L 2>/dev/null)")
  AFINA_DEADLINE=${left:+$(($(date +%s) + left))}
  : "${AFINA_DEADLINE:=${SLURM_JOB_END_TIME:-}}" # without squeue; from Slurm 23.02 on
  export AFINA_NODES AFINA_HEAD AFINA_PORT=$port AFINA_DEADLINE
  # The folder for each node's copy of model and data; the container must see it (these variables add to its other binds).
  if [ -n "${AFINA_STAGE:-}" ] && [ "$AFINA_STAGE" != 0 ]; then
    if [ "$AFINA_STAGE" = 1 ]; then AFINA_STAGE=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}; fi
    case $AFINA_STAGE in
      *[,:]*) afina_say "AFINA_STAGE=$AFINA_STAGE: a path with a comma or colon cannot be bound; nothing is copied" && AFINA_STAGE='' ;;
      *) export AFINA_STAGE APPTAINER_BIND="${APPTAINER_BIND:+$APPTAINER_BIND,}$AFINA_STAGE" SINGULARITY_BIND="${SINGULARITY_BIND:+$SINGULARITY_BIND,}$AFINA_STAGE" ;;
    esac
  fi
}

# Ask the ranks to stop, by a file. $1: limit (USR1, before the time limit) or signal (TERM).
afina_request_stop() {
  # The ranks know the deadline and the duration of a save: near the end they stop by themselves, as late as they can.
  if [ "$1" = limit ] && [ -n "${AFINA_DEADLINE:-}" ] && [ $((AFINA_DEADLINE - $(date +%s))) -lt 240 ]; then return; fi
  [ ! -e "$run/stop" ] || return
  { printf '%s\n' "$1" >"$run/.stop.$$" && mv -f "$run/.stop.$$" "$run/stop"; } || touch "$run/stop"
}

# Kill srun ($1) when the worker has not renewed its lease in the time that the lease allows: a hung process cannot stop itself.
afina_watch_lease() {
  local seen='' now='' since=$SECONDS checked=$SECONDS patience
  trap - USR1 TERM
  while sleep 15 >/dev/null 2>&1; do # the sleep outlives this shell and must not hold the log open
    now=$(cat "$run/lease.json" 2>/dev/null)
    patience=$(grep -o '"patience_s": [0-9]*' <<<"$now")
    # More than 60 s: this shell itself was suspended (`scontrol suspend`).
    if [ "$now" != "$seen" ] || [ -z "$patience" ] || [[ $now != *"\"attempt\": \"$AFINA_ATTEMPT\""* ]] || ((SECONDS - checked > 60)); then
      seen=$now since=$SECONDS
    elif ((SECONDS - since > ${patience##* } + 45)); then
      afina_say "the worker has not renewed its lease for $((SECONDS - since)) s: killed"
      kill -TERM "$1" # srun then kills its tasks at once
      return
    fi
    checked=$SECONDS
  done
}

# Run srun to its end and turn signals into stop requests; sets $code. Bash runs a trap only between commands or in `wait`, and
# a trapped signal ends `wait` early with a code above 128; only an uninterrupted `wait` returns srun's code.
afina_step() {
  local step watcher interrupted
  rm -f "$run/stop" "$run/attempts/$AFINA_ATTEMPT/exit" "$run/attempts/$AFINA_ATTEMPT/next"
  trap 'interrupted=1; afina_request_stop limit' USR1
  trap 'interrupted=1; afina_request_stop signal' TERM
  command srun "$@" &
  step=$!
  afina_watch_lease "$step" &
  watcher=$!
  while :; do
    interrupted=''
    wait "$step"
    code=$?
    [ -n "$interrupted" ] || break
  done
  kill "$watcher" 2>/dev/null
  # Python ends with 120 when it cannot flush its output: the disk with the log is full.
  [ "$code" != 120 ] || code=3
}

# Follow `attempts/<id>/next`: requeue the job, or submit a new one where that is impossible.
afina_after() {
  local action='' exclude='' why='' state reason job gres word i
  { read -r action; read -r exclude; read -r why; } <"$run/attempts/$AFINA_ATTEMPT/next" || return 0
  afina_say "$why"
  [ "$action" = requeue ] || return 0
  state=$(squeue --noheader --jobs "$afina_job" --states all --format %T 2>/dev/null)
  case $state in
    RUNNING | PREEMPTED | '') ;;
    *)
      # Cancelled, or requeued by Slurm itself.
      afina_say "Slurm is ending this job itself ($state)"
      return 0
      ;;
  esac
  if [ -z "$exclude" ] && [ "$state" != PREEMPTED ] && reason=$(scontrol requeue "$afina_job" 2>&1); then
    sleep 120 # until Slurm ends this shell
    return 0
  fi
  [ -z "${reason:-}" ] || afina_say "no requeue ($reason): submitting a new job"
  local -a ask=(--job-name="${SLURM_JOB_NAME:-afina}" --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --chdir="$PWD")
  ask+=(${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"})
  ask+=(${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${SLURM_MEM_PER_NODE:+--mem="${SLURM_MEM_PER_NODE}M"} ${exclude:+--exclude="$exclude"})
  ask+=(${SBATCH_MAIL_TYPE:+--mail-type="$SBATCH_MAIL_TYPE"} ${SBATCH_MAIL_USER:+--mail-user="$SBATCH_MAIL_USER"})
  # GPUs in the spelling that the job had: gres:gpu:a100:2 in Slurm 22.05, gres/gpu:a100:2 since.
  gres=$(squeue --noheader --jobs "$afina_job" --states all --format %b 2>/dev/null)
  if [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then
    ask+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
  elif [[ $gres == gres[:/]* ]]; then
    ask+=(--gres="${gres//gres[:\/]/}")
  fi
  reason=$(squeue --noheader --jobs "$afina_job" --states all --format %l 2>/dev/null)
  if [ -z "$reason" ] && [ -n "${SLURM_JOB_END_TIME:-}" ] && [ -n "${SLURM_JOB_START_TIME:-}" ]; then
    reason=$(((SLURM_JOB_END_TIME - SLURM_JOB_START_TIME + 59) / 60))
  fi
  ask+=(${reason:+--time="$reason"} --output="${run//%/%%}/slurm-%j.out")
  # The site's further options, and those that it omits.
  while IFS= read -r word; do
    word=${word#"${word%%[![:space:]]*}"}
    case $word in --gres=* | '') ;; --*) ask+=("${word%"${word##*[![:space:]]}"}") ;; esac
  done <<<"${AFINA_SBATCH_EXTRA:-}"
  word=${AFINA_SBATCH_OMIT:-}
  for word in ${word//,/ }; do
    for i in "${!ask[@]}"; do case ${ask[i]} in "--${word#--}"=*) unset 'ask[i]' ;; esac done
  done
  # sbatch would pass these variables to the new job, which is not a task of the array (22.05.8).
  unset "${!SLURM_ARRAY_@}"
  if job=$(sbatch --parsable "${ask[@]}" "$run/finetune.sbatch" "$run"); then
    printf '{"time": %s, "job_id": "%s", "via": "resubmit"}\n' "$(date +%s)" "${job%%;*}" >>"$run/submissions.jsonl"
    afina_say "job ${job%%;*} continues this run"
  else
    afina_say "continue with: sbatch $(printf %q "$run/finetune.sbatch") $(printf %q "$run")"
  fi
}
