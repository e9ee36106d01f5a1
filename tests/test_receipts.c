/* Published is received: what engine processes say that they serve, how a sync counts it and waits for it, and who is
   named when it is missing. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "pieces.h"
#include "published.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum {
    MAX_ENGINES = 4,
    NUM_TENSORS = 2
};

/* -- a place to publish in, new for each test */

typedef enum place {
    SHM,
    DIRECTORY
} place;

static place where; /* that the test uses now */
static char  shm_name[64];
static char  folder[64]; /* "": none */

/* Each %s becomes the path. */
static void run(const char *command, const char *path)
{
    char   line[300];
    size_t n = 0;
    for (; *command; command++) {
        if (strncmp(command, "%s", 2) != 0) line[n++] = *command;
        else n += (size_t)snprintf(line + n, sizeof line - n, "%s", path), command++;
    }
    line[n] = 0;
    CHECK_EQ(system(line), 0);
}

static void drop_place(void)
{
    if (shm_name[0]) lorasync_shm_remove(shm_name, NULL);
    if (folder[0]) run("rm -rf '%s'", folder);
    shm_name[0] = folder[0] = 0;
}

static void fresh_place(void)
{
    static int number;
    drop_place();
    snprintf(shm_name, sizeof shm_name, "test-receipts-%ld-%d", (long)getpid(), number++);
    if (where == SHM) return;
    strcpy(folder, "/tmp/test-receipts-XXXXXX");
    CHECK(mkdtemp(folder) != NULL);
}

/* -- engine processes */

/* What test and engine processes share. */
typedef struct stage {
    int      stop;                  /* 1: engines end */
    uint64_t serves[MAX_ENGINES];   /* versions; each engine's own */
    uint64_t stuck_at[MAX_ENGINES]; /* an engine that serves it polls no more; 0: never */
    int      ready[MAX_ENGINES];    /* it has looked once */
} stage;

static stage *shared;
static pid_t  engines[MAX_ENGINES];

static void reset_stage(void)
{
    if (!shared)
        shared = (stage *)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(shared, 0, sizeof *shared);
    memset(engines, 0, sizeof engines);
}

static void serve(int i, const char *adapter, lorasync_engine *e)
{
    while (!__atomic_load_n(&shared->stop, __ATOMIC_SEQ_CST)) {
        const lorasync_adapter *a;
        const uint64_t          stuck_at = __atomic_load_n(&shared->stuck_at[i], __ATOMIC_SEQ_CST);
        if (stuck_at && shared->serves[i] >= stuck_at) {
            test_sleep_ms(2);
            continue;
        }
        if (lorasync_engine_poll(e, 5, NULL) == LORASYNC_OK && (a = lorasync_acquire(e, adapter)) != NULL) {
            __atomic_store_n(&shared->serves[i], a->version, __ATOMIC_SEQ_CST);
            lorasync_release(a);
        }
        __atomic_store_n(&shared->ready[i], 1, __ATOMIC_SEQ_CST);
    }
}

/* Engine i in a process of its own; returns when it has looked once. */
static void start_engine(int i, const lorasync_engine_desc *desc, const char *adapter)
{
    const unsigned long long deadline = test_now_ns() + (unsigned long long)test_no_hang_ns();
    shared->ready[i]                  = 0;
    fflush(NULL);
    engines[i] = fork();
    if (engines[i] == 0) {
        lorasync_engine *e = NULL;
        if (lorasync_engine_open(desc, &e, NULL) < 0) _exit(1);
        serve(i, adapter, e);
        lorasync_engine_close(e);
        _exit(0);
    }
    while (!__atomic_load_n(&shared->ready[i], __ATOMIC_SEQ_CST) && test_now_ns() < deadline) usleep(200);
    CHECK(shared->ready[i]);
}

static void kill_engine(int i)
{
    if (!engines[i]) return;
    kill(engines[i], SIGKILL);
    waitpid(engines[i], NULL, 0);
    engines[i] = 0;
}

static void stop_engines(void)
{
    int i, status;
    shared->stop = 1;
    for (i = 0; i < MAX_ENGINES; i++) {
        if (!engines[i]) continue;
        CHECK_EQ(waitpid(engines[i], &status, 0), engines[i]);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        engines[i] = 0;
    }
}

static lorasync_engine_desc engine_of(const char *engine, const char *adapter)
{
    lorasync_engine_desc d;
    memset(&d, 0, sizeof d);
    if (where == SHM) d.shm = shm_name;
    else d.directory = folder;
    d.name    = engine;
    d.adapter = adapter;
    return d;
}

