/* Attention of a few queries per sequence over a long KV cache, on CPUs. What is computed: reference.py beside this file.
 *
 * Work is split into (sequence, KV head, chunk of CHUNK keys) of fixed length, so a sequence's result does not depend on the
 * rest of the batch. A KV row is read from memory once for all queries and all heads of its group: keys are taken 64 at a
 * time, and every block of up to 8 query rows passes over them while they sit in L1. Partial results carry their maximum and
 * sum (online softmax) and are merged in a second pass.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define W 16 /* floats per vector */
#define PV_ROWS 4
#else
#define W 8 /* 64-byte vectors on AVX2 compile to something correct and terrible */
#define PV_ROWS 2
#endif
#define PV_VECTORS 4
#define BLOCK 64 /* keys per block */
#define ROWS 8   /* query rows per pass over a block */
#define MAX_DIM 256
#define MAX_QUERIES 64
#define CHUNK 2048 /* keys per task */

typedef float vf __attribute__((vector_size(4 * W)));
typedef float vf_u __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh_u __attribute__((vector_size(2 * W), aligned(2)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *q; /* [batch, queries, heads, dim], strides in elements, last contiguous */
    const void *k, *v; /* [batch, kv_heads, slots, dim] */
    float *out; /* as q */
    float *lse; /* [batch, queries, heads] contiguous, natural log, or NULL */
    const int64_t *committed; /* [batch] */
    const uint64_t *corner; /* [queries] bit c: query sees corner node c */
    const int32_t *node_depth; /* [nodes] */
    const int32_t *query_node; /* [queries] */
    const int32_t *index; /* [batch, kv_heads, index_len] ascending slots before the window, or NULL; see keys_of */
    const int32_t *rows; /* [num_rows] the sequences to attend for, the others are left alone; NULL: all */
    float *workspace; /* from tree_attention_workspace */
    int64_t q_batch, q_query, q_head, kv_batch, kv_head, kv_slot, out_batch, out_query, out_head;
    int64_t slots, sink, recent, index_len; /* recent = 0: full view; with an index, sink is ignored */
    int64_t index_layer; /* elements from one layer's lists to the next one's, for who runs several; 0: the same */
    int32_t batch, queries, heads, kv_heads, dim, nodes, bf16, threads, num_rows;
    float scale;
} Call;

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load(const void *rows, int64_t at, int bf16) {
    if (!bf16) return *(const vf_u *)((const float *)rows + at);
    vu wide = __builtin_convertvector(*(const vh_u *)((const uint16_t *)rows + at), vu) << 16;
    return (vf)wide;
}

/* Sums of W vectors: lane i of the result is the sum of all lanes of a[i]. */
INLINE vf sums(vf *a) {
#if W == 16
#define LO(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HI(x, y) __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LO2(x, y) __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HI2(x, y) __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(x, y) __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#else
#define LO(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define HI(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#define LO2(x, y) __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#define HI2(x, y) __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVEN(x, y) __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODD(x, y) __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15)
#endif
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) a[i] = LO(a[2 * i], a[2 * i + 1]) + HI(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < W / 4; i++) a[i] = LO2(a[2 * i], a[2 * i + 1]) + HI2(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 2
    for (int i = 0; i < W / 8; i++) a[i] = EVEN(a[2 * i], a[2 * i + 1]) + ODD(a[2 * i], a[2 * i + 1]);
#if W == 16
    a[0] = EVEN(a[0], a[1]) + ODD(a[0], a[1]);
#endif
    return a[0];
}

/* 2^x for x <= 0, relative error about 2e-7: 2^round(x) by exponent bits, the rest on [-0.5, 0.5] by a polynomial. */
INLINE vf exp2_nonpositive(vf x) {
    vi below = x < splat(-126.0f);
    x = (vf)((~below & (vi)x) | (below & (vi)splat(-126.0f)));
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest integer */
    vf shifted = x + magic;
    vf r = x - (shifted - magic);
    vf p = splat(1.540353e-4f);
    p = p * r + splat(1.3333558e-3f);
    p = p * r + splat(9.6181291e-3f);
    p = p * r + splat(5.5504109e-2f);
    p = p * r + splat(2.4022651e-1f);
    p = p * r + splat(6.9314718e-1f);
    p = p * r + splat(1.0f);
    vi exponent = ((vi)shifted - (vi)magic) << 23;
    return (vf)(~below & ((vi)p + exponent));
}

/* Ask for a row that the next block will read; beyond the end this is harmless. */
INLINE void fetch_ahead(const void *rows, int64_t at, int dim, int bf16) {
    const char *line = (const char *)rows + at * (bf16 ? 2 : 4);
    for (int byte = 0; byte < dim * (bf16 ? 2 : 4); byte += 64) __builtin_prefetch(line + byte, 0, 2);
}

INLINE float lane_max(vf x) {
    float m = x[0];
    for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
    return m;
}

INLINE float lane_sum(vf x) {
    float s = 0;
    for (int i = 0; i < W; i++) s += x[i];
    return s;
}

/* scores[r][n] = q[r] . k[n] for a block of 64 keys; q is scaled already. vectors = dim / W. Rows to fetch meanwhile stand
 * `ahead` entries further on in `at`; 0: none. */
INLINE void score(const float *q, const void *k, const int64_t *at, int64_t ahead, float *scores, int rows, int vectors, int bf16) {
    for (int n = 0; n < BLOCK; n += W) {
        if (ahead)
            for (int i = 0; i < W; i++) fetch_ahead(k, at[n + i + ahead], vectors * W, bf16);
        for (int r = 0; r < rows; r++) {
            const vf *row = (const vf *)(q + r * vectors * W);
            vf a[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; i++) a[i] = row[0] * load(k, at[n + i], bf16);
            for (int d = 1; d < vectors; d++) {
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) a[i] += row[d] * load(k, at[n + i] + d * W, bf16);
            }
            *(vf *)(scores + r * BLOCK + n) = sums(a);
        }
    }
}

