/* One forward of a Llama-style decoder for a few tokens per sequence, on CPUs. What is computed: reference.py beside this file.
 *
 * All of it runs in one team of threads: matrix products split by output columns, attention by (sequence, head, chunk), a
 * barrier in between. Every output element is summed in one order, whatever the number of rows, threads or sequences, so
 * scoring five tokens at once gives bit for bit what five single steps give.
 */
#include <omp.h>
#include <time.h>

#ifdef __AVX512F__
#define TILE_ROWS 8 /* 8 x 3 accumulators, 3 weight vectors and a broadcast fit in 32 registers */
#else
#define TILE_ROWS 4
#endif
#define TILE_VECTORS 3
#define MAX_BATCH 65536 /* sequences of a call: a few lists over them lie on the stack */

/* A block's weights. Matrices are packed: panels of W output columns, [panel][input][W]; see decoder_pack. */
typedef struct {
    const void *qkv, *out, *gate, *up, *down;
    const float *input_norm, *post_norm, *q_norm, *k_norm, *qkv_bias, *out_bias; /* the last four may be NULL */
} Layer;

typedef struct {
    const Layer *layers;
    const void *embedding; /* [vocab, hidden] as stored */
    const void *head;      /* packed [vocab, hidden] */
    const float *norm, *cosine, *sine; /* the tables: [positions, dim / 2] */
    int64_t positions;
    int32_t num_layers, hidden, heads, kv_heads, dim, intermediate, vocab, bf16;
    float eps;
} Model;

typedef struct {
    const Model *model;
    Call *attention;        /* k and v of layer 0; q and out are ours */
    const int64_t *tokens;  /* [batch, queries] */
    const int32_t *keep;    /* [num_keep] query indices whose logits are wanted */
    float *logits;          /* [batch, num_keep, vocab] */
    int64_t *best;          /* [batch, num_keep] arg-max of the logits, the first of equals */
    float *scratch;         /* from decoder_scratch, aligned to 64 bytes */
    int64_t kv_layer;       /* elements from one layer's keys to the next one's */
    int64_t attention_ns;   /* out */
    int32_t num_keep;
} Forward;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t panels_of(int64_t columns) { return (columns + W - 1) / W; }

/* sums[r][v] = x[r] . w over k inputs, for `rows` rows and `vectors` panels. One order of summation, whatever the tile. */
INLINE void tile(const float *x, int64_t x_row, const void *w, int64_t k, vf *sums, int rows, int vectors, int bf16) {
    vf a[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) a[r][v] = splat(0.0f);
    for (int64_t i = 0; i < k; i++) {
        vf b[TILE_VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) b[v] = load(w, (v * k + i) * W, bf16);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            vf s = splat(x[r * x_row + i]);
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) a[r][v] += s * b[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sums[r * TILE_VECTORS + v] = a[r][v];
}

typedef void (*TileFn)(const float *, int64_t, const void *, int64_t, vf *);
#define TILE(R, V, BF)                                                                                                \
    static __attribute__((noinline)) void tile_##R##_##V##_##BF(const float *x, int64_t x_row, const void *w, int64_t k, \
                                                                vf *sums) {                                            \
        tile(x, x_row, w, k, sums, R, V, BF);                                                                          \
    }
#define TILES(BF)                                                                                                     \
    TILE(1, 1, BF) TILE(1, 2, BF) TILE(1, 3, BF) TILE(2, 1, BF) TILE(2, 2, BF) TILE(2, 3, BF) TILE(4, 1, BF)           \
    TILE(4, 2, BF) TILE(4, 3, BF)
TILES(0)
TILES(1)
#if TILE_ROWS == 8
TILE(8, 1, 0) TILE(8, 2, 0) TILE(8, 3, 0) TILE(8, 1, 1) TILE(8, 2, 1) TILE(8, 3, 1)
#define OF(R, BF) {tile_##R##_1_##BF, tile_##R##_2_##BF, tile_##R##_3_##BF}
static const TileFn TILE_OF[2][4][3] = {{OF(1, 0), OF(2, 0), OF(4, 0), OF(8, 0)}, {OF(1, 1), OF(2, 1), OF(4, 1), OF(8, 1)}};
#else
#define OF(R, BF) {tile_##R##_1_##BF, tile_##R##_2_##BF, tile_##R##_3_##BF}
static const TileFn TILE_OF[2][3][3] = {{OF(1, 0), OF(2, 0), OF(4, 0)}, {OF(1, 1), OF(2, 1), OF(4, 1)}};
#endif

