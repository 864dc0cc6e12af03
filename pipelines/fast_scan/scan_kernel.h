/* The kernels of one instruction set; scan.c includes this file once per set with its operations as macros.

   VEC is LANES bytes wide and every lane is one target sequence, so no value ever moves between lanes. A block
   of targets is `rows` vectors of residue codes, the lanes' sequences padded at their ends with PAD. */

/* Costs of TILE rows against every letter of the queries: out[letter][row][lane] = table[letter][code]. */
TARGET static void NAME(costs_of_rows)(const uint8_t *codes, int rows, const uint8_t *table, int letters,
                                       uint8_t *out) {
    uint8_t index[2 * TILE * LANES] ALIGNED;
    for (int row = 0; row < rows; row++) {
        PREPARE(index + 2 * row * LANES, codes + (size_t)row * LANES);
    }
    for (int letter = 0; letter < letters; letter++) {
        TABLE32 costs = LOAD_TABLE(table + 32 * letter);
        for (int row = 0; row < rows; row++) {
            STORE(out + ((size_t)letter * rows + row) * LANES, LOOK_UP(costs, index + 2 * row * LANES));
        }
    }
}

/* Extends every diagonal of one query by ROWS rows. `column[k]` holds the last row above for query position k
   and receives the last row of the tile; the rows between live in registers. Four maxima instead of one,
   because a chain of them would take longer than everything else. */
TARGET static void NAME(ssv_tile)(const uint8_t *query, int length, const uint8_t *costs, uint8_t *column,
                                  uint8_t *best) {
    VEC d[ROWS], most[4], above = SPLAT((uint8_t)-128);
    UNROLL for (int row = 0; row < ROWS; row++) d[row] = SPLAT((uint8_t)-128);
    UNROLL for (int i = 0; i < 4; i++) most[i] = LOAD(best);
    for (int k = 0; k < length; k++) {
        const uint8_t *cost = costs + (size_t)query[k] * (ROWS * LANES);
        VEC here = LOAD(column + (size_t)k * LANES);
        UNROLL for (int row = ROWS - 1; row >= 0; row--) {
            d[row] = SUBS_I8(row ? d[row - 1] : above, LOAD(cost + row * LANES));
            most[row % 4] = MAX_I8(most[row % 4], d[row]);
        }
        STORE(column + (size_t)k * LANES, d[ROWS - 1]);
        above = here;
    }
    STORE(best, MAX_I8(MAX_I8(most[0], most[1]), MAX_I8(most[2], most[3])));
}

/* Best SSV cell of every lane for each of `num_queries` queries: out[query * stride + lane]. */
TARGET static void NAME(ssv_block)(const uint8_t *codes, int rows, const uint8_t *table, int letters,
                                   const uint8_t *queries, const int64_t *starts, int num_queries,
                                   uint8_t *scratch, uint8_t *out, int64_t stride) {
    uint8_t *costs = scratch, *best = costs + (size_t)MAX_LETTERS * TILE * LANES;
    uint8_t *columns = best + (size_t)num_queries * LANES;
    size_t vectors = (size_t)(starts[num_queries] - starts[0]) + num_queries;
    memset(best, 0x80, vectors * LANES);
    for (int row = 0; row < rows; row += ROWS) {
        NAME(costs_of_rows)(codes + (size_t)row * LANES, ROWS, table, letters, costs);
        for (int q = 0; q < num_queries; q++) {
            NAME(ssv_tile)(queries + starts[q], (int)(starts[q + 1] - starts[q]), costs,
                           columns + (size_t)(starts[q] - starts[0]) * LANES, best + (size_t)q * LANES);
        }
    }
    for (int q = 0; q < num_queries; q++) memcpy(out + q * stride, best + (size_t)q * LANES, LANES);
}

/* xJ at the end of the MSV recurrence of every lane, 255 where it overflows. */
TARGET static void NAME(msv_block)(const uint8_t *codes, int rows, const uint8_t *table, int letters,
                                   const uint8_t *query, int length, const msv_constants *constants,
                                   const uint8_t *begin_costs, uint8_t *scratch, uint8_t *out) {
    uint8_t *costs = scratch, *column = scratch + (size_t)MAX_LETTERS * TILE * LANES;
    const VEC bias = SPLAT(constants->bias), base = SPLAT(constants->base), to_j = SPLAT(constants->tec);
    const VEC begin_cost = LOAD(begin_costs);
    VEC begin = SUBS_U8(base, begin_cost), j = SPLAT(0), highest = SPLAT(0);
    memset(column, 0, (size_t)length * LANES);
    for (int row = 0; row < rows; row++) {
        VEC above = SPLAT(0), end = SPLAT(0);
        NAME(costs_of_rows)(codes + (size_t)row * LANES, 1, table, letters, costs);
        for (int k = 0; k < length; k++) {
            VEC cell = ADDS_U8(MAX_U8(above, begin), bias);
            cell = SUBS_U8(cell, LOAD(costs + (size_t)query[k] * LANES));
            end = MAX_U8(end, cell);
            above = LOAD(column + (size_t)k * LANES);
            STORE(column + (size_t)k * LANES, cell);
        }
        highest = MAX_U8(highest, ADDS_U8(end, bias));
        j = MAX_U8(j, SUBS_U8(end, to_j));
        begin = SUBS_U8(MAX_U8(base, j), begin_cost);
    }
    STORE(out, j);
    uint8_t top[LANES];
    memcpy(top, &highest, LANES);
    for (int lane = 0; lane < LANES; lane++) {
        if (top[lane] == 255) out[lane] = 255;
    }
}

#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef VEC
#undef TABLE32
#undef LOAD
#undef STORE
#undef SPLAT
#undef SUBS_I8
#undef MAX_I8
#undef ADDS_U8
#undef SUBS_U8
#undef MAX_U8
#undef PREPARE
#undef LOAD_TABLE
#undef LOOK_UP