/* One in this process, which polls when the test says so. */
static lorasync_engine *open_engine(const lorasync_engine_desc *desc)
{
    lorasync_engine *e = NULL;
    lorasync_error   err;
    err.text[0] = 0;
    if (lorasync_engine_open(desc, &e, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    return e;
}

/* -- trainers of any number of ranks: one pair of LoRA, cut as FSDP2 does */

typedef struct trainer {
    lorasync_session *session;
    float             values[NUM_TENSORS][64];
} trainer;

static void train(trainer *t, uint64_t version)
{
    int i;
    for (i = 0; i < 64; i++) t->values[0][i] = (float)version + (float)i, t->values[1][i] = (float)version - (float)i;
}

static void add_pieces(trainer *t, int rank, int world)
{
    lorasync_piece a = shard_piece("layers.0.q_proj.lora_A.policy.weight", 2, 4, 16, rank, world, t->values[0]);
    lorasync_piece b = shard_piece("layers.0.q_proj.lora_B.policy.weight", 2, 16, 4, rank, world, t->values[1]);
    lorasync_add(t->session, &a, NULL);
    lorasync_add(t->session, &b, NULL);
}

static lorasync_desc trainer_desc(const lorasync_comm *comm)
{
    lorasync_desc d;
    memset(&d, 0, sizeof d);
    d.comm               = comm;
    d.adapter            = "policy";
    d.lora_alpha         = 8;
    d.receipt_timeout_ms = test_ms(5000);
    return d;
}

/* Opened, declared, with one transport (of the root) attached, and compiled. */
static lorasync_status open_trainer(trainer *t, const lorasync_desc *d, const lorasync_transport *transport,
                                    lorasync_error *err)
{
    const int       rank = d->comm ? d->comm->rank : 0, world = d->comm ? d->comm->world : 1;
    lorasync_status status;
    memset(t, 0, sizeof *t);
    status = lorasync_open(d, &t->session, err);
    if (status < 0) return status;
    add_pieces(t, rank, world);
    if (rank == 0 && transport) lorasync_attach(t->session, transport, NULL);
    return lorasync_compile(t->session, err);
}

static lorasync_transport open_place(void)
{
    lorasync_shm_desc       d;
    lorasync_directory_desc dd;
    lorasync_transport      t;
    lorasync_error          err;
    memset(&d, 0, sizeof d);
    memset(&dd, 0, sizeof dd);
    d.name       = shm_name;
    dd.directory = folder;
    dd.no_fsync  = 1;
    if ((where == SHM ? lorasync_shm_open(&d, &t, &err) : lorasync_directory_open(&dd, &t, &err)) < 0)
        test_fail(__FILE__, __LINE__, err.text);
    return t;
}

static lorasync_status sync_version(trainer *t, uint64_t version, lorasync_report *report, lorasync_error *err)
{
    memset(report, 0, sizeof *report);
    err->status  = LORASYNC_OK;
    err->text[0] = 0;
    train(t, version);
    return lorasync_sync(t->session, version, report, err);
}

/* The receipt of an engine among those that the session knows, or NULL. */
static const lorasync_receipt *receipt_of(trainer *t, const char *engine)
{
    static lorasync_receipt list[16];
    size_t                  i, num = 0;
    CHECK_EQ(lorasync_get_receipts(t->session, list, 16, &num, NULL), 0);
    for (i = 0; i < num && i < 16; i++)
        if (strcmp(list[i].engine, engine) == 0) return &list[i];
    return NULL;
}

/* -- counting */

/* With nobody there a sync succeeds, and says so. */
static void nobody_is_seen(void)
{
    lorasync_transport t;
    lorasync_desc      d = trainer_desc(NULL);
    lorasync_report    report;
    lorasync_error     err;
    trainer            trainer;
    size_t             num = 7;
    fresh_place();
    t = open_place();
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    CHECK_EQ(sync_version(&trainer, 1, &report, &err), 0);
    CHECK_EQ(report.num_engines, 1);
    CHECK_EQ(report.num_received, 0);
    CHECK_EQ(report.num_lagging, 0);
    CHECK_EQ(lorasync_get_receipts(trainer.session, NULL, 0, &num, NULL), 0);
    CHECK_EQ(num, 0);
    lorasync_close(trainer.session);
}

/* An engine that is there and has it not yet, then has it; and one of another adapter, which does not matter here. */
static void one_is_counted(void)
{
    lorasync_engine_desc    mine, others;
    lorasync_engine        *e, *other;
    lorasync_transport      t;
    lorasync_desc           d = trainer_desc(NULL);
    lorasync_report         first, report;
    lorasync_error          err;
    const lorasync_receipt *r;
    trainer                 trainer;
    fresh_place();
    t = open_place();
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    mine   = engine_of("vllm-0", NULL);
    others = engine_of("vllm-1", "critic");
    e      = open_engine(&mine);
    other  = open_engine(&others);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    CHECK_EQ(lorasync_engine_poll(other, 0, NULL), LORASYNC_NOTHING_NEW);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 0);
    CHECK(!receipt_of(&trainer, "vllm-1"));

    CHECK_EQ(sync_version(&trainer, 1, &first, &err), 0);
    CHECK_EQ(first.num_received, 0);
    CHECK_EQ(first.num_lagging, 1);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    r = receipt_of(&trainer, "vllm-0");
    REQUIRE(r);
    CHECK_TEXT(r->adapter, "policy");
    CHECK_EQ(r->version, 1);
    CHECK(r->digest == first.digest && r->digest);
    CHECK_EQ(r->num_tensors, NUM_TENSORS);
    CHECK_EQ(r->num_bound, -1);
    CHECK(r->age_ms < 100000);

    CHECK_EQ(sync_version(&trainer, 2, &report, &err), 0);
    CHECK_EQ(report.num_received, 0);
    CHECK_EQ(report.num_lagging, 1);
    r = receipt_of(&trainer, "vllm-0"); /* what it serves stays known, however many versions come */
    CHECK(r && r->version == 1 && r->digest == first.digest);
    CHECK_EQ(sync_version(&trainer, 3, &report, &err), 0);
    CHECK_EQ(sync_version(&trainer, 4, &report, &err), 0);
    r = receipt_of(&trainer, "vllm-0");
    CHECK(r && r->version == 1 && r->digest == first.digest);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    r = receipt_of(&trainer, "vllm-0");
    CHECK(r && r->version == 4 && r->digest == report.digest);

    lorasync_engine_close(e);
    lorasync_engine_close(other);
    CHECK(!receipt_of(&trainer, "vllm-0"));
    lorasync_close(trainer.session);
}

/* An engine that is told to say nothing. */
static void silence_is_kept(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_transport   t;
    lorasync_desc        d = trainer_desc(NULL);
    lorasync_report      report;
    lorasync_error       err;
    lorasync_receipt     r;
    trainer              trainer;
    fresh_place();
    t = open_place();
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    ed             = engine_of("vllm-0", NULL);
    ed.no_receipts = 1;
    e              = open_engine(&ed);
    CHECK_EQ(sync_version(&trainer, 1, &report, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK(!receipt_of(&trainer, "vllm-0"));
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, NULL), 0);
    CHECK_EQ(r.version, 1);
    lorasync_engine_close(e);
    lorasync_close(trainer.session);
}

/* -- waiting */

static void wait_on_ranks(rank_context *c)
{
    lorasync_transport *t = (lorasync_transport *)c->user;
    lorasync_desc       d = trainer_desc(&c->comm);
    lorasync_receipt    list[MAX_ENGINES];
    lorasync_report     report;
    lorasync_error      err;
    trainer             trainer;
    uint64_t            v;
    size_t              i, num = 99;
    d.require_receipts = c->rank == 0 ? 3 : 0; /* the root's counts */
    err.text[0]        = 0;
    if (open_trainer(&trainer, &d, t, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    for (v = 1; v <= 3; v++) {
        if (sync_version(&trainer, v, &report, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
        CHECK_EQ(report.num_received, 3);
        CHECK_EQ(report.num_lagging, 0);
        CHECK_EQ(report.version, v);
        if (c->rank != 0) continue;
        for (i = 0; i < 3; i++) CHECK(__atomic_load_n(&shared->serves[i], __ATOMIC_SEQ_CST) + 1 >= v);
        CHECK_EQ(lorasync_get_receipts(trainer.session, list, MAX_ENGINES, &num, NULL), 0);
        CHECK_EQ(num, 3);
        for (i = 0; i < num && i < MAX_ENGINES; i++)
            CHECK(list[i].version == v && list[i].digest == report.digest && strncmp(list[i].engine, "e", 1) == 0);
    }
    CHECK_EQ(lorasync_get_receipts(trainer.session, list, MAX_ENGINES, &num, NULL), 0);
    CHECK_EQ(num, c->rank == 0 ? 3 : 0);
    lorasync_close(trainer.session);
}

static void received_by_all(void)
{
    static const int   worlds[] = {1, 2, 4};
    static const char *names[]  = {"e0", "e1", "e2"};
    size_t             w;
    int                i;
    for (w = 0; w < 3; w++) {
        lorasync_transport t;
        reset_stage();
        fresh_place();
        t = open_place();
        for (i = 0; i < 3; i++) {
            lorasync_engine_desc ed = engine_of(names[i], NULL);
            start_engine(i, &ed, "policy");
        }
        run_threads(worlds[w], wait_on_ranks, &t);
        stop_engines();
    }
}

/* Waits again and again: on a busy machine engines may be late. The same on all ranks. */
static lorasync_status until_received(trainer *t, lorasync_status status, lorasync_error *err)
{
    int i;
    for (i = 0; i < 40 && status == LORASYNC_E_RECEIPT; i++) status = lorasync_republish(t->session, err);
    return status;
}

/* Two of three engines are stuck: one at version 1, one that has never got any. */
static void lag_on_ranks(rank_context *c)
{
    lorasync_transport *t = (lorasync_transport *)c->user;
    lorasync_desc       d = trainer_desc(&c->comm);
    lorasync_report     report;
    lorasync_error      err;
    trainer             trainer;
    lorasync_status     status;
    unsigned long long  start;
    d.require_receipts   = c->rank == 0 ? 2 : 0;
    d.receipt_timeout_ms = c->rank == 0 ? test_ms(250) : 0;
    d.publish_timeout_ms = test_ms(200); /* the others wait longer all the same */
    if (open_trainer(&trainer, &d, t, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    status = sync_version(&trainer, 1, &report, &err);
    CHECK_EQ(until_received(&trainer, status, &err) < 0, 0);
    start = test_now_ns();
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), LORASYNC_E_RECEIPT);
    CHECK(test_now_ns() - start >= (unsigned long long)test_ms(250) * 1000000u);
    CHECK_EQ(err.status, LORASYNC_E_RECEIPT);
    CHECK_HAS(err.text, "version 2 is published, and 1 of the 2 engine processes required have received it");
    CHECK_HAS(err.text, "late (v1)");
    CHECK_HAS(err.text, "never (none)");
    CHECK(!strstr(err.text, "good"));
    CHECK_EQ(report.version, 2); /* published: the report is filled in */
    CHECK_EQ(report.num_engines, 1);
    CHECK_EQ(report.num_received, 1);
    CHECK_EQ(report.num_lagging, 2);
    CHECK(!lorasync_is_lost(err.status));
    CHECK_EQ(lorasync_republish(trainer.session, &err), LORASYNC_E_RECEIPT); /* waits once more */
    CHECK_HAS(err.text, "version 2");
    if (c->rank == 0) __atomic_store_n(&shared->stuck_at[1], (uint64_t)0, __ATOMIC_SEQ_CST);
    CHECK_EQ(until_received(&trainer, LORASYNC_E_RECEIPT, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "not newer than 2");
    status = sync_version(&trainer, 3, &report, &err); /* and on it goes */
    CHECK_EQ(until_received(&trainer, status, &err) < 0, 0);
    CHECK_EQ(report.version, 3);
    lorasync_close(trainer.session);
}

static void who_lags_is_named(void)
{
    static const int worlds[] = {1, 4, 2};
    size_t           w;
    for (w = 0; w < 3; w++) {
        if ((where == DIRECTORY) != (worlds[w] == 2)) continue; /* ranks do not see the difference */
        lorasync_engine_desc good, late, never;
        lorasync_engine     *e;
        lorasync_transport   t;
        reset_stage();
        fresh_place();
        t                   = open_place();
        good                = engine_of("good", NULL);
        late                = engine_of("late", NULL);
        never               = engine_of("never", NULL);
        shared->stuck_at[1] = 1;
        start_engine(0, &good, "policy");
        start_engine(1, &late, "policy");
        e = open_engine(&never);
        CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
        run_threads(worlds[w], lag_on_ranks, &t);
        lorasync_engine_close(e);
        stop_engines();
    }
}

/* Killed, not closed: it is not waited for, nor counted, nor named; who takes its place is. */
static void killed_engines(void)
{
    lorasync_engine_desc a, b, c;
    lorasync_transport   t;
    lorasync_desc        d = trainer_desc(NULL);
    lorasync_report      report;
    lorasync_error       err;
    trainer              trainer;
    reset_stage();
    fresh_place();
    t = open_place();
    a = engine_of("first", NULL);
    b = engine_of("second", NULL);
    c = engine_of("third", NULL);
    start_engine(0, &a, "policy");
    start_engine(1, &b, "policy");
    d.require_receipts   = 2;
    d.receipt_timeout_ms = test_ms(200);
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    CHECK_EQ(until_received(&trainer, sync_version(&trainer, 1, &report, &err), &err) < 0, 0);
    kill_engine(1);
    CHECK(!receipt_of(&trainer, "second"));
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), LORASYNC_E_RECEIPT);
    CHECK_HAS(err.text, "no other is known; start those that are missing");
    CHECK_EQ(report.num_received, 1);
    CHECK_EQ(report.num_lagging, 0);
    start_engine(2, &c, "policy");
    CHECK_EQ(until_received(&trainer, LORASYNC_E_RECEIPT, &err), LORASYNC_NOTHING_NEW);
    kill_engine(0);
    kill_engine(2);
    CHECK_EQ(sync_version(&trainer, 3, &report, &err), LORASYNC_E_RECEIPT);
    CHECK_HAS(err.text, "0 of the 2 engine processes required");
    CHECK_EQ(report.num_received + report.num_lagging, 0);
    lorasync_close(trainer.session);
}

/* Waiting costs next to nothing. */
static void waiting_sleeps(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_transport   t;
    lorasync_desc        d = trainer_desc(NULL);
    lorasync_report      report;
    lorasync_error       err;
    trainer              trainer;
    clock_t              start;
    fresh_place();
    t  = open_place();
    ed = engine_of("asleep", NULL);
    e  = open_engine(&ed);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    d.require_receipts   = 1;
    d.receipt_timeout_ms = test_ms(200);
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    start = clock();
    CHECK_EQ(sync_version(&trainer, 1, &report, &err), LORASYNC_E_RECEIPT);
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 0.1 * (double)test_ms(200) / 1000.0);
    lorasync_engine_close(e);
    lorasync_close(trainer.session);
}

/* Nothing is allocated for receipts. */
static void receipts_allocate_nothing(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_transport   t;
    lorasync_allocator   a;
    test_memory          memory;
    lorasync_desc        d = trainer_desc(NULL);
    lorasync_receipt     list[2];
    lorasync_report      report;
    lorasync_error       err;
    trainer              trainer;
    long                 total;
    size_t               num;
    fresh_place();
    t = open_place();
    memset(&memory, 0, sizeof memory);
    a.alloc     = test_memory_alloc;
    a.free      = test_memory_free;
    a.user      = &memory;
    d.allocator = &a;
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    ed = engine_of("vllm-0", NULL);
    e  = open_engine(&ed);
    CHECK_EQ(sync_version(&trainer, 1, &report, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    total = memory.total;
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), 0);
    CHECK_EQ(lorasync_get_receipts(trainer.session, list, 2, &num, NULL), 0);
    CHECK_EQ(num, 1);
    CHECK_EQ(memory.total, total);
    lorasync_engine_close(e);
    lorasync_close(trainer.session);
    CHECK_EQ(memory.live, 0);
}

/* -- transports and sources of one's own */

typedef struct own {
    lorasync_receipt list[3];
    size_t           num;
    lorasync_status  fails; /* instead of "no more" */
    uint64_t         version, digest;
    int              num_looks;
    int              hides_digest;
} own;

static lorasync_status own_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    own *o = (own *)user;
    (void)err;
    o->version = image->version;
    o->digest  = image->digest;
    return LORASYNC_OK;
}

/* Its first engine takes each version at the third look; the others are as they are. */
static lorasync_status own_receipts(void *user, const char *adapter, size_t index, lorasync_receipt *out,
                                    lorasync_error *err)
{
    own *o = (own *)user;
    CHECK_TEXT(adapter, "policy");
    CHECK(out->version == 0 && out->engine[0] == 0);
    if (index == 0 && ++o->num_looks >= 3)
        o->list[0].version = o->version, o->list[0].digest = o->hides_digest ? 0 : o->digest;
    if (index < o->num) {
        *out = o->list[index];
        return LORASYNC_OK;
    }
    if (o->fails) return test_refuse(err, o->fails, "the wire is cut");
    return LORASYNC_NOTHING_NEW;
}

static lorasync_transport own_transport(own *o)
{
    lorasync_transport t;
    memset(o, 0, sizeof *o);
    memset(&t, 0, sizeof t);
    t.size     = sizeof t;
    t.name     = "wire";
    t.user     = o;
    t.stage    = own_stage;
    t.receipts = own_receipts;
    return t;
}

static void own_transports(void)
{
    own                o;
    lorasync_transport t = own_transport(&o);
    lorasync_desc      d = trainer_desc(NULL);
    lorasync_report    report;
    lorasync_error     err;
    lorasync_receipt   list[2];
    trainer            trainer;
    size_t             num;
    d.require_receipts   = 1;
    d.receipt_timeout_ms = test_ms(80);
    o.num                = 2;
    strcpy(o.list[0].engine, "far-0");
    strcpy(o.list[1].engine, "far-1");
    o.list[1].version = 1; /* the same version, but other content */
    o.list[1].digest  = 5;
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    if (sync_version(&trainer, 1, &report, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    CHECK(o.num_looks >= 3);
    CHECK_EQ(report.num_received, 1);
    CHECK_EQ(report.num_lagging, 1);
    CHECK_EQ(lorasync_get_receipts(trainer.session, list, 1, &num, NULL), 0); /* room for one of two */
    CHECK_EQ(num, 2);
    CHECK_TEXT(list[0].engine, "far-0");
    CHECK_TEXT(list[0].adapter, "policy");

    o.num_looks       = -1000000;
    o.list[1].version = 2;
    o.fails           = LORASYNC_E_TIMEOUT; /* not the communicator's */
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), LORASYNC_E_RECEIPT);
    CHECK_HAS(err.text, "far-0 (v1)");
    CHECK_HAS(err.text, "far-1 (other content)");
    CHECK_HAS(err.text, "'wire' could not tell receipts");
    CHECK_HAS(err.text, "the wire is cut");
    CHECK_EQ(lorasync_get_receipts(trainer.session, list, 2, &num, &err), LORASYNC_E_IO);
    CHECK_EQ(num, 2); /* what was told before is there */
    CHECK_HAS(err.text, "the wire is cut");
    lorasync_close(trainer.session);
}

/* Without require_receipts a transport that cannot tell does no harm. */
static void failing_receipts(void)
{
    own                o;
    lorasync_transport t = own_transport(&o);
    lorasync_desc      d = trainer_desc(NULL);
    lorasync_report    report;
    lorasync_error     err;
    trainer            trainer;
    o.fails = LORASYNC_E_IO;
    REQUIRE(open_trainer(&trainer, &d, &t, &err) == LORASYNC_OK);
    CHECK_EQ(sync_version(&trainer, 1, &report, &err), 0);
    CHECK_EQ(err.text[0], 0);
    CHECK_EQ(report.num_received + report.num_lagging, 0);
    lorasync_close(trainer.session);
}

/* What cannot be is refused before anything runs. */
static void refused(void)
{
    own                  o;
    lorasync_transport   t = own_transport(&o);
    lorasync_desc        d = trainer_desc(NULL);
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_error       err;
    trainer              trainer;
    static const char   *bad[] = {"", ".hidden", "a/b", "a b",
                                  "a-name-of-64-bytes-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"};
    size_t               i;
    d.require_receipts = 2;
    t.receipts         = NULL;
    CHECK_EQ(open_trainer(&trainer, &d, &t, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "require_receipts is 2");
    lorasync_close(trainer.session);
    CHECK_EQ(open_trainer(&trainer, &d, NULL, &err), LORASYNC_E_UNSUPPORTED);
    lorasync_close(trainer.session);
    d.require_receipts = -1;
    CHECK_EQ(open_trainer(&trainer, &d, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "require_receipts is -1");
    d.require_receipts   = 0;
    d.receipt_timeout_ms = -1;
    CHECK_EQ(open_trainer(&trainer, &d, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "receipt_timeout_ms is -1");
    memset(&ed, 0, sizeof ed);
    ed.offers_only = 1;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ed.name = bad[i];
        CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_NAME);
        CHECK_HAS(err.text, "cannot name an engine");
    }
}

static lorasync_image *small_image(uint64_t version)
{
    lorasync_image *image = lay_out_rank("policy", 16, 4);
    float          *p     = (float *)malloc(image->payload_bytes);
    size_t          i;
    for (i = 0; i < image->payload_bytes / 4; i++) p[i] = (float)version + (float)i;
    lorasync_image_bind(image, p);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    return image;
}

static lorasync_delivery deliver(const lorasync_image *image)
{
    lorasync_delivery d;
    memset(&d, 0, sizeof d);
    d.size          = sizeof d;
    d.bytes         = image->header;
    d.num_bytes     = image->header_bytes;
    d.payload       = image->payload;
    d.payload_bytes = image->payload_bytes;
    d.config_json   = image->config_json;
    return d;
}

/* A host that offers versions reads the receipt, and sends it back itself. */
static void offers(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_image      *image = small_image(7);
    lorasync_delivery    d     = deliver(image);
    lorasync_receipt     r;
    lorasync_error       err;
    memset(&ed, 0, sizeof ed);
    ed.offers_only = 1;
    e              = open_engine(&ed);
    memset(&r, 1, sizeof r);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "'policy'");
    CHECK(r.version == 0 && r.engine[0] == 0);
    CHECK_EQ(lorasync_engine_offer(e, &d, NULL), 0);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, &err), 0);
    CHECK(strlen(r.engine) > 2 && strchr(r.engine, '-')); /* host and process */
    CHECK_TEXT(r.adapter, "policy");
    CHECK_EQ(r.version, 7);
    CHECK(r.digest == image->digest);
    CHECK_EQ(r.num_tensors, 2);
    CHECK_EQ(r.num_bound, -1);
    lorasync_engine_close(e);
    drop_image(image);
}

