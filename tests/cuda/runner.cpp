// runner.cpp - what the runner lacks. It has no driver, of which mpt_cuda.cuh asks one thing: is there a context on a
// device? It knows how many were created; so the answer is yes for all devices as soon as there is one. And its
// cuBLASLt fills the device with every product; with MPT_TEST_WAVES=1 those that have column sums as their epilogue
// fill little.
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdlib.h>
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

extern "C" cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                                         cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                         cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                         cublasLtMatmulPreference_t preference, int wanted,
                                                         cublasLtMatmulHeuristicResult_t *results, int *count) {
    void *found = dlsym(RTLD_NEXT, "cublasLtMatmulAlgoGetHeuristic");
    decltype(&cublasLtMatmulAlgoGetHeuristic) next;
    int32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    memcpy(&next, &found, sizeof next);
    const cublasStatus_t status = next(handle, desc, a, b, c, d, preference, wanted, results, count);
    cublasLtMatmulDescGetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue, NULL);
    if (getenv("MPT_TEST_WAVES") && epilogue == CUBLASLT_EPILOGUE_BGRADB)
        for (int i = 0; i < *count; i++) results[i].wavesCount = 0.25f;
    return status;
}
