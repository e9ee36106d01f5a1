/* What compile proves of a declaration: shapes, from the base weights that any rank holds; and that LoRA lies wherever
   it must. On 1, 2, 4 and 8 ranks. */
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
    int            rank; /* -1: all of them, in parts by rows */
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

int main(void)
{
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
    RUN(added_later);
    return test_summary("test_proof");
}
