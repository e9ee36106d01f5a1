/* How long it takes until an engine in another process holds a version.

   bench_wake [N] [--runs 1000] [--model 8b|0.6b|tiny] [--publish] [--no-verify] [--seed S]
   make bench-wake BENCH_ARGS="..."; bench/run_gpu.sh builds it with BENCH_CUDA as well and runs it on 2 GPUs.

   N processes (2), with BENCH_CUDA one per GPU, train: they hold FP32 shards (by rows) and sync them as BF16 into
   shared memory, with BENCH_CUDA into memory of GPU 0. One more process is the engine: it sleeps in
   lorasync_engine_poll, which verifies the digest of each version, and pins what it finds.
       begin to pinned    from a barrier, right before lorasync_begin, until lorasync_acquire has returned
       commit to pinned   from the transport's commit, the last thing that the root does
       begin to served    from the same barrier until lorasync_wait has returned on the root, for comparison
   With --publish nothing is gathered: one process stages and commits one image again and again (on the CPU). With
   --no-verify the engine pins before it verifies: what is then missing is the time of the digest.

   Before each run the root waits for a random time of up to 10 ms, so that the engine sleeps, and changes a parameter.
   Each version's digest is compared with that of the trainers. Times are CLOCK_MONOTONIC, which all processes share. */
#define LORASYNC_IMPLEMENTATION
#ifdef BENCH_CUDA
#define LORASYNC_CUDA
#endif
#include "lorasync.h"

#ifdef BENCH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <sys/prctl.h>
#include <sys/wait.h>

enum {
    MAX_RANKS   = 16,
    MAX_RUNS    = 100000,
    MAX_TENSORS = 1024
};

typedef struct model {
    const char *id, *name;
    int         layers, hidden, q, kv, mlp, r;
} model;

static const model models[] = {
    {"8b", "Qwen3-8B r32", 36, 4096, 4096, 1024, 12288, 32},
    {"0.6b", "Qwen3-0.6B r32", 28, 1024, 2048, 1024, 3072, 32},
    {"tiny", "tiny", 1, 64, 64, 64, 64, 4},
};

typedef struct options {
    int          ranks, runs, publish, no_verify;
    const model *m;
    unsigned     seed;
} options;

static options option;
static char    place[64]; /* the shared memory's name */

/* -- what the processes share */

typedef struct shared {
    int      waiting, turn; /* the barrier of the trainers */
    int      failed, ended;
    uint64_t held_version, held_digest, held_ns; /* the engine's; the version last */
    double   times[3][MAX_RUNS];                 /* milliseconds */
} shared;

static shared *common;

static void die(const char *what, const char *why)
{
    fprintf(stderr, "bench_wake: %s: %s\n", what, why);
    if (common) __atomic_store_n(&common->failed, 1, __ATOMIC_SEQ_CST);
    exit(1);
}

static void must(lorasync_status status, const char *what, const lorasync_error *err)
{
    if (status < 0) die(what, err->text);
}

static void *get(size_t num_bytes)
{
    void *p = calloc(1, num_bytes ? num_bytes : 1);
    if (!p) die("malloc", "out of memory");
    return p;
}

static void check_others(void)
{
    if (__atomic_load_n(&common->failed, __ATOMIC_SEQ_CST)) exit(1);
}

static void nap_us(unsigned us)
{
    struct timespec t;
    t.tv_sec  = us / 1000000;
    t.tv_nsec = (long)(us % 1000000) * 1000;
    nanosleep(&t, NULL);
}

