// When the program starts, finds the functions of NVIDIA's driver that we call.
//
// candle links with libcuda.so.1, which is part of the driver. Without a driver, the loader would stop the daemon
// before `main`. The linker takes the definitions below first and then drops that library, because nothing else needs
// it. Each definition jumps to the function that dlopen finds. If dlopen fails, every function returns an error, and
// the daemon reports what is missing or computes on the CPU. `readelf -d` must not list libcuda, which `benches/gpu/run
// pack` checks.

#include <dlfcn.h>
#include <stdio.h>

#define FUNCTIONS(F)                                                                                                  \
    F(cuCtxDestroy_v2) F(cuCtxGetCurrent) F(cuCtxSetCurrent) F(cuCtxSynchronize) F(cuDeviceGet)                       \
    F(cuDeviceGetAttribute) F(cuDeviceGetMemPool) F(cuDevicePrimaryCtxRelease_v2) F(cuDevicePrimaryCtxRetain)         \
    F(cuDriverGetVersion) F(cuEventCreate) F(cuEventDestroy_v2) F(cuEventQuery) F(cuEventRecord)                      \
    F(cuEventSynchronize) F(cuFuncSetAttribute) F(cuGetErrorName) F(cuGetErrorString) F(cuGraphDestroy)               \
    F(cuGraphExecDestroy) F(cuGraphInstantiateWithFlags) F(cuGraphLaunch) F(cuInit) F(cuLaunchKernel)                 \
    F(cuMemAllocAsync) F(cuMemAlloc_v2) F(cuMemFreeAsync) F(cuMemFreeHost) F(cuMemFree_v2) F(cuMemGetInfo_v2)         \
    F(cuMemHostAlloc) F(cuMemPoolGetAttribute) F(cuMemPoolSetAttribute) F(cuMemPoolTrimTo) F(cuMemcpyDtoDAsync_v2)    \
    F(cuMemcpyDtoHAsync_v2) F(cuMemcpyHtoDAsync_v2) F(cuMemcpyPeerAsync) F(cuMemsetD8Async) F(cuModuleGetFunction)    \
    F(cuModuleLoad) F(cuModuleLoadData) F(cuModuleUnload) F(cuStreamBeginCapture_v2) F(cuStreamCreate)                \
    F(cuStreamDestroy_v2) F(cuStreamEndCapture) F(cuStreamIsCapturing) F(cuStreamSynchronize) F(cuStreamWaitEvent)

// Returns CUDA_ERROR_STUB_LIBRARY, as CUDA's own stub of the driver does.
static int missing(void) {
    return 34;
}

#if defined(__x86_64__)
#define JUMP(target) "jmp *" target "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(target) "adrp x16, " target "\nldr x16, [x16, :lo12:" target "]\nbr x16\n"
#else
#error "NVIDIA's driver exists only for x86-64 and AArch64"
#endif

#define DEFINE(name)                                                                                                  \
    __attribute__((visibility("hidden"), used)) void *moderatord_##name = (void *)missing;                            \
    __asm__(".pushsection .text\n.globl " #name "\n.type " #name ", %function\n" #name ":\n" JUMP("moderatord_" #name) \
            ".size " #name ", . - " #name "\n.popsection\n");

FUNCTIONS(DEFINE)

static char load_error[256];

// Returns why the driver could not be loaded, or null if it was.
const char *moderatord_no_driver(void) {
    return load_error[0] ? load_error : 0;
}

#define FIND(name)                                                                                                    \
    {                                                                                                                 \
        void *function = dlsym(driver, #name);                                                                        \
        if (function) moderatord_##name = function;                                                                   \
    }

__attribute__((constructor)) static void find_driver(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!driver) {
        const char *error = dlerror();
        snprintf(load_error, sizeof load_error, "%s", error ? error : "libcuda.so.1 cannot be opened");
        return;
    }
    FUNCTIONS(FIND)
}
