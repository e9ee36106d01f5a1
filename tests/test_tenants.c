/* Tests of places that hold many adapters, and of adapters that come and go. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "pieces.h"
#include "published.h"

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
    snprintf(name, sizeof name, "tenants-%ld-%d", (long)getpid(), number++);
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

int main(void)
{
    RUN(a_thousand);
    drop_name();
    return test_summary("test_tenants");
}
