/* The trainers' rules for cutting tensors: worked vectors, brute force, and impossible requests. */
#define LORASYNC_STATIC
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"
#include "test.h"
#include <limits.h>
#include "ranks.h"

static lorasync_box whole1(int64_t n) { return lorasync_whole(&n, 1); }

static int is_impossible(lorasync_box b)
{
    lorasync_piece p;
    lorasync_error err;
    int64_t        x = 0;
    int            d;
    memset(&p, 0, sizeof p);
    p.name = "t", p.dtype = LORASYNC_F32, p.ndim = b.flat ? 1 : b.ndim, p.data = &x;
    if (p.ndim < 0 || p.ndim > LORASYNC_MAX_DIMS) p.ndim = 0;
    for (d = 0; d < p.ndim; d++) p.shape[d] = 64;
    p.box = b;
    return lorasynci_box_check(&p, &err) < 0;
}

/* -- torch.chunk, written down independently: cut off pieces of ceil(n / parts) until nothing is left, then empty
   ones */

static void torch_chunk(int64_t n, int parts, int64_t *off, int64_t *len)
{
    int64_t split = (n + parts - 1) / parts, at = 0;
    int     i;
    for (i = 0; i < parts; i++) {
        len[i] = n - at < split ? n - at : split;
        off[i] = at;
        at += len[i];
    }
}

static void shard_is_torch_chunk(void)
{
    int64_t n, off[12], len[12];
    int     parts, r;
    for (n = 0; n < 40; n++)
        for (parts = 1; parts < 12; parts++) {
            torch_chunk(n, parts, off, len);
            for (r = 0; r < parts; r++) {
                int64_t      shape[3];
                lorasync_box b = lorasync_shard(whole1(n), 0, r, parts), f = lorasync_flat_shard(n, r, parts), e;
                shape[0] = 5, shape[1] = n, shape[2] = 3;
                CHECK_EQ(b.off[0], off[r]);
                CHECK_EQ(b.len[0], len[r]);
                CHECK_EQ(b.flat, 0);
                CHECK_EQ(b.ndim, 1);
                CHECK_EQ(f.off[0], off[r]);
                CHECK_EQ(f.len[0], len[r]);
                CHECK_EQ(f.flat, 1);
                CHECK_EQ(f.ndim, 1);
                b = lorasync_shard(lorasync_whole(shape, 3), -2, r, parts);
                CHECK_EQ(b.off[1], off[r]);
                CHECK_EQ(b.len[1], len[r]);
                CHECK(b.off[0] == 0 && b.len[0] == 5 && b.off[2] == 0 && b.len[2] == 3);
                e = lorasync_even(whole1(n), 0, r, parts);
                if (n % parts) CHECK(is_impossible(e));
                else CHECK(e.off[0] == off[r] && e.len[0] == len[r]);
            }
        }
}

typedef struct chunk_vector {
    int64_t n;
    int     parts;
    int64_t len_off[8][2];
} chunk_vector;

