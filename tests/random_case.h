/* Random tensors, cut in random ways over random numbers of ranks, and what must come out. Include it behind
   ranks.h. */
#ifndef LORASYNC_TEST_RANDOM_CASE_H
#define LORASYNC_TEST_RANDOM_CASE_H

enum {
    MAX_TENSORS = 4,
    MAX_PIECES  = 64,
    MAX_BYTES   = 1 << 14
};

typedef struct truth_tensor {
    char           name[64];
    lorasync_dtype dtype;
    int            ndim;
    int64_t        shape[LORASYNC_MAX_DIMS];
    int64_t        numel;
    double         scale; /* of the pieces that ranks have */
    unsigned char *data;
} truth_tensor;

typedef struct rank_pieces {
    lorasync_piece pieces[MAX_PIECES];
    int            tensor[MAX_PIECES];
    size_t         num;
    void          *memory[MAX_PIECES];
    size_t         num_bytes[MAX_PIECES];
} rank_pieces;

typedef struct random_case {
    unsigned long long seed;
    int                world, root, num_tensors, no_direct;
    lorasync_plan_kind kind;
    lorasync_dtype     wire;
    size_t             bucket;
    truth_tensor       tensors[MAX_TENSORS];
    rank_pieces        have[8], want[8];
    lorasync_image    *expected;
    unsigned char     *expected_bytes;
    lorasync_status    status[8];
    char               text[8][512];
    int                wrong[8];
} random_case;

TEST_UNUSED static unsigned below(unsigned long long *s, unsigned n) { return n ? (unsigned)(test_random(s) % n) : 0; }

TEST_UNUSED static int64_t item(lorasync_dtype d) { return lorasync_dtype_bits(d) / 8; }

/* Whether values of the type are converted and scaled; all others travel unchanged. */
TEST_UNUSED static int is_converted(lorasync_dtype d)
{
    return d == LORASYNC_F32 || d == LORASYNC_BF16 || d == LORASYNC_F16 || d == LORASYNC_F8_E4M3 ||
           d == LORASYNC_F8_E5M2;
}

/* -- one element at a time, the slow and obvious way */

TEST_UNUSED static int64_t index_of(const truth_tensor *t, const int64_t *at)
{
    int64_t n = 0;
    int     d;
    for (d = 0; d < t->ndim; d++) n = n * t->shape[d] + at[d];
    return n;
}

/* Calls f for every element of a piece: its number in the tensor and its address in the piece's memory. */
typedef void (*element_fn)(void *user, int64_t number, unsigned char *address);

TEST_UNUSED static void each_element(const truth_tensor *t, const lorasync_piece *p, element_fn f, void *user)
{
    int64_t at[LORASYNC_MAX_DIMS] = {0}, n = 1, i;
    int     d;
    if (p->box.flat) {
        for (i = 0; i < p->box.len[0]; i++) f(user, p->box.off[0] + i, (unsigned char *)p->data + i * item(p->dtype));
        return;
    }
    for (d = 0; d < t->ndim; d++) n *= p->box.len[d];
    for (i = 0; i < n; i++) {
        int64_t rest = i, global[LORASYNC_MAX_DIMS], offset = 0, stride = 1;
        int     strided = 0;
        for (d = 0; d < t->ndim; d++) strided |= p->stride[d] != 0;
        for (d = t->ndim - 1; d >= 0; d--) {
            at[d] = rest % p->box.len[d];
            rest /= p->box.len[d];
            global[d] = p->box.off[d] + at[d];
            offset += at[d] * (strided ? p->stride[d] : stride);
            stride *= p->box.len[d];
        }
        f(user, index_of(t, global), (unsigned char *)p->data + offset * item(p->dtype));
    }
}

typedef struct fill_user {
    const truth_tensor  *t;
    const unsigned char *expected; /* tensor bytes in the piece's dtype */
    int64_t              size;
    int                  wrong;
} fill_user;

TEST_UNUSED static void fill_element(void *user, int64_t number, unsigned char *address)
{
    const fill_user *u = (const fill_user *)user;
    memcpy(address, u->t->data + number * u->size, (size_t)u->size);
}

