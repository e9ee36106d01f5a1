/* For interop_safetensors.py: writes and reads safetensors files with the library.
       image_tool write SEED OUT    random tensors that SEED decides; prints what it wrote, as `read` does
       image_tool read FILE         prints a line per tensor: digest dtype shape name */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"

static int fail(const char *what, const lorasync_error *err)
{
    fprintf(stderr, "image_tool: %s: %s\n", what, err->text);
    return 1;
}

/* In the payload's order. */
static void print(const lorasync_image *image)
{
    size_t i;
    int    d;
    for (i = 0; i < image->num_tensors; i++) {
        const lorasync_tensor *t = &image->tensors[i];
        printf("%016llx %s [", (unsigned long long)lorasync_digest(t->data, t->num_bytes, 0),
               lorasync_dtype_name(t->dtype));
        for (d = 0; d < t->ndim; d++) printf(d ? ",%lld" : "%lld", (long long)t->shape[d]);
        printf("] %s\n", t->name);
    }
}

static int read_file(const char *path)
{
    size_t          num_bytes;
    char           *bytes = test_read(path, &num_bytes);
    lorasync_image *image;
    lorasync_error  err;
    if (!bytes) {
        fprintf(stderr, "image_tool: cannot read %s\n", path);
        return 1;
    }
    if (lorasync_image_parse(bytes, num_bytes, NULL, &image, &err) < 0) {
        free(bytes);
        return fail(path, &err);
    }
    print(image);
    lorasync_image_free(image);
    free(bytes);
    return 0;
}

#define MAX_TENSORS 40

/* Types that numpy has. */
static const lorasync_dtype dtypes[] = {LORASYNC_BOOL, LORASYNC_U8,  LORASYNC_I8,  LORASYNC_I16,
                                        LORASYNC_U16,  LORASYNC_F16, LORASYNC_I32, LORASYNC_U32,
                                        LORASYNC_F32,  LORASYNC_F64, LORASYNC_I64, LORASYNC_U64};

static size_t random_tensors(unsigned long long *state, lorasync_tensor *tensors, char (*names)[64])
{
    static const char *const tails[] = {"lora_A.weight",     "lora_B.weight", "b\"q\\",
                                        "\xc3\xa9t\xc3\xa9", "x/y z",         "\xf0\x9f\x98\x80"};
    size_t                   num     = test_random(state) % MAX_TENSORS, i;
    int                      d;
    memset(tensors, 0, MAX_TENSORS * sizeof *tensors);
    for (i = 0; i < num; i++) {
        snprintf(names[i], 64, "m.%d.%s", (int)(i * 7919 % 101), tails[test_random(state) % 6]);
        tensors[i].name  = names[i];
        tensors[i].dtype = dtypes[test_random(state) % (sizeof dtypes / sizeof dtypes[0])];
        tensors[i].ndim  = (int)(test_random(state) % 5);
        for (d = 0; d < tensors[i].ndim; d++) tensors[i].shape[d] = (int64_t)(test_random(state) % 6);
    }
    return num;
}

static int write_payload(const char *path, lorasync_image *image, unsigned char *payload, unsigned long long *state)
{
    FILE  *f = fopen(path, "wb");
    size_t i;
    int    ok;
    for (i = 0; i < image->payload_bytes; i++)
        payload[i] = (unsigned char)(test_random(state) & 1); /* valid in every
                                                                                                        type, BOOL
                                                                                                        too */
    lorasync_image_bind(image, payload);
    print(image);
    ok = f && fwrite(image->header, 1, image->header_bytes, f) == image->header_bytes &&
         fwrite(payload, 1, image->payload_bytes, f) == image->payload_bytes;
    if (f && fclose(f) != 0) ok = 0;
    if (!ok) fprintf(stderr, "image_tool: cannot write %s\n", path);
    return !ok;
}

static int write_file(unsigned long long seed, const char *path)
{
    lorasync_tensor     tensors[MAX_TENSORS];
    char                names[MAX_TENSORS][64];
    lorasync_image_desc desc;
    lorasync_image     *image;
    lorasync_error      err;
    unsigned char      *payload;
    int                 rc;
    memset(&desc, 0, sizeof desc);
    desc.tensors     = tensors;
    desc.num_tensors = random_tensors(&seed, tensors, names);
    desc.adapter     = NULL;
    if (lorasync_image_layout(&desc, NULL, &image, &err) < 0) return fail(path, &err);
    payload = (unsigned char *)malloc(image->payload_bytes + 1);
    rc      = payload ? write_payload(path, image, payload, &seed) : 1;
    free(payload);
    lorasync_image_free(image);
    return rc;
}

int main(int argc, char **argv)
{
    if (argc == 4 && strcmp(argv[1], "write") == 0) return write_file(strtoull(argv[2], NULL, 10), argv[3]);
    if (argc == 3 && strcmp(argv[1], "read") == 0) return read_file(argv[2]);
    fprintf(stderr, "usage: image_tool write SEED OUT | read FILE\n");
    return 2;
}
