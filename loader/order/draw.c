/* Random words of a stream and the masking drawn from them: the same numbers as counter_rng.py and plan.py, fast.

   Those own the arithmetic, explain it and are the general path; tests compare both. Called through ctypes, which
   gives up the interpreter's lock; the module object is empty. */

#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROUNDS 10
#define SHOWN __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

/* Words under way together; they stay in the first-level cache. A multiple of four. */
#define CHUNK 512
/* From so many items on, sorting them by the upper bits first takes as many places as there are items. */
#define MAX_BUCKET_BITS 18

/* What happens to a position, as in plan.py. */
enum { MASK = 22, SAME = 24, FROM_PROFILE = 25, NOT_MASKED = 255, NUM_AMINO_ACIDS = 20 };

/* Philox4x64-10 (Salmon et al. 2011) of one counter. */
INLINE void philox(uint64_t counter, uint64_t k0, uint64_t k1, uint64_t *out)
{
    uint64_t a = counter, b = 0, c = 0, d = 0;
    for (int i = 0; i < ROUNDS; i++) {
        const unsigned __int128 p = (unsigned __int128)a * UINT64_C(0xD2E7470EE14C6C93);
        const unsigned __int128 q = (unsigned __int128)c * UINT64_C(0xCA5A826395121157);
        a = (uint64_t)(q >> 64) ^ b ^ k0;
        b = (uint64_t)q;
        c = (uint64_t)(p >> 64) ^ d ^ k1;
        d = (uint64_t)p;
        k0 += UINT64_C(0x9E3779B97F4A7C15);
        k1 += UINT64_C(0xBB67AE8584CAA73B);
    }
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
}

/* Makes whole blocks of four from the one that holds word `first`; returns where that word is in `out`. NumPy
   counts a block up before it makes it. */
INLINE const uint64_t *blocks(uint64_t k0, uint64_t k1, uint64_t first, int64_t count, uint64_t *out)
{
    const int64_t inside = (int64_t)(first % 4), num = (inside + count + 3) / 4;
    for (int64_t i = 0; i < num; i++)
        philox(first / 4 + (uint64_t)i + 1, k0, k1, out + 4 * i);
    return out + inside;
}

/* Writes words `first` to `first + count - 1` of the stream of a key. */
SHOWN void foldfeed_words_1(uint64_t k0, uint64_t k1, uint64_t first, int64_t count, uint64_t *out)
{
    uint64_t made[CHUNK + 8];
    while (count > 0) {
        const int64_t num = count < CHUNK ? count : CHUNK;
        memcpy(out, blocks(k0, k1, first, num, made), (size_t)num * sizeof *out);
        first += (uint64_t)num;
        out += num;
        count -= num;
    }
}

/* Writes the order of `count` items by a word each, the lower item first where two are equal. Words are uniform,
   so a bucket of their upper bits has about one item, and what is left to sort is next to nothing.

   Returns: 0, or -1 where there is no memory for it. */
SHOWN int foldfeed_order_1(const uint64_t *words, int64_t count, int64_t *out)
{
    if (count <= 0)
        return 0;
    int bits = 1;
    while (bits < MAX_BUCKET_BITS && (INT64_C(1) << bits) < count)
        bits++;
    const int64_t num_buckets = INT64_C(1) << bits;
    uint64_t *sorted = malloc((size_t)count * sizeof *sorted);
    int64_t *starts = calloc((size_t)num_buckets + 1, sizeof *starts);
    if (sorted == NULL || starts == NULL) {
        free(sorted);
        free(starts);
        return -1;
    }
    for (int64_t i = 0; i < count; i++)
        starts[(words[i] >> (64 - bits)) + 1]++;
    for (int64_t i = 0; i < num_buckets; i++)
        starts[i + 1] += starts[i];
    for (int64_t i = 0; i < count; i++) {
        const int64_t place = starts[words[i] >> (64 - bits)]++;
        sorted[place] = words[i];
        out[place] = i;
    }
    for (int64_t i = 1; i < count; i++) {
        const uint64_t word = sorted[i];
        const int64_t item = out[i];
        int64_t j = i;
        for (; j > 0 && sorted[j - 1] > word; j--) {
            sorted[j] = sorted[j - 1];
            out[j] = out[j - 1];
        }
        sorted[j] = word;
        out[j] = item;
    }
    free(sorted);
    free(starts);
    return 0;
}

/* Draws what is masked in rows of `length` positions, word `first` being that of the first, for the columns
   `start` to `stop - 1` of each.

   high: a position is masked where the upper half of its word is below.
   bounds: of the lower half as a number in [0, 1): uniform residues below the first, the profile's below the
     second, the same residue below the third; then the scale to residues, and the width of the profile's way.
   action: rows * (stop - start) bytes.
   at, u: room for as many positions; those of the profile's way come here.
   Returns: how many. */
SHOWN int64_t foldfeed_mask_1(uint64_t k0, uint64_t k1, uint64_t first, int64_t rows, int64_t length, int64_t start,
                              int64_t stop, uint64_t high, const double *bounds, uint8_t *action, int64_t *at,
                              double *u)
{
    const double uniform = bounds[0], profile = bounds[1], same = bounds[2], scale = bounds[3], width = bounds[4];
    const int64_t columns = stop - start;
    const double highest = 1.0 - 0x1p-53;
    uint64_t made[CHUNK + 8];
    int32_t masked[CHUNK];
    int64_t found = 0;
    memset(action, NOT_MASKED, (size_t)(rows * columns));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column += CHUNK) {
            const int num = (int)(columns - column < CHUNK ? columns - column : CHUNK);
            const uint64_t *words = blocks(k0, k1, first + (uint64_t)(row * length + start + column), num, made);
            const int64_t place = row * columns + column;
            int count = 0;
            /* Without branches, here and below: nobody can foresee which way they go. */
            for (int i = 0; i < num; i++) {
                masked[count] = i;
                count += words[i] >> 32 < high;
            }
            for (int i = 0; i < count; i++) {
                const double low = (double)(uint32_t)words[masked[i]] * 0x1p-32;
                const double residue = low * scale;
                uint8_t way = low < same ? SAME : MASK;
                way = low < profile ? FROM_PROFILE : way;
                way = low < uniform ? (uint8_t)(residue < NUM_AMINO_ACIDS - 1 ? residue : NUM_AMINO_ACIDS - 1) : way;
                action[place + masked[i]] = way;
                at[found] = place + masked[i];
                u[found] = low;
                found += way == FROM_PROFILE;
            }
        }
    for (int64_t i = 0; i < found; i++) {
        const double rest = (u[i] - uniform) / width;
        u[i] = rest < 0.0 ? 0.0 : rest > highest ? highest : rest;
    }
    return found;
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_draw", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__draw(void) { return PyModule_Create(&definition); }
