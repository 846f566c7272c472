# compile.sh CC - a row of `make bench`: what the implementation costs its user to compile, alone and at -O2
#
# value is the least of three runs, in seconds of user time; bytes is code and constants, as `size` counts text.
set -e
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
printf '#define MPT_IMPLEMENTATION\n#include "mpt.h"\n' >"$dir/header.c"
for run in 1 2 3; do
    # The second line of `times` is what the shell's children took: 0m6.64s 0m0.28s
    sh -c '$1 -std=c99 -O2 -I. -c "$2/header.c" -o "$2/header.o" && times' sh "$1" "$dir" | sed -n 2p
done >"$dir/times"
seconds=$(sed 's/m/ /; s/s.*//' "$dir/times" | awk '{ s = 60 * $1 + $2; if (!best || s < best) best = s } END { print best }')
bytes=$(size "$dir/header.o" | awk 'NR == 2 { print $1 }')
echo "compile header=mpt.h compiler=$(basename "${1%% *}") flags=-O2 bytes=$bytes value=$seconds unit=s peak=none ratio=none"
