/* safetensors images: reading, refusing, writing, and the digest. */
#include "no_avx2.h"

#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"

/* -- making files */

typedef struct file {
    unsigned char *bytes;
    size_t         num_bytes;
} file;

/* length field + text + `payload` zero bytes */
static file make_raw(uint64_t n, const char *text, size_t num_text, size_t payload)
{
    file   f;
    size_t i;
    f.num_bytes = 8 + num_text + payload;
    f.bytes     = (unsigned char *)calloc(f.num_bytes, 1);
    for (i = 0; i < 8; i++) f.bytes[i] = (unsigned char)(n >> (8 * i));
    memcpy(f.bytes + 8, text, num_text);
    return f;
}

static file make(const char *text, size_t payload) { return make_raw(strlen(text), text, strlen(text), payload); }

/* Parses and frees the file; the image keeps pointing there, so only its own memory may be looked at. */
static lorasync_status parse_file(file f, lorasync_image **out, lorasync_error *err)
{
    lorasync_status status = lorasync_image_parse(f.bytes, f.num_bytes, NULL, out, err);
    free(f.bytes);
    return status;
}

static void accept_at(int line, const char *text, size_t payload, size_t num_tensors)
{
    lorasync_image *image = NULL;
    lorasync_error  err;
    err.text[0] = 0;
    if (parse_file(make(text, payload), &image, &err) != LORASYNC_OK || image->num_tensors != num_tensors)
        fprintf(stderr, "%s: %s\n", text, err.text), test_fail(__FILE__, line, "accepted");
    lorasync_image_free(image);
}

static void refuse_file_at(int line, file f, const char *part)
{
    lorasync_image *image = (lorasync_image *)&line;
    lorasync_error  err;
    lorasync_status status;
    err.text[0] = 0;
    err.status  = LORASYNC_OK;
    status      = parse_file(f, &image, &err);
    if (status != LORASYNC_E_FORMAT || err.status != status || image != NULL || !strstr(err.text, part))
        fprintf(stderr, "status %d, \"%s\" should hold \"%s\"\n", (int)status, err.text, part),
            test_fail(__FILE__, line, "refused");
}

#define ACCEPT(text, payload, num) accept_at(__LINE__, text, payload, num)
#define REFUSE(text, payload, part) refuse_file_at(__LINE__, make(text, payload), part)
#define REFUSE_FILE(file, part) refuse_file_at(__LINE__, file, part)

#define H(shape, offsets) "{\"test\":{\"dtype\":\"I32\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
#define T(name, dtype, shape, offsets)                                                                                 \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

/* -- accept and refuse */

static void accepts(void)
{
    ACCEPT("{}      ", 0, 0);
    ACCEPT("{}", 0, 0);
    ACCEPT("{}\r \t\n", 0, 0);
    ACCEPT(H("[]", "[0,4]"), 4, 1);
    ACCEPT(H("[2,0]", "[0, 0]"), 0, 1);
    ACCEPT(H("[2,2]", "[0,16]"), 16, 1);
    ACCEPT("{" T("f", "F4", "[1,2]", "[0,1]") "}", 1, 1);
    ACCEPT("{" T("f", "F6_E2M3", "[4]", "[0,3]") "}", 3, 1);
    ACCEPT(H("[0,9223372036854775807,2]", "[0,0]"), 0, 1); /* 0 before it could overflow */
    ACCEPT(
        "{" T("z1", "F32", "[0]", "[0,0]") "," T("z2", "F32", "[3,0]", "[0,0]") "," T("r", "F32", "[1]", "[0,4]") "}",
        4, 3);
    ACCEPT("{" T("r", "F32", "[1]", "[0,4]") "," T("z1", "F32", "[0]", "[0,0]") "}", 4, 2); /* zero-size first after
                                                                                               sorting */
    ACCEPT("{" T("b", "F32", "[1]", "[4,8]") "," T("a", "F32", "[1]", "[0,4]") "}", 8, 2);
    ACCEPT("{\"__metadata__\":null," T("a", "F32", "[1]", "[0,4]") "}", 4, 1);
    ACCEPT("{\"__metadata__\":{}," T("a", "F32", "[1]", "[0,4]") "}", 4, 1);
    ACCEPT("{" T("a", "F32", "[1]", "[0,4]") ",\"__metadata__\":{\"k\":\"v\"}}", 4, 1);
    ACCEPT("{ \"a\" : { \"shape\" : [ 1 ] , \"extra\" : [1,{\"x\":null}] , \"data_offsets\" : [ 0 , 4 ] , \"dtype\" : "
           "\"F32\" } }",
           4, 1);
    ACCEPT("{" T("a", "\\u004632", "[1]", "[0,4]") "}", 4, 1); /* an escaped F32 */
    ACCEPT("{" T("a", "BF\\u0031\\u0036", "[2]", "[0,4]") "}", 4, 1);
    ACCEPT("{" T("", "F32", "[1]", "[0,4]") "}", 4, 1);
    ACCEPT(H("[1,1,1,1,1,1,1,1]", "[0,4]"), 4, 1);
    ACCEPT("{" T("\xc3\xa9\\u00e9\\ud83d\\ude00", "F32", "[1]", "[0,4]") "}", 4, 1);
}