static void barrier(void)
{
    int turn = __atomic_load_n(&common->turn, __ATOMIC_SEQ_CST);
    if (__atomic_add_fetch(&common->waiting, 1, __ATOMIC_SEQ_CST) == option.ranks) {
        __atomic_store_n(&common->waiting, 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(&common->turn, turn + 1, __ATOMIC_SEQ_CST);
        return;
    }
    while (__atomic_load_n(&common->turn, __ATOMIC_SEQ_CST) == turn) {
        check_others();
        sched_yield();
    }
}

/* -- the tensors */

typedef struct tensor {
    char    name[96];
    int64_t rows, columns;
} tensor;

static tensor tensors[MAX_TENSORS];
static int    num_tensors;

static void add(int layer, const char *module, int out, int in)
{
    int i;
    for (i = 0; i < 2; i++) {
        tensor *t  = &tensors[num_tensors++];
        t->rows    = i ? out : option.m->r;
        t->columns = i ? option.m->r : in;
        snprintf(t->name, sizeof t->name, "base_model.model.model.layers.%d.%s.lora_%c.weight", layer, module, "AB"[i]);
    }
}

static void make_tensors(void)
{
    const model *m = option.m;
    int          layer;
    for (layer = 0; layer < m->layers; layer++) {
        add(layer, "self_attn.q_proj", m->q, m->hidden);
        add(layer, "self_attn.k_proj", m->kv, m->hidden);
        add(layer, "self_attn.v_proj", m->kv, m->hidden);
        add(layer, "self_attn.o_proj", m->hidden, m->q);
        add(layer, "mlp.gate_proj", m->mlp, m->hidden);
        add(layer, "mlp.up_proj", m->mlp, m->hidden);
        add(layer, "mlp.down_proj", m->hidden, m->mlp);
    }
}

/* -- results */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static const char *verified(void) { return option.no_verify ? "verified after that" : "verified before that"; }

static void report(const char *what, double *times)
{
    qsort(times, (size_t)option.runs, sizeof *times, by_value);
    printf("  %-18s median %8.3f ms   99 of 100 below %8.3f   worst of %d %8.3f\n", what, times[option.runs / 2],
           times[option.runs - 1 - option.runs / 100], option.runs, times[option.runs - 1]);
}

/* -- memory of the trainers: host, or GPU `rank` */

#ifdef BENCH_CUDA
static void must_cuda(cudaError_t e, const char *what)
{
    if (e != cudaSuccess) die(what, cudaGetErrorString(e));
}

static void *get_parameters(size_t num_bytes)
{
    void *p = NULL;
    must_cuda(cudaMalloc(&p, num_bytes), "cudaMalloc");
    must_cuda(cudaMemset(p, 0, num_bytes), "cudaMemset");
    must_cuda(cudaStreamSynchronize(NULL), "cudaMemset");
    return p;
}

static void set_parameter(float *p, float value)
{
    must_cuda(cudaMemcpy(p, &value, sizeof value, cudaMemcpyHostToDevice), "cudaMemcpy");
}

static void use_gpu(int ordinal) { must_cuda(cudaSetDevice(ordinal), "cudaSetDevice"); }
#else
static void *get_parameters(size_t num_bytes) { return get(num_bytes); }
static void  set_parameter(float *p, float value) { *p = value; }
static void  use_gpu(int ordinal) { (void)ordinal; }
#endif

static lorasync_cuda on_gpu(void)
{
    lorasync_cuda cuda;
    memset(&cuda, 0, sizeof cuda);
    cuda.keep_on_device = 1;
    return cuda;
}

/* -- the engine's process */

static void serve(void)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    lorasync_error       err;
    uint64_t             version = 0;
    memset(&desc, 0, sizeof desc);
    use_gpu(0);
    desc.shm           = place;
    desc.no_verify     = option.no_verify;
    desc.accept_device = (lorasync_features() & LORASYNC_FEATURE_CUDA) != 0;
    must(lorasync_engine_open(&desc, &e, &err), "lorasync_engine_open", &err);
    while (!__atomic_load_n(&common->ended, __ATOMIC_SEQ_CST)) {
        const lorasync_adapter *a;
        check_others();
        must(lorasync_engine_poll(e, 1000, &err), "lorasync_engine_poll", &err);
        a = lorasync_acquire(e, "default");
        if (a && a->version != version) {
            common->held_ns     = lorasynci_now_ns();
            common->held_digest = a->image->digest;
            if (option.no_verify && !a->image->on_device)
                must(lorasync_image_verify(a->image, &err), "lorasync_image_verify", &err);
            version = a->version;
            __atomic_store_n(&common->held_version, version, __ATOMIC_SEQ_CST);
        }
        lorasync_release(a);
    }
    lorasync_engine_close(e);
}

/* Waits until the engine holds a version, and returns when that was. */
static uint64_t when_held(uint64_t version, uint64_t digest)
{
    const uint64_t late = lorasynci_now_ns() + UINT64_C(60000000000);
    while (__atomic_load_n(&common->held_version, __ATOMIC_SEQ_CST) < version) {
        check_others();
        if (lorasynci_now_ns() > late) die("the engine", "did not take a version within 60 s");
        nap_us(50);
    }
    if (common->held_version != version || common->held_digest != digest)
        die("the engine", "holds another version, or other bytes");
    return common->held_ns;
}

static double ms_between(uint64_t from, uint64_t to) { return ((double)to - (double)from) / 1e6; }

/* Long enough for the engine to go to sleep, at any point of whatever it does now and then. */
static void rest(unsigned *state)
{
    *state = *state * 1664525u + 1013904223u;
    nap_us(1000 + (*state >> 8) % 9000);
}

/* -- the trainers */

/* The transport, which says when it commits. */
typedef struct watched {
    lorasync_transport t;
    uint64_t           commit_ns;
} watched;

