/* The C interface, compiled as C11: test_c_api [DEPLOYABLE PHOTO BROKEN_PHOTO]. Without arguments it uses the models
 * and photos of $EDGEDISTILL_TEST_MODELS. */
#include <edgedistill/edgedistill.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            ++failures;                                                     \
        }                                                                   \
    } while (0)

#define ERROR_SIZE 256
#define MOST_CLASSES 64

static char error[ERROR_SIZE];

static void expect(edgedistill_status got, edgedistill_status wanted, int line) {
    if (got != wanted) {
        fprintf(stderr, "%s:%d: status %d, expected %d (%s)\n", __FILE__, line, (int)got, (int)wanted, error);
        ++failures;
    }
    /* Every failure says why, and success leaves nothing behind. */
    if ((got < 0 || got == EDGEDISTILL_FULL) != (error[0] != '\0')) {
        fprintf(stderr, "%s:%d: status %d with the message '%s'\n", __FILE__, line, (int)got, error);
        ++failures;
    }
}

#define EXPECT(call, wanted)                \
    do {                                    \
        memset(error, 'x', sizeof(error));  \
        expect((call), (wanted), __LINE__); \
    } while (0)

static uint8_t* read_file(const char* path, size_t* size) {
    FILE* file = fopen(path, "rb");
    uint8_t* bytes = NULL;
    long length = -1;
    if (file != NULL && fseek(file, 0, SEEK_END) == 0) {
        length = ftell(file);
        rewind(file);
    }
    if (length > 0) bytes = malloc((size_t)length);
    if (bytes == NULL || fread(bytes, 1, (size_t)length, file) != (size_t)length) {
        fprintf(stderr, "%s: cannot be read\n", path);
        exit(2);
    }
    fclose(file);
    *size = (size_t)length;
    return bytes;
}

static edgedistill_options quiet_options(void) {
    edgedistill_options options;
    edgedistill_default_options(&options);
    options.precision = "f32";
    options.use_cache = 0;
    options.threads = 1;
    return options;
}

static void check_answer(const edgedistill_prediction* answer, const float* probabilities, int32_t classes) {
    double sum = 0.0;
    int32_t index = 0;
    CHECK(answer->index >= 0 && answer->index < classes);
    CHECK(answer->label != NULL && answer->label[0] != '\0');
    for (index = 0; index < classes; ++index) sum += (double)probabilities[index];
    CHECK(fabs(sum - 1.0) < 1e-4);
    CHECK(fabs((double)(probabilities[answer->index] - answer->probability)) < 1e-6);
}

static void options_of_other_versions(const char* model) {
    edgedistill_options options;
    edgedistill_classifier* classifier = NULL;
    struct {
        edgedistill_options known;
        int64_t unknown;
    } newer;

    memset(&options, 0x5a, sizeof(options));
    edgedistill_default_options(&options);
    CHECK(options.struct_size == sizeof(options) && options.decode == -1 && options.use_cache == 1);
    CHECK(options.precision == NULL && options.threads == 0 && options.log == NULL && options.max_pixels > 0);
    edgedistill_default_options(NULL);

    /* An older caller's struct ends early: what follows it in memory is not its own. */
    memset(&options, 0x5a, sizeof(options));
    edgedistill_default_options_sized(&options, offsetof(edgedistill_options, max_pixels));
    CHECK(options.struct_size == offsetof(edgedistill_options, max_pixels));
    CHECK(options.max_pixels == 0x5a5a5a5a5a5a5a5aLL);
    options.use_cache = 0;
    EXPECT(edgedistill_classifier_open(model, &options, &classifier, error, sizeof(error)), EDGEDISTILL_OK);
    CHECK(classifier != NULL);
    edgedistill_classifier_free(classifier);

    memset(&newer, 0x5a, sizeof(newer));
    edgedistill_default_options_sized(&newer.known, sizeof(newer));
    CHECK(newer.known.struct_size == sizeof(newer) && newer.unknown == 0);
    newer.known.use_cache = 0;
    EXPECT(edgedistill_classifier_open(model, &newer.known, &classifier, error, sizeof(error)), EDGEDISTILL_OK);
    edgedistill_classifier_free(classifier);
    newer.unknown = 1;
    EXPECT(edgedistill_classifier_open(model, &newer.known, &classifier, error, sizeof(error)), EDGEDISTILL_USAGE);
    CHECK(classifier == NULL);

    memset(&options, 0, sizeof(options));
    EXPECT(edgedistill_classifier_open(model, &options, &classifier, error, sizeof(error)), EDGEDISTILL_USAGE);
    CHECK(strstr(error, "edgedistill_default_options") != NULL);
}

