/* Device plans without a GPU: the random cases of test_plan in fake device memory, over every way that bytes can take,
   and what may fail. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifdef HAVE_CUDA
#define LORASYNCI_FULL 1
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
    printf("skip test_cuda_fake: no cuda_runtime_api.h and nccl.h here\n");
    test_skipped++;
    return test_summary("test_cuda_fake");
}
#else

#include "fake_cuda.h"
#include "fake_nccl.h"
#include "ranks.h"
#include "random_case.h"
#include "device_case.h"
#include "pieces.h"

static void reset(void)
{
    fake_cuda_reset();
    fake_nccl_reset();
    fake_cuda.delay = fake_cuda.slow_device = 0;
    memset(&device_options, 0, sizeof device_options);
}

/* Nothing is left, and nothing was used wrongly. */
static void check_left(void)
{
    if (device_options.pageable_source) fake_cuda.pageable_in = 0; /* the image of a SCATTER may be anywhere */
    CHECK_EQ(fake_cuda_left(), 0);
    CHECK_EQ(fake_nccl.live, 0);
    CHECK_EQ(fake_nccl.misuses + fake_nccl.mismatches, 0);
    CHECK_EQ(cudaPeekAtLastError(), cudaSuccess);
}

static void cases(int way, int devices, int slow, int num)
{
    int kind;
    for (kind = LORASYNC_GATHER; kind <= LORASYNC_RESHARD; kind++) {
        reset();
        fake_cuda.devices              = devices;
        fake_cuda.hold                 = slow;
        fake_cuda.delay                = slow ? 40 : 0;
        device_options.way             = way;
        device_options.pageable_source = kind == LORASYNC_SCATTER;
        random_cases((lorasync_plan_kind)kind, num, 0, run_device_case);
        random_cases((lorasync_plan_kind)kind, num / 20, 1, run_device_case);
        CHECK(fake_cuda.launches > num);
        check_left();
    }
}

static void direct(void) { cases(WAY_DIRECT, 1, 0, 80); }
static void direct_over_devices(void) { cases(WAY_DIRECT, 3, 0, 40); }
static void over_nccl(void) { cases(WAY_NCCL, 8, 0, 40); }
static void over_the_host(void) { cases(WAY_HOST, 2, 0, 60); }
static void directly_with_nccl(void) { cases(WAY_NCCL_DIRECT, 8, 0, 20); }

static void slow_gpu(void)
{
    cases(WAY_DIRECT, 2, 3, 20);
    cases(WAY_NCCL, 8, 3, 20);
    cases(WAY_HOST, 1, 3, 20);
    cases(WAY_NCCL_DIRECT, 8, 3, 10);
}

static void plan_of_replicas(rank_context *x)
{
    enum {
        NUM = 1000
    };
    lorasync_plan_desc desc;
    lorasync_cuda      cuda;
    lorasync_piece     piece;
    lorasync_plan     *plan = NULL;
    lorasync_error     err;
    memset(&desc, 0, sizeof desc);
    memset(&cuda, 0, sizeof cuda);
    cudaSetDevice(x->rank);
    piece = whole_piece("t", LORASYNC_F32, 1, NUM, 0, NULL);
    REQUIRE(cudaMalloc(&piece.data, NUM * 4) == cudaSuccess);
    desc.comm       = &x->comm;
    desc.have       = &piece;
    desc.num_have   = 1;
    desc.root       = x->world - 1;
    desc.cuda       = &cuda;
    desc.timeout_ms = test_ms(device_patience_ms);
    CHECK_EQ(lorasync_plan_create(&desc, &plan, &err), LORASYNC_OK);
    if (plan) CHECK(plan->direct);
    if (plan) CHECK_EQ(plan->pack.list.size / sizeof(lorasynci_op), x->rank == x->world - 1);
    lorasync_plan_free(plan);
    cudaFree(piece.data);
}

/* What the root's GPU has itself crosses no link. */
static void root_copies_its_own(void)
{
    reset();
    fake_cuda.devices = 4;
    run_threads(4, plan_of_replicas, NULL);
    check_left();
}

enum {
    BUCKET = 1 << 20,
    TWENTY = 20
};

