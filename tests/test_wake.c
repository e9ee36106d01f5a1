/* Tests of how engines wait: they sleep until they are woken, miss nothing, and look only at what changed. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1 /* RUSAGE_THREAD */
#endif
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/vfs.h>

static long system_calls; /* that wake or sleep on a word */
static long opens;        /* of files */
static int  watches_left; /* 0: no limit; 1: none */
static int  far_away;     /* 1: every file system is NFS */

static int limited_watch(int fd, const char *path, uint32_t mask)
{
    if (watches_left == 1) {
        errno = ENOSPC;
        return -1;
    }
    watches_left -= watches_left > 0;
    return inotify_add_watch(fd, path, mask);
}

static int far_statfs(const char *path, struct statfs *fs)
{
    const int failed = statfs(path, fs);
    if (far_away) fs->f_type = 0x6969;
    return failed;
}

#define inotify_add_watch(fd, path, mask) limited_watch(fd, path, mask)
#define statfs(path, fs) far_statfs(path, fs)
#define openat(...) (opens++, (openat)(__VA_ARGS__))

#define syscall(...) (__atomic_fetch_add(&system_calls, 1, __ATOMIC_SEQ_CST), (syscall)(__VA_ARGS__))
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "published.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* -- a name of its own for each test */

static char name[64];

static void drop_name(void)
{
    if (name[0]) lorasync_shm_remove(name, NULL);
}

static void fresh_name(void)
{
    static int number;
    drop_name();
    snprintf(name, sizeof name, "wake-%ld-%d", (long)getpid(), number++);
    lorasync_shm_remove(name, NULL);
}

static lorasync_transport open_transport(void)
{
    lorasync_shm_desc  desc;
    lorasync_transport t;
    memset(&desc, 0, sizeof desc);
    desc.name = name;
    CHECK_EQ(lorasync_shm_open(&desc, &t, NULL), 0);
    return t;
}

/* One version of an adapter, published. */
static void publish(lorasync_transport *t, const char *adapter, uint64_t version)
{
    lorasync_image *image   = lay_out_rank(adapter, 8, 4);
    void           *payload = calloc(1, image->payload_bytes);
    lorasync_error  err;
    err.text[0] = 0;
    memcpy(payload, &version, sizeof version);
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    if (put(t, image, &err) < 0) fprintf(stderr, "publish: %s\n", err.text);
    CHECK_TEXT(err.text, "");
    drop_image(image);
}

static uint64_t version_of(lorasync_engine *e, const char *adapter)
{
    const lorasync_adapter *a       = lorasync_acquire(e, adapter);
    uint64_t                version = a ? a->version : 0;
    lorasync_release(a);
    return version;
}

static void nap_ms(int ms)
{
    struct timespec t;
    t.tv_sec  = ms / 1000;
    t.tv_nsec = ms % 1000 * 1000000l;
    nanosleep(&t, NULL);
}

/* -- a thread in a poll */

typedef struct waiter {
    lorasync_engine *e;
    int              timeout_ms, started; /* atomic */
    lorasync_status  status;
    long             switches; /* how often it went to sleep */
    uint64_t         ended_ns;
    pthread_t        thread;
} waiter;

static void *wait_in_poll(void *user)
{
    waiter       *w = (waiter *)user;
    struct rusage before, after;
    getrusage(RUSAGE_THREAD, &before);
    __atomic_store_n(&w->started, 1, __ATOMIC_SEQ_CST);
    w->status   = lorasync_engine_poll(w->e, w->timeout_ms, NULL);
    w->ended_ns = test_now_ns();
    getrusage(RUSAGE_THREAD, &after);
    w->switches = after.ru_nvcsw - before.ru_nvcsw;
    return NULL;
}

static void start_waiter(waiter *w, lorasync_engine *e, int timeout_ms)
{
    memset(w, 0, sizeof *w);
    w->e          = e;
    w->timeout_ms = timeout_ms;
    pthread_create(&w->thread, NULL, wait_in_poll, w);
    while (!__atomic_load_n(&w->started, __ATOMIC_SEQ_CST)) sched_yield();
}

static void end_waiter(waiter *w) { pthread_join(w->thread, NULL); }

/* An engine that has nothing to do sleeps nearly all of the time, and yet is there at once when `act` happens: long
   before it would have looked by itself. */
