#!/usr/bin/env bash
# All that is worth measuring while a GPU is at hand for ten minutes, in one command: docs/gpu-day.md.
#
#     benchmarks/gpu_day.sh [FOLDER] [--rehearse]
#
# Writes FOLDER/report.json and FOLDER/log as it goes [default: build/gpu-day]. PYTHON: interpreter that has torch [default: python3].
# WHEELS: folder of wheels (`make wheels`); those of packages that PYTHON lacks are installed into a temporary folder for this run
# [default: build/gpu-day-wheels if it is there; in a rehearsal none].
# Exit code: 0 if every measurement succeeded, else 1; 2 if there is no CUDA device; 143 if it was stopped.
set -uo pipefail
cd "$(dirname "$0")/.."

out=build/gpu-day
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then out=$1; shift; fi
python=${PYTHON:-python3}
wheels=${WHEELS:-build/gpu-day-wheels} times=1
# The wheels are for the Python of the machine with the GPU. Machines for rehearsals may be busy.
if [[ " $* " == *" --rehearse "* ]]; then wheels=${WHEELS:-} times=10; fi
mkdir -p "$out"
rm -f "$out/report.json" "$out/log"
started=$(date +%s)

# Ctrl-C, `timeout` and a terminal that is closed signal the whole process group: tee must outlive the script, and its lost stdout.
exec > >(trap '' INT TERM HUP PIPE; exec tee -a "$out/log") 2>&1
log=$!
site=$(mktemp -d)
finish() {
    rm -rf "$site"
    exec >&- 2>&-
    for _ in {1..20}; do kill -0 "$log" 2>/dev/null || break; sleep 0.1; done # until tee has written the last lines
}
trap finish EXIT
running=
stop() {
    trap '' TERM INT HUP
    # First of all: the section is in a process group of its own, so the signal did not reach it. It has 5 s (`timeout -k`).
    if [ -n "$running" ]; then kill -TERM "$running"; fi
    echo "== stopped by a signal after $(($(date +%s) - started)) s; $out/report.json says which measurement was in progress"
    if [ -n "$running" ]; then wait "$running"; fi
    exit 143
}
trap stop TERM INT HUP

failed=0
if [ -n "${WHEELS:-}" ] && ! ls "$wheels"/*.whl >/dev/null 2>&1; then
    echo "WHEELS=$wheels has no wheels; \`make wheels\` writes them into build/gpu-day-wheels"
    exit 1
fi
unset PYTHONDONTWRITEBYTECODE # else each of these processes compiles all sources again
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -n "$wheels" ] && ls "$wheels"/*.whl >/dev/null 2>&1; then
    install=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site")
    if ! needed=$("$python" -m benchmarks.gpu_day.lacking "$wheels"/*.whl) ||
        { [ -n "$needed" ] && ! xargs -d '\n' "${install[@]}" <<<"$needed"; }; then
        echo "== the wheels could not be installed: tests and decoders will fail, the rest needs none"
        failed=1
    fi
fi

# Section and its seconds. What one leaves over the later ones may use. Together they stay below nine minutes, with the starts of Python.
planned=0
for section in facts:25 tests:95 check:50 encode:190 nvdec:40 suspicions:70 training:25 profile:25; do
    name=${section%:*}
    planned=$((planned + times * ${section#*:}))
    # A process that crashed or hung is followed by another, which goes on after the measurement that was in progress.
    for attempt in 1 2 3 4; do
        left=$((started + planned - $(date +%s)))
        if [ "$left" -lt 5 ]; then left=5; fi
        # A measurement that began in time may end late, but not much: it must not cost the sections after it.
        timeout -k 5 $((left + 10)) "$python" -m benchmarks.gpu_day --out "$out" --sections "$name" --seconds "$left" "$@" &
        running=$!
        wait "$running"
        code=$?
        running=
        case $code in
            0) break ;;
            2) exit 2 ;;
            3) failed=1; break ;;
        esac
        failed=1
        echo "== section $name ended early, attempt $attempt, exit code $code (1: see the stacks above; 124, 137: stopped for lack of time)"
        if [ $((started + planned - $(date +%s))) -lt 15 ]; then break; fi
    done
done
echo "== $(($(date +%s) - started)) s; $out/report.json, $out/log"
exit $failed
