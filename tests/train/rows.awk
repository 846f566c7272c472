# awk -f rows.awk digits.csv: does every row but O3's reach what the digits allow (MLP 96 %, CNN 97 %), and stay within
# 1.5 points of fp32 with the same seed? With -v data=fashion: 88.5 %, 91.5 % and the ResNet's 92.5 %.
function check(good, what) {
    if (good) { passed++; return }
    failed++
    print "rows: " what
}
BEGIN {
    FS = ","
    passed = failed = 0
    if (data == "fashion") { goal["mlp"] = 0.885; goal["cnn"] = 0.915; goal["resnet"] = 0.925 }
    else { goal["mlp"] = 0.96; goal["cnn"] = 0.97 }
}
NR == 1 {
    check($0 == "model,policy,type,seed,epochs,test_accuracy,loss_scale,skipped_steps,weight_bytes,master_bytes," \
                "gradient_bytes,moment_bytes,activation_bytes,samples_per_s", "header: " $0)
    next
}
$2 == "O0" { fp32[$1 $4] = $6 }
{ check(NF == 14 && $1 in goal && $6 <= 1 && $14 > 0, "row: " $0) }
$2 != "O3" {
    check($6 >= goal[$1], "under " goal[$1] ": " $0)
    check($6 - fp32[$1 $4] <= 0.015 && fp32[$1 $4] - $6 <= 0.015, "not within 0.015 of fp32's " fp32[$1 $4] ": " $0)
}
END {
    check(NR > 1, "no rows")
    print "rows: " passed " passed, " failed " failed"
    exit failed > 0
}
