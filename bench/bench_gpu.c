/* What gathering LoRA shards costs between GPUs, beside what it cannot cost less than.

   bench_gpu [N] [--layout fsdp|tp2|ep] [--json] [--only MODEL] [--quick] [--own-comm] [--bucket MIB] [--seed S]
             [--deadline SECONDS]
   bench/run_gpu.sh builds and runs it.

   N processes, one per GPU (rank = GPU number), hold fp32 shards; rank 0 gets the bf16 image. The shards:
       fsdp        every tensor by rows over N ranks (the odd set: some by columns)
       tp2         2 tensor-parallel halves of N / 2 ranks each: of q, k, v, gate and up lora_B by rows, of o and down
                   lora_A by columns; the other
                   of the pair is in both halves. Then by rows over the N / 2
       ep          experts whole, block by block of E / N; what is no expert's as fsdp
   Per model:
       direct      a plan that writes over CUDA IPC             nccl         the same plan over NCCL, no_direct
       dnccl       as direct, and NCCL joins the ranks
       ncclsend    floor: the bytes that the other ranks send, already packed, one ncclSend each
       copy        floor: the same bytes, one copy each into rank 0's memory, mapped over CUDA IPC
       fused       floor: one flat tensor of as many elements: one launch that casts and writes, no work per tensor
       reshard     from these shards to TP over N, over NCCL
       rdirect     the same, every rank writing to the others over CUDA IPC; rdnccl: so, too, and NCCL joins the ranks
       exchange    floor of the reshard: its messages, already packed, in one group of ncclSend and ncclRecv
   NCCL's communicator is the bench's own, borrowed; with --own-comm the library makes one for itself, which is
   non-blocking. --bucket is bucket_bytes of the plans over NCCL: 256 without it. A rank that sends more stages a
   bucket, and stalls its caller the longer. Times are from a barrier to the end on rank 0 (reshard: on the last rank),
   by the host's clock. "stall" is how long the caller's own stream is held up: events around begin, behind other work,
   the slowest rank. Medians. Images are compared bit by bit.

   The content of the parameters, the same in torch_gather.py. Elements are numbered through a model, tensor after
   tensor as made here, row by row; element p has, in arithmetic modulo 2^32:
       h = p + seed;  h ^= h >> 16;  h *= 0x21f0aaad;  h ^= h >> 15;  h *= 0x735a2d97;  h ^= h >> 15
       float bits = (h & 0x80000000) | (111 + (h >> 23 & 15)) << 23 | (h & 0x7fffff)
   The checksum of a bf16 image, w[i] its i-th 16-bit word, modulo 2^64: sum of (w[i] + 1) * (i * 0x9e3779b97f4a7c15 |
   1) */
#define LORASYNC_IMPLEMENTATION
#ifndef BENCH_HOST /* host memory and empty stand-ins for CUDA and NCCL: to try this program's own logic without a
                      GPU */
#define LORASYNC_CUDA
#ifndef BENCH_NO_NCCL
#define LORASYNC_NCCL
#endif
#endif
#include "lorasync.h"

#include <cuda_runtime_api.h>
#ifndef BENCH_NO_NCCL
#include <nccl.h>
#endif

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum {
    MAX_RANKS   = 16,
    MAX_RUNS    = 60,
    MAX_ITEMS   = 96,
    MAX_THREADS = 16,
    MODES       = 5
};

static const double stuck_after    = 60; /* seconds in one stage */
static const int    plan_timeout   = 30000;
static const size_t staging_bytes  = (size_t)64 << 20;
static const size_t busy_bytes     = (size_t)512 << 20;
static const size_t piece_boundary = 256; /* as torch's allocator */

typedef enum layout {
    FSDP,
    TP2,
    EP
} layout;

static const char *const layout_names[] = {"fsdp", "tp2", "ep"};

typedef struct options {
    int         ranks, json, quick, own_comm, bucket_mib;
    layout      layout;
    const char *only;
    uint32_t    seed;
    double      deadline;
} options;

static options option;

/* -- what the processes share */

typedef struct result {
    int  num;
    int  attempted, complete, printed;
    char checksum[24];
    char error[2000];
    struct {
        char   key[32];
        double value;
    } item[MAX_ITEMS];
} result;

enum {
    NUM_MODELS = 5
};

typedef struct shared {
    int      waiting, turn; /* the barrier */
    int      more;
    int      model;
    int      nccl_lost;
    int      bad[MAX_RANKS];
    double   progress; /* when the barrier was last passed */
    double   end[MAX_RANKS], value[MAX_RANKS];
    uint64_t number[MAX_RANKS];
    uint64_t flag[MAX_RANKS];
    int      finished[MAX_RANKS];
    char     stage[MAX_RANKS][64];
    char     error[MAX_RANKS][512];
    char     ipc[64], nccl_id[128];
    char     info[1000];
    result   results[NUM_MODELS];
} shared;

static shared         *common;
static lorasync_local *locals[NUM_MODELS][MODES]; /* one per plan: a lost one spoils no other */
static int             rank;
static int             over_nccl; /* what is run now uses the NCCL communicator: a failure loses it */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void die(const char *what, const char *why)
{
    fprintf(stderr, "bench_gpu: rank %d, %s: %s: %s\n", rank, common ? common->stage[rank] : "", what, why);
    _exit(1);
}

static void must(cudaError_t e, const char *what)
{
    if (e != cudaSuccess) die(what, cudaGetErrorString(e));
}

static void *get(size_t num_bytes)
{
    void *p = malloc(num_bytes ? num_bytes : 1);
    if (!p) die("malloc", "out of memory");
    return p;
}

static void pause_a_bit(unsigned *turns)
{
    if (++*turns > 4000) sched_yield();
}