TEST_UNUSED static void check_element(void *user, int64_t number, unsigned char *address)
{
    fill_user *u = (fill_user *)user;
    if (memcmp(address, u->expected + number * u->size, (size_t)u->size) != 0) u->wrong++;
}

/* -- random tensors and random cuts */

TEST_UNUSED static void random_tensor(unsigned long long *s, truth_tensor *t, int number, int large)
{
    static const lorasync_dtype dtypes[] = {LORASYNC_F32,     LORASYNC_BF16,   LORASYNC_F16, LORASYNC_F8_E4M3,
                                            LORASYNC_I64,     LORASYNC_U8,     LORASYNC_F64, LORASYNC_I16,
                                            LORASYNC_F8_E5M2, LORASYNC_F8_E8M0};
    int64_t                     i;
    int                         d;
    snprintf(t->name, sizeof t->name, "model.layers.%u.t%d.lora_A.weight", below(s, 30), number);
    t->dtype = dtypes[below(s, 10)];
    for (;;) {
        t->ndim  = large ? 1 + (int)below(s, 2) : (int)below(s, 5);
        t->numel = 1;
        for (d = 0; d < t->ndim; d++) {
            t->shape[d] = below(s, 20) == 0 ? 0 : 1 + (int64_t)below(s, t->ndim > 2 ? 6 : 33);
            if (large)
                t->shape[d] = t->ndim == 1 ? 20000 + (int64_t)below(s, 40000)
                              : d          ? 8 * (1 + (int64_t)below(s, 64)) - (below(s, 3) == 0)
                                           : 100 + (int64_t)below(s, 100);
            t->numel *= t->shape[d];
        }
        if (t->numel * 8 <= MAX_BYTES || large) break;
    }
    t->data = (unsigned char *)calloc(1, (size_t)(t->numel * item(t->dtype)) + 1);
    for (i = 0; i < t->numel; i++) {
        float f = (float)((double)(test_random(s) % 2000001) / 1000.0 - 1000.0) / (float)(1 + below(s, 1000));
        if (is_converted(t->dtype)) {
            if (t->dtype == LORASYNC_F8_E4M3) f *= 0.1f;
            lorasync_convert(t->data + i * item(t->dtype), t->dtype, &f, LORASYNC_F32, 1, NULL);
        } else {
            unsigned long long bits = test_random(s) >> 12; /* a finite f64 */
            if (t->dtype == LORASYNC_F8_E8M0) bits %= 255;  /* not the NaN */
            memcpy(t->data + i * item(t->dtype), &bits, (size_t)item(t->dtype));
        }
    }
}

TEST_UNUSED static lorasync_piece *add_piece(rank_pieces *r, const truth_tensor *t, int number, lorasync_box box,
                                             lorasync_dtype dtype)
{
    lorasync_piece *p = &r->pieces[r->num];
    if (r->num >= MAX_PIECES) return NULL;
    memset(p, 0, sizeof *p);
    p->name  = t->name;
    p->dtype = dtype;
    p->ndim  = t->ndim;
    memcpy(p->shape, t->shape, sizeof t->shape);
    p->box              = box;
    r->tensor[r->num++] = number;
    return p;
}

/* Memory for a piece, sometimes with gaps or transposed. */
TEST_UNUSED static void give_memory(unsigned long long *s, rank_pieces *r, size_t i, int allow_stride)
{
    lorasync_piece *p    = &r->pieces[i];
    int64_t         span = 1, stride[LORASYNC_MAX_DIMS];
    int             d, order[LORASYNC_MAX_DIMS], k;
    if (p->box.flat) {
        span = p->box.len[0];
    } else {
        int fancy = allow_stride && p->ndim > 0 && below(s, 3) == 0;
        for (d = 0; d < p->ndim; d++) order[d] = d;
        for (d = p->ndim - 1; fancy && d > 0; d--) { /* a random order of dimensions */
            k        = (int)below(s, (unsigned)d + 1);
            int swap = order[d];
            order[d] = order[k];
            order[k] = swap;
        }
        for (k = p->ndim - 1; k >= 0; k--) {
            d         = order[k];
            stride[d] = span;
            span *= p->box.len[d] ? p->box.len[d] : 1;
            if (fancy) span += below(s, 4);
        }
        if (fancy) memcpy(p->stride, stride, sizeof(int64_t) * (size_t)p->ndim);
    }
    r->num_bytes[i] = (size_t)(span * item(p->dtype));
    r->memory[i]    = malloc(r->num_bytes[i] + 1);
    memset(r->memory[i], 0xA5, r->num_bytes[i] + 1);
    p->data = r->memory[i];
}

