/* What the library costs on this CPU: packing, planning, headers, names, and whole syncs between processes.

   make bench BENCH_ARGS="--quick"      see --help

   Each figure is the median of repeated runs after a warm-up, with the best run beside it. A ratio compares with a
   baseline that was measured in turns with it. GB/s counts bytes moved, source and destination together, in 10^9 bytes:
   memcpy of n bytes moves 2 n. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include <pthread.h>
#include <sys/wait.h>

#ifndef BENCH_FLAGS
#define BENCH_FLAGS ""
#endif

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum {
    MAX_SAMPLES = 400,
    NAME        = 160
};

typedef struct options {
    int         json, quick;
    const char *only[16];
    int         num_only;
    const char *directory; /* for the directory transport */
} options;

static options option;

/* -- small helpers */

static void die(const char *what, const char *why)
{
    fprintf(stderr, "bench: %s: %s\n", what, why);
    exit(1);
}

static void must(lorasync_status status, const char *what, const lorasync_error *err)
{
    if (status < 0) die(what, err->text);
}

static void *get(size_t num_bytes)
{
    void *p = malloc(num_bytes ? num_bytes : 1);
    if (!p) die("malloc", "out of memory");
    return p;
}

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now(void) { return seconds(CLOCK_MONOTONIC); }

/* -- samples */

typedef struct samples {
    double value[MAX_SAMPLES];
    int    num;
} samples;

static void sample(samples *s, double value)
{
    if (s->num < MAX_SAMPLES) s->value[s->num++] = value;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(const samples *s)
{
    double sorted[MAX_SAMPLES];
    memcpy(sorted, s->value, sizeof sorted[0] * (size_t)s->num);
    qsort(sorted, (size_t)s->num, sizeof *sorted, by_value);
    return s->num % 2 ? sorted[s->num / 2] : (sorted[s->num / 2 - 1] + sorted[s->num / 2]) / 2;
}

static double lowest(const samples *s)
{
    double low = s->value[0];
    int    i;
    for (i = 1; i < s->num; i++)
        if (s->value[i] < low) low = s->value[i];
    return low;
}

/* One run; returns the seconds that count. */
typedef double (*run_fn)(void *user);

/* Runs a (and b, in turns, when there is one) for about half a second each, 5 times at least. */
static void measure(run_fn a, void *ua, samples *sa, run_fn b, void *ub, samples *sb)
{
    double end, limit = option.quick ? 0.1 : 1.0;
    sa->num = 0;
    a(ua);
    if (b) {
        sb->num = 0;
        b(ub);
    }
    end = now() + limit;
    while (sa->num < 5 || (now() < end && sa->num < MAX_SAMPLES)) {
        sample(sa, a(ua));
        if (b) sample(sb, b(ub));
    }
}

/* -- output */

static int wants(const char *group)
{
    int i;
    for (i = 0; i < option.num_only; i++)
        if (strcmp(option.only[i], group) == 0) return 1;
    return option.num_only == 0;
}

/* ratio_to NULL: no ratio. */
static void row(const char *group, const char *name, double value, double best, const char *unit, double ratio,
                const char *ratio_to)
{
    if (option.json) {
        printf("{\"group\":\"%s\",\"name\":\"%s\",\"median\":%.6g,\"best\":%.6g,\"unit\":\"%s\"", group, name, value,
               best, unit);
        if (ratio_to) printf(",\"ratio\":%.4g,\"ratio_to\":\"%s\"", ratio, ratio_to);
        printf("}\n");
    } else {
        printf("%-8s%-60s%11.4g%11.4g  %-11s", group, name, value, best, unit);
        if (ratio_to) printf("%7.2f x %s", ratio, ratio_to);
        printf("\n");
    }
    fflush(stdout);
}

/* A number that is not measured in runs. */
static void row_number(const char *group, const char *name, double value, const char *unit)
{
    if (option.json)
        printf("{\"group\":\"%s\",\"name\":\"%s\",\"value\":%.6g,\"unit\":\"%s\"}\n", group, name, value, unit);
    else printf("%-8s%-60s%11.4g%11s  %s\n", group, name, value, "", unit);
}

/* Milliseconds from seconds. */
static void row_ms(const char *group, const char *name, const samples *s, double baseline, const char *ratio_to)
{
    row(group, name, median(s) * 1e3, lowest(s) * 1e3, "ms", ratio_to ? median(s) / baseline : 0, ratio_to);
}

/* GB/s of runs that moved `bytes` each, against runs of a baseline that moved as many. */
static void row_rate(const char *group, const char *name, double bytes, const samples *s, const samples *baseline,
                     const char *ratio_to)
{
    row(group, name, bytes / median(s) / 1e9, bytes / lowest(s) / 1e9, "GB/s",
        baseline ? median(baseline) / median(s) : 0, ratio_to);
}

static void print_text(const char *key, const char *text)
{
    if (option.json) {
        const char *p;
        printf("{\"%s\":\"", key);
        for (p = text; *p; p++)
            if ((unsigned char)*p >= 0x20) printf(*p == '"' || *p == '\\' ? "\\%c" : "%c", *p);
        printf("\"}\n");
    } else {
        printf("%-12s%s\n", key, text);
    }
}

static void cpu_model(char *out, size_t size)
{
    char  line[512];
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(out, size, "unknown");
    while (f && fgets(line, sizeof line, f)) {
        char *value = strncmp(line, "model name", 10) == 0 ? strchr(line, ':') : NULL;
        if (!value) continue;
        value[strcspn(value, "\n")] = 0;
        snprintf(out, size, "%.200s", value + 2);
        break;
    }
    if (f) fclose(f);
}

static const char *instruction_set(void)
{
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__SSE2__)
    return "SSE2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "no vector instructions";
#endif
}

static void print_machine(void)
{
    char   text[512], cpu[256];
    time_t t = time(NULL);
    strftime(text, sizeof text, "%Y-%m-%d %H:%M UTC", gmtime(&t));
    print_text("date", text);
    cpu_model(cpu, sizeof cpu);
    snprintf(text, sizeof text, "%s, %ld cores", cpu, sysconf(_SC_NPROCESSORS_ONLN));
    print_text("cpu", text);
#if defined(__clang__)
    snprintf(text, sizeof text, "%s", __VERSION__);
#elif defined(__GNUC__)
    snprintf(text, sizeof text, "gcc %s", __VERSION__);
#else
    snprintf(text, sizeof text, "unknown");
#endif
    print_text("compiler", text);
#if defined(__OPTIMIZE__)
    snprintf(text, sizeof text, "optimised, %s%s%s", instruction_set(), BENCH_FLAGS[0] ? ", " : "", BENCH_FLAGS);
#else
    snprintf(text, sizeof text, "NOT OPTIMISED, %s%s%s", instruction_set(), BENCH_FLAGS[0] ? ", " : "", BENCH_FLAGS);
#endif
    print_text("flags", text);
    if (option.json) return;
    printf("\n%-8s%-60s%11s%11s  %-11s  ratio\n", "group", "what", "median", "best", "unit");
}

/* -- LoRA tensors of known models, all seven projections of each layer */

typedef struct model {
    const char *name;
    int         layers, hidden, q, kv, mlp, experts, r; /* experts 0: one dense MLP */
} model;

static const model qwen_06b = {"Qwen3-0.6B r32", 28, 1024, 2048, 1024, 3072, 0, 32};
static const model qwen_8b  = {"Qwen3-8B r32", 36, 4096, 4096, 1024, 12288, 0, 32};
static const model qwen_30b = {"Qwen3-30B-A3B r16", 48, 2048, 4096, 512, 768, 128, 16};

typedef struct tensor_list {
    lorasync_tensor *at;
    char            *names;
    size_t           num;
    int64_t          numel;
} tensor_list;

static void list_add(tensor_list *list, const char *module, const char *leaf, int64_t rows, int64_t columns)
{
    lorasync_tensor *t    = &list->at[list->num];
    char            *name = list->names + list->num * NAME;
    snprintf(name, NAME, "%s.%s", module, leaf);
    memset(t, 0, sizeof *t);
    t->name     = name;
    t->dtype    = LORASYNC_BF16;
    t->ndim     = 2;
    t->shape[0] = rows;
    t->shape[1] = columns;
    list->num++;
    list->numel += rows * columns;
}

