/* The NCCL communicator against a fake NCCL: data, slow answers, errors in the middle, hangs, and what is left over. */
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>) && __has_include(<nccl.h>)
#define HAVE_NCCL 1
#endif
#endif

#ifdef HAVE_NCCL
#define LORASYNC_CUDA
#define LORASYNC_NCCL
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"

#ifndef HAVE_NCCL
int main(void)
{
    printf("skip test_nccl: no cuda_runtime_api.h and nccl.h here\n");
    test_skipped++;
    return test_summary("test_nccl");
}
#else

#include "fake_cuda.h"
#include "fake_nccl.h"
#include "ranks.h"
#include "traffic.h"

/* What the threads of a test share. */
typedef struct party {
    char            id[128];
    int             borrowed; /* 1: blocking, 2: non-blocking */
    int             timeout_ms;
    int             victim; /* the rank with the trouble */
    int             stream; /* the trouble is in exchange_stream */
    lorasync_status open[FAKE_RANKS], status[FAKE_RANKS], again[FAKE_RANKS];
    char            text[FAKE_RANKS][512];
    long long       ns[FAKE_RANKS];
    traffic         load;
} party;

static void start_party(party *p, int world)
{
    lorasync_error err;
    fake_cuda_reset();
    fake_nccl_reset();
    fake_cuda.devices = world;
    memset(p, 0, sizeof *p);
    p->timeout_ms = test_ms(5000);
    CHECK_EQ(lorasync_nccl_unique_id(p->id, &err), LORASYNC_OK);
}

/* Everything that was made is gone, and nothing was used wrongly. */
static void end_party(void)
{
    CHECK_EQ(fake_cuda_left(), 0);
    CHECK_EQ(fake_nccl.live, 0);
    CHECK_EQ(fake_nccl.misuses, 0);
}

static lorasync_status open_rank(party *p, int rank, int world, ncclComm_t *borrowed, lorasync_comm *c,
                                 lorasync_error *err)
{
    lorasync_nccl_desc d;
    ncclUniqueId       id;
    ncclConfig_t       config = NCCL_CONFIG_INITIALIZER;
    cudaSetDevice(rank);
    memset(&d, 0, sizeof d);
    memcpy(id.internal, p->id, sizeof p->id);
    *borrowed       = NULL;
    config.blocking = 0;
    if (p->borrowed == 1) ncclCommInitRank(borrowed, world, id, rank);
    if (p->borrowed == 2) ncclCommInitRankConfig(borrowed, world, id, rank, &config); /* still on its way */
    d.comm       = *borrowed;
    d.unique_id  = *borrowed ? NULL : p->id;
    d.rank       = *borrowed ? 0 : rank;
    d.world      = *borrowed ? 0 : world;
    d.timeout_ms = p->timeout_ms;
    err->text[0] = 0;
    return lorasync_nccl_open(&d, c, err);
}

/* -- data */

/* The same traffic over exchange_stream: messages are copied to the device and back by the test. */
static lorasync_status exchange_on_stream(void *user, const lorasync_message *sends, size_t num_sends,
                                          const lorasync_message *receives, size_t num_receives, int timeout_ms,
                                          lorasync_error *err)
{
    lorasynci_nccl  *n = (lorasynci_nccl *)user;
    lorasync_message s[MAX_WORLD], r[MAX_WORLD];
    cudaStream_t     stream;
    lorasync_status  status;
    size_t           i;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (i = 0; i < num_sends; i++) {
        s[i] = sends[i];
        cudaMalloc(&s[i].data, s[i].num_bytes);
        if (s[i].num_bytes) cudaMemcpy(s[i].data, sends[i].data, s[i].num_bytes, cudaMemcpyDefault);
    }
    for (i = 0; i < num_receives; i++) {
        r[i] = receives[i];
        cudaMalloc(&r[i].data, r[i].num_bytes);
    }
    status = lorasynci_nccl_exchange_stream(n, s, num_sends, r, num_receives, stream, timeout_ms, err);
    if (status == LORASYNC_OK) cudaStreamSynchronize(stream);
    for (i = 0; i < num_sends; i++) cudaFree(s[i].data);
    for (i = 0; i < num_receives; i++) {
        if (r[i].num_bytes) cudaMemcpy(receives[i].data, r[i].data, r[i].num_bytes, cudaMemcpyDefault);
        cudaFree(r[i].data);
    }
    cudaStreamDestroy(stream);
    if (status == LORASYNC_OK) status = lorasynci_nccl_check(n, err);
    return status;
}

