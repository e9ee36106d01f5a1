/* Runs a random_case in device memory: real CUDA's, or the fake's. Include it behind random_case.h and one of them. */
#ifndef LORASYNC_TEST_DEVICE_CASE_H
#define LORASYNC_TEST_DEVICE_CASE_H

/* How the bytes shall go. FALLBACK: directly or over the host, whatever is found. NCCL_DIRECT: directly, between ranks
   that NCCL joins. */
enum {
    WAY_DIRECT = 0,
    WAY_NCCL,
    WAY_HOST,
    WAY_FALLBACK,
    WAY_NCCL_DIRECT
};

typedef struct device_options_t {
    int  way;
    int  runs;       /* 0: 3 */
    int  timeout_ms; /* 0: 20000 */
    int  keep_on_device;
    int  capture; /* runs are launches of a CUDA graph; 2: a run, two launches, a run, a launch not waited for, a run
                     .. */
    int  pageable_source;
    int  watch_votes;             /* counts votes over the host, in device_host_votes; 2: and has no others */
    int  lazy_rank;               /* 1 more than the rank that does not begin the second run */
    long fail_at, query_fails_at; /* set in the fake once all ranks have what they need */
    const lorasync_allocator *allocator;
} device_options_t;

static device_options_t device_options;
static int              device_patience_ms = 20000; /* deadline of the calls that must succeed */
static long             device_host_votes, device_rounds;

/* A rank's device side of a case. */
typedef struct device_rank {
    rank_context  *context;
    random_case   *c;
    lorasync_comm  comm;
    cudaStream_t   stream;
    lorasync_piece have[MAX_PIECES], want[MAX_PIECES];
    lorasync_plan *plan;
    lorasync_error err;
#ifdef FAKE_SLICE
    cudaGraph_t graph;
#else
    cudaGraphExec_t graph;
#endif
} device_rank;

/* Writes one element of a piece, wherever it lies in it. */
typedef struct put_user {
    int64_t     number;
    const void *value;
    int64_t     size;
} put_user;

TEST_UNUSED static void put_if(void *user, int64_t number, unsigned char *address)
{
    const put_user *u = (const put_user *)user;
    if (number == u->number) memcpy(address, u->value, (size_t)u->size);
}

TEST_UNUSED static void put_element(const truth_tensor *t, const lorasync_piece *p, int64_t number, const void *value)
{
    put_user u;
    u.number = number;
    u.value  = value;
    u.size   = item(p->dtype);
    each_element(t, p, put_if, &u);
}

/* Copies of the pieces in device memory of the same size. */
TEST_UNUSED static int pieces_to_device(const rank_pieces *r, lorasync_piece *out)
{
    size_t i;
    memcpy(out, r->pieces, sizeof r->pieces);
    for (i = 0; i < r->num; i++) out[i].data = NULL;
    for (i = 0; i < r->num; i++)
        if (cudaMalloc(&out[i].data, r->num_bytes[i] + 1) != cudaSuccess) return 0;
    return 1;
}

TEST_UNUSED static void pieces_free(const rank_pieces *r, lorasync_piece *out)
{
    size_t i;
    for (i = 0; i < r->num; i++) cudaFree(out[i].data);
}

TEST_UNUSED static void pieces_copy(const rank_pieces *r, const lorasync_piece *pieces, int back)
{
    size_t i;
    for (i = 0; i < r->num; i++)
        cudaMemcpy(back ? r->memory[i] : pieces[i].data, back ? pieces[i].data : r->memory[i], r->num_bytes[i] + 1,
                   cudaMemcpyDefault);
}

/* The communicator of the way: the threads' own, or NCCL, whose id goes through it. */
TEST_UNUSED static lorasync_status device_comm(device_rank *d)
{
    char               ids[8 * 128], id[128] = {0};
    lorasync_nccl_desc n;
    d->comm = d->context->comm;
    if (device_options.way != WAY_NCCL && device_options.way != WAY_NCCL_DIRECT) return LORASYNC_OK;
    if (d->context->rank == 0 && lorasync_nccl_unique_id(id, &d->err) < 0) return d->err.status;
    if (d->context->comm.all_gather(d->context->comm.user, id, ids, sizeof id, test_ms(device_patience_ms), &d->err) <
        0)
        return d->err.status;
    memset(&n, 0, sizeof n);
    n.unique_id  = ids;
    n.rank       = d->context->rank;
    n.world      = d->context->world;
    n.timeout_ms = test_ms(device_patience_ms);
    return lorasync_nccl_open(&n, &d->comm, &d->err);
}

/* All ranks of the case at this point. */
TEST_UNUSED static void device_barrier(const device_rank *d)
{
    char           in = 0, out[8];
    lorasync_error err;
    CHECK_EQ(d->context->comm.all_gather(d->context->comm.user, &in, out, 1, test_ms(device_patience_ms), &err),
             LORASYNC_OK);
}

