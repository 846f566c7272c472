// runner.cpp - the one question to the driver that mpt_cuda.cuh asks, for the runner, which has no driver: is there a
// context on a device? It knows how many were created; so the answer is yes for all devices as soon as there is one.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <string.h>

static int context_state(int, unsigned *flags, int *active) {
    void *found = dlsym(RTLD_DEFAULT, "cudacpu_counter");
    unsigned long long (*counter)(const char *name);
    memcpy(&counter, &found, sizeof counter);
    *flags = 0;
    *active = counter("contexts_created") > 0;
    return 0;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **entry, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult *found) {
    int (*const state)(int, unsigned *, int *) = context_state;
    const bool known = strcmp(symbol, "cuDevicePrimaryCtxGetState") == 0;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    if (known) memcpy(entry, &state, sizeof state);
    return cudaSuccess;
}
