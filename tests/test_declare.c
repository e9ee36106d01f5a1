/* What is declared to a session and what comes of it: names that look like LoRA, roles, biases, modules that are saved,
   lists of target_modules, configs of ranks; on 1, 2 and 4 ranks. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"

#include <sys/stat.h>

#define COUNT(x) (sizeof(x) / sizeof(x)[0])
#define P "base_model.model."

/* -- one declaration on a few ranks */

typedef struct param {
    const char    *name;
    int64_t        rows, columns; /* columns 0: a vector */
    int            only; /* 0: every rank has its rows; r: rank r - 1 has the whole, others do not know of it */
    lorasync_role  role;
    int            trained;
    lorasync_dtype dtype; /* NONE: F32 */
} param;

typedef struct declaration {
    const param   *params;
    size_t         num;
    lorasync_desc  desc;        /* but for comm */
    const char    *last_config; /* config_json of the last rank, where it is another */
    lorasync_desc *last_desc;   /* or its whole desc */
    int            bent;        /* r: rank r - 1 adds its first piece twice */
    int            other_place; /* from another address */
    size_t         attach;      /* 1: to a directory, by the name only */
} declaration;

enum {
    MAX_WORLD = 4,
    MAX_KEYS  = 40
};

/* What came of it. */
static struct outcome {
    lorasync_status status[MAX_WORLD], open_status;
    char            text[MAX_WORLD][512];
    char            keys[MAX_KEYS][200], config[8192];
    size_t          num_keys, num_dropped, num_taken;
    char            unused[512];
} out;

static const declaration *now;
static float              memory[4096], elsewhere[4096];

static lorasync_status add_all(lorasync_session *s, int rank, int world, lorasync_error *err)
{
    lorasync_status status = LORASYNC_OK;
    size_t          i;
    for (i = 0; i < now->num && status == LORASYNC_OK; i++) {
        const param   *p = &now->params[i];
        lorasync_piece piece;
        if (p->only && p->only != rank + 1) continue;
        memset(&piece, 0, sizeof piece);
        piece.name     = p->name;
        piece.dtype    = p->dtype ? p->dtype : LORASYNC_F32;
        piece.ndim     = p->columns ? 2 : 1;
        piece.shape[0] = p->rows, piece.shape[1] = p->columns;
        piece.box = lorasync_whole(piece.shape, piece.ndim);
        if (!p->only) piece.box = lorasync_shard(piece.box, 0, rank, world);
        piece.data = memory;
        piece.role = p->role, piece.trained = p->trained;
        status = lorasync_add(s, &piece, err);
        if (status != LORASYNC_OK || i || now->bent != rank + 1) continue;
        if (now->other_place) piece.data = elsewhere;
        status = lorasync_add(s, &piece, err);
    }
    return status;
}

static void note_image(const lorasync_session *s)
{
    const lorasync_image *image = lorasync_session_image(s);
    lorasync_session_info info;
    size_t                i;
    REQUIRE(image);
    for (i = 0; i < image->num_tensors && i < MAX_KEYS; i++)
        snprintf(out.keys[out.num_keys++], sizeof out.keys[0], "%s", image->tensors[i].name);
    snprintf(out.config, sizeof out.config, "%s", image->config_json);
    lorasync_get_info(s, &info);
    out.num_dropped = info.num_dropped;
    out.num_taken   = info.num_taken;
    for (i = 0; i < info.num_unused_targets; i++)
        snprintf(out.unused + strlen(out.unused), sizeof out.unused - strlen(out.unused), "%s%s", i ? " " : "",
                 info.unused_targets[i]);
}

static void declare_story(rank_context *c)
{
    const int         last = c->rank == c->world - 1;
    lorasync_desc     d    = last && now->last_desc ? *now->last_desc : now->desc;
    lorasync_session *s;
    lorasync_error    err;
    lorasync_status   status;
    memset(&err, 0, sizeof err);
    d.comm = &c->comm;
    if (last && now->last_config) d.config_json = now->last_config;
    d.timeout_ms = 20000;
    status       = lorasync_open(&d, &s, &err);
    if (status < 0) {
        CHECK(!s);
        out.open_status     = status;
        out.status[c->rank] = status;
        snprintf(out.text[c->rank], sizeof out.text[0], "%s", err.text);
        return;
    }
    add_all(s, c->rank, c->world, &err); /* a failure is remembered for compile */
    status = lorasync_compile(s, &err);
    if (status == LORASYNC_OK) status = lorasync_sync(s, 1, NULL, &err);
    out.status[c->rank] = status;
    snprintf(out.text[c->rank], sizeof out.text[0], "%s", err.text);
    if (status == LORASYNC_OK && c->rank == 0) note_image(s);
    lorasync_close(s);
}

/* Declares on `world` ranks. All of them must come to the same status. */
static lorasync_status declare(const declaration *d, int world)
{
    int r;
    memset(&out, 0, sizeof out);
    now = d;
    run_threads(world, declare_story, NULL);
    for (r = 1; r < world; r++) CHECK_EQ(out.status[r], out.status[0]);
    return out.status[0];
}

static int has_key(const char *key)
{
    size_t i;
    for (i = 0; i < out.num_keys; i++)
        if (strcmp(out.keys[i], key) == 0) return 1;
    return 0;
}

static const int worlds[] = {1, 2, 4};

#define LORA "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\",\"v\"]"

