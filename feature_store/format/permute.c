/* The keyed permutation of permutation.py, value by value: the same numbers, fast.

   permutation.py owns the arithmetic, explains it and is the general path; tests compare both. Called through
   ctypes, which gives up the interpreter's lock; the module object is empty. */

#include <Python.h>
#include <stdint.h>

#define ROUNDS 12
#define SHOWN __attribute__((visibility("default")))
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
   network puts outside goes through it again, beside fresh ones.

   keys: the ROUNDS keys of the hashes, then those of the additions. */
SHOWN void foldfeed_permute_1(uint64_t *values, int64_t count, uint64_t size, int bits, const uint64_t *keys,
                              int inverse)
{
    struct network n = {bits / 2, (bits + 1) / 2, (UINT64_C(1) << bits) - 1, {0}, {0}};
    uint64_t walking[BLOCK] = {0};
    int64_t place[BLOCK], next = 0;
    int num = 0;
    for (int i = 0; i < ROUNDS; i++) {
        n.hash_keys[i] = keys[i];
        n.add_keys[i] = keys[ROUNDS + i];
    }
    while (num || next < count) {
        for (; num < BLOCK && next < count; num++, next++) {
            walking[num] = values[next];
            place[num] = next;
        }
        pass(&n, walking, num, inverse);
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

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_permute", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__permute(void) { return PyModule_Create(&definition); }
