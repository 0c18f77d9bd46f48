#!/usr/bin/env bash
# The kernels' conformance core, compiled for AArch64 and run under qemu's user-mode emulator.
#   apt install g++-aarch64-linux-gnu qemu-user cmake
set -euo pipefail
cd "$(dirname "$0")/../.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  if ! command -v "$tool" >/dev/null; then
    echo "AArch64: skipped, because $tool is not installed (see docs/native-builds.md)"
    exit 0
  fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake -S . -B "$work" -DQUIRE_CORE=ONLY -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
cmake --build "$work" --parallel 2
qemu-aarch64 -L /usr/aarch64-linux-gnu "$work/native_core"
