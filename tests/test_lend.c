/* A transport of one's own that lends the memory in which the next version is made: shared memory with a name, or what
   only the root reaches. Ranks are processes, or threads; the root's process looks at what is served. Written with the
   public part of the header alone. Included by test_lend_cuda.c, which defines LEND_CUDA: parameters, image and lent
   memory are then in device memory. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* nanosleep, under -std=c99 */
#endif
#include "lorasync.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>

#include "test.h"
#include "ranks.h"
#include "pieces.h"
#ifdef LEND_CUDA
#include LEND_CUDA
#endif

enum {
    ROWS     = 24,
    COLUMNS  = 40,
    VERSIONS = 16,
    BUFFERS  = 6,
    HELD     = 2,
    HEAD     = 4096, /* room for the header in front of a payload */
    SIZE     = 32768
};

typedef struct scene {
    int            no_direct, threads, skip_unchanged, same_at;
    lorasync_reach reach;
    int            refuses;     /* 1: lend has nothing; -1: lend fails */
    int            nan_at;      /* version for which rank 0 has a NaN */
    int            fails_at;    /* version that another engine does not take */
    int            doubtful_at; /* version whose commit fails here, though it is served; one engine of two is enough */
    int            defect;      /* 1: not aligned; 2: no id; 3: it ends before what is lent does */
    int            old, republish;
} scene;

/* -- the parameters */

static float element(uint64_t version, int b, int row, int column)
{
    return (float)((version * 7919 + (uint64_t)b * 257 + (uint64_t)row * 31 + (uint64_t)column) % 2048);
}

static lorasync_box box_of(int b, int rank, int world)
{
    int64_t shape[2];
    shape[0] = b ? COLUMNS : ROWS, shape[1] = b ? ROWS : COLUMNS;
    return lorasync_shard(lorasync_whole(shape, 2), 0, rank, world);
}

static lorasync_piece part_of(int b, int rank, int world, float *part)
{
    return shard_piece(b ? "m.up_proj.lora_B.default.weight" : "m.up_proj.lora_A.default.weight", 2, b ? COLUMNS : ROWS,
                       b ? ROWS : COLUMNS, rank, world, part + b * ROWS * COLUMNS);
}

static void set_parts(float *part, int rank, int world, uint64_t version)
{
    int b, r, c;
    for (b = 0; b < 2; b++) {
        lorasync_box box = box_of(b, rank, world);
        for (r = 0; r < (int)box.len[0]; r++)
            for (c = 0; c < (int)box.len[1]; c++)
                part[b * ROWS * COLUMNS + r * (int)box.len[1] + c] = element(version, b, (int)box.off[0] + r, c);
    }
}

static void *memory_get(size_t n)
{
    void *p = NULL;
#ifdef LEND_CUDA
    if (cudaMalloc(&p, n) != cudaSuccess) p = NULL;
#else
    p = calloc(1, n);
#endif
    CHECK(p != NULL);
    return p;
}

static void memory_put(void *p)
{
#ifdef LEND_CUDA
    cudaFree(p);
#else
    free(p);
#endif
}

static void copy_bytes(void *to, const void *from, size_t num_bytes)
{
#ifdef LEND_CUDA
    CHECK_EQ(cudaMemcpy(to, from, num_bytes, cudaMemcpyDefault), cudaSuccess);
#else
    memcpy(to, from, num_bytes);
#endif
}

/* -- the transport: buffers, of which one is served, some are pinned by readers, and one is lent */

typedef struct arena {
    const scene *s;
    char         name[80];
    char        *memory; /* host: all buffers, one behind the other */
    char        *device[BUFFERS];
    char         header[BUFFERS][HEAD]; /* device: beside the payload */
    size_t       header_bytes, payload_bytes;
    uint64_t     version[BUFFERS];
    int          pinned[BUFFERS], has_doubted;
    int          served, staged, lent; /* buffers, or -1 */
    const void  *session;
    int          num_lent, num_taken_back, num_copied, num_attached, num_detached, num_closed, left_behind;
} arena;

static char *payload_of(arena *a, int i) { return a->device[i] ? a->device[i] : a->memory + (size_t)i * SIZE + HEAD; }

