/* What compile proves of a declaration: shapes, from the base weights that any rank holds; and that LoRA lies wherever
   it must. On 1, 2, 4 and 8 ranks. Then random models, cut in random ways over ranks, each with one thing wrong: what
   is published is equal to what it should be, or there is an error; never a difference in silence.

       build/test/test_proof            500 mutations
       build/test/test_proof 10000      as many as one likes; so does LORASYNC_TEST_MUTATIONS=10000
       build/test/test_proof 1 77       the one of seed 77, and what it was */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"

#include <stdint.h>

#define COUNT(x) (sizeof(x) / sizeof(x)[0])

enum {
    MAX_WORLD  = 8,
    MAX_PIECES = 1024,
    POOL       = 1 << 16
};

/* -- one declaration on a few ranks */

typedef struct item {
    char           name[120];
    int            rank;   /* -1: all of them, in parts by rows */
    int            tensor; /* of a random model */
    lorasync_piece piece;
} item;

/* What is declared. */
static struct declaration {
    item            items[MAX_PIECES];
    size_t          num;
    lorasync_desc   desc; /* but for comm */
    lorasync_filter filter;
} now;

/* What came of it. */
static struct outcome {
    lorasync_status       status[MAX_WORLD];
    char                  text[512];
    lorasync_session_info info;
} out;

static float pool[POOL];

static item *declare_on(int rank, const char *name, int ndim, int64_t n0, int64_t n1, int64_t n2)
{
    item *i = &now.items[now.num++];
    memset(i, 0, sizeof *i);
    snprintf(i->name, sizeof i->name, "%s", name);
    i->rank           = rank;
    i->piece.dtype    = LORASYNC_F32;
    i->piece.ndim     = ndim;
    i->piece.shape[0] = n0, i->piece.shape[1] = n1, i->piece.shape[2] = n2;
    i->piece.data = pool;
    return i;
}

static item *declare(const char *name, int64_t rows, int64_t columns)
{
    return declare_on(-1, name, columns ? 2 : 1, rows, columns, 0);
}

/* A pair on a module. */
static void lora(const char *module, int64_t out_features, int64_t in_features)
{
    char name[120];
    snprintf(name, sizeof name, "%s.lora_A.default.weight", module);
    declare(name, 4, in_features);
    snprintf(name, sizeof name, "%s.lora_B.default.weight", module);
    declare(name, out_features, 4);
}

static void begin(const char *config)
{
    memset(&now, 0, sizeof now);
    now.desc.config_json = config;
    now.desc.filter      = &now.filter;
    if (!config) now.desc.lora_alpha = 8;
}

static void story(rank_context *c)
{
    lorasync_desc     d = now.desc;
    lorasync_session *s;
    lorasync_error    err;
    size_t            i;
    memset(&err, 0, sizeof err);
    d.comm = &c->comm, d.timeout_ms = 20000;
    out.status[c->rank] = lorasync_open(&d, &s, &err);
    for (i = 0; s && i < now.num; i++) {
        lorasync_piece p = now.items[i].piece;
        p.name           = now.items[i].name;
        p.box            = lorasync_whole(p.shape, p.ndim);
        if (now.items[i].rank >= 0 && now.items[i].rank != c->rank) continue;
        if (now.items[i].rank < 0) p.box = lorasync_shard(p.box, 0, c->rank, c->world);
        lorasync_add(s, &p, &err); /* a failure is remembered for compile */
    }
    if (s) out.status[c->rank] = lorasync_compile(s, &err);
    if (out.status[c->rank] == LORASYNC_OK) out.status[c->rank] = lorasync_sync(s, 1, NULL, &err);
    if (c->rank == 0) snprintf(out.text, sizeof out.text, "%s", err.text);
    if (c->rank == 0 && s) lorasync_get_info(s, &out.info);
    lorasync_close(s);
}

/* All ranks must come to the same status. */
static lorasync_status run(int world)
{
    int r;
    memset(&out, 0, sizeof out);
    run_threads(world, story, NULL);
    for (r = 1; r < world; r++) CHECK_EQ(out.status[r], out.status[0]);
    return out.status[0];
}

#define CHECK_SAYS(part) CHECK_HAS(out.text, part)

/* It is well, and `proved` modules are proved. */
#define CHECK_PROVED(world, proved)                                                                                    \
    do {                                                                                                               \
        CHECK_EQ(run(world), LORASYNC_OK);                                                                             \
        if (out.status[0]) CHECK_TEXT(out.text, "");                                                                   \
        CHECK_EQ(out.info.num_proved, proved);                                                                         \
    } while (0)

/* It is an error of this status, in which `part` stands. */
#define CHECK_REFUSED(world, expected, part)                                                                           \
    do {                                                                                                               \
        CHECK_EQ(run(world), expected);                                                                                \
        CHECK_SAYS(part);                                                                                              \
    } while (0)

static const int worlds[] = {1, 2, 4, 8};

/* -- shapes */

/* The base weight lies on all ranks, or on any one of them. */
static void linear_shapes(void)
{
    size_t w;
    int    where;
    for (w = 0; w < COUNT(worlds); w++)
        for (where = -1; where < worlds[w]; where++) {
            item *base;
            begin(NULL);
            lora("m.h.0.q", 64, 16);
            base = declare_on(where, "m.h.0.q.base_layer.weight", 2, 64, 16, 0);
            CHECK_PROVED(worlds[w], 1);
            base->piece.shape[0] = 16; /* rows of B */
            CHECK_REFUSED(worlds[w], LORASYNC_E_LAYOUT, "module \"m.h.0.q\": its lora_B has 64 rows");
            CHECK_SAYS("base weight was declared with shape [16, 16]");
            base->piece.shape[0] = 64, base->piece.shape[1] = 32; /* columns of A */
            CHECK_REFUSED(worlds[w], LORASYNC_E_LAYOUT, "its lora_A 16 columns");
            now.desc.allow_shapes = 1;
            CHECK_PROVED(worlds[w], 0);
        }
}

/* One rank's rows passed as the whole tensor. */
static void local_shape(void)
{
    size_t w;
    for (w = 1; w < COUNT(worlds); w++) {
        begin(NULL);
        lora("m.h.0.q", 64, 16);
        now.items[1].piece.shape[0] = 64 / worlds[w];
        declare("m.h.0.q.base_layer.weight", 64, 16);
        CHECK_REFUSED(worlds[w], LORASYNC_E_LAYOUT, "module \"m.h.0.q\"");
    }
}

