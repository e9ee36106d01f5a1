/* What can go wrong with a plan: declarations that do not fit, values that must not travel, memory that is not there,
   ranks that die. */
#define _DEFAULT_SOURCE 1
#include "lorasync.h"
#include "test.h"
#include "ranks.h"
#include "pieces.h"

#include <dirent.h>
#include <math.h>
#include <sys/mman.h>
#include <sys/resource.h>

enum {
    WORLD = 3,
    ROWS  = 6,
    COLS  = 4
};

/* One rank's declarations: A [6, 4] F32 by rows over 3 ranks, B [4, 6] BF16 by columns over 3 ranks, c [] I64 on rank 2
   alone. */
typedef struct declared {
    lorasync_piece     have[4], want[4];
    lorasync_plan_desc d;
    float              a[ROWS * COLS];
    uint16_t           b[ROWS * COLS];
    int64_t            c;
    float              out[ROWS * COLS];
    test_memory        memory;
    lorasync_allocator allocator;
} declared;

static void declare_rank(declared *x, const lorasync_comm *comm, int rank)
{
    int i;
    memset(x, 0, sizeof *x);
    for (i = 0; i < ROWS * COLS; i++) {
        float f = (float)(rank * 100 + i);
        x->a[i] = f;
        lorasync_convert(&x->b[i], LORASYNC_BF16, &f, LORASYNC_F32, 1, NULL);
    }
    x->c           = -5;
    x->have[0]     = whole_piece("A", LORASYNC_F32, 2, ROWS, COLS, x->a);
    x->have[0].box = lorasync_shard(x->have[0].box, 0, rank, WORLD);
    x->have[1]     = whole_piece("B", LORASYNC_BF16, 2, COLS, ROWS, x->b);
    x->have[1].box = lorasync_shard(x->have[1].box, 1, rank, WORLD);
    x->have[2]     = whole_piece("c", LORASYNC_I64, 0, 0, 0, &x->c);
    x->d.comm = comm, x->d.have = x->have, x->d.num_have = rank == 2 ? 3 : 2;
    x->d.timeout_ms    = test_ms(10000);
    x->allocator.alloc = test_memory_alloc, x->allocator.free = test_memory_free, x->allocator.user = &x->memory;
    x->d.allocator = &x->allocator;
}

static void want_all(declared *x)
{
    x->want[0] = whole_piece("A", LORASYNC_F32, 2, ROWS, COLS, x->out);
    x->d.kind = LORASYNC_RESHARD, x->d.want = x->want, x->d.num_want = 1;
}

/* -- a table of wrong declarations: what to break, on which rank, the status and words that every rank must see */

typedef struct wrong_case {
    void (*spoil)(declared *x, int rank);
    lorasync_status status;
    const char     *words[3];
} wrong_case;

static void spoil_gap(declared *x, int rank)
{
    if (rank == 1) x->have[0].box.len[0] = 1;
}
static void spoil_overlap(declared *x, int rank)
{
    if (rank == 1) x->have[0].box.len[0] = 3;
}
static void spoil_overlap_column(declared *x, int rank)
{
    if (rank == 1) x->have[1].box.off[1] = 1;
}
static void spoil_shape(declared *x, int rank)
{
    if (rank == 2) x->have[0].shape[0] = 7;
}
static void spoil_ndim(declared *x, int rank)
{
    if (rank == 2) x->have[0].ndim = 3, x->have[0].shape[2] = 1, x->have[0].box.ndim = 3, x->have[0].box.len[2] = 1;
}
static void spoil_dtype(declared *x, int rank)
{
    if (rank == 1) x->have[1].dtype = LORASYNC_F16;
}
static void spoil_missing(declared *x, int rank)
{
    if (rank == 1) x->d.num_have = 1;
}
static void spoil_missing_all(declared *x, int rank)
{
    if (rank == 0) x->d.num_have = 0;
}
static void spoil_root(declared *x, int rank)
{
    if (rank == 1) x->d.root = 1;
}
static void spoil_root_range(declared *x, int rank)
{
    (void)rank;
    x->d.root = WORLD;
}
static void spoil_root_negative(declared *x, int rank)
{
    (void)rank;
    x->d.root = -1;
}
static void spoil_kind(declared *x, int rank)
{
    if (rank == 2) x->d.kind = LORASYNC_GATHER_ALL;
}
static void spoil_kind_unknown(declared *x, int rank)
{
    (void)rank;
    x->d.kind = (lorasync_plan_kind)9;
}
static void spoil_wire(declared *x, int rank)
{
    if (rank == 2) x->d.wire_dtype = LORASYNC_BF16;
}
static void spoil_wire_type(declared *x, int rank)
{
    (void)rank;
    x->d.wire_dtype = LORASYNC_I32;
}
static void spoil_wire_block(declared *x, int rank)
{
    (void)rank;
    x->d.wire_dtype = LORASYNC_F8_E8M0;
}
static void spoil_nan(declared *x, int rank)
{
    if (rank == 2) x->d.allow_nan = 1;
}
static void spoil_two(declared *x, int rank)
{
    if (rank >= 1) x->have[0].ndim = 9 + rank;
}
static void spoil_wire_unknown(declared *x, int rank)
{
    (void)rank;
    x->d.wire_dtype = (lorasync_dtype)77;
}
static void spoil_bounds(declared *x, int rank)
{
    if (rank == 2) x->have[0].box.off[0] = 5;
}
static void spoil_bounds_huge(declared *x, int rank)
{
    if (rank == 2) x->have[0].box.off[0] = INT64_MAX;
}
static void spoil_negative_off(declared *x, int rank)
{
    if (rank == 2) x->have[0].box.off[0] = -1;
}
static void spoil_flat_bounds(declared *x, int rank)
{
    if (rank == 2) x->have[0].box = lorasync_flat(20, 5);
}
static void spoil_box_ndim(declared *x, int rank)
{
    if (rank == 2) x->have[0].box.ndim = 1;
}
static void spoil_impossible(declared *x, int rank)
{
    if (rank == 0) x->have[0].box = lorasync_even(lorasync_whole(x->have[0].shape, 2), 1, 0, 3);
}
static void spoil_null(declared *x, int rank)
{
    if (rank == 2) x->have[1].data = NULL;
}
static void spoil_packed(declared *x, int rank)
{
    if (rank == 2) x->have[1].dtype = LORASYNC_F4;
}
static void spoil_no_dtype(declared *x, int rank)
{
    if (rank == 2) x->have[1].dtype = LORASYNC_DTYPE_NONE;
}
static void spoil_no_name(declared *x, int rank)
{
    if (rank == 2) x->have[1].name = NULL;
}
static void spoil_empty_name(declared *x, int rank)
{
    if (rank == 2) x->have[1].name = "";
}
static void spoil_long_name(declared *x, int rank)
{
    static char name[LORASYNC_MAX_NAME + 1];
    if (rank != 2) return;
    memset(name, 'n', LORASYNC_MAX_NAME);
    x->have[1].name = name;
}
static void spoil_twice(declared *x, int rank)
{
    if (rank == 1) x->have[1] = x->have[0], x->have[1].dtype = LORASYNC_BF16;
}
static void spoil_negative_shape(declared *x, int rank)
{
    if (rank == 1) x->have[0].shape[0] = -6;
}
static void spoil_huge_shape(declared *x, int rank)
{
    if (rank == 1) x->have[0].shape[0] = x->have[0].shape[1] = INT64_MAX;
}
static void spoil_huge_bytes(declared *x, int rank)
{
    if (rank == 1) x->have[0].shape[0] = INT64_MAX / 4;
}
static void spoil_many_dims(declared *x, int rank)
{
    if (rank == 1) x->have[0].ndim = 9;
}
static void spoil_scale_int(declared *x, int rank)
{
    if (rank == 2) x->have[2].scale = 2;
}
static void spoil_scale_block(declared *x, int rank)
{
    if (rank == 2) x->have[2].dtype = LORASYNC_F8_E8M0, x->have[2].scale = 2;
}
static void spoil_scale_nan(declared *x, int rank)
{
    if (rank == 2) x->have[0].scale = (double)NAN;
}
static void spoil_scale_inf(declared *x, int rank)
{
    if (rank == 2) x->have[0].scale = (double)INFINITY;
}
static void spoil_list(declared *x, int rank)
{
    if (rank == 1) x->d.have = NULL;
}
static void spoil_gather_want(declared *x, int rank)
{
    if (rank == 1)
        x->d.want = x->want, x->d.num_want = 1, x->want[0] = whole_piece("A", LORASYNC_F32, 2, ROWS, COLS, x->out);
}
static void spoil_flat_stride(declared *x, int rank)
{
    if (rank == 1) x->have[0].box = lorasync_flat(8, 8), x->have[0].stride[1] = 1;
}
static void spoil_held_stride(declared *x, int rank)
{
    if (rank == 1) x->have[0].stride[0] = COLS; /* the other one was forgotten */
}
static void spoil_held_stride_of_two(declared *x, int rank)
{
    if (rank == 1) x->have[0].stride[1] = 1;
}
static void spoil_scale_tiny(declared *x, int rank)
{
    if (rank == 2) x->have[0].scale = 1e-46;
}
static void spoil_scale_large(declared *x, int rank)
{
    if (rank == 2) x->have[0].scale = -3.5e38;
}
static void spoil_empty(declared *x, int rank)
{
    (void)rank;
    x->d.num_have = 0;
}
static void spoil_scalar_twice(declared *x, int rank)
{
    if (rank == 2) x->have[2].box = lorasync_none(0);
}
static void spoil_bucket(declared *x, int rank)
{
    if (rank == 1) x->d.bucket_bytes = 12345;
}
static void spoil_adapter(declared *x, int rank)
{
    if (rank == 1) x->d.adapter = "other";
}
static void spoil_name_text(declared *x, int rank)
{
    (void)rank;
    x->have[0].name = "\xff";
}
static void spoil_scatter_have(declared *x, int rank)
{
    x->d.kind = LORASYNC_SCATTER;
    (void)rank;
}
static void spoil_scatter_image(declared *x, int rank)
{
    x->d.kind     = LORASYNC_SCATTER;
    x->d.num_have = 0;
    (void)rank;
}
static void spoil_wanted_by_none(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0].name = "nobody.has.it";
}
static void spoil_wanted_gap(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->d.num_have = 0;
}
static void spoil_wanted_dtype(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0].dtype = LORASYNC_I32;
}
static void spoil_wanted_block(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0].dtype = LORASYNC_F8_E8M0;
}
static void spoil_wanted_shape(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0] = whole_piece("A", LORASYNC_F32, 2, COLS, ROWS, x->out);
}
static void spoil_wanted_stride(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0].stride[1] = 1;
}
static void spoil_wanted_scale(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0].scale = 2;
}
static void spoil_wanted_null(declared *x, int rank)
{
    want_all(x);
    if (rank == 1) x->want[0].data = NULL;
}

