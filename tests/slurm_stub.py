"""A stand-in for SLURM's commands, for submitit: a task of an array is a process of this machine.

As SLURM does, a task that asks to be queued again starts anew, in the same way, when it has ended.
"""

import os
from pathlib import Path

# Jobs outlive `sbatch`; SLURM copies the script, which submitit moves.
SBATCH = """#!/bin/sh
here=$(dirname "$0")
id=7
while [ -e "$here/script_$id" ]; do id=$((id + 1)); done
cp "$1" "$here/script_$id"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
export SLURM_ARRAY_JOB_ID=$id SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_PROCID=0
export SLURM_LOCALID=0 SLURM_NTASKS_PER_NODE=1 SLURM_JOB_NODELIST=node SLURM_JOB_NAME=stillhouse
for task in $(seq 0 "$last"); do
  (
    export SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$((100 + task))
    while :; do
      sh "$here/script_$id"
      [ -e "$here/requeued_${id}_$task" ] || break
      mv "$here/requeued_${id}_$task" "$here/began_again_${id}_$task"
    done
  ) > /dev/null 2>&1 &
done
echo "Submitted batch job $id"
"""
SRUN = """#!/bin/sh
while :; do
  case $1 in
    --output) output=$2; shift 2 ;;
    --error) error=$2; shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
name() { echo "$1" | sed "s/%A/$SLURM_ARRAY_JOB_ID/g; s/%a/$SLURM_ARRAY_TASK_ID/g; s/%t/0/g"; }
exec "$@" >> "$(name "$output")" 2>> "$(name "$error")"
"""
SCONTROL = """#!/bin/sh
touch "$(dirname "$0")/requeued_$2"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
"""


def install(folder: Path) -> Path:
    """Write the commands into a new folder, which is to come first on the PATH; return it."""
    folder.mkdir()
    commands = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "sacct": SACCT}
    for name, text in commands.items():
        (folder / name).write_text(text)
        os.chmod(folder / name, 0o755)
    return folder
