/* Which tensors of an adapter an engine can use: the binding report, what receipts say of it, and versions that are
   refused for it. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "published.h"

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* -- adapters of any tensors */

typedef struct shape {
    const char *key;
    int         ndim;
    int64_t     dims[4];
} shape;

static lorasync_image *make_image(const shape *shapes, size_t num, uint64_t version)
{
    lorasync_tensor     tensors[16];
    lorasync_image_desc desc;
    lorasync_image     *image = NULL;
    lorasync_error      err;
    size_t              i;
    memset(tensors, 0, sizeof tensors);
    memset(&desc, 0, sizeof desc);
    err.text[0] = 0;
    for (i = 0; i < num; i++) {
        tensors[i].name  = shapes[i].key;
        tensors[i].dtype = LORASYNC_F32;
        tensors[i].ndim  = shapes[i].ndim;
        memcpy(tensors[i].shape, shapes[i].dims, sizeof shapes[i].dims);
    }
    desc.tensors     = tensors;
    desc.num_tensors = num;
    desc.adapter     = "policy";
    if (lorasync_image_layout(&desc, NULL, &image, &err) < 0) {
        test_fail(__FILE__, __LINE__, err.text);
        exit(1);
    }
    lorasync_image_bind(image, calloc(1, image->payload_bytes));
    lorasync_image_stamp(image, version, lorasync_image_digest(image, NULL));
    image->config_json = CONFIG;
    return image;
}

#define K "base_model.model."

/* Two layers of q_proj, rank 4, from 16 features to 24. */
static const shape two_layers[] = {
    {K "model.layers.0.q_proj.lora_A.weight", 2, {4, 16, 0, 0}},
    {K "model.layers.0.q_proj.lora_B.weight", 2, {24, 4, 0, 0}},
    {K "model.layers.1.q_proj.lora_A.weight", 2, {4, 16, 0, 0}},
    {K "model.layers.1.q_proj.lora_B.weight", 2, {24, 4, 0, 0}},
};

