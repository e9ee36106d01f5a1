/* Names, patterns, matcher. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"

#include <ctype.h>

typedef unsigned long long u64;

/* ---- names */

typedef struct name_case {
    const char   *raw;
    lorasync_role role;
    const char   *key, *module, *adapter;
} name_case;

#define P "base_model.model."
#define ROLE(x) LORASYNC_ROLE_##x

static const name_case names[] = {
    /* the adapter is the last component, or the last but one */
    {"m.q_proj.lora_A.default.weight", ROLE(LORA_A), P "m.q_proj.lora_A.weight", "m.q_proj", "default"},
    {"m.emb.lora_embedding_A.default", ROLE(EMBEDDING_A), P "m.emb.lora_embedding_A", "m.emb", "default"},
    {"m.emb.lora_embedding_B.default", ROLE(EMBEDDING_B), P "m.emb.lora_embedding_B", "m.emb", "default"},
    {"m.default.q.lora_A.default.weight", ROLE(LORA_A), P "m.default.q.lora_A.weight", "m.default.q", "default"},
    {"m.q.lora_A.policy.weight", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q", "policy"},
    {"m.q.lora_magnitude_vector.default.weight", ROLE(MAGNITUDE), P "m.q.lora_magnitude_vector", "m.q", "default"},
    {"m.q.lora_magnitude_vector.default", ROLE(MAGNITUDE), P "m.q.lora_magnitude_vector", "m.q", "default"},
    {"default", ROLE(BASE), "default", "", ""},
    /* every leaf kind, as a parameter and as a file key */
    {"m.q.lora_B.default.weight", ROLE(LORA_B), P "m.q.lora_B.weight", "m.q", "default"},
    {"m.q.lora_B.default.bias", ROLE(LORA_B_BIAS), P "m.q.lora_B.bias", "m.q", "default"},
    {"m.q.lora_A.weight", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q", ""},
    {"m.q.lora_B.weight", ROLE(LORA_B), P "m.q.lora_B.weight", "m.q", ""},
    {"m.q.lora_B.bias", ROLE(LORA_B_BIAS), P "m.q.lora_B.bias", "m.q", ""},
    {"m.e.lora_embedding_A", ROLE(EMBEDDING_A), P "m.e.lora_embedding_A", "m.e", ""},
    {"m.e.lora_embedding_B", ROLE(EMBEDDING_B), P "m.e.lora_embedding_B", "m.e", ""},
    {"m.e.lora_embedding_B.weight", ROLE(EMBEDDING_B), P "m.e.lora_embedding_B", "m.e", ""},
    {"m.q.lora_magnitude_vector", ROLE(MAGNITUDE), P "m.q.lora_magnitude_vector", "m.q", ""},
    {"m.q.lora_magnitude_vector.weight", ROLE(MAGNITUDE), P "m.q.lora_magnitude_vector", "m.q", ""},
    /* raw parameters get the .weight that every engine reads */
    {"m.q.lora_A", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q", ""},
    {"m.q.lora_A.default", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q", "default"},
    {"m.q.lora_B.default", ROLE(LORA_B), P "m.q.lora_B.weight", "m.q", "default"},
    {"m.experts.gate_up_proj.lora_B", ROLE(LORA_B), P "m.experts.gate_up_proj.lora_B.weight", "m.experts.gate_up_proj",
     ""},
    {"m.score.modules_to_save.default.weight", ROLE(MODULES_TO_SAVE), P "m.score.weight", "m.score", "default"},
    {"classifier.modules_to_save.default.dense.weight", ROLE(MODULES_TO_SAVE), P "classifier.dense.weight",
     "classifier", "default"},
    {"classifier.modules_to_save.x.lora_router.weight", ROLE(MODULES_TO_SAVE), P "classifier.lora_router.weight",
     "classifier", "x"},
    {P "classifier.modules_to_save.p.bias", ROLE(MODULES_TO_SAVE), P "classifier.bias", "classifier", "p"},
    {"m.emb.token_adapter.trainable_tokens_delta.default", ROLE(TRAINABLE_TOKENS),
     P "m.emb.token_adapter.trainable_tokens_delta", "m.emb", "default"},
    {"m.token_adapter.q.lora_A.default.weight", ROLE(LORA_A), P "m.token_adapter.q.lora_A.weight", "m.token_adapter.q",
     "default"},
    {"m.emb.token_adapter.trainable_tokens_delta", ROLE(TRAINABLE_TOKENS),
     P "m.emb.token_adapter.trainable_tokens_delta", "m.emb", ""},
    {"m.emb.trainable_tokens_delta.a", ROLE(TRAINABLE_TOKENS), P "m.emb.trainable_tokens_delta", "m.emb", "a"},
    {"m.q.base_layer.bias", ROLE(BASE), "m.q.bias", "m.q", ""},
    {P "lm_head.weight", ROLE(BASE), "lm_head.weight", "lm_head", ""},
    /* base_layer: dropped from base paths and modules, part of LoRA keys */
    {P "model.layers.0.q_proj.base_layer.weight", ROLE(BASE), "model.layers.0.q_proj.weight", "model.layers.0.q_proj",
     ""},
    {P "m.experts.base_layer.base_layer.gate_up_proj", ROLE(BASE), "m.experts.gate_up_proj", "m.experts", ""},
    {"m.experts.lora_A.default.weight", ROLE(LORA_A), P "m.experts.lora_A.weight", "m.experts", "default"},
    {"m.experts.base_layer.lora_A.default.weight", ROLE(LORA_A), P "m.experts.base_layer.lora_A.weight", "m.experts",
     "default"},
    {"base_layer", ROLE(BASE), "base_layer", "", ""},
    {P "lm_head.original_module.weight", ROLE(BASE), "lm_head.weight", "lm_head", ""},
    {P "m.emb.token_adapter.base_layer.weight", ROLE(BASE), "m.emb.weight", "m.emb", ""},
    {"m.token_adapter.weight", ROLE(BASE), "m.token_adapter.weight", "m.token_adapter", ""},
    /* experts */
    {"model.layers.3.mlp.experts.127.gate_proj.lora_B.p.weight", ROLE(LORA_B),
     P "model.layers.3.mlp.experts.127.gate_proj.lora_B.weight", "model.layers.3.mlp.experts.127.gate_proj", "p"},
    {"model.layers.3.mlp.experts.gate_up_proj.lora_A.weight", ROLE(LORA_A),
     P "model.layers.3.mlp.experts.gate_up_proj.lora_A.weight", "model.layers.3.mlp.experts.gate_up_proj", ""},
    /* adapters and modules with awkward names */
    {"m.q_proj.lora_A.q_proj.weight", ROLE(LORA_A), P "m.q_proj.lora_A.weight", "m.q_proj", "q_proj"},
    {"m.weight.lora_A.a.weight", ROLE(LORA_A), P "m.weight.lora_A.weight", "m.weight", "a"},
    {"m.q.lora_A.weight.weight", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q", "weight"},
    {"m.q.lora_B.bias.weight", ROLE(LORA_B), P "m.q.lora_B.weight", "m.q", "bias"},
    {"m.q.lora_B.bias.bias", ROLE(LORA_B_BIAS), P "m.q.lora_B.bias", "m.q", "bias"},
    {"m.q.lora_B.lora_A.weight", ROLE(LORA_B), P "m.q.lora_B.weight", "m.q", "lora_A"},
    {"m.q.lora_A.modules_to_save.weight", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q", "modules_to_save"},
    {"m.s.modules_to_save.modules_to_save.weight", ROLE(MODULES_TO_SAVE), P "m.s.weight", "m.s", "modules_to_save"},
    /* modules called like LoRA, where PEFT's own levels below them say that they are modules */
    {"model.lora_router.base_layer.weight", ROLE(BASE), "model.lora_router.weight", "model.lora_router", ""},
    {"model.w_lora.lora.0.base_layer.weight", ROLE(BASE), "model.w_lora.lora.0.weight", "model.w_lora.lora.0", ""},
    {"model.w_lora.lora.0.lora_A.d.weight", ROLE(LORA_A), P "model.w_lora.lora.0.lora_A.weight", "model.w_lora.lora.0",
     "d"},
    {"enc.lora_A.base_layer.weight", ROLE(BASE), "enc.lora_A.weight", "enc.lora_A", ""},
    {"enc.lora_A.original_module.weight", ROLE(BASE), "enc.lora_A.weight", "enc.lora_A", ""},
    {"enc.lora_A.modules_to_save.d.weight", ROLE(MODULES_TO_SAVE), P "enc.lora_A.weight", "enc.lora_A", "d"},
    {"lora_head.original_module.weight", ROLE(BASE), "lora_head.weight", "lora_head", ""},
    {"lora_head.modules_to_save.d.out.bias", ROLE(MODULES_TO_SAVE), P "lora_head.out.bias", "lora_head", "d"},
    /* other words */
    {"model.exploration.weight", ROLE(BASE), "model.exploration.weight", "model.exploration", ""},
    {"model.Dorado.weight", ROLE(BASE), "model.Dorado.weight", "model.Dorado", ""},
    {"model.magnitudes.weight", ROLE(BASE), "model.magnitudes.weight", "model.magnitudes", ""},
    {"model.lora_router.gate.lora_A.d.weight", ROLE(LORA_A), P "model.lora_router.gate.lora_A.weight",
     "model.lora_router.gate", "d"},
    {"model.lora_router.lora_A.weight", ROLE(LORA_A), P "model.lora_router.lora_A.weight", "model.lora_router", ""},
    {"model.xlora_A.weight", ROLE(BASE), "model.xlora_A.weight", "model.xlora_A", ""},
    {"m.q.vera_lambda_b", ROLE(BASE), "m.q.vera_lambda_b", "m.q", ""},
    {"base_model.unilora_theta_d", ROLE(BASE), "base_model.unilora_theta_d", "base_model", ""},
    {"base_model.model", ROLE(BASE), "base_model.model", "base_model", ""},
    {"m.flux.linear_in.weight", ROLE(BASE), "m.flux.linear_in.weight", "m.flux.linear_in", ""},
    {"m.adapter.flux.linear_in.weight", ROLE(BASE), "m.adapter.flux.linear_in.weight", "m.adapter.flux.linear_in", ""},
    {"m.adapter.linear_in.bias", ROLE(BASE), "m.adapter.linear_in.bias", "m.adapter.linear_in", ""},
    /* wrappers */
    {"_fsdp_wrapped_module.model.layers.0.q_proj._orig_mod.lora_A.policy.weight", ROLE(LORA_A),
     P "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj", "policy"},
    {"module.module.model.q.lora_A._fsdp_wrapped_module.p._checkpoint_wrapped_module.weight", ROLE(LORA_A),
     P "model.q.lora_A.weight", "model.q", "p"},
    {"_orig_mod.module." P "model.q.weight", ROLE(BASE), "model.q.weight", "model.q", ""},
    {"model.module.q.weight", ROLE(BASE), "model.module.q.weight", "model.module.q", ""},
    {"module", ROLE(BASE), "module", "", ""},
    {"_forward_module." P "model.q.lora_A.d.weight", ROLE(LORA_A), P "model.q.lora_A.weight", "model.q", "d"},
    {"_forward_module.model.q.weight", ROLE(BASE), "model.q.weight", "model.q", ""},
    {"pretrained_model." P "model.q.lora_B.d.weight", ROLE(LORA_B), P "model.q.lora_B.weight", "model.q", "d"},
    {"pretrained_model." P "lm_head.weight", ROLE(BASE), "lm_head.weight", "lm_head", ""},
    {"actor.module." P "score.modules_to_save.d.weight", ROLE(MODULES_TO_SAVE), P "score.weight", "score", "d"},
    {P P "model.q.lora_A.d.weight", ROLE(LORA_A), P P "model.q.lora_A.weight", "base_model.model.model.q", "d"},
    {"v_head.base_model.model", ROLE(BASE), "v_head.base_model.model", "v_head.base_model", ""},
    {"v_head.base_model.x.model.weight", ROLE(BASE), "v_head.base_model.x.model.weight", "v_head.base_model.x.model",
     ""},
    {"decoder.layers.0.linear_qkv.to_wrap.weight", ROLE(BASE), "decoder.layers.0.linear_qkv.weight",
     "decoder.layers.0.linear_qkv", ""},
    {"my_orig_mod.to_wrap2.weight", ROLE(BASE), "my_orig_mod.to_wrap2.weight", "my_orig_mod.to_wrap2", ""},
};

static const struct {
    const char *raw, *has;
} bad_names[] = {
    {"m.q.lora_E.default", "\"lora_E\""},
    {"m.q.lora_E", "\"lora_E\""},
    {"m.q.lora_ranknum", "\"lora_ranknum\""},
    {"m.q.lora_ranknum.default", "\"lora_ranknum\""},
    {"m.q.lora_C.weight", "\"lora_C\""},
    {"m.q.lora_C.default.weight", "\"lora_C\""},
    {"m.q.lora_embedding_C.default.bias", "\"lora_embedding_C\""},
    {"model.layers.0.self_attn.q_proj.lora_a", "\"lora_a\""},
    {"m.q.lora_diag.p", "\"lora_diag\""},
    {"m.lora_router.weight", "\"lora_router\""},
    {"m.q.lora_", "\"lora_\""},
    /* layouts that are not PEFT's, each of which was dropped as a base parameter */
    {"m.experts.w1_lora_A.0", "\"w1_lora_A\""},
    {"m.experts.gate_up_proj_lora_A", "\"gate_up_proj_lora_A\""},
    {"m.linear.adapter.weight_magnitude", "\"weight_magnitude\""},
    {"m.attn.to_k_lora.down.weight", "\"to_k_lora\""},
    {"m.attn.processor.to_q_lora.up.weight", "\"to_q_lora\""},
    {"m.q.dora_scale", "\"dora_scale\""},
    {"m.q.magnitude", "\"magnitude\""},
    {"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "\"lora_unet_down_blocks_0_attn1_to_q\""},
    {"lora_unet_down_blocks_0_attn1_to_q.alpha", "looks like LoRA"},
    {"m.q.hada_w1_a", "\"hada_w1_a\""},
    {"m.q.lokr_w1", "\"lokr_w1\""},
    {"m.q.lora.down.weight", "\"lora\""},
    {"m.lora2.q.k.v.w.weight", "\"lora2\""},
    {"m.q.loraDown.weight", "\"loraDown\""},
    {"m.q.LoRA_A.default.weight", "\"LoRA_A\""},
    {"m.qLora.weight", "\"qLora\""},
    {"model.lora_router.gate.weight", "\"lora_router\""},
    {"model.lora.0.weight", "\"lora\""},
    {"m.base_layer.w1_lora_A.0", "\"w1_lora_A\""},
    {"m.original_module.lora_scale", "\"lora_scale\""},
    {"lora_.x.weight.y.lora_", "\"lora_\""},
    {"m.q.lora_A.default.foo", "\"lora_A\" is followed by \"default.foo\""},
    {"m.q.lora_B.default.base.weight", "\"lora_B\" is followed by \"default.base.weight\""},
    {"m.q.lora_A.v1.2.weight", "an adapter name cannot contain a dot"},
    {"m.q.lora_A.default.parametrizations.weight.original0", "\"lora_A\""},
    {"m.q.lora_A.bias", "lora_A has no bias"},
    {"m.q.lora_A.default.bias", "lora_A has no bias"},
    {"m.q.lora_embedding_A.d.bias", "lora_embedding_A has no bias"},
    {"m.q.lora_magnitude_vector.bias", "lora_magnitude_vector has no bias"},
    {"lora_A.default.weight", "names no module"},
    {"base_model.model.lora_A.weight", "names no module"},
    {"lora_B", "names no module"},
    {"base_layer.lora_A.weight", "names no module"},
    {"token_adapter.trainable_tokens_delta.default", "names no module"},
    {"modules_to_save.default.weight", "names no module"},
    {"m.score.modules_to_save", "modules_to_save.<adapter>.<parameter>"},
    {"m.score.modules_to_save.weight", "modules_to_save.<adapter>.<parameter>"},
    {"decoder.layers.0.linear_qkv.adapter.linear_in.weight", "Megatron"},
    {"decoder.layers.0.linear_qkv.adapter.adapter_q.linear_out.weight", "Megatron"},
    {"", "empty segment at byte 0"},
    {".m.weight", "empty segment at byte 0"},
    {"m..weight", "empty segment at byte 2"},
    {"m.weight.", "empty segment at byte 9"},
    {"_orig_mod", "only wrapper"},
    {"_orig_mod._fsdp_wrapped_module", "only wrapper"},
};

static void check_name(const char *raw, const name_case *want)
{
    lorasync_error err;
    lorasync_name  n;
    memset(&n, 0xaa, sizeof n);
    err.text[0] = 0;
    if (lorasync_parse_name(raw, &n, &err) != LORASYNC_OK) {
        fprintf(stderr, "%s: %s\n", raw, err.text);
        CHECK(!"parse_name failed");
        return;
    }
    CHECK_EQ(n.role, want->role);
    CHECK_TEXT(n.key, want->key);
    CHECK_TEXT(n.module, want->module);
    CHECK_TEXT(n.adapter, want->adapter);
}

static void name_table(void)
{
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) check_name(names[i].raw, &names[i]);
}

/* The key of a LoRA parameter is a name again: of the same parameter, with no adapter. With base_model.model. in front
   nothing changes. */
static void name_round_trip(void)
{
    size_t i;
    char   raw[LORASYNC_MAX_NAME];
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        name_case want = names[i];
        want.adapter   = "";
        if (want.role == ROLE(MODULES_TO_SAVE)) { /* a file key of these looks like a base parameter */
            lorasync_name   n;
            lorasync_status status = lorasync_parse_name(want.key, &n, NULL);
            if (strstr(want.key, "lora_A.")) CHECK_EQ(n.role, ROLE(LORA_A));
            else CHECK_EQ(status, lorasync_looks_like_lora(want.key) ? LORASYNC_E_NAME : LORASYNC_OK);
            continue;
        }
        if (want.role == ROLE(BASE) && lorasync_looks_like_lora(want.key))
            continue; /* nothing says any more that it is
                                                                                        none */
        if (strchr(want.key, '.') && strcmp(want.key, "base_model.model") != 0) check_name(want.key, &want);
        if (want.role != ROLE(BASE) || strstr(want.key, "base_model.model")) continue;
        snprintf(raw, sizeof raw, P "%s", want.key);
        check_name(raw, &want);
    }
}

/* `raw` with wrapper segments put anywhere; what it means must not change. */
static void insert_wrappers(const char *raw, char *out, size_t capacity, u64 *state)
{
    static const char *const wrappers[] = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod",
                                           "to_wrap"};
    const char              *at         = raw;
    size_t                   used       = 0;
    out[0]                              = 0;
    for (;;) {
        size_t n = strcspn(at, ".");
        while (test_random(state) % 3 == 0)
            used += (size_t)snprintf(out + used, capacity - used, "%s.", wrappers[test_random(state) % 4]);
        if (at == raw)
            while (test_random(state) % 3 == 0) used += (size_t)snprintf(out + used, capacity - used, "module.");
        used += (size_t)snprintf(out + used, capacity - used, "%.*s", (int)n, at);
        if (!at[n]) break;
        used += (size_t)snprintf(out + used, capacity - used, ".");
        at += n + 1;
    }
    if (test_random(state) % 4 == 0) snprintf(out + used, capacity - used, "._orig_mod");
}

static void name_wrappers(void)
{
    u64    state = 7;
    size_t i;
    int    k;
    char   raw[2048];
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(names[i].key, "module") == 0) continue;
        for (k = 0; k < 50; k++) {
            insert_wrappers(names[i].raw, raw, sizeof raw, &state);
            if (strlen(raw) < LORASYNC_MAX_NAME) check_name(raw, &names[i]);
        }
    }
}

static void name_errors(void)
{
    lorasync_error err;
    lorasync_name  n, before;
    u64            state = 8;
    char           raw[2048];
    size_t         i;
    memset(&before, 0x5a, sizeof before);
    for (i = 0; i < sizeof bad_names / sizeof bad_names[0]; i++) {
        n           = before;
        err.text[0] = 0;
        CHECK_EQ(lorasync_parse_name(bad_names[i].raw, &n, &err), LORASYNC_E_NAME);
        CHECK_HAS(err.text, bad_names[i].has);
        CHECK_HAS(err.text, bad_names[i].raw);
        CHECK(memcmp(&n, &before, sizeof n) == 0);
        CHECK_EQ(lorasync_parse_name(bad_names[i].raw, &n, NULL), LORASYNC_E_NAME);
        if (strstr(bad_names[i].has, "empty") || strstr(bad_names[i].has, "wrapper")) continue;
        insert_wrappers(bad_names[i].raw, raw, sizeof raw, &state);
        if (strlen(raw) < LORASYNC_MAX_NAME) CHECK_EQ(lorasync_parse_name(raw, &n, &err), LORASYNC_E_NAME);
    }
    CHECK_EQ(lorasync_parse_name(NULL, &n, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_parse_name("m.weight", NULL, &err), LORASYNC_E_ARGUMENT);
}

/* ---- what looks like LoRA */

/* The vocabulary, word by word, slowly: letters are cut into words, and a word must be equal to one of the list. */
static int looks_like_lora_reference(const char *name)
{
    static const char *const words[] = {"lora", "adalora", "dora", "loha", "lokr", "hada", "magnitude"};
    size_t                   from = 0, to, i, k, n = strlen(name);
    for (from = 0; from < n; from++) {
        if (!isalpha((unsigned char)name[from])) continue;
        if (from && isalpha((unsigned char)name[from - 1]) &&
            !(islower((unsigned char)name[from - 1]) && isupper((unsigned char)name[from])))
            continue;
        for (to = from + 1; to <= n; to++) {
            char end = to < n ? name[to] : '.';
            if (isalpha((unsigned char)end) && !isupper((unsigned char)end)) continue;
            for (i = 0; i < sizeof words / sizeof words[0]; i++) {
                if (strlen(words[i]) != to - from) continue;
                for (k = from; k < to && tolower((unsigned char)name[k]) == words[i][k - from]; k++) {}
                if (k == to) return 1;
            }
        }
    }
    return 0;
}

/* Random names of syllables: whatever has a word of the vocabulary is LoRA's or an error, and all else is neither. */
static void looks_like_lora(void)
{
    static const char *const bits[]   = {"lora",      "Lora", "LoRA", "dora", "A",    "B",  "_",       ".",    "1",
                                         "x",         "q",    "Q",    "proj", "hada", "lo", "weight",  "down", "loha",
                                         "magnitude", "ada",  "-",    "unet", "lokr", "s",  "\303\251"};
    u64                      state    = 31;
    size_t                   num_like = 0, i;
    lorasync_error           err;
    lorasync_name            n;
    for (i = 0; i < 60000; i++) {
        char   raw[256];
        size_t used = 0, parts = 1 + test_random(&state) % 7;
        int    like;
        used += (size_t)snprintf(raw, sizeof raw, "m.");
        while (parts--)
            used += (size_t)snprintf(raw + used, sizeof raw - used, "%s",
                                     bits[test_random(&state) % (sizeof bits / sizeof bits[0])]);
        like = looks_like_lora_reference(raw);
        if (strstr(raw, "..") || raw[used - 1] == '.') continue;
        if (lorasync_looks_like_lora(raw) != like) fprintf(stderr, "%s\n", raw);
        CHECK_EQ(lorasync_looks_like_lora(raw), like);
        num_like += (size_t)like;
        if (!like) {
            CHECK_EQ(lorasync_parse_name(raw, &n, &err), LORASYNC_OK);
            CHECK_EQ(n.role, ROLE(BASE));
        } else if (lorasync_parse_name(raw, &n, &err) == LORASYNC_OK) {
            CHECK(n.role != ROLE(BASE));
        }
    }
    CHECK(num_like > 10000 && num_like < 50000);
    CHECK_EQ(lorasync_looks_like_lora("m.q.lora_A.default.weight"), 1);
    CHECK_EQ(lorasync_looks_like_lora("m.emb.trainable_tokens_delta"), 1);
    CHECK_EQ(lorasync_looks_like_lora("m.adapter.linear_in.weight"), 1);
    CHECK_EQ(lorasync_looks_like_lora("m.adapter.adapter_q.linear_out.weight"), 1);
    CHECK_EQ(lorasync_looks_like_lora("m.adapter.linear_in.bias"), 0);
    CHECK_EQ(lorasync_looks_like_lora(NULL), 0);
}

/* What entries of a filter and of a config say: module lists, what lies below, the text of modules_to_save. */
static void name_hints(void)
{
    static const struct {
        const char   *list; /* target, exclude, saved or pattern */
        const char   *entry, *raw;
        lorasync_role role; /* NONE: an error */
    } cases[] = {
        {"target", "lora_router", "m.0.lora_router.weight", ROLE(BASE)},
        {"target", "lora_router", "m.0.lora_router.gate.weight", ROLE(BASE)},
        {"target", "0.lora_router", "m.0.lora_router.weight", ROLE(BASE)},
        {"target", "router", "m.0.lora_router.weight", ROLE(NONE)},
        {"target", "m", "m.0.lora_router.weight", ROLE(NONE)}, /* LoRA on a module says nothing of those below */
        {"target", "lora_router", "m.0.lora_router.lora_C.weight", ROLE(NONE)},
        {"target", "lora_router", "m.0.lora_router.lora_A.weight", ROLE(LORA_A)},
        {"target", "m._orig_mod.0._checkpoint_wrapped_module.lora_router", "m.0.lora_router.weight", ROLE(BASE)},
        {"exclude", "lora_router", "m.0.lora_router.weight", ROLE(BASE)},
        {"exclude", "lora_router", "m.0.lora_router.lora_scale.weight", ROLE(BASE)},
        {"exclude", "m.0", "m.0.w1_lora_A.0", ROLE(BASE)},
        {"exclude", "m", "m.0.w1_lora_A.0", ROLE(NONE)}, /* excluding a module is not excluding all below it */
        {"exclude", "0", "m.0.q.w1_lora_A.0", ROLE(NONE)},
        {"exclude", "q", "m.0.q.lora_E.d", ROLE(BASE)},
        {"exclude", "gate", "m.0.lora_router.gate.weight", ROLE(BASE)},
        {"exclude", "weight", "m.0.lora_router.weight", ROLE(NONE)}, /* a parameter is no module */
        {"exclude", "lora_scale", "m.0.lora_scale", ROLE(BASE)},
        {"exclude", "lora", "m.0.lora_router.weight", ROLE(NONE)},
        {"exclude", "q", "m.0.q.lora_A.d.weight", ROLE(LORA_A)}, /* the matcher leaves it out */
        {"exclude", "enc.lora_A", "m.enc.lora_A.weight", ROLE(BASE)},
        {"exclude", "enc.lora_A", "m.dec.lora_A.weight", ROLE(LORA_A)},
        {"exclude", "adapter", "m.adapter.linear_in.weight", ROLE(BASE)},
        {"pattern", ".*\\.lora_router", "m.0.lora_router.gate.weight", ROLE(BASE)},
        {"pattern", ".*\\.lora_rout", "m.0.lora_router.gate.weight", ROLE(NONE)},
        {"pattern", "m\\.enc\\..*", "m.enc.lora_A.weight", ROLE(LORA_A)}, /* LoRA on enc, which it does not match */
        {"pattern", "m.*", "m.enc.lora_A.weight", ROLE(LORA_A)},
        {"pattern", "m.*", "m.enc.w1_lora_A.0", ROLE(BASE)},
        {"pattern", "m", "m.enc.w1_lora_A.0", ROLE(NONE)},
        {"pattern", "m\\.enc", "m.enc.lora_A.weight", ROLE(LORA_A)},
        {"saved", "lora_head", "lora_head.weight", ROLE(BASE)},
        {"saved", "head", "lora_head.weight", ROLE(BASE)}, /* PEFT compares the end of the text */
        {"saved", "head", "lora_heads.weight", ROLE(NONE)},
        {"saved", "classifier", "classifier.lora_router.weight", ROLE(BASE)},
        {"saved", "weight", "m.lora_router.weight", ROLE(NONE)},
        {"saved", "enc.lora_A", P "enc.lora_A.weight", ROLE(BASE)},
        {"saved", "classifier", P "classifier.q.lora_A.weight", ROLE(LORA_A)},
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        lorasynci_hints   h;
        lorasync_pattern *pattern = NULL;
        lorasync_name     n;
        lorasync_error    err;
        lorasync_status   status;
        memset(&h, 0, sizeof h);
        memset(&n, 0, sizeof n);
        if (cases[i].list[0] == 'p') {
            REQUIRE(lorasync_pattern_compile(cases[i].entry, NULL, &pattern, &err) == LORASYNC_OK);
            lorasynci_hint_excluded(&h, pattern);
        } else {
            lorasynci_hint_list(&h, NULL, 0, LORASYNCI_NAMES_OUT);
            lorasynci_hint_list(&h, &cases[i].entry, 1,
                                cases[i].list[0] == 't'   ? LORASYNCI_NAMES_MODULE
                                : cases[i].list[0] == 'e' ? LORASYNCI_NAMES_OUT
                                                          : LORASYNCI_NAMES_SAVED);
        }
        status = lorasynci_name_read(cases[i].raw, &h, &n, &err);
        if ((status == LORASYNC_OK) != (cases[i].role != ROLE(NONE)))
            fprintf(stderr, "%s %s: %s\n", cases[i].entry, cases[i].raw, status < 0 ? err.text : "no error");
        CHECK_EQ(status, cases[i].role != ROLE(NONE) ? LORASYNC_OK : LORASYNC_E_NAME);
        if (status == LORASYNC_OK) CHECK_EQ(n.role, cases[i].role);
        lorasync_pattern_free(pattern);
    }
}

/* The host's word about a parameter. */
static void name_roles(void)
{
    static const struct {
        const char   *raw;
        lorasync_role role;
        const char   *key, *module; /* key NULL: an error */
    } cases[] = {
        {"m.lora_router.weight", ROLE(BASE), "m.lora_router.weight", "m.lora_router"},
        {"enc.lora_A.weight", ROLE(BASE), "enc.lora_A.weight", "enc.lora_A"},
        {P "m.q.base_layer.weight", ROLE(BASE), "m.q.weight", "m.q"},
        {"lora_head.weight", ROLE(MODULES_TO_SAVE), P "lora_head.weight", "lora_head"},
        {"_forward_module." P "lora_head.out.bias", ROLE(MODULES_TO_SAVE), P "lora_head.out.bias", "lora_head.out"},
        {P "head.modules_to_save.d.out.bias", ROLE(MODULES_TO_SAVE), P "head.out.bias", "head"},
        {"m.q.base_layer.bias", ROLE(BIAS), P "m.q.base_layer.bias", "m.q"},
        {"m.norm.bias", ROLE(BIAS), P "m.norm.bias", "m.norm"},
        {"m.norm.weight", ROLE(BIAS), NULL, "does not end in bias"},
        {"m.q", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q"},
        {"m.q", ROLE(LORA_B), P "m.q.lora_B.weight", "m.q"},
        {"m.q", ROLE(LORA_B_BIAS), P "m.q.lora_B.bias", "m.q"},
        {"m.q", ROLE(MAGNITUDE), P "m.q.lora_magnitude_vector", "m.q"},
        {"m.emb", ROLE(EMBEDDING_A), P "m.emb.lora_embedding_A", "m.emb"},
        {"m.emb", ROLE(EMBEDDING_B), P "m.emb.lora_embedding_B", "m.emb"},
        {"m.emb", ROLE(TRAINABLE_TOKENS), P "m.emb.token_adapter.trainable_tokens_delta", "m.emb"},
        {"m.emb.token_adapter", ROLE(TRAINABLE_TOKENS), P "m.emb.token_adapter.trainable_tokens_delta", "m.emb"},
        {"m.experts.base_layer", ROLE(LORA_A), P "m.experts.base_layer.lora_A.weight", "m.experts"},
        {"m.lora_router", ROLE(LORA_A), P "m.lora_router.lora_A.weight", "m.lora_router"},
        {"m.q.lora_A.d.weight", ROLE(LORA_A), P "m.q.lora_A.weight", "m.q"},
        {"m.q.lora_B.bias", ROLE(LORA_B_BIAS), P "m.q.lora_B.bias", "m.q"},
        {"m.q.lora_A.d.weight", ROLE(LORA_B), NULL, "is that of a lora_A, and piece.role says lora_B"},
        {"m.q.lora_B.d.weight", ROLE(LORA_B_BIAS), NULL, "is that of a lora_B"},
        {"m.q", (lorasync_role)77, NULL, "77, which is no role"},
        {"m.q", (lorasync_role)-1, NULL, "no role"},
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        lorasync_name   n;
        lorasync_error  err;
        lorasync_status status = lorasynci_name_as(cases[i].raw, cases[i].role, NULL, &n, &err);
        if (!cases[i].key) {
            CHECK(status < 0);
            CHECK_HAS(err.text, cases[i].module);
            CHECK_HAS(err.text, cases[i].raw);
            continue;
        }
        CHECK_EQ(status, LORASYNC_OK);
        if (status < 0) continue;
        CHECK_EQ(n.role, cases[i].role);
        CHECK_TEXT(n.key, cases[i].key);
        CHECK_TEXT(n.module, cases[i].module);
    }
    for (i = 0; i < sizeof names / sizeof names[0]; i++) { /* NONE is what the name says; so is the role that it says */
        lorasync_name  n;
        lorasync_error err;
        CHECK_EQ(lorasynci_name_as(names[i].raw, ROLE(NONE), NULL, &n, &err), LORASYNC_OK);
        CHECK_EQ(n.role, names[i].role);
        CHECK_EQ(lorasynci_name_as(names[i].raw, names[i].role, NULL, &n, &err), LORASYNC_OK);
        CHECK_TEXT(n.key, names[i].key);
        CHECK_TEXT(n.module, names[i].module);
    }
}

/* Lengths around the limit, of the name and of the key, which may be 17 bytes longer. */
static void name_lengths(void)
{
    size_t n;
    for (n = 1; n < 600; n++) {
        char           base[700], lora[800], dots[700];
        lorasync_error err;
        lorasync_name  name;
        size_t         i;
        memset(base, 'x', n);
        base[n] = 0;
        CHECK_EQ(lorasync_parse_name(base, &name, &err), n < LORASYNC_MAX_NAME ? LORASYNC_OK : LORASYNC_E_NAME);
        if (n >= LORASYNC_MAX_NAME) CHECK_HAS(err.text, "512 bytes or more");
        else CHECK_TEXT(name.key, base);
        snprintf(lora, sizeof lora, "%s.lora_A.a.weight", base);
        CHECK_EQ(lorasync_parse_name(lora, &name, &err),
                 n + 17 + 14 < LORASYNC_MAX_NAME ? LORASYNC_OK : LORASYNC_E_NAME);
        for (i = 0; i < n; i++) dots[i] = i % 2 ? '.' : 'y';
        dots[n] = 0;
        CHECK_EQ(lorasync_parse_name(dots, &name, &err),
                 n % 2 && n < LORASYNC_MAX_NAME ? LORASYNC_OK : LORASYNC_E_NAME);
        if (n % 2 && n < LORASYNC_MAX_NAME) CHECK_TEXT(name.key, dots);
    }
}

static void role_text(void)
{
    CHECK_TEXT(lorasync_role_text(ROLE(NONE)), "none");
    CHECK_TEXT(lorasync_role_text(ROLE(BASE)), "base");
    CHECK_TEXT(lorasync_role_text(ROLE(BIAS)), "bias");
    CHECK_TEXT(lorasync_role_text(ROLE(LORA_A)), "lora_A");
    CHECK_TEXT(lorasync_role_text(ROLE(LORA_B)), "lora_B");
    CHECK_TEXT(lorasync_role_text(ROLE(LORA_B_BIAS)), "lora_B.bias");
    CHECK_TEXT(lorasync_role_text(ROLE(EMBEDDING_A)), "lora_embedding_A");
    CHECK_TEXT(lorasync_role_text(ROLE(EMBEDDING_B)), "lora_embedding_B");
    CHECK_TEXT(lorasync_role_text(ROLE(MAGNITUDE)), "lora_magnitude_vector");
    CHECK_TEXT(lorasync_role_text(ROLE(MODULES_TO_SAVE)), "modules_to_save");
    CHECK_TEXT(lorasync_role_text(ROLE(TRAINABLE_TOKENS)), "trainable_tokens_delta");
    CHECK_TEXT(lorasync_role_text((lorasync_role)99), "unknown role");
}

/* ---- drop_adapter */

/* Component by component, slowly. */
static void drop_adapter_reference(const char *key, const char *adapter, char *out)
{
    const char *part[64];
    size_t      size[64], num = 0, i, gone = 64;
    for (;;) {
        part[num] = key;
        size[num] = strcspn(key, ".");
        key += size[num++];
        if (!*key++) break;
    }
    for (i = num; i-- > 1 && i + 2 >= num;)
        if (gone == 64 && size[i] == strlen(adapter) && memcmp(part[i], adapter, size[i]) == 0 && size[i]) gone = i;
    for (i = 0; i < num; i++) {
        if (i == gone) continue;
        if (i) *out++ = '.';
        memcpy(out, part[i], size[i]);
        out += size[i];
    }
    *out = 0;
}

static void drop_adapter(void)
{
    static const char *const table[][3] = {
        {"m.q_proj.lora_A.default.weight", "default", "m.q_proj.lora_A.weight"},
        {"m.emb.lora_embedding_A.default", "default", "m.emb.lora_embedding_A"},
        {"m.default.q.lora_A.default.weight", "default", "m.default.q.lora_A.weight"},
        {"m.q.lora_A.policy.weight", "policy", "m.q.lora_A.weight"},
        {"m.q.lora_A.policy.weight", "default", "m.q.lora_A.policy.weight"},
        {"m.q.lora_magnitude_vector.default.weight", "default", "m.q.lora_magnitude_vector.weight"},
        {"default", "default", "default"},
        {"default.weight", "default", "default.weight"},
        {"a.default.default", "default", "a.default"},
        {"a.default.b.c", "default", "a.default.b.c"},
        {"a.xdefault.c", "default", "a.xdefault.c"},
        {"a.b.c", "", "a.b.c"},
        {"", "a", ""},
    };
    static const char *const word[] = {"a", "b", "ab", "default", "weight", "lora_A"};
    u64                      state  = 9;
    size_t                   i;
    char                     out[256], in_place[256], want[256], key[256];
    for (i = 0; i < sizeof table / sizeof table[0]; i++) {
        lorasync_drop_adapter(table[i][0], table[i][1], out);
        CHECK_TEXT(out, table[i][2]);
    }
    for (i = 0; i < 20000; i++) {
        size_t      n = 1 + test_random(&state) % 6, used = 0;
        const char *adapter = word[test_random(&state) % 6];
        while (n--)
            used +=
                (size_t)snprintf(key + used, sizeof key - used, "%s%s", used ? "." : "", word[test_random(&state) % 6]);
        drop_adapter_reference(key, adapter, want);
        lorasync_drop_adapter(key, adapter, out);
        CHECK_TEXT(out, want);
        memcpy(in_place, key, used + 1);
        lorasync_drop_adapter(in_place, adapter, in_place);
        CHECK_TEXT(in_place, want);
    }
}

/* ---- patterns */

#define COLPALI                                                                                                        \
    "(.*(language_model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(custom_text_proj).*$)"

/* Pattern, text, and what Python's re.fullmatch says. */
static const struct {
    const char *pattern, *text;
    int         matches;
} fullmatch[] = {
    {COLPALI, "model.language_model.layers.0.self_attn.q_proj", 1},
    {COLPALI, "custom_text_proj", 1},
    {COLPALI, "model.vision_tower.layers.0.q_proj", 0},
    {COLPALI, "language_model.layers.3.mlp.up_proj.inner", 1},
    {COLPALI, "language_model.norm", 0},
    {"classifier", "classifier", 1},
    {"classifier", "bert.classifier", 0},
    {"classifier", "classifierx", 0},
    {".*\\.(q|k|v|o)_proj", "model.layers.0.self_attn.q_proj", 1},
    {".*\\.(q|k|v|o)_proj", "q_proj", 0},
    {".*\\.(q|k|v|o)_proj", "model.layers.0.self_attn.qk_proj", 0},
    {"(?:.*\\.)?(?:q_proj)", "q_proj", 1},
    {"(?:.*\\.)?(?:q_proj)", "a.q_proj", 1},
    {"(?:.*\\.)?(?:q_proj)", "a.xq_proj", 0},
    {"(?:.*\\.)?(?:^model\\.layers\\.0\\.q_proj)", "model.layers.0.q_proj", 1},
    {"(?:.*\\.)?(?:^model\\.layers\\.0\\.q_proj)", "x.model.layers.0.q_proj", 0},
    {"(?:.*\\.)?(?:layers.1\\d?.mlp)", "a.layers.1.mlp", 1},
    {"(?:.*\\.)?(?:layers.1\\d?.mlp)", "a.layers.12.mlp", 1},
    {"(?:.*\\.)?(?:layers.1\\d?.mlp)", "a.layers.2.mlp", 0},
    {"(?:.*\\.)?(?:layers.1\\d?.mlp)", "layersx1xmlp", 1},
    {"model\\.layers\\.(?:[0-9]|1[0-5])\\.self_attn\\.(?:q|v)_proj", "model.layers.15.self_attn.v_proj", 1},
    {"model\\.layers\\.(?:[0-9]|1[0-5])\\.self_attn\\.(?:q|v)_proj", "model.layers.16.self_attn.v_proj", 0},
    {"model\\.layers\\.(?:[0-9]|1[0-5])\\.self_attn\\.(?:q|v)_proj", "model.layers.9.self_attn.q_proj", 1},
    {"^(?!.*vision).*\\.(?:q_proj|v_proj)$", "model.language.q_proj", 1},
    {"^(?!.*vision).*\\.(?:q_proj|v_proj)$", "model.vision.q_proj", 0},
    {"^(?!.*vision).*\\.(?:q_proj|v_proj)$", "q_proj", 0},
    {"(?!.*(?:lm_head|embed)).*proj", "model.q_proj", 1},
    {"(?!.*(?:lm_head|embed)).*proj", "embed.q_proj", 0},
    {"(?!.*(?:lm_head|embed)).*proj", "proj", 1},
    {"(?!.*(?:lm_head|embed)).*proj", "lm_head_proj", 0},
    {".*experts\\.\\d{1,3}\\.(?:gate|up|down)_proj", "m.experts.127.up_proj", 1},
    {".*experts\\.\\d{1,3}\\.(?:gate|up|down)_proj", "m.experts.1270.up_proj", 0},
    {".*experts\\.\\d{1,3}\\.(?:gate|up|down)_proj", "m.experts.x.up_proj", 0},
    {"(?=.*\\.self_attn\\.)(?=.*q_proj).*", "a.self_attn.q_proj", 1},
    {"(?=.*\\.self_attn\\.)(?=.*q_proj).*", "a.q_proj", 0},
    {"(?=.*\\.self_attn\\.)(?=.*q_proj).*", "a.self_attn.k_proj", 0},
    {"(?P<root>model|transformer)\\.h\\.\\d+\\.attn\\.c_(attn|proj)", "transformer.h.11.attn.c_attn", 1},
    {"(?P<root>model|transformer)\\.h\\.\\d+\\.attn\\.c_(attn|proj)", "transformer.h..attn.c_attn", 0},
    {"(?P<root>model|transformer)\\.h\\.\\d+\\.attn\\.c_(attn|proj)", "gpt.h.1.attn.c_attn", 0},
    {"\\Amodel\\.\\w+\\Z", "model.norm", 1},
    {"\\Amodel\\.\\w+\\Z", "model.a.b", 0},
    {".*\\bproj\\b.*", "a.proj.b", 1},
    {".*\\bproj\\b.*", "a.q_proj", 0},
    {".*\\bproj\\b.*", "proj", 1},
    {"a$\\n", "a\n", 1},
    {"a$\\n", "a", 0},
    {"a$", "a", 1},
    {"a$", "a\n", 0},
    {"a\\Z\\n", "a\n", 0},
    {".*(?=b$).*", "ab\n", 0},
    {".*(?=b$).*", "ab", 1},
    {"((?!\\.).)+", "abc", 1},
    {"((?!\\.).)+", "a.b", 0},
    {"(?!(?!.*x).*y).*", "xy", 1},
    {"(?!(?!.*x).*y).*", "y", 0},
    {"(?!(?!.*x).*y).*", "x", 1},
    {"(?!(?!.*x).*y).*", "", 1},
    {"[^.]+\\.[^.]+", "a.b", 1},
    {"[^.]+\\.[^.]+", "a.b.c", 0},
    {"[]^-]+", "^-]", 1},
    {"[]^-]+", "a", 0},
    {"[^]]", "a", 1},
    {"[^]]", "]", 0},
    {"[\\d.-]+x{2}", "1.-2xx", 1},
    {"[\\d.-]+x{2}", "1x", 0},
    {"x{", "x{", 1},
    {"x{}", "x{}", 1},
    {"x{,2}", "", 1},
    {"x{,2}", "xx", 1},
    {"x{,2}", "xxx", 0},
    {"x{a}", "x{a}", 1},
    {"}]", "}]", 1},
    {"", "", 1},
    {"", "a", 0},
    {"|a", "", 1},
    {"|a", "a", 1},
    {"|a", "b", 0},
    {"()", "", 1},
    {"(|a)*b", "aab", 1},
    {"(|a)*b", "b", 1},
    {"(|a)*b", "a", 0},
    {"\\x41\\t\\\\", "A\t\\", 1},
    {"[\\b]", "\b", 1},
    {"caf\303\251+", "caf\303\251", 1},
    {"caf\303\251+", "caf\303\251\303\251", 1},
    {"caf\303\251+", "caf\303\251x", 0},
    {"[^a-b_]|a{}b{,}.a", " ", 1},
    {"[^a-b_]|a{}b{,}.a", "-ca", 0},
    {"[a-c][a\\-]", "aa", 1},
    {"[a-c][a\\-]", "aab ", 0},
    {".{,}?", "a-baca_{", 1},
    {".{,}?", "bca\n_a", 0},
    {"\\W{0,3}?[a-]", "-a", 1},
    {"\\W{0,3}?[a-]", "-1b\n{b{", 0},
    {"\\d?.", "b", 1},
    {"\\d?.", "-a_a.{", 0},
    {"|(a{0}|(\\w\\D{0}){1,2}_|[a-])?", "-", 1},
    {"|(a{0}|(\\w\\D{0}){1,2}_|[a-])?", "a\nab", 0},
    {"b{,}?\\d*?", "1", 1},
    {"b{,}?\\d*?", ".a", 0},
    {"b{,}", "b", 1},
    {"b{,}", "bcaaa{{ ", 0},
    {"(?!|\\D.|)*a{,2}?|", "a", 1},
    {"(?!|\\D.|)*a{,2}?|", ".aa.b ", 0},
    {"c.{,}", "ca. 1c", 1},
    {"c.{,}", "{\nbbb", 0},
    {"(?P<n384661042>){2,}?|.{1,3}b{,}", "_-abb", 1},
    {"(?P<n384661042>){2,}?|.{1,3}b{,}", "1caabaa\n", 0},
    {"(?:a)", "a", 1},
    {"(?:a)", "a_a11", 0},
    {"b{0}\\A|_+|", "_", 1},
    {"b{0}\\A|_+|", "\n aa \n ", 0},
    {"(?=)a(?P<n97932581>\\D?\?)|\\S{x}[\\w]{0,3}|", "ab", 1},
    {"(?=)a(?P<n97932581>\\D?\?)|\\S{x}[\\w]{0,3}|", "1_{", 0},
    {"_$||b[]a]c.", "_", 1},
    {"_$||b[]a]c.", " -", 0},
    {"^|(\\S)|[a\\-]?", "b", 1},
    {"^|(\\S)|[a\\-]?", "ca-1a-", 0},
    {".{,}?\\Z", "1 {{-a{{", 1},
    {".{,}?\\Z", "a\n1c._-1", 0},
    {"|a?|[^]]", ".", 1},
    {"|a?|[^]]", "{b_bca", 0},
    {"\\D\\d*?", "a", 1},
    {"\\D\\d*?", "_a-{", 0},
    {"[^\\s]|.a(?:.{1,2}?){.", "a", 1},
    {"[^\\s]|.a(?:.{1,2}?){.", "_-b", 0},
    {".(?:.{,2}[a-])*|.", "c-a_aa", 1},
    {".(?:.{,2}[a-])*|.", "b\n. ", 0},
    {".b{0,3}", "b", 1},
    {".b{0,3}", "{b_a", 0},
    {"\\B", "", 0}, /* 3.14 matches it */
    {"\\b|\\B|a", "", 0},
    {"\\s{4}", "\x1c\x1d\x1e\x1f", 1},
    {"\\S|\\x1c\\S", "\x1c ", 0},
    {"[\\S]", "\x1f", 0},
    {"\\s", "\x1b", 0},
    {"\\b..|", "b_", 1},
    {"\\b..|", "a{.a_1_.", 0},
    {"c(?=a?)|[^\\s]{,}[\\d_][]a]", "{a11a", 1},
    {"c(?=a?)|[^\\s]{,}[\\d_][]a]", "cb", 0},
    {"_?b.[^a-b_]", "b{.", 1},
    {"_?b.[^a-b_]", "ba aa ", 0},
    {"[^\\s][\\d_]", "._", 1},
    {"[^\\s][\\d_]", "c_a{.b", 0},
    {".{,}", "bbb-b--b", 1},
    {".{,}", "\nb", 0},
    {"[-a]b*", "-", 1},
    {"[-a]b*", "-{-ba\n", 0},
    {"[\\w]", "c", 1},
    {"[\\w]", "1b_", 0},
    {"c|..+_", "a-{_", 1},
    {"c|..+_", "ca", 0},
    {"[a-c]*?.a|\\W\\w{0}?_{", "aa{a", 1},
    {"[a-c]*?.a|\\W\\w{0}?_{", "-aaaa_.", 0},
    {"[^]]|\\W", "-", 1},
    {"[^]]|\\W", "aac", 0},
    {"|\\-{,}\\S{,}|.{}\\D", "{-c1.{11", 1},
    {"|\\-{,}\\S{,}|.{}\\D", "_\naa{", 0},
    {"\\W\\b|.?|", "a", 1},
    {"\\W\\b|.?|", ".-_\n1\n", 0},
    {"a{0,3}", "aa", 1},
    {"a{0,3}", "_", 0},
    {"(..)b", "{{b", 1},
    {"(..)b", "11b-", 0},
    {"_{}?|.|b[\\W.].b", "c", 1},
    {"_{}?|.|b[\\W.].b", "1c\nb_b-_", 0},
    {"\\Z(?:\\d{1,3}\\A^)|[\\w]{2,}.{1,2}|^", "acaa _", 1},
    {"\\Z(?:\\d{1,3}\\A^)|[\\w]{2,}.{1,2}|^", "a", 0},
    {"c|.{1,3}|aaa{1,2}", "aca", 1},
    {"c|.{1,3}|aaa{1,2}", "_a\n1c bb", 0},
    {"(\\b(?P<n857689872>a){,}.{x}?){,}?|\\S", "1", 1},
    {"(\\b(?P<n857689872>a){,}.{x}?){,}?|\\S", "{ab\nc", 0},
    {".{2}|.c|_{2}?(?!_\\W)c(?:||)", "ab", 1},
    {".{2}|.c|_{2}?(?!_\\W)c(?:||)", "a--aa", 0},
    {"(?!)|c{,}ca.{0}?|(?P<n522516453>a{0,3})", "aa", 1},
    {"(?!)|c{,}ca.{0}?|(?P<n522516453>a{0,3})", ".b{b 1", 0},
    {"\\A.+.", "-1b1baa ", 1},
    {"\\A.+.", "{{\naa{", 0},
    {"a{0}.", "b", 1},
    {"a{0}.", "-{\nb{-b", 0},
    {"cb|_?.{2}", "a_", 1},
    {"cb|_?.{2}", "-ab", 0},
    {"|\\W|\\w{0,3}_+", " ", 1},
    {"|\\W|\\w{0,3}_+", "acabb.1", 0},
    {".{1,3}?(?:\\x61)", " aaa", 1},
    {".{1,3}?(?:\\x61)", "-ac11baa", 0},
    {"\\W|(?=(?=))|.{x}", "-", 1},
    {"\\W|(?=(?=))|.{x}", "ca\n-b{a", 0},
    {"(?P<n333173244>{{,})\\dc{,2}?.", "1a", 1},
    {"(?P<n333173244>{{,})\\dc{,2}?.", "{1.\na\n1", 0},
    {"[^a-b_]|.$a{}\\s|c..}", "1", 1},
    {"[^a-b_]|.$a{}\\s|c..}", "-a", 0},
    {"|b*?|b{,2}(?!\n)", "bb", 1},
    {"|b*?|b{,2}(?!\n)", "..1..-b.", 0},
    {".|[^a]{,2}?.", "-.1", 1},
    {".|[^a]{,2}?.", "b_cbc", 0},
    {"b{,2}?", "b", 1},
    {"b{,2}?", "a", 0},
    {"..{1,3}\\S{}|\\D{0}.{2,}?|c{0}(?=c.|.)+", "-_cb  a_", 1},
    {"..{1,3}\\S{}|\\D{0}.{2,}?|c{0}(?=c.|.)+", "1", 0},
    {"_+|(?!b{1,3}_{2,}|[^]]{1,3}?)c*?|$.", "_", 1},
    {"_+|(?!b{1,3}_{2,}|[^]]{1,3}?)c*?|$.", "_-", 0},
    {"(\\.|b\\s).+", ".a 1", 1},
    {"(\\.|b\\s).+", "b\n.c--\n", 0},
    {"[^\\s]", "a", 1},
    {"[^\\s]", ".1-c1c1", 0},
    {"(?:[\\W.](?=..+?|(?P<n392936924>a{x})*))a{?", "{a{", 1},
    {"(?:[\\W.](?=..+?|(?P<n392936924>a{x})*))a{?", "\n1", 0},
    {"a[^a]|$|[a\\-]", "a", 1},
    {"a[^a]|$|[a\\-]", "-_.a_1  ", 0},
    {"(?=){2}[^\\s]{,2}", "ab", 1},
    {"(?=){2}[^\\s]{,2}", "_a a.", 0},
    {".{2}b", "b1b", 1},
    {".{2}b", "_ab b", 0},
    {"\\S{1,3}.|a", "b{-c", 1},
    {"\\S{1,3}.|a", ".-_b\na.", 0},
    {"(?=bb_)|\\S{2,}?", ".a1.acbb", 1},
    {"(?=bb_)|\\S{2,}?", "1ba\na\n-a", 0},
    {"(\\s{1,2})", " ", 1},
    {"(\\s{1,2})", "\na_c.", 0},
    {"(^[\\w])(?:\\w){1,3}", "11", 1},
    {"(^[\\w])(?:\\w){1,3}", "ac\n ", 0},
    {"bb{0,3}", "bb", 1},
    {"bb{0,3}", "b.\n{_", 0},
    {".[\\W.]", "a ", 1},
    {".[\\W.]", ". a1b__", 0},
    {".(?:\\w{}||.{2,}){1,2}[^a]", "1a.aa{-c", 1},
    {".(?:\\w{}||.{2,}){1,2}[^a]", "1a1\n_a..", 0},
    {"\\w{x}||[a-c]()", "c", 1},
    {"\\w{x}||[a-c]()", "a_", 0},
    {"|.{0,3}.|", "a{-b", 1},
    {"|.{0,3}.|", "{{-\n_a{", 0},
    {"_|.\\W|.{0,3}?c(?P<n227821627>b_)+?", "_", 1},
    {"_|.\\W|.{0,3}?c(?P<n227821627>b_)+?", ". _c-", 0},
    {"\\D|\\W{1,3}\\A-{0}?|\\S{0,3}", "b1b", 1},
    {"\\D|\\W{1,3}\\A-{0}?|\\S{0,3}", " -a", 0},
    {".|(?P<n852568398>(\\.^|)\\b)_{0}", "a", 1},
    {".|(?P<n852568398>(\\.^|)\\b)_{0}", "b 1a{a", 0},
    {"(?:)?\\S(?:${?|[^a])a|.\\n", "a\n", 1},
    {"(?:)?\\S(?:${?|[^a])a|.\\n", "b\n -a", 0},
    {".{2,}?\\Z|\\S_", "__b -aab", 1},
    {".{2,}?\\Z|\\S_", "11_\na1{", 0},
    {".|a|c\\Z", ".", 1},
    {".|a|c\\Z", "aa{1bbb{", 0},
    {"[\\W.].c", "-ac", 1},
    {"[\\W.].c", " 1c-baba", 0},
    {".{x}?[^]]|.+.", "a-b-b{c.", 1},
    {".{x}?[^]]|.+.", "_-a a\n_", 0},
    {"[^]]{2}[^a]*", "\n\nbbbb.", 1},
    {"[^]]{2}[^a]*", "ab_1baaa", 0},
    {"\\b(?P<n506361467>(?:.|\\W)){", "b{", 1},
    {"\\b(?P<n506361467>(?:.|\\W)){", "c{{1b", 0},
    {"b{,2}|b{0}?[\\W.]", "bb", 1},
    {"b{,2}|b{0}?[\\W.]", " {.", 0},
    {"\\d(?:_|b|){2,}", "1", 1},
    {"\\d(?:_|b|){2,}", "-\n{\n{._", 0},
    {".{,}?[\\w]", "a1-.-1b", 1},
    {".{,}?[\\w]", "b{-.-b{", 0},
    {"[^]].", "ac", 1},
    {"[^]].", "\n _1.", 0},
    {"[\\W.]{,2}?", "-", 1},
    {"[\\W.]{,2}?", "\nb", 0},
    {"[ab]", "a", 1},
    {"[ab]", "ab{_\n a", 0},
    {"(c{,2}?.){1,3}?|[\\w]a+?", " _", 1},
    {"(c{,2}?.){1,3}?|[\\w]a+?", "a aab", 0},
    {"(?:.{?(?:\\s{}|(?!|\\w\\nb?\\d{}?)){0,3}).", "__", 1},
    {"(?:.{?(?:\\s{}|(?!|\\w\\nb?\\d{}?)){0,3}).", "a1_", 0},
    {".{1,2}", "ca", 1},
    {".{1,2}", "1b{a", 0},
    {"b+?|(?=.)(?:_\\-|(){0}|\\A)[]a]|a{}?", "bb", 1},
    {"b+?|(?=.)(?:_\\-|(){0}|\\A)[]a]|a{}?", "ab_{-b\n", 0},
    {"\\W{,}|bc\\.b", ". ", 1},
    {"\\W{,}|bc\\.b", "1a{caba_", 0},
    {".|.{?[]a]{\\W|[^a-b_]", "c", 1},
    {".|.{?[]a]{\\W|[^a-b_]", "--1bb-\n.", 0},
    {"|\\D|(?=\\d{0,3}[^a-b_])", "a", 1},
    {"|\\D|(?=\\d{0,3}[^a-b_])", "1c\n\n.1{a", 0},
    {"[^]]|.cb\\S", "-", 1},
    {"[^]]|.cb\\S", "aa\n.a", 0},
    {"[ab]|_(?:(?![a-]{x}?))|[\\W.]{1,2}", ".", 1},
    {"[ab]|_(?:(?![a-]{x}?))|[\\W.]{1,2}", "bba{ {", 0},
    {"[^\\s]\\s{0,3}|.{2}?(?:b[ab]?)", ". b", 1},
    {"[^\\s]\\s{0,3}|.{2}?(?:b[ab]?)", ".1caa._-", 0},
    {"\\Z[\\W.]a{0,3}?|.(){0}|", "c", 1},
    {"\\Z[\\W.]a{0,3}?|.(){0}|", "a-ba_aa", 0},
    {"(?P<n728612807>b_)|.[]a]b.{,}", "baba", 1},
    {"(?P<n728612807>b_)|.[]a]b.{,}", "b_\n ", 0},
    {".|a{,}?\\Z[^]]a|", "a", 1},
    {".|a{,}?\\Z[^]]a|", "1{_._..b", 0},
    {".a(?:\\w|\\w_)", "{a1", 1},
    {".a(?:\\w|\\w_)", "aaa_b. ", 0},
    {".||$[^\\s]", "c", 1},
    {".||$[^\\s]", " -_a", 0},
    {".{1,3}?.", "ac..", 1},
    {".{1,3}?.", "a _.caa", 0},
    {"(?P<n768306511>|.+[^a-b_])\\W{2,}", "{.{.", 1},
    {"(?P<n768306511>|.+[^a-b_])\\W{2,}", "bba{.-b", 0},
    {"(?=^|).{2}?", "ba", 1},
    {"(?=^|).{2}?", "aaa.aaa", 0},
    {"(?P<n606629369>||(?!)(?:(?!a)){1,2}[\\d_])\\D", "a", 1},
    {"(?P<n606629369>||(?!)(?:(?!a)){1,2}[\\d_])\\D", "b{b1\ncca", 0},
    {"[^a-b_]{2,}.|(?!.)c(?!){2,}", "1 1 a", 1},
    {"[^a-b_]{2,}.|(?!.)c(?!){2,}", "c-b.", 0},
    {"\\x61|\\S(?=\\Z||)|", "a", 1},
    {"\\x61|\\S(?=\\Z||)|", "_ac 1c{1", 0},
    {".{2,}?", "-1 {bcba", 1},
    {".{2,}?", "-_\n{1", 0},
    {"\\W+?|\\db|(?:c)\\b", ".", 1},
    {"\\W+?|\\db|(?:c)\\b", "\n_- 1{", 0},
    {".{1,3}|", "-aa", 1},
    {".{1,3}|", ".acba ", 0},
    {".{2}\\D+?|", "b1_{a{_\n", 1},
    {".{2}\\D+?|", "bca{1", 0},
    {"c.*\\W", "c-_b -", 1},
    {"c.*\\W", "c{a", 0},
    {"\\S.a", "b_a", 1},
    {"\\S.a", "c_a{a .\n", 0},
    {".{,}ac.|", "1b1 acb", 1},
    {".{,}ac.|", "b\n _.", 0},
    {"(?:[\\W.][^]])\\Z", "{1", 1},
    {"(?:[\\W.][^]])\\Z", "  {\nba", 0},
    {"..{1,2}", "bb.", 1},
    {"..{1,2}", "b_ bc", 0},
    {"ab{0}|a[^a-b_]\\d.{1,3}", "a", 1},
    {"ab{0}|a[^a-b_]\\d.{1,3}", "aaaa1", 0},
    {".a||.{x}", " a", 1},
    {".a||.{x}", "{b{\n", 0},
    {"a|.{0}\\x61", "a", 1},
    {"a|.{0}\\x61", "ab baa..", 0},
    {"[\\w]{,}|.(?:(?P<n790477834>).)", "accba", 1},
    {"[\\w]{,}|.(?:(?P<n790477834>).)", "{cab-_c.", 0},
    {"|\\w{,2}?", "aa", 1},
    {"|\\w{,2}?", ".a111.c", 0},
    {"b{1,3}", "b", 1},
    {"b{1,3}", "bba_", 0},
    {"a.{1,2}?", "a_.", 1},
    {"a.{1,2}?", "ac{\nc", 0},
    {"a(?P<n332936749>[^a-b_]{x}(?=){2}$a|){2,}?", "a", 1},
    {"a(?P<n332936749>[^a-b_]{x}(?=){2}$a|){2,}?", "aaaa-", 0},
    {"[-a]{,}(?![a-](?P<n993904399>)?){0,3}?", "-a", 1},
    {"[-a]{,}(?![a-](?P<n993904399>)?){0,3}?", "b", 0},
    {"\\D{?\\d|.[^a]{0,3}", "{c\n{", 1},
    {"\\D{?\\d|.[^a]{0,3}", "{a", 0},
    {"\\A\\S{1,3}?", "._-", 1},
    {"\\A\\S{1,3}?", "ab\ncb.", 0},
    {".?\?|_{,2}", "a", 1},
    {".?\?|_{,2}", "a-.a{{b", 0},
    {"[^\\s]|\\W", ".", 1},
    {"[^\\s]|\\W", "._aa", 0},
    {"(..)||", "1a", 1},
    {"(..)||", "a a__1a", 0},
    {"\\W\\S|a.|\\w{", "b{", 1},
    {"\\W\\S|a.|\\w{", ".ab.b", 0},
    {"\\w|[a-]|(a{,}|\\Dc)", "ac", 1},
    {"\\w|[a-]|(a{,}|\\Dc)", "{_", 0},
    {"[^]]{x}|[^a]", "1", 1},
    {"[^]]{x}|[^a]", "ca", 0},
    {"(\\s\\S.)[^a]", " _{ ", 1},
    {"(\\s\\S.)[^a]", " _-.-c\n", 0},
    {"..(?P<n580695156>|\\s{,2}?|.)_", "acb_", 1},
    {"..(?P<n580695156>|\\s{,2}?|.)_", "c._a\n\na", 0},
    {"ac[^a]{1,3}?|_|c", "ac_ ", 1},
    {"ac[^a]{1,3}?|_|c", "caa_-_", 0},
    {".{1,3}{", "c__{", 1},
    {".{1,3}{", "_{ ..{_b", 0},
    {".{2}", "cb", 1},
    {".{2}", "{1_a.c\n", 0},
    {"(?P<n207964168>\\W{0,3}){1,2}[\\W.]{?", " -{", 1},
    {"(?P<n207964168>\\W{0,3}){1,2}[\\W.]{?", ".b 1a", 0},
    {"(?!^.)?\?(?:_{0,3}|.|()){1,2}?", "_b", 1},
    {"(?!^.)?\?(?:_{0,3}|.|()){1,2}?", "aaa -b", 0},
    {"\\w|\\D(?P<n611595631>)|", "a", 1},
    {"\\w|\\D(?P<n611595631>)|", " 1ab{\na", 0},
    {"\\D|[\\W.].(?=_?){1,2}.", "- a", 1},
    {"\\D|[\\W.].(?=_?){1,2}.", " bca ba1", 0},
    {"b\\w{2,}.{1,3}?", "bab_a-b{", 1},
    {"b\\w{2,}.{1,3}?", "b1cb{\na{", 0},
    {"cc?|_{a.{1,3}(?=(?P<n8856716>)\\Sc|)", "cc", 1},
    {"cc?|_{a.{1,3}(?=(?P<n8856716>)\\Sc|)", "c{b ", 0},
    {"|a*|(?![-a]+.{cc{x}|.[-a]{}?|\\s{0}?[\\W.])", "a", 1},
    {"|a*|(?![-a]+.{cc{x}|.[-a]{}?|\\s{0}?[\\W.])", "{ 1", 0},
    {"(?:\\w((c)[a\\-].*\\n{,}))b", "_c-_._bb", 1},
    {"(?:\\w((c)[a\\-].*\\n{,}))b", "", 0},
    {"(?=)[a-c]|.a{0,3}?[\\w]", "aaac", 1},
    {"(?=)[a-c]|.a{0,3}?[\\w]", "b_\n", 0},
    {"[-a]?(?!\\s)aa|.\\w|^", "{b", 1},
    {"[-a]?(?!\\s)aa|.\\w|^", " \n.1b", 0},
    {"a|b|a", "a", 1},
    {"a|b|a", "ba ---1", 0},
    {"\\Z[^a-b_]|._{,}|a{,2}", "a", 1},
    {"\\Z[^a-b_]|._{,}|a{,2}", "aa.bc..c", 0},
    {"[ab]{2}.{1,3}?", "aa{{", 1},
    {"[ab]{2}.{1,3}?", "aab{a-", 0},
    {"\\D*[^a](?:)", "cbbc \n-b", 1},
    {"\\D*[^a](?:)", "1\n{ca_", 0},
    {"[ab].|[\\W.]", "bb", 1},
    {"[ab].|[\\W.]", " -b1{", 0},
    {".{}|a(?:.){1,3}|[\\d_].{}", "aba", 1},
    {".{}|a(?:.){1,3}|[\\d_].{}", "acc a1", 0},
    {"[^a-b_]+", ".-.", 1},
    {"[^a-b_]+", ".a", 0},
    {"..?\?\\w", " _b", 1},
    {"..?\?\\w", "b1-{bb-", 0},
    {"()\\D?(?![^]])", "-", 1},
    {"()\\D?(?![^]])", "1c_-_", 0},
    {"b|c.|.?.c", "-cc", 1},
    {"b|c.|.?.c", " ca", 0},
    {"(?:c[^a]*)", "cb-\n", 1},
    {"(?:c[^a]*)", "cc\naa", 0},
    {"c.|_a[]a]", "c{", 1},
    {"c.|_a[]a]", "c- ", 0},
};

static int full_match(const char *pattern, const char *text)
{
    lorasync_pattern *p;
    lorasync_error    err;
    int               yes;
    if (lorasync_pattern_compile(pattern, NULL, &p, &err) != LORASYNC_OK) {
        fprintf(stderr, "%s\n", err.text);
        return -1;
    }
    yes = lorasync_pattern_matches(p, text);
    CHECK_EQ(lorasync_pattern_matches(p, text), yes);
    lorasync_pattern_free(p);
    return yes;
}

static void pattern_python(void)
{
    size_t i;
    for (i = 0; i < sizeof fullmatch / sizeof fullmatch[0]; i++) {
        if (full_match(fullmatch[i].pattern, fullmatch[i].text) == fullmatch[i].matches) continue;
        fprintf(stderr, "/%s/ on \"%s\", expected %d\n", fullmatch[i].pattern, fullmatch[i].text, fullmatch[i].matches);
        CHECK(!"differs from Python");
    }
}

static void pattern_errors(void)
{
    static const struct {
        const char     *pattern;
        lorasync_status status;
        const char     *has;
    } bad[] = {
        {"a(b", LORASYNC_E_FORMAT, "( that is never closed at byte 1"},
        {"ab)", LORASYNC_E_FORMAT, ") without its ( at byte 2"},
        {"a[b", LORASYNC_E_FORMAT, "[ that is never closed at byte 1"},
        {"[]", LORASYNC_E_FORMAT, "[ that is never closed at byte 0"},
        {"[^", LORASYNC_E_FORMAT, "[ that is never closed at byte 0"},
        {"a[b-", LORASYNC_E_FORMAT, "[ that is never closed at byte 1"},
        {"[\\", LORASYNC_E_FORMAT, "backslash at the end of the pattern at byte 1"},
        {"a\\", LORASYNC_E_FORMAT, "backslash at the end of the pattern at byte 1"},
        {"a[z-a]", LORASYNC_E_FORMAT, "range in [...] with bad ends at byte 2"},
        {"[\\d-z]", LORASYNC_E_FORMAT, "range in [...] with bad ends at byte 1"},
        {"[a-\\w]", LORASYNC_E_FORMAT, "range in [...] with bad ends at byte 1"},
        {"*a", LORASYNC_E_FORMAT, "nothing to repeat at byte 0"},
        {"(+a)", LORASYNC_E_FORMAT, "nothing to repeat at byte 1"},
        {"a|{2}", LORASYNC_E_FORMAT, "nothing to repeat at byte 2"},
        {"^*a", LORASYNC_E_FORMAT, "nothing to repeat at byte 1"},
        {"a**", LORASYNC_E_FORMAT, "quantifier after a quantifier at byte 2"},
        {"a*?\?", LORASYNC_E_FORMAT, "quantifier after a quantifier at byte 3"},
        {"a{2}{3}", LORASYNC_E_FORMAT, "quantifier after a quantifier at byte 4"},
        {"a{3,1}", LORASYNC_E_FORMAT, "{m,n} with m above n at byte 1"},
        {"(?", LORASYNC_E_FORMAT, "unknown group (? at byte 0"},
        {"(?Q)", LORASYNC_E_FORMAT, "unknown group (? at byte 0"},
        {"(?<n>a)", LORASYNC_E_FORMAT, "unknown group (? at byte 0"},
        {"(?P<>a)", LORASYNC_E_FORMAT, "group name that is not a word at byte 0"},
        {"(?P<a-b>a)", LORASYNC_E_FORMAT, "group name that is not a word at byte 0"},
        {"(?P<a", LORASYNC_E_FORMAT, "group name that is not a word at byte 0"},
        {"\\x4", LORASYNC_E_FORMAT, "\\x without two hex digits at byte 0"},
        {"\\xg1", LORASYNC_E_FORMAT, "\\x without two hex digits at byte 0"},
        {"(a)\\1", LORASYNC_E_UNSUPPORTED, "back-reference (\\1 ...) is not supported at byte 3"},
        {"[\\2]", LORASYNC_E_UNSUPPORTED, "back-reference (\\1 ...) is not supported at byte 1"},
        {"(?P<a>b)(?P=a)", LORASYNC_E_UNSUPPORTED, "back-reference (?P=name) is not supported at byte 8"},
        {"(?<=a)b", LORASYNC_E_UNSUPPORTED, "look-behind (?<= or (?<! is not supported at byte 0"},
        {"b(?<!a)", LORASYNC_E_UNSUPPORTED, "look-behind (?<= or (?<! is not supported at byte 1"},
        {"(?i)a", LORASYNC_E_UNSUPPORTED, "flags such as (?i) are not supported at byte 0"},
        {"(?-i:a)", LORASYNC_E_UNSUPPORTED, "flags such as (?i) are not supported at byte 0"},
        {"(?>a)", LORASYNC_E_UNSUPPORTED, "atomic group (?> is not supported at byte 0"},
        {"(?(1)a)", LORASYNC_E_UNSUPPORTED, "conditional (?(...) is not supported at byte 0"},
        {"(?#a)", LORASYNC_E_UNSUPPORTED, "comment (?# is not supported at byte 0"},
        {"a*+", LORASYNC_E_UNSUPPORTED, "possessive quantifier is not supported at byte 1"},
        {"\\0", LORASYNC_E_UNSUPPORTED, "escape that is not supported at byte 0"},
        {"a\\q", LORASYNC_E_UNSUPPORTED, "escape that is not supported at byte 1"},
        {"[\\Z]", LORASYNC_E_UNSUPPORTED, "escape that is not supported at byte 1"},
        {"\\xe9", LORASYNC_E_UNSUPPORTED, "\\x above 7f is not supported at byte 0"},
        {"[\303\251]", LORASYNC_E_UNSUPPORTED, "outside ASCII in [...] is not supported at byte 1"},
        {"a{65536}", LORASYNC_E_UNSUPPORTED, "more than 65536 states"},
        {"a{99999999999999999999}", LORASYNC_E_UNSUPPORTED, "more than 65536 states"},
        {"(?:(?:(?:){1000}){1000}){1000}", LORASYNC_E_UNSUPPORTED, "more than 65536 states"},
        {"((((((((a{9}){9}){9}){9}){9}){9}){9}){9})", LORASYNC_E_UNSUPPORTED, "more than 65536 states"},
    };
    lorasync_pattern *p;
    lorasync_error    err;
    size_t            i;
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        p           = (lorasync_pattern *)&err;
        err.text[0] = 0;
        CHECK_EQ(lorasync_pattern_compile(bad[i].pattern, NULL, &p, &err), bad[i].status);
        CHECK_HAS(err.text, bad[i].has);
        CHECK_HAS(err.text, bad[i].pattern);
        CHECK(p == NULL);
    }
    CHECK_EQ(lorasync_pattern_compile(NULL, NULL, &p, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_pattern_compile("a", NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_pattern_matches(NULL, "a"), 0);
    lorasync_pattern_free(NULL);
}

static void pattern_limits(void)
{
    static char text[70000];
    char        deep[200];
    size_t      n;
    for (n = 60; n < 70; n++) {
        lorasync_pattern *p;
        lorasync_error    err;
        memset(deep, '(', n);
        memset(deep + n, ')', n);
        deep[2 * n] = 0;
        CHECK_EQ(lorasync_pattern_compile(deep, NULL, &p, &err), n <= 64 ? LORASYNC_OK : LORASYNC_E_UNSUPPORTED);
        if (n > 64) CHECK_HAS(err.text, "64 levels deep at byte 64");
        lorasync_pattern_free(p);
    }
    for (n = 65530; n < 65545; n++) {
        lorasync_pattern *p;
        lorasync_error    err;
        memset(text, 'a', n);
        text[n] = 0;
        if (n <= 65534) {
            CHECK_EQ(full_match(text, text), 1); /* two tree nodes more than bytes */
            continue;
        }
        CHECK_EQ(lorasync_pattern_compile(text, NULL, &p, &err), LORASYNC_E_UNSUPPORTED);
        CHECK_HAS(err.text, n <= 65536 ? "states" : "at most 65536");
    }
}

/* None of these may take long: a backtracking matcher needs years for most of them. */
static void pattern_catastrophes(void)
{
    static const char *const patterns[] = {"(a*)*b",
                                           "(a|a)*b",
                                           "(a|aa)+$b",
                                           "((a*)*)*b",
                                           "(a+a+)+b",
                                           "(?:a?){50}a{50}b",
                                           "(.*)*(.*)*(.*)*b",
                                           "(?=(?=(?=.*b).*b).*b).*",
                                           "(?!(?!(?!(a*)*b)(a*)*b)(a*)*b)(a*)*b",
                                           "((?=(a|a)*b)a|(?=(a|a)*b)a)*c",
                                           "(?:(?=a*b)a*)*b",
                                           "(((((((((a*)*)*)*)*)*)*)*)*)*b"};
    static char              text[5002];
    size_t                   i;
    clock_t                  begin = clock();
    memset(text, 'a', 5000);
    for (i = 0; i < sizeof patterns / sizeof patterns[0]; i++) {
        text[5000] = 'c';
        CHECK_EQ(full_match(patterns[i], text), 0);
        text[5000] = 0;
        CHECK_EQ(full_match(patterns[i], text), 0);
    }
    text[5000] = 'b';
    CHECK_EQ(full_match("(a*)*b", text), 1);
    CHECK_EQ(full_match("(a|aa)+$", text), 0);
    CHECK_EQ(full_match("(?=(?=(?=.*b).*b).*b).*", text), 1);
    text[5000] = 0;
    CHECK_EQ(full_match("(a|aa)+$", text), 1);
    CHECK((double)(clock() - begin) / CLOCKS_PER_SEC < 20); /* 0.1 s; the rest is for sanitizers and valgrind */
}

/* Random patterns against a matcher that follows the definition: a tree node maps the set of places where it may begin
   to the set of places where it may end. Sets are bits of a u64. */
typedef struct tree {
    char               kind; /* 'c' byte '.' '[' set '&' then '|' or '*' repeat '=' '!' look-ahead 'e' empty assertions
                                ^ $ b B */
    unsigned char      byte;
    const char        *set; /* "[...]" as printed */
    const struct tree *a, *b;
    int                min, max; /* max -1: without end */
} tree;

static tree   forest[400];
static size_t num_trees;

static const tree *grow(int depth, u64 *state)
{
    static const char *const sets[] = {"[ab]", "[^a]", "[a-c_]", "[^\\w]", "\\d", "\\W", "[\\s.-]"};
    tree                    *t      = &forest[num_trees++];
    u64                      k      = test_random(state) % (depth > 0 ? 20 : 8);
    memset(t, 0, sizeof *t);
    if (k < 4) {
        t->kind = 'c';
        t->byte = (unsigned char)"aab._\n1"[test_random(state) % 7];
    } else if (k < 8) {
        t->kind = k == 4                   ? '.'
                  : k == 5                 ? '['
                  : k == 6                 ? "^$bB"[test_random(state) % 4]
                  : test_random(state) % 4 ? 'c'
                                           : 'e';
        t->byte = 'a';
        t->set  = sets[test_random(state) % 7];
    } else {
        t->kind = k < 13 ? '&' : k < 15 ? '|' : k < 18 ? '*' : k < 19 ? '=' : '!';
        t->min  = (int)(test_random(state) % 3);
        t->max  = test_random(state) % 2 ? -1 : t->min + (int)(test_random(state) % 3);
        t->a    = grow(depth - 1, state);
        if (t->kind == '&' || t->kind == '|') t->b = grow(depth - 1, state);
    }
    return t;
}

static void print_tree(const tree *t, char **out)
{
    static const char *const quantifiers[] = {"*", "+", "{2,}"};
    char                    *o             = *out;
    switch (t->kind) {
    case 'c': *out += sprintf(o, t->byte == '.' ? "\\." : "%c", t->byte); return;
    case '[': *out += sprintf(o, "%s", t->set); return;
    case 'b':
    case 'B': *out += sprintf(o, "\\%c", t->kind); return;
    case 'e': *out += sprintf(o, "()"); return;
    case '.':
    case '^':
    case '$': *out += sprintf(o, "%c", t->kind); return;
    default: break;
    }
    *out += sprintf(*out, t->kind == '=' ? "(?=" : t->kind == '!' ? "(?!" : "(?:");
    print_tree(t->a, out);
    if (t->kind == '|') *out += sprintf(*out, "|");
    if (t->b) print_tree(t->b, out);
    *out += sprintf(*out, ")");
    if (t->kind != '*') return;
    if (t->max < 0) *out += sprintf(*out, "%s", quantifiers[t->min]);
    else *out += sprintf(*out, "{%d,%d}", t->min, t->max);
    if (t->min == 1) *out += sprintf(*out, "?");
}

static int in_set(const char *set, int c)
{
    int word = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
    if (strcmp(set, "[ab]") == 0) return c == 'a' || c == 'b';
    if (strcmp(set, "[^a]") == 0) return c != 'a';
    if (strcmp(set, "[a-c_]") == 0) return (c >= 'a' && c <= 'c') || c == '_';
    if (strcmp(set, "\\d") == 0) return c >= '0' && c <= '9';
    if (strcmp(set, "[\\s.-]") == 0) return c == '\n' || c == '.' || c == '-';
    return !word;
}

static int assertion(char kind, const char *text, size_t i, size_t n)
{
    int left, right;
    if (kind == '^') return i == 0;
    if (kind == '$') return i == n || (i + 1 == n && text[i] == '\n');
    if (n == 0) return 0;
    left  = i > 0 && !in_set("\\W", text[i - 1]);
    right = i < n && !in_set("\\W", text[i]);
    return (left != right) == (kind == 'b');
}

static u64 ends(const tree *t, u64 begin, const char *text, size_t n)
{
    u64    out = 0, more;
    size_t i;
    int    k;
    switch (t->kind) {
    case 'e': return begin;
    case '&': return ends(t->b, ends(t->a, begin, text, n), text, n);
    case '|': return ends(t->a, begin, text, n) | ends(t->b, begin, text, n);
    case '*':
        out = begin;
        for (k = 0; k < t->min; k++) out = ends(t->a, out, text, n);
        for (k = t->min; k != t->max; k++) {
            more = out | ends(t->a, out, text, n);
            if (more == out) break;
            out = more;
        }
        return out;
    default: break;
    }
    for (i = 0; i <= n; i++) {
        u64 here = 1ULL << i;
        if (!(begin & here)) continue;
        if (t->kind == 'c' || t->kind == '.' || t->kind == '[') {
            if (i == n) continue;
            if (t->kind == 'c' ? text[i] == (char)t->byte : t->kind == '.' ? text[i] != '\n' : in_set(t->set, text[i]))
                out |= here << 1;
        } else if (t->kind == '=' || t->kind == '!') {
            if ((ends(t->a, here, text, n) != 0) == (t->kind == '=')) out |= here;
        } else if (assertion(t->kind, text, i, n)) {
            out |= here;
        }
    }
    return out;
}

static void pattern_random(void)
{
    u64    state = 11;
    int    round, k;
    size_t i, matched = 0;
    for (round = 0; round < 6000; round++) {
        static char       printed[8000];
        char             *end = printed, text[32];
        const tree       *t;
        lorasync_pattern *p;
        lorasync_error    err;
        num_trees = 0;
        t         = grow(6, &state);
        print_tree(t, &end);
        CHECK_EQ(lorasync_pattern_compile(printed, NULL, &p, &err), LORASYNC_OK);
        if (!p) continue;
        for (k = 0; k < 20; k++) {
            size_t n = test_random(&state) % 10;
            int    want, found;
            for (i = 0; i < n; i++) text[i] = "aaabb._\n1-"[test_random(&state) % 10];
            text[n] = 0;
            want    = (int)(ends(t, 1, text, n) >> n & 1);
            found   = lorasync_pattern_matches(p, text);
            if (want != found) fprintf(stderr, "/%s/ on \"%s\" is %d, expected %d\n", printed, text, found, want);
            CHECK_EQ(want, found);
            matched += want != 0;
        }
        lorasync_pattern_free(p);
    }
    CHECK(matched > 5000);
}

/* Marks belong to a turn; when the count of turns wraps they are cleared. */
static void pattern_turn_wraps(void)
{
    uint32_t i;
    for (i = 0; i < 20; i++) {
        lorasync_pattern *p;
        CHECK_EQ(lorasync_pattern_compile("(?:a|b)*(?=c).", NULL, &p, NULL), LORASYNC_OK);
        REQUIRE(p != NULL);
        CHECK_EQ(lorasync_pattern_matches(p, "abbac"), 1); /* leaves marks 1 to 6 */
        p->turn = 0xffffffffu - i;
        CHECK_EQ(lorasync_pattern_matches(p, "abbac"), 1);
        CHECK_EQ(lorasync_pattern_matches(p, "abbab"), 0);
        CHECK_EQ(lorasync_pattern_matches(p, "c"), 1);
        CHECK_EQ(lorasync_pattern_matches(p, "abbac"), 1);
        lorasync_pattern_free(p);
    }
}

/* ---- matcher */

static int takes(const lorasync_filter *filter, const char *raw, const char *adapter)
{
    lorasync_matcher *m;
    lorasync_error    err;
    lorasync_name     n;
    int               yes;
    err.text[0] = 0;
    if (lorasync_matcher_create(filter, NULL, 0, NULL, &m, &err) != LORASYNC_OK ||
        lorasync_parse_name(raw, &n, &err) != LORASYNC_OK) {
        fprintf(stderr, "%s: %s\n", raw, err.text);
        return -1;
    }
    yes = lorasync_matcher_takes(m, &n, adapter);
    lorasync_matcher_free(m);
    return yes;
}

static void matcher_roles(void)
{
    static const char *const list[]    = {"proj", "self_attn.v_proj"};
    static const char *const exclude[] = {"layers.1.proj", "head"};
    lorasync_filter          f;
    memset(&f, 0, sizeof f);
    CHECK_EQ(takes(NULL, "m.q_proj.lora_A.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.q_proj.lora_A.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.q_proj.lora_A.policy.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.q_proj.lora_A.policy.weight", NULL), 1);
    CHECK_EQ(takes(&f, "m.q_proj.lora_A.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.q_proj.lora_magnitude_vector.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.q_proj.base_layer.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.head.modules_to_save.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.head.modules_to_save.policy.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.e.token_adapter.trainable_tokens_delta.default", "default"), 1);
    f.target_modules      = list;
    f.num_target_modules  = 2;
    f.exclude_modules     = exclude;
    f.num_exclude_modules = 2;
    CHECK_EQ(takes(&f, "m.q_proj.lora_A.default.weight", "default"), 0); /* proj is not q_proj */
    CHECK_EQ(takes(&f, "m.proj.lora_A.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "proj.lora_A.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.proj.x.lora_A.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.self_attn.v_proj.lora_B.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.attn.v_proj.lora_B.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.xself_attn.v_proj.lora_B.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.layers.1.proj.lora_B.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.layers.11.proj.lora_B.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.layers.2.proj.base_layer.lora_B.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.head.modules_to_save.default.weight", "default"), 1); /* neither list restricts these */
    CHECK_EQ(takes(&f, "m.e.token_adapter.trainable_tokens_delta.default", "default"), 1);
    CHECK_EQ(takes(&f, "m.proj.base_layer.weight", "default"), 0);
    f.base = 1;
    CHECK_EQ(takes(&f, "m.proj.base_layer.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.norm.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.head.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.proj.lora_A.default.weight", "default"), 1);
    f.base                 = 2;
    f.skip_modules_to_save = 1;
    CHECK_EQ(takes(&f, "m.norm.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.proj.lora_A.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.head.modules_to_save.default.weight", "default"), 0);
    f.base = 0;
    CHECK_EQ(takes(&f, "m.head.modules_to_save.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.e.token_adapter.trainable_tokens_delta.default", "default"), 0);
    CHECK_EQ(takes(&f, "m.proj.lora_A.default.weight", "default"), 1);
    memset(&f, 0, sizeof f);
    f.target_pattern  = ".*\\.(q|v)_proj";
    f.exclude_pattern = ".*layers\\.1\\..*";
    CHECK_EQ(takes(&f, "m.layers.0.q_proj.lora_A.default.weight", "default"), 1);
    CHECK_EQ(takes(&f, "m.layers.0.k_proj.lora_A.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "m.layers.1.q_proj.lora_A.default.weight", "default"), 0);
    CHECK_EQ(takes(&f, "q_proj.lora_A.default.weight", "default"), 0);
    CHECK_EQ(lorasync_matcher_takes(NULL, NULL, NULL), 0);
    lorasync_matcher_free(NULL);
}

static int all_linear_takes(const lorasync_filter *f, const lorasync_module *modules, size_t num, const char *module)
{
    lorasync_matcher *m;
    lorasync_error    err;
    lorasync_name     n;
    int               yes;
    char              raw[LORASYNC_MAX_NAME];
    if (lorasync_matcher_create(f, modules, num, NULL, &m, &err) != LORASYNC_OK) return (int)err.status;
    snprintf(raw, sizeof raw, "%s.lora_A.default.weight", module);
    if (lorasync_parse_name(raw, &n, NULL) != LORASYNC_OK) return -1000;
    yes = lorasync_matcher_takes(m, &n, "default");
    lorasync_matcher_free(m);
    return yes;
}

static void matcher_all_linear(void)
{
    lorasync_module   causal[] = {{"model.embed", 0}, {"model.q", 1},   {"model.q", 1},
                                  {"model.score", 1}, {"x.lm_head", 1}, {"score", 1}};
    lorasync_module   sorter[] = {{"bert.classifier", 1}, {"bert.q", 1}, {"score", 0}, {"classifier", 1}};
    lorasync_module   nested[] = {{"bert.q", 1}, {"classifier.dense", 1}};
    lorasync_filter   f;
    lorasync_error    err;
    lorasync_matcher *m;
    memset(&f, 0, sizeof f);
    f.target_pattern = "All-Linear";
    CHECK_EQ(all_linear_takes(&f, causal, 6, "model.q"), 1);
    CHECK_EQ(all_linear_takes(&f, causal, 6, "q"), 0);         /* whole names only */
    CHECK_EQ(all_linear_takes(&f, causal, 6, "y.model.q"), 0); /* no dotted ends */
    CHECK_EQ(all_linear_takes(&f, causal, 6, "model.embed"), 0);
    CHECK_EQ(all_linear_takes(&f, causal, 6, "x.lm_head"), 0);
    CHECK_EQ(all_linear_takes(&f, causal, 6, "score"), 1); /* lm_head was first */
    CHECK_EQ(all_linear_takes(&f, causal, 6, "model.score"), 1);
    CHECK_EQ(all_linear_takes(&f, sorter, 4, "bert.classifier"), 1); /* not at the top */
    CHECK_EQ(all_linear_takes(&f, sorter, 4, "classifier"), 1);      /* score was first */
    CHECK_EQ(all_linear_takes(&f, sorter + 3, 1, "classifier"), LORASYNC_E_EMPTY);
    CHECK_EQ(all_linear_takes(&f, nested, 2, "classifier.dense"), 1); /* only the head module itself is left out */
    f.output_embedding = "q";
    CHECK_EQ(all_linear_takes(&f, causal, 6, "model.q"), 0);
    CHECK_EQ(all_linear_takes(&f, causal, 6, "x.lm_head"), 1);
    f.output_embedding = NULL;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_EMPTY);
    CHECK_HAS(err.text, "all-linear");
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 2, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    causal[2].name = NULL;
    CHECK_EQ(lorasync_matcher_create(&f, causal, 6, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "module 2 of 6");
    f.target_pattern = "all-linea"; /* a pattern like any other */
    CHECK_EQ(all_linear_takes(&f, sorter, 4, "bert.q"), 0);
    CHECK_EQ(all_linear_takes(&f, sorter, 4, "all-linea"), 1);
}

static void matcher_errors(void)
{
    static const char *const list[] = {"q", "", NULL};
    lorasync_filter          f;
    lorasync_error           err;
    lorasync_matcher        *m;
    lorasync_allocator       half;
    memset(&f, 0, sizeof f);
    memset(&half, 0, sizeof half);
    half.alloc = test_memory_alloc;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, &half, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, NULL, &err), LORASYNC_E_ARGUMENT);
    f.base = 3;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "base is 3");
    f.base               = 0;
    f.target_modules     = list;
    f.num_target_modules = 0;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "target_modules has no entry");
    f.num_target_modules = 2;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "entry 1 of target_modules");
    f.num_target_modules  = 1;
    f.exclude_modules     = list + 2;
    f.num_exclude_modules = 1;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "entry 0 of exclude_modules");
    f.num_exclude_modules = 0; /* an empty exclude list excludes nothing */
    CHECK_EQ(takes(&f, "q.lora_A.weight", "default"), 1);
    f.exclude_modules     = NULL;
    f.num_exclude_modules = 1;
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "num_exclude_modules is 1");
    f.num_exclude_modules = 0;
    f.target_pattern      = "all-linear";
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "both given");
    f.target_modules     = NULL;
    f.num_target_modules = 0;
    f.target_pattern     = "a";
    f.exclude_pattern    = "(?i)b";
    CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, &err), LORASYNC_E_UNSUPPORTED);
    CHECK_HAS(err.text, "filter: exclude_pattern: pattern \"(?i)b\"");
    CHECK(m == NULL);
}

