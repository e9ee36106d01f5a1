/* Base weights in buckets: random tensors and layouts over thread ranks against the uncut truth, the checkpoint that
   the directory transport writes, and every way in which a bucket can fail. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"
#include "ranks.h"
#include "random_case.h"
#include "pieces.h"

enum {
    NT        = 14,
    MAX_WORLD = 4,
    MAX_FILES = 64
};

/* An allocator that counts bytes: one per rank, used by its thread alone. */
typedef struct bytes_memory {
    size_t live, peak;
    long   num, total, fail_at;
} bytes_memory;

static void *bytes_alloc(void *user, size_t n)
{
    bytes_memory *m = (bytes_memory *)user;
    size_t       *p;
    if (m->fail_at && --m->fail_at == 0) return NULL;
    p = (size_t *)malloc(n + 16);
    if (!p) return NULL;
    *p = n;
    m->live += n;
    if (m->live > m->peak) m->peak = m->live;
    m->num++, m->total++;
    return (char *)p + 16;
}

static void bytes_free(void *user, void *p)
{
    bytes_memory *m = (bytes_memory *)user;
    size_t       *q = (size_t *)(void *)((char *)p - 16);
    m->live -= *q;
    m->num--;
    free(q);
}

/* An engine that keeps what it gets, and fails when told. */
typedef struct bucket_file {
    char  *bytes;
    size_t num_bytes, payload_bytes;
} bucket_file;

typedef struct keeper {
    bucket_file staged[MAX_FILES], served[MAX_FILES];
    size_t      num_staged, num_served;
    uint64_t    version;
    char       *index;
    int         fail_stage; /* counts down: 1 fails the next; 0: never */
    int         fail_commit;
    int         die; /* at that stage, from 1 */
    int         num_stages, num_commits, num_aborts, num_closed, wrong;
    size_t      num_buckets;
} keeper;

static void drop_staged(keeper *k)
{
    size_t i;
    for (i = 0; i < k->num_staged; i++) free(k->staged[i].bytes);
    k->num_staged = 0;
}

static void drop_served(keeper *k)
{
    size_t i;
    for (i = 0; i < k->num_served; i++) free(k->served[i].bytes);
    k->num_served = 0;
}

static void keeper_abort(void *user, const char *adapter, uint64_t version)
{
    keeper *k = (keeper *)user;
    (void)adapter, (void)version;
    k->num_aborts++;
    drop_staged(k);
}

static lorasync_status keeper_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    keeper      *k = (keeper *)user;
    bucket_file *f;
    k->num_stages++;
    if (k->die && k->num_stages == k->die) raise(SIGKILL);
    if (k->fail_stage && --k->fail_stage == 0)
        return test_refuse(err, LORASYNC_E_IO, "bucket %zu is not wanted", image->bucket);
    if (image->bucket == 0) drop_staged(k);
    if (image->bucket != k->num_staged || image->bucket >= image->num_buckets || k->num_staged >= MAX_FILES) {
        k->wrong++;
        return test_refuse(err, LORASYNC_E_STATE, "bucket %zu of %zu after %zu", image->bucket, image->num_buckets,
                           k->num_staged);
    }
    if (lorasync_image_verify(image, err) < 0) k->wrong++;
    f                = &k->staged[k->num_staged++];
    f->num_bytes     = image->header_bytes + image->payload_bytes;
    f->payload_bytes = image->payload_bytes;
    f->bytes         = (char *)malloc(f->num_bytes + 1);
    memcpy(f->bytes, image->header, image->header_bytes);
    if (image->payload_bytes) memcpy(f->bytes + image->header_bytes, image->payload, image->payload_bytes);
    k->num_buckets = image->num_buckets;
    free(k->index);
    k->index = (char *)malloc(strlen(image->index_json) + 1);
    strcpy(k->index, image->index_json);
    return LORASYNC_OK;
}

static lorasync_status keeper_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    keeper *k = (keeper *)user;
    (void)adapter;
    if (k->fail_commit && --k->fail_commit == 0) return test_refuse(err, LORASYNC_E_IO, "the commit is not wanted");
    if (k->num_staged != k->num_buckets) k->wrong++;
    k->num_commits++;
    drop_served(k);
    memcpy(k->served, k->staged, sizeof k->staged);
    k->num_served = k->num_staged;
    k->num_staged = 0;
    k->version    = version;
    return LORASYNC_OK;
}

static void keeper_close(void *user) { __atomic_fetch_add(&((keeper *)user)->num_closed, 1, __ATOMIC_RELAXED); }

static void keeper_free(keeper *k)
{
    drop_staged(k), drop_served(k);
    free(k->index);
    memset(k, 0, sizeof *k);
}

static lorasync_transport keep(keeper *k, const char *name)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size = sizeof t, t.name = name, t.user = k;
    t.stage = keeper_stage, t.commit = keeper_commit, t.abort = keeper_abort, t.close = keeper_close;
    t.takes_buckets = 1;
    return t;
}

/* -- random models */

typedef struct model {
    int            world, root, no_direct, keep_names;
    lorasync_dtype wire;
    size_t         bucket;
    truth_tensor   t[NT];
    rank_pieces    have[NT][8];
    char           directory[128];
} model;

static void tensor_name(unsigned long long *s, truth_tensor *t, int i)
{
    int layer = i / 4, kind = i % 4;
    (void)s;
    if (kind == 0) snprintf(t->name, sizeof t->name, "model.layers.%d.mlp.up_proj.base_layer.weight", layer);
    if (kind == 1) snprintf(t->name, sizeof t->name, "model.layers.%d.mlp.up_proj.lora_A.x.weight", layer);
    if (kind == 2) snprintf(t->name, sizeof t->name, "_orig_mod.model.layers.%d.norm.weight", layer);
    if (kind == 3) snprintf(t->name, sizeof t->name, "model.layers.%d.mlp.up_proj.lora_B.x.weight", layer);
}

