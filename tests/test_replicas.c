/* Replicas: equal boxes of one rank, pairs read from one rank, replicas compared by digest; and what a report counts by
   digests. Parameters that move are rebound. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "pieces.h"

#include <math.h>

enum {
    MODULES = 12,
    ROWS    = 4,
    COLUMNS = 6,
    SIZE    = ROWS * COLUMNS
};

static const int worlds[] = {1, 2, 4, 8};

static const char *const adapter_config =
    "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\"]}";

static const char *tensor_name(char out[96], int module, char half, const char *adapter)
{
    snprintf(out, 96, "base_model.model.h.%d.q.lora_%c.%sweight", module, half, adapter);
    return out;
}

static void fill(float *memory, size_t num, float value)
{
    size_t i;
    for (i = 0; i < num; i++) memory[i] = value;
}

static lorasync_plan_desc gather_of(const lorasync_comm *comm, const lorasync_piece *have, size_t num)
{
    lorasync_plan_desc d;
    memset(&d, 0, sizeof d);
    d.comm = comm, d.have = have, d.num_have = num;
    return d;
}

/* -- equal boxes of one rank */

typedef struct twice_case {
    int                kind;
    lorasync_plan_kind plan;
} twice_case;

/* 0: another address; 1: the same; 2: the same with another scale; 3: a flat interval that is the same box; 4: another
   name at the same address; 5: two wanted boxes */
static void twice_rank(rank_context *c)
{
    const twice_case  *t = (const twice_case *)c->user;
    float              a[SIZE], b[SIZE], want[2][SIZE];
    lorasync_piece     p[2], w[2];
    lorasync_plan_desc d    = gather_of(&c->comm, p, c->rank == c->world - 1 ? 2 : 1);
    lorasync_plan     *plan = NULL;
    lorasync_error     err;
    const int          wrong = t->kind == 0 || t->kind == 2 || t->kind == 3;
    char               both[2][32];
    err.text[0] = 0;
    fill(a, SIZE, 1), fill(b, SIZE, 1);
    p[0] = p[1] = whole_piece("x", LORASYNC_F32, 2, ROWS, COLUMNS, a);
    if (t->kind == 0) p[1].data = b;
    if (t->kind == 2) p[1].scale = 2;
    if (t->kind == 3) p[1].data = b, p[1].box = lorasync_flat(0, SIZE);
    if (t->kind == 4) p[1].name = "y";
    w[0] = w[1] = whole_piece("x", LORASYNC_F32, 2, ROWS, COLUMNS, want[0]);
    w[1].data   = want[1];
    d.kind      = t->plan;
    if (t->plan == LORASYNC_RESHARD) d.want = w, d.num_want = 2;
    CHECK_EQ(lorasync_plan_create(&d, &plan, &err), wrong ? LORASYNC_E_LAYOUT : LORASYNC_OK);
    if (wrong) {
        CHECK_HAS(err.text, "x: this rank holds [0:4, 0:6] twice");
        snprintf(both[0], 32, "%p", (void *)a);
        snprintf(both[1], 32, "%p", t->kind == 2 ? (void *)a : (void *)b);
        if (c->rank == c->world - 1) CHECK_HAS(err.text, both[0]);
        if (c->rank == c->world - 1) CHECK_HAS(err.text, both[1]);
        if (c->world > 1) CHECK_HAS(err.text, c->world == 2 ? "rank 1" : c->world == 4 ? "rank 3" : "rank 7");
    } else if (plan) {
        CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_OK);
    }
    lorasync_plan_free(plan);
}

/* Which of two is read would be chance. */
static void equal_boxes_of_one_rank_have_one_address(void)
{
    size_t     i;
    twice_case t;
    for (i = 0; i < 4; i++)
        for (t.kind = 0; t.kind < 5; t.kind++) {
            t.plan = LORASYNC_GATHER;
            run_threads(worlds[i], twice_rank, &t);
            t.plan = LORASYNC_RESHARD;
            run_threads(worlds[i], twice_rank, &t);
        }
}

