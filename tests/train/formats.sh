#!/bin/sh
# examples/train.c from outside, on small files in each format: damaged ones, training, --save, --resume, --seeds,
# Ctrl-C.
train=${BUILD:-build}/examples/train
digits=examples/data/digits # 1,797 images of 8x8
t=$(mktemp -d)
trap 'rm -rf "$t"' EXIT
passed=0 failed=0

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "formats.sh: $2"; fi
}

# refused PATTERN FOLDER: exit status 2 and exactly one line on stderr, which matches.
refused() {
    "$train" --data "$2" >"$t/out" 2>"$t/err"
    status=$?
    [ "$status" -eq 2 ] && [ "$(wc -l <"$t/err")" -eq 1 ] && grep -q "^train: $2.*$1" "$t/err" && [ ! -s "$t/out" ]
    check $? "want '$1': exit status $status: $(cat "$t/err")"
}

# bytes OCTAL...: writes bytes.
bytes() { for b; do printf "\\$b"; done; }

# cut_pieces FILE HEADER SIZE FROM COUNT: COUNT of the pieces of SIZE bytes behind a header.
cut_pieces() { tail -c +$(($2 + $3 * $4 + 1)) "$1" | head -c $(($3 * $5)); }

# The first 1,536 (06 00) digits to train, the next 200 (310) to test.
mkdir "$t/idx"
{ bytes 0 0 10 3 0 0 6 0 0 0 0 10 0 0 0 10; cut_pieces $digits/images.idx3-ubyte 16 64 0 1536; } \
    >"$t/idx/train-images-idx3-ubyte"
{ bytes 0 0 10 1 0 0 6 0; cut_pieces $digits/labels.idx1-ubyte 8 1 0 1536; } >"$t/idx/train-labels-idx1-ubyte"
{ bytes 0 0 10 3 0 0 0 310 0 0 0 10 0 0 0 10; cut_pieces $digits/images.idx3-ubyte 16 64 1536 200; } \
    >"$t/idx/t10k-images-idx3-ubyte"
{ bytes 0 0 10 1 0 0 0 310; cut_pieces $digits/labels.idx1-ubyte 8 1 1536 200; } >"$t/idx/t10k-labels-idx1-ubyte"

plane() { head -c 1024 /dev/zero | tr '\0' "\\$1"; }

# Two records of two classes, one red and one blue.
mkdir "$t/cifar"
{ bytes 3; plane 310; plane 100; plane 40; bytes 7; plane 40; plane 100; plane 310; } >"$t/record"
for i in 1 2 3 4 5; do cat "$t/record" "$t/record" "$t/record" "$t/record" >"$t/cifar/data_batch_$i.bin"; done
cat "$t/record" "$t/record" >"$t/cifar/test_batch.bin"

# fresh FOLDER: a copy of it in $t/bad, for damage.
fresh() {
    rm -rf "$t/bad"
    cp -R "$t/$1" "$t/bad"
}

# ---- Damaged files ----

refused "neither images.idx3-ubyte, nor train-images-idx3-ubyte, plain or .gz, nor data_batch_1.bin" "$t/none"
for name in train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte; do
    file=$t/bad/$name good=$t/idx/$name
    fresh idx
    size=$(wc -c <"$good")
    : >"$file"; refused "$name: truncated: 0 bytes" "$t/bad"
    head -c $((size - 1)) "$good" >"$file"; refused "$name: truncated: size" "$t/bad"
    { cat "$good"; bytes 0; } >"$file"; refused "$name: 1 bytes too many behind the data" "$t/bad"
    { bytes 0 0 11; tail -c +4 "$good"; } >"$file"; refused "$name: starts with 0x000009" "$t/bad"
    { head -c 4 "$good"; bytes 377 377 377 377; tail -c +9 "$good"; } >"$file"
    refused "$name: truncated: size 1 of . in the header is 4294967295" "$t/bad"
    rm "$file"; mkdir "$file"; refused "$name: not a file" "$t/bad"; rmdir "$file"
    [ $name = train-images-idx3-ubyte ] || refused "$name: No such file" "$t/bad"
done
fresh idx
{ bytes 0 0 10 1 0 0 0 307; tail -c 199 "$t/idx/t10k-labels-idx1-ubyte"; } >"$t/bad/t10k-labels-idx1-ubyte"
refused "t10k-labels-idx1-ubyte: 199 labels, but 200 images in .*t10k-images-idx3-ubyte" "$t/bad"
{ head -c 207 "$t/idx/t10k-labels-idx1-ubyte"; bytes 12; } >"$t/bad/t10k-labels-idx1-ubyte"
refused "t10k-labels-idx1-ubyte: label 199 is 10, want 0 to 9" "$t/bad"
fresh idx
{ bytes 0 0 10 3 0 0 0 310 0 0 0 20 0 0 0 4; tail -c 12800 "$t/idx/t10k-images-idx3-ubyte"; } \
    >"$t/bad/t10k-images-idx3-ubyte"
