/* Sessions that gather straight into the slot of shared memory where engines read: no version that an engine holds is
   ever written to, whatever fails in between. Ranks are processes; the root's process has the engine, too.
   Included by test_in_place_cuda.c, which defines IN_PLACE_CUDA: parameters, image and slots are then in device
   memory. */
#define _DEFAULT_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

static int is_blind;    /* this process can open no slot */
static int num_failing; /* ... the next so many times */

static int open_if_seen(const char *name, int flags, mode_t mode)
{
    if (!strchr(name, '@') || (!is_blind && num_failing == 0)) return shm_open(name, flags, mode);
    num_failing -= !is_blind;
    errno = is_blind ? EACCES : EMFILE;
    return -1;
}

#define shm_open open_if_seen
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#undef shm_open

#include <math.h>

#include "test.h"
#include "ranks.h"
#include "pieces.h"
#ifdef IN_PLACE_CUDA
#include IN_PLACE_CUDA
#endif

enum {
    ROWS     = 24,
    COLUMNS  = 40,
    MODULES  = 3,
    VERSIONS = 24,
    HELD     = 5
};

typedef struct scene {
    const char *name; /* of the shared memory */
    int         no_direct, skip_unchanged;
    int         fails_at; /* version at which another engine fails: its stage; 100 more: its commit */
    int         nan_at;   /* version for which rank 0 has a NaN */
    int         same_at;  /* version that repeats the one before */
    int         blind;    /* the last rank can map no slot */
    int         hold;     /* the engine keeps the last versions pinned */
    int         stale_at; /* before this version the root asks for the one before again, or waits without begin, while
                             the others go on */
} scene;

/* -- what the parameters are */

static float element(uint64_t version, int module, int b, int row, int column)
{
    return (
        float)((version * 7919 + (uint64_t)module * 613 + (uint64_t)b * 257 + (uint64_t)row * 31 + (uint64_t)column) %
               2048);
}

static void set_parts(float *part, int rank, int world, uint64_t version)
{
    int m, b, r, c;
    for (m = 0; m < MODULES; m++)
        for (b = 0; b < 2; b++) {
            int          rows = b ? COLUMNS : ROWS, columns = b ? ROWS : COLUMNS;
            int64_t      shape[2];
            lorasync_box box;
            shape[0] = rows, shape[1] = columns;
            box = lorasync_shard(lorasync_whole(shape, 2), 0, rank, world);
            for (r = 0; r < (int)box.len[0]; r++)
                for (c = 0; c < columns; c++)
                    part[((m * 2 + b) * ROWS * COLUMNS) + r * columns + c] =
                        element(version, m, b, (int)box.off[0] + r, c);
        }
}

static void add_parts(lorasync_session *s, float *part, int rank, int world)
{
    lorasync_error err;
    char           name[100];
    int            m, b;
    for (m = 0; m < MODULES; m++)
        for (b = 0; b < 2; b++) {
            lorasync_piece p;
            snprintf(name, sizeof name, "model.layers.%d.mlp.up_proj.lora_%c.default.weight", m, b ? 'B' : 'A');
            p = shard_piece(name, 2, b ? COLUMNS : ROWS, b ? ROWS : COLUMNS, rank, world,
                            part + (m * 2 + b) * ROWS * COLUMNS);
            CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
        }
}

/* Where the parameters live. */
static float *part_memory(void)
{
    size_t n = MODULES * 2 * ROWS * COLUMNS * 4;
    void  *p = NULL;
#ifdef IN_PLACE_CUDA
    if (cudaMalloc(&p, n) != cudaSuccess) p = NULL;
#else
    p = calloc(1, n);
#endif
    CHECK(p != NULL);
    return (float *)p;
}

static void part_free(float *p)
{
#ifdef IN_PLACE_CUDA
    cudaFree(p);
#else
    free(p);
#endif
}