/* acc[r] += sum over n of p[r][n] * v[n], for some rows and PV_VECTORS vectors of the head. */
INLINE void weigh(float *acc, const float *p, const void *v, const int64_t *at, int64_t ahead, int keys, int rows, int dim,
                  int first, int count, int bf16) {
    vf a[PV_ROWS][PV_VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) a[r][c] = *(vf *)(acc + r * dim + (first + c) * W);
    for (int n = 0; n < keys; n++) {
        vf row[PV_VECTORS];
        if (ahead) fetch_ahead(v, at[n + ahead], dim, bf16);
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) row[c] = load(v, at[n] + (first + c) * W, bf16);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vf weight = splat(p[r * BLOCK + n]);
#pragma GCC unroll 4
            for (int c = 0; c < count; c++) a[r][c] += weight * row[c];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) *(vf *)(acc + r * dim + (first + c) * W) = a[r][c];
}

INLINE void weigh_rows(float *acc, const float *p, const void *v, const int64_t *at, int64_t ahead, int keys, int rows, int dim,
                       int bf16) {
    int vectors = dim / W;
    for (int r = 0; r < rows; r += PV_ROWS) {
        int some = rows - r < PV_ROWS ? rows - r : PV_ROWS;
        for (int c = 0; c < vectors; c += PV_VECTORS) {
            int count = vectors - c < PV_VECTORS ? vectors - c : PV_VECTORS;
            float *to = acc + r * dim;
            int64_t far = r == 0 && c == 0 ? ahead : 0; /* once per block */
            const float *from = p + r * BLOCK;
#define WEIGH(R, C) if (some == R && count == C) weigh(to, from, v, at, far, keys, R, dim, c, C, bf16)
#define WEIGH_ROWS(R) WEIGH(R, 4); else WEIGH(R, 3); else WEIGH(R, 2); else WEIGH(R, 1)
            WEIGH_ROWS(1);
            WEIGH_ROWS(2);
#if PV_ROWS == 4
            WEIGH_ROWS(3);
            WEIGH_ROWS(4);
#endif
        }
    }
}