refused "images of 8x8 to train, but of 16x4 to test" "$t/bad"
{ bytes 0 0 10 3 0 0 0 310 0 0 0 40 0 0 0 2; tail -c 12800 "$t/idx/t10k-images-idx3-ubyte"; } \
    >"$t/bad/t10k-images-idx3-ubyte"
{ bytes 0 0 10 3 0 0 6 0 0 0 0 40 0 0 0 2; tail -c 98304 "$t/idx/train-images-idx3-ubyte"; } \
    >"$t/bad/train-images-idx3-ubyte"
refused "images of 32x2, want 4x4 to 256x256" "$t/bad"

for name in data_batch_1 data_batch_5 test_batch; do
    file=$t/bad/$name.bin good=$t/cifar/$name.bin
    fresh cifar
    size=$(wc -c <"$good")
    : >"$file"; refused "$name.bin: truncated: 0 bytes, want a multiple of 3073" "$t/bad"
    head -c $((size - 1)) "$good" >"$file"; refused "$name.bin: truncated" "$t/bad"
    { cat "$good"; bytes 0; } >"$file"; refused "$name.bin: truncated" "$t/bad"
    { head -c 3073 "$good"; bytes 12; tail -c +3075 "$good"; } >"$file"
    refused "$name.bin: label 1 is 10, want 0 to 9" "$t/bad"
    rm "$file"
    if [ $name = data_batch_1 ]; then refused "neither" "$t/bad"; else refused "$name.bin: No such file" "$t/bad"; fi
done

# ---- Training ----

# train NAME OPTION...: a run that ends well; its CSV without the speed in $t/NAME.csv.
train() {
    name=$1
    shift
    "$train" --csv "$t/rows" "$@" >"$t/out" 2>"$t/err"
    check $? "$*: $(cat "$t/err")"
    cut -d, -f1-13 "$t/rows" >"$t/$name.csv"
}

# accurate NAME ROWS GOAL: the CSV has so many rows, none under the goal.
accurate() {
    awk -F, -v goal="$3" 'NR > 1 && $6 >= goal { good++ } END { print good + 0, NR - 1 }' "$t/$1.csv" >"$t/count"
    [ "$(cat "$t/count")" = "$2 $2" ]
    check $? "$1: want $2 rows of at least $3: $(cat "$t/$1.csv")"
}

for model in mlp cnn resnet; do
    train $model --data "$t/idx" --model $model --policy O0 --epochs 8 --batch 32 --lr 0.005
    accurate $model 1 0.85
    [ "$(grep -c "^\[1/1\] $model O0 f32 epoch" "$t/out")" -eq 8 ] && ! grep -q "$(printf '\r')" "$t/out"
    check $? "$model: no plain progress lines: $(cat "$t/out")"
    grep -q '^\[1/1\] .* ETA [0-9]*:[0-9][0-9] test [0-9.]*% loss [0-9.]* scale [0-9]* [0-9]*/s$' "$t/out"
    check $? "$model: progress: $(cat "$t/out")"
done
train cifar --data "$t/cifar" --model cnn --policy O2 --type bf16 --epochs 20 --batch 8
accurate cifar 1 1

# The same bits on one thread and on two, with everything that is random, and not with another seed.
for n in 1 2; do
    train threads$n --data "$t/idx" --model resnet --policy O1 --type bf16 --epochs 1 --shift 1 --flip yes \
        --save "$t/saved$n" --threads $n
done
cmp -s "$t/threads1.csv" "$t/threads2.csv" && cmp -s "$t/saved1" "$t/saved2"
check $? "1 and 2 threads differ"
train other --data "$t/idx" --model resnet --policy O1 --type bf16 --epochs 1 --shift 1 --flip yes --save "$t/saved3" \
    --seed 2
! cmp -s "$t/saved1" "$t/saved3"
check $? "seeds 1 and 2 give the same weights"

# saved FILE NAMES: a checkpoint that has these tensors; nothing temporary is left.
saved() {
    for name in $2; do
        head -c 20000 "$1" | grep -aq "\"$name\":{\"dtype\""
        check $? "$1: no $name"
    done
    [ ! -e "$1.tmp" ]
    check $? "$1.tmp is left"
}
saved "$t/saved1" "conv1.weight batch_norm9.weight linear1.weight linear1.bias batch_norm9.running_mean \
    batch_norm9.running_var mpt.moment2.conv1.weight mpt.scaler"