/* Small buckets: a few tensors each. */
static void make_model(model *m, unsigned long long seed)
{
    static const lorasync_dtype wires[] = {LORASYNC_DTYPE_NONE, LORASYNC_BF16, LORASYNC_F32};
    unsigned long long          s       = seed;
    int                         i, r;
    size_t                      k;
    memset(m, 0, sizeof *m);
    m->world      = 1 + (int)below(&s, MAX_WORLD);
    m->root       = (int)below(&s, (unsigned)m->world);
    m->no_direct  = (int)below(&s, 2);
    m->keep_names = below(&s, 4) == 0;
    m->wire       = wires[below(&s, 3)];
    m->bucket     = below(&s, 6) ? 1 + below(&s, 8000) : 0;
    for (i = 0; i < NT; i++) {
        random_tensor(&s, &m->t[i], i, 0);
        tensor_name(&s, &m->t[i], i);
        deal_tensor(&s, m->have[i], m->world, &m->t[i], i, m->t[i].dtype);
        for (r = 0; r < m->world; r++)
            for (k = 0; k < m->have[i][r].num; k++) {
                fill_user u;
                give_memory(&s, &m->have[i][r], k, 1);
                u.t    = &m->t[i];
                u.size = item(m->t[i].dtype);
                each_element(u.t, &m->have[i][r].pieces[k], fill_element, &u);
            }
    }
}

static void free_model(model *m)
{
    int i, r;
    for (i = 0; i < NT; i++) {
        for (r = 0; r < 8; r++) free_pieces(&m->have[i][r]);
        free(m->t[i].data);
    }
}

static lorasync_status open_stream(const model *m, const lorasync_comm *comm, bytes_memory *memory,
                                   lorasync_stream **out, lorasync_error *err)
{
    lorasync_stream_desc d;
    lorasync_allocator   a;
    lorasync_status      status;
    int                  i, rank = comm ? comm->rank : 0;
    size_t               k;
    memset(&d, 0, sizeof d);
    d.comm = comm, d.root = m->root, d.wire_dtype = m->wire, d.bucket_bytes = m->bucket, d.no_direct = m->no_direct,
    d.keep_names  = m->keep_names;
    d.timeout_ms  = test_ms(20000);
    d.name        = "policy-model";
    d.config_json = "{\"model_type\": \"toy\"}";
    a.alloc = bytes_alloc, a.free = bytes_free, a.user = memory;
    if (memory) d.allocator = &a;
    status = lorasync_stream_open(&d, out, err);
    for (i = 0; i < NT && status == LORASYNC_OK; i++)
        for (k = 0; k < m->have[i][rank].num && status == LORASYNC_OK; k++)
            status = lorasync_stream_add(*out, &m->have[i][rank].pieces[k], err);
    return status;
}

static const char *published_name(const model *m, int i, lorasync_name *name)
{
    if (m->keep_names) return m->t[i].name;
    CHECK(lorasync_parse_name(m->t[i].name, name, NULL) == LORASYNC_OK);
    return name->key;
}

/* The bytes a tensor must have. free() it. */
static unsigned char *expected_bytes(const model *m, int i, lorasync_dtype *dtype, size_t *num_bytes)
{
    const truth_tensor *t = &m->t[i];
    unsigned char      *p;
    *dtype     = m->wire && lorasynci_is_value(t->dtype) ? m->wire : t->dtype;
    *num_bytes = (size_t)(t->numel * item(*dtype));
    p          = (unsigned char *)malloc(*num_bytes + 1);
    if (*dtype == t->dtype) memcpy(p, t->data, *num_bytes);
    else lorasync_convert(p, *dtype, t->data, t->dtype, (size_t)t->numel, NULL);
    return p;
}

/* All tensors, each in exactly one of the files, with the truth's bytes; *where: the file of each. Returns what is
   wrong. */
static int check_files(const model *m, const bucket_file *files, size_t num, size_t *where)
{
    lorasync_image *images[MAX_FILES];
    lorasync_name   name;
    size_t          f, total = 0, n;
    int             i, wrong = 0;
    for (f = 0; f < num; f++) {
        images[f] = NULL;
        if (lorasync_image_parse(files[f].bytes, files[f].num_bytes, NULL, &images[f], NULL) < 0) return 100;
        if (lorasync_image_verify(images[f], NULL) < 0) wrong |= 1;
        total += images[f]->num_tensors;
    }
    if (total != NT) wrong |= 2;
    for (i = 0; i < NT; i++) {
        int            found = 0;
        lorasync_dtype dtype;
        unsigned char *bytes = expected_bytes(m, i, &dtype, &n);
        for (f = 0; f < num; f++) {
            const lorasync_tensor *t = lorasync_image_find(images[f], published_name(m, i, &name));
            if (!t) continue;
            found++;
            where[i] = f;
            if (t->dtype != dtype || t->ndim != m->t[i].ndim ||
                memcmp(t->shape, m->t[i].shape, sizeof(int64_t) * (size_t)t->ndim) != 0)
                wrong |= 4;
            else if (t->num_bytes != n || memcmp(t->data, bytes, n) != 0) wrong |= 8;
        }
        if (found != 1) wrong |= 16;
        free(bytes);
    }
    for (f = 0; f < num; f++) lorasync_image_free(images[f]);
    return wrong;
}

/* Buckets are what a slow reading of the rule gives. */
static int check_division(const model *m, const size_t *where, size_t num)
{
    size_t bytes[NT], used = 0, bucket = 0, limit = m->bucket ? m->bucket : (size_t)1 << 30, n;
    int    i, order[NT], taken[NT] = {0}, at = 0, r, wrong = 0;
    for (r = 0; r < m->world; r++) /* first declaration on the lowest rank */
        for (i = 0; i < NT; i++)
            if (!taken[i] && m->have[i][r].num) taken[i] = 1, order[at++] = i;
    if (at != NT) return 32;
    for (i = 0; i < NT; i++) {
        lorasync_dtype dtype;
        free(expected_bytes(m, i, &dtype, &bytes[i]));
    }
    memset(taken, 0, sizeof taken);
    for (at = 0; at < NT; at++) {
        int a = order[at], b = a % 4 == 1 ? a + 2 : a % 4 == 3 ? a - 2 : a;
        if (b >= NT) b = a;
        if (taken[a]) continue;
        taken[a] = taken[b] = 1;
        n                   = bytes[a] + (b != a ? bytes[b] : 0);
        if (used && used + n > limit) used = 0, bucket++;
        used += n;
        if (where[a] != bucket || where[b] != bucket) wrong |= 64;
    }
    return wrong | (bucket + 1 != num ? 128 : 0);
}

