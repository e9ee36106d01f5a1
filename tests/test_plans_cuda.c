/* Device plans without a GPU, beyond their runs: several on one communicator, captures that come to nothing, and ends
   at any point. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifdef HAVE_CUDA
#define LORASYNCI_CLOSING_MS test_ms(500) /* of test.h */
static int test_ms(int ms);
#define LORASYNC_CUDA
#define LORASYNC_NCCL
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"

#ifndef HAVE_CUDA
int main(void)
{
    printf("skip test_plans_cuda: no cuda_runtime_api.h and nccl.h here\n");
    test_skipped++;
    return test_summary("test_plans_cuda");
}
#else

#include "fake_cuda.h"
#include "fake_nccl.h"
#include "ranks.h"
#include "random_case.h"
#include "device_case.h"

enum {
    LENGTH    = 5000,
    NUM_BYTES = LENGTH * 4
};

static void reset(int way)
{
    fake_cuda_reset();
    fake_nccl_reset();
    memset(&device_options, 0, sizeof device_options);
    fake_cuda.devices  = 3;
    device_options.way = way;
}

static void check_left(void)
{
    CHECK_EQ(fake_cuda_left(), 0);
    CHECK_EQ(fake_nccl.live, 0);
    CHECK_EQ(fake_nccl.misuses + fake_nccl.mismatches, 0);
}

static int has_plan_nccl(void) { return device_options.way == WAY_NCCL || device_options.way == WAY_NCCL_DIRECT; }

/* One tensor: rank 0 has it, or, `split`, every rank a part; it goes into rank 1's image, into everybody's, or
   (RESHARD) to rank 1. */
typedef struct one_plan {
    device_rank       *d;
    lorasync_piece     piece;
    lorasync_cuda      cuda;
    lorasync_plan_desc desc;
    lorasync_plan     *plan;
    cudaGraph_t        graph;
    lorasync_error     err;
} one_plan;

static void make(one_plan *o, device_rank *d, lorasync_plan_kind kind, int split, int keep_on_device, int timeout_ms)
{
    memset(o, 0, sizeof *o);
    o->d              = d;
    o->piece.name     = "t";
    o->piece.dtype    = LORASYNC_F32;
    o->piece.ndim     = 1;
    o->piece.shape[0] = LENGTH;
    o->piece.box      = lorasync_whole(o->piece.shape, 1);
    if (split) o->piece.box = lorasync_shard(o->piece.box, 0, d->context->rank, d->context->world);
    REQUIRE(cudaMalloc(&o->piece.data, NUM_BYTES) == cudaSuccess);
    REQUIRE(cudaStreamCreateWithFlags(&o->cuda.stream, cudaStreamNonBlocking) == cudaSuccess);
    o->cuda.keep_on_device = keep_on_device;
    o->desc.comm           = &d->comm;
    o->desc.kind           = kind;
    o->desc.root           = 1;
    o->desc.cuda           = &o->cuda;
    o->desc.no_direct      = device_options.way == WAY_NCCL || device_options.way == WAY_HOST;
    o->desc.timeout_ms     = test_ms(timeout_ms);
    if (split || d->context->rank == 0) o->desc.have = &o->piece, o->desc.num_have = 1;
    else if (kind == LORASYNC_RESHARD && d->context->rank == 1) o->desc.want = &o->piece, o->desc.num_want = 1;
    CHECK_EQ(lorasync_plan_create(&o->desc, &o->plan, &o->err), LORASYNC_OK);
}

static void drop(one_plan *o)
{
    lorasync_plan_free(o->plan);
    if (o->graph) fake_graph_free(o->graph);
    cudaFree(o->piece.data);
    cudaStreamDestroy(o->cuda.stream);
}

static void fill(const one_plan *o, float value)
{
    static __thread float v[LENGTH];
    int                   i;
    for (i = 0; i < LENGTH; i++) v[i] = value;
    cudaMemcpy(o->piece.data, v, NUM_BYTES, cudaMemcpyDefault);
}

