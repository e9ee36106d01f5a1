/* Payloads in real device memory from one process to another over CUDA IPC: `make test-gpu`. Needs one GPU.
   The adapter is that of a Qwen3-8B of rank 32: 504 tensors, 174.6 MB of bf16. Bytes are checked over several versions;
   then the publisher is timed from a complete image on its device to the moment at which the engine can acquire the
   version: copied into the engine's slot; gathered there, as sessions do; and copied for an engine that does not
   verify. Then it is killed under the engine. gpu_shm [ROUNDS]: versions to time, 20 without it. */
#define LORASYNC_CUDA
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"

#include <sys/wait.h>

#ifndef LAYERS
#define LAYERS 36
#endif
enum {
    NUM_TENSORS = LAYERS * 14,
    RANK        = 32,
    CHECKED     = 6,
    WARM        = 4,
    MAX_ROUNDS  = 1000
};

/* How a version is published. Engines that verify take the first two. */
enum {
    COPIED,
    IN_PLACE,
    CARELESS,
    KINDS
};
static const char CONFIG[] =
    "{\"peft_type\":\"LORA\",\"r\":32,\"lora_alpha\":64,\"target_modules\":[\"q_proj\",\"k_proj\",\"v_proj\","
    "\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\"]}";

/* What the three processes share. */
typedef struct board {
    uint64_t asked, staged, served;          /* versions. Atomic */
    uint64_t start_ns, staged_ns, served_ns; /* of the last one */
    uint64_t engine;                         /* versions up to this one are for the engine that checks digests;
                                                atomic */
    int      failed;                         /* atomic */
    uint64_t total_ns[KINDS][MAX_ROUNDS], stage_ns[KINDS][MAX_ROUNDS];
} board;

static board *shared;
static int    rounds = 20;
static char   name[64];

static uint64_t load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static void     store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }

/* Ends the process; the others see it. */
static void fail(const char *who, const char *what)
{
    fprintf(stderr, "%s: %s\n", who, what);
    __atomic_store_n(&shared->failed, 1, __ATOMIC_SEQ_CST);
    _exit(1);
}

/* Spins: what is timed must not wait for a scheduler. */
static void await(const char *who, const uint64_t *p, uint64_t v)
{
    while (load(p) < v)
        if (__atomic_load_n(&shared->failed, __ATOMIC_SEQ_CST)) fail(who, "the other side failed");
}

static lorasync_image *lay_out(void)
{
    static const char *const modules[7] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                           "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                           "mlp.down_proj"};
    static const int         in[7]      = {4096, 4096, 4096, 4096, 4096, 4096, 12288},
                     out[7]             = {4096, 1024, 1024, 4096, 12288, 12288, 4096};
    static char            names[NUM_TENSORS][128];
    static lorasync_tensor t[NUM_TENSORS];
    lorasync_image_desc    desc;
    lorasync_image        *image = NULL;
    lorasync_error         err;
    int                    i;
    for (i = 0; i < NUM_TENSORS; i++) {
        int module = i / 2 % 7;
        snprintf(names[i], sizeof names[i], "base_model.model.model.layers.%d.%s.lora_%s.weight", i / 14,
                 modules[module], i % 2 ? "B" : "A");
        t[i].name     = names[i];
        t[i].dtype    = LORASYNC_BF16;
        t[i].ndim     = 2;
        t[i].shape[0] = i % 2 ? out[module] : RANK;
        t[i].shape[1] = i % 2 ? RANK : in[module];
    }
    memset(&desc, 0, sizeof desc);
    desc.tensors     = t;
    desc.num_tensors = NUM_TENSORS;
    desc.adapter     = "default";
    if (lorasync_image_layout(&desc, NULL, &image, &err) < 0) fail("layout", err.text);
    image->config_json = CONFIG;
    return image;
}

/* Every word follows from the version. */
static void fill(uint64_t *words, size_t num_bytes, uint64_t version)
{
    size_t i;
    for (i = 0; i < num_bytes / 8; i++) words[i] = (version * 0x9e3779b97f4a7c15ull + i) * 0xbf58476d1ce4e5b9ull;
}

/* -- the publisher */