static void shard_vectors(void)
{
    static const chunk_vector v[] = {
        {5, 4, {{2, 0}, {2, 2}, {1, 4}, {0, 5}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {6, 4, {{2, 0}, {2, 2}, {2, 4}, {0, 6}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {8, 3, {{3, 0}, {3, 3}, {2, 6}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {3, 4, {{1, 0}, {1, 1}, {1, 2}, {0, 3}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {10, 4, {{3, 0}, {3, 3}, {3, 6}, {1, 9}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {9, 8, {{2, 0}, {2, 2}, {2, 4}, {2, 6}, {1, 8}, {0, 9}, {0, 9}, {0, 9}}},
        {1, 2, {{1, 0}, {0, 1}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {0, 2, {{0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}, {0, 0}}},
        {16, 8, {{2, 0}, {2, 2}, {2, 4}, {2, 6}, {2, 8}, {2, 10}, {2, 12}, {2, 14}}},
    };
    size_t i;
    int    r;
    for (i = 0; i < sizeof v / sizeof v[0]; i++)
        for (r = 0; r < v[i].parts; r++) {
            lorasync_box b = lorasync_shard(whole1(v[i].n), 0, r, v[i].parts);
            CHECK_EQ(b.len[0], v[i].len_off[r][0]);
            CHECK_EQ(b.off[0], v[i].len_off[r][1]);
        }
    for (r = 0; r < 16; r++) { /* lora_A [8, in] on 16 ranks: (0, in), not (0,) */
        int64_t      shape[2] = {8, 64};
        lorasync_box b        = lorasync_shard(lorasync_whole(shape, 2), 0, r, 16);
        CHECK_EQ(b.len[0], r < 8);
        CHECK_EQ(b.len[1], 64);
    }
    for (r = 0; r < 12; r++) CHECK_EQ(lorasync_shard(whole1(16), 0, r, 12).len[0], r < 8 ? 2 : 0);
}

static void shard_of_shard(void)
{
    static const int64_t want[4][2] = {{2, 0}, {1, 2}, {1, 3}, {1, 4}};
    int64_t              shape[2]   = {8, 4};
    int                  r;
    for (r = 0; r < 8; r++) {
        lorasync_box b = lorasync_shard(lorasync_shard(lorasync_whole(shape, 2), 0, r / 4, 2), 0, r % 4, 4);
        CHECK_EQ(b.off[0], r);
        CHECK_EQ(b.len[0], 1);
    }
    for (r = 2; r < 4; r++)
        CHECK(lorasync_shard(whole1(2), 0, r, 4).off[0] == 2 && lorasync_shard(whole1(2), 0, r, 4).len[0] == 0);
    shape[0] = 2, shape[1] = 5;
    for (r = 0; r < 4; r++) {
        lorasync_box b = lorasync_shard(lorasync_shard(lorasync_whole(shape, 2), 1, r / 2, 2), 1, r % 2, 2);
        CHECK_EQ(b.len[1], want[r][0]);
        CHECK_EQ(b.off[1], want[r][1]);
        CHECK_EQ(b.len[0], 2);
    }
    shape[0] = 8, shape[1] = 6; /* HSDP + TP on another dim: a rectangle */
    {
        lorasync_box b = lorasync_shard(lorasync_shard(lorasync_whole(shape, 2), 1, 1, 2), 0, 2, 4);
        CHECK(b.off[0] == 4 && b.len[0] == 2 && b.off[1] == 3 && b.len[1] == 3);
    }
}

static lorasync_box tp_then_fsdp(int64_t n, int tp, int tp_rank, int dp, int dp_rank)
{
    return lorasync_shard(lorasync_shard(whole1(n), 0, tp_rank, tp), 0, dp_rank, dp);
}

static void tp_and_fsdp(void)
{
    static const int64_t v[][5] = {
        /* N, dp rank, tp rank, first, number; dp = 2 (N 10: 3), tp = 2 */
        {8, 0, 0, 0, 2},  {8, 0, 1, 4, 2},  {8, 1, 0, 2, 2},  {8, 1, 1, 6, 2},  {10, 0, 0, 0, 2}, {10, 0, 1, 5, 2},
        {10, 1, 0, 2, 2}, {10, 1, 1, 7, 2}, {10, 2, 0, 4, 1}, {10, 2, 1, 9, 1}, {5, 0, 0, 0, 2},  {5, 1, 0, 2, 1},
        {5, 0, 1, 3, 1},  {5, 1, 1, 4, 1},  {7, 0, 0, 0, 2},  {7, 0, 1, 4, 2},  {7, 1, 0, 2, 2},  {7, 1, 1, 6, 1}};
    size_t i;
    for (i = 0; i < sizeof v / sizeof v[0]; i++) {
        lorasync_box b = tp_then_fsdp(v[i][0], 2, (int)v[i][2], v[i][0] == 10 ? 3 : 2, (int)v[i][1]);
        CHECK_EQ(b.off[0], v[i][3]);
        CHECK_EQ(b.len[0], v[i][4]);
    }
    CHECK_EQ(tp_then_fsdp(7, 2, 1, 3, 2).off[0], 6);
    CHECK_EQ(tp_then_fsdp(7, 2, 1, 3, 2).len[0], 1); /* element 6 is on (dp 2, tp 1) */
    CHECK_EQ(tp_then_fsdp(11, 3, 2, 3, 2).off[0], 10);
    CHECK_EQ(tp_then_fsdp(11, 3, 2, 3, 2).len[0], 1);
}

/* -- flat buffers */

static void check_part(int64_t start, int64_t numel, int64_t total, int rank, int world, int64_t in_shard, int64_t num,
                       int64_t first, int64_t last)
{
    lorasync_flat_piece p = lorasync_flat_part(start, numel, total, rank, world);
    CHECK(p.box.flat == 1 && p.box.ndim == 1);
    CHECK_EQ(p.box.len[0], num);
    if (num == 0) return;
    CHECK_EQ(p.in_shard, in_shard);
    CHECK_EQ(p.box.off[0], first);
    CHECK_EQ(p.box.off[0] + p.box.len[0] - 1, last);
}

static void fsdp1_vectors(void)
{
    static const int64_t n1[3] = {6, 10, 7}, n3[2] = {5, 3}, n4[2] = {12, 20};
    int64_t              s[3], total;
    total = lorasync_fsdp1_layout(n1, 3, 4, 1, 2, s);
    CHECK(total == 28 && s[0] == 0 && s[1] == 8 && s[2] == 20);
    check_part(s[0], 6, total, 0, 2, 0, 6, 0, 5), check_part(s[1], 10, total, 0, 2, 8, 6, 0, 5),
        check_part(s[2], 7, total, 0, 2, 0, 0, 0, 0);
    check_part(s[0], 6, total, 1, 2, 0, 0, 0, 0), check_part(s[1], 10, total, 1, 2, 0, 4, 6, 9),
        check_part(s[2], 7, total, 1, 2, 6, 7, 0, 6);
    total = lorasync_fsdp1_layout(n1, 3, 4, 0, 2, s);
    CHECK(total == 23 && s[0] == 0 && s[1] == 6 && s[2] == 16);
    check_part(s[0], 6, total, 0, 2, 0, 6, 0, 5), check_part(s[1], 10, total, 0, 2, 6, 6, 0, 5);
    check_part(s[1], 10, total, 1, 2, 0, 4, 6, 9), check_part(s[2], 7, total, 1, 2, 4, 7, 0, 6),
        check_part(s[0], 6, total, 1, 2, 0, 0, 0, 0);
    total = lorasync_fsdp1_layout(n3, 2, 2, 1, 4, s);
    CHECK(total == 12 && s[0] == 0 && s[1] == 8);
    check_part(s[0], 5, total, 0, 4, 0, 3, 0, 2), check_part(s[0], 5, total, 1, 4, 0, 2, 3, 4),
        check_part(s[0], 5, total, 2, 4, 0, 0, 0, 0);
    check_part(s[1], 3, total, 2, 4, 2, 1, 0, 0), check_part(s[1], 3, total, 3, 4, 0, 2, 1, 2),
        check_part(s[1], 3, total, 1, 4, 0, 0, 0, 0);
    total = lorasync_fsdp1_layout(n4, 2, 2, 1, 4, s);
    CHECK(total == 36 && s[0] == 0 && s[1] == 16);
    check_part(s[0], 12, total, 0, 4, 0, 9, 0, 8), check_part(s[0], 12, total, 1, 4, 0, 3, 9, 11),
        check_part(s[1], 20, total, 1, 4, 7, 2, 0, 1);
    check_part(s[1], 20, total, 2, 4, 0, 9, 2, 10), check_part(s[1], 20, total, 3, 4, 0, 9, 11, 19),
        check_part(s[1], 20, total, 0, 4, 0, 0, 0, 0);
    CHECK_EQ(lorasync_fsdp1_layout(NULL, 0, 4, 1, 3, NULL), 0);
}

static void zero3_table(void)
{
    static const int64_t v[][9] = {{5, 4, 2, 2, 1, 0, 0, 0, 0},
                                   {16, 4, 4, 4, 4, 4, 0, 0, 0},
                                   {10, 4, 3, 3, 3, 1, 0, 0, 0},
                                   {1, 4, 1, 0, 0, 0, 0, 0, 0},
                                   {7, 3, 3, 3, 1, 0, 0, 0, 0}};
    size_t               i;
    int                  r;
    for (i = 0; i < sizeof v / sizeof v[0]; i++)
        for (r = 0; r < v[i][1]; r++) {
            lorasync_box b = lorasync_flat_shard(v[i][0], r, (int)v[i][1]);
            CHECK_EQ(b.len[0], v[i][2 + r]);
            if (b.len[0]) CHECK_EQ(b.off[0], r * v[i][2]);
            else CHECK_EQ(b.off[0], v[i][0]); /* an empty one stands at the end, inside the tensor */
        }
    for (r = 0; r < 8; r++) CHECK_EQ(lorasync_flat_shard(9, r, 8).len[0], r < 4 ? 2 : r == 4);
}

static void megatron_vectors(void)
{
    static const int64_t n[3] = {100, 200, 50};
    int64_t              s[3], size = lorasync_megatron_layout(n, 3, 0, 2, s);
    CHECK(size == 512 && s[2] == 0 && s[1] == 64 && s[0] == 320);
    check_part(s[2], 50, size, 0, 2, 0, 50, 0, 49), check_part(s[1], 200, size, 0, 2, 64, 192, 0, 191),
        check_part(s[0], 100, size, 0, 2, 0, 0, 0, 0);
    check_part(s[2], 50, size, 1, 2, 0, 0, 0, 0), check_part(s[1], 200, size, 1, 2, 0, 8, 192, 199),
        check_part(s[0], 100, size, 1, 2, 64, 100, 0, 99);
    CHECK_EQ(lorasync_megatron_layout(n, 3, 1, 2, s), 65536);
    CHECK_EQ(lorasync_megatron_layout(n, 3, 0, 3, s), 768);  /* lcm(3, 128) = 384 */
    CHECK_EQ(lorasync_megatron_layout(n, 3, 0, 48, s), 768); /* lcm(48, 128) = 384 */
    CHECK_EQ(lorasync_megatron_layout(n, 3, 1, 3, s), 196608);
}

/* Every element of every parameter exactly once over the ranks, at the place that the buffer's own order says. */
static void flat_parts_brute(void)
{
    unsigned long long seed = 7;
    int                round;
    for (round = 0; round < 400; round++) {
        int64_t numel[6], start[6], total;
        int     world = 1 + (int)(test_random(&seed) % 9), kind = (int)(test_random(&seed) % 3), r;
        size_t  i, n                                            = 1 + (size_t)(test_random(&seed) % 6);
        for (i = 0; i < n; i++) numel[i] = (int64_t)(test_random(&seed) % 300);
        total = kind == 2 ? lorasync_megatron_layout(numel, n, 0, world, start)
                          : lorasync_fsdp1_layout(numel, n, kind ? 2 : 4, (int)(test_random(&seed) % 2), world, start);
        CHECK(total >= 0);
        for (i = 0; i < n; i++) {
            int64_t shard = (total + world - 1) / world, got = 0, e;
            for (r = 0; r < world; r++) {
                lorasync_flat_piece p = lorasync_flat_part(start[i], numel[i], total, r, world);
                CHECK(p.box.off[0] >= 0 && p.box.len[0] >= 0 && p.box.off[0] + p.box.len[0] <= numel[i]);
                for (e = 0; e < p.box.len[0]; e++) {
                    int64_t at = start[i] + p.box.off[0] + e;
                    CHECK(at / shard == r && at % shard == p.in_shard + e);
                }
                if (p.box.len[0]) CHECK_EQ(p.box.off[0], got);
                got += p.box.len[0];
            }
            CHECK_EQ(got, numel[i]);
        }
    }
}

/* -- what cannot be */

static void impossible_requests(void)
{
    int64_t shape[8] = {4, 6, 1, 1, 1, 1, 1, 1}, huge[2] = {INT64_MAX, 2}, negative[1] = {-3}, s[2],
            big[2] = {INT64_MAX, 1};
    lorasync_box w = lorasync_whole(shape, 2), far = w;
    int          r;
    CHECK(!is_impossible(w));
    CHECK(is_impossible(lorasync_shard(w, 2, 0, 2)));
    CHECK(is_impossible(lorasync_shard(w, -3, 0, 2)));
    CHECK(!is_impossible(lorasync_shard(w, -2, 0, 2)));
    CHECK(is_impossible(lorasync_shard(w, 0, 2, 2)));
    CHECK(is_impossible(lorasync_shard(w, 0, -1, 2)));
    CHECK(is_impossible(lorasync_shard(w, 0, 0, 0)));
    CHECK(is_impossible(lorasync_shard(w, 0, 0, -1)));
    CHECK(is_impossible(lorasync_shard(w, INT_MIN, 0, 1)));
    CHECK(is_impossible(lorasync_shard(w, INT_MAX, 0, 1)));
    CHECK(is_impossible(lorasync_even(w, 1, 0, 4)));
    CHECK(!is_impossible(lorasync_even(w, 1, 0, 3)));
    CHECK(is_impossible(lorasync_shard(lorasync_even(w, 1, 0, 4), 0, 0, 1))); /* stays impossible */
    CHECK(is_impossible(lorasync_range(w, 0, 3, 2)));
    CHECK(is_impossible(lorasync_range(w, 0, -1, 2)));
    CHECK(is_impossible(lorasync_range(w, 0, 0, -1)));
    far.off[0] = INT64_MAX - 4; /* made by hand: the last rows that there can be */
    CHECK_EQ(lorasync_range(far, 0, 4, 0).off[0], INT64_MAX);
    CHECK_EQ(lorasync_shard(far, 0, 3, 4).off[0], INT64_MAX - 1);
    far.off[0]++; /* beyond */
    CHECK_EQ(lorasync_shard(far, 0, 3, 4).len[0], -1);
    CHECK_EQ(lorasync_even(far, 0, 1, 2).len[0], -1);
    CHECK_EQ(lorasync_range(far, 0, 4, 0).len[0], -1);
    CHECK(is_impossible(lorasync_range(w, 0, INT64_MAX, INT64_MAX)));
    CHECK(!is_impossible(lorasync_range(w, 0, 4, 0)));
    CHECK(is_impossible(lorasync_shard(lorasync_flat(0, 4), 0, 0, 2))); /* flat intervals are cut with
                                                                           lorasync_flat_shard */
    CHECK(is_impossible(lorasync_flat(-1, 4)));
    CHECK(is_impossible(lorasync_flat(0, -1)));
    CHECK(is_impossible(lorasync_flat(INT64_MAX, INT64_MAX)));
    CHECK(is_impossible(lorasync_flat_shard(-1, 0, 2)));
    CHECK(is_impossible(lorasync_flat_shard(4, 2, 2)));
    CHECK(is_impossible(lorasync_flat_shard(4, 0, 0)));
    CHECK(is_impossible(lorasync_whole(shape, 9)));
    CHECK(is_impossible(lorasync_whole(shape, -1)));
    CHECK(is_impossible(lorasync_whole(negative, 1)));
    CHECK(is_impossible(lorasync_shard(lorasync_whole(negative, 1), 0, 0, 1)));
    CHECK(!is_impossible(lorasync_whole(shape, 8)));
    for (r = 0; r < 3; r++) { /* no overflow on the way */
        lorasync_box b = lorasync_shard(lorasync_whole(huge, 2), 0, r, 3), f = lorasync_flat_shard(INT64_MAX, r, 3);
        CHECK_EQ(b.off[0], INT64_MAX / 3 * r + (INT64_MAX % 3 ? r : 0));
        CHECK(b.len[0] > 0 && b.len[0] <= INT64_MAX - b.off[0]);
        CHECK_EQ(f.off[0], b.off[0]);
        CHECK_EQ(f.len[0], b.len[0]);
    }
    w = lorasync_shard(whole1(INT64_MAX), 0, INT_MAX - 1, INT_MAX);
    CHECK(w.len[0] > 0 && w.off[0] == INT64_MAX - w.len[0]);
    w = lorasync_shard(whole1(INT64_MAX - INT_MAX), 0, INT_MAX - 1, INT_MAX);
    CHECK(w.len[0] >= 0 && w.off[0] == INT64_MAX - INT_MAX - w.len[0]);
    CHECK_EQ(lorasync_fsdp1_layout(big, 2, 4, 0, 2, s), -1);
    CHECK_EQ(lorasync_fsdp1_layout(big, 1, 4, 1, 2, s), -1);
    CHECK_EQ(lorasync_fsdp1_layout(big, 1, 4, 0, 2, s), INT64_MAX);
    CHECK_EQ(lorasync_fsdp1_layout(negative, 1, 4, 0, 2, s), -1);
    CHECK_EQ(lorasync_fsdp1_layout(shape, 1, 4, 0, 0, s), -1);
    CHECK_EQ(lorasync_fsdp1_layout(shape, 1, 0, 1, 2, s), -1);
    CHECK_EQ(lorasync_fsdp1_layout(shape, 1, 17, 1, 2, s), -1);
    CHECK_EQ(lorasync_megatron_layout(big, 2, 0, 2, s), -1);
    CHECK_EQ(lorasync_megatron_layout(big, 1, 0, 2, s), -1);
    CHECK_EQ(lorasync_megatron_layout(negative, 1, 0, 2, s), -1);
    CHECK_EQ(lorasync_megatron_layout(shape, 1, 0, 0, s), -1);
    CHECK(is_impossible(lorasync_flat_part(3, 2, 4, 0, 1).box));
    CHECK(is_impossible(lorasync_flat_part(-1, 2, 4, 0, 1).box));
    CHECK(is_impossible(lorasync_flat_part(INT64_MAX, INT64_MAX, INT64_MAX, 0, 1).box));
    CHECK(is_impossible(lorasync_flat_part(0, 1, 1, 1, 1).box));
}

/* Boxes that reach over the end of their tensor, and tensors of more elements than can be counted. */
static void beyond_the_end(void)
{
    lorasync_piece p;
    lorasync_error err;
    float          x[64] = {0};
    memset(&p, 0, sizeof p);
    p.name = "t", p.dtype = LORASYNC_F32, p.ndim = 1, p.shape[0] = 64, p.data = x;
    p.box        = lorasync_whole(p.shape, 1);
    p.box.off[0] = 60, p.box.len[0] = 4;
    CHECK_EQ(lorasynci_box_check(&p, &err), LORASYNC_OK);
    p.box.len[0] = 5;
    CHECK_EQ(lorasynci_box_check(&p, &err), LORASYNC_E_LAYOUT);
    CHECK_HAS(err.text, "t: box [60:65] does not lie in shape [64]");
    p.box = lorasync_flat(60, 5);
    CHECK_EQ(lorasynci_box_check(&p, &err), LORASYNC_E_LAYOUT);
    CHECK_HAS(err.text, "t: flat interval [60:65] does not lie in shape [64]");
    p.ndim = 2, p.shape[0] = INT64_MAX / 2, p.shape[1] = 2;
    p.box = lorasync_none(2);
    CHECK_EQ(lorasynci_box_check(&p, &err), LORASYNC_OK);
    p.shape[1] = 3;
    CHECK_EQ(lorasynci_box_check(&p, &err), LORASYNC_E_ARGUMENT);
    CHECK_HAS(err.text, "its product passes 2^63");
}

/* A scalar is held whole, or not at all: both must be sayable. */
static void scalars(void)
{
    lorasync_piece p;
    lorasync_error err;
    float          x = 1;
    memset(&p, 0, sizeof p);
    p.name = "s", p.dtype = LORASYNC_F32, p.ndim = 0, p.data = &x;
    p.box = lorasync_whole(p.shape, 0);
    CHECK_EQ(lorasynci_piece_check(&p, 0, &err), LORASYNC_OK);
    p.box = lorasync_shard(lorasync_whole(p.shape, 0), 0, 0, 1);
    CHECK_EQ(lorasynci_piece_check(&p, 0, &err), LORASYNC_E_LAYOUT);
    CHECK_HAS(err.text, "s: the box is impossible");
    p.box  = lorasync_none(0);
    p.data = NULL; /* holds nothing */
    CHECK_EQ(lorasynci_piece_check(&p, 0, &err), LORASYNC_OK);
    p.box = lorasync_flat(0, 1);
    CHECK_EQ(lorasynci_piece_check(&p, 0, &err), LORASYNC_E_ARGUMENT);
    p.data = &x;
    CHECK_EQ(lorasynci_piece_check(&p, 0, &err), LORASYNC_OK);
}

/* -- flat interval to boxes */

typedef struct flat_case {
    int64_t shape[8], numel, first, num, seen;
    int     ndim, boxes, bad;
    char    hit[4096];
} flat_case;

static lorasync_status flat_box(void *user, const int64_t *off, const int64_t *len, int64_t before)
{
    flat_case *c                     = (flat_case *)user;
    int64_t    at[LORASYNC_MAX_DIMS] = {0}, n = 1, i, run = 0;
    int        d;
    c->boxes++;
    if (before != c->seen) c->bad = 1;
    for (d = 0; d < c->ndim; d++) {
        if (off[d] < 0 || len[d] < 1 || off[d] + len[d] > c->shape[d]) c->bad = 2;
        n *= len[d];
    }
    for (i = 0; i < n && !c->bad; i++) {
        int64_t rest = i, number = 0;
        for (d = c->ndim - 1; d >= 0; d--) at[d] = off[d] + rest % len[d], rest /= len[d];
        for (d = 0; d < c->ndim; d++) number = number * c->shape[d] + at[d];
        if (number != c->first + before + run++)
            c->bad = 3; /* in memory order, without a hole: strides of the whole
                                                                tensor hold */
        else if (c->hit[number]++) c->bad = 4;
    }
    c->seen += n;
    return LORASYNC_OK;
}

static void flat_to_boxes(void)
{
    static flat_case   c;
    unsigned long long seed = 3;
    int                round, d;
    for (round = 0; round < 20000; round++) {
        memset(&c, 0, sizeof c);
        c.ndim = (int)(test_random(&seed) % 6), c.numel = 1;
        for (d = 0; d < c.ndim; d++) c.numel *= c.shape[d] = 1 + (int64_t)(test_random(&seed) % (c.ndim > 3 ? 4 : 12));
        c.first = (int64_t)(test_random(&seed) % (unsigned long long)(c.numel + 1));
        c.num   = (int64_t)(test_random(&seed) % (unsigned long long)(c.numel - c.first + 1));
        CHECK_EQ(lorasynci_flat_boxes(c.shape, c.ndim, c.first, c.num, flat_box, &c), LORASYNC_OK);
        CHECK_EQ(c.bad, 0);
        CHECK_EQ(c.seen, c.num);
        CHECK(c.boxes <= (c.ndim ? 2 * c.ndim - 1 : 1));
        if (c.bad) return;
    }
}

/* -- Megatron: fused qkv (interleaved by query group) and fc1 (gate and up side by side on each TP rank), both B, TP
   sharded, as the tensors that Hugging Face names. Pieces point into the fused local buffers. */

enum {
    NH   = 8,
    NG   = 4,
    HPG  = NH / NG,
    HEAD = 3,
    RANK = 5,
    TP   = 2,
    HALF = 8
};

static float value(int tensor, int64_t row, int64_t col) { return (float)(tensor * 10000 + row * 10 + col); }

typedef struct fused {
    float          qkv[NG / TP * (HPG + 2) * HEAD][RANK], fc1[2 * HALF / TP][RANK];
    lorasync_piece pieces[64];
    size_t         num;
} fused;

static void fused_piece(fused *f, const char *name, int64_t rows, int64_t first, int64_t num, float *at)
{
    lorasync_piece *p = &f->pieces[f->num++];
    memset(p, 0, sizeof *p);
    p->name = name, p->dtype = LORASYNC_F32, p->ndim = 2, p->shape[0] = rows, p->shape[1] = RANK;
    p->box  = lorasync_range(lorasync_whole(p->shape, 2), 0, first, num);
    p->data = at;
}

/* What Megatron has in memory: head by head in the interleaved order of the whole tensor; this rank has the groups of
   its TP part. */
static void fused_fill(fused *f, int tp_rank)
{
    int local, row, col;
    memset(f, 0, sizeof *f);
    for (local = 0; local < NG / TP; local++) {
        int group = tp_rank * (NG / TP) + local, head;
        for (head = 0; head < HPG + 2; head++)
            for (row = 0; row < HEAD; row++)
                for (col = 0; col < RANK; col++)
                    f->qkv[(local * (HPG + 2) + head) * HEAD + row][col] =
                        head < HPG ? value(1, (group * HPG + head) * HEAD + row, col)
                                   : value(head == HPG ? 2 : 3, group * HEAD + row, col);
        fused_piece(f, "q_proj.lora_B.weight", NH * HEAD, group * HPG * HEAD, HPG * HEAD,
                    f->qkv[local * (HPG + 2) * HEAD]);
        fused_piece(f, "k_proj.lora_B.weight", NG * HEAD, group * HEAD, HEAD, f->qkv[(local * (HPG + 2) + HPG) * HEAD]);
        fused_piece(f, "v_proj.lora_B.weight", NG * HEAD, group * HEAD, HEAD,
                    f->qkv[(local * (HPG + 2) + HPG + 1) * HEAD]);
    }
    for (row = 0; row < HALF / TP; row++)
        for (col = 0; col < RANK; col++) {
            f->fc1[row][col]             = value(4, tp_rank * (HALF / TP) + row, col);
            f->fc1[HALF / TP + row][col] = value(5, tp_rank * (HALF / TP) + row, col);
        }
    fused_piece(f, "gate_proj.lora_B.weight", HALF, tp_rank * (HALF / TP), HALF / TP, f->fc1[0]);
    fused_piece(f, "up_proj.lora_B.weight", HALF, tp_rank * (HALF / TP), HALF / TP, f->fc1[HALF / TP]);
}

static int fused_wrong[TP];

static void fused_rank(rank_context *x)
{
    static const char *const names[5] = {"q_proj.lora_B.weight", "k_proj.lora_B.weight", "v_proj.lora_B.weight",
                                         "gate_proj.lora_B.weight", "up_proj.lora_B.weight"};
    fused                    f;
    lorasync_plan_desc       d;
    lorasync_plan           *plan;
    lorasync_error           err;
    int                      i, no_direct;
    fused_fill(&f, x->rank);
    for (no_direct = 0; no_direct < 2; no_direct++) {
        memset(&d, 0, sizeof d);
        d.comm = &x->comm, d.have = f.pieces, d.num_have = f.num, d.no_direct = no_direct;
        if (lorasync_plan_create(&d, &plan, &err) < 0) {
            fprintf(stderr, "%s\n", err.text);
            fused_wrong[x->rank]++;
            return;
        }
        if (lorasync_plan_begin(plan, &err) < 0 || lorasync_plan_wait(plan, &err) < 0) fused_wrong[x->rank]++;
        for (i = 0; i < 5 && x->rank == 0; i++) {
            const lorasync_tensor *t = lorasync_image_find(lorasync_plan_image(plan), names[i]);
            int64_t                row, col;
            for (row = 0; t && row < t->shape[0]; row++)
                for (col = 0; col < RANK; col++)
                    if (((const float *)t->data)[row * RANK + col] != value(i + 1, row, col)) fused_wrong[0]++;
            if (!t) fused_wrong[0]++;
        }
        lorasync_plan_free(plan);
    }
}

static void fused_tensors(void)
{
    /* the orders of section "fused qkv" and "fc1", from the formulae, against where the pieces point */
    static const int qkv82[12] = {1, 1, 1, 1, 2, 3, 1, 1, 1, 1, 2, 3};
    fused            f;
    int              h, t, j;
    for (h = 0; h < 12; h++) CHECK_EQ(qkv82[h], h % 6 < 4 ? 1 : h % 6 - 2);
    for (t = 0; t < TP; t++) {
        fused_fill(&f, t);
        for (h = 0; h < NH; h++) { /* q head h stands at head (hpg + 2) * (h / hpg) + h % hpg of the gathered tensor */
            int at = ((HPG + 2) * (h / HPG) + h % HPG) * HEAD - t * (NG / TP) * (HPG + 2) * HEAD;
            if (at < 0 || at >= NG / TP * (HPG + 2) * HEAD) continue;
            CHECK(f.qkv[at][0] == value(1, h * HEAD, 0));
        }
        for (j = 0; j < HALF; j++) { /* row of the gathered fc1: (j / s) * 2s + (up ? s : 0) + j % s */
            int s = HALF / TP, at = (j / s) * 2 * s + j % s - t * 2 * s;
            if (at < 0 || at >= 2 * s) continue;
            CHECK(f.fc1[at][0] == value(4, j, 0) && f.fc1[at + s][0] == value(5, j, 0));
        }
    }
    run_threads(TP, fused_rank, NULL);
    CHECK_EQ(fused_wrong[0] + fused_wrong[1], 0);
}

/* Megatron experts: [E, r / etp, in] of a stack, EP on dim 0, TP on dim 1; llm.c: per-layer slices as ranges. Each
   element once. */
static void experts(void)
{
    int64_t shape[3] = {8, 4, 6};
    int     ep, tp, e, r;
    char    hit[8][4];
    memset(hit, 0, sizeof hit);
    for (ep = 0; ep < 4; ep++)
        for (tp = 0; tp < 2; tp++) {
            lorasync_box b = lorasync_even(lorasync_even(lorasync_whole(shape, 3), 0, ep, 4), 1, tp, 2);
            CHECK(b.len[0] == 2 && b.len[1] == 2 && b.len[2] == 6);
            for (e = (int)b.off[0]; e < b.off[0] + b.len[0]; e++)
                for (r = (int)b.off[1]; r < b.off[1] + b.len[1]; r++) CHECK(e / 2 == ep && !hit[e][r]++);
        }
    CHECK(is_impossible(lorasync_even(lorasync_whole(shape, 3), 0, 0, 3)));
}

int main(void)
{
    RUN(shard_is_torch_chunk);
    RUN(shard_vectors);
    RUN(shard_of_shard);
    RUN(tp_and_fsdp);
    RUN(fsdp1_vectors);
    RUN(zero3_table);
    RUN(megatron_vectors);
    RUN(flat_parts_brute);
    RUN(impossible_requests);
    RUN(beyond_the_end);
    RUN(scalars);
    RUN(flat_to_boxes);
    RUN(fused_tensors);
    RUN(experts);
    return test_summary("test_layout");
}