static void refuses(void)
{
    static const char trailing[] = "0123456789012345678901234567890123";
    file              f;
    REFUSE("\t\n{}\r ", 0, "begin with `{`");
    REFUSE(" {}", 0, "begin with `{`");
    REFUSE("", 0, "begin with `{`");
    REFUSE("[]", 0, "begin with `{`");
    REFUSE("{", 0, "JSON");
    REFUSE("{} x", 0, "JSON");
    REFUSE("{}{}", 0, "JSON");
    REFUSE(H("[2,2]", "[0,16]"), 16 + sizeof trailing - 1, "34 bytes belong to no tensor");
    REFUSE(H("[2,2]", "[0,16]"), 14, "truncated");
    REFUSE_FILE(make_raw(UINT64_C(0xffffffff0000003c), H("[2,2]", "[0,16]"), 0x3b, 0), "over the limit");
    REFUSE_FILE(make_raw(UINT64_MAX, H("[2,2]", "[0,16]"), 0x3b, 0), "over the limit");
    REFUSE_FILE(make_raw(100000001, "{}", 2, 0), "over the limit");
    REFUSE_FILE(make_raw(100000000, "{}", 2, 0), "100000000");
    REFUSE_FILE(make_raw(0x3c, "", 0, 0), "truncated");
    REFUSE_FILE(make_raw(1, "\xff", 1, 0), "begin with `{`");
    f = make("{}", 0), f.num_bytes = 0;
    REFUSE_FILE(f, "0 bytes are too few");
    f = make("{}", 0), f.num_bytes = 7;
    REFUSE_FILE(f, "7 bytes are too few");
    f = make("{}", 0), f.num_bytes = 9;
    REFUSE_FILE(f, "truncated");
    REFUSE(H("[2,18446744073709551614]", "[0,16]"), 16, "\"test\"");
    REFUSE(H("[4,9223372036854775807]", "[0,16]"), 16, "does not fit 64 bits");
    REFUSE(H("[2,9223372036854775807]", "[0,16]"), 16, "does not fit 64 bits");
    REFUSE(H("[2,18446744073709551615,0]", "[0,0]"), 0, "over 2^63 - 1");
    REFUSE(H("[0,18446744073709551615,2]", "[0,0]"), 0, "over 2^63 - 1");                 /* the reference reader
                                                                                             accepts it */
    REFUSE(H("[4,9223372036854775807,0]", "[0,0]"), 0, "does not fit 64 bits");           /* overflows before it meets
                                                                                             the 0 */
    REFUSE(H("[4194305,4194305,211106198978564]", "[0,16]"), 16, "does not fit 64 bits"); /* 4 elements modulo 2^64 */
    REFUSE("{" T("f", "F4", "[1,3]", "[0,1]") "}", 1, "inside a byte");
    REFUSE("{" T("f", "F6_E3M2", "[2]", "[0,1]") "}", 1, "inside a byte");
    REFUSE(H("[2,2]", "[0, 4]"), 4, "I32 [2,2] needs 16 bytes, but data_offsets give it 4");
    REFUSE("{" T("a", "F32", "[1]", "[0,4]") "," T("b", "F32", "[1]", "[8,12]") "}", 12, "a hole");
    REFUSE("{" T("a", "F32", "[1]", "[0,4]") "," T("b", "F32", "[1]", "[2,6]") "}", 6, "an overlap");
    REFUSE("{" T("a", "F32", "[1]", "[4,8]") "}", 8, "a hole");
    REFUSE("{" T("a", "F32", "[1]", "[4,0]") "}", 4, "[4,0]");
    REFUSE("{" T("a", "F32", "[1]", "[0,18446744073709551615]") "}", 4, "\"a\"");
    REFUSE("{" T("a", "F32", "[1]", "[0,4]") "," T("z", "F32", "[0]", "[2,2]") "}", 4, "\"z\"");
}

