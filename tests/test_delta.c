/* Deltas: what changed between two versions, sent alone and put back together. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"

#define MAX_TENSORS 24

/* -- versions of an adapter, each as a layout and as the file that would be sent whole */

typedef struct version {
    lorasync_image *image; /* a layout, stamped and bound to the file's payload */
    lorasync_image *read;  /* the same, parsed from the file */
    unsigned char  *bytes; /* the file */
    size_t          num_bytes;
    uint64_t        digests[MAX_TENSORS];
} version;

static lorasync_tensor tensor(const char *name, lorasync_dtype dtype, int64_t a, int64_t b)
{
    lorasync_tensor t;
    memset(&t, 0, sizeof t);
    t.name     = name;
    t.dtype    = dtype;
    t.ndim     = 2;
    t.shape[0] = a;
    t.shape[1] = b;
    return t;
}

/* payload: NULL for zeros. */
static int version_open(version *v, const lorasync_tensor *tensors, size_t num, const char *adapter, uint64_t number,
                        const unsigned char *payload)
{
    lorasync_image_desc d;
    lorasync_error      err;
    memset(v, 0, sizeof *v);
    memset(&d, 0, sizeof d);
    d.tensors     = tensors;
    d.num_tensors = num;
    d.adapter     = adapter;
    if (lorasync_image_layout(&d, NULL, &v->image, &err) < 0) return 0;
    v->num_bytes = v->image->header_bytes + v->image->payload_bytes;
    v->bytes     = (unsigned char *)calloc(v->num_bytes, 1);
    if (payload && v->image->payload_bytes) memcpy(v->bytes + v->image->header_bytes, payload, v->image->payload_bytes);
    lorasync_image_bind(v->image, v->bytes + v->image->header_bytes);
    lorasync_image_stamp(v->image, number, lorasync_image_digest(v->image, v->digests));
    v->image->tensor_digests = v->digests;
    memcpy(v->bytes, v->image->header, v->image->header_bytes);
    return lorasync_image_parse(v->bytes, v->num_bytes, NULL, &v->read, &err) == LORASYNC_OK;
}

static void version_close(version *v)
{
    lorasync_image_free(v->image);
    lorasync_image_free(v->read);
    free(v->bytes);
}

/* What a sender puts on the wire: header, then each tensor. */
static unsigned char *wire(const lorasync_image *delta, size_t *num_bytes)
{
    unsigned char *bytes, *at;
    size_t         i;
    *num_bytes = delta->header_bytes + delta->payload_bytes;
    bytes = at = (unsigned char *)malloc(*num_bytes);
    memcpy(at, delta->header, delta->header_bytes);
    at += delta->header_bytes;
    for (i = 0; i < delta->num_tensors; i++) {
        if (delta->tensors[i].num_bytes) memcpy(at, delta->tensors[i].data, delta->tensors[i].num_bytes);
        at += delta->tensors[i].num_bytes;
    }
    CHECK_EQ(at - bytes, *num_bytes);
    return bytes;
}

/* The three tensors of the tests that need no random ones, and two versions of them: "b" differs. */
static const unsigned char old_payload[20] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20};
static const unsigned char new_payload[20] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 99, 13, 14, 15, 16, 17, 18, 19, 20};

static int small_version(version *v, uint64_t number, const unsigned char *payload)
{
    lorasync_tensor t[3];
    t[0] = tensor("c", LORASYNC_BF16, 2, 2);
    t[1] = tensor("b", LORASYNC_BF16, 1, 2);
    t[2] = tensor("a", LORASYNC_F32, 1, 2);
    return version_open(v, t, 3, "policy", number, payload);
}

/* A delta as an attacker or another program might write it: any tensors, any claims, and a digest of its own that is
   right. free() *out_bytes. */
static lorasync_image *forge(const lorasync_tensor *tensors, size_t num, const char *adapter, uint64_t number,
                             const lorasync_delta *claims, unsigned char **out_bytes)
{
    lorasync_image_desc d;
    lorasync_image     *layout = NULL, *read = NULL;
    lorasync_error      err;
    size_t              n;
    memset(&d, 0, sizeof d);
    d.tensors     = tensors;
    d.num_tensors = num;
    d.adapter     = adapter;
    *out_bytes    = NULL;
    err.text[0]   = 0;
    if (lorasynci_layout(&d, claims, NULL, &layout, &err) == LORASYNC_OK) {
        n          = layout->header_bytes + layout->payload_bytes;
        *out_bytes = (unsigned char *)calloc(n, 1);
        lorasync_image_bind(layout, *out_bytes + layout->header_bytes);
        lorasync_image_stamp(layout, number, lorasync_image_digest(layout, NULL));
        memcpy(*out_bytes, layout->header, layout->header_bytes);
        lorasync_image_parse(*out_bytes, n, NULL, &read, &err);
    }
    if (!read) test_fail(__FILE__, __LINE__, err.text);
    lorasync_image_free(layout);
    return read;
}

/* -- the format */

