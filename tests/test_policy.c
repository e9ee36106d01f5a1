/* What must be sent now. The reference tables below are written as the frameworks say it, not as the header computes
   it. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"

#include "test.h"

#define W LORASYNC_MEMORY_WEIGHTS
#define K LORASYNC_MEMORY_KV_CACHE
#define G LORASYNC_MEMORY_CUDA_GRAPH

/* The steps as letters: p pause, w k g resume, B A send, f flush, c continue. */
static void letters(const lorasync_decision *d, char out[LORASYNC_MAX_STEPS + 1])
{
    static const char all[] = "pwBAkgfc";
    int               i;
    for (i = 0; i < d->num_steps && i < LORASYNC_MAX_STEPS; i++) {
        int s  = (int)d->steps[i];
        out[i] = s >= 0 && s < 8 ? all[s] : '?';
    }
    out[i] = 0;
}

static lorasync_decision decide(const lorasync_policy_state *s)
{
    lorasync_decision d;
    lorasync_error    err;
    memset(&d, 0xee, sizeof d);
    memset(&err, 0, sizeof err);
    CHECK_EQ(lorasync_policy_decide(s, &d, &err), LORASYNC_OK);
    CHECK_EQ(err.text[0], 0);
    return d;
}

/* -- every combination against a second description of the rules */

/* A base that lies in the engine is one that came, stayed and is still right. */
static int reference_base_is_fine(const lorasync_policy_state *s)
{
    int came = s->base_synced, stayed = 1, right = !s->base_changed && !s->verify;
    if (!s->keeps_memory && !s->weights_backed_up) {
        switch (s->sleep_level) {
        case 0:
            stayed = s->released % 2 == 0 || s->tags % 2 == 0;
            break; /* what it does not know it does not give
                                                                             back */
        case 1: stayed = 1; break;
        default: stayed = 0;
        }
    }
    return came && stayed && right;
}

static int reference_slots_are_lost(const lorasync_policy_state *s)
{
    lorasync_policy_state fresh = *s;
    fresh.base_synced = 1, fresh.base_changed = 0, fresh.verify = 0;
    return !reference_base_is_fine(&fresh);
}

static void reference(const lorasync_policy_state *s, char *out)
{
    int  base    = !reference_base_is_fine(s);
    int  same    = s->held_version > 0 && s->held_digest == s->digest && !reference_slots_are_lost(s);
    int  adapter = s->no_adapter ? 0 : !same || s->ask_adapter || s->verify;
    int  quiet   = base || (adapter && s->one_slot);
    char c;
    if (quiet) *out++ = 'p';
    for (c = 0; c < 3; c++) {
        if ((s->tags >> c & 1) && (s->released >> c & 1)) *out++ = "wkg"[(int)c];
        if (c == 0 && base) *out++ = 'B';
        if (c == 0 && adapter) *out++ = 'A';
    }
    if ((base && s->cache_key != LORASYNC_CACHE_NONE) || (adapter && s->cache_key == LORASYNC_CACHE_BY_NAME))
        *out++ = 'f';
    if (quiet) *out++ = 'c';
    *out = 0;
}

static void all_states(void)
{
    long     num = 0, longest = 0;
    unsigned bits, tags, released;
    int      level, key, held;
    for (bits = 0; bits < 512; bits++)
        for (level = 0; level < 3; level++)
            for (tags = 0; tags < 8; tags++)
                for (released = 0; released < 8; released++)
                    for (key = 0; key < 3; key++)
                        for (held = 0; held < 3; held++) {
                            lorasync_policy_state s;
                            lorasync_decision     d;
                            char                  expected[16], found[16];
                            memset(&s, 0, sizeof s);
                            s.base_synced = bits & 1, s.keeps_memory = bits >> 1 & 1,
                            s.weights_backed_up = bits >> 2 & 1, s.one_slot = bits >> 3 & 1;
                            s.base_changed = bits >> 4 & 1, s.no_adapter = bits >> 5 & 1, s.verify = bits >> 6 & 1,
                            s.ask_adapter = bits >> 7 & 1;
                            s.sleep_level = level, s.tags = tags, s.released = released,
                            s.cache_key = (lorasync_cache_key)key;
                            s.version = 9, s.digest = bits >> 8 & 1 ? 77 : 0;
                            s.held_version = held ? 8 : 0, s.held_digest = held == 1 ? s.digest : 5;
                            if (s.keeps_memory && (released & tags)) {
                                CHECK_EQ(lorasync_policy_decide(&s, &d, NULL), LORASYNC_E_ARGUMENT);
                                continue;
                            }
                            d = decide(&s);
                            letters(&d, found);
                            reference(&s, expected);
                            CHECK_TEXT(found, expected);
                            CHECK_EQ(d.send_base, strchr(found, 'B') != NULL); /* no update without a base, no base
                                                                                  without a reason */
                            CHECK_EQ(d.send_base, d.base_reason != LORASYNC_BASE_KEPT);
                            CHECK_EQ(d.send_adapter, strchr(found, 'A') != NULL);
                            CHECK_EQ(d.version, s.no_adapter ? 0 : d.send_adapter ? 9 : 8);
                            if ((long)strlen(found) > longest) longest = (long)strlen(found);
                            num++;
                        }
    CHECK_EQ(longest, LORASYNC_MAX_STEPS);
    printf("     %ld states\n", num);
}