static int find_free(const arena *a)
{
    int i;
    for (i = 0; i < BUFFERS; i++)
        if (i != a->served && i != a->staged && i != a->lent && !a->pinned[i]) return i;
    return -1;
}

static int find_payload(arena *a, const void *payload)
{
    int i;
    for (i = 0; i < BUFFERS; i++)
        if (payload_of(a, i) == (const char *)payload) return i;
    return -1;
}

static void check_request(arena *a, const lorasync_loan_request *want)
{
    size_t k;
    CHECK_EQ(want->size, sizeof *want);
    CHECK_TEXT(want->image->adapter, "default");
    CHECK(want->image->config_json && strstr(want->image->config_json, "\"peft_type\""));
    CHECK(want->image->header_bytes <= HEAD && want->image->payload_bytes == 2 * ROWS * COLUMNS * 4);
    CHECK(want->num_open <= 4);
    for (k = 0; k < want->num_open; k++) CHECK(want->open_ids[k] >= 1 && want->open_ids[k] <= BUFFERS);
#ifdef LEND_CUDA
    CHECK_EQ(want->on_device, 1);
#else
    CHECK_EQ(want->on_device, 0);
#endif
    CHECK_EQ(a->lent, -1); /* one at a time */
}

static lorasync_status arena_lend(void *user, const lorasync_loan_request *want, lorasync_loan *out,
                                  lorasync_error *err)
{
    arena *a = (arena *)user;
    int    i = find_free(a);
    check_request(a, want);
    if (a->s->refuses < 0) {
        snprintf(err->text, sizeof err->text, "the pool is closed");
        return err->status = LORASYNC_E_IO;
    }
    if (a->s->refuses || i < 0) return LORASYNC_NOTHING_NEW;
    a->lent = i;
    a->num_lent++;
    out->payload = payload_of(a, i);
    out->id      = (uint64_t)i + 1;
    out->reach   = a->s->reach;
    if (a->s->defect == 1) out->payload = (char *)out->payload + 4;
    if (a->s->defect == 2) out->id = 0;
#ifdef LEND_CUDA
    CHECK_EQ(cudaIpcGetMemHandle((cudaIpcMemHandle_t *)(void *)out->ipc_handle, out->payload), cudaSuccess);
#else
    snprintf(out->name, sizeof out->name, "%s", a->name);
    out->offset = (uint64_t)i * SIZE + HEAD + (a->s->defect == 3 ? (uint64_t)BUFFERS * SIZE : 0);
#endif
    return LORASYNC_OK;
}

static void arena_take_back(void *user, const char *adapter, const lorasync_loan *loan)
{
    arena *a = (arena *)user;
    CHECK_TEXT(adapter, "default");
    CHECK(a->lent >= 0 && (a->s->defect == 2 || loan->id == (uint64_t)a->lent + 1));
    a->lent = -1;
    a->num_taken_back++;
}

static lorasync_status arena_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    arena *a  = (arena *)user;
    int    i  = find_payload(a, image->payload);
    a->staged = -1;
    if (i >= 0) {
        CHECK(i == a->lent || i == a->served); /* the latter: served once more */
    } else {
        i = find_free(a);
        if (i < 0) return err->status = LORASYNC_E_BUSY;
        copy_bytes(payload_of(a, i), image->payload, image->payload_bytes);
        a->num_copied++;
    }
    memcpy(a->header[i], image->header, image->header_bytes);
    a->header_bytes  = image->header_bytes;
    a->payload_bytes = image->payload_bytes;
    a->staged        = i;
    return LORASYNC_OK;
}

static lorasync_status arena_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    arena *a = (arena *)user;
    (void)adapter;
    CHECK(a->staged >= 0);
    a->served             = a->staged;
    a->version[a->served] = version;
    a->staged             = -1;
    if ((int)version == a->s->doubtful_at && !a->has_doubted) {
        a->has_doubted = 1; /* the next try goes well */
        snprintf(err->text, sizeof err->text, "no answer");
        return err->status = LORASYNC_E_IO;
    }
    if (a->served == a->lent) a->lent = -1;
    return LORASYNC_OK;
}

static void arena_abort(void *user, const char *adapter, uint64_t version)
{
    (void)adapter, (void)version;
    ((arena *)user)->staged = -1;
}

