/* The easy path from parameters to published adapters, with one rank and with several, as threads and as processes. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "pieces.h"

#include <math.h>
#include <signal.h>
#include <sys/mman.h>

#define P "base_model.model.model.layers.0."
#define KEY_QA "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
#define KEY_QB "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

enum {
    MAX_PARAMETERS = 12,
    MAX_ELEMENTS   = 4096,
    MAX_WORLD      = 8
};

/* -- a small model, whole; ranks take parts of it */

typedef struct parameter {
    const char    *name;
    lorasync_dtype dtype;
    int            ndim;
    int64_t        shape[3];
} parameter;

static const parameter model[] = {
    {P "self_attn.q_proj.base_layer.weight", LORASYNC_F32, 2, {24, 16, 0}},
    {P "self_attn.q_proj.lora_A.default.weight", LORASYNC_F32, 2, {8, 16, 0}},
    {P "self_attn.q_proj.lora_B.default.weight", LORASYNC_F32, 2, {24, 8, 0}},
    {P "self_attn.q_proj.lora_A.other.weight", LORASYNC_F32, 2, {4, 16, 0}},
    {P "self_attn.q_proj.lora_B.other.weight", LORASYNC_F32, 2, {24, 4, 0}},
    {P "mlp.up_proj.lora_A.default.weight", LORASYNC_BF16, 2, {8, 16, 0}},
    {P "mlp.up_proj.lora_B.default.weight", LORASYNC_BF16, 2, {33, 8, 0}},
    {"base_model.model.model.embed_tokens.weight", LORASYNC_F32, 2, {40, 16, 0}},
    {"base_model.model.model.norm.weight", LORASYNC_F32, 1, {16, 0, 0}},
};
enum {
    MODEL           = (int)(sizeof model / sizeof model[0]),
    ADAPTER_TENSORS = 4
};

static size_t item(lorasync_dtype d) { return (size_t)lorasync_dtype_bits(d) / 8; }

static int64_t numel(const parameter *p)
{
    int64_t n = 1;
    int     d;
    for (d = 0; d < p->ndim; d++) n *= p->shape[d];
    return n;
}

static float truth(int number, int64_t element, int step)
{
    unsigned long long s =
        (unsigned long long)number * 100003 + (unsigned long long)element * 7 + (unsigned long long)step * 1000000007;
    return (float)((double)(test_random(&s) % 2000001) / 1000000.0 - 1.0);
}

/* One rank's parameters in memory. */
typedef struct rank_model {
    lorasync_piece pieces[MAX_PARAMETERS];
    int            number[MAX_PARAMETERS];
    size_t         num;
    float          memory[MAX_PARAMETERS][MAX_ELEMENTS]; /* BF16 tensors use half of theirs */
} rank_model;

typedef enum layout {
    FSDP2 = 0,
    REPLICATED,
    ZERO3,
    COLUMNS,
    LAST_RANK,
    NUM_LAYOUTS
} layout;

static lorasync_box box_of(const parameter *p, layout how, int rank, int world)
{
    lorasync_box whole = lorasync_whole(p->shape, p->ndim);
    switch (how) {
    case FSDP2: return lorasync_shard(whole, 0, rank, world);
    case ZERO3: return lorasync_flat_shard(numel(p), rank, world);
    case COLUMNS: return lorasync_shard(whole, -1, rank, world);
    case LAST_RANK: return rank == world - 1 ? whole : lorasync_none(p->ndim);
    case REPLICATED:
    case NUM_LAYOUTS: break;
    }
    return whole;
}

/* f(number of the element in its tensor, place in memory) for every element of a piece without strides */
static int64_t element_of(const lorasync_piece *p, int64_t i)
{
    int64_t n = 0, rest = i, at[LORASYNC_MAX_DIMS] = {0};
    int     d;
    if (p->box.flat) return p->box.off[0] + i;
    for (d = p->ndim - 1; d >= 0; d--) at[d] = p->box.off[d] + rest % p->box.len[d], rest /= p->box.len[d];
    for (d = 0; d < p->ndim; d++) n = n * p->shape[d] + at[d];
    return n;
}

static int64_t piece_numel(const lorasync_piece *p)
{
    int64_t n = 1;
    int     d;
    for (d = 0; d < p->box.ndim; d++) n *= p->box.len[d];
    return n;
}

static void fill_piece(lorasync_piece *p, int number, int step)
{
    int64_t i, n = piece_numel(p);
    for (i = 0; i < n; i++) {
        float f = truth(number, element_of(p, i), step);
        lorasync_convert((char *)p->data + (size_t)i * item(p->dtype), p->dtype, &f, LORASYNC_F32, 1, NULL);
    }
}

static void make_model(rank_model *m, const parameter *parameters, int num, layout how, int rank, int world, int step)
{
    int i;
    memset(m, 0, sizeof *m);
    for (i = 0; i < num; i++) {
        lorasync_piece *p = &m->pieces[m->num];
        p->name = parameters[i].name, p->dtype = parameters[i].dtype, p->ndim = parameters[i].ndim;
        memcpy(p->shape, parameters[i].shape, 3 * sizeof(int64_t));
        p->box              = box_of(&parameters[i], how, rank, world);
        p->data             = m->memory[i];
        m->number[m->num++] = i;
        fill_piece(p, i, step);
    }
}

static void fill_model(rank_model *m, int step)
{
    size_t i;
    for (i = 0; i < m->num; i++) fill_piece(&m->pieces[i], m->number[i], step);
}

/* -- transports of the test: remembers, fails on demand */

typedef struct engine {
    int           stages, commits, aborts, closes, fail_stage, fail_commit, slow_ms, slow_commit_ms;
    uint64_t      staged, served, digest;
    unsigned char file[1 << 16], staged_file[1 << 16];
    size_t        num_bytes, staged_bytes;
    char          config[4096], adapter[64];
} engine;

static lorasync_status engine_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    engine *e = (engine *)user;
    e->stages++;
    if (e->slow_ms) test_sleep_ms(e->slow_ms);
    if (e->fail_stage) return test_refuse(err, LORASYNC_E_IO, "the engine has no room");
    memcpy(e->staged_file, image->header, image->header_bytes);
    memcpy(e->staged_file + image->header_bytes, image->payload, image->payload_bytes);
    e->staged_bytes = image->header_bytes + image->payload_bytes;
    e->staged = image->version, e->digest = image->digest;
    snprintf(e->config, sizeof e->config, "%s", image->config_json);
    snprintf(e->adapter, sizeof e->adapter, "%s", image->adapter);
    return LORASYNC_OK;
}

static lorasync_status engine_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    engine *e = (engine *)user;
    e->commits++;
    if (e->slow_commit_ms) test_sleep_ms(e->slow_commit_ms);
    if (e->fail_commit) return test_refuse(err, LORASYNC_E_IO, "the engine will not commit");
    if (version != e->staged || strcmp(adapter, e->adapter) != 0)
        return test_refuse(err, LORASYNC_E_STATE, "commit of what was not staged");
    e->served = version;
    memcpy(e->file, e->staged_file, e->staged_bytes);
    e->num_bytes = e->staged_bytes;
    return LORASYNC_OK;
}

static void engine_abort(void *user, const char *adapter, uint64_t version)
{
    (void)adapter, (void)version, ((engine *)user)->aborts++;
}
static void engine_close(void *user) { ((engine *)user)->closes++; }

static lorasync_transport transport_to(engine *e, const char *name)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size = sizeof t, t.name = name, t.user = e;
    t.stage = engine_stage, t.commit = engine_commit, t.abort = engine_abort, t.close = engine_close;
    return t;
}

static lorasync_desc plain_desc(const lorasync_comm *comm)
{
    lorasync_desc d;
    memset(&d, 0, sizeof d);
    d.comm = comm, d.lora_alpha = 16, d.timeout_ms = test_ms(10000);
    return d;
}

static lorasync_status add_all(lorasync_session *s, const rank_model *m, lorasync_error *err)
{
    size_t i;
    for (i = 0; i < m->num; i++)
        if (lorasync_add(s, &m->pieces[i], err) < 0) return err->status;
    return LORASYNC_OK;
}

/* Opens, adds, attaches e (if any), compiles. */
static lorasync_status open_session(const lorasync_desc *d, const rank_model *m, engine *e, lorasync_session **s,
                                    lorasync_error *err)
{
    lorasync_status status;
    status = lorasync_open(d, s, err);
    if (status < 0) return status;
    status = add_all(*s, m, err);
    if (status == LORASYNC_OK && e) {
        lorasync_transport t = transport_to(e, "engine");
        status               = lorasync_attach(*s, &t, err);
    }
    if (status == LORASYNC_OK) status = lorasync_compile(*s, err);
    return status;
}

/* -- solo, from beginning to end */

