/* The main job on real shapes: a trainer of N ranks publishes every version of a LoRA adapter, and an engine takes each
   one and verifies every byte.

   compile   cc -O2 -I. -o demo examples/demo.c -lm      (from the folder that holds lorasync.h; or `make demo`)
   run       ./demo
             ./demo --help
             ./demo --layout mixed --ranks 5
             ./demo --adapter my_peft_directory
   output    Qwen3-0.6B, LoRA rank 32: 392 tensors, fsdp2 over 4 ranks, F32 parameters, BF16 published
             a line per version with its size, times and verdict; the last line is
             demo: 392 tensors, 40370176 bytes, verified 5/5 versions

   Every name below is a process. Trainer and engine share nothing but the directory.

       rank 0 .. N-1  --pieces-->  rank 0  --files-->  directory  --files-->  engine
            ^                        |                                          |
            '---- this process: starts them, prints, ends them <-----pipes------'

   The content of version v is a function of v, tensor and element (see truth). A rank knows only its own pieces; the
   engine computes the whole unsharded tensors, converts them to the published type, and compares. Right after
   lorasync_begin the ranks write the next version into their parameters, which must not change what begin read.

   With -DDEMO_CUDA (`make demo CUDA=1`) the parameters are in device memory, rank r on GPU r; with -DDEMO_NCCL as well
   (NCCL=1) NCCL joins the ranks. The engine stays the same. */
#if defined(DEMO_CUDA)
#define LORASYNC_CUDA
#if defined(DEMO_NCCL)
#define LORASYNC_NCCL
#endif
#endif
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- what there is to send */

typedef enum layout {
    FSDP2,
    TP,
    TP_FSDP,
    HSDP,
    ZERO3,
    FSDP1,
    MEGATRON,
    MIXED,
    NUM_LAYOUTS
} layout;
static const char *const layout_names[NUM_LAYOUTS] = {"fsdp2", "tp",    "tp+fsdp",  "hsdp",
                                                      "zero3", "fsdp1", "megatron", "mixed"};

/* Shapes of a model's linear layers. experts == 0: dense; inter == 0: attention only. */
typedef struct model {
    const char *name;
    int         layers, hidden, heads, kv_heads, head_dim, inter, experts, rank;
} model;

