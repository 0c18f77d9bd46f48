#!/usr/bin/env bash
# Tests and measures the cuda backend on a machine with an NVIDIA driver: all that docs/gpu.md and
# docs/benchmarks.md have figures of, for a card that is rented by the minute.
#
#     OUT=folder bash bench/gpu_run.sh [tests] [bench] [tune] [more]
#
# Without a part: tests and bench, within 570 seconds. Nothing of the checkout must be built. What is
# missing of Python packages is installed in place, so that what is there stays visible: run it in an
# environment, or on a machine that goes back. From WHEELS=folder where no registry can be reached.
# Written to $OUT: machine.txt, install.log, tests.log (pytest -m gpu), gpu.json and bench.log
# (bench/gpu.py), roofline.png, tune.json and tune.log (bench/gpu_tune.py), more.log (the cuda
# backend's other tests).
set -uo pipefail
[ -n "${WHEELS:-}" ] && WHEELS=$(cd "$WHEELS" && pwd)
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-$PWD/gpu-out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
parts=("$@")
[ $# -eq 0 ] && parts=(tests bench)
for part in "${parts[@]}"; do
  [[ " tests bench tune more " == *" $part "* ]] && continue
  echo "no part is called $part; there are tests, bench, tune and more" >&2
  exit 2
done
python=python3
limit=570
left() { echo $((limit - SECONDS)); }
step() { printf '\n== %s (%ss, %ss left)\n' "$1" "$SECONDS" "$(left)"; }
has() { "$python" -c "import $1" >/dev/null 2>&1; }

step "the machine"
{ nvidia-smi; nproc; uname -a; "$python" --version; df -h /tmp; git log -1 --oneline; } 2>&1 |
  tee "$out/machine.txt" | sed -n 1,20p
command -v nvidia-smi >/dev/null || echo "nvidia-smi is missing: is there a driver?" >&2
command -v gcc >/dev/null || command -v clang >/dev/null || command -v cc >/dev/null ||
  echo "no C compiler: Triton needs one to build its launcher" >&2

step "what is missing"
from=() # a folder of wheels, for a machine without a registry
[ -n "${WHEELS:-}" ] && from=(--no-index --find-links "$WHEELS")
install() { # once, and without waiting long for a registry that cannot be reached
  PIP_BREAK_SYSTEM_PACKAGES=1 timeout 240 "$python" -m pip install --quiet \
    --retries 0 --timeout 10 --disable-pip-version-check "${from[@]}" "$1"
}
missing=()
"$python" -c 'import torch; assert torch.cuda.is_available()' >/dev/null 2>&1 ||
  missing+=("torch==2.13.0")
for pair in triton:triton transformers:transformers numpy:numpy ml_dtypes:ml_dtypes \
  safetensors:safetensors tokenizers:tokenizers jinja2:jinja2 click:click rich:rich \
  huggingface_hub:huggingface_hub zstandard:zstandard packaging:packaging pytest:pytest \
  hypothesis:hypothesis matplotlib:matplotlib xdist:pytest-xdist; do
  has "${pair%%:*}" || missing+=("${pair##*:}")
done
for package in "${missing[@]}"; do # one by one: where there is no registry only the needed count
  echo "installing $package"
  install "$package" >>"$out/install.log" 2>&1 || echo "could not (see install.log)" >&2
done
export PYTHONPATH=$PWD/src PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 # transformers is not to look for kernels in the network meanwhile
"$python" - <<'PY' 2>&1 | tee -a "$out/machine.txt"
import sys
import torch, triton
print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__,
      "cuda", torch.version.cuda, torch.cuda.is_available() and torch.cuda.get_device_name())
from quire.backends import backend_status
for status in backend_status():
    print(status.name, "on" if status.available else "OFF", status.detail)
PY
workers=()
has xdist && workers=(-n $(($(nproc) > 8 ? $(nproc) / 2 : 4))) # they compile, most of the time
tested=(-p no:cacheprovider -p no:benchmark "${workers[@]}" --durations=10 tests/test_cuda*.py)

within() { # seconds, log, command: runs it, at most so long, and shows the end of what it says
  local seconds=$1 log=$2
  shift 2
  timeout -k 5 "$seconds" "$@" >"$out/$log" 2>&1
  echo "exit $?"
  tail -n "${LINES_SHOWN:-200}" "$out/$log"
}

for part in "${parts[@]}"; do
  step "$part"
  case $part in
  tests) LINES_SHOWN=25 within 150 tests.log "$python" -m pytest -m gpu "${tested[@]}" ;;
  more)
    LINES_SHOWN=12 within $(($(left) - 5)) more.log "$python" -m pytest -k cuda "${tested[@]}" \
      tests/conformance
    ;;
  bench)
    seconds=$(($(left) - 25))
    [ "$seconds" -gt 460 ] && seconds=460
    within $((seconds + 12)) bench.log "$python" bench/gpu.py --json "$out/gpu.json" \
      --seconds "$seconds"
    "$python" bench/gpu_roofline.py "$out/gpu.json" "$out/roofline.png" || true
    ;;
  tune)
    within $(($(left) - 5)) tune.log "$python" bench/gpu_tune.py --json "$out/tune.json" \
      --seconds $(($(left) - 40))
    ;;
  esac
done
step "done: $out"
