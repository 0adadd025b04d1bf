// Where images come from: files, folders and, where it is built in, videos and cameras. The C++ form of
// runtime/video.py.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <edgedistill/error.hpp>
#include <edgedistill/image.hpp>
#include <filesystem>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#ifdef EDGEDISTILL_VIDEO
#include <opencv2/videoio.hpp>
#endif

namespace edgedistill::programs {

namespace fs = std::filesystem;

inline const std::set<std::string>& image_suffixes() {
    static const std::set<std::string> suffixes{".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"};
    return suffixes;
}

inline const std::set<std::string>& video_suffixes() {
    static const std::set<std::string> suffixes{".3gp", ".avi",  ".flv", ".m4v", ".mkv",  ".mov",
                                                ".mp4", ".mpeg", ".mpg", ".ts",  ".webm", ".wmv"};
    return suffixes;
}

inline std::string lower_suffix(const fs::path& path) {
    std::string suffix = path.extension().string();
    std::transform(suffix.begin(), suffix.end(), suffix.begin(), [](unsigned char letter) {
        return letter < 128 ? static_cast<char>(std::tolower(letter)) : static_cast<char>(letter);
    });
    return suffix;
}

// Without "." and doubled separators, as Python's Path shows it.
inline fs::path tidy(const fs::path& path) {
    fs::path shown;
    for (const fs::path& part : path) {
        if (!part.empty() && part != ".") {
            shown /= part;
        }
    }
    return shown.empty() ? fs::path(".") : shown;
}

// The images in a folder, searched to the bottom, in name order. Throws Error (image) when there are none, or when not
// all of it can be searched; what nobody may read is passed over.
inline std::vector<fs::path> folder_images(const fs::path& folder) {
    std::vector<fs::path> found;
    std::error_code fault;
    fs::recursive_directory_iterator entries(folder, fs::directory_options::skip_permission_denied, fault);
    for (const fs::recursive_directory_iterator end; !fault && entries != end; entries.increment(fault)) {
        const fs::path& path = entries->path();
        std::error_code ignored;
        if (image_suffixes().count(lower_suffix(path)) != 0 && path.filename().native().front() != '.' &&
            entries->is_regular_file(ignored)) {
            found.push_back(tidy(path));
        }
    }
    if (fault) {
        throw Error(ErrorKind::image, folder.string() + ": cannot be searched to the bottom (" + fault.message() +
                                          "); try again, or name its folders one by one");
    }
    if (found.empty()) {
        std::string suffixes;
        for (const std::string& suffix : image_suffixes()) {
            suffixes += (suffixes.empty() ? "" : ", ") + suffix;
        }
        throw Error(ErrorKind::image, folder.string() + ": no images in it; expected files ending in " + suffixes);
    }
    std::sort(found.begin(), found.end());
    return found;
}

// One image: a file, or pixels that `owner` keeps.
struct Source {
    std::string name;
    fs::path path;
    ImageView pixels;
    std::shared_ptr<const void> owner;

    bool is_file() const { return owner == nullptr; }
};

using Take = std::function<void(Source)>;

#ifdef EDGEDISTILL_VIDEO
// Every frame of a video or camera, named NAME#NUMBER from 0, each in memory of its own because earlier ones may still
// be in work.
inline void video_frames(cv::VideoCapture capture, const std::string& name, const Take& take) {
    for (std::int64_t number = 0;; ++number) {
        auto frame = std::make_shared<cv::Mat>();
        if (!capture.isOpened() || !capture.read(*frame) || frame->type() != CV_8UC3) {
            if (number == 0) {
                throw Error(ErrorKind::image,
                            name + ": not a video or camera that OpenCV can read, or it has no frames");
            }
            return;
        }
        const ImageView view{frame->data, frame->rows, frame->cols, frame->step[0], PixelFormat::bgr};
        take({name + "#" + std::to_string(number), {}, view, std::move(frame)});
    }
}
#endif

inline bool is_camera(const std::string& argument) {
    const bool digits = !argument.empty() && argument.size() < 6 &&
                        std::all_of(argument.begin(), argument.end(), [](char c) { return c >= '0' && c <= '9'; });
    return digits && !fs::exists(argument);
}

inline void video_source(const std::string& argument, const Take& take) {
#ifdef EDGEDISTILL_VIDEO
    if (is_camera(argument)) {
        return video_frames(cv::VideoCapture(std::stoi(argument)), "camera " + argument, take);
    }
    return video_frames(cv::VideoCapture(argument), tidy(argument).string(), take);
#else
    static_cast<void>(take);
    throw Error(ErrorKind::usage, argument +
                                      ": this program was built without video and cameras; build it with "
                                      "-DEDGEDISTILL_VIDEO=ON, or give images and folders");
#endif
}

// The images of an image file, a folder, a video or a camera's number, one after the other. Throws Error where there is
// nothing of the kind.
inline void each_source(const std::string& argument, const Take& take) {
    const fs::path path = tidy(argument);
    std::error_code ignored;
    if (is_camera(argument)) {
        return video_source(argument, take);
    }
    if (fs::is_directory(path, ignored)) {
        for (const fs::path& image : folder_images(path)) {
            take({image.string(), image, {}, nullptr});
        }
        return;
    }
    if (!fs::is_regular_file(path, ignored)) {
        throw Error(ErrorKind::image, path.string() +
                                          ": no such file or folder; name an image, a folder, a video or a "
                                          "camera's number");
    }
    if (video_suffixes().count(lower_suffix(path)) != 0) {
        return video_source(argument, take);
    }
    take({path.string(), path, {}, nullptr});
}

}  // namespace edgedistill::programs