/* What was offered is not from the engine's publisher, which learns that its own is not served any more. */
static void offered_beside(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_image      *image = small_image(9);
    lorasync_delivery    d     = deliver(image);
    lorasync_transport   t;
    lorasync_desc        td = trainer_desc(NULL);
    lorasync_report      report;
    lorasync_receipt     r;
    lorasync_error       err;
    trainer              trainer;
    fresh_place();
    t = open_place();
    REQUIRE(open_trainer(&trainer, &td, &t, &err) == LORASYNC_OK);
    ed = engine_of("vllm-0", NULL);
    e  = open_engine(&ed);
    CHECK_EQ(sync_version(&trainer, 1, &report, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 1);
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), 0);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 0);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, NULL), 0);
    CHECK_EQ(r.version, 9);
    CHECK_EQ(sync_version(&trainer, 10, &report, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 10);
    CHECK_EQ(lorasync_engine_drop(e, "policy", NULL), 0);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 0);
    lorasync_engine_close(e);
    lorasync_close(trainer.session);
    drop_image(image);
}

typedef struct own_source {
    lorasync_image  *image;
    lorasync_receipt last;
    int              num_told;
    lorasync_status  fails;
} own_source;

static lorasync_status source_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    own_source *s = (own_source *)user;
    (void)err;
    if (index) return LORASYNC_NOTHING_NEW;
    strcpy(out->adapter, "policy");
    out->version = s->image->version;
    return LORASYNC_OK;
}