/* Write a tile's sums: y (+)= sums + bias, for at most `columns` columns. */
static void write_tile(const vf *sums, const float *bias, float *y, int64_t y_row, int64_t columns, int rows, int add) {
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < TILE_VECTORS && v * W < columns; v++) {
            vf sum = sums[r * TILE_VECTORS + v];
            float *to = y + r * y_row + v * W;
            if (columns - v * W >= W) {
                if (bias) sum += *(const vf_u *)(bias + v * W);
                if (add) sum += *(const vf_u *)to;
                *(vf_u *)to = sum;
                continue;
            }
            for (int c = 0; c < columns - v * W; c++) to[c] = sum[c] + (bias ? bias[v * W + c] : 0) + (add ? to[c] : 0);
        }
}

/* y (+)= x w^T + bias for the panels [from, to). x [rows, k], y [rows, columns], w packed. */
static void multiply(const float *x, int64_t rows, const void *w, int64_t k, const float *bias, float *y, int64_t columns,
                     int64_t from, int64_t to, int bf16, int add) {
    vf sums[TILE_ROWS * TILE_VECTORS];
    for (int64_t first = from; first < to; first += TILE_VECTORS) {
        int64_t vectors = to - first < TILE_VECTORS ? to - first : TILE_VECTORS;
        const void *panel = (const char *)w + first * k * W * (bf16 ? 2 : 4);
        int64_t last = (first + vectors) * W < columns ? (first + vectors) * W : columns;
        for (int64_t r = 0, some; r < rows; r += some) {
            int size = rows - r >= 8 && TILE_ROWS == 8 ? 3 : rows - r >= 4 ? 2 : rows - r >= 2 ? 1 : 0;
            some = 1 << size;
            TILE_OF[bf16][size][vectors - 1](x + r * k, k, panel, k, sums);
            write_tile(sums, bias ? bias + first * W : NULL, y + r * columns + first * W, columns, last - first * W, (int)some, add);
        }
    }
}

/* Who does what: `member` of `team` threads. */
typedef struct {
    int member, team;
} Share;

/* This member's panels of a matrix with `columns` outputs, in whole tiles. */
static void own_panels(Share s, int64_t columns, int64_t *from, int64_t *to) {
    int64_t panels = panels_of(columns), tiles = (panels + TILE_VECTORS - 1) / TILE_VECTORS;
    *from = tiles * s.member / s.team * TILE_VECTORS;
    *to = tiles * (s.member + 1) / s.team * TILE_VECTORS;
    if (*to > panels) *to = panels;
    if (*from > panels) *from = panels;
}

/* to[n] = from[n] / rms(from) * weight[n] (Zhang 2019). */
static void rms_norm(const float *from, const float *weight, float *to, int64_t n, float eps) {
    vf squares = splat(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        vf x = *(const vf_u *)(from + i);
        squares += x * x;
    }
    float sum = lane_sum(squares);
    for (; i < n; i++) sum += from[i] * from[i];
    float factor = 1.0f / sqrtf(sum / n + eps);
    for (i = 0; i < n; i++) to[i] = from[i] * factor * weight[i];
}

/* gate[n] = silu(gate[n]) * up[n] */
static void swiglu(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        float some_x[W] __attribute__((aligned(64))) = {0}, some_u[W] __attribute__((aligned(64))) = {0};
        int64_t some = n - i < W ? n - i : W;
        vf x, u;
        if (some == W) {
            x = *(const vf_u *)(gate + i);
            u = *(const vf_u *)(up + i);
        } else {
            memcpy(some_x, gate + i, some * sizeof(float));
            memcpy(some_u, up + i, some * sizeof(float));
            x = *(vf *)some_x;
            u = *(vf *)some_u;
        }
        vi negative = x < splat(0.0f);
        vf size = (vf)((negative & (vi)(-x)) | (~negative & (vi)x));
        vf z = exp2_nonpositive(size * splat(-1.44269504089f)); /* e^-|x|, so nothing overflows */
        vf top = (vf)((negative & (vi)z) | (~negative & (vi)splat(1.0f)));
        vf y = x * (top / (splat(1.0f) + z)) * u;
        if (some == W) *(vf_u *)(gate + i) = y;
        else memcpy(gate + i, &y, some * sizeof(float));
    }
}

/* x[0..dim) rotated by its position: halves paired (Su 2021, as in Llama checkpoints of Hugging Face). */
static void rotate(float *x, const float *cosine, const float *sine, int half) {
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[i] + a * sine[i];
    }
}

