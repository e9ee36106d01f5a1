/* Prints PEFT adapter directories and safetensors files as tables, or as JSON.

   compile   cc -I. -o inspect examples/inspect.c -lm                (from the folder that holds lorasync.h)
   run       ./inspect PATH...         ./inspect --json PATH... | python3 -m json.tool
   output    adapters/policy/latest/adapter_model.safetensors
             key                                  role    dtype  shape    rank     size  digest
             base_model..q_proj.lora_A.weight     lora_A  BF16   [8, 64]     8  1.0 KiB  05a0c4...
             ...
             exit status 1 if a path is not a valid adapter or file (stderr says why), 2 for wrong options

   A directory whose config is not a PEFT LoRA config (another method or framework) is still printed, with a note, as
   long as its tensors do not claim to be LoRA. A delta, which is not an adapter, is printed with the version it
   applies to. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* What is known about one path. */
typedef struct subject {
    const char      *path;
    char             file[4200]; /* the safetensors file */
    lorasync_image  *image;      /* NULL: unreadable, see error */
    char            *bytes;      /* of a delta: what the image points to */
    lorasync_config *config;     /* NULL: a file alone, or see note and error */
    uint64_t        *digests;    /* one per tensor */
    char             note[600];  /* why there is no config, where that is no error */
    lorasync_error   error;      /* status 0: none */
} subject;

/* ---- reading */

static int is_lora(lorasync_role role) { return role != LORASYNC_ROLE_BASE && role != LORASYNC_ROLE_MODULES_TO_SAVE; }

/* The role of a key; -1 where PEFT knows no such name. */
static int role_of(const char *key, lorasync_name *name)
{
    return lorasync_parse_name(key, name, NULL) == LORASYNC_OK ? (int)name->role : -1;
}

static int has_lora(const lorasync_image *image)
{
    lorasync_name name;
    size_t        i;
    for (i = 0; i < image->num_tensors; i++) {
        int role = role_of(image->tensors[i].name, &name);
        if (role >= 0 && is_lora((lorasync_role)role)) return 1;
    }
    return 0;
}

/* adapter_model.safetensors of a directory, or the only *.safetensors there. */
static int find_file(const char *directory, char *out, size_t out_size)
{
    struct dirent *entry;
    DIR           *d   = opendir(directory);
    int            num = 0, exact = 0;
    while (d && (entry = readdir(d)) != NULL) {
        size_t n = strlen(entry->d_name);
        if (exact || n < 12 || strcmp(entry->d_name + n - 12, ".safetensors") != 0) continue;
        exact = strcmp(entry->d_name, "adapter_model.safetensors") == 0;
        num   = exact ? 1 : num + 1;
        if ((size_t)snprintf(out, out_size, "%s/%s", directory, entry->d_name) >= out_size) num = 2;
    }
    if (d) closedir(d);
    return num == 1;
}

/* A delta: only adapters are opened by lorasync_open_adapter. */
static int read_delta(subject *s)
{
    struct stat info;
    FILE       *f = fopen(s->file, "rb");
    size_t      n = 0;
    if (f && fstat(fileno(f), &info) == 0 && S_ISREG(info.st_mode)) {
        s->bytes = (char *)malloc((size_t)info.st_size + 1);
        n        = s->bytes ? fread(s->bytes, 1, (size_t)info.st_size, f) : 0;
    }
    if (f) fclose(f);
    if (!s->bytes || lorasync_image_parse(s->bytes, n, NULL, &s->image, NULL) < 0) return 0;
    if (s->image->delta && lorasync_image_verify(s->image, &s->error) == LORASYNC_OK) return 1;
    lorasync_image_free(s->image);
    s->image = NULL;
    return 0;
}

/* Fills in everything, errors too. */
static void look_at(subject *s, const char *path)
{
    struct stat    info;
    lorasync_error why;
    int            is_directory = stat(path, &info) == 0 && S_ISDIR(info.st_mode);
    memset(s, 0, sizeof *s);
    s->path = path;
    snprintf(s->file, sizeof s->file, "%.4100s", path);
    if (is_directory && !find_file(path, s->file, sizeof s->file)) snprintf(s->file, sizeof s->file, "%.4100s", path);
    if (lorasync_open_adapter(path, NULL, &s->image, &s->config, &why) < 0) {
        s->error = why;
        if (why.status == LORASYNC_E_UNSUPPORTED && read_delta(s)) s->error.status = LORASYNC_OK;
        else if (!is_directory || lorasync_open_adapter(s->file, NULL, &s->image, NULL, &why) < 0) return;
        if (!s->image->delta && !has_lora(s->image)) { /* no LoRA, so the config may say what it likes */
            snprintf(s->note, sizeof s->note, "no PEFT LoRA adapter: %s", s->error.text);
            s->error.status = LORASYNC_OK;
        }
    }
    s->digests = (uint64_t *)malloc((s->image->num_tensors + 1) * sizeof *s->digests);
    if (s->digests) lorasync_image_digest(s->image, s->digests);
}