static void solo_session(void)
{
    static rank_model      m;
    static engine          e;
    lorasync_desc          d = plain_desc(NULL);
    lorasync_session      *s = NULL;
    lorasync_session_info  info;
    lorasync_report        report;
    lorasync_error         err;
    lorasync_image        *image;
    const lorasync_tensor *t;
    int64_t                i;
    memset(&e, 0, sizeof e);
    d.wire_dtype = LORASYNC_BF16;
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    REQUIRE(open_session(&d, &m, &e, &s, &err) == LORASYNC_OK);
    lorasync_get_info(s, &info);
    CHECK_EQ(info.num_added, MODEL);
    CHECK_EQ(info.num_taken, ADAPTER_TENSORS);
    CHECK_EQ(info.num_dropped, MODEL - ADAPTER_TENSORS);
    CHECK_EQ(info.num_tensors, ADAPTER_TENSORS);
    CHECK_EQ(info.payload_bytes, 2 * (8 * 16 + 24 * 8 + 8 * 16 + 33 * 8));
    CHECK(lorasync_session_image(s) == NULL);
    CHECK_EQ(lorasync_sync(s, 1, &report, &err), LORASYNC_OK);
    CHECK(report.version == 1 && report.num_tensors == ADAPTER_TENSORS && report.num_engines == 1 &&
          report.payload_bytes == info.payload_bytes && report.digest == e.digest);
    CHECK(e.served == 1 && e.stages == 1 && e.commits == 1 && e.aborts == 0);
    CHECK_TEXT(e.adapter, "default");
    CHECK_HAS(e.config, "\"lora_alpha\": 16");
    CHECK_HAS(e.config, "\"r\": 8");
    CHECK_HAS(e.config, "\"q_proj\"");
    REQUIRE(lorasync_image_parse(e.file, e.num_bytes, NULL, &image, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_image_verify(image, &err), LORASYNC_OK);
    t = lorasync_image_find(image, KEY_QB);
    REQUIRE(t && t->dtype == LORASYNC_BF16 && t->shape[0] == 24 && t->shape[1] == 8);
    for (i = 0; i < 24 * 8; i++) {
        float    f = truth(2, i, 1);
        uint16_t b;
        lorasync_convert(&b, LORASYNC_BF16, &f, LORASYNC_F32, 1, NULL);
        CHECK(memcmp(&b, (const char *)t->data + 2 * i, 2) == 0);
    }
    lorasync_image_free(image);
    CHECK(lorasync_session_image(s) && lorasync_session_image(s)->version == 1);
    CHECK_TEXT(lorasync_session_image(s)->config_json, e.config);
    lorasync_close(s);
    CHECK_EQ(e.closes, 1);
    lorasync_close(NULL);
}

/* Calls out of order and nonsense. */
static void bad_calls(void)
{
    static rank_model  m;
    static engine      e;
    lorasync_desc      d = plain_desc(NULL);
    lorasync_session  *s = (lorasync_session *)&s;
    lorasync_transport t = transport_to(&e, "x");
    lorasync_error     err;
    lorasync_comm      c = lorasync_solo();
    lorasync_piece     p;
    int                i;
    CHECK_EQ(lorasync_open(NULL, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_open(&d, NULL, &err), LORASYNC_E_ARGUMENT);
    d.lora_alpha = -1;
    CHECK_EQ(lorasync_open(&d, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK(s == NULL);
    d.lora_alpha = (double)NAN;
    CHECK_EQ(lorasync_open(&d, &s, &err), LORASYNC_E_ARGUMENT);
    d.lora_alpha = 1, d.config_json = "{";
    CHECK_EQ(lorasync_open(&d, &s, &err), LORASYNC_E_FORMAT);
    d.config_json = NULL, c.world = 0, d.comm = &c;
    CHECK_EQ(lorasync_open(&d, &s, &err), LORASYNC_E_ARGUMENT);
    d.comm = NULL;
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_begin(s, 1, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_wait(s, NULL, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_sync(s, 1, NULL, NULL), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_load(s, "x", NULL, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_add(NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_add(s, &m.pieces[0], &err), LORASYNC_E_STATE);
    t = transport_to(&e, "x");
    CHECK_EQ(lorasync_attach(s, &t, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_wait(s, NULL, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_begin(s, 1, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_begin(s, 2, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_load(s, "x", NULL, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_wait(s, NULL, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_session_image(s)->version, 1); /* what the second begin asked for changes nothing */
    lorasync_close(s);
    for (i = 0; i < 3; i++) { /* an engine that could not be attached is not left out in silence */
        REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
        t.stage = NULL;
        CHECK_EQ(i == 0   ? lorasync_attach(s, NULL, NULL)
                 : i == 1 ? lorasync_attach(s, &t, &err)
                          : lorasync_attach_directory(s, NULL, NULL),
                 LORASYNC_E_ARGUMENT);
        CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_compile(s, &err), LORASYNC_E_ARGUMENT);
        CHECK_HAS(err.text, i == 0 ? "transport is NULL" : i == 1 ? "stage" : "directory");
        lorasync_close(s);
    }
    memset(&p, 0, sizeof p);
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK); /* an error of add comes again at compile */
    CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "no name");
    lorasync_close(s);
}

/* -- what compile refuses, on every rank alike */

typedef struct wrong_session {
    void (*spoil)(lorasync_desc *d, rank_model *m, int rank);
    lorasync_status status;
    const char     *words[2];
} wrong_session;

static const char *const     only_lm_head[1] = {"lm_head"};
static const lorasync_filter lm_head_filter  = {NULL, only_lm_head, 1, NULL, NULL, 0, NULL, 0, 0};

static void spoil_nothing_found(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m, (void)rank, d->adapter = "policy";
}
static void spoil_filtered(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m, (void)rank, d->filter = &lm_head_filter;
}
static void spoil_pair(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d, (void)rank, m->pieces[2].name = P "self_attn.q_proj.lora_B.other2.weight";
}
static void spoil_collision(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d;
    if (rank == 1)
        m->pieces[3]      = m->pieces[1],
        m->pieces[3].name = "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.default.weight";
}
static void spoil_rank(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m, (void)rank,
        d->config_json = "{\"peft_type\":\"LORA\",\"r\":16,\"target_modules\":[\"q_proj\",\"up_proj\"]}";
}
static void spoil_target(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m, (void)rank, d->config_json = "{\"peft_type\":\"LORA\",\"r\":8,\"target_modules\":[\"q_proj\"]}";
    d->lora_alpha = 8; /* the default, as in the config */
}
static void spoil_two_alphas(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m, (void)rank, d->config_json = "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":20}";
}
static void spoil_alpha(lorasync_desc *d, rank_model *m, int rank) { (void)m, (void)rank, d->lora_alpha = 0; }
static void spoil_alpha_one(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m;
    if (rank == 1) d->lora_alpha = 32;
}
static void spoil_root(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m;
    if (rank == 1) d->root = 1;
}
static void spoil_fold_one(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m;
    if (rank == 1) d->fold_scale = 1;
}
static void spoil_adapter_one(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m;
    if (rank == 1) d->adapter = "other";
}
static void spoil_wire_one(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m;
    if (rank == 1) d->wire_dtype = LORASYNC_F16;
}
static void spoil_add(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d;
    if (rank == 1) m->pieces[2].box.off[0] = 1000;
}
static void spoil_add_name(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d;
    if (rank == 1) m->pieces[2].name = P "q_proj.lora_E.default";
}
static void spoil_gap(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d;
    if (rank == 1) m->pieces[2].box.len[0] = 0;
}
static void spoil_shape(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d;
    if (rank == 1) m->pieces[2].shape[0] = 25;
}
static void spoil_dtype(lorasync_desc *d, rank_model *m, int rank)
{
    (void)d;
    if (rank == 1) m->pieces[2].dtype = LORASYNC_F16;
}
static void spoil_base_model(lorasync_desc *d, rank_model *m, int rank)
{
    (void)m;
    if (rank == 1) d->base_model = "x";
}

static const lorasync_filter with_base = {NULL, NULL, 0, NULL, NULL, 0, NULL, 1, 0};
static void                  spoil_pair_in_base(lorasync_desc *d, rank_model *m, int rank)
{
    spoil_pair(d, m, rank), d->filter = &with_base;
}

static const wrong_session wrong[] = {
    {spoil_nothing_found,
     LORASYNC_E_EMPTY,
     {"adapter \"policy\"", "of 9 declared here 9 were dropped, the first: base_model"}},
    {spoil_filtered, LORASYNC_E_EMPTY, {"adapter \"default\"", "filter"}},
    {spoil_pair, LORASYNC_E_PAIR, {"q_proj", "lora_B"}},
    {spoil_collision, LORASYNC_E_NAME, {"rank 1", "_orig_mod"}},
    {spoil_rank, LORASYNC_E_CONFIG, {"rank", "16"}},
    {spoil_target, LORASYNC_E_CONFIG, {"up_proj", ""}},
    {spoil_alpha, LORASYNC_E_CONFIG, {"no alpha", "lora_alpha"}},
    {spoil_two_alphas, LORASYNC_E_CONFIG, {"desc.lora_alpha is 16", "config_json says lora_alpha 20"}},
    {spoil_alpha_one, LORASYNC_E_DISAGREE, {"lora_alpha", "rank 1"}},
    {spoil_root, LORASYNC_E_DISAGREE, {"root", "rank 1"}},
    {spoil_fold_one, LORASYNC_E_DISAGREE, {"fold_scale", "rank 1"}},
    {spoil_adapter_one, LORASYNC_E_DISAGREE, {"adapter", "rank 1"}},
    {spoil_wire_one, LORASYNC_E_DISAGREE, {"wire_dtype", "rank 1"}},
    {spoil_add, LORASYNC_E_LAYOUT, {"rank 1", "q_proj.lora_B"}},
    {spoil_add_name, LORASYNC_E_NAME, {"rank 1", "lora_E"}},
    {spoil_gap, LORASYNC_E_LAYOUT, {KEY_QB, "held by no rank"}},
    {spoil_shape, LORASYNC_E_DISAGREE, {KEY_QB, "[25, 8] on rank 1"}},
    {spoil_dtype, LORASYNC_E_DISAGREE, {KEY_QB, "F16 on rank 1"}},
    {spoil_base_model, LORASYNC_E_DISAGREE, {"base_model", "rank 1"}},
    {spoil_pair_in_base, LORASYNC_E_PAIR, {"q_proj", "its lora_B"}},
};

typedef struct shared_results {
    const wrong_session *wrong;
    lorasync_status      status[MAX_WORLD], again[MAX_WORLD];
    char                 text[MAX_WORLD][512];
    rank_model           models[MAX_WORLD];
    long                 live[MAX_WORLD];
    int                  failed[MAX_WORLD];
    engine               engines[3];
} shared_results;

static shared_results shared;

static void give_allocator(lorasync_desc *d, lorasync_allocator *a, test_memory *m)
{
    memset(m, 0, sizeof *m);
    a->alloc = test_memory_alloc, a->free = test_memory_free, a->user = m;
    d->allocator = a;
}

static void wrong_rank(rank_context *c)
{
    lorasync_desc      d = plain_desc(&c->comm);
    rank_model        *m = &shared.models[c->rank];
    lorasync_session  *s = NULL;
    lorasync_allocator a;
    test_memory        memory;
    lorasync_error     err;
    size_t             i;
    give_allocator(&d, &a, &memory);
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    shared.wrong->spoil(&d, m, c->rank);
    memset(&err, 0, sizeof err);
    if (lorasync_open(&d, &s, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    for (i = 0; i < m->num; i++) lorasync_add(s, &m->pieces[i], &err);
    shared.status[c->rank] = lorasync_compile(s, &err);
    snprintf(shared.text[c->rank], 512, "%s", err.text);
    shared.again[c->rank] = lorasync_compile(s, &err); /* as wrong as before, and no hang */
    if (lorasync_sync(s, 1, NULL, &err) != LORASYNC_E_STATE || lorasync_session_image(s)) shared.failed[c->rank]++;
    lorasync_close(s);
    shared.live[c->rank] = memory.live;
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1); /* the same communicator serves a right session */
    d = plain_desc(&c->comm);
    if (open_session(&d, m, NULL, &s, &err) < 0 || lorasync_sync(s, 1, NULL, &err) < 0) shared.failed[c->rank]++;
    lorasync_close(s);
}

static void compile_refuses(void)
{
    size_t i;
    int    r;
    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        memset(&shared, 0, sizeof shared);
        shared.wrong = &wrong[i];
        run_threads(3, wrong_rank, NULL);
        for (r = 0; r < 3; r++) {
            if (shared.status[r] != wrong[i].status)
                fprintf(stderr, "case %d, rank %d: %s\n", (int)i, r, shared.text[r]);
            CHECK_EQ(shared.status[r], wrong[i].status);
            CHECK_EQ(shared.again[r], wrong[i].status);
            CHECK_HAS(shared.text[r], wrong[i].words[0]);
            CHECK_HAS(shared.text[r], wrong[i].words[1]);
            CHECK_EQ(shared.failed[r], 0);
            CHECK_EQ(shared.live[r], 0);
        }
    }
}

/* The half of a pair that was forgotten may follow; after a failed lorasync_add nothing helps. */
static void added_after_a_failed_compile(void)
{
    static rank_model m;
    lorasync_desc     d = plain_desc(NULL);
    lorasync_session *s = NULL;
    lorasync_error    err;
    int               spoiled, num;
    for (spoiled = 0; spoiled < 3; spoiled++) {
        make_model(&m, model, 3, FSDP2, 0, 1, 1);
        m.num = (size_t)(num = spoiled == 2 ? 1 : 2); /* a base weight, and lora_A */
        CHECK_EQ(open_session(&d, &m, NULL, &s, &err), num == 1 ? LORASYNC_E_EMPTY : LORASYNC_E_PAIR);
        if (spoiled == 1) CHECK_EQ(lorasync_add(s, NULL, &err), LORASYNC_E_ARGUMENT);
        for (; num < 3; num++) CHECK_EQ(lorasync_add(s, &m.pieces[num], &err), LORASYNC_OK);
        CHECK_EQ(lorasync_compile(s, &err), spoiled == 1 ? LORASYNC_E_ARGUMENT : LORASYNC_OK);
        if (spoiled != 1) CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
        lorasync_close(s);
    }
}

/* -- the same file from any number of ranks and any layout */

typedef struct file_user {
    layout how;
    int    no_direct, direct_seen;
    engine e;
} file_user;

static void file_rank(rank_context *c)
{
    file_user        *u = (file_user *)c->user;
    rank_model       *m = &shared.models[c->rank];
    lorasync_desc     d = plain_desc(&c->comm);
    lorasync_session *s = NULL;
    lorasync_report   report;
    lorasync_error    err;
    d.wire_dtype = LORASYNC_BF16, d.no_direct = u->no_direct, d.root = c->world / 2;
    make_model(m, model, MODEL, u->how, c->rank, c->world, 7);
    if (open_session(&d, m, c->rank == d.root ? &u->e : NULL, &s, &err) < 0 || lorasync_sync(s, 5, &report, &err) < 0) {
        fprintf(stderr, "layout %d rank %d of %d: %s\n", (int)u->how, c->rank, c->world, err.text);
        shared.failed[c->rank]++;
    } else if (c->rank == d.root) {
        u->direct_seen = report.direct;
    }
    lorasync_close(s);
}

static void same_bytes(void)
{
    static file_user first, u;
    static const int worlds[] = {1, 2, 3, 5};
    size_t           w;
    int              how, no_direct, r;
    memset(&first, 0, sizeof first);
    for (w = 0; w < 4; w++)
        for (how = 0; how < NUM_LAYOUTS; how++)
            for (no_direct = 0; no_direct < 2; no_direct++) {
                memset(&u, 0, sizeof u), memset(&shared, 0, sizeof shared);
                u.how = (layout)how, u.no_direct = no_direct;
                run_threads(worlds[w], file_rank, &u);
                for (r = 0; r < worlds[w]; r++) CHECK_EQ(shared.failed[r], 0);
                CHECK_EQ(u.direct_seen, worlds[w] > 1 && !no_direct);
                if (!first.e.num_bytes) first = u;
                CHECK(u.e.num_bytes > 1000 && u.e.num_bytes == first.e.num_bytes &&
                      memcmp(u.e.file, first.e.file, first.e.num_bytes) == 0);
                CHECK_TEXT(u.e.config, first.e.config);
            }
}

static void file_process(rank_context *c)
{
    file_rank(c);
    CHECK_EQ(shared.failed[c->rank], 0);
    if (c->rank == c->world / 2) CHECK_EQ(((file_user *)c->user)->e.served, 5);
}

static void processes(void)
{
    static file_user u;
    memset(&shared, 0, sizeof shared), memset(&u, 0, sizeof u);
    CHECK_EQ(run_processes(4, file_process, &u), 0);
}

/* -- folding the scale into B */

typedef struct fold_case {
    const char *config;
    double      alpha, scale_q, scale_up;
    int         r_q, r_up;
} fold_case;

static const fold_case folds[] = {
    {NULL, 16, 2, 2, 8, 8},
    {NULL, 12, 1.5, 3, 8, 4},
    {"{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":20,\"target_modules\":[\"q_proj\",\"up_proj\"]}", 0, 2.5, 2.5, 8,
     8},
    {"{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":20,\"use_rslora\":true,\"target_modules\":[\"q_proj\","
     "\"up_proj\"]}",
     0, 10, 10, 4, 4},
    {"{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"rank_pattern\":{\"up_proj\":4},"
     "\"target_modules\":[\"q_proj\",\"up_proj\"]}",
     0, 2, 4, 8, 4},
    {"{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"rank_pattern\":{\"up_proj\":4},"
     "\"alpha_pattern\":{\"q_proj\":6},\"target_modules\":[\"q_proj\",\"up_proj\"]}",
     0, 0.75, 4, 8, 4},
};

static void fold_one(const fold_case *f, lorasync_dtype wire)
{
    static rank_model m;
    static engine     e;
    parameter         four[4];
    lorasync_desc     d = plain_desc(NULL);
    lorasync_session *s = NULL;
    lorasync_error    err;
    lorasync_image   *image;
    lorasync_config  *config;
    int               k;
    memset(&e, 0, sizeof e);
    for (k = 0; k < 4; k++) four[k] = model[k < 2 ? 1 + k : 3 + k], four[k].dtype = LORASYNC_F32;
    four[0].shape[0] = four[1].shape[1] = f->r_q;
    four[2].shape[0] = four[3].shape[1] = f->r_up;
    make_model(&m, four, 4, FSDP2, 0, 1, 3);
    d.lora_alpha = f->alpha, d.config_json = f->config, d.fold_scale = 1, d.wire_dtype = wire;
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
    REQUIRE(add_all(s, &m, &err) == LORASYNC_OK);
    {
        lorasync_transport t = transport_to(&e, "engine");
        CHECK_EQ(lorasync_attach(s, &t, &err), LORASYNC_OK);
    }
    if (lorasync_compile(s, &err) < 0 || lorasync_sync(s, 1, NULL, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    CHECK_EQ(lorasync_load(s, "anything", NULL, &err), LORASYNC_E_UNSUPPORTED);
    lorasync_close(s);
    REQUIRE(lorasync_image_parse(e.file, e.num_bytes, NULL, &image, &err) == LORASYNC_OK);
    for (k = 0; k < 4; k++) {
        lorasync_name          name;
        const lorasync_tensor *t;
        int64_t                i, n = numel(&four[k]);
        double                 scale = k == 1 ? f->scale_q : k == 3 ? f->scale_up : 1;
        CHECK_EQ(lorasync_parse_name(four[k].name, &name, &err), LORASYNC_OK);
        t = lorasync_image_find(image, name.key);
        REQUIRE(t);
        for (i = 0; i < n; i++) {
            float         v = truth(k, i, 3) * (float)scale;
            unsigned char bytes[4];
            lorasync_convert(bytes, t->dtype, &v, LORASYNC_F32, 1, NULL);
            CHECK(memcmp(bytes, (const char *)t->data + (size_t)i * item(t->dtype), item(t->dtype)) == 0);
        }
    }
    REQUIRE(lorasync_config_parse(e.config, strlen(e.config), NULL, &config, &err) == LORASYNC_OK);
    CHECK(!lorasync_config_view(config)->use_rslora);
    CHECK(lorasync_config_view(config)->lora_alpha == (double)lorasync_config_view(config)->r);
    CHECK_EQ(lorasync_config_rank(config, "model.layers.0.self_attn.q_proj"), f->r_q);
    CHECK_EQ(lorasync_config_rank(config, "model.layers.0.mlp.up_proj"), f->r_up);
    CHECK(lorasync_config_scale(config, "model.layers.0.self_attn.q_proj") == 1 &&
          lorasync_config_scale(config, "model.layers.0.mlp.up_proj") == 1);
    lorasync_config_free(config);
    lorasync_image_free(image);
}

static void fold_scale(void)
{
    size_t i;
    for (i = 0; i < sizeof folds / sizeof folds[0]; i++)
        fold_one(&folds[i], LORASYNC_DTYPE_NONE), fold_one(&folds[i], LORASYNC_BF16), fold_one(&folds[i], LORASYNC_F16);
}

/* lora_B.bias is scaled as lora_B is; which needs the config, since a bias does not show the rank. */
static void fold_bias(void)
{
    static const parameter three[3] = {
        {P "self_attn.q_proj.lora_A.default.weight", LORASYNC_F32, 2, {8, 16, 0}},
        {P "self_attn.q_proj.lora_B.default.weight", LORASYNC_F32, 2, {24, 8, 0}},
        {P "self_attn.q_proj.lora_B.default.bias", LORASYNC_F32, 1, {24, 0, 0}},
    };
    static rank_model m;
    static engine     e;
    int               with_config;
    make_model(&m, three, 3, FSDP2, 0, 1, 3);
    for (with_config = 0; with_config < 2; with_config++) {
        lorasync_desc          d = plain_desc(NULL);
        lorasync_session      *s = NULL;
        lorasync_image        *image;
        lorasync_error         err;
        const lorasync_tensor *t;
        lorasync_transport     to = transport_to(&e, "engine");
        int64_t                i;
        memset(&e, 0, sizeof e);
        d.fold_scale = 1;
        if (with_config)
            d.lora_alpha = 0, d.config_json = "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":20,\"lora_bias\":true,"
                                              "\"target_modules\":[\"q_proj\"]}";
        REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
        REQUIRE(add_all(s, &m, &err) == LORASYNC_OK);
        CHECK_EQ(lorasync_attach(s, &to, &err), LORASYNC_OK);
        if (!with_config) {
            CHECK_EQ(lorasync_compile(s, &err), LORASYNC_E_UNSUPPORTED);
            CHECK_HAS(err.text, "lora_B.bias: fold_scale needs config_json");
            lorasync_close(s);
            continue;
        }
        if (lorasync_compile(s, &err) < 0 || lorasync_sync(s, 1, NULL, &err) < 0)
            test_fail(__FILE__, __LINE__, err.text);
        lorasync_close(s);
        REQUIRE(lorasync_image_parse(e.file, e.num_bytes, NULL, &image, &err) == LORASYNC_OK);
        t = lorasync_image_find(image, P "self_attn.q_proj.lora_B.bias");
        REQUIRE(t);
        for (i = 0; i < 24; i++) {
            float expected = truth(2, i, 3) * 2.5f;
            CHECK(memcmp(&expected, (const char *)t->data + i * 4, 4) == 0);
        }
        lorasync_image_free(image);
    }
}

/* A compile that fails and is tried again does not fold twice. */
static int   flaky_left;
static void *flaky_alloc(void *user, size_t n)
{
    (void)user;
    return flaky_left && --flaky_left == 0 ? NULL : malloc(n);
}
static void flaky_free(void *user, void *p)
{
    (void)user;
    free(p);
}

static void fold_after_a_failed_compile(void)
{
    static rank_model  m;
    static engine      e, once;
    lorasync_desc      d = plain_desc(NULL);
    lorasync_allocator a;
    lorasync_session  *s = NULL;
    lorasync_error     err;
    int                n, failures = 0;
    a.alloc = flaky_alloc, a.free = flaky_free, a.user = NULL;
    d.fold_scale = 1, d.allocator = &a;
    make_model(&m, model, MODEL, FSDP2, 0, 1, 3);
    for (n = 0; n < 400; n++) {
        lorasync_transport t = transport_to(&e, "engine");
        lorasync_status    status;
        memset(&e, 0, sizeof e);
        flaky_left = 0;
        REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
        REQUIRE(add_all(s, &m, &err) == LORASYNC_OK);
        REQUIRE(lorasync_attach(s, &t, &err) == LORASYNC_OK);
        flaky_left = n;
        status     = lorasync_compile(s, &err);
        flaky_left = 0;
        if (status < 0) CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
        failures += status < 0;
        CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
        lorasync_close(s);
        if (n == 0) once = e;
        CHECK(once.num_bytes == e.num_bytes && memcmp(once.file, e.file, e.num_bytes) == 0);
        if (n && status == LORASYNC_OK) break;
    }
    CHECK(failures > 20);
}

/* -- versions, NaN, engines that fail */

#define MUST(call, expected)                                                                                           \
    do {                                                                                                               \
        lorasync_status must_ = (call);                                                                                \
        if (must_ != (expected)) {                                                                                     \
            fprintf(stderr, "%s:%d: rank %d: %s is %d, expected %d: %s\n", __FILE__, __LINE__, c->rank, #call,         \
                    (int)must_, (int)(expected), err.text);                                                            \
            shared.failed[c->rank]++;                                                                                  \
        }                                                                                                              \
    } while (0)

#define HOLDS(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: rank %d: %s\n", __FILE__, __LINE__, c->rank, #condition);                          \
            shared.failed[c->rank]++;                                                                                  \
        }                                                                                                              \
    } while (0)

static int stories_no_direct;

static lorasync_session *story_session(rank_context *c, int num_engines, lorasync_error *err)
{
    lorasync_desc     d = plain_desc(&c->comm);
    lorasync_session *s = NULL;
    int               i;
    d.no_direct = stories_no_direct;
    make_model(&shared.models[c->rank], model, MODEL, FSDP2, c->rank, c->world, 1);
    if (lorasync_open(&d, &s, err) < 0 || add_all(s, &shared.models[c->rank], err) < 0) shared.failed[c->rank]++;
    for (i = 0; i < num_engines && c->rank == 0; i++) {
        static const char *const names[3] = {"engine a", "engine b", "engine c"};
        lorasync_transport       t        = transport_to(&shared.engines[i], names[i]);
        if (lorasync_attach(s, &t, err) < 0) shared.failed[c->rank]++;
    }
    if (lorasync_compile(s, err) < 0) shared.failed[c->rank]++;
    return s;
}

static void version_story(rank_context *c)
{
    lorasync_error    err;
    lorasync_session *s = story_session(c, 1, &err);
    engine           *e = &shared.engines[0];
    lorasync_report   report;
    int               i;
    MUST(lorasync_sync(s, 0, &report, &err), LORASYNC_OK); /* the next one */
    HOLDS(report.version == 1);
    MUST(lorasync_sync(s, 3, &report, &err), LORASYNC_OK);
    HOLDS(report.version == 3);
    MUST(lorasync_sync(s, 3, &report, &err), LORASYNC_E_VERSION);
    MUST(lorasync_sync(s, 2, &report, &err), LORASYNC_E_VERSION);
    HOLDS(report.version == 3);
    MUST(lorasync_sync(s, c->rank == 1 ? 5 : 4, NULL, &err), LORASYNC_E_DISAGREE);
    HOLDS(strstr(err.text, "version: 4 on rank 0, 5 on rank 1"));
    MUST(lorasync_sync(s, c->rank == 1 ? 2 : 4, NULL, &err), LORASYNC_E_VERSION); /* one rank is behind */
    HOLDS(strstr(err.text, "rank 1: version 2 is not newer than 3"));
    for (i = 4; i < 10; i++) { /* and all is well again, digests too */
        fill_model(&shared.models[c->rank], i);
        MUST(lorasync_sync(s, (uint64_t)i, &report, &err), LORASYNC_OK);
        HOLDS(c->rank || (e->served == (uint64_t)i && e->digest == report.digest));
        if (c->rank == 0) {
            lorasync_image *image;
            MUST(lorasync_image_parse(e->file, e->num_bytes, NULL, &image, &err), LORASYNC_OK);
            MUST(lorasync_image_verify(image, &err), LORASYNC_OK);
            lorasync_image_free(image);
        }
    }
    HOLDS(c->rank || e->stages == 8);
    MUST(lorasync_begin(s, UINT64_MAX, &err), LORASYNC_OK);
    MUST(lorasync_wait(s, NULL, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, UINT64_MAX, NULL, &err), LORASYNC_E_VERSION);
    MUST(lorasync_sync(s, 0, NULL, &err), LORASYNC_E_VERSION); /* there is no next one */
    lorasync_close(s);
}

static void nan_story(rank_context *c)
{
    lorasync_error    err;
    lorasync_session *s = story_session(c, 1, &err);
    engine           *e = &shared.engines[0];
    rank_model       *m = &shared.models[c->rank];
    MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    if (c->rank == 2) m->memory[2][9] = (float)NAN;
    MUST(lorasync_begin(s, 2, &err), c->rank == 2 ? LORASYNC_E_NAN : LORASYNC_OK);
    MUST(lorasync_wait(s, NULL, &err), LORASYNC_E_NAN);
    HOLDS(strstr(err.text, "rank 2: " KEY_QB ": NaN or Inf at element [17, 1]"));
    HOLDS(c->rank || (e->served == 1 && e->stages == 1));
    HOLDS(lorasync_session_image(s) == NULL);
    fill_model(m, 5);
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_OK);
    HOLDS(c->rank || e->served == 2);
    lorasync_close(s);
}

static void engine_story(rank_context *c)
{
    lorasync_error    err;
    lorasync_session *s = story_session(c, 3, &err);
    engine           *e = shared.engines;
    lorasync_report   report;
    MUST(lorasync_sync(s, 1, &report, &err), LORASYNC_OK);
    HOLDS(c->rank || report.num_engines == 3);
    if (c->rank == 0) e[1].fail_stage = 1;
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_E_IO);
    HOLDS(strstr(err.text, "engine b") && strstr(err.text, "the engine has no room"));
    HOLDS(c->rank || (e[0].served == 1 && e[1].served == 1 && e[2].served == 1 && e[0].aborts == 1));
    if (c->rank == 0) e[1].fail_stage = 0, e[0].fail_commit = 1;
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_E_IO);
    HOLDS(strstr(err.text, "engine a"));
    HOLDS(c->rank || (e[0].served == 1 && e[1].served == 1 && e[2].served == 1));
    if (c->rank == 0) e[0].fail_commit = 0, e[2].fail_commit = 1;
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_E_IO); /* two of three have it: said, and mended by the retry */
    HOLDS(strstr(err.text, "engine c"));
    HOLDS(c->rank || (e[0].served == 2 && e[1].served == 2 && e[2].served == 1));
    if (c->rank == 0) e[2].fail_commit = 0, e[1].slow_ms = 100;
    MUST(lorasync_sync(s, 2, &report, &err), LORASYNC_OK);
    HOLDS(c->rank || (e[0].served == 2 && e[1].served == 2 && e[2].served == 2 && report.publish_ns >= 100000000));
    HOLDS(report.publish_ns >= 100000000); /* on every rank, as the root measured it */
    lorasync_close(s);
    HOLDS(c->rank || (e[0].closes == 1 && e[1].closes == 1 && e[2].closes == 1));
}

/* What is published is what was there at begin. */
static void snapshot_story(rank_context *c)
{
    lorasync_error       err;
    lorasync_session    *s = story_session(c, 1, &err);
    engine              *e = &shared.engines[0];
    static unsigned char still[1 << 16];
    MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    if (c->rank == 0) memcpy(still, e->file, e->num_bytes);
    MUST(lorasync_begin(s, 2, &err), LORASYNC_OK);
    memset(shared.models[c->rank].memory, 0xff, sizeof shared.models[0].memory);
    MUST(lorasync_wait(s, NULL, &err), LORASYNC_OK);
    if (c->rank == 0) {
        lorasync_image *a, *b;
        MUST(lorasync_image_parse(still, e->num_bytes, NULL, &a, &err), LORASYNC_OK);
        MUST(lorasync_image_parse(e->file, e->num_bytes, NULL, &b, &err), LORASYNC_OK);
        HOLDS(b->version == 2 && a->digest == b->digest && memcmp(a->payload, b->payload, a->payload_bytes) == 0);
        lorasync_image_free(a), lorasync_image_free(b);
    }
    lorasync_close(s);
}

static void tell(void (*story)(rank_context *), int world)
{
    int r;
    for (stories_no_direct = 0; stories_no_direct < 2; stories_no_direct++) {
        memset(&shared, 0, sizeof shared);
        run_threads(world, story, NULL);
        for (r = 0; r < world; r++) CHECK_EQ(shared.failed[r], 0);
    }
}

/* Two sessions of one communicator, of tensors of equal shapes, are synced in the other order on one rank: nothing is
   published. */
static void order_story(rank_context *c)
{
    lorasync_desc     d    = plain_desc(&c->comm);
    rank_model       *m    = &shared.models[c->rank];
    lorasync_session *s[2] = {NULL, NULL};
    lorasync_error    err;
    int               i, first = c->rank == 1, run;
    d.no_direct = 1;
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    for (i = 0; i < 2; i++)
        MUST(open_session(&d, m, c->rank == 0 ? &shared.engines[i] : NULL, &s[i], &err), LORASYNC_OK);
    for (run = 0; run < 2; run++) {
        if (run) first = 0;
        for (i = 0; i < 2; i++) {
            if (stories_no_direct) lorasync_begin(s[i ^ first], 1, &err);
            else MUST(lorasync_sync(s[i ^ first], 1, NULL, &err), run ? LORASYNC_OK : LORASYNC_E_DISAGREE);
        }
        for (i = 0; i < 2 && stories_no_direct; i++)
            MUST(lorasync_wait(s[i ^ first], NULL, &err), run ? LORASYNC_OK : LORASYNC_E_DISAGREE);
        if (!run) HOLDS(strstr(err.text, "same order") != NULL);
        for (i = 0; i < 2 && c->rank == 0; i++) HOLDS(shared.engines[i].served == (uint64_t)run);
    }
    for (i = 0; i < 2; i++) lorasync_close(s[i]);
}

static void versions(void) { tell(version_story, 3); }
static void sessions_in_order(void) { tell(order_story, 3); }
static void nan_is_refused(void) { tell(nan_story, 3); }
static void engines_fail(void) { tell(engine_story, 3); }
static void snapshot(void) { tell(snapshot_story, 3); }

static void one_function_transport(void)
{
    static rank_model  m;
    static engine      e;
    lorasync_desc      d = plain_desc(NULL);
    lorasync_session  *s = NULL;
    lorasync_error     err;
    lorasync_transport t;
    memset(&t, 0, sizeof t), memset(&e, 0, sizeof e);
    t.size = offsetof(lorasync_transport, stage) + sizeof t.stage, t.stage = engine_stage, t.user = &e;
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
    CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_attach(s, &t, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    CHECK(e.stages == 1 && e.staged == 1);
    e.fail_stage = 1;
    CHECK_EQ(lorasync_sync(s, 2, NULL, &err), LORASYNC_E_IO);
    e.fail_stage = 0;
    CHECK_EQ(lorasync_sync(s, 2, NULL, &err), LORASYNC_OK);
    CHECK_EQ(e.staged, 2);
    lorasync_close(s);
}

/* -- resuming */

static char folder[256];

static void make_folder(void)
{
    snprintf(folder, sizeof folder, "/tmp/lorasync_test_session_XXXXXX");
    if (!mkdtemp(folder)) folder[0] = 0;
}

static void remove_folder(void)
{
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", folder);
    if (system(command) != 0) fprintf(stderr, "%s is left\n", folder);
}

static layout load_layout;
static int    load_half; /* published as BF16 */

static void load_story(rank_context *c)
{
    lorasync_desc     d = plain_desc(&c->comm);
    rank_model       *m = &shared.models[c->rank];
    static rank_model before[MAX_WORLD];
    lorasync_session *s = NULL;
    lorasync_error    err;
    char              path[400];
    size_t            i;
    d.wire_dtype = load_half ? LORASYNC_BF16 : LORASYNC_DTYPE_NONE;
    make_model(m, model, MODEL, load_layout, c->rank, c->world, 11);
    MUST(lorasync_open(&d, &s, &err), LORASYNC_OK);
    MUST(add_all(s, m, &err), LORASYNC_OK);
    snprintf(path, sizeof path, "%s/%d_%d_%d_%d", folder, (int)load_layout, load_half, c->world, stories_no_direct);
    MUST(lorasync_attach_directory(s, path, &err), LORASYNC_OK);
    MUST(lorasync_compile(s, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    memcpy(&before[c->rank], m, sizeof *m);
    memset(m->memory, 0xA5, sizeof m->memory);
    snprintf(path + strlen(path), 40, "/default/latest");
    MUST(lorasync_load(s, path, NULL, &err), LORASYNC_OK);
    for (i = 0; i < m->num; i++) {
        lorasync_piece *p    = &m->pieces[i];
        int             ours = strstr(p->name, ".default.") != NULL;
        int64_t         k, n = piece_numel(p);
        for (k = 0; k < n && p->box.len[0]; k++) {
            unsigned char want[4];
            float         f = truth(m->number[i], element_of(p, k), 11);
            uint16_t      half;
            const char   *at = (const char *)p->data + (size_t)k * item(p->dtype);
            if (load_half) {
                lorasync_convert(&half, LORASYNC_BF16, &f, LORASYNC_F32, 1, NULL);
                lorasync_convert(&f, LORASYNC_F32, &half, LORASYNC_BF16, 1, NULL);
            }
            lorasync_convert(want, p->dtype, &f, LORASYNC_F32, 1, NULL);
            if (!ours) memset(want, 0xA5, sizeof want); /* nothing else is written */
            if (memcmp(want, at, item(p->dtype)) != 0) {
                HOLDS(!"element restored");
                break;
            }
        }
    }
    /* wrong paths and wrong models leave the parameters alone */
    memcpy(&before[c->rank], m, sizeof *m);
    MUST(lorasync_load(s, "/nowhere/at/all", NULL, &err), LORASYNC_E_NOT_FOUND);
    HOLDS(strstr(err.text, "/nowhere/at/all"));
    MUST(lorasync_load(s, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    MUST(lorasync_load(s, c->rank == c->world - 1 ? "/nowhere/else" : path, NULL, &err),
         c->world > 1 ? LORASYNC_E_DISAGREE : LORASYNC_E_NOT_FOUND);
    HOLDS(memcmp(&before[c->rank], m, sizeof *m) == 0);
    MUST(lorasync_load(s, path, NULL, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_OK);
    lorasync_close(s);
    /* another model: one tensor more, one less, another shape */
    for (i = 0; i < 3; i++) {
        make_model(m, model, MODEL, load_layout, c->rank, c->world, 12);
        if (i == 1) m->pieces[5].name = P "x.lora_A.zzz.weight", m->pieces[6].name = P "x.lora_B.zzz.weight";
        if (i == 0)
            m->pieces[3].name = P "mlp.down_proj.lora_A.default.weight",
            m->pieces[4].name = P "mlp.down_proj.lora_B.default.weight";
        if (i == 2) {
            parameter wide[MODEL];
            memcpy(wide, model, sizeof model);
            wide[6].shape[0] = 35;
            make_model(m, wide, MODEL, load_layout, c->rank, c->world, 12);
        }
        d = plain_desc(&c->comm);
        MUST(open_session(&d, m, NULL, &s, &err), LORASYNC_OK);
        memcpy(&before[c->rank], m, sizeof *m);
        MUST(lorasync_load(s, path, NULL, &err), i == 2 ? LORASYNC_E_DISAGREE : LORASYNC_E_NOT_FOUND);
        HOLDS(strstr(err.text, i == 0 ? "down_proj" : "up_proj"));
        HOLDS(memcmp(&before[c->rank], m, sizeof *m) == 0);
        MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
        lorasync_close(s);
    }
}

static void load_restores(void)
{
    int how;
    make_folder();
    REQUIRE(folder[0]);
    for (how = 0; how < NUM_LAYOUTS; how++)
        for (load_half = 0; load_half < 2; load_half++)
            load_layout = (layout)how, tell(load_story, how % 2 ? 1 : 3), tell(load_story, 2);
    remove_folder();
}

/* A scale would come back twice. */
static void load_with_a_scale(void)
{
    static rank_model m;
    lorasync_desc     d = plain_desc(NULL);
    lorasync_session *s = NULL;
    lorasync_error    err;
    char              path[400];
    int               scaled;
    make_folder();
    REQUIRE(folder[0]);
    for (scaled = 0; scaled < 2; scaled++) {
        make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
        if (scaled) m.pieces[2].scale = 0.5;
        REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
        CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
        snprintf(path, sizeof path, "%s/%d", folder, scaled);
        CHECK_EQ(lorasync_attach_directory(s, path, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
        snprintf(path + strlen(path), 40, "/default/v1");
        CHECK_EQ(lorasync_load(s, path, NULL, &err), scaled ? LORASYNC_E_UNSUPPORTED : LORASYNC_OK);
        if (scaled) CHECK_HAS(err.text, KEY_QB ": a session with piece.scale cannot load");
        CHECK_EQ(lorasync_sync(s, 2, NULL, &err), LORASYNC_OK);
        lorasync_close(s);
    }
    remove_folder();
}

/* What a file means depends on its config: another scale makes another adapter of it. */
static void load_compares_scales(void)
{
    static rank_model        m;
    static const char *const configs[] = {
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"target_modules\":[\"q_proj\",\"up_proj\"]}",
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":999,\"target_modules\":[\"q_proj\",\"up_proj\"]}",
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"use_rslora\":true,\"target_modules\":[\"q_proj\","
        "\"up_proj\"]}",
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"alpha_pattern\":{\"up_proj\":8},"
        "\"target_modules\":[\"q_proj\",\"up_proj\"]}",
    };
    lorasync_desc     d = plain_desc(NULL);
    lorasync_session *s = NULL;
    lorasync_error    err;
    char              path[400], file[460];
    int               i;
    make_folder();
    REQUIRE(folder[0]);
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
    CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_attach_directory(s, folder, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    lorasync_close(s);
    snprintf(path, sizeof path, "%s/default/v1", folder);
    snprintf(file, sizeof file, "%s/adapter_model.safetensors", path);
    for (i = 0; i < 4; i++) {
        d.config_json = configs[i];
        d.lora_alpha  = 0;
        fill_model(&m, 2);
        REQUIRE(open_session(&d, &m, NULL, &s, &err) == LORASYNC_OK);
        CHECK_EQ(lorasync_load(s, path, NULL, &err), i ? LORASYNC_E_CONFIG : LORASYNC_OK);
        if (i == 1) CHECK_HAS(err.text, "scale 2, this session 124.875");
        if (i == 2) CHECK_HAS(err.text, "scale 2, this session 5.65685");
        if (i == 3)
            CHECK_HAS(
                err.text,
                "module model.layers.0.mlp.up_proj: the file's adapter_config.json gives it scale 2, this session 1;");
        CHECK(m.memory[1][0] == truth(1, 0, i ? 2 : 1));           /* untouched, or loaded */
        CHECK_EQ(lorasync_load(s, file, NULL, &err), LORASYNC_OK); /* no config beside it is looked for */
        lorasync_close(s);
    }
    remove_folder();
}

/* Memory that is two tensors can be loaded when the file has the same for both. */
static const parameter fused[] = {
    {P "self_attn.q_proj.lora_A.default.weight", LORASYNC_F32, 2, {8, 16, 0}},
    {P "self_attn.q_proj.lora_B.default.weight", LORASYNC_F32, 2, {24, 8, 0}},
    {P "self_attn.k_proj.lora_A.default.weight", LORASYNC_F32, 2, {8, 16, 0}},
    {P "self_attn.k_proj.lora_B.default.weight", LORASYNC_F32, 2, {24, 8, 0}},
    {P "self_attn.v_proj.lora_A.default.weight", LORASYNC_F32, 2, {8, 16, 0}},
    {P "self_attn.v_proj.lora_B.default.weight", LORASYNC_F32, 2, {24, 8, 0}},
};

/* On the last rank k and v have q's A; `differs` in the file: nothing, k's A, or v's. */
static int fused_differs;

static void fused_story(rank_context *c)
{
    lorasync_desc     d = plain_desc(&c->comm);
    rank_model       *m = &shared.models[c->rank];
    lorasync_session *s = NULL;
    lorasync_error    err;
    char              path[400];
    int               fuses = c->rank == c->world - 1, i;
    float             before;
    d.no_direct = stories_no_direct;
    make_model(m, fused, 6, FSDP2, c->rank, c->world, 1);
    for (i = 2; i < 6; i += 2)
        if (fused_differs != i / 2) memcpy(m->memory[i], m->memory[0], sizeof m->memory[0]);
    snprintf(path, sizeof path, "%s/fused%d_%d_%d", folder, fused_differs, c->world, stories_no_direct);
    MUST(lorasync_open(&d, &s, &err), LORASYNC_OK);
    MUST(add_all(s, m, &err), LORASYNC_OK);
    MUST(lorasync_attach_directory(s, path, &err), LORASYNC_OK);
    MUST(lorasync_compile(s, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    lorasync_close(s);
    before = m->memory[0][0];
    memset(m->memory, 0x11, sizeof m->memory);
    if (fuses) m->pieces[2].data = m->pieces[4].data = m->pieces[0].data;
    MUST(open_session(&d, m, NULL, &s, &err), LORASYNC_OK);
    snprintf(path + strlen(path), 40, "/default/v1");
    MUST(lorasync_load(s, path, NULL, &err), fused_differs ? LORASYNC_E_LAYOUT : LORASYNC_OK);
    if (fused_differs) {
        HOLDS(strstr(err.text, "k_proj.lora_A") &&
              strstr(err.text, fused_differs == 1 ? "q_proj.lora_A" : "v_proj.lora_A"));
        HOLDS(strstr(err.text, "different values") != NULL);
    }
    HOLDS((m->memory[0][0] == before) == !fused_differs);
    lorasync_close(s);
    if (fuses) m->pieces[2].data = (float *)m->pieces[0].data + 1; /* never right */
    MUST(open_session(&d, m, NULL, &s, &err), LORASYNC_OK);
    MUST(lorasync_load(s, path, NULL, &err), LORASYNC_E_LAYOUT);
    HOLDS(strstr(err.text, "overlap in memory") != NULL);
    lorasync_close(s);
}

/* Columns of one matrix, side by side: they interleave and share nothing. */
static void load_into_columns(const char *path)
{
    static rank_model m;
    static float      rows[8][32];
    lorasync_desc     d = plain_desc(NULL);
    lorasync_session *s = NULL;
    lorasync_error    err;
    make_model(&m, fused, 6, FSDP2, 0, 1, 1);
    m.pieces[0].data = &rows[0][0], m.pieces[2].data = &rows[0][16];
    m.pieces[0].stride[0] = m.pieces[2].stride[0] = 32, m.pieces[0].stride[1] = m.pieces[2].stride[1] = 1;
    REQUIRE(open_session(&d, &m, NULL, &s, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_load(s, path, NULL, &err), LORASYNC_OK);
    CHECK(rows[7][15] == truth(0, 7 * 16 + 15, 1) && rows[7][31] == truth(2, 7 * 16 + 15, 1));
    lorasync_close(s);
}

static void load_into_one_memory(void)
{
    char path[400];
    make_folder();
    REQUIRE(folder[0]);
    for (fused_differs = 0; fused_differs < 3; fused_differs++) tell(fused_story, 1), tell(fused_story, 3);
    snprintf(path, sizeof path, "%s/fused1_1_0/default/v1", folder);
    load_into_columns(path);
    remove_folder();
}

/* -- other kinds of tensors */

static const parameter kinds[] = {
    {"base_model.model.model.embed_tokens.lora_embedding_A.default", LORASYNC_F32, 2, {4, 40, 0}},
    {"base_model.model.model.embed_tokens.lora_embedding_B.default", LORASYNC_F32, 2, {16, 4, 0}},
    {P "self_attn.q_proj.lora_A.default.weight", LORASYNC_F32, 2, {4, 16, 0}},
    {P "self_attn.q_proj.lora_B.default.weight", LORASYNC_F32, 2, {24, 4, 0}},
    {P "self_attn.q_proj.lora_magnitude_vector.default.weight", LORASYNC_F32, 1, {24, 0, 0}},
    {"base_model.model.model.embed_tokens.lora_magnitude_vector.default.weight", LORASYNC_F32, 1, {16, 0, 0}},
    {"base_model.model.classifier.modules_to_save.default.weight", LORASYNC_F32, 2, {3, 16, 0}},
    {"base_model.model.classifier.original_module.weight", LORASYNC_F32, 2, {3, 16, 0}},
    {"base_model.model.model.embed_tokens.base_layer.weight", LORASYNC_F32, 2, {40, 16, 0}},
};

static void other_kinds(void)
{
    static rank_model     m;
    static engine         e;
    lorasync_desc         d = plain_desc(NULL);
    lorasync_session     *s = NULL;
    lorasync_session_info info;
    lorasync_error        err;
    lorasync_image       *image;
    memset(&e, 0, sizeof e);
    d.lora_alpha  = 0; /* the config has it */
    d.config_json = "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"use_dora\":true,\"target_modules\":[\"q_proj\","
                    "\"embed_tokens\"],\"modules_to_save\":[\"classifier\"]}";
    make_model(&m, kinds, 9, FSDP2, 0, 1, 1);
    if (open_session(&d, &m, &e, &s, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    else CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    lorasync_get_info(s, &info);
    CHECK_EQ(info.num_taken, 7);
    CHECK_EQ(info.num_dropped, 2);
    lorasync_close(s);
    REQUIRE(lorasync_image_parse(e.file, e.num_bytes, NULL, &image, &err) == LORASYNC_OK);
    CHECK_EQ(image->num_tensors, 7);
    CHECK(lorasync_image_find(image, "base_model.model.model.embed_tokens.lora_embedding_A") != NULL);
    CHECK(lorasync_image_find(image, P "self_attn.q_proj.lora_magnitude_vector") != NULL);
    CHECK(lorasync_image_find(image, "base_model.model.classifier.weight") != NULL);
    CHECK_HAS(e.config, "\"use_dora\": true");
    lorasync_image_free(image);
}

/* A piece.scale of 0 stands for 1: folding 0 would publish lora_B as it is. */
static void fold_zero(void)
{
    static rank_model        m;
    static const char *const configs[] = {
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":0,\"target_modules\":[\"q_proj\",\"up_proj\"]}",
        "{\"peft_type\":\"LORA\",\"r\":8,\"lora_alpha\":16,\"alpha_pattern\":{\"up_proj\":0},"
        "\"target_modules\":[\"q_proj\",\"up_proj\"]}",
    };
    lorasync_desc     d = plain_desc(NULL);
    lorasync_session *s = NULL;
    lorasync_error    err;
    int               i;
    d.fold_scale = 1, d.lora_alpha = 0;
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    for (i = 0; i < 2; i++) {
        d.config_json = configs[i];
        CHECK_EQ(open_session(&d, &m, NULL, &s, &err), LORASYNC_E_CONFIG);
        CHECK_HAS(err.text,
                  i ? "up_proj.lora_B.weight: fold_scale would multiply it by 0" : "fold_scale would multiply it by 0");
        lorasync_close(s);
    }
}

static void all_linear(void)
{
    static rank_model     m;
    lorasync_desc         d = plain_desc(NULL);
    lorasync_filter       f;
    lorasync_session     *s = NULL;
    lorasync_session_info info;
    lorasync_error        err;
    parameter             p[8];
    memset(&f, 0, sizeof f);
    f.target_pattern = "all-linear", d.filter = &f;
    memcpy(p, model, sizeof p[0] * 7);
    p[3].name = "base_model.model.lm_head.lora_A.default.weight",
    p[4].name = "base_model.model.lm_head.lora_B.default.weight"; /* the output embedding is left out */
    p[7] = model[7], p[7].name = "base_model.model.lm_head.base_layer.weight";
    make_model(&m, p, 8, FSDP2, 0, 1, 1);
    if (open_session(&d, &m, NULL, &s, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    lorasync_get_info(s, &info);
    CHECK_EQ(info.num_taken, 4);
    CHECK_EQ(info.num_added, 8);
    lorasync_close(s);
}

/* A pipeline stage may have no linear module at all; if no stage has one, all are told. */
static void stage_story(rank_context *c)
{
    static float      zeros[64];
    lorasync_desc     d = plain_desc(&c->comm);
    lorasync_filter   f;
    lorasync_session *s = NULL;
    lorasync_error    err;
    lorasync_piece    p;
    int               i, some;
    memset(&f, 0, sizeof f);
    f.target_pattern = "all-linear", d.filter = &f;
    for (some = 1; some >= 0; some--) {
        MUST(lorasync_open(&d, &s, &err), LORASYNC_OK);
        for (i = 0; i < 3; i++) {
            static const char *const names[] = {"model.norm.weight", "m.q_proj.lora_A.default.weight",
                                                "m.q_proj.lora_B.default.weight"};
            p                                = whole_piece(names[i], LORASYNC_F32, i ? 2 : 1, 8, 8, zeros);
            if (i == 0 || (some && c->rank == 0)) MUST(lorasync_add(s, &p, &err), LORASYNC_OK);
        }
        MUST(lorasync_compile(s, &err), some ? LORASYNC_OK : LORASYNC_E_EMPTY);
        if (some) MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
        lorasync_close(s);
    }
}

static void all_linear_elsewhere(void) { tell(stage_story, 2); }

static void base_story(rank_context *c)
{
    lorasync_desc         d = plain_desc(&c->comm);
    rank_model           *m = &shared.models[c->rank];
    lorasync_filter       f;
    lorasync_session     *s = NULL;
    lorasync_session_info info;
    lorasync_error        err;
    memset(&f, 0, sizeof f);
    f.base = 2, d.filter = &f, d.no_direct = stories_no_direct;
    make_model(m, model, MODEL, ZERO3, c->rank, c->world, 1);
    MUST(open_session(&d, m, NULL, &s, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    lorasync_get_info(s, &info);
    HOLDS(info.num_taken == 3);
    if (c->rank == 0) {
        const lorasync_tensor *t = lorasync_image_find(lorasync_session_image(s), "model.norm.weight");
        int64_t                i;
        HOLDS(t != NULL);
        for (i = 0; t && i < 16; i++) HOLDS(((const float *)t->data)[i] == truth(8, i, 1));
    }
    lorasync_close(s);
}

static void base_weights(void) { tell(base_story, 2); }

/* The built-in transports publish adapters: what they would refuse at every sync is refused at once. Engines of one's
   own take it. */
static void base_and_transports(void)
{
    static rank_model  m;
    static engine      e;
    lorasync_desc      d = plain_desc(NULL);
    lorasync_shm_desc  sd;
    lorasync_transport t;
    lorasync_session  *s = NULL;
    lorasync_error     err;
    int                kind;
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    memset(&sd, 0, sizeof sd);
    sd.name = "test-session-base", d.filter = &with_base;
    for (kind = 0; kind < 3; kind++) {
        REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
        CHECK_EQ(add_all(s, &m, &err), LORASYNC_OK);
        if (kind == 0) CHECK_EQ(lorasync_attach_directory(s, "never-made", &err), LORASYNC_OK);
        if (kind == 1) REQUIRE(lorasync_shm_open(&sd, &t, &err) == LORASYNC_OK);
        if (kind == 2) t = transport_to(&e, "own");
        if (kind) CHECK_EQ(lorasync_attach(s, &t, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_compile(s, &err), kind == 2 ? LORASYNC_OK : LORASYNC_E_UNSUPPORTED);
        if (kind < 2)
            CHECK_HAS(err.text,
                      kind ? "transport 'test-session-base' publishes adapters" : "/never-made' publishes adapters");
        lorasync_close(s);
    }
    CHECK_EQ(lorasync_shm_remove("test-session-base", &err), LORASYNC_OK);
}

/* -- memory */

static void memory_story(rank_context *c)
{
    lorasync_desc      d = plain_desc(&c->comm);
    rank_model        *m = &shared.models[c->rank];
    lorasync_session  *s = NULL;
    lorasync_allocator a;
    test_memory        memory;
    lorasync_error     err;
    char               path[300];
    long               before;
    int                i;
    give_allocator(&d, &a, &memory);
    d.no_direct = stories_no_direct;
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    snprintf(path, sizeof path, "%s/memory%d", folder, stories_no_direct);
    MUST(lorasync_open(&d, &s, &err), LORASYNC_OK);
    MUST(add_all(s, m, &err), LORASYNC_OK);
    MUST(lorasync_attach_directory(s, path, &err), LORASYNC_OK);
    MUST(lorasync_compile(s, &err), LORASYNC_OK);
    before = memory.total;
    for (i = 1; i < 6; i++) MUST(lorasync_sync(s, (uint64_t)i, NULL, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_E_VERSION);
    HOLDS(memory.total == before);
    lorasync_close(s);
    HOLDS(memory.live == 0);
}

static void no_allocation_per_sync(void)
{
    make_folder();
    REQUIRE(folder[0]);
    tell(memory_story, 2);
    remove_folder();
}

typedef struct starve {
    int  victim, world;
    long nth, total;
} starve;

static starve starving;

static void starve_story(rank_context *c)
{
    lorasync_desc      d = plain_desc(&c->comm);
    rank_model        *m = &shared.models[c->rank];
    lorasync_session  *s = NULL;
    lorasync_allocator a;
    test_memory        memory;
    lorasync_error     err;
    lorasync_transport t = transport_to(&shared.engines[c->rank], "engine");
    lorasync_status    status;
    size_t             i;
    give_allocator(&d, &a, &memory);
    if (c->rank == starving.victim) memory.fail_at = starving.nth;
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    status = lorasync_open(&d, &s, &err);
    if (status == LORASYNC_OK) {
        for (i = 0; i < m->num; i++) lorasync_add(s, &m->pieces[i], &err); /* a failure comes again at compile */
        lorasync_attach(s, &t, &err);
        status = lorasync_compile(s, &err);
        if (status == LORASYNC_OK) status = lorasync_sync(s, 1, NULL, &err);
    } else { /* nothing to compile with: tell the others */
        if (c->comm.abort) c->comm.abort(c->comm.user, "open failed");
    }
    shared.status[c->rank] = status;
    lorasync_close(s);
    shared.live[c->rank] = memory.live;
    if (c->rank == starving.victim) starving.total = memory.total;
}

static void starved(int world, int victim)
{
    long nth;
    int  r, failures = 0;
    for (nth = 1; nth < 2000; nth++) {
        memset(&shared, 0, sizeof shared), memset(&starving, 0, sizeof starving);
        starving.victim = victim, starving.nth = nth;
        run_threads(world, starve_story, NULL);
        for (r = 0; r < world; r++) {
            CHECK_EQ(shared.live[r], 0);
            CHECK_EQ(shared.status[r] < 0, shared.status[0] < 0);
            CHECK(shared.status[r] == LORASYNC_OK || shared.status[r] == LORASYNC_E_MEMORY ||
                  shared.status[r] == LORASYNC_E_COMM);
        }
        failures += shared.status[0] < 0;
        if (shared.status[0] == LORASYNC_OK && starving.total < nth) break;
    }
    CHECK(failures > 30);
    printf("     %d failing allocations\n", failures);
}

static void no_memory_anywhere(void)
{
    starved(1, 0);
    starved(2, 0);
    starved(2, 1);
}

/* -- losing a rank */

static void lost_story(rank_context *c)
{
    lorasync_desc     d = plain_desc(&c->comm);
    rank_model       *m = &shared.models[c->rank];
    lorasync_session *s = NULL;
    lorasync_error    err;
    d.timeout_ms = test_ms(300);
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    if (stories_no_direct && c->rank == 1) return; /* never compiles */
    if (stories_no_direct) {
        MUST(lorasync_open(&d, &s, &err), LORASYNC_OK);
        MUST(add_all(s, m, &err), LORASYNC_OK);
        HOLDS(lorasync_is_lost(lorasync_compile(s, &err)));
        MUST(lorasync_compile(s, &err), LORASYNC_E_LOST);
    } else {
        MUST(open_session(&d, m, NULL, &s, &err), LORASYNC_OK);
        MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
        if (c->rank != 1) {
            HOLDS(lorasync_is_lost(lorasync_sync(s, 2, NULL, &err)));
            MUST(lorasync_sync(s, 3, NULL, &err), LORASYNC_E_LOST);
            MUST(lorasync_begin(s, 3, &err), LORASYNC_E_LOST);
            MUST(lorasync_wait(s, NULL, &err), LORASYNC_E_LOST);
            MUST(lorasync_load(s, "x", NULL, &err), LORASYNC_E_LOST);
        }
    }
    lorasync_close(s);
}

static void rank_is_lost(void) { tell(lost_story, 3); }

/* A communicator that fails at one call, and counts those of abort. */
typedef struct failing_comm {
    int calls, fails_at, aborts, calls_after;
} failing_comm;

static lorasync_status failing_call(failing_comm *f, lorasync_error *err)
{
    if (f->aborts) f->calls_after++;
    if (f->calls++ != f->fails_at) return LORASYNC_OK;
    return test_refuse(err, LORASYNC_E_PEER, "the line is cut");
}

static lorasync_status failing_all_gather(void *user, const void *in, void *out, size_t num_bytes, int timeout_ms,
                                          lorasync_error *err)
{
    (void)timeout_ms;
    memcpy(out, in, num_bytes);
    return failing_call((failing_comm *)user, err);
}

static lorasync_status failing_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                        const lorasync_message *receives, size_t num_receives, int timeout_ms,
                                        lorasync_error *err)
{
    (void)sends, (void)num_sends, (void)receives, (void)num_receives, (void)timeout_ms;
    return failing_call((failing_comm *)user, err);
}

static void failing_abort(void *user, const char *why)
{
    CHECK_HAS(why, "the line is cut");
    ((failing_comm *)user)->aborts++;
}

static lorasync_comm failing(failing_comm *f, int fails_at)
{
    lorasync_comm c = lorasync_solo();
    memset(f, 0, sizeof *f);
    f->fails_at  = fails_at;
    c.user       = f;
    c.all_gather = failing_all_gather;
    c.exchange   = failing_exchange;
    c.abort      = failing_abort;
    return c;
}

/* Whatever call of the communicator fails: it is given up once, used no more, and every later call says that it is
   lost. */
static int session_on(const lorasync_comm *c)
{
    static rank_model m;
    lorasync_desc     d = plain_desc(c);
    lorasync_session *s = NULL;
    lorasync_error    err;
    lorasync_status   status;
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    status = open_session(&d, &m, NULL, &s, &err);
    if (status == LORASYNC_OK) status = lorasync_sync(s, 1, NULL, &err);
    if (status < 0) {
        CHECK_EQ(status, LORASYNC_E_PEER);
        CHECK_HAS(err.text, "the line is cut");
        status = lorasync_compile(s, &err);
        CHECK(status == LORASYNC_E_LOST || status == LORASYNC_E_STATE);
        status = lorasync_sync(s, 2, NULL, &err);
        CHECK(status == LORASYNC_E_LOST || status == LORASYNC_E_STATE);
    }
    lorasync_close(s);
    return status >= 0;
}

static int stream_on(const lorasync_comm *c)
{
    static rank_model    m;
    lorasync_stream_desc d;
    lorasync_stream     *s = NULL;
    lorasync_error       err;
    lorasync_status      status;
    size_t               i;
    memset(&d, 0, sizeof d);
    d.comm = c, d.bucket_bytes = 1024, d.keep_names = 1; /* several plans */
    make_model(&m, model, MODEL, FSDP2, 0, 1, 1);
    status = lorasync_stream_open(&d, &s, &err);
    for (i = 0; i < m.num && status == LORASYNC_OK; i++) status = lorasync_stream_add(s, &m.pieces[i], &err);
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, &err);
    if (status < 0) {
        CHECK_EQ(status, LORASYNC_E_PEER);
        CHECK_HAS(err.text, "the line is cut");
        status = lorasync_stream_compile(s, &err);
        CHECK(status == LORASYNC_E_LOST || status == LORASYNC_E_STATE);
        status = lorasync_stream_sync(s, 2, NULL, &err);
        CHECK(status == LORASYNC_E_LOST || status == LORASYNC_E_STATE);
    }
    lorasync_stream_close(s);
    return status >= 0;
}

static void lost_once(void)
{
    failing_comm f;
    int          stream, k, done;
    for (stream = 0; stream < 2; stream++)
        for (k = 0, done = 0; !done && k < 1000; k++) {
            lorasync_comm c = failing(&f, k);
            done            = stream ? stream_on(&c) : session_on(&c);
            CHECK_EQ(f.aborts, !done);
            CHECK_EQ(f.calls_after, 0);
        }
    CHECK(done);
}

/* -- transports that are slower than a deadline */

/* Publishing is not held against the ranks that wait for it. */
static void slow_story(rank_context *c)
{
    lorasync_desc     d = plain_desc(&c->comm);
    rank_model       *m = &shared.models[c->rank];
    engine           *e = &shared.engines[0];
    lorasync_session *s = NULL;
    lorasync_report   report;
    lorasync_error    err;
    d.timeout_ms = test_ms(300), d.no_direct = stories_no_direct, d.root = 1;
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    MUST(open_session(&d, m, c->rank == 1 ? e : NULL, &s, &err), LORASYNC_OK);
    if (c->rank == 1) e->slow_ms = e->slow_commit_ms = 700;
    MUST(lorasync_sync(s, 1, &report, &err), LORASYNC_OK);
    HOLDS(report.version == 1 && report.num_engines == 1);
    HOLDS((lorasync_session_image(s) != NULL) == (c->rank == 1));
    if (c->rank == 1) e->slow_commit_ms = 0, e->fail_stage = 1;
    MUST(lorasync_sync(s, 2, &report, &err), LORASYNC_E_IO);
    HOLDS(lorasync_session_image(s) == NULL); /* stamped with a version that nobody serves */
    HOLDS(strstr(err.text, "rank 1: transport 'engine' could not stage: the engine has no room") != NULL);
    if (c->rank == 1) e->slow_ms = e->fail_stage = 0;
    MUST(lorasync_sync(s, 2, &report, &err), LORASYNC_OK);
    MUST(lorasync_republish(s, &err), LORASYNC_NOTHING_NEW);
    lorasync_close(s);
}

static void slow_engine(void) { tell(slow_story, 3); }

/* One that takes longer than the others wait for publishing: they give up, and then nobody may serve the version. */
static void too_slow_story(rank_context *c)
{
    lorasync_desc     d = plain_desc(&c->comm);
    rank_model       *m = &shared.models[c->rank];
    engine           *e = &shared.engines[0];
    lorasync_session *s = NULL;
    lorasync_status   status;
    lorasync_error    err;
    d.publish_timeout_ms = test_ms(200), d.no_direct = stories_no_direct;
    make_model(m, model, MODEL, FSDP2, c->rank, c->world, 1);
    MUST(open_session(&d, m, c->rank == 0 ? e : NULL, &s, &err), LORASYNC_OK);
    MUST(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    if (c->rank == 0) e->slow_ms = 700;
    status = lorasync_sync(s, 2, NULL, &err);
    HOLDS(lorasync_is_lost(status));
    if (c->rank == 0) {
        HOLDS(e->served == 1 && e->stages == 2 && e->commits == 1 && e->aborts == 1);
        HOLDS(strstr(err.text, "version 2 was staged but not published") != NULL);
    } else {
        HOLDS(strstr(err.text, "the root, rank 0, was publishing version 2 to engine") != NULL);
        HOLDS(status != LORASYNC_E_TIMEOUT || strstr(err.text, "publish_timeout_ms") != NULL);
    }
    MUST(lorasync_sync(s, 2, NULL, &err), LORASYNC_E_LOST);
    lorasync_close(s);
}

static void too_slow_engine(void) { tell(too_slow_story, 3); }

/* A rank that is killed while the root stages. */
static void killed_story(rank_context *c)
{
    static rank_model m;
    static engine     e;
    lorasync_desc     d = plain_desc(&c->comm);
    lorasync_session *s = NULL;
    lorasync_status   status;
    lorasync_error    err;
    d.no_direct = stories_no_direct;
    make_model(&m, model, MODEL, FSDP2, c->rank, c->world, 1);
    CHECK_EQ(open_session(&d, &m, c->rank == 0 ? &e : NULL, &s, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
    if (c->rank == 0) e.slow_ms = 600;
    if (c->rank == 2 && fork() == 0) test_sleep_ms(250), kill(getppid(), SIGKILL), _exit(0);
    status = lorasync_sync(s, 2, NULL, &err);
    CHECK(lorasync_is_lost(status));
    if (c->rank == 0) CHECK(e.served == 1 && e.commits == 1 && e.aborts == 1);
    lorasync_close(s);
}

static void killed_while_staging(void)
{
    int direct;
    for (direct = 0; direct < 2; direct++) {
        stories_no_direct = !direct;
        CHECK_EQ(run_processes(3, killed_story, NULL), 1); /* the one that was killed */
    }
}

/* -- NULL where it is not allowed: one line for each call and argument, with what its error must name */

#define NULL_CALLS(X)                                                                                                  \
    X(lorasync_convert(NULL, LORASYNC_F32, buffer, LORASYNC_BF16, 1, e), "NULL")                                       \
    X(lorasync_convert(buffer, LORASYNC_F32, NULL, LORASYNC_BF16, 1, e), "NULL")                                       \
    X(lorasync_parse_name(NULL, &name, e), "raw_name")                                                                 \
    X(lorasync_parse_name("x.lora_A.weight", NULL, e), "out")                                                          \
    X(lorasync_pattern_compile(NULL, NULL, &pattern, e), "pattern")                                                    \
    X(lorasync_pattern_compile("a", NULL, NULL, e), "out")                                                             \
    X(lorasync_matcher_create(NULL, NULL, 0, NULL, NULL, e), "out")                                                    \
    X(lorasync_matcher_create(&linear, NULL, 3, NULL, &matcher, e), "no name")                                         \
    X(lorasync_local_open(2, NULL, e), "out is NULL")                                                                  \
    X(lorasync_local_join(NULL, 0, &comm, e), "local")                                                                 \
    X(lorasync_image_layout(NULL, NULL, &image, e), "desc")                                                            \
    X(lorasync_image_layout(&layout, NULL, NULL, e), "out")                                                            \
    X(lorasync_image_layout(&no_tensors, NULL, &image, e), "desc->tensors")                                            \
    X(lorasync_image_parse(NULL, 16, NULL, &image, e), "bytes")                                                        \
    X(lorasync_image_parse(buffer, 16, NULL, NULL, e), "out")                                                          \
    X(lorasync_image_verify(NULL, e), "image is NULL")                                                                 \
    X(lorasync_image_changes(NULL, digests, indices, &num, e), "image")                                                \
    X(lorasync_image_delta(NULL, 1, digests, NULL, &image, e), "image")                                                \
    X(lorasync_image_apply(NULL, NULL, NULL, NULL, &image, e), "delta")                                                \
    X(lorasync_plan_create(NULL, &plan, e), "desc")                                                                    \
    X(lorasync_plan_create(&plan_desc, NULL, e), "out")                                                                \
    X(lorasync_plan_begin(NULL, e), "plan is NULL")                                                                    \
    X(lorasync_plan_wait(NULL, e), "plan is NULL")                                                                     \
    X(lorasync_config_parse(NULL, 2, NULL, &config, e), "json")                                                        \
    X(lorasync_config_parse("{}", 2, NULL, NULL, e), "out")                                                            \
    X(lorasync_config_check(NULL, NULL, 0, e), "config")                                                               \
    X(lorasync_config_write(NULL, NULL, 0, NULL, &text, e), "desc")                                                    \
    X(lorasync_directory_open(NULL, &transport, e), "desc is NULL")                                                    \
    X(lorasync_shm_open(NULL, &transport, e), "desc is NULL")                                                          \
    X(lorasync_engine_open(NULL, &engine, e), "desc is NULL")                                                          \
    X(lorasync_engine_poll(NULL, 0, e), "engine is NULL")                                                              \
    X(lorasync_open_adapter(NULL, NULL, &image, &config, e), "path is NULL")                                           \
    X(lorasync_open_adapter(".", NULL, NULL, &config, e), "out_image is NULL")                                         \
    X(lorasync_policy_decide(NULL, &decision, e), "state is NULL")                                                     \
    X(lorasync_policy_decide(&state, NULL, e), "out is NULL")                                                          \
    X(lorasync_policy_verl(NULL, &state, e), "knobs is NULL")                                                          \
    X(lorasync_policy_miles(NULL, &state, e), "knobs is NULL")                                                         \
    X(lorasync_open(NULL, &session, e), "desc")                                                                        \
    X(lorasync_open(&desc, NULL, e), "out")                                                                            \
    X(lorasync_add(NULL, &piece, e), "session is NULL")                                                                \
    X(lorasync_attach(NULL, &transport, e), "session is NULL")                                                         \
    X(lorasync_attach_directory(NULL, "x", e), "session is NULL")                                                      \
    X(lorasync_attach_shm(NULL, "x", e), "session is NULL")                                                            \
    X(lorasync_compile(NULL, e), "session is NULL")                                                                    \
    X(lorasync_begin(NULL, 1, e), "session is NULL")                                                                   \
    X(lorasync_wait(NULL, NULL, e), "session is NULL")                                                                 \
    X(lorasync_sync(NULL, 1, NULL, e), "session is NULL")                                                              \
    X(lorasync_republish(NULL, e), "session is NULL")                                                                  \
    X(lorasync_load(NULL, "x", NULL, e), "session is NULL")                                                            \
    X(lorasync_stream_open(NULL, &stream, e), "desc")                                                                  \
    X(lorasync_stream_add(NULL, &piece, e), "stream is NULL")                                                          \
    X(lorasync_stream_attach(NULL, &transport, e), "stream is NULL")                                                   \
    X(lorasync_stream_compile(NULL, e), "stream is NULL")                                                              \
    X(lorasync_stream_sync(NULL, 1, NULL, e), "stream is NULL")

#define X(call, what)                                                                                                  \
    memset(e, 0, sizeof *e);                                                                                           \
    CHECK_EQ(call, LORASYNC_E_ARGUMENT);                                                                               \
    CHECK_EQ(e->status, LORASYNC_E_ARGUMENT);                                                                          \
    CHECK_HAS(e->text, what);

static void null_gives_a_status(void)
{
    char                  buffer[16] = {0}, *text = NULL;
    uint64_t              digests[1] = {0};
    uint32_t              indices[1];
    size_t                num = 0;
    lorasync_error        error, *e = &error;
    lorasync_name         name;
    lorasync_pattern     *pattern = NULL;
    lorasync_matcher     *matcher = NULL;
    lorasync_image       *image   = NULL;
    lorasync_config      *config  = NULL;
    lorasync_plan        *plan    = NULL;
    lorasync_engine      *engine  = NULL;
    lorasync_session     *session = NULL;
    lorasync_stream      *stream  = NULL;
    lorasync_comm         comm    = lorasync_solo();
    lorasync_filter       linear;
    lorasync_image_desc   layout, no_tensors;
    lorasync_plan_desc    plan_desc;
    lorasync_transport    transport;
    lorasync_policy_state state;
    lorasync_decision     decision;
    lorasync_desc         desc;
    lorasync_piece        piece;
    memset(&linear, 0, sizeof linear), memset(&layout, 0, sizeof layout), memset(&plan_desc, 0, sizeof plan_desc);
    memset(&transport, 0, sizeof transport), memset(&state, 0, sizeof state), memset(&decision, 0, sizeof decision);
    memset(&desc, 0, sizeof desc), memset(&piece, 0, sizeof piece);
    linear.target_pattern  = "all-linear";
    no_tensors             = layout;
    no_tensors.num_tensors = 1;
    NULL_CALLS(X)
}
#undef X

/* Calls without a status. */
static void null_gives_nothing(void)
{
    int64_t               start[1] = {0};
    lorasync_plan_stats   stats;
    lorasync_session_info info;
    lorasync_stream_info  stream_info;
    size_t                num   = 9;
    char                  key[] = "a.b";
    memset(&stats, 0x11, sizeof stats);
    memset(&info, 0x11, sizeof info);
    memset(&stream_info, 0x11, sizeof stream_info);
    CHECK(lorasync_image_find(NULL, "x") == NULL && lorasync_image_metadata(NULL, "x") == NULL &&
          lorasync_plan_image(NULL) == NULL);
    CHECK(lorasync_config_view(NULL) == NULL && lorasync_session_image(NULL) == NULL);
    CHECK(lorasync_acquire(NULL, "x") == NULL && lorasync_find(NULL, "x") == NULL);
    CHECK(lorasync_get_outcomes(NULL, &num) == NULL && num == 0 && lorasync_stream_outcomes(NULL, NULL) == NULL);
    CHECK_EQ(lorasync_dtype_from_name(NULL), LORASYNC_DTYPE_NONE);
    CHECK_EQ(lorasync_pattern_matches(NULL, "x"), 0);
    CHECK_EQ(lorasync_matcher_takes(NULL, NULL, NULL), 0);
    CHECK_EQ(lorasync_config_rank(NULL, "x"), 0);
    CHECK(lorasync_config_scale(NULL, "x") == 0);
    CHECK(lorasync_digest(NULL, 5, 0) == 0 && lorasync_digest_image(NULL, NULL, 1) == 0 &&
          lorasync_image_digest(NULL, NULL) == 0);
    CHECK_EQ(lorasync_whole(NULL, 2).len[0], -1);
    CHECK_EQ(lorasync_fsdp1_layout(NULL, 1, 2, 1, 2, start), -1);
    CHECK_EQ(lorasync_fsdp1_layout(start, 1, 2, 1, 2, NULL), -1);
    CHECK_EQ(lorasync_megatron_layout(NULL, 1, 0, 2, start), -1);
    CHECK_EQ(lorasync_megatron_layout(start, 1, 0, 2, NULL), -1);
    lorasync_drop_adapter(NULL, "b", key);
    lorasync_drop_adapter("a.b", NULL, key);
    lorasync_drop_adapter("a.b", "b", NULL);
    lorasync_image_bind(NULL, key);
    lorasync_image_stamp(NULL, 1, 1);
    lorasync_plan_get_stats(NULL, &stats);
    lorasync_get_info(NULL, &info);
    lorasync_stream_get_info(NULL, &stream_info);
    CHECK_TEXT(key, "a.b");
    CHECK(stats.num_tensors == 0 && info.num_added == 0 && stream_info.num_tensors == 0);
    lorasync_plan_get_stats(NULL, NULL), lorasync_get_info(NULL, NULL), lorasync_stream_get_info(NULL, NULL);
    lorasync_free(NULL, NULL), lorasync_pattern_free(NULL), lorasync_matcher_free(NULL), lorasync_image_free(NULL);
    lorasync_config_free(NULL), lorasync_plan_free(NULL), lorasync_release(NULL), lorasync_engine_close(NULL);
    lorasync_local_close(NULL), lorasync_nccl_close(NULL), lorasync_close(NULL), lorasync_stream_close(NULL);
}

int main(void)
{
    RUN(null_gives_a_status);
    RUN(null_gives_nothing);
    RUN(solo_session);
    RUN(bad_calls);
    RUN(compile_refuses);
    RUN(added_after_a_failed_compile);
    RUN(same_bytes);
    RUN(processes);
    RUN(fold_scale);
    RUN(fold_bias);
    RUN(fold_after_a_failed_compile);
    RUN(versions);
    RUN(sessions_in_order);
    RUN(nan_is_refused);
    RUN(engines_fail);
    RUN(snapshot);
    RUN(one_function_transport);
    RUN(load_restores);
    RUN(load_with_a_scale);
    RUN(load_compares_scales);
    RUN(load_into_one_memory);
    RUN(other_kinds);
    RUN(fold_zero);
    RUN(all_linear);
    RUN(all_linear_elsewhere);
    RUN(base_weights);
    RUN(base_and_transports);
    RUN(no_allocation_per_sync);
    RUN(no_memory_anywhere);
    RUN(rank_is_lost);
    RUN(lost_once);
    RUN(slow_engine);
    RUN(too_slow_engine);
    RUN(killed_while_staging);
    return test_summary("test_session");
}