static const param pair[] = {{"m.h.0.q.lora_A.default.weight", 4, 16, 0, LORASYNC_ROLE_NONE, 0, LORASYNC_DTYPE_NONE},
                             {"m.h.0.q.lora_B.default.weight", 12, 4, 0, LORASYNC_ROLE_NONE, 0, LORASYNC_DTYPE_NONE}};

/* The pair above and up to 10 more. */
static param  many[12];
static size_t num_many;

static param *more(const char *name, int64_t rows, int64_t columns)
{
    param *p = &many[num_many++];
    memset(p, 0, sizeof *p);
    p->name = name, p->rows = rows, p->columns = columns;
    return p;
}

static declaration begin(const char *config)
{
    declaration d;
    memset(&d, 0, sizeof d);
    memcpy(many, pair, sizeof pair);
    num_many           = COUNT(pair);
    d.params           = many;
    d.num              = COUNT(pair);
    d.desc.config_json = config;
    if (!config) d.desc.lora_alpha = 8;
    return d;
}

static lorasync_status run(declaration *d, int world)
{
    d->num = num_many;
    return declare(d, world);
}

#define CHECK_SAYS(part) CHECK_HAS(out.text[0], part)

/* -- names that look like LoRA */

static void names_like_lora(void)
{
    static const char *const foreign[]  = {"m.experts.w1_lora_A.0",
                                           "m.experts.gate_up_proj_lora_A",
                                           "m.adapter.weight_magnitude",
                                           "m.to_k_lora.down.weight",
                                           "m.dora_scale",
                                           "m.q.lora_a"};
    static const char *const excluded[] = {"experts", "adapter", "m.to_k_lora", "dora_scale", "q"};
    size_t                   i, w;
    for (i = 0; i < COUNT(foreign); i++)
        for (w = 0; w < COUNT(worlds); w++) {
            declaration d                = begin(NULL);
            more(foreign[i], 8, 8)->only = worlds[w]; /* one rank's name fails all */
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_NAME);
            CHECK_SAYS(foreign[i]);
        }
    { /* the filter says that they are none, or not wanted */
        declaration     d = begin(NULL);
        lorasync_filter f;
        memset(&f, 0, sizeof f);
        f.exclude_modules = excluded, f.num_exclude_modules = COUNT(excluded) - 1;
        d.desc.filter = &f;
        for (i = 0; i < 5; i++) more(foreign[i], 8, 8);
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
        CHECK_EQ(out.num_keys, 2);
        CHECK_EQ(out.num_dropped, 5);
    }
}

/* Modules of the model that are called like LoRA. */
static void modules_called_like_lora(void)
{
    static const char *const router[] = {"lora_router"}, *const leaf[] = {"enc.lora_A"};
    size_t w;
    for (w = 0; w < COUNT(worlds); w++) {
        declaration     d = begin(LORA ",\"modules_to_save\":[\"lora_head\",\"enc.lora_A\"]}");
        lorasync_filter f;
        memset(&f, 0, sizeof f);
        d.desc.filter     = &f;
        f.exclude_modules = router, f.num_exclude_modules = 1;
        more("lora_head.modules_to_save.default.weight", 8, 8);
        more("lora_head.original_module.weight", 8, 8);
        more("enc.lora_A.weight", 8, 8);
        more("m.lora_router.weight", 8, 8);
        more("m.lora_gate.weight", 8, 8)->role = LORASYNC_ROLE_BASE;
        more("m.lora_A.weight", 8, 8)->role    = LORASYNC_ROLE_BASE;
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        if (out.status[0] < 0) fprintf(stderr, "%s\n", out.text[0]);
        CHECK_EQ(out.num_keys, 4);
        CHECK(has_key(P "lora_head.weight") && has_key(P "enc.lora_A.weight"));
    }
    { /* without a config the written one says it */
        declaration d                        = begin(NULL);
        more("lora_head.weight", 8, 8)->role = LORASYNC_ROLE_MODULES_TO_SAVE;
        more("lora_tail.modules_to_save.default.bias", 8, 0);
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
        CHECK(has_key(P "lora_head.weight") && has_key(P "lora_tail.bias"));
        CHECK_HAS(out.config, "\"modules_to_save\": [\n    \"lora_head\",\n    \"lora_tail\"\n  ]");
    }
    { /* but of a leaf it cannot */
        declaration d                         = begin(NULL);
        more("enc.lora_A.weight", 8, 8)->role = LORASYNC_ROLE_MODULES_TO_SAVE;
        CHECK_EQ(run(&d, 1), LORASYNC_E_CONFIG);
        CHECK_SAYS("enc.lora_A.weight is to be saved whole, but in a file its key is that of a lora_A");
    }
    { /* an entry of the filter names a module that is called like a leaf */
        declaration     d = begin(NULL);
        lorasync_filter f;
        memset(&f, 0, sizeof f);
        d.desc.filter     = &f;
        f.exclude_modules = leaf, f.num_exclude_modules = 1;
        more("m.enc.lora_A.weight", 8, 8);
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
        CHECK_EQ(out.num_keys, 2);
    }
}