/* What rank 1 has of it; 0: nothing. */
static float value(const one_plan *o)
{
    const lorasync_image *image = lorasync_plan_image(o->plan);
    const void           *from  = o->desc.kind == LORASYNC_RESHARD ? o->piece.data : image ? image->payload : NULL;
    float                 v     = 0;
    if (from) cudaMemcpy(&v, from, sizeof v, cudaMemcpyDefault);
    return v;
}

static lorasync_status capture(one_plan *o)
{
    lorasync_status status;
    cudaStreamBeginCapture(o->cuda.stream, cudaStreamCaptureModeThreadLocal);
    status = lorasync_plan_begin(o->plan, &o->err);
    cudaStreamEndCapture(o->cuda.stream, &o->graph);
    return status;
}

static void open_rank(device_rank *d, rank_context *x)
{
    memset(d, 0, sizeof *d);
    d->context = x;
    cudaSetDevice(x->rank);
    CHECK_EQ(device_comm(d), LORASYNC_OK);
}

static void close_rank(device_rank *d)
{
    device_barrier(d);
    if (has_plan_nccl()) lorasync_nccl_close(&d->comm);
}

/* -- two plans of one communicator, both begun before either is waited for */

enum {
    X_FAILS = 0, /* X's begin fails on rank 0 */
    X_LAZY,      /* rank 0 forgets to begin X */
    SWAPPED      /* rank 0 begins, and waits for, Y first */
};

typedef struct two_case {
    lorasync_plan_kind kind;
    int                what;
} two_case;

static void two_plans(rank_context *x)
{
    const two_case *c   = (const two_case *)x->user;
    const int       odd = x->rank == 0;
    device_rank     d;
    one_plan        a, b;
    lorasync_status sa, sb;
    int             run;
    open_rank(&d, x);
    make(&a, &d, c->kind, 0, 0, 2000);
    make(&b, &d, c->kind, 0, 0, 2000);
    for (run = 1; run <= 3; run++) {
        int now = run == 2;
        if (odd) fill(&a, (float)run), fill(&b, 100.0f * (float)run);
        device_barrier(&d);
        if (now && odd && c->what == X_FAILS) fake_fail_launch(0, 0);
        if (now && odd && c->what == SWAPPED) lorasync_plan_begin(b.plan, NULL);
        if (!(now && odd && c->what == X_LAZY)) lorasync_plan_begin(a.plan, NULL);
        if (!(now && odd && c->what == SWAPPED)) lorasync_plan_begin(b.plan, NULL);
        sb = now && odd && c->what == SWAPPED ? lorasync_plan_wait(b.plan, &b.err) : LORASYNC_OK;
        sa = lorasync_plan_wait(a.plan, &a.err);
        if (!(now && odd && c->what == SWAPPED)) sb = lorasync_plan_wait(b.plan, &b.err);
        if (x->rank == 1 && sa == LORASYNC_OK) CHECK(value(&a) == (float)run);
        if (x->rank == 1 && sb == LORASYNC_OK) CHECK(value(&b) == 100.0f * (float)run);
        if (!now) CHECK(sa == LORASYNC_OK && sb == LORASYNC_OK);
        else
            CHECK_EQ(sa, c->what == X_FAILS  ? LORASYNC_E_CUDA
                         : c->what == X_LAZY ? LORASYNC_E_STATE
                                             : LORASYNC_E_DISAGREE);
        if (now && c->what == X_FAILS) CHECK_EQ(sb, LORASYNC_OK);
        if (now && c->what == SWAPPED) CHECK_HAS(a.err.text, "same order");
    }
    device_barrier(&d);
    drop(&a), drop(&b);
    close_rank(&d);
}

