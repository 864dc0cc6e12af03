/* The fast scan's kernel for CUDA devices: HMMER's SSV scores of one stretch of a query against all targets.

   What is computed, and why it may be computed this way, is in scan.py; the scores are those of scan.c. Compiled
   where it runs (scan_gpu.py), once for every GROUP and STRIP that the queries ask for; needs compute capability
   8.0. Tests compile the same text with tests/gpu_emulator.h for a CPU.

   GROUP lanes of a warp take one target, residue after residue; each lane holds STRIP neighbouring positions of the
   query. A cell depends on the one before it on its diagonal alone, so all positions of a residue are computed at
   the same time, and only a lane's last cell moves, to the lane on its right.

   Cells are half-precision floats, two to a register, which every device since 8.0 adds, clamps at 0 and compares
   in one instruction each; integers of 8 bits take several. Small integers are exact in them. What saturates at
   255 in bytes goes on here, but the best of a target is looked at as "255 or more" in both: below 255 no cell
   before it was cut, from 255 on the byte's best is 255. (Halves are whole numbers up to 2,048; a step is at most
   128, so a diagonal that gets to 255 is seen there before it is rounded. They never are NaN: what is added is
   finite.)

   What limits the speed is reading a gain of 16 bits for every cell from shared memory, 64 cells a clock and
   multiprocessor; so the table of gains lies such that eight lanes read all banks once. */

#define ALL 0xffffffffu
#define NUM_ROWS 32           /* codes of residues; PAD is the last */
#define WORDS (STRIP / 2)     /* registers of cells in a lane: word j holds positions j and WORDS + j of its strip */
#define QUADS (WORDS / 4)     /* reads of 16 bytes that bring their gains */
#define POSITIONS (GROUP * STRIP)
#define PADS 0x1f1f1f1fu
#define HALF_255 0x5bf8u      /* 255.0; halves of 0 and more are ordered as their bits are */
#define HALF_NEVER 0xe800u    /* -2048.0: clears every cell */

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;

#ifndef FOLDFEED_EMULATED
/* max(cell + gain, 0) of both halves. */
static __device__ __forceinline__ uint32 step(uint32 cells, uint32 gains) {
    uint32 out;
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(cells), "r"(0x3c003c00u), "r"(gains));
    return out;
}