/* Roles, where names are not PEFT's: the module's name is enough. */
static void roles(void)
{
    size_t w;
    for (w = 0; w < COUNT(worlds); w++) {
        declaration d                          = begin(NULL);
        num_many                               = 0;
        more("m.h.0.q", 4, 16)->role           = LORASYNC_ROLE_LORA_A;
        more("m.h.0.q", 12, 4)->role           = LORASYNC_ROLE_LORA_B;
        more("m.h.0.lora_router", 4, 16)->role = LORASYNC_ROLE_LORA_A;
        more("m.h.0.lora_router", 12, 4)->role = LORASYNC_ROLE_LORA_B;
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_EQ(out.num_keys, 4);
        CHECK(has_key(P "m.h.0.q.lora_A.weight") && has_key(P "m.h.0.q.lora_B.weight"));
        CHECK(has_key(P "m.h.0.lora_router.lora_A.weight") && has_key(P "m.h.0.lora_router.lora_B.weight"));
    }
    {
        declaration d = begin(NULL);
        many[0].role  = LORASYNC_ROLE_LORA_B;
        CHECK_EQ(run(&d, 1), LORASYNC_E_NAME);
        CHECK_SAYS("is that of a lora_A, and piece.role says lora_B");
        many[0].role = (lorasync_role)99;
        CHECK_EQ(run(&d, 1), LORASYNC_E_ARGUMENT);
    }
}

/* Wrappers in front of PEFT's own prefix, and leaves without .weight: keys are those that engines read. */
static void keys(void)
{
    declaration d = begin(NULL);
    num_many      = 0;
    more("_forward_module." P "m.q.lora_A.default", 4, 16);
    more("pretrained_model." P "m.q.lora_B", 12, 4);
    CHECK_EQ(run(&d, 2), LORASYNC_OK);
    CHECK(has_key(P "m.q.lora_A.weight") && has_key(P "m.q.lora_B.weight"));
}

/* -- biases, and modules that the config saves */

static void biases(void)
{
    static const char *const config[] = {LORA "}", LORA ",\"bias\":\"lora_only\"}", LORA ",\"bias\":\"all\"}"};
    size_t                   i, w;
    for (i = 0; i < 3; i++)
        for (w = 0; w < COUNT(worlds); w++) {
            declaration d = begin(config[i]);
            more("m.h.0.v.lora_A.default.weight", 4, 16);
            more("m.h.0.v.lora_B.default.weight", 12, 4);
            more("m.h.0.q.base_layer.bias", 12, 0);
            more("m.h.0.v.bias", 12, 0); /* a trainer that does not have PEFT's levels */
            more("m.h.0.k.bias", 12, 0);
            more("m.norm.bias", 12, 0);
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
            CHECK_EQ(out.num_keys, i == 0 ? 4 : i == 1 ? 6 : 8);
            CHECK_EQ(has_key(P "m.h.0.q.base_layer.bias"), i > 0);
            CHECK_EQ(has_key(P "m.h.0.v.base_layer.bias"), i > 0); /* where PEFT looks for it */
            CHECK_EQ(has_key(P "m.norm.bias"), i == 2);
        }
    {
        declaration d                    = begin(NULL);
        more("m.norm.bias", 12, 0)->role = LORASYNC_ROLE_BIAS;
        CHECK_EQ(run(&d, 1), LORASYNC_E_CONFIG);
        CHECK_SAYS("m.norm.bias is a bias to publish, and only desc.config_json can say so");
        d.desc.config_json = config[1]; /* which does not take that one */
        d.desc.lora_alpha  = 0;
        CHECK_EQ(run(&d, 1), LORASYNC_E_CONFIG);
        CHECK_SAYS("m.norm.bias");
        d.desc.config_json = config[2];
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
        CHECK(has_key(P "m.norm.bias"));
    }
}

static void saved_modules(void)
{
    size_t w;
    for (w = 0; w < COUNT(worlds); w++) {
        declaration d = begin(LORA ",\"modules_to_save\":[\"score\"]}");
        more("score.weight", 2, 8); /* no PEFT level: the config says what it is */
        more("m.norm.weight", 8, 0);
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_EQ(out.num_keys, 3);
        CHECK(has_key(P "score.weight"));
        more("score.original_module.weight", 2, 8);
        many[2].name = "score.modules_to_save.default.weight";
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_EQ(out.num_keys, 3);
    }
}

/* What is trained is published, or refused by name. */
static void trained(void)
{
    static const struct {
        const char     *name;
        const char     *config;
        const char     *exclude, *target;
        int             skip;
        lorasync_status status;
        size_t          num_keys;
    } cases[] = {
        {"m.norm.bias", LORA "}", NULL, NULL, 0, LORASYNC_E_CONFIG, 0},
        {"m.norm.bias", NULL, NULL, NULL, 0, LORASYNC_E_CONFIG, 0},
        {"m.norm.bias", LORA ",\"bias\":\"lora_only\"}", NULL, NULL, 0, LORASYNC_E_CONFIG, 0},
        {"m.norm.bias", LORA ",\"bias\":\"all\"}", NULL, NULL, 0, LORASYNC_OK, 3},
        {"m.norm.bias", LORA "}", "norm", NULL, 0, LORASYNC_OK, 2},
        {"m.norm.weight", LORA "}", NULL, NULL, 0, LORASYNC_E_CONFIG, 0},
        {"m.norm.weight", LORA ",\"modules_to_save\":[\"norm\"]}", NULL, NULL, 0, LORASYNC_OK, 3},
        {"m.norm.weight", LORA ",\"modules_to_save\":[\"norm\"]}", NULL, NULL, 1, LORASYNC_OK, 2},
        {"m.h.0.v.lora_A.default.weight", NULL, NULL, "q", 0, LORASYNC_E_CONFIG, 0},
        {"m.h.0.v.lora_A.default.weight", NULL, "v", "q", 0, LORASYNC_OK, 2},
        {"m.h.0.v.lora_A.other.weight", NULL, NULL, "q", 0, LORASYNC_OK, 2},
    };
    size_t i, w;
    for (i = 0; i < COUNT(cases); i++)
        for (w = 0; w < COUNT(worlds); w++) {
            declaration     d = begin(cases[i].config);
            lorasync_filter f;
            memset(&f, 0, sizeof f);
            if (cases[i].exclude) f.exclude_modules = &cases[i].exclude, f.num_exclude_modules = 1;
            if (cases[i].target) f.target_modules = &cases[i].target, f.num_target_modules = 1;
            f.skip_modules_to_save                                                  = cases[i].skip;
            d.desc.filter                                                           = &f;
            more(cases[i].name, 4, strstr(cases[i].name, "lora") ? 16 : 0)->trained = 1;
            many[2].only                                                            = worlds[w];
            if (run(&d, worlds[w]) != cases[i].status) fprintf(stderr, "case %zu: %s\n", i, out.text[0]);
            CHECK_EQ(out.status[0], cases[i].status);
            CHECK_EQ(out.num_keys, cases[i].num_keys);
            if (cases[i].status == LORASYNC_OK) continue;
            CHECK_SAYS(cases[i].name);
            CHECK_SAYS("is trained and would not be published");
            many[2].trained = 0; /* where nobody says that it is trained, it may go */
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        }
}

