/* Publishing to many engines: every mix of outcomes against a model, quorum, death and recovery, republishing,
   unchanged versions. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"
#include "ranks.h"
#include "pieces.h"

#define NUM 3 /* engines */

/* -- an engine of the test. `plan` says how the next try ends; what it serves is the truth that outcomes are compared
   with */

enum {
    GOOD,
    FAIL_STAGE,
    FAIL_COMMIT,
    FAIL_COMMIT_LATE /* the commit happened, but says that it failed */
};

typedef struct engine {
    int      plan, one_phase;
    int      stages, commits, aborts; /* commits that succeeded */
    uint64_t staged, served, served_digest, staged_digest;
} engine;

static lorasync_status engine_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    engine *e = (engine *)user;
    if (image->version < e->served) test_fail(__FILE__, __LINE__, "an engine gets an older version");
    if (e->staged) test_fail(__FILE__, __LINE__, "a stage follows neither a commit nor an abort");
    e->stages++;
    if (e->one_phase) {
        if (e->plan != GOOD) return test_refuse(err, LORASYNC_E_IO, "no room");
        e->served        = image->version;
        e->served_digest = image->digest;
        return LORASYNC_OK;
    }
    e->staged        = image->version; /* also when it fails: then abort must come */
    e->staged_digest = image->digest;
    return e->plan == FAIL_STAGE ? test_refuse(err, LORASYNC_E_IO, "no room") : LORASYNC_OK;
}

static lorasync_status engine_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    engine *e = (engine *)user;
    CHECK_TEXT(adapter, "default");
    if (!e->staged || e->staged != version) test_fail(__FILE__, __LINE__, "a commit of what was not staged");
    if (e->plan == FAIL_COMMIT) return test_refuse(err, LORASYNC_E_BUSY, "will not");
    e->served        = version;
    e->served_digest = e->staged_digest;
    if (e->plan == FAIL_COMMIT_LATE) return test_refuse(err, LORASYNC_E_BUSY, "answer lost");
    e->staged = 0;
    e->commits++;
    return LORASYNC_OK;
}

static void engine_abort(void *user, const char *adapter, uint64_t version)
{
    engine *e = (engine *)user;
    (void)adapter, (void)version;
    if (!e->one_phase && !e->staged) test_fail(__FILE__, __LINE__, "an abort of what was not staged");
    e->staged = 0;
    e->aborts++;
}

static const char *const names[NUM] = {"red", "green", "blue"};

static lorasync_transport transport_to(engine *e, const char *name)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size = sizeof t, t.name = name, t.user = e, t.stage = engine_stage, t.abort = engine_abort;
    if (!e->one_phase) t.commit = engine_commit;
    return t;
}

/* -- all outcomes of 3 engines over 3 versions, for every quorum, against a model */

typedef struct model {
    uint64_t served[NUM];   /* truth */
    uint64_t known[NUM];    /* as reported: 0 after a failed commit */
    int      failures[NUM]; /* in a row */
    int      state[NUM];
} model;

static void model_misses(model *m, int i)
{
    m->state[i] = ++m->failures[i] >= 3 ? LORASYNC_ENGINE_DEAD : LORASYNC_ENGINE_BEHIND;
}

static void model_serves(model *m, int i, uint64_t version)
{
    m->served[i] = m->known[i] = version;
    m->failures[i]             = 0;
    m->state[i]                = LORASYNC_ENGINE_COMMITTED;
}

