#!/usr/bin/env bash
# Tiny cases through every GPU kernel (tests/test_sanitize.py) under the four tools of
# compute-sanitizer, side by side: a few minutes, of which most is Triton compiling what is not in
# its cache. Without torch's caching allocator, so that each tensor is an allocation with its own
# bounds. A line a tool on stdout (result, errors, seconds), its log in DIR/TOOL.txt, that of the
# tests in DIR/TOOL.tests.txt. A tool is stopped after SECONDS, 450 if not given.
#     bash tests/sanitize.sh DIR [SECONDS]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tests/sanitize.sh DIR [SECONDS]}
limit=${2:-450}
python=${PYTHON:-python3}
mkdir -p "$out"
if ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer on PATH: it comes with the CUDA toolkit" >&2
    exit 1
fi
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# PORT TOOL [OPTION]...
check() {
    local port=$1 tool=$2 begin=$SECONDS log=$out/$2.txt result=passed errors
    rm -f "$log"
    timeout -k 10 "$limit" compute-sanitizer --tool "$tool" --port "$port" --launch-timeout 120 \
        --target-processes application-only --print-limit 20000 --log-file "$log" "${@:3}" \
        "$python" -m pytest -q -p no:cacheprovider -m sanitize tests/test_sanitize.py \
        >"$out/$tool.tests.txt" 2>&1 || result=FAILED
    errors=$("$python" tests/sanitizer_log.py "$tool" "$log") || result=FAILED
    printf '%-10s %-7s errors: %-8s %4d s\n' "$tool" "$result" "$errors" $((SECONDS - begin))
    [ "$result" = passed ]
}

# A read or write just past an allocation lands in the padding, not in a neighbour's memory.
check 49200 memcheck --padding 32 & jobs=($!)
check 49300 racecheck --racecheck-report all --kernel-name kns=flexmore & jobs+=($!)
check 49400 initcheck --show-backtrace no & jobs+=($!)
check 49500 synccheck --kernel-name kns=flexmore & jobs+=($!)
failed=0
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
exit $failed
