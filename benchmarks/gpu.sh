#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, without a network: build in place against the torch that python3
# has, run the tests on the GPU, then the quick benchmark. The log goes to DIR/log.txt, a short
# table ends the output.
#     bash benchmarks/gpu.sh DIR
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh DIR}
python=${PYTHON:-python3}
mkdir -p "$out"
log=$out/log.txt
failed=0

step() {
    local name=$1 begin=$SECONDS
    shift
    if "$@" >>"$log" 2>&1; then result=passed; else result=FAILED failed=1; fi
    printf '%-28s%-8s%5d s\n' "$name" "$result" $((SECONDS - begin)) | tee -a "$out/steps.txt"
}

: >"$log" >"$out/steps.txt"
step "build" "$python" -m pip install --no-build-isolation --no-deps -e .
step "environment" "$python" -m flexmore_kernels.cli env
step "tests" "$python" -m pytest -q --durations=10
step "demo" "$python" -m flexmore_kernels.cli demo
step "benchmark, r = 64" "$python" -m benchmarks.bench_experts --shape flexolmo_6x64 --json --breakdown
echo
grep -E '^(FAILED|ERROR)|[0-9]+ passed' "$log" | tail -20
sed -n '/ milliseconds$/,/layers are right/p' "$log"
sed -n '/^flexolmo/,/^{/p' "$log" | grep -v '^{'
echo
cat "$out/steps.txt"
exit $failed
