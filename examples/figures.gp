# Draws the figures of the course from the files that its programs wrote:
#     gnuplot -e "data='build/course'; out='build/figures'; format='svg'" examples/figures.gp     (svg or png)
# Lines differ in dash and darkness, so that they can be told apart in grey.
if (format eq 'svg') { set terminal svg size 760,440 font 'Helvetica,13' background rgb 'white' }
else { set terminal pngcairo size 760,440 font 'Helvetica,11' }
file(name) = data.'/'.name.'.dat'
picture(name) = out.'/'.name.'.'.format
set linetype 1 lc rgb '#000000' lw 2 dt 1 pt 7
set linetype 2 lc rgb '#c0392b' lw 2 dt 2 pt 5
set linetype 3 lc rgb '#2471a3' lw 2 dt 4 pt 9
set linetype 4 lc rgb '#e59866' lw 2 dt 1 pt 13
set linetype 5 lc rgb '#7d8a8f' lw 2 dt 3 pt 11
set linetype 6 lc rgb '#7fb3d5' lw 2 dt 5 pt 4
set grid lc rgb '#dddddd' lt 1 lw 1
set border 3
set tics nomirror
set key outside right samplen 3

set output picture('01_half_numbers')
set title 'Gap from a number to the next'
set xlabel 'number'; set ylabel 'gap'
set logscale xy 2
set format '2^{%L}'
set xtics 2**5; set ytics 2**8
plot [2**-31:2**21] for [i=0:4] file('01_half_numbers') index i with steps lt i+1 \
    title word('fp32 fp16 bf16 e5m2 e4m3', i+1)
unset logscale; set format; set xtics auto; set ytics auto


set output picture('02_lost_updates')
set title 'A weight of 1 that is to grow by 2^{-11} a step'
set xlabel 'step'; set ylabel 'weight that the products read'
ways = file('02_lost_updates')
plot [0:1024][0.98:1.52] ways index 3 with steps lt 1 title 'fp16 + fp32 masters', \
    ways index 7 with steps lt 3 title 'bf16 + split', \
    ways index 8 with steps lt 5 title 'fp16, stochastic', ways index 9 with steps lt 4 title 'bf16, stochastic', \
    ways index 1 with lines lt 2 lw 3 title 'fp16 or bf16 alone'

set output picture('03_vanishing_gradients')
set title 'Gradients of activations in fp32, by size'
set xlabel 'binary exponent of the gradient'; set ylabel '% of those that are not 0'
set arrow 1 from -24, graph 0 to -24, graph 1 nohead lt 1 dt 2
set arrow 2 from -14, graph 0 to -14, graph 1 nohead lt 5
set label 1 ' 0 in fp16' at -25, graph 0.95 right
set label 2 'subnormal' at -19, graph 0.95 center
set label 3 ' normal in fp16' at -14, graph 0.95
hist = file('03_vanishing_gradients')
plot [-45:4] hist index 2 with steps lt 1 title 'autoencoder', \
    hist index 2 using ($1+16):2 with steps lt 1 dt 2 title 'times 2^{16}', \
    hist index 0 with steps lt 2 dt 1 title 'MLP', hist index 0 using ($1+16):2 with steps lt 2 title 'times 2^{16}'
unset arrow; unset label

set output picture('03_loss_scale')
set title 'Training in fp16 with a fixed loss scale'
set xlabel 'log_2 of the loss scale'; set ylabel 'loss at the end, times that of fp32'
set logscale y; set yrange [0.8:40]
plot 1 with lines lt 5 title 'fp32', hist index 4 using 1:2 with linespoints lt 2 title 'MLP', \
    hist index 4 using 1:3 with linespoints lt 1 title 'autoencoder'
set yrange [*:*]

set output picture('04_accumulation')
set title 'Error of a dot product of k fp16 numbers from 0 to 1'
set xlabel 'k'; set ylabel 'error relative to the sum'
set logscale x 2; set logscale y 10
set format x '2^{%L}'; set format y '10^{%L}'
dots = file('04_accumulation')
plot dots index 0 using 1:3 with linespoints lt 4 title 'sum in bf16', dots index 0 using 1:2 with linespoints lt 2 \
    title 'sum in fp16', dots index 0 using 1:4 with linespoints lt 3 title 'fp16, by 32', \
    dots index 1 using 1:2 with linespoints lt 5 title 'fp16, both signs', \
    dots index 0 using 1:5 with linespoints lt 6 title 'sum in fp32', \
    dots index 0 using 1:6 with linespoints lt 1 title 'mpt\_gemm'