/* Cuts a box into random boxes by splitting, and deals them to ranks. */
TEST_UNUSED static void deal_boxes(unsigned long long *s, rank_pieces *ranks, int world, const truth_tensor *t,
                                   int number, lorasync_box box, lorasync_dtype dtype, int depth)
{
    int d = t->ndim ? (int)below(s, (unsigned)t->ndim) : 0, replicas, k, first;
    if (depth > 0 && t->ndim && box.len[d] > 1) {
        int64_t cut = 1 + below(s, (unsigned)box.len[d] - 1);
        deal_boxes(s, ranks, world, t, number, lorasync_range(box, d, 0, cut), dtype, depth - 1);
        deal_boxes(s, ranks, world, t, number, lorasync_range(box, d, cut, box.len[d] - cut), dtype, depth - 1);
        return;
    }
    replicas = below(s, 4) ? 1 : 1 + (int)below(s, (unsigned)world);
    first    = (int)below(s, (unsigned)world);
    for (k = 0; k < replicas; k++) add_piece(&ranks[(first + k) % world], t, number, box, dtype);
}

/* One tensor over all ranks, by one of the trainers' layouts or a free one. */
TEST_UNUSED static void deal_tensor(unsigned long long *s, rank_pieces *ranks, int world, const truth_tensor *t,
                                    int number, lorasync_dtype dtype)
{
    lorasync_box whole = lorasync_whole(t->shape, t->ndim);
    int r, dim = t->ndim ? (int)below(s, (unsigned)t->ndim) : 0, dim2 = t->ndim ? (int)below(s, (unsigned)t->ndim) : 0;
    int n0 = world % 2 == 0 ? 2 : 1, kind = (int)below(s, t->ndim ? 8 : 2);
    int64_t start[2], numel[2], total;
    numel[0] = below(s, 50);
    numel[1] = t->numel;
    total    = lorasync_fsdp1_layout(numel, 2, 4, (int)below(s, 2), world, start);
    for (r = 0; r < world && kind != 1; r++) {
        switch (kind) {
        case 0: add_piece(&ranks[r], t, number, whole, dtype); break;                                /* replicas */
        case 2: add_piece(&ranks[r], t, number, lorasync_shard(whole, dim, r, world), dtype); break; /* FSDP2 */
        case 3:
            add_piece(&ranks[r], t, number,
                      lorasync_shard(lorasync_shard(whole, dim, r % n0, n0), dim2, r / n0, world / n0), dtype);
            /* TP x FSDP */
            break;
        case 4: add_piece(&ranks[r], t, number, lorasync_flat_shard(t->numel, r, world), dtype); break; /* ZeRO-3 */
        case 5:
            add_piece(&ranks[r], t, number, lorasync_flat_part(start[1], t->numel, total, r, world).box, dtype);
            break; /* FSDP1 */
        case 6:
            add_piece(&ranks[r], t, number, lorasync_shard(whole, dim, r / n0, world / n0), dtype);
            break; /* HSDP */
        default: break;
        }
    }
    if (kind == 1 || kind == 7) deal_boxes(s, ranks, world, t, number, whole, dtype, 4);
}

TEST_UNUSED static void free_pieces(rank_pieces *r)
{
    size_t i;
    for (i = 0; i < r->num; i++) free(r->memory[i]);
    r->num = 0;
}

