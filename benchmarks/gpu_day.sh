#!/usr/bin/env bash
# All that is worth measuring while a GPU is at hand for ten minutes, in one command: docs/gpu-day.md.
#
#     benchmarks/gpu_day.sh [FOLDER] [--rehearse]
#
# Writes FOLDER/report.json and FOLDER/log as it goes [default: build/gpu-day]. PYTHON: interpreter that has torch [default: python3].
# Wheels in build/gpu-day-wheels (`make wheels`) are installed into a temporary folder, only for this run.
# Exit code: 0 if every measurement succeeded, else 1; 2 if there is no CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.."

out=build/gpu-day
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then out=$1; shift; fi
python=${PYTHON:-python3}
wheels=build/gpu-day-wheels
mkdir -p "$out"
rm -f "$out/report.json" "$out/log"
started=$(date +%s)

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# Not for a rehearsal: they are for the Python of the machine with the GPU.
if [[ " $* " != *" --rehearse "* ]] && ls "$wheels"/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 1
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# Section and its seconds. What one leaves over the later ones may use. Together they stay below nine minutes, with the starts of Python.
failed=0 planned=0
for section in facts:25 tests:95 check:50 encode:190 nvdec:40 suspicions:70 training:25 profile:25; do
    name=${section%:*}
    planned=$((planned + ${section#*:}))
    left=$((started + planned - $(date +%s)))
    [ "$left" -gt 5 ] || left=5
    # A measurement that began in time may end late, but not much: it must not cost the sections after it.
    timeout -k 5 $((left + 10)) "$python" -m benchmarks.gpu_day --out "$out" --sections "$name" --seconds "$left" "$@" 2>&1 | tee -a "$out/log"
    code=${PIPESTATUS[0]}
    [ "$code" -ne 2 ] || exit 2
    if [ "$code" -ne 0 ]; then
        failed=1
        echo "== section $name ended with exit code $code (124, 137: stopped for lack of time)" | tee -a "$out/log"
    fi
done
echo "== $(($(date +%s) - started)) s; $out/report.json, $out/log" | tee -a "$out/log"
exit $failed