/* The index, read back: names and files as they are, sorted, and the total. */
static int check_index(const model *m, const char *text, const size_t *where, size_t num, size_t total)
{
    lorasynci_json  j;
    lorasynci_slice key, value;
    lorasync_error  err;
    lorasync_name   name;
    char            last[LORASYNC_MAX_NAME] = "", k[LORASYNC_MAX_NAME], file[64];
    uint64_t        size                    = 0;
    int             found = 0, i, wrong = 0;
    if (num < 2) return text[0] ? 1 : 0;
    lorasynci_json_init(&j, text, strlen(text), &err);
    if (lorasynci_json_object(&j) < 0 || !lorasynci_json_key(&j, &key) || !lorasynci_json_is(&key, "metadata"))
        return 2;
    if (lorasynci_json_object(&j) < 0 || !lorasynci_json_key(&j, &key) || !lorasynci_json_is(&key, "total_size"))
        return 3;
    if (lorasynci_json_uint(&j, &size) < 0 || size != total || lorasynci_json_key(&j, &key)) return 4;
    if (!lorasynci_json_key(&j, &key) || !lorasynci_json_is(&key, "weight_map") || lorasynci_json_object(&j) < 0)
        return 5;
    while (lorasynci_json_key(&j, &key)) {
        k[lorasynci_json_decode(&key, k)] = 0;
        if (strcmp(last, k) >= 0) wrong |= 8;
        strcpy(last, k);
        if (lorasynci_json_string(&j, &value) < 0) return 6;
        for (i = 0; i < NT && strcmp(published_name(m, i, &name), k) != 0; i++) {}
        if (i == NT) return 7;
        snprintf(file, sizeof file, "model-%05u-of-%05u.safetensors", (unsigned)where[i] + 1, (unsigned)num);
        if (!lorasynci_json_is(&value, file)) wrong |= 16;
        found++;
    }
    return wrong | (found != NT ? 32 : 0) | (lorasynci_json_key(&j, &key) || lorasynci_json_end(&j) < 0 ? 64 : 0);
}

/* -- the same bytes from any layout, over many buckets */

typedef struct shared_state {
    model               *m;
    keeper               k[3];
    lorasync_status      status[MAX_WORLD];
    char                 text[MAX_WORLD][512];
    uint64_t             digest[MAX_WORLD];
    lorasync_stream_info info[MAX_WORLD];
    bytes_memory         memory[MAX_WORLD];
    size_t               after_compile[MAX_WORLD], peak_in_sync[MAX_WORLD];
    int                  wrong[MAX_WORLD], direct[MAX_WORLD];
    int                  fail_rank; /* for allocation failures */
    long                 fail_at;
    const char          *directory;
    int                  num_files, step;
} shared_state;

static shared_state shared;

static void remember(rank_context *c, lorasync_status status, const lorasync_error *err)
{
    shared.status[c->rank] = status;
    snprintf(shared.text[c->rank], 512, "%s", status < 0 ? err->text : "");
}

static void random_rank(rank_context *c)
{
    lorasync_stream   *s = NULL;
    lorasync_error     err;
    lorasync_status    status;
    lorasync_report    report;
    bytes_memory      *memory = &shared.memory[c->rank];
    lorasync_transport t      = keep(&shared.k[0], "keeper");
    long               total;
    status = open_stream(shared.m, &c->comm, memory, &s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &t, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    if (status == LORASYNC_OK) {
        lorasync_stream_get_info(s, &shared.info[c->rank]);
        total                         = memory->total;
        shared.after_compile[c->rank] = memory->live;
        memory->peak                  = 0;
        status                        = lorasync_stream_sync(s, 4, &report, &err);
        if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 5, &report, &err);
        if (memory->total != total || memory->peak > shared.after_compile[c->rank]) shared.wrong[c->rank] |= 1;
        shared.digest[c->rank] = report.digest;
        shared.direct[c->rank] = report.direct;
        if (status == LORASYNC_OK && (report.version != 5 || report.num_engines != 1 || report.num_tensors != NT))
            shared.wrong[c->rank] |= 2;
    }
    remember(c, status, &err);
    lorasync_stream_close(s);
    if (memory->num || memory->live) shared.wrong[c->rank] |= 4;
}

static void check_random(const model *m, unsigned long long seed)
{
    size_t where[NT], f, largest[2] = {0, 0}, total = 0;
    int    r, files, division = 0, index = 0;
    files = check_files(m, shared.k[0].served, shared.k[0].num_served, where);
    if (!files) division = check_division(m, where, shared.k[0].num_served);
    for (f = 0; f < shared.k[0].num_served; f++) {
        size_t n = shared.k[0].served[f].payload_bytes;
        total += n;
        if (n > largest[f % 2]) largest[f % 2] = n;
    }
    if (!files && !division) index = check_index(m, shared.k[0].index, where, shared.k[0].num_served, total);
    if (files || division || index)
        fprintf(stderr, "seed %llu: files %d, division %d, index %d\n", seed, files, division, index);
    CHECK(!files && !division && !index);
    CHECK_EQ(shared.k[0].version, 5);
    CHECK_EQ(shared.k[0].wrong, 0);
    CHECK_EQ(shared.k[0].num_commits, 2);
    CHECK_EQ(shared.k[0].num_aborts, 0);
    CHECK_EQ(shared.k[0].num_closed, m->world);
    for (r = 0; r < m->world; r++) {
        const lorasync_stream_info *i = &shared.info[r];
        size_t own = i->staging_bytes + i->plan_bytes + (r == m->root && !i->direct ? i->image_bytes : 0);
        if (shared.status[r] < 0) fprintf(stderr, "seed %llu rank %d: %s\n", seed, r, shared.text[r]);
        CHECK_EQ(shared.status[r], LORASYNC_OK);
        CHECK_EQ(shared.wrong[r], 0);
        CHECK(shared.digest[r] == shared.digest[0]);
        CHECK_EQ(i->num_buckets, shared.k[0].num_served);
        CHECK_EQ(i->payload_bytes, total);
        CHECK_EQ(i->direct, m->world > 1 && !m->no_direct && total > 0);
        if (r == m->root || i->direct)
            CHECK(i->image_bytes >= largest[0] + largest[1] && i->image_bytes < largest[0] + largest[1] + 64);
        else CHECK_EQ(i->image_bytes, 0);
        if (i->direct) CHECK_EQ(i->staging_bytes, 0);
        CHECK(shared.after_compile[r] < own + 8192 + 4096 * i->num_buckets); /* handles, and the index */
    }
}

