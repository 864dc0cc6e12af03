/* What CUDA C has and C++ has not, so that scan_gpu.cu compiles for a CPU; gpu_emulator.cpp runs it. */

#define FOLDFEED_EMULATED
#include <cstdint>
#include <cstring>

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
};
extern thread_local dim3 threadIdx, blockDim;
/* Shared memory of the block that runs. */
extern uint4 gains[];

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(threads)

void __syncthreads();
uint32_t __shfl_sync(unsigned mask, uint32_t value, int from);
uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int apart);
uint32_t __shfl_up_sync(unsigned mask, uint32_t value, int distance, int width);

static inline uint32_t atomicAdd(uint32_t *at, uint32_t number) {
    uint32_t before = *at;
    *at += number;
    return before;
}

static inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

/* ---- the operations that scan_gpu.cu writes in the device's assembler ---- */
static inline _Float16 half(uint32_t of) {
    uint16_t low = (uint16_t)of;
    _Float16 out;
    memcpy(&out, &low, 2);
    return out;
}

static inline uint32_t bits(_Float16 half) {
    uint16_t out;
    memcpy(&out, &half, 2);
    return out;
}

static inline _Float16 more(_Float16 a, _Float16 b) { return a > b ? a : b; }

static inline uint32_t step(uint32_t cells, uint32_t by) {
    const _Float16 zero = 0;
    return bits(more(half(cells) + half(by), zero)) | bits(more(half(cells >> 16) + half(by >> 16), zero)) << 16;
}

static inline uint32_t larger(uint32_t a, uint32_t b) {
    return bits(more(half(a), half(b))) | bits(more(half(a >> 16), half(b >> 16))) << 16;
}

static inline uint32_t half_of(int x) { return bits((_Float16)x); }
static inline uint32_t whole_of(uint32_t x) { return (uint32_t)(float)half(x); }
