/* checkpoint.c - fuzzes the reader of safetensors files: one that is refused has a reason and changes nothing; one that
   is taken makes a model that can be saved.

   Bytes: 0 a file of weights, 1 a checkpoint, 2 the header of a file of weights, whose length and data are made up, 3
   changes of a good checkpoint, three bytes each: place, place, value; its sum is put right.
   Private names: that sum. */
#define main unit_main
#include "../unit/checkpoint.c"
#undef main
#include "fuzz.h"

/* As many bytes behind the header as the good file has, one more, or none. */
static void put_text(fuzz_bytes *b) {
    static const size_t data[] = {12, 13, 0};
    const size_t follow = data[fuzz_take(b, 3)];
    char *text = (char *)test_memory(b->left + 1);
    memcpy(text, b->at, b->left);
    put_header(text, strlen(text), follow);
    free(text);
}

static void put_changed(fuzz_bytes *b) {
    const slot *good = ram_find("kept");
    const size_t size = good->size, data = 8 + (size_t)mpt__get_bytes(good->bytes, 8);
    unsigned char *bytes;
    ram_put("net", good->bytes, size);
    bytes = ram_find("net")->bytes;
    while (b->left) {
        const size_t at = fuzz_take(b, 65536) % size;
        bytes[at] = (unsigned char)fuzz_take(b, 256);
    }
    mpt__put_bytes(bytes + size - 8, mpt__sum_bytes(0, bytes + data, size - data - 8), 8);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static mpt_context *ctx; /* one model for all inputs */
    static mpt_model *net;
    fuzz_bytes b = {data, size};
    const uint32_t kind = fuzz_take(&b, 4);
    mpt_result r;
    if (!net) {
        const mpt_train_desc train = training();
        ctx = test_open_threads(1);
        net = build(ctx, tiny, mpt_policy_preset(MPT_O2, MPT_F16), &train);
        CHECK_OK(ctx, save(net, "kept"));
    }
    if (kind == 2) put_text(&b);
    else if (kind == 3) put_changed(&b);
    else ram_put("net", b.at, b.left);
    r = kind % 2 ? load(net, "net") : load_weights(net, "net");
    CHECK(loaded(net, kind % 2, ram_find("net")->bytes, ram_find("net")->size) == r);
    if (r != MPT_OK) CHECK(*mpt_why(ctx) && as_kept(ctx, net));
    else {
        CHECK_OK(ctx, save(net, "net"));
        CHECK_OK(ctx, load(net, "kept"));
    }
    return fuzz_end();
}
