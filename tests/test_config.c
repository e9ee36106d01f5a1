/* The rooms json and config: the strict reader, the writer in Python's form, and adapter_config.json read, checked and
   written. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include "test.h"
#include <locale.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static lorasync_error     err;
static unsigned long long seed = 1;

/* -- json: helpers */

static lorasync_allocator plain_allocator(void)
{
    lorasync_allocator a;
    lorasynci_take_allocator(NULL, &a, NULL);
    return a;
}

/* Reads one value and the end of the text. */
static lorasync_status validate(const char *text, size_t n)
{
    lorasynci_json  j;
    lorasync_status status;
    lorasynci_json_init(&j, text, n, &err);
    status = lorasynci_json_skip(&j);
    return status < 0 ? status : lorasynci_json_end(&j);
}

/* The text in Python's form, in b (emptied first); NUL-terminated. */
static lorasync_status python_form(lorasynci_buffer *b, const char *text, size_t n)
{
    lorasynci_json  j;
    lorasync_status status;
    b->size = 0;
    lorasynci_json_init(&j, text, n, &err);
    status = lorasynci_json_put_python(b, &j, 0);
    if (status >= 0) status = lorasynci_json_end(&j);
    lorasynci_put(b, "", 1);
    return b->failed ? LORASYNC_E_MEMORY : status;
}

/* -- json: reading */

static void json_accepts(void)
{
    static const char *const good[] = {"{}",
                                       " { } ",
                                       "[]",
                                       "[ ]",
                                       "\t\n\r [1]\n",
                                       "null",
                                       "true",
                                       "false",
                                       "\"\"",
                                       "0",
                                       "-0",
                                       "-1",
                                       "10",
                                       "1.5",
                                       "1e5",
                                       "1E+5",
                                       "1e-05",
                                       "-0.0e-0",
                                       "[1,2,[3,{}],\"x\"]",
                                       "{\"a\":1,\"b\":[true,false,null]}",
                                       "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\"",
                                       "\"\\ud83d\\ude00\"",
                                       "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\x7f\"",
                                       "123456789012345678901234567890",
                                       "{\"a\":{\"a\":{\"a\":[[[]]]}}}"};
    size_t                   i;
    for (i = 0; i < COUNT(good); i++) {
        if (validate(good[i], strlen(good[i])) != LORASYNC_OK) fprintf(stderr, "%s: %s\n", good[i], err.text);
        CHECK_EQ(validate(good[i], strlen(good[i])), LORASYNC_OK);
    }
}

static void json_refuses(void)
{
    static const struct {
        const char *text, *why;
        int         at;
    } bad[] = {{"", "expected a value; found the end", 0},
               {"{", "expected a key", 1},
               {"[", "expected a value", 1},
               {"[1", "expected `,` or `]`", 2},
               {"[1,]", "expected a value", 3},
               {"[,1]", "expected a value", 1},
               {"[1 2]", "expected `,` or `]`; found `2`", 3},
               {"{\"a\"}", "expected `:`", 4},
               {"{\"a\":}", "expected a value", 5},
               {"{\"a\":1,}", "expected a key", 7},
               {"{a:1}", "expected a key", 1},
               {"{,}", "expected a key", 1},
               {"{'a':1}", "found `'`", 1},
               {"{\"a\":1 \"b\":2}", "expected `,`", 7},
               {"]", "expected a value", 0},
               {"[1]]", "nothing may follow", 3},
               {"1 2", "nothing may follow", 2},
               {"tru", "expected true", 0},
               {"nul", "expected null", 0},
               {"falsy", "expected false", 0},
               {"True", "expected a value", 0},
               {"truex", "nothing may follow", 4},
               {"01", "may not begin with 0", 0},
               {"-01", "may not begin with 0", 1},
               {"+1", "expected a value", 0},
               {"-", "expected a number", 1},
               {".5", "expected a value", 0},
               {"1.", "after the point", 2},
               {"1.e5", "after the point", 2},
               {"1e", "in the exponent", 2},
               {"1e+", "in the exponent", 3},
               {"0x10", "nothing may follow", 1},
               {"NaN", "NaN and Infinity", 0},
               {"Infinity", "NaN and Infinity", 0},
               {"-Infinity", "NaN and Infinity", 0},
               {"[NaN]", "NaN and Infinity", 1},
               {"\"", "not closed", 1},
               {"\"abc", "not closed", 4},
               {"\"a\nb\"", "found byte 0x0a", 2},
               {"\"12345678\n\"", "control characters", 9},
               {"\"\\\"", "not closed", 3},
               {"\"\\", "backslash", 2},
               {"\"\\x41\"", "backslash", 2},
               {"\"\\u12\"", "four hex digits", 3},
               {"\"\\u12g4\"", "four hex digits", 3},
               {"\"\\ud800\"", "surrogate", 3},
               {"\"\\ud800x\"", "surrogate", 3},
               {"\"\\ud800\\u0041\"", "surrogate", 3},
               {"\"\\udc00\"", "surrogate", 3},
               {"\"\\ude00\\ud83d\"", "surrogate", 3},
               {"\"\\ud83d\\udbff\"", "surrogate", 3},
               {"\"\\ud83d\\ue000\"", "surrogate", 3},
               {"\"\\u0000\"", "\\u0000 is not accepted", 3},
               {"\"\x80\"", "not valid UTF-8", 1},
               {"\"\xc0\x80\"", "not valid UTF-8", 1},
               {"\"\xed\xa0\x80\"", "not valid UTF-8", 1},
               {"\"\xf4\x90\x80\x80\"", "UTF-8", 1},
               {"\"\xe2\x82\"", "UTF-8", 1},
               {"// x\n1", "expected a value", 0},
               {"\xef\xbb\xbf{}", "found byte 0xef", 0},
               {"[1,\n 2,\n  x]", "(line 3, column 3)", 10}};
    size_t i;
    int    c, place;
    for (c = 1; c <= 0x20; c++) { /* every control character, wherever it is in a word of 8 bytes; a space is none */
        for (place = 1; place <= 24; place++) {
            char text[28];
            memset(text, 'a', sizeof text);
            text[0] = text[26] = '"', text[27] = 0, text[place] = (char)c;
            memset(&err, 0, sizeof err);
            CHECK_EQ(validate(text, strlen(text)), c < 0x20 ? LORASYNC_E_FORMAT : LORASYNC_OK);
            if (c < 0x20) CHECK_HAS(err.text, "control characters");
        }
    }
    for (i = 0; i < COUNT(bad); i++) {
        char at[32];
        memset(&err, 0, sizeof err);
        CHECK_EQ(validate(bad[i].text, strlen(bad[i].text)), LORASYNC_E_FORMAT);
        CHECK_HAS(err.text, bad[i].why);
        snprintf(at, sizeof at, "at byte %d (", bad[i].at);
        if (bad[i].at) CHECK_HAS(err.text, at);
    }
    CHECK_EQ(validate("\"a\0b\"", 5), LORASYNC_E_FORMAT); /* a NUL inside */
    CHECK_EQ(validate("1\0", 2), LORASYNC_E_FORMAT);
    CHECK_EQ(validate("{}x", 2), LORASYNC_OK); /* nothing is read behind the end */
    CHECK_EQ(validate("12", 1), LORASYNC_OK);
    CHECK_EQ(validate("true", 3), LORASYNC_E_FORMAT);
}

static void json_depth(void)
{
    char text[70];
    int  n;
    for (n = 1; n <= 34; n++) {
        memset(text, '[', (size_t)n);
        memset(text + n, ']', (size_t)n);
        CHECK_EQ(validate(text, 2 * (size_t)n), n <= 32 ? LORASYNC_OK : LORASYNC_E_FORMAT);
    }
    CHECK_HAS(err.text, "deeper than 32");
}

/* Every cut of a good text is refused, and so is nothing else than the reader says: no crash on any change of one
   byte. */
static void json_cuts(void)
{
    static const char text[] =
        "{\"a\\u00e9\":[1,-2.5e-3,true,{\"\xc3\xa9\":null}],\"long enough for eight\":\"\\ud83d\\ude00\"}";
    size_t n = sizeof text - 1, i;
    int    c;
    for (i = 0; i < n; i++) {
        char *copy = (char *)malloc(i + 1); /* exact size: a sanitizer sees any read behind it */
        memcpy(copy, text, i);
        CHECK_EQ(validate(copy, i), LORASYNC_E_FORMAT);
        free(copy);
    }
    for (i = 0; i < n; i++) {
        char *copy = (char *)malloc(n);
        for (c = 0; c < 256; c++) {
            lorasynci_buffer   b;
            lorasync_allocator a = plain_allocator();
            memcpy(copy, text, n);
            copy[i] = (char)(unsigned char)c;
            lorasynci_buffer_init(&b, &a);
            if (validate(copy, n) == LORASYNC_OK)
                CHECK(python_form(&b, copy, n) == LORASYNC_OK || strstr(err.text, "twice") != NULL);
            else CHECK(python_form(&b, copy, n) == LORASYNC_E_FORMAT);
            lorasynci_buffer_free(&b);
        }
        free(copy);
    }
}

/* The scan eight bytes at a time against one byte at a time. */
static void json_plain(void)
{
    char   text[64];
    size_t n, at, c;
    for (n = 0; n < 24; n++)
        for (at = 0; at < n; at++)
            for (c = 0; c < 256; c++) {
                const char *expected;
                memset(text, 'a', sizeof text);
                text[at] = (char)(unsigned char)c;
                if (at + 3 < n) text[at + 3] = '"';
                for (expected = text; expected < text + n; expected++)
                    if ((unsigned char)*expected < 32 || (unsigned char)*expected > 127 || *expected == '"' ||
                        *expected == '\\')
                        break;
                CHECK(lorasynci_json_plain(text, text + n) == expected);
            }
}