static void golden(void)
{
    static const char before[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"lorasync.adapter\":\"policy\",\"lorasync.base_digest\":\"";
    static const char after[] =
        ",\"lorasync.version\":\"00000000000000000007\"},\"b:delta\":{\"dtype\":\"BF16\",\"shape\":[1,2],"
        "\"data_offsets\":[0,4]}}";
    version         v1, v2;
    lorasync_image *delta = NULL;
    lorasync_error  err;
    char            text[600];
    size_t          n;
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    n = (size_t)snprintf(
        text, sizeof text,
        "%s%016llx\",\"lorasync.base_version\":\"00000000000000000005\",\"lorasync.digest\":\"%016llx\","
        "\"lorasync.full_digest\":\"%016llx\"%s",
        before, (unsigned long long)v1.image->digest, (unsigned long long)delta->digest,
        (unsigned long long)v2.image->digest, after);
    while ((8 + n) % 64) text[n++] = ' ';
    CHECK_EQ(delta->header_bytes, 8 + n);
    CHECK(memcmp((const char *)delta->header + 8, text, n) == 0);
    CHECK_EQ(delta->num_tensors, 1);
    CHECK(delta->tensors[0].data == v2.bytes + v2.image->header_bytes + 8); /* not copied */
    CHECK(delta->payload == NULL);
    CHECK_EQ(delta->payload_bytes, 4);
    CHECK_TEXT(delta->adapter, "policy");
    CHECK_EQ(delta->version, 7);
    CHECK_EQ(delta->has_digest, 1);
    REQUIRE(delta->delta != NULL);
    CHECK_EQ(delta->delta->base_version, 5);
    CHECK(delta->delta->base_digest == v1.image->digest);
    CHECK(delta->delta->full_digest == v2.image->digest);
    CHECK(delta->config_json == v2.image->config_json);
    CHECK_EQ(lorasync_image_verify(delta, &err), LORASYNC_OK);
    CHECK(v1.image->delta == NULL && v1.read->delta == NULL);
    lorasync_image_free(delta);
    version_close(&v1);
    version_close(&v2);
}

/* -- random images, random changes */

static size_t random_tensors(lorasync_tensor *tensors, char (*names)[32], unsigned long long *state)
{
    static const char *const tails[] = {"", ".x", ":delta", "\"\\", "\xc3\xa9", "/z"};
    size_t                   num     = test_random(state) % (MAX_TENSORS + 1), i;
    for (i = 0; i < num; i++) {
        char longer[32];
        int  d;
        snprintf(names[i], sizeof names[i], "%c%d%s", (char)('!' + (int)(test_random(state) % 90)), (int)i,
                 tails[test_random(state) % 6]);
        if (i && strlen(names[i - 1]) < 20 && test_random(state) % 4 == 0) { /* one name begins another */
            snprintf(longer, sizeof longer, "%.20s:delta", names[i - 1]);
            memcpy(names[i], longer, sizeof longer);
        }
        tensors[i]      = tensor(names[i], (lorasync_dtype)(1 + test_random(state) % 22), 0, 0);
        tensors[i].ndim = (int)(test_random(state) % 5);
        for (d = 0; d < tensors[i].ndim; d++)
            tensors[i].shape[d] = (int64_t)(test_random(state) % 5 ? 1 + test_random(state) % 4 : 0);
        if (tensors[i].ndim) tensors[i].shape[0] *= 4; /* packed types fill bytes */
        else if (lorasync_dtype_bits(tensors[i].dtype) < 8) tensors[i].dtype = LORASYNC_I16;
    }
    return num;
}

/* Changes a random subset of the tensors; changed[i] says which. */
static size_t change(unsigned char *payload, const lorasync_image *image, int *changed, unsigned long long *state)
{
    unsigned likely = (unsigned)(test_random(state) % 5); /* none .. all */
    size_t   i, num = 0;
    for (i = 0; i < image->num_tensors; i++) {
        const lorasync_tensor *t = &image->tensors[i];
        changed[i]               = t->num_bytes && test_random(state) % 4 < likely;
        if (!changed[i]) continue;
        payload[t->offset + test_random(state) % t->num_bytes] ^= (unsigned char)(1u << test_random(state) % 8);
        num++;
    }
    return num;
}

/* The result is a normal image with exactly the bytes of v. */
static void check_result(const lorasync_image *full, const version *v)
{
    lorasync_error err;
    size_t         i;
    CHECK_EQ(full->header_bytes + full->payload_bytes, v->num_bytes);
    if (full->header_bytes + full->payload_bytes != v->num_bytes) return;
    CHECK((const unsigned char *)full->payload == (const unsigned char *)full->header + full->header_bytes);
    CHECK(memcmp(full->header, v->bytes, v->num_bytes) == 0);
    CHECK(full->delta == NULL);
    CHECK_TEXT(full->adapter, v->image->adapter);
    CHECK_TEXT(full->config_json, "");
    CHECK(full->version == v->image->version && full->digest == v->image->digest && full->has_digest);
    CHECK_EQ(lorasync_image_verify(full, &err), LORASYNC_OK);
    for (i = 0; i < full->num_tensors; i++) {
        CHECK(lorasync_image_find(full, v->image->tensors[i].name) == &full->tensors[i]);
        CHECK((const unsigned char *)full->tensors[i].data ==
              (const unsigned char *)full->payload + v->image->tensors[i].offset);
    }
}

/* Sends v2 to an engine that holds v1, in every combination of sources. */
static void round_trip(const version *v1, const version *v2, const int *changed, size_t num_changed, int round)
{
    lorasync_image       *delta = NULL, *read = NULL, *full = NULL;
    const lorasync_image *source = round & 1 ? v2->read : v2->image, *base = round & 2 ? v1->read : v1->image;
    lorasync_error        err;
    unsigned char        *bytes, *memory = round & 4 ? (unsigned char *)malloc(v2->num_bytes) : NULL;
    size_t                num_bytes, i, changed_bytes = 0;
    err.text[0] = 0;
    if (lorasync_image_delta(source, v1->image->version, v1->digests, NULL, &delta, &err) != LORASYNC_OK) {
        test_fail(__FILE__, __LINE__, err.text);
        free(memory);
        return;
    }
    for (i = 0; i < source->num_tensors; i++) changed_bytes += changed[i] ? source->tensors[i].num_bytes : 0;
    CHECK_EQ(delta->num_tensors, num_changed);
    CHECK_EQ(delta->payload_bytes, changed_bytes);
    bytes = wire(delta, &num_bytes);
    CHECK_EQ(lorasync_image_parse(bytes, num_bytes, NULL, &read, &err), LORASYNC_OK);
    if (read) CHECK_EQ(lorasync_image_verify(read, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_image_apply(base, round & 8 || !read ? delta : read, memory, NULL, &full, &err), LORASYNC_OK);
    if (full) {
        CHECK(!memory || full->header == memory);
        check_result(full, v2);
        lorasync_image_stamp(full, 1, 2); /* not a layout any more: nothing happens */
        check_result(full, v2);
    } else test_fail(__FILE__, __LINE__, err.text);
    lorasync_image_free(delta);
    lorasync_image_free(read);
    lorasync_image_free(full);
    free(bytes);
    free(memory);
}

static void random_round_trips(void)
{
    unsigned long long state = 2024;
    int                round;
    for (round = 0; round < 2000; round++) {
        lorasync_tensor tensors[MAX_TENSORS];
        char            names[MAX_TENSORS][32];
        int             changed[MAX_TENSORS];
        size_t          num    = random_tensors(tensors, names, &state), num_changed, i;
        uint64_t        number = test_random(&state) % 4 ? 1 + test_random(&state) % 1000 : test_random(&state) | 1;
        version         v1, v2;
        unsigned char  *payload, *kept;
        if (number == UINT64_MAX) number--;
        REQUIRE(version_open(&v1, tensors, num, "ad\"apter", number, NULL));
        for (i = 0; i < v1.image->payload_bytes; i++)
            v1.bytes[v1.image->header_bytes + i] = (unsigned char)test_random(&state);
        payload = (unsigned char *)malloc(v1.image->payload_bytes + 1);
        memcpy(payload, v1.bytes + v1.image->header_bytes, v1.image->payload_bytes);
        version_close(&v1);
        REQUIRE(version_open(&v1, tensors, num, "ad\"apter", number, payload));
        num_changed = change(payload, v1.image, changed, &state);
        REQUIRE(version_open(&v2, tensors, num, "ad\"apter", number + 1, payload));
        kept = (unsigned char *)malloc(v1.num_bytes);
        memcpy(kept, v1.bytes, v1.num_bytes);
        round_trip(&v1, &v2, changed, num_changed, round);
        CHECK(memcmp(kept, v1.bytes, v1.num_bytes) == 0); /* the base was only read */
        version_close(&v1);
        version_close(&v2);
        free(payload);
        free(kept);
        if (test_errors) return;
    }
}

/* Each result is the next base; each is also what a relay makes its own delta of. */
static void chains(void)
{
    unsigned long long state = 7;
    unsigned char      payload[20];
    uint64_t           digests[3];
    version            v;
    lorasync_image    *held = NULL, *delta = NULL, *relayed = NULL, *full = NULL;
    lorasync_error     err;
    uint64_t           number;
    memcpy(payload, old_payload, sizeof payload);
    REQUIRE(small_version(&v, 1, payload));
    held = v.read;
    for (number = 2; number < 40; number++) {
        version next;
        int     changed[3];
        change(payload, v.image, changed, &state);
        REQUIRE(small_version(&next, number, payload));
        REQUIRE(lorasync_image_delta(next.image, number - 1, v.digests, NULL, &delta, &err) == LORASYNC_OK);
        REQUIRE(lorasync_image_apply(held, delta, NULL, NULL, &full, &err) == LORASYNC_OK);
        check_result(full, &next);
        lorasync_image_digest(held, digests);
        REQUIRE(lorasync_image_delta(full, number - 1, digests, NULL, &relayed, &err) == LORASYNC_OK);
        CHECK_EQ(relayed->header_bytes, delta->header_bytes);
        CHECK(memcmp(relayed->header, delta->header, delta->header_bytes) == 0);
        if (held != v.read) lorasync_image_free(held);
        lorasync_image_free(delta);
        lorasync_image_free(relayed);
        version_close(&v);
        v    = next;
        held = full;
    }
    lorasync_image_free(held);
    version_close(&v);
}

/* Nothing changed: no tensors, and a new version all the same. */
static void empty(void)
{
    version         v1, v2;
    lorasync_image *delta = NULL, *full = NULL;
    lorasync_error  err;
    unsigned char  *bytes;
    size_t          num_bytes;
    REQUIRE(small_version(&v1, 1, old_payload) && small_version(&v2, 2, old_payload));
    REQUIRE(lorasync_image_delta(v2.image, 1, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    CHECK_EQ(delta->num_tensors, 0);
    CHECK_EQ(delta->payload_bytes, 0);
    bytes = wire(delta, &num_bytes);
    lorasync_image_free(delta);
    REQUIRE(lorasync_image_parse(bytes, num_bytes, NULL, &delta, &err) == LORASYNC_OK);
    REQUIRE(lorasync_image_apply(v1.image, delta, NULL, NULL, &full, &err) == LORASYNC_OK);
    check_result(full, &v2);
    lorasync_image_free(full);
    lorasync_image_free(delta);
    free(bytes);
    version_close(&v1);
    version_close(&v2);
}

/* -- the sender's errors */

#define DELTA_FAILS(image, base_version, digests, want, part)                                                          \
    do {                                                                                                               \
        delta       = (lorasync_image *)&err;                                                                          \
        err.text[0] = 0;                                                                                               \
        CHECK_EQ(lorasync_image_delta(image, base_version, digests, NULL, &delta, &err), want);                        \
        CHECK(delta == NULL);                                                                                          \
        CHECK_EQ(err.status, want);                                                                                    \
        CHECK_HAS(err.text, part);                                                                                     \
    } while (0)

static void sender_errors(void)
{
    static const char foreign[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"lorasync.adapter\":\"policy\",\"lorasync.digest\":\"0000000000000001\","
        "\"lorasync.version\":\"7\"},\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}";
    static const char nameless[] =
        "{\"__metadata__\":{\"lorasync.adapter\":\"policy\",\"lorasync.digest\":\"0000000000000001\","
        "\"lorasync.version\":\"7\"},\"\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}";
    version            v1, v2, anonymous;
    lorasync_image    *delta, *made = NULL;
    lorasync_error     err;
    lorasync_tensor    t = tensor("a", LORASYNC_U8, 1, 4);
    lorasync_allocator half;
    unsigned char      file[sizeof foreign + sizeof nameless + 16];
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    DELTA_FAILS(NULL, 5, v1.digests, LORASYNC_E_ARGUMENT, "NULL");
    DELTA_FAILS(v2.image, 5, NULL, LORASYNC_E_ARGUMENT, "NULL");
    CHECK_EQ(lorasync_image_delta(v2.image, 5, v1.digests, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    memset(&half, 0, sizeof half);
    half.alloc = test_memory_alloc;
    CHECK_EQ(lorasync_image_delta(v2.image, 5, v1.digests, &half, &delta, &err), LORASYNC_E_ARGUMENT);
    DELTA_FAILS(v2.image, 7, v1.digests, LORASYNC_E_VERSION, "from version 7 to version 7");
    DELTA_FAILS(v2.image, 8, v1.digests, LORASYNC_E_VERSION, "\"policy\"");
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &made, &err) == LORASYNC_OK);
    DELTA_FAILS(made, 5, v1.digests, LORASYNC_E_ARGUMENT, "a delta itself");
    lorasync_image_free(made);
    CHECK_EQ(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &made, NULL), LORASYNC_OK); /* err is not needed */
    lorasync_image_free(made);

    v2.image->has_digest = 0;
    DELTA_FAILS(v2.image, 5, v1.digests, LORASYNC_E_STATE, "no digest");
    v2.image->has_digest     = 1;
    v2.image->tensor_digests = NULL;
    lorasync_image_bind(v2.image, NULL);
    DELTA_FAILS(v2.image, 5, v1.digests, LORASYNC_E_STATE, "neither tensor_digests nor a payload");
    lorasync_image_bind(v2.image, v2.bytes + v2.image->header_bytes);
    v2.image->on_device = 1; /* without digests its payload would have to be read */
    DELTA_FAILS(v2.image, 5, v1.digests, LORASYNC_E_STATE, "neither tensor_digests nor a payload");
    v2.image->tensor_digests = v2.digests;
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &made, &err) == LORASYNC_OK);
    CHECK_EQ(made->on_device, 1);
    lorasync_image_free(made);
    REQUIRE(version_open(&anonymous, &t, 1, "", 7, NULL));
    DELTA_FAILS(anonymous.image, 5, v1.digests, LORASYNC_E_STATE, "no adapter");

    memset(file, 0, sizeof file);
    file[0] = (unsigned char)(sizeof foreign - 1);
    memcpy(file + 8, foreign, sizeof foreign - 1);
    REQUIRE(sizeof foreign - 1 < 256);
    REQUIRE(lorasync_image_parse(file, 8 + sizeof foreign - 1 + 4, NULL, &made, &err) == LORASYNC_OK);
    DELTA_FAILS(made, 5, v1.digests, LORASYNC_E_UNSUPPORTED, "send the full image");
    lorasync_image_free(made);
    file[0] = (unsigned char)(sizeof nameless - 1);
    memcpy(file + 8, nameless, sizeof nameless - 1);
    memset(file + 8 + sizeof nameless - 1, 0, 4);
    REQUIRE(lorasync_image_parse(file, 8 + sizeof nameless - 1 + 4, NULL, &made, &err) == LORASYNC_OK);
    DELTA_FAILS(made, 5, v1.digests, LORASYNC_E_UNSUPPORTED, "send the full image"); /* no layout has a tensor without a
                                                                                        name */
    lorasync_image_free(made);
    version_close(&v1);
    version_close(&v2);
    version_close(&anonymous);
}

/* -- the receiver's errors */

#define APPLY_FAILS_IN(base, delta, memory, want, part)                                                                \
    do {                                                                                                               \
        full        = (lorasync_image *)&err;                                                                          \
        err.text[0] = 0;                                                                                               \
        CHECK_EQ(lorasync_image_apply(base, delta, memory, NULL, &full, &err), want);                                  \
        CHECK(full == NULL);                                                                                           \
        CHECK_EQ(err.status, want);                                                                                    \
        CHECK_HAS(err.text, part);                                                                                     \
    } while (0)
#define APPLY_FAILS(base, delta, want, part) APPLY_FAILS_IN(base, delta, NULL, want, part)

static void wrong_base(void)
{
    version         v1, v2, other, earlier, anonymous, renamed;
    lorasync_image *delta = NULL, *back = NULL, *full;
    lorasync_tensor t[3];
    lorasync_delta  claims;
    lorasync_error  err;
    unsigned char  *bytes;
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    REQUIRE(small_version(&other, 5, new_payload) && small_version(&earlier, 4, old_payload));
    t[0] = tensor("c", LORASYNC_BF16, 2, 2);
    t[1] = tensor("b", LORASYNC_BF16, 1, 2);
    t[2] = tensor("a", LORASYNC_F32, 1, 2);
    REQUIRE(version_open(&anonymous, t, 3, NULL, 5, old_payload) &&
            version_open(&renamed, t, 3, "critic", 5, old_payload));
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    APPLY_FAILS(other.read, delta, LORASYNC_E_BASE, "send the full image"); /* same version, other bytes */
    APPLY_FAILS(earlier.read, delta, LORASYNC_E_BASE, "the base is version 4");
    APPLY_FAILS(v2.read, delta, LORASYNC_E_BASE, "against version 5");
    APPLY_FAILS(anonymous.read, delta, LORASYNC_E_BASE, "no lorasync.digest");
    APPLY_FAILS(renamed.read, delta, LORASYNC_E_BASE, "\"critic\"");
    APPLY_FAILS(delta, delta, LORASYNC_E_ARGUMENT, "the base is a delta itself");
    APPLY_FAILS(v1.read, v2.read, LORASYNC_E_ARGUMENT, "this is not a delta");
    APPLY_FAILS(NULL, delta, LORASYNC_E_BASE, "nothing is held");
    APPLY_FAILS(NULL, NULL, LORASYNC_E_ARGUMENT, "NULL");
    APPLY_FAILS(v1.read, NULL, LORASYNC_E_ARGUMENT, "NULL");
    CHECK_EQ(lorasync_image_apply(v1.read, delta, NULL, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_image_apply(other.read, delta, NULL, NULL, &full, NULL), LORASYNC_E_BASE); /* err is not needed */

    claims.base_version = 5; /* a delta that leads nowhere: from 5 to 5 */
    claims.base_digest  = v1.image->digest;
    claims.full_digest  = v1.image->digest;
    back                = forge(NULL, 0, "policy", 5, &claims, &bytes);
    REQUIRE(back != NULL);
    APPLY_FAILS(v1.read, back, LORASYNC_E_VERSION, "version 5 of version 5");
    lorasync_image_free(back);
    free(bytes);
    lorasync_image_free(delta);
    version_close(&v1);
    version_close(&v2);
    version_close(&other);
    version_close(&earlier);
    version_close(&anonymous);
    version_close(&renamed);
}

/* A delta of one tensor, against the right base, that promises `digest`. */
static void forged_at(int line, const version *v1, lorasync_tensor t, uint64_t digest, lorasync_status status,
                      const char *part)
{
    lorasync_delta  claims;
    lorasync_image *delta, *full = NULL;
    lorasync_error  err;
    unsigned char  *bytes;
    claims.base_version = v1->image->version;
    claims.base_digest  = v1->image->digest;
    claims.full_digest  = digest;
    delta               = forge(&t, 1, "policy", 7, &claims, &bytes);
    if (!delta) return;
    err.text[0] = 0;
    if (lorasync_image_apply(v1->read, delta, NULL, NULL, &full, &err) != status || full || !strstr(err.text, part) ||
        !strstr(err.text, "full"))
        fprintf(stderr, "\"%s\" should hold \"%s\"\n", err.text, part), test_fail(__FILE__, line, "forged");
    lorasync_image_free(delta);
    lorasync_image_free(full);
    free(bytes);
}

static void wrong_tensors(void)
{
    static const unsigned char zeroed[20] = {1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 13, 14, 15, 16, 17, 18, 19, 20};
    version                    v1, v2;
    lorasync_tensor            t;
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, zeroed));
    forged_at(__LINE__, &v1, tensor("x:delta", LORASYNC_BF16, 1, 2), v2.image->digest, LORASYNC_E_FORMAT,
              "\"x:delta\"");
    forged_at(__LINE__, &v1, tensor("b", LORASYNC_BF16, 1, 2), v2.image->digest, LORASYNC_E_FORMAT, "\"b\"");
    forged_at(__LINE__, &v1, tensor(":delta", LORASYNC_BF16, 1, 2), v2.image->digest, LORASYNC_E_FORMAT, "\":delta\"");
    forged_at(__LINE__, &v1, tensor("b:delta:delta", LORASYNC_BF16, 1, 2), v2.image->digest, LORASYNC_E_FORMAT,
              "\"b:delta:delta\"");
    forged_at(__LINE__, &v1, tensor("b:Delta", LORASYNC_BF16, 1, 2), v2.image->digest, LORASYNC_E_FORMAT,
              "\"b:Delta\"");
    forged_at(__LINE__, &v1, tensor("b:delta", LORASYNC_F16, 1, 2), v2.image->digest, LORASYNC_E_FORMAT,
              "F16 [1,2], the base has BF16 [1,2]");
    forged_at(__LINE__, &v1, tensor("b:delta", LORASYNC_BF16, 2, 1), v2.image->digest, LORASYNC_E_FORMAT,
              "BF16 [2,1], the base has BF16 [1,2]");
    forged_at(__LINE__, &v1, tensor("b:delta", LORASYNC_BF16, 1, 1000), v2.image->digest, LORASYNC_E_FORMAT,
              "BF16 [1,1000]");
    t      = tensor("b:delta", LORASYNC_BF16, 1, 2);
    t.ndim = 3, t.shape[2] = 1; /* as many bytes */
    forged_at(__LINE__, &v1, t, v2.image->digest, LORASYNC_E_FORMAT, "BF16 [1,2,1]");
    t.ndim = 1;
    forged_at(__LINE__, &v1, t, v2.image->digest, LORASYNC_E_FORMAT, "BF16 [1]");
    forged_at(__LINE__, &v1, tensor("b:delta", LORASYNC_BF16, 1, 2), v2.image->digest + 1, LORASYNC_E_DIGEST,
              "the promised image");
    {
        lorasync_delta  claims; /* and the right promise is kept */
        lorasync_image *delta, *full = NULL;
        lorasync_error  err;
        unsigned char  *bytes;
        claims.base_version = 5;
        claims.base_digest  = v1.image->digest;
        claims.full_digest  = v2.image->digest;
        t                   = tensor("b:delta", LORASYNC_BF16, 1, 2);
        delta               = forge(&t, 1, "policy", 7, &claims, &bytes);
        REQUIRE(delta != NULL);
        REQUIRE(lorasync_image_apply(v1.read, delta, NULL, NULL, &full, &err) == LORASYNC_OK);
        check_result(full, &v2);
        lorasync_image_free(full);
        lorasync_image_free(delta);
        free(bytes);
    }
    version_close(&v1);
    version_close(&v2);
}

static void damage_and_memory(void)
{
    version         v1, v2;
    lorasync_image *delta = NULL, *read = NULL, *full;
    lorasync_error  err;
    unsigned char  *bytes, *memory;
    size_t          num_bytes, i;
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    bytes = wire(delta, &num_bytes);
    REQUIRE(lorasync_image_parse(bytes, num_bytes, NULL, &read, &err) == LORASYNC_OK);
    for (i = read->header_bytes; i < num_bytes; i++) {
        bytes[i] ^= 0x10;
        APPLY_FAILS(v1.read, read, LORASYNC_E_DIGEST, "the delta: ");
        bytes[i] ^= 0x10;
    }
    v1.bytes[v1.num_bytes - 1] ^= 1; /* the base rotted after it was checked */
    APPLY_FAILS(v1.read, read, LORASYNC_E_DIGEST, "send the full one");
    v1.bytes[v1.num_bytes - 1] ^= 1;
    v1.bytes[20] ^= 1; /* in the header, "__metadata__" */
    APPLY_FAILS(v1.read, read, LORASYNC_E_UNSUPPORTED, "send the full image");
    v1.bytes[20] ^= 1;

    lorasync_image_bind(v1.read, NULL);
    APPLY_FAILS(v1.read, read, LORASYNC_E_STATE, "the base has no payload");
    lorasync_image_bind(v1.read, v1.bytes + v1.image->header_bytes);
    v1.read->on_device = 1;
    APPLY_FAILS(v1.read, read, LORASYNC_E_STATE, "the base has no payload in host memory");
    v1.read->on_device = 0;
    lorasync_image_bind(read, NULL);
    APPLY_FAILS(v1.read, read, LORASYNC_E_STATE, "the delta has no payload");
    lorasync_image_bind(read, bytes + read->header_bytes);

    /* never in place, nor partly so: memory that begins before, in and behind what is read */
    memory = (unsigned char *)malloc(4 * v1.num_bytes + num_bytes);
    memcpy(memory + v1.num_bytes, v1.bytes, v1.num_bytes);
    lorasync_image_free(read);
    memcpy(memory + 3 * v1.num_bytes, bytes, num_bytes);
    version_close(&v1);
    REQUIRE(small_version(&v1, 5, old_payload));
    lorasync_image_free(v1.read);
    REQUIRE(lorasync_image_parse(memory + v1.num_bytes, v1.num_bytes, NULL, &v1.read, &err) == LORASYNC_OK);
    REQUIRE(lorasync_image_parse(memory + 3 * v1.num_bytes, num_bytes, NULL, &read, &err) == LORASYNC_OK);
    APPLY_FAILS_IN(v1.read, read, memory + v1.num_bytes, LORASYNC_E_ARGUMENT, "memory overlaps the base");
    APPLY_FAILS_IN(v1.read, read, memory + 1, LORASYNC_E_ARGUMENT, "memory overlaps the base");
    APPLY_FAILS_IN(v1.read, read, memory + 2 * v1.num_bytes - 1, LORASYNC_E_ARGUMENT, "memory overlaps the base");
    APPLY_FAILS_IN(v1.read, read, memory + 2 * v1.num_bytes + 1, LORASYNC_E_ARGUMENT, "memory overlaps the delta");
    APPLY_FAILS_IN(v1.read, read, memory + 3 * v1.num_bytes + num_bytes - 1, LORASYNC_E_ARGUMENT,
                   "memory overlaps the delta");
    CHECK(memcmp(memory + v1.num_bytes, v1.bytes, v1.num_bytes) == 0);
    for (i = 0; i < 2; i++) { /* close by is no overlap */
        REQUIRE(lorasync_image_apply(v1.read, read, memory + i * 2 * v1.num_bytes, NULL, &full, &err) == LORASYNC_OK);
        check_result(full, &v2);
        lorasync_image_free(full);
    }
    lorasync_image_free(read);
    lorasync_image_free(delta);
    free(bytes);
    version_close(&v1);
    version_close(&v2);
    free(memory);
}

/* -- hostile bytes */

static void malformed_metadata(void)
{
    static const char *const keys[]   = {"lorasync.adapter", "lorasync.base_digest", "lorasync.base_version",
                                         "lorasync.digest",  "lorasync.full_digest", "lorasync.version"};
    static const char *const values[] = {"policy",           "0000000000000001", "5",
                                         "0000000000000002", "0000000000000003", "7"};
    static const char *const bad[]    = {NULL, "000000000000000G", "-5", "00000000000000", "00000000000000003", "7 "};
    size_t                   left, wrong, i;
    for (left = 0; left <= 6; left++) {
        for (wrong = 1; wrong <= 6; wrong++) {
            char            text[600] = "........{\"__metadata__\":{\"format\":\"pt\"";
            size_t          n;
            lorasync_image *image = NULL;
            lorasync_error  err;
            lorasync_status expected = left == 6 && wrong == 6 ? LORASYNC_OK : LORASYNC_E_FORMAT;
            if (left < 6 && wrong < 6) continue;
            for (i = 0; i < 6; i++)
                if (i != left)
                    snprintf(text + strlen(text), 100, ",\"%s\":\"%s\"", keys[i], i == wrong ? bad[i] : values[i]);
            strcat(text, "}}");
            n = strlen(text) - 8;
            for (i = 0; i < 8; i++) text[i] = (char)(n >> (8 * i) & 0xff);
            CHECK_EQ(lorasync_image_parse(text, n + 8, NULL, &image, &err), expected);
            if (image) {
                CHECK(image->delta != NULL);
                CHECK(image->delta->base_digest == 1 && image->delta->base_version == 5 &&
                      image->delta->full_digest == 3);
                lorasync_image_free(image);
            } else CHECK_HAS(err.text, keys[left < 6 ? left : wrong]);
        }
    }
}

/* Cut anywhere, or with damaged bytes: refused, or the promised payload comes out all the same. */
static void cut_and_mutated(void)
{
    unsigned long long state = 3;
    version            v1, v2;
    lorasync_image    *delta = NULL, *read, *full;
    lorasync_error     err;
    unsigned char     *bytes, *exact;
    size_t             num_bytes, i;
    long               round, num_applied = 0, num_read = 0;
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    bytes = wire(delta, &num_bytes);
    for (i = 0; i < num_bytes; i++) {
        exact = (unsigned char *)malloc(i ? i : 1);
        memcpy(exact, bytes, i);
        CHECK_EQ(lorasync_image_parse(exact, i, NULL, &read, &err), LORASYNC_E_FORMAT);
        free(exact);
    }
    for (round = 0; round < 60000; round++) {
        exact = (unsigned char *)malloc(num_bytes);
        memcpy(exact, bytes, num_bytes);
        for (i = 1 + test_random(&state) % 2; i > 0; i--) {
            size_t at = 8 + test_random(&state) % (num_bytes - 8);
            if (test_random(&state) % 2) exact[at] = (unsigned char)"0123456789abcdef"[test_random(&state) % 16];
            else exact[at] ^= (unsigned char)(1u << test_random(&state) % 8);
        }
        full = NULL;
        if (lorasync_image_parse(exact, num_bytes, NULL, &read, &err) == LORASYNC_OK) {
            num_read++;
            if (lorasync_image_apply(v1.read, read, NULL, NULL, &full, &err) == LORASYNC_OK) {
                num_applied++;
                CHECK(memcmp(full->payload, v2.image->payload, v2.image->payload_bytes) == 0);
            } else CHECK(full == NULL);
            lorasync_image_free(full);
            lorasync_image_free(read);
        }
        free(exact);
    }
    CHECK(num_read > 4000); /* so that the receiver, not only the reader, was tried */
    CHECK(num_applied < num_read / 2);
    lorasync_image_free(delta);
    free(bytes);
    version_close(&v1);
    version_close(&v2);
}

/* -- memory */

static void allocation_failures(void)
{
    version            v1, v2;
    test_memory        memory;
    lorasync_allocator a;
    lorasync_image    *delta = NULL, *image;
    lorasync_error     err;
    unsigned char     *room;
    long               n;
    int                which, done;
    a.alloc = test_memory_alloc;
    a.free  = test_memory_free;
    a.user  = &memory;
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    room = (unsigned char *)malloc(v2.num_bytes);
    for (which = 0; which < 4; which++) {
        for (n = 1, done = 0; !done; n++) {
            lorasync_status status;
            memset(&memory, 0, sizeof memory);
            memory.fail_at = n;
            image          = (lorasync_image *)&err;
            if (which < 2) status = lorasync_image_delta(which ? v2.read : v2.image, 5, v1.digests, &a, &image, &err);
            else status = lorasync_image_apply(v1.read, delta, which == 3 ? room : NULL, &a, &image, &err);
            if (status == LORASYNC_OK) {
                done = 1;
                CHECK(memory.fail_at > 0);
                if (which >= 2) check_result(image, &v2);
                lorasync_image_free(image);
            } else {
                CHECK_EQ(status, LORASYNC_E_MEMORY);
                CHECK_EQ(err.status, LORASYNC_E_MEMORY);
                CHECK(image == NULL);
            }
            CHECK_EQ(memory.live, 0);
            REQUIRE(n < 60);
        }
        CHECK(n > 8);
    }
    for (which = 0; which < 2; which++) { /* nor does anything leak when the data is at fault */
        memset(&memory, 0, sizeof memory);
        if (which) v1.bytes[v1.num_bytes - 1] ^= 1;
        CHECK_EQ(lorasync_image_apply(which ? v1.read : v2.read, delta, NULL, &a, &image, &err),
                 which ? LORASYNC_E_DIGEST : LORASYNC_E_BASE);
        CHECK_EQ(memory.live, 0);
    }
    lorasync_image_free(delta);
    free(room);
    version_close(&v1);
    version_close(&v2);
}

/* -- who must not take a delta for an adapter */

static int write_file(const char *path, const void *bytes, size_t num_bytes)
{
    FILE *f = fopen(path, "wb");
    int   ok;
    if (!f) return 0;
    ok = fwrite(bytes, 1, num_bytes, f) == num_bytes;
    return (fclose(f) == 0) && ok;
}

/* Publishes a delta where an engine looks for an adapter. */
static void check_readers(const char *folder, const unsigned char *bytes, size_t num_bytes)
{
    char                 adapter[300], served[320], latest[340], file[360];
    lorasync_image      *image  = NULL;
    lorasync_engine     *engine = NULL;
    lorasync_engine_desc desc;
    lorasync_error       err;
    snprintf(adapter, sizeof adapter, "%.200s/policy", folder);
    snprintf(served, sizeof served, "%s/v7", adapter);
    snprintf(latest, sizeof latest, "%s/latest", adapter);
    snprintf(file, sizeof file, "%s/adapter_model.safetensors", served);
    REQUIRE(mkdir(adapter, 0755) == 0 && mkdir(served, 0755) == 0 && symlink("v7", latest) == 0 &&
            write_file(file, bytes, num_bytes));
    CHECK_EQ(lorasync_open_adapter(served, NULL, &image, NULL, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "a delta against version 5");
    CHECK_EQ(lorasync_open_adapter(file, NULL, &image, NULL, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "\"policy\" version 7");
    CHECK_HAS(err.text, "adapter_model.safetensors");
    CHECK(image == NULL);
    memset(&desc, 0, sizeof desc);
    desc.directory = folder;
    REQUIRE(lorasync_engine_open(&desc, &engine, &err) == LORASYNC_OK);
    CHECK_EQ(lorasync_engine_poll(engine, 0, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "a delta against version 5");
    CHECK(lorasync_acquire(engine, "policy") == NULL);
    lorasync_engine_close(engine);
    remove(file), remove(latest), rmdir(served), rmdir(adapter);
}

static void refused_as_adapters(void)
{
    version                 v1, v2;
    lorasync_image         *delta = NULL, *read = NULL;
    lorasync_error          err;
    lorasync_transport      t;
    lorasync_directory_desc directory;
    lorasync_shm_desc       shm;
    char                    folder[] = "/tmp/lorasync-delta-XXXXXX", name[64];
    unsigned char          *bytes;
    size_t                  num_bytes;
    REQUIRE(mkdtemp(folder) != NULL);
    REQUIRE(small_version(&v1, 5, old_payload) && small_version(&v2, 7, new_payload));
    v2.image->config_json = "{}";
    REQUIRE(lorasync_image_delta(v2.image, 5, v1.digests, NULL, &delta, &err) == LORASYNC_OK);
    CHECK_TEXT(delta->config_json, "{}");
    bytes = wire(delta, &num_bytes);
    check_readers(folder, bytes, num_bytes);
    REQUIRE(lorasync_image_parse(bytes, num_bytes, NULL, &read, &err) == LORASYNC_OK);
    read->config_json = "{}";

    memset(&directory, 0, sizeof directory);
    directory.directory = folder;
    REQUIRE(lorasync_directory_open(&directory, &t, &err) == LORASYNC_OK);
    CHECK_EQ(t.stage(t.user, read, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "a delta against version 5");
    CHECK_EQ(t.stage(t.user, delta, &err), LORASYNC_E_UNSUPPORTED);
    t.close(t.user);
    snprintf(name, sizeof name, "lorasync-delta-%ld", (long)getpid());
    memset(&shm, 0, sizeof shm);
    shm.name = name;
    if (lorasync_shm_open(&shm, &t, &err) == LORASYNC_OK) {
        CHECK_EQ(t.stage(t.user, read, &err), LORASYNC_E_UNSUPPORTED);
        CHECK_HAS(err.text, "a delta against version 5");
        t.close(t.user);
        lorasync_shm_remove(name, NULL);
    }
    read->config_json = "";
    lorasync_image_free(read);
    lorasync_image_free(delta);
    free(bytes);
    rmdir(folder);
    version_close(&v1);
    version_close(&v2);
}

int main(void)
{
    RUN(golden);
    RUN(random_round_trips);
    RUN(chains);
    RUN(empty);
    RUN(sender_errors);
    RUN(wrong_base);
    RUN(wrong_tensors);
    RUN(damage_and_memory);
    RUN(malformed_metadata);
    RUN(cut_and_mutated);
    RUN(allocation_failures);
    RUN(refused_as_adapters);
    return test_summary("test_delta");
}