/* `adapter`: "" for keys of a file, ".default" for names of a live model. */
static void list_add_pair(tensor_list *list, const model *m, int layer, const char *group, const char *projection,
                          int out, int in, const char *adapter)
{
    char module[100], leaf[32];
    snprintf(module, sizeof module, "base_model.model.model.layers.%d.%.30s.%.20s", layer, group, projection);
    snprintf(leaf, sizeof leaf, "lora_A%.10s.weight", adapter);
    list_add(list, module, leaf, m->r, in);
    snprintf(leaf, sizeof leaf, "lora_B%.10s.weight", adapter);
    list_add(list, module, leaf, out, m->r);
}

static tensor_list list_make(const model *m, const char *adapter)
{
    tensor_list list;
    char        mlp[32] = "mlp";
    int         i, e, mlps = m->experts ? m->experts : 1;
    size_t      max = (size_t)m->layers * (8 + 6 * (size_t)mlps);
    memset(&list, 0, sizeof list);
    list.at    = (lorasync_tensor *)get(max * sizeof *list.at);
    list.names = (char *)get(max * NAME);
    for (i = 0; i < m->layers; i++) {
        list_add_pair(&list, m, i, "self_attn", "q_proj", m->q, m->hidden, adapter);
        list_add_pair(&list, m, i, "self_attn", "k_proj", m->kv, m->hidden, adapter);
        list_add_pair(&list, m, i, "self_attn", "v_proj", m->kv, m->hidden, adapter);
        list_add_pair(&list, m, i, "self_attn", "o_proj", m->hidden, m->q, adapter);
        for (e = 0; e < mlps; e++) {
            if (m->experts) snprintf(mlp, sizeof mlp, "mlp.experts.%d", e);
            list_add_pair(&list, m, i, mlp, "gate_proj", m->mlp, m->hidden, adapter);
            list_add_pair(&list, m, i, mlp, "up_proj", m->mlp, m->hidden, adapter);
            list_add_pair(&list, m, i, mlp, "down_proj", m->hidden, m->mlp, adapter);
        }
    }
    return list;
}

static void list_free(tensor_list *list)
{
    free(list->at);
    free(list->names);
}

/* FSDP2: dimension 0 over the ranks. Pieces lie one behind the other from `data`; with shared set all begin there. */
static lorasync_piece *fsdp2_pieces(const tensor_list *list, lorasync_dtype dtype, int rank, int world, void *data,
                                    int shared)
{
    lorasync_piece *pieces = (lorasync_piece *)get(list->num * sizeof *pieces);
    size_t          i, at = 0, item = (size_t)lorasync_dtype_bits(dtype) / 8;
    for (i = 0; i < list->num; i++) {
        lorasync_piece *p = &pieces[i];
        memset(p, 0, sizeof *p);
        p->name     = list->at[i].name;
        p->dtype    = dtype;
        p->ndim     = 2;
        p->shape[0] = list->at[i].shape[0];
        p->shape[1] = list->at[i].shape[1];
        p->box      = lorasync_shard(lorasync_whole(p->shape, 2), 0, rank, world);
        p->data     = (char *)data + (shared ? 0 : at);
        at += (size_t)(p->box.len[0] * p->box.len[1]) * item;
    }
    return pieces;
}

/* n small numbers, as weights are. */
static void fill_floats(void *memory, lorasync_dtype dtype, size_t n)
{
    float    block[256];
    uint32_t state = 1;
    size_t   i, j, m, item = (size_t)lorasync_dtype_bits(dtype) / 8;
    for (i = 0; i < n; i += m) {
        m = n - i < 256 ? n - i : 256;
        for (j = 0; j < m; j++) {
            state    = state * 1664525u + 1013904223u;
            block[j] = ((float)(state >> 8) - 8388608.0f) * 1e-8f;
        }
        lorasync_convert((char *)memory + i * item, dtype, block, LORASYNC_F32, m, NULL);
    }
}

/* -- an allocator that counts */

typedef struct counter {
    long num;
} counter;

static void *count_alloc(void *user, size_t num_bytes)
{
    ((counter *)user)->num++;
    return malloc(num_bytes);
}

static void count_free(void *user, void *p)
{
    (void)user;
    free(p);
}

static lorasync_allocator counting(counter *c)
{
    lorasync_allocator a;
    a.alloc = count_alloc;
    a.free  = count_free;
    a.user  = c;
    return a;
}

/* -- the baseline */

typedef struct copy {
    char  *from, *to;
    size_t num_bytes, repeat;
    size_t step; /* bytes of one memcpy; 0: all. Large copies of glibc go around the cache, small ones through it */
} copy;

static copy copy_make(size_t num_bytes, size_t repeat)
{
    copy c;
    c.from      = (char *)get(num_bytes);
    c.to        = (char *)get(num_bytes);
    c.num_bytes = num_bytes;
    c.repeat    = repeat;
    c.step      = 0;
    memset(c.from, 1, num_bytes);
    memset(c.to, 2, num_bytes);
    return c;
}

static void copy_free(copy *c)
{
    free(c->from);
    free(c->to);
}

static double run_copy(void *user)
{
    copy  *c     = (copy *)user;
    double start = now();
    size_t i, at, n;
    for (i = 0; i < c->repeat; i++) {
        for (at = 0; at < c->num_bytes; at += n) {
            n = c->step && c->num_bytes - at > c->step ? c->step : c->num_bytes - at;
            memcpy(c->to + at, c->from + at, n);
        }
#if defined(__GNUC__)
        __asm__ __volatile__("" : : "r"(c->to) : "memory"); /* each copy counts */
#endif
    }
    return now() - start;
}

/* -- pack: begin of a plan of one rank */

static double run_begin(void *user)
{
    lorasync_plan *plan = (lorasync_plan *)user;
    lorasync_error err;
    double         start = now(), end;
    must(lorasync_plan_begin(plan, &err), "lorasync_plan_begin", &err);
    end = now();
    must(lorasync_plan_wait(plan, &err), "lorasync_plan_wait", &err);
    return end - start;
}

static void bench_pack_pair(const model *m, const tensor_list *list, lorasync_dtype from, lorasync_dtype to,
                            int allow_nan)
{
    lorasync_plan_desc d;
    lorasync_plan     *plan;
    lorasync_error     err;
    counter            allocations;
    lorasync_allocator a = counting(&allocations);
    size_t          n = (size_t)list->numel, sizes = (size_t)(lorasync_dtype_bits(from) + lorasync_dtype_bits(to)) / 8;
    void           *data   = get(n * (size_t)lorasync_dtype_bits(from) / 8);
    lorasync_piece *pieces = fsdp2_pieces(list, from, 0, 1, data, 0);
    copy            base   = copy_make(n * sizes / 2, 1);
    samples         s, b;
    char            name[NAME];
    fill_floats(data, from, n);
    memset(&d, 0, sizeof d);
    d.wire_dtype = to;
    d.have       = pieces;
    d.num_have   = list->num;
    d.allow_nan  = allow_nan;
    d.adapter    = "default";
    d.allocator  = &a;
    must(lorasync_plan_create(&d, &plan, &err), "lorasync_plan_create", &err);
    free(pieces);
    allocations.num = 0;
    measure(run_begin, plan, &s, run_copy, &base, &b);
    snprintf(name, sizeof name, "%s %s -> %s%s", m->name, lorasync_dtype_name(from), lorasync_dtype_name(to),
             allow_nan ? ", no NaN check" : "");
    row_rate("pack", name, (double)(n * sizes), &s, &b, "memcpy");
    if (from == LORASYNC_F32 && to == LORASYNC_BF16 && !allow_nan) {
        row_rate("pack", "  memcpy of as many bytes", (double)(n * sizes), &b, NULL, NULL);
        row_number("pack", "  allocations in all runs", (double)allocations.num, "");
        base.step = (size_t)1 << 20;
        measure(run_begin, plan, &s, run_copy, &base, &b);
        row_rate("pack", "  again, against memcpy of 1 MiB at a time", (double)(n * sizes), &s, &b, "memcpy");
    }
    lorasync_plan_free(plan);
    copy_free(&base);
    free(data);
}