/* A whole tensor, scaled in F32, then rounded. */
TEST_UNUSED static void scale_tensor(unsigned char *out, lorasync_dtype dtype, const truth_tensor *t)
{
    int64_t i;
    float   f;
    if (t->scale == 0) {
        lorasync_convert(out, dtype, t->data, t->dtype, (size_t)t->numel, NULL);
        return;
    }
    for (i = 0; i < t->numel; i++) {
        lorasync_convert(&f, LORASYNC_F32, t->data + i * item(t->dtype), t->dtype, 1, NULL);
        f = f * (float)t->scale;
        lorasync_convert(out + i * item(dtype), dtype, &f, LORASYNC_F32, 1, NULL);
    }
}

/* The image of the uncut tensors. */
TEST_UNUSED static void make_expected(random_case *c)
{
    lorasync_tensor     tensors[MAX_TENSORS];
    lorasync_image_desc d;
    int                 i;
    size_t              k;
    memset(tensors, 0, sizeof tensors);
    memset(&d, 0, sizeof d);
    for (i = 0; i < c->num_tensors; i++) {
        tensors[i].name  = c->tensors[i].name;
        tensors[i].dtype = c->wire && is_converted(c->tensors[i].dtype) ? c->wire : c->tensors[i].dtype;
        tensors[i].ndim  = c->tensors[i].ndim;
        memcpy(tensors[i].shape, c->tensors[i].shape, sizeof tensors[i].shape);
    }
    d.tensors     = tensors;
    d.num_tensors = (size_t)c->num_tensors;
    CHECK(lorasync_image_layout(&d, NULL, &c->expected, NULL) == LORASYNC_OK);
    c->expected_bytes = (unsigned char *)calloc(1, c->expected->payload_bytes + 1);
    lorasync_image_bind(c->expected, c->expected_bytes);
    for (k = 0; k < c->expected->num_tensors; k++) {
        const lorasync_tensor *e = &c->expected->tensors[k];
        for (i = 0; strcmp(c->tensors[i].name, e->name) != 0; i++) {}
        scale_tensor(c->expected_bytes + e->offset, e->dtype, &c->tensors[i]);
    }
}

TEST_UNUSED static void make_case(random_case *c, unsigned long long seed, lorasync_plan_kind kind, int large)
{
    static const lorasync_dtype wires[]  = {LORASYNC_DTYPE_NONE, LORASYNC_BF16, LORASYNC_F32, LORASYNC_F16};
    static const double         scales[] = {0, 0, 0.3, -0.5};
    unsigned long long          s        = seed;
    int                         i, r;
    memset(c, 0, sizeof *c);
    c->seed        = seed;
    c->kind        = kind;
    c->world       = 1 + (int)below(&s, 6);
    c->root        = (int)below(&s, (unsigned)c->world);
    c->num_tensors = 1 + (int)below(&s, large ? 2 : MAX_TENSORS);
    c->no_direct   = (int)below(&s, 2);
    c->wire        = kind == LORASYNC_SCATTER ? LORASYNC_DTYPE_NONE : wires[below(&s, 4)];
    c->bucket      = below(&s, 2) ? 1 + below(&s, large ? 200000 : 3000) : 0;
    for (i = 0; i < c->num_tensors; i++) {
        truth_tensor  *t    = &c->tensors[i];
        lorasync_dtype want = LORASYNC_DTYPE_NONE;
        random_tensor(&s, t, i, large);
        t->scale = is_converted(t->dtype) && kind != LORASYNC_SCATTER ? scales[below(&s, 4)] : 0;
        if (kind != LORASYNC_SCATTER) deal_tensor(&s, c->have, c->world, t, i, t->dtype);
        want = t->dtype;
        if ((is_converted(t->dtype) || t->dtype == LORASYNC_F8_E8M0) && below(&s, 2)) /* E8M0 is only widened */
            want = below(&s, 2) ? LORASYNC_F32 : LORASYNC_BF16;
        if (kind == LORASYNC_SCATTER || kind == LORASYNC_RESHARD) deal_tensor(&s, c->want, c->world, t, i, want);
    }
    for (r = 0; r < c->world; r++) {
        size_t k;
        for (k = 0; k < c->have[r].num; k++) {
            fill_user u;
            give_memory(&s, &c->have[r], k, 1);
            u.t                        = &c->tensors[c->have[r].tensor[k]];
            u.size                     = item(u.t->dtype);
            c->have[r].pieces[k].scale = u.t->scale;
            each_element(u.t, &c->have[r].pieces[k], fill_element, &u);
        }
        for (k = 0; k < c->want[r].num; k++) give_memory(&s, &c->want[r], k, 1);
    }
    make_expected(c);
}