TEST_UNUSED static lorasync_status device_plan(device_rank *d)
{
    lorasync_plan_desc desc;
    lorasync_cuda      cuda;
    fill_desc(&desc, d->c, d->context);
    memset(&cuda, 0, sizeof cuda);
    cuda.stream         = d->stream;
    cuda.keep_on_device = device_options.keep_on_device;
    desc.comm           = &d->comm;
    desc.cuda           = &cuda;
    desc.have           = d->have;
    desc.want           = d->want;
    desc.no_direct      = device_options.way == WAY_NCCL || device_options.way == WAY_HOST;
    desc.timeout_ms     = device_options.timeout_ms ? device_options.timeout_ms : test_ms(device_patience_ms);
    desc.allocator      = device_options.allocator;
    if (device_options.watch_votes == 2) d->comm.all_gather_stream = NULL; /* the ranks vote over the host */
    return lorasync_plan_create(&desc, &d->plan, &d->err);
}

#ifdef LORASYNC_NCCL
TEST_UNUSED static lorasync_status device_counted_vote(void *user, const void *in, void *out, size_t num_bytes,
                                                       int timeout_ms, lorasync_error *err)
{
    __atomic_fetch_add(&device_host_votes, 1, __ATOMIC_RELAXED);
    return lorasynci_nccl_all_gather(user, in, out, num_bytes, timeout_ms, err);
}

TEST_UNUSED static void device_watch_votes(device_rank *d)
{
    if (!device_options.watch_votes) return;
    d->plan->talk->comm.all_gather = device_counted_vote;
    __atomic_store_n(&device_rounds, (long)d->plan->num_rounds, __ATOMIC_RELAXED);
}
#else
TEST_UNUSED static void device_watch_votes(device_rank *d) { (void)d; }
#endif

/* begin, and at once something else into the pieces: begin has ordered that behind its reading. */
TEST_UNUSED static lorasync_status device_begin(device_rank *d)
{
    const rank_pieces *r = &d->c->have[d->context->rank];
    lorasync_status    s = lorasync_plan_begin(d->plan, &d->err);
    size_t             i;
    for (i = 0; i < r->num; i++) cudaMemsetAsync(d->have[i].data, 0x7f, r->num_bytes[i], d->stream);
    return s;
}

#ifdef FAKE_SLICE
TEST_UNUSED static lorasync_status device_launch(device_rank *d)
{
    if (!d->graph) {
        lorasync_status s;
        cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal);
        s = device_begin(d);
        cudaStreamEndCapture(d->stream, &d->graph);
        if (s < 0) return s;
    }
    fake_graph_launch(d->graph, d->stream);
    return LORASYNC_OK;
}
#else
TEST_UNUSED static lorasync_status device_launch(device_rank *d)
{
    if (!d->graph) {
        cudaGraph_t graph;
        lorasync_status s;
        cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal);
        s = device_begin(d);
        cudaStreamEndCapture(d->stream, &graph);
        if (s < 0) return s;
        if (cudaGraphInstantiate(&d->graph, graph, 0) != cudaSuccess) return LORASYNC_E_CUDA;
        cudaGraphDestroy(graph);
    }
    return cudaGraphLaunch(d->graph, d->stream) == cudaSuccess ? LORASYNC_OK : LORASYNC_E_CUDA;
}
#endif

/* 0, or what is wrong with the image. */
TEST_UNUSED static int device_image_wrong(const device_rank *d)
{
    const lorasync_image *image = lorasync_plan_image(d->plan);
    char                 *copy;
    int                   wrong;
    if (!image) return 1;
    if (!!image->on_device != !!device_options.keep_on_device) return 6;
    if (!image->on_device) return check_image(d->c, image, image->payload);
    copy = (char *)malloc(image->payload_bytes + 1);
    cudaMemcpy(copy, image->payload, image->payload_bytes, cudaMemcpyDefault);
    wrong = check_image(d->c, image, copy);
    free(copy);
    return wrong;
}

TEST_UNUSED static int device_wrong(const device_rank *d)
{
    random_case *c     = d->c;
    int          rank  = d->context->rank;
    int          wrong = 0;
    if (c->kind == LORASYNC_GATHER_ALL || (c->kind == LORASYNC_GATHER && rank == c->root))
        wrong = device_image_wrong(d);
    else if (lorasync_plan_image(d->plan)) wrong = 9;
    pieces_copy(&c->want[rank], d->want, 1);
    return wrong + check_wanted(c, &c->want[rank]);
}

/* What a plan must say of how its bytes go. */
TEST_UNUSED static const char *device_mover(const device_rank *d, int direct)
{
    if (!d->plan->num_rounds) return direct ? "gpu direct" : "gpu alone";
    if (direct) return "gpu mesh";
    return d->comm.exchange_stream ? "gpu stream" : "gpu over host";
}

