#!/usr/bin/env bash
# What there is to run on a GPU, in order of value: benchmarks/gpu.sh OUT_DIR [PART ...]
#
# Part         seconds  what
# tests            420  tests/gpu: values, gradients, determinism, CUDA graphs, torch.compile, more than 2^31 elements
# norm             240  group_norm, forward and backward
# attention        240  attention with every SDPA backend, and the attention block
# steps            120  diffuse, ddim_step, the distillation loss, adam_ema
#
# Each part alone when named, all of them otherwise; a part that runs past its seconds is stopped, and what it wrote stays.
# PYTHON is the interpreter (default: that of .venv, else python3).
set -u
cd "$(dirname "$0")/.."
out=${1:-}
[ -n "$out" ] || { echo "benchmarks/gpu.sh: error: say where to write: benchmarks/gpu.sh OUT_DIR [PART ...]" >&2; exit 2; }
shift
parts=${*:-tests norm attention steps}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
for part in $parts; do
    case $part in tests | norm | attention | steps) ;; *) echo "benchmarks/gpu.sh: error: no part $part: tests, norm, attention or steps" >&2; exit 2 ;; esac
done
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    { echo "benchmarks/gpu.sh: error: $python finds no GPU" >&2; exit 2; }
mkdir -p "$out" || exit 2

failed=0
run() { # part seconds command...: its output in OUT_DIR/part.log
    local part=$1 seconds=$2
    shift 2
    echo "$part: at most $seconds seconds"
    timeout "$seconds" "$@" >"$out/$part.log" 2>&1
    local code=$?
    tail -n 3 "$out/$part.log"
    [ $code = 0 ] || { echo "$part: exit code $code"; failed=1; }
}
kernels() { # part seconds arguments...
    local part=$1 seconds=$2
    shift 2
    run "$part" "$seconds" "$python" -m benchmarks.kernels --device cuda --graph --json "$out/$part.json" --seconds 0.1 "$@"
}
for part in $parts; do
    case $part in
    tests) run tests 420 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider ;;
    norm) kernels norm 240 --op group_norm --mode fwd full --providers pdfast eager compile apex liger ;;
    attention) kernels attention 240 --op attention group_norm_attention --mode fwd full --providers pdfast eager compile flash efficient cudnn ;;
    steps) kernels steps 120 --op diffuse ddim_step ddim_step_weighted_loss ddim_step_weighted_loss_and_grad adam_ema --providers pdfast eager compile ;;
    esac
done
exit $failed