static void forget(subject *s)
{
    lorasync_config_free(s->config);
    lorasync_image_free(s->image);
    free(s->bytes);
    free(s->digests);
}

/* The LoRA rank that a tensor shows, or 0. */
static int64_t rank_of(const lorasync_tensor *t, int role)
{
    if (t->ndim < 2) return 0;
    if (role == LORASYNC_ROLE_LORA_A || role == LORASYNC_ROLE_EMBEDDING_A) return t->shape[0];
    if (role == LORASYNC_ROLE_LORA_B || role == LORASYNC_ROLE_EMBEDDING_B) return t->shape[1];
    return 0;
}

/* ---- the table */

/* Text from a file, with what could steer a terminal replaced. */
static void print_safe(const char *text)
{
    for (; *text; text++) putchar((unsigned char)*text < 32 || *text == 127 ? '?' : *text);
}

static const char *size_text(size_t num_bytes, char out[32])
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double                   value   = (double)num_bytes;
    int                      unit    = 0;
    while (value >= 1024 && unit < 6) value /= 1024, unit++;
    if (unit == 0) snprintf(out, 32, "%d B", (int)num_bytes);
    else snprintf(out, 32, "%.1f %s", value, units[unit]);
    return out;
}

static int shape_text(const lorasync_tensor *t, char out[200])
{
    int d, n = snprintf(out, 200, "[");
    for (d = 0; d < t->ndim; d++)
        n += snprintf(out + n, 200 - (size_t)n, "%s%lld", d ? ", " : "", (long long)t->shape[d]);
    return n + snprintf(out + n, 200 - (size_t)n, "]");
}

/* Columns fit the longest entry; a key longer than MAX_KEY gets a line of its own. */
enum {
    MAX_KEY = 100
};

static void print_tensors(const subject *s)
{
    lorasync_name name;
    char          shape[200], size[32], rank[32];
    int           key_width = 3, role_width = 4, shape_width = 5, n, role;
    size_t        i;
    for (i = 0; i < s->image->num_tensors; i++) {
        const lorasync_tensor *t = &s->image->tensors[i];
        if ((n = (int)strlen(t->name)) > key_width) key_width = n < MAX_KEY ? n : MAX_KEY;
        if ((n = shape_text(t, shape)) > shape_width) shape_width = n;
        role = role_of(t->name, &name);
        if (role >= 0 && (n = (int)strlen(lorasync_role_text((lorasync_role)role))) > role_width) role_width = n;
    }
    printf("%-*s  %-*s  %-11s %-*s %6s %10s  digest\n", key_width, "key", role_width, "role", "dtype", shape_width,
           "shape", "rank", "size");
    for (i = 0; i < s->image->num_tensors; i++) {
        const lorasync_tensor *t = &s->image->tensors[i];
        role                     = role_of(t->name, &name);
        shape_text(t, shape);
        snprintf(rank, sizeof rank, "%lld", (long long)rank_of(t, role));
        print_safe(t->name);
        if (strlen(t->name) > MAX_KEY) printf("\n%-*s", key_width, "");
        else printf("%-*s", key_width - (int)strlen(t->name), "");
        printf("  %-*s  %-11s %-*s %6s %10s", role_width, role < 0 ? "-" : lorasync_role_text((lorasync_role)role),
               lorasync_dtype_name(t->dtype), shape_width, shape, rank_of(t, role) ? rank : "-",
               size_text(t->num_bytes, size));
        if (s->digests) printf("  %016llx", (unsigned long long)s->digests[i]);
        printf("\n");
    }
}

static void print_list(const char *label, const char *const *list, size_t num)
{
    size_t i;
    if (!num) return;
    printf("  %-16s", label);
    for (i = 0; i < num; i++) {
        if (i) printf(", ");
        print_safe(list[i]);
    }
    printf("\n");
}

static void print_config(const lorasync_config_info *c)
{
    printf("config\n  %-16s", "base model");
    print_safe(c->base_model ? c->base_model : "-");
    printf("\n  %-16s%lld, alpha %g%s%s%s%s\n", "rank", (long long)c->r, c->lora_alpha, c->use_rslora ? ", rsLoRA" : "",
           c->use_dora ? ", DoRA" : "", c->lora_bias ? ", bias on B" : "", c->fan_in_fan_out ? ", fan_in_fan_out" : "");
    printf("  %-16s%zu rank, %zu alpha\n", "patterns", c->num_rank_patterns, c->num_alpha_patterns);
    printf("  %-16s", "task, bias");
    print_safe(c->task_type ? c->task_type : "-");
    printf(", ");
    print_safe(c->bias);
    printf("\n");
    if (c->target_pattern) print_list("target", &c->target_pattern, 1);
    print_list("targets", c->target_modules, c->num_target_modules);
    print_list("modules to save", c->modules_to_save, c->num_modules_to_save);
}