/* 20 tensors of 400 kB, half of each on either rank: rank 1 sends 4 MB. user: the bucket. */
static void plan_of_much(rank_context *x)
{
    static char         names[TWENTY][16];
    const size_t        bucket = *(const size_t *)x->user;
    device_rank         d;
    lorasync_plan_desc  desc;
    lorasync_cuda       cuda;
    lorasync_piece      pieces[TWENTY];
    lorasync_plan_stats stats;
    void               *memory = NULL;
    int                 i;
    memset(&d, 0, sizeof d);
    memset(&desc, 0, sizeof desc);
    memset(&cuda, 0, sizeof cuda);
    memset(pieces, 0, sizeof pieces);
    d.context = x;
    cudaSetDevice(x->rank);
    REQUIRE(device_comm(&d) == LORASYNC_OK);
    REQUIRE(cudaMalloc(&memory, 50000 * 4) == cudaSuccess);
    for (i = 0; i < TWENTY; i++) {
        if (x->rank == 0) snprintf(names[i], sizeof names[i], "t%d", i);
        pieces[i].name     = names[i];
        pieces[i].dtype    = LORASYNC_F32;
        pieces[i].ndim     = 1;
        pieces[i].shape[0] = 100000;
        pieces[i].box      = lorasync_shard(lorasync_whole(pieces[i].shape, 1), 0, x->rank, 2);
        pieces[i].data     = memory;
    }
    device_barrier(&d);
    desc.comm         = &d.comm;
    desc.have         = pieces;
    desc.num_have     = TWENTY;
    desc.cuda         = &cuda;
    desc.no_direct    = 1;
    desc.bucket_bytes = bucket;
    desc.timeout_ms   = test_ms(device_patience_ms);
    CHECK_EQ(lorasync_plan_create(&desc, &d.plan, &d.err), LORASYNC_OK);
    lorasync_plan_get_stats(d.plan, &stats);
    if (x->rank == 1) CHECK(stats.send_bytes > 4000000);
    if (bucket)
        CHECK(stats.staging_bytes > BUCKET / 2 && stats.staging_bytes <= BUCKET + 1024); /* of either rank;
                                                                                                    digests and
                                                                                                    alignment */
    else if (x->rank == 1) CHECK(stats.staging_bytes >= stats.send_bytes);
    lorasync_plan_free(d.plan);
    lorasync_nccl_close(&d.comm);
    cudaFree(memory);
}

/* More than a bucket is not staged at once; less is, as the snapshot. */
static void staging_is_bounded(void)
{
    size_t bucket;
    for (bucket = 0; bucket <= BUCKET; bucket += BUCKET) {
        reset();
        fake_cuda.devices  = 2;
        device_options.way = WAY_NCCL;
        run_threads(2, plan_of_much, &bucket);
        check_left();
    }
}

/* Where ranks vote on the GPU no run asks over the host; where they cannot, each does. */
static void votes_travel_with_the_bytes(void)
{
    static random_case c;
    unsigned           seed;
    int                r, on_gpu = 0;
    for (seed = 1; on_gpu < 20; seed++) {
        reset();
        fake_cuda.devices          = 8;
        device_options.way         = WAY_NCCL;
        device_options.watch_votes = 1 + on_gpu % 2;
        device_host_votes = device_rounds = 0;
        make_case(&c, seed, LORASYNC_GATHER, 0);
        run_threads(c.world, run_device_case, &c);
        for (r = 0; r < c.world; r++) CHECK_EQ(c.status[r], LORASYNC_OK);
        if (device_rounds) {
            CHECK_EQ(device_host_votes, device_options.watch_votes == 2 ? 3 * c.world : 0);
            on_gpu++;
        }
        free_case(&c);
        check_left();
    }
}

/* -- a reshard that places directly: what a run brought is not overwritten by the next one before it is placed, without
   any barrier between */

enum {
    MANY_RUNS = 40,
    LENGTH    = 5000
};

/* One tensor that rank 0 has and all others want. */
typedef struct one_tensor {
    device_rank        d;
    lorasync_piece     piece;
    lorasync_cuda      cuda;
    lorasync_plan_desc desc;
    float              values[LENGTH];
} one_tensor;

static one_tensor *one_open(rank_context *x, int timeout_ms)
{
    one_tensor         *o = (one_tensor *)calloc(1, sizeof *o);
    lorasync_plan_stats stats;
    o->d.context = x;
    cudaSetDevice(x->rank);
    cudaStreamCreateWithFlags(&o->d.stream, cudaStreamNonBlocking);
    CHECK_EQ(device_comm(&o->d), LORASYNC_OK);
    o->piece.name     = "t";
    o->piece.dtype    = LORASYNC_F32;
    o->piece.ndim     = 1;
    o->piece.shape[0] = LENGTH;
    o->piece.box      = lorasync_whole(o->piece.shape, 1);
    CHECK_EQ(cudaMalloc(&o->piece.data, sizeof o->values), cudaSuccess);
    o->cuda.stream     = o->d.stream;
    o->desc.comm       = &o->d.comm;
    o->desc.kind       = LORASYNC_RESHARD;
    o->desc.cuda       = &o->cuda;
    o->desc.timeout_ms = timeout_ms;
    if (x->rank == 0) o->desc.have = &o->piece, o->desc.num_have = 1;
    else o->desc.want = &o->piece, o->desc.num_want = 1;
    CHECK_EQ(lorasync_plan_create(&o->desc, &o->d.plan, &o->d.err), LORASYNC_OK);
    lorasync_plan_get_stats(o->d.plan, &stats);
    CHECK(stats.direct && !stats.num_rounds);
    return o;
}

