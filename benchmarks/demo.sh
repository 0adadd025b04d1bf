#!/usr/bin/env bash
# The main job on real photographs, sized for two cores; `make demo` runs the first form.
#   benchmarks/demo.sh elpv | elpv-effb4 | fashion-mnist
# Killed half-way, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
which=${1:-elpv}
out=runs/demo
case "$which" in
  elpv)
    options=(--data elpv --test-fraction 0.25 --teacher efflite0 --teacher-weights packaged:efficientnet_lite0
      --folds 3 --teacher-epochs 3 --teacher-image-size 128 --image-size 128 --epochs 12) ;;
  elpv-effb4)
    out=runs/demo-effb4
    options=(--data elpv --test-fraction 0.25 --teacher effb4 --folds 2 --teacher-epochs 6 --teacher-image-size 64
      --image-size 96 --epochs 12) ;;
  fashion-mnist)
    out=runs/demo-fashion-mnist
    options=(--data fashion-mnist --teacher effb0 --folds 2 --teacher-epochs 3 --teacher-image-size 32
      --image-size 32 --epochs 6) ;;
  *) echo "usage: benchmarks/demo.sh elpv|elpv-effb4|fashion-mnist" >&2; exit 2 ;;
esac

"$BIN/distill" "${options[@]}" --student mbv3s --out "$out" --resume
"$BIN/export-openvino" "$out/model.pt" --test-parity
"$BIN/bench-fps" "$out/openvino" --vs naive,naive-default,onnxruntime,torch,benchmark_app
"$BIN/edgedistill" report "$out"