static void publish(lorasync_transport *t, lorasync_image *image, void *host, void *device, int kind, uint64_t version)
{
    lorasync_error        err;
    lorasync_status       status;
    lorasync_loan_request want;
    lorasync_loan         loan;
    char                 *slot = (char *)device;
    memset(&want, 0, sizeof want);
    memset(&loan, 0, sizeof loan);
    want.size  = sizeof want;
    want.image = image, want.on_device = 1;
    if (cudaGetDevice(&want.ordinal) != cudaSuccess) fail("publisher", "cudaGetDevice");
    if (kind == IN_PLACE && t->lend(t->user, &want, &loan, &err) != LORASYNC_OK) fail("publisher", "nothing is lent");
    if (kind == IN_PLACE) slot = (char *)loan.payload;
    fill((uint64_t *)host, image->payload_bytes, version);
    lorasync_image_bind(image, host);
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    if (cudaMemcpy(slot, host, image->payload_bytes, cudaMemcpyDefault) != cudaSuccess ||
        cudaDeviceSynchronize() != cudaSuccess)
        fail("publisher", "cudaMemcpy");
    lorasync_image_bind(image, slot);
    image->on_device = 1;
    store(&shared->asked, version);
    shared->start_ns = test_now_ns();
    status           = t->stage(t->user, image, &err);
    if (status >= 0) status = t->commit(t->user, "default", version, &err);
    shared->staged_ns = test_now_ns();
    image->on_device  = 0;
    if (status < 0) fail("publisher", err.text);
    store(&shared->staged, version);
    await("publisher", &shared->served, version);
}

static void keep_times(int kind, uint64_t i)
{
    shared->total_ns[kind][i] = shared->served_ns - shared->start_ns;
    shared->stage_ns[kind][i] = shared->staged_ns - shared->start_ns;
}

static void run_publisher(void)
{
    lorasync_transport t;
    lorasync_shm_desc  desc;
    lorasync_cuda      cuda;
    lorasync_error     err;
    lorasync_image    *image = lay_out();
    void              *host = NULL, *device = NULL;
    uint64_t           v = 0, i;
    int                kind;
    alarm(300);
    memset(&desc, 0, sizeof desc);
    memset(&cuda, 0, sizeof cuda);
    desc.name = name;
    desc.cuda = &cuda;
    if (lorasync_shm_open(&desc, &t, &err) < 0) fail("publisher", err.text);
    if (cudaHostAlloc(&host, image->payload_bytes, cudaHostAllocDefault) != cudaSuccess ||
        cudaMalloc(&device, image->payload_bytes) != cudaSuccess)
        fail("publisher", "no memory");
    for (i = 0; i < CHECKED; i++) publish(&t, image, host, device, i % 2 ? IN_PLACE : COPIED, ++v);
    for (kind = 0; kind < KINDS; kind++)
        for (i = 0; i < WARM + (uint64_t)rounds; i++) {
            publish(&t, image, host, device, kind, ++v);
            if (i >= WARM) keep_times(kind, i - WARM);
        }
    raise(SIGKILL); /* the engine holds the last version */
}

/* -- the engine */

static lorasync_engine *open_engine(int no_verify)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    memset(&desc, 0, sizeof desc);
    desc.shm           = name;
    desc.accept_device = 1;
    desc.no_verify     = no_verify;
    if (lorasync_engine_open(&desc, &e, &err) < 0) fail("engine", err.text);
    return e;
}

/* Every byte of a version, over the host. */
static void check_bytes(const lorasync_adapter *a, uint64_t version, uint64_t *host, uint64_t *expected)
{
    if (!a || a->version != version || !a->image->on_device) fail("engine", "another version, or not on the device");
    fill(expected, a->image->payload_bytes, version);
    memset(host, 0, a->image->payload_bytes);
    if (cudaMemcpy(host, a->image->payload, a->image->payload_bytes, cudaMemcpyDefault) != cudaSuccess)
        fail("engine", "cudaMemcpy");
    if (memcmp(host, expected, a->image->payload_bytes) != 0) fail("engine", "wrong bytes");
}

/* Polls from the moment that the publisher begins to stage. An engine that is new finds the version before first. */
static void follow(lorasync_engine *e, uint64_t version)
{
    const lorasync_adapter *a = NULL;
    lorasync_error          err;
    await("engine", &shared->asked, version);
    while (!a || a->version < version) {
        lorasync_status status = lorasync_engine_poll(e, 0, &err);
        if (status < 0) fail("engine", err.text);
        if (__atomic_load_n(&shared->failed, __ATOMIC_SEQ_CST)) fail("engine", "the publisher failed");
        lorasync_release(a);
        a = lorasync_acquire(e, "default");
    }
    shared->served_ns = test_now_ns();
    if (a->version != version) fail("engine", "another version was served");
    lorasync_release(a);
    await("engine", &shared->staged, version); /* the publisher has written its times */
}