static const wrong_case wrong[] = {
    {spoil_gap, LORASYNC_E_LAYOUT, {"A", "[3:4, 0:4]", "[6, 4]"}},
    {spoil_overlap, LORASYNC_E_LAYOUT, {"A", "rank 1 holds [2:5, 0:4]", "rank 2 holds [4:6, 0:4]"}},
    {spoil_overlap_column, LORASYNC_E_LAYOUT, {"B", "rank 0 holds [0:4, 0:2]", "rank 1 holds [0:4, 1:3]"}},
    {spoil_shape, LORASYNC_E_DISAGREE, {"A", "[6, 4] on rank 0", "[7, 4] on rank 2"}},
    {spoil_ndim, LORASYNC_E_DISAGREE, {"A", "[6, 4] on rank 0", "[6, 4, 1] on rank 2"}},
    {spoil_dtype, LORASYNC_E_DISAGREE, {"B", "BF16 on rank 0", "F16 on rank 1"}},
    {spoil_missing, LORASYNC_E_LAYOUT, {"B", "[0:4, 2:4]", ""}},
    {spoil_missing_all, LORASYNC_E_LAYOUT, {"[0:", "held by no rank", ""}},
    {spoil_root, LORASYNC_E_DISAGREE, {"root", "rank 0", "rank 1"}},
    {spoil_root_range, LORASYNC_E_ARGUMENT, {"root is 3", "0 to 2", ""}},
    {spoil_root_negative, LORASYNC_E_ARGUMENT, {"root is -1", "0 to 2", ""}},
    {spoil_kind, LORASYNC_E_DISAGREE, {"kind", "rank 0", "rank 2"}},
    {spoil_kind_unknown, LORASYNC_E_ARGUMENT, {"plan kind 9", "", ""}},
    {spoil_wire, LORASYNC_E_DISAGREE, {"wire_dtype", "rank 0", "rank 2"}},
    {spoil_wire_type, LORASYNC_E_UNSUPPORTED, {"wire_dtype I32", "", ""}},
    {spoil_wire_block,
     LORASYNC_E_UNSUPPORTED,
     {"wire_dtype F8_E8M0 is not one of F32, F16, BF16, F8_E4M3, F8_E5M2", "", ""}},
    {spoil_wire_unknown, LORASYNC_E_UNSUPPORTED, {"wire_dtype", "", ""}},
    {spoil_nan, LORASYNC_E_DISAGREE, {"allow_nan", "rank 0", "rank 2"}},
    {spoil_two, LORASYNC_E_ARGUMENT, {"rank 1: A: ndim is 10", "", ""}}, /* the lowest failing rank is heard */
    {spoil_bounds, LORASYNC_E_LAYOUT, {"rank 2", "A: box [5:7, 0:4]", "[6, 4]"}},
    {spoil_bounds_huge, LORASYNC_E_LAYOUT, {"rank 2", "A: box", "[6, 4]"}},
    {spoil_negative_off, LORASYNC_E_LAYOUT, {"rank 2", "A: box [-1:1, 0:4]", ""}},
    {spoil_flat_bounds, LORASYNC_E_LAYOUT, {"rank 2", "A: flat interval [20:25]", "[6, 4]"}},
    {spoil_box_ndim, LORASYNC_E_LAYOUT, {"rank 2", "A: the box has 1 dimensions, the tensor 2", ""}},
    {spoil_impossible, LORASYNC_E_LAYOUT, {"rank 0", "A: the box is impossible", ""}},
    {spoil_null, LORASYNC_E_ARGUMENT, {"rank 2", "B: data is NULL", ""}},
    {spoil_packed, LORASYNC_E_UNSUPPORTED, {"rank 2", "B: F4", "U8"}},
    {spoil_no_dtype, LORASYNC_E_ARGUMENT, {"rank 2", "B: dtype 0", ""}},
    {spoil_no_name, LORASYNC_E_ARGUMENT, {"rank 2", "no name", ""}},
    {spoil_empty_name, LORASYNC_E_ARGUMENT, {"rank 2", "no name", ""}},
    {spoil_long_name, LORASYNC_E_NAME, {"rank 2", "nnnn", "511 bytes"}},
    {spoil_twice, LORASYNC_E_DISAGREE, {"rank 1", "A", "two pieces"}},
    {spoil_negative_shape, LORASYNC_E_ARGUMENT, {"rank 1", "A: shape [-6, 4]", ""}},
    {spoil_huge_shape, LORASYNC_E_ARGUMENT, {"rank 1", "A: shape", "2^63"}},
    {spoil_huge_bytes, LORASYNC_E_ARGUMENT, {"rank 1", "A", "2^63"}},
    {spoil_many_dims, LORASYNC_E_ARGUMENT, {"rank 1", "A: ndim is 9", "0 to 8"}},
    {spoil_scale_int, LORASYNC_E_UNSUPPORTED, {"rank 2", "c: I64", "scale"}},
    {spoil_scale_block, LORASYNC_E_UNSUPPORTED, {"rank 2", "c: F8_E8M0 cannot be scaled, only F32", ""}},
    {spoil_scale_nan, LORASYNC_E_ARGUMENT, {"rank 2", "A: scale", ""}},
    {spoil_scale_inf, LORASYNC_E_ARGUMENT, {"rank 2", "A: scale is not a finite number", ""}},
    {spoil_list, LORASYNC_E_ARGUMENT, {"rank 1", "list is NULL", ""}},
    {spoil_gather_want, LORASYNC_E_ARGUMENT, {"rank 1", "wanted", ""}},
    {spoil_flat_stride, LORASYNC_E_ARGUMENT, {"rank 1", "A: a flat interval has no strides", ""}},
    {spoil_held_stride,
     LORASYNC_E_ARGUMENT,
     {"rank 1", "A: stride 0 along dimension 1, of length 4", "give all of them"}},
    {spoil_held_stride_of_two,
     LORASYNC_E_ARGUMENT,
     {"rank 1", "A: stride 0 along dimension 0, of length 2", "give all of them"}},
    {spoil_scale_tiny, LORASYNC_E_ARGUMENT, {"rank 2", "A: scale 1e-46 is 0 as F32", ""}},
    {spoil_scale_large, LORASYNC_E_ARGUMENT, {"rank 2", "A: scale -3.5e+38 is Inf as F32", ""}},
    {spoil_empty, LORASYNC_E_EMPTY, {"no rank declares a tensor", "", ""}},
    {spoil_scalar_twice, LORASYNC_E_LAYOUT, {"c", "held by no rank", ""}},
    {spoil_bucket, LORASYNC_E_DISAGREE, {"bucket_bytes", "rank 1", ""}},
    {spoil_adapter, LORASYNC_E_DISAGREE, {"adapter", "rank 1", ""}},
    {spoil_name_text, LORASYNC_E_NAME, {"UTF-8", "", ""}},
    {spoil_scatter_have, LORASYNC_E_ARGUMENT, {"scatter takes no held pieces", "", ""}},
    {spoil_scatter_image, LORASYNC_E_ARGUMENT, {"rank 0", "no desc.image", ""}},
    {spoil_wanted_by_none, LORASYNC_E_NOT_FOUND, {"nobody.has.it", "wanted by rank 1", "held by no rank"}},
    {spoil_wanted_gap, LORASYNC_E_LAYOUT, {"A", "[2:4, 0:4]", "wants them"}},
    {spoil_wanted_dtype, LORASYNC_E_UNSUPPORTED, {"A", "held as F32", "I32 by rank 1"}},
    {spoil_wanted_block,
     LORASYNC_E_UNSUPPORTED,
     {"A: is held as F32 and wanted as F8_E8M0 by rank 1", "only F32, F16", "and into them F8_E8M0"}},
    {spoil_wanted_shape, LORASYNC_E_DISAGREE, {"A", "[6, 4] on rank 0", "[4, 6] on rank 1"}},
    {spoil_wanted_stride, LORASYNC_E_ARGUMENT, {"rank 1", "A: stride 0 along dimension 0", ""}},
    {spoil_wanted_scale, LORASYNC_E_UNSUPPORTED, {"rank 1", "A: a wanted piece cannot be scaled", "piece.scale 0"}},
    {spoil_wanted_null, LORASYNC_E_ARGUMENT, {"rank 1", "A: data is NULL", ""}},
};