static void random_models(void)
{
    static model       m;
    unsigned long long seed;
    size_t             most = 0;
    for (seed = 1; seed <= 120 && test_errors < 10; seed++) {
        make_model(&m, seed * 7717);
        memset(&shared, 0, sizeof shared);
        shared.m = &m;
        run_threads(m.world, random_rank, NULL);
        check_random(&m, seed);
        if (shared.k[0].num_served > most) most = shared.k[0].num_served;
        keeper_free(&shared.k[0]);
        free_model(&m);
    }
    CHECK(most > 8);
}

/* -- memory: two buckets on the root, and nothing of them elsewhere */

enum {
    BIG_TENSORS = 64,
    BIG_ROWS    = 64,
    BIG_COLUMNS = 64
};
static float big_data[BIG_TENSORS][BIG_ROWS * BIG_COLUMNS];

static lorasync_status open_big(const lorasync_comm *comm, bytes_memory *memory, size_t bucket, lorasync_stream **out,
                                lorasync_error *err)
{
    lorasync_stream_desc d;
    lorasync_allocator   a;
    lorasync_status      status;
    int                  i;
    memset(&d, 0, sizeof d);
    d.comm = comm, d.bucket_bytes = bucket, d.no_direct = 1, d.timeout_ms = test_ms(20000);
    a.alloc = bytes_alloc, a.free = bytes_free, a.user = memory;
    if (memory) d.allocator = &a;
    status = lorasync_stream_open(&d, out, err);
    for (i = 0; i < BIG_TENSORS && status == LORASYNC_OK; i++) {
        lorasync_piece p;
        char           name[64];
        snprintf(name, sizeof name, "model.layers.%d.mlp.weight", i);
        p      = shard_piece(name, 2, BIG_ROWS, BIG_COLUMNS, comm ? comm->rank : 0, comm ? comm->world : 1, NULL);
        p.data = &big_data[i][p.box.off[0] * BIG_COLUMNS];
        status = lorasync_stream_add(*out, &p, err);
    }
    return status;
}

static void memory_rank(rank_context *c)
{
    lorasync_stream   *s = NULL;
    lorasync_error     err;
    bytes_memory      *memory = &shared.memory[c->rank];
    lorasync_transport t      = keep(&shared.k[0], "keeper");
    lorasync_status    status = open_big(&c->comm, memory, 2 * sizeof big_data[0], &s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &t, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, &err);
    if (status == LORASYNC_OK) lorasync_stream_get_info(s, &shared.info[c->rank]);
    shared.after_compile[c->rank] = memory->live;
    remember(c, status, &err);
    lorasync_stream_close(s);
}

static void peak_memory(void)
{
    size_t bucket = 2 * sizeof big_data[0], total = sizeof big_data;
    int    r;
    memset(&shared, 0, sizeof shared);
    run_threads(4, memory_rank, NULL);
    for (r = 0; r < 4; r++) {
        const lorasync_stream_info *i = &shared.info[r];
        CHECK_EQ(shared.status[r], LORASYNC_OK);
        CHECK_EQ(i->num_buckets, BIG_TENSORS / 2);
        CHECK_EQ(i->image_bytes, r ? 0 : 2 * bucket);
        CHECK(i->staging_bytes < bucket + 1024);
        if (r) CHECK(i->staging_bytes < bucket / 4 + 1024);
        CHECK(shared.after_compile[r] <
              i->image_bytes + i->staging_bytes + i->plan_bytes + 8192 + 4096 * i->num_buckets);
        CHECK(shared.memory[r].peak < total / 2);
    }
    keeper_free(&shared.k[0]);
}

/* -- failures: every bucket, every kind; the old version stays, and the next try succeeds */

typedef struct failure {
    int             engine, num_engines;
    int             stage, commit; /* countdown on that engine */
    int             nan_rank, nan_tensor;
    int             version_rank; /* passes another version */
    lorasync_status status;
    const char     *word;
} failure;

static failure wanted;

static void failing_rank(rank_context *c)
{
    lorasync_stream   *s = NULL;
    lorasync_error     err;
    lorasync_transport t;
    lorasync_status    status;
    float             *spoilt = &big_data[wanted.nan_tensor][(BIG_ROWS - 1) * BIG_COLUMNS], nan_value = 0;
    int                i, root                                                                        = c->rank == 0;
    status = open_big(&c->comm, NULL, 20 * sizeof big_data[0], &s, &err);
    for (i = 0; i < wanted.num_engines; i++) {
        t = keep(&shared.k[i], i == 2 ? "plain" : i ? "second" : "first");
        if (i == 2) t.commit = NULL;
        if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &t, &err);
    }
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, &err);
    if (status < 0) {
        remember(c, status, &err);
        shared.wrong[c->rank] |= 1;
        lorasync_stream_close(s);
        return;
    }
    if (root) {
        shared.k[wanted.engine].fail_stage  = wanted.stage;
        shared.k[wanted.engine].fail_commit = wanted.commit;
        for (i = 0; i < 3; i++) shared.k[i].num_stages = shared.k[i].num_aborts = shared.k[i].num_commits = 0;
    }
    if (wanted.nan_rank == c->rank) *spoilt = 0 / nan_value;
    err.text[0] = 0;
    status      = lorasync_stream_sync(s, wanted.version_rank == c->rank ? 3 : 2, NULL, &err);
    remember(c, status, &err);
    if (wanted.nan_rank == c->rank) *spoilt = 1;
    for (i = 0; wanted.stage && i < 4; i++) /* all ranks stop at the same bucket */
        if (s->plans[i]->run != (uint64_t)(i <= wanted.stage ? 2 : 1)) shared.wrong[c->rank] |= 256;
    if (root) {
        shared.step = shared.k[0].num_aborts * 100 + shared.k[1].num_aborts * 10 + shared.k[2].num_aborts;
        if (!wanted.commit && (shared.k[0].version != 1 || shared.k[1].version != 1)) shared.wrong[0] |= 2;
        for (i = 0; i < 2; i++)
            if (shared.k[i].num_staged) shared.wrong[0] |= 4;
        drop_staged(&shared.k[2]);
    }
    if (lorasync_stream_sync(s, 2, NULL, &err) < 0) shared.wrong[c->rank] |= 8;
    if (lorasync_stream_sync(s, 3, NULL, &err) < 0) shared.wrong[c->rank] |= 16;
    if (lorasync_stream_sync(s, 3, NULL, &err) != LORASYNC_E_VERSION) shared.wrong[c->rank] |= 32;
    if (root) {
        size_t num = 0;
        lorasync_stream_outcomes(s, &num);
        if (num != (size_t)wanted.num_engines || lorasync_stream_outcomes(s, NULL)[1].version != 3)
            shared.wrong[0] |= 64;
        if (shared.k[0].version != 3 || shared.k[1].version != 3) shared.wrong[0] |= 128;
    }
    lorasync_stream_close(s);
}