static void turned_round(void)
{
    static const char *const configs[] = {
        "{\"peft_type\":\"LORA\",\"r\":4,\"fan_in_fan_out\":true,\"target_modules\":[\"q\"]}",
        "{\"peft_type\":\"LORA\",\"r\":4,\"fan_in_fan_out\":false,\"target_modules\":[\"q\"]}", NULL};
    size_t i;
    for (i = 0; i < COUNT(configs); i++) {
        begin(configs[i]);
        lora("m.h.0.q", 64, 16);
        declare("m.h.0.q.weight", 16, 64);
        if (i == 1) CHECK_REFUSED(2, LORASYNC_E_LAYOUT, "module \"m.h.0.q\"");
        else CHECK_PROVED(2, 1);
    }
}

static void embeddings(void)
{
    begin("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"embed\"]}");
    declare("m.embed.lora_embedding_A.default", 4, 100);
    declare("m.embed.lora_embedding_B.default", 32, 4);
    declare("m.embed.base_layer.weight", 100, 32);
    CHECK_PROVED(4, 1);
    now.items[0].piece.shape[1] = 96;
    CHECK_REFUSED(4, LORASYNC_E_LAYOUT, "its lora_embedding_A has 96 columns and its lora_embedding_B 32 rows");
    CHECK_SAYS("[100, 32]");
}

static item *shaped(item *i, int64_t n3)
{
    i->piece.shape[i->piece.ndim++] = n3;
    return i;
}

/* Grouped or not: A has all input channels, B a group's part of the rank. */
static void convolutions(void)
{
    int groups;
    for (groups = 1; groups <= 4; groups *= 2) {
        item *base;
        begin(NULL);
        shaped(declare_on(-1, "m.conv.lora_A.default.weight", 3, 4, 16, 3), 5);
        shaped(declare_on(-1, "m.conv.lora_B.default.weight", 3, 32, 4 / groups, 1), 1);
        base = shaped(declare_on(-1, "m.conv.base_layer.weight", 3, 32, 16 / groups, 3), 5);
        CHECK_PROVED(2, 1);
        base->piece.shape[3] = 3;
        CHECK_REFUSED(2, LORASYNC_E_LAYOUT, "the kernel of a convolution");
        base->piece.shape[3] = 5, base->piece.shape[1] = 8 / groups;
        CHECK_REFUSED(2, LORASYNC_E_LAYOUT, "its lora_A 16 columns");
        base->piece.shape[1] = 16 / groups, base->piece.shape[0] = 16;
        CHECK_REFUSED(2, LORASYNC_E_LAYOUT, "its lora_B has 32 rows");
    }
}

/* Both parameters of experts have LoRA, one around the other; A and B have all experts' ranks side by side. */
static void experts(void)
{
    static const char config[] = "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[],\"target_parameters\":"
                                 "[\"mlp.experts.gate_up_proj\",\"mlp.experts.down_proj\"]}";
    size_t            w;
    for (w = 0; w < COUNT(worlds); w++) {
        begin(config);
        declare("m.0.mlp.experts.base_layer.lora_A.default.weight", 32, 16);
        declare("m.0.mlp.experts.base_layer.lora_B.default.weight", 48, 32);
        declare("m.0.mlp.experts.lora_A.default.weight", 32, 24);
        declare("m.0.mlp.experts.lora_B.default.weight", 16, 32);
        declare_on(-1, "m.0.mlp.experts.base_layer.base_layer.gate_up_proj", 3, 8, 48, 16);
        declare_on(-1, "m.0.mlp.experts.base_layer.base_layer.down_proj", 3, 8, 24, 16); /* transposed */
        CHECK_PROVED(worlds[w], 2);
        now.items[5].piece.shape[1] = 32;
        CHECK_REFUSED(worlds[w], LORASYNC_E_LAYOUT, "module \"m.0.mlp.experts\"");
        now.items[5].piece.shape[0] = 5;
        CHECK_REFUSED(worlds[w], LORASYNC_E_LAYOUT, "module \"m.0.mlp.experts\"");
        now.num -= 1; /* a rank knows of one of them only */
        now.items[2].piece.shape[1] = 16, now.items[3].piece.shape[0] = 48;
        CHECK_PROVED(worlds[w], 2);
    }
}

/* What proves nothing: weights that are packed, flattened, or elsewhere; base parameters without a usable shape. */
static void nothing_to_prove(void)
{
    size_t i;
    for (i = 0; i < 6; i++) {
        item *base;
        begin(NULL);
        lora("m.h.0.q", 64, 16);
        base = declare("m.h.0.q.weight", 512, 1);
        switch (i) {
        case 0: base->piece.dtype = LORASYNC_U8; break;
        case 1: base->piece.ndim = 1; break;
        case 2: base->piece.ndim = 1, base->piece.shape[0] = 0; break;
        case 3: base->piece.ndim = 0; break;
        case 4: base->piece.ndim = 99; break;
        default: base->piece.shape[0] = -1; break;
        }
        CHECK_PROVED(2, 0);
    }
}

/* What is published beside LoRA. */
static void other_tensors(void)
{
    static const char config[] = "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\"],\"bias\":\"all\","
                                 "\"modules_to_save\":[\"head\"],\"trainable_token_indices\":[1,2]}";
    begin(config);
    lora("m.h.0.q", 64, 16);
    declare("m.h.0.q.base_layer.weight", 64, 16);
    declare("m.h.0.q.base_layer.bias", 64, 0);
    declare("head.modules_to_save.default.weight", 10, 16);
    declare("head.original_module.weight", 10, 16);
    declare("m.embed.token_adapter.trainable_tokens_delta.default", 2, 16);
    declare("m.embed.token_adapter.base_layer.weight", 100, 16);
    CHECK_PROVED(4, 1);
    now.items[3].piece.shape[0] = 16;
    CHECK_REFUSED(4, LORASYNC_E_LAYOUT, "its bias has 16 elements");
    now.items[3].piece.shape[0] = 64, now.items[4].piece.shape[0] = 5;
    CHECK_REFUSED(4, LORASYNC_E_LAYOUT, "parameter \"head.weight\": what is saved has 5 rows");
    now.items[4].piece.shape[0] = 10, now.items[6].piece.shape[1] = 8;
    CHECK_REFUSED(4, LORASYNC_E_LAYOUT, "its trainable tokens have 8 columns");
    now.items[6].piece.shape[1] = 16;
    CHECK_PROVED(4, 1);
}

/* Base weights and an adapter in one session. */
static void with_base(void)
{
    begin(NULL);
    now.filter.base = 1;
    lora("m.h.0.q", 64, 16);
    declare("m.h.0.q.weight", 64, 16);
    declare("m.h.1.q.weight", 64, 16);
    CHECK_PROVED(4, 1);
    now.items[2].piece.shape[0] = 32;
    CHECK_REFUSED(4, LORASYNC_E_LAYOUT, "its lora_B has 64 rows");
    now.items[0] = now.items[2], now.items[1] = now.items[3], now.num = 2; /* base weights alone */
    CHECK_PROVED(4, 0);
}

/* -- holes */

#define LIST(more) "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"v\"]" more "}"

