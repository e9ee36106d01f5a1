/* What the tests of transports and engines publish: one LoRA pair of rank 4, and its config. After test.h and
   lorasync.h. */
#ifndef PUBLISHED_H
#define PUBLISHED_H

#define KEY_A "base_model.model.layers.0.q_proj.lora_A.weight"
#define KEY_B "base_model.model.layers.0.q_proj.lora_B.weight"
#define CONFIG "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":8,\"target_modules\":[\"q_proj\"]}"

/* KEY_A [rank, width] and KEY_B [width, rank], F32, without payload. */
TEST_UNUSED static lorasync_image *lay_out_rank(const char *adapter, size_t width, int64_t rank)
{
    lorasync_tensor     tensors[2];
    lorasync_image_desc desc;
    lorasync_image     *image = NULL;
    lorasync_error      err;
    memset(tensors, 0, sizeof tensors);
    memset(&desc, 0, sizeof desc);
    err.text[0]      = 0;
    tensors[0].name  = KEY_A;
    tensors[1].name  = KEY_B;
    tensors[0].dtype = tensors[1].dtype = LORASYNC_F32;
    tensors[0].ndim = tensors[1].ndim = 2;
    tensors[0].shape[0] = tensors[1].shape[1] = rank;
    tensors[0].shape[1] = tensors[1].shape[0] = (int64_t)width;
    desc.tensors                              = tensors;
    desc.num_tensors                          = 2;
    desc.adapter                              = adapter;
    if (lorasync_image_layout(&desc, NULL, &image, &err) < 0) {
        fprintf(stderr, "layout: %s\n", err.text);
        exit(1);
    }
    image->config_json = CONFIG;
    return image;
}

/* Frees an image whose payload came from malloc. */
TEST_UNUSED static void drop_image(lorasync_image *image)
{
    void *payload = (void *)(uintptr_t)image->payload;
    lorasync_image_free(image);
    free(payload);
}

/* Both phases, as the session goes through them. */
TEST_UNUSED static lorasync_status put(lorasync_transport *t, const lorasync_image *image, lorasync_error *err)
{
    lorasync_status status = t->stage(t->user, image, err);
    if (status >= 0) return t->commit(t->user, image->adapter, image->version, err);
    t->abort(t->user, image->adapter, image->version);
    return status;
}

/* An engine of shared memory. */
TEST_UNUSED static lorasync_engine *open_shm_engine(const char *name, const char *adapter, int accept_device,
                                                    int no_verify)
{
    lorasync_engine_desc desc;
    lorasync_engine     *e = NULL;
    memset(&desc, 0, sizeof desc);
    desc.shm           = name;
    desc.adapter       = adapter;
    desc.accept_device = accept_device;
    desc.no_verify     = no_verify;
    CHECK_EQ(lorasync_engine_open(&desc, &e, NULL), 0);
    return e;
}

#endif