static void store_kv(void *rows, int64_t at, const float *from, int dim, int bf16) {
    if (!bf16) {
        memcpy((float *)rows + at, from, dim * sizeof(float));
        return;
    }
    uint16_t *to = (uint16_t *)rows + at;
    for (int d = 0; d < dim; d++) { /* to nearest, ties to even */
        uint32_t bits;
        memcpy(&bits, from + d, 4);
        to[d] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/* Norm, rotate and append what one head of one token projected: query heads first, then keys, then values. */
static void finish_head(const Model *m, const Call *c, const Layer *layer, int64_t token, int head, float *x) {
    int64_t b = token / c->queries, node = c->query_node[token % c->queries];
    int64_t slot = c->committed[b] + node, position = c->committed[b] + c->node_depth[node];
    int half = m->dim / 2, is_query = head < m->heads, is_key = !is_query && head < m->heads + m->kv_heads;
    const float *norm = is_query ? layer->q_norm : is_key ? layer->k_norm : NULL;
    if (norm) rms_norm(x, norm, x, m->dim, m->eps);
    if (is_query || is_key) rotate(x, m->cosine + position * half, m->sine + position * half, half);
    if (is_query) return;
    int h = is_key ? head - m->heads : head - m->heads - m->kv_heads;
    int64_t at = b * c->kv_batch + h * c->kv_head + slot * c->kv_slot;
    store_kv((void *)(is_key ? c->k : c->v), at, x, m->dim, c->bf16);
}

/* Consecutive tokens of sequences that are computed; finished sequences lie between two runs. */
typedef struct {
    int64_t first, count;
} Run;

/* What the team works in. Matrices have a row per token of the batch; rows of finished sequences are left alone. */
typedef struct {
    const Run *runs;
    int64_t num_runs, tokens, width; /* width: (heads + 2 kv_heads) * dim */
    float *hidden, *qkv, *attended, *gate, *up, *normed;
} Work;

static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

static Work work_of(const Forward *f, const Run *runs, int64_t num_runs) {
    const Model *m = f->model;
    const Call *c = f->attention;
    Work a = {runs, num_runs, (int64_t)c->batch * c->queries, (int64_t)(m->heads + 2 * m->kv_heads) * m->dim};
    float *at = f->scratch;
    a.hidden = at, at += padded(a.tokens * m->hidden);
    a.qkv = at, at += padded(a.tokens * a.width);
    a.attended = at, at += padded(a.tokens * m->heads * m->dim);
    a.gate = at, at += padded(a.tokens * m->intermediate);
    a.up = at, at += padded(a.tokens * m->intermediate);
    a.normed = at; /* one for each member */
    return a;
}

/* Floats of scratch memory that a forward of `tokens` tokens (of all sequences) by `threads` threads needs. */
int64_t decoder_scratch(const Model *m, int64_t tokens, int threads) {
    int64_t width = (int64_t)(m->heads + 2 * m->kv_heads) * m->dim;
    return padded(tokens * width) + padded(tokens * m->heads * m->dim) + 2 * padded(tokens * m->intermediate) +
           (1 + threads) * padded(tokens * m->hidden);
}

/* y (+)= x w^T + bias: this member's columns, for all computed tokens. */
static void product(const Model *m, const Work *a, Share s, const float *x, const void *w, int64_t k, const float *bias,
                    float *y, int64_t columns, int add) {
    int64_t from, to;
    own_panels(s, columns, &from, &to);
    for (int64_t i = 0; i < a->num_runs; i++) {
        int64_t first = a->runs[i].first;
        multiply(x + first * k, a->runs[i].count, w, k, bias, y + first * columns, columns, from, to, m->bf16, add);
    }
}

/* The hidden state through a norm, in this member's own copy: cheaper than a barrier. */
static const float *normed(const Model *m, const Work *a, Share s, const float *weight) {
    float *to = a->normed + s.member * padded(a->tokens * m->hidden);
    for (int64_t i = 0; i < a->num_runs; i++)
        for (int64_t r = a->runs[i].first; r < a->runs[i].first + a->runs[i].count; r++)
            rms_norm(a->hidden + r * m->hidden, weight, to + r * m->hidden, m->hidden, m->eps);
    return to;
}

static void embed(const Forward *f, const Work *a, Share s) {
    const Model *m = f->model;
    for (int64_t i = 0; i < a->num_runs; i++)
        for (int64_t r = a->runs[i].first + s.member; r < a->runs[i].first + a->runs[i].count; r += s.team)
            for (int d = 0; d < m->hidden; d++) {
                int64_t at = f->tokens[r] * m->hidden + d;
                uint32_t bits = m->bf16 ? (uint32_t)((const uint16_t *)m->embedding)[at] << 16 : ((const uint32_t *)m->embedding)[at];
                memcpy(a->hidden + r * m->hidden + d, &bits, 4);
            }
}

/* The part of a block before attention: norm, projections, positions, append. */
static void project(const Model *m, const Call *c, const Layer *layer, const Work *a, Share s) {
    product(m, a, s, normed(m, a, s, layer->input_norm), layer->qkv, m->hidden, layer->qkv_bias, a->qkv, a->width, 0);
#pragma omp barrier
    int heads = m->heads + 2 * m->kv_heads;
    for (int64_t i = 0; i < a->num_runs; i++) {
        int64_t all = a->runs[i].count * heads;
        for (int64_t part = all * s.member / s.team; part < all * (s.member + 1) / s.team; part++) {
            int64_t token = a->runs[i].first + part / heads;
            finish_head(m, c, layer, token, (int)(part % heads), a->qkv + token * a->width + part % heads * m->dim);
        }
    }
#pragma omp barrier
}

/* The part of a block after attention: output projection, then the MLP, both added to the hidden state. */
static void finish_block(const Model *m, const Layer *layer, const Work *a, Share s) {
    product(m, a, s, a->attended, layer->out, (int64_t)m->heads * m->dim, layer->out_bias, a->hidden, m->hidden, 1);
#pragma omp barrier
    const float *x = normed(m, a, s, layer->post_norm);
    product(m, a, s, x, layer->gate, m->hidden, NULL, a->gate, m->intermediate, 0);
    product(m, a, s, x, layer->up, m->hidden, NULL, a->up, m->intermediate, 0);
    int64_t from, to;
    own_panels(s, m->intermediate, &from, &to); /* the columns that this member has just made: no barrier yet */
    int64_t first = from * W, end = to * W < m->intermediate ? to * W : m->intermediate;
    for (int64_t i = 0; i < a->num_runs; i++)
        for (int64_t r = a->runs[i].first; r < a->runs[i].first + a->runs[i].count && first < end; r++)
            swiglu(a->gate + r * m->intermediate + first, a->up + r * m->intermediate + first, end - first);
#pragma omp barrier
    product(m, a, s, a->gate, layer->down, m->intermediate, NULL, a->hidden, m->hidden, 1);
#pragma omp barrier
}

/* Index of the largest of n numbers, the first of equals. */
static int64_t arg_max(const float *x, int64_t n) {
    int64_t best = 0;
    float top = x[0];
    for (int64_t i = 0; i < n; i += 64) { /* a block's maximum first: that compiles to vectors */
        int64_t end = i + 64 < n ? i + 64 : n;
        float highest = x[i];
        for (int64_t j = i; j < end; j++) highest = x[j] > highest ? x[j] : highest;
        if (!(highest > top)) continue;
        top = highest;
        for (best = i; x[best] != top; best++) {}
    }
    return best;
}

/* Logits of the kept queries, and their arg-max. */
static void score_vocabulary(const Forward *f, const Work *a, Share s) {
    const Model *m = f->model;
    int64_t queries = f->attention->queries, from, to;
    float *kept = a->normed + s.member * padded(a->tokens * m->hidden);
    own_panels(s, m->vocab, &from, &to);
    for (int64_t i = 0; i < a->num_runs; i++) {
        int64_t first = a->runs[i].first / queries * f->num_keep, count = a->runs[i].count / queries * f->num_keep;
        for (int64_t r = first; r < first + count; r++) {
            int64_t token = r / f->num_keep * queries + f->keep[r % f->num_keep];
            rms_norm(a->hidden + token * m->hidden, m->norm, kept + r * m->hidden, m->hidden, m->eps);
        }
        multiply(kept + first * m->hidden, count, m->head, m->hidden, NULL, f->logits + first * m->vocab, m->vocab, from, to,
                 m->bf16, 0);
    }
#pragma omp barrier
    for (int64_t i = 0; i < a->num_runs; i++) {
        int64_t first = a->runs[i].first / queries * f->num_keep, count = a->runs[i].count / queries * f->num_keep;
        for (int64_t r = first + s.member; r < first + count; r += s.team)
            f->best[r] = arg_max(f->logits + r * m->vocab, m->vocab);
    }
}

static int64_t runs_of(const Call *c, Run *runs) {
    int64_t count = 0;
    for (int i = 0; i < row_count(c); i++) {
        int64_t b = c->rows ? c->rows[i] : i, first = b * c->queries;
        if (count && runs[count - 1].first + runs[count - 1].count == first) runs[count - 1].count += c->queries;
        else runs[count++] = (Run){first, c->queries};
    }
    return count;
}

/* 0, or why nothing may be touched: a code of tree_attention_check; 8 sizes; 9 a kept query; 12 sequences; 2000000 + i: token i is not in
 * the vocabulary or beyond the positions. */
static int decoder_check(const Forward *f) {
    const Model *m = f->model;
    const Call *c = f->attention;
    int wrong = tree_attention_check(c);
    if (wrong) return wrong;
    if (c->batch > MAX_BATCH) return 12;
    if (m->heads != c->heads || m->kv_heads != c->kv_heads || m->dim != c->dim || m->hidden < 1 || m->num_layers < 1) return 8;
    for (int l = 1; c->index && c->recent && l < m->num_layers; l++) /* layer 0 is checked */
        if ((wrong = check_ends(c, c->index + l * c->index_layer))) return wrong;
    for (int i = 0; i < f->num_keep; i++)
        if (f->keep[i] < 0 || f->keep[i] >= c->queries) return 9;
    for (int64_t j = 0; j < (int64_t)row_count(c) * c->queries; j++) {
        int64_t b = c->rows ? c->rows[j / c->queries] : j / c->queries, t = j % c->queries, i = b * c->queries + t;
        int64_t position = c->committed[b] + c->node_depth[c->query_node[t]];
        if (f->tokens[i] < 0 || f->tokens[i] >= m->vocab || position >= m->positions) return 2000000 + (int)i;
    }
    return 0;
}

/* All of a forward, by every thread of a team; ends with a barrier. Returns nanoseconds in attention (the first member's). */
static int64_t forward_together(const Forward *f, const Call *given, const Work *a, Share s, BlockFn block, int64_t most) {
    const Model *m = f->model;
    Call c = *given;
    int64_t attended_ns = 0;
    embed(f, a, s);
#pragma omp barrier
    for (int l = 0; l < m->num_layers; l++) {
        int64_t skip = l * f->kv_layer * (c.bf16 ? 2 : 4);
        c.k = (const char *)given->k + skip;
        c.v = (const char *)given->v + skip;
        if (given->index) c.index = given->index + l * given->index_layer;
        project(m, &c, m->layers + l, a, s);
        int64_t start = s.member ? 0 : now_ns();
        attend_together(&c, block, most);
        if (!s.member) attended_ns += now_ns() - start;
        finish_block(m, m->layers + l, a, s);
    }
    if (f->num_keep) score_vocabulary(f, a, s);
#pragma omp barrier
    return attended_ns;
}

/* Where attention finds its queries and puts its output. */
static void set_places(const Work *a, Call *c) {
    c->q = a->qkv, c->out = a->attended, c->lse = NULL;
    c->q_query = a->width, c->q_batch = c->queries * a->width, c->q_head = c->out_head = c->dim;
    c->out_query = (int64_t)c->heads * c->dim, c->out_batch = c->queries * c->out_query;
}

/* 0, or a code of decoder_check; 10: scratch or workspace is missing. */
int decoder_forward(Forward *f) {
    int wrong = decoder_check(f);
    if (wrong) return wrong;
    if (!f->scratch || !f->attention->workspace) return 10;
    Run runs[f->attention->batch];
    Work a = work_of(f, runs, runs_of(f->attention, runs));
    set_places(&a, f->attention);
    BlockFn block = block_function(f->attention);
    int64_t most = most_chunks(f->attention), attended_ns = 0;
#pragma omp parallel num_threads(f->attention->threads) if (f->attention->threads > 1)
    {
        Share s = {omp_get_thread_num(), omp_get_num_threads()};
        int64_t ns = forward_together(f, f->attention, &a, s, block, most);
        if (!s.member) attended_ns = ns;
    }
    f->attention_ns = attended_ns;
    return 0;
}

/* Pack w [columns, k], float32 or bfloat16, into panels; `to` holds panels * k * W elements. */
void decoder_pack(const void *w, int64_t columns, int64_t k, int bf16, void *to) {
    int64_t size = bf16 ? 2 : 4;
    for (int64_t p = 0; p < panels_of(columns); p++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t lane = 0; lane < W; lane++) {
                char *cell = (char *)to + ((p * k + i) * W + lane) * size;
                if (p * W + lane < columns) memcpy(cell, (const char *)w + ((p * W + lane) * k + i) * size, size);
                else memset(cell, 0, size);
            }
}

int64_t decoder_packed(int64_t columns, int64_t k) { return panels_of(columns) * k * W; }