/* aborts: how often engines 0, 1 and 2 were told to forget, as digits. */
static void fail_once(failure f, int aborts)
{
    int r;
    memset(&shared, 0, sizeof shared);
    wanted = f;
    run_threads(3, failing_rank, NULL);
    for (r = 0; r < 3; r++) {
        if (shared.status[r] != f.status || shared.wrong[r])
            fprintf(stderr, "stage %d commit %d nan %d: rank %d: wrong %d, status %d: %s\n", f.stage, f.commit,
                    f.nan_tensor, r, shared.wrong[r], (int)shared.status[r], shared.text[r]);
        CHECK_EQ(shared.status[r], f.status);
        CHECK_EQ(shared.wrong[r], 0);
        CHECK_HAS(shared.text[r], f.word);
    }
    CHECK_EQ(shared.step, aborts);
    for (r = 0; r < 3; r++) {
        CHECK_EQ(shared.k[r].wrong, 0);
        keeper_free(&shared.k[r]);
    }
}

static failure no_failure(lorasync_status status, const char *word)
{
    failure f;
    memset(&f, 0, sizeof f);
    f.nan_rank = f.version_rank = -1;
    f.engine                    = 1;
    f.num_engines               = 3;
    f.status                    = status;
    f.word                      = word;
    return f;
}

static void failures(void) /* 64 tensors in buckets of 20: four buckets, the last of four */
{
    static const int of_bucket[] = {0, 25, 59, 63};
    failure          f;
    int              b, rank;
    char             word[64];
    for (b = 0; b < 4; b++) {
        f       = no_failure(LORASYNC_E_IO, "'second' could not stage");
        f.stage = b + 1;
        fail_once(f, b ? 111 : 110);
        f        = no_failure(LORASYNC_E_IO, "'first' could not stage");
        f.stage  = b + 1;
        f.engine = 0;
        fail_once(f, b ? 111 : 100);
        for (rank = 0; rank < 3; rank += 2) {
            snprintf(word, sizeof word, "model.layers.%d.mlp.weight: NaN", of_bucket[b]);
            f            = no_failure(LORASYNC_E_NAN, word);
            f.nan_rank   = rank;
            f.nan_tensor = of_bucket[b];
            if (rank == 2) fail_once(f, b ? 111 : 0); /* the last row is rank 2's */
        }
    }
    f        = no_failure(LORASYNC_E_IO, "'second' could not commit");
    f.commit = 1;
    fail_once(f, 10); /* the first has committed, the third needs no commit */
    f             = no_failure(LORASYNC_E_IO, "'first' could not commit");
    f.commit      = 1;
    f.engine      = 0;
    f.num_engines = 2;
    fail_once(f, 110);
    f              = no_failure(LORASYNC_E_DISAGREE, "version");
    f.version_rank = 1;
    fail_once(f, 0);
}

/* -- the Hugging Face checkpoint */

static int read_files(const char *version, keeper *out, char *text, size_t text_size)
{
    DIR           *d = opendir(version);
    struct dirent *e;
    int            num = 0;
    text[0]            = 0;
    if (!d) return -1;
    while ((e = readdir(d)) != NULL) {
        char     path[600];
        size_t   n = 0;
        unsigned k = 0, of = 0;
        char    *bytes;
        if (e->d_name[0] == '.') continue;
        num++;
        snprintf(path, sizeof path, "%s/%.250s", version, e->d_name);
        bytes = test_read(path, &n);
        if (strcmp(e->d_name, "model.safetensors.index.json") == 0) {
            snprintf(text, text_size, "%s", bytes);
            free(bytes);
        } else if (strcmp(e->d_name, "config.json") == 0) {
            CHECK_TEXT(bytes, "{\"model_type\": \"toy\"}");
            free(bytes);
        } else {
            if (strcmp(e->d_name, "model.safetensors") == 0) k = of = 1;
            else CHECK(sscanf(e->d_name, "model-%05u-of-%05u.safetensors", &k, &of) == 2);
            out->num_served              = of;
            out->served[k - 1].bytes     = bytes;
            out->served[k - 1].num_bytes = n;
        }
    }
    closedir(d);
    return num;
}

static lorasync_transport directory_at(const char *path)
{
    lorasync_directory_desc d;
    lorasync_transport      t;
    memset(&d, 0, sizeof d);
    memset(&t, 0, sizeof t);
    d.directory = path, d.keep_versions = 2, d.no_fsync = 1;
    CHECK_EQ(lorasync_directory_open(&d, &t, NULL), LORASYNC_OK);
    return t;
}

static void directory_rank(rank_context *c)
{
    lorasync_stream *s = NULL;
    lorasync_error   err;
    lorasync_status  status = open_stream(shared.m, &c->comm, NULL, &s, &err);
    if (status == LORASYNC_OK && c->rank == shared.m->root) {
        lorasync_transport t = directory_at(shared.directory), k = keep(&shared.k[1], "second");
        status = lorasync_stream_attach(s, &t, &err);
        if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &k, &err);
    }
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 2, NULL, &err);
    if (status == LORASYNC_OK) {
        if (c->rank == shared.m->root)
            shared.k[1].fail_commit = 1; /* the directory has committed by then: publishing again finds it there */
        if (lorasync_stream_sync(s, 3, NULL, &err) != LORASYNC_E_IO) shared.wrong[c->rank] |= 1;
        status = lorasync_stream_sync(s, 3, NULL, &err);
    }
    remember(c, status, &err);
    lorasync_stream_close(s);
}

static void remove_tree(const char *path)
{
    char command[300];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    if (system(command) != 0) CHECK(0);
}