static void refuses_forms(void)
{
    REFUSE("{" T("w", "F32", "[1]", "[0,4]") "," T("w", "F32", "[1]", "[0,4]") "}", 4, "\"w\"");
    REFUSE("{" T("w", "F32", "[1]", "[0,4]") "," T("w", "F32", "[1]", "[4,8]") "}", 8, "\"w\" occurs twice");
    REFUSE("{" T("w", "F32", "[1]", "[0,4]") "," T("\\u0077", "F32", "[1]", "[4,8]") "}", 8, "\"w\" occurs twice");
    REFUSE("{\"__metadata__\":{}," T("a", "F32", "[1]", "[0,4]") ",\"__metadata__\":{}}", 4,
           "__metadata__ occurs twice");
    REFUSE("{\"__metadata__\":null,\"__metadata__\":null}", 0, "__metadata__ occurs twice");
    REFUSE("{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "\"a\"");
    REFUSE("{\"__metadata__\":{\"a\":1}}", 0, "expected a string");
    REFUSE("{\"__metadata__\":{\"a\":null}}", 0, "expected a string");
    REFUSE("{\"__metadata__\":[]}", 0, "JSON");
    REFUSE("{\"__metadata__\":\"x\"}", 0, "JSON");
    REFUSE("{\"a\":[\"F32\",[1],[0,4]]}", 4, "\"a\": expected an object");
    REFUSE("{\"a\":null}", 0, "\"a\": expected an object");
    REFUSE("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
           "\"dtype\" occurs twice");
    REFUSE("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
           "\"shape\" occurs twice");
    REFUSE("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"data_offsets\":[0,4]}}", 4,
           "\"data_offsets\" occurs twice");
    REFUSE("{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "\"dtype\" is missing");
    REFUSE("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "\"shape\" is missing");
    REFUSE("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "\"data_offsets\" is missing");
    REFUSE("{\"a\":{}}", 4, "\"dtype\" is missing");
    REFUSE("{" T("a", "F33", "[1]", "[0,4]") "}", 4, "unknown dtype \"F33\"");
    REFUSE("{" T("a", "", "[1]", "[0,4]") "}", 4, "unknown dtype");
    REFUSE("{" T("a", "F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32F32", "[1]",
                 "[0,4]") "}",
           4, "unknown dtype");
    REFUSE("{" T("a", "f32", "[1]", "[0,4]") "}", 4, "unknown dtype \"f32\"");
    REFUSE("{\"a\":{\"dtype\":7,\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[-1]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[1.0]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[1e0]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[01]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[18446744073709551616]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "1", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[1,]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "more than 8 dimensions");
    REFUSE("{" T("a", "F32", "[1]", "[0]") "}", 4, "found 1 numbers");
    REFUSE("{" T("a", "F32", "[1]", "[]") "}", 4, "found 0 numbers");
    REFUSE("{" T("a", "F32", "[1]", "[0,4,4]") "}", 4, "found 3 numbers");
    REFUSE("{" T("a", "F32", "[1]", "[0,4]") ",}", 4, "JSON");
    REFUSE("{" T("a\\u0001", "F32", "[1]", "[0,4]") "}", 4, "control character");
    REFUSE("{" T("a\\n", "F32", "[1]", "[0,4]") "}", 4, "control character");
    REFUSE("{" T("a\\u007f", "F32", "[1]", "[0,4]") "}", 4, "control character");
    REFUSE("{" T("a\x7f", "F32", "[1]", "[0,4]") "}", 4, "control character");
    REFUSE("{" T("a\\u0000", "F32", "[1]", "[0,4]") "}", 4, "u0000");
    REFUSE("{" T("a\x01", "F32", "[1]", "[0,4]") "}", 4, "JSON");
    REFUSE("{" T("\xff", "F32", "[1]", "[0,4]") "}", 4, "UTF-8");
    REFUSE("{" T("\xc0\x80", "F32", "[1]", "[0,4]") "}", 4, "UTF-8");
    REFUSE("{\"__metadata__\":{\"lorasync.version\":\"\"}}", 0, "lorasync.version");
    REFUSE("{\"__metadata__\":{\"lorasync.version\":\"1a\"}}", 0, "lorasync.version");
    REFUSE("{\"__metadata__\":{\"lorasync.version\":\"-1\"}}", 0, "lorasync.version");
    REFUSE("{\"__metadata__\":{\"lorasync.version\":\"18446744073709551616\"}}", 0, "lorasync.version");
    REFUSE("{\"__metadata__\":{\"lorasync.digest\":\"0123456789ABCDEF\"}}", 0, "lorasync.digest");
    REFUSE("{\"__metadata__\":{\"lorasync.digest\":\"0123456789abcde\"}}", 0, "lorasync.digest");
    REFUSE("{\"__metadata__\":{\"lorasync.digest\":\"0123456789abcdef0\"}}", 0, "lorasync.digest");
}

/* 200,000 entries that all claim the same bytes: refused quickly, without much memory. */
static void many_overlapping(void)
{
    lorasynci_buffer   b;
    lorasync_allocator a;
    int                i;
    lorasynci_take_allocator(NULL, &a, NULL);
    lorasynci_buffer_init(&b, &a);
    lorasynci_put_text(&b, "{");
    for (i = 0; i < 200000; i++)
        lorasynci_put_format(&b, "%s\"%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}", i ? "," : "", i);
    lorasynci_put_text(&b, "}");
    REFUSE_FILE(make_raw(b.size, b.data, b.size, 1), "an overlap");
    b.size = 0;
    lorasynci_put_text(&b, "{\"");
    for (i = 0; i < 1000000; i++) lorasynci_put_text(&b, "{");
    lorasynci_put_text(&b, "\":1}");
    REFUSE_FILE(make_raw(b.size, b.data, b.size, 1), "expected an object");
    lorasynci_buffer_free(&b);
}

/* -- what a reader gives */

static void reads(void)
{
    static const char text[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"a\\u00e9\":\"x\\ny\",\"lorasync.adapter\":\"policy\","
        "\"lorasync.version\":\"007\","
        "\"lorasync.digest\":\"00000000000000ff\"}," T("b", "BF16", "[2,1]", "[8,12]") "," T(
            "a\\\"\\u00e9", "F32", "[1,2]", "[0,8]") "," T("z", "F64", "[0,3]", "[12,12]") "}";
    file                   f     = make(text, 12);
    lorasync_image        *image = NULL;
    lorasync_error         err;
    const lorasync_tensor *t;
    REQUIRE(lorasync_image_parse(f.bytes, f.num_bytes, NULL, &image, &err) == LORASYNC_OK);
    CHECK(image->header == f.bytes);
    CHECK_EQ(image->header_bytes, 8 + strlen(text));
    CHECK_EQ(image->payload_bytes, 12);
    CHECK((const unsigned char *)image->payload == f.bytes + image->header_bytes);
    REQUIRE(image->num_tensors == 3);
    CHECK_TEXT(image->tensors[0].name, "a\"\xc3\xa9");
    CHECK_TEXT(image->tensors[1].name, "b");
    CHECK_TEXT(image->tensors[2].name, "z");
    t = lorasync_image_find(image, "b");
    REQUIRE(t == &image->tensors[1]);
    CHECK_EQ(t->dtype, LORASYNC_BF16);
    CHECK_EQ(t->ndim, 2);
    CHECK_EQ(t->shape[0], 2);
    CHECK_EQ(t->shape[1], 1);
    CHECK_EQ(t->offset, 8);
    CHECK_EQ(t->num_bytes, 4);
    CHECK((const unsigned char *)t->data == f.bytes + image->header_bytes + 8);
    CHECK(lorasync_image_find(image, "a\"\xc3\xa9") == &image->tensors[0]);
    CHECK(lorasync_image_find(image, "") == NULL);
    CHECK(lorasync_image_find(image, "bb") == NULL);
    CHECK_TEXT(lorasync_image_metadata(image, "format"), "pt");
    CHECK_TEXT(lorasync_image_metadata(image, "a\xc3\xa9"), "x\ny");
    CHECK(lorasync_image_metadata(image, "b") == NULL);
    CHECK_TEXT(image->adapter, "policy");
    CHECK_EQ(image->version, 7);
    CHECK_EQ(image->digest, 255);
    CHECK_EQ(image->has_digest, 1);
    CHECK(image->tensor_digests == NULL);
    CHECK_TEXT(image->config_json, "");
    CHECK_EQ(lorasync_image_verify(image, &err), LORASYNC_E_DIGEST);
    CHECK_HAS(err.text, "00000000000000ff");
    CHECK_HAS(err.text, "policy");
    lorasync_image_stamp(image, 9, 9); /* not a layout: nothing happens */
    CHECK_EQ(image->version, 7);
    lorasync_image_free(image);
    free(f.bytes);

    f = make("{}", 0);
    REQUIRE(lorasync_image_parse(f.bytes, f.num_bytes, NULL, &image, &err) == LORASYNC_OK);
    CHECK_TEXT(image->adapter, "");
    CHECK_EQ(image->version, 0);
    CHECK_EQ(image->has_digest, 0);
    CHECK(lorasync_image_find(image, "x") == NULL);
    CHECK(lorasync_image_metadata(image, "format") == NULL);
    CHECK_EQ(lorasync_image_verify(image, &err), LORASYNC_E_FORMAT);
    lorasync_image_free(image);
    free(f.bytes);
    lorasync_image_free(NULL);
}

/* -- layout */

static lorasync_tensor tensor(const char *name, lorasync_dtype dtype, int ndim, int64_t a, int64_t b)
{
    lorasync_tensor t;
    memset(&t, 0, sizeof t);
    t.name     = name;
    t.dtype    = dtype;
    t.ndim     = ndim;
    t.shape[0] = a;
    t.shape[1] = b;
    return t;
}

static lorasync_status layout(const lorasync_tensor *tensors, size_t num, const char *adapter, lorasync_image **out,
                              lorasync_error *err)
{
    lorasync_image_desc d;
    memset(&d, 0, sizeof d);
    d.tensors     = tensors;
    d.num_tensors = num;
    d.adapter     = adapter;
    return lorasync_image_layout(&d, NULL, out, err);
}

/* The published golden file, byte by byte. */
static void golden(void)
{
    static const char json[] =
        "{\"__metadata__\":{\"format\":\"pt\"},\"a.lora_A.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],"
        "\"data_offsets\":[0,8]},\"b.lora_B.weight\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[8,12]},"
        "\"c\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[12,12]}}    ";
    static const unsigned char payload[] = {0x00, 0x00, 0x80, 0x3f, 0x00, 0x00, 0x00, 0x40, 0x80, 0x3f, 0x00, 0x40};
    lorasync_tensor            tensors[3];
    lorasync_image            *image = NULL;
    lorasync_error             err;
    const unsigned char       *h;
    tensors[0] = tensor("c", LORASYNC_BF16, 1, 0, 0);
    tensors[1] = tensor("b.lora_B.weight", LORASYNC_BF16, 2, 2, 1);
    tensors[2] = tensor("a.lora_A.weight", LORASYNC_F32, 2, 1, 2);
    REQUIRE(layout(tensors, 3, NULL, &image, &err) == LORASYNC_OK);
    h = (const unsigned char *)image->header;
    CHECK_EQ(image->header_bytes, 240);
    CHECK_EQ(image->payload_bytes, 12);
    CHECK_EQ(h[0], 0xe8);
    CHECK_EQ(lorasynci_load_le64(h, 8), 0xe8);
    CHECK_EQ(sizeof json - 1, 0xe8);
    CHECK(memcmp(h + 8, json, sizeof json - 1) == 0);
    CHECK(image->payload == NULL);
    CHECK(image->tensors[0].data == NULL);
    lorasync_image_bind(image, payload);
    CHECK(image->payload == payload);
    CHECK(image->tensors[1].data == payload + 8);
    CHECK_TEXT(image->tensors[0].name, "a.lora_A.weight");
    CHECK(image->tensors[0].name != tensors[2].name); /* its own copy */
    CHECK_TEXT(image->tensors[2].name, "c");
    CHECK_TEXT(image->adapter, "");
    CHECK_EQ(image->has_digest, 0);
    lorasync_image_stamp(image, 3, 4); /* no adapter: no place for it */
    CHECK(memcmp(h + 8, json, sizeof json - 1) == 0);
    lorasync_image_bind(image, NULL);
    CHECK(image->tensors[1].data == NULL);
    lorasync_image_free(image);
}

static void order_and_escapes(void)
{
    lorasync_tensor tensors[22], more[3];
    char            names[22][32];
    lorasync_image *image = NULL;
    lorasync_error  err;
    size_t          i;
    for (i = 0; i < 22; i++) {
        snprintf(names[i], sizeof names[i], "t%02d", (int)(i * 7 % 22));
        tensors[i] = tensor(names[i], (lorasync_dtype)(i + 1), 1, 8, 0);
    }
    REQUIRE(layout(tensors, 22, NULL, &image, &err) == LORASYNC_OK);
    for (i = 0; i < 22; i++) CHECK_EQ(image->tensors[i].dtype, 22 - i);
    CHECK_EQ(image->payload_bytes, 4 + 6 + 6 + 8 * 8 + 4 * 16 + 3 * 32 + 4 * 64);
    lorasync_image_free(image);

    more[0] = tensor("Z", LORASYNC_F32, 0, 0, 0);
    more[1] = tensor("\xc3\xa9\"\\/", LORASYNC_F32, 0, 0, 0);
    more[2] = tensor("a", LORASYNC_F32, 0, 0, 0);
    REQUIRE(layout(more, 3, "ad\"\n", &image, &err) == LORASYNC_OK);
    CHECK_TEXT(image->tensors[0].name, "Z");
    CHECK_TEXT(image->tensors[1].name, "a");
    CHECK_TEXT(image->tensors[2].name, "\xc3\xa9\"\\/");
    CHECK_HAS((const char *)image->header + 8,
              "\"\xc3\xa9\\\"\\\\/\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[8,12]}");
    CHECK_HAS((const char *)image->header + 8, "\"lorasync.adapter\":\"ad\\\"\\n\"");
    CHECK_TEXT(image->adapter, "ad\"\n");
    CHECK(lorasync_image_find(image, "\xc3\xa9\"\\/") == &image->tensors[2]);
    lorasync_image_free(image);

    REQUIRE(layout(NULL, 0, NULL, &image, &err) == LORASYNC_OK);
    CHECK_EQ(image->num_tensors, 0);
    CHECK_EQ(image->payload_bytes, 0);
    CHECK_EQ(image->header_bytes, 40);
    lorasync_image_free(image);
}

static void layout_errors(void)
{
    lorasync_tensor t[2];
    lorasync_image *image;
    lorasync_error  err;
    int             i;
#define LAYOUT_FAILS(num, status, part)                                                                                \
    do {                                                                                                               \
        image = (lorasync_image *)&err;                                                                                \
        CHECK_EQ(layout(t, num, NULL, &image, &err), status);                                                          \
        CHECK(image == NULL);                                                                                          \
        CHECK_HAS(err.text, part);                                                                                     \
    } while (0)
    t[0] = t[1] = tensor("same", LORASYNC_F32, 1, 2, 0);
    LAYOUT_FAILS(2, LORASYNC_E_NAME, "\"same\" occurs twice");
    t[1].dtype = LORASYNC_F16; /* not neighbours in the writer's order */
    LAYOUT_FAILS(2, LORASYNC_E_NAME, "\"same\" occurs twice");
    t[0].name = "";
    LAYOUT_FAILS(1, LORASYNC_E_NAME, "tensor 0 has no name");
    t[0].name = NULL;
    LAYOUT_FAILS(1, LORASYNC_E_NAME, "tensor 0 has no name");
    t[0].name = "\xff";
    LAYOUT_FAILS(1, LORASYNC_E_NAME, "UTF-8");
    t[0].name = "a\nb";
    LAYOUT_FAILS(1, LORASYNC_E_NAME, "control");
    t[0].name = "__metadata__";
    LAYOUT_FAILS(1, LORASYNC_E_NAME, "reserves");
    t[0] = tensor("x", LORASYNC_DTYPE_NONE, 1, 2, 0);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "\"x\"");
    t[0] = tensor("x", (lorasync_dtype)23, 1, 2, 0);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "23 is no dtype");
    t[0] = tensor("x", LORASYNC_F32, 9, 2, 0);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "9 dimensions");
    t[0] = tensor("x", LORASYNC_F32, -1, 2, 0);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "-1 dimensions");
    t[0] = tensor("x", LORASYNC_F32, 1, -2, 0);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "dimension 0 is -2");
    t[0] = tensor("x", LORASYNC_F32, 2, INT64_C(1) << 40, INT64_C(1) << 30);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "does not fit 64 bits");
    t[0] = tensor("x", LORASYNC_F4, 1, 3, 0);
    LAYOUT_FAILS(1, LORASYNC_E_ARGUMENT, "inside a byte");
    t[0] = tensor("x", LORASYNC_U8, 1, INT64_C(1) << 60, 0);
    t[1] = tensor("y", LORASYNC_U8, 1, INT64_C(1) << 60, 0);
    CHECK_EQ(layout(t, 2, NULL, &image, &err), LORASYNC_OK); /* each 1 EiB: a layout has no payload */
    CHECK_EQ(image->payload_bytes, (size_t)1 << 61);
    lorasync_image_free(image);
    {
        lorasync_tensor     big[10];
        lorasync_image_desc d;
        char                names[10][16];
        for (i = 0; i < 10; i++) {
            snprintf(names[i], sizeof names[i], "n%d", i);
            big[i] = tensor(names[i], LORASYNC_U8, 1, (INT64_C(1) << 61) - 1, 0);
        }
        memset(&d, 0, sizeof d);
        d.tensors     = big;
        d.num_tensors = 10;
        d.adapter     = NULL;
        CHECK_EQ(lorasync_image_layout(&d, NULL, &image, &err), LORASYNC_E_ARGUMENT);
        CHECK_HAS(err.text, "do not fit in memory");
        d.num_tensors = 1;
        d.adapter     = "\xff";
        CHECK_EQ(lorasync_image_layout(&d, NULL, &image, &err), LORASYNC_E_NAME);
        d.adapter = NULL;
        {
            lorasync_allocator half;
            memset(&half, 0, sizeof half);
            half.alloc = test_memory_alloc;
            CHECK_EQ(lorasync_image_layout(&d, &half, &image, &err), LORASYNC_E_ARGUMENT);
            CHECK_EQ(lorasync_image_parse("", 0, &half, &image, &err), LORASYNC_E_ARGUMENT);
        }
    }
}

