#!/bin/sh
# Runs the course: every program, whose claims are checked; is what examples/README.md and README.md quote of them what
# they print? And the figures, by gnuplot as SVG and PNG in BUILD/figures, or as bars here.
# Environment: BUILD, JOBS: how many at a time. Run from the root of the repository; the programs are built by `make course`.
build=${BUILD:-build} out=${BUILD:-build}/course figures=${BUILD:-build}/figures
passed=0 failed=0 left_out=
mkdir -p "$out" "$figures" || exit 1

check() { # check STATUS WHAT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "course: $2"; fi
}

# A block ```text NAME [WITHIN] of a page quotes lines of build/course/NAME.txt: the words are the same and the numbers
# within a share WITHIN (0 if none is given; numbers of a training depend on the processor's sums in their last digits).
# ~ before a number says that it is rounding noise, whose size alone is the same on all: within a factor of 8.
# A decimal number in the last column of a table stands in one of the blocks before it.
quotes() {
    awk -v out="$out" '
    # The line with # for each number, which go to number[1..count].
    function skeleton(line,   words) {
        count = 0
        gsub(/[ \t]+/, " ", line)
        words = ""
        while (match(line, /~?[0-9]+(\.[0-9]+)?(e[-+][0-9]+)?/)) {
            number[++count] = substr(line, RSTART, RLENGTH)
            noise[count] = sub(/^~/, "", number[count])
            words = words substr(line, 1, RSTART - 1) "#"
            line = substr(line, RSTART + RLENGTH)
        }
        return words line
    }
    function quote(line,   i, words) {
        words = skeleton(line)
        for (i = 1; i <= count; i++) { quoted[i] = number[i]; rough[i] = noise[i]; known[number[i]] = 1 }
        return words
    }
    function found(line,   i, j, want, n, close_enough, size, share, d) {
        want = quote(line)
        n = count
        for (j = 1; j <= lines; j++) {
            if (skeleton(text[j]) != want) continue
            close_enough = 1
            for (i = 1; i <= n; i++) {
                d = quoted[i] - number[i]
                size = quoted[i] > number[i] ? quoted[i] : number[i]
                share = rough[i] ? 7 / 8 : within
                if (d > share * size || -d > share * size) close_enough = 0
            }
            if (close_enough) return 1
        }
        return 0
    }
    /^```text [0-9][0-9]_/ {
        name = $2; within = $3 + 0; lines = 0; block = 1; skip = 0
        while ((getline line < (out "/" name ".txt")) > 0) {
            text[++lines] = line
            if (line ~ /is not installed/) skip = 1
        }
        close(out "/" name ".txt")
        next
    }
    /^```/ { block = 0; next }
    # what was left out cannot be compared; a table may still quote it
    block && skip { if (NF) quote($0); next }
    block && NF && !found($0) { print FILENAME ":" FNR ": " name " does not print: " $0; bad = 1 }
    !block && /^\|.*\|$/ && !/---/ && paper {
        cells = split($0, cell, "|"); line = cell[cells - 1]
        while (match(line, /[0-9]+\.[0-9]+(e[-+][0-9]+)?/)) {
            if (!(substr(line, RSTART, RLENGTH) in known)) {
                print FILENAME ":" FNR ": not quoted above: " line
                bad = 1
            }
            line = substr(line, RSTART + RLENGTH)
        }
    }
    /^\|.*paper.*\|/ { paper = 1 }
    END { exit bad }' "$1"
}