train seeds --data "$t/idx" --model mlp --seeds 2 --epochs 2 --policy O2
accurate seeds 4 0.3
[ "$(tail -n +2 "$t/seeds.csv" | cut -d, -f3,4 | tr '\n' ' ')" = "bf16,1 bf16,2 f16,1 f16,2 " ]
check $? "--seeds 2: $(cat "$t/seeds.csv")"
train seeds --data "$t/idx" --model mlp --seeds 2 --epochs 2
accurate seeds 14 0.3
[ "$(grep -c '^mlp .*\(yes\|NO\)$' "$t/out")" -eq 6 ]
check $? "--seeds 2: six rows compared with fp32: $(cat "$t/out")"
awk -F, '{ a[$2 " " $3] += $6 / 2 } END { printf "%.2f\n", 100 * a["O2 bf16"] }' "$t/seeds.csv" >"$t/mean"
grep -q "^mlp *O2 *bf16 *$(cat "$t/mean") " "$t/out"
check $? "--seeds 2: the mean of O2 bf16 is not $(cat "$t/mean"): $(cat "$t/out")"

# ---- Ctrl-C: the run is saved, no row is written, the status tells; going on from there ends as if it had not been ----

run="--data $t/idx --model resnet --policy O2 --type f16 --epochs 3 --shift 1 --flip yes" # split into words
rm "$t/out" # or what an earlier run said would be taken for this one's
"$train" $run --csv "$t/stopped.csv" --save "$t/stopped" >"$t/out" 2>"$t/err" &
pid=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    grep -q "epoch 1/" "$t/out" 2>/dev/null && break
    sleep 0.2
done
kill -INT $pid
wait $pid
status=$?
[ "$status" -eq 130 ] && [ "$(wc -l <"$t/err")" -eq 1 ] && [ "$(wc -l <"$t/stopped.csv")" -eq 1 ] &&
    grep -q "^train: resnet O2 f16: interrupted in epoch [0-9]* of 3, saved to $t/stopped" "$t/err"
check $? "Ctrl-C: exit status $status: $(cat "$t/err" "$t/stopped.csv")"
saved "$t/stopped" "conv1.weight conv9.weight linear1.weight mpt.moment1.conv1.weight"
train resumed $run --resume "$t/stopped" --save "$t/resumed" --threads 1
train whole $run --save "$t/whole" --threads 2
cmp -s "$t/resumed.csv" "$t/whole.csv" && cmp -s "$t/resumed" "$t/whole"
check $? "a resumed run differs from a whole one: $(cat "$t/err" "$t/resumed.csv" "$t/whole.csv")"

# ---- gzip ----

fresh idx
gzip "$t/bad/"*-ubyte
file=$t/bad/t10k-images-idx3-ubyte.gz
"$train" --data "$t/bad" --model mlp --policy O0 --epochs 1 --csv "$t/gzip.csv" >"$t/out" 2>"$t/err"
status=$?
if grep -q "this build has no zlib" "$t/err"; then
    [ "$status" -eq 2 ] && [ "$(wc -l <"$t/err")" -eq 1 ] &&
        grep -q "^train: $t/bad/train-images-idx3-ubyte.gz: " "$t/err"
    check $? "without zlib: exit status $status: $(cat "$t/err")"
else
    train plain --data "$t/idx" --model mlp --policy O0 --epochs 1
    cut -d, -f1-13 "$t/gzip.csv" | cmp -s - "$t/plain.csv"
    check $? "packed and plain files differ: $(cat "$t/err" "$t/gzip.csv" "$t/plain.csv")"
    size=$(wc -c <"$file")
    cp "$file" "$t/good.gz"
    : >"$file"; refused "t10k-images-idx3-ubyte.gz: truncated: its 0 bytes unpack to 0" "$t/bad"
    head -c $((size - 1)) "$t/good.gz" >"$file"; refused "truncated: its $((size - 1)) bytes unpack to 12816" "$t/bad"
    { cat "$t/good.gz"; bytes 1; } >"$file"; refused "1 bytes behind the data that are not zeros" "$t/bad"
    { cat "$t/good.gz"; bytes 0 0 1; } >"$file"; refused "1 bytes behind the data that are not zeros" "$t/bad"
    { gzip -dc "$t/good.gz" | head -c 1000 | gzip; gzip -dc "$t/good.gz" | tail -c +1001 | gzip; bytes 0 0 0; } >"$file"
    train members --data "$t/bad" --model mlp --policy O0 --epochs 1
    cmp -s "$t/members.csv" "$t/plain.csv"
    check $? "two members and zeros behind them are not read as one file"
    { bytes 0; tail -c +2 "$t/good.gz"; } >"$file"; refused "gzip: incorrect header check" "$t/bad"
    { head -c $((size - 8)) "$t/good.gz"; bytes 1 2 3 4 0 0 0 0; } >"$file"
    refused "gzip: incorrect data check" "$t/bad"
    { gzip -dc "$t/good.gz"; bytes 0; } | gzip >"$file"; refused ".gz: 1 bytes too many behind the data" "$t/bad"
fi

echo "formats.sh: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