/* -- entries of target_modules */

static void entries_of_target_modules(void)
{
    static const char *const typo[]  = {"q", "vv"};
    static const char *const seven[] = {"q", "k", "v", "o", "gate", "up", "down"};
    size_t                   w;
    for (w = 0; w < COUNT(worlds); w++) {
        declaration     d = begin(NULL);
        lorasync_filter f;
        memset(&f, 0, sizeof f);
        d.desc.filter    = &f;
        f.target_modules = typo, f.num_target_modules = 2;
        more("m.h.0.v.lora_A.default.weight", 4, 16)->only = worlds[w];
        more("m.h.0.v.lora_B.default.weight", 12, 4)->only = worlds[w];
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_CONFIG);
        CHECK_SAYS("filter.target_modules lists \"vv\", which no module is called");
        if (worlds[w] == 1) CHECK_SAYS("the nearest name is \"v\"");
        num_many = 2; /* nothing is left out: one list for many models */
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_TEXT(out.unused, "vv");
        f.target_modules = seven, f.num_target_modules = 7;
        more("m.h.0.gate.weight", 16, 16); /* a module without LoRA is one that the name matches */
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_EMPTY);
        d.desc.allow_missing = 1;
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_TEXT(out.unused, "k v o up down");
        f.exclude_modules = &seven[2], f.num_exclude_modules = 1; /* left out by name is not left out in silence */
        more("m.h.0.v.lora_A.default.weight", 4, 16);
        more("m.h.0.v.lora_B.default.weight", 12, 4);
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_EQ(out.num_keys, 2);
    }
    for (w = 0; w < COUNT(worlds); w++) { /* the config's list */
        declaration     d = begin("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":[\"q\",\"k_proj\",\"o\"]}");
        lorasync_filter f;
        memset(&f, 0, sizeof f);
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
        CHECK_TEXT(out.unused, "k_proj o");
        d.desc.filter    = &f;
        f.target_modules = seven, f.num_target_modules = 1;
        more("m.h.0.k_pro.lora_A.default.weight", 4, 16);
        more("m.h.0.k_pro.lora_B.default.weight", 12, 4);
        CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_CONFIG);
        CHECK_SAYS("target_modules of desc.config_json lists \"k_proj\"");
        CHECK_SAYS("the nearest name is \"k_pro\"");
    }
}

/* A pattern for part of the modules, when another rank has the others. */
static void part_of_the_modules(void)
{
    static const char part[] = "{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\".*h\\\\.0\\\\..*q\"}";
    int               where, i;
    for (i = 0; i < 2; i++) {
        declaration d        = begin(i ? NULL : part);
        d.desc.allow_missing = 1;
        for (where = 0; where <= 4; where++) {
            num_many                             = 2;
            more("m.h.1.q.weight", 16, 16)->only = where;
            CHECK_EQ(run(&d, 4), LORASYNC_OK);
            CHECK_HAS(out.config, "\"target_modules\": [\n    \"m.h.0.q\"\n  ]");
            num_many                             = 2;
            more("m.h.1.v.weight", 16, 16)->only = where;
            CHECK_EQ(run(&d, 4), LORASYNC_OK);
            CHECK_HAS(out.config, "\"target_modules\": [\n    \"q\"\n  ]");
            num_many                               = 2;
            more("t.m.h.0.q.weight", 16, 16)->only = where;
            CHECK_EQ(run(&d, 4), LORASYNC_E_CONFIG);
            CHECK_SAYS("module \"t.m.h.0.q\"");
        }
        num_many                                        = 2; /* its own base weight, which only another rank has */
        more("m.h.0.q.base_layer.weight", 12, 16)->only = 4;
        CHECK_EQ(run(&d, 4), LORASYNC_OK);
        CHECK_HAS(out.config, "\"target_modules\": [\n    \"q\"\n  ]");
    }
    {
        declaration d =
            begin("{\"peft_type\":\"LORA\",\"r\":4,\"target_modules\":\"m.*q\",\"exclude_modules\":[\"t.m.h.0.q\"],"
                  "\"modules_to_save\":[\"head\"]}");
        more("t.m.h.0.q.weight", 16, 16)->only = 2;
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
        CHECK_HAS(out.config, "\"target_modules\": [\n    \"q\"\n  ]");
    }
    { /* a list is the trainer's own */
        declaration d                        = begin(LORA "}");
        d.desc.allow_missing                 = 1;
        more("m.h.1.q.weight", 16, 16)->only = 2;
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
        CHECK_HAS(out.config, "\"target_modules\": [\n    \"q\",\n    \"v\"\n  ]");
    }
}