static lorasync_status arena_attach(void *user, const void *session, const char *adapter, lorasync_error *err)
{
    arena *a = (arena *)user;
    if (a->session) {
        snprintf(err->text, sizeof err->text, "somebody has it");
        return err->status = LORASYNC_E_BUSY;
    }
    CHECK_TEXT(adapter, "default");
    a->session = session;
    a->num_attached++;
    return LORASYNC_OK;
}

static void arena_detach(void *user, const void *session, const char *adapter, int left_behind)
{
    arena *a = (arena *)user;
    CHECK(session == a->session);
    CHECK_TEXT(adapter, "default");
    CHECK_EQ(a->num_closed, 0);
    a->session     = NULL;
    a->lent        = -1;
    a->left_behind = left_behind;
    a->num_detached++;
}

static void arena_close(void *user) { ((arena *)user)->num_closed++; }

static void arena_open(arena *a, const scene *s)
{
    static int number;
    int        i;
    memset(a, 0, sizeof *a);
    a->s      = s;
    a->served = a->staged = a->lent = -1;
    snprintf(a->name, sizeof a->name, "/test-lend-%ld-%d", (long)getpid(), number++);
#ifdef LEND_CUDA
    for (i = 0; i < BUFFERS; i++) a->device[i] = (char *)memory_get(SIZE);
#else
    shm_unlink(a->name); /* a run with this pid may have been killed */
    i = shm_open(a->name, O_RDWR | O_CREAT | O_EXCL, 0600);
    CHECK(i >= 0 && ftruncate(i, BUFFERS * SIZE) == 0);
    a->memory = (char *)mmap(NULL, BUFFERS * SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, i, 0);
    CHECK(a->memory != (char *)MAP_FAILED);
    close(i);
#endif
}

static void arena_end(arena *a, int left_behind)
{
    int i;
    CHECK_EQ(a->num_attached, a->num_detached);
    CHECK_EQ(a->num_closed, 1);
    CHECK_EQ(a->left_behind, left_behind);
    if (a->memory) munmap(a->memory, BUFFERS * SIZE), shm_unlink(a->name);
    for (i = 0; i < BUFFERS; i++)
        if (a->device[i]) memory_put(a->device[i]);
}

static lorasync_transport arena_transport(arena *a)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size = a->s->old ? offsetof(lorasync_transport, lend) : sizeof t;
    t.name = "arena", t.user = a;
    t.stage = arena_stage, t.commit = arena_commit, t.abort = arena_abort, t.close = arena_close;
    t.lend = arena_lend, t.take_back = arena_take_back, t.attach = arena_attach, t.detach = arena_detach;
    t.carries = LORASYNC_CARRIES_ADAPTER | LORASYNC_CARRIES_DEVICE;
    return t;
}

/* 1 if a buffer holds exactly that version's bytes: its tensors, and a digest that fits. */
static int is_version(arena *a, int i, uint64_t version)
{
    char           *bytes = (char *)malloc(a->header_bytes + a->payload_bytes);
    lorasync_image *image = NULL;
    int             k, good, r, c;
    memcpy(bytes, a->header[i], a->header_bytes);
    copy_bytes(bytes + a->header_bytes, payload_of(a, i), a->payload_bytes);
    good = lorasync_image_parse(bytes, a->header_bytes + a->payload_bytes, NULL, &image, NULL) == LORASYNC_OK &&
           image->version == a->version[i] && lorasync_image_verify(image, NULL) == LORASYNC_OK;
    for (k = 0; k < 2 && good; k++) {
        const lorasync_tensor *t = lorasync_image_find(image, k ? "base_model.model.m.up_proj.lora_B.weight"
                                                                : "base_model.model.m.up_proj.lora_A.weight");
        const float           *v = t ? (const float *)t->data : NULL;
        good                     = v != NULL;
        for (r = 0; good && r < (k ? COLUMNS : ROWS); r++)
            for (c = 0; c < (k ? ROWS : COLUMNS); c++) good &= *v++ == element(version, k, r, c);
    }
    lorasync_image_free(image);
    free(bytes);
    return good;
}

/* -- another engine */