/* One block of keys for `rows` query rows: scores, online softmax, weighted values. m, l, acc are the running state. */
INLINE void block_rows(const float *q, const void *k, const void *v, const int64_t *at, int64_t ahead, int keys, const float *mask, float *m,
                       float *l, float *acc, int rows, int dim, int bf16) {
    float scores[ROWS * BLOCK] __attribute__((aligned(64)));
    score(q, k, at, ahead, scores, rows, dim / W, bf16);
    for (int r = 0; r < rows; r++) {
        vf *s = (vf *)(scores + r * BLOCK);
        if (mask) {
            const vf *hide = (const vf *)(mask + r * BLOCK);
            for (int i = 0; i < BLOCK / W; i++) s[i] += hide[i];
        }
        vf top = s[0];
        for (int i = 1; i < BLOCK / W; i++) {
            vi more = s[i] > top;
            top = (vf)((more & (vi)s[i]) | (~more & (vi)top));
        }
        float highest = lane_max(top);
        float next = highest > m[r] ? highest : m[r];
        if (next == -INFINITY) { /* nothing visible so far */
            memset(s, 0, BLOCK * sizeof(float));
            continue;
        }
        float decay = m[r] == -INFINITY ? 0.0f : exp2f(m[r] - next);
        vf total = splat(0.0f);
        for (int i = 0; i < BLOCK / W; i++) {
            s[i] = exp2_nonpositive(s[i] - splat(next));
            total += s[i];
        }
        l[r] = l[r] * decay + lane_sum(total);
        m[r] = next;
        if (decay != 1.0f)
            for (int d = 0; d < dim; d += W) *(vf *)(acc + r * dim + d) *= splat(decay);
    }
    weigh_rows(acc, scores, v, at, ahead, keys, rows, dim, bf16);
}

#define ROWS_CASE(R, DIM, BF)                                                                                         \
    case R: block_rows(q, k, v, at, ahead, keys, mask, m, l, acc, R, DIM, BF); break
#define EVERY(DIM, BF)                                                                                                \
    ROWS_CASE(3, DIM, BF); ROWS_CASE(5, DIM, BF); ROWS_CASE(6, DIM, BF); ROWS_CASE(7, DIM, BF);
#define POWERS(DIM, BF) ROWS_CASE(1, DIM, BF); ROWS_CASE(2, DIM, BF); ROWS_CASE(4, DIM, BF); ROWS_CASE(8, DIM, BF);

#define BLOCK_ARGUMENTS                                                                                               \
    const float *q, const void *k, const void *v, const int64_t *at, int64_t ahead, int keys, const float *mask,       \
        float *m, float *l,  \
        float *acc, int rows, int dim
#define BLOCK_FUNCTION(NAME, DIM, BF, MORE)                                                                           \
    static __attribute__((noinline)) void NAME(BLOCK_ARGUMENTS) {                                                     \
        (void)dim;                                                                                                    \
        switch (rows) { POWERS(DIM, BF) MORE(DIM, BF) }                                                                \
    }
#define NONE(DIM, BF)
BLOCK_FUNCTION(block_f32_64, 64, 0, EVERY) /* every number of rows: a pass less over the keys for 3, 5, 6, 7 */
BLOCK_FUNCTION(block_f32_128, 128, 0, NONE)
BLOCK_FUNCTION(block_f32_any, dim, 0, NONE)
BLOCK_FUNCTION(block_bf16_64, 64, 1, EVERY)
BLOCK_FUNCTION(block_bf16_128, 128, 1, NONE)
BLOCK_FUNCTION(block_bf16_any, dim, 1, NONE)
typedef void (*BlockFn)(BLOCK_ARGUMENTS);

static BlockFn block_function(const Call *c) {
    if (c->dim == 64) return c->bf16 ? block_bf16_64 : block_f32_64;
    if (c->dim == 128) return c->bf16 ? block_bf16_128 : block_f32_128;
    return c->bf16 ? block_bf16_any : block_f32_any;
}

/* The keys of one sequence as a list: first the index list or the sinks, then one range that ends with the corner. An index
 * list is read as far as there are committed keys before the range; one that is longer than that names 0, 1, 2, ... */
typedef struct {
    int64_t head, from, total; /* keys before the range; first slot of the range; all keys */
} Keys;