TEST_UNUSED static void free_case(random_case *c)
{
    int r;
    for (r = 0; r < c->world; r++) free_pieces(&c->have[r]), free_pieces(&c->want[r]);
    for (r = 0; r < c->num_tensors; r++) free(c->tensors[r].data);
    lorasync_image_free(c->expected);
    free(c->expected_bytes);
}

TEST_UNUSED static void fill_desc(lorasync_plan_desc *d, random_case *c, const rank_context *x)
{
    memset(d, 0, sizeof *d);
    d->comm         = &x->comm;
    d->kind         = c->kind;
    d->root         = c->root;
    d->wire_dtype   = c->wire;
    d->have         = c->have[x->rank].pieces;
    d->num_have     = c->have[x->rank].num;
    d->want         = c->want[x->rank].pieces;
    d->num_want     = c->want[x->rank].num;
    d->image        = c->kind == LORASYNC_SCATTER && x->rank == c->root ? c->expected : NULL;
    d->bucket_bytes = c->bucket;
    d->no_direct    = c->no_direct;
    d->timeout_ms   = test_ms(20000);
}

/* 0, or what is wrong with an image whose payload, as the host sees it, is at `payload`. */
TEST_UNUSED static int check_image(const random_case *c, const lorasync_image *image, const void *payload)
{
    if (!image) return 1;
    if (image->payload_bytes != c->expected->payload_bytes || image->num_tensors != c->expected->num_tensors) return 2;
    if (image->header_bytes != c->expected->header_bytes ||
        memcmp(image->header, c->expected->header, image->header_bytes) != 0)
        return 3;
    if (memcmp(payload, c->expected_bytes, image->payload_bytes) != 0) return 4;
    if (image->digest != lorasync_image_digest(c->expected, NULL)) return 5;
    return 0;
}

/* What a wanted piece must hold: the tensor as it travels, then as it is wanted. */
TEST_UNUSED static int check_wanted(const random_case *c, const rank_pieces *r)
{
    size_t k;
    int    wrong = 0;
    for (k = 0; k < r->num; k++) {
        const truth_tensor    *t = &c->tensors[r->tensor[k]];
        const lorasync_tensor *e = lorasync_image_find(c->expected, t->name);
        const lorasync_piece  *p = &r->pieces[k];
        fill_user              u;
        unsigned char         *expected = (unsigned char *)malloc((size_t)(t->numel * item(p->dtype)) + 1);
        if (e->dtype == p->dtype) memcpy(expected, e->data, e->num_bytes);
        else lorasync_convert(expected, p->dtype, e->data, e->dtype, (size_t)t->numel, NULL);

        u.t        = t;
        u.expected = expected;
        u.size     = item(p->dtype);
        u.wrong    = 0;
        each_element(t, p, check_element, &u);
        wrong += u.wrong;
        free(expected);
    }
    return wrong;
}

/* Runs cases 0 to num - 1 of a kind (large: of one or two tensors of tens of thousands of elements): run_case, on every
   rank, fills status, wrong and text of the case. */
TEST_UNUSED static void random_cases(lorasync_plan_kind kind, int num, int large, void (*run_case)(rank_context *x))
{
    static random_case c;
    int                i, r, bad = 0;
    for (i = 0; i < num && bad < 5; i++) {
        make_case(&c, (unsigned long long)i * 7919 + (unsigned long long)kind * 1000003, kind, large);
        run_threads(c.world, run_case, &c);
        for (r = 0; r < c.world; r++)
            if (c.status[r] < 0 || c.wrong[r]) {
                fprintf(stderr, "seed %llu rank %d of %d (root %d): status %d, wrong %d: %s\n", c.seed, r, c.world,
                        c.root, (int)c.status[r], c.wrong[r], c.text[r]);
                bad++;
            }
        free_case(&c);
    }
    CHECK_EQ(bad, 0);
}

#endif
