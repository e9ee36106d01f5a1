/* Pieces as tests declare them: one line each. Include after test.h and lorasync.h. */
#ifndef PIECES_H
#define PIECES_H

/* All of a tensor of shape [n0], or [n0, n1] with ndim 2. */
TEST_UNUSED static lorasync_piece whole_piece(const char *name, lorasync_dtype dtype, int ndim, int64_t n0, int64_t n1,
                                              void *data)
{
    lorasync_piece p;
    memset(&p, 0, sizeof p);
    p.name = name, p.dtype = dtype, p.ndim = ndim, p.shape[0] = n0, p.shape[1] = n1, p.data = data;
    p.box = lorasync_whole(p.shape, ndim);
    return p;
}

/* What `rank` of `world` holds of it as FSDP2 cuts it: a run of its first dimension. F32. */
TEST_UNUSED static lorasync_piece shard_piece(const char *name, int ndim, int64_t n0, int64_t n1, int rank, int world,
                                              void *data)
{
    lorasync_piece p = whole_piece(name, LORASYNC_F32, ndim, n0, n1, data);
    p.box            = lorasync_shard(p.box, 0, rank, world);
    return p;
}

#endif