typedef struct verdicts {
    const wrong_case *wrong;
    lorasync_status   status[WORLD];
    char              text[WORLD][512];
    long              live[WORLD];
    int               no_direct, retry_failed[WORLD];
} verdicts;

/* A wrong plan, and then, over the same communicator, a right one beside a right one that was there before. */
static void wrong_rank(rank_context *c)
{
    verdicts      *v = (verdicts *)c->user;
    declared       x, before;
    lorasync_plan *plan = (lorasync_plan *)&plan, *good;
    lorasync_error err;
    int            i;
    declare_rank(&before, &c->comm, c->rank);
    before.d.no_direct = v->no_direct;
    if (lorasync_plan_create(&before.d, &good, &err) < 0) test_fail(__FILE__, __LINE__, err.text);
    declare_rank(&x, &c->comm, c->rank);
    x.d.no_direct = v->no_direct;
    v->wrong->spoil(&x, c->rank);
    memset(&err, 0, sizeof err);
    v->status[c->rank] = lorasync_plan_create(&x.d, &plan, &err);
    snprintf(v->text[c->rank], sizeof v->text[0], "%s", err.text);
    if (plan) v->retry_failed[c->rank]++;
    if (err.status != v->status[c->rank]) v->retry_failed[c->rank]++;
    v->live[c->rank] = x.memory.live;
    for (i = 0; i < 2; i++) { /* the one before still runs, and the mended call works */
        lorasync_status s = lorasync_plan_begin(good, &err);
        if (s == LORASYNC_OK) s = lorasync_plan_wait(good, &err);
        if (s < 0 || (c->rank == 0 && !lorasync_plan_image(good))) v->retry_failed[c->rank]++;
        lorasync_plan_free(good);
        good = NULL;
        if (i == 0) declare_rank(&x, &c->comm, c->rank);
        x.d.no_direct = v->no_direct;
        if (i == 0 && lorasync_plan_create(&x.d, &good, &err) < 0) v->retry_failed[c->rank]++;
        if (!good) break;
    }
    v->live[c->rank] += x.memory.live + before.memory.live;
}

static void wrong_declarations(void)
{
    static verdicts v;
    size_t          i;
    int             r, w;
    for (i = 0; i < 2 * sizeof wrong / sizeof wrong[0]; i++) {
        memset(&v, 0, sizeof v);
        v.wrong     = &wrong[i / 2];
        v.no_direct = (int)(i % 2);
        run_threads(WORLD, wrong_rank, &v);
        for (r = 0; r < WORLD; r++) {
            if (v.status[r] != v.wrong->status) fprintf(stderr, "case %d rank %d: %s\n", (int)i / 2, r, v.text[r]);
            CHECK_EQ(v.status[r], v.wrong->status);
            CHECK_TEXT(v.text[r], v.text[0]);
            for (w = 0; w < 3; w++) CHECK_HAS(v.text[r], v.wrong->words[w]);
            CHECK_EQ(v.live[r], 0);
            CHECK_EQ(v.retry_failed[r], 0);
        }
    }
}