/* One tensor whose name alone is over the limit. */
static void header_too_large(void)
{
    size_t          n    = 100000000;
    char           *name = (char *)malloc(n + 1);
    lorasync_tensor t;
    lorasync_image *image;
    lorasync_error  err;
    REQUIRE(name != NULL);
    memset(name, 'n', n);
    name[n] = 0;
    t       = tensor(name, LORASYNC_U8, 1, 1, 0);
    CHECK_EQ(layout(&t, 1, NULL, &image, &err), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "100000000");
    free(name);
}

static void stamps_and_moves(void)
{
    lorasync_tensor t = tensor("w", LORASYNC_F32, 1, 2, 0);
    unsigned char   buffer[512];
    lorasync_image *image = NULL, *read = NULL;
    lorasync_error  err;
    uint64_t        digest;
    float           values[2] = {1.0f, -2.0f};
    REQUIRE(layout(&t, 1, "policy", &image, &err) == LORASYNC_OK);
    CHECK_TEXT(image->adapter, "policy");
    CHECK_EQ(image->version, 0);
    CHECK_EQ(image->has_digest, 0);
    CHECK_HAS(
        (const char *)image->header + 8,
        "{\"__metadata__\":{\"format\":\"pt\",\"lorasync.adapter\":\"policy\",\"lorasync.digest\":\"0000000000000000\","
        "\"lorasync.version\":\"00000000000000000000\"},\"w\":{\"dtype\":\"F32\"");
    CHECK_EQ(lorasync_image_verify(image, &err), LORASYNC_E_FORMAT);
    lorasync_image_stamp(image, 12, UINT64_C(0x0123456789abcdef));
    CHECK_HAS((const char *)image->header + 8,
              "\"lorasync.digest\":\"0123456789abcdef\",\"lorasync.version\":\"00000000000000000012\"}");
    CHECK_EQ(image->version, 12);
    CHECK_EQ(image->has_digest, 1);
    CHECK_EQ(lorasync_image_verify(image, &err), LORASYNC_E_STATE);

    REQUIRE(image->header_bytes + image->payload_bytes <= sizeof buffer);
    lorasynci_image_move_header(image, buffer);
    CHECK(image->header == buffer);
    memcpy(buffer + image->header_bytes, values, sizeof values);
    lorasync_image_bind(image, buffer + image->header_bytes);
    digest = lorasync_image_digest(image, NULL);
    lorasync_image_stamp(image, UINT64_MAX, digest);
    CHECK_HAS((const char *)buffer + 8, "\"lorasync.version\":\"18446744073709551615\"");
    CHECK_EQ(lorasync_image_verify(image, &err), LORASYNC_OK);
    REQUIRE(lorasync_image_parse(buffer, image->header_bytes + image->payload_bytes, NULL, &read, &err) == LORASYNC_OK);
    CHECK_TEXT(read->adapter, "policy");
    CHECK(read->version == UINT64_MAX);
    CHECK(read->digest == digest);
    CHECK_EQ(lorasync_image_verify(read, &err), LORASYNC_OK);
    buffer[image->header_bytes] ^= 1;
    CHECK_EQ(lorasync_image_verify(read, &err), LORASYNC_E_DIGEST);
    lorasynci_image_own_config(read, lorasynci_copy_text(&((lorasynci_image_impl *)read)->a, "{}", 2));
    CHECK_TEXT(read->config_json, "{}");
    lorasync_image_free(read);
    lorasync_image_free(image);
    CHECK_EQ(buffer[8], '{'); /* the moved header is still the caller's */
}

