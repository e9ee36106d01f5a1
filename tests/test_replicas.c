/* Replicas: equal boxes of one rank, pairs read from one rank, replicas compared by digest; and what a report counts by
   digests. Included by test_replicas_cuda.c, which defines REPLICAS_CUDA: parameters are then in device memory, the
   fake's or, with REPLICAS_GPU, that of real GPUs. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#if defined(REPLICAS_GPU)
#include <cuda_runtime_api.h>
#elif defined(REPLICAS_CUDA)
#include "fake_cuda.h"
#include "fake_nccl.h"
#endif
#include "ranks.h"
#include "pieces.h"

#include <math.h>
#include <sys/mman.h>

enum {
    MODULES = 12,
    ROWS    = 4,
    COLUMNS = 6,
    SIZE    = ROWS * COLUMNS
};

static const int worlds[]   = {1, 2, 4, 8};
static size_t    num_worlds = 4;

static const char *const adapter_config =
    "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\"]}";

static lorasync_plan_desc gather_of(const lorasync_comm *comm, const lorasync_piece *have, size_t num)
{
    lorasync_plan_desc d;
    memset(&d, 0, sizeof d);
    d.comm = comm, d.have = have, d.num_have = num;
    return d;
}

/* -- ways to move: memory and communicators */

#ifdef REPLICAS_CUDA

enum {
    WAY_DIRECT = 0,
    WAY_OVER_HOST,
    WAY_NCCL,
    WAY_NCCL_DIRECT,
    WAY_NCCL_HOST_VOTES,
    NUM_WAYS
};

static void *memory_new(size_t num_bytes)
{
    void *p = NULL;
    CHECK_EQ(cudaMalloc(&p, num_bytes), cudaSuccess);
    return p;
}

static void memory_free(void *p) { cudaFree(p); }

static void memory_copy(void *to, const void *from, size_t num_bytes)
{
    CHECK_EQ(cudaMemcpy(to, from, num_bytes, cudaMemcpyDefault), cudaSuccess);
}

/* The threads' communicator, or NCCL, whose id goes through it. */
static lorasync_comm comm_open(const rank_context *c, int way)
{
    char               ids[MAX_RANKS * 128], id[128] = {0};
    lorasync_nccl_desc n;
    lorasync_comm      comm = c->comm;
    lorasync_error     err;
    CHECK_EQ(cudaSetDevice(c->rank), cudaSuccess);
    if (way < WAY_NCCL) return comm;
    if (c->rank == 0) CHECK_EQ(lorasync_nccl_unique_id(id, &err), LORASYNC_OK);
    CHECK_EQ(comm.all_gather(comm.user, id, ids, sizeof id, test_ms(20000), &err), LORASYNC_OK);
    memset(&n, 0, sizeof n);
    n.unique_id  = ids;
    n.rank       = c->rank;
    n.world      = c->world;
    n.timeout_ms = test_ms(20000);
    CHECK_EQ(lorasync_nccl_open(&n, &comm, &err), LORASYNC_OK);
    if (way == WAY_NCCL_HOST_VOTES) comm.all_gather_stream = NULL;
    return comm;
}

static void comm_close(lorasync_comm *comm)
{
    if (comm->exchange_stream) lorasync_nccl_close(comm);
}

static int is_direct(int way) { return way == WAY_DIRECT || way == WAY_NCCL_DIRECT; }

static const char *mover_of(int way, lorasync_plan_kind kind)
{
    if (is_direct(way)) return kind == LORASYNC_RESHARD ? "gpu mesh" : "gpu direct";
    return way == WAY_OVER_HOST ? "gpu over host" : "gpu stream";
}

#ifdef REPLICAS_GPU

static void start_devices(void) {}
static void end_devices(void) {}

#else

static void start_devices(void)
{
    fake_cuda_reset();
    fake_nccl_reset();
    fake_cuda.devices = 8;
}

static void end_devices(void)
{
    CHECK_EQ(fake_cuda_left(), 0);
    CHECK_EQ(fake_nccl.misuses + fake_nccl.mismatches, 0);
}

#endif

#else

enum {
    WAY_DIRECT = 0,
    WAY_MESSAGES,
    NUM_WAYS
};

/* A page: when it is freed nobody can read it. */
static void *memory_new(size_t num_bytes)
{
    void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(num_bytes <= 4096 && p != MAP_FAILED);
    return p;
}

static void memory_free(void *p) { munmap(p, 4096); }
static void memory_copy(void *to, const void *from, size_t num_bytes) { memcpy(to, from, num_bytes); }