/* Host memory may begin at any byte: row by row and transposed, copied and converted. */
static void any_alignment(void)
{
    static const lorasync_dtype wires[] = {LORASYNC_F32, LORASYNC_BF16, LORASYNC_F64};
    double                      memory[ROWS * COLS + 1];
    char                       *bytes = (char *)memory + 1;
    lorasync_piece              p;
    lorasync_plan_desc          d;
    lorasync_plan              *plan;
    lorasync_error              err;
    int                         k, transposed, i;
    for (k = 0; k < 3; k++)
        for (transposed = 0; transposed < 2; transposed++) {
            size_t      item = k == 2 ? 8 : 4;
            const char *found;
            p = whole_piece("A", k == 2 ? LORASYNC_F64 : LORASYNC_F32, 2, ROWS, COLS, bytes);
            if (transposed) p.stride[0] = 1, p.stride[1] = ROWS;
            for (i = 0; i < ROWS * COLS; i++) {
                double wide   = i;
                float  narrow = (float)i;
                int    at     = transposed ? i % COLS * ROWS + i / COLS : i;
                memcpy(bytes + (size_t)at * item, k == 2 ? (void *)&wide : (void *)&narrow, item);
            }
            memset(&d, 0, sizeof d);
            d.have = &p, d.num_have = 1, d.wire_dtype = k == 2 ? LORASYNC_DTYPE_NONE : wires[k];
            REQUIRE(lorasync_plan_create(&d, &plan, &err) == LORASYNC_OK);
            CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
            CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_OK);
            found = (const char *)lorasync_plan_image(plan)->payload;
            for (i = 0; i < ROWS * COLS; i++) {
                float  value = -1;
                double wide;
                if (k == 2) memcpy(&wide, found + i * 8, 8), value = (float)wide;
                else
                    lorasync_convert(&value, LORASYNC_F32, found + i * lorasync_dtype_bits(wires[k]) / 8, wires[k], 1,
                                     &err);
                CHECK_EQ(value, i);
            }
            lorasync_plan_free(plan);
        }
}

/* Bad arguments that a call finds without the others. */
static void bad_calls(void)
{
    declared       x;
    lorasync_plan *plan = (lorasync_plan *)&plan;
    lorasync_error err;
    lorasync_comm  c = lorasync_solo();
    declare_rank(&x, NULL, 0);
    CHECK_EQ(lorasync_plan_create(NULL, &plan, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_plan_create(&x.d, NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_plan_create(NULL, NULL, NULL), LORASYNC_E_ARGUMENT);
    c.all_gather = NULL, x.d.comm = &c;
    CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_E_ARGUMENT);
    CHECK(plan == NULL);
    c = lorasync_solo(), c.rank = 1;
    CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_E_ARGUMENT);
    x.d.comm = NULL, x.allocator.free = NULL;
    CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "both");
    CHECK_EQ(lorasync_plan_begin(NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK_EQ(lorasync_plan_wait(NULL, &err), LORASYNC_E_ARGUMENT);
    CHECK(lorasync_plan_image(NULL) == NULL);
    lorasync_plan_free(NULL);
    declare_rank(&x, NULL, 0); /* solo: whole tensors */
    x.have[0].box = lorasync_whole(x.have[0].shape, 2), x.d.num_have = 1;
    REQUIRE(lorasync_plan_create(&x.d, &plan, NULL) == LORASYNC_OK);
    CHECK(lorasync_plan_image(plan) == NULL);
    CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_E_STATE);
    CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_OK);
    CHECK(lorasync_plan_image(plan) != NULL);
    CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_E_STATE);
    CHECK(lorasync_plan_image(plan) == NULL);
    lorasync_plan_free(plan);
    CHECK_EQ(x.memory.live, 0);
}

/* A comm filled by somebody who knows no `abort`: what lies behind is not looked at. */
static lorasync_status broken_gather(void *user, const void *in, void *out, size_t num_bytes, int timeout_ms,
                                     lorasync_error *err)
{
    (void)user, (void)in, (void)out, (void)num_bytes, (void)timeout_ms;
    err->status = LORASYNC_E_TIMEOUT;
    snprintf(err->text, sizeof err->text, "the wire is cut");
    return LORASYNC_E_TIMEOUT;
}

static int  num_aborts;
static void count_abort(void *user, const char *why) { num_aborts += user == NULL && why[0] != 0; }

static void lost_at_once(void)
{
    declared       x;
    lorasync_plan *plan;
    lorasync_error err;
    int            with;
    for (with = 0; with < 2; with++) {
        lorasync_comm c = lorasync_solo();
        c.world = 2, c.all_gather = broken_gather, c.abort = count_abort;
        if (!with) c.size = offsetof(lorasync_comm, abort);
        num_aborts = 0;
        declare_rank(&x, &c, 0);
        CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_E_TIMEOUT);
        CHECK_TEXT(err.text, "the wire is cut");
        CHECK_EQ(num_aborts, with);
        CHECK_EQ(x.memory.live, 0);
        x.memory.fail_at = 1, num_aborts = 0; /* not even memory for the plan */
        CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_E_TIMEOUT);
        CHECK_EQ(num_aborts, with);
        c.world = 100, x.memory.fail_at = 1, num_aborts = 0; /* ... and too many ranks to vote from the stack */
        CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_E_MEMORY);
        CHECK_EQ(num_aborts, with);
        CHECK_EQ(x.memory.live, 0);
    }
}

/* -- replicas, and a run that one rank does not begin */

static int odd_failed[WORLD];

static lorasync_status run_once(lorasync_plan *plan, lorasync_error *err)
{
    lorasync_plan_begin(plan, err);
    return lorasync_plan_wait(plan, err);
}

static void odd_rank(rank_context *c)
{
    int no_direct, kind;
    for (no_direct = 0; no_direct < 2; no_direct++)
        for (kind = 0; kind < 2; kind++) {
            declared       x;
            lorasync_plan *plan;
            lorasync_error err;
            int            i;
            declare_rank(&x, &c->comm, c->rank);
            x.have[0].box = lorasync_whole(x.have[0].shape, 2); /* a replica everywhere */
            x.d.no_direct = no_direct;
            x.d.kind      = kind ? LORASYNC_GATHER_ALL : LORASYNC_GATHER;
            for (i = 0; i < ROWS * COLS; i++) x.a[i] = (float)i;
            if (lorasync_plan_create(&x.d, &plan, &err) < 0) {
                odd_failed[c->rank] += 100;
                return;
            }
            for (i = 0; i < 9; i++) {
                int             skips = i == 1 + c->rank || (i == 6 && c->rank != 1);
                lorasync_status want  = i == 1 || i == 2 || i == 3 || i == 6 ? LORASYNC_E_STATE : LORASYNC_OK;
                if (!skips) lorasync_plan_begin(plan, &err);
                if (lorasync_plan_wait(plan, &err) != want) odd_failed[c->rank]++;
                if (want < 0 && !strstr(err.text, "without begin")) odd_failed[c->rank]++;
                if (want == LORASYNC_OK && (c->rank == 0 || kind)) {
                    const lorasync_image *image = lorasync_plan_image(plan);
                    if (!image || lorasync_image_digest(image, NULL) != image->digest) odd_failed[c->rank] += 10;
                }
                if (kind) c->comm.all_gather(c->comm.user, "x", err.text, 1, 10000, &err); /* everybody has looked */
            }
            lorasync_plan_free(plan);
            if (x.memory.live) odd_failed[c->rank]++;
        }
}

static void run_without_begin(void)
{
    int r;
    memset(odd_failed, 0, sizeof odd_failed);
    run_threads(WORLD, odd_rank, NULL);
    for (r = 0; r < WORLD; r++) CHECK_EQ(odd_failed[r], 0);
}

/* -- NaN */

typedef struct nan_case {
    lorasync_dtype dtype, wire;
    uint32_t       bits; /* the value of one element */
    int            refused;
} nan_case;