static void check_idle_and_prompt(lorasync_engine *e, void (*act)(void *user), void *user)
{
    waiter   w;
    uint64_t acted_ns;
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    start_waiter(&w, e, test_ms(20000));
    nap_ms(400);
    act(user);
    acted_ns = test_now_ns();
    end_waiter(&w);
    CHECK_EQ(w.status, LORASYNC_OK);
    CHECK(w.switches <= 20); /* 80 of 5 ms without a wake */
    CHECK(w.ended_ns < acted_ns + (uint64_t)test_ms(400) * 1000000u);
}

/* -- shared memory */

typedef struct next_version {
    lorasync_transport *t;
    const char         *adapter;
    uint64_t            version;
} next_version;

static void publish_next(void *user)
{
    next_version *n = (next_version *)user;
    publish(n->t, n->adapter, n->version++);
}

static void test_commit_wakes(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    next_version       next;
    fresh_name();
    t = open_transport();
    publish(&t, "policy", 1);
    e = open_shm_engine(name, "policy", 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    next.t       = &t;
    next.adapter = "policy";
    next.version = 2;
    check_idle_and_prompt(e, publish_next, &next);
    CHECK_EQ(version_of(e, "policy"), 2);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

/* Whatever comes between the look and the sleep ends it. */
static void test_no_wake_is_lost(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    uint64_t           begun;
    fresh_name();
    t = open_transport();
    publish(&t, "policy", 1);
    e = open_shm_engine(name, "policy", 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    begun = test_now_ns();
    publish(&t, "policy", 2); /* after the look */
    e->places[0].source.wait(e->places[0].source.user, 60000);
    CHECK(test_now_ns() < begun + (uint64_t)test_no_hang_ns());
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(version_of(e, "policy"), 2);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

typedef struct ping {
    lorasync_engine *e;
    uint64_t         seen; /* atomic */
    uint64_t         last;
} ping;

static void *follow(void *user)
{
    ping *p = (ping *)user;
    while (p->seen < p->last && lorasync_engine_poll(p->e, test_ms(20000), NULL) >= 0)
        __atomic_store_n(&p->seen, version_of(p->e, "policy"), __ATOMIC_SEQ_CST);
    return NULL;
}

/* Each version follows the one before as soon as that is seen, at every moment of the engine's way into its sleep. A
   wake that is lost costs a second. */
static void test_wakes_in_a_row(void)
{
    lorasync_transport t;
    ping               p;
    pthread_t          thread;
    uint64_t           v, slow = 0;
    fresh_name();
    t = open_transport();
    memset(&p, 0, sizeof p);
    p.e    = open_shm_engine(name, "policy", 0, 0);
    p.last = 1000;
    pthread_create(&thread, NULL, follow, &p);
    for (v = 1; v <= p.last; v++) {
        uint64_t begun = test_now_ns();
        publish(&t, "policy", v);
        while (__atomic_load_n(&p.seen, __ATOMIC_SEQ_CST) < v) sched_yield();
        slow += test_now_ns() > begun + 900000000u;
    }
    pthread_join(thread, NULL);
    CHECK(slow <= (uint64_t)test_ms(1) - 1);
    lorasync_engine_close(p.e);
    t.close(t.user);
    drop_name();
}

/* A commit makes a system call to wake only when an engine sleeps; one of a killed engine costs one, once. */
static void test_wake_costs_nothing_alone(void)
{
    lorasync_transport t;
    uint64_t           v;
    fresh_name();
    t = open_transport();
    publish(&t, "policy", 1);
    publish(&t, "policy", 2);
    system_calls = 0;
    for (v = 3; v < 10; v++) publish(&t, "policy", v);
    CHECK_EQ(system_calls, 0);
    ((lorasynci_shm *)t.user)->map.control->bell |= 1; /* an engine was killed asleep */
    for (v = 10; v < 20; v++) publish(&t, "policy", v);
    CHECK_EQ(system_calls, 1);
    t.close(t.user);
    drop_name();
}

/* The publisher was killed when it had committed and not yet woken anybody. */
static void commit_silently(void *user)
{
    lorasync_transport    *t       = (lorasync_transport *)user;
    lorasynci_shm         *shm     = (lorasynci_shm *)t->user;
    lorasynci_shm_control *c       = shm->map.control;
    const uint32_t         bell    = c->bell;
    lorasync_image        *image   = lay_out_rank("policy", 8, 4);
    void                  *payload = calloc(1, image->payload_bytes);
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, 2, lorasync_image_digest(image, NULL));
    CHECK_EQ(t->stage(t->user, image, NULL), 0);
    lorasynci_shm_name(shm, 0, shm->places[0].staged);
    CHECK_EQ(bell >> 2, c->bell >> 2);
    drop_image(image);
}

/* What nobody tells of is found all the same: a second later, or when the next publisher comes. */
static void test_killed_before_it_rang(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    waiter             w;
    uint64_t           begun;
    fresh_name();
    t = open_transport();
    publish(&t, "policy", 1);
    e = open_shm_engine(name, "policy", 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    start_waiter(&w, e, test_ms(20000));
    nap_ms(50);
    begun = test_now_ns();
    commit_silently(&t);
    end_waiter(&w);
    CHECK_EQ(w.status, 0);
    CHECK_EQ(version_of(e, "policy"), 2);
    CHECK(w.ended_ns < begun + (uint64_t)test_ms(2000) * 1000000u);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

static void test_next_publisher_wakes(void)
{
    lorasync_transport t;
    uint32_t           bell;
    fresh_name();
    t    = open_transport();
    bell = ((lorasynci_shm *)t.user)->map.control->bell;
    t.close(t.user);
    t = open_transport();
    CHECK(((lorasynci_shm *)t.user)->map.control->bell != bell);
    t.close(t.user);
    drop_name();
}

/* The control is removed and made again while an engine sleeps on the old one. */
static void test_removed_and_made_again(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    waiter             w;
    int                i;
    fresh_name();
    e = open_shm_engine(name, "policy", 0, 0);
    for (i = 0; i < 2; i++) { /* the first time there was none */
        start_waiter(&w, e, test_ms(20000));
        nap_ms(50);
        t = open_transport();
        publish(&t, "policy", 5 + (uint64_t)i);
        end_waiter(&w);
        CHECK_EQ(w.status, 0);
        CHECK_EQ(version_of(e, "policy"), 5 + i);
        t.close(t.user);
        CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
        drop_name();
    }
    lorasync_engine_close(e);
}

/* A reader that keeps an old version does not delay that it goes back: its slot is free soon after. */
static void test_released_while_asleep(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    const lorasync_adapter *a;
    const uint64_t         *pins;
    waiter                  w;
    uint64_t                before;
    fresh_name();
    t = open_transport();
    publish(&t, "policy", 1);
    e = open_shm_engine(name, "policy", 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    a = lorasync_acquire(e, "policy");
    publish(&t, "policy", 2);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    pins   = ((lorasynci_shm_source *)e->places[0].source.user)->view->reader->pins;
    before = __atomic_load_n(&pins[0], __ATOMIC_SEQ_CST);
    start_waiter(&w, e, 600);
    nap_ms(100);
    CHECK_EQ(__atomic_load_n(&pins[0], __ATOMIC_SEQ_CST), before);
    lorasync_release(a);
    nap_ms(test_ms(100));
    CHECK(__atomic_load_n(&pins[0], __ATOMIC_SEQ_CST) != before);
    end_waiter(&w);
    CHECK_EQ(w.status, LORASYNC_NOTHING_NEW);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

/* -- looking only at what changed */

enum {
    MANY = 1000
};

/* A source of many adapters, all of the same bytes but for their versions. */
typedef struct catalogue {
    uint64_t        versions[MANY];
    int             changed[MANY]; /* since they were told */
    int             any, broken;
    size_t          next;
    lorasync_image *image;
    char           *bytes;
    long            looks, told, opened;
    int             fd;
} catalogue;

static lorasync_status tell_next(catalogue *c, int only_changed, size_t index, lorasync_published *out)
{
    if (index == 0) c->next = 0;
    while (c->next < MANY && only_changed && !c->changed[c->next]) c->next++;
    if (c->next == MANY) return LORASYNC_NOTHING_NEW;
    snprintf(out->adapter, sizeof out->adapter, "a%d", (int)c->next);
    out->version        = c->versions[c->next];
    c->changed[c->next] = 0;
    c->next++;
    c->told++;
    return LORASYNC_OK;
}

static lorasync_status catalogue_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    catalogue *c = (catalogue *)user;
    (void)err;
    c->looks += index == 0;
    return tell_next(c, 0, index, out);
}

static lorasync_status catalogue_changed(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    catalogue *c = (catalogue *)user;
    (void)err;
    if (c->any) {
        c->any = 0;
        return LORASYNC_OK;
    }
    return tell_next(c, 1, index, out);
}

static lorasync_status catalogue_open(void *user, const lorasync_published *what, const lorasync_image *served,
                                      lorasync_delivery *out, lorasync_error *err)
{
    catalogue *c = (catalogue *)user;
    (void)served;
    c->opened++;
    if (c->broken) return test_refuse(err, LORASYNC_E_IO, "broken");
    out->version     = what->version;
    out->bytes       = c->bytes;
    out->num_bytes   = c->image->header_bytes + c->image->payload_bytes;
    out->config_json = CONFIG;
    return LORASYNC_OK;
}

static int catalogue_fd(void *user) { return ((catalogue *)user)->fd; }

/* An image that names neither adapter nor version. */
static void make_catalogue(catalogue *c)
{
    int i;
    memset(c, 0, sizeof *c);
    c->image = lay_out_rank("", 8, 4);
    c->bytes = (char *)calloc(1, c->image->header_bytes + c->image->payload_bytes);
    memcpy(c->bytes, c->image->header, c->image->header_bytes);
    for (i = 0; i < MANY; i++) c->versions[i] = 1;
    c->fd = -1;
}

static lorasync_engine *open_catalogue(catalogue *c)
{
    lorasync_source      s;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    memset(&s, 0, sizeof s);
    memset(&desc, 0, sizeof desc);
    s.size         = sizeof s;
    s.user         = c;
    s.look         = catalogue_look;
    s.open         = catalogue_open;
    s.changed      = catalogue_changed;
    s.fd           = catalogue_fd;
    desc.source    = &s;
    desc.no_verify = 1;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    return e;
}

static void test_looks_at_what_changed(void)
{
    catalogue       *c = (catalogue *)malloc(sizeof *c);
    lorasync_engine *e;
    lorasync_error   err;
    int              i;
    make_catalogue(c);
    e = open_catalogue(c);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(c->opened, MANY);
    CHECK_EQ(c->looks, 1);
    c->opened = c->told = 0;
    for (i = 0; i < 20; i++) CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    CHECK_EQ(c->told, 0);
    c->versions[7] = c->versions[900] = 2;
    c->changed[7] = c->changed[900] = c->changed[500] = 1;
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(c->told, 3);
    CHECK_EQ(c->opened, 2);
    CHECK_EQ(version_of(e, "a7"), 2);
    CHECK_EQ(version_of(e, "a900"), 2);
    CHECK_EQ(c->looks, 1);

    c->versions[8] = 2; /* untold */
    c->any         = 1;
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(c->looks, 2);
    CHECK_EQ(version_of(e, "a8"), 2);

    c->versions[9] = 2; /* what failed is tried again, though it is told once */
    c->changed[9] = c->broken = 1;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "broken");
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_E_IO);
    c->broken = 0;
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(version_of(e, "a9"), 2);

    c->versions[10] = 2; /* never told: found by the look at everything */
    c->looks        = 0;
    CHECK_EQ(lorasync_engine_poll(e, test_ms(12000), NULL), 0);
    CHECK_EQ(version_of(e, "a10"), 2);
    CHECK_EQ(c->looks, 1);
    lorasync_engine_close(e);
    lorasync_image_free(c->image);
    free(c->bytes);
    free(c);
}

/* Of many adapters in shared memory a poll opens and even reads only the one that changed. */
static void test_shm_tells_what_changed(void)
{
    lorasync_transport    t;
    lorasync_engine      *e;
    lorasync_published    out;
    lorasynci_shm_source *s;
    char                  adapter[16];
    int                   i;
    fresh_name();
    t = open_transport();
    for (i = 0; i < 100; i++) {
        snprintf(adapter, sizeof adapter, "a%d", i);
        publish(&t, adapter, 1);
    }
    e = open_shm_engine(name, NULL, 0, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(version_of(e, "a99"), 1);
    s       = (lorasynci_shm_source *)e->places[0].source.user;
    s->next = -5; /* would be set by a look */
    memset(&out, 0, sizeof out);
    CHECK_EQ(e->places[0].source.changed(e->places[0].source.user, 0, &out, NULL), LORASYNC_NOTHING_NEW);
    CHECK_EQ(s->next, -5);
    publish(&t, "a17", 2);
    CHECK_EQ(e->places[0].source.changed(e->places[0].source.user, 0, &out, NULL), LORASYNC_OK);
    CHECK_TEXT(out.adapter, "a17");
    CHECK_EQ(e->places[0].source.changed(e->places[0].source.user, 1, &out, NULL), LORASYNC_NOTHING_NEW);
    publish(&t, "a17", 3);
    publish(&t, "a3", 2);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(version_of(e, "a17"), 3);
    CHECK_EQ(version_of(e, "a3"), 2);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

/* -- directories */

static char place[256]; /* a new directory for each test, removed at the next */

static void run_shell(const char *format, ...)
{
    char    text[2000];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    CHECK_EQ(system(text), 0);
}

static void drop_place(void)
{
    if (place[0]) run_shell("rm -rf '%s'", place);
    place[0] = 0;
}

static void fresh_place(void)
{
    drop_place();
    strcpy(place, "/tmp/lorasync-wake-XXXXXX");
    CHECK(mkdtemp(place) != NULL);
}

static const char *below(const char *path)
{
    static char all[4][600];
    static int  next;
    next = (next + 1) % 4;
    snprintf(all[next], sizeof all[next], "%s/%s", place, path);
    return all[next];
}

static lorasync_transport open_directory(const char *path)
{
    lorasync_directory_desc desc;
    lorasync_transport      t;
    memset(&desc, 0, sizeof desc);
    desc.directory = path;
    desc.no_fsync  = 1;
    CHECK_EQ(lorasync_directory_open(&desc, &t, NULL), 0);
    return t;
}

static void publish_in(const char *path, const char *adapter, uint64_t version)
{
    lorasync_transport t = open_directory(path);
    publish(&t, adapter, version);
    t.close(t.user);
}

static lorasync_engine *open_engine_on(const char *path, const char *adapter)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    memset(&desc, 0, sizeof desc);
    desc.directory = path;
    desc.adapter   = adapter;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    return e;
}

/* A file of /proc, which has no size. */
static char *read_proc(const char *path)
{
    char  *text = (char *)calloc(1, 65536);
    FILE  *f    = fopen(path, "r");
    size_t n    = f ? fread(text, 1, 65535, f) : 0;
    text[n]     = 0;
    if (f) fclose(f);
    return text;
}

static lorasynci_vigil *vigil_of(lorasync_engine *e)
{
    return &((lorasynci_directory_source *)e->places[0].source.user)->vigil;
}

/* 1 where the system can tell of changes below `place`. */
static int can_watch(void) { return lorasynci_is_local(place); }

#define SKIP_WITHOUT_WATCHES()                                                                                         \
    do {                                                                                                               \
        if (!can_watch()) SKIP("the system does not tell of changes here");                                            \
    } while (0)

static void test_directory_wakes(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    next_version       next;
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    t = open_directory(place);
    publish(&t, "policy", 1);
    e = open_engine_on(place, NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    next.t       = &t;
    next.adapter = "policy";
    next.version = 2;
    check_idle_and_prompt(e, publish_next, &next);
    CHECK_EQ(version_of(e, "policy"), 2);
    next.adapter = "other"; /* whose directory is not there yet */
    next.version = 7;
    check_idle_and_prompt(e, publish_next, &next);
    CHECK_EQ(version_of(e, "other"), 7);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_place();
}

/* A poll without what the engine does once a second: what it finds was told. */
static lorasync_status poll_what_is_told(lorasync_engine *e)
{
    lorasync_status status;
    if (e->places[0].look_at_all_ns) e->places[0].look_at_all_ns = UINT64_MAX;
    status = lorasync_engine_poll(e, 0, NULL);
    if (e->places[0].look_at_all_ns) e->places[0].look_at_all_ns = UINT64_MAX;
    return status != LORASYNC_NOTHING_NEW ? status : lorasync_engine_poll(e, 0, NULL);
}

/* How many watches there are. */
static int count_watches(lorasync_engine *e)
{
    char path[64], *text, *at;
    int  num = 0;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", vigil_of(e)->fd);
    text = read_proc(path);
    for (at = text; at && (at = strstr(at, "inotify wd:")) != NULL; at++) num++;
    free(text);
    return num;
}

/* The directory, and what is above it, come later; they are moved away and made again; an adapter's too. */
static void test_directories_that_come_and_go(void)
{
    lorasync_engine *e;
    char             path[600];
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    snprintf(path, sizeof path, "%s/a/b/c", place);
    e = open_engine_on(below("a/b/c"), NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    run_shell("mkdir '%s'", below("x"));
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    run_shell("mkdir '%s'", below("a"));
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    run_shell("mkdir '%s'", below("a/b"));
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    publish_in(path, "policy", 1);
    CHECK_EQ(poll_what_is_told(e), 0);
    publish_in(path, "policy", 2);
    CHECK_EQ(poll_what_is_told(e), 0);

    run_shell("mv '%s' '%s'", below("a/b/c/policy"), below("a/b/c/.away"));
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    publish_in(path, "policy", 3);
    CHECK_EQ(poll_what_is_told(e), 0);
    publish_in(path, "policy", 4);
    CHECK_EQ(poll_what_is_told(e), 0);

    run_shell("mv '%s' '%s'", below("a/b/c"), below("a/b/d"));
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    publish_in(path, "policy", 5);
    CHECK_EQ(poll_what_is_told(e), 0);

    run_shell("rm -rf '%s'", below("a/b/c"));
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    publish_in(path, "policy", 6);
    CHECK_EQ(poll_what_is_told(e), 0);

    run_shell("mv '%s' '%s'", below("a"), below("z")); /* two levels up: nobody tells; the look at everything does */
    run_shell("mkdir -p '%s'", below("a/b"));
    publish_in(path, "policy", 7);
    e->places[0].look_at_all_ns = 0;
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    publish_in(path, "policy", 8);
    CHECK_EQ(poll_what_is_told(e), 0);
    CHECK_EQ(version_of(e, "policy"), 8);
    CHECK_EQ(count_watches(e), 2); /* none is left of what is watched no more */
    lorasync_engine_close(e);
    drop_place();
}

/* `latest` and an adapter may be symbolic links, and two names one directory. */
static void test_links_are_watched(void)
{
    lorasync_engine *e;
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    run_shell("mkdir '%s' '%s'", below("real"), below("served"));
    publish_in(below("real"), "policy", 1);
    run_shell("ln -s ../real/policy '%s'", below("served/policy"));
    e = open_engine_on(below("served"), "policy");
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    publish_in(below("real"), "policy", 2);
    CHECK_EQ(poll_what_is_told(e), 0);
    publish_in(below("real"), "other", 3);
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    lorasync_engine_close(e);
    drop_place();
}

/* One of 1,000 adapters changes: the others are not looked at, and of what is silent nothing is. */
static void test_directory_of_many(void)
{
    lorasync_engine *e;
    char             adapter[32];
    int              i;
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    publish_in(place, "a0", 1);
    for (i = 1; i < MANY; i++) { /* an adapter's name is not in the files of a foreign tool */
        snprintf(adapter, sizeof adapter, "a%d", i);
        CHECK_EQ(mkdir(below(adapter), 0777), 0);
    }
    e = open_engine_on(place, NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK(opens >= MANY);
    CHECK_EQ(vigil_of(e)->num, MANY);
    while (lorasync_engine_poll(e, 0, NULL) != LORASYNC_NOTHING_NEW) continue;
    e->places[0].look_at_all_ns = UINT64_MAX;
    opens                       = 0;
    for (i = 0; i < 50; i++) CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    CHECK_EQ(opens, 0);
    publish_in(place, "a500", 9);
    opens = 0;
    CHECK_EQ(poll_what_is_told(e), 0);
    CHECK_EQ(version_of(e, "a500"), 9);
    CHECK(opens < 20);
    lorasync_engine_close(e);
    drop_place();
}

/* Lost changes, no more watches, a file system of other hosts: then everything is looked at, as often as before. */
static void test_what_cannot_be_told(void)
{
    lorasynci_change lost = {-1, "", 0, 0};
    lorasync_engine *e;
    int              i;
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    publish_in(place, "policy", 1);
    e = open_engine_on(place, NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    publish_in(place, "policy", 2);
    lorasynci_notify_read(vigil_of(e)->fd, lorasynci_vigil_note, vigil_of(e));
    vigil_of(e)->watched[0].is_changed = 0; /* taken away */
    CHECK_EQ(poll_what_is_told(e), LORASYNC_NOTHING_NEW);
    lorasynci_vigil_note(vigil_of(e), &lost);
    CHECK_EQ(poll_what_is_told(e), 0);
    CHECK_EQ(version_of(e, "policy"), 2);
    lorasync_engine_close(e);
    for (i = 0; i < 3; i++) {
        waiter w;
        watches_left = i < 2 ? i + 1 : 0; /* none; the second fails */
        far_away     = i == 2;
        e            = open_engine_on(place, NULL);
        CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
        CHECK(vigil_of(e)->is_blind);
        CHECK_EQ(vigil_of(e)->fd, -1);
        e->places[0].look_at_all_ns = UINT64_MAX;
        start_waiter(&w, e, test_ms(20000));
        nap_ms(20);
        publish_in(place, "policy", 10 + (uint64_t)i);
        end_waiter(&w);
        CHECK_EQ(w.status, 0);
        CHECK_EQ(version_of(e, "policy"), 10 + i);
        lorasync_engine_close(e);
    }
    watches_left = far_away = 0;
    drop_place();
}

/* A fork that polls takes nothing away from its parent. */
static void test_fork_takes_nothing_away(void)
{
    lorasync_engine *e;
    pid_t            pid;
    int              status = 0;
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    publish_in(place, "policy", 1);
    e = open_engine_on(place, NULL);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    publish_in(place, "policy", 2);
    pid = fork();
    if (pid == 0) {
        const int good = lorasync_engine_poll(e, 0, NULL) == 0 && version_of(e, "policy") == 2;
        _exit(good ? 0 : 1);
    }
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    CHECK_EQ(poll_what_is_told(e), 0);
    CHECK_EQ(version_of(e, "policy"), 2);
    lorasync_engine_close(e);
    drop_place();
}

/* -- a descriptor for hosts that wait themselves */

static int is_readable(int fd, int timeout_ms)
{
    struct pollfd p;
    p.fd      = fd;
    p.events  = POLLIN;
    p.revents = 0;
    return poll(&p, 1, timeout_ms) > 0;
}

/* Polls until it is not readable any more: not because of what a poll does once a second, or for what readers hold. */
static void quieten(lorasync_engine *e, int fd)
{
    int turns = 0;
    do {
        CHECK(lorasync_engine_poll(e, 0, NULL) >= 0);
        e->places[0].look_at_all_ns = lorasynci_now_ns() + UINT64_C(3600000000000);
        lorasynci_waker_set(e, 0);
    } while (is_readable(fd, 0) && ++turns < 10);
    CHECK(turns < 10);
    CHECK_EQ(lorasync_engine_fd(e, NULL), fd);
}

static void check_fd(lorasync_engine *e, void (*act)(void *user), next_version *next)
{
    lorasync_error err;
    int            fd, i;
    err.text[0] = 0;
    fd          = lorasync_engine_fd(e, &err);
    CHECK_TEXT(err.text, "");
    CHECK(fd >= 0);
    CHECK(is_readable(fd, 0)); /* at first: something may have come before */
    for (i = 0; i < 3; i++) {
        quieten(e, fd);
        CHECK(!is_readable(fd, 30));
        act(next);
        CHECK(is_readable(fd, test_ms(500)));
        CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
        CHECK_EQ(version_of(e, next->adapter), next->version - 1);
    }
    quieten(e, fd);
}

static void test_fd_of_shared_memory(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    next_version       next;
    int                fd, control;
    char               path[120];
    fresh_name();
    e  = open_shm_engine(name, "policy", 0, 0); /* there is nothing yet */
    fd = lorasync_engine_fd(e, NULL);
    REQUIRE(fd >= 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    e->places[0].look_at_all_ns = lorasynci_now_ns() + UINT64_C(3600000000000);
    lorasynci_waker_set(e, 0);
    snprintf(path, sizeof path, "/lorasync-%s", name);
    control = shm_open(path, O_RDWR | O_CREAT, 0600); /* that is being made: only its last step is missing */
    CHECK(control >= 0 && ftruncate(control, sizeof(lorasynci_shm_control)) == 0);
    quieten(e, fd);
    t = open_transport();
    CHECK(is_readable(fd, test_ms(500)));
    quieten(e, fd);
    CHECK_EQ(fchmod(control, 0600), 0);
    CHECK(is_readable(fd, test_ms(500))); /* the control's own attributes, and nobody else's: */
    quieten(e, fd);
    close(control);
    strcat(path, "-other");
    control = shm_open(path, O_RDWR | O_CREAT, 0600);
    CHECK_EQ(fchmod(control, 0600), 0);
    CHECK(!is_readable(fd, 30));
    close(control);
    shm_unlink(path);
    lorasync_engine_close(e);
    e            = open_shm_engine(name, "policy", 0, 0);
    next.t       = &t;
    next.adapter = "policy";
    next.version = 1;
    check_fd(e, publish_next, &next);
    t.close(t.user);
    quieten(e, lorasync_engine_fd(e, NULL));
    drop_name(); /* removed, and made again */
    CHECK(is_readable(lorasync_engine_fd(e, NULL), test_ms(500)));
    quieten(e, lorasync_engine_fd(e, NULL));
    t = open_transport();
    CHECK(is_readable(lorasync_engine_fd(e, NULL), test_ms(500)));
    quieten(e, lorasync_engine_fd(e, NULL));
    publish_next(&next);
    CHECK(is_readable(lorasync_engine_fd(e, NULL), test_ms(500)));
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

static void test_fd_of_a_directory(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    next_version       next;
    fresh_place();
    SKIP_WITHOUT_WATCHES();
    t            = open_directory(place);
    e            = open_engine_on(place, NULL);
    next.t       = &t;
    next.adapter = "policy";
    next.version = 1;
    check_fd(e, publish_next, &next);
    far_away = 1; /* it was local when the descriptor was given: then it is readable as often as others look */
    run_shell("mkdir '%s'", below("other"));
    CHECK(lorasync_engine_poll(e, 0, NULL) >= 0);
    CHECK(vigil_of(e)->is_blind);
    CHECK(is_readable(lorasync_engine_fd(e, NULL), test_ms(200)));
    lorasync_engine_close(e);
    e = open_engine_on(place, NULL);
    CHECK_EQ(lorasync_engine_fd(e, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, place);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    far_away = 0;
    lorasync_engine_close(e);
    t.close(t.user);
    drop_place();
}

/* Readable by itself: in time for the look at everything, and soon while readers hold what is not served any more. */
static void test_fd_by_time(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    const lorasync_adapter *a;
    int                     fd;
    fresh_name();
    t = open_transport();
    publish(&t, "policy", 1);
    e  = open_shm_engine(name, "policy", 0, 0);
    fd = lorasync_engine_fd(e, NULL);
    REQUIRE(fd >= 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    quieten(e, fd);
    a = lorasync_acquire(e, "policy");
    publish(&t, "policy", 2);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), LORASYNC_NOTHING_NEW);
    CHECK(is_readable(fd, test_ms(200)));
    lorasync_release(a);
    quieten(e, fd);
    CHECK(!is_readable(fd, 30));
    e->places[0].look_at_all_ns = lorasynci_now_ns() + 20000000;
    lorasynci_waker_set(e, 0);
    CHECK(is_readable(fd, test_ms(500)));
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

/* A source of one's own; several places; and what has none. */
static void test_fd_of_sources(void)
{
    catalogue           *c = (catalogue *)malloc(sizeof *c);
    lorasync_engine_desc desc;
    lorasync_engine     *e;
    lorasync_error       err;
    waiter               w;
    int                  ends[2], fd;
    memset(&desc, 0, sizeof desc);
    desc.offers_only = 1;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    CHECK_EQ(lorasync_engine_fd(e, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_engine_fd(NULL, &err), LORASYNC_E_ARGUMENT);
    lorasync_engine_close(e);
    REQUIRE(pipe(ends) == 0);
    make_catalogue(c);
    c->fd = -1;
    e     = open_catalogue(c);
    CHECK_EQ(lorasync_engine_fd(e, &err), LORASYNC_E_UNSUPPORTED);
    lorasync_engine_close(e);
    c->fd = ends[0];
    e     = open_catalogue(c);
    fd    = lorasync_engine_fd(e, &err);
    CHECK(fd >= 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, NULL), 0);
    c->versions[3] = 2;
    c->changed[3]  = 1;
    start_waiter(&w, e, test_ms(20000)); /* which sleeps on it, too */
    nap_ms(20);
    CHECK_EQ(write(ends[1], "x", 1), 1);
    CHECK(is_readable(fd, test_ms(500)));
    end_waiter(&w);
    CHECK_EQ(w.status, 0);
    CHECK_EQ(version_of(e, "a3"), 2);
    lorasync_engine_close(e);
    close(ends[0]), close(ends[1]);
    lorasync_image_free(c->image);
    free(c->bytes);
    free(c);
}

int main(void)
{
    RUN(test_commit_wakes);
    RUN(test_no_wake_is_lost);
    RUN(test_wakes_in_a_row);
    RUN(test_wake_costs_nothing_alone);
    RUN(test_killed_before_it_rang);
    RUN(test_next_publisher_wakes);
    RUN(test_removed_and_made_again);
    RUN(test_released_while_asleep);
    RUN(test_looks_at_what_changed);
    RUN(test_shm_tells_what_changed);
    RUN(test_directory_wakes);
    RUN(test_directories_that_come_and_go);
    RUN(test_links_are_watched);
    RUN(test_directory_of_many);
    RUN(test_what_cannot_be_told);
    RUN(test_fork_takes_nothing_away);
    RUN(test_fd_of_shared_memory);
    RUN(test_fd_of_a_directory);
    RUN(test_fd_by_time);
    RUN(test_fd_of_sources);
    drop_name();
    drop_place();
    return test_summary("test_wake");
}