static lorasync_comm comm_open(const rank_context *c, int way)
{
    (void)way;
    return c->comm;
}

static void comm_close(lorasync_comm *comm) { (void)comm; }
static int  is_direct(int way) { return way == WAY_DIRECT; }

static const char *mover_of(int way, lorasync_plan_kind kind)
{
    return is_direct(way) && kind != LORASYNC_RESHARD ? "host direct" : "host messages";
}

static void start_devices(void) {}
static void end_devices(void) {}

#endif

#ifndef REPLICAS_CUDA

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
    lorasync_plan_desc d;
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
    d           = gather_of(&c->comm, p, c->rank == c->world - 1 ? 2 : 1);
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
    for (i = 0; i < num_worlds; i++)
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

    d.audit_replicas = -1;
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
    for (i = 0; i < num_worlds; i++)
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

#endif

/* -- replicas that drift apart */

enum {
    KINDS = 6,
    WIDE  = 7 /* elements: SIZE or less, and odd rows */
};

typedef struct audit_case {
    lorasync_plan_kind kind;
    int                way, every;
    unsigned long long seed;
} audit_case;

/* One rank's tensors: whole and replicated, a shard that half of the ranks have twice, whole with other strides on odd
   ranks, on rank 0 only, the first one under another name, BF16. */
typedef struct audit_rank {
    rank_context     *c;
    const audit_case *t;
    lorasync_comm     comm;
    lorasync_piece    p[KINDS];
    size_t            num;
    int               number[KINDS]; /* of the tensor of each piece */
    unsigned char     host[KINDS][SIZE * 4];
    lorasync_plan    *plan;
    lorasync_piece    want[KINDS];
    char              names[KINDS][96];
} audit_rank;

static int64_t held_elements(const lorasync_piece *p) { return p->box.len[0] * p->box.len[1]; }

/* Which ranks hold it with `rank`, as bits. */
static unsigned holders(int tensor, int rank, int world)
{
    const int half = world / 2;
    if (tensor == 3) return 1;
    if (tensor == 1 && world > 1) return 1u << (rank % half) | 1u << (rank % half + half);
    return (1u << world) - 1;
}

static void audit_declare(audit_rank *r)
{
    const int world = r->c->world, rank = r->c->rank;
    int       i;
    for (i = 0; i < KINDS; i++) {
        lorasync_piece p;
        snprintf(r->names[i], 96, "base_model.model.h.%d.q.lora_%c.weight", i / 2, i % 2 ? 'B' : 'A');
        p = whole_piece(r->names[i], i == 5 ? LORASYNC_BF16 : LORASYNC_F32, 2, i == 5 ? 3 : 8, i == 5 ? WIDE : 3, NULL);
        r->want[i]      = p;
        r->want[i].data = memory_new(SIZE * 4);
        if (i == 3 && rank) continue;
        if (i == 1 && world > 1) p.box = lorasync_shard(p.box, 0, rank % (world / 2), world / 2);
        if (i == 2 && rank % 2) p.stride[0] = 1, p.stride[1] = 8;
        p.data            = i == 4 ? r->p[0].data : memory_new(SIZE * 4);
        r->number[r->num] = i;
        r->p[r->num++]    = p;
    }
}

/* The values of a step, and in one element of one piece something else. */
static void audit_fill(audit_rank *r, int step, int tensor, int64_t element, float by)
{
    size_t  i;
    int64_t k;
    for (i = 0; i < r->num; i++) {
        const lorasync_piece *p = &r->p[i];
        const int64_t         n = held_elements(p);
        if (r->number[i] == 4) continue;
        for (k = 0; k < n; k++) {
            const int64_t row = k / p->box.len[1], column = k % p->box.len[1];
            float         f  = (float)((row + p->box.off[0]) * 16 + column + 1 + r->number[i] * 1024 + step);
            const int64_t at = p->stride[0] ? row * p->stride[0] + column * p->stride[1] : k;
            if (r->number[i] == tensor && k == element % n) f += by;
            if (p->dtype == LORASYNC_F32) memcpy(r->host[i] + at * 4, &f, 4);
            else lorasync_convert(r->host[i] + at * 2, LORASYNC_BF16, &f, LORASYNC_F32, 1, NULL);
        }
        memory_copy(p->data, r->host[i], (size_t)n * (p->dtype == LORASYNC_F32 ? 4 : 2));
    }
}

static lorasync_status audit_run(audit_rank *r, lorasync_error *err)
{
    lorasync_status status = lorasync_plan_begin(r->plan, err);
    CHECK(status == LORASYNC_OK || status == LORASYNC_E_NAN);
    err->text[0] = 0;
    return lorasync_plan_wait(r->plan, err);
}

