/* Kernels of the fast scan: FASTA text to residue codes, and HMMER's 8-bit filter scores of many targets.

   What is computed and why it may be computed this way is in scan.py. Exported with a plain C interface and
   called through ctypes, which gives up the interpreter's lock; the module object is empty. Functions that can
   fail return a negative number. Every pointer is to memory of the caller, who keeps the sizes that kernels.py
   states. */

/* Without Python for a test on another processor (tests/kernels_agree.c). */
#ifndef FOLDFEED_WITHOUT_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define TILE 16        /* blocks have a multiple of so many rows; a kernel takes them ROWS at a time */
#define MAX_LETTERS 32 /* different columns among the profiles of a batch */
#define PAD 31         /* code after the end of a sequence; costs most in every table */
#define MAX_LANES 64
#define UNROLL _Pragma("GCC unroll 16")
#define ALIGNED __attribute__((aligned(64)))
#define EXPORT __attribute__((visibility("default")))

typedef struct {
    uint8_t base, bias, tec;
} msv_constants;

/* ---- plain C: any machine; the reference of the others ---- */
typedef struct {
    uint8_t lane[16];
} vec_plain;
typedef struct {
    uint8_t cost[32];
} table_plain;

static inline vec_plain plain_load(const void *from) {
    vec_plain v;
    memcpy(&v, from, sizeof v);
    return v;
}

#define PLAIN_OPERATION(name, expression)                               \
    static inline vec_plain plain_##name(vec_plain a, vec_plain b) {    \
        vec_plain v;                                                    \
        for (int i = 0; i < 16; i++) {                                  \
            int x = a.lane[i], y = b.lane[i];                           \
            int sx = (int8_t)x, sy = (int8_t)y;                         \
            (void)sx, (void)sy;                                         \
            v.lane[i] = (uint8_t)(expression);                          \
        }                                                               \
        return v;                                                       \
    }
PLAIN_OPERATION(subs_i8, sx - sy < -128 ? -128 : sx - sy > 127 ? 127 : sx - sy)
PLAIN_OPERATION(max_i8, sx > sy ? sx : sy)
PLAIN_OPERATION(adds_u8, x + y > 255 ? 255 : x + y)
PLAIN_OPERATION(subs_u8, x > y ? x - y : 0)
PLAIN_OPERATION(max_u8, x > y ? x : y)

static inline vec_plain plain_splat(uint8_t x) {
    vec_plain v;
    memset(&v, x, sizeof v);
    return v;
}

static inline void plain_store(void *to, vec_plain v) { memcpy(to, &v, sizeof v); }

static inline table_plain plain_table(const uint8_t *from) {
    table_plain t;
    memcpy(&t, from, sizeof t);
    return t;
}

static inline vec_plain plain_look_up(table_plain t, const uint8_t *index) {
    vec_plain v;
    for (int i = 0; i < 16; i++) v.lane[i] = t.cost[index[i] & 31];
    return v;
}

#define NAME(x) plain_##x
#define TARGET
#define LANES 16
#define ROWS 8
#define VEC vec_plain
#define TABLE32 table_plain
#define LOAD(p) plain_load(p)
#define STORE(p, v) plain_store(p, v)
#define SPLAT(x) plain_splat(x)
#define SUBS_I8 plain_subs_i8
#define MAX_I8 plain_max_i8
#define ADDS_U8 plain_adds_u8
#define SUBS_U8 plain_subs_u8
#define MAX_U8 plain_max_u8
#define PREPARE(index, codes) memcpy(index, codes, 16)
#define LOAD_TABLE(p) plain_table(p)
#define LOOK_UP(t, index) plain_look_up(t, index)
#include "scan_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

/* A byte shuffle looks up 16 entries and gives 0 for an index with its top bit set: codes below 16 go to the
   first half of a table as code + 0x70, the others to the second half as code - 16. */
#define HALVES_PREPARE(ADD, index, codes)                      \
    do {                                                       \
        STORE(index, ADD(LOAD(codes), SPLAT(0x70)));           \
        STORE((index) + LANES, ADD(LOAD(codes), SPLAT(0xf0))); \
    } while (0)

#define PAIR(width, type)  \
    typedef struct {       \
        type low, high;    \
    } table_##width;
PAIR(128, __m128i)
PAIR(256, __m256i)
PAIR(512, __m512i)