/* UTF-8 by the book: decode, then refuse what is overlong, a surrogate or too large. */
static size_t utf8_reference(const unsigned char *p, size_t n)
{
    static const long least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t            size    = p[0] >= 0xF0 && p[0] < 0xF8   ? 4
                                : p[0] >= 0xE0 && p[0] < 0xF0 ? 3
                                : p[0] >= 0xC0 && p[0] < 0xE0 ? 2
                                                              : 0,
           i;
    long c = p[0] & (0x7F >> size);
    if (!size || size > n) return 0;
    for (i = 1; i < size; i++) {
        if ((p[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (p[i] & 0x3F);
    }
    return c >= least[size] && c <= 0x10FFFF && !(c >= 0xD800 && c <= 0xDFFF) ? size : 0;
}

static void json_utf8(void)
{
    unsigned char p[4];
    int           a, b, c;
    long          code;
    for (a = 0x80; a < 256; a++)
        for (b = 0; b < 256; b++)
            for (c = 0; c < 256; c += (c > 0x7c && c < 0xc2 ? 1 : 13)) {
                size_t n;
                p[0] = (unsigned char)a, p[1] = (unsigned char)b, p[2] = (unsigned char)c,
                p[3] = (unsigned char)(c ^ 0x15);
                for (n = 1; n <= 4; n++) CHECK_EQ(lorasynci_utf8((char *)p, (char *)p + n), utf8_reference(p, n));
            }
    for (code = 0x80; code <= 0x10FFFF; code++) { /* every character, written and read back */
        size_t n = lorasynci_put_utf8(code, (char *)p);
        CHECK_EQ(utf8_reference(p, 4), code >= 0xD800 && code <= 0xDFFF ? 0 : n);
    }
}

static void json_strings(void)
{
    static const struct {
        const char *json, *text;
        int         escaped;
    } s[]                = {{"\"\"", "", 0},
                            {"\"plain\"", "plain", 0},
                            {"\"\xc3\xa9\"", "\xc3\xa9", 0},
                            {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", 1},
                            {"\"\\u0041\\u00e9\\u20AC\\ud83d\\ude00z\"", "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z", 1},
                            {"\"\\uDBFF\\uDFFF\\uD800\\uDC00\"", "\xf4\x8f\xbf\xbf\xf0\x90\x80\x80", 1},
                            {"\"\\u0001\\u001f\\u007f\\u0080\\u07ff\\u0800\\uffff\"",
                             "\x01\x1f\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xef\xbf\xbf", 1}};
    lorasync_allocator a = plain_allocator();
    size_t             i;
    for (i = 0; i < COUNT(s); i++) {
        lorasynci_json  j;
        lorasynci_slice slice;
        char           *copy;
        lorasynci_json_init(&j, s[i].json, strlen(s[i].json), &err);
        REQUIRE(lorasynci_json_string(&j, &slice) == LORASYNC_OK);
        CHECK_EQ(slice.escaped, s[i].escaped);
        CHECK(lorasynci_json_is(&slice, s[i].text));
        CHECK(!lorasynci_json_is(&slice, "other"));
        copy = lorasynci_json_copy(&slice, &a);
        CHECK_TEXT(copy, s[i].text);
        lorasynci_dealloc(&a, copy);
        CHECK_EQ(lorasynci_json_end(&j), LORASYNC_OK);
    }
}

static void json_integers(void)
{
    static const struct {
        const char *text;
        int         ok;
        uint64_t    value;
    } u[] = {{"0", 1, 0},
             {" 7 ", 1, 7},
             {"18446744073709551615", 1, UINT64_MAX},
             {"18446744073709551616", 0, 0},
             {"99999999999999999999", 0, 0},
             {"184467440737095516150", 0, 0},
             {"-1", 0, 0},
             {"-0", 0, 0},
             {"1.0", 0, 0},
             {"1e3", 0, 0},
             {"01", 0, 0},
             {"00", 0, 0},
             {"", 0, 0},
             {"\"1\"", 0, 0},
             {"true", 0, 0},
             {"+1", 0, 0},
             {"10000000000000000000", 1, UINT64_C(10000000000000000000)}};
    static const struct {
        const char *text;
        int         ok;
        int64_t     value;
    } s[] = {{"0", 1, 0},
             {"-0", 1, 0},
             {"-1", 1, -1},
             {"9223372036854775807", 1, INT64_MAX},
             {"9223372036854775808", 0, 0},
             {"-9223372036854775808", 1, INT64_MIN},
             {"-9223372036854775809", 0, 0},
             {"-", 0, 0},
             {"--1", 0, 0},
             {"- 1", 0, 0},
             {"1.5", 0, 0}};
    size_t i;
    for (i = 0; i < COUNT(u); i++) {
        lorasynci_json j;
        uint64_t       value = 1234;
        lorasynci_json_init(&j, u[i].text, strlen(u[i].text), &err);
        CHECK_EQ(lorasynci_json_uint(&j, &value), u[i].ok ? LORASYNC_OK : LORASYNC_E_FORMAT);
        CHECK(value == (u[i].ok ? u[i].value : 1234));
    }
    for (i = 0; i < COUNT(s); i++) {
        lorasynci_json j;
        int64_t        value = 1234;
        lorasynci_json_init(&j, s[i].text, strlen(s[i].text), &err);
        CHECK_EQ(lorasynci_json_int(&j, &value), s[i].ok ? LORASYNC_OK : LORASYNC_E_FORMAT);
        CHECK(value == (s[i].ok ? s[i].value : 1234));
    }
}

static lorasync_status read_double(const char *text, double *out)
{
    lorasynci_json j;
    lorasynci_json_init(&j, text, strlen(text), &err);
    return lorasynci_json_double(&j, out);
}

static void check_doubles(void)
{
    static const struct {
        const char *text;
        double      value;
    } d[]                                 = {{"0", 0},
                                             {"-0.0", -0.0},
                                             {"16.0", 16},
                                             {"0.05", 0.05},
                                             {"1e-05", 1e-5},
                                             {"1.25e3", 1250},
                                             {"1E3", 1000},
                                             {"123.456e-7", 123.456e-7},
                                             {"0.1", 0.1},
                                             {"1e400e", 0},
                                             {"5e-324", 5e-324},
                                             {"1e-400", 0},
                                             {"0.000001e6", 1},
                                             {"1.7976931348623157e308", 1.7976931348623157e308},
                                             {"100000000000000000000000e-23", 1},
                                             {"9007199254740993.0", 9007199254740992.0}};
    static const char *const printed[][2] = {{"0", "0.0"},
                                             {"-0.0", "-0.0"},
                                             {"16", "16.0"},
                                             {"0.05", "0.05"},
                                             {"1e-05", "1e-05"},
                                             {"0.0001", "0.0001"},
                                             {"0.00012", "0.00012"},
                                             {"1e15", "1000000000000000.0"},
                                             {"1e16", "1e+16"},
                                             {"1.5e300", "1.5e+300"},
                                             {"12345678901234567890", "1.2345678901234567e+19"},
                                             {"0.1", "0.1"},
                                             {"-1.5", "-1.5"},
                                             {"5e-324", "5e-324"},
                                             {"1e22", "1e+22"},
                                             {"123.456", "123.456"},
                                             {"9.5367431640625e-07", "9.5367431640625e-07"},
                                             {"0.30000000000000004", "0.30000000000000004"},
                                             {"7.120236347223045e-307", "7.120236347223045e-307"},
                                             {"1.7976931348623157e308", "1.7976931348623157e+308"}};
    lorasync_allocator       a            = plain_allocator();
    lorasynci_buffer         b;
    double                   value;
    size_t                   i;
    lorasynci_buffer_init(&b, &a);
    for (i = 0; i < COUNT(d); i++) {
        if (strcmp(d[i].text, "1e400e") == 0) continue;
        CHECK_EQ(read_double(d[i].text, &value), LORASYNC_OK);
        CHECK(memcmp(&value, &d[i].value, sizeof value) == 0);
    }
    for (i = 0; i < COUNT(printed); i++) {
        CHECK_EQ(read_double(printed[i][0], &value), LORASYNC_OK);
        b.size = 0;
        lorasynci_json_put_double(&b, value);
        lorasynci_put(&b, "", 1);
        CHECK_TEXT(b.data, printed[i][1]);
    }
    CHECK_EQ(read_double("1e309", &value), LORASYNC_E_FORMAT);
    CHECK_HAS(err.text, "does not fit a double");
    CHECK_EQ(read_double("-1e999999999999999999999999", &value), LORASYNC_E_FORMAT);
    CHECK_EQ(read_double("1e-999999999999999999999999", &value), LORASYNC_OK);
    CHECK_EQ(read_double("\"1\"", &value), LORASYNC_E_FORMAT);
    for (i = 0; i < 20000; i++) { /* whatever is written is read back, bit by bit */
        uint64_t bits = test_random(&seed);
        double   x, y;
        memcpy(&x, &bits, 8);
        if (!(x - x == 0)) continue; /* NaN or infinite */
        b.size = 0;
        lorasynci_json_put_double(&b, x);
        lorasynci_put(&b, "", 1);
        CHECK_EQ(read_double(b.data, &y), LORASYNC_OK);
        CHECK(memcmp(&x, &y, 8) == 0);
    }
    lorasynci_buffer_free(&b);
}

static void json_doubles(void) { check_doubles(); }

static void json_doubles_with_comma(void)
{
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "de_DE", "it_IT.UTF-8"};
    int                      comma   = 0;
    size_t                   i;
    for (i = 0; i < COUNT(names) && !comma; i++) /* some C libraries take any name and keep the point */
        comma = setlocale(LC_ALL, names[i]) && strcmp(localeconv()->decimal_point, ",") == 0;
    if (comma) check_doubles();
    setlocale(LC_ALL, "C");
    if (!comma) SKIP("no locale with a decimal comma here (Debian: locales, with de_DE.UTF-8)");
}

/* -- json: writing */

static void json_put_strings(void)
{
    static const char  text[] = "a\"b\\c/\b\f\n\r\t\x01\x1f\x7f\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80";
    lorasync_allocator a      = plain_allocator();
    lorasynci_buffer   b;
    lorasynci_buffer_init(&b, &a);
    lorasynci_json_put_string(&b, text, strlen(text));
    lorasynci_put(&b, "", 1);
    CHECK_TEXT(b.data, "\"a\\\"b\\\\c/\\b\\f\\n\\r\\t\\u0001\\u001f\x7f\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\"");
    b.size = 0;
    lorasynci_json_put_ascii(&b, text, strlen(text));
    lorasynci_put(&b, "", 1);
    CHECK_TEXT(b.data, "\"a\\\"b\\\\c/\\b\\f\\n\\r\\t\\u0001\\u001f\\u007f\\u00e9\\u20ac\\ud83d\\ude00\"");
    lorasynci_buffer_free(&b);
}

static void json_python_form(void)
{
    static const char *const forms[][2] = {
        {"{}", "{}"},
        {"[ ]", "[]"},
        {"-0", "0"},
        {"1.50", "1.5"},
        {"1e5", "100000.0"},
        {"123456789012345678901234567890", "123456789012345678901234567890"},
        {"{\"b\":1,\"a\":[1,2.0,\"\xc3\xa9\",{}],\"c\":{\"y\":null,\"x\":[]}}",
         "{\n  \"a\": [\n    1,\n    2.0,\n    \"\\u00e9\",\n    {}\n  ],\n  \"b\": 1,\n  \"c\": {\n    \"x\": [],\n   "
         " \"y\": null\n  }\n}"},
        {"{\"\xef\xbf\xbf\":1,\"\xf0\x90\x80\x80\":2,\"a\\u0062\":3}",
         "{\n  \"ab\": 3,\n  \"\\uffff\": 1,\n  \"\\ud800\\udc00\": 2\n}"}};
    static const char *const twice[] = {"{\"a\":1,\"a\":2}", "{\"x\":[{\"a\":1,\"b\":2,\"\\u0061\":3}]}"};
    lorasync_allocator       a       = plain_allocator();
    lorasynci_buffer         b, again;
    size_t                   i;
    lorasynci_buffer_init(&b, &a);
    lorasynci_buffer_init(&again, &a);
    for (i = 0; i < COUNT(forms); i++) {
        CHECK_EQ(python_form(&b, forms[i][0], strlen(forms[i][0])), LORASYNC_OK);
        CHECK_TEXT(b.data, forms[i][1]);
        CHECK_EQ(python_form(&again, b.data, strlen(b.data)), LORASYNC_OK); /* and stays as it is */
        CHECK_TEXT(again.data, forms[i][1]);
    }
    for (i = 0; i < COUNT(twice); i++) {
        CHECK_EQ(python_form(&b, twice[i], strlen(twice[i])), LORASYNC_E_FORMAT);
        CHECK_HAS(err.text, "key \"a\" occurs twice");
    }
    CHECK_EQ(python_form(&b, "[1e999]", 7), LORASYNC_E_FORMAT);
    lorasynci_buffer_free(&b);
    lorasynci_buffer_free(&again);
}

/* -- config: helpers */

static lorasync_config *parse(const char *json)
{
    lorasync_config *c = NULL;
    memset(&err, 0, sizeof err);
    if (lorasync_config_parse(json, strlen(json), NULL, &c, &err) < 0) fprintf(stderr, "parse: %s\n", err.text);
    return c;
}

#define MAX_TENSORS 64

typedef struct tensors {
    lorasync_tensor at[MAX_TENSORS];
    char            names[MAX_TENSORS][256];
    size_t          num;
} tensors;

static tensors set; /* the set that the running test builds */

static void add(const char *module, const char *leaf, int64_t s0, int64_t s1)
{
    lorasync_tensor *t = &set.at[set.num];
    if (set.num == MAX_TENSORS) return;
    snprintf(set.names[set.num], sizeof set.names[0], "base_model.model.%s%s", module, leaf);
    memset(t, 0, sizeof *t);
    t->name     = set.names[set.num++];
    t->dtype    = LORASYNC_F32;
    t->ndim     = s1 ? 2 : 1;
    t->shape[0] = s0;
    t->shape[1] = s1;
}

static void add_pair(const char *module, int64_t r)
{
    add(module, ".lora_A.weight", r, 12);
    add(module, ".lora_B.weight", 10, r);
}

static lorasync_status check(const char *json)
{
    lorasync_config *c = parse(json);
    lorasync_status  status;
    if (!c) return LORASYNC_E_STATE;
    status = lorasync_config_check(c, set.at, set.num, &err);
    lorasync_config_free(c);
    return status;
}

#define CHECK_FAILS(call, status, part)                                                                                \
    do {                                                                                                               \
        CHECK_EQ(call, status);                                                                                        \
        CHECK_HAS(err.text, part);                                                                                     \
    } while (0)

/* -- config: reading */

static void config_defaults(void)
{
    lorasync_config            *c = parse(" {\"peft_type\": \"L\\u004fRA\"} ");
    const lorasync_config_info *i;
    REQUIRE(c);
    i = lorasync_config_view(c);
    CHECK_TEXT(i->peft_type, "LORA");
    CHECK_TEXT(i->bias, "none");
    CHECK(!i->task_type && !i->base_model && !i->target_pattern && !i->target_modules && !i->modules_to_save);
    CHECK(i->r == 8 && i->lora_alpha == 8 && !i->use_rslora && !i->use_dora && !i->lora_bias && !i->fan_in_fan_out);
    CHECK(!i->num_target_modules && !i->num_modules_to_save && !i->num_rank_patterns && !i->num_alpha_patterns);
    CHECK(lorasync_config_rank(c, "x") == 8 && lorasync_config_scale(c, "x") == 1);
    lorasync_config_free(c);
    c = parse("{\"peft_type\":\"LORA\",\"r\":null,\"lora_alpha\":null,\"bias\":null,\"use_dora\":null,"
              "\"target_modules\":null,\"rank_pattern\":null,\"modules_to_save\":null,\"layers_to_transform\":null,"
              "\"task_type\":null}");
    REQUIRE(c);
    CHECK(lorasync_config_view(c)->r == 8);
    lorasync_config_free(c);
    lorasync_config_free(NULL);
}

static void config_fields(void)
{
    lorasync_config *c = parse(
        "{\"peft_type\":\"LORA\",\"r\":32,\"lora_alpha\":16.5,\"bias\":\"lora_only\",\"use_rslora\":true,"
        "\"use_dora\":true,\"lora_bias\":true,\"fan_in_fan_out\":true,\"task_type\":\"SEQ_CLS\","
        "\"base_model_name_or_path\":\"a\\/\\u7ed8\",\"target_modules\":[\"q\",\"k.v\",\"q\"],"
        "\"modules_to_save\":[\"score\"],\"rank_pattern\":{\"q\":4,\"^x\\\\.k.v\":64},\"alpha_pattern\":{\"k.v\":1e2},"
        "\"unknown\":{\"deep\":[1]}}");
    const lorasync_config_info *i;
    REQUIRE(c);
    i = lorasync_config_view(c);
    CHECK(i->r == 32 && i->lora_alpha == 16.5 && i->use_rslora && i->use_dora && i->lora_bias && i->fan_in_fan_out);
    CHECK_TEXT(i->bias, "lora_only");
    CHECK_TEXT(i->task_type, "SEQ_CLS");
    CHECK_TEXT(i->base_model, "a/\xe7\xbb\x98");
    CHECK_EQ(i->num_target_modules, 3);
    CHECK_TEXT(i->target_modules[1], "k.v");
    CHECK_EQ(i->num_modules_to_save, 1);
    CHECK_TEXT(i->modules_to_save[0], "score");
    CHECK(i->num_rank_patterns == 2 && i->num_alpha_patterns == 1);
    CHECK_EQ(lorasync_config_rank(c, "a.q"), 4);
    CHECK_EQ(lorasync_config_rank(c, "x.k.v"), 64);
    CHECK_EQ(lorasync_config_rank(c, "y.x.k.v"), 32);
    CHECK(lorasync_config_scale(c, "a.q") == 16.5 / 2);
    CHECK(lorasync_config_scale(c, "x.k.v") == 100.0 / 8);
    CHECK(lorasync_config_scale(c, "z") == 16.5 / sqrt(32.0));
    lorasync_config_free(c);
}

static void config_refuses(void)
{
    static const struct {
        const char *json;
        int         status;
        const char *part;
    } bad[] = {
        {"", LORASYNC_E_FORMAT, "expected an object"},
        {"[]", LORASYNC_E_FORMAT, "expected an object"},
        {"{} x", LORASYNC_E_FORMAT, "nothing may follow"},
        {"{}", LORASYNC_E_FORMAT, "no \"peft_type\""},
        {"{\"peft_type\":null}", LORASYNC_E_FORMAT, "no \"peft_type\""},
        {"{\"peft_type\":1}", LORASYNC_E_FORMAT, "\"peft_type\": JSON error at byte 13"},
        {"{\"peft_type\":\"lora\"}", LORASYNC_E_UNSUPPORTED, "peft_type is \"lora\""},
        {"{\"peft_type\":\"ADALORA\"}", LORASYNC_E_UNSUPPORTED, "\"ADALORA\""},
        {"{\"peft_type\":\"LORA\",\"r\":1,\"r\":1}", LORASYNC_E_FORMAT,
         "JSON error at byte 30 (line 1, column 31): key \"r\" occurs twice"},
        {"{\"peft_type\":\"LORA\",\n\"x\":[{\"y\":{\"z\":1,\n\"z\":2}}]}", LORASYNC_E_FORMAT,
         "adapter config: \"x\": \"y\": JSON error at byte 43 (line 3, column 5): key \"z\" occurs twice in one "
         "object; found `2`"},
        {"{\"peft_type\":\"LORA\",\"x\":NaN}", LORASYNC_E_FORMAT, "NaN and Infinity"},
        {"{\"peft_type\":\"LORA\",\"lora_alpha\":-Infinity}", LORASYNC_E_FORMAT, "NaN and Infinity"},
        {"{\"peft_type\":\"LORA\",\"x\":1e999}", LORASYNC_E_FORMAT, "does not fit a double"},
        {"{\"peft_type\":\"LORA\",\n\"r\":0}", LORASYNC_E_FORMAT,
         "\"r\": JSON error at byte 25 (line 2, column 5): a rank is 1 to 2147483647"},
        {"{\"peft_type\":\"LORA\",\"r\":-1}", LORASYNC_E_FORMAT, "\"r\""},
        {"{\"peft_type\":\"LORA\",\"r\":8.0}", LORASYNC_E_FORMAT, "\"r\""},
        {"{\"peft_type\":\"LORA\",\"r\":2147483648}", LORASYNC_E_FORMAT, "a rank is"},
        {"{\"peft_type\":\"LORA\",\"r\":\"8\"}", LORASYNC_E_FORMAT, "\"r\""},
        {"{\"peft_type\":\"LORA\",\"lora_alpha\":\"8\"}", LORASYNC_E_FORMAT, "\"lora_alpha\""},
        {"{\"peft_type\":\"LORA\",\"bias\":\"some\"}", LORASYNC_E_FORMAT,
         "expected \"none\", \"all\" or \"lora_only\""},
        {"{\"peft_type\":\"LORA\",\"bias\":false}", LORASYNC_E_FORMAT, "\"bias\""},
        {"{\"peft_type\":\"LORA\",\"use_dora\":1}", LORASYNC_E_FORMAT, "\"use_dora\""},
        {"{\"peft_type\":\"LORA\",\"use_rslora\":\"x\"}", LORASYNC_E_FORMAT, "\"use_rslora\""},
        {"{\"peft_type\":\"LORA\",\"lora_bias\":[]}", LORASYNC_E_FORMAT, "\"lora_bias\""},
        {"{\"peft_type\":\"LORA\",\"fan_in_fan_out\":{}}", LORASYNC_E_FORMAT, "\"fan_in_fan_out\""},
        {"{\"peft_type\":\"LORA\",\"task_type\":3}", LORASYNC_E_FORMAT, "\"task_type\""},
        {"{\"peft_type\":\"LORA\",\"base_model_name_or_path\":3}", LORASYNC_E_FORMAT, "\"base_model_name_or_path\""},
        {"{\"peft_type\":\"LORA\",\"target_modules\":3}", LORASYNC_E_FORMAT, "\"target_modules\": JSON error"},
        {"{\"peft_type\":\"LORA\",\"target_modules\":[3]}", LORASYNC_E_FORMAT, "\"target_modules\""},
        {"{\"peft_type\":\"LORA\",\"target_modules\":\"(?<=x)y\"}", LORASYNC_E_UNSUPPORTED, "\"target_modules\""},
        {"{\"peft_type\":\"LORA\",\"target_modules\":\"(\"}", LORASYNC_E_FORMAT, "\"target_modules\""},
        {"{\"peft_type\":\"LORA\",\"exclude_modules\":true}", LORASYNC_E_FORMAT, "\"exclude_modules\""},
        {"{\"peft_type\":\"LORA\",\"exclude_modules\":\"(\"}", LORASYNC_E_FORMAT, "\"exclude_modules\""},
        {"{\"peft_type\":\"LORA\",\"modules_to_save\":\"score\"}", LORASYNC_E_FORMAT, "\"modules_to_save\""},
        {"{\"peft_type\":\"LORA\",\"target_parameters\":{}}", LORASYNC_E_FORMAT, "\"target_parameters\""},
        {"{\"peft_type\":\"LORA\",\"layers_to_transform\":\"1\"}", LORASYNC_E_FORMAT, "\"layers_to_transform\""},
        {"{\"peft_type\":\"LORA\",\"layers_to_transform\":[1.5]}", LORASYNC_E_FORMAT, "expected an integer"},
        {"{\"peft_type\":\"LORA\",\"rank_pattern\":[]}", LORASYNC_E_FORMAT, "\"rank_pattern\""},
        {"{\"peft_type\":\"LORA\",\"rank_pattern\":{\"a\":0}}", LORASYNC_E_FORMAT, "\"rank_pattern\""},
        {"{\"peft_type\":\"LORA\",\"rank_pattern\":{\"a\":1,\"a\":2}}", LORASYNC_E_FORMAT, "key \"a\" occurs twice"},
        {"{\"peft_type\":\"LORA\",\"rank_pattern\":{\"a(\":1}}", LORASYNC_E_FORMAT, "\"rank_pattern\""},
        {"{\"peft_type\":\"LORA\",\"alpha_pattern\":{\"a\":\"1\"}}", LORASYNC_E_FORMAT, "\"alpha_pattern\""}};
    size_t i;
    for (i = 0; i < COUNT(bad); i++) {
        lorasync_config *c = (lorasync_config *)&err;
        memset(&err, 0, sizeof err);
        CHECK_EQ(lorasync_config_parse(bad[i].json, strlen(bad[i].json), NULL, &c, &err), bad[i].status);
        CHECK_EQ(err.status, bad[i].status);
        CHECK_HAS(err.text, bad[i].part);
        CHECK_HAS(err.text, "adapter config");
        CHECK(c == NULL);
        CHECK_EQ(lorasync_config_parse(bad[i].json, strlen(bad[i].json), NULL, &c, NULL), bad[i].status); /* without
                                                                                                             err */
    }
    CHECK_EQ(lorasync_config_parse("{}", 2, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
}

/* -- config: patterns */

/* The first key, compiled as the pattern it stands for, that matches; -1 when none does. */
static int first_match(char keys[][24], int num, const char *module)
{
    int i;
    for (i = 0; i < num; i++) {
        char              text[64];
        lorasync_pattern *p = NULL;
        int               match;
        snprintf(text, sizeof text, "(.*\\.)?(%s)$", keys[i]);
        if (lorasync_pattern_compile(text, NULL, &p, &err) < 0) fprintf(stderr, "%s: %s\n", text, err.text);
        if (!p) return -2;
        match = lorasync_pattern_matches(p, module);
        lorasync_pattern_free(p);
        if (match) return i;
    }
    return -1;
}

static void random_text(char *out, const char *letters, size_t max)
{
    size_t n = (size_t)(test_random(&seed) % (max + 1)), i;
    for (i = 0; i < n; i++) out[i] = letters[test_random(&seed) % strlen(letters)];
    out[n] = 0;
}

static void config_rank_patterns(void)
{
    int round;
    for (round = 0; round < 600; round++) {
        char             keys[12][24], json[1024], module[24];
        int              num = 0, wanted = (int)(test_random(&seed) % 12), i, k, n;
        lorasync_config *c;
        n = snprintf(json, sizeof json, "{\"peft_type\":\"LORA\",\"r\":999,\"rank_pattern\":{");
        for (i = 0; i < wanted; i++) {
            random_text(keys[num] + 1, "ab.", 6);
            keys[num][0] = test_random(&seed) % 4 ? 'a' : '^';
            if (test_random(&seed) % 5 == 0) strcat(keys[num], test_random(&seed) % 2 ? "[ab]" : ".*b");
            for (k = 0; k < num && strcmp(keys[k], keys[num]) != 0; k++) {}
            if (k < num) continue;
            n += snprintf(json + n, sizeof json - (size_t)n, "%s\"%s\":%d", num ? "," : "", keys[num], num + 1);
            num++;
        }
        snprintf(json + n, sizeof json - (size_t)n, "}}");
        c = parse(json);
        REQUIRE(c);
        for (i = 0; i < 20; i++) {
            int expected;
            random_text(module, "ab.", 8);
            expected = first_match(keys, num, module);
            if (lorasync_config_rank(c, module) != (expected < 0 ? 999 : expected + 1))
                fprintf(stderr, "%s in %s\n", module, json);
            CHECK_EQ(lorasync_config_rank(c, module), expected < 0 ? 999 : expected + 1);
        }
        lorasync_config_free(c);
    }
}

/* A key of many points has two ways on at each; a module of any length is answered. */
static void config_long_modules(void)
{
    char            *json = (char *)malloc(300000), *module = (char *)malloc(100001);
    lorasync_config *c;
    size_t           n, i;
    n = (size_t)sprintf(json, "{\"peft_type\":\"LORA\",\"rank_pattern\":{\"x\":3");
    for (i = 1; i < 700; i++) { /* every length of "a.a.a." and of points */
        size_t k;
        n += (size_t)sprintf(json + n, ",\"");
        for (k = 0; k < i % 350 + 1; k++) json[n++] = i < 350 || k % 2 ? '.' : 'a';
        n += (size_t)sprintf(json + n, "\":4");
    }
    sprintf(json + n, "}}");
    c = parse(json);
    REQUIRE(c);
    memset(module, 'a', 100000);
    module[100000] = 0;
    CHECK_EQ(lorasync_config_rank(c, module), 8); /* too long for a name */
    module[400] = 0;
    CHECK_EQ(lorasync_config_rank(c, module), 8);
    module[349] = 0;
    CHECK_EQ(lorasync_config_rank(c, module), 4);
    lorasync_config_free(c);
    free(json);
    free(module);
}

/* -- config: checking */

#define LORA "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\"]"

static void usual_set(void)
{
    set.num = 0;
    add_pair("m.0.q", 4);
    add_pair("m.0.v", 4);
}

static void check_pairs(void)
{
    usual_set();
    CHECK_EQ(check(LORA "}"), LORASYNC_OK);
    set.num--;
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "\"base_model.model.m.0.v.lora_A.weight\": its lora_B");
    set.at[2] = set.at[0], set.at[2].name = "base_model.model.m.0.v.lora_B.weight";
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "its lora_A");
    add("m.0.v", ".lora_A.weight", 3, 12);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "has rank 3 (rows)");
    usual_set();
    add("m.0.q", ".lora_A.default.weight", 4, 12);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "are both lora_A of one module");
    usual_set();
    set.at[0].ndim = 1;
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "has 1 dimensions");
    usual_set();
    add("e", ".lora_embedding_A", 4, 100);
    add("e", ".lora_B.weight", 10, 4);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "one is of an embedding");
    set.num = 0;
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_EMPTY, "none of the 0 tensors");
    add("classifier.weight", "", 4, 4);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_EMPTY, "classifier.weight");
    usual_set();
    add("m.0.q", ".lora_a", 4, 4);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_NAME, "lora_a");
    CHECK_EQ(lorasync_config_check(NULL, set.at, 1, &err), LORASYNC_E_ARGUMENT);
}