static const model models[] = {
    {"Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 0, 32},
    {"Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 0, 32},
    {"Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 0, 32},
    {"Llama-3-70B", 80, 8192, 64, 8, 128, 28672, 0, 32},
    {"Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 768, 128, 16},
    {"gpt-oss-20b", 24, 2880, 64, 8, 64, 0, 0, 32},
    {"tiny", 3, 96, 12, 6, 8, 192, 0, 12},
};
enum {
    NUM_MODELS = sizeof models / sizeof *models
};

typedef struct tensor {
    char          *name;        /* as the trainer knows it */
    char          *key;         /* as the engine finds it */
    lorasync_dtype dtype, wire; /* of the trainer's parameter, and published */
    int            ndim;
    int64_t        shape[LORASYNC_MAX_DIMS], numel;
    char           half;          /* 'A', 'B', or 0 for other tensors */
    int            row_parallel;  /* o_proj and down_proj: tensor parallelism cuts their input, of all others their
                                     output */
    int            layer, expert; /* -1: none */
    const void    *author;        /* the element values of --adapter; NULL: made up */
    lorasync_dtype author_dtype;
} tensor;

typedef struct job {
    const model    *shapes;
    const char     *adapter, *out;
    layout          how;
    int             ranks, steps, rank, no_direct, timeout_ms, victim; /* victim: -2 nobody, -1 the engine, else a
                                                                          rank */
    lorasync_dtype  wire;                                              /* for the desc; NONE: each tensor's own */
    tensor         *tensors;
    size_t          num_tensors, max_tensors;
    int             num_experts;
    lorasync_image *author;
    char           *config_json;
    int64_t        *start, flat_total; /* fsdp1: where each tensor begins in the flat parameter, and its length */
    char            directory[400];
    size_t          payload_bytes;
} job;

static int problem(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "demo: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    return 2;
}

static void *get_memory(size_t num_bytes)
{
    void *memory = malloc(num_bytes ? num_bytes : 1);
    if (!memory) exit(problem("no memory of %zu bytes", num_bytes));
    return memory;
}

static char *print_new(const char *format, ...)
{
    char    text[2 * LORASYNC_MAX_NAME], *copy;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    copy = (char *)get_memory(strlen(text) + 1);
    return strcpy(copy, text);
}

static int is_float(lorasync_dtype d)
{
    return d == LORASYNC_F32 || d == LORASYNC_F16 || d == LORASYNC_BF16 || d == LORASYNC_F8_E4M3 ||
           d == LORASYNC_F8_E5M2;
}

static size_t item_bytes(lorasync_dtype d) { return (size_t)lorasync_dtype_bits(d) / 8; }

static int number_after(const char *text, const char *mark)
{
    const char *at = strstr(text, mark);
    return at && at[strlen(mark)] >= '0' && at[strlen(mark)] <= '9' ? atoi(at + strlen(mark)) : -1;
}

/* Fills in what follows from the name. */
static tensor *new_tensor(job *j, const char *key, const char *name)
{
    static const char *const row_parallel[] = {"o_proj", "down_proj", "out_proj",     "out_lin",
                                               "fc2",    "c_proj",    "dense_4h_to_h"};
    const char              *prefix = j->how == FSDP1 ? "_fsdp_wrapped_module." : j->how == MEGATRON ? "module." : "";
    lorasync_name            parsed;
    tensor                  *t;
    size_t                   i;
    if (j->num_tensors == j->max_tensors) {
        j->max_tensors = j->max_tensors ? 2 * j->max_tensors : 1024;
        j->tensors     = (tensor *)realloc(j->tensors, j->max_tensors * sizeof *j->tensors);
        if (!j->tensors) exit(problem("no memory for %zu tensors", j->max_tensors));
    }
    t = &j->tensors[j->num_tensors++];
    memset(t, 0, sizeof *t);
    t->key    = print_new("%s", key);
    t->name   = print_new("%s%s", prefix, name);
    t->layer  = number_after(key, "layers.") >= 0 ? number_after(key, "layers.") : number_after(key, "layer.");
    t->expert = number_after(key, "experts.");
    if (t->expert >= j->num_experts) j->num_experts = t->expert + 1;
    if (lorasync_parse_name(name, &parsed, NULL) == LORASYNC_OK) {
        const char *last = strrchr(parsed.module, '.') ? strrchr(parsed.module, '.') + 1 : parsed.module;
        if (parsed.role == LORASYNC_ROLE_LORA_A) t->half = 'A';
        if (parsed.role == LORASYNC_ROLE_LORA_B) t->half = 'B';
        for (i = 0; i < sizeof row_parallel / sizeof *row_parallel; i++)
            t->row_parallel |= strcmp(last, row_parallel[i]) == 0;
    }
    return t;
}

static void add_pair(job *j, const char *module, int out, int in)
{
    char    key[LORASYNC_MAX_NAME], name[LORASYNC_MAX_NAME];
    int     b;
    tensor *t;
    for (b = 0; b < 2; b++) {
        snprintf(key, sizeof key, "base_model.model.%.400s.lora_%c.weight", module, b ? 'B' : 'A');
        snprintf(name, sizeof name, "base_model.model.%.400s.lora_%c.default.weight", module, b ? 'B' : 'A');
        t           = new_tensor(j, key, name);
        t->dtype    = LORASYNC_F32;
        t->wire     = j->wire;
        t->ndim     = 2;
        t->shape[0] = b ? out : j->rank;
        t->shape[1] = b ? j->rank : in;
        t->numel    = t->shape[0] * t->shape[1];
    }
}

static void add_mlp(job *j, const char *parent)
{
    static const char *const names[3] = {"gate_proj", "up_proj", "down_proj"};
    const model             *m        = j->shapes;
    char                     module[LORASYNC_MAX_NAME];
    int                      i;
    for (i = 0; i < 3; i++) {
        snprintf(module, sizeof module, "%s.%s", parent, names[i]);
        add_pair(j, module, i == 2 ? m->hidden : m->inter, i == 2 ? m->inter : m->hidden);
    }
}

static void add_model(job *j)
{
    const model *m = j->shapes;
    int          q = m->heads * m->head_dim, kv = m->kv_heads * m->head_dim, layer, i;
    char         module[256];
    for (layer = 0; layer < m->layers; layer++) {
        for (i = 0; i < 4; i++) {
            snprintf(module, sizeof module, "model.layers.%d.self_attn.%c_proj", layer, "qkvo"[i]);
            add_pair(j, module, i == 0 ? q : i == 3 ? m->hidden : kv, i == 3 ? q : m->hidden);
        }
        for (i = 0; i < m->experts; i++) {
            snprintf(module, sizeof module, "model.layers.%d.mlp.experts.%d", layer, i);
            add_mlp(j, module);
        }
        snprintf(module, sizeof module, "model.layers.%d.mlp", layer);
        if (!m->experts && m->inter) add_mlp(j, module);
    }
}

static char *read_text(const char *path)
{
    struct stat info;
    FILE       *file = fopen(path, "rb");
    char       *text;
    size_t      num;
    if (!file || fstat(fileno(file), &info) != 0) exit(problem("%s: %s", path, strerror(errno)));
    text      = (char *)get_memory((size_t)info.st_size + 1);
    num       = fread(text, 1, (size_t)info.st_size, file);
    text[num] = '\0';
    fclose(file);
    return text;
}

/* The name that the trainer would have for a key of a PEFT file: the adapter's name is back in it. */
static char *trainer_name(const char *key, lorasync_role role)
{
    static const char weight[] = ".weight", bias[] = ".bias";
    size_t            n = strlen(key), tail = 0;
    const char       *dot = strrchr(key, '.');
    if (n > sizeof weight && strcmp(key + n - 7, weight) == 0) tail = 7;
    if (n > sizeof bias && strcmp(key + n - 5, bias) == 0) tail = 5;
    if (role == LORASYNC_ROLE_BASE) /* a module that is trained beside the adapter */
        return print_new("%.*s.modules_to_save.default%s", (int)(dot ? dot - key : 0), key, dot ? dot : ".weight");
    return print_new("%.*s.default%s", (int)(n - tail), key, key + n - tail);
}

/* A trained adapter: its tensors, types, values and config. */
static int add_adapter(job *j)
{
    lorasync_error err;
    lorasync_name  parsed;
    char           path[4096], *name;
    int            uniform = 1;
    size_t         i;
    if (lorasync_open_adapter(j->adapter, NULL, &j->author, NULL, &err) < 0) return problem("%s", err.text);
    snprintf(path, sizeof path, "%.4000s/adapter_config.json", j->adapter);
    j->config_json = read_text(path);
    for (i = 0; i < j->author->num_tensors; i++) uniform &= j->author->tensors[i].dtype == j->author->tensors[0].dtype;
    uniform &= is_float(j->author->tensors[0].dtype);
    for (i = 0; i < j->author->num_tensors; i++) {
        const lorasync_tensor *from = &j->author->tensors[i];
        tensor                *t;
        if (item_bytes(from->dtype) * 8 != (size_t)lorasync_dtype_bits(from->dtype))
            return problem("%s: %s cannot be cut into pieces of whole bytes", from->name,
                           lorasync_dtype_name(from->dtype));
        if (lorasync_parse_name(from->name, &parsed, &err) < 0) return problem("%s", err.text);
        name = trainer_name(from->name, parsed.role);
        t    = new_tensor(j, from->name, name);
        free(name);
        t->author       = from->data;
        t->author_dtype = from->dtype;
        t->dtype        = uniform ? LORASYNC_F32 : from->dtype; /* trainers keep F32; types that are mixed are left as
                                                                   they are */
        t->wire         = j->wire && is_float(from->dtype) ? j->wire : from->dtype;
        t->ndim         = from->ndim;
        memcpy(t->shape, from->shape, sizeof t->shape);
        t->numel = (int64_t)(from->num_bytes / item_bytes(from->dtype));
    }
    if (uniform && !j->wire) j->wire = j->author->tensors[0].dtype;
    return 0;
}

static size_t wire_bytes(const tensor *t) { return (size_t)t->numel * item_bytes(t->wire); }

static void free_job(job *j)
{
    size_t i;
    for (i = 0; i < j->num_tensors; i++) free(j->tensors[i].name), free(j->tensors[i].key);
    free(j->tensors), free(j->config_json), free(j->start);
    lorasync_image_free(j->author);
}

/* ---- what every element is */

/* A model's values: a hash of version, tensor and element, as a number of -1/16 to 1/16. */
static void made_up(size_t index, int version, int64_t first, int64_t num, float *out)
{
    uint32_t seed = ((uint32_t)index * 0x9E3779B1u) ^ ((uint32_t)version * 0x85EBCA77u) ^ 0x27D4EB2Fu, h;
    int64_t  i;
    for (i = 0; i < num; i++) {
        h = ((uint32_t)(first + i) + seed) * 0x9E3779B1u;
        h = (h ^ (h >> 15) ^ seed) * 0x2C1B3C6Du;
        h = (h ^ (h >> 12)) * 0x297A2D39u;
        h ^= h >> 15;
        out[i] = (float)((int32_t)(h >> 8) - 0x800000) / 134217728.0f;
    }
}

/* An adapter's values: the author's in the last version, half of them in the one before, and so on: a training that
   ends there. */
static void author_values(const tensor *t, int before_last, int64_t first, int64_t num, void *out)
{
    const char *from  = (const char *)t->author + (size_t)first * item_bytes(t->author_dtype);
    char       *to    = (char *)out;
    float       scale = (float)ldexp(1.0, -before_last), block[1024];
    int64_t     n, i;
    if (!is_float(t->author_dtype)) {
        memcpy(out, from, (size_t)num * item_bytes(t->author_dtype));
        return;
    }
    for (; num > 0; num -= n) {
        n = num < 1024 ? num : 1024;
        lorasync_convert(block, LORASYNC_F32, from, t->author_dtype, (size_t)n, NULL);
        for (i = 0; i < n; i++) block[i] *= scale;
        lorasync_convert(to, t->dtype, block, LORASYNC_F32, (size_t)n, NULL);
        from += (size_t)n * item_bytes(t->author_dtype);
        to += (size_t)n * item_bytes(t->dtype);
    }
}

/* Elements first .. first + num - 1 of a tensor in one version, in the trainer's type. */
static void truth(const job *j, size_t index, int version, int64_t first, int64_t num, void *out)
{
    const tensor *t = &j->tensors[index];
    if (t->author) author_values(t, j->steps - version, first, num, out);
    else made_up(index, version, first, num, (float *)out);
}

/* ---- who holds what */

enum {
    MAX_PARTS = 40
};

/* A part of a tensor on a rank, and how it lies in memory there. */
typedef struct part {
    lorasync_box box;
    int          pad;        /* elements between rows, as in a view of a wider buffer */
    int          transposed; /* column by column */
    int64_t      in_shard;   /* fsdp1: at this element of the rank's flat shard; -1: has memory of its own */
} part;

static int put(part *out, lorasync_box box)
{
    memset(out, 0, sizeof *out);
    out->box      = box;
    out->in_shard = -1;
    return 1;
}

/* Hugging Face's tensor parallelism shards one half of the adapter: B of a column parallel layer, A of a row parallel
   one. Megatron's shards both: A by its rank dimension where the layer is column parallel. The dimension, or -1 for a
   replica. */
static int parallel_dim(layout how, const tensor *t)
{
    if (!t->half || t->ndim != 2) return -1;
    if (t->half == 'A') return t->row_parallel ? 1 : how == MEGATRON ? 0 : -1;
    return t->row_parallel ? (how == MEGATRON ? 0 : -1) : 0;
}

static lorasync_box parallel_box(layout how, const tensor *t, int rank, int world)
{
    lorasync_box whole = lorasync_whole(t->shape, t->ndim);
    int          dim   = parallel_dim(how, t);
    return dim < 0 ? whole : lorasync_even(whole, dim, rank, world);
}

static lorasync_box rows_of(const tensor *t, lorasync_box box, int rank, int world)
{
    if (t->ndim) return lorasync_shard(box, 0, rank, world);
    return rank == 0 ? box : lorasync_flat(0, 0); /* a scalar has no rows */
}

/* A rank holds groups of rows that lie apart, as the heads of q, k and v do in a fused, interleaved parameter. */
static int interleaved(const tensor *t, int rank, int world, part *out)
{
    lorasync_box whole = lorasync_whole(t->shape, t->ndim);
    int64_t      rows = t->shape[0], group = (rows + 4 * world - 1) / (4 * world), g;
    int          num = 0;
    for (g = rank; group && g * group < rows; g += world)
        num += put(&out[num], lorasync_range(whole, 0, g * group, (g + 1) * group < rows ? group : rows - g * group));
    return num;
}

/* Every tensor in another way. With three ranks or more the last holds nothing at all. */
static int mixed(const tensor *t, size_t index, int rank, int world, part *out)
{
    lorasync_box whole = lorasync_whole(t->shape, t->ndim);
    int          kind = (int)(index % 9), half = world % 2 == 0 ? world / 2 : world, stage;
    if (world > 2 && rank == --world) return 0;
    half  = world % 2 == 0 ? world / 2 : world;
    stage = (t->layer < 0 ? 0 : t->layer) % world;
    if (t->ndim < 2 && kind > 1) kind = 2;
    switch (kind) {
    case 0: return put(out, rank == stage ? whole : lorasync_none(t->ndim)); /* a pipeline stage */
    case 1: return put(out, whole);                                          /* replicas */
    case 3: put(out, lorasync_shard(whole, 1, rank, world)); return out->pad = 5, 1;
    case 4: return put(out, lorasync_flat_shard(t->numel, rank, world));
    case 5: return interleaved(t, rank, world, out);
    case 6: /* a replica on two ranks, column by column on the first */
        if (rank != stage && rank != (stage + 1) % world) return 0;
        put(out, whole);
        return out->transposed = rank == stage && t->ndim == 2, 1;
    case 7:
        return put(out, lorasync_shard(lorasync_shard(whole, 0, rank % (world / half), world / half), 0,
                                       rank / (world / half), half));
    case 8: return put(out, lorasync_shard(whole, 0, rank % half, half)); /* replicas of shards */
    default: return put(out, rows_of(t, whole, rank, world));
    }
}

/* The parts of a tensor on a rank: their number, or -1 with a reason. */
static int parts_of(const job *j, size_t index, int rank, part *out, const char **why)
{
    const tensor       *t = &j->tensors[index];
    lorasync_flat_piece flat;
    lorasync_box        box;
    int                 n = j->ranks, two = n > 1 ? 2 : 1, d;
    *why = "";
    if ((j->how == TP_FSDP || j->how == HSDP) && n > 1 && n % 2)
        return *why = j->how == HSDP ? "it makes 2 replicas of N/2 shards: give an even number"
                                     : "it is tensor parallel 2 x FSDP N/2: give an even number",
               -1;
    switch (j->how) {
    case TP:
    case MEGATRON:
        if (j->how == MEGATRON && t->expert >= 0) { /* expert parallel: whole experts */
            box = lorasync_whole(t->shape, t->ndim);
            if (j->num_experts % n) return *why = "the number of experts does not divide by it", -1;
            return t->expert / (j->num_experts / n) == rank ? put(out, box) : 0;
        }
        put(out, parallel_box(j->how, t, rank, n));
        break;
    case TP_FSDP: put(out, rows_of(t, parallel_box(TP, t, rank % two, two), rank / two, n / two)); break;
    case HSDP: put(out, rows_of(t, lorasync_whole(t->shape, t->ndim), rank % (n / two), n / two)); break;
    case ZERO3: return put(out, lorasync_flat_shard(t->numel, rank, n));
    case FSDP1:
        if (t->dtype != j->tensors[0].dtype)
            return *why = "a flat parameter has one type, and this adapter has several", -1;
        flat = lorasync_flat_part(j->start[index], t->numel, j->flat_total, rank, n);
        put(out, flat.box);
        out->in_shard = flat.in_shard;
        return 1;
    case MIXED: return mixed(t, index, rank, n, out);
    default: return put(out, rows_of(t, lorasync_whole(t->shape, t->ndim), rank, n));
    }
    for (d = 0; d < out->box.ndim && !out->box.flat; d++)
        if (out->box.len[d] < 0) return *why = "a dimension that tensor parallelism cuts does not divide by it", -1;
    return 1;
}

/* Every rank's parts are looked at before anything starts. */
static int check_layout(job *j)
{
    part        parts[MAX_PARTS];
    const char *why;
    int64_t    *numel;
    size_t      i;
    int         r;
    if (j->how == FSDP1) {
        numel    = (int64_t *)get_memory(j->num_tensors * sizeof *numel);
        j->start = (int64_t *)get_memory(j->num_tensors * sizeof *numel);
        for (i = 0; i < j->num_tensors; i++) numel[i] = j->tensors[i].numel;
        j->flat_total = lorasync_fsdp1_layout(numel, j->num_tensors, 2, 1, j->ranks, j->start);
        free(numel);
    }
    for (r = 0; r < j->ranks; r++)
        for (i = 0; i < j->num_tensors; i++)
            if (parts_of(j, i, r, parts, &why) < 0)
                return problem("--layout %s does not fit %d ranks: %s (%s [%lld, %lld])", layout_names[j->how],
                               j->ranks, why, j->tensors[i].key, (long long)j->tensors[i].shape[0],
                               (long long)(j->tensors[i].ndim > 1 ? j->tensors[i].shape[1] : 1));
    return 0;
}

/* ---- a rank of the trainer */

/* One parameter, or part of one, as it lies in this rank's memory. */
typedef struct holding {
    size_t         index;
    lorasync_piece piece;
    void          *own; /* to free; NULL: lies in the flat shard */
    size_t         num_bytes;
    void          *made; /* where its values are made: piece.data, unless that is on the GPU */
} holding;

typedef struct holdings {
    holding *list;
    size_t   num, max;
    char    *flat_shard;
    size_t   shard_bytes;
    char    *device; /* with DEMO_CUDA: | flat shard | each piece's memory, to 256 | .. */
} holdings;

static void hold(holdings *all, const job *j, size_t index, const part *p)
{
    const tensor *t = &j->tensors[index];
    holding      *h;
    size_t        num = 1, row;
    int           d, last = t->ndim - 1;
    if (all->num == all->max) {
        all->max  = all->max ? 2 * all->max : 1024;
        all->list = (holding *)realloc(all->list, all->max * sizeof *all->list);
        if (!all->list) exit(problem("no memory for %zu pieces", all->max));
    }
    h = &all->list[all->num++];
    memset(h, 0, sizeof *h);
    h->index       = index;
    h->piece.name  = t->name;
    h->piece.dtype = t->dtype;
    h->piece.ndim  = t->ndim;
    h->piece.box   = p->box;
    memcpy(h->piece.shape, t->shape, sizeof t->shape);
    if (p->in_shard >= 0 && p->box.len[0] > 0) {
        h->piece.data = h->made = all->flat_shard + (size_t)p->in_shard * item_bytes(t->dtype);
        return;
    }
    for (d = 0; d < (p->box.flat ? 1 : t->ndim); d++) num *= (size_t)p->box.len[d];
    if (num && p->pad) { /* rows of a wider buffer */
        row = (size_t)p->box.len[last] + (size_t)p->pad;
        num = num / (size_t)p->box.len[last] * row;
        for (d = last, h->piece.stride[last] = 1; d > 0; d--)
            h->piece.stride[d - 1] = d == last ? (int64_t)row : h->piece.stride[d] * p->box.len[d];
    }
    if (num && p->transposed) h->piece.stride[0] = 1, h->piece.stride[1] = p->box.len[0];
    h->num_bytes  = num * item_bytes(t->dtype);
    h->own        = get_memory(h->num_bytes);
    h->piece.data = h->made = h->own;
    memset(h->own, 0xff, num * item_bytes(t->dtype)); /* NaN between rows: nobody may read it */
}

static void hold_all(holdings *all, const job *j, int rank)
{
    part        parts[MAX_PARTS];
    const char *why;
    size_t      i, shard = (size_t)((j->flat_total + j->ranks - 1) / j->ranks) * item_bytes(j->tensors[0].dtype);
    int         k, num;
    memset(all, 0, sizeof *all);
    if (j->how == FSDP1) {
        all->flat_shard = (char *)get_memory(shard);
        memset(all->flat_shard, 0xff, shard);
        all->shard_bytes = shard;
    }
    for (i = 0; i < j->num_tensors; i++) {
        num = parts_of(j, i, rank, parts, &why);
        for (k = 0; k < num; k++) hold(all, j, i, &parts[k]);
    }
}

static void let_go(holdings *all)
{
    size_t i;
    for (i = 0; i < all->num; i++) free(all->list[i].own);
    free(all->list), free(all->flat_shard);
}

/* The optimizer step: this rank's part of version `version`, row by row, in longer runs where rows follow each
   other. */
static void train(const job *j, const holding *h, int version)
{
    const lorasync_piece *p                     = &h->piece;
    char                 *data                  = (char *)h->made;
    int64_t               at[LORASYNC_MAX_DIMS] = {0}, run, first, place, i;
    size_t                item = item_bytes(p->dtype), written = 0;
    int                   outer = p->ndim, d, strided = 0;
    char                  row[1 << 16];
    if (p->box.flat) {
        truth(j, h->index, version, p->box.off[0], p->box.len[0], data);
        return;
    }
    for (d = 0; d < p->ndim; d++) {
        strided |= p->stride[d] != 0;
        if (p->box.len[d] == 0) return;
    }
    run = 1;
    if (outer > 0) run = p->box.len[--outer];
    while (!strided && outer > 0 && p->box.len[outer] == p->shape[outer]) run *= p->box.len[--outer];
    for (;;) {
        for (d = 0, first = 0, place = 0; d < p->ndim; d++) {
            first = first * p->shape[d] + p->box.off[d] + at[d];
            place += at[d] * p->stride[d];
        }
        if (!strided) {
            truth(j, h->index, version, first, run, data + written);
            written += (size_t)run * item;
        } else {
            for (i = 0; i < run; i++) { /* elements of a row in blocks, then to their places */
                int64_t block = (int64_t)(sizeof row / item), in_block = i % block;
                if (in_block == 0) truth(j, h->index, version, first + i, run - i < block ? run - i : block, row);
                memcpy(data + (size_t)(place + i * p->stride[p->ndim - 1]) * item, row + (size_t)in_block * item, item);
            }
        }
        for (d = outer - 1; d >= 0 && ++at[d] == p->box.len[d]; d--) at[d] = 0;
        if (d < 0) return;
    }
}

static void train_all(const job *j, const holdings *all, int version)
{
    size_t i;
    for (i = 0; i < all->num; i++) train(j, &all->list[i], version);
}

/* ---- where the parameters are when the library reads them: here, or on the GPU */

#ifdef DEMO_CUDA
static size_t to_256(size_t n) { return (n + 255) / 256 * 256; }

/* GPUs of this host, counted by a child: a process that has touched CUDA must not fork ranks. */
static int count_gpus(void)
{
    int   status = 0, num = 0;
    pid_t pid = fork();
    if (pid == 0) _exit(cudaGetDeviceCount(&num) == cudaSuccess ? num : 0);
    return pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static int use_gpu(int rank)
{
    int num = 0;
    return cudaGetDeviceCount(&num) == cudaSuccess && num > 0 && cudaSetDevice(rank % num) == cudaSuccess;
}

/* Device memory for all that the rank holds; the pieces point there from now on, `own` stays where values are made. */
static int move_to_gpu(holdings *all)
{
    size_t i, at = to_256(all->shard_bytes);
    for (i = 0; i < all->num; i++) at += to_256(all->list[i].num_bytes);
    if (cudaMalloc((void **)&all->device, at + 256) != cudaSuccess) return 0;
    at = to_256(all->shard_bytes);
    for (i = 0; i < all->num; i++) {
        holding *h    = &all->list[i];
        h->piece.data = h->own ? all->device + at : all->device + ((char *)h->piece.data - all->flat_shard);
        at += to_256(h->num_bytes);
    }
    return 1;
}

/* In the order of the default stream: after what begin put there. */
static void upload(const holdings *all)
{
    size_t i;
    if (all->shard_bytes) cudaMemcpyAsync(all->device, all->flat_shard, all->shard_bytes, cudaMemcpyHostToDevice, 0);
    for (i = 0; i < all->num; i++)
        if (all->list[i].own && all->list[i].num_bytes)
            cudaMemcpyAsync(all->list[i].piece.data, all->list[i].own, all->list[i].num_bytes, cudaMemcpyHostToDevice,
                            0);
}

static void leave_gpu(holdings *all) { cudaFree(all->device); }
#else
static int  use_gpu(int rank) { return (void)rank, 1; }
static int  move_to_gpu(holdings *all) { return (void)all, 1; }
static void upload(const holdings *all) { (void)all; }
static void leave_gpu(holdings *all) { (void)all; }
#endif

/* The communicator of the session: NCCL's over `local`, or `local` itself. */
static lorasync_status join_ranks(const lorasync_comm *local, lorasync_comm *out, lorasync_error *err)
{
    *out = *local;
#ifdef DEMO_NCCL
    {
        lorasync_nccl_desc d;
        char               ids[64][128];
        lorasync_status    status;
        memset(ids, 0, sizeof ids);
        if (local->rank == 0 && (status = lorasync_nccl_unique_id(ids[0], err)) < 0) return status;
        if ((status = local->all_gather(local->user, local->rank == 0 ? ids[0] : ids[63], ids, 128, 60000, err)) < 0)
            return status;
        memset(&d, 0, sizeof d);
        d.unique_id = ids[0];
        d.rank      = local->rank;
        d.world     = local->world;
        return lorasync_nccl_open(&d, out, err);
    }
#else
    (void)err;
    return LORASYNC_OK;
#endif
}

static void leave_ranks(lorasync_comm *comm)
{
#ifdef DEMO_NCCL
    lorasync_nccl_close(comm);
#else
    (void)comm;
#endif
}

/* What rank 0 tells about a version; version 0 is about compiling. */
typedef struct trainer_message {
    int                   version;
    lorasync_report       report;
    lorasync_session_info info;
} trainer_message;

/* Blocks until the other end has written a byte: 1; 0 when it is gone or time is up. */
static int wait_for_byte(int fd, int timeout_ms)
{
    struct pollfd p;
    char          byte;
    p.fd     = fd;
    p.events = POLLIN;
    while (poll(&p, 1, timeout_ms) < 0 && errno == EINTR) continue;
    p.events = 0;
    return p.revents & POLLIN ? read(fd, &byte, 1) == 1 : 0;
}

/* Everybody reports what only he knows; what all ranks know is said once. */
static int rank_failed(int rank, const char *what, const lorasync_error *err)
{
    if (rank == 0 || lorasync_is_lost(err->status))
        fprintf(stderr, "demo: rank %d: %s: %s: %s\n", rank, what, lorasync_status_text(err->status), err->text);
    return 1;
}

static lorasync_status open_session(const job *j, const lorasync_comm *comm, const holdings *all,
                                    lorasync_session **out, lorasync_error *err)
{
    static const char *const base_names[4] = {"base_model.model.model.embed_tokens.weight",
                                              "base_model.model.model.layers.0.input_layernorm.weight",
                                              "base_model.model.model.norm.weight", "base_model.model.lm_head.weight"};
    static uint16_t          base_memory[16 * 16];
    lorasync_desc            d;
    lorasync_piece           base;
    lorasync_status          status;
    size_t                   i;
#ifdef DEMO_CUDA
    lorasync_cuda cuda;
    memset(&cuda, 0, sizeof cuda);
#endif
    memset(&d, 0, sizeof d);
#ifdef DEMO_CUDA
    d.cuda = &cuda;
#endif
    d.comm        = comm;
    d.wire_dtype  = j->wire;
    d.config_json = j->config_json;
    d.lora_alpha  = j->config_json ? 0 : 2.0 * j->rank;
    d.base_model  = j->shapes ? j->shapes->name : NULL;
    d.no_direct   = j->no_direct;
    d.timeout_ms  = j->timeout_ms;
    status        = lorasync_open(&d, out, err);
    if (status < 0) return status;
    for (i = 0; i < all->num; i++) lorasync_add(*out, &all->list[i].piece, NULL); /* compile reports a failure */
    for (i = 0; i < 4; i++) {                                                     /* the frozen model, which nobody
                                                                                     wants to send */
        memset(&base, 0, sizeof base);
        base.name     = base_names[i];
        base.dtype    = LORASYNC_BF16;
        base.ndim     = 2;
        base.shape[0] = base.shape[1] = 16;
        base.box                      = lorasync_whole(base.shape, 2);
        base.data                     = base_memory;
        lorasync_add(*out, &base, NULL);
    }
    status = lorasync_attach_directory(*out, j->directory, err);
    return status < 0 ? status : lorasync_compile(*out, err);
}

static int run_steps(const job *j, lorasync_session *s, const lorasync_comm *comm, const holdings *all, int rank,
                     int to_parent, int from_parent)
{
    trainer_message message;
    lorasync_error  err;
    char            ready = 1, everybody[256];
    int             version;
    memset(&message, 0, sizeof message);
    lorasync_get_info(s, &message.info);
    if (rank == 0 && write(to_parent, &message, sizeof message) < 0) return 1;
    train_all(j, all, 1);
    upload(all);
    for (version = 1; version <= j->steps; version++) {
        if (rank == 0 && version > 1 &&
            !wait_for_byte(from_parent, j->timeout_ms)) /* here every version is to be seen, so it is waited for */
            return fprintf(stderr, "demo: rank 0: the engine did not confirm version %d: giving up\n", version - 1), 1;
        lorasync_begin(s, (uint64_t)version, NULL); /* a failure is reported by wait, on all ranks */
        if (j->victim == rank && version == (j->steps < 2 ? 1 : 2)) raise(SIGKILL);
        train_all(j, all, version + 1); /* the parameters are the trainer's again */
        upload(all);
        if (comm->all_gather(comm->user, &ready, everybody, 1, j->timeout_ms, &err) <
            0) /* a barrier: time the gather, not the step above */
            return rank_failed(rank, "barrier", &err);
        if (lorasync_wait(s, &message.report, &err) < 0) return rank_failed(rank, "sync", &err);
        message.version = version;
        if (rank == 0 && write(to_parent, &message, sizeof message) < 0) return 1;
    }
    return 0;
}

static int run_rank(const job *j, lorasync_local *local, int rank, int to_parent, int from_parent)
{
    lorasync_session *s = NULL;
    lorasync_comm     host, comm;
    lorasync_error    err;
    holdings          all;
    int               result;
    if (lorasync_local_join(local, rank, &host, &err) < 0) return rank_failed(0, "join", &err);
    if (!use_gpu(rank)) return problem("rank %d has no GPU", rank);
    hold_all(&all, j, rank);
    if (!move_to_gpu(&all)) return problem("rank %d: no device memory", rank);
    if (join_ranks(&host, &comm, &err) < 0) return rank_failed(0, "join", &err);
    if (open_session(j, &comm, &all, &s, &err) < 0) result = rank_failed(rank, "compile", &err);
    else result = run_steps(j, s, &host, &all, rank, to_parent, from_parent);
    lorasync_close(s);
    leave_ranks(&comm);
    leave_gpu(&all);
    let_go(&all);
    return result;
}

/* ---- the engine */

typedef struct engine_message {
    int      version, verified;
    int      as_author; /* every tensor equals the author's file, byte by byte */
    uint64_t load_ns;   /* to open, check and serve the version */
    size_t   num_tensors, num_bytes;
    char     text[300]; /* what is wrong */
} engine_message;

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Compares a tensor with what it must be, in blocks. */
static int verify_tensor(const job *j, size_t index, int version, const lorasync_tensor *found, engine_message *m)
{
    enum {
        BLOCK = 16384
    };
    static float  values[2 * BLOCK]; /* room for elements of 8 bytes */
    static char   bytes[8 * BLOCK];
    const tensor *t    = &j->tensors[index];
    const char   *data = (const char *)found->data;
    size_t        item = item_bytes(t->wire), k;
    int64_t       at, n;
    if (found->dtype != t->wire || found->ndim != t->ndim ||
        memcmp(found->shape, t->shape, (size_t)t->ndim * sizeof *t->shape) != 0 || found->num_bytes != wire_bytes(t))
        return snprintf(m->text, sizeof m->text, "%.200s has the wrong type or shape", t->key), 0;
    for (at = 0; at < t->numel; at += n, data += (size_t)n * item) {
        n = t->numel - at < BLOCK ? t->numel - at : (int64_t)BLOCK;
        truth(j, index, version, at, n, values);
        lorasync_convert(bytes, t->wire, values, t->dtype, (size_t)n, NULL);
        if (memcmp(bytes, data, (size_t)n * item) == 0) continue;
        for (k = 0; bytes[k] == data[k]; k++) continue;
        return snprintf(m->text, sizeof m->text, "%.200s: byte %lld is %d, must be %d", t->key,
                        (long long)at * (long long)item + (long long)k, data[k] & 255, bytes[k] & 255),
               0;
    }
    return 1;
}

static void verify(const job *j, const lorasync_adapter *a, int version, engine_message *m)
{
    size_t i;
    m->version     = version;
    m->num_tensors = a->image->num_tensors;
    m->num_bytes   = a->image->payload_bytes;
    m->as_author   = j->author != NULL;
    if (a->version != (uint64_t)version) {
        snprintf(m->text, sizeof m->text, "version %llu is served, expected %d", (unsigned long long)a->version,
                 version);
        return;
    }
    if (a->image->num_tensors != j->num_tensors || a->image->payload_bytes != j->payload_bytes) {
        snprintf(m->text, sizeof m->text, "%zu tensors of %zu bytes, expected %zu of %zu", a->image->num_tensors,
                 a->image->payload_bytes, j->num_tensors, j->payload_bytes);
        return;
    }
    for (i = 0; i < j->num_tensors; i++) {
        const lorasync_tensor *found  = lorasync_find(a, j->tensors[i].key),
                              *author = j->author ? &j->author->tensors[i] : NULL;
        if (!found) {
            snprintf(m->text, sizeof m->text, "%.200s is missing", j->tensors[i].key);
            return;
        }
        if (!verify_tensor(j, i, version, found, m)) return;
        m->as_author &=
            author && author->num_bytes == found->num_bytes && memcmp(author->data, found->data, found->num_bytes) == 0;
    }
    m->verified = 1;
}

/* Polls until a version is served: 1, or 0 when that fails or this process is asked to end. */
static int await_version(const job *j, lorasync_engine *e, int version, int from_parent, uint64_t *load_ns)
{
    struct timespec nap = {0, 200000};
    struct pollfd   parent;
    lorasync_error  err;
    lorasync_status status;
    uint64_t        start = now_ns(), t;
    while (now_ns() - start < (uint64_t)j->timeout_ms * 1000000u) {
        t      = now_ns();
        status = lorasync_engine_poll(e, 0, &err);
        if (status == LORASYNC_OK) return *load_ns = now_ns() - t, 1;
        if (status < 0) return fprintf(stderr, "demo: engine: %s: %s\n", lorasync_status_text(status), err.text), 0;
        parent.fd      = from_parent;
        parent.events  = POLLIN;
        parent.revents = 0;
        if (poll(&parent, 1, 0) > 0)
            return fprintf(stderr, "demo: engine: the trainer ended before it published version %d\n", version), 0;
        nanosleep(&nap, NULL);
    }
    return fprintf(stderr, "demo: engine: no version %d within %d ms\n", version, j->timeout_ms), 0;
}

static int run_engine(const job *j, int to_parent, int from_parent)
{
    lorasync_engine_desc    d;
    lorasync_engine        *e = NULL;
    const lorasync_adapter *a;
    lorasync_error          err;
    engine_message          m;
    int                     version, result = 1;
    memset(&d, 0, sizeof d);
    d.directory = j->directory;
    if (lorasync_engine_open(&d, &e, &err) < 0) return fprintf(stderr, "demo: engine: %s\n", err.text), 1;
    for (version = 1; version <= j->steps; version++) {
        memset(&m, 0, sizeof m);
        if (!await_version(j, e, version, from_parent, &m.load_ns)) break;
        if (j->victim == -1 && version == (j->steps < 2 ? 1 : 2)) raise(SIGKILL);
        a = lorasync_acquire(e, "default");
        if (a) verify(j, a, version, &m);
        lorasync_release(a);
        if (write(to_parent, &m, sizeof m) < 0) break;
        if (version == j->steps) result = 0;
    }
    lorasync_engine_close(e);
    return result;
}

/* ---- this process */

static volatile sig_atomic_t interrupted;
static void                  on_signal(int number) { interrupted = number; }

/* to_trainer, from_trainer, to_engine, from_engine: [0] is read, [1] is written */
enum {
    TO_TRAINER,
    FROM_TRAINER,
    TO_ENGINE,
    FROM_ENGINE,
    NUM_PIPES
};

typedef struct crew {
    pid_t          *pids; /* ranks, then the engine; 0 when it has ended */
    int             num, num_running, failed;
    int             pipes[NUM_PIPES][2];
    uint64_t        deadline; /* 0: all is well */
    trainer_message trained;
    engine_message  served;
    int             num_shown, num_verified, as_author;
} crew;

static void close_fd(int *fd)
{
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

/* Something went wrong: the others are told by closed pipes and by the communicator, and get some time to say so
   themselves. */
static void stop(const job *j, crew *c)
{
    c->failed = 1;
    close_fd(&c->pipes[TO_TRAINER][1]);
    close_fd(&c->pipes[TO_ENGINE][1]);
    if (!c->deadline) c->deadline = now_ns() + ((uint64_t)j->timeout_ms + 5000) * 1000000u;
}

static void start(const job *j, crew *c, lorasync_local *local)
{
    int who, p, result;
    for (who = 0; who < c->num; who++) {
        c->pids[who] = fork();
        if (c->pids[who] < 0) {
            problem("fork: %s", strerror(errno));
            c->pids[who] = 0;
            stop(j, c);
            return;
        }
        if (c->pids[who] > 0) {
            c->num_running++;
            continue;
        }
        for (p = 0; p < NUM_PIPES; p++) { /* a child keeps only its own ends: closing the other must be noticed */
            int mine = who == j->ranks ? p >= TO_ENGINE : who == 0 && p < TO_ENGINE, end = p % 2 == 0 ? 0 : 1;
            close_fd(&c->pipes[p][1 - end]);
            if (!mine) close_fd(&c->pipes[p][end]);
        }
        signal(SIGINT, SIG_DFL), signal(SIGTERM, SIG_DFL);
        if (who == j->ranks) result = run_engine(j, c->pipes[FROM_ENGINE][1], c->pipes[TO_ENGINE][0]);
        else result = run_rank(j, local, who, c->pipes[FROM_TRAINER][1], c->pipes[TO_TRAINER][0]);
        lorasync_local_close(local);
        exit(result);
    }
}

/* On a terminal only; three steps per version. */
static void progress(const job *j, const crew *c, const char *what)
{
    int total = 3 * j->steps,
        done  = 3 * c->num_shown + (c->trained.version > c->num_shown) + (c->served.version > c->num_shown), i;
    if (!isatty(2)) return;
    fprintf(stderr, "\r[");
    for (i = 0; i < 30; i++) fputc(i < done * 30 / total ? '#' : '.', stderr);
    fprintf(stderr, "] version %d of %d %s\033[K", c->num_shown < j->steps ? c->num_shown + 1 : j->steps, j->steps,
            what);
}

static void clear_progress(void)
{
    if (isatty(2)) fprintf(stderr, "\r\033[K");
}

static double ms(uint64_t ns) { return (double)ns / 1e6; }

/* One line, once both sides have reported a version; then the trainer may go on. */
static void show_version(const job *j, crew *c)
{
    const lorasync_report *r  = &c->trained.report;
    const engine_message  *e  = &c->served;
    uint64_t               ns = r->pack_ns + r->exchange_ns + r->place_ns + r->publish_ns + e->load_ns;
    if (c->trained.version != c->num_shown + 1 || e->version != c->num_shown + 1) return;
    clear_progress();
    if (c->num_shown == 0)
        printf("version         bytes    pack ms  gather ms publish ms  engine ms     GB/s  verdict\n");
    printf("%7d %13zu %10.2f %10.2f %10.2f %10.2f %8.2f  %s%s\n", e->version, r->payload_bytes, ms(r->pack_ns),
           ms(r->exchange_ns + r->place_ns), ms(r->publish_ns), ms(e->load_ns),
           ns ? (double)r->payload_bytes / (double)ns : 0.0, e->verified ? "every byte verified" : "WRONG: ", e->text);
    c->num_shown++;
    c->num_verified += e->verified;
    c->as_author = e->as_author;
    progress(j, c, "");
    if (c->num_shown < j->steps && c->pipes[TO_TRAINER][1] >= 0 && write(c->pipes[TO_TRAINER][1], "", 1) < 0)
        stop(j, c);
}

static void show_start(const trainer_message *m)
{
    const lorasync_session_info *i = &m->info;
    clear_progress();
    printf("rank 0 declared %zu pieces: %zu of the adapter, %zu of the base model dropped; %s; plan %zu bytes, staging "
           "%zu\n",
           i->num_added, i->num_taken, i->num_dropped,
           i->plan.direct ? "ranks write directly into the image" : "ranks send messages", i->plan.plan_bytes,
           i->plan.staging_bytes);
}

static int read_message(int *fd, void *message, size_t num_bytes)
{
    ssize_t n = read(*fd, message, num_bytes);
    if (n == (ssize_t)num_bytes) return 1;
    if (n < 0 && errno == EINTR) return 0;
    close_fd(fd);
    return 0;
}

static void listen_once(const job *j, crew *c)
{
    struct pollfd fds[2];
    fds[0].fd     = c->pipes[FROM_TRAINER][0];
    fds[1].fd     = c->pipes[FROM_ENGINE][0];
    fds[0].events = fds[1].events = POLLIN;
    fds[0].revents = fds[1].revents = 0;
    if (poll(fds, 2, 20) <= 0) return;
    if (fds[0].revents && read_message(&c->pipes[FROM_TRAINER][0], &c->trained, sizeof c->trained)) {
        if (c->trained.version == 0) show_start(&c->trained);
        else progress(j, c, "published");
    }
    if (fds[1].revents && read_message(&c->pipes[FROM_ENGINE][0], &c->served, sizeof c->served))
        progress(j, c, "verified");
    show_version(j, c);
}

static void collect_ended(const job *j, crew *c)
{
    int who, status;
    for (who = 0; who < c->num; who++) {
        if (c->pids[who] <= 0 || waitpid(c->pids[who], &status, WNOHANG) != c->pids[who]) continue;
        c->pids[who] = 0;
        c->num_running--;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
        clear_progress();
        if (WIFSIGNALED(status)) {
            if (who == j->ranks) problem("the engine was killed by signal %d", WTERMSIG(status));
            else problem("rank %d was killed by signal %d", who, WTERMSIG(status));
        }
        stop(j, c);
    }
}

static void supervise(const job *j, crew *c)
{
    int who;
    while (c->num_running > 0 || c->pipes[FROM_TRAINER][0] >= 0 || c->pipes[FROM_ENGINE][0] >= 0) {
        listen_once(j, c);
        collect_ended(j, c);
        if (interrupted && !c->failed) problem("stopped by signal %d", (int)interrupted), stop(j, c);
        if (c->deadline && now_ns() > c->deadline) {
            for (who = 0; who < c->num; who++)
                if (c->pids[who] > 0)
                    kill(c->pids[who], SIGKILL),
                        problem("%s %d did not end in time and was killed", who == j->ranks ? "engine" : "rank", who);
            c->deadline = now_ns() + 5000000000u;
        }
    }
}

/* ---- files */

/* Removes what lies below, never following a link. */
static void remove_tree(const char *path)
{
    struct dirent *entry;
    struct stat    info;
    char           below[1024];
    DIR           *d = lstat(path, &info) == 0 && S_ISDIR(info.st_mode) ? opendir(path) : NULL;
    if (!d) {
        unlink(path);
        return;
    }
    while ((entry = readdir(d)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if ((size_t)snprintf(below, sizeof below, "%s/%s", path, entry->d_name) < sizeof below) remove_tree(below);
    }
    closedir(d);
    rmdir(path);
}

static int copy_file(const char *from, const char *to)
{
    char   block[1 << 16];
    FILE  *in = fopen(from, "rb"), *out = fopen(to, "wb");
    size_t n;
    int    ok = in && out;
    while (ok && (n = fread(block, 1, sizeof block, in)) > 0) ok = fwrite(block, 1, n, out) == n;
    if (in) ok &= !ferror(in), fclose(in);
    if (out) ok &= fclose(out) == 0;
    if (!ok) problem("copying %s to %s: %s", from, to, strerror(errno));
    return ok;
}

/* The last published version becomes the PEFT directory `out`. */
static int leave(const job *j)
{
    static const char *const files[2] = {"adapter_model.safetensors", "adapter_config.json"};
    char                     from[600], to[2048];
    int                      i, ok = 1;
    if (mkdir(j->out, 0777) != 0 && errno != EEXIST) return problem("%s: %s", j->out, strerror(errno)), 0;
    for (i = 0; i < 2; i++) {
        snprintf(from, sizeof from, "%s/default/latest/%s", j->directory, files[i]);
        snprintf(to, sizeof to, "%.1900s/%s", j->out, files[i]);
        ok &= copy_file(from, to);
    }
    if (ok) printf("version %d is left in %s\n", j->steps, j->out);
    return ok;
}

/* ---- options */

static void print_help(FILE *to)
{
    int i;
    fprintf(to, "usage: demo [options]\n"
                "  --model NAME      shapes:");
    for (i = 0; i < NUM_MODELS; i++) fprintf(to, " %s", models[i].name);
    fprintf(
        to,
        "\n"
        "  --rank R          LoRA rank (default 32, 16 for Qwen3-30B-A3B, 12 for tiny)\n"
        "  --adapter DIR     instead of a model: a trained PEFT adapter gives names, shapes, types, values and config\n"
        "  --wire TYPE       published type: f32 f16 bf16 e4m3 (default bf16; with --adapter the adapter's own)\n"
        "  --layout L        fsdp2     rows over all ranks (the default)\n"
        "                    tp        Hugging Face's tensor parallelism: B of column parallel layers, A of row "
        "parallel ones\n                    tp+fsdp   the same over 2 ranks, then rows over N/2\n                    "
        "hsdp      2 replicas of rows over N/2\n                    zero3     DeepSpeed: flat intervals of each "
        "tensor\n                    fsdp1     one flat parameter, cut anywhere\n                    megatron  both "
        "halves of every pair sharded, whole experts per rank\n                    mixed     another one for every "
        "tensor: stages, replicas, interleaved rows, padded and transposed memory\n  --ranks N         trainer "
        "processes, 1 to 64 (default 4)\n  --steps N         versions (default 5)\n  --out DIR         leave the last "
        "version there, as a PEFT directory\n  --no-direct       send messages even where ranks could write into "
        "shared memory\n  --timeout S       seconds until a silent process counts as lost (default 60)\n  --kill WHO   "
        "     show a failure: `engine`, or the rank of this number, dies during version 2\nexit status: 0 every byte "
        "of every version verified, 1 not, 2 the options do not fit\n");
}

static int number(const char *option, const char *text, int low, int high)
{
    char *end;
    long  value = strtol(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value < low || value > high)
        exit(problem("%s %s: give a number from %d to %d", option, text, low, high));
    return (int)value;
}

/* The position of a word in a list of words `stride` bytes apart. */
static int choice(const char *option, const char *text, const void *list, size_t stride, int num)
{
    int i;
    for (i = 0; i < num; i++)
        if (strcmp(text, *(const char *const *)(const void *)((const char *)list + (size_t)i * stride)) == 0) return i;
    fprintf(stderr, "demo: %s %s: give one of", option, text);
    for (i = 0; i < num; i++)
        fprintf(stderr, " %s", *(const char *const *)(const void *)((const char *)list + (size_t)i * stride));
    fprintf(stderr, "\n");
    exit(2);
    return 0;
}

static void read_options(job *j, int argc, char **argv)
{
    static const char *const    wires[4]  = {"f32", "f16", "bf16", "e4m3"};
    static const lorasync_dtype dtypes[4] = {LORASYNC_F32, LORASYNC_F16, LORASYNC_BF16, LORASYNC_F8_E4M3};
    int                         i;
    for (i = 1; i < argc; i++) {
        const char *o = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(o, "--help") == 0 || strcmp(o, "-h") == 0) print_help(stdout), exit(0);
        if (strcmp(o, "--no-direct") == 0) {
            j->no_direct = 1;
            continue;
        }
        if (!v) exit(problem("%s: unknown, or its value is missing; --help lists the options", o));
        i++;
        if (strcmp(o, "--model") == 0) j->shapes = &models[choice(o, v, models, sizeof *models, NUM_MODELS)];
        else if (strcmp(o, "--adapter") == 0) j->adapter = v;
        else if (strcmp(o, "--out") == 0) j->out = v;
        else if (strcmp(o, "--layout") == 0)
            j->how = (layout)choice(o, v, layout_names, sizeof *layout_names, NUM_LAYOUTS);
        else if (strcmp(o, "--wire") == 0) j->wire = dtypes[choice(o, v, wires, sizeof *wires, 4)];
        else if (strcmp(o, "--ranks") == 0) j->ranks = number(o, v, 1, 64);
        else if (strcmp(o, "--steps") == 0) j->steps = number(o, v, 1, 100000);
        else if (strcmp(o, "--rank") == 0) j->rank = number(o, v, 1, 4096);
        else if (strcmp(o, "--timeout") == 0) j->timeout_ms = 1000 * number(o, v, 1, 3600);
        else if (strcmp(o, "--kill") == 0) j->victim = strcmp(v, "engine") == 0 ? -1 : number(o, v, 0, 63);
        else exit(problem("%s: unknown; --help lists the options", o));
    }
    if (j->adapter && (j->shapes || j->rank))
        exit(problem("--adapter brings its own shapes and rank: leave out --model and --rank"));
}

static int make_job(job *j)
{
    size_t i;
    int    failed = 0;
    if (j->adapter) {
        failed = add_adapter(j);
    } else {
        if (!j->shapes) j->shapes = &models[0];
        if (!j->rank) j->rank = j->shapes->rank;
        if (!j->wire) j->wire = LORASYNC_BF16;
        add_model(j);
    }
    if (!failed) failed = check_layout(j);
    for (i = 0; i < j->num_tensors && !failed; i++) j->payload_bytes += wire_bytes(&j->tensors[i]);
    return failed;
}

static void introduce(const job *j)
{
    char rank[40] = "";
    if (!j->adapter) snprintf(rank, sizeof rank, ", LoRA rank %d", j->rank);
    printf("%s%s: %zu tensors, %s over %d rank%s, %s parameters, %s published\n",
           j->adapter ? j->adapter : j->shapes->name, rank, j->num_tensors, layout_names[j->how], j->ranks,
           j->ranks == 1 ? "" : "s", lorasync_dtype_name(j->tensors[0].dtype), lorasync_dtype_name(j->tensors[0].wire));
}

static int conclude(const job *j, const crew *c)
{
    int good = !c->failed && c->num_verified == j->steps;
    clear_progress();
    if (good && j->adapter)
        printf(c->as_author ? "the last version's %zu tensors are byte-identical to the author's file\n"
                            : "the last version's %zu tensors are the author's values in another type\n",
               j->num_tensors);
    if (good && j->author && !c->as_author && j->wire == j->tensors[0].author_dtype) good = 0;
    if (good && j->out) good = leave(j);
    printf("demo: %zu tensors, %zu bytes, verified %d/%d versions\n", j->num_tensors, j->payload_bytes, c->num_verified,
           j->steps);
    return good ? 0 : 1;
}

int main(int argc, char **argv)
{
    const char     *temp  = getenv("TMPDIR");
    lorasync_local *local = NULL;
    lorasync_error  err;
    job             j;
    crew            c;
    int             p, result;

    memset(&j, 0, sizeof j);
    memset(&c, 0, sizeof c);
    j.ranks = 4, j.steps = 5, j.timeout_ms = 60000, j.victim = -2;
#ifdef DEMO_CUDA
    j.ranks = count_gpus();
    if (j.ranks == 0) return printf("demo: skipped: no GPU here\n"), 0;
#endif
    read_options(&j, argc, argv);
    setvbuf(stdout, NULL, _IOLBF, 1 << 12);
    if (make_job(&j) != 0) return free_job(&j), 2;
    snprintf(j.directory, sizeof j.directory, "%.300s/lorasync-demo-XXXXXX", temp && *temp ? temp : "/tmp");
    if (!mkdtemp(j.directory)) return problem("%s: %s", j.directory, strerror(errno)), free_job(&j), 1;
    signal(SIGINT, on_signal), signal(SIGTERM, on_signal), signal(SIGPIPE, SIG_IGN);
    introduce(&j);

    c.num  = j.ranks + 1;
    c.pids = (pid_t *)calloc((size_t)c.num, sizeof *c.pids);
    for (p = 0; p < NUM_PIPES; p++)
        if (pipe(c.pipes[p]) != 0) return problem("pipe: %s", strerror(errno)), rmdir(j.directory), 1;
    if (!c.pids || lorasync_local_open(j.ranks, &local, &err) < 0)
        return problem("%s", c.pids ? err.text : "no memory"), rmdir(j.directory), 1;
    fflush(stdout);
    start(&j, &c, local);
    for (p = 0; p < NUM_PIPES; p++) close_fd(&c.pipes[p][p % 2 == 0 ? 0 : 1]); /* the children's ends */
    supervise(&j, &c);

    result = conclude(&j, &c);
    for (p = 0; p < NUM_PIPES; p++) close_fd(&c.pipes[p][0]), close_fd(&c.pipes[p][1]);
    lorasync_local_close(local);
    remove_tree(j.directory);
    free(c.pids);
    free_job(&j);
    return result;
}