/* -- random layouts against a parse of them */

static void random_layouts(void)
{
    unsigned long long state = 11;
    int                round;
    for (round = 0; round < 300; round++) {
        lorasync_tensor tensors[40];
        char            names[40][24];
        size_t          num   = test_random(&state) % 40, i;
        lorasync_image *image = NULL, *read = NULL;
        lorasync_error  err;
        unsigned char  *bytes;
        for (i = 0; i < num; i++) {
            int d;
            snprintf(names[i], sizeof names[i], "%c%c.%d", (char)('!' + (int)(test_random(&state) % 90)),
                     (char)('!' + (int)(test_random(&state) % 90)), (int)i);
            tensors[i] =
                tensor(names[i], (lorasync_dtype)(1 + test_random(&state) % 22), (int)(test_random(&state) % 9), 0, 0);
            for (d = 0; d < tensors[i].ndim; d++) tensors[i].shape[d] = (int64_t)(test_random(&state) % 3);
            if (tensors[i].ndim) tensors[i].shape[0] *= 4; /* packed types fill bytes */
            else if (lorasync_dtype_bits(tensors[i].dtype) < 8) tensors[i].dtype = LORASYNC_I16;
        }
        REQUIRE(layout(tensors, num, round % 2 ? "a" : NULL, &image, &err) == LORASYNC_OK);
        bytes = (unsigned char *)calloc(image->header_bytes + image->payload_bytes, 1);
        memcpy(bytes, image->header, image->header_bytes);
        CHECK_EQ(image->header_bytes % 8, 0);
        REQUIRE(lorasync_image_parse(bytes, image->header_bytes + image->payload_bytes, NULL, &read, &err) ==
                LORASYNC_OK);
        REQUIRE(read->num_tensors == num && image->num_tensors == num);
        for (i = 0; i < num; i++) {
            const lorasync_tensor *a = lorasync_image_find(image, names[i]), *b = lorasync_image_find(read, names[i]);
            REQUIRE(a && b);
            CHECK(a->offset == b->offset && a->num_bytes == b->num_bytes && a->dtype == b->dtype &&
                  a->dtype == tensors[i].dtype);
            CHECK_EQ(a->ndim, tensors[i].ndim);
            CHECK(memcmp(a->shape, tensors[i].shape, sizeof a->shape) == 0 || a->ndim < 2);
            CHECK(i == 0 || read->tensors[i].offset >= read->tensors[i - 1].offset);
            if (lorasync_dtype_bits(a->dtype) >= 8)
                CHECK_EQ(a->offset % (size_t)(lorasync_dtype_bits(a->dtype) / 8), 0);
        }
        CHECK(lorasync_image_digest(read, NULL) != 0 || num == 0);
        lorasync_image_free(image);
        lorasync_image_free(read);
        free(bytes);
    }
}

