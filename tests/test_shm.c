/* Tests of the shared-memory transport and the engine's side of it. Processes are killed at random points:
   LORASYNC_TEST_ROUNDS of them, 100 without it. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#endif
/* The library pins with a fetch_or: what `between` does happens after it has read the word and before it pins. Once. */
static void (*between)(void);

static int test_between(void)
{
    void (*what)(void) = between;
    between            = 0;
    if (what) what();
    return 0;
}

#define __atomic_fetch_or(...) (test_between(), __atomic_fetch_or(__VA_ARGS__))
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "pieces.h"
#include "published.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>

#ifndef ROUNDS
#define ROUNDS 100
#endif
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

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
    snprintf(name, sizeof name, "test-%ld-%d", (long)getpid(), number++);
    lorasync_shm_remove(name, NULL);
}

/* Slot segments of the name that are there; -1 where they are not files. */
static int count_slots(void)
{
    DIR           *list = opendir("/dev/shm");
    struct dirent *entry;
    char           prefix[100];
    int            num = 0;
    if (!list) return -1;
    snprintf(prefix, sizeof prefix, "lorasync-%s@", name);
    while ((entry = readdir(list)) != NULL) num += strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
    closedir(list);
    return num;
}

static int open_control(void)
{
    char path[LORASYNCI_SHM_PATH];
    lorasynci_shm_path(path, name, 0);
    return shm_open(path, O_RDWR | O_CREAT, 0600);
}

static void nap(long us)
{
    struct timespec t;
    t.tv_sec  = us / 1000000;
    t.tv_nsec = us % 1000000 * 1000;
    nanosleep(&t, NULL);
}

/* -- images whose every byte follows from the version and a seed */

static uint64_t expected_word(uint64_t version, int seed, size_t i)
{
    return lorasynci_mix(version * 1000003u + (unsigned)seed * 7919u + i);
}

static void fill_payload(void *payload, size_t num_bytes, uint64_t version, int seed)
{
    size_t i;
    for (i = 0; i < num_bytes / 8; i++) {
        uint64_t w = expected_word(version, seed, i);
        memcpy((char *)payload + i * 8, &w, 8);
    }
}

static lorasync_image *lay_out(const char *adapter, size_t width) { return lay_out_rank(adapter, width, 4); }

static void set_version(lorasync_image *image, void *payload, uint64_t version, int seed)
{
    fill_payload(payload, image->payload_bytes, version, seed);
    lorasync_image_bind(image, payload);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
}

static lorasync_image *make_image(const char *adapter, uint64_t version, int seed, size_t width)
{
    lorasync_image *image = lay_out(adapter, width);
    set_version(image, malloc(image->payload_bytes), version, seed);
    return image;
}

/* The number of wrong words in what a reader sees; -1 for a wrong shape. */
static long wrong_words(const lorasync_adapter *a, int seed)
{
    const char *p;
    size_t      i;
    long        wrong = 0;
    if (!a || !lorasync_find(a, KEY_A) || !lorasync_find(a, KEY_B) || lorasync_config_view(a->config)->r != 4)
        return -1;
    if (a->image->version != a->version || strcmp(a->image->config_json, CONFIG) != 0) return -1;
    p = (const char *)a->image->payload;
    for (i = 0; i < a->image->payload_bytes / 8; i++) {
        uint64_t w = expected_word(a->version, seed, i);
        wrong += memcmp(p + i * 8, &w, 8) != 0;
    }
    return wrong;
}

/* -- shorthands */

static lorasync_status try_transport(lorasync_transport *t, lorasync_error *err)
{
    lorasync_shm_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.name = name;
    return lorasync_shm_open(&desc, t, err);
}

static lorasync_transport open_transport(void)
{
    lorasync_transport t;
    lorasync_error     err;
    memset(&t, 0, sizeof t);
    err.text[0] = 0;
    if (try_transport(&t, &err) < 0) {
        fprintf(stderr, "lorasync_shm_open: %s\n", err.text);
        exit(1);
    }
    return t;
}

static lorasync_engine *open_engine(const char *adapter, int no_verify)
{
    return open_shm_engine(name, adapter, 0, no_verify);
}

static lorasync_status publish_as(lorasync_transport *t, const char *adapter, uint64_t version, int seed, size_t width,
                                  lorasync_error *err)
{
    lorasync_image *image  = make_image(adapter, version, seed, width);
    lorasync_status status = put(t, image, err);
    drop_image(image);
    return status;
}

static lorasync_status publish(lorasync_transport *t, const char *adapter, uint64_t version, lorasync_error *err)
{
    return publish_as(t, adapter, version, 0, 64, err);
}

static uint64_t served(lorasync_engine *e, const char *adapter)
{
    const lorasync_adapter *a = lorasync_acquire(e, adapter);
    uint64_t                v = a ? a->version : 0;
    if (a) CHECK_EQ(wrong_words(a, 0), 0);
    lorasync_release(a);
    return v;
}

static lorasynci_shm *inside(const lorasync_transport *t) { return (lorasynci_shm *)t->user; }

/* Runs a test in a child and returns its exit status; 99 when it was killed. */
static int wait_for(pid_t child)
{
    int result = 0;
    while (waitpid(child, &result, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(result) ? WEXITSTATUS(result) : 99;
}

/* -- the plain way */

static void publishing(void)
{
    lorasync_transport t;
    lorasync_engine   *e, *late;
    lorasync_image    *image;
    lorasync_error     err;
    uint64_t           v;
    fresh_name();
    e = open_engine(NULL, 0);
    memset(&err, 0, sizeof err);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW); /* no publisher yet */
    CHECK(err.status == 0 && !err.text[0]);                           /* which is no failure */
    t = open_transport();
    CHECK_TEXT(t.name, name);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    image = make_image("default", 1, 0, 64);
    CHECK_EQ(t.commit(t.user, "default", 1, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "not staged");
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK(lorasync_acquire(e, "default") == NULL);
    CHECK_EQ(t.commit(t.user, "default", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 1);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    drop_image(image);
    for (v = 2; v < 40; v++) {
        CHECK_EQ(publish(&t, "default", v, &err), 0);
        if (v % 3) continue;
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "default"), v);
    }
    CHECK(count_slots() <= 3);
    CHECK_EQ(publish(&t, "default", UINT64_MAX, &err), 0);
    t.close(t.user);
    late = open_engine("default", 0); /* after the publisher has gone */
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), 0);
    CHECK(served(late, "default") == UINT64_MAX);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK(served(e, "default") == UINT64_MAX);
    CHECK_EQ(lorasync_shm_remove(name, &err), 0);
    CHECK(count_slots() <= 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK(served(e, "default") == UINT64_MAX); /* kept */
    CHECK_EQ(lorasync_shm_remove(name, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, name);
    lorasync_engine_close(e);
    lorasync_engine_close(late);
}

static void aborted_stage(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_image    *image;
    lorasync_error     err;
    int                i;
    fresh_name();
    t     = open_transport();
    e     = open_engine("default", 0);
    image = make_image("default", 1, 0, 64);
    for (i = 0; i < 20; i++) {
        CHECK_EQ(t.stage(t.user, image, &err), 0);
        CHECK_EQ(t.stage(t.user, image, &err), 0); /* a retry */
        t.abort(t.user, "default", 1);
        CHECK_EQ(t.commit(t.user, "default", 1, &err), LORASYNC_E_STATE);
    }
    CHECK(count_slots() <= 2);
    t.abort(t.user, "nobody", 1);
    t.abort(t.user, "../x", 1);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 1);
    drop_image(image);
    lorasync_engine_close(e);
    t.close(t.user);
}

