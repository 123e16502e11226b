/* A chain or a tree drafted level by level without leaving the team: forward, choice of the children, next forward.
 *
 * Node 0 is the root and nodes are numbered breadth-first, so how many children each node has is the whole tree. Only nodes
 * with children are fed. Node v lies at slot committed + v. What is computed: drafted() in reference.py beside this file.
 */
#define MAX_DRAFTED 64

typedef struct {
    Forward *first;          /* its queries are the root, and the token before it where lag = 1; only the root is kept */
    const int32_t *children; /* [nodes + 1] how many each node has */
    const int64_t *sequences;
    int64_t *tokens; /* [batch, nodes] out */
    float *laws;     /* [batch, fed nodes, vocab] out: what the children were drawn from by weight, else NULL */
    uint64_t seed;
    float temperature; /* 0: the most likely tokens */
    int32_t nodes, purpose, coupled;
    int64_t choosing_ns; /* out */
} Draft;

/* What follows from the numbers of children. A depth is a level; fed nodes are counted over all levels. */
typedef struct {
    int levels, fed, widest;
    int first[MAX_DRAFTED + 1];                       /* of a level: its first fed node; then the number of fed nodes */
    int32_t node[MAX_DRAFTED], child[MAX_DRAFTED];    /* of a fed node: its number, and its first child's */
    uint64_t sees[MAX_DRAFTED];                       /* of a fed node: its ancestors and itself */
    int32_t depth[MAX_DRAFTED + 1];                   /* of a node */
    int place[MAX_DRAFTED + 1];                       /* of a node: which of the fed it is, -1 for a leaf */
} Levels;

/* What a draft works in: floats of scratch and of workspace, fed nodes in all, and of the widest level. */
typedef struct {
    int64_t scratch, workspace, fed, widest;
} Sizes;

/* 0, or 11 where these are not the numbers of children of a tree of 1 to MAX_DRAFTED nodes below the root. */
static int lay_out(const int32_t *children, int nodes, Levels *l) {
    if (nodes < 1 || nodes > MAX_DRAFTED) return 11;
    uint64_t line[MAX_DRAFTED + 1] = {1};
    int next = 1;
    l->levels = l->fed = l->widest = l->depth[0] = 0;
    for (int v = 0; v <= nodes; v++) {
        if (v >= next || children[v] < 0 || children[v] > nodes + 1 - next) return 11;
        l->place[v] = children[v] ? l->fed : -1;
        if (!children[v]) continue;
        if (!l->fed || l->depth[v] > l->depth[l->node[l->fed - 1]]) l->first[l->levels++] = l->fed;
        l->node[l->fed] = v, l->child[l->fed] = next, l->sees[l->fed++] = line[v];
        for (int end = next + children[v]; next < end; next++) {
            l->depth[next] = l->depth[v] + 1;
            line[next] = line[v] | (next < 64 ? 1ull << next : 0); /* the last of 64 is a leaf: nobody looks for it */
        }
    }
    l->first[l->levels] = l->fed;
    for (int i = 0; i < l->levels; i++)
        if (l->first[i + 1] - l->first[i] > l->widest) l->widest = l->first[i + 1] - l->first[i];
    return next == nodes + 1 ? 0 : 11;
}

/* What the forward of a level reads; the first one's own call stands in Draft. */
static Call level_call(const Draft *d, const Levels *l, int level, const int64_t *committed) {
    Call c = *d->first->attention;
    if (!level) return c;
    int at = l->first[level];
    c.committed = committed, c.queries = l->first[level + 1] - at, c.nodes = l->node[l->first[level + 1] - 1] + 1;
    c.corner = l->sees + at, c.query_node = l->node + at, c.node_depth = l->depth;
    return c;
}

/* Committed tokens per sequence where the root is the next one. */
static void before_root(const Draft *d, int64_t *committed) {
    const Call *c = d->first->attention;
    for (int b = 0; b < c->batch; b++) committed[b] = c->committed[b] + c->queries - 1;
}

/* 0, or a code of decoder_check for the first forward; 11: not a tree, or one too large for slots, positions or vocabulary. */
static int draft_check(const Draft *d, Levels *l) {
    const Call *c = d->first->attention;
    const Model *m = d->first->model;
    int wrong = decoder_check(d->first);
    if (wrong || (wrong = lay_out(d->children, d->nodes, l))) return wrong;
    if (c->queries > 2 || d->first->num_keep != 1 || d->first->keep[0] != c->queries - 1) return 11;
    int32_t last = l->node[l->fed - 1];
    for (int b = 0; b < c->batch; b++) {
        int64_t committed = c->committed[b] + c->queries - 1;
        if (committed + last + 1 > c->slots || committed + l->depth[last] >= m->positions) return 11;
    }
    for (int v = 0; v <= d->nodes; v++)
        if (d->children[v] > m->vocab) return 11;
    return 0;
}