static int list_reference(const char *module, const char *const *list, size_t num)
{
    size_t i;
    for (i = 0; i < num; i++) {
        char dotted[300];
        if (strcmp(module, list[i]) == 0) return 1;
        snprintf(dotted, sizeof dotted, ".%s", list[i]);
        if (strlen(module) > strlen(dotted) && strcmp(module + strlen(module) - strlen(dotted), dotted) == 0) return 1;
    }
    return 0;
}

static void random_module(char *out, size_t capacity, u64 *state)
{
    static const char *const word[] = {"a", "b", "ab", "q_proj", "proj", "0", "1"};
    size_t                   n = 1 + test_random(state) % 4, used = 0;
    while (n--)
        used += (size_t)snprintf(out + used, capacity - used, "%s%s", used ? "." : "", word[test_random(state) % 7]);
}

static void matcher_random_lists(void)
{
    u64 state = 13;
    int round, k;
    for (round = 0; round < 500; round++) {
        char              entry[8][64];
        const char       *list[8];
        lorasync_filter   f;
        lorasync_matcher *m;
        lorasync_name     n;
        memset(&f, 0, sizeof f);
        memset(&n, 0, sizeof n);
        n.role = ROLE(LORA_A);
        for (k = 0; k < 8; k++) {
            random_module(entry[k], sizeof entry[k], &state);
            list[k] = entry[k];
        }
        f.target_modules      = list;
        f.num_target_modules  = 1 + test_random(&state) % 5;
        f.exclude_modules     = list + 5;
        f.num_exclude_modules = test_random(&state) % 4;
        CHECK_EQ(lorasync_matcher_create(&f, NULL, 0, NULL, &m, NULL), LORASYNC_OK);
        if (!m) return;
        for (k = 0; k < 50; k++) {
            random_module(n.module, sizeof n.module, &state);
            CHECK_EQ(lorasync_matcher_takes(m, &n, "x"),
                     list_reference(n.module, list, f.num_target_modules) &&
                         !list_reference(n.module, list + 5, f.num_exclude_modules));
        }
        lorasync_matcher_free(m);
    }
}

