/* Random numbers by counter on CPUs, and the Gumbel-max draw that uses them. What is computed: reference.py beside this file.
 *
 * The largest log p - log(-log u) is the smallest (-log u) / p, which takes one logarithm. Words come W counters at a time.
 */
#define DOUBLES (W / 2)
typedef uint64_t vl __attribute__((vector_size(4 * W)));
typedef double vd __attribute__((vector_size(4 * W)));
typedef int64_t vm __attribute__((vector_size(4 * W)));

/* High and low halves of x * m. */
INLINE void product32(vu x, uint32_t m, vu *high, vu *low) {
    vl even = ((vl)x & 0xffffffffu) * m, odd = ((vl)x >> 32) * m;
    *low = (vu)((even & 0xffffffffu) | (odd << 32));
    *high = (vu)((even >> 32) | (odd & 0xffffffff00000000u));
}

/* Four words for each of W consecutive blocks; word j of block i is out[j][i]. */
static void philox_lanes(uint32_t block, uint32_t position, uint32_t sequence, uint32_t purpose, uint64_t seed, vu *out) {
    vu c0, c1 = position - (vu){0}, c2 = sequence - (vu){0}, c3 = purpose - (vu){0};
    for (int i = 0; i < W; i++) c0[i] = block + i;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        vu high0, low0, high1, low1;
        product32(c0, 0xD2511F53u, &high0, &low0);
        product32(c2, 0xCD9E8D57u, &high1, &low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* -log(u) for u in (0, 1), about 2 ulp: u = 2^e m, log m = 2 atanh((m - 1) / (m + 1)); exact where u is close to 1. */
INLINE vd minus_log(vd u) {
    vm bits = (vm)u, e = (bits >> 52) - 1023;
    vd m = (vd)((bits & 0xfffffffffffff) | 0x3ff0000000000000);
    vm large = m > 1.4142135623730951;
    m = (vd)((large & (vm)(m * 0.5)) | (~large & (vm)m));
    e -= large; /* true is -1 */
    vd s = (m - 1.0) / (m + 1.0), z = s * s, p = 1.0 / 23 - (vd){0};
    p = p * z + 1.0 / 21;
    p = p * z + 1.0 / 19;
    p = p * z + 1.0 / 17;
    p = p * z + 1.0 / 15;
    p = p * z + 1.0 / 13;
    p = p * z + 1.0 / 11;
    p = p * z + 1.0 / 9;
    p = p * z + 1.0 / 7;
    p = p * z + 1.0 / 5;
    p = p * z + 1.0 / 3;
    vd tail = s * z * p;
    return -(__builtin_convertvector(e, vd) * 0.6931471805599453 + 2.0 * (s + tail));
}

typedef struct {
    const int64_t *sequences, *positions; /* [batch], [batch, queries] */
    uint64_t seed;
    int64_t count; /* words, or entries of the law, of each position */
    int32_t batch, queries, purpose, threads;
} Noise;

/* out[batch, queries, count]: the words of every position. */
void noise_words(const Noise *n, uint32_t *out) {
    for (int64_t i = 0; i < (int64_t)n->batch * n->queries; i++)
        for (int64_t first = 0; first < n->count; first += 4 * W) {
            vu w[4];
            philox_lanes((uint32_t)(first / 4), (uint32_t)n->positions[i], (uint32_t)n->sequences[i / n->queries], n->purpose, n->seed, w);
            for (int64_t j = first; j < n->count && j < first + 4 * W; j++) out[i * n->count + j] = w[j % 4][(j - first) / 4];
        }
}

/* ratios[4 * W]: (-log u) / p for the entries from `first` of a law[count], infinite where p = 0. Returns each lane's least. */
INLINE vd ratios_of(const Noise *n, int64_t i, const float *law, int64_t first, double *ratios) {
    vu w[4];
    philox_lanes((uint32_t)(first / 4), (uint32_t)n->positions[i], (uint32_t)n->sequences[i / n->queries], n->purpose, n->seed, w);
    uint32_t ordered[4 * W] __attribute__((aligned(64)));
    for (int lane = 0; lane < W; lane++)
        for (int j = 0; j < 4; j++) ordered[4 * lane + j] = w[j][lane];
    int64_t some = n->count - first < 4 * W ? n->count - first : 4 * W;
    float p[4 * W] __attribute__((aligned(64))) = {0};
    memcpy(p, law + first, some * sizeof(float));
    vd low = INFINITY - (vd){0};
    for (int k = 0; k < 4 * W; k += DOUBLES) {
        vd u, q;
        for (int lane = 0; lane < DOUBLES; lane++) u[lane] = (double)ordered[k + lane], q[lane] = p[k + lane];
        vd ratio = minus_log((u + 0.5) * 0x1p-32) / q;
        *(vd *)(ratios + k) = ratio;
        vm less = ratio < low;
        low = (vd)((less & (vm)ratio) | (~less & (vm)low));
    }
    return low;
}

/* The token of least (-log u) / p in law[count]; p = 0 is never drawn. */
static int64_t draw_token(const Noise *n, int64_t i, const float *law) {
    double least = INFINITY;
    int64_t best = 0;
    for (int64_t first = 0; first < n->count; first += 4 * W) {
        double ratios[4 * W] __attribute__((aligned(64)));
        vd low = ratios_of(n, i, law, first, ratios);
        int64_t some = n->count - first < 4 * W ? n->count - first : 4 * W;
        for (int lane = 0; lane < DOUBLES; lane++)
            if (low[lane] < least) { /* rarely: look for it */
                for (int k = 0; k < some; k++)
                    if (ratios[k] < least) least = ratios[k], best = first + k;
                break;
            }
    }
    return best;
}

/* tokens[batch, queries] drawn from law[batch, queries, count] by the Gumbel-max trick. */
void noise_draw(const Noise *n, const float *law, int64_t *tokens) {
    int64_t rows = (int64_t)n->batch * n->queries;
#pragma omp parallel for schedule(static) num_threads(n->threads) if (n->threads > 1 && rows > 1)
    for (int64_t i = 0; i < rows; i++) tokens[i] = draw_token(n, i, law + i * n->count);
}
