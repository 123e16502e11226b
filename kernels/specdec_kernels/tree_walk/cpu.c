/* One level of the way down a drafted tree, on CPUs. What is computed: reference.py beside this file. */
typedef struct {
    const float *law;        /* [batch, vocab] the target's, at each row's node */
    const float *drawn_from; /* [batch, fed, vocab] what each fed node's children were drawn from; NULL: children are matched */
    const int64_t *tokens;   /* [batch, nodes] */
    const uint8_t *exists;   /* [batch, nodes] or NULL: all */
    const int32_t *children; /* [nodes + 1] how many each node has, breadth-first */
    const int64_t *sequences, *first; /* [batch]; first: position of the first token that the walk decides */
    int64_t *node;           /* [batch] where each row stands */
    int64_t *made;           /* [batch, 3 * depth + 2]: how many are accepted; their nodes; their ranks; the tokens emitted */
    double *space;           /* [threads, 2, vocab] */
    uint64_t seed;
    int64_t vocab;
    int32_t batch, nodes, fed, depth, level, target, accept, residual, threads;
} Walk;

/* Eight sums side by side: the order is fixed, and no addition waits for the one before it. */
static double sum_of(const double *x, int64_t n) {
    double sums[8] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += x[i + j];
    for (int j = 0; j < 8; j++) total += sums[j];
    for (; i < n; i++) total += x[i];
    return total;
}

/* Sum of max(left - offered, 0), in the order of sum_of. */
static double rest_of(const double *left, const double *offered, int64_t n) {
    double sums[8] = {0}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += left[i + j] > offered[i + j] ? left[i + j] - offered[i + j] : 0;
    for (int j = 0; j < 8; j++) total += sums[j];
    for (; i < n; i++) total += left[i] > offered[i] ? left[i] - offered[i] : 0;
    return total;
}

static void divide(double *x, int64_t n, double by) {
    for (int64_t i = 0; i < n; i++) x[i] /= by;
}

/* A uniform in [0, 1) of a position: the first word of block `lane`. */
static double uniform_of(const Walk *w, int b, int purpose, int lane) {
    vu words[4];
    uint32_t position = (uint32_t)(w->first[b] + w->level), sequence = (uint32_t)w->sequences[b];
    philox_lanes((uint32_t)lane, position, sequence, (uint32_t)purpose, w->seed, words);
    return words[0][0] * 0x1p-32;
}

/* The first token whose cumulated weight exceeds u times the whole. */
static int64_t draw_from(const double *weights, int64_t n, double u) {
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) total += weights[i];
    for (int64_t i = 0; i < n; i++)
        if ((sum += weights[i]) > u * total) return i;
    return n - 1;
}

static int is_there(const Walk *w, int b, int child) {
    int64_t at = (int64_t)b * w->nodes + child - 1;
    return (!w->exists || w->exists[at]) && w->tokens[at] >= 0 && w->tokens[at] < w->vocab;
}

/* Rank of the child that equals what the target draws, 0: none. */
static int match(const Walk *w, int b, int child, int count, int64_t *token) {
    int64_t position = w->first[b] + w->level;
    Noise noise = {w->sequences + b, &position, w->seed, w->vocab, 1, 1, w->target, 1};
    *token = draw_token(&noise, 0, w->law + b * w->vocab);
    for (int rank = 1; rank <= count; rank++)
        if (is_there(w, b, child + rank - 1) && w->tokens[(int64_t)b * w->nodes + child + rank - 2] == *token) return rank;
    return 0;
}

/* Rank of the first child that passes its test, 0: none, and then the token is drawn from what the refusals left. */
static int test(const Walk *w, int b, int child, int count, const float *drawn_from, double *space, int64_t *token) {
    int64_t n = w->vocab;
    double *left = space, *offered = space + n;
    for (int64_t i = 0; i < n; i++) left[i] = w->law[b * n + i];
    divide(left, n, sum_of(left, n));
    for (int64_t i = 0; i < n && count; i++) offered[i] = drawn_from[i];
    for (int rank = 1; rank <= count; rank++) {
        int there = is_there(w, b, child + rank - 1);
        *token = w->tokens[(int64_t)b * w->nodes + child + rank - 2];
        double whole = sum_of(offered, n);
        divide(offered, n, whole > 2.2250738585072014e-308 ? whole : 2.2250738585072014e-308);
        if (!there || !(offered[*token] > 0)) { /* a dead child: the draft's law had run out */
            if (*token >= 0 && *token < n) offered[*token] = 0;
            continue;
        }
        double d = offered[*token], r = left[*token], mass = rest_of(left, offered, n);
        /* an empty residual means R = D, where refusal has chance zero: rounding brought us here */
        if (r > 0 && (uniform_of(w, b, w->accept, rank - 1) * d < r || mass <= 0)) return rank;
        if (mass > 0)
            for (int64_t i = 0; i < n; i++) left[i] = left[i] > offered[i] ? (left[i] - offered[i]) / mass : 0;
        offered[*token] = 0;
    }
    *token = draw_from(left, n, uniform_of(w, b, w->residual, 0));
    return 0;
}

/* One row. Returns whether it descends. */
static int walk_row(const Walk *w, int b, double *space) {
    int64_t *made = w->made + (int64_t)b * (3 * w->depth + 2), node = w->node[b], token = 0;
    if (made[0] != w->level) return 0; /* this row stands already */
    int child = 1, fed = 0, count = w->children[node];
    for (int64_t v = 0; v < node; v++) child += w->children[v], fed += w->children[v] > 0;
    const float *from = w->drawn_from ? w->drawn_from + ((int64_t)b * w->fed + fed) * w->vocab : NULL;
    int rank = from ? test(w, b, child, count, from, space, &token) : match(w, b, child, count, &token);
    made[1 + 2 * w->depth + w->level] = token;
    if (!rank) return 0;
    made[0] = w->level + 1, made[1 + w->level] = w->node[b] = child + rank - 1, made[1 + w->depth + w->level] = rank;
    return 1;
}

/* Returns how many rows descend; -1, and nothing is touched: this is no tree, or a row stands outside of it or too deep. */
int tree_walk_step(const Walk *w) {
    int64_t next = 1, fed = 0;
    if (w->batch < 1 || w->nodes < 1 || w->vocab < 1 || w->level < 0 || w->level > w->depth || w->threads < 1) return -1;
    for (int v = 0; v <= w->nodes; v++) {
        if (w->children[v] < 0 || v >= next || w->children[v] > w->nodes) return -1;
        next += w->children[v], fed += w->children[v] > 0;
    }
    if (next != w->nodes + 1 || (w->drawn_from && (fed != w->fed || !w->space))) return -1;
    for (int b = 0; b < w->batch; b++) {
        if (w->node[b] < 0 || w->node[b] > w->nodes) return -1;
        int moves = w->made[(int64_t)b * (3 * w->depth + 2)] == w->level;
        if (moves && w->level == w->depth && w->children[w->node[b]]) return -1; /* there is no room for one more */
    }
    int moving = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(w->threads) reduction(+ : moving) if (w->threads > 1 && w->batch > 1)
    for (int b = 0; b < w->batch; b++)
        moving += walk_row(w, b, w->space ? w->space + 2 * omp_get_thread_num() * w->vocab : NULL);
    return moving;
}