unset logscale; set format

set output picture('05_loss_scaler')
set title 'The loss scale finds its place'
set xlabel 'step'; set ylabel 'log_2 of the loss scale'; set y2label 'loss'
set ytics nomirror; set y2tics; set border 11; set yrange [19:29]
trace = file('05_loss_scaler')
plot trace using 1:3 axes x1y2 with lines lt 5 dt 1 lw 1 title 'loss', trace using 1:2 with steps lt 1 title 'scale', \
    trace using 1:($4 == 1 ? $2 : NaN) with points lt 2 title 'skipped'
unset y2tics; unset y2label; set border 3; set yrange [*:*]

set output picture('06_mlp')
set title 'MLP with Adam: bytes by role'
unset xlabel; set ylabel 'KiB'; set style data histograms; set style histogram rowstacked
set style fill pattern border -1; set boxwidth 0.6; set yrange [0:*]
mlp = file('06_mlp')
plot mlp using ($9/1024):xtic(1) lt 1 dt 1 title 'activations', '' using ($8/1024) lt 3 dt 1 title 'moments', \
    '' using ($7/1024) lt 4 title 'gradients', '' using ($6/1024) lt 2 dt 1 title 'masters', \
    '' using ($5/1024) lt 5 dt 1 title 'weights'
set yrange [*:*]

set output picture('07_cnn')
set title 'A CNN learns the same in 16 bits'
set xlabel 'step'; set ylabel 'loss, mean of 10 steps'; set style data lines
cnn = file('07_cnn')
plot cnn index 0 lt 1 title 'O0 fp32', cnn index 1 lt 2 title 'O2 bf16', cnn index 2 lt 3 title 'O2 fp16', \
    cnn index 3 lt 4 title 'O3 bf16'

set output picture('08_own_model')
set title 'A model of your own: softmax regression in fp16'
set xlabel 'epoch'; set ylabel 'test accuracy, %'; set y2label 'loss'; set y2tics; set border 11
own = file('08_own_model')
plot own using 1:5 with linespoints lt 1 title 'accuracy', own using 1:2 axes x1y2 with linespoints lt 2 title 'loss'
unset y2tics; unset y2label; set border 3

set output picture('09_what_if')
set title 'An autoencoder whose products are rounded'
set xlabel 'step'; set ylabel 'loss, mean of 10 steps'; set logscale y 2
what = file('09_what_if')
plot what index 6 lt 2 title 'e4m3, S = 1', what index 13 lt 5 title 'sums in e5m2', what index 7 lt 4 title 'e5m2', \
    what index 4 lt 3 title 'e4m3, back e5m2', what index 0 lt 1 title 'fp32, TF32, bf16, fp16'
unset logscale

set output picture('10_gpu')
set title 'Speed by device'
unset xlabel; set ylabel 'samples/s'; set style data histograms; set style histogram clustered; set yrange [0:*]
unset key
plot file('10_gpu') using 2:xtic(1) lt 5 dt 1

set output picture('11_own_loss')
set title 'A pole on a cart: REINFORCE, mean of 5 seeds'
set xlabel 'iteration of 16 games'; set ylabel 'steps a game'; set style data lines; set key
plot file('11_own_loss') using 1:2 lt 1 title 'fp32', file('11_own_loss') using 1:3 lt 2 title 'O2 fp16'

set output picture('12_own_layer')
set title 'A CNN with PReLU on the digits'
unset xlabel; set ylabel 'test digits right, %'; set style data histograms; set yrange [0:100]; unset key
plot file('12_own_layer') using 2:xtic(1) lt 5 dt 1

set output picture('13_fine_tune')
set title 'Digits of another scanner, 5 samples of each'
plot file('13_fine_tune') using 2:xtic(1) lt 5 dt 1

set output picture('14_distill')
set title 'A small MLP with 100 labels, and with a teacher'; set key
plot file('14_distill') using 2:xtic(1) lt 5 dt 1 title '100 labels', '' using 3 lt 1 title 'and the teacher'
