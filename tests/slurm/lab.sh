#!/usr/bin/env bash
# lab.sh - a throw-away, real Slurm cluster of three nodes on one Linux host, for the tests. Root, no systemd.
#
#   lab.sh install       fetch the packages that are missing (Debian, Ubuntu)
#   lab.sh up            start the cluster
#   lab.sh env           print `export ...` lines; eval them, and sbatch, squeue, scontrol reach the cluster
#   lab.sh crash NODE    power cut: slurmd and every task of the node die at once
#   lab.sh boot NODE     bring it back
#   lab.sh stop-ctld     stop the controller; jobs go on
#   lab.sh start-ctld    start it again
#   lab.sh on NODE CMD   run a command on a node, in all of its namespaces
#   lab.sh wipe          stop everything that `up` started, by recorded pid, and delete $LAB
#
# LAB=/tmp/slurmlab/cluster   folder for everything; keep it short, since it holds unix sockets
# LAB_NODES=3 LAB_CPUS=8 LAB_MEM=7000 LAB_GPUS=2   per node, declared and not real
#
# Every node has its own network, address, host name, process ids, mounts and /dev/shm; the file system is shared.
# Where the host has a writable cgroup v1 freezer, processes are tracked as on real clusters (proctrack/cgroup), which
# decides whom a signal reaches; elsewhere by their parents.
set -uo pipefail

LAB=${LAB:-/tmp/slurmlab/cluster}
NODES=${LAB_NODES:-3} CPUS=${LAB_CPUS:-8} MEM=${LAB_MEM:-7000} GPUS=${LAB_GPUS:-2}
NET=10.77.0 PORT=16817
SELF=$(readlink -f "$0") RUN=$LAB/run SOCKET=$LAB/munge/socket
FREEZER=/sys/fs/cgroup/freezer
export SLURM_CONF=$LAB/etc/slurm.conf PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

die() {
  echo "lab: $*" >&2
  exit 1
}
node_names() { seq -f 'n%g' "$NODES"; }
wait_for() { # seconds, command...
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS <= end)) || return 1
    sleep .05
  done
}

# A process is signalled only while it is the one that was recorded: its id and the kernel's start time of it.
start_time() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
record() { echo "$2 $(start_time "$2")" >"$RUN/$1.pid"; }
pid_of() {
  local pid started
  read -r pid started 2>/dev/null <"$RUN/$1.pid" || return 1
  [[ -n $started && $(start_time "$pid") == "$started" && $(ps -o stat= -p "$pid") != Z* ]] && echo "$pid"
}
gone() { ! pid_of "$1" >/dev/null; }
stop() { # name, signal
  local pid
  if pid=$(pid_of "$1"); then
    kill "-$2" "$pid"
    wait_for 5 gone "$1" || kill -KILL "$pid"
    wait_for 5 gone "$1"
  fi
  rm -f "$RUN/$1.pid"
}

# Process 1 of a node, as the host numbers it: the only child of the recorded `unshare`.
first_process() {
  local outer child=
  outer=$(pid_of "box-$1") || return 1
  read -r child _ 2>/dev/null <"/proc/$outer/task/$outer/children" # no newline in there: read says 1
  [[ -n $child ]] && echo "$child"
}
at_head() { # command...: where slurmctld can be reached; nsenter execs
  nsenter -t "$(first_process head)" -n -u -- "$@"
}