/* Layers 0 to 3 with q, k and v; LoRA on q and v, but where bit layer * 2 of `holes` says so, q first. */
static void layers(unsigned holes, int where)
{
    int i, k;
    for (i = 0; i < 4; i++)
        for (k = 0; k < 3; k++) {
            char module[60], weight[80];
            snprintf(module, sizeof module, "m.h.%d.%c", i, "qvk"[k]);
            snprintf(weight, sizeof weight, "%s.weight", module);
            declare_on(where, weight, 2, 8, 16, 0);
            if (k < 2 && !(holes >> (2 * i + k) & 1)) lora(module, 8, 16);
        }
}

/* The same without base weights. */
static void layers_alone(unsigned holes)
{
    size_t i, kept = 0;
    layers(holes, -1);
    for (i = 0; i < now.num; i++)
        if (strstr(now.items[i].name, "lora")) now.items[kept++] = now.items[i];
    now.num = kept;
}

static void holes_in_lists(void)
{
    static const char *const configs[] = {LIST(""),
                                          NULL,
                                          NULL,
                                          "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\".*\\\\.(q|v)\"}",
                                          "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\"all-linear\"}",
                                          "{\"peft_type\":\"LORA\",\"r\":4}"};
    static const char *const list[]    = {"q", "v"};
    size_t                   i, w;
    int                      where;
    for (i = 0; i < COUNT(configs); i++)
        for (w = 0; w < COUNT(worlds); w++)
            for (where = -1; where<worlds[w]; where += worlds[w]> 2 ? 3 : 1) {
                begin(configs[i]);
                if (i == 2) now.filter.target_modules = list, now.filter.num_target_modules = 2;
                layers(0, where);
                CHECK_PROVED(worlds[w], 8);
                now.num = 0;
                layers(1u << 4 | 1u << 5 | 1u << 7, where); /* q and v of layer 2, v of layer 3 */
                CHECK_REFUSED(worlds[w], LORASYNC_E_EMPTY, "the first is \"m.h.2.q\"");
                CHECK_SAYS("3 of the modules that must have LoRA");
                now.desc.allow_missing = 1;
                CHECK_PROVED(worlds[w], 5);
                now.desc.allow_missing = 0;
                now.num                = 0;
                layers(0xaa, where); /* no v at all: only lists know that it must be there */
                if (i == 1 || i > 3) CHECK_PROVED(worlds[w], 4);
                else CHECK_REFUSED(worlds[w], LORASYNC_E_EMPTY, "the first is \"m.h.0.v\"");
            }
}

/* Modules without LoRA that are said to be so. */
static void legitimate_holes(void)
{
    static const char *const configs[] = {
        LIST(",\"exclude_modules\":[\"h.2.q\",\"h.2.v\",\"h.3.v\"]"),
        LIST(",\"exclude_modules\":\".*(2\\\\..|3\\\\.v)\""),
        "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"h.0.q\",\"h.0.v\",\"h.1.q\",\"h.1.v\",\"h.3.q\"]}",
        LIST(",\"modules_to_save\":[\"h.2\",\"h.3.v\"]"),
        NULL,
        NULL};
    static const char *const left_out[] = {"h.2.q", "h.2.v", "h.3.v"};
    static const char *const named[]    = {"h.0.q", "h.0.v", "h.1.q", "h.1.v", "h.3.q"};
    size_t                   i, w;
    for (i = 0; i < COUNT(configs); i++)
        for (w = 0; w < COUNT(worlds); w++) {
            begin(configs[i]);
            if (i == 4) now.filter.exclude_modules = left_out, now.filter.num_exclude_modules = 3;
            if (i == 5) now.filter.target_modules = named, now.filter.num_target_modules = 5;
            layers(1u << 4 | 1u << 5 | 1u << 7, -1);
            if (i == 3) { /* saved: they are published whole */
                size_t k;
                for (k = 0; k < now.num; k++)
                    if (strstr(now.items[k].name, "h.2.") || strstr(now.items[k].name, "h.3.v"))
                        snprintf(strstr(now.items[k].name, "weight"), 30, "original_module.weight");
            }
            CHECK_PROVED(worlds[w], 5);
        }
    begin(LIST(",\"layers_to_transform\":[0,1,3],\"layers_pattern\":\"h\""));
    layers(1u << 4 | 1u << 5, -1);
    CHECK_PROVED(4, 6);
    now.num = 0;
    layers(1u << 4 | 1u << 5 | 1u << 7, -1);
    CHECK_REFUSED(4, LORASYNC_E_EMPTY, "1 of the modules that must have LoRA");
    CHECK_SAYS("\"m.h.3.v\"");
}

/* A pipeline stage, or an expert parallel rank, that leaves its LoRA out; and one that knows only its own part. */
static void holes_of_ranks(void)
{
    size_t w;
    int    e, skip;
    for (w = 0; w < COUNT(worlds); w++)
        for (skip = -1; skip < worlds[w]; skip++) {
            begin(NULL);
            for (e = 0; e < 2 * worlds[w]; e++) {
                char name[120];
                snprintf(name, sizeof name, "m.0.experts.%d.up.weight", e);
                declare_on(e / 2, name, 2, 8, 16, 0);
                if (e / 2 == skip) continue;
                snprintf(name, sizeof name, "m.0.experts.%d.up.lora_A.default.weight", e);
                declare_on(e / 2, name, 2, 4, 16, 0);
                snprintf(name, sizeof name, "m.0.experts.%d.up.lora_B.default.weight", e);
                declare_on(e / 2, name, 2, 8, 4, 0);
            }
            if (skip < 0) {
                CHECK_PROVED(worlds[w], 2 * worlds[w]);
            } else if (worlds[w] == 1) {
                CHECK_EQ(run(1), LORASYNC_E_EMPTY); /* nothing at all */
            } else {
                char first[100];
                snprintf(first, sizeof first, "2 of the modules that must have LoRA, with base weights on rank %d",
                         skip);
                CHECK_REFUSED(worlds[w], LORASYNC_E_EMPTY, first);
            }
        }
}