static void traffic_rank(rank_context *x)
{
    party         *p = (party *)x->user;
    lorasync_comm  c;
    lorasync_error err;
    ncclComm_t     borrowed;
    rank_context   y = *x;
    p->open[x->rank] = open_rank(p, x->rank, x->world, &borrowed, &c, &err);
    if (p->open[x->rank] < 0) {
        test_fail(__FILE__, __LINE__, err.text);
        return;
    }
    CHECK(c.rank == x->rank && c.world == x->world && c.size == sizeof c && c.exchange_stream && c.check && c.abort);
    cudaSetDevice(0); /* the communicator's own device is found again */
    y.comm = c;
    y.user = &p->load;
    if (p->stream) y.comm.exchange = exchange_on_stream, cudaSetDevice(x->rank);
    run_traffic(&y);
    if (!p->stream) {
        int device;
        cudaGetDevice(&device);
        CHECK_EQ(device, 0);
    }
    lorasync_nccl_close(&c);
    CHECK(!c.all_gather && !c.user);
    if (borrowed) ncclCommDestroy(borrowed);
}

static void traffic_of(int world, int rounds, int borrowed, int stream, int in_progress, int hold)
{
    party p;
    int   r;
    start_party(&p, world);
    p.borrowed     = borrowed;
    p.stream       = stream;
    p.load.rounds  = rounds;
    p.load.large   = 1;
    fake_cuda.hold = hold;
    for (r = 0; r < world; r++) fake_nccl.rank[r].in_progress = in_progress * (r + 1);
    run_threads(world, traffic_rank, &p);
    for (r = 0; r < world; r++) CHECK_EQ(p.load.bad[r], 0);
    CHECK_EQ(fake_nccl.destroys, world);
    CHECK_EQ(fake_nccl.aborts, 0);
    CHECK_EQ(fake_nccl.mismatches, 0);
    end_party();
}

static void random_traffic(void)
{
    int world;
    for (world = 1; world <= 6; world++) traffic_of(world, 30, 0, 0, 0, 0);
}

static void random_traffic_borrowed(void)
{
    traffic_of(2, 30, 1, 0, 0, 0);
    traffic_of(5, 20, 1, 0, 0, 2);
    traffic_of(3, 20, 2, 0, 7, 0);
}

static void random_traffic_on_stream(void)
{
    int world;
    for (world = 1; world <= 6; world++) traffic_of(world, 10, world % 3, 1, world % 2 * 3, 0);
}

static void slow_answers(void)
{
    traffic_of(3, 20, 0, 0, 50, 5);
    traffic_of(4, 10, 0, 0, 500, 300);
}

/* A scratch of any size gives the same bytes: messages in parts. */
static void small_scratch_rank(rank_context *x)
{
    party         *p = (party *)x->user;
    lorasync_comm  c;
    lorasync_error err;
    ncclComm_t     borrowed;
    rank_context   y = *x;
    if (open_rank(p, x->rank, x->world, &borrowed, &c, &err) < 0) {
        test_fail(__FILE__, __LINE__, err.text);
        return;
    }
    ((lorasynci_nccl *)c.user)->scratch_bytes = (size_t)x->world * 40960;
    y.comm                                    = c;
    y.user                                    = &p->load;
    run_traffic(&y);
    lorasync_nccl_close(&c);
}

static void messages_in_parts(void)
{
    party p;
    int   r;
    start_party(&p, 4);
    p.load.rounds = 8;
    p.load.large  = 1;
    run_threads(4, small_scratch_rank, &p);
    for (r = 0; r < 4; r++) CHECK_EQ(p.load.bad[r], 0);
    end_party();
}