/* -- the reasons, one by one, and what comes first when several hold */

static void reasons(void)
{
    lorasync_policy_state s, one;
    memset(&s, 0, sizeof s);
    s.base_synced = 1, s.held_version = 3, s.held_digest = 10, s.version = 4, s.digest = 10;
    CHECK_EQ(decide(&s).base_reason, LORASYNC_BASE_KEPT);
    CHECK_EQ(decide(&s).adapter_reason, LORASYNC_ADAPTER_KEPT);
    CHECK_EQ(decide(&s).num_steps, 0);
    CHECK_EQ(decide(&s).version, 3);
    one = s, one.verify = 1;
    CHECK_EQ(decide(&one).base_reason, LORASYNC_BASE_VERIFY);
    CHECK_EQ(decide(&one).adapter_reason, LORASYNC_ADAPTER_ASKED);
    one.base_changed = 1;
    CHECK_EQ(decide(&one).base_reason, LORASYNC_BASE_CHANGED);
    one.digest = 11;
    CHECK_EQ(decide(&one).adapter_reason, LORASYNC_ADAPTER_CHANGED);
    one.sleep_level = 2;
    CHECK_EQ(decide(&one).base_reason, LORASYNC_BASE_LOST);
    CHECK_EQ(decide(&one).adapter_reason, LORASYNC_ADAPTER_LOST);
    one.base_synced = 0, one.held_version = 0;
    CHECK_EQ(decide(&one).base_reason, LORASYNC_BASE_NEVER_SENT);
    CHECK_EQ(decide(&one).adapter_reason, LORASYNC_ADAPTER_NEVER_SENT);
    one.no_adapter = 1, one.version = 0;
    CHECK_EQ(decide(&one).adapter_reason, LORASYNC_ADAPTER_NONE);
    CHECK_EQ(decide(&one).version, 0);
    one = s, one.ask_adapter = 1;
    CHECK_EQ(decide(&one).adapter_reason, LORASYNC_ADAPTER_ASKED);
    CHECK_EQ(decide(&one).version, 4);
}

/* -- verl, against its rule as a table */

typedef struct verl_row {
    const char *load_format;
    int         sent, level, freed, base;
    const char *steps;
} verl_row;

static const verl_row verl_table[] = {
    /* the engine loaded a checkpoint: the base counts as there */
    {"auto", 0, 1, 0, 0, "pAfc"},
    {"auto", 0, 1, 1, 0, "pwAkfc"},
    {"auto", 0, 2, 0, 0, "pAfc"},
    {"auto", 0, 2, 1, 1, "pwBAkfc"},
    {"auto", 1, 1, 0, 0, "pAfc"},
    {"auto", 1, 1, 1, 0, "pwAkfc"},
    {"auto", 1, 2, 0, 0, "pAfc"},
    {"auto", 1, 2, 1, 1, "pwBAkfc"},
    {NULL, 0, 1, 0, 0, "pAfc"},
    {NULL, 0, 1, 1, 0, "pwAkfc"},
    {NULL, 0, 2, 0, 0, "pAfc"},
    {NULL, 0, 2, 1, 1, "pwBAkfc"},
    {NULL, 1, 1, 0, 0, "pAfc"},
    {NULL, 1, 1, 1, 0, "pwAkfc"},
    {NULL, 1, 2, 0, 0, "pAfc"},
    {NULL, 1, 2, 1, 1, "pwBAkfc"},
    /* it started with dummy weights */
    {"dummy_dtensor", 0, 1, 0, 1, "pBAfc"},
    {"dummy_dtensor", 0, 1, 1, 1, "pwBAkfc"},
    {"dummy_dtensor", 0, 2, 0, 1, "pBAfc"},
    {"dummy_dtensor", 0, 2, 1, 1, "pwBAkfc"},
    {"dummy_dtensor", 1, 1, 0, 0, "pAfc"},
    {"dummy_dtensor", 1, 1, 1, 0, "pwAkfc"},
    {"dummy_dtensor", 1, 2, 0, 0, "pAfc"},
    {"dummy_dtensor", 1, 2, 1, 1, "pwBAkfc"},
};