static void plans_of_one_communicator(void)
{
    static const two_case cases[] = {{LORASYNC_GATHER, X_FAILS},
                                     {LORASYNC_RESHARD, X_FAILS},
                                     {LORASYNC_GATHER, X_LAZY},
                                     {LORASYNC_RESHARD, X_LAZY},
                                     {LORASYNC_GATHER, SWAPPED}};
    size_t                i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        two_case c = cases[i];
        reset(c.kind == LORASYNC_RESHARD ? WAY_NCCL_DIRECT : WAY_NCCL);
        run_threads(2, two_plans, &c);
        check_left();
    }
}

/* -- captures that come to nothing */

/* The begin in it is refused: nothing after it succeeds with the bytes of the run before. */
static void refused(rank_context *x)
{
    device_rank d;
    one_plan    o;
    int         step;
    open_rank(&d, x);
    make(&o, &d, *(const lorasync_plan_kind *)x->user, 0, 0, 2000);
    if (x->rank == 0) fill(&o, 1);
    CHECK_EQ(lorasync_plan_begin(o.plan, &o.err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(o.plan, &o.err), LORASYNC_OK);
    CHECK_EQ(capture(&o), LORASYNC_E_UNSUPPORTED);
    for (step = 0; step < 3; step++) {
        device_barrier(&d);
        fake_graph_launch(o.graph, o.cuda.stream);
        CHECK_EQ(lorasync_plan_wait(o.plan, &o.err), step ? LORASYNC_E_STATE : LORASYNC_E_UNSUPPORTED);
    }
    close_rank(&d);
    drop(&o);
}

static void capture_is_refused(void)
{
    static const lorasync_plan_kind kinds[] = {LORASYNC_GATHER, LORASYNC_RESHARD};
    lorasync_plan_kind              kind;
    int                             i;
    for (i = 0; i < 2; i++) {
        reset(i ? WAY_DIRECT : WAY_HOST);
        kind = kinds[i];
        run_threads(2, refused, &kind);
        check_left();
    }
}

/* One rank waits for a launch that it did not make: at first, and later. */
static void unlaunched(rank_context *x)
{
    device_rank d;
    one_plan    o;
    int         run;
    open_rank(&d, x);
    make(&o, &d, *(const lorasync_plan_kind *)x->user, 0, 0, 2000);
    CHECK_EQ(capture(&o), LORASYNC_OK);
    for (run = 0; run < 4; run++) {
        lorasync_status s;
        if (x->rank == 0) fill(&o, (float)(run + 1));
        device_barrier(&d);
        if (run % 2 || x->rank == 0) fake_graph_launch(o.graph, o.cuda.stream);
        s = lorasync_plan_wait(o.plan, &o.err);
        CHECK_EQ(s, run % 2 ? LORASYNC_OK : LORASYNC_E_STATE);
        if (s < 0) CHECK_HAS(o.err.text, "was not launched");
        if (s == LORASYNC_OK && x->rank == 1) CHECK(value(&o) == (float)(run + 1));
    }
    device_barrier(&d);
    drop(&o);
    close_rank(&d);
}

static void graph_is_not_launched(void)
{
    static const int ways[] = {WAY_NCCL, WAY_DIRECT, WAY_NCCL_DIRECT};
    size_t           i;
    for (i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        lorasync_plan_kind kind = ways[i] == WAY_NCCL_DIRECT ? LORASYNC_RESHARD : LORASYNC_GATHER;
        reset(ways[i]);
        run_threads(2, unlaunched, &kind);
        check_left();
    }
}

/* A plan is freed whose graph never ran: another one of the communicator is as well as before. */
static void captured_and_freed(rank_context *x)
{
    device_rank d;
    one_plan    a, b;
    open_rank(&d, x);
    make(&a, &d, LORASYNC_GATHER, 0, 0, 2000);
    make(&b, &d, LORASYNC_GATHER, 0, 0, 2000);
    CHECK_EQ(capture(&a), LORASYNC_OK);
    drop(&a);
    if (x->rank == 0) fill(&b, 5);
    CHECK_EQ(lorasync_plan_begin(b.plan, &b.err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(b.plan, &b.err), LORASYNC_OK);
    if (x->rank == 1) CHECK(value(&b) == 5);
    device_barrier(&d);
    drop(&b);
    close_rank(&d);
}

static void graph_is_freed(void)
{
    reset(WAY_NCCL);
    run_threads(2, captured_and_freed, NULL);
    check_left();
}

/* -- ends */

static int gate_open;

static int gate_run(fake_item *item)
{
    (void)item;
    return __atomic_load_n(&gate_open, __ATOMIC_ACQUIRE);
}

/* Work of the caller's that takes until the gate opens. */
static void gate(cudaStream_t stream)
{
    fake_item item;
    memset(&item, 0, sizeof item);
    item.run = gate_run;
    pthread_mutex_lock(&fake_lock);
    fake_enqueue(stream, &item);
    pthread_mutex_unlock(&fake_lock);
}

/* Rank 1 passes its deadline and frees its plan; what rank 0 began in time still waits behind its caller's work. */
static void late(rank_context *x)
{
    static char zeros[2 << 20], bytes[2 << 20];
    device_rank d;
    one_plan    o;
    void       *again = NULL;
    open_rank(&d, x);
    make(&o, &d, *(const lorasync_plan_kind *)x->user, 0, 0, 400);
    if (x->rank == 0) fill(&o, 7), gate(o.cuda.stream);
    device_barrier(&d);
    CHECK_EQ(lorasync_plan_begin(o.plan, &o.err), LORASYNC_OK);
    device_barrier(&d);
    if (x->rank == 1) {
        CHECK(lorasync_is_lost(lorasync_plan_wait(o.plan, &o.err)));
        lorasync_plan_free(o.plan);
        o.plan = NULL;
        REQUIRE(cudaMalloc(&again, sizeof zeros) == cudaSuccess); /* may well be where it was */
        cudaMemcpy(again, zeros, sizeof zeros, cudaMemcpyDefault);
    }
    device_barrier(&d);
    if (x->rank == 0) {
        __atomic_store_n(&gate_open, 1, __ATOMIC_RELEASE);
        CHECK(lorasync_is_lost(lorasync_plan_wait(o.plan, &o.err)));
    }
    device_barrier(&d);
    if (x->rank == 1) {
        cudaMemcpy(bytes, again, sizeof bytes, cudaMemcpyDefault);
        CHECK(memcmp(bytes, zeros, sizeof zeros) == 0);
        cudaFree(again);
    }
    close_rank(&d);
    drop(&o);
}

static void freed_under_a_writer(void)
{
    static const lorasync_plan_kind kinds[] = {LORASYNC_GATHER, LORASYNC_RESHARD};
    int                             i;
    for (i = 0; i < 2; i++) {
        lorasync_plan_kind kind = kinds[i];
        reset(WAY_NCCL_DIRECT);
        gate_open = 0;
        run_threads(2, late, &kind);
        CHECK_EQ(fake_cuda.live_memory, 1); /* what rank 0 had open is nobody's again */
        fake_cuda.live_memory = 0;
        check_left();
    }
}

/* Every rank's image is the root's memory: the root may go first. */
static void root_goes(rank_context *x)
{
    device_rank d;
    one_plan    o;
    open_rank(&d, x);
    make(&o, &d, LORASYNC_GATHER_ALL, 1, 1, 2000);
    fill(&o, (float)(x->rank + 1));
    CHECK_EQ(lorasync_plan_begin(o.plan, &o.err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(o.plan, &o.err), LORASYNC_OK);
    if (x->rank == 1) lorasync_plan_free(o.plan), o.plan = NULL;
    device_barrier(&d);
    if (x->rank == 0) CHECK(value(&o) == 1);
    close_rank(&d);
    drop(&o);
}

static void root_is_freed_first(void)
{
    reset(WAY_DIRECT);
    run_threads(2, root_goes, NULL);
    CHECK_EQ(fake_cuda.live_memory, 1); /* the others had it open */
    fake_cuda.live_memory = 0;
    check_left();
}

/* Rank 1's begin fails behind its vote, or its graph is launched and not waited for, and the plan is freed while the
   others do nothing. */
static void ends_alone(rank_context *x)
{
    const int   graph = *(const int *)x->user;
    device_rank d;
    one_plan    o;
    uint64_t    start;
    open_rank(&d, x);
    make(&o, &d, graph ? LORASYNC_GATHER : LORASYNC_RESHARD, 0, 0, 400);
    if (graph) CHECK_EQ(capture(&o), LORASYNC_OK);
    device_barrier(&d);
    if (x->rank == 1) {
        if (!graph) fake_fail_launch(1, 0); /* it packs nothing: its first launch is the placing */
        if (graph) fake_graph_launch(o.graph, o.cuda.stream);
        else CHECK_EQ(lorasync_plan_begin(o.plan, &o.err), LORASYNC_E_CUDA);
        start = test_now_ns();
        lorasync_plan_free(o.plan);
        o.plan = NULL;
        CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns());
    }
    device_barrier(&d);
    drop(&o);
    close_rank(&d);
}

static void end_is_bounded(void)
{
    int graph;
    for (graph = 0; graph < 2; graph++) {
        reset(graph ? WAY_NCCL : WAY_NCCL_DIRECT);
        run_threads(2, ends_alone, &graph);
        if (!graph) fake_cuda.live_memory = 0; /* what the sender has open */
        check_left();
    }
}

/* The root's image stays on the device, and the root's own stream still reads it: the next begin lets that end
   first. */
static void reads_behind(rank_context *x)
{
    device_rank d;
    one_plan    o;
    void       *copy  = NULL;
    float       first = 0;
    open_rank(&d, x);
    make(&o, &d, LORASYNC_GATHER, 0, 1, 4000);
    if (x->rank == 0) fill(&o, 1);
    REQUIRE(cudaMalloc(&copy, NUM_BYTES) == cudaSuccess);
    CHECK_EQ(lorasync_plan_begin(o.plan, &o.err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(o.plan, &o.err), LORASYNC_OK);
    if (x->rank == 1) {
        gate(o.cuda.stream);
        cudaMemcpyAsync(copy, lorasync_plan_image(o.plan)->payload, NUM_BYTES, cudaMemcpyDefault, o.cuda.stream);
    }
    device_barrier(&d);
    if (x->rank == 0) fill(&o, 2);
    if (x->rank == 2) test_sleep_ms(300), __atomic_store_n(&gate_open, 1, __ATOMIC_RELEASE);
    CHECK_EQ(lorasync_plan_begin(o.plan, &o.err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(o.plan, &o.err), LORASYNC_OK);
    if (x->rank == 1) {
        cudaStreamSynchronize(o.cuda.stream);
        cudaMemcpy(&first, copy, sizeof first, cudaMemcpyDefault);
        CHECK(first == 1 && value(&o) == 2);
    }
    device_barrier(&d);
    cudaFree(copy);
    drop(&o);
    close_rank(&d);
}

static void image_is_read_behind_the_run(void)
{
    reset(WAY_DIRECT);
    gate_open = 0;
    run_threads(3, reads_behind, NULL);
    check_left();
}

int main(void)
{
    RUN(plans_of_one_communicator);
    RUN(capture_is_refused);
    RUN(graph_is_not_launched);
    RUN(graph_is_freed);
    RUN(freed_under_a_writer);
    RUN(root_is_freed_first);
    RUN(end_is_bounded);
    RUN(image_is_read_behind_the_run);
    return test_summary("test_plans_cuda");
}

#endif
