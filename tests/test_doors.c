/* The doors of the library, used by an outsider: a transport and its engine side in one process, in this one file, with
   nothing but the public part of the header. A session publishes into the hub; an engine is offered what comes out, or
   polls the hub as a source. And what arrives damaged, late, twice or out of order. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* nanosleep, under -std=c99 */
#endif
#include "lorasync.h"

#include <pthread.h>
#include <time.h>

#include "test.h"

#define KEY_A "base_model.model.layers.0.q_proj.lora_A.weight"
#define KEY_B "base_model.model.layers.0.q_proj.lora_B.weight"

static const char CONFIG[] = "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}";

enum {
    RANK  = 4,
    WIDTH = 96
};

/* -- one version in memory, and who has it */

/* Counted references: the hub has one while it publishes the package, an engine has one until it calls release. */
typedef struct package {
    char    *bytes; /* header and payload */
    size_t   header_bytes, payload_bytes;
    char     adapter[64], *config;
    uint64_t version;
    int      references, releases; /* atomic */
    int     *live;                 /* packages that are not freed yet; atomic */
} package;

static float value_of(uint64_t version, size_t i) { return (float)((version * 131 + i * 7) % 1024); }

static package *pack(const lorasync_image *image, int *live)
{
    package *p       = (package *)calloc(1, sizeof *p);
    p->header_bytes  = image->header_bytes;
    p->payload_bytes = image->payload_bytes;
    p->version       = image->version;
    p->bytes         = (char *)malloc(p->header_bytes + p->payload_bytes);
    p->config        = (char *)malloc(strlen(image->config_json) + 1);
    p->references    = 1;
    p->live          = live;
    strcpy(p->config, image->config_json);
    snprintf(p->adapter, sizeof p->adapter, "%s", image->adapter);
    memcpy(p->bytes, image->header, p->header_bytes);
    memcpy(p->bytes + p->header_bytes, image->payload, p->payload_bytes);
    __atomic_fetch_add(live, 1, __ATOMIC_SEQ_CST);
    return p;
}

static void put_down(package *p)
{
    if (!p || __atomic_sub_fetch(&p->references, 1, __ATOMIC_SEQ_CST) > 0) return;
    memset(p->bytes, 0xee, p->header_bytes + p->payload_bytes); /* whoever still reads it sees that */
    __atomic_fetch_sub(p->live, 1, __ATOMIC_SEQ_CST);
    free(p->bytes);
    free(p->config);
    free(p);
}

/* The engine's callback. */
static void release_package(void *user)
{
    package *p = (package *)user;
    __atomic_fetch_add(&p->releases, 1, __ATOMIC_SEQ_CST);
    put_down(p);
}

static lorasync_delivery deliver(package *p)
{
    lorasync_delivery d;
    memset(&d, 0, sizeof d);
    d.size        = sizeof d;
    d.bytes       = p->bytes;
    d.num_bytes   = p->header_bytes + p->payload_bytes;
    d.config_json = p->config;
    d.release     = release_package;
    d.user        = p;
    return d;
}

/* An image with one pair; free its payload and it. */
static lorasync_image *lay_out(const char *adapter, uint64_t version, int content)
{
    lorasync_tensor     tensors[2];
    lorasync_image_desc d;
    lorasync_image     *image = NULL;
    lorasync_error      err;
    float              *payload;
    size_t              i;
    memset(tensors, 0, sizeof tensors);
    memset(&d, 0, sizeof d);
    tensors[0].name = KEY_A, tensors[1].name = KEY_B;
    tensors[0].dtype = tensors[1].dtype = LORASYNC_F32;
    tensors[0].ndim = tensors[1].ndim = 2;
    tensors[0].shape[0] = tensors[1].shape[1] = RANK;
    tensors[0].shape[1] = tensors[1].shape[0] = WIDTH;
    d.tensors = tensors, d.num_tensors = 2, d.adapter = adapter;
    if (lorasync_image_layout(&d, NULL, &image, &err) < 0) {
        fprintf(stderr, "layout: %s\n", err.text);
        exit(1);
    }
    payload = (float *)malloc(image->payload_bytes);
    for (i = 0; i < image->payload_bytes / 4; i++)
        payload[i] = value_of(version, i) + (i < RANK * WIDTH ? 0 : (float)content);
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    image->config_json = CONFIG;
    return image;
}

static void drop(lorasync_image *image)
{
    free((void *)(uintptr_t)image->payload);
    lorasync_image_free(image);
}

static int live; /* packages of the tests with one thread */

static package *make_package(const char *adapter, uint64_t version, int content)
{
    lorasync_image *image = lay_out(adapter, version, content);
    package        *p     = pack(image, &live);
    drop(image);
    return p;
}

/* 1 if the adapter is that version, every value of it. */
static int is_version(const lorasync_adapter *a, uint64_t version)
{
    const lorasync_tensor *t = lorasync_find(a, KEY_A);
    const float           *v;
    size_t                 i;
    if (!a || !t || a->version != version || a->image->version != version) return 0;
    if (lorasync_config_view(a->config)->r != RANK) return 0;
    v = (const float *)t->data;
    for (i = 0; i < RANK * WIDTH; i++)
        if (v[i] != value_of(version, t->offset / 4 + i)) return 0;
    return 1;
}