static void wrong_options(const char* model) {
    edgedistill_options options = quiet_options();
    edgedistill_engine* engine = NULL;
    edgedistill_classifier* classifier = NULL;
    options.precision = "f13";
    EXPECT(edgedistill_classifier_open(model, &options, &classifier, error, sizeof(error)), EDGEDISTILL_USAGE);
    options = quiet_options();
    options.decode = 7;
    EXPECT(edgedistill_classifier_open(model, &options, &classifier, error, sizeof(error)), EDGEDISTILL_USAGE);
    options = quiet_options();
    options.streams = -1;
    EXPECT(edgedistill_engine_open(model, &options, &engine, error, sizeof(error)), EDGEDISTILL_USAGE);
    options.streams = 2;
    options.queue_size = 2;
    EXPECT(edgedistill_engine_open(model, &options, &engine, error, sizeof(error)), EDGEDISTILL_USAGE);
    CHECK(engine == NULL && classifier == NULL);
}

static void nulls(const char* model, edgedistill_classifier* classifier, edgedistill_engine* engine) {
    const uint8_t byte = 0;
    edgedistill_prediction answer;
    edgedistill_image image = {NULL, 1, 1, 0, EDGEDISTILL_BGR};
    edgedistill_classifier* out = NULL;
    EXPECT(edgedistill_classifier_open(NULL, NULL, &out, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classifier_open(model, NULL, NULL, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classifier_open_memory(NULL, 0, NULL, 0, NULL, &out, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_open(NULL, NULL, NULL, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_file(NULL, "x", &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_file(classifier, NULL, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_file(classifier, "x", NULL, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_bytes(classifier, NULL, 0, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_bytes(NULL, &byte, 1, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_pixels(classifier, NULL, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_pixels(classifier, &image, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    image.data = &byte;
    memset(&image.format, 0x7f, sizeof(image.format));
    EXPECT(edgedistill_classify_pixels(classifier, &image, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_submit_file(NULL, "x", 1, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_submit_file(engine, NULL, 1, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_submit_bytes(engine, NULL, 4, 1, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_submit_pixels(engine, NULL, 1, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_next(NULL, NULL, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_wait_until_ready(NULL, error, sizeof(error)), EDGEDISTILL_USAGE);
    EXPECT(edgedistill_engine_next(engine, NULL, NULL, NULL, 0, error, sizeof(error)), EDGEDISTILL_USAGE);
    CHECK(edgedistill_classify_file(NULL, NULL, NULL, NULL, 0, NULL, 0) == EDGEDISTILL_USAGE);
    CHECK(edgedistill_classify_file(NULL, NULL, NULL, NULL, 0, NULL, 99) == EDGEDISTILL_USAGE);
    CHECK(edgedistill_classifier_class_count(NULL) == 0 && edgedistill_classifier_label(NULL, 0) == NULL);
    CHECK(edgedistill_classifier_head_count(NULL) == 0 && edgedistill_engine_head_count(NULL) == 0);
    CHECK(edgedistill_engine_class_count(NULL) == 0 && edgedistill_engine_label(NULL, 0) == NULL);
    CHECK(edgedistill_engine_dropped(NULL) == 0);
    edgedistill_engine_finish(NULL);
    edgedistill_engine_free(NULL);
    edgedistill_classifier_free(NULL);
}

static void error_buffers_always_end(edgedistill_classifier* classifier) {
    edgedistill_prediction answer;
    char small[8];
    size_t size = 0;
    for (size = 0; size < sizeof(small); ++size) {
        memset(small, 'x', sizeof(small));
        CHECK(edgedistill_classify_file(classifier, "/nowhere/\xc3\xa4\xc3\xa4.jpg", &answer, NULL, 0, small, size) ==
              EDGEDISTILL_IMAGE);
        CHECK(size == 0 || memchr(small, '\0', size) != NULL);
        CHECK(small[size] == 'x');
    }
}

static void classifies(const char* model, const char* photo, const char* broken) {
    edgedistill_options options = quiet_options();
    edgedistill_classifier* classifier = NULL;
    edgedistill_prediction by_file, by_bytes, by_pixels;
    float probabilities[MOST_CLASSES];
    uint8_t grey[12 * 8];
    edgedistill_image image = {grey, 8, 12, 0, EDGEDISTILL_GRAY};
    size_t size = 0;
    uint8_t* bytes = read_file(photo, &size);
    int32_t classes = 0;

    EXPECT(edgedistill_classifier_open(model, &options, &classifier, error, sizeof(error)), EDGEDISTILL_OK);
    if (classifier == NULL) exit(1);
    classes = edgedistill_classifier_class_count(classifier);
    CHECK(classes > 1 && classes <= MOST_CLASSES);
    CHECK(edgedistill_classifier_label(classifier, -1) == NULL);
    CHECK(edgedistill_classifier_label(classifier, classes) == NULL);

    EXPECT(edgedistill_classify_file(classifier, photo, &by_file, probabilities, MOST_CLASSES, error, sizeof(error)),
           EDGEDISTILL_OK);
    check_answer(&by_file, probabilities, classes);
    CHECK(strcmp(by_file.label, edgedistill_classifier_label(classifier, by_file.index)) == 0);
    EXPECT(edgedistill_classify_bytes(classifier, bytes, size, &by_bytes, probabilities, (size_t)classes, error,
                                      sizeof(error)),
           EDGEDISTILL_OK);
    check_answer(&by_bytes, probabilities, classes);
    CHECK(by_bytes.index == by_file.index && fabsf(by_bytes.probability - by_file.probability) < 1e-6F);
    memset(grey, 128, sizeof(grey));
    EXPECT(
        edgedistill_classify_pixels(classifier, &image, &by_pixels, probabilities, MOST_CLASSES, error, sizeof(error)),
        EDGEDISTILL_OK);
    check_answer(&by_pixels, probabilities, classes);

    EXPECT(edgedistill_classify_file(classifier, photo, &by_file, probabilities, 1, error, sizeof(error)),
           EDGEDISTILL_USAGE);
    EXPECT(edgedistill_classify_file(classifier, broken, &by_file, NULL, 0, error, sizeof(error)), EDGEDISTILL_IMAGE);
    CHECK(by_file.index == -1 && by_file.label[0] == '\0');
    EXPECT(edgedistill_classify_file(classifier, "/nowhere.jpg", &by_file, NULL, 0, error, sizeof(error)),
           EDGEDISTILL_IMAGE);
    EXPECT(edgedistill_classify_bytes(classifier, bytes, 0, &by_bytes, NULL, 0, error, sizeof(error)),
           EDGEDISTILL_IMAGE);
    image.height = 0;
    EXPECT(edgedistill_classify_pixels(classifier, &image, &by_pixels, NULL, 0, error, sizeof(error)),
           EDGEDISTILL_IMAGE);
    error_buffers_always_end(classifier);
    nulls(model, classifier, NULL);
    edgedistill_classifier_free(classifier);
    free(bytes);
}

static void a_model_in_memory(const char* xml_path, const char* weights_path, const char* photo) {
    edgedistill_options options = quiet_options();
    edgedistill_classifier* classifier = NULL;
    edgedistill_prediction answer;
    size_t xml_size = 0, weights_size = 0;
    uint8_t* xml = read_file(xml_path, &xml_size);
    uint8_t* weights = read_file(weights_path, &weights_size);
    EXPECT(edgedistill_classifier_open_memory(xml, xml_size, weights, weights_size, &options, &classifier, error,
                                              sizeof(error)),
           EDGEDISTILL_OK);
    free(xml);
    free(weights);
    if (classifier != NULL) {
        EXPECT(edgedistill_classify_file(classifier, photo, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_OK);
    }
    edgedistill_classifier_free(classifier);
    EXPECT(edgedistill_classifier_open_memory((const uint8_t*)"<xml", 4, NULL, 0, &options, &classifier, error,
                                              sizeof(error)),
           EDGEDISTILL_MODEL);
}

/* The engine has copied everything by the time that submit returns. */
static void submit_one_of_each(edgedistill_engine* engine, const char* photo, const char* broken) {
    size_t size = 0;
    uint8_t* bytes = read_file(photo, &size);
    uint8_t* pixels = malloc(8 * 48);
    edgedistill_image image;
    char* path = malloc(strlen(photo) + 1);
    strcpy(path, photo);
    memset(pixels, 90, 8 * 48);
    image.data = pixels;
    image.height = 8;
    image.width = 12;
    image.row_bytes = 40;
    image.format = EDGEDISTILL_BGR;
    EXPECT(edgedistill_engine_submit_file(engine, path, 10, -1, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_submit_bytes(engine, bytes, size, UINT64_MAX, -1, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_submit_file(engine, broken, 12, -1, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_submit_pixels(engine, &image, 13, -1, error, sizeof(error)), EDGEDISTILL_OK);
    image.row_bytes = 0;
    image.format = EDGEDISTILL_NV12;
    EXPECT(edgedistill_engine_submit_pixels(engine, &image, 14, -1, error, sizeof(error)), EDGEDISTILL_OK);
    image.format = EDGEDISTILL_I420;
    image.row_bytes = 20;
    EXPECT(edgedistill_engine_submit_pixels(engine, &image, 15, -1, error, sizeof(error)), EDGEDISTILL_OK);
    image.row_bytes = 11;
    EXPECT(edgedistill_engine_submit_pixels(engine, &image, 16, -1, error, sizeof(error)), EDGEDISTILL_IMAGE);
    image.width = -12;
    EXPECT(edgedistill_engine_submit_pixels(engine, &image, 16, -1, error, sizeof(error)), EDGEDISTILL_IMAGE);
    memset(path, 'x', strlen(path));
    memset(bytes, 0, size);
    memset(pixels, 0, 8 * 48);
    free(path);
    free(bytes);
    free(pixels);
}

static void engines_answer_in_order(const char* model, const char* photo, const char* broken) {
    static const uint64_t users[] = {10, UINT64_MAX, 12, 13, 14, 15};
    edgedistill_options options = quiet_options();
    edgedistill_engine* engine = NULL;
    edgedistill_prediction answer, first = {0, NULL, 0.0F, 0};
    float probabilities[MOST_CLASSES];
    uint64_t user = 0;
    size_t number = 0;
    int32_t classes = 0;

    options.streams = 1;
    options.queue_size = 6;
    EXPECT(edgedistill_engine_open(model, &options, &engine, error, sizeof(error)), EDGEDISTILL_OK);
    if (engine == NULL) exit(1);
    EXPECT(edgedistill_engine_wait_until_ready(engine, error, sizeof(error)), EDGEDISTILL_OK);
    classes = edgedistill_engine_class_count(engine);
    CHECK(classes > 1 && edgedistill_engine_label(engine, 0) != NULL);
    CHECK(edgedistill_engine_label(engine, classes) == NULL);
    nulls(model, NULL, engine);

    submit_one_of_each(engine, photo, broken);
    EXPECT(edgedistill_engine_submit_file(engine, photo, 16, 20, error, sizeof(error)), EDGEDISTILL_FULL);
    EXPECT(edgedistill_engine_next(engine, &user, &answer, probabilities, 1, error, sizeof(error)), EDGEDISTILL_USAGE);
    for (number = 0; number < sizeof(users) / sizeof(users[0]); ++number) {
        EXPECT(edgedistill_engine_next(engine, &user, &answer, probabilities, MOST_CLASSES, error, sizeof(error)),
               number == 2 ? EDGEDISTILL_IMAGE : EDGEDISTILL_OK);
        CHECK(user == users[number]);
        if (number == 0) first = answer;
        if (number == 1) CHECK(answer.index == first.index && fabsf(answer.probability - first.probability) < 1e-6F);
        if (number == 2) CHECK(answer.index == -1 && answer.label[0] == '\0' && strstr(error, broken) != NULL);
        if (number != 2) check_answer(&answer, probabilities, classes);
    }
    edgedistill_engine_finish(engine);
    EXPECT(edgedistill_engine_next(engine, &user, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_END);
    EXPECT(edgedistill_engine_submit_file(engine, photo, 1, 0, error, sizeof(error)), EDGEDISTILL_CLOSED);
    CHECK(edgedistill_engine_dropped(engine) == 0);
    edgedistill_engine_free(engine);
}

static void cameras_drop_the_oldest(const char* model, const char* photo) {
    edgedistill_options options = quiet_options();
    edgedistill_engine* engine = NULL;
    edgedistill_prediction answer;
    uint64_t user = 0, last = 0, taken = 0, number = 0;
    options.streams = 1;
    options.queue_size = 3;
    options.drop_oldest = 1;
    EXPECT(edgedistill_engine_open(model, &options, &engine, error, sizeof(error)), EDGEDISTILL_OK);
    if (engine == NULL) exit(1);
    for (number = 1; number <= 50; ++number) {
        EXPECT(edgedistill_engine_submit_file(engine, photo, number, 0, error, sizeof(error)), EDGEDISTILL_OK);
    }
    edgedistill_engine_finish(engine);
    while (edgedistill_engine_next(engine, &user, &answer, NULL, 0, error, sizeof(error)) == EDGEDISTILL_OK) {
        CHECK(user > last);
        last = user;
        ++taken;
    }
    CHECK(last == 50 && taken + edgedistill_engine_dropped(engine) == 50);
    edgedistill_engine_free(engine);
}

static void missing_models(void) {
    edgedistill_classifier* classifier = NULL;
    edgedistill_engine* engine = NULL;
    EXPECT(edgedistill_classifier_open("/nowhere", NULL, &classifier, error, sizeof(error)), EDGEDISTILL_ARTIFACT);
    EXPECT(edgedistill_engine_open("/nowhere/model.xml", NULL, &engine, error, sizeof(error)), EDGEDISTILL_ARTIFACT);
    CHECK(classifier == NULL && engine == NULL);
}

static char* join(const char* folder, const char* name) {
    char* path = malloc(strlen(folder) + strlen(name) + 1);
    if (path == NULL) exit(2);
    strcpy(path, folder);
    strcat(path, name);
    return path;
}

static void several_heads(const char* model, const char* photo) {
    edgedistill_options options = quiet_options();
    edgedistill_classifier* classifier = NULL;
    edgedistill_engine* engine = NULL;
    edgedistill_prediction answer;
    edgedistill_head hue, blueness;
    float outputs[MOST_CLASSES];

    EXPECT(edgedistill_classifier_open(model, &options, &classifier, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_open(model, &options, &engine, error, sizeof(error)), EDGEDISTILL_OK);
    if (classifier == NULL || engine == NULL) exit(1);
    CHECK(edgedistill_classifier_head_count(classifier) == 2 && edgedistill_engine_head_count(engine) == 2);
    CHECK(edgedistill_classifier_head(classifier, 0, &hue) == EDGEDISTILL_OK);
    CHECK(edgedistill_engine_head(engine, 1, &blueness) == EDGEDISTILL_OK);
    CHECK(edgedistill_classifier_head(classifier, 2, &hue) == EDGEDISTILL_USAGE);
    CHECK(edgedistill_classifier_head(classifier, 0, NULL) == EDGEDISTILL_USAGE);
    CHECK(strcmp(hue.name, "hue") == 0 && hue.kind == EDGEDISTILL_SOFTMAX && hue.first == 0 && hue.count == 2);
    CHECK(strcmp(blueness.name, "blueness") == 0 && blueness.kind == EDGEDISTILL_REGRESSION && blueness.first == 2);
    EXPECT(edgedistill_classify_file(classifier, photo, &answer, outputs, MOST_CLASSES, error, sizeof(error)),
           EDGEDISTILL_OK);
    CHECK(fabsf(outputs[0] + outputs[1] - 1.0F) < 1e-6F && outputs[0] > outputs[1]);
    CHECK(strcmp(answer.label, "hue=red") == 0 && answer.probability == outputs[0]);
    edgedistill_engine_free(engine);
    edgedistill_classifier_free(classifier);
}

static void each_label_has_a_threshold(const char* heads, const char* multi_label) {
    edgedistill_options options = quiet_options();
    edgedistill_classifier* classifier = NULL;
    edgedistill_engine* engine = NULL;
    edgedistill_head hues;

    EXPECT(edgedistill_classifier_open(heads, &options, &classifier, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_open(multi_label, &options, &engine, error, sizeof(error)), EDGEDISTILL_OK);
    if (classifier == NULL || engine == NULL) exit(1);
    CHECK(edgedistill_classifier_head(classifier, 0, &hues) == EDGEDISTILL_OK && hues.threshold == 0.3F);
    CHECK(edgedistill_classifier_threshold(classifier, 0) == 0.6F);
    CHECK(edgedistill_classifier_threshold(classifier, 1) == 0.3F);
    CHECK(edgedistill_classifier_threshold(classifier, 2) < 0.0F);
    CHECK(edgedistill_classifier_threshold(classifier, -1) < 0.0F);
    CHECK(edgedistill_classifier_threshold(NULL, 0) < 0.0F && edgedistill_engine_threshold(NULL, 0) < 0.0F);
    CHECK(edgedistill_engine_threshold(engine, 2) == 0.5F && edgedistill_engine_threshold(engine, 3) < 0.0F);
    edgedistill_engine_free(engine);
    edgedistill_classifier_free(classifier);
}

static void each_stage_has_its_own_thresholds(const char* cascade, const char* multi_label, const char* photo) {
    edgedistill_options options = quiet_options();
    edgedistill_classifier* classifier = NULL;
    edgedistill_engine *engine = NULL, *one_stage = NULL;
    edgedistill_prediction answer;

    EXPECT(edgedistill_classifier_open(cascade, &options, &classifier, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_open(cascade, &options, &engine, error, sizeof(error)), EDGEDISTILL_OK);
    EXPECT(edgedistill_engine_open(multi_label, &options, &one_stage, error, sizeof(error)), EDGEDISTILL_OK);
    if (classifier == NULL || engine == NULL || one_stage == NULL) exit(1);
    EXPECT(edgedistill_classify_file(classifier, photo, &answer, NULL, 0, error, sizeof(error)), EDGEDISTILL_OK);
    CHECK(answer.stage == 1);
    CHECK(edgedistill_classifier_stage_threshold(classifier, answer.stage, 0) == 0.2F);
    CHECK(edgedistill_classifier_stage_threshold(classifier, answer.stage, 1) == 0.9F);
    CHECK(edgedistill_engine_stage_threshold(engine, 1, 0) == 0.2F);
    CHECK(edgedistill_engine_stage_threshold(engine, 1, 1) == 0.9F);
    CHECK(edgedistill_classifier_stage_threshold(classifier, 0, 1) == 0.3F);
    CHECK(edgedistill_classifier_threshold(classifier, 1) == 0.3F && edgedistill_engine_threshold(engine, 0) == 0.6F);
    CHECK(edgedistill_classifier_stage_threshold(classifier, 1, 2) < 0.0F); /* a value */
    CHECK(edgedistill_classifier_stage_threshold(classifier, 1, 3) < 0.0F);
    CHECK(edgedistill_classifier_stage_threshold(classifier, 1, -1) < 0.0F);
    CHECK(edgedistill_classifier_stage_threshold(classifier, 2, 0) < 0.0F);
    CHECK(edgedistill_classifier_stage_threshold(classifier, -1, 0) < 0.0F);
    CHECK(edgedistill_engine_stage_threshold(engine, 2, 0) < 0.0F);
    CHECK(edgedistill_engine_stage_threshold(one_stage, 0, 2) == 0.5F);
    CHECK(edgedistill_engine_stage_threshold(one_stage, 1, 2) < 0.0F);
    CHECK(edgedistill_classifier_stage_threshold(NULL, 0, 0) < 0.0F);
    CHECK(edgedistill_engine_stage_threshold(NULL, 0, 0) < 0.0F);
    edgedistill_engine_free(one_stage);
    edgedistill_engine_free(engine);
    edgedistill_classifier_free(classifier);
}

int main(int argc, char** argv) {
    const char* models = getenv("EDGEDISTILL_TEST_MODELS");
    if (argc != 4 && models == NULL) {
        fprintf(stderr, "usage: test_c_api DEPLOYABLE PHOTO BROKEN_PHOTO, or set EDGEDISTILL_TEST_MODELS\n");
        return 2;
    }
    char* model = join(argc == 4 ? argv[1] : models, argc == 4 ? "" : "/single");
    char* photo = join(argc == 4 ? argv[2] : models, argc == 4 ? "" : "/photos/red.jpg");
    char* broken = join(argc == 4 ? argv[3] : models, argc == 4 ? "" : "/photos/broken.jpg");
    CHECK(strcmp(edgedistill_version(), "0.1.0") == 0);
    options_of_other_versions(model);
    wrong_options(model);
    missing_models();
    classifies(model, photo, broken);
    engines_answer_in_order(model, photo, broken);
    cameras_drop_the_oldest(model, photo);
    if (argc != 4) {
        char* xml = join(models, "/single/stages/tiny/model.xml");
        char* weights = join(models, "/single/stages/tiny/model.bin");
        char* heads = join(models, "/heads");
        a_model_in_memory(xml, weights, photo);
        char* many = join(models, "/heads_many");
        char* multi_label = join(models, "/multi_label");
        several_heads(heads, photo);
        char* cascade = join(models, "/heads_cascade");
        each_label_has_a_threshold(many, multi_label);
        each_stage_has_its_own_thresholds(cascade, multi_label, photo);
        free(cascade);
        free(many);
        free(multi_label);
        free(heads);
        free(xml);
        free(weights);
    }
    free(model);
    free(photo);
    free(broken);
    printf("%s\n", failures == 0 ? "ok" : "FAILED");
    return failures == 0 ? 0 : 1;
}