static lorasync_status other_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    const scene *s = (const scene *)user;
    if ((int)image->version != s->fails_at) return LORASYNC_OK;
    snprintf(err->text, sizeof err->text, "told to fail");
    return err->status = LORASYNC_E_IO;
}

static lorasync_session *open_session(const rank_context *x, arena *a, const scene *s, float *part)
{
    lorasync_desc      d;
    lorasync_piece     p;
    lorasync_transport t;
    lorasync_session  *session = NULL;
    lorasync_error     err;
    int                b;
#ifdef LEND_CUDA
    lorasync_cuda cuda;
    memset(&cuda, 0, sizeof cuda);
    cuda.keep_on_device = 1;
#endif
    memset(&d, 0, sizeof d);
#ifdef LEND_CUDA
    d.cuda = &cuda;
#endif
    d.comm = &x->comm, d.lora_alpha = 16, d.no_direct = s->no_direct, d.timeout_ms = 20000;
    d.skip_unchanged = s->skip_unchanged;
    d.quorum         = s->doubtful_at && x->rank == 0 ? 1 : 0;
    CHECK_EQ(lorasync_open(&d, &session, &err), LORASYNC_OK);
    for (b = 0; b < 2; b++) {
        p = part_of(b, x->rank, x->world, part);
        CHECK_EQ(lorasync_add(session, &p, &err), LORASYNC_OK);
    }
    if (x->rank == 0) {
        memset(&t, 0, sizeof t);
        t.size = sizeof t, t.name = "other", t.user = (void *)(uintptr_t)s, t.stage = other_stage;
        if (s->fails_at || s->doubtful_at) CHECK_EQ(lorasync_attach(session, &t, &err), LORASYNC_OK);
        t = arena_transport(a);
        CHECK_EQ(lorasync_attach(session, &t, &err), LORASYNC_OK);
    }
    return session;
}

/* -- a run */

/* Whether all who write can write to what is lent. */
static int is_reached(const scene *s, int world)
{
    if (s->refuses || s->old || s->defect == 1 || s->defect == 2) return 0;
    if (world == 1 || s->no_direct) return 1;
    if (s->defect == 3) return 0;
    return s->reach == LORASYNC_REACH_PROCESS ? s->threads : s->reach != LORASYNC_REACH_ROOT;
}

/* Of the version before this one was nothing lent: publishing it had failed. */
static int is_behind_failure(const scene *s, uint64_t version)
{
    return (s->fails_at && (int)version == s->fails_at + 1) ||
           (s->doubtful_at && !s->republish && (int)version == s->doubtful_at + 1);
}

/* What readers hold, the newest HELD versions, is as it was. */
static void look(arena *a, int *held, uint64_t version, uint64_t content, uint64_t *contents)
{
    int i;
    CHECK(a->served >= 0 && a->version[a->served] == version && is_version(a, a->served, content));
    for (i = 0; i < HELD; i++)
        if (held[i] >= 0) CHECK(is_version(a, held[i], contents[i]));
    if (held[HELD - 1] == a->served) return;
    if (held[0] >= 0) a->pinned[held[0]]--;
    for (i = 0; i + 1 < HELD; i++) held[i] = held[i + 1], contents[i] = contents[i + 1];
    held[HELD - 1]     = a->served;
    contents[HELD - 1] = content;
    a->pinned[a->served]++;
}

static void check_counts(const arena *a, const scene *s, int world)
{
    const int reached = is_reached(s, world), asked = !s->refuses && !s->old;
    if (reached) CHECK_EQ(a->num_taken_back, s->fails_at || (s->doubtful_at && !s->republish));
    if (reached) CHECK_EQ(a->num_copied, a->num_taken_back);
    if (!asked) CHECK_EQ(a->num_lent, 0);
    if (asked && !reached && ((s->defect && s->defect != 3) || s->reach == LORASYNC_REACH_ROOT))
        CHECK(a->num_lent > VERSIONS);
    if (asked && !reached && (s->defect == 3 || (!s->defect && s->reach == LORASYNC_REACH_PROCESS)))
        CHECK_EQ(a->num_lent, 1); /* blind */
    if (asked && !reached) CHECK_EQ(a->num_taken_back, a->num_lent);
}