static uint64_t serves(lorasync_engine *e, const char *adapter)
{
    const lorasync_adapter *a       = lorasync_acquire(e, adapter);
    uint64_t                version = a ? a->version : 0;
    if (a && !is_version(a, version)) version = UINT64_MAX;
    lorasync_release(a);
    return version;
}

static lorasync_engine *open_for_offers(const char *adapter, const lorasync_allocator *allocator)
{
    lorasync_engine_desc d;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    memset(&d, 0, sizeof d);
    d.offers_only = 1;
    d.adapter     = adapter;
    d.allocator   = allocator;
    if (lorasync_engine_open(&d, &e, &err) < 0) {
        fprintf(stderr, "engine: %s\n", err.text);
        exit(1);
    }
    return e;
}

/* Offers a package, which is the engine's after a success and put down otherwise. */
static lorasync_status offer(lorasync_engine *e, package *p, lorasync_error *err)
{
    lorasync_delivery d = deliver(p);
    lorasync_status   status;
    memset(err, 0, sizeof *err);
    status = lorasync_engine_offer(e, &d, err);
    CHECK(status < 0 ? err->status == status && err->text[0] : err->status == 0);
    if (status == LORASYNC_OK) return status;
    CHECK_EQ(p->releases, 0);
    put_down(p);
    return status;
}

static lorasync_status offer_version(lorasync_engine *e, uint64_t version, int content, lorasync_error *err)
{
    return offer(e, make_package("default", version, content), err);
}

/* -- the hub: a transport whose other end is in this process */

enum {
    ENTRIES = 4
};

typedef struct hub {
    lorasync_engine *engine; /* commit offers to it; NULL: it is polled */
    package         *staged, *published[ENTRIES];
    int              live, num_opened, num_closed, fails;
    pthread_mutex_t  lock; /* of what is published */
    pthread_cond_t   news;
} hub;

static void hub_init(hub *h)
{
    memset(h, 0, sizeof *h);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->news, NULL);
}

static void hub_end(hub *h)
{
    int i;
    for (i = 0; i < ENTRIES; i++) put_down(h->published[i]);
    put_down(h->staged);
    CHECK_EQ(h->live, 0);
    pthread_mutex_destroy(&h->lock);
    pthread_cond_destroy(&h->news);
}

static lorasync_status hub_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    hub *h = (hub *)user;
    (void)err;
    put_down(h->staged);
    h->staged = pack(image, &h->live);
    return LORASYNC_OK;
}

static void hub_publish(hub *h, package *p)
{
    int i = 0;
    pthread_mutex_lock(&h->lock);
    while (h->published[i] && strcmp(h->published[i]->adapter, p->adapter) != 0) i++;
    put_down(h->published[i]);
    h->published[i] = p;
    pthread_cond_broadcast(&h->news);
    pthread_mutex_unlock(&h->lock);
}

static lorasync_status hub_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    hub              *h = (hub *)user;
    package          *p = h->staged;
    lorasync_delivery d;
    lorasync_status   status;
    (void)adapter, (void)version;
    h->staged = NULL;
    if (!p) return LORASYNC_OK; /* the same version again, for the sake of another engine */
    if (!h->engine) {
        hub_publish(h, p);
        return LORASYNC_OK;
    }
    d      = deliver(p);
    status = lorasync_engine_offer(h->engine, &d, err);
    if (status != LORASYNC_OK) put_down(p);
    return status < 0 ? status : LORASYNC_OK;
}

static void hub_abort(void *user, const char *adapter, uint64_t version)
{
    hub *h = (hub *)user;
    (void)adapter, (void)version;
    put_down(h->staged);
    h->staged = NULL;
}

static lorasync_transport hub_transport(hub *h)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    t.size = sizeof t, t.name = "hub", t.user = h;
    t.stage = hub_stage, t.commit = hub_commit, t.abort = hub_abort;
    return t;
}

/* The engine's end. */
static lorasync_status hub_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    hub            *h = (hub *)user;
    lorasync_status status;
    (void)err;
    pthread_mutex_lock(&h->lock);
    status = index < ENTRIES && h->published[index] ? LORASYNC_OK : LORASYNC_NOTHING_NEW;
    if (status == LORASYNC_OK) {
        snprintf(out->adapter, sizeof out->adapter, "%s", h->published[index]->adapter);
        out->version = h->published[index]->version;
    }
    pthread_mutex_unlock(&h->lock);
    return status;
}

static lorasync_status hub_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                lorasync_delivery *out, lorasync_error *err)
{
    hub *h = (hub *)user;
    int  i = 0;
    (void)err;
    CHECK(served == NULL); /* it did not say that it sends deltas */
    pthread_mutex_lock(&h->lock);
    while (strcmp(h->published[i]->adapter, what->adapter) != 0) i++;
    __atomic_fetch_add(&h->published[i]->references, 1, __ATOMIC_SEQ_CST);
    *out = deliver(h->published[i]);
    h->num_opened++;
    pthread_mutex_unlock(&h->lock);
    return LORASYNC_OK;
}