static void bench_pack(void)
{
    static const model *const models[] = {&qwen_06b, &qwen_8b};
    size_t                    i, num = option.quick ? 1 : 2;
    for (i = 0; i < num; i++) {
        model       m = *models[i];
        tensor_list list;
        if (option.quick) m.layers = 4;
        list = list_make(&m, "");
        bench_pack_pair(&m, &list, LORASYNC_F32, LORASYNC_BF16, 0);
        bench_pack_pair(&m, &list, LORASYNC_F32, LORASYNC_BF16, 1);
        bench_pack_pair(&m, &list, LORASYNC_F32, LORASYNC_F32, 0);
        bench_pack_pair(&m, &list, LORASYNC_BF16, LORASYNC_BF16, 0);
        bench_pack_pair(&m, &list, LORASYNC_F32, LORASYNC_F16, 0);
        bench_pack_pair(&m, &list, LORASYNC_F32, LORASYNC_F8_E4M3, 0);
        list_free(&list);
    }
}

/* -- convert and digest, alone */

typedef struct conversion {
    void          *from, *to;
    lorasync_dtype from_dtype, to_dtype;
    size_t         n, repeat;
} conversion;

static double run_convert(void *user)
{
    conversion *c     = (conversion *)user;
    double      start = now();
    size_t      i;
    for (i = 0; i < c->repeat; i++) lorasync_convert(c->to, c->to_dtype, c->from, c->from_dtype, c->n, NULL);
    return now() - start;
}

static void bench_convert_pair(lorasync_dtype from, lorasync_dtype to, size_t n, size_t repeat, const char *where)
{
    conversion c;
    samples    s, b;
    char       name[NAME];
    size_t     sizes = (size_t)(lorasync_dtype_bits(from) + lorasync_dtype_bits(to)) / 8;
    copy       base  = copy_make(n * sizes / 2, repeat);
    c.from           = get(n * (size_t)lorasync_dtype_bits(from) / 8);
    c.to             = get(n * (size_t)lorasync_dtype_bits(to) / 8);
    c.from_dtype     = from;
    c.to_dtype       = to;
    c.n              = n;
    c.repeat         = repeat;
    fill_floats(c.from, from, n);
    measure(run_convert, &c, &s, run_copy, &base, &b);
    snprintf(name, sizeof name, "%s -> %s, %s", lorasync_dtype_name(from), lorasync_dtype_name(to), where);
    row_rate("convert", name, (double)(n * sizes * repeat), &s, &b, "memcpy");
    free(c.from);
    free(c.to);
    copy_free(&base);
}

/* In cache: 4096 elements. Out of it: 64 Mi of them, 256 MiB as F32. */
static void bench_convert(void)
{
    static const lorasync_dtype pairs[][2] = {{LORASYNC_F32, LORASYNC_BF16},    {LORASYNC_F32, LORASYNC_F16},
                                              {LORASYNC_F32, LORASYNC_F8_E4M3}, {LORASYNC_F32, LORASYNC_F8_E5M2},
                                              {LORASYNC_BF16, LORASYNC_F32},    {LORASYNC_F16, LORASYNC_F32}};
    size_t                      i, large = option.quick ? (size_t)4 << 20 : (size_t)64 << 20;
    for (i = 0; i < COUNT(pairs); i++) bench_convert_pair(pairs[i][0], pairs[i][1], 4096, 200, "in cache");
    for (i = 0; i < COUNT(pairs); i++) bench_convert_pair(pairs[i][0], pairs[i][1], large, 1, "in memory");
}

typedef struct digesting {
    const void *bytes;
    size_t      num_bytes, repeat;
    uint64_t    sum;
} digesting;

static double run_digest(void *user)
{
    digesting *d     = (digesting *)user;
    double     start = now();
    size_t     i;
    for (i = 0; i < d->repeat; i++) d->sum += lorasync_digest(d->bytes, d->num_bytes, d->sum % 2 * 256);
    return now() - start;
}

static void bench_digest_of(size_t num_bytes, size_t repeat, const char *name)
{
    copy      base = copy_make(num_bytes / 2, repeat);
    digesting d;
    samples   s, b;
    d.bytes     = get(num_bytes);
    d.num_bytes = num_bytes;
    d.repeat    = repeat;
    d.sum       = 0;
    fill_floats((void *)(uintptr_t)d.bytes, LORASYNC_BF16, num_bytes / 2);
    measure(run_digest, &d, &s, run_copy, &base, &b);
    row_rate("digest", name, (double)(num_bytes * repeat), &s, &b, "memcpy");
    free((void *)(uintptr_t)d.bytes);
    copy_free(&base);
}

static void bench_digest(void)
{
    bench_digest_of((size_t)16 << 10, 200, "lorasync_digest, in cache");
    bench_digest_of(option.quick ? (size_t)16 << 20 : (size_t)256 << 20, 1, "lorasync_digest, in memory");
}

/* -- plan: threads of one process; cores may be fewer than ranks, so the CPU time of each is what to look at */

typedef struct plan_rank {
    lorasync_comm       comm;
    const tensor_list  *list;
    void               *data;
    int                 no_direct, repeat;
    size_t              num_pieces; /* that are not empty */
    double              wall[16], cpu[16];
    lorasync_plan_stats stats;
} plan_rank;

static void *plan_thread(void *user)
{
    plan_rank         *r      = (plan_rank *)user;
    lorasync_piece    *pieces = fsdp2_pieces(r->list, LORASYNC_F32, r->comm.rank, r->comm.world, r->data, 1);
    lorasync_plan_desc d;
    lorasync_error     err;
    char               all[64];
    size_t             k;
    int                i;
    for (k = 0; k < r->list->num; k++) r->num_pieces += pieces[k].box.len[0] != 0;
    memset(&d, 0, sizeof d);
    d.comm       = &r->comm;
    d.wire_dtype = LORASYNC_BF16;
    d.have       = pieces;
    d.num_have   = r->list->num;
    d.adapter    = "default";
    d.no_direct  = r->no_direct;
    d.timeout_ms = 600000;
    for (i = 0; i < r->repeat; i++) {
        lorasync_plan *plan;
        double         wall, cpu;
        must(r->comm.all_gather(r->comm.user, "", all, 1, 600000, &err), "all_gather", &err); /* all begin together */
        wall = now();
        cpu  = seconds(CLOCK_THREAD_CPUTIME_ID);
        must(lorasync_plan_create(&d, &plan, &err), "lorasync_plan_create", &err);
        r->cpu[i]  = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
        r->wall[i] = now() - wall;
        lorasync_plan_get_stats(plan, &r->stats);
        lorasync_plan_free(plan);
    }
    free(pieces);
    return NULL;
}

/* Memory for each piece that the rank holds or, on the planning rank, that anybody holds. */
static void print_plan_bytes(const char *title, const char *who, const lorasync_plan_stats *stats, size_t num_pieces)
{
    char name[NAME];
    snprintf(name, sizeof name, "%.90s: %.20s, kept", title, who),
        row_number("plan", name, (double)stats->plan_bytes / (double)num_pieces, "bytes/piece");
    snprintf(name, sizeof name, "%.90s: %.20s, peak", title, who),
        row_number("plan", name, (double)stats->peak_plan_bytes / (double)num_pieces, "bytes/piece");
}

static void print_plan(const plan_rank *ranks, int world)
{
    const lorasync_plan_stats *root       = &ranks[0].stats;
    size_t                     num_pieces = 0;
    samples                    wall, planner, most;
    char                       name[NAME], title[96];
    int                        i, r;
    wall.num = planner.num = most.num = 0;
    for (i = 0; i < ranks[0].repeat; i++) {
        double w = 0, c = 0;
        for (r = 0; r < world; r++) {
            if (ranks[r].wall[i] > w) w = ranks[r].wall[i];
            if (r > 0 && ranks[r].cpu[i] > c) c = ranks[r].cpu[i];
        }
        sample(&wall, w), sample(&planner, ranks[0].cpu[i]), sample(&most, c);
    }
    snprintf(title, sizeof title, "%zu tensors, %d ranks, %s", root->num_tensors, world,
             root->direct ? "direct" : "messages");
    snprintf(name, sizeof name, "%s: planning rank, CPU", title), row_ms("plan", name, &planner, 0, NULL);
    snprintf(name, sizeof name, "%s: other ranks, CPU", title), row_ms("plan", name, &most, 0, NULL);
    snprintf(name, sizeof name, "%s: wall", title), row_ms("plan", name, &wall, 0, NULL);
    for (r = 0; r < world; r++) num_pieces += ranks[r].num_pieces;
    snprintf(name, sizeof name, "%s: pieces of all ranks", title), row_number("plan", name, (double)num_pieces, "");
    print_plan_bytes(title, "planning rank", root, num_pieces);
    print_plan_bytes(title, "rank 1", &ranks[1].stats, ranks[1].num_pieces);
}

