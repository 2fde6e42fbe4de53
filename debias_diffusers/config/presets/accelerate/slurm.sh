#!/usr/bin/env bash
# Two nodes with eight GPUs each under SLURM: sbatch slurm.sh --config celebahq256 --dataset /data/celebahq --output_dir /runs/first
# The same command again resumes. Fifteen minutes before the time is up SLURM asks with SIGTERM, upon which a run saves and stops.
#SBATCH --job-name=debias
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --output=%x-%j.log
set -euo pipefail

GPUS_PER_NODE=8
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # not through head, whose early end would end scontrol with an error
first=${hosts%%$'\n'*}
config=$(python -c 'import debias_diffusers, pathlib; print(pathlib.Path(debias_diffusers.__file__).parent / "config/presets/accelerate/two_nodes.yaml")')
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / GPUS_PER_NODE))

# In single quotes, because SLURM_PROCID is that of a task, not of this script. debias-train is train.py as it is installed.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$1" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * $2))" \
    --machine_rank "$SLURM_PROCID" --main_process_ip "$3" "$(command -v debias-train)" "${@:4}"' \
    _ "$config" "$GPUS_PER_NODE" "$first" "$@"