/* ---- memory */

static void memory_failures(void)
{
    static const char *const list[]    = {"a", "b.c", "a", "d"};
    lorasync_module          modules[] = {{"a", 1}, {"b", 1}, {"lm_head", 1}};
    test_memory              mem;
    lorasync_allocator       a;
    int                      what;
    long                     n;
    a.alloc = test_memory_alloc;
    a.free  = test_memory_free;
    a.user  = &mem;
    for (what = 0; what < 3; what++) {
        lorasync_status status = LORASYNC_E_MEMORY;
        for (n = 1; status == LORASYNC_E_MEMORY && n < 1000; n++) {
            lorasync_pattern *p = NULL;
            lorasync_matcher *m = NULL;
            lorasync_filter   f;
            lorasync_error    err;
            memset(&mem, 0, sizeof mem);
            memset(&f, 0, sizeof f);
            mem.fail_at = n;
            err.text[0] = 0;
            if (what == 0) {
                status =
                    lorasync_pattern_compile("(?:[ab]|\\w)*(?=x(?!y))a{2,70}.*(?P<n>b|c|\303\251)+$", &a, &p, &err);
            } else {
                f.target_pattern      = what == 1 ? "all-linear" : "a(?=b).*[cd]";
                f.exclude_modules     = list;
                f.num_exclude_modules = 4;
                status                = lorasync_matcher_create(&f, modules, 3, &a, &m, &err);
            }
            if (status == LORASYNC_E_MEMORY) {
                CHECK_HAS(err.text, "out of memory");
                CHECK(p == NULL && m == NULL);
                CHECK_EQ(mem.live, 0);
            } else {
                long total = mem.total;
                CHECK_EQ(status, LORASYNC_OK);
                CHECK(n > 5);
                if (p) CHECK_EQ(lorasync_pattern_matches(p, "abxaaxbbb"), 0);
                if (m) {
                    lorasync_name name;
                    CHECK_EQ(lorasync_parse_name("b.lora_A.weight", &name, NULL), LORASYNC_OK);
                    lorasync_matcher_takes(m, &name, "default");
                }
                CHECK_EQ(mem.total, total); /* matching allocates nothing */
            }
            lorasync_pattern_free(p);
            lorasync_matcher_free(m);
            CHECK_EQ(mem.live, 0);
        }
    }
}