static void one_close(one_tensor *o)
{
    device_barrier(&o->d);
    lorasync_plan_free(o->d.plan);
    if (o->d.comm.exchange_stream) lorasync_nccl_close(&o->d.comm);
    if (o->d.graph) fake_graph_free(o->d.graph);
    cudaFree(o->piece.data);
    cudaStreamDestroy(o->d.stream);
    free(o);
}

static void one_fill(one_tensor *o, float value)
{
    int i;
    for (i = 0; i < LENGTH; i++) o->values[i] = value + (float)i;
    cudaMemcpy(o->piece.data, o->values, sizeof o->values, cudaMemcpyDefault);
}

static int one_is(one_tensor *o, float value)
{
    int i, wrong = 0;
    cudaMemcpy(o->values, o->piece.data, sizeof o->values, cudaMemcpyDefault);
    for (i = 0; i < LENGTH; i++) wrong += o->values[i] != value + (float)i;
    return !wrong;
}

/* begin, as a graph or not: recorded once, then launched. */
static lorasync_status one_begin(one_tensor *o, int graph)
{
    lorasync_status status = LORASYNC_OK;
    if (!graph) return lorasync_plan_begin(o->d.plan, &o->d.err);
    if (!o->d.graph) {
        cudaStreamBeginCapture(o->d.stream, cudaStreamCaptureModeThreadLocal);
        status = lorasync_plan_begin(o->d.plan, &o->d.err);
        cudaStreamEndCapture(o->d.stream, &o->d.graph);
    }
    if (status == LORASYNC_OK) fake_graph_launch(o->d.graph, o->d.stream);
    return status;
}

static const int direct_ways[] = {WAY_DIRECT, WAY_NCCL_DIRECT};

static void runs_without_a_pause(rank_context *x)
{
    one_tensor *o = one_open(x, test_ms(device_patience_ms));
    int         run;
    for (run = 0; run < MANY_RUNS; run++) {
        if (x->rank == 0) one_fill(o, (float)run);
        CHECK_EQ(one_begin(o, 0), LORASYNC_OK);
        CHECK_EQ(lorasync_plan_wait(o->d.plan, &o->d.err), LORASYNC_OK);
        if (x->rank > 0) CHECK(one_is(o, (float)run));
    }
    one_close(o);
}

static void staging_waits_for_its_reader(void)
{
    size_t i;
    for (i = 0; i < 2; i++) {
        reset();
        fake_cuda.devices  = 3;
        fake_cuda.hold     = 3;
        fake_cuda.delay    = 40;
        device_options.way = direct_ways[i];
        run_threads(3, runs_without_a_pause, NULL);
        check_left();
    }
}

/* The receiver places slowly what a plain run brought; the sender goes on with a graph. */
static void run_then_graph(rank_context *x)
{
    one_tensor *o = one_open(x, test_ms(device_patience_ms));
    int         run;
    for (run = 0; run < 3; run++) {
        if (x->rank == 0) one_fill(o, (float)run);
        CHECK_EQ(one_begin(o, run > 0), LORASYNC_OK);
        CHECK_EQ(lorasync_plan_wait(o->d.plan, &o->d.err), LORASYNC_OK);
        if (x->rank == 1) CHECK(one_is(o, (float)run));
    }
    one_close(o);
}

static void graph_waits_for_a_reader(void)
{
    reset();
    fake_cuda.devices     = 2;
    fake_cuda.delay       = 20000;
    fake_cuda.slow_device = 2;
    device_options.way    = WAY_NCCL_DIRECT;
    run_threads(2, run_then_graph, NULL);
    check_left();
}

/* The sender's runs are a graph, the receiver's are not: never a success with the bytes of another run. */
static void mixed(rank_context *x)
{
    one_tensor     *o      = one_open(x, test_ms(500));
    lorasync_status status = LORASYNC_OK;
    int             run;
    for (run = 0; run < 3 && status == LORASYNC_OK; run++) {
        if (x->rank == 0 && run) test_sleep_ms(100);
        if (x->rank == 0) one_fill(o, (float)run);
        one_begin(o, x->rank == 0);
        status = lorasync_plan_wait(o->d.plan, &o->d.err);
        CHECK(status < 0);
    }
    one_close(o);
}

static void some_capture(void)
{
    reset();
    fake_cuda.devices  = 2;
    device_options.way = WAY_NCCL_DIRECT;
    run_threads(2, mixed, NULL);
    fake_nccl.mismatches = 0; /* NCCL must make of it what it can */
    check_left();
}

