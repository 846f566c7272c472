#!/bin/sh
# The trainer and examples/mpi.h under mpirun: the same bytes for any number of ranks, failures that end all, resuming.
build=${BUILD:-build}
train=$build/examples/train_mpi
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
passed=0 failed=0

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "mpi.sh: $2"; fi
}

if ! command -v mpirun >/dev/null || [ ! -x "$train" ]; then
    echo "mpi.sh: no mpirun or no $train: Debian's openmpi-bin and libopenmpi-dev have them"
    echo "mpi.sh: 0 passed, 0 failed, 1 skipped"
    exit
fi
# Open MPI wants to be told that more ranks than processors, and root, are meant; MPICH knows neither option. Ranks of Open
# MPI that wait then leave the processor to others, those of MPICH do not: on two processors four of them take minutes.
if mpirun --version | grep -q 'Open MPI'; then
    limit="timeout 120" run="mpirun --oversubscribe --allow-run-as-root"
else
    limit="timeout 600" run=mpirun
fi
without=$run # a limit
run="$limit $run"

# ---- The adapter ----

mkdir -p "$build/tests/mpi"
mpicc -std=c99 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wstrict-prototypes -Werror -O2 -I. \
    tests/mpi/sum.c -o "$build/tests/mpi/sum" -lm -pthread
check $? "sum.c does not compile without a warning"
for np in 1 2 3 4 7; do
    $run -np $np "$build/tests/mpi/sum" sum >"$t/out" 2>&1
    check $? "sum over $np ranks: $(cat "$t/out")"
done
for np in 2 3 4; do
    for part in bytes shard_bytes shards; do
        $run -np $np "$build/tests/mpi/sum" $part >"$t/out" 2>&1
        check $? "$part of $np ranks: $(cat "$t/out")"
        cat "$t/out"
    done
done
for part in label error; do
    $run -np 3 "$build/tests/mpi/sum" $part >"$t/out" 2>&1
    check $? "$part: $(cat "$t/out")"
done

# ended SECONDS STATUS PATTERN WHAT: with a status that is neither 0 nor timeout's, in time, with the reason in $t/err.
ended() {
    [ "$2" -ne 0 ] && [ "$2" -ne 124 ] && [ "$1" -lt 30 ] && grep -q "$3" "$t/err"
    check $? "$4: status $2 after $1 s: $(cat "$t/err")"
}

began=$(date +%s)
$run -np 3 "$build/tests/mpi/sum" killed >"$t/err" 2>&1 # MPICH tells of it on standard output
status=$?
ended $(($(date +%s) - began)) $status 'signal 9\|SIGNAL 9\|Killed' "a killed rank"
! grep -q 'goes on' "$t/err"
check $? "ranks go on without the killed one"

# ---- The same bytes ----

# trained NAME NP OPTION...: checkpoint $t/NAME of NP ranks
trained() {
    name=$1 np=$2
    shift 2
    $run -np "$np" "$train" --mpi --threads 1 --save "$t/$name" "$@" >"$t/out" 2>"$t/err"
    check $? "$np ranks, $*: $(cat "$t/err")"
}

for model in mlp cnn; do
    for way in "O0 f32" "O2 bf16" "O2 f16"; do
        options="--model $model --policy ${way% *} --type ${way#* } --epochs 1" # split into words
        "$train" $options --threads 1 --accumulate 4 --save "$t/alone" >"$t/out" 2>"$t/err"
        check $? "$options: $(cat "$t/err")"
        for np in 1 2 4; do
            trained ranks $np $options --accumulate $((4 / np))
            cmp -s "$t/alone" "$t/ranks"
            check $? "$options: $np ranks differ from one"
            rm -f "$t/ranks"
        done
    done
done

# The last of them again, where each rank keeps a part of the optimizer.
for np in 2 4; do
    trained ranks $np $options --accumulate $((4 / np)) --shard
    cmp -s "$t/alone" "$t/ranks"
    check $? "$options: $np ranks with --shard differ from one"
    rm -f "$t/ranks"
done

