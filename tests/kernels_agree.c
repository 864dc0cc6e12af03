/* Do the kernels of this processor give plain C's scores? For processors that tests in Python do not run on: it
   is compiled with scan.c alone and runs under an emulator (`make test-neon`). Drawn targets, queries and costs,
   some so high and low that every saturation occurs. Prints one line and exits with 1 where a score differs. */

#define FOLDFEED_WITHOUT_PYTHON
#include "../pipelines/fast_scan/scan.c"

#include <stdio.h>

#ifndef ROUNDS
#define ROUNDS 12
#endif

enum { TARGETS = 203, LONGEST = 300, QUERIES = 3, LETTERS = 29, QUERY_RESIDUES = 420 };

static uint64_t state = 1;

static int drawn(int below) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int)((state >> 33) % (uint64_t)below);
}

typedef struct {
    uint8_t codes[TARGETS * LONGEST], letters[QUERY_RESIDUES], cheap[LETTERS * 32], biased[LETTERS * 32];
    int64_t starts[TARGETS + 1], order[TARGETS], query_starts[QUERIES + 1];
    uint8_t begin[TARGETS + MAX_LANES];
    int base, bias, tec;
} drawn_input;

static void draw(drawn_input *in, int round) {
    int64_t at = 0;
    for (int target = 0; target < TARGETS; target++) {
        in->starts[target] = at;
        in->order[target] = target;
        for (int length = drawn(LONGEST); length > 0; length--) in->codes[at++] = (uint8_t)drawn(PAD);
    }
    in->starts[TARGETS] = at;
    for (int i = 0; i < QUERY_RESIDUES; i++) in->letters[i] = (uint8_t)drawn(LETTERS);
    const int64_t starts[QUERIES + 1] = {0, 1, 40 + drawn(200), QUERY_RESIDUES};
    memcpy(in->query_starts, starts, sizeof starts);
    in->bias = 5 + drawn(60), in->base = 150 + drawn(60), in->tec = drawn(10);
    for (int i = 0; i < LETTERS * 32; i++) {
        int cost = drawn(in->bias + 30 + 180 * round / ROUNDS) - in->bias;
        in->cheap[i] = i % 32 == PAD ? 127 : (uint8_t)(cost > 127 ? 127 : cost);
        in->biased[i] = i % 32 == PAD || cost + in->bias > 255 ? 255 : (uint8_t)(cost + in->bias);
    }
    for (int i = 0; i < TARGETS + MAX_LANES; i++) in->begin[i] = (uint8_t)(20 + drawn(80));
}

/* Scores of all queries and targets, then xJ of the last query. */
static void score(const drawn_input *in, int kernel, int lanes, uint8_t *out) {
    int blocks = (TARGETS + lanes - 1) / lanes;
    int64_t offsets[TARGETS], size = 0, stride = (int64_t)blocks * lanes;
    int32_t rows[TARGETS];
    for (int block = 0; block < blocks; block++) {
        int64_t most = 0;
        for (int i = block * lanes; i < (block + 1) * lanes && i < TARGETS; i++) {
            int64_t length = in->starts[i + 1] - in->starts[i];
            most = length > most ? length : most;
        }
        rows[block] = (int32_t)((most + TILE - 1) / TILE * TILE);
        offsets[block] = size;
        size += (int64_t)rows[block] * lanes;
    }
    uint8_t *packed = aligned_alloc(64, (size_t)(size + 63) / 64 * 64 + 64);
    uint8_t *best = calloc((size_t)stride, QUERIES + 1);
    if (packed == NULL || best == NULL) exit(2);
    foldfeed_pack(in->codes, in->starts, in->order, TARGETS, lanes, offsets, rows, packed);
    int failed = foldfeed_ssv(kernel, packed, offsets, rows, 0, blocks, in->cheap, LETTERS, in->letters,
                              in->query_starts, QUERIES, best, stride);
    failed |= foldfeed_msv(kernel, packed, offsets, rows, 0, blocks, in->biased, LETTERS,
                           in->letters + in->query_starts[QUERIES - 1],
                           in->query_starts[QUERIES] - in->query_starts[QUERIES - 1], in->base, in->bias, in->tec,
                           in->begin, best + QUERIES * stride);
    if (failed) exit(2);
    for (int query = 0; query <= QUERIES; query++) memcpy(out + query * TARGETS, best + query * stride, TARGETS);
    free(packed);
    free(best);
}

int main(void) {
    static drawn_input in;
    static uint8_t plain[(QUERIES + 1) * TARGETS], other[(QUERIES + 1) * TARGETS];
    long wrong = 0, compared = 0, extremes = 0;
    for (int round = 0; round < ROUNDS; round++) {
        draw(&in, round);
        score(&in, 0, KERNELS[0].lanes, plain);
        for (size_t i = 0; i < sizeof plain; i++) extremes += plain[i] == 127 || plain[i] == 128 || plain[i] == 255;
        for (int number = 1; number < NUM_KERNELS; number++) {
            if (!runs_here(number)) continue;
            score(&in, number, KERNELS[number].lanes, other);
            for (size_t i = 0; i < sizeof plain; i++) wrong += plain[i] != other[i];
            compared += sizeof plain;
        }
    }
    for (int number = 1; number < NUM_KERNELS; number++) {
        if (runs_here(number)) printf("%s ", KERNELS[number].name);
    }
    printf("against plain C: %ld of %ld scores differ, %ld plain ones at an end of the scale\n", wrong, compared,
           extremes);
    return wrong || !compared || !extremes;
}