/* The receiver gives up and frees its staging; the sender begins afterwards. */
static void late_sender(rank_context *x)
{
    one_tensor *o     = one_open(x, test_ms(300));
    void       *again = NULL;
    char       *bytes = (char *)calloc(1, 2 << 20);
    int         i, dirty = 0;
    if (x->rank == 1) {
        CHECK_EQ(lorasync_plan_begin(o->d.plan, &o->d.err), LORASYNC_OK);
        CHECK(lorasync_is_lost(lorasync_plan_wait(o->d.plan, &o->d.err)));
        lorasync_plan_free(o->d.plan);
        o->d.plan = NULL;
        CHECK_EQ(cudaMalloc(&again, 2 << 20), cudaSuccess); /* may well be where the staging was */
        cudaMemcpy(again, bytes, 2 << 20, cudaMemcpyDefault);
    }
    device_barrier(&o->d);
    if (x->rank == 0) {
        one_fill(o, 7);
        CHECK(lorasync_is_lost(lorasync_plan_begin(o->d.plan, &o->d.err)));
        lorasync_plan_free(o->d.plan);
        o->d.plan = NULL;
    }
    device_barrier(&o->d);
    if (x->rank == 1) cudaMemcpy(bytes, again, 2 << 20, cudaMemcpyDefault);
    for (i = 0; i < 2 << 20; i++) dirty += bytes[i] != 0;
    CHECK_EQ(dirty, 0);
    cudaFree(again);
    free(bytes);
    one_close(o);
}

static void late_sender_writes_nothing(void)
{
    reset();
    fake_cuda.devices  = 2;
    device_options.way = WAY_NCCL_DIRECT; /* the threads' own communicator goes on */
    run_threads(2, late_sender, NULL);
    CHECK_EQ(fake_cuda.live_memory, 1); /* what the sender still had open: it is not given to anybody else */
    fake_cuda.live_memory = 0;
    check_left();
}

/* The kernel is not launched on one rank: all are told why, and the next run is well, whatever this one had found.
   user: graphs or not. */
static void one_launch_fails(rank_context *x)
{
    const int   graph = *(const int *)x->user;
    one_tensor *o     = one_open(x, test_ms(5000));
    if (x->rank == 0) one_fill(o, NAN);
    device_barrier(&o->d);
    one_begin(o, graph);
    CHECK_EQ(lorasync_plan_wait(o->d.plan, &o->d.err), LORASYNC_E_CUDA);
    CHECK_HAS(o->d.err.text, "was not launched");
    device_barrier(&o->d);
    if (x->rank == 0) one_fill(o, 1);
    if (!graph) {
        CHECK_EQ(one_begin(o, 0), LORASYNC_OK);
        CHECK_EQ(lorasync_plan_wait(o->d.plan, &o->d.err), LORASYNC_OK);
        if (x->rank > 0) CHECK(one_is(o, 1));
    }
    one_close(o);
}

static void launch_fails(void)
{
    int i, graph;
    for (i = 0; i < 3; i++)
        for (graph = 0; graph <= i % 2; graph++) {
            reset();
            fake_cuda.devices = 3;
            fake_fail_launch(0, i == 2); /* 1: the one that reports, behind the one that reads */
            device_options.way = direct_ways[i % 2];
            run_threads(3, one_launch_fails, &graph);
            check_left();
        }
}

/* A rank that does not begin a run: all are told, and the communicator is as good as before. */
static void one_does_not_begin(void)
{
    int way, kind;
    for (way = WAY_DIRECT; way <= WAY_NCCL_DIRECT; way++)
        for (kind = LORASYNC_GATHER; kind <= LORASYNC_RESHARD; kind++) {
            if (way != WAY_NCCL && way != WAY_HOST && kind != LORASYNC_RESHARD) continue;
            reset();
            fake_cuda.devices              = 8;
            device_options.way             = way;
            device_options.pageable_source = kind == LORASYNC_SCATTER;
            device_options.lazy_rank       = 1;
            random_cases((lorasync_plan_kind)kind, 20, 0, run_device_case);
            check_left();
        }
}

/* -- graphs */