static void check_targets(void)
{
    usual_set();
    add_pair("m.0.k", 4);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG, "module \"m.0.k\" is not among the target_modules");
    set.num = 2;
    CHECK_EQ(check(LORA "}"), LORASYNC_OK); /* "v" matches nothing, as in PEFT */
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\","
                   "\"gate_proj\",\"up_proj\",\"down_proj\",\"q\"]}"),
             LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"exclude_modules\":[\"none\"]}"), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"exclude_modules\":[\"0.q\"]}"), LORASYNC_E_CONFIG, "\"m.0.q\"");
    CHECK_FAILS(check(LORA ",\"exclude_modules\":\"m.*\"}"), LORASYNC_E_CONFIG, "\"m.0.q\"");
    usual_set();
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4}"), LORASYNC_OK);
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\"all-LINEAR\"}"), LORASYNC_OK);
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\".*(q|v)\"}"), LORASYNC_OK);
    CHECK_FAILS(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\".*q\"}"), LORASYNC_E_CONFIG, "\"m.0.v\"");
    CHECK_FAILS(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[]}"), LORASYNC_E_CONFIG, "\"m.0.q\"");
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"m.0.q\",\"0.v\",\"m.0.q\"]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"layers_to_transform\":[]}"), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"layers_to_transform\":0}"), LORASYNC_E_CONFIG,
                "\"m.0.q\""); /* to PEFT it has no layer */
    CHECK_EQ(check(LORA ",\"layers_pattern\":\"m\",\"layers_to_transform\":[1,0]}"), LORASYNC_OK);
    set.num = 0;
    add_pair("m.h.0.q", 4);
    add_pair("m.h.0.mlp.3.v", 4);
    CHECK_EQ(check(LORA ",\"layers_to_transform\":[1,0]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"layers_to_transform\":0}"), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"layers_to_transform\":1}"), LORASYNC_E_CONFIG, "\"m.h.0.q\"");
    CHECK_FAILS(check(LORA ",\"layers_to_transform\":[3]}"), LORASYNC_E_CONFIG, "\"m.h.0.q\"");
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"layers_to_transform\":0}"), LORASYNC_OK);
    CHECK_FAILS(check("{\"peft_type\":\"LORA\",\"r\":4,\"layers_to_transform\":2}"), LORASYNC_E_CONFIG, "\"m.h.0.q\"");
    usual_set();
    CHECK_EQ(
        check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"m.0.q\",\"m.0.v\"],\"layers_to_transform\":1}"),
        LORASYNC_OK);
}