static void hub_wait(void *user, int timeout_ms)
{
    hub            *h = (hub *)user;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&h->lock);
    pthread_cond_timedwait(&h->news, &h->lock, &until);
    pthread_mutex_unlock(&h->lock);
}

static void hub_close(void *user) { ((hub *)user)->num_closed++; }

static lorasync_source hub_source(hub *h)
{
    lorasync_source s;
    memset(&s, 0, sizeof s);
    s.size = sizeof s, s.name = "hub", s.user = h;
    s.look = hub_look, s.open = hub_open, s.wait = hub_wait, s.close = hub_close;
    return s;
}

static lorasync_engine *open_on(const lorasync_source *s, const char *adapter, const lorasync_allocator *allocator)
{
    lorasync_engine_desc d;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    memset(&d, 0, sizeof d);
    d.source    = s;
    d.adapter   = adapter;
    d.allocator = allocator;
    if (lorasync_engine_open(&d, &e, &err) < 0) {
        fprintf(stderr, "engine: %s\n", err.text);
        exit(1);
    }
    return e;
}

/* A session of one rank that publishes into a hub. */
static lorasync_session *open_session(hub *h, const char *adapter, float *a, float *b)
{
    lorasync_desc      d;
    lorasync_piece     p;
    lorasync_session  *s = NULL;
    lorasync_transport t = hub_transport(h);
    lorasync_error     err;
    char               name[200];
    int                i;
    memset(&d, 0, sizeof d);
    d.adapter = adapter, d.lora_alpha = 8;
    CHECK_EQ(lorasync_open(&d, &s, &err), LORASYNC_OK);
    for (i = 0; i < 2; i++) {
        memset(&p, 0, sizeof p);
        snprintf(name, sizeof name, "layers.0.q_proj.lora_%c.%s.weight", i ? 'B' : 'A', adapter);
        p.name = name, p.dtype = LORASYNC_F32, p.ndim = 2;
        p.shape[0] = i ? WIDTH : RANK, p.shape[1] = i ? RANK : WIDTH;
        p.box  = lorasync_whole(p.shape, 2);
        p.data = i ? b : a;
        CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
    }
    CHECK_EQ(lorasync_attach(s, &t, &err), LORASYNC_OK);
    if (lorasync_compile(s, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    return s;
}

static void train(float *a, float *b, uint64_t version)
{
    size_t i;
    for (i = 0; i < RANK * WIDTH; i++) a[i] = value_of(version, i), b[i] = value_of(version, RANK * WIDTH + i);
}

/* -- readers in threads, while versions come */

typedef struct reader {
    pthread_t        thread;
    lorasync_engine *engine;
    const char      *adapter;
    int             *stop;  /* atomic */
    int              wrong; /* versions that were not whole, or went back */
    uint64_t         last;
    long             num_seen;
} reader;

static void *read_on(void *user)
{
    reader *r = (reader *)user;
    while (!__atomic_load_n(r->stop, __ATOMIC_SEQ_CST)) {
        const lorasync_adapter *a = lorasync_acquire(r->engine, r->adapter);
        if (!a) continue;
        if (!is_version(a, a->version) || a->version < r->last) r->wrong++;
        if (a->version != r->last) r->num_seen++;
        r->last = a->version;
        lorasync_release(a);
    }
    return NULL;
}

static void start_readers(reader *r, int num, lorasync_engine *e, const char *adapter, int *stop)
{
    int i;
    for (i = 0; i < num; i++) {
        memset(&r[i], 0, sizeof r[i]);
        r[i].engine = e, r[i].adapter = adapter, r[i].stop = stop;
        pthread_create(&r[i].thread, NULL, read_on, &r[i]);
    }
}

static void end_readers(reader *r, int num, int *stop)
{
    int i;
    __atomic_store_n(stop, 1, __ATOMIC_SEQ_CST);
    for (i = 0; i < num; i++) {
        pthread_join(r[i].thread, NULL);
        CHECK_EQ(r[i].wrong, 0);
    }
}

/* -- from end to end */

static void offered_by_a_transport(void)
{
    static float      a[RANK * WIDTH], b[RANK * WIDTH];
    lorasync_session *s;
    lorasync_engine  *e = open_for_offers(NULL, NULL);
    lorasync_report   report;
    lorasync_error    err;
    reader            readers[3];
    hub               h;
    int               stop = 0;
    uint64_t          v;
    hub_init(&h);
    h.engine = e;
    s        = open_session(&h, "default", a, b);
    start_readers(readers, 3, e, "default", &stop);
    for (v = 1; v <= 300; v++) {
        train(a, b, v);
        if (lorasync_sync(s, v, &report, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
        CHECK_EQ(serves(e, "default"), v);
        CHECK(h.live <= 8);
    }
    end_readers(readers, 3, &stop);
    lorasync_close(s);
    lorasync_engine_close(e);
    hub_end(&h);
}

/* What the engine refuses is the commit's failure, and of the session's sync. */
static void refusal_reaches_the_trainer(void)
{
    static float      a[RANK * WIDTH], b[RANK * WIDTH];
    lorasync_session *s;
    lorasync_engine  *e = open_for_offers("other", NULL);
    lorasync_error    err;
    hub               h;
    hub_init(&h);
    h.engine = e;
    s        = open_session(&h, "default", a, b);
    train(a, b, 1);
    CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_E_NAME);
    CHECK_HAS(err.text, "this engine serves 'other' only");
    lorasync_close(s);
    lorasync_engine_close(e);
    hub_end(&h);
}

typedef struct follower {
    lorasync_engine *engine;
    uint64_t         until;
    long             polls, failures;
} follower;

static void *follow(void *user)
{
    follower      *f = (follower *)user;
    lorasync_error err;
    while (f->polls < 100000 && (serves(f->engine, "x") < f->until || serves(f->engine, "y") < f->until)) {
        f->failures += lorasync_engine_poll(f->engine, 1000, &err) < 0;
        f->polls++;
    }
    return NULL;
}

/* Trainer, engine and readers, each a thread of its own; two adapters. */
static void polled_as_a_source(void)
{
    static float      a[2][RANK * WIDTH], b[2][RANK * WIDTH];
    lorasync_session *s[2];
    lorasync_engine  *e;
    lorasync_source   source;
    lorasync_error    err;
    reader            readers[2];
    follower          f;
    pthread_t         thread;
    hub               h;
    int               stop = 0, i;
    uint64_t          v;
    hub_init(&h);
    source = hub_source(&h);
    e      = open_on(&source, NULL, NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    for (i = 0; i < 2; i++) s[i] = open_session(&h, i ? "y" : "x", a[i], b[i]);
    memset(&f, 0, sizeof f);
    f.engine = e, f.until = 200;
    pthread_create(&thread, NULL, follow, &f);
    start_readers(readers, 2, e, "y", &stop);
    for (v = 1; v <= 200; v++)
        for (i = 0; i < 2; i++) {
            train(a[i], b[i], v);
            CHECK_EQ(lorasync_sync(s[i], v, NULL, &err), LORASYNC_OK);
        }
    pthread_join(thread, NULL);
    end_readers(readers, 2, &stop);
    CHECK_EQ(f.failures, 0);
    CHECK_EQ(serves(e, "x"), 200);
    CHECK_EQ(serves(e, "y"), 200);
    i = h.num_opened;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(h.num_opened, i); /* what is served is not opened again */
    for (i = 0; i < 2; i++) lorasync_close(s[i]);
    lorasync_engine_close(e);
    CHECK_EQ(h.num_closed, 1);
    hub_end(&h);
}

/* -- offers that are refused */

static void versions_go_up(void)
{
    lorasync_engine *e = open_for_offers(NULL, NULL);
    lorasync_error   err;
    CHECK_EQ(offer_version(e, 3, 0, &err), LORASYNC_OK);
    CHECK_EQ(offer_version(e, 3, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(offer_version(e, 3, 1, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "a second time with other content");
    CHECK_EQ(offer_version(e, 2, 0, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "is v2, v3 is served: versions went back");
    CHECK_EQ(serves(e, "default"), 3);
    CHECK_EQ(offer_version(e, 9, 0, &err), LORASYNC_OK);
    CHECK_EQ(serves(e, "default"), 9);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "offers_only");
    lorasync_engine_close(e);
    CHECK_EQ(live, 0);
}

/* One byte of each part changed, and every shorter length: refused with what is served unharmed, or (a byte of padding
   or of a text) served as it is. */
static void damaged_bytes(void)
{
    lorasync_engine *e = open_for_offers(NULL, NULL);
    lorasync_error   err;
    size_t           i, n;
    REQUIRE(offer_version(e, 1, 0, &err) == LORASYNC_OK);
    {
        package *p = make_package("default", 2, 0);
        n          = p->header_bytes + p->payload_bytes;
        put_down(p);
    }
    for (i = n; i-- > 8; i -= i > 700 && i % 64 ? i % 64 : 0) {
        package          *p = make_package("default", 2, 0);
        lorasync_delivery d = deliver(p);
        if (i >= p->header_bytes) {
            p->bytes[i] ^= 0x10;
            CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_DIGEST);
            p->bytes[i] ^= 0x10;
        }
        d.num_bytes = i;
        CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_FORMAT);
        d.num_bytes     = p->header_bytes; /* in two, with a header of another length than it says */
        d.payload       = p->bytes + p->header_bytes;
        d.payload_bytes = i < p->payload_bytes ? i : p->payload_bytes - 1;
        CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_FORMAT);
        d.payload_bytes = p->payload_bytes;
        d.num_bytes     = i % p->header_bytes;
        if (d.num_bytes) CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_FORMAT);
        CHECK_EQ(p->releases, 0);
        put_down(p);
    }
    CHECK_EQ(serves(e, "default"), 1);
    CHECK_EQ(offer_version(e, 2, 0, &err), LORASYNC_OK);
    CHECK_EQ(serves(e, "default"), 2);
    lorasync_engine_close(e);
    CHECK_EQ(live, 0);
}

static void bad_deliveries(void)
{
    lorasync_engine  *e    = open_for_offers("default", NULL);
    package          *p    = make_package("default", 1, 0);
    lorasync_delivery good = deliver(p), d;
    lorasync_error    err;
#define REFUSED(change, status, part)                                                                                  \
    do {                                                                                                               \
        d = good;                                                                                                      \
        change;                                                                                                        \
        CHECK_EQ(lorasync_engine_offer(e, &d, &err), status);                                                          \
        CHECK_HAS(err.text, part);                                                                                     \
    } while (0)
    REFUSED(d.size = 0, LORASYNC_E_ARGUMENT, "sizeof(lorasync_delivery)");
    REFUSED(d.bytes = NULL, LORASYNC_E_ARGUMENT, "no bytes");
    REFUSED(d.payload_bytes = 5, LORASYNC_E_ARGUMENT, "payload_bytes without payload");
    REFUSED(d.on_device = 1, LORASYNC_E_ARGUMENT, "no payload of its own");
    REFUSED((d.on_device = 1, d.payload = p->bytes), LORASYNC_E_UNSUPPORTED, "accept_device");
    REFUSED(d.adapter = "other", LORASYNC_E_FORMAT, "expected 'other'");
    REFUSED(d.adapter = "", LORASYNC_E_NAME, "empty");
    REFUSED(d.version = 7, LORASYNC_E_FORMAT, "expected 7");
    REFUSED(d.config_json = NULL, LORASYNC_E_CONFIG, "no config_json");
    REFUSED(d.config_json = "", LORASYNC_E_CONFIG, "no config_json");
    REFUSED(d.config_json = "{", LORASYNC_E_FORMAT, "adapter_config.json");
    REFUSED((d.config_json = "{", d.config_where = "http://x/config"), LORASYNC_E_FORMAT, "http://x/config");
    REFUSED(d.config_json = "{\"peft_type\":\"LORA\",\"r\":5,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}",
            LORASYNC_E_CONFIG, "rank 4");
    REFUSED((d.num_bytes = 4, d.where = "http://x/v1"), LORASYNC_E_FORMAT, "http://x/v1");
    REFUSED((d.bytes = "PK\3\4............", d.num_bytes = 16), LORASYNC_E_UNSUPPORTED, "pickled");
    CHECK_EQ(lorasync_engine_offer(NULL, &good, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_engine_offer(e, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK(lorasync_acquire(e, "default") == NULL && lorasync_acquire(e, "other") == NULL);
    CHECK_EQ(p->releases, 0);
    CHECK_EQ(lorasync_engine_offer(e, &good, NULL), LORASYNC_OK);
    CHECK_EQ(serves(e, "default"), 1);
    CHECK_EQ(offer(e, make_package("other", 1, 0), &err), LORASYNC_E_NAME);
    lorasync_engine_close(e);
    CHECK_EQ(live, 0);
}

/* A lora_A without its lora_B, and nothing of LoRA at all. */
static void half_a_pair(void)
{
    static const char *const names[] = {KEY_A, "base_model.model.layers.0.q_proj.weight"};
    lorasync_engine         *e       = open_for_offers(NULL, NULL);
    lorasync_error           err;
    float                    payload[RANK * WIDTH];
    int                      i;
    memset(payload, 0, sizeof payload);
    for (i = 0; i < 2; i++) {
        lorasync_tensor     tensor;
        lorasync_image_desc d;
        lorasync_image     *image = NULL;
        memset(&tensor, 0, sizeof tensor);
        memset(&d, 0, sizeof d);
        tensor.name = names[i], tensor.dtype = LORASYNC_F32, tensor.ndim = 2;
        tensor.shape[0] = RANK, tensor.shape[1] = WIDTH;
        d.tensors = &tensor, d.num_tensors = 1, d.adapter = "default";
        REQUIRE(lorasync_image_layout(&d, NULL, &image, &err) == LORASYNC_OK);
        lorasync_image_bind(image, payload);
        lorasync_image_stamp(image, 1, lorasync_image_digest(image, NULL));
        image->config_json = CONFIG;
        CHECK_EQ(offer(e, pack(image, &live), &err), i ? LORASYNC_E_EMPTY : LORASYNC_E_PAIR);
        lorasync_image_free(image);
    }
    lorasync_engine_close(e);
    CHECK_EQ(live, 0);
}

/* -- what is whose, and until when */

/* A header beside its payload; and files that say nothing of lorasync, which the delivery names. */
static void in_two_parts_and_foreign(void)
{
    lorasync_engine    *e     = open_for_offers(NULL, NULL);
    lorasync_image     *image = lay_out("default", 1, 0), *plain = NULL;
    lorasync_image_desc desc;
    lorasync_delivery   d;
    lorasync_error      err;
    memset(&d, 0, sizeof d);
    d.size = sizeof d, d.bytes = image->header, d.num_bytes = image->header_bytes;
    d.payload = image->payload, d.payload_bytes = image->payload_bytes, d.config_json = CONFIG;
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_OK);
    CHECK_EQ(serves(e, "default"), 1);
    memset(&desc, 0, sizeof desc);
    desc.tensors = image->tensors, desc.num_tensors = image->num_tensors;
    REQUIRE(lorasync_image_layout(&desc, NULL, &plain, &err) == LORASYNC_OK);
    d.bytes = plain->header, d.num_bytes = plain->header_bytes;
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "has no version");
    d.version = 4;
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_NAME);
    d.adapter = "foreign";
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_OK);
    {
        const lorasync_adapter *a = lorasync_acquire(e, "foreign");
        CHECK(a && a->version == 4 && a->image->payload == image->payload);
        lorasync_release(a);
    }
    lorasync_engine_close(e);
    lorasync_image_free(plain);
    drop(image);
}

/* Pinned bytes stay until their last reader goes, and are released once; 8 versions are the most. */
static void pinned_until_released(void)
{
    lorasync_engine        *e = open_for_offers(NULL, NULL);
    const lorasync_adapter *pin[8], *twice;
    package                *p[10];
    lorasync_error          err;
    int                     i, k;
    for (i = 0; i < 8; i++) {
        p[i] = make_package("default", (uint64_t)i + 1, 0);
        __atomic_fetch_add(&p[i]->references, 1, __ATOMIC_SEQ_CST); /* to look at it afterwards */
        CHECK_EQ(offer(e, p[i], &err), LORASYNC_OK);
        pin[i] = lorasync_acquire(e, "default");
        for (k = 0; k <= i; k++) CHECK(is_version(pin[k], (uint64_t)k + 1) && p[k]->releases == 0);
    }
    CHECK_EQ(offer_version(e, 9, 0, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "8 versions");
    CHECK_EQ(offer_version(e, 8, 0, &err), LORASYNC_NOTHING_NEW); /* needs no room */
    twice = lorasync_acquire(e, "default");
    lorasync_release(pin[3]);
    CHECK_EQ(p[3]->releases, 0); /* a reader's release calls nothing */
    CHECK_EQ(offer_version(e, 9, 0, &err), LORASYNC_OK);
    for (k = 0; k < 8; k++) CHECK_EQ(p[k]->releases, k == 3);
    lorasync_release(pin[7]);
    CHECK_EQ(offer_version(e, 9, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(p[7]->releases, 0); /* still pinned once */
    CHECK(is_version(twice, 8));
    lorasync_release(twice);
    for (k = 0; k < 7; k++)
        if (k != 3) lorasync_release(pin[k]);
    CHECK_EQ(offer_version(e, 9, 0, &err), LORASYNC_NOTHING_NEW);
    for (k = 0; k < 8; k++) {
        CHECK_EQ(p[k]->releases, 1);
        put_down(p[k]);
    }
    CHECK_EQ(live, 1);
    CHECK_EQ(serves(e, "default"), 9);
    lorasync_engine_close(e); /* gives the last one back */
    CHECK_EQ(live, 0);
}

/* -- deltas */

/* What changed from one version to another, as bytes to send. */
static package *make_delta(uint64_t base, uint64_t version)
{
    lorasync_image *from = lay_out("default", base, 0), *to = lay_out("default", version, 0), *delta = NULL;
    uint64_t        digests[2];
    lorasync_error  err;
    package        *p = NULL;
    size_t          i, at;
    lorasync_image_digest(from, digests);
    if (lorasync_image_delta(to, base, digests, NULL, &delta, &err) < 0) {
        fprintf(stderr, "delta: %s\n", err.text);
        exit(1);
    }
    p                = (package *)calloc(1, sizeof *p);
    p->header_bytes  = delta->header_bytes;
    p->payload_bytes = delta->payload_bytes;
    p->references    = 1;
    p->live          = &live;
    p->bytes         = (char *)malloc(p->header_bytes + p->payload_bytes);
    memcpy(p->bytes, delta->header, p->header_bytes);
    for (i = 0, at = p->header_bytes; i < delta->num_tensors; at += delta->tensors[i++].num_bytes)
        memcpy(p->bytes + at, delta->tensors[i].data, delta->tensors[i].num_bytes);
    live++;
    lorasync_image_free(delta);
    drop(from);
    drop(to);
    return p;
}

static void deltas_are_applied(void)
{
    lorasync_engine        *e = open_for_offers(NULL, NULL);
    const lorasync_adapter *old;
    lorasync_error          err;
    package                *p;
    CHECK_EQ(offer(e, make_delta(1, 2), &err), LORASYNC_E_BASE); /* nothing is held */
    CHECK_EQ(offer_version(e, 1, 0, &err), LORASYNC_OK);
    old = lorasync_acquire(e, "default");
    p   = make_delta(1, 2);
    p->references++;
    CHECK_EQ(offer(e, p, &err), LORASYNC_OK); /* without a config: the base's */
    CHECK_EQ(p->releases, 1);                 /* at once: what is served is made of it */
    put_down(p);
    CHECK_EQ(serves(e, "default"), 2);
    CHECK(is_version(old, 1));
    lorasync_release(old);
    CHECK_EQ(offer(e, make_delta(1, 2), &err), LORASYNC_NOTHING_NEW); /* it is served already */
    CHECK_EQ(offer_version(e, 2, 0, &err), LORASYNC_NOTHING_NEW);     /* also whole, to the byte */
    CHECK_EQ(offer(e, make_delta(1, 3), &err), LORASYNC_E_BASE);
    p = make_delta(2, 3);
    p->bytes[p->header_bytes + 7] ^= 1;
    CHECK_EQ(offer(e, p, &err), LORASYNC_E_DIGEST);
    p         = make_delta(2, 3);
    p->config = (char *)malloc(200);
    strcpy(p->config, "{\"peft_type\":\"LORA\",\"r\":5,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}");
    CHECK_EQ(offer(e, p, &err), LORASYNC_E_CONFIG); /* one of its own is looked at */
    CHECK_EQ(serves(e, "default"), 2);
    CHECK_EQ(offer(e, make_delta(2, 3), &err), LORASYNC_OK);
    CHECK_EQ(offer(e, make_delta(3, 7), &err), LORASYNC_OK);
    CHECK_EQ(serves(e, "default"), 7);
    lorasync_engine_close(e);
    CHECK_EQ(live, 0);
}

/* A source that sends deltas when it may, made against `base`, which may be the wrong one. */
typedef struct delta_source {
    uint64_t version, base;
    int      num_deltas, num_whole;
} delta_source;

static lorasync_status delta_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    const delta_source *s = (const delta_source *)user;
    (void)err;
    if (index > 0) return LORASYNC_NOTHING_NEW;
    strcpy(out->adapter, "default");
    out->version = s->version;
    return LORASYNC_OK;
}

static lorasync_status delta_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                  lorasync_delivery *out, lorasync_error *err)
{
    delta_source *s = (delta_source *)user;
    (void)err;
    if (served) s->num_deltas++;
    else s->num_whole++;
    *out = deliver(served ? make_delta(s->base, what->version) : make_package("default", what->version, 0));
    return LORASYNC_OK;
}

static void deltas_of_a_source(void)
{
    lorasync_source  s;
    delta_source     d;
    lorasync_engine *e;
    lorasync_error   err;
    int              k;
    for (k = 0; k < 2; k++) { /* 1: it sends what it did not say that it sends */
        memset(&d, 0, sizeof d);
        memset(&s, 0, sizeof s);
        s.size = sizeof s, s.name = "deltas", s.user = &d, s.look = delta_look, s.open = delta_open;
        s.sends_deltas = !k;
        d.version      = 1;
        e              = open_on(&s, NULL, NULL);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        CHECK_EQ(d.num_whole, 1);
        d.version = 2, d.base = 1;
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        CHECK_EQ(d.num_deltas, !k);
        CHECK_EQ(serves(e, "default"), 2);
        d.version = 3, d.base = 1; /* not what is served: asked for again, whole */
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        CHECK_EQ(d.num_deltas, k ? 0 : 2);
        CHECK_EQ(d.num_whole, k ? 3 : 2);
        CHECK_EQ(serves(e, "default"), 3);
        lorasync_engine_close(e);
        CHECK_EQ(live, 0);
    }
}

/* -- sources that fail */

typedef struct broken_source {
    int             kind, num_opened, num_released, num_closed;
    uint64_t        version;
    lorasync_status status;
} broken_source;

enum {
    LOOK_FAILS,
    OPEN_FAILS,
    GONE,
    DAMAGED,
    EMPTY_DELIVERY,
    A_DELTA,
    GOES_BACK,
    FINE
};

static lorasync_status broken_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    const broken_source *s = (const broken_source *)user;
    if (s->kind == LOOK_FAILS && index == 1) {
        err->text[0] = 0; /* it says nothing: the engine does */
        return s->status;
    }
    if (index > 1) return LORASYNC_NOTHING_NEW;
    strcpy(out->adapter, index ? "good" : "bad");
    out->version = index ? 1 : s->version;
    return LORASYNC_OK;
}

static package *last_delivered;

static lorasync_status broken_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                   lorasync_delivery *out, lorasync_error *err)
{
    broken_source *s = (broken_source *)user;
    package       *p;
    (void)served;
    s->num_opened++;
    if (strcmp(what->adapter, "bad") != 0 || s->kind >= GOES_BACK || s->kind == LOOK_FAILS) {
        *out = deliver(make_package(what->adapter, what->version, 0));
        return LORASYNC_OK;
    }
    if (s->kind == GONE) return LORASYNC_NOTHING_NEW;
    if (s->kind == OPEN_FAILS) {
        snprintf(err->text, sizeof err->text, "the wire is cut");
        return err->status = s->status;
    }
    p = s->kind == A_DELTA ? make_delta(1, what->version) : make_package("bad", what->version, 0);
    if (s->kind == DAMAGED) p->bytes[p->header_bytes] ^= 1;
    p->references++;
    last_delivered = p;
    *out           = deliver(p);
    if (s->kind == EMPTY_DELIVERY) out->bytes = NULL;
    return LORASYNC_OK;
}

static void broken_close(void *user) { ((broken_source *)user)->num_closed++; }

static void broken_sources(void)
{
    static const lorasync_status expected[] = {LORASYNC_E_IO,     LORASYNC_E_IO,       LORASYNC_OK,
                                               LORASYNC_E_DIGEST, LORASYNC_E_ARGUMENT, LORASYNC_E_UNSUPPORTED,
                                               LORASYNC_OK,       LORASYNC_OK};
    lorasync_engine             *e;
    lorasync_source              s;
    lorasync_error               err;
    broken_source                b;
    int                          kind;
    for (kind = 0; kind <= FINE; kind++) {
        memset(&b, 0, sizeof b);
        memset(&s, 0, sizeof s);
        b.kind = kind, b.version = 2, b.status = kind == LOOK_FAILS ? LORASYNC_E_PEER : LORASYNC_E_IO;
        s.size = sizeof s, s.name = "broken", s.user = &b;
        s.look = broken_look, s.open = broken_open, s.close = broken_close;
        last_delivered = NULL;
        e              = open_on(&s, NULL, NULL);
        memset(&err, 0, sizeof err);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), expected[kind]);
        CHECK_EQ(err.status, expected[kind]);
        if (kind == LOOK_FAILS) CHECK_HAS(err.text, "source 'broken' could not look: a rank is gone");
        if (kind == OPEN_FAILS) CHECK_TEXT(err.text, "the wire is cut");
        if (kind == DAMAGED) CHECK_HAS(err.text, "'bad' in broken");
        if (last_delivered) CHECK_EQ(last_delivered->releases, 1);
        put_down(last_delivered);
        CHECK_EQ(serves(e, "good"), kind != LOOK_FAILS); /* one adapter does not hold up the other */
        CHECK_EQ(serves(e, "bad"), kind == GOES_BACK || kind == FINE || kind == LOOK_FAILS ? 2 : 0);
        if (kind == GOES_BACK) {
            b.version = 1;
            CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_VERSION);
            CHECK_HAS(err.text, "'bad' in broken is v1, v2 is served");
            CHECK_EQ(b.num_opened, 2); /* it was not even opened */
        }
        lorasync_engine_close(e);
        CHECK_EQ(b.num_closed, 1);
        CHECK_EQ(live, 0);
    }
}

