/* lorasync.h - v0.1.0 - keeps inference engines serving the newest LoRA adapter of a sharded trainer. MIT licence, at
   the end.

   In exactly one C or C++ file:

       #define LORASYNC_IMPLEMENTATION
       #include "lorasync.h"

   In every other file: #include "lorasync.h". Needs libc and POSIX, nothing else: link with -lm, and with -lrt where
   glibc is older than 2.34. CUDA and NCCL when asked for (see the macros below).


   WHAT IT DOES

   A LoRA adapter is trained on N ranks and every rank holds a part of each tensor (FSDP, ZeRO, tensor, expert or
   pipeline parallel). After each optimizer step an inference engine has to serve the new values.

       parts on N ranks --pack+cast--> one message per pair of ranks --place--> one adapter image (safetensors)
           --transport--> staged on every engine --commit--> served; the old version until then

   The host program keeps its trainer, its engine and its communicators. The library finds the LoRA parameters among all
   others, plans once which bytes go where, and then does it every step without allocating, comparing strings or asking
   again. It never changes the caller's tensors (except in lorasync_load, whose purpose that is).

   WHAT IT DOES NOT DO

   It does not train, does not serve, does not open network connections (NCCL does, when lorasync_nccl_open makes a
   communicator), does not start threads, and does not merge adapters into base weights. It never prints, exits or
   aborts, and keeps no global state.


   QUICK START, TRAINER (every rank runs the same lines; without `comm` it is one rank)

       lorasync_desc d;  memset(&d, 0, sizeof d);
       d.comm = &comm;  d.wire_dtype = LORASYNC_BF16;  d.lora_alpha = 32;
       lorasync_session *s;  lorasync_error err;
       lorasync_open(&d, &s, &err);
       for (each parameter of the model) {                 // base parameters are dropped by the filter, and counted
           lorasync_piece p;  memset(&p, 0, sizeof p);
           p.name = "model.layers.0.self_attn.q_proj.lora_A.default.weight";
           p.dtype = LORASYNC_F32;  p.ndim = 2;  p.shape[0] = 32;  p.shape[1] = 4096;        // the whole tensor
           p.box = lorasync_shard(lorasync_whole(p.shape, p.ndim), 0, rank, world);        // what I hold of it: FSDP2
           p.data = pointer;
           lorasync_add(s, &p, &err);
       }
       lorasync_attach_directory(s, "adapters", &err);     // used by the root, ignored elsewhere
       lorasync_compile(s, &err);                          // collective: agrees, validates, plans, allocates
       for (each optimizer step)
           if (lorasync_sync(s, step, NULL, &err) < 0) fprintf(stderr, "%s\n", err.text);
       lorasync_close(s);

   QUICK START, ENGINE (another process)

       lorasync_engine_desc ed;  memset(&ed, 0, sizeof ed);  ed.directory = "adapters";
       lorasync_engine *e;
       lorasync_engine_open(&ed, &e, &err);
       lorasync_engine_poll(e, 1000, &err);                // LORASYNC_OK: a newer version is now served
       const lorasync_adapter *a = lorasync_acquire(e, "default");        // pins that version
       const lorasync_tensor *t = lorasync_find(a, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
       lorasync_release(a);


   TABLE OF CONTENTS (search for the mark; a room uses only rooms above it, but for what >>plan declares ahead of
   >>move)

       >>types      status, errors, allocator, dtypes
       >>api        names, layout, comm, cuda, image, plan, config, transport, engine, policy, session, base - each
                    documented where declared
                    "END OF THE PUBLIC PART": stop there if you only want the API
       >>support    errors, allocation, checked arithmetic, buffers, hashing, clock
       >>json       a small strict reader and writer
       >>dtype      sizes, exact rounding
       >>names      wrapper segments, LoRA leaf, adapter name, PEFT key, filter, patterns
       >>layout     boxes, flat intervals, the trainers' rules
       >>gpu        a GPU: waiting, memory, the kernel; windows onto memory of others
       >>comm       solo, local (shared memory), NCCL
       >>image      safetensors write, read, validate; digest; deltas
       >>plan       catalogues, coverage, owners, routes, copy operations
       >>move       the copy engine; pack, exchange, place; direct placement; the same on the GPU
       >>config     adapter_config.json read, write, check
       >>publish    the directory transport; staging and commit over any number of engines
       >>shm        the shared-memory transport
       >>engine     poll, validate, pin, find, release
       >>policy     what must be sent now: base, adapter, nothing; and in which order
       >>session    the easy path over all of it
       >>base       base weights in buckets through the same plans, images and transports
       >>device     the GPU's kernel: CUDA C, and above it the PTX text made from it


   CONFIGURATION MACROS (all optional)

       macro                      where                    effect
       LORASYNC_IMPLEMENTATION    one file                 compiles the implementation there
       LORASYNC_STATIC            same file, before both   every function static: a private copy inside that file only
       LORASYNC_CUDA              implementation file      pieces and published payloads may be in device memory; needs
                                                           the CUDA runtime's headers (12.0 or later, any C or C++
                                                           compiler, -isystem recommended) and -lcudart; no nvcc;
                                                           GPUs from Volta (sm_70) on
       LORASYNC_NCCL              implementation file      lorasync_nccl_open; needs LORASYNC_CUDA, nccl.h (2.18 or
                                                           later) and -lnccl
       LORASYNC_ASSERT(condition) implementation file      a check of the library's own invariants, such as assert; it
                                                           is never about what callers or other ranks do. Default:
                                                           nothing
       LORASYNC_DEVICE_CODE       nobody but `make ptx`    shows the kernel's source to nvcc

   The public part does not depend on any of them: calls that need what was left out return LORASYNC_E_UNSUPPORTED and
   say what to define.


   ERRORS

   Every function that can fail returns a lorasync_status: 0 is success, above 0 is not an error, below 0 is a failure.
   Its last argument is a lorasync_error (or NULL) that receives the status and a text naming what, where, expected and
   found, and what to do. Nothing is half done after a failure: what was served is still served, and the call can be
   made again. (Of several engines some may serve the new version when a later one fails its commit; >>api: transport
   says how they meet again.) Statuses of -100 and below say that the communicator is lost (lorasync_is_lost): close the
   session, make a new communicator, open again.
   A NULL that is not said to be allowed is LORASYNC_E_ARGUMENT; other functions then return NULL or 0 (a box or a size:
   -1), fill in zeros, or do nothing.

   Collective calls (said at each) return the same status on every rank, as long as the communicator is not lost. An
   error on one rank - a bad argument, a missing tensor, a NaN - is that call's error on all of them. A rank that dies
   or never calls ends in an error on all others within the deadline (desc.timeout_ms, default 60 s; publish_timeout_ms
   while the root publishes), never in a hang. Then each rank returns whichever of -100 and below it saw, some of them
   maybe only from their next call: test with lorasync_is_lost.

   THREADS

   A handle may be used by one thread at a time; different handles are independent. Exceptions are said where they are
   declared: lorasync_acquire, lorasync_find and lorasync_release may be called from any thread at any time. No lock is
   held while a callback runs.

   MEMORY

   All memory comes from the allocator given in a desc (default malloc/free). Not so: what lorasync_local_open and
   lorasync_nccl_open make, libc's own (qsort, opendir), CUDA's and NCCL's, and images that are placed directly or
   published in shared memory, which lie there. After lorasync_compile a sync allocates nothing. Borrowed pointers are
   said to be borrowed, with the time until which they must stay valid.
*/
#if defined(LORASYNC_IMPLEMENTATION) && !defined(_DEFAULT_SOURCE) && !defined(_GNU_SOURCE) && !defined(__APPLE__)
#define _DEFAULT_SOURCE                                                                                                \
    1 /* strict -std=c99 hides POSIX and MAP_ANONYMOUS otherwise; no effect after the first system
                             header */
#endif

#ifndef LORASYNC_H
#define LORASYNC_H

#include <stddef.h>
#include <stdint.h>

#define LORASYNC_VERSION_MAJOR 0
#define LORASYNC_VERSION_MINOR 1
#define LORASYNC_VERSION_PATCH 0
#define LORASYNC_VERSION "0.1.0"

#ifndef LORASYNC_API
#if defined(LORASYNC_STATIC) && defined(__GNUC__)
#define LORASYNC_API __attribute__((unused)) static
#elif defined(LORASYNC_STATIC)
#define LORASYNC_API static
#else
#define LORASYNC_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; /* cudaStream_t is a pointer to this */
struct ncclComm;    /* ncclComm_t is a pointer to this */

/* ------------------------------------------------------------------------------------------------------- >>types -- */

/* One list makes the enum and lorasync_status_text. */
#define LORASYNC_STATUS_LIST(X)                                                                                        \
    X(LORASYNC_OK, 0, "ok")                                                                                            \
    X(LORASYNC_NOTHING_NEW, 1, "nothing new")                                                                          \
    /* this call failed: mend what the text names and call again */                                                    \
    X(LORASYNC_E_ARGUMENT, -1, "bad argument")                                                                         \
    X(LORASYNC_E_MEMORY, -2, "out of memory")                                                                          \
    X(LORASYNC_E_STATE, -3, "call out of order")                                                                       \
    X(LORASYNC_E_NAME, -4, "parameter name")                                                                           \
    X(LORASYNC_E_EMPTY, -5, "no LoRA tensor")                                                                          \
    X(LORASYNC_E_PAIR, -6, "lora_A and lora_B do not pair")                                                            \
    X(LORASYNC_E_LAYOUT, -7, "pieces do not make the tensor")                                                          \
    X(LORASYNC_E_DISAGREE, -8, "ranks disagree")                                                                       \
    X(LORASYNC_E_NAN, -9, "NaN or Inf")                                                                                \
    X(LORASYNC_E_FORMAT, -10, "malformed data")                                                                        \
    X(LORASYNC_E_CONFIG, -11, "adapter config")                                                                        \
    X(LORASYNC_E_DIGEST, -12, "digest mismatch")                                                                       \
    X(LORASYNC_E_IO, -13, "file system")                                                                               \
    X(LORASYNC_E_VERSION, -14, "version is not newer")                                                                 \
    X(LORASYNC_E_UNSUPPORTED, -15, "not supported")                                                                    \
    X(LORASYNC_E_NOT_FOUND, -16, "not found")                                                                          \
    X(LORASYNC_E_BUSY, -17, "still in use")                                                                            \
    X(LORASYNC_E_CUDA, -18, "CUDA failed")                                                                             \
    X(LORASYNC_E_BASE, -19, "not the base of this delta")                                                              \
    /* the communicator is lost: close, make a new one, open again */                                                  \
    X(LORASYNC_E_TIMEOUT, -100, "deadline passed")                                                                     \
    X(LORASYNC_E_PEER, -101, "a rank is gone")                                                                         \
    X(LORASYNC_E_COMM, -102, "communication failed")                                                                   \
    X(LORASYNC_E_LOST, -103, "communicator already lost")

typedef enum lorasync_status {
#define LORASYNC_X(name, value, text) name = value,
    LORASYNC_STATUS_LIST(LORASYNC_X)
#undef LORASYNC_X
    LORASYNC_STATUS_FORCE_INT = 0x7fffffff
} lorasync_status;

/* A constant short text for a status ("ranks disagree"); never NULL. */
LORASYNC_API const char *lorasync_status_text(lorasync_status status);

/* 1 if the communicator is lost (status -100 or below): the session can only be closed. */
LORASYNC_API int lorasync_is_lost(lorasync_status status);

/* What went wrong. Filled by the failing call, untouched by a succeeding one. The text is always terminated; a text
   that does not fit is cut. Plain data: copy it, keep it, declare it on the stack. */
typedef struct lorasync_error {
    lorasync_status status;
    char            text[508];
} lorasync_error;

/* Memory for everything the library keeps. Both functions or neither. alloc returns memory aligned for any object
   (as malloc) or NULL; free receives only what alloc gave. Called from whichever thread calls the library.
   Borrowed: the struct is copied, `user` must outlive the handle. */
typedef struct lorasync_allocator {
    void *(*alloc)(void *user, size_t num_bytes);
    void (*free)(void *user, void *memory);
    void *user;
} lorasync_allocator;

/* Element types: those of safetensors (safetensors/src/tensor.rs, enum Dtype), same order, so that a larger value sorts
   first in a file. F4 and the F6 types are packed: a tensor of them occupies shape product x bits / 8 bytes. Only F32,
   F16, BF16, F8_E4M3 and F8_E5M2 are ever converted into one another; all others travel as they are. */
#define LORASYNC_DTYPE_LIST(X)                                                                                         \
    X(LORASYNC_BOOL, 1, "BOOL", 8)                                                                                     \
    X(LORASYNC_F4, 2, "F4", 4)                                                                                         \
    X(LORASYNC_F6_E2M3, 3, "F6_E2M3", 6)                                                                               \
    X(LORASYNC_F6_E3M2, 4, "F6_E3M2", 6)                                                                               \
    X(LORASYNC_U8, 5, "U8", 8)                                                                                         \
    X(LORASYNC_I8, 6, "I8", 8)                                                                                         \
    X(LORASYNC_F8_E5M2, 7, "F8_E5M2", 8)                                                                               \
    X(LORASYNC_F8_E4M3, 8, "F8_E4M3", 8)                                                                               \
    X(LORASYNC_F8_E8M0, 9, "F8_E8M0", 8)                                                                               \
    X(LORASYNC_F8_E4M3FNUZ, 10, "F8_E4M3FNUZ", 8)                                                                      \
    X(LORASYNC_F8_E5M2FNUZ, 11, "F8_E5M2FNUZ", 8)                                                                      \
    X(LORASYNC_I16, 12, "I16", 16)                                                                                     \
    X(LORASYNC_U16, 13, "U16", 16)                                                                                     \
    X(LORASYNC_F16, 14, "F16", 16)                                                                                     \
    X(LORASYNC_BF16, 15, "BF16", 16)                                                                                   \
    X(LORASYNC_I32, 16, "I32", 32)                                                                                     \
    X(LORASYNC_U32, 17, "U32", 32)                                                                                     \
    X(LORASYNC_F32, 18, "F32", 32)                                                                                     \
    X(LORASYNC_C64, 19, "C64", 64)                                                                                     \
    X(LORASYNC_F64, 20, "F64", 64)                                                                                     \
    X(LORASYNC_I64, 21, "I64", 64)                                                                                     \
    X(LORASYNC_U64, 22, "U64", 64)

typedef enum lorasync_dtype {
    LORASYNC_DTYPE_NONE = 0, /* in a desc: keep each tensor's own */
#define LORASYNC_X(name, value, text, bits) name = value,
    LORASYNC_DTYPE_LIST(LORASYNC_X)
#undef LORASYNC_X
    LORASYNC_DTYPE_FORCE_INT = 0x7fffffff
} lorasync_dtype;

/* The safetensors name ("BF16"), or NULL for a value that is no dtype. */
LORASYNC_API const char *lorasync_dtype_name(lorasync_dtype dtype);

/* Bits of one element (4 to 64), or 0 for a value that is no dtype. */
LORASYNC_API int lorasync_dtype_bits(lorasync_dtype dtype);

/* The dtype of a safetensors name, or LORASYNC_DTYPE_NONE. */
LORASYNC_API lorasync_dtype lorasync_dtype_from_name(const char *name);

/* Converts num_elements contiguous elements between F32, F16, BF16, F8_E4M3 and F8_E5M2 (or copies, when the types are
   equal). Round to nearest, ties to even; bit-exact with torch's casts for every input that is not NaN: fp16 and e5m2
   overflow to Inf, e4m3 overflows to NaN (it has no Inf), bf16 overflows to Inf. Widening is exact. Between two narrow
   types the value goes through F32, which is exact. NaN stays NaN, its bits are not promised.
   src and dst must not overlap; no alignment is needed. Errors: LORASYNC_E_UNSUPPORTED for another pair of types. */
LORASYNC_API lorasync_status lorasync_convert(void *dst, lorasync_dtype dst_dtype, const void *src,
                                              lorasync_dtype src_dtype, size_t num_elements, lorasync_error *err);

#define LORASYNC_MAX_DIMS 8   /* dimensions of a tensor */
#define LORASYNC_MAX_NAME 512 /* bytes of a parameter name, its NUL included */

/* ------------------------------------------------------------------------------------------------- >>api: names -- */

/* What a parameter is to PEFT (peft/tuners/tuners_utils.py, utils/save_and_load.py), and the shape it has. */
typedef enum lorasync_role {
    LORASYNC_ROLE_BASE = 0,        /* a parameter of the base model */
    LORASYNC_ROLE_LORA_A,          /* [r, in]; convolution [r, in, *k] */
    LORASYNC_ROLE_LORA_B,          /* [out, r]; convolution [out, r, 1, ...] */
    LORASYNC_ROLE_LORA_B_BIAS,     /* [out] */
    LORASYNC_ROLE_EMBEDDING_A,     /* [r, num_embeddings] */
    LORASYNC_ROLE_EMBEDDING_B,     /* [embedding_dim, r] */
    LORASYNC_ROLE_MAGNITUDE,       /* DoRA: lora_magnitude_vector */
    LORASYNC_ROLE_MODULES_TO_SAVE, /* a whole module trained alongside the adapter */
    LORASYNC_ROLE_TRAINABLE_TOKENS /* token_adapter.trainable_tokens_delta */
} lorasync_role;

/* A constant short text for a role ("lora_A"); never NULL. */
LORASYNC_API const char *lorasync_role_text(lorasync_role role);

/* A parsed parameter name. The examples are for
       "_fsdp_wrapped_module.model.layers.0.q_proj._orig_mod.lora_A.policy.weight" */
typedef struct lorasync_name {
    lorasync_role role;
    /* The key in a PEFT file: "base_model.model.model.layers.0.q_proj.lora_A.weight". For a base parameter, the name
       that the base model itself uses, without "base_model.model." and without the levels that PEFT inserts. */
    char key[LORASYNC_MAX_NAME];
    /* What target_modules matches: "model.layers.0.q_proj". For modules_to_save the saved module, for a base parameter
       the module that owns it. Nested target_parameters wrappers (experts, experts.base_layer) share one module but
       have different keys, so pair A and B by key. */
    char module[LORASYNC_MAX_NAME];
    char adapter[LORASYNC_MAX_NAME]; /* "policy"; "" if the name has none (it is a file key already) */
} lorasync_name;

/* Parses a raw parameter name. Compares whole segments between dots, never substrings. Allocates nothing.

   Wrappers         `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, `_orig_mod` and `to_wrap` anywhere, and
                    leading `module` segments (FSDP, checkpointing, torch.compile, Megatron-Bridge, DDP) are dropped.
                    Then a leading `base_model.model` is dropped.
   LoRA             One of the leaves lora_A, lora_B, lora_embedding_A, lora_embedding_B, lora_magnitude_vector and
                    trainable_tokens_delta, followed by nothing, `<adapter>`, `weight` or `<adapter>.weight`; after
                    lora_B also `bias` or `<adapter>.bias`. A `weight` or `bias` that directly follows the leaf and ends
                    the name is never an adapter name. An adapter name contains no dot.
                    key:    base_model.model.<path>.<leaf>, then .weight or .bias if lora_A or lora_B had it. The other
                            leaves never have it, as in PEFT files.
                    module: <path> without `base_layer` and without a final `token_adapter`.
   modules_to_save  `<module>.modules_to_save.<adapter>.<rest>` has the key base_model.model.<module>.<rest>. In a file
                    that key looks like a base parameter, and it parses as one.
   Base             Everything else. `base_layer`, `original_module` and `token_adapter.base_layer` are dropped from its
                    path.

   Errors, each naming what was found:
       LORASYNC_E_NAME      an empty segment; a name or key of LORASYNC_MAX_NAME bytes or more; lora_A.bias; a leaf
                            without a module; modules_to_save without an adapter and a parameter; a name that looks like
                            LoRA but has no known leaf: a last or second to last segment that begins with `lora_`
                            (AdaLoRA's lora_E, MLX's lora_a), lora_<...>_<letter>.<adapter>.weight, a known leaf
                            followed by anything else, Megatron's adapter.linear_in.weight
       LORASYNC_E_ARGUMENT  NULL */
LORASYNC_API lorasync_status lorasync_parse_name(const char *raw_name, lorasync_name *out, lorasync_error *err);

/* Removes a known adapter name from a key by PEFT's rule (BaseTuner's key clean-up, tuners_utils.py): the segment equal
   to `adapter` is removed if it is the last one, or else the second to last one and not the first; at most once. Only
   for keys that are known to be adapter leaves.

   out  at least strlen(key) + 1 bytes; may be key itself */
LORASYNC_API void lorasync_drop_adapter(const char *key, const char *adapter, char *out);

/* A pattern compiled for repeated full matches: the subset of Python's `re` that target_modules strings use.

   Supported  literals, `.`, `[...]` with ranges and negation, `\d \w \s \D \W \S`, `\n \t \r \f \v \a \xhh`, escaped
              punctuation, `( )`, `(?: )`, `(?P<name> )`, `|`, `* + ?`, `{m} {m,} {,n} {m,n}`, their lazy forms,
              `^ $ \A \Z \b \B`, and the look-aheads `(?= )` and `(?! )`. Anything else (back-references, look-behind,
              flags, possessive quantifiers, atomic groups) is refused by name.
   Bytes      Text is matched as bytes: `.`, `\w` and `[...]` match single bytes. Outside ASCII only literals mean what
              they mean in Python, and `[...]` and `\x` refuse such bytes.
   Time       Matching takes time proportional to states x bytes of text, whatever the pattern: no input makes it
              explode.
   Limits     65,536 bytes, 64 levels of groups and about 65,536 states per pattern, with {m,n} counted as copies. */
typedef struct lorasync_pattern lorasync_pattern;

/* Compiles a pattern. Free it with lorasync_pattern_free.

   allocator  may be NULL

   Errors: LORASYNC_E_UNSUPPORTED or LORASYNC_E_FORMAT, naming the construct and its position; LORASYNC_E_MEMORY;
   LORASYNC_E_ARGUMENT. */
LORASYNC_API lorasync_status lorasync_pattern_compile(const char *pattern, const lorasync_allocator *allocator,
                                                      lorasync_pattern **out, lorasync_error *err);

/* Frees a pattern. NULL is allowed. */
LORASYNC_API void lorasync_pattern_free(lorasync_pattern *pattern);

/* Returns 1 if the whole text matches (Python's re.fullmatch), else 0. Uses memory of the pattern, so only one
   thread may use a pattern at a time. Allocates nothing. */
LORASYNC_API int lorasync_pattern_matches(lorasync_pattern *pattern, const char *text);

/* Which parameters a session takes, beyond "the LoRA parameters of one adapter". Zero-initialised: all of those.

   Matching follows PEFT's check_target_module_exists (peft/tuners/tuners_utils.py). A list entry matches a module that
   is equal to it or ends in "." followed by it (`proj` does not match `q_proj`); a string is a pattern that must match
   the whole module name. Give a pattern or a list, not both. exclude_* overrides target_*.

   target_* restricts modules with LoRA only. exclude_* applies to base parameters too. Neither restricts
   modules_to_save or trainable tokens.

   All pointers are borrowed until the call that takes the filter returns. */
typedef struct lorasync_filter {
    /* A pattern, or "all-linear" (any case): every linear module except the output embedding. */
    const char        *target_pattern;
    const char *const *target_modules; /* a list with at least one entry; NULL: no restriction */
    size_t             num_target_modules;
    const char        *exclude_pattern;
    const char *const *exclude_modules;
    size_t             num_exclude_modules;
    /* The module that "all-linear" leaves out, as a list entry. NULL: the first that exists of lm_head, embed_out,
       output_layer (anywhere), score and classifier (at the top level). */
    const char *output_embedding;
    int         base;                 /* 1: take base parameters too; 2: take only base parameters */
    int         skip_modules_to_save; /* 1: drop modules_to_save and trainable tokens instead of taking them */
} lorasync_filter;

/* One module of the model, for resolving "all-linear". */
typedef struct lorasync_module {
    const char *name;      /* as in lorasync_name.module */
    int         is_linear; /* 1: it has a two-dimensional weight that is not an embedding table */
} lorasync_module;

/* A filter ready for use: its patterns are compiled, and "all-linear" is resolved to a list of whole module names.
   One thread at a time. */
typedef struct lorasync_matcher lorasync_matcher;

/* Makes a matcher. Copies what it keeps. Free it with lorasync_matcher_free.

   filter   may be NULL: zero-initialised
   modules  all modules of the model; used by "all-linear" only, otherwise NULL and 0 are fine

   Errors:
       LORASYNC_E_ARGUMENT  a pattern and a list at once, an empty list entry, an empty target list, NULL
       LORASYNC_E_EMPTY     "all-linear" finds no linear module
       and those of lorasync_pattern_compile */
LORASYNC_API lorasync_status lorasync_matcher_create(const lorasync_filter *filter, const lorasync_module *modules,
                                                     size_t num_modules, const lorasync_allocator *allocator,
                                                     lorasync_matcher **out, lorasync_error *err);

/* Frees a matcher. NULL is allowed. */
LORASYNC_API void lorasync_matcher_free(lorasync_matcher *matcher);

/* Returns 1 if a parameter of this name is taken for this adapter, else 0. A name without an adapter belongs to every
   adapter. Allocates nothing.

   adapter  NULL: any */
LORASYNC_API int lorasync_matcher_takes(lorasync_matcher *matcher, const lorasync_name *name, const char *adapter);

/* ------------------------------------------------------------------------------------------------ >>api: layout -- */

/* A part of a tensor. flat == 0: the elements off[d] .. off[d]+len[d]-1 of each dimension d. flat == 1: the elements
   off[0] .. off[0]+len[0]-1 of the tensor read row by row as one vector. A len of 0 holds nothing and is legal
   everywhere. A len below 0 marks an impossible request (an even split that does not divide); whoever receives it
   reports it. */
typedef struct lorasync_box {
    int     flat;
    int     ndim;
    int64_t off[LORASYNC_MAX_DIMS];
    int64_t len[LORASYNC_MAX_DIMS];
} lorasync_box;

/* The whole tensor: also one replica of it (HSDP, DDP, ZeRO-1/2). */
LORASYNC_API lorasync_box lorasync_whole(const int64_t *shape, int ndim);

/* No part of it: pipeline or expert ranks that do not hold the tensor. */
LORASYNC_API lorasync_box lorasync_none(int ndim);

/* The part of `box` that rank holds when `world` ranks split its dimension dim by torch.chunk's rule: pieces of
   ceil(len / world), then one short, then empty ones (torch/distributed/tensor/placement_types.py, Shard). The layouts
   of FSDP2 and DTensor are compositions of it:
       FSDP2 / DTensor Shard(d)       lorasync_shard(lorasync_whole(shape, ndim), d, rank, world)
       [Shard(d), Shard(e)] on a mesh  lorasync_shard(lorasync_shard(whole, d, r0, n0), e, r1, n1)  outer mesh dim first
       TP, then FSDP on the same dim   lorasync_shard(lorasync_shard(whole, d, tp_rank, tp), d, dp_rank, dp)
                                       (_StridedShard: what is in memory; the spec of an uneven one can be wrong)
       HSDP                            the same on every replica: lorasync_shard(whole, d, shard_rank, shards)
   A negative dim counts from the end. dim out of range, world < 1, rank outside 0..world-1 or a box that ends beyond
   2^63 - 1 gives a box of len -1. */
LORASYNC_API lorasync_box lorasync_shard(lorasync_box box, int dim, int rank, int world);

/* The same for splits that must be even: Megatron column (dim 0) and row (dim 1) parallel, experts (dim 0 of a stack).
   A length that world does not divide gives a box of len -1, as Megatron asserts (core/tensor_parallel/layers.py). */
LORASYNC_API lorasync_box lorasync_even(lorasync_box box, int dim, int rank, int world);

/* Rows [off, off + len) of dimension dim of `box`: interleaved qkv groups and gate/up halves are several such
   pieces. */
LORASYNC_API lorasync_box lorasync_range(lorasync_box box, int dim, int64_t off, int64_t len);

/* A flat interval of a tensor: num_elements from first on. ZeRO-3 partitions
   (deepspeed/runtime/zero/partition_parameters.py) are
       lorasync_flat_shard(numel, rank, world)
   the same rule as lorasync_shard on the flat tensor; the pad behind a short partition belongs to nobody. */
LORASYNC_API lorasync_box lorasync_flat(int64_t first, int64_t num_elements);
LORASYNC_API lorasync_box lorasync_flat_shard(int64_t numel, int rank, int world);

/* A parameter inside a larger flat buffer that ranks split evenly: where this rank's part of it is. */
typedef struct lorasync_flat_piece {
    lorasync_box box;      /* flat; len 0 when the rank holds nothing of it */
    int64_t      in_shard; /* its first element in the rank's shard: data = shard pointer + in_shard * element size */
} lorasync_flat_piece;

/* FSDP1 FlatParameter (torch/distributed/fsdp/_flat_param.py): where each of num parameters starts. With
   use_orig_params every parameter starts at a multiple of 16 / itemsize elements (itemsize of the forward dtype) and
   the total is padded to a multiple of world; without it nothing is padded. Writes start[num]; returns the total, or -1
   for a bad argument or an overflow. */
LORASYNC_API int64_t lorasync_fsdp1_layout(const int64_t *numel, size_t num, int itemsize, int use_orig_params,
                                           int world, int64_t *start);

/* Megatron distributed optimizer (core/optimizer/param_layout.py): one bucket, parameters in reverse order of
   registration, each at a multiple of 64 elements, the end padded to lcm(world, 128), or lcm(world, 65536) with
   high_busbw. Writes start[num]; returns the bucket size, or -1. The shard of a rank is size / world:
   lorasync_flat_part(start[i], numel[i], size, rank, world). */
LORASYNC_API int64_t lorasync_megatron_layout(const int64_t *numel, size_t num, int high_busbw, int world,
                                              int64_t *start);

/* The part of the parameter at [start, start + numel) of a flat buffer of `total` elements that `rank` holds when the
   buffer is split into shards of ceil(total / world). */
LORASYNC_API lorasync_flat_piece lorasync_flat_part(int64_t start, int64_t numel, int64_t total, int rank, int world);

/* A piece: a box (or flat interval) of one named tensor, at an address, on this rank. What a rank has, and what a rank
   wants, are lists of pieces. One tensor may have several pieces on a rank. */
typedef struct lorasync_piece {
    const char    *name;                      /* borrowed until the call returns */
    lorasync_dtype dtype;                     /* of the elements at data */
    int            ndim;                      /* 0 (a scalar) to LORASYNC_MAX_DIMS */
    int64_t        shape[LORASYNC_MAX_DIMS];  /* of the whole tensor */
    lorasync_box   box;                       /* what is at data */
    void          *data;                      /* the box's first element; borrowed until the handle is closed; only
                                                 lorasync_load and a
                                                wanted piece are written. May be NULL for an empty box. In device memory
                                                aligned to its element */
    int64_t        stride[LORASYNC_MAX_DIMS]; /* elements between neighbours along each dimension; all 0: row-major and
                                                 contiguous over the
                                                box. Else 0 only where the box has len 1. Only with flat == 0 */
    double         scale; /* the values are multiplied by it in F32 before rounding; 0 means 1. Only of held pieces, of
                             F32,
                                                F16, BF16, F8_E4M3 and F8_E5M2 */
} lorasync_piece;

/* -------------------------------------------------------------------------------------------------- >>api: comm -- */

typedef struct lorasync_message {
    int    peer; /* rank; never the caller's own */
    void  *data; /* read when sending, written when receiving */
    size_t num_bytes;
} lorasync_message;

/* How ranks talk: all that planning and moving need. Fill it from MPI, NCCL, a test harness; or use the built-in ones.
   Both calls are made by every rank in the same order, by one thread at a time, and block until done, failed or
   timeout_ms after the call. After any failure the library makes no further call but abort. Return 0, or a status of
   -100 or below with err filled (LORASYNC_E_TIMEOUT, LORASYNC_E_PEER, LORASYNC_E_COMM); err is never NULL.
   A table of callbacks others implement: `size` is sizeof(lorasync_comm) when it was filled, so that later fields can
   be added. */
typedef struct lorasync_comm {
    size_t size;
    void  *user;
    int    rank;
    int    world;

    /* out[i * num_bytes ..] = what rank i passed as `in`; num_bytes > 0 is equal on all ranks. */
    lorasync_status (*all_gather)(void *user, const void *in, void *out, size_t num_bytes, int timeout_ms,
                                  lorasync_error *err);

    /* All messages of this rank at once; sends and receives must be able to progress together. At most one message per
       peer and direction; every message of 1 byte or more has its partner on the other side with the same num_bytes. */
    lorasync_status (*exchange)(void *user, const lorasync_message *sends, size_t num_sends,
                                const lorasync_message *receives, size_t num_receives, int timeout_ms,
                                lorasync_error *err);

    /* Optional (NULL): make waiting peers fail soon instead of at their deadline. Called at most once. */
    void (*abort)(void *user, const char *why);

    /* Optional: exchange for device memory. Enqueues the same messages on a stream and returns without waiting for
       them; timeout_ms bounds only the enqueueing. Without it a device plan goes through pinned host memory and
       `exchange`. */
    lorasync_status (*exchange_stream)(void *user, const lorasync_message *sends, size_t num_sends,
                                       const lorasync_message *receives, size_t num_receives,
                                       struct CUstream_st *stream, int timeout_ms, lorasync_error *err);

    /* Optional, beside exchange_stream: all_gather for device memory, enqueued likewise. `in` may be this rank's part
       of `out`. With it the ranks of a device plan vote on the GPU, behind the last message; without it the host asks
       for the votes when the work is done. */
    lorasync_status (*all_gather_stream)(void *user, const void *in, void *out, size_t num_bytes,
                                         struct CUstream_st *stream, int timeout_ms, lorasync_error *err);

    /* Optional: called now and then while this rank waits for something else than a message, in the middle of a
       collective call, and by the root between staging and committing: without it a version may be committed though the
       other ranks have given up. 0 as long as the communicator is healthy; else a status of -100 or below. */
    lorasync_status (*check)(void *user, lorasync_error *err);
} lorasync_comm;

/* A communicator of one rank. Needs no closing. */
LORASYNC_API lorasync_comm lorasync_solo(void);

/* Ranks of one host over shared memory: threads of one process, or processes forked after lorasync_local_open. */
typedef struct lorasync_local lorasync_local;

/* Makes the shared memory for `world` ranks (1 to 256), before threads start or processes fork. Reserves, does not
   touch, 4 channels of 64 KiB per pair of ranks. Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_local_open(int world, lorasync_local **out, lorasync_error *err);

/* In each rank, once: fills `out`, which borrows `local`. Remembers the process, so that peers notice when it dies.
   Errors: LORASYNC_E_ARGUMENT for a rank out of range, LORASYNC_E_STATE when that rank has joined already. */
LORASYNC_API lorasync_status lorasync_local_join(lorasync_local *local, int rank, lorasync_comm *out,
                                                 lorasync_error *err);

/* Unmaps. In every process that has it, also in a parent that only forks ranks; with threads, once, after all ranks are
   done. NULL is fine. */
LORASYNC_API void lorasync_local_close(lorasync_local *local);

/* -------------------------------------------------------------------------------------------------- >>api: cuda -- */

/* Pieces in device memory. Needs LORASYNC_CUDA at the implementation; else a desc that has one is refused with
   LORASYNC_E_UNSUPPORTED. The device current when the plan (session) is made is the plan's; it is made current during
   calls and restored. CUDA 12.0 or later. The order of work: begin waits, on the device, for what is already on
   `stream`, reads the pieces, and lets what is enqueued on `stream` afterwards wait for that reading, and for nothing
   else. The host waits only where bytes are placed directly: for those who read what the last run placed
   (lorasync_plan_begin), and, on a rank whose image stays on the device, for what is already on `stream`, since that
   may read the image; begin returns once all is enqueued.
   Ranks of one host write straight into the root's image over CUDA IPC where their GPUs can, and in a reshard into each
   other's staging; else the comm's exchange_stream (NCCL) moves staged bytes; else the comm's exchange does, through
   pinned host memory. All three make the same bytes. CUDA graphs: lorasync_plan_begin may be called while `stream` is
   being captured (unless the exchange goes through the host); it then records the run instead of starting it, on
   `stream`. After each launch of the graph call lorasync_plan_wait; without a launch that is LORASYNC_E_STATE on all
   ranks. A launch does not wait, as begin does, for those who still read an image that is placed directly: launch it
   when all ranks have done with the last one. All ranks capture a RESHARD, or none. A begin that is not captured ends
   the graph: capture anew. Nothing else may be captured: a session refuses it (LORASYNC_E_UNSUPPORTED), since each of
   its runs is another version. */
typedef struct lorasync_cuda {
    struct CUstream_st *stream; /* the caller's, borrowed until close; NULL: the default stream */
    int keep_on_device;         /* 1: the root's image stays in device memory (image->on_device); 0: wait copies it to
                                   pinned memory too */
} lorasync_cuda;

/* Ranks joined by NCCL. Needs LORASYNC_NCCL. Takes a communicator, borrowed until lorasync_nccl_close, or makes its own
   from a unique id. Calls no other copy of NCCL than the one the program is linked with. The device current now is the
   communicator's. Its own communicator is non-blocking, so that every call has a deadline; NCCL runs each call on such
   a one in a new thread (NCCL, src/group.cc), which costs 15 to 30 microseconds. A borrowed one that is blocking is
   that much faster, and only NCCL ends its calls. */
typedef struct lorasync_nccl_desc {
    struct ncclComm *comm; /* borrowed: rank and world are its own, and the deadlines hold as far as it is non-blocking,
                              since a call into a
                                   blocking one returns when NCCL likes; or NULL, and then: */
    const void      *unique_id; /* 128 bytes from lorasync_nccl_unique_id on rank 0, brought to all ranks by the
                                   caller */
    int              rank;
    int              world;
    int              timeout_ms; /* for making the communicator; 0: 60000 */
} lorasync_nccl_desc;

/* A new id for lorasync_nccl_desc.unique_id; out has 128 bytes. One rank calls it. Errors: LORASYNC_E_COMM,
   LORASYNC_E_UNSUPPORTED. */
LORASYNC_API lorasync_status lorasync_nccl_unique_id(void *out, lorasync_error *err);

/* Fills *out: all_gather and exchange for host memory (through device scratch), exchange_stream, all_gather_stream,
   check and abort. Collective. The caller's communicator must not be used on other streams while a call of the library
   is under way, as NCCL demands. After a failure (LORASYNC_E_TIMEOUT, LORASYNC_E_PEER, LORASYNC_E_COMM) the
   communicator is aborted, a borrowed one too, and must not be destroyed by the caller any more; make a new one.
   Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_MEMORY, LORASYNC_E_CUDA, LORASYNC_E_UNSUPPORTED without LORASYNC_NCCL, those
   above. */
LORASYNC_API lorasync_status lorasync_nccl_open(const lorasync_nccl_desc *desc, lorasync_comm *out,
                                                lorasync_error *err);

/* Frees what lorasync_nccl_open made; its own communicator is destroyed, a borrowed one left as it is. After all plans
   and sessions that use it. NULL is fine. */
LORASYNC_API void lorasync_nccl_close(lorasync_comm *comm);

/* ------------------------------------------------------------------------------------------------- >>api: image -- */

/* One tensor of an image. */
typedef struct lorasync_tensor {
    const char    *name; /* NUL-terminated; lives as long as the image */
    lorasync_dtype dtype;
    int            ndim;
    int64_t        shape[LORASYNC_MAX_DIMS];
    size_t         offset; /* in the payload */
    size_t         num_bytes;
    const void    *data; /* payload + offset; NULL while the image has no payload. Of a delta just made: in the full
                            image's payload */
} lorasync_tensor;

/* What makes an image a delta (lorasync_image_delta): which full image it applies to, and which one comes out. */
typedef struct lorasync_delta {
    uint64_t base_version, base_digest;
    uint64_t full_digest; /* the version of the full image is the delta's own */
} lorasync_delta;

/* One version of one adapter: a safetensors file in memory. The wire format, the file format and the memory format are
   this one public format (github.com/huggingface/safetensors, README "Format"):

       | u64 N | N bytes JSON, space padded to 8 | payload: tensors back to back in the header's order |
       '----------- header, header_bytes --------'------------------ payload_bytes -------------------'

   Read-only for callers. */
typedef struct lorasync_image {
    const void            *header; /* 8 + N bytes */
    size_t                 header_bytes;
    const void            *payload; /* usually header + header_bytes; may be elsewhere (a device), then the header
                                       travels beside it */
    size_t                 payload_bytes;
    int                    on_device; /* 1: payload and the tensors' data are device addresses */
    const lorasync_tensor *tensors;   /* in payload order */
    size_t                 num_tensors;
    const char            *adapter; /* "" when the file does not say */
    uint64_t               version; /* 0 when the file does not say */
    uint64_t               digest;  /* of tensors and payload, as the header says; 0 when it does not */
    int                    has_digest;
    const uint64_t        *tensor_digests; /* one per tensor, or NULL when not known */
    const char            *config_json;    /* adapter_config.json that belongs to it (of base weights: the model's
                                          config.json); "" when none */
    size_t                 bucket;         /* base weights come as several images, */
    size_t                 num_buckets;    /* this one is bucket 0 to num_buckets - 1; 0 and 0: an adapter, whole */
    const char            *index_json; /* of more than one bucket, the same with each: model.safetensors.index.json; ""
                                          when none */
    const lorasync_delta  *delta;      /* NULL: a full image. Else it holds only what changed, and is no adapter */
} lorasync_image;

/* What to write: name, dtype, ndim and shape of each tensor are read; offset and num_bytes come out. */
typedef struct lorasync_image_desc {
    const lorasync_tensor *tensors;
    size_t                 num_tensors;
    const char            *adapter; /* NULL: no adapter, version and digest in the metadata: exactly what the reference
                                       library writes */
} lorasync_image_desc;

/* Lays out an image as the reference writer does (safetensors/src/tensor.rs, prepare): tensors by dtype, widest first,
   then by name; metadata first; compact JSON; padding to 8. The result has its own sorted copies of the tensors, with
   offsets filled; its payload is NULL until lorasync_image_bind. With an adapter the metadata is
   {"format":"pt","lorasync.adapter":..,"lorasync.digest":16 hex digits, "lorasync.version":20 digits}; without,
   {"format":"pt"}. Free with lorasync_image_free.
   Errors: LORASYNC_E_NAME (two of one name, empty name, `__metadata__`, not UTF-8, control characters),
   LORASYNC_E_ARGUMENT (shape, size over SIZE_MAX or a packed type that does not fill bytes), LORASYNC_E_FORMAT (header
   over 100,000,000 bytes), LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_image_layout(const lorasync_image_desc *desc, const lorasync_allocator *allocator,
                                                   lorasync_image **out, lorasync_error *err);

/* Points an image and its tensors at its payload (borrowed; payload_bytes long), or at none (NULL). Allocates
   nothing. */
LORASYNC_API void lorasync_image_bind(lorasync_image *image, const void *payload);

/* Writes version and digest into the header of an image laid out with an adapter, in place; to any other image it does
   nothing. Allocates nothing. */
LORASYNC_API void lorasync_image_stamp(lorasync_image *image, uint64_t version, uint64_t digest);

/* Reads num_bytes of a safetensors file without copying tensor data. Strict and safe on hostile input: every rule of
   the reference reader (safetensors/src/tensor.rs, Metadata::validate), and in addition refuses white space before `{`,
   duplicate names and keys, control characters in names, NUL in strings, more than LORASYNC_MAX_DIMS dimensions,
   dimensions over 2^63 - 1 and unknown dtypes. Metadata keys that begin with "lorasync." must be well formed. A delta
   is read too: look at image->delta. `bytes` is borrowed and must outlive the image. Errors: LORASYNC_E_FORMAT naming
   the tensor, the rule, the expected and the found value; LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_image_parse(const void *bytes, size_t num_bytes,
                                                  const lorasync_allocator *allocator, lorasync_image **out,
                                                  lorasync_error *err);

/* The tensor of that name, or NULL. Any thread. */
LORASYNC_API const lorasync_tensor *lorasync_image_find(const lorasync_image *image, const char *name);

/* A value of the header's __metadata__, or NULL. Any thread. */
LORASYNC_API const char *lorasync_image_metadata(const lorasync_image *image, const char *key);

/* Recomputes the digest over the payload (which must be readable by the CPU). out_tensor_digests: NULL or num_tensors
   values. */
LORASYNC_API uint64_t lorasync_image_digest(const lorasync_image *image, uint64_t *out_tensor_digests);

/* Recomputes and compares. Errors: LORASYNC_E_DIGEST with both values; LORASYNC_E_FORMAT when the image carries no
   digest, LORASYNC_E_STATE when it has no payload. */
LORASYNC_API lorasync_status lorasync_image_verify(const lorasync_image *image, lorasync_error *err);

LORASYNC_API void lorasync_image_free(lorasync_image *image);

/* The digest: 64 bits that add up over any way of cutting a tensor, so that every rank digests what it packs.
   A tensor's digest is the sum, modulo 2^64, over its 32-bit little-endian words w at byte position p of
       key(p / 4 mod 64) * w * mix(p / 256)
   with 64 fixed odd 32-bit keys and mix an odd 64-bit finaliser of the block number; bytes outside the tensor count as
   0. A part that begins or ends inside a word contributes its bytes in place, hence the additivity. The image's digest
   is the finalised sum over tensors of (tensor digest + its name, dtype and shape hashed) * an odd hash of its name. It
   finds accidents (lost, stale, swapped, torn bytes), not attackers. This is the partial sum of num_bytes bytes that
   stand at byte position `position` of their tensor. */
LORASYNC_API uint64_t lorasync_digest(const void *bytes, size_t num_bytes, uint64_t position);

/* The image's digest from its tensors' (one per tensor of image->tensors, in that order). */
LORASYNC_API uint64_t lorasync_digest_image(const lorasync_tensor *tensors, const uint64_t *tensor_digests,
                                            size_t num_tensors);

/* Which tensors changed between two versions of one layout (lorasync_image_delta makes what is to be sent of them).
   old_digests: a copy of the old version's image->tensor_digests (they change with the image; the layout of a session's
   image never does), num_tensors values. out_indices: room for num_tensors; receives *out_num indices into
   image->tensors, ascending. The new digests are image->tensor_digests; an image without them (lorasync_image_parse
   makes such) has its payload read. Allocates nothing; any thread. Errors: LORASYNC_E_ARGUMENT for NULL or 2^32
   tensors, LORASYNC_E_STATE for an image without tensor_digests whose payload is absent or in device memory. */
LORASYNC_API lorasync_status lorasync_image_changes(const lorasync_image *image, const uint64_t *old_digests,
                                                    uint32_t *out_indices, size_t *out_num, lorasync_error *err);

/* Deltas: an engine that holds an older version whole needs only the tensors that changed since. A transport keeps the
   version and a copy of the tensor_digests of what it sent last; the engine says which version and digest it holds.

       sender      lorasync_image_delta(image, kept_version, kept_digests, NULL, &delta, &err);     // in stage
                   if (delta->header_bytes + delta->payload_bytes < 3 * (image->header_bytes + image->payload_bytes) /
                   4) {
                       send(delta->header, delta->header_bytes);
                       for (i = 0; i < delta->num_tensors; i++) send(delta->tensors[i].data,
                       delta->tensors[i].num_bytes);
                   } else ...                                                                       // the full image
       receiver    lorasync_image_parse(bytes, num_bytes, NULL, &delta, &err);
                   if (delta->delta) lorasync_image_apply(held, delta, NULL, NULL, &full, &err);    // failed: ask for
                   the full image

   A delta is a safetensors image of the changed tensors. Its metadata holds, beside lorasync.adapter, lorasync.version
   (the new one) and lorasync.digest (of its own tensors), lorasync.base_version, lorasync.base_digest and
   lorasync.full_digest. Its tensors' names end in ":delta", so that a reader that knows nothing of deltas finds no
   weight that it knows. lorasync_open_adapter, the engine, and the directory and shared-memory transports refuse a
   delta and say what it is.

   Makes a delta from base_version, whose tensors had base_digests, to `image`. base_digests: a copy of that version's
   image->tensor_digests (or what lorasync_image_digest gave), num_tensors values. Tensor data is not copied: the
   delta's payload is NULL, its tensors' data point into the image's payload, its config_json is the image's; so it is
   good as long as they are. When nothing changed it has no tensors, and moves the engine to the new version all the
   same. The image may be in device memory if it has tensor_digests; without them its payload is read. Errors:
   LORASYNC_E_ARGUMENT for NULL or for an image that is a delta, LORASYNC_E_VERSION when the image is not newer than
   base_version, LORASYNC_E_STATE for an image without adapter and digest, or with neither payload nor tensor_digests,
   LORASYNC_E_UNSUPPORTED when its header is another than lorasync_image_layout writes (the receiver could not make it
   again), LORASYNC_E_FORMAT, LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_image_delta(const lorasync_image *image, uint64_t base_version,
                                                  const uint64_t *base_digests, const lorasync_allocator *allocator,
                                                  lorasync_image **out, lorasync_error *err);

/* Makes the full image of a base and a delta: the same bytes, header too, as those of the image that the delta was made
   of. Base and delta are only read (the base may be the pinned one that is served), and are not needed afterwards.
   `memory`: where to write it, base->header_bytes + base->payload_bytes bytes that must outlive the image; NULL: from
   the allocator, freed with the image. config_json is "", as after lorasync_image_parse: it travels beside a delta as
   it does beside an image. The delta's digest is checked before, the result's after. Whatever fails, the full image
   helps; what is in `memory` is undefined then.
   Errors: LORASYNC_E_BASE for a base that is NULL (nothing is held), or of another adapter, version or digest than the
   delta says; LORASYNC_E_DIGEST for a damaged delta, and for a result that is not the promised one (the base is
   damaged); LORASYNC_E_FORMAT naming a tensor that is not of the base or has another dtype or shape there;
   LORASYNC_E_VERSION when the delta is not newer than its base; LORASYNC_E_UNSUPPORTED for a base whose header is
   another than lorasync_image_layout writes; LORASYNC_E_ARGUMENT for any other NULL, a base that is a delta, a delta
   that is none, or `memory` that overlaps either; LORASYNC_E_STATE for missing payload or one in device memory;
   LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_image_apply(const lorasync_image *base, const lorasync_image *delta, void *memory,
                                                  const lorasync_allocator *allocator, lorasync_image **out,
                                                  lorasync_error *err);

/* -------------------------------------------------------------------------------------------------- >>api: plan -- */

typedef enum lorasync_plan_kind {
    LORASYNC_GATHER = 0, /* pieces of all ranks -> one image on the root */
    LORASYNC_GATHER_ALL, /* pieces of all ranks -> the same image on every rank */
    LORASYNC_SCATTER,    /* an image on the root -> pieces of all ranks (resume) */
    LORASYNC_RESHARD     /* pieces -> pieces: trainer layout to engine layout, no root, no full copy */
} lorasync_plan_kind;

typedef struct lorasync_plan_desc {
    const lorasync_comm *comm; /* NULL: solo. Copied; its user pointer is borrowed until the plan is freed */
    lorasync_plan_kind   kind;
    int                  root; /* GATHER: who gets the image. SCATTER: who has it. Elsewhere: who does the planning */
    lorasync_dtype
        wire_dtype; /* float tensors but F64 travel, and lie in the image, as this; NONE: as their pieces are. SCATTER:
                       as the image is */
    const lorasync_piece *have; /* GATHER, GATHER_ALL, RESHARD: what this rank holds. Borrowed until return (their data
                                   longer) */
    size_t                num_have;
    const lorasync_piece
          *want; /* SCATTER, RESHARD: what this rank wants; written between begin and the end of wait. Not memory of
                    `have` */
    size_t num_want;
    const lorasync_image *image;   /* SCATTER, on the root: borrowed until the plan is freed; has a payload */
    const char           *adapter; /* GATHER*: name for the image's metadata; NULL: none */
    /* Receive staging, and so each exchange, is bounded by about this; 0: 256 MiB. A rank's part of a tensor is never
       cut, so it is as large as the largest of those where that is more. What a rank sends is staged whole, as the
       snapshot that lets the caller go on; but if it is more than this and travels over exchange_stream, at most this
       is staged at a time, and the caller's stream waits until the rest has travelled. On GPUs a RESHARD places
       directly only if what each rank receives fits into it. */
    size_t bucket_bytes;
    int    allow_nan; /* GATHER*: 1: NaN and Inf may be gathered; 0: one of them fails the run, naming tensor, rank and
                         element.
                                        Looked for in F64, F32, F16, BF16, F8_E4M3 and F8_E5M2. Other kinds take what
                                        they find */
    int    no_direct; /* 1: never place directly into shared memory, or another GPU's */
    const lorasync_cuda      *cuda;       /* NULL: pieces are in host memory. Else in device memory; copied. All ranks
                                             alike */
    int                       timeout_ms; /* deadline of each collective step; 0: 60000 */
    const lorasync_allocator *allocator;
} lorasync_plan_desc;

typedef struct lorasync_plan lorasync_plan;

/* Agrees, checks and plans. Collective: every rank with the same kind, root, wire_dtype, bucket_bytes, allow_nan and
   adapter, and all with cuda or none.
   The names and shapes of a rank's tensors go to the planning rank once (ranks with the same list send only a hash of
   it), then boxes only; it checks that the pieces of each tensor cover it exactly and sends every rank its own part of
   the plan.
   - The same tensor must have the same shape and dtype on all ranks.
   - Pieces with equal boxes are replicas: one of them is read (the receiver's own if it has one, else that of the rank
     with least to send). Boxes that overlap otherwise, or leave a gap, are errors naming tensor, ranks and elements.
   - RESHARD: every wanted element must be held by somebody; wanted pieces may overlap and repeat.
   - SCATTER: every wanted tensor must be in the image with its shape, and every tensor of the image must be wanted by
     someone.
   GATHER* between ranks of one host whose image can be mapped by all of them place directly: each rank writes its
   pieces, converted, to their final place. RESHARD between GPUs of one host: each rank writes, converted, into the
   receive staging of those who want it, if every rank's fits into bucket_bytes, and they place it once all have voted:
   on the GPU, with a comm that has all_gather_stream (NCCL), else over the host. Direct or not makes the same bytes.
   Memory, names of some 80 bytes included: for each piece 160 to 190 bytes on the rank that holds it (while planning
   430); on the planning rank, for each piece of all ranks, 100 with 8 ranks or more, 150 with 4, 240 with 2, since the
   names weigh more there (while planning 390, 510, 750); the image, and staging; of a direct plan 16 for each tensor
   and rank, shared.
   Errors, on all ranks alike: LORASYNC_E_ARGUMENT, LORASYNC_E_NAME (too long, not UTF-8), LORASYNC_E_EMPTY (no tensor
   at all), LORASYNC_E_LAYOUT (gap, overlap, box out of bounds), LORASYNC_E_DISAGREE, LORASYNC_E_NOT_FOUND,
   LORASYNC_E_UNSUPPORTED (a conversion; a piece of F4 or an F6 type; a scale of a wanted piece, or of one that is not
   F32, F16, BF16, F8_E4M3 or F8_E5M2), LORASYNC_E_MEMORY, and those of the comm. */
LORASYNC_API lorasync_status lorasync_plan_create(const lorasync_plan_desc *desc, lorasync_plan **out,
                                                  lorasync_error *err);

/* Reads the pieces: converts, scales, checks and digests them into staging (or to their final place). When it returns
   the caller's tensors may change again (device memory: in the order of the caller's stream). Sends nothing; when
   placing directly it first waits until the ranks that read the image of the run before (RESHARD: those it sends to)
   have begun, too. An error here (a NaN) is remembered and reported on every rank by lorasync_plan_wait, which must be
   called in any case. Several plans of one communicator may be begun before any is waited for; all ranks begin them,
   and wait for them, in the same order. Allocates nothing. */
LORASYNC_API lorasync_status lorasync_plan_begin(lorasync_plan *plan, lorasync_error *err);

/* Exchanges and places. Collective; blocks until every rank is done or failed. After success the image is complete and
   digested, or the wanted pieces are written. After failure the image must not be used (the next begin fills it again).
   Where ranks vote on the GPU (a comm with all_gather_stream) a rank has done its part with begin: if it fails or dies
   later, the others learn it at their next call. Allocates nothing. Errors: those of begin on any rank, named;
   LORASYNC_E_DISAGREE where ranks are in runs of different plans (nothing is taken, the communicator stays good), or,
   if bytes are placed directly, LORASYNC_E_TIMEOUT for the same; LORASYNC_E_STATE without begin; those of the comm. */
LORASYNC_API lorasync_status lorasync_plan_wait(lorasync_plan *plan, lorasync_error *err);

/* The image of a GATHER (on the root) or GATHER_ALL (everywhere), valid between a successful wait and this rank's next
   begin; NULL elsewhere. */
LORASYNC_API lorasync_image *lorasync_plan_image(lorasync_plan *plan);

typedef struct lorasync_plan_stats {
    size_t   num_tensors;     /* tensors this rank holds, wants, or finds in its image */
    size_t   num_pieces;      /* pieces this rank contributes or receives, and, where it plans, those of all ranks */
    size_t   plan_bytes;      /* memory of the plan without image and staging */
    size_t   peak_plan_bytes; /* the same at its highest, while planning */
    size_t   staging_bytes;
    size_t   image_bytes;
    size_t   send_bytes; /* per run */
    size_t   receive_bytes;
    size_t   num_rounds; /* exchanges per run; 0 when placing directly */
    int      direct;     /* 1: ranks write straight into the image, in shared memory or another GPU's; RESHARD: into
                            other GPUs' staging */
    uint64_t pack_ns;    /* of the last run */
    uint64_t exchange_ns;
    uint64_t place_ns;
} lorasync_plan_stats;

LORASYNC_API void lorasync_plan_get_stats(const lorasync_plan *plan, lorasync_plan_stats *out);

/* Not collective. NULL is fine. Between begin and wait as lorasync_close. Device memory into which others place
   directly is freed when they have freed their plan, too, or ended: this waits up to 5 s for that, and then leaves it
   allocated rather than to whoever would get it next. */
LORASYNC_API void lorasync_plan_free(lorasync_plan *plan);

/* ------------------------------------------------------------------------------------------------ >>api: config -- */

/* A PEFT adapter_config.json: typed where it matters, everything else carried through. The view may be read by any
   thread; rank, scale, check and write use memory of the config while they match patterns: one thread per config at a
   time. */
typedef struct lorasync_config lorasync_config;

/* The fields that change what an engine computes (peft/tuners/lora/config.py), with PEFT's defaults where the file is
   silent. Strings and lists live as long as the config. */
typedef struct lorasync_config_info {
    const char        *peft_type;  /* "LORA" */
    const char        *task_type;  /* or NULL */
    const char        *base_model; /* base_model_name_or_path, or NULL */
    const char        *bias;       /* "none", "all", "lora_only" */
    int64_t            r;
    double             lora_alpha;
    int                use_rslora;
    int                use_dora;
    int                lora_bias;
    int                fan_in_fan_out;
    const char        *target_pattern; /* target_modules as a string (a pattern or "all-linear"), or NULL */
    const char *const *target_modules; /* as a list, as the file has it; NULL when it has none */
    size_t             num_target_modules;
    const char *const *modules_to_save;
    size_t             num_modules_to_save;
    size_t             num_rank_patterns;
    size_t             num_alpha_patterns;
} lorasync_config_info;

/* Reads one. Only peft_type is required (as in PEFT); null means the default. `json` need not outlive the call.
   Errors: LORASYNC_E_FORMAT naming byte, line and column, and the keys that lead there, for malformed JSON, a key twice
   in one object, NaN or Infinity (which Python would write), a wrong type or a rank below 1, and for a file without
   peft_type; LORASYNC_E_UNSUPPORTED for a peft_type other than LORA, naming it; those of lorasync_pattern_compile for
   target_modules, exclude_modules, rank_pattern and alpha_pattern; LORASYNC_E_ARGUMENT; LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_config_parse(const char *json, size_t num_bytes,
                                                   const lorasync_allocator *allocator, lorasync_config **out,
                                                   lorasync_error *err);

LORASYNC_API const lorasync_config_info *lorasync_config_view(const lorasync_config *config);
LORASYNC_API void                        lorasync_config_free(lorasync_config *config);

/* Rank and scale of one module (lorasync_name.module): the first rank_pattern / alpha_pattern key of the file that
   matches `(.*\.)?(key)$` wins, each on its own, else r and lora_alpha (peft/utils/other.py, get_pattern_key); scale =
   alpha / rank, or alpha / sqrt(rank) with use_rslora. Keys without special characters are found in logarithmic time,
   so there may be one for every module. */
LORASYNC_API int64_t lorasync_config_rank(const lorasync_config *config, const char *module);
LORASYNC_API double  lorasync_config_scale(const lorasync_config *config, const char *module);

/* Checks a config against the tensors of an adapter, by their keys (lorasync_parse_name):
   - every A has its B and every B its A, of one rank (rows of A, columns of B); a lora_B.bias and the magnitude of a
     linear or convolution layer have as many elements as B has rows;
   - every LoRA module is targeted: target_modules lists it or an end of it behind a dot, or is a pattern that matches
     all of it (any module will do when it is null or "all-linear"), or target_parameters names a parameter of it;
     exclude_modules does not name it; and with layers_to_transform and a list, one of the numbers in its name is a
     listed layer (layers_pattern is not looked at);
   - every entry of a target_modules list matches the module of some tensor (not asked when there are exclude_modules);
   - the rank is the config's for that module; for target_parameters (experts) a multiple of it;
   - lora_magnitude_vector is there exactly when use_dora is set, lora_B.bias exactly when lora_bias is (embeddings have
     none);
   - any other tensor is allowed by modules_to_save (PEFT's rule: a module on its path ends in the text of an entry, so
     `classifier` saves pre_classifier too; the task types SEQ_CLS and TOKEN_CLS add classifier and score, QUESTION_ANS
     qa_outputs); or by bias ("all": any .bias, "lora_only": that of a LoRA module); or by trainable_token_indices; or
     it is the weight of an embedding or output layer (embed_tokens, lm_head, wte, word_embeddings, embed_in, embed_out,
     shared, or a module with embedding LoRA).
   Errors: LORASYNC_E_PAIR, LORASYNC_E_CONFIG, LORASYNC_E_EMPTY (no LoRA tensor), naming tensor, expected and found;
   those of lorasync_parse_name; LORASYNC_E_ARGUMENT; LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_config_check(const lorasync_config *config, const lorasync_tensor *tensors,
                                                   size_t num_tensors, lorasync_error *err);

/* How to make the config that is published with an image. */
typedef struct lorasync_config_write_desc {
    const lorasync_config *config;     /* the trainer's; NULL: made from the fields below */
    double                 lora_alpha; /* without config: required, above 0; written as an integer when it is one */
    const char            *base_model; /* without config: base_model_name_or_path; NULL: null */
    int fold_scale; /* 1: every scale is folded into B, so publish lora_alpha == r, use_rslora false, and where ranks
                       differ equal rank_pattern and alpha_pattern: scale 1 for engines that honour the patterns and for
                       those that do not */
} lorasync_config_write_desc;

/* Writes adapter_config.json as PEFT does (Python's json.dumps with indent 2 and sorted keys) for these tensors.
   With a config: it must pass lorasync_config_check; everything in it is carried through, integers as integers, except
   that inference_mode becomes true, r and lora_alpha are written out, fold_scale has its effect, and target_modules
   becomes a list if it was a pattern or null. Without one: r (the most common rank), rank_pattern, target_modules,
   modules_to_save (the modules of tensors that are no LoRA), use_dora and lora_bias follow from the tensors;
   target_parameters and trainable tokens do not, so adapters with experts as one parameter or with trainable tokens
   need a config (LORASYNC_E_CONFIG).
   A derived target_modules holds the last segment of each LoRA module ("q_proj"), sorted; the segment before too while
   it is a number ("to_out.0"). Modules of that name without LoRA cannot be seen here: when only some layers have LoRA,
   give a config that says so. The result is read back and checked: should sorting make other patterns match first, so
   that a module's rank or scale would change, the call fails with LORASYNC_E_CONFIG.
   *out is NUL-terminated, from the allocator; free with lorasync_free. Errors as lorasync_config_check. */
LORASYNC_API lorasync_status lorasync_config_write(const lorasync_config_write_desc *desc,
                                                   const lorasync_tensor *tensors, size_t num_tensors,
                                                   const lorasync_allocator *allocator, char **out,
                                                   lorasync_error *err);

/* Frees text that a function returned through `out`, with the same allocator. */
LORASYNC_API void lorasync_free(const lorasync_allocator *allocator, void *memory);

/* --------------------------------------------------------------------------------------------- >>api: transport -- */

/* Brings an image to one engine (or to a group that is staged as one). Only `stage` is required.
   The publisher stages on every transport that has a commit, then on those that have none; only when all have succeeded
   (with desc.quorum: enough of them) does it commit on each, otherwise it aborts on each. An engine must go on serving
   the old version until commit. Every stage is followed by one commit that succeeds or by one abort; without a commit,
   by an abort only if stage failed. A commit cannot be undone: when the first one fails all are aborted, when a later
   one fails the others are committed all the same, the error names the engines on either side, and publishing the same
   version again brings all of them to it. So both must be legal for the version that is served already. More than one
   transport without commit cannot be all or nothing.
   No lock is held during a call; calls come from the thread that is in lorasync_wait, one at a time.
   The other ranks wait meanwhile, up to lorasync_desc.publish_timeout_ms for all calls together: an engine that may
   hang needs a deadline of its own below that. Before the first commit of a run that staged for more than 10 ms the
   root asks comm.check; when the communicator is lost, all that was staged is aborted.
   `size` is sizeof(lorasync_transport) when filled. Return 0 or a negative status with err filled (never NULL). A
   status of -100 or below is passed on as LORASYNC_E_IO: it says nothing about the trainer's communicator. */
typedef struct lorasync_transport {
    size_t      size;
    const char *name; /* for messages and the report; borrowed */
    void       *user;
    /* Take the image: copy or send what is needed, it is valid only during the call. Staging the same version again is
       legal (a retry). To an engine that holds the version before, what changed is enough: lorasync_image_delta. */
    lorasync_status (*stage)(void *user, const lorasync_image *image, lorasync_error *err);
    /* Make the staged version the served one. NULL: stage did it already. */
    lorasync_status (*commit)(void *user, const char *adapter, uint64_t version, lorasync_error *err);
    /* Forget what was staged. NULL: nothing to forget. */
    void (*abort)(void *user, const char *adapter, uint64_t version);
    /* Called once for each lorasync_attach, when that session closes. NULL: nothing to close. */
    void (*close)(void *user);
    /* 1: stage also takes base weights (>>api: base) in several images: image->bucket 0, 1, .. image->num_buckets - 1
       of one version, one stage each, then one commit for all; an abort may come after any of them, and the next try
       begins with bucket 0 again. 0: num_buckets over 1 is refused. */
    int takes_buckets;
} lorasync_transport;

/* What is known of an engine after a sync. */
#define LORASYNC_ENGINE_STATE_LIST(X)                                                                                  \
    X(LORASYNC_ENGINE_IDLE, "idle")           /* nothing was published yet */                                          \
    X(LORASYNC_ENGINE_STAGED, "staged")       /* took the last one, and was told to forget it because others failed */ \
    X(LORASYNC_ENGINE_COMMITTED, "committed") /* serves outcome.version */                                             \
    X(LORASYNC_ENGINE_BEHIND, "behind")       /* failed to stage or commit the last one */                             \
    X(LORASYNC_ENGINE_DEAD, "dead")           /* ... LORASYNC_DEAD_AFTER times in a row; it is still tried */

#define LORASYNC_DEAD_AFTER 3

typedef enum lorasync_engine_state {
#define LORASYNC_X(name, text) name,
    LORASYNC_ENGINE_STATE_LIST(LORASYNC_X)
#undef LORASYNC_X
    LORASYNC_ENGINE_STATE_FORCE_INT = 0x7fffffff
} lorasync_engine_state;

/* A constant short text for a state ("behind"); never NULL. */
LORASYNC_API const char *lorasync_engine_state_text(lorasync_engine_state state);

typedef struct lorasync_engine_outcome {
    const char           *name;         /* the transport's */
    lorasync_engine_state state;        /* of an engine that the last sync did not reach, because it had failed before:
                                           what it was */
    uint64_t              version;      /* that it serves; 0: none, or not known, since a commit failed */
    int                   num_failures; /* in a row */
    lorasync_error        error;        /* of the last try; status 0 when it did not fail */
} lorasync_engine_outcome;

/* The directory transport: PEFT directories that PEFT, vLLM and SGLang read as they are.
       <directory>/<adapter>/v12/adapter_model.safetensors, adapter_config.json
       <directory>/<adapter>/latest -> v12                      the commit point: a symbolic link, replaced by rename
   stage writes <directory>/<adapter>/.stage-..., every file fsync'ed; commit renames it to v<version>, fsyncs the
   directory and swings `latest`. Base weights (>>api: base) become a Hugging Face checkpoint that transformers, vLLM
   and SGLang read as it is, by the same rules:
       <directory>/<name>/v12/model-00001-of-00003.safetensors .., model.safetensors.index.json    (one bucket:
       model.safetensors, no index)
                              config.json                                 when lorasync_stream_desc.config_json is given
   Give them a directory of their own: an engine (>>api: engine) serves adapters, and reports a base checkpoint beside
   them as one that has no adapter_model.safetensors.
   A reader sees a whole version or none, whatever is killed when. With keep_versions 1 one that has read `latest` and
   then opens what it named fails now and then: it is deleted already. Publishing the served version again with the same
   bytes is a success without effect. A commit fails with the new version visible only when the last fsync fails: it may
   then not survive a power cut. */
typedef struct lorasync_directory_desc {
    const char *directory;     /* made if absent (its parent must exist); at most 3000 bytes. Copied */
    int         keep_versions; /* older ones are deleted at commit; 0 stands for 3. A reader that has a version open or
                                  mapped keeps it */
    int         no_fsync;      /* 1: atomic but not durable: a power cut may lose the newest versions. For a RAM disk */
    const lorasync_allocator *allocator;
} lorasync_directory_desc;

/* Fills *out; end with out->close(out->user), which a session that it is attached to does. Touches the disk at the
   first stage, not here. Each stage removes what dead publishers left behind. One publisher per adapter directory at a
   time. After open nothing is allocated (libc keeps a buffer while a directory is listed).
   Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_MEMORY; from stage and commit LORASYNC_E_IO with the path and the system's
   reason, LORASYNC_E_NAME for an adapter name that is empty, "latest", longer than 200 bytes, or holds a "/" or a
   leading ".", LORASYNC_E_VERSION when `latest` is already newer (another publisher) or is this version with other
   bytes, LORASYNC_E_FORMAT when `latest` is something else than such a link, LORASYNC_E_CONFIG for an image without
   config_json, LORASYNC_E_ARGUMENT for one without payload or version, LORASYNC_E_UNSUPPORTED for one in device memory,
   LORASYNC_E_STATE for a commit of what was not staged. */
LORASYNC_API lorasync_status lorasync_directory_open(const lorasync_directory_desc *desc, lorasync_transport *out,
                                                     lorasync_error *err);

/* The shared-memory transport: engines of this host map the published image and read it in place. Nothing is durable:
   after a restart of the host it is empty.
   stage copies the image once, into a slot that nobody reads; commit is one atomic store; the engines see it at their
   next poll. Versions that engines still hold never block a publish: more slots are made, and removed when they are
   free again. A session does without the copy (report.in_place): it asks for the slot before the gather, and the image
   is made there, with direct placement by all ranks at once. After a publication that failed, the next one is
   copied. */
typedef struct lorasync_shm_desc {
    const char *name; /* up to 100 letters, digits, ".", "_", "-"; not "." first. Copied */
    int num_slots;    /* slots of each adapter to keep when they are free, so that publishing touches no fresh memory: 2
                         or more; 0: 3 (the
                              served one, the next one, one that engines are leaving). More are made when needed, up to
                              1,024 in all */
    const lorasync_allocator *allocator;
    const lorasync_cuda
        *cuda; /* NULL: payloads lie in shared memory. Else in device memory, see below; needs LORASYNC_CUDA.
                  keep_on_device means
                                  nothing here. Read by lorasync_shm_open only, but cuda->stream is borrowed until
                                  close */
} lorasync_shm_desc;

/* With lorasync_shm_desc.cuda, for engines that share a GPU with the publisher (or have a GPU with peer access to it)
   and say accept_device:
       shared memory    | head | header | config_json |      device memory of the publisher, one cudaMalloc per slot
       | payload |
   Where. In memory of the device that is current at lorasync_shm_open. Images may be on the host or on any device that
   it can copy from. The memory is the transport's: made once with its slot, used for many versions, opened by engines
   once over CUDA IPC. An engine of the publisher's own process uses the address.
   When. stage copies after what is on cuda->stream at the call, on a stream of its own, and waits on the CPU until the
   copy has ended (at most 60 s), so commit is one atomic store as ever, and a publisher that is killed has named no
   half written slot. How long. Memory that an engine has open is not freed. After close the versions that engines have
   open stay served as long as the publisher's process lives; all other memory is freed. What is still open then is
   freed with the process, or goes to the next transport of this name that the process opens on that device. When the
   process ends, its device memory goes with it: engines keep what they have open, until they close it (CUDA promises
   nothing for that case; Linux drivers do so), and no other engine can open it. They report that, naming the process,
   until the version, or a newer one, is published again. The next publisher never writes into memory of a dead one. A
   session whose desc.cuda has keep_on_device, on the same device, gathers straight into the slot (report.in_place); so
   do its other ranks, where they place directly.
   The same version published again is compared by header and config_json, in which the digest is; without a digest it
   counts as other content. */

/* Fills *out; end with out->close(out->user), which a session that it is attached to does. The last version stays
   served after close and after the end of the process, until lorasync_shm_remove; the next publisher of that name goes
   on from there, also after a kill. One publisher per name at a time; up to 64 adapters and 256 engines. Several
   adapters of a name come from one transport: open it once and attach it to the session of each adapter; the last
   session to close closes it. On the root one session at a time may publish an adapter through it (LORASYNC_E_BUSY from
   lorasync_attach); all of them are then used by one thread at a time. All processes belong to one user: segments have
   mode 600, and one of another user, mode, size or layout is refused. They trust each other not to write into slots. A
   fork cannot publish through its parent's transport. After open nothing is allocated. Where shm_open is in librt
   (glibc before 2.34) link with -lrt. Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_NAME, LORASYNC_E_MEMORY, LORASYNC_E_IO
   (the system's reason), LORASYNC_E_FORMAT (size or layout), LORASYNC_E_BUSY naming the process that publishes there,
   maybe this one; from stage and commit LORASYNC_E_IO also when shared memory is full, LORASYNC_E_BUSY when 1,024 slots
   are held or 64 adapters published, LORASYNC_E_STATE in a fork or when the name was removed, and as the directory
   transport LORASYNC_E_NAME, LORASYNC_E_VERSION, LORASYNC_E_CONFIG, LORASYNC_E_ARGUMENT, LORASYNC_E_STATE.
   LORASYNC_E_UNSUPPORTED for an image on a device, unless desc.cuda is set. With desc.cuda: LORASYNC_E_UNSUPPORTED from
   open without LORASYNC_CUDA; LORASYNC_E_CUDA and LORASYNC_E_MEMORY from open and stage, for what CUDA refuses (no IPC,
   no memory left) and for a copy that has not ended after 60 s. */
LORASYNC_API lorasync_status lorasync_shm_open(const lorasync_shm_desc *desc, lorasync_transport *out,
                                               lorasync_error *err);

/* Removes what is published under a name, and gives its memory back once engines let go of it: they keep what they
   serve, and follow whoever publishes under that name next (newer versions only).
   Errors: LORASYNC_E_NAME, LORASYNC_E_NOT_FOUND, LORASYNC_E_IO, LORASYNC_E_BUSY while there is a publisher. */
LORASYNC_API lorasync_status lorasync_shm_remove(const char *name, lorasync_error *err);

/* ------------------------------------------------------------------------------------------------ >>api: engine -- */

/* The receiving side: finds new versions, checks them completely, and only then serves them. It maps the files, or the
   shared memory: replace a published file by another, never write into it or cut it. */
typedef struct lorasync_engine_desc {
    const char *directory; /* where a directory transport publishes. Copied */
    const char *shm;       /* or the name under which a shared-memory transport publishes on this host. Exactly one of
                              both. Copied */
    const char *adapter;   /* NULL: every adapter found there. Copied */
    int         no_verify; /* 1: skip the digest (the header is always checked) */
    const lorasync_allocator *allocator;
    int accept_device; /* 1, with shm: serve also versions whose payload is in device memory (lorasync_shm_desc.cuda),
                          see below. Needs LORASYNC_CUDA */
} lorasync_engine_desc;

/* With accept_device an adapter's image may have on_device = 1: the tensors' data are device addresses, good on the
   device that was current at lorasync_engine_open and on those with peer access to the memory. A poll makes that device
   current and restores the old one; it opens the memory of a slot once, digests each version there on a stream of the
   engine's own, and waits on the CPU for that, at most 60 s. Reading: in place, or by cudaMemcpyAsync to memory of the
   host program's. Either way keep the pin until the stream that reads has passed (an event behind the last read): a
   released slot is written again.
   Versions in host memory are served as without accept_device. Without it one in device memory is
   LORASYNC_E_UNSUPPORTED, which says so. */

typedef struct lorasync_engine lorasync_engine;

/* One pinned version of one adapter. Stays valid, and its bytes unchanged, until released. */
typedef struct lorasync_adapter {
    const char            *name;
    uint64_t               version;
    const lorasync_image  *image;
    const lorasync_config *config;
} lorasync_adapter;

/* Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_NAME, LORASYNC_E_MEMORY; with accept_device LORASYNC_E_CUDA, and
   LORASYNC_E_UNSUPPORTED without LORASYNC_CUDA. The directory, or the publisher, need not be there yet. With shm, use
   the engine in the process that opened it: each process, and a fork too, opens its own. */
LORASYNC_API lorasync_status lorasync_engine_open(const lorasync_engine_desc *desc, lorasync_engine **out,
                                                  lorasync_error *err);

/* Looks for versions newer than the served ones, up to timeout_ms (0: once). Each is opened, its header, config and
   digest are checked, and it becomes the served one; versions that nobody pins are dropped.
   Returns LORASYNC_OK (something newer is served), LORASYNC_NOTHING_NEW, or a failure: the old version is still served,
   and the next poll tries again. LORASYNC_E_FORMAT (also metadata that names another adapter or version than the
   directories), LORASYNC_E_PAIR, LORASYNC_E_CONFIG, LORASYNC_E_EMPTY, LORASYNC_E_DIGEST, LORASYNC_E_IO,
   LORASYNC_E_UNSUPPORTED, LORASYNC_E_MEMORY, LORASYNC_E_BUSY when 8 versions of one adapter are held: the served one
   and 7 older ones that readers pin. LORASYNC_E_VERSION when what is published is older than what is served (a trainer
   began again in an emptied place: let it publish newer versions, or open a new engine), or is the same version with
   other bytes. An adapter that fails does not hold up the others; the first failure is returned. Files without lorasync
   metadata are served too, without a digest to check. With shm, LORASYNC_E_BUSY also when 256 engines are attached,
   LORASYNC_E_STATE in a fork; a version that readers have released is given back at the next poll, and a slot stays
   mapped until a poll finds it gone. With accept_device LORASYNC_E_CUDA for memory that cannot be opened or read, and
   LORASYNC_E_IO when it was a publisher's that has ended or closed. LORASYNC_E_ARGUMENT for NULL, and for a directory
   that holds versions instead of adapters. One thread at a time. */
LORASYNC_API lorasync_status lorasync_engine_poll(lorasync_engine *engine, int timeout_ms, lorasync_error *err);

/* Pins the served version of an adapter; NULL if there is none. Wait-free but for a retry when a poll swaps versions in
   between; no system call, no allocation. Any thread, also while another polls. */
LORASYNC_API const lorasync_adapter *lorasync_acquire(lorasync_engine *engine, const char *adapter);

/* The tensor of that key ("base_model.model....lora_A.weight"), or NULL. Any thread. */
LORASYNC_API const lorasync_tensor *lorasync_find(const lorasync_adapter *adapter, const char *key);

/* Unpins; once per acquire. NULL is fine. Any thread. */
LORASYNC_API void lorasync_release(const lorasync_adapter *adapter);

/* Closes. All pins must have been released. NULL is fine. */
LORASYNC_API void lorasync_engine_close(lorasync_engine *engine);

/* Opens, checks and returns one PEFT adapter directory, or one safetensors file, outside any engine: for tools, tests
   and resuming. In a directory: adapter_model.safetensors, or the only *.safetensors there; and adapter_config.json,
   which must be there and fit. For a directory *out_config is that config, for a file NULL. The image maps the file;
   free both with lorasync_image_free and lorasync_config_free. out_config may be NULL. The digest is verified when the
   file carries one.
   Errors: LORASYNC_E_NOT_FOUND, LORASYNC_E_IO, LORASYNC_E_UNSUPPORTED (pickled files, deltas), and those of
   lorasync_image_parse, lorasync_image_verify, lorasync_config_parse and lorasync_config_check, all with the path. */
LORASYNC_API lorasync_status lorasync_open_adapter(const char *path, const lorasync_allocator *allocator,
                                                   lorasync_image **out_image, lorasync_config **out_config,
                                                   lorasync_error *err);

/* ------------------------------------------------------------------------------------------------ >>api: policy -- */

/* What must be sent to an engine now, and in which order. Pure functions: no memory, no I/O, no session. The caller
   carries the steps out, and afterwards writes down what the engine then has (base_synced, held_version,
   held_digest). */

/* Memory that an engine can give back between rollouts. Bits. */
typedef enum lorasync_memory_tag {
    LORASYNC_MEMORY_WEIGHTS    = 1,
    LORASYNC_MEMORY_KV_CACHE   = 2,
    LORASYNC_MEMORY_CUDA_GRAPH = 4
} lorasync_memory_tag;

/* What the engine's prefix cache tells adapters apart by. */
#define LORASYNC_CACHE_KEY_LIST(X)                                                                                     \
    X(LORASYNC_CACHE_BY_NAME,                                                                                          \
      "by a name that stays") /* or an id that stays: old entries would answer for the new version */                  \
    X(LORASYNC_CACHE_BY_ID,                                                                                            \
      "by an id of each load") /* or a name with the version in it: old entries are never hit again */                 \
    X(LORASYNC_CACHE_NONE, "no prefix cache")

#define LORASYNC_BASE_REASON_LIST(X)                                                                                   \
    X(LORASYNC_BASE_KEPT, "the engine has it")                                                                         \
    X(LORASYNC_BASE_NEVER_SENT, "never sent")                                                                          \
    X(LORASYNC_BASE_LOST, "the engine gave its weights back")                                                          \
    X(LORASYNC_BASE_CHANGED, "it changed")                                                                             \
    X(LORASYNC_BASE_VERIFY, "verification asked for")

#define LORASYNC_ADAPTER_REASON_LIST(X)                                                                                \
    X(LORASYNC_ADAPTER_KEPT, "the engine has these values")                                                            \
    X(LORASYNC_ADAPTER_NONE, "there is no adapter")                                                                    \
    X(LORASYNC_ADAPTER_NEVER_SENT, "never sent")                                                                       \
    X(LORASYNC_ADAPTER_LOST, "the engine gave its weights back")                                                       \
    X(LORASYNC_ADAPTER_CHANGED, "it changed")                                                                          \
    X(LORASYNC_ADAPTER_ASKED, "asked for")

/* In the order in which they occur, each at most once. */
#define LORASYNC_STEP_LIST(X)                                                                                          \
    X(LORASYNC_STEP_PAUSE, "pause")                   /* hold requests: what they compute with is about to change */   \
    X(LORASYNC_STEP_RESUME_WEIGHTS, "resume weights") /* take the memory again */                                      \
    X(LORASYNC_STEP_SEND_BASE,                                                                                         \
      "send base") /* lorasync_stream_sync; only here may a weight update be opened, it holds all of the base */       \
    X(LORASYNC_STEP_SEND_ADAPTER, "send adapter")           /* stage and commit: lorasync_sync */                      \
    X(LORASYNC_STEP_RESUME_KV_CACHE, "resume kv_cache")     /* after the sends: that bounds the peak */                \
    X(LORASYNC_STEP_RESUME_CUDA_GRAPH, "resume cuda_graph") /* graphs hold addresses of the two others */              \
    X(LORASYNC_STEP_FLUSH, "flush prefix cache")                                                                       \
    X(LORASYNC_STEP_CONTINUE, "continue") /* let requests go on */

#define LORASYNC_X(name, text) name,
typedef enum lorasync_cache_key {
    LORASYNC_CACHE_KEY_LIST(LORASYNC_X) LORASYNC_CACHE_KEY_FORCE_INT = 0x7fffffff
} lorasync_cache_key;
typedef enum lorasync_base_reason {
    LORASYNC_BASE_REASON_LIST(LORASYNC_X) LORASYNC_BASE_REASON_FORCE_INT = 0x7fffffff
} lorasync_base_reason;
typedef enum lorasync_adapter_reason {
    LORASYNC_ADAPTER_REASON_LIST(LORASYNC_X) LORASYNC_ADAPTER_REASON_FORCE_INT = 0x7fffffff
} lorasync_adapter_reason;
typedef enum lorasync_step {
    LORASYNC_STEP_LIST(LORASYNC_X) LORASYNC_STEP_FORCE_INT = 0x7fffffff
} lorasync_step;
#undef LORASYNC_X

#define LORASYNC_MAX_STEPS 8

/* Constant short texts, never NULL. That of a memory tag is the word that SGLang and vLLM use ("kv_cache"). */
LORASYNC_API const char *lorasync_memory_tag_text(lorasync_memory_tag tag);
LORASYNC_API const char *lorasync_cache_key_text(lorasync_cache_key key);
LORASYNC_API const char *lorasync_base_reason_text(lorasync_base_reason reason);
LORASYNC_API const char *lorasync_adapter_reason_text(lorasync_adapter_reason reason);
LORASYNC_API const char *lorasync_step_text(lorasync_step step);

/* What is known of one engine, and what it shall serve. All zero is an engine that has just started and never
   sleeps. */
typedef struct lorasync_policy_state {
    /* the engine's base weights and memory */
    int      base_synced;       /* it has had this trainer's base since it started: sent, or loaded from the same
                                   checkpoint */
    int      sleep_level;       /* how it sleeps between rollouts: 1 keeps its weights or restores them itself, 2 loses
                                   them; 0: no levels, weights are lost when LORASYNC_MEMORY_WEIGHTS is in `tags` and
                                   `released` */
    int      keeps_memory;      /* 1: it never sleeps (free_cache_engine=False), whatever the level */
    int      weights_backed_up; /* 1: it restores lost weights itself, from a CPU copy */
    unsigned tags;              /* lorasync_memory_tag bits that it knows; no other is resumed */
    unsigned released;          /* those given back now; bits that are not in `tags` are left out */
    /* the engine's adapters */
    uint64_t           held_version; /* of the adapter that it serves; 0: none since it started */
    uint64_t           held_digest;
    int                one_slot; /* 1: the new version overwrites the old one in place, so requests must be held */
    lorasync_cache_key cache_key;
    /* the trainer */
    int      base_changed; /* since it was last sent: PiSSA-like initialisation, merge, full fine-tuning */
    int      no_adapter;   /* 1: merged, or full fine-tuning */
    int      verify;       /* 1: an equality check wants everything sent */
    int      ask_adapter;  /* 1: send the adapter though it is the same */
    uint64_t version;      /* that shall be served */
    uint64_t digest;       /* its lorasync_report.digest */
} lorasync_policy_state;

typedef struct lorasync_decision {
    int                     send_base;
    int                     send_adapter;
    lorasync_base_reason    base_reason; /* the first that holds, in the order of the list */
    lorasync_adapter_reason adapter_reason;
    uint64_t                version; /* of the adapter that is served after the steps; 0: none */
    lorasync_step           steps[LORASYNC_MAX_STEPS];
    int                     num_steps; /* 0: nothing to do */
} lorasync_decision;

/* Decides.
   base      sent when it was never sent, when the engine lost it and has no copy, when it changed, or when verification
             is asked for. Otherwise
             no step opens a weight update: an empty one spoils quantised weights.
   adapter   sent when the engine holds none, lost its weights (the slots are among them), holds other values (by
             digest), or when asked.
   order     released memory is resumed, weights before the sends and the rest after them; requests are held around a
             send of the base, or of
             the adapter into its own slot; the prefix cache is flushed after a base, or after an adapter when it is
             keyed by name.
   Errors: LORASYNC_E_ARGUMENT for NULL, a level that is not 0, 1 or 2, a cache key that is none, keeps_memory with
   something released, an adapter without version. */
LORASYNC_API lorasync_status lorasync_policy_decide(const lorasync_policy_state *state, lorasync_decision *out,
                                                    lorasync_error *err);

/* The state of an engine as verl runs it (vLLM with one adapter under a fixed name), before its rollout: the base is
   sent again only when it was never sent, or at sleep level 2 with the cache engine freed (verl PR 5147). Fill in the
   adapter's fields afterwards. */
typedef struct lorasync_verl_knobs {
    const char *load_format;       /* rollout.load_format; with "dummy" in it the engine starts without a base. NULL:
                                      like "auto" */
    int         base_sent;         /* 1: sent since the engine started */
    int         sleep_level;       /* rollout sleep_level, 1 or 2 */
    int         free_cache_engine; /* rollout.free_cache_engine */
} lorasync_verl_knobs;
LORASYNC_API lorasync_status lorasync_policy_verl(const lorasync_verl_knobs *knobs, lorasync_policy_state *out,
                                                  lorasync_error *err);

/* The state of an engine as miles runs it (SGLang with one adapter slot), before its rollout: the base is skipped when
   LoRA is trained and it was sent before and weights are not offloaded, or the engine has a CPU copy of it; an equality
   check sends it all the same. */
typedef struct lorasync_miles_knobs {
    const char
        *offload_rollout_level; /* any of `kv_cache` and `weight`, between blanks or commas; NULL: nothing is offloaded.
                                   "kv_cache" takes
                                          the CUDA graphs with it */
    int  lora;                  /* 0: full fine-tuning, the base is sent each time and there is no adapter */
    int  base_sent;
    int  cpu_backup;         /* the engine has a CPU copy of the base (enable_weights_cpu_backup) */
    int  check_equal;        /* --check-lora-weight-equal and its like */
    int  has_cuda_graph_tag; /* 0: this SGLang has no such tag */
} lorasync_miles_knobs;
LORASYNC_API lorasync_status lorasync_policy_miles(const lorasync_miles_knobs *knobs, lorasync_policy_state *out,
                                                   lorasync_error *err);

/* ----------------------------------------------------------------------------------------------- >>api: session -- */

/* Everything zero, and a comm, is a working default for training with PEFT's adapter called "default". */
typedef struct lorasync_desc {
    const lorasync_comm   *comm;        /* NULL: one rank. Copied; its user pointer is borrowed until close */
    int                    root;        /* the rank that publishes */
    const char            *adapter;     /* NULL: "default". The name inside parameter names, and the published name.
                                           Copied */
    lorasync_dtype         wire_dtype;  /* what engines get: BF16 usually; NONE: each tensor's own dtype */
    const lorasync_filter *filter;      /* NULL: all LoRA parameters of the adapter. Borrowed until lorasync_compile
                                           returns */
    const char            *config_json; /* the trainer's adapter_config.json as text; or NULL and give lora_alpha.
                                           Copied */
    double                 lora_alpha;  /* without config_json; beside it 0, or the same */
    const char            *base_model;  /* without config_json: base_model_name_or_path. Copied */
    int                    fold_scale;  /* 1: multiply alpha / r (or what the config says) into lora_B and publish
                                           lora_alpha == r */
    int                    allow_nan;
    int                    no_direct;
    const lorasync_cuda   *cuda;         /* NULL: parameters are in host memory. Copied */
    size_t                 bucket_bytes; /* as in lorasync_plan_desc */
    int                    timeout_ms;   /* of each collective step: so long ranks wait for one another. 0: 60000. Not
                                            of publishing: */
    int publish_timeout_ms; /* how long the other ranks wait in lorasync_wait and lorasync_republish while the root
                               stages and commits, on all
                                      engines together. A root that dies is noticed sooner where the comm notices it. 0:
                                      600000, ten minutes */
    int quorum; /* 0: all engines must take a version, or none does. n: at least n must; those that fail keep the old
                   one, are reported
                                      and tried again at the next sync; with fewer than n nobody gets it. Used on the
                                      root */
    int skip_unchanged; /* 1: when every engine serves exactly these bytes already, nothing is staged (report.skipped).
                           Used on the root */
    const lorasync_allocator *allocator;
} lorasync_desc;

typedef struct lorasync_session lorasync_session;

typedef struct lorasync_report {
    uint64_t version;       /* that is served now: the one asked for, or when skipped the one before */
    uint64_t digest;        /* of the image; equal on all ranks */
    size_t   num_tensors;   /* of the adapter, on the root; elsewhere those held here */
    size_t   payload_bytes; /* on the root; elsewhere 0 */
    int      num_engines;   /* that serve it */
    int      num_behind;    /* that do not, with a quorum: lorasync_get_outcomes says which and why */
    int      skipped;       /* 1: nothing had changed and nothing was staged */
    int      direct;
    int      in_place; /* 1: the image was gathered in the slot of shared memory where engines read it, and not
                          copied */
    uint64_t pack_ns;  /* on this rank */
    uint64_t exchange_ns;
    uint64_t place_ns;
    uint64_t publish_ns; /* stage and commit; as the root measured it */
    uint64_t total_ns;   /* from the beginning of begin to the end of wait, with what the caller does in between */
} lorasync_report;

/* Not collective: if it fails on one rank, the others learn it in lorasync_compile, at its deadline or when the host
   gives its communicator up. A new session does not know what was published before it. After a restart, or a lost
   communicator, go on with a version greater than the one that is served: in a directory it is what <adapter>/latest
   points to, in shared memory an engine's lorasync_acquire(..)->version; or sync version 1, and where a newer one is
   served LORASYNC_E_VERSION names it.
   Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_MEMORY, and those of lorasync_config_parse. */
LORASYNC_API lorasync_status lorasync_open(const lorasync_desc *desc, lorasync_session **out, lorasync_error *err);

/* Declares one piece this rank holds; call for every parameter of the model, LoRA or not, and several times for several
   pieces of one tensor. A rank that holds nothing of a tensor may leave it out or pass an empty box. Not collective;
   copies what it needs, borrows data. An error is also remembered: lorasync_compile then fails on every rank, each
   time, and the session can only be closed. Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_NAME, LORASYNC_E_LAYOUT (box out of
   bounds), LORASYNC_E_UNSUPPORTED (F4 or F6; a scale of another dtype than F32, F16, BF16, F8_E4M3 and F8_E5M2),
   LORASYNC_E_STATE after compile, LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_add(lorasync_session *session, const lorasync_piece *piece, lorasync_error *err);

/* Adds an engine; 0 or more before compile. Copied; its `close` is called when the session closes, unless this call
   failed: on every rank that attached it. Only the root's stages and commits. One transport may be attached to several
   sessions if it is made for being closed by each, as that of lorasync_shm_open is; lorasync_directory_open's is not.
   An error is also remembered, as lorasync_add's is. Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_STATE after compile,
   LORASYNC_E_BUSY (see lorasync_shm_open), LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_attach(lorasync_session *session, const lorasync_transport *transport,
                                             lorasync_error *err);

/* lorasync_directory_open with defaults, then lorasync_attach; an error of either is remembered. */
LORASYNC_API lorasync_status lorasync_attach_directory(lorasync_session *session, const char *directory,
                                                       lorasync_error *err);

/* Filters, pairs, plans and allocates. Collective, once. Errors, the same on all ranks: those remembered by
   lorasync_add and lorasync_attach; LORASYNC_E_EMPTY (no LoRA parameter on any rank); LORASYNC_E_PAIR (A without B);
   LORASYNC_E_NAME (two parameters of one key); LORASYNC_E_ARGUMENT (quorum over the number of engines);
   LORASYNC_E_CONFIG (rank against config, no alpha, two of them, fold_scale with an alpha of 0); LORASYNC_E_UNSUPPORTED
   (filter.base with a directory or shared memory, which publish adapters: there is no adapter_config.json then);
   LORASYNC_E_DISAGREE (descs differ between ranks); those of lorasync_plan_create. After LORASYNC_E_PAIR and
   LORASYNC_E_EMPTY the rest may be added, and compile called again on all ranks. */
LORASYNC_API lorasync_status lorasync_compile(lorasync_session *session, lorasync_error *err);

/* One step. begin snapshots the parameters: when it returns they may change again. wait moves, publishes and returns
   the verdict. Both are collective and must be called in pairs, wait also after a failed begin. Sessions that share a
   communicator are begun and waited for in the same order on every rank. Versions count up from 1: a version must be
   greater than the last one published (a skipped one was not), and may be tried again after a failure.
   wait fails without effect: engines keep the old version, but see lorasync_transport for commits that fail. Only a
   communicator that is lost while the root commits (or stages, where the comm has no check), or tells the others that
   it has, leaves ranks in doubt: they return a status of -100 or below, and the version may be published. So after a
   loss look at what engines serve before choosing the next version (see lorasync_open).
   Errors: LORASYNC_E_NAN, LORASYNC_E_VERSION, LORASYNC_E_DISAGREE (ranks pass different versions), whatever a transport
   returned, LORASYNC_E_STATE (before compile), and those of the comm. No allocation, no string work. */
LORASYNC_API lorasync_status lorasync_begin(lorasync_session *session, uint64_t version, lorasync_error *err);
LORASYNC_API lorasync_status lorasync_wait(lorasync_session *session, lorasync_report *out_report, lorasync_error *err);

/* begin and wait. out_report may be NULL. */
LORASYNC_API lorasync_status lorasync_sync(lorasync_session *session, uint64_t version, lorasync_report *out_report,
                                           lorasync_error *err);

/* What is known of every engine, in the order of lorasync_attach; also after a failed wait. On the root, between calls;
   the array stays where it is after compile. NULL and 0 elsewhere, or without engines. out_num may be NULL. */
LORASYNC_API const lorasync_engine_outcome *lorasync_get_outcomes(const lorasync_session *session, size_t *out_num);

/* Brings the version published last to the engines that do not serve it (all of them are also tried by every sync). For
   use between a successful wait and the next begin, when desc.quorum let some fall behind. Collective; may be repeated.
   Allocates nothing. Returns LORASYNC_OK: all engines serve it; LORASYNC_NOTHING_NEW: they did already; or the first
   failure of an engine that still does not, while the others keep what they got. LORASYNC_E_STATE: nothing published
   yet, or begun or failed since: sync instead. */
LORASYNC_API lorasync_status lorasync_republish(lorasync_session *session, lorasync_error *err);

/* Resumes: reads a PEFT directory or safetensors file on the root and writes every rank's pieces, replicas included,
   converted to their dtypes. Collective, after compile; path is equal on all ranks and read on the root. The file's
   tensors and the session's must be the same set with the same shapes; the adapter's name in the file may be another.
   Each module's scale (alpha / rank) must be the same in the directory's adapter_config.json as in the session, else
   LORASYNC_E_CONFIG names both: the session would publish these weights as another adapter. A single file has no config
   to compare. Tensors of which a rank's pieces lie at one address (the one A of a fused qkv) must be equal in the file,
   else LORASYNC_E_LAYOUT names two of them; pieces of different tensors must not overlap otherwise. Scales are not
   undone: LORASYNC_E_UNSUPPORTED with fold_scale or a piece.scale. On failure before anything moved the pieces are
   untouched; the error text says if any were written. */
LORASYNC_API lorasync_status lorasync_load(lorasync_session *session, const char *path, lorasync_error *err);

/* What compile found. num_added pieces were declared on this rank, num_taken passed the filter. */
typedef struct lorasync_session_info {
    size_t              num_added;
    size_t              num_taken;
    size_t              num_dropped;
    size_t              num_tensors;   /* of the adapter, on the root; elsewhere those held here */
    size_t              payload_bytes; /* on the root */
    lorasync_plan_stats plan;
} lorasync_session_info;
LORASYNC_API void lorasync_get_info(const lorasync_session *session, lorasync_session_info *out);

/* The image last synced, on the root between a successful wait and its next begin; NULL elsewhere, and after a wait
   that failed. Its config_json is what was published. */
LORASYNC_API const lorasync_image *lorasync_session_image(const lorasync_session *session);

/* Frees everything and closes the transports. Not collective. NULL is fine. On a GPU, between begin and wait, it first
   lets the run's work end; where that takes until the deadline, because others do not take part, the communicator is
   given up. */
LORASYNC_API void lorasync_close(lorasync_session *session);

/* -------------------------------------------------------------------------------------------------- >>api: base -- */

/* Base weights, merged weights, a whole model: what an engine needs before an adapter, and what is too large for one
   image. They travel through the same plans, images and transports, in buckets of bounded size, and are committed after
   the last one: all engines get all of it, or none.

       tensors, in order of declaration  | a b c | d e | f (larger than a bucket) | g h .. |
       bucket, an image of its own       |   0   |  1  |            2             |    3   |   even ones in one buffer,
       odd ones in another:

       root    | gather 0 | stage 0 | gather 1 | stage 1 | gather 2 | .. | commit |
       others  | pack 0   | pack 1 ...........  | pack 2 ...........        while the root stages

   When to send the base, and when it may stay, is lorasync_policy_decide's business (LORASYNC_STEP_SEND_BASE). */
typedef struct lorasync_stream_desc {
    const lorasync_comm *comm;         /* NULL: one rank. Copied; its user pointer is borrowed until close */
    int                  root;         /* the rank that publishes */
    lorasync_dtype       wire_dtype;   /* float tensors travel as this; NONE: each as it is */
    size_t               bucket_bytes; /* of payload; 0: 1 GiB. A tensor, or a lora_A with its lora_B, that is larger
                                          travels alone */
    const char          *name;         /* NULL: "base". What it is published as: image->adapter. Copied */
    const char          *config_json;  /* the model's config.json, published with the last bucket; NULL: none. Used on
                                          the root. Copied */
    int keep_names; /* 1: names are published as given. 0: as lorasync_parse_name's key: without wrappers and
                       `base_layer` */
    int allow_nan;
    int no_direct;
    const lorasync_cuda
        *cuda;       /* NULL: parameters are in host memory. Copied. Device memory travels over exchange_stream or
                        pinned memory */
    int  timeout_ms; /* 0: 60000. Staging a bucket counts, and so does committing: give more than the slowest engine
                        takes */
    const lorasync_allocator *allocator;
} lorasync_stream_desc;

typedef struct lorasync_stream lorasync_stream;

/* Not collective. Errors: LORASYNC_E_ARGUMENT, LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_stream_open(const lorasync_stream_desc *desc, lorasync_stream **out,
                                                  lorasync_error *err);

/* Declares one piece that this rank holds, as lorasync_add; nothing is filtered: what is added is sent. Errors, also
   remembered for compile: LORASYNC_E_ARGUMENT, LORASYNC_E_NAME, LORASYNC_E_LAYOUT, LORASYNC_E_UNSUPPORTED,
   LORASYNC_E_STATE after compile, LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_stream_add(lorasync_stream *stream, const lorasync_piece *piece,
                                                 lorasync_error *err);

/* Adds an engine before compile. Copied; its `close` is called when the stream closes, unless this call failed. Used on
   the root, ignored elsewhere. Errors, also remembered for compile: LORASYNC_E_UNSUPPORTED for a shared-memory
   transport, since those carry adapters; LORASYNC_E_ARGUMENT, LORASYNC_E_STATE after compile, LORASYNC_E_MEMORY. */
LORASYNC_API lorasync_status lorasync_stream_attach(lorasync_stream *stream, const lorasync_transport *transport,
                                                    lorasync_error *err);

/* Divides the tensors into buckets, plans each and allocates. Collective, once. The order is that of first declaration,
   on the lowest rank that has the tensor; a tensor whose name is that of another up to `.lora_` goes into the other's
   bucket. Memory: the root has two payloads, the largest of the even and of the odd buckets, and staging for one
   bucket; other ranks have staging for what they hold of one bucket. Where all ranks can map the payloads they place
   directly, and there is no staging. Errors, the same on all ranks: those remembered; LORASYNC_E_EMPTY; LORASYNC_E_NAME
   (two parameters of one name); LORASYNC_E_DISAGREE; LORASYNC_E_ARGUMENT (over 99,999 buckets); LORASYNC_E_UNSUPPORTED
   for a transport without takes_buckets when there are more than one; those of lorasync_plan_create. */
LORASYNC_API lorasync_status lorasync_stream_compile(lorasync_stream *stream, lorasync_error *err);

/* Sends all buckets and commits. Collective. The parameters must not change during the call. Versions are as with
   lorasync_begin. All engines must take it. On failure, in whichever bucket, all that was staged is aborted, engines
   keep the old version, and every rank returns the same error: LORASYNC_E_NAN, LORASYNC_E_VERSION, LORASYNC_E_DISAGREE
   (ranks pass different versions), whatever a transport returned, LORASYNC_E_STATE before compile, and those of the
   comm. Allocates nothing. out_report may be NULL; its digest is over the digests of the buckets, its times are
   sums. */
LORASYNC_API lorasync_status lorasync_stream_sync(lorasync_stream *stream, uint64_t version,
                                                  lorasync_report *out_report, lorasync_error *err);

/* What compile found; zeros before. */
typedef struct lorasync_stream_info {
    size_t num_tensors; /* of all ranks */
    size_t num_buckets;
    size_t payload_bytes; /* of all buckets */
    size_t image_bytes;   /* of the two buffers; where direct is 0, on the root only */
    size_t staging_bytes; /* on this rank */
    size_t plan_bytes;    /* of all plans on this rank, headers included */
    int    direct;
} lorasync_stream_info;
LORASYNC_API void lorasync_stream_get_info(const lorasync_stream *stream, lorasync_stream_info *out);

/* As lorasync_get_outcomes. */
LORASYNC_API const lorasync_engine_outcome *lorasync_stream_outcomes(const lorasync_stream *stream, size_t *out_num);

/* Frees everything and closes the transports. Not collective. NULL is fine. */
LORASYNC_API void lorasync_stream_close(lorasync_stream *stream);

#ifdef __cplusplus
}
#endif

#endif /* LORASYNC_H */

/* =========================== END OF THE PUBLIC PART: stop here if you only want the API =========================== */

#if defined(LORASYNC_CUDA) || defined(LORASYNC_DEVICE_CODE)
#ifndef LORASYNCD_TILE

/* What host and device share. One operation moves n0 rows of n1 elements (num = n0 * n1) as lorasynci_op does, with
   addresses instead of offsets; a tile is a run of its elements that one block of threads does.

       ops    [ op 0 | op 1 | ... ]   tiles  [ op 0, 0 .. 16384 | op 0, 16384 .. 17000 | op 1, 0 .. 512 | ... ]       */
typedef struct lorasyncd_op {
    unsigned long long src, dst; /* dst 0: digested only. Then both dtypes are the same integer type, which the NaN
                                    check leaves alone */
    unsigned long long sum;      /* address of the tensor's digest, or 0: not digested, not checked */
    long long          num, n1, s0, s1, d0, d1, pos, row;
    unsigned           tensor;
    float              scale;
    unsigned char      src_dtype, dst_dtype, via;
    unsigned char      unit;     /* elements that a thread moves at a time: 8, read and written 16 bytes at a time, 2,
                                    or 1 */
    unsigned           in_image; /* 1: dst is where the image lay at first; a launch says how far off it lies now */
} lorasyncd_op;

typedef struct lorasyncd_tile {
    long long first; /* element of the op; a multiple of 8 */
    unsigned  op, count;
} lorasyncd_tile;

#define LORASYNCD_THREADS 256 /* of a block, at most */
#define LORASYNCD_TILE 16384  /* elements */

#endif
#endif

#if defined(LORASYNC_IMPLEMENTATION) && !defined(LORASYNC_IMPLEMENTED)
#define LORASYNC_IMPLEMENTED

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <dirent.h>
#include <time.h>
#include <unistd.h>
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#if !defined(O_CLOEXEC) || !defined(CLOCK_MONOTONIC) || !defined(MAP_ANONYMOUS)
#error "lorasync.h: POSIX is hidden: compile with -std=gnu99 or -D_DEFAULT_SOURCE, or include it before system headers"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lorasync.h: needs a little-endian machine; safetensors data is little-endian and is used in place."
#endif

/* ----------------------------------------------------------------------------------------------------- >>support -- */

#if defined(__GNUC__)
#define LORASYNCI_UNUSED __attribute__((unused))
#define LORASYNCI_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define LORASYNCI_UNUSED
#define LORASYNCI_PRINTF(fmt, args)
#endif
#define LORASYNCI_FN LORASYNCI_UNUSED static

#define LORASYNCI_TRY(call)                                                                                            \
    do {                                                                                                               \
        lorasync_status lorasynci_try_ = (call);                                                                       \
        if (lorasynci_try_ < 0) return lorasynci_try_;                                                                 \
    } while (0)

#define LORASYNCI_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* States what holds here whatever the caller or another rank does: a condition that is false is a mistake of this file.
   Its condition has no effects, since it is not evaluated unless the user defines the macro. */
#ifndef LORASYNC_ASSERT
#define LORASYNC_ASSERT(condition) ((void)0)
#define LORASYNCI_ASSERTS_NOTHING
#endif

LORASYNC_API int lorasync_is_lost(lorasync_status status) { return (int)status <= -100; }

LORASYNC_API const char *lorasync_status_text(lorasync_status status)
{
    switch ((int)status) {
#define LORASYNC_X(name, value, text)                                                                                  \
    case value: return text;
        LORASYNC_STATUS_LIST(LORASYNC_X)
#undef LORASYNC_X
    default: return "unknown status";
    }
}

/* Fills err (if any) and returns status, so that a failing function can end in `return lorasynci_fail(err, ...)`. */
LORASYNCI_PRINTF(3, 4)
LORASYNCI_FN lorasync_status lorasynci_fail(lorasync_error *err, lorasync_status status, const char *format, ...)
{
    if (err) {
        va_list args;
        int     n;
        va_start(args, format);
        n = vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        if (n < 0) err->text[0] = 0;
        err->status = status;
    }
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_fail_memory(lorasync_error *err, size_t num_bytes)
{
    return lorasynci_fail(err, LORASYNC_E_MEMORY, "out of memory: the allocator gave nothing for %zu bytes", num_bytes);
}

/* Puts words before the text of an error that a callee made: "<prefix>: <text>". */
LORASYNCI_PRINTF(2, 3) LORASYNCI_FN void lorasynci_prefix(lorasync_error *err, const char *format, ...)
{
    lorasync_error inner;
    va_list        args;
    int            n;
    if (!err) return;
    inner = *err;
    va_start(args, format);
    n = vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof err->text) n = 0;
    snprintf(err->text + n, sizeof err->text - (size_t)n, "%s%.440s", n ? ": " : "", inner.text);
}

/* -- memory */

LORASYNCI_FN void *lorasynci_default_alloc(void *user, size_t num_bytes)
{
    (void)user;
    return malloc(num_bytes);
}

LORASYNCI_FN void lorasynci_default_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

/* The allocator to keep in a handle: the caller's or malloc. 0 if only one of its functions is set. */
LORASYNCI_FN int lorasynci_take_allocator(const lorasync_allocator *given, lorasync_allocator *out)
{
    if (given && (given->alloc || given->free)) {
        *out = *given;
        return given->alloc && given->free;
    }
    out->alloc = lorasynci_default_alloc;
    out->free  = lorasynci_default_free;
    out->user  = NULL;
    return 1;
}

LORASYNCI_FN void *lorasynci_alloc(const lorasync_allocator *a, size_t num_bytes)
{
    return a->alloc(a->user, num_bytes ? num_bytes : 1);
}

LORASYNCI_FN void lorasynci_dealloc(const lorasync_allocator *a, void *memory)
{
    if (memory) a->free(a->user, memory);
}

LORASYNC_API void lorasync_free(const lorasync_allocator *allocator, void *memory)
{
    lorasync_allocator a;
    if (lorasynci_take_allocator(allocator, &a)) lorasynci_dealloc(&a, memory);
}

/* 1 and *out = a * b (a + b), or 0 when it does not fit. */
LORASYNCI_FN int lorasynci_checked_mul(size_t a, size_t b, size_t *out)
{
    if (a != 0 && b > SIZE_MAX / a) return 0;
    *out = a * b;
    return 1;
}

LORASYNCI_FN int lorasynci_checked_add(size_t a, size_t b, size_t *out)
{
    if (b > SIZE_MAX - a) return 0;
    *out = a + b;
    return 1;
}

/* Zeroed memory for num things of num_bytes each; NULL also when the product does not fit. */
LORASYNCI_FN void *lorasynci_alloc_array(const lorasync_allocator *a, size_t num, size_t num_bytes)
{
    size_t n;
    void  *p;
    if (!lorasynci_checked_mul(num, num_bytes, &n)) return NULL;
    p = lorasynci_alloc(a, n);
    if (p) memset(p, 0, n ? n : 1);
    return p;
}

/* A growing run of bytes. After a failed growth `failed` stays set and every put does nothing: check once at the
   end. */
typedef struct lorasynci_buffer {
    char              *data;
    size_t             size, capacity;
    int                failed;
    lorasync_allocator a;
} lorasynci_buffer;

LORASYNCI_FN void lorasynci_buffer_init(lorasynci_buffer *b, const lorasync_allocator *a)
{
    memset(b, 0, sizeof *b);
    b->a = *a;
}

LORASYNCI_FN void lorasynci_buffer_free(lorasynci_buffer *b)
{
    lorasynci_dealloc(&b->a, b->data);
    b->data = NULL;
    b->size = b->capacity = 0;
}

/* Room for num_bytes more, not yet counted in size; NULL when there is none. */
LORASYNCI_FN char *lorasynci_buffer_reserve(lorasynci_buffer *b, size_t num_bytes)
{
    size_t need, capacity;
    char  *data;
    if (b->failed) return NULL;
    if (!lorasynci_checked_add(b->size, num_bytes, &need)) {
        b->failed = 1;
        return NULL;
    }
    if (b->data && need <= b->capacity) return b->data + b->size;
    capacity = b->capacity < SIZE_MAX / 2 ? b->capacity * 2 : SIZE_MAX;
    if (capacity < need) capacity = need;
    if (capacity < 64) capacity = 64;
    data = (char *)lorasynci_alloc(&b->a, capacity);
    if (!data) {
        b->failed = 1;
        return NULL;
    }
    if (b->size) memcpy(data, b->data, b->size);
    lorasynci_dealloc(&b->a, b->data);
    b->data     = data;
    b->capacity = capacity;
    return b->data + b->size;
}

LORASYNCI_FN void lorasynci_put(lorasynci_buffer *b, const void *bytes, size_t num_bytes)
{
    char *to = lorasynci_buffer_reserve(b, num_bytes);
    if (!to) return;
    if (num_bytes) memcpy(to, bytes, num_bytes);
    b->size += num_bytes;
}

LORASYNCI_FN void lorasynci_put_text(lorasynci_buffer *b, const char *text) { lorasynci_put(b, text, strlen(text)); }

LORASYNCI_PRINTF(2, 3) LORASYNCI_FN void lorasynci_put_format(lorasynci_buffer *b, const char *format, ...)
{
    char    text[256]; /* numbers and short words only */
    va_list args;
    int     n;
    va_start(args, format);
    n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof text) b->failed = 1;
    else lorasynci_put(b, text, (size_t)n);
}

/* A copy of text, NUL-terminated; NULL when there is no memory. */
LORASYNCI_FN char *lorasynci_copy_text(const lorasync_allocator *a, const char *text, size_t num_bytes)
{
    char *p = (char *)lorasynci_alloc(a, num_bytes + 1);
    if (!p) return NULL;
    if (num_bytes) memcpy(p, text, num_bytes);
    p[num_bytes] = 0;
    return p;
}

/* -- hashing: tables and agreement between ranks, not security */

/* The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). */
LORASYNCI_FN uint64_t lorasynci_mix(uint64_t x)
{
    x ^= x >> 30;
    x *= UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 27;
    x *= UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

LORASYNCI_FN uint64_t lorasynci_load_le64(const unsigned char *p, size_t n) /* n <= 8 bytes, the rest 0 */
{
    uint64_t v = 0;
    size_t   i;
    if (n == 8) /* spelt out, compilers see that it is one load */
        return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24 |
               (uint64_t)p[4] << 32 | (uint64_t)p[5] << 40 | (uint64_t)p[6] << 48 | (uint64_t)p[7] << 56;
    for (i = 0; i < n; i++) v |= (uint64_t)p[i] << (8 * i);
    return v;
}

LORASYNCI_FN uint64_t lorasynci_hash(const void *bytes, size_t num_bytes, uint64_t seed)
{
    const unsigned char *p = (const unsigned char *)bytes;
    uint64_t             h = lorasynci_mix(seed + UINT64_C(0x9e3779b97f4a7c15) + num_bytes);
    for (; num_bytes >= 8; p += 8, num_bytes -= 8)
        h = lorasynci_mix(h ^ lorasynci_load_le64(p, 8)) + UINT64_C(0x9e3779b97f4a7c15);
    if (num_bytes) h = lorasynci_mix(h ^ lorasynci_load_le64(p, num_bytes));
    return lorasynci_mix(h);
}

/* From a string to its number: open addressing over strings that the caller keeps. A cell holds index + 1, 0 is empty.

       cells  [ 0 | 3 | 0 | 1 | 2 | ... ]   power of two, at most half full
       keys   key_of(user, index) -> the string with that number
*/
typedef struct lorasynci_table {
    uint32_t          *cells;
    size_t             num_cells;
    lorasync_allocator a;
} lorasynci_table;

typedef const char *(*lorasynci_key_of)(const void *user, size_t index);

LORASYNCI_FN int lorasynci_table_init(lorasynci_table *t, const lorasync_allocator *a, size_t max_keys)
{
    size_t n = 16;
    while (n / 2 < max_keys) {
        if (n > SIZE_MAX / 8) return 0;
        n *= 2;
    }
    t->a         = *a;
    t->num_cells = n;
    t->cells     = max_keys < UINT32_MAX ? (uint32_t *)lorasynci_alloc_array(a, n, sizeof *t->cells) : NULL;
    return t->cells != NULL;
}

LORASYNCI_FN void lorasynci_table_free(lorasynci_table *t)
{
    lorasynci_dealloc(&t->a, t->cells);
    t->cells = NULL;
}

/* The cell where the key is, or where it would go. */
LORASYNCI_FN size_t lorasynci_table_cell(const lorasynci_table *t, const char *key, lorasynci_key_of key_of,
                                         const void *user)
{
    size_t mask = t->num_cells - 1, at = (size_t)lorasynci_hash(key, strlen(key), 0) & mask;
    while (t->cells[at] && strcmp(key_of(user, t->cells[at] - 1), key) != 0) at = (at + 1) & mask;
    return at;
}

/* The number of a key, or SIZE_MAX. */
LORASYNCI_FN size_t lorasynci_table_find(const lorasynci_table *t, const char *key, lorasynci_key_of key_of,
                                         const void *user)
{
    size_t at = lorasynci_table_cell(t, key, key_of, user);
    return t->cells[at] ? (size_t)t->cells[at] - 1 : SIZE_MAX;
}

/* Enters a key under `index` and returns index, or the number it already has. */
LORASYNCI_FN size_t lorasynci_table_insert(lorasynci_table *t, const char *key, size_t index, lorasynci_key_of key_of,
                                           const void *user)
{
    size_t at = lorasynci_table_cell(t, key, key_of, user);
    if (t->cells[at]) return (size_t)t->cells[at] - 1;
    t->cells[at] = (uint32_t)(index + 1);
    return index;
}

/* -- time */

LORASYNCI_FN uint64_t lorasynci_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

LORASYNCI_FN uint64_t lorasynci_deadline_ns(int timeout_ms)
{
    return lorasynci_now_ns() + (uint64_t)(timeout_ms > 0 ? timeout_ms : 0) * 1000000u;
}

enum {
    LORASYNCI_YIELDS = 4096 /* some milliseconds: a sleep, however short, costs 50 microseconds or more */
};

/* Waiting for another process: first yields, then sleeps, up to 100 microseconds at a time. *turns starts at 0. */
LORASYNCI_FN void lorasynci_pause(unsigned *turns)
{
    if ((*turns)++ < LORASYNCI_YIELDS) {
        sched_yield();
    } else {
        struct timespec t;
        t.tv_sec  = 0;
        t.tv_nsec = *turns < LORASYNCI_YIELDS + 192 ? 10000 : 100000;
        nanosleep(&t, NULL);
    }
}

/* -- processes */

/* Field 22 of /proc/<which>/stat, counted in clock ticks since boot; 0 when it cannot be read. *out_ended: 1 for a
   zombie of which no thread is left. */
LORASYNCI_FN uint64_t lorasynci_process_start(const char *which, int *out_ended)
{
    char        path[64], text[1024];
    const char *at;
    ssize_t     n;
    char        state;
    long        num_threads = 0;
    int         fd, field;
    *out_ended = 0;
    snprintf(path, sizeof path, "/proc/%.20s/stat", which);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) return 0;
    text[n] = 0;
    at      = strrchr(text, ')'); /* "pid (name) state ..." and the name may hold anything */
    if (!at || at[1] != ' ') return 0;
    state = at[2];
    for (field = 2; field < 22; field++) {
        at = strchr(at, ' ');
        if (!at) return 0;
        at++;
        if (field == 19) num_threads = strtol(at, NULL, 10);
    }
    *out_ended = (state == 'Z' || state == 'X') && num_threads <= 1;
    return strtoull(at, NULL, 10);
}

/* A process in one word: pid 24 bits | start time 23 | free for its user 1 | pid namespace 16. The start time tells it
   from a later one with its pid, the namespace from one of another container. */
LORASYNCI_FN uint64_t lorasynci_process_self(void)
{
    struct stat st;
    int         ended;
    uint64_t    start = lorasynci_process_start("self", &ended), space = 0;
    if (stat("/proc/self/ns/pid", &st) == 0) space = ((uint64_t)st.st_ino ^ (uint64_t)st.st_ino >> 16) & 0xffff;
    return (uint64_t)(uint32_t)getpid() << 40 | (start & 0x7fffff) << 17 | space;
}

LORASYNCI_FN long lorasynci_process_pid(uint64_t process) { return (long)(process >> 40); }

/* 1 if the pid of one is known to be none in the namespace of the other. */
LORASYNCI_FN int lorasynci_process_is_foreign(uint64_t process, uint64_t self)
{
    uint64_t theirs = process & 0xffff, ours = self & 0xffff;
    return theirs && ours && theirs != ours;
}

/* 1 if /proc speaks of the pids that this process sees. In a container it may be another one's. */
LORASYNCI_FN int lorasynci_process_sees_own(void)
{
    char    text[24];
    ssize_t n = readlink("/proc/self", text, sizeof text - 1);
    if (n <= 0) return 0;
    text[n] = 0;
    return strtol(text, NULL, 10) == (long)getpid();
}

/* 1 if it is certain that a process has ended; a zombie that its parent has yet to collect has. Nothing is certain of
   those of other namespaces. */
LORASYNCI_FN int lorasynci_process_ended(uint64_t process, uint64_t self)
{
    char     which[24];
    int      ended;
    uint64_t then = process >> 17 & 0x7fffff, now;
    if (lorasynci_process_is_foreign(process, self)) return 0;
    if (kill((pid_t)lorasynci_process_pid(process), 0) != 0 && errno == ESRCH) return 1;
    if (!lorasynci_process_sees_own()) return 0;
    snprintf(which, sizeof which, "%ld", lorasynci_process_pid(process));
    now = lorasynci_process_start(which, &ended) & 0x7fffff;
    return ended || (then && now && then != now);
}

/* -------------------------------------------------------------------------------------------------------- >>json -- */

/* A small strict JSON reader (RFC 8259) that pulls values out of text in memory, and a writer. Uses >>support.

   The reader copies nothing and allocates nothing: a string comes back as a slice of the text, already checked;
   decoding it, when it holds escapes, never makes it longer. Reading an object:

       lorasynci_json_init(&j, text, num_bytes, err);
       LORASYNCI_TRY(lorasynci_json_object(&j));                  // takes the {
       while ((more = lorasynci_json_key(&j, &key)) > 0)          // takes ,  "key"  :     0 at the }, below 0 an error
           if (lorasynci_json_is(&key, "r")) LORASYNCI_TRY(lorasynci_json_uint(&j, &r));
           else LORASYNCI_TRY(lorasynci_json_skip(&j));           // every value must be read or skipped
       if (more < 0) return (lorasync_status)more;
       LORASYNCI_TRY(lorasynci_json_end(&j));                           // nothing but white space behind

   Arrays are the same with lorasynci_json_array and lorasynci_json_element. Every error is LORASYNC_E_FORMAT and says
   where. */

#define LORASYNCI_JSON_DEPTH 32 /* of nesting; adapter configs need 3 */

/*      begin            at                     end
          |---- read ----|----- not yet read ----|         fresh: at stands right behind a { or [, so no comma is due */
typedef struct lorasynci_json {
    const char     *begin, *at, *end;
    int             depth, fresh;
    lorasync_error *err;
} lorasynci_json;

/* A string between its quotes, or a number: checked, not decoded. */
typedef struct lorasynci_slice {
    const char *at;
    size_t      size;
    int         escaped; /* a string with backslashes: lorasynci_json_decode it. 0: the bytes are the value */
    int         real;    /* a number with a fraction or an exponent */
} lorasynci_slice;

LORASYNCI_FN void lorasynci_json_init(lorasynci_json *j, const char *text, size_t num_bytes, lorasync_error *err)
{
    j->begin = j->at = text;
    j->end           = text + num_bytes;
    j->depth = j->fresh = 0;
    j->err              = err;
}

/* Fails at a position; err may be NULL. */
LORASYNCI_FN lorasync_status lorasynci_json_fail(const lorasynci_json *j, const char *at, const char *why)
{
    const char *p, *line = j->begin;
    size_t      lines = 1;
    char        found[32];
    if (!j->err) return LORASYNC_E_FORMAT;
    for (p = j->begin; p < at; p++) {
        if (*p == '\n') {
            lines++;
            line = p + 1;
        }
    }
    if (at >= j->end) snprintf(found, sizeof found, "the end");
    else if (*at > ' ' && *at < 127) snprintf(found, sizeof found, "`%c`", *at);
    else snprintf(found, sizeof found, "byte 0x%02x", (unsigned)(unsigned char)*at);
    return lorasynci_fail(j->err, LORASYNC_E_FORMAT, "JSON error at byte %zu (line %zu, column %zu): %s; found %s",
                          (size_t)(at - j->begin), lines, (size_t)(at - line) + 1, why, found);
}

LORASYNCI_FN void lorasynci_json_space(lorasynci_json *j)
{
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\r' || *j->at == '\t')) j->at++;
}

/* What comes next: one of { [ " 0 (a number) t f n } ] or 0 for anything else. */
LORASYNCI_FN int lorasynci_json_peek(lorasynci_json *j)
{
    char c;
    lorasynci_json_space(j);
    c = j->at < j->end ? *j->at : '\0';
    if ((c >= '0' && c <= '9') || c == '-') return '0';
    return c && strchr("{[\"tfn}]", c) ? c : 0;
}

/* White space to the end, or an error. */
LORASYNCI_FN lorasync_status lorasynci_json_end(lorasynci_json *j)
{
    lorasynci_json_space(j);
    return j->at == j->end ? LORASYNC_OK : lorasynci_json_fail(j, j->at, "nothing may follow the value");
}

/* -- strings */

/* The bytes of the UTF-8 character at text (2 to 4, no surrogate, not overlong, at most U+10FFFF), or 0 when it is
   none. text < end. */
LORASYNCI_FN size_t lorasynci_utf8(const char *text, const char *end)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t               n, i, left = (size_t)(end - text);
    unsigned             low = 0x80, high = 0xBF; /* of the second byte */
    if (p[0] < 0xC2 || p[0] > 0xF4) return 0;
    n = p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    if (n > left) return 0;
    if (p[0] == 0xE0) low = 0xA0;
    if (p[0] == 0xED) high = 0x9F;
    if (p[0] == 0xF0) low = 0x90;
    if (p[0] == 0xF4) high = 0x8F;
    if (p[1] < low || p[1] > high) return 0;
    for (i = 2; i < n; i++)
        if (p[i] < 0x80 || p[i] > 0xBF) return 0;
    return n;
}

/* Four hex digits at p, or -1. */
LORASYNCI_FN long lorasynci_json_hex4(const char *p, const char *end)
{
    long value = 0;
    int  i;
    if (end - p < 4) return -1;
    for (i = 0; i < 4; i++) {
        char c = p[i];
        if (c >= '0' && c <= '9') value = value * 16 + (c - '0');
        else if (c >= 'a' && c <= 'f') value = value * 16 + (c - 'a' + 10);
        else if (c >= 'A' && c <= 'F') value = value * 16 + (c - 'A' + 10);
        else return -1;
    }
    return value;
}

/* The \uXXXX or pair of them at p (which points behind the first \u): its character, and where it ends. -1 for a
   malformed one. */
LORASYNCI_FN long lorasynci_json_unicode(const char *p, const char *end, const char **next)
{
    long high = lorasynci_json_hex4(p, end), low;
    *next     = p + 4;
    if (high < 0xD800 || high > 0xDFFF) return high;
    if (high > 0xDBFF || end - p < 10 || p[4] != '\\' || p[5] != 'u') return -1;
    low = lorasynci_json_hex4(p + 6, end);
    if (low < 0xDC00 || low > 0xDFFF) return -1;
    *next = p + 10;
    return 0x10000 + (high - 0xD800) * 0x400 + (low - 0xDC00);
}

/* The first byte from p on that is not plain inside a string: a quote, a backslash, a control character or no ASCII; or
   end. */
LORASYNCI_FN const char *lorasynci_json_plain(const char *p, const char *end)
{
    const uint64_t ones = UINT64_C(0x0101010101010101);
    while (end - p >= 8) { /* eight bytes at a time: (x - n * ones) & ~x has a top bit where a byte is below n */
        uint64_t x, quote, slash;
        memcpy(&x, p, 8);
        quote = x ^ (ones * '"');
        slash = x ^ (ones * '\\');
        if ((((quote - ones) & ~quote) | ((slash - ones) & ~slash) | ((x - ones * 0x20) & ~x) | x) & (ones * 0x80))
            break;
        p += 8;
    }
    while (p < end && (unsigned char)*p >= 0x20 && (unsigned char)*p < 0x80 && *p != '"' && *p != '\\') p++;
    return p;
}

/* Checks the escape at p and steps over it; NULL after an error. */
LORASYNCI_FN const char *lorasynci_json_escape(const lorasynci_json *j, const char *p)
{
    const char *next = p + 2;
    if (j->end - p >= 2 && p[1] && strchr("\"\\/bfnrt", p[1])) return next;
    if (j->end - p < 2 || p[1] != 'u') {
        lorasynci_json_fail(j, p + 1, "a backslash must be followed by one of \" \\ / b f n r t u");
        return NULL;
    }
    switch (lorasynci_json_unicode(p + 2, j->end, &next)) {
    case -1:
        lorasynci_json_fail(j, p + 2, "\\u needs four hex digits, and a surrogate needs its other half");
        return NULL;
    case 0: lorasynci_json_fail(j, p + 2, "\\u0000 is not accepted in a string"); return NULL;
    default: return next;
    }
}

/* Takes a string: its bytes are valid UTF-8 without control characters and its escapes are whole. */
LORASYNCI_FN lorasync_status lorasynci_json_string(lorasynci_json *j, lorasynci_slice *out)
{
    const char *p;
    size_t      n;
    lorasynci_json_space(j);
    if (j->at == j->end || *j->at != '"') return lorasynci_json_fail(j, j->at, "expected a string");
    p            = j->at + 1;
    out->at      = p;
    out->escaped = out->real = 0;
    for (;;) {
        p = lorasynci_json_plain(p, j->end);
        if (p == j->end) return lorasynci_json_fail(j, p, "a string is not closed");
        if (*p == '"') break;
        if (*p == '\\') {
            out->escaped = 1;
            p            = lorasynci_json_escape(j, p);
            if (!p) return LORASYNC_E_FORMAT;
        } else if ((unsigned char)*p < 0x20) {
            return lorasynci_json_fail(j, p, "control characters in a string must be escaped");
        } else {
            n = lorasynci_utf8(p, j->end);
            if (!n) return lorasynci_json_fail(j, p, "a string is not valid UTF-8");
            p += n;
        }
    }
    out->size = (size_t)(p - out->at);
    j->at     = p + 1;
    j->fresh  = 0;
    return LORASYNC_OK;
}

/* Writes a character as UTF-8 to out and returns its bytes. */
LORASYNCI_FN size_t lorasynci_put_utf8(long c, char *out)
{
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4, i;
    if (n == 1) {
        out[0] = (char)c;
        return 1;
    }
    for (i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(unsigned char)(0x80 | (c & 0x3F));
    out[0] = (char)(unsigned char)((0xF00 >> n) | c); /* 110, 1110 or 11110, then the bits that are left */
    return n;
}

/* Decodes a string into out (s->size bytes are enough; out may be s->at in writable text; no NUL is put). Returns the
   bytes. */
LORASYNCI_FN size_t lorasynci_json_decode(const lorasynci_slice *s, char *out)
{
    static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
    const char       *p = s->at, *end = s->at + s->size;
    char             *q = out;
    while (p < end) {
        if (*p != '\\') {
            *q++ = *p++;
        } else if (p[1] == 'u') {
            long c = lorasynci_json_unicode(p + 2, end, &p);
            q += lorasynci_put_utf8(c, q);
        } else {
            const char *special = strchr(from, p[1]);
            *q++                = special ? to[special - from] : p[1];
            p += 2;
        }
    }
    return (size_t)(q - out);
}

/* The decoded string with a NUL behind it, or NULL when there is no memory. */
LORASYNCI_FN char *lorasynci_json_copy(const lorasynci_slice *s, const lorasync_allocator *a)
{
    char *text = lorasynci_copy_text(a, s->at, s->size);
    if (text && s->escaped) text[lorasynci_json_decode(s, text)] = 0;
    return text;
}

/* 1 if the string is `text` (of at most 48 bytes). */
LORASYNCI_FN int lorasynci_json_is(const lorasynci_slice *s, const char *text)
{
    char   decoded[6 * 48]; /* an escape is at most six times as long as what it stands for */
    size_t n = strlen(text);
    if (!s->escaped) return s->size == n && memcmp(s->at, text, n) == 0;
    if (s->size > sizeof decoded) return 0;
    return lorasynci_json_decode(s, decoded) == n && memcmp(decoded, text, n) == 0;
}

/* -- objects and arrays */

LORASYNCI_FN lorasync_status lorasynci_json_bracket(lorasynci_json *j, char bracket)
{
    lorasynci_json_space(j);
    if (j->at == j->end || *j->at != bracket)
        return lorasynci_json_fail(j, j->at, bracket == '{' ? "expected an object" : "expected an array");
    if (j->depth == LORASYNCI_JSON_DEPTH) return lorasynci_json_fail(j, j->at, "nested deeper than 32 levels");
    j->at++;
    j->depth++;
    j->fresh = 1;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_json_object(lorasynci_json *j) { return lorasynci_json_bracket(j, '{'); }
LORASYNCI_FN lorasync_status lorasynci_json_array(lorasynci_json *j) { return lorasynci_json_bracket(j, '['); }

/* Takes the comma before the next member or element, or the closing bracket. 1: one follows. 0: closed. Below 0: an
   error. */
LORASYNCI_FN int lorasynci_json_more(lorasynci_json *j, char bracket, const char *why)
{
    lorasynci_json_space(j);
    if (j->at < j->end && *j->at == bracket) {
        j->at++;
        j->depth--;
        j->fresh = 0;
        return 0;
    }
    if (!j->fresh) {
        if (j->at == j->end || *j->at != ',') return (int)lorasynci_json_fail(j, j->at, why);
        j->at++;
    }
    j->fresh = 0;
    return 1;
}

/* In an array. 1: an element follows, read or skip it. 0: the array is closed. Below 0: an error. */
LORASYNCI_FN int lorasynci_json_element(lorasynci_json *j)
{
    return lorasynci_json_more(j, ']', "expected `,` or `]`");
}

/* In an object. 1: *key is the next key and its value follows. 0: the object is closed. Below 0: an error. */
LORASYNCI_FN int lorasynci_json_key(lorasynci_json *j, lorasynci_slice *key)
{
    int more = lorasynci_json_more(j, '}', "expected `,` or `}`");
    if (more <= 0) return more;
    lorasynci_json_space(j);
    if (j->at == j->end || *j->at != '"') return (int)lorasynci_json_fail(j, j->at, "expected a key in double quotes");
    LORASYNCI_TRY(lorasynci_json_string(j, key));
    lorasynci_json_space(j);
    if (j->at == j->end || *j->at != ':') return (int)lorasynci_json_fail(j, j->at, "expected `:`");
    j->at++;
    return 1;
}

/* -- numbers and words */

/* Takes a word such as true. */
LORASYNCI_FN lorasync_status lorasynci_json_word(lorasynci_json *j, const char *word, const char *why)
{
    size_t n = strlen(word);
    lorasynci_json_space(j);
    if ((size_t)(j->end - j->at) < n || memcmp(j->at, word, n) != 0) return lorasynci_json_fail(j, j->at, why);
    j->at += n;
    j->fresh = 0;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_json_null(lorasynci_json *j)
{
    return lorasynci_json_word(j, "null", "expected null");
}

LORASYNCI_FN lorasync_status lorasynci_json_bool(lorasynci_json *j, int *out)
{
    int value = lorasynci_json_peek(j) == 't';
    LORASYNCI_TRY(lorasynci_json_word(j, value ? "true" : "false", "expected true or false"));
    *out = value;
    return LORASYNC_OK;
}

LORASYNCI_FN const char *lorasynci_json_digits(const char *p, const char *end)
{
    while (p < end && *p >= '0' && *p <= '9') p++;
    return p;
}

/* Takes a number of any kind, by JSON's grammar: no plus sign, no leading zeros, digits on both sides of a point. */
LORASYNCI_FN lorasync_status lorasynci_json_number(lorasynci_json *j, lorasynci_slice *out)
{
    const char *p, *digits;
    lorasynci_json_space(j);
    out->at = p  = j->at;
    out->escaped = out->real = 0;
    if (p < j->end && *p == '-') p++;
    digits = p;
    p      = lorasynci_json_digits(p, j->end);
    if (p == digits) return lorasynci_json_fail(j, p, "expected a number");
    if (p - digits > 1 && *digits == '0') return lorasynci_json_fail(j, digits, "a number may not begin with 0");
    if (p < j->end && *p == '.') {
        out->real = 1;
        digits    = p + 1;
        p         = lorasynci_json_digits(digits, j->end);
        if (p == digits) return lorasynci_json_fail(j, p, "expected a digit behind the point");
    }
    if (p < j->end && (*p == 'e' || *p == 'E')) {
        out->real = 1;
        digits    = p + 1;
        if (digits < j->end && (*digits == '+' || *digits == '-')) digits++;
        p = lorasynci_json_digits(digits, j->end);
        if (p == digits) return lorasynci_json_fail(j, p, "expected a digit in the exponent");
    }
    out->size = (size_t)(p - out->at);
    j->at     = p;
    j->fresh  = 0;
    return LORASYNC_OK;
}

/* Takes an integer of 0 to 2^64 - 1. */
LORASYNCI_FN lorasync_status lorasynci_json_uint(lorasynci_json *j, uint64_t *out)
{
    const char *p, *start;
    uint64_t    value = 0;
    lorasynci_json_space(j);
    start = j->at;
    for (p = start; p < j->end && *p >= '0' && *p <= '9'; p++) {
        uint64_t digit = (uint64_t)(*p - '0');
        if (value > (UINT64_MAX - digit) / 10) return lorasynci_json_fail(j, start, "an integer does not fit 64 bits");
        value = value * 10 + digit;
    }
    if (p == start || (p - start > 1 && *start == '0') || (p < j->end && (*p == '.' || *p == 'e' || *p == 'E')))
        return lorasynci_json_fail(j, start, "expected an integer without sign, leading zero, fraction or exponent");
    *out     = value;
    j->at    = p;
    j->fresh = 0;
    return LORASYNC_OK;
}

/* Takes an integer of -2^63 to 2^63 - 1. */
LORASYNCI_FN lorasync_status lorasynci_json_int(lorasynci_json *j, int64_t *out)
{
    uint64_t    value;
    int         negative;
    const char *start;
    lorasynci_json_space(j);
    start    = j->at;
    negative = start < j->end && *start == '-';
    if (negative) j->at++;
    if (j->at == j->end || *j->at < '0' || *j->at > '9') return lorasynci_json_fail(j, start, "expected an integer");
    LORASYNCI_TRY(lorasynci_json_uint(j, &value));
    if (value > (uint64_t)INT64_MAX + (negative ? 1u : 0u))
        return lorasynci_json_fail(j, start, "an integer does not fit 64 bits");
    if (!negative) *out = (int64_t)value;
    else *out = value == 0 ? 0 : -(int64_t)(value - 1) - 1;
    return LORASYNC_OK;
}

/* Takes a number, rounded to the nearest double. Its point is moved into the exponent (1.25e3 becomes 125e1) because
   strtod expects the point of the locale. */
LORASYNCI_FN lorasync_status lorasynci_json_double(lorasynci_json *j, double *out)
{
    lorasynci_slice s;
    char            text[512];
    size_t          n        = 0, i;
    long            exponent = 0, written = 0;
    double          value;
    int             fraction = 0, negative = 0;
    LORASYNCI_TRY(lorasynci_json_number(j, &s));
    if (s.size > sizeof text - 32) return lorasynci_json_fail(j, s.at, "a number has too many digits");
    for (i = 0; i < s.size && s.at[i] != 'e' && s.at[i] != 'E'; i++) {
        if (s.at[i] == '.') {
            fraction = 1;
        } else {
            text[n++] = s.at[i];
            exponent -= fraction;
        }
    }
    if (i < s.size) {
        i++;
        negative = s.at[i] == '-';
        if (s.at[i] == '-' || s.at[i] == '+') i++;
    }
    for (; i < s.size; i++)
        if (written < 100000) written = written * 10 + (s.at[i] - '0');
    snprintf(text + n, sizeof text - n, "e%ld", exponent + (negative ? -written : written));
    value = strtod(text, NULL);
    if (value > 1.7976931348623157e308 || value < -1.7976931348623157e308)
        return lorasynci_json_fail(j, s.at, "a number does not fit a double");
    *out = value;
    return LORASYNC_OK;
}

/* Takes any value, checking all of it. */
LORASYNCI_FN lorasync_status lorasynci_json_skip(lorasynci_json *j)
{
    lorasynci_slice s;
    int             more;
    switch (lorasynci_json_peek(j)) {
    case '{':
        LORASYNCI_TRY(lorasynci_json_object(j));
        while ((more = lorasynci_json_key(j, &s)) > 0) LORASYNCI_TRY(lorasynci_json_skip(j));
        return (lorasync_status)more;
    case '[':
        LORASYNCI_TRY(lorasynci_json_array(j));
        while ((more = lorasynci_json_element(j)) > 0) LORASYNCI_TRY(lorasynci_json_skip(j));
        return (lorasync_status)more;
    case '"': return lorasynci_json_string(j, &s);
    case '0':
        if (j->end - j->at > 1 && j->at[0] == '-' && j->at[1] == 'I') break;
        return lorasynci_json_number(j, &s);
    case 't': return lorasynci_json_word(j, "true", "expected true");
    case 'f': return lorasynci_json_word(j, "false", "expected false");
    case 'n': return lorasynci_json_null(j);
    default: break;
    }
    if (j->at < j->end && (*j->at == 'N' || *j->at == 'I' || *j->at == '-'))
        return lorasynci_json_fail(j, j->at, "NaN and Infinity are no JSON, write a finite number or null");
    return lorasynci_json_fail(j, j->at, "expected a value");
}

/* -- writing */

/* The escape of c as \X or \u00xx. */
LORASYNCI_FN void lorasynci_json_put_escape(lorasynci_buffer *b, char c)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char       *special = c ? strchr(from, c) : NULL;
    if (special) lorasynci_put_format(b, "\\%c", to[special - from]);
    else lorasynci_put_format(b, "\\u%04x", (unsigned)(unsigned char)c);
}

/* Puts a quoted string (valid UTF-8) with no more escapes than JSON demands. */
LORASYNCI_FN void lorasynci_json_put_string(lorasynci_buffer *b, const char *text, size_t num_bytes)
{
    const char *p = text, *end = text + num_bytes;
    lorasynci_put(b, "\"", 1);
    while (p < end) {
        const char *next = p;
        while (next < end && (unsigned char)*next >= 0x20 && *next != '"' && *next != '\\') next++;
        lorasynci_put(b, p, (size_t)(next - p));
        p = next;
        if (p < end) lorasynci_json_put_escape(b, *p++);
    }
    lorasynci_put(b, "\"", 1);
}

/* The same in ASCII, as Python's json.dumps does: all but the printable ASCII characters are \u escapes, in pairs above
   U+FFFF. */
LORASYNCI_FN void lorasynci_json_put_ascii(lorasynci_buffer *b, const char *text, size_t num_bytes)
{
    const unsigned char *p = (const unsigned char *)text, *end = p + num_bytes;
    lorasynci_put(b, "\"", 1);
    while (p < end) {
        unsigned c = *p++, more = c < 0xC0 ? 0 : c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3;
        if (c < 0x80) {
            if (c < 0x20 || c > 0x7E || c == '"' || c == '\\') lorasynci_json_put_escape(b, (char)c);
            else lorasynci_put(b, p - 1, 1);
            continue;
        }
        c &= 0x3Fu >> more;
        for (; more && p < end; more--) c = c << 6 | (*p++ & 0x3Fu);
        if (c < 0x10000) lorasynci_put_format(b, "\\u%04x", c);
        else
            lorasynci_put_format(b, "\\u%04x\\u%04x", 0xD800 + ((c - 0x10000) >> 10), 0xDC00 + ((c - 0x10000) & 0x3FF));
    }
    lorasynci_put(b, "\"", 1);
}

/* 1 if strtod reads 0.digits * 10^point back as x. */
LORASYNCI_FN int lorasynci_reads_back(const char *digits, int point, double x)
{
    char   text[48];
    double y;
    snprintf(text, sizeof text, "%.20se%d", digits, point - (int)strlen(digits));
    y = strtod(text, NULL);
    return !(y < x) && !(y > x);
}

/* The fewest decimal digits that strtod reads back as x (finite, above 0): x = 0.digits * 10^point. Uses no decimal
   point, which would be the locale's. digits needs 24 bytes and ends in a NUL; returns how many there are. */
LORASYNCI_FN int lorasynci_shortest(double x, char *digits, int *point)
{
    char        text[48];
    const char *p;
    int         precision, n = 0;
    for (precision = 0; precision < 17; precision++) {
        snprintf(text, sizeof text, "%.*e", precision, x);
        for (p = text, n = 0; *p != 'e'; p++)
            if (*p >= '0' && *p <= '9') digits[n++] = *p;
        digits[n] = 0;
        *point    = (int)strtol(p + 1, NULL, 10) + 1;
        if (lorasynci_reads_back(digits, *point, x)) break;
        if (digits[n - 1] == '9') continue;
        digits[n - 1]++; /* the doubles above a power of two lie twice as far apart as those below: the next number up
                            may do */
        if (lorasynci_reads_back(digits, *point, x)) break;
    }
    return n;
}

/* Puts a finite double as Python's repr does: 0.05, 16.0, 1e-05, 1.5e+16. */
LORASYNCI_FN void lorasynci_json_put_double(lorasynci_buffer *b, double x)
{
    char digits[24];
    int  point = 1, n, i;
    if (x < 0 || (!(x > 0) && 1 / x < 0)) {
        lorasynci_put(b, "-", 1);
        x = -x;
    }
    strcpy(digits, "0");
    n = x > 0 ? lorasynci_shortest(x, digits, &point) : 1;
    if (point < -3 || point > 16) {
        lorasynci_put(b, digits, 1);
        if (n > 1) lorasynci_put(b, ".", 1);
        lorasynci_put(b, digits + 1, (size_t)(n - 1));
        lorasynci_put_format(b, "e%c%02d", point > 0 ? '+' : '-', point > 0 ? point - 1 : 1 - point);
        return;
    }
    if (point <= 0) lorasynci_put_text(b, "0.");
    for (i = point; i < 0; i++) lorasynci_put(b, "0", 1);
    for (i = 0; i < n || i < point; i++) {
        if (i == point && i > 0) lorasynci_put(b, ".", 1);
        lorasynci_put(b, i < n ? digits + i : "0", 1);
    }
    if (point >= n) lorasynci_put_text(b, ".0");
}

/* -- objects as a whole, and rewriting in Python's form */

/* One member of an object: its decoded key (in the list's own memory, NUL-terminated) and its value's text. */
typedef struct lorasynci_member {
    const char *key;
    const char *value;
    size_t      value_size;
} lorasynci_member;

/*     keys   [ alpha_pattern \0 r \0 ... ]      the decoded keys
       at     [ {key, value, size} ... ]         sorted by key */
typedef struct lorasynci_members {
    lorasynci_member  *at;
    size_t             num;
    char              *keys;
    lorasync_allocator a;
} lorasynci_members;

LORASYNCI_FN void lorasynci_members_free(lorasynci_members *m)
{
    lorasynci_dealloc(&m->a, m->at);
    lorasynci_dealloc(&m->a, m->keys);
    m->at   = NULL;
    m->keys = NULL;
    m->num  = 0;
}

LORASYNCI_FN int lorasynci_member_order(const void *a, const void *b)
{
    return strcmp(((const lorasynci_member *)a)->key, ((const lorasynci_member *)b)->key);
}

/* Counts the members of the object at j, and the bytes of their keys, without moving j. */
LORASYNCI_FN lorasync_status lorasynci_members_count(const lorasynci_json *j, size_t *num, size_t *num_bytes)
{
    lorasynci_json  ahead = *j;
    lorasynci_slice key;
    int             more;
    *num = *num_bytes = 0;
    LORASYNCI_TRY(lorasynci_json_object(&ahead));
    while ((more = lorasynci_json_key(&ahead, &key)) > 0) {
        LORASYNCI_TRY(lorasynci_json_skip(&ahead));
        (*num)++;
        *num_bytes += key.size + 1; /* both are in the text, the sum fits */
    }
    return (lorasync_status)more;
}

/* Points to the later value: sorting may have changed their order. */
LORASYNCI_FN lorasync_status lorasynci_fail_twice(const lorasynci_json *j, const lorasynci_member *a,
                                                  const lorasynci_member *b)
{
    char why[160];
    snprintf(why, sizeof why, "key \"%.100s\" occurs twice in one object", a->key);
    return lorasynci_json_fail(j, a->value > b->value ? a->value : b->value, why);
}

/* Reads the members of an object, sorted by key (Python's order too: UTF-8 sorts as its characters do). A key that
   occurs twice is refused. The values point into the text. Free with lorasynci_members_free, also after a failure. */
LORASYNCI_FN lorasync_status lorasynci_members_read(lorasynci_json *j, const lorasync_allocator *a,
                                                    lorasynci_members *out)
{
    lorasynci_slice key;
    size_t          num, num_bytes, i;
    char           *to;
    memset(out, 0, sizeof *out);
    out->a = *a;
    LORASYNCI_TRY(lorasynci_members_count(j, &num, &num_bytes));
    out->at   = (lorasynci_member *)lorasynci_alloc_array(a, num, sizeof *out->at);
    out->keys = (char *)lorasynci_alloc(a, num_bytes);
    if (!out->at || !out->keys) return lorasynci_fail_memory(j->err, num_bytes + num * sizeof *out->at);
    to = out->keys;
    LORASYNCI_TRY(lorasynci_json_object(j));
    while (lorasynci_json_key(j, &key) > 0) {
        lorasynci_member *m = &out->at[out->num++];
        m->key              = to;
        to += lorasynci_json_decode(&key, to);
        *to++ = 0;
        lorasynci_json_space(j);
        m->value = j->at;
        LORASYNCI_TRY(lorasynci_json_skip(j));
        m->value_size = (size_t)(j->at - m->value);
    }
    qsort(out->at, out->num, sizeof *out->at, lorasynci_member_order);
    for (i = 1; i < out->num; i++)
        if (strcmp(out->at[i - 1].key, out->at[i].key) == 0)
            return lorasynci_fail_twice(j, &out->at[i - 1], &out->at[i]);
    return LORASYNC_OK;
}

/* The value of a key, or NULL. */
LORASYNCI_FN const lorasynci_member *lorasynci_members_find(const lorasynci_members *m, const char *key)
{
    lorasynci_member wanted;
    memset(&wanted, 0, sizeof wanted);
    wanted.key = key;
    return m->num ? (const lorasynci_member *)bsearch(&wanted, m->at, m->num, sizeof *m->at, lorasynci_member_order)
                  : NULL;
}

LORASYNCI_FN void lorasynci_json_put_line(lorasynci_buffer *b, int level)
{
    /* 2 * (LORASYNCI_JSON_DEPTH + 1) */
    static const char spaces[] = "                                                                  ";
    lorasynci_put(b, "\n", 1);
    lorasynci_put(b, spaces, 2 * (size_t)level);
}

LORASYNCI_FN lorasync_status lorasynci_json_put_python(lorasynci_buffer *b, lorasynci_json *j, int level);

LORASYNCI_FN lorasync_status lorasynci_json_put_members(lorasynci_buffer *b, const lorasynci_json *j,
                                                        const lorasynci_members *m, int level)
{
    lorasync_status status;
    size_t          i;
    for (i = 0; i < m->num; i++) {
        lorasynci_json value = *j;
        value.at             = m->at[i].value;
        lorasynci_put_text(b, i ? "," : "{");
        lorasynci_json_put_line(b, level + 1);
        lorasynci_json_put_ascii(b, m->at[i].key, strlen(m->at[i].key));
        lorasynci_put_text(b, ": ");
        status = lorasynci_json_put_python(b, &value, level + 1);
        if (status < 0) lorasynci_prefix(j->err, "\"%.60s\"", m->at[i].key);
        LORASYNCI_TRY(status);
    }
    if (!m->num) lorasynci_put_text(b, "{");
    else lorasynci_json_put_line(b, level);
    lorasynci_put_text(b, "}");
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_json_put_elements(lorasynci_buffer *b, lorasynci_json *j, int level)
{
    size_t num = 0;
    int    more;
    LORASYNCI_TRY(lorasynci_json_array(j));
    lorasynci_put_text(b, "[");
    while ((more = lorasynci_json_element(j)) > 0) {
        if (num++) lorasynci_put_text(b, ",");
        lorasynci_json_put_line(b, level + 1);
        LORASYNCI_TRY(lorasynci_json_put_python(b, j, level + 1));
    }
    if (num) lorasynci_json_put_line(b, level);
    lorasynci_put_text(b, "]");
    return (lorasync_status)more;
}

/* Takes any value and puts it as Python's json.dumps(json.loads(text), indent=2, sort_keys=True) does inside `level`
   brackets. Integers keep all their digits; other numbers are read as doubles. Out of memory shows as b->failed
   only. */
LORASYNCI_FN lorasync_status lorasynci_json_put_python(lorasynci_buffer *b, lorasynci_json *j, int level)
{
    lorasynci_slice   s;
    lorasynci_members m;
    lorasync_status   status;
    lorasynci_json    again;
    const char       *start;
    double            real;
    char             *text;
    switch (lorasynci_json_peek(j)) {
    case '{':
        again  = *j;
        status = lorasynci_members_read(j, &b->a, &m);
        if (status >= 0) {
            again.depth++;
            status = lorasynci_json_put_members(b, &again, &m, level);
        }
        lorasynci_members_free(&m);
        return status;
    case '[': return lorasynci_json_put_elements(b, j, level);
    case '"':
        LORASYNCI_TRY(lorasynci_json_string(j, &s));
        text = lorasynci_json_copy(&s, &b->a);
        if (!text) return lorasynci_fail_memory(j->err, s.size + 1);
        lorasynci_json_put_ascii(b, text, strlen(text));
        lorasynci_dealloc(&b->a, text);
        return LORASYNC_OK;
    case '0':
        again = *j;
        LORASYNCI_TRY(lorasynci_json_number(j, &s));
        if (s.real) {
            LORASYNCI_TRY(lorasynci_json_double(&again, &real));
            lorasynci_json_put_double(b, real);
        } else if (s.size == 2 && memcmp(s.at, "-0", 2) == 0) {
            lorasynci_put_text(b, "0");
        } else {
            lorasynci_put(b, s.at, s.size);
        }
        return LORASYNC_OK;
    default: /* a word stays as it is */
        start = j->at;
        LORASYNCI_TRY(lorasynci_json_skip(j));
        lorasynci_put(b, start, (size_t)(j->at - start));
        return LORASYNC_OK;
    }
}

/* ------------------------------------------------------------------------------------------------------- >>dtype -- */

/* Sizes and names of element types, exact conversion between the five float types that adapters use, and the search for
   NaN and Inf.

   Everything goes through tiles of 64 elements in F32 bits, in L1:

       src --unpack, widen--> [ 64 x u32 ] --times scale--> [ 64 x u32 ] --round, pack--> dst

   The loops have a fixed length and no branch, so that compilers vectorise them at plain -O2; rounding and packing are
   separate loops because gcc makes poor code of both in one. Tiles with a value that overflows or is NaN take a slower
   loop. Rounding to F16 and F8 uses one float addition, whose result is rounded to nearest even: the mode that C
   programs start in. */

#define LORASYNCI_TILE 64
#define LORASYNCI_SHORT 16   /* runs of up to this many elements use loops of this length */
#define LORASYNCI_AHEAD 2048 /* bytes to prefetch ahead; a core then reads about as fast as memcpy */

#if defined(__GNUC__)
#define LORASYNCI_PREFETCH(address) __builtin_prefetch(address)
#else
#define LORASYNCI_PREFETCH(address) ((void)(address))
#endif

LORASYNC_API const char *lorasync_dtype_name(lorasync_dtype dtype)
{
    switch ((int)dtype) {
#define LORASYNC_X(name, value, text, bits)                                                                            \
    case value: return text;
        LORASYNC_DTYPE_LIST(LORASYNC_X)
#undef LORASYNC_X
    default: return NULL;
    }
}

LORASYNC_API int lorasync_dtype_bits(lorasync_dtype dtype)
{
    switch ((int)dtype) {
#define LORASYNC_X(name, value, text, bits)                                                                            \
    case value: return bits;
        LORASYNC_DTYPE_LIST(LORASYNC_X)
#undef LORASYNC_X
    default: return 0;
    }
}

LORASYNC_API lorasync_dtype lorasync_dtype_from_name(const char *name)
{
    if (!name) return LORASYNC_DTYPE_NONE;
#define LORASYNC_X(id, value, text, bits)                                                                              \
    if (strcmp(name, text) == 0) return id;
    LORASYNC_DTYPE_LIST(LORASYNC_X)
#undef LORASYNC_X
    return LORASYNC_DTYPE_NONE;
}

/* The types that are converted into one another. */
LORASYNCI_FN int lorasynci_is_float(lorasync_dtype dtype)
{
    return dtype == LORASYNC_F32 || dtype == LORASYNC_BF16 || dtype == LORASYNC_F16 || dtype == LORASYNC_F8_E4M3 ||
           dtype == LORASYNC_F8_E5M2;
}

LORASYNCI_FN int lorasynci_can_convert(lorasync_dtype src, lorasync_dtype dst)
{
    return (src == dst && lorasync_dtype_bits(src) != 0) || (lorasynci_is_float(src) && lorasynci_is_float(dst));
}

/* -- one element */

LORASYNCI_FN float lorasynci_bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

LORASYNCI_FN uint32_t lorasynci_float_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Codes narrower than 32 bits lie at the top of their word, so that all signs are in one place:

       f32  s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm        f16  s eeeee mmmmmmmmmm 0000000000000000
       bf16 s eeeeeeee mmmmmmm 0000000000000000        e4m3 s eeee mmm 000000000000000000000000

   A float type with fewer exponents than F32, as a list of constants:

       name  width  shift  normal  limit  over  nan
             |      |      |       |      |     a NaN, without sign
             |      |      |       |      the code of every magnitude of limit and above: Inf, or NaN where the type has
                                          no Inf
             |      |      |       F32 bits of the first value after the finite ones
             |      |      F32 bits of the smallest normal value
             |      mantissa bits that F32 has more
             bits                                                                                                     */
#define LORASYNCI_F16(X) X(f16, 16, 13, 0x38800000u, 0x47800000u, 0x7c00u, 0x7e00u)
#define LORASYNCI_E5M2(X) X(e5m2, 8, 21, 0x38800000u, 0x47800000u, 0x7cu, 0x7fu)
#define LORASYNCI_E4M3(X) X(e4m3, 8, 20, 0x3c800000u, 0x43f00000u, 0x7fu, 0x7fu)

/* All ones where a < b, both below 2^31: SSE2 compares signed only. */
LORASYNCI_FN uint32_t lorasynci_less(uint32_t a, uint32_t b) { return (uint32_t) - (int32_t)((int32_t)a < (int32_t)b); }

/* Adding half a unit less one, and the lowest kept bit, rounds to nearest even; a carry walks into the exponent, up to
   Inf. The lower half of the result is rubbish. */
LORASYNCI_FN uint32_t lorasynci_round_bf16(uint32_t u)
{
    uint32_t is_nan  = lorasynci_less(0x7f800000u, u & 0x7fffffffu);
    uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return (rounded & ~is_nan) | (0x7fc00000u & is_nan);
}

/* The code of a magnitude below the limit. In its sum with the power of two that is 2^shift times its own (its exponent
   taken as that of the smallest normal value where it is below) the last place is the last place of the smaller type:
   the addition rounds there.

       bits of sum - bits of power   the rounded mantissa with its leading one, as an integer
       + above >> shift              the exponent in its place, counted from that of the smallest normal value        */
LORASYNCI_FN uint32_t lorasynci_round_small(uint32_t magnitude, int shift, uint32_t normal)
{
    uint32_t above = (magnitude - normal) & ~lorasynci_less(magnitude, normal) & 0x7f800000u;
    uint32_t power = above + normal + ((uint32_t)shift << 23);
    uint32_t sum   = lorasynci_float_to_bits(lorasynci_bits_to_float(magnitude) + lorasynci_bits_to_float(power));
    return sum - power + (above >> shift);
}

/* The way back, exact: the mantissa and exponent of a code, in the place of F32's mantissa and the exponent bits above,
   to F32 bits. `special` is the first such pattern that is Inf or NaN. */
LORASYNCI_FN uint32_t lorasynci_widen_small(uint32_t bits, uint32_t normal, uint32_t special)
{
    uint32_t is_tiny = lorasynci_less(bits, 0x00800000u);
    float    tiny    = lorasynci_bits_to_float(normal | (bits & is_tiny)) - lorasynci_bits_to_float(normal);
    uint32_t finite  = (lorasynci_float_to_bits(tiny) & is_tiny) | ((bits + (normal - 0x00800000u)) & ~is_tiny);
    return finite | (0x7f800000u & ~lorasynci_less(bits, special));
}

/* -- one tile. What lies in it behind the n-th element is computed along and ignored. */

#define LORASYNCI_EACH(n, i, statement)                                                                                \
    do {                                                                                                               \
        int i;                                                                                                         \
        if ((n) <= LORASYNCI_SHORT) {                                                                                  \
            for (i = 0; i < LORASYNCI_SHORT; i++) statement;                                                           \
        } else {                                                                                                       \
            for (i = 0; i < LORASYNCI_TILE; i++) statement;                                                            \
        }                                                                                                              \
    } while (0)

/* Copies n elements into a tile, or out of one. A full tile has a constant size, which compilers turn into plain loads
   and stores. */
#define LORASYNCI_COPY(dst, src, n, element_size)                                                                      \
    do {                                                                                                               \
        if ((n) == LORASYNCI_TILE) memcpy(dst, src, (size_t)LORASYNCI_TILE *(element_size));                           \
        else memcpy(dst, src, (n) * (element_size));                                                                   \
    } while (0)

#define LORASYNCI_SMALL_TILES(name, width, shift, normal, limit, over, nan)                                            \
    LORASYNCI_FN uint32_t lorasynci_round_special_##name(uint32_t magnitude)                                           \
    {                                                                                                                  \
        if (magnitude < limit) return lorasynci_round_small(magnitude, shift, normal);                                 \
        return magnitude > 0x7f800000u ? nan : over;                                                                   \
    }                                                                                                                  \
    LORASYNCI_FN void lorasynci_round_tile_##name(uint32_t *tile, size_t n)                                            \
    {                                                                                                                  \
        uint32_t any = 0;                                                                                              \
        LORASYNCI_EACH(n, i, any |= (tile[i] & 0x7fffffffu) + (0x80000000u - limit));                                  \
        if (any & 0x80000000u)                                                                                         \
            LORASYNCI_EACH(n, i,                                                                                       \
                           tile[i] = (tile[i] & 0x80000000u) |                                                         \
                                     (lorasynci_round_special_##name(tile[i] & 0x7fffffffu) << (32 - width)));         \
        else                                                                                                           \
            LORASYNCI_EACH(n, i,                                                                                       \
                           tile[i] = (tile[i] & 0x80000000u) |                                                         \
                                     (lorasynci_round_small(tile[i] & 0x7fffffffu, shift, normal) << (32 - width)));   \
    }                                                                                                                  \
    LORASYNCI_FN void lorasynci_widen_tile_##name(uint32_t *tile, size_t n)                                            \
    {                                                                                                                  \
        LORASYNCI_EACH(                                                                                                \
            n, i,                                                                                                      \
            tile[i] = (tile[i] & 0x80000000u) |                                                                        \
                      lorasynci_widen_small((tile[i] & 0x7fffffffu) >> (32 - width - shift), normal, over << shift));  \
    }

LORASYNCI_F16(LORASYNCI_SMALL_TILES)
LORASYNCI_E5M2(LORASYNCI_SMALL_TILES)
LORASYNCI_E4M3(LORASYNCI_SMALL_TILES)

LORASYNCI_FN void lorasynci_load_tile(uint32_t *tile, const unsigned char *src, lorasync_dtype dtype, size_t n)
{
    uint16_t half[LORASYNCI_TILE];
    uint8_t  byte[LORASYNCI_TILE];
    switch (lorasync_dtype_bits(dtype)) {
    case 32:
        if (n < LORASYNCI_TILE) memset(tile, 0, LORASYNCI_TILE * 4);
        LORASYNCI_COPY(tile, src, n, 4);
        break;
    case 16:
        if (n < LORASYNCI_TILE) memset(half, 0, sizeof half);
        LORASYNCI_COPY(half, src, n, 2);
        LORASYNCI_EACH(n, i, tile[i] = (uint32_t)half[i] << 16); /* which is all that bf16 needs */
        if (dtype == LORASYNC_F16) lorasynci_widen_tile_f16(tile, n);
        break;
    default:
        if (n < LORASYNCI_TILE) memset(byte, 0, sizeof byte);
        LORASYNCI_COPY(byte, src, n, 1);
        LORASYNCI_EACH(n, i, tile[i] = (uint32_t)byte[i] << 24);
        if (dtype == LORASYNC_F8_E4M3) lorasynci_widen_tile_e4m3(tile, n);
        else lorasynci_widen_tile_e5m2(tile, n);
    }
}

LORASYNCI_FN void lorasynci_store_tile(unsigned char *dst, uint32_t *tile, lorasync_dtype dtype, size_t n)
{
    uint16_t half[LORASYNCI_TILE];
    uint8_t  byte[LORASYNCI_TILE];
    switch (lorasync_dtype_bits(dtype)) {
    case 32: LORASYNCI_COPY(dst, tile, n, 4); break;
    case 16:
        if (dtype == LORASYNC_F16) lorasynci_round_tile_f16(tile, n);
        else LORASYNCI_EACH(n, i, tile[i] = lorasynci_round_bf16(tile[i]));
        LORASYNCI_EACH(n, i, half[i] = (uint16_t)(tile[i] >> 16));
        LORASYNCI_COPY(dst, half, n, 2);
        break;
    default:
        if (dtype == LORASYNC_F8_E4M3) lorasynci_round_tile_e4m3(tile, n);
        else lorasynci_round_tile_e5m2(tile, n);
        LORASYNCI_EACH(n, i, byte[i] = (uint8_t)(tile[i] >> 24));
        LORASYNCI_COPY(dst, byte, n, 1);
    }
}

LORASYNCI_FN void lorasynci_scale_tile(uint32_t *tile, size_t n, float scale)
{
    LORASYNCI_EACH(n, i, tile[i] = lorasynci_float_to_bits(lorasynci_bits_to_float(tile[i]) * scale));
}

/* -- any number of elements */

/* Bytes of n elements that fill whole bytes; the product fits because the elements are in memory. */
LORASYNCI_FN size_t lorasynci_dtype_bytes(lorasync_dtype dtype, size_t n)
{
    size_t bits = (size_t)lorasync_dtype_bits(dtype);
    return n / 8 * bits + n % 8 * bits / 8;
}

/* The tile that will be worked on some tiles later, be it part of the array or not: a prefetch of any address is
   harmless. Lines of narrow elements are asked for more than once, which costs nothing. */
LORASYNCI_FN void lorasynci_prefetch(const unsigned char *p)
{
    int i;
    for (i = 0; i < LORASYNCI_TILE * 4; i += 64)
        LORASYNCI_PREFETCH((const void *)((uintptr_t)p + LORASYNCI_AHEAD + (uintptr_t)i));
}

/* The conversion that nearly every sync is made of, with AVX2 where the CPU has it: twice as fast as what compilers
   make for any x86-64. */
#if defined(__GNUC__) && defined(__x86_64__) && !defined(__CUDACC__)
#define LORASYNCI_HAS_AVX2() __builtin_cpu_supports("avx2")
#define LORASYNCI_AVX2 __attribute__((target("avx2")))

/* lorasynci_round_bf16 of 8 elements, shifted down so that packing with signed saturation keeps the bits. */
LORASYNCI_AVX2 LORASYNCI_FN __m256i lorasynci_round_bf16_avx2(const unsigned char *src)
{
    __m256i u = _mm256_loadu_si256((const __m256i *)(const void *)src);
    __m256i is_nan =
        _mm256_cmpgt_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff)), _mm256_set1_epi32(0x7f800000));
    __m256i odd     = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_srai_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
}

/* Converts as many whole tiles as there are; returns the elements done. */
LORASYNCI_AVX2 LORASYNCI_FN size_t lorasynci_f32_to_bf16_avx2(unsigned char *dst, const unsigned char *src, size_t n)
{
    size_t done, i;
    for (done = 0; n - done >= LORASYNCI_TILE;
         done += LORASYNCI_TILE, src += LORASYNCI_TILE * 4, dst += LORASYNCI_TILE * 2) {
        lorasynci_prefetch(src);
        lorasynci_prefetch(dst);
        for (i = 0; i < LORASYNCI_TILE; i += 16) {
            __m256i both =
                _mm256_packs_epi32(lorasynci_round_bf16_avx2(src + i * 4), lorasynci_round_bf16_avx2(src + i * 4 + 32));
            _mm256_storeu_si256((__m256i *)(void *)(dst + i * 2),
                                _mm256_permute4x64_epi64(both, 0xd8)); /* packing works on 128-bit halves */
        }
    }
    return done;
}
#endif

/* n contiguous elements, any alignment, no overlap. The pair of types has passed lorasynci_can_convert; a scale other
   than 1 needs float types. The scale is applied in F32, before the only rounding. */
LORASYNCI_FN void lorasynci_convert(void *dst, lorasync_dtype dst_dtype, const void *src, lorasync_dtype src_dtype,
                                    size_t n, float scale)
{
    uint32_t             tile[LORASYNCI_TILE];
    unsigned char       *to   = (unsigned char *)dst;
    const unsigned char *from = (const unsigned char *)src;
    size_t dst_size = lorasynci_dtype_bytes(dst_dtype, 1), src_size = lorasynci_dtype_bytes(src_dtype, 1), m;
    int    scaled = lorasynci_float_to_bits(scale) != 0x3f800000u; /* not exactly 1 */
    if (src_dtype == dst_dtype && !scaled) {
        m = lorasynci_dtype_bytes(src_dtype, n);
        if (m) memcpy(to, from, m);
        return;
    }
#if defined(LORASYNCI_AVX2)
    if (src_dtype == LORASYNC_F32 && dst_dtype == LORASYNC_BF16 && !scaled && n >= LORASYNCI_TILE &&
        LORASYNCI_HAS_AVX2()) {
        m = lorasynci_f32_to_bf16_avx2(to, from, n);
        n -= m, to += m * dst_size, from += m * src_size;
    }
#endif
    for (; n > 0; n -= m, to += m * dst_size, from += m * src_size) {
        m = n < LORASYNCI_TILE ? n : LORASYNCI_TILE;
        lorasynci_prefetch(from);
        lorasynci_prefetch(to);
        lorasynci_load_tile(tile, from, src_dtype, m);
        if (scaled) lorasynci_scale_tile(tile, m, scale);
        lorasynci_store_tile(to, tile, dst_dtype, m);
    }
}

LORASYNC_API lorasync_status lorasync_convert(void *dst, lorasync_dtype dst_dtype, const void *src,
                                              lorasync_dtype src_dtype, size_t num_elements, lorasync_error *err)
{
    const char *from = lorasync_dtype_name(src_dtype), *to = lorasync_dtype_name(dst_dtype);
    if (!lorasynci_can_convert(src_dtype, dst_dtype))
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "cannot convert %s (%d) to %s (%d): only F32, F16, BF16, F8_E4M3 and F8_E5M2 are converted into one "
            "another; pass equal types to copy",
            from ? from : "no dtype", (int)src_dtype, to ? to : "no dtype", (int)dst_dtype);
    if (num_elements % 8 * (size_t)lorasync_dtype_bits(src_dtype) % 8 != 0)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "cannot copy %zu elements of %s: they end inside a byte; pass an even number of bytes' worth", num_elements,
            from);
    if ((!dst || !src) && num_elements)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_convert: %s is NULL with %zu elements to convert",
                              dst ? "src" : "dst", num_elements);
    lorasynci_convert(dst, dst_dtype, src, src_dtype, num_elements, 1.0f);
    return LORASYNC_OK;
}

/* -- NaN and Inf */

/* An element is not finite when its exponent is all ones (e4m3: all bits but the sign). Adding one unit of the exponent
   then carries into the sign bit, which was masked off; no carry leaves the element, so all elements of a 64-bit word
   are tested at once:

       F16   s eeeee mmmmmmmmmm   & 0 11111 1111111111   + 0 00001 0000000000   -> 1..... when eeeee is 11111         */
typedef struct lorasynci_finite_rule {
    uint64_t without_sign, unit, sign;
} lorasynci_finite_rule;

/* 0 for a type that has no NaN and Inf, or whose values are never looked at. */
LORASYNCI_FN int lorasynci_finite_rule_of(lorasync_dtype dtype, lorasynci_finite_rule *out)
{
    uint64_t lanes, unit; /* a 1 in the lowest bit of every element; the unit of one element */
    int      bits = lorasync_dtype_bits(dtype);
    switch ((int)dtype) {
    case LORASYNC_F64: lanes = 1, unit = UINT64_C(1) << 52; break;
    case LORASYNC_F32: lanes = UINT64_C(0x0000000100000001), unit = 0x00800000; break;
    case LORASYNC_BF16: lanes = UINT64_C(0x0001000100010001), unit = 0x0080; break;
    case LORASYNC_F16: lanes = UINT64_C(0x0001000100010001), unit = 0x0400; break;
    case LORASYNC_F8_E5M2: lanes = UINT64_C(0x0101010101010101), unit = 0x04; break;
    case LORASYNC_F8_E4M3: lanes = UINT64_C(0x0101010101010101), unit = 0x01; break;
    default: return 0;
    }
    out->sign         = lanes << (bits - 1);
    out->without_sign = ~out->sign;
    out->unit         = lanes * unit;
    return 1;
}

#if defined(LORASYNCI_AVX2)
LORASYNCI_AVX2 LORASYNCI_FN __m256i lorasynci_finite_add_avx2(const unsigned char *p, __m256i without_sign,
                                                              __m256i unit)
{
    return _mm256_add_epi64(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)p), without_sign), unit);
}

/* Bytes at the front, in blocks of 256, without such an element. */
LORASYNCI_AVX2 LORASYNCI_FN size_t lorasynci_finite_bytes_avx2(const unsigned char         *p,
                                                               const lorasynci_finite_rule *rule, size_t num_bytes)
{
    __m256i mask = _mm256_set1_epi64x((long long)rule->without_sign), unit = _mm256_set1_epi64x((long long)rule->unit);
    __m256i sign = _mm256_set1_epi64x((long long)rule->sign), any = _mm256_setzero_si256();
    size_t  done, i;
    for (done = 0; num_bytes - done >= 256; done += 256, p += 256) {
        for (i = 0; i < 256; i += 128) {
            any = _mm256_or_si256(any, lorasynci_finite_add_avx2(p + i, mask, unit));
            any = _mm256_or_si256(any, lorasynci_finite_add_avx2(p + i + 32, mask, unit));
            any = _mm256_or_si256(any, lorasynci_finite_add_avx2(p + i + 64, mask, unit));
            any = _mm256_or_si256(any, lorasynci_finite_add_avx2(p + i + 96, mask, unit));
        }
        if (!_mm256_testz_si256(any, sign)) break;
    }
    return done;
}
#endif

/* The index of the first element that is NaN or Inf, or SIZE_MAX. Only the float types and F64 have such elements. */
LORASYNCI_FN size_t lorasynci_find_nonfinite(const void *data, lorasync_dtype dtype, size_t n)
{
    const unsigned char  *p = (const unsigned char *)data;
    lorasynci_finite_rule rule;
    uint64_t              words[32], any;
    size_t                size = (size_t)lorasync_dtype_bits(dtype) / 8, left, m, i;
    if (!lorasynci_finite_rule_of(dtype, &rule)) return SIZE_MAX;
    left = n * size;
#if defined(LORASYNCI_AVX2)
    if (left >= 256 && LORASYNCI_HAS_AVX2()) {
        m = lorasynci_finite_bytes_avx2(p, &rule, left);
        left -= m, p += m;
    }
#endif
    for (; left > 0; left -= m, p += m) {
        m = left < sizeof words ? left : sizeof words;
        if (m == sizeof words) {
            memcpy(words, p, sizeof words); /* a constant size: plain loads */
        } else {
            memset(words, 0, sizeof words);
            memcpy(words, p, m);
        }
        for (i = 0, any = 0; i < LORASYNCI_COUNT(words); i++) any |= (words[i] & rule.without_sign) + rule.unit;
        if (any & rule.sign) break;
    }
    for (; left > 0; left -= size, p += size) { /* the words before p are clean */
        words[0] = 0;
        memcpy(words, p, size);
        if (((words[0] & rule.without_sign) + rule.unit) & rule.sign) return n - left / size;
    }
    return SIZE_MAX;
}
/* ------------------------------------------------------------------------------------------------------- >>names -- */

/* Parameter names, patterns, and the filter made of both. Relies on >>support only.

   A name is cut into segments at its dots and never looked at any other way:

       module . base_model.model . model.layers.0.q_proj . _orig_mod . lora_A . policy . weight
       '-dropped'   '-dropped      '------ module ------'  '-dropped    leaf    adapter  parameter
                                   key = base_model.model. + module + leaf + parameter
*/

LORASYNC_API const char *lorasync_role_text(lorasync_role role)
{
    switch ((int)role) {
    case LORASYNC_ROLE_BASE: return "base";
    case LORASYNC_ROLE_LORA_A: return "lora_A";
    case LORASYNC_ROLE_LORA_B: return "lora_B";
    case LORASYNC_ROLE_LORA_B_BIAS: return "lora_B.bias";
    case LORASYNC_ROLE_EMBEDDING_A: return "lora_embedding_A";
    case LORASYNC_ROLE_EMBEDDING_B: return "lora_embedding_B";
    case LORASYNC_ROLE_MAGNITUDE: return "lora_magnitude_vector";
    case LORASYNC_ROLE_MODULES_TO_SAVE: return "modules_to_save";
    case LORASYNC_ROLE_TRAINABLE_TOKENS: return "trainable_tokens_delta";
    default: return "unknown role";
    }
}

/* -- segments */

typedef struct lorasynci_segment {
    const char *text;
    size_t      size;
} lorasynci_segment;

typedef struct lorasynci_path {
    const char       *raw;
    size_t            num;
    lorasynci_segment seg[LORASYNC_MAX_NAME / 2]; /* no segment is empty, so there cannot be more */
} lorasynci_path;

LORASYNCI_FN int lorasynci_segment_is(lorasynci_segment s, const char *text)
{
    return s.size == strlen(text) && memcmp(s.text, text, s.size) == 0;
}

LORASYNCI_FN int lorasynci_segment_begins(lorasynci_segment s, const char *text)
{
    size_t n = strlen(text);
    return s.size >= n && memcmp(s.text, text, n) == 0;
}

LORASYNCI_FN lorasync_status lorasynci_path_split(const char *raw, lorasynci_path *p, lorasync_error *err)
{
    const char *end = (const char *)memchr(raw, 0, LORASYNC_MAX_NAME), *at = raw;
    if (!end)
        return lorasynci_fail(err, LORASYNC_E_NAME, "parameter name \"%.120s...\" has %d bytes or more: shorten it",
                              raw, LORASYNC_MAX_NAME);
    p->raw = raw;
    p->num = 0;
    for (;;) {
        const char *dot = (const char *)memchr(at, '.', (size_t)(end - at));
        const char *to  = dot ? dot : end;
        if (to == at)
            return lorasynci_fail(err, LORASYNC_E_NAME, "parameter name \"%.300s\" has an empty segment at byte %d",
                                  raw, (int)(at - raw));
        p->seg[p->num].text   = at;
        p->seg[p->num++].size = (size_t)(to - at);
        if (!dot) return LORASYNC_OK;
        at = dot + 1;
    }
}

/* Takes out num segments at `at`. */
LORASYNCI_FN void lorasynci_path_cut(lorasynci_path *p, size_t at, size_t num)
{
    memmove(p->seg + at, p->seg + at + num, (p->num - at - num) * sizeof p->seg[0]);
    p->num -= num;
}

LORASYNCI_FN int lorasynci_is_wrapper(lorasynci_segment s)
{
    return lorasynci_segment_is(s, "_fsdp_wrapped_module") || lorasynci_segment_is(s, "_checkpoint_wrapped_module") ||
           lorasynci_segment_is(s, "_orig_mod") || lorasynci_segment_is(s, "to_wrap");
}

LORASYNCI_FN lorasync_status lorasynci_path_unwrap(lorasynci_path *p, lorasync_error *err)
{
    size_t i = 0;
    while (i < p->num) {
        if (lorasynci_is_wrapper(p->seg[i])) lorasynci_path_cut(p, i, 1);
        else i++;
    }
    while (p->num > 1 && lorasynci_segment_is(p->seg[0], "module")) lorasynci_path_cut(p, 0, 1);
    if (p->num > 2 && lorasynci_segment_is(p->seg[0], "base_model") && lorasynci_segment_is(p->seg[1], "model"))
        lorasynci_path_cut(p, 0, 2);
    if (p->num == 0)
        return lorasynci_fail(err, LORASYNC_E_NAME,
                              "parameter name \"%.300s\" has only wrapper segments: pass the whole name", p->raw);
    return LORASYNC_OK;
}

/* Appends segments from..to-1 to `out`, which has LORASYNC_MAX_NAME bytes, with dots. */
LORASYNCI_FN lorasync_status lorasynci_path_join(const lorasynci_path *p, size_t from, size_t to, char *out,
                                                 lorasync_error *err)
{
    size_t used = strlen(out), i;
    for (i = from; i < to; i++) {
        size_t dot = used ? 1 : 0;
        if (p->seg[i].size >= LORASYNC_MAX_NAME - used - dot)
            return lorasynci_fail(err, LORASYNC_E_NAME,
                                  "the key of parameter name \"%.120s...\" would have %d bytes or more: shorten it",
                                  p->raw, LORASYNC_MAX_NAME);
        if (dot) out[used++] = '.';
        memcpy(out + used, p->seg[i].text, p->seg[i].size);
        used += p->seg[i].size;
        out[used] = 0;
    }
    return LORASYNC_OK;
}

/* -- names */

typedef struct lorasynci_leaf {
    const char   *text;
    lorasync_role role;
    int           keeps_parameter; /* the file key ends in .weight or .bias, else in the leaf itself */
} lorasynci_leaf;

LORASYNCI_FN const lorasynci_leaf *lorasynci_leaf_of(lorasynci_segment s)
{
    static const lorasynci_leaf leaves[] = {
        {"lora_A", LORASYNC_ROLE_LORA_A, 1},
        {"lora_B", LORASYNC_ROLE_LORA_B, 1},
        {"lora_embedding_A", LORASYNC_ROLE_EMBEDDING_A, 0},
        {"lora_embedding_B", LORASYNC_ROLE_EMBEDDING_B, 0},
        {"lora_magnitude_vector", LORASYNC_ROLE_MAGNITUDE, 0},
        {"trainable_tokens_delta", LORASYNC_ROLE_TRAINABLE_TOKENS, 0},
    };
    size_t i;
    for (i = 0; i < LORASYNCI_COUNT(leaves); i++)
        if (lorasynci_segment_is(s, leaves[i].text)) return &leaves[i];
    return NULL;
}

LORASYNCI_FN int lorasynci_is_parameter(lorasynci_segment s)
{
    return lorasynci_segment_is(s, "weight") || lorasynci_segment_is(s, "bias");
}

/* What stands behind the leaf:    leaf.adapter.parameter    leaf.adapter    leaf.parameter    leaf */
typedef struct lorasynci_tail {
    const lorasynci_leaf *leaf;
    size_t                at;        /* segment of the leaf */
    size_t                adapter;   /* segment, or 0: none (a leaf is never before segment 0) */
    size_t                parameter; /* segment, or 0: none */
} lorasynci_tail;

/* Finds the leaf; 0 if there is none. The outermost place wins, so that an adapter may be called like a leaf. */
LORASYNCI_FN int lorasynci_find_tail(const lorasynci_path *p, lorasynci_tail *t)
{
    size_t behind = 3, last = p->num - 1; /* segments behind the leaf: 2, 1, 0 */
    while (behind-- > 0) {
        int parameter;
        if (last < behind) continue;
        t->at   = last - behind;
        t->leaf = lorasynci_leaf_of(p->seg[t->at]);
        if (!t->leaf) continue;
        parameter = lorasynci_is_parameter(p->seg[last]);
        if (behind == 2 && !parameter) continue;
        t->adapter   = behind == 2 ? last - 1 : behind == 1 && !parameter ? last : 0;
        t->parameter = behind > 0 && parameter ? last : 0;
        return 1;
    }
    return 0;
}

LORASYNCI_FN lorasync_status lorasynci_fail_no_module(const lorasynci_path *p, lorasync_error *err)
{
    return lorasynci_fail(err, LORASYNC_E_NAME,
                          "parameter name \"%.300s\" names no module: pass it from the root of the model", p->raw);
}

/* The module is where the adapter sits: base_layer and token_adapter are PEFT's own levels below it. */
LORASYNCI_FN lorasync_status lorasynci_tail_module(const lorasynci_path *p, size_t to, char *out, lorasync_error *err)
{
    size_t i;
    for (i = 0; i < to; i++) {
        if (lorasynci_segment_is(p->seg[i], "base_layer")) continue;
        if (i + 1 == to && lorasynci_segment_is(p->seg[i], "token_adapter")) continue;
        LORASYNCI_TRY(lorasynci_path_join(p, i, i + 1, out, err));
    }
    return out[0] ? LORASYNC_OK : lorasynci_fail_no_module(p, err);
}

LORASYNCI_FN lorasync_status lorasynci_name_from_tail(const lorasynci_path *p, const lorasynci_tail *t,
                                                      lorasync_name *n, lorasync_error *err)
{
    n->role = t->leaf->role;
    if (t->parameter && lorasynci_segment_is(p->seg[t->parameter], "bias")) {
        if (n->role != LORASYNC_ROLE_LORA_B)
            return lorasynci_fail(err, LORASYNC_E_NAME,
                                  "parameter name \"%.300s\": %s has no bias, only lora_B has one", p->raw,
                                  t->leaf->text);
        n->role = LORASYNC_ROLE_LORA_B_BIAS;
    }
    LORASYNCI_TRY(lorasynci_tail_module(p, t->at, n->module, err));
    if (t->adapter) LORASYNCI_TRY(lorasynci_path_join(p, t->adapter, t->adapter + 1, n->adapter, err));
    memcpy(n->key, "base_model.model", sizeof "base_model.model");
    LORASYNCI_TRY(lorasynci_path_join(p, 0, t->at + 1, n->key, err));
    if (t->parameter && t->leaf->keeps_parameter)
        return lorasynci_path_join(p, t->parameter, t->parameter + 1, n->key, err);
    return LORASYNC_OK;
}

/* `at` is the segment modules_to_save:  module.modules_to_save.adapter.rest -> module.rest */
LORASYNCI_FN lorasync_status lorasynci_name_from_saved(const lorasynci_path *p, size_t at, lorasync_name *n,
                                                       lorasync_error *err)
{
    if (at == 0) return lorasynci_fail_no_module(p, err);
    if (at + 2 >= p->num)
        return lorasynci_fail(err, LORASYNC_E_NAME,
                              "parameter name \"%.300s\": expected modules_to_save.<adapter>.<parameter>", p->raw);
    n->role = LORASYNC_ROLE_MODULES_TO_SAVE;
    LORASYNCI_TRY(lorasynci_path_join(p, 0, at, n->module, err));
    LORASYNCI_TRY(lorasynci_path_join(p, at + 1, at + 2, n->adapter, err));
    memcpy(n->key, "base_model.model", sizeof "base_model.model");
    LORASYNCI_TRY(lorasynci_path_join(p, 0, at, n->key, err));
    return lorasynci_path_join(p, at + 2, p->num, n->key, err);
}

LORASYNCI_FN int lorasynci_is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

/* The segment that looks like an adapter leaf in a name that has no known tail; p->num if there is none. */
LORASYNCI_FN size_t lorasynci_unknown_leaf(const lorasynci_path *p)
{
    size_t i, n = p->num;
    for (i = 0; i < n; i++) {
        lorasynci_segment s      = p->seg[i];
        size_t            behind = n - 1 - i;
        if (lorasynci_leaf_of(s)) return i;
        if (!lorasynci_segment_begins(s, "lora_")) continue;
        if (behind <= 1) return i;
        /* lora_C.default.weight, but not lora_router.gate.weight */
        if (behind == 2 && lorasynci_is_parameter(p->seg[n - 1]) && s.text[s.size - 2] == '_' &&
            lorasynci_is_letter(s.text[s.size - 1]))
            return i;
    }
    return n;
}

/* adapter.linear_in.weight and adapter.adapter_q.linear_in.weight: Megatron-Bridge's own LoRA names. */
LORASYNCI_FN int lorasynci_is_megatron(const lorasynci_path *p)
{
    size_t n = p->num, i;
    if (n < 3 || !lorasynci_segment_is(p->seg[n - 1], "weight")) return 0;
    if (!lorasynci_segment_is(p->seg[n - 2], "linear_in") && !lorasynci_segment_is(p->seg[n - 2], "linear_out"))
        return 0;
    i = n > 3 && lorasynci_segment_begins(p->seg[n - 3], "adapter_") ? n - 4 : n - 3;
    return lorasynci_segment_is(p->seg[i], "adapter");
}

LORASYNCI_FN lorasync_status lorasynci_check_base(const lorasynci_path *p, lorasync_error *err)
{
    size_t at = lorasynci_unknown_leaf(p);
    if (at + 1 < p->num && lorasynci_leaf_of(p->seg[at]))
        return lorasynci_fail(
            err, LORASYNC_E_NAME,
            "parameter name \"%.240s\": \"%.*s\" is followed by \"%.100s\", expected nothing, <adapter>, weight or "
            "<adapter>.weight; an adapter name cannot contain a dot",
            p->raw, (int)p->seg[at].size, p->seg[at].text, p->seg[at].text + p->seg[at].size + 1);
    if (at < p->num)
        return lorasynci_fail(
            err, LORASYNC_E_NAME,
            "parameter name \"%.240s\": \"%.*s\" is no LoRA leaf known here (lora_A, lora_B, lora_embedding_A, "
            "lora_embedding_B, lora_magnitude_vector, then .<adapter>, .weight or both); leave it out if it is not "
            "LoRA",
            p->raw, (int)(p->seg[at].size < 64 ? p->seg[at].size : 64), p->seg[at].text);
    if (lorasynci_is_megatron(p))
        return lorasynci_fail(err, LORASYNC_E_NAME,
                              "parameter name \"%.240s\" is Megatron's name of a LoRA parameter: pass its PEFT name "
                              "(linear_in is lora_A, linear_out is lora_B of the Hugging Face module)",
                              p->raw);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_name_from_base(lorasynci_path *p, lorasync_name *n, lorasync_error *err)
{
    size_t i = 0;
    n->role  = LORASYNC_ROLE_BASE;
    while (i + 1 < p->num) {
        lorasynci_segment s = p->seg[i];
        if (lorasynci_segment_is(s, "base_layer") || lorasynci_segment_is(s, "original_module") ||
            (lorasynci_segment_is(s, "token_adapter") && lorasynci_segment_is(p->seg[i + 1], "base_layer")))
            lorasynci_path_cut(p, i, 1);
        else i++;
    }
    LORASYNCI_TRY(lorasynci_path_join(p, 0, p->num - 1, n->module, err));
    return lorasynci_path_join(p, 0, p->num, n->key, err);
}

LORASYNC_API lorasync_status lorasync_parse_name(const char *raw_name, lorasync_name *out, lorasync_error *err)
{
    lorasynci_path  path;
    lorasynci_tail  tail;
    lorasync_name   name;
    lorasync_status status;
    size_t          saved;
    if (!raw_name || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_parse_name: raw_name or out is NULL");
    LORASYNCI_TRY(lorasynci_path_split(raw_name, &path, err));
    LORASYNCI_TRY(lorasynci_path_unwrap(&path, err));
    name.key[0] = name.module[0] = name.adapter[0] = 0;
    for (saved = 0; saved < path.num && !lorasynci_segment_is(path.seg[saved], "modules_to_save");) saved++;
    if (lorasynci_find_tail(&path, &tail)) {
        status = lorasynci_name_from_tail(&path, &tail, &name, err);
    } else if (saved < path.num) {
        status = lorasynci_name_from_saved(&path, saved, &name, err);
    } else {
        LORASYNCI_TRY(lorasynci_check_base(&path, err));
        status = lorasynci_name_from_base(&path, &name, err);
    }
    LORASYNCI_TRY(status);
    out->role = name.role;
    memcpy(out->key, name.key, strlen(name.key) + 1);
    memcpy(out->module, name.module, strlen(name.module) + 1);
    memcpy(out->adapter, name.adapter, strlen(name.adapter) + 1);
    return LORASYNC_OK;
}

LORASYNC_API void lorasync_drop_adapter(const char *key, const char *adapter, char *out)
{
    size_t n = key ? strlen(key) : 0, m = adapter ? strlen(adapter) : 0, end = n;
    if (!key || !adapter || !out) return;
    if (!(n > m && key[n - m - 1] == '.' && memcmp(key + n - m, adapter, m) == 0)) { /* not the last: then the last but
                                                                                        one */
        while (end > 0 && key[end - 1] != '.') end--;
        if (end > 0) end--; /* the dot before the last component */
    }
    memmove(out, key, n + 1);
    if (m > 0 && end > m && out[end - m - 1] == '.' && memcmp(out + end - m, adapter, m) == 0)
        memmove(out + end - m - 1, out + end, n + 1 - end);
}

/* -- patterns

   A pattern is parsed into a tree, and the tree becomes a machine of states that reads the text backwards. At every
   position, from the end to the start, all states that can go on are kept as a set, so the time is states x bytes
   whatever the pattern.

   Backwards, because then look-ahead costs nothing extra: each look-ahead is a machine of its own that starts at every
   position; when it has arrived at position i, then what it looks for begins at i. Machines are numbered inside out, so
   at each position the inner ones have answered before the outer ones ask. The whole pattern is the last machine and
   starts at the end of the text only. And backwards because module names differ at their ends: most are turned down
   after a few bytes.

       a(?=b|c).    machines [0] b|c  [1] a . (ask 0)      text  x a b c
                                                                   <---- read this way
*/

#define LORASYNCI_RE_MAX_BYTES 65536u /* of a pattern */
#define LORASYNCI_RE_MAX_DEPTH 64     /* of groups in groups: bounds the recursion of parsing and emitting */
#define LORASYNCI_RE_MAX_WORK 65536u  /* tree nodes emitted, copies for {m,n} counted: bounds the states */
#define LORASYNCI_RE_FOREVER 0xffffffffu

typedef enum lorasynci_re_kind {
    LORASYNCI_RE_BYTE,   /* arg: the byte */
    LORASYNCI_RE_SET,    /* index: of 32 bytes in sets */
    LORASYNCI_RE_ASSERT, /* arg: '^' '$' 'b' 'B' 'Z' */
    LORASYNCI_RE_LOOK,   /* index: the machine; arg: 1 for (?! ) */
    LORASYNCI_RE_ALL,    /* tree only: children one behind the other */
    LORASYNCI_RE_ANY,    /* tree only: one of the children */
    LORASYNCI_RE_REPEAT, /* tree only: the child, min to max times */
    LORASYNCI_RE_SPLIT,  /* state only: go to next and to index */
    LORASYNCI_RE_MATCH   /* state only: the machine has arrived */
} lorasynci_re_kind;

/* Children hang on a list:  child -> sibling -> sibling; node 0 is unused and ends it. */
typedef struct lorasynci_re_node {
    uint8_t  kind, arg;
    uint32_t index, child, sibling, min, max;
} lorasynci_re_node;

typedef struct lorasynci_re_state {
    uint8_t  kind, arg;
    uint32_t next, index;
} lorasynci_re_state;

/* One machine. Its states are states[first .. first + number), and so are its slices of `now` and `before`:

       now   | machine 0: live states |   | machine 1: live states    |   |
             '- first 0               |   '- first 1
                                      '- first 0 + size 0                      */
typedef struct lorasynci_re_machine {
    uint32_t first, start, size;
    int      arrived;
} lorasynci_re_machine;

struct lorasync_pattern {
    lorasync_allocator    a;
    lorasynci_re_state   *states;
    unsigned char        *sets;
    lorasynci_re_machine *machines;
    uint32_t              num_states, num_machines;
    uint32_t             *work; /* mark, now, before, stack: num_states each */
    uint32_t             *mark, *now, *before, *stack;
    uint32_t              turn; /* a state is in the set being made when its mark is `turn` */
};

/* Everything that is needed while compiling. */
typedef struct lorasynci_re {
    const unsigned char *text;
    size_t               size, at;
    int                  depth;
    uint32_t             work;
    lorasynci_buffer     tree;   /* lorasynci_re_node */
    lorasynci_buffer     roots;  /* uint32_t: the tree of each machine, inner ones first */
    lorasynci_buffer     sets;   /* 32 bytes each, one bit per byte value */
    lorasynci_buffer     states; /* lorasynci_re_state */
    lorasync_error      *err;
} lorasynci_re;

LORASYNCI_FN lorasync_status lorasynci_re_fail(lorasynci_re *r, lorasync_status status, size_t at, const char *what)
{
    return lorasynci_fail(r->err, status, "pattern \"%.200s\": %s at byte %zu", (const char *)r->text, what, at);
}

LORASYNCI_FN lorasynci_re_node *lorasynci_re_tree(lorasynci_re *r, uint32_t i)
{
    return (lorasynci_re_node *)(void *)r->tree.data + i;
}

LORASYNCI_FN uint32_t lorasynci_re_count(const lorasynci_buffer *b, size_t size) { return (uint32_t)(b->size / size); }

LORASYNCI_FN lorasync_status lorasynci_re_new(lorasynci_re *r, lorasynci_re_kind kind, uint32_t arg, uint32_t index,
                                              uint32_t *out)
{
    lorasynci_re_node n;
    memset(&n, 0, sizeof n);
    n.kind  = (uint8_t)kind;
    n.arg   = (uint8_t)arg;
    n.index = index;
    *out    = lorasynci_re_count(&r->tree, sizeof n);
    lorasynci_put(&r->tree, &n, sizeof n);
    return r->tree.failed ? lorasynci_fail_memory(r->err, sizeof n) : LORASYNC_OK;
}

/* *last is the child added before, 0 at first. */
LORASYNCI_FN void lorasynci_re_append(lorasynci_re *r, uint32_t parent, uint32_t *last, uint32_t child)
{
    if (*last) lorasynci_re_tree(r, *last)->sibling = child;
    else lorasynci_re_tree(r, parent)->child = child;
    *last = child;
}

/* -- patterns: sets of bytes */

LORASYNCI_FN int lorasynci_is_word(unsigned c)
{
    return (c >= '0' && c <= '9') || (c < 128 && lorasynci_is_letter((char)c)) || c == '_';
}

LORASYNCI_FN int lorasynci_re_has(const unsigned char *set, unsigned c) { return set[c >> 3] >> (c & 7) & 1; }

LORASYNCI_FN void lorasynci_re_include(unsigned char *set, unsigned from, unsigned to)
{
    for (; from <= to; from++) set[from >> 3] = (unsigned char)(set[from >> 3] | 1u << (from & 7));
}

/* Adds \d \w \s or, in capitals, their complements; 0 if the letter is none of these. */
LORASYNCI_FN int lorasynci_re_include_class(unsigned char *set, unsigned letter)
{
    unsigned c;
    if (letter == 0 || !strchr("dwsDWS", (int)letter)) return 0;
    for (c = 0; c < 256; c++) {
        unsigned kind = letter | 32u;
        int      in   = kind == 'd'   ? c >= '0' && c <= '9'
                        : kind == 'w' ? lorasynci_is_word(c)
                                      : c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f);
        if (in == (letter == kind)) lorasynci_re_include(set, c, c);
    }
    return 1;
}

LORASYNCI_FN lorasync_status lorasynci_re_new_set(lorasynci_re *r, const unsigned char *set, uint32_t *out)
{
    uint32_t index = lorasynci_re_count(&r->sets, 32);
    lorasynci_put(&r->sets, set, 32);
    if (r->sets.failed) return lorasynci_fail_memory(r->err, 32);
    return lorasynci_re_new(r, LORASYNCI_RE_SET, 0, index, out);
}

/* -- patterns: parsing */

/* The byte `ahead` places on; 0 behind the end. */
LORASYNCI_FN unsigned lorasynci_re_peek(const lorasynci_re *r, size_t ahead)
{
    return ahead < r->size - r->at ? r->text[r->at + ahead] : 0;
}

LORASYNCI_FN int lorasynci_hex_digit(unsigned c)
{
    if (c >= '0' && c <= '9') return (int)(c - '0');
    if ((c | 32u) >= 'a' && (c | 32u) <= 'f') return (int)((c | 32u) - 'a' + 10);
    return -1;
}

/* Behind a backslash: a class goes into `set` and *byte is -1, else *byte is the one byte meant. */
LORASYNCI_FN lorasync_status lorasynci_re_escape(lorasynci_re *r, unsigned char *set, int *byte)
{
    static const char from[] = "ntrfva", to[] = "\n\t\r\f\v\a";
    size_t            at = r->at - 1;
    unsigned          c  = lorasynci_re_peek(r, 0);
    *byte                = -1;
    if (c == 0) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "a backslash with nothing behind it");
    r->at++;
    if (lorasynci_re_include_class(set, c)) return LORASYNC_OK;
    if (c >= '1' && c <= '9')
        return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, at, "a back-reference (\\1 ...) is not supported");
    if (c == 'x') {
        int high = lorasynci_hex_digit(lorasynci_re_peek(r, 0)),
            low  = high < 0 ? -1 : lorasynci_hex_digit(lorasynci_re_peek(r, 1));
        if (low < 0) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "\\x without two hex digits");
        r->at += 2;
        *byte = high * 16 + low;
        if (*byte > 127) return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, at, "\\x above 7f is not supported");
        return LORASYNC_OK;
    }
    *byte = strchr(from, (int)c) ? (unsigned char)to[strchr(from, (int)c) - from] : (int)c;
    if ((unsigned)*byte == c && (c == '0' || (c < 128 && lorasynci_is_letter((char)c))))
        return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, at, "an escape that is not supported");
    return LORASYNC_OK;
}

/* One item of [...]: a byte, or a class, which goes into `set` (*byte is -1 then). */
LORASYNCI_FN lorasync_status lorasynci_re_class_member(lorasynci_re *r, size_t open, unsigned char *set, int *byte)
{
    unsigned c  = lorasynci_re_peek(r, 0);
    size_t   at = r->at;
    if (c == 0) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, open, "a [ that is never closed");
    r->at++;
    *byte = (int)c;
    if (c == '\\') {
        if (lorasynci_re_peek(r, 0) == 'b') {
            r->at++;
            *byte = 8; /* inside [...] \b is a backspace */
        } else {
            LORASYNCI_TRY(lorasynci_re_escape(r, set, byte));
        }
    }
    if (*byte > 127)
        return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, at, "a character outside ASCII in [...] is not supported");
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_re_class(lorasynci_re *r, uint32_t *out)
{
    unsigned char set[32];
    size_t        open = r->at - 1, at, first;
    int           from, to, negate = lorasynci_re_peek(r, 0) == '^';
    memset(set, 0, sizeof set);
    if (negate) r->at++;
    for (first = r->at; r->at == first || lorasynci_re_peek(r, 0) != ']';) { /* a ] that comes first is itself */
        at = r->at;
        LORASYNCI_TRY(lorasynci_re_class_member(r, open, set, &from));
        if (lorasynci_re_peek(r, 0) == '-' && lorasynci_re_peek(r, 1) != ']' && lorasynci_re_peek(r, 1) != 0) {
            r->at++;
            LORASYNCI_TRY(lorasynci_re_class_member(r, open, set, &to));
            if (from < 0 || to < from)
                return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "a range in [...] with bad ends");
            lorasynci_re_include(set, (unsigned)from, (unsigned)to);
        } else if (from >= 0) {
            lorasynci_re_include(set, (unsigned)from, (unsigned)from);
        }
    }
    r->at++;
    for (at = 0; negate && at < sizeof set; at++) set[at] = (unsigned char)~set[at];
    return lorasynci_re_new_set(r, set, out);
}

/* Reads * + ? or {m,n} if one stands here. A { that begins none is an ordinary byte, as in Python. */
LORASYNCI_FN int lorasynci_re_quantifier(lorasynci_re *r, uint32_t *min, uint32_t *max)
{
    uint32_t value[2] = {0, 0};
    size_t   i = 1, digits[2] = {0, 0};
    int      part = 0;
    unsigned c    = lorasynci_re_peek(r, 0);
    *min          = c == '+' ? 1 : 0;
    *max          = c == '?' ? 1 : LORASYNCI_RE_FOREVER;
    if (c == '*' || c == '+' || c == '?') {
        r->at++;
        return 1;
    }
    if (c != '{' || lorasynci_re_peek(r, 1) == '}') return 0;
    for (;; i++) {
        c = lorasynci_re_peek(r, i);
        if (c >= '0' && c <= '9') {
            digits[part]++;
            if (value[part] < LORASYNCI_RE_MAX_WORK * 2)
                value[part] = value[part] * 10 + (c - '0'); /* more is refused
                                                                                                        later anyhow */
        } else if (c == ',' && part == 0) {
            part = 1;
        } else {
            break;
        }
    }
    if (c != '}') return 0;
    *min = value[0];
    if (part == 0) *max = *min;
    else if (digits[1]) *max = value[1];
    r->at += i + 1;
    return 1;
}

LORASYNCI_FN lorasync_status lorasynci_re_alternatives(lorasynci_re *r, uint32_t *out);

/* What (? begins; r->at is behind the ?. Sets *look to '=', '!' or 0 (a plain group). */
LORASYNCI_FN lorasync_status lorasynci_re_group_kind(lorasynci_re *r, unsigned *look)
{
    const char *refused = NULL;
    size_t      at      = r->at - 2;
    unsigned    c = lorasynci_re_peek(r, 0), d = lorasynci_re_peek(r, 1);
    *look = c == '=' || c == '!' ? c : 0;
    if (c == 'P' && d == '<') {
        for (r->at += 2; lorasynci_is_word(lorasynci_re_peek(r, 0));) r->at++;
        if (lorasynci_re_peek(r, 0) != '>' || r->at == at + 4)
            return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "a group name that is no word");
        r->at++;
        return LORASYNC_OK;
    }
    if (c == '<' && (d == '=' || d == '!')) refused = "look-behind (?<= or (?<! is not supported";
    else if (c == 'P' && d == '=') refused = "a back-reference (?P=name) is not supported";
    else if (c == '(') refused = "a conditional (?(...) is not supported";
    else if (c == '>') refused = "an atomic group (?> is not supported";
    else if (c == '#') refused = "a comment (?# is not supported";
    else if (c && strchr("aiLmsux-", (int)c)) refused = "flags such as (?i) are not supported";
    if (refused) return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, at, refused);
    if (c != ':' && !*look) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "an unknown group (?");
    r->at++;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_re_group(lorasynci_re *r, uint32_t *out)
{
    size_t   open = r->at - 1;
    unsigned look = 0;
    if (lorasynci_re_peek(r, 0) == '?') {
        r->at++;
        LORASYNCI_TRY(lorasynci_re_group_kind(r, &look));
    }
    if (r->depth == LORASYNCI_RE_MAX_DEPTH)
        return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, open, "a group more than 64 levels deep");
    r->depth++;
    LORASYNCI_TRY(lorasynci_re_alternatives(r, out));
    r->depth--;
    if (lorasynci_re_peek(r, 0) != ')')
        return lorasynci_re_fail(r, LORASYNC_E_FORMAT, open, "a ( that is never closed");
    r->at++;
    if (!look) return LORASYNC_OK;
    lorasynci_put(&r->roots, out, sizeof *out);
    if (r->roots.failed) return lorasynci_fail_memory(r->err, sizeof *out);
    return lorasynci_re_new(r, LORASYNCI_RE_LOOK, look == '!', lorasynci_re_count(&r->roots, sizeof *out) - 1, out);
}

/* One character: a byte, or the bytes of one UTF-8 sequence. */
LORASYNCI_FN lorasync_status lorasynci_re_literal(lorasynci_re *r, unsigned c, uint32_t *out)
{
    uint32_t last = 0, byte;
    if (c < 0xc0) return lorasynci_re_new(r, LORASYNCI_RE_BYTE, c, 0, out);
    LORASYNCI_TRY(lorasynci_re_new(r, LORASYNCI_RE_ALL, 0, 0, out));
    for (;;) {
        LORASYNCI_TRY(lorasynci_re_new(r, LORASYNCI_RE_BYTE, c, 0, &byte));
        lorasynci_re_append(r, *out, &last, byte);
        c = lorasynci_re_peek(r, 0);
        if (c < 0x80 || c >= 0xc0) return LORASYNC_OK;
        r->at++;
    }
}

LORASYNCI_FN lorasync_status lorasynci_re_backslash(lorasynci_re *r, uint32_t *out)
{
    unsigned char set[32];
    unsigned      c = lorasynci_re_peek(r, 0);
    int           byte;
    if (c && strchr("bBAZ", (int)c)) {
        r->at++;
        return lorasynci_re_new(r, LORASYNCI_RE_ASSERT, c == 'A' ? '^' : c, 0, out);
    }
    memset(set, 0, sizeof set);
    LORASYNCI_TRY(lorasynci_re_escape(r, set, &byte));
    return byte < 0 ? lorasynci_re_new_set(r, set, out) : lorasynci_re_literal(r, (unsigned)byte, out);
}

LORASYNCI_FN lorasync_status lorasynci_re_atom(lorasynci_re *r, uint32_t *out)
{
    unsigned char set[32];
    uint32_t      min, max;
    size_t        at = r->at;
    unsigned      c  = lorasynci_re_peek(r, 0);
    if (lorasynci_re_quantifier(r, &min, &max)) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "nothing to repeat");
    r->at++;
    switch (c) {
    case '(': return lorasynci_re_group(r, out);
    case '[': return lorasynci_re_class(r, out);
    case '\\': return lorasynci_re_backslash(r, out);
    case '^':
    case '$': return lorasynci_re_new(r, LORASYNCI_RE_ASSERT, c, 0, out);
    case '.':
        memset(set, 0xff, sizeof set);
        set['\n' >> 3] = (unsigned char)(set['\n' >> 3] & ~(1u << ('\n' & 7)));
        return lorasynci_re_new_set(r, set, out);
    default: return lorasynci_re_literal(r, c, out);
    }
}

/* An atom and its quantifier. Greedy and lazy are the same here: only whether the whole text matches is asked. */
LORASYNCI_FN lorasync_status lorasynci_re_piece(lorasynci_re *r, uint32_t *out)
{
    uint32_t atom, min, max, more_min, more_max;
    size_t   at;
    LORASYNCI_TRY(lorasynci_re_atom(r, &atom));
    at   = r->at;
    *out = atom;
    if (!lorasynci_re_quantifier(r, &min, &max)) return LORASYNC_OK;
    if (lorasynci_re_tree(r, atom)->kind == LORASYNCI_RE_ASSERT)
        return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "nothing to repeat");
    if (min > max) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "a {m,n} with m above n");
    if (lorasynci_re_peek(r, 0) == '+')
        return lorasynci_re_fail(r, LORASYNC_E_UNSUPPORTED, at, "a possessive quantifier is not supported");
    if (lorasynci_re_peek(r, 0) == '?') r->at++;
    at = r->at;
    if (lorasynci_re_quantifier(r, &more_min, &more_max))
        return lorasynci_re_fail(r, LORASYNC_E_FORMAT, at, "a quantifier behind a quantifier");
    LORASYNCI_TRY(lorasynci_re_new(r, LORASYNCI_RE_REPEAT, 0, 0, out));
    lorasynci_re_tree(r, *out)->child = atom;
    lorasynci_re_tree(r, *out)->min   = min;
    lorasynci_re_tree(r, *out)->max   = max;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_re_sequence(lorasynci_re *r, uint32_t *out)
{
    uint32_t last = 0, piece;
    LORASYNCI_TRY(lorasynci_re_new(r, LORASYNCI_RE_ALL, 0, 0, out));
    while (r->at < r->size && r->text[r->at] != '|' && r->text[r->at] != ')') {
        LORASYNCI_TRY(lorasynci_re_piece(r, &piece));
        lorasynci_re_append(r, *out, &last, piece);
    }
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_re_alternatives(lorasynci_re *r, uint32_t *out)
{
    uint32_t last = 0, sequence;
    LORASYNCI_TRY(lorasynci_re_new(r, LORASYNCI_RE_ANY, 0, 0, out));
    for (;;) {
        LORASYNCI_TRY(lorasynci_re_sequence(r, &sequence));
        lorasynci_re_append(r, *out, &last, sequence);
        if (lorasynci_re_peek(r, 0) != '|') return LORASYNC_OK;
        r->at++;
    }
}

LORASYNCI_FN lorasync_status lorasynci_re_parse(lorasynci_re *r)
{
    uint32_t node;
    LORASYNCI_TRY(lorasynci_re_new(r, LORASYNCI_RE_ALL, 0, 0, &node)); /* node 0, never used */
    LORASYNCI_TRY(lorasynci_re_alternatives(r, &node));
    if (r->at < r->size) return lorasynci_re_fail(r, LORASYNC_E_FORMAT, r->at, "a ) without its (");
    lorasynci_put(&r->roots, &node, sizeof node);
    return r->roots.failed ? lorasynci_fail_memory(r->err, sizeof node) : LORASYNC_OK;
}

/* -- patterns: states */

LORASYNCI_FN lorasync_status lorasynci_re_put_state(lorasynci_re *r, lorasynci_re_kind kind, uint32_t arg,
                                                    uint32_t next, uint32_t index, uint32_t *out)
{
    lorasynci_re_state s;
    memset(&s, 0, sizeof s);
    s.kind  = (uint8_t)kind;
    s.arg   = (uint8_t)arg;
    s.next  = next;
    s.index = index;
    *out    = lorasynci_re_count(&r->states, sizeof s);
    lorasynci_put(&r->states, &s, sizeof s);
    return r->states.failed ? lorasynci_fail_memory(r->err, sizeof s) : LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_re_emit(lorasynci_re *r, uint32_t tree, uint32_t next, uint32_t *out);

/* min copies and, in front of them, a loop or max - min optional copies:   x{1,3}  =  x? x? x */
LORASYNCI_FN lorasync_status lorasynci_re_emit_repeat(lorasynci_re *r, lorasynci_re_node n, uint32_t next,
                                                      uint32_t *out)
{
    uint32_t i, body;
    if (n.max == LORASYNCI_RE_FOREVER) {
        LORASYNCI_TRY(lorasynci_re_put_state(r, LORASYNCI_RE_SPLIT, 0, next, next, &i));
        LORASYNCI_TRY(lorasynci_re_emit(r, n.child, i, &body));
        ((lorasynci_re_state *)(void *)r->states.data)[i].index = body;
        next                                                    = i;
    } else {
        for (i = n.min; i < n.max; i++) {
            LORASYNCI_TRY(lorasynci_re_emit(r, n.child, next, &body));
            LORASYNCI_TRY(lorasynci_re_put_state(r, LORASYNCI_RE_SPLIT, 0, next, body, &next));
        }
    }
    for (i = 0; i < n.min; i++) LORASYNCI_TRY(lorasynci_re_emit(r, n.child, next, &next));
    *out = next;
    return LORASYNC_OK;
}

/* Makes the states of a tree, to be read backwards: the last thing in the pattern is entered first (*out), the first
   leads to `next`. */
LORASYNCI_FN lorasync_status lorasynci_re_emit(lorasynci_re *r, uint32_t tree, uint32_t next, uint32_t *out)
{
    lorasynci_re_node n = *lorasynci_re_tree(r, tree);
    uint32_t          child, entry;
    if (++r->work > LORASYNCI_RE_MAX_WORK)
        return lorasynci_fail(r->err, LORASYNC_E_UNSUPPORTED,
                              "pattern \"%.200s\" needs more than %u states: make its {m,n} counts smaller",
                              (const char *)r->text, LORASYNCI_RE_MAX_WORK);
    switch (n.kind) {
    case LORASYNCI_RE_ALL:
        for (child = n.child; child; child = lorasynci_re_tree(r, child)->sibling)
            LORASYNCI_TRY(lorasynci_re_emit(r, child, next, &next));
        *out = next;
        return LORASYNC_OK;
    case LORASYNCI_RE_ANY:
        LORASYNCI_TRY(lorasynci_re_emit(r, n.child, next, out));
        for (child = lorasynci_re_tree(r, n.child)->sibling; child; child = lorasynci_re_tree(r, child)->sibling) {
            LORASYNCI_TRY(lorasynci_re_emit(r, child, next, &entry));
            LORASYNCI_TRY(lorasynci_re_put_state(r, LORASYNCI_RE_SPLIT, 0, *out, entry, out));
        }
        return LORASYNC_OK;
    case LORASYNCI_RE_REPEAT: return lorasynci_re_emit_repeat(r, n, next, out);
    default: return lorasynci_re_put_state(r, (lorasynci_re_kind)n.kind, n.arg, next, n.index, out);
    }
}

/* Emits the machines and allocates what matching needs. */
LORASYNCI_FN lorasync_status lorasynci_re_finish(lorasynci_re *r, lorasync_pattern *p)
{
    uint32_t i, match;
    p->num_machines = lorasynci_re_count(&r->roots, sizeof i);
    p->machines     = (lorasynci_re_machine *)lorasynci_alloc_array(&p->a, p->num_machines, sizeof *p->machines);
    if (!p->machines) return lorasynci_fail_memory(r->err, p->num_machines * sizeof *p->machines);
    for (i = 0; i < p->num_machines; i++) {
        LORASYNCI_TRY(lorasynci_re_put_state(r, LORASYNCI_RE_MATCH, 0, 0, 0, &match));
        p->machines[i].first = match;
        LORASYNCI_TRY(
            lorasynci_re_emit(r, ((const uint32_t *)(const void *)r->roots.data)[i], match, &p->machines[i].start));
    }
    p->num_states = lorasynci_re_count(&r->states, sizeof *p->states);
    p->work       = (uint32_t *)lorasynci_alloc_array(&p->a, p->num_states, 4 * sizeof *p->work);
    if (!p->work) return lorasynci_fail_memory(r->err, p->num_states * 4 * sizeof *p->work);
    p->mark        = p->work;
    p->now         = p->mark + p->num_states;
    p->before      = p->now + p->num_states;
    p->stack       = p->before + p->num_states;
    p->states      = (lorasynci_re_state *)(void *)r->states.data;
    p->sets        = (unsigned char *)r->sets.data;
    r->states.data = NULL; /* the pattern has them now */
    r->sets.data   = NULL;
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_pattern_compile(const char *pattern, const lorasync_allocator *allocator,
                                                      lorasync_pattern **out, lorasync_error *err)
{
    lorasynci_re       r;
    lorasync_allocator a;
    lorasync_pattern  *p;
    lorasync_status    status;
    if (out) *out = NULL;
    if (!pattern || !out || !lorasynci_take_allocator(allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_pattern_compile: pattern or out is NULL, or allocator is incomplete");
    memset(&r, 0, sizeof r);
    r.text = (const unsigned char *)pattern;
    r.size = strlen(pattern);
    r.err  = err;
    if (r.size > LORASYNCI_RE_MAX_BYTES)
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                              "pattern \"%.120s...\" has %zu bytes, at most %u are supported", pattern, r.size,
                              LORASYNCI_RE_MAX_BYTES);
    p = (lorasync_pattern *)lorasynci_alloc_array(&a, 1, sizeof *p);
    if (!p) return lorasynci_fail_memory(err, sizeof *p);
    p->a = a;
    lorasynci_buffer_init(&r.tree, &a);
    lorasynci_buffer_init(&r.roots, &a);
    lorasynci_buffer_init(&r.sets, &a);
    lorasynci_buffer_init(&r.states, &a);
    status = lorasynci_re_parse(&r);
    if (status == LORASYNC_OK) status = lorasynci_re_finish(&r, p);
    lorasynci_buffer_free(&r.tree);
    lorasynci_buffer_free(&r.roots);
    lorasynci_buffer_free(&r.sets);
    lorasynci_buffer_free(&r.states);
    if (status == LORASYNC_OK) *out = p;
    else lorasync_pattern_free(p);
    return status;
}

LORASYNC_API void lorasync_pattern_free(lorasync_pattern *pattern)
{
    lorasync_allocator a;
    if (!pattern) return;
    a = pattern->a;
    lorasynci_dealloc(&a, pattern->states);
    lorasynci_dealloc(&a, pattern->sets);
    lorasynci_dealloc(&a, pattern->machines);
    lorasynci_dealloc(&a, pattern->work);
    lorasynci_dealloc(&a, pattern);
}

/* -- patterns: matching */

/* Where the machines stand: before byte i of the n bytes of text. */
typedef struct lorasynci_re_place {
    const unsigned char *text;
    size_t               n, i;
} lorasynci_re_place;

LORASYNCI_FN int lorasynci_re_holds(const lorasynci_re_place *at, unsigned assertion)
{
    int left, right;
    switch (assertion) {
    case '^': return at->i == 0;
    case 'Z': return at->i == at->n;
    case '$': return at->i == at->n || (at->i + 1 == at->n && at->text[at->i] == '\n');
    default:
        if (at->n == 0) return 0; /* before Python 3.14 not even \B holds in an empty text */
        left  = at->i > 0 && lorasynci_is_word(at->text[at->i - 1]);
        right = at->i < at->n && lorasynci_is_word(at->text[at->i]);
        return (left != right) == (assertion == 'b');
    }
}

LORASYNCI_FN int lorasynci_re_reads(const lorasync_pattern *p, const lorasynci_re_state *s, unsigned c)
{
    return s->kind == LORASYNCI_RE_BYTE ? s->arg == c : lorasynci_re_has(p->sets + (size_t)s->index * 32, c);
}

/* Adds a state of machine m, and all that it leads to without reading, to the set of this position. Only states that
   can read the byte to the left are kept. */
LORASYNCI_FN void lorasynci_re_reach(lorasync_pattern *p, lorasynci_re_machine *m, uint32_t state,
                                     const lorasynci_re_place *at)
{
    uint32_t num = 0;
    if (p->mark[state] == p->turn) return;
    p->mark[state]  = p->turn;
    p->stack[num++] = state;
    while (num) {
        uint32_t                  now = p->stack[--num], to[2], k, num_to = 0;
        const lorasynci_re_state *s = &p->states[now];
        switch (s->kind) {
        case LORASYNCI_RE_MATCH: m->arrived = 1; break;
        case LORASYNCI_RE_SPLIT:
            to[num_to++] = s->next;
            to[num_to++] = s->index;
            break;
        case LORASYNCI_RE_ASSERT:
            if (lorasynci_re_holds(at, s->arg)) to[num_to++] = s->next;
            break;
        case LORASYNCI_RE_LOOK:
            if (p->machines[s->index].arrived != (int)s->arg) to[num_to++] = s->next;
            break;
        default:
            if (at->i > 0 && lorasynci_re_reads(p, s, at->text[at->i - 1])) p->now[m->first + m->size++] = now;
            break;
        }
        for (k = 0; k < num_to; k++) {
            if (p->mark[to[k]] == p->turn) continue;
            p->mark[to[k]]  = p->turn;
            p->stack[num++] = to[k];
        }
    }
}

/* Moves machine m over the byte to the right of `at`: from its states in p->before, which all read that byte, to those
   in p->now. */
LORASYNCI_FN void lorasynci_re_move(lorasync_pattern *p, lorasynci_re_machine *m, int starts,
                                    const lorasynci_re_place *at)
{
    uint32_t i, size = m->size;
    m->size    = 0;
    m->arrived = 0;
    for (i = 0; i < size; i++) lorasynci_re_reach(p, m, p->states[p->before[m->first + i]].next, at);
    if (starts) lorasynci_re_reach(p, m, m->start, at);
}

LORASYNC_API int lorasync_pattern_matches(lorasync_pattern *pattern, const char *text)
{
    lorasynci_re_machine *whole;
    lorasynci_re_place    at;
    uint32_t              k, *swap;
    if (!pattern || !text) return 0;
    whole   = &pattern->machines[pattern->num_machines - 1];
    at.text = (const unsigned char *)text;
    at.n    = strlen(text);
    for (k = 0; k < pattern->num_machines; k++) pattern->machines[k].size = 0;
    for (at.i = at.n;; at.i--) {
        if (++pattern->turn == 0) {
            memset(pattern->mark, 0, pattern->num_states * sizeof *pattern->mark);
            pattern->turn = 1;
        }
        for (k = 0; k < pattern->num_machines; k++) {
            lorasynci_re_machine *m = &pattern->machines[k];
            lorasynci_re_move(pattern, m, m != whole || at.i == at.n, &at);
        }
        if (at.i == 0) return whole->arrived;
        if (whole->size == 0) return 0;
        swap            = pattern->before;
        pattern->before = pattern->now;
        pattern->now    = swap;
    }
}

/* -- matcher: which modules, then which parameters */

/* A list of module names or their dotted ends, or a pattern, or neither. */
typedef struct lorasynci_modules {
    int               given; /* 0: there is no such condition */
    int               exact; /* list entries are whole names, not ends */
    lorasync_pattern *pattern;
    char            **entries;
    size_t            num;
    lorasynci_table   table; /* entries by text */
} lorasynci_modules;

struct lorasync_matcher {
    lorasync_allocator a;
    lorasynci_modules  target, exclude;
    int                base, skip_modules_to_save;
};

LORASYNCI_FN const char *lorasynci_entry_of(const void *user, size_t index)
{
    return ((const lorasynci_modules *)user)->entries[index];
}

/* Room for up to max entries. */
LORASYNCI_FN lorasync_status lorasynci_modules_reserve(lorasynci_modules *m, size_t max, const lorasync_allocator *a,
                                                       lorasync_error *err)
{
    m->given   = 1;
    m->entries = (char **)lorasynci_alloc_array(a, max, sizeof *m->entries);
    if (!m->entries || !lorasynci_table_init(&m->table, a, max))
        return lorasynci_fail(err, LORASYNC_E_MEMORY, "out of memory for %zu module names", max);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_modules_add(lorasynci_modules *m, const char *entry, const lorasync_allocator *a,
                                                   lorasync_error *err)
{
    if (lorasynci_table_find(&m->table, entry, lorasynci_entry_of, m) != SIZE_MAX) return LORASYNC_OK;
    m->entries[m->num] = lorasynci_copy_text(a, entry, strlen(entry));
    if (!m->entries[m->num]) return lorasynci_fail_memory(err, strlen(entry) + 1);
    lorasynci_table_insert(&m->table, m->entries[m->num], m->num, lorasynci_entry_of, m);
    m->num++;
    return LORASYNC_OK;
}

LORASYNCI_FN void lorasynci_modules_free(lorasynci_modules *m, const lorasync_allocator *a)
{
    size_t i;
    lorasync_pattern_free(m->pattern);
    for (i = 0; i < m->num; i++) lorasynci_dealloc(a, m->entries[i]);
    lorasynci_dealloc(a, m->entries);
    if (m->table.cells) lorasynci_table_free(&m->table);
}

/* From the filter's two forms; `what` is target or exclude, for messages. */
LORASYNCI_FN lorasync_status lorasynci_modules_make(lorasynci_modules *m, const char *what, const char *pattern,
                                                    const char *const *list, size_t num, const lorasync_allocator *a,
                                                    lorasync_error *err)
{
    size_t          i;
    lorasync_status status;
    if (pattern && list)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "filter: %s_pattern and %s_modules are both given: pass one",
                              what, what);
    if (!list && num)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "filter: %s_modules is NULL but num_%s_modules is %zu", what,
                              what, num);
    if (pattern) {
        m->given = 1;
        status   = lorasync_pattern_compile(pattern, a, &m->pattern, err);
        if (status < 0) lorasynci_prefix(err, "filter: %s_pattern", what);
        return status;
    }
    if (!list) return LORASYNC_OK;
    LORASYNCI_TRY(lorasynci_modules_reserve(m, num, a, err));
    for (i = 0; i < num; i++) {
        if (!list[i] || !list[i][0])
            return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "filter: entry %zu of %s_modules is NULL or empty", i,
                                  what);
        LORASYNCI_TRY(lorasynci_modules_add(m, list[i], a, err));
    }
    return LORASYNC_OK;
}

/* 1 if the module is named; 0 also when there is no condition. */
LORASYNCI_FN int lorasynci_modules_match(lorasynci_modules *m, const char *module)
{
    const char *end = module;
    if (!m->given) return 0;
    if (m->pattern) return lorasync_pattern_matches(m->pattern, module);
    while (end) {
        if (lorasynci_table_find(&m->table, end, lorasynci_entry_of, m) != SIZE_MAX) return 1;
        end = m->exact ? NULL : strchr(end, '.');
        if (end) end++;
    }
    return 0;
}

/* -- matcher: "all-linear" */

LORASYNCI_FN int lorasynci_is_all_linear(const char *pattern)
{
    static const char word[] = "all-linear";
    size_t            i;
    if (!pattern || strlen(pattern) != sizeof word - 1) return 0;
    for (i = 0; i < sizeof word - 1; i++) {
        char c = pattern[i];
        if ((c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c) != word[i]) return 0;
    }
    return 1;
}

/* 1 if module is `name` or ends in "." and it. */
LORASYNCI_FN int lorasynci_ends_in(const char *module, const char *name)
{
    size_t n = strlen(module), k = strlen(name);
    return n >= k && strcmp(module + n - k, name) == 0 && (n == k || module[n - k - 1] == '.');
}

/* The output embedding to leave out: the given one, or the first usual one that exists, or NULL. */
LORASYNCI_FN const char *lorasynci_output_embedding(const char *given, const lorasync_module *modules, size_t num)
{
    static const char *const usual[] = {"lm_head", "embed_out", "output_layer", "score", "classifier"};
    size_t                   i, k;
    if (given) return given;
    for (k = 0; k < LORASYNCI_COUNT(usual); k++)
        for (i = 0; i < num; i++) /* heads of classifiers only at the top, as PEFT looks for them */
            if (k < 3 ? lorasynci_ends_in(modules[i].name, usual[k]) : strcmp(modules[i].name, usual[k]) == 0)
                return modules[i].name;
    return NULL;
}

LORASYNCI_FN lorasync_status lorasynci_modules_all_linear(lorasynci_modules *m, const lorasync_filter *f,
                                                          const lorasync_module *modules, size_t num,
                                                          const lorasync_allocator *a, lorasync_error *err)
{
    const char *output;
    size_t      i;
    for (i = 0; i < num; i++)
        if (!modules || !modules[i].name)
            return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_matcher_create: module %zu of %zu has no name", i,
                                  num);
    output   = lorasynci_output_embedding(f->output_embedding, modules, num);
    m->exact = 1;
    LORASYNCI_TRY(lorasynci_modules_reserve(m, num, a, err));
    for (i = 0; i < num; i++)
        if (modules[i].is_linear && !(output && lorasynci_ends_in(modules[i].name, output)))
            LORASYNCI_TRY(lorasynci_modules_add(m, modules[i].name, a, err));
    if (m->num) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_EMPTY,
                          "filter: \"all-linear\" finds no linear module but the output embedding among %zu", num);
}

/* -- matcher */

LORASYNCI_FN lorasync_status lorasynci_matcher_fill(lorasync_matcher *m, const lorasync_filter *f,
                                                    const lorasync_module *modules, size_t num_modules,
                                                    lorasync_error *err)
{
    if (f->base < 0 || f->base > 2)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "filter: base is %d, expected 0, 1 or 2", f->base);
    if (f->target_modules && f->num_target_modules == 0)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "filter: target_modules has no entry: pass NULL for all modules");
    m->base                 = f->base;
    m->skip_modules_to_save = f->skip_modules_to_save;
    if (lorasynci_is_all_linear(f->target_pattern) && !f->target_modules)
        LORASYNCI_TRY(lorasynci_modules_all_linear(&m->target, f, modules, num_modules, &m->a, err));
    else
        LORASYNCI_TRY(lorasynci_modules_make(&m->target, "target", f->target_pattern, f->target_modules,
                                             f->num_target_modules, &m->a, err));
    return lorasynci_modules_make(&m->exclude, "exclude", f->exclude_pattern, f->exclude_modules,
                                  f->num_exclude_modules, &m->a, err);
}

LORASYNC_API lorasync_status lorasync_matcher_create(const lorasync_filter *filter, const lorasync_module *modules,
                                                     size_t num_modules, const lorasync_allocator *allocator,
                                                     lorasync_matcher **out, lorasync_error *err)
{
    lorasync_filter    nothing;
    lorasync_allocator a;
    lorasync_matcher  *m;
    lorasync_status    status;
    if (out) *out = NULL;
    if (!out || !lorasynci_take_allocator(allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_matcher_create: out is NULL, or allocator is incomplete");
    memset(&nothing, 0, sizeof nothing);
    m = (lorasync_matcher *)lorasynci_alloc_array(&a, 1, sizeof *m);
    if (!m) return lorasynci_fail_memory(err, sizeof *m);
    m->a   = a;
    status = lorasynci_matcher_fill(m, filter ? filter : &nothing, modules, num_modules, err);
    if (status == LORASYNC_OK) *out = m;
    else lorasync_matcher_free(m);
    return status;
}

LORASYNC_API void lorasync_matcher_free(lorasync_matcher *matcher)
{
    lorasync_allocator a;
    if (!matcher) return;
    a = matcher->a;
    lorasynci_modules_free(&matcher->target, &a);
    lorasynci_modules_free(&matcher->exclude, &a);
    lorasynci_dealloc(&a, matcher);
}

LORASYNC_API int lorasync_matcher_takes(lorasync_matcher *matcher, const lorasync_name *name, const char *adapter)
{
    if (!matcher || !name) return 0;
    if (name->role == LORASYNC_ROLE_BASE)
        return matcher->base && !lorasynci_modules_match(&matcher->exclude, name->module);
    if (matcher->base == 2) return 0;
    if (adapter && name->adapter[0] && strcmp(name->adapter, adapter) != 0) return 0;
    if (name->role == LORASYNC_ROLE_MODULES_TO_SAVE || name->role == LORASYNC_ROLE_TRAINABLE_TOKENS)
        return !matcher->skip_modules_to_save;
    if (lorasynci_modules_match(&matcher->exclude, name->module)) return 0;
    return !matcher->target.given || lorasynci_modules_match(&matcher->target, name->module);
}

/* ------------------------------------------------------------------------------------------------------ >>layout -- */

/* Boxes and the rules by which trainers cut tensors. Everything is int64_t arithmetic on caller-given shapes; an
   impossible request becomes a box of len -1, which lorasynci_box_check turns into an error where the piece is used. */

/* No dimension of a scalar can be empty: none of it is an empty flat interval. */
LORASYNC_API lorasync_box lorasync_none(int ndim)
{
    lorasync_box b;
    memset(&b, 0, sizeof b);
    b.flat = ndim == 0;
    b.ndim = ndim == 0 ? 1 : ndim;
    return b;
}

LORASYNCI_FN lorasync_box lorasynci_impossible(int ndim)
{
    lorasync_box b = lorasync_none(ndim);
    b.len[0]       = -1;
    return b;
}

LORASYNC_API lorasync_box lorasync_whole(const int64_t *shape, int ndim)
{
    lorasync_box b = lorasync_none(ndim);
    int          d;
    if (ndim < 0 || ndim > LORASYNC_MAX_DIMS || (ndim > 0 && !shape)) return lorasynci_impossible(ndim);
    b.flat = 0;
    b.ndim = ndim;
    for (d = 0; d < ndim; d++) b.len[d] = shape[d];
    return b;
}

/* torch.chunk: rank r of n gets [c * r, c * (r + 1)) cut to [0, length), c = ceil(length / n). */
LORASYNCI_FN void lorasynci_chunk(int64_t length, int64_t rank, int64_t world, int64_t *off, int64_t *len)
{
    int64_t c = length / world + (length % world != 0);
    *off      = c != 0 && rank > length / c ? length : c * rank;
    if (*off > length) *off = length;
    *len = length - *off < c ? length - *off : c;
}

/* Dimension counted from 0, or -1 when the request cannot be met. */
LORASYNCI_FN int lorasynci_split_dim(const lorasync_box *box, int dim, int rank, int world)
{
    if (dim < 0) dim += box->ndim;
    if (box->flat || dim < 0 || dim >= box->ndim || dim >= LORASYNC_MAX_DIMS) return -1;
    if (world < 1 || rank < 0 || rank >= world || box->len[dim] < 0 || box->off[dim] > INT64_MAX - box->len[dim])
        return -1;
    return dim;
}

LORASYNC_API lorasync_box lorasync_shard(lorasync_box box, int dim, int rank, int world)
{
    int64_t off, len;
    dim = lorasynci_split_dim(&box, dim, rank, world);
    if (dim < 0) return lorasynci_impossible(box.ndim);
    lorasynci_chunk(box.len[dim], rank, world, &off, &len);
    box.off[dim] += off;
    box.len[dim] = len;
    return box;
}

LORASYNC_API lorasync_box lorasync_even(lorasync_box box, int dim, int rank, int world)
{
    int d = lorasynci_split_dim(&box, dim, rank, world);
    if (d < 0 || box.len[d] % world != 0) return lorasynci_impossible(box.ndim);
    return lorasync_shard(box, d, rank, world);
}

LORASYNC_API lorasync_box lorasync_range(lorasync_box box, int dim, int64_t off, int64_t len)
{
    int d = lorasynci_split_dim(&box, dim, 0, 1);
    if (d < 0 || off < 0 || len < 0 || off > box.len[d] || len > box.len[d] - off)
        return lorasynci_impossible(box.ndim);
    box.off[d] += off;
    box.len[d] = len;
    return box;
}

LORASYNC_API lorasync_box lorasync_flat(int64_t first, int64_t num_elements)
{
    lorasync_box b = lorasync_none(1);
    b.flat         = 1;
    b.off[0]       = first;
    b.len[0]       = first < 0 ? -1 : num_elements;
    return b;
}

LORASYNC_API lorasync_box lorasync_flat_shard(int64_t numel, int rank, int world)
{
    return lorasync_flat_part(0, numel, numel, rank, world).box;
}

/* *at rounded up to a multiple of `step`; 0 when that does not fit. */
LORASYNCI_FN int lorasynci_round_up(int64_t *at, int64_t step)
{
    int64_t rest = *at % step;
    if (rest == 0) return 1;
    if (*at > INT64_MAX - (step - rest)) return 0;
    *at += step - rest;
    return 1;
}

/* Puts one parameter of a flat buffer at *at (after alignment) and moves *at behind it. */
LORASYNCI_FN int lorasynci_flat_place(int64_t numel, int64_t alignment, int64_t *at, int64_t *start)
{
    if (numel < 0 || !lorasynci_round_up(at, alignment) || numel > INT64_MAX - *at) return 0;
    *start = *at;
    *at += numel;
    return 1;
}

LORASYNC_API int64_t lorasync_fsdp1_layout(const int64_t *numel, size_t num, int itemsize, int use_orig_params,
                                           int world, int64_t *start)
{
    int64_t at = 0, alignment;
    size_t  i;
    if (world < 1 || itemsize < 1 || itemsize > 16 || (num && (!numel || !start))) return -1;
    alignment = use_orig_params ? 16 / itemsize : 1;
    for (i = 0; i < num; i++)
        if (!lorasynci_flat_place(numel[i], alignment, &at, &start[i])) return -1;
    return lorasynci_round_up(&at, use_orig_params ? world : 1) ? at : -1;
}

LORASYNC_API int64_t lorasync_megatron_layout(const int64_t *numel, size_t num, int high_busbw, int world,
                                              int64_t *start)
{
    int64_t at = 0, unit = high_busbw ? 65536 : 128, a = world, b = unit;
    size_t  i;
    if (world < 1 || (num && (!numel || !start))) return -1;
    for (i = num; i-- > 0;)
        if (!lorasynci_flat_place(numel[i], 64, &at, &start[i])) return -1;
    while (b) { /* a becomes gcd(world, unit) */
        int64_t t = a % b;
        a         = b;
        b         = t;
    }
    return lorasynci_round_up(&at, world / a * unit) ? at : -1;
}

LORASYNC_API lorasync_flat_piece lorasync_flat_part(int64_t start, int64_t numel, int64_t total, int rank, int world)
{
    lorasync_flat_piece p;
    int64_t             off, len, first, last;
    p.box      = lorasync_flat(0, -1);
    p.in_shard = 0;
    if (world < 1 || rank < 0 || rank >= world || start < 0 || numel < 0 || total < start || numel > total - start)
        return p;
    lorasynci_chunk(total, rank, world, &off, &len);
    first = off > start ? off : start;
    last  = off + len < start + numel ? off + len : start + numel;
    if (first < last) {
        p.box      = lorasync_flat(first - start, last - first);
        p.in_shard = first - off;
    } else {
        p.box = lorasync_flat(numel, 0);
    }
    return p;
}

/* -- what the planner needs */

/* *out = product of shape, or 0 when a dimension is negative or the product passes INT64_MAX. */
LORASYNCI_FN int lorasynci_numel(const int64_t *shape, int ndim, int64_t *out)
{
    int64_t n = 1;
    int     d;
    for (d = 0; d < ndim; d++) {
        if (shape[d] < 0 || (shape[d] != 0 && n > INT64_MAX / shape[d])) return 0;
        n *= shape[d];
    }
    *out = n;
    return 1;
}

LORASYNCI_FN int64_t lorasynci_box_numel(const int64_t *len, int ndim)
{
    int64_t n = 1;
    int     d;
    for (d = 0; d < ndim; d++) n *= len[d];
    return n;
}

/* "[0:4, 16:32]" into text. The box may be any: the sum must not overflow. */
LORASYNCI_FN const char *lorasynci_box_text(const int64_t *off, const int64_t *len, int ndim, char *text, size_t size)
{
    size_t n = 0;
    int    d;
    text[0] = 0;
    for (d = 0; d < ndim && n + 48 < size; d++)
        n += (size_t)snprintf(text + n, size - n, "%s%lld:%lld", d ? ", " : "[", (long long)off[d],
                              (long long)((uint64_t)off[d] + (uint64_t)len[d]));
    snprintf(text + n, size - n, ndim ? "]" : "[]");
    return text;
}

LORASYNCI_FN const char *lorasynci_shape_text(const int64_t *shape, int ndim, char *text, size_t size)
{
    size_t n = 0;
    int    d;
    text[0] = 0;
    for (d = 0; d < ndim && n + 24 < size; d++)
        n += (size_t)snprintf(text + n, size - n, "%s%lld", d ? ", " : "[", (long long)shape[d]);
    snprintf(text + n, size - n, ndim ? "]" : "[]");
    return text;
}

/* Whether a piece's box lies inside its shape. */
LORASYNCI_FN lorasync_status lorasynci_box_check(const lorasync_piece *p, lorasync_error *err)
{
    const lorasync_box *b = &p->box;
    int64_t             numel, extent;
    int                 d;
    char                shape[128], box[256];
    if (p->ndim < 0 || p->ndim > LORASYNC_MAX_DIMS)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: ndim is %d, must be 0 to %d", p->name, p->ndim,
                              LORASYNC_MAX_DIMS);
    if (!lorasynci_numel(p->shape, p->ndim, &numel))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: shape %s is negative or its product passes 2^63",
                              p->name, lorasynci_shape_text(p->shape, p->ndim, shape, sizeof shape));
    if (b->ndim != (b->flat ? 1 : p->ndim))
        return lorasynci_fail(
            err, LORASYNC_E_LAYOUT,
            "%.200s: the box has %d dimensions, the tensor %d; make it from lorasync_whole(p.shape, p.ndim)", p->name,
            b->ndim, p->ndim);
    for (d = 0; d < b->ndim; d++) {
        extent = b->flat ? numel : p->shape[d];
        if (b->len[d] < 0)
            return lorasynci_fail(
                err, LORASYNC_E_LAYOUT,
                "%.200s: the box is impossible (a dimension or rank out of range, or an even split that does not "
                "divide %s); check the arguments of the layout function",
                p->name, lorasynci_shape_text(p->shape, p->ndim, shape, sizeof shape));
        if (b->off[d] < 0 || b->off[d] > extent || b->len[d] > extent - b->off[d])
            return lorasynci_fail(err, LORASYNC_E_LAYOUT, "%.200s: %s %.150s does not lie in shape %s", p->name,
                                  b->flat ? "flat interval" : "box",
                                  lorasynci_box_text(b->off, b->len, b->ndim, box, sizeof box),
                                  lorasynci_shape_text(p->shape, p->ndim, shape, sizeof shape));
    }
    return LORASYNC_OK;
}

/* Cuts the flat interval [first, first + num) of a row-major tensor into boxes, in order, and calls `emit` for each
   with the number of elements before it in the interval. At most 2 * ndim - 1 boxes: the tail of an inner row, whole
   rows, the head of the last.

       first = 3, num = 9 of [3, 5]:   . . . a a      a: [0:1, 3:5] at 0
                                       b b b b b      b: [1:2, 0:5] at 2
                                       c c . . .      c: [2:3, 0:2] at 7                                              */
typedef lorasync_status (*lorasynci_emit_box)(void *user, const int64_t *off, const int64_t *len, int64_t before);

LORASYNCI_FN lorasync_status lorasynci_flat_boxes(const int64_t *shape, int ndim, int64_t first, int64_t num,
                                                  lorasynci_emit_box emit, void *user)
{
    int64_t off[LORASYNC_MAX_DIMS] = {0}, len[LORASYNC_MAX_DIMS], done = 0;
    while (done < num) {
        int64_t at = first + done, inner = 1, take;
        int     d, k;
        /* the coarsest dimension k whose rows both start here and fit in what is left; inner = elements below it */
        for (k = ndim - 1; k > 0 && at % (inner * shape[k]) == 0 && num - done >= inner * shape[k]; k--)
            inner *= shape[k];
        for (d = ndim - 1; d >= 0; d--) {
            off[d] = at % shape[d];
            at /= shape[d];
            len[d] = d > k ? shape[d] : 1;
        }
        if (ndim > 0) {
            take   = (num - done) / inner;
            len[k] = take < shape[k] - off[k] ? take : shape[k] - off[k];
        }
        LORASYNCI_TRY(emit(user, off, len, done));
        done += ndim > 0 ? len[k] * inner : 1;
    }
    return LORASYNC_OK;
}

/* --------------------------------------------------------------------------------------------------------- >>gpu -- */

/* Memory that somebody else has made, opened here; and, with LORASYNC_CUDA, a GPU: its stream, events and kernel, one
   way to wait for it, its memory. Comm, move, shm, engine and session have their part of CUDA from here. Uses
   >>support. Without LORASYNC_CUDA there are windows onto host memory, and a GPU cannot be opened. */

#ifdef LORASYNC_CUDA
#include <cuda.h>
#include <cuda_runtime_api.h>
#endif

/* Device memory, as another rank or process needs to know it to open it. Sent as it is. */
typedef struct lorasynci_device_offer {
    uint64_t process; /* whose it is: lorasynci_process_self */
    uint64_t pointer; /* its address there */
    int32_t  ordinal; /* its GPU there */
    int32_t  unused;
    char     handle[64]; /* for CUDA IPC */
} lorasynci_device_offer;

/* -- windows: the one way in which memory of another rank, process or transport is open here

       who made it               what is offered            opened by                   kind       close
       any process of the host   a name, or its file        lorasynci_window_name, map  MAPPED     munmap
       a thread of this process  lorasynci_device_offer     lorasynci_window_device     OWN        nothing
       another process           lorasynci_device_offer     lorasynci_window_device     IMPORTED   cudaIpcCloseMemHandle

   A window is all zero while it is closed. Whoever shares one among several counts them in num_users, and closes it
   when that is 0. Device memory must not be freed by its maker while a window onto it is open: those who make it and
   those who open it tell each other (LORASYNCI_HOLDS in plans, `opened` in shared memory). */
typedef enum lorasynci_window_kind {
    LORASYNCI_WINDOW_CLOSED = 0,
    LORASYNCI_WINDOW_MAPPED,
    LORASYNCI_WINDOW_OWN,
    LORASYNCI_WINDOW_IMPORTED
} lorasynci_window_kind;

typedef struct lorasynci_window {
    char                 *address;   /* NULL: closed */
    size_t                num_bytes; /* of a mapping; of device memory only its maker knows */
    lorasynci_window_kind kind;
    int                   num_users;
} lorasynci_window;

/* Maps num_bytes of a file from its beginning, which stays mapped when fd is closed. 0 or an errno. `protection` and
   `flags` are mmap's; MAP_SHARED is added. */
LORASYNCI_FN int lorasynci_window_map(lorasynci_window *w, int fd, size_t num_bytes, int protection, int flags)
{
    void *map;
    LORASYNC_ASSERT(w->kind == LORASYNCI_WINDOW_CLOSED);
    map = mmap(NULL, num_bytes, protection, flags | MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) return errno;
    w->address   = (char *)map;
    w->num_bytes = num_bytes;
    w->kind      = LORASYNCI_WINDOW_MAPPED;
    return 0;
}

/* Shared memory of one name, to read and write; `create` makes it. 0 when it cannot be had, which only means that
   another way is taken. The memory is reserved at once, so that a small /dev/shm refuses here and not by a bus error
   later. */
LORASYNCI_FN int lorasynci_window_name(lorasynci_window *w, const char *name, size_t num_bytes, int create)
{
    int fd     = shm_open(name, create ? O_RDWR | O_CREAT | O_EXCL : O_RDWR, 0600);
    int opened = 0;
    if (fd < 0) return 0;
    if (num_bytes <= (size_t)INT64_MAX && (!create || posix_fallocate(fd, 0, (off_t)num_bytes) == 0))
        opened = lorasynci_window_map(w, fd, num_bytes, PROT_READ | PROT_WRITE, 0) == 0;
    close(fd);
    if (!opened && create) shm_unlink(name);
    return opened;
}

/* The GPU onto whose memory it is open, if it is, must be current. Closing a closed one does nothing. */
LORASYNCI_FN void lorasynci_window_close(lorasynci_window *w)
{
    if (w->kind == LORASYNCI_WINDOW_MAPPED) munmap(w->address, w->num_bytes);
#ifdef LORASYNC_CUDA
    if (w->kind == LORASYNCI_WINDOW_IMPORTED) cudaIpcCloseMemHandle(w->address);
#endif
    memset(w, 0, sizeof *w);
}

/* -- a GPU */

typedef struct lorasynci_gpu lorasynci_gpu;

#ifdef LORASYNC_CUDA

/* An opened GPU. Its calls are made between lorasynci_gpu_enter and lorasynci_gpu_leave. */
struct lorasynci_gpu {
    int          ordinal;
    pid_t        pid;     /* of the process that opened it: a fork cannot use its parent's */
    int          is_busy; /* launches may still run at the end, so the kernel is not unloaded under them */
    cudaStream_t caller;  /* whose work ours must wait for */
    cudaStream_t stream;  /* ours */
    cudaEvent_t  ready;   /* on the caller's stream: what it has enqueued has ended */
    cudaEvent_t  done;    /* the same on ours */
    CUmodule     module;  /* NULL: opened without the kernel */
    CUfunction   kernel;
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                       void **, void **);
    CUresult (*unload)(CUmodule);
};

/* The kernel's text, below. */
LORASYNCI_FN const char *const *lorasynci_ptx_parts(size_t *num);

LORASYNCI_FN lorasync_status lorasynci_cuda_fail(lorasync_error *err, cudaError_t e, const char *what)
{
    (void)cudaGetLastError(); /* handled here: not left behind for the caller's next check */
    return lorasynci_fail(err, e == cudaErrorMemoryAllocation ? LORASYNC_E_MEMORY : LORASYNC_E_CUDA,
                          "CUDA: %s: %s (%s)", what, cudaGetErrorString(e), cudaGetErrorName(e));
}

#define LORASYNCI_CUDA(call, what)                                                                                     \
    do {                                                                                                               \
        cudaError_t lorasynci_cuda_ = (call);                                                                          \
        if (lorasynci_cuda_ != cudaSuccess) return lorasynci_cuda_fail(err, lorasynci_cuda_, what);                    \
    } while (0)

/* Makes a GPU the current one of this thread; returns the one that was, for lorasynci_gpu_leave. */
LORASYNCI_FN int lorasynci_gpu_enter(int ordinal)
{
    int old = ordinal;
    cudaGetDevice(&old);
    if (old != ordinal) cudaSetDevice(ordinal);
    return old;
}

LORASYNCI_FN void lorasynci_gpu_leave(int ordinal, int old)
{
    if (old != ordinal) cudaSetDevice(old);
}

LORASYNCI_FN lorasync_status lorasynci_gpu_event(cudaEvent_t *out, lorasync_error *err)
{
    LORASYNCI_CUDA(cudaEventCreateWithFlags(out, cudaEventDisableTiming), "cudaEventCreate");
    return LORASYNC_OK;
}

/* -- waiting for a GPU */

enum {
    LORASYNCI_GPU_SPINS       = 20000, /* a run takes microseconds: look again at once, so many times */
    LORASYNCI_GPU_PATIENCE_MS = 60000  /* for work that no other rank takes part in */
};

/* Waits for an event, or, where that is NULL, for all that is on a stream; a NULL stream has nothing. Never blocks
   inside CUDA. Then *out is cudaSuccess; or cudaErrorNotReady when the deadline came first; or what the work failed
   with. `check` (or NULL) is called with `user` now and then, and once when the work has ended: what ended because a
   communicator broke is no success. Only its failure is this function's. */
LORASYNCI_FN lorasync_status lorasynci_gpu_wait(cudaEvent_t event, cudaStream_t stream, uint64_t deadline_ns,
                                                lorasync_status (*check)(void *user, lorasync_error *err), void *user,
                                                cudaError_t *out, lorasync_error *err)
{
    unsigned turns, idle = 0;
    *out = cudaSuccess;
    if (!event && !stream) return LORASYNC_OK;
    for (turns = 1;; turns++) {
        cudaError_t e = event ? cudaEventQuery(event) : cudaStreamQuery(stream);
        if (e != cudaErrorNotReady) {
            *out = e;
            return e == cudaSuccess && check ? check(user, err) : LORASYNC_OK;
        }
        if (turns % 64 != 0 && !idle) continue;
        if (check && (turns % 4096 == 0 || idle > LORASYNCI_YIELDS)) LORASYNCI_TRY(check(user, err));
        if (lorasynci_now_ns() >= deadline_ns) {
            *out = e;
            return LORASYNC_OK;
        }
        if (turns > LORASYNCI_GPU_SPINS) lorasynci_pause(&idle); /* others, NCCL's threads too, want the CPU */
    }
}

/* Waits until all that is on its stream has ended. */
LORASYNCI_FN lorasync_status lorasynci_gpu_drain(const lorasynci_gpu *g, const char *what, lorasync_error *err)
{
    cudaError_t e;
    LORASYNCI_CUDA(cudaEventRecord(g->done, g->stream), "cudaEventRecord");
    LORASYNCI_TRY(
        lorasynci_gpu_wait(g->done, NULL, lorasynci_deadline_ns(LORASYNCI_GPU_PATIENCE_MS), NULL, NULL, &e, err));
    if (e == cudaErrorNotReady)
        return lorasynci_fail(err, LORASYNC_E_CUDA,
                              "CUDA: %s: not ended after %d ms; is the GPU, or the stream that it waits for, stuck?",
                              what, LORASYNCI_GPU_PATIENCE_MS);
    return e == cudaSuccess ? LORASYNC_OK : lorasynci_cuda_fail(err, e, what);
}

/* -- opening a GPU, and the kernel */

LORASYNCI_FN cudaError_t lorasynci_driver(const char *name, unsigned version, void *function)
{
    void                                *p     = NULL;
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaError_t                          e;
#if CUDART_VERSION >= 12050
    e = cudaGetDriverEntryPointByVersion(name, &p, version, cudaEnableDefault, &found);
#else
    (void)version;
    e = cudaGetDriverEntryPoint(name, &p, cudaEnableDefault, &found);
#endif
    if (e == cudaSuccess && (found != cudaDriverEntryPointSuccess || !p)) e = cudaErrorSymbolNotFound;
    if (e == cudaSuccess) memcpy(function, &p, sizeof p);
    return e;
}

/* The kernel from its text, compiled by the driver, which keeps what it has compiled: later ones are cheap. */
LORASYNCI_FN lorasync_status lorasynci_gpu_load(lorasynci_gpu *g, const lorasync_allocator *a, lorasync_error *err)
{
    CUresult (*load)(CUmodule *, const void *)                 = NULL;
    CUresult (*function)(CUfunction *, CUmodule, const char *) = NULL;
    const char *const *parts;
    lorasynci_buffer   text;
    CUresult           r;
    size_t             i, num;
    LORASYNCI_CUDA(lorasynci_driver("cuModuleLoadData", 2000, &load), "driver entry point cuModuleLoadData");
    LORASYNCI_CUDA(lorasynci_driver("cuModuleGetFunction", 2000, &function), "driver entry point cuModuleGetFunction");
    LORASYNCI_CUDA(lorasynci_driver("cuLaunchKernel", 4000, &g->launch), "driver entry point cuLaunchKernel");
    LORASYNCI_CUDA(lorasynci_driver("cuModuleUnload", 2000, &g->unload), "driver entry point cuModuleUnload");
    lorasynci_buffer_init(&text, a);
    for (parts = lorasynci_ptx_parts(&num), i = 0; i < num; i++) lorasynci_put_text(&text, parts[i]);
    lorasynci_put(&text, "", 1);
    r = text.failed ? CUDA_ERROR_OUT_OF_MEMORY : load(&g->module, text.data);
    lorasynci_buffer_free(&text);
    if (text.failed) return lorasynci_fail_memory(err, text.size);
    if (r == CUDA_SUCCESS) r = function(&g->kernel, g->module, "lorasyncd_copy");
    if (r != CUDA_SUCCESS)
        return lorasynci_fail(
            err, LORASYNC_E_CUDA,
            "the GPU driver did not take the kernel (CUresult %d); is just-in-time compilation disabled "
            "(CUDA_DISABLE_PTX_JIT)?",
            (int)r);
    return LORASYNC_OK;
}

/* Launches the kernel: `num` tiles, a block of `threads` each, over operations; all tables in device memory. *bad gets
   the smallest element that is not finite. What an operation marks as in the image lies image_shift bytes further. */
LORASYNCI_FN CUresult lorasynci_gpu_launch(const lorasynci_gpu *g, const void *ops, const void *tiles, unsigned num,
                                           unsigned threads, void *bad, unsigned long long image_shift,
                                           cudaStream_t stream)
{
    void *parameters[4];
    LORASYNC_ASSERT(g->module && num > 0);
    parameters[0] = &ops;
    parameters[1] = &tiles;
    parameters[2] = &bad;
    parameters[3] = &image_shift;
    return g->launch(g->kernel, num, 1, 1, threads, 1, 1, 0, stream, parameters, NULL);
}

/* Waits for nothing. NULL is allowed. */
LORASYNCI_FN void lorasynci_gpu_close(const lorasync_allocator *a, lorasynci_gpu *g)
{
    if (!g) return;
    if (g->pid == getpid()) {
        int old = lorasynci_gpu_enter(g->ordinal);
        if (g->ready) cudaEventDestroy(g->ready);
        if (g->done) cudaEventDestroy(g->done);
        if (g->stream) cudaStreamDestroy(g->stream);
        if (g->module && !g->is_busy) g->unload(g->module);
        lorasynci_gpu_leave(g->ordinal, old);
        (void)cudaGetLastError();
    }
    lorasynci_dealloc(a, g);
}

LORASYNCI_FN lorasync_status lorasynci_gpu_fill(lorasynci_gpu *g, const lorasync_allocator *a, int with_kernel,
                                                lorasync_error *err)
{
    LORASYNCI_CUDA(cudaGetDevice(&g->ordinal), "no usable GPU");
    LORASYNCI_CUDA(cudaFree(NULL), "no usable GPU"); /* makes the context current */
    if (with_kernel) LORASYNCI_TRY(lorasynci_gpu_load(g, a, err));
    LORASYNCI_CUDA(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking), "cudaStreamCreate");
    LORASYNCI_TRY(lorasynci_gpu_event(&g->ready, err));
    return lorasynci_gpu_event(&g->done, err);
}

/* Opens the current GPU, with the kernel where it is wanted. `what` is the field that asks for it. *out is NULL after
   a failure. */
LORASYNCI_FN lorasync_status lorasynci_gpu_open(const lorasync_allocator *a, struct CUstream_st *caller,
                                                int with_kernel, const char *what, lorasynci_gpu **out,
                                                lorasync_error *err)
{
    lorasynci_gpu  *g = (lorasynci_gpu *)lorasynci_alloc_array(a, 1, sizeof *g);
    lorasync_status status;
    *out = NULL;
    if (!g) return lorasynci_fail_memory(err, sizeof *g);
    g->caller = caller;
    g->pid    = getpid();
    status    = lorasynci_gpu_fill(g, a, with_kernel, err);
    if (status < 0) {
        lorasynci_prefix(err, "%s", what);
        lorasynci_gpu_close(a, g);
        return status;
    }
    *out = g;
    return LORASYNC_OK;
}

/* Whether two are on one GPU, or both none. */
LORASYNCI_FN int lorasynci_gpu_is_same(const lorasynci_gpu *a, const lorasynci_gpu *b)
{
    return a && b ? a->ordinal == b->ordinal : !a && !b;
}

/* Whether the caller's stream is being captured into a CUDA graph now. */
LORASYNCI_FN int lorasynci_gpu_is_captured(const lorasynci_gpu *g)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    return g && cudaStreamIsCapturing(g->caller, &capture) == cudaSuccess && capture == cudaStreamCaptureStatusActive;
}

/* -- its memory */

/* num_bytes of device memory, or of pinned host memory; of 0 bytes none (*out is NULL then). */
LORASYNCI_FN lorasync_status lorasynci_gpu_alloc(int pinned, size_t num_bytes, char **out, const char *what,
                                                 lorasync_error *err)
{
    *out = NULL;
    if (!num_bytes) return LORASYNC_OK;
    if (pinned) LORASYNCI_CUDA(cudaHostAlloc((void **)out, num_bytes, cudaHostAllocPortable), what);
    else LORASYNCI_CUDA(cudaMalloc((void **)out, num_bytes), what);
    return LORASYNC_OK;
}

/* NULL is allowed. */
LORASYNCI_FN void lorasynci_gpu_free(int pinned, char *memory)
{
    if (pinned) cudaFreeHost(memory);
    else cudaFree(memory);
    (void)cudaGetLastError();
}

enum {
    LORASYNCI_OFFER_LEAST = 2 << 20 /* bytes: what is smaller may share its block with memory that is not offered */
};

/* What another rank needs to open `memory`, of at least LORASYNCI_OFFER_LEAST bytes. Where there is no IPC only this
   process can. */
LORASYNCI_FN void lorasynci_gpu_offer(const lorasynci_gpu *g, char *memory, lorasynci_device_offer *out)
{
    out->process = lorasynci_process_self();
    out->pointer = (uint64_t)(uintptr_t)memory;
    out->ordinal = g->ordinal;
    if (cudaIpcGetMemHandle((cudaIpcMemHandle_t *)(void *)out->handle, memory) != cudaSuccess) (void)cudaGetLastError();
}

/* Memory of this process, on this GPU or on another one that it can access. */
LORASYNCI_FN lorasync_status lorasynci_window_own(lorasynci_window *w, const lorasynci_gpu *g,
                                                  const lorasynci_device_offer *offer, lorasync_error *err)
{
    int         can = 1;
    cudaError_t e   = cudaSuccess;
    if (offer->ordinal != g->ordinal) {
        e = cudaDeviceCanAccessPeer(&can, g->ordinal, offer->ordinal);
        if (e == cudaSuccess && can) e = cudaDeviceEnablePeerAccess(offer->ordinal, 0);
        (void)cudaGetLastError();
        if (e == cudaErrorPeerAccessAlreadyEnabled) e = cudaSuccess;
    }
    if (!can || e != cudaSuccess)
        return lorasynci_fail(err, LORASYNC_E_CUDA, "it is on GPU %d, which GPU %d cannot access; use GPU %d",
                              (int)offer->ordinal, g->ordinal, (int)offer->ordinal);
    w->address = (char *)(uintptr_t)offer->pointer;
    w->kind    = LORASYNCI_WINDOW_OWN;
    return LORASYNC_OK;
}

/* Opens device memory for a GPU, which must be current. A failure says what stands in the way, not whose memory it
   is. */
LORASYNCI_FN lorasync_status lorasynci_window_device(lorasynci_window *w, const lorasynci_gpu *g,
                                                     const lorasynci_device_offer *offer, lorasync_error *err)
{
    void       *p = NULL;
    cudaError_t e;
    LORASYNC_ASSERT(w->kind == LORASYNCI_WINDOW_CLOSED);
    if (offer->process == lorasynci_process_self()) return lorasynci_window_own(w, g, offer, err);
    e = cudaIpcOpenMemHandle(&p, *(const cudaIpcMemHandle_t *)(const void *)offer->handle,
                             cudaIpcMemLazyEnablePeerAccess);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        return lorasynci_fail(
            err, LORASYNC_E_CUDA,
            "it cannot be opened over CUDA IPC: %s (%s); GPU %d must be the one that it is on or have peer access to "
            "it, and both processes must share host, user and IPC namespace",
            cudaGetErrorString(e), cudaGetErrorName(e), g->ordinal);
    }
    w->address = (char *)p;
    w->kind    = LORASYNCI_WINDOW_IMPORTED;
    return LORASYNC_OK;
}

#else /* without CUDA: what asks for a GPU is refused, so there never is one */

LORASYNCI_FN lorasync_status lorasynci_gpu_open(const lorasync_allocator *a, struct CUstream_st *caller,
                                                int with_kernel, const char *what, lorasynci_gpu **out,
                                                lorasync_error *err)
{
    (void)a, (void)caller, (void)with_kernel;
    *out = NULL;
    return lorasynci_fail(
        err, LORASYNC_E_UNSUPPORTED,
        "%s is set, but this library was compiled without LORASYNC_CUDA; define it beside LORASYNC_IMPLEMENTATION",
        what);
}

LORASYNCI_FN void            lorasynci_gpu_close(const lorasync_allocator *a, lorasynci_gpu *g) { (void)a, (void)g; }
LORASYNCI_FN int             lorasynci_gpu_is_same(const lorasynci_gpu *a, const lorasynci_gpu *b) { return a == b; }
LORASYNCI_FN int             lorasynci_gpu_is_captured(const lorasynci_gpu *g) { return g != NULL; }
LORASYNCI_FN void            lorasynci_gpu_free(int pinned, char *memory) { (void)pinned, (void)memory; }
LORASYNCI_FN lorasync_status lorasynci_gpu_alloc(int pinned, size_t num_bytes, char **out, const char *what,
                                                 lorasync_error *err)
{
    (void)pinned, (void)num_bytes, (void)out, (void)what, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}

#endif


/* -------------------------------------------------------------------------------------------------------- >>comm -- */

/* Solo, and local: ranks of one host that talk through one shared mapping. */

#ifdef MAP_NORESERVE
#define LORASYNCI_NORESERVE MAP_NORESERVE
#else
#define LORASYNCI_NORESERVE 0
#endif

LORASYNCI_FN lorasync_status lorasynci_solo_all_gather(void *user, const void *in, void *out, size_t num_bytes,
                                                       int timeout_ms, lorasync_error *err)
{
    (void)user, (void)timeout_ms, (void)err;
    memcpy(out, in, num_bytes);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_solo_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                                     const lorasync_message *receives, size_t num_receives,
                                                     int timeout_ms, lorasync_error *err)
{
    (void)user, (void)sends, (void)receives, (void)timeout_ms;
    if (num_sends || num_receives)
        return lorasynci_fail(err, LORASYNC_E_COMM, "a solo communicator has no peer to talk to");
    return LORASYNC_OK;
}

LORASYNC_API lorasync_comm lorasync_solo(void)
{
    lorasync_comm c;
    memset(&c, 0, sizeof c);
    c.size       = sizeof c;
    c.world      = 1;
    c.all_gather = lorasynci_solo_all_gather;
    c.exchange   = lorasynci_solo_exchange;
    return c;
}

/* A comm to keep: fields that the caller's version of the struct does not have are NULL. NULL is solo. */
LORASYNCI_FN lorasync_comm lorasynci_comm_copy(const lorasync_comm *given)
{
    lorasync_comm c = lorasync_solo();
    if (given) {
        memset(&c, 0, sizeof c);
        memcpy(&c, given, given->size < sizeof c ? given->size : sizeof c);
    }
    return c;
}

LORASYNCI_FN int lorasynci_comm_ok(const lorasync_comm *c)
{
    return !c || (c->size >= offsetof(lorasync_comm, abort) && c->all_gather && c->exchange && c->world >= 1 &&
                  c->rank >= 0 && c->rank < c->world);
}

/* What every desc of the host program has: its communicator and its allocator. */
LORASYNCI_FN lorasync_status lorasynci_check_host(const lorasync_comm *comm, const lorasync_allocator *allocator,
                                                  lorasync_allocator *out, lorasync_error *err)
{
    if (!lorasynci_comm_ok(comm))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "the comm is not filled in: size, rank, world, all_gather and exchange are needed");
    if (!lorasynci_take_allocator(allocator, out))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "the allocator has one function; give both or neither");
    return LORASYNC_OK;
}

/* Wakes the others after a failure, where the communicator can. At most once per communicator. */
LORASYNCI_FN void lorasynci_comm_abort(const lorasync_comm *c, const char *why)
{
    if (c->abort) c->abort(c->user, why);
}

/* The shared mapping of a local communicator. One rank writes each cache line; the other side only reads it.

       | shared head | rank 0 | rank 1 | ... | channel 0>0 | channel 0>1 | ... | channel n>n |

   A channel carries bytes one way between two ranks, in messages; its sender owns `sent`, its receiver `taken`, both
   counting chunks:

       chunks  [ chunk 4 ][ chunk 5 ][ chunk 2 ][ chunk 3 ]      sent = 6, taken = 2: full
       sizes   [  65536  ][  1200   ][  65536  ][  65536  ]

   The first chunk of a message begins with its size, so that a receiver that expects another size can say so. */
enum {
    LORASYNCI_CHUNK     = 65536,
    LORASYNCI_RING      = 4,
    LORASYNCI_MAX_LOCAL = 256
};

typedef struct lorasynci_channel {
    uint64_t sent;
    char     pad0[56];
    uint64_t taken;
    char     pad1[56];
    uint32_t sizes[LORASYNCI_RING];
    char     pad2[48];
    char     chunks[LORASYNCI_RING][LORASYNCI_CHUNK];
} lorasynci_channel;

typedef struct lorasynci_local_rank {
    uint64_t process; /* see lorasynci_process_self */
    int32_t  joined;  /* 1 once a rank has taken this place, 2 once `process` is written */
    char     pad[52];
} lorasynci_local_rank;

typedef struct lorasynci_local_head {
    int32_t aborted; /* 0 no, 1 being written, 2 why is readable */
    char    why[252];
} lorasynci_local_head;

/* Private to each process (threads share one): the mapping, and one seat per rank that joined from here. */
typedef struct lorasynci_seat {
    lorasync_local *local;
    int             rank;
    uint64_t        looked_ns; /* when lorasynci_local_healthy last looked at the processes */
} lorasynci_seat;

struct lorasync_local {
    lorasynci_local_head *head; /* start of the mapping */
    lorasynci_local_rank *ranks;
    lorasynci_channel    *channels;
    size_t                num_bytes;
    int                   world;
    lorasynci_seat       *seats; /* world of them */
};

LORASYNCI_FN lorasynci_channel *lorasynci_local_channel(const lorasync_local *l, int from, int to)
{
    return &l->channels[(size_t)from * (size_t)l->world + (size_t)to];
}

LORASYNC_API lorasync_status lorasync_local_open(int world, lorasync_local **out, lorasync_error *err)
{
    lorasync_local *l;
    size_t          at = sizeof(lorasynci_local_head), size;
    void           *map;
    if (!out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_local_open: out is NULL");
    *out = NULL;
    if (world < 1 || world > LORASYNCI_MAX_LOCAL)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "world is %d, must be 1 to %d", world,
                              (int)LORASYNCI_MAX_LOCAL);
    at += (size_t)world * sizeof(lorasynci_local_rank);
    at   = (at + 4095) / 4096 * 4096;
    size = at + (size_t)world * (size_t)world * sizeof(lorasynci_channel);
    l    = (lorasync_local *)calloc(1, sizeof *l + (size_t)world * sizeof(lorasynci_seat));
    if (!l) return lorasynci_fail_memory(err, sizeof *l);
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | LORASYNCI_NORESERVE, -1, 0);
    if (map == MAP_FAILED) {
        free(l);
        return lorasynci_fail(err, LORASYNC_E_MEMORY, "no shared memory of %zu bytes for %d ranks: %s", size, world,
                              strerror(errno));
    }
    l->head      = (lorasynci_local_head *)map;
    l->ranks     = (lorasynci_local_rank *)(void *)((char *)map + sizeof(lorasynci_local_head));
    l->channels  = (lorasynci_channel *)(void *)((char *)map + at);
    l->num_bytes = size;
    l->world     = world;
    l->seats     = (lorasynci_seat *)(void *)(l + 1);
    *out         = l;
    return LORASYNC_OK;
}

LORASYNC_API void lorasync_local_close(lorasync_local *local)
{
    if (!local) return;
    munmap(local->head, local->num_bytes);
    free(local);
}

LORASYNCI_FN void lorasynci_local_abort(void *user, const char *why)
{
    lorasynci_seat       *seat = (lorasynci_seat *)user;
    lorasynci_local_head *head = seat->local->head;
    int32_t               none = 0;
    if (__atomic_compare_exchange_n(&head->aborted, &none, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        snprintf(head->why, sizeof head->why, "rank %d: %s", seat->rank, why);
        __atomic_store_n(&head->aborted, 2, __ATOMIC_RELEASE);
    }
}

LORASYNCI_FN lorasync_status lorasynci_local_given_up(const lorasynci_seat *seat, lorasync_error *err)
{
    const lorasynci_local_head *head = seat->local->head;
    if (__atomic_load_n(&head->aborted, __ATOMIC_ACQUIRE) != 2) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_COMM, "the communicator was given up by %.240s", head->why);
}

/* Why a wait for `peer` cannot succeed any more, or LORASYNC_OK. Called now and then while waiting. */
LORASYNCI_FN lorasync_status lorasynci_local_check(const lorasynci_seat *seat, int peer, uint64_t deadline_ns,
                                                   lorasync_error *err)
{
    const lorasync_local       *l = seat->local;
    const lorasynci_local_rank *r = &l->ranks[peer];
    LORASYNCI_TRY(lorasynci_local_given_up(seat, err));
    if (__atomic_load_n(&r->joined, __ATOMIC_ACQUIRE) == 2 &&
        lorasynci_process_ended(r->process, l->ranks[seat->rank].process))
        return lorasynci_fail(err, LORASYNC_E_PEER,
                              "rank %d (process %ld) is gone; restart it, make a new communicator and open again", peer,
                              lorasynci_process_pid(r->process));
    if (lorasynci_now_ns() >= deadline_ns)
        return lorasynci_fail(
            err, LORASYNC_E_TIMEOUT, "rank %d did not answer rank %d before the deadline%s", peer, seat->rank,
            __atomic_load_n(&r->joined, __ATOMIC_ACQUIRE) ? "; did it make the same call?" : "; it never joined");
    return LORASYNC_OK;
}

/* One message on its way. at counts the bytes moved, and 8 more for the size in front. */
typedef struct lorasynci_flow {
    lorasynci_channel *channel;
    char              *data;
    uint64_t           num_bytes, at, total;
    int                peer;
} lorasynci_flow;

LORASYNCI_FN lorasynci_flow lorasynci_flow_start(lorasynci_channel *channel, const lorasync_message *m)
{
    lorasynci_flow f;
    f.channel   = channel;
    f.data      = (char *)m->data;
    f.num_bytes = m->num_bytes;
    f.at        = 0;
    f.total     = (uint64_t)m->num_bytes + 8;
    f.peer      = m->peer;
    return f;
}

/* The bytes of a flow's next chunk; the first *skip of them are the message's size, which goes ahead of its data. */
LORASYNCI_FN size_t lorasynci_flow_chunk(const lorasynci_flow *f, size_t *skip)
{
    uint64_t left = f->total - f->at;
    *skip         = f->at == 0 ? 8 : 0;
    return left < LORASYNCI_CHUNK ? (size_t)left : (size_t)LORASYNCI_CHUNK;
}

/* Sends what fits now; 1 if anything moved. */
LORASYNCI_FN int lorasynci_flow_send(lorasynci_flow *f)
{
    lorasynci_channel *c    = f->channel;
    uint64_t           sent = c->sent, start = f->at;
    while (f->at < f->total && sent - __atomic_load_n(&c->taken, __ATOMIC_ACQUIRE) < LORASYNCI_RING) {
        size_t place = (size_t)(sent % LORASYNCI_RING), skip, n = lorasynci_flow_chunk(f, &skip);
        if (skip) memcpy(c->chunks[place], &f->num_bytes, 8);
        if (n > skip) memcpy(c->chunks[place] + skip, f->data + (f->at + skip - 8), n - skip);
        c->sizes[place] = (uint32_t)n;
        f->at += n;
        __atomic_store_n(&c->sent, ++sent, __ATOMIC_RELEASE);
    }
    return f->at != start;
}

/* Receives what is there; *moved is set if anything was. */
LORASYNCI_FN lorasync_status lorasynci_flow_receive(lorasynci_flow *f, int rank, int *moved, lorasync_error *err)
{
    lorasynci_channel *c     = f->channel;
    uint64_t           taken = c->taken;
    while (f->at < f->total && __atomic_load_n(&c->sent, __ATOMIC_ACQUIRE) != taken) {
        size_t   place = (size_t)(taken % LORASYNCI_RING), skip, n = lorasynci_flow_chunk(f, &skip);
        uint64_t size = f->num_bytes;
        if (skip) memcpy(&size, c->chunks[place], 8);
        if (size != f->num_bytes || c->sizes[place] != n)
            return lorasynci_fail(
                err, LORASYNC_E_COMM,
                "rank %d expected %llu bytes from rank %d, which sends %llu; do both make the same calls?", rank,
                (unsigned long long)f->num_bytes, f->peer, (unsigned long long)size);
        if (n > skip) memcpy(f->data + (f->at + skip - 8), c->chunks[place] + skip, n - skip);
        f->at += n;
        *moved = 1;
        __atomic_store_n(&c->taken, ++taken, __ATOMIC_RELEASE);
    }
    return LORASYNC_OK;
}

/* As lorasynci_local_check, for a flow that is being received. What a rank sent before it ended is still there: only
   when nothing more is, the failure counts. */
LORASYNCI_FN lorasync_status lorasynci_local_check_sender(const lorasynci_seat *seat, lorasynci_flow *f,
                                                          uint64_t deadline_ns, lorasync_error *err)
{
    lorasync_error  late;
    lorasync_status status = lorasynci_local_check(seat, f->peer, deadline_ns, &late);
    int             moved  = 0;
    if (status == LORASYNC_OK) return LORASYNC_OK;
    LORASYNCI_TRY(lorasynci_flow_receive(f, seat->rank, &moved, err));
    if (moved) return LORASYNC_OK;
    *err = late;
    return status;
}

/* Moves every flow until all are done. Flows are kept on the stack in groups, so that nothing is allocated; a group of
   receives is served together with a group of sends, and what a rank has sent waits in the channel. To be free of
   deadlock whatever the group sizes, rank r talks to peer (r + k) while it listens to peer (r - k): the caller orders
   the lists so (lorasynci_local_exchange). */
enum {
    LORASYNCI_GROUP = 32
};

LORASYNCI_FN lorasync_status lorasynci_local_run(const lorasynci_seat *seat, lorasynci_flow *sends, size_t num_sends,
                                                 lorasynci_flow *receives, size_t num_receives, uint64_t deadline_ns,
                                                 lorasync_error *err)
{
    unsigned turns = 0;
    for (;;) {
        int    moved = 0, waits_for = -1;
        size_t i;
        for (i = 0; i < num_sends; i++) {
            if (sends[i].at < sends[i].total) moved |= lorasynci_flow_send(&sends[i]);
            if (sends[i].at < sends[i].total) waits_for = sends[i].peer;
        }
        for (i = 0; i < num_receives; i++) {
            if (receives[i].at < receives[i].total)
                LORASYNCI_TRY(lorasynci_flow_receive(&receives[i], seat->rank, &moved, err));
            if (receives[i].at < receives[i].total) waits_for = receives[i].peer;
        }
        if (waits_for < 0) return LORASYNC_OK;
        if (moved) turns = 0;
        else lorasynci_pause(&turns);
        if (turns == 0 || turns % 64 != 0) continue;
        for (i = 0; i < num_sends; i++)
            if (sends[i].at < sends[i].total)
                LORASYNCI_TRY(lorasynci_local_check(seat, sends[i].peer, deadline_ns, err));
        for (i = 0; i < num_receives; i++)
            if (receives[i].at < receives[i].total)
                LORASYNCI_TRY(lorasynci_local_check_sender(seat, &receives[i], deadline_ns, err));
    }
}

LORASYNCI_FN const lorasync_message *lorasynci_message_for(const lorasync_message *m, size_t num, int peer)
{
    size_t i;
    for (i = 0; i < num; i++)
        if (m[i].peer == peer) return m[i].num_bytes ? &m[i] : NULL;
    return NULL;
}

LORASYNCI_FN lorasync_status lorasynci_local_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                                      const lorasync_message *receives, size_t num_receives,
                                                      int timeout_ms, lorasync_error *err)
{
    const lorasynci_seat *seat     = (const lorasynci_seat *)user;
    const lorasync_local *l        = seat->local;
    uint64_t              deadline = lorasynci_deadline_ns(timeout_ms);
    int                   k        = 1;
    LORASYNCI_TRY(lorasynci_local_given_up(seat, err));
    while (k < l->world) {
        lorasynci_flow out[LORASYNCI_GROUP], in[LORASYNCI_GROUP];
        size_t         num_out = 0, num_in = 0;
        for (; k < l->world && num_out < LORASYNCI_GROUP && num_in < LORASYNCI_GROUP; k++) {
            int                     to = (seat->rank + k) % l->world, from = (seat->rank + l->world - k) % l->world;
            const lorasync_message *s = lorasynci_message_for(sends, num_sends, to),
                                   *r = lorasynci_message_for(receives, num_receives, from);
            if (s) out[num_out++] = lorasynci_flow_start(lorasynci_local_channel(l, seat->rank, to), s);
            if (r) in[num_in++] = lorasynci_flow_start(lorasynci_local_channel(l, from, seat->rank), r);
        }
        LORASYNCI_TRY(lorasynci_local_run(seat, out, num_out, in, num_in, deadline, err));
    }
    return LORASYNC_OK;
}

/* Every rank sends to every other: a local host has few ranks, and the messages are small. */
LORASYNCI_FN lorasync_status lorasynci_local_all_gather(void *user, const void *in, void *out, size_t num_bytes,
                                                        int timeout_ms, lorasync_error *err)
{
    const lorasynci_seat *seat     = (const lorasynci_seat *)user;
    int                   world    = seat->local->world, k;
    uint64_t              deadline = lorasynci_deadline_ns(timeout_ms);
    memcpy((char *)out + (size_t)seat->rank * num_bytes, in, num_bytes);
    for (k = 1; k < world; k += LORASYNCI_GROUP) {
        lorasync_message s[LORASYNCI_GROUP], r[LORASYNCI_GROUP];
        uint64_t         now  = lorasynci_now_ns();
        int              left = now < deadline ? (int)((deadline - now) / 1000000u) : 0, j;
        size_t           n    = 0;
        for (j = k; j < world && j < k + LORASYNCI_GROUP; j++, n++) {
            s[n].peer      = (seat->rank + j) % world;
            s[n].data      = (char *)out + (size_t)seat->rank * num_bytes;
            s[n].num_bytes = num_bytes;
            r[n].peer      = (seat->rank + world - j) % world;
            r[n].data      = (char *)out + (size_t)r[n].peer * num_bytes;
            r[n].num_bytes = num_bytes;
        }
        LORASYNCI_TRY(lorasynci_local_exchange(user, s, n, r, n, left, err));
    }
    return LORASYNC_OK;
}

/* While this rank waits for something else than a message: has anybody given up or died? Looking at a process takes
   microseconds, which is long for those who ask in every run: that is done every 10 ms. */
LORASYNCI_FN lorasync_status lorasynci_local_healthy(void *user, lorasync_error *err)
{
    lorasynci_seat *seat = (lorasynci_seat *)user;
    uint64_t        now  = lorasynci_now_ns();
    int             rank;
    LORASYNCI_TRY(lorasynci_local_given_up(seat, err));
    if (now - seat->looked_ns < 10000000) return LORASYNC_OK;
    seat->looked_ns = now;
    for (rank = 0; rank < seat->local->world; rank++)
        if (rank != seat->rank) LORASYNCI_TRY(lorasynci_local_check(seat, rank, UINT64_MAX, err));
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_local_join(lorasync_local *local, int rank, lorasync_comm *out,
                                                 lorasync_error *err)
{
    int32_t none = 0;
    if (!local || !out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_local_join: local or out is NULL");
    if (rank < 0 || rank >= local->world)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "rank is %d, must be 0 to %d", rank, local->world - 1);
    if (!__atomic_compare_exchange_n(&local->ranks[rank].joined, &none, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return lorasynci_fail(err, LORASYNC_E_STATE, "rank %d has joined already", rank);
    local->ranks[rank].process = lorasynci_process_self();
    __atomic_store_n(&local->ranks[rank].joined, 2, __ATOMIC_RELEASE);
    local->seats[rank].local = local;
    local->seats[rank].rank  = rank;
    *out                     = lorasync_solo();
    out->user                = &local->seats[rank];
    out->rank                = rank;
    out->world               = local->world;
    out->all_gather          = lorasynci_local_all_gather;
    out->exchange            = lorasynci_local_exchange;
    out->abort               = lorasynci_local_abort;
    out->check               = lorasynci_local_healthy;
    return LORASYNC_OK;
}

/* -- ranks joined by NCCL */

#if defined(LORASYNC_NCCL) && !defined(LORASYNC_CUDA)
#error "lorasync.h: LORASYNC_NCCL needs LORASYNC_CUDA; define both beside LORASYNC_IMPLEMENTATION."
#endif

#ifdef LORASYNC_NCCL

#include <nccl.h>

#if NCCL_VERSION_CODE < 21800
#error "lorasync.h: needs NCCL 2.18 or later."
#endif
#if NCCL_UNIQUE_ID_BYTES != 128
#error "lorasync.h: lorasync_nccl_unique_id writes 128 bytes, this NCCL has another size."
#endif

/* NCCL moves device memory. Host memory goes through two scratch areas of the same layout, one pinned and one on the
   device:

       exchange     | to peer a | to peer b | ... | from peer c | from peer d | ... |     each at a multiple of 16
       all_gather   | of rank 0 | of rank 1 | ... |

   Longer messages go in parts. The size of the scratch depends on nothing but the world, so all ranks cut alike, and
   nothing is allocated after opening. */
enum {
    LORASYNCI_NCCL_SCRATCH  = 8 << 20,
    LORASYNCI_NCCL_PER_RANK = 8192,
    LORASYNCI_NCCL_CLOSE_MS = 5000
};

typedef struct lorasynci_nccl {
    ncclComm_t   comm;
    int          own;  /* made here, and so destroyed here */
    int          lost; /* a call failed: only abort and close are left */
    int          rank, world;
    int          device;
    int          close_ms; /* how long an orderly end may take */
    cudaStream_t stream;   /* of the calls for host memory */
    cudaEvent_t  done;
    char        *host, *scratch;
    size_t       scratch_bytes;
} lorasynci_nccl;

/* The part of every message that goes in one group: at most max bytes from `at` on. */
typedef struct lorasynci_nccl_part {
    char  *scratch; /* where the messages lie one behind the other; NULL: where they say themselves */
    size_t at, max;
} lorasynci_nccl_part;

LORASYNCI_FN lorasync_status lorasynci_nccl_cuda_fail(lorasynci_nccl *n, cudaError_t e, const char *what,
                                                      lorasync_error *err)
{
    (void)cudaGetLastError(); /* handled here: not left behind for the caller's next check */
    n->lost = 1;
    return lorasynci_fail(err, LORASYNC_E_COMM,
                          "NCCL: %s: CUDA says: %s (%s); close, make a new communicator, open again", what,
                          cudaGetErrorString(e), cudaGetErrorName(e));
}

/* A remote error is how NCCL reports that a peer's connection broke. */
LORASYNCI_FN lorasync_status lorasynci_nccl_fail(lorasynci_nccl *n, ncclResult_t r, const char *what,
                                                 lorasync_error *err)
{
    const char *more = ncclGetLastError(n->comm);
    int         some = more && more[0];
    n->lost          = 1;
    return lorasynci_fail(
        err, r == ncclRemoteError ? LORASYNC_E_PEER : LORASYNC_E_COMM,
        "NCCL: %s: %s%s%.240s%s; close, make a new communicator, open again (NCCL_DEBUG=WARN says more)", what,
        ncclGetErrorString(r), some ? " (" : "", some ? more : "", some ? ")" : "");
}

LORASYNCI_FN lorasync_status lorasynci_nccl_late(lorasynci_nccl *n, const char *what, lorasync_error *err)
{
    n->lost = 1;
    return lorasynci_fail(
        err, LORASYNC_E_TIMEOUT,
        "NCCL: %s: rank %d of %d waited in vain until the deadline; did every rank make the same call?", what, n->rank,
        n->world);
}

LORASYNCI_FN lorasync_status lorasynci_nccl_is_lost(const lorasynci_nccl *n, lorasync_error *err)
{
    if (!n->lost) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_LOST,
                          "the NCCL communicator was lost before: close it, make a new one, open again");
}

LORASYNCI_FN ncclResult_t lorasynci_nccl_state(const lorasynci_nccl *n)
{
    ncclResult_t state = ncclSuccess, r = ncclCommGetAsyncError(n->comm, &state);
    return r == ncclSuccess ? state : r;
}

/* Waits as long as a non-blocking communicator says that it is still at it. r is what the call before has answered. */
LORASYNCI_FN lorasync_status lorasynci_nccl_settle(lorasynci_nccl *n, ncclResult_t r, const char *what,
                                                   uint64_t deadline_ns, lorasync_error *err)
{
    unsigned turns = 0;
    while (r == ncclInProgress) {
        r = lorasynci_nccl_state(n);
        if (r != ncclInProgress) break;
        if (lorasynci_now_ns() >= deadline_ns) return lorasynci_nccl_late(n, what, err);
        lorasynci_pause(&turns);
    }
    return r == ncclSuccess ? LORASYNC_OK : lorasynci_nccl_fail(n, r, what, err);
}

LORASYNCI_FN lorasync_status lorasynci_nccl_check(void *user, lorasync_error *err)
{
    lorasynci_nccl *n = (lorasynci_nccl *)user;
    ncclResult_t    r;
    LORASYNCI_TRY(lorasynci_nccl_is_lost(n, err));
    r = lorasynci_nccl_state(n);
    return r == ncclSuccess || r == ncclInProgress ? LORASYNC_OK
                                                   : lorasynci_nccl_fail(n, r, "the communicator broke", err);
}

/* Waits until all that is on the own stream is done. Never blocks inside CUDA or NCCL. */
LORASYNCI_FN lorasync_status lorasynci_nccl_wait(lorasynci_nccl *n, const char *what, uint64_t deadline_ns,
                                                 lorasync_error *err)
{
    cudaError_t     e      = cudaEventRecord(n->done, n->stream);
    lorasync_status status = LORASYNC_OK;
    if (e == cudaSuccess) status = lorasynci_gpu_wait(n->done, NULL, deadline_ns, lorasynci_nccl_check, n, &e, err);
    if (status < 0) {
        lorasynci_prefix(err, "%s", what);
        return status;
    }
    if (e == cudaErrorNotReady) return lorasynci_nccl_late(n, what, err);
    return e == cudaSuccess ? LORASYNC_OK : lorasynci_nccl_cuda_fail(n, e, what, err);
}

/* cudaMemcpyAsync on the own stream; nothing to do is done. */
LORASYNCI_FN lorasync_status lorasynci_nccl_copy(lorasynci_nccl *n, void *dst, const void *src, size_t num_bytes,
                                                 const char *what, lorasync_error *err)
{
    cudaError_t e = num_bytes ? cudaMemcpyAsync(dst, src, num_bytes, cudaMemcpyDefault, n->stream) : cudaSuccess;
    return e == cudaSuccess ? LORASYNC_OK : lorasynci_nccl_cuda_fail(n, e, what, err);
}

LORASYNCI_FN size_t lorasynci_nccl_part_bytes(const lorasync_message *m, const lorasynci_nccl_part *part)
{
    size_t left = m->num_bytes > part->at ? m->num_bytes - part->at : 0;
    return left < part->max ? left : part->max;
}

/* Where the next message begins in scratch, if this one begins at `at`. */
LORASYNCI_FN size_t lorasynci_nccl_behind(size_t at, size_t num_bytes) { return at + (num_bytes + 15) / 16 * 16; }

/* Adds sends (or receives) to the open group. *at runs through the scratch. */
LORASYNCI_FN ncclResult_t lorasynci_nccl_add(const lorasynci_nccl *n, const lorasync_message *m, size_t num,
                                             int receiving, const lorasynci_nccl_part *part, size_t *at,
                                             cudaStream_t stream)
{
    size_t i;
    for (i = 0; i < num; i++) {
        size_t       num_bytes = lorasynci_nccl_part_bytes(&m[i], part);
        char        *data;
        ncclResult_t r;
        if (num_bytes == 0) continue;
        data = part->scratch ? part->scratch + *at : (char *)m[i].data + part->at;
        *at  = lorasynci_nccl_behind(*at, num_bytes);
        r    = receiving ? ncclRecv(data, num_bytes, ncclUint8, m[i].peer, n->comm, stream)
                         : ncclSend(data, num_bytes, ncclUint8, m[i].peer, n->comm, stream);
        if (r != ncclSuccess && r != ncclInProgress) return r;
    }
    return ncclSuccess;
}

/* All messages as one group, closed also after an error; enqueued when it returns. */
LORASYNCI_FN lorasync_status lorasynci_nccl_group(lorasynci_nccl *n, const lorasync_message *sends, size_t num_sends,
                                                  const lorasync_message *receives, size_t num_receives,
                                                  const lorasynci_nccl_part *part, cudaStream_t stream,
                                                  uint64_t deadline_ns, lorasync_error *err)
{
    size_t       at = 0;
    ncclResult_t r, end;
    /* a call before, the caller's too, must be settled before the next one */
    LORASYNCI_TRY(lorasynci_nccl_settle(n, ncclInProgress, "before an exchange", deadline_ns, err));
    r = ncclGroupStart();
    if (r != ncclSuccess) return lorasynci_nccl_fail(n, r, "ncclGroupStart", err);
    r = lorasynci_nccl_add(n, sends, num_sends, 0, part, &at, stream);
    if (r == ncclSuccess) r = lorasynci_nccl_add(n, receives, num_receives, 1, part, &at, stream);
    end = ncclGroupEnd();
    return lorasynci_nccl_settle(n, r == ncclSuccess ? end : r, "exchange", deadline_ns, err);
}

LORASYNCI_FN size_t lorasynci_nccl_longest(const lorasync_message *m, size_t num)
{
    size_t i, longest = 0;
    for (i = 0; i < num; i++)
        if (m[i].num_bytes > longest) longest = m[i].num_bytes;
    return longest;
}

LORASYNCI_FN lorasync_status lorasynci_nccl_exchange_stream(void *user, const lorasync_message *sends, size_t num_sends,
                                                            const lorasync_message *receives, size_t num_receives,
                                                            struct CUstream_st *stream, int timeout_ms,
                                                            lorasync_error *err)
{
    lorasynci_nccl     *n = (lorasynci_nccl *)user;
    lorasynci_nccl_part whole;
    lorasync_status     status;
    int                 old;
    LORASYNCI_TRY(lorasynci_nccl_is_lost(n, err));
    if (!lorasynci_nccl_longest(sends, num_sends) && !lorasynci_nccl_longest(receives, num_receives))
        return LORASYNC_OK;
    whole.scratch = NULL;
    whole.at      = 0;
    whole.max     = SIZE_MAX;
    old           = lorasynci_gpu_enter(n->device);
    status        = lorasynci_nccl_group(n, sends, num_sends, receives, num_receives, &whole, stream,
                                         lorasynci_deadline_ns(timeout_ms), err);
    lorasynci_gpu_leave(n->device, old);
    return status;
}

/* One part of every message: into the scratch, over, and out of it. */
LORASYNCI_FN lorasync_status lorasynci_nccl_exchange_part(lorasynci_nccl *n, const lorasync_message *sends,
                                                          size_t num_sends, const lorasync_message *receives,
                                                          size_t num_receives, const lorasynci_nccl_part *part,
                                                          uint64_t deadline_ns, lorasync_error *err)
{
    size_t      at = 0, sent, i;
    cudaError_t e;
    for (i = 0; i < num_sends; i++) {
        size_t num_bytes = lorasynci_nccl_part_bytes(&sends[i], part);
        if (num_bytes) memcpy(n->host + at, (const char *)sends[i].data + part->at, num_bytes);
        at = lorasynci_nccl_behind(at, num_bytes);
    }
    sent = at;
    for (i = 0; i < num_receives; i++) at = lorasynci_nccl_behind(at, lorasynci_nccl_part_bytes(&receives[i], part));
    LORASYNCI_TRY(lorasynci_nccl_copy(n, n->scratch, n->host, sent, "exchange", err));
    /* the gaps between messages are copied, too */
    e = at > sent ? cudaMemsetAsync(n->scratch + sent, 0, at - sent, n->stream) : cudaSuccess;
    if (e != cudaSuccess) return lorasynci_nccl_cuda_fail(n, e, "exchange", err);
    LORASYNCI_TRY(lorasynci_nccl_group(n, sends, num_sends, receives, num_receives, part, n->stream, deadline_ns, err));
    LORASYNCI_TRY(lorasynci_nccl_copy(n, n->host + sent, n->scratch + sent, at - sent, "exchange", err));
    LORASYNCI_TRY(lorasynci_nccl_wait(n, "exchange", deadline_ns, err));
    at = sent;
    for (i = 0; i < num_receives; i++) {
        size_t num_bytes = lorasynci_nccl_part_bytes(&receives[i], part);
        if (num_bytes) memcpy((char *)receives[i].data + part->at, n->host + at, num_bytes);
        at = lorasynci_nccl_behind(at, num_bytes);
    }
    return LORASYNC_OK;
}

/* Part k of a message is in group k on both sides, so no group waits for a later one. */
LORASYNCI_FN lorasync_status lorasynci_nccl_exchange(void *user, const lorasync_message *sends, size_t num_sends,
                                                     const lorasync_message *receives, size_t num_receives,
                                                     int timeout_ms, lorasync_error *err)
{
    lorasynci_nccl *n        = (lorasynci_nccl *)user;
    uint64_t        deadline = lorasynci_deadline_ns(timeout_ms);
    size_t longest = lorasynci_nccl_longest(sends, num_sends), other = lorasynci_nccl_longest(receives, num_receives);
    lorasynci_nccl_part part;
    lorasync_status     status = LORASYNC_OK;
    int                 old;
    LORASYNCI_TRY(lorasynci_nccl_is_lost(n, err));
    if (num_sends > (size_t)n->world || num_receives > (size_t)n->world)
        return lorasynci_fail(err, LORASYNC_E_COMM, "exchange: %zu sends and %zu receives, but there are %d ranks",
                              num_sends, num_receives, n->world);
    if (other > longest) longest = other;
    part.scratch = n->scratch;
    part.max     = n->scratch_bytes / 2 / (size_t)n->world / 16 * 16;
    old          = lorasynci_gpu_enter(n->device);
    for (part.at = 0; part.at < longest && status == LORASYNC_OK; part.at += part.max)
        status = lorasynci_nccl_exchange_part(n, sends, num_sends, receives, num_receives, &part, deadline, err);
    lorasynci_gpu_leave(n->device, old);
    return status;
}

/* num_bytes of every rank, from `in` to n->host. */
LORASYNCI_FN lorasync_status lorasynci_nccl_gather_part(lorasynci_nccl *n, const char *in, size_t num_bytes,
                                                        uint64_t deadline_ns, lorasync_error *err)
{
    size_t own = (size_t)n->rank * num_bytes;
    memcpy(n->host + own, in, num_bytes);
    LORASYNCI_TRY(lorasynci_nccl_settle(n, ncclInProgress, "before an all_gather", deadline_ns, err));
    LORASYNCI_TRY(lorasynci_nccl_copy(n, n->scratch + own, n->host + own, num_bytes, "all_gather", err));
    LORASYNCI_TRY(
        lorasynci_nccl_settle(n, ncclAllGather(n->scratch + own, n->scratch, num_bytes, ncclUint8, n->comm, n->stream),
                              "all_gather", deadline_ns, err));
    LORASYNCI_TRY(lorasynci_nccl_copy(n, n->host, n->scratch, (size_t)n->world * num_bytes, "all_gather", err));
    return lorasynci_nccl_wait(n, "all_gather", deadline_ns, err);
}

LORASYNCI_FN lorasync_status lorasynci_nccl_all_gather(void *user, const void *in, void *out, size_t num_bytes,
                                                       int timeout_ms, lorasync_error *err)
{
    lorasynci_nccl *n        = (lorasynci_nccl *)user;
    uint64_t        deadline = lorasynci_deadline_ns(timeout_ms);
    size_t          world = (size_t)n->world, most = n->scratch_bytes / world, at = 0, r;
    lorasync_status status = LORASYNC_OK;
    int             old;
    LORASYNCI_TRY(lorasynci_nccl_is_lost(n, err));
    old = lorasynci_gpu_enter(n->device);
    while (at < num_bytes && status == LORASYNC_OK) {
        size_t part = num_bytes - at < most ? num_bytes - at : most;
        status      = lorasynci_nccl_gather_part(n, (const char *)in + at, part, deadline, err);
        for (r = 0; r < world && status == LORASYNC_OK; r++)
            memcpy((char *)out + r * num_bytes + at, n->host + r * part, part);
        at += part;
    }
    lorasynci_gpu_leave(n->device, old);
    return status;
}

/* `in` may be the own part of `out`. */
LORASYNCI_FN lorasync_status lorasynci_nccl_all_gather_stream(void *user, const void *in, void *out, size_t num_bytes,
                                                              struct CUstream_st *stream, int timeout_ms,
                                                              lorasync_error *err)
{
    lorasynci_nccl *n        = (lorasynci_nccl *)user;
    uint64_t        deadline = lorasynci_deadline_ns(timeout_ms);
    lorasync_status status;
    int             old;
    LORASYNCI_TRY(lorasynci_nccl_is_lost(n, err));
    old    = lorasynci_gpu_enter(n->device);
    status = lorasynci_nccl_settle(n, ncclInProgress, "before an all_gather", deadline, err);
    if (status == LORASYNC_OK)
        status = lorasynci_nccl_settle(n, ncclAllGather(in, out, num_bytes, ncclUint8, n->comm, stream), "all_gather",
                                       deadline, err);
    lorasynci_gpu_leave(n->device, old);
    return status;
}

/* NCCL frees an aborted communicator: it is not touched again. */
LORASYNCI_FN void lorasynci_nccl_abort(void *user, const char *why)
{
    lorasynci_nccl *n = (lorasynci_nccl *)user;
    int             old;
    (void)why; /* NCCL brings no text to the other ranks */
    n->lost = 1;
    if (!n->comm) return;
    old = lorasynci_gpu_enter(n->device);
    ncclCommAbort(n->comm);
    n->comm = NULL;
    lorasynci_gpu_leave(n->device, old);
}

LORASYNC_API lorasync_status lorasync_nccl_unique_id(void *out, lorasync_error *err)
{
    ncclUniqueId id;
    ncclResult_t r;
    if (!out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_nccl_unique_id: out is NULL");
    r = ncclGetUniqueId(&id);
    if (r != ncclSuccess)
        return lorasynci_fail(err, LORASYNC_E_COMM, "ncclGetUniqueId: %s (NCCL_DEBUG=WARN says more)",
                              ncclGetErrorString(r));
    memcpy(out, id.internal, sizeof id.internal);
    return LORASYNC_OK;
}

/* Joins the others, without blocking: a rank that never comes ends in the deadline. */
LORASYNCI_FN lorasync_status lorasynci_nccl_join(lorasynci_nccl *n, const lorasync_nccl_desc *desc,
                                                 uint64_t deadline_ns, lorasync_error *err)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId id;
    ncclResult_t r;
    memcpy(id.internal, desc->unique_id, sizeof id.internal);
    config.blocking = 0;
    n->own          = 1;
    n->rank         = desc->rank;
    n->world        = desc->world;
    r               = ncclCommInitRankConfig(&n->comm, n->world, id, n->rank, &config);
    if (!n->comm) return lorasynci_nccl_fail(n, r == ncclSuccess ? ncclInternalError : r, "making a communicator", err);
    return lorasynci_nccl_settle(n, r == ncclSuccess ? ncclInProgress : r, "making a communicator", deadline_ns, err);
}

/* Takes the caller's communicator, which may still be on its way. */
LORASYNCI_FN lorasync_status lorasynci_nccl_borrow(lorasynci_nccl *n, const lorasync_nccl_desc *desc,
                                                   uint64_t deadline_ns, lorasync_error *err)
{
    int          device = n->device;
    ncclResult_t r;
    n->comm = desc->comm;
    LORASYNCI_TRY(lorasynci_nccl_settle(n, ncclInProgress, "desc.comm is not ready", deadline_ns, err));
    r = ncclCommCount(n->comm, &n->world);
    if (r == ncclSuccess) r = ncclCommUserRank(n->comm, &n->rank);
    if (r == ncclSuccess) r = ncclCommCuDevice(n->comm, &device);
    if (r != ncclSuccess) return lorasynci_nccl_fail(n, r, "desc.comm", err);
    if (device != n->device)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "desc.comm is on device %d, but device %d is current; call cudaSetDevice(%d) before",
                              device, n->device, device);
    return LORASYNC_OK;
}

/* The own stream, its event and the scratch. */
LORASYNCI_FN lorasync_status lorasynci_nccl_allocate(lorasynci_nccl *n, lorasync_error *err)
{
    cudaError_t e;
    char        what[96];
    if (!lorasynci_checked_mul((size_t)n->world, LORASYNCI_NCCL_PER_RANK, &n->scratch_bytes))
        return lorasynci_fail_memory(err, SIZE_MAX);
    if (n->scratch_bytes < LORASYNCI_NCCL_SCRATCH) n->scratch_bytes = LORASYNCI_NCCL_SCRATCH;
    e = cudaStreamCreateWithFlags(&n->stream, cudaStreamNonBlocking);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&n->done, cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaMalloc((void **)&n->scratch, n->scratch_bytes);
    if (e == cudaSuccess) e = cudaHostAlloc((void **)&n->host, n->scratch_bytes, cudaHostAllocDefault);
    if (e == cudaSuccess) return LORASYNC_OK;
    snprintf(what, sizeof what, "NCCL scratch of %zu bytes, on the device and pinned", n->scratch_bytes);
    return lorasynci_cuda_fail(err, e, what);
}

/* Destroying waits for what is under way; what cannot end is aborted. */
LORASYNCI_FN void lorasynci_nccl_destroy(lorasynci_nccl *n)
{
    lorasync_error  err;
    uint64_t        deadline = lorasynci_deadline_ns(n->close_ms);
    lorasync_status status   = lorasynci_nccl_settle(n, ncclInProgress, "", deadline, &err);
    if (status == LORASYNC_OK) status = lorasynci_nccl_settle(n, ncclCommFinalize(n->comm), "", deadline, &err);
    if (status == LORASYNC_OK) ncclCommDestroy(n->comm);
    else ncclCommAbort(n->comm);
    n->comm = NULL;
}

LORASYNCI_FN void lorasynci_nccl_free(lorasynci_nccl *n)
{
    int old;
    old = lorasynci_gpu_enter(n->device);
    if (n->comm && n->lost) lorasynci_nccl_abort(n, ""); /* first: what hangs on the stream ends by it */
    if (n->comm && n->own) lorasynci_nccl_destroy(n);
    if (n->done) cudaEventDestroy(n->done);
    if (n->stream) cudaStreamDestroy(n->stream);
    if (n->scratch) cudaFree(n->scratch);
    if (n->host) cudaFreeHost(n->host);
    (void)cudaGetLastError();
    lorasynci_gpu_leave(n->device, old);
    free(n);
}

LORASYNCI_FN lorasync_status lorasynci_nccl_valid(const lorasync_nccl_desc *desc, const lorasync_comm *out,
                                                  lorasync_error *err)
{
    if (!desc || !out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_nccl_open: desc or out is NULL");
    if (desc->timeout_ms < 0)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "desc.timeout_ms is %d, must not be negative",
                              desc->timeout_ms);
    if (desc->comm && desc->unique_id)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "desc has both comm and unique_id; give one of them");
    if (desc->comm) return LORASYNC_OK;
    if (!desc->unique_id)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "desc has neither comm nor unique_id; give one of them");
    if (desc->world < 1)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "desc.world is %d, must be 1 or more", desc->world);
    if (desc->rank < 0 || desc->rank >= desc->world)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "desc.rank is %d, must be 0 to %d", desc->rank,
                              desc->world - 1);
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_nccl_open(const lorasync_nccl_desc *desc, lorasync_comm *out, lorasync_error *err)
{
    lorasynci_nccl *n;
    lorasync_status status;
    cudaError_t     e;
    uint64_t        deadline;
    int             timeout_ms;
    LORASYNCI_TRY(lorasynci_nccl_valid(desc, out, err));
    timeout_ms = desc->timeout_ms ? desc->timeout_ms : 60000;
    deadline   = lorasynci_deadline_ns(timeout_ms);
    n          = (lorasynci_nccl *)calloc(1, sizeof *n);
    if (!n) return lorasynci_fail_memory(err, sizeof *n);
    n->close_ms = timeout_ms < LORASYNCI_NCCL_CLOSE_MS ? timeout_ms : LORASYNCI_NCCL_CLOSE_MS;
    e           = cudaGetDevice(&n->device);
    if (e != cudaSuccess) {
        free(n);
        return lorasynci_cuda_fail(err, e, "no usable GPU");
    }
    status = desc->comm ? lorasynci_nccl_borrow(n, desc, deadline, err) : lorasynci_nccl_join(n, desc, deadline, err);
    if (status == LORASYNC_OK) status = lorasynci_nccl_allocate(n, err);
    if (status < 0) {
        if (n->own) n->lost = 1; /* the others may be waiting for it: not the time for an orderly end */
        lorasynci_nccl_free(n);
        return status;
    }
    *out                   = lorasync_solo();
    out->user              = n;
    out->rank              = n->rank;
    out->world             = n->world;
    out->all_gather        = lorasynci_nccl_all_gather;
    out->exchange          = lorasynci_nccl_exchange;
    out->abort             = lorasynci_nccl_abort;
    out->exchange_stream   = lorasynci_nccl_exchange_stream;
    out->all_gather_stream = lorasynci_nccl_all_gather_stream;
    out->check             = lorasynci_nccl_check;
    return LORASYNC_OK;
}

LORASYNC_API void lorasync_nccl_close(lorasync_comm *comm)
{
    if (!comm || comm->all_gather != lorasynci_nccl_all_gather) return;
    lorasynci_nccl_free((lorasynci_nccl *)comm->user);
    memset(comm, 0, sizeof *comm);
}

#else

LORASYNCI_FN lorasync_status lorasynci_nccl_absent(lorasync_error *err)
{
    return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                          "this library was compiled without NCCL; define LORASYNC_CUDA and LORASYNC_NCCL beside "
                          "LORASYNC_IMPLEMENTATION");
}

LORASYNC_API lorasync_status lorasync_nccl_unique_id(void *out, lorasync_error *err)
{
    (void)out;
    return lorasynci_nccl_absent(err);
}

LORASYNC_API lorasync_status lorasync_nccl_open(const lorasync_nccl_desc *desc, lorasync_comm *out, lorasync_error *err)
{
    (void)desc, (void)out;
    return lorasynci_nccl_absent(err);
}

LORASYNC_API void lorasync_nccl_close(lorasync_comm *comm) { (void)comm; }

#endif


/* ------------------------------------------------------------------------------------------------------- >>image -- */

/* safetensors images: reading and checking a header, laying one out, stamping it, the digest, and deltas. Uses
   >>support, >>json and >>dtype.

   There is one reader. A layout writes its header and then reads it as if it came from a file, so that both kinds of
   image are made, checked and searched by the same code. */

#define LORASYNCI_MAX_HEADER ((uint64_t)100000000) /* the reference reader's limit */

/* An image with what belongs to it.

       tensors  [ {name, shape, ...} | ... ]   in payload order; names and data point elsewhere
       pool     name \0 name \0 metadata value \0 name \0 ...                                                     */
typedef struct lorasynci_image_impl {
    lorasync_image     image; /* first: the handle that callers hold */
    lorasync_allocator a;
    lorasync_tensor   *tensors;
    char              *pool;
    lorasynci_table    names;
    lorasynci_members  metadata;              /* the values are decoded, in pool */
    unsigned char     *own_header;            /* a layout's, until it is moved elsewhere */
    unsigned char     *stamped;               /* where the header of a layout can be written; NULL for an image that was
                                                 read */
    size_t             version_at, digest_at; /* in it; 0 without an adapter */
    void              *mapping;               /* unmapped with the image */
    size_t             mapping_bytes;
    char              *own_config;
    lorasync_delta     delta; /* image.delta points here, or is NULL */
} lorasynci_image_impl;

LORASYNC_API void lorasync_image_free(lorasync_image *image)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)image;
    lorasync_allocator    a;
    if (!m) return;
    a = m->a;
    lorasynci_dealloc(&a, m->tensors);
    lorasynci_dealloc(&a, m->pool);
    if (m->names.cells) lorasynci_table_free(&m->names);
    if (m->metadata.at || m->metadata.keys) lorasynci_members_free(&m->metadata);
    lorasynci_dealloc(&a, m->own_header);
    lorasynci_dealloc(&a, m->own_config);
    if (m->mapping) munmap(m->mapping, m->mapping_bytes);
    lorasynci_dealloc(&a, m);
}

/* Fails with a LORASYNC_E_MEMORY error when there is no memory or `given` is half an allocator. */
LORASYNCI_FN lorasync_status lorasynci_image_new(const lorasync_allocator *given, lorasynci_image_impl **out,
                                                 lorasync_error *err)
{
    lorasync_allocator    a;
    lorasynci_image_impl *m;
    if (!lorasynci_take_allocator(given, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: alloc and free must both be set, or neither");
    m = (lorasynci_image_impl *)lorasynci_alloc_array(&a, 1, sizeof *m);
    if (!m) return lorasynci_fail_memory(err, sizeof *m);
    m->a                 = a;
    m->image.adapter     = "";
    m->image.config_json = "";
    m->image.index_json  = "";
    *out                 = m;
    return LORASYNC_OK;
}

/* The image unmaps it when it is freed. */
LORASYNCI_FN void lorasynci_image_own_mapping(lorasync_image *image, void *mapping, size_t num_bytes)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)image;
    m->mapping              = mapping;
    m->mapping_bytes        = num_bytes;
}

/* The image shows it as config_json, and frees it. From the image's allocator. */
LORASYNCI_FN void lorasynci_image_own_config(lorasync_image *image, char *config_json)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)image;
    lorasynci_dealloc(&m->a, m->own_config);
    m->own_config      = config_json;
    image->config_json = config_json;
}

/* -- one tensor's size and name */

/* "F32 [2,3]" */
typedef struct lorasynci_type_text {
    char text[16 + 22 * LORASYNC_MAX_DIMS];
} lorasynci_type_text;

LORASYNCI_FN lorasynci_type_text lorasynci_type_of(const lorasync_tensor *t)
{
    lorasynci_type_text out;
    size_t              n;
    int                 d;
    n = (size_t)snprintf(out.text, sizeof out.text, "%s [", lorasync_dtype_name(t->dtype));
    for (d = 0; d < t->ndim; d++)
        n += (size_t)snprintf(out.text + n, sizeof out.text - n, d ? ",%lld" : "%lld", (long long)t->shape[d]);
    snprintf(out.text + n, sizeof out.text - n, "]");
    return out;
}

/* The bytes of a tensor by its dtype and shape (no dimension below 0). Multiplied from left to right, so that a product
   that overflows before it meets a 0 is an error, as in the reference reader. */
LORASYNCI_FN lorasync_status lorasynci_tensor_bytes(const lorasync_tensor *t, lorasync_status bad, size_t *out,
                                                    lorasync_error *err)
{
    uint64_t n = 1, bits = (uint64_t)lorasync_dtype_bits(t->dtype);
    int      d;
    for (d = 0; d <= t->ndim; d++) {
        uint64_t factor = d < t->ndim ? (uint64_t)t->shape[d] : bits;
        if (factor != 0 && n > UINT64_MAX / factor)
            return lorasynci_fail(err, bad, "tensor \"%.150s\": %s does not fit 64 bits", t->name,
                                  lorasynci_type_of(t).text);
        n *= factor;
    }
    if (n % 8 != 0)
        return lorasynci_fail(err, bad,
                              "tensor \"%.150s\": %s ends inside a byte; its last dimension must fill whole bytes",
                              t->name, lorasynci_type_of(t).text);
    if (n / 8 > SIZE_MAX)
        return lorasynci_fail(err, bad, "tensor \"%.150s\": %s does not fit memory", t->name,
                              lorasynci_type_of(t).text);
    *out = (size_t)(n / 8);
    return LORASYNC_OK;
}

LORASYNCI_FN int lorasynci_has_control(const char *text)
{
    const uint64_t ones = UINT64_C(0x0101010101010101);
    size_t         n    = strlen(text);
    for (; n >= 8; text += 8, n -= 8) { /* as lorasynci_json_plain; bytes above 0x7f may be taken for one, and are
                                           looked at one by one */
        uint64_t x, del;
        memcpy(&x, text, 8);
        del = x ^ (ones * 0x7f);
        if ((((x - ones * 0x20) & ~x) | ((del - ones) & ~del) | x) & (ones * 0x80)) break;
    }
    for (; *text; text++)
        if ((unsigned char)*text < 0x20 || *text == 0x7f) return 1;
    return 0;
}

LORASYNCI_FN int lorasynci_is_utf8(const char *text)
{
    const char *end = text + strlen(text);
    while (text < end) {
        size_t n = (unsigned char)*text < 0x80 ? 1 : lorasynci_utf8(text, end);
        if (!n) return 0;
        text += n;
    }
    return 1;
}

/* -- reading a header */

typedef struct lorasynci_image_reader {
    lorasynci_json        j;
    lorasynci_image_impl *m;
    char                 *pool; /* its free part */
    size_t                num;  /* tensors read */
    size_t                payload_bytes;
    int                   has_metadata;
    lorasync_error       *err;
} lorasynci_image_reader;

/* Decodes a string into the pool. There is room: two quotes stand around each string of the header and one NUL behind
   each in the pool. */
LORASYNCI_FN const char *lorasynci_pool_string(lorasynci_image_reader *r, const lorasynci_slice *s)
{
    char  *text = r->pool;
    size_t n    = s->size;
    if (s->escaped) n = lorasynci_json_decode(s, text);
    else if (n) memcpy(text, s->at, n);
    text[n] = 0;
    r->pool += n + 1;
    return text;
}

LORASYNCI_FN lorasync_status lorasynci_read_metadata(lorasynci_image_reader *r)
{
    lorasynci_members *members = &r->m->metadata;
    lorasynci_slice    s;
    size_t             i;
    if (r->has_metadata) return lorasynci_fail(r->err, LORASYNC_E_FORMAT, "__metadata__ occurs twice; write it once");
    r->has_metadata = 1;
    if (lorasynci_json_peek(&r->j) == 'n') return lorasynci_json_null(&r->j);
    LORASYNCI_TRY(lorasynci_members_read(&r->j, &r->m->a, members));
    for (i = 0; i < members->num; i++) {
        lorasynci_json value = r->j;
        value.at             = members->at[i].value;
        if (lorasynci_json_peek(&value) != '"')
            return lorasynci_fail(r->err, LORASYNC_E_FORMAT,
                                  "__metadata__ key \"%.150s\": expected a string, found `%c`", members->at[i].key,
                                  *value.at);
        LORASYNCI_TRY(lorasynci_json_string(&value, &s));
        members->at[i].value = lorasynci_pool_string(r, &s);
    }
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_read_dtype(lorasynci_image_reader *r, lorasync_tensor *t)
{
    lorasynci_slice s;
    char            text[80]; /* the longest name is 11 bytes; six times that with escapes */
    LORASYNCI_TRY(lorasynci_json_string(&r->j, &s));
    t->dtype = r->num ? r->m->tensors[r->num - 1].dtype : LORASYNC_F32; /* mostly the same again */
    if (lorasynci_json_is(&s, lorasync_dtype_name(t->dtype))) return LORASYNC_OK;
    if (s.size >= sizeof text) s.size = 0;
    text[lorasynci_json_decode(&s, text)] = 0;
    t->dtype                              = lorasync_dtype_from_name(text);
    if (t->dtype) return LORASYNC_OK;
    return lorasynci_fail(r->err, LORASYNC_E_FORMAT,
                          "tensor \"%.150s\": unknown dtype \"%s\"; known are those of safetensors, BOOL to U64",
                          t->name, text);
}

LORASYNCI_FN lorasync_status lorasynci_read_shape(lorasynci_image_reader *r, lorasync_tensor *t)
{
    uint64_t n;
    int      more;
    t->ndim = 0;
    LORASYNCI_TRY(lorasynci_json_array(&r->j));
    while ((more = lorasynci_json_element(&r->j)) > 0) {
        if (t->ndim == LORASYNC_MAX_DIMS)
            return lorasynci_fail(r->err, LORASYNC_E_FORMAT, "tensor \"%.150s\": more than %d dimensions", t->name,
                                  LORASYNC_MAX_DIMS);
        LORASYNCI_TRY(lorasynci_json_uint(&r->j, &n));
        if (n > (uint64_t)INT64_MAX)
            return lorasynci_fail(r->err, LORASYNC_E_FORMAT, "tensor \"%.150s\": dimension %d is %llu, over 2^63 - 1",
                                  t->name, t->ndim, (unsigned long long)n);
        t->shape[t->ndim++] = (int64_t)n;
    }
    return (lorasync_status)more;
}

LORASYNCI_FN lorasync_status lorasynci_read_offsets(lorasynci_image_reader *r, lorasync_tensor *t)
{
    uint64_t at[2], n;
    size_t   num = 0;
    int      more;
    LORASYNCI_TRY(lorasynci_json_array(&r->j));
    while ((more = lorasynci_json_element(&r->j)) > 0) {
        LORASYNCI_TRY(lorasynci_json_uint(&r->j, &n));
        if (num < 2) at[num] = n;
        num++;
    }
    if (more < 0) return (lorasync_status)more;
    if (num != 2)
        return lorasynci_fail(r->err, LORASYNC_E_FORMAT,
                              "tensor \"%.150s\": data_offsets must be [begin,end], found %zu numbers", t->name, num);
    if (at[0] > at[1] || at[1] > r->payload_bytes)
        return lorasynci_fail(
            r->err, LORASYNC_E_FORMAT,
            "tensor \"%.150s\": data_offsets [%llu,%llu] are no range of the %zu bytes behind the header; "
            "the file is malformed or truncated",
            t->name, (unsigned long long)at[0], (unsigned long long)at[1], r->payload_bytes);
    t->offset    = (size_t)at[0];
    t->num_bytes = (size_t)(at[1] - at[0]);
    return LORASYNC_OK;
}

/* {"dtype":..,"shape":..,"data_offsets":..}, each once, in any order; other fields are ignored, as the reference reader
   does. */
LORASYNCI_FN lorasync_status lorasynci_read_entry(lorasynci_image_reader *r, lorasync_tensor *t)
{
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    lorasynci_slice          key;
    unsigned                 seen = 0, i;
    int                      more;
    LORASYNCI_TRY(lorasynci_json_object(&r->j));
    while ((more = lorasynci_json_key(&r->j, &key)) > 0) {
        for (i = 0; i < 3 && !lorasynci_json_is(&key, fields[i]);) i++;
        if (i < 3 && (seen & 1u << i))
            return lorasynci_fail(r->err, LORASYNC_E_FORMAT, "tensor \"%.150s\": \"%s\" occurs twice", t->name,
                                  fields[i]);
        seen |= 1u << i;
        if (i == 0) LORASYNCI_TRY(lorasynci_read_dtype(r, t));
        else if (i == 1) LORASYNCI_TRY(lorasynci_read_shape(r, t));
        else if (i == 2) LORASYNCI_TRY(lorasynci_read_offsets(r, t));
        else LORASYNCI_TRY(lorasynci_json_skip(&r->j));
    }
    if (more < 0) return (lorasync_status)more;
    for (i = 0; i < 3; i++)
        if (!(seen & 1u << i))
            return lorasynci_fail(r->err, LORASYNC_E_FORMAT, "tensor \"%.150s\": \"%s\" is missing", t->name,
                                  fields[i]);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_read_tensor(lorasynci_image_reader *r, const lorasynci_slice *key)
{
    lorasync_tensor *t = &r->m->tensors[r->num];
    memset(t, 0, sizeof *t);
    t->name = lorasynci_pool_string(r, key);
    if (lorasynci_has_control(t->name))
        return lorasynci_fail(r->err, LORASYNC_E_FORMAT,
                              "the name of tensor %zu of the header holds a control character; rename it", r->num);
    if (lorasynci_json_peek(&r->j) != '{')
        return lorasynci_fail(r->err, LORASYNC_E_FORMAT,
                              "tensor \"%.150s\": expected an object of dtype, shape and data_offsets", t->name);
    LORASYNCI_TRY(lorasynci_read_entry(r, t));
    r->num++;
    return LORASYNC_OK;
}

/* No fewer than the tensors of the header: each is an object, and takes 48 bytes at the least
   ("":{"dtype":"U8","shape":[],..), and one more may have been begun when an error is found. */
LORASYNCI_FN size_t lorasynci_max_tensors(const char *text, size_t num_bytes)
{
    const char *end = text + num_bytes;
    size_t      n   = 0;
    while (text < end && n <= num_bytes / 48 && (text = (const char *)memchr(text, '{', (size_t)(end - text))) != NULL)
        n++, text++;
    return n;
}

/* All of the JSON, into tensors in the header's order. Nothing is checked across tensors yet. */
LORASYNCI_FN lorasync_status lorasynci_read_json(lorasynci_image_impl *m, const char *text, size_t num_bytes,
                                                 size_t payload_bytes, lorasync_error *err)
{
    lorasynci_image_reader r;
    lorasynci_slice        key;
    size_t                 max_tensors = lorasynci_max_tensors(text, num_bytes), size;
    int                    more;
    if (num_bytes == 0 || text[0] != '{')
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "the JSON must begin with `{` at byte 8; this is no safetensors file");
    if (!lorasynci_checked_mul(max_tensors, sizeof *m->tensors, &size)) return lorasynci_fail_memory(err, SIZE_MAX);
    m->tensors = (lorasync_tensor *)lorasynci_alloc(&m->a, size);
    m->pool    = (char *)lorasynci_alloc(&m->a, num_bytes);
    if (!m->tensors || !m->pool) return lorasynci_fail_memory(err, m->tensors ? num_bytes : size);
    memset(&r, 0, sizeof r);
    r.m             = m;
    r.pool          = m->pool;
    r.payload_bytes = payload_bytes;
    r.err           = err;
    lorasynci_json_init(&r.j, text, num_bytes, err);
    LORASYNCI_TRY(lorasynci_json_object(&r.j));
    while ((more = lorasynci_json_key(&r.j, &key)) > 0) {
        if (lorasynci_json_is(&key, "__metadata__")) LORASYNCI_TRY(lorasynci_read_metadata(&r));
        else LORASYNCI_TRY(lorasynci_read_tensor(&r, &key));
    }
    if (more < 0) return (lorasync_status)more;
    m->image.tensors     = m->tensors;
    m->image.num_tensors = r.num;
    return lorasynci_json_end(&r.j);
}

LORASYNCI_FN int lorasynci_payload_order(const void *a, const void *b)
{
    const lorasync_tensor *x = (const lorasync_tensor *)a, *y = (const lorasync_tensor *)b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    if (x->num_bytes != y->num_bytes) return x->num_bytes < y->num_bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* Puts the tensors in payload order, if they are not, and checks that they fill the payload without gap, overlap or
   rest. */
LORASYNCI_FN lorasync_status lorasynci_check_payload(lorasynci_image_impl *m, size_t payload_bytes, lorasync_error *err)
{
    size_t i, n = m->image.num_tensors, running = 0, size = 0;
    for (i = 1; i < n; i++) {
        const lorasync_tensor *x = &m->tensors[i - 1], *y = &m->tensors[i];
        if (x->offset > y->offset || (x->offset == y->offset && x->num_bytes > y->num_bytes)) break;
    }
    if (i < n) qsort(m->tensors, n, sizeof *m->tensors, lorasynci_payload_order);
    for (i = 0; i < n; i++) {
        const lorasync_tensor *t = &m->tensors[i];
        if (t->offset != running)
            return lorasynci_fail(
                err, LORASYNC_E_FORMAT,
                "tensor \"%.150s\": begins at byte %zu of the payload, but the tensors before it end at %zu (%s)",
                t->name, t->offset, running, t->offset > running ? "a hole" : "an overlap");
        LORASYNCI_TRY(lorasynci_tensor_bytes(t, LORASYNC_E_FORMAT, &size, err));
        if (size != t->num_bytes)
            return lorasynci_fail(err, LORASYNC_E_FORMAT,
                                  "tensor \"%.150s\": %s needs %zu bytes, but data_offsets give it %zu", t->name,
                                  lorasynci_type_of(t).text, size, t->num_bytes);
        running += size; /* at most payload_bytes: the offsets were checked */
    }
    if (running == payload_bytes) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_FORMAT,
                          "the tensors end at byte %zu of the payload, but it has %zu; %zu bytes belong to no tensor",
                          running, payload_bytes, payload_bytes - running);
}

LORASYNCI_FN const char *lorasynci_tensor_name(const void *tensors, size_t index)
{
    return ((const lorasync_tensor *)tensors)[index].name;
}

/* Makes the tensors findable by name; fails with `twice` when two have one name. */
LORASYNCI_FN lorasync_status lorasynci_index_names(lorasynci_image_impl *m, lorasync_status twice, lorasync_error *err)
{
    size_t i, n = m->image.num_tensors;
    if (!lorasynci_table_init(&m->names, &m->a, n)) return lorasynci_fail_memory(err, n * sizeof *m->names.cells);
    for (i = 0; i < n; i++)
        if (lorasynci_table_insert(&m->names, m->tensors[i].name, i, lorasynci_tensor_name, m->tensors) != i)
            return lorasynci_fail(err, twice, "tensor \"%.150s\" occurs twice; give every tensor its own name",
                                  m->tensors[i].name);
    return LORASYNC_OK;
}

/* -- the library's own metadata */

LORASYNCI_FN int lorasynci_read_decimal(const char *text, uint64_t *out)
{
    uint64_t v = 0;
    if (!*text) return 0;
    for (; *text; text++) {
        uint64_t digit = (uint64_t)(unsigned char)*text - '0';
        if (digit > 9 || v > (UINT64_MAX - digit) / 10) return 0;
        v = v * 10 + digit;
    }
    *out = v;
    return 1;
}

LORASYNCI_FN int lorasynci_read_hex16(const char *text, uint64_t *out)
{
    static const char digits[] = "0123456789abcdef";
    uint64_t          v        = 0;
    size_t            i;
    if (strlen(text) != 16) return 0;
    for (i = 0; i < 16; i++) {
        const char *digit = strchr(digits, text[i]);
        if (!digit) return 0;
        v = v << 4 | (uint64_t)(digit - digits);
    }
    *out = v;
    return 1;
}

LORASYNC_API const char *lorasync_image_metadata(const lorasync_image *image, const char *key)
{
    const lorasynci_member *member =
        image && key ? lorasynci_members_find(&((const lorasynci_image_impl *)image)->metadata, key) : NULL;
    return member ? member->value : NULL;
}

LORASYNCI_FN lorasync_status lorasynci_read_stamp(const lorasync_image *image, const char *key, int hex, uint64_t *out,
                                                  lorasync_error *err)
{
    const char *text = lorasync_image_metadata(image, key);
    if (!text || (hex ? lorasynci_read_hex16(text, out) : lorasynci_read_decimal(text, out))) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_FORMAT, "__metadata__ key \"%s\": expected %s, found \"%.60s\"", key,
                          hex ? "16 lower-case hex digits" : "a decimal number below 2^64", text);
}

/* A delta says all of it, a full image nothing. */
LORASYNCI_FN lorasync_status lorasynci_delta_metadata(lorasynci_image_impl *m, lorasync_error *err)
{
    static const char *const keys[] = {"lorasync.base_digest", "lorasync.base_version", "lorasync.full_digest",
                                       "lorasync.adapter",     "lorasync.digest",       "lorasync.version"};
    const lorasync_image    *image  = &m->image;
    size_t                   i, first = 0;
    while (first < 3 && !lorasync_image_metadata(image, keys[first])) first++;
    if (first == 3) return LORASYNC_OK;
    for (i = 0; i < LORASYNCI_COUNT(keys); i++) {
        if (lorasync_image_metadata(image, keys[i])) continue;
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "__metadata__ has \"%s\", as a delta, but no \"%s\"; a delta has both", keys[first],
                              keys[i]);
    }
    LORASYNCI_TRY(lorasynci_read_stamp(image, keys[0], 1, &m->delta.base_digest, err));
    LORASYNCI_TRY(lorasynci_read_stamp(image, keys[1], 0, &m->delta.base_version, err));
    LORASYNCI_TRY(lorasynci_read_stamp(image, keys[2], 1, &m->delta.full_digest, err));
    m->image.delta = &m->delta;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_own_metadata(lorasynci_image_impl *m, lorasync_error *err)
{
    lorasync_image *image   = &m->image;
    const char     *adapter = lorasync_image_metadata(image, "lorasync.adapter");
    if (adapter) image->adapter = adapter;
    LORASYNCI_TRY(lorasynci_read_stamp(image, "lorasync.version", 0, &image->version, err));
    LORASYNCI_TRY(lorasynci_read_stamp(image, "lorasync.digest", 1, &image->digest, err));
    image->has_digest = lorasync_image_metadata(image, "lorasync.digest") != NULL;
    return lorasynci_delta_metadata(m, err);
}

/* -- parse */

LORASYNCI_FN lorasync_status lorasynci_parse(lorasynci_image_impl *m, const unsigned char *bytes, size_t num_bytes,
                                             lorasync_error *err)
{
    uint64_t n;
    if (num_bytes < 8)
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "%zu bytes are too few for a safetensors file, which has at least 10", num_bytes);
    n = lorasynci_load_le64(bytes, 8);
    if (n > LORASYNCI_MAX_HEADER)
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "the header length is %llu, over the limit of %llu; this is no safetensors file",
                              (unsigned long long)n, (unsigned long long)LORASYNCI_MAX_HEADER);
    if (n > num_bytes - 8)
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "the header length is %llu, but only %zu bytes follow; the file is truncated",
                              (unsigned long long)n, num_bytes - 8);
    m->image.header        = bytes;
    m->image.header_bytes  = 8 + (size_t)n;
    m->image.payload_bytes = num_bytes - m->image.header_bytes;
    LORASYNCI_TRY(lorasynci_read_json(m, (const char *)bytes + 8, (size_t)n, m->image.payload_bytes, err));
    LORASYNCI_TRY(lorasynci_check_payload(m, m->image.payload_bytes, err));
    LORASYNCI_TRY(lorasynci_index_names(m, LORASYNC_E_FORMAT, err));
    LORASYNCI_TRY(lorasynci_own_metadata(m, err));
    lorasync_image_bind(&m->image, bytes + m->image.header_bytes);
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_image_parse(const void *bytes, size_t num_bytes,
                                                  const lorasync_allocator *allocator, lorasync_image **out,
                                                  lorasync_error *err)
{
    lorasynci_image_impl *m = NULL;
    lorasync_status       status;
    if (out) *out = NULL;
    if (!out || (!bytes && num_bytes))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_image_parse: bytes or out is NULL");
    LORASYNCI_TRY(lorasynci_image_new(allocator, &m, err));
    status = lorasynci_parse(m, (const unsigned char *)bytes, num_bytes, err);
    if (status < 0) {
        if (status != LORASYNC_E_MEMORY) lorasynci_prefix(err, "safetensors header");
        lorasync_image_free((lorasync_image *)m);
        return status;
    }
    *out = &m->image;
    return LORASYNC_OK;
}

LORASYNC_API const lorasync_tensor *lorasync_image_find(const lorasync_image *image, const char *name)
{
    const lorasynci_image_impl *m = (const lorasynci_image_impl *)image;
    size_t i = m && name ? lorasynci_table_find(&m->names, name, lorasynci_tensor_name, m->tensors) : SIZE_MAX;
    return i == SIZE_MAX ? NULL : &m->tensors[i];
}

LORASYNC_API void lorasync_image_bind(lorasync_image *image, const void *payload)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)image;
    size_t                i;
    if (!image) return;
    image->payload = payload;
    for (i = 0; i < image->num_tensors; i++)
        m->tensors[i].data = payload ? (const unsigned char *)payload + m->tensors[i].offset : NULL;
}

/* -- layout */

/* The writer's order: by dtype, later in the list first, then by name. */
LORASYNCI_FN int lorasynci_writer_order(const void *a, const void *b)
{
    const lorasync_tensor *x = *(const lorasync_tensor *const *)a, *y = *(const lorasync_tensor *const *)b;
    if (x->dtype != y->dtype) return x->dtype > y->dtype ? -1 : 1;
    return strcmp(x->name, y->name);
}

LORASYNCI_FN lorasync_status lorasynci_check_tensor(const lorasync_tensor *t, size_t index, lorasync_error *err)
{
    int d;
    if (!t->name || !t->name[0]) return lorasynci_fail(err, LORASYNC_E_NAME, "tensor %zu has no name", index);
    if (!lorasynci_is_utf8(t->name) || lorasynci_has_control(t->name))
        return lorasynci_fail(err, LORASYNC_E_NAME,
                              "the name of tensor %zu is not UTF-8 text without control characters", index);
    if (strcmp(t->name, "__metadata__") == 0)
        return lorasynci_fail(err, LORASYNC_E_NAME, "tensor %zu is called __metadata__, which safetensors reserves",
                              index);
    if (!lorasync_dtype_name(t->dtype))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "tensor \"%.150s\": %d is no dtype", t->name, (int)t->dtype);
    if (t->ndim < 0 || t->ndim > LORASYNC_MAX_DIMS)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "tensor \"%.150s\": %d dimensions, expected 0 to %d", t->name,
                              t->ndim, LORASYNC_MAX_DIMS);
    for (d = 0; d < t->ndim; d++)
        if (t->shape[d] < 0)
            return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "tensor \"%.150s\": dimension %d is %lld", t->name, d,
                                  (long long)t->shape[d]);
    return LORASYNC_OK;
}

LORASYNCI_FN void lorasynci_put_metadata(lorasynci_image_impl *m, lorasynci_buffer *b, const char *adapter)
{
    const lorasync_delta *d = m->image.delta;
    lorasynci_put_text(b, "{\"__metadata__\":{\"format\":\"pt\"");
    if (adapter) {
        lorasynci_put_text(b, ",\"lorasync.adapter\":");
        lorasynci_json_put_string(b, adapter, strlen(adapter));
        if (d)
            lorasynci_put_format(b, ",\"lorasync.base_digest\":\"%016llx\",\"lorasync.base_version\":\"%020llu\"",
                                 (unsigned long long)d->base_digest, (unsigned long long)d->base_version);
        lorasynci_put_text(b, ",\"lorasync.digest\":\"");
        m->digest_at = b->size;
        lorasynci_put_text(b, "0000000000000000\"");
        if (d) lorasynci_put_format(b, ",\"lorasync.full_digest\":\"%016llx\"", (unsigned long long)d->full_digest);
        lorasynci_put_text(b, ",\"lorasync.version\":\"");
        m->version_at = b->size;
        lorasynci_put_text(b, "00000000000000000000\"");
    }
    lorasynci_put_text(b, "}");
}

LORASYNCI_FN void lorasynci_put_tensor(lorasynci_buffer *b, const lorasync_tensor *t, size_t begin, size_t end)
{
    int d;
    lorasynci_put_text(b, ",");
    lorasynci_json_put_string(b, t->name, strlen(t->name));
    lorasynci_put_format(b, ":{\"dtype\":\"%s\",\"shape\":[", lorasync_dtype_name(t->dtype));
    for (d = 0; d < t->ndim; d++) lorasynci_put_format(b, d ? ",%lld" : "%lld", (long long)t->shape[d]);
    lorasynci_put_format(b, "],\"data_offsets\":[%zu,%zu]}", begin, end);
}

/* The whole header, length field included, for tensors in the writer's order. *payload_bytes is where the last one
   ends. */
LORASYNCI_FN lorasync_status lorasynci_put_header(lorasynci_image_impl *m, lorasynci_buffer *b,
                                                  const lorasync_tensor *const *order, size_t num, const char *adapter,
                                                  lorasync_error *err)
{
    size_t i, size, end, begin = 0, n;
    lorasynci_put(b, "\0\0\0\0\0\0\0", 8);
    lorasynci_put_metadata(m, b, adapter);
    for (i = 0; i < num; i++, begin = end) {
        LORASYNCI_TRY(lorasynci_tensor_bytes(order[i], LORASYNC_E_ARGUMENT, &size, err));
        if (!lorasynci_checked_add(begin, size, &end))
            return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                                  "tensor \"%.150s\": %s and the tensors before it do not fit memory", order[i]->name,
                                  lorasynci_type_of(order[i]).text);
        lorasynci_put_tensor(b, order[i], begin, end);
    }
    lorasynci_put_text(b, "}");
    while (b->size % 8 != 0 && !b->failed) lorasynci_put(b, " ", 1);
    if (b->failed) return lorasynci_fail_memory(err, b->size);
    if (b->size - 8 > LORASYNCI_MAX_HEADER)
        return lorasynci_fail(
            err, LORASYNC_E_FORMAT,
            "the header of %zu tensors has %zu bytes, safetensors allows %llu; publish them as several adapters", num,
            b->size - 8, (unsigned long long)LORASYNCI_MAX_HEADER);
    for (i = 0, n = b->size - 8; i < 8; i++, n >>= 8) b->data[i] = (char)(unsigned char)(n & 0xff);
    m->image.payload_bytes = begin;
    return LORASYNC_OK;
}

/* Writes the header into *b. `order` is memory for desc->num_tensors pointers. */
LORASYNCI_FN lorasync_status lorasynci_write_header(lorasynci_image_impl *m, const lorasync_image_desc *desc,
                                                    const lorasync_tensor **order, lorasynci_buffer *b,
                                                    lorasync_error *err)
{
    size_t i;
    if (desc->adapter && !lorasynci_is_utf8(desc->adapter))
        return lorasynci_fail(err, LORASYNC_E_NAME, "the adapter's name is not UTF-8");
    for (i = 0; i < desc->num_tensors; i++) {
        LORASYNCI_TRY(lorasynci_check_tensor(&desc->tensors[i], i, err));
        order[i] = &desc->tensors[i];
    }
    if (desc->num_tensors) qsort(order, desc->num_tensors, sizeof *order, lorasynci_writer_order);
    return lorasynci_put_header(m, b, order, desc->num_tensors, desc->adapter, err);
}

/* Makes *m from the header in `b`, which it takes. */
LORASYNCI_FN lorasync_status lorasynci_take_header(lorasynci_image_impl *m, lorasynci_buffer *b, lorasync_error *err)
{
    m->own_header = m->stamped = (unsigned char *)b->data;
    m->image.header            = m->own_header;
    m->image.header_bytes      = b->size;
    LORASYNCI_TRY(lorasynci_read_json(m, b->data + 8, b->size - 8, m->image.payload_bytes, err));
    LORASYNCI_TRY(lorasynci_check_payload(m, m->image.payload_bytes, err));
    LORASYNCI_TRY(lorasynci_index_names(m, LORASYNC_E_NAME, err));
    LORASYNCI_TRY(lorasynci_own_metadata(m, err));
    m->image.has_digest = 0; /* zeros, until it is stamped */
    return LORASYNC_OK;
}

/* delta: NULL, or what the metadata says of it. */
LORASYNCI_FN lorasync_status lorasynci_layout(const lorasync_image_desc *desc, const lorasync_delta *delta,
                                              const lorasync_allocator *allocator, lorasync_image **out,
                                              lorasync_error *err)
{
    lorasynci_image_impl   *m = NULL;
    const lorasync_tensor **order;
    lorasynci_buffer        b;
    lorasync_status         status;
    *out = NULL;
    LORASYNCI_TRY(lorasynci_image_new(allocator, &m, err));
    m->image.delta = delta;
    lorasynci_buffer_init(&b, &m->a);
    order  = (const lorasync_tensor **)lorasynci_alloc_array(&m->a, desc->num_tensors, sizeof *order);
    status = order ? lorasynci_write_header(m, desc, order, &b, err)
                   : lorasynci_fail_memory(err, desc->num_tensors * sizeof *order);
    lorasynci_dealloc(&m->a, (void *)order);
    if (status < 0) lorasynci_buffer_free(&b);
    else status = lorasynci_take_header(m, &b, err);
    if (status < 0) {
        lorasync_image_free((lorasync_image *)m);
        return status;
    }
    *out = &m->image;
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_image_layout(const lorasync_image_desc *desc, const lorasync_allocator *allocator,
                                                   lorasync_image **out, lorasync_error *err)
{
    if (out) *out = NULL;
    if (!desc || !out || (!desc->tensors && desc->num_tensors))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_image_layout: desc, desc->tensors or out is NULL");
    return lorasynci_layout(desc, NULL, allocator, out, err);
}

LORASYNC_API void lorasync_image_stamp(lorasync_image *image, uint64_t version, uint64_t digest)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)image;
    uint64_t              rest;
    size_t                i;
    if (!m || !m->stamped || !m->digest_at) return;
    for (i = 20, rest = version; i-- > 0; rest /= 10) m->stamped[m->version_at + i] = (unsigned char)('0' + rest % 10);
    for (i = 16, rest = digest; i-- > 0; rest >>= 4)
        m->stamped[m->digest_at + i] = (unsigned char)"0123456789abcdef"[rest & 15];
    image->version    = version;
    image->digest     = digest;
    image->has_digest = 1;
}

/* Copies the header of a layout to `to` (header_bytes long), where image->header is from then on and where stamps go.
   `to` stays the caller's. */
LORASYNCI_FN void lorasynci_image_move_header(lorasync_image *image, void *to)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)image;
    memcpy(to, image->header, image->header_bytes);
    lorasynci_dealloc(&m->a, m->own_header);
    m->own_header = NULL;
    m->stamped    = (unsigned char *)to;
    image->header = to;
}

/* -- digest */

/* Key i is the upper half of the i-th number of splitmix64 from state 0, lorasynci_mix((i + 1) * 0x9e3779b97f4a7c15) >>
   32, made odd. */
static const uint32_t lorasynci_digest_keys[64] = {
    0xe220a839u, 0x6e789e6bu, 0x06c45d19u, 0xf88bb8a9u, 0x1b39896bu, 0x53cb9f0du, 0x2c829abfu, 0xc584133bu,
    0x3ee57891u, 0xf3b8488du, 0x657eecddu, 0xc2d326e1u, 0x8621a03fu, 0x8e1f7555u, 0xb54e0f17u, 0x84bb3f97u,
    0x7d29825du, 0xc3cf1711u, 0x3466e9a1u, 0xd81a8d2bu, 0xdb01602bu, 0xa9038a93u, 0xedf5f1d9u, 0x54496ad7u,
    0xdd7c01d5u, 0x935e82f1u, 0x69b82ebdu, 0x40d29eb5u, 0xa2f09dabu, 0xee521d7bu, 0xf16952efu, 0x377d35dfu,
    0x0c7de807u, 0x05582d37u, 0xd254741fu, 0x69630f75u, 0x417ef961u, 0x3c3c41a3u, 0x6e19905du, 0x4fa9fa73u,
    0x84eb4455u, 0x134f7097u, 0x07dc930bu, 0x12c015a9u, 0xcc06c317u, 0xecee6563u, 0x3e84ecb1u, 0x690ed477u,
    0x774615d7u, 0x22b353f1u, 0xe3ddd86bu, 0xdf268adfu, 0x2098eb73u, 0x03d68453u, 0xc952c563u, 0x9b196bcbu,
    0x30260345u, 0xcf448a59u, 0xf4a578ddu, 0xbfdeaed9u, 0xed79402du, 0x55f070abu, 0x3e00a349u, 0xe255b237u};

/* The factor of a 256-byte block. Odd, so that no bit of the block's sum is lost. */
LORASYNCI_FN uint64_t lorasynci_digest_factor(uint64_t block)
{
    return lorasynci_mix(block + UINT64_C(0x9e3779b97f4a7c15)) | 1u;
}

/* The sum over a whole block. A fixed length and 32 x 32 -> 64 bit products: vectorised at -O2. */
LORASYNCI_FN uint64_t lorasynci_digest_block(const unsigned char *bytes)
{
    uint32_t w[64];
    uint64_t sum = 0;
    int      i;
    memcpy(w, bytes, sizeof w);
    for (i = 0; i < 64; i++) sum += (uint64_t)w[i] * lorasynci_digest_keys[i];
    return sum;
}

/* The sum over num_bytes bytes that stand at byte `at` of a block. */
LORASYNCI_FN uint64_t lorasynci_digest_part(const unsigned char *bytes, size_t num_bytes, size_t at)
{
    uint32_t w[64];
    uint64_t sum   = 0;
    size_t   first = at / 4, end = (at + num_bytes + 3) / 4, i;
    w[first] = w[end - 1] = 0; /* the bytes around the part count as 0 */
    memcpy((unsigned char *)w + at, bytes, num_bytes);
    for (i = first; i < end; i++) sum += (uint64_t)w[i] * lorasynci_digest_keys[i];
    return sum;
}

#if defined(LORASYNCI_AVX2)
/* sum + the products of 8 words and keys, those of even and of odd words after each other. */
LORASYNCI_AVX2 LORASYNCI_FN __m256i lorasynci_digest_add_avx2(__m256i sum, const unsigned char *p, const uint32_t *keys)
{
    __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)p),
            k = _mm256_loadu_si256((const __m256i *)(const void *)keys);
    sum       = _mm256_add_epi64(sum, _mm256_mul_epu32(w, k));
    return _mm256_add_epi64(sum, _mm256_mul_epu32(_mm256_srli_epi64(w, 32), _mm256_srli_epi64(k, 32)));
}

/* The sum over num whole blocks, each with its factor. */
LORASYNCI_AVX2 LORASYNCI_FN uint64_t lorasynci_digest_blocks_avx2(const unsigned char *p, size_t num, uint64_t block)
{
    uint64_t sum = 0, lanes[4];
    size_t   i;
    for (; num > 0; num--, p += 256, block++) {
        __m256i a = _mm256_setzero_si256(), b = a;
        lorasynci_prefetch(p);
        for (i = 0; i < 64; i += 32) { /* not left to the compiler: at -O2 gcc unrolls nothing */
            a = lorasynci_digest_add_avx2(a, p + i * 4, lorasynci_digest_keys + i);
            b = lorasynci_digest_add_avx2(b, p + i * 4 + 32, lorasynci_digest_keys + i + 8);
            a = lorasynci_digest_add_avx2(a, p + i * 4 + 64, lorasynci_digest_keys + i + 16);
            b = lorasynci_digest_add_avx2(b, p + i * 4 + 96, lorasynci_digest_keys + i + 24);
        }
        _mm256_storeu_si256((__m256i *)(void *)lanes, _mm256_add_epi64(a, b));
        sum += (lanes[0] + lanes[1] + lanes[2] + lanes[3]) * lorasynci_digest_factor(block);
    }
    return sum;
}
#endif

LORASYNC_API uint64_t lorasync_digest(const void *bytes, size_t num_bytes, uint64_t position)
{
    const unsigned char *p     = (const unsigned char *)bytes;
    uint64_t             block = position / 256, sum = 0;
    size_t               at = (size_t)(position % 256), n;
    if (!p) return 0;
    for (; num_bytes > 0; p += n, num_bytes -= n, at = 0, block++) {
        n = 256 - at < num_bytes ? 256 - at : num_bytes;
#if defined(LORASYNCI_AVX2)
        if (n == 256 && LORASYNCI_HAS_AVX2()) {
            sum += lorasynci_digest_blocks_avx2(p, num_bytes / 256, block);
            block += num_bytes / 256 - 1;
            n = num_bytes / 256 * 256;
            continue;
        }
#endif
        lorasynci_prefetch(p);
        sum +=
            (n == 256 ? lorasynci_digest_block(p) : lorasynci_digest_part(p, n, at)) * lorasynci_digest_factor(block);
    }
    return sum;
}

/* What one tensor adds to an image's digest is (its digest + summand) * factor: a hash of name, dtype and shape, and an
   odd one of its name. */
typedef struct lorasynci_term {
    uint64_t summand, factor;
} lorasynci_term;

LORASYNCI_FN lorasynci_term lorasynci_digest_term(const lorasync_tensor *t)
{
    size_t         n = strlen(t->name);
    uint64_t       h = lorasynci_hash(t->name, n, 1) + (uint64_t)t->dtype;
    lorasynci_term term;
    int            d;
    for (d = 0; d < t->ndim; d++) h = lorasynci_mix(h) + (uint64_t)t->shape[d];
    term.summand = lorasynci_mix(h + ((uint64_t)t->ndim << 32));
    term.factor  = lorasynci_hash(t->name, n, 2) | 1u;
    return term;
}

/* The image's digest from terms that were made before. */
LORASYNCI_FN uint64_t lorasynci_digest_terms(const lorasynci_term *terms, const uint64_t *tensor_digests,
                                             size_t num_tensors)
{
    uint64_t sum = 0;
    size_t   i;
    for (i = 0; i < num_tensors; i++) sum += (tensor_digests[i] + terms[i].summand) * terms[i].factor;
    return lorasynci_mix(sum);
}

LORASYNC_API uint64_t lorasync_digest_image(const lorasync_tensor *tensors, const uint64_t *tensor_digests,
                                            size_t num_tensors)
{
    uint64_t sum = 0;
    size_t   i;
    if ((!tensors || !tensor_digests) && num_tensors) return 0;
    for (i = 0; i < num_tensors; i++) {
        lorasynci_term term = lorasynci_digest_term(&tensors[i]);
        sum += (tensor_digests[i] + term.summand) * term.factor;
    }
    return lorasynci_mix(sum);
}

/* An image says its tensors' digests, or lets them be made. */
LORASYNCI_FN lorasync_status lorasynci_check_digestible(const lorasync_image *image, lorasync_error *err)
{
    if (image->tensor_digests || (!image->on_device && (image->payload || image->delta)))
        return LORASYNC_OK; /* a delta's tensors may lie scattered */
    return lorasynci_fail(err, LORASYNC_E_STATE,
                          "the image has neither tensor_digests nor a payload in host memory to make them of");
}

LORASYNCI_FN uint64_t lorasynci_tensor_digest(const lorasync_image *image, size_t i)
{
    return image->tensor_digests ? image->tensor_digests[i]
                                 : lorasync_digest(image->tensors[i].data, image->tensors[i].num_bytes, 0);
}

LORASYNC_API uint64_t lorasync_image_digest(const lorasync_image *image, uint64_t *out_tensor_digests)
{
    uint64_t sum = 0;
    size_t   i;
    if (!image) return 0;
    for (i = 0; i < image->num_tensors; i++) {
        uint64_t       digest = lorasync_digest(image->tensors[i].data, image->tensors[i].num_bytes, 0);
        lorasynci_term term   = lorasynci_digest_term(&image->tensors[i]);
        if (out_tensor_digests) out_tensor_digests[i] = digest;
        sum += (digest + term.summand) * term.factor;
    }
    return lorasynci_mix(sum);
}

LORASYNCI_FN lorasync_status lorasynci_compare_digest(const lorasync_image *image, uint64_t found, lorasync_error *err)
{
    if (found == image->digest) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_DIGEST,
                          "adapter \"%.100s\" version %llu: the header says digest %016llx, the payload has %016llx; "
                          "the bytes are damaged or incomplete, transfer them again",
                          image->adapter, (unsigned long long)image->version, (unsigned long long)image->digest,
                          (unsigned long long)found);
}

LORASYNC_API lorasync_status lorasync_image_verify(const lorasync_image *image, lorasync_error *err)
{
    uint64_t found;
    if (!image) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_image_verify: image is NULL");
    if (!image->has_digest)
        return lorasynci_fail(
            err, LORASYNC_E_FORMAT,
            "the image carries no lorasync.digest to compare with: it was not written by this library");
    if (!image->payload && !image->delta) /* a delta's tensors may lie scattered */
        return lorasynci_fail(err, LORASYNC_E_STATE, "the image has no payload; bind one with lorasync_image_bind");
    found = lorasync_image_digest(image, NULL);
    return lorasynci_compare_digest(image, found, err);
}

LORASYNC_API lorasync_status lorasync_image_changes(const lorasync_image *image, const uint64_t *old_digests,
                                                    uint32_t *out_indices, size_t *out_num, lorasync_error *err)
{
    size_t i, n = 0;
    if (!image || !old_digests || !out_indices || !out_num)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_image_changes: image, old_digests, out_indices or out_num is NULL");
    if (image->num_tensors > UINT32_MAX)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%zu tensors are too many", image->num_tensors);
    LORASYNCI_TRY(lorasynci_check_digestible(image, err));
    for (i = 0; i < image->num_tensors; i++)
        if (lorasynci_tensor_digest(image, i) != old_digests[i]) out_indices[n++] = (uint32_t)i;
    *out_num = n;
    return LORASYNC_OK;
}

/* -- deltas

       base     | header v1 | a    | b    | c    | d    |
       delta    | header: v2, base v1, digests | b:delta | d:delta |
       result   | header v2 | a    | b'   | c    | d'   |

   The result's header is not sent. A header that the writer made follows from the tensors' names, dtypes and shapes,
   the adapter, the version and the digest, and the digest covers those names, dtypes and shapes. So the receiver writes
   it again; both sides check that theirs is such a header. */

#define LORASYNCI_DELTA_NAME ":delta"

/* For readers of adapters. */
LORASYNCI_FN lorasync_status lorasynci_refuse_delta(const lorasync_image *image, lorasync_error *err)
{
    if (!image->delta) return LORASYNC_OK;
    return lorasynci_fail(
        err, LORASYNC_E_UNSUPPORTED,
        "adapter \"%.60s\" version %llu is here only as a delta against version %llu, digest %016llx; "
        "lorasync_image_apply makes the adapter of both, or send the full image",
        image->adapter, (unsigned long long)image->version, (unsigned long long)image->delta->base_version,
        (unsigned long long)image->delta->base_digest);
}

/* The tensor of a full image that a delta's tensor of this name replaces, or NULL. `room` is memory for the name. */
LORASYNCI_FN const lorasync_tensor *lorasynci_delta_target(const lorasync_image *full, const char *name, char *room)
{
    size_t n = strlen(name), tail = sizeof LORASYNCI_DELTA_NAME - 1;
    if (n < tail || strcmp(name + n - tail, LORASYNCI_DELTA_NAME) != 0) return NULL;
    memcpy(room, name, n - tail);
    room[n - tail] = 0;
    return lorasync_image_find(full, room);
}

/* The layout of the image's tensors, with its version and digest, if that is its header byte for byte. */
LORASYNCI_FN lorasync_status lorasynci_layout_again(const lorasync_image *image, const lorasync_allocator *a,
                                                    lorasync_image **out, lorasync_error *err)
{
    lorasync_image_desc desc;
    lorasync_status     status;
    desc.tensors     = image->tensors;
    desc.num_tensors = image->num_tensors;
    desc.adapter     = image->adapter;
    status           = lorasync_image_layout(&desc, a, out, err);
    if (status == LORASYNC_E_MEMORY) return status;
    if (status >= 0) {
        lorasync_image_stamp(*out, image->version, image->digest);
        if ((*out)->header_bytes == image->header_bytes &&
            memcmp((*out)->header, image->header, image->header_bytes) == 0)
            return LORASYNC_OK;
        lorasync_image_free(*out);
        *out = NULL;
    }
    return lorasynci_fail(
        err, LORASYNC_E_UNSUPPORTED,
        "adapter \"%.100s\" version %llu: its header is not as lorasync_image_layout writes it, so a delta cannot "
        "restore it; send the full image",
        image->adapter, (unsigned long long)image->version);
}

/* Can there be a delta that makes this image? */
LORASYNCI_FN lorasync_status lorasynci_check_delta_source(const lorasync_image *image, uint64_t base_version,
                                                          const lorasync_allocator *a, lorasync_error *err)
{
    lorasync_image *again;
    if (image->delta)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_image_delta: the image is a delta itself; give the full image");
    if (!image->has_digest || !image->adapter[0])
        return lorasynci_fail(err, LORASYNC_E_STATE, "the image has no %s; a delta needs both",
                              image->has_digest ? "adapter" : "digest");
    if (image->version <= base_version)
        return lorasynci_fail(err, LORASYNC_E_VERSION,
                              "adapter \"%.100s\": a delta from version %llu to version %llu, which is not newer",
                              image->adapter, (unsigned long long)base_version, (unsigned long long)image->version);
    LORASYNCI_TRY(lorasynci_check_digestible(image, err));
    if (((const lorasynci_image_impl *)image)->stamped) return LORASYNC_OK; /* it is a layout */
    LORASYNCI_TRY(lorasynci_layout_again(image, a, &again, err));
    lorasync_image_free(again);
    return LORASYNC_OK;
}

/* What is needed while a delta is made. */
typedef struct lorasynci_changed {
    uint64_t        *digests; /* of all tensors of the image */
    lorasync_tensor *tensors; /* the changed ones, under a delta's names */
    size_t           num;
    char            *names;
} lorasynci_changed;

LORASYNCI_FN lorasync_status lorasynci_find_changed(const lorasync_image *image, const uint64_t *base_digests,
                                                    const lorasync_allocator *a, lorasynci_changed *c,
                                                    lorasync_error *err)
{
    size_t i, n = image->num_tensors, room = 0;
    char  *name;
    /* every name stands in the header; a length more would not have fitted there either */
    if (!lorasynci_checked_mul(n, sizeof LORASYNCI_DELTA_NAME, &room) ||
        !lorasynci_checked_add(room, image->header_bytes, &room))
        room = SIZE_MAX;
    c->digests = (uint64_t *)lorasynci_alloc_array(a, n, sizeof *c->digests);
    c->tensors = (lorasync_tensor *)lorasynci_alloc_array(a, n, sizeof *c->tensors);
    c->names = name = (char *)lorasynci_alloc(a, room);
    if (!c->digests || !c->tensors || !c->names) return lorasynci_fail_memory(err, room);
    for (i = 0; i < n; i++) {
        c->digests[i] = lorasynci_tensor_digest(image, i);
        if (c->digests[i] == base_digests[i]) continue;
        c->tensors[c->num]        = image->tensors[i];
        c->tensors[c->num++].name = name;
        memcpy(name, image->tensors[i].name, strlen(image->tensors[i].name));
        name += strlen(image->tensors[i].name);
        memcpy(name, LORASYNCI_DELTA_NAME, sizeof LORASYNCI_DELTA_NAME);
        name += sizeof LORASYNCI_DELTA_NAME;
    }
    return LORASYNC_OK;
}

/* Points the delta's tensors at the image's data, and stamps it. */
LORASYNCI_FN void lorasynci_bind_delta(lorasync_image *delta, const lorasync_image *image, lorasynci_changed *c)
{
    lorasync_tensor *t   = ((lorasynci_image_impl *)delta)->tensors;
    uint64_t         sum = 0;
    size_t           i;
    for (i = 0; i < c->num; i++) {
        const lorasync_tensor *target = lorasynci_delta_target(image, t[i].name, c->names); /* the layout has names of
                                                                                               its own */
        lorasynci_term         term   = lorasynci_digest_term(&t[i]);
        t[i].data                     = target->data;
        sum += (c->digests[target - image->tensors] + term.summand) * term.factor;
    }
    delta->on_device   = image->on_device;
    delta->config_json = image->config_json;
    lorasync_image_stamp(delta, image->version, lorasynci_mix(sum));
}

LORASYNC_API lorasync_status lorasync_image_delta(const lorasync_image *image, uint64_t base_version,
                                                  const uint64_t *base_digests, const lorasync_allocator *allocator,
                                                  lorasync_image **out, lorasync_error *err)
{
    lorasync_allocator  a;
    lorasynci_changed   c;
    lorasync_delta      delta;
    lorasync_image_desc desc;
    lorasync_status     status;
    if (out) *out = NULL;
    if (!image || !base_digests || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_image_delta: image, base_digests or out is NULL");
    if (!lorasynci_take_allocator(allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: give both alloc and free");
    LORASYNCI_TRY(lorasynci_check_delta_source(image, base_version, &a, err));
    memset(&c, 0, sizeof c);
    status             = lorasynci_find_changed(image, base_digests, &a, &c, err);
    delta.base_version = base_version;
    delta.base_digest  = lorasync_digest_image(image->tensors, base_digests, image->num_tensors);
    delta.full_digest  = image->digest;
    desc.tensors       = c.tensors;
    desc.num_tensors   = c.num;
    desc.adapter       = image->adapter;
    if (status >= 0) status = lorasynci_layout(&desc, &delta, &a, out, err);
    if (status >= 0) lorasynci_bind_delta(*out, image, &c);
    lorasynci_dealloc(&a, c.digests), lorasynci_dealloc(&a, c.tensors), lorasynci_dealloc(&a, c.names);
    return status;
}

/* Does a range of num_bytes share a byte with `memory`? */
LORASYNCI_FN int lorasynci_overlaps(const void *range, size_t num_bytes, const void *memory, size_t memory_bytes)
{
    uintptr_t x = (uintptr_t)range, y = (uintptr_t)memory;
    return num_bytes && memory_bytes && (x <= y ? y - x < num_bytes : x - y < memory_bytes);
}

/* Payload there, readable, and not in the memory for the result? */
LORASYNCI_FN lorasync_status lorasynci_check_readable(const lorasync_image *image, const char *what, const void *memory,
                                                      size_t memory_bytes, lorasync_error *err)
{
    size_t i;
    int    overlaps = memory && lorasynci_overlaps(image->header, image->header_bytes, memory, memory_bytes);
    for (i = 0; i < image->num_tensors; i++) {
        const lorasync_tensor *t = &image->tensors[i];
        if (image->on_device || (!t->data && t->num_bytes))
            return lorasynci_fail(err, LORASYNC_E_STATE,
                                  "lorasync_image_apply: the %s has no payload in host memory; give it one", what);
        overlaps = overlaps || (memory && lorasynci_overlaps(t->data, t->num_bytes, memory, memory_bytes));
    }
    if (!overlaps) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                          "lorasync_image_apply: memory overlaps the %s, which is only read; give other memory", what);
}

/* Is it a delta against this base? */
LORASYNCI_FN lorasync_status lorasynci_check_delta_base(const lorasync_image *base, const lorasync_image *delta,
                                                        lorasync_error *err)
{
    const lorasync_delta *d = delta->delta;
    if (base->delta || !d)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_image_apply: %s",
                              d ? "the base is a delta itself; apply it to its own base first"
                                : "the delta is none; a full image needs no base");
    if (!base->has_digest)
        return lorasynci_fail(err, LORASYNC_E_BASE,
                              "the base carries no lorasync.digest, so it may not be the delta's; send the full image");
    if (strcmp(base->adapter, delta->adapter) != 0)
        return lorasynci_fail(err, LORASYNC_E_BASE,
                              "the delta is of adapter \"%.100s\", the base is of \"%.100s\"; send the full image",
                              delta->adapter, base->adapter);
    if (base->version != d->base_version || base->digest != d->base_digest)
        return lorasynci_fail(
            err, LORASYNC_E_BASE,
            "adapter \"%.100s\" version %llu is a delta against version %llu, digest %016llx; the base is version "
            "%llu, digest %016llx; send the full image",
            delta->adapter, (unsigned long long)delta->version, (unsigned long long)d->base_version,
            (unsigned long long)d->base_digest, (unsigned long long)base->version, (unsigned long long)base->digest);
    if (delta->version > base->version) return LORASYNC_OK;
    return lorasynci_fail(
        err, LORASYNC_E_VERSION,
        "adapter \"%.100s\": the delta makes version %llu of version %llu, which is not newer; send the full image",
        delta->adapter, (unsigned long long)delta->version, (unsigned long long)base->version);
}

/* Where each tensor of the result comes from: base or delta. `room` is memory for a name. */
LORASYNCI_FN lorasync_status lorasynci_merge_delta(const lorasync_image *base, const lorasync_image *delta,
                                                   const lorasync_tensor **from, char *room, lorasync_error *err)
{
    size_t i;
    for (i = 0; i < base->num_tensors; i++) from[i] = &base->tensors[i];
    for (i = 0; i < delta->num_tensors; i++) {
        const lorasync_tensor *t = &delta->tensors[i], *target = lorasynci_delta_target(base, t->name, room);
        if (!target)
            return lorasynci_fail(
                err, LORASYNC_E_FORMAT,
                "the delta's tensor \"%.150s\": the base has none of that name without \"" LORASYNCI_DELTA_NAME
                "\" at its end; send the full image",
                t->name);
        if (t->dtype != target->dtype || t->ndim != target->ndim ||
            memcmp(t->shape, target->shape, (size_t)t->ndim * sizeof *t->shape) != 0)
            return lorasynci_fail(err, LORASYNC_E_FORMAT,
                                  "the delta's tensor \"%.100s\" is %.120s, the base has %.120s; send the full image",
                                  t->name, lorasynci_type_of(t).text, lorasynci_type_of(target).text);
        from[target - base->tensors] = t;
    }
    return LORASYNC_OK;
}

/* Writes the result behind a layout of the base's tensors, and checks it. */
LORASYNCI_FN lorasync_status lorasynci_fill_result(lorasync_image *full, const lorasync_image *delta,
                                                   const lorasync_tensor *const *from, void *memory,
                                                   lorasync_error *err)
{
    lorasynci_image_impl *m = (lorasynci_image_impl *)full;
    void           *own = memory ? NULL : lorasynci_alloc(&m->a, full->header_bytes + full->payload_bytes); /* as many
                                                                                                                as the
                                                                                                                base
                                                                                                                has */
    unsigned char  *payload;
    lorasync_status status;
    size_t          i;
    if (!memory && !own) return lorasynci_fail_memory(err, full->header_bytes + full->payload_bytes);
    lorasynci_image_move_header(full, own ? own : memory);
    m->own_header = (unsigned char *)own;
    payload       = m->stamped + full->header_bytes;
    for (i = 0; i < full->num_tensors; i++)
        if (from[i]->num_bytes) memcpy(payload + full->tensors[i].offset, from[i]->data, from[i]->num_bytes);
    lorasync_image_bind(full, payload);
    lorasync_image_stamp(full, delta->version, delta->delta->full_digest);
    m->stamped = NULL; /* from here on it is as if read */
    status     = lorasync_image_verify(full, err);
    if (status < 0) lorasynci_prefix(err, "base and delta do not make the promised image, send the full one");
    return status;
}

LORASYNC_API lorasync_status lorasync_image_apply(const lorasync_image *base, const lorasync_image *delta, void *memory,
                                                  const lorasync_allocator *allocator, lorasync_image **out,
                                                  lorasync_error *err)
{
    lorasync_allocator      a;
    lorasync_image         *full = NULL;
    const lorasync_tensor **from;
    char                   *room;
    size_t                  num_bytes;
    lorasync_status         status;
    if (out) *out = NULL;
    if (!delta || !out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_image_apply: delta or out is NULL");
    if (!lorasynci_take_allocator(allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: give both alloc and free");
    if (!base)
        return lorasynci_fail(err, LORASYNC_E_BASE,
                              "nothing is held that the delta could be applied to; send the full image");
    LORASYNCI_TRY(lorasynci_check_delta_base(base, delta, err));
    if (!lorasynci_checked_add(base->header_bytes, base->payload_bytes, &num_bytes))
        return lorasynci_fail_memory(err, SIZE_MAX);
    LORASYNCI_TRY(lorasynci_check_readable(base, "base", memory, num_bytes, err));
    LORASYNCI_TRY(lorasynci_check_readable(delta, "delta", memory, num_bytes, err));
    status = lorasync_image_verify(delta, err);
    if (status < 0) lorasynci_prefix(err, "the delta");
    if (status >= 0) status = lorasynci_layout_again(base, &a, &full, err);
    if (status < 0) return status;
    from   = (const lorasync_tensor **)lorasynci_alloc_array(&a, base->num_tensors, sizeof *from);
    room   = (char *)lorasynci_alloc(&a, delta->header_bytes);
    status = from && room ? lorasynci_merge_delta(base, delta, from, room, err)
                          : lorasynci_fail_memory(err, delta->header_bytes);
    if (status >= 0) status = lorasynci_fill_result(full, delta, from, memory, err);
    lorasynci_dealloc(&a, (void *)from), lorasynci_dealloc(&a, room);
    if (status < 0) lorasync_image_free(full);
    else *out = full;
    return status;
}

/* -------------------------------------------------------------------------------------------------------- >>plan -- */

/* Planning, once. Every rank describes what it has and wants in two flat byte strings; one rank, the planner,
   intersects the boxes and answers every rank with its own routes; each rank turns its routes into copy operations.

       rank                                       planner
       catalogue  (tensors: names, shapes)  --->  merged: one number per tensor        sent once per distinct catalogue
       parts      (boxes, by number)        --->  regions, sorted by tensor             coverage checked, owners chosen
       routes     (part, peer, offset)      <---  one list per rank
       operations (rows from here to there)                                             what runs every step

   Votes between the steps make every rank return the same verdict. */

enum {
    LORASYNCI_ALIGN = 16
}; /* of a part in a message: vector loads on any machine */

/* -- memory: the caller's allocator with a count in front */

typedef struct lorasynci_meter {
    lorasync_allocator a;
    size_t             live, peak;
} lorasynci_meter;

enum {
    LORASYNCI_METER_HEAD = 16
}; /* the size, in front of each block; keeps 16-byte alignment */

LORASYNCI_FN void *lorasynci_meter_alloc(void *user, size_t num_bytes)
{
    lorasynci_meter *m = (lorasynci_meter *)user;
    char            *p;
    if (num_bytes > SIZE_MAX - LORASYNCI_METER_HEAD) return NULL;
    p = (char *)lorasynci_alloc(&m->a, num_bytes + LORASYNCI_METER_HEAD);
    if (!p) return NULL;
    memcpy(p, &num_bytes, sizeof num_bytes);
    m->live += num_bytes;
    if (m->live > m->peak) m->peak = m->live;
    return p + LORASYNCI_METER_HEAD;
}

LORASYNCI_FN void lorasynci_meter_free(void *user, void *memory)
{
    lorasynci_meter *m = (lorasynci_meter *)user;
    char            *p = (char *)memory - LORASYNCI_METER_HEAD;
    size_t           num_bytes;
    memcpy(&num_bytes, p, sizeof num_bytes);
    m->live -= num_bytes;
    lorasynci_dealloc(&m->a, p);
}

/* -- agreeing */

typedef struct lorasynci_vote {
    int32_t  status;
    uint32_t flag;
    uint64_t tag;
    uint64_t plan; /* whose run this is about; 0: none's */
} lorasynci_vote;

LORASYNCI_FN size_t lorasynci_vote_scratch(int world) { return (size_t)world * sizeof(lorasync_error); }

/* Collective: turns each rank's status into one verdict for all, the failure of the lowest failing rank. A comm failure
   is the verdict too. `tag` must be equal on all ranks (what tags are is said in `tag_name`), as must `plan`;
   *all_flags, if wanted, becomes 1 if every rank passed flag 1. scratch: lorasynci_vote_scratch bytes. */
LORASYNCI_FN lorasync_status lorasynci_agree_on(uint64_t plan, const lorasync_comm *c, void *scratch, int timeout_ms,
                                                lorasync_status mine, const lorasync_error *why, uint64_t tag,
                                                const char *tag_name, int *all_flags, lorasync_error *err)
{
    lorasynci_vote  vote, *votes = (lorasynci_vote *)scratch;
    lorasync_error *texts = (lorasync_error *)scratch, text;
    int             i, failed = -1, differs = -1, elsewhere = -1, flags = 1;
    vote.plan   = plan;
    vote.status = (int32_t)mine;
    vote.flag   = all_flags ? (uint32_t)*all_flags : 1;
    vote.tag    = tag;
    LORASYNCI_TRY(c->all_gather(c->user, &vote, votes, sizeof vote, timeout_ms, err));
    for (i = c->world - 1; i >= 0; i--) {
        if (votes[i].status < 0) failed = i;
        if (votes[i].tag != votes[0].tag) differs = i;
        if (votes[i].plan != votes[0].plan) elsewhere = i;
        if (!votes[i].flag) flags = 0;
    }
    if (all_flags) *all_flags = flags;
    if (elsewhere >= 0)
        return lorasynci_fail(
            err, LORASYNC_E_DISAGREE,
            "rank %d is in a call for another plan (session) than rank 0; every rank must begin, and wait for, the "
            "plans of one communicator in the same order. Nothing was taken, the versions can be tried again",
            elsewhere);
    if (failed < 0 && differs < 0) return LORASYNC_OK;
    if (failed < 0)
        return lorasynci_fail(err, LORASYNC_E_DISAGREE,
                              "%s: %llu on rank 0, %llu on rank %d; every rank must pass the same", tag_name,
                              (unsigned long long)votes[0].tag, (unsigned long long)votes[differs].tag, differs);
    memset(&text, 0, sizeof text);
    if (mine < 0 && why) text = *why;
    text.text[sizeof text.text - 1] = 0;
    LORASYNCI_TRY(c->all_gather(c->user, &text, texts, sizeof text, timeout_ms, err));
    text                            = texts[failed];
    text.text[sizeof text.text - 1] = 0;
    if (c->world == 1) return lorasynci_fail(err, text.status, "%s", text.text);
    return lorasynci_fail(err, text.status, "rank %d: %.480s", failed, text.text);
}

/* The same outside of runs. */
LORASYNCI_FN lorasync_status lorasynci_agree(const lorasync_comm *c, void *scratch, int timeout_ms,
                                             lorasync_status mine, const lorasync_error *why, uint64_t tag,
                                             const char *tag_name, int *all_flags, lorasync_error *err)
{
    return lorasynci_agree_on(0, c, scratch, timeout_ms, mine, why, tag, tag_name, all_flags, err);
}

/* -- catalogue: the tensors a rank has or wants, as bytes that can be sent as they are

       | name_bytes u32 | dtype u8 | ndim u8 | wanted u16 | shape i64 x ndim | name, NUL, padding to 8 | next record
       ... */

typedef struct lorasynci_record {
    uint32_t name_bytes; /* with NUL and padding */
    uint8_t  dtype;
    uint8_t  ndim;
    uint16_t wanted;
} lorasynci_record;

typedef struct lorasynci_catalogue {
    lorasynci_buffer bytes;
    lorasynci_buffer at; /* uint32_t: where each record begins, in units of 8 bytes */
    size_t           num;
} lorasynci_catalogue;

LORASYNCI_FN const lorasynci_record *lorasynci_record_at(const lorasynci_catalogue *c, size_t i)
{
    return (const lorasynci_record *)(const void *)(c->bytes.data +
                                                    (size_t)((const uint32_t *)(const void *)c->at.data)[i] * 8);
}

LORASYNCI_FN const int64_t *lorasynci_record_shape(const lorasynci_record *r)
{
    return (const int64_t *)(const void *)(r + 1);
}

LORASYNCI_FN const char *lorasynci_record_name(const lorasynci_record *r)
{
    return (const char *)(lorasynci_record_shape(r) + r->ndim);
}

LORASYNCI_FN const char *lorasynci_catalogue_key(const void *user, size_t i)
{
    return lorasynci_record_name(lorasynci_record_at((const lorasynci_catalogue *)user, i));
}

LORASYNCI_FN void lorasynci_catalogue_init(lorasynci_catalogue *c, const lorasync_allocator *a)
{
    memset(c, 0, sizeof *c);
    lorasynci_buffer_init(&c->bytes, a);
    lorasynci_buffer_init(&c->at, a);
}

LORASYNCI_FN void lorasynci_catalogue_free(lorasynci_catalogue *c)
{
    lorasynci_buffer_free(&c->bytes);
    lorasynci_buffer_free(&c->at);
}

LORASYNCI_FN lorasync_status lorasynci_catalogue_add(lorasynci_catalogue *c, const char *name, lorasync_dtype dtype,
                                                     int ndim, const int64_t *shape, int wanted, lorasync_error *err)
{
    static const char padding[8] = {0};
    lorasynci_record  r;
    size_t            n  = strlen(name) + 1;
    uint32_t          at = (uint32_t)(c->bytes.size / 8);
    memset(&r, 0, sizeof r);
    r.name_bytes = (uint32_t)((n + 7) / 8 * 8);
    r.dtype      = (uint8_t)dtype;
    r.ndim       = (uint8_t)ndim;
    r.wanted     = (uint16_t)wanted;
    lorasynci_put(&c->bytes, &r, sizeof r);
    lorasynci_put(&c->bytes, shape, (size_t)ndim * 8);
    lorasynci_put(&c->bytes, name, n);
    lorasynci_put(&c->bytes, padding, r.name_bytes - n);
    lorasynci_put(&c->at, &at, sizeof at);
    if (c->bytes.failed || c->at.failed || c->bytes.size / 8 > UINT32_MAX)
        return lorasynci_fail_memory(err, c->bytes.size);
    c->num++;
    return LORASYNC_OK;
}

/* Finds the records in bytes that came from another rank. */
LORASYNCI_FN lorasync_status lorasynci_catalogue_index(lorasynci_catalogue *c, int rank, lorasync_error *err)
{
    uint64_t at = 0;
    uint32_t unit;
    if (c->bytes.size / 8 > UINT32_MAX) return lorasynci_fail_memory(err, c->bytes.size);
    while (at < c->bytes.size) {
        const lorasynci_record *r    = (const lorasynci_record *)(const void *)(c->bytes.data + at);
        uint64_t                left = c->bytes.size - at, need;
        need                         = sizeof *r;
        if (left >= need) need += (uint64_t)r->ndim * 8 + r->name_bytes;
        if (left < need || r->ndim > LORASYNC_MAX_DIMS || r->name_bytes % 8 != 0 || r->name_bytes == 0 ||
            r->name_bytes > LORASYNC_MAX_NAME + 8 || c->bytes.data[at + need - 1] != 0)
            return lorasynci_fail(
                err, LORASYNC_E_COMM,
                "the catalogue of rank %d is damaged at byte %llu; do all ranks use the same lorasync.h?", rank,
                (unsigned long long)at);
        unit = (uint32_t)(at / 8);
        lorasynci_put(&c->at, &unit, sizeof unit);
        at += need;
        c->num++;
    }
    return c->at.failed ? lorasynci_fail_memory(err, c->num * 8) : LORASYNC_OK;
}

/* -- parts: the non-empty boxes of this rank's pieces; a flat piece becomes up to 2 * ndim - 1 of them

   sent as | tensor u32 | 0 u32 | off i64 x ndim | len i64 x ndim | each; kept here as well, with the address, until the
   operations exist */

typedef struct lorasynci_part {
    char    *data;     /* of the box's first element */
    uint64_t geometry; /* where off, len and stride (each ndim) begin in `geometry` of the list */
    uint32_t tensor;   /* number in the rank's catalogue */
    float    scale;
} lorasynci_part;

typedef struct lorasynci_parts {
    lorasynci_buffer list;     /* lorasynci_part */
    lorasynci_buffer geometry; /* int64_t */
} lorasynci_parts;

LORASYNCI_FN size_t lorasynci_parts_num(const lorasynci_parts *p) { return p->list.size / sizeof(lorasynci_part); }

LORASYNCI_FN const lorasynci_part *lorasynci_part_at(const lorasynci_parts *p, size_t i)
{
    return (const lorasynci_part *)(const void *)p->list.data + i;
}

LORASYNCI_FN const int64_t *lorasynci_part_geometry(const lorasynci_parts *p, const lorasynci_part *part)
{
    return (const int64_t *)(const void *)p->geometry.data + part->geometry;
}

LORASYNCI_FN void lorasynci_parts_add(lorasynci_parts *p, uint32_t tensor, char *data, float scale, const int64_t *off,
                                      const int64_t *len, const int64_t *stride, int ndim)
{
    lorasynci_part part;
    part.data     = data;
    part.geometry = p->geometry.size / 8;
    part.tensor   = tensor;
    part.scale    = scale;
    lorasynci_put(&p->list, &part, sizeof part);
    lorasynci_put(&p->geometry, off, (size_t)ndim * 8);
    lorasynci_put(&p->geometry, len, (size_t)ndim * 8);
    lorasynci_put(&p->geometry, stride, (size_t)ndim * 8);
}

/* Row-major strides, in elements, of a block of these lengths. */
LORASYNCI_FN void lorasynci_row_major(const int64_t *len, int ndim, int64_t *stride)
{
    int64_t s = 1;
    int     d;
    for (d = ndim - 1; d >= 0; d--) {
        stride[d] = s;
        s *= len[d];
    }
}

typedef struct lorasynci_flat_user {
    lorasynci_parts      *parts;
    const lorasync_piece *piece;
    uint32_t              tensor;
    size_t                item;
} lorasynci_flat_user;

/* A box of a flat piece lies in memory as in the whole tensor: same strides, first element at its place in the
   interval. */
LORASYNCI_FN lorasync_status lorasynci_flat_part_add(void *user, const int64_t *off, const int64_t *len, int64_t before)
{
    lorasynci_flat_user *u = (lorasynci_flat_user *)user;
    int64_t              stride[LORASYNC_MAX_DIMS];
    lorasynci_row_major(u->piece->shape, u->piece->ndim, stride);
    lorasynci_parts_add(u->parts, u->tensor, (char *)u->piece->data + (size_t)before * u->item, (float)u->piece->scale,
                        off, len, stride, u->piece->ndim);
    return LORASYNC_OK;
}

/* Strides are given all or not at all: one that was forgotten would read, or write, one element again and again. */
LORASYNCI_FN lorasync_status lorasynci_stride_check(const lorasync_piece *p, int empty, lorasync_error *err)
{
    int d, strided = 0;
    for (d = 0; d < p->ndim; d++) strided |= p->stride[d] != 0;
    if (strided && p->box.flat)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "%.200s: a flat interval has no strides; leave piece.stride zero", p->name);
    for (d = 0; strided && !empty && d < p->ndim; d++)
        if (p->stride[d] == 0 && p->box.len[d] > 1)
            return lorasynci_fail(
                err, LORASYNC_E_ARGUMENT,
                "%.200s: stride 0 along dimension %d, of length %lld, beside others that are set; give all of them, or "
                "none for row-major",
                p->name, d, (long long)p->box.len[d]);
    return LORASYNC_OK;
}

/* The scale is used as an F32, by what is sent only. */
LORASYNCI_FN lorasync_status lorasynci_scale_check(const lorasync_piece *p, int wanted, lorasync_error *err)
{
    double size = p->scale < 0 ? -p->scale : p->scale;
    if (p->scale != p->scale || p->scale - p->scale != 0)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: scale is not a finite number", p->name);
    if (size == 0 || p->scale == 1) return LORASYNC_OK;
    if (!lorasynci_is_float(p->dtype))
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED, "%.200s: %s cannot be scaled; leave piece.scale 0", p->name,
                              lorasync_dtype_name(p->dtype));
    if (wanted)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "%.200s: a wanted piece cannot be scaled; scale those that are held, and leave its piece.scale 0", p->name);
    if (size > 3.4028234663852886e38 || (float)size == 0)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: scale %g is %s as F32", p->name, p->scale,
                              size > 1 ? "Inf" : "0");
    return LORASYNC_OK;
}

/* What is wrong with a piece in itself, without the other ranks. */
LORASYNCI_FN lorasync_status lorasynci_piece_check(const lorasync_piece *p, int wanted, lorasync_error *err)
{
    int     bits = lorasync_dtype_bits(p->dtype), d, empty = 0;
    int64_t numel;
    if (!p->name || !p->name[0]) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "a piece has no name");
    if (strlen(p->name) >= LORASYNC_MAX_NAME)
        return lorasynci_fail(err, LORASYNC_E_NAME, "%.200s...: names may have %d bytes at most", p->name,
                              LORASYNC_MAX_NAME - 1);
    if (bits == 0)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: dtype %d is none; set piece.dtype", p->name,
                              (int)p->dtype);
    if (bits < 8)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "%.200s: %s packs several elements into a byte and cannot be a piece; pass the bytes as U8", p->name,
            lorasync_dtype_name(p->dtype));
    LORASYNCI_TRY(lorasynci_box_check(p, err));
    for (d = 0; d < p->box.ndim; d++) empty |= p->box.len[d] == 0;
    if (!lorasynci_numel(p->shape, p->ndim, &numel) || numel > INT64_MAX / (bits / 8))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: the tensor passes 2^63 bytes", p->name);
    if (!p->data && !empty)
        return lorasynci_fail(
            err, LORASYNC_E_ARGUMENT,
            "%.200s: data is NULL but the box is not empty; pass an empty box where a rank holds nothing", p->name);
    LORASYNCI_TRY(lorasynci_stride_check(p, empty, err));
    return lorasynci_scale_check(p, wanted, err);
}

/* The number of a piece's tensor in the catalogue; a new tensor is added. Pieces of one tensor must agree on shape and
   dtype. */
LORASYNCI_FN lorasync_status lorasynci_describe_tensor(const lorasync_piece *p, int wanted, lorasynci_table *names,
                                                       lorasynci_catalogue *catalogue, uint32_t *out,
                                                       lorasync_error *err)
{
    size_t t = lorasynci_table_insert(names, p->name, catalogue->num, lorasynci_catalogue_key, catalogue);
    const lorasynci_record *r;
    *out = (uint32_t)t;
    if (t == catalogue->num)
        return lorasynci_catalogue_add(catalogue, p->name, p->dtype, p->ndim, p->shape, wanted, err);
    r = lorasynci_record_at(catalogue, t);
    if (r->dtype != (int)p->dtype || r->ndim != p->ndim ||
        memcmp(lorasynci_record_shape(r), p->shape, (size_t)p->ndim * 8) != 0)
        return lorasynci_fail(err, LORASYNC_E_DISAGREE,
                              "%.200s: two pieces of this rank give different shapes or dtypes", p->name);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_describe_boxes(const lorasync_piece *p, uint32_t tensor, lorasynci_parts *parts,
                                                      lorasync_error *err)
{
    lorasync_piece q = *p;
    if (q.scale == 0) q.scale = 1;
    if (q.box.flat) {
        lorasynci_flat_user u;
        u.parts  = parts;
        u.piece  = &q;
        u.tensor = tensor;
        u.item   = (size_t)lorasync_dtype_bits(q.dtype) / 8;
        LORASYNCI_TRY(lorasynci_flat_boxes(q.shape, q.ndim, q.box.off[0], q.box.len[0], lorasynci_flat_part_add, &u));
    } else if (lorasynci_box_numel(q.box.len, q.ndim) > 0) {
        int64_t contiguous[LORASYNC_MAX_DIMS];
        int     d, strided = 0;
        lorasynci_row_major(q.box.len, q.ndim, contiguous);
        for (d = 0; d < q.ndim; d++) strided |= q.stride[d] != 0;
        lorasynci_parts_add(parts, tensor, (char *)q.data, (float)q.scale, q.box.off, q.box.len,
                            strided ? q.stride : contiguous, q.ndim);
    }
    return parts->list.failed || parts->geometry.failed ? lorasynci_fail_memory(err, parts->geometry.size)
                                                        : LORASYNC_OK;
}

/* One list of pieces into catalogue and parts. */
LORASYNCI_FN lorasync_status lorasynci_describe(const lorasync_piece *pieces, size_t num, int wanted,
                                                const lorasync_allocator *a, lorasynci_catalogue *catalogue,
                                                lorasynci_parts *parts, lorasync_error *err)
{
    lorasynci_table names;
    lorasync_status status = LORASYNC_OK;
    size_t          i;
    uint32_t        tensor;
    if (!num) return LORASYNC_OK;
    if (!pieces)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%zu %s pieces are announced but the list is NULL", num,
                              wanted ? "wanted" : "held");
    if (num > UINT32_MAX / 2 || !lorasynci_table_init(&names, a, num)) return lorasynci_fail_memory(err, num * 8);
    for (i = 0; i < num && status == LORASYNC_OK; i++) {
        status = lorasynci_piece_check(&pieces[i], wanted, err);
        if (status == LORASYNC_OK)
            status = lorasynci_describe_tensor(&pieces[i], wanted, &names, catalogue, &tensor, err);
        if (status == LORASYNC_OK) status = lorasynci_describe_boxes(&pieces[i], tensor, parts, err);
    }
    lorasynci_table_free(&names);
    return status;
}

/* The parts as bytes for the planner. */
LORASYNCI_FN void lorasynci_parts_pack(const lorasynci_parts *parts, const lorasynci_catalogue *catalogue,
                                       lorasynci_buffer *out)
{
    size_t i, num = lorasynci_parts_num(parts);
    for (i = 0; i < num; i++) {
        const lorasynci_part *p    = lorasynci_part_at(parts, i);
        size_t                ndim = lorasynci_record_at(catalogue, p->tensor)->ndim;
        uint64_t              head = p->tensor;
        lorasynci_put(out, &head, 8);
        lorasynci_put(out, lorasynci_part_geometry(parts, p), ndim * 16);
    }
}

/* -- operations: one op moves n0 rows of n1 elements and converts them on the way

       src  + i0 * s0 + i1 * s1   ->   dst + i0 * d0 + i1 * d1           strides in elements of their own dtype
       in its tensor the element is number pos + i0 * row + i1           what the digest needs

   src and dst are addresses, or offsets in one of the plan's memories. */
typedef enum lorasynci_space {
    LORASYNCI_MEMORY = 0, /* the caller's; src or dst is the address */
    LORASYNCI_SEND,       /* staging for messages to others */
    LORASYNCI_RECEIVE,    /* staging for messages from others */
    LORASYNCI_IMAGE,      /* the image's payload */
    LORASYNCI_NUM_SPACES
} lorasynci_space;

typedef struct lorasynci_op {
    uint64_t src, dst;
    int64_t  n1, pos;
    uint32_t tensor; /* number in this rank's catalogue, or in the image when there is no part at this end */
    uint32_t grid;   /* number in `grids` */
    uint8_t  src_space, dst_space, src_dtype, dst_dtype;
    uint16_t round;  /* place: the exchange after which it runs */
    uint8_t  digest; /* 1: adds to its tensor's digest and is checked for NaN */
    uint8_t  via;    /* a dtype to round to on the way, or 0: what a rank serves itself is what it would have sent */
} lorasynci_op;

/* The rest of an operation, which many have in common: one row without gaps is one grid for all. */
typedef struct lorasynci_grid {
    int64_t n0, s0, s1, d0, d1, row;
    float   scale;
    int32_t unused;
} lorasynci_grid;

/* A list of operations and their grids. */
typedef struct lorasynci_ops {
    lorasynci_buffer list;  /* lorasynci_op */
    lorasynci_buffer grids; /* lorasynci_grid */
} lorasynci_ops;

LORASYNCI_FN size_t lorasynci_ops_num(const lorasynci_ops *o) { return o->list.size / sizeof(lorasynci_op); }

LORASYNCI_FN const lorasynci_op *lorasynci_ops_at(const lorasynci_ops *o, size_t i)
{
    return (const lorasynci_op *)(const void *)o->list.data + i;
}

LORASYNCI_FN const lorasynci_grid *lorasynci_op_grid(const lorasynci_ops *o, const lorasynci_op *op)
{
    return (const lorasynci_grid *)(const void *)o->grids.data + op->grid;
}

/* The number of a grid: one of the last two if it is equal (lora_A and lora_B take turns), else a new one. */
LORASYNCI_FN uint32_t lorasynci_ops_grid(lorasynci_ops *o, const lorasynci_grid *grid)
{
    size_t num = o->grids.size / sizeof *grid, i;
    for (i = num; i > 0 && num - i < 2; i--)
        if (memcmp((const lorasynci_grid *)(const void *)o->grids.data + i - 1, grid, sizeof *grid) == 0)
            return (uint32_t)(i - 1);
    lorasynci_put(&o->grids, grid, sizeof *grid);
    return (uint32_t)num;
}

LORASYNCI_FN int lorasynci_ops_failed(const lorasynci_ops *o) { return o->list.failed || o->grids.failed; }

/* One end of a movement: where the element at `off` lies, and how its neighbours do. */
typedef struct lorasynci_end {
    lorasynci_space space;
    lorasync_dtype  dtype;
    uint64_t        at; /* address or offset of the element at `off` */
    int64_t         off[LORASYNC_MAX_DIMS];
    int64_t         stride[LORASYNC_MAX_DIMS];
} lorasynci_end;

LORASYNCI_FN int64_t lorasynci_item(lorasync_dtype dtype) { return lorasync_dtype_bits(dtype) / 8; }

/* Elements from `base` (NULL: the origin) to `off` under these strides. */
LORASYNCI_FN int64_t lorasynci_distance(const int64_t *off, const int64_t *base, const int64_t *stride, int ndim)
{
    int64_t n = 0;
    int     d;
    for (d = 0; d < ndim; d++) n += (base ? off[d] - base[d] : off[d]) * stride[d];
    return n;
}

LORASYNCI_FN uint64_t lorasynci_end_at(const lorasynci_end *e, const int64_t *off, int ndim)
{
    return e->at + (uint64_t)(lorasynci_distance(off, e->off, e->stride, ndim) * lorasynci_item(e->dtype));
}

/* Dimensions of a movement after neighbours that run on without a gap at both ends, and in the tensor, have been
   joined; outermost first. */
typedef struct lorasynci_dims {
    int     num;
    int64_t len[LORASYNC_MAX_DIMS + 1], src[LORASYNC_MAX_DIMS + 1], dst[LORASYNC_MAX_DIMS + 1],
        pos[LORASYNC_MAX_DIMS + 1];
} lorasynci_dims;

LORASYNCI_FN void lorasynci_join_dims(lorasynci_dims *out, const int64_t *len, int ndim, const int64_t *src,
                                      const int64_t *dst, const int64_t *pos)
{
    lorasynci_dims in; /* innermost first */
    int            d, i;
    in.num = 0;
    for (d = ndim - 1; d >= 0; d--) {
        int k = in.num - 1;
        if (len[d] == 1) continue;
        if (k >= 0 && src[d] == in.src[k] * in.len[k] && dst[d] == in.dst[k] * in.len[k] &&
            pos[d] == in.pos[k] * in.len[k]) {
            in.len[k] *= len[d];
            continue;
        }
        if (in.num == 0 && pos[d] != 1) { /* rows are runs of the tensor: here of one element */
            in.len[0] = in.src[0] = in.dst[0] = in.pos[0] = 1;
            in.num                                        = 1;
        }
        k         = in.num++;
        in.len[k] = len[d];
        in.src[k] = src[d];
        in.dst[k] = dst[d];
        in.pos[k] = pos[d];
    }
    for (; in.num < 2; in.num++) { /* at least row and column */
        in.len[in.num] = 1;
        in.src[in.num] = in.dst[in.num] = in.pos[in.num] = in.num == 0 ? 1 : 0;
    }
    out->num = in.num;
    for (i = 0; i < in.num; i++) {
        out->len[i] = in.len[in.num - 1 - i];
        out->src[i] = in.src[in.num - 1 - i];
        out->dst[i] = in.dst[in.num - 1 - i];
        out->pos[i] = in.pos[in.num - 1 - i];
    }
}

/* Appends the ops that move box (off, len) of a tensor from one end to the other: one, or one per index of the
   dimensions beyond two. */
LORASYNCI_FN void lorasynci_add_ops(lorasynci_ops *ops, const int64_t *off, const int64_t *len, const int64_t *shape,
                                    int ndim, const lorasynci_end *src, const lorasynci_end *dst, uint32_t tensor,
                                    float scale, uint32_t round, int digest, lorasync_dtype via)
{
    int64_t        tensor_stride[LORASYNC_MAX_DIMS], index[LORASYNC_MAX_DIMS + 1] = {0};
    lorasynci_dims dims;
    lorasynci_op   op;
    lorasynci_grid grid;
    int            d, outer;
    lorasynci_row_major(shape, ndim, tensor_stride);
    lorasynci_join_dims(&dims, len, ndim, src->stride, dst->stride, tensor_stride);
    outer = dims.num - 2;
    memset(&op, 0, sizeof op);
    op.src       = lorasynci_end_at(src, off, ndim);
    op.dst       = lorasynci_end_at(dst, off, ndim);
    op.pos       = lorasynci_distance(off, NULL, tensor_stride, ndim);
    op.n1        = dims.len[outer + 1];
    op.tensor    = tensor;
    op.round     = (uint16_t)round;
    op.digest    = (uint8_t)digest;
    op.via       = (uint8_t)via;
    op.src_space = (uint8_t)src->space;
    op.dst_space = (uint8_t)dst->space;
    op.src_dtype = (uint8_t)src->dtype;
    op.dst_dtype = (uint8_t)dst->dtype;
    memset(&grid, 0, sizeof grid);
    grid.n0    = dims.len[outer];
    grid.s0    = grid.n0 > 1 ? dims.src[outer] : 0;
    grid.d0    = grid.n0 > 1 ? dims.dst[outer] : 0;
    grid.row   = grid.n0 > 1 ? dims.pos[outer] : 0;
    grid.s1    = op.n1 > 1 ? dims.src[outer + 1] : 1;
    grid.d1    = op.n1 > 1 ? dims.dst[outer + 1] : 1;
    grid.scale = scale;
    op.grid    = lorasynci_ops_grid(ops, &grid);
    for (;;) {
        lorasynci_put(&ops->list, &op, sizeof op);
        for (d = outer - 1; d >= 0; d--) { /* count up the outer dimensions like an odometer */
            op.src += (uint64_t)(dims.src[d] * lorasynci_item(src->dtype));
            op.dst += (uint64_t)(dims.dst[d] * lorasynci_item(dst->dtype));
            op.pos += dims.pos[d];
            if (++index[d] < dims.len[d]) break;
            op.src -= (uint64_t)(dims.src[d] * dims.len[d] * lorasynci_item(src->dtype));
            op.dst -= (uint64_t)(dims.dst[d] * dims.len[d] * lorasynci_item(dst->dtype));
            op.pos -= dims.pos[d] * dims.len[d];
            index[d] = 0;
        }
        if (d < 0) return;
    }
}

/* -- the plan */

/* The bytes between this rank and one peer, one way: a stream cut into rounds; the sender's digests follow the last
   one.

       stream   | round 0 ........ | round 1 ..... | round 2 .. | digests |
       ends         e0              e1           e2                  the next round begins at the next multiple of 16 */
typedef struct lorasynci_link {
    lorasynci_buffer ends;  /* uint64_t per round */
    uint64_t         base;  /* where it begins in staging */
    int              whole; /* sending: the stream lies in staging as it is: the snapshot */
    uint64_t  half; /* else: odd rounds lie this much further, so that one is packed or placed while the other travels;
                      0: all lie at base */
    uint32_t *digests; /* receiving: the image tensor of each */
    size_t    num_digests;
} lorasynci_link;

typedef struct lorasynci_device lorasynci_device;

struct lorasync_plan {
    lorasynci_meter       meter; /* counts what the plan allocates */
    lorasync_allocator    a;     /* goes through the meter */
    lorasync_comm         comm;
    lorasync_plan_kind    kind;
    int                   root, timeout_ms, allow_nan;
    int                   has_image; /* this rank's end is an image: root of a gather or scatter, everybody of a
                                        gather-all */
    int                   direct;    /* the image is mapped by every rank; reshard: see lorasynci_is_meshed */
    int                   lent;      /* staging and payload are not its own: lorasynci_plan_lend gives them before the
                                        first run */
    int                   begun;
    lorasync_status       lost;                         /* the status with which the communicator went, or 0 */
    lorasync_error        begin_error;                  /* of the last begin; status 0 when it succeeded */
    const lorasync_error *objection;                    /* a failure in it is this rank's vote on a run, too; or NULL */
    uint64_t              id;                           /* the same on all ranks, and no other plan's */
    uint64_t              tag;                          /* what all ranks must agree on at each run: the session's
                                                           version */
    uint64_t              run;                          /* counts waits: equal on all ranks, whoever did not begin */
    lorasynci_catalogue   catalogue;                    /* this rank's tensors */
    lorasynci_ops         pack;                         /* out of the caller's memory (or the image) */
    lorasynci_ops         place;                        /* out of receive staging, rounds in order */
    lorasynci_link       *sends, *receives;             /* world each; a gather-all sends one stream to all: sends[0] */
    lorasync_message     *messages;                     /* 2 * world: scratch of an exchange */
    char                 *memory[LORASYNCI_NUM_SPACES]; /* base of each space; LORASYNCI_MEMORY stays NULL */
    size_t                staging_bytes[LORASYNCI_NUM_SPACES];
    uint32_t              num_rounds;
    void                 *votes;
    uint64_t             *sums;  /* digest of each catalogue tensor, as far as this rank packs it */
    uint32_t             *index; /* per catalogue tensor: its place in the image of a gather */
    uint32_t             *slots; /* catalogue tensors whose sums are sent, in stream order */
    size_t                num_slots;
    /* the image of a gather */
    lorasync_image *image;
    char           *image_memory; /* | header | payload | ; inside `shared` when direct */
    uint64_t       *tensor_digests;
    lorasynci_term *terms; /* per image tensor: its part in the image's digest */
    /* direct: what the ranks share,
       | header | payload | to 64 | sums of runs 0, 2, .. | sums of runs 1, 3, .. | to 64 | line of rank 0: 64 | line of
       rank 1 | .. Sums are num_image_tensors for each rank; twice, since in runs that are captured a rank may write
       while another still reads the last.
       A reshard has instead of header, payload and sums:  | slot of rank 0 | slot of rank 1 | ..
       (lorasynci_mesh_slot)             */
    lorasynci_window      shared;
    uint64_t             *shared_sums;
    size_t                num_image_tensors;
    uint64_t             *lines;    /* in `shared`: see LORASYNCI_BEGUN */
    lorasynci_gpu        *gpu;      /* with desc.cuda; else NULL */
    lorasynci_device     *device;   /* with it; else NULL */
    int                   captured; /* begin was recorded in a CUDA graph: each launch of it is a run */
    const lorasync_image *source;   /* scatter, on the root */
    lorasync_plan_stats   stats;
};

/* The GPU's part of a plan; in a library without CUDA these refuse. */
LORASYNCI_FN lorasync_status lorasynci_device_open(lorasync_plan *plan, const lorasync_cuda *cuda, lorasync_error *err);
LORASYNCI_FN void            lorasynci_device_close(lorasync_plan *plan);
LORASYNCI_FN lorasync_status lorasynci_device_make_image(lorasync_plan *plan, lorasynci_device_offer *offer,
                                                         lorasync_error *err);
LORASYNCI_FN int             lorasynci_device_map(lorasync_plan *plan, const lorasynci_device_offer *offer);
LORASYNCI_FN void            lorasynci_device_unmap(lorasync_plan *plan);
LORASYNCI_FN int             lorasynci_device_offer_staging(lorasync_plan *plan, size_t num_bytes);
LORASYNCI_FN int             lorasynci_device_map_mesh(lorasync_plan *plan);
LORASYNCI_FN void            lorasynci_device_leave_mesh(lorasync_plan *plan);
LORASYNCI_FN lorasync_status lorasynci_device_allocate(lorasync_plan *plan, lorasync_error *err);
LORASYNCI_FN lorasync_status lorasynci_device_lend(lorasync_plan *plan, void *host_payload, lorasync_error *err);
LORASYNCI_FN lorasync_status lorasynci_device_begin(lorasync_plan *plan, lorasync_error *err);
LORASYNCI_FN lorasync_status lorasynci_device_move(lorasync_plan *plan, lorasync_error *err);
LORASYNCI_FN int             lorasynci_device_voted(const lorasync_plan *plan);
LORASYNCI_FN int             lorasynci_device_casts(const lorasync_plan *plan);
LORASYNCI_FN void            lorasynci_device_veto(lorasync_plan *plan);
LORASYNCI_FN lorasync_status lorasynci_device_await_caller(lorasync_plan *plan, lorasync_error *err);
LORASYNCI_FN lorasync_status lorasynci_device_image(lorasync_plan *plan, lorasync_error *err);
LORASYNCI_FN int             lorasynci_device_await_holders(lorasync_plan *plan);
LORASYNCI_FN void            lorasynci_device_settle(lorasync_plan *plan);
LORASYNCI_FN void            lorasynci_device_forget(lorasync_plan *plan);
LORASYNCI_FN int             lorasynci_device_keeps(const lorasynci_device *g);

/* The words of a rank's line, which only that rank writes. Runs count from 1. */
enum {
    LORASYNCI_BEGUN = 0, /* the run that it has begun; 0 again when it has freed the plan */
    LORASYNCI_HOLDS = 1, /* its process (lorasynci_process_self) while it has others' device memory open */
    LORASYNCI_VOTE  = 2, /* two: its votes on even and on odd runs */
    LORASYNCI_VOTED = 4  /* two: the runs that these are about */
};

LORASYNCI_FN uint64_t *lorasynci_word(const lorasync_plan *plan, int rank, int word)
{
    return &plan->lines[8 * (size_t)rank + (size_t)word];
}

/* A reshard in which every rank writes into the receive staging of those who want something of it; the only exchange is
   a vote. */
LORASYNCI_FN int lorasynci_is_meshed(const lorasync_plan *plan)
{
    return plan->direct && plan->kind == LORASYNC_RESHARD;
}

/* In the mapping of a meshed plan: | receive staging of that rank | where in it each rank's bytes begin: uint64_t each
   | to 64 */
LORASYNCI_FN size_t lorasynci_mesh_slot_bytes(int world)
{
    return (sizeof(lorasynci_device_offer) + (size_t)world * sizeof(uint64_t) + 63) / 64 * 64;
}

LORASYNCI_FN lorasynci_device_offer *lorasynci_mesh_slot(const lorasync_plan *plan, int rank)
{
    return (lorasynci_device_offer *)(void *)(plan->shared.address +
                                              (size_t)rank * lorasynci_mesh_slot_bytes(plan->comm.world));
}

LORASYNCI_FN uint64_t *lorasynci_mesh_starts(const lorasync_plan *plan, int rank)
{
    return (uint64_t *)(void *)(lorasynci_mesh_slot(plan, rank) + 1);
}

/* Whether the rounds of a run overlap: while one travels, the one before is placed and the one behind packed. */
LORASYNCI_FN int lorasynci_is_pipelined(const lorasync_plan *plan)
{
    return plan->device && plan->comm.exchange_stream;
}

/* -- the planner */

/* A non-empty box of some rank, as it arrived. */
typedef struct lorasynci_region {
    const int64_t *box;    /* off, then len; inside the rank's message */
    uint32_t       tensor; /* merged number */
    uint32_t       rank;
    uint32_t       item; /* number of the part on that rank */
} lorasynci_region;

/* Regions grouped by tensor: those of tensor t are list[starts[t]] .. list[starts[t + 1] - 1], sorted by box, then
   rank. */
typedef struct lorasynci_regions {
    lorasynci_region *list;
    size_t           *starts;
    size_t            num;
} lorasynci_regions;

/* The stream from one rank to another while it is laid out. */
typedef struct lorasynci_stream {
    uint64_t at, round_start;
    uint32_t round;
} lorasynci_stream;

/* What a rank learns about one of its routes. For a route to itself peer is its own rank, and `at` the item at the
   other end. */
typedef struct lorasynci_route {
    uint32_t item; /* its part, or image tensor */
    uint32_t peer;
    uint64_t at; /* in the stream */
    uint32_t round;
    uint32_t boxed; /* off and len (ndim each) follow; else the whole part */
} lorasynci_route;

typedef struct lorasynci_planner {
    lorasync_plan            *plan;
    const lorasync_plan_desc *desc;
    int                       world;
    lorasynci_catalogue      *catalogues; /* per rank; num 0 where another rank's is meant */
    int                      *same_as;    /* per rank: whose catalogue it has */
    uint32_t                **numbers;    /* per rank with a catalogue: merged number of each of its tensors */
    char                    **parts;      /* per rank: its parts as received */
    size_t                   *parts_bytes;
    lorasynci_catalogue       merged; /* tensors that are held; of a scatter, those of the image */
    lorasynci_table           names;
    int                      *first_rank; /* per merged tensor: who named it first, for messages */
    lorasynci_regions         held, wanted;
    uint32_t                 *image_index;  /* per merged tensor: its place in the image */
    uint32_t                 *merged_index; /* the inverse */
    lorasynci_stream         *streams;
    uint64_t                 *load;      /* per rank: bytes it sends */
    uint64_t                  pair_cap;  /* bytes of one stream in one round */
    uint64_t                  first_cap; /* the same of round 0; each further round may have twice as much, until
                                            pair_cap */
    uint32_t                  num_rounds;
    lorasynci_buffer         *sends, *receives; /* per rank: lorasynci_route ... */
    lorasynci_buffer         *digests;          /* per rank: uint32_t image tensor of each digest it sends */
} lorasynci_planner;

LORASYNCI_FN const char *lorasynci_merged_name(const lorasynci_planner *p, size_t t)
{
    return lorasynci_record_name(lorasynci_record_at(&p->merged, t));
}

/* Two descriptions of one tensor must agree in shape, and in dtype unless one is what is wanted. */
LORASYNCI_FN lorasync_status lorasynci_merge_check(const lorasynci_planner *p, size_t t, const lorasynci_record *r,
                                                   int rank, lorasync_error *err)
{
    const lorasynci_record *m = lorasynci_record_at(&p->merged, t);
    char                    ours[128], theirs[128];
    int                     first = p->first_rank[t];
    if (m->ndim != r->ndim || memcmp(lorasynci_record_shape(m), lorasynci_record_shape(r), (size_t)m->ndim * 8) != 0)
        return lorasynci_fail(err, LORASYNC_E_DISAGREE, "%.200s: shape %s %s %d, %s on rank %d",
                              lorasynci_record_name(r),
                              lorasynci_shape_text(lorasynci_record_shape(m), m->ndim, ours, sizeof ours),
                              first < 0 ? "in the image of rank" : "on rank", first < 0 ? p->plan->root : first,
                              lorasynci_shape_text(lorasynci_record_shape(r), r->ndim, theirs, sizeof theirs), rank);
    if (!r->wanted && m->dtype != r->dtype)
        return lorasynci_fail(err, LORASYNC_E_DISAGREE, "%.200s: dtype %s on rank %d, %s on rank %d",
                              lorasynci_record_name(r), lorasync_dtype_name((lorasync_dtype)m->dtype), first,
                              lorasync_dtype_name((lorasync_dtype)r->dtype), rank);
    if (r->wanted && !lorasynci_can_convert((lorasync_dtype)m->dtype, (lorasync_dtype)r->dtype))
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                              "%.200s: is held as %s and wanted as %s by rank %d; only float types are converted",
                              lorasynci_record_name(r), lorasync_dtype_name((lorasync_dtype)m->dtype),
                              lorasync_dtype_name((lorasync_dtype)r->dtype), rank);
    return LORASYNC_OK;
}

/* Enters one tensor of a rank; *number is its merged number. A wanted tensor must be held already. */
LORASYNCI_FN lorasync_status lorasynci_merge_record(lorasynci_planner *p, const lorasynci_record *r, int rank,
                                                    uint32_t *number, lorasync_error *err)
{
    const char *name = lorasynci_record_name(r);
    size_t      t;
    if (r->wanted) {
        t = lorasynci_table_find(&p->names, name, lorasynci_catalogue_key, &p->merged);
        if (t == SIZE_MAX)
            return lorasynci_fail(err, LORASYNC_E_NOT_FOUND, "%.200s: wanted by rank %d, %s", name, rank,
                                  p->desc->kind == LORASYNC_SCATTER ? "not in the image" : "held by no rank");
    } else {
        t = lorasynci_table_insert(&p->names, name, p->merged.num, lorasynci_catalogue_key, &p->merged);
    }
    *number = (uint32_t)t;
    if (t < p->merged.num) return lorasynci_merge_check(p, t, r, rank, err);
    p->first_rank[t] = rank;
    return lorasynci_catalogue_add(&p->merged, name, (lorasync_dtype)r->dtype, r->ndim, lorasynci_record_shape(r), 0,
                                   err);
}

/* All catalogues into one; what is held first, so that what is wanted finds it. */
LORASYNCI_FN lorasync_status lorasynci_merge(lorasynci_planner *p, lorasync_error *err)
{
    size_t total = 0, i;
    int    rank, wanted;
    for (rank = 0; rank < p->world; rank++) total += p->catalogues[rank].num;
    if (p->desc->kind == LORASYNC_SCATTER) total += p->desc->image->num_tensors;
    p->first_rank = (int *)lorasynci_alloc_array(&p->plan->a, total, sizeof *p->first_rank);
    if (!p->first_rank || !lorasynci_table_init(&p->names, &p->plan->a, total))
        return lorasynci_fail_memory(err, total * 8);
    for (i = 0; p->desc->kind == LORASYNC_SCATTER && i < p->desc->image->num_tensors; i++) {
        const lorasync_tensor *t = &p->desc->image->tensors[i];
        p->first_rank[i]         = -1;
        lorasynci_table_insert(&p->names, t->name, i, lorasynci_catalogue_key, &p->merged);
        LORASYNCI_TRY(lorasynci_catalogue_add(&p->merged, t->name, t->dtype, t->ndim, t->shape, 0, err));
    }
    for (rank = 0; rank < p->world; rank++) {
        p->numbers[rank] = (uint32_t *)lorasynci_alloc_array(&p->plan->a, p->catalogues[rank].num, sizeof(uint32_t));
        if (!p->numbers[rank]) return lorasynci_fail_memory(err, p->catalogues[rank].num * 4);
    }
    for (wanted = 0; wanted < 2; wanted++)
        for (rank = 0; rank < p->world; rank++)
            for (i = 0; i < p->catalogues[rank].num; i++) {
                const lorasynci_record *r = lorasynci_record_at(&p->catalogues[rank], i);
                if (r->wanted == wanted) LORASYNCI_TRY(lorasynci_merge_record(p, r, rank, &p->numbers[rank][i], err));
            }
    if (p->merged.num == 0)
        return lorasynci_fail(err, LORASYNC_E_EMPTY, "no rank declares a tensor; add pieces before planning");
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_damaged_parts(int rank, lorasync_error *err)
{
    return lorasynci_fail(err, LORASYNC_E_COMM,
                          "the parts of rank %d are damaged; do all ranks use the same lorasync.h?", rank);
}

/* One pass over the parts of all ranks: counts regions per tensor (list NULL) or fills the list. */
LORASYNCI_FN lorasync_status lorasynci_scan_parts(lorasynci_planner *p, int wanted, lorasynci_regions *out,
                                                  lorasync_error *err)
{
    int rank;
    for (rank = 0; rank < p->world; rank++) {
        const lorasynci_catalogue *c  = &p->catalogues[p->same_as[rank]];
        size_t                     at = 0, item = 0;
        while (at < p->parts_bytes[rank]) {
            const int64_t          *box;
            const lorasynci_record *r;
            uint64_t                tensor;
            if (p->parts_bytes[rank] - at < 8) return lorasynci_damaged_parts(rank, err);
            memcpy(&tensor, p->parts[rank] + at, 8);
            if (tensor >= c->num) return lorasynci_damaged_parts(rank, err);
            r   = lorasynci_record_at(c, (size_t)tensor);
            box = (const int64_t *)(const void *)(p->parts[rank] + at + 8);
            at += 8;
            if (p->parts_bytes[rank] - at < (size_t)r->ndim * 16) return lorasynci_damaged_parts(rank, err);
            at += (size_t)r->ndim * 16;
            if (r->wanted == wanted) {
                uint32_t merged = p->numbers[p->same_as[rank]][tensor];
                if (out->list) {
                    lorasynci_region *region = &out->list[out->starts[merged]];
                    region->box              = box;
                    region->tensor           = merged;
                    region->rank             = (uint32_t)rank;
                    region->item             = (uint32_t)item;
                }
                out->starts[merged]++;
            }
            item++;
        }
    }
    return LORASYNC_OK;
}

/* Regions by tensor: a counting sort. */
LORASYNCI_FN lorasync_status lorasynci_group_parts(lorasynci_planner *p, int wanted, lorasynci_regions *out,
                                                   lorasync_error *err)
{
    size_t t, sum = 0, n;
    out->starts = (size_t *)lorasynci_alloc_array(&p->plan->a, p->merged.num + 1, sizeof *out->starts);
    if (!out->starts) return lorasynci_fail_memory(err, p->merged.num * 8);
    LORASYNCI_TRY(lorasynci_scan_parts(p, wanted, out, err));
    for (t = 0; t <= p->merged.num; t++) {
        n              = out->starts[t];
        out->starts[t] = sum;
        sum += n;
    }
    out->num  = sum;
    out->list = (lorasynci_region *)lorasynci_alloc_array(&p->plan->a, sum, sizeof *out->list);
    if (!out->list) return lorasynci_fail_memory(err, sum * sizeof *out->list);
    LORASYNCI_TRY(lorasynci_scan_parts(p, wanted, out, err));
    for (t = p->merged.num; t > 0; t--) out->starts[t] = out->starts[t - 1]; /* filling moved each start to the next */
    out->starts[0] = 0;
    return LORASYNC_OK;
}

LORASYNCI_FN int lorasynci_region_order(const lorasynci_region *a, const lorasynci_region *b, int ndim)
{
    int i;
    for (i = 0; i < 2 * ndim; i++)
        if (a->box[i] != b->box[i]) return a->box[i] < b->box[i] ? -1 : 1;
    return a->rank != b->rank ? (a->rank < b->rank ? -1 : 1) : 0;
}

LORASYNCI_FN int lorasynci_same_box(const lorasynci_region *a, const lorasynci_region *b, int ndim)
{
    return memcmp(a->box, b->box, (size_t)ndim * 16) == 0;
}

/* Heap sort; what trainers send is mostly sorted already. */
LORASYNCI_FN void lorasynci_sort_regions(lorasynci_region *r, size_t n, int ndim)
{
    size_t i, end;
    for (i = 1; i < n && lorasynci_region_order(&r[i - 1], &r[i], ndim) <= 0; i++) {}
    if (i >= n) return;
    for (i = n / 2, end = n; end > 1;) {
        lorasynci_region x;
        size_t           hole, child;
        if (i > 0) {
            hole = --i;
            x    = r[hole];
        } else {
            x      = r[--end];
            r[end] = r[0];
            hole   = 0;
        }
        while ((child = 2 * hole + 1) < end) {
            if (child + 1 < end && lorasynci_region_order(&r[child], &r[child + 1], ndim) < 0) child++;
            if (lorasynci_region_order(&x, &r[child], ndim) >= 0) break;
            r[hole] = r[child];
            hole    = child;
        }
        r[hole] = x;
    }
}

LORASYNCI_FN int lorasynci_intersect(const int64_t *a, const int64_t *b, int ndim, int64_t *out)
{
    int d;
    for (d = 0; d < ndim; d++) {
        int64_t first = a[d] > b[d] ? a[d] : b[d], end_a = a[d] + a[ndim + d], end_b = b[d] + b[ndim + d];
        int64_t end = end_a < end_b ? end_a : end_b;
        if (first >= end) return 0;
        if (out) {
            out[d]        = first;
            out[ndim + d] = end - first;
        }
    }
    return 1;
}

/* Some box inside `box` that none of the regions from `from` on touches; 0 if they cover it. Only for error texts. */
LORASYNCI_FN int lorasynci_find_gap(const int64_t *box, int ndim, const lorasynci_region *r, size_t n, size_t from,
                                    int64_t *out)
{
    int64_t cut[2 * LORASYNC_MAX_DIMS], rest[2 * LORASYNC_MAX_DIMS], side[2 * LORASYNC_MAX_DIMS];
    int     d;
    while (from < n && !lorasynci_intersect(box, r[from].box, ndim, cut)) from++;
    if (from == n) {
        memcpy(out, box, (size_t)ndim * 16);
        return 1;
    }
    memcpy(rest, box, (size_t)ndim * 16);
    for (d = 0; d < ndim; d++) { /* slabs of the box before and behind the cut along d; then go on inside the cut's
                                    extent of d */
        memcpy(side, rest, (size_t)ndim * 16);
        side[ndim + d] = cut[d] - rest[d];
        if (side[ndim + d] > 0 && lorasynci_find_gap(side, ndim, r, n, from + 1, out)) return 1;
        side[d]        = cut[d] + cut[ndim + d];
        side[ndim + d] = rest[d] + rest[ndim + d] - side[d];
        if (side[ndim + d] > 0 && lorasynci_find_gap(side, ndim, r, n, from + 1, out)) return 1;
        rest[d]        = cut[d];
        rest[ndim + d] = cut[ndim + d];
    }
    return 0;
}

LORASYNCI_FN lorasync_status lorasynci_gap_error(const lorasynci_planner *p, size_t t, const int64_t *box,
                                                 const char *who, lorasync_error *err)
{
    const lorasynci_record *m                          = lorasynci_record_at(&p->merged, t);
    int                     ndim                       = m->ndim;
    int64_t                 gap[2 * LORASYNC_MAX_DIMS] = {0};
    char                    text[160], shape[128];
    const lorasynci_region *r = p->held.list + p->held.starts[t];
    lorasynci_find_gap(box, ndim, r, p->held.starts[t + 1] - p->held.starts[t], 0, gap);
    return lorasynci_fail(
        err, LORASYNC_E_LAYOUT,
        "%.200s: elements %s of shape %s are held by no rank%s; check the rank and world size given to the layout "
        "function",
        lorasynci_record_name(m), lorasynci_box_text(gap, gap + ndim, ndim, text, sizeof text),
        lorasynci_shape_text(lorasynci_record_shape(m), ndim, shape, sizeof shape), who);
}

/* Overlaps of boxes that are not replicas. Sorted regions that differ first in dimension s can stop at the first one
   that begins behind. */
LORASYNCI_FN lorasync_status lorasynci_check_overlap(const lorasynci_planner *p, size_t t, int ndim,
                                                     lorasync_error *err)
{
    const lorasynci_region *r = p->held.list + p->held.starts[t];
    size_t                  n = p->held.starts[t + 1] - p->held.starts[t], i, j;
    int                     s = 0;
    if (n < 2 || ndim == 0) return LORASYNC_OK;
    while (s < ndim - 1) {
        for (i = 1; i < n && r[i].box[s] == r[0].box[s] && r[i].box[ndim + s] == r[0].box[ndim + s]; i++) {}
        if (i < n) break;
        s++;
    }
    for (i = 0; i < n; i++)
        for (j = i + 1; j < n && r[j].box[s] < r[i].box[s] + r[i].box[ndim + s]; j++) {
            char a[160], b[160];
            if (lorasynci_same_box(&r[i], &r[j], ndim) || !lorasynci_intersect(r[i].box, r[j].box, ndim, NULL))
                continue;
            return lorasynci_fail(
                err, LORASYNC_E_LAYOUT,
                "%.180s: rank %u holds %.100s and rank %u holds %.100s, which overlap without being equal; only whole "
                "replicas may repeat",
                lorasynci_merged_name(p, t), r[i].rank,
                lorasynci_box_text(r[i].box, r[i].box + ndim, ndim, a, sizeof a), r[j].rank,
                lorasynci_box_text(r[j].box, r[j].box + ndim, ndim, b, sizeof b));
        }
    return LORASYNC_OK;
}

/* Every element of every tensor exactly once, replicas apart. */
LORASYNCI_FN lorasync_status lorasynci_check_coverage(lorasynci_planner *p, lorasync_error *err)
{
    size_t t, i;
    for (t = 0; t < p->merged.num; t++) {
        const lorasynci_record *m     = lorasynci_record_at(&p->merged, t);
        const int64_t          *shape = lorasynci_record_shape(m);
        lorasynci_region       *r     = p->held.list + p->held.starts[t];
        size_t                  n     = p->held.starts[t + 1] - p->held.starts[t];
        int64_t                 sum = 0, numel = lorasynci_box_numel(shape, m->ndim);
        lorasynci_sort_regions(r, n, m->ndim);
        LORASYNCI_TRY(lorasynci_check_overlap(p, t, m->ndim, err));
        for (i = 0; i < n; i++)
            if (i == 0 || !lorasynci_same_box(&r[i - 1], &r[i], m->ndim))
                sum += lorasynci_box_numel(r[i].box + m->ndim, m->ndim);
        if (sum != numel && p->desc->kind != LORASYNC_RESHARD) {
            int64_t whole[2 * LORASYNC_MAX_DIMS] = {0};
            memcpy(whole + m->ndim, shape, (size_t)m->ndim * 8);
            return lorasynci_gap_error(p, t, whole, "", err);
        }
    }
    return LORASYNC_OK;
}

/* -- routing */

/* The dtype in which a tensor travels. */
LORASYNCI_FN lorasync_dtype lorasynci_wire_dtype(const lorasync_plan_desc *d, lorasync_dtype own)
{
    return d->wire_dtype != LORASYNC_DTYPE_NONE && d->kind != LORASYNC_SCATTER && lorasynci_is_float(own)
               ? d->wire_dtype
               : own;
}

enum {
    LORASYNCI_MAX_ROUNDS = 65535
};

#define LORASYNCI_ALL UINT32_MAX /* as a peer: every other rank */

LORASYNCI_FN void lorasynci_put_route(lorasynci_buffer *b, uint32_t item, uint32_t peer, uint64_t at, uint32_t round,
                                      const int64_t *box, int ndim)
{
    lorasynci_route r;
    r.item  = item;
    r.peer  = peer;
    r.at    = at;
    r.round = round;
    r.boxed = box != NULL;
    lorasynci_put(b, &r, sizeof r);
    if (box) lorasynci_put(b, box, (size_t)ndim * 16);
}

LORASYNCI_FN uint64_t lorasynci_round_cap(const lorasynci_planner *p, uint32_t round)
{
    return round < 32 && p->first_cap < p->pair_cap >> round ? p->first_cap << round : p->pair_cap;
}

/* Where the next box of a stream goes, and in which round. */
LORASYNCI_FN lorasync_status lorasynci_stream_put(lorasynci_planner *p, lorasynci_stream *s, uint64_t num_bytes,
                                                  uint64_t *at, lorasync_error *err)
{
    *at = (s->at + LORASYNCI_ALIGN - 1) / LORASYNCI_ALIGN * LORASYNCI_ALIGN;
    if (*at > s->round_start && *at + num_bytes > s->round_start + lorasynci_round_cap(p, s->round)) {
        s->round_start = *at;
        if (++s->round >= LORASYNCI_MAX_ROUNDS)
            return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                                  "bucket_bytes is so small that more than %d exchanges would be needed; raise it",
                                  (int)LORASYNCI_MAX_ROUNDS);
    }
    s->at = *at + num_bytes;
    if (s->round + 1 > p->num_rounds) p->num_rounds = s->round + 1;
    return LORASYNC_OK;
}

/* One box of tensor t from an item of rank src to an item of rank dst (or of all others). whole: the box is all of the
   sender's part. */
LORASYNCI_FN lorasync_status lorasynci_route_box(lorasynci_planner *p, size_t t, const lorasynci_region *src,
                                                 uint32_t dst, uint32_t dst_item, const int64_t *box, int whole,
                                                 lorasync_error *err)
{
    const lorasynci_record *m    = lorasynci_record_at(&p->merged, t);
    lorasync_dtype          wire = lorasynci_wire_dtype(p->desc, (lorasync_dtype)m->dtype);
    uint64_t bytes      = (uint64_t)lorasynci_box_numel(box + m->ndim, m->ndim) * (uint64_t)lorasynci_item(wire),
             at         = dst_item;
    lorasynci_stream *s = NULL;
    uint32_t          rank, round = 0;
    p->load[src->rank] += bytes;
    if (dst != src->rank) {
        s = p->desc->kind == LORASYNC_RESHARD   ? &p->streams[(size_t)src->rank * (size_t)p->world + dst]
            : p->desc->kind == LORASYNC_SCATTER ? &p->streams[dst]
                                                : &p->streams[src->rank];
        LORASYNCI_TRY(lorasynci_stream_put(p, s, bytes, &at, err));
        round = s->round;
    }
    lorasynci_put_route(&p->sends[src->rank], src->item, dst, at, round, whole ? NULL : box, m->ndim);
    for (rank = 0; s && rank < (uint32_t)p->world; rank++)
        if (rank != src->rank && (dst == rank || dst == LORASYNCI_ALL)) {
            lorasynci_put_route(&p->receives[rank], dst_item, src->rank, at, round, box, m->ndim);
            if (p->receives[rank].failed) return lorasynci_fail_memory(err, p->receives[rank].size);
            if (dst == rank) break;
        }
    return p->sends[src->rank].failed ? lorasynci_fail_memory(err, p->sends[src->rank].size) : LORASYNC_OK;
}

/* Who of the replicas r[0 .. n) serves rank dst: itself if it can, else the one with least to send. */
LORASYNCI_FN const lorasynci_region *lorasynci_choose_owner(const lorasynci_planner *p, const lorasynci_region *r,
                                                            size_t n, uint32_t dst)
{
    size_t i, best = 0;
    for (i = 0; i < n; i++) {
        if (r[i].rank == dst) return &r[i];
        if (p->load[r[i].rank] < p->load[r[best].rank]) best = i;
    }
    return &r[best];
}

/* The digest of image tensor i comes (in part) from rank src; a rank's digests are in image order. */
LORASYNCI_FN lorasync_status lorasynci_note_digest(lorasynci_planner *p, uint32_t src, uint32_t image_tensor,
                                                   lorasync_error *err)
{
    lorasynci_buffer *b = &p->digests[src];
    uint32_t          last;
    if (b->size) {
        memcpy(&last, b->data + b->size - sizeof last, sizeof last);
        if (last == image_tensor) return LORASYNC_OK;
    }
    lorasynci_put(b, &image_tensor, sizeof image_tensor);
    return b->failed ? lorasynci_fail_memory(err, b->size) : LORASYNC_OK;
}

/* Gather: every distinct box once to the root, or to all, or (direct) by its owner into the shared image. */
LORASYNCI_FN lorasync_status lorasynci_route_gather(lorasynci_planner *p, lorasync_error *err)
{
    uint32_t to = p->plan->direct || p->world == 1 || p->desc->kind == LORASYNC_GATHER_ALL ? LORASYNCI_ALL
                                                                                           : (uint32_t)p->plan->root;
    /* who copies in the root's stead: a link is slower than the root's own memory, another core is not */
    uint32_t dst = p->plan->direct && p->plan->device ? (uint32_t)p->plan->root : to;
    size_t   i, n;
    for (i = 0; i < p->merged.num; i++) {
        size_t            t    = p->merged_index[i];
        int               ndim = lorasynci_record_at(&p->merged, t)->ndim;
        lorasynci_region *r = p->held.list + p->held.starts[t], *end = p->held.list + p->held.starts[t + 1];
        for (; r < end; r += n) {
            const lorasynci_region *owner;
            for (n = 1; r + n < end && lorasynci_same_box(r, r + n, ndim); n++) {}
            owner = lorasynci_choose_owner(p, r, n, dst);
            if (p->plan->direct || p->world == 1) {
                LORASYNCI_TRY(lorasynci_route_box(p, t, owner, owner->rank, (uint32_t)i, owner->box, 1, err));
                continue;
            }
            LORASYNCI_TRY(lorasynci_route_box(p, t, owner, to, (uint32_t)i, owner->box, 1, err));
            if (to == LORASYNCI_ALL)
                LORASYNCI_TRY(lorasynci_route_box(p, t, owner, owner->rank, (uint32_t)i, owner->box, 1, err));
            if (owner->rank != to) LORASYNCI_TRY(lorasynci_note_digest(p, owner->rank, (uint32_t)i, err));
        }
    }
    return LORASYNC_OK;
}

/* What one wanted box takes from the held boxes of its tensor, replicas once. Boxes are sorted by `off`, and distinct
   ones do not overlap. */
LORASYNCI_FN lorasync_status lorasynci_route_wanted(lorasynci_planner *p, size_t t, const lorasynci_region *want,
                                                    lorasync_error *err)
{
    int               ndim = lorasynci_record_at(&p->merged, t)->ndim;
    lorasynci_region *r = p->held.list + p->held.starts[t], *end = p->held.list + p->held.starts[t + 1];
    int64_t           cut[2 * LORASYNC_MAX_DIMS] = {0}, got = 0;
    size_t            n;
    for (; r < end; r += n) {
        const lorasynci_region *owner;
        for (n = 1; r + n < end && lorasynci_same_box(r, r + n, ndim); n++) {}
        if (!lorasynci_intersect(want->box, r->box, ndim, cut)) continue;
        owner = lorasynci_choose_owner(p, r, n, want->rank);
        LORASYNCI_TRY(lorasynci_route_box(p, t, owner, want->rank, want->item, cut, 0, err));
        got += lorasynci_box_numel(cut + ndim, ndim);
    }
    if (got != lorasynci_box_numel(want->box + ndim, ndim)) {
        char who[64];
        snprintf(who, sizeof who, ", and rank %u wants them", want->rank);
        return lorasynci_gap_error(p, t, want->box, who, err);
    }
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_route_reshard(lorasynci_planner *p, lorasync_error *err)
{
    size_t t, i;
    for (t = 0; t < p->merged.num; t++)
        for (i = p->wanted.starts[t]; i < p->wanted.starts[t + 1]; i++)
            LORASYNCI_TRY(lorasynci_route_wanted(p, t, &p->wanted.list[i], err));
    return LORASYNC_OK;
}

/* Scatter: the image is one region per tensor, whole, on the root. */
LORASYNCI_FN lorasync_status lorasynci_route_scatter(lorasynci_planner *p, lorasync_error *err)
{
    size_t t, i;
    for (t = 0; t < p->merged.num; t++) {
        lorasynci_region image;
        memset(&image, 0, sizeof image);
        image.rank = (uint32_t)p->plan->root;
        image.item = (uint32_t)t;
        if (p->wanted.starts[t] == p->wanted.starts[t + 1] &&
            lorasynci_box_numel(lorasynci_record_shape(lorasynci_record_at(&p->merged, t)),
                                lorasynci_record_at(&p->merged, t)->ndim) > 0)
            return lorasynci_fail(
                err, LORASYNC_E_NOT_FOUND,
                "%.200s: in the image, but no rank wants it; is it the adapter of another model or of other target "
                "modules?",
                lorasynci_merged_name(p, t));
        for (i = p->wanted.starts[t]; i < p->wanted.starts[t + 1]; i++)
            LORASYNCI_TRY(lorasynci_route_box(p, t, &image, p->wanted.list[i].rank, p->wanted.list[i].item,
                                              p->wanted.list[i].box, 0, err));
    }
    return LORASYNC_OK;
}

/* -- the image of a gather, and how it is shared */

LORASYNCI_FN size_t lorasynci_align64(size_t n) { return (n + 63) / 64 * 64; }

/* The layout of the image from the tensors of `c`, in the plan's allocator. */
LORASYNCI_FN lorasync_status lorasynci_layout_image(lorasync_plan *plan, const lorasync_plan_desc *d,
                                                    const lorasynci_catalogue *c, lorasync_error *err)
{
    lorasync_image_desc image;
    lorasync_tensor    *tensors = (lorasync_tensor *)lorasynci_alloc_array(&plan->a, c->num, sizeof *tensors);
    lorasync_status     status;
    size_t              i;
    if (!tensors) return lorasynci_fail_memory(err, c->num * sizeof *tensors);
    for (i = 0; i < c->num; i++) {
        const lorasynci_record *r = lorasynci_record_at(c, i);
        tensors[i].name           = lorasynci_record_name(r);
        tensors[i].dtype          = lorasynci_wire_dtype(d, (lorasync_dtype)r->dtype);
        tensors[i].ndim           = r->ndim;
        memcpy(tensors[i].shape, lorasynci_record_shape(r), (size_t)r->ndim * 8);
    }
    memset(&image, 0, sizeof image);
    image.tensors     = tensors;
    image.num_tensors = c->num;
    image.adapter     = d->adapter;
    status            = lorasync_image_layout(&image, &plan->a, &plan->image, err);
    lorasynci_dealloc(&plan->a, tensors);
    return status;
}

/* What the planner tells every rank before routing. */
typedef struct lorasynci_offer {
    lorasync_error         verdict;
    uint64_t               catalogue_bytes; /* gather-all: the merged catalogue follows, for the image */
    uint64_t               mapping_bytes;   /* direct: what to map; 0 without */
    uint64_t               sums_at;         /* direct: where the ranks' sums lie in it */
    uint64_t               header_bytes;
    uint64_t               num_tensors; /* of the image */
    uint64_t               id;          /* of the plan, never 0 */
    lorasynci_device_offer device;
    char                   name[64];
} lorasynci_offer;

/* A number that nobody else has: process, time, address. */
LORASYNCI_FN uint64_t lorasynci_unique(const void *owner)
{
    return lorasynci_mix(lorasynci_mix(lorasynci_process_self() ^ lorasynci_now_ns()) ^ (uint64_t)(uintptr_t)owner) | 1;
}

/* A name for shared memory. */
LORASYNCI_FN void lorasynci_mapping_name(char out[64], uint64_t id)
{
    snprintf(out, 64, "/lorasync-%ld-%016llx", (long)getpid(), (unsigned long long)id);
}

LORASYNCI_FN void lorasynci_offer_mapping(lorasync_plan *plan, lorasynci_offer *offer)
{
    const lorasync_image *image = plan->image;
    const size_t          world = (size_t)plan->comm.world;
    size_t                sums_at =
        image ? lorasynci_align64(image->header_bytes + (plan->device || plan->lent ? 0 : image->payload_bytes)) : 0;
    size_t         before    = image ? lorasynci_align64(sums_at + 2 * world * image->num_tensors * sizeof(uint64_t))
                                     : world * lorasynci_mesh_slot_bytes(plan->comm.world);
    size_t         num_bytes = before + world * 64; /* lines last */
    lorasync_error unused;
    if (image && plan->device && lorasynci_device_make_image(plan, &offer->device, &unused) < 0)
        return; /* said again
                                                                                                            when it is
                                                                                                            needed */
    lorasynci_mapping_name(offer->name, offer->id);
    if (!lorasynci_window_name(&plan->shared, offer->name, num_bytes, 1)) return;
    offer->mapping_bytes = num_bytes;
    offer->header_bytes  = image ? image->header_bytes : 0;
    offer->num_tensors   = image ? image->num_tensors : 0;
    offer->sums_at       = sums_at;
}

/* -- the talk between the ranks and the planner */

typedef struct lorasynci_hello {
    uint64_t catalogue_hash[2];
    uint64_t catalogue_bytes;
    uint64_t parts_bytes;
} lorasynci_hello;

LORASYNCI_FN int lorasynci_planner_rank(const lorasync_plan *plan) { return plan->root; }

LORASYNCI_FN int lorasynci_is_planner(const lorasync_plan *plan) { return plan->comm.rank == plan->root; }

/* From every rank to the planner, or (to_all) from the planner to every rank: one block each. `blocks` and `sizes` are
   used by the planner, block and size by the others. */
LORASYNCI_FN lorasync_status lorasynci_star(lorasync_plan *plan, int to_all, char **blocks, const size_t *sizes,
                                            void *block, size_t size, lorasync_error *err)
{
    const lorasync_comm *c = &plan->comm;
    size_t               n = 0;
    int                  rank;
    if (lorasynci_is_planner(plan)) {
        for (rank = 0; rank < c->world; rank++) {
            if (rank == c->rank || sizes[rank] == 0) continue;
            plan->messages[n].peer      = rank;
            plan->messages[n].data      = blocks[rank];
            plan->messages[n].num_bytes = sizes[rank];
            n++;
        }
    } else if (size) {
        plan->messages[0].peer      = lorasynci_planner_rank(plan);
        plan->messages[0].data      = block;
        plan->messages[0].num_bytes = size;
        n                           = 1;
    }
    if (to_all == lorasynci_is_planner(plan))
        return c->exchange(c->user, plan->messages, n, NULL, 0, plan->timeout_ms, err);
    return c->exchange(c->user, NULL, 0, plan->messages, n, plan->timeout_ms, err);
}

enum {
    LORASYNCI_FIRST_ROUND   = 16 << 20,
    LORASYNCI_FIRST_RESHARD = 64 << 20 /* every rank packs, sends and places at once: fewer rounds disturb each other
                                          less */
};

LORASYNCI_FN size_t lorasynci_bucket_bytes(const lorasync_plan_desc *d)
{
    return d->bucket_bytes ? d->bucket_bytes : (size_t)256 << 20;
}

/* Rounds that overlap share the bucket by two, and begin small: the first is soon packed, and travels while the rest
   is. */
LORASYNCI_FN void lorasynci_planner_caps(lorasynci_planner *p)
{
    const size_t bucket = lorasynci_bucket_bytes(p->desc), others = p->world > 1 ? (size_t)p->world - 1 : 1;
    const int    overlap = lorasynci_is_pipelined(p->plan);
    p->pair_cap          = bucket / others / (overlap ? 2 : 1);
    p->first_cap         = p->pair_cap;
    if (overlap)
        p->first_cap = (p->desc->kind == LORASYNC_RESHARD ? LORASYNCI_FIRST_RESHARD : LORASYNCI_FIRST_ROUND) / others;
}

/* The planner's arrays, one entry per rank. */
LORASYNCI_FN lorasync_status lorasynci_planner_init(lorasynci_planner *p, lorasync_plan *plan,
                                                    const lorasync_plan_desc *desc, lorasync_error *err)
{
    const lorasync_allocator *a = &plan->a;
    size_t                    n = (size_t)plan->comm.world, i, streams = desc->kind == LORASYNC_RESHARD ? n * n : n;
    memset(p, 0, sizeof *p);
    p->plan        = plan;
    p->desc        = desc;
    p->world       = plan->comm.world;
    p->catalogues  = (lorasynci_catalogue *)lorasynci_alloc_array(a, n, sizeof *p->catalogues);
    p->same_as     = (int *)lorasynci_alloc_array(a, n, sizeof *p->same_as);
    p->numbers     = (uint32_t **)lorasynci_alloc_array(a, n, sizeof *p->numbers);
    p->parts       = (char **)lorasynci_alloc_array(a, n, sizeof *p->parts);
    p->parts_bytes = (size_t *)lorasynci_alloc_array(a, n, sizeof *p->parts_bytes);
    p->streams     = (lorasynci_stream *)lorasynci_alloc_array(a, streams, sizeof *p->streams);
    p->load        = (uint64_t *)lorasynci_alloc_array(a, n, sizeof *p->load);
    p->sends       = (lorasynci_buffer *)lorasynci_alloc_array(a, n, sizeof *p->sends);
    p->receives    = (lorasynci_buffer *)lorasynci_alloc_array(a, n, sizeof *p->receives);
    p->digests     = (lorasynci_buffer *)lorasynci_alloc_array(a, n, sizeof *p->digests);
    lorasynci_catalogue_init(&p->merged, a);
    if (!p->catalogues || !p->same_as || !p->numbers || !p->parts || !p->parts_bytes || !p->streams || !p->load ||
        !p->sends || !p->receives || !p->digests)
        return lorasynci_fail_memory(err, n * sizeof *p->catalogues);
    for (i = 0; i < n; i++) {
        lorasynci_catalogue_init(&p->catalogues[i], a);
        lorasynci_buffer_init(&p->sends[i], a);
        lorasynci_buffer_init(&p->receives[i], a);
        lorasynci_buffer_init(&p->digests[i], a);
    }
    lorasynci_planner_caps(p);
    return LORASYNC_OK;
}

LORASYNCI_FN void lorasynci_planner_free(lorasynci_planner *p)
{
    const lorasync_allocator *a;
    int                       i;
    if (!p->plan) return;
    a = &p->plan->a;
    for (i = 0; i < p->world; i++) {
        if (p->catalogues) lorasynci_catalogue_free(&p->catalogues[i]);
        if (p->numbers) lorasynci_dealloc(a, p->numbers[i]);
        if (p->parts) lorasynci_dealloc(a, p->parts[i]);
        if (p->sends) lorasynci_buffer_free(&p->sends[i]);
        if (p->receives) lorasynci_buffer_free(&p->receives[i]);
        if (p->digests) lorasynci_buffer_free(&p->digests[i]);
    }
    lorasynci_catalogue_free(&p->merged);
    if (p->names.cells) lorasynci_table_free(&p->names);
    lorasynci_dealloc(a, p->catalogues), lorasynci_dealloc(a, p->same_as), lorasynci_dealloc(a, p->numbers),
        lorasynci_dealloc(a, p->parts);
    lorasynci_dealloc(a, p->parts_bytes), lorasynci_dealloc(a, p->streams), lorasynci_dealloc(a, p->load),
        lorasynci_dealloc(a, p->sends);
    lorasynci_dealloc(a, p->receives), lorasynci_dealloc(a, p->digests), lorasynci_dealloc(a, p->first_rank),
        lorasynci_dealloc(a, p->image_index);
    lorasynci_dealloc(a, p->merged_index), lorasynci_dealloc(a, p->held.list), lorasynci_dealloc(a, p->held.starts),
        lorasynci_dealloc(a, p->wanted.list);
    lorasynci_dealloc(a, p->wanted.starts);
    memset(p, 0, sizeof *p);
}

/* Who sends a catalogue: the first rank that has it. The planner makes room for what will come. */
LORASYNCI_FN lorasync_status lorasynci_planner_expect(lorasynci_planner *p, const lorasynci_hello *hellos,
                                                      size_t *sizes, lorasync_error *err)
{
    int i, j;
    for (i = 0; i < p->world; i++) {
        size_t n;
        for (j = 0; j < i && memcmp(hellos[i].catalogue_hash, hellos[j].catalogue_hash, 16) != 0; j++) {}
        p->same_as[i]     = j;
        p->parts_bytes[i] = (size_t)hellos[i].parts_bytes;
        n                 = j == i ? (size_t)hellos[i].catalogue_bytes : 0;
        if (!lorasynci_checked_add(n, p->parts_bytes[i], &sizes[i]))
            return lorasynci_fail(err, LORASYNC_E_COMM, "rank %d announces an impossible size", i);
        p->parts[i] = (char *)lorasynci_alloc(&p->plan->a, sizes[i]);
        if (!p->parts[i]) return lorasynci_fail_memory(err, sizes[i]);
    }
    return LORASYNC_OK;
}

/* Splits what came from each rank (parts, then catalogue) and indexes the catalogues. */
LORASYNCI_FN lorasync_status lorasynci_planner_unpack(lorasynci_planner *p, const size_t *sizes, lorasync_error *err)
{
    int i;
    for (i = 0; i < p->world; i++) {
        if (p->same_as[i] != i) continue;
        lorasynci_put(&p->catalogues[i].bytes, p->parts[i] + p->parts_bytes[i], sizes[i] - p->parts_bytes[i]);
        if (p->catalogues[i].bytes.failed) return lorasynci_fail_memory(err, sizes[i]);
        LORASYNCI_TRY(lorasynci_catalogue_index(&p->catalogues[i], i, err));
    }
    return LORASYNC_OK;
}

/* The image of a gather, and the order of its tensors among the merged ones. */
LORASYNCI_FN lorasync_status lorasynci_planner_image(lorasynci_planner *p, lorasync_error *err)
{
    size_t i, n = p->merged.num;
    LORASYNCI_TRY(lorasynci_layout_image(p->plan, p->desc, &p->merged, err));
    p->image_index  = (uint32_t *)lorasynci_alloc_array(&p->plan->a, n, sizeof(uint32_t));
    p->merged_index = (uint32_t *)lorasynci_alloc_array(&p->plan->a, n, sizeof(uint32_t));
    if (!p->image_index || !p->merged_index) return lorasynci_fail_memory(err, n * 4);
    for (i = 0; i < n; i++) {
        size_t t =
            lorasynci_table_find(&p->names, p->plan->image->tensors[i].name, lorasynci_catalogue_key, &p->merged);
        p->merged_index[i] = (uint32_t)t;
        p->image_index[t]  = (uint32_t)i;
    }
    return LORASYNC_OK;
}

/* All checks, before anything is routed. */
LORASYNCI_FN lorasync_status lorasynci_planner_check(lorasynci_planner *p, const size_t *sizes, lorasync_error *err)
{
    lorasync_dtype wire = p->desc->wire_dtype;
    if (wire != LORASYNC_DTYPE_NONE && !lorasynci_is_float(wire))
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                              "wire_dtype %s is not one of F32, F16, BF16, F8_E4M3, F8_E5M2",
                              lorasync_dtype_name(wire) ? lorasync_dtype_name(wire) : "(none)");
    LORASYNCI_TRY(lorasynci_planner_unpack(p, sizes, err));
    LORASYNCI_TRY(lorasynci_merge(p, err));
    LORASYNCI_TRY(lorasynci_group_parts(p, 1, &p->wanted, err));
    if (p->desc->kind == LORASYNC_SCATTER) return LORASYNC_OK;
    LORASYNCI_TRY(lorasynci_group_parts(p, 0, &p->held, err));
    LORASYNCI_TRY(lorasynci_check_coverage(p, err));
    return p->desc->kind == LORASYNC_RESHARD ? LORASYNC_OK : lorasynci_planner_image(p, err);
}

LORASYNCI_FN lorasync_status lorasynci_planner_route(lorasynci_planner *p, lorasync_error *err)
{
    switch (p->desc->kind) {
    case LORASYNC_SCATTER: return lorasynci_route_scatter(p, err);
    case LORASYNC_RESHARD: return lorasynci_route_reshard(p, err);
    case LORASYNC_GATHER:
    case LORASYNC_GATHER_ALL: break;
    }
    return lorasynci_route_gather(p, err);
}

/* The planner's answer to one rank:

       | head | sends: routes | receives: routes | targets: one per catalogue tensor | digests: per rank u64 count, then
       u32 each, to 8 | */
typedef struct lorasynci_destination {
    uint64_t offset; /* in the payload of a gather */
    uint64_t index;  /* among the tensors of its image */
    uint64_t dtype;  /* in which it travels */
} lorasynci_destination;

typedef struct lorasynci_answer {
    lorasync_error verdict;
    uint64_t       sends_bytes, receives_bytes, num_targets, digests_bytes;
    uint64_t       num_rounds;
} lorasynci_answer;

/* Behind the routes: where each of the rank's tensors is in the image, and the digests it will be sent. */
LORASYNCI_FN lorasync_status lorasynci_planner_answer(lorasynci_planner *p, int rank, lorasynci_answer *head,
                                                      lorasynci_buffer *out, lorasync_error *err)
{
    const lorasynci_catalogue *c = &p->catalogues[p->same_as[rank]];
    size_t                     i, start;
    int                        from, image_here =
                  p->image_index && !p->plan->direct && (p->desc->kind == LORASYNC_GATHER_ALL || rank == p->plan->root);
    head->sends_bytes    = p->sends[rank].size;
    head->receives_bytes = p->receives[rank].size;
    head->num_rounds     = p->num_rounds;
    lorasynci_put(out, p->sends[rank].data, p->sends[rank].size);
    lorasynci_put(out, p->receives[rank].data, p->receives[rank].size);
    lorasynci_buffer_free(&p->sends[rank]);
    lorasynci_buffer_free(&p->receives[rank]);
    for (i = 0; i < c->num; i++) {
        uint32_t              t = p->numbers[p->same_as[rank]][i];
        lorasynci_destination target;
        target.index  = p->image_index ? p->image_index[t] : 0;
        target.offset = p->image_index ? p->plan->image->tensors[target.index].offset : 0;
        target.dtype =
            (uint64_t)lorasynci_wire_dtype(p->desc, (lorasync_dtype)lorasynci_record_at(&p->merged, t)->dtype);
        lorasynci_put(out, &target, sizeof target);
        head->num_targets++;
    }
    start = out->size;
    for (from = 0; image_here && from < p->world; from++) {
        static const char zeros[8] = {0};
        uint64_t          num      = from == rank ? 0 : p->digests[from].size / 4;
        lorasynci_put(out, &num, sizeof num);
        lorasynci_put(out, p->digests[from].data, (size_t)num * 4);
        lorasynci_put(out, zeros, (size_t)(num % 2) * 4);
    }
    head->digests_bytes = out->size - start;
    return out->failed ? lorasynci_fail_memory(err, out->size) : LORASYNC_OK;
}

/* -- from routes to operations */

/* The end of a movement at one of this rank's parts. */
LORASYNCI_FN lorasync_status lorasynci_part_end(const lorasync_plan *plan, const lorasynci_parts *parts, uint64_t item,
                                                lorasynci_end *out, uint32_t *tensor, float *scale, lorasync_error *err)
{
    const lorasynci_part   *part;
    const lorasynci_record *r;
    const int64_t          *g;
    if (item >= lorasynci_parts_num(parts))
        return lorasynci_fail(err, LORASYNC_E_COMM, "the planner names part %llu, of %zu", (unsigned long long)item,
                              lorasynci_parts_num(parts));
    part       = lorasynci_part_at(parts, (size_t)item);
    r          = lorasynci_record_at(&plan->catalogue, part->tensor);
    g          = lorasynci_part_geometry(parts, part);
    out->space = LORASYNCI_MEMORY;
    out->dtype = (lorasync_dtype)r->dtype;
    out->at    = (uint64_t)(uintptr_t)part->data;
    memcpy(out->off, g, (size_t)r->ndim * 8);
    memcpy(out->stride, g + 2 * r->ndim, (size_t)r->ndim * 8);
    *tensor = part->tensor;
    *scale  = part->scale;
    return LORASYNC_OK;
}

/* The end at a whole tensor of the image: this plan's own, or the one to scatter. */
LORASYNCI_FN lorasync_status lorasynci_image_end(const lorasync_image *image, uint64_t item, lorasynci_end *out,
                                                 lorasync_error *err)
{
    const lorasync_tensor *t;
    if (!image || item >= image->num_tensors)
        return lorasynci_fail(err, LORASYNC_E_COMM, "the planner names image tensor %llu, which is not there",
                              (unsigned long long)item);
    t          = &image->tensors[item];
    out->space = LORASYNCI_IMAGE;
    out->dtype = t->dtype;
    out->at    = t->offset;
    memset(out->off, 0, sizeof out->off);
    lorasynci_row_major(t->shape, t->ndim, out->stride);
    return LORASYNC_OK;
}

/* The end in staging: the box alone, row-major. */
LORASYNCI_FN void lorasynci_staging_end(lorasynci_end *out, lorasynci_space space, uint64_t at, lorasync_dtype wire,
                                        const int64_t *box, int ndim)
{
    out->space = space;
    out->dtype = wire;
    out->at    = at;
    memcpy(out->off, box, (size_t)ndim * 8);
    lorasynci_row_major(box + ndim, ndim, out->stride);
}

/* What a rank works with while it builds. */
typedef struct lorasynci_build {
    lorasync_plan               *plan;
    const lorasync_plan_desc    *desc;
    const lorasynci_parts       *parts;
    const lorasync_image        *image;   /* at this rank's end: the one gathered into, or scattered from */
    const lorasynci_destination *targets; /* per catalogue tensor */
    size_t                       num_targets;
} lorasynci_build;

/* One route with all that an operation needs. */
typedef struct lorasynci_leg {
    lorasynci_route route;
    const int64_t  *box;   /* off, len */
    const int64_t  *shape; /* of the tensor */
    int             ndim;
    uint32_t        tensor;
    float           scale;
    lorasynci_end   near; /* at this rank's part, or image */
    lorasync_dtype  wire;
    uint64_t        num_bytes; /* on the wire */
} lorasynci_leg;

LORASYNCI_FN int lorasynci_is_gather(lorasync_plan_kind kind)
{
    return kind == LORASYNC_GATHER || kind == LORASYNC_GATHER_ALL;
}

LORASYNCI_FN lorasync_status lorasynci_damaged_answer(const lorasync_plan *plan, lorasync_error *err)
{
    return lorasynci_fail(err, LORASYNC_E_COMM,
                          "the plan that rank %d sent is damaged; do all ranks use the same lorasync.h?", plan->root);
}

/* Reads the route at *at. receiving: it ends here; else it starts here. */
LORASYNCI_FN lorasync_status lorasynci_read_leg(const lorasynci_build *b, const char *routes, size_t size, size_t *at,
                                                int receiving, lorasynci_leg *leg, lorasync_error *err)
{
    int at_image = receiving ? lorasynci_is_gather(b->desc->kind) : b->desc->kind == LORASYNC_SCATTER;
    memset(leg, 0, sizeof *leg);
    if (size - *at < sizeof leg->route) return lorasynci_damaged_answer(b->plan, err);
    memcpy(&leg->route, routes + *at, sizeof leg->route);
    *at += sizeof leg->route;
    if (at_image) {
        LORASYNCI_TRY(lorasynci_image_end(b->image, leg->route.item, &leg->near, err));
        leg->tensor = leg->route.item;
        leg->scale  = 1;
        leg->shape  = b->image->tensors[leg->tensor].shape;
        leg->ndim   = b->image->tensors[leg->tensor].ndim;
    } else {
        LORASYNCI_TRY(
            lorasynci_part_end(b->plan, b->parts, leg->route.item, &leg->near, &leg->tensor, &leg->scale, err));
        leg->shape = lorasynci_record_shape(lorasynci_record_at(&b->plan->catalogue, leg->tensor));
        leg->ndim  = lorasynci_record_at(&b->plan->catalogue, leg->tensor)->ndim;
        leg->box   = lorasynci_part_geometry(b->parts, lorasynci_part_at(b->parts, leg->route.item));
    }
    if (leg->route.boxed) {
        if (size - *at < (size_t)leg->ndim * 16) return lorasynci_damaged_answer(b->plan, err);
        leg->box = (const int64_t *)(const void *)(routes + *at);
        *at += (size_t)leg->ndim * 16;
    }
    if (!leg->box || (leg->route.peer >= (uint32_t)b->plan->comm.world && leg->route.peer != LORASYNCI_ALL))
        return lorasynci_damaged_answer(b->plan, err);
    leg->wire      = !receiving                     ? lorasynci_wire_dtype(b->desc, leg->near.dtype)
                     : at_image                     ? leg->near.dtype
                     : leg->tensor < b->num_targets ? (lorasync_dtype)b->targets[leg->tensor].dtype
                                                    : LORASYNC_DTYPE_NONE;
    leg->num_bytes = (uint64_t)(lorasynci_box_numel(leg->box + leg->ndim, leg->ndim) * lorasynci_item(leg->wire));
    return LORASYNC_OK;
}

LORASYNCI_FN lorasynci_link *lorasynci_link_of(lorasync_plan *plan, const lorasynci_leg *leg, int receiving)
{
    if (receiving) return &plan->receives[leg->route.peer];
    return &plan->sends[leg->route.peer == LORASYNCI_ALL ? 0 : leg->route.peer];
}

LORASYNCI_FN uint32_t lorasynci_link_rounds(const lorasynci_link *link)
{
    return (uint32_t)(link->ends.size / sizeof(uint64_t));
}

/* Where a round of a stream begins and ends, its digests included. */
LORASYNCI_FN uint64_t lorasynci_link_start(const lorasynci_link *link, uint32_t round)
{
    const uint64_t *ends = (const uint64_t *)(const void *)link->ends.data;
    return round == 0 ? 0 : (ends[round - 1] + LORASYNCI_ALIGN - 1) / LORASYNCI_ALIGN * LORASYNCI_ALIGN;
}

LORASYNCI_FN uint64_t lorasynci_link_digests_at(const lorasynci_link *link)
{
    const uint64_t *ends = (const uint64_t *)(const void *)link->ends.data;
    return (ends[lorasynci_link_rounds(link) - 1] + 7) / 8 * 8;
}

LORASYNCI_FN uint64_t lorasynci_link_end(const lorasynci_link *link, uint32_t round)
{
    const uint64_t *ends = (const uint64_t *)(const void *)link->ends.data;
    if (round + 1 == lorasynci_link_rounds(link) && link->num_digests)
        return lorasynci_link_digests_at(link) + link->num_digests * sizeof(uint64_t);
    return ends[round];
}

/* Where a round lies in staging. */
LORASYNCI_FN uint64_t lorasynci_link_at(const lorasynci_link *link, uint32_t round)
{
    return link->base + (link->whole ? lorasynci_link_start(link, round) : round % 2 * link->half);
}

/* Where the digests that travel with a link lie there. */
LORASYNCI_FN uint64_t lorasynci_link_staged_digests_at(const lorasynci_link *link)
{
    uint32_t last = lorasynci_link_rounds(link) - 1;
    return lorasynci_link_at(link, last) + lorasynci_link_digests_at(link) - lorasynci_link_start(link, last);
}

/* Notes that a link carries a leg. */
LORASYNCI_FN lorasync_status lorasynci_link_extend(lorasynci_link *link, const lorasynci_leg *leg, lorasync_error *err)
{
    uint64_t last, end = leg->route.at + leg->num_bytes;
    while (lorasynci_link_rounds(link) <= leg->route.round && !link->ends.failed) {
        last = link->ends.size ? ((uint64_t *)(void *)link->ends.data)[lorasynci_link_rounds(link) - 1] : 0;
        lorasynci_put(&link->ends, &last, sizeof last);
    }
    if (link->ends.failed) return lorasynci_fail_memory(err, link->ends.size);
    ((uint64_t *)(void *)link->ends.data)[leg->route.round] = end;
    return LORASYNC_OK;
}

/* The end of a gather in the image, also where the image itself is another rank's. */
LORASYNCI_FN lorasync_status lorasynci_target_end(const lorasynci_build *b, const lorasynci_leg *leg,
                                                  lorasynci_end *out, lorasync_error *err)
{
    if (leg->tensor >= b->num_targets) return lorasynci_damaged_answer(b->plan, err);
    out->space = LORASYNCI_IMAGE;
    out->dtype = leg->wire;
    out->at    = b->targets[leg->tensor].offset;
    lorasynci_row_major(leg->shape, leg->ndim, out->stride);
    return LORASYNC_OK;
}

/* A leg that starts here: into send staging, or to this rank itself, straight to its end. In a gather-all what goes to
   this rank itself has been digested on its way to the others. */
LORASYNCI_FN lorasync_status lorasynci_build_send(const lorasynci_build *b, const lorasynci_leg *leg,
                                                  lorasync_error *err)
{
    lorasync_plan *plan = b->plan;
    lorasynci_end  far;
    uint32_t       tensor, round = leg->route.round;
    float          scale;
    int            self = leg->route.peer == (uint32_t)plan->comm.rank, gather = lorasynci_is_gather(b->desc->kind);
    int digest = gather && !(self && b->desc->kind == LORASYNC_GATHER_ALL && !plan->direct && plan->comm.world > 1);
    memset(&far, 0, sizeof far);
    if (!self) {
        const lorasynci_link *link = lorasynci_link_of(plan, leg, 0);
        lorasynci_staging_end(&far, LORASYNCI_SEND,
                              lorasynci_link_at(link, round) + leg->route.at - lorasynci_link_start(link, round),
                              leg->wire, leg->box, leg->ndim);
    } else if (gather) LORASYNCI_TRY(lorasynci_target_end(b, leg, &far, err));
    else LORASYNCI_TRY(lorasynci_part_end(plan, b->parts, leg->route.at, &far, &tensor, &scale, err));
    if (digest && !self && (plan->num_slots == 0 || plan->slots[plan->num_slots - 1] != leg->tensor))
        plan->slots[plan->num_slots++] = leg->tensor;
    lorasynci_add_ops(&plan->pack, leg->box, leg->box + leg->ndim, leg->shape, leg->ndim, &leg->near, &far, leg->tensor,
                      leg->scale, round, digest,
                      self && leg->wire != far.dtype && (leg->wire != leg->near.dtype || leg->scale != 1)
                          ? leg->wire
                          : LORASYNC_DTYPE_NONE);
    return lorasynci_ops_failed(&plan->pack) ? lorasynci_fail_memory(err, plan->pack.list.size) : LORASYNC_OK;
}

/* A leg that ends here: out of receive staging. */
LORASYNCI_FN lorasync_status lorasynci_build_receive(const lorasynci_build *b, const lorasynci_leg *leg,
                                                     lorasync_error *err)
{
    lorasynci_link *link = lorasynci_link_of(b->plan, leg, 1);
    lorasynci_end   far;
    memset(&far, 0, sizeof far);
    lorasynci_staging_end(&far, LORASYNCI_RECEIVE,
                          lorasynci_link_at(link, leg->route.round) + leg->route.at -
                              lorasynci_link_start(link, leg->route.round),
                          leg->wire, leg->box, leg->ndim);
    lorasynci_add_ops(&b->plan->place, leg->box, leg->box + leg->ndim, leg->shape, leg->ndim, &far, &leg->near,
                      leg->tensor, 1, leg->route.round, 0, LORASYNC_DTYPE_NONE);
    return lorasynci_ops_failed(&b->plan->place) ? lorasynci_fail_memory(err, b->plan->place.list.size) : LORASYNC_OK;
}

/* One pass over a list of routes: measures the links and makes room for the operations (most routes need one), or
   builds them. */
LORASYNCI_FN lorasync_status lorasynci_build_pass(const lorasynci_build *b, const char *routes, size_t size,
                                                  int receiving, int building, lorasync_error *err)
{
    lorasynci_buffer *list = receiving ? &b->plan->place.list : &b->plan->pack.list;
    size_t            at = 0, num = 0;
    for (; at < size; num++) {
        lorasynci_leg leg;
        LORASYNCI_TRY(lorasynci_read_leg(b, routes, size, &at, receiving, &leg, err));
        if (building)
            LORASYNCI_TRY(receiving ? lorasynci_build_receive(b, &leg, err) : lorasynci_build_send(b, &leg, err));
        else if (receiving || leg.route.peer != (uint32_t)b->plan->comm.rank)
            LORASYNCI_TRY(lorasynci_link_extend(lorasynci_link_of(b->plan, &leg, receiving), &leg, err));
    }
    if (!building && !lorasynci_buffer_reserve(list, num * sizeof(lorasynci_op)))
        return lorasynci_fail_memory(err, num * sizeof(lorasynci_op));
    return LORASYNC_OK;
}

/* Room for a link: for the whole stream, or for its largest round, twice where rounds overlap. */
LORASYNCI_FN void lorasynci_place_link(lorasynci_link *link, int whole, int overlap, size_t *staging_bytes)
{
    uint32_t r, rounds = lorasynci_link_rounds(link);
    uint64_t largest = 0;
    link->base       = *staging_bytes;
    link->whole      = whole;
    for (r = 0; r < rounds; r++)
        if (lorasynci_link_end(link, r) - lorasynci_link_start(link, r) > largest)
            largest = lorasynci_link_end(link, r) - lorasynci_link_start(link, r);
    if (whole && rounds) largest = lorasynci_link_end(link, rounds - 1);
    largest    = lorasynci_align64((size_t)largest);
    link->half = !whole && overlap && rounds > 1 ? largest : 0;
    *staging_bytes += (size_t)(largest + link->half);
}

/* Places the links in staging. What is sent is a snapshot, unless that is larger than a bucket and rounds overlap; two
   rounds are not less. */
LORASYNCI_FN void lorasynci_build_staging(lorasync_plan *plan, size_t bucket_bytes)
{
    size_t *staging = plan->staging_bytes, unused = 0;
    int     i, overlap                            = lorasynci_is_pipelined(plan);
    for (i = 0; lorasynci_is_meshed(plan) && i < plan->comm.world; i++) { /* a link's bytes are written as they lie at
                                                                             the receiver */
        lorasynci_place_link(&plan->sends[i], 1, 0, &unused);
        lorasynci_place_link(&plan->receives[i], 1, 0, &staging[LORASYNCI_RECEIVE]);
    }
    if (lorasynci_is_meshed(plan)) return;
    for (i = 0; i < plan->comm.world; i++) {
        lorasynci_place_link(&plan->sends[i], 1, overlap, &staging[LORASYNCI_SEND]);
        lorasynci_place_link(&plan->receives[i], 0, overlap, &staging[LORASYNCI_RECEIVE]);
    }
    if (!overlap || staging[LORASYNCI_SEND] <= bucket_bytes) return;
    staging[LORASYNCI_SEND] = 0;
    for (i = 0; i < plan->comm.world; i++)
        lorasynci_place_link(&plan->sends[i], lorasynci_link_rounds(&plan->sends[i]) <= 2, overlap,
                             &staging[LORASYNCI_SEND]);
}

/* Digests that will arrive with each link. */
LORASYNCI_FN lorasync_status lorasynci_build_digests(lorasync_plan *plan, const char *bytes, size_t size,
                                                     lorasync_error *err)
{
    size_t at = 0, i;
    int    from;
    for (from = 0; at < size && from < plan->comm.world; from++) {
        lorasynci_link *link = &plan->receives[from];
        uint64_t        num;
        if (size - at < 8) return lorasynci_damaged_answer(plan, err);
        memcpy(&num, bytes + at, 8);
        at += 8;
        if (num > (size - at) / 4) return lorasynci_damaged_answer(plan, err);
        link->digests = (uint32_t *)lorasynci_alloc(&plan->a, (size_t)num * 4);
        if (!link->digests) return lorasynci_fail_memory(err, (size_t)num * 4);
        if (num) memcpy(link->digests, bytes + at, (size_t)num * 4);
        for (i = 0; i < num; i++)
            if (link->digests[i] >= plan->num_image_tensors) return lorasynci_damaged_answer(plan, err);
        link->num_digests = (size_t)num;
        at += (size_t)(num + num % 2) * 4;
        if (at > size) return lorasynci_damaged_answer(plan, err);
    }
    return LORASYNC_OK;
}

/* Only the tail of the list that is used: growing buffers leave up to as much again. */
LORASYNCI_FN void lorasynci_buffer_trim(lorasynci_buffer *b)
{
    char *p;
    if (b->capacity - b->size < 4096) return;
    p = (char *)lorasynci_alloc(&b->a, b->size);
    if (!p) return; /* what there is does as well */
    memcpy(p, b->data, b->size);
    lorasynci_dealloc(&b->a, b->data);
    b->data     = p;
    b->capacity = b->size;
}

/* The number of slots a sender fills: distinct tensors among its routes to others, in order. Counted before the
   operations are built. */
LORASYNCI_FN lorasync_status lorasynci_build_slots(const lorasynci_build *b, const char *routes, size_t size,
                                                   lorasync_error *err)
{
    lorasync_plan *plan = b->plan;
    size_t         at = 0, num = 0;
    uint32_t       last = UINT32_MAX;
    int            i;
    while (lorasynci_is_gather(b->desc->kind) && at < size) {
        lorasynci_leg leg;
        LORASYNCI_TRY(lorasynci_read_leg(b, routes, size, &at, 0, &leg, err));
        if (leg.route.peer == (uint32_t)plan->comm.rank || leg.tensor == last) continue;
        last = leg.tensor;
        num++;
    }
    plan->slots = (uint32_t *)lorasynci_alloc_array(&plan->a, num, sizeof *plan->slots);
    if (!plan->slots) return lorasynci_fail_memory(err, num * 4);
    for (i = 0; num && i < plan->comm.world; i++)
        if (lorasynci_link_rounds(&plan->sends[i])) plan->sends[i].num_digests = num; /* a gather sends one stream */
    return LORASYNC_OK;
}

/* The links: what travels between this rank and each other one. */
LORASYNCI_FN lorasync_status lorasynci_build_links(lorasynci_build *b, const lorasynci_answer *head, const char *bytes,
                                                   lorasync_error *err)
{
    lorasync_plan *plan  = b->plan;
    const char    *sends = bytes, *receives = sends + head->sends_bytes, *targets = receives + head->receives_bytes,
               *digests = targets + head->num_targets * sizeof(lorasynci_destination);
    plan->num_rounds    = (uint32_t)head->num_rounds;
    b->targets          = (const lorasynci_destination *)(const void *)targets;
    b->num_targets      = (size_t)head->num_targets;
    LORASYNCI_TRY(lorasynci_build_pass(b, sends, (size_t)head->sends_bytes, 0, 0, err));
    LORASYNCI_TRY(lorasynci_build_pass(b, receives, (size_t)head->receives_bytes, 1, 0, err));
    LORASYNCI_TRY(lorasynci_build_digests(plan, digests, (size_t)head->digests_bytes, err));
    return lorasynci_build_slots(b, sends, (size_t)head->sends_bytes, err);
}

/* Staging and operations, once the links are known. */
LORASYNCI_FN lorasync_status lorasynci_build_plan(lorasynci_build *b, const lorasynci_answer *head, const char *bytes,
                                                  lorasync_error *err)
{
    lorasync_plan *plan = b->plan;
    lorasynci_build_staging(plan, lorasynci_bucket_bytes(b->desc));
    LORASYNCI_TRY(lorasynci_build_pass(b, bytes, (size_t)head->sends_bytes, 0, 1, err));
    LORASYNCI_TRY(lorasynci_build_pass(b, bytes + head->sends_bytes, (size_t)head->receives_bytes, 1, 1, err));
    lorasynci_buffer_trim(&plan->pack.list);
    lorasynci_buffer_trim(&plan->place.list);
    lorasynci_buffer_trim(&plan->catalogue.bytes);
    lorasynci_buffer_trim(&plan->catalogue.at);
    if (lorasynci_is_gather(plan->kind)) {
        size_t n    = plan->catalogue.num, i;
        plan->sums  = (uint64_t *)lorasynci_alloc_array(&plan->a, n, sizeof *plan->sums);
        plan->index = (uint32_t *)lorasynci_alloc_array(&plan->a, n, sizeof *plan->index);
        if (!plan->sums || !plan->index) return lorasynci_fail_memory(err, n * 8);
        if (b->num_targets != n) return lorasynci_damaged_answer(plan, err);
        for (i = 0; i < n; i++) plan->index[i] = (uint32_t)b->targets[i].index;
    }
    return LORASYNC_OK;
}

/* -- creating */

/* What all ranks must ask for alike, as one number. */
LORASYNCI_FN uint64_t lorasynci_plan_tag(const lorasync_plan_desc *d)
{
    uint64_t v[7];
    v[6] = d->cuda != NULL;
    v[0] = (uint64_t)d->kind;
    v[1] = (uint64_t)d->root;
    v[2] = (uint64_t)d->wire_dtype;
    v[3] = (uint64_t)d->allow_nan;
    v[4] = (uint64_t)d->bucket_bytes;
    v[5] = d->adapter ? lorasynci_hash(d->adapter, strlen(d->adapter), 1) : 0;
    return lorasynci_hash(v, sizeof v, 2);
}

/* A GPU reads and writes elements where they are aligned, the CPU anywhere. */
LORASYNCI_FN lorasync_status lorasynci_plan_check_aligned(const lorasync_plan_desc *d, lorasync_error *err)
{
    size_t i;
    for (i = 0; i < d->num_have + d->num_want; i++) {
        const lorasync_piece *p    = i < d->num_have ? &d->have[i] : &d->want[i - d->num_have];
        int                   item = lorasync_dtype_bits(p->dtype) / 8;
        if ((uintptr_t)p->data % (uintptr_t)item != 0)
            return lorasynci_fail(
                err, LORASYNC_E_ARGUMENT,
                "%.200s: data is %p, in device memory it must be a multiple of the %d bytes of its %s", p->name,
                p->data, item, lorasync_dtype_name(p->dtype));
    }
    return LORASYNC_OK;
}

/* Checks the desc and describes this rank's pieces. Its failure is everybody's, by the vote that follows. */
LORASYNCI_FN lorasync_status lorasynci_plan_describe(lorasync_plan *plan, const lorasync_plan_desc *d,
                                                     lorasynci_parts *parts, lorasync_error *err)
{
    int held = d->kind != LORASYNC_SCATTER, wanted = d->kind == LORASYNC_SCATTER || d->kind == LORASYNC_RESHARD;
    if (d->kind < LORASYNC_GATHER || d->kind > LORASYNC_RESHARD)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "plan kind %d is none", (int)d->kind);
    if (d->root < 0 || d->root >= plan->comm.world)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "root is %d, must be 0 to %d", d->root, plan->comm.world - 1);
    if (d->num_have && !held)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "a scatter takes no held pieces; the root passes desc.image");
    if (d->num_want && !wanted)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "a gather takes no wanted pieces; it makes an image");
    if (d->kind == LORASYNC_SCATTER && plan->comm.rank == d->root && !d->image)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "scatter: the root passes no desc.image");
    if (d->kind == LORASYNC_SCATTER && plan->comm.rank == d->root && !d->image->payload && d->image->payload_bytes)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "scatter: the image has no payload; bind one with lorasync_image_bind");
    LORASYNCI_TRY(lorasynci_describe(d->have, d->num_have, 0, &plan->a, &plan->catalogue, parts, err));
    LORASYNCI_TRY(lorasynci_describe(d->want, d->num_want, 1, &plan->a, &plan->catalogue, parts, err));
    return d->cuda ? lorasynci_plan_check_aligned(d, err) : LORASYNC_OK;
}

/* Everybody's description to the planner. */
LORASYNCI_FN lorasync_status lorasynci_plan_collect(lorasync_plan *plan, lorasynci_planner *p,
                                                    const lorasynci_parts *parts, size_t *sizes,
                                                    lorasynci_hello *hellos, lorasync_error *err)
{
    lorasynci_buffer out;
    lorasynci_hello  hello;
    lorasync_error   why;
    lorasync_status  status = LORASYNC_OK;
    int              rank   = plan->comm.rank, i;
    lorasynci_buffer_init(&out, &plan->a);
    memset(&why, 0, sizeof why);
    lorasynci_buffer_reserve(&out, parts->list.size / sizeof(lorasynci_part) * 8 + parts->geometry.size / 3 * 2 +
                                       plan->catalogue.bytes.size); /* exactly: it is large */
    lorasynci_parts_pack(parts, &plan->catalogue, &out);
    hello.parts_bytes       = out.size;
    hello.catalogue_bytes   = plan->catalogue.bytes.size;
    hello.catalogue_hash[0] = lorasynci_hash(plan->catalogue.bytes.data, plan->catalogue.bytes.size, 3);
    hello.catalogue_hash[1] = lorasynci_hash(plan->catalogue.bytes.data, plan->catalogue.bytes.size, 4);
    status = plan->comm.all_gather(plan->comm.user, &hello, hellos, sizeof hello, plan->timeout_ms, err);
    for (i = 0; status == LORASYNC_OK && i < rank && memcmp(hellos[i].catalogue_hash, hello.catalogue_hash, 16) != 0;
         i++) {}
    if (status == LORASYNC_OK && i == rank) lorasynci_put(&out, plan->catalogue.bytes.data, plan->catalogue.bytes.size);
    if (status == LORASYNC_OK) {
        lorasync_status mine = out.failed ? lorasynci_fail_memory(&why, out.size) : LORASYNC_OK;
        if (mine == LORASYNC_OK && lorasynci_is_planner(plan)) mine = lorasynci_planner_expect(p, hellos, sizes, &why);
        status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine, &why, 0, "", NULL, err);
    }
    if (status == LORASYNC_OK && lorasynci_is_planner(plan) && out.size) memcpy(p->parts[rank], out.data, out.size);
    if (status == LORASYNC_OK) status = lorasynci_star(plan, 0, p->parts, sizes, out.data, out.size, err);
    lorasynci_buffer_free(&out);
    return status;
}

LORASYNCI_FN void lorasynci_plan_unmap(lorasync_plan *plan)
{
    plan->direct = 0;
    if (!plan->shared.address) return;
    if (plan->device) lorasynci_device_unmap(plan);
    plan->lines = NULL;
    lorasynci_window_close(&plan->shared);
}

/* Maps what the planner offers, if it offers; then all ranks vote whether everybody could. */
LORASYNCI_FN lorasync_status lorasynci_plan_map(lorasync_plan *plan, const lorasync_plan_desc *d,
                                                const lorasynci_offer *offer, lorasync_error *err)
{
    int             mapped = 0;
    lorasync_status status;
    if (!offer->mapping_bytes) return LORASYNC_OK;
    if (!plan->shared.address && !d->no_direct)
        lorasynci_window_name(&plan->shared, offer->name, (size_t)offer->mapping_bytes, 0);
    if (plan->shared.address) {
        plan->lines =
            (uint64_t *)(void *)(plan->shared.address + plan->shared.num_bytes - 64 * (size_t)plan->comm.world);
        mapped = !plan->device || d->kind == LORASYNC_RESHARD || lorasynci_device_map(plan, &offer->device);
    }
    status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, LORASYNC_OK, NULL, 0, "", &mapped, err);
    if (status < 0) return status;
    if (mapped) {
        plan->direct            = 1;
        plan->num_image_tensors = (size_t)offer->num_tensors;
        plan->shared_sums       = (uint64_t *)(void *)(plan->shared.address + offer->sums_at);
    } else lorasynci_plan_unmap(plan);
    return LORASYNC_OK;
}

/* A gather-all: the merged catalogue from the planner to everybody, who lays out the image from it. A failure at home
   goes to *mine. */
LORASYNCI_FN lorasync_status lorasynci_plan_share_catalogue(lorasync_plan *plan, lorasynci_planner *p,
                                                            const lorasync_plan_desc *d, size_t num_bytes,
                                                            lorasync_error *mine, lorasync_error *err)
{
    lorasynci_catalogue merged;
    lorasync_status     status;
    size_t              n      = (size_t)plan->comm.world, i;
    char              **blocks = (char **)plan->votes;
    size_t             *sizes  = (size_t *)(void *)(blocks + n);
    lorasynci_catalogue_init(&merged, &plan->a);
    if (!lorasynci_is_planner(plan) && lorasynci_buffer_reserve(&merged.bytes, num_bytes))
        merged.bytes.size = num_bytes;
    if (merged.bytes.failed) lorasynci_fail_memory(mine, num_bytes);
    status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine->status, mine, 0, "", NULL, err);
    for (i = 0; i < n && p->plan; i++) blocks[i] = p->merged.bytes.data, sizes[i] = p->merged.bytes.size;
    if (status == LORASYNC_OK) status = lorasynci_star(plan, 1, blocks, sizes, merged.bytes.data, num_bytes, err);
    if (status == LORASYNC_OK && !lorasynci_is_planner(plan) &&
        lorasynci_catalogue_index(&merged, plan->root, mine) == LORASYNC_OK)
        lorasynci_layout_image(plan, d, &merged, mine);
    lorasynci_catalogue_free(&merged);
    return status;
}

/* Verdict on the descriptions, the catalogue for a gather-all, and the shared image. */
LORASYNCI_FN lorasync_status lorasynci_plan_offer(lorasync_plan *plan, lorasynci_planner *p,
                                                  const lorasync_plan_desc *d, const size_t *in_sizes,
                                                  lorasynci_offer *offer, lorasync_error *mine, lorasync_error *err)
{
    size_t          n      = (size_t)plan->comm.world, i;
    char          **blocks = (char **)plan->votes;
    size_t         *sizes  = (size_t *)(void *)(blocks + n);
    lorasync_status status;
    memset(offer, 0, sizeof *offer);
    if (lorasynci_is_planner(plan)) {
        offer->id             = lorasynci_unique(plan);
        offer->verdict.status = lorasynci_planner_check(p, in_sizes, &offer->verdict);
        if (offer->verdict.status == LORASYNC_OK && d->kind == LORASYNC_GATHER_ALL)
            offer->catalogue_bytes = p->merged.bytes.size;
        if (offer->verdict.status == LORASYNC_OK && (plan->image || (plan->device && d->kind == LORASYNC_RESHARD)) &&
            n > 1 && !d->no_direct)
            lorasynci_offer_mapping(plan, offer);
        for (i = 0; i < n; i++) blocks[i] = (char *)offer, sizes[i] = sizeof *offer;
    }
    status   = lorasynci_star(plan, 1, blocks, sizes, offer, sizeof *offer, err);
    plan->id = offer->id;
    if (status == LORASYNC_OK && offer->verdict.status < 0)
        status = lorasynci_fail(err, offer->verdict.status, "%.500s", offer->verdict.text);
    if (status == LORASYNC_OK && offer->catalogue_bytes && n > 1)
        status = lorasynci_plan_share_catalogue(plan, p, d, (size_t)offer->catalogue_bytes, mine, err);
    if (status == LORASYNC_OK) status = lorasynci_plan_map(plan, d, offer, err);
    if (offer->mapping_bytes && lorasynci_is_planner(plan)) shm_unlink(offer->name); /* whoever could has it by now */
    return status;
}

/* Everybody's routes from the planner. *out holds them behind *head. */
LORASYNCI_FN lorasync_status lorasynci_plan_receive(lorasync_plan *plan, lorasynci_planner *p, lorasynci_answer *head,
                                                    lorasynci_buffer *out, lorasync_error *mine, lorasync_error *err)
{
    const lorasync_allocator *a      = &plan->a;
    size_t                    n      = (size_t)plan->comm.world, i;
    char                    **blocks = (char **)plan->votes;
    size_t                   *sizes = (size_t *)(void *)(blocks + n), here = (size_t)plan->comm.rank;
    lorasynci_answer         *heads  = NULL;
    lorasynci_buffer         *bodies = NULL;
    lorasync_status           status = LORASYNC_OK;
    if (lorasynci_is_planner(plan)) {
        heads  = (lorasynci_answer *)lorasynci_alloc_array(a, n, sizeof *heads);
        bodies = (lorasynci_buffer *)lorasynci_alloc_array(a, n, sizeof *bodies);
        for (i = 0; bodies && i < n; i++) lorasynci_buffer_init(&bodies[i], a);
        if (!heads || !bodies) lorasynci_fail_memory(mine, n * sizeof *heads);
        else if (mine->status == LORASYNC_OK && lorasynci_planner_route(p, mine) == LORASYNC_OK)
            for (i = 0; i < n && mine->status == LORASYNC_OK; i++)
                lorasynci_planner_answer(p, (int)i, &heads[i], &bodies[i], mine);
    }
    status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine->status, mine, 0, "", NULL, err);
    for (i = 0; i < n && heads; i++) blocks[i] = (char *)&heads[i], sizes[i] = sizeof *heads;
    if (status == LORASYNC_OK) status = lorasynci_star(plan, 1, blocks, sizes, head, sizeof *head, err);
    if (status == LORASYNC_OK && heads) *head = heads[here];
    if (status == LORASYNC_OK) {
        size_t size = (size_t)(head->sends_bytes + head->receives_bytes +
                               head->num_targets * sizeof(lorasynci_destination) + head->digests_bytes);
        if (bodies) *out = bodies[here];
        else if (lorasynci_buffer_reserve(out, size)) out->size = size;
        else lorasynci_fail_memory(mine, size);
        status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine->status, mine, 0, "", NULL, err);
        for (i = 0; i < n && bodies; i++) blocks[i] = bodies[i].data, sizes[i] = bodies[i].size;
        if (status == LORASYNC_OK) status = lorasynci_star(plan, 1, blocks, sizes, out->data, size, err);
    }
    for (i = 0; i < n && bodies; i++)
        if (i != here || out->data != bodies[i].data) lorasynci_buffer_free(&bodies[i]);
    lorasynci_dealloc(a, heads);
    lorasynci_dealloc(a, bodies);
    return status;
}

/* Memory for what a run needs: staging, and the image of a gather. */
LORASYNCI_FN lorasync_status lorasynci_plan_allocate(lorasync_plan *plan, const lorasync_plan_desc *d,
                                                     const lorasynci_offer *offer, lorasync_error *err)
{
    lorasync_image *image = plan->image;
    size_t          i;
    int             space;
    if (image && plan->has_image) {
        plan->tensor_digests =
            (uint64_t *)lorasynci_alloc_array(&plan->a, image->num_tensors, sizeof *plan->tensor_digests);
        image->tensor_digests = plan->tensor_digests;
        plan->terms = (lorasynci_term *)lorasynci_alloc_array(&plan->a, image->num_tensors, sizeof *plan->terms);
        if (!plan->tensor_digests || !plan->terms) return lorasynci_fail_memory(err, image->num_tensors * 8);
        for (i = 0; i < image->num_tensors; i++) plan->terms[i] = lorasynci_digest_term(&image->tensors[i]);
    }
    plan->source = d->kind == LORASYNC_SCATTER && plan->has_image ? d->image : NULL;
    if (plan->lent) return LORASYNC_OK;
    if (plan->device) return lorasynci_device_allocate(plan, err);
    for (space = LORASYNCI_SEND; space <= LORASYNCI_RECEIVE; space++) {
        plan->memory[space] = (char *)lorasynci_alloc(&plan->meter.a, plan->staging_bytes[space]);
        if (!plan->memory[space]) return lorasynci_fail_memory(err, plan->staging_bytes[space]);
    }
    if (plan->source) plan->memory[LORASYNCI_IMAGE] = (char *)(uintptr_t)plan->source->payload;
    if (plan->direct) plan->memory[LORASYNCI_IMAGE] = plan->shared.address + offer->header_bytes;
    if (!image || !plan->has_image) return LORASYNC_OK;
    if (plan->direct) {
        if (lorasynci_is_planner(plan)) lorasynci_image_move_header(image, plan->shared.address);
    } else {
        plan->image_memory = (char *)lorasynci_alloc(&plan->meter.a, image->header_bytes + image->payload_bytes);
        if (!plan->image_memory) return lorasynci_fail_memory(err, image->header_bytes + image->payload_bytes);
        lorasynci_image_move_header(image, plan->image_memory);
        plan->memory[LORASYNCI_IMAGE] = plan->image_memory + image->header_bytes;
    }
    lorasync_image_bind(image, plan->memory[LORASYNCI_IMAGE]);
    return LORASYNC_OK;
}

/* A reshard between GPUs of one host: every rank's receive staging, whole, is opened by those who send to it. If that
   is more than a bucket on one rank, or one cannot open another's, none does, and the bytes travel over the comm. The
   vote on `mine` is everybody's. */
LORASYNCI_FN lorasync_status lorasynci_plan_mesh(lorasync_plan *plan, size_t bucket_bytes, lorasync_error *mine,
                                                 lorasync_error *err)
{
    size_t    staging = 0;
    uint64_t *starts;
    int       i, can = mine->status == LORASYNC_OK && (plan->comm.all_gather_stream || !plan->comm.exchange_stream);
    lorasync_status status;
    if (!lorasynci_is_meshed(plan)) return LORASYNC_OK;
    starts = lorasynci_mesh_starts(plan, plan->comm.rank);
    for (i = 0; i < plan->comm.world; i++) {
        lorasynci_place_link(&plan->receives[i], 1, 0, &staging);
        starts[i] = plan->receives[i].base;
    }
    can    = can && staging <= bucket_bytes && lorasynci_device_offer_staging(plan, staging);
    status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine->status, mine, 0, "", &can, err);
    if (status == LORASYNC_OK && can) {
        can    = lorasynci_device_map_mesh(plan);
        status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, LORASYNC_OK, NULL, 0, "", &can, err);
    }
    LORASYNCI_TRY(status);
    if (can) {
        if (plan->num_rounds) plan->num_rounds = 1; /* the vote */
    } else {
        lorasynci_device_leave_mesh(plan);
        lorasynci_plan_unmap(plan);
    }
    return LORASYNC_OK;
}

/* The collective part of creating, from description to operations. */
LORASYNCI_FN lorasync_status lorasynci_plan_make(lorasync_plan *plan, lorasynci_planner *p, const lorasync_plan_desc *d,
                                                 lorasynci_parts *parts, size_t *sizes, lorasynci_hello *hellos,
                                                 lorasync_error *err)
{
    lorasync_error   mine;
    lorasynci_offer  offer;
    lorasynci_answer head;
    lorasynci_buffer answer;
    lorasynci_build  build;
    lorasync_status  status;
    memset(&mine, 0, sizeof mine);
    lorasynci_buffer_init(&answer, &plan->a);
    if (sizes && hellos) lorasynci_plan_describe(plan, d, parts, &mine);
    else lorasynci_fail_memory(&mine, (size_t)plan->comm.world * sizeof *hellos);
    if (mine.status == LORASYNC_OK && d->cuda) lorasynci_device_open(plan, d->cuda, &mine);
    if (mine.status == LORASYNC_OK && lorasynci_is_planner(plan)) lorasynci_planner_init(p, plan, d, &mine);
    LORASYNCI_TRY(lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine.status, &mine, lorasynci_plan_tag(d),
                                  "the plan's kind, root, wire_dtype, bucket_bytes, allow_nan, cuda or adapter, hashed",
                                  NULL, err));
    LORASYNCI_TRY(lorasynci_plan_collect(plan, p, parts, sizes, hellos, err));
    LORASYNCI_TRY(lorasynci_plan_offer(plan, p, d, sizes, &offer, &mine, err));
    status                 = lorasynci_plan_receive(plan, p, &head, &answer, &mine, err);
    plan->stats.num_pieces = p->held.num + p->wanted.num; /* of all ranks, on the planner */
    lorasynci_planner_free(p);
    if (status == LORASYNC_OK) {
        memset(&build, 0, sizeof build);
        build.plan  = plan;
        build.desc  = d;
        build.parts = parts;
        build.image = d->kind == LORASYNC_SCATTER ? d->image : plan->image;
        if (plan->image) plan->num_image_tensors = plan->image->num_tensors;
        lorasynci_build_links(&build, &head, answer.data, &mine);
        status = lorasynci_plan_mesh(plan, lorasynci_bucket_bytes(d), &mine, err);
    }
    if (status == LORASYNC_OK) {
        if (mine.status == LORASYNC_OK && lorasynci_build_plan(&build, &head, answer.data, &mine) == LORASYNC_OK)
            lorasynci_plan_allocate(plan, d, &offer, &mine);
        status = lorasynci_agree(&plan->comm, plan->votes, plan->timeout_ms, mine.status, &mine, 0, "", NULL, err);
    }
    lorasynci_buffer_free(&answer);
    return status;
}

LORASYNCI_FN void lorasynci_plan_count(lorasync_plan *plan, size_t num_parts)
{
    lorasync_plan_stats *s = &plan->stats;
    int                  i;
    s->num_tensors = plan->has_image && plan->image ? plan->image->num_tensors : plan->catalogue.num;
    if (!lorasynci_is_planner(plan))
        s->num_pieces = num_parts + (plan->kind == LORASYNC_GATHER_ALL ? lorasynci_ops_num(&plan->place) : 0);
    s->plan_bytes      = plan->meter.live;
    s->peak_plan_bytes = plan->meter.peak;
    s->staging_bytes   = plan->staging_bytes[LORASYNCI_SEND] + plan->staging_bytes[LORASYNCI_RECEIVE];
    s->image_bytes     = plan->image ? plan->image->header_bytes + plan->image->payload_bytes : 0;
    s->num_rounds      = lorasynci_is_meshed(plan) ? 0 : plan->num_rounds;
    s->direct          = plan->direct;
    for (i = 0; i < plan->comm.world; i++) {
        const lorasynci_link *out = &plan->sends[i], *in = &plan->receives[i];
        size_t                copies = plan->kind == LORASYNC_GATHER_ALL ? (size_t)plan->comm.world - 1 : 1;
        if (lorasynci_link_rounds(out))
            s->send_bytes += copies * (size_t)lorasynci_link_end(out, lorasynci_link_rounds(out) - 1);
        if (lorasynci_link_rounds(in))
            s->receive_bytes += (size_t)lorasynci_link_end(in, lorasynci_link_rounds(in) - 1);
    }
}

/* The plan itself, empty, with all that talking needs. */
LORASYNCI_FN lorasync_plan *lorasynci_plan_new(const lorasync_plan_desc *d, const lorasync_allocator *a)
{
    lorasync_plan *plan = (lorasync_plan *)lorasynci_alloc_array(a, 1, sizeof *plan);
    size_t         world, i;
    if (!plan) return NULL;
    plan->meter.a    = *a;
    plan->a.alloc    = lorasynci_meter_alloc;
    plan->a.free     = lorasynci_meter_free;
    plan->a.user     = &plan->meter;
    plan->comm       = lorasynci_comm_copy(d->comm);
    plan->kind       = d->kind;
    plan->root       = d->root;
    plan->allow_nan  = d->allow_nan;
    plan->timeout_ms = d->timeout_ms > 0 ? d->timeout_ms : 60000;
    plan->has_image  = d->kind == LORASYNC_GATHER_ALL || (d->kind != LORASYNC_RESHARD && plan->comm.rank == d->root);
    world            = (size_t)plan->comm.world;
    plan->sends      = (lorasynci_link *)lorasynci_alloc_array(&plan->a, world, sizeof *plan->sends);
    plan->receives   = (lorasynci_link *)lorasynci_alloc_array(&plan->a, world, sizeof *plan->receives);
    plan->messages   = (lorasync_message *)lorasynci_alloc_array(&plan->a, 2 * world, sizeof *plan->messages);
    plan->votes      = lorasynci_alloc(&plan->a, lorasynci_vote_scratch((int)world));
    lorasynci_catalogue_init(&plan->catalogue, &plan->a);
    lorasynci_buffer_init(&plan->pack.list, &plan->a), lorasynci_buffer_init(&plan->pack.grids, &plan->a);
    lorasynci_buffer_init(&plan->place.list, &plan->a), lorasynci_buffer_init(&plan->place.grids, &plan->a);
    for (i = 0; i < world && plan->sends && plan->receives; i++) {
        lorasynci_buffer_init(&plan->sends[i].ends, &plan->a);
        lorasynci_buffer_init(&plan->receives[i].ends, &plan->a);
    }
    if (plan->sends && plan->receives && plan->messages && plan->votes) return plan;
    lorasync_plan_free(plan);
    return NULL;
}

/* There can be no plan here, as `mine` says. The others wait for this rank's first vote: it is cast from the stack, or,
   with so many ranks that it does not fit there, the communicator is given up. */
LORASYNCI_FN lorasync_status lorasynci_plan_refuse(const lorasync_plan_desc *d, const lorasync_error *mine,
                                                   lorasync_error *err)
{
    union {
        lorasync_error texts[64];
        uint64_t       aligned;
    } scratch;
    lorasync_comm c     = lorasynci_comm_copy(d->comm);
    int           votes = lorasynci_vote_scratch(c.world) <= sizeof scratch;
    *err                = *mine;
    if (votes)
        lorasynci_agree(&c, &scratch, d->timeout_ms > 0 ? d->timeout_ms : 60000, mine->status, mine, 0, "", NULL, err);
    if (!votes || lorasync_is_lost(err->status)) lorasynci_comm_abort(&c, err->text);
    return err->status;
}

/* lent: the plan comes without staging and payload. */
LORASYNCI_FN lorasync_status lorasynci_plan_create(const lorasync_plan_desc *desc, int lent, lorasync_plan **out,
                                                   lorasync_error *err)
{
    lorasync_allocator a;
    lorasync_error     why, mine;
    lorasync_plan     *plan;
    lorasynci_planner  planner;
    lorasynci_parts    parts;
    lorasynci_hello   *hellos;
    size_t            *sizes, num_parts;
    lorasync_status    status;
    if (!err) err = &why;
    memset(&mine, 0, sizeof mine);
    if (!desc) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_plan_create: desc is NULL");
    if (out) *out = NULL;
    else lorasynci_fail(&mine, LORASYNC_E_ARGUMENT, "lorasync_plan_create: out is NULL");
    if (lorasynci_check_host(desc->comm, desc->allocator, &a, &mine) < 0 && !lorasynci_comm_ok(desc->comm)) {
        *err = mine; /* nobody to tell */
        return err->status;
    }
    plan = mine.status < 0 ? NULL : lorasynci_plan_new(desc, &a);
    if (!plan && mine.status == LORASYNC_OK) lorasynci_fail_memory(&mine, sizeof *plan);
    if (!plan) return lorasynci_plan_refuse(desc, &mine, err);
    plan->lent = lent;
    memset(&planner, 0, sizeof planner);
    lorasynci_buffer_init(&parts.list, &plan->a);
    lorasynci_buffer_init(&parts.geometry, &plan->a);
    sizes     = (size_t *)lorasynci_alloc_array(&plan->a, (size_t)plan->comm.world, sizeof *sizes);
    hellos    = (lorasynci_hello *)lorasynci_alloc_array(&plan->a, (size_t)plan->comm.world, sizeof *hellos);
    status    = lorasynci_plan_make(plan, &planner, desc, &parts, sizes, hellos, err);
    num_parts = lorasynci_parts_num(&parts);
    lorasynci_planner_free(&planner);
    lorasynci_buffer_free(&parts.list);
    lorasynci_buffer_free(&parts.geometry);
    lorasynci_dealloc(&plan->a, sizes);
    lorasynci_dealloc(&plan->a, hellos);
    if (lorasync_is_lost(status)) lorasynci_comm_abort(&plan->comm, err->text);
    if (status < 0) {
        lorasync_plan_free(plan);
        return status;
    }
    lorasynci_plan_count(plan, num_parts);
    *out = plan;
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_plan_create(const lorasync_plan_desc *desc, lorasync_plan **out,
                                                  lorasync_error *err)
{
    return lorasynci_plan_create(desc, 0, out, err);
}

/* Memory in which several plans run in turns: staging as large as the largest of them needs, and the payload of one
   image. */
typedef struct lorasynci_loan {
    char *send, *receive;
    char *payload;      /* of the image; on ranks without it what is mapped of it, or NULL */
    char *host_payload; /* of a device plan whose image comes to the host; else NULL */
} lorasynci_loan;

/* From the next run on the image is made at `payload`; in host memory, on a rank that has the image, with its header in
   front. Between runs. */
LORASYNCI_FN void lorasynci_plan_aim(lorasync_plan *plan, char *payload)
{
    if (plan->memory[LORASYNCI_IMAGE] == payload) return;
    plan->memory[LORASYNCI_IMAGE] = payload;
    if (!plan->has_image) return;
    if (!plan->device) lorasynci_image_move_header(plan->image, payload - plan->image->header_bytes);
    lorasync_image_bind(plan->image, payload);
}

/* Gives a lent plan its memory, once; it must outlive the plan. */
LORASYNCI_FN lorasync_status lorasynci_plan_lend(lorasync_plan *plan, const lorasynci_loan *loan, lorasync_error *err)
{
    plan->memory[LORASYNCI_SEND]    = loan->send;
    plan->memory[LORASYNCI_RECEIVE] = loan->receive;
    plan->memory[LORASYNCI_IMAGE]   = loan->payload;
    if (plan->device) return lorasynci_device_lend(plan, loan->host_payload, err);
    if (plan->image && plan->has_image) lorasync_image_bind(plan->image, loan->payload);
    return LORASYNC_OK;
}

/* Direct: from here on nobody begins to write to what this rank reads; it may be freed. */
LORASYNCI_FN void lorasynci_mark_gone(lorasync_plan *plan)
{
    if (plan->direct && plan->lines)
        __atomic_store_n(lorasynci_word(plan, plan->comm.rank, LORASYNCI_BEGUN), 0, __ATOMIC_RELEASE);
}

LORASYNC_API void lorasync_plan_free(lorasync_plan *plan)
{
    lorasync_allocator a;
    int                i;
    if (!plan) return;
    a = plan->meter.a;
    lorasynci_device_settle(plan);
    lorasynci_mark_gone(plan);
    lorasynci_device_close(plan);
    if (plan->image) lorasync_image_free(plan->image);
    for (i = 0; i < plan->comm.world; i++) {
        if (plan->sends) lorasynci_buffer_free(&plan->sends[i].ends);
        if (plan->receives) lorasynci_buffer_free(&plan->receives[i].ends);
        if (plan->receives) lorasynci_dealloc(&plan->a, plan->receives[i].digests);
    }
    lorasynci_dealloc(&plan->a, plan->sends), lorasynci_dealloc(&plan->a, plan->receives),
        lorasynci_dealloc(&plan->a, plan->messages);
    lorasynci_dealloc(&plan->a, plan->votes), lorasynci_dealloc(&plan->a, plan->sums),
        lorasynci_dealloc(&plan->a, plan->index);
    lorasynci_dealloc(&plan->a, plan->slots), lorasynci_dealloc(&plan->a, plan->tensor_digests),
        lorasynci_dealloc(&plan->a, plan->terms);
    lorasynci_catalogue_free(&plan->catalogue);
    lorasynci_buffer_free(&plan->pack.list), lorasynci_buffer_free(&plan->pack.grids);
    lorasynci_buffer_free(&plan->place.list), lorasynci_buffer_free(&plan->place.grids);
    if (!plan->lent)
        lorasynci_dealloc(&a, plan->memory[LORASYNCI_SEND]), lorasynci_dealloc(&a, plan->memory[LORASYNCI_RECEIVE]);
    lorasynci_dealloc(&a, plan->image_memory);
    lorasynci_window_close(&plan->shared);
    lorasynci_dealloc(&a, plan);
}
/* -------------------------------------------------------------------------------------------------------- >>move -- */

/* Running a plan: no allocation, no strings but in errors, one pass over the operations. */

enum {
    LORASYNCI_BLOCK = 2048
}; /* bytes of destination that are converted, then digested and checked while they are in the first cache */

/* Gathers a row whose elements are apart, or spreads one, element by element. */
LORASYNCI_FN void lorasynci_gather_row(char *dst, const char *src, int64_t num, int64_t src_step, int64_t dst_step,
                                       int64_t item)
{
    int64_t i;
    for (i = 0; i < num; i++) memcpy(dst + i * dst_step * item, src + i * src_step * item, (size_t)item);
}

/* Converts num elements of a row from src (elements s1 apart) to dst (d1 apart), through `block` where a step between
   is needed: three halves of it, for a gathered row, the dtype on the way, and a row to be spread. */
LORASYNCI_FN void lorasynci_convert_row(const lorasynci_op *op, const lorasynci_grid *g, char *dst, const char *src,
                                        int64_t num, char *block)
{
    lorasync_dtype from = (lorasync_dtype)op->src_dtype, to = (lorasync_dtype)op->dst_dtype,
                   via = (lorasync_dtype)op->via;
    float scale        = g->scale;
    char *into         = g->d1 != 1 && num > 1 ? block + 2 * LORASYNCI_BLOCK : dst;
    if (g->s1 != 1 && num > 1) {
        lorasynci_gather_row(block, src, num, g->s1, 1, lorasynci_item(from));
        src = block;
    }
    if (via) {
        lorasynci_convert(block + LORASYNCI_BLOCK, via, src, from, (size_t)num, scale);
        src   = block + LORASYNCI_BLOCK;
        from  = via;
        scale = 1;
    }
    lorasynci_convert(into, to, src, from, (size_t)num, scale);
    if (into != dst) lorasynci_gather_row(dst, into, num, 1, g->d1, lorasynci_item(to));
}

/* One operation. With op->digest adds to *sum and looks for NaN and Inf if check is set; returns the number of the
   first such element in its tensor, or -1. Destinations with gaps are never digested: a digest is of what goes to
   staging or to the image, row by row. */
LORASYNCI_FN int64_t lorasynci_run_op(const lorasynci_op *op, const lorasynci_grid *g, char *const *memory,
                                      uint64_t *sum, int check)
{
    char  block[3 * LORASYNCI_BLOCK]; /* elements of at most 8 bytes: LORASYNCI_BLOCK / 8 at a time when it is used */
    char *dst         = (char *)((uintptr_t)memory[op->dst_space] + (uintptr_t)op->dst),
         *src         = (char *)((uintptr_t)memory[op->src_space] + (uintptr_t)op->src);
    int64_t from_item = lorasynci_item((lorasync_dtype)op->src_dtype),
            to_item   = lorasynci_item((lorasync_dtype)op->dst_dtype);
    int64_t step      = g->s1 != 1 || g->d1 != 1 || op->via ? LORASYNCI_BLOCK / 8
                        : op->digest                        ? LORASYNCI_BLOCK / to_item
                                                            : op->n1;
    int64_t bad       = -1, i0, i1;
    if (step < 1) step = 1;
    for (i0 = 0; i0 < g->n0; i0++) {
        for (i1 = 0; i1 < op->n1; i1 += step) {
            int64_t num = op->n1 - i1 < step ? op->n1 - i1 : step, at = op->pos + i0 * g->row + i1;
            char   *to = dst + i1 * g->d1 * to_item;
            lorasynci_convert_row(op, g, to, src + i1 * g->s1 * from_item, num, block);
            if (!op->digest) continue;
            *sum += lorasync_digest(to, (size_t)(num * to_item), (uint64_t)(at * to_item));
            if (check && bad < 0) {
                size_t hit = lorasynci_find_nonfinite(to, (lorasync_dtype)op->dst_dtype, (size_t)num);
                if (hit != SIZE_MAX) bad = at + (int64_t)hit;
            }
        }
        dst += g->d0 * to_item;
        src += g->s0 * from_item;
    }
    return bad;
}

/* "tensor: NaN or Inf at element [3, 17]". */
LORASYNCI_FN lorasync_status lorasynci_nan_error(const lorasync_plan *plan, uint32_t tensor, int64_t element,
                                                 int rounded, lorasync_error *err)
{
    const lorasynci_record *r     = lorasynci_record_at(&plan->catalogue, tensor);
    const int64_t          *shape = lorasynci_record_shape(r);
    int64_t                 index[LORASYNC_MAX_DIMS];
    char                    text[160];
    int                     d;
    for (d = r->ndim - 1; d >= 0; d--) {
        index[d] = element % shape[d];
        element /= shape[d];
    }
    return lorasynci_fail(
        err, LORASYNC_E_NAN,
        "%.200s: NaN or Inf at element %s%s; nothing was published, the last good version stays (allow_nan turns this "
        "check off)",
        lorasynci_record_name(r), lorasynci_shape_text(index, r->ndim, text, sizeof text),
        rounded ? " as rounded for the wire" : "");
}

/* Packs on the host: all operations, with sums and check. */
LORASYNCI_FN void lorasynci_pack(lorasync_plan *plan)
{
    size_t i, num = lorasynci_ops_num(&plan->pack);
    if (plan->sums) memset(plan->sums, 0, plan->catalogue.num * sizeof *plan->sums);
    for (i = 0; i < num; i++) {
        const lorasynci_op *op  = lorasynci_ops_at(&plan->pack, i);
        uint64_t           *sum = plan->sums ? &plan->sums[op->tensor] : NULL;
        int64_t bad = lorasynci_run_op(op, lorasynci_op_grid(&plan->pack, op), plan->memory, sum, !plan->allow_nan);
        if (bad >= 0 && plan->begin_error.status == LORASYNC_OK)
            lorasynci_nan_error(plan, op->tensor, bad, op->src_dtype != op->dst_dtype, &plan->begin_error);
    }
}

/* Direct: where a rank's sums of this run lie. */
LORASYNCI_FN uint64_t *lorasynci_sums_of(const lorasync_plan *plan, int rank)
{
    size_t world = (size_t)plan->comm.world;
    return plan->shared_sums + ((size_t)(plan->run % 2) * world + (size_t)rank) * plan->num_image_tensors;
}

/* Direct: this rank's sums to where all can read them, after the vote. */
LORASYNCI_FN void lorasynci_share_sums(lorasync_plan *plan)
{
    uint64_t *shared = lorasynci_sums_of(plan, plan->comm.rank);
    size_t    i;
    for (i = 0; i < plan->catalogue.num; i++) shared[plan->index[i]] = plan->sums[i];
}

LORASYNCI_FN lorasync_status lorasynci_lost_before(lorasync_error *err)
{
    return lorasynci_fail(
        err, LORASYNC_E_LOST,
        "the communicator was lost before: close the plan (session), make a new communicator, open again");
}

/* The communicator is gone: say so to the others, and remember. */
LORASYNCI_FN lorasync_status lorasynci_plan_lose(lorasync_plan *plan, lorasync_status status, const lorasync_error *err)
{
    if (!plan->lost) lorasynci_comm_abort(&plan->comm, err->text);
    plan->lost = status;
    return status;
}

/* Direct: this rank has begun, or waits, so it has done with the image of the run before. */
LORASYNCI_FN void lorasynci_mark_begun(lorasync_plan *plan)
{
    if (plan->direct)
        __atomic_store_n(lorasynci_word(plan, plan->comm.rank, LORASYNCI_BEGUN), plan->run + 1, __ATOMIC_RELEASE);
}

/* Direct: until a word of another rank's line says this run, or a later one. */
LORASYNCI_FN lorasync_status lorasynci_await_rank(lorasync_plan *plan, int rank, int word, const char *what,
                                                  uint64_t deadline_ns, lorasync_error *err)
{
    const uint64_t *at     = lorasynci_word(plan, rank, word);
    unsigned        turns  = 0;
    lorasync_status status = LORASYNC_OK;
    lorasync_error  why;
    while (__atomic_load_n(at, __ATOMIC_ACQUIRE) <= plan->run && status == LORASYNC_OK) {
        lorasynci_pause(&turns);
        if (turns % 256 != 0) continue;
        if (plan->comm.check) status = plan->comm.check(plan->comm.user, &why);
        if (status == LORASYNC_OK && lorasynci_now_ns() >= deadline_ns)
            status = lorasynci_fail(
                &why, LORASYNC_E_TIMEOUT,
                "rank %d did not %s this run before the deadline of %d ms; does every rank make the same calls, in the "
                "same order?",
                rank, what, plan->timeout_ms);
    }
    if (status == LORASYNC_OK || __atomic_load_n(at, __ATOMIC_ACQUIRE) > plan->run)
        return LORASYNC_OK; /* a rank that ended, or was slow, may have written it meanwhile */
    return lorasynci_fail(err, lorasync_is_lost(status) ? status : LORASYNC_E_COMM, "%.500s", why.text);
}

/* Direct: the image may be written when those who read it, the root or in a gather-all everybody, have begun too; the
   staging of another rank, when that one has. */
LORASYNCI_FN lorasync_status lorasynci_await_readers(lorasync_plan *plan, lorasync_error *err)
{
    uint64_t deadline = lorasynci_deadline_ns(plan->timeout_ms);
    int      rank;
    for (rank = 0; plan->direct && rank < plan->comm.world; rank++) {
        if (plan->kind == LORASYNC_GATHER && rank != plan->root) continue;
        if (plan->kind == LORASYNC_RESHARD && !lorasynci_link_rounds(&plan->sends[rank])) continue;
        LORASYNCI_TRY(lorasynci_await_rank(plan, rank, LORASYNCI_BEGUN, "begin", deadline, err));
    }
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_plan_begin(lorasync_plan *plan, lorasync_error *err)
{
    uint64_t start = lorasynci_now_ns();
    if (!plan) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "plan is NULL");
    if (plan->lost) return lorasynci_lost_before(err);
    if (plan->begun) return lorasynci_fail(err, LORASYNC_E_STATE, "begin was called already; call wait");
    plan->begun              = 1;
    plan->begin_error.status = LORASYNC_OK;
    if (plan->device) lorasynci_device_await_caller(plan, &plan->begin_error);
    lorasynci_mark_begun(plan);
    if (plan->device) {
        if (plan->begin_error.status == LORASYNC_OK) lorasynci_device_begin(plan, &plan->begin_error);
    } else if (lorasynci_await_readers(plan, &plan->begin_error) == LORASYNC_OK) {
        start = lorasynci_now_ns();
        lorasynci_pack(plan);
        if (plan->direct) lorasynci_share_sums(plan);
    }
    plan->stats.pack_ns = lorasynci_now_ns() - start;
    if (lorasync_is_lost(plan->begin_error.status))
        lorasynci_plan_lose(plan, plan->begin_error.status, &plan->begin_error);
    if (plan->begin_error.status < 0 && err) *err = plan->begin_error;
    return plan->begin_error.status;
}

/* The sums behind the last round of the stream(s). */
LORASYNCI_FN void lorasynci_send_digests(lorasync_plan *plan)
{
    int    rank;
    size_t i;
    for (rank = 0; rank < plan->comm.world; rank++) {
        lorasynci_link *link = &plan->sends[rank];
        if (!link->num_digests) continue;
        for (i = 0; i < plan->num_slots; i++)
            memcpy(plan->memory[LORASYNCI_SEND] + lorasynci_link_staged_digests_at(link) + i * 8,
                   &plan->sums[plan->slots[i]], 8);
    }
}

/* The messages of one round, in plan->messages: sends from 0, receives from world. */
LORASYNCI_FN void lorasynci_round_messages(lorasync_plan *plan, uint32_t round, size_t *out_num_sends,
                                           size_t *out_num_receives)
{
    const lorasync_comm *c     = &plan->comm;
    lorasync_message    *sends = plan->messages, *receives = plan->messages + c->world;
    size_t               num_sends = 0, num_receives = 0;
    int                  rank;
    for (rank = 0; rank < c->world; rank++) {
        const lorasynci_link *s = plan->kind == LORASYNC_GATHER_ALL ? &plan->sends[0] : &plan->sends[rank],
                             *r = &plan->receives[rank];
        if (rank == c->rank) continue;
        if (round < lorasynci_link_rounds(s)) {
            sends[num_sends].peer      = rank;
            sends[num_sends].data      = plan->memory[LORASYNCI_SEND] + lorasynci_link_at(s, round);
            sends[num_sends].num_bytes = (size_t)(lorasynci_link_end(s, round) - lorasynci_link_start(s, round));
            num_sends++;
        }
        if (round < lorasynci_link_rounds(r)) {
            receives[num_receives].peer      = rank;
            receives[num_receives].data      = plan->memory[LORASYNCI_RECEIVE] + lorasynci_link_at(r, round);
            receives[num_receives].num_bytes = (size_t)(lorasynci_link_end(r, round) - lorasynci_link_start(r, round));
            num_receives++;
        }
    }
    *out_num_sends    = num_sends;
    *out_num_receives = num_receives;
}

LORASYNCI_FN lorasync_status lorasynci_exchange_round(lorasync_plan *plan, uint32_t round, lorasync_error *err)
{
    size_t num_sends, num_receives;
    lorasynci_round_messages(plan, round, &num_sends, &num_receives);
    return plan->comm.exchange(plan->comm.user, plan->messages, num_sends, plan->messages + plan->comm.world,
                               num_receives, plan->timeout_ms, err);
}

LORASYNCI_FN void lorasynci_place_round(lorasync_plan *plan, uint32_t round)
{
    int    rank;
    size_t i, num = lorasynci_ops_num(&plan->place);
    for (i = 0; i < num; i++) {
        const lorasynci_op *op = lorasynci_ops_at(&plan->place, i);
        if (op->round == round) lorasynci_run_op(op, lorasynci_op_grid(&plan->place, op), plan->memory, NULL, 0);
    }
    for (rank = 0; rank < plan->comm.world; rank++) {
        const lorasynci_link *link = &plan->receives[rank];
        const char           *from;
        if (!link->num_digests || round + 1 != lorasynci_link_rounds(link)) continue;
        from = plan->memory[LORASYNCI_RECEIVE] + lorasynci_link_staged_digests_at(link);
        for (i = 0; i < link->num_digests; i++) {
            uint64_t sum;
            memcpy(&sum, from + i * 8, 8);
            plan->tensor_digests[link->digests[i]] += sum;
        }
    }
}

/* Digests of the tensors, from all ranks' sums, and of the image. */
LORASYNCI_FN void lorasynci_finish_image(lorasync_plan *plan)
{
    lorasync_image *image = plan->image;
    size_t          i, n = image->num_tensors;
    int             rank;
    for (rank = 0; plan->direct && rank < plan->comm.world; rank++) {
        const uint64_t *shared = lorasynci_sums_of(plan, rank);
        for (i = 0; i < n; i++) plan->tensor_digests[i] += shared[i];
    }
    if (!plan->direct) {
        for (i = 0; i < plan->catalogue.num; i++) plan->tensor_digests[plan->index[i]] += plan->sums[i];
    }
    image->digest     = lorasynci_digest_terms(plan->terms, plan->tensor_digests, n);
    image->has_digest = 1;
}

/* All rounds, for this rank. */
LORASYNCI_FN lorasync_status lorasynci_move(lorasync_plan *plan, lorasync_error *err)
{
    uint64_t start, exchanged;
    uint32_t round;
    plan->stats.exchange_ns = plan->stats.place_ns = 0;
    if (plan->num_slots) lorasynci_send_digests(plan);
    for (round = 0; round < plan->num_rounds; round++) {
        start = lorasynci_now_ns();
        LORASYNCI_TRY(lorasynci_exchange_round(plan, round, err));
        exchanged = lorasynci_now_ns();
        if (plan->begin_error.status >= 0)
            lorasynci_place_round(plan, round); /* else memory[IMAGE] may still be a version that is served */
        plan->stats.exchange_ns += exchanged - start;
        plan->stats.place_ns += lorasynci_now_ns() - exchanged;
    }
    return LORASYNC_OK;
}

/* The exchange, placing, and what is known only afterwards. A failure that did not cost the communicator is this rank's
   vote. */
LORASYNCI_FN lorasync_status lorasynci_move_all(lorasync_plan *plan, lorasync_error *err)
{
    lorasync_status status;
    if (plan->tensor_digests) memset(plan->tensor_digests, 0, plan->num_image_tensors * sizeof *plan->tensor_digests);
    status = plan->device ? lorasynci_device_move(plan, err) : lorasynci_move(plan, err);
    if (plan->device && plan->direct && plan->sums && status == LORASYNC_OK) lorasynci_share_sums(plan);
    if (status >= 0 || lorasync_is_lost(status)) return status;
    if (plan->begin_error.status == LORASYNC_OK) plan->begin_error = *err;
    return LORASYNC_OK;
}

/* Direct: the vote in the memory that the ranks share, whatever joins them. Two votes of each are kept: who votes on
   the next run has seen all on this one, but others may still look. 1 in *out_all if all are for this run. */
LORASYNCI_FN lorasync_status lorasynci_vote_in_memory(lorasync_plan *plan, int *out_all, lorasync_error *err)
{
    const uint64_t deadline = lorasynci_deadline_ns(plan->timeout_ms), yes = lorasynci_mix(plan->tag) | 1;
    const int      odd = (int)(plan->run % 2), me = plan->comm.rank;
    int            rank;
    __atomic_store_n(lorasynci_word(plan, me, LORASYNCI_VOTE + odd), plan->begin_error.status < 0 ? 0 : yes,
                     __ATOMIC_RELAXED);
    __atomic_store_n(lorasynci_word(plan, me, LORASYNCI_VOTED + odd), plan->run + 1, __ATOMIC_RELEASE);
    *out_all = 1;
    for (rank = 0; rank < plan->comm.world; rank++) {
        lorasync_status status = lorasynci_await_rank(plan, rank, LORASYNCI_VOTED + odd, "finish", deadline, err);
        if (status < 0) { /* who comes later must not take this rank to be for it */
            __atomic_store_n(lorasynci_word(plan, me, LORASYNCI_VOTE + odd), 0, __ATOMIC_RELEASE);
            return status;
        }
        if (__atomic_load_n(lorasynci_word(plan, rank, LORASYNCI_VOTE + odd), __ATOMIC_RELAXED) != yes) *out_all = 0;
    }
    return LORASYNC_OK;
}

/* A run is taken, or given up, by all. If not all are for it, the communicator brings the reason. */
LORASYNCI_FN lorasync_status lorasynci_vote_run(lorasync_plan *plan, lorasync_error *err)
{
    uint64_t        start = lorasynci_now_ns();
    lorasync_status status;
    int             voted = plan->device ? lorasynci_device_voted(plan) : 0, all = 0;
    if (voted > 0) return LORASYNC_OK;
    if (plan->direct && !(plan->device && lorasynci_device_casts(plan))) {
        status = lorasynci_vote_in_memory(plan, &all, err);
        plan->stats.exchange_ns += lorasynci_now_ns() - start;
        if (all || status < 0) return status;
    }
    status = lorasynci_agree_on(plan->id, &plan->comm, plan->votes, plan->timeout_ms, plan->begin_error.status,
                                &plan->begin_error, plan->tag, "version", NULL, err);
    if (status == LORASYNC_OK && voted < 0)
        status = lorasynci_fail(
            err, LORASYNC_E_DISAGREE,
            "what this run exchanged was not all of this plan; every rank must begin the plans of one communicator in "
            "the same order. Nothing was taken, the version can be tried again");
    plan->stats.exchange_ns += lorasynci_now_ns() - start;
    return status;
}

LORASYNC_API lorasync_status lorasync_plan_wait(lorasync_plan *plan, lorasync_error *err)
{
    lorasync_error  why;
    lorasync_status status;
    int             was_begun, unrecorded;
    if (!err) err = &why;
    if (!plan) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "plan is NULL");
    was_begun   = plan->begun;
    plan->begun = 0;
    if (plan->lost) { /* by its begin: that one knows why */
        if (was_begun && lorasync_is_lost(plan->begin_error.status)) *err = plan->begin_error;
        else lorasynci_lost_before(err);
        return err->status;
    }
    unrecorded = was_begun && plan->begin_error.status < 0;
    if (!was_begun && plan->captured) plan->begin_error.status = LORASYNC_OK; /* the graph has begun it */
    else if (!was_begun)
        lorasynci_fail(
            &plan->begin_error, LORASYNC_E_STATE,
            "wait was called without begin; call begin first (a begin that is not captured ends a CUDA graph of the "
            "plan: capture anew)");
    lorasynci_mark_begun(plan);
    if (plan->image) plan->image->has_digest = 0;
    status = lorasynci_move_all(plan, err);
    if (plan->objection && plan->objection->status < 0 && plan->begin_error.status == LORASYNC_OK)
        plan->begin_error = *plan->objection;
    if (status == LORASYNC_OK) status = lorasynci_vote_run(plan, err);
    if (lorasync_is_lost(status)) return lorasynci_plan_lose(plan, status, err);
    if (status == LORASYNC_OK && plan->device && plan->image && plan->has_image &&
        lorasynci_device_image(plan, err) < 0) {
        lorasync_error cuda = *err; /* the others have voted, and go on: only giving up the communicator tells them */
        return lorasynci_plan_lose(plan, lorasynci_fail(err, LORASYNC_E_COMM, "%.500s", cuda.text), err);
    }
    if (status == LORASYNC_OK && plan->has_image && plan->image) lorasynci_finish_image(plan);
    if (plan->device) lorasynci_device_forget(plan);
    if (unrecorded) plan->captured = 0;
    plan->run++;
    return status;
}

LORASYNC_API lorasync_image *lorasync_plan_image(lorasync_plan *plan)
{
    return plan && plan->image && plan->has_image && plan->image->has_digest ? plan->image : NULL;
}

LORASYNC_API void lorasync_plan_get_stats(const lorasync_plan *plan, lorasync_plan_stats *out)
{
    if (!out) return;
    memset(out, 0, sizeof *out);
    if (plan) *out = plan->stats;
}


/* -- the same on the GPU (LORASYNC_CUDA)

   A plan whose pieces are in device memory turns its operations into tables on the device once, and a run into launches
   for each round to pack and to place. Events keep the order without the host:

       caller's stream   --ready-->                  --packed--> goes on: the parameters may change
       plan's stream                pack 0 | pack 1 | ..                               --done--> polled, with a deadline
       wire's stream                       | exchange 0 | exchange 1 | .. | votes | copies to the host |
       placing stream                                   | place 0    | place 1 | ..                    |
                                           ^ after pack 0 ..         ^ exchange r after place r - 2, too: two halves of
                                                                     staging take turns

   Where a rank sends more than a bucket, pack r also waits for exchange r - 2: two halves again. Where streams want the
   same multiprocessors the wire comes first, placing second.
   A meshed reshard has one round: pack 0 is everything, written to this rank's memory and into the others' staging; the
   exchange is the vote, on the GPU, after which the bytes of all are there; place 0 is everything that came. Without
   votes on the GPU the host votes, then places. */

#ifdef LORASYNC_CUDA

/* What a rank says of a run on the GPU: the smallest `tensor << 40 | element` that is not finite (else all ones), and
   the plan's tag, or, of a run that it could not begin, another one. */
typedef struct lorasynci_ballot {
    uint64_t bad, tag;
} lorasynci_ballot;

/* A launch: `num` tiles over a table of operations, both in device memory. */
typedef struct lorasynci_launch {
    lorasyncd_op   *ops;
    lorasyncd_tile *tiles;
    unsigned        num, threads; /* threads: of a block */
} lorasynci_launch;

struct lorasynci_device {
    cudaStream_t      wire, placing;                 /* beside plan->gpu's */
    cudaEvent_t       packed, arrived[2], placed[2]; /* the pairs: of even and of odd rounds */
    cudaEvent_t      *sendable;                      /* per round: it is packed */
    uint32_t          num_events;                    /* of `sendable` that exist */
    uint32_t          num_sent; /* rounds of the run under way whose exchange is enqueued; one more: the ballots' too */
    int               vetoed;   /* the run under way failed in begin, and all that the others count on is enqueued */
    lorasynci_launch *pack;     /* per round, then what travels nowhere */
    lorasynci_launch *place;    /* per round */
    lorasynci_launch  report;   /* what the host needs to see, to where it sees it */
    char             *table;    /* one allocation: all operations, tiles, ballots and sums */
    lorasynci_ballot *ballots;  /* one per rank */
    char             *sums;     /* this rank's digests, behind the ballots; copied to send staging when they travel with
                                  the data */
    size_t            num_sums;
    int               is_reset;    /* own ballot and sums are as a run wants to find them, or will be on `stream` */
    int               is_recorded; /* a graph exists: what its launches leave there is not known here */
    char             *host; /* pinned: | tag to cast | tag that graphs cast | ballots | sums | digests that arrive, link
                               after link | */
    size_t            host_bytes;
    char             *home;       /* where the tables have the image; a multiple of 256 bytes off where it lies in a
                                     run */
    char             *image;      /* device memory of the payload, made here */
    lorasynci_window  peer_image; /* the same, of another rank */
    lorasynci_window *peers;      /* meshed: receive staging, one per rank; closed where nothing is sent */
    char             *host_image; /* pinned copy, unless the image stays on the device */
    int               keep_on_device;
};

/* The GPU and the kernel: what a device plan needs before it knows its pieces. */
LORASYNCI_FN lorasync_status lorasynci_device_open(lorasync_plan *plan, const lorasync_cuda *cuda, lorasync_error *err)
{
    lorasynci_device *g;
    LORASYNCI_TRY(lorasynci_gpu_open(&plan->meter.a, cuda->stream, 1, "desc.cuda", &plan->gpu, err));
    g = (lorasynci_device *)lorasynci_alloc_array(&plan->a, 1, sizeof *g);
    if (!g) return lorasynci_fail_memory(err, sizeof *g);
    plan->device      = g;
    g->keep_on_device = cuda->keep_on_device;
    return lorasynci_gpu_event(&g->packed, err);
}

/* What the rounds of a run need to overlap. */
LORASYNCI_FN lorasync_status lorasynci_device_open_wire(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g     = plan->device;
    int               least = 0, greatest = 0;
    if (!lorasynci_is_pipelined(plan) || plan->num_rounds == 0) return LORASYNC_OK;
    LORASYNCI_CUDA(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    LORASYNCI_CUDA(cudaStreamCreateWithPriority(&g->wire, cudaStreamNonBlocking, greatest),
                   "cudaStreamCreateWithPriority");
    LORASYNCI_CUDA(
        cudaStreamCreateWithPriority(&g->placing, cudaStreamNonBlocking, greatest < least ? greatest + 1 : least),
        "cudaStreamCreateWithPriority");
    LORASYNCI_TRY(lorasynci_gpu_event(&g->arrived[0], err));
    LORASYNCI_TRY(lorasynci_gpu_event(&g->arrived[1], err));
    LORASYNCI_TRY(lorasynci_gpu_event(&g->placed[0], err));
    LORASYNCI_TRY(lorasynci_gpu_event(&g->placed[1], err));
    g->sendable = (cudaEvent_t *)lorasynci_alloc_array(&plan->a, plan->num_rounds, sizeof *g->sendable);
    if (!g->sendable) return lorasynci_fail_memory(err, plan->num_rounds * sizeof *g->sendable);
    for (; g->num_events < plan->num_rounds; g->num_events++)
        LORASYNCI_TRY(lorasynci_gpu_event(&g->sendable[g->num_events], err));
    return LORASYNC_OK;
}

LORASYNCI_FN void lorasynci_device_close_wire(lorasync_plan *plan)
{
    lorasynci_device *g = plan->device;
    while (g->num_events > 0) cudaEventDestroy(g->sendable[--g->num_events]);
    lorasynci_dealloc(&plan->a, g->sendable);
    if (g->arrived[0]) cudaEventDestroy(g->arrived[0]);
    if (g->arrived[1]) cudaEventDestroy(g->arrived[1]);
    if (g->placed[0]) cudaEventDestroy(g->placed[0]);
    if (g->placed[1]) cudaEventDestroy(g->placed[1]);
    if (g->placing) cudaStreamDestroy(g->placing);
    if (g->wire) cudaStreamDestroy(g->wire);
}

#ifndef LORASYNCI_CLOSING_MS /* tests make it small */
#define LORASYNCI_CLOSING_MS                                                                                           \
    5000 /* how long the end of a plan waits for others, and for its own launches when the
                                     communicator is lost */
#endif

LORASYNCI_FN void lorasynci_device_hold(const lorasync_plan *plan, int on)
{
    __atomic_store_n(lorasynci_word(plan, plan->comm.rank, LORASYNCI_HOLDS), on ? lorasynci_process_self() : 0,
                     __ATOMIC_RELEASE);
}

/* Closes another process's image, or others' staging. */
LORASYNCI_FN void lorasynci_device_unmap(lorasync_plan *plan)
{
    lorasynci_device *g = plan->device;
    int               i;
    for (i = 0; g->peers && i < plan->comm.world; i++) lorasynci_window_close(&g->peers[i]);
    lorasynci_dealloc(&plan->a, g->peers);
    g->peers = NULL;
    lorasynci_window_close(&g->peer_image);
    if (plan->lines) lorasynci_device_hold(plan, 0);
}

/* Whether another rank, which lives, may write to memory of this one. */
LORASYNCI_FN int lorasynci_device_is_held(const lorasync_plan *plan)
{
    uint64_t self = *lorasynci_word(plan, plan->comm.rank, LORASYNCI_HOLDS);
    int      rank;
    if (!self) self = lorasynci_process_self();
    for (rank = 0; rank < plan->comm.world; rank++) {
        uint64_t process = __atomic_load_n(lorasynci_word(plan, rank, LORASYNCI_HOLDS), __ATOMIC_ACQUIRE);
        if (rank == plan->comm.rank || !process || lorasynci_process_ended(process, self)) continue;
        if (!lorasynci_is_meshed(plan) || lorasynci_link_rounds(&plan->receives[rank])) return 1;
    }
    return 0;
}

/* Freeing memory that another rank has open is undefined: waits for them to close. 0 if one still has it then. */
LORASYNCI_FN int lorasynci_device_await_holders(lorasync_plan *plan)
{
    uint64_t deadline = lorasynci_deadline_ns(LORASYNCI_CLOSING_MS);
    unsigned turns    = 0;
    if (!plan->device || !plan->lines || !(plan->device->image || lorasynci_is_meshed(plan))) return 1;
    while (lorasynci_device_is_held(plan)) {
        if (lorasynci_now_ns() >= deadline) return 0;
        lorasynci_pause(&turns);
    }
    return 1;
}

LORASYNCI_FN int lorasynci_device_keeps(const lorasynci_device *g) { return g->keep_on_device; }

/* What others still have open stays: better lost than written to when it is somebody else's. */
LORASYNCI_FN void lorasynci_device_free_memory(lorasync_plan *plan)
{
    lorasynci_device *g = plan->device;
    int               ours, mesh = lorasynci_is_meshed(plan), pinned = !mesh && !plan->comm.exchange_stream;
    if (g->wire && !plan->lost) cudaStreamSynchronize(g->wire);
    if (g->placing && !plan->lost) cudaStreamSynchronize(g->placing);
    if (plan->gpu->stream && !plan->lost) cudaStreamSynchronize(plan->gpu->stream);
    lorasynci_device_unmap(plan);
    ours = lorasynci_device_await_holders(plan);
    if (ours) lorasynci_gpu_free(0, g->image);
    lorasynci_gpu_free(0, g->table);
    lorasynci_gpu_free(1, g->host);
    lorasynci_gpu_free(1, g->host_image);
    if (plan->lent) return;
    lorasynci_gpu_free(pinned, plan->memory[LORASYNCI_SEND]);
    if (ours || !mesh) lorasynci_gpu_free(pinned, plan->memory[LORASYNCI_RECEIVE]);
}

LORASYNCI_FN void lorasynci_device_close(lorasync_plan *plan)
{
    lorasynci_device *g = plan->device;
    int               old;
    if (!g) {
        lorasynci_gpu_close(&plan->meter.a, plan->gpu);
        return;
    }
    old = lorasynci_gpu_enter(plan->gpu->ordinal);
    if (!plan->gpu->is_busy) lorasynci_device_free_memory(plan);
    plan->memory[LORASYNCI_SEND] = plan->memory[LORASYNCI_RECEIVE] = NULL;
    lorasynci_device_close_wire(plan);
    if (g->packed) cudaEventDestroy(g->packed);
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
    lorasynci_gpu_close(&plan->meter.a, plan->gpu);
    lorasynci_dealloc(&plan->a, g->pack);
    lorasynci_dealloc(&plan->a, g->place);
    lorasynci_dealloc(&plan->a, g);
    plan->device = NULL;
    (void)cudaGetLastError();
}

/* -- the image that all ranks of a host write to */

/* Makes the image's device memory, and puts into the offer what another process needs to open it. */
LORASYNCI_FN lorasync_status lorasynci_device_make_image(lorasync_plan *plan, lorasynci_device_offer *offer,
                                                         lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    size_t            n = plan->image->payload_bytes, least = offer ? LORASYNCI_OFFER_LEAST : 1;
    LORASYNCI_TRY(lorasynci_gpu_alloc(0, n < least ? least : n, &g->image, "memory for the image", err));
    if (offer) lorasynci_gpu_offer(plan->gpu, g->image, offer);
    return LORASYNC_OK;
}

/* Opens the image that was offered; 1 if this rank can write to it. */
LORASYNCI_FN int lorasynci_device_map(lorasync_plan *plan, const lorasynci_device_offer *offer)
{
    lorasynci_window *w = &plan->device->peer_image;
    if (lorasynci_is_planner(plan)) return 1;
    if (lorasynci_window_device(w, plan->gpu, offer, NULL) == LORASYNC_OK) lorasynci_device_hold(plan, 1);
    return w->address != NULL;
}

/* -- the receive staging that other ranks of a reshard write to */

/* Makes it, and says in this rank's slot how to open it. */
LORASYNCI_FN int lorasynci_device_offer_staging(lorasync_plan *plan, size_t num_bytes)
{
    char **memory = &plan->memory[LORASYNCI_RECEIVE];
    if (!num_bytes) return 1;
    if (num_bytes < LORASYNCI_OFFER_LEAST) num_bytes = LORASYNCI_OFFER_LEAST;
    if (lorasynci_gpu_alloc(0, num_bytes, memory, "", NULL) < 0) return 0;
    lorasynci_gpu_offer(plan->gpu, *memory, lorasynci_mesh_slot(plan, plan->comm.rank));
    return 1;
}

/* Opens that of every rank to which this one sends; 1 if it can write to all of them. */
LORASYNCI_FN int lorasynci_device_map_mesh(lorasync_plan *plan)
{
    lorasynci_device *g = plan->device;
    int               i;
    g->peers = (lorasynci_window *)lorasynci_alloc_array(&plan->a, (size_t)plan->comm.world, sizeof *g->peers);
    lorasynci_device_hold(plan, 1);
    for (i = 0; g->peers && i < plan->comm.world; i++) {
        if (!lorasynci_link_rounds(&plan->sends[i])) continue;
        if (lorasynci_window_device(&g->peers[i], plan->gpu, lorasynci_mesh_slot(plan, i), NULL) < 0) return 0;
    }
    return g->peers != NULL;
}

/* Closes what is open, and frees the staging when nobody has it open any more. */
LORASYNCI_FN void lorasynci_device_leave_mesh(lorasync_plan *plan)
{
    lorasynci_device_unmap(plan);
    if (lorasynci_device_await_holders(plan)) lorasynci_gpu_free(0, plan->memory[LORASYNCI_RECEIVE]);
    plan->memory[LORASYNCI_RECEIVE] = NULL;
}

/* Where a byte of send staging, of which a meshed plan has none, lies at its receiver. */
LORASYNCI_FN uint64_t lorasynci_device_at_peer(const lorasync_plan *plan, uint64_t at)
{
    int i, to = 0;
    for (i = 0; i < plan->comm.world; i++)
        if (lorasynci_link_rounds(&plan->sends[i]) && plan->sends[i].base <= at) to = i;
    return (uint64_t)(uintptr_t)plan->device->peers[to].address + lorasynci_mesh_starts(plan, to)[plan->comm.rank] +
           at - plan->sends[to].base;
}

/* -- tables */

/* Whether every `unit` elements of an op lie in one row, and begin at multiples of `in` and `out` bytes. */
LORASYNCI_FN int lorasynci_in_units(const lorasyncd_op *o, long long unit, long long in, long long out)
{
    long long from = lorasynci_item((lorasync_dtype)o->src_dtype), to = lorasynci_item((lorasync_dtype)o->dst_dtype);
    if (o->s1 != 1 || o->d1 != 1 || (long long)(o->src % 16) % in || (long long)(o->dst % 16) % out) return 0;
    return o->num == o->n1 || (o->n1 % unit == 0 && o->s0 * from % in == 0 && o->d0 * to % out == 0);
}

/* What is digested 8 at a time must not straddle blocks of 256 bytes of its tensor; pairs are not digested. */
LORASYNCI_FN int lorasynci_unit(const lorasyncd_op *o)
{
    long long from = lorasynci_item((lorasync_dtype)o->src_dtype), to = lorasynci_item((lorasync_dtype)o->dst_dtype);
    int       narrows = o->src_dtype == LORASYNC_F32 && (o->dst_dtype == LORASYNC_BF16 || o->dst_dtype == LORASYNC_F16);
    int       copies  = o->src_dtype == o->dst_dtype && o->scale == 1.0f && (from == 2 || o->src_dtype == LORASYNC_F32);
    if ((!narrows && !copies) || o->via) return 1;
    if (lorasynci_in_units(o, 8, 16, 16) && (!o->sum || (o->pos % 8 == 0 && (o->num == o->n1 || o->row % 8 == 0))))
        return 8;
    return !o->sum && o->num % 2 == 0 && lorasynci_in_units(o, 2, 2 * from, 2 * to) ? 2 : 1;
}

LORASYNCI_FN lorasyncd_op lorasynci_device_op_of(const lorasync_plan *plan, const lorasynci_op *op,
                                                 const lorasynci_grid *g, uint64_t sum)
{
    lorasyncd_op o;
    memset(&o, 0, sizeof o);
    o.src = (uint64_t)(uintptr_t)plan->memory[op->src_space] + op->src;
    o.dst = (uint64_t)(uintptr_t)plan->memory[op->dst_space] + op->dst;
    if (lorasynci_is_meshed(plan) && op->dst_space == LORASYNCI_SEND) o.dst = lorasynci_device_at_peer(plan, op->dst);
    o.sum       = op->digest ? sum : 0;
    o.num       = g->n0 * op->n1;
    o.n1        = op->n1;
    o.s0        = g->s0;
    o.s1        = g->s1;
    o.d0        = g->d0;
    o.d1        = g->d1;
    o.pos       = op->pos;
    o.row       = g->row;
    o.tensor    = op->tensor;
    o.scale     = g->scale;
    o.src_dtype = op->src_dtype;
    o.dst_dtype = op->dst_dtype;
    o.via       = op->via;
    o.in_image  = op->dst_space == LORASYNCI_IMAGE;
    o.unit      = (unsigned char)lorasynci_unit(&o);
    return o;
}

/* The slot of a tensor's digest in `sums`: its place among those sent, or in the catalogue. */
LORASYNCI_FN uint64_t lorasynci_device_sum(const lorasync_plan *plan, const uint32_t *slot_of, const lorasynci_op *op)
{
    if (!op->digest) return 0;
    return (uint64_t)(uintptr_t)plan->device->sums + 8 * (uint64_t)(plan->num_slots ? slot_of[op->tensor] : op->tensor);
}

LORASYNCI_FN uint32_t lorasynci_device_packs(const lorasync_plan *plan) { return plan->num_rounds + 1; }

/* The launch of which an operation is part: packs first, then places. What a rank packs for itself has its own, so that
   nobody waits for it; where packing is sending they are one, so that memory is busy while links are. */
LORASYNCI_FN uint32_t lorasynci_device_launch_of(const lorasync_plan *plan, const lorasynci_op *op, int placing)
{
    if (lorasynci_is_meshed(plan)) return placing ? lorasynci_device_packs(plan) : 0;
    return placing                           ? lorasynci_device_packs(plan) + op->round
           : op->dst_space == LORASYNCI_SEND ? op->round
                                             : plan->num_rounds;
}

/* The launch after the last place: the report. */
LORASYNCI_FN uint32_t lorasynci_device_launches(const lorasync_plan *plan)
{
    return lorasynci_device_packs(plan) + plan->num_rounds + 1;
}

LORASYNCI_FN lorasynci_launch *lorasynci_device_launch_at(const lorasync_plan *plan, uint32_t launch)
{
    lorasynci_device *g     = plan->device;
    uint32_t          packs = lorasynci_device_packs(plan);
    if (launch + 1 == lorasynci_device_launches(plan)) return &g->report;
    return launch < packs ? &g->pack[launch] : &g->place[launch - packs];
}

/* An operation and its tiles, of at most `most` elements, behind those of the same launch. */
LORASYNCI_FN void lorasynci_device_put_op(const lorasyncd_op *o, unsigned most, lorasynci_buffer *ops,
                                          lorasynci_buffer *tiles)
{
    lorasyncd_tile tile;
    tile.op = (unsigned)(ops->size / sizeof *o);
    lorasynci_put(ops, o, sizeof *o);
    for (tile.first = 0; tile.first < o->num; tile.first += most) {
        tile.count = o->num - tile.first < most ? (unsigned)(o->num - tile.first) : most;
        lorasynci_put(tiles, &tile, sizeof tile);
    }
}

/* Words as they are. */
LORASYNCI_FN void lorasynci_device_put_words(const void *from, void *to, size_t num, lorasynci_buffer *ops,
                                             lorasynci_buffer *tiles)
{
    lorasyncd_op o;
    if (!num) return;
    memset(&o, 0, sizeof o);
    o.src       = (uint64_t)(uintptr_t)from;
    o.dst       = (uint64_t)(uintptr_t)to;
    o.num       = (long long)num;
    o.n1        = o.num;
    o.s1        = 1;
    o.d1        = 1;
    o.scale     = 1.0f;
    o.src_dtype = LORASYNC_U64;
    o.dst_dtype = LORASYNC_U64;
    o.unit      = (unsigned char)lorasynci_unit(&o);
    lorasynci_device_put_op(&o, LORASYNCD_THREADS, ops, tiles); /* few, and far: one for each thread */
}

/* Ballots and sums, which lie together on both sides, and arrived digests. */
LORASYNCI_FN void lorasynci_device_report(const lorasync_plan *plan, lorasynci_buffer *ops, lorasynci_buffer *tiles)
{
    const lorasynci_device *g  = plan->device;
    char                   *to = g->host + sizeof *g->ballots;
    size_t                  n  = (size_t)plan->comm.world * (sizeof *g->ballots / 8) + g->num_sums;
    int                     i;
    lorasynci_device_put_words(g->ballots, to, n, ops, tiles);
    for (to += n * 8, i = 0; i < plan->comm.world; i++) {
        const lorasynci_link *link = &plan->receives[i];
        if (!link->num_digests) continue;
        lorasynci_device_put_words(plan->memory[LORASYNCI_RECEIVE] + lorasynci_link_staged_digests_at(link), to,
                                   link->num_digests, ops, tiles);
        to += link->num_digests * 8;
    }
}

/* Tables of one launch. */
LORASYNCI_FN void lorasynci_device_tables(const lorasync_plan *plan, uint32_t launch, const uint32_t *slot_of,
                                          lorasynci_buffer *ops, lorasynci_buffer *tiles)
{
    int                  placing = launch >= lorasynci_device_packs(plan);
    const lorasynci_ops *list    = placing ? &plan->place : &plan->pack;
    size_t               i;
    ops->size = tiles->size = 0;
    if (launch + 1 == lorasynci_device_launches(plan)) {
        lorasynci_device_report(plan, ops, tiles);
        return;
    }
    for (i = 0; i < lorasynci_ops_num(list); i++) {
        const lorasynci_op *op = lorasynci_ops_at(list, i);
        lorasyncd_op        o;
        if (lorasynci_device_launch_of(plan, op, placing) != launch) continue;
        o = lorasynci_device_op_of(plan, op, lorasynci_op_grid(list, op), lorasynci_device_sum(plan, slot_of, op));
        lorasynci_device_put_op(&o, LORASYNCD_TILE, ops, tiles);
    }
}

#ifndef LORASYNCI_FULL            /* tests make it small */
#define LORASYNCI_FULL (1u << 18) /* threads: about as many as an H100 runs at once */
#endif

/* How many threads a block has: fewer for small tiles, if there are enough of them to fill the GPU. */
LORASYNCI_FN unsigned lorasynci_device_threads(const lorasyncd_tile *tiles, size_t num_tiles)
{
    uint64_t num_elements = 0;
    unsigned threads      = LORASYNCD_THREADS;
    size_t   i;
    for (i = 0; i < num_tiles; i++) num_elements += tiles[i].count;
    while (threads > 32 && num_elements < (uint64_t)num_tiles * 32 * threads &&
           (uint64_t)num_tiles * threads / 2 >= LORASYNCI_FULL)
        threads /= 2;
    return threads;
}

/* Makes the tables of one launch and copies them to *op_at and *tile_at of the device's table. */
LORASYNCI_FN lorasync_status lorasynci_device_upload_launch(lorasync_plan *plan, uint32_t launch,
                                                            const uint32_t *slot_of, lorasynci_buffer *ops,
                                                            lorasynci_buffer *tiles, size_t *op_at, size_t *tile_at,
                                                            lorasync_error *err)
{
    lorasynci_device *g     = plan->device;
    char             *table = g->table;
    lorasynci_launch *out   = lorasynci_device_launch_at(plan, launch);
    lorasynci_device_tables(plan, launch, slot_of, ops, tiles);
    if (ops->failed || tiles->failed) return lorasynci_fail_memory(err, ops->size);
    if (tiles->size / sizeof(lorasyncd_tile) > 0x7fffffffu)
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED, "more than 2^31 tiles in one launch");
    out->ops     = (lorasyncd_op *)(void *)(table + *op_at);
    out->tiles   = (lorasyncd_tile *)(void *)(table + *tile_at);
    out->num     = (unsigned)(tiles->size / sizeof(lorasyncd_tile));
    out->threads = lorasynci_device_threads((const lorasyncd_tile *)(const void *)tiles->data, out->num);
    if (out->num) LORASYNCI_CUDA(cudaMemcpy(out->ops, ops->data, ops->size, cudaMemcpyDefault), "copying the tables");
    if (out->num)
        LORASYNCI_CUDA(cudaMemcpy(out->tiles, tiles->data, tiles->size, cudaMemcpyDefault), "copying the tables");
    *op_at += ops->size;
    *tile_at += tiles->size;
    return LORASYNC_OK;
}

/* Pinned memory for what comes back each run. */
LORASYNCI_FN lorasync_status lorasynci_device_host(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    int               i;
    g->num_sums   = plan->sums ? (plan->num_slots ? plan->num_slots : plan->catalogue.num) : 0;
    g->host_bytes = (1 + (size_t)plan->comm.world) * sizeof *g->ballots + g->num_sums * 8;
    for (i = 0; i < plan->comm.world; i++) g->host_bytes += plan->receives[i].num_digests * 8;
    LORASYNCI_TRY(lorasynci_gpu_alloc(1, g->host_bytes, &g->host, "pinned memory", err));
    memset(g->host, 0, g->host_bytes);
    if (plan->image && plan->has_image && !g->keep_on_device && !plan->lent) {
        size_t n = plan->image->header_bytes + plan->image->payload_bytes;
        LORASYNCI_TRY(lorasynci_gpu_alloc(1, n, &g->host_image, "pinned memory for the image", err));
    }
    return LORASYNC_OK;
}

/* Nothing found that is not finite, nothing digested. */
LORASYNCI_FN lorasync_status lorasynci_device_reset(const lorasync_plan *plan, lorasync_error *err)
{
    const lorasynci_device *g = plan->device;
    LORASYNCI_CUDA(cudaMemsetAsync(&g->ballots[plan->comm.rank].bad, 0xff, sizeof g->ballots->bad, plan->gpu->stream),
                   "cudaMemsetAsync");
    if (g->num_sums) LORASYNCI_CUDA(cudaMemsetAsync(g->sums, 0, g->num_sums * 8, plan->gpu->stream), "cudaMemsetAsync");
    return LORASYNC_OK;
}

/* All tables into one device allocation: | ops of launch 0 | of 1 | .. || tiles of launch 0 | of 1 | .. || ballots |
   sums | */
LORASYNCI_FN lorasync_status lorasynci_device_upload_all(lorasync_plan *plan, const uint32_t *slot_of,
                                                         lorasynci_buffer *ops, lorasynci_buffer *tiles,
                                                         lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    uint32_t          l, launches = lorasynci_device_launches(plan);
    size_t            op_at = 0, tile_at = 0, ballots_at = 0, sums_at;
    for (l = 0; l < launches; l++) { /* sizes first: the sums' address is part of the operations */
        lorasynci_device_tables(plan, l, slot_of, ops, tiles);
        tile_at += ops->size;
        ballots_at += tiles->size;
    }
    tile_at    = lorasynci_align64(tile_at);
    ballots_at = lorasynci_align64(tile_at + ballots_at);
    sums_at    = ballots_at + (size_t)plan->comm.world * sizeof *g->ballots;
    LORASYNCI_TRY(lorasynci_gpu_alloc(0, sums_at + g->num_sums * 8, &g->table, "memory for the tables", err));
    g->ballots = (lorasynci_ballot *)(void *)(g->table + ballots_at);
    g->sums    = g->table + sums_at;
    LORASYNCI_CUDA(cudaMemset(g->ballots, 0, sums_at - ballots_at), "cudaMemset");
    for (l = 0; l < launches; l++)
        LORASYNCI_TRY(lorasynci_device_upload_launch(plan, l, slot_of, ops, tiles, &op_at, &tile_at, err));
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_device_upload(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    lorasynci_buffer  ops, tiles;
    lorasync_status   status;
    uint32_t         *slot_of = (uint32_t *)lorasynci_alloc_array(&plan->a, plan->catalogue.num, sizeof *slot_of);
    size_t            i;
    g->home  = plan->memory[LORASYNCI_IMAGE];
    g->pack  = (lorasynci_launch *)lorasynci_alloc_array(&plan->a, lorasynci_device_packs(plan), sizeof *g->pack);
    g->place = (lorasynci_launch *)lorasynci_alloc_array(&plan->a, plan->num_rounds, sizeof *g->place);
    if (!slot_of || !g->pack || !g->place) {
        lorasynci_dealloc(&plan->a, slot_of);
        return lorasynci_fail_memory(err, plan->catalogue.num * 4 + plan->num_rounds * 2 * sizeof *g->place);
    }
    for (i = 0; i < plan->num_slots; i++) slot_of[plan->slots[i]] = (uint32_t)i;
    lorasynci_buffer_init(&ops, &plan->a);
    lorasynci_buffer_init(&tiles, &plan->a);
    status = lorasynci_device_host(plan, err);
    if (status == LORASYNC_OK) status = lorasynci_device_upload_all(plan, slot_of, &ops, &tiles, err);
    lorasynci_buffer_free(&ops);
    lorasynci_buffer_free(&tiles);
    lorasynci_dealloc(&plan->a, slot_of);
    return status;
}

/* Staging, image and tables of a device plan. Staging is device memory where the comm takes that, else pinned memory
   that the kernel reads and writes over the bus. */
LORASYNCI_FN lorasync_status lorasynci_device_allocate(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g     = plan->device;
    lorasync_image   *image = plan->image;
    int               space;
    for (space = LORASYNCI_SEND; space <= LORASYNCI_RECEIVE; space++) {
        int pinned = !plan->comm.exchange_stream;
        if (plan->memory[space]) continue; /* of a mesh */
        LORASYNCI_TRY(lorasynci_gpu_alloc(pinned, plan->staging_bytes[space], &plan->memory[space],
                                          pinned ? "pinned memory for staging" : "memory for staging", err));
    }
    if (plan->source)
        LORASYNCI_TRY(lorasynci_gpu_alloc(0, plan->source->payload_bytes ? plan->source->payload_bytes : 1, &g->image,
                                          "memory for the image", err));
    if (image && plan->has_image && !g->image && !g->peer_image.address)
        LORASYNCI_TRY(lorasynci_device_make_image(plan, NULL, err));
    plan->memory[LORASYNCI_IMAGE] = g->image ? g->image : g->peer_image.address;
    LORASYNCI_TRY(lorasynci_device_open_wire(plan, err));
    LORASYNCI_TRY(lorasynci_device_upload(plan, err));
    if (!image || !plan->has_image) return LORASYNC_OK;
    if (g->host_image) {
        lorasynci_image_move_header(image, g->host_image);
        lorasync_image_bind(image, g->host_image + image->header_bytes);
    } else {
        lorasync_image_bind(image, plan->memory[LORASYNCI_IMAGE]);
        image->on_device = 1;
    }
    return LORASYNC_OK;
}

/* The rest of the above for a plan whose memory has been lent. */
LORASYNCI_FN lorasync_status lorasynci_device_lend(lorasync_plan *plan, void *host_payload, lorasync_error *err)
{
    lorasync_image *image = plan->image;
    LORASYNCI_TRY(lorasynci_device_open_wire(plan, err));
    LORASYNCI_TRY(lorasynci_device_upload(plan, err));
    if (!image || !plan->has_image) return LORASYNC_OK;
    image->on_device = plan->device->keep_on_device;
    lorasync_image_bind(image, image->on_device ? plan->memory[LORASYNCI_IMAGE] : (char *)host_payload);
    return LORASYNC_OK;
}

/* -- running */

LORASYNCI_FN lorasync_status lorasynci_device_run(const lorasync_plan *plan, const lorasynci_launch *launch,
                                                  cudaStream_t stream, lorasync_error *err)
{
    const lorasynci_device *g     = plan->device;
    unsigned long long      shift = (unsigned long long)((uintptr_t)plan->memory[LORASYNCI_IMAGE] - (uintptr_t)g->home);
    CUresult                r;
    if (!launch->num) return LORASYNC_OK;
    r = lorasynci_gpu_launch(plan->gpu, launch->ops, launch->tiles, launch->num, launch->threads,
                             &g->ballots[plan->comm.rank].bad, shift, stream);
    if (r == CUDA_SUCCESS) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_CUDA, "CUDA: the copy kernel was not launched (CUresult %d)", (int)r);
}

/* Whether the ranks vote on the GPU. An objection may come up later than that. */
LORASYNCI_FN int lorasynci_device_casts(const lorasync_plan *plan)
{
    return lorasynci_is_pipelined(plan) && plan->num_rounds && plan->comm.all_gather_stream && !plan->objection;
}

/* What all ranks must have in their ballots. A mesh that is captured votes once more than one that is not: all ranks
   capture, or none. */
LORASYNCI_FN uint64_t lorasynci_device_tag(const lorasync_plan *plan)
{
    return (plan->id ^ lorasynci_mix(plan->tag)) + (lorasynci_is_meshed(plan) && plan->captured ? 1 : 0);
}

/* The ballots on the host, as they came from the ranks: behind the two tags. */
LORASYNCI_FN lorasynci_ballot *lorasynci_device_ballots(const lorasynci_device *g)
{
    return (lorasynci_ballot *)(void *)g->host + 1;
}

/* Brings the tag of this rank's ballot to the GPU; what a graph brings is read at each launch. */
LORASYNCI_FN lorasync_status lorasynci_device_fill_tag(const lorasync_plan *plan, uint64_t tag, int recorded,
                                                       cudaStream_t stream, lorasync_error *err)
{
    lorasynci_device *g    = plan->device;
    uint64_t         *from = (uint64_t *)(void *)g->host + recorded;
    *from                  = tag;
    LORASYNCI_CUDA(cudaMemcpyAsync(&g->ballots[plan->comm.rank].tag, from, sizeof tag, cudaMemcpyDefault, stream),
                   "copying the ballot");
    return LORASYNC_OK;
}

/* Every rank gets every rank's, behind the last exchange. */
LORASYNCI_FN lorasync_status lorasynci_device_cast(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    LORASYNCI_TRY(plan->comm.all_gather_stream(plan->comm.user, &g->ballots[plan->comm.rank], g->ballots,
                                               sizeof *g->ballots, g->wire, plan->timeout_ms, err));
    g->num_sent = plan->num_rounds + 1;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_device_fetch_image(lorasync_plan *plan, lorasync_error *err)
{
    if (plan->has_image && !plan->image->on_device && plan->image->payload_bytes)
        LORASYNCI_CUDA(cudaMemcpyAsync((char *)(uintptr_t)plan->image->payload, plan->memory[LORASYNCI_IMAGE],
                                       plan->image->payload_bytes, cudaMemcpyDefault, plan->gpu->stream),
                       "copying the image to the host");
    return LORASYNC_OK;
}

/* In a mesh the bytes are where they go when all ranks have packed: the votes say that. */
LORASYNCI_FN lorasync_status lorasynci_device_exchange(lorasync_plan *plan, uint32_t round, lorasync_error *err)
{
    size_t num_sends, num_receives;
    if (lorasynci_is_meshed(plan)) return lorasynci_device_cast(plan, err);
    lorasynci_round_messages(plan, round, &num_sends, &num_receives);
    LORASYNCI_TRY(plan->comm.exchange_stream(plan->comm.user, plan->messages, num_sends,
                                             plan->messages + plan->comm.world, num_receives, plan->device->wire,
                                             plan->timeout_ms, err));
    plan->device->num_sent = round + 1;
    return LORASYNC_OK;
}

/* The exchange of a round, as soon as it is packed, and its placing. */
LORASYNCI_FN lorasync_status lorasynci_device_round(lorasync_plan *plan, uint32_t round, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    LORASYNCI_CUDA(cudaStreamWaitEvent(g->wire, g->sendable[round], 0), "cudaStreamWaitEvent");
    if (round >= 2) LORASYNCI_CUDA(cudaStreamWaitEvent(g->wire, g->placed[round % 2], 0), "cudaStreamWaitEvent");
    LORASYNCI_TRY(lorasynci_device_exchange(plan, round, err));
    LORASYNCI_CUDA(cudaEventRecord(g->arrived[round % 2], g->wire), "cudaEventRecord");
    LORASYNCI_CUDA(cudaStreamWaitEvent(g->placing, g->arrived[round % 2], 0), "cudaStreamWaitEvent");
    LORASYNCI_TRY(lorasynci_device_run(plan, &g->place[round], g->placing, err));
    LORASYNCI_CUDA(cudaEventRecord(g->placed[round % 2], g->placing), "cudaEventRecord");
    return LORASYNC_OK;
}

/* Whether what this rank sends is packed into two halves in turns: then a round must have left before the next but one
   is packed. */
LORASYNCI_FN int lorasynci_device_takes_turns(const lorasync_plan *plan)
{
    int i;
    for (i = 0; i < plan->comm.world; i++)
        if (plan->sends[i].half) return 1;
    return 0;
}

/* The digests to where they travel, behind the last round of their link. */
LORASYNCI_FN lorasync_status lorasynci_device_add_digests(const lorasync_plan *plan, uint32_t round,
                                                          lorasync_error *err)
{
    const lorasynci_device *g = plan->device;
    int                     i;
    for (i = 0; i < plan->comm.world; i++) {
        const lorasynci_link *link = &plan->sends[i];
        if (!link->num_digests || lorasynci_link_rounds(link) != round + 1) continue;
        LORASYNCI_CUDA(cudaMemcpyAsync(plan->memory[LORASYNCI_SEND] + lorasynci_link_staged_digests_at(link), g->sums,
                                       link->num_digests * 8, cudaMemcpyDefault, plan->gpu->stream),
                       "copying digests");
    }
    return LORASYNC_OK;
}

/* All packs, each followed by the event that lets its round travel. The first round is sent at once: it travels while
   the rest is packed. What a rank packs for itself comes when nothing more can be sent: after the last round, or where
   the next one waits for its half. */
LORASYNCI_FN lorasync_status lorasynci_device_pack(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g     = plan->device;
    int               turns = lorasynci_device_takes_turns(plan);
    uint32_t          i, idle = turns ? 2 : plan->num_rounds;
    for (i = 0; i <= plan->num_rounds; i++) {
        if (i == idle) LORASYNCI_TRY(lorasynci_device_run(plan, &g->pack[plan->num_rounds], plan->gpu->stream, err));
        if (i == plan->num_rounds) break;
        if (turns && i >= 2)
            LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->stream, g->arrived[i % 2], 0), "cudaStreamWaitEvent");
        LORASYNCI_TRY(lorasynci_device_run(plan, &g->pack[i], plan->gpu->stream, err));
        LORASYNCI_TRY(lorasynci_device_add_digests(plan, i, err));
        if (i < g->num_events) LORASYNCI_CUDA(cudaEventRecord(g->sendable[i], plan->gpu->stream), "cudaEventRecord");
        if (g->num_events && (turns || i == 0)) LORASYNCI_TRY(lorasynci_device_round(plan, i, err));
    }
    LORASYNCI_CUDA(cudaEventRecord(g->packed, plan->gpu->stream), "cudaEventRecord");
    return LORASYNC_OK;
}

/* The other rounds: the whole run needs no host. Digests that arrive with a link are fetched at the end: nothing
   overwrites the last round of a link. That, and the vote, need not wait for the last placing. Launches of a captured
   mesh do not wait for its readers on the host: a second vote, after placing, keeps the next one out of their
   staging. */
LORASYNCI_FN lorasync_status lorasynci_device_rounds(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g    = plan->device;
    uint32_t          last = plan->num_rounds - 1;
    while (g->num_sent < plan->num_rounds) LORASYNCI_TRY(lorasynci_device_round(plan, g->num_sent, err));
    LORASYNCI_CUDA(cudaStreamWaitEvent(g->wire, g->packed, 0), "cudaStreamWaitEvent");
    if (lorasynci_is_meshed(plan) && plan->captured)
        LORASYNCI_CUDA(cudaStreamWaitEvent(g->wire, g->placed[0], 0), "cudaStreamWaitEvent");
    if (lorasynci_device_casts(plan) && (!lorasynci_is_meshed(plan) || plan->captured))
        LORASYNCI_TRY(lorasynci_device_cast(plan, err));
    LORASYNCI_TRY(lorasynci_device_run(plan, &g->report, g->wire, err));
    LORASYNCI_CUDA(cudaEventRecord(g->arrived[0], g->wire), "cudaEventRecord");
    LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->stream, g->arrived[0], 0), "cudaStreamWaitEvent");
    LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->stream, g->placed[last % 2], 0), "cudaStreamWaitEvent");
    return LORASYNC_OK;
}

/* What cannot be recorded in a graph is refused before anything is enqueued. */
LORASYNCI_FN lorasync_status lorasynci_device_capture(lorasync_plan *plan, lorasync_error *err)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    struct cudaPointerAttributes memory;
    LORASYNCI_CUDA(cudaStreamIsCapturing(plan->gpu->caller, &capture), "cudaStreamIsCapturing");
    plan->captured = capture == cudaStreamCaptureStatusActive;
    if (!plan->captured) return LORASYNC_OK;
    plan->device->is_recorded = 1;
    plan->device->is_reset    = 0;
    if (!plan->comm.exchange_stream && plan->num_rounds)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "a sync whose ranks exchange through the host cannot be captured in a CUDA graph; join them with NCCL, or "
            "gather by direct placement");
    if (!plan->source || !plan->source->payload_bytes) return LORASYNC_OK;
    memset(&memory, 0, sizeof memory);
    LORASYNCI_CUDA(cudaPointerGetAttributes(&memory, plan->source->payload), "cudaPointerGetAttributes");
    if (memory.type == cudaMemoryTypeUnregistered)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "a scatter from pageable memory cannot be captured in a CUDA graph; put the image into pinned or device "
            "memory");
    return LORASYNC_OK;
}

/* Where a run begins: own ballot and sums are mostly as the run before left them (lorasynci_device_end), so that
   packing starts at once. The tag is there long before the vote. */
LORASYNCI_FN lorasync_status lorasynci_device_prepare(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    if (!g->is_reset) LORASYNCI_TRY(lorasynci_device_reset(plan, err));
    g->is_reset = 0;
    if (!lorasynci_device_casts(plan) && !plan->captured) return LORASYNC_OK;
    return lorasynci_device_fill_tag(plan, lorasynci_device_tag(plan), plan->captured,
                                     plan->captured ? plan->gpu->stream : g->wire, err);
}

/* Where it ends, on the GPU; `reported`: the host has been told all. Behind that, while nobody waits, the next one is
   prepared. Launches of a graph prepare for themselves. */
LORASYNCI_FN lorasync_status lorasynci_device_end(lorasync_plan *plan, int reported, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    LORASYNCI_CUDA(cudaEventRecord(plan->gpu->done, plan->gpu->stream), "cudaEventRecord");
    if (!reported || g->is_recorded) return LORASYNC_OK;
    LORASYNCI_TRY(lorasynci_device_reset(plan, err));
    g->is_reset = 1;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_device_enqueue(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    LORASYNCI_TRY(lorasynci_device_capture(plan, err));
    if (!plan->captured || lorasynci_is_meshed(plan)) LORASYNCI_TRY(lorasynci_await_readers(plan, err));
    LORASYNCI_CUDA(cudaEventRecord(plan->gpu->ready, plan->gpu->caller), "cudaEventRecord");
    LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->stream, plan->gpu->ready, 0), "cudaStreamWaitEvent");
    LORASYNCI_TRY(lorasynci_device_prepare(plan, err));
    if (plan->source && plan->source->payload_bytes)
        LORASYNCI_CUDA(cudaMemcpyAsync(g->image, plan->source->payload, plan->source->payload_bytes, cudaMemcpyDefault,
                                       plan->gpu->stream),
                       "copying the image to the GPU");
    LORASYNCI_TRY(lorasynci_device_pack(plan, err));
    if (!plan->captured) LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->caller, g->packed, 0), "cudaStreamWaitEvent");
    if (plan->num_rounds == 0) LORASYNCI_TRY(lorasynci_device_run(plan, &g->report, plan->gpu->stream, err));
    else if (plan->comm.exchange_stream) LORASYNCI_TRY(lorasynci_device_rounds(plan, err));
    LORASYNCI_TRY(lorasynci_device_end(plan, plan->num_rounds == 0 || plan->comm.exchange_stream, err));
    if (plan->captured)
        LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->caller, plan->gpu->done, 0), "cudaStreamWaitEvent");
    return LORASYNC_OK;
}

/* What a run that failed here has not enqueued: the others have, and count on it before they vote. What travels is not
   used. */
LORASYNCI_FN lorasync_status lorasynci_device_enqueue_rest(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g    = plan->device;
    int               late = g->num_sent > plan->num_rounds; /* its ballot, which says yes, is on its way */
    while (g->num_sent < plan->num_rounds && !lorasynci_is_meshed(plan))
        LORASYNCI_TRY(lorasynci_device_exchange(plan, g->num_sent, err));
    if (lorasynci_device_casts(plan) && !late) {
        LORASYNCI_CUDA(cudaEventRecord(g->packed, plan->gpu->stream), "cudaEventRecord"); /* a ballot that is on its way
                                                                                     first */
        LORASYNCI_CUDA(cudaStreamWaitEvent(g->wire, g->packed, 0), "cudaStreamWaitEvent");
        LORASYNCI_TRY(lorasynci_device_fill_tag(plan, ~lorasynci_device_tag(plan), 0, g->wire, err));
        LORASYNCI_TRY(lorasynci_device_cast(plan, err));
        if (lorasynci_is_meshed(plan) && plan->captured) LORASYNCI_TRY(lorasynci_device_cast(plan, err));
    }
    LORASYNCI_CUDA(cudaEventRecord(g->arrived[0], g->wire), "cudaEventRecord");
    g->vetoed = !late;
    return LORASYNC_OK;
}

/* The same at once where begin fails: the calls of one communicator are in the order of the begins on all ranks. If
   this fails, too, wait sees to it. */
LORASYNCI_FN void lorasynci_device_veto(lorasync_plan *plan)
{
    lorasync_error unused;
    int            old;
    if (!plan->device || !lorasynci_is_pipelined(plan) || !plan->num_rounds || plan->captured) return;
    old = lorasynci_gpu_enter(plan->gpu->ordinal);
    lorasynci_device_enqueue_rest(plan, &unused);
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
}

LORASYNCI_FN lorasync_status lorasynci_device_begin(lorasync_plan *plan, lorasync_error *err)
{
    int             old;
    lorasync_status status;
    old    = lorasynci_gpu_enter(plan->gpu->ordinal);
    status = lorasynci_device_enqueue(plan, err);
    if (plan->captured) plan->device->num_sent = 0; /* recorded is not sent */
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
    if (status < 0 && !lorasync_is_lost(status)) lorasynci_device_veto(plan);
    return status;
}

/* Waits for an event of a run, and minds the communicator while others take part. */
LORASYNCI_FN lorasync_status lorasynci_device_poll(const lorasync_plan *plan, cudaEvent_t event, uint64_t deadline_ns,
                                                   int with_peers, lorasync_error *err)
{
    lorasync_status (*check)(void *, lorasync_error *) = with_peers ? plan->comm.check : NULL;
    cudaError_t e;
    LORASYNCI_TRY(lorasynci_gpu_wait(event, NULL, deadline_ns, check, plan->comm.user, &e, err));
    if (e == cudaErrorNotReady)
        return lorasynci_fail(
            err, LORASYNC_E_TIMEOUT,
            "the GPU work of this sync did not end before the deadline of %d ms; did every rank call lorasync_sync?",
            plan->timeout_ms);
    return e == cudaSuccess ? LORASYNC_OK : lorasynci_cuda_fail(err, e, "the GPU work of this sync failed");
}

/* Direct, and the image stays on the device: others write to it as soon as this rank has begun. What the caller has
   enqueued to read it ends first. */
LORASYNCI_FN lorasync_status lorasynci_device_await_caller(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    lorasync_status   status;
    int               old;
    if (!plan->direct || !plan->run || !plan->has_image || !plan->image->on_device ||
        plan->memory[LORASYNCI_IMAGE] != g->home)
        return LORASYNC_OK;
    if (lorasynci_gpu_is_captured(plan->gpu) || cudaStreamQuery(plan->gpu->caller) == cudaSuccess) return LORASYNC_OK;
    old    = lorasynci_gpu_enter(plan->gpu->ordinal);
    status = cudaEventRecord(plan->gpu->ready, plan->gpu->caller) == cudaSuccess
                 ? LORASYNC_OK
                 : lorasynci_cuda_fail(err, cudaPeekAtLastError(), "cudaEventRecord");
    if (status == LORASYNC_OK)
        status = lorasynci_device_poll(plan, plan->gpu->ready, lorasynci_deadline_ns(plan->timeout_ms), 1, err);
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
    return status;
}

/* Places what a round brought. */
LORASYNCI_FN lorasync_status lorasynci_device_place(lorasync_plan *plan, uint32_t round, uint64_t deadline_ns,
                                                    lorasync_error *err)
{
    lorasynci_device *g = plan->device;
    LORASYNCI_TRY(lorasynci_device_run(plan, &g->place[round], plan->gpu->stream, err));
    LORASYNCI_CUDA(cudaEventRecord(plan->gpu->done, plan->gpu->stream), "cudaEventRecord");
    return lorasynci_device_poll(plan, plan->gpu->done, deadline_ns, 1, err);
}

/* A comm that exchanges host memory only: exchange and place in turns. The others count on every exchange, so a failure
   here (`status`, or one on the way) does not end them. */
LORASYNCI_FN lorasync_status lorasynci_device_host_rounds(lorasync_plan *plan, lorasync_status status,
                                                          uint64_t deadline_ns, lorasync_error *err)
{
    lorasynci_device *g    = plan->device;
    const int         mesh = lorasynci_is_meshed(plan);
    lorasync_error    lost;
    lorasync_status   arrived;
    uint32_t          round;
    for (round = 0; round < plan->num_rounds; round++) {
        arrived = mesh ? lorasynci_agree_on(plan->id, &plan->comm, plan->votes, plan->timeout_ms, status, err, 0, "",
                                            NULL, &lost)
                       : lorasynci_exchange_round(plan, round, &lost);
        if (arrived < 0 && (!mesh || lorasync_is_lost(arrived))) {
            *err = lost;
            return lost.status;
        }
        if (status == LORASYNC_OK && arrived == LORASYNC_E_DISAGREE) { /* nobody failed, and yet it is not this run */
            *err   = lost;
            status = lost.status;
        }
        if (status == LORASYNC_OK && arrived == LORASYNC_OK)
            status = lorasynci_device_place(plan, round, deadline_ns, err);
    }
    LORASYNCI_TRY(status);
    LORASYNCI_TRY(lorasynci_device_run(plan, &g->report, plan->gpu->stream, err));
    LORASYNCI_TRY(lorasynci_device_end(plan, 1, err));
    return lorasynci_device_poll(plan, plan->gpu->done, deadline_ns, 1, err);
}

/* Whether a tensor changes its dtype on the way. */
LORASYNCI_FN int lorasynci_is_rounded(const lorasync_plan *plan, uint32_t tensor)
{
    size_t i;
    for (i = 0; i < lorasynci_ops_num(&plan->pack); i++) {
        const lorasynci_op *op = lorasynci_ops_at(&plan->pack, i);
        if (op->tensor == tensor) return op->src_dtype != op->dst_dtype;
    }
    return 0;
}

/* Sums and the NaN check from pinned memory to where the host's run keeps them. */
LORASYNCI_FN void lorasynci_device_results(lorasync_plan *plan)
{
    const lorasynci_device *g   = plan->device;
    const uint64_t          bad = lorasynci_device_ballots(g)[plan->comm.rank].bad;
    uint64_t                sum;
    size_t                  i, k, at = (1 + (size_t)plan->comm.world) * sizeof *g->ballots;
    for (i = 0; i < g->num_sums; i++, at += 8)
        memcpy(&plan->sums[plan->num_slots ? plan->slots[i] : i], g->host + at, 8);
    for (i = 0; i < (size_t)plan->comm.world; i++)
        for (k = 0; k < plan->receives[i].num_digests; k++, at += 8) {
            memcpy(&sum, g->host + at, 8);
            plan->tensor_digests[plan->receives[i].digests[k]] += sum;
        }
    if (bad != UINT64_MAX && !plan->allow_nan && plan->begin_error.status == LORASYNC_OK) {
        uint32_t tensor = (uint32_t)(bad >> 40);
        lorasynci_nan_error(plan, tensor, (int64_t)(bad & ((UINT64_C(1) << 40) - 1)),
                            lorasynci_is_rounded(plan, tensor), &plan->begin_error);
    }
}

/* A failure that the ballots cannot tell the others any more: only giving up the communicator does. */
LORASYNCI_FN lorasync_status lorasynci_device_give_up(const lorasync_plan *plan, lorasync_error *err)
{
    lorasync_error why = *err;
    if (lorasync_is_lost(why.status) || !lorasynci_device_casts(plan)) return why.status;
    return lorasynci_fail(err, LORASYNC_E_COMM,
                          "%.400s; the communicator is given up: close, make a new one, open again", why.text);
}

/* The same, to its end. */
LORASYNCI_FN lorasync_status lorasynci_device_send_rest(lorasync_plan *plan, uint64_t deadline_ns, lorasync_error *err)
{
    lorasync_status status = err->status;
    if (!lorasynci_is_pipelined(plan) || plan->num_rounds == 0) return LORASYNC_OK;
    if (plan->device->vetoed) status = LORASYNC_OK;
    else if (plan->device->num_sent <= plan->num_rounds) status = lorasynci_device_enqueue_rest(plan, err);
    if (status == LORASYNC_OK) status = lorasynci_device_poll(plan, plan->device->arrived[0], deadline_ns, 1, err);
    return status == LORASYNC_OK ? status : lorasynci_device_give_up(plan, err);
}

LORASYNCI_FN lorasync_status lorasynci_device_finish(lorasync_plan *plan, lorasync_error *err)
{
    lorasynci_device *g        = plan->device;
    uint64_t          deadline = lorasynci_deadline_ns(plan->timeout_ms);
    int               by_host  = !plan->comm.exchange_stream && plan->num_rounds;
    lorasync_status   status   = LORASYNC_OK;
    if (plan->begin_error.status < 0) { /* the vote tells the others */
        *err = plan->begin_error;
        return by_host ? lorasynci_device_host_rounds(plan, err->status, deadline, err)
                       : lorasynci_device_send_rest(plan, deadline, err);
    }
    if (plan->captured && cudaEventRecord(plan->gpu->done, plan->gpu->caller) != cudaSuccess)
        status = lorasynci_cuda_fail(err, cudaPeekAtLastError(), "cudaEventRecord");
    if (status == LORASYNC_OK) status = lorasynci_device_poll(plan, plan->gpu->done, deadline, 1, err);
    if (status == LORASYNC_OK && plan->captured &&
        lorasynci_device_ballots(g)[plan->comm.rank].tag != lorasynci_device_tag(plan)) {
        lorasynci_fail(
            err, LORASYNC_E_STATE,
            "wait was called, but the CUDA graph into which begin was captured was not launched since the last one; "
            "launch it first");
        return lorasynci_device_send_rest(plan, deadline, err) < 0 ? err->status : LORASYNC_E_STATE;
    }
    if (by_host && !lorasync_is_lost(status)) status = lorasynci_device_host_rounds(plan, status, deadline, err);
    if (status < 0) return lorasynci_device_give_up(plan, err);
    lorasynci_device_results(plan);
    return LORASYNC_OK;
}

/* Behind a run: what it reported is no other run's. */
LORASYNCI_FN void lorasynci_device_forget(lorasync_plan *plan)
{
    int i;
    for (i = 0; plan->device->host && i < plan->comm.world; i++) lorasynci_device_ballots(plan->device)[i].tag = 0;
}

/* Whether all that is on a stream has ended, well or not, by then. */
LORASYNCI_FN int lorasynci_device_ended(cudaStream_t stream, uint64_t deadline_ns)
{
    cudaError_t e;
    lorasynci_gpu_wait(NULL, stream, deadline_ns, NULL, NULL, &e, NULL);
    return e != cudaErrorNotReady;
}

/* The last of what a run that was begun, or a graph that may have been launched, has enqueued. 0 if others were
   promised what never was. */
LORASYNCI_FN int lorasynci_device_last(lorasync_plan *plan, cudaEvent_t *out)
{
    lorasynci_device *g = plan->device;
    *out                = plan->gpu->done;
    if (plan->begun && plan->begin_error.status < 0) {
        *out = g->vetoed ? g->arrived[0] : NULL;
        return g->vetoed || !lorasynci_is_pipelined(plan) || !plan->num_rounds;
    }
    if (plan->captured && cudaEventRecord(plan->gpu->done, plan->gpu->caller) != cudaSuccess) *out = NULL;
    return 1;
}

/* Before a plan is freed whose run was begun and not waited for: its work ends, or its communicator is given up, so
   that nothing waits for it for ever. When it is lost its launches end soon, or what they use is lost, too: see
   lorasynci_device_free_memory. */
LORASYNCI_FN void lorasynci_device_settle(lorasync_plan *plan)
{
    lorasynci_device *g = plan ? plan->device : NULL;
    lorasync_error    err;
    lorasync_status   status = LORASYNC_OK;
    cudaEvent_t       last;
    uint64_t          closing;
    int               old;
    if (!g || lorasynci_gpu_is_captured(plan->gpu) || !(plan->begun || plan->captured || plan->lost)) return;
    old = lorasynci_gpu_enter(plan->gpu->ordinal);
    if (!plan->lost && !lorasynci_device_last(plan, &last))
        status = lorasynci_fail(&err, LORASYNC_E_COMM, "a plan was freed between a begin that failed and its wait");
    else if (!plan->lost && last)
        status = lorasynci_device_poll(plan, last, lorasynci_deadline_ns(plan->timeout_ms), 1, &err);
    if (status < 0) lorasynci_plan_lose(plan, lorasync_is_lost(status) ? status : LORASYNC_E_COMM, &err);
    closing = lorasynci_deadline_ns(LORASYNCI_CLOSING_MS);
    if (plan->lost)
        plan->gpu->is_busy =
            !(lorasynci_device_ended(plan->gpu->stream, closing) && lorasynci_device_ended(g->wire, closing) &&
              lorasynci_device_ended(g->placing, closing) &&
              (!plan->captured || lorasynci_device_ended(plan->gpu->caller, closing)));
    (void)cudaGetLastError();
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
}

/* All rounds of a device plan, for this rank: the second half of a run. */
LORASYNCI_FN lorasync_status lorasynci_device_move(lorasync_plan *plan, lorasync_error *err)
{
    uint64_t        start = lorasynci_now_ns();
    int             old;
    lorasync_status status;
    old                    = lorasynci_gpu_enter(plan->gpu->ordinal);
    status                 = lorasynci_device_finish(plan, err);
    plan->device->num_sent = 0;
    plan->device->vetoed   = 0;
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
    plan->stats.exchange_ns = lorasynci_now_ns() - start;
    plan->stats.place_ns    = 0;
    return status;
}

/* 1 if every rank has voted for this run on the GPU, -1 if one has not: all know it, and ask for the reason over the
   host; 0 if there was no vote. */
LORASYNCI_FN int lorasynci_device_voted(const lorasync_plan *plan)
{
    const lorasynci_ballot *ballots;
    int                     i;
    if (!lorasynci_device_casts(plan) || plan->begin_error.status < 0) return 0;
    ballots = lorasynci_device_ballots(plan->device);
    for (i = 0; i < plan->comm.world; i++)
        if (ballots[i].tag != lorasynci_device_tag(plan) || (ballots[i].bad != UINT64_MAX && !plan->allow_nan))
            return -1;
    return 1;
}

/* After all ranks have voted: the complete image to the host, where it is wanted there. */
LORASYNCI_FN lorasync_status lorasynci_device_image(lorasync_plan *plan, lorasync_error *err)
{
    int             old;
    lorasync_status status;
    if (plan->image->on_device) return LORASYNC_OK;
    old    = lorasynci_gpu_enter(plan->gpu->ordinal);
    status = lorasynci_device_fetch_image(plan, err);
    if (status == LORASYNC_OK && cudaEventRecord(plan->gpu->done, plan->gpu->stream) != cudaSuccess)
        status = lorasynci_cuda_fail(err, cudaPeekAtLastError(), "cudaEventRecord");
    if (status == LORASYNC_OK)
        status = lorasynci_device_poll(plan, plan->gpu->done, lorasynci_deadline_ns(plan->timeout_ms), 0, err);
    lorasynci_gpu_leave(plan->gpu->ordinal, old);
    return status;
}

#else /* without CUDA: a desc that asks for it is refused, and no plan has a device */

LORASYNCI_FN lorasync_status lorasynci_device_open(lorasync_plan *plan, const lorasync_cuda *cuda, lorasync_error *err)
{
    return lorasynci_gpu_open(&plan->a, cuda->stream, 1, "desc.cuda", &plan->gpu, err);
}

LORASYNCI_FN void            lorasynci_device_close(lorasync_plan *plan) { (void)plan; }
LORASYNCI_FN int             lorasynci_device_await_holders(lorasync_plan *plan) { return !plan->device; }
LORASYNCI_FN void            lorasynci_device_settle(lorasync_plan *plan) { (void)plan; }
LORASYNCI_FN void            lorasynci_device_forget(lorasync_plan *plan) { (void)plan; }
LORASYNCI_FN void            lorasynci_device_veto(lorasync_plan *plan) { (void)plan; }
LORASYNCI_FN int             lorasynci_device_casts(const lorasync_plan *plan) { return plan->device != NULL; }
LORASYNCI_FN lorasync_status lorasynci_device_await_caller(lorasync_plan *plan, lorasync_error *err)
{
    (void)plan, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN int             lorasynci_device_keeps(const lorasynci_device *g) { return g != NULL; }
LORASYNCI_FN lorasync_status lorasynci_device_make_image(lorasync_plan *plan, lorasynci_device_offer *offer,
                                                         lorasync_error *err)
{
    (void)plan, (void)offer, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN int lorasynci_device_map(lorasync_plan *plan, const lorasynci_device_offer *offer)
{
    (void)plan, (void)offer;
    return 0;
}
LORASYNCI_FN void lorasynci_device_unmap(lorasync_plan *plan) { (void)plan; }
LORASYNCI_FN int  lorasynci_device_offer_staging(lorasync_plan *plan, size_t num_bytes)
{
    return plan->device && num_bytes;
}
LORASYNCI_FN int             lorasynci_device_map_mesh(lorasync_plan *plan) { return plan->device != NULL; }
LORASYNCI_FN void            lorasynci_device_leave_mesh(lorasync_plan *plan) { (void)plan; }
LORASYNCI_FN lorasync_status lorasynci_device_allocate(lorasync_plan *plan, lorasync_error *err)
{
    (void)plan, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_device_lend(lorasync_plan *plan, void *host_payload, lorasync_error *err)
{
    (void)plan, (void)host_payload, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_device_begin(lorasync_plan *plan, lorasync_error *err)
{
    (void)plan, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_device_move(lorasync_plan *plan, lorasync_error *err)
{
    (void)plan, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN int lorasynci_device_voted(const lorasync_plan *plan)
{
    (void)plan;
    return 0;
}

LORASYNCI_FN lorasync_status lorasynci_device_image(lorasync_plan *plan, lorasync_error *err)
{
    (void)plan, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}

#endif


/* ------------------------------------------------------------------------------------------------------ >>config -- */

/* adapter_config.json: reads it, answers rank and scale of a module, checks it against an adapter's tensors and writes
   one for them. Uses >>support, >>json and >>names. */

/* -- lists of strings */

/*     at   [ * | * | * ]
              v   v   v
       text [ q_proj \0 v_proj \0 ... ]      one block */
typedef struct lorasynci_list {
    const char **at;
    size_t       num;
    char        *text;
} lorasynci_list;

LORASYNCI_FN void lorasynci_list_free(lorasynci_list *l, const lorasync_allocator *a)
{
    lorasynci_dealloc(a, l->at);
    lorasynci_dealloc(a, l->text);
    memset(l, 0, sizeof *l);
}

LORASYNCI_FN const char *lorasynci_list_key(const void *user, size_t index)
{
    return ((const lorasynci_list *)user)->at[index];
}

/* A string, or an integer as its text. */
LORASYNCI_FN lorasync_status lorasynci_list_entry(lorasynci_json *j, int integers, lorasynci_slice *out)
{
    if (!integers) return lorasynci_json_string(j, out);
    LORASYNCI_TRY(lorasynci_json_number(j, out));
    return out->real ? lorasynci_json_fail(j, out->at, "expected an integer") : LORASYNC_OK;
}

/* Counts the items of a list, and the bytes of their text with a NUL each, without moving j. */
LORASYNCI_FN lorasync_status lorasynci_list_count(const lorasynci_json *j, int integers, size_t *num, size_t *num_bytes)
{
    lorasynci_json  ahead = *j;
    lorasynci_slice item;
    int             more;
    *num = *num_bytes = 0;
    LORASYNCI_TRY(lorasynci_json_array(&ahead));
    while ((more = lorasynci_json_element(&ahead)) > 0) {
        LORASYNCI_TRY(lorasynci_list_entry(&ahead, integers, &item));
        (*num)++;
        *num_bytes += item.size + 1; /* both are in the text, the sum fits */
    }
    return (lorasync_status)more;
}

/* Reads an array of strings, or of integers. Free with lorasynci_list_free, also after a failure. */
LORASYNCI_FN lorasync_status lorasynci_list_read(lorasynci_json *j, int integers, const lorasync_allocator *a,
                                                 lorasynci_list *out)
{
    lorasynci_slice item;
    size_t          num, num_bytes;
    char           *to;
    LORASYNCI_TRY(lorasynci_list_count(j, integers, &num, &num_bytes));
    out->at   = (const char **)lorasynci_alloc_array(a, num, sizeof *out->at);
    out->text = (char *)lorasynci_alloc(a, num_bytes);
    if (!out->at || !out->text) return lorasynci_fail_memory(j->err, num_bytes + num * sizeof *out->at);
    to = out->text;
    LORASYNCI_TRY(lorasynci_json_array(j));
    while (lorasynci_json_element(j) > 0) {
        LORASYNCI_TRY(lorasynci_list_entry(j, integers, &item));
        out->at[out->num++] = to;
        to += lorasynci_json_decode(&item, to);
        *to++ = 0;
    }
    return LORASYNC_OK;
}

/* -- rank_pattern and alpha_pattern */

/* A key and its value. A module takes the value of the first key (in the file's order) that matches `(.*\.)?(key)$`. */
typedef struct lorasynci_rule {
    const char       *key; /* without its ^ */
    size_t            size;
    size_t            order;
    int               whole; /* the key begins with ^: it must match the whole name */
    double            value;
    lorasync_pattern *pattern; /* NULL: the key holds no special character but points, which stand for any one
                                  character */
} lorasynci_rule;

/*     at [ literal keys, sorted by their text read backwards | patterns ]
            0 ... num_literals                                 ... num
   A file can hold a key for each of many thousand modules, so a literal key is found by narrowing the range from the
   module's end. */
typedef struct lorasynci_rules {
    lorasynci_rule *at;
    size_t          num, num_literals;
    char           *text; /* the keys */
} lorasynci_rules;

LORASYNCI_FN void lorasynci_rules_free(lorasynci_rules *r, const lorasync_allocator *a)
{
    size_t i;
    for (i = 0; i < r->num; i++) lorasync_pattern_free(r->at[i].pattern);
    lorasynci_dealloc(a, r->at);
    lorasynci_dealloc(a, r->text);
    memset(r, 0, sizeof *r);
}

LORASYNCI_FN int lorasynci_rule_order(const void *x, const void *y)
{
    const lorasynci_rule *a = (const lorasynci_rule *)x, *b = (const lorasynci_rule *)y;
    size_t                i;
    if (!a->pattern != !b->pattern) return a->pattern ? 1 : -1;
    for (i = 1; !a->pattern && i <= a->size && i <= b->size; i++) {
        int p = (unsigned char)a->key[a->size - i], q = (unsigned char)b->key[b->size - i];
        if (p != q) return p < q ? -1 : 1;
    }
    if (!a->pattern && a->size != b->size) return a->size < b->size ? -1 : 1;
    return a->order < b->order ? -1 : 1;
}

/* Compiles a key that is more than a literal. */
LORASYNCI_FN lorasync_status lorasynci_rule_compile(lorasynci_rule *rule, const lorasync_allocator *a,
                                                    lorasync_error *err)
{
    lorasynci_buffer b;
    lorasync_status  status;
    if (rule->key[strcspn(rule->key + rule->whole, "\\[](){}*+?|^$") + (size_t)rule->whole] == 0) {
        rule->key += rule->whole;
        rule->size = strlen(rule->key);
        return LORASYNC_OK;
    }
    lorasynci_buffer_init(&b, a);
    lorasynci_put_text(&b, "(.*\\.)?(");
    lorasynci_put_text(&b, rule->key);
    lorasynci_put(&b, ")$", 3);
    if (b.failed) status = lorasynci_fail_memory(err, b.size);
    else status = lorasync_pattern_compile(b.data, a, &rule->pattern, err);
    lorasynci_buffer_free(&b);
    return status;
}

/* Reads the value of a rule: a rank, or any number. */
LORASYNCI_FN lorasync_status lorasynci_rule_value(lorasynci_json *j, int is_rank, double *out)
{
    uint64_t    rank = 0;
    const char *start;
    if (!is_rank) return lorasynci_json_double(j, out);
    lorasynci_json_space(j);
    start = j->at;
    LORASYNCI_TRY(lorasynci_json_uint(j, &rank));
    if (rank < 1 || rank > INT32_MAX) return lorasynci_json_fail(j, start, "a rank is 1 to 2147483647");
    *out = (double)rank;
    return LORASYNC_OK;
}

/* Reads an object of keys and numbers. Free with lorasynci_rules_free, also after a failure. */
LORASYNCI_FN lorasync_status lorasynci_rules_read(lorasynci_json *j, int is_rank, const lorasync_allocator *a,
                                                  lorasynci_rules *out)
{
    lorasynci_slice key;
    size_t          num, num_bytes;
    char           *to;
    LORASYNCI_TRY(lorasynci_members_count(j, &num, &num_bytes));
    out->at   = (lorasynci_rule *)lorasynci_alloc_array(a, num, sizeof *out->at);
    out->text = (char *)lorasynci_alloc(a, num_bytes);
    if (!out->at || !out->text) return lorasynci_fail_memory(j->err, num_bytes + num * sizeof *out->at);
    to = out->text;
    LORASYNCI_TRY(lorasynci_json_object(j));
    while (lorasynci_json_key(j, &key) > 0) {
        lorasynci_rule *rule = &out->at[out->num];
        rule->order          = out->num++;
        rule->key            = to;
        to += lorasynci_json_decode(&key, to);
        *to++       = 0;
        rule->whole = rule->key[0] == '^';
        LORASYNCI_TRY(lorasynci_rule_value(j, is_rank, &rule->value));
        LORASYNCI_TRY(lorasynci_rule_compile(rule, a, j->err));
        if (!rule->pattern) out->num_literals++;
    }
    qsort(out->at, out->num, sizeof *out->at, lorasynci_rule_order);
    return LORASYNC_OK;
}

/* The first rule in [lo, hi) whose character `depth` from the end is c or more. All of them are longer than depth. */
LORASYNCI_FN size_t lorasynci_rules_from(const lorasynci_rules *r, size_t lo, size_t hi, size_t depth, int c)
{
    while (lo < hi) {
        size_t middle = lo + (hi - lo) / 2;
        if ((unsigned char)r->at[middle].key[r->at[middle].size - 1 - depth] < c) lo = middle + 1;
        else hi = middle;
    }
    return lo;
}

LORASYNCI_FN void lorasynci_rules_better(const lorasynci_rule *rule, const lorasynci_rule **best)
{
    if (!*best || rule->order < (*best)->order) *best = rule;
}

/* Among the literals [lo, hi), which all match the last `depth` characters of module, the best one that matches. A
   point in a key goes with any character, so there can be two ways on: the recursion takes the point. */
LORASYNCI_FN void lorasynci_rules_search(const lorasynci_rules *r, size_t lo, size_t hi, size_t depth,
                                         const char *module, size_t n, const lorasynci_rule **best)
{
    for (;; depth++) {
        int    c;
        size_t points;
        for (; lo < hi && r->at[lo].size == depth; lo++) /* keys that end here sort first */
            if (depth == n || (!r->at[lo].whole && module[n - 1 - depth] == '.'))
                lorasynci_rules_better(&r->at[lo], best);
        if (lo == hi || depth == n) return;
        c = (unsigned char)module[n - 1 - depth];
        if (c != '.') {
            points = lorasynci_rules_from(r, lo, hi, depth, '.');
            lorasynci_rules_search(r, points, lorasynci_rules_from(r, points, hi, depth, '.' + 1), depth + 1, module, n,
                                   best);
        }
        lo = lorasynci_rules_from(r, lo, hi, depth, c);
        hi = lorasynci_rules_from(r, lo, hi, depth, c + 1);
    }
}

/* The rule for a module, or NULL. */
LORASYNCI_FN const lorasynci_rule *lorasynci_rules_find(const lorasynci_rules *r, const char *module)
{
    const lorasynci_rule *best = NULL;
    size_t                n    = strlen(module), i;
    if (n >= LORASYNC_MAX_NAME) return NULL; /* no module; and the search goes n deep */
    lorasynci_rules_search(r, 0, r->num_literals, 0, module, n, &best);
    for (i = r->num_literals; i < r->num; i++)
        if ((!best || r->at[i].order < best->order) && lorasync_pattern_matches(r->at[i].pattern, module))
            return &r->at[i];
    return best;
}

/* -- reading */

struct lorasync_config {
    lorasync_config_info info;
    lorasync_allocator   a;
    char                *text; /* the whole file in Python's form, NUL-terminated */
    char                *task_type, *base_model, *target_text, *exclude_text;
    lorasynci_list       target, exclude, saved, parameters, layers; /* layers: the integers of layers_to_transform as
                                                                        text */
    lorasynci_table      target_table;                               /* over target */
    lorasync_pattern    *target_pattern, *exclude_pattern;
    lorasynci_rules      ranks, alphas;
    int                  all_linear; /* target_modules is "all-linear" */
    int                  tokens;     /* trainable_token_indices is set */
};

LORASYNC_API void lorasync_config_free(lorasync_config *c)
{
    lorasync_allocator a;
    if (!c) return;
    a = c->a;
    lorasynci_dealloc(&a, c->text);
    lorasynci_dealloc(&a, c->task_type);
    lorasynci_dealloc(&a, c->base_model);
    lorasynci_dealloc(&a, c->target_text);
    lorasynci_dealloc(&a, c->exclude_text);
    lorasynci_list_free(&c->target, &a);
    lorasynci_list_free(&c->exclude, &a);
    lorasynci_list_free(&c->saved, &a);
    lorasynci_list_free(&c->parameters, &a);
    lorasynci_list_free(&c->layers, &a);
    lorasynci_table_free(&c->target_table);
    lorasync_pattern_free(c->target_pattern);
    lorasync_pattern_free(c->exclude_pattern);
    lorasynci_rules_free(&c->ranks, &a);
    lorasynci_rules_free(&c->alphas, &a);
    lorasynci_dealloc(&a, c);
}

LORASYNC_API const lorasync_config_info *lorasync_config_view(const lorasync_config *config)
{
    return config ? &config->info : NULL;
}

/* The members of the file while it is read, with a reader for the positions in error texts. */
typedef struct lorasynci_fields {
    lorasynci_members members;
    lorasynci_json    j;
} lorasynci_fields;

/* 1 and a reader at the value when the file has the key and does not say null. */
LORASYNCI_FN int lorasynci_field(const lorasynci_fields *f, const char *key, lorasynci_json *value)
{
    const lorasynci_member *m = lorasynci_members_find(&f->members, key);
    if (!m || *m->value == 'n') return 0;
    *value    = f->j;
    value->at = m->value;
    return 1;
}

/* Names the key in a failure's text. */
LORASYNCI_FN lorasync_status lorasynci_field_done(const lorasynci_fields *f, const char *key, lorasync_status status)
{
    if (status < 0) lorasynci_prefix(f->j.err, "adapter config, \"%s\"", key);
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_field_bool(const lorasynci_fields *f, const char *key, int *out)
{
    lorasynci_json v;
    return lorasynci_field(f, key, &v) ? lorasynci_field_done(f, key, lorasynci_json_bool(&v, out)) : LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_field_text(const lorasynci_fields *f, const char *key,
                                                  const lorasync_allocator *a, char **out)
{
    lorasynci_json  v;
    lorasynci_slice s;
    if (!lorasynci_field(f, key, &v)) return LORASYNC_OK;
    LORASYNCI_TRY(lorasynci_field_done(f, key, lorasynci_json_string(&v, &s)));
    *out = lorasynci_json_copy(&s, a);
    return *out ? LORASYNC_OK : lorasynci_fail_memory(f->j.err, s.size + 1);
}

LORASYNCI_FN lorasync_status lorasynci_field_list(const lorasynci_fields *f, const char *key, int integers,
                                                  const lorasync_allocator *a, lorasynci_list *out)
{
    lorasynci_json v;
    return lorasynci_field(f, key, &v) ? lorasynci_field_done(f, key, lorasynci_list_read(&v, integers, a, out))
                                       : LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_field_rules(const lorasynci_fields *f, const char *key, int is_rank,
                                                   const lorasync_allocator *a, lorasynci_rules *out)
{
    lorasynci_json v;
    return lorasynci_field(f, key, &v) ? lorasynci_field_done(f, key, lorasynci_rules_read(&v, is_rank, a, out))
                                       : LORASYNC_OK;
}

/* A field that is a list of names or a pattern. */
LORASYNCI_FN lorasync_status lorasynci_field_modules(const lorasynci_fields *f, const char *key,
                                                     const lorasync_allocator *a, lorasynci_list *list, char **text)
{
    lorasynci_json v;
    if (!lorasynci_field(f, key, &v)) return LORASYNC_OK;
    if (*v.at == '"') return lorasynci_field_text(f, key, a, text);
    if (*v.at == '[') return lorasynci_field_list(f, key, 0, a, list);
    return lorasynci_field_done(f, key, lorasynci_json_fail(&v, v.at, "expected a list of names, a string or null"));
}

LORASYNCI_FN lorasync_status lorasynci_config_peft_type(const lorasynci_fields *f)
{
    lorasynci_json  v;
    lorasynci_slice s;
    if (!lorasynci_field(f, "peft_type", &v))
        return lorasynci_fail(
            f->j.err, LORASYNC_E_FORMAT,
            "adapter config: no \"peft_type\", so this is no PEFT adapter config; expected \"peft_type\": \"LORA\"");
    LORASYNCI_TRY(lorasynci_field_done(f, "peft_type", lorasynci_json_string(&v, &s)));
    if (lorasynci_json_is(&s, "LORA")) return LORASYNC_OK;
    return lorasynci_fail(f->j.err, LORASYNC_E_UNSUPPORTED,
                          "adapter config: peft_type is \"%.*s\", only \"LORA\" is supported",
                          (int)(s.size < 60 ? s.size : 60), s.at);
}

/* The flags, the numbers and bias. */
LORASYNCI_FN lorasync_status lorasynci_config_scalars(lorasync_config *c, const lorasynci_fields *f)
{
    static const char *const biases[] = {"none", "all", "lora_only"};
    lorasynci_json           v;
    lorasynci_slice          s;
    double                   r = 0;
    size_t                   i;
    c->info.peft_type  = "LORA";
    c->info.bias       = "none";
    c->info.r          = 8; /* PEFT's defaults */
    c->info.lora_alpha = 8;
    LORASYNCI_TRY(lorasynci_field_bool(f, "use_rslora", &c->info.use_rslora));
    LORASYNCI_TRY(lorasynci_field_bool(f, "use_dora", &c->info.use_dora));
    LORASYNCI_TRY(lorasynci_field_bool(f, "lora_bias", &c->info.lora_bias));
    LORASYNCI_TRY(lorasynci_field_bool(f, "fan_in_fan_out", &c->info.fan_in_fan_out));
    if (lorasynci_field(f, "r", &v)) {
        LORASYNCI_TRY(lorasynci_field_done(f, "r", lorasynci_rule_value(&v, 1, &r)));
        c->info.r = (int64_t)r;
    }
    if (lorasynci_field(f, "lora_alpha", &v))
        LORASYNCI_TRY(lorasynci_field_done(f, "lora_alpha", lorasynci_json_double(&v, &c->info.lora_alpha)));
    if (lorasynci_field(f, "bias", &v)) {
        const char *start = v.at;
        LORASYNCI_TRY(lorasynci_field_done(f, "bias", lorasynci_json_string(&v, &s)));
        for (i = 0; i < 3 && !lorasynci_json_is(&s, biases[i]); i++) {}
        if (i == 3)
            return lorasynci_field_done(f, "bias",
                                        lorasynci_json_fail(&v, start, "expected \"none\", \"all\" or \"lora_only\""));
        c->info.bias = biases[i];
    }
    c->tokens = lorasynci_field(f, "trainable_token_indices", &v);
    return LORASYNC_OK;
}

/* layers_to_transform is an integer or a list of them. */
LORASYNCI_FN lorasync_status lorasynci_config_layers(lorasync_config *c, const lorasynci_fields *f)
{
    const char     *key = "layers_to_transform";
    lorasynci_json  v;
    lorasynci_slice s;
    if (!lorasynci_field(f, key, &v) || *v.at == '[') return lorasynci_field_list(f, key, 1, &c->a, &c->layers);
    LORASYNCI_TRY(lorasynci_field_done(f, key, lorasynci_list_entry(&v, 1, &s)));
    c->layers.at   = (const char **)lorasynci_alloc_array(&c->a, 1, sizeof *c->layers.at);
    c->layers.text = lorasynci_copy_text(&c->a, s.at, s.size);
    if (!c->layers.at || !c->layers.text) return lorasynci_fail_memory(f->j.err, s.size + 1);
    c->layers.at[0] = c->layers.text;
    c->layers.num   = 1;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_config_modules(lorasync_config *c, const lorasynci_fields *f)
{
    size_t i;
    LORASYNCI_TRY(lorasynci_field_modules(f, "target_modules", &c->a, &c->target, &c->target_text));
    LORASYNCI_TRY(lorasynci_field_modules(f, "exclude_modules", &c->a, &c->exclude, &c->exclude_text));
    LORASYNCI_TRY(lorasynci_field_list(f, "modules_to_save", 0, &c->a, &c->saved));
    LORASYNCI_TRY(lorasynci_field_list(f, "target_parameters", 0, &c->a, &c->parameters));
    c->all_linear = lorasynci_is_all_linear(c->target_text);
    if (c->target_text && !c->all_linear)
        LORASYNCI_TRY(lorasynci_field_done(
            f, "target_modules", lorasync_pattern_compile(c->target_text, &c->a, &c->target_pattern, f->j.err)));
    if (c->exclude_text)
        LORASYNCI_TRY(lorasynci_field_done(
            f, "exclude_modules", lorasync_pattern_compile(c->exclude_text, &c->a, &c->exclude_pattern, f->j.err)));
    if (!lorasynci_table_init(&c->target_table, &c->a, c->target.num))
        return lorasynci_fail_memory(f->j.err, c->target.num);
    for (i = 0; i < c->target.num; i++)
        lorasynci_table_insert(&c->target_table, c->target.at[i], i, lorasynci_list_key, &c->target);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_config_read(lorasync_config *c, const lorasynci_fields *f)
{
    lorasynci_json   all = f->j;
    lorasynci_buffer b;
    lorasync_status  status;
    LORASYNCI_TRY(lorasynci_config_peft_type(f));
    LORASYNCI_TRY(lorasynci_config_scalars(c, f));
    LORASYNCI_TRY(lorasynci_field_text(f, "task_type", &c->a, &c->task_type));
    LORASYNCI_TRY(lorasynci_field_text(f, "base_model_name_or_path", &c->a, &c->base_model));
    LORASYNCI_TRY(lorasynci_config_modules(c, f));
    LORASYNCI_TRY(lorasynci_config_layers(c, f));
    lorasynci_buffer_init(&b, &c->a);
    status  = lorasynci_json_put_python(&b, &all, 0); /* also finds doubled keys and numbers out of range at any
                                                         depth */
    c->text = b.data;
    lorasynci_put(&b, "", 1);
    c->text = b.data;
    if (status >= 0 && b.failed) status = lorasynci_fail_memory(all.err, b.size);
    if (status < 0) lorasynci_prefix(all.err, "adapter config");
    LORASYNCI_TRY(status);
    LORASYNCI_TRY(lorasynci_field_rules(f, "rank_pattern", 1, &c->a, &c->ranks));
    return lorasynci_field_rules(f, "alpha_pattern", 0, &c->a, &c->alphas);
}

/* Points the public view at what was read. */
LORASYNCI_FN void lorasynci_config_show(lorasync_config *c)
{
    lorasync_config_info *info = &c->info;
    info->task_type            = c->task_type;
    info->base_model           = c->base_model;
    info->target_pattern       = c->target_text;
    info->target_modules       = c->target.at;
    info->num_target_modules   = c->target.num;
    info->modules_to_save      = c->saved.at;
    info->num_modules_to_save  = c->saved.num;
    info->num_rank_patterns    = c->ranks.num;
    info->num_alpha_patterns   = c->alphas.num;
}

LORASYNC_API lorasync_status lorasync_config_parse(const char *json, size_t num_bytes,
                                                   const lorasync_allocator *allocator, lorasync_config **out,
                                                   lorasync_error *err)
{
    lorasync_allocator a;
    lorasync_config   *c;
    lorasynci_fields   f;
    lorasynci_json     rest;
    lorasync_status    status;
    if (out) *out = NULL;
    if (!out || !json)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_config_parse: json and out must not be NULL");
    if (!lorasynci_take_allocator(allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_config_parse: the allocator has only one of its two functions");
    c = (lorasync_config *)lorasynci_alloc_array(&a, 1, sizeof *c);
    if (!c) return lorasynci_fail_memory(err, sizeof *c);
    c->a = a;
    lorasynci_json_init(&f.j, json, num_bytes, err);
    rest   = f.j;
    status = lorasynci_members_read(&rest, &a, &f.members);
    if (status >= 0) status = lorasynci_json_end(&rest);
    if (status < 0) lorasynci_prefix(err, "adapter config");
    else status = lorasynci_config_read(c, &f);
    lorasynci_members_free(&f.members);
    if (status < 0) {
        lorasync_config_free(c);
        return status;
    }
    lorasynci_config_show(c);
    *out = c;
    return LORASYNC_OK;
}

/* -- rank and scale */

LORASYNC_API int64_t lorasync_config_rank(const lorasync_config *config, const char *module)
{
    const lorasynci_rule *rule;
    if (!config || !module) return 0;
    rule = lorasynci_rules_find(&config->ranks, module);
    return rule ? (int64_t)rule->value : config->info.r;
}

LORASYNC_API double lorasync_config_scale(const lorasync_config *config, const char *module)
{
    const lorasynci_rule *rule;
    double                alpha, rank;
    if (!config || !module) return 0;
    rule  = lorasynci_rules_find(&config->alphas, module);
    alpha = rule ? rule->value : config->info.lora_alpha;
    rank  = (double)lorasync_config_rank(config, module);
    return alpha / (config->info.use_rslora ? sqrt(rank) : rank);
}

/* -- the tensors of an adapter, by module */

/* The tensors of one LoRA layer; those that are missing are NULL. */
typedef struct lorasynci_pair {
    size_t                 prefix; /* where "base_model.model.layers.0.q_proj" starts in names */
    size_t                 module; /* where "layers.0.q_proj" does; pairs nested by target_parameters share it */
    int                    inner;  /* such a nested one: the prefix ends in base_layer */
    int                    embedding_a, embedding_b;
    const lorasync_tensor *a, *b, *bias, *magnitude;
} lorasynci_pair;

/*     names  [ base_model.model.layers.0.q_proj \0 layers.0.q_proj \0 base_model... ]
                ^ prefix                            ^ module
       at     [ pair | pair | ... ]      found through table by prefix
       others [ tensor | tensor ]        those without a LoRA leaf */
typedef struct lorasynci_pairs {
    lorasynci_pair         *at;
    size_t                  num;
    const lorasync_tensor **others;
    size_t                  num_others;
    lorasynci_buffer        names;
    lorasynci_table         table;
    lorasync_allocator      a;
} lorasynci_pairs;

LORASYNCI_FN const char *lorasynci_pair_key(const void *user, size_t index)
{
    const lorasynci_pairs *p = (const lorasynci_pairs *)user;
    return p->names.data + p->at[index].prefix;
}

LORASYNCI_FN const char *lorasynci_pair_module(const lorasynci_pairs *p, size_t index)
{
    return p->names.data + p->at[index].module;
}

LORASYNCI_FN void lorasynci_pairs_free(lorasynci_pairs *p)
{
    lorasynci_dealloc(&p->a, p->at);
    lorasynci_dealloc(&p->a, p->others);
    lorasynci_buffer_free(&p->names);
    lorasynci_table_free(&p->table);
}

LORASYNCI_FN int lorasynci_pairs_init(lorasynci_pairs *p, size_t num_tensors, const lorasync_allocator *a)
{
    memset(p, 0, sizeof *p);
    p->a = *a;
    lorasynci_buffer_init(&p->names, a);
    p->at     = (lorasynci_pair *)lorasynci_alloc_array(a, num_tensors, sizeof *p->at);
    p->others = (const lorasync_tensor **)lorasynci_alloc_array(a, num_tensors, sizeof *p->others);
    return p->at && p->others && lorasynci_table_init(&p->table, a, num_tensors);
}

/* The pair a LoRA key belongs to, made when new. The key is cut before its leaf. NULL when there is no memory. */
LORASYNCI_FN lorasynci_pair *lorasynci_pairs_at(lorasynci_pairs *p, lorasync_name *name)
{
    char  *leaf, *next;
    size_t index;
    for (leaf = NULL, next = name->key; (next = strstr(next, ".lora_")) != NULL; next++) leaf = next;
    if (leaf) *leaf = 0;
    index = lorasynci_table_insert(&p->table, name->key, p->num, lorasynci_pair_key, p);
    if (index == p->num) {
        lorasynci_pair *pair = &p->at[p->num++];
        pair->prefix         = p->names.size;
        lorasynci_put(&p->names, name->key, strlen(name->key) + 1);
        pair->module = p->names.size;
        pair->inner  = lorasynci_ends_in(name->key, "base_layer");
        lorasynci_put(&p->names, name->module, strlen(name->module) + 1);
    }
    return p->names.failed ? NULL : &p->at[index];
}

/* Where in a pair a role goes; NULL for a role that is no LoRA leaf. */
LORASYNCI_FN const lorasync_tensor **lorasynci_pair_tensor(lorasynci_pair *pair, lorasync_role role)
{
    switch ((int)role) {
    case LORASYNC_ROLE_LORA_A:
    case LORASYNC_ROLE_EMBEDDING_A: return &pair->a;
    case LORASYNC_ROLE_LORA_B:
    case LORASYNC_ROLE_EMBEDDING_B: return &pair->b;
    case LORASYNC_ROLE_LORA_B_BIAS: return &pair->bias;
    case LORASYNC_ROLE_MAGNITUDE: return &pair->magnitude;
    default: return NULL;
    }
}

LORASYNCI_FN lorasync_status lorasynci_pairs_add(lorasynci_pairs *p, const lorasync_tensor *t, lorasync_error *err)
{
    lorasync_name           name;
    lorasynci_pair         *pair, none;
    const lorasync_tensor **place;
    if (!t->name) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "a tensor has no name");
    LORASYNCI_TRY(lorasync_parse_name(t->name, &name, err));
    if (!lorasynci_pair_tensor(&none, name.role)) {
        p->others[p->num_others++] = t;
        return LORASYNC_OK;
    }
    pair = lorasynci_pairs_at(p, &name);
    if (!pair) return lorasynci_fail_memory(err, p->names.size);
    place = lorasynci_pair_tensor(pair, name.role);
    if (*place)
        return lorasynci_fail(err, LORASYNC_E_PAIR,
                              "tensors \"%.200s\" and \"%.200s\" are both %s of one module: drop one", (*place)->name,
                              t->name, lorasync_role_text(name.role));
    *place = t;
    if (name.role == LORASYNC_ROLE_EMBEDDING_A) pair->embedding_a = 1;
    if (name.role == LORASYNC_ROLE_EMBEDDING_B) pair->embedding_b = 1;
    return LORASYNC_OK;
}

/* The number of elements of a tensor is expected; shapes are checked where tensors are made, so the product fits. */
LORASYNCI_FN lorasync_status lorasynci_pair_check_vector(const lorasync_tensor *t, const lorasync_tensor *b,
                                                         lorasync_error *err)
{
    int64_t n = 1;
    int     i;
    for (i = 0; i < t->ndim; i++) {
        if (t->shape[i] != 1 && n != 1) n = -1; /* two dimensions: no vector */
        if (n == 1) n = t->shape[i];
    }
    if (n == b->shape[0]) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_PAIR,
                          "tensor \"%.200s\" must be a vector of %lld elements, as \"%.200s\" has that many rows",
                          t->name, (long long)b->shape[0], b->name);
}

/* What must hold of a pair whatever the config says. */
LORASYNCI_FN lorasync_status lorasynci_pair_check(const lorasynci_pairs *p, size_t index, lorasync_error *err)
{
    const lorasynci_pair *pair = &p->at[index];
    if (!pair->a || !pair->b) {
        const lorasync_tensor *t = pair->a ? pair->a : pair->b ? pair->b : pair->bias ? pair->bias : pair->magnitude;
        return lorasynci_fail(err, LORASYNC_E_PAIR,
                              "tensor \"%.200s\": %s of module \"%.200s\" is missing; add it or drop this one", t->name,
                              pair->a   ? "its lora_B"
                              : pair->b ? "its lora_A"
                                        : "lora_A and lora_B",
                              lorasynci_pair_module(p, index));
    }
    if (pair->embedding_a != pair->embedding_b)
        return lorasynci_fail(err, LORASYNC_E_PAIR,
                              "tensors \"%.200s\" and \"%.200s\" do not pair: one is of an embedding, one is not",
                              pair->a->name, pair->b->name);
    if (pair->a->ndim < 2 || pair->b->ndim < 2)
        return lorasynci_fail(err, LORASYNC_E_PAIR, "tensor \"%.200s\" has %d dimensions, expected 2 or more",
                              pair->a->ndim < 2 ? pair->a->name : pair->b->name,
                              pair->a->ndim < 2 ? pair->a->ndim : pair->b->ndim);
    if (pair->a->shape[0] != pair->b->shape[1])
        return lorasynci_fail(err, LORASYNC_E_PAIR,
                              "\"%.200s\" has rank %lld (rows) and \"%.200s\" has %lld (columns): they must be equal",
                              pair->a->name, (long long)pair->a->shape[0], pair->b->name, (long long)pair->b->shape[1]);
    if (pair->bias) LORASYNCI_TRY(lorasynci_pair_check_vector(pair->bias, pair->b, err));
    if (pair->magnitude && !pair->embedding_a)
        LORASYNCI_TRY(lorasynci_pair_check_vector(pair->magnitude, pair->b, err));
    return LORASYNC_OK;
}

/* Sorts tensors into pairs and others, and checks the pairs. Free with lorasynci_pairs_free, also after a failure. */
LORASYNCI_FN lorasync_status lorasynci_pairs_read(lorasynci_pairs *p, const lorasync_tensor *tensors,
                                                  size_t num_tensors, const lorasync_allocator *a, lorasync_error *err)
{
    size_t i;
    if (!lorasynci_pairs_init(p, num_tensors, a)) return lorasynci_fail_memory(err, num_tensors);
    for (i = 0; i < num_tensors; i++) LORASYNCI_TRY(lorasynci_pairs_add(p, &tensors[i], err));
    if (!p->num)
        return lorasynci_fail(err, LORASYNC_E_EMPTY,
                              "none of the %zu tensors is a lora_A or lora_B%s%.200s: is this the adapter?",
                              num_tensors, num_tensors ? ", the first is " : "", num_tensors ? tensors[0].name : "");
    for (i = 0; i < p->num; i++) LORASYNCI_TRY(lorasynci_pair_check(p, i, err));
    return LORASYNC_OK;
}

/* -- checking */

/* 1 if the module is left out by exclude_modules. */
LORASYNCI_FN int lorasynci_excluded(const lorasync_config *c, const char *module)
{
    size_t i;
    if (c->exclude_pattern) return lorasync_pattern_matches(c->exclude_pattern, module);
    for (i = 0; i < c->exclude.num; i++)
        if (lorasynci_ends_in(module, c->exclude.at[i])) return 1;
    return 0;
}

/* 1 if the module holds a parameter of target_parameters: "mlp.experts.gate_up_proj" is one of any module that ends in
   mlp.experts, and a bare "gate_up_proj" is taken to be one of any module called experts. */
LORASYNCI_FN int lorasynci_has_parameter(const lorasync_config *c, const char *module)
{
    char   owner[LORASYNC_MAX_NAME];
    size_t i;
    for (i = 0; i < c->parameters.num; i++) {
        const char *entry = c->parameters.at[i], *dot = strrchr(entry, '.');
        size_t      n = dot ? (size_t)(dot - entry) : 0;
        if (n >= sizeof owner) continue;
        memcpy(owner, entry, n);
        owner[n] = 0;
        if (lorasynci_ends_in(module, dot ? owner : "experts")) return 1;
    }
    return 0;
}

/* 1 if a numbered segment of the module is in layers_to_transform, or there is none to obey. Which of several numbers
   counts depends on PEFT's version and on layers_pattern, so any will do. */
LORASYNCI_FN int lorasynci_in_layers(const lorasync_config *c, const char *module)
{
    const char *p = module;
    size_t      i, n;
    if (!c->layers.num) return 1;
    for (; *p; p += n + (p[n] == '.')) {
        n = strcspn(p, ".");
        for (i = 0; i < c->layers.num; i++)
            if (strlen(c->layers.at[i]) == n && memcmp(p, c->layers.at[i], n) == 0) return 1;
    }
    return 0;
}

/* 1 if an entry of the target_modules list matches the module; marks all that do in used[]. */
LORASYNCI_FN int lorasynci_in_targets(const lorasync_config *c, const char *module, unsigned char *used)
{
    const char *suffix = module, *dot;
    int         found  = 0;
    for (;;) {
        size_t index = lorasynci_table_find(&c->target_table, suffix, lorasynci_list_key, &c->target);
        if (index != SIZE_MAX) {
            used[index] = 1;
            found |= suffix == module || lorasynci_in_layers(c, module);
        }
        dot = strchr(suffix, '.');
        if (!dot) return found;
        suffix = dot + 1;
    }
}

/* 1 if the config puts LoRA on the module. */
LORASYNCI_FN int lorasynci_targeted(const lorasync_config *c, const char *module, unsigned char *used)
{
    int listed = c->target.num && lorasynci_in_targets(c, module, used);
    if (lorasynci_excluded(c, module)) return 0;
    if (lorasynci_has_parameter(c, module)) return 1;
    if (c->target_pattern) return lorasync_pattern_matches(c->target_pattern, module);
    return listed || c->all_linear || !c->target.at; /* without any target_modules PEFT knows them by the model's type,
                                                        we do not */
}

/* The rank the config gives a pair, against the one it has. An expert parameter has all its experts' ranks side by
   side. */
LORASYNCI_FN lorasync_status lorasynci_check_rank(const lorasync_config *c, const lorasynci_pair *pair,
                                                  const char *module, lorasync_error *err)
{
    const lorasynci_rule *rule     = lorasynci_rules_find(&c->ranks, module);
    int64_t               expected = rule ? (int64_t)rule->value : c->info.r;
    int64_t               found    = pair->a->shape[0];
    if (found == expected || (lorasynci_has_parameter(c, module) && found > 0 && found % expected == 0))
        return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_CONFIG,
                          "tensor \"%.200s\": rank %lld, but the adapter config says %lld (%s%.100s)", pair->a->name,
                          (long long)found, (long long)expected, rule ? "rank_pattern " : "r", rule ? rule->key : "");
}

/* Checks a pair against the config. */
LORASYNCI_FN lorasync_status lorasynci_check_pair(const lorasync_config *c, const lorasynci_pairs *p, size_t index,
                                                  unsigned char *used, lorasync_error *err)
{
    const lorasynci_pair *pair   = &p->at[index];
    const char           *module = lorasynci_pair_module(p, index);
    if (!lorasynci_targeted(c, module, used))
        return lorasynci_fail(
            err, LORASYNC_E_CONFIG,
            "tensor \"%.200s\": module \"%.150s\" is not among the target_modules of the adapter config; "
            "add it there or drop the tensor",
            pair->a->name, module);
    LORASYNCI_TRY(lorasynci_check_rank(c, pair, module, err));
    if (c->info.use_dora != (pair->magnitude != NULL))
        return lorasynci_fail(err, LORASYNC_E_CONFIG,
                              "tensor \"%.200s\": the adapter config says use_dora %s, but module \"%.150s\" has "
                              "%s lora_magnitude_vector",
                              pair->magnitude ? pair->magnitude->name : pair->a->name,
                              c->info.use_dora ? "true" : "false", module, pair->magnitude ? "a" : "no");
    if (c->info.lora_bias != (pair->bias != NULL) && !pair->embedding_a)
        return lorasynci_fail(err, LORASYNC_E_CONFIG,
                              "tensor \"%.200s\": the adapter config says lora_bias %s, but module \"%.150s\" has "
                              "%s lora_B.bias",
                              pair->bias ? pair->bias->name : pair->b->name, c->info.lora_bias ? "true" : "false",
                              module, pair->bias ? "a" : "no");
    return LORASYNC_OK;
}

/* 1 if one of the modules on the way to a parameter ends in `entry`, the text: PEFT saves pre_classifier for an entry
   classifier. */
LORASYNCI_FN int lorasynci_saved_by(const char *key, const char *entry)
{
    size_t      m   = strlen(entry);
    const char *dot = key;
    while ((dot = strchr(dot, '.')) != NULL) {
        if ((size_t)(dot - key) >= m && memcmp(dot - m, entry, m) == 0) return 1;
        dot++;
    }
    return 0;
}

/* The modules that PEFT saves for a kind of task although modules_to_save may not say so; "" ends the list. */
LORASYNCI_FN const char *const *lorasynci_task_modules(const char *task_type)
{
    static const char *const classifiers[] = {"classifier", "score", ""}, *const answers[] = {"qa_outputs", ""},
                             *const none[] = {""};
    if (!task_type) return none;
    if (strcmp(task_type, "SEQ_CLS") == 0 || strcmp(task_type, "TOKEN_CLS") == 0) return classifiers;
    return strcmp(task_type, "QUESTION_ANS") == 0 ? answers : none;
}

LORASYNCI_FN int lorasynci_saved(const lorasync_config *c, const lorasync_name *name)
{
    static const char  prefix[] = "base_model.model.";
    char               key[sizeof prefix + LORASYNC_MAX_NAME];
    const char *const *task = lorasynci_task_modules(c->info.task_type);
    size_t             i;
    snprintf(key, sizeof key, "%s%s", strncmp(name->key, prefix, sizeof prefix - 1) == 0 ? "" : prefix, name->key);
    for (i = 0; i < c->saved.num; i++)
        if (lorasynci_saved_by(key, c->saved.at[i])) return 1;
    for (; **task; task++)
        if (lorasynci_saved_by(key, *task)) return 1;
    return 0;
}

/* The pair on a module given by its name, or NULL. */
LORASYNCI_FN const lorasynci_pair *lorasynci_pairs_of(const lorasynci_pairs *p, const char *module)
{
    char   key[LORASYNC_MAX_NAME + 32];
    size_t index;
    snprintf(key, sizeof key, "base_model.model.%s", module);
    index = lorasynci_table_find(&p->table, key, lorasynci_pair_key, p);
    return index == SIZE_MAX ? NULL : &p->at[index];
}

/* 1 for the weight of an embedding or output layer, which PEFT saves beside the adapter (save_embedding_layers): it has
   embedding LoRA on it, or one of the usual names. */
LORASYNCI_FN int lorasynci_saved_embedding(const lorasynci_pairs *p, const lorasync_name *name)
{
    static const char *const names[] = {"embed_tokens", "lm_head",   "wte",   "word_embeddings",
                                        "embed_in",     "embed_out", "shared"};
    const lorasynci_pair    *pair    = lorasynci_pairs_of(p, name->module);
    size_t                   i;
    if (!lorasynci_ends_in(name->key, "weight")) return 0;
    if (pair && pair->embedding_a) return 1;
    for (i = 0; i < LORASYNCI_COUNT(names); i++)
        if (lorasynci_ends_in(name->module, names[i])) return 1;
    return 0;
}

/* Checks a tensor that is no LoRA. */
LORASYNCI_FN lorasync_status lorasynci_check_other(const lorasync_config *c, const lorasynci_pairs *p,
                                                   const lorasync_tensor *t, unsigned char *used, lorasync_error *err)
{
    lorasync_name name;
    LORASYNCI_TRY(lorasync_parse_name(t->name, &name, err));
    if (c->target.num)
        lorasynci_in_targets(c, name.module, used); /* an entry of target_modules may name a module that
                                                                      is saved whole */
    if (name.role == LORASYNC_ROLE_TRAINABLE_TOKENS) {
        if (c->tokens) return LORASYNC_OK;
        return lorasynci_fail(err, LORASYNC_E_CONFIG,
                              "tensor \"%.200s\" needs trainable_token_indices in the adapter config", t->name);
    }
    if (lorasynci_saved(c, &name)) return LORASYNC_OK;
    if (name.role == LORASYNC_ROLE_BASE) {
        if (lorasynci_ends_in(name.key, "bias")) {
            if (c->info.bias[0] == 'a') return LORASYNC_OK;
            if (c->info.bias[0] == 'l' && lorasynci_pairs_of(p, name.module)) return LORASYNC_OK;
        }
        if (lorasynci_saved_embedding(p, &name)) return LORASYNC_OK;
    }
    return lorasynci_fail(
        err, LORASYNC_E_CONFIG,
        "tensor \"%.200s\" is no LoRA tensor and module \"%.150s\" is not in modules_to_save of the adapter config "
        "(bias is \"%s\"); "
        "list it there or drop the tensor",
        t->name, name.module, c->info.bias);
}

/* Every entry of the list has matched something; not asked when something else decides too. */
LORASYNCI_FN lorasync_status lorasynci_check_used(const lorasync_config *c, const unsigned char *used,
                                                  lorasync_error *err)
{
    size_t i;
    if (c->exclude_pattern || c->exclude.num) return LORASYNC_OK;
    for (i = 0; i < c->target.num; i++) {
        size_t first = lorasynci_table_find(&c->target_table, c->target.at[i], lorasynci_list_key, &c->target);
        if (!used[first])
            return lorasynci_fail(
                err, LORASYNC_E_CONFIG,
                "target_modules of the adapter config lists \"%.200s\", but no tensor is of such a module: "
                "add its tensors or drop the entry",
                c->target.at[i]);
    }
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_config_check_pairs(const lorasync_config *c, const lorasynci_pairs *p,
                                                          lorasync_error *err)
{
    unsigned char  *used   = (unsigned char *)lorasynci_alloc_array(&c->a, c->target.num, 1);
    lorasync_status status = LORASYNC_OK;
    size_t          i;
    if (!used) return lorasynci_fail_memory(err, c->target.num);
    for (i = 0; i < p->num && status >= 0; i++) status = lorasynci_check_pair(c, p, i, used, err);
    for (i = 0; i < p->num_others && status >= 0; i++) status = lorasynci_check_other(c, p, p->others[i], used, err);
    if (status >= 0) status = lorasynci_check_used(c, used, err);
    lorasynci_dealloc(&c->a, used);
    return status;
}

LORASYNC_API lorasync_status lorasync_config_check(const lorasync_config *config, const lorasync_tensor *tensors,
                                                   size_t num_tensors, lorasync_error *err)
{
    lorasynci_pairs p;
    lorasync_status status;
    if (!config || (!tensors && num_tensors))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_config_check: config and tensors must not be NULL");
    status = lorasynci_pairs_read(&p, tensors, num_tensors, &config->a, err);
    if (status >= 0) status = lorasynci_config_check_pairs(config, &p, err);
    lorasynci_pairs_free(&p);
    return status;
}

/* -- writing */

/* A LoRA module of target_modules with the name to list it by: its last segment, or, since "0" names nothing, from the
   last segment on that is no number. */
typedef struct lorasynci_target {
    const char *name, *module; /* name is the end of module */
    int64_t     rank;
} lorasynci_target;

/* What writing needs: the JSON grows in raw, in any order and on one line, and is then rewritten in Python's form. */
typedef struct lorasynci_config_writer {
    const lorasync_config_write_desc *desc;
    lorasynci_pairs                   pairs;
    lorasynci_target                 *targets; /* sorted by name, then module */
    size_t                            num_targets;
    const char                      **saved; /* without a config: the modules to save, sorted; some more than once */
    size_t                            num_saved;
    char                             *saved_text;
    lorasynci_buffer                  raw;
    lorasync_allocator                a;
    lorasync_error                   *err;
} lorasynci_config_writer;

LORASYNCI_FN const char *lorasynci_target_name(const char *module)
{
    const char *name = module + strlen(module);
    do {
        while (name > module && name[-1] != '.') name--;
        if (name[strspn(name, "0123456789.")] || name == module) return name;
        name--;
    } while (name > module);
    return module;
}

LORASYNCI_FN int lorasynci_target_order(const void *x, const void *y)
{
    const lorasynci_target *a = (const lorasynci_target *)x, *b = (const lorasynci_target *)y;
    int                     order = strcmp(a->name, b->name);
    return order ? order : strcmp(a->module, b->module);
}

/* Collects the LoRA modules, without those of target_parameters. */
LORASYNCI_FN lorasync_status lorasynci_writer_targets(lorasynci_config_writer *w)
{
    const lorasync_config *c = w->desc->config;
    size_t                 i;
    w->targets = (lorasynci_target *)lorasynci_alloc_array(&w->a, w->pairs.num, sizeof *w->targets);
    if (!w->targets) return lorasynci_fail_memory(w->err, w->pairs.num * sizeof *w->targets);
    for (i = 0; i < w->pairs.num; i++) {
        const char *module = lorasynci_pair_module(&w->pairs, i);
        if (c && lorasynci_has_parameter(c, module)) continue;
        if (!c && (w->pairs.at[i].inner || lorasynci_ends_in(module, "experts")))
            return lorasynci_fail(w->err, LORASYNC_E_CONFIG,
                                  "tensor \"%.200s\" is of an expert parameter: give the trainer's adapter config, "
                                  "whose target_parameters name it",
                                  w->pairs.at[i].a->name);
        w->targets[w->num_targets].module = module;
        w->targets[w->num_targets].name   = lorasynci_target_name(module);
        w->targets[w->num_targets++].rank = w->pairs.at[i].a->shape[0];
    }
    qsort(w->targets, w->num_targets, sizeof *w->targets, lorasynci_target_order);
    return LORASYNC_OK;
}

/* Puts `,"key":` */
LORASYNCI_FN void lorasynci_writer_key(lorasynci_config_writer *w, const char *key)
{
    if (w->raw.size > 1) lorasynci_put_text(&w->raw, ",");
    lorasynci_json_put_string(&w->raw, key, strlen(key));
    lorasynci_put_text(&w->raw, ":");
}

LORASYNCI_FN void lorasynci_writer_field(lorasynci_config_writer *w, const char *key, const char *json)
{
    lorasynci_writer_key(w, key);
    lorasynci_put_text(&w->raw, json);
}

/* Puts the list of names that selects the LoRA modules. */
LORASYNCI_FN void lorasynci_writer_target_modules(lorasynci_config_writer *w)
{
    size_t i, num = 0;
    lorasynci_writer_field(w, "target_modules", "[");
    for (i = 0; i < w->num_targets; i++) {
        const char *name = w->targets[i].name;
        if (i && strcmp(name, w->targets[i - 1].name) == 0) continue;
        if (num++) lorasynci_put_text(&w->raw, ",");
        lorasynci_json_put_string(&w->raw, name, strlen(name));
    }
    lorasynci_put_text(&w->raw, "]");
}

/* -- writing from a config */

LORASYNCI_FN void lorasynci_writer_copy(lorasynci_config_writer *w, const char *key, const lorasynci_member *m,
                                        const char *if_absent)
{
    const char *value = m ? m->value : if_absent;
    if (!value) return;
    lorasynci_writer_key(w, key);
    lorasynci_put(&w->raw, value, m ? m->value_size : strlen(value));
}

/* A member that has a value. */
LORASYNCI_FN const lorasynci_member *lorasynci_config_member(const lorasynci_members *m, const char *key)
{
    const lorasynci_member *found = lorasynci_members_find(m, key);
    return found && *found->value != 'n' ? found : NULL;
}

/* Puts all members of the config, changed where needed. Readers that insist on r and lora_alpha get them. */
LORASYNCI_FN void lorasynci_writer_members(lorasynci_config_writer *w, const lorasynci_members *m)
{
    static const char *const own[] = {"alpha_pattern",  "inference_mode", "lora_alpha", "r",
                                      "target_modules", "use_rslora"};
    const lorasynci_member  *r     = lorasynci_config_member(m, "r");
    int                      fold  = w->desc->fold_scale;
    size_t                   i, k;
    for (i = 0; i < m->num; i++) {
        for (k = 0; k < LORASYNCI_COUNT(own) && strcmp(m->at[i].key, own[k]) != 0; k++) {}
        if (k == LORASYNCI_COUNT(own)) lorasynci_writer_copy(w, m->at[i].key, &m->at[i], NULL);
    }
    lorasynci_writer_field(w, "inference_mode", "true");
    lorasynci_writer_copy(w, "r", r, "8");
    lorasynci_writer_copy(w, "lora_alpha", fold ? r : lorasynci_config_member(m, "lora_alpha"), "8");
    lorasynci_writer_copy(w, "alpha_pattern", lorasynci_members_find(m, fold ? "rank_pattern" : "alpha_pattern"),
                          fold ? "{}" : NULL);
    if (fold && w->desc->config->info.use_rslora) lorasynci_writer_field(w, "use_rslora", "false");
    else lorasynci_writer_copy(w, "use_rslora", lorasynci_members_find(m, "use_rslora"), NULL);
    if (w->desc->config->target.at)
        lorasynci_writer_copy(w, "target_modules", lorasynci_members_find(m, "target_modules"), NULL);
    else lorasynci_writer_target_modules(w);
}

LORASYNCI_FN lorasync_status lorasynci_writer_from_config(lorasynci_config_writer *w)
{
    const lorasync_config *c = w->desc->config;
    lorasynci_json         j;
    lorasynci_members      m;
    lorasync_status        status;
    LORASYNCI_TRY(lorasynci_config_check_pairs(c, &w->pairs, w->err));
    lorasynci_json_init(&j, c->text, strlen(c->text), w->err);
    status = lorasynci_members_read(&j, &w->a, &m);
    if (status >= 0) lorasynci_writer_members(w, &m);
    lorasynci_members_free(&m);
    return status;
}

/* -- writing without a config */

LORASYNCI_FN int lorasynci_rank_order(const void *x, const void *y)
{
    const int64_t a = *(const int64_t *)x, b = *(const int64_t *)y;
    return a < b ? -1 : a > b;
}

/* The most common rank, the smaller of two as common. */
LORASYNCI_FN lorasync_status lorasynci_writer_rank(lorasynci_config_writer *w, int64_t *out)
{
    int64_t *ranks = (int64_t *)lorasynci_alloc_array(&w->a, w->num_targets, sizeof *ranks);
    size_t   i, run = 0, best = 0;
    if (!ranks) return lorasynci_fail_memory(w->err, w->num_targets * sizeof *ranks);
    for (i = 0; i < w->num_targets; i++) ranks[i] = w->targets[i].rank;
    qsort(ranks, w->num_targets, sizeof *ranks, lorasynci_rank_order);
    for (i = 0; i < w->num_targets; i++) {
        run = i && ranks[i] == ranks[i - 1] ? run + 1 : 1;
        if (run > best) {
            best = run;
            *out = ranks[i];
        }
    }
    lorasynci_dealloc(&w->a, ranks);
    return LORASYNC_OK;
}

/* Puts the ranks other than r: by the name in target_modules where all its modules have one rank, else module by
   module. */
LORASYNCI_FN void lorasynci_writer_rank_pattern(lorasynci_config_writer *w, const char *key, int64_t r)
{
    size_t from, to, i, num = 0;
    lorasynci_writer_field(w, key, "{");
    for (from = 0; from < w->num_targets; from = to) {
        int same = 1;
        for (to = from; to < w->num_targets && strcmp(w->targets[to].name, w->targets[from].name) == 0; to++)
            same &= w->targets[to].rank == w->targets[from].rank;
        for (i = from; i < (same ? from + 1 : to); i++) {
            const char *name = same ? w->targets[i].name : w->targets[i].module;
            if (w->targets[i].rank == r) continue;
            if (num++) lorasynci_put_text(&w->raw, ",");
            lorasynci_json_put_string(&w->raw, name, strlen(name));
            lorasynci_put_format(&w->raw, ":%lld", (long long)w->targets[i].rank);
        }
    }
    lorasynci_put_text(&w->raw, "}");
}

LORASYNCI_FN int lorasynci_text_order(const void *x, const void *y)
{
    return strcmp(*(const char *const *)x, *(const char *const *)y);
}

/* Collects the modules of tensors that are no LoRA: they must be modules_to_save, unless there is LoRA on them as
   well. */
LORASYNCI_FN lorasync_status lorasynci_writer_saved(lorasynci_config_writer *w)
{
    size_t        num = w->pairs.num_others, i;
    lorasync_name name;
    w->saved      = (const char **)lorasynci_alloc_array(&w->a, num, sizeof *w->saved);
    w->saved_text = (char *)lorasynci_alloc_array(&w->a, num, sizeof name.module);
    if (!w->saved || !w->saved_text) return lorasynci_fail_memory(w->err, num * sizeof name.module);
    for (i = 0; i < num; i++) {
        char *to = w->saved_text + i * sizeof name.module;
        LORASYNCI_TRY(lorasync_parse_name(w->pairs.others[i]->name, &name, w->err));
        if (name.role == LORASYNC_ROLE_TRAINABLE_TOKENS)
            return lorasynci_fail(w->err, LORASYNC_E_CONFIG,
                                  "tensor \"%.200s\" needs trainable_token_indices: give the trainer's adapter config",
                                  w->pairs.others[i]->name);
        if (lorasynci_pairs_of(&w->pairs, name.module)) continue;
        memcpy(to, name.module, strlen(name.module) + 1);
        w->saved[w->num_saved++] = to;
    }
    qsort(w->saved, w->num_saved, sizeof *w->saved, lorasynci_text_order);
    return LORASYNC_OK;
}

LORASYNCI_FN void lorasynci_writer_modules_to_save(lorasynci_config_writer *w)
{
    size_t i;
    if (!w->num_saved) {
        lorasynci_writer_field(w, "modules_to_save", "null");
        return;
    }
    lorasynci_writer_field(w, "modules_to_save", "[");
    for (i = 0; i < w->num_saved; i++) {
        if (i && strcmp(w->saved[i], w->saved[i - 1]) == 0) continue;
        if (i) lorasynci_put_text(&w->raw, ",");
        lorasynci_json_put_string(&w->raw, w->saved[i], strlen(w->saved[i]));
    }
    lorasynci_put_text(&w->raw, "]");
}

/* Puts lora_alpha, as an integer when it is one. */
LORASYNCI_FN void lorasynci_writer_alpha(lorasynci_config_writer *w, double alpha)
{
    lorasynci_writer_key(w, "lora_alpha");
    if (alpha < 1e15 && !(floor(alpha) < alpha)) lorasynci_put_format(&w->raw, "%lld", (long long)alpha);
    else lorasynci_json_put_double(&w->raw, alpha);
}

LORASYNCI_FN lorasync_status lorasynci_writer_from_tensors(lorasynci_config_writer *w)
{
    const lorasync_config_write_desc *d    = w->desc;
    int64_t                           r    = 8;
    int                               bias = 0, dora = 0;
    size_t                            i;
    LORASYNCI_TRY(lorasynci_writer_rank(w, &r));
    LORASYNCI_TRY(lorasynci_writer_saved(w));
    for (i = 0; i < w->pairs.num; i++) {
        bias |= w->pairs.at[i].bias != NULL;
        dora |= w->pairs.at[i].magnitude != NULL;
    }
    lorasynci_writer_key(w, "base_model_name_or_path");
    if (d->base_model) lorasynci_json_put_string(&w->raw, d->base_model, strlen(d->base_model));
    else lorasynci_put_text(&w->raw, "null");
    lorasynci_writer_field(w, "bias", "\"none\"");
    lorasynci_writer_field(w, "fan_in_fan_out", "false");
    lorasynci_writer_field(w, "inference_mode", "true");
    lorasynci_writer_field(w, "init_lora_weights", "true");
    lorasynci_writer_field(w, "lora_dropout", "0.0");
    lorasynci_writer_field(w, "peft_type", "\"LORA\"");
    lorasynci_writer_field(w, "task_type", "null");
    lorasynci_writer_field(w, "use_dora", dora ? "true" : "false");
    lorasynci_writer_field(w, "use_rslora", "false");
    if (bias) lorasynci_writer_field(w, "lora_bias", "true"); /* old PEFT versions do not know the key */
    lorasynci_writer_alpha(w, d->fold_scale ? (double)r : d->lora_alpha);
    lorasynci_writer_key(w, "r");
    lorasynci_put_format(&w->raw, "%lld", (long long)r);
    lorasynci_writer_rank_pattern(w, "rank_pattern", r);
    if (d->fold_scale) lorasynci_writer_rank_pattern(w, "alpha_pattern", r);
    else lorasynci_writer_field(w, "alpha_pattern", "{}");
    lorasynci_writer_target_modules(w);
    lorasynci_writer_modules_to_save(w);
    return LORASYNC_OK;
}

/* -- the whole */

/* The written config must describe the tensors and give every module its scale. Sorting patterns can change which of
   two matches first. */
LORASYNCI_FN lorasync_status lorasynci_writer_verify(lorasynci_config_writer *w, const lorasync_config *written)
{
    size_t i;
    LORASYNCI_TRY(lorasynci_config_check_pairs(written, &w->pairs, w->err));
    for (i = 0; i < w->pairs.num; i++) {
        const char *module   = lorasynci_pair_module(&w->pairs, i);
        double      found    = lorasync_config_scale(written, module);
        double      expected = w->desc->fold_scale ? 1
                               : w->desc->config   ? lorasync_config_scale(w->desc->config, module)
                                                   : w->desc->lora_alpha / (double)w->pairs.at[i].a->shape[0];
        if (found < expected || found > expected)
            return lorasynci_fail(
                w->err, LORASYNC_E_CONFIG,
                "module \"%.200s\" has scale %g, but %g once the config is written: patterns that match it overlap, "
                "and PEFT "
                "sorts them; make each match its own modules only",
                module, expected, found);
    }
    return LORASYNC_OK;
}

/* Rewrites raw in Python's form into out and verifies it. */
LORASYNCI_FN lorasync_status lorasynci_writer_finish(lorasynci_config_writer *w, lorasynci_buffer *out)
{
    lorasync_config *written;
    lorasynci_json   j;
    lorasync_status  status;
    lorasynci_put_text(&w->raw, "}");
    if (w->raw.failed) return lorasynci_fail_memory(w->err, w->raw.size);
    lorasynci_json_init(&j, w->raw.data, w->raw.size, w->err);
    LORASYNCI_TRY(lorasynci_json_put_python(out, &j, 0));
    lorasynci_put(out, "", 1);
    if (out->failed) return lorasynci_fail_memory(w->err, out->size);
    status = lorasync_config_parse(out->data, out->size - 1, &w->a, &written, w->err);
    if (status >= 0) status = lorasynci_writer_verify(w, written);
    lorasync_config_free(written);
    if (status < 0) lorasynci_prefix(w->err, "the adapter config to publish");
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_writer_run(lorasynci_config_writer *w, const lorasync_tensor *tensors,
                                                  size_t num_tensors, lorasynci_buffer *out)
{
    LORASYNCI_TRY(lorasynci_pairs_read(&w->pairs, tensors, num_tensors, &w->a, w->err));
    LORASYNCI_TRY(lorasynci_writer_targets(w));
    lorasynci_put_text(&w->raw, "{");
    if (w->desc->config) LORASYNCI_TRY(lorasynci_writer_from_config(w));
    else LORASYNCI_TRY(lorasynci_writer_from_tensors(w));
    return lorasynci_writer_finish(w, out);
}

LORASYNC_API lorasync_status lorasync_config_write(const lorasync_config_write_desc *desc,
                                                   const lorasync_tensor *tensors, size_t num_tensors,
                                                   const lorasync_allocator *allocator, char **out, lorasync_error *err)
{
    lorasynci_config_writer w;
    lorasynci_buffer        text;
    lorasync_status         status;
    if (out) *out = NULL;
    memset(&w, 0, sizeof w);
    if (!desc || !out || (!tensors && num_tensors))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_config_write: desc, tensors and out must not be NULL");
    if (!lorasynci_take_allocator(allocator, &w.a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_config_write: the allocator has only one of its two functions");
    if (!desc->config && !(desc->lora_alpha > 0 && desc->lora_alpha < 1e300))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "lorasync_config_write: lora_alpha is %g; without a config it must be above 0",
                              desc->lora_alpha);
    w.desc = desc;
    w.err  = err;
    lorasynci_buffer_init(&w.raw, &w.a);
    lorasynci_buffer_init(&text, &w.a);
    w.pairs.a = w.a;
    status    = lorasynci_writer_run(&w, tensors, num_tensors, &text);
    lorasynci_pairs_free(&w.pairs);
    lorasynci_dealloc(&w.a, w.targets);
    lorasynci_dealloc(&w.a, w.saved);
    lorasynci_dealloc(&w.a, w.saved_text);
    lorasynci_buffer_free(&w.raw);
    if (status < 0) lorasynci_buffer_free(&text);
    else *out = text.data;
    return status;
}
/* ----------------------------------------------------------------------------------------------------- >>publish -- */

/* An image to any number of engines in two phases, and the transport that writes PEFT directories. Relies on support
   only.

       stage on every transport that has a commit, then on those whose stage is all     until here nobody serves the new
                                                                                        version
            | one fails: abort on it; when fewer than `need` can be left: abort on all others, last first: nobody will
       commit on each that is staged
            | one fails: abort on it; when fewer than `need` are left, and nobody serves the new version yet: abort on
            all others | and when somebody does: the others are committed, the text says who serves which; publishing
            the version again mends it

   So each stage is followed by one commit that succeeds or by one abort; only a transport without commit gets nothing
   after a success. */

/* A field of a caller's struct is there when its size covers it. */
#define LORASYNCI_COVERS(t, field) ((t)->size >= offsetof(lorasync_transport, field) + sizeof((t)->field))

/* Checks a caller's transport and copies what its size covers; the rest is NULL and the name never is. */
LORASYNCI_FN lorasync_status lorasynci_transport_copy(const lorasync_transport *given, lorasync_transport *out,
                                                      lorasync_error *err)
{
    lorasync_transport t;
    memset(&t, 0, sizeof t);
    if (!given) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "transport is NULL");
    if (!LORASYNCI_COVERS(given, stage)) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "transport: size is %zu, expected %zu; set it to sizeof(lorasync_transport)", given->size,
                              sizeof(lorasync_transport));
    }
    t.size  = sizeof t;
    t.name  = given->name ? given->name : "unnamed";
    t.user  = given->user;
    t.stage = given->stage;
    if (!t.stage) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "transport '%.100s' has no stage callback", t.name);
    if (LORASYNCI_COVERS(given, commit)) t.commit = given->commit;
    if (LORASYNCI_COVERS(given, abort)) t.abort = given->abort;
    if (LORASYNCI_COVERS(given, close)) t.close = given->close;
    if (LORASYNCI_COVERS(given, takes_buckets)) t.takes_buckets = given->takes_buckets;
    *out = t;
    return LORASYNC_OK;
}

#define LORASYNC_X(name, text)                                                                                         \
    case name: return text;
LORASYNC_API const char *lorasync_engine_state_text(lorasync_engine_state state)
{
    switch ((int)state) {
        LORASYNC_ENGINE_STATE_LIST(LORASYNC_X)
    default: return "unknown state";
    }
}
#undef LORASYNC_X

/* What is known of an engine before anything was published. The name is that of a copied transport. */
LORASYNCI_FN lorasync_engine_outcome lorasynci_new_outcome(const lorasync_transport *t)
{
    lorasync_engine_outcome o;
    memset(&o, 0, sizeof o);
    o.name = t->name;
    return o;
}

/* Adds an engine to a session's, or a stream's. */
LORASYNCI_FN lorasync_status lorasynci_put_engine(lorasynci_buffer *transports, lorasynci_buffer *outcomes,
                                                  const lorasync_transport *t, lorasync_error *err)
{
    lorasync_engine_outcome outcome = lorasynci_new_outcome(t);
    lorasynci_put(outcomes, &outcome, sizeof outcome);
    if (!outcomes->failed) lorasynci_put(transports, t, sizeof *t);
    return outcomes->failed || transports->failed ? lorasynci_fail_memory(err, sizeof outcome) : LORASYNC_OK;
}

/* The first failure of a call that only compile repeats: a parameter or an engine that is missing is not left out in
   silence. */
LORASYNCI_FN lorasync_status lorasynci_remember(lorasync_error *first, const lorasync_error *err)
{
    if (first->status == LORASYNC_OK) *first = *err;
    return err->status;
}

/* One run of publishing. Transport i is as transport_copy left it; outcome i goes on from the run before.

       transports  [ a      | b         | c      | d    ]   b has no commit: after the others
       outcomes    [ STAGED | COMMITTED | BEHIND | IDLE ]   in the middle of staging; num_possible is 3
                                                 ^ end[1]: those before it, of the transports with commit, were tried

   Between staging and committing the trainer's communicator is asked whether the others still wait; else all is
   aborted. Within a run STAGED means: owes a commit or an abort. Of an image in buckets each is staged in this way, and
   only the last one is committed; until then a transport without commit owes an abort too. */
typedef struct lorasynci_publication {
    const lorasync_transport *transports;
    lorasync_engine_outcome  *outcomes;
    size_t                    num;
    size_t                    need;        /* so many engines must take the image, or none shall */
    int                       behind_only; /* 1: leave those alone that serve this version */
    const lorasync_image     *image;
    const lorasync_comm      *comm;          /* the trainer's, asked before the first commit; NULL: nobody waits for
                                                this */
    uint64_t                  start_ns;      /* when its ranks were known to be there */
    lorasync_error            lost;          /* why they are not any more */
    size_t                    num_possible;  /* tried without failure, or not tried yet */
    size_t                    end[2];        /* of those without and with commit */
    int                       num_new;       /* serve the image's version now */
    const lorasync_error     *first_failure; /* an outcome's */
    char                      serve_new[80]; /* names of those that do */
    char                      in_doubt[80];  /* names of those whose commit failed */
} lorasynci_publication;

/* Adds a name to a list that is cut with "..." when it is full. */
LORASYNCI_FN void lorasynci_list_name(char *list, size_t size, const char *name)
{
    size_t used = strlen(list);
    int    n;
    if (used >= 3 && strcmp(list + used - 3, "...") == 0) return;
    n = snprintf(list + used, size - used, "%s%.40s", used ? ", " : "", name);
    if (n < 0 || (size_t)n >= size - used || used + (size_t)n + 6 > size)
        snprintf(list + used, size - used, "%s...", used ? ", " : "");
}

/* The verdict on a callback's return. Statuses of -100 and below speak of the trainer's communicator, which is fine:
   they become E_IO. */
LORASYNCI_FN lorasync_status lorasynci_called(const lorasync_transport *t, const char *what, lorasync_status status,
                                              const lorasync_error *inner, lorasync_error *err)
{
    const char *lost = lorasync_is_lost(status) ? lorasync_status_text(status) : "";
    if (status >= 0) return LORASYNC_OK;
    return lorasynci_fail(err, *lost ? LORASYNC_E_IO : status, "transport '%.60s' could not %s: %s%s%.220s", t->name,
                          what, lost, *lost ? ": " : "", inner->text[0] ? inner->text : lorasync_status_text(status));
}

/* One that knows nothing of buckets would publish the first as if it were all. */
LORASYNCI_FN lorasync_status lorasynci_check_buckets(const lorasync_transport *t, size_t num_buckets,
                                                     lorasync_error *err)
{
    if (num_buckets < 2 || t->takes_buckets) return LORASYNC_OK;
    return lorasynci_fail(
        err, LORASYNC_E_UNSUPPORTED,
        "transport '%.60s' does not take images in buckets, and this one has %zu; raise bucket_bytes, or use one with "
        "takes_buckets",
        t->name, num_buckets);
}

LORASYNCI_FN lorasync_status lorasynci_stage_one(const lorasync_transport *t, const lorasync_image *image,
                                                 lorasync_error *err)
{
    lorasync_error inner;
    LORASYNCI_TRY(lorasynci_check_buckets(t, image->num_buckets, err));
    memset(&inner, 0, sizeof inner);
    return lorasynci_called(t, "stage", t->stage(t->user, image, &inner), &inner, err);
}

LORASYNCI_FN lorasync_status lorasynci_commit_one(const lorasync_transport *t, const lorasync_image *image,
                                                  lorasync_error *err)
{
    lorasync_error inner;
    memset(&inner, 0, sizeof inner);
    return lorasynci_called(t, "commit", t->commit(t->user, image->adapter, image->version, &inner), &inner, err);
}

LORASYNCI_FN void lorasynci_abort_one(const lorasync_transport *t, const lorasync_image *image)
{
    if (t->abort) t->abort(t->user, image->adapter, image->version);
}

LORASYNCI_FN int lorasynci_takes_part(const lorasynci_publication *p, size_t i)
{
    return !p->behind_only || p->outcomes[i].version != p->image->version;
}

LORASYNCI_FN void lorasynci_serves(lorasynci_publication *p, size_t i)
{
    lorasync_engine_outcome *o = &p->outcomes[i];
    memset(&o->error, 0, sizeof o->error);
    o->state        = LORASYNC_ENGINE_COMMITTED;
    o->version      = p->image->version;
    o->num_failures = 0;
    p->num_new++;
    lorasynci_list_name(p->serve_new, sizeof p->serve_new, o->name);
}

/* outcome.error says why. What was staged, or half committed, is aborted at once. */
LORASYNCI_FN void lorasynci_missed(lorasynci_publication *p, size_t i)
{
    lorasync_engine_outcome *o = &p->outcomes[i];
    if (o->num_failures < 0x7fffffff) o->num_failures++;
    o->state = o->num_failures >= LORASYNC_DEAD_AFTER ? LORASYNC_ENGINE_DEAD : LORASYNC_ENGINE_BEHIND;
    if (!p->first_failure) p->first_failure = &o->error;
    p->num_possible--;
    lorasynci_abort_one(&p->transports[i], p->image);
}

/* After a failure: those that still owe a commit or an abort, last first. One without commit that has it all serves
   already and is left alone. */
LORASYNCI_FN void lorasynci_abort_all(lorasynci_publication *p)
{
    size_t i;
    for (i = p->num; i-- > 0;) {
        if (i >= p->end[p->transports[i].commit != NULL] || p->outcomes[i].state != LORASYNC_ENGINE_STAGED) continue;
        p->outcomes[i].num_failures = 0;
        lorasynci_abort_one(&p->transports[i], p->image);
    }
    p->end[0] = p->end[1] = 0; /* all is settled */
}

/* Stages on the transports with (without) commit. Ends early when too few are left. */
LORASYNCI_FN void lorasynci_stage_some(lorasynci_publication *p, int with_commit)
{
    size_t i;
    for (i = 0; i < p->num && p->num_possible >= p->need; i++) {
        const lorasync_transport *t = &p->transports[i];
        if ((t->commit != NULL) != with_commit || !lorasynci_takes_part(p, i)) continue;
        if (p->end[with_commit] <= i) p->end[with_commit] = i + 1;
        memset(&p->outcomes[i].error, 0, sizeof p->outcomes[i].error);
        if (lorasynci_stage_one(t, p->image, &p->outcomes[i].error) < 0) lorasynci_missed(p, i);
        else if (with_commit || p->image->bucket + 1 < p->image->num_buckets)
            p->outcomes[i].state = LORASYNC_ENGINE_STAGED;
        else lorasynci_serves(p, i);
    }
}

/* Commits where staged. Ends early only while that leaves every engine on the old version. */
LORASYNCI_FN void lorasynci_commit_all(lorasynci_publication *p)
{
    size_t i;
    for (i = 0; i < p->num && (p->num_possible >= p->need || p->num_new); i++) {
        lorasync_engine_outcome *o = &p->outcomes[i];
        if (!p->transports[i].commit || !lorasynci_takes_part(p, i) || o->state != LORASYNC_ENGINE_STAGED) continue;
        if (lorasynci_commit_one(&p->transports[i], p->image, &o->error) >= 0) {
            lorasynci_serves(p, i);
            continue;
        }
        o->version = 0; /* it may have happened, or not */
        lorasynci_list_name(p->in_doubt, sizeof p->in_doubt, o->name);
        lorasynci_missed(p, i);
    }
}

/* The error of the whole run: the first engine's, and who serves what. */
LORASYNCI_FN lorasync_status lorasynci_tell_who(const lorasynci_publication *p, lorasync_error *err)
{
    unsigned long long v = (unsigned long long)p->image->version;
    size_t             used, left;
    char              *end;
    if (!err) return p->first_failure->status;
    *err = *p->first_failure;
    if (p->need < p->num)
        lorasynci_prefix(err, "of %zu engines %zu could take version %llu, %zu must", p->num, p->num_possible, v,
                         p->need);
    if (!p->num_new && !p->in_doubt[0]) return err->status;
    err->text[230] = 0; /* room for the names */
    used           = strlen(err->text);
    end            = err->text + used;
    left           = sizeof err->text - used;
    if (p->num_new && p->in_doubt[0]) {
        snprintf(end, left, "; version %llu is served by: %s; maybe still the old one by: %s; publish %llu again", v,
                 p->serve_new, p->in_doubt, v);
    } else if (p->num_new) {
        snprintf(end, left, "; version %llu is already served by: %s; all others keep the old one", v, p->serve_new);
    } else {
        snprintf(end, left, "; version %llu was not committed anywhere else", v);
    }
    return err->status;
}

enum {
    LORASYNCI_QUICK_NS = 10000000
};

/* The last moment at which every engine keeps the old version. Ranks that gave up while the root was staging go on from
   that one: so must the engines. After a quick staging nobody is asked: that costs a few system calls for each rank,
   and all have voted just before. */
LORASYNCI_FN int lorasynci_may_commit(lorasynci_publication *p)
{
    lorasync_status status;
    if (p->num_possible < p->need || p->lost.status < 0) return 0;
    if (p->num_new || !p->num || !p->comm || !p->comm->check) return 1;
    if (lorasynci_now_ns() - p->start_ns < LORASYNCI_QUICK_NS) return 1;
    status         = p->comm->check(p->comm->user, &p->lost);
    p->lost.status = status < 0 && !lorasync_is_lost(status) ? LORASYNC_E_COMM : status;
    if (status >= 0) return 1;
    lorasynci_prefix(
        &p->lost,
        "version %llu was staged, and is published nowhere, since the other ranks do not wait for it any more",
        (unsigned long long)p->image->version);
    return 0;
}

LORASYNCI_FN void lorasynci_stage_all(lorasynci_publication *p)
{
    lorasynci_stage_some(p, 1);
    if (lorasynci_may_commit(p)) lorasynci_stage_some(p, 0);
}

/* After staging: the commits, or the aborts. */
LORASYNCI_FN lorasync_status lorasynci_publish_end(lorasynci_publication *p, lorasync_error *err)
{
    if (lorasynci_may_commit(p)) lorasynci_commit_all(p);
    if (p->num_possible >= p->need && p->lost.status == LORASYNC_OK) return LORASYNC_OK;
    lorasynci_abort_all(p);
    if (p->lost.status == LORASYNC_OK) return lorasynci_tell_who(p, err);
    if (err) *err = p->lost;
    return p->lost.status;
}

/* Brings the image to at least p->need transports or to none (see above); transports, outcomes, num, need, behind_only
   and image are given. p->num_new: how many took it. Allocates nothing. A status of -100 and below is p->lost: the
   communicator's. */
LORASYNCI_FN lorasync_status lorasynci_publish(lorasynci_publication *p, lorasync_error *err)
{
    p->num_possible = p->num;
    p->start_ns     = lorasynci_now_ns();
    lorasynci_stage_all(p);
    return lorasynci_publish_end(p, err);
}

/* How many engines are known to serve this version. */
LORASYNCI_FN size_t lorasynci_num_serving(const lorasync_engine_outcome *outcomes, size_t num, uint64_t version)
{
    size_t i, n = 0;
    for (i = 0; i < num; i++) n += outcomes[i].version == version;
    return n;
}

/* -- names in a published directory, shared with the engine */

#define LORASYNCI_MODEL_FILE "adapter_model.safetensors"
#define LORASYNCI_CONFIG_FILE "adapter_config.json"
#define LORASYNCI_BASE_FILE "model.safetensors"
#define LORASYNCI_BASE_INDEX "model.safetensors.index.json"
#define LORASYNCI_BASE_CONFIG "config.json"
#define LORASYNCI_MAX_DIRECTORY 3000

/* The end of a path, which tells most, short enough to leave room in an error text. */
LORASYNCI_FN const char *lorasynci_end_of(const char *path)
{
    size_t n = strlen(path);
    return n > 160 ? path + n - 160 : path;
}

/* The name becomes a directory below the user's. */
LORASYNCI_FN lorasync_status lorasynci_check_adapter_name(const char *name, lorasync_error *err)
{
    if (!name || !name[0])
        return lorasynci_fail(err, LORASYNC_E_NAME, "adapter name is empty; a directory is named after it");
    if (name[0] == '.' || strchr(name, '/') || strcmp(name, "latest") == 0 || strlen(name) > 200) {
        return lorasynci_fail(
            err, LORASYNC_E_NAME,
            "adapter name '%.100s' cannot name a directory: no \"/\", no leading \".\", not \"latest\", at most 200 "
            "long",
            name);
    }
    return LORASYNC_OK;
}

/* "v12" <-> 12. Only the spelling that version_name writes is one. 0 is no version. */
LORASYNCI_FN void lorasynci_version_name(char out[24], uint64_t version)
{
    snprintf(out, 24, "v%llu", (unsigned long long)version);
}

LORASYNCI_FN int lorasynci_parse_version(const char *text, uint64_t *out)
{
    uint64_t v = 0;
    size_t   i;
    if (text[0] != 'v' || text[1] < '1' || text[1] > '9') return 0;
    for (i = 1; text[i] >= '0' && text[i] <= '9'; i++) {
        uint64_t digit = (uint64_t)(text[i] - '0');
        if (v > (UINT64_MAX - digit) / 10) return 0;
        v = v * 10 + digit;
    }
    if (text[i]) return 0;
    *out = v;
    return 1;
}

/* The version that <root>/<adapter>/latest points to; 0 when there is no such link. */
LORASYNCI_FN lorasync_status lorasynci_read_latest(int adapter_fd, const char *root, const char *adapter, uint64_t *out,
                                                   lorasync_error *err)
{
    char        target[64];
    ssize_t     n      = readlinkat(adapter_fd, "latest", target, sizeof target - 1);
    int         reason = n < 0 ? errno : 0;
    const char *where  = lorasynci_end_of(root);
    *out               = 0;
    if (reason == ENOENT) return LORASYNC_OK;
    if (reason == EINVAL) {
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "%s/%.60s/latest is not a symbolic link to a version; move it away", where, adapter);
    }
    if (n < 0)
        return lorasynci_fail(err, LORASYNC_E_IO, "cannot read the link %s/%.60s/latest: %s", where, adapter,
                              strerror(reason));
    target[n] = 0;
    if (!lorasynci_parse_version(target, out)) {
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "%s/%.60s/latest points to '%s', expected v<number>; remove the link", where, adapter,
                              target);
    }
    return LORASYNC_OK;
}

/* A directory's file descriptor, or -1 with errno. */
LORASYNCI_FN int lorasynci_open_directory(int at, const char *path)
{
    return openat(at, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* To read the names in a directory from the first; close with closedir. (libc keeps a buffer for it.) */
LORASYNCI_FN DIR *lorasynci_list_directory(int fd)
{
    int  again = lorasynci_open_directory(fd, ".");
    DIR *list  = again < 0 ? NULL : fdopendir(again);
    if (!list && again >= 0) close(again);
    return list;
}

/* -- files: 0 or an errno */

LORASYNCI_FN int lorasynci_sync_fd(int fd)
{
    while (fsync(fd) != 0) {
        if (errno != EINTR) return errno;
    }
    return 0;
}

LORASYNCI_FN int lorasynci_write_all(int fd, const void *bytes, size_t num_bytes)
{
    const char *p = (const char *)bytes;
    while (num_bytes) {
        size_t  step = num_bytes < ((size_t)1 << 30) ? num_bytes : (size_t)1 << 30; /* some systems refuse 2 GiB at
                                                                                       once */
        ssize_t n    = write(fd, p, step);
        if (n < 0 && errno != EINTR) return errno;
        if (n > 0) {
            p += n;
            num_bytes -= (size_t)n;
        }
    }
    return 0;
}

/* Up to num_bytes from a file, fewer only at its end; -1 with errno. */
LORASYNCI_FN ssize_t lorasynci_read_some(int fd, void *out, size_t num_bytes)
{
    size_t have = 0;
    while (have < num_bytes) {
        ssize_t n = read(fd, (char *)out + have, num_bytes - have);
        if (n == 0) break;
        if (n < 0 && errno != EINTR) return -1;
        if (n > 0) have += (size_t)n;
    }
    return (ssize_t)have;
}

/* What a file shall hold: two runs of bytes, one behind the other. */
typedef struct lorasynci_content {
    const void *first;
    size_t      num_first;
    const void *second;
    size_t      num_second;
} lorasynci_content;

LORASYNCI_FN lorasynci_content lorasynci_model_content(const lorasync_image *image)
{
    lorasynci_content c;
    c.first      = image->header;
    c.num_first  = image->header_bytes;
    c.second     = image->payload;
    c.num_second = image->payload_bytes;
    return c;
}

LORASYNCI_FN lorasynci_content lorasynci_text_content(const char *text)
{
    lorasynci_content c;
    memset(&c, 0, sizeof c);
    c.first     = text;
    c.num_first = strlen(text);
    return c;
}

/* One file of a version. */
typedef struct lorasynci_file {
    char              name[64];
    lorasynci_content content;
} lorasynci_file;

enum {
    LORASYNCI_MAX_FILES = 3
};

/* The name of a file of base weights as Hugging Face counts them, from 1; a single one has no number. */
LORASYNCI_FN void lorasynci_bucket_file(char out[64], size_t bucket, size_t num_buckets)
{
    if (num_buckets > 1) snprintf(out, 64, "model-%05zu-of-%05zu.safetensors", bucket + 1, num_buckets);
    else snprintf(out, 64, "%s", LORASYNCI_BASE_FILE);
}

/* The files that come with an image: an adapter's two, or a bucket's one, and with the last bucket what describes them
   all. */
LORASYNCI_FN size_t lorasynci_files_of(const lorasync_image *image, lorasynci_file files[LORASYNCI_MAX_FILES])
{
    size_t num       = 1;
    int    adapter   = image->num_buckets == 0;
    files[0].content = lorasynci_model_content(image);
    if (adapter) snprintf(files[0].name, sizeof files[0].name, "%s", LORASYNCI_MODEL_FILE);
    else lorasynci_bucket_file(files[0].name, image->bucket, image->num_buckets);
    if (image->bucket + 1 < image->num_buckets) return num;
    if (adapter || (image->config_json && image->config_json[0])) {
        snprintf(files[num].name, sizeof files[num].name, "%s",
                 adapter ? LORASYNCI_CONFIG_FILE : LORASYNCI_BASE_CONFIG);
        files[num++].content = lorasynci_text_content(image->config_json);
    }
    if (image->num_buckets > 1) {
        snprintf(files[num].name, sizeof files[num].name, "%s", LORASYNCI_BASE_INDEX);
        files[num++].content = lorasynci_text_content(image->index_json);
    }
    return num;
}

/* 1 for a name that the above gives. */
LORASYNCI_FN int lorasynci_is_our_file(const char *name)
{
    static const char *const names[] = {LORASYNCI_MODEL_FILE, LORASYNCI_CONFIG_FILE, LORASYNCI_BASE_FILE,
                                        LORASYNCI_BASE_INDEX, LORASYNCI_BASE_CONFIG};
    char                     numbered[64];
    size_t                   i, bucket = 0, num = 0;
    for (i = 0; i < LORASYNCI_COUNT(names); i++)
        if (strcmp(name, names[i]) == 0) return 1;
    if (sscanf(name, "model-%5zu-of-%5zu.", &bucket, &num) != 2 || bucket < 1 || num < 2) return 0;
    lorasynci_bucket_file(numbered, bucket - 1, num);
    return strcmp(name, numbered) == 0;
}

LORASYNCI_FN int lorasynci_write_file(int dir_fd, const char *name, lorasynci_content content, int no_fsync)
{
    int failed, fd = openat(dir_fd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0) return errno;
    failed = lorasynci_write_all(fd, content.first, content.num_first);
    if (!failed) failed = lorasynci_write_all(fd, content.second, content.num_second);
    if (!failed && !no_fsync) failed = lorasynci_sync_fd(fd);
    if (close(fd) != 0 && !failed && errno != EINTR) failed = errno;
    return failed;
}

/* -- the directory transport

       <path>/<adapter>/            adapter_fd
            .stage-<pid>-v13/       being written
            v11/ v12/               whole, and never changed again
            latest -> v12
            .latest-<pid>           about to be renamed to latest
            .old-<pid>-v10.0/       being removed

   Every name with a leading "." may be removed at any time once its process is gone. */
typedef struct lorasynci_directory {
    lorasync_allocator a;
    char              *path;
    int                keep_versions;
    int                no_fsync;
    char               chunk[16384]; /* for comparing files */
} lorasynci_directory;

LORASYNCI_FN lorasync_status lorasynci_fail_file(lorasync_error *err, const lorasynci_directory *d, const char *what,
                                                 const char *adapter, const char *file, int reason)
{
    return lorasynci_fail(err, LORASYNC_E_IO, "cannot %s %s/%.60s%s%.80s: %s", what, lorasynci_end_of(d->path), adapter,
                          *file ? "/" : "", file, strerror(reason));
}

LORASYNCI_FN void lorasynci_stage_name(char out[64], uint64_t version)
{
    snprintf(out, 64, ".stage-%ld-v%llu", (long)getpid(), (unsigned long long)version);
}

/* Makes a directory that may exist; a new one's name is made durable through its parent. */
LORASYNCI_FN int lorasynci_make_directory(int at, const char *name, int no_fsync)
{
    int fd, parent, failed = 0;
    int made = mkdirat(at, name, 0755) == 0;
    if (!made && errno != EEXIST) return errno;
    if (!made || no_fsync) return 0;
    fd = lorasynci_open_directory(at, name);
    if (fd < 0) return errno;
    parent = lorasynci_open_directory(fd, "..");
    failed = parent < 0 ? errno : lorasynci_sync_fd(parent);
    if (parent >= 0) close(parent);
    close(fd);
    return failed;
}

/* Opens <path>/<adapter>, and makes both first if asked. */
LORASYNCI_FN lorasync_status lorasynci_adapter_directory(lorasynci_directory *d, const char *adapter, int make,
                                                         int *out_fd, lorasync_error *err)
{
    int failed = 0, root;
    LORASYNCI_TRY(lorasynci_check_adapter_name(adapter, err));
    if (make) failed = lorasynci_make_directory(AT_FDCWD, d->path, d->no_fsync);
    if (failed)
        return lorasynci_fail(err, LORASYNC_E_IO, "cannot make the directory %s: %s", lorasynci_end_of(d->path),
                              strerror(failed));
    root = lorasynci_open_directory(AT_FDCWD, d->path);
    if (root < 0)
        return lorasynci_fail(err, LORASYNC_E_IO, "cannot open the directory %s: %s", lorasynci_end_of(d->path),
                              strerror(errno));
    if (make) failed = lorasynci_make_directory(root, adapter, d->no_fsync);
    *out_fd = failed ? -1 : lorasynci_open_directory(root, adapter);
    if (!failed && *out_fd < 0) failed = errno;
    close(root);
    return failed ? lorasynci_fail_file(err, d, make ? "make the directory" : "open the directory", adapter, "", failed)
                  : LORASYNC_OK;
}

/* 0 if there is something of that name, else the errno. */
LORASYNCI_FN int lorasynci_look(int at, const char *name)
{
    struct stat st;
    return fstatat(at, name, &st, AT_SYMLINK_NOFOLLOW) == 0 ? 0 : errno;
}

/* Removes a directory and the files that this transport writes. Foreign files stay, and then the directory does. */
LORASYNCI_FN void lorasynci_remove(int adapter_fd, const char *name)
{
    int            fd   = openat(adapter_fd, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR           *list = fd < 0 ? NULL : lorasynci_list_directory(fd);
    struct dirent *entry;
    while (list && (entry = readdir(list)) != NULL)
        if (lorasynci_is_our_file(entry->d_name)) unlinkat(fd, entry->d_name, 0);
    if (list) closedir(list);
    if (fd >= 0) close(fd);
    unlinkat(adapter_fd, name, fd >= 0 ? AT_REMOVEDIR : 0);
}

/* Takes a version away: first its name, so that no reader sees half of it, then its files. 0 or an errno. */
LORASYNCI_FN int lorasynci_retire(int adapter_fd, const char *name)
{
    char old[80];
    int  i, failed = EEXIST;
    for (i = 0; i < 100 && (failed == EEXIST || failed == ENOTEMPTY); i++) { /* a leftover with foreign files may have
                                                                                the name */
        snprintf(old, sizeof old, ".old-%ld-%.30s.%d", (long)getpid(), name, i);
        failed = renameat(adapter_fd, name, adapter_fd, old) == 0 ? 0 : errno;
    }
    if (!failed) lorasynci_remove(adapter_fd, old);
    return failed;
}

/* 1 for a working name of a process that is gone, or of this one: it works on one version of an adapter at a time. */
LORASYNCI_FN int lorasynci_is_stale(const char *name)
{
    static const char *const prefixes[] = {".stage-", ".old-", ".latest-"};
    size_t                   i;
    for (i = 0; i < LORASYNCI_COUNT(prefixes); i++) {
        size_t n = strlen(prefixes[i]);
        long   pid;
        if (strncmp(name, prefixes[i], n) != 0) continue;
        pid = strtol(name + n, NULL, 10);
        if (pid <= 0 || pid > 0x7fffffffL) return 0;
        return pid == (long)getpid() || (kill((pid_t)pid, 0) != 0 && errno == ESRCH);
    }
    return 0;
}

LORASYNCI_FN void lorasynci_remove_stale(int adapter_fd)
{
    DIR           *list = lorasynci_list_directory(adapter_fd);
    struct dirent *entry;
    if (!list) return;
    while ((entry = readdir(list)) != NULL) {
        if (lorasynci_is_stale(entry->d_name)) lorasynci_remove(adapter_fd, entry->d_name);
    }
    closedir(list);
}

/* How many versions up to `latest` there are, and the oldest. */
LORASYNCI_FN size_t lorasynci_count_versions(int adapter_fd, uint64_t latest, uint64_t *out_oldest)
{
    DIR           *list = lorasynci_list_directory(adapter_fd);
    struct dirent *entry;
    size_t         num = 0;
    uint64_t       v;
    *out_oldest = latest;
    if (!list) return 0;
    while ((entry = readdir(list)) != NULL) {
        if (!lorasynci_parse_version(entry->d_name, &v) || v > latest) continue;
        num++;
        if (v < *out_oldest) *out_oldest = v;
    }
    closedir(list);
    return num;
}

/* Deletes the oldest versions beyond keep_versions. A version that cannot be deleted is left: nothing depends on it. */
LORASYNCI_FN void lorasynci_prune(const lorasynci_directory *d, int adapter_fd, uint64_t latest)
{
    char     name[24];
    uint64_t oldest;
    while (lorasynci_count_versions(adapter_fd, latest, &oldest) > (size_t)d->keep_versions && oldest < latest) {
        lorasynci_version_name(name, oldest);
        if (lorasynci_retire(adapter_fd, name) != 0) return;
    }
}

/* 1 if the bytes at fd go on like this. */
LORASYNCI_FN int lorasynci_same_bytes(lorasynci_directory *d, int fd, const void *bytes, size_t num_bytes)
{
    const char *p = (const char *)bytes;
    while (num_bytes) {
        size_t step = num_bytes < sizeof d->chunk ? num_bytes : sizeof d->chunk;
        if (lorasynci_read_some(fd, d->chunk, step) != (ssize_t)step || memcmp(d->chunk, p, step) != 0) return 0;
        p += step;
        num_bytes -= step;
    }
    return 1;
}

LORASYNCI_FN int lorasynci_same_file(lorasynci_directory *d, int dir_fd, const char *name, lorasynci_content content)
{
    int fd   = openat(dir_fd, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    int same = fd >= 0 && lorasynci_same_bytes(d, fd, content.first, content.num_first) &&
               lorasynci_same_bytes(d, fd, content.second, content.num_second) &&
               lorasynci_read_some(fd, d->chunk, 1) == 0;
    if (fd >= 0) close(fd);
    return same;
}

/* 1 if v<version> is there and holds exactly this image's files. */
LORASYNCI_FN int lorasynci_same_version(lorasynci_directory *d, int adapter_fd, const char *version,
                                        const lorasync_image *image)
{
    lorasynci_file files[LORASYNCI_MAX_FILES];
    size_t         i, num = lorasynci_files_of(image, files);
    int            fd = lorasynci_open_directory(adapter_fd, version), same = fd >= 0;
    for (i = 0; i < num && same; i++) same = lorasynci_same_file(d, fd, files[i].name, files[i].content);
    if (fd >= 0) close(fd);
    return same;
}

LORASYNCI_FN lorasync_status lorasynci_fail_newer(lorasync_error *err, const lorasynci_directory *d,
                                                  const char *adapter, uint64_t latest, uint64_t version)
{
    return lorasynci_fail(
        err, LORASYNC_E_VERSION,
        "%s/%.60s/latest is version %llu, which is newer than %llu; go on with a greater version, or publish elsewhere",
        lorasynci_end_of(d->path), adapter, (unsigned long long)latest, (unsigned long long)version);
}

LORASYNCI_FN lorasync_status lorasynci_fail_other(lorasync_error *err, const lorasynci_directory *d,
                                                  const char *adapter, const char *version)
{
    return lorasynci_fail(err, LORASYNC_E_VERSION,
                          "%s/%.60s/%s is published already, with other content; use a new version",
                          lorasynci_end_of(d->path), adapter, version);
}

/* Writes the image's files into the stage directory, which the first bucket makes. 0 or an errno; `file` is the path of
   what failed. */
LORASYNCI_FN int lorasynci_write_stage(const lorasynci_directory *d, int adapter_fd, const char *stage,
                                       const lorasync_image *image, char *file, size_t file_size)
{
    lorasynci_file files[LORASYNCI_MAX_FILES];
    size_t         i, num = lorasynci_files_of(image, files);
    int            failed = 0, fd;
    snprintf(file, file_size, "%s", stage);
    if (image->bucket == 0 && mkdirat(adapter_fd, stage, 0755) != 0) return errno;
    fd = openat(adapter_fd, stage, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) return errno;
    for (i = 0; i < num && !failed; i++) {
        snprintf(file, file_size, "%.63s/%.63s", stage, files[i].name);
        failed = lorasynci_write_file(fd, files[i].name, files[i].content, d->no_fsync);
    }
    if (!failed && !d->no_fsync) failed = lorasynci_sync_fd(fd);
    close(fd);
    return failed;
}

/* Leaves the image as a stage directory; or nothing, when an earlier try has left exactly this version. */
LORASYNCI_FN lorasync_status lorasynci_stage_at(lorasynci_directory *d, int adapter_fd, const lorasync_image *image,
                                                lorasync_error *err)
{
    char     version[24], stage[64], file[140];
    uint64_t latest;
    int      failed, staging;
    lorasynci_version_name(version, image->version);
    lorasynci_stage_name(stage, image->version);
    if (image->bucket == 0) lorasynci_remove_stale(adapter_fd);
    LORASYNCI_TRY(lorasynci_read_latest(adapter_fd, d->path, image->adapter, &latest, err));
    if (latest > image->version) return lorasynci_fail_newer(err, d, image->adapter, latest, image->version);
    staging = image->bucket && lorasynci_look(adapter_fd, stage) == 0; /* then the first bucket was not the one that is
                                                                          there */
    if (!staging && (image->num_buckets < 2 || latest == image->version) &&
        lorasynci_same_version(d, adapter_fd, version, image))
        return LORASYNC_OK;
    if (!staging && latest == image->version) {
        failed = lorasynci_look(adapter_fd, version);
        if (failed && failed != ENOENT) return lorasynci_fail_file(err, d, "look at", image->adapter, version, failed);
        if (!failed) return lorasynci_fail_other(err, d, image->adapter, version);
    }
    failed = lorasynci_write_stage(d, adapter_fd, stage, image, file, sizeof file);
    if (!failed) return LORASYNC_OK;
    lorasynci_remove(adapter_fd, stage);
    return lorasynci_fail_file(err, d, "write", image->adapter, file, failed);
}

/* What both built-in transports ask of an image. */
LORASYNCI_FN lorasync_status lorasynci_check_bytes(const lorasync_image *image, lorasync_error *err)
{
    LORASYNCI_TRY(lorasynci_refuse_delta(image, err));
    if (!image->header || (!image->payload && image->payload_bytes)) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "the image has no %s; bind one first",
                              image->header ? "payload" : "header");
    }
    if (image->on_device) {
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                              "the image is in device memory; this transport reads host memory, gather it there");
    }
    if (!image->version)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "the image has no version; stamp it with one above 0");
    return LORASYNC_OK;
}

/* And of an adapter's. */
LORASYNCI_FN lorasync_status lorasynci_check_publishable(const lorasync_image *image, lorasync_error *err)
{
    LORASYNCI_TRY(lorasynci_check_bytes(image, err));
    if (image->num_buckets) {
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "the image is a bucket of base weights; this transport publishes adapters, use a directory");
    }
    if (!image->config_json || !image->config_json[0]) {
        return lorasynci_fail(err, LORASYNC_E_CONFIG,
                              "the image has no config_json; an engine needs its adapter_config.json");
    }
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_directory_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    lorasynci_directory *d = (lorasynci_directory *)user;
    lorasync_status      status;
    int                  fd = -1;
    LORASYNCI_TRY(image->num_buckets ? lorasynci_check_bytes(image, err) : lorasynci_check_publishable(image, err));
    if (image->num_buckets > 1 && (!image->index_json || image->bucket >= image->num_buckets)) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "the image is bucket %zu of %zu and has %s index_json",
                              image->bucket, image->num_buckets, image->index_json ? "an" : "no");
    }
    LORASYNCI_TRY(lorasynci_adapter_directory(d, image->adapter, 1, &fd, err));
    status = lorasynci_stage_at(d, fd, image, err);
    close(fd);
    return status;
}

/* Points `latest` to a version: a new link, renamed over the old one. 0 or an errno. */
LORASYNCI_FN int lorasynci_swing_latest(const lorasynci_directory *d, int adapter_fd, const char *version)
{
    char link_name[40];
    snprintf(link_name, sizeof link_name, ".latest-%ld", (long)getpid());
    unlinkat(adapter_fd, link_name, 0);
    if (symlinkat(version, adapter_fd, link_name) != 0) return errno;
    if (renameat(adapter_fd, link_name, adapter_fd, "latest") != 0) {
        int failed = errno;
        unlinkat(adapter_fd, link_name, 0);
        return failed;
    }
    return d->no_fsync ? 0 : lorasynci_sync_fd(adapter_fd);
}

/* Gives the stage directory its name; what an interrupted try has left there, and nobody serves, goes. 0 or an errno,
   ENOENT when there is neither a stage directory nor an earlier try. */
LORASYNCI_FN int lorasynci_name_version(int adapter_fd, const char *stage, const char *name)
{
    int failed = renameat(adapter_fd, stage, adapter_fd, name) == 0 ? 0 : errno;
    if (failed == ENOENT) return lorasynci_look(adapter_fd, name); /* staging found it whole */
    if (failed != EEXIST && failed != ENOTEMPTY) return failed;
    failed = lorasynci_retire(adapter_fd, name);
    if (!failed && renameat(adapter_fd, stage, adapter_fd, name) != 0) failed = errno;
    return failed;
}

LORASYNCI_FN lorasync_status lorasynci_commit_at(lorasynci_directory *d, int adapter_fd, const char *adapter,
                                                 uint64_t version, lorasync_error *err)
{
    char     name[24], stage[64];
    uint64_t latest;
    int      failed;
    lorasynci_version_name(name, version);
    lorasynci_stage_name(stage, version);
    LORASYNCI_TRY(lorasynci_read_latest(adapter_fd, d->path, adapter, &latest, err));
    if (latest > version) return lorasynci_fail_newer(err, d, adapter, latest, version);
    if (latest == version && !lorasynci_look(adapter_fd, stage) && !lorasynci_look(adapter_fd, name)) {
        return lorasynci_fail_other(err, d, adapter, name); /* another publisher was here since staging */
    }
    failed = lorasynci_name_version(adapter_fd, stage, name);
    if (failed == ENOENT) {
        return lorasynci_fail(err, LORASYNC_E_STATE, "version %llu of '%.60s' was not staged in %s",
                              (unsigned long long)version, adapter, lorasynci_end_of(d->path));
    }
    if (!failed && !d->no_fsync) failed = lorasynci_sync_fd(adapter_fd);
    if (failed) return lorasynci_fail_file(err, d, "make", adapter, name, failed);
    if (latest != version) failed = lorasynci_swing_latest(d, adapter_fd, name);
    if (failed) return lorasynci_fail_file(err, d, "replace", adapter, "latest", failed);
    lorasynci_prune(d, adapter_fd, version);
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_directory_commit(void *user, const char *adapter, uint64_t version,
                                                        lorasync_error *err)
{
    lorasynci_directory *d = (lorasynci_directory *)user;
    lorasync_status      status;
    int                  fd = -1;
    LORASYNCI_TRY(lorasynci_adapter_directory(d, adapter, 0, &fd, err));
    status = lorasynci_commit_at(d, fd, adapter, version, err);
    close(fd);
    return status;
}

LORASYNCI_FN void lorasynci_directory_abort(void *user, const char *adapter, uint64_t version)
{
    char stage[64];
    int  fd = -1;
    if (lorasynci_adapter_directory((lorasynci_directory *)user, adapter, 0, &fd, NULL) < 0) return;
    lorasynci_stage_name(stage, version);
    lorasynci_remove(fd, stage);
    close(fd);
}

LORASYNCI_FN void lorasynci_directory_close(void *user)
{
    lorasynci_directory *d = (lorasynci_directory *)user;
    lorasync_allocator   a = d->a;
    lorasynci_dealloc(&a, d->path);
    lorasynci_dealloc(&a, d);
}

/* A copy of the path of a directory, or the reason why there is none. */
LORASYNCI_FN lorasync_status lorasynci_copy_directory(const lorasync_allocator *a, const char *directory, char **out,
                                                      lorasync_error *err)
{
    size_t n = directory ? strlen(directory) : 0;
    if (!n)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "directory is %s; name that of the adapters",
                              directory ? "empty" : "NULL");
    if (n > LORASYNCI_MAX_DIRECTORY) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "directory is %zu bytes long, at most %d: ...%s", n,
                              LORASYNCI_MAX_DIRECTORY, lorasynci_end_of(directory));
    }
    *out = lorasynci_copy_text(a, directory, n);
    return *out ? LORASYNC_OK : lorasynci_fail_memory(err, n + 1);
}

LORASYNC_API lorasync_status lorasync_directory_open(const lorasync_directory_desc *desc, lorasync_transport *out,
                                                     lorasync_error *err)
{
    lorasync_allocator   a;
    lorasynci_directory *d;
    char                *path;
    if (!desc || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_directory_open: %s is NULL", desc ? "out" : "desc");
    if (!lorasynci_take_allocator(desc->allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: give both alloc and free");
    if (desc->keep_versions < 0) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "keep_versions is %d, expected 0 or more", desc->keep_versions);
    }
    LORASYNCI_TRY(lorasynci_copy_directory(&a, desc->directory, &path, err));
    d = (lorasynci_directory *)lorasynci_alloc_array(&a, 1, sizeof *d);
    if (!d) {
        lorasynci_dealloc(&a, path);
        return lorasynci_fail_memory(err, sizeof *d);
    }
    d->a             = a;
    d->path          = path;
    d->keep_versions = desc->keep_versions ? desc->keep_versions : 3;
    d->no_fsync      = desc->no_fsync;
    memset(out, 0, sizeof *out);
    out->size          = sizeof *out;
    out->name          = path;
    out->user          = d;
    out->stage         = lorasynci_directory_stage;
    out->commit        = lorasynci_directory_commit;
    out->abort         = lorasynci_directory_abort;
    out->close         = lorasynci_directory_close;
    out->takes_buckets = 1;
    return LORASYNC_OK;
}

/* --------------------------------------------------------------------------------------------------------- >>shm -- */

/* The shared-memory transport: one publisher and any number of engines of one host and user. The publisher's side, and
   what the engine room needs to look at a published version. Relies on support and on the names and contents of
   publish.

       /lorasync-<name>            control   | magic | publisher | last serial | adapters | slots | readers |
       /lorasync-<name>@<serial>   a slot    | head, one page | header, payload | config_json, NUL | spare |
                                   or        | head, one page | header          | config_json, NUL | spare |   and the
                                   payload in device memory

       adapters  [ "default" word | "b" word | ... ]  word = number of commits << 12 | slot + 1; 0: nothing is published
       slots     [ serial, size, adapter | ... ]      a segment keeps its serial and size for life; serial 0: no segment
       readers   [ owner, a pin bit and an opened bit for each slot | ... ]    one per engine; owner 0: free

   A reader:     w = word;  pins[slot of w] = 1;  if word is still w, that slot is pinned;  else pins[slot of w] = 0 and
                 again.
   The publisher: take a slot that no word names and no living reader pins;  write it;  word = next number, slot.

   Why it is right: all of these are sequentially consistent and only the one publisher writes words. If the reader
   still sees w after its pin, then the publisher names another slot later, and looks at the pins later still: it sees
   the pin and leaves the slot. The number makes each word differ from all before, so that "still w" means that nothing
   was committed in between. A slot that is half written was never named; who takes over a publisher's place finds it
   unnamed and unpinned, and removes it. All zeros is a valid control, so that making one has no step that could be left
   half done.

   An owner is one word (lorasynci_process_self, and whether it locked), so that taking a dead owner's place is one
   compare and swap. A process of another container has no pid here: it holds a lock on a byte of the control, which the
   kernel drops when it ends.

   Device memory is freed in the order retired = 1; opened by no living reader?; free. A reader that opens some does
   opened = 1; retired?; open. One of both sees the other. A killed reader's bits go with its place. */
enum {
    LORASYNCI_SHM_ADAPTERS  = 64,
    LORASYNCI_SHM_SLOTS     = 1024,
    LORASYNCI_SHM_READERS   = 256,
    LORASYNCI_SHM_PINS      = LORASYNCI_SHM_SLOTS / 64,
    LORASYNCI_SHM_HEAD      = 4096,
    LORASYNCI_SHM_SPARE     = 65536, /* room for a longer config_json in the same slot */
    LORASYNCI_SHM_SLOT_BITS = 12,
    LORASYNCI_SHM_PATH      = 160,
    LORASYNCI_SHM_PUBLISHER = LORASYNCI_SHM_READERS /* its lock's byte; readers lock the byte of their number */
};

static const uint64_t lorasynci_shm_magic  = UINT64_C(0x6d68732d61726f01); /* layout 1 in the lowest byte */
static const uint64_t lorasynci_shm_locked = UINT64_C(1) << 16;

typedef struct lorasynci_shm_adapter {
    uint64_t word;      /* atomic. The commit point */
    char     name[208]; /* never changes while word is not 0 */
} lorasynci_shm_adapter;

typedef struct lorasynci_shm_segment {
    uint64_t serial, num_bytes, adapter; /* for which adapter it was made */
    uint64_t device_bytes;               /* 0: the payload lies in the segment, else in this much device memory */
    uint64_t retired;                    /* atomic. 1: the device memory is to be freed; who has it open and needs it no
                                            more closes it */
} lorasynci_shm_segment;

typedef struct lorasynci_shm_reader {
    uint64_t owner;                      /* atomic */
    uint64_t pins[LORASYNCI_SHM_PINS];   /* atomic. Only the owner's engine writes; without an owner they mean
                                            nothing */
    uint64_t opened[LORASYNCI_SHM_PINS]; /* the same, for slots whose device memory it has open, pinned or not */
} lorasynci_shm_reader;

typedef struct lorasynci_shm_control {
    uint64_t              magic, publisher; /* atomic */
    uint64_t              last_serial;
    lorasynci_shm_adapter adapters[LORASYNCI_SHM_ADAPTERS];
    lorasynci_shm_segment slots[LORASYNCI_SHM_SLOTS];
    lorasynci_shm_reader  readers[LORASYNCI_SHM_READERS];
} lorasynci_shm_control;

/* Device memory of a slot, written when the slot is made. */
typedef struct lorasynci_shm_memory {
    uint64_t num_bytes; /* 0: none */
    uint64_t owner;     /* the publisher */
    uint64_t pointer;   /* in its process; 0: freed */
    int64_t  ordinal;   /* of the GPU, in its process */
    char     gpu[24];   /* the GPU for all processes: its PCI address */
    char     handle[64];
} lorasynci_shm_memory;

/* The first bytes of a slot. */
typedef struct lorasynci_shm_head {
    uint64_t magic, version, image_bytes,
        config_bytes;                   /* in the segment: of a payload in device memory the image's header only; with
                                           the NUL */
    uint64_t             payload_bytes; /* in device memory */
    lorasynci_shm_memory memory;
} lorasynci_shm_head;

/* The slot that a word names; -1 when it names none, also when it is damaged. */
LORASYNCI_FN int lorasynci_shm_slot_of(uint64_t word)
{
    int slot = (int)(word & (((uint64_t)1 << LORASYNCI_SHM_SLOT_BITS) - 1)) - 1;
    return slot < LORASYNCI_SHM_SLOTS ? slot : -1;
}

/* -- names */

LORASYNCI_FN lorasync_status lorasynci_shm_check_name(const char *name, lorasync_error *err)
{
    size_t n = name ? strlen(name) : 0;
    if (!n)
        return lorasynci_fail(err, LORASYNC_E_NAME, "the shared memory's name is %s; give one like \"policy\"",
                              name ? "empty" : "NULL");
    if (n > 100 || name[0] == '.' ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != n) {
        return lorasynci_fail(
            err, LORASYNC_E_NAME,
            "'%.110s' cannot name shared memory: up to 100 letters, digits, \".\", \"_\" and \"-\", not \".\" first",
            name);
    }
    return LORASYNC_OK;
}

/* The control's name for serial 0, else the slot's. */
LORASYNCI_FN void lorasynci_shm_path(char out[LORASYNCI_SHM_PATH], const char *name, uint64_t serial)
{
    if (serial) snprintf(out, LORASYNCI_SHM_PATH, "/lorasync-%.100s@%llu", name, (unsigned long long)serial);
    else snprintf(out, LORASYNCI_SHM_PATH, "/lorasync-%.100s", name);
}

/* -- who lives */

/* A lock that belongs to the open file, not to the process: 0 for success. F_UNLCK gives it back. */
LORASYNCI_FN int lorasynci_shm_lock(int fd, int byte, short type, int ask, int *out_held)
{
#if defined(__linux__) && defined(__LP64__)
    struct flock lock;
    int          failed;
    memset(&lock, 0, sizeof lock);
    lock.l_type   = type;
    lock.l_whence = SEEK_SET;
    lock.l_start  = byte;
    lock.l_len    = 1;
    failed        = fcntl(fd, ask ? 36 : 37, &lock) != 0; /* F_OFD_GETLK, F_OFD_SETLK, which <fcntl.h> may hide */
    *out_held     = !failed && lock.l_type != F_UNLCK;
    return failed;
#else
    (void)fd, (void)byte, (void)type, (void)ask;
    *out_held = 0;
    return 1;
#endif
}

/* Whether two owners are one process: the locked bit says nothing about that. */
LORASYNCI_FN int lorasynci_shm_is_same_owner(uint64_t a, uint64_t b) { return ((a ^ b) & ~lorasynci_shm_locked) == 0; }

/* 1 unless it is certain that the owner is gone. */
LORASYNCI_FN int lorasynci_shm_lives(int fd, int byte, uint64_t owner, uint64_t self)
{
    int held;
    if (!lorasynci_process_is_foreign(owner, self)) return !lorasynci_process_ended(owner, self);
    return !(owner & lorasynci_shm_locked) || lorasynci_shm_lock(fd, byte, F_WRLCK, 1, &held) != 0 || held;
}

/* Takes a place that nobody living has. 0, or the owner who has it. */
LORASYNCI_FN uint64_t lorasynci_shm_claim(int fd, int byte, uint64_t *place, uint64_t self, uint64_t *out_mine)
{
    for (;;) {
        uint64_t old = __atomic_load_n(place, __ATOMIC_SEQ_CST), mine = self;
        int      held;
        if (old && lorasynci_shm_lives(fd, byte, old, self)) return old;
        if (lorasynci_shm_lock(fd, byte, F_WRLCK, 0, &held) == 0)
            mine |= lorasynci_shm_locked; /* before the claim: who sees one sees both */
        if (__atomic_compare_exchange_n(place, &old, mine, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            *out_mine = mine;
            return 0;
        }
        lorasynci_shm_lock(fd, byte, F_UNLCK, 0, &held);
    }
}

LORASYNCI_FN void lorasynci_shm_disown(uint64_t *place, uint64_t mine)
{
    __atomic_compare_exchange_n(place, &mine, (uint64_t)0, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* -- segments */

LORASYNCI_FN lorasync_status lorasynci_shm_fail(lorasync_error *err, const char *what, const char *path, int reason)
{
    return lorasynci_fail(err, reason == ENOENT ? LORASYNC_E_NOT_FOUND : LORASYNC_E_IO,
                          "cannot %s shared memory %s: %s", what, path, strerror(reason));
}

/* Opens one that this user owns and nobody else may touch. */
LORASYNCI_FN lorasync_status lorasynci_shm_open_segment(const char *path, int flags, int *out_fd, struct stat *out_st,
                                                        lorasync_error *err)
{
    int reason, fd = shm_open(path, flags, 0600);
    if (fd < 0) return lorasynci_shm_fail(err, "open", path, errno);
    reason = fstat(fd, out_st) == 0 ? 0 : errno;
    if (!reason && flags & O_CREAT && out_st->st_size == 0 && out_st->st_uid == geteuid()) { /* whatever the umask
                                                                                                took */
        reason = fchmod(fd, 0600) == 0 && fstat(fd, out_st) == 0 ? 0 : errno;
    }
    if (!reason && out_st->st_uid == geteuid() && (out_st->st_mode & 0777) == 0600) {
        *out_fd = fd;
        return LORASYNC_OK;
    }
    close(fd);
    if (reason) return lorasynci_shm_fail(err, "look at", path, reason);
    if (out_st->st_uid != geteuid()) {
        return lorasynci_fail(
            err, LORASYNC_E_IO,
            "shared memory %s belongs to user %ld, expected %ld; run both sides as one user, or use another name", path,
            (long)out_st->st_uid, (long)geteuid());
    }
    return lorasynci_fail(err, LORASYNC_E_IO,
                          "shared memory %s has mode %03o, expected 600; remove it with lorasync_shm_remove", path,
                          (unsigned)(out_st->st_mode & 0777));
}

/* Gives a segment its size with memory behind it, which later could only fail with SIGBUS; the size shows when all of
   it is there. 0 or an errno. */
LORASYNCI_FN int lorasynci_shm_reserve(int fd, size_t num_bytes)
{
    off_t size = (off_t)num_bytes;
    int   failed;
    if (size < 0 || (size_t)size != num_bytes) return EFBIG;
    do {
#if defined(__APPLE__)
        failed = ftruncate(fd, size) == 0 ? 0 : errno;
#else
        failed = posix_fallocate(fd, 0, size);
#endif
    } while (failed == EINTR);
    return failed;
}

LORASYNCI_FN void *lorasynci_shm_map_fd(int fd, size_t num_bytes, int writable, int *out_reason)
{
    int   flags = MAP_SHARED;
    void *map;
#if defined(MAP_POPULATE)
    if (num_bytes > sizeof(lorasynci_shm_control))
        flags |= MAP_POPULATE; /* slots: the pages are there, enter them at
                                                                             once */
#endif
    map         = mmap(NULL, num_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, flags, fd, 0);
    *out_reason = map == MAP_FAILED ? errno : 0;
    return map == MAP_FAILED ? NULL : map;
}

/* -- the control */

typedef struct lorasynci_shm_map {
    lorasynci_shm_control *control; /* NULL: not mapped */
    int                    fd;
    nlink_t                links;
} lorasynci_shm_map;

/* 1 if its name was removed, or the memory behind it. */
LORASYNCI_FN int lorasynci_shm_is_removed(const lorasynci_shm_map *m)
{
    struct stat st;
    return fstat(m->fd, &st) != 0 || st.st_nlink < m->links || (uintmax_t)st.st_size < sizeof *m->control;
}

LORASYNCI_FN void lorasynci_shm_detach(lorasynci_shm_map *m)
{
    if (!m->control) return;
    munmap(m->control, sizeof *m->control);
    close(m->fd);
    m->control = NULL;
}

/* LORASYNC_NOTHING_NEW for a control that is being made. */
LORASYNCI_FN lorasync_status lorasynci_shm_check_magic(uint64_t magic, const char *path, lorasync_error *err)
{
    if (magic == lorasynci_shm_magic) return LORASYNC_OK;
    if (magic == 0) return LORASYNC_NOTHING_NEW;
    if (magic >> 8 == lorasynci_shm_magic >> 8) {
        return lorasynci_fail(
            err, LORASYNC_E_FORMAT,
            "shared memory %s has layout %d, expected %d; use one lorasync.h on both sides and remove it with "
            "lorasync_shm_remove",
            path, (int)(magic & 0xff), (int)(lorasynci_shm_magic & 0xff));
    }
    return lorasynci_fail(
        err, LORASYNC_E_FORMAT,
        "shared memory %s was not made by lorasync: it begins with %016llx, expected %016llx; use another name", path,
        (unsigned long long)magic, (unsigned long long)lorasynci_shm_magic);
}

/* Looks at an open segment before it is mapped. A publisher gives an empty one its size; any number may do so at
   once. */
LORASYNCI_FN lorasync_status lorasynci_shm_check_size(int fd, const char *path, int create, const struct stat *st,
                                                      lorasync_error *err)
{
    size_t size = sizeof(lorasynci_shm_control);
    if (st->st_size == 0 && create) {
        int failed = lorasynci_shm_reserve(fd, size);
        return failed ? lorasynci_shm_fail(err, "make room for", path, failed) : LORASYNC_OK;
    }
    if (st->st_size == 0) return LORASYNC_NOTHING_NEW;
    if ((uintmax_t)st->st_size == size) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_FORMAT,
                          "shared memory %s has %llu bytes, expected %zu; remove it with lorasync_shm_remove", path,
                          (unsigned long long)st->st_size, size);
}

/* Maps the control. Without `create`, LORASYNC_NOTHING_NEW when there is none yet. */
LORASYNCI_FN lorasync_status lorasynci_shm_attach(const char *name, int create, lorasynci_shm_map *out,
                                                  lorasync_error *err)
{
    char              path[LORASYNCI_SHM_PATH];
    struct stat       st;
    lorasynci_shm_map m;
    lorasync_status   status;
    uint64_t          magic = 0;
    int               reason;
    memset(&m, 0, sizeof m);
    lorasynci_shm_path(path, name, 0);
    status = lorasynci_shm_open_segment(path, create ? O_RDWR | O_CREAT : O_RDWR, &m.fd, &st, err);
    if (status == LORASYNC_E_NOT_FOUND && !create) return LORASYNC_NOTHING_NEW;
    if (status < 0) return status;
    m.links = st.st_nlink;
    status  = lorasynci_shm_check_size(m.fd, path, create, &st, err);
    if (status == LORASYNC_OK) {
        m.control = (lorasynci_shm_control *)lorasynci_shm_map_fd(m.fd, sizeof *m.control, 1, &reason);
        if (!m.control) status = lorasynci_shm_fail(err, "map", path, reason);
    }
    if (status != LORASYNC_OK) {
        close(m.fd);
        return status;
    }
    if (create)
        __atomic_compare_exchange_n(&m.control->magic, &magic, lorasynci_shm_magic, 0, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST);
    status = lorasynci_shm_check_magic(__atomic_load_n(&m.control->magic, __ATOMIC_SEQ_CST), path, err);
    if (status != LORASYNC_OK) lorasynci_shm_detach(&m);
    else *out = m;
    return status;
}

/* Maps the control and takes the publisher's place. Without `create`, LORASYNC_NOTHING_NEW when there is no control. */
LORASYNCI_FN lorasync_status lorasynci_shm_take(const char *name, int create, lorasynci_shm_map *out,
                                                uint64_t *out_mine, lorasync_error *err)
{
    uint64_t self = lorasynci_process_self();
    for (;;) {
        uint64_t        other;
        lorasync_status status = lorasynci_shm_attach(name, create, out, err);
        if (status != LORASYNC_OK) return status;
        other = lorasynci_shm_claim(out->fd, LORASYNCI_SHM_PUBLISHER, &out->control->publisher, self, out_mine);
        if (!other && !lorasynci_shm_is_removed(out)) return LORASYNC_OK;
        if (!other) lorasynci_shm_disown(&out->control->publisher, *out_mine);
        lorasynci_shm_detach(out);
        if (!other) continue; /* it was being removed */
        if (lorasynci_shm_is_same_owner(other, self)) {
            return lorasynci_fail(
                err, LORASYNC_E_BUSY,
                "shared memory '%s' has a publisher, this very process %ld; attach that transport to the session of "
                "each adapter, or close it, or use another name",
                name, lorasynci_process_pid(other));
        }
        return lorasynci_fail(
            err, LORASYNC_E_BUSY,
            "shared memory '%s' has a publisher, process %ld; one at a time: close it or end it, or use another name",
            name, lorasynci_process_pid(other));
    }
}

LORASYNCI_FN void lorasynci_shm_mark(uint64_t *bits, int slot)
{
    if (slot >= 0) bits[slot / 64] |= (uint64_t)1 << (slot % 64);
}

LORASYNCI_FN int lorasynci_shm_is_marked(const uint64_t *bits, int slot)
{
    return (int)(bits[slot / 64] >> (slot % 64) & 1);
}

/* -- removing */

/* The slots of the control, and where segments are files also those that it does not know. */
LORASYNCI_FN void lorasynci_shm_unlink_slots(const char *name, const lorasynci_shm_control *c)
{
    char           path[LORASYNCI_SHM_PATH];
    DIR           *list;
    struct dirent *entry;
    size_t         n;
    int            i;
    for (i = 0; c && i < LORASYNCI_SHM_SLOTS; i++) {
        if (!c->slots[i].serial) continue;
        lorasynci_shm_path(path, name, c->slots[i].serial);
        shm_unlink(path);
    }
    list = opendir("/dev/shm");
    if (!list) return;
    n = (size_t)snprintf(path, sizeof path, "/lorasync-%.100s@", name);
    while ((entry = readdir(list)) != NULL) {
        if (strncmp(entry->d_name, path + 1, n - 1) != 0 || strlen(entry->d_name) >= sizeof path - 1) continue;
        strcpy(path + 1, entry->d_name);
        shm_unlink(path);
        path[n] = 0;
    }
    closedir(list);
}

LORASYNC_API lorasync_status lorasync_shm_remove(const char *name, lorasync_error *err)
{
    char              path[LORASYNCI_SHM_PATH];
    lorasynci_shm_map map;
    lorasync_error    why; /* the caller's stays untouched when what is damaged, or a stranger's, is removed */
    uint64_t          mine   = 0;
    int               reason = 0;
    LORASYNCI_TRY(lorasynci_shm_check_name(name, err));
    memset(&map, 0, sizeof map);
    if (lorasynci_shm_take(name, 0, &map, &mine, &why) == LORASYNC_E_BUSY) {
        if (err) *err = why;
        return LORASYNC_E_BUSY;
    }
    lorasynci_shm_path(path, name, 0);
    lorasynci_shm_unlink_slots(name, map.control); /* first: once the control is gone the name is another publisher's */
    if (shm_unlink(path) != 0) reason = errno;
    if (map.control) lorasynci_shm_disown(&map.control->publisher, mine);
    lorasynci_shm_detach(&map);
    return reason ? lorasynci_shm_fail(err, "remove", path, reason) : LORASYNC_OK;
}

/* -- the publisher

   What it keeps for each adapter beside the control: the slot that the next stage will fill, and the one that is
   staged. Both are slots that no word names; a publisher that dies loses nothing with them. */
typedef struct lorasynci_shm_place {
    int      next, staged; /* slots, or -1 */
    uint64_t version;      /* that is staged */
} lorasynci_shm_place;

/* A session that publishes an adapter here: two would gather into one slot. */
typedef struct lorasynci_shm_lease {
    const void *session; /* NULL: nobody's */
    const char *adapter; /* the session's text */
} lorasynci_shm_lease;

typedef struct lorasynci_shm {
    lorasync_allocator  a;
    int                 num_users; /* atomic. Sessions that it is attached to: each closes it */
    lorasynci_shm_lease leases[LORASYNCI_SHM_ADAPTERS];
    lorasynci_shm_map   map;
    char                name[104];
    uint64_t            mine; /* as it stands in the control */
    int                 num_slots;
    lorasynci_shm_place places[LORASYNCI_SHM_ADAPTERS];
    uint64_t            used[LORASYNCI_SHM_PINS]; /* a bit per slot, by lorasynci_shm_look */
    uint64_t others[LORASYNCI_SHM_PINS];  /* slots of an earlier transport of this process that somebody may still
                                             write: see clear */
    void    *memory[LORASYNCI_SHM_SLOTS]; /* mapped slots; NULL: not yet. Kept, so that their pages stay entered */
    size_t   sizes[LORASYNCI_SHM_SLOTS];
    lorasynci_gpu *device;                        /* NULL: payloads in the segments */
    size_t         payload_bytes;                 /* of the image that is being staged to the device */
    char          *payloads[LORASYNCI_SHM_SLOTS]; /* device memory that is this process's; NULL: not, or not looked
                                                        at yet */
    int            stuck;                         /* the last copy to the device did not end well: freeing memory
                                                        could wait for ever */
} lorasynci_shm;

LORASYNCI_FN lorasynci_shm_head *lorasynci_shm_head_of(const lorasynci_shm *s, int slot)
{
    return (lorasynci_shm_head *)s->memory[slot];
}

LORASYNCI_FN char *lorasynci_shm_image_of(const lorasynci_shm *s, int slot)
{
    return (char *)s->memory[slot] + LORASYNCI_SHM_HEAD;
}

/* The device's part, below; without CUDA these refuse or do nothing. */
LORASYNCI_FN lorasync_status lorasynci_shm_make_payload(lorasynci_shm *s, int slot, lorasync_error *err);
LORASYNCI_FN void            lorasynci_shm_free_payload(lorasynci_shm *s, int slot);
LORASYNCI_FN int             lorasynci_shm_have_payload(lorasynci_shm *s, int slot);
LORASYNCI_FN int             lorasynci_shm_retire(lorasynci_shm *s, int slot);
LORASYNCI_FN int             lorasynci_shm_payload_fits(const lorasynci_shm *s, const lorasynci_shm_segment *g);

/* A fork has the parent's mappings, but not its place. */
LORASYNCI_FN lorasync_status lorasynci_shm_check_mine(const lorasynci_shm *s, lorasync_error *err)
{
    if (lorasynci_process_pid(s->mine) != (long)getpid()) {
        return lorasynci_fail(err, LORASYNC_E_STATE,
                              "shared memory '%s' was opened by process %ld; publish there, not in a fork of it",
                              s->name, lorasynci_process_pid(s->mine));
    }
    if (!lorasynci_shm_is_removed(&s->map)) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_STATE,
                          "shared memory '%s' was removed while it was in use; close the transport and open it again",
                          s->name);
}

/* -- slots */

LORASYNCI_FN int lorasynci_shm_is_open(lorasynci_shm *s, int slot);

/* Marks the slots that must not be touched. With `bury`, readers that are dead lose their pins; that costs a few system
   calls for each. */
LORASYNCI_FN void lorasynci_shm_look(lorasynci_shm *s, int bury)
{
    lorasynci_shm_control *c = s->map.control;
    int                    i, k;
    memset(s->used, 0, sizeof s->used);
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) {
        lorasynci_shm_mark(s->used, lorasynci_shm_slot_of(__atomic_load_n(&c->adapters[i].word, __ATOMIC_SEQ_CST)));
        lorasynci_shm_mark(s->used, s->places[i].next);
        lorasynci_shm_mark(s->used, s->places[i].staged);
    }
    for (i = 0; i < LORASYNCI_SHM_READERS; i++) {
        lorasynci_shm_reader *r     = &c->readers[i];
        uint64_t              owner = __atomic_load_n(&r->owner, __ATOMIC_SEQ_CST);
        if (owner && bury && !lorasynci_shm_lives(s->map.fd, i, owner, s->mine)) {
            lorasynci_shm_disown(&r->owner, owner); /* its pins stay; the next owner begins by clearing them */
            owner = __atomic_load_n(&r->owner, __ATOMIC_SEQ_CST);
        }
        for (k = 0; owner && k < LORASYNCI_SHM_PINS; k++) s->used[k] |= __atomic_load_n(&r->pins[k], __ATOMIC_SEQ_CST);
    }
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) {
        if (!lorasynci_shm_is_marked(s->others, i)) continue;
        if (lorasynci_shm_is_open(s, i)) lorasynci_shm_mark(s->used, i);
        else s->others[i / 64] &= ~((uint64_t)1 << (i % 64));
    }
}

LORASYNCI_FN void lorasynci_shm_drop_slot(lorasynci_shm *s, int slot)
{
    lorasynci_shm_segment *g = &s->map.control->slots[slot];
    char                   path[LORASYNCI_SHM_PATH];
    lorasynci_shm_free_payload(s, slot);
    if (s->memory[slot]) munmap(s->memory[slot], s->sizes[slot]);
    s->memory[slot] = NULL;
    lorasynci_shm_path(path, s->name, g->serial);
    if (g->serial) shm_unlink(path);
    g->serial = 0;
}

/* Maps an open slot. */
LORASYNCI_FN lorasync_status lorasynci_shm_enter_slot(lorasynci_shm *s, int slot, int fd, const char *path,
                                                      lorasync_error *err)
{
    lorasynci_shm_segment *g      = &s->map.control->slots[slot];
    int                    failed = lorasynci_shm_reserve(fd, (size_t)g->num_bytes);
    if (!failed) s->memory[slot] = lorasynci_shm_map_fd(fd, (size_t)g->num_bytes, 1, &failed);
    s->sizes[slot] = (size_t)g->num_bytes;
    if (!failed) return LORASYNC_OK;
    return lorasynci_fail(
        err, LORASYNC_E_IO,
        "no room for %llu bytes of shared memory %s: %s; enlarge /dev/shm, or have readers release versions",
        (unsigned long long)g->num_bytes, path, strerror(failed));
}

/* Maps a slot that stands in the control. 0 when there is no such segment: a publisher was killed in between, or
   somebody removed it. */
LORASYNCI_FN int lorasynci_shm_have_slot(lorasynci_shm *s, int slot)
{
    const lorasynci_shm_segment *g = &s->map.control->slots[slot];
    char                         path[LORASYNCI_SHM_PATH];
    struct stat                  st;
    int                          fd = -1;
    if (!g->serial) return 0;
    if (s->memory[slot]) return s->sizes[slot] == g->num_bytes;
    lorasynci_shm_path(path, s->name, g->serial);
    if (g->num_bytes < LORASYNCI_SHM_HEAD || g->num_bytes > SIZE_MAX) return 0;
    if (lorasynci_shm_open_segment(path, O_RDWR, &fd, &st, NULL) < 0) return 0;
    if ((uintmax_t)st.st_size == g->num_bytes) lorasynci_shm_enter_slot(s, slot, fd, path, NULL);
    close(fd);
    return s->memory[slot] != NULL;
}

/* Another one for each control: an engine that looks at a control which has just been removed must not find the next
   one's slots. */
LORASYNCI_FN uint64_t lorasynci_shm_first_serial(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* Makes the segment of an empty slot. It stands in the control before it is there, so that none is ever forgotten. */
LORASYNCI_FN lorasync_status lorasynci_shm_make_slot(lorasynci_shm *s, int slot, int adapter, size_t num_bytes,
                                                     lorasync_error *err)
{
    lorasynci_shm_control *c = s->map.control;
    lorasynci_shm_segment *g = &c->slots[slot];
    char                   path[LORASYNCI_SHM_PATH];
    struct stat            st;
    lorasync_status        status;
    int                    fd = -1;
    if (!c->last_serial) c->last_serial = lorasynci_shm_first_serial();
    g->num_bytes    = num_bytes;
    g->adapter      = (uint64_t)adapter;
    g->device_bytes = g->retired = 0;
    g->serial                    = ++c->last_serial;
    lorasynci_shm_path(path, s->name, g->serial);
    status = lorasynci_shm_open_segment(path, O_RDWR | O_CREAT | O_EXCL, &fd, &st, err);
    if (status >= 0) {
        status = lorasynci_shm_enter_slot(s, slot, fd, path, err);
        close(fd);
    }
    if (status >= 0 && s->device) status = lorasynci_shm_make_payload(s, slot, err);
    if (status < 0) lorasynci_shm_drop_slot(s, slot);
    return status;
}

/* What a slot needs for an image and its config. 0 when it does not fit. */
LORASYNCI_FN size_t lorasynci_shm_need(size_t image_bytes, size_t config_bytes)
{
    size_t n;
    if (!lorasynci_checked_add(image_bytes, config_bytes, &n) || n > SIZE_MAX / 4) return 0;
    return n + LORASYNCI_SHM_HEAD;
}

/* The size of a new slot: the spare lets a config grow. */
LORASYNCI_FN size_t lorasynci_shm_size(size_t need)
{
    return (need + LORASYNCI_SHM_SPARE + LORASYNCI_SHM_HEAD - 1) / LORASYNCI_SHM_HEAD * LORASYNCI_SHM_HEAD;
}

LORASYNCI_FN int lorasynci_shm_fits(const lorasynci_shm *s, const lorasynci_shm_segment *g, size_t need)
{
    return g->num_bytes >= need && g->num_bytes / 2 <= lorasynci_shm_size(need) && lorasynci_shm_payload_fits(s, g);
}

/* Removes the unused slots of an adapter that do not fit, and those that fit beyond `keep` slots in all. */
LORASYNCI_FN void lorasynci_shm_trim(lorasynci_shm *s, int adapter, size_t need, int keep)
{
    lorasynci_shm_control *c = s->map.control;
    int                    i, num = 0;
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) num += c->slots[i].serial && c->slots[i].adapter == (uint64_t)adapter;
    for (i = LORASYNCI_SHM_SLOTS; i-- > 0;) {
        const lorasynci_shm_segment *g = &c->slots[i];
        if (!g->serial || g->adapter != (uint64_t)adapter || lorasynci_shm_is_marked(s->used, i)) continue;
        if (lorasynci_shm_fits(s, g, need) && num <= keep) continue;
        if (!lorasynci_shm_retire(s, i)) continue; /* an engine has it open */
        lorasynci_shm_drop_slot(s, i);
        num--;
    }
}

/* An unused slot of the adapter that fits and is there; -1 when there is none. */
LORASYNCI_FN int lorasynci_shm_unused(lorasynci_shm *s, int adapter, size_t need)
{
    const lorasynci_shm_control *c = s->map.control;
    int                          i;
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) {
        const lorasynci_shm_segment *g = &c->slots[i];
        if (!g->serial || g->adapter != (uint64_t)adapter || lorasynci_shm_is_marked(s->used, i) ||
            !lorasynci_shm_fits(s, g, need))
            continue;
        if (lorasynci_shm_have_slot(s, i) && lorasynci_shm_have_payload(s, i)) return i;
        lorasynci_shm_drop_slot(s, i);
    }
    return -1;
}

/* A new slot. */
LORASYNCI_FN lorasync_status lorasynci_shm_grow(lorasynci_shm *s, int adapter, size_t need, int *out,
                                                lorasync_error *err)
{
    const lorasynci_shm_control *c = s->map.control;
    int                          i = 0;
    while (i < LORASYNCI_SHM_SLOTS && c->slots[i].serial) i++;
    if (i == LORASYNCI_SHM_SLOTS) {
        return lorasynci_fail(
            err, LORASYNC_E_BUSY,
            "shared memory '%s' has %d slots and readers hold all of them; have them release old versions", s->name,
            LORASYNCI_SHM_SLOTS);
    }
    *out = i;
    return lorasynci_shm_make_slot(s, i, adapter, lorasynci_shm_size(need), err);
}

/* Makes places[adapter].next a slot that fits: the one it is, one that is warm, one of a dead reader, a new one. */
LORASYNCI_FN lorasync_status lorasynci_shm_pick(lorasynci_shm *s, int adapter, size_t need, lorasync_error *err)
{
    lorasynci_shm_place *p = &s->places[adapter];
    int                  slot;
    if (p->next >= 0 && lorasynci_shm_fits(s, &s->map.control->slots[p->next], need)) return LORASYNC_OK;
    lorasynci_shm_look(s, 0); /* marks p->next too: the image may lie there */
    slot = lorasynci_shm_unused(s, adapter, need);
    if (slot < 0) {
        lorasynci_shm_look(s, 1);
        lorasynci_shm_trim(s, adapter, need, LORASYNCI_SHM_SLOTS);
        slot = lorasynci_shm_unused(s, adapter, need);
    }
    if (slot < 0) LORASYNCI_TRY(lorasynci_shm_grow(s, adapter, need, &slot, err));
    p->next = slot;
    lorasynci_shm_mark(s->used, slot);
    lorasynci_shm_trim(s, adapter, need, s->num_slots);
    return LORASYNC_OK;
}

/* -- adapters */

/* The place of a name in the table; -1 when it has none. */
LORASYNCI_FN int lorasynci_shm_find(const lorasynci_shm *s, const char *adapter)
{
    int i;
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) {
        const lorasynci_shm_adapter *entry = &s->map.control->adapters[i];
        const lorasynci_shm_place   *p     = &s->places[i];
        if (!entry->word && p->next < 0 && p->staged < 0) continue;
        if (strncmp(entry->name, adapter, sizeof entry->name) == 0) return i;
    }
    return -1;
}

/* The same, and enters a new name. Engines do not look at it before its first commit. */
LORASYNCI_FN lorasync_status lorasynci_shm_enter(lorasynci_shm *s, const char *adapter, int *out, lorasync_error *err)
{
    int i;
    LORASYNCI_TRY(lorasynci_check_adapter_name(adapter, err));
    *out = lorasynci_shm_find(s, adapter);
    for (i = 0; *out < 0 && i < LORASYNCI_SHM_ADAPTERS; i++) {
        lorasynci_shm_adapter *entry = &s->map.control->adapters[i];
        if (entry->word || s->places[i].next >= 0 || s->places[i].staged >= 0) continue;
        memset(entry->name, 0, sizeof entry->name);
        memcpy(entry->name, adapter, strlen(adapter));
        *out = i;
    }
    if (*out >= 0) return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_BUSY,
                          "shared memory '%s' holds %d adapters already, '%.60s' finds no place; use another name",
                          s->name, LORASYNCI_SHM_ADAPTERS, adapter);
}

/* The slot that is served, mapped; -1 when there is none, or when its segment has been removed by hand. */
LORASYNCI_FN int lorasynci_shm_served(lorasynci_shm *s, int adapter)
{
    int slot = lorasynci_shm_slot_of(s->map.control->adapters[adapter].word);
    return slot >= 0 && lorasynci_shm_have_slot(s, slot) && lorasynci_shm_head_of(s, slot)->magic == lorasynci_shm_magic
               ? slot
               : -1;
}

/* The same, where a slot that is there and cannot be mapped now is an error: without it a stage would not see that a
   newer version is served. */
LORASYNCI_FN lorasync_status lorasynci_shm_find_served(lorasynci_shm *s, int adapter, int *out, lorasync_error *err)
{
    int             slot = lorasynci_shm_slot_of(s->map.control->adapters[adapter].word), fd;
    char            path[LORASYNCI_SHM_PATH];
    struct stat     st;
    lorasync_status status;
    *out = lorasynci_shm_served(s, adapter);
    if (*out >= 0 || slot < 0 || s->memory[slot]) return LORASYNC_OK;
    lorasynci_shm_path(path, s->name, s->map.control->slots[slot].serial);
    status = lorasynci_shm_open_segment(path, O_RDWR, &fd, &st, err);
    if (status == LORASYNC_E_NOT_FOUND) return LORASYNC_OK; /* removed by hand */
    if (status < 0) return status;
    close(fd);
    if ((uintmax_t)st.st_size != s->map.control->slots[slot].num_bytes) return LORASYNC_OK; /* damaged */
    return lorasynci_fail(
        err, LORASYNC_E_IO,
        "cannot map shared memory %s, which holds the version that is served; free memory and try again", path);
}

LORASYNCI_FN int lorasynci_shm_same(const lorasynci_shm *s, int slot, const lorasync_image *image)
{
    const lorasynci_shm_head *h       = lorasynci_shm_head_of(s, slot);
    const char               *memory  = lorasynci_shm_image_of(s, slot);
    size_t                    config  = strlen(image->config_json) + 1;
    uint64_t                  in_slot = s->sizes[slot] - LORASYNCI_SHM_HEAD;
    int on_device                     = h->memory.num_bytes || image->on_device; /* then the digest in the header speaks
                                                                                    for the payload */
    if (h->image_bytes + h->payload_bytes != (uint64_t)image->header_bytes + image->payload_bytes ||
        h->config_bytes != config)
        return 0;
    if (h->image_bytes > in_slot || config > in_slot - h->image_bytes || image->header_bytes > in_slot ||
        (on_device && !image->has_digest))
        return 0;
    return memcmp(memory, image->header, image->header_bytes) == 0 &&
           (!image->payload_bytes || on_device ||
            memcmp(memory + image->header_bytes, image->payload, image->payload_bytes) == 0) &&
           memcmp(memory + h->image_bytes, image->config_json, config) == 0;
}

/* -- payloads in device memory: the publisher's side */

#ifdef LORASYNC_CUDA

LORASYNCI_FN lorasync_status lorasynci_shm_allocate(lorasynci_shm *s, int slot, size_t num_bytes, lorasync_error *err)
{
    lorasynci_shm_memory *m = &lorasynci_shm_head_of(s, slot)->memory;
    void                 *p = NULL;
    LORASYNCI_CUDA(cudaMalloc(&p, num_bytes), "memory for a slot");
    s->payloads[slot] = (char *)p;
    LORASYNCI_CUDA(cudaIpcGetMemHandle((cudaIpcMemHandle_t *)(void *)m->handle, p),
                   "this GPU's memory cannot be shared over CUDA IPC; publish in host memory");
    LORASYNCI_CUDA(cudaDeviceGetPCIBusId(m->gpu, (int)sizeof m->gpu, s->device->ordinal), "cudaDeviceGetPCIBusId");
    m->owner     = s->mine;
    m->pointer   = (uint64_t)(uintptr_t)p;
    m->ordinal   = s->device->ordinal;
    m->num_bytes = num_bytes;
    return LORASYNC_OK;
}

/* Gives a new slot its device memory. */
LORASYNCI_FN lorasync_status lorasynci_shm_make_payload(lorasynci_shm *s, int slot, lorasync_error *err)
{
    size_t          n = s->payload_bytes ? s->payload_bytes : 1;
    lorasync_status status;
    int             old;
    if (n > SIZE_MAX - 256) return lorasynci_fail_memory(err, n);
    n      = (n + 255) / 256 * 256;
    old    = lorasynci_gpu_enter(s->device->ordinal);
    status = lorasynci_shm_allocate(s, slot, n, err);
    lorasynci_gpu_leave(s->device->ordinal, old);
    if (status >= 0) s->map.control->slots[slot].device_bytes = n;
    return status;
}

/* Frees it. No engine has it open. */
LORASYNCI_FN void lorasynci_shm_free_payload(lorasynci_shm *s, int slot)
{
    int old;
    if (!s->payloads[slot]) return;
    lorasynci_shm_head_of(s, slot)->memory.pointer = 0;
    old                                            = lorasynci_gpu_enter(s->device->ordinal);
    if (!s->stuck) cudaFree(s->payloads[slot]); /* would wait for the copy */
    lorasynci_gpu_leave(s->device->ordinal, old);
    (void)cudaGetLastError();
    s->payloads[slot] = NULL;
}

/* The device memory of a mapped slot, if it is this process's: also what an earlier transport of the process has
   left. */
LORASYNCI_FN char *lorasynci_shm_find_payload(lorasynci_shm *s, int slot)
{
    const lorasynci_shm_memory *m = &lorasynci_shm_head_of(s, slot)->memory;
    if (!s->payloads[slot] && m->num_bytes && m->num_bytes == s->map.control->slots[slot].device_bytes &&
        m->ordinal == s->device->ordinal && lorasynci_shm_is_same_owner(m->owner, s->mine)) {
        s->payloads[slot] = (char *)(uintptr_t)m->pointer;
    }
    return s->payloads[slot];
}

LORASYNCI_FN lorasync_status lorasynci_shm_enqueue(lorasynci_shm *s, int slot, const lorasync_image *image,
                                                   lorasync_error *err)
{
    lorasynci_gpu *g = s->device;
    LORASYNCI_CUDA(cudaEventRecord(g->ready, g->caller), "cudaEventRecord");
    LORASYNCI_CUDA(cudaStreamWaitEvent(g->stream, g->ready, 0), "cudaStreamWaitEvent");
    if (!image->payload_bytes) return LORASYNC_OK;
    LORASYNCI_CUDA(
        cudaMemcpyAsync(s->payloads[slot], image->payload, image->payload_bytes, cudaMemcpyDefault, g->stream),
        "copying the payload into a slot");
    return LORASYNC_OK;
}

/* Starts the copy of the payload. */
LORASYNCI_FN lorasync_status lorasynci_shm_copy_begin(lorasynci_shm *s, int slot, const lorasync_image *image,
                                                      lorasync_error *err)
{
    lorasync_status status;
    int             old;
    old    = lorasynci_gpu_enter(s->device->ordinal);
    status = lorasynci_shm_enqueue(s, slot, image, err);
    lorasynci_gpu_leave(s->device->ordinal, old);
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_shm_copy_end(lorasynci_shm *s, lorasync_error *err)
{
    lorasync_status status;
    int             old;
    old      = lorasynci_gpu_enter(s->device->ordinal);
    status   = lorasynci_gpu_drain(s->device, "copying the payload into a slot", err);
    s->stuck = status < 0;
    lorasynci_gpu_leave(s->device->ordinal, old);
    return status;
}

#else

LORASYNCI_FN lorasync_status lorasynci_shm_make_payload(lorasynci_shm *s, int slot, lorasync_error *err)
{
    (void)s, (void)slot, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN void  lorasynci_shm_free_payload(lorasynci_shm *s, int slot) { (void)s, (void)slot; }
LORASYNCI_FN char *lorasynci_shm_find_payload(lorasynci_shm *s, int slot)
{
    (void)s, (void)slot;
    return NULL;
}
LORASYNCI_FN lorasync_status lorasynci_shm_copy_begin(lorasynci_shm *s, int slot, const lorasync_image *image,
                                                      lorasync_error *err)
{
    (void)s, (void)slot, (void)image, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_shm_copy_end(lorasynci_shm *s, lorasync_error *err)
{
    (void)s, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}

#endif

LORASYNCI_FN int lorasynci_shm_payload_fits(const lorasynci_shm *s, const lorasynci_shm_segment *g)
{
    if (!s->device) return g->device_bytes == 0;
    return g->device_bytes >= s->payload_bytes && g->device_bytes != 0 &&
           g->device_bytes / 2 <= (uint64_t)s->payload_bytes + LORASYNCI_SHM_SPARE;
}

/* 1 while an engine that lives has a slot's device memory open. Engines that are dead lose their places here. */
LORASYNCI_FN int lorasynci_shm_is_open(lorasynci_shm *s, int slot)
{
    int i;
    for (i = 0; i < LORASYNCI_SHM_READERS; i++) {
        lorasynci_shm_reader *r     = &s->map.control->readers[i];
        uint64_t              owner = __atomic_load_n(&r->owner, __ATOMIC_SEQ_CST);
        if (!owner || !(__atomic_load_n(&r->opened[slot / 64], __ATOMIC_SEQ_CST) >> (slot % 64) & 1)) continue;
        if (lorasynci_shm_lives(s->map.fd, i, owner, s->mine)) return 1;
        lorasynci_shm_disown(&r->owner, owner);
    }
    return 0;
}

/* Whether a slot can be written. Device memory must be this process's own, on the device in use; it then is out of
   retirement. */
LORASYNCI_FN int lorasynci_shm_have_payload(lorasynci_shm *s, int slot)
{
    lorasynci_shm_segment *g = &s->map.control->slots[slot];
    if (!s->device) return g->device_bytes == 0;
    if (!lorasynci_shm_find_payload(s, slot)) return 0;
    __atomic_store_n(&g->retired, (uint64_t)0, __ATOMIC_SEQ_CST);
    return 1;
}

/* Takes a slot's device memory out of use. 0 while an engine has it open and it must not be freed; engines see the mark
   at their next poll. */
LORASYNCI_FN int lorasynci_shm_retire(lorasynci_shm *s, int slot)
{
    if (!s->device || !s->map.control->slots[slot].device_bytes || !lorasynci_shm_have_slot(s, slot) ||
        !lorasynci_shm_find_payload(s, slot))
        return 1;
    __atomic_store_n(&s->map.control->slots[slot].retired, (uint64_t)1, __ATOMIC_SEQ_CST);
    return !lorasynci_shm_is_open(s, slot);
}

/* 1 if the slot holds this very version, but in device memory that nobody can open any more. */
LORASYNCI_FN int lorasynci_shm_is_lost(const lorasynci_shm *s, int slot, const lorasync_image *image)
{
    const lorasynci_shm_head *h = lorasynci_shm_head_of(s, slot);
    if (!h->memory.num_bytes || h->version != image->version || !lorasynci_shm_same(s, slot, image)) return 0;
    return !h->memory.pointer || s->map.control->slots[slot].retired ||
           !lorasynci_shm_lives(s->map.fd, LORASYNCI_SHM_PUBLISHER, h->memory.owner, s->mine);
}

LORASYNCI_FN lorasync_status lorasynci_shm_check_image(const lorasynci_shm *s, const lorasync_image *image,
                                                       lorasync_error *err)
{
    lorasync_image plain = *image;
    if (s->device) plain.on_device = 0;
    return lorasynci_check_publishable(&plain, err);
}

/* What close leaves: slots that engines have open, with their memory; of the others only those that are named,
   without. */
LORASYNCI_FN void lorasynci_shm_leave_payloads(lorasynci_shm *s)
{
    int i, mine = lorasynci_process_pid(s->mine) == (long)getpid();
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) s->places[i].next = s->places[i].staged = -1;
    if (mine && s->device) lorasynci_shm_look(s, 0);
    for (i = 0; mine && s->device && i < LORASYNCI_SHM_SLOTS; i++) {
        if (!s->payloads[i]) continue;
        if (lorasynci_shm_retire(s, i)) {
            lorasynci_shm_free_payload(s, i);
            if (!lorasynci_shm_is_marked(s->used, i)) lorasynci_shm_drop_slot(s, i);
        } else if (lorasynci_shm_is_marked(s->used, i)) {
            __atomic_store_n(&s->map.control->slots[i].retired, (uint64_t)0, __ATOMIC_SEQ_CST); /* served on while the
                                                                                                   process lives */
        }
    }
    lorasynci_gpu_close(&s->a, s->device);
}

/* -- the transport */

/* What was staged is not wanted. Its slot stays taken: the image that was staged without a copy lies there. */
LORASYNCI_FN void lorasynci_shm_unstage(lorasynci_shm_place *p)
{
    if (p->next < 0) p->next = p->staged;
    p->staged = -1;
}

/* Copies what is not in the slot already. */
LORASYNCI_FN void lorasynci_shm_fill(lorasynci_shm *s, int slot, const lorasync_image *image)
{
    lorasynci_shm_head *h      = lorasynci_shm_head_of(s, slot);
    char               *memory = lorasynci_shm_image_of(s, slot);
    h->magic                   = lorasynci_shm_magic;
    h->version                 = image->version;
    h->payload_bytes           = s->device ? image->payload_bytes : 0;
    if (!s->device) memset(&h->memory, 0, sizeof h->memory);
    h->image_bytes  = (uint64_t)image->header_bytes + image->payload_bytes - h->payload_bytes;
    h->config_bytes = strlen(image->config_json) + 1;
    if (image->payload_bytes && !s->device && image->payload != memory + image->header_bytes) {
        memmove(memory + image->header_bytes, image->payload, image->payload_bytes);
    }
    if (image->header != memory) memcpy(memory, image->header, image->header_bytes);
    memcpy(memory + h->image_bytes, image->config_json, (size_t)h->config_bytes);
}

LORASYNCI_FN lorasync_status lorasynci_shm_stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    lorasynci_shm *s = (lorasynci_shm *)user;
    size_t         bytes, need = 0;
    int            adapter = -1, served, copies;
    LORASYNCI_TRY(lorasynci_shm_check_image(s, image, err));
    LORASYNCI_TRY(lorasynci_shm_check_mine(s, err));
    LORASYNCI_TRY(lorasynci_shm_enter(s, image->adapter, &adapter, err));
    lorasynci_shm_unstage(&s->places[adapter]);
    LORASYNCI_TRY(lorasynci_shm_find_served(s, adapter, &served, err));
    if (served >= 0 && lorasynci_shm_head_of(s, served)->version >= image->version &&
        !lorasynci_shm_is_lost(s, served, image)) {
        uint64_t now = lorasynci_shm_head_of(s, served)->version;
        if (now == image->version && lorasynci_shm_same(s, served, image)) return LORASYNC_OK;
        return lorasynci_fail(
            err, LORASYNC_E_VERSION,
            now == image->version
                ? "'%.60s' in shared memory '%s' is version %llu already, with other content than this %llu; use a new "
                  "version"
                : "'%.60s' in shared memory '%s' is version %llu, which is newer than %llu; go on with a greater "
                  "version, or publish elsewhere",
            image->adapter, s->name, (unsigned long long)now, (unsigned long long)image->version);
    }
    s->payload_bytes = image->payload_bytes;
    if (lorasynci_checked_add(image->header_bytes, s->device ? 0 : image->payload_bytes, &bytes))
        need = lorasynci_shm_need(bytes, strlen(image->config_json) + 1);
    if (!need) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "the image does not fit memory");
    LORASYNCI_TRY(lorasynci_shm_pick(s, adapter, need, err));
    copies =
        s->device && image->payload != s->payloads[s->places[adapter].next]; /* a gather into the slot has ended before
                                                                                it is published */
    if (copies) LORASYNCI_TRY(lorasynci_shm_copy_begin(s, s->places[adapter].next, image, err));
    lorasynci_shm_fill(s, s->places[adapter].next, image);
    if (copies) LORASYNCI_TRY(lorasynci_shm_copy_end(s, err));
    s->places[adapter].staged  = s->places[adapter].next;
    s->places[adapter].version = image->version;
    s->places[adapter].next    = -1;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_shm_commit(void *user, const char *adapter, uint64_t version,
                                                  lorasync_error *err)
{
    lorasynci_shm       *s = (lorasynci_shm *)user;
    lorasynci_shm_place *p;
    uint64_t            *word;
    int                  i, served;
    LORASYNCI_TRY(lorasynci_check_adapter_name(adapter, err));
    LORASYNCI_TRY(lorasynci_shm_check_mine(s, err));
    i = lorasynci_shm_find(s, adapter);
    p = i < 0 ? NULL : &s->places[i];
    if (!p || p->staged < 0 || p->version != version) {
        served = p ? lorasynci_shm_served(s, i) : -1;
        if (served >= 0 && lorasynci_shm_head_of(s, served)->version == version)
            return LORASYNC_OK; /* staging found it
                                                                                                        served */
        return lorasynci_fail(err, LORASYNC_E_STATE, "version %llu of '%.60s' was not staged in shared memory '%s'",
                              (unsigned long long)version, adapter, s->name);
    }
    word = &s->map.control->adapters[i].word;
    __atomic_store_n(word,
                     ((*word >> LORASYNCI_SHM_SLOT_BITS) + 1) << LORASYNCI_SHM_SLOT_BITS | (uint64_t)(p->staged + 1),
                     __ATOMIC_SEQ_CST);
    p->staged = -1;
    return LORASYNC_OK;
}

LORASYNCI_FN void lorasynci_shm_abort(void *user, const char *adapter, uint64_t version)
{
    lorasynci_shm *s = (lorasynci_shm *)user;
    int            i = adapter ? lorasynci_shm_find(s, adapter) : -1;
    if (i >= 0 && s->places[i].version == version) lorasynci_shm_unstage(&s->places[i]);
}

/* A slot as other processes find it. */
typedef struct lorasynci_shm_target {
    char                 name[104]; /* of the shared memory */
    int64_t              slot;
    uint64_t             serial;     /* 0: there is none */
    uint64_t             payload_at; /* in its segment; or: */
    lorasynci_shm_memory memory;
} lorasynci_shm_target;

/* The memory that the next stage of this adapter will use: an image whose payload lies there, in host memory with its
   header in front, is staged without a copy. Ask again after each stage. */
LORASYNCI_FN lorasync_status lorasynci_shm_slot(void *user, const char *adapter, size_t header_bytes,
                                                size_t payload_bytes, size_t config_bytes, char **out_payload,
                                                lorasynci_shm_target *out, lorasync_error *err)
{
    lorasynci_shm *s = (lorasynci_shm *)user;
    size_t         bytes, need = 0;
    int            i = -1, slot;
    if (lorasynci_checked_add(header_bytes, s->device ? 0 : payload_bytes, &bytes))
        need = lorasynci_shm_need(bytes, config_bytes);
    if (!need) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%zu bytes do not fit memory", payload_bytes);
    LORASYNCI_TRY(lorasynci_shm_check_mine(s, err));
    LORASYNCI_TRY(lorasynci_shm_enter(s, adapter, &i, err));
    s->payload_bytes = payload_bytes;
    LORASYNCI_TRY(lorasynci_shm_pick(s, i, need, err));
    slot         = s->places[i].next;
    *out_payload = s->device ? s->payloads[slot] : lorasynci_shm_image_of(s, slot) + header_bytes;
    memset(out, 0, sizeof *out);
    memcpy(out->name, s->name, sizeof out->name);
    out->slot       = slot;
    out->serial     = s->map.control->slots[slot].serial;
    out->payload_at = (uint64_t)LORASYNCI_SHM_HEAD + header_bytes;
    out->memory     = lorasynci_shm_head_of(s, slot)->memory;
    return LORASYNC_OK;
}

/* Maps another process's slot to write an image into it; *out_bytes for munmap. NULL when it cannot be had. */
LORASYNCI_FN char *lorasynci_shm_map_target(const lorasynci_shm_target *t, size_t *out_bytes)
{
    char        path[LORASYNCI_SHM_PATH];
    struct stat st;
    void       *map;
    int         fd, reason;
    lorasynci_shm_path(path, t->name, t->serial);
    if (lorasynci_shm_open_segment(path, O_RDWR, &fd, &st, NULL) < 0) return NULL;
    *out_bytes = (size_t)st.st_size;
    map        = lorasynci_shm_map_fd(fd, *out_bytes, 1, &reason);
    close(fd);
    return (char *)map;
}

/* -- the sessions that it is attached to */

/* The lease of an adapter, or a free one; NULL when all are taken. */
LORASYNCI_FN lorasynci_shm_lease *lorasynci_shm_lease_of(lorasynci_shm *s, const char *adapter)
{
    lorasynci_shm_lease *empty = NULL;
    int                  i;
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) {
        lorasynci_shm_lease *c = &s->leases[i];
        if (c->session && strcmp(c->adapter, adapter) == 0) return c;
        if (!c->session && !empty) empty = c;
    }
    return empty;
}

LORASYNCI_FN lorasync_status lorasynci_shm_check_lease(void *user, const void *session, const char *adapter,
                                                       lorasync_error *err)
{
    lorasynci_shm       *s = (lorasynci_shm *)user;
    lorasynci_shm_lease *c = lorasynci_shm_lease_of(s, adapter);
    if (c && (!c->session || c->session == session)) return LORASYNC_OK;
    if (!c) {
        return lorasynci_fail(err, LORASYNC_E_BUSY,
                              "shared memory '%s' is attached to %d sessions already; use another name", s->name,
                              LORASYNCI_SHM_ADAPTERS);
    }
    return lorasynci_fail(
        err, LORASYNC_E_BUSY,
        "another session publishes adapter '%.60s' in shared memory '%s'; close that one, open the transport "
        "again and attach it to a new session; or use another name",
        adapter, s->name);
}

/* After the check above. A rank that does not publish has no lease (adapter is NULL), and closes all the same. */
LORASYNCI_FN void lorasynci_shm_enter_lease(void *user, const void *session, const char *adapter)
{
    lorasynci_shm       *s = (lorasynci_shm *)user;
    lorasynci_shm_lease *c = adapter ? lorasynci_shm_lease_of(s, adapter) : NULL;
    __atomic_fetch_add(&s->num_users, 1, __ATOMIC_SEQ_CST);
    if (!c) return;
    c->session = session;
    c->adapter = adapter;
}

/* A slot that was lent to a session that closes: a rank that was left behind may still write there, so it goes to
   nobody else. */
LORASYNCI_FN void lorasynci_shm_take_back(lorasynci_shm *s, const char *adapter)
{
    int i = lorasynci_shm_find(s, adapter), slot;
    if (i < 0) return;
    lorasynci_shm_unstage(&s->places[i]);
    slot              = s->places[i].next;
    s->places[i].next = -1;
    if (slot < 0) return;
    if (!s->device) lorasynci_shm_drop_slot(s, slot);
    else if (lorasynci_shm_is_open(s, slot)) lorasynci_shm_mark(s->others, slot);
}

/* Before the session closes the transport. */
LORASYNCI_FN void lorasynci_shm_drop_leases(void *user, const void *session)
{
    lorasynci_shm *s = (lorasynci_shm *)user;
    int            i;
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) {
        lorasynci_shm_lease *c = &s->leases[i];
        if (c->session != session) continue;
        if (lorasynci_shm_check_mine(s, NULL) == LORASYNC_OK) lorasynci_shm_take_back(s, c->adapter);
        c->session = NULL;
    }
}

/* Closes it when nobody uses it any more. */
LORASYNCI_FN void lorasynci_shm_close(void *user)
{
    lorasynci_shm     *s = (lorasynci_shm *)user;
    lorasync_allocator a = s->a;
    int                i;
    if (__atomic_sub_fetch(&s->num_users, 1, __ATOMIC_SEQ_CST) > 0) return;
    lorasynci_shm_leave_payloads(s);
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++)
        if (s->memory[i]) munmap(s->memory[i], s->sizes[i]);
    if (lorasynci_process_pid(s->mine) == (long)getpid()) lorasynci_shm_disown(&s->map.control->publisher, s->mine);
    lorasynci_shm_detach(&s->map);
    lorasynci_dealloc(&a, s);
}

/* A new transport does not write into free slots of the one before: they may have been lent for a gather, and a rank
   that was left behind may still write there. In shared memory they are removed, which leaves such a rank its own
   mapping; device memory waits until nobody has it open. */
LORASYNCI_FN void lorasynci_shm_clear(lorasynci_shm *s)
{
    int i;
    lorasynci_shm_look(s, 1);
    for (i = 0; i < LORASYNCI_SHM_SLOTS; i++) {
        const lorasynci_shm_segment *g = &s->map.control->slots[i];
        if (!g->serial || lorasynci_shm_is_marked(s->used, i)) continue;
        if (!g->device_bytes) lorasynci_shm_drop_slot(s, i);
        else if (lorasynci_shm_is_open(s, i)) lorasynci_shm_mark(s->others, i);
    }
}

LORASYNC_API lorasync_status lorasync_shm_open(const lorasync_shm_desc *desc, lorasync_transport *out,
                                               lorasync_error *err)
{
    lorasync_allocator a;
    lorasynci_shm     *s;
    lorasync_status    status;
    int                i;
    if (!desc || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_shm_open: %s is NULL", desc ? "out" : "desc");
    if (!lorasynci_take_allocator(desc->allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: give both alloc and free");
    LORASYNCI_TRY(lorasynci_shm_check_name(desc->name, err));
    if (desc->num_slots && (desc->num_slots < 2 || desc->num_slots > LORASYNCI_SHM_SLOTS)) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "num_slots is %d, expected 0 or 2 to %d", desc->num_slots,
                              LORASYNCI_SHM_SLOTS);
    }
    s = (lorasynci_shm *)lorasynci_alloc_array(&a, 1, sizeof *s);
    if (!s) return lorasynci_fail_memory(err, sizeof *s);
    s->a         = a;
    s->num_slots = desc->num_slots ? desc->num_slots : 3;
    strcpy(s->name, desc->name);
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) s->places[i].next = s->places[i].staged = -1;
    status = desc->cuda ? lorasynci_gpu_open(&a, desc->cuda->stream, 0, "lorasync_shm_desc.cuda", &s->device, err)
                        : LORASYNC_OK;
    if (status >= 0) status = lorasynci_shm_take(s->name, 1, &s->map, &s->mine, err);
    if (status < 0) {
        lorasynci_gpu_close(&a, s->device);
        lorasynci_dealloc(&a, s);
        return status;
    }
    lorasynci_shm_clear(s);
    memset(out, 0, sizeof *out);
    out->size   = sizeof *out;
    out->name   = s->name;
    out->user   = s;
    out->stage  = lorasynci_shm_stage;
    out->commit = lorasynci_shm_commit;
    out->abort  = lorasynci_shm_abort;
    out->close  = lorasynci_shm_close;
    return LORASYNC_OK;
}

/* -- what an engine does with it: one view of the control, with one reader, that the versions it has loaded keep
   open */

typedef struct lorasynci_shm_view {
    lorasync_allocator    a;
    lorasynci_shm_map     map;
    lorasynci_shm_reader *reader;
    uint64_t              mine;
    int                   num_users;
} lorasynci_shm_view;

/* 0 in a fork: the place in the control is the parent's. */
LORASYNCI_FN int lorasynci_shm_is_ours(const lorasynci_shm_view *v)
{
    return lorasynci_process_pid(v->mine) == (long)getpid();
}

LORASYNCI_FN void lorasynci_shm_view_drop(lorasynci_shm_view *v)
{
    lorasync_allocator a;
    if (!v || --v->num_users > 0) return;
    a = v->a;
    if (v->reader && lorasynci_shm_is_ours(v)) lorasynci_shm_disown(&v->reader->owner, v->mine);
    lorasynci_shm_detach(&v->map);
    lorasynci_dealloc(&a, v);
}

LORASYNCI_FN lorasync_status lorasynci_shm_view_enter(lorasynci_shm_view *v, const char *name, lorasync_error *err)
{
    uint64_t self = lorasynci_process_self();
    int      i, k;
    for (i = 0; i < LORASYNCI_SHM_READERS; i++) {
        lorasynci_shm_reader *r = &v->map.control->readers[i];
        if (lorasynci_shm_claim(v->map.fd, i, &r->owner, self, &v->mine) != 0) continue;
        for (k = 0; k < LORASYNCI_SHM_PINS; k++) { /* a dead reader's */
            __atomic_store_n(&r->pins[k], (uint64_t)0, __ATOMIC_SEQ_CST);
            __atomic_store_n(&r->opened[k], (uint64_t)0, __ATOMIC_SEQ_CST);
        }
        v->reader = r;
        return LORASYNC_OK;
    }
    return lorasynci_fail(err, LORASYNC_E_BUSY, "shared memory '%s' has %d engines already; close some", name,
                          LORASYNCI_SHM_READERS);
}

/* LORASYNC_NOTHING_NEW when there is no control yet. */
LORASYNCI_FN lorasync_status lorasynci_shm_view_open(const char *name, const lorasync_allocator *a,
                                                     lorasynci_shm_view **out, lorasync_error *err)
{
    lorasynci_shm_map   map;
    lorasynci_shm_view *v;
    lorasync_status     status = lorasynci_shm_attach(name, 0, &map, err);
    if (status != LORASYNC_OK) return status;
    v = (lorasynci_shm_view *)lorasynci_alloc_array(a, 1, sizeof *v);
    if (!v) {
        lorasynci_shm_detach(&map);
        return lorasynci_fail_memory(err, sizeof *v);
    }
    v->a         = *a;
    v->map       = map;
    v->num_users = 1;
    status       = lorasynci_shm_view_enter(v, name, err);
    if (status < 0) lorasynci_shm_view_drop(v);
    else *out = v;
    return status;
}

LORASYNCI_FN void lorasynci_shm_unpin(lorasynci_shm_view *v, int slot)
{
    if (lorasynci_shm_is_ours(v))
        __atomic_fetch_and(&v->reader->pins[slot / 64], ~((uint64_t)1 << (slot % 64)), __ATOMIC_SEQ_CST);
}

/* Pins what an adapter's word names: the slot, or -1 when it names none. */
LORASYNCI_FN int lorasynci_shm_pin(lorasynci_shm_view *v, int adapter, uint64_t *out_word)
{
    const uint64_t *place = &v->map.control->adapters[adapter].word;
    for (;;) {
        uint64_t word = __atomic_load_n(place, __ATOMIC_SEQ_CST);
        int      slot = lorasynci_shm_slot_of(word);
        *out_word     = word;
        if (slot < 0) return -1;
        __atomic_fetch_or(&v->reader->pins[slot / 64], (uint64_t)1 << (slot % 64), __ATOMIC_SEQ_CST);
        if (__atomic_load_n(place, __ATOMIC_SEQ_CST) == word) return slot;
        lorasynci_shm_unpin(v, slot);
    }
}

/* A slot's segment, mapped for reading. It stays mapped while the slot is the same: the next version that comes to lie
   there costs no page fault. */
typedef struct lorasynci_mapped {
    struct lorasynci_mapped *next;
    lorasynci_shm_view      *view;
    uint64_t                 serial; /* of the slot */
    dev_t                    device; /* of the segment; while it is mapped its inode is no other's */
    ino_t                    inode;
    int                      slot, num_users;
    void                    *map;
    size_t                   num_bytes;
} lorasynci_mapped;

LORASYNCI_FN void lorasynci_mapped_close(lorasynci_mapped *m)
{
    lorasync_allocator a = m->view->a;
    if (m->map) munmap(m->map, m->num_bytes);
    lorasynci_shm_view_drop(m->view);
    lorasynci_dealloc(&a, m);
}

/* Unmaps what nothing uses and is no slot of the control `now` any more. */
LORASYNCI_FN void lorasynci_mapped_sweep(lorasynci_mapped **first, const lorasynci_shm_view *now)
{
    while (*first) {
        lorasynci_mapped *m = *first;
        if (m->num_users || (m->view == now && now->map.control->slots[m->slot].serial == m->serial)) {
            first = &m->next;
            continue;
        }
        *first = m->next;
        lorasynci_mapped_close(m);
    }
}

/* Opens a pinned slot's segment, checked: whose it is, and that it is as long as it should be. */
LORASYNCI_FN lorasync_status lorasynci_mapped_open(const lorasynci_shm_view *v, const char *path, int slot, int *out_fd,
                                                   struct stat *st, lorasync_error *err)
{
    const lorasynci_shm_segment *g = &v->map.control->slots[slot];
    LORASYNCI_TRY(lorasynci_shm_open_segment(path, O_RDONLY, out_fd, st, err));
    if (g->serial && (uintmax_t)st->st_size == g->num_bytes && g->num_bytes >= LORASYNCI_SHM_HEAD &&
        g->num_bytes <= SIZE_MAX)
        return LORASYNC_OK;
    close(*out_fd);
    return lorasynci_fail(err, LORASYNC_E_FORMAT, "shared memory %s has %llu bytes, expected %llu; publish again", path,
                          (unsigned long long)st->st_size, (unsigned long long)g->num_bytes);
}

/* Maps it. */
LORASYNCI_FN lorasync_status lorasynci_mapped_add(lorasynci_mapped **first, lorasynci_shm_view *v, const char *path,
                                                  int slot, int fd, const struct stat *st, lorasync_error *err)
{
    lorasynci_mapped *m = (lorasynci_mapped *)lorasynci_alloc_array(&v->a, 1, sizeof *m);
    int               reason;
    if (!m) return lorasynci_fail_memory(err, sizeof *m);
    v->num_users++;
    m->view      = v;
    m->slot      = slot;
    m->serial    = v->map.control->slots[slot].serial;
    m->device    = st->st_dev;
    m->inode     = st->st_ino;
    m->num_bytes = (size_t)st->st_size;
    m->map       = lorasynci_shm_map_fd(fd, m->num_bytes, 0, &reason);
    if (!m->map) {
        lorasynci_mapped_close(m);
        return lorasynci_shm_fail(err, "map", path, reason);
    }
    m->next = *first;
    *first  = m;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_mapped_check_head(const lorasynci_mapped *m, const char *path,
                                                         lorasync_error *err)
{
    const lorasynci_shm_head *h    = (const lorasynci_shm_head *)m->map;
    const uint64_t            room = m->num_bytes - LORASYNCI_SHM_HEAD;
    if (h->magic == lorasynci_shm_magic && h->image_bytes <= room && h->config_bytes != 0 &&
        h->config_bytes <= room - h->image_bytes &&
        ((const char *)m->map)[LORASYNCI_SHM_HEAD + h->image_bytes + h->config_bytes - 1] == 0)
        return LORASYNC_OK;
    return lorasynci_fail(err, LORASYNC_E_FORMAT,
                          "shared memory %s is damaged: its head does not fit its %llu bytes; publish again", path,
                          (unsigned long long)m->num_bytes);
}

/* A pinned slot, mapped now or before, with a head that fits. */
LORASYNCI_FN lorasync_status lorasynci_mapped_get(lorasynci_mapped **first, lorasynci_shm_view *v, const char *name,
                                                  int slot, lorasynci_mapped **out, lorasync_error *err)
{
    const uint64_t    serial = v->map.control->slots[slot].serial;
    char              path[LORASYNCI_SHM_PATH];
    lorasynci_mapped *m      = *first;
    lorasync_status   status = LORASYNC_OK;
    struct stat       st;
    int               fd = -1;
    lorasynci_shm_path(path, name, serial);
    LORASYNCI_TRY(lorasynci_mapped_open(v, path, slot, &fd, &st, err));
    while (m && (m->view != v || m->serial != serial || m->device != st.st_dev || m->inode != st.st_ino)) m = m->next;
    if (!m) status = lorasynci_mapped_add(first, v, path, slot, fd, &st, err);
    close(fd);
    if (status < 0) return status;
    if (!m) m = *first;
    *out = m;
    return lorasynci_mapped_check_head(m, path, err);
}
/* -- payloads in device memory: the engine's side

   An engine opens the device memory of a slot once and keeps it open, whatever versions the slot holds, until the slot
   is retired or goes away:

       engine.imports -> slot 0, 2 users -> slot 1 -> slot 2, 1 user -> NULL       users: versions that the engine holds

       table (device)  | operations | tiles | sums |         the digest's work, one operation per tensor, made again
                                                             only when the layout changes
       host (pinned)   | operations | tiles | sums | terms | */
typedef struct lorasynci_import {
    struct lorasynci_import *next;
    lorasynci_shm_view      *view;
    lorasynci_shm_memory     memory; /* as the slot's head has it */
    uint64_t                 serial;
    int                      slot, num_users;
    int                      is_ipc;
    char                    *payload;
    char                    *table, *host;
    size_t                   num_ops, num_tiles, tiles_at, sums_at, terms_at;
} lorasynci_import;

LORASYNCI_FN void lorasynci_shm_mark_opened(lorasynci_shm_view *v, int slot, int opened)
{
    uint64_t bit = (uint64_t)1 << (slot % 64), *word = &v->reader->opened[slot / 64];
    if (!lorasynci_shm_is_ours(v)) return;
    __atomic_store_n(word, opened ? *word | bit : *word & ~bit, __ATOMIC_SEQ_CST);
}

#ifdef LORASYNC_CUDA

LORASYNCI_FN void lorasynci_import_close(lorasynci_gpu *g, lorasynci_import *m)
{
    lorasync_allocator a = m->view->a;
    int                old;
    if (g->pid == getpid()) {
        old = lorasynci_gpu_enter(g->ordinal);
        cudaFree(m->table);
        cudaFreeHost(m->host);
        if (m->is_ipc && m->payload) cudaIpcCloseMemHandle(m->payload);
        lorasynci_gpu_leave(g->ordinal, old);
        (void)cudaGetLastError();
    }
    if (m->payload) lorasynci_shm_mark_opened(m->view, m->slot, 0); /* only now that it is closed */
    lorasynci_shm_view_drop(m->view);
    lorasynci_dealloc(&a, m);
}

/* Closes what nothing uses and the publisher wants back, or has given up. */
LORASYNCI_FN void lorasynci_imports_sweep(lorasynci_gpu *g, lorasynci_import **first, const lorasynci_shm_view *now)
{
    while (*first) {
        lorasynci_import            *m = *first;
        const lorasynci_shm_segment *s = &m->view->map.control->slots[m->slot];
        if (m->num_users ||
            (m->view == now && s->serial == m->serial && !__atomic_load_n(&s->retired, __ATOMIC_SEQ_CST))) {
            first = &m->next;
            continue;
        }
        *first = m->next;
        lorasynci_import_close(g, m);
    }
}

/* Memory of this process, on this or on another GPU. */
LORASYNCI_FN lorasync_status lorasynci_import_own(const lorasynci_gpu *g, lorasynci_import *m, lorasync_error *err)
{
    int         ordinal = (int)m->memory.ordinal, can = 1;
    cudaError_t e = cudaSuccess;
    if (ordinal != g->ordinal) {
        e = cudaDeviceCanAccessPeer(&can, g->ordinal, ordinal);
        if (e == cudaSuccess && can) e = cudaDeviceEnablePeerAccess(ordinal, 0);
        (void)cudaGetLastError();
        if (e == cudaErrorPeerAccessAlreadyEnabled) e = cudaSuccess;
    }
    if (!can || e != cudaSuccess) {
        return lorasynci_fail(
            err, LORASYNC_E_CUDA,
            "the payload is on GPU %d, which GPU %d of the engine cannot access; open the engine on GPU %d", ordinal,
            g->ordinal, ordinal);
    }
    m->payload = (char *)(uintptr_t)m->memory.pointer;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_import_open_ipc(lorasynci_import *m, lorasync_error *err)
{
    void       *p = NULL;
    cudaError_t e = cudaIpcOpenMemHandle(&p, *(const cudaIpcMemHandle_t *)(const void *)m->memory.handle,
                                         cudaIpcMemLazyEnablePeerAccess);
    if (e == cudaSuccess) {
        m->payload = (char *)p;
        m->is_ipc  = 1;
        return LORASYNC_OK;
    }
    (void)cudaGetLastError();
    return lorasynci_fail(
        err, LORASYNC_E_CUDA,
        "cannot open device memory of process %ld on GPU %s over CUDA IPC: %s (%s); the engine's GPU must be that one "
        "or have peer access to it, and both processes must share host, user and IPC namespace; or publish in host "
        "memory",
        lorasynci_process_pid(m->memory.owner), m->memory.gpu, cudaGetErrorString(e), cudaGetErrorName(e));
}

/* Marks the memory as opened, and then looks whether it is still there: see above. The device is current. */
LORASYNCI_FN lorasync_status lorasynci_import_open(const lorasynci_gpu *g, lorasynci_import *m, lorasync_error *err)
{
    const lorasynci_shm_control *c     = m->view->map.control;
    uint64_t                     owner = m->memory.owner;
    lorasync_status              status;
    lorasynci_shm_mark_opened(m->view, m->slot, 1);
    if (!lorasynci_shm_lives(m->view->map.fd, LORASYNCI_SHM_PUBLISHER, owner, m->view->mine)) {
        status = lorasynci_fail(
            err, LORASYNC_E_IO,
            "the payload was in device memory of publisher process %ld, which has ended; publish it again",
            lorasynci_process_pid(owner));
    } else if (__atomic_load_n(&c->slots[m->slot].retired, __ATOMIC_SEQ_CST)) {
        status = lorasynci_fail(
            err, LORASYNC_E_IO,
            "the payload was in device memory of publisher process %ld, which has closed the transport; publish it "
            "again",
            lorasynci_process_pid(owner));
    } else {
        status = lorasynci_shm_is_same_owner(owner, m->view->mine) ? lorasynci_import_own(g, m, err)
                                                                   : lorasynci_import_open_ipc(m, err);
    }
    if (status < 0) lorasynci_shm_mark_opened(m->view, m->slot, 0);
    return status;
}

/* The memory of a pinned slot, opened now or before. */
LORASYNCI_FN lorasync_status lorasynci_import_get(lorasynci_gpu *g, lorasynci_import **first, lorasynci_shm_view *v,
                                                  int slot, const lorasynci_shm_memory *memory, lorasynci_import **out,
                                                  lorasync_error *err)
{
    uint64_t          serial = v->map.control->slots[slot].serial;
    lorasynci_import *m;
    lorasync_status   status;
    int               old;
    lorasynci_imports_sweep(g, first, v); /* an earlier slot's of this number must be closed first */
    for (m = *first; m && (m->view != v || m->slot != slot || m->serial != serial); m = m->next) {}
    *out = m;
    if (m) return LORASYNC_OK;
    m = (lorasynci_import *)lorasynci_alloc_array(&v->a, 1, sizeof *m);
    if (!m) return lorasynci_fail_memory(err, sizeof *m);
    m->view   = v;
    m->slot   = slot;
    m->serial = serial;
    m->memory = *memory;
    v->num_users++;
    old    = lorasynci_gpu_enter(g->ordinal);
    status = lorasynci_import_open(g, m, err);
    lorasynci_gpu_leave(g->ordinal, old);
    if (status < 0) {
        lorasynci_import_close(g, m);
        return status;
    }
    m->next = *first;
    *out = *first = m;
    return LORASYNC_OK;
}

/* What digests one tensor: its bytes as 16-bit words where they are, else as bytes. */
LORASYNCI_FN lorasyncd_op lorasynci_import_op(const lorasynci_import *m, const lorasync_tensor *t, size_t index)
{
    lorasyncd_op o;
    int          wide = t->offset % 2 == 0 && t->num_bytes % 2 == 0;
    memset(&o, 0, sizeof o);
    o.src = (uint64_t)(uintptr_t)m->payload + t->offset;
    o.sum = (uint64_t)(uintptr_t)m->table + m->sums_at + index * 8;
    o.num = o.n1 = (long long)(t->num_bytes / (wide ? 2 : 1));
    o.s0 = o.row = o.n1;
    o.s1 = o.d1 = 1;
    o.tensor    = (unsigned)index;
    o.scale     = 1.0f;
    o.src_dtype = o.dst_dtype = wide ? LORASYNC_U16 : LORASYNC_U8;
    o.unit                    = (unsigned char)lorasynci_unit(&o);
    return o;
}

LORASYNCI_FN size_t lorasynci_import_tiles(const lorasync_tensor *t)
{
    size_t n = t->offset % 2 == 0 && t->num_bytes % 2 == 0 ? t->num_bytes / 2 : t->num_bytes;
    return n / LORASYNCD_TILE + (n % LORASYNCD_TILE != 0);
}

/* 1 if the tables are those of this image. */
LORASYNCI_FN int lorasynci_import_fits(const lorasynci_import *m, const lorasync_image *image)
{
    const lorasyncd_op *ops = (const lorasyncd_op *)(const void *)m->host;
    size_t              i;
    if (!m->host || m->num_ops != image->num_tensors) return 0;
    for (i = 0; i < m->num_ops; i++) {
        lorasyncd_op o = lorasynci_import_op(m, &image->tensors[i], i);
        if (memcmp(&o, &ops[i], sizeof o) != 0) return 0;
    }
    return 1;
}

LORASYNCI_FN lorasync_status lorasynci_import_reserve(lorasynci_import *m, const lorasync_image *image,
                                                      lorasync_error *err)
{
    size_t i;
    cudaFree(m->table);
    cudaFreeHost(m->host);
    m->table = m->host = NULL;
    m->num_ops         = image->num_tensors;
    for (m->num_tiles = i = 0; i < m->num_ops; i++) m->num_tiles += lorasynci_import_tiles(&image->tensors[i]);
    if (m->num_tiles > 0x7fffffffu)
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED, "more than 2^31 tiles in one launch");
    m->tiles_at = m->num_ops * sizeof(lorasyncd_op);
    m->sums_at  = m->tiles_at + m->num_tiles * sizeof(lorasyncd_tile);
    m->terms_at = m->sums_at + m->num_ops * 8;
    LORASYNCI_CUDA(cudaMalloc((void **)&m->table, m->terms_at + 8), "memory for the digest's tables");
    LORASYNCI_CUDA(
        cudaHostAlloc((void **)&m->host, m->terms_at + m->num_ops * sizeof(lorasynci_term) + 8, cudaHostAllocDefault),
        "pinned memory for the digest's tables");
    return LORASYNC_OK;
}

/* Makes the tables and copies them to the device. */
LORASYNCI_FN lorasync_status lorasynci_import_tabulate(const lorasynci_gpu *g, lorasynci_import *m,
                                                       const lorasync_image *image, lorasync_error *err)
{
    lorasyncd_op   *ops;
    lorasyncd_tile *tiles;
    size_t          i, num = 0;
    LORASYNCI_TRY(lorasynci_import_reserve(m, image, err));
    ops   = (lorasyncd_op *)(void *)m->host;
    tiles = (lorasyncd_tile *)(void *)(m->host + m->tiles_at);
    for (i = 0; i < m->num_ops; i++) {
        long long first;
        ops[i] = lorasynci_import_op(m, &image->tensors[i], i);
        for (first = 0; first < ops[i].num; first += LORASYNCD_TILE, num++) {
            tiles[num].first = first;
            tiles[num].op    = (unsigned)i;
            tiles[num].count = ops[i].num - first < LORASYNCD_TILE ? (unsigned)(ops[i].num - first) : LORASYNCD_TILE;
        }
    }
    num        = m->num_ops;
    m->num_ops = SIZE_MAX; /* fits nothing, until they are there */
    LORASYNCI_CUDA(cudaMemcpyAsync(m->table, m->host, m->sums_at, cudaMemcpyDefault, g->stream),
                   "copying the digest's tables");
    m->num_ops = num;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_import_launch(const lorasynci_gpu *g, lorasynci_import *m, lorasync_error *err)
{
    CUresult r = CUDA_SUCCESS;
    LORASYNCI_CUDA(cudaMemsetAsync(m->table + m->sums_at, 0, m->num_ops * 8, g->stream), "cudaMemsetAsync");
    if (m->num_tiles) /* integers are not checked: bad is never written */
        r = lorasynci_gpu_launch(g, m->table, m->table + m->tiles_at, (unsigned)m->num_tiles, LORASYNCD_THREADS,
                                 m->table + m->sums_at, 0, g->stream);
    if (r != CUDA_SUCCESS)
        return lorasynci_fail(err, LORASYNC_E_CUDA, "CUDA: the digest's kernel was not launched (CUresult %d)", (int)r);
    LORASYNCI_CUDA(
        cudaMemcpyAsync(m->host + m->sums_at, m->table + m->sums_at, m->num_ops * 8, cudaMemcpyDefault, g->stream),
        "copying digests");
    return LORASYNC_OK;
}

/* Starts digesting with the tables that there are, while the header is read: as a rule the next version has the same
   tensors. */
LORASYNCI_FN lorasync_status lorasynci_import_check_ahead(const lorasynci_gpu *g, lorasynci_import *m,
                                                          lorasync_error *err)
{
    lorasync_status status;
    int             old;
    if (!m->host || m->num_ops == SIZE_MAX) return LORASYNC_OK;
    old    = lorasynci_gpu_enter(g->ordinal);
    status = lorasynci_import_launch(g, m, err);
    lorasynci_gpu_leave(g->ordinal, old);
    return status;
}

/* Starts digesting the image where it lies, unless that is under way with tables that fit. */
LORASYNCI_FN lorasync_status lorasynci_import_check_begin(lorasynci_gpu *g, lorasynci_import *m,
                                                          const lorasync_image *image, lorasync_error *err)
{
    lorasync_status status = LORASYNC_OK;
    int             old;
    if (lorasynci_import_fits(m, image)) return LORASYNC_OK;
    old = lorasynci_gpu_enter(g->ordinal);
    if (m->host) status = lorasynci_gpu_drain(g, "digesting the payload", err); /* its tables go */
    if (status == LORASYNC_OK) status = lorasynci_import_tabulate(g, m, image, err);
    if (status == LORASYNC_OK) status = lorasynci_import_launch(g, m, err);
    lorasynci_gpu_leave(g->ordinal, old);
    return status;
}

/* Waits for the digest and compares it. */
LORASYNCI_FN lorasync_status lorasynci_import_check_end(lorasynci_gpu *g, lorasynci_import *m,
                                                        const lorasync_image *image, lorasync_error *err)
{
    lorasynci_term *terms = (lorasynci_term *)(void *)(m->host + m->terms_at);
    lorasync_status status;
    size_t          i;
    int             old;
    for (i = 0; i < m->num_ops; i++) terms[i] = lorasynci_digest_term(&image->tensors[i]); /* while the GPU is at it */
    old    = lorasynci_gpu_enter(g->ordinal);
    status = lorasynci_gpu_drain(g, "digesting the payload", err);
    lorasynci_gpu_leave(g->ordinal, old);
    if (status < 0) return status;
    return lorasynci_compare_digest(
        image, lorasynci_digest_terms(terms, (const uint64_t *)(const void *)(m->host + m->sums_at), m->num_ops), err);
}

#else

LORASYNCI_FN void lorasynci_imports_sweep(lorasynci_gpu *g, lorasynci_import **first, const lorasynci_shm_view *now)
{
    (void)g, (void)first, (void)now;
}
LORASYNCI_FN lorasync_status lorasynci_import_get(lorasynci_gpu *g, lorasynci_import **first, lorasynci_shm_view *v,
                                                  int slot, const lorasynci_shm_memory *memory, lorasynci_import **out,
                                                  lorasync_error *err)
{
    (void)g, (void)first, (void)v, (void)slot, (void)memory, (void)out, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_import_check_ahead(const lorasynci_gpu *g, lorasynci_import *m,
                                                          lorasync_error *err)
{
    (void)g, (void)m, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_import_check_begin(lorasynci_gpu *g, lorasynci_import *m,
                                                          const lorasync_image *image, lorasync_error *err)
{
    (void)g, (void)m, (void)image, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}
LORASYNCI_FN lorasync_status lorasynci_import_check_end(lorasynci_gpu *g, lorasynci_import *m,
                                                        const lorasync_image *image, lorasync_error *err)
{
    (void)g, (void)m, (void)image, (void)err;
    return LORASYNC_E_UNSUPPORTED;
}

#endif

/* ------------------------------------------------------------------------------------------------------ >>engine -- */

/* Opens published adapters, checks them, and serves them to threads that come and go. Relies on image, config, the
   names of publish, and shm. */

/* What tells one file from another without reading it. While it is mapped its inode cannot be given to a new file. */
typedef struct lorasynci_file_id {
    dev_t  device;
    ino_t  inode;
    time_t changed;
} lorasynci_file_id;

LORASYNCI_FN lorasynci_file_id lorasynci_id_of(const struct stat *st)
{
    lorasynci_file_id id;
    memset(&id, 0, sizeof id);
    id.device  = st->st_dev;
    id.inode   = st->st_ino;
    id.changed = st->st_ctime;
    return id;
}

LORASYNCI_FN int lorasynci_same_id(const lorasynci_file_id *a, const lorasynci_file_id *b)
{
    return a->device == b->device && a->inode == b->inode && a->changed == b->changed;
}

/* An adapter read from disk or shared memory: the image owns its mapping. */
typedef struct lorasynci_opened {
    lorasync_image     *image;
    lorasync_config    *config; /* NULL for a single file */
    lorasynci_file_id   id;     /* of the model file */
    lorasynci_shm_view *view;   /* NULL for files; else that slot of it is pinned */
    int                 slot;
    lorasynci_mapped   *mapped; /* its segment */
    lorasynci_import   *import; /* NULL: the payload is not in device memory */
} lorasynci_opened;

LORASYNCI_FN void lorasynci_opened_free(lorasynci_opened *o)
{
    if (o->image) lorasync_image_free(o->image);
    if (o->config) lorasync_config_free(o->config);
    if (o->import) o->import->num_users--;
    if (o->mapped) o->mapped->num_users--;
    if (o->view) {
        lorasynci_shm_unpin(o->view, o->slot);
        lorasynci_shm_view_drop(o->view);
    }
    memset(o, 0, sizeof *o);
}

/* -- reading: `label` is the path for messages. A missing file is LORASYNC_E_NOT_FOUND, so that a caller can look
   again. */

LORASYNCI_FN lorasync_status lorasynci_fail_open(lorasync_error *err, const char *what, const char *label, int reason)
{
    return lorasynci_fail(err, reason == ENOENT ? LORASYNC_E_NOT_FOUND : LORASYNC_E_IO, "cannot %s %s: %s", what, label,
                          strerror(reason));
}

/* A regular file opened for reading; O_NONBLOCK so that a pipe in its place does not hang. */
LORASYNCI_FN lorasync_status lorasynci_open_regular(int at, const char *name, const char *label, int *out_fd,
                                                    struct stat *out_st, lorasync_error *err)
{
    int fd = openat(at, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return lorasynci_fail_open(err, "open", label, errno);
    if (fstat(fd, out_st) == 0 && S_ISREG(out_st->st_mode)) {
        *out_fd = fd;
        return LORASYNC_OK;
    }
    close(fd);
    return lorasynci_fail(err, LORASYNC_E_FORMAT, "%s is not a regular file", label);
}

/* Maps a whole file. An empty one is NULL and 0 bytes. */
LORASYNCI_FN lorasync_status lorasynci_map_file(int at, const char *name, const char *label, void **out,
                                                size_t *out_bytes, lorasynci_file_id *out_id, lorasync_error *err)
{
    struct stat st;
    int         fd = -1, failed = 0;
    void       *map = NULL;
    LORASYNCI_TRY(lorasynci_open_regular(at, name, label, &fd, &st, err));
    if ((uintmax_t)st.st_size > (uintmax_t)SIZE_MAX) failed = EFBIG;
    if (!failed && st.st_size > 0) {
        map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) failed = errno;
    }
    close(fd);
    if (failed) return lorasynci_fail_open(err, "map", label, failed);
    *out       = map;
    *out_bytes = (size_t)st.st_size;
    *out_id    = lorasynci_id_of(&st);
    return LORASYNC_OK;
}

LORASYNCI_FN int lorasynci_name_ends(const char *name, const char *end)
{
    size_t n = strlen(name), k = strlen(end);
    return n > k && strcmp(name + n - k, end) == 0;
}

/* 1 for what torch.save writes: a zip archive, or a bare pickle. (Asked of what is no safetensors: a header of 640
   bytes begins with 80 02, too, but with 0 behind.) */
LORASYNCI_FN int lorasynci_is_pickled(const char *name, const unsigned char *p, size_t num_bytes)
{
    if (num_bytes >= 4 && memcmp(p, "PK\3\4", 4) == 0) return 1;
    if (num_bytes >= 3 && p[0] == 0x80 && p[1] >= 2 && p[1] <= 5 && p[2]) return 1;
    return lorasynci_name_ends(name, ".bin") || lorasynci_name_ends(name, ".pt") || lorasynci_name_ends(name, ".pth");
}

/* Maps and checks a safetensors file. */
LORASYNCI_FN lorasync_status lorasynci_open_model(int at, const char *name, const char *label, int no_verify,
                                                  const lorasync_allocator *a, lorasynci_opened *out,
                                                  lorasync_error *err)
{
    void           *map       = NULL;
    size_t          num_bytes = 0;
    lorasync_status status;
    LORASYNCI_TRY(lorasynci_map_file(at, name, label, &map, &num_bytes, &out->id, err));
    status = lorasync_image_parse(map ? map : (const void *)"", num_bytes, a, &out->image, err);
    if (status >= 0) {
        lorasynci_image_own_mapping(out->image, map, num_bytes);
        status = lorasynci_refuse_delta(out->image, err);
        if (status >= 0 && !no_verify && out->image->has_digest) status = lorasync_image_verify(out->image, err);
    } else {
        if (status == LORASYNC_E_FORMAT && lorasynci_is_pickled(name, (const unsigned char *)map, num_bytes))
            status = lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                                    "pickled files are not read, save it again as safetensors with PEFT");
        if (map) munmap(map, num_bytes);
    }
    if (status < 0) {
        lorasynci_prefix(err, "%s", label);
        lorasynci_opened_free(out);
    }
    return status;
}

#define LORASYNCI_MAX_CONFIG                                                                                           \
    ((size_t)64 << 20) /* far above any real one; bounds what a hostile file makes us
                                                   allocate */

/* The text of a config file, NUL-terminated. */
LORASYNCI_FN lorasync_status lorasynci_read_config(int at, const char *label, const lorasync_allocator *a, char **out,
                                                   size_t *out_bytes, lorasync_error *err)
{
    struct stat st;
    size_t      n;
    ssize_t     got;
    char       *text;
    int         fd = -1, reason;
    LORASYNCI_TRY(lorasynci_open_regular(at, LORASYNCI_CONFIG_FILE, label, &fd, &st, err));
    if ((uintmax_t)st.st_size > LORASYNCI_MAX_CONFIG) {
        close(fd);
        return lorasynci_fail(err, LORASYNC_E_FORMAT, "%s has %llu bytes, at most %zu are read", label,
                              (unsigned long long)st.st_size, LORASYNCI_MAX_CONFIG);
    }
    n      = (size_t)st.st_size;
    text   = (char *)lorasynci_alloc(a, n + 1);
    got    = text ? lorasynci_read_some(fd, text, n) : 0;
    reason = errno;
    close(fd);
    if (!text) return lorasynci_fail_memory(err, n + 1);
    if (got < 0) {
        lorasynci_dealloc(a, text);
        return lorasynci_fail_open(err, "read", label, reason);
    }
    text[got]  = 0;
    *out       = text;
    *out_bytes = (size_t)got;
    return LORASYNC_OK;
}

/* Reads adapter_config.json beside an opened image and checks one against the other. The image takes the text. */
LORASYNCI_FN lorasync_status lorasynci_open_config(int at, const char *where, const lorasync_allocator *a,
                                                   lorasynci_opened *o, lorasync_error *err)
{
    char            label[400], *text = NULL;
    size_t          num_bytes = 0;
    lorasync_status status;
    snprintf(label, sizeof label, "%s/" LORASYNCI_CONFIG_FILE, where);
    LORASYNCI_TRY(lorasynci_read_config(at, label, a, &text, &num_bytes, err));
    status = lorasync_config_parse(text, num_bytes, a, &o->config, err);
    if (status >= 0) status = lorasync_config_check(o->config, o->image->tensors, o->image->num_tensors, err);
    if (status < 0) {
        lorasynci_dealloc(a, text);
        lorasynci_prefix(err, "%s", label);
        return status;
    }
    lorasynci_image_own_config(o->image, text);
    return LORASYNC_OK;
}

/* Both files of a PEFT directory. */
LORASYNCI_FN lorasync_status lorasynci_open_pair(int at, const char *model, const char *where, int no_verify,
                                                 const lorasync_allocator *a, lorasynci_opened *out,
                                                 lorasync_error *err)
{
    char            label[400];
    lorasync_status status;
    snprintf(label, sizeof label, "%s/%.100s", where, model);
    memset(out, 0, sizeof *out);
    LORASYNCI_TRY(lorasynci_open_model(at, model, label, no_verify, a, out, err));
    status = lorasynci_open_config(at, where, a, out, err);
    if (status < 0) lorasynci_opened_free(out);
    return status;
}

/* -- one adapter outside any engine */

/* The model file of a directory: PEFT's name, or the only *.safetensors. */
LORASYNCI_FN lorasync_status lorasynci_find_model(int fd, const char *where, char out[256], lorasync_error *err)
{
    DIR           *list;
    struct dirent *entry;
    size_t         num = 0;
    strcpy(out, LORASYNCI_MODEL_FILE);
    if (!lorasynci_look(fd, out)) return LORASYNC_OK;
    list = lorasynci_list_directory(fd);
    if (!list) return lorasynci_fail_open(err, "list", where, errno);
    while ((entry = readdir(list)) != NULL) {
        size_t n = strlen(entry->d_name);
        if (n <= 12 || n > 255 || entry->d_name[0] == '.' || strcmp(entry->d_name + n - 12, ".safetensors") != 0)
            continue;
        if (num++ == 0) memcpy(out, entry->d_name, n + 1);
    }
    closedir(list);
    if (num == 1) return LORASYNC_OK;
    if (num > 1) {
        return lorasynci_fail(
            err, LORASYNC_E_NOT_FOUND,
            "%s has %zu .safetensors files and none is called " LORASYNCI_MODEL_FILE "; name the file", where, num);
    }
    if (!lorasynci_look(fd, "adapter_model.bin")) {
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "%s has only adapter_model.bin; pickled files are not read, save it again as safetensors with PEFT", where);
    }
    return lorasynci_fail(err, LORASYNC_E_NOT_FOUND, "%s has no " LORASYNCI_MODEL_FILE, where);
}

LORASYNCI_FN lorasync_status lorasynci_open_peft(const char *path, const lorasync_allocator *a, lorasynci_opened *out,
                                                 lorasync_error *err)
{
    char            model[256];
    lorasync_status status;
    int             fd = lorasynci_open_directory(AT_FDCWD, path);
    if (fd < 0) return lorasynci_fail_open(err, "open", lorasynci_end_of(path), errno);
    status = lorasynci_find_model(fd, lorasynci_end_of(path), model, err);
    if (status >= 0) status = lorasynci_open_pair(fd, model, lorasynci_end_of(path), 0, a, out, err);
    close(fd);
    return status;
}

LORASYNC_API lorasync_status lorasync_open_adapter(const char *path, const lorasync_allocator *allocator,
                                                   lorasync_image **out_image, lorasync_config **out_config,
                                                   lorasync_error *err)
{
    lorasync_allocator a;
    lorasynci_opened   opened;
    struct stat        st;
    if (!path || !out_image) {
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_open_adapter: %s is NULL",
                              path ? "out_image" : "path");
    }
    if (!lorasynci_take_allocator(allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: give both alloc and free");
    memset(&opened, 0, sizeof opened);
    if (stat(path, &st) != 0) return lorasynci_fail_open(err, "open", lorasynci_end_of(path), errno);
    if (S_ISDIR(st.st_mode)) LORASYNCI_TRY(lorasynci_open_peft(path, &a, &opened, err));
    else LORASYNCI_TRY(lorasynci_open_model(AT_FDCWD, path, lorasynci_end_of(path), 0, &a, &opened, err));
    *out_image = opened.image;
    if (out_config) *out_config = opened.config;
    else if (opened.config) lorasync_config_free(opened.config);
    return LORASYNC_OK;
}

/* -- serving

       engine.first -> served -> served -> NULL        grows at the head only, freed at close: any thread may walk it
                       | current = 2
                       | slots   [ v5 1 pin | v6 | v7 | empty ... ]

   A reader:  i = current;  pins[i] += 1;  if current is still i, slot i is pinned;  else pins[i] -= 1 and again.
   The poll:  fill an empty slot j;  current = j;  then empty every slot i != current with pins[i] == 0.

   Why it is right: all of these are sequentially consistent. If the reader still sees current == i after its pin, then
   a poll that moves current away from i does so later, and looks at pins[i] later still: it sees the pin and leaves the
   slot. If the poll looked at pins[i] before the pin, then it had moved current before, and the reader sees that and
   takes its pin back without having touched the slot. If slot i was emptied, filled again and made current in between,
   the reader pins that newer version, whole: it was filled before it became current. */
#define LORASYNCI_SLOTS 8

typedef struct lorasynci_slot {
    lorasync_adapter seen; /* what readers get; first, so that its address is the slot's */
    int              pins; /* atomic */
    lorasynci_opened held; /* image NULL: empty. The poll's alone */
} lorasynci_slot;

typedef struct lorasynci_served {
    struct lorasynci_served *next;
    char                    *name;
    uint64_t                 word;    /* shm: what was last found in the control; 0: nothing */
    int                      current; /* slot; -1 while nothing is served. Atomic, written by the poll alone */
    lorasynci_slot           slots[LORASYNCI_SLOTS];
} lorasynci_served;

struct lorasync_engine {
    lorasync_allocator  a;
    char               *directory; /* or NULL */
    char               *shm;       /* or NULL */
    char               *adapter;   /* or NULL: all */
    int                 no_verify;
    lorasynci_gpu      *device;  /* NULL: versions in device memory are refused */
    lorasynci_mapped   *mapped;  /* slots that are mapped */
    lorasynci_import   *imports; /* device memory that is open */
    lorasynci_shm_view *view;    /* NULL: not found yet */
    lorasynci_served   *first;   /* atomic */
};

LORASYNCI_FN lorasynci_served *lorasynci_find_served(lorasync_engine *e, const char *name)
{
    lorasynci_served *s = __atomic_load_n(&e->first, __ATOMIC_SEQ_CST);
    while (s && strcmp(s->name, name) != 0) s = s->next;
    return s;
}

LORASYNCI_FN void lorasynci_served_free(lorasync_engine *e, lorasynci_served *s)
{
    size_t i;
    for (i = 0; i < LORASYNCI_SLOTS; i++) lorasynci_opened_free(&s->slots[i].held);
    lorasynci_dealloc(&e->a, s->name);
    lorasynci_dealloc(&e->a, s);
}

/* The adapter of that name; a new one serves nothing yet. NULL when there is no memory. */
LORASYNCI_FN lorasynci_served *lorasynci_enter_served(lorasync_engine *e, const char *name)
{
    lorasynci_served *s = lorasynci_find_served(e, name);
    if (s) return s;
    s = (lorasynci_served *)lorasynci_alloc_array(&e->a, 1, sizeof *s);
    if (!s) return NULL;
    s->name    = lorasynci_copy_text(&e->a, name, strlen(name));
    s->current = -1;
    s->next    = e->first;
    if (!s->name) {
        lorasynci_served_free(e, s);
        return NULL;
    }
    __atomic_store_n(&e->first, s, __ATOMIC_SEQ_CST);
    return s;
}

/* Empties the slots that nobody can see any more and returns an empty one, or NULL. */
LORASYNCI_FN lorasynci_slot *lorasynci_empty_slot(lorasynci_served *s)
{
    lorasynci_slot *empty   = NULL;
    int             current = __atomic_load_n(&s->current, __ATOMIC_SEQ_CST), i;
    for (i = 0; i < LORASYNCI_SLOTS; i++) {
        lorasynci_slot *slot = &s->slots[i];
        if (i == current) continue;
        if (slot->held.image && __atomic_load_n(&slot->pins, __ATOMIC_SEQ_CST) == 0) lorasynci_opened_free(&slot->held);
        if (!slot->held.image) empty = slot;
    }
    return empty;
}

/* Makes an opened version the served one. */
LORASYNCI_FN void lorasynci_serve(lorasynci_served *s, lorasynci_slot *slot, uint64_t version,
                                  const lorasynci_opened *opened)
{
    slot->held         = *opened;
    slot->seen.name    = s->name;
    slot->seen.version = version;
    slot->seen.image   = opened->image;
    slot->seen.config  = opened->config;
    __atomic_store_n(&s->current, (int)(slot - s->slots), __ATOMIC_SEQ_CST);
    lorasynci_empty_slot(s);
}

/* -- polling. In these, LORASYNC_E_NOT_FOUND means that a name has just gone: look again. */

/* What the metadata says, if it says anything, must be what the directory says. */
LORASYNCI_FN lorasync_status lorasynci_check_names(const lorasync_image *image, const char *where, const char *adapter,
                                                   uint64_t version, lorasync_error *err)
{
    if (image->adapter[0] && strcmp(image->adapter, adapter) != 0) {
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "%s: the metadata names adapter '%.60s', expected '%.60s', under which it is published",
                              where, image->adapter, adapter);
    }
    if (image->version && image->version != version) {
        return lorasynci_fail(err, LORASYNC_E_FORMAT,
                              "%s: the metadata says version %llu, expected %llu, under which it is published", where,
                              (unsigned long long)image->version, (unsigned long long)version);
    }
    return LORASYNC_OK;
}

/* Opens and checks <directory>/<adapter>/v<version>. */
LORASYNCI_FN lorasync_status lorasynci_open_version(lorasync_engine *e, int adapter_fd, const char *adapter,
                                                    uint64_t version, lorasynci_opened *out, lorasync_error *err)
{
    char            name[24], where[260];
    lorasync_status status;
    int             fd;
    lorasynci_version_name(name, version);
    snprintf(where, sizeof where, "%s/%.60s/%s", lorasynci_end_of(e->directory), adapter, name);
    fd = lorasynci_open_directory(adapter_fd, name);
    if (fd < 0) return lorasynci_fail_open(err, "open", where, errno);
    status = lorasynci_open_pair(fd, LORASYNCI_MODEL_FILE, where, e->no_verify, &e->a, out, err);
    close(fd);
    if (status < 0) return status;
    status = lorasynci_check_names(out->image, where, adapter, version, err);
    if (status < 0) lorasynci_opened_free(out);
    return status;
}

LORASYNCI_FN int lorasynci_same_content(const lorasync_image *a, const lorasync_image *b)
{
    int on_device = a->on_device || b->on_device; /* then the digest in the header speaks for the payload */
    return a->header_bytes == b->header_bytes && memcmp(a->header, b->header, a->header_bytes) == 0 &&
           a->payload_bytes == b->payload_bytes && (!on_device || a->has_digest) &&
           (!a->payload_bytes || on_device || memcmp(a->payload, b->payload, a->payload_bytes) == 0) &&
           strcmp(a->config_json, b->config_json) == 0;
}

/* The served version is also the published one: is it still the same? Reads the file only if it is another one than
   before. */
LORASYNCI_FN lorasync_status lorasynci_check_again(lorasync_engine *e, int adapter_fd, lorasynci_served *s,
                                                   lorasynci_slot *slot, lorasync_error *err)
{
    char              model[60];
    struct stat       st;
    lorasynci_file_id id;
    lorasynci_opened  opened;
    lorasync_status   status;
    uint64_t          version = slot->seen.version;
    snprintf(model, sizeof model, "v%llu/" LORASYNCI_MODEL_FILE, (unsigned long long)version);
    if (fstatat(adapter_fd, model, &st, 0) != 0) return LORASYNC_NOTHING_NEW;
    id = lorasynci_id_of(&st);
    if (lorasynci_same_id(&id, &slot->held.id)) return LORASYNC_NOTHING_NEW;
    status = lorasynci_open_version(e, adapter_fd, s->name, version, &opened, err);
    if (status < 0) return status == LORASYNC_E_NOT_FOUND ? LORASYNC_NOTHING_NEW : status;
    if (lorasynci_same_content(opened.image, slot->held.image)) {
        slot->held.id = opened.id;
        status        = LORASYNC_NOTHING_NEW;
    } else {
        status = lorasynci_fail(
            err, LORASYNC_E_VERSION,
            "%s/%.60s/v%llu was published a second time with other content; the first is served, publish a new version",
            lorasynci_end_of(e->directory), s->name, (unsigned long long)version);
    }
    lorasynci_opened_free(&opened);
    return status;
}

/* What is published is older than what is served: a trainer that began again where it had cleared away what an earlier
   one left. */
LORASYNCI_FN lorasync_status lorasynci_fail_back(lorasync_error *err, const char *where, uint64_t version,
                                                 uint64_t served)
{
    return lorasynci_fail(
        err, LORASYNC_E_VERSION,
        "%s is v%llu, v%llu is served: versions went back, and an engine takes only newer ones; publish versions above "
        "v%llu, or close this engine and open a new one",
        where, (unsigned long long)version, (unsigned long long)served, (unsigned long long)served);
}

/* One look at the adapter whose `latest` says `version`. */
LORASYNCI_FN lorasync_status lorasynci_poll_version(lorasync_engine *e, int adapter_fd, const char *adapter,
                                                    uint64_t version, lorasync_error *err)
{
    lorasynci_served *s = lorasynci_enter_served(e, adapter);
    lorasynci_slot   *slot;
    lorasynci_opened  opened;
    if (!s) return lorasynci_fail_memory(err, sizeof *s);
    slot = lorasynci_empty_slot(s);
    if (s->current >= 0) {
        lorasynci_slot *now = &s->slots[s->current];
        if (version < now->seen.version) {
            char where[260];
            snprintf(where, sizeof where, "%s/%.60s/latest", lorasynci_end_of(e->directory), adapter);
            return lorasynci_fail_back(err, where, version, now->seen.version);
        }
        if (version == now->seen.version) return lorasynci_check_again(e, adapter_fd, s, now, err);
    }
    if (!slot) {
        return lorasynci_fail(
            err, LORASYNC_E_BUSY,
            "adapter '%.60s': version %llu is there, but %d versions are held by readers and the engine; release some",
            adapter, (unsigned long long)version, LORASYNCI_SLOTS);
    }
    LORASYNCI_TRY(lorasynci_open_version(e, adapter_fd, adapter, version, &opened, err));
    lorasynci_serve(s, slot, version, &opened);
    return LORASYNC_OK;
}

/* What is still not there after looking again. */
LORASYNCI_FN lorasync_status lorasynci_gone_for_good(lorasync_error *err)
{
    if (err) err->status = LORASYNC_E_IO;
    return LORASYNC_E_IO;
}

/* Follows `latest` of one adapter. A version that goes away between looking and opening is followed as long as `latest`
   moves on. */
LORASYNCI_FN lorasync_status lorasynci_poll_link(lorasync_engine *e, int adapter_fd, const char *adapter,
                                                 lorasync_error *err)
{
    lorasync_status status = LORASYNC_NOTHING_NEW;
    uint64_t        version, tried = 0;
    int             turns;
    for (turns = 0; turns < 16; turns++) {
        LORASYNCI_TRY(lorasynci_read_latest(adapter_fd, e->directory, adapter, &version, err));
        if (!version) return LORASYNC_NOTHING_NEW;
        if (version == tried) break;
        status = lorasynci_poll_version(e, adapter_fd, adapter, version, err);
        if (status != LORASYNC_E_NOT_FOUND) return status;
        tried = version;
    }
    return lorasynci_gone_for_good(err);
}

LORASYNCI_FN lorasync_status lorasynci_poll_adapter(lorasync_engine *e, int root_fd, const char *adapter,
                                                    lorasync_error *err)
{
    lorasync_status status;
    int             fd = lorasynci_open_directory(root_fd, adapter);
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) return LORASYNC_NOTHING_NEW;
    if (fd < 0) {
        return lorasynci_fail(err, LORASYNC_E_IO, "cannot open %s/%.60s: %s", lorasynci_end_of(e->directory), adapter,
                              strerror(errno));
    }
    status = lorasynci_poll_link(e, fd, adapter, err);
    close(fd);
    return status;
}

/* Every adapter of the directory. One that fails does not hold up the others; the first failure is returned. */
LORASYNCI_FN lorasync_status lorasynci_poll_all(lorasync_engine *e, int root_fd, lorasync_error *err)
{
    lorasync_status status = LORASYNC_NOTHING_NEW;
    DIR            *list   = lorasynci_list_directory(root_fd);
    struct dirent  *entry;
    if (!list)
        return lorasynci_fail(err, LORASYNC_E_IO, "cannot list %s: %s", lorasynci_end_of(e->directory),
                              strerror(errno));
    while ((entry = readdir(list)) != NULL) {
        lorasync_status one;
        if (entry->d_name[0] == '.') continue;
        if (strcmp(entry->d_name, "latest") == 0) {
            one = lorasynci_fail(status < 0 ? NULL : err, LORASYNC_E_ARGUMENT,
                                 "%s holds versions, not adapters; open the engine on the directory above it",
                                 lorasynci_end_of(e->directory));
        } else {
            one = lorasynci_poll_adapter(e, root_fd, entry->d_name, status < 0 ? NULL : err);
        }
        if (status >= 0 && one != LORASYNC_NOTHING_NEW) status = one;
    }
    closedir(list);
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_poll_directory(lorasync_engine *e, lorasync_error *err)
{
    lorasync_status status;
    const char     *where = lorasynci_end_of(e->directory);
    int             fd    = lorasynci_open_directory(AT_FDCWD, e->directory);
    if (fd < 0 && errno == ENOENT) return LORASYNC_NOTHING_NEW;
    if (fd < 0) return lorasynci_fail(err, LORASYNC_E_IO, "cannot open the directory %s: %s", where, strerror(errno));
    status = e->adapter ? lorasynci_poll_adapter(e, fd, e->adapter, err) : lorasynci_poll_all(e, fd, err);
    close(fd);
    return status;
}

/* -- polling shared memory */

/* Finds the control, and the new one after the old was removed. */
LORASYNCI_FN lorasync_status lorasynci_find_control(lorasync_engine *e, lorasync_error *err)
{
    lorasynci_served *s;
    if (e->view && !lorasynci_shm_is_ours(e->view)) {
        return lorasynci_fail(err, LORASYNC_E_STATE,
                              "this engine of shared memory '%s' was opened by process %ld; open one in each process",
                              e->shm, lorasynci_process_pid(e->view->mine));
    }
    if (e->view && !lorasynci_shm_is_removed(&e->view->map)) return LORASYNC_OK;
    lorasynci_shm_view_drop(e->view);
    e->view = NULL;
    for (s = e->first; s; s = s->next) s->word = 0;
    return lorasynci_shm_view_open(e->shm, &e->a, &e->view, err);
}

/* Reads the header of a mapped slot, and finds its payload: behind the header, or in device memory. */
LORASYNCI_FN lorasync_status lorasynci_parse_mapped(lorasync_engine *e, lorasynci_opened *out, lorasync_error *err)
{
    const lorasynci_shm_head *h      = (const lorasynci_shm_head *)out->mapped->map;
    const unsigned char      *memory = (const unsigned char *)out->mapped->map + LORASYNCI_SHM_HEAD;
    size_t                    total  = (size_t)h->image_bytes;
    if (h->memory.num_bytes) {
        if (!e->device) {
            return lorasynci_fail(
                err, LORASYNC_E_UNSUPPORTED,
                "the payload is in device memory of process %ld on GPU %s; set accept_device when the engine is "
                "opened, or publish in host memory",
                lorasynci_process_pid(h->memory.owner), h->memory.gpu);
        }
        if (h->payload_bytes > h->memory.num_bytes || total < 8 || lorasynci_load_le64(memory, 8) != total - 8 ||
            !lorasynci_checked_add(total, (size_t)h->payload_bytes, &total))
            return lorasynci_fail(
                err, LORASYNC_E_FORMAT,
                "the slot is damaged: its head does not fit its header and device memory; publish again");
        LORASYNCI_TRY(
            lorasynci_import_get(e->device, &e->imports, out->view, out->slot, &h->memory, &out->import, err));
        out->import->num_users++;
        if (!e->no_verify) LORASYNCI_TRY(lorasynci_import_check_ahead(e->device, out->import, err));
    }
    LORASYNCI_TRY(lorasync_image_parse(memory, total, &e->a, &out->image, err)); /* looks at the header only */
    if (!out->import) return LORASYNC_OK;
    lorasync_image_bind(out->image, out->import->payload);
    out->image->on_device = 1;
    return LORASYNC_OK;
}

/* 1 if one's config fits its tensors because another's, which has been checked, does: the same text, and tensors of the
   same names and shapes. */
LORASYNCI_FN int lorasynci_is_checked(const lorasynci_opened *o, const lorasynci_opened *checked)
{
    const lorasync_image *a = o->image, *b = checked ? checked->image : NULL;
    size_t                i;
    if (!b || a->num_tensors != b->num_tensors || strcmp(a->config_json, b->config_json) != 0) return 0;
    for (i = 0; i < a->num_tensors; i++) {
        const lorasync_tensor *x = &a->tensors[i], *y = &b->tensors[i];
        if (x->dtype != y->dtype || x->ndim != y->ndim ||
            memcmp(x->shape, y->shape, (size_t)x->ndim * sizeof x->shape[0]) != 0 || strcmp(x->name, y->name) != 0)
            return 0;
    }
    return 1;
}

/* Opens and checks what is mapped, in place. `served`: the adapter's version before, or NULL. */
LORASYNCI_FN lorasync_status lorasynci_open_mapped(lorasync_engine *e, const lorasynci_opened *served,
                                                   const char *adapter, const char *where, lorasynci_opened *out,
                                                   lorasync_error *err)
{
    const lorasynci_shm_head *h      = (const lorasynci_shm_head *)out->mapped->map;
    const char               *memory = (const char *)h + LORASYNCI_SHM_HEAD;
    int                       verify;
    LORASYNCI_TRY(lorasynci_parse_mapped(e, out, err));
    verify = !e->no_verify && out->image->has_digest;
    LORASYNCI_TRY(lorasynci_refuse_delta(out->image, err));
    out->image->config_json = memory + h->image_bytes;
    if (verify && out->import) LORASYNCI_TRY(lorasynci_import_check_begin(e->device, out->import, out->image, err));
    else if (verify) LORASYNCI_TRY(lorasync_image_verify(out->image, err));
    LORASYNCI_TRY(
        lorasync_config_parse(out->image->config_json, (size_t)h->config_bytes - 1, &e->a, &out->config, err));
    if (!lorasynci_is_checked(out, served))
        LORASYNCI_TRY(lorasync_config_check(out->config, out->image->tensors, out->image->num_tensors, err));
    if (verify && out->import) LORASYNCI_TRY(lorasynci_import_check_end(e->device, out->import, out->image, err));
    return lorasynci_check_names(out->image, where, adapter, h->version, err);
}

/* Pins, opens and checks what an adapter's place in the control names. `now`: the slot that is served, or NULL. */
LORASYNCI_FN lorasync_status lorasynci_open_shared(lorasync_engine *e, const lorasynci_slot *now, int place,
                                                   const char *adapter, uint64_t *out_word, uint64_t *out_version,
                                                   lorasynci_opened *out, lorasync_error *err)
{
    char              where[200];
    lorasynci_mapped *mapped = NULL;
    lorasync_status   status;
    memset(out, 0, sizeof *out);
    out->slot = lorasynci_shm_pin(e->view, place, out_word);
    if (out->slot < 0) {
        return lorasynci_fail(
            err, LORASYNC_E_FORMAT,
            "shared memory '%s' is damaged: %016llx names no slot; remove it with lorasync_shm_remove", e->shm,
            (unsigned long long)*out_word);
    }
    out->view = e->view;
    e->view->num_users++;
    snprintf(where, sizeof where, "'%.60s' in shared memory '%s'", adapter, e->shm);
    status = lorasynci_mapped_get(&e->mapped, e->view, e->shm, out->slot, &mapped, err);
    if (status >= 0) {
        out->mapped = mapped;
        mapped->num_users++;
        *out_version = ((const lorasynci_shm_head *)mapped->map)->version;
        if (now && *out_version < now->seen.version) {
            status = lorasynci_fail_back(err, where, *out_version, now->seen.version);
        } else {
            status = lorasynci_open_mapped(e, now ? &now->held : NULL, adapter, where, out, err);
            if (status < 0) lorasynci_prefix(err, "%s", where);
        }
    }
    if (status < 0) lorasynci_opened_free(out);
    return status == LORASYNC_E_NOT_FOUND ? lorasynci_gone_for_good(err) : status;
}

/* One look at an adapter's place in the control. */
LORASYNCI_FN lorasync_status lorasynci_poll_place(lorasync_engine *e, int place, const char *adapter, uint64_t word,
                                                  lorasync_error *err)
{
    lorasynci_served *s = lorasynci_enter_served(e, adapter);
    lorasynci_slot   *slot, *now;
    lorasynci_opened  opened;
    uint64_t          version = 0;
    if (!s) return lorasynci_fail_memory(err, sizeof *s);
    if (s->word == word) return LORASYNC_NOTHING_NEW;
    slot = lorasynci_empty_slot(s);
    now  = s->current >= 0 ? &s->slots[s->current] : NULL;
    if (!slot) {
        return lorasynci_fail(
            err, LORASYNC_E_BUSY,
            "adapter '%.60s': a newer version is there, but %d versions are held by readers and the engine; release "
            "some",
            adapter, LORASYNCI_SLOTS);
    }
    LORASYNCI_TRY(lorasynci_open_shared(e, now, place, adapter, &word, &version, &opened, err));
    if (!now || version > now->seen.version) {
        lorasynci_serve(s, slot, version, &opened);
        s->word = word;
        return LORASYNC_OK;
    }
    if (lorasynci_same_content(opened.image, now->held.image)) s->word = word;
    lorasynci_opened_free(&opened);
    if (s->word == word) return LORASYNC_NOTHING_NEW;
    return lorasynci_fail(
        err, LORASYNC_E_VERSION,
        "'%.60s' version %llu was published a second time with other content in shared memory '%s'; the first is "
        "served, publish a new version",
        adapter, (unsigned long long)version, e->shm);
}

/* Every adapter of the control. One that fails does not hold up the others; the first failure is returned. */
LORASYNCI_FN lorasync_status lorasynci_poll_shm(lorasync_engine *e, lorasync_error *err)
{
    lorasync_status   status = LORASYNC_NOTHING_NEW, found;
    lorasynci_served *s;
    int               i;
    for (s = e->first; s; s = s->next) lorasynci_empty_slot(s);
    found = lorasynci_find_control(e, err);
    lorasynci_imports_sweep(e->device, &e->imports, e->view);
    lorasynci_mapped_sweep(&e->mapped, e->view);
    if (found != LORASYNC_OK) return found;
    for (i = 0; i < LORASYNCI_SHM_ADAPTERS; i++) {
        const lorasynci_shm_adapter *entry = &e->view->map.control->adapters[i];
        uint64_t                     word  = __atomic_load_n(&entry->word, __ATOMIC_SEQ_CST);
        lorasync_status              one;
        char                         name[sizeof entry->name];
        if (!word) continue;
        memcpy(name, entry->name, sizeof name);
        name[sizeof name - 1] = 0;
        if (e->adapter && strcmp(e->adapter, name) != 0) continue;
        one = lorasynci_check_adapter_name(name, status < 0 ? NULL : err);
        if (one >= 0) one = lorasynci_poll_place(e, i, name, word, status < 0 ? NULL : err);
        if (status >= 0 && one != LORASYNC_NOTHING_NEW) status = one;
    }
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_poll_once(lorasync_engine *e, lorasync_error *err)
{
    lorasync_error
        why; /* the caller's stays untouched when what failed is no failure: a publisher not there yet, a second look
                that succeeds */
    lorasync_status status = e->shm ? lorasynci_poll_shm(e, &why) : lorasynci_poll_directory(e, &why);
    if (status < 0 && err) *err = why;
    return status;
}

LORASYNC_API lorasync_status lorasync_engine_poll(lorasync_engine *engine, int timeout_ms, lorasync_error *err)
{
    uint64_t deadline, now, rest_ns = 50000; /* between looks; doubles up to 5 ms */
    if (!engine) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_engine_poll: engine is NULL");
    deadline = lorasynci_deadline_ns(timeout_ms);
    for (;;) {
        struct timespec t;
        lorasync_status status = lorasynci_poll_once(engine, err);
        if (status != LORASYNC_NOTHING_NEW) return status;
        now = lorasynci_now_ns();
        if (now >= deadline) return LORASYNC_NOTHING_NEW;
        if (rest_ns > deadline - now) rest_ns = deadline - now;
        t.tv_sec  = 0;
        t.tv_nsec = (long)rest_ns;
        nanosleep(&t, NULL);
        rest_ns = rest_ns < 2500000 ? rest_ns * 2 : 5000000;
    }
}

/* -- readers */

LORASYNC_API const lorasync_adapter *lorasync_acquire(lorasync_engine *engine, const char *adapter)
{
    lorasynci_served *s = engine && adapter ? lorasynci_find_served(engine, adapter) : NULL;
    int               i;
    if (!s) return NULL;
    while ((i = __atomic_load_n(&s->current, __ATOMIC_SEQ_CST)) >= 0) {
        lorasynci_slot *slot = &s->slots[i];
        __atomic_fetch_add(&slot->pins, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&s->current, __ATOMIC_SEQ_CST) == i) return &slot->seen;
        __atomic_fetch_sub(&slot->pins, 1, __ATOMIC_SEQ_CST);
    }
    return NULL;
}

LORASYNC_API const lorasync_tensor *lorasync_find(const lorasync_adapter *adapter, const char *key)
{
    return adapter && key ? lorasync_image_find(adapter->image, key) : NULL;
}

LORASYNC_API void lorasync_release(const lorasync_adapter *adapter)
{
    lorasynci_slot *slot = (lorasynci_slot *)(uintptr_t)adapter; /* the pin count is the engine's, though the reader's
                                                                    view is const */
    if (slot) __atomic_fetch_sub(&slot->pins, 1, __ATOMIC_SEQ_CST);
}

/* -- opening and closing */

LORASYNCI_FN lorasync_status lorasynci_engine_fill(lorasync_engine *e, const lorasync_engine_desc *desc,
                                                   lorasync_error *err)
{
    e->no_verify = desc->no_verify;
    if (desc->accept_device && !desc->shm)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "accept_device goes with shm: what lies in a directory is in host memory");
    if (desc->directory && desc->shm)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "directory and shm are both set; an engine has one source");
    if (desc->shm) {
        LORASYNCI_TRY(lorasynci_shm_check_name(desc->shm, err));
        e->shm = lorasynci_copy_text(&e->a, desc->shm, strlen(desc->shm));
        if (!e->shm) return lorasynci_fail_memory(err, strlen(desc->shm) + 1);
    } else {
        LORASYNCI_TRY(lorasynci_copy_directory(&e->a, desc->directory, &e->directory, err));
    }
    if (desc->accept_device) {
        LORASYNCI_TRY(
            lorasynci_gpu_open(&e->a, NULL, !desc->no_verify, "lorasync_engine_desc.accept_device", &e->device, err));
    }
    if (!desc->adapter) return LORASYNC_OK;
    LORASYNCI_TRY(lorasynci_check_adapter_name(desc->adapter, err));
    e->adapter = lorasynci_copy_text(&e->a, desc->adapter, strlen(desc->adapter));
    return e->adapter ? LORASYNC_OK : lorasynci_fail_memory(err, strlen(desc->adapter) + 1);
}

LORASYNC_API lorasync_status lorasync_engine_open(const lorasync_engine_desc *desc, lorasync_engine **out,
                                                  lorasync_error *err)
{
    lorasync_allocator a;
    lorasync_engine   *e;
    lorasync_status    status;
    if (!desc || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_engine_open: %s is NULL", desc ? "out" : "desc");
    if (!lorasynci_take_allocator(desc->allocator, &a))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "allocator: give both alloc and free");
    e = (lorasync_engine *)lorasynci_alloc_array(&a, 1, sizeof *e);
    if (!e) return lorasynci_fail_memory(err, sizeof *e);
    e->a   = a;
    status = lorasynci_engine_fill(e, desc, err);
    if (status < 0) lorasync_engine_close(e);
    else *out = e;
    return status;
}

LORASYNC_API void lorasync_engine_close(lorasync_engine *engine)
{
    lorasync_allocator a;
    if (!engine) return;
    a = engine->a;
    while (engine->first) {
        lorasynci_served *s = engine->first;
        engine->first       = s->next;
        lorasynci_served_free(engine, s);
    }
    lorasynci_imports_sweep(engine->device, &engine->imports, NULL);
    lorasynci_mapped_sweep(&engine->mapped, NULL);
    lorasynci_gpu_close(&a, engine->device);
    lorasynci_shm_view_drop(engine->view);
    lorasynci_dealloc(&a, engine->directory);
    lorasynci_dealloc(&a, engine->shm);
    lorasynci_dealloc(&a, engine->adapter);
    lorasynci_dealloc(&a, engine);
}

/* ------------------------------------------------------------------------------------------------------ >>policy -- */

/* What must be sent to an engine now: two yes-or-no questions, then the steps in a fixed order, each with its own
   condition. Relies on support only.

       state --base? adapter?--> PAUSE | weights | BASE | ADAPTER | kv_cache | cuda_graph | FLUSH | CONTINUE --those
       that hold--> steps */

#define LORASYNC_X(name, text)                                                                                         \
    case name: return text;

LORASYNC_API const char *lorasync_cache_key_text(lorasync_cache_key key)
{
    switch ((int)key) {
        LORASYNC_CACHE_KEY_LIST(LORASYNC_X)
    default: return "unknown cache key";
    }
}

LORASYNC_API const char *lorasync_base_reason_text(lorasync_base_reason reason)
{
    switch ((int)reason) {
        LORASYNC_BASE_REASON_LIST(LORASYNC_X)
    default: return "unknown reason";
    }
}

LORASYNC_API const char *lorasync_adapter_reason_text(lorasync_adapter_reason reason)
{
    switch ((int)reason) {
        LORASYNC_ADAPTER_REASON_LIST(LORASYNC_X)
    default: return "unknown reason";
    }
}

LORASYNC_API const char *lorasync_step_text(lorasync_step step)
{
    switch ((int)step) {
        LORASYNC_STEP_LIST(LORASYNC_X)
    default: return "unknown step";
    }
}

#undef LORASYNC_X

LORASYNC_API const char *lorasync_memory_tag_text(lorasync_memory_tag tag)
{
    switch ((int)tag) {
    case LORASYNC_MEMORY_WEIGHTS: return "weights";
    case LORASYNC_MEMORY_KV_CACHE: return "kv_cache";
    case LORASYNC_MEMORY_CUDA_GRAPH: return "cuda_graph";
    default: return "unknown tag";
    }
}

/* What the engine has given back, of what it knows. */
LORASYNCI_FN unsigned lorasynci_released(const lorasync_policy_state *s) { return s->released & s->tags; }

LORASYNCI_FN lorasync_status lorasynci_policy_check(const lorasync_policy_state *s, lorasync_error *err)
{
    if (s->sleep_level < 0 || s->sleep_level > 2)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "sleep_level is %d, expected 0 (no levels), 1 or 2",
                              s->sleep_level);
    if ((int)s->cache_key < 0 || (int)s->cache_key > (int)LORASYNC_CACHE_NONE)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "cache_key is %d, expected one of lorasync_cache_key",
                              (int)s->cache_key);
    if (s->keeps_memory && lorasynci_released(s))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "keeps_memory is set, yet released is %u: an engine that never sleeps releases nothing",
                              lorasynci_released(s));
    if (!s->no_adapter && !s->version)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "version is 0; give the version to be served, or set no_adapter");
    return LORASYNC_OK;
}

/* 1 when what lay in the weights' memory is gone for good. */
LORASYNCI_FN int lorasynci_weights_lost(const lorasync_policy_state *s)
{
    if (s->keeps_memory || s->weights_backed_up) return 0;
    return s->sleep_level == 2 || (s->sleep_level == 0 && (lorasynci_released(s) & LORASYNC_MEMORY_WEIGHTS));
}

LORASYNCI_FN lorasync_base_reason lorasynci_why_base(const lorasync_policy_state *s)
{
    if (!s->base_synced) return LORASYNC_BASE_NEVER_SENT;
    if (lorasynci_weights_lost(s)) return LORASYNC_BASE_LOST;
    if (s->base_changed) return LORASYNC_BASE_CHANGED;
    return s->verify ? LORASYNC_BASE_VERIFY : LORASYNC_BASE_KEPT;
}

LORASYNCI_FN lorasync_adapter_reason lorasynci_why_adapter(const lorasync_policy_state *s)
{
    if (s->no_adapter) return LORASYNC_ADAPTER_NONE;
    if (!s->held_version) return LORASYNC_ADAPTER_NEVER_SENT;
    if (lorasynci_weights_lost(s)) return LORASYNC_ADAPTER_LOST;
    if (s->held_digest != s->digest) return LORASYNC_ADAPTER_CHANGED;
    return s->ask_adapter || s->verify ? LORASYNC_ADAPTER_ASKED : LORASYNC_ADAPTER_KEPT;
}

LORASYNCI_FN void lorasynci_add_step(lorasync_decision *d, int holds, lorasync_step step)
{
    if (holds) d->steps[d->num_steps++] = step;
}

LORASYNC_API lorasync_status lorasync_policy_decide(const lorasync_policy_state *state, lorasync_decision *out,
                                                    lorasync_error *err)
{
    lorasync_decision d;
    unsigned          resume;
    int               hold, flush;
    if (!state || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_policy_decide: %s is NULL", state ? "out" : "state");
    LORASYNCI_TRY(lorasynci_policy_check(state, err));
    memset(&d, 0, sizeof d);
    d.base_reason    = lorasynci_why_base(state);
    d.adapter_reason = lorasynci_why_adapter(state);
    d.send_base      = d.base_reason != LORASYNC_BASE_KEPT;
    d.send_adapter   = d.adapter_reason != LORASYNC_ADAPTER_KEPT && d.adapter_reason != LORASYNC_ADAPTER_NONE;
    if (!state->no_adapter) d.version = d.send_adapter ? state->version : state->held_version;
    resume = lorasynci_released(state);
    hold   = d.send_base || (d.send_adapter && state->one_slot);
    flush  = state->cache_key != LORASYNC_CACHE_NONE &&
            (d.send_base || (d.send_adapter && state->cache_key == LORASYNC_CACHE_BY_NAME));
    lorasynci_add_step(&d, hold, LORASYNC_STEP_PAUSE);
    lorasynci_add_step(&d, (resume & LORASYNC_MEMORY_WEIGHTS) != 0, LORASYNC_STEP_RESUME_WEIGHTS);
    lorasynci_add_step(&d, d.send_base, LORASYNC_STEP_SEND_BASE);
    lorasynci_add_step(&d, d.send_adapter, LORASYNC_STEP_SEND_ADAPTER);
    lorasynci_add_step(&d, (resume & LORASYNC_MEMORY_KV_CACHE) != 0, LORASYNC_STEP_RESUME_KV_CACHE);
    lorasynci_add_step(&d, (resume & LORASYNC_MEMORY_CUDA_GRAPH) != 0, LORASYNC_STEP_RESUME_CUDA_GRAPH);
    lorasynci_add_step(&d, flush, LORASYNC_STEP_FLUSH);
    lorasynci_add_step(&d, hold, LORASYNC_STEP_CONTINUE);
    *out = d;
    return LORASYNC_OK;
}

/* vLLM unmaps the weights at level 1 too, and restores them on resume. */
LORASYNC_API lorasync_status lorasync_policy_verl(const lorasync_verl_knobs *knobs, lorasync_policy_state *out,
                                                  lorasync_error *err)
{
    lorasync_policy_state s;
    if (!knobs || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_policy_verl: %s is NULL", knobs ? "out" : "knobs");
    if (knobs->sleep_level != 1 && knobs->sleep_level != 2)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "sleep_level is %d, expected 1 or 2", knobs->sleep_level);
    memset(&s, 0, sizeof s);
    s.base_synced  = knobs->base_sent || !knobs->load_format || !strstr(knobs->load_format, "dummy");
    s.sleep_level  = knobs->sleep_level;
    s.keeps_memory = !knobs->free_cache_engine;
    s.tags         = LORASYNC_MEMORY_WEIGHTS | LORASYNC_MEMORY_KV_CACHE;
    s.released     = s.keeps_memory ? 0 : s.tags;
    s.one_slot     = 1;
    s.cache_key    = LORASYNC_CACHE_BY_NAME;
    *out           = s;
    return LORASYNC_OK;
}

/* The words of --offload-rollout-level as tags. */
LORASYNCI_FN lorasync_status lorasynci_offload_tags(const char *words, unsigned *out, lorasync_error *err)
{
    *out = 0;
    for (words = words ? words : ""; *(words += strspn(words, ", \t"));) {
        size_t n = strcspn(words, ", \t");
        if (n == 6 && memcmp(words, "weight", n) == 0) *out |= LORASYNC_MEMORY_WEIGHTS;
        else if (n == 8 && memcmp(words, "kv_cache", n) == 0)
            *out |= LORASYNC_MEMORY_KV_CACHE | LORASYNC_MEMORY_CUDA_GRAPH;
        else
            return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                                  "offload_rollout_level holds \"%.60s\", expected kv_cache or weight", words);
        words += n;
    }
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_policy_miles(const lorasync_miles_knobs *knobs, lorasync_policy_state *out,
                                                   lorasync_error *err)
{
    lorasync_policy_state s;
    if (!knobs || !out)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_policy_miles: %s is NULL", knobs ? "out" : "knobs");
    memset(&s, 0, sizeof s);
    LORASYNCI_TRY(lorasynci_offload_tags(knobs->offload_rollout_level, &s.released, err));
    s.tags = LORASYNC_MEMORY_WEIGHTS | LORASYNC_MEMORY_KV_CACHE;
    if (knobs->has_cuda_graph_tag) s.tags |= LORASYNC_MEMORY_CUDA_GRAPH;
    s.released &= s.tags;
    s.weights_backed_up = knobs->cpu_backup != 0;
    s.base_synced       = knobs->base_sent || knobs->cpu_backup; /* the copy is of the checkpoint that the engine
                                                                    loaded */
    s.base_changed      = !knobs->lora;
    s.no_adapter        = !knobs->lora;
    s.verify            = knobs->check_equal != 0;
    s.one_slot          = 1;
    s.cache_key         = LORASYNC_CACHE_BY_NAME;
    *out                = s;
    return LORASYNC_OK;
}

/* ----------------------------------------------------------------------------------------------------- >>session -- */

/* The easy path: names decide what is taken, a gather plan moves it, the publisher hands it on. */

/* One piece that was added and may be taken. Its name is the canonical key; the texts lie in `texts` and are offsets
   until compile. */
typedef struct lorasynci_added {
    lorasync_piece piece;
    lorasync_role  role;
    uint64_t       raw, key, module, adapter;
} lorasynci_added;

/* Where the next run makes the image: in the plan's own memory, or straight in the slot of shared memory in which
   engines will read it.

       root           own payload | slot 1 | slot 2 | slot 3         a slot that is free takes the next version; its
                                                                     transport keeps the slots mapped
       other ranks    own payload | map    | map    | map            the same memory, by its name; on a GPU opened over
                                                                     CUDA IPC. Without direct
                                                                     placement they need none */
enum {
    LORASYNCI_AIMS = 4
};

typedef struct lorasynci_aimed {
    uint64_t          serial; /* of the slot; 0: nothing here */
    uint64_t          used;   /* when it was aimed at last: the oldest is given up for another. Equal on all ranks */
    char             *map;    /* not on the root; or: */
    size_t            map_bytes;
    lorasynci_import *import;
} lorasynci_aimed;

typedef struct lorasynci_aim {
    char               *own;    /* NULL: this session never aims elsewhere */
    char               *next;   /* payload of the next run */
    uint64_t            serial; /* of the slot that it lies in, or 0 */
    uint64_t            clock;
    int                 blind; /* some rank could not map a slot: none is aimed at any more */
    lorasynci_aimed     slots[LORASYNCI_AIMS];
    lorasynci_shm_view *view; /* of the shared memory with slots on a GPU; not on the root */
    lorasynci_import   *imports;
} lorasynci_aim;

struct lorasync_session {
    lorasync_allocator a;
    lorasync_comm      comm;
    lorasync_desc      desc; /* adapter, config_json and base_model replaced by the copies below */
    char              *adapter, *config_json, *base_model;
    lorasync_cuda      cuda;   /* the copy of desc.cuda, if there is one */
    lorasync_config   *config; /* parsed config_json, or NULL */
    lorasynci_buffer   texts;
    lorasynci_buffer   added;   /* lorasynci_added; after compile only those taken */
    lorasynci_buffer   modules; /* uint64_t offsets of names of linear base modules, for "all-linear" */
    lorasynci_buffer   transports;
    lorasynci_buffer   outcomes; /* lorasync_engine_outcome, one per transport */
    size_t             num_added, num_dropped;
    char               dropped_example[128];
    lorasync_error     add_error; /* the first of them */
    void              *votes;
    lorasync_plan     *plan;
    lorasync_status    lost; /* with which the communicator went before there was a plan, or 0 */
    char              *published_config;
    uint64_t           version;      /* asked for by the last begin */
    uint64_t           last_version; /* published */
    uint64_t           last_digest;  /* of it, on the root */
    int                published;    /* the plan's image is last_version */
    int                publish_timeout_ms;
    char               engines[80]; /* names of the root's transports */
    uint64_t           begin_ns;
    lorasynci_aim      aim;
};

LORASYNCI_FN const lorasync_transport *lorasynci_transports(const lorasync_session *s)
{
    return (const lorasync_transport *)(const void *)s->transports.data;
}

LORASYNCI_FN size_t lorasynci_num_transports(const lorasync_session *s)
{
    return s->transports.size / sizeof(lorasync_transport);
}

LORASYNCI_FN lorasync_engine_outcome *lorasynci_outcomes(const lorasync_session *s)
{
    return (lorasync_engine_outcome *)(void *)s->outcomes.data;
}

LORASYNCI_FN lorasynci_added *lorasynci_added_at(const lorasync_session *s, size_t i)
{
    return (lorasynci_added *)(void *)s->added.data + i;
}

LORASYNCI_FN size_t lorasynci_num_taken(const lorasync_session *s) { return s->added.size / sizeof(lorasynci_added); }

LORASYNCI_FN void lorasynci_aimed_drop(lorasynci_aimed *entry)
{
    if (entry->map) munmap(entry->map, entry->map_bytes);
    if (entry->import) entry->import->num_users--;
    memset(entry, 0, sizeof *entry);
}

/* Before the root closes the transport whose slots these are; the root waits for the others to have done so. */
LORASYNCI_FN void lorasynci_session_drop_aims(lorasync_session *s)
{
    int i;
    for (i = 0; i < LORASYNCI_AIMS; i++) lorasynci_aimed_drop(&s->aim.slots[i]);
    if (!s->plan || !s->plan->device) return;
    lorasynci_imports_sweep(s->plan->gpu, &s->aim.imports, NULL);
    lorasynci_shm_view_drop(s->aim.view);
    if (s->aim.clock) lorasynci_device_await_holders(s->plan);
}

LORASYNC_API void lorasync_close(lorasync_session *session)
{
    lorasync_allocator a;
    size_t             i;
    if (!session) return;
    a = session->a;
    lorasynci_device_settle(session->plan);
    lorasynci_session_drop_aims(session);
    for (i = 0; i < lorasynci_num_transports(session); i++) {
        const lorasync_transport *t = &lorasynci_transports(session)[i];
        if (t->stage == lorasynci_shm_stage) lorasynci_shm_drop_leases(t->user, session);
        if (t->close) t->close(t->user);
    }
    lorasync_plan_free(session->plan);
    lorasync_config_free(session->config);
    lorasynci_buffer_free(&session->texts);
    lorasynci_buffer_free(&session->added);
    lorasynci_buffer_free(&session->modules);
    lorasynci_buffer_free(&session->transports);
    lorasynci_buffer_free(&session->outcomes);
    lorasynci_dealloc(&a, session->adapter), lorasynci_dealloc(&a, session->config_json),
        lorasynci_dealloc(&a, session->base_model);
    lorasynci_dealloc(&a, session->votes), lorasynci_dealloc(&a, session->published_config);
    lorasynci_dealloc(&a, session);
}

/* Copies what the desc points to. */
LORASYNCI_FN lorasync_status lorasynci_session_copy(lorasync_session *s, lorasync_error *err)
{
    const char *adapter = s->desc.adapter ? s->desc.adapter : "default", *config = s->desc.config_json,
               *base      = s->desc.base_model;
    s->publish_timeout_ms = s->desc.publish_timeout_ms > 0 ? s->desc.publish_timeout_ms : 600000;
    s->adapter            = lorasynci_copy_text(&s->a, adapter, strlen(adapter));
    if (config) s->config_json = lorasynci_copy_text(&s->a, config, strlen(config));
    if (base) s->base_model = lorasynci_copy_text(&s->a, base, strlen(base));
    s->votes            = lorasynci_alloc(&s->a, lorasynci_vote_scratch(s->comm.world));
    s->desc.adapter     = s->adapter;
    s->desc.config_json = s->config_json;
    s->desc.base_model  = s->base_model;
    s->desc.comm        = &s->comm;
    s->desc.allocator   = &s->a;
    if (s->desc.cuda) {
        s->cuda      = *s->desc.cuda;
        s->desc.cuda = &s->cuda;
    }
    if (!s->adapter || !s->votes || (config && !s->config_json) || (base && !s->base_model))
        return lorasynci_fail_memory(err, sizeof *s);
    if (config) return lorasync_config_parse(config, strlen(config), &s->a, &s->config, err);
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_open(const lorasync_desc *desc, lorasync_session **out, lorasync_error *err)
{
    lorasync_allocator a;
    lorasync_session  *s;
    lorasync_status    status;
    if (!desc || !out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_open: desc or out is NULL");
    *out = NULL;
    LORASYNCI_TRY(lorasynci_check_host(desc->comm, desc->allocator, &a, err));
    s = (lorasync_session *)lorasynci_alloc_array(&a, 1, sizeof *s);
    if (!s) return lorasynci_fail_memory(err, sizeof *s);
    s->a    = a;
    s->desc = *desc;
    s->comm = lorasynci_comm_copy(desc->comm);
    lorasynci_buffer_init(&s->texts, &s->a);
    lorasynci_buffer_init(&s->added, &s->a);
    lorasynci_buffer_init(&s->modules, &s->a);
    lorasynci_buffer_init(&s->transports, &s->a);
    lorasynci_buffer_init(&s->outcomes, &s->a);
    status = lorasynci_session_copy(s, err);
    if (status == LORASYNC_OK && !s->config && !(desc->lora_alpha >= 0 && desc->lora_alpha < 1e30))
        status = lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lora_alpha is %g; give the value the trainer uses",
                                desc->lora_alpha);
    if (status < 0) {
        lorasync_close(s);
        return status;
    }
    *out = s;
    return LORASYNC_OK;
}

/* -- adding */

LORASYNCI_FN uint64_t lorasynci_keep_text(lorasync_session *s, const char *text)
{
    uint64_t at = s->texts.size;
    lorasynci_put(&s->texts, text, strlen(text) + 1);
    return at;
}

LORASYNCI_FN int lorasynci_wants_base(const lorasync_session *s) { return s->desc.filter && s->desc.filter->base; }

/* A base parameter that is not asked for: counted, and its module noted where it may be a linear one. */
LORASYNCI_FN void lorasynci_drop(lorasync_session *s, const lorasync_piece *p, const lorasync_name *name)
{
    s->num_dropped++;
    if (!s->dropped_example[0]) snprintf(s->dropped_example, sizeof s->dropped_example, "%.120s", p->name);
    if (name->role == LORASYNC_ROLE_BASE && p->ndim == 2 && s->desc.filter && s->desc.filter->target_pattern) {
        size_t n = strlen(p->name);
        if (n > 7 && strcmp(p->name + n - 7, ".weight") == 0) {
            uint64_t at = lorasynci_keep_text(s, name->module);
            lorasynci_put(&s->modules, &at, sizeof at);
        }
    }
}

LORASYNCI_FN lorasync_status lorasynci_add_piece(lorasync_session *s, const lorasync_piece *piece, lorasync_error *err)
{
    lorasynci_added add;
    lorasync_name   name;
    if (!piece) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_add: piece is NULL");
    if (s->plan)
        return lorasynci_fail(err, LORASYNC_E_STATE,
                              "lorasync_add after lorasync_compile: open a new session for another set of parameters");
    if (!piece->name) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "a piece has no name");
    LORASYNCI_TRY(lorasync_parse_name(piece->name, &name, err));
    s->num_added++;
    if (name.role == LORASYNC_ROLE_BASE && !lorasynci_wants_base(s)) {
        lorasynci_drop(s, piece, &name);
    } else {
        LORASYNCI_TRY(lorasynci_piece_check(piece, 0, err));
        memset(&add, 0, sizeof add);
        add.piece      = *piece;
        add.piece.name = NULL;
        add.role       = name.role;
        add.raw        = lorasynci_keep_text(s, piece->name);
        add.key        = lorasynci_keep_text(s, name.key);
        add.module     = lorasynci_keep_text(s, name.module);
        add.adapter    = lorasynci_keep_text(s, name.adapter);
        lorasynci_put(&s->added, &add, sizeof add);
    }
    return s->texts.failed || s->added.failed || s->modules.failed ? lorasynci_fail_memory(err, s->texts.size)
                                                                   : LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_add(lorasync_session *session, const lorasync_piece *piece, lorasync_error *err)
{
    lorasync_error why;
    if (!err) err = &why;
    if (!session) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "session is NULL");
    if (lorasynci_add_piece(session, piece, err) == LORASYNC_OK) return LORASYNC_OK;
    return lorasynci_remember(&session->add_error, err);
}

LORASYNCI_FN lorasync_status lorasynci_session_attach(lorasync_session *session, const lorasync_transport *transport,
                                                      lorasync_error *err)
{
    lorasync_transport t;
    const char        *leased = session->comm.rank == session->desc.root ? session->adapter : NULL;
    if (!transport) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_attach: transport is NULL");
    if (session->plan)
        return lorasynci_fail(err, LORASYNC_E_STATE,
                              "lorasync_attach after lorasync_compile: attach every engine before");
    LORASYNCI_TRY(lorasynci_transport_copy(transport, &t, err));
    if (t.stage != lorasynci_shm_stage) return lorasynci_put_engine(&session->transports, &session->outcomes, &t, err);
    if (leased) LORASYNCI_TRY(lorasynci_shm_check_lease(t.user, session, leased, err));
    LORASYNCI_TRY(lorasynci_put_engine(&session->transports, &session->outcomes, &t, err));
    lorasynci_shm_enter_lease(t.user, session, leased);
    return LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_attach(lorasync_session *session, const lorasync_transport *transport,
                                             lorasync_error *err)
{
    lorasync_error why;
    if (!err) err = &why;
    if (!session) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_attach: session is NULL");
    if (lorasynci_session_attach(session, transport, err) == LORASYNC_OK) return LORASYNC_OK;
    return lorasynci_remember(&session->add_error, err);
}

LORASYNC_API lorasync_status lorasync_attach_directory(lorasync_session *session, const char *directory,
                                                       lorasync_error *err)
{
    lorasync_directory_desc d;
    lorasync_transport      t;
    lorasync_status         status;
    lorasync_error          why;
    if (!err) err = &why;
    if (!session) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "session is NULL");
    memset(&d, 0, sizeof d);
    d.directory = directory;
    d.allocator = &session->a;
    if (lorasync_directory_open(&d, &t, err) < 0) return lorasynci_remember(&session->add_error, err);
    status = lorasync_attach(session, &t, err);
    if (status < 0) t.close(t.user);
    return status;
}

/* -- compiling */

LORASYNCI_FN int lorasynci_is_table_name(const char *module)
{
    static const char *const tables[] = {
        "embed_tokens",   "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "embeddings",
        "embed_positions"};
    const char *dot = strrchr(module, '.'), *last = dot ? dot + 1 : module;
    size_t      i;
    for (i = 0; i < LORASYNCI_COUNT(tables); i++)
        if (strcmp(last, tables[i]) == 0) return 1;
    return 0;
}

/* The matcher, with the model's modules for "all-linear": base modules seen, and modules that carry a linear LoRA
   pair. */
LORASYNCI_FN lorasync_status lorasynci_session_matcher(lorasync_session *s, lorasync_matcher **out, lorasync_error *err)
{
    lorasync_filter  everything;
    size_t           num_base = s->modules.size / sizeof(uint64_t), num_lora = lorasynci_num_taken(s), i, n = 0;
    lorasync_module *modules = (lorasync_module *)lorasynci_alloc_array(&s->a, num_base + num_lora, sizeof *modules);
    lorasync_status  status;
    lorasync_error   why;
    if (!modules) return lorasynci_fail_memory(err, (num_base + num_lora) * sizeof *modules);
    memset(&everything, 0, sizeof everything);
    for (i = 0; i < num_base; i++) {
        modules[n].name      = s->texts.data + ((const uint64_t *)(const void *)s->modules.data)[i];
        modules[n].is_linear = !lorasynci_is_table_name(modules[n].name);
        n++;
    }
    for (i = 0; i < num_lora; i++) {
        const lorasynci_added *add = lorasynci_added_at(s, i);
        if (add->role != LORASYNC_ROLE_LORA_A && add->role != LORASYNC_ROLE_LORA_B) continue;
        modules[n].name        = s->texts.data + add->module;
        modules[n++].is_linear = 1;
    }
    status = lorasync_matcher_create(s->desc.filter ? s->desc.filter : &everything, modules, n, &s->a, out, &why);
    lorasynci_dealloc(&s->a, modules);
    if (status == LORASYNC_E_EMPTY) { /* none of the linear modules is on this rank; whether there are any is seen when
                                         all ranks plan */
        lorasync_module nobody;
        nobody.name      = "(elsewhere)";
        nobody.is_linear = 1;
        status           = lorasync_matcher_create(s->desc.filter, &nobody, 1, &s->a, out, &why);
    }
    if (status < 0) *err = why;
    return status;
}

/* Keeps the pieces that the filter takes, in place. */
LORASYNCI_FN lorasync_status lorasynci_session_filter(lorasync_session *s, lorasync_error *err)
{
    lorasync_matcher *matcher;
    lorasync_name     name;
    size_t            i, kept = 0, num = lorasynci_num_taken(s);
    LORASYNCI_TRY(lorasynci_session_matcher(s, &matcher, err));
    for (i = 0; i < num; i++) {
        lorasynci_added add = *lorasynci_added_at(s, i);
        name.role           = add.role;
        snprintf(name.key, sizeof name.key, "%s", s->texts.data + add.key);
        snprintf(name.module, sizeof name.module, "%s", s->texts.data + add.module);
        snprintf(name.adapter, sizeof name.adapter, "%s", s->texts.data + add.adapter);
        add.piece.name = s->texts.data + add.key; /* texts no longer grow */
        if (lorasync_matcher_takes(matcher, &name, s->adapter)) {
            *lorasynci_added_at(s, kept++) = add;
        } else {
            s->num_dropped++;
            if (!s->dropped_example[0])
                snprintf(s->dropped_example, sizeof s->dropped_example, "%.120s", s->texts.data + add.raw);
        }
    }
    s->added.size = kept * sizeof(lorasynci_added);
    lorasync_matcher_free(matcher);
    return LORASYNC_OK;
}

LORASYNCI_FN const char *lorasynci_added_key(const void *user, size_t i)
{
    return lorasynci_added_at((const lorasync_session *)user, i)->piece.name;
}

/* Two parameters of this rank with one key: a wrapper that hides a difference. Pieces of one parameter have one raw
   name. */
LORASYNCI_FN lorasync_status lorasynci_session_collisions(lorasync_session *s, lorasync_error *err)
{
    lorasynci_table table;
    lorasync_status status = LORASYNC_OK;
    size_t          i, first, num = lorasynci_num_taken(s);
    if (!lorasynci_table_init(&table, &s->a, num)) return lorasynci_fail_memory(err, num * 8);
    for (i = 0; i < num && status == LORASYNC_OK; i++) {
        const char *raw = s->texts.data + lorasynci_added_at(s, i)->raw;
        first = lorasynci_table_insert(&table, lorasynci_added_at(s, i)->piece.name, i, lorasynci_added_key, s);
        if (strcmp(s->texts.data + lorasynci_added_at(s, first)->raw, raw) != 0)
            status = lorasynci_fail(
                err, LORASYNC_E_NAME,
                "%.150s and %.150s are both %.150s in a PEFT file; leave one out with filter.exclude_modules",
                s->texts.data + lorasynci_added_at(s, first)->raw, raw, lorasynci_added_at(s, i)->piece.name);
    }
    lorasynci_table_free(&table);
    return status;
}

/* The factor that fold_scale multiplies into one piece: on lora_B (and its bias, which PEFT scales with it) alpha / r,
   else 1. */
LORASYNCI_FN lorasync_status lorasynci_fold(const lorasync_session *s, const lorasynci_added *add, double *scale,
                                            lorasync_error *err)
{
    int64_t r = add->piece.ndim >= 2 ? add->piece.shape[1] : 0;
    if (add->role != LORASYNC_ROLE_LORA_B && add->role != LORASYNC_ROLE_EMBEDDING_B &&
        add->role != LORASYNC_ROLE_LORA_B_BIAS)
        return LORASYNC_OK;
    if (s->config) *scale = lorasync_config_scale(s->config, s->texts.data + add->module);
    else if (r > 0) *scale = s->desc.lora_alpha / (double)r;
    else
        return lorasynci_fail(err, LORASYNC_E_UNSUPPORTED,
                              "%.200s: fold_scale needs config_json to know the rank of this module", add->piece.name);
    return LORASYNC_OK;
}

LORASYNCI_FN uint64_t lorasynci_hash_text(const char *text, uint64_t seed)
{
    return text ? lorasynci_hash(text, strlen(text), seed) : seed;
}

/* What must be equal on all ranks, beside what the plan compares itself. */
LORASYNCI_FN uint64_t lorasynci_session_tag(const lorasync_session *s)
{
    uint64_t v[6];
    v[0] = (uint64_t)s->desc.fold_scale;
    v[1] = lorasynci_hash_text(s->desc.config_json, 1);
    v[2] = lorasynci_hash_text(s->desc.base_model, 2);
    v[3] = lorasynci_hash_text(s->adapter, 3);
    v[4] = lorasynci_hash(&s->desc.lora_alpha, sizeof s->desc.lora_alpha, 4);
    v[5] = (uint64_t)s->desc.root;
    return lorasynci_hash(v, sizeof v, 5);
}

/* The pieces as a list for a plan: in the buffer they are part of larger records. NULL after a failure. */
LORASYNCI_FN lorasync_piece *lorasynci_session_pieces(const lorasync_session *s, lorasync_error *err)
{
    size_t          i, num = lorasynci_num_taken(s);
    lorasync_piece *pieces = (lorasync_piece *)lorasynci_alloc_array(&s->a, num, sizeof *pieces);
    if (!pieces) lorasynci_fail_memory(err, num * sizeof *pieces);
    for (i = 0; pieces && i < num; i++) {
        double scale = 1;
        pieces[i]    = lorasynci_added_at(s, i)->piece;
        if (!s->desc.fold_scale) continue;
        if (lorasynci_fold(s, lorasynci_added_at(s, i), &scale, err) < 0) {
            lorasynci_dealloc(&s->a, pieces);
            return NULL;
        }
        scale *= pieces[i].scale == 0 ? 1 : pieces[i].scale;
        pieces[i].scale = scale;
        if ((float)scale != 0) continue; /* a piece's 0 would stand for 1 */
        lorasynci_fail(
            err, LORASYNC_E_CONFIG,
            "%.200s: fold_scale would multiply it by 0, since its lora_alpha or alpha_pattern is 0; give it an alpha, "
            "or leave it out",
            pieces[i].name);
        lorasynci_dealloc(&s->a, pieces);
        return NULL;
    }
    return pieces;
}

/* This rank's part of compiling; what fails here is put to the vote. */
LORASYNCI_FN lorasync_status lorasynci_session_prepare(lorasync_session *s, lorasync_error *err)
{
    if (s->add_error.status < 0) {
        *err = s->add_error;
        return err->status;
    }
    if (s->comm.rank == s->desc.root && (s->desc.quorum < 0 || (size_t)s->desc.quorum > lorasynci_num_transports(s)))
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "quorum is %d with %zu engines attached; give 0 (all of them) to %zu", s->desc.quorum,
                              lorasynci_num_transports(s), lorasynci_num_transports(s));
    if (!s->config && s->desc.lora_alpha == 0)
        return lorasynci_fail(
            err, LORASYNC_E_CONFIG,
            "no alpha: set desc.lora_alpha, or desc.config_json to the trainer's adapter_config.json (an engine would "
            "assume 8)");
    if (s->config && s->desc.lora_alpha != 0 && s->desc.lora_alpha != s->config->info.lora_alpha)
        return lorasynci_fail(
            err, LORASYNC_E_CONFIG,
            "desc.lora_alpha is %g, but desc.config_json says lora_alpha %g; leave desc.lora_alpha 0, or make them "
            "agree",
            s->desc.lora_alpha, s->config->info.lora_alpha);
    LORASYNCI_TRY(lorasynci_session_filter(s, err));
    return lorasynci_session_collisions(s, err);
}

/* A verdict of all ranks in the session's own words, with the communicator given up where it is lost. */
LORASYNCI_FN lorasync_status lorasynci_session_agree(lorasync_session *s, const lorasync_error *mine, uint64_t tag,
                                                     const char *tag_name, int *all_flags, lorasync_error *err)
{
    int             timeout_ms = s->desc.timeout_ms > 0 ? s->desc.timeout_ms : 60000;
    lorasync_status status =
        lorasynci_agree(&s->comm, s->votes, timeout_ms, mine->status, mine, tag, tag_name, all_flags, err);
    if (!lorasync_is_lost(status)) return status;
    if (s->plan) return lorasynci_plan_lose(s->plan, status, err);
    lorasynci_comm_abort(&s->comm, err->text);
    s->lost = status;
    return status;
}

LORASYNCI_FN lorasync_status lorasynci_session_plan(lorasync_session *s, lorasync_piece *pieces, lorasync_error *err)
{
    lorasync_plan_desc d;
    lorasync_status    status;
    memset(&d, 0, sizeof d);
    d.comm         = &s->comm;
    d.kind         = LORASYNC_GATHER;
    d.root         = s->desc.root;
    d.wire_dtype   = s->desc.wire_dtype;
    d.have         = pieces;
    d.num_have     = lorasynci_num_taken(s);
    d.adapter      = s->adapter;
    d.bucket_bytes = s->desc.bucket_bytes;
    d.allow_nan    = s->desc.allow_nan;
    d.no_direct    = s->desc.no_direct;
    d.cuda         = s->desc.cuda;
    d.timeout_ms   = s->desc.timeout_ms;
    d.allocator    = &s->a;
    status         = lorasync_plan_create(&d, &s->plan, err);
    if (status == LORASYNC_E_EMPTY)
        return lorasynci_fail(
            err, status,
            "no LoRA parameter of adapter \"%.100s\" on any rank; of %zu declared here %zu were dropped%s%s. "
            "Check desc.adapter, the filter, and that LoRA modules are passed to lorasync_add",
            s->adapter, s->num_added, s->num_dropped, s->dropped_example[0] ? ", the first: " : "", s->dropped_example);
    return status;
}

/* Base weights, maybe with an adapter among them: what is left to check where there is no config. The built-in
   transports publish adapters only. */
LORASYNCI_FN lorasync_status lorasynci_session_check_base(lorasync_session *s, lorasync_error *err)
{
    const lorasync_image *image = s->plan->image;
    lorasynci_pairs       pairs;
    lorasync_error        why;
    lorasync_status       status;
    size_t                i;
    for (i = 0; i < lorasynci_num_transports(s); i++) {
        const lorasync_transport *t = &lorasynci_transports(s)[i];
        if (t->stage == lorasynci_directory_stage || t->stage == lorasynci_shm_stage)
            return lorasynci_fail(
                err, LORASYNC_E_UNSUPPORTED,
                "transport '%.100s' publishes adapters, and with filter.base there is no adapter_config.json; send "
                "base weights with lorasync_stream_open, or use a transport of your own",
                t->name);
    }
    status = lorasynci_pairs_read(&pairs, image->tensors, image->num_tensors, &s->a, &why);
    lorasynci_pairs_free(&pairs);
    if (status >= 0 || status == LORASYNC_E_EMPTY) return LORASYNC_OK; /* base weights alone */
    *err = why;
    return status;
}

/* On the root: pairs and ranks are checked and the config is made, against the tensors that were found. With base
   weights there is no adapter to describe. */
LORASYNCI_FN lorasync_status lorasynci_session_config(lorasync_session *s, lorasync_error *err)
{
    lorasync_config_write_desc w;
    if (!s->plan->has_image) return LORASYNC_OK;
    if (lorasynci_wants_base(s)) return lorasynci_session_check_base(s, err);
    memset(&w, 0, sizeof w);
    w.config     = s->config;
    w.lora_alpha = s->desc.lora_alpha;
    w.base_model = s->base_model;
    w.fold_scale = s->desc.fold_scale;
    LORASYNCI_TRY(lorasync_config_write(&w, s->plan->image->tensors, s->plan->image->num_tensors, &s->a,
                                        &s->published_config, err));
    s->plan->image->config_json = s->published_config;
    return LORASYNC_OK;
}

/* -- what the root hands to all */

/* What the root found when publishing, and the slot for the next run; equal on all ranks afterwards. */
typedef struct lorasynci_outcome {
    uint64_t             digest, publish_ns;
    int32_t              num_engines, num_behind, skipped, in_place;
    lorasynci_shm_target target;
} lorasynci_outcome;

/* One message from the root to each other rank. They wait for nobody else: only the root has anything to say. */
typedef struct lorasynci_notice {
    lorasync_error    verdict;
    lorasynci_outcome outcome;
    char              engines[80]; /* the transports' names, for errors on the other ranks */
} lorasynci_notice;

LORASYNCI_FN int lorasynci_session_is_root(const lorasync_session *s) { return s->comm.rank == s->desc.root; }

/* Brings the root's bytes to all ranks. */
LORASYNCI_FN lorasync_status lorasynci_session_tell(lorasync_session *s, void *bytes, size_t num_bytes, int timeout_ms,
                                                    lorasync_error *err)
{
    const lorasync_comm *c        = &s->comm;
    lorasync_message    *messages = (lorasync_message *)s->votes;
    size_t               n        = 0;
    int                  rank;
    for (rank = 0; rank < c->world; rank++) {
        if (rank == c->rank || (!lorasynci_session_is_root(s) && rank != s->desc.root)) continue;
        messages[n].peer      = rank;
        messages[n].data      = bytes;
        messages[n].num_bytes = num_bytes;
        n++;
    }
    if (n == 0) return LORASYNC_OK;
    if (lorasynci_session_is_root(s)) return c->exchange(c->user, messages, n, NULL, 0, timeout_ms, err);
    return c->exchange(c->user, NULL, 0, messages, n, timeout_ms, err);
}

/* The communicator went while the root was publishing, or telling of it: what is known of that. */
LORASYNCI_FN void lorasynci_session_explain(const lorasync_session *s, const lorasync_error *verdict,
                                            lorasync_error *err)
{
    unsigned long long version = s->published ? s->last_version : s->version;
    if (lorasynci_session_is_root(s) && verdict->status < 0)
        lorasynci_prefix(err, "publishing version %llu failed (%.200s), and not all other ranks know", version,
                         verdict->text);
    else if (lorasynci_session_is_root(s))
        lorasynci_prefix(err, "version %llu is published, and not all other ranks know", version);
    else if (err->status == LORASYNC_E_TIMEOUT)
        lorasynci_prefix(
            err,
            "the root, rank %d, was publishing version %llu to %s and did not end within %d ms; is a transport slow or "
            "stuck? Raise desc.publish_timeout_ms; look at what engines serve before choosing the next version",
            s->desc.root, version, s->engines, s->publish_timeout_ms);
    else
        lorasynci_prefix(
            err,
            "while the root, rank %d, was publishing version %llu to %s; look at what engines serve before choosing "
            "the next",
            s->desc.root, version, s->engines);
}

/* Hands the root's verdict and outcome to all. When it has `published` before, the others may have to wait for that:
   their deadline is another. */
LORASYNCI_FN lorasync_status lorasynci_session_share(lorasync_session *s, const lorasync_error *mine,
                                                     lorasynci_outcome *outcome, int published, lorasync_error *err)
{
    lorasynci_notice notice;
    lorasync_status  status = mine->status;
    int timeout_ms          = published && !lorasynci_session_is_root(s) ? s->publish_timeout_ms : s->plan->timeout_ms;
    if (lorasync_is_lost(status)) {
        *err = *mine;
        return lorasynci_plan_lose(s->plan, status, err);
    }
    memset(&notice, 0, sizeof notice);
    notice.verdict = *mine;
    notice.outcome = *outcome;
    memcpy(notice.engines, s->engines, sizeof notice.engines);
    status = lorasynci_session_tell(s, &notice, sizeof notice, timeout_ms, err);
    if (status < 0 && published) lorasynci_session_explain(s, mine, err);
    if (lorasync_is_lost(status)) return lorasynci_plan_lose(s->plan, status, err);
    if (status < 0) return status;
    notice.verdict.text[sizeof notice.verdict.text - 1] = 0;
    memcpy(s->engines, notice.engines, sizeof s->engines);
    *outcome = notice.outcome;
    status   = notice.verdict.status;
    if (status >= 0) return LORASYNC_OK;
    if (s->comm.world == 1) return lorasynci_fail(err, status, "%s", notice.verdict.text);
    return lorasynci_fail(err, status, "rank %d: %.480s", s->desc.root, notice.verdict.text);
}

/* The root's transports, as its errors and those of the other ranks call them. */
LORASYNCI_FN void lorasynci_session_list_engines(lorasync_session *s)
{
    size_t i, num = lorasynci_session_is_root(s) ? lorasynci_num_transports(s) : 0;
    s->engines[0] = 0;
    for (i = 0; i < num; i++) lorasynci_list_name(s->engines, sizeof s->engines, lorasynci_transports(s)[i].name);
    if (num == 0) snprintf(s->engines, sizeof s->engines, "no engine");
}

/* On the root: asks the first shared-memory transport for the slot of its next version. Without one the image is made
   in the plan's memory. */
LORASYNCI_FN char *lorasynci_session_ask(lorasync_session *s, lorasynci_shm_target *out)
{
    const lorasync_image *image   = s->plan->image;
    char                 *payload = NULL;
    size_t                i, config_bytes;
    memset(out, 0, sizeof *out);
    if (!s->plan->has_image || !s->aim.own) return NULL;
    config_bytes = image->config_json ? strlen(image->config_json) + 1 : 1;
    for (i = 0; i < lorasynci_num_transports(s); i++) {
        const lorasync_transport *t = &lorasynci_transports(s)[i];
        if (t->stage != lorasynci_shm_stage ||
            !lorasynci_gpu_is_same(((const lorasynci_shm *)t->user)->device, s->plan->gpu))
            continue;
        if (lorasynci_shm_slot(t->user, image->adapter, image->header_bytes, image->payload_bytes, config_bytes,
                               &payload, out, NULL) < 0)
            break;
        return payload;
    }
    memset(out, 0, sizeof *out);
    return NULL;
}

/* The entry of a slot, new or not; the one that was not aimed at for longest makes room. */
LORASYNCI_FN lorasynci_aimed *lorasynci_session_entry(lorasync_session *s, uint64_t serial)
{
    lorasynci_aimed *oldest = &s->aim.slots[0];
    int              i;
    for (i = 0; i < LORASYNCI_AIMS; i++) {
        if (s->aim.slots[i].serial == serial) return &s->aim.slots[i];
        if (s->aim.slots[i].used < oldest->used) oldest = &s->aim.slots[i];
    }
    lorasynci_aimed_drop(oldest);
    return oldest;
}

/* Opens the root's slot on another rank; 0 when it cannot be had. */
LORASYNCI_FN int lorasynci_session_open_slot(lorasync_session *s, const lorasynci_shm_target *t, lorasynci_aimed *entry)
{
    lorasync_error err;
    if (!s->plan->device) {
        entry->map = lorasynci_shm_map_target(t, &entry->map_bytes);
        return entry->map && entry->map_bytes > t->payload_at;
    }
    if (t->slot < 0 || t->slot >= LORASYNCI_SHM_SLOTS) return 0;
    if (!s->aim.view && lorasynci_shm_view_open(t->name, &s->a, &s->aim.view, &err) != LORASYNC_OK) return 0;
    if (lorasynci_import_get(s->plan->gpu, &s->aim.imports, s->aim.view, (int)t->slot, &t->memory, &entry->import,
                             &err) < 0)
        return 0;
    entry->import->num_users++;
    return 1;
}

/* Aims the next run at the root's slot. Where ranks write to the image themselves, they all have to open it: a vote,
   the first time it comes up. */
LORASYNCI_FN void lorasynci_session_aim(lorasync_session *s, const lorasynci_shm_target *t, char *on_root)
{
    lorasynci_aimed *entry;
    lorasync_error   err;
    lorasync_status  status;
    int              opened = 1;
    if (!t->serial || s->aim.blind) return;
    if (!s->plan->direct) {
        if (on_root) s->aim.next = on_root;
        return;
    }
    entry = lorasynci_session_entry(s, t->serial);
    if (!entry->serial) {
        if (!s->plan->has_image) opened = lorasynci_session_open_slot(s, t, entry);
        status = lorasynci_agree(&s->comm, s->votes, s->plan->timeout_ms, LORASYNC_OK, NULL, 0, "", &opened, &err);
        if (status < 0)
            lorasynci_plan_lose(s->plan, status, &err); /* what was published is; the next call will say
                                                                       it */
        if (status < 0 || !opened) s->aim.blind = 1;
    }
    entry->serial = t->serial;
    entry->used   = ++s->aim.clock;
    if (s->aim.blind) return;
    s->aim.serial = t->serial;
    s->aim.next   = s->plan->has_image ? on_root : entry->import ? entry->import->payload : entry->map + t->payload_at;
}

/* Until it is known better: the plan's own memory. */
LORASYNCI_FN void lorasynci_session_aim_home(lorasync_session *s)
{
    s->aim.next   = s->aim.own;
    s->aim.serial = 0;
}

LORASYNC_API lorasync_status lorasync_compile(lorasync_session *session, lorasync_error *err)
{
    lorasync_error    mine, why;
    lorasync_piece   *pieces = NULL;
    lorasync_status   status;
    lorasynci_outcome outcome;
    char             *slot;
    if (!err) err = &why;
    if (!session) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "session is NULL");
    if (session->plan) return lorasynci_fail(err, LORASYNC_E_STATE, "lorasync_compile was called already");
    if (session->lost)
        return lorasynci_fail(
            err, LORASYNC_E_LOST,
            "the communicator was lost before: close the session, make a new communicator, open again");
    memset(&mine, 0, sizeof mine);
    if (lorasynci_session_prepare(session, &mine) == LORASYNC_OK) pieces = lorasynci_session_pieces(session, &mine);
    status = lorasynci_session_agree(session, &mine, lorasynci_session_tag(session),
                                     "desc (adapter, root, config, lora_alpha, base_model or fold_scale), hashed", NULL,
                                     err);
    if (status == LORASYNC_OK) status = lorasynci_session_plan(session, pieces, err);
    lorasynci_dealloc(&session->a, pieces);
    if (lorasync_is_lost(status)) session->lost = status;
    if (status < 0) return status;
    memset(&outcome, 0, sizeof outcome);
    if (!session->plan->device || !session->plan->has_image || lorasynci_device_keeps(session->plan->device))
        session->aim.own = session->plan->memory[LORASYNCI_IMAGE];
    lorasynci_session_aim_home(session);
    lorasynci_session_config(session, &mine);
    lorasynci_session_list_engines(session);
    slot   = lorasynci_session_ask(session, &outcome.target);
    status = lorasynci_session_share(session, &mine, &outcome, 0, err);
    if (status == LORASYNC_OK) lorasynci_session_aim(session, &outcome.target, slot);
    if (status < 0) {
        session->lost = session->plan->lost;
        lorasync_plan_free(session->plan);
        session->plan = NULL;
        lorasynci_dealloc(&session->a, session->published_config);
        session->published_config = NULL;
    }
    return status;
}

/* -- running */

LORASYNCI_FN lorasync_status lorasynci_session_ready(const lorasync_session *session, const char *what,
                                                     lorasync_error *err)
{
    if (!session) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%s: session is NULL", what);
    if (!session->plan) return lorasynci_fail(err, LORASYNC_E_STATE, "%s before lorasync_compile succeeded", what);
    return LORASYNC_OK;
}

/* Begins a run for a version; or lets it fail, when that is not newer than the last one, or when the begin is being
   captured in a CUDA graph, which would publish every launch as the same version. */
LORASYNCI_FN lorasync_status lorasynci_begin_version(lorasync_plan *plan, uint64_t version, uint64_t last_version,
                                                     lorasync_error *err)
{
    int captured;
    if (plan->begun || plan->lost) return lorasync_plan_begin(plan, err);
    plan->tag = version;
    captured  = lorasynci_gpu_is_captured(plan->gpu);
    if (version > last_version && !captured) return lorasync_plan_begin(plan, err);
    plan->begun    = 1; /* nothing is packed, but the others are waiting for this rank's vote */
    plan->captured = 0;
    lorasynci_mark_begun(plan);
    if (captured)
        lorasynci_fail(&plan->begin_error, LORASYNC_E_UNSUPPORTED,
                       "a session cannot be captured in a CUDA graph; capture lorasync_plan_begin of a plan");
    else
        lorasynci_fail(&plan->begin_error, LORASYNC_E_VERSION,
                       "version %llu is not newer than %llu, the last one published; count versions up from 1",
                       (unsigned long long)version, (unsigned long long)last_version);
    if (!captured) lorasynci_device_veto(plan);
    if (err) *err = plan->begin_error;
    return plan->begin_error.status;
}

/* What the run about to begin writes to, as a number that is equal on all ranks. */
LORASYNCI_FN uint64_t lorasynci_session_take_aim(lorasync_session *s)
{
    if (!s->aim.own) return 0;
    lorasynci_plan_aim(s->plan, s->aim.next);
    return s->plan->device && s->plan->direct && s->aim.serial ? lorasynci_mix(s->aim.serial) : 0;
}

LORASYNC_API lorasync_status lorasync_begin(lorasync_session *session, uint64_t version, lorasync_error *err)
{
    lorasync_status status;
    uint64_t        aimed_at = 0;
    LORASYNCI_TRY(lorasynci_session_ready(session, "lorasync_begin", err));
    if (session->plan->begun || session->plan->lost) return lorasync_plan_begin(session->plan, err); /* says why not */
    session->begin_ns  = lorasynci_now_ns();
    session->version   = version;
    session->published = 0;
    if (version > session->last_version) aimed_at = lorasynci_session_take_aim(session);
    status = lorasynci_begin_version(session->plan, version, session->last_version, err);
    session->plan->tag ^= aimed_at; /* ranks that write to different memory must not agree */
    return status;
}


/* 1 when every engine has exactly this image, but for its version: then the image becomes that version again. */
LORASYNCI_FN int lorasynci_session_skips(lorasync_session *s, lorasync_image *image)
{
    size_t i, num = lorasynci_num_transports(s);
    if (!s->desc.skip_unchanged || !s->last_version || image->digest != s->last_digest) return 0;
    if (lorasynci_num_serving(lorasynci_outcomes(s), num, s->last_version) < num) return 0;
    for (i = 0; i < num; i++) {
        lorasync_engine_outcome *o = &lorasynci_outcomes(s)[i];
        o->state                   = LORASYNC_ENGINE_COMMITTED;
        memset(&o->error, 0, sizeof o->error);
    }
    lorasync_image_stamp(image, s->last_version, image->digest);
    return 1;
}

/* To all engines, or to those that do not have it. */
LORASYNCI_FN lorasync_status lorasynci_session_to_engines(lorasync_session *s, const lorasync_image *image,
                                                          int behind_only, lorasync_error *err)
{
    lorasynci_publication p;
    memset(&p, 0, sizeof p);
    p.transports  = lorasynci_transports(s);
    p.outcomes    = lorasynci_outcomes(s);
    p.num         = lorasynci_num_transports(s);
    p.need        = behind_only ? 0 : s->desc.quorum ? (size_t)s->desc.quorum : p.num;
    p.behind_only = behind_only;
    p.image       = image;
    if (!behind_only) p.comm = &s->comm; /* else others serve it already */
    return lorasynci_publish(&p, err);
}

LORASYNCI_FN lorasync_status lorasynci_session_publish(lorasync_session *s, lorasynci_outcome *out, lorasync_error *err)
{
    lorasync_image *image  = lorasync_plan_image(s->plan);
    uint64_t        start  = lorasynci_now_ns();
    lorasync_status status = LORASYNC_OK;
    if (!image) return LORASYNC_OK;
    out->skipped = lorasynci_session_skips(s, image);
    if (!out->skipped) {
        lorasync_image_stamp(image, s->version, image->digest);
        status = lorasynci_session_to_engines(s, image, 0, err);
    }
    out->digest   = image->digest;
    out->in_place = !out->skipped && s->aim.own && image->payload != s->aim.own;
    out->num_engines =
        (int32_t)lorasynci_num_serving(lorasynci_outcomes(s), lorasynci_num_transports(s), image->version);
    out->num_behind = (int32_t)lorasynci_num_transports(s) - out->num_engines;
    out->publish_ns = lorasynci_now_ns() - start;
    return status;
}

LORASYNCI_FN void lorasynci_session_report(const lorasync_session *s, const lorasynci_outcome *outcome,
                                           lorasync_report *out)
{
    const lorasync_plan_stats *p     = &s->plan->stats;
    const lorasync_image      *image = lorasync_plan_image(s->plan);
    memset(out, 0, sizeof *out);
    out->version       = s->last_version;
    out->digest        = outcome->digest;
    out->num_tensors   = p->num_tensors;
    out->payload_bytes = image ? image->payload_bytes : 0;
    out->num_engines   = outcome->num_engines;
    out->num_behind    = outcome->num_behind;
    out->skipped       = outcome->skipped;
    out->direct        = p->direct;
    out->in_place      = outcome->in_place;
    out->pack_ns       = p->pack_ns;
    out->exchange_ns   = p->exchange_ns;
    out->place_ns      = p->place_ns;
    out->publish_ns    = outcome->publish_ns;
    out->total_ns      = lorasynci_now_ns() - s->begin_ns;
}

LORASYNC_API lorasync_status lorasync_wait(lorasync_session *session, lorasync_report *out_report, lorasync_error *err)
{
    lorasynci_outcome outcome;
    lorasync_error    mine, why;
    char             *slot;
    if (!err) err = &why;
    LORASYNCI_TRY(lorasynci_session_ready(session, "lorasync_wait", err));
    LORASYNCI_TRY(lorasync_plan_wait(session->plan, err));
    memset(&mine, 0, sizeof mine);
    memset(&outcome, 0, sizeof outcome);
    lorasynci_session_aim_home(session); /* the slot is served from here on, whatever comes of the rest */
    lorasynci_session_publish(session, &outcome, &mine);
    slot = lorasynci_session_ask(session, &outcome.target);
    LORASYNCI_TRY(lorasynci_session_share(session, &mine, &outcome, 1, err));
    lorasynci_session_aim(session, &outcome.target, slot);
    if (!outcome.skipped) session->last_version = session->version;
    session->last_digest = outcome.digest;
    session->published   = 1;
    if (out_report) lorasynci_session_report(session, &outcome, out_report);
    return LORASYNC_OK;
}

/* The engines that stayed behind decide the verdict; those that could be brought up serve it in any case. */
LORASYNCI_FN void lorasynci_session_republish(lorasync_session *s, lorasynci_outcome *out, lorasync_error *err)
{
    const lorasync_image *image = lorasync_plan_image(s->plan);
    size_t                i, num = lorasynci_num_transports(s);
    if (!image) return;
    out->num_behind = (int32_t)(num - lorasynci_num_serving(lorasynci_outcomes(s), num, image->version));
    lorasynci_session_to_engines(s, image, 1, err);
    for (i = num; i-- > 0;)
        if (lorasynci_outcomes(s)[i].version != image->version) *err = lorasynci_outcomes(s)[i].error;
}

LORASYNC_API lorasync_status lorasync_republish(lorasync_session *session, lorasync_error *err)
{
    lorasynci_outcome outcome;
    lorasync_error    mine, why;
    lorasync_status   status;
    char             *slot;
    if (!err) err = &why;
    LORASYNCI_TRY(lorasynci_session_ready(session, "lorasync_republish", err));
    if (session->plan->lost)
        return lorasynci_fail(
            err, LORASYNC_E_LOST,
            "the communicator was lost before: close the session, make a new communicator, open again");
    memset(&mine, 0, sizeof mine);
    memset(&outcome, 0, sizeof outcome);
    if (!session->published)
        lorasynci_fail(&mine, LORASYNC_E_STATE,
                       "lorasync_republish: nothing was published since the last begin; call lorasync_sync");
    status = lorasynci_session_agree(session, &mine, session->last_version, "version to republish", NULL, err);
    if (status < 0) return status;
    lorasynci_session_aim_home(session);
    lorasynci_session_republish(session, &outcome, &mine);
    slot = lorasynci_session_ask(session, &outcome.target);
    LORASYNCI_TRY(lorasynci_session_share(session, &mine, &outcome, 1, err));
    lorasynci_session_aim(session, &outcome.target, slot);
    return outcome.num_behind ? LORASYNC_OK : LORASYNC_NOTHING_NEW;
}

LORASYNC_API const lorasync_engine_outcome *lorasync_get_outcomes(const lorasync_session *session, size_t *out_num)
{
    size_t num = session && session->comm.rank == session->desc.root ? lorasynci_num_transports(session) : 0;
    if (out_num) *out_num = num;
    return num ? lorasynci_outcomes(session) : NULL;
}

LORASYNC_API lorasync_status lorasync_sync(lorasync_session *session, uint64_t version, lorasync_report *out_report,
                                           lorasync_error *err)
{
    lorasync_status status = lorasync_begin(session, version, err);
    if (!session || status == LORASYNC_E_STATE || lorasync_is_lost(status))
        return status; /* not begun: there is
                                                                                              nothing to wait for */
    return lorasync_wait(session, out_report, err);
}

/* -- resuming */

LORASYNCI_FN lorasync_status lorasynci_session_scatter(lorasync_session *s, const lorasync_image *image,
                                                       lorasync_piece *pieces, lorasync_error *err)
{
    lorasync_plan_desc d;
    lorasync_plan     *plan;
    lorasync_status    status;
    memset(&d, 0, sizeof d);
    d.comm         = &s->comm;
    d.kind         = LORASYNC_SCATTER;
    d.root         = s->desc.root;
    d.want         = pieces;
    d.num_want     = lorasynci_num_taken(s);
    d.image        = image;
    d.cuda         = s->desc.cuda;
    d.bucket_bytes = s->desc.bucket_bytes;
    d.timeout_ms   = s->desc.timeout_ms;
    d.allocator    = &s->a;
    LORASYNCI_TRY(lorasync_plan_create(&d, &plan, err));
    lorasync_plan_begin(plan, NULL);
    status = lorasync_plan_wait(plan, err);
    if (status < 0) lorasynci_prefix(err, "parameters may be partly written; load again before training on");
    lorasync_plan_free(plan);
    return status;
}

/* Under another scale the same weights are another adapter. */
LORASYNCI_FN lorasync_status lorasynci_compare_scales(const lorasync_config *file, const lorasync_config *session,
                                                      const lorasync_image *image, lorasync_error *err)
{
    lorasync_name name;
    size_t        i;
    for (i = 0; i < image->num_tensors; i++) {
        double was, is;
        LORASYNCI_TRY(lorasync_parse_name(image->tensors[i].name, &name, err));
        if (name.role != LORASYNC_ROLE_LORA_B && name.role != LORASYNC_ROLE_EMBEDDING_B) continue;
        was = lorasync_config_scale(file, name.module);
        is  = lorasync_config_scale(session, name.module);
        if (fabs(was - is) <= 1e-9 * fabs(was)) continue;
        return lorasynci_fail(
            err, LORASYNC_E_CONFIG,
            "module %.200s: the file's adapter_config.json gives it scale %.9g, this session %.9g; open the session "
            "with the lora_alpha or config_json that the file was trained with",
            name.module, was, is);
    }
    return LORASYNC_OK;
}

/* On the root: what can be loaded here. A single file comes without a config, and is believed. */
LORASYNCI_FN lorasync_status lorasynci_session_open_file(const lorasync_session *s, const char *path,
                                                         lorasync_image **out, lorasync_error *err)
{
    lorasync_config *file = NULL, *own = NULL;
    const char      *text   = s->published_config;
    lorasync_status  status = lorasync_open_adapter(path, &s->a, out, &file, err);
    if (status == LORASYNC_OK && file && text) status = lorasync_config_parse(text, strlen(text), &s->a, &own, err);
    if (status == LORASYNC_OK && own) status = lorasynci_compare_scales(file, own, *out, err);
    lorasync_config_free(own);
    lorasync_config_free(file);
    return status;
}

/* -- memory that is part of several tensors, as a fused qkv has one A for three: it is loaded when the file's tensors
   are equal

       pieces by address   | q.A | k.A | v.A |     one address, one layout: k is q's alias, v is k's
       file                  digest of each, told by the root in pages: alias after alias must have the same */

typedef struct lorasynci_alias {
    const char *names[2];
    uint64_t    keys[2];     /* hashes of the names */
    uint64_t    contents[2]; /* of the file's tensors; 0: not told, or not in the file */
} lorasynci_alias;

typedef struct lorasynci_loading {
    lorasync_image  *image; /* on the root */
    lorasync_piece  *pieces;
    lorasynci_alias *aliases;
    size_t           num_aliases;
} lorasynci_loading;

LORASYNCI_FN int lorasynci_piece_order(const void *a, const void *b)
{
    const lorasync_piece *p = *(const lorasync_piece *const *)a, *q = *(const lorasync_piece *const *)b;
    uintptr_t             x = (uintptr_t)p->data, y = (uintptr_t)q->data;
    if (x != y) return x < y ? -1 : 1;
    return p < q ? -1 : 1;
}

/* Where the elements of a piece lie, as strides; 1 when they lie in a row. */
LORASYNCI_FN int lorasynci_piece_strides(const lorasync_piece *p, int64_t *stride)
{
    int64_t row[LORASYNC_MAX_DIMS];
    int     d, strided = 0, in_a_row = 1;
    lorasynci_row_major(p->box.len, p->box.ndim, row);
    for (d = 0; d < p->box.ndim; d++) strided |= p->stride[d] != 0;
    for (d = 0; d < p->box.ndim; d++) {
        stride[d] = p->box.len[d] < 2 ? 0 : strided ? p->stride[d] : row[d];
        in_a_row &= p->box.len[d] < 2 || stride[d] == row[d];
    }
    return in_a_row;
}

LORASYNCI_FN size_t lorasynci_piece_bytes(const lorasync_piece *p)
{
    int64_t n = lorasync_dtype_bits(p->dtype);
    int     d;
    for (d = 0; d < p->box.ndim; d++) n *= p->box.len[d];
    return (size_t)(n / 8);
}

/* Two pieces at one address: 1 when each element of both is the same element. */
LORASYNCI_FN int lorasynci_same_layout(const lorasync_piece *p, const lorasync_piece *q)
{
    int64_t x[LORASYNC_MAX_DIMS], y[LORASYNC_MAX_DIMS];
    int     d;
    if (p->dtype != q->dtype || p->ndim != q->ndim || p->box.flat != q->box.flat || p->box.ndim != q->box.ndim)
        return 0;
    lorasynci_piece_strides(p, x);
    lorasynci_piece_strides(q, y);
    for (d = 0; d < p->ndim; d++)
        if (p->shape[d] != q->shape[d]) return 0;
    for (d = 0; d < p->box.ndim; d++)
        if (p->box.off[d] != q->box.off[d] || p->box.len[d] != q->box.len[d] || x[d] != y[d]) return 0;
    return 1;
}

/* Notes the aliases among pieces in the order of their addresses. Pieces with gaps that begin at different addresses
   may interleave without sharing an element, and are taken to. */
LORASYNCI_FN lorasync_status lorasynci_find_aliases(const lorasync_piece *const *order, size_t num,
                                                    lorasynci_loading *l, lorasync_error *err)
{
    const lorasync_piece *reach = NULL; /* of those in a row, the one that ends last */
    int64_t               stride[LORASYNC_MAX_DIMS];
    size_t                i;
    for (i = 0; i < num; i++) {
        const lorasync_piece *p = order[i], *q = i ? order[i - 1] : NULL;
        int                   in_a_row    = lorasynci_piece_strides(p, stride);
        int                   one_address = q && q->data == p->data && strcmp(q->name, p->name) != 0, overlaps = 0;
        const char           *end = reach ? (const char *)reach->data + lorasynci_piece_bytes(reach) : NULL;
        if (one_address) overlaps = !lorasynci_same_layout(p, q);
        else if (in_a_row && reach && reach->data != p->data && (const char *)p->data < end)
            q = reach, overlaps = strcmp(q->name, p->name) != 0;
        if (overlaps)
            return lorasynci_fail(
                err, LORASYNC_E_LAYOUT,
                "%.200s and %.200s overlap in memory and are not the same elements of equal tensors; give each memory "
                "of its own",
                q->name, p->name);
        if (one_address) {
            lorasynci_alias *alias = &l->aliases[l->num_aliases++];
            alias->names[0] = q->name, alias->names[1] = p->name;
            alias->keys[0] = lorasynci_hash_text(q->name, 1), alias->keys[1] = lorasynci_hash_text(p->name, 1);
        }
        if (in_a_row && (!reach || (const char *)p->data + lorasynci_piece_bytes(p) > end)) reach = p;
    }
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_session_aliases(const lorasync_session *s, lorasynci_loading *l,
                                                       lorasync_error *err)
{
    size_t                 i, n = 0, num = lorasynci_num_taken(s);
    const lorasync_piece **order = (const lorasync_piece **)lorasynci_alloc_array(&s->a, num, sizeof *order);
    lorasync_status        status;
    l->aliases = (lorasynci_alias *)lorasynci_alloc_array(&s->a, num, sizeof *l->aliases);
    if (!order || !l->aliases) {
        lorasynci_dealloc(&s->a, order);
        return lorasynci_fail_memory(err, num * sizeof *l->aliases);
    }
    for (i = 0; i < num; i++)
        if (lorasynci_piece_bytes(&l->pieces[i])) order[n++] = &l->pieces[i];
    if (n) qsort(order, n, sizeof *order, lorasynci_piece_order);
    status = lorasynci_find_aliases((const lorasync_piece *const *)order, n, l, err);
    lorasynci_dealloc(&s->a, order);
    return status;
}

/* What the root tells of the file's tensors, some at a time. */
typedef struct lorasynci_page {
    uint64_t num, more;
    uint64_t keys[32], contents[32];
} lorasynci_page;

LORASYNCI_FN void lorasynci_fill_page(const lorasync_image *image, size_t from, lorasynci_page *page)
{
    size_t i;
    memset(page, 0, sizeof *page);
    for (i = from; i < image->num_tensors && page->num < LORASYNCI_COUNT(page->keys); i++, page->num++) {
        const lorasync_tensor *t = &image->tensors[i];
        uint64_t               v[3];
        v[0] = lorasync_digest(t->data, t->num_bytes, 0);
        v[1] = (uint64_t)t->num_bytes;
        v[2] = (uint64_t)t->dtype;

        page->keys[page->num]     = lorasynci_hash_text(t->name, 1);
        page->contents[page->num] = lorasynci_hash(v, sizeof v, 6) | 1;
    }
    page->more = i < image->num_tensors;
}

LORASYNCI_FN void lorasynci_read_page(const lorasynci_page *page, lorasynci_loading *l)
{
    size_t i, k;
    int    side;
    for (i = 0; i < page->num && i < LORASYNCI_COUNT(page->keys); i++)
        for (k = 0; k < l->num_aliases; k++)
            for (side = 0; side < 2; side++)
                if (l->aliases[k].keys[side] == page->keys[i]) l->aliases[k].contents[side] = page->contents[i];
}

/* Collective: aliases of any rank must be equal in the file. One that is not in the file is the plan's business. */
LORASYNCI_FN lorasync_status lorasynci_session_compare_aliases(lorasync_session *s, lorasynci_loading *l,
                                                               lorasync_error *err)
{
    lorasynci_page  page;
    lorasync_error  mine;
    lorasync_status status;
    size_t          from = 0, k;
    memset(&page, 0, sizeof page);
    memset(&mine, 0, sizeof mine);
    do {
        if (lorasynci_session_is_root(s)) lorasynci_fill_page(l->image, from, &page);
        status = lorasynci_session_tell(s, &page, sizeof page, s->plan->timeout_ms, err);
        if (status < 0) return lorasynci_plan_lose(s->plan, status, err);
        lorasynci_read_page(&page, l);
        from += (size_t)page.num;
    } while (page.more);
    for (k = 0; k < l->num_aliases && mine.status == LORASYNC_OK; k++) {
        const lorasynci_alias *alias = &l->aliases[k];
        if (alias->contents[0] == alias->contents[1] || !alias->contents[0] || !alias->contents[1]) continue;
        lorasynci_fail(
            &mine, LORASYNC_E_LAYOUT,
            "%.180s and %.180s are one memory here, and the file has different values for them; give each memory of "
            "its own",
            alias->names[0], alias->names[1]);
    }
    return lorasynci_session_agree(s, &mine, 0, "", NULL, err);
}

/* This rank's part of loading; what fails here is put to the vote. */
LORASYNCI_FN lorasync_status lorasynci_session_prepare_load(const lorasync_session *s, const char *path,
                                                            lorasynci_loading *l, lorasync_error *err)
{
    size_t i;
    if (!path) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "path is NULL");
    if (s->plan->begun)
        return lorasynci_fail(err, LORASYNC_E_STATE, "lorasync_load between begin and wait: call wait first");
    if (s->desc.fold_scale)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "a session with fold_scale cannot load: what it publishes is not what it trains; load with fold_scale 0");
    if (lorasynci_session_is_root(s)) LORASYNCI_TRY(lorasynci_session_open_file(s, path, &l->image, err));
    l->pieces = lorasynci_session_pieces(s, err);
    if (!l->pieces) return err->status;
    for (i = 0; i < lorasynci_num_taken(s); i++)
        if (l->pieces[i].scale != 0 && l->pieces[i].scale != 1)
            return lorasynci_fail(
                err, LORASYNC_E_UNSUPPORTED,
                "%.200s: a session with piece.scale cannot load: what it publishes is not what it trains; load with "
                "scale 0",
                l->pieces[i].name);
    return lorasynci_session_aliases(s, l, err);
}

LORASYNC_API lorasync_status lorasync_load(lorasync_session *session, const char *path, lorasync_error *err)
{
    lorasync_error    mine, why;
    lorasynci_loading l;
    lorasync_status   status;
    int               no_alias;
    if (!err) err = &why;
    LORASYNCI_TRY(lorasynci_session_ready(session, "lorasync_load", err));
    if (session->plan->lost)
        return lorasynci_fail(
            err, LORASYNC_E_LOST,
            "the communicator was lost before: close the session, make a new communicator, open again");
    memset(&mine, 0, sizeof mine);
    memset(&l, 0, sizeof l);
    lorasynci_session_prepare_load(session, path, &l, &mine);
    no_alias = l.num_aliases == 0;
    status   = lorasynci_session_agree(session, &mine, lorasynci_hash_text(path, 1), "path, hashed", &no_alias, err);
    if (status == LORASYNC_OK && !no_alias) status = lorasynci_session_compare_aliases(session, &l, err);
    if (status == LORASYNC_OK) status = lorasynci_session_scatter(session, l.image, l.pieces, err);
    if (lorasync_is_lost(status)) session->plan->lost = status;
    lorasync_image_free(l.image);
    lorasynci_dealloc(&session->a, l.pieces);
    lorasynci_dealloc(&session->a, l.aliases);
    return status;
}

LORASYNC_API void lorasync_get_info(const lorasync_session *session, lorasync_session_info *out)
{
    const lorasync_image *image = session && session->plan ? session->plan->image : NULL;
    if (!out) return;
    memset(out, 0, sizeof *out);
    if (!session) return;
    out->num_added   = session->num_added;
    out->num_taken   = lorasynci_num_taken(session);
    out->num_dropped = session->num_dropped;
    if (session->plan) out->plan = session->plan->stats;
    out->num_tensors   = out->plan.num_tensors;
    out->payload_bytes = image ? image->payload_bytes : 0;
}

LORASYNC_API const lorasync_image *lorasync_session_image(const lorasync_session *session)
{
    return session && session->plan && session->published ? lorasync_plan_image(session->plan) : NULL;
}

/* -------------------------------------------------------------------------------------------------------- >>base -- */

/* Base weights: a session without filter and config, over many plans. The planner's own tools merge the names; then
   each bucket is a gather plan that runs in lent memory, two payloads and one staging for all of them. It needs no
   second staging: a bucket is packed when the exchange of the one before is over.

       plans      | 0 | 1 | 2 | 3 | ..
       payloads   [ 0, 2, 4 .. ][ 1, 3 .. ]   even and odd: others write bucket k + 1 (direct) while the root stages
                                              bucket k
       staging    [ send ][ receive ]

   A transport's failure on bucket k is the root's vote on bucket k + 1, so that every rank stops at the same bucket. */

typedef struct lorasynci_base_piece {
    lorasync_piece piece;
    uint64_t       raw, key; /* offsets in `texts` */
} lorasynci_base_piece;

struct lorasync_stream {
    lorasync_allocator   a;
    lorasync_comm        comm;
    lorasync_stream_desc desc; /* name, config_json and cuda replaced by the copies below */
    lorasync_plan_desc   plan_desc;
    char                *name, *config_json;
    lorasync_cuda        cuda;
    lorasynci_buffer     texts;
    lorasynci_buffer     added; /* lorasynci_base_piece; both until compile has succeeded */
    lorasynci_buffer     transports, outcomes;
    lorasync_error       add_error;
    lorasync_plan       *talk;  /* an empty plan: the catalogue of all buckets, votes, messages, and whether the
                                   communicator is lost */
    lorasync_plan      **plans; /* num_buckets; NULL before compile */
    size_t               num_buckets;
    lorasynci_loan       loans[2];
    lorasynci_window     shared;           /* direct: both payloads; else on the root payload_memory is */
    char                 mapping_name[64]; /* while it has one */
    char                *payload_memory;
    lorasynci_buffer     index;       /* on the root: model.safetensors.index.json */
    lorasync_error       stage_error; /* the root's, of the sync that runs; an objection of all plans */
    uint64_t             last_version;
    lorasync_stream_info info;
};

LORASYNCI_FN lorasynci_base_piece *lorasynci_base_at(const lorasync_stream *s, size_t i)
{
    return (lorasynci_base_piece *)(void *)s->added.data + i;
}

LORASYNCI_FN size_t lorasynci_base_num(const lorasync_stream *s)
{
    return s->added.size / sizeof(lorasynci_base_piece);
}

LORASYNCI_FN lorasync_transport *lorasynci_stream_transports(const lorasync_stream *s)
{
    return (lorasync_transport *)(void *)s->transports.data;
}

LORASYNCI_FN size_t lorasynci_stream_num_transports(const lorasync_stream *s)
{
    return s->transports.size / sizeof(lorasync_transport);
}

LORASYNCI_FN int lorasynci_is_root(const lorasync_stream *s) { return s->comm.rank == s->desc.root; }

/* Gives the lent memory back. */
LORASYNCI_FN void lorasynci_stream_unlend(lorasync_stream *s)
{
    int i;
    if (s->desc.cuda) {
        lorasynci_gpu_free(!s->comm.exchange_stream, s->loans[0].send);
        lorasynci_gpu_free(!s->comm.exchange_stream, s->loans[0].receive);
        for (i = 0; i < 2; i++)
            lorasynci_gpu_free(0, s->loans[i].payload), lorasynci_gpu_free(1, s->loans[i].host_payload);
    } else {
        lorasynci_dealloc(&s->a, s->loans[0].send);
        lorasynci_dealloc(&s->a, s->loans[0].receive);
        lorasynci_dealloc(&s->a, s->payload_memory);
    }
    lorasynci_window_close(&s->shared);
    if (s->mapping_name[0]) shm_unlink(s->mapping_name);
    s->payload_memory  = NULL;
    s->mapping_name[0] = 0;
    memset(s->loans, 0, sizeof s->loans);
}

/* Back to before compile. */
LORASYNCI_FN void lorasynci_stream_reset(lorasync_stream *s)
{
    size_t b;
    for (b = 0; s->plans && b < s->num_buckets; b++) lorasync_plan_free(s->plans[b]);
    lorasynci_dealloc(&s->a, s->plans);
    lorasynci_stream_unlend(s);
    lorasynci_buffer_free(&s->index);
    s->plans       = NULL;
    s->num_buckets = 0;
    memset(&s->info, 0, sizeof s->info);
}

LORASYNC_API void lorasync_stream_close(lorasync_stream *stream)
{
    lorasync_allocator a;
    size_t             i;
    if (!stream) return;
    a = stream->a;
    for (i = 0; i < lorasynci_stream_num_transports(stream); i++) {
        const lorasync_transport *t = &lorasynci_stream_transports(stream)[i];
        if (t->close) t->close(t->user);
    }
    lorasynci_stream_reset(stream);
    lorasync_plan_free(stream->talk);
    lorasynci_buffer_free(&stream->texts);
    lorasynci_buffer_free(&stream->added);
    lorasynci_buffer_free(&stream->transports);
    lorasynci_buffer_free(&stream->outcomes);
    lorasynci_dealloc(&a, stream->name), lorasynci_dealloc(&a, stream->config_json);
    lorasynci_dealloc(&a, stream);
}

/* Copies what the desc points to, and makes the desc of all plans. */
LORASYNCI_FN lorasync_status lorasynci_stream_copy(lorasync_stream *s, lorasync_error *err)
{
    const char         *name = s->desc.name ? s->desc.name : "base", *config = s->desc.config_json;
    lorasync_plan_desc *d = &s->plan_desc;
    s->name               = lorasynci_copy_text(&s->a, name, strlen(name));
    if (config) s->config_json = lorasynci_copy_text(&s->a, config, strlen(config));
    if (!s->name || (config && !s->config_json)) return lorasynci_fail_memory(err, strlen(name));
    if (!s->name[0])
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                              "desc.name is empty; leave it NULL or give the name to publish under");
    if (s->desc.cuda) s->cuda = *s->desc.cuda, s->desc.cuda = &s->cuda;
    if (!s->desc.bucket_bytes) s->desc.bucket_bytes = (size_t)1 << 30;
    d->comm       = &s->comm;
    d->kind       = LORASYNC_GATHER;
    d->root       = s->desc.root;
    d->wire_dtype = s->desc.wire_dtype;
    d->adapter    = s->name;
    d->allow_nan  = s->desc.allow_nan;
    d->cuda       = s->desc.cuda;
    d->timeout_ms = s->desc.timeout_ms;
    d->allocator  = &s->a;
    s->talk       = lorasynci_plan_new(d, &s->a);
    return s->talk ? LORASYNC_OK : lorasynci_fail_memory(err, sizeof *s->talk);
}

LORASYNC_API lorasync_status lorasync_stream_open(const lorasync_stream_desc *desc, lorasync_stream **out,
                                                  lorasync_error *err)
{
    lorasync_allocator a;
    lorasync_stream   *s;
    lorasync_status    status;
    if (!desc || !out) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_stream_open: desc or out is NULL");
    *out = NULL;
    LORASYNCI_TRY(lorasynci_check_host(desc->comm, desc->allocator, &a, err));
    s = (lorasync_stream *)lorasynci_alloc_array(&a, 1, sizeof *s);
    if (!s) return lorasynci_fail_memory(err, sizeof *s);
    s->a    = a;
    s->desc = *desc;
    s->comm = lorasynci_comm_copy(desc->comm);
    lorasynci_buffer_init(&s->texts, &s->a);
    lorasynci_buffer_init(&s->added, &s->a);
    lorasynci_buffer_init(&s->transports, &s->a);
    lorasynci_buffer_init(&s->outcomes, &s->a);
    lorasynci_buffer_init(&s->index, &s->a);
    status = lorasynci_stream_copy(s, err);
    if (status < 0) {
        lorasync_stream_close(s);
        return status;
    }
    *out = s;
    return LORASYNC_OK;
}

LORASYNCI_FN lorasync_status lorasynci_stream_add_piece(lorasync_stream *s, const lorasync_piece *piece,
                                                        lorasync_error *err)
{
    lorasynci_base_piece add;
    lorasync_name        name;
    if (!piece) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_stream_add: piece is NULL");
    if (s->plans)
        return lorasynci_fail(
            err, LORASYNC_E_STATE,
            "lorasync_stream_add after lorasync_stream_compile: open a new stream for another set of parameters");
    LORASYNCI_TRY(lorasynci_piece_check(piece, 0, err));
    if (!s->desc.keep_names) LORASYNCI_TRY(lorasync_parse_name(piece->name, &name, err));
    memset(&add, 0, sizeof add);
    add.piece = *piece;
    add.raw = add.key = s->texts.size;
    lorasynci_put(&s->texts, piece->name, strlen(piece->name) + 1);
    if (!s->desc.keep_names) {
        add.key = s->texts.size;
        lorasynci_put(&s->texts, name.key, strlen(name.key) + 1);
    }
    if (!s->texts.failed) lorasynci_put(&s->added, &add, sizeof add);
    return s->texts.failed || s->added.failed ? lorasynci_fail_memory(err, s->texts.size) : LORASYNC_OK;
}

LORASYNC_API lorasync_status lorasync_stream_add(lorasync_stream *stream, const lorasync_piece *piece,
                                                 lorasync_error *err)
{
    lorasync_error why;
    if (!err) err = &why;
    if (!stream) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "stream is NULL");
    if (lorasynci_stream_add_piece(stream, piece, err) == LORASYNC_OK) return LORASYNC_OK;
    return lorasynci_remember(&stream->add_error, err);
}

LORASYNCI_FN lorasync_status lorasynci_stream_attach(lorasync_stream *stream, const lorasync_transport *transport,
                                                     lorasync_error *err)
{
    lorasync_transport t;
    if (!transport) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_stream_attach: transport is NULL");
    if (stream->plans)
        return lorasynci_fail(err, LORASYNC_E_STATE,
                              "lorasync_stream_attach after lorasync_stream_compile: attach every engine before");
    LORASYNCI_TRY(lorasynci_transport_copy(transport, &t, err));
    if (t.stage == lorasynci_shm_stage)
        return lorasynci_fail(
            err, LORASYNC_E_UNSUPPORTED,
            "'%.60s' is shared memory, which carries adapters; send base weights to a directory, or through a "
            "transport of your own",
            t.name);
    return lorasynci_put_engine(&stream->transports, &stream->outcomes, &t, err);
}

LORASYNC_API lorasync_status lorasync_stream_attach(lorasync_stream *stream, const lorasync_transport *transport,
                                                    lorasync_error *err)
{
    lorasync_error why;
    if (!err) err = &why;
    if (!stream) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "lorasync_stream_attach: stream is NULL");
    if (lorasynci_stream_attach(stream, transport, err) == LORASYNC_OK) return LORASYNC_OK;
    return lorasynci_remember(&stream->add_error, err);
}

/* -- dividing into buckets */

/* What the root tells all ranks; then, to each, the bucket of each of its tensors. */
typedef struct lorasynci_division_head {
    uint64_t num_buckets, num_tensors, payload_bytes;
    uint64_t largest[2];    /* payload of even and odd buckets */
    uint64_t mapping_bytes; /* direct: of both; 0 without */
    char     name[64];
} lorasynci_division_head;

/* Tensors that travel together: a lora_A and its lora_B; any other alone. In order of their first one. */
typedef struct lorasynci_group {
    uint64_t text; /* offset in texts: the names up to `.lora_` */
    size_t   num_bytes;
    uint32_t bucket, unused;
} lorasynci_group;

typedef struct lorasynci_groups {
    lorasynci_buffer texts;
    lorasynci_group *list;
    size_t           num;
    uint32_t        *of; /* per merged tensor: its group */
} lorasynci_groups;

/* What dividing works with, freed at the end of compile. */
typedef struct lorasynci_division {
    lorasynci_planner       planner; /* on the root */
    lorasynci_parts         parts;   /* none: boxes are the plans' business */
    lorasynci_groups        groups;
    size_t                 *sizes;
    lorasynci_hello        *hellos;
    uint32_t               *tensors; /* per piece: its tensor; behind them, per tensor: its first piece */
    uint32_t               *buckets; /* per tensor of this rank */
    size_t                 *starts;  /* per bucket and one more: where its pieces begin in `pieces` */
    lorasync_piece         *pieces;  /* by bucket */
    lorasynci_division_head head;
} lorasynci_division;

LORASYNCI_FN void lorasynci_division_free(lorasync_stream *s, lorasynci_division *v)
{
    lorasynci_planner_free(&v->planner);
    lorasynci_buffer_free(&v->groups.texts);
    lorasynci_dealloc(&s->a, v->groups.list), lorasynci_dealloc(&s->a, v->groups.of);
    lorasynci_dealloc(&s->a, v->sizes), lorasynci_dealloc(&s->a, v->hellos), lorasynci_dealloc(&s->a, v->tensors);
    lorasynci_dealloc(&s->a, v->buckets), lorasynci_dealloc(&s->a, v->starts), lorasynci_dealloc(&s->a, v->pieces);
}

/* The catalogue of this rank, of all buckets. Two parameters that would be published under one name are refused. */
LORASYNCI_FN lorasync_status lorasynci_stream_describe(lorasync_stream *s, lorasynci_division *v, lorasync_error *err)
{
    lorasynci_catalogue *c   = &s->talk->catalogue;
    size_t               num = lorasynci_base_num(s), i, known;
    lorasynci_table      names;
    lorasync_status      status = LORASYNC_OK;
    lorasynci_catalogue_free(c);
    lorasynci_catalogue_init(c, &s->talk->a);
    v->tensors = (uint32_t *)lorasynci_alloc_array(&s->a, num, 2 * sizeof(uint32_t));
    if (!v->tensors || !lorasynci_table_init(&names, &s->a, num)) return lorasynci_fail_memory(err, num * 8);
    for (i = 0; i < num && status == LORASYNC_OK; i++) {
        lorasynci_base_piece *p = lorasynci_base_at(s, i);
        uint32_t             *t = &v->tensors[i], *first;
        known                   = c->num;
        p->piece.name           = s->texts.data + p->key; /* texts do not grow while this runs */
        status                  = lorasynci_describe_tensor(&p->piece, 0, &names, c, t, err);
        if (status < 0) break;
        first = &v->tensors[num + *t];
        if (c->num > known) *first = (uint32_t)i;
        if (strcmp(s->texts.data + lorasynci_base_at(s, *first)->raw, s->texts.data + p->raw) != 0)
            status = lorasynci_fail(
                err, LORASYNC_E_NAME,
                "%.150s and %.150s would both be published as %.150s; leave one out, or set keep_names",
                s->texts.data + lorasynci_base_at(s, *first)->raw, s->texts.data + p->raw, p->piece.name);
    }
    lorasynci_table_free(&names);
    return status;
}

/* This rank's part before the ranks talk. */
LORASYNCI_FN lorasync_status lorasynci_stream_prepare(lorasync_stream *s, lorasynci_division *v, lorasync_error *err)
{
    size_t world = (size_t)s->comm.world;
    if (s->add_error.status < 0) {
        *err = s->add_error;
        return err->status;
    }
    if (s->desc.root < 0 || s->desc.root >= s->comm.world)
        return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "root is %d, must be 0 to %d", s->desc.root, s->comm.world - 1);
    v->sizes  = (size_t *)lorasynci_alloc_array(&s->a, world, sizeof *v->sizes);
    v->hellos = (lorasynci_hello *)lorasynci_alloc_array(&s->a, world, sizeof *v->hellos);
    if (!v->sizes || !v->hellos) return lorasynci_fail_memory(err, world * sizeof *v->hellos);
    LORASYNCI_TRY(lorasynci_stream_describe(s, v, err));
    v->buckets = (uint32_t *)lorasynci_alloc_array(&s->a, s->talk->catalogue.num, sizeof *v->buckets);
    if (!v->buckets) return lorasynci_fail_memory(err, s->talk->catalogue.num * 4);
    return lorasynci_is_root(s) ? lorasynci_planner_init(&v->planner, s->talk, &s->plan_desc, err) : LORASYNC_OK;
}

LORASYNCI_FN const char *lorasynci_group_key(const void *user, size_t i)
{
    const lorasynci_groups *g = (const lorasynci_groups *)user;
    return g->texts.data + g->list[i].text;
}

/* The last `.lora_` of a name, or its end. */
LORASYNCI_FN size_t lorasynci_group_length(const char *name)
{
    const char *at = strstr(name, ".lora_"), *last = NULL;
    for (; at; at = strstr(at + 1, ".lora_")) last = at;
    return last ? (size_t)(last - name) : strlen(name);
}

/* On the root: groups of the merged tensors and their sizes on the wire. */
LORASYNCI_FN lorasync_status lorasynci_make_groups(const lorasync_stream *s, lorasynci_division *v, lorasync_error *err)
{
    lorasynci_groups *g   = &v->groups;
    size_t            num = v->planner.merged.num, t, bytes, at, total = 0;
    lorasynci_table   names;
    lorasync_status   status = LORASYNC_OK;
    lorasynci_buffer_init(&g->texts, &s->a);
    g->list = (lorasynci_group *)lorasynci_alloc_array(&s->a, num, sizeof *g->list);
    g->of   = (uint32_t *)lorasynci_alloc_array(&s->a, num, sizeof *g->of);
    if (!g->list || !g->of || !lorasynci_table_init(&names, &s->a, num))
        return lorasynci_fail_memory(err, num * sizeof *g->list);
    for (t = 0; t < num && status == LORASYNC_OK; t++) {
        const lorasynci_record *r    = lorasynci_record_at(&v->planner.merged, t);
        const char             *name = lorasynci_record_name(r);
        at                           = g->texts.size;
        lorasynci_put(&g->texts, name, lorasynci_group_length(name));
        lorasynci_put(&g->texts, "", 1);
        if (g->texts.failed) status = lorasynci_fail_memory(err, at);
        if (status < 0) break;
        g->list[g->num].text = at; /* in case it is new */
        g->of[t] = (uint32_t)lorasynci_table_insert(&names, g->texts.data + at, g->num, lorasynci_group_key, g);
        if (g->of[t] == g->num) g->num++;
        else g->texts.size = at;
        if (!lorasynci_checked_mul(
                (size_t)lorasynci_box_numel(lorasynci_record_shape(r), r->ndim),
                (size_t)lorasynci_item(lorasynci_wire_dtype(&s->plan_desc, (lorasync_dtype)r->dtype)), &bytes) ||
            !lorasynci_checked_add(total, bytes, &total) || total > SIZE_MAX / 2)
            status =
                lorasynci_fail(err, LORASYNC_E_ARGUMENT, "%.200s: the tensors up to this one pass 2^63 bytes", name);
        else g->list[g->of[t]].num_bytes += bytes;
    }
    v->head.num_tensors   = num;
    v->head.payload_bytes = total;
    lorasynci_table_free(&names);
    return status;
}

enum {
    LORASYNCI_MAX_BUCKETS = 99999
}; /* five digits in a file's name */

/* Fills bucket after bucket, in order. */
LORASYNCI_FN lorasync_status lorasynci_fill_buckets(const lorasync_stream *s, lorasynci_division *v,
                                                    lorasync_error *err)
{
    lorasynci_groups        *g    = &v->groups;
    lorasynci_division_head *h    = &v->head;
    size_t                   used = 0, limit = s->desc.bucket_bytes, i;
    uint32_t                 bucket = 0;
    for (i = 0; i < g->num; i++) {
        if (used && (used >= limit || g->list[i].num_bytes > limit - used)) {
            used = 0;
            if (++bucket >= LORASYNCI_MAX_BUCKETS)
                return lorasynci_fail(err, LORASYNC_E_ARGUMENT,
                                      "bucket_bytes is %zu: more than %d buckets would be needed; raise it", limit,
                                      (int)LORASYNCI_MAX_BUCKETS);
        }
        used += g->list[i].num_bytes;
        g->list[i].bucket = bucket;
        if (used > h->largest[bucket % 2]) h->largest[bucket % 2] = used;
    }
    h->num_buckets = (uint64_t)bucket + 1;
    return LORASYNC_OK;
}

/* On the root: shared memory for both payloads. Without it pieces travel as messages. */
LORASYNCI_FN void lorasynci_stream_offer(lorasync_stream *s, lorasynci_division_head *h)
{
    size_t num_bytes = lorasynci_align64((size_t)h->largest[0]) + (size_t)h->largest[1];
    if (s->comm.world == 1 || s->desc.no_direct || s->desc.cuda || !num_bytes) return;
    lorasynci_mapping_name(h->name, lorasynci_unique(s));
    if (!lorasynci_window_name(&s->shared, h->name, num_bytes, 1)) return;
    memcpy(s->mapping_name, h->name, sizeof h->name);
    h->mapping_bytes = num_bytes;
}

/* On the root: the whole division, from what all ranks have sent. */
LORASYNCI_FN lorasync_status lorasynci_stream_decide(lorasync_stream *s, lorasynci_division *v, lorasync_error *err)
{
    lorasynci_planner *p = &v->planner;
    size_t             i, k, num = lorasynci_stream_num_transports(s);
    LORASYNCI_TRY(lorasynci_planner_unpack(p, v->sizes, err));
    LORASYNCI_TRY(lorasynci_merge(p, err));
    LORASYNCI_TRY(lorasynci_make_groups(s, v, err));
    LORASYNCI_TRY(lorasynci_fill_buckets(s, v, err));
    for (i = 0; i < num; i++)
        LORASYNCI_TRY(lorasynci_check_buckets(&lorasynci_stream_transports(s)[i], (size_t)v->head.num_buckets, err));
    for (i = 0; i < (size_t)s->comm.world; i++) /* from merged numbers to buckets */
        for (k = 0; k < p->catalogues[i].num; k++)
            p->numbers[i][k] = v->groups.list[v->groups.of[p->numbers[i][k]]].bucket;
    lorasynci_stream_offer(s, &v->head);
    return LORASYNC_OK;
}

/* What must be equal on all ranks. */
LORASYNCI_FN uint64_t lorasynci_stream_tag(const lorasync_stream *s)
{
    uint64_t v[7];
    v[0] = (uint64_t)s->desc.root;
    v[1] = (uint64_t)s->desc.wire_dtype;
    v[2] = (uint64_t)s->desc.bucket_bytes;
    v[3] = lorasynci_hash_text(s->name, 1);
    v[4] = (uint64_t)s->desc.keep_names;
    v[5] = (uint64_t)s->desc.allow_nan;
    v[6] = s->desc.cuda != NULL;
    return lorasynci_hash(v, sizeof v, 6);
}

LORASYNCI_FN lorasync_status lorasynci_stream_vote(lorasync_stream *s, const lorasync_error *mine, int *flag,
                                                   lorasync_error *err)
{
    return lorasynci_agree(&s->comm, s->talk->votes, s->talk->timeout_ms, mine->status, mine, 0, "", flag, err);
}

/* Names to the root, buckets back. */
LORASYNCI_FN lorasync_status lorasynci_stream_divide(lorasync_stream *s, lorasynci_division *v, lorasync_error *mine,
                                                     lorasync_error *err)
{
    lorasync_plan     *talk = s->talk;
    lorasynci_planner *p    = &v->planner;
    size_t             n = (size_t)s->comm.world, num = talk->catalogue.num, i;
    char             **blocks = (char **)talk->votes;
    size_t            *sizes  = (size_t *)(void *)(blocks + n);
    LORASYNCI_TRY(lorasynci_plan_collect(talk, p, &v->parts, v->sizes, v->hellos, err));
    if (lorasynci_is_root(s)) lorasynci_stream_decide(s, v, mine);
    LORASYNCI_TRY(lorasynci_stream_vote(s, mine, NULL, err));
    for (i = 0; i < n && p->plan; i++) blocks[i] = (char *)&v->head, sizes[i] = sizeof v->head;
    LORASYNCI_TRY(lorasynci_star(talk, 1, blocks, sizes, &v->head, sizeof v->head, err));
    for (i = 0; i < n && p->plan; i++) {
        int from  = p->same_as[i];
        blocks[i] = (char *)p->numbers[from];
        sizes[i]  = p->catalogues[from].num * sizeof(uint32_t);
    }
    LORASYNCI_TRY(lorasynci_star(talk, 1, blocks, sizes, v->buckets, num * sizeof *v->buckets, err));
    if (p->plan && num) memcpy(v->buckets, p->numbers[p->same_as[s->comm.rank]], num * sizeof *v->buckets);
    lorasynci_planner_free(p);
    return LORASYNC_OK;
}

/* This rank's pieces by bucket, in order of declaration in each; and room for the plans. */
LORASYNCI_FN lorasync_status lorasynci_stream_sort(lorasync_stream *s, lorasynci_division *v, lorasync_error *err)
{
    size_t num = lorasynci_base_num(s), n = (size_t)v->head.num_buckets, i, b;
    v->starts = (size_t *)lorasynci_alloc_array(&s->a, n + 2, sizeof *v->starts);
    v->pieces = (lorasync_piece *)lorasynci_alloc_array(&s->a, num, sizeof *v->pieces);
    s->plans  = (lorasync_plan **)lorasynci_alloc_array(&s->a, n, sizeof *s->plans);
    if (!v->starts || !v->pieces || !s->plans) return lorasynci_fail_memory(err, num * sizeof *v->pieces);
    s->num_buckets = n;
    for (i = 0; i < num; i++) {
        b = v->buckets[v->tensors[i]];
        if (b >= n)
            return lorasynci_fail(err, LORASYNC_E_COMM,
                                  "rank %d names bucket %zu of %zu; do all ranks use the same lorasync.h?",
                                  s->desc.root, b, n);
        v->starts[b + 2]++;
    }
    for (b = 2; b < n + 2; b++) v->starts[b] += v->starts[b - 1];
    for (i = 0; i < num; i++)
        v->pieces[v->starts[v->buckets[v->tensors[i]] + 1]++] = lorasynci_base_at(s, i)->piece; /* moves each start to
                                                                                                   its place */
    return LORASYNC_OK;
}

/* Sorts, and maps the payloads where that is offered and all ranks can. */
LORASYNCI_FN lorasync_status lorasynci_stream_map(lorasync_stream *s, lorasynci_division *v, lorasync_error *mine,
                                                  lorasync_error *err)
{
    int             mapped;
    lorasync_status status;
    lorasynci_stream_sort(s, v, mine);
    if (v->head.mapping_bytes && !s->shared.address && !s->desc.no_direct)
        lorasynci_window_name(&s->shared, v->head.name, (size_t)v->head.mapping_bytes, 0);
    mapped = s->shared.address != NULL;
    status = lorasynci_stream_vote(s, mine, &mapped, err);
    if (s->mapping_name[0]) shm_unlink(s->mapping_name);
    s->mapping_name[0] = 0;
    if (status == LORASYNC_OK && !mapped) lorasynci_window_close(&s->shared);
    return status;
}

/* -- making the plans */

/* Two payloads and one staging, for the largest of the plans. */
LORASYNCI_FN lorasync_status lorasynci_stream_lend(lorasync_stream *s, const lorasynci_division *v, lorasync_error *err)
{
    size_t send = 0, receive = 0, first = lorasynci_align64((size_t)v->head.largest[0]),
           both = first + (size_t)v->head.largest[1], b;
    int pinned  = !s->comm.exchange_stream, i;
    for (b = 0; b < s->num_buckets; b++) {
        const size_t *staging = s->plans[b]->staging_bytes;
        if (staging[LORASYNCI_SEND] > send) send = staging[LORASYNCI_SEND];
        if (staging[LORASYNCI_RECEIVE] > receive) receive = staging[LORASYNCI_RECEIVE];
    }
    s->info.staging_bytes = send + receive;
    if (s->shared.address || lorasynci_is_root(s)) s->info.image_bytes = both;
    if (s->desc.cuda) {
        LORASYNCI_TRY(lorasynci_gpu_alloc(pinned, send, &s->loans[0].send, "memory for buckets", err));
        LORASYNCI_TRY(lorasynci_gpu_alloc(pinned, receive, &s->loans[0].receive, "memory for buckets", err));
        for (i = 0; i < 2 && lorasynci_is_root(s); i++) {
            LORASYNCI_TRY(
                lorasynci_gpu_alloc(0, (size_t)v->head.largest[i], &s->loans[i].payload, "memory for buckets", err));
            if (!s->cuda.keep_on_device)
                LORASYNCI_TRY(lorasynci_gpu_alloc(1, (size_t)v->head.largest[i], &s->loans[i].host_payload,
                                                  "memory for buckets", err));
        }
    } else {
        s->loans[0].send    = (char *)lorasynci_alloc(&s->a, send);
        s->loans[0].receive = (char *)lorasynci_alloc(&s->a, receive);
        if (!s->shared.address && lorasynci_is_root(s)) s->payload_memory = (char *)lorasynci_alloc(&s->a, both);
        s->loans[0].payload = s->shared.address ? s->shared.address : s->payload_memory;
        if (!s->loans[0].send || !s->loans[0].receive || (!s->loans[0].payload && lorasynci_is_root(s)))
            return lorasynci_fail_memory(err, send + receive + both);
        if (s->loans[0].payload) s->loans[1].payload = s->loans[0].payload + first;
    }
    s->loans[1].send    = s->loans[0].send;
    s->loans[1].receive = s->loans[0].receive;
    for (b = 0; b < s->num_buckets; b++) LORASYNCI_TRY(lorasynci_plan_lend(s->plans[b], &s->loans[b % 2], err));
    return LORASYNC_OK;
}

/* A line of the index. */
typedef struct lorasynci_index_entry {
    const char *name;
    size_t      bucket;
} lorasynci_index_entry;

LORASYNCI_FN int lorasynci_index_order(const void *a, const void *b)
{
    return strcmp(((const lorasynci_index_entry *)a)->name, ((const lorasynci_index_entry *)b)->name);
}

/* model.safetensors.index.json as Python's json.dumps writes it, with indent 2 and sorted keys. */
LORASYNCI_FN void lorasynci_put_index(lorasynci_buffer *out, const lorasynci_index_entry *list, size_t num,
                                      size_t num_buckets, size_t payload_bytes)
{
    char   file[64];
    size_t i;
    lorasynci_put_format(out, "{\n  \"metadata\": {\n    \"total_size\": %zu\n  },\n  \"weight_map\": {",
                         payload_bytes);
    for (i = 0; i < num; i++) {
        lorasynci_put_text(out, i ? ",\n    " : "\n    ");
        lorasynci_json_put_ascii(out, list[i].name, strlen(list[i].name));
        lorasynci_bucket_file(file, list[i].bucket, num_buckets);
        lorasynci_put_format(out, ": \"%s\"", file);
    }
    lorasynci_put_text(out, "\n  }\n}\n");
    lorasynci_put(out, "", 1);
}

/* On the root: what the images say of themselves, beside their tensors. */
LORASYNCI_FN lorasync_status lorasynci_stream_label(lorasync_stream *s, lorasync_error *err)
{
    size_t                 n = s->num_buckets, b, i, num = 0;
    lorasynci_index_entry *list =
        (lorasynci_index_entry *)lorasynci_alloc_array(&s->a, s->info.num_tensors, sizeof *list);
    if (!list) return lorasynci_fail_memory(err, s->info.num_tensors * sizeof *list);
    for (b = 0; b < n; b++)
        for (i = 0; i < s->plans[b]->image->num_tensors; i++) {
            list[num].name     = s->plans[b]->image->tensors[i].name;
            list[num++].bucket = b;
        }
    qsort(list, num, sizeof *list, lorasynci_index_order);
    if (n > 1) lorasynci_put_index(&s->index, list, num, n, s->info.payload_bytes);
    lorasynci_dealloc(&s->a, list);
    if (s->index.failed) return lorasynci_fail_memory(err, s->index.size);
    for (b = 0; b < n; b++) {
        lorasync_image *image = s->plans[b]->image;
        image->bucket         = b;
        image->num_buckets    = n;
        image->index_json     = n > 1 ? s->index.data : "";
        image->config_json    = s->config_json ? s->config_json : "";
    }
    return LORASYNC_OK;
}

/* Plans are made: memory and labels. */
LORASYNCI_FN lorasync_status lorasynci_stream_finish(lorasync_stream *s, const lorasynci_division *v,
                                                     lorasync_error *err)
{
    size_t b;
    s->info.num_tensors   = (size_t)v->head.num_tensors;
    s->info.num_buckets   = s->num_buckets;
    s->info.payload_bytes = (size_t)v->head.payload_bytes;
    s->info.direct        = 1;
    LORASYNCI_TRY(lorasynci_stream_lend(s, v, err));
    for (b = 0; b < s->num_buckets; b++) {
        s->plans[b]->objection = &s->stage_error;
        s->info.plan_bytes += s->plans[b]->meter.live;
        s->info.direct &= s->plans[b]->direct;
    }
    return lorasynci_is_root(s) ? lorasynci_stream_label(s, err) : LORASYNC_OK;
}

/* All of compile. A lost communicator is given up here, but for those that lorasynci_plan_create has given up. */
LORASYNCI_FN lorasync_status lorasynci_stream_make(lorasync_stream *s, lorasynci_division *v, lorasync_error *err)
{
    lorasync_plan_desc d = s->plan_desc;
    lorasync_error     mine;
    lorasync_status    status;
    size_t             b;
    memset(&mine, 0, sizeof mine);
    lorasynci_stream_prepare(s, v, &mine);
    status = lorasynci_agree(&s->comm, s->talk->votes, s->talk->timeout_ms, mine.status, &mine, lorasynci_stream_tag(s),
                             "the stream's root, wire_dtype, bucket_bytes, name, keep_names, allow_nan or cuda, hashed",
                             NULL, err);
    if (status == LORASYNC_OK) status = lorasynci_stream_divide(s, v, &mine, err);
    if (status == LORASYNC_OK) status = lorasynci_stream_map(s, v, &mine, err);
    if (lorasync_is_lost(status)) return lorasynci_plan_lose(s->talk, status, err);
    d.no_direct = s->shared.address == NULL;
    for (b = 0; b < s->num_buckets && status == LORASYNC_OK; b++) {
        d.have     = v->pieces + v->starts[b];
        d.num_have = v->starts[b + 1] - v->starts[b];
        status     = lorasynci_plan_create(&d, 1, &s->plans[b], err);
    }
    if (lorasync_is_lost(status)) s->talk->lost = status;
    if (status < 0) return status;
    lorasynci_stream_finish(s, v, &mine);
    status = lorasynci_stream_vote(s, &mine, NULL, err);
    return lorasync_is_lost(status) ? lorasynci_plan_lose(s->talk, status, err) : status;
}

LORASYNC_API lorasync_status lorasync_stream_compile(lorasync_stream *stream, lorasync_error *err)
{
    lorasynci_division division;
    lorasync_error     why;
    lorasync_status    status;
    if (!err) err = &why;
    if (!stream) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "stream is NULL");
    if (stream->plans) return lorasynci_fail(err, LORASYNC_E_STATE, "lorasync_stream_compile was called already");
    if (stream->talk->lost) return lorasynci_lost_before(err);
    memset(&division, 0, sizeof division);
    lorasynci_buffer_init(&division.parts.list, &stream->a);
    lorasynci_buffer_init(&division.parts.geometry, &stream->a);
    lorasynci_buffer_init(&division.groups.texts, &stream->a);
    status = lorasynci_stream_make(stream, &division, err);
    lorasynci_division_free(stream, &division);
    if (status < 0) {
        lorasynci_stream_reset(stream);
        return status;
    }
    lorasynci_buffer_free(&stream->added); /* the plans know it all */
    lorasynci_buffer_free(&stream->texts);
    return LORASYNC_OK;
}

/* -- running */

/* On the root: bucket b is gathered and goes to all engines. */
LORASYNCI_FN void lorasynci_stream_stage(lorasync_stream *s, size_t b, uint64_t version, lorasynci_publication *p,
                                         lorasynci_outcome *out)
{
    lorasync_image *image = lorasync_plan_image(s->plans[b]);
    uint64_t        start = lorasynci_now_ns();
    if (!image) return;
    lorasync_image_stamp(image, version, image->digest);
    out->digest = lorasynci_hash(&image->digest, sizeof image->digest, out->digest);
    p->image    = image;
    lorasynci_stage_all(p);
    if (p->num_possible < p->need) lorasynci_tell_who(p, &s->stage_error);
    out->publish_ns += lorasynci_now_ns() - start;
}

/* All buckets, up to the last stage. While the root stages one, all others pack the next. */
LORASYNCI_FN lorasync_status lorasynci_stream_run(lorasync_stream *s, uint64_t version, lorasynci_publication *p,
                                                  lorasynci_outcome *out, lorasync_report *times, lorasync_error *err)
{
    lorasync_status status = lorasynci_begin_version(s->plans[0], version, s->last_version, err);
    size_t          b;
    for (b = 0; b < s->num_buckets; b++) {
        lorasync_plan *plan = s->plans[b];
        if (lorasync_is_lost(status)) return status; /* of begin; its other failures come with the vote */
        LORASYNCI_TRY(lorasync_plan_wait(plan, err));
        times->pack_ns += plan->stats.pack_ns;
        times->exchange_ns += plan->stats.exchange_ns;
        times->place_ns += plan->stats.place_ns;
        if (b + 1 < s->num_buckets) {
            s->plans[b + 1]->tag = version;
            status               = lorasync_plan_begin(s->plans[b + 1], err);
        }
        lorasynci_stream_stage(s, b, version, p, out);
    }
    return LORASYNC_OK;
}

/* On the root: the commits. Then the verdict and what is to be reported, on all. */
LORASYNCI_FN lorasync_status lorasynci_stream_commit(lorasync_stream *s, uint64_t version, lorasynci_publication *p,
                                                     lorasynci_outcome *out, lorasync_error *err)
{
    const lorasync_comm *c     = &s->comm;
    lorasynci_outcome   *all   = (lorasynci_outcome *)s->talk->votes;
    uint64_t             start = lorasynci_now_ns();
    lorasync_status      status;
    if (s->stage_error.status == LORASYNC_OK && p->image) lorasynci_publish_end(p, &s->stage_error);
    out->num_engines = (int32_t)lorasynci_num_serving(p->outcomes, p->num, version);
    out->num_behind  = (int32_t)p->num - out->num_engines;
    out->publish_ns += lorasynci_now_ns() - start;
    status = lorasynci_stream_vote(s, &s->stage_error, NULL, err);
    if (status == LORASYNC_OK) status = c->all_gather(c->user, out, all, sizeof *out, s->talk->timeout_ms, err);
    if (lorasync_is_lost(status)) return lorasynci_plan_lose(s->talk, status, err);
    if (status == LORASYNC_OK) *out = all[s->desc.root];
    return status;
}

LORASYNCI_FN void lorasynci_stream_report(const lorasync_stream *s, const lorasynci_outcome *outcome, uint64_t start,
                                          lorasync_report *out)
{
    out->version       = s->last_version;
    out->digest        = outcome->digest;
    out->num_tensors   = s->info.num_tensors;
    out->payload_bytes = s->info.payload_bytes;
    out->num_engines   = outcome->num_engines;
    out->num_behind    = outcome->num_behind;
    out->direct        = s->info.direct;
    out->publish_ns    = outcome->publish_ns;
    out->total_ns      = lorasynci_now_ns() - start;
}

LORASYNC_API lorasync_status lorasync_stream_sync(lorasync_stream *stream, uint64_t version,
                                                  lorasync_report *out_report, lorasync_error *err)
{
    lorasynci_publication p;
    lorasynci_outcome     outcome;
    lorasync_report       report;
    lorasync_error        why;
    lorasync_status       status;
    uint64_t              start = lorasynci_now_ns();
    if (!err) err = &why;
    if (!stream) return lorasynci_fail(err, LORASYNC_E_ARGUMENT, "stream is NULL");
    if (!stream->plans)
        return lorasynci_fail(err, LORASYNC_E_STATE, "lorasync_stream_sync before lorasync_stream_compile succeeded");
    if (stream->talk->lost) return lorasynci_lost_before(err);
    memset(&p, 0, sizeof p);
    memset(&outcome, 0, sizeof outcome);
    memset(&report, 0, sizeof report);
    memset(&stream->stage_error, 0, sizeof stream->stage_error);
    if (lorasynci_is_root(stream)) {
        p.transports = lorasynci_stream_transports(stream);
        p.outcomes   = (lorasync_engine_outcome *)(void *)stream->outcomes.data;
        p.num = p.need = p.num_possible = lorasynci_stream_num_transports(stream);
        p.comm                          = &stream->comm;
    }
    status = lorasynci_stream_run(stream, version, &p, &outcome, &report, err);
    if (lorasync_is_lost(status)) stream->talk->lost = status;
    if (status == LORASYNC_OK) status = lorasynci_stream_commit(stream, version, &p, &outcome, err);
    if (status < 0) {
        lorasynci_abort_all(&p);
        return status;
    }
    stream->last_version = version;
    lorasynci_stream_report(stream, &outcome, start, &report);
    if (out_report) *out_report = report;
    return LORASYNC_OK;
}

LORASYNC_API void lorasync_stream_get_info(const lorasync_stream *stream, lorasync_stream_info *out)
{
    if (!out) return;
    memset(out, 0, sizeof *out);
    if (stream) *out = stream->info;
}

LORASYNC_API const lorasync_engine_outcome *lorasync_stream_outcomes(const lorasync_stream *stream, size_t *out_num)
{
    size_t num = stream && lorasynci_is_root(stream) ? lorasynci_stream_num_transports(stream) : 0;
    if (out_num) *out_num = num;
    return num ? (const lorasync_engine_outcome *)(const void *)stream->outcomes.data : NULL;
}
#ifdef LORASYNC_CUDA

/* clang-format off */
/* >>> generated by `make ptx` with nvcc 13.0 from the block >>device below: do not edit */
static const char *const lorasynci_ptx[] = {
    ".version 7.0 .target sm_70 .address_size 64 .global .align 16 .b8 lorasyncd_keys[256] = {57, 168, 32, 226, "
    "107, 158, 120, 110, 25, 93, 196, 6, 169, 184, 139, 248, 107, 137, 57, 27, 13, 159, 203, 83, 191, 154, 130, "
    "44, 59, 19, 132, 197, 145, 120, 229, 62, 141, 72, 184, 243, 221, 236, 126, 101, 225, 38, 211, 194, 63, 160, "
    "33, 134, 85, 117, 31, 142, 23, 15, 78, 181, 151, 63, 187, 132, 93, 130, 41, 125, 17, 23, 207, 195, 161, "
    "233, 102, 52, 43, 141, 26, 216, 43, 96, 1, 219, 147, 138, 3, 169, 217, 241, 245, 237, 215, 106, 73, 84, "
    "213, 1, 124, 221, 241, 130, 94, 147, 189, 46, 184, 105, 181, 158, 210, 64, 171, 157, 240, 162, 123, 29, 82, "
    "238, 239, 82, 105, 241, 223, 53, 125, 55, 7, 232, 125, 12, 55, 45, 88, 5, 31, 116, 84, 210, 117, 15, 99, "
    "105, 97, 249, 126, 65, 163, 65, 60, 60, 93, 144, 25, 110, 115, 250, 169, 79, 85, 68, 235, 132, 151, 112, "
    "79, 19, 11, 147, 220, 7, 169, 21, 192, 18, 23, 195, 6, 204, 99, 101, 238, 236, 177, 236, 132, 62, 119, 212, "
    "14, 105, 215, 21, 70, 119, 241, 83, 179, 34, 107, 216, 221, 227, 223, 138, 38, 223, 115, 235, 152, 32, 83, "
    "132, 214, 3, 99, 197, 82, 201, 203, 107, 25, 155, 69, 3, 38, 48, 89, 138, 68, 207, 221, 120, 165, 244, 217, "
    "174, 222, 191, 45, 64, 121, 237, 171, 112, 240, 85, 73, 163, 0, 62, 55, 178, 85, 226}; .func (.param .b32 "
    "func_retval0) lorasyncd_round_small( .param .b32 lorasyncd_round_small_param_0, .param .b32 "
    "lorasyncd_round_small_param_1, .param .b32 lorasyncd_round_small_param_2 ) { .reg .pred %p<3>; .reg .b32 "
    "%r<33>; ld.param.u32 %r10, [lorasyncd_round_small_param_0]; ld.param.u32 %r11, "
    "[lorasyncd_round_small_param_1]; ld.param.u32 %r12, [lorasyncd_round_small_param_2]; mov.u32 %r13, 23; "
    "sub.s32 %r30, %r13, %r11; shr.u32 %r14, %r10, 23; add.s32 %r15, %r14, %r12; add.s32 %r2, %r15, -127; "
    "setp.lt.s32 %p1, %r2, 1; @%p1 bra $L__BB0_2; shl.b32 %r16, %r12, 23; add.s32 %r17, %r10, %r16; add.s32 "
    "%r31, %r17, -1065353216; bra.uni $L__BB0_4; $L__BB0_2: neg.s32 %r19, %r11; mov.u32 %r32, 0; setp.lt.s32 "
    "%p2, %r2, %r19; @%p2 bra $L__BB0_5; and.b32 %r20, %r10, 8388607; or.b32 %r31, %r20, 8388608; add.s32 %r21, "
    "%r30, 1; sub.s32 %r30, %r21, %r2; $L__BB0_4: add.s32 %r22, %r30, -1; mov.u32 %r23, 1; shl.b32 %r24, %r23, "
    "%r22; shr.u32 %r25, %r31, %r30; and.b32 %r26, %r25, 1; add.s32 %r27, %r31, %r24; add.s32 %r28, %r27, %r26; "
    "add.s32 %r29, %r28, -1; shr.u32 %r32, %r29, %r30; $L__BB0_5: st.param.b32 [func_retval0+0], %r32; ret; } "
    ".func (.param .b32 func_retval0) lorasyncd_widen_small( .param .b32 lorasyncd_widen_small_param_0, .param "
    ".b32 lorasyncd_widen_small_param_1, .param .b32 lorasyncd_widen_small_param_2, .param .b32 "
    "lorasyncd_widen_small_param_3 ) { .reg .pred %p<10>; .reg .f32 %f<4>; .reg .b32 %r<41>; ld.param.u32 %r14, "
    "[lorasyncd_widen_small_param_0]; ld.param.u32 %r12, [lorasyncd_widen_small_param_1]; ld.param.u32 %r15, "
    "[lorasyncd_widen_small_param_2]; ld.param.u32 %r13, [lorasyncd_widen_small_param_3]; add.s32 %r16, %r15, "
    "-1; mov.u32 %r17, -1; shl.b32 %r1, %r17, %r16; add.s32 %r18, %r15, %r12; shr.u32 %r19, %r14, %r18; shl.b32 "
    "%r20, %r17, %r15; not.b32 %r2, %r20; shr.u32 %r21, %r14, %r12; and.b32 %r3, %r21, %r2; shl.b32 %r22, %r17, "
    "%r12; not.b32 %r4, %r22; and.b32 %r5, %r4, %r14; shl.b32 %r6, %r19, 31; setp.eq.s32 %p1, %r3, %r2; "
    "setp.ne.s32 %p2, %r13, 0; and.pred %p3, %p2, %p1; @%p3 bra $L__BB1_6; bra.uni $L__BB1_1; $L__BB1_6: mov.u32 "
    "%r36, 23; sub.s32 %r37, %r36, %r12; shl.b32 %r38, %r5, %r37; or.b32 %r39, %r38, %r6; or.b32 %r40, %r39, "
    "2139095040; bra.uni $L__BB1_7; $L__BB1_1: setp.eq.s32 %p5, %r13, 0; and.pred %p6, %p5, %p1; setp.eq.s32 "
    "%p7, %r5, %r4; and.pred %p8, %p7, %p6; @%p8 bra $L__BB1_5; bra.uni $L__BB1_2; $L__BB1_5: or.b32 %r40, %r6, "
    "2143289344; bra.uni $L__BB1_7; $L__BB1_2: setp.eq.s32 %p9, %r3, 0; @%p9 bra $L__BB1_4; add.s32 %r23, %r3, "
    "127; not.b32 %r24, %r1; sub.s32 %r25, %r23, %r24; shl.b32 %r26, %r25, 23; mov.u32 %r27, 23; sub.s32 %r28, "
    "%r27, %r12; shl.b32 %r29, %r5, %r28; or.b32 %r30, %r6, %r29; or.b32 %r40, %r30, %r26; bra.uni $L__BB1_7; ",
    "$L__BB1_4: mov.u32 %r31, 129; sub.s32 %r32, %r31, %r12; add.s32 %r33, %r32, %r1; shl.b32 %r34, %r33, 23; "
    "mov.b32 %f1, %r34; cvt.rn.f32.u32 %f2, %r5; mul.f32 %f3, %f2, %f1; mov.b32 %r35, %f3; or.b32 %r40, %r6, "
    "%r35; $L__BB1_7: st.param.b32 [func_retval0+0], %r40; ret; } .func (.param .b64 func_retval0) "
    "lorasyncd_convert( .param .b64 lorasyncd_convert_param_0, .param .b32 lorasyncd_convert_param_1, .param "
    ".b32 lorasyncd_convert_param_2, .param .b32 lorasyncd_convert_param_3 ) { .reg .pred %p<17>; .reg .b16 "
    "%rs<2>; .reg .f32 %f<5>; .reg .b32 %r<39>; .reg .b64 %rd<5>; ld.param.u64 %rd3, "
    "[lorasyncd_convert_param_0]; ld.param.u32 %r22, [lorasyncd_convert_param_1]; ld.param.u32 %r23, "
    "[lorasyncd_convert_param_2]; ld.param.f32 %f1, [lorasyncd_convert_param_3]; setp.eq.s32 %p1, %r22, %r23; "
    "setp.eq.f32 %p2, %f1, 0f3F800000; and.pred %p3, %p1, %p2; @%p3 bra $L__BB2_25; setp.eq.s32 %p4, %r22, 18; "
    "@%p4 bra $L__BB2_9; bra.uni $L__BB2_2; $L__BB2_9: cvt.u32.u64 %r35, %rd3; bra.uni $L__BB2_10; $L__BB2_2: "
    "setp.eq.s32 %p5, %r22, 15; @%p5 bra $L__BB2_8; bra.uni $L__BB2_3; $L__BB2_8: cvt.u32.u64 %r25, %rd3; "
    "shl.b32 %r35, %r25, 16; bra.uni $L__BB2_10; $L__BB2_3: setp.eq.s32 %p6, %r22, 14; @%p6 bra $L__BB2_7; "
    "bra.uni $L__BB2_4; $L__BB2_7: cvt.u32.u64 %r24, %rd3; { .reg .b32 temp_param_reg; .param .b32 param0; "
    "st.param.b32 [param0+0], %r24; .param .b32 param1; st.param.b32 [param1+0], 10; .param .b32 param2; "
    "st.param.b32 [param2+0], 5; .param .b32 param3; st.param.b32 [param3+0], 1; .param .b32 retval0; call.uni "
    "(retval0), lorasyncd_widen_small, ( param0, param1, param2, param3 ); ld.param.b32 %r35, [retval0+0]; } "
    "bra.uni $L__BB2_10; $L__BB2_4: setp.eq.s32 %p7, %r22, 8; cvt.u32.u64 %r1, %rd3; @%p7 bra $L__BB2_6; bra.uni "
    "$L__BB2_5; $L__BB2_6: { .reg .b32 temp_param_reg; .param .b32 param0; st.param.b32 [param0+0], %r1; .param "
    ".b32 param1; st.param.b32 [param1+0], 3; .param .b32 param2; st.param.b32 [param2+0], 4; .param .b32 "
    "param3; st.param.b32 [param3+0], 0; .param .b32 retval0; call.uni (retval0), lorasyncd_widen_small, ( "
    "param0, param1, param2, param3 ); ld.param.b32 %r35, [retval0+0]; } bra.uni $L__BB2_10; $L__BB2_5: { .reg "
    ".b32 temp_param_reg; .param .b32 param0; st.param.b32 [param0+0], %r1; .param .b32 param1; st.param.b32 "
    "[param1+0], 2; .param .b32 param2; st.param.b32 [param2+0], 5; .param .b32 param3; st.param.b32 [param3+0], "
    "1; .param .b32 retval0; call.uni (retval0), lorasyncd_widen_small, ( param0, param1, param2, param3 ); "
    "ld.param.b32 %r35, [retval0+0]; } $L__BB2_10: mov.b32 %f2, %r35; mul.f32 %f3, %f2, %f1; mov.b32 %r26, %f3; "
    "setp.neu.f32 %p8, %f1, 0f3F800000; selp.b32 %r38, %r26, %r35, %p8; setp.eq.s32 %p9, %r23, 18; @%p9 bra "
    "$L__BB2_24; setp.eq.s32 %p10, %r23, 15; @%p10 bra $L__BB2_23; bra.uni $L__BB2_12; $L__BB2_23: and.b32 %r29, "
    "%r38, 2147483647; setp.gt.u32 %p16, %r29, 2139095040; shr.u32 %r30, %r38, 16; and.b32 %r31, %r30, 1; "
    "add.s32 %r32, %r38, %r31; add.s32 %r33, %r32, 32767; shr.u32 %r34, %r33, 16; selp.b32 %r38, 32704, %r34, "
    "%p16; bra.uni $L__BB2_24; $L__BB2_12: setp.eq.s32 %p11, %r23, 14; @%p11 bra $L__BB2_22; bra.uni $L__BB2_13; "
    "$L__BB2_22: mov.b32 %f4, %r38; cvt.rn.f16.f32 %rs1, %f4; cvt.u32.u16 %r38, %rs1; bra.uni $L__BB2_24; "
    "$L__BB2_13: setp.eq.s32 %p12, %r23, 8; shr.u32 %r9, %r38, 24; and.b32 %r10, %r9, 128; and.b32 %r11, %r38, "
    "2147483647; @%p12 bra $L__BB2_19; bra.uni $L__BB2_14; $L__BB2_19: setp.gt.u32 %p15, %r11, 1139277824; "
    "mov.u32 %r37, 127; @%p15 bra $L__BB2_21; { .reg .b32 temp_param_reg; .param .b32 param0; st.param.b32 "
    "[param0+0], %r11; .param .b32 param1; st.param.b32 [param1+0], 3; .param .b32 param2; st.param.b32 "
    "[param2+0], 7; .param .b32 retval0; call.uni (retval0), lorasyncd_round_small, ( param0, param1, param2 ); "
    "ld.param.b32 %r37, [retval0+0]; } $L__BB2_21: or.b32 %r38, %r37, %r10; bra.uni $L__BB2_24; $L__BB2_14: "
    "setp.gt.u32 %p13, %r11, 2139095040; @%p13 bra $L__BB2_18; bra.uni $L__BB2_15; $L__BB2_18: or.b32 %r38, %r9, ",
    "127; bra.uni $L__BB2_24; $L__BB2_15: setp.gt.u32 %p14, %r11, 1198522367; mov.u32 %r36, 124; @%p14 bra "
    "$L__BB2_17; { .reg .b32 temp_param_reg; .param .b32 param0; st.param.b32 [param0+0], %r11; .param .b32 "
    "param1; st.param.b32 [param1+0], 2; .param .b32 param2; st.param.b32 [param2+0], 15; .param .b32 retval0; "
    "call.uni (retval0), lorasyncd_round_small, ( param0, param1, param2 ); ld.param.b32 %r36, [retval0+0]; } "
    "$L__BB2_17: or.b32 %r38, %r36, %r10; $L__BB2_24: cvt.u64.u32 %rd3, %r38; $L__BB2_25: st.param.b64 "
    "[func_retval0+0], %rd3; ret; } .func (.param .b64 func_retval0) lorasyncd_divide( .param .b64 "
    "lorasyncd_divide_param_0, .param .b64 lorasyncd_divide_param_1 ) { .reg .pred %p<3>; .reg .b32 %r<7>; .reg "
    ".b64 %rd<12>; ld.param.u64 %rd5, [lorasyncd_divide_param_0]; ld.param.u64 %rd6, [lorasyncd_divide_param_1]; "
    "or.b64 %rd7, %rd6, %rd5; and.b64 %rd8, %rd7, -4294967296; setp.eq.s64 %p1, %rd8, 0; @%p1 bra $L__BB3_4; "
    "or.b64 %rd9, %rd5, %rd6; and.b64 %rd10, %rd9, -4294967296; setp.eq.s64 %p2, %rd10, 0; @%p2 bra $L__BB3_3; "
    "div.s64 %rd11, %rd5, %rd6; bra.uni $L__BB3_5; $L__BB3_4: cvt.u32.u64 %r4, %rd5; cvt.u32.u64 %r5, %rd6; "
    "div.u32 %r6, %r4, %r5; cvt.u64.u32 %rd11, %r6; bra.uni $L__BB3_5; $L__BB3_3: cvt.u32.u64 %r1, %rd6; "
    "cvt.u32.u64 %r2, %rd5; div.u32 %r3, %r2, %r1; cvt.u64.u32 %rd11, %r3; $L__BB3_5: st.param.b64 "
    "[func_retval0+0], %rd11; ret; } .visible .entry lorasyncd_copy( .param .u64 lorasyncd_copy_param_0, .param "
    ".u64 lorasyncd_copy_param_1, .param .u64 lorasyncd_copy_param_2, .param .u64 lorasyncd_copy_param_3 ) "
    ".maxntid 256, 1, 1 .minnctapersm 6 { .reg .pred %p<214>; .reg .b16 %rs<62>; .reg .f32 %f<53>; .reg .b32 "
    "%r<348>; .reg .b64 %rd<431>; ld.param.u64 %rd134, [lorasyncd_copy_param_0]; ld.param.u64 %rd135, "
    "[lorasyncd_copy_param_1]; ld.param.u64 %rd136, [lorasyncd_copy_param_3]; cvta.to.global.u64 %rd137, %rd134; "
    "mov.u32 %r74, %ctaid.x; cvta.to.global.u64 %rd138, %rd135; mul.wide.u32 %rd139, %r74, 16; add.s64 %rd140, "
    "%rd138, %rd139; ld.global.u64 %rd1, [%rd140]; ld.global.v2.u32 {%r75, %r76}, [%rd140+8]; mul.wide.u32 "
    "%rd141, %r75, 104; add.s64 %rd142, %rd137, %rd141; ld.global.u64 %rd2, [%rd142]; ld.global.u64 %rd3, "
    "[%rd142+16]; ld.global.u64 %rd4, [%rd142+24]; ld.global.u64 %rd5, [%rd142+32]; ld.global.u64 %rd6, "
    "[%rd142+40]; ld.global.u64 %rd7, [%rd142+48]; ld.global.u64 %rd8, [%rd142+56]; ld.global.u64 %rd9, "
    "[%rd142+64]; ld.global.u64 %rd10, [%rd142+72]; ld.global.u64 %rd11, [%rd142+80]; ld.global.v2.u32 {%r78, "
    "%r79}, [%rd142+88]; ld.global.v4.u8 {%rs13, %rs14, %rs15, %rs16}, [%rd142+96]; ld.global.u32 %r80, "
    "[%rd142+100]; setp.eq.s32 %p26, %r80, 0; selp.b64 %rd143, 0, %rd136, %p26; ld.global.u64 %rd144, "
    "[%rd142+8]; add.s64 %rd12, %rd143, %rd144; setp.eq.s16 %p27, %rs16, 2; @%p27 bra $L__BB4_123; bra.uni "
    "$L__BB4_1; $L__BB4_123: mov.u32 %r288, %ntid.x; shl.b32 %r289, %r288, 1; cvt.u64.u32 %rd103, %r289; "
    "setp.gt.s64 %p189, %rd5, %rd103; @%p189 bra $L__BB4_125; bra.uni $L__BB4_124; $L__BB4_125: mov.u32 %r347, "
    "0; bra.uni $L__BB4_126; $L__BB4_1: mov.u32 %r322, %tid.x; shr.u32 %r81, %r76, 3; setp.eq.s16 %p28, %rs16, "
    "8; selp.b32 %r82, %r81, 0, %p28; setp.ge.u32 %p29, %r322, %r82; mov.u64 %rd420, -1; mov.u64 %rd419, 0; "
    "@%p29 bra $L__BB4_39; setp.eq.s16 %p30, %rs14, 18; setp.ne.s64 %p31, %rd12, 0; mov.u64 %rd148, 0; and.pred "
    "%p1, %p30, %p31; mov.u64 %rd420, -1; mov.b32 %f5, %r79; not.pred %p49, %p1; mov.u64 %rd419, %rd148; "
    "$L__BB4_3: .pragma \"nounroll\"; mul.wide.u32 %rd150, %r322, 8; add.s64 %rd15, %rd150, %rd1; setp.eq.s64 "
    "%p32, %rd4, %rd5; mov.u64 %rd391, %rd148; @%p32 bra $L__BB4_5; { .reg .b32 temp_param_reg; .param .b64 "
    "param0; st.param.b64 [param0+0], %rd15; .param .b64 param1; st.param.b64 [param1+0], %rd5; .param .b64 "
    "retval0; call.uni (retval0), lorasyncd_divide, ( param0, param1 ); ld.param.b64 %rd391, [retval0+0]; } "
    "$L__BB4_5: setp.ne.s16 %p33, %rs13, 18; setp.eq.s16 %p34, %rs13, 18; mul.lo.s64 %rd151, %rd391, %rd5; ",
    "sub.s64 %rd152, %rd15, %rd151; mul.lo.s64 %rd153, %rd391, %rd11; add.s64 %rd154, %rd153, %rd10; add.s64 "
    "%rd18, %rd154, %rd152; mul.lo.s64 %rd155, %rd391, %rd6; add.s64 %rd156, %rd152, %rd155; selp.b64 %rd157, 4, "
    "2, %p34; mul.lo.s64 %rd158, %rd156, %rd157; add.s64 %rd20, %rd2, %rd158; mul.lo.s64 %rd159, %rd391, %rd8; "
    "add.s64 %rd160, %rd152, %rd159; selp.b64 %rd161, 4, 2, %p30; mul.lo.s64 %rd162, %rd160, %rd161; add.s64 "
    "%rd19, %rd162, %rd12; ld.v4.u32 {%r342, %r341, %r340, %r339}, [%rd20]; mov.u32 %r323, %r342; mov.u32 %r324, "
    "%r341; mov.u32 %r325, %r340; mov.u32 %r326, %r339; @%p33 bra $L__BB4_7; ld.v4.u32 {%r323, %r324, %r325, "
    "%r326}, [%rd20+16]; $L__BB4_7: or.pred %p38, %p33, %p30; @%p38 bra $L__BB4_12; setp.eq.s16 %p39, %rs14, 15; "
    "mov.b32 %f6, %r342; mul.f32 %f1, %f5, %f6; @%p39 bra $L__BB4_10; bra.uni $L__BB4_9; $L__BB4_10: mov.b32 "
    "%r91, %f1; and.b32 %r92, %r91, 2147483647; setp.gt.u32 %p40, %r92, 2139095040; shr.u32 %r93, %r91, 16; "
    "and.b32 %r94, %r93, 1; add.s32 %r95, %r91, %r94; add.s32 %r96, %r95, 32767; shr.u32 %r97, %r96, 16; "
    "selp.b32 %r334, 32704, %r97, %p40; mov.b32 %f24, %r341; mul.f32 %f25, %f5, %f24; mov.b32 %r98, %f25; "
    "and.b32 %r99, %r98, 2147483647; setp.gt.u32 %p41, %r99, 2139095040; shr.u32 %r100, %r98, 16; and.b32 %r101, "
    "%r100, 1; add.s32 %r102, %r98, %r101; add.s32 %r103, %r102, 32767; shr.u32 %r104, %r103, 16; selp.b32 "
    "%r333, 32704, %r104, %p41; mov.b32 %f26, %r340; mul.f32 %f27, %f5, %f26; mov.b32 %r105, %f27; and.b32 "
    "%r106, %r105, 2147483647; setp.gt.u32 %p42, %r106, 2139095040; shr.u32 %r107, %r105, 16; and.b32 %r108, "
    "%r107, 1; add.s32 %r109, %r105, %r108; add.s32 %r110, %r109, 32767; shr.u32 %r111, %r110, 16; selp.b32 "
    "%r332, 32704, %r111, %p42; mov.b32 %f28, %r339; mul.f32 %f29, %f5, %f28; mov.b32 %r112, %f29; and.b32 "
    "%r113, %r112, 2147483647; setp.gt.u32 %p43, %r113, 2139095040; shr.u32 %r114, %r112, 16; and.b32 %r115, "
    "%r114, 1; add.s32 %r116, %r112, %r115; add.s32 %r117, %r116, 32767; shr.u32 %r118, %r117, 16; selp.b32 "
    "%r331, 32704, %r118, %p43; mov.b32 %f30, %r323; mul.f32 %f31, %f5, %f30; mov.b32 %r119, %f31; and.b32 "
    "%r120, %r119, 2147483647; setp.gt.u32 %p44, %r120, 2139095040; shr.u32 %r121, %r119, 16; and.b32 %r122, "
    "%r121, 1; add.s32 %r123, %r119, %r122; add.s32 %r124, %r123, 32767; shr.u32 %r125, %r124, 16; selp.b32 "
    "%r323, 32704, %r125, %p44; mov.b32 %f32, %r324; mul.f32 %f33, %f5, %f32; mov.b32 %r126, %f33; and.b32 "
    "%r127, %r126, 2147483647; setp.gt.u32 %p45, %r127, 2139095040; shr.u32 %r128, %r126, 16; and.b32 %r129, "
    "%r128, 1; add.s32 %r130, %r126, %r129; add.s32 %r131, %r130, 32767; shr.u32 %r132, %r131, 16; selp.b32 "
    "%r324, 32704, %r132, %p45; mov.b32 %f34, %r325; mul.f32 %f35, %f5, %f34; mov.b32 %r133, %f35; and.b32 "
    "%r134, %r133, 2147483647; setp.gt.u32 %p46, %r134, 2139095040; shr.u32 %r135, %r133, 16; and.b32 %r136, "
    "%r135, 1; add.s32 %r137, %r133, %r136; add.s32 %r138, %r137, 32767; shr.u32 %r139, %r138, 16; selp.b32 "
    "%r325, 32704, %r139, %p46; mov.b32 %f36, %r326; mul.f32 %f37, %f5, %f36; mov.b32 %r140, %f37; and.b32 "
    "%r141, %r140, 2147483647; setp.gt.u32 %p47, %r141, 2139095040; shr.u32 %r142, %r140, 16; and.b32 %r143, "
    "%r142, 1; add.s32 %r144, %r140, %r143; add.s32 %r145, %r144, 32767; shr.u32 %r146, %r145, 16; selp.b32 "
    "%r326, 32704, %r146, %p47; bra.uni $L__BB4_11; $L__BB4_9: cvt.rn.f16.f32 %rs24, %f1; cvt.u32.u16 %r334, "
    "%rs24; mov.b32 %f16, %r341; mul.f32 %f8, %f5, %f16; cvt.rn.f16.f32 %rs25, %f8; cvt.u32.u16 %r333, %rs25; "
    "mov.b32 %f17, %r340; mul.f32 %f9, %f5, %f17; cvt.rn.f16.f32 %rs26, %f9; cvt.u32.u16 %r332, %rs26; mov.b32 "
    "%f18, %r339; mul.f32 %f10, %f5, %f18; cvt.rn.f16.f32 %rs27, %f10; cvt.u32.u16 %r331, %rs27; mov.b32 %f19, "
    "%r323; mul.f32 %f11, %f5, %f19; cvt.rn.f16.f32 %rs28, %f11; cvt.u32.u16 %r323, %rs28; mov.b32 %f20, %r324; "
    "mul.f32 %f12, %f5, %f20; cvt.rn.f16.f32 %rs29, %f12; cvt.u32.u16 %r324, %rs29; mov.b32 %f21, %r325; mul.f32 "
    "%f13, %f5, %f21; cvt.rn.f16.f32 %rs30, %f13; cvt.u32.u16 %r325, %rs30; mov.b32 %f22, %r326; mul.f32 %f14, ",
    "%f5, %f22; cvt.rn.f16.f32 %rs31, %f14; cvt.u32.u16 %r326, %rs31; $L__BB4_11: shl.b32 %r147, %r333, 16; "
    "or.b32 %r342, %r147, %r334; shl.b32 %r148, %r331, 16; or.b32 %r341, %r148, %r332; shl.b32 %r149, %r324, 16; "
    "or.b32 %r340, %r149, %r323; shl.b32 %r150, %r326, 16; or.b32 %r339, %r150, %r325; $L__BB4_12: setp.eq.s64 "
    "%p48, %rd12, 0; @%p48 bra $L__BB4_14; st.v4.u32 [%rd19], {%r342, %r341, %r340, %r339}; $L__BB4_14: @%p49 "
    "bra $L__BB4_16; st.v4.u32 [%rd19+16], {%r323, %r324, %r325, %r326}; $L__BB4_16: setp.eq.s64 %p50, %rd3, 0; "
    "@%p50 bra $L__BB4_38; selp.b64 %rd379, 4, 2, %p30; setp.ne.s16 %p51, %rs14, 18; mul.lo.s64 %rd164, %rd18, "
    "%rd379; and.b64 %rd165, %rd164, 252; mov.u64 %rd166, lorasyncd_keys; add.s64 %rd167, %rd166, %rd165; "
    "ld.global.nc.v4.u32 {%r151, %r152, %r153, %r154}, [%rd167]; mul.wide.u32 %rd168, %r342, %r151; mul.wide.u32 "
    "%rd169, %r341, %r152; add.s64 %rd170, %rd169, %rd168; mul.wide.u32 %rd171, %r340, %r153; add.s64 %rd172, "
    "%rd170, %rd171; mul.wide.u32 %rd173, %r339, %r154; add.s64 %rd392, %rd172, %rd173; @%p51 bra $L__BB4_19; "
    "selp.b64 %rd388, 4, 2, %p30; mul.lo.s64 %rd387, %rd18, %rd388; shr.s64 %rd386, %rd387, 2; shl.b64 %rd174, "
    "%rd386, 2; add.s64 %rd175, %rd174, 16; and.b64 %rd176, %rd175, 252; add.s64 %rd178, %rd166, %rd176; "
    "ld.global.nc.v4.u32 {%r159, %r160, %r161, %r162}, [%rd178]; mul.wide.u32 %rd179, %r323, %r159; mul.wide.u32 "
    "%rd180, %r324, %r160; mul.wide.u32 %rd181, %r325, %r161; mul.wide.u32 %rd182, %r326, %r162; add.s64 %rd183, "
    "%rd179, %rd392; add.s64 %rd184, %rd183, %rd180; add.s64 %rd185, %rd184, %rd181; add.s64 %rd392, %rd185, "
    "%rd182; $L__BB4_19: setp.eq.s16 %p53, %rs14, 15; setp.eq.s16 %p54, %rs14, 14; selp.b32 %r168, 2139095040, "
    "0, %p30; mov.u32 %r343, 0; selp.b32 %r169, 2080406528, %r168, %p54; selp.b32 %r170, 2139127680, %r169, "
    "%p53; setp.eq.s32 %p56, %r170, 0; @%p56 bra $L__BB4_24; @%p30 bra $L__BB4_22; bra.uni $L__BB4_21; "
    "$L__BB4_22: and.b32 %r189, %r342, %r170; setp.eq.s32 %p78, %r189, %r170; and.b32 %r190, %r341, %r170; "
    "setp.eq.s32 %p79, %r190, %r170; or.pred %p80, %p78, %p79; and.b32 %r191, %r340, %r170; setp.eq.s32 %p81, "
    "%r191, %r170; or.pred %p82, %p80, %p81; and.b32 %r192, %r339, %r170; setp.eq.s32 %p83, %r192, %r170; "
    "or.pred %p84, %p82, %p83; and.b32 %r193, %r323, %r170; setp.eq.s32 %p85, %r193, %r170; or.pred %p86, %p84, "
    "%p85; and.b32 %r194, %r324, %r170; setp.eq.s32 %p87, %r194, %r170; or.pred %p88, %p86, %p87; and.b32 %r195, "
    "%r325, %r170; setp.eq.s32 %p89, %r195, %r170; or.pred %p90, %p88, %p89; and.b32 %r196, %r326, %r170; "
    "setp.eq.s32 %p91, %r196, %r170; or.pred %p210, %p90, %p91; bra.uni $L__BB4_23; $L__BB4_21: not.b32 %r171, "
    "%r342; and.b32 %r175, %r170, %r171; and.b32 %r176, %r175, 32640; setp.eq.s32 %p61, %r176, 0; setp.lt.u32 "
    "%p62, %r175, 65536; or.pred %p63, %p62, %p61; not.b32 %r177, %r341; and.b32 %r178, %r170, %r177; and.b32 "
    "%r179, %r178, 32640; setp.eq.s32 %p64, %r179, 0; setp.lt.u32 %p65, %r178, 65536; or.pred %p66, %p65, %p64; "
    "or.pred %p67, %p63, %p66; not.b32 %r180, %r340; and.b32 %r181, %r170, %r180; and.b32 %r182, %r181, 32640; "
    "setp.eq.s32 %p68, %r182, 0; setp.lt.u32 %p69, %r181, 65536; or.pred %p70, %p69, %p68; or.pred %p71, %p67, "
    "%p70; not.b32 %r183, %r339; and.b32 %r184, %r170, %r183; and.b32 %r185, %r184, 32640; setp.eq.s32 %p72, "
    "%r185, 0; setp.lt.u32 %p73, %r184, 65536; or.pred %p74, %p73, %p72; or.pred %p210, %p71, %p74; $L__BB4_23: "
    "selp.u32 %r343, 1, 0, %p210; $L__BB4_24: selp.b64 %rd377, 4, 2, %p30; mul.lo.s64 %rd376, %rd18, %rd377; "
    "shr.u64 %rd188, %rd376, 8; add.s64 %rd189, %rd188, -7046029254386353131; shr.u64 %rd190, %rd189, 30; "
    "xor.b64 %rd191, %rd190, %rd189; mul.lo.s64 %rd192, %rd191, -4658895280553007687; shr.u64 %rd193, %rd192, "
    "27; xor.b64 %rd194, %rd193, %rd192; mul.lo.s64 %rd195, %rd194, -7723592293110705685; shr.u64 %rd196, "
    "%rd195, 31; xor.b64 %rd197, %rd196, %rd195; or.b64 %rd198, %rd197, 1; mul.lo.s64 %rd199, %rd392, %rd198; ",
    "add.s64 %rd419, %rd199, %rd419; setp.eq.s32 %p93, %r343, 0; @%p93 bra $L__BB4_38; @%p30 bra $L__BB4_36; "
    "bra.uni $L__BB4_26; $L__BB4_36: mov.u32 %r345, 7; $L__BB4_37: .pragma \"nounroll\"; selp.b32 %r321, 4, 2, "
    "%p30; mul.lo.s32 %r200, %r345, %r321; cvt.s64.s32 %rd208, %r200; add.s64 %rd209, %rd19, %rd208; ld.u32 "
    "%r201, [%rd209]; and.b32 %r202, %r201, 2139095040; setp.eq.s32 %p106, %r202, 2139095040; cvt.s64.s32 "
    "%rd210, %r345; add.s64 %rd211, %rd18, %rd210; setp.gt.u64 %p107, %rd420, %rd211; and.pred %p108, %p107, "
    "%p106; selp.b64 %rd420, %rd211, %rd420, %p108; add.s32 %r61, %r345, -1; setp.ne.s32 %p109, %r345, 0; "
    "mov.u32 %r345, %r61; @%p109 bra $L__BB4_37; bra.uni $L__BB4_38; $L__BB4_26: mov.u32 %r344, 7; $L__BB4_27: "
    ".pragma \"nounroll\"; mov.u32 %r57, %r344; selp.b32 %r320, 4, 2, %p30; mul.lo.s32 %r198, %r57, %r320; "
    "cvt.s64.s32 %rd200, %r198; add.s64 %rd201, %rd19, %rd200; ld.u16 %rd27, [%rd201]; mov.pred %p211, 0; "
    "setp.gt.s16 %p97, %rs14, 13; @%p97 bra $L__BB4_31; setp.eq.s16 %p100, %rs14, 7; @%p100 bra $L__BB4_34; "
    "setp.eq.s16 %p101, %rs14, 8; @%p101 bra $L__BB4_30; bra.uni $L__BB4_35; $L__BB4_30: and.b64 %rd202, %rd27, "
    "127; setp.eq.s64 %p211, %rd202, 127; bra.uni $L__BB4_35; $L__BB4_31: setp.eq.s16 %p208, %rs14, 14; @%p208 "
    "bra $L__BB4_141; setp.eq.s16 %p209, %rs14, 15; @%p209 bra $L__BB4_33; bra.uni $L__BB4_35; $L__BB4_33: "
    "and.b64 %rd204, %rd27, 32640; setp.eq.s64 %p211, %rd204, 32640; bra.uni $L__BB4_35; $L__BB4_34: and.b64 "
    "%rd205, %rd27, 124; setp.eq.s64 %p211, %rd205, 124; bra.uni $L__BB4_35; $L__BB4_141: and.b64 %rd203, %rd27, "
    "31744; setp.eq.s64 %p211, %rd203, 31744; $L__BB4_35: cvt.s64.s32 %rd206, %r57; add.s64 %rd207, %rd18, "
    "%rd206; setp.gt.u64 %p102, %rd420, %rd207; and.pred %p103, %p102, %p211; selp.b64 %rd420, %rd207, %rd420, "
    "%p103; add.s32 %r344, %r57, -1; setp.gt.s32 %p104, %r57, 0; @%p104 bra $L__BB4_27; $L__BB4_38: mov.u32 "
    "%r203, %ntid.x; add.s32 %r322, %r322, %r203; setp.lt.u32 %p111, %r322, %r82; @%p111 bra $L__BB4_3; "
    "$L__BB4_39: shl.b32 %r63, %r82, 3; setp.ge.u32 %p113, %r63, %r76; @%p113 bra $L__BB4_118; cvt.u64.u32 "
    "%rd212, %r76; add.s64 %rd35, %rd1, %rd212; mov.u32 %r208, %ntid.x; cvt.u64.u32 %rd36, %r208; setp.gt.s64 "
    "%p114, %rd5, %rd36; @%p114 bra $L__BB4_42; bra.uni $L__BB4_41; $L__BB4_42: mov.u32 %r346, 0; bra.uni "
    "$L__BB4_43; $L__BB4_124: cvt.u32.u64 %r290, %rd103; cvt.u32.u64 %r291, %rd5; div.u32 %r347, %r290, %r291; "
    "$L__BB4_126: mov.u32 %r293, %tid.x; shl.b32 %r294, %r293, 1; cvt.u64.u32 %rd336, %r294; add.s64 %rd422, "
    "%rd1, %rd336; setp.eq.s64 %p190, %rd4, %rd5; mov.u64 %rd106, 0; @%p190 bra $L__BB4_128; { .reg .b32 "
    "temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd422; .param .b64 param1; st.param.b64 "
    "[param1+0], %rd5; .param .b64 retval0; call.uni (retval0), lorasyncd_divide, ( param0, param1 ); "
    "ld.param.b64 %rd106, [retval0+0]; } $L__BB4_128: mul.lo.s64 %rd337, %rd106, %rd5; sub.s64 %rd424, %rd422, "
    "%rd337; cvt.u64.u32 %rd338, %r76; add.s64 %rd108, %rd1, %rd338; setp.ge.s64 %p191, %rd422, %rd108; @%p191 "
    "bra $L__BB4_140; setp.eq.s16 %p192, %rs13, 18; selp.b64 %rd109, 4, 2, %p192; setp.eq.s16 %p193, %rs14, 18; "
    "selp.b64 %rd110, 4, 2, %p193; cvt.u64.u32 %rd111, %r347; cvt.u32.u64 %r295, %rd5; mul.lo.s32 %r296, %r347, "
    "%r295; cvt.u32.u64 %r297, %rd103; sub.s32 %r298, %r297, %r296; cvt.u64.u32 %rd112, %r298; @%p192 bra "
    "$L__BB4_133; bra.uni $L__BB4_130; $L__BB4_133: mov.b32 %f2, %r79; $L__BB4_134: .pragma \"nounroll\"; "
    "mul.lo.s64 %rd364, %rd106, %rd6; add.s64 %rd365, %rd364, %rd424; mul.lo.s64 %rd366, %rd365, %rd109; add.s64 "
    "%rd367, %rd2, %rd366; mul.lo.s64 %rd368, %rd106, %rd8; add.s64 %rd369, %rd368, %rd424; mul.lo.s64 %rd370, "
    "%rd369, %rd110; add.s64 %rd129, %rd12, %rd370; ld.u64 %rd128, [%rd367]; @%p193 bra $L__BB4_138; bra.uni "
    "$L__BB4_135; $L__BB4_138: st.u64 [%rd129], %rd128; bra.uni $L__BB4_139; $L__BB4_135: setp.eq.s16 %p202, "
    "%rs14, 15; cvt.u32.u64 %r300, %rd128; mov.b32 %f49, %r300; mul.f32 %f3, %f2, %f49; shr.u64 %rd371, %rd128, ",
    "32; cvt.u32.u64 %r301, %rd371; mov.b32 %f50, %r301; mul.f32 %f4, %f2, %f50; @%p202 bra $L__BB4_137; bra.uni "
    "$L__BB4_136; $L__BB4_137: mov.b32 %r302, %f3; mov.b32 %r303, %f4; and.b32 %r304, %r302, 2147483647; "
    "setp.gt.u32 %p203, %r304, 2139095040; shr.u32 %r305, %r302, 16; and.b32 %r306, %r305, 1; add.s32 %r307, "
    "%r302, %r306; add.s32 %r308, %r307, 32767; shr.u32 %r309, %r308, 16; selp.b32 %r310, 32704, %r309, %p203; "
    "and.b32 %r311, %r303, 2147483647; setp.gt.u32 %p204, %r311, 2139095040; shr.u32 %r312, %r303, 16; and.b32 "
    "%r313, %r312, 1; add.s32 %r314, %r303, %r313; add.s32 %r315, %r314, 32767; and.b32 %r316, %r315, -65536; "
    "selp.b32 %r317, 2143289344, %r316, %p204; or.b32 %r72, %r317, %r310; st.u32 [%rd129], %r72; bra.uni "
    "$L__BB4_139; $L__BB4_136: cvt.rn.f16.f32 %rs60, %f3; cvt.rn.f16.f32 %rs61, %f4; mov.b32 %r71, {%rs60, "
    "%rs61}; st.u32 [%rd129], %r71; $L__BB4_139: add.s64 %rd422, %rd422, %rd103; add.s64 %rd372, %rd424, %rd112; "
    "setp.lt.s64 %p205, %rd372, %rd5; selp.b64 %rd373, 0, %rd5, %p205; sub.s64 %rd424, %rd372, %rd373; "
    "setp.ge.s64 %p206, %rd372, %rd5; selp.u64 %rd374, 1, 0, %p206; add.s64 %rd375, %rd106, %rd111; add.s64 "
    "%rd106, %rd375, %rd374; setp.lt.s64 %p207, %rd422, %rd108; @%p207 bra $L__BB4_134; bra.uni $L__BB4_140; "
    "$L__BB4_41: cvt.u32.u64 %r209, %rd36; cvt.u32.u64 %r210, %rd5; div.u32 %r346, %r209, %r210; $L__BB4_43: "
    "mov.u32 %r212, %tid.x; cvt.u64.u32 %rd214, %r212; add.s64 %rd215, %rd1, %rd214; cvt.u64.u32 %rd216, %r63; "
    "add.s64 %rd400, %rd215, %rd216; setp.eq.s64 %p115, %rd4, %rd5; mov.u64 %rd399, 0; @%p115 bra $L__BB4_45; { "
    ".reg .b32 temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd400; .param .b64 param1; "
    "st.param.b64 [param1+0], %rd5; .param .b64 retval0; call.uni (retval0), lorasyncd_divide, ( param0, param1 "
    "); ld.param.b64 %rd399, [retval0+0]; } $L__BB4_45: mul.lo.s64 %rd217, %rd399, %rd5; sub.s64 %rd404, %rd400, "
    "%rd217; setp.ge.s64 %p116, %rd400, %rd35; @%p116 bra $L__BB4_118; cvt.u32.u16 %r213, %rs13; and.b32 %r66, "
    "%r213, 255; cvt.u32.u16 %r214, %rs14; and.b32 %r67, %r214, 255; setp.lt.u16 %p117, %rs14, 12; setp.lt.u16 "
    "%p118, %rs14, 16; setp.lt.u16 %p119, %rs14, 19; selp.b32 %r215, 4, 8, %p119; selp.b32 %r216, 2, %r215, "
    "%p118; selp.b32 %r217, 1, %r216, %p117; setp.lt.u16 %p120, %rs13, 12; setp.lt.u16 %p121, %rs13, 16; "
    "setp.lt.u16 %p122, %rs13, 19; selp.b32 %r218, 4, 8, %p122; selp.b32 %r219, 2, %r218, %p121; selp.b32 %r220, "
    "1, %r219, %p120; cvt.u64.u32 %rd41, %r220; cvt.u16.u32 %rs9, %r220; setp.eq.s16 %p123, %rs13, 18; "
    "setp.eq.s16 %p124, %rs14, 15; and.pred %p10, %p123, %p124; cvt.u32.u16 %r221, %rs15; and.b32 %r68, %r221, "
    "255; setp.ne.s16 %p125, %rs13, %rs14; mov.b32 %f38, %r79; setp.neu.f32 %p126, %f38, 0f3F800000; or.pred "
    "%p11, %p126, %p125; cvt.u64.u32 %rd42, %r217; cvt.u16.u32 %rs11, %r217; cvt.u64.u32 %rd43, %r346; "
    "cvt.u32.u64 %r222, %rd5; mul.lo.s32 %r223, %r346, %r222; cvt.u32.u64 %r224, %rd36; sub.s32 %r225, %r224, "
    "%r223; cvt.u64.u32 %rd44, %r225; setp.eq.s16 %p127, %rs9, 1; @%p127 bra $L__BB4_85; bra.uni $L__BB4_47; "
    "$L__BB4_85: not.pred %p153, %p11; $L__BB4_86: .pragma \"nounroll\"; mul.lo.s64 %rd267, %rd404, %rd7; "
    "mul.lo.s64 %rd268, %rd399, %rd6; add.s64 %rd269, %rd268, %rd267; mul.lo.s64 %rd270, %rd269, %rd41; add.s64 "
    "%rd271, %rd2, %rd270; ld.u8 %rs12, [%rd271]; cvt.u64.u16 %rd272, %rs12; and.b64 %rd84, %rd272, 255; "
    "setp.eq.s16 %p152, %rs15, 0; @%p152 bra $L__BB4_88; { .reg .b32 temp_param_reg; .param .b64 param0; "
    "st.param.b64 [param0+0], %rd84; .param .b32 param1; st.param.b32 [param1+0], %r66; .param .b32 param2; "
    "st.param.b32 [param2+0], %r68; .param .b32 param3; st.param.f32 [param3+0], %f38; .param .b64 retval0; "
    "call.uni (retval0), lorasyncd_convert, ( param0, param1, param2, param3 ); ld.param.b64 %rd273, "
    "[retval0+0]; } { .reg .b32 temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd273; .param .b32 "
    "param1; st.param.b32 [param1+0], %r68; .param .b32 param2; st.param.b32 [param2+0], %r67; .param .b32 ",
    "param3; st.param.f32 [param3+0], 0f3F800000; .param .b64 retval0; call.uni (retval0), lorasyncd_convert, ( "
    "param0, param1, param2, param3 ); ld.param.b64 %rd84, [retval0+0]; } bra.uni $L__BB4_92; $L__BB4_88: @%p10 "
    "bra $L__BB4_91; bra.uni $L__BB4_89; $L__BB4_91: cvt.u32.u16 %r242, %rs12; and.b32 %r243, %r242, 255; "
    "mov.b32 %f46, %r243; mul.f32 %f48, %f38, %f46; mov.b32 %r244, %f48; and.b32 %r245, %r244, 2147483647; "
    "setp.gt.u32 %p154, %r245, 2139095040; shr.u32 %r246, %r244, 16; and.b32 %r247, %r246, 1; add.s32 %r248, "
    "%r244, %r247; add.s32 %r249, %r248, 32767; shr.u32 %r250, %r249, 16; selp.b32 %r251, 32704, %r250, %p154; "
    "cvt.u64.u32 %rd84, %r251; bra.uni $L__BB4_92; $L__BB4_89: @%p153 bra $L__BB4_92; { .reg .b32 "
    "temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd84; .param .b32 param1; st.param.b32 "
    "[param1+0], %r66; .param .b32 param2; st.param.b32 [param2+0], %r67; .param .b32 param3; st.param.f32 "
    "[param3+0], %f38; .param .b64 retval0; call.uni (retval0), lorasyncd_convert, ( param0, param1, param2, "
    "param3 ); ld.param.b64 %rd84, [retval0+0]; } $L__BB4_92: setp.eq.s64 %p155, %rd12, 0; @%p155 bra "
    "$L__BB4_100; mul.lo.s64 %rd274, %rd404, %rd9; mul.lo.s64 %rd275, %rd399, %rd8; add.s64 %rd276, %rd275, "
    "%rd274; mul.lo.s64 %rd277, %rd276, %rd42; add.s64 %rd85, %rd12, %rd277; setp.eq.s16 %p156, %rs11, 1; @%p156 "
    "bra $L__BB4_98; setp.eq.s16 %p157, %rs11, 2; @%p157 bra $L__BB4_97; setp.ne.s16 %p158, %rs11, 4; @%p158 bra "
    "$L__BB4_99; st.u32 [%rd85], %rd84; bra.uni $L__BB4_100; $L__BB4_97: st.u16 [%rd85], %rd84; bra.uni "
    "$L__BB4_100; $L__BB4_98: st.u8 [%rd85], %rd84; bra.uni $L__BB4_100; $L__BB4_99: st.u64 [%rd85], %rd84; "
    "$L__BB4_100: setp.eq.s64 %p159, %rd3, 0; @%p159 bra $L__BB4_117; cvt.u32.u64 %r252, %rd42; setp.eq.s32 "
    "%p160, %r252, 8; add.s64 %rd278, %rd404, %rd10; mul.lo.s64 %rd279, %rd399, %rd11; add.s64 %rd86, %rd278, "
    "%rd279; mul.lo.s64 %rd87, %rd86, %rd42; shr.u64 %rd88, %rd87, 2; and.b64 %rd280, %rd87, 252; mov.u64 "
    "%rd281, lorasyncd_keys; add.s64 %rd89, %rd281, %rd280; @%p160 bra $L__BB4_103; bra.uni $L__BB4_102; "
    "$L__BB4_103: and.b64 %rd285, %rd84, 4294967295; ld.global.nc.u32 %r257, [%rd89]; cvt.u64.u32 %rd286, %r257; "
    "mul.lo.s64 %rd287, %rd285, %rd286; shl.b64 %rd288, %rd88, 2; add.s64 %rd289, %rd288, 4; and.b64 %rd290, "
    "%rd289, 252; add.s64 %rd292, %rd281, %rd290; ld.global.nc.u32 %r258, [%rd292]; cvt.u64.u32 %rd293, %r258; "
    "shr.u64 %rd294, %rd84, 32; mul.lo.s64 %rd295, %rd294, %rd293; add.s64 %rd416, %rd295, %rd287; bra.uni "
    "$L__BB4_104; $L__BB4_102: cvt.u32.u64 %r253, %rd87; shl.b32 %r254, %r253, 3; and.b32 %r255, %r254, 24; "
    "shl.b64 %rd282, %rd84, %r255; and.b64 %rd283, %rd282, 4294967295; ld.global.nc.u32 %r256, [%rd89]; "
    "cvt.u64.u32 %rd284, %r256; mul.lo.s64 %rd416, %rd283, %rd284; $L__BB4_104: shr.u64 %rd296, %rd87, 8; "
    "add.s64 %rd297, %rd296, -7046029254386353131; shr.u64 %rd298, %rd297, 30; xor.b64 %rd299, %rd298, %rd297; "
    "mul.lo.s64 %rd300, %rd299, -4658895280553007687; shr.u64 %rd301, %rd300, 27; xor.b64 %rd302, %rd301, "
    "%rd300; mul.lo.s64 %rd303, %rd302, -7723592293110705685; shr.u64 %rd304, %rd303, 31; xor.b64 %rd305, "
    "%rd304, %rd303; or.b64 %rd306, %rd305, 1; mul.lo.s64 %rd307, %rd416, %rd306; add.s64 %rd419, %rd307, "
    "%rd419; setp.gt.s16 %p161, %rs14, 13; @%p161 bra $L__BB4_108; bra.uni $L__BB4_105; $L__BB4_108: setp.eq.s16 "
    "%p162, %rs14, 14; @%p162 bra $L__BB4_113; @%p124 bra $L__BB4_114; setp.eq.s16 %p164, %rs14, 18; @%p164 bra "
    "$L__BB4_111; bra.uni $L__BB4_115; $L__BB4_111: and.b64 %rd312, %rd84, 2139095040; setp.eq.s64 %p213, "
    "%rd312, 2139095040; bra.uni $L__BB4_116; $L__BB4_105: setp.eq.s16 %p165, %rs14, 7; @%p165 bra $L__BB4_112; "
    "setp.eq.s16 %p166, %rs14, 8; @%p166 bra $L__BB4_107; bra.uni $L__BB4_115; $L__BB4_107: and.b64 %rd309, "
    "%rd84, 127; setp.eq.s64 %p213, %rd309, 127; bra.uni $L__BB4_116; $L__BB4_113: and.b64 %rd310, %rd84, 31744; "
    "setp.eq.s64 %p213, %rd310, 31744; bra.uni $L__BB4_116; $L__BB4_114: and.b64 %rd311, %rd84, 32640; ",
    "setp.eq.s64 %p213, %rd311, 32640; bra.uni $L__BB4_116; $L__BB4_112: and.b64 %rd308, %rd84, 124; setp.eq.s64 "
    "%p213, %rd308, 124; bra.uni $L__BB4_116; $L__BB4_115: setp.eq.s16 %p167, %rs14, 20; and.b64 %rd313, %rd84, "
    "9218868437227405312; setp.eq.s64 %p168, %rd313, 9218868437227405312; and.pred %p213, %p167, %p168; "
    "$L__BB4_116: mul.lo.s64 %rd385, %rd399, %rd11; add.s64 %rd384, %rd404, %rd10; add.s64 %rd383, %rd384, "
    "%rd385; setp.gt.u64 %p169, %rd420, %rd383; and.pred %p170, %p169, %p213; selp.b64 %rd420, %rd383, %rd420, "
    "%p170; $L__BB4_117: add.s64 %rd314, %rd404, %rd44; setp.lt.s64 %p171, %rd314, %rd5; selp.b64 %rd315, 0, "
    "%rd5, %p171; sub.s64 %rd404, %rd314, %rd315; setp.ge.s64 %p172, %rd314, %rd5; selp.u64 %rd316, 1, 0, %p172; "
    "add.s64 %rd317, %rd399, %rd43; add.s64 %rd399, %rd317, %rd316; add.s64 %rd400, %rd400, %rd36; setp.lt.s64 "
    "%p173, %rd400, %rd35; @%p173 bra $L__BB4_86; bra.uni $L__BB4_118; $L__BB4_130: @%p193 bra $L__BB4_132; "
    "bra.uni $L__BB4_131; $L__BB4_132: .pragma \"nounroll\"; mul.lo.s64 %rd351, %rd106, %rd6; add.s64 %rd352, "
    "%rd351, %rd424; mul.lo.s64 %rd353, %rd352, %rd109; add.s64 %rd354, %rd2, %rd353; mul.lo.s64 %rd355, %rd106, "
    "%rd8; add.s64 %rd356, %rd355, %rd424; mul.lo.s64 %rd357, %rd356, %rd110; add.s64 %rd358, %rd12, %rd357; "
    "ld.u32 %rd359, [%rd354]; st.u64 [%rd358], %rd359; add.s64 %rd360, %rd424, %rd112; setp.lt.s64 %p198, "
    "%rd360, %rd5; selp.b64 %rd361, 0, %rd5, %p198; sub.s64 %rd424, %rd360, %rd361; setp.ge.s64 %p199, %rd360, "
    "%rd5; selp.u64 %rd362, 1, 0, %p199; add.s64 %rd363, %rd106, %rd111; add.s64 %rd106, %rd363, %rd362; add.s64 "
    "%rd422, %rd422, %rd103; setp.lt.s64 %p200, %rd422, %rd108; @%p200 bra $L__BB4_132; bra.uni $L__BB4_140; "
    "$L__BB4_131: .pragma \"nounroll\"; mul.lo.s64 %rd339, %rd106, %rd6; add.s64 %rd340, %rd339, %rd424; "
    "mul.lo.s64 %rd341, %rd340, %rd109; add.s64 %rd342, %rd2, %rd341; mul.lo.s64 %rd343, %rd106, %rd8; add.s64 "
    "%rd344, %rd343, %rd424; mul.lo.s64 %rd345, %rd344, %rd110; add.s64 %rd346, %rd12, %rd345; ld.u32 %r299, "
    "[%rd342]; st.u32 [%rd346], %r299; add.s64 %rd347, %rd424, %rd112; setp.lt.s64 %p195, %rd347, %rd5; selp.b64 "
    "%rd348, 0, %rd5, %p195; sub.s64 %rd424, %rd347, %rd348; setp.ge.s64 %p196, %rd347, %rd5; selp.u64 %rd349, "
    "1, 0, %p196; add.s64 %rd350, %rd106, %rd111; add.s64 %rd106, %rd350, %rd349; add.s64 %rd422, %rd422, "
    "%rd103; setp.lt.s64 %p197, %rd422, %rd108; @%p197 bra $L__BB4_131; bra.uni $L__BB4_140; $L__BB4_47: "
    "not.pred %p131, %p11; $L__BB4_48: .pragma \"nounroll\"; mul.lo.s64 %rd218, %rd404, %rd7; mul.lo.s64 %rd219, "
    "%rd399, %rd6; add.s64 %rd220, %rd219, %rd218; mul.lo.s64 %rd221, %rd220, %rd41; add.s64 %rd51, %rd2, "
    "%rd221; setp.eq.s16 %p128, %rs9, 4; @%p128 bra $L__BB4_51; setp.ne.s16 %p129, %rs9, 2; @%p129 bra "
    "$L__BB4_52; ld.u16 %rd59, [%rd51]; bra.uni $L__BB4_53; $L__BB4_51: ld.u32 %rd59, [%rd51]; bra.uni "
    "$L__BB4_53; $L__BB4_52: ld.u64 %rd59, [%rd51]; $L__BB4_53: setp.eq.s16 %p130, %rs15, 0; @%p130 bra "
    "$L__BB4_55; { .reg .b32 temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd59; .param .b32 "
    "param1; st.param.b32 [param1+0], %r66; .param .b32 param2; st.param.b32 [param2+0], %r68; .param .b32 "
    "param3; st.param.f32 [param3+0], %f38; .param .b64 retval0; call.uni (retval0), lorasyncd_convert, ( "
    "param0, param1, param2, param3 ); ld.param.b64 %rd222, [retval0+0]; } { .reg .b32 temp_param_reg; .param "
    ".b64 param0; st.param.b64 [param0+0], %rd222; .param .b32 param1; st.param.b32 [param1+0], %r68; .param "
    ".b32 param2; st.param.b32 [param2+0], %r67; .param .b32 param3; st.param.f32 [param3+0], 0f3F800000; .param "
    ".b64 retval0; call.uni (retval0), lorasyncd_convert, ( param0, param1, param2, param3 ); ld.param.b64 "
    "%rd59, [retval0+0]; } bra.uni $L__BB4_59; $L__BB4_55: @%p10 bra $L__BB4_58; bra.uni $L__BB4_56; $L__BB4_58: "
    "cvt.u32.u64 %r226, %rd59; mov.b32 %f41, %r226; mul.f32 %f43, %f38, %f41; mov.b32 %r227, %f43; and.b32 "
    "%r228, %r227, 2147483647; setp.gt.u32 %p132, %r228, 2139095040; shr.u32 %r229, %r227, 16; and.b32 %r230, ",
    "%r229, 1; add.s32 %r231, %r227, %r230; add.s32 %r232, %r231, 32767; shr.u32 %r233, %r232, 16; selp.b32 "
    "%r234, 32704, %r233, %p132; cvt.u64.u32 %rd59, %r234; bra.uni $L__BB4_59; $L__BB4_56: @%p131 bra "
    "$L__BB4_59; { .reg .b32 temp_param_reg; .param .b64 param0; st.param.b64 [param0+0], %rd59; .param .b32 "
    "param1; st.param.b32 [param1+0], %r66; .param .b32 param2; st.param.b32 [param2+0], %r67; .param .b32 "
    "param3; st.param.f32 [param3+0], %f38; .param .b64 retval0; call.uni (retval0), lorasyncd_convert, ( "
    "param0, param1, param2, param3 ); ld.param.b64 %rd59, [retval0+0]; } $L__BB4_59: setp.eq.s64 %p133, %rd12, "
    "0; @%p133 bra $L__BB4_67; mul.lo.s64 %rd223, %rd404, %rd9; mul.lo.s64 %rd224, %rd399, %rd8; add.s64 %rd225, "
    "%rd224, %rd223; mul.lo.s64 %rd226, %rd225, %rd42; add.s64 %rd60, %rd12, %rd226; setp.eq.s16 %p134, %rs11, "
    "1; @%p134 bra $L__BB4_65; setp.eq.s16 %p135, %rs11, 2; @%p135 bra $L__BB4_64; setp.ne.s16 %p136, %rs11, 4; "
    "@%p136 bra $L__BB4_66; st.u32 [%rd60], %rd59; bra.uni $L__BB4_67; $L__BB4_64: st.u16 [%rd60], %rd59; "
    "bra.uni $L__BB4_67; $L__BB4_65: st.u8 [%rd60], %rd59; bra.uni $L__BB4_67; $L__BB4_66: st.u64 [%rd60], "
    "%rd59; $L__BB4_67: setp.eq.s64 %p137, %rd3, 0; @%p137 bra $L__BB4_84; cvt.u32.u64 %r235, %rd42; setp.eq.s32 "
    "%p138, %r235, 8; add.s64 %rd227, %rd404, %rd10; mul.lo.s64 %rd228, %rd399, %rd11; add.s64 %rd61, %rd227, "
    "%rd228; mul.lo.s64 %rd62, %rd61, %rd42; shr.u64 %rd63, %rd62, 2; and.b64 %rd229, %rd62, 252; mov.u64 "
    "%rd230, lorasyncd_keys; add.s64 %rd64, %rd230, %rd229; @%p138 bra $L__BB4_70; bra.uni $L__BB4_69; "
    "$L__BB4_70: and.b64 %rd234, %rd59, 4294967295; ld.global.nc.u32 %r240, [%rd64]; cvt.u64.u32 %rd235, %r240; "
    "mul.lo.s64 %rd236, %rd234, %rd235; shl.b64 %rd237, %rd63, 2; add.s64 %rd238, %rd237, 4; and.b64 %rd239, "
    "%rd238, 252; add.s64 %rd241, %rd230, %rd239; ld.global.nc.u32 %r241, [%rd241]; cvt.u64.u32 %rd242, %r241; "
    "shr.u64 %rd243, %rd59, 32; mul.lo.s64 %rd244, %rd243, %rd242; add.s64 %rd407, %rd244, %rd236; bra.uni "
    "$L__BB4_71; $L__BB4_69: cvt.u32.u64 %r236, %rd62; shl.b32 %r237, %r236, 3; and.b32 %r238, %r237, 24; "
    "shl.b64 %rd231, %rd59, %r238; and.b64 %rd232, %rd231, 4294967295; ld.global.nc.u32 %r239, [%rd64]; "
    "cvt.u64.u32 %rd233, %r239; mul.lo.s64 %rd407, %rd232, %rd233; $L__BB4_71: shr.u64 %rd245, %rd62, 8; add.s64 "
    "%rd246, %rd245, -7046029254386353131; shr.u64 %rd247, %rd246, 30; xor.b64 %rd248, %rd247, %rd246; "
    "mul.lo.s64 %rd249, %rd248, -4658895280553007687; shr.u64 %rd250, %rd249, 27; xor.b64 %rd251, %rd250, "
    "%rd249; mul.lo.s64 %rd252, %rd251, -7723592293110705685; shr.u64 %rd253, %rd252, 31; xor.b64 %rd254, "
    "%rd253, %rd252; or.b64 %rd255, %rd254, 1; mul.lo.s64 %rd256, %rd407, %rd255; add.s64 %rd419, %rd256, "
    "%rd419; setp.gt.s16 %p139, %rs14, 13; @%p139 bra $L__BB4_75; bra.uni $L__BB4_72; $L__BB4_75: setp.eq.s16 "
    "%p140, %rs14, 14; @%p140 bra $L__BB4_80; @%p124 bra $L__BB4_81; setp.eq.s16 %p142, %rs14, 18; @%p142 bra "
    "$L__BB4_78; bra.uni $L__BB4_82; $L__BB4_78: and.b64 %rd261, %rd59, 2139095040; setp.eq.s64 %p212, %rd261, "
    "2139095040; bra.uni $L__BB4_83; $L__BB4_72: setp.eq.s16 %p143, %rs14, 7; @%p143 bra $L__BB4_79; setp.eq.s16 "
    "%p144, %rs14, 8; @%p144 bra $L__BB4_74; bra.uni $L__BB4_82; $L__BB4_74: and.b64 %rd258, %rd59, 127; "
    "setp.eq.s64 %p212, %rd258, 127; bra.uni $L__BB4_83; $L__BB4_80: and.b64 %rd259, %rd59, 31744; setp.eq.s64 "
    "%p212, %rd259, 31744; bra.uni $L__BB4_83; $L__BB4_81: and.b64 %rd260, %rd59, 32640; setp.eq.s64 %p212, "
    "%rd260, 32640; bra.uni $L__BB4_83; $L__BB4_79: and.b64 %rd257, %rd59, 124; setp.eq.s64 %p212, %rd257, 124; "
    "bra.uni $L__BB4_83; $L__BB4_82: setp.eq.s16 %p145, %rs14, 20; and.b64 %rd262, %rd59, 9218868437227405312; "
    "setp.eq.s64 %p146, %rd262, 9218868437227405312; and.pred %p212, %p145, %p146; $L__BB4_83: mul.lo.s64 "
    "%rd382, %rd399, %rd11; add.s64 %rd381, %rd404, %rd10; add.s64 %rd380, %rd381, %rd382; setp.gt.u64 %p147, "
    "%rd420, %rd380; and.pred %p148, %p147, %p212; selp.b64 %rd420, %rd380, %rd420, %p148; $L__BB4_84: add.s64 ",
    "%rd263, %rd404, %rd44; setp.lt.s64 %p149, %rd263, %rd5; selp.b64 %rd264, 0, %rd5, %p149; sub.s64 %rd404, "
    "%rd263, %rd264; setp.ge.s64 %p150, %rd263, %rd5; selp.u64 %rd265, 1, 0, %p150; add.s64 %rd266, %rd399, "
    "%rd43; add.s64 %rd399, %rd266, %rd265; add.s64 %rd400, %rd400, %rd36; setp.lt.s64 %p151, %rd400, %rd35; "
    "@%p151 bra $L__BB4_48; $L__BB4_118: setp.eq.s64 %p174, %rd3, 0; @%p174 bra $L__BB4_140; setp.eq.s64 %p175, "
    "%rd420, -1; @%p175 bra $L__BB4_121; ld.param.u64 %rd378, [lorasyncd_copy_param_2]; cvt.u64.u32 %rd318, "
    "%r78; shl.b64 %rd319, %rd318, 40; min.u64 %rd320, %rd420, 1099511627775; or.b64 %rd321, %rd320, %rd319; "
    "cvta.to.global.u64 %rd322, %rd378; atom.global.min.u64 %rd323, [%rd322], %rd321; $L__BB4_121: mov.b64 "
    "{%r259,%r260}, %rd419; mov.u32 %r279, 2; mov.u32 %r280, 31; mov.u32 %r281, 16; mov.u32 %r282, -1; "
    "shfl.sync.down.b32 %r262|%p176, %r260, %r281, %r280, %r282; shfl.sync.down.b32 %r261|%p177, %r259, %r281, "
    "%r280, %r282; mov.b64 %rd325, {%r261,%r262}; add.s64 %rd326, %rd325, %rd419; mov.b64 {%r263,%r264}, %rd326; "
    "mov.u32 %r283, 8; shfl.sync.down.b32 %r266|%p178, %r264, %r283, %r280, %r282; shfl.sync.down.b32 "
    "%r265|%p179, %r263, %r283, %r280, %r282; mov.b64 %rd327, {%r265,%r266}; add.s64 %rd328, %rd327, %rd326; "
    "mov.b64 {%r267,%r268}, %rd328; mov.u32 %r284, 4; shfl.sync.down.b32 %r270|%p180, %r268, %r284, %r280, "
    "%r282; shfl.sync.down.b32 %r269|%p181, %r267, %r284, %r280, %r282; mov.b64 %rd329, {%r269,%r270}; add.s64 "
    "%rd330, %rd329, %rd328; mov.b64 {%r271,%r272}, %rd330; shfl.sync.down.b32 %r274|%p182, %r272, %r279, %r280, "
    "%r282; shfl.sync.down.b32 %r273|%p183, %r271, %r279, %r280, %r282; mov.b64 %rd331, {%r273,%r274}; add.s64 "
    "%rd332, %rd331, %rd330; mov.b64 {%r275,%r276}, %rd332; mov.u32 %r285, 1; shfl.sync.down.b32 %r278|%p184, "
    "%r276, %r285, %r280, %r282; shfl.sync.down.b32 %r277|%p185, %r275, %r285, %r280, %r282; mov.b64 %rd333, "
    "{%r277,%r278}; add.s64 %rd102, %rd333, %rd332; mov.u32 %r286, %tid.x; and.b32 %r287, %r286, 31; setp.ne.s32 "
    "%p186, %r287, 0; setp.eq.s64 %p187, %rd102, 0; or.pred %p188, %p186, %p187; @%p188 bra $L__BB4_140; "
    "atom.add.u64 %rd334, [%rd3], %rd102; $L__BB4_140: ret; } ",
};
/* <<< generated */
/* clang-format on */

LORASYNCI_FN const char *const *lorasynci_ptx_parts(size_t *num)
{
    *num = LORASYNCI_COUNT(lorasynci_ptx);
    return lorasynci_ptx;
}

#endif

#undef LORASYNCI_UNUSED
#undef LORASYNCI_PRINTF
#undef LORASYNCI_FN
#undef LORASYNCI_TRY
#undef LORASYNCI_COUNT
#undef LORASYNCI_JSON_DEPTH
#undef LORASYNCI_TILE
#undef LORASYNCI_SHORT
#undef LORASYNCI_AHEAD
#undef LORASYNCI_PREFETCH
#undef LORASYNCI_AVX2
#undef LORASYNCI_HAS_AVX2
#undef LORASYNCI_F16
#undef LORASYNCI_E5M2
#undef LORASYNCI_E4M3
#undef LORASYNCI_EACH
#undef LORASYNCI_COPY
#undef LORASYNCI_SMALL_TILES
#undef LORASYNCI_RE_MAX_BYTES
#undef LORASYNCI_RE_MAX_DEPTH
#undef LORASYNCI_RE_MAX_WORK
#undef LORASYNCI_RE_FOREVER
#undef LORASYNCI_CUDA
#undef LORASYNCI_FULL
#undef LORASYNCI_NORESERVE
#undef LORASYNCI_MAX_HEADER
#undef LORASYNCI_DELTA_NAME
#undef LORASYNCI_ALL
#undef LORASYNCI_COVERS
#undef LORASYNCI_MODEL_FILE
#undef LORASYNCI_CONFIG_FILE
#undef LORASYNCI_BASE_FILE
#undef LORASYNCI_BASE_INDEX
#undef LORASYNCI_BASE_CONFIG
#undef LORASYNCI_MAX_DIRECTORY
#undef LORASYNCI_MAX_CONFIG
#undef LORASYNCI_SLOTS
#ifdef LORASYNCI_ASSERTS_NOTHING
#undef LORASYNC_ASSERT
#undef LORASYNCI_ASSERTS_NOTHING
#endif

#endif /* LORASYNC_IMPLEMENTATION */


/* ------------------------------------------------------------------------------------------------------ >>device -- */

#ifdef LORASYNC_DEVICE_CODE

/* The kernel, in the part of C that is also CUDA. `make ptx` compiles this block to the text above it; tests also run
   it on the CPU, thread by thread, with the macros of tests/fake_cuda.h. Rounding is in integers, so that every GPU
   gives the bytes that the CPU gives. */

#ifndef LORASYNC_DEVICE_EMULATED
#define LORASYNCD_FN static __device__ __forceinline__
#define LORASYNCD_CALL static __device__ __noinline__ /* the slow path: one copy of it */
#define LORASYNCD_TABLE                                                                                                \
    static __device__ __align__(16) /* not __constant__: the threads of a warp read different
                                                           keys */
#define LORASYNCD_KERNEL                                                                                               \
    extern "C" __global__ void __launch_bounds__(LORASYNCD_THREADS, 6) /* 6 blocks on a
                                                                                               multiprocessor: 40
                                                                                               registers */
#define LORASYNCD_UNROLL _Pragma("unroll")
#define LORASYNCD_ROLLED _Pragma("unroll 1")
#define LORASYNCD_BITS(value) __float_as_uint(value)
#define LORASYNCD_FLOAT(bits) __uint_as_float(bits)
typedef unsigned long long lorasyncd_u64;
#endif

enum {
    LORASYNCD_E5M2 = 7,
    LORASYNCD_E4M3 = 8,
    LORASYNCD_F16  = 14,
    LORASYNCD_BF16 = 15,
    LORASYNCD_F32  = 18
}; /* lorasync_dtype */

LORASYNCD_FN unsigned lorasyncd_round_bf16(unsigned u)
{
    return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}

/* Rounds the float of bits u to a format of `mantissa` explicit bits and exponent bias `bias`: nearest, ties to even,
   subnormals kept. Sign removed; overflow is the caller's. */
LORASYNCD_CALL unsigned lorasyncd_round_small(unsigned u, int mantissa, int bias)
{
    int      drop = 23 - mantissa, exponent = (int)(u >> 23) - 127 + bias;
    unsigned m = u, half;
    if (exponent <= 0) { /* subnormal there: shift the mantissa with its hidden bit further */
        if (exponent < -mantissa) return 0;
        m = (u & 0x7fffffu) | 0x800000u;
        drop += 1 - exponent;
    } else {
        m = u - ((unsigned)(127 - bias) << 23);
    }
    half = 1u << (drop - 1);
    return (m + half - 1u + ((m >> drop) & 1u)) >> drop;
}

LORASYNCD_FN unsigned lorasyncd_round_f16(unsigned u)
{
#ifdef LORASYNC_DEVICE_EMULATED
    unsigned sign = (u >> 16) & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7e00u;
    return sign | (u >= 0x477ff000u ? 0x7c00u : lorasyncd_round_small(u, 10, 15));
#else
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(__uint_as_float(u)));
    return h;
#endif
}

LORASYNCD_FN unsigned lorasyncd_round_e4m3(unsigned u)
{
    unsigned sign = (u >> 24) & 0x80u;
    u &= 0x7fffffffu;
    return sign | (u > 0x43e80000u ? 0x7fu : lorasyncd_round_small(u, 3, 7));
}

LORASYNCD_FN unsigned lorasyncd_round_e5m2(unsigned u)
{
    unsigned sign = (u >> 24) & 0x80u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return sign | 0x7fu;
    return sign | (u >= 0x47700000u ? 0x7cu : lorasyncd_round_small(u, 2, 15));
}

/* The float bits of a number of `mantissa` and `exponent` bits. */
LORASYNCD_CALL unsigned lorasyncd_widen_small(unsigned h, int mantissa, int exponent, int has_inf)
{
    int      bias = (1 << (exponent - 1)) - 1;
    unsigned sign = (h >> (mantissa + exponent)) & 1u, e = (h >> mantissa) & ((1u << exponent) - 1u),
             m = h & ((1u << mantissa) - 1u);
    sign <<= 31;
    if (has_inf && e == (1u << exponent) - 1u) return sign | 0x7f800000u | (m << (23 - mantissa));
    if (!has_inf && e == (1u << exponent) - 1u && m == (1u << mantissa) - 1u) return sign | 0x7fc00000u;
    if (e == 0) { /* subnormal: its value is m units, and small integers are exact */
        float unit = LORASYNCD_FLOAT((unsigned)(127 + 1 - bias - mantissa) << 23);
        return sign | LORASYNCD_BITS((float)m * unit);
    }
    return sign | ((e + 127u - (unsigned)bias) << 23) | (m << (23 - mantissa));
}

LORASYNCD_FN int lorasyncd_item(int dtype) { return dtype <= 11 ? 1 : dtype <= 15 ? 2 : dtype <= 18 ? 4 : 8; }

LORASYNCD_FN lorasyncd_u64 lorasyncd_load(const unsigned char *p, int item)
{
    if (item == 1) return *p;
    if (item == 2) return *(const unsigned short *)(const void *)p;
    if (item == 4) return *(const unsigned *)(const void *)p;
    return *(const lorasyncd_u64 *)(const void *)p;
}

LORASYNCD_FN void lorasyncd_store(unsigned char *p, int item, lorasyncd_u64 v)
{
    if (item == 1) *p = (unsigned char)v;
    else if (item == 2) *(unsigned short *)(void *)p = (unsigned short)v;
    else if (item == 4) *(unsigned *)(void *)p = (unsigned)v;
    else *(lorasyncd_u64 *)(void *)p = v;
}

LORASYNCD_FN unsigned lorasyncd_widen(lorasyncd_u64 v, int dtype)
{
    if (dtype == LORASYNCD_F32) return (unsigned)v;
    if (dtype == LORASYNCD_BF16) return (unsigned)v << 16;
    if (dtype == LORASYNCD_F16) return lorasyncd_widen_small((unsigned)v, 10, 5, 1);
    if (dtype == LORASYNCD_E4M3) return lorasyncd_widen_small((unsigned)v, 3, 4, 0);
    return lorasyncd_widen_small((unsigned)v, 2, 5, 1);
}

LORASYNCD_FN lorasyncd_u64 lorasyncd_round(unsigned u, int dtype)
{
    if (dtype == LORASYNCD_F32) return u;
    if (dtype == LORASYNCD_BF16) return lorasyncd_round_bf16(u);
    if (dtype == LORASYNCD_F16) return lorasyncd_round_f16(u);
    if (dtype == LORASYNCD_E4M3) return lorasyncd_round_e4m3(u);
    return lorasyncd_round_e5m2(u);
}

LORASYNCD_CALL lorasyncd_u64 lorasyncd_convert(lorasyncd_u64 v, int from, int to, float scale)
{
    unsigned u;
    if (from == to && scale == 1.0f) return v;
    u = lorasyncd_widen(v, from);
    if (scale != 1.0f) u = LORASYNCD_BITS(LORASYNCD_FLOAT(u) * scale);
    return lorasyncd_round(u, to);
}

LORASYNCD_FN int lorasyncd_not_finite(lorasyncd_u64 v, int dtype)
{
    if (dtype == LORASYNCD_F32) return (v & 0x7f800000u) == 0x7f800000u;
    if (dtype == LORASYNCD_BF16) return (v & 0x7f80u) == 0x7f80u;
    if (dtype == LORASYNCD_F16) return (v & 0x7c00u) == 0x7c00u;
    if (dtype == LORASYNCD_E4M3) return (v & 0x7fu) == 0x7fu;
    if (dtype == LORASYNCD_E5M2) return (v & 0x7cu) == 0x7cu;
    return dtype == 20 && (v >> 52 & 0x7ffu) == 0x7ffu; /* F64 */
}

/* lorasync_digest's keys and block factor. */
LORASYNCD_TABLE const unsigned lorasyncd_keys[64] = {
    0xe220a839u, 0x6e789e6bu, 0x06c45d19u, 0xf88bb8a9u, 0x1b39896bu, 0x53cb9f0du, 0x2c829abfu, 0xc584133bu,
    0x3ee57891u, 0xf3b8488du, 0x657eecddu, 0xc2d326e1u, 0x8621a03fu, 0x8e1f7555u, 0xb54e0f17u, 0x84bb3f97u,
    0x7d29825du, 0xc3cf1711u, 0x3466e9a1u, 0xd81a8d2bu, 0xdb01602bu, 0xa9038a93u, 0xedf5f1d9u, 0x54496ad7u,
    0xdd7c01d5u, 0x935e82f1u, 0x69b82ebdu, 0x40d29eb5u, 0xa2f09dabu, 0xee521d7bu, 0xf16952efu, 0x377d35dfu,
    0x0c7de807u, 0x05582d37u, 0xd254741fu, 0x69630f75u, 0x417ef961u, 0x3c3c41a3u, 0x6e19905du, 0x4fa9fa73u,
    0x84eb4455u, 0x134f7097u, 0x07dc930bu, 0x12c015a9u, 0xcc06c317u, 0xecee6563u, 0x3e84ecb1u, 0x690ed477u,
    0x774615d7u, 0x22b353f1u, 0xe3ddd86bu, 0xdf268adfu, 0x2098eb73u, 0x03d68453u, 0xc952c563u, 0x9b196bcbu,
    0x30260345u, 0xcf448a59u, 0xf4a578ddu, 0xbfdeaed9u, 0xed79402du, 0x55f070abu, 0x3e00a349u, 0xe255b237u};

LORASYNCD_FN lorasyncd_u64 lorasyncd_factor(lorasyncd_u64 block)
{
    lorasyncd_u64 x = block + 0x9e3779b97f4a7c15ull;
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return (x ^ (x >> 31)) | 1u;
}

/* One element of `item` bytes at byte `at` of its tensor. */
LORASYNCD_FN lorasyncd_u64 lorasyncd_digest(lorasyncd_u64 v, int item, lorasyncd_u64 at)
{
    lorasyncd_u64 sum;
    if (item == 8)
        sum = (v & 0xffffffffu) * lorasyncd_keys[(at >> 2) & 63u] + (v >> 32) * lorasyncd_keys[((at >> 2) + 1) & 63u];
    else sum = ((v << (8u * (unsigned)(at & 3u))) & 0xffffffffu) * lorasyncd_keys[(at >> 2) & 63u];
    return sum * lorasyncd_factor(at >> 8);
}

/* Row of element e; one copy of the 64-bit division. */
LORASYNCD_CALL long long lorasyncd_divide(long long e, long long n)
{
    return (e | n) >> 32 ? e / n : (long long)((unsigned)e / (unsigned)n); /* the latter is much faster */
}

LORASYNCD_FN long long lorasyncd_row(const lorasyncd_op *o, long long e)
{
    return o->num == o->n1 ? 0 : lorasyncd_divide(e, o->n1);
}

/* Element i1 of row i0. */
LORASYNCD_FN void lorasyncd_element(const lorasyncd_op *o, long long i0, long long i1, lorasyncd_u64 *sum,
                                    lorasyncd_u64 *bad)
{
    int           from = o->src_dtype, to = o->dst_dtype, item = lorasyncd_item(to);
    lorasyncd_u64 v, e;
    v = lorasyncd_load((const unsigned char *)(o->src) + (i0 * o->s0 + i1 * o->s1) * lorasyncd_item(from),
                       lorasyncd_item(from));
    if (o->via) v = lorasyncd_convert(lorasyncd_convert(v, from, o->via, o->scale), o->via, to, 1.0f);
    else if (from == LORASYNCD_F32 && to == LORASYNCD_BF16)
        v = lorasyncd_round_bf16(LORASYNCD_BITS(LORASYNCD_FLOAT((unsigned)v) * o->scale));
    else if (from != to || o->scale != 1.0f) v = lorasyncd_convert(v, from, to, o->scale);
    if (o->dst) lorasyncd_store((unsigned char *)(o->dst) + (i0 * o->d0 + i1 * o->d1) * item, item, v);
    if (!o->sum) return;
    e = (lorasyncd_u64)(o->pos + i0 * o->row + i1);
    *sum += lorasyncd_digest(v, item, e * (unsigned)item);
    if (lorasyncd_not_finite(v, to) && *bad > e) *bad = e;
}

/* Elements i1 and i1 + 1 of row i0, of 4 bytes or 2. Not digested. */
LORASYNCD_FN void lorasyncd_pair(const lorasyncd_op *o, long long i0, long long i1)
{
    int                  wide_in = o->src_dtype == LORASYNCD_F32, wide = o->dst_dtype == LORASYNCD_F32;
    const unsigned char *in  = (const unsigned char *)(o->src) + (i0 * o->s0 + i1) * (wide_in ? 4 : 2);
    unsigned char       *out = (unsigned char *)(o->dst) + (i0 * o->d0 + i1) * (wide ? 4 : 2);
    lorasyncd_u64        v   = wide_in ? *(const lorasyncd_u64 *)(const void *)in : *(const unsigned *)(const void *)in;
    if (wide) {
        *(lorasyncd_u64 *)(void *)out = v;
        return;
    }
    if (wide_in) {
        unsigned a = LORASYNCD_BITS(LORASYNCD_FLOAT((unsigned)v) * o->scale),
                 b = LORASYNCD_BITS(LORASYNCD_FLOAT((unsigned)(v >> 32)) * o->scale);
        if (o->dst_dtype == LORASYNCD_BF16) v = lorasyncd_round_bf16(a) | lorasyncd_round_bf16(b) << 16;
        else v = lorasyncd_round_f16(a) | lorasyncd_round_f16(b) << 16;
    }
    *(unsigned *)(void *)out = (unsigned)v;
}

/* Where a thread goes from its element i1 of row i0: `by` elements on, without a division. */
typedef struct lorasyncd_step {
    unsigned by, rows, rest;
} lorasyncd_step;

LORASYNCD_FN lorasyncd_step lorasyncd_step_of(const lorasyncd_op *o, unsigned by)
{
    lorasyncd_step s;
    s.by   = by;
    s.rows = o->n1 > by ? 0 : by / (unsigned)o->n1;
    s.rest = by - s.rows * (unsigned)o->n1;
    return s;
}

LORASYNCD_FN void lorasyncd_advance(const lorasyncd_op *o, lorasyncd_step s, long long *i0, long long *i1)
{
    *i0 += s.rows;
    *i1 += s.rest;
    if (*i1 >= o->n1) ++*i0, *i1 -= o->n1;
}

/* Elements first .. end - 1, one by one, each thread of a block its own. */
LORASYNCD_FN void lorasyncd_elements(const lorasyncd_op *o, long long first, long long end, lorasyncd_u64 *sum,
                                     lorasyncd_u64 *bad)
{
    const lorasyncd_step s = lorasyncd_step_of(o, blockDim.x);
    long long            e = first + threadIdx.x, i0 = lorasyncd_row(o, e), i1 = e - i0 * o->n1;
    LORASYNCD_ROLLED
    for (; e < end; e += s.by, lorasyncd_advance(o, s, &i0, &i1)) lorasyncd_element(o, i0, i1, sum, bad);
}

/* A tile of pairs. */
LORASYNCD_FN void lorasyncd_pairs(const lorasyncd_op *o, const lorasyncd_tile *tile)
{
    const lorasyncd_step s = lorasyncd_step_of(o, 2 * blockDim.x);
    long long            e = tile->first + 2 * threadIdx.x, i0 = lorasyncd_row(o, e), i1 = e - i0 * o->n1;
    LORASYNCD_ROLLED
    for (; e < tile->first + tile->count; e += s.by, lorasyncd_advance(o, s, &i0, &i1)) lorasyncd_pair(o, i0, i1);
}

/* 8 elements in 16-byte words: read, convert, write. Digest and check work on the words that are written. */
LORASYNCD_FN void lorasyncd_run(const lorasyncd_op *o, long long e, lorasyncd_u64 *sum, lorasyncd_u64 *bad)
{
    long long i0 = lorasyncd_row(o, e), i1 = e - i0 * o->n1, at = o->pos + i0 * o->row + i1;
    int       bf16 = o->dst_dtype == LORASYNCD_BF16, wide_in = o->src_dtype == LORASYNCD_F32,
        wide         = o->dst_dtype == LORASYNCD_F32, i;
    const uint4 *in  = (const uint4 *)((const unsigned char *)(o->src) + (i0 * o->s0 + i1) * (wide_in ? 4 : 2));
    uint4       *out = (uint4 *)(o->dst + (lorasyncd_u64)((i0 * o->d0 + i1) * (wide ? 4 : 2)));
    uint4        a = in[0], b = a;
    unsigned     w[8],
        mask = bf16                            ? 0x7f807f80u
               : o->dst_dtype == LORASYNCD_F16 ? 0x7c007c00u
               : wide                          ? 0x7f800000u
                                               : 0,
        hit  = 0, x;
    lorasyncd_u64 part;
    if (wide_in) b = in[1];
    w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
    if (wide_in && !wide) {
        LORASYNCD_UNROLL
        for (i = 0; i < 8; i++) { /* a factor of 1 changes nothing but the bits of a NaN */
            w[i] = LORASYNCD_BITS(LORASYNCD_FLOAT(w[i]) * o->scale);
            w[i] = bf16 ? lorasyncd_round_bf16(w[i]) : lorasyncd_round_f16(w[i]);
        }
        LORASYNCD_UNROLL
        for (i = 0; i < 4; i++) w[i] = w[2 * i] | w[2 * i + 1] << 16;
    }
    a.x = w[0], a.y = w[1], a.z = w[2], a.w = w[3], b.x = w[4], b.y = w[5], b.z = w[6], b.w = w[7];
    if (o->dst) out[0] = a;
    if (o->dst && wide) out[1] = b;
    if (!o->sum) return;
    at *= wide ? 4 : 2;
    a = *(const uint4 *)(const void *)&lorasyncd_keys[(at >> 2) & 63]; /* at is a multiple of 16, or of 32 */
    part =
        (lorasyncd_u64)w[0] * a.x + (lorasyncd_u64)w[1] * a.y + (lorasyncd_u64)w[2] * a.z + (lorasyncd_u64)w[3] * a.w;
    if (wide) {
        b = *(const uint4 *)(const void *)&lorasyncd_keys[((at >> 2) + 4) & 63];
        part += (lorasyncd_u64)w[4] * b.x + (lorasyncd_u64)w[5] * b.y + (lorasyncd_u64)w[6] * b.z +
                (lorasyncd_u64)w[7] * b.w;
    }
    LORASYNCD_UNROLL
    for (i = 0; i < 8; i++) {
        if (!mask || (i >= 4 && !wide)) break; /* no mask: 16-bit integers */
        x = w[i] & mask;                       /* a half whose exponent is all ones */
        hit |= wide ? x == mask : (x & 0xffffu) == (mask & 0xffffu) || (x >> 16) == (mask >> 16);
    }
    *sum += part * lorasyncd_factor((lorasyncd_u64)at >> 8); /* all in one block of 256 bytes */
    at /= wide ? 4 : 2;
    if (!hit) return;
    LORASYNCD_ROLLED
    for (i = 7; i >= 0; i--) { /* which of the 8: rare, so it is read back */
        int item = wide ? 4 : 2;
        if (lorasyncd_not_finite(lorasyncd_load((unsigned char *)out + i * item, item), o->dst_dtype) &&
            *bad > (lorasyncd_u64)(at + i))
            *bad = (lorasyncd_u64)(at + i);
    }
}

/* One block, of whole warps, per tile. bad: the smallest tensor << 40 | element that is not finite, or all ones. */
LORASYNCD_KERNEL lorasyncd_copy(const lorasyncd_op *ops, const lorasyncd_tile *tiles, lorasyncd_u64 *bad,
                                lorasyncd_u64 image_shift)
{
    const lorasyncd_tile tile = tiles[blockIdx.x];
    lorasyncd_op         o    = ops[tile.op];
    lorasyncd_u64        sum = 0, hit = ~0ull;
    unsigned             runs = o.unit == 8 ? tile.count / 8u : 0u, k;
    if (o.in_image) o.dst += image_shift;
    if (o.unit == 2) {
        lorasyncd_pairs(&o, &tile);
        return;
    }
    LORASYNCD_ROLLED
    for (k = threadIdx.x; k < runs; k += blockDim.x) lorasyncd_run(&o, tile.first + 8 * (long long)k, &sum, &hit);
    if (8u * runs < tile.count)
        lorasyncd_elements(&o, tile.first + 8 * (long long)runs, tile.first + tile.count, &sum, &hit);
    if (!o.sum) return;
    if (hit != ~0ull) atomicMin(bad, (lorasyncd_u64)o.tensor << 40 | (hit < (1ull << 40) - 1 ? hit : (1ull << 40) - 1));
#ifndef LORASYNC_DEVICE_EMULATED
    for (k = 16; k > 0; k /= 2) sum += __shfl_down_sync(0xffffffffu, sum, k);
    if (threadIdx.x % 32 != 0) return;
#endif
    if (sum) atomicAdd((lorasyncd_u64 *)o.sum, sum);
}

#endif /* LORASYNC_DEVICE_CODE */
/*
   MIT License

   Copyright (c) 2026 The lorasync authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
   documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
   rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
   permit persons to whom the Software is furnished to do so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
   Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
   WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
   OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