static const nan_case nans[] = {
    {LORASYNC_F32, LORASYNC_DTYPE_NONE, 0x7fc00000u, 1}, {LORASYNC_F32, LORASYNC_DTYPE_NONE, 0xff800000u, 1},
    {LORASYNC_F32, LORASYNC_DTYPE_NONE, 0x7f800001u, 1}, {LORASYNC_F32, LORASYNC_DTYPE_NONE, 0x7f7fffffu, 0},
    {LORASYNC_F32, LORASYNC_BF16, 0x7fc00000u, 1},       {LORASYNC_F32, LORASYNC_BF16, 0x7f800001u, 1},
    {LORASYNC_F32, LORASYNC_BF16, 0x7f7fffffu, 1},       {LORASYNC_F32, LORASYNC_F16, 0x477ff000u, 1},
    {LORASYNC_F32, LORASYNC_F16, 0x477fefffu, 0},        {LORASYNC_F32, LORASYNC_F16, 0xff800000u, 1},
    {LORASYNC_F16, LORASYNC_DTYPE_NONE, 0x7c00u, 1},     {LORASYNC_F16, LORASYNC_DTYPE_NONE, 0xfc01u, 1},
    {LORASYNC_F16, LORASYNC_DTYPE_NONE, 0x7bffu, 0},     {LORASYNC_BF16, LORASYNC_DTYPE_NONE, 0x7f80u, 1},
    {LORASYNC_BF16, LORASYNC_DTYPE_NONE, 0xffc1u, 1},    {LORASYNC_BF16, LORASYNC_DTYPE_NONE, 0x7f7fu, 0},
    {LORASYNC_BF16, LORASYNC_F16, 0x7f7fu, 1},           {LORASYNC_F8_E5M2, LORASYNC_DTYPE_NONE, 0x7cu, 1},
    {LORASYNC_F8_E5M2, LORASYNC_DTYPE_NONE, 0xffu, 1},   {LORASYNC_F8_E5M2, LORASYNC_DTYPE_NONE, 0x7bu, 0},
    {LORASYNC_F8_E4M3, LORASYNC_DTYPE_NONE, 0x7fu, 1},   {LORASYNC_F8_E4M3, LORASYNC_DTYPE_NONE, 0xffu, 1},
    {LORASYNC_F8_E4M3, LORASYNC_DTYPE_NONE, 0x7eu, 0},   {LORASYNC_F32, LORASYNC_F8_E4M3, 0x43e80001u, 1},
    {LORASYNC_F32, LORASYNC_F8_E4M3, 0x43e00000u, 0},    {LORASYNC_F32, LORASYNC_F8_E5M2, 0x47700000u, 1},
    {LORASYNC_F8_E8M0, LORASYNC_DTYPE_NONE, 0xffu, 1},   {LORASYNC_F8_E8M0, LORASYNC_BF16, 0xffu, 1},
    {LORASYNC_F8_E8M0, LORASYNC_DTYPE_NONE, 0xfeu, 0},   {LORASYNC_F8_E8M0, LORASYNC_DTYPE_NONE, 0x7fu, 0},
    {LORASYNC_F32, LORASYNC_F8_E5M2, 0x476fffffu, 0},    {LORASYNC_I32, LORASYNC_DTYPE_NONE, 0x7fc00000u, 0},
};

typedef struct nan_user {
    const nan_case *c;
    int             allow, no_direct, world, failed[WORLD];
    char            text[WORLD][512];
} nan_user;

static void nan_rank(rank_context *x)
{
    nan_user          *u = (nan_user *)x->user;
    unsigned char      data[7 * 100 * 4], seen[WORLD];
    lorasync_piece     p;
    lorasync_plan_desc d;
    lorasync_plan     *plan;
    lorasync_error     err;
    size_t             item = (size_t)lorasync_dtype_bits(u->c->dtype) / 8;
    lorasync_status    s;
    int                refused = u->c->refused && !u->allow, round, last = x->world - 1;
    memset(&d, 0, sizeof d), memset(data, 0, sizeof data), memset(&p, 0, sizeof p);
    p.name = "the.tensor", p.dtype = u->c->dtype, p.ndim = 2, p.shape[0] = 7, p.shape[1] = 100, p.data = data;
    p.box  = lorasync_shard(lorasync_whole(p.shape, 2), 0, x->rank, x->world);
    d.comm = &x->comm, d.have = &p, d.num_have = 1, d.wire_dtype = u->c->wire, d.allow_nan = u->allow,
    d.no_direct = u->no_direct, d.timeout_ms = test_ms(10000);
    if (lorasync_plan_create(&d, &plan, &err) < 0) {
        u->failed[x->rank] = 1;
        return;
    }
    for (round = 0; round < 4; round++) { /* good, bad, good, bad */
        if (round % 2 && x->rank == last) /* [6, 97] */
            memcpy(data + ((size_t)p.box.len[0] * 100 - 3) * item, &u->c->bits, item);
        else memset(data, 0, sizeof data);
        s = lorasync_plan_begin(plan, &err);
        if (s != (refused && round % 2 && x->rank == last ? LORASYNC_E_NAN : LORASYNC_OK)) u->failed[x->rank] |= 2;
        memset(&err, 0, sizeof err);
        s = lorasync_plan_wait(plan, &err);
        if (s != (refused && round % 2 ? LORASYNC_E_NAN : LORASYNC_OK)) u->failed[x->rank] |= 4;
        if (s < 0) snprintf(u->text[x->rank], sizeof u->text[0], "%s", err.text);
        if ((lorasync_plan_image(plan) != NULL) != (x->rank == 0 && s == LORASYNC_OK)) u->failed[x->rank] |= 8;
        if (s == LORASYNC_OK && x->rank == 0) {
            const lorasync_image *image = lorasync_plan_image(plan);
            if (lorasync_image_digest(image, NULL) != image->digest) u->failed[0] |= 16;
        }
        x->comm.all_gather(x->comm.user, "x", seen, 1, 10000, &err); /* the root has looked: the next begin may write */
    }
    lorasync_plan_free(plan);
}

static void nan_and_inf(void)
{
    static nan_user u;
    size_t          i;
    int             k, r;
    for (i = 0; i < sizeof nans / sizeof nans[0]; i++)
        for (k = 0; k < 8; k++) {
            memset(&u, 0, sizeof u);
            u.c = &nans[i], u.allow = k & 1, u.no_direct = (k >> 1) & 1, u.world = k & 4 ? 1 : WORLD;
            run_threads(u.world, nan_rank, &u);
            for (r = 0; r < u.world; r++) {
                if (u.failed[r]) fprintf(stderr, "nan case %d, variant %d, rank %d: %s\n", (int)i, k, r, u.text[r]);
                CHECK_EQ(u.failed[r], 0);
                if (!u.c->refused || u.allow) continue;
                CHECK_HAS(u.text[r], "the.tensor: NaN or Inf at element [6, 97]");
                if (u.world > 1) CHECK_HAS(u.text[r], "rank 2: ");
            }
        }
}

/* -- memory that is not there: the nth allocation of one rank fails, for every n */

typedef struct memory_user {
    int             kind, no_direct, victim;
    long            nth;
    lorasync_status status[WORLD];
    long            live[WORLD], in_run[WORLD], total[WORLD];
    uint64_t        ns[WORLD];
} memory_user;

static lorasync_image *scatter_image(declared *x)
{
    static float        payload[ROWS * COLS];
    lorasync_tensor     t;
    lorasync_image_desc d;
    lorasync_image     *image;
    memset(&t, 0, sizeof t), memset(&d, 0, sizeof d);
    t.name = "A", t.dtype = LORASYNC_F32, t.ndim = 2, t.shape[0] = ROWS, t.shape[1] = COLS;
    d.tensors = &t, d.num_tensors = 1;
    if (lorasync_image_layout(&d, NULL, &image, NULL) < 0) return NULL;
    lorasync_image_bind(image, payload);
    x->d.image = image;
    return image;
}