static void checkpoint(void)
{
    static model m;
    int          seed, r, one = 0, many = 0;
    char         root[] = "/tmp/lorasync-base-XXXXXX", path[200], index[8192], target[64];
    REQUIRE(mkdtemp(root));
    for (seed = 1; seed <= 16 && !test_errors; seed++) {
        size_t  where[NT], f, total = 0, n;
        keeper  files;
        ssize_t len;
        int     num, i;
        make_model(&m, (unsigned long long)seed * 104729);
        if (seed % 4 == 0) m.bucket = 0;
        memset(&shared, 0, sizeof shared), memset(&files, 0, sizeof files);
        snprintf(path, sizeof path, "%s/%d", root, seed);
        shared.m = &m, shared.directory = path;
        run_threads(m.world, directory_rank, NULL);
        for (r = 0; r < m.world; r++) {
            if (shared.status[r] < 0) fprintf(stderr, "seed %d rank %d: %s\n", seed, r, shared.text[r]);
            CHECK_EQ(shared.status[r], LORASYNC_OK);
            CHECK_EQ(shared.wrong[r], 0);
        }
        snprintf(path, sizeof path, "%s/%d/policy-model/latest", root, seed);
        len                       = readlink(path, target, sizeof target - 1);
        target[len > 0 ? len : 0] = 0;
        CHECK_TEXT(target, "v3");
        num = read_files(path, &files, index, sizeof index);
        CHECK_EQ(num, (int)files.num_served + 1 + (files.num_served > 1));
        CHECK_EQ(check_files(&m, files.served, files.num_served, where), 0);
        CHECK_EQ(check_division(&m, where, files.num_served), 0);
        for (i = 0; i < NT; i++) {
            lorasync_dtype dtype;
            free(expected_bytes(&m, i, &dtype, &n));
            total += n;
        }
        CHECK_EQ(check_index(&m, index, where, files.num_served, total), 0);
        if (files.num_served > 1) many++;
        else one++;
        for (f = 0; f < files.num_served; f++) free(files.served[f].bytes);
        snprintf(path, sizeof path, "%s/%d/policy-model/v1", root, seed); /* keep_versions 2: removed with all its
                                                                             files */
        CHECK(access(path, F_OK) != 0);
        keeper_free(&shared.k[1]);
        free_model(&m);
    }
    CHECK(one > 0 && many > 0);
    remove_tree(root);
}

/* One bucket as an image of its own, for the transport alone. */
static lorasync_image *bucket_image(size_t b, size_t n, uint64_t version, float value, const char *index)
{
    static float        payload[8][4];
    lorasync_tensor     t;
    lorasync_image_desc d;
    lorasync_image     *image = NULL;
    char                name[32];
    memset(&t, 0, sizeof t), memset(&d, 0, sizeof d);
    snprintf(name, sizeof name, "t%d", (int)b);
    t.name = name, t.dtype = LORASYNC_F32, t.ndim = 1, t.shape[0] = 4;
    d.tensors = &t, d.num_tensors = 1, d.adapter = "base";
    CHECK_EQ(lorasync_image_layout(&d, NULL, &image, NULL), LORASYNC_OK);
    payload[b][0] = payload[b][1] = payload[b][2] = payload[b][3] = value;
    lorasync_image_bind(image, payload[b]);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    image->bucket = b, image->num_buckets = n, image->index_json = index;
    return image;
}

static lorasync_status stage_buckets(lorasync_transport *t, size_t from, size_t to, size_t n, uint64_t version,
                                     float value, lorasync_error *err)
{
    lorasync_status status = LORASYNC_OK;
    size_t          b;
    for (b = from; b < to && status == LORASYNC_OK; b++) {
        lorasync_image *image = bucket_image(b, n, version, value, "{\"weight_map\": {}}");
        status                = t->stage(t->user, image, err);
        lorasync_image_free(image);
    }
    return status;
}

static int count_entries(const char *path)
{
    DIR           *d = opendir(path);
    struct dirent *e;
    int            n = 0;
    if (!d) return -1;
    while ((e = readdir(d)) != NULL) n += strcmp(e->d_name, ".lock") != 0; /* which stays for ever */
    closedir(d);
    return n - 2;
}

static void directory_rules(void)
{
    char               root[] = "/tmp/lorasync-base-XXXXXX", path[100];
    lorasync_error     err;
    lorasync_transport t;
    lorasync_image    *image;
    pid_t              child;
    int                status;
    REQUIRE(mkdtemp(root));
    snprintf(path, sizeof path, "%s/base", root);
    t = directory_at(root);
    CHECK_EQ(stage_buckets(&t, 1, 2, 3, 1, 1, &err), LORASYNC_E_IO); /* bucket 1 without bucket 0 */
    CHECK_EQ(stage_buckets(&t, 0, 2, 3, 1, 1, &err), LORASYNC_OK);
    CHECK_EQ(count_entries(path), 1);
    t.abort(t.user, "base", 1);
    CHECK_EQ(count_entries(path), 0);
    CHECK_EQ(t.commit(t.user, "base", 1, &err), LORASYNC_E_STATE);
    CHECK_EQ(stage_buckets(&t, 0, 2, 3, 1, 1, &err), LORASYNC_OK); /* a try that stops, and another one */
    CHECK_EQ(stage_buckets(&t, 0, 3, 3, 1, 2, &err), LORASYNC_OK);
    CHECK_EQ(t.commit(t.user, "base", 1, &err), LORASYNC_OK);
    CHECK_EQ(count_entries(path), 2);                              /* v1, latest */
    CHECK_EQ(stage_buckets(&t, 0, 3, 3, 1, 2, &err), LORASYNC_OK); /* the same again: nothing to do */
    CHECK_EQ(count_entries(path), 2);
    CHECK_EQ(t.commit(t.user, "base", 1, &err), LORASYNC_OK);
    CHECK_EQ(stage_buckets(&t, 0, 1, 3, 1, 3, &err), LORASYNC_E_VERSION); /* other bytes */
    CHECK_EQ(stage_buckets(&t, 0, 1, 2, 1, 2, &err), LORASYNC_E_VERSION); /* other buckets */
    CHECK_EQ(stage_buckets(&t, 0, 3, 3, 2, 3, &err), LORASYNC_OK);
    CHECK_EQ(t.commit(t.user, "base", 2, &err), LORASYNC_OK);
    CHECK_EQ(stage_buckets(&t, 0, 1, 3, 1, 2, &err), LORASYNC_E_VERSION); /* older */
    t.close(t.user); /* one publisher at a time: the next one dies between two buckets */
    child = fork();
    if (child == 0) {
        t = directory_at(root);
        stage_buckets(&t, 0, 2, 3, 3, 3, &err);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    t = directory_at(root);
    CHECK_EQ(count_entries(path), 4); /* v1, v2, latest, its stage */
    CHECK_EQ(stage_buckets(&t, 0, 1, 1, 3, 3, &err), LORASYNC_OK);
    CHECK_EQ(count_entries(path), 4); /* its stage is gone, ours is there */
    CHECK_EQ(t.commit(t.user, "base", 3, &err), LORASYNC_OK);
    CHECK_EQ(count_entries(path), 3); /* v2, v3, latest */
    image = bucket_image(0, 2, 4, 1, NULL);
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "index_json");
    lorasync_image_free(image);
    t.close(t.user);
    {
        lorasync_engine_desc d; /* an engine serves adapters: an error that names the place, and nothing served */
        lorasync_engine     *e;
        memset(&d, 0, sizeof d);
        d.directory = root;
        REQUIRE(lorasync_engine_open(&d, &e, &err) == LORASYNC_OK);
        CHECK(lorasync_engine_poll(e, 0, &err) < 0);
        CHECK_HAS(err.text, "base/v3");
        CHECK_HAS(err.text, "adapter_model.safetensors");
        CHECK(!lorasync_acquire(e, "base"));
        lorasync_engine_close(e);
    }
    remove_tree(root);
}