static void barrier(const char *stage)
{
    int      turn  = __atomic_load_n(&common->turn, __ATOMIC_ACQUIRE);
    unsigned turns = 0;
    double   late  = now() + stuck_after;
    snprintf(common->stage[rank], sizeof common->stage[rank], "%s", stage);
    if (__atomic_add_fetch(&common->waiting, 1, __ATOMIC_ACQ_REL) == option.ranks) {
        __atomic_store_n(&common->waiting, 0, __ATOMIC_RELAXED);
        common->progress = now();
        __atomic_store_n(&common->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    while (__atomic_load_n(&common->turn, __ATOMIC_ACQUIRE) == turn) {
        pause_a_bit(&turns);
        if (turns % 4096 == 0 && now() > late) die("barrier", "another rank did not come");
    }
}

static int any_bad(void)
{
    int i;
    for (i = 0; i < option.ranks; i++)
        if (common->bad[i]) return 1;
    return 0;
}

/* Adds a line to the errors of this model. Rank 0 calls it, after a barrier. */
static void note(result *res, const char *what, const char *why)
{
    size_t n = strlen(res->error);
    snprintf(res->error + n, sizeof res->error - n, "%s%s: %s", n ? " | " : "", what, why);
}

static void note_errors(result *res, const char *what)
{
    int i;
    for (i = 0; rank == 0 && i < option.ranks; i++)
        if (common->bad[i]) {
            note(res, what, common->error[i]);
            return;
        }
}

static void say_status(lorasync_status status, const lorasync_error *err)
{
    common->bad[rank] = status < 0;
    if (status < 0) snprintf(common->error[rank], sizeof common->error[rank], "rank %d: %.400s", rank, err->text);
    if (lorasync_is_lost(status) && over_nccl) common->nccl_lost = 1;
}

/* Whether every rank succeeded. */
static int agree(result *res, const char *what, lorasync_status status, const lorasync_error *err)
{
    int good;
    say_status(status, err);
    barrier(what);
    good = !any_bad();
    note_errors(res, what);
    barrier(what);
    return good;
}

static void put(result *res, const char *key, double value)
{
    if (rank != 0 || res->num == MAX_ITEMS) return;
    snprintf(res->item[res->num].key, sizeof res->item[0].key, "%s", key);
    res->item[res->num++].value = value;
}

/* -- threads for filling and comparing */

typedef struct work {
    void (*one)(void *user, size_t i);
    void  *user;
    size_t num, next;
} work;

static void *worker(void *p)
{
    work  *w = (work *)p;
    size_t i;
    while ((i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->num) w->one(w->user, i);
    return NULL;
}

static void for_each(size_t num, void (*one)(void *user, size_t i), void *user)
{
    pthread_t thread[MAX_THREADS];
    work      w;
    long      i, n = 0, want = sysconf(_SC_NPROCESSORS_ONLN) / option.ranks;
    w.one  = one;
    w.user = user;
    w.num  = num;
    w.next = 0;
    if (want > MAX_THREADS) want = MAX_THREADS;
    for (i = 1; i < want && (size_t)i < num; i++, n++)
        if (pthread_create(&thread[n], NULL, worker, &w) != 0) break;
    worker(&w);
    for (i = 0; i < n; i++) pthread_join(thread[i], NULL);
}

/* -- models */

typedef struct model {
    const char *id, *name;
    int         layers, hidden, q, kv, mlp, experts, r; /* experts 0: one dense MLP; layers 0: the odd set */
} model;

static const model models[NUM_MODELS] = {
    {"qwen3-0.6b", "Qwen3-0.6B r32", 28, 1024, 2048, 1024, 3072, 0, 32},
    {"qwen3-8b", "Qwen3-8B r32", 36, 4096, 4096, 1024, 12288, 0, 32},
    {"llama-3-70b", "Llama-3-70B r64", 80, 8192, 8192, 1024, 28672, 0, 64},
    {"qwen3-30b-a3b", "Qwen3-30B-A3B r16", 48, 2048, 4096, 512, 768, 128, 16},
    {"odd", "odd shapes", 0, 0, 0, 0, 0, 0, 0},
};

typedef struct tensor {
    char    name[96];
    int     ndim, dim; /* dim is split over the ranks */
    int     tp_dim;    /* split by tensor parallelism; -1: in every half */
    int     expert;    /* -1: no expert's */
    int64_t shape[2], numel, base;
} tensor;

typedef struct set {
    tensor  *at;
    tensor **by_name;
    size_t   num;
    int64_t  numel;
} set;

static tensor *add(set *s, const char *name, int64_t rows, int64_t columns, int dim)
{
    tensor *t = &s->at[s->num++];
    memset(t, 0, sizeof *t);
    t->tp_dim = t->expert = -1;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->ndim     = columns ? 2 : 1;
    t->dim      = dim;
    t->shape[0] = rows;
    t->shape[1] = columns;
    t->numel    = columns ? rows * columns : rows;
    t->base     = s->numel;
    s->numel += t->numel;
    return t;
}

/* Tensor parallelism splits what comes out of q, k, v, gate and up, and what goes into o and down. */
static void add_pair(set *s, const model *m, int layer, int expert, const char *module, int out, int in)
{
    char    name[96];
    tensor *t;
    int     by_input = strstr(module, "o_proj") || strstr(module, "down_proj");
    snprintf(name, sizeof name, "base_model.model.model.layers.%d.%.40s.lora_A.weight", layer, module);
    t         = add(s, name, m->r, in, 0);
    t->expert = expert;
    if (by_input) t->tp_dim = 1;
    snprintf(name, sizeof name, "base_model.model.model.layers.%d.%.40s.lora_B.weight", layer, module);
    t         = add(s, name, out, m->r, 0);
    t->expert = expert;
    if (!by_input) t->tp_dim = 0;
}

static void add_mlp(set *s, const model *m, int layer, int expert, const char *path)
{
    char module[64];
    snprintf(module, sizeof module, "%.30s.gate_proj", path);
    add_pair(s, m, layer, expert, module, m->mlp, m->hidden);
    snprintf(module, sizeof module, "%.30s.up_proj", path);
    add_pair(s, m, layer, expert, module, m->mlp, m->hidden);
    snprintf(module, sizeof module, "%.30s.down_proj", path);
    add_pair(s, m, layer, expert, module, m->hidden, m->mlp);
}

/* Rows that no rank count divides, odd row lengths, single elements, vectors, and splits of dimension 1. */
static void add_odd(set *s)
{
    char name[96];
    int  i;
    for (i = 0; i < 96; i++) {
        snprintf(name, sizeof name, "odd.%d.weight", i);
        if (i % 4 == 0) add(s, name, 1, i % 8 ? 1 : 0, 0);
        else if (i % 4 == 1) add(s, name, 64 * i + 3, 2 * i + 1, 0);
        else if (i % 4 == 2) add(s, name, 8 * i + 1, 5 * i + 7, 1);
        else add(s, name, 1001 + 13 * i, 0, 0);
    }
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(tensor *const *)a)->name, (*(tensor *const *)b)->name);
}

static set make_set(const model *m)
{
    set    s;
    char   path[32];
    size_t i, max = m->layers ? (size_t)m->layers * (8 + 6 * (size_t)(m->experts ? m->experts : 1)) : 96;
    int    layer, e;
    memset(&s, 0, sizeof s);
    s.at      = (tensor *)get(max * sizeof *s.at);
    s.by_name = (tensor **)get(max * sizeof *s.by_name);
    if (!m->layers) add_odd(&s);
    for (layer = 0; layer < m->layers; layer++) {
        add_pair(&s, m, layer, -1, "self_attn.q_proj", m->q, m->hidden);
        add_pair(&s, m, layer, -1, "self_attn.k_proj", m->kv, m->hidden);
        add_pair(&s, m, layer, -1, "self_attn.v_proj", m->kv, m->hidden);
        add_pair(&s, m, layer, -1, "self_attn.o_proj", m->hidden, m->q);
        if (!m->experts) add_mlp(&s, m, layer, -1, "mlp");
        for (e = 0; e < m->experts; e++) {
            snprintf(path, sizeof path, "mlp.experts.%d", e);
            add_mlp(&s, m, layer, e, path);
        }
    }
    for (i = 0; i < s.num; i++) s.by_name[i] = &s.at[i];
    qsort(s.by_name, s.num, sizeof *s.by_name, by_name);
    return s;
}

/* What a rank holds of a tensor. */
static lorasync_box box_of(const model *m, const tensor *t, int r)
{
    lorasync_box b    = lorasync_whole(t->shape, t->ndim);
    int          half = option.ranks / 2;
    if (option.layout == EP && t->expert >= 0) {
        if (t->expert * option.ranks / m->experts != r) b.len[0] = 0;
        return b;
    }
    if (option.layout != TP2) return lorasync_shard(b, t->dim, r, option.ranks);
    if (t->tp_dim >= 0) b = lorasync_shard(b, t->tp_dim, r / half, 2);
    return lorasync_shard(b, t->dim, r % half, half);
}

static void free_set(set *s)
{
    free(s->at);
    free(s->by_name);
}

/* -- content */

static void hash_floats(float *out, uint32_t first, size_t n)
{
    uint32_t *bits = (uint32_t *)(void *)out, seed = option.seed;
    size_t    i;
    for (i = 0; i < n; i++) {
        uint32_t h = first + (uint32_t)i + seed;
        h ^= h >> 16;
        h *= 0x21f0aaadu;
        h ^= h >> 15;
        h *= 0x735a2d97u;
        h ^= h >> 15;
        bits[i] = (h & 0x80000000u) | (111u + (h >> 23 & 15u)) << 23 | (h & 0x7fffffu);
    }
}

static int64_t box_numel(const lorasync_box *b) { return b->ndim == 2 ? b->len[0] * b->len[1] : b->len[0]; }

/* The elements of a box, row by row. */
static void content(const tensor *t, const lorasync_box *b, float *out)
{
    int64_t i, columns = t->ndim == 2 ? t->shape[1] : 1, width = t->ndim == 2 ? b->len[1] : 1,
               off = t->ndim == 2 ? b->off[1] : 0;
    if (width == columns) {
        hash_floats(out, (uint32_t)(t->base + b->off[0] * columns), (size_t)(b->len[0] * columns));
        return;
    }
    for (i = 0; i < b->len[0]; i++)
        hash_floats(out + i * width, (uint32_t)(t->base + (b->off[0] + i) * columns + off), (size_t)width);
}

/* Whether a box lies at `bytes` as lorasync_convert rounds it. */
static int is_content(const tensor *t, const lorasync_box *b, const void *bytes)
{
    size_t         n = (size_t)box_numel(b);
    float         *f = (float *)get(n * 4);
    void          *h = get(n * 2);
    lorasync_error err;
    int            same;
    content(t, b, f);
    same = lorasync_convert(h, LORASYNC_BF16, f, LORASYNC_F32, n, &err) == LORASYNC_OK && memcmp(h, bytes, n * 2) == 0;
    free(f);
    free(h);
    return same;
}

/* -- this rank's parameters: all in one device buffer */

typedef struct state {
    const model    *m;
    result         *res;
    int             index; /* of the model */
    set             s;
    lorasync_piece *have;  /* one per tensor */
    lorasync_piece *given; /* those that the library is told of: of another rank's experts this one knows nothing */
    size_t          num_given;
    char           *params;
    size_t          params_bytes;
    uint64_t        sent; /* bytes that this rank sends in a gather */
} state;

static cudaStream_t stream;
static cudaEvent_t  event0, event1, eventd;
static void        *busy; /* memory to keep a stream occupied with */
static int          gpus;

static size_t aligned(size_t n) { return (n + piece_boundary - 1) / piece_boundary * piece_boundary; }

typedef struct fill_job {
    const state *st;
    char        *staging;
    size_t       first; /* piece, and byte in params, that staging begins with */
    char        *from;
} fill_job;

static void fill_one(void *user, size_t i)
{
    fill_job             *job = (fill_job *)user;
    const lorasync_piece *p   = &job->st->have[job->first + i];
    content(&job->st->s.at[job->first + i], &p->box, (float *)(void *)(job->staging + ((char *)p->data - job->from)));
}

static void fill_params(state *st)
{
    fill_job job;
    size_t   i  = 0, end, bytes;
    job.st      = st;
    job.staging = (char *)get(staging_bytes);
    while (i < st->s.num) {
        job.first = i;
        job.from  = (char *)st->have[i].data;
        for (end = 0; i < st->s.num; i++) {
            bytes = (size_t)((char *)st->have[i].data - job.from) + (size_t)box_numel(&st->have[i].box) * 4;
            if (bytes > staging_bytes) break;
            end = bytes;
        }
        if (i == job.first) die("fill", "a piece is larger than staging");
        for_each(i - job.first, fill_one, &job);
        if (end) must(cudaMemcpy(job.from, job.staging, end, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    free(job.staging);
}

static lorasync_piece piece_of(const tensor *t, lorasync_dtype dtype, lorasync_box box)
{
    lorasync_piece p;
    memset(&p, 0, sizeof p);
    p.name     = t->name;
    p.dtype    = dtype;
    p.ndim     = t->ndim;
    p.shape[0] = t->shape[0];
    p.shape[1] = t->shape[1];
    p.box      = box;
    return p;
}

static void make_params(state *st)
{
    size_t i, at = 0, flat;
    st->s     = make_set(st->m);
    st->have  = (lorasync_piece *)get(st->s.num * sizeof *st->have);
    st->given = (lorasync_piece *)get(st->s.num * sizeof *st->given);
    flat      = aligned((size_t)(st->s.numel / option.ranks + 1) * 4);
    for (i = 0; i < st->s.num; i++) {
        const tensor *t = &st->s.at[i];
        st->have[i]     = piece_of(t, LORASYNC_F32, box_of(st->m, t, rank));
        at += aligned((size_t)box_numel(&st->have[i].box) * 4);
        if (rank != 0) st->sent += (uint64_t)box_numel(&st->have[i].box) * 2;
    }
    st->params_bytes = at > flat ? at : flat;
    must(cudaMalloc((void **)&st->params, st->params_bytes), "cudaMalloc of the parameters");
    must(cudaMemset(st->params, 0, st->params_bytes), "cudaMemset");
    must(cudaDeviceSynchronize(), "cudaMemset");
    for (i = 0, at = 0; i < st->s.num; i++) {
        st->have[i].data = st->params + at;
        at += aligned((size_t)box_numel(&st->have[i].box) * 4);
        if (option.layout != EP || box_numel(&st->have[i].box) > 0) st->given[st->num_given++] = st->have[i];
    }
    fill_params(st);
}

/* -- timing */

typedef lorasync_status (*run_fn)(void *user, lorasync_error *err);

typedef struct timing {
    int    good, num;
    double median, best, value; /* milliseconds; value: the largest any rank gave, median of the runs */
} timing;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, int n)
{
    if (n == 0) return 0;
    qsort(v, (size_t)n, sizeof *v, by_value);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

static double largest(const double *v)
{
    double x = v[0];
    int    i;
    for (i = 1; i < option.ranks; i++)
        if (v[i] > x) x = v[i];
    return x;
}

/* An idle GPU clocks down: some milliseconds of work first. */
static void wake_gpu(void)
{
    int i;
    for (i = 0; i < 48; i++) must(cudaMemsetAsync(busy, i, busy_bytes, stream), "cudaMemsetAsync");
    must(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

/* Runs on all ranks together, until rank 0 has enough: 20 to 40 runs, fewer when they are slow. everywhere: the last
   rank's end counts. */
static timing measure(result *res, const char *what, run_fn run, void *user, int everywhere)
{
    double         time[MAX_RUNS], value[MAX_RUNS], start, began = now();
    int            i, n = 0, warm = option.quick ? 2 : 3;
    int            least = option.quick ? 5 : 20, most = option.quick ? 8 : 40;
    timing         t;
    lorasync_error err;
    memset(&t, 0, sizeof t);
    wake_gpu();
    common->more = 1; /* every rank writes the same, a barrier away from rank 0's decision */
    for (i = 0;; i++) {
        barrier(what);
        if (!common->more) break;
        start               = now();
        common->value[rank] = 0;
        say_status(run(user, &err), &err);
        common->end[rank] = now();
        barrier(what);
        if (any_bad()) break;
        if (rank != 0) continue;
        if (i >= warm) {
            time[n]    = ((everywhere ? largest(common->end) : common->end[0]) - start) * 1e3;
            value[n++] = largest(common->value);
        }
        if (n >= most || (n >= least && now() - began > 0.5) || (n >= 5 && now() - began > 3)) common->more = 0;
    }
    t.good = !any_bad();
    note_errors(res, what);
    barrier(what);
    if (rank != 0 || n == 0) return t;
    t.num    = n;
    t.median = median(time, n);
    t.best   = time[0];
    t.value  = median(value, n);
    return t;
}

static void put_timing(result *res, const char *name, const timing *t)
{
    char key[32];
    if (!t->good || t->num == 0) return;
    snprintf(key, sizeof key, "%.20s_ms", name);
    put(res, key, t->median);
    snprintf(key, sizeof key, "%.20s_best_ms", name);
    put(res, key, t->best);
    snprintf(key, sizeof key, "%.20s_runs", name);
    put(res, key, t->num);
}

static lorasync_status failed(lorasync_error *err, const char *what, const char *why)
{
    err->status = LORASYNC_E_CUDA;
    snprintf(err->text, sizeof err->text, "%s: %.300s", what, why);
    return LORASYNC_E_CUDA;
}

/* Waits for an event as the library does: by asking, until a deadline. */
static lorasync_status poll_event(cudaEvent_t e, lorasync_error *err)
{
    double      late  = now() + 20;
    unsigned    turns = 0;
    cudaError_t r;
    while ((r = cudaEventQuery(e)) == cudaErrorNotReady)
        if (++turns % 1024 == 0 && now() > late) return failed(err, "waiting for the GPU", "not done after 20 s");
    return r == cudaSuccess ? LORASYNC_OK : failed(err, "the GPU's work", cudaGetErrorString(r));
}

static lorasync_status run_plan(void *user, lorasync_error *err)
{
    lorasync_plan *plan = (lorasync_plan *)user;
    lorasync_error ignored;
    (void)lorasync_plan_begin(plan, &ignored); /* wait tells */
    return lorasync_plan_wait(plan, err);
}

/* With events on the caller's stream, which has other work to do first, so that the host is ahead of it. */
static lorasync_status run_plan_events(void *user, lorasync_error *err)
{
    lorasync_plan  *plan = (lorasync_plan *)user;
    lorasync_error  ignored;
    lorasync_status status;
    float           ms = 0;
    must(cudaMemsetAsync(busy, 0, busy_bytes, stream), "cudaMemsetAsync");
    must(cudaMemsetAsync(busy, 1, busy_bytes, stream), "cudaMemsetAsync");
    must(cudaEventRecord(event0, stream), "cudaEventRecord");
    (void)lorasync_plan_begin(plan, &ignored);
    must(cudaEventRecord(event1, stream), "cudaEventRecord");
    status = lorasync_plan_wait(plan, err);
    if (status < 0) return status;
    status = poll_event(event1, err);
    if (status < 0) return status;
    must(cudaEventElapsedTime(&ms, event0, event1), "cudaEventElapsedTime");
    common->value[rank] = (double)ms;
    return LORASYNC_OK;
}

/* -- checking an image on rank 0 */

typedef struct check_job {
    const lorasync_image *image;
    const set            *s;
    size_t                wrong, block;
    uint64_t              sum;
} check_job;

static void check_one(void *user, size_t i)
{
    check_job             *job  = (check_job *)user;
    const lorasync_tensor *t    = &job->image->tensors[i];
    const tensor          *m    = job->s->by_name[i];
    lorasync_box           b    = lorasync_whole(m->shape, m->ndim);
    int                    good = strcmp(t->name, m->name) == 0 && t->dtype == LORASYNC_BF16 && t->ndim == m->ndim &&
               t->num_bytes == (size_t)m->numel * 2 && is_content(m, &b, t->data);
    if (!good) __atomic_fetch_add(&job->wrong, 1, __ATOMIC_RELAXED);
}

static void sum_one(void *user, size_t block)
{
    check_job     *job = (check_job *)user;
    uint64_t       sum = 0;
    size_t         i = block * job->block, end = i + job->block, n = job->image->payload_bytes / 2;
    const uint8_t *p = (const uint8_t *)job->image->payload;
    for (end = end < n ? end : n; i < end; i++) {
        uint16_t w;
        memcpy(&w, p + 2 * i, 2);
        sum += ((uint64_t)w + 1) * ((uint64_t)i * 0x9e3779b97f4a7c15u | 1u);
    }
    __atomic_fetch_add(&job->sum, sum, __ATOMIC_RELAXED);
}

static void check_image(state *st, const char *what, const lorasync_image *image)
{
    result         *res = st->res;
    check_job       job;
    lorasync_image *parsed = NULL;
    lorasync_error  err;
    char            key[32], text[48];
    int             equal = 0, digest = 0;
    size_t          n    = image->header_bytes + image->payload_bytes;
    char           *host = (char *)get(n);
    memcpy(host, image->header, image->header_bytes);
    must(cudaMemcpy(host + image->header_bytes, image->payload, image->payload_bytes, cudaMemcpyDefault),
         "copying the image to the host");
    if (lorasync_image_parse(host, n, NULL, &parsed, &err) != LORASYNC_OK) {
        note(res, what, err.text);
    } else if (parsed->num_tensors != st->s.num || parsed->payload_bytes != (size_t)st->s.numel * 2) {
        note(res, what, "the image has another number of tensors or bytes");
    } else {
        memset(&job, 0, sizeof job);
        job.image = parsed;
        job.s     = &st->s;
        job.block = (size_t)1 << 20;
        for_each(st->s.num, check_one, &job);
        for_each(parsed->payload_bytes / 2 / job.block + 1, sum_one, &job);
        equal = job.wrong == 0;
        if (!equal) {
            snprintf(text, sizeof text, "%lu tensors wrong", (unsigned long)job.wrong);
            note(res, what, text);
        }
        digest = lorasync_image_digest(parsed, NULL) == image->digest;
        if (!digest) note(res, what, "digest mismatch");
        snprintf(text, sizeof text, "%016llx", (unsigned long long)job.sum);
        if (!res->checksum[0]) memcpy(res->checksum, text, 17);
        else if (strcmp(res->checksum, text) != 0) note(res, what, "another checksum than the first image's");
    }
    lorasync_image_free(parsed);
    free(host);
    snprintf(key, sizeof key, "%.20s_equal", what);
    put(res, key, equal);
    snprintf(key, sizeof key, "%.20s_digest_ok", what);
    put(res, key, digest);
}

/* Overwrites the image, gathers once more and checks. */
static void verify(state *st, const char *what, lorasync_plan *plan)
{
    lorasync_error  err;
    lorasync_status status;
    lorasync_image *image = rank == 0 ? lorasync_plan_image(plan) : NULL;
    if (image) must(cudaMemset((void *)(uintptr_t)image->payload, 0xff, image->payload_bytes), "cudaMemset");
    must(cudaDeviceSynchronize(), "cudaMemset");
    barrier("poisoned");
    memset(&err, 0, sizeof err);
    status = run_plan(plan, &err);
    if (!agree(st->res, what, status, &err)) return;
    if (rank == 0) check_image(st, what, lorasync_plan_image(plan));
    barrier("checked");
}

/* -- plans */

static lorasync_plan_desc gather_desc(const lorasync_comm *comm, const lorasync_cuda *cuda, const lorasync_piece *have,
                                      size_t num)
{
    lorasync_plan_desc d;
    memset(&d, 0, sizeof d);
    d.comm       = comm;
    d.kind       = LORASYNC_GATHER;
    d.wire_dtype = LORASYNC_BF16;
    d.have       = have;
    d.num_have   = num;
    d.adapter    = "default";
    d.timeout_ms = plan_timeout;
#ifdef BENCH_HOST
    (void)cuda;
#else
    d.cuda = cuda;
#endif
    return d;
}

static lorasync_cuda on_stream(void)
{
    lorasync_cuda c;
    memset(&c, 0, sizeof c);
    c.stream         = stream;
    c.keep_on_device = 1;
    return c;
}

static size_t free_memory(void)
{
    size_t available = 0, total = 0;
    must(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    return available;
}

/* Makes a plan; puts the time and the device memory that this took. NULL when it failed (noted). */
static lorasync_plan *make_plan(state *st, const char *what, const lorasync_plan_desc *d)
{
    lorasync_plan      *plan = NULL;
    lorasync_error      err;
    lorasync_status     status;
    lorasync_plan_stats stats;
    char                key[32];
    size_t              before, after;
    double              start;
    int                 i;
    uint64_t            most = 0;
    must(cudaDeviceSynchronize(), what);
    before = free_memory();
    barrier(what);
    start                = now();
    status               = lorasync_plan_create(d, &plan, &err);
    start                = now() - start;
    after                = free_memory();
    common->number[rank] = before > after ? before - after : 0;
    if (!agree(st->res, what, status, &err)) {
        lorasync_plan_free(plan);
        return NULL;
    }
    for (i = 1; i < option.ranks; i++)
        if (common->number[i] > most) most = common->number[i];
    lorasync_plan_get_stats(plan, &stats);
    snprintf(key, sizeof key, "%.16s_plan_ms", what);
    put(st->res, key, start * 1e3);
    snprintf(key, sizeof key, "%.16s_root_bytes", what);
    put(st->res, key, (double)common->number[0]);
    snprintf(key, sizeof key, "%.16s_other_bytes", what);
    put(st->res, key, (double)most);
    snprintf(key, sizeof key, "%.16s_is_direct", what);
    put(st->res, key, stats.direct);
    barrier(what);
    return plan;
}

static void drop_plan(lorasync_plan *plan)
{
    if (rank != 0) lorasync_plan_free(plan);
    barrier("free");
    if (rank == 0) lorasync_plan_free(plan); /* memory that others had open */
    barrier("free");
}

static int join(state *st, int mode, lorasync_comm *out)
{
    lorasync_error  err;
    lorasync_status status = lorasync_local_join(locals[st->index][mode], rank, out, &err);
    return agree(st->res, "lorasync_local_join", status, &err);
}

/* what: the names of its results. */
static void bench_direct(state *st, const char *what, const lorasync_comm *comm)
{
    lorasync_cuda      cuda = on_stream();
    lorasync_plan_desc d    = gather_desc(comm, &cuda, st->given, st->num_given);
    lorasync_plan     *plan = make_plan(st, what, &d);
    timing             t;
    char               name[32];
    if (!plan) return;
    t = measure(st->res, what, run_plan, plan, 0);
    put_timing(st->res, what, &t);
    snprintf(name, sizeof name, "%.16s stall", what);
    if (t.good) t = measure(st->res, name, run_plan_events, plan, 0);
    snprintf(name, sizeof name, "%.16s_stall_ms", what);
    if (t.good) put(st->res, name, t.value);
    barrier(what);
    verify(st, what, plan);
    drop_plan(plan);
}

/* The same number of elements as one tensor. */
static void bench_fused(state *st)
{
    lorasync_comm      comm;
    lorasync_cuda      cuda = on_stream();
    lorasync_plan_desc d;
    lorasync_plan     *plan;
    lorasync_piece     p;
    tensor             t;
    timing             time;
    memset(&t, 0, sizeof t);
    snprintf(t.name, sizeof t.name, "flat");
    t.ndim     = 1;
    t.shape[0] = st->s.numel;
    p          = piece_of(&t, LORASYNC_F32, lorasync_shard(lorasync_whole(t.shape, 1), 0, rank, option.ranks));
    p.data     = st->params;
    d          = gather_desc(&comm, &cuda, &p, 1);
    if (!join(st, 1, &comm)) return;
    plan = make_plan(st, "fused", &d);
    if (!plan) return;
    time = measure(st->res, "fused", run_plan, plan, 0);
    put_timing(st->res, "fused", &time);
    if (time.good) time = measure(st->res, "fused device", run_plan_events, plan, 0);
    if (time.good) put(st->res, "fused_device_ms", time.value);
    drop_plan(plan);
}

static void bench_staged(state *st, const lorasync_comm *nccl)
{
    lorasync_cuda       cuda = on_stream();
    lorasync_plan_desc  d    = gather_desc(nccl, &cuda, st->given, st->num_given);
    lorasync_plan      *plan;
    timing              t;
    lorasync_plan_stats stats;
    d.no_direct    = 1;
    d.bucket_bytes = (size_t)option.bucket_mib << 20;
    plan           = make_plan(st, "nccl", &d);
    if (!plan) return;
    lorasync_plan_get_stats(plan, &stats);
    st->sent = stats.send_bytes;
    t        = measure(st->res, "nccl", run_plan, plan, 0);
    put_timing(st->res, "nccl", &t);
    if (t.good) t = measure(st->res, "nccl stall", run_plan_events, plan, 0);
    if (t.good) put(st->res, "nccl_stall_ms", t.value);
    if (t.good) verify(st, "nccl", plan);
    drop_plan(plan);
}

/* -- the floors: bytes that are packed already */

typedef struct floor_job {
    char    *bytes; /* rank 0: room for all; others: theirs (the mapped destination in `to`) */
    char    *to;
    size_t   num_bytes;
    size_t   at[MAX_RANKS + 1];
    uint64_t turn;
#ifndef BENCH_NO_NCCL
    ncclComm_t nccl;
#endif
} floor_job;

#ifndef BENCH_NO_NCCL
static lorasync_status run_send(void *user, lorasync_error *err)
{
    floor_job   *f = (floor_job *)user;
    ncclResult_t r = ncclGroupStart();
    int          i;
    for (i = 1; rank == 0 && i < option.ranks && r == ncclSuccess; i++)
        if (f->at[i + 1] > f->at[i])
            r = ncclRecv(f->bytes + f->at[i], f->at[i + 1] - f->at[i], ncclInt8, i, f->nccl, stream);
    if (rank != 0 && f->num_bytes && r == ncclSuccess)
        r = ncclSend(f->bytes, f->num_bytes, ncclInt8, 0, f->nccl, stream);
    if (r == ncclSuccess) r = ncclGroupEnd();
    if (r != ncclSuccess) return failed(err, "ncclSend/ncclRecv", ncclGetErrorString(r));
    must(cudaEventRecord(eventd, stream), "cudaEventRecord");
    return poll_event(eventd, err);
}
#endif

static lorasync_status run_copy(void *user, lorasync_error *err)
{
    floor_job      *f      = (floor_job *)user;
    double          late   = now() + 20;
    unsigned        turns  = 0;
    lorasync_status status = LORASYNC_OK;
    int             i;
    f->turn++;
    if (rank != 0) {
        /* cudaMemcpyPeerAsync by unified addresses; naming device 0 would make a second context here */
        if (f->num_bytes)
            must(cudaMemcpyAsync(f->to + f->at[rank], f->bytes, f->num_bytes, cudaMemcpyDefault, stream),
                 "cudaMemcpyAsync");
        must(cudaEventRecord(eventd, stream), "cudaEventRecord");
        status = poll_event(eventd, err);
        __atomic_store_n(&common->flag[rank], f->turn, __ATOMIC_RELEASE);
        return status;
    }
    for (i = 1; i < option.ranks; i++)
        while (__atomic_load_n(&common->flag[i], __ATOMIC_ACQUIRE) != f->turn)
            if (++turns % 1024 == 0 && now() > late) return failed(err, "copy", "a rank did not finish");
    return LORASYNC_OK;
}

/* Offsets of all ranks' bytes in rank 0's memory; rank 0's own need no moving. */
static void floor_open(state *st, floor_job *f)
{
    int i;
    common->number[rank] = st->sent;
    barrier("floor");
    for (i = 0, f->at[0] = 0; i < option.ranks; i++) f->at[i + 1] = f->at[i] + aligned((size_t)common->number[i]);
    f->num_bytes       = rank == 0 ? f->at[option.ranks] : (size_t)common->number[rank];
    common->flag[rank] = 0;
    f->turn            = 0;
    must(cudaMalloc((void **)&f->bytes, f->num_bytes + 1), "cudaMalloc for a floor");
    must(cudaMemset(f->bytes, 0, f->num_bytes + 1), "cudaMemset");
    must(cudaDeviceSynchronize(), "cudaMemset");
    if (rank == 0)
        must(cudaIpcGetMemHandle((cudaIpcMemHandle_t *)(void *)common->ipc, f->bytes), "cudaIpcGetMemHandle");
    barrier("floor");
}

static int floor_map(state *st, floor_job *f)
{
    lorasync_error     err;
    lorasync_status    status = LORASYNC_OK;
    cudaIpcMemHandle_t handle;
    memcpy(&handle, common->ipc, sizeof handle);
    if (rank != 0) {
        cudaError_t e = cudaIpcOpenMemHandle((void **)&f->to, handle, cudaIpcMemLazyEnablePeerAccess);
        if (e != cudaSuccess) {
            (void)cudaGetLastError();
            status = failed(&err, "cudaIpcOpenMemHandle", cudaGetErrorString(e));
        }
    }
    return agree(st->res, "copy: map", status, &err);
}

static void bench_floors(state *st, floor_job *f, int with_nccl)
{
    timing   t;
    uint64_t sent = 0;
    int      i;
    if (option.ranks == 1) return;
    floor_open(st, f);
    for (i = 1; i < option.ranks; i++) sent += common->number[i];
    put(st->res, "sent_bytes", (double)sent);
    barrier("floor");
#ifndef BENCH_NO_NCCL
    if (with_nccl) {
        t = measure(st->res, "ncclsend", run_send, f, 0);
        put_timing(st->res, "ncclsend", &t);
    }
#else
    (void)with_nccl;
#endif
    if (floor_map(st, f)) {
        t = measure(st->res, "copy", run_copy, f, 0);
        put_timing(st->res, "copy", &t);
    }
    if (f->to) must(cudaIpcCloseMemHandle(f->to), "cudaIpcCloseMemHandle");
    barrier("floor");
    must(cudaFree(f->bytes), "cudaFree");
    f->bytes = f->to = NULL;
}

/* -- reshard: FSDP shards to TP shards, half of the tensors by rows, half by columns */

static int want_dim(const tensor *t, size_t i) { return t->ndim == 2 ? (int)((i + i / 2) % 2) : 0; }

/* Elements of box b that are not in box a; boxes of one tensor. */
static int64_t outside(const lorasync_box *b, const lorasync_box *a)
{
    int64_t common_part = 1;
    int     d;
    for (d = 0; d < b->ndim; d++) {
        int64_t from = b->off[d] > a->off[d] ? b->off[d] : a->off[d];
        int64_t be = b->off[d] + b->len[d], ae = a->off[d] + a->len[d], to = be < ae ? be : ae;
        common_part *= to > from ? to - from : 0;
    }
    return box_numel(b) - common_part;
}

typedef struct want_job {
    const state          *st;
    const lorasync_piece *want;
    const char           *device, *host;
    size_t                wrong;
} want_job;

static void check_want(void *user, size_t i)
{
    want_job *job = (want_job *)user;
    if (!is_content(&job->st->s.at[i], &job->want[i].box, job->host + ((const char *)job->want[i].data - job->device)))
        __atomic_fetch_add(&job->wrong, 1, __ATOMIC_RELAXED);
}

/* The wanted pieces in one device buffer, which is returned with its size; *bound: bytes that must come from other
   ranks. */
static char *make_want(const state *st, lorasync_piece *want, size_t *num_bytes, uint64_t *bound)
{
    size_t i, at = 0;
    char  *memory = NULL;
    *bound        = 0;
    for (i = 0; i < st->s.num; i++) {
        const tensor *t = &st->s.at[i];

        want[i] = piece_of(t, LORASYNC_BF16,
                           lorasync_shard(lorasync_whole(t->shape, t->ndim), want_dim(t, i), rank, option.ranks));

        at += aligned((size_t)box_numel(&want[i].box) * 2);
        *bound += (uint64_t)outside(&want[i].box, &st->have[i].box) * 2;
    }
    *num_bytes = at;
    must(cudaMalloc((void **)&memory, at + 1), "cudaMalloc of the wanted pieces");
    must(cudaMemset(memory, 0xff, at + 1), "cudaMemset");
    must(cudaDeviceSynchronize(), "cudaMemset");
    for (i = 0, at = 0; i < st->s.num; i++) {
        want[i].data = memory + at;
        at += aligned((size_t)box_numel(&want[i].box) * 2);
    }
    return memory;
}

static size_t count_wrong(const state *st, const lorasync_piece *want, const char *memory, size_t num_bytes)
{
    char    *host = (char *)get(num_bytes);
    want_job job;
    must(cudaMemcpy(host, memory, num_bytes, cudaMemcpyDefault), "copying the wanted pieces to the host");
    job.st     = st;
    job.want   = want;
    job.device = memory;
    job.host   = host;
    job.wrong  = 0;
    for_each(st->s.num, check_want, &job);
    free(host);
    return job.wrong;
}

/* The busiest link into this rank, and the worst of what a link carries over what it must. Where tensors are in several
   places it need not be one link or the other. */
static void note_links(const state *st, const lorasync_plan *plan, const lorasync_piece *want)
{
    int    r;
    size_t i;
    common->number[rank] = 0;
    common->value[rank]  = 0;
    for (r = 0; r < option.ranks && option.layout != TP2; r++) {
        const lorasynci_link *link = &plan->receives[r];
        uint64_t bytes = lorasynci_link_rounds(link) ? lorasynci_link_end(link, lorasynci_link_rounds(link) - 1) : 0,
                 least = 0;
        if (r == rank) continue;
        for (i = 0; i < st->s.num; i++) {
            lorasync_box box = box_of(st->m, &st->s.at[i], r);
            least += (uint64_t)(box_numel(&want[i].box) - outside(&want[i].box, &box)) * 2;
        }
        if (bytes > common->number[rank]) common->number[rank] = bytes;
        if (least && (double)bytes / (double)least > common->value[rank])
            common->value[rank] = (double)bytes / (double)least;
    }
    barrier("links");
    for (r = 1; rank == 0 && r < option.ranks; r++) {
        if (common->number[r] > common->number[0]) common->number[0] = common->number[r];
        if (common->value[r] > common->value[0]) common->value[0] = common->value[r];
    }
    if (rank == 0 && common->value[0] > 0) {
        put(st->res, "reshard_link_bytes", (double)common->number[0]);
        put(st->res, "reshard_link_ratio", common->value[0]);
    }
    barrier("links");
}

#ifndef BENCH_NO_NCCL
/* The floor of a reshard: the bytes of its messages, already packed, in one group of ncclSend and ncclRecv. */
typedef struct exchange_job {
    char      *bytes;
    size_t     send[MAX_RANKS], receive[MAX_RANKS];
    ncclComm_t nccl;
} exchange_job;

static lorasync_status run_exchange(void *user, lorasync_error *err)
{
    exchange_job *x  = (exchange_job *)user;
    char         *at = x->bytes;
    ncclResult_t  r  = ncclGroupStart();
    int           i;
    for (i = 0; i < option.ranks && r == ncclSuccess; i++) {
        if (x->send[i]) r = ncclSend(at, x->send[i], ncclInt8, i, x->nccl, stream);
        at += aligned(x->send[i]);
        if (x->receive[i] && r == ncclSuccess) r = ncclRecv(at, x->receive[i], ncclInt8, i, x->nccl, stream);
        at += aligned(x->receive[i]);
    }
    if (r == ncclSuccess) r = ncclGroupEnd();
    if (r != ncclSuccess) return failed(err, "ncclSend/ncclRecv", ncclGetErrorString(r));
    must(cudaEventRecord(eventd, stream), "cudaEventRecord");
    return poll_event(eventd, err);
}

static void bench_exchange(state *st, const lorasync_plan *plan, ncclComm_t nccl)
{
    exchange_job x;
    timing       t;
    size_t       total = 0;
    int          i;
    x.nccl = nccl;
    for (i = 0; i < option.ranks; i++) {
        const lorasynci_link *to = &plan->sends[i], *from = &plan->receives[i];
        x.send[i] = lorasynci_link_rounds(to) ? (size_t)lorasynci_link_end(to, lorasynci_link_rounds(to) - 1) : 0;
        x.receive[i] =
            lorasynci_link_rounds(from) ? (size_t)lorasynci_link_end(from, lorasynci_link_rounds(from) - 1) : 0;
        total += aligned(x.send[i]) + aligned(x.receive[i]);
    }
    must(cudaMalloc((void **)&x.bytes, total + 1), "cudaMalloc for a floor");
    t = measure(st->res, "exchange", run_exchange, &x, 1);
    put_timing(st->res, "exchange", &t);
    must(cudaFree(x.bytes), "cudaFree");
}
#endif

/* What a reshard receives, against the least. */
static void note_bytes(state *st, const lorasync_plan *plan, uint64_t bound)
{
    lorasync_plan_stats stats;
    double              worst = 0, least = 0;
    int                 i;
    lorasync_plan_get_stats(plan, &stats);
    common->number[rank] = stats.receive_bytes;
    common->value[rank]  = (double)bound;
    barrier("reshard");
    for (i = 0; i < option.ranks; i++)
        if ((double)common->number[i] > worst) worst = (double)common->number[i], least = common->value[i];
    put(st->res, "reshard_receive_bytes", worst);
    put(st->res, "reshard_bound_bytes", least);
    barrier("reshard");
}

static void run_reshard(state *st, const char *what, lorasync_plan *plan, const lorasync_piece *want, char *memory,
                        size_t num_bytes)
{
    timing          t = measure(st->res, what, run_plan, plan, 1);
    lorasync_error  err;
    lorasync_status status;
    size_t          wrong;
    char            key[32];
    int             i;
    put_timing(st->res, what, &t);
    if (t.good) t = measure(st->res, what, run_plan_events, plan, 1);
    if (!t.good) return;
    snprintf(key, sizeof key, "%.20s_stall_ms", what);
    put(st->res, key, t.value);
    must(cudaMemset(memory, 0xff, num_bytes), "cudaMemset");
    must(cudaDeviceSynchronize(), "cudaMemset");
    status = run_plan(plan, &err);
    if (!agree(st->res, what, status, &err)) return;
    wrong                = count_wrong(st, want, memory, num_bytes);
    common->number[rank] = wrong;
    barrier("reshard checked");
    for (i = 0, wrong = 0; i < option.ranks; i++) wrong += (size_t)common->number[i];
    snprintf(key, sizeof key, "%.20s_equal", what);
    put(st->res, key, wrong == 0);
    if (rank == 0 && wrong) note(st->res, what, "wrong bytes");
    barrier("reshard checked");
}

/* f: also the floor, with its communicator; or NULL. */
static void bench_reshard(state *st, const char *what, const lorasync_comm *comm, int no_direct, const floor_job *f)
{
    lorasync_cuda      cuda = on_stream();
    lorasync_plan_desc d    = gather_desc(comm, &cuda, st->given, st->num_given);
    lorasync_piece    *want = (lorasync_piece *)get(st->s.num * sizeof *want);
    size_t             num_bytes;
    uint64_t           bound;
    char              *memory = make_want(st, want, &num_bytes, &bound);
    lorasync_plan     *plan;
    d.kind         = LORASYNC_RESHARD;
    d.adapter      = NULL;
    d.want         = want;
    d.num_want     = st->s.num;
    d.bucket_bytes = (size_t)option.bucket_mib << 20;
    d.no_direct    = no_direct;
    plan           = make_plan(st, what, &d);
    if (plan && no_direct) note_bytes(st, plan, bound);
    if (plan && no_direct) note_links(st, plan, want);
#ifndef BENCH_NO_NCCL
    if (plan && f) bench_exchange(st, plan, f->nccl);
#else
    (void)f;
#endif
    if (plan) {
        run_reshard(st, what, plan, want, memory, num_bytes);
        drop_plan(plan);
    }
    must(cudaFree(memory), "cudaFree");
    free(want);
}

/* -- one rank */

typedef struct nccl_ranks {
    int           good;
    lorasync_comm comm; /* lorasync's view of it */
#ifndef BENCH_NO_NCCL
    ncclComm_t raw;
#endif
} nccl_ranks;

#if !defined(BENCH_NO_NCCL)
/* NCCL makes its channels and buffers with the first use of a peer: now, so that no plan's memory and no first run
   counts them. */
static void connect_all(ncclComm_t comm)
{
    const size_t num_bytes = (size_t)1 << 20;
    char        *memory    = NULL;
    int          peer;
    must(cudaMalloc((void **)&memory, 2 * num_bytes), "cudaMalloc");
    must(cudaMemset(memory, 0, 2 * num_bytes), "cudaMemset");
    ncclGroupStart();
    for (peer = 0; peer < option.ranks; peer++)
        if (peer != rank) {
            ncclSend(memory, num_bytes, ncclChar, peer, comm, stream);
            ncclRecv(memory + num_bytes, num_bytes, ncclChar, peer, comm, stream);
        }
    if (ncclGroupEnd() != ncclSuccess || ncclAllGather(memory, memory + num_bytes, num_bytes / (size_t)option.ranks,
                                                       ncclChar, comm, stream) != ncclSuccess)
        die("connecting", "NCCL");
    must(cudaStreamSynchronize(stream), "connecting");
    cudaFree(memory);
}
#endif

static void open_nccl(nccl_ranks *n, result *res)
{
    memset(n, 0, sizeof *n);
#if !defined(BENCH_NO_NCCL)
    {
        lorasync_error  err;
        lorasync_status status = LORASYNC_OK;
        ncclUniqueId    id;
        ncclResult_t    r = ncclSuccess;
        if (option.ranks > gpus) {
            if (rank == 0) note(res, "nccl", "skipped, ranks share a GPU");
            return;
        }
        if (rank == 0) r = ncclGetUniqueId(&id);
        if (rank == 0) memcpy(common->nccl_id, &id, sizeof id);
        barrier("nccl: unique id");
        memcpy(&id, common->nccl_id, sizeof id);
        if (r == ncclSuccess) r = ncclCommInitRank(&n->raw, option.ranks, id, rank);
        if (r != ncclSuccess) status = failed(&err, "ncclCommInitRank", ncclGetErrorString(r));
        if (!agree(res, "ncclCommInitRank", status, &err)) return;
        connect_all(n->raw);
#ifndef BENCH_HOST
        {
            lorasync_nccl_desc d;
            memset(&d, 0, sizeof d);
            if (rank == 0 && option.own_comm && lorasync_nccl_unique_id(common->nccl_id, &err) < 0)
                die("lorasync_nccl_unique_id", err.text);
            barrier("nccl: unique id");
            if (option.own_comm) d.unique_id = common->nccl_id;
            else d.comm = n->raw;
            d.rank       = rank;
            d.world      = option.ranks;
            d.timeout_ms = plan_timeout;
            status       = lorasync_nccl_open(&d, &n->comm, &err);
            n->good      = agree(res, "lorasync_nccl_open", status, &err);
        }
#endif
    }
#else
    if (rank == 0) note(res, "nccl", "built without NCCL");
#endif
}

/* The communicator for one plan; 0: there is none. */
static int nccl_for(const nccl_ranks *n, state *st, int mode, lorasync_comm *out)
{
#ifdef BENCH_HOST
    (void)n;
    return join(st, mode, out);
#else
    int lost;
    (void)st, (void)mode;
    barrier("nccl");
    lost = common->nccl_lost;
    barrier("nccl");
    *out = n->comm;
    return n->good && !lost;
#endif
}

static void bench_model(int index, const nccl_ranks *nccl)
{
    state         st;
    floor_job     f;
    lorasync_comm comm;
    int           have_nccl;
    memset(&st, 0, sizeof st);
    memset(&f, 0, sizeof f);
    st.m     = &models[index];
    st.index = index;
    st.res   = &common->results[index];
    make_params(&st);
    put(st.res, "tensors", (double)st.s.num);
    put(st.res, "elements", (double)st.s.numel);
    put(st.res, "bytes", (double)st.s.numel * 2);
    barrier("parameters");
    if (join(&st, 0, &comm)) bench_direct(&st, "direct", &comm);
    bench_fused(&st);
    have_nccl = nccl_for(nccl, &st, 2, &comm);
    over_nccl = 1;
    if (have_nccl) bench_staged(&st, &comm);
    if (have_nccl && option.ranks > 1) bench_direct(&st, "dnccl", &comm);
#ifndef BENCH_NO_NCCL
    f.nccl    = nccl->raw;
    have_nccl = nccl->raw && (have_nccl || !nccl->good) && !common->nccl_lost;
#endif
    barrier("floors");
    bench_floors(&st, &f, have_nccl);
    if (option.ranks > 1 && nccl_for(nccl, &st, 3, &comm)) {
        bench_reshard(&st, "reshard", &comm, 1, have_nccl ? &f : NULL);
        bench_reshard(&st, "rdnccl", &comm, 0, NULL);
    }
    over_nccl = 0;
    if (option.ranks > 1 && join(&st, 4, &comm)) bench_reshard(&st, "rdirect", &comm, 0, NULL);
    must(cudaDeviceSynchronize(), "the end of a model");
    must(cudaFree(st.params), "cudaFree");
    free(st.have);
    free(st.given);
    free_set(&st.s);
    barrier("model done");
}

static void describe(void)
{
    struct cudaDeviceProp p;
    int                   driver = 0, runtime = 0, nccl = 0, peer = 0;
    if (rank != 0) return;
    must(cudaGetDeviceProperties(&p, 0), "cudaGetDeviceProperties");
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
#ifndef BENCH_NO_NCCL
    ncclGetVersion(&nccl);
#endif
    if (gpus > 1) cudaDeviceCanAccessPeer(&peer, 1, 0);
    snprintf(common->info, sizeof common->info,
             "\"gpus\":%d,\"gpu\":\"%.200s\",\"cuda_driver\":%d,\"cuda_runtime\":%d,\"nccl\":%d,\"peer_access\":%d,"
             "\"lorasync\":\"%s\"",
             gpus, p.name, driver, runtime, nccl, peer, LORASYNC_VERSION);
}

static int wanted(int index)
{
    if (option.only) return strcmp(option.only, models[index].id) == 0;
    return option.layout != EP || models[index].experts;
}

static void run_rank(int first)
{
    nccl_ranks nccl;
    int        i;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(common->stage[rank], sizeof common->stage[rank], "CUDA starts");
    must(cudaGetDeviceCount(&gpus), "cudaGetDeviceCount");
    if (gpus < 1) die("cudaGetDeviceCount", "no GPU");
    must(cudaSetDevice(rank % gpus), "cudaSetDevice");
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    must(cudaEventCreate(&event0), "cudaEventCreate");
    must(cudaEventCreate(&event1), "cudaEventCreate");
    must(cudaEventCreateWithFlags(&eventd, cudaEventDisableTiming), "cudaEventCreate");
    must(cudaMalloc(&busy, busy_bytes), "cudaMalloc");
    describe();
    barrier("start");
    open_nccl(&nccl, &common->results[first]);
    for (i = first; i < NUM_MODELS; i++) {
        if (!wanted(i)) continue;
        barrier("next model");
        if (rank == 0) {
            common->model                = i;
            common->results[i].attempted = 1;
        }
        bench_model(i, &nccl);
        if (rank == 0) __atomic_store_n(&common->results[i].complete, 1, __ATOMIC_RELEASE);
    }
    common->finished[rank] = 1;
    barrier("end");
    _exit(0); /* the driver frees what is left; destroying a communicator could wait */
}

/* -- the parent: starts the ranks, ends them all when one fails or nothing moves */

static void print_quoted(const char *s)
{
    putchar('"');
    for (; *s; s++) {
        if ((unsigned char)*s < 0x20) putchar(' ');
        else printf(*s == '"' || *s == '\\' ? "\\%c" : "%c", *s);
    }
    putchar('"');
}

static void print_result(int index)
{
    const result *res = &common->results[index];
    int           i;
    if (option.json) {
        printf("{\"id\":\"%s\",\"model\":\"%s\",\"ranks\":%d,\"seed\":%lu,\"checksum\":\"%s\"", models[index].id,
               models[index].name, option.ranks, (unsigned long)option.seed, res->checksum);
        for (i = 0; i < res->num; i++) printf(",\"%s\":%.10g", res->item[i].key, res->item[i].value);
        printf(",\"error\":");
        print_quoted(res->error);
        printf("}\n");
    } else {
        printf("\n%s, %d ranks, checksum %s\n", models[index].name, option.ranks, res->checksum);
        for (i = 0; i < res->num; i++) printf("  %-26s%.6g\n", res->item[i].key, res->item[i].value);
        if (res->error[0]) printf("  ERROR %s\n", res->error);
    }
    fflush(stdout);
}

static void print_info(void)
{
    static int printed;
    if (printed) return;
    printed = 1;
    if (option.json)
        printf("{\"info\":1,%s%s\"ranks\":%d,\"layout\":\"%s\",\"own_comm\":%d,\"bucket_mib\":%d,\"seed\":%lu}\n",
               common->info, common->info[0] ? "," : "", option.ranks, layout_names[option.layout], option.own_comm,
               option.bucket_mib, (unsigned long)option.seed);
    else printf("%s\n", common->info);
}

/* What is complete, as soon as it is: whoever ends this program early has it. all: the rest too. */
static void print_results(int all)
{
    int i;
    for (i = 0; i < NUM_MODELS; i++) {
        result *res = &common->results[i];
        if (res->printed || (!all && !__atomic_load_n(&res->complete, __ATOMIC_ACQUIRE))) continue;
        if (!res->attempted && !res->error[0]) continue;
        print_info();
        print_result(i);
        res->printed = 1;
    }
    if (all) print_info();
}

static void end_children(pid_t *pid)
{
    int i, status;
    for (i = 0; i < option.ranks; i++)
        if (pid[i] > 0) kill(pid[i], SIGKILL);
    for (i = 0; i < option.ranks; i++)
        if (pid[i] > 0) waitpid(pid[i], &status, 0);
}

/* 1 when all ranks finished; 0 with `why` otherwise, and no child left. */
static int watch(pid_t *pid, double end, char *why, size_t size)
{
    int    left = option.ranks, i, status, over = 0;
    size_t n = 0;
    while (left > 0 && !over) {
        for (i = 0; i < option.ranks && !over; i++) {
            if (pid[i] <= 0 || waitpid(pid[i], &status, WNOHANG) != pid[i]) continue;
            pid[i] = 0;
            left--;
            if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
            over = 1;
            n = (size_t)snprintf(why, size, "rank %d %s %d;", i, WIFSIGNALED(status) ? "died of signal" : "exited with",
                                 WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        }
        if (left > 0 && !over && (now() > end || now() - common->progress > stuck_after + 5)) {
            over = 1;
            n    = (size_t)snprintf(why, size, "%s;", now() > end ? "the deadline passed" : "nothing moved");
        }
        print_results(0);
        usleep(2000);
    }
    if (!over) return 1;
    for (i = 0; i < option.ranks && n < size; i++)
        n += (size_t)snprintf(why + n, size - n, " rank %d in '%s'", i, common->stage[i]);
    end_children(pid);
    return 0;
}

static int start_ranks(int first, double end, char *why, size_t size)
{
    pid_t pid[MAX_RANKS];
    int   i;
    memset(pid, 0, sizeof pid);
    common->waiting = common->turn = common->nccl_lost = 0;
    common->progress                                   = now();
    common->model                                      = first;
    memset(common->bad, 0, sizeof common->bad);
    for (i = 0; i < option.ranks; i++) {
        fflush(stdout);
        pid[i] = fork();
        if (pid[i] == 0) {
            rank = i;
            run_rank(first);
        }
        if (pid[i] < 0) {
            end_children(pid);
            snprintf(why, size, "fork failed");
            return 0;
        }
    }
    return watch(pid, end, why, size);
}

/* Counts GPUs in a process of its own: this one must not touch CUDA before it forks. */
static int count_gpus(void)
{
    pid_t pid = fork();
    int   n = 0, status = 0;
    if (pid == 0) _exit(cudaGetDeviceCount(&n) == cudaSuccess ? n : 0);
    if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) return 0;
    return WEXITSTATUS(status);
}

static int layout_named(const char *name)
{
    int i;
    for (i = 0; i < (int)COUNT(layout_names); i++)
        if (strcmp(name, layout_names[i]) == 0) return i;
    return -1;
}

static void read_options(int argc, char **argv)
{
    int i, named;
    option.deadline = 150;
    option.seed     = (uint32_t)time(NULL) * 2654435761u ^ (uint32_t)getpid();
    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0) option.json = 1;
        else if (strcmp(argv[i], "--quick") == 0) option.quick = 1;
        else if (strcmp(argv[i], "--own-comm") == 0) option.own_comm = 1;
        else if (strcmp(argv[i], "--bucket") == 0 && i + 1 < argc) option.bucket_mib = atoi(argv[++i]);
        else if (strcmp(argv[i], "--layout") == 0 && i + 1 < argc && (named = layout_named(argv[i + 1])) >= 0)
            option.layout = (layout)named, i++;
        else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) option.only = argv[++i];
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) option.seed = (uint32_t)strtoul(argv[++i], NULL, 0);
        else if (strcmp(argv[i], "--deadline") == 0 && i + 1 < argc) option.deadline = atof(argv[++i]);
        else if (atoi(argv[i]) > 0) option.ranks = atoi(argv[i]);
        else {
            fprintf(
                stderr,
                "usage: bench_gpu [N] [--layout fsdp|tp2|ep] [--json] [--only MODEL] [--quick] [--own-comm] [--bucket "
                "MIB] [--seed S] [--deadline SECONDS]\nmodels:");
            for (i = 0; i < NUM_MODELS; i++) fprintf(stderr, " %s", models[i].id);
            fprintf(stderr, "\n");
            exit(2);
        }
    }
}

static int open_locals(void)
{
    lorasync_error err;
    int            i, mode;
    for (i = 0; i < NUM_MODELS; i++)
        for (mode = 0; mode < MODES; mode++)
            if (lorasync_local_open(option.ranks, &locals[i][mode], &err) != LORASYNC_OK) {
                fprintf(stderr, "bench_gpu: %s\n", err.text);
                return 0;
            }
    return 1;
}

static int next_model(int i)
{
    while (i < NUM_MODELS && !wanted(i)) i++;
    return i;
}

/* Runs all models; a model that fails is given up, and new processes go on with the next. */
static int run_models(void)
{
    double end = now() + option.deadline;
    char   why[1000];
    int    first = next_model(0), good = 1;
    if (first == NUM_MODELS) {
        fprintf(stderr, "bench_gpu: no model '%s'\n", option.only);
        return 0;
    }
    while (first < NUM_MODELS && now() < end) {
        if (start_ranks(first, end, why, sizeof why)) break;
        good = 0;
        fprintf(stderr, "bench_gpu: %s: %s\n", models[common->model].name, why);
        note(&common->results[common->model], "given up", why);
        if (!common->results[common->model].attempted) return 0; /* the ranks did not even start */
        first = next_model(common->model + 1);
    }
    return good;
}

int main(int argc, char **argv)
{
    int   good, i, equal = 1;
    void *p;
    read_options(argc, argv);
    if (option.ranks == 0) option.ranks = count_gpus();
    if (option.ranks < 1 || option.ranks > MAX_RANKS) {
        fprintf(stderr, "bench_gpu: %d GPUs\n", option.ranks);
        return 2;
    }
    if (option.layout == TP2 && option.ranks % 2) {
        fprintf(stderr, "bench_gpu: two halves of %d ranks\n", option.ranks);
        return 2;
    }
    p = mmap(NULL, sizeof *common, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || !open_locals()) return 2;
    common = (shared *)p;
    good   = run_models();
    print_results(1);
    for (i = 0; i < NUM_MODELS; i++)
        if (common->results[i].error[0]) equal = 0;
    return good && equal ? 0 : 1;
}
