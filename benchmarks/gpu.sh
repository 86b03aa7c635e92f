#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, without a network: build in place against the torch that python3
# has, run the tests on the GPU (side by side where pytest-xdist is there), small cases of every
# kernel under memcheck, the demo, then the benchmark. The log goes to DIR/log.txt, a short table
# ends the output. COMMIT goes into the records where the sources have no git history.
#     bash benchmarks/gpu.sh DIR [COMMIT [PYTEST ARGUMENTS]]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh DIR [COMMIT [PYTEST ARGUMENTS]]}
commit=${2:+--commit=$2}
selection=("${@:3}")
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
side_by_side=$("$python" -c 'import os, xdist; print("-n", max(1, os.cpu_count() - 2))' 2>/dev/null)
step "tests" "$python" -m pytest -q -m gpu --durations=10 $side_by_side "${selection[@]}"
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    step "memcheck" compute-sanitizer --error-exitcode 1 "$python" -m pytest -q -m gpu \
        tests/test_experts.py tests/test_routing_plan.py -k "(same_bits and (odd or triples)) or plan"
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
step "demo" "$python" -m flexmore_kernels.cli demo
step "benchmark, r = 64" "$python" -m benchmarks.bench_experts --shape flexolmo_6x64 --backward \
    --breakdown --json $commit
step "benchmark, r = 16" "$python" -m benchmarks.bench_experts --shape flexolmo_6x16 --json $commit
cp benchmarks/results/experts.jsonl "$out"
echo
grep -E '^(FAILED|ERROR)|[0-9]+ passed' "$log" | tail -20
sed -n '/ milliseconds$/,/layers are right/p' "$log"
sed -n '/^flexolmo/,/^{/p' "$log" | grep -v '^{'
echo
cat "$out/steps.txt"
exit $failed
