/* The C interface: opaque handles, caller-owned buffers, no exception ever crosses it.
 *
 * Every function that can fail returns an edgedistill_status and, where `error` is not NULL, writes why, cut to
 * `error_size` bytes with a final NUL. Threads: as in classifier.hpp and engine.hpp.
 */
#ifndef EDGEDISTILL_H
#define EDGEDISTILL_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EDGEDISTILL_C_API
#else
#define EDGEDISTILL_C_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum edgedistill_status {
    EDGEDISTILL_OK = 0,
    EDGEDISTILL_END = 1,  /* no more answers: finished or closed */
    EDGEDISTILL_FULL = 2, /* the engine was still full after the timeout */
    EDGEDISTILL_USAGE = -1,
    EDGEDISTILL_IMAGE = -2,
    EDGEDISTILL_ARTIFACT = -3,
    EDGEDISTILL_MODEL = -4,
    EDGEDISTILL_CLOSED = -5,
    EDGEDISTILL_INTERNAL = -6 /* out of memory, or an error of a library below */
} edgedistill_status;

typedef enum edgedistill_format {
    EDGEDISTILL_BGR = 0,
    EDGEDISTILL_RGB = 1,
    EDGEDISTILL_GRAY = 2,
    EDGEDISTILL_BGRA = 3,
    EDGEDISTILL_RGBA = 4,
    EDGEDISTILL_NV12 = 5,
    EDGEDISTILL_I420 = 6
} edgedistill_format;

/* height, width: pixels; row_bytes: from one row to the next, 0: no gap. */
typedef struct edgedistill_image {
    const uint8_t* data;
    int32_t height;
    int32_t width;
    size_t row_bytes;
    edgedistill_format format;
} edgedistill_image;

/* Fill with edgedistill_default_options first. Strings may be NULL. Counts of 0: deploy.json or the machine decides. */
typedef struct edgedistill_options {
    size_t struct_size;    /* set by edgedistill_default_options */
    const char* precision; /* "f32", "bf16", "int8", of every stage; NULL: what deploy.json says */
    int32_t threads;
    int32_t streams;     /* engine only */
    int32_t batch;       /* engine only */
    int32_t queue_size;  /* engine only */
    int32_t drop_oldest; /* engine only: 0 waits when full */
    int32_t decode;      /* -1: what deploy.json says, 0 full, 1 reduced */
    int32_t use_cache;   /* 1: compiled models are kept between runs */
    const char* cache_folder;
    int64_t max_pixels;
    void (*log)(void* context, int32_t level, const char* message); /* level 0 info, 1 warning; NULL: standard error */
    void* log_context;
} edgedistill_options;

/* `label` belongs to the classifier or engine and lives as long. `index` is -1 for "unknown". Of a network with several
 * heads they are the first head's; `probability` is the smallest over its heads of classes. */
typedef struct edgedistill_prediction {
    int32_t index;
    const char* label;
    float probability;
    int32_t stage;
} edgedistill_prediction;

typedef enum edgedistill_head_kind {
    EDGEDISTILL_SOFTMAX = 0,   /* one of its classes: the largest probability */
    EDGEDISTILL_SIGMOID = 1,   /* each class for itself: those from their threshold on */
    EDGEDISTILL_REGRESSION = 2 /* one value, in the place of a probability */
} edgedistill_head_kind;

/* One question that a network with several heads answers: its outputs are the `count` from `first` on, in
 * `probabilities` as in the labels. `name` belongs to the classifier or engine and lives as long. `threshold`: the
 * first stage's, the smallest of the head's labels; edgedistill_classifier_stage_threshold has each one's. */
typedef struct edgedistill_head {
    const char* name;
    edgedistill_head_kind kind;
    int32_t first;
    int32_t count;
    float threshold;
} edgedistill_head;

typedef struct edgedistill_classifier edgedistill_classifier;
typedef struct edgedistill_engine edgedistill_engine;

EDGEDISTILL_C_API const char* edgedistill_version(void);
/* As edgedistill_default_options; `struct_size` is the caller's sizeof(edgedistill_options), which a newer library
 * keeps to: fields were only ever added at the end. */
EDGEDISTILL_C_API void edgedistill_default_options_sized(edgedistill_options* options, size_t struct_size);
static inline void edgedistill_default_options(edgedistill_options* options) {
    edgedistill_default_options_sized(options, sizeof(*options));
}

/* `options` may be NULL. Free with edgedistill_classifier_free, which takes NULL. */
EDGEDISTILL_C_API edgedistill_status edgedistill_classifier_open(const char* path, const edgedistill_options* options,
                                                                 edgedistill_classifier** out, char* error,
                                                                 size_t error_size);
EDGEDISTILL_C_API edgedistill_status edgedistill_classifier_open_memory(const uint8_t* xml, size_t xml_size,
                                                                        const uint8_t* weights, size_t weights_size,
                                                                        const edgedistill_options* options,
                                                                        edgedistill_classifier** out, char* error,
                                                                        size_t error_size);
EDGEDISTILL_C_API void edgedistill_classifier_free(edgedistill_classifier* classifier);

