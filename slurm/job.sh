# shellcheck shell=bash
# The work of a batch job around srun; finetune.sbatch and submitit's script source it from the run directory.
# Needs $run (the run directory), inside a job. Uses bash, coreutils and Slurm's commands; no container, no Python.
# shellcheck disable=SC2154,SC2034 # the caller sets run and worker, and reads code

# Both numbers for an array's task: one task of an array has the array's own job id.
afina_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
afina_job=${afina_job:-$SLURM_JOB_ID}
export AFINA_ATTEMPT="$afina_job.${SLURM_RESTART_COUNT:-0}"

# A clean environment, before the site file is read, so what that sets stays. sbatch passes on what it inherits: of a job or an salloc
# that it was called in, which srun and squeue would obey here. What Slurm itself gives to a batch job stays.
afina_clean_environment() {
  local name
  for name in "${!SLURM_@}" "${!SQUEUE_@}" "${!SCANCEL_@}" "${!SACCT_@}" "${!SINFO_@}"; do
    case $name in
      SLURM_JOB_* | SLURM_ARRAY_* | SLURM_CLUSTER_NAME | SLURM_CONF* | SLURM_CPUS_ON_NODE | SLURM_CPUS_PER_* | SLURM_GPUS* | SLURM_GTIDS) ;;
      SLURM_HET_* | SLURM_HINT | SLURM_JOBID | SLURM_JWT | SLURM_LOCALID | SLURM_MEM_PER_* | SLURM_NETWORK | SLURM_NNODES | SLURM_NODE* | SLURM_OOM* | SLURM_PROCID) ;;
      SLURM_RESTART_COUNT | SLURM_SUBMIT_* | SLURM_TASK_PID | SLURM_THREADS_PER_CORE | SLURM_TMPDIR | SLURM_TOPOLOGY_*) ;;
      *) unset "$name" ;;
    esac
  done
  unset SLURM_NODEFILE
}

afina_say() { printf 'afina: %s\n' "$*"; }

# A JSON string, with its quotes.
afina_json() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  printf '"%s"' "${text//[[:cntrl:]]/ }"
}

