/* nets.h - the nets that counters.c counts, bench_cuda.c and probe.cu time, on images of side x side x channels.
   peers_cuda.py has the same in PyTorch. */
#ifndef MPT_TEST_NETS_H
#define MPT_TEST_NETS_H

enum { NET_CLASSES = 10 };

typedef void (*net_layers)(mpt_model *net, int side, int channels);

static void net_classifier(mpt_model *net, int h) {
    mpt_softmax_cross_entropy(net, mpt_linear(net, h, NET_CLASSES, NULL), NULL);
}

/* Layers of the same width, each with a ReLU */
static void net_perceptron(mpt_model *net, int side, int channels, int layers, int width) {
    int h = mpt_input(net, side, side, channels), i;
    for (i = 0; i < layers; i++) h = mpt_relu(net, mpt_linear(net, h, width, NULL));
    net_classifier(net, h);
}

static void net_mlp(mpt_model *net, int side, int channels) { net_perceptron(net, side, channels, 2, 512); }

static void net_lenet(mpt_model *net, int side, int channels) {
    mpt_conv2d_desc same = MPT_ZERO;
    int h = mpt_input(net, side, side, channels);
    same.same = 1;
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 6, 5, &same)), 2, NULL);
    h = mpt_max_pool2d(net, mpt_relu(net, mpt_conv2d(net, h, 16, 5, &same)), 2, NULL);
    h = mpt_relu(net, mpt_linear(net, h, 120, NULL));
    h = mpt_relu(net, mpt_linear(net, h, 84, NULL));
    net_classifier(net, h);
}

/* Two 3x3 convolutions beside a skip, which a stride turns into a 1x1 convolution (He et al. 2015, figure 2) */
static int net_block(mpt_model *net, int in, int filters, int stride) {
    mpt_conv2d_desc first = MPT_ZERO, plain = MPT_ZERO;
    int h, skip = in;
    first.stride = stride;
    first.no_bias = plain.no_bias = 1;
    first.padding = plain.padding = 1;
    h = mpt_relu(net, mpt_batch_norm(net, mpt_conv2d(net, in, filters, 3, &first), NULL));
    h = mpt_batch_norm(net, mpt_conv2d(net, h, filters, 3, &plain), NULL);
    first.padding = 0;
    if (stride > 1) skip = mpt_batch_norm(net, mpt_conv2d(net, in, filters, 1, &first), NULL);
    return mpt_relu(net, mpt_add(net, h, skip));
}

/* Stages of `blocks` blocks, each of twice the filters of the one before */
static void net_residual(mpt_model *net, int side, int channels, int filters, int stages, int blocks) {
    mpt_conv2d_desc plain = MPT_ZERO;
    int h, i;
    plain.no_bias = 1;
    plain.padding = 1;
    h = mpt_conv2d(net, mpt_input(net, side, side, channels), filters, 3, &plain);
    h = mpt_relu(net, mpt_batch_norm(net, h, NULL));
    for (i = 0; i < stages * blocks; i++) h = net_block(net, h, filters << i / blocks, i && i % blocks == 0 ? 2 : 1);
    net_classifier(net, mpt_global_avg_pool2d(net, h));
}

static void net_resnet(mpt_model *net, int side, int channels) { net_residual(net, side, channels, 16, 3, 1); }

#endif
