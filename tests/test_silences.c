/* Mistakes that once went without a word: each is an error that says what to do, on every rank, or a fact that is said
   once. */
#define _DEFAULT_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/stat.h>

#include "test.h"
#include "lorasync.h"
#include "ranks.h"
#include "pieces.h"

#define PARAM_A "model.layers.0.q_proj.lora_A.default.weight"
#define PARAM_B "model.layers.0.q_proj.lora_B.default.weight"
enum {
    WIDTH  = 8,
    RANK_R = 4
};
#define NAN_VALUE strtod("nan", NULL)

static const int worlds[] = {1, 2, 4};

/* A session of one LoRA pair, cut over the ranks, whose values are those of its version. */
typedef struct trainer {
    lorasync_session *s;
    float             a[RANK_R * WIDTH], b[WIDTH * RANK_R];
} trainer;

static lorasync_desc default_desc(const rank_context *c)
{
    lorasync_desc d;
    memset(&d, 0, sizeof d);
    d.comm       = c ? &c->comm : NULL;
    d.lora_alpha = 8;
    d.timeout_ms = 20000;
    return d;
}

static void fill(trainer *t, float value)
{
    size_t i;
    for (i = 0; i < RANK_R * WIDTH; i++) t->a[i] = value, t->b[i] = -value;
}