static void memory_rank(rank_context *c)
{
    memory_user    *u = (memory_user *)c->user;
    declared        x;
    lorasync_plan  *plan  = NULL;
    lorasync_image *image = NULL;
    lorasync_error  err;
    lorasync_status s;
    uint64_t        start;
    declare_rank(&x, &c->comm, c->rank);
    x.d.kind = (lorasync_plan_kind)u->kind, x.d.no_direct = u->no_direct;
    if (u->kind == LORASYNC_RESHARD || u->kind == LORASYNC_SCATTER)
        want_all(&x), x.d.kind = (lorasync_plan_kind)u->kind;
    if (u->kind == LORASYNC_SCATTER) x.d.num_have = 0;
    if (u->kind == LORASYNC_SCATTER && c->rank == 0) image = scatter_image(&x);
    if (c->rank == u->victim) x.memory.fail_at = u->nth;
    start             = test_now_ns();
    s                 = lorasync_plan_create(&x.d, &plan, &err);
    u->ns[c->rank]    = test_now_ns() - start;
    u->total[c->rank] = x.memory.total;
    if (s == LORASYNC_OK) { /* nothing is allocated from here on */
        int i;
        for (i = 0; i < 2 && s == LORASYNC_OK; i++) s = run_once(plan, &err);
        u->in_run[c->rank] = x.memory.total - u->total[c->rank];
    }
    u->status[c->rank] = s;
    lorasync_plan_free(plan);
    u->live[c->rank] = x.memory.live;
    lorasync_image_free(image);
}

static int shared_memory_left(void)
{
    DIR           *dir = opendir("/dev/shm");
    struct dirent *e;
    int            n = 0;
    char           mine[64];
    snprintf(mine, sizeof mine, "lorasync-%ld-", (long)getpid());
    while (dir && (e = readdir(dir)) != NULL) n += strncmp(e->d_name, mine, strlen(mine)) == 0;
    if (dir) closedir(dir);
    return n;
}

/* Arguments that are wrong on one rank only are everybody's error, at once. */
static void refused_rank(rank_context *c)
{
    float              data[4] = {0};
    lorasync_plan_desc d;
    lorasync_piece     p;
    lorasync_allocator half;
    lorasync_plan     *plan = NULL;
    lorasync_error     err;
    int                what;
    memset(&d, 0, sizeof d), memset(&p, 0, sizeof p), memset(&half, 0, sizeof half);
    p.name = "t", p.dtype = LORASYNC_F32, p.ndim = 1, p.shape[0] = 4, p.box = lorasync_whole(p.shape, 1), p.data = data;
    d.comm = &c->comm, d.have = &p, d.num_have = 1, d.timeout_ms = test_ms(20000);
    for (what = 0; what < 4; what++) {
        static const char *const texts[] = {"rank 1: lorasync_plan_create: out is NULL",
                                            "rank 1: allocator: alloc is NULL; give both alloc and free, or neither",
                                            "rank 1: timeout_ms is -1, must not be negative",
                                            "rank 1: lorasync_plan_create: the desc has "};
        struct {
            lorasync_plan_desc d;
            size_t             later; /* a field of a newer header */
        } newer;
        half.free    = test_memory_free;
        d.allocator  = what == 1 && c->rank == 1 ? &half : NULL;
        d.timeout_ms = what == 2 && c->rank == 1 ? -1 : test_ms(20000);
        newer.d = d, newer.later = what == 3 && c->rank == 1;
        newer.d.size = sizeof newer;
        CHECK_EQ(lorasync_plan_create(&newer.d, !what && c->rank == 1 ? NULL : &plan, &err), LORASYNC_E_ARGUMENT);
        CHECK_HAS(err.text, texts[what]);
    }
    d.allocator = NULL, d.timeout_ms = test_ms(20000);
    CHECK_EQ(lorasync_plan_create(&d, &plan, &err), LORASYNC_OK);
    lorasync_plan_free(plan);
}

static void one_rank_is_wrong(void) { run_threads(3, refused_rank, NULL); }

/* Rank 1 votes, returns and is gone while rank 0, which has not seen the vote, asks for its health: the vote counts. */
static int vote_asked, vote_done;

static lorasync_status late_check(void *user, lorasync_error *err)
{
    (void)user;
    __atomic_store_n(&vote_asked, 1, __ATOMIC_RELEASE);
    while (!__atomic_load_n(&vote_done, __ATOMIC_ACQUIRE)) sched_yield();
    snprintf(err->text, sizeof err->text, "rank 1 is gone");
    return err->status = LORASYNC_E_PEER;
}

static void late_vote_rank(rank_context *c)
{
    float               data[4] = {0};
    lorasync_plan_desc  d;
    lorasync_piece      p;
    lorasync_plan      *plan = NULL;
    lorasync_plan_stats stats;
    lorasync_error      err;
    memset(&d, 0, sizeof d), memset(&p, 0, sizeof p);
    p.name = "t", p.dtype = LORASYNC_F32, p.ndim = 1, p.shape[0] = 4, p.box = lorasync_whole(p.shape, 1), p.data = data;
    d.comm = &c->comm, d.have = &p, d.num_have = 1, d.timeout_ms = test_ms(20000);
    if (c->rank == 0) c->comm.check = late_check;
    REQUIRE(lorasync_plan_create(&d, &plan, &err) == LORASYNC_OK);
    lorasync_plan_get_stats(plan, &stats);
    CHECK(stats.direct);
    CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
    while (c->rank == 1 && !__atomic_load_n(&vote_asked, __ATOMIC_ACQUIRE)) sched_yield();
    CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_OK);
    if (c->rank == 1) __atomic_store_n(&vote_done, 1, __ATOMIC_RELEASE);
    lorasync_plan_free(plan);
}

static void late_vote_counts(void) { run_threads(2, late_vote_rank, NULL); }

static void no_memory(void)
{
    static memory_user u;
    int                kind, no_direct, victim, r, done;
    long               nth, tried = 0;
    for (kind = 0; kind < 4; kind++)
        for (no_direct = 0; no_direct < (kind < 2 ? 2 : 1); no_direct++)
            for (victim = 0; victim < 2; victim++)
                for (nth = 1, done = 0; !done && nth < 1000; nth++, tried++) {
                    memset(&u, 0, sizeof u);
                    u.kind = kind, u.no_direct = no_direct, u.victim = victim, u.nth = nth;
                    run_threads(WORLD, memory_rank, &u);
                    for (r = 0; r < WORLD; r++) {
                        CHECK_EQ(u.status[r], u.status[0]);
                        CHECK(u.status[r] == LORASYNC_OK || u.status[r] == LORASYNC_E_MEMORY);
                        CHECK_EQ(u.live[r], 0);
                        CHECK_EQ(u.in_run[r], 0);
                        CHECK(u.ns[r] < (uint64_t)test_no_hang_ns() / 5);
                    }
                    done = u.status[0] == LORASYNC_OK && u.total[victim] < nth;
                }
    printf("     %ld failing allocations\n", tried);
    CHECK_EQ(shared_memory_left(), 0);
}

/* -- ranks that die between begin and wait */

static int die_direct, die_by_kill;

typedef struct death {
    int      direct[WORLD], first[WORLD], second[WORLD], third[WORLD];
    uint64_t ns[WORLD];
    char     text[WORLD][256];
} death;

static death *deaths;

static void dying_rank(rank_context *c)
{
    declared            x;
    lorasync_plan      *plan;
    lorasync_error      err;
    lorasync_plan_stats stats;
    uint64_t            start;
    declare_rank(&x, &c->comm, c->rank);
    x.d.no_direct  = !die_direct;
    x.d.timeout_ms = test_ms(die_by_kill ? 10000 : 300);
    if (lorasync_plan_create(&x.d, &plan, &err) < 0) return;
    lorasync_plan_get_stats(plan, &stats);
    deaths->direct[c->rank] = stats.direct;
    run_once(plan, &err);
    lorasync_plan_begin(plan, &err);
    if (c->rank == 1) {
        if (die_by_kill) kill(getpid(), SIGKILL);
        lorasync_plan_free(plan);
        return;
    }
    start                  = test_now_ns();
    deaths->first[c->rank] = (int)lorasync_plan_wait(plan, &err);
    deaths->ns[c->rank]    = test_now_ns() - start;
    snprintf(deaths->text[c->rank], sizeof deaths->text[0], "%.255s", err.text);
    deaths->second[c->rank] = (int)lorasync_plan_begin(plan, &err);
    deaths->third[c->rank]  = (int)lorasync_plan_wait(plan, &err);
    if (lorasync_plan_image(plan)) deaths->third[c->rank] = 0;
    lorasync_plan_free(plan);
}