static watched transport;

static lorasync_status (*plain_commit)(void *user, const char *adapter, uint64_t version, lorasync_error *err);

static lorasync_status watched_commit(void *user, const char *adapter, uint64_t version, lorasync_error *err)
{
    transport.commit_ns = lorasynci_now_ns();
    return plain_commit(user, adapter, version, err);
}

static void open_transport(void)
{
    lorasync_shm_desc desc;
    lorasync_cuda     cuda = on_gpu();
    lorasync_error    err;
    memset(&desc, 0, sizeof desc);
    desc.name = place;
    if (lorasync_features() & LORASYNC_FEATURE_CUDA) desc.cuda = &cuda;
    must(lorasync_shm_open(&desc, &transport.t, &err), "lorasync_shm_open", &err);
    plain_commit       = transport.t.commit;
    transport.t.commit = watched_commit;
}

/* This rank's session, with its rows of every tensor; *out_first: one of its parameters. */
static lorasync_session *open_session(lorasync_local *local, int rank, float **out_first)
{
    lorasync_desc     desc;
    lorasync_comm     comm;
    lorasync_cuda     cuda = on_gpu();
    lorasync_session *s    = NULL;
    lorasync_error    err;
    int               i;
    memset(&desc, 0, sizeof desc);
    must(lorasync_local_join(local, rank, &comm, &err), "lorasync_local_join", &err);
    desc.comm       = &comm;
    desc.wire_dtype = LORASYNC_BF16;
    desc.lora_alpha = 32;
    if (lorasync_features() & LORASYNC_FEATURE_CUDA) desc.cuda = &cuda;
    must(lorasync_open(&desc, &s, &err), "lorasync_open", &err);
    for (i = 0; i < num_tensors; i++) {
        lorasync_piece p;
        memset(&p, 0, sizeof p);
        p.name     = tensors[i].name;
        p.dtype    = LORASYNC_F32;
        p.ndim     = 2;
        p.shape[0] = tensors[i].rows;
        p.shape[1] = tensors[i].columns;
        p.box      = lorasync_shard(lorasync_whole(p.shape, 2), 0, rank, option.ranks);
        p.data     = get_parameters((size_t)(p.box.len[0] * p.box.len[1]) * 4);
        if (i == 1) *out_first = (float *)p.data;
        must(lorasync_add(s, &p, &err), "lorasync_add", &err);
    }
    if (rank == 0) must(lorasync_attach(s, &transport.t, &err), "lorasync_attach", &err);
    must(lorasync_compile(s, &err), "lorasync_compile", &err);
    return s;
}

static void train(lorasync_local *local, int rank)
{
    lorasync_session *s;
    lorasync_report   r;
    lorasync_error    err;
    float            *first = NULL;
    unsigned          state = option.seed;
    int               i;
    use_gpu(rank);
    if (rank == 0) open_transport();
    s = open_session(local, rank, &first);
    for (i = -20; i < option.runs; i++) { /* 20 to warm up */
        const uint64_t version = (uint64_t)(i + 21);
        uint64_t       begun, ended, held;
        if (rank == 0) rest(&state);
        set_parameter(first, (float)version);
        barrier();
        begun = lorasynci_now_ns();
        must(lorasync_begin(s, version, &err), "lorasync_begin", &err);
        must(lorasync_wait(s, &r, &err), "lorasync_wait", &err);
        ended = lorasynci_now_ns();
        if (rank != 0) continue;
        held = when_held(version, r.digest);
        if (i < 0) continue;
        common->times[0][i] = ms_between(begun, held);
        common->times[1][i] = ms_between(transport.commit_ns, held);
        common->times[2][i] = ms_between(begun, ended);
    }
    if (rank == 0) {
        printf("%s, %d %s, %.1f MiB, %s%s; every digest %s and compared\n", option.m->name, option.ranks,
               lorasync_features() & LORASYNC_FEATURE_CUDA ? "GPUs" : "processes on the host",
               (double)r.payload_bytes / 1048576, r.direct ? "direct" : "by messages", r.in_place ? ", in place" : "",
               verified());
        report("begin to pinned", common->times[0]);
        report("commit to pinned", common->times[1]);
        report("begin to served", common->times[2]);
    }
    __atomic_store_n(&common->ended, 1, __ATOMIC_SEQ_CST);
    lorasync_close(s);
}

/* -- publishing alone */

