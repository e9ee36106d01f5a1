/* Random traffic over any communicator: every rank works out the same sizes and bytes from a round's number. Include it
   behind ranks.h. */
#ifndef LORASYNC_TEST_TRAFFIC_H
#define LORASYNC_TEST_TRAFFIC_H

enum {
    MAX_WORLD = 64
};

TEST_UNUSED static unsigned char pattern(unsigned long long round, int from, int to, size_t i)
{
    unsigned long long s = round * 1000003 + (unsigned long long)from * 4099 + (unsigned long long)to * 17 + i / 8;
    return (unsigned char)(test_random(&s) >> (8 * (i % 8)));
}

TEST_UNUSED static void fill(unsigned char *p, size_t n, unsigned long long round, int from, int to)
{
    size_t i;
    for (i = 0; i < n; i++) p[i] = pattern(round, from, to, i);
}

TEST_UNUSED static int same(const unsigned char *p, size_t n, unsigned long long round, int from, int to)
{
    size_t i;
    for (i = 0; i < n; i++)
        if (p[i] != pattern(round, from, to, i)) return 0;
    return 1;
}

/* The size of the message of a round from one rank to another: all ranks work out the same. */
TEST_UNUSED static size_t message_size(unsigned long long round, int from, int to, int large)
{
    static const size_t sizes[] = {1,
                                   8,
                                   16,
                                   4096,
                                   LORASYNCI_CHUNK - 9,
                                   LORASYNCI_CHUNK - 8,
                                   LORASYNCI_CHUNK - 7,
                                   LORASYNCI_CHUNK - 1,
                                   LORASYNCI_CHUNK,
                                   LORASYNCI_CHUNK + 1};
    unsigned long long  s       = round * 7919 + (unsigned long long)from * 64 + (unsigned long long)to;
    unsigned            k       = (unsigned)(test_random(&s) % 16);
    if (k < 5) return 0; /* sparse */
    if (k == 15 && large) return 1 + (size_t)(test_random(&s) % (3u << 20));
    if (k > 12) return 1 + (size_t)(test_random(&s) % 500000) / (large ? 1 : 50);
    return sizes[test_random(&s) % (large ? 10 : 4)];
}

TEST_UNUSED static int exchange_round(const lorasync_comm *c, unsigned long long round, int large)
{
    lorasync_message s[MAX_WORLD] = {{0, NULL, 0}}, r[MAX_WORLD] = {{0, NULL, 0}};
    size_t           ns = 0, nr = 0, i;
    lorasync_error   err;
    int              peer, bad = 0, k;
    for (k = 0; k < c->world; k++) {
        size_t n;
        peer = round % 2 ? k : c->world - 1 - k; /* the order of a list means nothing */
        if (peer == c->rank) continue;
        n = message_size(round, c->rank, peer, large);
        if (n || round % 3 == 0) { /* an empty message may be listed or left out */
            s[ns].peer = peer, s[ns].num_bytes = n, s[ns].data = n ? malloc(n) : NULL;
            if (n) fill((unsigned char *)s[ns].data, n, round, c->rank, peer);
            ns++;
        }
        n = message_size(round, peer, c->rank, large);
        if (n || round % 5 == 0) r[nr].peer = peer, r[nr].num_bytes = n, r[nr].data = n ? malloc(n) : NULL, nr++;
    }
    if (c->exchange(c->user, s, ns, r, nr, 20000, &err) < 0) {
        fprintf(stderr, "rank %d round %llu: %s\n", c->rank, round, err.text);
        bad = 1;
    }
    for (i = 0; i < nr && !bad; i++)
        if (!same((const unsigned char *)r[i].data, r[i].num_bytes, round, r[i].peer, c->rank)) bad = 1;
    for (i = 0; i < ns; i++) free(s[i].data);
    for (i = 0; i < nr; i++) free(r[i].data);
    return bad;
}

TEST_UNUSED static int gather_round(const lorasync_comm *c, unsigned long long round, size_t n)
{
    unsigned char *in = (unsigned char *)malloc(n), *out = (unsigned char *)malloc(n * (size_t)c->world);
    lorasync_error err;
    int            rank, bad = 0;
    fill(in, n, round, c->rank, 0);
    memset(out, 0x5a, n * (size_t)c->world);
    if (c->all_gather(c->user, in, out, n, 20000, &err) < 0) {
        fprintf(stderr, "rank %d round %llu: %s\n", c->rank, round, err.text);
        bad = 1;
    }
    for (rank = 0; rank < c->world && !bad; rank++)
        if (!same(out + (size_t)rank * n, n, round, rank, 0)) bad = 1;
    free(in), free(out);
    return bad;
}

typedef struct traffic {
    int rounds, large;
    int bad[MAX_WORLD];
} traffic;

TEST_UNUSED static void run_traffic(rank_context *x)
{
    traffic           *t = (traffic *)x->user;
    unsigned long long i, s = 5;
    CHECK(x->comm.rank == x->rank && x->comm.world == x->world);
    for (i = 0; i < (unsigned long long)t->rounds && !t->bad[x->rank]; i++) {
        static const size_t sizes[] = {1, 7, 16, 520, LORASYNCI_CHUNK - 8, LORASYNCI_CHUNK, 200001};
        if (test_random(&s) % 2) t->bad[x->rank] |= exchange_round(&x->comm, i, t->large);
        else t->bad[x->rank] |= gather_round(&x->comm, i, sizes[test_random(&s) % (t->large ? 7 : 4)]);
    }
    if (t->bad[x->rank] && x->comm.abort) x->comm.abort(x->comm.user, "wrong bytes");
}

#endif
