#!/bin/sh
# The numbers of README's section "Numbers" against runs of the trainer: five seeds on the digits, all policies.
build=${BUILD:-build}
csv=$build/tests/numbers.csv
"$build/examples/train" --seeds 5 --csv "$csv" >"$csv.txt" 2>&1 || cat "$csv.txt"
awk -v net=digits -v within=1.2 -f tests/train/numbers.awk README.md "$csv"