static void bad_descs(void)
{
    lorasync_engine_desc d;
    lorasync_engine     *e = NULL;
    lorasync_source      s;
    broken_source        b;
    lorasync_error       err;
    memset(&d, 0, sizeof d);
    memset(&b, 0, sizeof b);
    memset(&s, 0, sizeof s);
    s.size = sizeof s, s.user = &b, s.look = broken_look, s.open = broken_open, s.close = broken_close;
    CHECK_EQ(lorasync_engine_open(&d, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "offers_only");
    d.source = &s, d.directory = "x";
    CHECK_EQ(lorasync_engine_open(&d, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "directory and source are both set");
    d.directory = NULL, d.offers_only = 1;
    CHECK_EQ(lorasync_engine_open(&d, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "source and offers_only are both set");
    d.offers_only = 0, s.size = 8;
    CHECK_EQ(lorasync_engine_open(&d, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "sizeof(lorasync_source)");
    s.size = sizeof s, s.open = NULL;
    CHECK_EQ(lorasync_engine_open(&d, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "no open callback");
    s.open = broken_open, d.adapter = "a/b";
    CHECK_EQ(lorasync_engine_open(&d, &e, &err), LORASYNC_E_NAME);
    CHECK_EQ(b.num_closed, 0); /* not the engine's yet */
    d.adapter = NULL;
    s.size    = offsetof(lorasync_source, open) + sizeof s.open; /* an older one: no close */
    REQUIRE(lorasync_engine_open(&d, &e, &err) == LORASYNC_OK);
    b.kind = FINE, b.version = 1;
    CHECK_EQ(lorasync_engine_poll(e, 20, &err), LORASYNC_OK);
    lorasync_engine_close(e);
    CHECK_EQ(b.num_closed, 0);
    CHECK_EQ(live, 0);
}

/* Wherever memory runs out: nothing is taken, nothing is lost, and it goes the next time. */
static void memory_runs_out(void)
{
    test_memory        m;
    lorasync_allocator a;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v;
    long               n = 0;
    memset(&m, 0, sizeof m);
    a.alloc = test_memory_alloc, a.free = test_memory_free, a.user = &m;
    e = open_for_offers(NULL, &a);
    for (v = 1; v <= 4; v++) {
        for (n = 1; n < 10000; n++) {
            package        *p = v == 3 ? make_delta(2, 3) : make_package("default", v, 0);
            lorasync_status status;
            m.fail_at = n;
            status    = offer(e, p, &err);
            m.fail_at = 0;
            if (status == LORASYNC_OK) break;
            CHECK_EQ(status, LORASYNC_E_MEMORY);
            CHECK_EQ(serves(e, "default"), v - 1);
        }
        CHECK(n > 4 && n < 10000);
        CHECK_EQ(serves(e, "default"), v);
    }
    lorasync_engine_close(e);
    CHECK_EQ(m.live, 0);
    CHECK_EQ(live, 0);
}

int main(void)
{
    RUN(offered_by_a_transport);
    RUN(refusal_reaches_the_trainer);
    RUN(polled_as_a_source);
    RUN(versions_go_up);
    RUN(damaged_bytes);
    RUN(bad_deliveries);
    RUN(half_a_pair);
    RUN(in_two_parts_and_foreign);
    RUN(pinned_until_released);
    RUN(deltas_are_applied);
    RUN(deltas_of_a_source);
    RUN(broken_sources);
    RUN(bad_descs);
    RUN(memory_runs_out);
    return test_summary("test_doors");
}
