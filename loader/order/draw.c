/* Random words of a stream and the masking drawn from them: the same numbers as counter_rng.py and plan.py, fast.

   Those own the arithmetic, explain it and are the general path; tests compare both. Functions of a Python module:
   a plan calls six of them; three words through ctypes took 3.5 us, as integers from here they take 0.4. Whatever
   takes long gives up the interpreter's lock. Arrays come back as bytearrays. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROUNDS 10
#define INLINE static inline __attribute__((always_inline))

/* Words under way together; they stay in the first-level cache. A multiple of four. */
#define CHUNK 512
/* Words that are given back as a list. */
#define MOST_FEW 256
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

/* Chosen when the module is loaded; 7 % faster with a multiplication that leaves the flags alone. Eight blocks in
   the lanes of AVX-512 were 6 % slower than this (there is no wide multiplication), with its 52-bit products 8 %
   faster, and 20 % with other blocks multiplied beside them: 3 us of a sample, not worth a second arithmetic. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_MULX_TOO __attribute__((target_clones("bmi2", "default")))
#else
#define WITH_MULX_TOO
#endif

WITH_MULX_TOO static void make_blocks(uint64_t k0, uint64_t k1, uint64_t counter, int64_t num, uint64_t *out)
{
    for (int64_t i = 0; i < num; i++)
        philox(counter + (uint64_t)i, k0, k1, out + 4 * i);
}

/* Makes whole blocks of four from the one that holds word `first`; returns where that word is in `out`. NumPy
   counts a block up before it makes it. */
INLINE const uint64_t *blocks(uint64_t k0, uint64_t k1, uint64_t first, int64_t count, uint64_t *out)
{
    const int64_t inside = (int64_t)(first % 4);
    make_blocks(k0, k1, first / 4 + 1, (inside + count + 3) / 4, out);
    return out + inside;
}

/* Writes words `first` to `first + count - 1` of the stream of a key. */
static void write_words(uint64_t k0, uint64_t k1, uint64_t first, int64_t count, uint64_t *out)
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

/* Writes `first_item` plus the first `limit` items of the order of `count` by a word each, the lower item first
   where two are equal. Words are uniform, so a bucket of their upper bits has about one item, and what is left to
   sort is next to nothing; buckets behind the limit are left out.

   Returns: 0, or -1 where there is no memory for it. */
static int order_by(const uint64_t *words, int64_t count, int64_t limit, int64_t first_item, int64_t *out)
{
    if (limit <= 0)
        return 0;
    int bits = 1;
    while (bits < MAX_BUCKET_BITS && (INT64_C(1) << bits) < count)
        bits++;
    const int shift = 64 - bits;
    const int64_t num_buckets = INT64_C(1) << bits;
    int64_t *starts = calloc((size_t)num_buckets + 1, sizeof *starts);
    if (starts == NULL)
        return -1;
    for (int64_t i = 0; i < count; i++)
        starts[(words[i] >> shift) + 1]++;
    int64_t num_wanted = 0;
    uint64_t last = 0;
    /* Behind this, `last` is the bucket in which the limit is reached. */
    for (int64_t i = 0; i < num_buckets && num_wanted < limit; i++) {
        num_wanted += starts[i + 1];
        starts[i + 1] = num_wanted;
        last = (uint64_t)i;
    }
    uint64_t *sorted = malloc((size_t)num_wanted * sizeof *sorted);
    int64_t *items = malloc((size_t)num_wanted * sizeof *items);
    if (sorted == NULL || items == NULL) {
        free(starts);
        free(sorted);
        free(items);
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        const uint64_t bucket = words[i] >> shift;
        if (bucket > last)
            continue;
        const int64_t place = starts[bucket]++;
        sorted[place] = words[i];
        items[place] = first_item + i;
    }
    for (int64_t i = 1; i < num_wanted; i++) {
        const uint64_t word = sorted[i];
        const int64_t item = items[i];
        int64_t j = i;
        for (; j > 0 && sorted[j - 1] > word; j--) {
            sorted[j] = sorted[j - 1];
            items[j] = items[j - 1];
        }
        sorted[j] = word;
        items[j] = item;
    }
    memcpy(out, items, (size_t)limit * sizeof *out);
    free(starts);
    free(sorted);
    free(items);
    return 0;
}