/* -- memory */

static void allocation_failures(void)
{
    static const char text[] = "{\"__metadata__\":{\"format\":\"pt\"}," T("b", "BF16", "[2,1]", "[8,12]") "," T(
        "a", "F32", "[1,2]", "[0,8]") "}";
    file                f = make(text, 12);
    test_memory         memory;
    lorasync_allocator  a;
    lorasync_image_desc d;
    lorasync_tensor     tensors[2];
    lorasync_image     *image;
    lorasync_error      err;
    long                n;
    int                 done;
    a.alloc    = test_memory_alloc;
    a.free     = test_memory_free;
    a.user     = &memory;
    tensors[0] = tensor("b", LORASYNC_BF16, 2, 2, 1);
    tensors[1] = tensor("a", LORASYNC_F32, 2, 1, 2);
    memset(&d, 0, sizeof d);
    d.tensors     = tensors;
    d.num_tensors = 2;
    d.adapter     = "x";
    for (n = 1, done = 0; !done; n++) {
        memset(&memory, 0, sizeof memory);
        memory.fail_at = n;
        image          = (lorasync_image *)&err;
        err.status     = LORASYNC_OK;
        if (lorasync_image_parse(f.bytes, f.num_bytes, &a, &image, &err) == LORASYNC_OK) {
            done = 1;
            CHECK(memory.fail_at > 0);
            CHECK_EQ(memory.live, 6);
            lorasync_image_free(image);
        } else {
            CHECK_EQ(err.status, LORASYNC_E_MEMORY);
            CHECK(image == NULL);
        }
        CHECK_EQ(memory.live, 0);
        REQUIRE(n < 50);
    }
    CHECK(n > 5);
    for (n = 1, done = 0; !done; n++) {
        memset(&memory, 0, sizeof memory);
        memory.fail_at = n;
        image          = (lorasync_image *)&err;
        err.status     = LORASYNC_OK;
        if (lorasync_image_layout(&d, &a, &image, &err) == LORASYNC_OK) {
            done           = 1;
            memory.fail_at = 1; /* none of these allocates */
            lorasync_image_stamp(image, 1, 2);
            lorasync_image_bind(image, tensors);
            lorasync_image_digest(image, NULL);
            CHECK_EQ(memory.fail_at, 1);
            lorasync_image_free(image);
        } else {
            CHECK_EQ(err.status, LORASYNC_E_MEMORY);
            CHECK(image == NULL);
        }
        CHECK_EQ(memory.live, 0);
        REQUIRE(n < 50);
    }
    CHECK(n > 6);
    free(f.bytes);
}

/* -- digest */