TEST_UNUSED static int device_stats_wrong(const device_rank *d)
{
    lorasync_plan_stats stats;
    const random_case  *c = d->c;
    int                 can =
        c->kind == LORASYNC_GATHER || c->kind == LORASYNC_GATHER_ALL || (c->kind == LORASYNC_RESHARD && !c->bucket);
    int may =
        device_options.way == WAY_DIRECT || (device_options.way == WAY_NCCL_DIRECT && !device_options.watch_votes);
    lorasync_plan_get_stats(d->plan, &stats);
    if (may && can && !device_options.fail_at && d->context->world > 1 && !stats.direct) return 50;
    if (stats.direct && stats.num_rounds) return 52;
    if (strcmp(stats.mover, device_mover(d, stats.direct)) != 0) return 53;
    return (device_options.way == WAY_NCCL || device_options.way == WAY_HOST) && stats.direct ? 51 : 0;
}

TEST_UNUSED static lorasync_status device_runs(device_rank *d)
{
    int             rank = d->context->rank, run, runs = device_options.runs ? device_options.runs : 3;
    lorasync_status status = LORASYNC_OK;
    for (run = 0; run < runs && (status == LORASYNC_OK || status == LORASYNC_E_NAN) && !d->c->wrong[rank]; run++) {
        cudaStreamSynchronize(d->stream);
        pieces_copy(&d->c->have[rank], d->have, 0);
        if (device_options.capture == 2 && run > 3) { /* only runs are waited for now */
            status = device_launch(d);
            cudaStreamSynchronize(d->stream);
            device_barrier(d);
            pieces_copy(&d->c->have[rank], d->have, 0);
        }
        if (run) pieces_copy(&d->c->want[rank], d->want, 0);
        if (device_options.capture == 1 || (device_options.capture && (run == 1 || run == 2)))
            status = device_launch(d);
        else if (run != 1 || device_options.lazy_rank != rank + 1) status = device_begin(d);
        if (device_options.query_fails_at) device_barrier(d);
#ifdef FAKE_SLICE
        if (device_options.query_fails_at && rank == 0)
            fake_set(&fake_cuda.query_fails_at, device_options.query_fails_at);
#endif
        if (!lorasync_is_lost(status)) status = lorasync_plan_wait(d->plan, &d->err);
        if (run == 1 && device_options.lazy_rank > 0) { /* an error of that run only, the same for all */
            d->c->wrong[rank] = status == LORASYNC_E_STATE ? 0 : 70;
            status            = LORASYNC_OK;
            device_barrier(d);
            continue;
        }
        if (status == LORASYNC_OK) d->c->wrong[rank] = device_wrong(d);
        /* an image placed directly is overwritten by the next begin of any rank */
        if (status == LORASYNC_OK && run + 1 < runs) device_barrier(d);
    }
    return status;
}

/* Opens, plans and runs a case on one rank; the outcome is in the case. */
TEST_UNUSED static void run_device_case(rank_context *x)
{
    device_rank     d;
    lorasync_status status;
    int             devices = 1, r = x->rank;
    memset(&d, 0, sizeof d);
    d.context = x;
    d.c       = (random_case *)x->user;
    cudaGetDeviceCount(&devices);
    cudaSetDevice(r % devices);
    if (d.c->seed % 3 || device_options.capture) cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking);
    status = pieces_to_device(&d.c->have[r], d.have) && pieces_to_device(&d.c->want[r], d.want) ? device_comm(&d)
                                                                                                : LORASYNC_E_MEMORY;
    pieces_copy(&d.c->want[r], d.want, 0);
#ifdef FAKE_SLICE
    if (device_options.fail_at) {
        device_barrier(&d);
        if (r == 0) fake_set(&fake_cuda.fail_at, device_options.fail_at);
        device_barrier(&d);
    }
#endif
    if (status == LORASYNC_OK) status = device_plan(&d);
    if (status == LORASYNC_OK) d.c->wrong[r] = device_stats_wrong(&d);
    if (status == LORASYNC_OK) device_watch_votes(&d);
    if (status == LORASYNC_OK && !d.c->wrong[r]) status = device_runs(&d);
    d.c->status[r] = status;
    snprintf(d.c->text[r], sizeof d.c->text[0], "%s", status < 0 ? d.err.text : "");
#ifdef FAKE_SLICE
    if (d.graph) fake_graph_free(d.graph);
#else
    if (d.graph) cudaGraphExecDestroy(d.graph);
#endif
    lorasync_plan_free(d.plan);
    if (d.comm.exchange_stream) lorasync_nccl_close(&d.comm);
    pieces_free(&d.c->have[r], d.have);
    pieces_free(&d.c->want[r], d.want);
    if (d.stream) cudaStreamDestroy(d.stream);
}

/* The same where ranks are processes: the outcome is the number of failed checks. */
TEST_UNUSED static void run_device_process(rank_context *x)
{
    const random_case *c = (const random_case *)x->user;
    run_device_case(x);
    if (c->status[x->rank] < 0) test_fail(__FILE__, __LINE__, c->text[x->rank]);
    CHECK_EQ(c->wrong[x->rank], 0);
#ifdef FAKE_SLICE
    CHECK_EQ(fake_cuda_left(), 0);
#endif
}

#endif