static lorasync_image *make_image(void)
{
    static char         config[] = "{\"peft_type\":\"LORA\",\"r\":%d,\"lora_alpha\":32,\"target_modules\":[\"q_proj\","
                                   "\"k_proj\",\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\"]}";
    static char         text[400];
    lorasync_tensor    *list = (lorasync_tensor *)get((size_t)num_tensors * sizeof *list);
    lorasync_image_desc d;
    lorasync_image     *image = NULL;
    lorasync_error      err;
    int                 i;
    memset(&d, 0, sizeof d);
    for (i = 0; i < num_tensors; i++) {
        list[i].name     = tensors[i].name;
        list[i].dtype    = LORASYNC_BF16;
        list[i].ndim     = 2;
        list[i].shape[0] = tensors[i].rows;
        list[i].shape[1] = tensors[i].columns;
    }
    d.tensors     = list;
    d.num_tensors = (size_t)num_tensors;
    d.adapter     = "default";
    must(lorasync_image_layout(&d, NULL, &image, &err), "lorasync_image_layout", &err);
    snprintf(text, sizeof text, config, option.m->r);
    image->config_json = text;
    lorasync_image_bind(image, get(image->payload_bytes));
    free(list);
    return image;
}

static void publish(void)
{
    lorasync_image *image;
    lorasync_error  err;
    unsigned        state = option.seed;
    int             i;
    open_transport();
    image = make_image();
    for (i = -20; i < option.runs; i++) {
        const uint64_t version = (uint64_t)(i + 21);
        uint64_t       held;
        memcpy((void *)(uintptr_t)image->payload, &version, sizeof version);
        lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
        must(transport.t.stage(transport.t.user, image, &err), "stage", &err);
        rest(&state);
        must(transport.t.commit(transport.t.user, "default", version, &err), "commit", &err);
        held = when_held(version, image->digest);
        if (i >= 0) common->times[0][i] = ms_between(transport.commit_ns, held);
    }
    printf("%s, published by one process, %.1f MiB; every digest %s and compared\n", option.m->name,
           (double)image->payload_bytes / 1048576, verified());
    report("commit to pinned", common->times[0]);
    __atomic_store_n(&common->ended, 1, __ATOMIC_SEQ_CST);
    transport.t.close(transport.t.user);
}

/* -- */

static void read_options(int argc, char **argv)
{
    int i;
    option.ranks = 2;
    option.runs  = 1000;
    option.m     = &models[0];
    option.seed  = (unsigned)getpid();
    for (i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        size_t      k;
        if (argv[i][0] >= '0' && argv[i][0] <= '9') option.ranks = atoi(argv[i]);
        else if (strcmp(argv[i], "--publish") == 0) option.publish = 1;
        else if (strcmp(argv[i], "--no-verify") == 0) option.no_verify = 1;
        else if (strcmp(argv[i], "--runs") == 0) option.runs = atoi(value), i++;
        else if (strcmp(argv[i], "--seed") == 0) option.seed = (unsigned)atoi(value), i++;
        else if (strcmp(argv[i], "--model") == 0) {
            for (option.m = NULL, k = 0; k < sizeof models / sizeof *models; k++)
                if (strcmp(models[k].id, value) == 0) option.m = &models[k];
            i++;
        } else die(argv[i], "unknown; see the head of bench/bench_wake.c");
    }
    if (option.publish) option.ranks = 1;
    if (!option.m || option.ranks < 1 || option.ranks > MAX_RANKS || option.runs < 1 || option.runs > MAX_RUNS)
        die("options", "out of range; see the head of bench/bench_wake.c");
}

/* Each in a process of its own, which ends with this one. */
static void start(void (*run)(lorasync_local *local, int rank), lorasync_local *local, int rank)
{
    if (fork() != 0) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    run(local, rank);
    fflush(stdout);
    _exit(0);
}

static void run_engine(lorasync_local *local, int rank)
{
    (void)local, (void)rank;
    serve();
}

static void run_publish(lorasync_local *local, int rank)
{
    (void)local, (void)rank;
    publish();
}

int main(int argc, char **argv)
{
    lorasync_local *local = NULL;
    lorasync_error  err;
    int             i, status, bad = 0;
    read_options(argc, argv);
    make_tensors();
    snprintf(place, sizeof place, "bench-wake-%ld", (long)getpid());
    common = (shared *)mmap(NULL, sizeof *common, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (common == MAP_FAILED) return 1;
    must(lorasync_local_open(option.ranks, &local, &err), "lorasync_local_open", &err);
    start(run_engine, local, 0);
    for (i = 0; i < option.ranks; i++) start(option.publish ? run_publish : train, local, i);
    for (i = 0; i < option.ranks + 1; i++) {
        if (wait(&status) > 0 && status == 0) continue;
        bad = 1;
        __atomic_store_n(&common->failed, 1, __ATOMIC_SEQ_CST);
    }
    lorasync_local_close(local);
    lorasync_shm_remove(place, NULL);
    return bad;
}