/* How much memory a draft needs. Codes: draft_check. */
int decoder_draft_sizes(const Draft *d, Sizes *sizes) {
    Levels l;
    const Call *given = d->first->attention;
    int wrong = draft_check(d, &l);
    if (wrong) return wrong;
    int64_t committed[given->batch];
    before_root(d, committed);
    int widest = l.widest > given->queries ? l.widest : given->queries;
    *sizes = (Sizes){decoder_scratch(d->first->model, (int64_t)given->batch * widest, given->threads), 0, l.fed, l.widest};
    for (int level = 0; level < l.levels; level++) {
        Call c = level_call(d, &l, level, committed);
        int64_t floats = tree_attention_workspace(&c);
        if (floats > sizes->workspace) sizes->workspace = floats;
    }
    return 0;
}

/* law = softmax(logits / temperature) */
static void soften(const float *logits, float temperature, float *law, int64_t n) {
    float factor = 1.44269504089f / temperature, top = logits[arg_max(logits, n)];
    double total = 0;
    for (int64_t i = 0; i < n; i += W) {
        float some[W] __attribute__((aligned(64)));
        int64_t count = n - i < W ? n - i : W;
        for (int64_t j = 0; j < W; j++) some[j] = j < count ? (logits[i + j] - top) * factor : -INFINITY;
        *(vf *)some = exp2_nonpositive(*(vf *)some);
        total += lane_sum(*(vf *)some);
        memcpy(law + i, some, count * sizeof(float));
    }
    float scale = (float)(1.0 / total);
    for (int64_t i = 0; i < n; i++) law[i] *= scale;
}

/* The first token whose cumulated weight exceeds the uniform's share of the whole; weights of zero are never drawn. Where
 * nothing else is left, the last token: verifiers know such a child by its weight. */
static int64_t draw_by_weight(const float *law, int64_t n, uint32_t word) {
    double total = 0, sum = 0;
    for (int64_t i = 0; i < n; i++) total += law[i];
    double wanted = word * 0x1p-32 * total;
    for (int64_t i = 0; i < n; i++) {
        sum += law[i];
        if (sum > wanted) return i;
    }
    return n - 1;
}

/* The `most` tokens of least key seen so far, the first of equals first. */
typedef struct {
    int held, most;
    double keys[MAX_DRAFTED];
    int64_t tokens[MAX_DRAFTED];
} Least;

static inline void offer(Least *l, double key, int64_t token) {
    if (l->held == l->most && !(key < l->keys[l->held - 1])) return;
    int at = l->held < l->most ? l->held++ : l->held - 1;
    for (; at && key < l->keys[at - 1]; at--) l->keys[at] = l->keys[at - 1], l->tokens[at] = l->tokens[at - 1];
    l->keys[at] = key, l->tokens[at] = token;
}

/* The most likely tokens. */
static void take_best(const float *logits, int64_t n, Least *l) {
    for (int64_t i = 0; i < n; i += 64) { /* a block's maximum first: that compiles to vectors */
        int64_t end = i + 64 < n ? i + 64 : n;
        float highest = logits[i];
        for (int64_t j = i; j < end; j++) highest = logits[j] > highest ? logits[j] : highest;
        if (l->held == l->most && !(-(double)highest < l->keys[l->held - 1])) continue;
        for (int64_t j = i; j < end; j++) offer(l, -(double)logits[j], j);
    }
}

/* The tokens of largest log law + Gumbel noise of the position. */
static void take_noisy(const Noise *noise, const float *law, Least *l) {
    for (int64_t first = 0; first < noise->count; first += 4 * W) {
        double ratios[4 * W] __attribute__((aligned(64)));
        ratios_of(noise, 0, law, first, ratios);
        int64_t some = noise->count - first < 4 * W ? noise->count - first : 4 * W;
        for (int64_t k = 0; k < some; k++) offer(l, ratios[k], first + k);
    }
}

/* Draw one after the other by weight from what is left of a law, one word per rank; `left` is memory for it. */
static void take_drawn(Noise noise, const float *law, float *left, int64_t n, int count, int64_t *tokens) {
    uint32_t words[4 * MAX_DRAFTED];
    noise.count = 4 * count - 3; /* the first word of each rank's block */
    noise_words(&noise, words);
    tokens[0] = draw_by_weight(law, n, words[0]);
    if (count > 1) memcpy(left, law, n * sizeof(float));
    for (int rank = 1; rank < count; rank++) {
        left[tokens[rank - 1]] = 0;
        tokens[rank] = draw_by_weight(left, n, words[4 * rank]);
    }
}