/* What the outcome of the arena says about lending. */
static void check_outcome(lorasync_session *session, const scene *s, int world)
{
    size_t                         num  = 0;
    const lorasync_engine_outcome *o    = lorasync_get_outcomes(session, &num);
    const char                    *text = o[num - 1].error.text;
    if (s->refuses < 0)
        CHECK_TEXT(text, "transport 'arena' could not lend memory for the next version: the pool is closed");
    if (s->defect == 1) CHECK_HAS(text, "is not aligned to");
    if (s->defect == 2) CHECK_HAS(text, "has no id");
    if (s->reach == LORASYNC_REACH_ROOT && !is_reached(s, world))
        CHECK_HAS(text, "cannot be reached by the other ranks");
    if (is_reached(s, world)) CHECK_EQ(o[num - 1].error.status, 0);
}

static void run_versions(const rank_context *x, const scene *s, lorasync_session *session, arena *a, float *part)
{
    float    values[2 * ROWS * COLUMNS];
    int      held[HELD];
    uint64_t contents[HELD], v, served = 0, content = 0;
    int      i;
    for (i = 0; i < HELD; i++) held[i] = -1;
    for (v = 1; v <= VERSIONS; v++) {
        lorasync_report report;
        lorasync_error  err;
        lorasync_status status;
        const int       same = (int)v == s->same_at, fails = (int)v == s->nan_at || (int)v == s->fails_at;
        memset(values, 0, sizeof values);
        set_parts(values, x->rank, x->world, same ? v - 1 : v);
        if ((int)v == s->nan_at && x->rank == 0) values[5] = -(float)NAN;
        copy_bytes(part, values, sizeof values);
        lorasync_begin(session, v, &err);
        if (x->rank == 0 && is_behind_failure(s, v)) CHECK_EQ(a->lent, -1); /* taken back */
        if (x->rank == 0 && served) look(a, held, served, content, contents);
        status = lorasync_wait(session, &report, &err);
        CHECK_EQ(status, (int)v == s->nan_at ? LORASYNC_E_NAN : (int)v == s->fails_at ? LORASYNC_E_IO : LORASYNC_OK);
        if (!fails) {
            CHECK_EQ(report.skipped, same && s->skip_unchanged);
            if (!report.skipped) served = v, content = same ? v - 1 : v;
            CHECK_EQ(report.in_place, !report.skipped && is_reached(s, x->world) && !is_behind_failure(s, v));
            if (s->republish && (int)v == s->doubtful_at) CHECK_EQ(lorasync_republish(session, &err), LORASYNC_OK);
        }
        if (x->rank == 0 && served) look(a, held, served, content, contents);
        if (x->rank == 0 && !fails && (int)v != s->doubtful_at) check_outcome(session, s, x->world);
#ifndef LEND_CUDA
        if (x->rank == 0 && !fails) /* good until the next begin, wherever it lies */
            CHECK_EQ(lorasync_image_verify(lorasync_session_image(session), &err), LORASYNC_OK);
#endif
    }
}