/* -- configs of ranks */

static void same_configs(void)
{
    static const char *const same[] = {
        LORA ",\"modules_to_save\":[\"a\",\"b\"],"
             "\"rank_pattern\":{\"x\":2,\"y\":3},\"layers_to_transform\":[0,1]}",
        "{\"layers_to_transform\":[1,0,1],\"rank_pattern\":{\"y\":3,\"x\":2},\"modules_to_save\":[\"b\",\"a\"],"
        "\"target_modules\":[\"v\",\"q\",\"v\"],\"lora_alpha\":8.0,\"r\":4,\"peft_type\":\"LORA\"}",
        " {\n\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\",\"v\"],"
        "\"modules_to_save\":[\"a\",\"b\"],"
        "\"rank_pattern\":{\"x\":2, \"y\" :3},\"layers_to_transform\":[0,1],\"revision\":null}",
    };
    size_t i;
    for (i = 0; i < COUNT(same); i++) {
        declaration d = begin(same[0]);
        d.last_config = same[i];
        CHECK_EQ(run(&d, 4), LORASYNC_OK);
    }
}

static void different_configs(void)
{
    static const struct {
        const char *last, *part;
    } cases[] = {
        {"{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":16,\"target_modules\":[\"q\",\"v\"]}",
         "config_json.lora_alpha is 16.0 here, and on rank 0 8.0"},
        {"{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\",\"k\"]}",
         "config_json.target_modules is [\"k\", \"q\"] here, and on rank 0 [\"q\", \"v\"]"},
        {LORA ",\"use_rslora\":true}", "config_json.use_rslora is true here, and on rank 0 not given"},
        {"{\"peft_type\":\"LORA\",\"lora_alpha\":8,\"target_modules\":[\"q\",\"v\"]}",
         "config_json.r is not given here, and on rank 0 4.0"},
        {LORA ",\"rank_pattern\":{\"x\":2}}", "config_json.rank_pattern"},
        {LORA ",\"x\":{\"y\":[1,2]}}", "config_json.x is {\"y\": [1,2]} here"},
    };
    size_t i;
    for (i = 0; i < COUNT(cases); i++) {
        declaration d = begin(LORA "}");
        d.last_config = cases[i].last;
        CHECK_EQ(run(&d, 4), LORASYNC_E_DISAGREE);
        CHECK_SAYS(i == 5 ? "config_json.x" : cases[i].part);
        CHECK_SAYS("rank 3: ");
        CHECK_HAS(out.text[3], i == 5 ? "config_json.x" : cases[i].part);
    }
    for (i = 0; i < 8; i++) { /* the other fields */
        static const char *const names[] = {"desc.adapter is \"b\" here, and on rank 0 \"default\"",
                                            "desc.root is 1 here, and on rank 0 0",
                                            "desc.wire_dtype is BF16 here, and on rank 0 NONE",
                                            "desc.fold_scale is 1 here, and on rank 0 0",
                                            "desc.allow_nan is 1",
                                            "desc.bucket_bytes is 4096",
                                            "desc.lora_alpha is 16.0 here, and on rank 0 8.0",
                                            "desc.base_model is \"x\" here, and on rank 0 not given"};
        declaration              d       = begin(NULL);
        lorasync_desc            last    = d.desc;
        d.last_desc                      = &last;
        if (i == 0) last.adapter = "b";
        if (i == 1) last.root = 1;
        if (i == 2) last.wire_dtype = LORASYNC_BF16;
        if (i == 3) last.fold_scale = 1;
        if (i == 4) last.allow_nan = 1;
        if (i == 5) last.bucket_bytes = 4096;
        if (i == 6) last.lora_alpha = 16;
        if (i == 7) last.base_model = "x";
        CHECK_EQ(run(&d, 2), LORASYNC_E_DISAGREE);
        CHECK_SAYS(names[i]);
    }
    { /* where long values begin to differ */
        char        long_list[2][2000];
        declaration d;
        int         k, n;
        for (k = 0; k < 2; k++) {
            n = snprintf(long_list[k], sizeof long_list[k],
                         "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[");
            for (i = 0; i < 60; i++)
                n += snprintf(long_list[k] + n, sizeof long_list[k] - (size_t)n, "\"m.h.%02zu.q\",", i);
            snprintf(long_list[k] + n, sizeof long_list[k] - (size_t)n, "\"z%d\"]}", k);
        }
        d             = begin(long_list[0]);
        d.last_config = long_list[1];
        CHECK_EQ(run(&d, 2), LORASYNC_E_DISAGREE);
        CHECK_SAYS("\"z1\"] here");
        CHECK_SAYS("\"z0\"]; every");
    }
}

/* Patterns that overlap mean another scale for ranks that have them in another order. */
static void order_of_patterns(void)
{
    static const char one[] = LORA ",\"alpha_pattern\":{\"m.h.0.q\":2,\".*q\":3}}";
    static const char two[] = LORA ",\"alpha_pattern\":{\".*q\":3,\"m.h.0.q\":2}}";
    declaration       d     = begin(two);
    d.desc.fold_scale       = 1;
    CHECK_EQ(run(&d, 2), LORASYNC_OK);
    d.last_config = one;
    CHECK_EQ(run(&d, 2), LORASYNC_E_CONFIG);
    CHECK_SAYS("rank 1: module \"m.h.0.q\" has scale 0.5, but 0.75 when the keys");
}

