#!/usr/bin/env bash
# ./run.sh          makes .venv, installs the pinned requirements and runs the six stages on the toy world
# ./run.sh test     the same set-up, then the tests
# ./run.sh setup    the set-up alone
# Arguments like --SEED=1 --RUN=seed1 go to each of the six scripts. It can be interrupted; run it again and it goes on.
# PYTHON=python3.12 ./run.sh takes another Python (3.11 or later).
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------- set-up
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or later is needed; $("$python" --version) was found." >&2
  echo "Name another: PYTHON=python3.12 ./run.sh" >&2
  exit 1
}

stamp=$(cat requirements.txt run.sh | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
  echo "setting up .venv (some minutes the first time)"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  echo "$stamp" > .venv/installed          # written last: an interrupted installation is done again
fi

case "${1:-}" in
  setup) echo "For the next commands: source .venv/bin/activate"; exit ;;
  test) shift; OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest tests -q -n 2 --dist loadfile "$@" ;;
esac

# ---------------------------------------------------------------- the six stages
# torchrun, without its own report of a script that stops: the script's last sentence says why.
quiet_torchrun='
import logging, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable()
try:
    main(sys.argv[1:])
except ChildFailedError as error:
    failure = error.get_first_failure()[1]
    if failure.exitcode < 0:
        sys.exit(f"a process was ended by signal {-failure.exitcode}; 9 is often a lack of memory")
    sys.exit(1)
except SignalException:                    # Ctrl-C
    sys.exit(1)
'

# Two processes of one thread each share the work of a stage, as they would on two GPUs. They are faster than one
# process of two threads, because the model is tiny. One process does the same: python 02_phase1_train.py
stage() {
  local from=$SECONDS
  echo
  OMP_NUM_THREADS=1 .venv/bin/python -c "$quiet_torchrun" \
    --standalone --nproc-per-node=2 "$@" --CPU_THREADS=1
  echo "$1 took $((SECONDS - from)) s"
}

began=$SECONDS
.venv/bin/python 01_make_streams.py "$@"
stage 02_phase1_train.py "$@"
stage 03_collect_tasks.py "$@"
stage 04_train_reward.py "$@"
stage 05_phase2_train.py "$@"
stage 06_eval.py "$@"

# ---------------------------------------------------------------- what next
run=tiny
for argument in "$@"; do
  case "$argument" in --RUN=*) run=${argument#--RUN=} ;; esac
done
report=$(cd runs && cd "$run" && pwd)/eval/report.html     # RUN may be an absolute path
minutes=$(((SECONDS - began) / 60))
echo
echo "The six stages took $minutes min $(((SECONDS - began) % 60)) s."
echo "The report, to be opened in a browser: $report"
echo "Before the next commands: source .venv/bin/activate"
