/* Tests of places that hold many adapters, and of adapters that come and go. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#endif
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

/* Each change that others can see is a step; a child may be killed at any of them. */
static int steps_left; /* 0: never */

static int count_step(void)
{
    if (steps_left > 0 && --steps_left == 0) kill(getpid(), SIGKILL);
    return 0;
}

#define unlinkat(...) (count_step(), unlinkat(__VA_ARGS__))
#define renameat(...) (count_step(), renameat(__VA_ARGS__))
#define shm_unlink(...) (count_step(), shm_unlink(__VA_ARGS__))
#define fsync(...) (count_step(), fsync(__VA_ARGS__))
#define write(...) (count_step(), write(__VA_ARGS__))
#define __atomic_store_n(...) (count_step(), __atomic_store_n(__VA_ARGS__))
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "pieces.h"
#include "published.h"
#include "ranks.h"

/* -- a name of its own for each test */

static char name[64];

static char directory[100];

static void drop_name(void)
{
    char command[200];
    if (name[0]) lorasync_shm_remove(name, NULL);
    snprintf(command, sizeof command, "rm -rf '%.90s'", directory);
    if (directory[0] && system(command) != 0) test_fail(__FILE__, __LINE__, command);
}

static void fresh_name(void)
{
    static int number;
    drop_name();
    snprintf(name, sizeof name, "tenants-%ld-%d", (long)getpid(), number++);
    snprintf(directory, sizeof directory, "/tmp/%.60s", name);
    lorasync_shm_remove(name, NULL);
}

/* -- shorthands */

static lorasync_transport open_shm(void)
{
    lorasync_transport t;
    lorasync_shm_desc  desc;
    lorasync_error     err;
    memset(&desc, 0, sizeof desc);
    memset(&err, 0, sizeof err);
    desc.name = name;
    CHECK_EQ(lorasync_shm_open(&desc, &t, &err), 0);
    if (err.text[0]) fprintf(stderr, "lorasync_shm_open: %s\n", err.text);
    return t;
}

static lorasync_transport open_directory(void)
{
    lorasync_transport      t;
    lorasync_directory_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.directory = directory;
    CHECK_EQ(lorasync_directory_open(&desc, &t, NULL), 0);
    return t;
}

/* One of the two built-in places; most tests are about both. */
static int in_directory;

static lorasync_transport open_place(void) { return in_directory ? open_directory() : open_shm(); }

static lorasync_engine *open_engine(void)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    memset(&desc, 0, sizeof desc);
    if (in_directory) desc.directory = directory;
    else desc.shm = name;
    desc.name = "first";
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    return e;
}

/* Every byte follows from adapter and version. */
static float element(const char *adapter, uint64_t version)
{
    return (float)(lorasynci_hash(adapter, strlen(adapter), version) % 100000);
}

static lorasync_status publish(lorasync_transport *t, const char *adapter, uint64_t version, lorasync_error *err)
{
    lorasync_image *image = lay_out_rank(adapter, 16, 4);
    float          *p     = (float *)malloc(image->payload_bytes);
    lorasync_status status;
    size_t          i;
    for (i = 0; i < image->payload_bytes / sizeof *p; i++) p[i] = element(adapter, version) + (float)i;
    lorasync_image_bind(image, p);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    status = put(t, image, err);
    drop_image(image);
    return status;
}

/* The version that is served, its bytes looked at; 0: none. */
static uint64_t served(lorasync_engine *e, const char *adapter)
{
    const lorasync_adapter *a = lorasync_acquire(e, adapter);
    const float            *p = a ? (const float *)a->image->payload : NULL;
    uint64_t                v = a ? a->version : 0;
    size_t                  i;
    for (i = 0; a && i < a->image->payload_bytes / sizeof *p; i++)
        if (p[i] != element(adapter, v) + (float)i) CHECK_EQ(i, -1);
    lorasync_release(a);
    return v;
}

static lorasync_status withdraw(const lorasync_transport *t, const char *adapter, lorasync_withdrawal *out,
                                lorasync_error *err)
{
    memset(err, 0, sizeof *err);
    return lorasync_transport_withdraw(t, adapter, 0, out, err);
}

/* The change that is told next, as "b 2->0"; "" when all is told. */
static const char *change(lorasync_engine *e)
{
    static char     text[100];
    lorasync_change c;
    text[0] = 0;
    if (lorasync_engine_next_change(e, &c) != LORASYNC_OK) return text;
    snprintf(text, sizeof text, "%s %d->%d", c.adapter, (int)c.old_version, (int)c.version);
    return text;
}

/* How many entries of a directory begin like this. */
static int count_entries(const char *where, const char *prefix)
{
    DIR           *list = opendir(where);
    struct dirent *entry;
    int            num = 0;
    if (!list) return -1;
    while ((entry = readdir(list)) != NULL)
        num += strncmp(entry->d_name, prefix, strlen(prefix)) == 0 && strcmp(entry->d_name, ".") != 0 &&
               strcmp(entry->d_name, "..") != 0;
    closedir(list);
    return num;
}

/* How many versions of an adapter take room. */
static int count_versions(const char *adapter)
{
    char path[200];
    snprintf(path, sizeof path, "%.90s/%s", in_directory ? directory : "/dev/shm", in_directory ? adapter : "");
    if (in_directory)
        return count_entries(path, "v") + count_entries(path, ".stage") + count_entries(path, ".old") +
               count_entries(path, ".withdrawn");
    snprintf(path, sizeof path, "lorasync-%s@", name);
    return count_entries("/dev/shm", path);
}

