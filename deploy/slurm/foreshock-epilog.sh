#!/bin/sh
# Epilog of slurm.conf: when a job has left a node, delivers what its ranks have left in shared memory, if the collector was
# down at their end. Rings belong to the job's user, who is the one to read them.
#   Epilog=/etc/slurm/foreshock-epilog.sh
# A node that waits for its epilog takes no job, so it takes 30 seconds at most, and never fails: a failure would drain the
# node. What is left waits for the next job of the user, for a day.
# Slurm starts it without a PATH.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
[ -n "${SLURM_JOB_USER:-}" ] || exit 0
foreshock=${FORESHOCK:-/opt/foreshock/bin/foreshock}
[ -x "$foreshock" ] || exit 0
set -a
# shellcheck source=/dev/null
[ ! -r /etc/foreshock/agent.env ] || . /etc/foreshock/agent.env
set +a
timeout 30 runuser -u "$SLURM_JOB_USER" -- "$foreshock" recorder >/dev/null 2>&1
exit 0