/* The caller's own call on a non-blocking communicator is still on its way. */
static void unsettled_rank(rank_context *x)
{
    party         *p = (party *)x->user;
    lorasync_comm  c;
    lorasync_error err;
    ncclComm_t     borrowed;
    void          *data;
    int            i;
    if (open_rank(p, x->rank, x->world, &borrowed, &c, &err) < 0) {
        test_fail(__FILE__, __LINE__, err.text);
        return;
    }
    cudaMalloc(&data, 64);
    for (i = 0; i < 10; i++) {
        ncclResult_t state = ncclInProgress; /* an exchange without messages has not looked */
        while (state == ncclInProgress) ncclCommGetAsyncError(borrowed, &state);
        CHECK_EQ(ncclAllGather(data, data, 8, ncclUint8, borrowed, NULL), ncclInProgress);
        CHECK_EQ(i % 2 ? gather_round(&c, (unsigned long long)i, 100) : exchange_round(&c, (unsigned long long)i, 1),
                 0);
    }
    cudaFree(data);
    lorasync_nccl_close(&c);
    ncclCommDestroy(borrowed);
}

static void caller_has_not_settled(void)
{
    party p;
    start_party(&p, 2);
    p.borrowed                    = 2;
    fake_nccl.rank[0].in_progress = 3;
    fake_nccl.rank[1].in_progress = 30;
    run_threads(2, unsettled_rank, &p);
    end_party();
}

/* Nothing is allocated after opening. */
static void allocations_rank(rank_context *x)
{
    party         *p = (party *)x->user;
    lorasync_comm  c;
    lorasync_error err;
    ncclComm_t     borrowed;
    long           before;
    int            i;
    if (open_rank(p, x->rank, x->world, &borrowed, &c, &err) < 0) return;
    before = fake_cuda.allocations;
    for (i = 0; i < 5; i++)
        CHECK(!gather_round(&c, (unsigned long long)i, 512) && !exchange_round(&c, (unsigned long long)i, 1));
    CHECK(!gather_round(&c, 9, 9 << 20));
    CHECK_EQ(fake_cuda.allocations, before);
    lorasync_nccl_close(&c);
}

static void allocates_nothing_later(void)
{
    party p;
    start_party(&p, 1);
    run_threads(1, allocations_rank, &p);
    end_party();
}

/* -- opening */

static void bad_arguments(void)
{
    party              p;
    lorasync_nccl_desc d;
    lorasync_comm      c;
    lorasync_error     err;
    ncclUniqueId       id;
    ncclComm_t         comm;
    start_party(&p, 2);
    memset(&d, 0, sizeof d);
    memset(&c, 0, sizeof c);
    CHECK_EQ(lorasync_nccl_unique_id(NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_nccl_open(NULL, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_nccl_open(&d, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "neither comm nor unique_id");
    d.unique_id = p.id;
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "desc.world is 0");
    d.world = 2, d.rank = 2;
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "desc.rank is 2, must be 0 to 1");
    d.rank = -1;
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    d.rank = 0, d.timeout_ms = -5;
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "timeout_ms is -5");
    d.timeout_ms = 0;
    memcpy(id.internal, p.id, sizeof p.id);
    CHECK_EQ(ncclCommInitRank(&comm, 1, id, 0), ncclSuccess);
    d.comm = comm;
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "both comm and unique_id");
    d.unique_id = NULL;
    cudaSetDevice(1);
    CHECK_EQ(lorasync_nccl_open(&d, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "desc.comm is on device 0, but device 1 is current");
    cudaSetDevice(0);
    CHECK(!c.all_gather); /* untouched */
    CHECK_EQ(fake_nccl.aborts + fake_nccl.destroys, 0);
    ncclCommDestroy(comm);
    fake_nccl.fail_id = ncclSystemError;
    CHECK_EQ(lorasync_nccl_unique_id(p.id, &err), LORASYNC_E_COMM);
    CHECK_HAS(err.text, "unhandled system error");
    lorasync_nccl_close(NULL);
    lorasync_nccl_close(&c);
    c = lorasync_solo();
    lorasync_nccl_close(&c); /* not one of its own: left alone */
    CHECK(c.all_gather != NULL);
    end_party();
}

static void note(party *p, int rank, lorasync_status status, uint64_t start, const lorasync_error *err)
{
    p->status[rank] = status;
    p->ns[rank]     = (long long)(test_now_ns() - start);
    snprintf(p->text[rank], sizeof p->text[0], "%s", status < 0 ? err->text : "");
}

static void open_only(rank_context *x)
{
    party         *p = (party *)x->user;
    lorasync_comm  c;
    lorasync_error err;
    ncclComm_t     borrowed;
    uint64_t       start = test_now_ns();
    memset(&c, 0, sizeof c);
    note(p, x->rank, open_rank(p, x->rank, x->world, &borrowed, &c, &err), start, &err);
    if (p->status[x->rank] < 0) CHECK(!c.all_gather && !c.user);
    lorasync_nccl_close(&c);
}