static void versions(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           word;
    int                i;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    CHECK_EQ(publish(&t, "default", 10, &err), 0);
    word = inside(&t)->map.control->adapters[0].word;
    CHECK_EQ(publish(&t, "default", 9, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "is version 10, which is newer than 9");
    CHECK_EQ(publish(&t, "default", 10, &err), 0); /* a retry of the same bytes */
    CHECK_EQ(inside(&t)->map.control->adapters[0].word, word);
    CHECK_EQ(publish_as(&t, "default", 10, 1, 64, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "other content");
    CHECK_EQ(publish_as(&t, "default", 10, 0, 128, &err), LORASYNC_E_VERSION);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 10);
    t.close(t.user);
    CHECK_EQ(lorasync_shm_remove(name, &err), 0);
    t = open_transport(); /* a second run that begins again */
    CHECK_EQ(publish(&t, "default", 3, &err), 0);
    for (i = 0; i < 2; i++) { /* older: said, at every poll */
        memset(&err, 0, sizeof err);
        CHECK_EQ(lorasync_engine_poll(e, 1000, &err), LORASYNC_E_VERSION);
        CHECK_HAS(err.text, "'default' in shared memory");
        CHECK_HAS(err.text, " is v3, v10 is served: versions went back");
        CHECK_HAS(err.text, "publish versions above v10");
        CHECK_EQ(served(e, "default"), 10);
    }
    CHECK_EQ(publish(&t, "default", 10, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW); /* the same again */
    t.close(t.user);
    CHECK_EQ(lorasync_shm_remove(name, &err), 0);
    t = open_transport();
    CHECK_EQ(publish_as(&t, "default", 10, 1, 64, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "second time");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_VERSION);
    CHECK_EQ(served(e, "default"), 10);
    CHECK_EQ(publish(&t, "default", 11, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 11);
    lorasync_engine_close(e);
    t.close(t.user);
}

static void two_adapters(void)
{
    lorasync_transport t;
    lorasync_engine   *all, *one;
    lorasync_error     err;
    uint64_t           v;
    char               adapter[20];
    int                i;
    fresh_name();
    t   = open_transport();
    all = open_engine(NULL, 0);
    one = open_engine("b", 0);
    for (v = 1; v <= 20; v++) {
        CHECK_EQ(publish_as(&t, "a", v, 0, 64, &err), 0);
        CHECK_EQ(publish_as(&t, "b", v + 100, 0, 64000, &err), 0); /* another size: each keeps its own slots */
        CHECK_EQ(lorasync_engine_poll(all, 0, &err), 0);
        CHECK_EQ(lorasync_engine_poll(one, 0, &err), 0);
        CHECK_EQ(served(all, "a"), v);
        CHECK_EQ(served(all, "b"), v + 100);
        CHECK_EQ(served(one, "b"), v + 100);
        CHECK(lorasync_acquire(one, "a") == NULL);
    }
    CHECK(count_slots() <= 6); /* 2 x 3 slots, used again and again */
    for (i = 2; i < 64; i++) {
        snprintf(adapter, sizeof adapter, "n%d", i);
        CHECK_EQ(publish(&t, adapter, 1, &err), 0);
    }
    for (i = 64; i < LORASYNCI_SHM_ADAPTERS - 1; i++)
        inside(&t)->map.control->adapters[i].word = (uint64_t)i << 16 | 40000;
    inside(&t)->map.control->num_adapters = LORASYNCI_SHM_ADAPTERS - 1;
    CHECK_EQ(publish(&t, "last", 1, &err), 0);
    CHECK_EQ(publish(&t, "more", 1, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "4096 adapters");
    for (i = 64; i < LORASYNCI_SHM_ADAPTERS - 1; i++) inside(&t)->map.control->adapters[i].word = 0;
    CHECK_EQ(publish(&t, "more", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(all, 0, &err), 0);
    CHECK_EQ(served(all, "n63"), 1);
    CHECK_EQ(served(all, "last"), 1);
    CHECK_EQ(served(all, "more"), 1);
    lorasync_engine_close(all);
    lorasync_engine_close(one);
    t.close(t.user);
}

/* -- many readers on old versions */

static void growth(void)
{
    enum {
        ENGINES = 6,
        HELD    = 7
    };
    lorasync_transport      t;
    lorasync_engine        *e[ENGINES];
    const lorasync_adapter *held[ENGINES][HELD];
    lorasync_error          err;
    uint64_t                v = 0;
    int                     i, k;
    fresh_name();
    t = open_transport();
    for (i = 0; i < ENGINES; i++) {
        e[i] = open_engine("default", 0);
        for (k = 0; k < HELD; k++) {
            CHECK_EQ(publish(&t, "default", ++v, &err), 0);
            CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
            held[i][k] = lorasync_acquire(e[i], "default");
            REQUIRE(held[i][k]);
        }
        CHECK_EQ(publish(&t, "default", ++v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
        CHECK_EQ(publish(&t, "default", ++v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), LORASYNC_E_BUSY);
        CHECK_HAS(err.text, "8 versions");
    }
    CHECK(count_slots() == -1 || count_slots() >= ENGINES * HELD);
    for (i = 0; i < ENGINES; i++)
        for (k = 0; k < HELD; k++) {
            CHECK_EQ(held[i][k]->version, i * (HELD + 2) + k + 1);
            CHECK_EQ(wrong_words(held[i][k], 0), 0);
            lorasync_release(held[i][k]);
        }
    for (i = 0; i < ENGINES; i++) {
        CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
        CHECK_EQ(served(e[i], "default"), v);
    }
    CHECK_EQ(publish(&t, "default", ++v, &err), 0);
    CHECK(count_slots() <= 3); /* back to what is kept */
    for (i = 0; i < ENGINES; i++) lorasync_engine_close(e[i]);
    t.close(t.user);
}

/* Mappings of this process that lie in the slots of the name. */
static int count_mapped(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char  line[1000], wanted[100];
    int   num = 0;
    if (!maps) return -1;
    snprintf(wanted, sizeof wanted, "/lorasync-%s@", name);
    while (fgets(line, sizeof line, maps)) num += strstr(line, wanted) != NULL && strstr(line, " r--s ") != NULL;
    fclose(maps);
    return num;
}

/* Versions that come to lie in the same slots are not mapped anew; slots that are gone are unmapped by the next
   poll. */
static void stays_mapped(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    const void        *payloads[4] = {NULL};
    uint64_t           v;
    int                num = 0, i;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    for (v = 1; v <= 12; v++) {
        const lorasync_adapter *a;
        CHECK_EQ(publish_as(&t, "default", v, 1, 64, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        a = lorasync_acquire(e, "default");
        REQUIRE(a && a->version == v);
        CHECK_EQ(wrong_words(a, 1), 0);
        for (i = 0; i < num && payloads[i] != a->image->payload; i++) {}
        if (i == num) payloads[num++] = a->image->payload;
        REQUIRE(num < 4);
        lorasync_release(a);
    }
    CHECK_EQ(num, count_slots());
    if (count_mapped() >= 0) CHECK_EQ(count_mapped(), num);
    for (; v <= 18; v++) { /* larger: other slots */
        CHECK_EQ(publish_as(&t, "default", v, 1, 40000, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    }
    lorasync_engine_poll(e, 0, &err);
    if (count_mapped() >= 0) CHECK_EQ(count_mapped(), count_slots());
    lorasync_engine_close(e);
    if (count_mapped() >= 0) CHECK_EQ(count_mapped(), 0);
    t.close(t.user);
    drop_name();
}

/* What was cut short after it was mapped is refused as well. */
static void cut_while_mapped(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    DIR               *list;
    struct dirent     *entry;
    char               prefix[100], path[400];
    uint64_t           v;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    for (v = 1; v <= 6; v++) {
        CHECK_EQ(publish(&t, "default", v, &err), LORASYNC_OK);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    }
    CHECK_EQ(publish(&t, "default", v, &err), LORASYNC_OK);
    snprintf(prefix, sizeof prefix, "lorasync-%s@", name);
    list = opendir("/dev/shm");
    if (!list) SKIP("no /dev/shm");
    while ((entry = readdir(list)) != NULL) {
        if (strncmp(entry->d_name, prefix, strlen(prefix)) != 0) continue;
        snprintf(path, sizeof path, "/dev/shm/%s", entry->d_name);
        CHECK_EQ(truncate(path, 4096), 0);
    }
    closedir(list);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "has 4096 bytes");
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
}

static lorasync_transport hurried;
static uint64_t           hurried_version;

static int hurried_times;

static void publish_some(void)
{
    lorasync_error err;
    int            i;
    for (i = 0; i < hurried_times; i++) CHECK_EQ(publish(&hurried, "default", ++hurried_version, &err), 0);
}

/* The version that an engine has found is replaced, and its slot taken again, before the engine has pinned it. */
static void replaced_before_pin(void)
{
    lorasync_engine *e;
    lorasync_error   err;
    int              i;
    fresh_name();
    hurried         = open_transport();
    hurried_version = 0;
    e               = open_engine(NULL, 0);
    for (i = 0; i < 12; i++) {
        CHECK_EQ(publish(&hurried, "default", ++hurried_version, &err), 0);
        hurried_times = 1 + i % 4;
        between       = publish_some;
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK(between == NULL);
        CHECK_EQ(served(e, "default"), hurried_version);
        CHECK_EQ(inside(&hurried)->map.control->readers[0].pins[0] &
                     (inside(&hurried)->map.control->readers[0].pins[0] - 1),
                 0); /* one pin */
    }
    lorasync_engine_close(e);
    hurried.close(hurried.user);
}

static void sizes(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v;
    unsigned long long random = 5;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    for (v = 1; v <= 60; v++) {
        size_t width = (size_t)1 << test_random(&random) % 17;
        CHECK_EQ(publish_as(&t, "default", v, 0, width, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "default"), v);
        CHECK(count_slots() <= 3);
    }
    lorasync_engine_close(e);
    t.close(t.user);
}

static void all_slots_taken(void)
{
    lorasync_transport     t;
    lorasync_error         err;
    lorasynci_shm_segment *slots;
    int                    i;
    fresh_name();
    t     = open_transport();
    slots = inside(&t)->slots;
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    for (i = 1; i < LORASYNCI_SHM_SLOTS; i++) slots[i].serial = 1, slots[i].adapter = 9;
    CHECK_EQ(publish(&t, "default", 2, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "16384 slots");
    slots[LORASYNCI_SHM_SLOTS - 1].serial = 0;
    CHECK_EQ(publish(&t, "default", 2, &err), 0);
    CHECK_EQ(lorasynci_shm_slot_of(inside(&t)->map.control->adapters[0].word), LORASYNCI_SHM_SLOTS - 1);
    t.close(t.user);
}

/* -- straight into the slot */

/* The memory in which the next version of this image is to be made. */
static lorasync_status lend(const lorasync_transport *t, const lorasync_image *image, lorasync_loan *out,
                            lorasync_error *err)
{
    lorasync_loan_request want;
    memset(&want, 0, sizeof want);
    memset(out, 0, sizeof *out);
    want.size  = sizeof want;
    want.image = image;
    return t->lend(t->user, &want, out, err);
}

static void direct(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_image    *image, *other, wrong;
    lorasync_error     err;
    lorasync_loan      loan, again;
    char              *memory, *longer;
    uint64_t           v;
    int                slot;
    fresh_name();
    t     = open_transport();
    e     = open_engine("default", 0);
    image = lay_out("default", 64);
    for (v = 1; v <= 10; v++) {
        CHECK_EQ(lend(&t, image, &loan, &err), 0);
        CHECK_EQ(lend(&t, image, &again, &err), 0);
        CHECK(memcmp(&loan, &again, sizeof loan) == 0);
        memory = (char *)loan.payload;
        CHECK_EQ((uintptr_t)(memory - image->header_bytes) % 4096, 0);
        slot = inside(&t)->places[0].next;
        CHECK(slot >= 0 && slot != lorasynci_shm_slot_of(inside(&t)->map.control->adapters[0].word));
        lorasynci_image_move_header(image, memory - image->header_bytes);
        set_version(image, memory, v, 0);
        CHECK_EQ(put(&t, image, &err), 0);
        CHECK_EQ(lorasynci_shm_slot_of(inside(&t)->map.control->adapters[0].word), slot); /* the very same memory is
                                                                                             served */
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "default"), v);
    }
    CHECK(count_slots() <= 3);

    /* a config that does not fit behind it: copied into a larger slot */
    longer = (char *)malloc(300000);
    memset(longer, ' ', 300000);
    memcpy(longer, CONFIG, sizeof CONFIG - 1);
    longer[299999] = 0;
    CHECK_EQ(lend(&t, image, &loan, &err), 0);
    memory = (char *)loan.payload;
    lorasynci_image_move_header(image, memory - image->header_bytes);
    set_version(image, memory, 11, 0);
    image->config_json = longer;
    CHECK_EQ(put(&t, image, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    {
        const lorasync_adapter *a = lorasync_acquire(e, "default");
        CHECK_EQ(a->version, 11);
        CHECK_TEXT(a->image->config_json, longer);
        lorasync_release(a);
    }

    /* another image than the one that was announced */
    wrong              = *image;
    wrong.header_bytes = 1000, wrong.payload_bytes = 4000;
    wrong.config_json = CONFIG;
    CHECK_EQ(lend(&t, &wrong, &loan, &err), 0);
    other = make_image("default", 12, 0, 4096);
    CHECK_EQ(put(&t, other, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 12);
    drop_image(other);
    wrong.adapter = "a/b";
    CHECK_EQ(lend(&t, &wrong, &loan, &err), LORASYNC_E_NAME);
    wrong.adapter       = "default";
    wrong.payload_bytes = SIZE_MAX - 5;
    CHECK_EQ(lend(&t, &wrong, &loan, &err), LORASYNC_E_ARGUMENT);
    free(longer);
    lorasync_image_free(image);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* -- refusals */

/* What was lent to a session that closes is removed: a rank of it that was left behind keeps a mapping of its own, and
   the session after it gets other memory. */
static void taken_back(void)
{
    lorasync_transport t;
    lorasync_image    *image;
    lorasync_error     err;
    lorasync_loan      first, second;
    int                one, two; /* two sessions */
    fresh_name();
    t     = open_transport();
    image = lay_out("default", 64);
    CHECK_EQ(t.attach(t.user, &one, "default", &err), LORASYNC_OK);
    CHECK_EQ(lend(&t, image, &first, &err), 0);
    CHECK(count_slots() == -1 || count_slots() == 1);
    t.detach(t.user, &two, "default", 0); /* not the session that has it */
    CHECK(count_slots() == -1 || count_slots() == 1);
    t.detach(t.user, &one, "default", 0);
    CHECK(count_slots() <= 0);
    CHECK_EQ(t.attach(t.user, &two, "default", &err), LORASYNC_OK);
    CHECK_EQ(lend(&t, image, &second, &err), 0);
    CHECK(first.id != second.id);
    t.detach(t.user, &two, "default", 0);
    lorasync_image_free(image);
    t.close(t.user), t.close(t.user); /* by each session */
}

static void bad_names(void)
{
    static const char *const names[] = {"",        "../x", "a/b", "/x",  ".",        "..",
                                        ".hidden", "a b",  "a@1", "a\n", "\xc3\xa4", "%s"};
    char                     longer[200];
    lorasync_shm_desc        desc;
    lorasync_engine_desc     ed;
    lorasync_engine         *e = NULL;
    lorasync_transport       t;
    lorasync_image          *image;
    lorasync_error           err;
    size_t                   i;
    memset(&desc, 0, sizeof desc);
    memset(&ed, 0, sizeof ed);
    memset(longer, 'a', sizeof longer);
    longer[101] = 0;
    for (i = 0; i <= COUNT(names); i++) {
        desc.name = ed.shm = i < COUNT(names) ? names[i] : longer;
        CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_NAME);
        CHECK_HAS(err.text, "shared memory");
        CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_NAME);
        CHECK_EQ(lorasync_shm_remove(desc.name, &err), LORASYNC_E_NAME);
    }
    desc.name = NULL;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_NAME);
    CHECK_EQ(lorasync_shm_remove(NULL, &err), LORASYNC_E_NAME);
    longer[100] = 0;
    desc.name   = longer;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), 0);
    CHECK_TEXT(t.name, longer);
    image = make_image("ok", 1, 0, 64);
    memset(longer + 101, 'b', 99);
    for (i = 0; i < COUNT(names); i++) {
        if (i == 7 || i >= 8) continue; /* legal for an adapter */
        image->adapter = names[i];
        CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_NAME);
        CHECK_EQ(t.commit(t.user, names[i], 1, &err), LORASYNC_E_NAME);
    }
    image->adapter = "ok";
    drop_image(image);
    t.close(t.user);
    CHECK_EQ(lorasync_shm_remove(desc.name, &err), 0);
}

static void bad_arguments(void)
{
    lorasync_shm_desc    desc;
    lorasync_engine_desc ed;
    lorasync_engine     *e = NULL;
    lorasync_allocator   half;
    lorasync_transport   t;
    lorasync_image      *image;
    lorasync_error       err;
    const void          *payload;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    memset(&ed, 0, sizeof ed);
    memset(&half, 0, sizeof half);
    half.alloc = test_memory_alloc;
    desc.name  = name;
    CHECK_EQ(lorasync_shm_open(NULL, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_shm_open(&desc, NULL, &err), LORASYNC_E_ARGUMENT);
    desc.num_slots = 1;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "num_slots is 1");
    desc.num_slots = LORASYNCI_SHM_SLOTS + 1;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    desc.num_slots = 0;
    desc.allocator = &half;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_ARGUMENT);
    ed.shm       = name;
    ed.directory = "x";
    CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "both");
    ed.shm = ed.directory = NULL;
    CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_ARGUMENT);

    t                  = open_transport();
    image              = make_image("default", 1, 0, 64);
    payload            = image->payload;
    image->config_json = "";
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_CONFIG);
    image->config_json = CONFIG;
    image->payload     = NULL;
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_ARGUMENT);
    image->payload = payload;
    image->version = 0;
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_ARGUMENT);
    image->version   = 1;
    image->on_device = 1;
    CHECK_EQ(t.stage(t.user, image, &err), LORASYNC_E_UNSUPPORTED);
    image->on_device = 0;
    CHECK_EQ(t.stage(t.user, image, &err), 0);
    drop_image(image);
    t.close(t.user);
}

/* A control that is not what it should be: both sides refuse it, and it can be removed. */
/* Device memory in a library that was compiled without it. */
static void no_cuda(void)
{
    lorasync_transport   t;
    lorasync_shm_desc    desc;
    lorasync_engine_desc ed;
    lorasync_engine     *e = NULL;
    lorasync_cuda        cuda;
    lorasync_error       err;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    memset(&ed, 0, sizeof ed);
    memset(&cuda, 0, sizeof cuda);
    desc.name = ed.shm = name;
    desc.cuda          = &cuda;
    ed.accept_device   = 1;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "define it beside LORASYNC_IMPLEMENTATION");
    CHECK_EQ(lorasync_engine_open(&ed, &e, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "accept_device is set, but this library was compiled without LORASYNC_CUDA");
    CHECK(e == NULL);
}

static void expect_refused(lorasync_status status, const char *text)
{
    lorasync_transport t;
    lorasync_engine   *e = open_engine(NULL, 0);
    lorasync_error     err;
    memset(&err, 0, sizeof err);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), status);
    if (status < 0) CHECK_HAS(err.text, text);
    lorasync_engine_close(e);
    memset(&err, 0, sizeof err);
    CHECK_EQ(try_transport(&t, &err), status < 0 ? status : 0);
    if (status < 0) CHECK_HAS(err.text, text);
    else t.close(t.user);
    memset(&err, 0, sizeof err);
    CHECK_EQ(lorasync_shm_remove(name, &err), 0);
    CHECK(err.status == 0 && !err.text[0]); /* a success leaves it alone */
}