static void run_scene(rank_context *x)
{
    const scene      *s = (const scene *)x->user;
    lorasync_session *session;
    lorasync_error    err;
    arena             a;
    float            *part;
#ifdef LEND_CUDA
    choose_gpu(x->rank);
#endif
    part = (float *)memory_get(2 * ROWS * COLUMNS * 4);
    if (x->rank == 0) arena_open(&a, s);
    session = open_session(x, &a, s, part);
    if (lorasync_compile(session, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    else run_versions(x, s, session, &a, part);
    lorasync_close(session);
    if (x->rank == 0) {
        check_counts(&a, s, x->world);
        arena_end(&a, 0);
    }
    memory_put(part);
}

static void play(const scene *s)
{
    static const int worlds[] = {1, 2, 4};
    int              i;
    for (i = 0; i < 3; i++) {
#ifdef FAKE_SLICE
        fake_cuda_share();
        fake_cuda_reset();
        fake_cuda_reclaim();
#endif
        if (s->threads) run_threads(worlds[i], run_scene, (void *)(uintptr_t)s);
        else CHECK_EQ(run_processes(worlds[i], run_scene, (void *)(uintptr_t)s), 0);
    }
}

static scene shared(void)
{
    scene s;
    memset(&s, 0, sizeof s);
#ifdef LEND_CUDA
    s.reach = LORASYNC_REACH_IPC;
#else
    s.reach = LORASYNC_REACH_SHM;
#endif
    return s;
}

static void in_place(void)
{
    scene s = shared();
    play(&s);
    s.no_direct = 1;
    play(&s);
}

/* Only the root reaches it: of use where ranks send messages. */
static void root_alone(void)
{
    scene s = shared();
    s.reach = LORASYNC_REACH_ROOT;
    play(&s);
    s.no_direct = 1;
    play(&s);
}

/* By its address: for threads; other processes cannot, and say so in a vote. */
static void in_one_process(void)
{
    scene s = shared();
    s.reach = LORASYNC_REACH_PROCESS;
    play(&s);
#ifndef LEND_CUDA /* one part of it is not made for threads that choose GPUs */
    s.threads = 1;
    play(&s);
#endif
}

static void refused_or_useless(void)
{
    scene s   = shared();
    s.refuses = 1;
    play(&s);
    s.refuses = -1;
    play(&s);
    s.refuses = 0;
#ifdef LEND_CUDA
    for (s.defect = 1; s.defect <= 2; s.defect++) play(&s);
#else
    for (s.defect = 1; s.defect <= 3; s.defect++) play(&s);
#endif
    s.defect = 0;
    s.old    = 1; /* a transport of before there was lending */
    play(&s);
}

static void failures_between(void)
{
    scene s    = shared();
    s.nan_at   = 4;
    s.fails_at = 9;
    play(&s);
    s.no_direct = 1;
    play(&s);
}

/* Its commit fails though it has happened, and another engine is enough. */
static void doubtful_commit(void)
{
    scene s       = shared();
    s.doubtful_at = 5;
    play(&s);
    s.republish = 1;
    play(&s);
}

static void nothing_changed(void)
{
    scene s          = shared();
    s.same_at        = 6;
    s.skip_unchanged = 1;
    play(&s);
    s.skip_unchanged = 0;
    play(&s);
}

/* -- sessions that come and go */

/* One session at a time; what is not taken is neither detached nor closed. */
TEST_UNUSED static void one_session_at_a_time(void)
{
    static float       part[2 * ROWS * COLUMNS];
    scene              s = shared();
    rank_context       x;
    lorasync_transport t;
    lorasync_session  *first, *second = NULL;
    lorasync_desc      d;
    lorasync_error     err;
    arena              a;
    memset(&x, 0, sizeof x);
    memset(&d, 0, sizeof d);
    x.world = 1, d.lora_alpha = 16;
    arena_open(&a, &s);
    x.comm = lorasync_solo();
    first  = open_session(&x, &a, &s, part);
    t      = arena_transport(&a);
    REQUIRE(lorasync_open(&d, &second, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_attach(second, &t, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "transport 'arena' could not be attached: somebody has it");
    CHECK_EQ(lorasync_compile(second, &err), LORASYNC_E_BUSY);
    lorasync_close(second);
    CHECK_EQ(a.num_attached, 1);
    CHECK_EQ(a.num_detached + a.num_closed, 0);
    lorasync_close(first); /* never compiled */
    arena_end(&a, 0);
}

/* The root closes before any run: the others may begin, and write, at any time. */
static void close_at_once(rank_context *x)
{
    const scene      *s = (const scene *)x->user;
    lorasync_session *session;
    lorasync_error    err;
    arena             a;
    float            *part;
#ifdef LEND_CUDA
    choose_gpu(x->rank);
#endif
    part = (float *)memory_get(2 * ROWS * COLUMNS * 4);
    if (x->rank == 0) arena_open(&a, s);
    session = open_session(x, &a, s, part);
    CHECK_EQ(lorasync_compile(session, &err), LORASYNC_OK);
    if (x->rank == 0) CHECK(a.lent >= 0);
    lorasync_close(session);
#ifdef LEND_CUDA
    if (x->rank == 0) arena_end(&a, 0); /* the root has waited until the others had closed it */
#else
    if (x->rank == 0) arena_end(&a, !s->no_direct && x->world > 1);
#endif
    memory_put(part);
}

static void left_behind(void)
{
    scene s = shared();
    int   world;
    for (world = 1; world <= 2; world++)
        for (s.no_direct = 0; s.no_direct < 2; s.no_direct++) {
#ifdef FAKE_SLICE
            fake_cuda_share();
            fake_cuda_reset();
            fake_cuda_reclaim();
#endif
            CHECK_EQ(run_processes(world, close_at_once, &s), 0);
        }
}

/* What a transport does not carry does not come to it. */
TEST_UNUSED static void what_it_carries(void)
{
    static float         part[2 * ROWS * COLUMNS];
    scene                s = shared();
    lorasync_desc        d;
    lorasync_piece       p;
    lorasync_stream_desc sd;
    lorasync_transport   t;
    lorasync_session    *session;
    lorasync_stream     *stream;
    lorasync_error       err;
    arena                a;
    int                  k, b;
    for (k = 0; k < 2; k++) {
        memset(&d, 0, sizeof d);
        d.lora_alpha = 16;
        arena_open(&a, &s);
        t         = arena_transport(&a);
        t.carries = k ? LORASYNC_CARRIES_ADAPTER : LORASYNC_CARRIES_BASE | LORASYNC_CARRIES_DEVICE;
        REQUIRE(lorasync_open(&d, &session, &err) == LORASYNC_OK);
        for (b = 0; b < 2; b++) {
            p = part_of(b, 0, 1, part);
            CHECK_EQ(lorasync_add(session, &p, &err), LORASYNC_OK);
        }
        CHECK_EQ(lorasync_attach(session, &t, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_compile(session, &err), k ? LORASYNC_OK : LORASYNC_E_UNSUPPORTED);
        if (!k) CHECK_HAS(err.text, "transport 'arena' carries no adapters");
        lorasync_close(session);
        arena_end(&a, 0);
    }
    arena_open(&a, &s);
    t = arena_transport(&a);
    memset(&sd, 0, sizeof sd);
    REQUIRE(lorasync_stream_open(&sd, &stream, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_stream_attach(stream, &t, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "send base weights to a directory");
    CHECK_EQ(a.num_attached, 0);
    lorasync_stream_close(stream);
    CHECK_EQ(a.num_closed, 0);
    t.close(&a);
    arena_end(&a, 0);
}

#ifdef LEND_CUDA
/* A payload in device memory does not come to a transport that reads the host's. */
static void host_memory_only(rank_context *x)
{
    const scene       *s = (const scene *)x->user;
    lorasync_transport t;
    lorasync_session  *session;
    lorasync_error     err;
    arena              a, other;
    float             *part;
    choose_gpu(0);
    part = (float *)memory_get(2 * ROWS * COLUMNS * 4);
    arena_open(&a, s);
    arena_open(&other, s);
    session   = open_session(x, &a, s, part);
    t         = arena_transport(&other);
    t.name    = "host";
    t.carries = LORASYNC_CARRIES_ADAPTER;
    CHECK_EQ(lorasync_attach(session, &t, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_compile(session, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_sync(session, 1, NULL, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "transport 'host' reads host memory");
    CHECK_EQ(a.served, -1);
    lorasync_close(session);
    arena_end(&a, 0);
    arena_end(&other, 0);
    memory_put(part);
}

static void device_payloads(void)
{
    scene s = shared();
#ifdef FAKE_SLICE
    fake_cuda_share();
    fake_cuda_reset();
    fake_cuda_reclaim();
#endif
    CHECK_EQ(run_processes(1, host_memory_only, &s), 0);
}
#endif

int main(void)
{
#ifdef LEND_CUDA
    if (!can_run()) {
        test_skipped++;
        return test_summary("test_lend_cuda");
    }
#endif
    RUN(in_place);
    RUN(root_alone);
    RUN(in_one_process);
    RUN(refused_or_useless);
    RUN(failures_between);
    RUN(doubtful_commit);
    RUN(nothing_changed);
    RUN(left_behind);
#ifdef LEND_CUDA
    RUN(device_payloads);
    return test_summary("test_lend_cuda");
#else
    RUN(one_session_at_a_time);
    RUN(what_it_carries);
    return test_summary("test_lend");
#endif
}