static void rank_that_cannot_join(void)
{
    party p;
    int   r;
    start_party(&p, 3);
    p.timeout_ms                = test_ms(200);
    fake_nccl.rank[1].fail_init = ncclSystemError;
    run_threads(3, open_only, &p);
    CHECK_EQ(p.status[1], LORASYNC_E_COMM);
    CHECK_HAS(p.text[1], "making a communicator: unhandled system error");
    for (r = 0; r < 3; r += 2) {
        CHECK_EQ(p.status[r], LORASYNC_E_TIMEOUT);
        CHECK_HAS(p.text[r], "making a communicator");
        CHECK(p.ns[r] >= test_ms(200) * 1000000ll - 1000000 && p.ns[r] < test_no_hang_ns());
    }
    CHECK_EQ(fake_nccl.aborts, 2);
    end_party();
}

static void rank_that_hangs_joining(void)
{
    party p;
    int   r;
    start_party(&p, 2);
    p.timeout_ms                = test_ms(150);
    fake_nccl.rank[1].hang_init = 1;
    run_threads(2, open_only, &p);
    for (r = 0; r < 2; r++) CHECK(p.status[r] == LORASYNC_E_TIMEOUT && p.ns[r] < test_no_hang_ns());
    CHECK_EQ(fake_nccl.aborts, 2);
    end_party();
}

static void no_memory(void)
{
    party p;
    int   n;
    for (n = 1; n < 5; n++) {
        start_party(&p, 1);
        fake_cuda.fail_at = n;
        p.borrowed        = 0;
        run_threads(1, open_only, &p);
        CHECK_EQ(p.status[0], LORASYNC_E_MEMORY);
        CHECK_HAS(p.text[0], "NCCL scratch");
        CHECK_HAS(p.text[0], "out of memory");
        CHECK_EQ(fake_nccl.aborts, 1);
        CHECK_EQ(cudaPeekAtLastError(), cudaSuccess);
        end_party();
    }
    start_party(&p, 1);
    fake_cuda.fail_at = n;
    run_threads(1, open_only, &p);
    CHECK_EQ(p.status[0], LORASYNC_OK);
    fake_cuda.fail_at = 0;
    end_party();
}

/* A close that NCCL does not finish ends in an abort. */
static void hanging_close(void)
{
    party    p;
    uint64_t start = test_now_ns();
    start_party(&p, 1);
    p.timeout_ms                    = test_ms(100);
    fake_nccl.rank[0].hang_finalize = 1;
    run_threads(1, open_only, &p);
    CHECK_EQ(p.status[0], LORASYNC_OK);
    CHECK_EQ(fake_nccl.aborts, 1);
    CHECK_EQ(fake_nccl.destroys, 0);
    CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns());
    end_party();
}

/* -- trouble while it runs: as a plan does it, a failing rank aborts, and learns nothing more than "lost" afterwards */

static void troubled_rank(rank_context *x)
{
    party           *p = (party *)x->user;
    lorasync_comm    c;
    lorasync_error   err;
    lorasync_status  status = LORASYNC_OK;
    ncclComm_t       borrowed;
    uint64_t         start;
    lorasync_message s[FAKE_RANKS], r[FAKE_RANKS];
    char             data[64] = {0}, got[FAKE_RANKS][64];
    size_t           n        = 0;
    int              i;
    p->open[x->rank] = open_rank(p, x->rank, x->world, &borrowed, &c, &err);
    if (p->open[x->rank] < 0) {
        test_fail(__FILE__, __LINE__, err.text);
        return;
    }
    for (i = 0; i < x->world; i++) {
        if (i == x->rank) continue;
        s[n].peer = r[n].peer = i, s[n].num_bytes = r[n].num_bytes = 64, s[n].data = data, r[n].data = got[i];
        n++;
    }
    start = test_now_ns();
    for (i = 0; i < 4 && status == LORASYNC_OK; i++) {
        start  = test_now_ns();
        status = i % 2 ? c.exchange(c.user, s, n, r, n, p->timeout_ms, &err)
                       : c.all_gather(c.user, data, got, 16, p->timeout_ms, &err);
    }
    note(p, x->rank, status, start, &err);
    if (status < 0) {
        p->again[x->rank] = c.all_gather(c.user, data, got, 16, p->timeout_ms, &err); /* before the abort */
        CHECK_EQ(p->again[x->rank], LORASYNC_E_LOST);
        if (x->rank != p->victim || !p->stream) c.abort(c.user, "a test"); /* p->stream: the victim only closes */
        c.abort(c.user, "twice");
        CHECK_EQ(c.exchange(c.user, s, n, r, n, p->timeout_ms, &err), LORASYNC_E_LOST);
        CHECK_EQ(c.exchange_stream(c.user, s, n, r, n, NULL, p->timeout_ms, &err), LORASYNC_E_LOST);
        CHECK_EQ(c.check(c.user, &err), LORASYNC_E_LOST);
        CHECK_HAS(err.text, "lost before");
    }
    lorasync_nccl_close(&c);
    if (borrowed && status == LORASYNC_OK) ncclCommDestroy(borrowed);
}