/* The children of one fed node of sequence b, given its logits. space: [2, vocab] floats of working memory. */
static void choose_children(const Draft *d, const Levels *l, int b, int fed, int64_t position, const float *logits,
                            int64_t best, float *space) {
    int64_t n = d->first->model->vocab, *tokens = d->tokens + (int64_t)b * d->nodes + l->child[fed] - 1;
    int count = d->children[l->node[fed]];
    Least least = {.most = count};
    if (d->temperature == 0) {
        tokens[0] = best;
        if (count > 1) take_best(logits, n, &least);
    } else {
        float *law = d->laws ? d->laws + ((int64_t)b * l->fed + fed) * n : space;
        Noise noise = {d->sequences + b, &position, d->seed, n, 1, 1, d->purpose, 1};
        soften(logits, d->temperature, law, n);
        if (!d->coupled) take_drawn(noise, law, space + n, n, count, tokens);
        else if (count == 1) tokens[0] = draw_token(&noise, 0, law);
        else take_noisy(&noise, law, &least);
    }
    memcpy(tokens, least.tokens, least.held * sizeof(int64_t));
}

/* The children of every fed node of a level, and the tokens that the next level feeds. */
static void choose_level(const Draft *d, const Levels *l, int level, const int64_t *committed, Share s, const Forward *f,
                         float *space, int64_t *next) {
    const Call *c = d->first->attention;
    int at = l->first[level], width = l->first[level + 1] - at;
    int following = level + 1 < l->levels ? l->first[level + 2] - l->first[level + 1] : 0;
    int64_t vocab = d->first->model->vocab;
    for (int64_t i = s.member; i < (int64_t)row_count(c) * width; i += s.team) {
        int b = c->rows ? c->rows[i / width] : (int)(i / width), fed = at + (int)(i % width);
        int64_t row = (int64_t)b * width + i % width;
        choose_children(d, l, b, fed, committed[b] + level + 1, f->logits + row * vocab, f->best[row],
                        space + 2 * s.member * vocab);
        for (int v = l->child[fed]; v < l->child[fed] + d->children[l->node[fed]]; v++)
            if (l->place[v] >= 0)
                next[(int64_t)b * following + l->place[v] - l->first[level + 1]] = d->tokens[(int64_t)b * d->nodes + v - 1];
    }
}

/* All levels, by every thread of a team. */
static void draft_together(Draft *d, const Levels *l, const int64_t *committed, Share s, BlockFn block, int64_t *fed_tokens,
                           float *space, int64_t *attended_ns) {
    int32_t order[MAX_DRAFTED];
    for (int i = 0; i < MAX_DRAFTED; i++) order[i] = i;
    for (int level = 0; level < l->levels; level++) {
        Call call = level_call(d, l, level, committed);
        Forward f = *d->first;
        if (level) f.tokens = fed_tokens, f.keep = order, f.num_keep = call.queries;
        f.attention = &call;
        Run runs[call.batch];
        Work work = work_of(&f, runs, runs_of(&call, runs));
        set_places(&work, &call);
        int64_t ns = forward_together(&f, &call, &work, s, block, most_chunks(&call));
        int64_t start = s.member ? 0 : now_ns();
        choose_level(d, l, level, committed, s, &f, space, fed_tokens);
#pragma omp barrier
        if (!s.member) *attended_ns += ns, d->choosing_ns += now_ns() - start;
    }
}

/* Draft. fed_tokens [batch, widest] and space [threads, 2, vocab] are working memory, the logits and best of d->first hold
 * [batch, widest] rows. Codes: draft_check; 10: memory is missing. */
int decoder_draft(Draft *d, int64_t *fed_tokens, float *space) {
    Levels l;
    const Call *given = d->first->attention;
    int wrong = draft_check(d, &l);
    if (wrong) return wrong;
    if (!d->first->scratch || !given->workspace || !fed_tokens || !space) return 10;
    if (d->temperature != 0 && !d->coupled && !d->laws) return 10;
    int64_t committed[given->batch], attended_ns = 0;
    before_root(d, committed);
    BlockFn block = block_function(given);
    d->choosing_ns = 0;
#pragma omp parallel num_threads(given->threads) if (given->threads > 1)
    {
        Share s = {omp_get_thread_num(), omp_get_num_threads()};
        draft_together(d, &l, committed, s, block, fed_tokens, space, &attended_ns);
    }
    d->first->attention_ns = attended_ns;
    return 0;
}
