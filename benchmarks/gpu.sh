#!/usr/bin/env bash
# What there is to run on a GPU, in order of value: benchmarks/gpu.sh OUT_DIR [PART ...]
#
# Part         seconds  what
# first            200  versions, the float32 convolutions of the networks' ends, one profiled update of cifar10
# tests            240  tests/gpu: values, gradients, determinism, CUDA graphs, torch.compile, more than 2^31 elements
# norm             160  group_norm of the cifar10 network, forward and backward, next to everybody else's
# attention        160  attention with every SDPA backend, and the attention block
# states           120  diffuse, ddim_step, the distillation loss, adam_ema: at the network's sizes and at more than 64 MB
# shapes           190  the other networks' shapes next to eager PyTorch, as many as there is time for
# step step64      520  pdfast's distillation update: of cifar10, and of imagenet64 at the largest batch that fits
#                       From here on only when named:
# eager eager64 compile compile64 diffusers diffusers64
#                  520  the same update as others make it, each under its own defaults
# sanitizer        520  compute-sanitizer on the operations at small shapes
# run              400  a run killed and resumed, and what checkpoints and logging cost cifar10-fast (both need tyro)
# loader           200  images/s of the loaders on the image files in DATA (a folder), and the data wait of a step
# tune             500  the fastest launch configurations of attention and group_norm
#
# Each part alone when named, otherwise the first eight; each ends within nine minutes: one that runs past its seconds is
# interrupted, says what it knows, and what it wrote stays. OUT_DIR gets PART.json, and what all of them print in gpu.log.
# CACHE is where the compilers keep what they made, between parts and between calls (default: OUT_DIR/cache).
# DATA is a folder of image files or tars, for loader. PYTHON is the interpreter (default: that of .venv, else python3).
# With --list in place of OUT_DIR the command lines are printed, and nothing is run.
set -u
cd "$(dirname "$0")/.."
out=${1:-}
[ -n "$out" ] || { echo "benchmarks/gpu.sh: error: say where to write: benchmarks/gpu.sh OUT_DIR [PART ...]" >&2; exit 2; }
shift
all="first tests norm attention states shapes step step64"
named="eager eager64 compile compile64 diffusers diffusers64 sanitizer run loader tune"
parts=${*:-$all}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
for part in $parts; do
    case " $all $named " in *" $part "*) ;; *) echo "benchmarks/gpu.sh: error: no part $part: ${all// /, }, ${named// /, }" >&2; exit 2 ;; esac
    [ "$part" != loader ] || [ -n "${DATA:-}" ] || { echo "benchmarks/gpu.sh: error: loader: say where image files are: DATA=FOLDER" >&2; exit 2; }
done
list=
if [ "$out" = --list ]; then
    list=yes out=OUT_DIR
else
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
        { echo "benchmarks/gpu.sh: error: $python finds no GPU" >&2; exit 2; }
    mkdir -p "$out" || exit 2
    cache=${CACHE:-$out/cache}
    mkdir -p "$cache" && cache=$(cd "$cache" && pwd) || exit 2
    export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton
fi

failed=0
run() { # part seconds command...: what it prints goes to gpu.log
    local part=$1 seconds=$2 log=$out/gpu.log
    shift 2
    if [ -n "$list" ]; then printf '%s %s' "$part" "$seconds"; printf ' %q' "$@"; echo; return; fi
    echo "== $part: at most $seconds seconds" | tee -a "$log"
    local before code
    before=$(wc -l <"$log")
    timeout -s INT -k 20 "$seconds" "$@" >>"$log" 2>&1
    code=$?
    # What failed, then how it ended.
    tail -n "+$((before + 1))" "$log" | grep -E '^(FAILED|ERROR) ' | head -n 50
    tail -n 1 "$log"
    case $code in
    0) ;;
    124 | 137) echo "== $part: stopped after $seconds seconds" | tee -a "$log" ;;
    *) echo "== $part: exit code $code" | tee -a "$log"; failed=1 ;;
    esac
}
kernels() { # part seconds arguments...
    local part=$1 seconds=$2
    shift 2
    run "$part" "$seconds" "$python" -m benchmarks.kernels --device cuda --graph both --seconds 0.1 --json "$out/$part.json" "$@"
}
step() { # part arguments...
    local part=$1
    shift
    run "$part" 520 "$python" -m benchmarks.step --device cuda --seconds 5 --json "$out/$part.json" "$@"
}
pytest() { # part seconds command...: those before pytest's own arguments
    local part=$1 seconds=$2
    shift 2
    # Warnings of a version that nobody has seen are no failures here; what hangs shows where.
    run "$part" "$seconds" "$@" -m gpu -v --tb=short -p no:cacheprovider -W default -o faulthandler_timeout=180
}
for part in $parts; do
    case $part in
    first) run first 200 "$python" -m benchmarks.first --device cuda --seconds 0.05 --json "$out/first.json" ;;
    tests)
        parallel=$("$python" -c 'import os, xdist; print("-n", min(os.cpu_count(), 16))' 2>/dev/null)
        pytest tests 240 "$python" -m pytest tests/gpu $parallel ;;
    norm) kernels norm 160 --op group_norm --shapes cifar10 --mode fwd full --providers pdfast eager compile apex liger ;;
    attention) kernels attention 160 --op attention group_norm_attention --shapes cifar10 imagenet64 --mode fwd full \
        --providers pdfast eager flash efficient cudnn compile ;;
    states) kernels states 120 --op diffuse ddim_step ddim_step_weighted_loss ddim_step_weighted_loss_and_grad adam_ema \
        --shapes cifar10 8192,3,32,32 --dtype bf16 fp32 --providers pdfast eager compile ;;
    shapes) kernels shapes 190 --op group_norm attention --shapes imagenet64 lsun128 sd15 small-batch --mode fwd full \
        --providers pdfast eager ;;
    step) step step --providers pdfast --preset cifar10 --batch 128 --sampling ;;
    step64) step step64 --providers pdfast --preset imagenet64 --batch 256 --halve ;;
    eager | diffusers) step "$part" --providers "$part" --preset cifar10 --batch 128 ;;
    compile) step compile --providers compile --modes default reduce-overhead --preset cifar10 --batch 128 ;;
    eager64 | compile64 | diffusers64) step "$part" --providers "${part%64}" --modes default --preset imagenet64 --batch 64 --halve ;;
    sanitizer)
        if [ -z "$list" ] && ! command -v compute-sanitizer >/dev/null; then
            echo "== sanitizer: there is no compute-sanitizer here" | tee -a "$out/gpu.log"
            continue
        fi
        # Each tensor in memory of its own, or a read past its end would be a read of another one.
        pytest sanitizer 520 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$python" -m pytest tests/gpu/test_operations.py -k "twice_the_error and bfloat16" ;;
    run)
        pytest run 400 "$python" -m pytest tests/test_resume.py tests/test_safety.py -rP ;;
    loader) run loader 200 "$python" -m benchmarks.loader --device cuda --data "$DATA" --batch 256 --workers 15 --seconds 10 \
        --json "$out/loader.json" ;;
    tune) run tune 500 "$python" -m benchmarks.tune --op attention group_norm --shapes imagenet64 \
        --case 'attention *64x12x64*' 'attention *256x9x64*' 'group_norm *192x64*' --seconds 0.02 --json "$out/tune.json" ;;
    esac
done
exit $failed