static void bad_control(void)
{
    lorasync_transport t;
    uint64_t           magic;
    int                fd;
    fresh_name();
    fd = open_control(); /* empty: a publisher was killed right after making it */
    expect_refused(LORASYNC_NOTHING_NEW, "");
    close(fd);

    fd = open_control(); /* its size, but nothing written yet */
    CHECK_EQ(ftruncate(fd, (off_t)sizeof(lorasynci_shm_control)), 0);
    expect_refused(LORASYNC_NOTHING_NEW, "");
    close(fd);

    fd = open_control();
    CHECK_EQ(ftruncate(fd, 100), 0);
    expect_refused(LORASYNC_E_FORMAT, "has 100 bytes, expected");
    close(fd);

    fd = open_control();
    CHECK_EQ(ftruncate(fd, (off_t)sizeof(lorasynci_shm_control)), 0);
    CHECK_EQ(pwrite(fd, "somebody", 8, 0), 8);
    expect_refused(LORASYNC_E_FORMAT, "not made by lorasync");
    close(fd);

    fd    = open_control();
    magic = lorasynci_shm_magic + 5;
    CHECK_EQ(ftruncate(fd, (off_t)sizeof(lorasynci_shm_control)), 0);
    CHECK_EQ(pwrite(fd, &magic, 8, 0), 8);
    expect_refused(LORASYNC_E_FORMAT, "has layout 7, expected 2");
    close(fd);

    t = open_transport();
    CHECK_EQ(fchmod(inside(&t)->map.fd, 0644), 0);
    t.close(t.user);
    expect_refused(LORASYNC_E_IO, "has mode 644, expected 600");

    if (geteuid() == 0) {
        t = open_transport();
        CHECK_EQ(fchown(inside(&t)->map.fd, 65534, 65534), 0);
        t.close(t.user);
        expect_refused(LORASYNC_E_IO, "belongs to user 65534, expected 0");
    }
}