static void run_troubled(party *p, int world)
{
    run_threads(world, troubled_rank, p);
    CHECK_EQ(fake_nccl.aborts, world);
    CHECK_EQ(fake_nccl.destroys, 0);
    CHECK_EQ(cudaPeekAtLastError(), cudaSuccess);
    end_party();
}

static void async_error(void)
{
    int at, borrowed, r;
    for (at = 1; at <= 4; at++)
        for (borrowed = 0; borrowed < 3; borrowed++) {
            party p;
            start_party(&p, 3);
            p.timeout_ms = test_ms(100), p.victim = 1, p.borrowed = borrowed, p.stream = at % 2;
            fake_nccl.rank[1].broken_at = at;
            fake_nccl.rank[1].broken    = ncclSystemError;
            run_troubled(&p, 3);
            CHECK_EQ(p.status[1], LORASYNC_E_COMM);
            CHECK_HAS(p.text[1], "unhandled system error (the fake broke it)");
            CHECK_HAS(p.text[1], "make a new communicator");
            CHECK(p.ns[1] < test_no_hang_ns());
            for (r = 0; r < 3; r += 2) CHECK(p.status[r] == LORASYNC_E_TIMEOUT && p.ns[r] < test_no_hang_ns());
        }
}

static void peers_notice(void)
{
    party p;
    int   r;
    start_party(&p, 4);
    p.timeout_ms = test_ms(20000), p.victim = 2;
    fake_nccl.peers_notice      = 1;
    fake_nccl.rank[2].broken_at = 3;
    fake_nccl.rank[2].broken    = ncclInternalError;
    run_troubled(&p, 4);
    CHECK_EQ(p.status[2], LORASYNC_E_COMM);
    for (r = 0; r < 4; r++) {
        if (r != 2) CHECK_EQ(p.status[r], LORASYNC_E_PEER);
        CHECK(p.ns[r] < test_no_hang_ns());
    }
}

static void hang(void)
{
    int at, r;
    for (at = 1; at <= 4; at++) {
        party p;
        start_party(&p, 3);
        p.timeout_ms = test_ms(150), p.victim = 0, p.borrowed = at % 3;
        fake_nccl.rank[0].hang_at     = at;
        fake_nccl.rank[0].in_progress = at;
        run_troubled(&p, 3);
        for (r = 0; r < 3; r++) {
            CHECK_EQ(p.status[r], LORASYNC_E_TIMEOUT);
            CHECK_HAS(p.text[r], at % 2 ? "all_gather" : "exchange");
            CHECK(p.ns[r] >= test_ms(150) * 1000000ll - 1000000 && p.ns[r] < test_no_hang_ns());
        }
    }
}

/* A call that stays "in progress" for ever never gets as far as the stream. */
static void never_settles(void)
{
    party p;
    start_party(&p, 1);
    p.timeout_ms = test_ms(100);
    {
        lorasync_comm  c;
        lorasync_error err;
        ncclComm_t     borrowed;
        char           in[16] = {0}, out[16];
        uint64_t       start;
        REQUIRE(open_rank(&p, 0, 1, &borrowed, &c, &err) == LORASYNC_OK);
        fake_nccl.rank[0].in_progress = 1 << 30;
        start                         = test_now_ns();
        CHECK_EQ(c.all_gather(c.user, in, out, 16, test_ms(100), &err), LORASYNC_E_TIMEOUT);
        CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns());
        lorasync_nccl_close(&c); /* without an abort by the caller */
    }
    CHECK_EQ(fake_nccl.aborts, 1);
    end_party();
}