/* -- refusals */

static lorasync_status compile_with(lorasync_transport *t, size_t bucket, lorasync_error *err)
{
    lorasync_stream *s      = NULL;
    lorasync_status  status = open_big(NULL, NULL, bucket, &s, err);
    if (status == LORASYNC_OK) status = lorasync_stream_attach(s, t, err);
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, err);
    if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, err);
    lorasync_stream_close(s);
    return status;
}

static void transport_without_buckets(void)
{
    static keeper      k;
    lorasync_transport t = keep(&k, "old one");
    lorasync_error     err;
    lorasync_image    *image;
    t.takes_buckets = 0;
    CHECK_EQ(compile_with(&t, sizeof big_data / 2, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "'old one'");
    CHECK_HAS(err.text, "takes_buckets");
    CHECK_EQ(k.num_stages, 0);
    CHECK_EQ(compile_with(&t, 0, &err), LORASYNC_OK); /* one bucket is a whole image */
    CHECK_EQ(k.num_served, 1);
    t.takes_buckets = 1;
    t.size          = offsetof(lorasync_transport, takes_buckets); /* compiled before there were buckets */
    CHECK_EQ(compile_with(&t, sizeof big_data / 2, &err), LORASYNC_E_UNSUPPORTED);
    t.takes_buckets = 0; /* the publisher asks too */
    image           = bucket_image(0, 2, 1, 1, "");
    CHECK_EQ(lorasynci_stage_one(&t, image, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_EQ(lorasynci_check_publishable(image, &err), LORASYNC_E_UNSUPPORTED); /* as shared memory does */
    lorasync_image_free(image);
    keeper_free(&k);
    {
        lorasync_shm_desc sd;
        char              name[60];
        memset(&sd, 0, sizeof sd);
        snprintf(name, sizeof name, "test-base-%ld", (long)getpid());
        sd.name = name;
        REQUIRE(lorasync_shm_open(&sd, &t, &err) == LORASYNC_OK);
        CHECK_EQ(compile_with(&t, 0, &err), LORASYNC_E_UNSUPPORTED); /* also one bucket */
        CHECK_HAS(err.text, "send base weights to a directory");
        t.close(t.user); /* it was not taken */
        lorasync_shm_remove(name, NULL);
    }
}

static void arguments(void)
{
    lorasync_stream_desc d;
    lorasync_stream     *s = NULL, *other = NULL;
    lorasync_error       err;
    lorasync_allocator   half;
    lorasync_piece       p;
    lorasync_stream_info info;
    lorasync_transport   t;
    memset(&d, 0, sizeof d), memset(&half, 0, sizeof half), memset(&p, 0, sizeof p);
    CHECK_EQ(lorasync_stream_open(NULL, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_stream_open(&d, NULL, &err), LORASYNC_E_ARGUMENT);
    half.alloc  = bytes_alloc;
    d.allocator = &half;
    CHECK_EQ(lorasync_stream_open(&d, &s, &err), LORASYNC_E_ARGUMENT);
    d.allocator = NULL;
    d.name      = "";
    CHECK_EQ(lorasync_stream_open(&d, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "name");
    d.name = NULL;
    d.root = 1;
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "root");
    lorasync_stream_close(s);
    d.root = 0;
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_stream_sync(s, 1, NULL, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_E_EMPTY);
    p.name = "model.a.weight", p.dtype = LORASYNC_F32, p.ndim = 1, p.shape[0] = 4, p.box = lorasync_whole(p.shape, 1),
    p.data = big_data[0];
    CHECK_EQ(lorasync_stream_add(s, &p, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_OK); /* after the failed one */
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_stream_add(s, &p, &err), LORASYNC_E_STATE);
    memset(&t, 0, sizeof t);
    CHECK_EQ(lorasync_stream_attach(s, &t, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_stream_sync(s, 7, NULL, NULL), LORASYNC_OK); /* without engines */
    CHECK_EQ(lorasync_stream_sync(s, 7, NULL, &err), LORASYNC_E_VERSION);
    lorasync_stream_get_info(s, &info);
    CHECK_EQ(info.num_tensors, 1);
    CHECK_EQ(info.num_buckets, 1);
    lorasync_stream_close(s);
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_stream_add(s, &p, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_stream_attach(s, NULL, NULL), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_stream_compile(s, &err), LORASYNC_E_ARGUMENT); /* it comes again: nothing is sent to fewer engines
                                                                        in silence */
    CHECK_HAS(err.text, "transport is NULL");
    lorasync_stream_close(s);
    REQUIRE(lorasync_stream_open(&d, &other, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_stream_add(other, &p, &err), LORASYNC_OK);
    p.name = "model._orig_mod.a.base_layer.weight";
    CHECK_EQ(lorasync_stream_add(other, &p, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_stream_compile(other, &err), LORASYNC_E_NAME);
    CHECK_HAS(err.text, "_orig_mod.a.base_layer");
    lorasync_stream_close(other);
    d.keep_names   = 1; /* then they are two */
    d.bucket_bytes = 1;
    REQUIRE(lorasync_stream_open(&d, &other, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_stream_add(other, &p, &err), LORASYNC_OK);
    p.name = "model.a.weight";
    CHECK_EQ(lorasync_stream_add(other, &p, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_stream_compile(other, &err), LORASYNC_OK);
    lorasync_stream_get_info(other, &info);
    CHECK_EQ(info.num_buckets, 2);
    lorasync_stream_close(other);
    REQUIRE(lorasync_stream_open(&d, &other, &err) == LORASYNC_OK);
    p.box.off[0] = 4; /* remembered for compile */
    CHECK_EQ(lorasync_stream_add(other, &p, &err), LORASYNC_E_LAYOUT);
    CHECK_EQ(lorasync_stream_compile(other, &err), LORASYNC_E_LAYOUT);
    lorasync_stream_close(other);
    lorasync_stream_close(NULL);
}

/* -- the n-th allocation fails, on one of two ranks */

static void scarce_rank(rank_context *c)
{
    lorasync_stream *s = NULL;
    lorasync_error   err;
    bytes_memory    *memory = &shared.memory[c->rank];
    lorasync_status  status;
    status = open_stream(shared.m, &c->comm, memory, &s, &err); /* not collective: failing here is for the solo test */
    if (c->rank == shared.fail_rank) memory->fail_at = shared.fail_at;
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    memory->fail_at = 0;
    remember(c, status, &err);
    if (status < 0 && (lorasync_stream_compile(s, &err) < 0)) shared.wrong[c->rank] |= 1; /* again, with memory */
    if (lorasync_stream_sync(s, 1, NULL, &err) < 0) shared.wrong[c->rank] |= 2;
    lorasync_stream_close(s);
    if (memory->num) shared.wrong[c->rank] |= 4;
}

static void scarce_memory(void)
{
    static model m;
    long         n, failed = 0;
    int          r, done   = 0;
    make_model(&m, 104729 * 5);
    m.bucket = 4000;
    for (r = 0; r < m.world && r < 3; r++) {
        done = 0;
        for (n = 1; !done && test_errors < 10; n += 1 + n / 12) { /* all of the first, then some */
            int i;
            memset(&shared, 0, sizeof shared);
            shared.m = &m, shared.fail_rank = r, shared.fail_at = n;
            m.no_direct = (int)(n % 2);
            run_threads(m.world, scarce_rank, NULL);
            for (i = 0; i < m.world; i++) {
                if (shared.wrong[i] || shared.status[i] != shared.status[0])
                    fprintf(stderr, "allocation %ld of rank %d: rank %d wrong %d: %s\n", n, r, i, shared.wrong[i],
                            shared.text[i]);
                CHECK_EQ(shared.wrong[i], 0);
                CHECK_EQ(shared.status[i], shared.status[0]);
            }
            if (shared.status[0] < 0) {
                CHECK_EQ(shared.status[0], LORASYNC_E_MEMORY);
                failed++;
            } else if (n > 200) {
                done = 1;
            }
        }
    }
    CHECK(failed > 20);
    free_model(&m);
}

static void scarce_memory_solo(void)
{
    static keeper k;
    bytes_memory  memory;
    long          n;
    for (n = 1; n < 3000 && test_errors < 10; n++) {
        lorasync_stream   *s = NULL;
        lorasync_error     err;
        lorasync_status    status;
        lorasync_transport t = keep(&k, "keeper");
        memset(&memory, 0, sizeof memory);
        memory.fail_at = n;
        status         = open_big(NULL, &memory, sizeof big_data / 3, &s, &err);
        if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &t, &err);
        if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
        if (status == LORASYNC_OK) status = lorasync_stream_sync(s, 1, NULL, &err);
        lorasync_stream_close(s);
        CHECK_EQ(memory.num, 0);
        if (status == LORASYNC_OK && memory.fail_at) break;
        if (status < 0) CHECK_EQ(status, LORASYNC_E_MEMORY);
    }
    CHECK(n > 50 && n < 3000);
    keeper_free(&k);
}

/* -- a rank dies: an error on all others, in time */

typedef struct death {
    int who, num_compiled; /* shared; atomic */
} death;

static void dying_rank(rank_context *c)
{
    death             *d = (death *)c->user;
    lorasync_stream   *s = NULL;
    lorasync_error     err;
    keeper             k;
    lorasync_transport t = keep(&k, "keeper");
    lorasync_status    status;
    uint64_t           start;
    memset(&k, 0, sizeof k);
    status = open_big(&c->comm, NULL, sizeof big_data / 4, &s, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_attach(s, &t, &err);
    if (status == LORASYNC_OK) status = lorasync_stream_compile(s, &err);
    CHECK_EQ(status, LORASYNC_OK);
    /* not while others are in compile: whoever leaves it first may give up the communicator */
    __atomic_fetch_add(&d->num_compiled, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&d->num_compiled, __ATOMIC_SEQ_CST) < c->world) usleep(100);
    if (c->rank == d->who) {
        if (d->who) raise(SIGKILL);
        k.die = 2; /* in the middle of staging */
    }
    start  = test_now_ns();
    status = lorasync_stream_sync(s, 1, NULL, &err);
    CHECK(lorasync_is_lost(status));
    CHECK(test_now_ns() - start < (uint64_t)test_no_hang_ns());
    CHECK_EQ(k.num_commits, 0);
    CHECK_EQ(k.num_staged, 0);
    CHECK_EQ(lorasync_stream_sync(s, 1, NULL, &err), LORASYNC_E_LOST);
    lorasync_stream_close(s);
    keeper_free(&k);
}

static void deaths(void)
{
    death *d = (death *)mmap(NULL, sizeof *d, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(d != (death *)MAP_FAILED);
    for (d->who = 0; d->who < 2; d->who++) {
        d->num_compiled = 0;
        CHECK_EQ(run_processes(3, dying_rank, d), 1);
    }
    munmap(d, sizeof *d);
}

int main(void)
{
    RUN(random_models);
    RUN(peak_memory);
    RUN(failures);
    RUN(checkpoint);
    RUN(directory_rules);
    RUN(transport_without_buckets);
    RUN(arguments);
    RUN(scarce_memory);
    RUN(scarce_memory_solo);
    RUN(deaths);
    return test_summary("test_base");
}
