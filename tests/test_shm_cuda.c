/* The shared-memory transport with payloads in (fake) device memory: publisher and engines in one process and in
   several. LORASYNC_TEST_ROUNDS publishers are killed at random points, 12 without it. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#define _DEFAULT_SOURCE 1
#endif
#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>)
#define HAVE_CUDA 1
#endif
#endif

#ifdef HAVE_CUDA
#define LORASYNC_CUDA
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include "published.h"

#ifndef HAVE_CUDA
int main(void)
{
    printf("skip test_shm_cuda: no cuda_runtime_api.h here\n");
    test_skipped++;
    return test_summary("test_shm_cuda");
}
#else

#include "fake_cuda.h"
#include <sys/wait.h>

#define SKIP_WITHOUT_SHARING()                                                                                         \
    do {                                                                                                               \
        if (FAKE_MALLOC) SKIP("the address sanitizer's device memory is not shared between processes");                \
    } while (0)

static char name[64];

static void fresh_name(void)
{
    static int number;
    if (name[0]) lorasync_shm_remove(name, NULL);
    snprintf(name, sizeof name, "test-cuda-%ld-%d", (long)getpid(), number++);
    lorasync_shm_remove(name, NULL);
    fake_cuda_share();
    fake_cuda_reset();
    fake_cuda_reclaim();
}

static void nap(long us)
{
    struct timespec t;
    t.tv_sec  = us / 1000000;
    t.tv_nsec = us % 1000000 * 1000;
    nanosleep(&t, NULL);
}

/* -- images whose every byte follows from version and seed. Tensor B has `odd` more bytes than it has words: nothing
   behind it is aligned */

typedef struct picture {
    lorasync_image *image;
    unsigned char  *bytes; /* on the host */
    void           *device;
} picture;

static unsigned char expected_byte(uint64_t version, int seed, size_t i)
{
    return (unsigned char)(lorasynci_mix(version * 1000003u + (unsigned)seed * 7919u + i / 8) >> (8 * (i % 8)));
}

static picture make_picture(uint64_t version, int seed, size_t width, int on_device)
{
    lorasync_tensor     tensors[4];
    lorasync_image_desc desc;
    lorasync_error      err;
    picture             p;
    size_t              i;
    memset(tensors, 0, sizeof tensors);
    memset(&desc, 0, sizeof desc);
    memset(&p, 0, sizeof p);
    tensors[0].name  = KEY_A;
    tensors[1].name  = KEY_B;
    tensors[2].name  = "base_model.model.layers.1.q_proj.lora_A.weight";
    tensors[3].name  = "base_model.model.layers.1.q_proj.lora_B.weight";
    tensors[0].dtype = tensors[1].dtype = LORASYNC_F32;
    tensors[2].dtype                    = LORASYNC_BF16;
    tensors[3].dtype                    = LORASYNC_F8_E4M3;
    tensors[0].ndim = tensors[1].ndim = tensors[2].ndim = tensors[3].ndim = 2;
    tensors[0].shape[0] = tensors[1].shape[1] = tensors[2].shape[0] = tensors[3].shape[1] = 4;
    tensors[0].shape[1] = tensors[1].shape[0] = tensors[3].shape[0] = (int64_t)width;
    tensors[2].shape[1]                                             = (int64_t)width + 1;
    desc.tensors                                                    = tensors;
    desc.num_tensors                                                = 4;
    desc.adapter                                                    = "default";
    if (lorasync_image_layout(&desc, NULL, &p.image, &err) < 0) {
        fprintf(stderr, "layout: %s\n", err.text);
        exit(1);
    }
    p.image->config_json = CONFIG;
    p.bytes              = (unsigned char *)malloc(p.image->payload_bytes);
    for (i = 0; i < p.image->payload_bytes; i++) p.bytes[i] = expected_byte(version, seed, i);
    lorasync_image_bind(p.image, p.bytes);
    lorasync_image_stamp(p.image, version, lorasync_image_digest(p.image, NULL));
    if (!on_device) return p;
    if (cudaMalloc(&p.device, p.image->payload_bytes) != cudaSuccess) exit(1);
    cudaMemcpy(p.device, p.bytes, p.image->payload_bytes, cudaMemcpyDefault);
    lorasync_image_bind(p.image, p.device);
    p.image->on_device = 1;
    return p;
}

static void drop_picture(picture *p)
{
    lorasync_image_free(p->image);
    if (p->device) cudaFree(p->device);
    free(p->bytes);
}

/* The number of wrong bytes in what a reader sees, through its views; -1 for something else wrong. */
static long wrong_bytes(const lorasync_adapter *a)
{
    size_t i, k;
    long   wrong = 0;
    if (!a || !lorasync_find(a, KEY_A) || !lorasync_find(a, KEY_B) || a->image->num_tensors != 4 ||
        lorasync_config_view(a->config)->r != 4)
        return -1;
    if (a->image->version != a->version || strcmp(a->image->config_json, CONFIG) != 0) return -1;
    for (i = 0; i < a->image->num_tensors; i++) {
        const lorasync_tensor *t    = &a->image->tensors[i];
        unsigned char         *copy = (unsigned char *)malloc(t->num_bytes + 1);
        if (a->image->on_device) cudaMemcpy(copy, t->data, t->num_bytes, cudaMemcpyDefault);
        else memcpy(copy, t->data, t->num_bytes);
        for (k = 0; k < t->num_bytes; k++) wrong += copy[k] != expected_byte(a->version, 0, t->offset + k);
        free(copy);
    }
    return wrong;
}