static void audit_open(audit_rank *r, rank_context *c)
{
    lorasync_plan_desc  d;
    lorasync_plan_stats stats;
    lorasync_error      err;
#ifdef REPLICAS_CUDA
    lorasync_cuda cuda;
    memset(&cuda, 0, sizeof cuda);
#endif
    memset(r, 0, sizeof *r);
    r->c    = c;
    r->t    = (const audit_case *)c->user;
    r->comm = comm_open(c, r->t->way);
    audit_declare(r);
    d                = gather_of(&r->comm, r->p, r->num);
    d.kind           = r->t->kind;
    d.no_direct      = !is_direct(r->t->way);
    d.wire_dtype     = LORASYNC_BF16;
    d.audit_replicas = r->t->every;
    d.timeout_ms     = test_ms(20000);
    if (r->t->kind == LORASYNC_RESHARD) d.want = r->want, d.num_want = KINDS;
#ifdef REPLICAS_CUDA
    d.cuda = &cuda;
#endif
    err.text[0] = 0;
    CHECK_EQ(lorasync_plan_create(&d, &r->plan, &err), LORASYNC_OK);
    CHECK_TEXT(err.text, "");
    lorasync_plan_get_stats(r->plan, &stats);
    if (c->world > 2) CHECK_TEXT(stats.mover, mover_of(r->t->way, r->t->kind));
}

static void audit_close(audit_rank *r)
{
    size_t i;
    lorasync_plan_free(r->plan);
    comm_close(&r->comm);
    for (i = 0; i < r->num; i++)
        if (r->number[i] != 4) memory_free(r->p[i].data);
    for (i = 0; i < KINDS; i++) memory_free(r->want[i].data);
}

/* The error names the tensor and two of those who hold it, of whom one has drifted. */
static void check_names(const audit_rank *r, const lorasync_error *err, int tensor, int drifted)
{
    const unsigned all = holders(tensor, drifted, r->c->world), others = all & ~(1u << drifted);
    int            other = 0;
    char           text[96];
    while (!(others >> other & 1)) other++;
    CHECK_HAS(err->text, r->names[tensor == 4 ? 0 : tensor]);
    snprintf(text, sizeof text, "ranks %d and %d both hold it", drifted < other ? drifted : other,
             drifted < other ? other : drifted);
    CHECK_HAS(err->text, text);
}

/* Every rank in turn is the one that drifts, in any tensor and element. */
static void drifting_rank(rank_context *c)
{
    audit_rank         r;
    lorasync_error     err;
    unsigned long long seed;
    int                k;
    audit_open(&r, c);
    seed = r.t->seed;
    audit_fill(&r, 0, -1, 0, 0);
    CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    for (k = 0; k < 12; k++) {
        const int     drifted = (int)((test_random(&seed) >> 20) % (unsigned)c->world);
        const int     tensor  = (int[]){0, 1, 2, 5}[(test_random(&seed) >> 20) % 4];
        const int64_t element = (int64_t)((test_random(&seed) >> 20) % 1000);
        const int     alone   = holders(tensor, drifted, c->world) == 1u << drifted;
        audit_fill(&r, k + 1, drifted == c->rank ? tensor : -1, element, k % 2 ? 64.0f : -2048.0f);
        CHECK_EQ(audit_run(&r, &err), alone ? LORASYNC_OK : LORASYNC_E_DISAGREE);
        if (!alone) check_names(&r, &err, tensor, drifted);
        if (!alone) CHECK(!lorasync_plan_image(r.plan));
        audit_fill(&r, k + 1, -1, 0, 0);
        CHECK_EQ(audit_run(&r, &err), LORASYNC_OK); /* nothing is left of it */
    }
    audit_close(&r);
}

static void for_all_ways(void (*function)(rank_context *), int every)
{
    static const lorasync_plan_kind kinds[] = {LORASYNC_GATHER, LORASYNC_GATHER_ALL, LORASYNC_RESHARD};
    audit_case                      t;
    size_t                          i, k;
    memset(&t, 0, sizeof t);
    t.every = every;
    for (t.way = 0; t.way < NUM_WAYS; t.way++)
        for (k = 0; k < 3; k++)
            for (i = 0; i < num_worlds; i++) {
                t.kind = kinds[k];
                t.seed = t.seed * 3 + 11;
                start_devices();
                run_threads(worlds[i], function, &t);
                end_devices();
            }
}