static void copy_bytes(void *to, const void *from, size_t num_bytes)
{
#ifdef IN_PLACE_CUDA
    CHECK_EQ(cudaMemcpy(to, from, num_bytes, cudaMemcpyDefault), cudaSuccess);
#else
    memcpy(to, from, num_bytes);
#endif
}

/* 1 if the adapter is exactly that version's. */
static int is_version(const lorasync_adapter *a, uint64_t version, uint64_t content)
{
    char  name[160];
    float values[ROWS * COLUMNS];
    int   m, b, r, c;
    if (!a || a->version != version || a->image->num_tensors != 2 * MODULES) return 0;
    for (m = 0; m < MODULES; m++)
        for (b = 0; b < 2; b++) {
            const lorasync_tensor *t;
            int                    rows = b ? COLUMNS : ROWS, columns = b ? ROWS : COLUMNS;
            snprintf(name, sizeof name, "base_model.model.model.layers.%d.mlp.up_proj.lora_%c.weight", m,
                     b ? 'B' : 'A');
            t = lorasync_find(a, name);
            if (!t || t->shape[0] != rows || t->shape[1] != columns) return 0;
            copy_bytes(values, t->data, sizeof values);
            for (r = 0; r < rows; r++)
                for (c = 0; c < columns; c++)
                    if (values[r * columns + c] != element(content, m, b, r, c)) return 0;
        }
    return 1;
}

/* -- another engine, which fails when it is told to */

typedef struct other_engine {
    const scene *s;
    uint64_t     version;
} other_engine;

static lorasync_status other_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    other_engine *o = (other_engine *)user;
    o->version      = image->version;
    return (int)image->version == o->s->fails_at ? test_refuse(err, LORASYNC_E_IO, "told to fail") : LORASYNC_OK;
}

static lorasync_status other_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    other_engine *o = (other_engine *)user;
    (void)adapter;
    return (int)version + 100 == o->s->fails_at ? test_refuse(err, LORASYNC_E_IO, "told to fail") : LORASYNC_OK;
}

/* -- a run */

typedef struct reader {
    lorasync_engine        *engine;
    const lorasync_adapter *held[HELD];
    uint64_t                version[HELD], content[HELD];
    int                     next;
} reader;

static void check_held(const reader *r)
{
    int i;
    for (i = 0; i < HELD; i++)
        if (r->held[i]) CHECK(is_version(r->held[i], r->version[i], r->content[i]));
}

static void look(reader *r, const scene *s, uint64_t version, uint64_t content)
{
    const lorasync_adapter *a;
    lorasync_error          err;
    CHECK(lorasync_engine_poll(r->engine, 0, &err) >= 0);
    a = lorasync_acquire(r->engine, "default");
    CHECK(is_version(a, version, content));
    check_held(r);
    if (!s->hold || !a || r->version[(r->next + HELD - 1) % HELD] == version) {
        lorasync_release(a);
        return;
    }
    lorasync_release(r->held[r->next]);
    r->held[r->next]    = a;
    r->version[r->next] = version;
    r->content[r->next] = content;
    r->next             = (r->next + 1) % HELD;
}

static void let_go(reader *r)
{
    int i;
    for (i = 0; i < HELD - 1; i++) {
        lorasync_release(r->held[(r->next + i) % HELD]);
        r->held[(r->next + i) % HELD] = NULL;
    }
}

static void open_reader(reader *r, const scene *s)
{
    lorasync_engine_desc d;
    lorasync_error       err;
    memset(r, 0, sizeof *r);
    memset(&d, 0, sizeof d);
    d.shm = s->name;
#ifdef IN_PLACE_CUDA
    d.accept_device = 1;
#endif
    CHECK_EQ(lorasync_engine_open(&d, &r->engine, &err), LORASYNC_OK);
}

static void close_reader(reader *r)
{
    int i;
    check_held(r);
    for (i = 0; i < HELD; i++) lorasync_release(r->held[i]);
    lorasync_engine_close(r->engine);
}