/* Opens it and adds the pair; the transports and compile are the test's. */
static void open_trainer(trainer *t, const rank_context *c, const lorasync_desc *desc)
{
    lorasync_error err;
    lorasync_piece p;
    const int      rank = c ? c->rank : 0, world = c ? c->world : 1;
    err.text[0] = 0;
    t->s        = NULL;
    fill(t, 1);
    if (lorasync_open(desc, &t->s, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    p = shard_piece(PARAM_A, 2, RANK_R, WIDTH, rank, world, t->a);
    if (lorasync_add(t->s, &p, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    p = shard_piece(PARAM_B, 2, WIDTH, RANK_R, rank, world, t->b);
    if (lorasync_add(t->s, &p, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
}

/* -- callbacks that return what is no status of theirs */

typedef struct scripted {
    int stage, commit, attach, lend; /* what they return */
    int aborts, commits;
} scripted;

static lorasync_status scripted_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    (void)image, (void)err;
    return (lorasync_status)((scripted *)user)->stage;
}

static lorasync_status scripted_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    (void)adapter, (void)version, (void)err;
    ((scripted *)user)->commits++;
    return (lorasync_status)((scripted *)user)->commit;
}

static void scripted_abort(void *user, const char *adapter, uint64_t version)
{
    (void)adapter, (void)version;
    ((scripted *)user)->aborts++;
}

static lorasync_status scripted_attach(void *user, const void *session, const char *adapter, lorasync_error *err)
{
    (void)session, (void)adapter, (void)err;
    return (lorasync_status)((scripted *)user)->attach;
}

static lorasync_status scripted_lend(void *user, const lorasync_loan_request *want, lorasync_loan *out,
                                     lorasync_error *err)
{
    (void)want, (void)out, (void)err;
    return (lorasync_status)((scripted *)user)->lend;
}

static lorasync_transport scripted_transport(scripted *script)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size   = sizeof t;
    t.name   = "mine";
    t.user   = script;
    t.stage  = scripted_stage;
    t.commit = scripted_commit;
    t.abort  = scripted_abort;
    t.attach = scripted_attach;
    t.lend   = scripted_lend;
    return t;
}

/* A positive status of stage or commit is a failure, on every rank, that says what it was. */
static void positive_stage(rank_context *c)
{
    static const int   values[] = {1, 7, 0x7fffffff};
    trainer            t;
    lorasync_desc      d = default_desc(c);
    lorasync_error     err;
    lorasync_report    report;
    lorasync_status    status;
    scripted          *script    = (scripted *)c->user;
    lorasync_transport transport = scripted_transport(script);
    size_t             i;
    char               expected[40];
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_attach(t.s, &transport, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    for (i = 0; i < 3; i++) {
        if (c->rank == 0) script->stage = values[i], script->aborts = script->commits = 0;
        status = lorasync_sync(t.s, 1, &report, &err);
        CHECK_EQ(status, LORASYNC_E_ARGUMENT);
        snprintf(expected, sizeof expected, "'mine' returned %d when it was to stage", values[i]);
        CHECK_HAS(err.text, expected);
        if (c->rank == 0) CHECK_EQ(script->commits * 10 + script->aborts, 1);
    }
    if (c->rank == 0) script->stage = 0, script->commit = 3;
    CHECK_EQ(lorasync_sync(t.s, 1, &report, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "returned 3 when it was to commit");
    if (c->rank == 0) script->commit = 0;
    CHECK_EQ(lorasync_sync(t.s, 1, &report, &err), 0);
    CHECK_EQ(report.num_engines, 1);
    lorasync_close(t.s);
}

static void positive_status_of_a_transport(void)
{
    size_t i;
    for (i = 0; i < 3; i++) {
        scripted script;
        memset(&script, 0, sizeof script);
        run_threads(worlds[i], positive_stage, &script);
    }
}

static void positive_status_of_attach_and_lend(void)
{
    trainer            t;
    lorasync_desc      d = default_desc(NULL);
    lorasync_error     err;
    scripted           script;
    lorasync_transport transport = scripted_transport(&script);
    memset(&script, 0, sizeof script);
    script.attach = 2;
    open_trainer(&t, NULL, &d);
    CHECK_EQ(lorasync_attach(t.s, &transport, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "returned 2 when it was to be attached");
    CHECK_EQ(lorasync_compile(t.s, &err), LORASYNC_E_ARGUMENT);
    lorasync_close(t.s);
    script.attach = 0, script.lend = 5; /* only shown, as a failure of lend is */
    open_trainer(&t, NULL, &d);
    CHECK_EQ(lorasync_attach(t.s, &transport, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    CHECK_HAS(lorasync_get_outcomes(t.s, NULL)->error.text, "returned 5 when it was to lend memory");
    script.lend = LORASYNC_NOTHING_NEW;
    CHECK_EQ(lorasync_sync(t.s, 1, NULL, &err), 0);
    CHECK_EQ(lorasync_get_outcomes(t.s, NULL)->error.status, 0);
    lorasync_close(t.s);
}

/* Sources of an engine. */
typedef struct scripted_source {
    int look, open;
} scripted_source;

static lorasync_status source_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    (void)err;
    if (((scripted_source *)user)->look) return (lorasync_status)((scripted_source *)user)->look;
    if (index) return LORASYNC_NOTHING_NEW;
    strcpy(out->adapter, "default");
    return LORASYNC_OK;
}

static lorasync_status source_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                   lorasync_delivery *out, lorasync_error *err)
{
    (void)what, (void)served, (void)out, (void)err;
    return (lorasync_status)((scripted_source *)user)->open;
}

static void positive_status_of_a_source(void)
{
    scripted_source      script = {9, 0};
    lorasync_source      source;
    lorasync_engine_desc d;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    memset(&source, 0, sizeof source);
    memset(&d, 0, sizeof d);
    source.size = sizeof source;
    source.name = "web";
    source.user = &script;
    source.look = source_look;
    source.open = source_open;
    d.source    = &source;
    REQUIRE(lorasync_engine_open(&d, &e, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "'web' returned 9 when it was to look");
    script.look = 0, script.open = 12;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "'web' returned 12 when it was to open a version");
    script.open = LORASYNC_NOTHING_NEW;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    lorasync_engine_close(e);
}

/* A comm that returns an error code of MPI, which is above 0, or -1. */
typedef struct broken_comm {
    const lorasync_comm *inner;
    int                  gather, exchange, calls; /* what they return from the third call on */
} broken_comm;

static lorasync_status broken_all_gather(void *user, const void *in, void *out, size_t num_bytes, int timeout_ms,
                                         lorasync_error *err)
{
    broken_comm *b = (broken_comm *)user;
    if (b->gather && ++b->calls > 2) return (lorasync_status)b->gather;
    return b->inner->all_gather(b->inner->user, in, out, num_bytes, timeout_ms, err);
}

static lorasync_status broken_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                       const lorasync_message *receives, size_t num_receives, int timeout_ms,
                                       lorasync_error *err)
{
    broken_comm *b = (broken_comm *)user;
    if (b->exchange && ++b->calls > 2) return (lorasync_status)b->exchange;
    return b->inner->exchange(b->inner->user, sends, num_sends, receives, num_receives, timeout_ms, err);
}

static void broken_rank(rank_context *c)
{
    const int      *values = (const int *)c->user;
    broken_comm     broken = {&c->comm, values[0], values[1], 0};
    lorasync_comm   comm;
    trainer         t;
    lorasync_desc   d;
    lorasync_error  err;
    lorasync_status status;
    char            expected[60];
    memset(&comm, 0, sizeof comm);
    comm.size = sizeof comm, comm.user = &broken, comm.rank = c->rank, comm.world = c->world;
    comm.all_gather = broken_all_gather, comm.exchange = broken_exchange;
    d      = default_desc(c);
    d.comm = &comm;
    open_trainer(&t, c, &d);
    status = lorasync_compile(t.s, &err);
    CHECK_EQ(status, LORASYNC_E_COMM);
    snprintf(expected, sizeof expected, "%s of the comm returned %d", values[0] ? "all_gather" : "exchange",
             values[0] ? values[0] : values[1]);
    CHECK_HAS(err.text, expected);
    CHECK_EQ(lorasync_compile(t.s, &err), LORASYNC_E_LOST);
    lorasync_close(t.s);
}

static void positive_status_of_a_comm(void)
{
    static int values[][2] = {{15, 0}, {0, 15}, {-1, 0}, {0, -1}};
    size_t     i;
    for (i = 0; i < 4; i++) run_threads(2, broken_rank, values[i]);
}

/* -- engines where nobody publishes to them */

/* Only the ranks of a mask attach; nobody can publish where the root is not among them. */
typedef struct attaching {
    unsigned mask;
    int      root, base;
} attaching;

static void attach_some(rank_context *c)
{
    const attaching   *how = (const attaching *)c->user;
    scripted           script;
    lorasync_transport transport = scripted_transport(&script);
    trainer            t;
    lorasync_desc      d = default_desc(c);
    lorasync_error     err;
    lorasync_status    status;
    const int          here = (int)(how->mask >> c->rank & 1u), legal = !how->mask || (how->mask >> how->root & 1u);
    int                first = 0;
    char               expected[100];
    memset(&script, 0, sizeof script);
    memset(&err, 0, sizeof err);
    while (how->mask && !(how->mask >> first & 1u)) first++;
    d.root = how->root;
    open_trainer(&t, c, &d);
    if (here) CHECK_EQ(lorasync_attach(t.s, &transport, &err), 0);
    status = lorasync_compile(t.s, &err);
    CHECK_EQ(status, legal ? LORASYNC_OK : LORASYNC_E_ARGUMENT);
    snprintf(expected, sizeof expected, "rank %d: engines are attached here ('mine'), but none on the root, rank %d",
             first, how->root);
    if (!legal) CHECK_HAS(err.text, expected);
    lorasync_close(t.s);
}

static void engines_off_the_root(void)
{
    size_t i;
    for (i = 0; i < 3; i++) {
        attaching how;
        memset(&how, 0, sizeof how);
        for (how.mask = 0; how.mask < 1u << worlds[i]; how.mask++)
            for (how.root = 0; how.root<worlds[i]; how.root += worlds[i]> 1 ? worlds[i] - 1 : 1)
                run_threads(worlds[i], attach_some, &how);
    }
}

/* The same for base weights. */
static void attach_to_stream(rank_context *c)
{
    const attaching     *how = (const attaching *)c->user;
    scripted             script;
    lorasync_transport   transport = scripted_transport(&script);
    lorasync_stream_desc d;
    lorasync_stream     *s = NULL;
    lorasync_piece       p;
    lorasync_error       err;
    float                w[WIDTH] = {0};
    const int            legal    = !how->mask || (how->mask & 1u);
    memset(&script, 0, sizeof script);
    memset(&d, 0, sizeof d);
    d.comm       = &c->comm;
    d.timeout_ms = 20000;
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    p = shard_piece("model.norm.weight", 1, WIDTH, 0, c->rank, c->world, w);
    CHECK_EQ(lorasync_stream_add(s, &p, &err), 0);
    if (how->mask >> c->rank & 1u) CHECK_EQ(lorasync_stream_attach(s, &transport, &err), 0);
    CHECK_EQ(lorasync_stream_compile(s, &err), legal ? LORASYNC_OK : LORASYNC_E_ARGUMENT);
    if (!legal) CHECK_HAS(err.text, "but none on the root, rank 0");
    lorasync_stream_close(s);
}

static void engines_off_the_root_of_a_stream(void)
{
    attaching how;
    memset(&how, 0, sizeof how);
    for (how.mask = 0; how.mask < 4; how.mask++) run_threads(2, attach_to_stream, &how);
}

/* -- ranks that disagree are told on what */

/* One field of one desc differs on the last rank. */
typedef struct differing {
    int         field;
    const char *expected;
} differing;

static void differing_session(rank_context *c)
{
    const differing *how = (const differing *)c->user;
    const int        odd = c->rank == c->world - 1;
    trainer          t;
    lorasync_desc    d = default_desc(c);
    lorasync_error   err;
    if (how->field == 0) d.wire_dtype = odd ? LORASYNC_BF16 : LORASYNC_DTYPE_NONE;
    if (how->field == 1) d.root = odd ? 1 : 0;
    if (how->field == 2) d.base_model = odd ? "llama" : NULL;
    if (how->field == 3) d.bucket_bytes = odd ? 4096 : 0;
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_compile(t.s, &err), LORASYNC_E_DISAGREE);
    CHECK_HAS(err.text, how->expected);
    lorasync_close(t.s);
}

static void differing_plan(rank_context *c)
{
    const differing   *how = (const differing *)c->user;
    const int          odd = c->rank == c->world - 1;
    lorasync_plan_desc d;
    lorasync_plan     *plan = NULL;
    lorasync_piece     p;
    lorasync_error     err;
    float              w[WIDTH] = {0};
    memset(&d, 0, sizeof d);
    d.comm       = &c->comm;
    d.timeout_ms = 20000;
    p            = shard_piece("w", 1, WIDTH, 0, c->rank, c->world, w);
    d.have = &p, d.num_have = 1;
    if (how->field == 0) d.kind = odd ? LORASYNC_GATHER_ALL : LORASYNC_GATHER;
    if (how->field == 1) d.root = odd ? 1 : 0;
    if (how->field == 2) d.wire_dtype = odd ? LORASYNC_F16 : LORASYNC_BF16;
    if (how->field == 3) d.adapter = odd ? "b" : "a";
    CHECK_EQ(lorasync_plan_create(&d, &plan, &err), LORASYNC_E_DISAGREE);
    CHECK_HAS(err.text, how->expected);
    lorasync_plan_free(plan);
}

static void differing_stream(rank_context *c)
{
    const differing     *how = (const differing *)c->user;
    const int            odd = c->rank == c->world - 1;
    lorasync_stream_desc d;
    lorasync_stream     *s = NULL;
    lorasync_piece       p;
    lorasync_error       err;
    float                w[WIDTH] = {0};
    memset(&d, 0, sizeof d);
    d.comm       = &c->comm;
    d.timeout_ms = 20000;
    if (how->field == 0) d.name = odd ? "other" : NULL;
    if (how->field == 1) d.bucket_bytes = odd ? 1024 : 2048;
    if (how->field == 2) d.keep_names = odd;
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    p = shard_piece("model.norm.weight", 1, WIDTH, 0, c->rank, c->world, w);
    CHECK_EQ(lorasync_stream_add(s, &p, &err), 0);
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_E_DISAGREE);
    CHECK_HAS(err.text, how->expected);
    lorasync_stream_close(s);
}

static void differing_load(rank_context *c)
{
    const int      odd = c->rank == c->world - 1;
    trainer        t;
    lorasync_desc  d = default_desc(c);
    lorasync_error err;
    const char    *directory = *(const char *const *)c->user;
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    if (c->rank == 0) { /* a file that can be opened, so that only the paths differ */
        char  path[300];
        FILE *f;
        snprintf(path, sizeof path, "%s/x.safetensors", directory);
        f = fopen(path, "wb");
        REQUIRE(f);
        fwrite("\x02\0\0\0\0\0\0\0{}", 1, 10, f);
        fclose(f);
    }
    {
        char here[300], there[300];
        snprintf(here, sizeof here, "%s/x.safetensors", directory);
        snprintf(there, sizeof there, "%s/y.safetensors", directory);
        CHECK_EQ(lorasync_load(t.s, odd ? there : here, NULL, &err), LORASYNC_E_DISAGREE);
        CHECK_HAS(err.text, "path is \"");
        CHECK_HAS(err.text, "y.safetensors\" here, and on rank 0 ");
        CHECK_HAS(err.text, "x.safetensors\"; every rank must pass the same");
    }
    lorasync_close(t.s);
}

static void disagreements_name_the_field(void)
{
    static differing sessions[]  = {{0, "desc.wire_dtype is BF16 here, and on rank 0 NONE"},
                                    {1, "desc.root is 1 here, and on rank 0 0"},
                                    {2, "desc.base_model is \"llama\" here, and on rank 0 not given"},
                                    {3, "desc.bucket_bytes is 4096 here, and on rank 0 0"}};
    static differing plans[]     = {{0, "desc.kind is \"LORASYNC_GATHER_ALL\" here, and on rank 0 \"LORASYNC_GATHER\""},
                                    {1, "desc.root is 1 here, and on rank 0 0"},
                                    {2, "desc.wire_dtype is F16 here, and on rank 0 BF16"},
                                    {3, "desc.adapter is \"b\" here, and on rank 0 \"a\""}};
    static differing streams[]   = {{0, "desc.name is \"other\" here, and on rank 0 \"base\""},
                                    {1, "desc.bucket_bytes is 1024 here, and on rank 0 2048"},
                                    {2, "desc.keep_names is 1 here, and on rank 0 0"}};
    char             directory[] = "/tmp/lorasync-silences-XXXXXX", path[80];
    char            *at          = directory;
    size_t           i;
    REQUIRE(mkdtemp(directory));
    for (i = 0; i < 4; i++) run_threads(2, differing_session, &sessions[i]);
    for (i = 0; i < 4; i++) run_threads(4, differing_plan, &plans[i]);
    for (i = 0; i < 3; i++) run_threads(2, differing_stream, &streams[i]);
    run_threads(2, differing_load, &at);
    snprintf(path, sizeof path, "%s/x.safetensors", directory);
    unlink(path);
    rmdir(directory);
}

/* Versions, as they were passed, also where the image is made in memory that a transport lends. */
static void differing_versions(rank_context *c)
{
    trainer            t;
    lorasync_desc      d = default_desc(c);
    lorasync_error     err;
    lorasync_shm_desc  shm;
    lorasync_transport transport;
    lorasync_report    report;
    uint64_t           v;
    open_trainer(&t, c, &d);
    memset(&shm, 0, sizeof shm);
    shm.name = (const char *)c->user;
    if (c->rank == 0) {
        REQUIRE(lorasync_shm_open(&shm, &transport, &err) == LORASYNC_OK);
        CHECK_EQ(lorasync_attach(t.s, &transport, &err), 0);
    }
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    for (v = 1; v < 6; v += 2) {
        CHECK_EQ(lorasync_sync(t.s, v, &report, &err), 0);
        CHECK_EQ(report.in_place, 1);
        CHECK_EQ(lorasync_sync(t.s, c->rank ? 70 : 20, &report, &err), LORASYNC_E_DISAGREE);
        CHECK_HAS(err.text, "version: 20 on rank 0, 70 on rank 1; every rank must pass the same");
        CHECK_EQ(lorasync_sync(t.s, c->rank ? v : 20, &report, &err), LORASYNC_E_VERSION);
        CHECK_HAS(err.text, "rank 1: version ");
        CHECK_EQ(lorasync_sync(t.s, v + 1, &report, &err), 0);
    }
    lorasync_close(t.s);
}

static void disagreement_on_versions(void)
{
    char name[60];
    snprintf(name, sizeof name, "test-silences-%ld", (long)getpid());
    run_threads(2, differing_versions, name);
    lorasync_shm_remove(name, NULL);
    run_threads(4, differing_versions, name);
    lorasync_shm_remove(name, NULL);
}

/* -- directories: where they lie, and what stands in their place */

static char *make_place(char path[64])
{
    strcpy(path, "/tmp/lorasync-silences-XXXXXX");
    return mkdtemp(path);
}

static void remove_place(const char *path)
{
    char command[200];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    if (system(command) != 0) test_fail(__FILE__, __LINE__, command);
}

static void put_file(const char *path)
{
    FILE *f = fopen(path, "w");
    if (!f || fclose(f) != 0) test_fail(__FILE__, __LINE__, path);
}

/* What attach says of a directory, compile says on all ranks, before anything is gathered. */
typedef struct misplaced {
    const char *directory, *expected;
} misplaced;

static void attach_misplaced(rank_context *c)
{
    const misplaced *how = (const misplaced *)c->user;
    trainer          t;
    lorasync_desc    d = default_desc(c);
    lorasync_error   err;
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_attach_directory(t.s, how->directory, &err), c->rank ? LORASYNC_OK : LORASYNC_E_IO);
    if (!c->rank) CHECK_HAS(err.text, how->expected);
    CHECK_EQ(lorasync_compile(t.s, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, how->expected);
    lorasync_close(t.s);
}

static void directories_in_the_wrong_place(void)
{
    char        at[64], paths[5][120], inner[140], expected[5][300];
    misplaced   how[5];
    size_t      i, k, num = geteuid() == 0 ? 4 : 5;
    struct stat st;
    REQUIRE(make_place(at));
    snprintf(paths[0], sizeof paths[0], "%s/absent/adapters/", at);
    snprintf(expected[0], sizeof expected[0], "cannot make %s: %s/absent is not there; make it", paths[0], at);
    snprintf(paths[1], sizeof paths[1], "%s/file", at);
    put_file(paths[1]);
    snprintf(expected[1], sizeof expected[1], "%s is a file, and a directory is needed", paths[1]);
    snprintf(paths[2], sizeof paths[2], "%s/file/adapters", at);
    snprintf(expected[2], sizeof expected[2], "%s is a file, and a directory is needed", paths[1]);
    snprintf(paths[3], sizeof paths[3], "%s/ok", at);
    snprintf(expected[3], sizeof expected[3], "%s/default is a file, and a directory is needed", paths[3]);
    CHECK_EQ(mkdir(paths[3], 0755), 0);
    snprintf(inner, sizeof inner, "%s/default", paths[3]);
    put_file(inner);
    snprintf(paths[4], sizeof paths[4], "%s/locked", at);
    snprintf(expected[4], sizeof expected[4], "cannot write in %s: Permission denied", paths[4]);
    CHECK_EQ(mkdir(paths[4], 0555), 0);
    for (i = 0; i < num; i++) {
        how[i].directory = paths[i], how[i].expected = expected[i];
        for (k = 0; k < 3; k++) run_threads(worlds[k], attach_misplaced, &how[i]);
    }
    snprintf(paths[0], sizeof paths[0], "%s/absent", at);
    CHECK(stat(paths[0], &st) != 0); /* nothing was made */
    remove_place(at);
}

/* A trainer and an engine of relative directories, and a chdir after they are opened. */
static void chdir_does_not_matter(void)
{
    char                 at[64], away[80], *before;
    trainer              t;
    lorasync_desc        d = default_desc(NULL);
    lorasync_engine_desc ed;
    lorasync_engine     *e[2] = {NULL, NULL};
    lorasync_error       err;
    int                  i;
    before = getcwd(NULL, 0);
    REQUIRE(before && make_place(at));
    snprintf(away, sizeof away, "%s/away", at);
    CHECK_EQ(mkdir(away, 0755), 0);
    CHECK_EQ(chdir(at), 0);
    open_trainer(&t, NULL, &d);
    CHECK_EQ(lorasync_attach_directory(t.s, "adapters", &err), 0);
    memset(&ed, 0, sizeof ed);
    for (i = 0; i < 2; i++) {
        ed.directory = i ? "./adapters" : "adapters";
        CHECK_EQ(lorasync_engine_open(&ed, &e[i], &err), 0);
    }
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    CHECK_EQ(chdir(away), 0);
    CHECK_EQ(lorasync_sync(t.s, 1, NULL, &err), 0);
    for (i = 0; i < 2; i++) CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
    CHECK_EQ(chdir("/"), 0);
    CHECK_EQ(lorasync_sync(t.s, 2, NULL, &err), 0);
    for (i = 0; i < 2; i++) {
        const lorasync_adapter *a;
        CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
        a = lorasync_acquire(e[i], "default");
        CHECK(a && a->version == 2);
        lorasync_release(a);
        lorasync_engine_close(e[i]);
    }
    lorasync_close(t.s);
    /* a working directory that is gone */
    CHECK_EQ(chdir(away), 0);
    CHECK_EQ(rmdir(away), 0);
    open_trainer(&t, NULL, &d);
    CHECK_EQ(lorasync_attach_directory(t.s, "adapters", &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "directory adapters is relative, and the working directory cannot be told: ");
    lorasync_close(t.s);
    ed.directory = "adapters";
    CHECK_EQ(lorasync_engine_open(&ed, &e[0], &err), LORASYNC_E_IO);
    CHECK(e[0] == NULL);
    CHECK_EQ(chdir(before), 0);
    free(before);
    remove_place(at);
}

/* -- shared memory by the same line on all ranks */

static void attach_shm_rank(rank_context *c)
{
    const char     *name = (const char *)c->user;
    trainer         t;
    lorasync_desc   d = default_desc(c);
    lorasync_report report;
    lorasync_error  err;
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_attach_shm(t.s, name, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    CHECK_EQ(lorasync_sync(t.s, 1, &report, &err), 0);
    CHECK_EQ(report.num_engines, 1);
    CHECK_EQ(report.in_place, 1);
    CHECK_EQ(lorasync_attach_shm(t.s, name, &err), c->rank ? LORASYNC_E_STATE : LORASYNC_E_BUSY);
    lorasync_close(t.s);
}

/* One that the root cannot open fails on all ranks, at once. */
static void attach_shm_fails(rank_context *c)
{
    const char    *name = (const char *)c->user;
    trainer        t;
    lorasync_desc  d = default_desc(c);
    lorasync_error err;
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_attach_shm(t.s, name, &err), c->rank ? LORASYNC_OK : LORASYNC_E_BUSY);
    CHECK_EQ(lorasync_compile(t.s, &err), LORASYNC_E_BUSY);
    lorasync_close(t.s);
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_attach_shm(t.s, "no/name", &err), LORASYNC_E_NAME);
    CHECK_EQ(lorasync_compile(t.s, &err), LORASYNC_E_NAME);
    lorasync_close(t.s);
    open_trainer(&t, c, &d);
    if (c->rank) CHECK_EQ(lorasync_attach_shm(t.s, name, &err), 0); /* forgotten on the root */
    CHECK_EQ(lorasync_compile(t.s, &err), c->world > 1 ? LORASYNC_E_ARGUMENT : LORASYNC_OK);
    lorasync_close(t.s);
}

static void shared_memory_on_all_ranks(void)
{
    char                 name[60];
    lorasync_shm_desc    sd;
    lorasync_transport   t;
    lorasync_engine_desc ed;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    size_t               i;
    snprintf(name, sizeof name, "test-silences-%ld", (long)getpid());
    memset(&sd, 0, sizeof sd);
    memset(&ed, 0, sizeof ed);
    sd.name = ed.shm = name;
    for (i = 0; i < 3; i++) {
        run_threads(worlds[i], attach_shm_rank, name);
        CHECK_EQ(lorasync_engine_open(&ed, &e, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        lorasync_engine_close(e);
        CHECK_EQ(lorasync_shm_open(&sd, &t, &err), 0); /* somebody else publishes */
        run_threads(worlds[i], attach_shm_fails, name);
        t.close(t.user);
        CHECK_EQ(lorasync_shm_remove(name, &err), 0);
    }
}

/* What a failed open leaves can be told from what can be closed. */
static void failed_opens_leave_zeros(void)
{
    static const unsigned char zeros[sizeof(lorasync_transport) + sizeof(lorasync_comm)] = {0};
    lorasync_transport         t;
    lorasync_shm_desc          sd;
    lorasync_directory_desc    dd;
    lorasync_comm              comm;
    lorasync_local            *local = NULL;
    lorasync_error             err;
    memset(&sd, 0, sizeof sd);
    memset(&dd, 0, sizeof dd);
    memset(&t, 0xee, sizeof t);
    sd.name = "no/name";
    CHECK_EQ(lorasync_shm_open(&sd, &t, &err), LORASYNC_E_NAME);
    CHECK(memcmp(&t, zeros, sizeof t) == 0);
    memset(&t, 0xee, sizeof t);
    CHECK_EQ(lorasync_directory_open(&dd, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK(memcmp(&t, zeros, sizeof t) == 0);
    memset(&comm, 0xee, sizeof comm);
    CHECK_EQ(lorasync_local_open(2, &local, &err), 0);
    CHECK_EQ(lorasync_local_join(local, 2, &comm, &err), LORASYNC_E_ARGUMENT);
    CHECK(memcmp(&comm, zeros, sizeof comm) == 0);
    lorasync_local_close(local);
    memset(&comm, 0xee, sizeof comm);
    CHECK(lorasync_nccl_open(NULL, &comm, &err) < 0);
    CHECK(memcmp(&comm, zeros, sizeof comm) == 0);
}

/* -- alignment of what is written */

/* Every tensor lies behind the one before it, at a multiple of its elements' size; the header ends in spaces. */
static void check_aligned(const lorasync_image *image, size_t num_tensors)
{
    const char *header = (const char *)image->header;
    size_t      i, at = 0;
    CHECK_EQ(image->num_tensors, num_tensors);
    CHECK_EQ(image->header_bytes % 64, 0);
    for (i = image->header_bytes; header[i - 1] == ' '; i--) continue;
    CHECK(header[i - 1] == '}' && image->header_bytes - i < 64);
    for (i = 0; i < image->num_tensors; i++) {
        const lorasync_tensor *t = &image->tensors[i];
        CHECK_EQ(t->offset, at);
        at += t->num_bytes;
        if (!image->payload) continue;
        CHECK(t->data == (const char *)image->payload + t->offset);
        CHECK_EQ((uintptr_t)t->data % ((unsigned)lorasync_dtype_bits(t->dtype) / 8), 0);
    }
    CHECK_EQ(at, image->payload_bytes);
}

/* What engines find in a directory and in shared memory, for adapters' names of many lengths. */
static void aligned_for_engines(rank_context *c)
{
    const char    *at = (const char *)c->user;
    char           name[60], shm[80];
    size_t         n;
    lorasync_error err;
    for (n = 1; n < 40; n += 9) {
        trainer         t;
        lorasync_desc   d = default_desc(c);
        lorasync_piece  p;
        float           norm[3] = {1, 2, 3};
        lorasync_report report;
        int             kind;
        memset(name, 'n', n), name[n] = 0;
        snprintf(shm, sizeof shm, "test-silences-%ld", (long)getpid());
        d.adapter     = name;
        d.wire_dtype  = LORASYNC_BF16;
        d.config_json = "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": [\"q_proj\"], "
                        "\"modules_to_save\": [\"norm\"]}";
        d.lora_alpha  = 0;
        memset(&t, 0, sizeof t);
        REQUIRE(lorasync_open(&d, &t.s, &err) == LORASYNC_OK);
        p = shard_piece("model.layers.0.q_proj.lora_A.weight", 2, RANK_R, WIDTH, c->rank, c->world, t.a);
        CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
        p = shard_piece("model.layers.0.q_proj.lora_B.weight", 2, WIDTH, RANK_R, c->rank, c->world, t.b);
        CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
        p = whole_piece("model.norm.weight", LORASYNC_F32, 1, 3, 0, norm);
        CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
        CHECK_EQ(lorasync_attach_directory(t.s, at, &err), 0);
        CHECK_EQ(lorasync_attach_shm(t.s, shm, &err), 0);
        CHECK_EQ(lorasync_compile(t.s, &err), 0);
        CHECK_EQ(lorasync_sync(t.s, 1, &report, &err), 0);
        if (c->rank == 0) check_aligned(lorasync_session_image(t.s), 3);
        for (kind = 0; kind < 2 && c->rank == 0; kind++) {
            lorasync_engine_desc    ed;
            lorasync_engine        *e = NULL;
            const lorasync_adapter *a;
            memset(&ed, 0, sizeof ed);
            ed.directory = kind ? NULL : at;
            ed.shm       = kind ? shm : NULL;
            ed.adapter   = name;
            CHECK_EQ(lorasync_engine_open(&ed, &e, &err), 0);
            CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
            a = lorasync_acquire(e, name);
            REQUIRE(a);
            CHECK_EQ((uintptr_t)a->image->payload % 64, 0);
            check_aligned(a->image, 3);
            lorasync_release(a);
            lorasync_engine_close(e);
        }
        lorasync_close(t.s);
        if (c->rank == 0) CHECK_EQ(lorasync_shm_remove(shm, &err), 0);
    }
}

static void payloads_are_aligned(void)
{
    char   at[64];
    size_t i;
    for (i = 0; i < 3; i++) {
        REQUIRE(make_place(at));
        run_threads(worlds[i], aligned_for_engines, at);
        remove_place(at);
    }
}

/* Layouts and deltas; without an adapter a layout is the reference writer's. */
static void layouts_are_aligned(void)
{
    lorasync_tensor     tensors[3];
    lorasync_image_desc d;
    lorasync_image     *image = NULL, *delta = NULL, *parsed = NULL;
    lorasync_error      err;
    unsigned char       payload[64] = {1, 2, 3};
    uint64_t            digests[3], old[3] = {0, 0, 0};
    size_t              n;
    char                names[3][80];
    for (n = 1; n < 70; n += 4) {
        size_t i;
        memset(tensors, 0, sizeof tensors);
        for (i = 0; i < 3; i++) {
            memset(names[i], 'a' + (int)i, n), names[i][n] = 0;
            tensors[i].name  = names[i];
            tensors[i].dtype = i == 0 ? LORASYNC_F8_E4M3 : i == 1 ? LORASYNC_F32 : LORASYNC_BF16;
            tensors[i].ndim = 1, tensors[i].shape[0] = 3;
        }
        memset(&d, 0, sizeof d);
        d.tensors = tensors, d.num_tensors = 3;
        CHECK_EQ(lorasync_image_layout(&d, NULL, &image, &err), 0);
        CHECK_EQ(image->header_bytes % 8, 0);
        for (i = image->header_bytes; ((const char *)image->header)[i - 1] == ' '; i--) continue;
        CHECK(image->header_bytes - i < 8);
        lorasync_image_free(image);
        d.adapter = "x";
        CHECK_EQ(lorasync_image_layout(&d, NULL, &image, &err), 0);
        check_aligned(image, 3);
        lorasync_image_bind(image, payload);
        lorasync_image_stamp(image, 2, lorasync_image_digest(image, digests));
        memcpy(old + 1, digests + 1, sizeof digests - sizeof digests[0]);
        CHECK_EQ(lorasync_image_delta(image, 1, old, NULL, &delta, &err), 0);
        CHECK_EQ(delta->num_tensors, 1);
        CHECK_EQ(delta->header_bytes % 64, 0);
        lorasync_image_free(delta);
        lorasync_image_free(image);
        /* any length is read */
        {
            char file[200];
            int  m = snprintf(file + 8, sizeof file - 8,
                              "{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}%*s}", (int)(n % 9), "");
            memset(file, 0, 8), file[0] = (char)m, file[8 + m] = 7;
            CHECK_EQ(lorasync_image_parse(file, (size_t)m + 9, NULL, &parsed, &err), 0);
            CHECK_EQ(*(const char *)parsed->tensors[0].data, 7);
            lorasync_image_free(parsed);
        }
    }
}

/* -- loading: which version it was, on all ranks */

static float loaded_value(const trainer *t, const rank_context *c)
{
    size_t i, n = (size_t)(RANK_R * WIDTH / c->world);
    for (i = 1; i < n; i++) CHECK(t->a[i] <= t->a[0] && t->a[i] >= t->a[0]);
    return t->a[0];
}

/* Publishes 5 and 6, then loads them: by the directory of versions, by latest, by one version, and by a file. */
static void load_versions(rank_context *c)
{
    const char    *at = (const char *)c->user;
    trainer        t;
    lorasync_desc  d = default_desc(c);
    lorasync_error err;
    uint64_t       version;
    size_t         i;
    char           path[160];
    static const struct {
        const char *below;
        uint64_t    version;
    } places[] = {{"default", 6},
                  {"default/", 6},
                  {"default/latest", 6},
                  {"default/v5", 5},
                  {"default/v5/adapter_model.safetensors", 5}};
    open_trainer(&t, c, &d);
    CHECK_EQ(lorasync_attach_directory(t.s, at, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    for (version = 5; version < 7; version++) {
        fill(&t, (float)version);
        CHECK_EQ(lorasync_sync(t.s, version, NULL, &err), 0);
    }
    for (i = 0; i < sizeof places / sizeof places[0]; i++) {
        fill(&t, 0);
        version = 99;
        snprintf(path, sizeof path, "%s/%s", at, places[i].below);
        CHECK_EQ(lorasync_load(t.s, path, &version, &err), 0);
        CHECK_EQ(version, places[i].version);
        CHECK_EQ((long)loaded_value(&t, c), (long)places[i].version);
    }
    /* one level too high, and where nothing is; the version is 0 then */
    CHECK_EQ(lorasync_load(t.s, at, &version, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "it holds adapters: give one, as ");
    CHECK_HAS(err.text, "/default");
    CHECK_EQ(version, 0);
    version = 99;
    CHECK_EQ(lorasync_load(t.s, "/tmp", &version, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "/tmp has no adapter_model.safetensors");
    CHECK_EQ(version, 0);
    lorasync_close(t.s);
}

static void load_follows_latest(void)
{
    char   at[64];
    size_t i;
    for (i = 0; i < 3; i++) {
        lorasync_image *image = NULL;
        lorasync_error  err;
        char            path[120];
        REQUIRE(make_place(at));
        run_threads(worlds[i], load_versions, at);
        snprintf(path, sizeof path, "%s/default", at);
        CHECK_EQ(lorasync_open_adapter(path, NULL, &image, NULL, &err), 0);
        CHECK(image && image->version == 6);
        lorasync_image_free(image);
        snprintf(path, sizeof path, "%s/default/v6", at); /* what latest names has gone */
        remove_place(path);
        snprintf(path, sizeof path, "%s/default", at);
        CHECK_EQ(lorasync_open_adapter(path, NULL, &image, NULL, &err), LORASYNC_E_NOT_FOUND);
        CHECK_HAS(err.text, "/default/v6: No such file");
        remove_place(at);
    }
}

/* -- version 0: the next one */

/* A place that others publish in, too. */
typedef struct shared_place {
    uint64_t published, received; /* by whomever; served by an engine that says so */
    int      newest_status;
} shared_place;

static lorasync_status place_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    shared_place *p = (shared_place *)user;
    if (image->version > p->published || image->generation) return LORASYNC_OK;
    err->status = LORASYNC_E_VERSION;
    snprintf(err->text, sizeof err->text, "has version %llu", (unsigned long long)p->published);
    return LORASYNC_E_VERSION;
}

static lorasync_status place_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    (void)adapter, (void)err;
    ((shared_place *)user)->published = version;
    return LORASYNC_OK;
}

static lorasync_status place_newest(void *user, const char *adapter, uint64_t *out_version, lorasync_error *err)
{
    (void)err;
    CHECK_TEXT(adapter, "default");
    *out_version = ((shared_place *)user)->published;
    return (lorasync_status)((shared_place *)user)->newest_status;
}

static lorasync_status place_receipts(void *user, const char *adapter, size_t index, lorasync_receipt *out,
                                      lorasync_error *err)
{
    (void)adapter, (void)err;
    if (index || !((shared_place *)user)->received) return LORASYNC_NOTHING_NEW;
    strcpy(out->engine, "far");
    out->version = ((shared_place *)user)->received;
    return LORASYNC_OK;
}

static lorasync_transport place_transport(shared_place *p)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size     = sizeof t;
    t.name     = "place";
    t.user     = p;
    t.stage    = place_stage;
    t.commit   = place_commit;
    t.newest   = place_newest;
    t.receipts = place_receipts;
    return t;
}

/* A sync of version `asked`, which must become `expected` everywhere. */
static void sync_as(trainer *t, uint64_t asked, uint64_t expected)
{
    lorasync_report report;
    lorasync_error  err;
    memset(&report, 0, sizeof report);
    err.text[0] = 0;
    if (lorasync_sync(t->s, asked, &report, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    CHECK_EQ(report.version, expected);
}

static void next_in_one_session(rank_context *c)
{
    shared_place      *place     = (shared_place *)c->user;
    lorasync_transport transport = place_transport(place);
    trainer            t;
    lorasync_desc      d = default_desc(c);
    lorasync_error     err;
    d.skip_unchanged = 1;
    open_trainer(&t, c, &d);
    if (c->rank == 0) memset(place, 0, sizeof *place);
    CHECK_EQ(lorasync_attach(t.s, &transport, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    sync_as(&t, 0, 1);
    fill(&t, 2);
    sync_as(&t, 0, 2);
    sync_as(&t, 0, 2); /* skipped: nothing has changed */
    fill(&t, 3);
    sync_as(&t, c->rank ? 3 : 0, 3); /* ranks may say it or not */
    fill(&t, 4);
    CHECK_EQ(lorasync_sync(t.s, c->rank + 1 < c->world ? 0 : 9, NULL, &err),
             c->world > 1 ? LORASYNC_E_DISAGREE : LORASYNC_OK);
    if (c->world > 1) CHECK_HAS(err.text, "version: 4 on rank 0, 9 on rank ");
    fill(&t, 5);
    sync_as(&t, 10, 10);
    fill(&t, 6);
    t.a[0] = (float)NAN_VALUE;
    CHECK_EQ(lorasync_sync(t.s, 0, NULL, &err), LORASYNC_E_NAN);
    fill(&t, 6);
    sync_as(&t, 0, 11); /* the version that failed */
    /* somebody else has published meanwhile: this is told once, and what is next is above it */
    fill(&t, 7);
    if (c->rank == 0) place->published = 40;
    CHECK_EQ(lorasync_sync(t.s, 0, NULL, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "has version 40");
    sync_as(&t, 0, 41);
    lorasync_close(t.s);
}

/* After a restart: what the place has, or an engine still serves; in a new generation neither. */
static void next_after_a_restart(rank_context *c)
{
    shared_place      *place     = (shared_place *)c->user;
    lorasync_transport transport = place_transport(place);
    int                turn;
    static const struct {
        shared_place place;
        int          new_generation;
        uint64_t     next;
    } turns[] = {{{40, 0, 0}, 0, 41}, {{40, 50, 0}, 0, 51}, {{0, 9, 0}, 0, 10},
                 {{40, 50, 0}, 1, 1}, {{0, 0, -13}, 0, 1},  {{0, 0, 6}, 0, 1}};
    for (turn = 0; turn < 6; turn++) {
        trainer        t;
        lorasync_desc  d = default_desc(c);
        lorasync_error err;
        d.new_generation = turns[turn].new_generation;
        open_trainer(&t, c, &d);
        if (c->rank == 0) *place = turns[turn].place;
        CHECK_EQ(lorasync_attach(t.s, &transport, &err), 0);
        CHECK_EQ(lorasync_compile(t.s, &err), 0);
        if (c->rank == 0 && place->newest_status)
            CHECK_HAS(lorasync_get_outcomes(t.s, NULL)->error.text, "say which version it has");
        sync_as(&t, 0, turns[turn].next);
        sync_as(&t, 0, turns[turn].next + 1);
        lorasync_close(t.s);
    }
}

/* The built-in transports; `name` of both. */
static void next_in_real_places(rank_context *c)
{
    const char *const   *names = (const char *const *)c->user;
    uint64_t             v;
    trainer              t;
    lorasync_desc        d = default_desc(c);
    lorasync_error       err;
    lorasync_stream_desc sd;
    lorasync_stream     *s;
    lorasync_report      report;
    for (v = 1; v < 4; v++) {
        open_trainer(&t, c, &d);
        if (v != 2) CHECK_EQ(lorasync_attach_directory(t.s, names[0], &err), 0);
        if (v != 1) CHECK_EQ(lorasync_attach_shm(t.s, names[1], &err), 0);
        CHECK_EQ(lorasync_compile(t.s, &err), 0);
        sync_as(&t, v == 2 ? 7 : 0, v == 1 ? 1 : v == 2 ? 7 : 8);
        lorasync_close(t.s);
    }
    memset(&sd, 0, sizeof sd);
    sd.comm = &c->comm, sd.timeout_ms = 20000;
    for (v = 1; v < 4; v++) {
        lorasync_directory_desc dd;
        lorasync_transport      transport;
        lorasync_piece          p;
        float                   w[WIDTH] = {1};
        memset(&dd, 0, sizeof dd);
        dd.directory = names[0];
        REQUIRE(lorasync_stream_open(&sd, &s, &err) == LORASYNC_OK);
        p = shard_piece("model.norm.weight", 1, WIDTH, 0, c->rank, c->world, w);
        CHECK_EQ(lorasync_stream_add(s, &p, &err), 0);
        CHECK_EQ(lorasync_directory_open(&dd, &transport, &err), 0);
        CHECK_EQ(lorasync_stream_attach(s, &transport, &err), 0);
        CHECK_EQ(lorasync_stream_compile(s, &err), 0);
        CHECK_EQ(lorasync_stream_sync(s, 0, &report, &err), 0);
        CHECK_EQ(report.version, 2 * v - 1);
        if (c->rank == 0) w[0] = (float)NAN_VALUE;
        CHECK_EQ(lorasync_stream_sync(s, 0, &report, &err), LORASYNC_E_NAN);
        w[0] = 3;
        CHECK_EQ(lorasync_stream_sync(s, 0, &report, &err), 0);
        CHECK_EQ(report.version, 2 * v);
        lorasync_stream_close(s);
    }
}

static void version_zero_is_the_next(void)
{
    char         at[64], shm[60];
    const char  *names[2] = {at, shm};
    shared_place place;
    size_t       i;
    snprintf(shm, sizeof shm, "test-silences-%ld", (long)getpid());
    for (i = 0; i < 3; i++) {
        run_threads(worlds[i], next_in_one_session, &place);
        run_threads(worlds[i], next_after_a_restart, &place);
        REQUIRE(make_place(at));
        run_threads(worlds[i], next_in_real_places, (void *)names);
        remove_place(at);
        lorasync_shm_remove(shm, NULL);
    }
}

/* -- an engine that looks in the wrong place says so, after a while */

/* Publishes version 1 of an adapter; directory or shared memory. */
static void publish_as(const char *adapter, const char *directory, const char *shm)
{
    trainer        t;
    lorasync_desc  d = default_desc(NULL);
    lorasync_error err;
    lorasync_piece p;
    d.adapter = adapter;
    memset(&t, 0, sizeof t);
    REQUIRE(lorasync_open(&d, &t.s, &err) == LORASYNC_OK);
    p = whole_piece("model.layers.0.q_proj.lora_A.weight", LORASYNC_F32, 2, RANK_R, WIDTH, t.a);
    CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
    p = whole_piece("model.layers.0.q_proj.lora_B.weight", LORASYNC_F32, 2, WIDTH, RANK_R, t.b);
    CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
    if (directory) CHECK_EQ(lorasync_attach_directory(t.s, directory, &err), 0);
    if (shm) CHECK_EQ(lorasync_attach_shm(t.s, shm, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    CHECK_EQ(lorasync_sync(t.s, 1, NULL, &err), 0);
    lorasync_close(t.s);
}

static void typos_of_an_engine(void)
{
    char            at[64], names[3][120], shm[60], wrong[60], one[100];
    lorasync_error  err;
    scripted_source script = {0, LORASYNC_NOTHING_NEW};
    lorasync_source source;
    size_t          i;
    struct {
        lorasync_engine_desc desc;
        lorasync_engine     *e;
        const char          *expected[3];
    } v[10];
    lorasync_place places[2];
    memset(v, 0, sizeof v);
    memset(places, 0, sizeof places);
    REQUIRE(make_place(at));
    snprintf(names[0], sizeof names[0], "%s/adapters", at);
    snprintf(names[1], sizeof names[1], "%s/adpaters", at);
    snprintf(names[2], sizeof names[2], "%s/empty", at);
    CHECK_EQ(mkdir(names[2], 0755), 0);
    snprintf(shm, sizeof shm, "test-silences-%ld", (long)getpid());
    snprintf(wrong, sizeof wrong, "test-silence-%ld", (long)getpid());
    snprintf(one, sizeof one, "is '%s' meant?", shm);
    publish_as("default", names[0], shm);
    publish_as("policy", names[0], NULL);
    memset(&source, 0, sizeof source);
    source.size = sizeof source, source.name = "web", source.user = &script;
    source.look = source_look, source.open = source_open;
    v[0].desc.directory = names[0], v[0].desc.adapter = "defualt";
    v[0].expected[0] = "nothing of adapter 'defualt' is in ", v[0].expected[1] = "/adapters, which has: ";
    v[0].expected[2]    = "; is 'default' meant?";
    v[1].desc.directory = names[1], v[1].desc.adapter = "default";
    v[1].expected[0] = "/adpaters does not exist; there are: ", v[1].expected[1] = "is 'adapters' meant?";
    v[2].desc.directory = names[1];
    v[2].expected[0]    = "/adpaters does not exist; there are: ";
    v[3].desc.directory = names[2], v[3].desc.adapter = "default";
    v[3].expected[0] = "nothing of adapter 'default' is in ", v[3].expected[1] = "/empty, nor of any other";
    v[4].desc.directory = names[2];
    v[4].expected[0]    = "/empty yet";
    v[5].desc.shm       = wrong;
    v[5].expected[0] = " does not exist; there are: ", v[5].expected[1] = one;
    v[6].desc.shm = shm, v[6].desc.adapter = "deflt";
    v[6].expected[0] = "which has: default; is 'default' meant?";
    v[7].desc.source = &source, v[7].desc.adapter = "other-name";
    v[7].expected[0]    = "nothing of adapter 'other-name' is in web, which has: default";
    v[8].desc.directory = names[0], v[8].desc.adapter = "policy";   /* right: nothing is ever said */
    places[0].directory = names[0], places[1].directory = names[1]; /* one of two */
    v[9].desc.places = places, v[9].desc.num_places = 2;
    v[9].expected[0] = "/adpaters does not exist; there are: ";
    for (i = 0; i < 10; i++) {
        CHECK_EQ(lorasync_engine_open(&v[i].desc, &v[i].e, &err), 0);
        strcpy(err.text, "left alone");
        CHECK_EQ(lorasync_engine_poll(v[i].e, 0, &err), i < 8 ? LORASYNC_NOTHING_NEW : LORASYNC_OK);
        CHECK_TEXT(err.text, "left alone");
    }
    usleep(2020000);
    for (i = 0; i < 10; i++) {
        size_t k;
        strcpy(err.text, "left alone");
        CHECK_EQ(lorasync_engine_poll(v[i].e, 0, &err), LORASYNC_NOTHING_NEW);
        if (i == 8) CHECK_TEXT(err.text, "left alone");
        else CHECK_EQ(err.status, LORASYNC_NOTHING_NEW);
        for (k = 0; k < 3; k++)
            if (v[i].expected[k]) CHECK_HAS(err.text, v[i].expected[k]);
        strcpy(err.text, "left alone"); /* not at every poll */
        CHECK_EQ(lorasync_engine_poll(v[i].e, 0, &err), LORASYNC_NOTHING_NEW);
        CHECK_TEXT(err.text, "left alone");
        CHECK_EQ(lorasync_engine_poll(v[i].e, 0, NULL), LORASYNC_NOTHING_NEW);
    }
    /* what comes is found all the same, also after the look around */
    publish_as("deflt", NULL, shm);
    publish_as("default", names[2], NULL);
    publish_as("default", names[1], NULL);
    for (i = 1; i < 7; i++)
        if (i != 5) CHECK_EQ(lorasync_engine_poll(v[i].e, 0, &err), LORASYNC_OK);
    for (i = 0; i < 10; i++) lorasync_engine_close(v[i].e);
    lorasync_shm_remove(shm, NULL);
    remove_place(at);
}

/* -- lorasync_shard with the ranks of one host instead of all: it covers the tensor, and half of it is not read */

typedef struct sharding {
    int shards, differ;
} sharding;

static void shard_over(rank_context *c)
{
    const sharding       *how = (const sharding *)c->user;
    trainer               t;
    lorasync_desc         d = default_desc(c);
    lorasync_piece        p;
    lorasync_error        err;
    lorasync_session_info info;
    memset(&t, 0, sizeof t);
    fill(&t, how->differ ? (float)c->rank : 1);
    REQUIRE(lorasync_open(&d, &t.s, &err) == LORASYNC_OK);
    p = shard_piece(PARAM_A, 2, RANK_R, WIDTH, c->rank % how->shards, how->shards, t.a);
    CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
    p = shard_piece(PARAM_B, 2, WIDTH, RANK_R, c->rank % how->shards, how->shards, t.b);
    CHECK_EQ(lorasync_add(t.s, &p, &err), 0);
    CHECK_EQ(lorasync_compile(t.s, &err), 0);
    lorasync_get_info(t.s, &info);
    CHECK_EQ(info.plan.max_replicas, c->rank ? 0 : c->world / how->shards);
    CHECK_EQ(lorasync_sync(t.s, 1, NULL, &err),
             how->differ && how->shards < c->world ? LORASYNC_E_DISAGREE : LORASYNC_OK);
    if (how->differ && how->shards < c->world) {
        CHECK_HAS(err.text, "both hold it, with different values");
        CHECK_HAS(err.text, "was lorasync_shard given all ranks that share the tensor");
    }
    lorasync_close(t.s);
    /* a rank that is none of that world's */
    CHECK_EQ(lorasync_shard(p.box, 0, how->shards, how->shards).len[0], -1);
}

static void a_local_world_that_covers(void)
{
    sharding how;
    size_t   i;
    for (i = 0; i < 3; i++)
        for (how.shards = 1; how.shards <= worlds[i]; how.shards *= 2)
            for (how.differ = 0; how.differ < 2; how.differ++) run_threads(worlds[i], shard_over, &how);
}

int main(void)
{
    RUN(positive_status_of_a_transport);
    RUN(positive_status_of_attach_and_lend);
    RUN(positive_status_of_a_source);
    RUN(positive_status_of_a_comm);
    RUN(engines_off_the_root);
    RUN(engines_off_the_root_of_a_stream);
    RUN(disagreements_name_the_field);
    RUN(disagreement_on_versions);
    RUN(directories_in_the_wrong_place);
    RUN(chdir_does_not_matter);
    RUN(shared_memory_on_all_ranks);
    RUN(failed_opens_leave_zeros);
    RUN(payloads_are_aligned);
    RUN(layouts_are_aligned);
    RUN(load_follows_latest);
    RUN(version_zero_is_the_next);
    RUN(typos_of_an_engine);
    RUN(a_local_world_that_covers);
    return test_summary("test_silences");
}
