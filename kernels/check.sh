#!/bin/sh
# Compiles the kernels for every architecture and checks what the compiler made of them, without a GPU:
#   kernels/check.sh            compares registers, shared memory, stack and spills with resources.txt
#   kernels/check.sh --update   writes resources.txt anew
# Fails too if a kernel has a stack or spills, if an attention kernel lacks its matrix instructions, asynchronous
# copies or matrix loads (those for Hopper alone: its products and box copies), if a kernel that streams lacks 16-byte loads, or if the images outgrow their budget.
# nvcc: QUIRE_NVCC, CUDA_HOME or PATH, as for build.rs; cuobjdump and nvdisasm (13.2) beside it or on PATH. JOBS:
# compilers at a time (2).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
budget=$((24 * 1024 * 1024))

if [ -n "${QUIRE_NVCC:-}" ]; then nvcc=$QUIRE_NVCC
elif [ -n "${CUDA_HOME:-}" ]; then nvcc=$CUDA_HOME/bin/nvcc
else nvcc=$(command -v nvcc) || { echo "no nvcc: set QUIRE_NVCC or CUDA_HOME (docs/cuda.md)" >&2; exit 2; }
fi
PATH=$(dirname "$nvcc"):$PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The architectures are those of build.rs, so that the table speaks of what is shipped.
architectures=$(sed -n '/^const ARCHITECTURES/,/^];/s/^ *"\(arch=compute_[0-9a-z]*,code=[a-z]*_[0-9a-z]*\)".*/\1/p' "$here/../build.rs")
[ -n "$architectures" ] || { echo "build.rs names no architectures" >&2; exit 2; }
gencode=
for a in $architectures; do gencode="$gencode -gencode $a"; done
# Of sources whose names end in _sm90a, only this one.
hopper="-gencode arch=compute_90a,code=sm_90a"

compile='name=$(basename "$1" .cu)
    case $name in *_sm90a) gencode=$6 ;; *) gencode=$5 ;; esac
    "$2" --fatbin -std=c++17 -O3 -I"$3" -Xfatbin -compress-all -Xptxas -v $gencode -o "$4/$name.fatbin" "$1" >"$4/$name.log" 2>&1 ||
        { cat "$4/$name.log" >&2; exit 255; }'
for source in "$here"/*.cu; do echo "$source"; done |
    xargs -P "${JOBS:-2}" -I{} sh -c "$compile" sh {} "$nvcc" "$here/include" "$work" "$gencode" "$hopper"

# ptxas says, kernel by kernel: its name and architecture, then stack and spills, then registers and shared memory.
{
    echo "# kernel architecture registers shared stack spills (bytes): written by kernels/check.sh --update"
    for log in "$work"/*.log; do
        awk '
            /Compiling entry function/ { split($0, part, "\x27"); name = part[2]; arch = part[4] }
            /bytes stack frame/ { stack = $1; spills = $5 + $9 }
            /Used [0-9]+ registers/ {
                shared = 0
                for (i = 1; i <= NF; ++i) {
                    if ($i == "registers,") registers = $(i - 1)
                    if ($i ~ /^smem/) shared = $(i - 2)
                }
                print name, arch, registers, shared, stack, spills
            }' "$log"
    done | LC_ALL=C sort
} >"$work/resources.txt"

failed=0
say() { echo "$1" >&2; failed=1; }

awk '!/^#/ && ($5 > 0 || $6 > 0) { print "  " $0 }' "$work/resources.txt" >"$work/spills"
if [ -s "$work/spills" ]; then
    say "kernels with a stack or spills (kernel architecture registers shared stack spills):"
    cat "$work/spills" >&2
fi

# Machine code: function by function.
for image in "$work"/*.fatbin; do
    cuobjdump -sass "$image" | awk -v image="$(basename "$image" .fatbin)" '
        BEGIN { streams = "^quire_(embed_b?f16|gather_rows|moe_gate_up|moe_down|add_norm|rope_cache|act|copy_pages|logits_process|sample|logprobs)" }
        function check() {
            if (name == "") return
            if (name ~ streams && name !~ /_any/ && !wide) print image ": " name " (" arch ") has no 16-byte loads"
            if (name ~ /_sm90a_/) {
                if (!hgmma) print image ": " name " (" arch ") has no products of a warpgroup (HGMMA)"
                if (!utmaldg) print image ": " name " (" arch ") has no copies of boxes (UTMALDG)"
                if (!usetmaxreg) print image ": " name " (" arch ") does not move registers (USETMAXREG)"
                return
            }
            if (name !~ /^quire_attention_(decode|prefill)/) return
            if (!hmma) print image ": " name " (" arch ") has no matrix instructions (HMMA)"
            if (!ldgsts) print image ": " name " (" arch ") has no asynchronous copies (LDGSTS)"
            if (!ldsm) print image ": " name " (" arch ") has no matrix loads (LDSM)"
        }
        /^arch = / { arch_of = $3 }
        /Function : / { check(); name = $3; arch = arch_of; wide = hmma = ldgsts = ldsm = hgmma = utmaldg = usetmaxreg = 0 }
        / LDG[.A-Z0-9]*[.]128/ { wide = 1 }
        / HMMA[. ]/ { hmma = 1 }
        / LDGSTS[. ]/ { ldgsts = 1 }
        / LDSM[. ]/ { ldsm = 1 }
        / HGMMA[. ]/ { hgmma = 1 }
        / UTMALDG[. ]/ { utmaldg = 1 }
        / USETMAXREG[. ]/ { usetmaxreg = 1 }
        END { check() }'
done >"$work/sass"
[ ! -s "$work/sass" ] || { say "machine code:"; sed 's/^/  /' "$work/sass" >&2; }

total=0
for image in "$work"/*.fatbin; do
    bytes=$(wc -c <"$image")
    total=$((total + bytes))
    printf '%10d %s\n' "$bytes" "$(basename "$image")"
done
printf '%10d of %d bytes of images; %d kernels on %d architectures\n' "$total" "$budget" \
    "$(awk '!/^#/ { print $1 }' "$work/resources.txt" | sort -u | wc -l)" "$(awk '!/^#/ { print $2 }' "$work/resources.txt" | sort -u | wc -l)"
[ "$total" -le "$budget" ] || say "the images are larger than their budget"

if [ "${1:-}" = --update ]; then
    cp "$work/resources.txt" "$here/resources.txt"
elif ! diff -u "$here/resources.txt" "$work/resources.txt" >&2; then
    say "resources.txt differs: look at the change, then run kernels/check.sh --update"
fi
exit "$failed"