/* -- pairs */

typedef struct pair_case {
    lorasync_plan_kind kind;
    int                no_direct;
    unsigned           holders[MODULES][2]; /* bits of ranks, of A and B */
} pair_case;

/* The rank whose values these are, all of them. */
static int rank_of(const float *values)
{
    int i;
    for (i = 1; i < SIZE; i++)
        if (values[i] < values[0] || values[i] > values[0]) return -1;
    return (int)values[0] - 1;
}

static void check_pair(const pair_case *t, int module, const float *a, const float *b)
{
    const unsigned both = t->holders[module][0] & t->holders[module][1];
    const int      x = rank_of(a), y = rank_of(b);
    CHECK(x >= 0 && t->holders[module][0] >> x & 1);
    CHECK(y >= 0 && t->holders[module][1] >> y & 1);
    if (!both) return;
    CHECK_EQ(x, y);
    CHECK(both >> x & 1);
}

static void pair_rank(rank_context *c)
{
    static const char     halves[2] = {'A', 'B'};
    const pair_case      *t         = (const pair_case *)c->user;
    static __thread float have[SIZE], want[2 * MODULES][SIZE];
    char                  names[2 * MODULES][96];
    lorasync_piece        p[2 * MODULES], w[2 * MODULES];
    lorasync_plan_desc    d;
    lorasync_plan        *plan = NULL;
    const lorasync_image *image;
    lorasync_error        err;
    size_t                num = 0;
    int                   i;
    err.text[0] = 0;
    fill(have, SIZE, (float)(c->rank + 1));
    for (i = 0; i < 2 * MODULES; i++) {
        tensor_name(names[i], i / 2, halves[i % 2], "");
        w[i] = whole_piece(names[i], LORASYNC_F32, 2, ROWS, COLUMNS, want[i]);
        if (!(t->holders[i / 2][i % 2] >> c->rank & 1)) continue;
        p[num++] = whole_piece(names[i], LORASYNC_F32, 2, ROWS, COLUMNS, have);
    }
    d           = gather_of(&c->comm, p, num);
    d.kind      = t->kind;
    d.no_direct = t->no_direct;
    if (t->kind == LORASYNC_RESHARD) d.want = w, d.num_want = 2 * MODULES;
    CHECK_EQ(lorasync_plan_create(&d, &plan, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_OK);
    image = lorasync_plan_image(plan);
    for (i = 0; t->kind == LORASYNC_RESHARD && i < MODULES; i++) check_pair(t, i, want[2 * i], want[2 * i + 1]);
    for (i = 0; image && i < MODULES; i++) {
        const lorasync_tensor *a = lorasync_image_find(image, names[2 * i]),
                              *b = lorasync_image_find(image, names[2 * i + 1]);
        check_pair(t, i, (const float *)a->data, (const float *)b->data);
    }
    lorasync_plan_free(plan);
}

/* Whatever differs between replicas, A and B belong together. */
static void pairs_come_from_one_rank_where_they_can(void)
{
    static const lorasync_plan_kind kinds[] = {LORASYNC_GATHER, LORASYNC_GATHER_ALL, LORASYNC_RESHARD};
    unsigned long long              seed    = 7;
    pair_case                       t;
    size_t                          i, k;
    int                             round, m, h;
    for (i = 0; i < 4; i++)
        for (k = 0; k < 3; k++)
            for (round = 0; round < 8; round++) {
                const unsigned all = (1u << worlds[i]) - 1;
                memset(&t, 0, sizeof t);
                t.kind      = kinds[k];
                t.no_direct = round % 2;
                for (m = 0; m < MODULES; m++)
                    for (h = 0; h < 2; h++)
                        while (!t.holders[m][h])
                            t.holders[m][h] = round < 2 ? all : (unsigned)(test_random(&seed) >> 20) & all;
                run_threads(worlds[i], pair_rank, &t);
            }
}

/* -- what a report counts */

typedef struct parameters {
    float values[2 * MODULES][SIZE];
} parameters;

/* All of a small adapter, replicated; `comm` may be NULL. */
static lorasync_session *open_adapter(const lorasync_comm *comm, const lorasync_desc *desc, parameters *memory)
{
    static const char halves[2] = {'A', 'B'};
    lorasync_desc     d         = *desc;
    lorasync_session *s         = NULL;
    lorasync_error    err;
    char              name[96];
    int               i;
    err.text[0]   = 0;
    d.comm        = comm;
    d.config_json = adapter_config;
    CHECK_EQ(lorasync_open(&d, &s, &err), LORASYNC_OK);
    for (i = 0; i < 2 * MODULES; i++) {
        lorasync_piece p = whole_piece(tensor_name(name, i / 2, halves[i % 2], "default."), LORASYNC_F32, 2,
                                       i % 2 ? COLUMNS : ROWS, i % 2 ? ROWS : COLUMNS, memory->values[i]);
        CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
    }
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
    if (err.text[0]) fprintf(stderr, "%s\n", err.text);
    return s;
}

static void fill_adapter(parameters *m)
{
    int i;
    for (i = 0; i < 2 * MODULES; i++) fill(m->values[i], SIZE, i % 2 ? 0.0f : (float)(i + 1));
}

static void counting_rank(rank_context *c)
{
    lorasync_desc     d;
    parameters        m;
    lorasync_report   r;
    lorasync_error    err;
    lorasync_session *s;
    memset(&d, 0, sizeof d);
    d.skip_unchanged = *(const int *)c->user;
    d.wire_dtype     = LORASYNC_BF16;
    d.root           = c->world - 1;
    fill_adapter(&m);
    s = open_adapter(&c->comm, &d, &m);
    CHECK_EQ(lorasync_sync(s, 1, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.num_zero_b, MODULES);
    CHECK_EQ(r.num_changed, 2 * MODULES); /* nothing was published before */
    CHECK_EQ(r.num_unchanged_versions, 0);
    m.values[3][5] = -0.5f;
    m.values[5][0] = 2.0f;
    m.values[0][0] += 0.0001f; /* gone when rounded for the wire */
    CHECK_EQ(lorasync_sync(s, 2, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.num_zero_b, MODULES - 2);
    CHECK_EQ(r.num_changed, 2);
    CHECK_EQ(r.num_unchanged_versions, 0);
    CHECK_EQ(lorasync_sync(s, 3, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.num_zero_b, MODULES - 2);
    CHECK_EQ(r.num_changed, 0);
    CHECK_EQ(r.num_unchanged_versions, 1);
    m.values[2][7] = NAN; /* a failure counts for nothing */
    m.values[4][7] = 3.0f;
    CHECK_EQ(lorasync_sync(s, 4, &r, &err), LORASYNC_E_NAN);
    m.values[2][7] = 3.0f;
    m.values[4][7] = 6.0f;
    CHECK_EQ(lorasync_sync(s, 4, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.num_changed, 1);
    CHECK_EQ(r.num_unchanged_versions, 0);
    CHECK_EQ(lorasync_sync(s, 5, &r, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_sync(s, 6, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.num_changed, 0);
    CHECK_EQ(r.num_unchanged_versions, 2);
    lorasync_close(s);
}

/* A trainer that does not train, and one whose optimizer has other parameters than are published, look like this. */
static void reports_count_what_is_zero_and_what_has_changed(void)
{
    size_t i;
    int    skip;
    for (i = 0; i < 4; i++)
        for (skip = 0; skip < 2; skip++) run_threads(worlds[i], counting_rank, &skip);
}

int main(void)
{
    RUN(equal_boxes_of_one_rank_have_one_address);
    RUN(pairs_come_from_one_rank_where_they_can);
    RUN(reports_count_what_is_zero_and_what_has_changed);
    return test_summary("test_replicas");
}