# Cores of the job's task on each node: what the job asked for, else the allocation's, on the node that has the fewest.
afina_cpus() {
  local item least=''
  for item in ${SLURM_JOB_CPUS_PER_NODE:+${SLURM_JOB_CPUS_PER_NODE//,/ }}; do # 4(x2),2
    item=${item%%(*}
    if [ -z "$least" ] || ((item < least)); then least=$item; fi
  done
  if [[ ${SLURM_CPUS_PER_TASK:-} =~ ^[0-9]+$ ]] && { [ -z "$least" ] || ((SLURM_CPUS_PER_TASK <= least)); }; then
    least=$SLURM_CPUS_PER_TASK
  fi
  echo "${least:-${SLURM_CPUS_ON_NODE:-1}}"
}

# What squeue knows of this job; a site's wrapper may print lines of its own before the answer.
afina_queue() { squeue --noheader --jobs "$afina_job" --states all --format "$1" 2>/dev/null | tail -n 1; } # FORMAT

# [D-]H:M:S or M:S, as squeue prints times -> seconds; empty for UNLIMITED, INVALID, NOT_SET
afina_seconds() {
  [[ $1 =~ ^(([0-9]+)-)?(([0-9]+):)?([0-9]+):([0-9]+)$ ]] || return 0
  local -a part=("${BASH_REMATCH[2]:-0}" "${BASH_REMATCH[4]:-0}" "${BASH_REMATCH[5]}" "${BASH_REMATCH[6]}")
  echo $((((10#${part[0]} * 24 + 10#${part[1]}) * 60 + 10#${part[2]}) * 60 + 10#${part[3]}))
}

# Slurm's list of nodes (n[1-3,07],gpu[1-2]r1) -> one name a line, in order, as `scontrol show hostnames` prints them.
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
  AFINA_NODES=$(afina_expand "${SLURM_JOB_NODELIST:-}" | tr '\n' ' ')
  head=${AFINA_NODES%% *}
  # The first node's address in Slurm; never localhost, which is another machine on every node.
  address=$(scontrol show node "$head" --oneliner 2>/dev/null | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
  AFINA_HEAD=${address:-$head}
  # The first free port from one that depends on the job: a fixed port collides on shared nodes.
  port=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_ARRAY_TASK_ID:-0}) % 20000))
  while (exec 3<>"/dev/tcp/$AFINA_HEAD/$port") 2>/dev/null; do port=$((port + 1)); done
  # From the time left, not the time of the end: this node's clock may differ from Slurm's.
  left=$(afina_seconds "$(afina_queue %L)")
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

# Print the proof, if the kernel killed a process of this job for its memory: the job's cgroup counts it, accounting records it.
afina_memory() {
  local cgroup
  cgroup=$(sed -n 's/^0:://p' /proc/self/cgroup)
  case $cgroup in */job_*) sed -n 's/^oom_kill [1-9].*/cgroup: &/p' "/sys/fs/cgroup${cgroup%%/step_*}/memory.events" ;; esac
  timeout 20 sacct --noheader --parsable2 --jobs "$afina_job" --format=JobID,State | grep OUT_OF_ME
}

# Run srun to its end and turn signals into stop requests; sets $code. Bash runs a trap only between commands or in `wait`, and
# a trapped signal ends `wait` early with a code above 128; only an uninterrupted `wait` returns srun's code.
afina_step() {
  local step watcher interrupted
  rm -f "$run/attempts/$AFINA_ATTEMPT/exit" "$run/attempts/$AFINA_ATTEMPT/next"
  # A stop file left over from an earlier attempt; not one for an attempt that lives: its lease was renewed within a minute.
  [ -n "$(find "$run/lease.json" -newermt '-60 seconds' 2>/dev/null)" ] || rm -f "$run/stop"
  trap 'interrupted=1; afina_request_stop limit' USR1
  trap 'interrupted=1; afina_request_stop signal' TERM
  # --export: with SBATCH_EXPORT=NONE, or where a site submits so, a step would get no variables.
  command srun --export=ALL "$@" &
  step=$!
  afina_watch_lease "$step" &
  watcher=$!
  while :; do
    interrupted=''
    wait "$step"
    code=$?
    [ -n "$interrupted" ] || break
  done
  # The ranks have ended: a stop that a signal asks for now (Slurm sends TERM when the job is requeued) would be for the next attempt.
  trap : USR1 TERM
  kill "$watcher" 2>/dev/null
  if [ "$code" != 0 ] && [ "$code" != 75 ]; then afina_memory >>"$run/attempts/$AFINA_ATTEMPT/srun.log" 2>/dev/null; fi
  # Python ends with 120 when it cannot flush its output: the disk with the log is full.
  [ "$code" != 120 ] || code=3
}

# Decide without the container what follows an attempt: it does not start on this node, so the worker's `finish` cannot run.
# Writes what `afina.run.requeue` writes: the outcome, the event, and `next`.
afina_decide() { # ANSWER: what the worker's `finish` printed
  local folder=$run/attempts/$AFINA_ATTEMPT here=${SLURMD_NODENAME:-$HOSTNAME} image='' runtime='' cause=node bad='' excluded=''
  local name why message remedy action=requeue failures=0
  local -a pauses=(0 60 300 900 1800)
  if [[ ${worker[0]-} == bash && ${worker[1]-} == */node.sh ]]; then image=${worker[2]} runtime=${worker[3]}; fi
  if [ -n "$image" ] && [ ! -r "$image" ] && [ -d "${image%/*}" ]; then
    cause=image message="$image is no longer there, or $here cannot read it (purged?)"
    remedy="put the image back (container/build.sh), then: afina submit $(printf %q "$run")"
    # One that was pulled from a registry: a submission has its digest, and pulls it again.
    case $image in */cache/images/*) remedy="it is pulled again by: afina submit $(printf %q "$run")" ;; esac
  else
    bad=$here # what other nodes of the job could do is not known: srun ended their tasks
    message="the worker does not start on $bad"
    if [ -n "$image" ] && [ ! -r "$image" ]; then message="$message: ${image%/*} is not mounted there"; fi
    if [ -n "$runtime" ] && ! command -v "$runtime" >/dev/null; then message="$message: $runtime is not on PATH"; fi
    if [ -n "$1" ]; then message="$message: ${1##*$'\n'}"; fi
    remedy="see $folder/node0.log and the job's log; \`afina doctor --job\` checks the nodes"
  fi
  # Nodes that failed before, and how many attempts in a row ended so (`afina.run.requeue` counts the same).
  while IFS= read -r name; do
    case $name in *'"cause": "node"'*) failures=$((failures + 1)) ;; *) failures=0 ;; esac
    if [[ $name =~ \"excluded\":\ \"([^\"]+)\" ]]; then excluded=${BASH_REMATCH[1]}; fi
  done < <(grep -s '"event": "attempt_ended"' "$run/events.jsonl")
  case $cause,$failures in
    image,*) action=end why="$message" ;;
    *,[0-4])
      excluded=$(tr ',' '\n' <<<"$excluded,$bad" | sed '/^$/d' | sort -u | tr '\n' ',')
      excluded=${excluded%,}
      why="$bad cannot run this job: submitted again without $excluded"
      ;;
    *) action=end why="$((failures + 1)) attempts in a row could not start on their nodes ($excluded,$bad): it is not the nodes" ;;
  esac
  code=3
  if ! grep -q -e '"outcome": *"finished"' -e "\"attempt\": *\"$AFINA_ATTEMPT\"" "$run/outcome.json" 2>/dev/null; then
    printf '{"outcome": "failed", "exit_code": 3, "attempt": "%s", "failure": {"kind": "EnvironmentProblem", "message": %s, "remedy": %s, "cause": "%s", "nodes": [%s]}}\n' \
      "$AFINA_ATTEMPT" "$(afina_json "$message")" "$(afina_json "$remedy")" "$cause" "${bad:+\"${bad//,/\", \"}\"}" >"$run/.outcome.$$" &&
      mv -f "$run/.outcome.$$" "$run/outcome.json"
  fi
  printf '{"time": %s, "event": "attempt_ended", "attempt": "%s", "outcome": "failed", "cause": "%s", "failure": %s, "committed": 0, "next": "%s", "why": %s, "excluded": "%s"}\n' \
    "$(date +%s)" "$AFINA_ATTEMPT" "$cause" "$(afina_json "$cause: $message")" "$action" "$(afina_json "$why")" "$excluded" >>"$run/events.jsonl"
  printf '%s\n%s\n%s\n%s\n' "$action" "$excluded" "${why//$'\n'/ }" "${pauses[failures]:-0}" >"$folder/next"
  echo "$code" >"$folder/exit"
  printf 'error: %s\n  remedy: %s\n' "$message" "$remedy" >&2
}

# True of an error after which Slurm may have done what it was asked for: the answer was lost (`afina.slurm.client` has the same list).
afina_lost() { [[ ${1,,} =~ timed\ out|unable\ to\ contact|connection|communication|zero\ bytes|unexpected\ message ]]; } # MESSAGE

# Follow `attempts/<id>/next`: requeue the job, or submit a new one where that is impossible or nodes are to be left out.
afina_after() {
  local action='' exclude='' why='' pause='' state reason=''
  { read -r action; read -r exclude; read -r why; read -r pause; } <"$run/attempts/$AFINA_ATTEMPT/next" || [ -n "$why" ] || return 0
  afina_say "$why"
  [ "$action" = requeue ] || return 0
  state=$(afina_queue %T)
  [[ $state =~ ^[A-Z_]+$ ]] || state='' # not an answer
  case $state in
    RUNNING | PREEMPTED | '') ;;
    *)
      # Cancelled, or requeued by Slurm itself.
      afina_say "Slurm is ending this job itself ($state)"
      return 0
      ;;
  esac
  if [ -z "$exclude" ] && [ "$state" != PREEMPTED ]; then
    for _ in 1 2 3; do
      if reason=$(scontrol requeue "$afina_job" 2>&1); then
        sleep 120 # until Slurm ends this shell; TERM ends the sleep first
        return 0
      fi
      afina_lost "$reason" || break
      sleep 10 # if it was carried out, Slurm ends this shell now: a new job would be a second one
    done
  fi
  [ -z "$reason" ] || afina_say "no requeue ($reason): submitting a new job"
  afina_submit "$exclude" "${pause:-0}"
}

# A field of `scontrol show job` ($about); nothing where it is not set.
afina_field() { # NAME
  local end='[^[:space:]]*'
  [ "$1" != Comment ] || end=$'[^\n]*'
  [[ $'\n'$about =~ [[:space:]]$1=($end) ]] || return 0
  case ${BASH_REMATCH[1]} in '(null)' | 0 | 'N/A') ;; *) printf %s "${BASH_REMATCH[1]}" ;; esac
}

# sbatch without this job's variables: it would pass them on, and srun in the new job would obey them.
afina_sbatch() (
  for name in "${!SLURM_@}" "${!SLURMD_@}"; do
    case $name in SLURM_CONF | SLURM_CONF_SERVER | SLURM_JWT) ;; *) unset "$name" ;; esac
  done
  unset SBATCH_ARRAY_INX SBATCH_EXPORT SBATCH_GET_USER_ENV SBATCH_NO_REQUEUE SBATCH_OPEN_MODE SBATCH_REQUEUE SBATCH_SIGNAL SBATCH_WAIT
  exec sbatch "$@"
)

# Submit a new job that continues this run, with the options of this one.
afina_submit() { # NODES-TO-EXCLUDE SECONDS-TO-WAIT
  local exclude=$1 about comment token job='' gres value word i cluster=''
  about=$(scontrol show job "$afina_job" 2>/dev/null)
  local -a ask=(--job-name="${SLURM_JOB_NAME:-afina}" --nodes="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1
    --cpus-per-task="$(afina_cpus)" --chdir="$PWD" --export=ALL)
  ask+=(${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"})
  ask+=(${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${SLURM_MEM_PER_NODE:+--mem="${SLURM_MEM_PER_NODE}M"})
  ask+=(${SLURM_MEM_PER_CPU:+--mem-per-cpu="${SLURM_MEM_PER_CPU}M"})
  ask+=(${SBATCH_MAIL_TYPE:+--mail-type="$SBATCH_MAIL_TYPE"} ${SBATCH_MAIL_USER:+--mail-user="$SBATCH_MAIL_USER"})
  # What the job's owner gave to sbatch, as Slurm knows it.
  for word in Features:constraint Nice:nice Reservation:reservation Licenses:licenses ReqNodeList:nodelist MinTmpDiskNode:tmp Network:network; do
    value=$(afina_field "${word%:*}")
    if [ -n "$value" ]; then ask+=(--"${word#*:}=$value"); fi
  done
  [ "$(afina_field OverSubscribe)" != NO ] || ask+=(--exclusive)
  [ "$(afina_field Contiguous)" != 1 ] || ask+=(--contiguous)
  exclude=$exclude,$(afina_field ExcNodeList)
  # GPUs in the spelling that the job had: gres:gpu:a100:2 in Slurm 22.05, gres/gpu:a100:2 since.
  gres=$(afina_queue %b)
  if [ -n "${SLURM_GPUS_PER_NODE:-}" ]; then
    ask+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
  elif [[ $gres == gres[:/]* ]]; then
    ask+=(--gres="${gres//gres[:\/]/}")
  fi
  value=$(afina_queue %l)
  [[ $value =~ ^([0-9:-]+|UNLIMITED)$ ]] || value=''
  if [ -z "$value" ] && [ -n "${SLURM_JOB_END_TIME:-}" ] && [ -n "${SLURM_JOB_START_TIME:-}" ]; then
    value=$(((SLURM_JOB_END_TIME - SLURM_JOB_START_TIME + 59) / 60))
  fi
  ask+=(${value:+--time="$value"} --output="${run//%/%%}/slurm-%j.out")
  comment=$(afina_field Comment)
  # The site's further options, and those that it omits.
  while IFS= read -r word; do
    word=${word#"${word%%[![:space:]]*}"}
    word=${word%"${word##*[![:space:]]}"}
    case $word in
      --gres=* | '') ;;
      --exclude=*) exclude=$exclude,${word#*=} ;;
      --comment=*) comment=${word#*=} ;;
      --*) ask+=("$word") ;;
    esac
  done <<<"${AFINA_SBATCH_EXTRA:-}"
  word=${AFINA_SBATCH_OMIT:-}
  for word in ${word//,/ }; do
    for i in "${!ask[@]}"; do case ${ask[i]} in "--${word#--}"=*) unset 'ask[i]' ;; esac done
  done
  exclude=$(sed -e 's/^,*//; s/,*$//; s/,,*/,/g' <<<"$exclude")
  ask+=(${exclude:+--exclude="$exclude"})
  if (($2 > 0)); then ask+=(--begin="now+$2"); fi
  # The token finds the job again if sbatch is not heard; `afina.slurm.submit` does the same.
  token=$AFINA_ATTEMPT-$RANDOM
  comment=${comment%%afina:*}
  comment=${comment%"${comment##*[![:space:]]}"}
  ask+=(--comment="$comment${comment:+ }afina:$token")
  if grep -qs '"job_id": "[^"]*;' "$run/submissions.jsonl"; then cluster=";${SLURM_CLUSTER_NAME:-}"; fi
  printf '{"time": %s, "token": "%s", "script": %s, "clusters": "", "record": {}}\n' "$(date +%s)" "$token" "$(afina_json "$run/finetune.sbatch")" >"$run/intent.json"
  if ! value=$(afina_sbatch --parsable "${ask[@]}" "$run/finetune.sbatch" "$run" 2>&1); then
    afina_say "$value"
    if afina_lost "$value"; then
      for i in 2 10 30; do
        sleep "$i"
        job=$(squeue --me --noheader --states all --format '%i|%k' 2>/dev/null | grep -F "afina:$token" | cut -d '|' -f 1)
        [ -z "$job" ] || break
      done
    else
      rm -f "$run/intent.json"
    fi
  else
    job=$(sed -nE 's/^(Submitted batch job )?([0-9]+)(;.*| on cluster .*)?$/\2/p' <<<"$value" | tail -n 1)
  fi
  if [[ $job =~ ^[0-9]+$ ]]; then
    printf '{"time": %s, "job_id": "%s", "via": "resubmit"}\n' "$(date +%s)" "$job$cluster" >>"$run/submissions.jsonl"
    rm -f "$run/intent.json"
    afina_say "job $job continues this run"
    return
  fi
  case $value in
    *'node configuration'* | *'nvalid node name'*) [ -z "$1" ] || afina_say "no node is left that has not failed: what fails on every node is not the node" ;;
  esac
  printf '{"time": %s, "event": "submission_failed", "attempt": "%s", "why": %s}\n' "$(date +%s)" "$AFINA_ATTEMPT" "$(afina_json "${value##*$'\n'}")" >>"$run/events.jsonl"
  afina_say "continue with: sbatch $(printf %q "$run/finetune.sbatch") $(printf %q "$run")"
}
