# awk -v net=digits -f numbers.awk README.md digits.csv...: is every number of README's table of that trainer what these
# runs gave? Bytes and loss scales are, to the digit. An accuracy depends on the order of the sums, which the processor's
# instruction set decides: it is within `within` points of README's, which must say so.
#   net=digits    a row for each model, policy and type, for seed 1; and the range of all seeds in the text behind it
#   net=fashion   a row for each model, a column for each policy and type: means, so a single run is held against them
function check(good, what) {
    if (good) { passed++; return }
    failed++
    print "numbers: " what
}
function bare(cell) {
    gsub(/[ ,%]/, "", cell)
    return cell
}
function near(points, want, what) {
    check(points - want <= within && want - points <= within, what ": README has " want " %, the run " points " %")
}
BEGIN { passed = failed = rows = 0 }

FNR == 1 { file++ }
file == 1 { text = text " " $0 }

# README: the tables are told apart by their header lines.
file == 1 && /^\| model \| policy /  { table = "digits"; next }
file == 1 && /^\| model \| O0 f32 / {
    table = "fashion"
    for (cells = split($0, head, /[ ]*\|[ ]*/); cells > 0; cells--) column[cells] = head[cells]
    next
}
file == 1 && !/^\|/ { table = "" }
file == 1 && table == net && !/^\|-/ {
    cells = split($0, cell, "|")
    model = tolower(bare(cell[2]))
    if (net == "digits") {
        key = model "," bare(cell[3]) "," bare(cell[4])
        accuracy[key] = bare(cell[5])
        exact[key] = bare(cell[6])
        for (i = 7; i <= 11; i++) exact[key] = exact[key] "," bare(cell[i])
        rows++
    } else {
        for (i = 3; i < cells; i++) {
            if (bare(cell[i]) == "") continue
            split(column[i], words, " ")
            accuracy[model "," words[1] "," words[2]] = bare(cell[i])
            rows++
        }
    }
    next
}

# CSV: model,policy,type,seed,epochs,accuracy,scale,skipped,weights,masters,gradients,moments,activations,speed
file > 1 && FNR > 1 {
    split($0, value, ",")
    key = value[1] "," value[2] "," value[3]
    points = 100 * value[6]
    if (net == "digits" && value[2] != "O3") {
        if (!(value[1] in low) || points < low[value[1]]) low[value[1]] = points
        if (!(value[1] in high) || points > high[value[1]]) high[value[1]] = points
    }
    if (!(key in accuracy) || (net == "digits" && value[4] != 1)) next
    seen[key] = 1
    near(points, accuracy[key], key)
    if (net == "fashion") next
    got = value[7]
    for (i = 9; i <= 13; i++) got = got "," value[i]
    check(got == exact[key], key ": README has scale and bytes " exact[key] ", the run " got)
}

END {
    check(rows > 0, "README has no table of " net)
    tolerance = "within " within " points"
    check(index(text, tolerance) > 0, "README does not say \"" tolerance "\"")
    if (net == "digits") {
        for (key in accuracy) check(key in seen, "no run of " key)
        check(match(text, /between [0-9.]+ and [0-9.]+ % \(MLP\) and between [0-9.]+ and [0-9.]+ % \(CNN\)/), "no range")
        split(substr(text, RSTART, RLENGTH), word, " ")
        near(low["mlp"], word[2], "lowest MLP")
        near(high["mlp"], word[4], "highest MLP")
        near(low["cnn"], word[9], "lowest CNN")
        near(high["cnn"], word[11], "highest CNN")
    }
    print "numbers: " passed " passed, " failed " failed"
    exit failed > 0
}