/* 1 if the version is accepted. `spare` is how many engines may fail. */
static int model_publish(model *m, const engine *e, uint64_t version, int spare)
{
    int order[NUM], n = 0, i, k, reached, somebody = 0, staged[NUM] = {0, 0, 0}, overdrawn = 0;
    for (k = 0; k < 2; k++)
        for (i = 0; i < NUM; i++)
            if (e[i].one_phase == k) order[n++] = i;
    for (reached = 0; reached < NUM && !overdrawn; reached++) { /* staging */
        i = order[reached];
        if (e[i].plan == FAIL_STAGE || (e[i].one_phase && e[i].plan != GOOD)) {
            model_misses(m, i);
            overdrawn = --spare < 0;
        } else if (e[i].one_phase) {
            model_serves(m, i, version);
            somebody = 1;
        } else {
            staged[i] = 1;
        }
    }
    for (i = 0; i < NUM && !overdrawn; i++) { /* committing, as long as something can be saved */
        if (!staged[i] || (spare < 0 && !somebody)) continue;
        staged[i] = 0;
        if (e[i].plan == GOOD) {
            model_serves(m, i, version);
            somebody = 1;
        } else {
            if (e[i].plan == FAIL_COMMIT_LATE) m->served[i] = version;
            m->known[i] = 0;
            model_misses(m, i);
            spare--;
        }
    }
    for (i = 0; i < NUM; i++)
        if (staged[i]) m->state[i] = LORASYNC_ENGINE_STAGED, m->failures[i] = 0;
    return spare >= 0;
}

typedef struct bench {
    engine                  e[NUM];
    lorasync_transport      t[NUM];
    lorasync_engine_outcome o[NUM];
    lorasync_image         *image;
} bench;

static lorasync_image *bare_image(void)
{
    static const unsigned char bytes[16] = {1, 2, 3};
    lorasync_tensor            t[1];
    lorasync_image_desc        d;
    lorasync_image            *image = NULL;
    memset(t, 0, sizeof t);
    memset(&d, 0, sizeof d);
    t[0].name = "x", t[0].dtype = LORASYNC_U8, t[0].ndim = 1, t[0].shape[0] = 16;
    d.tensors = t, d.num_tensors = 1, d.adapter = "default";
    if (lorasync_image_layout(&d, NULL, &image, NULL) < 0) return NULL;
    lorasync_image_bind(image, bytes);
    return image;
}

static void bench_reset(bench *b, int mask)
{
    int i;
    memset(b->e, 0, sizeof b->e);
    for (i = 0; i < NUM; i++) {
        b->e[i].one_phase = mask >> i & 1;
        b->t[i]           = transport_to(&b->e[i], names[i]);
        b->o[i]           = lorasynci_new_outcome(&b->t[i]);
    }
}

static lorasync_status bench_publish(bench *b, uint64_t version, int quorum, int behind_only, lorasync_error *err)
{
    lorasynci_publication p;
    memset(&p, 0, sizeof p);
    lorasync_image_stamp(b->image, version, version * 1000);
    p.transports = b->t, p.outcomes = b->o, p.num = NUM, p.image = b->image, p.behind_only = behind_only;
    p.need = behind_only ? 0 : quorum ? (size_t)quorum : NUM;
    return lorasynci_publish(&p, err);
}

static void compare(const bench *b, const model *m)
{
    int i;
    for (i = 0; i < NUM; i++) {
        if (b->e[i].served != m->served[i] || b->o[i].version != m->known[i] || (int)b->o[i].state != m->state[i] ||
            b->o[i].num_failures != m->failures[i] || b->e[i].staged) {
            CHECK_EQ(b->e[i].served, m->served[i]);
            CHECK_EQ(b->o[i].version, m->known[i]);
            CHECK_EQ(b->o[i].state, m->state[i]);
            CHECK_EQ(b->o[i].num_failures, m->failures[i]);
            CHECK_EQ(b->e[i].staged, 0);
        }
        if ((b->o[i].error.status < 0) !=
            (m->state[i] == LORASYNC_ENGINE_BEHIND || m->state[i] == LORASYNC_ENGINE_DEAD))
            test_fail(__FILE__, __LINE__, "an error in the wrong state");
    }
}

/* Once everything works again: the same version to all, twice; and to those behind only. */
static void check_recovery(bench *b, int quorum, int accepted, lorasync_error *err)
{
    int i, stages = 0;
    for (i = 0; i < NUM; i++) b->e[i].plan = GOOD;
    if (accepted) CHECK_EQ(bench_publish(b, 3, 0, 1, err), LORASYNC_OK);
    else CHECK_EQ(bench_publish(b, 3, quorum, 0, err), LORASYNC_OK);
    for (i = 0; i < NUM; i++) {
        if (b->e[i].served != 3 || b->o[i].state != LORASYNC_ENGINE_COMMITTED || b->o[i].version != 3)
            test_fail(__FILE__, __LINE__, "not recovered");
        stages += b->e[i].stages;
    }
    CHECK_EQ(bench_publish(b, 3, 0, 1, err), LORASYNC_OK);
    for (i = 0; i < NUM; i++) stages -= b->e[i].stages;
    CHECK_EQ(stages, 0); /* nobody was behind */
    CHECK_EQ(bench_publish(b, 3, quorum, 0, err), LORASYNC_OK);
    CHECK_EQ(lorasynci_num_serving(b->o, NUM, 3), NUM);
}

