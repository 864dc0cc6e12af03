/* A CUDA device on a CPU, for tests: the few functions of libcuda.so.1 that foldfeed calls. Built as a shared
   library of that name, with scan_gpu.cu compiled by way of gpu_emulator.h, and put on the loader's path, so that
   foldfeed's own code runs unchanged, from the upload to the launch. It does not say what the device's compiler makes of the kernel;
   that is compiled besides and thrown away.

   A thread of a block is a fiber; it runs until it wants something of its warp (a shuffle) or its block (a barrier)
   and goes on when the others are there. That all lanes of a warp come to the same shuffle is checked, and, compiled
   with -fsanitize=address, that memory is touched within what was allocated. Blocks run one after the other. A
   device's address is a host's.

   FOLDFEED_EMULATED_SHARED is the shared memory of a block, FOLDFEED_EMULATED_MEMORY that of the device, in bytes;
   FOLDFEED_EMULATED_FAULT is the name of a function that fails. */

#include "gpu_emulator.h"

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <ucontext.h>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ENTER(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define ENTERED(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#define FORBID(from, size) ASAN_POISON_MEMORY_REGION(from, size)
#define ALLOW(from, size) ASAN_UNPOISON_MEMORY_REGION(from, size)
#else
#define ENTER(save, bottom, size) ((void)(save), (void)(bottom), (void)(size))
#define ENTERED(save, bottom, size) ((void)(save), (void)(bottom), (void)(size))
#define FORBID(from, size) (void)0
#define ALLOW(from, size) (void)0
#endif

enum { SHARED_MOST = 1 << 18, WARP = 32, STACK = 1 << 16 };
thread_local dim3 threadIdx, blockDim;
alignas(128) uint4 gains[SHARED_MOST / 16];

typedef void kernel(const uint8_t *, const long long *, const int *, int, const signed char *, const uint8_t *,
                    int, const uint2 *, uint2 *, uint32_t *, uint8_t *);

/* ---- threads of a block ---- */
struct fiber {
    ucontext_t begin;
    void *go_on[5];
    std::vector<char> stack;
    void *fake_stack = nullptr;
    int thread = 0;
    unsigned long shuffles = 0, barriers = 0;
    bool begun = false, done = false;
};
struct warp {
    uint32_t value[2][WARP];
    unsigned long number[2][WARP];
};
static std::vector<fiber> fibers;
static std::vector<warp> warps;
static fiber *running;
static void *scheduler[5];
static void *scheduler_stack;
static const void *scheduler_bottom;
static size_t scheduler_size;
static unsigned long arrived;
static kernel *launched;
static void **arguments;

[[noreturn]] static void fail(const char *what) {
    fprintf(stderr, "emulated device: %s\n", what);
    abort();
}

/* Not swapcontext: it asks the system for signals at every switch, and there are millions. */
[[noreturn]] __attribute__((noinline)) static void jump(void **to) { __builtin_longjmp(to, 1); }

__attribute__((noinline)) static void give_way() {
    fiber *self = running;
    ENTER(self->done ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
    if (!__builtin_setjmp(self->go_on)) jump(scheduler);
    self = running;
    ENTERED(self->fake_stack, &scheduler_bottom, &scheduler_size);
}

__attribute__((noinline)) static void resume() {
    ENTER(&scheduler_stack, running->stack.data(), STACK);
    if (!__builtin_setjmp(scheduler)) {
        if (running->begun) jump(running->go_on);
        running->begun = true;
        setcontext(&running->begin);
    }
    ENTERED(scheduler_stack, nullptr, nullptr);
}

static void start() {
    ENTERED(nullptr, &scheduler_bottom, &scheduler_size);
    void **a = arguments;
    launched(*(const uint8_t **)a[0], *(const long long **)a[1], *(const int **)a[2], *(int *)a[3],
             *(const signed char **)a[4], *(const uint8_t **)a[5], *(int *)a[6], *(const uint2 **)a[7],
             *(uint2 **)a[8], *(uint32_t **)a[9], *(uint8_t **)a[10]);
    running->done = true;
    give_way();
}

void __syncthreads() {
    unsigned long awaited = ++running->barriers * blockDim.x;
    arrived++;
    while (arrived < awaited) give_way();
}

/* Another lane's value. Every lane has written its own when this one goes on, because all are resumed in turn; they
   write the next one elsewhere. */
static uint32_t shuffled(unsigned mask, uint32_t value, int from) {
    unsigned long number = ++running->shuffles;
    warp &mine = warps[(size_t)running->thread / WARP];
    int lane = running->thread % WARP, half = number % 2;
    if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
    mine.value[half][lane] = value;
    mine.number[half][lane] = number;
    give_way();
    if (mine.number[half][from] != number) fail("a lane is not at the shuffle of another");
    return mine.value[half][from];
}

static int lane_of() { return running->thread % WARP; }
uint32_t __shfl_sync(unsigned mask, uint32_t value, int from) { return shuffled(mask, value, from % WARP); }
uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int apart) {
    return shuffled(mask, value, lane_of() ^ apart);
}
uint32_t __shfl_up_sync(unsigned mask, uint32_t value, int distance, int width) {
    return shuffled(mask, value, lane_of() % width < distance ? lane_of() : lane_of() - distance);
}

static void run_block(int threads) {
    fibers = std::vector<fiber>((size_t)threads);
    warps = std::vector<warp>((size_t)threads / WARP);
    memset(warps.data(), 0, warps.size() * sizeof(warp));
    arrived = 0;
    blockDim.x = (unsigned)threads;
    for (int thread = 0; thread < threads; thread++) {
        fiber &one = fibers[(size_t)thread];
        one.thread = thread;
        one.stack.resize(STACK);
        getcontext(&one.begin);
        one.begin.uc_stack.ss_sp = one.stack.data();
        one.begin.uc_stack.ss_size = STACK;
        makecontext(&one.begin, start, 0);
    }
    for (size_t left = fibers.size(); left;) {
        left = 0;
        for (fiber &one : fibers) {
            if (one.done) continue;
            running = &one;
            threadIdx.x = (unsigned)one.thread;
            resume();
            left += !one.done;
        }
    }
}

/* ---- the driver ---- */
enum { OK, INVALID_VALUE, OUT_OF_MEMORY, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };
static std::recursive_mutex lock;
static std::map<uint64_t, size_t> blocks;
static size_t used;

static size_t setting(const char *variable, size_t otherwise) {
    const char *text = getenv(variable);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}
static size_t memory() { return setting("FOLDFEED_EMULATED_MEMORY", 1u << 30); }
static size_t shared() { return setting("FOLDFEED_EMULATED_SHARED", 99 << 10); }
static int fault(const char *name) {
    const char *text = getenv("FOLDFEED_EMULATED_FAULT");
    return text && !strcmp(text, name) ? ILLEGAL_ADDRESS : OK;
}

#define CALL extern "C" __attribute__((visibility("default"))) int
CALL cuInit(unsigned) { return fault("cuInit"); }
CALL cuDriverGetVersion(int *version) { return *version = 13020, OK; }
CALL cuDeviceGetCount(int *count) { return *count = 1, OK; }
CALL cuDeviceGet(int *device, int number) { return *device = number, number == 0 ? OK : INVALID_VALUE; }
CALL cuDeviceGetName(char *name, int size, int) { return snprintf(name, (size_t)size, "emulated device"), OK; }
CALL cuDeviceGetAttribute(int *value, int attribute, int) {
    /* Multiprocessors, compute capability, the most shared memory of a block. */
    switch (attribute) {
        case 16: return *value = 2, OK;
        case 75: return *value = (int)setting("FOLDFEED_EMULATED_CAPABILITY", 9), OK;
        case 76: return *value = 0, OK;
        case 97: return *value = (int)shared(), OK;
        default: return INVALID_VALUE;
    }
}
CALL cuDevicePrimaryCtxRetain(void **context, int) { return *context = &lock, OK; }
CALL cuCtxPushCurrent_v2(void *) { return OK; }
CALL cuCtxPopCurrent_v2(void **context) { return *context = &lock, OK; }
CALL cuStreamCreate(void **stream, unsigned) { return *stream = &used, OK; }
CALL cuEventCreate(void **event, unsigned) { return *event = &blocks, OK; }
CALL cuEventRecord(void *, void *) { return OK; }
CALL cuEventSynchronize(void *) { return fault("cuEventSynchronize"); }
CALL cuMemGetInfo_v2(size_t *available, size_t *total) {
    return *total = memory(), *available = memory() - used, OK;
}
CALL cuMemAlloc_v2(uint64_t *at, size_t size) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!size) return INVALID_VALUE;
    if (used + size > memory()) return OUT_OF_MEMORY;
    *at = (uint64_t)malloc(size);
    memset((void *)*at, 0xa5, size);
    blocks[*at] = size;
    used += size;
    return OK;
}
CALL cuMemFree_v2(uint64_t at) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    auto found = blocks.find(at);
    if (found == blocks.end()) return INVALID_VALUE;
    used -= found->second;
    blocks.erase(found);
    free((void *)at);
    return OK;
}
CALL cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *) {
    return memcpy((void *)to, from, size), OK;
}
CALL cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *) {
    return memcpy(to, (void *)from, size), OK;
}
CALL cuMemsetD8Async(uint64_t at, unsigned char value, size_t size, void *) {
    return memset((void *)at, value, size), OK;
}
CALL cuModuleLoadData(void **module, const void *) { return *module = &blocks, fault("cuModuleLoadData"); }
CALL cuModuleGetFunction(void **function, void *, const char *name) {
    Dl_info self;
    dladdr((void *)&cuInit, &self);
    *function = dlsym(dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD), name);
    if (*function == nullptr) fprintf(stderr, "emulated device: built without %s\n", name);
    return *function ? OK : NOT_FOUND;
}
CALL cuFuncSetAttribute(void *, int attribute, int value) {
    return attribute == 8 && (size_t)value <= shared() ? OK : INVALID_VALUE;
}
CALL cuOccupancyMaxActiveBlocksPerMultiprocessor(int *number, void *, int, size_t) { return *number = 2, OK; }
CALL cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                    unsigned shared_bytes, void *, void **given, void **) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (!x || y != 1 || z != 1 || threads % WARP || shared_bytes > shared()) return INVALID_VALUE;
    launched = (kernel *)function;
    arguments = given;
    for (unsigned block = 0; block < x; block++) {
        ALLOW(gains, SHARED_MOST);
        memset(gains, 0xa5, SHARED_MOST);
        FORBID((char *)gains + shared_bytes, SHARED_MOST - shared_bytes);
        run_block((int)threads);
        ALLOW(gains, SHARED_MOST);
    }
    return fault("cuLaunchKernel");
}
CALL cuGetErrorName(int error, const char **text) {
    return *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_EMULATED", OK;
}
CALL cuGetErrorString(int, const char **text) { return *text = "the emulated device says so", OK; }

/* The compiler asks for something here, and does without. */
CALL cuGetExportTable(const void **table, const void *) { return *table = nullptr, NOT_FOUND; }

/* Newer names are asked for by the older ones and a version. */
CALL cuGetProcAddress_v2(const char *name, void **function, int, uint64_t, int *status) {
    Dl_info self;
    dladdr((void *)&cuInit, &self);
    void *library = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", name);
    *function = dlsym(library, newer);
    if (*function == nullptr) *function = dlsym(library, name);
    if (status != nullptr) *status = *function == nullptr;
    return *function ? OK : NOT_FOUND;
}
CALL cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