static __device__ __forceinline__ uint32 larger(uint32 a, uint32 b) {
    uint32 out;
    asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

static __device__ __forceinline__ uint32 half_of(int x) {
    uint16 out;
    asm("cvt.rn.f16.s32 %0, %1;" : "=h"(out) : "r"(x));
    return out;
}

static __device__ __forceinline__ uint32 whole_of(uint32 half) {
    uint32 out;
    asm("cvt.rzi.u32.f16 %0, %1;" : "=r"(out) : "h"((uint16)half));
    return out;
}
#endif

/* Gains of every code at every position, as halves: gains[code][quad][lane] is four words of that lane. */
static __device__ void fill(uint32 *gains, const signed char *table, const uint8 *query, int length) {
    for (int i = threadIdx.x; i < NUM_ROWS * GROUP * WORDS; i += blockDim.x) {
        int word = i % 4, lane = i / 4 % GROUP, quad = i / 4 / GROUP % QUADS, code = i / 4 / GROUP / QUADS;
        int low = lane * STRIP + quad * 4 + word, high = low + WORDS;
        uint32 of_low = HALF_NEVER, of_high = HALF_NEVER;
        if (low < length && code < NUM_ROWS - 1) of_low = half_of(-table[query[low] * NUM_ROWS + code]);
        if (high < length && code < NUM_ROWS - 1) of_high = half_of(-table[query[high] * NUM_ROWS + code]);
        gains[i] = of_low | of_high << 16;
    }
}

/* Best cell of every target: best[target] = 0 to 255.

   codes     of all targets, one after the other, each from a multiple of 4 on and followed by PAD to the next
   offsets   where they start; rows: their residues, PAD included (ascending, so that targets of a warp end together)
   table     cost of every code at every letter; query: letters of this stretch, `length` of them
   before    NULL in a query's first stretch; else halves, for every residue the cell at the position before this
             stretch, at the place of its code; such a stretch raises `best` instead of setting it
   after     NULL in a query's last stretch; else where these go for the next one (then length is POSITIONS)
   next      counts the targets that were taken; 0 at the start */
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(const uint8 *codes, const long long *offsets, const int *rows, int num_targets,
        const signed char *table, const uint8 *query, int length, const uint2 *before, uint2 *after, uint32 *next,
        uint8 *best) {
    extern __shared__ uint4 gains[];
    fill((uint32 *)gains, table, query, length);
    __syncthreads();
    const int lane = threadIdx.x % GROUP, in_warp = threadIdx.x % 32;
    for (;;) {
        uint32 first = 0;
        if (in_warp == 0) first = atomicAdd(next, 32 / GROUP);
        first = __shfl_sync(ALL, first, 0);
        if (first >= (uint32)num_targets) return;
        /* The longest first, so that the last to end are short. */
        const int target = num_targets - 1 - (int)first - in_warp / GROUP;
        const int words = target < 0 ? 0 : rows[target] / 4;
        int most = words;
        for (int apart = 16; apart >= GROUP; apart /= 2) {
            int other = __shfl_xor_sync(ALL, most, apart);
            most = other > most ? other : most;
        }
        const long long offset = target < 0 ? 0 : offsets[target];
        const uint32 *text = (const uint32 *)(codes + offset);
        uint32 cells[WORDS], highest[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < WORDS; j++) cells[j] = 0;
        uint32 ahead = words > 0 ? text[0] : PADS;
#ifdef STRETCHES
        const uint2 *enter = before + offset / 4;
        uint2 *leave = after + offset / 4;
        uint32 earlier = 0;
#endif
        for (int w = 0; w < most; w++) {
            const uint32 now = ahead;
            ahead = w + 1 < words ? text[w + 1] : PADS;
#ifdef STRETCHES
            uint2 entering = {0, 0};
            uint32 leaving[4];
            if (before && w < words) entering = enter[w];
            /* In the upper halves, as they come from a lane on the left. */
            const uint32 entered[4] = {earlier, entering.x << 16, entering.x, entering.y << 16};
            earlier = entering.y;
#endif
#pragma unroll
            for (int byte = 0; byte < 4; byte++) {
                const uint4 *row = gains + (now >> 8 * byte & (NUM_ROWS - 1)) * (GROUP * QUADS) + lane;
                const uint32 last = cells[WORDS - 1];
                uint32 left = __shfl_up_sync(ALL, last, 1, GROUP);
#ifdef STRETCHES
                if (lane == 0) left = entered[byte];
#else
                if (lane == 0) left = 0;
#endif
                /* What enters the strip is the left one's last, what enters its upper half our own middle. */
                const uint32 above = __byte_perm(left, last, 0x5432);
#pragma unroll
                for (int quad = QUADS - 1; quad >= 0; quad--) {
                    const uint4 gain = row[quad * GROUP];
                    uint32 *cell = cells + 4 * quad;
                    cell[3] = step(cell[2], gain.w);
                    cell[2] = step(cell[1], gain.z);
                    cell[1] = step(cell[0], gain.y);
                    cell[0] = step(quad ? cells[4 * quad - (quad > 0)] : above, gain.x);
#pragma unroll
                    for (int i = 0; i < 4; i++) highest[i] = larger(highest[i], cell[i]);
                }
#ifdef STRETCHES
                leaving[byte] = cells[WORDS - 1] >> 16;
#endif
            }
#ifdef STRETCHES
            if (after && lane == GROUP - 1 && w < words) {
                leave[w] = uint2{leaving[0] | leaving[1] << 16, leaving[2] | leaving[3] << 16};
            }
#endif
        }
        uint32 top = larger(larger(highest[0], highest[1]), larger(highest[2], highest[3]));
        top = larger(top, top >> 16);
        for (int apart = GROUP / 2; apart > 0; apart /= 2) top = larger(top, __shfl_xor_sync(ALL, top, apart));
        if (lane == 0 && target >= 0) {
            top &= 0xffffu;
            uint32 found = whole_of(top < HALF_255 ? top : HALF_255);
#ifdef STRETCHES
            if (before && best[target] > found) found = best[target];
#endif
            best[target] = (uint8)found;
        }
    }
}