/* A copy from pageable memory would be made once, when it is recorded. */
static void graph_of_pageable_image(void)
{
    static random_case c;
    rank_context       x;
    unsigned           seed = 0;
    reset();
    device_options.capture = 1;
    do {
        make_case(&c, ++seed, LORASYNC_SCATTER, 0);
        if (c.world == 1 && c.expected->payload_bytes) break;
        free_case(&c);
    } while (seed < 1000);
    REQUIRE(seed < 1000);
    memset(&x, 0, sizeof x);
    x.world = 1;
    x.user  = &c;
    x.comm  = lorasync_solo();
    run_device_case(&x);
    CHECK_EQ(c.status[0], LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(c.text[0], "pinned or device memory");
    free_case(&c);
    check_left();
}

static void launched(int capture, int runs, int num)
{
    static const int ways[] = {WAY_DIRECT, WAY_NCCL, WAY_NCCL_DIRECT};
    size_t           i;
    for (i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        reset();
        fake_cuda.devices      = 8;
        device_options.way     = ways[i];
        device_options.capture = capture;
        device_options.runs    = runs;
        random_cases(LORASYNC_GATHER, num, 0, run_device_case);
        random_cases(LORASYNC_GATHER_ALL, num / 2, 0, run_device_case);
        random_cases(LORASYNC_RESHARD, ways[i] == WAY_DIRECT ? 0 : num, 0, run_device_case);
        check_left();
    }
}

static void graphs(void) { launched(1, 0, 60); }

/* Runs, launches of a graph, and runs again; at the end behind a launch that nobody waited for. */
static void graphs_among_runs(void) { launched(2, 7, 40); }

/* -- processes: the image opened through a handle */

static void processes(void)
{
    static random_case c;
    int                i, bad = 0, direct_runs = 0;
    if (FAKE_MALLOC) SKIP("device memory is not shared under the address sanitizer");
    for (i = 0; i < 60; i++) {
        static const lorasync_plan_kind kinds[] = {LORASYNC_GATHER, LORASYNC_GATHER_ALL, LORASYNC_RESHARD};
        reset();
        fake_cuda.ipc_fails = i % 4 == 3 ? 1 + i / 4 % 2 : 0;
        device_options.way  = fake_cuda.ipc_fails ? WAY_FALLBACK : WAY_DIRECT;
        fake_cuda_share();
        make_case(&c, (unsigned long long)i * 31337, kinds[i % 3], 0);
        direct_runs += c.world > 1;
        if (run_processes(c.world, run_device_process, &c)) {
            fprintf(stderr, "case %d: %d ranks\n", i, c.world);
            bad++;
        }
        free_case(&c);
        fake_cuda.arena->taken = 0;
    }
    CHECK(direct_runs > 5);
    CHECK_EQ(bad, 0);
}

/* -- what fails */

static void no_peer_access(void)
{
    reset();
    fake_cuda.devices        = 4;
    fake_cuda.no_peer_access = 1;
    device_options.way       = WAY_FALLBACK; /* direct where all ranks share a device */
    random_cases(LORASYNC_GATHER, 60, 0, run_device_case);
    random_cases(LORASYNC_RESHARD, 60, 0, run_device_case);
    check_left();
}

/* A process of another container may have this one's pid: its pointers mean nothing here. */
static void offer_of_a_namesake(void)
{
    lorasynci_gpu          g;
    lorasynci_device_share offer;
    lorasynci_window       w;
    lorasync_error         err;
    char                  *memory;
    reset();
    memset(&g, 0, sizeof g);
    memset(&offer, 0, sizeof offer);
    memset(&w, 0, sizeof w);
    REQUIRE(lorasynci_gpu_share(&g, 256, &memory, &offer, "", &err) == LORASYNC_OK);
    CHECK_EQ(lorasynci_window_device(&w, &g, &offer, &err), LORASYNC_OK);
    CHECK(w.address == memory && w.kind == LORASYNCI_WINDOW_OWN);
    lorasynci_window_close(&w);
    CHECK(w.address == NULL && w.kind == LORASYNCI_WINDOW_CLOSED);
    offer.process ^= 1;
    CHECK_EQ(lorasynci_window_device(&w, &g, &offer, &err), LORASYNC_E_CUDA);
    CHECK_HAS(err.text, "CUDA IPC");
    CHECK(w.address == NULL);
    lorasynci_gpu_free(0, memory);
    check_left();
}

/* One small case that is the same each time. */
static void small_case(random_case *c, int world, lorasync_plan_kind kind)
{
    unsigned long long seed = 1;
    for (;; seed++) {
        make_case(c, seed, kind, 0);
        if (c->world == world && c->expected->payload_bytes > 100) break;
        free_case(c);
    }
}

/* A case that must fail on all ranks alike, leaving nothing. */
static void expect(random_case *c, lorasync_status status, const char *text)
{
    int r;
    memset(c->status, 0, sizeof c->status);
    run_threads(c->world, run_device_case, c);
    for (r = 0; r < c->world; r++) {
        CHECK_EQ(c->status[r], status);
        CHECK_EQ(c->wrong[r], 0);
        if (status < 0) CHECK_HAS(c->text[r], text);
    }
}

static void driver_fails(void)
{
    random_case c;
    reset();
    small_case(&c, 2, LORASYNC_GATHER);
    fake_cuda.jit_fails = 1;
    expect(&c, LORASYNC_E_CUDA, "the GPU driver did not take the kernel");
    check_left();
    reset();
    fake_cuda.no_entry_points = 1;
    expect(&c, LORASYNC_E_CUDA, "driver entry point");
    check_left();
    free_case(&c);
}

/* The nth allocation of device memory, pinned memory, a stream or an event. On all ranks the same, and the next plan is
   well. */
static void memory_fails(void)
{
    static random_case c;
    int                way, kind, n, r, failed;
    for (way = WAY_DIRECT; way <= WAY_HOST; way++)
        for (kind = LORASYNC_GATHER; kind <= LORASYNC_RESHARD; kind++)
            for (n = 1, failed = 1; failed && n < 200; n++) {
                reset();
                fake_cuda.devices              = 4;
                device_options.way             = way;
                device_options.fail_at         = n;
                device_options.runs            = 1;
                device_options.pageable_source = kind == LORASYNC_SCATTER;
                small_case(&c, 2, (lorasync_plan_kind)kind);
                run_threads(c.world, run_device_case, &c);
                failed = fake_cuda.fail_at == 0;
                for (r = 0; r < c.world; r++) {
                    CHECK_EQ(c.wrong[r], 0);
                    CHECK_EQ(c.status[r], c.status[0]);
                    /* an image that finds no memory is made without placing directly, and that may work */
                    if (c.status[r] < 0) CHECK(failed && c.status[r] == LORASYNC_E_MEMORY);
                    if (c.status[r] < 0) CHECK_HAS(c.text[r], "memory");
                    if (c.status[r] == LORASYNC_OK && failed) CHECK(way == WAY_DIRECT);
                }
                fake_cuda.fail_at = 0;
                free_case(&c);
                check_left();
            }
}

/* The nth allocation of host memory, by one rank alone. */
static void allocator_fails(void)
{
    static random_case c;
    test_memory        m;
    lorasync_allocator a;
    long               n;
    a.alloc = test_memory_alloc;
    a.free  = test_memory_free;
    a.user  = &m;
    for (n = 1;; n++) {
        reset();
        small_case(&c, 1, LORASYNC_GATHER);
        memset(&m, 0, sizeof m);
        m.fail_at                = n;
        device_options.allocator = &a;
        device_options.runs      = 1;
        run_threads(1, run_device_case, &c);
        CHECK_EQ(m.live, 0);
        CHECK_EQ(c.wrong[0], 0);
        CHECK_EQ(c.status[0], m.fail_at ? LORASYNC_OK : LORASYNC_E_MEMORY);
        free_case(&c);
        check_left();
        if (m.fail_at) break;
    }
    CHECK(n > 5);
}

/* The GPU fails in the middle: an error on that rank, and on the others before long. */
static void gpu_fails(void)
{
    static random_case c;
    int                way, r;
    for (way = WAY_DIRECT; way <= WAY_HOST; way++) {
        reset();
        fake_cuda.devices             = 4;
        device_options.way            = way;
        device_options.timeout_ms     = test_ms(1000);
        device_options.runs           = 1;
        device_options.query_fails_at = 1;
        small_case(&c, 2, LORASYNC_GATHER);
        run_threads(c.world, run_device_case, &c);
        /* over NCCL it may be the very last step that fails, when the others already have all they need */
        for (r = 0; r < c.world; r++) CHECK(c.status[r] < 0 || (way == WAY_NCCL && lorasync_is_lost(c.status[1 - r])));
        CHECK(c.status[0] == LORASYNC_E_CUDA || c.status[1] == LORASYNC_E_CUDA || strstr(c.text[0], "CUDA") ||
              strstr(c.text[1], "CUDA"));
        free_case(&c);
        fake_cuda.query_fails_at = 0;
        check_left();
    }
}

/* A rank whose NCCL hangs: all get an error by the deadline. */
static void nccl_hangs(void)
{
    static random_case c;
    int                at, r;
    for (at = 1; at < 9; at++) {
        uint64_t start = test_now_ns();
        reset();
        fake_cuda.devices         = 4;
        device_options.way        = WAY_NCCL;
        device_options.timeout_ms = test_ms(300);
        device_options.runs       = 2;
        fake_nccl.rank[1].hang_at = at;
        small_case(&c, 3, LORASYNC_GATHER);
        run_threads(c.world, run_device_case, &c);
        for (r = 0; r < c.world; r++) {
            CHECK_EQ(c.status[r] < 0, c.status[0] < 0);
            CHECK(c.status[r] == LORASYNC_OK || lorasync_is_lost(c.status[r]));
            if (at < 5) CHECK(c.status[r] < 0);
        }
        CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns() * 3 / 2);
        free_case(&c);
        check_left();
        CHECK_EQ(fake_nccl.aborts, c.status[0] < 0 ? c.world : 0);
    }
}