/* ---- SSE4.1 ---- */
#define NAME(x) sse41_##x
#define TARGET __attribute__((target("sse4.1")))
#define LANES 16
#define ROWS 8
#define VEC __m128i
#define TABLE32 table_128
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define SPLAT(x) _mm_set1_epi8((char)(x))
#define SUBS_I8 _mm_subs_epi8
#define MAX_I8 _mm_max_epi8
#define ADDS_U8 _mm_adds_epu8
#define SUBS_U8 _mm_subs_epu8
#define MAX_U8 _mm_max_epu8
#define PREPARE(index, codes) HALVES_PREPARE(_mm_add_epi8, index, codes)
#define LOAD_TABLE(p) {LOAD(p), LOAD((p) + 16)}
#define LOOK_UP(t, index) \
    _mm_or_si128(_mm_shuffle_epi8(t.low, LOAD(index)), _mm_shuffle_epi8(t.high, LOAD((index) + LANES)))
#include "scan_kernel.h"

/* ---- AVX2 ---- */
#define HALF(p) _mm_loadu_si128((const __m128i *)(p))
#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2")))
#define LANES 32
#define ROWS 8
#define VEC __m256i
#define TABLE32 table_256
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define SPLAT(x) _mm256_set1_epi8((char)(x))
#define SUBS_I8 _mm256_subs_epi8
#define MAX_I8 _mm256_max_epi8
#define ADDS_U8 _mm256_adds_epu8
#define SUBS_U8 _mm256_subs_epu8
#define MAX_U8 _mm256_max_epu8
#define PREPARE(index, codes) HALVES_PREPARE(_mm256_add_epi8, index, codes)
#define LOAD_TABLE(p) {_mm256_broadcastsi128_si256(HALF(p)), _mm256_broadcastsi128_si256(HALF((p) + 16))}
#define LOOK_UP(t, index)                                    \
    _mm256_or_si256(_mm256_shuffle_epi8(t.low, LOAD(index)), \
                    _mm256_shuffle_epi8(t.high, LOAD((index) + LANES)))
#include "scan_kernel.h"

/* ---- AVX-512 with byte operations ---- */
#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx512f,avx512bw")))
#define LANES 64
#define ROWS 16
#define VEC __m512i
#define TABLE32 table_512
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define STORE(p, v) _mm512_storeu_si512((void *)(p), v)
#define SPLAT(x) _mm512_set1_epi8((char)(x))
#define SUBS_I8 _mm512_subs_epi8
#define MAX_I8 _mm512_max_epi8
#define ADDS_U8 _mm512_adds_epu8
#define SUBS_U8 _mm512_subs_epu8
#define MAX_U8 _mm512_max_epu8
#define PREPARE(index, codes) HALVES_PREPARE(_mm512_add_epi8, index, codes)
#define LOAD_TABLE(p) {_mm512_broadcast_i32x4(HALF(p)), _mm512_broadcast_i32x4(HALF((p) + 16))}
#define LOOK_UP(t, index)                                    \
    _mm512_or_si512(_mm512_shuffle_epi8(t.low, LOAD(index)), \
                    _mm512_shuffle_epi8(t.high, LOAD((index) + LANES)))
#include "scan_kernel.h"
#endif

#if defined(__aarch64__)
#include <arm_neon.h>

static inline uint8x16_t neon_subs_i8(uint8x16_t a, uint8x16_t b) {
    return vreinterpretq_u8_s8(vqsubq_s8(vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b)));
}

static inline uint8x16_t neon_max_i8(uint8x16_t a, uint8x16_t b) {
    return vreinterpretq_u8_s8(vmaxq_s8(vreinterpretq_s8_u8(a), vreinterpretq_s8_u8(b)));
}

#define NAME(x) neon_##x
#define TARGET
#define LANES 16
#define ROWS 8
#define VEC uint8x16_t
#define TABLE32 uint8x16x2_t
#define LOAD(p) vld1q_u8(p)
#define STORE(p, v) vst1q_u8(p, v)
#define SPLAT(x) vdupq_n_u8(x)
#define SUBS_I8 neon_subs_i8
#define MAX_I8 neon_max_i8
#define ADDS_U8 vqaddq_u8
#define SUBS_U8 vqsubq_u8
#define MAX_U8 vmaxq_u8
#define PREPARE(index, codes) memcpy(index, codes, 16)
#define LOAD_TABLE(p) {{vld1q_u8(p), vld1q_u8((p) + 16)}}
#define LOOK_UP(t, index) vqtbl2q_u8(t, vld1q_u8(index))
#include "scan_kernel.h"
#endif

typedef void ssv_function(const uint8_t *, int, const uint8_t *, int, const uint8_t *, const int64_t *, int,
                          uint8_t *, uint8_t *, int64_t);
