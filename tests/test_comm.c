/* Solo and local communicators: random traffic, and ranks that disagree, never come, or die. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "traffic.h"

#include <sys/mman.h>

/* What process ranks leave for the test: shared between them. */
typedef struct outcome {
    int       status;
    long long ns;
    char      text[512];
} outcome;

static outcome *shared_outcomes(void)
{
    void *p = mmap(NULL, MAX_WORLD * sizeof(outcome), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : (outcome *)p;
}

static void traffic_of(int world, int rounds, int large, int processes)
{
    traffic t;
    int     r;
    memset(&t, 0, sizeof t);
    t.rounds = rounds, t.large = large;
    if (processes) {
        CHECK_EQ(run_processes(world, run_traffic, &t), 0);
        return;
    }
    run_threads(world, run_traffic, &t);
    for (r = 0; r < world; r++) CHECK_EQ(t.bad[r], 0);
}

static void run_traffic_process(rank_context *x)
{
    run_traffic(x);
    CHECK_EQ(((traffic *)x->user)->bad[x->rank], 0); /* the child's own copy; becomes its exit status */
}

static void solo(void)
{
    lorasync_comm    c = lorasync_solo();
    lorasync_message m;
    lorasync_error   err;
    int              in = 7, out = 0;
    CHECK(c.size == sizeof c && c.rank == 0 && c.world == 1);
    CHECK_EQ(c.all_gather(c.user, &in, &out, sizeof in, 10, &err), LORASYNC_OK);
    CHECK_EQ(out, 7);
    CHECK_EQ(c.exchange(c.user, NULL, 0, NULL, 0, 10, &err), LORASYNC_OK);
    m.peer = 0, m.data = &in, m.num_bytes = sizeof in;
    CHECK_EQ(c.exchange(c.user, &m, 1, NULL, 0, 10, &err), LORASYNC_E_COMM);
}

static void threads_1(void) { traffic_of(1, 50, 1, 0); }
static void threads_2(void) { traffic_of(2, 150, 1, 0); }
static void threads_7(void) { traffic_of(7, 25, 1, 0); }
static void threads_40(void) { traffic_of(40, 12, 0, 0); }
static void threads_64(void) { traffic_of(64, 8, 0, 0); }

static void processes_traffic(void)
{
    static const int worlds[][2] = {{1, 20}, {2, 150}, {7, 25}, {40, 6}};
    size_t           i;
    for (i = 0; i < sizeof worlds / sizeof worlds[0]; i++) {
        traffic t;
        memset(&t, 0, sizeof t);
        t.rounds = worlds[i][1], t.large = worlds[i][0] < 10;
        CHECK_EQ(run_processes(worlds[i][0], run_traffic_process, &t), 0);
    }
}

/* -- opening and joining */

static void open_and_join(void)
{
    lorasync_local *l = (lorasync_local *)&l;
    lorasync_comm   c;
    lorasync_error  err;
    CHECK_EQ(lorasync_local_open(0, &l, &err), LORASYNC_E_ARGUMENT);
    CHECK(l == NULL);
    CHECK_HAS(err.text, "world is 0");
    CHECK_EQ(lorasync_local_open(257, &l, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_local_open(256, &l, &err), LORASYNC_OK); /* 16 GiB of address space, none of it touched */
    lorasync_local_close(l);
    CHECK_EQ(lorasync_local_open(3, &l, NULL), LORASYNC_OK);
    CHECK_EQ(lorasync_local_join(l, 3, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "rank is 3, must be 0 to 2");
    CHECK_EQ(lorasync_local_join(l, -1, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_local_join(NULL, 0, &c, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_local_join(l, 1, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_local_join(l, 1, &c, &err), LORASYNC_OK);
    CHECK(c.rank == 1 && c.world == 3 && c.size == sizeof c && c.abort);
    CHECK_EQ(lorasync_local_join(l, 1, &c, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "rank 1 has joined already");
    lorasync_local_close(l);
    lorasync_local_close(NULL);
}

/* -- ranks that disagree */

static outcome *outcomes;

static void note(rank_context *x, lorasync_status status, uint64_t start, const lorasync_error *err)
{
    outcome *o = &outcomes[x->rank];
    o->status  = (int)status;
    o->ns      = (long long)(test_now_ns() - start);
    snprintf(o->text, sizeof o->text, "%s", status < 0 ? err->text : "");
}

static void reset_outcomes(void)
{
    int i;
    if (!outcomes) outcomes = shared_outcomes();
    memset(outcomes, 0, MAX_WORLD * sizeof *outcomes);
    for (i = 0; i < MAX_WORLD; i++) outcomes[i].status = 99;
}

static void mismatched(rank_context *x)
{
    char             a[64] = {0}, b[64];
    lorasync_message s, r;
    lorasync_error   err;
    uint64_t         start = test_now_ns();
    lorasync_status  status;
    s.peer = r.peer = 1 - x->rank, s.data = a, r.data = b;
    s.num_bytes = 10, r.num_bytes = x->rank ? 20 : 10; /* rank 1 expects 20 of 10 */
    status = x->comm.exchange(x->comm.user, &s, 1, &r, 1, test_ms(300), &err);
    /* whoever had luck learns of it in the next call */
    if (status < 0) x->comm.abort(x->comm.user, err.text);
    else status = x->comm.all_gather(x->comm.user, a, b, 8, test_ms(300), &err);
    note(x, status, start, &err);
}

static void mismatched_sizes(void)
{
    int r;
    reset_outcomes();
    run_threads(2, mismatched, NULL);
    for (r = 0; r < 2; r++) {
        CHECK(lorasync_is_lost((lorasync_status)outcomes[r].status));
        CHECK(outcomes[r].ns < test_no_hang_ns());
    }
    CHECK_EQ(outcomes[1].status, LORASYNC_E_COMM);
    CHECK_HAS(outcomes[1].text, "rank 1 expected 20 bytes from rank 0, which sends 10");
}

static void mismatched_gather(rank_context *x)
{
    char            a[64] = {0}, b[4 * 64];
    lorasync_error  err;
    uint64_t        start  = test_now_ns();
    lorasync_status status = x->comm.all_gather(x->comm.user, a, b, x->rank == 2 ? 32 : 16, test_ms(300), &err);
    note(x, status, start, &err);
    if (status < 0) x->comm.abort(x->comm.user, err.text);
}

static void mismatched_all_gather(void)
{
    int r;
    reset_outcomes();
    run_threads(4, mismatched_gather, NULL);
    for (r = 0; r < 4; r++)
        CHECK(lorasync_is_lost((lorasync_status)outcomes[r].status) && outcomes[r].ns < test_no_hang_ns());
}

static void one_stays_away(rank_context *x)
{
    char           a[16] = {0}, b[64 * 16];
    lorasync_error err;
    uint64_t       start = test_now_ns();
    if (x->rank == 1) return;
    note(x, x->comm.all_gather(x->comm.user, a, b, 16, test_ms(250), &err), start, &err);
}

static void rank_stays_away(void)
{
    int world, r;
    for (world = 2; world < 42; world += 38) {
        reset_outcomes();
        run_threads(world, one_stays_away, NULL);
        for (r = 0; r < world; r++) {
            if (r == 1) continue;
            CHECK_EQ(outcomes[r].status, LORASYNC_E_TIMEOUT);
            CHECK(outcomes[r].ns >= test_ms(250) * 1000000ll - 1000000 && outcomes[r].ns < test_no_hang_ns());
            CHECK_HAS(outcomes[r].text, "did not answer"); /* rank 1, or one that waits for it itself */
        }
    }
}

static void rank_never_joins(void)
{
    lorasync_local *l;
    lorasync_comm   c;
    lorasync_error  err;
    char            a[16] = {0}, b[32];
    uint64_t        start;
    REQUIRE(lorasync_local_open(2, &l, &err) == LORASYNC_OK);
    REQUIRE(lorasync_local_join(l, 0, &c, &err) == LORASYNC_OK);
    start = test_now_ns();
    CHECK_EQ(c.all_gather(c.user, a, b, 16, test_ms(100), &err), LORASYNC_E_TIMEOUT);
    CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns());
    CHECK_HAS(err.text, "rank 1");
    CHECK_HAS(err.text, "never joined");
    CHECK_EQ(c.all_gather(c.user, a, b, 16, 0, &err), LORASYNC_E_TIMEOUT); /* no time at all is no hang */
    lorasync_local_close(l);
}

static void aborting(rank_context *x)
{
    char           a[16] = {0}, b[8 * 16];
    lorasync_error err;
    uint64_t       start = test_now_ns();
    if (x->rank == 3) {
        test_sleep_ms(30);
        x->comm.abort(x->comm.user, "the reason");
        x->comm.abort(x->comm.user, "another");
    }
    note(x, x->comm.all_gather(x->comm.user, a, b, 16, test_ms(20000), &err), start, &err);
}

static void abort_wakes(void)
{
    int r, processes;
    for (processes = 0; processes < 2; processes++) {
        reset_outcomes();
        if (processes) CHECK_EQ(run_processes(5, aborting, NULL), 0);
        else run_threads(5, aborting, NULL);
        for (r = 0; r < 5; r++) {
            CHECK_EQ(outcomes[r].status, LORASYNC_E_COMM);
            CHECK(outcomes[r].ns < test_no_hang_ns());
            CHECK_HAS(outcomes[r].text, "rank 3: the reason");
        }
    }
}

/* -- ranks that die. The test is the parent: a killed child stays a zombie until it is collected, or is collected at
   once. */

static int kill_when; /* 0: before the exchange, 1: in the middle of it, 2: in an all_gather between two of a series */

static void dying(rank_context *x)
{
    size_t           n   = 8u << 20;
    char            *buf = (char *)calloc(1, n), b[8 * 16], a[16] = {0};
    lorasync_message s[8], r[8];
    lorasync_error   err;
    lorasync_status  status = LORASYNC_OK;
    uint64_t         start;
    size_t           k = 0;
    int              peer, i;
    for (peer = 0; peer < x->world; peer++) {
        if (peer == x->rank) continue;
        s[k].peer = r[k].peer = peer, s[k].num_bytes = r[k].num_bytes = n, s[k].data = buf, r[k].data = malloc(n);
        k++;
    }
    if (x->rank == 1 && kill_when == 0) kill(getpid(), SIGKILL);
    start = test_now_ns();
    if (x->rank == 1 && kill_when == 1) { /* sends and receives a part, then is gone */
        const lorasync_local *l = ((const lorasynci_seat *)x->comm.user)->local;
        for (k = 0; k < 3; k++) {
            lorasynci_flow out = lorasynci_flow_start(lorasynci_local_channel(l, 1, s[k].peer), &s[k]),
                           in  = lorasynci_flow_start(lorasynci_local_channel(l, r[k].peer, 1), &r[k]);
            lorasynci_flow_send(&out);
            while (in.at == 0) lorasynci_flow_receive(&in, 1, &i, &err);
        }
        kill(getpid(), SIGKILL);
    }
    for (i = 0; i < 200 && status == LORASYNC_OK && kill_when == 2; i++) {
        if (x->rank == 1 && i == 100) kill(getpid(), SIGKILL);
        status = x->comm.all_gather(x->comm.user, a, b, 16, test_ms(10000), &err);
    }
    if (kill_when != 2) status = x->comm.exchange(x->comm.user, s, k, r, k, test_ms(10000), &err);
    note(x, status, start, &err);
}

static void killed_rank(void)
{
    int zombie, r;
    for (kill_when = 0; kill_when < 3; kill_when++)
        for (zombie = 0; zombie < 2; zombie++) {
            lorasync_local *l;
            lorasync_error  err;
            pid_t           pids[4];
            int             status;
            reset_outcomes();
            REQUIRE(lorasync_local_open(4, &l, &err) == LORASYNC_OK);
            fflush(NULL);
            for (r = 0; r < 4; r++) {
                pids[r] = fork();
                if (pids[r] == 0) {
                    rank_context c;
                    memset(&c, 0, sizeof c);
                    c.rank = r, c.world = 4;
                    if (lorasync_local_join(l, r, &c.comm, &err) == LORASYNC_OK) dying(&c);
                    _exit(0);
                }
            }
            if (!zombie) waitpid(pids[1], &status, 0);
            for (r = 0; r < 4; r++)
                if (r != 1) waitpid(pids[r], &status, 0);
            if (zombie) waitpid(pids[1], &status, 0);
            for (r = 0; r < 4; r++) {
                if (r == 1) continue;
                if (outcomes[r].status != LORASYNC_E_PEER)
                    fprintf(stderr, "kill_when %d zombie %d rank %d: %s\n", kill_when, zombie, r, outcomes[r].text);
                CHECK_EQ(outcomes[r].status, LORASYNC_E_PEER);
                CHECK_HAS(outcomes[r].text, "is gone"); /* rank 1, or one that had ended because of it */
                CHECK(outcomes[r].ns < 3000000000LL);
            }
            lorasync_local_close(l);
        }
}

/* A rank that is done may end: what it sent is there, and nobody is to take it for dead. */
static void sends_and_exits(rank_context *x)
{
    char             data[100000];
    lorasync_message m;
    lorasync_error   err;
    m.data = data, m.num_bytes = sizeof data;
    memset(data, x->rank, sizeof data);
    if (x->rank == 0) {
        int r;
        test_sleep_ms(20); /* the others are gone by now */
        for (r = 1; r < x->world; r++) {
            m.peer = r;
            if (x->comm.exchange(x->comm.user, NULL, 0, &m, 1, test_ms(5000), &err) < 0)
                test_fail(__FILE__, __LINE__, err.text);
            CHECK(data[0] == r && data[sizeof data - 1] == r);
        }
    } else {
        m.peer = 0;
        CHECK_EQ(x->comm.exchange(x->comm.user, &m, 1, NULL, 0, test_ms(5000), &err), LORASYNC_OK);
    }
}

static void early_exit_is_no_death(void) { CHECK_EQ(run_processes(6, sends_and_exits, NULL), 0); }

/* The same, made certain: the sender ends between the receiver's look into the channel and its look at the process. */
static void exit_behind_the_back(void)
{
    lorasync_local  *l;
    lorasync_comm    c;
    lorasync_error   err;
    lorasynci_flow   f;
    char             data[8];
    lorasync_message m;
    pid_t            pid;
    int              status;
    REQUIRE(lorasync_local_open(2, &l, &err) == LORASYNC_OK);
    REQUIRE(lorasync_local_join(l, 0, &c, &err) == LORASYNC_OK);
    fflush(NULL);
    pid = fork();
    if (pid == 0) {
        memset(data, 5, sizeof data);
        m.peer = 0, m.data = data, m.num_bytes = sizeof data;
        _exit(lorasync_local_join(l, 1, &c, &err) < 0 || c.exchange(c.user, &m, 1, NULL, 0, test_ms(1000), &err) < 0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 0);
    m.peer = 1, m.data = data, m.num_bytes = sizeof data;
    f = lorasynci_flow_start(lorasynci_local_channel(l, 1, 0), &m);
    CHECK_EQ(lorasynci_local_check((const lorasynci_seat *)c.user, 1, UINT64_MAX, &err), LORASYNC_E_PEER);
    CHECK_EQ(lorasynci_local_check_sender((const lorasynci_seat *)c.user, &f, UINT64_MAX, &err), LORASYNC_OK);
    CHECK(f.at == f.total && data[0] == 5);
    l->ranks[1].process |= lorasynci_process_unlocked; /* nothing says that such a one is gone */
    CHECK_EQ(lorasynci_local_check((const lorasynci_seat *)c.user, 1, UINT64_MAX, &err), LORASYNC_OK);
    lorasync_local_close(l);
}

/* -- cost */

enum {
    TIMED = 2000
};

static void timed(rank_context *x)
{
    char           in[16] = {0}, out[8 * 16];
    lorasync_error err;
    uint64_t       start;
    int            i;
    gather_round(&x->comm, 1, 16);
    start = test_now_ns();
    for (i = 0; i < TIMED; i++)
        CHECK_EQ(x->comm.all_gather(x->comm.user, in, out, 16, test_ms(10000), &err), LORASYNC_OK);
    note(x, LORASYNC_OK, start, &err);
}

static void all_gather_cost(void)
{
    reset_outcomes();
    CHECK_EQ(run_processes(4, timed, NULL), 0);
    printf("     all_gather of 16 bytes, 4 processes: %.1f us\n", (double)outcomes[0].ns / TIMED / 1000);
}

/* Of two long messages the first chunks are equally long: only the size in front tells them apart. */
static void long_message_of_another_size(void)
{
    lorasynci_channel *c     = (lorasynci_channel *)calloc(1, sizeof *c);
    char              *data  = (char *)calloc(1, 3 * LORASYNCI_CHUNK);
    uint64_t           size  = 3 * LORASYNCI_CHUNK;
    int                moved = 0;
    lorasync_message   m;
    lorasynci_flow     f;
    lorasync_error     err;
    REQUIRE(c && data);
    m.peer = 1, m.data = data, m.num_bytes = 2 * LORASYNCI_CHUNK;
    memcpy(c->chunks[0], &size, 8);
    c->sent = 1, c->sizes[0] = LORASYNCI_CHUNK;
    f = lorasynci_flow_start(c, &m);
    CHECK_EQ(lorasynci_flow_receive(&f, 0, &moved, &err), LORASYNC_E_COMM);
    CHECK_HAS(err.text, "rank 0 expected 131072 bytes from rank 1, which sends 196608");
    CHECK(!moved && c->taken == 0);
    free(c), free(data);
}

/* Chunks wait until they are taken: a sender never writes over one that is still to be read. */
static void sender_that_is_faster(void)
{
    enum {
        NUM_BYTES = (LORASYNCI_RING + 2) * LORASYNCI_CHUNK
    };
    lorasynci_channel *c    = (lorasynci_channel *)calloc(1, sizeof *c);
    unsigned char     *from = (unsigned char *)malloc(NUM_BYTES), *to = (unsigned char *)calloc(1, NUM_BYTES);
    int                i, moved                                       = 0;
    lorasync_message   out, in;
    lorasynci_flow     sending, receiving;
    lorasync_error     err;
    REQUIRE(c && from && to);
    for (i = 0; i < NUM_BYTES; i++) from[i] = (unsigned char)(i / LORASYNCI_CHUNK + 7 * i);
    memset(&out, 0, sizeof out), memset(&in, 0, sizeof in);
    out.peer = 1, out.data = from, out.num_bytes = NUM_BYTES;
    in.data = to, in.num_bytes = NUM_BYTES;
    sending   = lorasynci_flow_start(c, &out);
    receiving = lorasynci_flow_start(c, &in);
    CHECK(lorasynci_flow_send(&sending));
    CHECK_EQ(c->sent, LORASYNCI_RING);
    CHECK(!lorasynci_flow_send(&sending)); /* full */
    while (receiving.at < receiving.total) {
        REQUIRE(lorasynci_flow_receive(&receiving, 1, &moved, &err) == LORASYNC_OK && c->taken == c->sent);
        lorasynci_flow_send(&sending);
    }
    CHECK(sending.at == sending.total && memcmp(from, to, NUM_BYTES) == 0);
    free(c), free(from), free(to);
}

/* A comm says who is asking, and of how many. */
static void comm_that_is_not_filled_in(void)
{
    lorasync_comm c = lorasync_solo();
    CHECK(lorasynci_comm_ok(&c) && lorasynci_comm_ok(NULL));
    c.rank = 1;
    CHECK(!lorasynci_comm_ok(&c));
    c.rank = -1;
    CHECK(!lorasynci_comm_ok(&c));
    c.rank = 0, c.world = 0;
    CHECK(!lorasynci_comm_ok(&c));
    c.world = 1, c.exchange = NULL;
    CHECK(!lorasynci_comm_ok(&c));
    c = lorasync_solo(), c.size = 8;
    CHECK(!lorasynci_comm_ok(&c));
}

static void damaged_chunk(void)
{
    lorasynci_channel *c = (lorasynci_channel *)calloc(1, sizeof *c);
    char               data[100], expected[100];
    lorasync_message   m;
    uint64_t           size = sizeof data;
    uint32_t           wrong;
    lorasync_error     err;
    REQUIRE(c);
    m.peer = 1, m.data = data, m.num_bytes = sizeof data;
    memset(c->chunks[0], 7, 8 + sizeof data);
    memset(expected, 7, sizeof expected);
    memcpy(c->chunks[0], &size, 8);
    for (wrong = 107; wrong <= 109; wrong++) {
        lorasynci_flow f     = lorasynci_flow_start(c, &m);
        int            moved = 0;
        c->sent = 1, c->taken = 0, c->sizes[0] = wrong;
        memset(data, 0, sizeof data);
        CHECK_EQ(lorasynci_flow_receive(&f, 0, &moved, &err), wrong == 108 ? LORASYNC_OK : LORASYNC_E_COMM);
        CHECK_EQ(moved, wrong == 108);
        CHECK_EQ(c->taken, wrong == 108);
        CHECK_EQ(memcmp(data, expected, sizeof data) == 0, wrong == 108);
        if (wrong != 108) CHECK_HAS(err.text, "rank 0 expected 100 bytes from rank 1");
    }
    free(c);
}

int main(void)
{
    RUN(solo);
    RUN(threads_1);
    RUN(threads_2);
    RUN(threads_7);
    RUN(threads_40);
    RUN(threads_64);
    RUN(processes_traffic);
    RUN(open_and_join);
    RUN(mismatched_sizes);
    RUN(damaged_chunk);
    RUN(long_message_of_another_size);
    RUN(sender_that_is_faster);
    RUN(comm_that_is_not_filled_in);
    RUN(mismatched_all_gather);
    RUN(rank_stays_away);
    RUN(rank_never_joins);
    RUN(abort_wakes);
    RUN(killed_rank);
    RUN(early_exit_is_no_death);
    RUN(exit_behind_the_back);
    RUN(all_gather_cost);
    return test_summary("test_comm");
}
