#!/bin/sh
# Builds the kernels for the host: kernels/emulate/build.sh OUT.so [asan]
# Needs only a C++17 compiler (CXX, default g++). `asan` adds AddressSanitizer and UBSan; a program that is not built
# with them then loads the library under LD_PRELOAD="$(g++ -print-file-name=libasan.so)".
set -eu
out=$1
mode=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
flags="-std=c++17 -O1 -g1 -fPIC -fno-strict-aliasing -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -I$here/../include"
[ "$mode" = asan ] && flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
for source in "$here"/engine.cpp "$here"/../*.cu; do
    [ -e "$source" ] || continue
    echo "$source"
done | xargs -P "${JOBS:-2}" -I{} sh -c '"${CXX:-g++}" '"$flags"' -x c++ -c "$1" -o "$2/$(basename "$1").o"' sh {} "$objects"
# shellcheck disable=SC2086
"${CXX:-g++}" $flags -shared -o "$out.tmp" "$objects"/*.o
mv "$out.tmp" "$out"
