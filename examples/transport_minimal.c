/* A transport of your own in one function: it writes the adapter's bytes to a file.

   compile   cc -I. -o transport_minimal examples/transport_minimal.c -lm        (from the folder that holds lorasync.h)
   run       ./transport_minimal [FILE]          writes FILE, or adapter.safetensors in a new folder below TMPDIR that
                                                 it removes
   output    published version 1: 4096 bytes, read back and verified
             published version 2: 4096 bytes, read back and verified
             published version 3: 4096 bytes, read back and verified

   An image is a whole safetensors file: header, then payload. What `stage` does with it is up to you. Here a new
   file replaces the old one by rename, so a reader sees the old version or the new one. Without a `commit`, stage
   must itself be all or nothing. */
#define LORASYNC_IMPLEMENTATION
#include "lorasync.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int write_file(const char *path, const lorasync_image *image)
{
    FILE *f  = fopen(path, "wb");
    int   ok = f != NULL;
    if (!f) return 0;
    ok = ok && fwrite(image->header, 1, image->header_bytes, f) == image->header_bytes;
    ok = ok && fwrite(image->payload, 1, image->payload_bytes, f) == image->payload_bytes;
    return (fclose(f) == 0) && ok;
}

/* The transport. user is the file's path; the image is valid only during the call. */
static lorasync_status stage(void *user, const lorasync_image *image, lorasync_error *err)
{
    const char *path = (const char *)user;
    char        next[1024];
    snprintf(next, sizeof next, "%.1000s.new", path);
    if (write_file(next, image) && rename(next, path) == 0) return LORASYNC_OK;
    err->status = LORASYNC_E_IO;
    snprintf(err->text, sizeof err->text, "cannot write %.300s", path);
    remove(next);
    return LORASYNC_E_IO;
}

static int complain(const lorasync_error *err)
{
    fprintf(stderr, "%s: %s\n", lorasync_status_text(err->status), err->text);
    return 1;
}

/* Reads the file as an engine would. */
static int read_back(const char *path, uint64_t version)
{
    lorasync_image *image = NULL;
    lorasync_error  err;
    int             same;
    if (lorasync_open_adapter(path, NULL, &image, NULL, &err) < 0) return complain(&err);
    same = image->version == version;
    if (same)
        printf("published version %d: %d bytes, read back and verified\n", (int)version, (int)image->payload_bytes);
    lorasync_image_free(image);
    return !same;
}

static int run(char *path)
{
    static const char *const names[2] = {"model.layers.0.q_proj.lora_A.default.weight",
                                         "model.layers.0.q_proj.lora_B.default.weight"};
    static float             values[2][8 * 64];
    lorasync_desc            desc;
    lorasync_session        *session = NULL;
    lorasync_transport       transport;
    lorasync_error           err;
    uint64_t                 version;
    int                      i, failed = 0;

    memset(&desc, 0, sizeof desc);
    desc.lora_alpha = 16;
    if (lorasync_open(&desc, &session, &err) < 0) return complain(&err);
    memset(&transport, 0, sizeof transport);
    transport.size  = sizeof transport;
    transport.name  = "file";
    transport.user  = path;
    transport.stage = stage;
    failed          = lorasync_attach(session, &transport, &err) < 0;
    for (i = 0; i < 2 && !failed; i++) {
        lorasync_piece piece;
        memset(&piece, 0, sizeof piece);
        piece.name     = names[i];
        piece.dtype    = LORASYNC_F32;
        piece.ndim     = 2;
        piece.shape[0] = i == 0 ? 8 : 64;
        piece.shape[1] = i == 0 ? 64 : 8;
        piece.box      = lorasync_whole(piece.shape, piece.ndim);
        piece.data     = values[i];
        failed         = lorasync_add(session, &piece, &err) < 0;
    }
    if (failed || lorasync_compile(session, &err) < 0) failed = complain(&err);
    for (version = 1; version <= 3 && !failed; version++) {
        for (i = 0; i < 8 * 64; i++)
            values[0][i] = values[1][i] = (float)version + (float)i / 512.0f; /* an optimizer
                                                                                                          step */
        failed = lorasync_sync(session, version, NULL, &err) < 0 ? complain(&err) : read_back(path, version);
    }
    lorasync_close(session);
    return failed;
}

int main(int argc, char **argv)
{
    char        folder[512], path[600];
    const char *tmp = getenv("TMPDIR");
    int         failed;
    if (argc > 1) return run(argv[1]);
    snprintf(folder, sizeof folder, "%.400s/lorasync-minimal-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(folder)) {
        perror(folder);
        return 1;
    }
    snprintf(path, sizeof path, "%s/adapter.safetensors", folder);
    failed = run(path);
    remove(path);
    rmdir(folder);
    return failed;
}
