#!/usr/bin/env bash
# Tests of the kernels under the address and undefined-behaviour sanitizers (GCC), from an
# environment with the development install. See docs/native-builds.md.
#
#   tests/native_core/run_sanitized.sh [arguments of pytest]
#
# QUIRE_VARIANTS names the variants to build; unset: portable and the fastest that runs here.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 CC=gcc CXX=g++

variants=${QUIRE_VARIANTS:-$(python -c '
from quire.backends.native import NativeBackend
print(";".join(sorted({"portable", NativeBackend.variants()[0]})))')}

# An environment of its own, so that the normal build stays. The other packages are borrowed.
python -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --no-deps "$root" \
  -C build-dir="$work/build" -C cmake.build-type=RelWithDebInfo \
  -C cmake.define.QUIRE_SANITIZE=ON -C cmake.define.QUIRE_CORE=ON \
  -C "cmake.define.QUIRE_VARIANTS=$variants"
python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  >"$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"

"$work/build/native_core"

# Python is not built with the sanitizer, so its library comes first; it must find libstdc++ to
# follow exceptions. Python frees little at its end: leaks are looked for in native_core only.
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD=$preload "$work/env/bin/python" -c '
import sys
from quire.backends.native import NativeBackend, _native
maps = open("/proc/self/maps").read()
assert _native.__file__.startswith(sys.argv[1]) and "libasan" in maps, _native.__file__
print("under sanitizers:", *NativeBackend.variants())' "$work"
if [ $# = 0 ]; then
  set -- tests/conformance tests/test_native.py tests/test_native_packed.py tests/test_native_widened.py \
    -k "native and not slow"
fi
LD_PRELOAD=$preload "$work/env/bin/python" -m pytest -n 2 -p no:cacheprovider "$@"