static lorasync_bind_report report_of(const lorasync_image *image, const lorasync_engine_module *modules, size_t num)
{
    lorasync_bind_report r;
    lorasync_error       err;
    err.text[0] = 0;
    memset(&r, 1, sizeof r);
    if (lorasync_bind(image, modules, num, NULL, &r, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    CHECK_EQ(r.num_tensors, image->num_tensors);
    CHECK_EQ(r.num_bound + r.num_unmatched + r.num_conflicts, r.num_tensors);
    return r;
}

/* Image tensors are sorted by dtype and name. */
static void all_bound(void)
{
    static const lorasync_engine_module modules[] = {{"model.layers.0.q_proj", 16, 24},
                                                     {"model.layers.0.k_proj", 16, 8},
                                                     {"model.layers.1.q_proj", 0, 0},
                                                     {"model.layers.1.k_proj", 0, 0},
                                                     {"lm_head", 16, 100},
                                                     {"x", 0, 0},
                                                     {"y", 0, 0}};
    lorasync_image                     *image     = make_image(two_layers, 4, 1);
    lorasync_bind_report                r         = report_of(image, modules, COUNT(modules));
    char                                text[200];
    CHECK_EQ(r.num_bound, 4);
    CHECK_EQ(r.num_unused, 5);
    CHECK(r.unmatched[0] == NULL && r.conflicts[0].key == NULL && r.num_with_prefix == 0);
    CHECK(r.unused[0] == modules[1].name && r.unused[1] == modules[3].name && r.unused[3] == modules[5].name);
    CHECK_EQ(lorasync_bind_text(&r, text, sizeof text), strlen("4 of 4 tensors are bound"));
    CHECK_TEXT(text, "4 of 4 tensors are bound");
    CHECK_EQ(lorasync_bind_text(&r, text, 4), strlen("4 of 4 tensors are bound")); /* cut, as snprintf does */
    CHECK_TEXT(text, "4 o");
    drop_image(image);
}

static void nothing_listed(void)
{
    lorasync_image      *image = make_image(two_layers, 4, 1);
    lorasync_bind_report r     = report_of(image, NULL, 0);
    CHECK_EQ(r.num_unmatched, 4);
    CHECK_EQ(r.num_with_prefix, 0);
    drop_image(image);
}

/* A module that is missing; names are compared whole. */
static void keys_without_module(void)
{
    static const lorasync_engine_module modules[] = {
        {"model.layers.0.q_proj", 16, 24}, {"model.layers.1.q_proj2", 16, 24}, {"layers.1.q_pro", 16, 24}};
    lorasync_image      *image = make_image(two_layers, 4, 1);
    lorasync_bind_report r     = report_of(image, modules, COUNT(modules));
    char                 text[300];
    CHECK_EQ(r.num_bound, 2);
    CHECK_EQ(r.num_unmatched, 2);
    CHECK_TEXT(r.unmatched[0], K "model.layers.1.q_proj.lora_A.weight");
    CHECK_TEXT(r.unmatched[1], K "model.layers.1.q_proj.lora_B.weight");
    CHECK(r.unmatched[2] == NULL);
    CHECK_EQ(r.num_unused, 2);
    CHECK_EQ(r.num_with_prefix, 0);
    lorasync_bind_text(&r, text, sizeof text);
    CHECK_TEXT(text, "2 of 4 tensors are bound; without a module: " K "model.layers.1.q_proj.lora_A.weight and 1 more");
    drop_image(image);
}

/* What the modules' names have in front: more, less, other; where a part of the model has the same ends as another, the
   one that binds more. */
static void prefixes(void)
{
    static const struct {
        const char *name[2];
        const char *key_prefix, *module_prefix;
        size_t      num;
    } cases[] = {
        {{"layers.0.q_proj", "layers.1.q_proj"}, "model.", "", 4},
        {{"base.model.layers.0.q_proj", "base.model.layers.1.q_proj"}, "", "base.", 4},
        {{"language_model.layers.0.q_proj", "language_model.layers.1.q_proj"}, "model.", "language_model.", 4},
        {{"base_model.model.model.layers.0.q_proj", "base_model.model.model.layers.1.q_proj"}, "", K, 4},
        {{"a.b.layers.0.q_proj", "a.b.layers.9.q_proj"}, "model.", "a.b.", 2},
        {{"shared.q_proj", "shared.k_proj"}, "", "", 0},
        {{"9.layers.0.q_proj", "9.layers.1.q_proj"}, "", "", 0},
        {{"layers.2.q_proj", "layers.3.q_proj"}, "", "", 0},
        {{"layers.0.xq_proj", "layers.1.xq_proj"}, "", "", 0},
    };
    static const lorasync_engine_module vision[] = {
        {"vision.layers.0.q_proj", 16, 24},      {"vision.layers.1.k_proj", 16, 24},
        {"text.model.layers.0.q_proj", 16, 24},  {"text.model.layers.1.q_proj", 16, 24},
        {"audio.model.layers.0.q_proj", 16, 99}, {"audio.model.layers.1.q_proj", 16, 99}};
    lorasync_image      *image = make_image(two_layers, 4, 1);
    lorasync_bind_report r;
    char                 text[400];
    size_t               i;
    for (i = 0; i < COUNT(cases); i++) {
        lorasync_engine_module modules[2];
        memset(modules, 0, sizeof modules);
        modules[0].name = cases[i].name[0];
        modules[1].name = cases[i].name[1];
        r               = report_of(image, modules, 2);
        CHECK_EQ(r.num_bound, 0);
        CHECK_EQ(r.num_with_prefix, cases[i].num);
        CHECK_TEXT(r.key_prefix, cases[i].key_prefix);
        CHECK_TEXT(r.module_prefix, cases[i].module_prefix);
    }
    r = report_of(image, vision, COUNT(vision));
    CHECK_EQ(r.num_with_prefix, 4);
    CHECK_TEXT(r.key_prefix, "");
    CHECK_TEXT(r.module_prefix, "text.");
    lorasync_bind_text(&r, text, sizeof text);
    CHECK_HAS(text, "0 of 4 tensors are bound; with the prefix \"text.\" instead of \"\" it would be 4; without a");
    drop_image(image);
}

/* Shapes, role by role. */
static void shapes(void)
{
    static const shape tensors[] = {
        {K "a.lora_A.weight", 2, {4, 16, 0, 0}},        {K "a.lora_B.weight", 2, {24, 4, 0, 0}},
        {K "b.lora_A.weight", 2, {4, 17, 0, 0}},        {K "b.lora_B.weight", 2, {25, 4, 0, 0}},
        {K "b.lora_B.bias", 1, {25, 0, 0, 0}},          {K "conv.lora_A.weight", 4, {4, 16, 3, 3}},
        {K "conv.lora_B.weight", 4, {24, 4, 1, 1}},     {K "embed.lora_embedding_A", 2, {4, 16, 0, 0}},
        {K "embed.lora_embedding_B", 2, {24, 4, 0, 0}}, {K "head.weight", 2, {24, 16, 0, 0}},
        {K "table.weight", 2, {16, 24, 0, 0}},          {K "wrong.weight", 2, {24, 15, 0, 0}},
        {K "worse.weight", 2, {23, 16, 0, 0}},          {K "head.bias", 1, {7, 0, 0, 0}},
    };
    static const char *const names[] = {"a", "b", "conv", "embed", "head", "table", "wrong", "worse"};
    lorasync_engine_module   modules[COUNT(names)];
    lorasync_image          *image = make_image(tensors, COUNT(tensors), 1);
    lorasync_bind_report     r;
    char                     text[300];
    size_t                   i;
    for (i = 0; i < COUNT(names); i++) modules[i].name = names[i], modules[i].in = 16, modules[i].out = 24;
    r = report_of(image, modules, COUNT(modules));
    CHECK_EQ(r.num_conflicts, 5);
    CHECK_EQ(r.num_unmatched, 0);
    CHECK_EQ(r.num_unused, 0);
    CHECK_TEXT(r.conflicts[0].key, K "b.lora_A.weight");
    CHECK_TEXT(r.conflicts[0].what, "in");
    CHECK_EQ(r.conflicts[0].expected, 16);
    CHECK_EQ(r.conflicts[0].found, 17);
    CHECK_TEXT(r.conflicts[1].key, K "b.lora_B.bias");
    CHECK_TEXT(r.conflicts[1].what, "out");
    CHECK_EQ(r.conflicts[1].found, 25);
    CHECK_TEXT(r.conflicts[3].key, K "worse.weight");
    CHECK(strcmp(r.conflicts[3].what, "out") == 0 && r.conflicts[3].found == 23 && r.conflicts[3].expected == 24);
    lorasync_bind_text(&r, text, sizeof text);
    CHECK_TEXT(text, "9 of 14 tensors are bound; " K "b.lora_A.weight has 17 in features, its module 16 and 4 more");
    for (i = 0; i < COUNT(names); i++) modules[i].in = modules[i].out = 0; /* not known */
    CHECK_EQ(report_of(image, modules, COUNT(modules)).num_bound, COUNT(tensors));
    drop_image(image);
}

static void bad_calls(void)
{
    lorasync_engine_module module = {"a", 0, 0};
    lorasync_image        *image  = make_image(two_layers, 4, 1);
    lorasync_allocator     a;
    lorasync_bind_report   r;
    lorasync_error         err;
    test_memory            m;
    long                   n;
    CHECK_EQ(lorasync_bind(NULL, &module, 1, NULL, &r, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_bind(image, NULL, 1, NULL, &r, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_bind(image, &module, 1, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    module.name = "";
    CHECK_EQ(lorasync_bind(image, &module, 1, NULL, &r, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "modules[0] has no name");
    module.name = "a";
    module.out  = -1;
    CHECK_EQ(lorasync_bind(image, &module, 1, NULL, &r, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "modules[0] has a size below 0");
    CHECK_EQ(lorasync_bind_text(NULL, err.text, 5), 0);
    module.out = 0;
    memset(&m, 0, sizeof m);
    a.alloc = test_memory_alloc;
    a.free  = test_memory_free;
    a.user  = &m;
    for (n = 1; n < 10; n++) {
        m.fail_at = n;
        if (lorasync_bind(image, &module, 1, &a, &r, &err) == LORASYNC_OK) break;
        CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        CHECK_EQ(m.live, 0);
    }
    CHECK_EQ(n, 3);
    CHECK_EQ(m.live, 0);
    drop_image(image);
}

/* -- engines that know their modules */

static lorasync_status offer(lorasync_engine *e, const lorasync_image *image, lorasync_error *err)
{
    lorasync_delivery d;
    memset(&d, 0, sizeof d);
    d.size          = sizeof d;
    d.bytes         = image->header;
    d.num_bytes     = image->header_bytes;
    d.payload       = image->payload;
    d.payload_bytes = image->payload_bytes;
    d.config_json   = image->config_json;
    return lorasync_engine_offer(e, &d, err);
}

static const lorasync_engine_module first_layer[] = {{"model.layers.0.q_proj", 16, 24}};

/* Opened with modules that are gone afterwards. */
static lorasync_engine *open_bound(const lorasync_engine_module *modules, size_t num, size_t require)
{
    lorasync_engine_desc   desc;
    lorasync_engine_module copy[4];
    char                   names[4][64];
    lorasync_engine       *e = NULL;
    lorasync_error         err;
    size_t                 i;
    for (i = 0; i < num; i++) {
        copy[i] = modules[i];
        strcpy(names[i], modules[i].name);
        copy[i].name = names[i];
    }
    memset(&desc, 0, sizeof desc);
    desc.offers_only   = 1;
    desc.modules       = copy;
    desc.num_modules   = num;
    desc.require_bound = require;
    if (lorasync_engine_open(&desc, &e, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    memset(copy, 0, sizeof copy);
    memset(names, 'x', sizeof names);
    return e;
}

static void receipts_count(void)
{
    lorasync_engine *e   = open_bound(first_layer, 1, 0);
    lorasync_image  *one = make_image(two_layers, 4, 1), *two = make_image(two_layers, 4, 2);
    lorasync_image  *three = make_image(two_layers, 2, 3);
    lorasync_receipt r;
    CHECK_EQ(offer(e, one, NULL), 0);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, NULL), 0);
    CHECK(r.num_bound == 2 && r.num_tensors == 4);
    CHECK_EQ(offer(e, two, NULL), 0); /* of the same names: counted once */
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, NULL), 0);
    CHECK(r.version == 2 && r.num_bound == 2 && r.num_tensors == 4);
    CHECK_EQ(offer(e, three, NULL), 0);
    CHECK_EQ(lorasync_engine_receipt(e, "policy", &r, NULL), 0);
    CHECK(r.version == 3 && r.num_bound == 2 && r.num_tensors == 2);
    lorasync_engine_close(e);
    drop_image(one), drop_image(two), drop_image(three);
}

static void too_few_are_refused(void)
{
    static const size_t      require[] = {3, LORASYNC_BIND_ALL};
    static const char *const said[]    = {"requires 3 bound tensors", "requires 4 bound tensors"};
    lorasync_image          *good = make_image(two_layers, 2, 1), *bad = make_image(two_layers, 4, 2);
    const lorasync_adapter  *a;
    lorasync_engine         *e;
    lorasync_error           err;
    size_t                   i;
    for (i = 0; i < 2; i++) {
        e = open_bound(first_layer, 1, require[i]);
        CHECK_EQ(offer(e, good, &err), i == 0 ? LORASYNC_E_BIND : LORASYNC_OK); /* 2 of 2 are all, but not 3 */
        CHECK_EQ(offer(e, bad, &err), LORASYNC_E_BIND);
        CHECK_HAS(err.text, said[i]);
        CHECK_HAS(err.text, "version 2 is refused");
        CHECK_HAS(err.text,
                  "2 of 4 tensors are bound; without a module: " K "model.layers.1.q_proj.lora_A.weight and 1");
        a = lorasync_acquire(e, "policy");
        CHECK(i == 0 ? a == NULL : a && a->version == 1);
        lorasync_release(a);
        lorasync_engine_close(e);
    }
    e = open_bound(first_layer, 1, 2);
    CHECK_EQ(offer(e, bad, &err), 0); /* two are enough */
    lorasync_engine_close(e);
    drop_image(good), drop_image(bad);
}

/* Over shared memory, through a poll: the trainer's side sees how much is bound, or that the engine has refused it. */
static void through_shared_memory(void)
{
    lorasync_shm_desc    sd;
    lorasync_engine_desc ed;
    lorasync_transport   t;
    lorasync_engine     *counts = NULL, *refuses = NULL;
    lorasync_image      *image = make_image(two_layers, 4, 1);
    lorasync_receipt     r[2];
    lorasync_error       err;
    char                 name[64];
    int                  i, of_refusing;
    snprintf(name, sizeof name, "test-bind-%ld", (long)getpid());
    lorasync_shm_remove(name, NULL);
    memset(&sd, 0, sizeof sd);
    memset(&ed, 0, sizeof ed);
    sd.name = ed.shm = name;
    REQUIRE(lorasync_shm_open(&sd, &t, &err) == LORASYNC_OK);
    ed.modules     = first_layer;
    ed.num_modules = 1;
    ed.name        = "counts";
    CHECK_EQ(lorasync_engine_open(&ed, &counts, NULL), 0);
    ed.name          = "refuses";
    ed.require_bound = LORASYNC_BIND_ALL;
    CHECK_EQ(lorasync_engine_open(&ed, &refuses, NULL), 0);
    CHECK_EQ(put(&t, image, &err), 0);
    CHECK_EQ(lorasync_engine_poll(counts, 0, &err), LORASYNC_OK);
    for (i = 0; i < 2; i++) { /* each time */
        CHECK_EQ(lorasync_engine_poll(refuses, 0, &err), LORASYNC_E_BIND);
        CHECK_HAS(err.text, name);
        CHECK_HAS(err.text, "without a module: " K "model.layers.1.q_proj.lora_A.weight");
    }
    CHECK(lorasync_acquire(refuses, "policy") == NULL);
    memset(r, 0, sizeof r);
    for (i = 0; i < 2; i++) CHECK_EQ(t.receipts(t.user, "policy", (size_t)i, &r[i], &err), 0);
    of_refusing = strcmp(r[1].engine, "refuses") == 0;
    CHECK_TEXT(r[of_refusing].engine, "refuses");
    CHECK(r[of_refusing].version == 0 && r[of_refusing].num_bound == -1);
    CHECK(r[!of_refusing].version == 1 && r[!of_refusing].num_bound == 2 && r[!of_refusing].num_tensors == 4);
    lorasync_engine_close(counts);
    lorasync_engine_close(refuses);
    t.close(t.user);
    lorasync_shm_remove(name, NULL);
    drop_image(image);
}

static void engines_refuse(void)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e;
    lorasync_allocator   a;
    lorasync_error       err;
    test_memory          m;
    long                 n;
    memset(&desc, 0, sizeof desc);
    desc.offers_only   = 1;
    desc.require_bound = 1;
    CHECK_EQ(lorasync_engine_open(&desc, &e, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "require_bound is set without modules");
    desc.require_bound = 0;
    desc.modules       = first_layer;
    desc.num_modules   = 1;
    memset(&m, 0, sizeof m);
    a.alloc        = test_memory_alloc;
    a.free         = test_memory_free;
    a.user         = &m;
    desc.allocator = &a;
    for (n = 1; n < 10; n++) {
        m.fail_at = n;
        if (lorasync_engine_open(&desc, &e, &err) == LORASYNC_OK) break;
        CHECK_EQ(err.status, LORASYNC_E_MEMORY);
        CHECK_EQ(m.live, 0);
    }
    CHECK(n > 3 && n < 10);
    lorasync_engine_close(e);
    CHECK_EQ(m.live, 0);
}

int main(void)
{
    RUN(all_bound);
    RUN(nothing_listed);
    RUN(keys_without_module);
    RUN(prefixes);
    RUN(shapes);
    RUN(bad_calls);
    RUN(receipts_count);
    RUN(too_few_are_refused);
    RUN(through_shared_memory);
    RUN(engines_refuse);
    return test_summary("test_bind");
}
