#!/usr/bin/env bash
# ./run.sh          makes .venv, installs the pinned requirements and runs the six stages on the embedded world
# ./run.sh test     the same set-up, then the tests
# ./run.sh setup    the set-up alone
# Arguments like --SEED=1 --RUN=seed1 go to each of the six scripts. PYTHON=python3.12 ./run.sh takes another Python (3.11 or later).
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "Python 3.11 or later is needed; $("$python" --version) was found. Name another: PYTHON=python3.12 ./run.sh" >&2; exit 1; }

stamp=$(cat requirements.txt run.sh | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "setting up .venv (some minutes the first time)"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$stamp" > .venv/installed          # written last: an interrupted installation is done again
fi

case "${1:-}" in
  setup) exit ;;
  test) shift; exec .venv/bin/python -m pytest tests -q "$@" ;;
esac

# Two processes of one thread each share a stage's work, as they would on two GPUs, and are faster than two threads
# of one, as the model is tiny. One process does the same: .venv/bin/python 02_phase1_train.py
stage() {
  local from=$SECONDS
  echo
  OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node=2 "$@" --CPU_THREADS=1
  echo "$1 took $((SECONDS - from)) s"
}

began=$SECONDS
.venv/bin/python 01_make_streams.py "$@"
stage 02_phase1_train.py "$@"
stage 03_collect_tasks.py "$@"
stage 04_train_reward.py "$@"
stage 05_phase2_train.py "$@"
stage 05_phase2_train.py --ALGORITHM=grpo "$@"
stage 06_eval.py "$@"
echo "the six stages took $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s after the installation"