static void check_ranks(void)
{
    usual_set();
    CHECK_FAILS(check("{\"peft_type\":\"LORA\",\"target_modules\":[\"q\",\"v\"]}"), LORASYNC_E_CONFIG,
                "rank 4, but the adapter config says 8 (r)");
    CHECK_FAILS(check(LORA ",\"rank_pattern\":{\"v\":16}}"), LORASYNC_E_CONFIG, "says 16 (rank_pattern v)");
    set.num = 2;
    add_pair("m.0.v", 16);
    CHECK_EQ(check(LORA ",\"rank_pattern\":{\"v\":16}}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"rank_pattern\":{\".*0\\\\.v\":16}}"), LORASYNC_OK);
    set.at[0].ndim = set.at[1].ndim = 4; /* a convolution */
    set.at[0].shape[2] = set.at[0].shape[3] = 3, set.at[1].shape[2] = set.at[1].shape[3] = 1;
    CHECK_EQ(check(LORA ",\"rank_pattern\":{\"v\":16}}"), LORASYNC_OK);
}

static void check_bias_and_dora(void)
{
    usual_set();
    CHECK_FAILS(check(LORA ",\"use_dora\":true}"), LORASYNC_E_CONFIG, "has no lora_magnitude_vector");
    add("m.0.q", ".lora_magnitude_vector", 10, 0);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG, "use_dora false, but module \"m.0.q\" has a");
    CHECK_FAILS(check(LORA ",\"use_dora\":true}"), LORASYNC_E_CONFIG, "\"m.0.v\" has no");
    add("m.0.v", ".lora_magnitude_vector", 10, 0);
    CHECK_EQ(check(LORA ",\"use_dora\":true}"), LORASYNC_OK);
    set.at[5].shape[0] = 9;
    CHECK_FAILS(check(LORA ",\"use_dora\":true}"), LORASYNC_E_PAIR, "vector of 10 elements");
    /* a convolution's */
    set.at[5].ndim = 4, set.at[5].shape[0] = set.at[5].shape[2] = set.at[5].shape[3] = 1, set.at[5].shape[1] = 10;
    CHECK_EQ(check(LORA ",\"use_dora\":true}"), LORASYNC_OK);
    set.at[5].shape[3] = 10;
    CHECK_EQ(check(LORA ",\"use_dora\":true}"), LORASYNC_E_PAIR);
    usual_set();
    CHECK_FAILS(check(LORA ",\"lora_bias\":true}"), LORASYNC_E_CONFIG, "has no lora_B.bias");
    add("m.0.q", ".lora_B.bias", 10, 0);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG,
                "\"base_model.model.m.0.q.lora_B.bias\": the adapter config says lora_bias false");
    add("m.0.v", ".lora_B.bias", 10, 0);
    CHECK_EQ(check(LORA ",\"lora_bias\":true}"), LORASYNC_OK);
    set.num -= 2;
    add("m.0.w", ".lora_B.bias", 10, 0);
    CHECK_FAILS(check(LORA ",\"lora_bias\":true}"), LORASYNC_E_PAIR, "lora_A and lora_B of module \"m.0.w\"");
}

