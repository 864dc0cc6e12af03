/* The keyed permutation of permutation.py, value by value: the same numbers, fast.

   permutation.py owns the arithmetic, explains it and is the general path; tests compare both. Functions of a Python
   module: a sample's record is one value, and a call through ctypes takes longer than its network. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define ROUNDS 12
#define INLINE static inline __attribute__((always_inline))

/* Of a domain of 2^(left + right) values; both halves have 1 to 31 bits. */
struct network {
    int left, right;
    uint64_t mask, hash_keys[ROUNDS], add_keys[ROUNDS];
};

/* Values that go through the network side by side, because each round waits for the one before. */
#define LANES 32
/* Values under way together; they stay in the first-level cache. */
#define BLOCK 1024

/* The top bits of SplitMix64's finaliser (variant 13); its last step leaves the top 31 bits as they are. */
INLINE uint64_t hash(uint64_t half, uint64_t key, int bits)
{
    uint64_t x = half + key;
    x = (x ^ (x >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94D049BB133111EB);
    return x >> (64 - bits);
}

INLINE void forward(const struct network *n, uint64_t *v)
{
    const uint64_t right_mask = (UINT64_C(1) << n->right) - 1, mask = n->mask;
    const int left = n->left, right = n->right;
    for (int i = 0; i < ROUNDS; i += 2) {
        const uint64_t h = n->hash_keys[i], a = n->add_keys[i], g = n->hash_keys[i + 1], b = n->add_keys[i + 1];
        for (int j = 0; j < LANES; j++) {
            uint64_t x = v[j];
            x ^= hash(x & right_mask, h, left) << right;
            x = (x + a) & mask;
            x ^= hash(x >> right, g, right);
            v[j] = (x + b) & mask;
        }
    }
}

INLINE void backward(const struct network *n, uint64_t *v)
{
    const uint64_t right_mask = (UINT64_C(1) << n->right) - 1, mask = n->mask;
    const int left = n->left, right = n->right;
    for (int i = ROUNDS - 2; i >= 0; i -= 2) {
        const uint64_t h = n->hash_keys[i], a = n->add_keys[i], g = n->hash_keys[i + 1], b = n->add_keys[i + 1];
        for (int j = 0; j < LANES; j++) {
            uint64_t x = (v[j] - b) & mask;
            x ^= hash(x >> right, g, right);
            x = (x - a) & mask;
            v[j] = x ^ hash(x & right_mask, h, left) << right;
        }
    }
}

/* Chosen when the library is loaded. AVX-512 was no faster than AVX2 (Zen 5), and both 1.8 times what SSE2 is. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WITH_AVX2_TOO __attribute__((target_clones("avx2", "default")))
#else
#define WITH_AVX2_TOO
#endif

/* Puts count values, rounded up to whole LANES, through the network. */
WITH_AVX2_TOO static void pass(const struct network *n, uint64_t *v, int count, int inverse)
{
    for (int first = 0; first < count; first += LANES) {
        if (inverse)
            backward(n, v + first);
        else
            forward(n, v + first);
    }
}

/* Replaces each of count values below size by what the permutation (or its inverse) makes of it: a value that the
   network puts outside goes through it again, beside fresh ones. */
static void permute(const struct network *n, uint64_t *values, int64_t count, uint64_t size, int inverse)
{
    uint64_t walking[BLOCK] = {0};
    int64_t place[BLOCK], next = 0;
    int num = 0;
    while (num || next < count) {
        for (; num < BLOCK && next < count; num++, next++) {
            walking[num] = values[next];
            place[num] = next;
        }
        pass(n, walking, num, inverse);
        int outside = 0;
        for (int i = 0; i < num; i++) {
            const uint64_t value = walking[i];
            values[place[i]] = value;
            walking[outside] = value;
            place[outside] = place[i];
            outside += value >= size;
        }
        num = outside;
    }
}

/* What `forward` makes of one value, as often as it takes to come back inside. */
static uint64_t permute_one(const struct network *n, uint64_t x, uint64_t size)
{
    const uint64_t right_mask = (UINT64_C(1) << n->right) - 1;
    do
        for (int i = 0; i < ROUNDS; i += 2) {
            x ^= hash(x & right_mask, n->hash_keys[i], n->left) << n->right;
            x = (x + n->add_keys[i]) & n->mask;
            x ^= hash(x >> n->right, n->hash_keys[i + 1], n->right);
            x = (x + n->add_keys[i + 1]) & n->mask;
        }
    while (x >= size);
    return x;
}

/* Reads size, bits and keys: the ROUNDS keys of the hashes, then those of the additions, as bytes.
   Returns 0, or -1 with an error set. */
static int read_network(PyObject *const *arguments, struct network *n, uint64_t *size)
{
    Py_buffer keys;
    *size = PyLong_AsUnsignedLongLong(arguments[0]);
    const long bits = PyLong_AsLong(arguments[1]);
    if (PyErr_Occurred() || PyObject_GetBuffer(arguments[2], &keys, PyBUF_SIMPLE) < 0)
        return -1;
    const int is_right = bits >= 4 && bits <= 62 && *size >= 1 && *size <= UINT64_C(1) << bits &&
                         keys.len == 2 * ROUNDS * sizeof(uint64_t);
    if (is_right) {
        n->left = (int)bits / 2;
        n->right = ((int)bits + 1) / 2;
        n->mask = (UINT64_C(1) << bits) - 1;
        memcpy(n->hash_keys, keys.buf, sizeof n->hash_keys);
        memcpy(n->add_keys, (const char *)keys.buf + sizeof n->hash_keys, sizeof n->add_keys);
    } else
        PyErr_Format(PyExc_ValueError, "a network of %ld bits for %llu values and %zd bytes of keys", bits,
                     (unsigned long long)*size, keys.len);
    PyBuffer_Release(&keys);
    return is_right ? 0 : -1;
}

/* Takes a buffer of values, each below size; size, bits, keys; whether to undo it. */
static PyObject *permute_2(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    struct network n;
    uint64_t size;
    Py_buffer values;
    if (given != 5)
        return PyErr_Format(PyExc_TypeError, "%zd arguments, not 5", given);
    const int inverse = PyObject_IsTrue(arguments[4]);
    if (inverse < 0 || read_network(arguments + 1, &n, &size) < 0 ||
        PyObject_GetBuffer(arguments[0], &values, PyBUF_WRITABLE) < 0)
        return NULL;
    /* The interpreter's lock is free meanwhile. */
    Py_BEGIN_ALLOW_THREADS
    permute(&n, values.buf, values.len / (Py_ssize_t)sizeof(uint64_t), size, inverse);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&values);
    Py_RETURN_NONE;
}

/* Takes a value below size; size, bits, keys. */
static PyObject *permute_one_2(PyObject *module, PyObject *const *arguments, Py_ssize_t given)
{
    struct network n;
    uint64_t size;
    if (given != 4)
        return PyErr_Format(PyExc_TypeError, "%zd arguments, not 4", given);
    const uint64_t value = PyLong_AsUnsignedLongLong(arguments[0]);
    if (PyErr_Occurred() || read_network(arguments + 1, &n, &size) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(permute_one(&n, value, size));
}

/* Their names count versions, so that a module that was compiled from another C is not used. */
#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {METHOD(permute_2), METHOD(permute_one_2), {NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_permute", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__permute(void) { return PyModule_Create(&definition); }
