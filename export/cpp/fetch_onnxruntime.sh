#!/usr/bin/env bash
# Puts onnxruntime's headers and shared library into export/cpp/onnxruntime, from the pip and npm registries alone.
# Where GitHub can be reached, unpack onnxruntime-linux-x64-VERSION.tgz from its releases there instead: it has both.
#
#     bash fetch_onnxruntime.sh [PYTHON]     (a Python that has onnxruntime, whose wheel holds the library)
set -euo pipefail
capi=$("${1:-python3}" -c 'import onnxruntime, pathlib; print(pathlib.Path(onnxruntime.__file__).parent / "capi")')
library=$(ls "$capi"/libonnxruntime.so.*)
cd "$(dirname "$0")"
mkdir -p onnxruntime/include onnxruntime/lib
# The wheel has one file; the linker looks for the first of these names, and the program for the second.
cp "$library" onnxruntime/lib/libonnxruntime.so.1
ln -sf libonnxruntime.so.1 onnxruntime/lib/libonnxruntime.so
# The wheel has no headers. This npm package carries Microsoft's framework for iOS, headers included; older headers go
# with a newer library, not the other way round.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
archive=$(npm pack --silent --pack-destination "$work" com.github.asus4.onnxruntime@0.4.9)
tar xzf "$work/$archive" -C "$work"
headers=$(find "$work/package" -name onnxruntime_cxx_api.h | head -n 1)
cp "$(dirname "$headers")"/*.h onnxruntime/include/
grep -h '#define ORT_API_VERSION' onnxruntime/include/onnxruntime_c_api.h