static lorasync_status source_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                   lorasync_delivery *out, lorasync_error *err)
{
    (void)what, (void)served, (void)err;
    *out = deliver(((own_source *)user)->image);
    return LORASYNC_OK;
}

static lorasync_status source_told(void *user, const lorasync_receipt *receipt, lorasync_error *err)
{
    own_source *s = (own_source *)user;
    s->last       = *receipt;
    s->num_told++;
    return s->fails ? test_refuse(err, s->fails, "nobody answers") : LORASYNC_OK;
}

/* A source of one's own is told what to send; if it cannot, the version is served all the same. */
static void own_sources(void)
{
    own_source           s;
    lorasync_source      source;
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_receipt     r;
    lorasync_error       err;
    lorasync_image      *first = small_image(3), *second = small_image(4);
    memset(&s, 0, sizeof s);
    memset(&source, 0, sizeof source);
    memset(&ed, 0, sizeof ed);
    source.size        = sizeof source;
    source.name        = "wire";
    source.user        = &s;
    source.look        = source_look;
    source.open        = source_open;
    source.acknowledge = source_told;
    ed.source          = &source;
    ed.name            = "sglang.0";
    s.image            = first;
    e                  = open_engine(&ed);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK_EQ(s.num_told, 1);
    CHECK_TEXT(s.last.engine, "sglang.0");
    CHECK(s.last.version == 3 && s.last.digest == first->digest && s.last.num_tensors == 2);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    CHECK_EQ(s.num_told, 1);
    s.image = second;
    s.fails = LORASYNC_E_TIMEOUT;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(s.num_told, 2);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "wire");
    CHECK_EQ(r.version, 4);
    lorasync_engine_close(e);
    drop_image(first);
    drop_image(second);
}