static void after_the_kill(lorasync_engine *e, uint64_t version, uint64_t *host, uint64_t *expected)
{
    const lorasync_adapter *a    = lorasync_acquire(e, "default");
    lorasync_engine        *late = open_engine(0);
    lorasync_error          err;
    uint64_t                end    = test_now_ns() + 5000000000u;
    lorasync_status         status = LORASYNC_OK;
    while (status != LORASYNC_E_IO && test_now_ns() < end) { /* while it dies */
        status = lorasync_engine_poll(late, 0, &err);
        if (status >= 0) lorasync_engine_close(late), late = open_engine(0);
    }
    if (status != LORASYNC_E_IO || !strstr(err.text, "which has ended"))
        fail("engine", "a dead publisher's memory was opened");
    check_bytes(a, version, host, expected);
    lorasync_release(a);
    lorasync_engine_close(late);
}

static void run_engine(void)
{
    lorasync_image  *image = lay_out();
    lorasync_engine *e     = open_engine(0), *careless;
    uint64_t *host = (uint64_t *)malloc(image->payload_bytes), *expected = (uint64_t *)malloc(image->payload_bytes);
    uint64_t  v = 0, i;
    alarm(300);
    if (!host || !expected) fail("engine", "no memory");
    for (i = 0; i < CHECKED + CARELESS * (WARM + (uint64_t)rounds); i++) {
        const lorasync_adapter *a;
        follow(e, ++v);
        a = lorasync_acquire(e, "default");
        if (i < CHECKED) check_bytes(a, v, host, expected);
        lorasync_release(a);
        store(&shared->served, v);
    }
    careless = open_engine(1);
    for (i = 0; i < WARM + (uint64_t)rounds; i++) {
        follow(careless, ++v);
        if (i + 1 < WARM + (uint64_t)rounds) store(&shared->served, v);
    }
    store(&shared->served, v);
    after_the_kill(careless, v, host, expected);
    lorasync_engine_close(careless);
    lorasync_engine_close(e);
    _exit(0);
}

/* -- the figures */

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static double median_ms(uint64_t *times)
{
    qsort(times, (size_t)rounds, sizeof *times, by_value);
    return (double)times[rounds / 2] / 1e6;
}

static int end_of(pid_t pid)
{
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status) == SIGKILL ? 0 : 1;
}

static void device_payloads(void)
{
    lorasync_image *image;
    pid_t           engine, publisher;
    double          ms[KINDS], stage[KINDS], gb;
    int             kind;
    void           *map = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(map != MAP_FAILED);
    shared = (board *)map;
    snprintf(name, sizeof name, "gpu-shm-%ld", (long)getpid());
    lorasync_shm_remove(name, NULL);
    fflush(stdout);
    engine = fork();
    if (engine == 0) run_engine();
    publisher = fork();
    if (publisher == 0) run_publisher();
    CHECK_EQ(end_of(publisher), 0); /* killed, as it asked for; reaped at once: a zombie is not quite gone */
    CHECK_EQ(end_of(engine), 0);
    lorasync_shm_remove(name, NULL);
    if (test_errors) return;
    image = lay_out();
    gb    = (double)image->payload_bytes / 1e9;
    for (kind = 0; kind < KINDS; kind++)
        ms[kind] = median_ms(shared->total_ns[kind]), stage[kind] = median_ms(shared->stage_ns[kind]);
    printf("%d tensors, %.1f MB, complete on the device to served, medians of %d\n", NUM_TENSORS, gb * 1e3, rounds);
    printf("copied into the slot    %.3f ms (%.0f GB/s), of it stage and commit %.3f ms\n", ms[COPIED],
           gb / ms[COPIED] * 1e3, stage[COPIED]);
    printf("gathered into the slot  %.3f ms, of it stage and commit %.3f ms\n", ms[IN_PLACE], stage[IN_PLACE]);
    printf("copied, not verified    %.3f ms, of it stage and commit %.3f ms\n", ms[CARELESS], stage[CARELESS]);
    lorasync_image_free(image);
}

/* Counted by a child: a process that has touched CUDA must not fork others that use it. */
static int count_gpus(void)
{
    int   status = 0, num = 0;
    pid_t pid = fork();
    if (pid == 0) _exit(cudaGetDeviceCount(&num) == cudaSuccess ? num : 0);
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

int main(int argc, char **argv)
{
    if (argc > 1) rounds = atoi(argv[1]);
    if (rounds < 1 || rounds > MAX_ROUNDS) rounds = 20;
    if (count_gpus() == 0) {
        printf("skip gpu_shm: no GPU here\n");
        test_skipped++;
        return test_summary("gpu_shm");
    }
    RUN(device_payloads);
    return test_summary("gpu_shm");
}