/* Folding needs the rank, which the B of a convolution with groups does not show. */
static void fold_with_groups(void)
{
    static float      a[8 * 6], b[12 * 2];
    lorasync_desc     d;
    lorasync_session *s;
    lorasync_error    err;
    lorasync_piece    p;
    int               i, with_a;
    for (with_a = 0; with_a < 2; with_a++) {
        memset(&d, 0, sizeof d);
        d.lora_alpha = 16, d.fold_scale = 1;
        REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
        for (i = 0; i < 24; i++) b[i] = 1;
        memset(&p, 0, sizeof p);
        p.dtype = LORASYNC_F32, p.ndim = 3;
        p.name = "m.conv.lora_B.default.weight", p.data = b;
        p.shape[0] = 12, p.shape[1] = 2, p.shape[2] = 1;
        p.box = lorasync_whole(p.shape, 3);
        CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
        p.name = "m.conv.lora_A.default.weight", p.data = a;
        p.shape[0] = 8, p.shape[1] = 6;
        p.box = lorasync_whole(p.shape, 3);
        if (with_a) CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
        if (!with_a) {
            CHECK_EQ(lorasync_compile(s, &err), LORASYNC_E_UNSUPPORTED);
            CHECK_HAS(err.text, "fold_scale needs config_json");
        } else {
            const lorasync_tensor *t;
            CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
            CHECK_EQ(lorasync_sync(s, 1, NULL, &err), LORASYNC_OK);
            t = lorasync_image_find(lorasync_session_image(s), P "m.conv.lora_B.weight");
            CHECK(t && ((const float *)t->data)[23] == 2); /* 16 / 8 */
        }
        lorasync_close(s);
    }
}

/* A stream of base weights takes what is called like LoRA where its role says so. */
static void base_stream(void)
{
    static float         w[4];
    lorasync_stream_desc d;
    lorasync_stream     *s;
    lorasync_error       err;
    lorasync_piece       p;
    memset(&d, 0, sizeof d);
    REQUIRE(lorasync_stream_open(&d, &s, &err) == LORASYNC_OK);
    memset(&p, 0, sizeof p);
    p.name = "m.lora_router.weight", p.dtype = LORASYNC_F32, p.ndim = 1, p.shape[0] = 4, p.data = w;
    p.box  = lorasync_whole(p.shape, 1);
    p.role = LORASYNC_ROLE_BASE;
    CHECK_EQ(lorasync_stream_add(s, &p, &err), LORASYNC_OK);
    p.role = LORASYNC_ROLE_NONE;
    CHECK_EQ(lorasync_stream_add(s, &p, &err), LORASYNC_E_NAME);
    lorasync_stream_close(s);
}

/* -- pieces */

static void added_twice(void)
{
    size_t w;
    int    who;
    for (w = 0; w < COUNT(worlds); w++)
        for (who = 1; who <= worlds[w]; who++) {
            declaration d = begin(NULL);
            d.bent        = who;
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_LAYOUT);
            CHECK_SAYS(
                "m.h.0.q.lora_A.default.weight was declared twice on this rank, with the same box, at one address");
            d.other_place = 1;
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_LAYOUT);
            CHECK_SAYS("at two addresses");
        }
    { /* replicas on other ranks are none of this, nor are empty boxes */
        declaration d   = begin(NULL);
        many[0].rows    = 1; /* rank 0 has it all */
        many[1].columns = 1;
        d.bent          = 2;
        CHECK_EQ(run(&d, 2), LORASYNC_OK);
    }
}

static void integers(void)
{
    static const lorasync_dtype dtypes[] = {LORASYNC_I8,  LORASYNC_U8,  LORASYNC_BOOL,
                                            LORASYNC_I32, LORASYNC_U32, LORASYNC_I64};
    size_t                      i, w;
    for (i = 0; i < COUNT(dtypes); i++)
        for (w = 0; w < COUNT(worlds); w++) {
            declaration d = begin(NULL);
            many[1].dtype = dtypes[i];
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_E_UNSUPPORTED);
            CHECK_SAYS("\"m.h.0.q.lora_B.default.weight\" is a lora_B of dtype ");
            many[1].dtype                                          = LORASYNC_F32;
            more("head.modules_to_save.default.mask", 8, 0)->dtype = dtypes[i];
            CHECK_EQ(run(&d, worlds[w]), LORASYNC_OK);
            num_many = 2;
        }
}

/* -- adapter names */

static void adapter_names(void)
{
    static const char *const nobody[] = {"", "a\nb", "a\x7f", "\x01", "a\tb", "\xff\xfe"};
    static const char *const places[] = {"a/b", ".hidden", "latest"};
    size_t                   i;
    lorasync_session        *s;
    lorasync_error           err;
    lorasync_desc            desc;
    for (i = 0; i < COUNT(nobody); i++) {
        declaration d  = begin(NULL);
        d.desc.adapter = nobody[i];
        CHECK_EQ(run(&d, 2), LORASYNC_E_NAME);
        CHECK_EQ(out.open_status, LORASYNC_E_NAME);
        CHECK_SAYS("desc.adapter is ");
    }
    for (i = 0; i < COUNT(places);
         i++) { /* some transport takes these, a directory does not: it says so when attached */
        memset(&desc, 0, sizeof desc);
        desc.adapter    = places[i];
        desc.lora_alpha = 8;
        REQUIRE(lorasync_open(&desc, &s, &err) == LORASYNC_OK);
        CHECK_EQ(lorasync_attach_directory(s, "/nonexistent", &err), LORASYNC_E_NAME);
        CHECK_HAS(err.text, places[i]);
        lorasync_close(s);
    }
}