static void run_one(bench *b, int mix, int quorum, int mask)
{
    model    m;
    uint64_t version;
    int      i, accepted = 0, rest = mix;
    memset(&m, 0, sizeof m);
    bench_reset(b, mask);
    for (version = 1; version <= 3; version++) {
        lorasync_error err;
        uint64_t       before[NUM];
        int            now = 0;
        memset(&err, 0, sizeof err);
        for (i = 0; i < NUM; i++, rest /= 3) {
            before[i]    = b->e[i].served;
            b->e[i].plan = rest % 3;
            if (b->e[i].plan == FAIL_COMMIT && (mix + i) % 2) b->e[i].plan = FAIL_COMMIT_LATE;
        }
        accepted = model_publish(&m, b->e, version, quorum ? NUM - quorum : 0);
        if ((bench_publish(b, version, quorum, 0, &err) == LORASYNC_OK) != accepted)
            test_fail(__FILE__, __LINE__, "the verdict");
        compare(b, &m);
        for (i = 0; i < NUM; i++) { /* old or new, never anything else; what is accepted is served by enough */
            now += b->e[i].served == version;
            if (b->e[i].served != version && b->e[i].served != before[i])
                test_fail(__FILE__, __LINE__, "neither old nor new");
        }
        if (accepted && now < (quorum ? quorum : NUM)) test_fail(__FILE__, __LINE__, "accepted by too few");
        if (accepted != (err.status == LORASYNC_OK)) test_fail(__FILE__, __LINE__, "the error");
    }
    {
        lorasync_error err;
        check_recovery(b, quorum, accepted, &err);
    }
}

static void all_outcomes(void)
{
    static const int masks[] = {0, 4, 3};
    bench            b;
    int              mix, quorum, k;
    b.image = bare_image();
    REQUIRE(b.image);
    for (k = 0; k < 3; k++)
        for (quorum = 0; quorum <= NUM; quorum++)
            for (mix = 0; mix < 19683; mix++) run_one(&b, mix, quorum, masks[k]);
    lorasync_image_free(b.image);
}

/* The text of a failure says how many could, how many must, whose fault it is, and who has the new version all the
   same. */
