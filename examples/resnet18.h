/* resnet18.h - ResNet-18 (He et al. 2015) with the names that its layers have in torchvision, so that a state_dict of
   torchvision.models.resnet18(), saved as safetensors, loads by mpt_weights_load. Include it after mpt.h.

       int h = resnet18(net, mpt_input(net, 224, 224, 3), NULL);           logits of 1000 classes
       mpt_softmax_cross_entropy(net, h, NULL);

   With another number of classes the new head is not in the file: load partly (mpt_load_desc). */
#ifndef RESNET18_H
#define RESNET18_H

#include <stdio.h>

typedef struct resnet18_desc {
    int width;   /* filters of the stem; 0: 64 */
    int classes; /* 0: 1000 */
    int frozen;  /* 1..4: the stem and so many stages are frozen, with the statistics of their norms */
} resnet18_desc;

/* A convolution without bias and its batch norm. `place`: "layer1.0." and the like */
static inline int resnet18_conv_norm(mpt_model *net, int in, const char *place, const char *conv, const char *norm,
                                     int filters, int kernel, int stride, int frozen) {
    mpt_conv2d_desc c = MPT_ZERO;
    mpt_norm_desc n = MPT_ZERO;
    char names[2][32];
    snprintf(names[0], sizeof names[0], "%s%s", place, conv);
    snprintf(names[1], sizeof names[1], "%s%s", place, norm);
    c.name = names[0];
    n.name = names[1];
    c.stride = stride;
    c.padding = kernel / 2;
    c.no_bias = 1;
    c.tuning.frozen = n.tuning.frozen = frozen;
    return mpt_batch_norm(net, mpt_conv2d(net, in, filters, kernel, &c), &n);
}

/* Two convolutions beside a skip, which is a convolution, too, where the shape changes. */
static inline int resnet18_block(mpt_model *net, int in, int stage, int number, int filters, int frozen) {
    const int first = number == 0 && stage > 1, stride = first ? 2 : 1;
    char place[16];
    int h, skip = in;
    snprintf(place, sizeof place, "layer%d.%d.", stage, number);
    h = mpt_relu(net, resnet18_conv_norm(net, in, place, "conv1", "bn1", filters, 3, stride, frozen));
    h = resnet18_conv_norm(net, h, place, "conv2", "bn2", filters, 3, 1, frozen);
    if (first) skip = resnet18_conv_norm(net, in, place, "downsample.0", "downsample.1", filters, 1, 2, frozen);
    return mpt_relu(net, mpt_add(net, h, skip));
}

/* Returns the logits; desc may be NULL. */
static inline int resnet18(mpt_model *net, int input, const resnet18_desc *desc) {
    const int width = desc && desc->width ? desc->width : 64, classes = desc && desc->classes ? desc->classes : 1000;
    const int frozen = desc ? desc->frozen : 0;
    mpt_pool2d_desc pool = MPT_ZERO;
    mpt_linear_desc fc = MPT_ZERO;
    int h = resnet18_conv_norm(net, input, "", "conv1", "bn1", width, 7, 2, frozen > 0), stage, number;
    pool.stride = 2;
    pool.padding = 1;
    h = mpt_max_pool2d(net, mpt_relu(net, h), 3, &pool);
    for (stage = 1; stage <= 4; stage++)
        for (number = 0; number < 2; number++)
            h = resnet18_block(net, h, stage, number, width << (stage - 1), stage <= frozen);
    fc.name = "fc";
    return mpt_linear(net, mpt_global_avg_pool2d(net, h), classes, &fc);
}

#endif