/* A thread per rank, to the end. ranks: `world` of `num_bytes` each, one for each thread. */
static void run_ranks(void *(*function)(void *), void *ranks, size_t num_bytes, int world)
{
    pthread_t *threads = (pthread_t *)get((size_t)world * sizeof *threads);
    int        r;
    for (r = 0; r < world; r++)
        if (pthread_create(&threads[r], NULL, function, (char *)ranks + (size_t)r * num_bytes) != 0)
            die("pthread_create", "no thread");
    for (r = 0; r < world; r++) pthread_join(threads[r], NULL);
    free(threads);
}

static void bench_plan_of(const tensor_list *list, int world, int no_direct, void *data)
{
    plan_rank      *ranks = (plan_rank *)get((size_t)world * sizeof *ranks);
    lorasync_local *local;
    lorasync_error  err;
    int             r;
    must(lorasync_local_open(world, &local, &err), "lorasync_local_open", &err);
    for (r = 0; r < world; r++) {
        memset(&ranks[r], 0, sizeof ranks[r]);
        must(lorasync_local_join(local, r, &ranks[r].comm, &err), "lorasync_local_join", &err);
        ranks[r].list      = list;
        ranks[r].data      = data;
        ranks[r].no_direct = no_direct;
        ranks[r].repeat    = list->num < 1000 ? 9 : world > 8 ? 3 : 5;
    }
    run_ranks(plan_thread, ranks, sizeof *ranks, world);
    print_plan(ranks, world);
    lorasync_local_close(local);
    free(ranks);
}

static void bench_plan(void)
{
    static const model *const models[] = {&qwen_8b, &qwen_30b};
    int                       i, world;
    void                     *data = get((size_t)8 << 20); /* more than any piece */
    for (i = 0; i < (option.quick ? 1 : 2); i++) {
        tensor_list list = list_make(models[i], "");
        for (world = 2; world <= (option.quick ? 8 : 64); world *= 2) {
            bench_plan_of(&list, world, 1, data);
            if (world == 8) bench_plan_of(&list, world, 0, data);
        }
        list_free(&list);
    }
    free(data);
}

/* -- compile: sessions whose ranks all know the base model, which proves what they publish */

typedef struct compile_rank {
    lorasync_comm      comm;
    const tensor_list *list;
    const char        *config;
    void              *data;
    int                repeat;
    double             cpu[16], proof[16]; /* of lorasync_compile; of the proofs alone */
} compile_rank;

/* All LoRA, and the base weight of each lora_B: as many rows as it, and columns as the lora_A before it. */
static lorasync_session *compile_open(const compile_rank *r)
{
    lorasync_piece   *pieces = fsdp2_pieces(r->list, LORASYNC_F32, r->comm.rank, r->comm.world, r->data, 1);
    lorasync_session *s;
    lorasync_desc     d;
    lorasync_error    err;
    char              name[NAME];
    size_t            i;
    memset(&d, 0, sizeof d);
    d.comm        = &r->comm;
    d.wire_dtype  = LORASYNC_BF16;
    d.config_json = r->config;
    d.lora_alpha  = r->config ? 0 : 16;
    d.timeout_ms  = 600000;
    must(lorasync_open(&d, &s, &err), "lorasync_open", &err);
    for (i = 0; i < r->list->num; i++) {
        lorasync_piece base = pieces[i];
        must(lorasync_add(s, &pieces[i], &err), "lorasync_add", &err);
        if (i % 2 == 0) continue;
        snprintf(name, sizeof name, "%.*sbase_layer.weight", (int)(strstr(base.name, "lora_B") - base.name), base.name);
        base.name     = name;
        base.shape[1] = pieces[i - 1].shape[1];
        must(lorasync_add(s, &base, &err), "lorasync_add", &err);
    }
    free(pieces);
    return s;
}

static double run_compile(lorasync_session *s)
{
    lorasync_error err;
    double         cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
    must(lorasync_compile(s, &err), "lorasync_compile", &err);
    return seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
}

/* Reading the pairs, which the making of the config needs, too. */
static double run_pairs(const lorasync_session *s)
{
    lorasynci_pairs pairs;
    lorasynci_hints hints;
    lorasync_error  err;
    double          cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
    if (!s->plan->has_image) return 0;
    memset(&hints, 0, sizeof hints);
    must(lorasynci_pairs_read(&pairs, s->plan->image->tensors, s->plan->image->num_tensors, &hints, &s->host.a, &err),
         "pairs", &err);
    lorasynci_pairs_free(&pairs);
    return seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
}

/* The proofs once more, as compile has them; without the reading of pairs. */
static double run_proof(lorasync_session *s)
{
    lorasynci_survey survey;
    lorasync_error   err;
    double           cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
    memset(&survey, 0, sizeof survey);
    survey.pairs.a = s->host.a;
    lorasynci_buffer_init(&survey.gaps, &s->host.a);
    lorasynci_buffer_init(&survey.gap_texts, &s->host.a);
    must(lorasynci_survey_talk(s, &survey, &err), "proof", &err);
    if (s->plan->has_image) must(lorasynci_survey_shapes(s, &survey, &err), "shapes", &err);
    if (s->plan->has_image) must(lorasynci_survey_holes(s, &survey, &err), "holes", &err);
    if (s->plan->has_image) must(lorasynci_survey_strangers(s, &survey, &err), "strangers", &err);
    if (s->plan->has_image) must(lorasynci_survey_gaps(s, &survey, &err), "gaps", &err);
    if (s->plan->has_image && s->num_proved * 2 != s->plan->image->num_tensors) die("proof", "not all is proved");
    lorasynci_survey_free(&survey, &s->host.a);
    return seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
}

static void *compile_thread(void *user)
{
    compile_rank  *r = (compile_rank *)user;
    lorasync_error err;
    char           all[64];
    int            i;
    for (i = 0; i < r->repeat; i++) {
        lorasync_session *s = compile_open(r);
        must(r->comm.all_gather(r->comm.user, "", all, 1, 600000, &err), "all_gather", &err); /* all begin together */
        r->cpu[i]   = run_compile(s);
        r->proof[i] = run_proof(s) - run_pairs(s);
        lorasync_close(s);
    }
    return NULL;
}

static void print_compile(const compile_rank *ranks, int world, size_t num_tensors, const char *what)
{
    samples whole, proof;
    char    name[NAME];
    int     i, who;
    for (who = 0; who < (world > 1 ? 2 : 1); who++) {
        whole.num = proof.num = 0;
        for (i = 0; i < ranks[0].repeat; i++) sample(&whole, ranks[who].cpu[i]), sample(&proof, ranks[who].proof[i]);
        snprintf(name, sizeof name, "%zu tensors, %d ranks, %s: %s, CPU", num_tensors, world, what,
                 who ? "rank 1" : "root");
        row_ms("compile", name, &whole, 0, NULL);
        snprintf(name, sizeof name, "   of it proofs");
        row_ms("compile", name, &proof, median(&whole), "compile");
    }
}

static void bench_compile_of(const tensor_list *list, int world, const char *config, const char *what, void *data)
{
    compile_rank   *ranks = (compile_rank *)get((size_t)world * sizeof *ranks);
    lorasync_local *local;
    lorasync_error  err;
    int             r;
    must(lorasync_local_open(world, &local, &err), "lorasync_local_open", &err);
    for (r = 0; r < world; r++) {
        memset(&ranks[r], 0, sizeof ranks[r]);
        must(lorasync_local_join(local, r, &ranks[r].comm, &err), "lorasync_local_join", &err);
        ranks[r].list   = list;
        ranks[r].data   = data;
        ranks[r].config = config;
        ranks[r].repeat = 5;
    }
    run_ranks(compile_thread, ranks, sizeof *ranks, world);
    print_compile(ranks, world, list->num, what);
    lorasync_local_close(local);
    free(ranks);
}

