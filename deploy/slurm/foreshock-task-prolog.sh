#!/bin/sh
# TaskProlog of slurm.conf: every task of every job reports to this collector. What it prints as `export NAME=VALUE` is set
# in the task's environment. A job that sets FORESHOCK_COLLECTOR itself keeps its own.
#   TaskProlog=/etc/slurm/foreshock-task-prolog.sh
# The address is in /etc/foreshock/agent.env, as FORESHOCK_COLLECTOR=monitor:4327.
[ -z "${FORESHOCK_COLLECTOR:-}" ] || exit 0
collector=$(sed -n 's/^FORESHOCK_COLLECTOR=//p' /etc/foreshock/agent.env 2>/dev/null | tail -n 1)
[ -z "$collector" ] || echo "export FORESHOCK_COLLECTOR=$collector"
exit 0