static void check_saved(void)
{
    usual_set();
    add("classifier.weight", "", 2, 5);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG, "\"base_model.model.classifier.weight\" is not a LoRA tensor");
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"classifier\"]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"model.classifier\"]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"fier\"]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"class\"]}"), LORASYNC_E_CONFIG);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"classifier.weight\"]}"), LORASYNC_E_CONFIG);
    CHECK_EQ(check(LORA ",\"task_type\":\"SEQ_CLS\"}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"task_type\":\"TOKEN_CLS\"}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"task_type\":\"QUESTION_ANS\"}"), LORASYNC_E_CONFIG);
    CHECK_EQ(check(LORA ",\"task_type\":\"CAUSAL_LM\"}"), LORASYNC_E_CONFIG);
    usual_set();
    add("head.modules_to_save.default.out.weight", "", 2, 5);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"head\"]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"tail\"]}"), LORASYNC_E_CONFIG);
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\",\"head\"],"
                   "\"modules_to_save\":[\"head\"]}"),
             LORASYNC_OK);
    usual_set();
    add("m.0.q.base_layer.bias", "", 10, 0);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG, "bias is \"none\"");
    CHECK_EQ(check(LORA ",\"bias\":\"lora_only\"}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"bias\":\"all\"}"), LORASYNC_OK);
    add("m.0.norm.bias", "", 10, 0);
    CHECK_FAILS(check(LORA ",\"bias\":\"lora_only\"}"), LORASYNC_E_CONFIG, "norm.bias");
    CHECK_EQ(check(LORA ",\"bias\":\"all\"}"), LORASYNC_OK);
    usual_set();
    add("m.0.q.base_layer.weight", "", 10, 12);
    CHECK_EQ(check(LORA ",\"bias\":\"all\"}"), LORASYNC_E_CONFIG);
}

static void check_embeddings(void)
{
    usual_set();
    add("m.embed_tokens", ".base_layer.weight", 100, 10);
    add("lm_head", ".weight", 100, 10);
    CHECK_EQ(check(LORA "}"), LORASYNC_OK);
    usual_set();
    add("m.own", ".base_layer.weight", 100, 10);
    CHECK_EQ(check(LORA "}"), LORASYNC_E_CONFIG);
    add("m.own", ".lora_embedding_A", 4, 100);
    add("m.own", ".lora_embedding_B", 10, 4);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG, "m.own");
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\",\"own\"]}"), LORASYNC_OK);
    usual_set();
    add("tok_embeddings", ".weight", 100, 10);
    CHECK_EQ(check(LORA "}"), LORASYNC_OK);
}

/* Rows of trainable tokens, against the indices, in both forms. */
static void check_tokens(void)
{
    usual_set();
    add("m.emb.token_adapter.trainable_tokens_delta", "", 3, 10);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_CONFIG, "needs trainable_token_indices");
    CHECK_EQ(check(LORA ",\"trainable_token_indices\":[1,2,3]}"), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"trainable_token_indices\":[1,2]}"), LORASYNC_E_CONFIG, "has 3 rows");
    CHECK_FAILS(check(LORA ",\"trainable_token_indices\":[]}"), LORASYNC_E_CONFIG, "config has 0");
    CHECK_EQ(check(LORA ",\"trainable_token_indices\":{\"lm_head\":[1],\"emb\":[1,2,3]}}"), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"trainable_token_indices\":{\"emb\":[1,2,3,4]}}"), LORASYNC_E_CONFIG, "config has 4");
    CHECK_FAILS(check(LORA ",\"trainable_token_indices\":{\"lm_head\":[1,2,3]}}"), LORASYNC_E_CONFIG,
                "has no \"m.emb\"");
    CHECK(!parse("{\"peft_type\":\"LORA\",\"trainable_token_indices\":[1.5]}"));
    CHECK(!parse("{\"peft_type\":\"LORA\",\"trainable_token_indices\":{\"a\":3}}"));
    CHECK_HAS(err.text, "trainable_token_indices");
    usual_set();
    CHECK_EQ(check(LORA ",\"trainable_token_indices\":[1,2,3]}"), LORASYNC_OK); /* tied ones are not saved */
}

/* The number of columns of B that PEFT gives a convolution with groups. */
static void check_groups(void)
{
    static const struct {
        int64_t r, columns, rows;
        int     status;
    } cases[] = {{8, 8, 12, 0},
                 {8, 4, 12, 0},
                 {8, 2, 12, 0},
                 {8, 2, 10, LORASYNC_E_PAIR},
                 {8, 3, 12, LORASYNC_E_PAIR},
                 {8, 16, 12, LORASYNC_E_PAIR},
                 {8, 0, 12, LORASYNC_E_PAIR}};
    size_t i;
    for (i = 0; i < COUNT(cases); i++) {
        set.num = 0;
        add("m.q", ".lora_A.weight", cases[i].r, 6);
        add("m.q", ".lora_B.weight", cases[i].rows, cases[i].columns);
        set.at[0].ndim = set.at[1].ndim = 4;
        set.at[0].shape[2] = set.at[0].shape[3] = 3, set.at[1].shape[2] = set.at[1].shape[3] = 1;
        CHECK_EQ(check("{\"peft_type\":\"LORA\",\"target_modules\":[\"q\"]}"), cases[i].status);
        if (cases[i].columns == cases[i].r) continue;
        set.at[0].ndim = set.at[1].ndim = 2; /* a linear layer has no groups */
        CHECK_EQ(check("{\"peft_type\":\"LORA\",\"target_modules\":[\"q\"]}"), LORASYNC_E_PAIR);
    }
}

static void check_dtypes(void)
{
    int dtype;
    for (dtype = LORASYNC_BOOL; dtype <= LORASYNC_U64; dtype++) {
        const char *name    = lorasync_dtype_name((lorasync_dtype)dtype);
        int         integer = name[0] == 'B' ? name[1] == 'O' : name[0] == 'U' || name[0] == 'I';
        usual_set();
        set.at[2].dtype = (lorasync_dtype)dtype;
        CHECK_EQ(check(LORA "}"), integer ? LORASYNC_E_UNSUPPORTED : LORASYNC_OK);
        if (integer) CHECK_HAS(err.text, "\"base_model.model.m.0.v.lora_A.weight\" is a lora_A of dtype ");
        usual_set();
        add("score", ".weight", 2, 2);
        set.at[4].dtype = (lorasync_dtype)dtype; /* whatever a saved module has */
        CHECK_EQ(check(LORA ",\"modules_to_save\":[\"score\"]}"), LORASYNC_OK);
    }
}

/* PEFT takes the output layer off the list when it ties its LoRA to the embedding's. */
static void check_tied(void)
{
    static const char json[] = "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\",\"m.embed_tokens\"]";
    char              tied[300];
    usual_set();
    add("m.embed_tokens", ".lora_embedding_A", 4, 100);
    add("m.embed_tokens", ".lora_embedding_B", 10, 4);
    add("m.embed_tokens", ".base_layer.weight", 100, 10);
    add_pair("lm_head", 4);
    snprintf(tied, sizeof tied, "%s}", json);
    CHECK_FAILS(check(tied), LORASYNC_E_CONFIG, "\"lm_head\"");
    snprintf(tied, sizeof tied, "%s,\"ensure_weight_tying\":true}", json);
    CHECK_EQ(check(tied), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"ensure_weight_tying\":true}"), LORASYNC_E_CONFIG, "\"m.embed_tokens\"");
    add_pair("m.k", 4);
    CHECK_FAILS(check(tied), LORASYNC_E_CONFIG, "\"m.k\"");
}

/* Modules called like LoRA, in a file: the config says that they are modules. */
static void check_names_like_lora(void)
{
    usual_set();
    add("lora_head", ".weight", 3, 3);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_NAME, "\"lora_head\"");
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"lora_head\"]}"), LORASYNC_OK);
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"head\"]}"), LORASYNC_OK);
    CHECK_FAILS(check(LORA ",\"modules_to_save\":[\"lora\"]}"), LORASYNC_E_NAME, "\"lora_head\"");
    CHECK_FAILS(check(LORA ",\"exclude_modules\":[\"lora_head\"]}"), LORASYNC_E_CONFIG, "is not a LoRA tensor");
    usual_set();
    add("enc.lora_A", ".weight", 3, 3);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_PAIR, "its lora_B of module \"enc\"");
    CHECK_EQ(check(LORA ",\"modules_to_save\":[\"enc.lora_A\"]}"), LORASYNC_OK);
    usual_set();
    add_pair("m.lora_router", 4);
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\",\"lora_router\"]}"), LORASYNC_OK);
    add("m.lora_router", ".weight", 3, 3);
    CHECK_FAILS(check(LORA "}"), LORASYNC_E_NAME, "\"lora_router\"");
    CHECK_FAILS(check("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\",\"lora_router\"]}"),
                LORASYNC_E_CONFIG, "\"base_model.model.m.lora_router.weight\" is not a LoRA tensor");
}

static char *write_config(const char *json, double alpha, int fold);

/* -- config: layers */

/* 1 if `text` matches PEFT's expression with an index at `at`: (?:^|.*?\.)pattern\.(\d+)\. by trying every start, or
   .*?\.[^.]*\.(\d+)\. without a pattern. -1: no layer. */
static long layer_reference(const char *text, const char *pattern)
{
    size_t n = strlen(text), start, i;
    for (start = 0; start < n; start++) {
        size_t at = start;
        if (pattern) {
            if (start && text[start - 1] != '.') continue;
            for (i = 0; pattern[i] && at < n && (pattern[i] == '.' || pattern[i] == text[at]); i++) at++;
            if (pattern[i]) continue;
        } else {
            if (text[at] != '.') continue;
            for (at++; at < n && text[at] != '.';) at++;
        }
        if (at == n || text[at++] != '.') continue;
        for (i = at; i < n && text[i] >= '0' && text[i] <= '9';) i++;
        if (i > at && i < n && text[i] == '.') return strtol(text + at, NULL, 10);
    }
    return -1;
}

static void check_layers(void)
{
    static const char *const bits[]     = {"m", "h", "layers", "0", "1", "01", "001", "12", "x1", "xh", "q"};
    static const char *const patterns[] = {"h", "layers", "m.layers", "x", "layer", ""};
    static const struct {
        const char *module;
        long        layer;
    } cases[] = {{"foo.bar.001.baz", 1},
                 {"foo.bar.1", -1},
                 {"foo.1.baz", -1},
                 {"1.2.3.4", 3},
                 {"model.layers.3.mlp.experts.7.up_proj", 3}};
    char   json[400], module[128];
    size_t i, k, num_layers = 0;
    for (i = 0; i < COUNT(cases); i++) CHECK_EQ(layer_reference(cases[i].module, NULL), cases[i].layer);
    for (i = 0; i < 20000; i++) {
        const char *one = patterns[test_random(&seed) % 6], *two = patterns[test_random(&seed) % 6];
        size_t      parts = 1 + test_random(&seed) % 6, used = 0, form = test_random(&seed) % 3;
        long        layer = -1, wanted = (long)(test_random(&seed) % 3);
        while (parts--)
            used +=
                (size_t)snprintf(module + used, sizeof module - used, "%s.", bits[test_random(&seed) % COUNT(bits)]);
        snprintf(module + used, sizeof module - used, i % 5 ? "v" : "1");
        k = (size_t)snprintf(json, sizeof json,
                             "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"v\",\"1\"],"
                             "\"layers_to_transform\":[%ld,77]",
                             wanted);
        if (form == 1) snprintf(json + k, sizeof json - k, ",\"layers_pattern\":\"%s\"}", one);
        else if (form == 2) snprintf(json + k, sizeof json - k, ",\"layers_pattern\":[\"%s\",\"%s\"]}", one, two);
        else snprintf(json + k, sizeof json - k, "}");
        if (form == 0 || (form == 1 && !*one)) layer = layer_reference(module, NULL);
        if (form > 0 && *one) layer = layer_reference(module, one);
        if (form > 1 && layer < 0 && *two) layer = layer_reference(module, two);
        set.num = 0;
        add_pair(module, 4);
        num_layers += layer == wanted;
        if ((check(json) == LORASYNC_OK) != (layer == wanted)) fprintf(stderr, "%s in %s\n", module, json);
        CHECK_EQ(check(json), layer == wanted ? LORASYNC_OK : LORASYNC_E_CONFIG);
    }
    CHECK(num_layers > 500);
}

/* -- config: fields of which an engine must know */