typedef void msv_function(const uint8_t *, int, const uint8_t *, int, const uint8_t *, int,
                          const msv_constants *, const uint8_t *, uint8_t *, uint8_t *);

typedef struct {
    const char *name;
    int lanes;
    ssv_function *ssv;
    msv_function *msv;
} kernel;

/* Slowest first. */
static const kernel KERNELS[] = {
    {"plain", 16, plain_ssv_block, plain_msv_block},
#if defined(__x86_64__)
    {"sse4.1", 16, sse41_ssv_block, sse41_msv_block},
    {"avx2", 32, avx2_ssv_block, avx2_msv_block},
    {"avx512", 64, avx512_ssv_block, avx512_msv_block},
#endif
#if defined(__aarch64__)
    {"neon", 16, neon_ssv_block, neon_msv_block},
#endif
};
enum { NUM_KERNELS = (int)(sizeof KERNELS / sizeof KERNELS[0]) };

static int runs_here(int number) {
    (void)number;
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (number) {
        case 1: return __builtin_cpu_supports("sse4.1") != 0;
        case 2: return __builtin_cpu_supports("avx2") != 0;
        case 3: return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
        default: break;
    }
#endif
    return 1;
}

/* Raised with every change of what is exported here or of the sizes that a caller keeps; compared by its caller. */
EXPORT int foldfeed_interface(void) { return 3; }

/* Name and lanes of kernel `number`; NULL past the last one. `*usable` says whether this processor runs it. */
EXPORT const char *foldfeed_kernel(int number, int *lanes, int *usable) {
    if (number < 0 || number >= NUM_KERNELS) return NULL;
    *lanes = KERNELS[number].lanes;
    *usable = runs_here(number);
    return KERNELS[number].name;
}

/* Queries are taken in groups whose columns stay in the second-level cache. */
enum { GROUP_RESIDUES = 4096 };

/* SSV of `num_queries` queries against blocks [first, last): out[query * stride + block * lanes + lane]. */
EXPORT int foldfeed_ssv(int number, const uint8_t *codes, const int64_t *offsets, const int32_t *rows,
                        int64_t first, int64_t last, const uint8_t *table, int letters, const uint8_t *queries,
                        const int64_t *starts, int num_queries, uint8_t *out, int64_t stride) {
    const kernel *k = &KERNELS[number];
    int64_t most = 0;
    for (int from = 0, to; from < num_queries; from = to) {
        for (to = from + 1; to < num_queries && starts[to + 1] - starts[from] <= GROUP_RESIDUES;) to++;
        int64_t vectors = starts[to] - starts[from] + (to - from);
        if (vectors > most) most = vectors;
    }
    uint8_t *scratch = aligned_alloc(64, ((size_t)MAX_LETTERS * TILE + (size_t)most + 1) * MAX_LANES);
    if (scratch == NULL) return -1;
    for (int64_t block = first; block < last; block++) {
        for (int from = 0, to; from < num_queries; from = to) {
            for (to = from + 1; to < num_queries && starts[to + 1] - starts[from] <= GROUP_RESIDUES;) to++;
            k->ssv(codes + offsets[block], rows[block], table, letters, queries, starts + from, to - from,
                   scratch, out + (int64_t)from * stride + block * k->lanes, stride);
        }
    }
    free(scratch);
    return 0;
}

/* MSV of one query against blocks [first, last): out[block * lanes + lane]. */
EXPORT int foldfeed_msv(int number, const uint8_t *codes, const int64_t *offsets, const int32_t *rows,
                        int64_t first, int64_t last, const uint8_t *table, int letters, const uint8_t *query,
                        int64_t length, int base, int bias, int tec, const uint8_t *begin_costs, uint8_t *out) {
    const kernel *k = &KERNELS[number];
    const msv_constants constants = {(uint8_t)base, (uint8_t)bias, (uint8_t)tec};
    uint8_t *scratch = aligned_alloc(64, ((size_t)MAX_LETTERS * TILE + (size_t)length + 1) * MAX_LANES);
    if (scratch == NULL) return -1;
    for (int64_t block = first; block < last; block++) {
        k->msv(codes + offsets[block], rows[block], table, letters, query, (int)length, &constants,
               begin_costs + block * k->lanes, scratch, out + block * k->lanes);
    }
    free(scratch);
    return 0;
}