static void error_texts(void)
{
    bench          b;
    lorasync_error err;
    b.image = bare_image();
    REQUIRE(b.image);
    bench_reset(&b, 0);
    b.e[1].plan = b.e[2].plan = FAIL_STAGE;
    CHECK_EQ(bench_publish(&b, 7, 2, 0, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text,
              "1 of 3 engines could take version 7, at least 2 must: transport 'green' could not stage: no room");
    b.e[1].plan = b.e[2].plan = FAIL_COMMIT;
    CHECK_EQ(bench_publish(&b, 7, 2, 0, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "'green' could not commit: will not");
    CHECK_HAS(err.text, "version 7 is served by: red; maybe still the old one by: green, blue; publish 7 again");
    CHECK_EQ(bench_publish(&b, 7, 2, 0, NULL), LORASYNC_E_BUSY);
    lorasync_image_free(b.image);
}

/* -- sessions */

static const char *const raw_names[2] = {"model.layers.0.q_proj.lora_A.default.weight",
                                         "model.layers.0.q_proj.lora_B.default.weight"};

typedef struct trainer {
    float             values[2][64];
    lorasync_session *s;
} trainer;

/* Rank `rank` of `world` holds some rows of A [8, 8] and B [8, 8]. */
static lorasync_status trainer_open(trainer *t, const lorasync_desc *desc, engine *e, int num, lorasync_error *err)
{
    int             rank = desc->comm ? desc->comm->rank : 0, world = desc->comm ? desc->comm->world : 1, i;
    lorasync_status status = lorasync_open(desc, &t->s, err);
    for (i = 0; i < 64; i++) t->values[0][i] = t->values[1][i] = (float)i;
    for (i = 0; i < 2 && status == LORASYNC_OK; i++) {
        lorasync_piece p = shard_piece(raw_names[i], 2, 8, 8, rank, world, t->values[i]);
        status           = lorasync_add(t->s, &p, err);
    }
    for (i = 0; i < num && status == LORASYNC_OK; i++) {
        lorasync_transport to = transport_to(&e[i], names[i]);
        status                = lorasync_attach(t->s, &to, err);
    }
    return status < 0 ? status : lorasync_compile(t->s, err);
}

static lorasync_desc plain(void)
{
    lorasync_desc d;
    memset(&d, 0, sizeof d);
    d.lora_alpha = 8, d.timeout_ms = test_ms(20000);
    return d;
}

#define EXPECT(index, expected_state, expected_version)                                                                \
    do {                                                                                                               \
        const lorasync_engine_outcome *o_ = lorasync_get_outcomes(t.s, NULL);                                          \
        CHECK_TEXT(lorasync_engine_state_text(o_[index].state), #expected_state);                                      \
        CHECK_EQ(o_[index].version, expected_version);                                                                 \
    } while (0)

/* Death and recovery of one engine of three. */
static void death(void)
{
    static trainer                 t;
    engine                         e[NUM];
    lorasync_desc                  d = plain();
    lorasync_report                r;
    lorasync_error                 err;
    test_memory                    mem;
    lorasync_allocator             a;
    const lorasync_engine_outcome *o;
    size_t                         num = 99;
    long                           total;
    uint64_t                       v;
    memset(e, 0, sizeof e), memset(&mem, 0, sizeof mem);
    a.alloc = test_memory_alloc, a.free = test_memory_free, a.user = &mem;
    d.allocator = &a, d.quorum = 2;
    REQUIRE(trainer_open(&t, &d, e, NUM, &err) == LORASYNC_OK);
    o = lorasync_get_outcomes(t.s, &num);
    CHECK_EQ(num, NUM);
    EXPECT(0, idle, 0);
    CHECK_TEXT(o[2].name, "blue");
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "nothing was published");
    total = mem.total;
    CHECK_EQ(lorasync_sync(t.s, 1, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.num_engines, 3);
    CHECK_EQ(r.num_behind, 0);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_NOTHING_NEW);
    e[2].plan = FAIL_STAGE;
    for (v = 2; v <= 5; v++) {
        CHECK_EQ(lorasync_sync(t.s, v, &r, &err), LORASYNC_OK);
        CHECK_EQ(r.version, v);
        CHECK_EQ(r.num_engines, 2);
        CHECK_EQ(r.num_behind, 1);
        CHECK_TEXT(lorasync_engine_state_text(o[2].state), v < 4 ? "behind" : "dead");
        CHECK_EQ(o[2].num_failures, v - 1);
        CHECK_EQ(o[2].version, 1);
        CHECK_EQ(o[2].error.status, LORASYNC_E_IO);
        CHECK_HAS(o[2].error.text, "'blue' could not stage: no room");
    }
    CHECK_EQ(e[2].stages, 5); /* the dead one is still tried */
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "'blue' could not stage");
    CHECK_EQ(e[0].stages, 5);
    e[2].plan = GOOD;
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_OK);
    EXPECT(2, published, 5);
    CHECK_EQ(e[2].served, 5);
    CHECK_EQ(e[2].served_digest, e[0].served_digest);
    CHECK_EQ(o[2].num_failures, 0);
    CHECK_EQ(o[2].error.status, 0);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_NOTHING_NEW);
    e[0].plan = e[1].plan = FAIL_STAGE; /* too few: as if nothing had been */
    CHECK_EQ(lorasync_sync(t.s, 6, &r, &err), LORASYNC_E_IO);
    EXPECT(0, behind, 5);
    EXPECT(1, behind, 5);
    EXPECT(2, published, 5);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_E_STATE);
    e[0].plan = e[1].plan = FAIL_COMMIT;
    e[2].plan             = FAIL_STAGE;
    CHECK_EQ(lorasync_sync(t.s, 6, &r, &err), LORASYNC_E_IO); /* the first failure: blue's */
    EXPECT(0, behind, 0);
    EXPECT(1, staged, 5);
    e[0].plan = e[1].plan = e[2].plan = GOOD;
    CHECK_EQ(lorasync_sync(t.s, 6, &r, &err), LORASYNC_OK);
    EXPECT(0, published, 6);
    CHECK_EQ(lorasync_sync(t.s, 6, &r, &err), LORASYNC_E_VERSION);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_begin(t.s, 7, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_wait(t.s, &r, &err), LORASYNC_OK);
    CHECK_EQ(mem.total, total);
    lorasync_close(t.s);
    CHECK_EQ(mem.live, 0);
}