install() {
  local package missing=() guard=/usr/sbin/policy-rc.d made_guard=0 code
  for package in slurm-wlm munge iproute2 util-linux procps openssh-server pdsh; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  # keep the packages from starting system daemons, for this one run of apt
  [[ -e $guard ]] || { printf '#!/bin/sh\nexit 101\n' >$guard && chmod 755 $guard && made_guard=1; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"
  code=$?
  ((made_guard)) && rm -f $guard
  return "$code"
}

write_config() {
  local number tracking=linuxproc
  [[ -w $FREEZER ]] && ! compgen -G "$FREEZER/slurm_n*" >/dev/null && tracking=cgroup
  mkdir -p "$LAB"/{etc,state,spool,log,run,dev,bin,munge}
  for number in $(seq 0 $((GPUS - 1))); do # gres wants a device: nvidia's major number, without a driver here
    mknod -m 666 "$LAB/dev/nvidia$number" c 195 "$number" 2>/dev/null || ln -sf /dev/null "$LAB/dev/nvidia$number"
  done
  head -c 128 /dev/urandom >"$LAB/munge/key"
  chmod 400 "$LAB/munge/key"
  chown -R munge:munge "$LAB/munge"
  cat >"$SLURM_CONF" <<END
ClusterName=lab
SlurmctldHost=head($NET.254)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket=$SOCKET,cred_expire=5
CredType=cred/munge
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$RUN/slurmctld.own
SlurmdPidFile=$RUN/slurmd.%n.own
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
# more CPUs and memory than the host has
SlurmdParameters=config_overrides
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=10
TCPTimeout=2
MessageTimeout=10
KillWait=10
CompleteWait=0
MinJobAge=600
DefMemPerCPU=$((MEM / CPUS))
GresTypes=gpu
SlurmdPort=6818
NodeName=n[1-$NODES] NodeAddr=$NET.[1-$NODES] CPUs=$CPUS Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:fake:$GPUS State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
END
  echo "NodeName=n[1-$NODES] Name=gpu Type=fake File=$LAB/dev/nvidia[0-$((GPUS - 1))]" >"$LAB/etc/gres.conf"
  printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup >"$LAB/etc/cgroup.conf"
  { echo '127.0.0.1 localhost' && echo "$NET.254 head" && for number in $(seq "$NODES"); do echo "$NET.$number n$number"; done; } >"$LAB/etc/hosts"
  : >"$LAB/etc/resolv.conf"
}

# Slurm's commands for a shell outside of the nodes; a node's own shells are there already.
write_wrappers() {
  local command
  for command in sbatch squeue scancel scontrol sinfo srun; do
    cat >"$LAB/bin/$command" <<END
#!/bin/bash
export SLURM_CONF=$SLURM_CONF
[[ \$(readlink /proc/self/ns/net) == '$(readlink /proc/self/ns/net)' ]] || exec /usr/bin/$command "\$@"
exec nsenter -t $(first_process head) -n -u -- /usr/bin/$command "\$@"
END
  done
  chmod 755 "$LAB"/bin/*
  # a stray /usr/bin/sbatch fails at once instead of looking for the cluster's private addresses outside
  echo "# Slurm's commands are in $LAB/bin" >"$LAB/etc/outside.conf"
}

box_main() { # name, address: process 1 of a node, inside its new namespaces
  hostname "$1"
  mount --make-rprivate /
  mount --bind "$LAB/etc/hosts" /etc/hosts
  mount --bind "$LAB/etc/resolv.conf" /etc/resolv.conf
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  ip link set lo up
  if [[ $1 == head ]]; then
    ip link add br0 type bridge && ip addr add "$2/24" dev br0 && ip link set br0 up
  fi
  touch "$RUN/$1.ready"
  if [[ $1 != head ]]; then
    wait_for 10 ip -br link show eth0
    ip addr add "$2/24" dev eth0
    ip link set eth0 up
    slurmd -D -N "$1" >>"$LAB/log/slurmd.$1.out" 2>&1 &
  fi
  trap : TERM
  while :; do # process 1 reaps orphans for ever
    sleep 3600 &
    wait -n
  done
}

start_box() { # name, address
  local inside
  rm -f "$RUN/$1.ready"
  setsid unshare -n -u -p -m --fork --kill-child --mount-proc env -i PATH="$PATH" HOME="$HOME" LANG=C.UTF-8 LAB="$LAB" \
    SLURM_CONF="$SLURM_CONF" bash "$SELF" __box "$1" "$2" </dev/null >>"$LAB/log/box.$1.log" 2>&1 &
  record "box-$1" $!
  wait_for 10 test -e "$RUN/$1.ready" || die "node $1 did not start: $(tail -3 "$LAB/log/box.$1.log")"
  [[ $1 == head ]] && return
  inside=$(first_process "$1")
  at_head ip link add "v$1" type veth peer name eth0 netns "$inside" || die "no network for $1"
  at_head ip link set "v$1" master br0 up || die "no network for $1"
}

start_ctld() {
  nsenter -t "$(first_process head)" -n -u -- slurmctld -D </dev/null >>"$LAB/log/slurmctld.out" 2>&1 &
  record slurmctld $!
  wait_for 15 at_head scontrol ping || die "slurmctld: $(tail -3 "$LAB/log/slurmctld.out")"
}

on() { # node, command...
  local node=$1
  shift
  exec nsenter -t "$(first_process "$node")" -n -u -p -m -- "$@"
}

boot() { start_box "$1" "$NET.${1#n}"; }
all_idle() {
  [[ $(at_head scontrol show node) != *CPULoad=N/A* && $(at_head sinfo -h -N -t idle -o %N | grep -vc '\*') == "$NODES" ]]
}

up() {
  local node
  [[ $(id -u) == 0 ]] || die 'needs root, for namespaces'
  ((${#LAB} < 60)) || die "$LAB is too long for unix sockets"
  [[ ! -e $LAB ]] || die "$LAB exists: wipe it first"
  write_config
  setpriv --reuid munge --regid munge --init-groups munged --foreground --key-file="$LAB/munge/key" --socket="$SOCKET" \
    --pid-file="$LAB/munge/pid" --log-file="$LAB/munge/log" --seed-file="$LAB/munge/seed" </dev/null >>"$LAB/log/munged" 2>&1 &
  record munged $!
  wait_for 10 munge -S "$SOCKET" -n || die "munged: $(tail -3 "$LAB/log/munged" "$LAB/munge/log")"
  start_box head "$NET.254"
  write_wrappers
  start_ctld
  for node in $(node_names); do boot "$node"; done
  wait_for 20 all_idle || die "not all nodes came up: $(at_head sinfo -N -l)"
}

crash() { # the cable first: a dying socket must not say goodbye
  at_head ip link del "v$1"
  stop "box-$1" KILL
}

wipe() {
  local node
  [[ $LAB == /tmp/* ]] || die "refusing to delete $LAB"
  [[ -d $LAB ]] || return 0
  for node in $(node_names); do stop "box-$node" KILL; done
  stop slurmctld TERM
  stop box-head KILL
  stop munged TERM
  if grep -qx ProctrackType=proctrack/cgroup "$SLURM_CONF"; then
    find "$FREEZER" -depth -type d -path "$FREEZER/slurm_n*" -exec rmdir {} + 2>/dev/null
  fi
  rm -rf "$LAB"
}

case ${1:-} in
install | up | wipe) "$1" ;;
crash | boot) "$1" "$2" ;;
stop-ctld) stop slurmctld TERM ;;
start-ctld) start_ctld ;;
on) "$@" ;;
env) echo "export SLURM_CONF=$LAB/etc/outside.conf PATH=$LAB/bin:\$PATH" ;;
__box) box_main "$2" "$3" ;;
*)
  sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
  exit 2
  ;;
esac