/* Cost of leaving N, C or J for each target length, as HMMER rounds it: third-bits, computed in float. */
EXPORT void foldfeed_length_costs(const int64_t *lengths, int64_t number, float scale, uint8_t *out) {
    for (int64_t i = 0; i < number; i++) {
        float cost = -1.0f * roundf(scale * logf(3.0f / (float)(lengths[i] + 3)));
        out[i] = cost > 255.0f ? 255 : (uint8_t)cost;
    }
}

#define IS_SPACE(c) ((c) == ' ' || ((c) >= '\t' && (c) <= '\r'))

enum { FAULT_START = -1, FAULT_NAME = -2, FAULT_RESIDUE = -3 };

/* Residue codes of FASTA text, read as HMMER reads it.

   record_starts and code_starts have room for max_records + 1 entries and end with `size` and the number of
   codes; codes has room for `size`. map gives a code below 32 for a residue, 64 for what is skipped, 128 for
   what is refused. Returns the number of records, or the kind of fault with its position in *fault. */
EXPORT int64_t foldfeed_digitise(const uint8_t *text, int64_t size, const uint8_t *map, uint8_t *codes,
                                 int64_t *record_starts, int64_t *code_starts, int64_t *fault) {
    int64_t at = 0, num_codes = 0, records = 0;
    while (at < size && IS_SPACE(text[at])) at++;
    while (at < size) {
        *fault = at;
        if (text[at] != '>') return FAULT_START;
        record_starts[records] = at++;
        code_starts[records++] = num_codes;
        while (at < size && (text[at] == ' ' || text[at] == '\t')) at++;
        if (at == size || IS_SPACE(text[at])) return FAULT_NAME;
        while (at < size && text[at] != '\n' && text[at] != '\r') at++;
        for (; at < size && text[at] != '>'; at++) {
            uint8_t code = map[text[at]];
            if (code < 32) {
                codes[num_codes++] = code;
            } else if (code == 128) {
                *fault = at;
                return FAULT_RESIDUE;
            }
        }
    }
    record_starts[records] = size;
    code_starts[records] = num_codes;
    return records;
}

EXPORT int64_t foldfeed_count_byte(const uint8_t *text, int64_t size, int byte) {
    int64_t number = 0;
    for (int64_t i = 0; i < size; i++) number += text[i] == byte;
    return number;
}

/* Compares a name with one of the sorted list: as Python compares bytes. */
static int compare_names(const uint8_t *a, int64_t a_size, const uint8_t *b, int64_t b_size) {
    int order = memcmp(a, b, (size_t)(a_size < b_size ? a_size : b_size));
    return order ? order : (a_size > b_size) - (a_size < b_size);
}