static void bad_quorum(void)
{
    static trainer t;
    engine         e[NUM];
    lorasync_desc  d = plain();
    lorasync_error err;
    size_t         num = 5;
    memset(e, 0, sizeof e);
    d.quorum = 3;
    CHECK_EQ(trainer_open(&t, &d, e, 2, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "quorum is 3 with 2 engines");
    lorasync_close(t.s);
    d.quorum = -1;
    CHECK_EQ(trainer_open(&t, &d, e, 2, &err), LORASYNC_E_ARGUMENT);
    lorasync_close(t.s);
    d.quorum = 0;
    CHECK_EQ(trainer_open(&t, &d, e, 0, &err), LORASYNC_OK);
    CHECK(lorasync_get_outcomes(t.s, &num) == NULL);
    CHECK_EQ(num, 0);
    CHECK_EQ(lorasync_sync(t.s, 1, NULL, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_NOTHING_NEW);
    lorasync_close(t.s);
    CHECK(lorasync_get_outcomes(NULL, &num) == NULL);
    CHECK_EQ(lorasync_republish(NULL, &err), LORASYNC_E_ARGUMENT);
}

static void out_of_memory(void)
{
    static trainer     t;
    test_memory        mem;
    lorasync_allocator a;
    long               n;
    int                done = 0;
    a.alloc = test_memory_alloc, a.free = test_memory_free, a.user = &mem;
    for (n = 1; n < 500 && !done; n++) {
        engine         e[NUM];
        lorasync_desc  d = plain();
        lorasync_error err;
        memset(e, 0, sizeof e), memset(&mem, 0, sizeof mem);
        mem.fail_at = n, d.allocator = &a, t.s = NULL;
        done = trainer_open(&t, &d, e, NUM, &err) == LORASYNC_OK;
        if (!done) CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        lorasync_close(t.s);
        CHECK_EQ(mem.live, 0);
    }
    CHECK(done);
}

/* -- unchanged adapters */

static void skip(void)
{
    static trainer  t;
    engine          e[NUM];
    lorasync_desc   d = plain();
    lorasync_report r;
    lorasync_error  err;
    uint64_t        digest;
    memset(e, 0, sizeof e);
    d.skip_unchanged = 1, d.quorum = 2;
    REQUIRE(trainer_open(&t, &d, e, NUM, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_sync(t.s, 5, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 0);
    digest = r.digest;
    CHECK_EQ(lorasync_sync(t.s, 6, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 1);
    CHECK_EQ(r.version, 5);
    CHECK_EQ(r.digest, digest);
    CHECK_EQ(r.num_engines, 3);
    CHECK_EQ(e[0].stages, 1);
    CHECK_EQ(lorasync_session_image(t.s)->version, 5);
    CHECK_EQ(lorasync_image_verify(lorasync_session_image(t.s), &err), LORASYNC_OK);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_NOTHING_NEW);
    t.values[0][3] += 1; /* changed: 6 is still free */
    e[1].plan = FAIL_STAGE;
    CHECK_EQ(lorasync_sync(t.s, 6, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 0);
    CHECK_EQ(r.version, 6);
    CHECK_EQ(r.num_behind, 1);
    e[1].plan = GOOD;
    CHECK_EQ(lorasync_sync(t.s, 7, &r, &err), LORASYNC_OK); /* unchanged, but green is behind */
    CHECK_EQ(r.skipped, 0);
    CHECK_EQ(r.num_behind, 0);
    CHECK_EQ(e[1].served, 7);
    CHECK_EQ(lorasync_sync(t.s, 8, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 1);
    CHECK_EQ(r.version, 7);
    t.values[0][3] += 1; /* fails everywhere, then goes back to what is served: skipped, as version 7 */
    e[0].plan = e[1].plan = FAIL_STAGE;
    CHECK_EQ(lorasync_sync(t.s, 9, &r, &err), LORASYNC_E_IO);
    t.values[0][3] -= 1;
    e[0].plan = e[1].plan = GOOD;
    CHECK_EQ(lorasync_sync(t.s, 10, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 1);
    CHECK_EQ(r.version, 7);
    CHECK_EQ(lorasync_session_image(t.s)->version, 7);
    EXPECT(0, published, 7);
    CHECK_EQ(lorasync_get_outcomes(t.s, NULL)[0].num_failures, 1); /* of tries: this was none */
    CHECK_EQ(lorasync_get_outcomes(t.s, NULL)[0].error.status, 0);
    CHECK_EQ(lorasync_republish(t.s, &err), LORASYNC_NOTHING_NEW);
    t.values[0][3] += 1; /* a commit whose answer is lost: nobody knows what red serves, so nothing is skipped */
    e[0].plan = FAIL_COMMIT_LATE, e[1].plan = FAIL_COMMIT;
    CHECK_EQ(lorasync_sync(t.s, 11, &r, &err), LORASYNC_E_BUSY);
    t.values[0][3] -= 1;
    e[0].plan = e[1].plan = GOOD;
    CHECK_EQ(lorasync_sync(t.s, 12, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 0);
    CHECK_EQ(e[0].served, 12);
    CHECK_EQ(e[0].served_digest, e[1].served_digest);
    lorasync_close(t.s);
    d.skip_unchanged = 0;
    memset(e, 0, sizeof e);
    REQUIRE(trainer_open(&t, &d, e, NUM, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_sync(t.s, 1, &r, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_sync(t.s, 2, &r, &err), LORASYNC_OK);
    CHECK_EQ(r.skipped, 0);
    CHECK_EQ(e[0].served, 2);
    lorasync_close(t.s);
}

/* -- three ranks: the same answers everywhere, the engines on rank 1 */

typedef struct shared_state {
    engine          e[NUM];
    lorasync_report r[3][8];
    int             status[3][8];
} shared_state;

static void rank_publishes(rank_context *c)
{
    shared_state    *shared   = (shared_state *)c->user;
    static const int quiet[8] = {0, 1, 0, 0, 0, 0, 0, 0}; /* steps that change nothing */
    trainer         *t        = (trainer *)calloc(1, sizeof *t);
    lorasync_desc    d        = plain();
    lorasync_error   err;
    engine           none[NUM];
    int              i;
    size_t           num = 7;
    memset(none, 0, sizeof none);
    d.comm = &c->comm, d.root = 1, d.quorum = c->rank == 1 ? 2 : 0, d.skip_unchanged = c->rank == 1;
    shared->status[c->rank][7] = trainer_open(t, &d, c->rank == 1 ? shared->e : none, c->rank == 1 ? NUM : 0, &err);
    for (i = 0; i < 6 && shared->status[c->rank][7] == LORASYNC_OK; i++) {
        if (!quiet[i]) t->values[0][0] += 1;
        if (c->rank == 1)
            shared->e[2].plan = i == 2 ? FAIL_STAGE : GOOD, shared->e[1].plan = i == 4 ? FAIL_STAGE : GOOD,
            shared->e[0].plan = i == 4 ? FAIL_STAGE : GOOD;
        shared->status[c->rank][i] = lorasync_sync(t->s, (uint64_t)i + 1, &shared->r[c->rank][i], &err);
        if (c->rank == 1) shared->e[2].plan = GOOD;
        if (i == 2 && lorasync_republish(t->s, &err) != LORASYNC_OK) shared->status[c->rank][6]++;
        if (i == 3 && lorasync_republish(t->s, &err) != LORASYNC_NOTHING_NEW) shared->status[c->rank][6]++;
        if (i == 4 && lorasync_republish(t->s, &err) != LORASYNC_E_STATE) shared->status[c->rank][6]++;
        if ((lorasync_get_outcomes(t->s, &num) != NULL) != (c->rank == 1) || num != (c->rank == 1 ? NUM : 0))
            shared->status[c->rank][6]++;
    }
    lorasync_close(t->s);
    free(t);
}

static void ranks(void)
{
    static shared_state shared;
    int                 r, i;
    memset(&shared, 0, sizeof shared);
    run_threads(3, rank_publishes, &shared);
    for (r = 0; r < 3; r++) {
        CHECK_EQ(shared.status[r][7], LORASYNC_OK);
        CHECK_EQ(shared.status[r][6], 0);
        for (i = 0; i < 6; i++) {
            const lorasync_report *p = &shared.r[r][i];
            CHECK_EQ(shared.status[r][i], i == 4 ? LORASYNC_E_IO : LORASYNC_OK);
            if (i == 4) continue;
            CHECK_EQ(p->skipped, i == 1);
            CHECK_EQ(p->version, i == 1 ? 1 : i + 1);
            CHECK_EQ(p->num_behind, i == 2);
            CHECK_EQ(p->num_engines, i == 2 ? 2 : 3);
            CHECK_EQ(p->digest, shared.r[0][i].digest);
        }
    }
    for (i = 0; i < NUM; i++) CHECK_EQ(shared.e[i].served, 6);
    CHECK_EQ(shared.e[2].served_digest, shared.r[0][5].digest);
}

/* -- which tensors changed */

static void changes(void)
{
    static trainer        t;
    lorasync_desc         d = plain();
    lorasync_error        err;
    const lorasync_image *image;
    lorasync_image        bare;
    uint64_t              old[2];
    uint32_t              indices[2] = {9, 9};
    size_t                num        = 9, i;
    int                   which;
    REQUIRE(trainer_open(&t, &d, NULL, 0, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_sync(t.s, 1, NULL, &err), LORASYNC_OK);
    for (which = 0; which < 4; which++) {
        size_t expected = 0;
        image           = lorasync_session_image(t.s);
        REQUIRE(image && image->tensor_digests && image->num_tensors == 2);
        memcpy(old, image->tensor_digests, sizeof old);
        if (which & 1) t.values[0][63] += 1;
        if (which & 2) t.values[1][0] += 1;
        CHECK_EQ(lorasync_sync(t.s, (uint64_t)which + 2, NULL, &err), LORASYNC_OK);
        image = lorasync_session_image(t.s);
        CHECK_EQ(lorasync_image_changes(image, old, indices, &num, &err), LORASYNC_OK);
        for (i = 0; i < 2; i++) {
            int is_b = strstr(image->tensors[i].name, "lora_B") != NULL;
            if (!(which >> is_b & 1)) continue;
            CHECK(expected < num && indices[expected] == i);
            expected++;
        }
        CHECK_EQ(num, expected);
    }
    num = 9;
    CHECK_EQ(lorasync_image_changes(NULL, old, indices, &num, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_image_changes(image, NULL, indices, &num, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_image_changes(image, old, NULL, &num, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_image_changes(image, old, indices, NULL, &err), LORASYNC_E_ARGUMENT);
    bare                = *image; /* as lorasync_image_parse makes it */
    bare.tensor_digests = NULL;
    memcpy(old, image->tensor_digests, sizeof old);
    old[1]++;
    CHECK_EQ(lorasync_image_changes(&bare, old, indices, &num, &err), LORASYNC_OK);
    CHECK_EQ(num, 1);
    CHECK_EQ(indices[0], 1);
    for (i = 0; i < 2; i++) {
        bare.payload   = i ? image->payload : NULL;
        bare.on_device = (int)i;
        num            = 9;
        CHECK_EQ(lorasync_image_changes(&bare, old, indices, &num, &err), LORASYNC_E_STATE);
        CHECK_HAS(err.text, "tensor_digests");
        CHECK_EQ(num, 9);
    }
    lorasync_close(t.s);
}

int main(void)
{
    RUN(all_outcomes);
    RUN(error_texts);
    RUN(death);
    RUN(bad_quorum);
    RUN(out_of_memory);
    RUN(skip);
    RUN(ranks);
    RUN(changes);
    return test_summary("test_publish");
}