/* Without base weights, numbers tell: layers, and modules of one, that are left out between others. */
static void numbers_left_out(void)
{
    static const char *const configs[] = {
        NULL, LIST(""), LIST(",\"layers_to_transform\":[0,1,3],\"layers_pattern\":\"h\""),
        "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"h.0.q\",\"h.0.v\",\"h.1.q\",\"h.1.v\","
        "\"h.3.q\",\"h.3.v\"]}"};
    const unsigned whole = 1u << 4 | 1u << 5, half = 1u << 5; /* layer 2; its v */
    size_t         i;
    for (i = 0; i < COUNT(configs); i++) {
        begin(configs[i]);
        layers_alone(0);
        if (i < 2) CHECK_PROVED(2, 0);
        now.num = 0;
        layers_alone(whole);
        if (i < 2) CHECK_REFUSED(4, LORASYNC_E_EMPTY, "2 modules are left out where those before and behind have LoRA");
        else CHECK_PROVED(4, 0);
        now.desc.allow_missing = 1;
        CHECK_PROVED(4, 0);
        now.desc.allow_missing = 0;
        declare_on(1, "m.h.2.norm.weight", 1, 16, 0, 0); /* a rank knows the layer: it has neither q nor v */
        CHECK_PROVED(4, 0);
        now.num = 0;
        layers_alone(half);
        if (i < 2) CHECK_REFUSED(4, LORASYNC_E_EMPTY, "the first is \"m.h.2.v\"");
    }
    { /* layers of two kinds, and a list of unlike modules */
        begin(NULL);
        lora("m.h.0.mamba.in", 8, 16), lora("m.h.0.up", 8, 16);
        lora("m.h.1.attn.q", 8, 16), lora("m.h.1.up", 8, 16);
        lora("m.h.2.mamba.in", 8, 16), lora("m.h.2.up", 8, 16);
        lora("m.merge.0", 8, 16), lora("m.merge.2", 8, 16);
        CHECK_PROVED(4, 0);
        now.num = 0; /* an expert of each layer */
        lora("m.h.0.experts.0.up", 8, 16), lora("m.h.0.experts.1.up", 8, 16), lora("m.h.0.experts.3.up", 8, 16);
        lora("m.h.1.experts.0.up", 8, 16), lora("m.h.1.experts.1.up", 8, 16), lora("m.h.1.experts.3.up", 8, 16);
        CHECK_REFUSED(4, LORASYNC_E_EMPTY, "2 modules are left out");
    }
}

/* LoRA on a layer that no rank knows, while there is such a module in others. */
static void unknown_layers(void)
{
    size_t w;
    for (w = 0; w < COUNT(worlds); w++) {
        begin(NULL);
        lora("m.h.0.q", 8, 16);
        declare_on(worlds[w] - 1, "m.h.0.q.weight", 2, 8, 16, 0);
        lora("m.h.1.q", 8, 16);
        CHECK_REFUSED(worlds[w], LORASYNC_E_NAME, "LoRA lies on 1 modules of which no rank");
        CHECK_SAYS("\"m.h.1.q\"");
        now.desc.allow_missing = 1;
        CHECK_PROVED(worlds[w], 1);
        now.desc.allow_missing                                                 = 0;
        declare_on(worlds[w] / 2, "m.h.1.q.qweight", 2, 2, 16, 0)->piece.dtype = LORASYNC_I32;
        CHECK_PROVED(worlds[w], 1); /* packed, but there */
        lora("m.lm_head", 8, 16);   /* tied: it has no weight of its own */
        CHECK_PROVED(worlds[w], 1);
    }
}

/* What is missing may be added, and compile called again. */
static void added_later(void)
{
    lorasync_desc     d;
    lorasync_session *s;
    lorasync_error    err;
    size_t            i;
    begin(NULL);
    layers(2, -1);
    memset(&d, 0, sizeof d);
    d.lora_alpha = 8;
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
    for (i = 0; i < now.num + 2; i++) {
        lorasync_piece p;
        if (i == now.num) {
            CHECK_EQ(lorasync_compile(s, &err), LORASYNC_E_EMPTY);
            CHECK_HAS(err.text, "the first is \"m.h.0.v\"");
            lora("m.h.0.v", 8, 16), now.num -= 2;
        }
        p      = now.items[i].piece;
        p.name = now.items[i].name;
        p.box  = lorasync_whole(p.shape, p.ndim);
        CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
    }
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
    lorasync_close(s);
}

/* -- random models: what a trainer should declare

   A model is a list of tensors with all their elements. Each rank has boxes of them, as one of the ways to train has
   it. Elements are told from all others by their values. */

enum {
    MAX_TENSORS = 200,
    MEMORY      = 1 << 22 /* floats of all ranks */
};

typedef struct tensor {
    char    name[120];
    int     ndim, is_base, module, layer, expert; /* expert -1: none */
    int64_t shape[4], numel;
    int     by_rows, by_columns; /* how tensor parallel ranks cut it; neither: they all have it */
} tensor;

typedef enum way {
    DDP,
    FSDP,
    HSDP,
    ZERO3,
    TP,
    MEGATRON,
    PP,
    PP_FSDP,
    EP,
    NUM_WAYS
} way;

static const char *const way_names[] = {"DDP", "FSDP", "HSDP", "ZeRO-3", "TP", "Megatron", "PP", "PP and FSDP", "EP"};

static struct model {
    unsigned long long seed;
    int                world, layers, experts, r, num_modules;
    way                how;
    tensor             tensors[MAX_TENSORS];
    int                num_tensors;
    char               config[2048];
    int                with_config; /* 0: none, 1: a list, 2: a pattern */
} model;

static item   correct[MAX_PIECES * 4], mutant[MAX_PIECES * 4];
static size_t num_correct, num_mutant;
static float  memory[MEMORY];
static size_t memory_used;

static unsigned long long dice;

static int below(int n) { return (int)(test_random(&dice) % (unsigned)n); }
static int chance(int one_in) { return below(one_in) == 0; }