/* What is masked in rows of `length` positions, word `first` being that of the first, for the columns `start` to
   `stop - 1` of each. */
struct masking {
    uint64_t k0, k1, first, rows, length, start, stop;
    /* A position is masked where the upper half of its word is below. */
    uint64_t high;
    /* Of the lower half as a number in [0, 1): uniform residues below the first, the profile's below the second,
       the same residue below the third; then the scale to residues, and the width of the profile's way. */
    double uniform, profile, same, scale, width;
    /* rows * (stop - start) bytes. */
    uint8_t *action;
    /* The positions of the profile's way, with room for `room` of them. */
    int64_t *at, found, room;
    double *u;
};

/* Makes room for another chunk's positions. Returns 0, or -1 where there is no memory. */
static int make_room(struct masking *m)
{
    if (m->room - m->found >= CHUNK)
        return 0;
    const size_t room = (size_t)(m->room ? 2 * m->room : 4 * CHUNK);
    int64_t *at = realloc(m->at, room * sizeof *at);
    if (at != NULL)
        m->at = at;
    double *u = realloc(m->u, room * sizeof *u);
    if (u != NULL)
        m->u = u;
    if (at == NULL || u == NULL)
        return -1;
    m->room = (int64_t)room;
    return 0;
}

/* Returns 0, or -1 where there is no memory. */
static int draw_masking(struct masking *m)
{
    const double uniform = m->uniform, profile = m->profile, same = m->same, scale = m->scale;
    const int64_t rows = (int64_t)m->rows, length = (int64_t)m->length, columns = (int64_t)(m->stop - m->start);
    const double highest = 1.0 - 0x1p-53;
    uint8_t *action = m->action;
    uint64_t made[CHUNK + 8];
    int32_t masked[CHUNK];
    memset(action, NOT_MASKED, (size_t)(rows * columns));
    for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column += CHUNK) {
            const int num = (int)(columns - column < CHUNK ? columns - column : CHUNK);
            const uint64_t *words =
                blocks(m->k0, m->k1, m->first + (uint64_t)(row * length + column) + m->start, num, made);
            const int64_t place = row * columns + column;
            int count = 0;
            if (make_room(m) < 0)
                return -1;
            int64_t *at = m->at, found = m->found;
            double *u = m->u;
            /* Without branches, here and below: nobody can foresee which way they go. */
            for (int i = 0; i < num; i++) {
                masked[count] = i;
                count += words[i] >> 32 < m->high;
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
            m->found = found;
        }
    for (int64_t i = 0; i < m->found; i++) {
        const double rest = (m->u[i] - uniform) / m->width;
        m->u[i] = rest < 0.0 ? 0.0 : rest > highest ? highest : rest;
    }
    return 0;
}