static void refused_calls(void)
{
    int stream;
    for (stream = 0; stream < 2; stream++) {
        party p;
        int   r;
        start_party(&p, 2);
        p.timeout_ms = test_ms(150), p.victim = 1;
        fake_nccl.rank[1].fail_call = ncclInvalidUsage;
        run_troubled(&p, 2);
        CHECK_EQ(p.status[1], LORASYNC_E_COMM);
        for (r = 0; r < 2; r++) CHECK(p.ns[r] < test_no_hang_ns());
    }
}

/* An open group is closed although a call in it failed. */
static void group_is_closed(void)
{
    party            p;
    lorasync_comm    c;
    lorasync_error   err;
    ncclComm_t       borrowed;
    lorasync_message m;
    char             data[16] = {0};
    start_party(&p, 1);
    REQUIRE(open_rank(&p, 0, 1, &borrowed, &c, &err) == LORASYNC_OK);
    fake_nccl.rank[0].fail_call = ncclInvalidUsage;
    m.peer = 0, m.data = data, m.num_bytes = 16;
    CHECK_EQ(c.exchange_stream(c.user, &m, 1, NULL, 0, NULL, test_ms(100), &err), LORASYNC_E_COMM);
    CHECK_EQ(fake_depth, 0);
    lorasync_nccl_close(&c);
    fake_nccl.misuses = 0; /* the message to itself was meant */
    end_party();
}

static void cuda_error(void)
{
    party          p;
    lorasync_comm  c;
    lorasync_error err;
    ncclComm_t     borrowed;
    char           in[16] = {0}, out[16];
    start_party(&p, 1);
    REQUIRE(open_rank(&p, 0, 1, &borrowed, &c, &err) == LORASYNC_OK);
    fake_cuda.query_fails_at = 1;
    CHECK_EQ(c.all_gather(c.user, in, out, 16, test_ms(1000), &err), LORASYNC_E_COMM);
    CHECK_HAS(err.text, "cudaErrorIllegalAddress");
    CHECK_EQ(cudaPeekAtLastError(), cudaSuccess);
    lorasync_nccl_close(&c);
    CHECK_EQ(fake_nccl.aborts, 1);
    end_party();
}

static void empty_messages(void)
{
    party            p;
    lorasync_comm    c;
    lorasync_error   err;
    ncclComm_t       borrowed;
    lorasync_message m[3];
    start_party(&p, 1);
    REQUIRE(open_rank(&p, 0, 1, &borrowed, &c, &err) == LORASYNC_OK);
    memset(m, 0, sizeof m);
    CHECK_EQ(c.exchange(c.user, NULL, 0, NULL, 0, test_ms(100), &err), LORASYNC_OK);
    CHECK_EQ(c.exchange(c.user, m, 1, m, 1, test_ms(100), &err), LORASYNC_OK);
    CHECK_EQ(c.exchange_stream(c.user, m, 1, m, 1, NULL, test_ms(100), &err), LORASYNC_OK);
    CHECK_EQ(c.check(c.user, &err), LORASYNC_OK);
    CHECK_EQ(fake_nccl.calls, 0);
    CHECK_EQ(c.exchange(c.user, m, 2, m, 1, test_ms(100), &err), LORASYNC_E_COMM);
    CHECK_HAS(err.text, "2 sends");
    lorasync_nccl_close(&c);
    end_party();
}

int main(void)
{
    RUN(random_traffic);
    RUN(random_traffic_borrowed);
    RUN(random_traffic_on_stream);
    RUN(slow_answers);
    RUN(messages_in_parts);
    RUN(caller_has_not_settled);
    RUN(allocates_nothing_later);
    RUN(bad_arguments);
    RUN(rank_that_cannot_join);
    RUN(rank_that_hangs_joining);
    RUN(no_memory);
    RUN(hanging_close);
    RUN(async_error);
    RUN(peers_notice);
    RUN(hang);
    RUN(never_settles);
    RUN(refused_calls);
    RUN(group_is_closed);
    RUN(cuda_error);
    RUN(empty_messages);
    return test_summary("test_nccl");
}

#endif