/* -- files that spell names otherwise */

/* One adapter as files may spell it: by PEFT's keys, as a state dict of the trainer, without PEFT's prefix, wrapped. */
static const char *const spellings[][6] = {
    {P "m.h.0.q.lora_A.weight", P "m.h.0.q.lora_B.weight", P "score.weight", P "m.emb.lora_embedding_A",
     P "m.emb.lora_embedding_B", P "m.emb.base_layer.weight"},
    {P "m.h.0.q.lora_A.default.weight", P "m.h.0.q.lora_B.default.weight", P "score.modules_to_save.default.weight",
     P "m.emb.lora_embedding_A.default", P "m.emb.lora_embedding_B.default", P "m.emb.base_layer.weight"},
    {"m.h.0.q.lora_A.weight", "m.h.0.q.lora_B.weight", "score.weight", "m.emb.lora_embedding_A",
     "m.emb.lora_embedding_B", "m.emb.base_layer.weight"},
    {"m.h.0.q.lora_A", "m.h.0.q.lora_B.x", "score.modules_to_save.x.weight", "m.emb.lora_embedding_A",
     "m.emb.lora_embedding_B.x", "m.emb.base_layer.weight"},
    {"_forward_module." P "m.h.0.q.lora_A.weight", "_forward_module." P "m.h.0.q.lora_B.weight",
     "_forward_module." P "score.weight", "_forward_module." P "m.emb.lora_embedding_A",
     "_forward_module." P "m.emb.lora_embedding_B", "_forward_module." P "m.emb.base_layer.weight"},
};
static const int64_t file_shapes[6][2] = {{4, 16}, {12, 4}, {2, 8}, {4, 20}, {6, 4}, {20, 6}};
static const char file_config[] = "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q\",\"emb\","
                                  "\"k\"],\"modules_to_save\":[\"score\"]}";
static char       folder[300];

static void put_file(const char *name, const void *bytes, size_t num_bytes, const void *behind, size_t num_behind)
{
    char  path[400];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    f = fopen(path, "wb");
    REQUIRE(f);
    CHECK_EQ(fwrite(bytes, 1, num_bytes, f), num_bytes);
    if (num_behind) CHECK_EQ(fwrite(behind, 1, num_behind, f), num_behind);
    fclose(f);
}

static float value_of(int tensor, int64_t i) { return (float)(tensor * 1000) + (float)i / 8; }

/* Writes an adapter of `num` tensors below a new folder, as <folder>/default/v1. */
static void write_spelled(const char *const *names, int num)
{
    lorasync_tensor     t[6];
    lorasync_image_desc d;
    lorasync_image     *image;
    lorasync_error      err;
    float               payload[400];
    char                path[400];
    int                 i;
    int64_t             k;
    strcpy(folder, "/tmp/lorasync-declare-XXXXXX");
    REQUIRE(mkdtemp(folder) != NULL);
    snprintf(path, sizeof path, "%s/default", folder);
    CHECK_EQ(mkdir(path, 0700), 0);
    strcat(folder, "/default/v1");
    CHECK_EQ(mkdir(folder, 0700), 0);
    snprintf(path, sizeof path, "%s/../latest", folder);
    CHECK_EQ(symlink("v1", path), 0);
    memset(t, 0, sizeof t);
    memset(&d, 0, sizeof d);
    for (i = 0; i < num; i++) {
        t[i].name = names[i], t[i].dtype = LORASYNC_F32, t[i].ndim = 2;
        t[i].shape[0] = file_shapes[i][0], t[i].shape[1] = file_shapes[i][1];
    }
    d.tensors = t, d.num_tensors = (size_t)num;
    REQUIRE(lorasync_image_layout(&d, NULL, &image, &err) == LORASYNC_OK);
    for (i = 0; i < num; i++) {
        const lorasync_tensor *to = lorasync_image_find(image, names[i]);
        for (k = 0; k < file_shapes[i][0] * file_shapes[i][1]; k++)
            payload[to->offset / 4 + (size_t)k] = value_of(i, k);
    }
    put_file("adapter_model.safetensors", image->header, image->header_bytes, payload, image->payload_bytes);
    put_file("adapter_config.json", file_config, sizeof file_config - 1, NULL, 0);
    lorasync_image_free(image);
}

static void remove_spelled(void)
{
    char command[400];
    snprintf(command, sizeof command, "rm -r '%.*s'", (int)(strlen(folder) - strlen("/default/v1")), folder);
    CHECK_EQ(system(command), 0);
}

static void check_tensor(const lorasync_tensor *t, int number)
{
    CHECK(t != NULL);
    if (!t) return;
    CHECK_TEXT(t->name, spellings[0][number]);
    CHECK(t->data && ((const float *)t->data)[3] == value_of(number, 3));
}

