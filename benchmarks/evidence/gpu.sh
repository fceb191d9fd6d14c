#!/usr/bin/env bash
# `study` or `compare` on a machine with a GPU and no network, from what `wheels.sh` has put into a folder.
#
#     benchmarks/evidence/gpu.sh FOLDER MINUTES study --only s16-h64 s16-fixed     or compare, and their options
#
# Results go to $OUT (build/evidence) piece by piece, so that what is done when the time is over is there; pieces that
# are there already, from the last time, are not done again. Everything else that is written goes to $SCRATCH, a new
# folder in /tmp unless given. The stems run on Triton's kernels unless the native module is built. It has not run on a
# GPU so far; with ACCELERATOR=cpu it runs without one.
set -eu -o pipefail
if [ $# -lt 3 ] || [ ! -d "$1/wheels" ]; then
  echo "usage: benchmarks/evidence/gpu.sh FOLDER MINUTES study|compare [OPTIONS]; FOLDER is what wheels.sh has filled" >&2
  exit 2
fi
folder=$(cd "$1" && pwd) minutes=$2 experiment=$3
shift 3
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
scratch=${SCRATCH:-$(mktemp -d)}
out=${OUT:-build/evidence}
mkdir -p "$out" "$scratch/cache/packages"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$scratch/site" "$folder"/wheels/*.whl
for archive in "$folder"/packages/*.deb; do
  package=$(basename "$archive" | sed 's/_.*//')
  [ -d "$scratch/cache/packages/$package" ] || dpkg -x "$archive" "$scratch/cache/packages/$package"
done
export PYTHONPATH="$PWD:$PWD/python:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m "benchmarks.evidence.$experiment" --tasks trill family initials tones --accelerator "${ACCELERATOR:-cuda}" \
  --jobs "${JOBS:-8}" --minutes "$minutes" --cache "$scratch/cache" --out "$out/$experiment.jsonl" "$@"