static void digest_keys(void)
{
    uint64_t i;
    int      j;
    for (i = 0; i < 64; i++) {
        uint64_t x = (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
        x          = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        x          = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
        x ^= x >> 31;
        CHECK_EQ(lorasynci_digest_keys[i], (uint32_t)(x >> 32) | 1u);
        for (j = 0; j < (int)i; j++) CHECK(lorasynci_digest_keys[j] != lorasynci_digest_keys[i]);
    }
}

/* By its definition, byte by byte. */
static uint64_t digest_slowly(const unsigned char *p, size_t n, uint64_t position)
{
    uint64_t sum = 0;
    size_t   i;
    for (i = 0; i < n; i++) {
        uint64_t at = position + i, x = at / 256 + UINT64_C(0x9e3779b97f4a7c15);
        x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
        x ^= x >> 31;
        sum += ((uint64_t)p[i] << (8 * (at % 4))) * lorasynci_digest_keys[at / 4 % 64] * (x | 1u);
    }
    return sum;
}

static void digest_additive(void)
{
    unsigned char      data[5000];
    unsigned long long state = 21;
    int                round;
    size_t             i;
    for (i = 0; i < sizeof data; i++) data[i] = (unsigned char)test_random(&state);
    CHECK(lorasync_digest(data, 0, 0) == 0);
    CHECK(lorasync_digest(NULL, 0, 77) == 0);
    for (round = 0; round < 2000; round++) {
        size_t   first = test_random(&state) % 8, n = test_random(&state) % (sizeof data - 8), at = 0, cut;
        uint64_t position = round % 3 == 0   ? 0
                            : round % 3 == 1 ? test_random(&state) % 2000
                                             : test_random(&state) >> 2,
                 sum      = 0, whole;
        whole             = lorasync_digest(data + first, n, position);
        while (at < n) {
            cut = 1 + test_random(&state) % (round % 2 ? 40u : 900u);
            if (cut > n - at) cut = n - at;
            sum += lorasync_digest(data + first + at, cut, position + at);
            at += cut;
        }
        CHECK(sum == whole);
        CHECK(whole == digest_slowly(data + first, n, position));
    }
}

/* Accidents that a weak sum would miss. */
static void digest_detects(void)
{
    enum {
        N = 8192
    };
    unsigned char      data[N], changed[N];
    unsigned long long state = 22;
    uint64_t           right;
    int                round;
    size_t             i;
    for (round = 0; round < 3000; round++) {
        size_t a, b, size = (size_t)1 << (round % 3), row = 32;
        for (i = 0; i < N; i++) /* also sparse ones */
            data[i] = (unsigned char)(round % 5 ? test_random(&state) : (i % 16 == 3 ? 1 : 0));
        right = lorasync_digest(data, N, 0);
        a     = test_random(&state) % (N / size) * size;
        b     = test_random(&state) % (N / size) * size;

        memcpy(changed, data, N); /* two elements swapped */
        memcpy(changed + a, data + b, size);
        memcpy(changed + b, data + a, size);
        CHECK((memcmp(changed, data, N) == 0) == (lorasync_digest(changed, N, 0) == right));

        memcpy(changed, data, N); /* two signs flipped */
        changed[a + size - 1] ^= 0x80;
        if (a != b) changed[b + size - 1] ^= 0x80;
        CHECK(lorasync_digest(changed, N, 0) != right);

        memcpy(changed, data, N); /* one bit */
        changed[a] ^= (unsigned char)(1u << round % 8);
        CHECK(lorasync_digest(changed, N, 0) != right);

        memmove(changed, data + size, N - size); /* shifted by an element, the last repeated */
        memcpy(changed + N - size, data + N - size, size);
        CHECK(lorasync_digest(changed, N, 0) != right);

        a = a / row * row; /* rows swapped */
        b = b / row * row;
        memcpy(changed, data, N);
        memcpy(changed + a, data + b, row);
        memcpy(changed + b, data + a, row);
        CHECK((memcmp(changed, data, N) == 0) == (lorasync_digest(changed, N, 0) == right));

        a = test_random(&state) % (N / 256 - 1) * 256; /* a block stale (zero), two neighbouring blocks swapped */
        memcpy(changed, data, N);
        memset(changed + a, 0, 256);
        CHECK(lorasync_digest(changed, N, 0) != right);
        memcpy(changed, data, N);
        memcpy(changed + a, data + a + 256, 256);
        memcpy(changed + a + 256, data + a, 256);
        CHECK((memcmp(changed, data, N) == 0) == (lorasync_digest(changed, N, 0) == right));
    }
}

static uint64_t image_digest_of(const lorasync_tensor *tensors, size_t num, const void *payload, uint64_t *each)
{
    lorasync_image *image = NULL;
    lorasync_error  err;
    uint64_t        digest, again, own[8];
    if (layout(tensors, num, "a", &image, &err) != LORASYNC_OK) return 0;
    lorasync_image_bind(image, payload);
    digest = lorasync_image_digest(image, each ? each : own);
    again  = lorasync_digest_image(image->tensors, each ? each : own, num);
    CHECK(digest == again);
    CHECK(digest == lorasync_image_digest(image, NULL));
    lorasync_image_free(image);
    return digest;
}

static void digest_of_images(void)
{
    static const unsigned char zeros[256] = {0};
    unsigned char              data[64], swapped[64];
    lorasync_tensor            t[2];
    uint64_t                   each[8], d[12];
    size_t                     i, j;
    for (i = 0; i < 64; i++) data[i] = (unsigned char)(i * i + 1);
    memcpy(swapped, data + 32, 32);
    memcpy(swapped + 32, data, 32);
    t[0] = tensor("a", LORASYNC_F32, 1, 8, 0);
    t[1] = tensor("b", LORASYNC_F32, 1, 8, 0);
    d[0] = image_digest_of(t, 2, data, each);
    CHECK(each[0] == lorasync_digest(data, 32, 0));
    CHECK(each[1] == lorasync_digest(data + 32, 32, 0));
    d[1]  = image_digest_of(t, 2, swapped, NULL);
    d[2]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_F32, 2, 8, 1);
    d[3]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_F32, 2, 1, 8);
    d[4]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_I32, 1, 8, 0);
    d[5]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("c", LORASYNC_F32, 1, 8, 0);
    d[6]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_F32, 1, 16, 0);
    d[7]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_F32, 1, 0, 0);
    d[8]  = image_digest_of(t, 2, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_F32, 2, 0, 0);
    d[9]  = image_digest_of(t, 2, zeros, NULL);
    d[10] = image_digest_of(t, 1, zeros, NULL);
    t[1]  = tensor("b", LORASYNC_F32, 0, 0, 0);
    d[11] = image_digest_of(t, 2, zeros, NULL);
    for (i = 0; i < 12; i++)
        for (j = 0; j < i; j++) CHECK(d[i] != d[j]);
}

/* Digests are in published files: they must never change. */
static void digest_is_fixed(void)
{
    unsigned char   data[1000];
    lorasync_tensor t[2];
    size_t          i;
    for (i = 0; i < sizeof data; i++) data[i] = (unsigned char)(i * 31 + 7);
    t[0] = tensor("a", LORASYNC_F32, 2, 5, 20);
    t[1] = tensor("b", LORASYNC_BF16, 1, 300, 0);
    CHECK(lorasync_digest(data, 1000, 0) == UINT64_C(0xda65b458ec8a22a2));
    CHECK(image_digest_of(t, 2, data, NULL) == UINT64_C(0x6f1a63a1f77c1178));
}

/* -- hostile input */

/* Whatever is accepted covers its payload exactly and can be found. */
static void check_accepted(const lorasync_image *image, const unsigned char *bytes, size_t num_bytes)
{
    size_t i, running = 0;
    CHECK_EQ(image->header_bytes + image->payload_bytes, num_bytes);
    for (i = 0; i < image->num_tensors; i++) {
        const lorasync_tensor *t    = &image->tensors[i];
        size_t                 bits = (size_t)lorasync_dtype_bits(t->dtype);
        int                    d;
        CHECK(bits > 0);
        CHECK(t->ndim >= 0 && t->ndim <= LORASYNC_MAX_DIMS);
        for (d = 0; d < t->ndim; d++) bits *= (size_t)t->shape[d];
        CHECK_EQ(bits, t->num_bytes * 8);
        CHECK_EQ(t->offset, running);
        CHECK((const unsigned char *)t->data == bytes + image->header_bytes + t->offset);
        CHECK(lorasync_image_find(image, t->name) == t);
        running += t->num_bytes;
    }
    CHECK_EQ(running, image->payload_bytes);
}

static size_t mutate(unsigned char *p, size_t n, size_t capacity, unsigned long long *state)
{
    static const char tokens[] = "{}[]\",:\\0123456789u-. eE\x80\xff";
    size_t at = n ? (test_random(state) % 4 ? test_random(state) % n : test_random(state) % (n < 16 ? n : 16)) : 0, len;
    switch (test_random(state) % 6) {
    case 0:
        if (n) p[at] ^= (unsigned char)(1u << test_random(state) % 8);
        return n;
    case 1:
        if (n) p[at] = (unsigned char)tokens[test_random(state) % (sizeof tokens - 1)];
        return n;
    case 2: /* cut short */ return test_random(state) % 8 ? n : at;
    case 3: /* insert */
        if (n == capacity) return n;
        memmove(p + at + 1, p + at, n - at);
        p[at] = (unsigned char)tokens[test_random(state) % (sizeof tokens - 1)];
        return n + 1;
    case 4: /* remove */
        if (!n) return n;
        memmove(p + at, p + at + 1, n - at - 1);
        return n - 1;
    default: /* repeat a stretch */
        len = test_random(state) % 60;
        if (len > n - at) len = n - at;
        if (n + len > capacity) return n;
        memmove(p + at + len, p + at, n - at);
        return n + len;
    }
}