/* ---- size: every LoRA parameter of a model with 48 layers of 128 experts */

static void many_names(void)
{
    static const char *const attention[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    static const char *const expert[]    = {"gate_proj", "up_proj", "down_proj"};
    static const char *const all[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
    lorasync_filter          f;
    lorasync_matcher        *lists, *patterns;
    lorasync_name            n;
    size_t                   i, num = 0, by_list = 0, by_pattern = 0;
    memset(&f, 0, sizeof f);
    f.target_modules     = all;
    f.num_target_modules = 7;
    REQUIRE(lorasync_matcher_create(&f, NULL, 0, NULL, &lists, NULL) == LORASYNC_OK);
    memset(&f, 0, sizeof f);
    f.target_pattern  = "(?:.*\\.)?(?:(?:q|k|v|o|gate|up|down)_proj)";
    f.exclude_pattern = ".*experts\\.1\\d\\d\\..*";
    REQUIRE(lorasync_matcher_create(&f, NULL, 0, NULL, &patterns, NULL) == LORASYNC_OK);
    for (i = 0; i < 48 * (4 + 128 * 3) * 2; i++) {
        char   raw[256];
        size_t layer = i / (388 * 2), k = i / 2 % 388;
        if (k < 4)
            snprintf(raw, sizeof raw, "model.layers.%d.self_attn.%s.lora_%c.p.weight", (int)layer, attention[k],
                     i % 2 ? 'B' : 'A');
        else
            snprintf(raw, sizeof raw, "model.layers.%d.mlp.experts.%d.%s.lora_%c.p.weight", (int)layer,
                     (int)(k - 4) / 3, expert[(k - 4) % 3], i % 2 ? 'B' : 'A');
        num += lorasync_parse_name(raw, &n, NULL) == LORASYNC_OK && n.role == (i % 2 ? ROLE(LORA_B) : ROLE(LORA_A));
        by_list += lorasync_matcher_takes(lists, &n, "p") != 0;
        by_pattern += lorasync_matcher_takes(patterns, &n, "p") != 0;
    }
    CHECK_EQ(num, 37248);
    CHECK_EQ(by_list, 37248);
    CHECK_EQ(by_pattern, 48 * (4 + 100 * 3) * 2); /* without experts 100 to 127 */
    lorasync_matcher_free(lists);
    lorasync_matcher_free(patterns);
}

/* ---- real data */

/* Calls what(file text) for every file below `folder` (one level of folders down) that ends in `ending`; returns how
   many. */
static int for_each_file(const char *folder, const char *ending,
                         int (*what)(const char *path, const char *text, size_t size))
{
    char           path[1024];
    struct dirent *d;
    DIR           *dir = opendir(folder);
    int            num = 0;
    if (!dir) return 0;
    while ((d = readdir(dir)) != NULL) {
        size_t n = strlen(d->d_name), k = strlen(ending), size = 0;
        char  *text;
        if (d->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/%s", folder, d->d_name);
        if (n < k || strcmp(d->d_name + n - k, ending) != 0) {
            num += for_each_file(path, ending, what);
            continue;
        }
        text = test_read(path, &size);
        if (!text) continue;
        num += what(path, text, size);
        free(text);
    }
    closedir(dir);
    return num;
}

/* Compiles "target_modules" where it is a string, and each entry where it is a list. */
static int compile_targets(const char *path, const char *text, size_t size)
{
    const char *at  = strstr(text, "\"target_modules\":");
    int         num = 0, list;
    (void)size;
    if (!at) return 0;
    at += strlen("\"target_modules\":");
    at += strspn(at, " \n");
    list = *at == '[';
    while ((at = strpbrk(at, "\"]},")) != NULL && *at != ']' && *at != '}' && (list || *at != ',')) {
        char              pattern[1024];
        size_t            n = 0;
        lorasync_pattern *p;
        lorasync_error    err;
        if (*at++ != '"') continue;
        for (; *at && *at != '"' && n + 1 < sizeof pattern; at++) {
            if (*at == '\\') at++;
            pattern[n++] = *at;
        }
        at++;
        pattern[n]  = 0;
        err.text[0] = 0;
        if (lorasync_pattern_compile(pattern, NULL, &p, &err) != LORASYNC_OK) {
            fprintf(stderr, "%s: %s\n", path, err.text);
            CHECK(!"a real target_modules does not compile");
        }
        lorasync_pattern_free(p);
        num++;
    }
    return num;
}

static void real_targets(void)
{
    int num = for_each_file(test_path("adapter_configs"), ".json", compile_targets);
    num += for_each_file(test_path("adapters"), ".json", compile_targets);
    CHECK(num > 100);
}

/* Every key of a real file parses: LoRA keys to themselves. */
static int parse_keys(const char *path, const char *text, size_t size)
{
    u64         header;
    const char *end, *at = text + 8;
    int         num = 0;
    if (size < 8) return 0;
    memcpy(&header, text, 8); /* little-endian, as this machine is */
    if (header > size - 8) return 0;
    for (end = at + header; at < end; at++) {
        char           key[1024];
        lorasync_name  n;
        lorasync_error err;
        const char    *from = at + 1;
        size_t         k;
        if (*at != '"') continue;
        for (at = from; at < end && *at != '"';) at++;
        k = (size_t)(at - from);
        if (end - at < 10 || strncmp(at, "\":{\"", 4) != 0 || strncmp(from, "__metadata__", 12) == 0 || k >= sizeof key)
            continue;
        memcpy(key, from, k);
        key[k] = 0;
        num++;
        if (strstr(path, "mlx")) {
            CHECK_EQ(lorasync_parse_name(key, &n, &err), LORASYNC_E_NAME);
            CHECK_HAS(err.text, "\"lora_");
            continue;
        }
        CHECK_EQ(lorasync_parse_name(key, &n, &err), LORASYNC_OK);
        if (strstr(key, "lora_")) CHECK_TEXT(n.key, key);
        CHECK_EQ(n.role, strstr(key, ".lora_A.") ? ROLE(LORA_A) : strstr(key, ".lora_B.") ? ROLE(LORA_B) : ROLE(BASE));
        CHECK_TEXT(n.adapter, "");
    }
    return num;
}

static void real_keys(void)
{
    int num = for_each_file(test_path("adapters"), ".safetensors", parse_keys);
    CHECK(num > 500);
}

int main(void)
{
    RUN(role_text);
    RUN(name_table);
    RUN(name_round_trip);
    RUN(name_wrappers);
    RUN(name_errors);
    RUN(looks_like_lora);
    RUN(name_hints);
    RUN(name_roles);
    RUN(name_lengths);
    RUN(drop_adapter);
    RUN(pattern_python);
    RUN(pattern_errors);
    RUN(pattern_limits);
    RUN(pattern_catastrophes);
    RUN(pattern_random);
    RUN(pattern_turn_wraps);
    RUN(matcher_roles);
    RUN(matcher_all_linear);
    RUN(matcher_errors);
    RUN(matcher_random_lists);
    RUN(memory_failures);
    RUN(many_names);
    RUN_ON_DATA("adapter_configs", real_targets);
    RUN_ON_DATA("adapters", real_keys);
    return test_summary("test_names");
}