/* -- base weights */

static void stream_on_ranks(rank_context *c)
{
    static float         weights[16][64];
    own                 *o = (own *)c->user + c->rank;
    lorasync_transport   t = own_transport(o);
    lorasync_stream_desc d;
    lorasync_stream     *s = NULL;
    lorasync_report      report;
    lorasync_receipt     r;
    lorasync_error       err;
    lorasync_piece       p;
    size_t               num = 9;
    memset(&d, 0, sizeof d);
    d.comm               = &c->comm;
    d.name               = "policy";
    d.require_receipts   = 1;
    d.receipt_timeout_ms = test_ms(200);
    d.timeout_ms         = test_ms(150); /* the others wait longer all the same */
    o->num               = 1;
    strcpy(o->list[0].engine, "far-0");
    CHECK_EQ(lorasync_stream_open(&d, &s, &err), 0);
    p = shard_piece("layers.0.q_proj.weight", 2, 16, 16, c->rank, c->world, weights[c->rank]);
    CHECK_EQ(lorasync_stream_add(s, &p, &err), 0);
    if (c->rank == 0) CHECK_EQ(lorasync_stream_attach(s, &t, &err), 0);
    if (lorasync_stream_compile(s, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    o->hides_digest = 1;
    if (lorasync_stream_sync(s, 1, &report, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    CHECK_EQ(report.num_received, 1);
    CHECK_EQ(lorasync_stream_receipts(s, &r, 1, &num, &err), 0);
    CHECK_EQ(num, c->rank == 0);
    if (c->rank == 0) {
        CHECK(o->num_looks >= 3 && r.version == 1);
        o->num_looks = -1000000;
    }
    memset(&report, 0, sizeof report);
    CHECK_EQ(lorasync_stream_sync(s, 2, &report, &err), LORASYNC_E_RECEIPT);
    CHECK_HAS(err.text, "version 2 is published");
    CHECK_HAS(err.text, "far-0 (v1)");
    CHECK(!strstr(err.text, "republish"));
    CHECK(report.version == 2 && report.num_received == 0 && report.num_lagging == 1 && report.num_engines == 1);
    CHECK_EQ(lorasync_stream_sync(s, 2, &report, &err), LORASYNC_E_VERSION); /* it was published */
    if (c->rank == 0) o->num_looks = 3;
    if (lorasync_stream_sync(s, 3, &report, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    lorasync_stream_close(s);
}

static void streams(void)
{
    static const int     worlds[] = {1, 2};
    lorasync_stream_desc d;
    lorasync_stream     *s;
    static float         weights[16];
    lorasync_transport   t;
    lorasync_piece       p;
    lorasync_error       err;
    own                  o[4];
    size_t               w;
    for (w = 0; w < 2; w++) run_threads(worlds[w], stream_on_ranks, &o[0]);
    memset(&d, 0, sizeof d);
    d.require_receipts = -1;
    CHECK_EQ(lorasync_stream_open(&d, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "require_receipts is -1");
    CHECK_EQ(lorasync_stream_receipts(NULL, NULL, 0, &w, &err), LORASYNC_E_ARGUMENT);
    d.require_receipts = 1;
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    t          = own_transport(&o[0]);
    t.receipts = NULL;
    p          = shard_piece("layers.0.q_proj.weight", 2, 4, 4, 0, 1, weights);
    CHECK_EQ(lorasync_stream_add(s, &p, &err), 0);
    CHECK_EQ(lorasync_stream_attach(s, &t, &err), 0);
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "none of the root's 1 transports brings receipts");
    lorasync_stream_close(s);
}

/* -- receipts as files */

/* The names in a folder but for . and .., sorted, with blanks between; "-" if it is not there. */
static const char *names_in(const char *below)
{
    static char text[1000];
    char        line[300];
    FILE       *f;
    size_t      n;
    snprintf(line, sizeof line, "cd '%s/%s' 2>/dev/null && ls -A | sort | tr '\\n' ' ' || printf -", folder, below);
    f       = popen(line, "r");
    n       = f ? fread(text, 1, sizeof text - 1, f) : 0;
    text[n] = 0;
    if (f) pclose(f);
    return text;
}

static void write_text(const char *below, const char *text)
{
    char  path[200];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", folder, below);
    f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

/* A trainer with version 1 published in a new directory. */
static void open_published(trainer *t, lorasync_report *report)
{
    lorasync_transport transport;
    lorasync_desc      d = trainer_desc(NULL);
    lorasync_error     err;
    where = DIRECTORY;
    fresh_place();
    transport = open_place();
    CHECK_EQ(open_trainer(t, &d, &transport, &err), 0);
    CHECK_EQ(sync_version(t, 1, report, &err), 0);
}

/* The exact bytes; and that nothing is left. */
static void files(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_report      report;
    trainer              trainer;
    char                 expected[400], path[300], before[200], *text;
    open_published(&trainer, &report);
    strcpy(before, names_in("policy"));
    ed = engine_of("vllm-0", NULL);
    e  = open_engine(&ed);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK_EQ(strncmp(names_in(".engines"), "vllm-0-", 7), 0);
    snprintf(path, sizeof path, "%s", names_in("policy/.receipts"));
    REQUIRE(strlen(path) == strlen("vllm-0-0123456789abcdef "));
    path[strlen(path) - 1] = 0;
    snprintf(expected, sizeof expected, "%s/policy/.receipts/%s", folder, path);
    text = test_read(expected, NULL);
    snprintf(path, sizeof path,
             "{\"version\":1,\"digest\":\"%016llx\",\"num_tensors\":2,\"num_bound\":null,\"locked\":true}\n",
             (unsigned long long)report.digest);
    CHECK_TEXT(text, path);
    free(text);
    lorasync_engine_close(e);
    CHECK_TEXT(names_in(".engines"), "-");
    CHECK_TEXT(names_in("policy"), before);
    lorasync_close(trainer.session);
}

/* What a killed engine has left is taken away. */
static void files_of_the_dead(void)
{
    lorasync_engine_desc ed;
    lorasync_report      report;
    trainer              trainer;
    open_published(&trainer, &report);
    reset_stage();
    ed = engine_of("vllm-0", NULL);
    start_engine(0, &ed, "policy");
    CHECK(receipt_of(&trainer, "vllm-0"));
    kill_engine(0);
    CHECK_EQ(strncmp(names_in("policy/.receipts"), "vllm-0-", 7), 0);
    CHECK(!receipt_of(&trainer, "vllm-0"));
    CHECK_TEXT(names_in("policy/.receipts"), "");
    CHECK_TEXT(names_in(".engines"), "");
    lorasync_close(trainer.session);
}

/* A directory in which no receipt can be written: the version is served, and the engine says why nobody knows. */
static void no_receipt_possible(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_report      report;
    lorasync_receipt     r;
    lorasync_error       err;
    trainer              trainer;
    open_published(&trainer, &report);
    write_text(".engines", "no folder");
    ed          = engine_of("vllm-0", NULL);
    e           = open_engine(&ed);
    err.text[0] = 0;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(err.text[0], 0);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "version 1 of 'policy' is served, and the publisher does not know");
    CHECK_HAS(err.text, folder);
    CHECK_HAS(err.text, "Not a directory");
    CHECK_EQ(r.version, 1);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    run("rm '%s/.engines' && : > '%s/policy/.receipts'", folder); /* the other one */
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), 0);
    CHECK_EQ(report.num_received + report.num_lagging, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, &err), LORASYNC_E_IO);
    CHECK_EQ(r.version, 2);
    run("rm '%s/policy/.receipts'", folder); /* and with the next version all is well */
    CHECK_EQ(sync_version(&trainer, 3, &report, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, &err), 0);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 3);
    lorasync_engine_close(e);
    lorasync_close(trainer.session);
}

/* Receipts of programs of another kind count for a day; what is none of these is left alone. */
static void strangers(void)
{
    static const char *const bad[] = {"",
                                      "{",
                                      "[]",
                                      "{\"version\":-1}",
                                      "{\"version\":1,\"digest\":\"xyz\"}",
                                      "{\"version\":1} x",
                                      "{\"version\":\"1\"}",
                                      "{\"digest\":5}"};
    lorasync_report          report;
    lorasync_error           err;
    const lorasync_receipt  *r;
    trainer                  trainer;
    char                     text[200];
    size_t                   i;
    open_published(&trainer, &report);
    run("mkdir -p '%s/policy/.receipts' '%s/.engines'", folder);
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        snprintf(text, sizeof text, "policy/.receipts/bad-%d", (int)i);
        write_text(text, bad[i]);
    }
    run("mkdir '%s/policy/.receipts/folder' && ln -s nowhere '%s/policy/.receipts/link'", folder);
    run("head -c 5000 /dev/zero | tr '\\0' ' ' > '%s/policy/.receipts/long'", folder);
    snprintf(text, sizeof text, "{\"version\": 1, \"more\": [{}], \"digest\": \"%016llx\", \"num_bound\": 1}",
             (unsigned long long)report.digest);
    write_text("policy/.receipts/sglang", text);
    write_text("policy/.receipts/.sglang", text); /* not renamed yet */
    write_text("policy/.receipts/stale", text);
    write_text("policy/.receipts/orphan", "{\"version\":1,\"locked\":true}");
    run("touch -d '25 hours ago' '%s/policy/.receipts/stale'", folder);
    write_text(".engines/nolocks-0123456789abcdef", "{\"adapter\":\"policy\",\"locked\":false}");
    write_text(".engines/critic", "{\"adapter\":\"critic\"}");
    write_text(".engines/gone", "{\"adapter\":null,\"locked\":false}");
    run("touch -d '25 hours ago' '%s/.engines/gone'", folder);
    r = receipt_of(&trainer, "sglang");
    CHECK(r && r->version == 1 && r->digest == report.digest && r->num_tensors == 0 && r->num_bound == 1);
    r = receipt_of(&trainer, "nolocks");
    CHECK(r && r->version == 0 && r->num_bound == -1);
    CHECK(r && strcmp(r->adapter, "policy") == 0);
    CHECK(!receipt_of(&trainer, "stale") && !receipt_of(&trainer, "orphan") && !receipt_of(&trainer, "bad-0"));
    CHECK(!receipt_of(&trainer, "critic") && !receipt_of(&trainer, "gone"));
    CHECK_TEXT(names_in(".engines"), "critic nolocks-0123456789abcdef ");
    CHECK(!strstr(names_in("policy/.receipts"), "stale") && !strstr(names_in("policy/.receipts"), "orphan"));
    CHECK(strstr(names_in("policy/.receipts"), "bad-0") && strstr(names_in("policy/.receipts"), "folder"));
    CHECK_EQ(sync_version(&trainer, 2, &report, &err), 0);
    CHECK_EQ(report.num_received, 0);
    CHECK_EQ(report.num_lagging, 2);
    lorasync_close(trainer.session);
}

/* An adapter's name is a text in JSON. */
static void quoted_names(void)
{
    static const char    name[] = "a\"b\\c \xc3\xa9";
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_receipt     r;
    lorasync_transport   t;
    where = DIRECTORY;
    fresh_place();
    t  = open_place();
    ed = engine_of("vllm-0", name);
    e  = open_engine(&ed);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    memset(&r, 0, sizeof r);
    CHECK_EQ(t.receipts(t.user, name, 0, &r, NULL), 0);
    CHECK_TEXT(r.engine, "vllm-0");
    CHECK_EQ(t.receipts(t.user, name, 1, &r, NULL), LORASYNC_NOTHING_NEW);
    CHECK_EQ(t.receipts(t.user, "a", 0, &r, NULL), LORASYNC_NOTHING_NEW);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* A fork that closes its parent's engine takes nothing of it away. */
static void forks(void)
{
    lorasync_engine_desc ed;
    lorasync_engine     *e;
    lorasync_report      report;
    trainer              trainer;
    pid_t                child;
    open_published(&trainer, &report);
    ed = engine_of("vllm-0", "policy");
    e  = open_engine(&ed);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        lorasync_engine_close(e);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    CHECK(receipt_of(&trainer, "vllm-0") && receipt_of(&trainer, "vllm-0")->version == 1);
    lorasync_engine_close(e);
    lorasync_close(trainer.session);
}

/* Engines that come and go remove and make the same folders. */
static void come_and_go(void)
{
    lorasync_report report;
    trainer         trainer;
    pid_t           children[3];
    char            before[200];
    int             i, k, status;
    open_published(&trainer, &report);
    strcpy(before, names_in("policy"));
    fflush(NULL);
    for (i = 0; i < 3; i++) {
        children[i] = fork();
        if (children[i]) continue;
        test_errors = 0;
        for (k = 0; k < 40; k++) {
            lorasync_engine_desc ed = engine_of("e", i == 0 ? "policy" : NULL);
            lorasync_engine     *e  = open_engine(&ed);
            lorasync_receipt     r;
            lorasync_error       err;
            err.text[0] = 0;
            CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_OK);
            if (lorasync_engine_receipt(e, "policy", &r, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
            lorasync_engine_close(e);
        }
        _exit(test_errors != 0);
    }
    for (k = 0; k < 200; k++) receipt_of(&trainer, "e");
    for (i = 0; i < 3; i++) CHECK(waitpid(children[i], &status, 0) == children[i] && status == 0);
    CHECK_TEXT(names_in(".engines"), "-");
    CHECK_TEXT(names_in("policy"), before);
    lorasync_close(trainer.session);
}

/* A test at one place, in both. */
#define RUN_AT(at, function) (where = (at), test_run(#function " (" #at ")", function))
#define RUN_BOTH(function) (RUN_AT(SHM, function), RUN_AT(DIRECTORY, function))

int main(void)
{
    RUN_BOTH(nobody_is_seen);
    RUN_BOTH(one_is_counted);
    RUN_BOTH(silence_is_kept);
    RUN_BOTH(received_by_all);
    RUN_BOTH(who_lags_is_named);
    RUN_BOTH(killed_engines);
    RUN_BOTH(waiting_sleeps);
    RUN_BOTH(receipts_allocate_nothing);
    RUN(own_transports);
    RUN(failing_receipts);
    RUN(refused);
    RUN(offers);
    RUN_BOTH(offered_beside);
    RUN(own_sources);
    RUN(streams);
    RUN(files);
    RUN(files_of_the_dead);
    RUN(no_receipt_possible);
    RUN(strangers);
    RUN(quoted_names);
    RUN(forks);
    RUN(come_and_go);
    drop_place();
    return test_summary("test_receipts");
}