/* -- shorthands */

static lorasync_status try_transport(lorasync_transport *t, int on_device, const lorasync_allocator *a,
                                     lorasync_error *err)
{
    lorasync_shm_desc desc;
    lorasync_cuda     cuda;
    memset(&desc, 0, sizeof desc);
    memset(&cuda, 0, sizeof cuda);
    desc.name      = name;
    desc.allocator = a;
    desc.cuda      = on_device ? &cuda : NULL;
    return lorasync_shm_open(&desc, t, err);
}

static lorasync_transport open_transport(int on_device)
{
    lorasync_transport t;
    lorasync_error     err;
    memset(&t, 0, sizeof t);
    if (try_transport(&t, on_device, NULL, &err) < 0) {
        fprintf(stderr, "lorasync_shm_open: %s\n", err.text);
        exit(1);
    }
    return t;
}

static lorasync_engine *open_engine(int accept_device, int no_verify)
{
    return open_shm_engine(name, NULL, accept_device, no_verify);
}

static lorasync_status publish_as(lorasync_transport *t, uint64_t version, int seed, size_t width, int on_device,
                                  lorasync_error *err)
{
    picture         p      = make_picture(version, seed, width, on_device);
    lorasync_status status = put(t, p.image, err);
    drop_picture(&p);
    fake_cuda.pageable_in = 0; /* images on the host are not pinned here */
    return status;
}

static lorasync_status publish(lorasync_transport *t, uint64_t version, lorasync_error *err)
{
    return publish_as(t, version, 0, 64, (int)(version % 2), err);
}

static uint64_t served(lorasync_engine *e, int on_device)
{
    const lorasync_adapter *a = lorasync_acquire(e, "default");
    uint64_t                v = a ? a->version : 0;
    if (a) CHECK_EQ(wrong_bytes(a), 0);
    if (a) CHECK_EQ(a->image->on_device, on_device);
    lorasync_release(a);
    return v;
}

static lorasynci_shm *inside(const lorasync_transport *t) { return (lorasynci_shm *)t->user; }

static char *served_payload(const lorasync_transport *t)
{
    return inside(t)->payloads[lorasynci_shm_slot_of(inside(t)->map.control->adapters[0].word)];
}

/* -- an engine in another process, which does what it is told */

typedef struct answer {
    int      status;
    uint64_t version;
    long     wrong, opened, allocations;
    int      on_device;
    char     text[512];
} answer;

typedef struct remote {
    pid_t pid;
    int   to, from;
} remote;

static void remote_answer(lorasync_engine *e, const lorasync_adapter *held, char command, answer *out)
{
    const lorasync_adapter *a;
    lorasync_error          err;
    memset(out, 0, sizeof *out);
    memset(&err, 0, sizeof err);
    if (command == 'f') fake_cuda.ipc_fails = 2;
    if (command == 'o') fake_cuda.ipc_fails = 0;
    if (command == 'p') out->status = lorasync_engine_poll(e, 0, &err);
    a              = held && command == 'l' ? held : lorasync_acquire(e, "default");
    out->version   = a ? a->version : 0;
    out->wrong     = a ? wrong_bytes(a) : 0;
    out->on_device = a ? a->image->on_device : 0;
    if (a != held || command != 'l') lorasync_release(a);
    out->opened      = fake_cuda.live_opened;
    out->allocations = fake_cuda.allocations;
    if (out->status < 0) snprintf(out->text, sizeof out->text, "%s", err.text);
}

/* p: poll; h: hold what is served; l: look at what is held; r: release it; f, o: IPC fails, or works again; q: end. */
static int run_remote(int from, int to)
{
    lorasync_engine        *e    = open_engine(1, 0);
    const lorasync_adapter *held = NULL;
    char                    command;
    answer                  out;
    while (read(from, &command, 1) == 1 && command != 'q') {
        if (command == 'h') held = lorasync_acquire(e, "default");
        if (command == 'r') lorasync_release(held), held = NULL;
        remote_answer(e, held, command, &out);
        if (write(to, &out, sizeof out) != (ssize_t)sizeof out) return 2;
    }
    lorasync_engine_close(e);
    return fake_cuda_left() != 0;
}

static remote start_remote(void)
{
    remote r;
    int    to[2], from[2];
    if (pipe(to) != 0 || pipe(from) != 0) exit(1);
    r.pid = fork();
    if (r.pid == 0) {
        close(to[1]), close(from[0]);
        fake_cuda.live_memory = fake_cuda.live_pinned = fake_cuda.live_streams = fake_cuda.live_events =
            fake_cuda.live_modules = fake_cuda.live_opened = 0;
        fake_cuda.num_memory = fake_cuda.opened = 0;
        _exit(run_remote(to[0], from[1]));
    }
    close(to[0]), close(from[1]);
    r.to   = to[1];
    r.from = from[0];
    return r;
}

