#!/usr/bin/env bash
# What there is to run on a GPU, in order of value: benchmarks/gpu.sh OUT_DIR [PART ...]
#
# Part         seconds  what
# tests            270  tests/gpu: values, gradients, determinism, CUDA graphs, torch.compile, more than 2^31 elements
# norm             160  group_norm of the cifar10 network, forward and backward, next to everybody else's
# attention        160  attention with every SDPA backend, and the attention block
# states           120  diffuse, ddim_step, the distillation loss, adam_ema: at the network's sizes and at more than 64 MB
# shapes           190  the other networks' shapes next to eager PyTorch, as many as there is time for
# step             540  only when named: a distillation update next to others', of imagenet64 at a batch that eager can hold too,
#                       then of cifar10
# run              400  only when named: a run of cifar10-fast killed and resumed, and what checkpoints and logging cost
# loader           200  only when named: images/s of the loaders on the image files in DATA (a folder), and the data wait of a step
# tune             500  only when named: the fastest launch configurations of attention and group_norm
#
# Each part alone when named, otherwise the first five, which is 900 seconds; a part that runs past its seconds is stopped,
# and what it wrote stays. OUT_DIR gets PART.json, and what all of them print in gpu.log.
# DATA is a folder of image files or tars, for loader. PYTHON is the interpreter (default: that of .venv, else python3).
set -u
cd "$(dirname "$0")/.."
out=${1:-}
[ -n "$out" ] || { echo "benchmarks/gpu.sh: error: say where to write: benchmarks/gpu.sh OUT_DIR [PART ...]" >&2; exit 2; }
shift
all="tests norm attention states shapes"
named="step run loader tune"
parts=${*:-$all}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
for part in $parts; do
    case " $all $named " in *" $part "*) ;; *) echo "benchmarks/gpu.sh: error: no part $part: ${all// /, }, ${named// /, }" >&2; exit 2 ;; esac
done
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    { echo "benchmarks/gpu.sh: error: $python finds no GPU" >&2; exit 2; }
mkdir -p "$out" || exit 2

failed=0
run() { # part seconds command...: what it prints goes to gpu.log
    local part=$1 seconds=$2 log=$out/gpu.log
    shift 2
    echo "== $part: at most $seconds seconds" | tee -a "$log"
    timeout "$seconds" "$@" >>"$log" 2>&1
    local code=$?
    tail -n 1 "$log"
    case $code in
    0) ;;
    124) echo "== $part: stopped after $seconds seconds" | tee -a "$log" ;;
    *) echo "== $part: exit code $code" | tee -a "$log"; failed=1 ;;
    esac
}
kernels() { # part seconds arguments...
    local part=$1 seconds=$2
    shift 2
    run "$part" "$seconds" "$python" -m benchmarks.kernels --device cuda --graph both --seconds 0.1 --json "$out/$part.json" "$@"
}
for part in $parts; do
    case $part in
    tests) run tests 270 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider ;;
    norm) kernels norm 160 --op group_norm --shapes cifar10 --mode fwd full --providers pdfast eager compile apex liger ;;
    attention) kernels attention 160 --op attention group_norm_attention --shapes cifar10 imagenet64 --mode fwd full \
        --providers pdfast eager flash efficient cudnn compile ;;
    states) kernels states 120 --op diffuse ddim_step ddim_step_weighted_loss ddim_step_weighted_loss_and_grad adam_ema \
        --shapes cifar10 8192,3,32,32 --dtype bf16 fp32 --providers pdfast eager compile ;;
    shapes) kernels shapes 190 --op group_norm attention --shapes imagenet64 lsun128 sd15 small-batch --mode fwd full \
        --providers pdfast eager ;;
    step) run step 540 "$python" -m benchmarks.step --device cuda --preset imagenet64 cifar10 --batch 512 --halve \
        --providers eager pdfast compile diffusers --modes default reduce-overhead --sampling --seconds 5 --json "$out/step.json" ;;
    run)
        run run 250 "$python" -m benchmarks.resume --device cuda --json "$out/run.json"
        run run 150 "$python" -m benchmarks.safety --device cuda --updates 100 --json "$out/safety.json" ;;
    loader) run loader 200 "$python" -m benchmarks.loader --device cuda --data "${DATA:?say where image files are: DATA=FOLDER}" \
        --batch 256 --workers 15 --seconds 10 --json "$out/loader.json" ;;
    tune) run tune 500 "$python" -m benchmarks.tune --op attention group_norm --shapes imagenet64 \
        --case 'attention *64x12x64*' 'attention *256x9x64*' 'group_norm *192x64*' --seconds 0.02 --json "$out/tune.json" ;;
    esac
done
exit $failed