/* Place of a name in a sorted list, -1 where it is not in it. */
static int64_t place_of(const uint8_t *name, int64_t size, const uint8_t *names, const int64_t *starts,
                        int64_t number) {
    int64_t low = 0, high = number;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        int order = compare_names(names + starts[middle], starts[middle + 1] - starts[middle], name, size);
        if (order == 0) return middle;
        if (order < 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return -1;
}

static int64_t find_byte(const uint8_t *text, int64_t from, int64_t to, int byte) {
    const uint8_t *found = from < to ? memchr(text + from, byte, (size_t)(to - from)) : NULL;
    return found == NULL ? to : found - text;
}

/* Records of FASTA text that have one of some sorted names: start, end and place of the name of each to `found`,
   which has room for max_found. Text that is not the `ended` file's last may end within a record, which is left
   out. Returns how many; *resume is where the first record starts that was not looked at, or the end. */
EXPORT int64_t foldfeed_find_named(const uint8_t *text, int64_t size, int ended, const uint8_t *names,
                                   const int64_t *name_starts, int64_t num_names, int64_t *found,
                                   int64_t max_found, int64_t *resume) {
    int64_t number = 0, at = find_byte(text, 0, size, '>');
    while (at < size && number < max_found) {
        int64_t header_end = find_byte(text, at, size, '\n');
        header_end = find_byte(text, at, header_end, '\r');
        int64_t following = find_byte(text, header_end, size, '>');
        if (following == size && !ended) break;
        int64_t name = at + 1, name_end;
        while (name < header_end && IS_SPACE(text[name])) name++;
        for (name_end = name; name_end < header_end && !IS_SPACE(text[name_end]);) name_end++;
        int64_t place = name < name_end ? place_of(text + name, name_end - name, names, name_starts, num_names) : -1;
        if (place >= 0) {
            int64_t *one = found + 3 * number++;
            one[0] = at, one[1] = following, one[2] = place;
        }
        at = following;
    }
    *resume = at;
    return number;
}

/* Swaps the bits of `a` above `shift` that `mask` names with those of `b`. */
#define SWAP_BITS(a, b, shift, mask)                     \
    do {                                                 \
        uint64_t change = (((a) >> (shift)) ^ (b)) & (mask); \
        (b) ^= change;                                   \
        (a) ^= change << (shift);                        \
    } while (0)

/* Eight residues of eight targets: residue `row` of target `lane` becomes to[row * lanes + lane]. */
static inline void transpose_8x8(const uint8_t *const from[8], int64_t at, uint8_t *to, int lanes) {
    uint64_t x[8];
    for (int lane = 0; lane < 8; lane++) memcpy(&x[lane], from[lane] + at, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (int i = 0; i < 4; i++) SWAP_BITS(x[i], x[i + 4], 32, 0x00000000ffffffffu);
    for (int i = 0; i < 6; i += i == 1 ? 3 : 1) SWAP_BITS(x[i], x[i + 2], 16, 0x0000ffff0000ffffu);
    for (int i = 0; i < 8; i += 2) SWAP_BITS(x[i], x[i + 1], 8, 0x00ff00ff00ff00ffu);
    for (int row = 0; row < 8; row++) memcpy(to + (at + row) * lanes, &x[row], 8);
#else
    for (int row = 0; row < 8; row++) {
        for (int lane = 0; lane < 8; lane++) to[(at + row) * lanes + lane] = from[lane][at + row];
    }
#endif
}

/* Puts eight sequences side by side, from the given lane on. */
static void pack_eight(const uint8_t *const from[8], const int64_t length[8], int lanes, uint8_t *to) {
    int64_t common = length[0];
    for (int lane = 1; lane < 8; lane++) common = length[lane] < common ? length[lane] : common;
    common -= common % 8;
    for (int64_t at = 0; at < common; at += 8) transpose_8x8(from, at, to, lanes);
    for (int lane = 0; lane < 8; lane++) {
        for (int64_t row = common; row < length[lane]; row++) to[row * lanes + lane] = from[lane][row];
    }
}

/* Puts sequences side by side: target order[i] becomes lane i % lanes of block i / lanes. `lanes` is 1, or a multiple
   of 8. */
EXPORT void foldfeed_pack(const uint8_t *codes, const int64_t *code_starts, const int64_t *order, int64_t number,
                          int lanes, const int64_t *offsets, const int32_t *rows, uint8_t *out) {
    for (int64_t block = 0; block * lanes < number; block++) {
        uint8_t *to = out + offsets[block];
        if (lanes == 1) {
            int64_t start = code_starts[order[block]], length = code_starts[order[block] + 1] - start;
            if (length > 0) memcpy(to, codes + start, (size_t)length);
            memset(to + length, PAD, (size_t)(rows[block] - length));
            continue;
        }
        memset(to, PAD, (size_t)rows[block] * lanes);
        for (int lane = 0; lane < lanes; lane += 8) {
            const uint8_t *from[8];
            int64_t length[8];
            for (int i = 0; i < 8; i++) {
                int64_t place = block * lanes + lane + i, target = place < number ? order[place] : order[0];
                from[i] = codes + code_starts[target];
                length[i] = place < number ? code_starts[target + 1] - code_starts[target] : 0;
            }
            pack_eight(from, length, lanes, to + lane);
        }
    }
}

/* Puts chosen targets of packed blocks side by side again: lane positions[i] of `from` becomes lane i. */
EXPORT void foldfeed_gather(const uint8_t *from, const int64_t *from_offsets, const int32_t *from_rows,
                            int from_lanes, const int64_t *positions, int64_t number, int lanes, const int64_t *offsets,
                            const int32_t *rows, uint8_t *out) {
    for (int64_t block = 0; block * lanes < number; block++) {
        uint8_t *to = out + offsets[block];
        memset(to, PAD, (size_t)rows[block] * lanes);
        for (int lane = 0; lane < lanes && block * lanes + lane < number; lane++) {
            int64_t position = positions[block * lanes + lane], source = position / from_lanes;
            const uint8_t *codes = from + from_offsets[source] + position % from_lanes;
            int32_t common = rows[block] < from_rows[source] ? rows[block] : from_rows[source];
            for (int32_t row = 0; row < common; row++) to[row * lanes + lane] = codes[row * from_lanes];
        }
    }
}

#ifndef FOLDFEED_WITHOUT_PYTHON
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_scan", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__scan(void) { return PyModule_Create(&definition); }
#endif