static void bench_compile(void)
{
    static const char config[] = "{\"peft_type\":\"LORA\",\"r\":16,\"lora_alpha\":16,\"target_modules\":[\"q_proj\","
                                 "\"k_proj\",\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\"]}";
    model             m        = option.quick ? qwen_06b : qwen_30b;
    void             *data     = get((size_t)8 << 20); /* more than any piece */
    tensor_list       list;
    int               world;
    m.r  = 16;
    list = list_make(&m, ".default");
    for (world = 1; world <= 8; world *= 2) {
        bench_compile_of(&list, world, NULL, "no config", data);
        bench_compile_of(&list, world, config, "config", data);
    }
    list_free(&list);
    free(data);
}

/* -- image */

static double run_layout(void *user)
{
    const tensor_list  *list = (const tensor_list *)user;
    lorasync_image_desc d;
    lorasync_image     *image;
    lorasync_error      err;
    double              start, end;
    memset(&d, 0, sizeof d);
    d.tensors     = list->at;
    d.num_tensors = list->num;
    d.adapter     = "default";
    start         = now();
    must(lorasync_image_layout(&d, NULL, &image, &err), "lorasync_image_layout", &err);
    end = now();
    lorasync_image_free(image);
    return end - start;
}

typedef struct file_bytes {
    void  *bytes;
    size_t num_bytes;
} file_bytes;

static double run_parse(void *user)
{
    const file_bytes *f = (const file_bytes *)user;
    lorasync_image   *image;
    lorasync_error    err;
    double            start = now(), end;
    must(lorasync_image_parse(f->bytes, f->num_bytes, NULL, &image, &err), "lorasync_image_parse", &err);
    end = now();
    lorasync_image_free(image);
    return end - start;
}

typedef struct lookup {
    const lorasync_image *image;
    const tensor_list    *list;
    size_t                found;
} lookup;

/* All names once, in an order that jumps about. */
static double run_find(void *user)
{
    lookup *u     = (lookup *)user;
    double  start = now();
    size_t  i, at = 0;
    for (i = 0; i < u->list->num; i++) {
        at = (at + 7919) % u->list->num;
        u->found += lorasync_image_find(u->image, u->list->at[at].name) != NULL;
    }
    return now() - start;
}

static double run_image_digest(void *user)
{
    double start = now();
    lorasync_image_digest((const lorasync_image *)user, NULL);
    return now() - start;
}

static void bench_image(void)
{
    model               m    = option.quick ? qwen_8b : qwen_30b;
    tensor_list         list = list_make(&m, "");
    lorasync_image_desc d;
    lorasync_image     *image;
    lorasync_error      err;
    file_bytes          file;
    lookup              find;
    samples             s;
    char                name[NAME];
    memset(&d, 0, sizeof d);
    d.tensors     = list.at;
    d.num_tensors = list.num;
    d.adapter     = "default";
    must(lorasync_image_layout(&d, NULL, &image, &err), "lorasync_image_layout", &err);
    file.num_bytes = image->header_bytes + image->payload_bytes;
    file.bytes     = get(file.num_bytes);
    memcpy(file.bytes, image->header, image->header_bytes);
    fill_floats((char *)file.bytes + image->header_bytes, LORASYNC_BF16, image->payload_bytes / 2);
    lorasync_image_bind(image, (char *)file.bytes + image->header_bytes);
    snprintf(name, sizeof name, "%zu tensors: header", list.num),
        row_number("image", name, (double)image->header_bytes / 1e6, "MB");
    measure(run_layout, &list, &s, NULL, NULL, NULL);
    snprintf(name, sizeof name, "%zu tensors: layout and write", list.num), row_ms("image", name, &s, 0, NULL);
    measure(run_parse, &file, &s, NULL, NULL, NULL);
    snprintf(name, sizeof name, "%zu tensors: parse and validate", list.num), row_ms("image", name, &s, 0, NULL);
    find.image = image;
    find.list  = &list;
    measure(run_find, &find, &s, NULL, NULL, NULL);
    snprintf(name, sizeof name, "%zu tensors: lorasync_image_find", list.num);
    row("image", name, median(&s) / (double)list.num * 1e9, lowest(&s) / (double)list.num * 1e9, "ns", 0, NULL);
    measure(run_image_digest, image, &s, NULL, NULL, NULL);
    snprintf(name, sizeof name, "%zu tensors: lorasync_image_digest", list.num),
        row_rate("image", name, (double)image->payload_bytes, &s, NULL, NULL);
    lorasync_image_free(image);
    free(file.bytes);
    list_free(&list);
}

/* -- shm: publishing to engines of this host */

typedef struct shm_bench {
    lorasync_transport t;
    lorasync_engine   *engine; /* NULL: nobody polls */
    lorasync_image    *image;
    uint64_t           version;
    double             poll; /* seconds of the last one */
} shm_bench;

static lorasync_engine *shm_engine(const char *name, int no_verify)
{
    lorasync_engine_desc d;
    lorasync_engine     *e;
    lorasync_error       err;
    memset(&d, 0, sizeof d);
    d.shm       = name;
    d.no_verify = no_verify;
    must(lorasync_engine_open(&d, &e, &err), "lorasync_engine_open", &err);
    return e;
}

/* Until the new version is visible: stage and commit. */
static double run_shm_publish(void *user)
{
    shm_bench     *b = (shm_bench *)user;
    lorasync_error err;
    double         start, end;
    lorasync_image_stamp(b->image, ++b->version, b->image->digest);
    start = now();
    must(b->t.stage(b->t.user, b->image, &err), "stage", &err);
    must(b->t.commit(b->t.user, b->image->adapter, b->version, &err), "commit", &err);
    end = now();
    if (b->engine && lorasync_engine_poll(b->engine, 0, &err) != LORASYNC_OK) die("lorasync_engine_poll", err.text);
    b->poll = now() - end;
    return end - start;
}

static double run_shm_poll(void *user)
{
    run_shm_publish(user);
    return ((shm_bench *)user)->poll;
}

enum {
    ACQUIRES = 100000
};

static double run_acquire(void *user)
{
    double start = now();
    int    i;
    for (i = 0; i < ACQUIRES; i++) lorasync_release(lorasync_acquire((lorasync_engine *)user, "default"));
    return now() - start;
}

static void bench_shm_polls(shm_bench *b, const char *shm, int no_verify, const char *what)
{
    samples s;
    b->engine = shm_engine(shm, no_verify);
    measure(run_shm_poll, b, &s, NULL, NULL, NULL);
    row_ms("shm", what, &s, 0, NULL);
    measure(run_acquire, b->engine, &s, NULL, NULL, NULL);
    if (!no_verify)
        row("shm", "lorasync_acquire and lorasync_release", median(&s) / ACQUIRES * 1e9, lowest(&s) / ACQUIRES * 1e9,
            "ns", 0, NULL);
    lorasync_engine_close(b->engine);
    b->engine = NULL;
}

static void bench_shm(void)
{
    tensor_list         list = list_make(&qwen_8b, "");
    lorasync_image_desc d;
    lorasync_shm_desc   sd;
    lorasync_error      err;
    shm_bench           b;
    copy                c;
    samples             s, base;
    void               *payload;
    char                shm[40], name[NAME];
    memset(&b, 0, sizeof b);
    memset(&sd, 0, sizeof sd);
    snprintf(shm, sizeof shm, "bench-%ld", (long)getpid());
    memset(&d, 0, sizeof d);
    d.tensors     = list.at;
    d.num_tensors = list.num;
    d.adapter     = "default";
    must(lorasync_image_layout(&d, NULL, &b.image, &err), "lorasync_image_layout", &err);
    payload = get(b.image->payload_bytes);
    fill_floats(payload, LORASYNC_BF16, b.image->payload_bytes / 2);
    lorasync_image_bind(b.image, payload);
    lorasync_image_stamp(b.image, 1, lorasync_image_digest(b.image, NULL));
    b.image->config_json = "{\"peft_type\":\"LORA\",\"r\":32,\"lora_alpha\":32,\"target_modules\":\"all-linear\"}";
    sd.name              = shm;
    must(lorasync_shm_open(&sd, &b.t, &err), "lorasync_shm_open", &err);
    c = copy_make(b.image->header_bytes + b.image->payload_bytes, 1);
    run_shm_publish(&b), run_shm_publish(&b), run_shm_publish(&b); /* every slot is warm */
    measure(run_copy, &c, &base, run_shm_publish, &b, &s);
    snprintf(name, sizeof name, "%s: memcpy of the image, %.0f MB", qwen_8b.name, (double)c.num_bytes / 1e6);
    row_rate("shm", name, (double)c.num_bytes, &base, NULL, NULL);
    row_rate("shm", "stage and commit: until the new version is visible", (double)c.num_bytes, &s, &base, "memcpy");
    bench_shm_polls(&b, shm, 0, "lorasync_engine_poll: map, parse, verify the digest");
    bench_shm_polls(&b, shm, 1, "lorasync_engine_poll without verifying");
    b.t.close(b.t.user);
    lorasync_shm_remove(shm, NULL);
    copy_free(&c);
    lorasync_image_free(b.image);
    free(payload);
    list_free(&list);
}