static void config_variants(void)
{
    static const char *const flags[]   = {"alora_invocation_tokens",
                                          "arrow_config",
                                          "ensure_weight_tying",
                                          "kasa_config",
                                          "layer_replication",
                                          "monteclora_config",
                                          "target_parameters",
                                          "use_bdlora",
                                          "use_qalora",
                                          "trainable_token_indices"};
    static const char *const values[]  = {"[1,2]",     "{\"a\":1}", "true",      "{\"a\":1}", "[[0,4],[2,5]]",
                                          "{\"a\":1}", "[\"e.w\"]", "{\"a\":1}", "true",      "[1]"};
    static const char *const nothing[] = {"null", "[]", "{}", "false", "[ ]", "{ }"};
    static const char *const inits[]   = {
          "true",  "\"gaussian\"", "\"eva\"",   "\"orthogonal\"", /* these leave the base weights alone */
          "false", "\"pissa\"",    "\"olora\"", "\"corda\"",      "\"lora_ga\"", "\"loftq\"", "\"pissa_niter_16\""};
    char                        json[2000];
    lorasync_config            *c;
    const lorasync_config_info *info;
    size_t                      i, k;
    for (i = 0; i < COUNT(flags); i++) {
        snprintf(json, sizeof json, "{\"peft_type\":\"LORA\",\"%s\":%s}", flags[i], values[i]);
        c = parse(json);
        REQUIRE(c);
        info = lorasync_config_view(c);
        CHECK_EQ(info->num_variants, 1);
        if (info->num_variants == 1) CHECK_TEXT(info->variants[0], flags[i]);
        CHECK_EQ(info->num_unknown, 0);
        lorasync_config_free(c);
        for (k = 0; k < COUNT(nothing); k++) {
            if (k && (strcmp(flags[i], "trainable_token_indices") == 0 ||
                      strcmp(flags[i], "ensure_weight_tying") == 0 || strcmp(flags[i], "target_parameters") == 0))
                continue; /* typed */
            snprintf(json, sizeof json, "{\"peft_type\":\"LORA\",\"%s\":%s,\"zeta\":%s}", flags[i], nothing[k],
                     nothing[k]);
            c = parse(json);
            REQUIRE(c);
            CHECK_EQ(lorasync_config_view(c)->num_variants + lorasync_config_view(c)->num_unknown, 0);
            lorasync_config_free(c);
        }
    }
    for (i = 0; i < COUNT(inits); i++) {
        snprintf(json, sizeof json, "{\"peft_type\":\"LORA\",\"init_lora_weights\":%s,\"velora_config\":{\"x\":1}}",
                 inits[i]);
        c = parse(json);
        REQUIRE(c);
        CHECK_EQ(lorasync_config_view(c)->num_variants, i > 4);
        lorasync_config_free(c);
    }
    c = parse("{\"peft_type\":\"LORA\",\"use_qalora\":true,\"zeta\":0,\"alora_invocation_tokens\":[1],\"beta\":\"x\"}");
    REQUIRE(c);
    info = lorasync_config_view(c);
    REQUIRE(info->num_variants == 2 && info->num_unknown == 2);
    CHECK_TEXT(info->variants[0], "alora_invocation_tokens");
    CHECK_TEXT(info->variants[1], "use_qalora");
    CHECK_TEXT(info->unknown[0], "beta");
    CHECK_TEXT(info->unknown[1], "zeta");
    lorasync_config_free(c);
}

/* What PEFT refuses, and what would mean something else here. */
static void config_refuses_fields(void)
{
    static const struct {
        const char     *fields;
        lorasync_status status;
        const char     *part;
    } cases[] = {
        {"\"target_modules\":\".*q\",\"layers_to_transform\":[0]", LORASYNC_E_CONFIG, "layers_to_transform beside"},
        {"\"target_modules\":\"all-linear\",\"layers_to_transform\":[]", LORASYNC_E_CONFIG, "all-linear"},
        {"\"target_modules\":\".*q\",\"layers_pattern\":[]", LORASYNC_E_CONFIG, "layers_pattern beside"},
        {"\"target_modules\":[\"q\"],\"layers_pattern\":\"h\"", LORASYNC_E_CONFIG, "without layers_to_transform"},
        {"\"layers_to_transform\":1,\"layers_pattern\":\"h|layers\"", LORASYNC_E_UNSUPPORTED, "\"h|layers\""},
        {"\"layers_to_transform\":1,\"layers_pattern\":[\"h\",\"l.*\"]", LORASYNC_E_UNSUPPORTED, "\"l.*\""},
        {"\"layers_to_transform\":1,\"layers_pattern\":7", LORASYNC_E_FORMAT, "layers_pattern"},
        {"\"alpha_pattern\":{\"m._orig_mod.q\":4}", LORASYNC_E_UNSUPPORTED, "holds _orig_mod"},
        {"\"rank_pattern\":{\"^m._checkpoint_wrapped_module.q\":4}", LORASYNC_E_UNSUPPORTED, "rank_pattern"},
    };
    size_t i;
    for (i = 0; i < COUNT(cases); i++) {
        char             json[300];
        lorasync_config *c = NULL;
        snprintf(json, sizeof json, "{\"peft_type\":\"LORA\",%s}", cases[i].fields);
        memset(&err, 0, sizeof err);
        CHECK_FAILS(lorasync_config_parse(json, strlen(json), NULL, &c, &err), cases[i].status, cases[i].part);
        CHECK(!c);
    }
    {
        lorasync_config *c = parse("{\"peft_type\":\"LORA\",\"target_modules\":\".*q\",\"layers_to_transform\":null,"
                                   "\"layers_pattern\":null}");
        CHECK(c != NULL);
        lorasync_config_free(c);
    }
}

/* PEFT lists whole names, with wrappers, where it met a model that was compiled or checkpointed before. */
static void config_wrapped_lists(void)
{
    static const char json[] =
        "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"_orig_mod.m.0._checkpoint_wrapped_module.q\",\"m.0.v\"],"
        "\"exclude_modules\":[\"_orig_mod.x\"],\"modules_to_save\":[\"_fsdp_wrapped_module.score\"]}";
    lorasync_config *c = parse(json);
    char            *out;
    REQUIRE(c);
    CHECK_TEXT(lorasync_config_view(c)->target_modules[0], "m.0.q");
    CHECK_TEXT(lorasync_config_view(c)->modules_to_save[0], "score");
    lorasync_config_free(c);
    usual_set();
    add("score", ".weight", 2, 2);
    CHECK_EQ(check(json), LORASYNC_OK);
    out = write_config(json, 0, 0);
    REQUIRE(out);
    CHECK(!strstr(out, "_orig_mod") && !strstr(out, "_wrapped_module"));
    CHECK_HAS(out, "\"target_modules\": [\n    \"m.0.q\",\n    \"m.0.v\"\n  ]");
    CHECK_HAS(out, "\"exclude_modules\": [\n    \"x\"\n  ]");
    CHECK_HAS(out, "\"modules_to_save\": [\n    \"score\"\n  ]");
    lorasync_free(NULL, out);
}

static void check_experts(void)
{
    static const char json[] =
        "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\"],\"target_parameters\":[\"experts.gate_up_proj\","
        "\"experts.down_proj\"]}";
    set.num = 0;
    add_pair("m.0.q", 4);
    add_pair("m.0.mlp.experts", 32);
    add_pair("m.0.mlp.experts.base_layer", 32);
    CHECK_EQ(check(json), LORASYNC_OK);
    set.at[2].shape[0] = set.at[3].shape[1] = 30;
    CHECK_FAILS(check(json), LORASYNC_E_CONFIG, "rank 30");
    CHECK_EQ(check("{\"peft_type\":\"LORA\",\"r\":2,\"rank_pattern\":{\"q\":4},\"target_modules\":[\"q\"],"
                   "\"target_parameters\":[\"down_proj\"]}"),
             LORASYNC_OK);
    set.num = 0;
    add_pair("m.0.q", 8); /* a multiple is for expert parameters only */
    CHECK_EQ(check(json), LORASYNC_E_CONFIG);
}

/* -- config: writing */

static char *write_config(const char *json, double alpha, int fold)
{
    lorasync_config_write_desc d;
    lorasync_config           *c   = json ? parse(json) : NULL;
    char                      *out = NULL;
    lorasync_status            status;
    memset(&d, 0, sizeof d);
    d.config = c, d.lora_alpha = alpha, d.fold_scale = fold;
    memset(&err, 0, sizeof err);
    status = lorasync_config_write(&d, set.at, set.num, NULL, &out, &err);
    CHECK((status == LORASYNC_OK) == (out != NULL));
    lorasync_config_free(c);
    return out;
}

static void check_written(const char *json, double alpha, int fold, const char *expected)
{
    char *out = write_config(json, alpha, fold);
    if (!out) fprintf(stderr, "write: %s\n", err.text);
    CHECK_TEXT(out, expected);
    lorasync_free(NULL, out);
}

static void write_from_tensors(void)
{
    usual_set();
    add_pair("m.1.q", 4);
    add_pair("m.1.v", 4);
    check_written(
        NULL, 32, 0,
        "{\n  \"alpha_pattern\": {},\n  \"base_model_name_or_path\": null,\n  \"bias\": \"none\",\n  "
        "\"fan_in_fan_out\": false,\n  \"inference_mode\": true,\n  \"init_lora_weights\": true,\n  \"lora_alpha\": "
        "32,\n  \"lora_dropout\": 0.0,\n  \"modules_to_save\": null,\n  \"peft_type\": \"LORA\",\n  \"r\": 4,\n  "
        "\"rank_pattern\": {},\n  \"target_modules\": [\n    \"q\",\n    \"v\"\n  ],\n  \"task_type\": null,\n  "
        "\"use_dora\": false,\n  \"use_rslora\": false\n}");
}

/* The parts of a written config that a test is about. */
static void check_parts(const char *json, double alpha, int fold, const char *const *parts)
{
    char *out = write_config(json, alpha, fold);
    if (!out) fprintf(stderr, "write: %s\n", err.text);
    REQUIRE(out);
    for (; *parts; parts++) CHECK_HAS(out, *parts);
    lorasync_free(NULL, out);
}

static void write_ranks(void)
{
    static const char *const plain[]  = {"\"r\": 4,", "\"rank_pattern\": {\n    \"m.1.q\": 2,\n    \"v\": 16\n  }",
                                         "\"alpha_pattern\": {}", "\"lora_alpha\": 0.5,", NULL};
    static const char *const folded[] = {"\"r\": 4,", "\"rank_pattern\": {\n    \"m.1.q\": 2,\n    \"v\": 16\n  }",
                                         "\"alpha_pattern\": {\n    \"m.1.q\": 2,\n    \"v\": 16\n  }",
                                         "\"lora_alpha\": 4,", NULL};
    set.num                           = 0;
    add_pair("m.0.q", 4);
    add_pair("m.1.q", 2);
    add_pair("m.2.q", 4);
    add_pair("m.0.v", 16);
    add_pair("m.1.v", 16);
    check_parts(NULL, 0.5, 0, plain);
    check_parts(NULL, 0.5, 1, folded);
}