static void found_by_peft_key(void)
{
    size_t i;
    int    k, num;
    for (i = 0; i < COUNT(spellings); i++)
        for (num = 2; num <= 6; num += 2) {
            lorasync_engine_desc    ed;
            lorasync_engine        *e;
            lorasync_error          err;
            lorasync_image         *image;
            const lorasync_adapter *a;
            char                    path[400];
            if (num == 4) continue; /* half of a pair */
            write_spelled(spellings[i], num);
            CHECK_EQ(lorasync_open_adapter(folder, NULL, &image, NULL, &err), LORASYNC_OK);
            for (k = 0; k < num; k++) check_tensor(lorasync_image_find(image, spellings[0][k]), k);
            CHECK_EQ(image->num_tensors, (size_t)num);
            lorasync_image_free(image);
            snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder); /* a file alone has no config to ask */
            CHECK_EQ(lorasync_open_adapter(path, NULL, &image, NULL, &err), LORASYNC_OK);
            for (k = 0; k < num; k++) check_tensor(lorasync_image_find(image, spellings[0][k]), k);
            lorasync_image_free(image);
            memset(&ed, 0, sizeof ed);
            ed.directory                                   = folder;
            folder[strlen(folder) - strlen("/default/v1")] = 0;
            REQUIRE(lorasync_engine_open(&ed, &e, &err) == LORASYNC_OK);
            folder[strlen(folder)] = '/';
            if (lorasync_engine_poll(e, 0, &err) != LORASYNC_OK) CHECK_TEXT(err.text, "");
            a = lorasync_acquire(e, "default");
            for (k = 0; k < num; k++) check_tensor(lorasync_find(a, spellings[0][k]), k);
            lorasync_release(a);
            lorasync_engine_close(e);
            remove_spelled();
        }
}

/* Two names of one parameter; and a base model's file, whose names stay. */
static void spelled_twice(void)
{
    static const char *const twice[] = {P "m.h.0.q.lora_A.weight", P "m.h.0.q.lora_B.weight",
                                        P "m.h.0.q.lora_A.default.weight"};
    static const char *const base[]  = {"m.h.0.q.weight", "m.h.0.q.bias"};
    static const char *const both[]  = {P "m.h.0.q.lora_A.weight", P "m.h.0.q.lora_B.weight", "m.h.0.q.weight"};
    char                     path[400];
    lorasync_image          *image;
    lorasync_error           err;
    write_spelled(twice, 3);
    CHECK(lorasync_open_adapter(folder, NULL, &image, NULL, &err) < 0);
    CHECK_HAS(err.text, "m.h.0.q.lora_A");
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    CHECK_EQ(lorasync_open_adapter(path, NULL, &image, NULL, &err), LORASYNC_E_NAME);
    remove_spelled();
    write_spelled(base, 2);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    CHECK_EQ(lorasync_open_adapter(path, NULL, &image, NULL, &err), LORASYNC_OK);
    CHECK(lorasync_image_find(image, base[0]) && lorasync_image_find(image, base[1]));
    lorasync_image_free(image);
    remove_spelled();
    write_spelled(both, 3);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", folder);
    CHECK_EQ(lorasync_open_adapter(path, NULL, &image, NULL, &err), LORASYNC_OK);
    CHECK(lorasync_image_find(image, both[0]) && lorasync_image_find(image, both[2]));
    lorasync_image_free(image);
    remove_spelled();
}

static void load_spelled_story(rank_context *c)
{
    lorasync_desc     d;
    lorasync_session *s;
    lorasync_error    err;
    float             mine[5][200];
    int               i;
    int64_t           k;
    memset(&d, 0, sizeof d);
    d.comm = &c->comm, d.config_json = file_config, d.timeout_ms = 20000;
    REQUIRE(lorasync_open(&d, &s, &err) == LORASYNC_OK);
    for (i = 0; i < 5; i++) {
        lorasync_piece p;
        memset(&p, 0, sizeof p);
        memset(mine[i], 0, sizeof mine[i]);
        p.name = spellings[1][i], p.dtype = LORASYNC_F32, p.ndim = 2, p.data = mine[i];
        p.shape[0] = file_shapes[i][0], p.shape[1] = file_shapes[i][1];
        p.box = lorasync_shard(lorasync_whole(p.shape, 2), 1, c->rank, c->world);
        CHECK_EQ(lorasync_add(s, &p, &err), LORASYNC_OK);
    }
    CHECK_EQ(lorasync_compile(s, &err), LORASYNC_OK);
    if (lorasync_load(s, folder, NULL, &err) != LORASYNC_OK) CHECK_TEXT(err.text, "");
    for (i = 0; i < 5; i++) {
        int64_t n = file_shapes[i][1] / c->world; /* columns that this rank has */
        for (k = 0; k < file_shapes[i][0] * n; k++)
            CHECK(mine[i][k] == value_of(i, k / n * file_shapes[i][1] + c->rank * n + k % n));
    }
    lorasync_close(s);
}

/* Training resumes from whatever spelling, and from files in which PEFT saved the embedding's own weights. */
static void resumed_by_peft_key(void)
{
    size_t i;
    for (i = 0; i < COUNT(spellings); i++) {
        write_spelled(spellings[i], i % 2 ? 5 : 6);
        run_threads(1, load_spelled_story, NULL);
        run_threads(2, load_spelled_story, NULL);
        remove_spelled();
    }
}

int main(void)
{
    RUN(names_like_lora);
    RUN(modules_called_like_lora);
    RUN(roles);
    RUN(keys);
    RUN(biases);
    RUN(saved_modules);
    RUN(trained);
    RUN(entries_of_target_modules);
    RUN(part_of_the_modules);
    RUN(same_configs);
    RUN(different_configs);
    RUN(order_of_patterns);
    RUN(fold_with_groups);
    RUN(base_stream);
    RUN(added_twice);
    RUN(integers);
    RUN(adapter_names);
    RUN(found_by_peft_key);
    RUN(spelled_twice);
    RUN(resumed_by_peft_key);
    return test_summary("test_declare");
}