/* Only one replica is read; the others must be as good. */
static void replicas_that_drift_apart_are_an_error(void) { for_all_ways(drifting_rank, 1); }

/* The first run, then every third; again and again while they differ. What rounding takes away is no difference. */
static void scheduled_rank(rank_context *c)
{
    audit_rank     r;
    lorasync_error err;
    const int      last = c->rank == c->world - 1, one = c->world == 1;
    int            k;
    audit_open(&r, c);
    audit_fill(&r, 0, last ? 0 : -1, 5, 64.0f);
    for (k = 0; k < 2; k++) CHECK_EQ(audit_run(&r, &err), one ? LORASYNC_OK : LORASYNC_E_DISAGREE);
    audit_fill(&r, 0, last ? 0 : -1, 5, 0.001f);
    CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    audit_fill(&r, 0, last ? 2 : -1, 5, 64.0f);
    for (k = 0; k < 2; k++) CHECK_EQ(audit_run(&r, &err), LORASYNC_OK); /* not looked at */
    for (k = 0; k < 2; k++) CHECK_EQ(audit_run(&r, &err), one ? LORASYNC_OK : LORASYNC_E_DISAGREE);
    if (!one) check_names(&r, &err, 2, c->world - 1);
    audit_fill(&r, 1, -1, 5, 0);
    CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    audit_close(&r);
}

static void replicas_are_compared_at_first_and_then_now_and_again(void) { for_all_ways(scheduled_rank, 3); }

static void unaudited_rank(rank_context *c)
{
    audit_rank     r;
    lorasync_error err;
    audit_open(&r, c);
    audit_fill(&r, 0, c->rank == c->world - 1 ? 0 : -1, 5, 64.0f);
    CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    audit_close(&r);
}

static void nothing_is_compared_where_that_is_turned_off(void) { for_all_ways(unaudited_rank, -1); }

static lorasync_comm watched[8];
static __thread long calls;

static lorasync_status watched_all_gather(void *user, const void *in, void *out, size_t num_bytes, int timeout_ms,
                                          lorasync_error *err)
{
    calls++;
    return ((lorasync_comm *)user)->all_gather(((lorasync_comm *)user)->user, in, out, num_bytes, timeout_ms, err);
}

static lorasync_status watched_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                        const lorasync_message *receives, size_t num_receives, int timeout_ms,
                                        lorasync_error *err)
{
    calls++;
    return ((lorasync_comm *)user)
        ->exchange(((lorasync_comm *)user)->user, sends, num_sends, receives, num_receives, timeout_ms, err);
}

/* The digests ride with the vote. */
static void watched_rank(rank_context *c)
{
    audit_rank     r;
    lorasync_error err;
    long           num[4];
    int            k;
    watched[c->rank]   = c->comm;
    c->comm.user       = &watched[c->rank];
    c->comm.all_gather = watched_all_gather;
    c->comm.exchange   = watched_exchange;
    c->comm.check      = NULL;
    c->comm.abort      = NULL;
    audit_open(&r, c);
    audit_fill(&r, 0, -1, 0, 0);
    for (k = 0; k < 4; k++) {
        calls = 0;
        CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
        num[k] = calls;
    }
    CHECK_EQ(num[0], num[1]); /* 0 and 2 compare */
    CHECK_EQ(num[2], num[1]);
    CHECK_EQ(num[3], num[1]);
    audit_close(&r);
}

static void comparing_sends_no_message(void)
{
    audit_case t;
    size_t     i;
    memset(&t, 0, sizeof t);
    t.kind  = LORASYNC_GATHER;
    t.every = 2;
    for (t.way = 0; t.way < 2; t.way++)
        for (i = 0; i < num_worlds; i++) {
            start_devices();
            run_threads(worlds[i], watched_rank, &t);
        }
}

/* By default: the first, and the 65th, or a later one where ranks hold much of one another's. */
static void default_rank(rank_context *c)
{
    audit_rank     r;
    lorasync_error err;
    int            k;
    audit_open(&r, c);
    audit_fill(&r, 0, -1, 0, 0);
    CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    audit_fill(&r, 0, c->rank == 0 ? 0 : -1, 5, 64.0f);
    for (k = 1; k < (c->world <= 2 ? 64 : c->world == 4 ? 105 : 198); k++) CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    CHECK_EQ(audit_run(&r, &err), c->world == 1 ? LORASYNC_OK : LORASYNC_E_DISAGREE);
    audit_close(&r);
}