/* A plan that is freed between begin and wait while another rank never begins: that ends at the deadline. */
static void abandon(rank_context *x)
{
    device_rank  d;
    random_case *c = (random_case *)x->user;
    memset(&d, 0, sizeof d);
    d.context = x;
    d.c       = c;
    cudaSetDevice(x->rank);
    cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking);
    CHECK(pieces_to_device(&c->have[x->rank], d.have));
    CHECK_EQ(device_comm(&d), LORASYNC_OK);
    CHECK_EQ(device_plan(&d), LORASYNC_OK);
    if (x->rank > 0) CHECK_EQ(lorasync_plan_begin(d.plan, &d.err), LORASYNC_OK);
    device_barrier(&d);
    lorasync_plan_free(d.plan);
    device_barrier(&d);
    lorasync_nccl_close(&d.comm);
    pieces_free(&c->have[x->rank], d.have);
    cudaStreamDestroy(d.stream);
}

static void freed_between_begin_and_wait(void)
{
    static random_case c;
    uint64_t           start = test_now_ns();
    reset();
    fake_cuda.devices         = 8;
    device_options.way        = WAY_NCCL;
    device_options.timeout_ms = test_ms(300);
    small_case(&c, 3, LORASYNC_GATHER);
    run_threads(c.world, abandon, &c);
    CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns() * 3 / 2);
    CHECK(fake_nccl.aborts > 0);
    free_case(&c);
    check_left();
}

