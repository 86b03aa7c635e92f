#!/usr/bin/env bash
# The one GPU command, without a network: build in place against the torch that python3 has, run the
# tests on the GPU (side by side where pytest-xdist is there) and, beside them, the sanitizer's tiny
# cases, which wait for compilers more than for the GPU; then the demo, and with the GPU to itself
# the quick benchmarks. About twelve minutes on an H100 with 16 cores; each step says its seconds.
# DIR gets log.txt, steps.txt, records.jsonl and sanitize.tgz; the records are also added to
# benchmarks/results/. COMMIT goes into them where the sources have no git history.
#     bash benchmarks/gpu.sh DIR [COMMIT [PYTEST ARGUMENTS]]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh DIR [COMMIT [PYTEST ARGUMENTS]]}
commit=${2:+--commit=$2}
selection=("${@:3}")
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
mkdir -p "$out/sanitize"
failed=0

# NAME LIMIT COMMAND...: the command's output to NAME's log, its result and seconds to steps.txt.
step() {
    local name=$1 limit=$2 begin=$SECONDS result=passed
    shift 2
    timeout -k 20 "$limit" "$@" >"$out/$name.log" 2>&1 || result=FAILED
    printf '%-12s%-8s%5d s\n' "$name" "$result" $((SECONDS - begin)) | tee -a "$out/steps.txt"
    [ "$result" = passed ]
}

: >"$out/steps.txt"
step build 120 "$PYTHON" -m pip install --no-build-isolation --no-deps -e . || failed=1
step environment 60 "$PYTHON" -m flexmore_kernels.cli env || failed=1
side_by_side=$("$PYTHON" -c 'import os, xdist; print("-n", max(1, os.cpu_count() - 4), "--dist=loadgroup")' 2>/dev/null)
step tests 540 "$PYTHON" -m pytest -q -m gpu --durations=10 $side_by_side "${selection[@]}" &
tests=$!
step sanitizer 330 bash tests/sanitize.sh "$out/sanitize" 310 || failed=1
wait $tests || failed=1
step demo 60 "$PYTHON" -m flexmore_kernels.cli demo || failed=1
step benchmarks 200 "$PYTHON" -m benchmarks.run --quick --results "$out/records.jsonl" $commit ||
    failed=1
[ -f "$out/records.jsonl" ] && "$PYTHON" -m benchmarks.records "$out/records.jsonl"
tar -C "$out" -czf "$out/sanitize.tgz" sanitize && rm -r "$out/sanitize"
for name in build environment tests sanitizer demo benchmarks; do
    printf '\n==> %s\n' "$name" && cat "$out/$name.log" && rm "$out/$name.log"
done >"$out/log.txt"

section() { sed -n "/^==> $1\$/,/^==> /p" "$out/log.txt" | grep -v '^==> '; }
section tests | grep -E '^(FAILED|ERROR)|[0-9]+ (passed|failed|error)' | tail -20
section sanitizer
section demo | sed -n '/ milliseconds$/,$p'
section benchmarks | grep -v '^\['
echo
cat "$out/steps.txt"
printf '%-20s%5d s\n' "all" $SECONDS
exit $failed