static lorasync_session *open_session(const rank_context *x, const scene *s, other_engine *other, float *part)
{
    lorasync_desc      d;
    lorasync_shm_desc  sd;
    lorasync_transport t;
    lorasync_session  *session = NULL;
    lorasync_error     err;
#ifdef IN_PLACE_CUDA
    lorasync_cuda cuda;
#endif
    memset(&d, 0, sizeof d);
    memset(&sd, 0, sizeof sd);
#ifdef IN_PLACE_CUDA
    memset(&cuda, 0, sizeof cuda);
    cuda.keep_on_device = 1;
    d.cuda = sd.cuda = &cuda;
#endif
    d.comm           = &x->comm;
    d.lora_alpha     = 16;
    d.no_direct      = s->no_direct;
    d.skip_unchanged = s->skip_unchanged;
    d.timeout_ms     = test_ms(20000);
    CHECK_EQ(lorasync_open(&d, &session, &err), LORASYNC_OK);
    add_parts(session, part, x->rank, x->world);
    if (x->rank == 0) {
        sd.name = s->name;
        CHECK_EQ(lorasync_shm_open(&sd, &t, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_attach(session, &t, &err), LORASYNC_OK);
        memset(&t, 0, sizeof t);
        t.size = sizeof t, t.name = "other", t.user = other, t.stage = other_stage, t.commit = other_commit;
        other->s = s;
        if (s->fails_at) CHECK_EQ(lorasync_attach(session, &t, &err), LORASYNC_OK);
    }
    is_blind = s->blind && x->rank > 0 && x->rank == x->world - 1;
    if (lorasync_compile(session, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    return session;
}

static int is_seen_by_all(const scene *s, const rank_context *x) { return !s->blind || x->world == 1 || s->no_direct; }

static void run_scene(rank_context *x)
{
    const scene      *s = (const scene *)x->user;
    float            *part, values[MODULES * 2 * ROWS * COLUMNS];
    other_engine      other;
    reader            r;
    lorasync_session *session;
    uint64_t          v, served = 0, content = 0;
    memset(&r, 0, sizeof r);
    memset(values, 0, sizeof values);
#ifdef IN_PLACE_CUDA
    choose_gpu(x->rank);
#endif
    part    = part_memory();
    session = open_session(x, s, &other, part);
    if (x->rank == 0) open_reader(&r, s);
    for (v = 1; v <= VERSIONS; v++) {
        lorasync_report report;
        lorasync_error  err;
        lorasync_status status;
        int             nan = (int)v == s->nan_at, same = (int)v == s->same_at;
        set_parts(values, x->rank, x->world, same ? v - 1 : v);
        if (nan && x->rank == 0) values[5] = -(float)NAN;
        copy_bytes(part, values, sizeof values);
        if (s->stale_at && ((int)v == s->stale_at || (int)v == s->stale_at + 1)) {
            if (x->rank > 0) lorasync_begin(session, v, &err);
            else if ((int)v == s->stale_at) CHECK_EQ(lorasync_begin(session, v - 1, &err), LORASYNC_E_VERSION);
            CHECK(lorasync_wait(session, &report, &err) < 0);
            if (x->rank == 0) look(&r, s, served, content);
        }
        lorasync_begin(session, v, &err);
        if (x->rank == 0) check_held(&r); /* while others pack */
        if (x->rank == 0 && served) look(&r, s, served, content);
        if (x->rank == 0 && (int)v == s->fails_at) let_go(&r); /* now there are slots to choose from */
        status = lorasync_wait(session, &report, &err);
        if (nan) {
            CHECK_EQ(status, LORASYNC_E_NAN);
        } else if ((int)v == s->fails_at) {
            CHECK_EQ(status, LORASYNC_E_IO);
        } else if ((int)v + 100 == s->fails_at) {
            CHECK_EQ(status, LORASYNC_E_IO);
            served = content = v; /* this one was told first */
        } else {
            CHECK_EQ(status, LORASYNC_OK);
            CHECK_EQ(report.skipped, same && s->skip_unchanged);
            if (!report.skipped) served = v, content = same ? v - 1 : v;
            /* after a publication that failed, one version takes the way through the plan's own memory */
            if (!report.skipped)
                CHECK_EQ(report.in_place, is_seen_by_all(s, x) && !(s->fails_at && ((int)v == s->fails_at % 100 + 1)));
            if (v % 5 == 0) CHECK_EQ(lorasync_republish(session, &err), LORASYNC_NOTHING_NEW);
        }
        if (x->rank == 0 && served) look(&r, s, served, content);
#ifndef IN_PLACE_CUDA
        CHECK((lorasync_session_image(session) != NULL) == (x->rank == 0 && status == LORASYNC_OK));
        if (x->rank == 0 && status == LORASYNC_OK)
            CHECK_EQ(lorasync_image_verify(lorasync_session_image(session), &err), LORASYNC_OK); /* good until the next
                                                                                                    begin */
#endif
    }
    lorasync_close(session);
    if (x->rank == 0 && served) look(&r, s, served, content);
    if (x->rank == 0) close_reader(&r);
    part_free(part);
#ifdef FAKE_SLICE
    if (x->rank > 0)
        CHECK_EQ(fake_cuda_left(), 0); /* what the engine had open when the session closed is left to the
                                                       process */
#endif
}

static void play(const scene *like)
{
    static int number;
    int        world;
    for (world = 1; world <= 4; world++) {
        scene s = *like;
        char  name[60];
        snprintf(name, sizeof name, "test-in-place-%ld-%d", (long)getpid(), number++);
        s.name = name;
#ifdef FAKE_SLICE
        fake_cuda_share();
        fake_cuda_reset();
        fake_cuda_reclaim();
#endif
        CHECK_EQ(run_processes(world, run_scene, &s), 0);
        lorasync_shm_remove(name, NULL);
    }
}

static void each_version(void)
{
    scene s;
    memset(&s, 0, sizeof s);
    play(&s);
    s.hold = 1;
    play(&s);
}

static void over_messages(void)
{
    scene s;
    memset(&s, 0, sizeof s);
    s.no_direct = 1;
    s.hold      = 1;
    play(&s);
}

static void failures_between(void)
{
    scene s;
    memset(&s, 0, sizeof s);
    s.hold     = 1;
    s.nan_at   = 4;
    s.fails_at = 9;
    play(&s);
    s.fails_at = 109;
    play(&s);
    s.no_direct = 1;
    play(&s);
}

static void nothing_changed(void)
{
    scene s;
    memset(&s, 0, sizeof s);
    s.same_at = 6;
    play(&s);
    s.skip_unchanged = 1;
    s.hold           = 1;
    play(&s);
}

/* What the others have packed for a run that the root refuses goes nowhere. */
static void root_is_behind(void)
{
    scene s;
    memset(&s, 0, sizeof s);
    s.stale_at = 7;
    s.hold     = 1;
    play(&s);
    s.no_direct = 1;
    play(&s);
}

/* Placing directly, a rank that is a run ahead writes its sums elsewhere than those that a slower one still reads. */
static void check_sums(lorasync_plan *plan, int rank)
{
    const uint64_t *now, *next;
    CHECK(plan->direct);
    now = lorasynci_sums_of(plan, rank);
    plan->run++;
    next = lorasynci_sums_of(plan, rank);
    plan->run--;
    CHECK((size_t)(now < next ? next - now : now - next) >= plan->num_image_tensors);
}

/* Ranks that would write to different memory do not agree, and what is served stays; the next run is whole again. */
static void aim_rank(rank_context *x)
{
    const scene      *s = (const scene *)x->user;
    float            *part, values[MODULES * 2 * ROWS * COLUMNS];
    other_engine      other;
    reader            r;
    lorasync_session *session;
    uint64_t          v;
    memset(values, 0, sizeof values);
#ifdef IN_PLACE_CUDA
    choose_gpu(x->rank);
#endif
    part    = part_memory();
    session = open_session(x, s, &other, part);
    check_sums(session->plan, x->rank);
    if (x->rank == 0) open_reader(&r, s);
    for (v = 1; v <= 6; v++) {
        lorasync_error  err;
        lorasync_status status;
        set_parts(values, x->rank, x->world, v);
        copy_bytes(part, values, sizeof values);
        if (v == 4) CHECK(session->aim.mark != 0);
        session->aim.mark ^= (uint64_t)(v == 4 && x->rank == 1);
        lorasync_begin(session, v, &err);
        status = lorasync_wait(session, NULL, &err);
        session->aim.mark ^= (uint64_t)(v == 4 && x->rank == 1);
        CHECK_EQ(status, v == 4 ? LORASYNC_E_DISAGREE : LORASYNC_OK);
        if (x->rank == 0) look(&r, s, v == 4 ? 3 : v, v == 4 ? 3 : v);
    }
    lorasync_close(session);
    if (x->rank == 0) close_reader(&r);
    part_free(part);
}

static void all_aim_at_the_same(void)
{
    scene s;
    char  name[60];
    memset(&s, 0, sizeof s);
    snprintf(name, sizeof name, "test-in-place-%ld-aim", (long)getpid());
    s.name = name;
#ifdef FAKE_SLICE
    fake_cuda_share();
    fake_cuda_reset();
    fake_cuda_reclaim();
#endif
    CHECK_EQ(run_processes(2, aim_rank, &s), 0);
    lorasync_shm_remove(name, NULL);
}

/* A rank that cannot map a slot, and publishing goes on as without. */
TEST_UNUSED static void one_is_blind(void)
{
    scene s;
    memset(&s, 0, sizeof s);
    s.blind = 1;
    play(&s);
    s.no_direct = 1;
    play(&s);
}

/* A new publisher that cannot look at what is served does not take it for nothing. */
TEST_UNUSED static void served_version_is_not_seen(void)
{
    static const char   config[] = "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\"]}";
    lorasync_tensor     tensor;
    lorasync_image_desc d;
    lorasync_shm_desc   sd;
    lorasync_transport  t;
    lorasync_image     *image = NULL;
    lorasync_error      err;
    char                name[60];
    float               payload[4] = {1, 2, 3, 4};
    memset(&tensor, 0, sizeof tensor);
    memset(&d, 0, sizeof d);
    memset(&sd, 0, sizeof sd);
    tensor.name = "a.weight", tensor.dtype = LORASYNC_F32, tensor.ndim = 1, tensor.shape[0] = 4;
    d.tensors = &tensor, d.num_tensors = 1, d.adapter = "default";
    snprintf(name, sizeof name, "test-in-place-%ld-seen", (long)getpid());
    sd.name = name;
    REQUIRE(lorasync_image_layout(&d, NULL, &image, &err) == LORASYNC_OK);
    image->config_json = config;
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, 5, lorasync_image_digest(image, NULL));
    REQUIRE(lorasync_shm_open(&sd, &t, &err) == LORASYNC_OK);
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_OK);
    CHECK_EQ(t.commit(t.user, "default", 5, &err), LORASYNC_OK);
    t.close(t.user);
    REQUIRE(lorasync_shm_open(&sd, &t, &err) == LORASYNC_OK);
    lorasync_image_stamp(image, 3, image->digest);
    num_failing = 1; /* the look at what is served */
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_IO);
    num_failing = 0;
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_VERSION);
    t.close(t.user);
    lorasync_image_free(image);
    lorasync_shm_remove(name, NULL);
}

int main(void)
{
#ifdef IN_PLACE_CUDA
    if (!can_run()) {
        test_skipped++;
        return test_summary("test_in_place_cuda");
    }
#endif
    RUN(each_version);
    RUN(over_messages);
    RUN(failures_between);
    RUN(nothing_changed);
    RUN(root_is_behind);
    RUN(all_aim_at_the_same);
#ifdef IN_PLACE_CUDA
    return test_summary("test_in_place_cuda");
#else
    RUN(one_is_blind);
    RUN(served_version_is_not_seen);
    return test_summary("test_in_place");
#endif
}