static void verl(void)
{
    lorasync_verl_knobs   k;
    lorasync_policy_state s;
    lorasync_decision     d;
    lorasync_error        err;
    char                  found[16];
    size_t                i;
    for (i = 0; i < sizeof verl_table / sizeof verl_table[0]; i++) {
        const verl_row *r = &verl_table[i];
        memset(&k, 0, sizeof k);
        k.load_format = r->load_format, k.base_sent = r->sent, k.sleep_level = r->level, k.free_cache_engine = r->freed;
        CHECK_EQ(lorasync_policy_verl(&k, &s, &err), LORASYNC_OK);
        s.held_version = 4, s.held_digest = 1, s.version = 5, s.digest = 2; /* a step was trained */
        d = decide(&s);
        letters(&d, found);
        CHECK_TEXT(found, r->steps);
        CHECK_EQ(d.send_base, r->base);
        s.digest = 1; /* nothing was trained: the adapter goes only where the weights went */
        d        = decide(&s);
        CHECK_EQ(d.send_adapter, r->level == 2 && r->freed);
    }
    k.sleep_level = 0;
    s.version     = 123;
    CHECK_EQ(lorasync_policy_verl(&k, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "sleep_level is 0");
    CHECK_EQ(s.version, 123);
    k.sleep_level = 3;
    CHECK_EQ(lorasync_policy_verl(&k, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_policy_verl(NULL, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "knobs is NULL");
    CHECK_EQ(lorasync_policy_verl(&k, NULL, &err), LORASYNC_E_ARGUMENT);
}

/* -- miles. One row: what is offloaded; for sent, backup, check from 000 to 111 whether the base goes; and the resumed
   tags with and without cuda_graph. Full fine-tuning always sends it. */

typedef struct miles_row {
    const char *level;
    int         base[8]; /* [check + 2 * backup + 4 * sent] */
    const char *before, *after, *after_graph;
} miles_row;

static const miles_row miles_table[] = {
    /* sent  0  0  0  0   1  1  1  1
       copy  0  0  1  1   0  0  1  1
       check 0  1  0  1   0  1  0  1 */
    {NULL, {1, 1, 0, 1, 0, 1, 0, 1}, "", "", ""},
    {"", {1, 1, 0, 1, 0, 1, 0, 1}, "", "", ""},
    {"kv_cache", {1, 1, 0, 1, 0, 1, 0, 1}, "", "k", "kg"},
    {"weight", {1, 1, 0, 1, 1, 1, 0, 1}, "w", "", ""},
    {"kv_cache weight", {1, 1, 0, 1, 1, 1, 0, 1}, "w", "k", "kg"},
    {" weight,\tkv_cache, ", {1, 1, 0, 1, 1, 1, 0, 1}, "w", "k", "kg"},
};

static void miles(void)
{
    lorasync_miles_knobs  k;
    lorasync_policy_state s;
    lorasync_decision     d;
    lorasync_error        err;
    char                  found[16], expected[32];
    size_t                i;
    int                   bits;
    for (i = 0; i < sizeof miles_table / sizeof miles_table[0]; i++)
        for (bits = 0; bits < 32; bits++) {
            const miles_row *r = &miles_table[i];
            int              base;
            memset(&k, 0, sizeof k);
            k.offload_rollout_level = r->level;
            k.check_equal = bits & 1, k.cpu_backup = bits >> 1 & 1, k.base_sent = bits >> 2 & 1, k.lora = bits >> 3 & 1,
            k.has_cuda_graph_tag = bits >> 4 & 1;
            base                 = k.lora ? r->base[bits & 7] : 1;
            CHECK_EQ(lorasync_policy_miles(&k, &s, &err), LORASYNC_OK);
            CHECK(k.has_cuda_graph_tag || !((s.tags | s.released) & G));
            s.held_version = 4, s.held_digest = 1, s.version = 5, s.digest = 2;
            d = decide(&s);
            letters(&d, found);
            if (base || k.lora)
                snprintf(expected, sizeof expected, "p%s%s%s%sfc", r->before, base ? "B" : "", k.lora ? "A" : "",
                         k.has_cuda_graph_tag ? r->after_graph : r->after);
            CHECK_TEXT(found, expected);
            CHECK_EQ(d.send_base, base);
        }
    memset(&k, 0, sizeof k);
    k.offload_rollout_level = "kv_cache,weights";
    CHECK_EQ(lorasync_policy_miles(&k, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "\"weights\", expected kv_cache or weight");
    k.offload_rollout_level = "kv_cach";
    CHECK_EQ(lorasync_policy_miles(&k, &s, NULL), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_policy_miles(NULL, &s, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_policy_miles(&k, NULL, &err), LORASYNC_E_ARGUMENT);
}

/* -- errors and texts */

static void bad_states(void)
{
    lorasync_policy_state s, bad;
    lorasync_decision     d;
    lorasync_error        err;
    memset(&s, 0, sizeof s);
    s.version   = 1;
    d.num_steps = 77;
    CHECK_EQ(lorasync_policy_decide(NULL, &d, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "state is NULL");
    CHECK_EQ(lorasync_policy_decide(&s, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "out is NULL");
    bad = s, bad.sleep_level = 3;
    CHECK_EQ(lorasync_policy_decide(&bad, &d, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "sleep_level is 3");
    bad = s, bad.sleep_level = -1;
    CHECK_EQ(lorasync_policy_decide(&bad, &d, &err), LORASYNC_E_ARGUMENT);
    bad = s, bad.cache_key = (lorasync_cache_key)3;
    CHECK_EQ(lorasync_policy_decide(&bad, &d, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "cache_key is 3");
    bad = s, bad.keeps_memory = 1, bad.tags = K | W, bad.released = K | G;
    CHECK_EQ(lorasync_policy_decide(&bad, &d, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "never sleeps");
    bad = s, bad.version = 0;
    CHECK_EQ(lorasync_policy_decide(&bad, &d, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "version is 0");
    CHECK_EQ(d.num_steps, 77);
}

#define X(name, text) CHECK_TEXT(TEXT_OF(name), text);
static void texts(void)
{
    int steps = 0;
#define TEXT_OF lorasync_step_text
    LORASYNC_STEP_LIST(X)
    CHECK_TEXT(lorasync_step_text((lorasync_step)99), "unknown step");
#undef TEXT_OF
#define TEXT_OF lorasync_cache_key_text
    LORASYNC_CACHE_KEY_LIST(X)
    CHECK_TEXT(lorasync_cache_key_text((lorasync_cache_key)99), "unknown cache key");
#undef TEXT_OF
#define TEXT_OF lorasync_base_reason_text
    LORASYNC_BASE_REASON_LIST(X)
    CHECK_TEXT(lorasync_base_reason_text((lorasync_base_reason)99), "unknown reason");
#undef TEXT_OF
#define TEXT_OF lorasync_adapter_reason_text
    LORASYNC_ADAPTER_REASON_LIST(X)
    CHECK_TEXT(lorasync_adapter_reason_text((lorasync_adapter_reason)99), "unknown reason");
#undef TEXT_OF
#define TEXT_OF lorasync_engine_state_text
    LORASYNC_ENGINE_STATE_LIST(X)
    CHECK_TEXT(lorasync_engine_state_text((lorasync_engine_state)99), "unknown state");
#undef TEXT_OF
    CHECK_TEXT(lorasync_memory_tag_text(LORASYNC_MEMORY_WEIGHTS), "weights");
    CHECK_TEXT(lorasync_memory_tag_text(LORASYNC_MEMORY_KV_CACHE), "kv_cache");
    CHECK_TEXT(lorasync_memory_tag_text(LORASYNC_MEMORY_CUDA_GRAPH), "cuda_graph");
    CHECK_TEXT(lorasync_memory_tag_text((lorasync_memory_tag)3), "unknown tag");
#define COUNT_STEP(name, text) steps++;
    LORASYNC_STEP_LIST(COUNT_STEP)
    CHECK_EQ(steps, LORASYNC_MAX_STEPS);
}

int main(void)
{
    RUN(all_states);
    RUN(reasons);
    RUN(verl);
    RUN(miles);
    RUN(bad_states);
    RUN(texts);
    return test_summary("test_policy");
}