static void by_default_every_64th_run_compares_or_one_in_more(void)
{
    audit_case t;
    size_t     i;
    memset(&t, 0, sizeof t);
    t.kind = LORASYNC_GATHER;
    for (i = 0; i < num_worlds; i++) {
        start_devices();
        run_threads(worlds[i], default_rank, &t);
    }
}

/* A value that is not finite, in a replica that is not read: on a GPU nothing of it is stored. */
static void infinite_rank(rank_context *c)
{
    audit_rank     r;
    lorasync_error err;
    audit_open(&r, c);
    audit_fill(&r, 0, c->rank == c->world - 1 ? 0 : -1, 5, (float)INFINITY);
    /* whichever is read */
    if (c->world > 1)
        CHECK(audit_run(&r, &err) < 0 && (err.status == LORASYNC_E_DISAGREE || err.status == LORASYNC_E_NAN));
    audit_fill(&r, 0, -1, 0, 0);
    CHECK_EQ(audit_run(&r, &err), LORASYNC_OK);
    audit_close(&r);
}

static void replicas_may_hold_what_is_not_finite(void)
{
    audit_case t;
    size_t     i;
    memset(&t, 0, sizeof t);
    t.kind = LORASYNC_GATHER;
    for (t.way = 0; t.way < NUM_WAYS; t.way++)
        for (i = 0; i < num_worlds; i++) {
            start_devices();
            run_threads(worlds[i], infinite_rank, &t);
        }
}

/* -- parameters that move */

/* Before ranks that share a GPU go on: freeing waits for all that runs there. */
static void barrier(const rank_context *c)
{
    char           in = 0, out[MAX_RANKS];
    lorasync_error err;
    CHECK_EQ(c->comm.all_gather(c->comm.user, &in, out, 1, test_ms(20000), &err), LORASYNC_OK);
}

enum {
    MOVING   = 7,         /* pieces of a rank, the base's last */
    PER_RANK = 16 * 6 * 4 /* bytes of a piece, at most */
};

typedef struct moving_case {
    int                way, shm;
    unsigned long long seed;
    char               name[64]; /* of the shared memory */
} moving_case;

/* A whole and replicated; B in two pieces; a flat A; a B with strides, replicated; the first A under a name of its own,
   at the same address; a base weight. */
typedef struct moving_rank {
    rank_context      *c;
    const moving_case *t;
    lorasync_comm      comm;
    lorasync_session  *s;
    lorasync_piece     p[MOVING];
} moving_rank;

#define MODULE(i) "base_model.model.h." #i ".q."

static void moving_declare(moving_rank *r)
{
    static const char *const names[MOVING] = {MODULE(0) "lora_A.default.weight", MODULE(0) "lora_B.default.weight",
                                              MODULE(0) "lora_B.default.weight", MODULE(1) "lora_A.default.weight",
                                              MODULE(1) "lora_B.default.weight", MODULE(2) "lora_A.default.weight",
                                              MODULE(0) "base_layer.weight"};
    int                      i;
    for (i = 0; i < MOVING; i++) {
        const int       is_a = i == 0 || i == 3 || i == 5;
        lorasync_piece *p    = &r->p[i];
        *p                   = whole_piece(names[i], LORASYNC_F32, 2, is_a ? 4 : 16, is_a || i == 6 ? 6 : 4, NULL);
        p->data              = memory_new(PER_RANK);
        if (i == 1 || i == 2) p->box = lorasync_shard(p->box, 0, 2 * r->c->rank + (i == 2), 2 * r->c->world);
        if (i == 3) p->box = lorasync_flat_shard(24, r->c->rank, r->c->world);
        if (i == 4) p->stride[0] = 1, p->stride[1] = 16;
    }
    memory_free(r->p[5].data);
    r->p[5].data = r->p[0].data;
}

static float moving_value(int i, int64_t element, int step)
{
    return (float)((i == 2 ? 1 : i == 5 ? 0 : i) * 1000 + step * 100) + (float)element;
}

/* Values of a step into the piece, where it is now. */
static void moving_fill(const moving_rank *r, int i, int step)
{
    const lorasync_piece *p = &r->p[i];
    float                 host[PER_RANK / 4];
    int64_t               k, n = p->box.flat ? p->box.len[0] : held_elements(p);
    for (k = 0; k < n; k++) {
        int64_t row = k / (p->box.flat ? n : p->box.len[1]), column = k % (p->box.flat ? n : p->box.len[1]);
        int64_t at = p->stride[0] ? row * p->stride[0] + column * p->stride[1] : k;
        int64_t element =
            p->box.flat ? p->box.off[0] + k : (row + p->box.off[0]) * p->shape[1] + column + p->box.off[1];
        host[at] = moving_value(i, element, step);
    }
    if (n) memory_copy(p->data, host, (size_t)n * 4);
}