static answer ask(const remote *r, char command)
{
    answer a;
    memset(&a, 0, sizeof a);
    if (write(r->to, &command, 1) != 1 || read(r->from, &a, sizeof a) != (ssize_t)sizeof a) a.status = -999;
    return a;
}

static int end_remote(remote *r, int signal)
{
    int status = 0;
    if (signal) kill(r->pid, signal);
    else if (write(r->to, "q", 1) != 1) return -1;
    while (waitpid(r->pid, &status, 0) < 0 && errno == EINTR) {}
    close(r->to), close(r->from);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

/* -- the plain way */

/* Images from the host and from the device in turns; after the first few nothing is allocated or opened any more. */
static void same_process(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v;
    long               memory = 0, pinned = 0, launches;
    fresh_name();
    e = open_engine(1, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    t = open_transport(1);
    for (v = 1; v <= 20; v++) {
        if (v == 6) memory = fake_cuda.live_memory, pinned = fake_cuda.live_pinned;
        launches       = fake_cuda.launches;
        fake_cuda.hold = v % 3 == 0 ? 70 : 0; /* "not ready" for a while */
        CHECK_EQ(publish(&t, v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(fake_cuda.launches, launches + 1);
        CHECK_EQ(served(e, 1), v);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    }
    fake_cuda.hold = 0;
    CHECK_EQ(publish(&t, 20, &err), 0); /* a retry */
    CHECK_EQ(publish_as(&t, 20, 1, 64, 1, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "other content");
    CHECK_EQ(publish(&t, 19, &err), LORASYNC_E_VERSION);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(fake_cuda.live_memory, memory);
    CHECK_EQ(fake_cuda.live_pinned, pinned);
    CHECK_EQ(fake_cuda.live_opened, 0);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* Another layout in the same slots: the digest's tables are made again, for that version only. */
static void layouts(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v;
    long               memory = 0;
    fresh_name();
    e = open_engine(1, 0);
    t = open_transport(1);
    for (v = 1; v <= 20; v++) {
        CHECK_EQ(publish_as(&t, v, 0, v == 1 ? 64 : 40 + (size_t)(v * v % 24), (int)(v % 2), &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, 1), v);
        if (v == 6) memory = fake_cuda.live_memory;
    }
    CHECK(fake_cuda.live_memory <= memory + 2);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

static void other_process(void)
{
    lorasync_transport t;
    lorasync_error     err;
    remote             r;
    answer             a;
    uint64_t           v;
    long               allocations = 0;
    SKIP_WITHOUT_SHARING();
    fresh_name();
    r = start_remote();
    t = open_transport(1);
    for (v = 1; v <= 20; v++) {
        CHECK_EQ(publish(&t, v, &err), 0);
        a = ask(&r, 'p');
        CHECK_EQ(a.status, 0);
        CHECK_EQ(a.version, v);
        CHECK_EQ(a.wrong, 0);
        CHECK_EQ(a.on_device, 1);
        CHECK(a.opened >= 1 && a.opened <= 3);
        if (v == 6) allocations = a.allocations;
        if (v > 6) CHECK_EQ(a.allocations, allocations);
    }
    CHECK_EQ(ask(&r, 'p').status, LORASYNC_NOTHING_NEW);
    CHECK_EQ(end_remote(&r, 0), 0);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* A held version keeps its bytes while many others are published; an engine of each kind. */
static void pins(void)
{
    lorasync_transport      t;
    lorasync_engine        *e;
    const lorasync_adapter *held;
    lorasync_error          err;
    remote                  r;
    uint64_t                v;
    fresh_name();
    if (!FAKE_MALLOC) r = start_remote();
    else memset(&r, 0, sizeof r);
    t = open_transport(1);
    e = open_engine(1, 0);
    CHECK_EQ(publish(&t, 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    held = lorasync_acquire(e, "default");
    for (v = 2; v <= 12; v++) {
        CHECK_EQ(publish(&t, v, &err), 0);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, 1), v);
        CHECK_EQ(held->version, 1);
        CHECK_EQ(wrong_bytes(held), 0);
        if (FAKE_MALLOC) continue;
        CHECK_EQ(ask(&r, 'p').version, v);
        if (v == 5) ask(&r, 'h');
        if (v < 5) continue;
        CHECK_EQ(ask(&r, 'l').version, 5);
        CHECK_EQ(ask(&r, 'l').wrong, 0);
    }
    lorasync_release(held);
    if (!FAKE_MALLOC) {
        ask(&r, 'r');
        CHECK_EQ(end_remote(&r, 0), 0);
    }
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* Images grow: slots that no longer fit are freed, but not before engines have let go of them. */
static void growth(void)
{
    lorasync_transport t;
    lorasync_error     err;
    lorasync_engine   *e = NULL;
    remote             r;
    uint64_t           v;
    fresh_name();
    if (!FAKE_MALLOC) r = start_remote();
    else memset(&r, 0, sizeof r);
    t = open_transport(1);
    if (FAKE_MALLOC) e = open_engine(1, 0);
    for (v = 1; v <= 24; v++) {
        size_t width = v <= 4 ? 64 : v <= 12 ? 40000 : v <= 18 ? 100 : 7000;
        CHECK_EQ(publish_as(&t, v, 0, width, (int)(v % 2), &err), 0);
        if (e) {
            CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
            CHECK_EQ(served(e, 1), v);
            continue;
        }
        CHECK_EQ(ask(&r, 'p').version, v);
        if (v == 3) ask(&r, 'h');
        if (v == 14) ask(&r, 'r');
        if (v >= 3 && v < 14) CHECK_EQ(ask(&r, 'l').wrong, 0);
        if (v == 12) CHECK(ask(&r, 'p').opened <= 4); /* the small one that is held */
    }
    CHECK(fake_cuda.live_memory <= 3 + (e ? LORASYNCI_CHECKERS : 0)); /* slots, and an engine's tables for digests */
    if (e) lorasync_engine_close(e);
    else CHECK(ask(&r, 'p').opened <= 3);
    if (!e) CHECK_EQ(end_remote(&r, 0), 0);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* -- wrong bytes */

static void wrong_digest(void)
{
    lorasync_transport t;
    lorasync_engine   *e, *careless;
    lorasync_error     err;
    picture            p;
    size_t             at, i;
    fresh_name();
    t        = open_transport(1);
    e        = open_engine(1, 0);
    careless = open_engine(1, 1);
    CHECK_EQ(publish(&t, 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(careless, 0, &err), 0);
    for (i = 0; i < 6; i++) {
        unsigned char byte;
        p  = make_picture(2 + i, 0, 64, 1);
        at = i < 5 ? i * (p.image->payload_bytes - 1) / 4 : 77; /* first, last, and between */
        CHECK_EQ(t.stage(t.user, p.image, &err), 0);
        CHECK_EQ(t.commit(t.user, "default", 2 + i, &err), 0);
        byte = (unsigned char)(p.bytes[at] ^ 0x10);
        cudaMemcpy(served_payload(&t) + at, &byte, 1, cudaMemcpyDefault);
        drop_picture(&p);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_DIGEST);
        CHECK_HAS(err.text, name);
        CHECK_HAS(err.text, "digest");
        CHECK_EQ(served(e, 1), 1); /* still */
        CHECK_EQ(lorasync_engine_poll(careless, 0, &err), 0);
    }
    CHECK_EQ(publish(&t, 20, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 20);
    lorasync_engine_close(careless);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* -- failures */

static lorasync_status whole_story(const lorasync_allocator *a, int versions, lorasync_error *err)
{
    lorasync_transport   t;
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_status      status;
    uint64_t             v;
    memset(&desc, 0, sizeof desc);
    desc.shm           = name;
    desc.accept_device = 1;
    desc.allocator     = a;
    status             = try_transport(&t, 1, a, err);
    if (status < 0) return status;
    status = lorasync_engine_open(&desc, &e, err);
    for (v = 1; status >= 0 && v <= (uint64_t)versions; v++) {
        status = publish_as(&t, v, 0, v > 2 ? 20000 : 64, 0, err);
        if (status >= 0) status = lorasync_engine_poll(e, 0, err);
        if (status >= 0) CHECK_EQ(served(e, 1), v);
    }
    lorasync_engine_close(e);
    t.close(t.user);
    return status;
}

/* The nth allocation fails, of CUDA and of the allocator, for every n; the nth question whether the GPU is ready; the
   JIT. */
static void failures(void)
{
    test_memory        m;
    lorasync_allocator a;
    lorasync_error     err;
    lorasync_status    status;
    long               n;
    a.alloc = test_memory_alloc, a.free = test_memory_free, a.user = &m;
    for (n = 1, status = LORASYNC_E_MEMORY; status < 0; n++) {
        fresh_name();
        fake_cuda.fail_at = n;
        status            = whole_story(NULL, 3, &err);
        CHECK(status == 0 || status == LORASYNC_E_MEMORY);
        CHECK_EQ(fake_cuda_left(), 0);
    }
    CHECK(n > 15);
    for (n = 1, status = LORASYNC_E_MEMORY; status < 0; n++) {
        fresh_name();
        memset(&m, 0, sizeof m);
        m.fail_at = n;
        status    = whole_story(&a, 3, &err);
        CHECK(status == 0 || status == LORASYNC_E_MEMORY);
        CHECK_EQ(m.live, 0);
        CHECK_EQ(fake_cuda_left(), 0);
    }
    CHECK(n > 15);
    for (n = 1; n <= 6; n++) {
        fresh_name();
        fake_cuda.query_fails_at = n;
        CHECK_EQ(whole_story(NULL, 3, &err), LORASYNC_E_CUDA);
        CHECK_HAS(err.text, n % 2 ? "copying the payload" : "digesting the payload");
        CHECK_EQ(fake_cuda_left() - fake_cuda.live_memory, 0); /* memory that may still be written is not freed */
        while (fake_cuda.num_memory) cudaFree(fake_cuda.memory[0].data);
    }
    fresh_name();
    fake_cuda.jit_fails = 1;
    CHECK_EQ(whole_story(NULL, 1, &err), LORASYNC_E_CUDA);
    CHECK_EQ(fake_cuda_left(), 0);
}

static void ipc_refused(void)
{
    lorasync_transport t;
    lorasync_error     err;
    remote             r;
    answer             a;
    char               pid[100];
    SKIP_WITHOUT_SHARING();
    fresh_name();
    r                   = start_remote();
    t                   = open_transport(1);
    fake_cuda.ipc_fails = 1;
    CHECK_EQ(publish(&t, 1, &err), LORASYNC_E_CUDA);
    CHECK_HAS(err.text, "cannot be shared over CUDA IPC");
    CHECK_EQ(fake_cuda.live_memory, 0);
    fake_cuda.ipc_fails = 0;
    CHECK_EQ(publish(&t, 1, &err), 0);
    ask(&r, 'f');
    a = ask(&r, 'p');
    snprintf(pid, sizeof pid, "process %ld on GPU 0000:00:00.0", (long)getpid());
    CHECK_EQ(a.status, LORASYNC_E_CUDA);
    CHECK_EQ(a.version, 0);
    CHECK_HAS(a.text, pid);
    CHECK_HAS(a.text, "CUDA IPC");
    ask(&r, 'o');
    a = ask(&r, 'p');
    CHECK_EQ(a.status, 0);
    CHECK_EQ(a.wrong, 0);
    CHECK_EQ(end_remote(&r, 0), 0);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* -- who cannot read what */

static void kinds(void)
{
    lorasync_transport   t;
    lorasync_engine_desc desc;
    lorasync_engine     *plain, *both, *none = NULL;
    lorasync_error       err;
    picture              p;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    desc.directory     = "x";
    desc.accept_device = 1;
    CHECK_EQ(lorasync_engine_open(&desc, &none, &err), LORASYNC_E_ARGUMENT);
    plain = open_engine(0, 0);
    both  = open_engine(1, 0);
    t     = open_transport(0);
    p     = make_picture(1, 0, 64, 1);
    CHECK_EQ(put(&t, p.image, &err), LORASYNC_E_UNSUPPORTED); /* an image on the device into host memory */
    drop_picture(&p);
    CHECK_EQ(publish_as(&t, 1, 0, 64, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(plain, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(both, 0, &err), 0);
    CHECK_EQ(served(plain, 0), 1);
    CHECK_EQ(served(both, 0), 1);
    t.close(t.user);
    t = open_transport(1);                          /* the next publisher of the name uses the device */
    CHECK_EQ(publish_as(&t, 1, 0, 64, 1, &err), 0); /* is served already */
    CHECK_EQ(publish_as(&t, 1, 1, 64, 1, &err), LORASYNC_E_VERSION);
    CHECK_EQ(publish_as(&t, 2, 0, 64, 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(plain, 0, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "accept_device");
    CHECK_EQ(served(plain, 0), 1);
    CHECK_EQ(lorasync_engine_poll(both, 0, &err), 0);
    CHECK_EQ(served(both, 1), 2);
    t.close(t.user);
    t = open_transport(0); /* and the one after that does not */
    CHECK_EQ(publish_as(&t, 2, 0, 64, 0, &err), 0);
    CHECK_EQ(publish_as(&t, 3, 0, 64, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(plain, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(both, 0, &err), 0);
    CHECK_EQ(served(plain, 0), 3);
    CHECK_EQ(served(both, 0), 3);
    t.close(t.user);
    lorasync_engine_close(both);
    lorasync_engine_close(plain);
    t = open_transport(1); /* what the second one left is its process's: freed here */
    CHECK_EQ(publish_as(&t, 4, 0, 64, 0, &err), 0);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* -- publishers that close */

static void closed_publisher(void)
{
    lorasync_transport t;
    lorasync_engine   *e, *late;
    lorasync_error     err;
    char               pid[100];
    fresh_name();
    snprintf(pid, sizeof pid, "process %ld, which has closed the transport; publish it again", (long)getpid());
    t = open_transport(1);
    CHECK_EQ(publish(&t, 1, &err), 0);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0); /* nobody had it open */
    e = open_engine(1, 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, pid);
    t = open_transport(1);
    CHECK_EQ(publish_as(&t, 1, 1, 64, 1, &err), LORASYNC_E_VERSION);
    CHECK_EQ(publish(&t, 1, &err), 0); /* the same version again */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 1);
    t.close(t.user);
    CHECK(fake_cuda.live_memory >= 1);
    CHECK_EQ(served(e, 1), 1); /* it is still open */
    late = open_engine(1, 0);
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), 0); /* and served, while the process lives */
    CHECK_EQ(served(late, 1), 1);
    t = open_transport(1); /* takes it over */
    CHECK_EQ(publish(&t, 1, &err), 0);
    CHECK_EQ(publish(&t, 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 2);
    lorasync_engine_close(late);
    lorasync_engine_close(e);
    CHECK_EQ(publish_as(&t, 3, 0, 30000, 0, &err), 0);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* A name that is removed: engines keep what they serve, then follow the next publisher. */
static void removed(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    fresh_name();
    t = open_transport(1);
    e = open_engine(1, 0);
    CHECK_EQ(publish(&t, 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(publish(&t, 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    t.close(t.user);
    CHECK_EQ(lorasync_shm_remove(name, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ(served(e, 1), 2);
    t = open_transport(1);
    CHECK_EQ(publish(&t, 3, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 3);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK(fake_cuda.live_memory <= 2); /* what was removed with an engine on it stays until the process ends */
    while (fake_cuda.num_memory) cudaFree(fake_cuda.memory[0].data);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* -- processes that are killed */

static void wait_for(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
}

/* A child publishes versions from .. to, says so, and waits to be killed. */
static pid_t start_publisher(uint64_t from, uint64_t to, int say)
{
    pid_t pid = fork();
    if (pid == 0) {
        lorasync_transport t = open_transport(1);
        lorasync_error     err;
        for (; from <= to; from++)
            if (publish(&t, from, &err) < 0) break;
        if (write(say, from > to ? "y" : "n", 1) != 1) _exit(1);
        for (;;) nap(100000);
    }
    return pid;
}

static void dead_publisher(void)
{
    lorasync_transport t;
    lorasync_engine   *e, *late;
    lorasync_error     err;
    pid_t              pid;
    int                said[2];
    char               c = 0, text[80];
    SKIP_WITHOUT_SHARING();
    fresh_name();
    e = open_engine(1, 0);
    if (pipe(said) != 0) exit(1);
    pid = start_publisher(1, 5, said[1]);
    CHECK_EQ(read(said[0], &c, 1), 1);
    CHECK_EQ(c, 'y');
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 5);
    kill(pid, SIGKILL);
    wait_for(pid);
    CHECK_EQ(served(e, 1), 5); /* what is open stays */
    late = open_engine(1, 0);
    snprintf(text, sizeof text, "publisher process %ld, which has ended; publish it again", (long)pid);
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), LORASYNC_E_IO);
    CHECK_HAS(err.text, text);
    t = open_transport(1);
    CHECK_EQ(publish(&t, 4, &err), LORASYNC_E_VERSION);
    CHECK_EQ(publish_as(&t, 5, 1, 64, 1, &err), LORASYNC_E_VERSION);
    CHECK_HAS(err.text, "other content");
    CHECK_EQ(publish(&t, 5, &err), 0);
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), 0);
    CHECK_EQ(served(late, 1), 5);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW); /* the same */
    CHECK_EQ(served(e, 1), 5);
    CHECK_EQ(publish(&t, 6, &err), 0);
    CHECK_EQ(publish(&t, 7, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(lorasync_engine_poll(late, 0, &err), 0);
    CHECK_EQ(served(e, 1), 7);
    CHECK_EQ(served(late, 1), 7);
    CHECK_EQ(publish(&t, 8, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(fake_cuda.live_opened, 0); /* the dead one's memory is closed */
    lorasync_engine_close(e);
    lorasync_engine_close(late);
    t.close(t.user);
    close(said[0]), close(said[1]);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* An engine that is killed while it holds versions holds nothing for long. */
static void dead_engine(void)
{
    lorasync_transport t;
    lorasync_engine   *next;
    lorasync_error     err;
    remote             r;
    uint64_t           v;
    int                i;
    SKIP_WITHOUT_SHARING();
    fresh_name();
    r = start_remote();
    t = open_transport(1);
    for (v = 1; v <= 4; v++) {
        CHECK_EQ(publish(&t, v, &err), 0);
        CHECK_EQ(ask(&r, 'p').version, v);
        if (v == 1) ask(&r, 'h');
    }
    end_remote(&r, SIGKILL);
    next = open_engine(1, 0); /* takes the dead one's place, not its marks */
    CHECK_EQ(lorasync_engine_poll(next, 0, &err), 0);
    for (; v <= 10; v++) {
        CHECK_EQ(publish_as(&t, v, 0, 30000, (int)(v % 2), &err), 0);
        CHECK_EQ(lorasync_engine_poll(next, 0, &err), 0);
        CHECK_EQ(served(next, 1), v);
    }
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) { /* nothing of the small ones is left */
        const lorasynci_shm_segment *g = &inside(&t)->map.control->slots[i];
        CHECK(!g->serial || g->device_bytes > 30000);
    }
    CHECK(fake_cuda.live_memory <= 3 + 3); /* slots and tables */
    lorasync_engine_close(next);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

static void killed_anywhere(void)
{
    const char        *given  = getenv("LORASYNC_TEST_ROUNDS");
    int                rounds = given ? atoi(given) : 12, i;
    unsigned long long random = 1;
    lorasync_engine   *e;
    lorasync_error     err;
    uint64_t           v = 0;
    int                said[2];
    SKIP_WITHOUT_SHARING();
    if (rounds > 50) rounds = 50;
    fresh_name();
    e = open_engine(1, 0);
    if (pipe(said) != 0) exit(1);
    for (i = 0; i < rounds; i++) {
        pid_t pid   = start_publisher(v + 1, v + 100000, said[1]);
        int   turns = (int)(test_random(&random) % 40);
        for (; turns > 0; turns--) {
            lorasync_status status = lorasync_engine_poll(e, 0, &err);
            if (status < 0 && status != LORASYNC_E_IO) fprintf(stderr, "round %d: %s\n", i, err.text);
            CHECK(status >= 0 || status == LORASYNC_E_IO);
            if (status == 0) CHECK(served(e, 1) > v);
            if (status == 0) v = served(e, 1);
            nap((long)(test_random(&random) % 300));
        }
        kill(pid, SIGKILL);
        wait_for(pid);
        if (lorasync_engine_poll(e, 0, &err) == 0) v = served(e, 1);
        v += 100000; /* above what it may have published last */
    }
    close(said[0]), close(said[1]);
    lorasync_engine_close(e);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* The mark that an engine sets before it opens: a publisher that closes in between does not free. */
static void marks(void)
{
    lorasync_transport  t;
    lorasync_engine    *e;
    lorasync_error      err;
    lorasynci_shm_view *view;
    int                 slot;
    fresh_name();
    t = open_transport(1);
    e = open_engine(1, 0);
    CHECK_EQ(publish(&t, 1, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    view = ((lorasynci_shm_source *)e->places[0].source.user)->view;
    slot = lorasynci_shm_slot_of(view->map.control->adapters[0].word);
    CHECK_EQ((int)(view->reader->opened[slot / 64] >> (slot % 64) & 1), 1);
    CHECK_EQ(publish(&t, 2, &err), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ((int)(view->reader->pins[slot / 64] >> (slot % 64) & 1), 0); /* no longer pinned, but open */
    CHECK_EQ((int)(view->reader->opened[slot / 64] >> (slot % 64) & 1), 1);
    CHECK_EQ(lorasynci_shm_retire(inside(&t), slot), 0);
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_NOTHING_NEW);
    CHECK_EQ((int)(view->reader->opened[slot / 64] >> (slot % 64) & 1), 0);
    CHECK_EQ(lorasynci_shm_retire(inside(&t), slot), 1);
    CHECK_EQ(publish(&t, 3, &err), 0); /* takes it out of retirement */
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 3);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* Publisher and engine on two GPUs of one process. */
static void two_gpus(void)
{
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    int                device = -1;
    fresh_name();
    fake_cuda.devices = 2;
    t                 = open_transport(1);
    cudaSetDevice(1);
    e = open_engine(1, 0);
    cudaSetDevice(0);
    CHECK_EQ(publish(&t, 1, &err), 0);
    fake_cuda.no_peer_access = 1;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), LORASYNC_E_CUDA);
    CHECK_HAS(err.text, "cannot access");
    fake_cuda.no_peer_access = 0;
    CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
    CHECK_EQ(served(e, 1), 1);
    cudaGetDevice(&device);
    CHECK_EQ(device, 0);
    lorasync_engine_close(e);
    t.close(t.user);
    CHECK_EQ(fake_cuda_left(), 0);
}

/* -- offers of payloads in device memory, and slots that are lent */

static lorasync_delivery deliver(const picture *p)
{
    lorasync_delivery d;
    memset(&d, 0, sizeof d);
    d.size        = sizeof d;
    d.bytes       = p->image->header;
    d.num_bytes   = p->image->header_bytes;
    d.payload     = p->device;
    d.on_device   = 1;
    d.config_json = CONFIG;

    d.payload_bytes = p->image->payload_bytes;
    return d;
}

/* Each at an address of its own, more of them than there are tables; damaged ones between. */
static void offered(void)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    picture              p[40];
    uint64_t             v;
    fresh_name();
    memset(&desc, 0, sizeof desc);
    desc.offers_only = desc.accept_device = 1;
    REQUIRE(lorasync_engine_open(&desc, &e, &err) == 0);
    for (v = 0; v < 40; v++) p[v] = make_picture(v + 1, 0, v % 3 ? 64 : 200, 1);
    for (v = 0; v < 40; v++) {
        lorasync_delivery d        = deliver(&p[v]);
        const long        launches = fake_cuda.launches;
        unsigned char     right, wrong;
        CHECK_EQ(cudaMemcpy(&right, p[v].device, 1, cudaMemcpyDefault), cudaSuccess);
        wrong = (unsigned char)(right ^ 1);
        cudaMemcpy(p[v].device, &wrong, 1, cudaMemcpyDefault);
        CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_E_DIGEST);
        cudaMemcpy(p[v].device, &right, 1, cudaMemcpyDefault);
        d.config_json = "{"; /* fails while the digest is under way */
        CHECK(lorasync_engine_offer(e, &d, &err) < 0);
        d.config_json = CONFIG;
        CHECK_EQ(lorasync_engine_offer(e, &d, &err), 0);
        CHECK_EQ(lorasync_engine_offer(e, &d, &err), LORASYNC_NOTHING_NEW);
        CHECK_EQ(served(e, 1), v + 1);
        CHECK_EQ(fake_cuda.launches, launches + 4); /* one for each */
    }
    CHECK(fake_cuda.live_memory <= 40 + LORASYNCI_CHECKERS);
    { /* of the device nothing is applied */
        lorasync_image   *delta = NULL;
        uint64_t          digests[4];
        lorasync_delivery d;
        picture           next = make_picture(41, 0, 64, 0);
        memset(digests, 0, sizeof digests);
        REQUIRE(lorasync_image_delta(next.image, 40, digests, NULL, &delta, &err) == 0);
        memset(&d, 0, sizeof d);
        d.size = sizeof d, d.bytes = delta->header, d.num_bytes = delta->header_bytes;
        d.payload = next.bytes, d.payload_bytes = delta->payload_bytes;
        CHECK(lorasync_engine_offer(e, &d, &err) < 0);
        CHECK_EQ(served(e, 1), 40);
        lorasync_image_free(delta);
        drop_picture(&next);
    }
    lorasync_engine_close(e);
    for (v = 0; v < 40; v++) drop_picture(&p[v]);
    CHECK_EQ(fake_cuda_left(), 0);
}

static lorasync_status lend(const lorasync_transport *t, const lorasync_image *image, const uint64_t *open, size_t num,
                            lorasync_loan *out, lorasync_error *err)
{
    lorasync_loan_request want;
    memset(&want, 0, sizeof want);
    memset(out, 0, sizeof *out);
    want.size = sizeof want, want.image = image, want.on_device = 1;
    want.open_ids = open, want.num_open = num;
    return t->lend(t->user, &want, out, err);
}

static int has_id(const lorasync_transport *t, uint64_t id)
{
    int i, found = 0;
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) found += inside(t)->map.control->slots[i].serial == id;
    return found;
}

/* Memory that ranks have open is not freed while the session says so; nor ever, when they were left behind. */
static void lent_slots(void)
{
    int                left_behind;
    lorasync_transport t;
    lorasync_engine   *e;
    lorasync_error     err;
    for (left_behind = 0; left_behind < 2; left_behind++) {
        const int     session = 1;
        lorasync_loan loan, other;
        picture       p = make_picture(1, 0, 64, 0), large = make_picture(1, 0, 30000, 0);
        uint64_t      id;
        fresh_name();
        e = open_engine(1, 0);
        t = open_transport(1);
        CHECK_EQ(t.attach(t.user, &session, "default", &err), 0);
        CHECK_EQ(t.attach(t.user, &err, "default", &err), LORASYNC_E_BUSY);
        CHECK_EQ(lend(&t, p.image, NULL, 0, &loan, &err), 0);
        id = loan.id;
        CHECK(loan.reach == LORASYNC_REACH_IPC && id != 0 && (uintptr_t)loan.payload % 256 == 0);
        CHECK_EQ(publish(&t, 1, &err), 0); /* into that slot: it was the next one */
        CHECK_EQ(publish(&t, 2, &err), 0);
        CHECK_EQ(lend(&t, large.image, &id, 1, &other, &err), 0); /* nothing of the old size fits any more */
        CHECK_EQ(has_id(&t, id), 1);
        CHECK_EQ(publish_as(&t, 3, 0, 30000, 0, &err), 0);
        CHECK_EQ(lend(&t, large.image, &id, 1, &other, &err), 0);
        CHECK_EQ(publish_as(&t, 4, 0, 30000, 0, &err), 0);
        CHECK_EQ(has_id(&t, id), 1); /* it is still open */
        CHECK_EQ(lend(&t, large.image, left_behind ? &id : NULL, left_behind ? 1 : 0, &other, &err), 0);
        t.detach(t.user, &session, "default", left_behind);
        CHECK_EQ(has_id(&t, other.id), !left_behind); /* what was lent last may still be written to */
        CHECK_EQ(publish_as(&t, 5, 0, 20000, 0, &err), 0);
        CHECK_EQ(publish_as(&t, 6, 0, 80000, 0, &err), 0);
        CHECK_EQ(has_id(&t, id), left_behind);
        CHECK_EQ(lorasync_engine_poll(e, 0, &err), 0);
        CHECK_EQ(served(e, 1), 6);
        lorasync_engine_close(e);
        t.close(t.user);
        CHECK_EQ(fake_cuda.live_memory, left_behind ? 2 : 0); /* both stay, as long as the process */
        while (fake_cuda.num_memory) cudaFree(fake_cuda.memory[0].data);
        drop_picture(&p);
        drop_picture(&large);
        CHECK_EQ(fake_cuda_left(), 0);
    }
}

int main(void)
{
    RUN(same_process);
    RUN(layouts);
    RUN(other_process);
    RUN(pins);
    RUN(growth);
    RUN(wrong_digest);
    RUN(failures);
    RUN(ipc_refused);
    RUN(kinds);
    RUN(closed_publisher);
    RUN(removed);
    RUN(dead_publisher);
    RUN(dead_engine);
    RUN(killed_anywhere);
    RUN(marks);
    RUN(two_gpus);
    RUN(offered);
    RUN(lent_slots);
    lorasync_shm_remove(name, NULL);
    return test_summary("test_shm_cuda");
}
#endif