# With dropout: the larger CNN, on the digits as if they were another set of images.
mkdir "$t/images"
for set in train t10k; do
    cp examples/data/digits/images.idx3-ubyte "$t/images/$set-images-idx3-ubyte"
    cp examples/data/digits/labels.idx1-ubyte "$t/images/$set-labels-idx1-ubyte"
done
options="--data $t/images --model cnn --policy O2 --type f16 --epochs 1 --batch 16"
trained alone 1 $options --accumulate 4
for np in 2 4; do
    trained ranks $np $options --accumulate $((4 / np))
    cmp -s "$t/alone" "$t/ranks"
    check $? "with dropout $np ranks differ from one"
done

trained three 3 --model cnn --policy O2 --type f16 --epochs 1 --csv "$t/three.csv"
[ "$(wc -l <"$t/three.csv")" -eq 2 ] && [ "$(grep -c '^model' "$t/out")" -ge 1 ] && [ -s "$t/three" ]
check $? "3 ranks: one CSV file, one table, one checkpoint: $(cat "$t/three.csv" "$t/out")"

# ---- Stopped by SIGUSR1 at 2 ranks, resumed at 1 and 4: as the run that never stopped ----

options="--model mlp --policy O2 --type bf16 --epochs 200"
: >"$t/long"
# without timeout, which the signal would end
$without -np 2 "$train" --mpi --threads 1 --accumulate 2 $options --save "$t/half" >"$t/long" 2>"$t/err" &
job=$!
for wait in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    grep -q 'epoch' "$t/long" && break
    sleep 0.1
done
kill -USR1 $job
wait $job
[ -s "$t/half" ] && [ "$(grep -c 'interrupted in epoch .*, saved to' "$t/err")" -eq 1 ]
check $? "SIGUSR1: $(cat "$t/err")"
"$train" --threads 1 --accumulate 4 $options --save "$t/whole" >"$t/out" 2>"$t/err"
for np in 1 4; do
    trained resumed $np $options --accumulate $((4 / np)) --resume "$t/half" --shard
    cmp -s "$t/whole" "$t/resumed"
    check $? "resumed at $np ranks differs from the run that never stopped"
    rm -f "$t/resumed"
done
$run -np 2 "$train" --mpi --threads 1 --accumulate 1 $options --resume "$t/half" >"$t/out" 2>"$t/err"
[ $? -ne 0 ] && grep -q 'accumulate x ranks is 4 there and 2' "$t/err"
check $? "resumed with a smaller step: $(cat "$t/err")"

# ---- README's two commands, as a user gives them where that is allowed ----

sed -n 's/^    \(make build.*train_mpi\|mpirun .* --mpi .*\)$/\1/p' README.md >"$t/commands"
[ "$(wc -l <"$t/commands")" -eq 2 ]
check $? "README has not two commands for several ranks: $(cat "$t/commands")"
grep -q "^mpirun -np 4 build/examples/train_mpi --mpi" "$t/commands" &&
    $(sed -n "s|^mpirun|$run|; s|build/examples|$build/examples|p" "$t/commands" | tail -n 1) >"$t/out" 2>"$t/err"
check $? "README's mpirun: $(cat "$t/err")"
grep -q '^cnn' "$t/out"
check $? "README's mpirun prints no table: $(cat "$t/out")"

# ---- Ranks that are not alike, data damaged on one ----

alike="--mpi --threads 1 --model mlp --policy O0 --epochs 3"
began=$(date +%s)
$run -np 2 "$train" $alike : -np 1 "$train" $alike --seed 2 >"$t/out" 2>"$t/err"
status=$?
ended $(($(date +%s) - began)) $status 'rank 2 has another model, seed or setting than rank 0' "another seed on rank 2"
mkdir "$t/data"
cp examples/data/digits/*-ubyte "$t/data"
{ head -c 1804 examples/data/digits/labels.idx1-ubyte; printf '\12'; } >"$t/data/labels.idx1-ubyte"
began=$(date +%s)
$run -np 2 "$train" $alike : -np 1 "$train" $alike --data "$t/data" >"$t/out" 2>"$t/err"
status=$?
ended $(($(date +%s) - began)) $status 'label 1796 is 10, want 0 to 9' "a bad label in the data of rank 2"

echo "mpi.sh: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