EDGEDISTILL_C_API int32_t edgedistill_classifier_class_count(const edgedistill_classifier* classifier);
/* NULL for an index outside 0 .. class_count - 1. */
EDGEDISTILL_C_API const char* edgedistill_classifier_label(const edgedistill_classifier* classifier, int32_t index);

/* 0 where every image gets one label, or one set of labels. */
EDGEDISTILL_C_API int32_t edgedistill_classifier_head_count(const edgedistill_classifier* classifier);
/* EDGEDISTILL_USAGE for an index outside 0 .. head_count - 1. */
EDGEDISTILL_C_API edgedistill_status edgedistill_classifier_head(const edgedistill_classifier* classifier,
                                                                 int32_t index, edgedistill_head* out);
/* The probability from which the label of that output applies; below 0 for an output that is no such label: of a
 * network with one label per image, of a softmax or regression head, outside 0 .. class_count - 1. It is the first
 * stage's: the stages of a cascade may have thresholds of their own. */
EDGEDISTILL_C_API float edgedistill_classifier_threshold(const edgedistill_classifier* classifier, int32_t index);
/* The same of any stage: for an answer, of edgedistill_prediction's `stage`. Below 0 also where there is no such
 * stage. */
EDGEDISTILL_C_API float edgedistill_classifier_stage_threshold(const edgedistill_classifier* classifier, int32_t stage,
                                                               int32_t index);

/* `probabilities`: NULL, or room for `probability_count` floats, of which the first class_count are written;
 * EDGEDISTILL_USAGE when there is less room. */
EDGEDISTILL_C_API edgedistill_status edgedistill_classify_pixels(edgedistill_classifier* classifier,
                                                                 const edgedistill_image* image,
                                                                 edgedistill_prediction* out, float* probabilities,
                                                                 size_t probability_count, char* error,
                                                                 size_t error_size);
EDGEDISTILL_C_API edgedistill_status edgedistill_classify_bytes(edgedistill_classifier* classifier,
                                                                const uint8_t* encoded, size_t size,
                                                                edgedistill_prediction* out, float* probabilities,
                                                                size_t probability_count, char* error,
                                                                size_t error_size);
EDGEDISTILL_C_API edgedistill_status edgedistill_classify_file(edgedistill_classifier* classifier, const char* path,
                                                               edgedistill_prediction* out, float* probabilities,
                                                               size_t probability_count, char* error,
                                                               size_t error_size);

EDGEDISTILL_C_API edgedistill_status edgedistill_engine_open(const char* path, const edgedistill_options* options,
                                                             edgedistill_engine** out, char* error, size_t error_size);
EDGEDISTILL_C_API void edgedistill_engine_free(edgedistill_engine* engine);
/* An open engine answers with its first worker; this waits until all can, and says where one cannot. */
EDGEDISTILL_C_API edgedistill_status edgedistill_engine_wait_until_ready(edgedistill_engine* engine, char* error,
                                                                         size_t error_size);
EDGEDISTILL_C_API int32_t edgedistill_engine_class_count(const edgedistill_engine* engine);
EDGEDISTILL_C_API const char* edgedistill_engine_label(const edgedistill_engine* engine, int32_t index);

EDGEDISTILL_C_API int32_t edgedistill_engine_head_count(const edgedistill_engine* engine);
EDGEDISTILL_C_API edgedistill_status edgedistill_engine_head(const edgedistill_engine* engine, int32_t index,
                                                             edgedistill_head* out);
EDGEDISTILL_C_API float edgedistill_engine_threshold(const edgedistill_engine* engine, int32_t index);
EDGEDISTILL_C_API float edgedistill_engine_stage_threshold(const edgedistill_engine* engine, int32_t stage,
                                                           int32_t index);

/* `timeout_ms` < 0 waits for ever. `user` comes back with the answer, and names bytes and pixels in messages. The
 * engine copies path, bytes and pixels. */
EDGEDISTILL_C_API edgedistill_status edgedistill_engine_submit_file(edgedistill_engine* engine, const char* path,
                                                                    uint64_t user, int32_t timeout_ms, char* error,
                                                                    size_t error_size);
EDGEDISTILL_C_API edgedistill_status edgedistill_engine_submit_bytes(edgedistill_engine* engine, const uint8_t* encoded,
                                                                     size_t size, uint64_t user, int32_t timeout_ms,
                                                                     char* error, size_t error_size);
EDGEDISTILL_C_API edgedistill_status edgedistill_engine_submit_pixels(edgedistill_engine* engine,
                                                                      const edgedistill_image* image, uint64_t user,
                                                                      int32_t timeout_ms, char* error,
                                                                      size_t error_size);
/* The next answer, in order; waits. EDGEDISTILL_IMAGE: this image could not be read (`user` is set, `error` says why),
 * go on with the next. EDGEDISTILL_END: there will be none. */
EDGEDISTILL_C_API edgedistill_status edgedistill_engine_next(edgedistill_engine* engine, uint64_t* user,
                                                             edgedistill_prediction* out, float* probabilities,
                                                             size_t probability_count, char* error, size_t error_size);
EDGEDISTILL_C_API void edgedistill_engine_finish(edgedistill_engine* engine);
EDGEDISTILL_C_API uint64_t edgedistill_engine_dropped(const edgedistill_engine* engine);

#ifdef __cplusplus
}
#endif

#endif
