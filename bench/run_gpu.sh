#!/bin/sh
# usage: bench/run_gpu.sh [N] [--layout fsdp|tp2|ep] [--quick] [--only MODEL] [--own-comm] [--bucket MIB]
#        bench/run_gpu.sh [N] --wake
# Builds bench_gpu.c, runs it and torch_gather.py on N GPUs (default: all) and prints one table; then, or with --wake
# alone, how long it takes until an engine of another process holds a version (bench_wake.c). Without a GPU, CUDA's
# headers or a compiler it says so and succeeds. Set CUDA_HOME, NCCL_HOME, CC, PYTHON, LIMIT (seconds for each
# program, 110) or OUT_DIR to choose.
cd "$(dirname "$0")/.." || exit 1
here=$PWD
CC=${CC:-gcc}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-110}
out=${OUT_DIR:-build/bench_gpu}
command="bench/run_gpu.sh $*"
n=0
case ${1:-} in
[0-9]*)
    n=$1
    shift
    ;;
esac

skip()
{
    echo "skip bench-gpu: $1"
    exit 0
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
[ "$gpus" -gt 0 ] || skip 'no GPU here (nvidia-smi lists none)'
if [ "$n" -eq 0 ] || [ "$n" -gt "$gpus" ]; then n=$gpus; fi

# The folder of an installed Python package below nvidia/, without importing any.
wheel()
{
    "$PYTHON" - "$1" <<'END' 2>/dev/null
import glob, os, sys
for p in sys.path:
    for d in sorted(glob.glob(os.path.join(p or ".", "nvidia", sys.argv[1]))):
        print(d)
END
}

first_with() # FILE FOLDER...: the first folder that has it
{
    file=$1
    shift
    for d in "$@"; do
        if [ -e "$d/$file" ]; then
            echo "$d"
            return
        fi
    done
}

nvcc=$(command -v nvcc 2>/dev/null)
cuda=$(first_with include/cuda_runtime_api.h ${CUDA_HOME:+"$CUDA_HOME"} /usr/local/cuda \
    ${nvcc:+"$(dirname "$(dirname "$(readlink -f "$nvcc")")")"} $(wheel 'cu1[0-9]') $(wheel cuda_runtime) /usr)
[ -n "$cuda" ] || skip 'no CUDA headers; set CUDA_HOME'
for lib in "$cuda/lib64" "$cuda/lib" "$cuda/targets/x86_64-linux/lib" /usr/lib/x86_64-linux-gnu; do
    cudart=$(ls "$lib"/libcudart.so "$lib"/libcudart.so.1[0-9] 2>/dev/null | head -1)
    [ -n "$cudart" ] && break
done
[ -n "$cudart" ] || skip "no libcudart.so below $cuda; set CUDA_HOME"
command -v "$CC" >/dev/null 2>&1 || skip "no compiler $CC"

mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
rm -f "$out"/*.jsonl "$out"/*.err
nccl=$(first_with include/nccl.h ${NCCL_HOME:+"$NCCL_HOME"} $(wheel nccl) /usr/local "$cuda" /usr)
nccl_lib=
for lib in "$nccl/lib" "$nccl/lib64" "$nccl/lib/x86_64-linux-gnu" /usr/lib/x86_64-linux-gnu; do
    [ -n "$nccl" ] && [ -e "$lib/libnccl.so.2" ] && nccl_lib=$lib && break
done
if [ -n "$nccl_lib" ]; then
    nccl_include="-isystem $nccl/include" # before CUDA's, which may hold another release
    nccl_flags="-L$nccl_lib -l:libnccl.so.2 -Wl,--disable-new-dtags,-rpath,$nccl_lib"
else
    echo 'no NCCL found (set NCCL_HOME): without the columns that need it'
    nccl_include=-DBENCH_NO_NCCL
    nccl_flags=
fi
wake() # builds and runs bench_wake.c
{
    "$CC" -std=gnu99 -O3 -march=native -Wall -Wextra -DBENCH_CUDA -I"$here" -isystem "$cuda/include" \
        bench/bench_wake.c -o "$out/bench_wake" "$cudart" -Wl,-rpath,"$(dirname "$cudart")" -lm -lpthread -lrt -ldl &&
        timeout -k 5 "$LIMIT" "$out/bench_wake" "$n"
}

if [ "${1:-}" = --wake ]; then
    wake
    exit
fi
set -x
"$CC" -std=gnu99 -O3 -march=native -Wall -Wextra -I"$here" $nccl_include -isystem "$cuda/include" \
    bench/bench_gpu.c -o "$out/bench_gpu" $nccl_flags "$cudart" \
    -Wl,-rpath,"$(dirname "$cudart")" -lm -lpthread -lrt -ldl || exit 1
{ set +x; } 2>/dev/null

seed=$("$PYTHON" -c 'import os; print(int.from_bytes(os.urandom(4), "little"))' 2>/dev/null || date +%s)
timeout -k 5 $((LIMIT + 10)) "$out/bench_gpu" "$n" --json --seed "$seed" --deadline "$LIMIT" "$@" \
    >"$out/ours.jsonl" 2>"$out/ours.err"
ours=$?
tail -n 20 "$out/ours.err"
if "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    timeout -k 5 $((LIMIT + 10)) "$PYTHON" -u bench/torch_gather.py "$n" --seed "$seed" --deadline "$LIMIT" "$@" \
        >"$out/torch.jsonl" 2>"$out/torch.err"
    theirs=$?
    [ $theirs -eq 0 ] || tail -n 20 "$out/torch.err"
else
    echo 'no torch here: without its columns'
    : >"$out/torch.jsonl"
    theirs=0
fi

smi=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)
"$PYTHON" bench/gpu_table.py "$out/ours.jsonl" "$out/torch.jsonl" "$n" "$smi" "$command" ||
    cat "$out/ours.jsonl" "$out/torch.jsonl"
wake
woken=$?
[ $ours -eq 0 ] && [ $theirs -eq 0 ] && [ $woken -eq 0 ]