static void print_subject(const subject *s)
{
    char size[32];
    print_safe(s->file);
    printf("\n");
    print_tensors(s);
    printf("%zu tensor%s, %s of data, header %zu bytes\n", s->image->num_tensors, s->image->num_tensors == 1 ? "" : "s",
           size_text(s->image->payload_bytes, size), s->image->header_bytes);
    if (s->image->adapter[0]) {
        printf("published as ");
        print_safe(s->image->adapter);
        printf(", version %llu\n", (unsigned long long)s->image->version);
    }
    if (s->image->delta) {
        printf("a delta, no adapter: against version %llu with digest %016llx it makes digest %016llx\n",
               (unsigned long long)s->image->delta->base_version, (unsigned long long)s->image->delta->base_digest,
               (unsigned long long)s->image->delta->full_digest);
    }
    if (s->image->has_digest)
        printf("digest %016llx, verified\n", (unsigned long long)s->image->digest); /* opening
                                                                                                             verified
                                                                                                             it */
    else printf("no digest in the file\n");
    if (s->config) print_config(lorasync_config_view(s->config));
    if (s->note[0]) printf("note: "), print_safe(s->note), printf("\n");
}

/* ---- JSON */

/* Length of the UTF-8 sequence at p, 0 if it is none. Tensor names are checked by the reader; paths are whatever the
   system has. */
static int utf8_length(const unsigned char *p)
{
    int n = p[0] < 0x80                   ? 1
            : p[0] >= 0xC2 && p[0] < 0xE0 ? 2
            : p[0] >= 0xE0 && p[0] < 0xF0 ? 3
            : p[0] >= 0xF0 && p[0] < 0xF5 ? 4
                                          : 0,
        i;
    for (i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if (n == 3 && ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] >= 0xA0))) return 0;
    if (n == 4 && ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] >= 0x90))) return 0;
    return n;
}

static void json_text(const char *text)
{
    const unsigned char *p = (const unsigned char *)text;
    int                  n;
    if (!text) {
        printf("null");
        return;
    }
    putchar('"');
    while (*p) {
        n = utf8_length(p);
        if (n == 0) printf("\\ufffd"), n = 1;
        else if (*p == '"' || *p == '\\') printf("\\%c", *p);
        else if (*p < 32 || *p == 127) printf("\\u%04x", *p);
        else printf("%.*s", n, (const char *)p);
        p += n;
    }
    putchar('"');
}

static void json_list(const char *label, const char *const *list, size_t num)
{
    size_t i;
    printf(", \"%s\": ", label);
    if (!list) {
        printf("null");
        return;
    }
    for (i = 0; i < num; i++) printf(i ? ", " : "["), json_text(list[i]);
    printf(num ? "]" : "[]");
}

static const char *json_bool(int value) { return value ? "true" : "false"; }

static void json_config(const lorasync_config_info *c)
{
    printf(",\n  \"config\": {\"peft_type\": ");
    json_text(c->peft_type);
    printf(", \"task_type\": "), json_text(c->task_type);
    printf(", \"base_model_name_or_path\": "), json_text(c->base_model);
    printf(", \"bias\": "), json_text(c->bias);
    printf(", \"r\": %lld, \"lora_alpha\": %.17g, \"use_rslora\": %s, \"use_dora\": %s, \"lora_bias\": %s, "
           "\"fan_in_fan_out\": %s",
           (long long)c->r, c->lora_alpha, json_bool(c->use_rslora), json_bool(c->use_dora), json_bool(c->lora_bias),
           json_bool(c->fan_in_fan_out));
    if (c->target_pattern) printf(", \"target_modules\": "), json_text(c->target_pattern);
    else json_list("target_modules", c->target_modules, c->num_target_modules);
    json_list("modules_to_save", c->modules_to_save, c->num_modules_to_save);
    printf(", \"num_rank_patterns\": %zu, \"num_alpha_patterns\": %zu}", c->num_rank_patterns, c->num_alpha_patterns);
}