static void write_targets(void)
{
    static const char *const parts[] = {
        "\"target_modules\": [\n    \"0\",\n    \"emb\",\n    \"to_out.0\",\n    \"x.1.2\"\n  ]", "\"use_dora\": true",
        "\"lora_bias\": true", NULL};
    static const char *const saved[] = {"\"modules_to_save\": [\n    \"a.head\",\n    \"score\"\n  ]", NULL};
    static const char *const none[]  = {"\"modules_to_save\": null", "\"emb\",\n    \"q\"", NULL};
    static const char *const names[] = {"0", "b.to_out.0", "c.to_out.0", "x.1.2"};
    size_t                   i;
    set.num = 0;
    for (i = 0; i < 4; i++) {
        add_pair(names[i], 4);
        add(names[i], ".lora_B.bias", 10, 0);
        add(names[i], ".lora_magnitude_vector", 10, 0);
    }
    add("emb", ".lora_embedding_A", 4, 9);
    add("emb", ".lora_embedding_B", 10, 4);
    add("emb", ".lora_magnitude_vector", 10, 0);
    check_parts(NULL, 8, 0, parts);
    usual_set();
    add("score", ".weight", 2, 2);
    add("a.head", ".weight", 2, 2);
    add("score", ".bias", 2, 0);
    check_parts(NULL, 8, 0, saved);
    usual_set();
    add("m.emb", ".base_layer.weight", 9, 10); /* saved beside its LoRA: not a module to save */
    add("m.emb", ".lora_embedding_A", 4, 9);
    add("m.emb", ".lora_embedding_B", 10, 4);
    check_parts(NULL, 8, 0, none);
}

static char *write_among(const char *json, const char *const *modules, size_t num_modules)
{
    lorasync_config_write_desc d;
    lorasync_config           *c   = json ? parse(json) : NULL;
    char                      *out = NULL;
    memset(&d, 0, sizeof d);
    d.config = c, d.lora_alpha = json ? 0 : 8, d.modules = modules, d.num_modules = num_modules;
    memset(&err, 0, sizeof err);
    lorasync_config_write(&d, set.at, set.num, NULL, &out, &err);
    lorasync_config_free(c);
    return out;
}

/* 1 if a module is a LoRA module of the set. */
static int has_lora(const char *module)
{
    static const char before[] = "base_model.model.", behind[] = ".lora_A.weight";
    const size_t      length = strlen(module);
    size_t            i;
    for (i = 0; i < set.num; i++) {
        const char *name = set.at[i].name;
        if (strncmp(name, before, sizeof before - 1) == 0 && strncmp(name + sizeof before - 1, module, length) == 0 &&
            strcmp(name + sizeof before - 1 + length, behind) == 0)
            return 1;
    }
    return 0;
}

/* A pattern that covers part of the modules is published so that PEFT gives LoRA to just those. */
static void write_part(void)
{
    static const char json[] =
        "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\".*layers\\\\.0\\\\..*(q|v)_proj\"}";
    static const char *const whole[] = {"m.layers.0.attn.q_proj", "m.layers.0.attn.v_proj", "m.layers.0.mlp.fc"};
    static const char *const part[]  = {"m.layers.0.attn.q_proj", "m.layers.1.attn.q_proj", "m.layers.1.attn.k_proj"};
    static const char *const above[] = {"v_proj.x", "lm_head"};
    static const char *const same[]  = {"tower.m.layers.0.attn.q_proj"};
    char                    *out;
    set.num = 0;
    add_pair("m.layers.0.attn.q_proj", 4);
    add_pair("m.layers.0.attn.v_proj", 4);
    out = write_among(json, whole, 3);
    REQUIRE(out);
    CHECK_HAS(out, "\"target_modules\": [\n    \"q_proj\",\n    \"v_proj\"\n  ]");
    lorasync_free(NULL, out);
    out = write_among(json, part, 3);
    REQUIRE(out);
    CHECK_HAS(out, "\"target_modules\": [\n    \"m.layers.0.attn.q_proj\",\n    \"v_proj\"\n  ]");
    lorasync_free(NULL, out);
    out = write_among(NULL, part, 3);
    REQUIRE(out);
    CHECK_HAS(out, "\"target_modules\": [\n    \"m.layers.0.attn.q_proj\",\n    \"v_proj\"\n  ]");
    lorasync_free(NULL, out);
    out = write_among(json, above, 2); /* a module that others lie in */
    REQUIRE(out);
    CHECK_HAS(out, "\"target_modules\": [\n    \"q_proj\",\n    \"m.layers.0.attn.v_proj\"\n  ]");
    lorasync_free(NULL, out);
    CHECK(!write_among(json, same, 1));
    CHECK_EQ(err.status, LORASYNC_E_CONFIG);
    CHECK_HAS(err.text, "\"tower.m.layers.0.attn.q_proj\" has no LoRA but ends in \"m.layers.0.attn.q_proj\"");
    out = write_among("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\"m.*(q|v)_proj\",\"exclude_modules\":"
                      "\"tower.*\",\"modules_to_save\":[\"head\"]}",
                      same, 1);
    REQUIRE(out);
    CHECK_HAS(out, "\"target_modules\": [\n    \"q_proj\",\n    \"v_proj\"\n  ]");
    lorasync_free(NULL, out);
    out = write_among("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q_proj\",\"v_proj\"]}", part, 3);
    REQUIRE(out); /* a list is the trainer's own, and carried through */
    CHECK_HAS(out, "\"target_modules\": [\n    \"q_proj\",\n    \"v_proj\"\n  ]");
    lorasync_free(NULL, out);
}

/* Random models: of all modules, PEFT's rule for the written list picks those with LoRA, or the call fails. */
static void write_part_random(void)
{
    static const char *const bits[] = {"m", "t", "0", "1", "q", "v", "out", "m.0", "attn"};
    static char              modules[40][128];
    const char              *list[40];
    size_t                   i, k, n, num, num_listed, written = 0, failed = 0;
    for (i = 0; i < 4000; i++) {
        char            *out, *saved;
        lorasync_config *c;
        num     = 2 + test_random(&seed) % 20;
        set.num = 0;
        for (k = 0; k < num; k++) {
            size_t used = 0, parts = 1 + test_random(&seed) % 4;
            while (parts--)
                used += (size_t)snprintf(modules[k] + used, sizeof modules[k] - used, "%s%s", used ? "." : "",
                                         bits[test_random(&seed) % COUNT(bits)]);
            for (n = 0; n < k && strcmp(modules[n], modules[k]) != 0; n++) {}
            if (n == k && (k == 0 || test_random(&seed) % 3 == 0)) add_pair(modules[k], 4);
        }
        for (k = num_listed = 0; k < num; k++) /* those with LoRA need not be told */
            if (i % 4 < 2 || !has_lora(modules[k])) list[num_listed++] = modules[k];
        out =
            write_among(i % 2 ? NULL : "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\".*\"}", list, num_listed);
        saved = NULL;
        if (!out) {
            CHECK_EQ(err.status, LORASYNC_E_CONFIG);
            saved = strstr(err.text, "has no LoRA but ends in \"");
            CHECK(saved != NULL);
            failed++;
            continue;
        }
        written++;
        c = parse(out);
        REQUIRE(c);
        for (k = 0; k < num; k++) {
            char path[128];
            memcpy(path, modules[k], sizeof path);
            for (;;) { /* and what it lies in */
                char *dot = strrchr(path, '.');
                if (lorasynci_targeted(c, path) != has_lora(path)) fprintf(stderr, "%s in %s\n", path, out);
                CHECK_EQ(lorasynci_targeted(c, path), has_lora(path));
                if (!dot) break;
                *dot = 0;
            }
        }
        lorasync_config_free(c);
        lorasync_free(NULL, out);
    }
    CHECK(written > 1000 && failed > 100);
}

