#!/bin/sh
# TaskProlog of slurm.conf: sets the variables in /etc/foreshock/agent.env, such as FORESHOCK_COLLECTOR=monitor:4327, in every
# task of every job, unless the job sets them itself. Slurm reads each line `export NAME=VALUE` that this prints.
#   TaskProlog=/etc/slurm/foreshock-task-prolog.sh
PATH=/usr/bin:/bin
settings=/etc/foreshock/agent.env
[ -r "$settings" ] || exit 0
sed -n 's/^\(FORESHOCK_[A-Z_]*\)=.*/\1/p' "$settings" | while read -r name; do
  # shellcheck source=/dev/null
  printenv "$name" >/dev/null || (. "$settings"; eval "echo \"export $name=\$$name\"")
done
exit 0