static void json_tensor(const subject *s, size_t i)
{
    const lorasync_tensor *t = &s->image->tensors[i];
    lorasync_name          name;
    int                    role = role_of(t->name, &name);
    char                   shape[200];
    shape_text(t, shape);
    printf("%s\n    {\"key\": ", i ? "," : "");
    json_text(t->name);
    printf(", \"role\": "), json_text(role < 0 ? NULL : lorasync_role_text((lorasync_role)role));
    printf(", \"module\": "), json_text(role < 0 ? NULL : name.module);
    printf(", \"dtype\": \"%s\", \"shape\": %s", lorasync_dtype_name(t->dtype), shape);
    if (rank_of(t, role)) printf(", \"rank\": %lld", (long long)rank_of(t, role));
    else printf(", \"rank\": null");
    printf(", \"bytes\": %zu, \"digest\": ", t->num_bytes);
    if (s->digests) printf("\"%016llx\"}", (unsigned long long)s->digests[i]);
    else printf("null}");
}

static void json_subject(const subject *s)
{
    size_t i;
    printf(" {\"path\": ");
    json_text(s->path);
    printf(", \"file\": "), json_text(s->file);
    printf(", \"error\": "), json_text(s->error.status ? s->error.text : NULL);
    printf(", \"note\": "), json_text(s->note[0] ? s->note : NULL);
    if (s->image) {
        printf(",\n  \"header_bytes\": %zu, \"payload_bytes\": %zu, \"num_tensors\": %zu, \"adapter\": ",
               s->image->header_bytes, s->image->payload_bytes, s->image->num_tensors);
        json_text(s->image->adapter[0] ? s->image->adapter : NULL);
        if (s->image->version) printf(", \"version\": %llu", (unsigned long long)s->image->version);
        else printf(", \"version\": null");
        if (s->image->has_digest)
            printf(", \"digest\": \"%016llx\", \"verified\": true", (unsigned long long)s->image->digest);
        else printf(", \"digest\": null, \"verified\": false");
        if (s->image->delta) {
            printf(
                ",\n  \"delta\": {\"base_version\": %llu, \"base_digest\": \"%016llx\", \"full_digest\": \"%016llx\"}",
                (unsigned long long)s->image->delta->base_version, (unsigned long long)s->image->delta->base_digest,
                (unsigned long long)s->image->delta->full_digest);
        } else {
            printf(",\n  \"delta\": null");
        }
        if (s->config) json_config(lorasync_config_view(s->config));
        else printf(",\n  \"config\": null");
        printf(",\n  \"tensors\": [");
        for (i = 0; i < s->image->num_tensors; i++) json_tensor(s, i);
        printf("%s]", s->image->num_tensors ? "\n  " : "");
    }
    printf("}");
}

/* ---- main */

static int inspect(const char *path, int json, int first)
{
    subject *s = (subject *)malloc(sizeof *s);
    int      bad;
    if (!s) return fprintf(stderr, "inspect: out of memory\n"), 1;
    look_at(s, path);
    bad = s->error.status != LORASYNC_OK;
    if (json) printf("%s", first ? "" : ",\n"), json_subject(s);
    else if (s->image) printf("%s", first ? "" : "\n"), print_subject(s);
    if (bad)
        fflush(stdout),
            fprintf(stderr, "inspect: %s: %s: %s\n", path, lorasync_status_text(s->error.status), s->error.text);
    forget(s);
    free(s);
    return bad;
}

/* 1 if stdout is a pipe that nobody reads any more. */
static int reader_is_gone(void)
{
    struct pollfd p;
    p.fd      = 1;
    p.events  = POLLOUT;
    p.revents = 0;
    return poll(&p, 1, 0) > 0 && (p.revents & POLLERR) != 0;
}

int main(int argc, char **argv)
{
    static const char usage[] =
        "usage: inspect [--json] PATH...\n"
        "Prints PEFT adapter directories and safetensors files: a table per path, or with --json one array with an "
        "object per path.\nexit status: 0 all are valid, 1 one is not (the reason is on stderr, the others are "
        "printed), 2 wrong options\n";
    int json = 0, num = 0, bad = 0, only_paths = 0, i;
    signal(SIGPIPE, SIG_IGN); /* `inspect ... | head` ends quietly */
    for (i = 1; i < argc; i++) {
        if (only_paths || argv[i][0] != '-') num++;
        else if (strcmp(argv[i], "--") == 0) only_paths = 1;
        else if (strcmp(argv[i], "--json") == 0) json = 1;
        else if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return fputs(usage, stdout), 0;
        else return fprintf(stderr, "inspect: unknown option %s\n%s", argv[i], usage), 2;
    }
    if (!num) return fputs(usage, stderr), 2;
    if (json) printf("[\n");
    for (i = 1, num = 0, only_paths = 0; i < argc && !ferror(stdout); i++) {
        if (!only_paths && argv[i][0] == '-') only_paths = strcmp(argv[i], "--") == 0;
        else bad |= inspect(argv[i], json, num++ == 0);
    }
    if (json) printf("\n]\n");
    fflush(stdout);
    if (ferror(stdout) && !reader_is_gone()) return fprintf(stderr, "inspect: cannot write the output\n"), 1;
    return bad;
}