static int wait_for(pid_t child)
{
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static double ms_since(uint64_t start) { return (double)(lorasynci_now_ns() - start) / 1e6; }

/* -- many adapters */

static const char *numbered(int i)
{
    static char text[32];
    snprintf(text, sizeof text, "tenant-%d", i);
    return text;
}

static void a_thousand(void)
{
    enum {
        ADAPTERS = 1000
    };
    lorasync_transport     t;
    lorasync_engine       *e;
    lorasync_error         err;
    lorasynci_shm_control *c;
    struct stat            st;
    uint64_t               start = lorasynci_now_ns();
    double                 all, one;
    int                    i, bad = 0;
    fresh_name();
    t = open_shm();
    e = open_shm_engine(name, NULL, 0, 0);
    for (i = 0; i < ADAPTERS; i++) CHECK_EQ(publish(&t, numbered(i), 1 + (uint64_t)i, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    for (i = 0; i < ADAPTERS; i++) bad += served(e, numbered(i)) != 1 + (uint64_t)i;
    CHECK_EQ(bad, 0);
    all = ms_since(start);
    CHECK_EQ(publish(&t, numbered(777), 2000, &err), 0);
    start = lorasynci_now_ns();
    CHECK_EQ(publish(&t, numbered(777), 2001, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    one = ms_since(start);
    for (i = 0; i < ADAPTERS; i++) bad += served(e, numbered(i)) != (i == 777 ? 2001 : 1 + (uint64_t)i);
    CHECK_EQ(bad, 0);
    printf("     %d adapters published and served in %.0f ms, one more version of one in %.2f ms\n", ADAPTERS, all,
           one);
    c = ((lorasynci_shm *)t.user)->map.control;
    CHECK_EQ(c->num_adapters, ADAPTERS);
    CHECK_EQ(c->num_slots, ADAPTERS + 2);
    CHECK_EQ(c->num_readers, 1);
    CHECK_EQ(fstat(((lorasynci_shm *)t.user)->map.fd, &st), 0);
    CHECK_EQ((size_t)st.st_size, sizeof *c); /* and memory for what is used of it */
    CHECK((size_t)st.st_blocks * 512 < sizeof *c / 4);
    t.close(t.user);
    t = open_shm(); /* the next publisher knows all of them */
    CHECK_EQ(publish(&t, numbered(5), 5, &err), LORASYNC_E_VERSION);
    CHECK_EQ(publish(&t, numbered(5), 3000, &err), 0);
    CHECK_EQ(publish(&t, "another", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, numbered(5)), 3000);
    CHECK_EQ(served(e, "another"), 1);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* -- adapters that come and go */

/* The whole life of a tenant, with a reader that holds on to it. */
static void comes_and_goes(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    const lorasync_adapter *held;
    lorasync_withdrawal     w;
    lorasync_error          err;
    char                    expected[100];
    uint64_t                v;
    fresh_name();
    t = open_place();
    e = open_engine();
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, in_directory ? directory : name);
    for (v = 38; v <= 40; v++) {
        CHECK_EQ(publish(&t, "a", v, &err), 0);
        CHECK_EQ(publish(&t, "b", v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    }
    held = lorasync_acquire(e, "a");
    REQUIRE(held);

    /* withdrawn: not seen yet, then seen, then released */
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_BUSY);
    CHECK_EQ(w.num_holders, 1);
    CHECK_EQ(w.holders[0].pid, in_directory ? 0 : getpid());
    CHECK_EQ(w.holders[0].version, 40);
    CHECK_TEXT(w.holders[0].engine, "first");
    if (in_directory) snprintf(expected, sizeof expected, "engine 'first' holds v40");
    else snprintf(expected, sizeof expected, "engine 'first' (process %ld) holds v40", (long)getpid());
    CHECK_HAS(err.text, expected);
    CHECK_HAS(err.text, "'a' is withdrawn");
    CHECK_EQ(served(e, "a"), 40);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK(lorasync_acquire(e, "a") == NULL);
    CHECK_EQ(served(e, "b"), 40);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(held->version, 40);
    CHECK_EQ(lorasync_image_verify(held->image, &err), 0); /* its bytes are there until it is released */
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_BUSY);
    if (!in_directory) CHECK_EQ(count_versions("a"), 3); /* two of b */
    lorasync_release(held);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_OK);
    CHECK_EQ(w.num_holders, 0);
    CHECK_EQ(count_versions("a"), in_directory ? 0 : 2);

    /* and back again, with a version of its own */
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 1);
    CHECK_EQ(publish(&t, "a", 2, &err), 0);
    CHECK_EQ(publish(&t, "b", 41, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 2);
    CHECK_EQ(served(e, "b"), 41);
    CHECK_EQ(publish(&t, "a", 1, &err), LORASYNC_E_VERSION);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* An engine that looks seldom: all of it is over when it looks. */
static void missed(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    fresh_name();
    t = open_place();
    e = open_engine();
    CHECK_EQ(publish(&t, "a", 40, &err), 0);
    CHECK_EQ(publish(&t, "b", 7, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK(change(e)[0] && change(e)[0]);
    CHECK_TEXT(change(e), "");
    withdraw(&t, "a", NULL, &err);
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 1);
    CHECK_TEXT(change(e), "a 40->1");
    withdraw(&t, "a", NULL, &err);
    CHECK_EQ(publish(&t, "a", 1, &err), 0); /* the same number for something else */
    withdraw(&t, "b", NULL, &err);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 1);
    CHECK_EQ(served(e, "b"), 0);
    CHECK(strcmp(change(e), "a 1->1") == 0 || strcmp(change(e), "a 1->1") == 0);
    lorasync_engine_close(e);
    e = open_engine(); /* one that knows nothing of the past */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_list(e, NULL, 0), 1);
    CHECK_TEXT(change(e), "a 0->1");
    CHECK_TEXT(change(e), "");
    lorasync_engine_close(e);
    t.close(t.user);
}

/* What is not there, or cannot be seen, was not withdrawn. */
static void not_seen(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    char               path[200], away[200];
    fresh_name();
    in_directory = 1;
    t            = open_place();
    e            = open_engine();
    CHECK_EQ(publish(&t, "a", 3, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    snprintf(path, sizeof path, "%.90s/a/latest", directory);
    CHECK_EQ(unlink(path), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 3);
    snprintf(path, sizeof path, "%.90s/a", directory);
    snprintf(away, sizeof away, "%.90s/.a", directory);
    CHECK_EQ(rename(path, away), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 3);
    CHECK_EQ(rename(away, path), 0);
    CHECK_EQ(publish(&t, "a", 4, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 4);
    snprintf(path, sizeof path, "%.90s/a/withdrawn", directory); /* empty: a publisher never leaves it so */
    CHECK_EQ(close(open(path, O_CREAT | O_WRONLY, 0600)), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 4);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* Ten times as many names as places are used at once. */
static void places_are_used_again(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    const lorasync_adapter *held;
    lorasync_error          err;
    int                     i;
    fresh_name();
    t = open_shm();
    e = open_shm_engine(name, NULL, 0, 0);
    for (i = 0; i < 100; i++) {
        CHECK_EQ(publish(&t, numbered(i), 1, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, numbered(i)), 1);
        if (i < 10) continue;
        withdraw(&t, numbered(i - 10), NULL, &err);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, numbered(i - 10)), 0);
        CHECK_EQ(withdraw(&t, numbered(i - 10), NULL, &err), LORASYNC_OK);
    }
    CHECK_EQ(((lorasynci_shm *)t.user)->map.control->num_adapters, 11);
    CHECK_EQ(((lorasynci_shm *)t.user)->map.control->num_slots, 11);
    CHECK_EQ(count_versions(""), 10);
    held = lorasync_acquire(e, numbered(95));
    CHECK_EQ(withdraw(&t, numbered(95), NULL, &err), LORASYNC_E_BUSY);
    for (i = 200; i < 203; i++) CHECK_EQ(publish(&t, numbered(i), 1, &err), 0);
    CHECK_EQ(((lorasynci_shm *)t.user)->map.control->num_adapters, 13); /* one was vacant, one is still held */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    lorasync_release(held);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(withdraw(&t, numbered(95), NULL, &err), LORASYNC_OK);
    CHECK_EQ(publish(&t, numbered(95), 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    for (i = 90; i < 100; i++) CHECK_EQ(served(e, numbered(i)), 1);
    CHECK_EQ(lorasync_engine_list(e, NULL, 0), 103);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* An engine that holds it and is killed holds nothing. */
static void dead_holder(void)
{
    lorasync_transport  t;
    lorasync_withdrawal w;
    lorasync_error      err;
    pid_t               child;
    int                 ready[2];
    char                c;
    fresh_name();
    t = open_shm();
    CHECK_EQ(publish(&t, "a", 5, &err), 0);
    REQUIRE(pipe(ready) == 0);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        lorasync_engine *e = open_shm_engine(name, NULL, 0, 0);
        if (lorasync_engine_poll(e, 5000, NULL) != 0 || !lorasync_acquire(e, "a") || write(ready[1], "x", 1) != 1)
            _exit(1);
        for (;;) pause();
    }
    CHECK_EQ(read(ready[0], &c, 1), 1);
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_BUSY);
    CHECK_EQ(w.holders[0].pid, child);
    kill(child, SIGKILL);
    CHECK_EQ(lorasync_transport_withdraw(&t, "a", 5000, &w, &err), LORASYNC_OK);
    CHECK_EQ(count_versions(""), 0);
    wait_for(child);
    close(ready[0]), close(ready[1]);
    t.close(t.user);
}

/* -- killed at every step of a withdrawal */

static void killed(void)
{
    int k, done = 0;
    for (k = 1; k < 200 && !done; k++) {
        lorasync_transport t;
        lorasync_engine   *e, *late;
        lorasync_error     err;
        pid_t              child;
        uint64_t           v;
        fresh_name();
        e     = open_engine();
        child = fork();
        if (child == 0) {
            t = open_place();
            for (v = 3; v <= 5; v++)
                if (publish(&t, "a", v, &err) != 0) _exit(1);
            steps_left = k;
            withdraw(&t, "a", NULL, &err);
            steps_left = 0;
            _exit(7);
        }
        done = wait_for(child) == 7;
        memset(&err, 0, sizeof err);
        CHECK(lorasync_engine_poll(e, 0, &err) >= 0); /* it is there, whole, or not */
        CHECK_TEXT(err.text, "");
        CHECK(served(e, "a") == 5 || served(e, "a") == 0);
        if (done) CHECK_EQ(served(e, "a"), 0);
        t = open_place();
        CHECK(withdraw(&t, "a", NULL, &err) >= 0 || err.status == LORASYNC_E_BUSY);
        CHECK(lorasync_engine_poll(e, 0, &err) >= 0);
        CHECK_EQ(served(e, "a"), 0);
        CHECK_EQ(withdraw(&t, "a", NULL, &err), LORASYNC_OK);
        CHECK_EQ(count_versions("a"), 0);
        CHECK_EQ(publish(&t, "a", 1, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        CHECK_EQ(served(e, "a"), 1);
        lorasync_engine_close(e);
        late = open_engine();
        CHECK_EQ(lorasync_engine_poll(late, 0, &err), LORASYNC_OK);
        CHECK_EQ(served(late, "a"), 1);
        lorasync_engine_close(late);
        t.close(t.user);
    }
    CHECK(done && k > (in_directory ? 12 : 4));
    printf("     %d steps\n", k - 2);
}

/* The same, and the next publisher does not withdraw but publishes: the leftovers go. */
static void killed_and_published(void)
{
    int k, done = 0;
    for (k = 1; k < 200 && !done; k++) {
        lorasync_transport t;
        lorasync_engine   *e;
        lorasync_error     err;
        pid_t              child;
        int                gone;
        fresh_name();
        child = fork();
        if (child == 0) {
            t = open_place();
            if (publish(&t, "a", 4, &err) != 0 || publish(&t, "a", 5, &err) != 0) _exit(1);
            steps_left = k;
            withdraw(&t, "a", NULL, &err);
            steps_left = 0;
            _exit(7);
        }
        done = wait_for(child) == 7;
        e    = open_engine();
        CHECK(lorasync_engine_poll(e, 0, &err) >= 0);
        gone = served(e, "a") == 0;
        t    = open_place();
        CHECK_EQ(publish(&t, "a", gone ? 1 : 6, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
        CHECK_EQ(served(e, "a"), gone ? 1 : 6);
        if (gone) CHECK_EQ(count_versions("a"), 1);
        lorasync_engine_close(e);
        t.close(t.user);
    }
    CHECK(done && k > (in_directory ? 12 : 4));
}

/* -- an engine that drops */

static void drops(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    const lorasync_adapter *held;
    lorasync_error          err;
    lorasync_listed         list[4];
    int                     i;
    fresh_name();
    t = open_place();
    e = open_engine();
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), LORASYNC_E_NOT_FOUND);
    CHECK_EQ(publish(&t, "a", 5, &err), 0);
    CHECK_EQ(publish(&t, "b", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    held = lorasync_acquire(e, "a");
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), LORASYNC_E_NOT_FOUND);
    CHECK_HAS(err.text, "'a'");
    CHECK(lorasync_acquire(e, "a") == NULL);
    CHECK_EQ(held->version, 5);
    CHECK_EQ(lorasync_image_verify(held->image, &err), 0);
    lorasync_release(held);
    for (i = 0; i < 3; i++) CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 0);
    CHECK_EQ(served(e, "b"), 1);
    CHECK_EQ(lorasync_engine_list(e, list, 4), 2);
    CHECK_EQ(list[0].version + list[1].version, 1);
    if (!in_directory) CHECK_EQ(withdraw(&t, "a", NULL, &err), LORASYNC_OK); /* it holds nothing of it */
    else CHECK_EQ(publish(&t, "a", 5, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(publish(&t, "a", in_directory ? 6 : 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), in_directory ? 6 : 1);
    CHECK_EQ(publish(&t, "a", 9, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), LORASYNC_OK);
    CHECK_EQ(publish(&t, "a", 10, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 10);
    CHECK_EQ(lorasync_engine_drop(NULL, "a", &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_engine_drop(e, NULL, &err), LORASYNC_E_ARGUMENT);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* -- lists and changes */

static void changes(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_listed    list[3];
    lorasync_error     err;
    size_t             i;
    fresh_name();
    t = open_place();
    e = open_engine();
    CHECK_EQ(lorasync_engine_list(e, list, 3), 0);
    CHECK_EQ(lorasync_engine_list(NULL, list, 3), 0);
    CHECK_TEXT(change(e), "");
    CHECK_EQ(publish(&t, "a", 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(publish(&t, "b", 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(publish(&t, "a", 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(publish(&t, "a", 3, &err), 0);
    CHECK_EQ(publish(&t, "c", 3, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_TEXT(change(e), "a 0->3");
    CHECK_TEXT(change(e), "b 0->2");
    CHECK_TEXT(change(e), "c 0->3");
    CHECK_TEXT(change(e), "");
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_TEXT(change(e), "");
    withdraw(&t, "b", NULL, &err);
    CHECK_EQ(publish(&t, "c", 4, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), 0);
    for (i = 0; i < 3; i++) {
        const char *text = change(e);
        CHECK(strcmp(text, "a 3->0") == 0 || strcmp(text, "b 2->0") == 0 || strcmp(text, "c 3->4") == 0);
    }
    CHECK_TEXT(change(e), "");
    memset(list, 0x55, sizeof list);
    CHECK_EQ(lorasync_engine_list(e, list, 2), 3); /* no more than there is room for */
    CHECK(list[2].version == UINT64_C(0x5555555555555555));
    CHECK_EQ(lorasync_engine_list(e, list, 3), 3);
    for (i = 0; i < 3; i++) CHECK_EQ(list[i].version, list[i].adapter[0] == 'c' ? 4 : 0);
    lorasync_engine_close(e);
    t.close(t.user);
}

/* -- sources and transports of one's own */

typedef struct shelf {
    lorasync_published what;
    lorasync_image    *image;
} shelf;

static lorasync_status shelf_look(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    (void)err;
    if (index) return LORASYNC_NOTHING_NEW;
    *out = ((shelf *)user)->what;
    return LORASYNC_OK;
}

static lorasync_status shelf_open(void *user, const lorasync_published *what, const lorasync_image *base,
                                  lorasync_delivery *out, lorasync_error *err)
{
    const lorasync_image *image = ((shelf *)user)->image;
    (void)what, (void)base, (void)err;
    out->bytes         = image->header;
    out->num_bytes     = image->header_bytes;
    out->payload       = image->payload;
    out->payload_bytes = image->payload_bytes;
    out->config_json   = CONFIG;
    return LORASYNC_OK;
}

static lorasync_image *make_version(uint64_t version)
{
    lorasync_image *image = lay_out_rank("a", 16, 4);
    float          *p     = (float *)malloc(image->payload_bytes);
    size_t          i;
    for (i = 0; i < image->payload_bytes / sizeof *p; i++) p[i] = element("a", version) + (float)i;
    lorasync_image_bind(image, p);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    return image;
}

static void own_source(void)
{
    lorasync_source      source;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL, *late = NULL;
    lorasync_image      *image[3];
    lorasync_delivery    d;
    lorasync_error       err;
    shelf                s;
    int                  i;
    for (i = 0; i < 3; i++) image[i] = make_version((uint64_t)(i == 0 ? 40 : i));
    memset(&s, 0, sizeof s);
    memset(&source, 0, sizeof source);
    memset(&desc, 0, sizeof desc);
    source.size = sizeof source, source.name = "shelf", source.user = &s;
    source.look = shelf_look, source.open = shelf_open;
    desc.source = &source;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), 0);
    strcpy(s.what.adapter, "a");
    s.what.version = 40, s.image = image[0];
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    s.what.withdrawn = 1;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    memset(&d, 0, sizeof d); /* an old withdrawal is no word on what is offered after it */
    d.size = sizeof d, d.bytes = image[2]->header, d.num_bytes = image[2]->header_bytes;
    d.payload = image[2]->payload, d.payload_bytes = image[2]->payload_bytes, d.config_json = CONFIG;
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 2);
    CHECK_EQ(lorasync_engine_open(&desc, &late, &err), 0); /* nor if it is the first that an engine hears */
    CHECK_EQ(lorasync_engine_offer(late, &d, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(late, "a"), 2);
    lorasync_engine_close(late);
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), LORASYNC_OK);
    CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_OK); /* the host wants it again */
    CHECK_EQ(served(e, "a"), 2);
    CHECK_EQ(lorasync_engine_drop(e, "a", &err), LORASYNC_OK);
    s.what.withdrawn = 0;
    s.what.version = 1, s.image = image[1];
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW); /* older than what was dropped */
    s.what.version = 0;                                               /* which shows when it is opened */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 0);
    s.what.tenancy = 17;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 1);
    lorasync_engine_close(e);
    for (i = 0; i < 3; i++) drop_image(image[i]);
}

static lorasync_status take(void *user, const lorasync_image *image, lorasync_error *err)
{
    (void)user, (void)image, (void)err;
    return LORASYNC_OK;
}

/* Two engines hold it until it was asked three times. */
static lorasync_status retire(void *user, const char *adapter, lorasync_withdrawal *out, lorasync_error *err)
{
    int *turns = (int *)user;
    if (*turns < 0) return (lorasync_status)*turns;
    CHECK_TEXT(adapter, "a");
    (void)err;
    if (++*turns >= 3) return LORASYNC_OK;
    out->num_holders = 20;
    strcpy(out->holders[0].engine, "north");
    out->holders[0].pid     = 77;
    out->holders[0].version = 4;
    strcpy(out->holders[1].engine, "south");
    return LORASYNC_NOTHING_NEW;
}

static void own_transport(void)
{
    lorasync_transport  t;
    lorasync_withdrawal w;
    lorasync_error      err;
    int                 turns = 0;
    memset(&t, 0, sizeof t);
    t.size = sizeof t, t.name = "mine", t.user = &turns, t.stage = take;
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "'mine'");
    t.retire = retire;
    t.size   = offsetof(lorasync_transport, retire); /* of an older header */
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_UNSUPPORTED);
    t.size = sizeof t;
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_BUSY);
    CHECK_EQ(w.num_holders, 20);
    CHECK_HAS(err.text, "engine 'north' (process 77) holds v4, engine 'south', an engine");
    CHECK_HAS(err.text, " more");
    CHECK_EQ(lorasync_transport_withdraw(&t, "a", 5000, NULL, &err), LORASYNC_OK);
    CHECK_EQ(turns, 3);
    turns = LORASYNC_E_LOST;
    CHECK_EQ(withdraw(&t, "a", &w, &err), LORASYNC_E_IO);
    CHECK_EQ(lorasync_transport_withdraw(NULL, "a", 0, &w, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_transport_withdraw(&t, NULL, 0, &w, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_transport_withdraw(&t, "a", -1, &w, &err), LORASYNC_E_ARGUMENT);
}

/* -- withdrawing what a session publishes */

/* A session of one pair; every rank holds rows. Values follow from the version. */
static lorasync_session *open_session(rank_context *c, float *a, float *b)
{
    lorasync_desc     desc;
    lorasync_session *s = NULL;
    lorasync_piece    p;
    lorasync_error    err;
    memset(&desc, 0, sizeof desc);
    memset(&err, 0, sizeof err);
    desc.comm       = &c->comm;
    desc.lora_alpha = 8;
    desc.timeout_ms = 20000;
    CHECK_EQ(lorasync_open(&desc, &s, &err), 0);
    p = shard_piece("m.q_proj.lora_A.default.weight", 2, 8, 16, c->rank, c->world, a);
    CHECK_EQ(lorasync_add(s, &p, &err), 0);
    p = shard_piece("m.q_proj.lora_B.default.weight", 2, 16, 8, c->rank, c->world, b);
    CHECK_EQ(lorasync_add(s, &p, &err), 0);
    if (err.text[0]) fprintf(stderr, "%s\n", err.text);
    return s;
}

static void fill(float *a, float *b, int version)
{
    int i;
    for (i = 0; i < 128; i++) a[i] = b[i] = (float)(version * 1000 + i % 7);
}

/* 1 if this version is served, with its values; 0 for version 0: none is. */
static int serves(lorasync_engine *e, int version)
{
    const lorasync_adapter *x = lorasync_acquire(e, "default");
    const float            *p = x ? (const float *)x->image->payload : NULL;
    int                     ok;
    ok = x ? x->version == (uint64_t)version && p[0] >= (float)version * 1000 && p[0] < (float)version * 1000 + 7
           : version == 0;
    lorasync_release(x);
    return ok;
}

static void session_withdraws(rank_context *c)
{
    float               a[128], b[128];
    lorasync_session   *s = open_session(c, a, b);
    lorasync_engine    *e[2];
    lorasync_withdrawal w;
    lorasync_error      err;
    lorasync_transport  t[2];
    int                 i, v, turn;
    in_directory = 1, t[0] = open_place(), e[0] = c->rank ? NULL : open_engine();
    in_directory = 0;
    if (c->rank == 0) t[1] = open_place(), e[1] = open_engine();
    for (i = 0; i < 2 && c->rank == 0; i++) CHECK_EQ(lorasync_attach(s, &t[i], &err), 0);
    if (c->rank) t[0].close(t[0].user);
    memset(&err, 0, sizeof err);
    CHECK_EQ(lorasync_withdraw(s, 0, &w, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_compile(s, &err), 0);
    CHECK_EQ(lorasync_withdraw(s, 0, &w, &err), LORASYNC_E_NOT_FOUND);
    for (turn = 0; turn < 3; turn++) {
        for (v = 3 - turn; v < 7; v++) {
            fill(a, b, v);
            CHECK_EQ(lorasync_sync(s, (uint64_t)v, NULL, &err), 0);
            for (i = 0; i < 2 && c->rank == 0; i++) {
                CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
                CHECK(serves(e[i], v));
            }
        }
        CHECK_EQ(lorasync_begin(s, 7, &err), 0);
        CHECK_EQ(lorasync_withdraw(s, 0, &w, &err), LORASYNC_E_STATE);
        CHECK_EQ(lorasync_wait(s, NULL, &err), 0);
        if (c->world > 1) CHECK_EQ(lorasync_withdraw(s, c->rank, &w, &err), LORASYNC_E_DISAGREE);
        CHECK_EQ(lorasync_withdraw(s, -1, &w, &err), LORASYNC_E_ARGUMENT);
        CHECK_EQ(lorasync_withdraw(s, 0, &w, &err), LORASYNC_E_BUSY);
        CHECK_EQ(w.num_holders, 2);
        for (i = 0; i < 2; i++) CHECK_TEXT(w.holders[i].engine, "first");
        CHECK_HAS(err.text, "'first'");
        CHECK(lorasync_session_image(s) == NULL);
        for (i = 0; i < 2 && c->rank == 0; i++) {
            CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
            CHECK(serves(e[i], 0));
        }
        CHECK_EQ(lorasync_withdraw(s, 5000, &w, &err), 0);
        CHECK_EQ(w.num_holders, 0);
        if (c->rank == 0) CHECK(count_versions("") <= 2); /* what is lent, and what was published last */
        CHECK_EQ(lorasync_republish(s, &err), LORASYNC_E_STATE);
        if (c->rank == 0) CHECK_EQ(lorasync_get_outcomes(s, NULL)[1].version, 0);
    }
    fill(a, b, 1);
    CHECK_EQ(lorasync_sync(s, 1, NULL, &err), 0);
    for (i = 0; i < 2 && c->rank == 0; i++) {
        CHECK_EQ(lorasync_engine_poll(e[i], 0, &err), 0);
        CHECK(serves(e[i], 1));
        lorasync_engine_close(e[i]);
    }
    lorasync_close(s);
}

static void sessions(void)
{
    int world;
    for (world = 1; world <= 8; world *= 2) {
        fresh_name();
        CHECK_EQ(run_processes(world, session_withdraws, NULL), 0);
    }
}

/* One of two transports cannot: then none does. */
static void session_of_mixed_transports(void)
{
    rank_context       c;
    float              a[128], b[128];
    lorasync_session  *s;
    lorasync_transport t[2];
    lorasync_error     err;
    int                turns = LORASYNC_E_IO;
    fresh_name();
    in_directory = 1;
    memset(&c, 0, sizeof c);
    memset(&t[1], 0, sizeof t[1]);
    c.world = 1, c.comm = lorasync_solo();
    t[0]      = open_place();
    t[1].size = sizeof t[1], t[1].name = "mine", t[1].user = &turns, t[1].stage = take;
    s = open_session(&c, a, b);
    fill(a, b, 1);
    CHECK_EQ(lorasync_attach(s, &t[0], &err), 0);
    CHECK_EQ(lorasync_attach(s, &t[1], &err), 0);
    CHECK_EQ(lorasync_compile(s, &err), 0);
    CHECK_EQ(lorasync_sync(s, 1, NULL, &err), 0);
    CHECK_EQ(lorasync_withdraw(s, 0, NULL, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "'mine'");
    CHECK_EQ(count_versions("default"), 1);
    lorasync_close(s);
    t[0]        = open_place();
    t[1].retire = retire; /* fails: the other is told all the same */
    s           = open_session(&c, a, b);
    CHECK_EQ(lorasync_attach(s, &t[1], &err), 0);
    CHECK_EQ(lorasync_attach(s, &t[0], &err), 0);
    CHECK_EQ(lorasync_compile(s, &err), 0);
    CHECK_EQ(lorasync_sync(s, 2, NULL, &err), 0);
    CHECK_EQ(lorasync_withdraw(s, 5000, NULL, &err), LORASYNC_E_IO);
    CHECK_EQ(count_versions("default"), 0);
    lorasync_close(s);
}

/* -- tenants come and go at random while engines look */

enum {
    TENANTS = 12
};

/* Looks at all that is served until told to stop, or the parent is gone; the number of errors. */
static int watch(lorasync_engine *e, const volatile int *stop, long *out_served)
{
    lorasync_listed list[TENANTS];
    lorasync_error  err;
    size_t          i, num;
    const pid_t     parent = getppid();
    int             bad    = 0;
    while (!__atomic_load_n(stop, __ATOMIC_SEQ_CST) && bad < 5 && getppid() == parent) {
        memset(&err, 0, sizeof err);
        if (lorasync_engine_poll(e, 1, &err) < 0) {
            fprintf(stderr, "%s\n", err.text);
            bad++;
        }
        num = lorasync_engine_list(e, list, TENANTS);
        for (i = 0; i < num && i < TENANTS; i++) *out_served += served(e, list[i].adapter) != 0;
    }
    return bad + test_errors;
}

static void at_random(void)
{
    lorasync_transport t;
    lorasync_error     err;
    uint64_t           version[TENANTS] = {0}, end, n = 0, seed = 7;
    pid_t              child[3];
    int               *stop = (int *)mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int                i;
    fresh_name();
    t = open_place();
    fflush(NULL);
    for (i = 0; i < 3; i++) {
        child[i] = fork();
        if (child[i] == 0) {
            lorasync_engine *e   = open_engine();
            long             num = 0;
            int              bad = watch(e, stop, &num);
            lorasync_engine_close(e);
            _exit(num > 0 ? bad : 77);
        }
    }
    end = lorasynci_now_ns() + 400000000;
    while (lorasynci_now_ns() < end) {
        seed = lorasynci_mix(seed);
        i    = (int)(seed % TENANTS);
        if (seed >> 32 & 3) {
            CHECK_EQ(publish(&t, numbered(i), ++version[i], &err), 0);
        } else if (version[i]) {
            lorasync_status status = lorasync_transport_withdraw(&t, numbered(i), (int)(seed >> 40 & 3), NULL, &err);
            CHECK(status == LORASYNC_OK || status == LORASYNC_E_BUSY);
            version[i] = 0; /* it begins again at 1 */
        }
        n++;
    }
    __atomic_store_n(stop, 1, __ATOMIC_SEQ_CST);
    for (i = 0; i < 3; i++) CHECK_EQ(wait_for(child[i]), 0);
    for (i = 0; i < TENANTS; i++) {
        lorasync_status status = withdraw(&t, numbered(i), NULL, &err);
        CHECK(status == LORASYNC_OK || status == LORASYNC_E_NOT_FOUND);
    }
    if (!in_directory) CHECK_EQ(count_versions(""), 0);
    printf("     %d publications and withdrawals\n", (int)n);
    t.close(t.user);
    munmap(stop, 4096);
}

/* -- several places at once */

static lorasync_status nothing_there(void *user, size_t index, lorasync_published *out, lorasync_error *err)
{
    (void)user, (void)index, (void)out, (void)err;
    return LORASYNC_NOTHING_NEW;
}

static void count_close(void *user) { ++*(int *)user; }

static void places(void)
{
    lorasync_transport   shm, dir;
    lorasync_source      source;
    lorasync_engine_desc desc;
    lorasync_place       p[4];
    lorasync_engine     *e = NULL;
    lorasync_listed      list[8];
    lorasync_error       err;
    char                 second[120];
    size_t               i, num;
    int                  closed = 0;
    fresh_name();
    snprintf(second, sizeof second, "%.90s-2", directory);
    memset(&desc, 0, sizeof desc);
    memset(&source, 0, sizeof source);
    memset(p, 0, sizeof p);
    source.size = sizeof source, source.name = "mine", source.user = &closed, source.close = count_close;
    source.look = nothing_there, source.open = shelf_open;
    p[0].directory = directory;
    p[1].shm       = name;
    p[2].directory = second;
    p[3].source    = &source;
    desc.places = p, desc.num_places = 4;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    shm = open_shm();
    dir = open_directory();
    CHECK_EQ(publish(&dir, "a", 1, &err), 0);
    CHECK_EQ(publish(&shm, "b", 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK); /* several changes in one poll */
    CHECK_EQ(served(e, "a"), 1);
    CHECK_EQ(served(e, "b"), 2);
    CHECK_TEXT(change(e), "a 0->1");
    CHECK_TEXT(change(e), "b 0->2");
    num = lorasync_engine_list(e, list, 8);
    CHECK_EQ(num, 2);
    for (i = 0; i < num; i++) CHECK_EQ(list[i].place, list[i].adapter[0] - 'a');

    /* one name in two places */
    CHECK_EQ(publish(&shm, "a", 7, &err), 0);
    CHECK_EQ(publish(&shm, "b", 3, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_NAME);
    CHECK_HAS(err.text, "'a' is published in");
    CHECK_HAS(err.text, directory);
    CHECK_HAS(err.text, name);
    CHECK_EQ(served(e, "a"), 1);
    CHECK_EQ(served(e, "b"), 3); /* the other goes on */
    CHECK_EQ(publish(&dir, "a", 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_NAME);
    CHECK_EQ(served(e, "a"), 2);
    withdraw(&dir, "a", NULL, &err); /* it moves */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_OK);
    CHECK_EQ(served(e, "a"), 7);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(withdraw(&dir, "a", NULL, &err), LORASYNC_OK); /* an old withdrawal there is none here */
    e->places[0].look_at_all_ns = 0;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, "a"), 7);

    /* a place that fails does not hold up the others */
    CHECK_EQ(close(open(second, O_CREAT | O_WRONLY, 0600)), 0);
    CHECK_EQ(publish(&shm, "b", 4, &err), 0);
    CHECK_EQ(publish(&dir, "c", 1, &err), 0);
    CHECK(lorasync_engine_poll(e, 0, &err) < 0);
    CHECK_HAS(err.text, "-2");
    CHECK_EQ(served(e, "b"), 4);
    CHECK_EQ(served(e, "c"), 1);
    CHECK_EQ(unlink(second), 0);
    CHECK_EQ(lorasync_engine_drop(e, "c", &err), 0);
    CHECK_EQ(withdraw(&dir, "c", NULL, &err), 0); /* each place has its receipts */
    CHECK_EQ(withdraw(&shm, "b", NULL, &err), LORASYNC_E_BUSY);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(withdraw(&shm, "b", NULL, &err), 0);
    CHECK_EQ(closed, 0);
    lorasync_engine_close(e);
    CHECK_EQ(closed, 1);
    dir.close(dir.user);
    shm.close(shm.user);
}

typedef struct later {
    lorasync_transport *t;
    int                 number;
} later;

static void *publish_later(void *user)
{
    later *l = (later *)user;
    char   adapter[32];
    usleep(50000);
    snprintf(adapter, sizeof adapter, "tenant-%d", l->number);
    CHECK_EQ(publish(l->t, adapter, 2, NULL), 0);
    return NULL;
}

/* A poll that looks at several places waits until one of them has something. */
static void places_are_waited_for(void)
{
    lorasync_transport   t[2];
    lorasync_engine_desc desc;
    lorasync_place       p[2];
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    uint64_t             begun;
    int                  i, status;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    memset(p, 0, sizeof p);
    p[0].directory = directory;
    p[1].shm       = name;
    desc.places = p, desc.num_places = 2;
    t[0] = open_directory();
    t[1] = open_shm();
    for (i = 0; i < 2; i++) CHECK_EQ(publish(&t[i], numbered(i), 1, &err), 0);
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), 0);
    while ((status = (int)lorasync_engine_poll(e, 0, &err)) == LORASYNC_OK) continue;
    CHECK_EQ(status, LORASYNC_NOTHING_NEW);
    for (i = 0; i < 2; i++) {
        pthread_t thread;
        later     l;
        l.t = &t[i], l.number = i;
        CHECK_EQ(pthread_create(&thread, NULL, publish_later, &l), 0);
        begun = lorasynci_now_ns();
        CHECK_EQ(lorasync_engine_poll(e, 20000, &err), LORASYNC_OK);
        CHECK(ms_since(begun) < 10000);
        pthread_join(thread, NULL);
        CHECK_EQ(served(e, numbered(i)), 2);
    }
    lorasync_engine_close(e);
    for (i = 0; i < 2; i++) t[i].close(t[i].user);
}

static void bad_places(void)
{
    lorasync_source      source, bad;
    lorasync_engine_desc desc;
    lorasync_place       p[65];
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    int                  closed = 0, i;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    memset(&source, 0, sizeof source);
    memset(p, 0, sizeof p);
    source.size = sizeof source, source.name = "mine", source.user = &closed, source.close = count_close;
    source.look = nothing_there, source.open = shelf_open;
    bad         = source;
    bad.open    = NULL;
    desc.places = p;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "num_places is 0");
    for (i = 0; i < 65; i++) p[i].directory = directory;
    desc.num_places = 65;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "num_places is 65");
    desc.places = NULL;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    desc.places = p, desc.num_places = 3;
    p[1].directory = NULL;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "places[1] has no source");
    p[1].source = &source, p[1].shm = name;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "places[1] has more than one");
    p[1].shm       = NULL;
    desc.directory = directory;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "directory and places are both set");
    desc.directory = NULL;
    p[2].directory = NULL, p[2].shm = "a/b";
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_NAME);
    p[2].shm = NULL, p[2].source = &bad;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "places[2]");
    CHECK_EQ(closed, 0); /* the caller's, as it was not opened */
    CHECK(e == NULL);
}

/* -- both places */

#define BOTH(test)                                                                                                     \
    static void test##_in_shm(void)                                                                                    \
    {                                                                                                                  \
        in_directory = 0;                                                                                              \
        test();                                                                                                        \
    }                                                                                                                  \
    static void test##_in_directory(void)                                                                              \
    {                                                                                                                  \
        in_directory = 1;                                                                                              \
        test();                                                                                                        \
    }

BOTH(comes_and_goes)
BOTH(missed)
BOTH(killed)
BOTH(killed_and_published)
BOTH(drops)
BOTH(changes)
BOTH(at_random)

int main(void)
{
    RUN(a_thousand);
    RUN(comes_and_goes_in_shm);
    RUN(comes_and_goes_in_directory);
    RUN(missed_in_shm);
    RUN(missed_in_directory);
    RUN(not_seen);
    in_directory = 0;
    RUN(places_are_used_again);
    RUN(dead_holder);
    RUN(killed_in_shm);
    RUN(killed_in_directory);
    RUN(killed_and_published_in_shm);
    RUN(killed_and_published_in_directory);
    RUN(drops_in_shm);
    RUN(drops_in_directory);
    RUN(changes_in_shm);
    RUN(changes_in_directory);
    RUN(at_random_in_shm);
    RUN(at_random_in_directory);
    RUN(own_source);
    RUN(own_transport);
    RUN(sessions);
    RUN(session_of_mixed_transports);
    RUN(places);
    RUN(places_are_waited_for);
    RUN(bad_places);
    drop_name();
    return test_summary("test_tenants");
}