# bars NAME BLOCK LABEL VALUE EVERY TITLE: columns of a block (from 0) of a file as bars, each EVERYth row.
bars() {
    printf '\n%s\n' "$6"
    awk -v block="$2" -v label="$3" -v value="$4" -v every="$5" '
    function field(i) { return $0 ~ /^"/ ? (i == 1 ? quoted : part[i - 1]) : $i }
    NF == 0 { if (++empty % 2 == 0) at++; next }
    /^#/ || at != block || row++ % every { next }
    { if (split($0, q, "\"") > 2) { quoted = q[2]; split(q[3], part, " ") }
      name[++n] = field(label); size[n] = field(value) + 0; if (size[n] > most) most = size[n] }
    END { for (i = 1; i <= n; i++) {
        bar = ""; for (k = 0; k < 48 * size[i] / (most ? most : 1); k++) bar = bar "#"
        printf "%22s %12.4g %s\n", name[i], size[i], bar } }' "$out/$1.dat"
}

export build out
printf '%s\n' examples/[01][0-9]_*.c | xargs -P "${JOBS:-1}" -I '{}' sh -c '
    name=$(basename "$1" .c)
    "$build/examples/$name" --out "$out" >"$out/$name.txt" 2>&1
    echo $? >"$out/$name.status"' - '{}'
for program in examples/[01][0-9]_*.c; do
    name=$(basename "$program" .c)
    printf '\n==== %s: ' "$name"
    sed -n '1s/^[^-]*- //p' "$program"
    status=$(cat "$out/$name.status")
    cat "$out/$name.txt"
    check "$status" "$name: exit status $status"
done
# The exercises of the page end well, and say that they are exercises.
grep -o '`build/examples/[0-9][^`]* --[a-z]* [0-9.e-]*`' examples/README.md | tr -d '`' | sed "s,^build,$build," >"$out/exercises"
xargs -P "${JOBS:-1}" -I '{}' sh -c '{} >"$out/exercise.$$" 2>&1 && grep -q "^an exercise with" "$out/exercise.$$" &&
    rm "$out/exercise.$$" || echo "{}"' <"$out/exercises" >"$out/exercises.failed"
test -s "$out/exercises" && ! test -s "$out/exercises.failed"
check $? "exercises fail: $(cat "$out/exercises.failed")"
for page in examples/README.md README.md; do
    quotes $page
    check $? "$page: a number is not what the course prints"
done

if grep -q 'is not installed' "$out/07_cnn.txt"; then
    left_out="    pictures of clothes in 07_cnn; digits instead: dataset-fashion-mnist
"
fi
if command -v gnuplot >/dev/null; then
    for format in svg png; do
        gnuplot -e "data='$out'; out='$figures'; format='$format'" examples/figures.gp
        check $? "gnuplot cannot draw the figures as $format"
    done
    echo "The figures are in $figures."
else
    left_out="$left_out    figures as SVG and PNG; bars instead: gnuplot-nox
"
    bars 01_half_numbers 1 1 2 4 "Gap to the next number of fp16"
    bars 02_lost_updates 10 1 2 1 "Digits learnt at lr 3e-5, %"
    bars 03_vanishing_gradients 2 1 2 2 "Gradients of the autoencoder by exponent, %: fp16 flushes those under -24"
    bars 03_vanishing_gradients 4 1 3 1 "Autoencoder: loss times fp32's by log2 of the loss scale"
    bars 04_accumulation 0 1 2 1 "Error of an fp16 sum of k numbers"
    bars 05_loss_scaler 0 1 2 100 "log2 of the loss scale by step"
    bars 06_mlp 0 1 9 1 "Bytes of activations of an MLP"
    bars 07_cnn 2 1 2 10 "Loss of the CNN in fp16 by step"
    bars 08_own_model 0 1 5 1 "Test accuracy of the hand-written model by epoch, %"
    bars 09_what_if 6 1 2 3 "Loss with products of e4m3 and no loss scale by step"
    bars 09_what_if 4 1 2 3 "Loss with products of e4m3 and e5m2 and a loss scale by step"
    bars 10_gpu 0 1 2 1 "Samples/s"
    bars 11_own_loss 0 1 3 10 "Steps that the pole stands by iteration, O2 fp16"
    bars 12_own_layer 0 1 2 1 "Digits right with PReLU, %"
    bars 13_fine_tune 0 1 2 1 "Digits of another scanner right, 5 samples of each, %"
    bars 14_distill 0 1 3 1 "Digits right of an MLP with a teacher, %"
fi
if [ -n "$left_out" ]; then printf '\nLeft out, and the package of Debian that brings it:\n%s' "$left_out"; fi
echo "course: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