/* -- names: a live mixture-of-experts model, base parameters and LoRA */

typedef struct name_list {
    char             *names; /* NAME bytes each */
    size_t            num, taken;
    lorasync_matcher *matcher;
} name_list;

static void add_name(name_list *l, const char *prefix, const char *rest)
{
    snprintf(l->names + l->num++ * NAME, NAME, "%.80s%.70s", prefix, rest);
}

/* The base parameters of the model, as PEFT names them when all seven projections have LoRA. */
static void add_base_names(name_list *l, const model *m)
{
    static const char *const per_layer[]  = {"input_layernorm.weight",
                                             "post_attention_layernorm.weight",
                                             "self_attn.q_norm.weight",
                                             "self_attn.k_norm.weight",
                                             "self_attn.q_proj.base_layer.weight",
                                             "self_attn.k_proj.base_layer.weight",
                                             "self_attn.v_proj.base_layer.weight",
                                             "self_attn.o_proj.base_layer.weight",
                                             "mlp.gate.weight"};
    static const char *const per_expert[] = {"gate_proj.base_layer.weight", "up_proj.base_layer.weight",
                                             "down_proj.base_layer.weight"};
    char                     prefix[80];
    int                      i, e;
    size_t                   k;
    for (i = 0; i < m->layers; i++) {
        snprintf(prefix, sizeof prefix, "base_model.model.model.layers.%d.", i);
        for (k = 0; k < COUNT(per_layer); k++) add_name(l, prefix, per_layer[k]);
        for (e = 0; e < m->experts; e++) {
            snprintf(prefix, sizeof prefix, "base_model.model.model.layers.%d.mlp.experts.%d.", i, e);
            for (k = 0; k < COUNT(per_expert); k++) add_name(l, prefix, per_expert[k]);
        }
    }
    add_name(l, "base_model.model.", "model.embed_tokens.weight");
    add_name(l, "base_model.model.", "model.norm.weight");
    add_name(l, "base_model.model.", "lm_head.weight");
}

static double run_names(void *user)
{
    name_list     *l     = (name_list *)user;
    double         start = now();
    lorasync_name  name;
    lorasync_error err;
    size_t         i;
    l->taken = 0;
    for (i = 0; i < l->num; i++) {
        must(lorasync_parse_name(l->names + i * NAME, &name, &err), "lorasync_parse_name", &err);
        l->taken += lorasync_matcher_takes(l->matcher, &name, "default") != 0;
    }
    return now() - start;
}

static void bench_names_with(name_list *l, const lorasync_filter *filter, const char *what)
{
    lorasync_error err;
    samples        s;
    char           name[NAME];
    must(lorasync_matcher_create(filter, NULL, 0, NULL, &l->matcher, &err), "lorasync_matcher_create", &err);
    measure(run_names, l, &s, NULL, NULL, NULL);
    snprintf(name, sizeof name, "%zu names, %zu taken: %s", l->num, l->taken, what);
    row_ms("names", name, &s, 0, NULL);
    lorasync_matcher_free(l->matcher);
}

