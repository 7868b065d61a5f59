#!/usr/bin/env bash
# Benchmarks on a machine with NVIDIA GPUs and without a network, from packages carried along in .gpu/:
#   .gpu/site.tar.gz   trl, datasets, bitsandbytes and whatever else that machine lacks, unpacked
#   .gpu/*.whl         hf_turbo's own wheel (pip wheel --no-deps -w .gpu .)
#   .gpu/smollm2/      for `demo`: config and tokenizer of SmolLM2-135M-Instruct, from `demo.py --prepare`
#
#   benchmarks/gpu.sh PART...
#     tests[=FILE,...]       the tests that are marked gpu: of kernels and patches, or of these files
#     kernels[=OP,...]       each kernel, or these, against stock and its floor
#     attention  every way to compute attention over documents, FlexAttention among them
#     two-gpus   DDP and FSDP2 on two GPUs, stock and turbo
#     train=NAME[:SYSTEMS[:KEY=VALUE,...]]   one workload of train.py, by default with stock,turbo; TRAIN_FLAGS adds to it
#     demo       the demo on the GPU; with random weights, as the trained ones are too large to carry
#
# Parts run in the order given; each writes its log, and one JSON line per training run, to $OUT (default: build/gpu).
# One part failing does not keep the next from running; the exit code is that of the last to fail.
set -uo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
out=${OUT:-$repository/build/gpu}
site=${SITE:-/tmp/hf_turbo-site}
python=${PYTHON:-python3}
mkdir -p "$out"

if [ ! -e "$site/.complete" ]; then
  rm -rf "$site" && mkdir -p "$site"
  tar xzf .gpu/site.tar.gz -C "$site" || exit
  touch "$site/.complete"
fi
# Each time: hf_turbo's wheel may be a new one.
for wheel in .gpu/*.whl; do
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$wheel" || exit
done
export PYTHONPATH=$site HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# Run where the source folders hf_turbo/, kernels/ and patches/ are not: Python would take them for the packages.
rm -rf "$site-run" && mkdir -p "$site-run"
cp -r tests benchmarks examples configs pyproject.toml "$site-run" || exit
cd "$site-run" || exit

run_part() {
  case $1 in
    tests=*)
      IFS=, read -ra files <<<"${1#tests=}"
      "$python" -m pytest -q -m gpu --durations=3 "${files[@]}" ;;
    tests) "$python" -m pytest tests/kernels -q -m gpu && "$python" -m pytest tests/patches -q -m gpu ;;
    kernels=*) "$python" benchmarks/kernels/summary.py --only "${1#kernels=}" --json "$out/kernels.json" ;;
    kernels) "$python" benchmarks/kernels/summary.py --json "$out/kernels.json" ;;
    attention) "$python" benchmarks/kernels/bench_attention.py --json "$out/attention.json" ;;
    two-gpus) "$python" benchmarks/two_gpus.py --json "$out/two-gpus.json" ;;
    demo)
      "$python" - "$repository/.gpu/smollm2" <<'PY' || return
import sys

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).save_pretrained("smollm2")
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained("smollm2")
PY
      "$python" benchmarks/demo.py --folder demo --model smollm2 --control
      local status=$?
      cp demo/report.json demo/curves.png "$out"
      return "$status" ;;
    train=*)
      IFS=: read -r workload systems changes <<<"${1#train=}"
      local arguments=(--workload "$workload" --systems "${systems:-stock,turbo}" --profile --json "$out/train.jsonl")
      local change
      for change in ${changes//,/ }; do arguments+=(--set "$change"); done
      # shellcheck disable=SC2086  # words, on purpose
      "$python" benchmarks/train.py "${arguments[@]}" ${TRAIN_FLAGS:-} ;;
    *) echo "gpu.sh: no part called $1" >&2; return 2 ;;
  esac
}

code=0
for part in "$@"; do
  echo "== $part"
  run_part "$part" 2>&1 | tee -a "$out/$(tr -c 'a-zA-Z0-9\n' - <<<"${part%%:*}").log" || code=$?
done
exit "$code"
