#!/bin/sh
# The trainer from outside: exit status, one line on stderr for wrong use and damaged files, CSV, progress, accuracy.
train=${BUILD:-build}/examples/train
data=examples/data/digits
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
passed=0 failed=0

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "trainer.sh: $2"; fi
}

# refused STATUS PATTERN OPTION...: exactly one line on stderr, which matches; nothing on stdout.
refused() {
    want=$1 pattern=$2
    shift 2
    "$train" "$@" >"$t/out" 2>"$t/err"
    status=$?
    [ "$status" -eq "$want" ] && [ "$(wc -l <"$t/err")" -eq 1 ] && grep -q "^train: .*$pattern" "$t/err" &&
        [ ! -s "$t/out" ]
    check $? "$*: exit status $status: $(cat "$t/err")"
}

# damaged PATTERN: the files in $t/data are refused.
damaged() {
    refused 2 "$1" --data "$t/data"
    cp "$data"/*-ubyte "$t/data"
}

# bytes OCTAL...: writes bytes.
bytes() { for b; do printf "\\$b"; done; }

images=$t/data/images.idx3-ubyte labels=$t/data/labels.idx1-ubyte

refused 2 "unknown option '--epoch'" --epoch 3
refused 2 "'mlp' is no option" mlp
refused 2 "unknown option '--epochs3'" --epochs3
refused 2 "unknown option '--'" --=3
refused 2 "want a whole number from 1 to 1000000" --epochs=
refused 2 "want a whole number from 1 to 1000000" --epochs=3=4
for option in data model policy type epochs batch accumulate lr seed seeds shift flip threads device csv save resume; do
    refused 2 "--$option" --$option
done
refused 2 "not for images of 8x8 pixels, want mlp, cnn or all" --model resnet
refused 2 "want mlp|cnn|resnet|all" --model ml
refused 2 "want O0|O1|O2|O3|all" --policy O4
refused 2 "want f32|bf16|f16|all" --type fp16
refused 2 "want cpu|cuda" --device gpu
refused 2 "want no|yes" --flip 1
refused 2 "want a whole number from 0 to 64" --shift 65
refused 2 "want a whole number from 1 to 1000" --seeds 0
refused 2 "no CUDA" --device cuda
refused 2 "no MPI: .make build/examples/train_mpi" --mpi
refused 2 "--mpi takes no value" --mpi=4
refused 2 "f32 goes with O0" --policy O0 --type f16
refused 2 "f32 goes with O0" --policy O2 --type f32
for n in 0 -1 3x '' ' 3' 99999999999999999999 nan; do refused 2 "want a whole number" --epochs "$n"; done
for n in 0 -1 3x nan inf 1e999 1e-999; do refused 2 "want a number above 0" --lr "$n"; done
refused 2 "1438 training samples" --batch 1439
refused 2 "--batch 720, for a step 1440: .* 1438 training samples" --batch 720 --accumulate 2
refused 2 "neither images.idx3-ubyte, nor" --data "$t/none"
refused 2 "/none/out.csv: No such file" --csv "$t/none/out.csv"
refused 2 "/none/weights.tmp: No such file" --model mlp --policy O0 --save "$t/none/weights"
refused 2 "--save is for one run, and 14 are selected" --save "$t/weights"
refused 2 "--resume is for one run, and 14 are selected" --resume "$t/weights"
refused 2 "--resume: checkpoint_load: cannot be opened, '$t/none'" --model mlp --policy O0 --resume "$t/none"
refused 2 "--resume: .*, '$data/images.idx3-ubyte'" --model mlp --policy O0 --resume "$data/images.idx3-ubyte"
[ ! -c /dev/full ] || refused 2 "/dev/full: No space left" --csv /dev/full

mkdir "$t/data"
cp "$data"/*-ubyte "$t/data"
rm "$images"; damaged "neither images.idx3-ubyte, nor"
rm "$labels"; damaged "labels.idx1-ubyte: No such file"
rm "$images"; mkdir "$images"; refused 2 "not a file" --data "$t/data"; rmdir "$images"; cp "$data"/*-ubyte "$t/data"
: >"$images"; damaged "truncated"
head -c 15 "$data/images.idx3-ubyte" >"$images"; damaged "truncated"
head -c 16 "$data/images.idx3-ubyte" >"$images"; damaged "truncated"
head -c 115023 "$data/images.idx3-ubyte" >"$images"; damaged "truncated"
head -c 1804 "$data/labels.idx1-ubyte" >"$labels"; damaged "truncated"
printf x >>"$images"; damaged "1 bytes too many"
printf x >>"$labels"; damaged "1 bytes too many"
cp "$data/labels.idx1-ubyte" "$images"; damaged "0x00000801, want 0x00000803"
cp "$data/images.idx3-ubyte" "$labels"; damaged "0x00000803, want 0x00000801"
bytes 0 0 10 3 0 0 0 0 0 0 0 10 0 0 0 10 >"$images"; damaged "size 1 of 3 in the header is 0"
bytes 0 0 10 3 0 0 0 1 0 0 0 10 0 0 0 0 >"$images"; damaged "truncated"
{ bytes 0 0 10 3 0 0 0 1 0 0 0 10 0 0 0 0; printf 12345678; } >"$images"; damaged "size 3 of 3 in the header is 0"
{ bytes 0 0 10 3 377 377 377 377 377 377 377 377 377 377 377 377; printf x; } >"$images"; damaged "truncated"
{ bytes 0 0 10 3 0 0 0 10 0 0 0 10 0 0 0 10; head -c 512 "$data/images.idx3-ubyte"; } >"$images"
damaged "1797 labels, but 8 images"
{ bytes 0 0 10 3 0 0 7 5 0 0 0 20 0 0 0 4; tail -c 115008 "$data/images.idx3-ubyte"; } >"$images"
damaged "1797 images of 16x4, want 5 or more of 8x8"
{ bytes 0 0 10 1 0 0 7 4; tail -c 1796 "$data/labels.idx1-ubyte"; } >"$labels"; damaged "1796 labels, but 1797 images"
{ head -c 1804 "$data/labels.idx1-ubyte"; bytes 12; } >"$labels"; damaged "label 1796 is 10, want 0 to 9"
{ head -c 115023 "$data/images.idx3-ubyte"; bytes 21; } >"$images"; damaged "pixel 63 of image 1796 is 17, want 0 to 16"

"$train" --help >"$t/out" 2>"$t/err"
check $? "--help fails"
for option in data model policy type epochs batch accumulate lr seed seeds shift flip threads device mpi csv save \
    resume help; do
    grep -q -- "--$option" "$t/out"
    check $? "--help does not tell --$option"
done
"$train" -h >"$t/short" 2>"$t/err" && cmp -s "$t/out" "$t/short"
check $? "-h is not --help: $(cat "$t/err")"

# --option=value, and the digits found from where the program lies.
case $train in /*) ;; *) train=$PWD/$train ;; esac
(cd "$t" && "$train" --model=mlp --policy=O0 --epochs=1 --csv=here.csv >out 2>err)
check $? "from another folder: $(cat "$t/err")"
"$train" --model mlp --policy O0 --epochs 1 --csv "$t/there.csv" >"$t/out" 2>"$t/err"
cut -d, -f1-13 "$t/here.csv" >"$t/here" && cut -d, -f1-13 "$t/there.csv" | cmp -s - "$t/here"
check $? "--option=value differs from --option value"

# On a terminal of 40 columns the progress line is never wider, and stays on one line.
if script -qec true /dev/null >/dev/null 2>&1 </dev/null; then
    script -qec "stty cols 40; $train --model mlp --policy O0 --epochs 3" /dev/null >"$t/screen" 2>&1 </dev/null
    tr '\r' '\n' <"$t/screen" | grep '^\[1/1\]' | sed 's/\x1b\[K.*//' >"$t/lines"
    [ -s "$t/lines" ] && awk 'length >= 40 { bad = 1 } END { exit bad }' "$t/lines" && grep -q 'ETA' "$t/lines"
    check $? "progress at 40 columns: $(head -n 3 "$t/lines")"
fi

# Results: one plain progress line a run at least, no carriage returns; the CSV holds what its readers rely on.
"$train" --model mlp --csv "$t/all.csv" >"$t/out" 2>"$t/err"
check $? "--model mlp: $(cat "$t/err")"
[ "$(wc -l <"$t/all.csv")" -eq 8 ]
check $? "--model mlp gives $(wc -l <"$t/all.csv") lines of CSV, not 8"
[ "$(grep -c '^\[7/7\] mlp' "$t/out")" -ge 1 ] && ! grep -q "$(printf '\r')" "$t/out"
check $? "no plain progress lines"
awk -f tests/train/rows.awk "$t/all.csv"
check $? "a row of the MLP is off"
grep -q 'mlp O2 f16: test accuracy .* with the scale, .* without' "$t/out" && grep -q '^So fp16 without' "$t/out"
check $? "no answer on loss scaling"

# A checkpoint at the end of a run: going on from there tests it again and saves the same; other options are refused.
"$train" --model mlp --policy O2 --type f16 --epochs 2 --save "$t/end" --csv "$t/end.csv" >"$t/out" 2>"$t/err"
check $? "--save: $(cat "$t/err")"
"$train" --model mlp --policy O2 --type f16 --epochs 2 --resume "$t/end" --save "$t/again" --csv "$t/again.csv" \
    >"$t/out" 2>"$t/err"
check $? "--resume at the end: $(cat "$t/err")"
cmp -s "$t/end" "$t/again" && [ "$(cut -d, -f1-13 "$t/end.csv")" = "$(cut -d, -f1-13 "$t/again.csv")" ]
check $? "--resume at the end changes something: $(cat "$t/end.csv" "$t/again.csv")"
resume="--model mlp --policy O2 --type f16 --resume $t/end" # $resume is split into words
refused 2 "--resume: .*schedule.steps is" $resume --epochs 3
refused 2 "--resume: .*seed is 1 there and 2" $resume --epochs 2 --seed 2
refused 2 "--resume: .*batch is 32 there and 16" $resume --epochs 2 --batch 16
refused 2 "--resume: .*'mpt.settings' is" --model cnn --policy O2 --type f16 --epochs 2 --resume "$t/end"
head -c 1000 "$t/end" >"$t/cut"
refused 2 "--resume: .*, '$t/cut'" --model mlp --policy O2 --type f16 --epochs 2 --resume "$t/cut"

for n in 1 2; do
    "$train" --model cnn --policy O1 --type bf16 --epochs 2 --threads $n --csv "$t/$n.csv" >"$t/out"
    cut -d, -f1-13 "$t/$n.csv" >"$t/$n"
done
cmp -s "$t/1" "$t/2"
check $? "1 and 2 threads differ: $(cat "$t/1" "$t/2")"

# The page before this program: a table, and a damaged one.
csv=$(dirname "$train")/csv
"$csv" examples/data/iris/iris.csv "$t/iris" >"$t/out" 2>"$t/err"
status=$?
# 28 of 30 are right; some iris of two species overlap
[ $status -eq 0 ] && [ "$(sed -n 's/^epoch 40: \([0-9]*\) of 30 right$/\1/p' "$t/out")" -ge 26 ] && grep -q '^logits' "$t/out"
check $? "csv: exit status $status: $(cat "$t/out" "$t/err")"
{ cat examples/data/iris/iris.csv; echo 1,2,x,4,0; } >"$t/bad.csv"
"$csv" "$t/bad.csv" "$t/iris" >"$t/out" 2>"$t/err"
[ $? -eq 1 ] && [ "$(cat "$t/err")" = "csv: want 32 to 999 rows of 4 numbers and a class" ]
check $? "csv takes a damaged row: $(cat "$t/out" "$t/err")"

echo "trainer.sh: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