static Keys keys_of(const Call *c, int b) {
    int64_t committed = c->committed[b], end = committed + c->nodes;
    if (!c->recent) return (Keys){0, 0, end};
    /* the shallowest query sees furthest back */
    int64_t shallow = c->node_depth[c->query_node[0]];
    for (int t = 1; t < c->queries; t++) {
        int64_t depth = c->node_depth[c->query_node[t]];
        shallow = depth < shallow ? depth : shallow;
    }
    int64_t from = committed + shallow - c->recent + 1;
    from = from < 0 ? 0 : from > end ? end : from;
    int64_t head = c->index ? c->index_len : c->sink;
    if (c->index) {
        if (head > from) head = from;
        if (head > committed) head = committed;
    } else {
        if (head > end) head = end;
        if (from < head) from = head;
    }
    return (Keys){head, from, head + end - from};
}

static inline int64_t slot_of(const Keys *keys, const int32_t *index, int64_t n) {
    if (n < keys->head) return index ? index[n] : n;
    return keys->from + n - keys->head;
}

/* Whether query t sees the key in `slot` (which is key number n of the list). */
static inline int sees(const Call *c, const Keys *keys, int64_t committed, int t, int64_t n, int64_t slot) {
    int64_t node = slot - committed, depth = node;
    if (node >= 0) {
        if (!(c->corner[t] >> node & 1)) return 0;
        depth = c->node_depth[node];
    }
    if (!c->recent || (c->index && n < keys->head)) return 1;
    if (!c->index && committed + depth < c->sink) return 1;
    return c->node_depth[c->query_node[t]] - depth < c->recent;
}

/* Keys number `begin` and on of the list that every query sees: up to the corner, and inside the deepest query's window. */
static int64_t all_seen_from(const Call *c, const Keys *keys, int64_t committed) {
    if (!c->recent) return 0;
    int64_t deep = 0;
    for (int t = 0; t < c->queries; t++) {
        int64_t depth = c->node_depth[c->query_node[t]];
        deep = depth > deep ? depth : deep;
    }
    int64_t slot = committed + deep - c->recent + 1; /* from this slot on */
    return keys->head + (slot > keys->from ? slot - keys->from : 0);
}

/* Floats before the accumulators of a part: m and l of every row, padded so that accumulators are aligned. */
static int64_t state_floats(const Call *c) { return ((int64_t)2 * c->queries * (c->heads / c->kv_heads) + 15) / 16 * 16; }

static int64_t row_floats(const Call *c) {
    return state_floats(c) + (int64_t)c->queries * (c->heads / c->kv_heads) * ((c->dim + 15) / 16 * 16);
}