static void bench_names(void)
{
    static const char *const modules[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
    model                    m         = qwen_30b;
    tensor_list              lora;
    name_list                l;
    lorasync_filter          filter;
    size_t                   i;
    if (option.quick) m.layers = 4;
    lora = list_make(&m, ".default");
    memset(&l, 0, sizeof l);
    l.names = (char *)get((lora.num + (size_t)m.layers * (9 + 3 * (size_t)m.experts) + 3) * NAME);
    for (i = 0; i < lora.num; i++) add_name(&l, lora.at[i].name, "");
    add_base_names(&l, &m);
    memset(&filter, 0, sizeof filter);
    bench_names_with(&l, &filter, "parse and match");
    filter.target_modules     = modules;
    filter.num_target_modules = COUNT(modules);
    bench_names_with(&l, &filter, "and a list of 7");
    memset(&filter, 0, sizeof filter);
    filter.target_pattern = ".*\\.(self_attn|mlp)\\..*(q|k|v|o|gate|up|down)_proj";
    bench_names_with(&l, &filter, "and a pattern");
    free(l.names);
    list_free(&lora);
}

/* -- sync: 4 processes, a session each */

enum {
    SYNC_WORLD      = 4,
    SYNC_TRANSPORTS = 4,
    SYNC_MODES      = 2 * SYNC_TRANSPORTS,
    SYNC_RUNS       = 41
};

typedef struct sync_times {
    samples pack, exchange, place, publish, total;
    long    allocations; /* of the measured steps, all ranks */
    int     direct;
} sync_times;

/* Shared by the processes; each field is written by rank 0, but for the counts. */
typedef struct sync_shared {
    sync_times mode[SYNC_MODES];
    samples    copy, per_tensor, per_tensor_cast;
    size_t     image_bytes;
} sync_shared;

typedef struct sync_rank {
    lorasync_comm      comm;
    const tensor_list *list;
    lorasync_piece    *pieces;
    sync_shared       *shared;
} sync_rank;

static void sync_shm_name(char *out, size_t size, int mode)
{
    snprintf(out, size, "bench-sync-%ld-%d", (long)getppid(), mode);
}

/* First direct, then messages; each without transport, to shared memory, to a directory without fsync and with. */
static lorasync_session *sync_open(const sync_rank *r, int mode, counter *allocations)
{
    lorasync_desc           d;
    lorasync_directory_desc dd;
    lorasync_shm_desc       sd;
    lorasync_transport      transport;
    lorasync_session       *s;
    lorasync_error          err;
    lorasync_allocator      a = counting(allocations);
    char                    directory[1024];
    size_t                  i;
    memset(&d, 0, sizeof d);
    d.comm       = &r->comm;
    d.wire_dtype = LORASYNC_BF16;
    d.lora_alpha = 32;
    d.no_direct  = mode >= SYNC_TRANSPORTS;
    d.allocator  = &a;
    must(lorasync_open(&d, &s, &err), "lorasync_open", &err);
    for (i = 0; i < r->list->num; i++) must(lorasync_add(s, &r->pieces[i], &err), "lorasync_add", &err);
    if (mode % SYNC_TRANSPORTS == 1 && r->comm.rank == 0) {
        memset(&sd, 0, sizeof sd);
        sync_shm_name(directory, sizeof directory, mode);
        sd.name      = directory;
        sd.allocator = &a;
        must(lorasync_shm_open(&sd, &transport, &err), "lorasync_shm_open", &err);
        must(lorasync_attach(s, &transport, &err), "lorasync_attach", &err);
    } else if (mode % SYNC_TRANSPORTS > 1) {
        snprintf(directory, sizeof directory, "%s/mode%d", option.directory, mode);
        memset(&dd, 0, sizeof dd);
        dd.directory = directory;
        dd.no_fsync  = mode % SYNC_TRANSPORTS == 2;
        dd.allocator = &a;
        must(lorasync_directory_open(&dd, &transport, &err), "lorasync_directory_open", &err);
        must(lorasync_attach(s, &transport, &err), "lorasync_attach", &err);
    }
    must(lorasync_compile(s, &err), "lorasync_compile", &err);
    return s;
}

static void sync_mode(const sync_rank *r, int mode)
{
    counter           allocations = {0};
    lorasync_session *s           = sync_open(r, mode, &allocations);
    sync_times       *t           = &r->shared->mode[mode];
    lorasync_report   report;
    lorasync_error    err;
    int               i, runs = option.quick ? 5 : SYNC_RUNS, warm_up = 3;
    for (i = -warm_up; i < runs; i++) {
        if (i == 0) allocations.num = 0;
        must(lorasync_sync(s, (uint64_t)(i + warm_up + 1), &report, &err), "lorasync_sync", &err);
        if (i < 0 || r->comm.rank != 0) continue;
        sample(&t->pack, 1e-9 * (double)report.pack_ns), sample(&t->exchange, 1e-9 * (double)report.exchange_ns);
        sample(&t->place, 1e-9 * (double)report.place_ns), sample(&t->publish, 1e-9 * (double)report.publish_ns);
        sample(&t->total, 1e-9 * (double)report.total_ns);
        t->direct              = report.direct;
        r->shared->image_bytes = report.payload_bytes;
    }
    __atomic_fetch_add(&t->allocations, allocations.num, __ATOMIC_RELAXED);
    lorasync_close(s);
    if (mode % SYNC_TRANSPORTS == 1 && r->comm.rank == 0) {
        char name[64];
        sync_shm_name(name, sizeof name, mode);
        lorasync_shm_remove(name, NULL);
    }
}

/* What a framework does without a plan: one collective per tensor, of the parts in the wire's type, or as they are and
   a cast behind. */
static void sync_per_tensor(const sync_rank *r, int cast_behind)
{
    size_t         i, most = 0, item = cast_behind ? 4 : 2;
    char          *part, *whole, *image;
    lorasync_error err;
    int            run, runs = option.quick ? 3 : 15;
    for (i = 0; i < r->list->num; i++) {
        size_t n = (size_t)(r->list->at[i].shape[0] * r->list->at[i].shape[1]);
        if (n > most) most = n;
    }
    part  = (char *)get(most * 2);
    whole = (char *)get(most * 4);
    image = (char *)get((size_t)r->list->numel * 2);
    for (run = -1; run < runs; run++) {
        double start = now();
        char  *to    = image;
        for (i = 0; i < r->list->num; i++) {
            const lorasync_piece *p = &r->pieces[i];
            size_t                n = (size_t)(p->box.len[0] * p->box.len[1]), all = n * SYNC_WORLD;
            if (!cast_behind) lorasync_convert(part, LORASYNC_BF16, p->data, LORASYNC_F32, n, NULL);
            must(r->comm.all_gather(r->comm.user, cast_behind ? p->data : part, whole, n * item, 60000, &err),
                 "all_gather", &err);
            if (cast_behind) lorasync_convert(to, LORASYNC_BF16, whole, LORASYNC_F32, all, NULL);
            else memcpy(to, whole, all * 2);
            to += all * 2;
        }
        if (run >= 0 && r->comm.rank == 0)
            sample(cast_behind ? &r->shared->per_tensor_cast : &r->shared->per_tensor, now() - start);
    }
    free(part);
    free(whole);
    free(image);
}

/* memcpy of the image, by one process while the others wait. */
static void sync_copy(const sync_rank *r)
{
    char           all[SYNC_WORLD];
    lorasync_error err;
    if (r->comm.rank == 0) {
        copy c = copy_make(r->shared->image_bytes, 1);
        measure(run_copy, &c, &r->shared->copy, NULL, NULL, NULL);
        copy_free(&c);
    }
    must(r->comm.all_gather(r->comm.user, "", all, 1, 60000, &err), "all_gather", &err);
}

static void sync_process(sync_rank *r)
{
    size_t i, n = 0;
    int    mode;
    void  *data = get((size_t)r->list->numel / SYNC_WORLD * 4 + 4096);
    r->pieces   = fsdp2_pieces(r->list, LORASYNC_F32, r->comm.rank, SYNC_WORLD, data, 0);
    for (i = 0; i < r->list->num; i++) n += (size_t)(r->pieces[i].box.len[0] * r->pieces[i].box.len[1]);
    fill_floats(data, LORASYNC_F32, n);
    for (mode = 0; mode < SYNC_MODES; mode++) sync_mode(r, mode);
    sync_copy(r);
    sync_per_tensor(r, 0);
    sync_per_tensor(r, 1);
    free(r->pieces);
    free(data);
}

static void print_sync(const sync_shared *shared)
{
    static const char *const transports[] = {"no transport", "shared memory", "directory, no fsync", "directory"};
    double                   copied       = median(&shared->copy);
    char                     name[NAME];
    int                      mode;
    row_number("sync", "image", (double)shared->image_bytes / 1e6, "MB");
    row_ms("sync", "memcpy of the image, one process", &shared->copy, 0, NULL);
    row_ms("sync", "one all_gather per tensor, cast before", &shared->per_tensor, copied, "memcpy");
    row_ms("sync", "one all_gather per tensor, cast behind", &shared->per_tensor_cast, copied, "memcpy");
    for (mode = 0; mode < SYNC_MODES; mode++) {
        const sync_times *t = &shared->mode[mode];
        snprintf(name, sizeof name, "%s, %s", t->direct ? "direct" : "messages", transports[mode % SYNC_TRANSPORTS]);
        row_ms("sync", name, &t->total, copied, "memcpy");
        if (mode % SYNC_TRANSPORTS == 0)
            row("sync", "  the same", median(&t->total) * 1e3, lowest(&t->total) * 1e3, "ms",
                median(&t->total) / median(&shared->per_tensor), "per tensor");
        row_ms("sync", "  pack", &t->pack, 0, NULL);
        row_ms("sync", "  exchange", &t->exchange, 0, NULL);
        row_ms("sync", "  place", &t->place, 0, NULL);
        row_ms("sync", "  publish", &t->publish, 0, NULL);
        row_number("sync", "  allocations in all runs, all ranks", (double)t->allocations, "");
    }
}

/* Removes a folder and what is in it. */
static void remove_tree(const char *path)
{
    char           below[1024];
    struct dirent *entry;
    struct stat    st;
    DIR           *dir;
    if (lstat(path, &st) != 0) return;
    if (!S_ISDIR(st.st_mode)) {
        unlink(path);
        return;
    }
    dir = opendir(path);
    while (dir && (entry = readdir(dir)) != NULL) {
        int n = snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
        if (n > 0 && (size_t)n < sizeof below && strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            remove_tree(below);
    }
    if (dir) closedir(dir);
    rmdir(path);
}

static void bench_sync(void)
{
    model        m = qwen_06b;
    tensor_list  list;
    sync_shared *shared =
        (sync_shared *)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    lorasync_local *local;
    lorasync_error  err;
    pid_t           pids[SYNC_WORLD];
    int             rank, status, failed = 0;
    char            name[NAME], directory[512];
    const char     *parent = option.directory ? option.directory : "/tmp";
    snprintf(directory, sizeof directory, "%.400s/lorasync_bench_XXXXXX", parent);
    if ((void *)shared == MAP_FAILED) die("mmap", strerror(errno));
    if (!mkdtemp(directory)) die(directory, strerror(errno));
    option.directory = directory;
    if (option.quick) m.layers = 4;
    list = list_make(&m, ".default");
    must(lorasync_local_open(SYNC_WORLD, &local, &err), "lorasync_local_open", &err);
    fflush(stdout);
    for (rank = 0; rank < SYNC_WORLD; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0) {
            sync_rank r;
            memset(&r, 0, sizeof r);
            r.list   = &list;
            r.shared = shared;
            must(lorasync_local_join(local, rank, &r.comm, &err), "lorasync_local_join", &err);
            sync_process(&r);
            _exit(0);
        }
        if (pids[rank] < 0) die("fork", strerror(errno));
    }
    for (rank = 0; rank < SYNC_WORLD; rank++)
        if (waitpid(pids[rank], &status, 0) != pids[rank] || status != 0) failed = 1;
    remove_tree(directory);
    if (failed) die("sync", "a rank failed");
    snprintf(name, sizeof name, "%s%s, FSDP2 F32 -> BF16, processes", m.name, option.quick ? " (4 layers)" : "");
    row_number("sync", name, SYNC_WORLD, "");
    print_sync(shared);
    lorasync_local_close(local);
    munmap(shared, sizeof *shared);
    list_free(&list);
}

/* -- audit: what it costs that replicas are compared */

enum {
    AUDIT_MOST = 8
};

typedef struct audit_bench {
    const tensor_list *list;
    int                is_parallel; /* as Megatron shards; else every rank has all */
    samples            total[2];    /* not compared; compared in each run */
    uint64_t           runs;        /* every how many they are compared by default */
} audit_bench;

typedef struct audit_thread {
    lorasync_comm comm;
    audit_bench  *b;
} audit_thread;

/* Columns: A whole and B by rows; o_proj and down_proj, rows: A by columns and B whole. */
static lorasync_box audit_box(const audit_thread *t, const lorasync_tensor *tensor)
{
    const lorasync_box whole  = lorasync_whole(tensor->shape, 2);
    const int          is_row = strstr(tensor->name, "o_proj") || strstr(tensor->name, "down_proj");
    const int          is_a   = strstr(tensor->name, "lora_A") != NULL;
    if (!t->b->is_parallel || is_row != is_a) return whole;
    return lorasync_shard(whole, is_row ? 1 : 0, t->comm.rank, t->comm.world);
}

static lorasync_session *audit_open(const audit_thread *t, int audits, const char *shm, char *data)
{
    lorasync_desc     d;
    lorasync_session *s;
    lorasync_error    err;
    size_t            i;
    memset(&d, 0, sizeof d);
    d.comm           = &t->comm;
    d.wire_dtype     = LORASYNC_BF16;
    d.lora_alpha     = 32;
    d.audit_replicas = audits;
    must(lorasync_open(&d, &s, &err), "lorasync_open", &err);
    for (i = 0; i < t->b->list->num; i++) {
        lorasync_piece p;
        memset(&p, 0, sizeof p);
        p.name  = t->b->list->at[i].name;
        p.dtype = LORASYNC_F32;
        p.ndim  = 2;
        memcpy(p.shape, t->b->list->at[i].shape, sizeof p.shape);
        p.box  = audit_box(t, &t->b->list->at[i]);
        p.data = data;
        data += p.box.len[0] * p.box.len[1] * 4;
        must(lorasync_add(s, &p, &err), "lorasync_add", &err);
    }
    must(lorasync_attach_shm(s, shm, &err), "lorasync_attach_shm", &err);
    must(lorasync_compile(s, &err), "lorasync_compile", &err);
    return s;
}

/* Syncs with and without in turns. All parameters are 0, which costs what others do. */
static void *audit_rank(void *user)
{
    const audit_thread *t = (const audit_thread *)user;
    lorasync_session   *s[2];
    lorasync_report     report;
    lorasync_error      err;
    char                shm[2][64], *data = (char *)get((size_t)t->b->list->numel * 4);
    int                 i, k, runs = option.quick ? 5 : 41;
    memset(data, 0, (size_t)t->b->list->numel * 4);
    for (k = 0; k < 2; k++) {
        snprintf(shm[k], sizeof shm[k], "bench-audit-%ld-%d", (long)getpid(), k);
        s[k] = audit_open(t, k ? 0 : -1, shm[k], data);
    }
    if (t->comm.rank == 0) t->b->runs = s[1]->plan->audit_runs;
    s[1]->plan->audit_runs = 1;
    for (i = -3; i < runs; i++)
        for (k = 0; k < 2; k++) {
            must(lorasync_sync(s[k], (uint64_t)(i + 4), &report, &err), "lorasync_sync", &err);
            if (i >= 0 && t->comm.rank == 0) sample(&t->b->total[k], 1e-9 * (double)report.total_ns);
        }
    for (k = 0; k < 2; k++) {
        lorasync_close(s[k]);
        if (t->comm.rank == 0) lorasync_shm_remove(shm[k], NULL);
    }
    free(data);
    return NULL;
}

static void bench_audit_of(const tensor_list *list, int world, int is_parallel, const char *model_name)
{
    audit_bench     b;
    audit_thread    t[AUDIT_MOST];
    pthread_t       threads[AUDIT_MOST];
    lorasync_local *local;
    lorasync_error  err;
    char            name[NAME];
    int             r;
    double          without, with;
    memset(&b, 0, sizeof b);
    b.list        = list;
    b.is_parallel = is_parallel;
    must(lorasync_local_open(world, &local, &err), "lorasync_local_open", &err);
    for (r = 0; r < world; r++) {
        t[r].b = &b;
        must(lorasync_local_join(local, r, &t[r].comm, &err), "lorasync_local_join", &err);
    }
    for (r = 1; r < world; r++) pthread_create(&threads[r], NULL, audit_rank, &t[r]);
    audit_rank(&t[0]);
    for (r = 1; r < world; r++) pthread_join(threads[r], NULL);
    lorasync_local_close(local);
    without = median(&b.total[0]);
    with    = median(&b.total[1]);
    snprintf(name, sizeof name, "%s, %d ranks, %s", model_name, world, is_parallel ? "tensor-parallel" : "replicated");
    row_ms("audit", name, &b.total[0], 0, NULL);
    row_ms("audit", "  and replicas compared", &b.total[1], without, "without");
    row_number("audit", "  that is, by default, of a sync", 100 * (with - without) / (double)b.runs / without, "%");
}

static void bench_audit(void)
{
    model       m = qwen_06b;
    tensor_list list;
    char        name[64];
    int         world;
    if (option.quick) m.layers = 4;
    list = list_make(&m, ".default");
    snprintf(name, sizeof name, "%s%s", m.name, option.quick ? " (4 layers)" : "");
    for (world = 2; world <= AUDIT_MOST; world *= 2) {
        bench_audit_of(&list, world, 1, name);
        bench_audit_of(&list, world, 0, name);
    }
    list_free(&list);
}

/* -- main */

typedef struct group {
    const char *name;
    void (*run)(void);
    const char *what;
} group;

static const group groups[] = {
    {"pack", bench_pack, "begin of a gather plan of one rank, against memcpy"},
    {"convert", bench_convert, "lorasync_convert, in cache and in memory"},
    {"digest", bench_digest, "lorasync_digest, in cache and in memory"},
    {"plan", bench_plan, "lorasync_plan_create for 504 and 37,248 tensors on 2 to 64 ranks: time and memory"},
    {"compile", bench_compile, "lorasync_compile for 37,248 tensors on 1 to 8 ranks, and its proofs from base weights"},
    {"image", bench_image, "safetensors header of 37,248 tensors: write, read, find; digest"},
    {"shm", bench_shm, "publishing to engines of this host through shared memory, against memcpy"},
    {"names", bench_names, "parsing and filtering 56,115 parameter names"},
    {"sync", bench_sync, "lorasync_sync between 4 processes, against memcpy and one collective per tensor"},
    {"audit", bench_audit, "what comparing replicas costs a sync to shared memory, by threads"}};

static int known_group(const char *name)
{
    size_t i;
    for (i = 0; i < COUNT(groups); i++)
        if (strcmp(groups[i].name, name) == 0) return 1;
    return 0;
}

static void print_help(FILE *f)
{
    size_t i;
    fprintf(f, "usage: bench [--quick] [--json] [--only GROUP]... [--dir FOLDER]\n"
               "  --quick       small sizes, few runs: shows that it works\n"
               "  --json        one JSON object per line\n"
               "  --only GROUP  only this one; may be repeated\n"
               "  --dir FOLDER  where the directory transport is tried; /tmp\n"
               "groups:\n");
    for (i = 0; i < COUNT(groups); i++) fprintf(f, "  %-12s  %s\n", groups[i].name, groups[i].what);
}

int main(int argc, char **argv)
{
    size_t i;
    int    k;
    for (k = 1; k < argc; k++) {
        if (strcmp(argv[k], "--json") == 0) {
            option.json = 1;
        } else if (strcmp(argv[k], "--quick") == 0) {
            option.quick = 1;
        } else if (strcmp(argv[k], "--only") == 0 && k + 1 < argc && known_group(argv[k + 1]) && option.num_only < 16) {
            option.only[option.num_only++] = argv[++k];
        } else if (strcmp(argv[k], "--dir") == 0 && k + 1 < argc) {
            option.directory = argv[++k];
        } else if (strcmp(argv[k], "--help") == 0) {
            print_help(stdout);
            return 0;
        } else {
            print_help(stderr);
            return 2;
        }
    }
    print_machine();
    for (i = 0; i < COUNT(groups); i++)
        if (wants(groups[i].name)) groups[i].run();
    return 0;
}