/* Another user. */
static void stranger(void)
{
    lorasync_transport t;
    lorasync_error     err;
    pid_t              child;
    if (geteuid() != 0) SKIP("needs root to become another user");
    fresh_name();
    t = open_transport();
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        lorasync_transport other;
        lorasync_engine   *e;
        int                bad = 0;
        if (setgid(65534) != 0 || setuid(65534) != 0) _exit(9);
        e = open_engine(NULL, 0);
        memset(&err, 0, sizeof err);
        bad |= (lorasync_engine_poll(e, 0, &err) != LORASYNC_E_IO || !strstr(err.text, name)) * 1;
        bad |= (try_transport(&other, &err) != LORASYNC_E_IO) * 2;
        bad |= (lorasync_shm_remove(name, &err) != LORASYNC_E_IO) * 4;
        lorasync_engine_close(e);
        _exit(bad);
    }
    CHECK_EQ(wait_for(child), 0);
    CHECK_EQ(publish(&t, "default", 2, &err), 0);
    t.close(t.user);
}

/* What stands in the control and in slots is checked: an engine says what is wrong, goes on serving, and takes the next
   version. */
static void damage(void)
{
    int how;
    for (how = 0; how < 9; how++) {
        static const char *const texts[] = {"names no slot", "cannot open",  "bytes, expected",
                                            "is damaged",    "is damaged",   "is damaged",
                                            "digest",        "adapter name", "expected 2"};
        lorasync_transport       t;
        lorasync_engine         *e;
        lorasync_error           err;
        lorasynci_shm_control   *c;
        lorasynci_shm_head      *h;
        uint64_t                 word;
        lorasynci_shm_segment    g;
        int                      slot;
        fresh_name();
        t = open_transport();
        e = open_engine(NULL, 0);
        c = inside(&t)->map.control;
        CHECK_EQ(publish(&t, "default", 1, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(publish(&t, "default", how == 8 ? 3 : 2, &err), 0);
        word = c->adapters[0].word;
        slot = lorasynci_shm_slot_of(word);
        REQUIRE(slot >= 0);
        g = c->slots[slot];
        h = lorasynci_shm_head_of(inside(&t), slot);
        switch (how) {
        case 0: c->adapters[0].word = word | 40000; break;
        case 1: c->slots[slot].serial = 77; break;
        case 2: c->slots[slot].num_bytes += 4096; break;
        case 3: h->image_bytes = UINT64_MAX; break;
        case 4: h->config_bytes = UINT64_MAX - 50; break;
        case 5: h->config_bytes = 0; break;
        case 6: lorasynci_shm_image_of(inside(&t), slot)[h->image_bytes - 3] ^= 1; break;
        case 7: memset(c->adapters[0].name, 'x', sizeof c->adapters[0].name); break;
        default: h->version = 2; break;
        }
        memset(&err, 0, sizeof err);
        CHECK(lorasync_engine_poll(e, 0, &err) < 0);
        CHECK_HAS(err.text, texts[how]);
        CHECK_EQ(served(e, "default"), 1);
        CHECK(lorasync_engine_poll(e, 0, NULL) < 0);
        CHECK_EQ(served(e, "default"), 1);
        c->adapters[0].word = word;
        c->slots[slot]      = g;
        memset(c->adapters[0].name, 0, sizeof c->adapters[0].name);
        strcpy(c->adapters[0].name, "default");
        CHECK_EQ(publish(&t, "default", 4, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, "default"), 4);
        lorasync_engine_close(e);
        t.close(t.user);
    }
}

/* One word of the control is overwritten between a loan and what is published there: nobody crashes, and when the word
   is as it was, all is well again. `at` is in the control. */
static void overwritten(lorasync_transport *t, lorasync_engine *e, uint64_t *at, uint64_t value, uint64_t *version)
{
    const uint64_t  was   = *at;
    lorasync_image *image = lay_out("default", 64);
    lorasync_loan   loan;
    lorasync_error  err;
    CHECK_EQ(lend(t, image, &loan, &err), 0);
    *at = value;
    lorasynci_image_move_header(image, (char *)loan.payload - image->header_bytes);
    set_version(image, loan.payload, ++*version, 0);
    put(t, image, &err);
    lorasync_image_free(image);
    publish_as(t, "default", ++*version, 0, 100000, &err); /* another size */
    publish(t, "other", *version, &err);
    lorasync_engine_poll(e, 0, &err);
    if (*at == value) *at = was;
    CHECK_EQ(publish(t, "default", ++*version, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), *version);
}

static void overwritten_control(void)
{
    static const uint64_t  values[] = {0, 1, 5000, UINT64_C(1) << 40, UINT64_MAX};
    lorasync_transport     t;
    lorasync_engine       *e;
    lorasync_error         err;
    lorasynci_shm_control *c;
    uint64_t               version = 1;
    size_t                 i, k;
    fresh_name();
    t = open_transport();
    e = open_engine("default", 0);
    c = inside(&t)->map.control;
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    for (k = 0; k < COUNT(values); k++) {
        for (i = 0; i < offsetof(lorasynci_shm_control, adapters) / 8; i++)
            overwritten(&t, e, (uint64_t *)c + i, values[k], &version);
        for (i = 0; i < 2; i++) overwritten(&t, e, (uint64_t *)&c->adapters[0] + i, values[k], &version);
        for (i = 0; i < 6 * sizeof c->slots[0] / 8; i++)
            overwritten(&t, e, (uint64_t *)&c->slots[0] + i, values[k], &version);
        for (i = 0; i < 4; i++) overwritten(&t, e, (uint64_t *)&c->readers[0] + i, values[k], &version);
    }
    for (i = 0; i < sizeof c->adapters[0].name / 8; i++) { /* is another adapter then */
        uint64_t *at = (uint64_t *)(void *)c->adapters[0].name + i, was = *at;
        *at = UINT64_MAX;
        publish(&t, "default", ++version, &err);
        lorasync_engine_poll(e, 0, &err);
        *at = was;
    }
    lorasync_engine_close(e);
    t.close(t.user);
}

/* Segments have names that cannot be guessed: who knows one does not know the next. */
static void names_of_segments(void)
{
    lorasync_transport t;
    lorasync_error     err;
    uint64_t           v, one, other;
    fresh_name();
    t = open_transport();
    for (v = 1; v <= 3; v++) CHECK_EQ(publish(&t, "default", v, &err), 0);
    one = inside(&t)->slots[0].serial, other = inside(&t)->slots[1].serial;
    CHECK((one > other ? one - other : other - one) > 1000000);
    t.close(t.user);
}

/* Somebody cleans up /dev/shm. */
static void removed_by_hand(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    char               path[LORASYNCI_SHM_PATH];
    int                i;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    for (i = 1; i <= 3; i++) CHECK_EQ(publish(&t, "default", (uint64_t)i, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) {
        lorasynci_shm_path(path, name, inside(&t)->map.control->slots[i].serial);
        if (inside(&t)->map.control->slots[i].serial) shm_unlink(path);
    }
    t.close(t.user);
    t = open_transport(); /* slots that are gone are made again; what was served is not known any more */
    CHECK_EQ(publish(&t, "default", 4, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 4);
    lorasynci_shm_path(path, name, 0);
    CHECK_EQ(shm_unlink(path), 0);
    CHECK_EQ(publish(&t, "default", 5, &err), LORASYNC_E_STATE);
    CHECK_HAS(err.text, "was removed");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "default"), 4);
    t.close(t.user);
    t = open_transport();
    CHECK_EQ(publish(&t, "default", 6, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 6);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_name();
    CHECK(count_slots() <= 0);
}

static void full(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    struct rlimit      limit, low;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0); /* as when shared memory is full */
    signal(SIGXFSZ, SIG_IGN);
    low          = limit;
    low.rlim_cur = 200000;
    setrlimit(RLIMIT_FSIZE, &low);
    CHECK_EQ(publish_as(&t, "default", 2, 0, 100000, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "no room for");
    CHECK_HAS(err.text, strerror(EFBIG));
    CHECK(count_slots() <= 1);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 1);
    setrlimit(RLIMIT_FSIZE, &limit);
    CHECK_EQ(publish_as(&t, "default", 2, 0, 100000, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 2);
    t.close(t.user);
    drop_name();
    low.rlim_cur = 1000;
    setrlimit(RLIMIT_FSIZE, &low);
    CHECK_EQ(try_transport(&t, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, "make room for");
    setrlimit(RLIMIT_FSIZE, &limit);
    t = open_transport();
    t.close(t.user);
    lorasync_engine_close(e);
}

/* -- who lives */

static void one_publisher(void)
{
    lorasync_transport t, second;
    lorasync_error     err;
    char               text[40];
    pid_t              child;
    fresh_name();
    t = open_transport();
    snprintf(text, sizeof text, "process %ld", (long)getpid());
    CHECK_EQ(try_transport(&second, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, text);
    CHECK_HAS(err.text, "attach that transport to the session of each adapter");
    CHECK_EQ(lorasync_shm_remove(name, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, text);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        int bad = try_transport(&second, &err) != LORASYNC_E_BUSY || !strstr(err.text, text);
        bad |= (publish(&t, "default", 1, &err) != LORASYNC_E_STATE || !strstr(err.text, text)) * 2;
        t.close(t.user); /* the parent keeps its place */
        bad |= (try_transport(&second, &err) != LORASYNC_E_BUSY) * 4;
        _exit(bad);
    }
    CHECK_EQ(wait_for(child), 0);
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    t.close(t.user);
    t = open_transport();
    CHECK_EQ(publish(&t, "default", 2, &err), 0);
    t.close(t.user);
}

/* -- one transport, several sessions */

static float session_values[2][64];

static lorasync_session *open_adapter_session(const char *adapter)
{
    lorasync_desc     d;
    lorasync_session *s = NULL;
    lorasync_error    err;
    int               i;
    memset(&d, 0, sizeof d);
    d.lora_alpha = 4, d.adapter = adapter;
    CHECK_EQ(lorasync_open(&d, &s, &err), 0);
    for (i = 0; s && i < 2; i++) {
        const char    *name = i ? "model.layers.0.q_proj.lora_B.weight" : "model.layers.0.q_proj.lora_A.weight";
        lorasync_piece p    = whole_piece(name, LORASYNC_F32, 2, 8, 8, session_values[i]);
        CHECK_EQ(lorasync_add(s, &p, &err), 0);
    }
    return s;
}

static uint64_t session_served(lorasync_engine *e, const char *adapter)
{
    const lorasync_adapter *a = lorasync_acquire(e, adapter);
    uint64_t                v = a ? a->version : 0;
    lorasync_release(a);
    return v;
}

/* Versions of one session; the engine must see each. */
static void session_publishes(lorasync_session *s, lorasync_engine *e, const char *adapter, uint64_t from, uint64_t to)
{
    lorasync_error  err;
    lorasync_report report;
    for (; from <= to; from++) {
        CHECK_EQ(lorasync_sync(s, from, &report, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(session_served(e, adapter), from);
    }
    CHECK_EQ(report.in_place, 1);
}

/* What was lent to a session that closes goes to nobody else: its slot is removed, and the transport lives on. */
static void lent_slot_goes(void)
{
    lorasync_transport t;
    lorasync_session  *a, *b;
    lorasync_error     err;
    int                i, slot;
    uint64_t           serial;
    fresh_name();
    t = open_transport();
    a = open_adapter_session("a");
    b = open_adapter_session("b");
    CHECK_EQ(lorasync_attach(a, &t, &err), 0);
    CHECK_EQ(lorasync_attach(b, &t, &err), 0);
    CHECK_EQ(lorasync_compile(a, &err), 0);
    CHECK_EQ(lorasync_sync(a, 1, NULL, &err), 0);
    slot = inside(&t)->places[0].next;
    REQUIRE(slot >= 0);
    serial = inside(&t)->map.control->slots[slot].serial;
    lorasync_close(a);
    CHECK_EQ(inside(&t)->places[0].next, -1);
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) CHECK(inside(&t)->map.control->slots[i].serial != serial);
    lorasync_close(b);
}

static void sessions_share(void)
{
    lorasync_transport t;
    lorasync_session  *a, *b, *c;
    lorasync_engine   *e;
    lorasync_error     err;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    a = open_adapter_session("a"), b = open_adapter_session("b"), c = open_adapter_session("a");
    CHECK_EQ(lorasync_attach(a, &t, &err), 0);
    CHECK_EQ(lorasync_attach(b, &t, &err), 0);
    CHECK_EQ(lorasync_compile(a, &err), 0);
    CHECK_EQ(lorasync_compile(b, &err), 0);
    session_publishes(a, e, "a", 1, 4);
    session_publishes(b, e, "b", 1, 4);
    CHECK_EQ(lorasync_attach(c, &t, &err), LORASYNC_E_BUSY); /* two of one adapter would gather into one slot */
    CHECK_HAS(err.text, "another session publishes adapter 'a'");
    lorasync_close(c);
    session_publishes(a, e, "a", 5, 6);
    CHECK_EQ(lorasync_begin(b, 5, &err), 0);
    lorasync_close(a);
    CHECK_EQ(lorasync_wait(b, NULL, &err), 0);
    session_publishes(b, e, "b", 6, 9);
    c = open_adapter_session("a"); /* and another takes a's place */
    CHECK_EQ(lorasync_attach(c, &t, &err), 0);
    CHECK_EQ(lorasync_compile(c, &err), 0);
    session_publishes(c, e, "a", 7, 9);
    lorasync_close(b);
    session_publishes(c, e, "a", 10, 12);
    CHECK_EQ(session_served(e, "b"), 9);
    lorasync_close(c); /* the last one: the place is free */
    t = open_transport();
    t.close(t.user);
    lorasync_engine_close(e);
}

static void fork_engine(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    pid_t              child;
    fresh_name();
    t = open_transport();
    e = open_engine(NULL, 0);
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        int bad = served(e, "default") != 1;
        bad |= (lorasync_engine_poll(e, 0, &err) != LORASYNC_E_STATE) * 2;
        lorasync_engine_close(e); /* the parent's pin stays */
        _exit(bad);
    }
    CHECK_EQ(wait_for(child), 0);
    CHECK(inside(&t)->map.control->readers[0].owner != 0);
    lorasynci_shm_bury(inside(&t));
    CHECK(inside(&t)->map.control->readers[0].owner != 0);
    CHECK_EQ(inside(&t)->map.control->readers[0].pins[0], 1);
    lorasync_engine_close(e);
    CHECK(inside(&t)->map.control->readers[0].owner == 0);
    t.close(t.user);
}

/* A child with an engine that has polled; it waits to be killed. */
static pid_t start_reader(void)
{
    int   ready[2];
    char  c;
    pid_t child;
    if (pipe(ready) != 0) exit(1);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        lorasync_engine *e = open_engine(NULL, 0);
        if (lorasync_engine_poll(e, 5000, NULL) != 0 || !lorasync_acquire(e, "default") || write(ready[1], "x", 1) != 1)
            _exit(1);
        for (;;) pause();
    }
    close(ready[1]);
    CHECK_EQ(read(ready[0], &c, 1), 1);
    close(ready[0]);
    return child;
}

static void dead_reader(void)
{
    lorasync_transport    t;
    lorasync_error        err;
    lorasynci_shm_reader *r;
    pid_t                 child;
    uint64_t              owner;
    int                   fd;
    fresh_name();
    t  = open_transport();
    r  = &inside(&t)->map.control->readers[0];
    fd = inside(&t)->map.fd;
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    child = start_reader();
    owner = r->owner;
    CHECK_EQ(lorasynci_process_pid(owner), child);
    CHECK_EQ(r->pins[0], 1);
    CHECK_EQ(lorasynci_process_lives(owner, fd, 0), 1);
    CHECK_EQ(lorasynci_shm_reader_lives(inside(&t), 0, owner), 1);
    CHECK_EQ(publish(&t, "default", 2, &err), 0);
    CHECK_EQ(publish(&t, "default", 3, &err), 0);
    CHECK_EQ(publish(&t, "default", 4, &err), 0);
    CHECK_EQ(lorasynci_shm_head_of(inside(&t), 0)->version, 1); /* still pinned */
    kill(child, SIGKILL);
    nap(50000); /* a zombie from here */
    CHECK_EQ(lorasynci_process_lives(owner, fd, 0), 0);
    CHECK_EQ(lorasynci_process_lives(owner | lorasynci_process_unlocked, fd, 0), 1);
    lorasynci_shm_bury(inside(&t));
    CHECK(r->owner == 0);
    CHECK_EQ(lorasynci_shm_is_used(inside(&t), 0), 0);
    wait_for(child);
    t.close(t.user);
}

/* Every engine that is killed leaves a record and a pin; the records are used again, and slots do not pile up. */
static void many_dead_readers(void)
{
    lorasync_transport t;
    lorasync_error     err;
    pid_t              child[20];
    int                i;
    uint64_t           v;
    fresh_name();
    t = open_transport();
    for (v = 1; v <= 20; v++) {
        CHECK_EQ(publish(&t, "default", v, &err), 0);
        child[v - 1] = start_reader();
    }
    CHECK(count_slots() == -1 || count_slots() >= 20);
    for (i = 0; i < 20; i++) kill(child[i], SIGKILL);
    for (i = 0; i < 20; i++) wait_for(child[i]);
    for (; v <= 23; v++) CHECK_EQ(publish(&t, "default", v, &err), 0);
    CHECK(count_slots() <= 24);
    CHECK_EQ(publish_as(&t, "default", v, 0, 100000, &err), 0); /* another size: looks for the dead */
    CHECK_EQ(publish_as(&t, "default", v + 1, 0, 100000, &err), 0);
    CHECK_EQ(publish_as(&t, "default", v + 2, 0, 100000, &err), 0);
    CHECK(count_slots() <= 3);
    t.close(t.user);
}

static void all_readers_taken(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    int                i;
    fresh_name();
    t = open_transport();
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    for (i = 0; i < LORASYNCI_SHM_READERS; i++)
        inside(&t)->map.control->readers[i].owner = inside(&t)->own.mine | lorasynci_process_unlocked;
    e = open_engine(NULL, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_BUSY);
    CHECK_HAS(err.text, "256 engines");
    inside(&t)->map.control->readers[100].owner   = (uint64_t)0xfffff0 << 40; /* a dead one */
    inside(&t)->map.control->readers[100].pins[3] = 5;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, "default"), 1);
    CHECK_EQ(inside(&t)->map.control->readers[100].pins[3], 0);
    CHECK_EQ(inside(&t)->map.control->readers[100].pins[0], 1);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* -- one segment, 64 engine processes */

static void many_engines(void)
{
    enum {
        ENGINES = 64
    };
    lorasync_transport t;
    lorasync_error     err;
    pid_t              child[ENGINES];
    int                go[2], done[2], i, bad = 0;
    char               c;
    fresh_name();
    t = open_transport();
    CHECK_EQ(publish(&t, "default", 1, &err), 0);
    REQUIRE(pipe(go) == 0 && pipe(done) == 0);
    fflush(NULL);
    for (i = 0; i < ENGINES; i++) {
        child[i] = fork();
        if (child[i] == 0) {
            lorasync_engine *e = open_engine("default", 0);
            if (lorasync_engine_poll(e, 10000, NULL) != 0 || served(e, "default") != 1 || write(done[1], "x", 1) != 1)
                _exit(1);
            if (read(go[0], &c, 1) != 1) _exit(2);
            if (lorasync_engine_poll(e, 10000, NULL) != 0 || served(e, "default") != 2) _exit(3);
            lorasync_engine_close(e);
            _exit(test_errors != 0);
        }
    }
    for (i = 0; i < ENGINES; i++) CHECK_EQ(read(done[0], &c, 1), 1);
    CHECK(count_slots() <= 1); /* one image for all of them */
    CHECK_EQ(publish(&t, "default", 2, &err), 0);
    CHECK(count_slots() <= 2);
    for (i = 0; i < ENGINES; i++) CHECK_EQ(write(go[1], "x", 1), 1);
    for (i = 0; i < ENGINES; i++) bad += wait_for(child[i]) != 0;
    CHECK_EQ(bad, 0);
    for (i = 0; i < LORASYNCI_SHM_READERS; i++) CHECK(inside(&t)->map.control->readers[i].owner == 0);
    close(go[0]), close(go[1]), close(done[0]), close(done[1]);
    t.close(t.user);
}

/* -- killed at any point */

typedef struct arena {
    uint64_t started, committed; /* versions. started goes up before stage, committed after commit */
    uint64_t publishes, reads;
    int32_t  broken;
    char     why[200];
} arena;

static void report(arena *shared, const char *why, long long a, long long b, const char *text)
{
    if (__atomic_fetch_add(&shared->broken, 1, __ATOMIC_SEQ_CST) == 0)
        snprintf(shared->why, sizeof shared->why, "%.40s: %lld, %lld %.100s", why, a, b, text);
}

static void run_publisher(arena *shared)
{
    lorasync_transport t;
    lorasync_error     err;
    lorasync_status    status;
    lorasync_image    *image   = lay_out("default", 1024);
    void              *payload = malloc(image->payload_bytes);
    uint64_t           until   = test_now_ns() + (uint64_t)test_no_hang_ns() / 2;
    err.text[0]                = 0;
    while ((status = try_transport(&t, &err)) == LORASYNC_E_BUSY && test_now_ns() < until)
        nap(100); /* the killed one is not dead yet */
    if (status < 0) report(shared, "open", status, 0, err.text);
    while (status >= 0) {
        uint64_t v = __atomic_add_fetch(&shared->started, 1, __ATOMIC_SEQ_CST);
        set_version(image, payload, v, 0);
        status = put(&t, image, &err);
        if (status < 0) report(shared, "publish", status, (long long)v, err.text);
        else
            __atomic_store_n(&shared->committed, v, __ATOMIC_SEQ_CST),
                __atomic_add_fetch(&shared->publishes, 1, __ATOMIC_SEQ_CST);
        if (v % 16 == 0) nap(200); /* with two cores: let the others in */
    }
    _exit(1);
}

static void run_reader(arena *shared, unsigned long long random)
{
    lorasync_engine        *e = open_engine("default", 1); /* unverified: the test itself looks at every byte */
    const lorasync_adapter *held[6];
    lorasync_error          err;
    uint64_t                last = 0;
    memset(held, 0, sizeof held);
    for (;;) {
        uint64_t                before = __atomic_load_n(&shared->committed, __ATOMIC_SEQ_CST);
        lorasync_status         status = lorasync_engine_poll(e, 0, &err);
        const lorasync_adapter *a      = lorasync_acquire(e, "default");
        size_t                  k      = test_random(&random) % COUNT(held);
        if (status < 0) report(shared, "poll", status, 0, err.text);
        if (before && !a) report(shared, "nothing served", (long long)before, 0, "");
        if (!a) continue;
        if (a->version < before || a->version < last)
            report(shared, "version went back", (long long)a->version, (long long)(before > last ? before : last), "");
        if (a->version > __atomic_load_n(&shared->started, __ATOMIC_SEQ_CST))
            report(shared, "version from nowhere", (long long)a->version, 0, "");
        last = a->version;
        if (wrong_words(a, 0) != 0) report(shared, "mixed version", (long long)a->version, wrong_words(a, 0), "");
        if (held[k] && wrong_words(held[k], 0) != 0)
            report(shared, "held version changed", (long long)held[k]->version, (long long)a->version, "");
        lorasync_release(held[k]);
        held[k] = a;
        __atomic_add_fetch(&shared->reads, 1, __ATOMIC_SEQ_CST);
    }
}

static pid_t start(arena *shared, int is_publisher, unsigned long long random)
{
    pid_t child;
    fflush(NULL);
    child = fork();
    if (child) return child;
    if (is_publisher) run_publisher(shared);
    else run_reader(shared, random);
    _exit(1);
}

static void killed_publisher(void)
{
    enum {
        READERS = 3
    };
    const char *given  = getenv("LORASYNC_TEST_ROUNDS");
    int         rounds = given ? atoi(given) : ROUNDS, round, i;
    arena      *shared = (arena *)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t       who[1 + READERS];
    unsigned long long random = 11;
    uint64_t           last   = 0;
    REQUIRE(shared != (arena *)MAP_FAILED);
    fresh_name();
    for (i = 0; i <= READERS; i++) who[i] = start(shared, i == 0, test_random(&random));
    for (round = 0; round < rounds && !shared->broken; round++) {
        uint64_t until = test_now_ns() + (uint64_t)test_no_hang_ns() * 2;
        pid_t    old;
        nap((long)(test_random(&random) % 6000));
        i   = test_random(&random) % 2 ? 0 : 1 + (int)(test_random(&random) % READERS);
        old = who[i];
        kill(old, SIGKILL);
        if (test_random(&random) % 2) { /* otherwise it stays a zombie until its successor works */
            wait_for(old);
            old = 0;
        }
        who[i] = start(shared, i == 0, test_random(&random));
        last   = __atomic_load_n(&shared->publishes, __ATOMIC_SEQ_CST);
        while (i == 0 && __atomic_load_n(&shared->publishes, __ATOMIC_SEQ_CST) == last && !shared->broken &&
               test_now_ns() < until)
            nap(200);
        CHECK(i != 0 || shared->broken || shared->publishes > last);
        if (old) wait_for(old);
    }
    for (i = 0; i <= READERS; i++) kill(who[i], SIGKILL);
    for (i = 0; i <= READERS; i++) wait_for(who[i]);
    if (shared->broken) printf("     %d times; the first: %s\n", (int)shared->broken, shared->why);
    CHECK_EQ(shared->broken, 0);
    CHECK(shared->reads > 0);
    printf("     %d kills, %llu versions, %llu reads, %d slots at the end\n", round,
           (unsigned long long)shared->publishes, (unsigned long long)shared->reads, count_slots());
    CHECK(count_slots() <= 64);
    munmap(shared, sizeof *shared);
    drop_name();
}

/* -- threads */

typedef struct crowd {
    lorasync_engine *e;
    int              stop, wrong;
    long             reads;
} crowd;

static void *run_thread(void *user)
{
    crowd   *c    = (crowd *)user;
    uint64_t last = 0;
    while (!__atomic_load_n(&c->stop, __ATOMIC_SEQ_CST)) {
        const lorasync_adapter *a = lorasync_acquire(c->e, "default");
        if (!a) continue;
        if (a->version < last || wrong_words(a, 0) != 0) __atomic_store_n(&c->wrong, 1, __ATOMIC_SEQ_CST);
        last = a->version;
        lorasync_release(a);
        __atomic_add_fetch(&c->reads, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

static void many_threads(void)
{
    lorasync_transport t;
    lorasync_error     err;
    pthread_t          threads[3];
    crowd              c;
    uint64_t           v;
    size_t             i;
    fresh_name();
    memset(&c, 0, sizeof c);
    t   = open_transport();
    c.e = open_engine("default", 0);
    for (i = 0; i < COUNT(threads); i++) CHECK_EQ(pthread_create(&threads[i], NULL, run_thread, &c), 0);
    for (v = 1; v <= 300; v++) {
        lorasync_status status;
        CHECK_EQ(publish(&t, "default", v, &err), 0);
        status = lorasync_engine_poll(c.e, 0, &err);
        CHECK(status == 0 || status == LORASYNC_E_BUSY);
    }
    while (__atomic_load_n(&c.reads, __ATOMIC_SEQ_CST) < 100) nap(1000);
    __atomic_store_n(&c.stop, 1, __ATOMIC_SEQ_CST);
    for (i = 0; i < COUNT(threads); i++) pthread_join(threads[i], NULL);
    CHECK_EQ(c.wrong, 0);
    lorasync_engine_close(c.e);
    t.close(t.user);
}

static void poll_waits(void)
{
    lorasync_engine *e;
    lorasync_error   err;
    pid_t            child;
    fresh_name();
    e = open_engine("default", 0);
    CHECK_EQ(lorasync_engine_poll(e, 20, &err), LORASYNC_NOTHING_NEW);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        lorasync_transport t;
        nap(20000);
        t = open_transport();
        if (publish(&t, "default", 1, &err) != 0) _exit(1);
        t.close(t.user);
        lorasync_engine_close(e);
        _exit(0);
    }
    CHECK_EQ(lorasync_engine_poll(e, 10000, &err), 0);
    CHECK_EQ(served(e, "default"), 1);
    CHECK_EQ(wait_for(child), 0);
    lorasync_engine_close(e);
}

/* -- memory */

static void memory_fails(void)
{
    lorasync_shm_desc    desc;
    lorasync_engine_desc ed;
    lorasync_transport   t;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    lorasync_allocator   a;
    test_memory          m;
    long                 n, before;
    uint64_t             v;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    memset(&ed, 0, sizeof ed);
    memset(&m, 0, sizeof m);
    a.alloc   = test_memory_alloc;
    a.free    = test_memory_free;
    a.user    = &m;
    desc.name = ed.shm = name;
    desc.allocator = ed.allocator = &a;
    ed.adapter                    = "default";
    m.fail_at                     = 1;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), LORASYNC_E_MEMORY);
    m.fail_at = 0;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), 0);
    before = m.total;
    CHECK_EQ(before, 1);
    for (v = 1; v < 8; v++) CHECK_EQ(publish_as(&t, "default", v, 0, 64 * (size_t)v, &err), 0);
    CHECK_EQ(m.total, before); /* nothing is allocated after open */
    for (n = 1;; n++) {
        m.fail_at = n;
        if (lorasync_engine_open(&ed, &e, &err) == 0) break;
        CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        CHECK_EQ(m.live, 1);
    }
    CHECK_EQ(n, 5);
    for (v = 10; v <= 11; v++) {
        CHECK_EQ(publish(&t, "default", v, &err), 0);
        for (n = 1; n < 10000; n++) {
            m.fail_at = n;
            if (lorasync_engine_poll(e, 0, &err) == 0) break;
            CHECK_EQ(err.status, LORASYNC_E_MEMORY);
            m.fail_at = 0;
            CHECK_EQ(served(e, "default"), v == 10 ? 0 : v - 1);
        }
        m.fail_at = 0;
        CHECK(n > 4 && n < 10000);
        CHECK_EQ(served(e, "default"), v);
    }
    /* one pin is left */
    CHECK_EQ(inside(&t)->map.control->readers[0].pins[0] & (inside(&t)->map.control->readers[0].pins[0] - 1), 0);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(m.live, 0);
}

/* A rank that was left behind writes into the slot that it was lent, when there is a new transport already. */
static void left_behind(void)
{
    lorasync_loan      loan;
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_image    *image;
    lorasync_error     err;
    size_t             num_bytes = 0;
    char              *map;
    uint64_t           v;
    int                fd;
    fresh_name();
    e     = open_engine("default", 0);
    t     = open_transport();
    image = make_image("default", 1, 0, 64);
    CHECK_EQ(put(&t, image, &err), 0);
    CHECK_EQ(lend(&t, image, &loan, &err), 0);
    fd        = shm_open(loan.name, O_RDWR, 0);
    num_bytes = (size_t)loan.offset + image->payload_bytes;
    map       = (char *)mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(map != (char *)MAP_FAILED);
    close(fd);
    t.close(t.user);
    t = open_transport();
    for (v = 2; v <= 5; v++) {
        drop_image(image);
        image = make_image("default", v, 0, 64);
        CHECK_EQ(put(&t, image, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        memset(map, 0xee, num_bytes);
        CHECK_EQ(served(e, "default"), v);
    }
    munmap(map, num_bytes);
    drop_image(image);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* Each version's config is held against its tensors, also when only one of both is new. */
static void config_of_each_version(void)
{
    static const char  other[] = "{\"peft_type\":\"LORA\",\"r\":5,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}";
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v;
    fresh_name();
    t = open_transport();
    e = open_engine("default", 0);
    for (v = 1; v <= 8; v++) {
        lorasync_image *image = v == 4 || v == 7 ? lay_out_rank("default", 64, 5) : lay_out("default", 64);
        int             good  = v != 3 && v != 4; /* 3: another config; 4: other tensors; 7: both */
        set_version(image, malloc(image->payload_bytes), v, 0);
        if (v == 3 || v == 7) image->config_json = other;
        CHECK_EQ(put(&t, image, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), good ? LORASYNC_OK : LORASYNC_E_CONFIG);
        if (v != 7) CHECK_EQ(served(e, "default"), good ? v : 2);
        drop_image(image);
    }
    lorasync_engine_close(e);
    t.close(t.user);
}

/* A receipt is for one commit: when its slot holds another version, it is for none. */
static void receipts_of_other_commits(void)
{
    lorasync_transport     t;
    lorasync_engine       *e;
    lorasync_receipt       r;
    lorasync_error         err;
    lorasync_image        *image;
    lorasynci_shm_control *c;
    uint64_t               said;
    fresh_name();
    t     = open_transport();
    e     = open_shm_engine(name, NULL, 0, 0);
    image = make_image("a", 1, 0, 16);
    CHECK_EQ(put(&t, image, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    c    = ((lorasynci_shm *)t.user)->map.control;
    said = c->readers[0].receipts[0];
    memset(&r, 0, sizeof r);
    CHECK_EQ(t.receipts(t.user, "a", 0, &r, &err), 0);
    CHECK(r.version == 1 && r.digest == image->digest && r.num_bound == -1);
    c->readers[0].receipts[0] = said ^ (uint64_t)1 << LORASYNCI_SHM_SLOT_BITS; /* an earlier one of the same slot */
    memset(&r, 0, sizeof r);
    CHECK_EQ(t.receipts(t.user, "a", 0, &r, &err), 0);
    CHECK_EQ(r.version, 0);
    c->readers[0].receipts[0] = said | (uint64_t)0xffff; /* a slot that there is not */
    CHECK_EQ(t.receipts(t.user, "a", 0, &r, &err), 0);
    CHECK_EQ(r.version, 0);
    c->readers[0].receipts[0] = said;
    c->readers[0].who         = 0; /* it is being taken by another engine */
    CHECK_EQ(t.receipts(t.user, "a", 0, &r, &err), LORASYNC_NOTHING_NEW);
    lorasync_engine_close(e);
    t.close(t.user);
    drop_image(image);
}

int main(void)
{
    RUN(publishing);
    RUN(aborted_stage);
    RUN(config_of_each_version);
    RUN(left_behind);
    RUN(versions);
    RUN(two_adapters);
    RUN(growth);
    RUN(stays_mapped);
    RUN(cut_while_mapped);
    RUN(replaced_before_pin);
    RUN(sizes);
    RUN(all_slots_taken);
    RUN(direct);
    RUN(taken_back);
    RUN(bad_names);
    RUN(bad_arguments);
    RUN(no_cuda);
    RUN(bad_control);
    RUN(stranger);
    RUN(damage);
    RUN(overwritten_control);
    RUN(names_of_segments);
    RUN(removed_by_hand);
    RUN(full);
    RUN(one_publisher);
    RUN(sessions_share);
    RUN(lent_slot_goes);
    RUN(fork_engine);
    RUN(dead_reader);
    RUN(many_dead_readers);
    RUN(all_readers_taken);
    RUN(many_engines);
    RUN(poll_waits);
    RUN(killed_publisher);
    RUN(many_threads);
    RUN(memory_fails);
    RUN(receipts_of_other_commits);
    drop_name();
    return test_summary("test_shm");
}