/* One chunk of keys of one (sequence, KV head) into its part of the workspace: m, l [R], acc [R, dim]. */
static void chunk(const Call *c, BlockFn block, int b, int h, int64_t begin, int64_t stop, float *part) {
    int group = c->heads / c->kv_heads, rows = c->queries * group, dim = c->dim;
    int64_t committed = c->committed[b], base = b * c->kv_batch + h * c->kv_head;
    Keys keys = keys_of(c, b);
    const int32_t *index = c->index ? c->index + ((int64_t)b * c->kv_heads + h) * c->index_len : NULL;
    int64_t clear_from = all_seen_from(c, &keys, committed), clear_to = keys.total - c->nodes;
    int mixed = clear_from > keys.head; /* sinks and listed keys are seen by all, then come some that only few see */
    float *m = part, *l = part + rows, *acc = part + state_floats(c);
    float q[MAX_QUERIES * MAX_DIM] __attribute__((aligned(64)));
    float mask[ROWS * BLOCK] __attribute__((aligned(64)));
    int64_t at[2 * BLOCK], slots[BLOCK]; /* this block and the next one */
    for (int r = 0; r < rows; r++) {
        m[r] = -INFINITY;
        l[r] = 0;
    }
    memset(acc, 0, sizeof(float) * rows * dim);
    for (int first = 0; first < rows; first += MAX_QUERIES) {
        int many = rows - first < MAX_QUERIES ? rows - first : MAX_QUERIES;
        for (int r = 0; r < many; r++) {
            int t = (first + r) / group, g = (first + r) % group;
            const float *from = c->q + b * c->q_batch + t * c->q_query + (h * group + g) * c->q_head;
            for (int d = 0; d < dim; d++) q[r * dim + d] = from[d] * c->scale * 1.44269504089f;
        }
        for (int64_t n0 = begin; n0 < stop; n0 += BLOCK) {
            int count = stop - n0 < BLOCK ? (int)(stop - n0) : BLOCK;
            for (int i = 0; i < BLOCK; i++) { /* a short block repeats its last key, masked */
                slots[i] = slot_of(&keys, index, n0 + (i < count ? i : count - 1));
                at[i] = base + slots[i] * c->kv_slot;
            }
            for (int i = 0; i < BLOCK; i++) at[BLOCK + i] = at[i] + BLOCK * c->kv_slot;
            for (int64_t i = 0; n0 < keys.head && index && i < BLOCK; i++) { /* listed rows do not lie side by side */
                int64_t n = n0 + BLOCK + i < keys.total ? n0 + BLOCK + i : keys.total - 1;
                at[BLOCK + i] = base + slot_of(&keys, index, n) * c->kv_slot;
            }
            int masked = count < BLOCK || n0 + count > clear_to || (mixed && n0 < clear_from && n0 + count > keys.head);
            for (int r0 = 0, some; r0 < many; r0 += some) {
                int row = first + r0, left = many - r0;
                some = left >= 8 ? 8 : c->dim == 64 ? left : left >= 4 ? 4 : left >= 2 ? 2 : 1;
                if (masked)
                    for (int r = 0; r < some; r++)
                        for (int i = 0; i < BLOCK; i++)
                            mask[r * BLOCK + i] =
                                i < count && sees(c, &keys, committed, (row + r) / group, n0 + i, slots[i]) ? 0.0f : -INFINITY;
                block(q + r0 * dim, c->k, c->v, at, r0 ? 0 : BLOCK, count, masked ? mask : NULL, m + row, l + row, acc + row * dim, some, dim);
            }
        }
    }
}

/* Merge the chunks of one (sequence, KV head) and write the output rows. */
static void merge(const Call *c, int b, int h, int64_t chunks, const float *parts) {
    int group = c->heads / c->kv_heads, rows = c->queries * group, dim = c->dim;
    for (int r = 0; r < rows; r++) {
        float top = -INFINITY, total = 0;
        for (int64_t i = 0; i < chunks; i++) top = fmaxf(top, parts[i * row_floats(c) + r]);
        int t = r / group, g = r % group;
        float *to = c->out + b * c->out_batch + t * c->out_query + (h * group + g) * c->out_head;
        for (int d = 0; d < dim; d++) to[d] = 0;
        for (int64_t i = 0; i < chunks && top > -INFINITY; i++) {
            const float *part = parts + i * row_floats(c);
            float weight = part[r] == -INFINITY ? 0.0f : exp2f(part[r] - top);
            total += weight * part[rows + r];
            const float *from = part + state_floats(c) + r * dim;
            for (int d = 0; d < dim; d++) to[d] += weight * from[d];
        }
        for (int d = 0; d < dim; d++) to[d] = total > 0 ? to[d] / total : 0;
        if (c->lse)
            c->lse[((int64_t)b * c->queries + t) * c->heads + h * group + g] =
                total > 0 ? (top + log2f(total)) * 0.69314718056f : -INFINITY;
    }
}

static int64_t chunks_of(const Call *c, int b) {
    int64_t total = keys_of(c, b).total;
    return total <= CHUNK ? 1 : (total + CHUNK - 1) / CHUNK;
}

static int row_count(const Call *c) { return c->rows ? c->num_rows : c->batch; }

/* 0, or 1000 + b: a list of row b, in any of the layers, does not ascend from 0 on. To be asked once when lists are made: it
 * reads them whole, which before every forward would cost a few percent of attending to them. */
int tree_attention_check_index(const Call *c, int layers) {
    int64_t lists = (int64_t)c->batch * c->kv_heads;
    for (int64_t i = 0; c->index && i < layers * lists; i++) {
        const int32_t *list = c->index + i / lists * c->index_layer + i % lists * c->index_len;
        for (int64_t n = 0; n < c->index_len; n++)
            if (list[n] < 0 || (n && list[n] <= list[n - 1])) return 1000 + (int)(i % lists / c->kv_heads);
    }
    return 0;
}