/* Mutated valid files. The length field is set right again in half of the cases, so that the rest of the reader is
   reached. */
static void mutated(void)
{
    static const char *const seeds[] = {
        "{\"__metadata__\":{\"format\":\"pt\",\"lorasync.version\":\"00000000000000000007\","
        "\"lorasync.digest\":\"0123456789abcdef\"}," T("a.lora_A.weight", "F32", "[1,2]", "[0,8]") "," T(
            "b.lora_B.weight", "BF16", "[2,1]", "[8,12]") "," T("c", "BF16", "[0]", "[12,12]") "}    ",
        "{" T("b", "F32", "[1]", "[4,8]") ",\"__metadata__\":null," T("a\\u00e9\\\"", "F4", "[2,4]",
                                                                      "[0,4]") "," T("z", "I8", "[4]", "[8,12]") "}",
        "{" T("x", "U8", "[12]", "[0,12]") "}",
    };
    unsigned long long state = 31;
    unsigned char      work[1024], *exact;
    long               round, accepted = 0, limit = 200000;
    for (round = 0; round < limit; round++) {
        const char     *text  = seeds[round % 3];
        size_t          n     = strlen(text), k, i;
        lorasync_image *image = NULL;
        lorasync_error  err;
        lorasync_status status;
        memcpy(work + 8, text, n);
        for (k = 1 + test_random(&state) % 3; k > 0; k--) n = mutate(work + 8, n, 900, &state);
        for (i = 0; i < 8; i++) work[i] = (unsigned char)((uint64_t)n >> (8 * i));
        n += 8;
        for (i = 0; i < 12; i++) work[n++] = 0;
        if (test_random(&state) % 8 == 0) n = mutate(work, n, sizeof work, &state);
        exact = (unsigned char *)malloc(n ? n : 1); /* so that a sanitizer sees a read behind the end */
        memcpy(exact, work, n);
        status = lorasync_image_parse(exact, n, NULL, &image, &err);
        if (status == LORASYNC_OK) {
            accepted++;
            check_accepted(image, exact, n);
        } else {
            CHECK_EQ(status, LORASYNC_E_FORMAT);
            CHECK(image == NULL);
        }
        lorasync_image_free(image);
        free(exact);
    }
    CHECK(accepted > limit / 50);
    CHECK(accepted < limit / 2);
}

/* -- real files */

static const char *const adapters[] = {
    "bert-tiny-r4",       "distilbert-classifier-r8", "gemma3-270m-qkvo-r4", "gpt2-fan-in-fan-out-r8",
    "minilm-run-step100", "minilm-run-step200",       "minilm-run-step500",  "minilm-run-step600",
    "minilm-run-step700", "mlx-transposed-unaligned", "not-lora-unilora",    "open-calm-f16-r1",
    "opt-125m-bf16-r16",  "qwen2.5-0.5b-r8",          "tinyllama-r4"};

static char *read_adapter(const char *name, size_t *num_bytes)
{
    char  path[256];
    char *bytes;
    snprintf(path, sizeof path, "adapters/%s/adapter_model.safetensors", name);
    bytes = test_read(test_path(path), num_bytes);
    if (bytes) return bytes;
    snprintf(path, sizeof path, "adapters/%s/0000100_adapters.safetensors", name);
    return test_read(test_path(path), num_bytes);
}

/* Rewriting the tensors of a file by the reference library gives the same bytes. */
static int rewrite(const lorasync_image *image)
{
    lorasync_image *again = NULL;
    lorasync_error  err;
    int             same;
    if (layout(image->tensors, image->num_tensors, NULL, &again, &err) != LORASYNC_OK) return 0;
    same = again->header_bytes == image->header_bytes &&
           memcmp(again->header, image->header, image->header_bytes) == 0 &&
           again->payload_bytes == image->payload_bytes;
    lorasync_image_free(again);
    return same;
}

static void real_files(void)
{
    size_t i, num_same = 0;
    for (i = 0; i < sizeof adapters / sizeof adapters[0]; i++) {
        size_t          num_bytes = 0;
        char           *bytes     = read_adapter(adapters[i], &num_bytes);
        lorasync_image *image     = NULL;
        lorasync_error  err;
        const char     *format;
        if (!bytes) {
            test_fail(__FILE__, __LINE__, adapters[i]);
            continue;
        }
        err.text[0] = 0;
        if (lorasync_image_parse(bytes, num_bytes, NULL, &image, &err) != LORASYNC_OK) {
            fprintf(stderr, "%s: %s\n", adapters[i], err.text);
            test_fail(__FILE__, __LINE__, adapters[i]);
        } else {
            check_accepted(image, (const unsigned char *)bytes, num_bytes);
            CHECK(image->num_tensors > 0);
            format = lorasync_image_metadata(image, "format");
            if (format && strcmp(format, "pt") == 0) {
                num_same++;
                if (!rewrite(image))
                    fprintf(stderr, "%s: rewritten differently\n", adapters[i]),
                        test_fail(__FILE__, __LINE__, adapters[i]);
            }
        }
        lorasync_image_free(image);
        free(bytes);
    }
    CHECK(num_same >= 13);
}

/* Every byte at every place of names of every length, against the plain loop. */
static void control_characters(void)
{
    char   text[24];
    size_t n, at, i;
    int    c, wrong = 0;
    for (n = 1; n < sizeof text; n++)
        for (at = 0; at < n; at++)
            for (c = 1; c < 256; c++) {
                int expected = 0;
                memset(text, 'a' + (int)(n % 20), n);
                text[n]  = 0;
                text[at] = (char)c;
                if (at && c % 3 == 0) text[at - 1] = (char)0xc3;
                for (i = 0; i < n; i++) expected |= (unsigned char)text[i] < 0x20 || text[i] == 0x7f;
                wrong += lorasynci_has_control(text) != expected;
            }
    CHECK_EQ(wrong, 0);
}

int main(void)
{
    RUN(control_characters);
    RUN(accepts);
    RUN(refuses);
    RUN(refuses_forms);
    RUN(many_overlapping);
    RUN(reads);
    RUN(golden);
    RUN(order_and_escapes);
    RUN(layout_errors);
    RUN(header_too_large);
    RUN(stamps_and_moves);
    RUN(random_layouts);
    RUN(allocation_failures);
    RUN(digest_keys);
    RUN_BOTH_WAYS(digest_additive);
    RUN_BOTH_WAYS(digest_detects);
    RUN_BOTH_WAYS(digest_of_images);
    RUN_BOTH_WAYS(digest_is_fixed);
    RUN(mutated);
    RUN_ON_DATA("adapters", real_files);
    return test_summary("test_image");
}