static void moving_check(const moving_rank *r, int step)
{
    const lorasync_image *image = lorasync_session_image(r->s);
    static const int      of[5] = {0, 1, 3, 4, 5};
    size_t                i;
    int64_t               k;
    if (r->c->rank) return;
    REQUIRE(image && image->num_tensors == 6);
    for (i = 0; i < 5; i++) {
        float values[PER_RANK / 4];
        memory_copy(values, image->tensors[i].data, image->tensors[i].num_bytes);
        for (k = 0; k < image->tensors[i].shape[0] * image->tensors[i].shape[1]; k++)
            if (values[k] < moving_value(of[i], k, step) || values[k] > moving_value(of[i], k, step)) break;
        CHECK_EQ(k, image->tensors[i].shape[0] * image->tensors[i].shape[1]);
    }
}

static void moving_open(moving_rank *r, rank_context *c)
{
    lorasync_desc  d;
    lorasync_error err;
    lorasync_piece other;
    int            i;
#ifdef REPLICAS_CUDA
    lorasync_cuda cuda;
    memset(&cuda, 0, sizeof cuda);
    cuda.keep_on_device = ((const moving_case *)c->user)->shm;
#endif
    memset(r, 0, sizeof *r);
    memset(&d, 0, sizeof d);
    r->c    = c;
    r->t    = (const moving_case *)c->user;
    r->comm = comm_open(c, r->t->way);
    moving_declare(r);
    d.comm           = &r->comm;
    d.no_direct      = !is_direct(r->t->way);
    d.audit_replicas = 1;
    d.allow_missing  = 1; /* the base weights of one module are all that ranks declare */
    d.config_json    = adapter_config;
    d.timeout_ms     = test_ms(20000);
#ifdef REPLICAS_CUDA
    d.cuda = &cuda;
#endif
    err.text[0] = 0;
    CHECK_EQ(lorasync_open(&d, &r->s, &err), LORASYNC_OK);
    for (i = 0; i < MOVING; i++) CHECK_EQ(lorasync_add(r->s, &r->p[i], &err), LORASYNC_OK);
    other      = r->p[4]; /* the other half of the alias: on all ranks, and never moved */
    other.name = MODULE(2) "lora_B.default.weight";
    CHECK_EQ(lorasync_add(r->s, &other, &err), LORASYNC_OK);
    if (r->t->shm) CHECK_EQ(lorasync_attach_shm(r->s, r->t->name, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_rebind(r->s, r->p, MOVING, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "before lorasync_compile");
    err.text[0] = 0;
    CHECK_EQ(lorasync_compile(r->s, &err), LORASYNC_OK);
    CHECK_TEXT(err.text, "");
}

static void moving_close(moving_rank *r)
{
    int i;
    lorasync_close(r->s);
    comm_close(&r->comm);
    for (i = 0; i < MOVING; i++)
        if (i != 5) memory_free(r->p[i].data);
}

/* Every way; max_shm 1: also into memory that is lent. Nothing is left behind. */
static void moving_all_ways(void (*function)(rank_context *), int max_shm)
{
    moving_case t;
    size_t      i;
    memset(&t, 0, sizeof t);
    for (t.way = 0; t.way < NUM_WAYS; t.way++)
        for (t.shm = 0; t.shm <= max_shm; t.shm++)
            for (i = 0; i < num_worlds; i++) {
                t.seed = t.seed * 5 + 1;
                snprintf(t.name, sizeof t.name, "lorasync-test-replicas-%ld", (long)getpid());
                start_devices();
                run_threads(worlds[i], function, &t);
                if (t.shm) CHECK_EQ(lorasync_shm_remove(t.name, NULL), LORASYNC_OK);
                end_devices();
            }
}

/* Another address for a piece; what was there is worthless, and freed by the caller. */
static void *moving_move(moving_rank *r, int i)
{
    static const float worthless[PER_RANK / 4] = {0};
    void              *old                     = r->p[i].data;
    memory_copy(old, worthless, PER_RANK);
    r->p[i].data = memory_new(PER_RANK);
    return old;
}

static void moving_rank_run(rank_context *c)
{
    moving_rank        r;
    lorasync_report    report;
    lorasync_error     err;
    unsigned long long seed = ((const moving_case *)c->user)->seed + (unsigned)c->rank;
    int                step, i;
    moving_open(&r, c);
    for (step = 0; step < 8; step++) {
        void          *old[MOVING] = {NULL}, *kept = r.p[4].data;
        unsigned       which = step ? (unsigned)(test_random(&seed) >> 20) & 0x4f : 0;
        lorasync_piece list[MOVING];
        size_t         num = 0;
        if (step == 7) which = 0x4f;
        for (i = 0; i < MOVING; i++)
            if (which >> i & 1) old[i] = moving_move(&r, i);
        r.p[5].data = r.p[0].data;
        for (i = MOVING; i-- > 0;) /* all, or only those that have moved, in any order */
            if (step % 2 || which >> i & 1 || (i == 5 && which & 1)) list[num++] = r.p[i];
        for (i = 0; i < MOVING; i++)
            if (i != 5) moving_fill(&r, i, step);
        CHECK_EQ(lorasync_rebind(r.s, num ? list : NULL, num, &err), LORASYNC_OK);
        for (i = 0; i < MOVING; i++)
            if (old[i]) memory_free(old[i]);
        err.text[0] = 0;
        barrier(c);
        CHECK_EQ(lorasync_sync(r.s, (uint64_t)step + 1, &report, &err), LORASYNC_OK);
        CHECK_TEXT(err.text, "");
        if (r.t->shm && step > 1 && is_direct(r.t->way)) CHECK_EQ(report.in_place, 1);
        CHECK(kept == r.p[4].data);
        moving_check(&r, step);
    }
    /* replicas are compared where they are now */
    if (c->rank == c->world - 1) moving_fill(&r, 0, 9);
    barrier(c);
    CHECK_EQ(lorasync_sync(r.s, 9, NULL, &err), c->world == 1 ? LORASYNC_OK : LORASYNC_E_DISAGREE);
    if (c->world > 1) CHECK_HAS(err.text, ".q.lora_A.weight: ranks 0 and ");
    moving_close(&r);
}

static void parameters_that_moved_are_read_where_they_are(void) { moving_all_ways(moving_rank_run, 1); }

/* Nothing moves if one of the pieces cannot. */
static void refused_rank(rank_context *c)
{
    moving_rank    r;
    lorasync_error err;
    lorasync_piece p[3];
    void          *elsewhere = memory_new(PER_RANK);
    int            i;
    moving_open(&r, c);
    for (i = 0; i < MOVING; i++) moving_fill(&r, i, 0);
    for (i = 0; i < 11; i++) {
        static const struct {
            lorasync_status status;
            const char     *text;
        } said[11] = {{LORASYNC_E_NOT_FOUND, "q.lora_A.weight was not declared"},
                      {LORASYNC_E_NOT_FOUND, "q.lora_B.default.weight was not declared on this rank, or not with this"},
                      {LORASYNC_E_LAYOUT, "another dtype, shape, stride or scale"},
                      {LORASYNC_E_LAYOUT, "another dtype, shape, stride or scale"},
                      {LORASYNC_E_LAYOUT, "another dtype, shape, stride or scale"},
                      {LORASYNC_E_LAYOUT, "another dtype, shape, stride or scale"},
                      {LORASYNC_E_LAYOUT, "is given twice, at "},
                      {LORASYNC_E_ARGUMENT, "data is NULL"},
                      {LORASYNC_E_ARGUMENT, "no name"},
                      {LORASYNC_E_NOT_FOUND, "base_layer.bias was not declared"},
                      {LORASYNC_E_ARGUMENT, "the list is NULL"}};
        p[0]       = r.p[0]; /* which could move */
        p[0].data  = elsewhere;
        p[1]       = r.p[1];
        p[1].data  = elsewhere;
        p[2]       = r.p[0];
        if (i == 0) p[1].name = MODULE(0) "lora_A.weight";
        if (i == 1) p[1].box = lorasync_whole(p[1].shape, 2), p[1].box.off[0] = 3, p[1].box.len[0] = 2;
        if (i == 2) p[1].dtype = LORASYNC_BF16;
        if (i == 3) p[1].shape[1] = 5;
        if (i == 4) p[1].stride[0] = 1, p[1].stride[1] = 16;
        if (i == 5) p[1].scale = 2;
        if (i == 7) p[1].data = NULL;
        if (i == 8) p[1].name = NULL;
        if (i == 9) p[1].name = MODULE(0) "base_layer.bias";
        CHECK_EQ(lorasync_rebind(r.s, i == 10 ? NULL : p, i == 6 ? 3 : 2, &err), said[i].status);
        CHECK_HAS(err.text, said[i].text);
    }
    CHECK_EQ(lorasync_rebind(NULL, r.p, MOVING, &err), LORASYNC_E_ARGUMENT);
    barrier(c);
    CHECK_EQ(lorasync_begin(r.s, 1, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_rebind(r.s, r.p, MOVING, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "between begin and wait");
    CHECK_EQ(lorasync_wait(r.s, NULL, &err), LORASYNC_OK);
    moving_check(&r, 0);
    moving_close(&r);
    memory_free(elsewhere);
}

static void what_cannot_move_moves_nothing(void) { moving_all_ways(refused_rank, 0); }

/* -- memory that is gone */

static void gone_rank(rank_context *c)
{
    moving_rank    r;
    lorasync_error err;
    lorasync_piece p[MOVING + 1];
    const int      last = c->world - 1;
    char           who[32];
    int            i, k;
    moving_open(&r, c);
    for (i = 0; i < MOVING; i++) moving_fill(&r, i, 0);
    barrier(c);
    CHECK_EQ(lorasync_sync(r.s, 1, NULL, &err), LORASYNC_OK);
    for (i = 0; c->rank == last && i < MOVING; i++)
        if (i != 5) memory_free(r.p[i].data);
    snprintf(who, sizeof who, "rank %d: ", last);
    for (k = 0; k < 3; k++) { /* whichever of them is looked at */
        barrier(c);
        CHECK_EQ(lorasync_sync(r.s, 2, NULL, &err), LORASYNC_E_ARGUMENT);
        if (c->world > 1) CHECK_HAS(err.text, who);
        CHECK_HAS(err.text, ".weight: its memory at ");
        CHECK_HAS(err.text, "lorasync_rebind");
    }
    for (i = 0; c->rank == last && i < MOVING; i++) r.p[i].data = i == 5 ? r.p[0].data : memory_new(PER_RANK);
    for (i = 0; i < MOVING; i++) moving_fill(&r, i == 5 ? 0 : i, 1);
    memcpy(p, r.p, sizeof r.p);
    p[MOVING]      = r.p[4];
    p[MOVING].name = MODULE(2) "lora_B.default.weight";
    if (c->rank == last) CHECK_EQ(lorasync_rebind(r.s, p, MOVING + 1, &err), LORASYNC_OK);
    barrier(c);
    CHECK_EQ(lorasync_sync(r.s, 2, NULL, &err), LORASYNC_OK);
    moving_check(&r, 1);
    moving_close(&r);
}

/* A model that was moved, and whose old memory the system has back. */
static void memory_that_is_gone_is_not_read(void) { moving_all_ways(gone_rank, 0); }

#ifndef REPLICAS_CUDA

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
    for (i = 0; i < num_worlds; i++)
        for (skip = 0; skip < 2; skip++) run_threads(worlds[i], counting_rank, &skip);
}

#endif

#ifdef REPLICAS_CUDA
int main(void)
{
#ifdef REPLICAS_GPU
    int num_gpus = 0;
    if (cudaGetDeviceCount(&num_gpus) != cudaSuccess || !num_gpus) {
        printf("skip test_replicas_cuda: no GPU here\n");
        test_skipped++;
        return test_summary("test_replicas_cuda");
    }
    while (worlds[num_worlds - 1] > num_gpus) num_worlds--;
#endif
    RUN(replicas_that_drift_apart_are_an_error);
    RUN(replicas_are_compared_at_first_and_then_now_and_again);
    RUN(nothing_is_compared_where_that_is_turned_off);
    RUN(comparing_sends_no_message);
    RUN(by_default_every_64th_run_compares_or_one_in_more);
    RUN(replicas_may_hold_what_is_not_finite);
    RUN(parameters_that_moved_are_read_where_they_are);
    RUN(what_cannot_move_moves_nothing);
    RUN(memory_that_is_gone_is_not_read);
    return test_summary("test_replicas_cuda");
}
#else
int         main(void)
{
    RUN(equal_boxes_of_one_rank_have_one_address);
    RUN(pairs_come_from_one_rank_where_they_can);
    RUN(replicas_that_drift_apart_are_an_error);
    RUN(replicas_are_compared_at_first_and_then_now_and_again);
    RUN(nothing_is_compared_where_that_is_turned_off);
    RUN(comparing_sends_no_message);
    RUN(by_default_every_64th_run_compares_or_one_in_more);
    RUN(replicas_may_hold_what_is_not_finite);
    RUN(parameters_that_moved_are_read_where_they_are);
    RUN(what_cannot_move_moves_nothing);
    RUN(memory_that_is_gone_is_not_read);
    RUN(reports_count_what_is_zero_and_what_has_changed);
    return test_summary("test_replicas");
}
#endif