static void write_refuses(void)
{
    static const struct {
        const char *module, *leaf;
        const char *part;
    } needs[] = {{"m.mlp.experts", ".lora_A.weight", "target_parameters"},
                 {"m.mlp.experts.base_layer", ".lora_A.weight", "target_parameters"},
                 {"m.emb.token_adapter", ".trainable_tokens_delta", "trainable_token_indices"}};
    lorasync_config_write_desc d;
    char                      *out = NULL;
    size_t                     i;
    for (i = 0; i < COUNT(needs); i++) {
        usual_set();
        add(needs[i].module, needs[i].leaf, 4, 12);
        if (i < 2) add(needs[i].module, ".lora_B.weight", 10, 4);
        CHECK(!write_config(NULL, 8, 0));
        CHECK_EQ(err.status, LORASYNC_E_CONFIG);
        CHECK_HAS(err.text, needs[i].part);
    }
    usual_set();
    CHECK(!write_config(NULL, 0, 0));
    CHECK_EQ(err.status, LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "lora_alpha");
    CHECK(!write_config(NULL, -1, 0) && !write_config(NULL, HUGE_VAL, 0));
    CHECK(!write_config("{\"peft_type\":\"LORA\",\"r\":5}", 0, 0));
    CHECK_EQ(err.status, LORASYNC_E_CONFIG);
    memset(&d, 0, sizeof d);
    CHECK_EQ(lorasync_config_write(NULL, set.at, 1, NULL, &out, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_config_write(&d, set.at, 1, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_config_write(&d, NULL, 1, NULL, &out, &err), LORASYNC_E_ARGUMENT);
    d.lora_alpha = 1;
    CHECK_EQ(lorasync_config_write(&d, NULL, 0, NULL, &out, &err), LORASYNC_E_EMPTY);
}

/* Patterns that overlap mean something else once sorted. */
static void write_overlap(void)
{
    usual_set();
    CHECK(!write_config("{\"peft_type\":\"LORA\",\"r\":4,\"alpha_pattern\":{\"m.0.q\":2,\".*q\":3}}", 0, 0));
    CHECK_EQ(err.status, LORASYNC_E_CONFIG);
    CHECK_HAS(err.text, "\"m.0.q\" has scale 0.5, but 0.75");
    set.num = 0;
    add_pair("m.0.q", 2);
    CHECK(!write_config("{\"peft_type\":\"LORA\",\"r\":4,\"rank_pattern\":{\"m.0.q\":2,\".*q\":3}}", 0, 0));
    CHECK_EQ(err.status, LORASYNC_E_CONFIG);
}

static void write_from_config(void)
{
    usual_set();
    check_written(
        "{\"zeta\":{\"b\":1.50,\"a\":[]},\"r\":4,\"peft_type\":\"LORA\",\"lora_alpha\":16.0,\"target_modules\":[\"v\","
        "\"q\"],\"base_model_name_or_path\":\"\xc3\xa9\",\"inference_mode\":false,\"lora_dropout\":1e-5}",
        0, 0,
        "{\n  \"base_model_name_or_path\": \"\\u00e9\",\n  \"inference_mode\": true,\n  \"lora_alpha\": 16.0,\n  "
        "\"lora_dropout\": 1e-05,\n  \"peft_type\": \"LORA\",\n  \"r\": 4,\n  \"target_modules\": [\n    \"v\",\n    "
        "\"q\"\n  ],\n  \"zeta\": {\n    \"a\": [],\n    \"b\": 1.5\n  }\n}");
    check_written("{\"r\":4,\"peft_type\":\"LORA\",\"target_modules\":\".*[qv]\"}", 0, 0,
                  "{\n  \"inference_mode\": true,\n  \"lora_alpha\": 8,\n  \"peft_type\": \"LORA\",\n  \"r\": 4,\n  "
                  "\"target_modules\": [\n    \"q\",\n    \"v\"\n  ]\n}");
    check_written(
        "{\"r\":4,\"peft_type\":\"LORA\",\"lora_alpha\":16.0,\"use_rslora\":true,\"target_modules\":null,"
        "\"rank_pattern\":{\"0.v\":4},\"alpha_pattern\":{\"q\":3}}",
        0, 1,
        "{\n  \"alpha_pattern\": {\n    \"0.v\": 4\n  },\n  \"inference_mode\": true,\n  \"lora_alpha\": 4,\n  "
        "\"peft_type\": \"LORA\",\n  \"r\": 4,\n  \"rank_pattern\": {\n    \"0.v\": 4\n  },\n  \"target_modules\": [\n "
        "   \"q\",\n    \"v\"\n  ],\n  \"use_rslora\": false\n}");
    add_pair("m.0.mlp.experts", 32);
    check_written(
        "{\"r\":4,\"peft_type\":\"LORA\",\"lora_alpha\":4,\"target_parameters\":[\"experts.w\"]}", 0, 0,
        "{\n  \"inference_mode\": true,\n  \"lora_alpha\": 4,\n  \"peft_type\": \"LORA\",\n  \"r\": 4,\n  "
        "\"target_modules\": [\n    \"q\",\n    \"v\"\n  ],\n  \"target_parameters\": [\n    \"experts.w\"\n  ]\n}");
}

/* -- memory */

static void memory_everywhere(void)
{
    static const char json[] =
        "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\"],\"exclude_modules\":\"x.*\","
        "\"modules_to_save\":[\"score\"],\"rank_pattern\":{\"v\":4,\"[q]\":4},\"alpha_pattern\":{\"q\":2},"
        "\"layers_to_transform\":0,\"layers_pattern\":[\"m\"],\"trainable_token_indices\":{\"emb\":[1,2]},"
        "\"use_qalora\":true,\"target_parameters\":[\"e.w\"],\"base_model_name_or_path\":\"b\","
        "\"task_type\":\"t\",\"x\":{\"y\":[\"z\"]}}";
    test_memory        memory;
    lorasync_allocator a;
    long               n;
    int                with, done = 0;
    a.alloc = test_memory_alloc, a.free = test_memory_free, a.user = &memory;
    usual_set();
    add("score", ".weight", 2, 2);
    for (with = 0; with < 2; with++) {
        for (n = 1, done = 0; !done; n++) {
            lorasync_config           *c = NULL;
            lorasync_config_write_desc d;
            char                      *out = NULL;
            lorasync_status            status;
            memset(&memory, 0, sizeof memory);
            memset(&d, 0, sizeof d);
            memory.fail_at = n;
            d.lora_alpha   = 2;
            status         = with ? lorasync_config_parse(json, strlen(json), &a, &c, &err) : LORASYNC_OK;
            d.config       = c;
            if (status == LORASYNC_OK && with) status = lorasync_config_check(c, set.at, set.num, &err);
            if (status == LORASYNC_OK) status = lorasync_config_write(&d, set.at, set.num, &a, &out, &err);
            CHECK(status == LORASYNC_OK || status == LORASYNC_E_MEMORY);
            if (status < 0) CHECK_HAS(err.text, "out of memory");
            done = status == LORASYNC_OK;
            CHECK(done == (out != NULL));
            lorasync_free(&a, out);
            lorasync_config_free(c);
            CHECK_EQ(memory.live, 0);
            REQUIRE(n < 10000);
        }
        CHECK(n > 20);
    }
    a.free = NULL;
    {
        lorasync_config           *c = NULL;
        lorasync_config_write_desc d;
        char                      *out = NULL;
        memset(&d, 0, sizeof d);
        d.lora_alpha = 1;
        CHECK_EQ(lorasync_config_parse(json, strlen(json), &a, &c, &err), LORASYNC_E_ARGUMENT);
        CHECK_EQ(lorasync_config_write(&d, set.at, set.num, &a, &out, &err), LORASYNC_E_ARGUMENT);
    }
}

/* -- real files */

typedef void (*file_test)(const char *path, const char *name);

static int each_file(const char *folder, file_test f)
{
    DIR           *dir = opendir(folder);
    struct dirent *entry;
    int            num = 0;
    if (!dir) return 0;
    while ((entry = readdir(dir)) != NULL) {
        char path[2048];
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        f(path, entry->d_name);
        num++;
    }
    closedir(dir);
    return num;
}

/* Tensors that a config of the data folder describes. */
static void set_for(const lorasync_config *c)
{
    const lorasync_config_info *info = lorasync_config_view(c);
    char                        module[128];
    size_t                      i, k;
    set.num = 0;
    for (i = 0; i < (info->num_target_modules ? info->num_target_modules : 1); i++) {
        if (info->num_target_modules) snprintf(module, sizeof module, "model.layers.0.%s", info->target_modules[i]);
        else
            snprintf(module, sizeof module, "%s",
                     !info->target_pattern                            ? "any.q"
                     : strstr(info->target_pattern, "language_model") ? "language_model.q_proj"
                                                                      : "classifier");
        for (k = 0; k < i && strcmp(info->target_modules[k], info->target_modules[i]) != 0; k++) {}
        if (k < i) continue; /* some list their modules twice */
        add_pair(module, info->r);
        if (info->use_dora) add(module, ".lora_magnitude_vector", 10, 0);
    }
    for (i = 0; i < info->num_modules_to_save; i++) {
        snprintf(module, sizeof module, "%s.weight", info->modules_to_save[i]);
        if (i < 2) add(module, "", 3, 3);
    }
}

/* Replaces the one occurrence of a part, in memory for it. */
static char *replaced(const char *text, const char *part, const char *by)
{
    const char *at  = strstr(text, part);
    char       *out = (char *)malloc(strlen(text) + strlen(by) + 1);
    if (!at) strcpy(out, text);
    else sprintf(out, "%.*s%s%s", (int)(at - text), text, by, at + strlen(part));
    return out;
}

static int num_same, num_lora, num_others;

static void try_config(const char *path, const char *name)
{
    size_t           n;
    char            *text = test_read(path, &n), *out, *expected, *folded;
    lorasync_config *c    = NULL;
    lorasync_status  status;
    REQUIRE(text);
    status = lorasync_config_parse(text, n, NULL, &c, &err);
    if (strncmp(name, "LORA__", 6) != 0) {
        char type[64];
        snprintf(type, sizeof type, "\"%.*s\"", (int)(strstr(name, "__") - name), name);
        CHECK_FAILS(status, LORASYNC_E_UNSUPPORTED, type);
        free(text);
        num_others++;
        return;
    }
    if (status < 0) fprintf(stderr, "%s: %s\n", name, err.text);
    REQUIRE(c);
    num_lora++;
    set_for(c);
    out = write_config(text, 0, 0);
    if (!out) fprintf(stderr, "%s: %s\n", name, err.text);
    REQUIRE(out);
    if (strncmp(text, "{\n  \"al", 7) == 0 || strncmp(text, "{\n  \"au", 7) == 0 ||
        strncmp(text, "{\n  \"ba", 7) == 0) {
        expected = replaced(text, "\"inference_mode\": false", "\"inference_mode\": true"); /* written by PEFT: only
                                                                                               these may change */
        free(text);
        text = expected;
        if (!lorasync_config_view(c)->target_modules) {
            expected = replaced(text, "\"target_modules\": null", "\"target_modules\": [\n    \"q\"\n  ]");
            free(text);
            text = replaced(expected, "\"target_modules\": \"classifier\"",
                            "\"target_modules\": [\n    \"classifier\"\n  ]");
            free(expected);
        }
        for (n = strlen(text); n && text[n - 1] == '\n'; n--) text[n - 1] = 0;
        if (strcmp(out, text) == 0) num_same++;
    }
    folded = write_config(out, 0, 1);
    CHECK(folded != NULL);
    lorasync_free(NULL, folded);
    folded = write_config(out, 0, 0); /* what was written stays as it is */
    CHECK_TEXT(folded, out);
    lorasync_free(NULL, folded);
    lorasync_free(NULL, out);
    lorasync_config_free(c);
    free(text);
}

static void real_configs(void)
{
    CHECK(each_file(test_path("adapter_configs"), try_config) > 0);
    CHECK_EQ(num_lora, 27);
    CHECK_EQ(num_others, 13);
    printf("     %d LORA configs read, %d others refused, %d written by PEFT come back byte for byte\n", num_lora,
           num_others, num_same);
    CHECK_EQ(num_same, 18); /* the 19th has a pattern that is more than its test tensors */
}

static int num_adapters;

static void try_adapter(const char *path, const char *name)
{
    char                       at[2200];
    char                      *json, *bytes, *out = NULL;
    size_t                     n, num_bytes, num;
    lorasync_config           *c     = NULL;
    lorasync_image            *image = NULL;
    lorasync_status            status;
    lorasync_config_write_desc d;
    snprintf(at, sizeof at, "%s/adapter_config.json", path);
    json = test_read(at, &n);
    REQUIRE(json);
    status = lorasync_config_parse(json, n, NULL, &c, &err);
    free(json);
    if (strcmp(name, "not-lora-unilora") == 0) {
        CHECK_FAILS(status, LORASYNC_E_UNSUPPORTED, "UNILORA");
        return;
    }
    if (strcmp(name, "mlx-transposed-unaligned") == 0) {
        CHECK_FAILS(status, LORASYNC_E_FORMAT, "not a PEFT adapter config");
        return;
    }
    REQUIRE(c);
    snprintf(at, sizeof at, "%s/adapter_model.safetensors", path);
    bytes = test_read(at, &num_bytes);
    REQUIRE(bytes);
    REQUIRE(lorasync_image_parse(bytes, num_bytes, NULL, &image, &err) == LORASYNC_OK);
    num    = image->num_tensors;
    status = lorasync_config_check(c, image->tensors, num, &err);
    if (status < 0) fprintf(stderr, "%s: %s\n", name, err.text);
    CHECK_EQ(status, LORASYNC_OK);
    CHECK_EQ(lorasync_config_check(c, image->tensors, num - 1, &err) < 0,
             strcmp(name, "distilbert-classifier-r8") != 0); /* there the last is a saved module's */
    memset(&d, 0, sizeof d);
    d.config = c;
    CHECK_EQ(lorasync_config_write(&d, image->tensors, num, NULL, &out, &err), LORASYNC_OK);
    lorasync_free(NULL, out);
    d.config = NULL, d.lora_alpha = 16;
    CHECK_EQ(lorasync_config_write(&d, image->tensors, num, NULL, &out, &err), LORASYNC_OK);
    lorasync_free(NULL, out);
    lorasync_image_free(image);
    free(bytes);
    lorasync_config_free(c);
    num_adapters++;
}

static void real_adapters(void)
{
    CHECK(each_file(test_path("adapters"), try_adapter) > 0);
    CHECK_EQ(num_adapters, 13);
}

int main(void)
{
    RUN(json_accepts);
    RUN(json_refuses);
    RUN(json_depth);
    RUN(json_cuts);
    RUN(json_plain);
    RUN(json_utf8);
    RUN(json_strings);
    RUN(json_integers);
    RUN(json_doubles);
    RUN(json_doubles_with_comma);
    RUN(json_put_strings);
    RUN(json_python_form);
    RUN(config_defaults);
    RUN(config_fields);
    RUN(config_refuses);
    RUN(config_rank_patterns);
    RUN(config_long_modules);
    RUN(check_pairs);
    RUN(check_targets);
    RUN(check_ranks);
    RUN(check_bias_and_dora);
    RUN(check_saved);
    RUN(check_embeddings);
    RUN(check_tokens);
    RUN(check_groups);
    RUN(check_dtypes);
    RUN(check_tied);
    RUN(check_names_like_lora);
    RUN(check_layers);
    RUN(config_variants);
    RUN(config_refuses_fields);
    RUN(config_wrapped_lists);
    RUN(check_experts);
    RUN(write_from_tensors);
    RUN(write_ranks);
    RUN(write_targets);
    RUN(write_part);
    RUN(write_part_random);
    RUN(write_refuses);
    RUN(write_overlap);
    RUN(write_from_config);
    RUN(memory_everywhere);
    RUN_ON_DATA("adapter_configs", real_configs);
    RUN_ON_DATA("adapters", real_adapters);
    return test_summary("test_config");
}