static void put_tensor(const char *module, const char *leaf, int is_base, int ndim, int64_t n0, int64_t n1)
{
    tensor *t = &model.tensors[model.num_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s.%s", module, leaf);
    t->ndim = ndim, t->shape[0] = n0, t->shape[1] = n1;
    t->numel   = ndim == 2 ? n0 * n1 : n0;
    t->is_base = is_base, t->module = model.num_modules;
    t->layer = t->expert = -1;
    sscanf(module, "model.layers.%d.mlp.experts.%d", &t->layer, &t->expert);
}

/* A module with its base weight and, if it is trained, a pair. column: its rows are what tensor parallel ranks share
   out; else its columns. */
static void put_module(const char *module, int64_t rows, int64_t columns, int trained, int column)
{
    int     first = model.num_tensors, i;
    int64_t r     = model.r;
    put_tensor(module, trained ? "base_layer.weight" : "weight", 1, 2, rows, columns);
    if (trained) put_tensor(module, "lora_A.default.weight", 0, 2, r, columns);
    if (trained) put_tensor(module, "lora_B.default.weight", 0, 2, rows, r);
    for (i = first; i < model.num_tensors; i++) {
        const int is_b = i == first + 2, is_a = i == first + 1;
        model.tensors[i].by_rows    = column ? !is_a : is_b && model.how == MEGATRON;
        model.tensors[i].by_columns = !column && !is_b;
        if (column && is_a && model.how == MEGATRON) model.tensors[i].by_rows = 1;
    }
    model.num_modules++;
}

static void put_layer(int layer, unsigned targets, const int64_t *n)
{
    static const char *const names[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    char                     module[80];
    int                      i, e;
    for (i = 0; i < 4; i++) {
        snprintf(module, sizeof module, "model.layers.%d.self_attn.%s", layer, names[i]);
        put_module(module, n[i], i == 3 ? n[0] : n[4], targets >> i & 1, i != 3);
    }
    for (e = 0; e < model.experts; e++) {
        snprintf(module, sizeof module, "model.layers.%d.mlp.experts.%d.up_proj", layer, e);
        put_module(module, n[5], n[4], targets >> 4 & 1, 1);
    }
    snprintf(module, sizeof module, "model.layers.%d.norm", layer);
    put_tensor(module, "weight", 1, 1, n[4], 0);
    model.num_modules++;
}

/* The trainer's config: a list, a pattern, or none. */
static void put_config(unsigned targets)
{
    static const char *const names[] = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"};
    const char              *quote = model.with_config == 1 ? "\"" : "", *comma = model.with_config == 1 ? "," : "|";
    char                    *to = model.config;
    int                      i, num = 0;
    to += sprintf(to, "{\"peft_type\":\"LORA\",\"r\":%d,\"lora_alpha\":%d,\"target_modules\":%s", model.r, 2 * model.r,
                  model.with_config == 1 ? "[" : "\".*\\\\.(");
    for (i = 0; i < 5; i++)
        if (targets >> i & 1) to += sprintf(to, "%s%s%s%s", num++ ? comma : "", quote, names[i], quote);
    sprintf(to, "%s}", model.with_config == 1 ? "]" : ")\"");
}

/* Makes the model of a seed: its tensors and how they are trained. */
static void make_model(unsigned long long seed)
{
    int64_t  n[6];
    unsigned targets = 0;
    int      i;
    memset(&model, 0, sizeof model);
    dice = model.seed = seed;
    model.world       = 1 << below(4);
    model.how         = (way)below(NUM_WAYS);
    model.layers      = 2 + below(3);
    model.experts     = chance(2) || model.how == EP ? 2 + 2 * below(3) : 0;
    model.r           = 8;
    model.with_config = below(3);
    for (i = 0; i < 6; i++) n[i] = 8 * (1 + below(3) + 3 * i); /* no two alike */
    while (!(targets & 15)) targets = (unsigned)below(16) | (model.experts ? (unsigned)below(2) << 4 : 0);
    for (i = 0; i < model.layers; i++) put_layer(i, targets, n);
    put_module("lm_head", 80, n[4], 0, 1);
    put_config(targets);
}

/* The box that a rank has of a tensor, or one without elements. */
static lorasync_box box_of(const tensor *t, int rank)
{
    const int          world = model.world, half = world > 1 ? world / 2 : 1;
    const lorasync_box whole = lorasync_whole(t->shape, t->ndim);
    const int          layer = t->layer < 0 ? 0 : t->layer;
    switch (model.how) {
    case FSDP: return lorasync_shard(whole, 0, rank, world);
    case HSDP: return lorasync_shard(whole, 0, rank % half, half);
    case ZERO3: return lorasync_flat_shard(t->numel, rank, world);
    case TP:
    case MEGATRON:
        if (t->by_rows) return lorasync_even(whole, 0, rank, world);
        return t->by_columns ? lorasync_even(whole, 1, rank, world) : whole;
    case PP: return layer * world / model.layers == rank ? whole : lorasync_none(t->ndim);
    case PP_FSDP:
        if (world == 1 || layer * 2 / model.layers != rank / half) return world > 1 ? lorasync_none(t->ndim) : whole;
        return lorasync_shard(whole, 0, rank % half, half);
    case EP: return t->expert < 0 || t->expert % world == rank ? whole : lorasync_none(t->ndim);
    default: return whole;
    }
}

/* The value of element k of tensor t. */
static float value_of(int t, int64_t k)
{
    unsigned long long state = (unsigned long long)t << 32 | (unsigned long long)k;
    return (float)(test_random(&state) & 0xffff) / 65536.0f + 0.5f;
}

/* Copies what a box holds, row by row. */
static void fill_box(int t, const lorasync_box *box, float *to)
{
    const tensor *x = &model.tensors[t];
    int64_t       i, j, columns = x->ndim == 2 ? x->shape[1] : 1;
    if (box->flat || x->ndim == 1) {
        for (i = 0; i < box->len[0]; i++) *to++ = value_of(t, box->off[0] + i);
        return;
    }
    for (i = 0; i < box->len[0]; i++)
        for (j = 0; j < box->len[1]; j++) *to++ = value_of(t, (box->off[0] + i) * columns + box->off[1] + j);
}

static int64_t box_elements(const lorasync_box *b)
{
    return b->flat || b->ndim == 1 ? b->len[0] : b->len[0] * b->len[1];
}

/* Adds what a rank has of tensor t. */
static void put_piece(int t, int rank)
{
    const tensor *x = &model.tensors[t];
    lorasync_box  b = box_of(x, rank);
    item         *i = &correct[num_correct];
    int64_t       n = box_elements(&b);
    if (!n) return;
    memset(i, 0, sizeof *i);
    memcpy(i->name, x->name, sizeof i->name);
    i->rank = rank, i->tensor = t;
    i->piece.dtype = LORASYNC_F32, i->piece.ndim = x->ndim, i->piece.box = b;
    memcpy(i->piece.shape, x->shape, sizeof x->shape);
    num_correct++;
    i->piece.data = pool;
    if (x->is_base) return; /* nobody reads it */
    i->piece.data = memory + memory_used;
    fill_box(t, &b, memory + memory_used);
    memory_used += (size_t)n * 2 + 16; /* a wider dtype reads on */
}

static void make_pieces(void)
{
    int t, rank;
    num_correct = memory_used = 0;
    for (rank = 0; rank < model.world; rank++)
        for (t = 0; t < model.num_tensors; t++) put_piece(t, rank);
    if (num_correct > COUNT(correct) || memory_used > MEMORY) test_fail(__FILE__, __LINE__, "a model is too large");
}

/* -- what is published of it */

typedef struct published {
    lorasync_status status;
    char            text[512], config[4096];
    unsigned char   bytes[1 << 19]; /* name, shape and elements of each tensor */
    size_t          num_bytes;
} published;

static published good, bad;

/* What one rank is told in place of what all are told. */
typedef struct telling {
    lorasync_desc desc;
    char          config[2048];
} telling;

static struct plot {
    const item *items;
    size_t      num;
    telling     all, one; /* one: for the rank `other` */
    int         other;    /* -1: none */
    published  *out;
} plot;

static void note_bytes(published *p, const void *bytes, size_t n)
{
    if (p->num_bytes + n > sizeof p->bytes) {
        test_fail(__FILE__, __LINE__, "too much is published");
        return;
    }
    memcpy(p->bytes + p->num_bytes, bytes, n);
    p->num_bytes += n;
}

static void note_image(const lorasync_image *image, published *p)
{
    size_t i;
    for (i = 0; i < image->num_tensors; i++) {
        const lorasync_tensor *t = &image->tensors[i];
        note_bytes(p, t->name, strlen(t->name) + 1);
        note_bytes(p, &t->dtype, sizeof t->dtype);
        note_bytes(p, t->shape, (size_t)t->ndim * sizeof t->shape[0]);
        note_bytes(p, t->data, t->num_bytes);
    }
    snprintf(p->config, sizeof p->config, "%s", image->config_json ? image->config_json : "");
}

/* The elements of every tensor that is published, one by one, as the model has them. */
static void check_reference(const lorasync_image *image)
{
    size_t  i, found = 0;
    int     t;
    int64_t k;
    for (t = 0; t < model.num_tensors; t++)
        for (i = 0; i < image->num_tensors && !model.tensors[t].is_base; i++) {
            lorasync_name name;
            if (lorasync_parse_name(model.tensors[t].name, &name, NULL) < 0) continue;
            if (strcmp(name.key, image->tensors[i].name) != 0) continue;
            for (k = 0; k < model.tensors[t].numel; k++)
                if (((const float *)image->tensors[i].data)[k] != value_of(t, k)) {
                    test_fail(__FILE__, __LINE__, name.key);
                    break;
                }
            found++;
        }
    CHECK_EQ(found, image->num_tensors);
}
static void mutant_story(rank_context *c)
{
    const telling    *told = c->rank == plot.other ? &plot.one : &plot.all;
    lorasync_desc     d    = told->desc;
    lorasync_session *s;
    lorasync_error    err;
    lorasync_status   status;
    size_t            i;
    memset(&err, 0, sizeof err);
    d.comm = &c->comm, d.timeout_ms = 20000;
    d.config_json = told->config[0] ? told->config : NULL;
    status        = lorasync_open(&d, &s, &err);
    for (i = 0; s && i < plot.num; i++) {
        lorasync_piece p = plot.items[i].piece;
        p.name           = plot.items[i].name;
        if (plot.items[i].rank == c->rank) lorasync_add(s, &p, &err); /* a failure is remembered for compile */
    }
    if (s) status = lorasync_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_sync(s, 1, NULL, &err);
    out.status[c->rank] = status;
    if (c->rank == 0) {
        plot.out->status = status;
        snprintf(plot.out->text, sizeof plot.out->text, "%s", err.text);
        if (status == LORASYNC_OK) note_image(lorasync_session_image(s), plot.out);
        if (status == LORASYNC_OK && plot.out == &good) check_reference(lorasync_session_image(s));
    }
    lorasync_close(s);
}

static void publish(const item *items, size_t num, published *into)
{
    int r;
    into->status    = LORASYNC_OK;
    into->num_bytes = 0;
    into->text[0] = into->config[0] = 0;
    plot.items = items, plot.num = num, plot.out = into;
    run_threads(model.world, mutant_story, NULL);
    for (r = 1; r < model.world; r++) CHECK_EQ(out.status[r], out.status[0]);
}

static void tell_all(void)
{
    memset(&plot, 0, sizeof plot);
    plot.other = -1;
    if (model.with_config) memcpy(plot.all.config, model.config, sizeof plot.all.config);
    else plot.all.desc.lora_alpha = 2 * model.r;
    plot.one = plot.all;
}

/* -- one thing wrong */

static char what[400]; /* was done */

/* The pieces that a mutation is about. */
static struct scope {
    size_t at[MAX_PIECES];
    size_t num;
    int    tensor; /* of the first */
} scope;

static int same_module(int a, int b) { return model.tensors[a].module == model.tensors[b].module; }

/* Picks one piece; all of its tensor; all of its module's LoRA, or, of a base weight, just all of that. */
static void pick(int base)
{
    size_t first, i;
    int    width = below(3);
    scope.num    = 0;
    do first = (size_t)below((int)num_mutant);
    while (model.tensors[mutant[first].tensor].is_base != base);
    scope.tensor = mutant[first].tensor;
    for (i = 0; i < num_mutant; i++) {
        const int t = mutant[i].tensor;
        if (width == 0           ? i != first
            : width == 1 || base ? t != scope.tensor
                                 : model.tensors[t].is_base || !same_module(t, scope.tensor))
            continue;
        scope.at[scope.num++] = i;
    }
    snprintf(what, sizeof what, "%s of %s: ",
             width == 0           ? "one piece"
             : width == 1 || base ? "all pieces"
                                  : "the pair",
             model.tensors[scope.tensor].name);
}

static item *scoped(size_t i) { return &mutant[scope.at[i]]; }

static void say(const char *format, ...)
{
    va_list list;
    size_t  n = strlen(what);
    va_start(list, format);
    vsnprintf(what + n, sizeof what - n, format, list);
    va_end(list);
}

/* Puts `to` in place of the first `from` in the names. */
static void rename_scope(const char *from, const char *to)
{
    size_t i;
    say("\"%s\" in the name becomes \"%s\"", from, to);
    for (i = 0; i < scope.num; i++) {
        char *name = scoped(i)->name, *at = strstr(name, from), rest[120];
        if (!at) continue;
        snprintf(rest, sizeof rest, "%s", at + strlen(from));
        snprintf(at, sizeof scoped(i)->name - (size_t)(at - name), "%s%s", to, rest);
    }
}

/* A letter is dropped, doubled or another. */
static void typo(int base)
{
    const char *name;
    int         at, how = below(3);
    size_t      i;
    pick(base);
    name = model.tensors[scope.tensor].name;
    do at = below((int)strlen(name));
    while (name[at] == '.' || (name[at] >= '0' && name[at] <= '9'));
    say("typo %d at byte %d", how, at);
    for (i = 0; i < scope.num; i++) {
        char *x = scoped(i)->name;
        if ((int)strlen(x) <= at) continue;
        if (how == 0) memmove(x + at, x + at + 1, strlen(x + at));
        else if (how == 1) memmove(x + at + 1, x + at, strlen(x + at) + 1);
        else x[at] = x[at] == 'x' ? 'y' : 'x';
    }
}

/* Another layer, or expert; there or not. */
static void wrong_number(int base)
{
    const tensor *t;
    char          from[40], to[40];
    int           expert, old;
    pick(base);
    t      = &model.tensors[scope.tensor];
    expert = t->expert >= 0 && chance(2), old = expert ? t->expert : t->layer;
    snprintf(from, sizeof from, expert ? "experts.%d." : "layers.%d.", old);
    snprintf(to, sizeof to, expert ? "experts.%d." : "layers.%d.", old + (chance(2) && old ? -1 : 1 + below(3)));
    rename_scope(from, to);
}

/* What stands at the end of a name, or around it. Some of it changes nothing. */
static void other_spelling(int base)
{
    static const char *const ends[][2] = {{"lora_A", "lora_B"},
                                          {"lora_B", "lora_A"},
                                          {"lora_", "lora_embedding_"},
                                          {".default", ""},
                                          {".default", ".other"},
                                          {".weight", ""},
                                          {"lora_A", "lora_a"},
                                          {"default.weight", "default.bias"},
                                          {"model.", "module.model."},
                                          {"model.", "base_model.model.model."},
                                          {".layers", "._orig_mod.layers"},
                                          {"model.", "m.model."}};
    const char *const       *e         = ends[below(COUNT(ends))];
    pick(base);
    rename_scope(e[0], e[1]);
}

/* Two tensors, of different shapes, change their names. */
static void swapped_names(int base)
{
    int    a, b, tries = 0;
    size_t i;
    pick(base);
    a = scope.tensor;
    do b = below(model.num_tensors);
    while (tries++ < 200 &&
           (memcmp(model.tensors[a].shape, model.tensors[b].shape, sizeof model.tensors[a].shape) == 0));
    snprintf(what, sizeof what, "%s and %s have changed names", model.tensors[a].name, model.tensors[b].name);
    if (tries > 200) return;
    for (i = 0; i < num_mutant; i++) {
        if (mutant[i].tensor != a && mutant[i].tensor != b) continue;
        snprintf(mutant[i].name, sizeof mutant[i].name, "%s", model.tensors[mutant[i].tensor == a ? b : a].name);
    }
}

/* A dimension is another, with the box as it was, or with all of what is said to be there. */
static void wrong_shape(int base)
{
    size_t i;
    int    d, how = below(5), box = chance(2);
    pick(base);
    d = below(model.tensors[scope.tensor].ndim);
    say("dimension %d, change %d, box %s", d, how, box ? "whole" : "kept");
    for (i = 0; i < scope.num; i++) {
        lorasync_piece *p = &scoped(i)->piece;
        int64_t        *n = &p->shape[d], other = p->shape[1 - d];
        if (how == 4 && p->ndim == 2) p->shape[1 - d] = *n, *n = other;
        else *n = how == 0 ? *n + 1 : how == 1 ? *n - 1 : how == 2 ? *n * 2 : *n / 2;
        if (box && *n <= model.tensors[scope.tensor].shape[d]) p->box = lorasync_whole(p->shape, p->ndim);
    }
}

/* The part that a rank has is said to be the whole. */
static void local_as_whole(int base)
{
    size_t i;
    pick(base);
    say("its part is said to be all");
    for (i = 0; i < scope.num; i++) {
        lorasync_piece *p = &scoped(i)->piece;
        int             d;
        for (d = 0; d < p->ndim && !p->box.flat; d++) p->shape[d] = p->box.len[d];
        if (p->box.flat) p->ndim = 1, p->shape[0] = p->box.len[0];
        p->box = lorasync_whole(p->shape, p->ndim);
    }
}

/* Where the box begins, how long it is, or that of another rank, of one piece. */
static void wrong_box(int base)
{
    lorasync_piece *p;
    int             d, how = below(5);
    pick(base);
    p = &scoped(0)->piece;
    d = p->box.flat ? 0 : below(p->ndim);
    snprintf(what, sizeof what, "the box of one piece of %s on rank %d: dimension %d, change %d",
             model.tensors[scope.tensor].name, scoped(0)->rank, d, how);
    if (how == 0) p->box.off[d]++;
    else if (how == 1) p->box.off[d]--;
    else if (how == 2) p->box.len[d] = 1 + below((int)p->box.len[d]);
    else if (how == 3) p->box = lorasync_flat(0, box_elements(&p->box));
    else p->box = box_of(&model.tensors[scope.tensor], below(model.world));
}

static void wrong_dtype(int base)
{
    static const lorasync_dtype types[] = {LORASYNC_I32, LORASYNC_U8,  LORASYNC_BOOL,       LORASYNC_I64,
                                           LORASYNC_F4,  LORASYNC_U64, LORASYNC_DTYPE_NONE, (lorasync_dtype)77};
    const lorasync_dtype        type    = types[below(COUNT(types))];
    size_t                      i;
    pick(base);
    say("dtype %d", (int)type);
    for (i = 0; i < scope.num; i++) scoped(i)->piece.dtype = type;
}

static void drop_item(size_t i)
{
    memmove(&mutant[i], &mutant[i + 1], (num_mutant - i - 1) * sizeof mutant[0]);
    num_mutant--;
}

static void missing(int base)
{
    size_t i;
    pick(base);
    say("missing");
    for (i = scope.num; i-- > 0;) drop_item(scope.at[i]);
}

/* A whole layer, an expert's number of all layers, or a whole rank. With its base weights, too, only what stands
   between others is missed: without its last layer a model is another, smaller one. */
static void missing_more(int base)
{
    static const char *const names[] = {"layer", "expert", "rank"};
    const int                how = below(3), layer = below(model.layers), rank = below(model.world);
    const int                expert = below(model.experts ? model.experts : 1);
    const int                of[]   = {layer, expert, rank};
    const int inner[] = {layer > 0 && layer<model.layers - 1, expert> 0 && expert < model.experts - 1, model.how < PP};
    size_t    i;
    snprintf(what, sizeof what, "missing LoRA%s of %s %d", base && inner[how] ? " and base" : "", names[how], of[how]);
    for (i = num_mutant; i-- > 0;) {
        const tensor *t    = &model.tensors[mutant[i].tensor];
        const int     is[] = {t->layer, t->expert, mutant[i].rank};
        if (is[how] == of[how] && (!t->is_base || (base && inner[how]))) drop_item(i);
    }
}

static void doubled(int base)
{
    size_t i, num;
    int    elsewhere = chance(2);
    pick(base);
    say("added twice%s", elsewhere ? ", from another address" : "");
    for (i = 0, num = scope.num; i < num; i++) {
        item *x = &mutant[num_mutant++];
        *x      = *scoped(i);
        if (elsewhere) x->piece.data = (float *)x->piece.data + 1;
    }
}

static void wrong_role(int base)
{
    size_t i;
    int    role = 1 + below(10);
    if (role == LORASYNC_ROLE_MODULES_TO_SAVE) role = 99; /* of a base weight that is its host's last word */
    pick(base);
    say("its role is said to be %s", lorasync_role_text((lorasync_role)role));
    for (i = 0; i < scope.num; i++) scoped(i)->piece.role = (lorasync_role)role;
}

/* Replaces the first `from` of a config. Returns 0 if it has none. */
static int edit_config(char *config, const char *from, const char *to)
{
    char *at = strstr(config, from), rest[2048];
    if (!at) return 0;
    snprintf(rest, sizeof rest, "%s", at + strlen(from));
    snprintf(at, 2048 - (size_t)(at - config), "%s%s", to, rest);
    return 1;
}

/* A config that says something else, to all ranks or to one. Without a config: descs. */
static void wrong_config(int base)
{
    static const char *const edits[][2] = {{"\"r\":8", "\"r\":16"},
                                           {"\"r\":8", "\"r\":4"},
                                           {"_proj\"", "_prj\""},
                                           {"\"q_proj\",", ""},
                                           {"[\"", "[\"lm_head\",\""},
                                           {"[\"", "[\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\",\"up_proj\",\""},
                                           {"(", "(k_proj|"},
                                           {"_proj|", "_pr|"},
                                           {"[\"", "[\"unheard_of\",\""},
                                           {"}", ",\"use_dora\":true}"},
                                           {"}", ",\"lora_bias\":true}"},
                                           {"}", ",\"layers_to_transform\":[0]}"},
                                           {"}", ",\"bias\":\"all\"}"},
                                           {"}", ",\"rank_pattern\":{\"layers.1.*\":4}}"},
                                           {"}", ",\"exclude_modules\":[\"layers.1.self_attn.q_proj\"]}"},
                                           {"}", ",\"target_parameters\":[\"experts.up_proj\"]}"},
                                           {"\"LORA\"", "\"LOHA\""}};
    const char *const       *e          = edits[below(COUNT(edits))];
    (void)base;
    snprintf(what, sizeof what, "all are told a config with \"%s\" for \"%s\"", e[1], e[0]);
    if (!model.with_config || !edit_config(plot.all.config, e[0], e[1])) {
        snprintf(what, sizeof what, "the adapter has another name");
        plot.all.desc.adapter = "policy";
    }
    plot.one = plot.all;
}

/* One rank is told something else. */
static void told_otherwise(int base)
{
    static const char *const edits[][2] = {{"\"lora_alpha\":16", "\"lora_alpha\":8"},
                                           {"}", ",\"use_rslora\":true}"},
                                           {"[\"", "[\"unheard_of\",\""},
                                           {"(", "(unheard_of|"},
                                           {"\"LORA\",", "\"LORA\", "}};
    const char *const       *e          = edits[below(COUNT(edits))];
    lorasync_desc           *d          = &plot.one.desc;
    const int                how        = below(6);
    (void)base;
    plot.other = below(model.world);
    snprintf(what, sizeof what, "rank %d is told otherwise: %d, \"%s\"", plot.other, how, e[1]);
    if (how == 0) d->wire_dtype = LORASYNC_BF16;
    else if (how == 1) d->fold_scale = 1;
    else if (how == 2) d->adapter = "policy";
    else if (how == 3) d->allow_missing = 1;
    else if (plot.one.config[0]) edit_config(plot.one.config, e[0], e[1]);
    else d->lora_alpha *= 2;
    if (model.world == 1) plot.other = -1; /* it would be no mistake */
}

typedef void (*mutation)(int base);

static const mutation mutations[] = {typo,           wrong_number, other_spelling, swapped_names, wrong_shape,
                                     local_as_whole, wrong_box,    wrong_dtype,    missing,       missing_more,
                                     doubled,        wrong_role,   wrong_config,   told_otherwise};

/* 1 if two configs give every published module its scale, and the same modules LoRA. */
static int same_config(const char *x, const char *y)
{
    lorasync_config *a = NULL, *b = NULL;
    int              t, same      = lorasync_config_parse(x, strlen(x), NULL, &a, NULL) == LORASYNC_OK &&
                  lorasync_config_parse(y, strlen(y), NULL, &b, NULL) == LORASYNC_OK;
    for (t = 0; same && t < model.num_tensors; t++) {
        lorasync_name n;
        if (model.tensors[t].is_base || lorasync_parse_name(model.tensors[t].name, &n, NULL) < 0) continue;
        same = lorasync_config_scale(a, n.module) == lorasync_config_scale(b, n.module);
    }
    lorasync_config_free(a);
    lorasync_config_free(b);
    return same;
}

static int num_equal, num_errors;

/* One mutation of one model, by a seed. */
static void mutate(unsigned long long seed, int verbose)
{
    size_t i;
    int    kind, base;
    make_model(seed / 8); /* so many for each */
    if (seed % 8 == 0 || verbose || model.seed != seed / 8 || !good.num_bytes) {
        make_pieces();
        tell_all();
        publish(correct, num_correct, &good);
        CHECK_EQ(good.status, LORASYNC_OK);
        if (good.status) CHECK_TEXT(good.text, "");
    }
    dice = seed ^ 0x5eed;
    memcpy(mutant, correct, num_correct * sizeof mutant[0]);
    num_mutant = num_correct;
    tell_all();
    kind = below(COUNT(mutations)), base = chance(4);
    mutations[kind](base);
    publish(mutant, num_mutant, &bad);
    for (i = 0; verbose && i < 1; i++)
        printf("%s, %d ranks, %d layers, %d experts, config %d: %s\n   %d %s\n", way_names[model.how], model.world,
               model.layers, model.experts, model.with_config, what, (int)bad.status, bad.text);
    if (bad.status < 0) {
        num_errors++;
        CHECK(bad.text[0]);
        return;
    }
    num_equal++;
    if (bad.num_bytes == good.num_bytes && memcmp(bad.bytes, good.bytes, good.num_bytes) == 0 &&
        (strcmp(bad.config, good.config) == 0 || same_config(bad.config, good.config)))
        return;
    test_fail(__FILE__, __LINE__, "published otherwise, in silence");
    fprintf(stderr, "   seed %llu: %s, %d ranks, %d layers, %d experts, config %d: %s\n", seed, way_names[model.how],
            model.world, model.layers, model.experts, model.with_config, what);
}

static unsigned long long first_seed = 0, num_seeds = 500;

static void mutations_of_correct_declarations(void)
{
    unsigned long long seed;
    for (seed = first_seed; seed < first_seed + num_seeds; seed++) mutate(seed, num_seeds == 1);
    printf("   %d errors, %d equal in effect\n", num_errors, num_equal);
    if (num_seeds >= 100) CHECK(num_equal > (int)num_seeds / 50 && num_errors > (int)num_seeds / 2);
}

int main(int argc, char **argv)
{
    const char *given = getenv("LORASYNC_TEST_MUTATIONS");
    if (argc > 1) given = argv[1];
    if (given) num_seeds = strtoull(given, NULL, 10);
    if (argc > 2) first_seed = strtoull(argv[2], NULL, 10);
    RUN(linear_shapes);
    RUN(local_shape);
    RUN(turned_round);
    RUN(embeddings);
    RUN(convolutions);
    RUN(experts);
    RUN(nothing_to_prove);
    RUN(other_tensors);
    RUN(with_base);
    RUN(holes_in_lists);
    RUN(legitimate_holes);
    RUN(holes_of_ranks);
    RUN(numbers_left_out);
    RUN(unknown_layers);
    RUN(added_later);
    RUN(mutations_of_correct_declarations);
    return test_summary("test_proof");
}