/* Reads `count` arguments that are integers from 0 to 2^64 - 1. Returns 0, or -1 with an error set. */
static int read_integers(PyObject *const *arguments, int count, uint64_t *out)
{
    for (int i = 0; i < count; i++) {
        out[i] = PyLong_AsUnsignedLongLong(arguments[i]);
        if (out[i] == (uint64_t)-1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int has_arguments(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 1;
    PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", given, wanted);
    return 0;
}

static PyObject *few_2(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t in[4], made[MOST_FEW + 8];
    if (!has_arguments(given, 4) || read_integers(arguments, 4, in) < 0)
        return NULL;
    if (in[3] > MOST_FEW)
        return PyErr_Format(PyExc_ValueError, "%llu words are not few", (unsigned long long)in[3]);
    const uint64_t *words = blocks(in[0], in[1], in[2], (int64_t)in[3], made);
    PyObject *list = PyList_New((Py_ssize_t)in[3]);
    for (Py_ssize_t i = 0; list != NULL && i < (Py_ssize_t)in[3]; i++) {
        PyObject *word = PyLong_FromUnsignedLongLong(words[i]);
        if (word == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, word);
    }
    return list;
}

static PyObject *words_2(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t in[4];
    if (!has_arguments(given, 4) || read_integers(arguments, 4, in) < 0)
        return NULL;
    if (in[3] > PY_SSIZE_T_MAX / sizeof(uint64_t))
        return PyErr_NoMemory();
    PyObject *found = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(in[3] * sizeof(uint64_t)));
    if (found == NULL)
        return NULL;
    uint64_t *out = (uint64_t *)PyByteArray_AS_STRING(found);
    Py_BEGIN_ALLOW_THREADS
    write_words(in[0], in[1], in[2], (int64_t)in[3], out);
    Py_END_ALLOW_THREADS
    return found;
}

/* Takes a buffer of words, how many to give, and the number of the first item. */
static PyObject *order_2(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    uint64_t in[2];
    Py_buffer words;
    if (!has_arguments(given, 3) || read_integers(arguments + 1, 2, in) < 0 ||
        PyObject_GetBuffer(arguments[0], &words, PyBUF_SIMPLE) < 0)
        return NULL;
    const uint64_t count = (uint64_t)words.len / sizeof(uint64_t), limit = in[0] < count ? in[0] : count;
    PyObject *found = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(limit * sizeof(int64_t)));
    if (found != NULL) {
        int64_t *out = (int64_t *)PyByteArray_AS_STRING(found);
        int failed;
        Py_BEGIN_ALLOW_THREADS
        failed = order_by(words.buf, (int64_t)count, (int64_t)limit, (int64_t)in[1], out);
        Py_END_ALLOW_THREADS
        if (failed) {
            Py_CLEAR(found);
            PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&words);
    return found;
}

/* Takes the first eight members of `struct masking`, then the five bounds. */
static PyObject *mask_2(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    struct masking m = {0};
    uint64_t *integers[] = {&m.k0, &m.k1, &m.first, &m.rows, &m.length, &m.start, &m.stop, &m.high};
    double *numbers[] = {&m.uniform, &m.profile, &m.same, &m.scale, &m.width};
    if (!has_arguments(given, 13))
        return NULL;
    for (int i = 0; i < 8; i++)
        if (read_integers(arguments + i, 1, integers[i]) < 0)
            return NULL;
    for (int i = 0; i < 5; i++) {
        *numbers[i] = PyFloat_AsDouble(arguments[8 + i]);
        if (*numbers[i] == -1.0 && PyErr_Occurred())
            return NULL;
    }
    if (m.start > m.stop || m.stop > m.length || (m.length && m.rows > (uint64_t)(PY_SSIZE_T_MAX / 16) / m.length))
        return PyErr_Format(PyExc_ValueError, "columns [%llu, %llu) of %llu rows of %llu positions",
                            (unsigned long long)m.start, (unsigned long long)m.stop, (unsigned long long)m.rows,
                            (unsigned long long)m.length);
    PyObject *action = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)(m.rows * (m.stop - m.start)));
    if (action == NULL)
        return NULL;
    m.action = (uint8_t *)PyByteArray_AS_STRING(action);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = draw_masking(&m);
    Py_END_ALLOW_THREADS
    PyObject *found = NULL;
    if (failed)
        PyErr_NoMemory();
    else {
        PyObject *at = PyByteArray_FromStringAndSize((const char *)m.at, (Py_ssize_t)m.found * 8);
        PyObject *u = PyByteArray_FromStringAndSize((const char *)m.u, (Py_ssize_t)m.found * 8);
        if (at != NULL && u != NULL)
            found = PyTuple_Pack(3, action, at, u);
        Py_XDECREF(at);
        Py_XDECREF(u);
    }
    Py_DECREF(action);
    free(m.at);
    free(m.u);
    return found;
}

/* Their names count versions, so that a module that was compiled from another C is not used. */
#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {METHOD(few_2), METHOD(words_2), METHOD(order_2), METHOD(mask_2), {NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_draw", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__draw(void) { return PyModule_Create(&definition); }