/* -- NaN: found on the GPU, named as the host would */

static void nan_is_named(void)
{
    static random_case c;
    int                way, r;
    size_t             k;
    for (way = WAY_DIRECT; way <= WAY_HOST; way++) {
        unsigned long long seed;
        int                found = 0;
        for (seed = 1; found < 10; seed++) {
            int64_t element;
            char    where[64];
            reset();
            fake_cuda.devices  = 8;
            device_options.way = way;
            make_case(&c, seed, LORASYNC_GATHER, (int)(seed % 2));
            /* one NaN in the only copy of a one-dimensional float tensor */
            if (c.tensors[0].ndim == 1 && c.tensors[0].numel && c.tensors[0].dtype == LORASYNC_F32 &&
                c.wire != LORASYNC_F8_E4M3) {
                float nan_value = (float)NAN;
                element         = (int64_t)(seed * 7919 % (unsigned long long)c.tensors[0].numel);
                for (r = 0; r < c.world; r++)
                    for (k = 0; k < c.have[r].num; k++)
                        if (c.have[r].tensor[k] == 0)
                            put_element(&c.tensors[0], &c.have[r].pieces[k], element, &nan_value);
                snprintf(where, sizeof where, "NaN or Inf at element [%lld]", (long long)element);
                device_options.runs = 2; /* the same error again */
                run_threads(c.world, run_device_case, &c);
                for (r = 0; r < c.world; r++) {
                    CHECK_EQ(c.status[r], LORASYNC_E_NAN);
                    CHECK_HAS(c.text[r], c.tensors[0].name);
                    CHECK_HAS(c.text[r], where);
                }
                found++;
                check_left();
            }
            free_case(&c);
        }
    }
}