/* 0, or 1000 + b: row b would read a listed key of its window, or beyond. Enough where the lists are known to ascend, for
 * this call and deeper queries: a list ends before the window, or is 0, 1, 2, ... as far as it can ever be read. */
static int check_ends(const Call *c, const int32_t *index) {
    for (int b = 0; b < c->batch; b++) {
        int64_t from = keys_of(c, b).from, entries = c->index_len < c->committed[b] ? c->index_len : c->committed[b];
        for (int h = 0; entries && h < c->kv_heads; h++) {
            const int32_t *list = index + ((int64_t)b * c->kv_heads + h) * c->index_len;
            int32_t last = list[entries - 1];
            if (list[0] < 0 || (entries > from ? last != entries - 1 : last >= from)) return 1000 + b;
        }
    }
    return 0;
}

/* 0, or why the call must not touch memory: 1 shape, 2 dim, 3 queries, 4 nodes, 5 threads, 7 rows; 1000 + b: row b beyond
 * its slots. Index lists must have passed tree_attention_check_index. */
int tree_attention_check(const Call *c) {
    if (c->batch < 1 || c->heads < 1 || c->kv_heads < 1 || c->heads % c->kv_heads) return 1;
    if (c->dim < W || c->dim > MAX_DIM || c->dim % W) return 2;
    if (c->queries < 1 || c->queries > MAX_QUERIES) return 3;
    if (c->nodes < 1 || c->nodes > 64) return 4;
    if (c->threads < 1) return 5;
    for (int t = 0; t < c->queries; t++)
        if (c->query_node[t] < 0 || c->query_node[t] >= c->nodes) return 4;
    for (int i = 0; c->rows && i < c->num_rows; i++)
        if (c->rows[i] <= (i ? c->rows[i - 1] : -1) || c->rows[i] >= c->batch) return 7;
    for (int b = 0; b < c->batch; b++)
        if (c->committed[b] < 0 || c->committed[b] + c->nodes > c->slots) return 1000 + b;
    return c->index && c->recent ? check_ends(c, c->index) : 0;
}

static int64_t most_chunks(const Call *c) {
    int64_t most = 1;
    for (int i = 0; i < row_count(c); i++) {
        int64_t chunks = chunks_of(c, c->rows ? c->rows[i] : i);
        most = chunks > most ? chunks : most;
    }
    return most;
}

/* Floats of workspace that the call needs. */
int64_t tree_attention_workspace(const Call *c) { return (int64_t)c->batch * c->kv_heads * most_chunks(c) * row_floats(c); }

int tree_attention_width(void) { return W; }

/* Every thread of a team calls this; it ends with a barrier. Also right outside of any team. */
static void attend_together(const Call *c, BlockFn block, int64_t most) {
    int64_t pairs = (int64_t)row_count(c) * c->kv_heads, size = row_floats(c);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pairs * most; task++) {
        int i = (int)(task / most / c->kv_heads), b = c->rows ? c->rows[i] : i, h = (int)(task / most % c->kv_heads);
        int64_t piece = task % most, chunks = chunks_of(c, b), begin = piece * CHUNK, total = keys_of(c, b).total;
        if (piece >= chunks) continue;
        float *part = c->workspace + task * size;
        chunk(c, block, b, h, begin, begin + CHUNK < total ? begin + CHUNK : total, part);
        if (chunks == 1) merge(c, b, h, 1, part);
    }
    if (most > 1) {
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < pairs; pair++) {
            int i = (int)(pair / c->kv_heads), b = c->rows ? c->rows[i] : i, h = (int)(pair % c->kv_heads);
            if (chunks_of(c, b) > 1) merge(c, b, h, chunks_of(c, b), c->workspace + pair * most * size);
        }
    }
}

int tree_attention(const Call *c) {
    int wrong = tree_attention_check(c);
    if (wrong) return wrong;
    if (c->workspace == NULL) return 6;
    BlockFn block = block_function(c);
    int64_t most = most_chunks(c);
#pragma omp parallel num_threads(c->threads) if (c->threads > 1)
    attend_together(c, block, most);
    return 0;
}