static void rank_dies(void)
{
    void *p = mmap(NULL, sizeof *deaths, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int   k, r;
    REQUIRE(p != MAP_FAILED);
    deaths = (death *)p;
    for (k = 0; k < 4; k++) {
        memset(deaths, 0, sizeof *deaths);
        die_direct = k & 1, die_by_kill = k >> 1;
        if (die_by_kill) CHECK_EQ(run_processes(WORLD, dying_rank, NULL), 1); /* the killed one */
        else run_threads(WORLD, dying_rank, NULL);
        for (r = 0; r < WORLD; r++) {
            CHECK_EQ(deaths->direct[r], die_direct);
            if (r == 1) continue;
            CHECK(lorasync_is_lost((lorasync_status)deaths->first[r]));
            CHECK(deaths->ns[r] < (uint64_t)test_no_hang_ns() / 5);
            CHECK_EQ(deaths->second[r], LORASYNC_E_LOST);
            CHECK_EQ(deaths->third[r], LORASYNC_E_LOST);
            CHECK(strstr(deaths->text[r], die_direct ? "host direct: " : "host messages: ") == deaths->text[r]);
            CHECK(strlen(deaths->text[r]) > 30);
        }
    }
    CHECK_EQ(shared_memory_left(), 0);
}

/* -- direct placement: not to be had, and for long */

static void limited_rank(rank_context *c)
{
    declared            x;
    lorasync_plan      *plan;
    lorasync_plan_stats stats;
    lorasync_error      err;
    int                 variant;
    for (variant = 0; variant < 3; variant++) {
        struct rlimit old, none;
        int limit = variant == 1 ? RLIMIT_NOFILE : RLIMIT_FSIZE, limited = variant == 0 ? 0 : c->rank == (variant == 1);
        declare_rank(&x, &c->comm, c->rank);
        x.d.no_direct =
            variant == 0 && c->rank == 2; /* 0: one rank does not want; 1: one has no descriptor left; 2: the root may
                                             make no file */
        signal(SIGXFSZ, SIG_IGN);
        getrlimit(limit, &old);
        none = old, none.rlim_cur = 0;
        if (limited) setrlimit(limit, &none);
        CHECK_EQ(lorasync_plan_create(&x.d, &plan, &err), LORASYNC_OK);
        if (limited) setrlimit(limit, &old);
        lorasync_plan_get_stats(plan, &stats);
        CHECK_EQ(stats.direct, 0);
        CHECK_EQ(run_once(plan, &err), LORASYNC_OK);
        if (c->rank == 0) {
            const lorasync_image *image = lorasync_plan_image(plan);
            CHECK(image && lorasync_image_digest(image, NULL) == image->digest && image->num_tensors == 3);
        }
        lorasync_plan_free(plan);
        CHECK_EQ(x.memory.live, 0);
    }
}

static void direct_falls_back(void) { CHECK_EQ(run_processes(WORLD, limited_rank, NULL), 0); }

/* What 4 ranks gathered is still there, whole, when the root looks, also when it takes its time while the others are at
   the next run. */
static void repeated_rank(rank_context *c)
{
    enum {
        N    = 5000,
        RUNS = 1000
    };
    static float        data[N];
    lorasync_piece      p[2];
    lorasync_plan_desc  d;
    lorasync_plan      *plan;
    lorasync_plan_stats stats;
    lorasync_error      err;
    int                 run, i, no_direct;
    for (no_direct = 0; no_direct < 2; no_direct++) {
        memset(&d, 0, sizeof d);
        p[0]     = whole_piece("x", LORASYNC_F32, 2, 4 * 4, N / 4, data);
        p[1]     = whole_piece("y", LORASYNC_F32, 2, 3, N / 5, data);
        p[0].box = lorasync_shard(p[0].box, 0, c->rank, 4);
        p[1].box = lorasync_shard(p[1].box, 1, c->rank, 4);
        d.comm = &c->comm, d.have = p, d.num_have = 2, d.wire_dtype = LORASYNC_BF16, d.no_direct = no_direct,
        d.timeout_ms = test_ms(20000);
        CHECK_EQ(lorasync_plan_create(&d, &plan, &err), LORASYNC_OK);
        lorasync_plan_get_stats(plan, &stats);
        CHECK_EQ(stats.direct, !no_direct);
        for (run = 0; run < RUNS; run++) {
            for (i = 0; i < N; i++) data[i] = (float)(run % 256); /* exact in BF16 */
            CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
            if (lorasync_plan_wait(plan, &err) < 0) {
                test_fail(__FILE__, __LINE__, err.text);
                break;
            }
            if (c->rank == 0) {
                const lorasync_image *image = lorasync_plan_image(plan);
                if (run % 20 == 0) usleep(1000);
                CHECK_EQ(lorasync_image_digest(image, NULL), image->digest);
                CHECK(((const uint16_t *)image->payload)[run % 100] ==
                      ((const uint16_t *)image->payload)[image->payload_bytes / 2 - 1]);
            }
        }
        lorasync_plan_free(plan);
    }
}

static void gather_1000_times(void) { CHECK_EQ(run_processes(4, repeated_rank, NULL), 0); }

/* -- size of plans */

/* The LoRA tensors of a model like Qwen3-30B-A3B at rank 16: 48 layers x (4 attention + 128 experts x 3) x (A, B) =
   37,248. */
static size_t big_model(lorasync_piece *pieces, char (*names)[96], size_t max, int rank, int world, float *data)
{
    static const char *const attention[4] = {"q_proj", "k_proj", "v_proj", "o_proj"}, *const expert[3] = {"gate_proj",
                                                                                                          "up_proj",
                                                                                                          "down_proj"};
    static const int in4[4] = {2048, 2048, 2048, 4096}, out4[4] = {4096, 512, 512, 2048}, in3[3] = {2048, 2048, 768},
                     out3[3] = {768, 768, 2048};
    size_t n                 = 0;
    int    layer, m, ab;
    for (layer = 0; layer < 48; layer++)
        for (m = 0; m < 4 + 128 * 3; m++)
            for (ab = 0; ab < 2 && n < max; ab++, n++) {
                int in = m < 4 ? in4[m] : in3[(m - 4) % 3], out = m < 4 ? out4[m] : out3[(m - 4) % 3];
                if (m < 4)
                    snprintf(names[n], 96, "base_model.model.model.layers.%d.self_attn.%s.lora_%c.weight", layer,
                             attention[m], "AB"[ab]);
                else
                    snprintf(names[n], 96, "base_model.model.model.layers.%d.mlp.experts.%d.%s.lora_%c.weight", layer,
                             (m - 4) / 3, expert[(m - 4) % 3], "AB"[ab]);
                pieces[n]     = whole_piece(names[n], LORASYNC_F32, 2, ab ? out : 16, ab ? 16 : in, data);
                pieces[n].box = lorasync_shard(pieces[n].box, 0, rank, world);
            }
    return n;
}

typedef struct big_user {
    size_t              max;
    int                 no_direct;
    lorasync_plan_stats stats[MAX_RANKS];
    uint64_t            ns[MAX_RANKS], cpu_ns[MAX_RANKS];
    float              *data;
} big_user;

static uint64_t thread_cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static void big_rank(rank_context *c)
{
    big_user       *u      = (big_user *)c->user;
    lorasync_piece *pieces = (lorasync_piece *)calloc(u->max, sizeof *pieces);
    char(*names)[96]       = (char(*)[96])calloc(u->max, 96);
    lorasync_plan_desc d;
    lorasync_plan     *plan;
    lorasync_error     err;
    uint64_t           start, cpu;
    memset(&d, 0, sizeof d);
    d.comm = &c->comm, d.have = pieces, d.num_have = big_model(pieces, names, u->max, c->rank, c->world, u->data),
    d.wire_dtype = LORASYNC_BF16;
    d.no_direct = u->no_direct, d.adapter = "default";
    start = test_now_ns(), cpu = thread_cpu_ns();
    if (lorasync_plan_create(&d, &plan, &err) < 0) {
        test_fail(__FILE__, __LINE__, err.text);
    } else {
        u->ns[c->rank] = test_now_ns() - start, u->cpu_ns[c->rank] = thread_cpu_ns() - cpu;
        lorasync_plan_get_stats(plan, &u->stats[c->rank]);
        lorasync_plan_free(plan);
    }
    free(pieces), free(names);
}

static void big_plan(int world, size_t max, int no_direct)
{
    static big_user u;
    double          worst = 0, worst_peak = 0, other = 0;
    int             r;
    memset(&u, 0, sizeof u);
    u.max = max, u.no_direct = no_direct;
    u.data = (float *)calloc(4096 * 16, sizeof(float));
    run_threads(world, big_rank, &u);
    for (r = 0; r < world; r++) {
        double pieces = (double)u.stats[r].num_pieces;
        CHECK(pieces > 0);
        if ((double)u.stats[r].plan_bytes / pieces > worst) worst = (double)u.stats[r].plan_bytes / pieces;
        if ((double)u.stats[r].peak_plan_bytes / pieces > worst_peak)
            worst_peak = (double)u.stats[r].peak_plan_bytes / pieces;
        if (r && (double)u.cpu_ns[r] / 1e6 > other) other = (double)u.cpu_ns[r] / 1e6;
    }
    printf(
        "     %d ranks x %zu tensors%s: root %zu pieces, plan %.1f MB (%.0f bytes each), peak %.1f MB (%.0f each), "
        "%.0f ms (cpu %.0f ms); rank 1: %zu pieces, plan %.0f bytes each, peak %.0f each, cpu %.0f ms at most; worst "
        "%.0f, peak %.0f\n",
        world, max, no_direct ? "" : ", direct", u.stats[0].num_pieces, (double)u.stats[0].plan_bytes / 1e6,
        (double)u.stats[0].plan_bytes / (double)u.stats[0].num_pieces, (double)u.stats[0].peak_plan_bytes / 1e6,
        (double)u.stats[0].peak_plan_bytes / (double)u.stats[0].num_pieces, (double)u.ns[0] / 1e6,
        (double)u.cpu_ns[0] / 1e6, u.stats[1].num_pieces, (double)u.stats[1].plan_bytes / (double)u.stats[1].num_pieces,
        (double)u.stats[1].peak_plan_bytes / (double)u.stats[1].num_pieces, other, worst, worst_peak);
    if (world > 8) { /* most ranks hold a part of every other tensor only */
        free(u.data);
        return;
    }
    CHECK(worst < 200); /* names, of 75 bytes here, included */
    CHECK(worst_peak < 450);
    free(u.data);
}

static void plan_memory(void)
{
    big_plan(8, 37248, 1);
    big_plan(8, 37248, 0);
}

static void many_ranks(void)
{
    big_plan(64, 2000, 1);
    big_plan(64, 2000, 0);
}

/* -- replicas: a rank that holds what it wants takes its own, whatever the others have to send */

static void replica_rank(rank_context *c)
{
    float               a[100], b[50], got_a[100], got_b[50];
    lorasync_piece      have[2], want[2];
    lorasync_plan_desc  d;
    lorasync_plan      *plan;
    lorasync_plan_stats stats;
    lorasync_error      err;
    int                 i;
    for (i = 0; i < 100; i++) a[i] = (float)i;
    for (i = 0; i < 50; i++) b[i] = (float)(1000 + i);
    memset(got_a, 0, sizeof got_a), memset(got_b, 0, sizeof got_b), memset(&d, 0, sizeof d);
    /* rank 0 sends A, so rank 1 has less to send; both hold B, and both want it */
    have[0] = whole_piece("A", LORASYNC_F32, 1, 100, 0, a), have[1] = whole_piece("B", LORASYNC_F32, 1, 50, 0, b);
    want[0] = whole_piece("A", LORASYNC_F32, 1, 100, 0, got_a),
    want[1] = whole_piece("B", LORASYNC_F32, 1, 50, 0, got_b);
    d.comm = &c->comm, d.kind = LORASYNC_RESHARD, d.timeout_ms = test_ms(10000);
    d.have = c->rank == 0 ? have : have + 1, d.num_have = c->rank == 0 ? 2 : 1;
    d.want = c->rank == 0 ? want + 1 : want, d.num_want = c->rank == 0 ? 1 : 2;
    REQUIRE(lorasync_plan_create(&d, &plan, &err) == LORASYNC_OK);
    lorasync_plan_get_stats(plan, &stats);
    CHECK(c->rank == 0 ? stats.send_bytes >= sizeof a && stats.send_bytes < sizeof a + sizeof b
                       : stats.send_bytes == 0);
    CHECK_EQ(lorasync_plan_begin(plan, &err), LORASYNC_OK);
    CHECK_EQ(lorasync_plan_wait(plan, &err), LORASYNC_OK);
    CHECK(memcmp(got_b, b, sizeof b) == 0);
    if (c->rank == 1) CHECK(memcmp(got_a, a, sizeof a) == 0);
    lorasync_plan_free(plan);
}

static void own_replica_first(void) { run_threads(2, replica_rank, NULL); }

/* Ranks 1 and 2 both hold all of A and B, which rank 0 gathers: each sends one of them. */
static void sharing_rank(rank_context *c)
{
    static float        values[3][2][100];
    lorasync_piece      have[2];
    lorasync_plan_desc  d;
    lorasync_plan      *plan;
    lorasync_plan_stats stats;
    lorasync_error      err;
    memset(&d, 0, sizeof d);
    have[0] = whole_piece("A", LORASYNC_F32, 1, 100, 0, values[c->rank][0]);
    have[1] = whole_piece("B", LORASYNC_F32, 1, 100, 0, values[c->rank][1]);
    d.size = sizeof d, d.comm = &c->comm, d.no_direct = 1, d.timeout_ms = test_ms(10000);
    d.have = have, d.num_have = c->rank ? 2 : 0;
    REQUIRE(lorasync_plan_create(&d, &plan, &err) == LORASYNC_OK);
    lorasync_plan_get_stats(plan, &stats);
    CHECK(c->rank ? stats.send_bytes >= sizeof values[0][0] && stats.send_bytes < sizeof values[0]
                  : stats.send_bytes == 0);
    lorasync_plan_free(plan);
}

static void replicas_share_the_sending(void) { run_threads(3, sharing_rank, NULL); }

int main(int argc, char **argv)
{
    if (argc > 2) { /* by hand: ranks tensors */
        big_plan(atoi(argv[1]), (size_t)atol(argv[2]), argc > 3);
        return 0;
    }
    RUN(any_alignment);
    RUN(bad_calls);
    RUN(lost_at_once);
    RUN(wrong_declarations);
    RUN(run_without_begin);
    RUN(nan_and_inf);
    RUN(one_rank_is_wrong);
    RUN(late_vote_counts);
    RUN(no_memory);
    RUN(rank_dies);
    RUN(direct_falls_back);
    RUN(gather_1000_times);
    RUN(plan_memory);
    RUN(many_ranks);
    RUN(own_replica_first);
    RUN(replicas_share_the_sending);
    return test_summary("test_plan_errors");
}