/* A GPU cannot read an element across its alignment. */
static void not_aligned(void)
{
    lorasync_piece     p;
    lorasync_plan_desc d;
    lorasync_cuda      cuda;
    lorasync_plan     *plan = NULL;
    lorasync_error     err;
    void              *memory = NULL;
    reset();
    REQUIRE(cudaMalloc(&memory, 64) == cudaSuccess);
    memset(&p, 0, sizeof p), memset(&d, 0, sizeof d), memset(&cuda, 0, sizeof cuda);
    p.name = "A", p.dtype = LORASYNC_F32, p.ndim = 1, p.shape[0] = 4, p.data = (char *)memory + 2;
    p.box  = lorasync_whole(p.shape, 1);
    d.have = &p, d.num_have = 1, d.cuda = &cuda;
    CHECK_EQ(lorasync_plan_create(&d, &plan, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "A: data is ");
    CHECK_HAS(err.text, "a multiple of the 4 bytes of its F32");
    p.data = (char *)memory + 4;
    CHECK_EQ(lorasync_plan_create(&d, &plan, &err), LORASYNC_OK);
    lorasync_plan_free(plan);
    cudaFree(memory);
    check_left();
}

/* Everything stays where it is. */
static void kept_on_device(void)
{
    reset();
    fake_cuda.devices             = 2;
    device_options.way            = WAY_DIRECT;
    device_options.keep_on_device = 1;
    random_cases(LORASYNC_GATHER, 80, 0, run_device_case);
    check_left();
    reset();
    fake_cuda.devices             = 8;
    device_options.way            = WAY_NCCL;
    device_options.keep_on_device = 1;
    random_cases(LORASYNC_GATHER_ALL, 60, 0, run_device_case);
    check_left();
}

/* -- the device's code, element by element, against the host's: the same bits, NaN included */

static const lorasync_dtype value_types[] = {LORASYNC_F32, LORASYNC_F16, LORASYNC_BF16, LORASYNC_F8_E4M3,
                                             LORASYNC_F8_E5M2};

/* Every code of the types of 8 and 16 bits. */
static void device_widens_as_the_host(void)
{
    static const lorasync_dtype from[] = {LORASYNC_F16, LORASYNC_BF16, LORASYNC_F8_E4M3, LORASYNC_F8_E5M2,
                                          LORASYNC_F8_E8M0};
    size_t                      t, to;
    unsigned                    code;
    for (t = 0; t < 5; t++) {
        unsigned num = lorasync_dtype_bits(from[t]) == 16 ? 65536u : 256u;
        for (code = 0; code < num; code++) {
            for (to = 0; to < 5; to++) {
                uint32_t host = 0;
                if (value_types[to] == from[t]) continue;
                lorasynci_convert_scaled(&host, value_types[to], &code, from[t], 1, 1.0f);
                CHECK_EQ(lorasyncd_convert(code, (int)from[t], (int)value_types[to], 1.0f), host);
            }
        }
    }
}

static size_t device_rounds_wrongly(const uint32_t *in, size_t num)
{
    unsigned char out[2 * 6];
    size_t        t, i, bad = 0;
    for (t = 1; t < 5; t++) {
        size_t size = (size_t)lorasync_dtype_bits(value_types[t]) / 8;
        lorasynci_convert_scaled(out, value_types[t], in, LORASYNC_F32, num, 1.0f);
        for (i = 0; i < num; i++) {
            uint32_t host = 0;
            memcpy(&host, out + i * size, size);
            bad += lorasyncd_convert(in[i], LORASYNC_F32, (int)value_types[t], 1.0f) != host;
        }
    }
    return bad;
}

/* F32 values whose upper 19 bits are anything, all around the ties and the values that F16 has; those of the types with
   fewer mantissa bits are among them. And every 509th, in mixed order. */
static void device_rounds_as_the_host(void)
{
    static const uint32_t low[6] = {0, 1, 0xfffu, 0x1000u, 0x1001u, 0x1fffu};
    uint32_t              in[6], high, next = 0;
    size_t                i, bad = 0;
    for (high = 0; high < 1u << 19; high++) {
        for (i = 0; i < 6; i++) in[i] = high << 13 | low[i];
        bad += device_rounds_wrongly(in, 6);
        for (i = 0; i < 6; i++, next += 509u * 0x10001u) in[i] = next;
        bad += device_rounds_wrongly(in, 6);
    }
    CHECK_EQ(bad, 0);
}

/* Sizes of all dtypes; which codes are not finite; a type that is not converted gives NaN, not another type's value. */
static void device_knows_the_types(void)
{
    int      t;
    unsigned code;
    for (t = 1; t <= 22; t++) {
        int bits = lorasync_dtype_bits((lorasync_dtype)t);
        CHECK_EQ(lorasyncd_element_bytes(t), bits < 8 ? 1 : bits / 8);
        for (code = 0; code < (bits == 16 ? 65536u : 256u); code++) {
            uint64_t value = bits > 16 ? (uint64_t)code << (bits - 8) : code, special = lorasyncd_special(t);
            int      found = special && (value & special) == special;
            CHECK_EQ(found, lorasynci_find_nonfinite(&value, (lorasync_dtype)t, 1) == 0);
        }
        if (lorasynci_is_value((lorasync_dtype)t)) continue;
        CHECK_EQ((uint8_t)lorasyncd_convert(0x3f800000u, LORASYNC_F32, t, 1.0f), 0xff);
        if (t == LORASYNC_F8_E8M0) continue;
        CHECK_EQ(lorasyncd_convert(1, t, LORASYNC_F32, 1.0f), 0x7fc00000u);
    }
}

int main(void)
{
    RUN(device_widens_as_the_host);
    RUN(device_rounds_as_the_host);
    RUN(device_knows_the_types);
    RUN(direct);
    RUN(direct_over_devices);
    RUN(over_nccl);
    RUN(over_the_host);
    RUN(directly_with_nccl);
    RUN(slow_gpu);
    RUN(root_copies_its_own);
    RUN(staging_is_bounded);
    RUN(votes_travel_with_the_bytes);
    RUN(staging_waits_for_its_reader);
    RUN(graph_waits_for_a_reader);
    RUN(some_capture);
    RUN(late_sender_writes_nothing);
    RUN(launch_fails);
    RUN(one_does_not_begin);
    RUN(not_aligned);
    RUN(kept_on_device);
    RUN(graphs);
    RUN(graphs_among_runs);
    RUN(graph_of_pageable_image);
    RUN(processes);
    RUN(no_peer_access);
    RUN(offer_of_a_namesake);
    RUN(driver_fails);
    RUN(memory_fails);
    RUN(allocator_fails);
    RUN(gpu_fails);
    RUN(nccl_hangs);
    RUN(freed_between_begin_and_wait);
    RUN(nan_is_named);
    return test_summary("test_cuda_fake");
}

#endif
