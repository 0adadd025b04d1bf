#include "ir.hpp"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include <openvino/runtime/core.hpp>

#include "error.hpp"

namespace edgedistill::detail {

namespace {

// An IR has about ten; each network inside a network (a loop's body) adds six.
constexpr int max_depth = 300;

// The position behind the next `end`, or the text's end.
std::size_t behind(std::string_view text, std::size_t position, std::string_view end) {
    const std::size_t found = text.find(end, position);
    return found == std::string_view::npos ? text.size() : found + end.size();
}

// The position of the '>' that closes the tag; values in quotes may hold others.
std::size_t tag_end(std::string_view xml, std::size_t position) {
    char quote = 0;
    for (; position < xml.size(); ++position) {
        const char c = xml[position];
        if (quote != 0) {
            if (c == quote) quote = 0;
        } else if (c == '"' || c == '\'') {
            quote = c;
        } else if (c == '>') {
            break;
        }
    }
    return position;
}

constexpr const char* edges_missing = "its layers and edges do not belong together";

std::string_view trimmed(std::string_view text) {
    const std::size_t first = text.find_first_not_of(" \t\r\n");
    return first == text.npos ? std::string_view{} : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

// The value of the first attribute of that name; empty where there is none.
std::string_view attribute(std::string_view tag, std::string_view name) {
    for (std::size_t position = 0; position < tag.size();) {
        const std::size_t equals = tag.find('=', position);
        const std::size_t open = tag.find_first_of("'\"", equals);
        const std::size_t close = open == tag.npos ? tag.npos : tag.find(tag[open], open + 1);
        if (equals == tag.npos || close == tag.npos) break;
        const std::string_view before = trimmed(tag.substr(position, equals - position));
        const std::string_view own = before.substr(before.find_last_of(" \t\r\n") + 1);
        if (own == name) return tag.substr(open + 1, close - open - 1);
        position = close + 1;
    }
    return {};
}

// The elements of an IR, one after the other: layers and the edges between them, in networks inside networks.
class Walk {
public:
    // `text`: between < and >. Returns why the IR is refused, or nullptr.
    const char* tag(std::string_view text) {
        const bool closing = !text.empty() && text.front() == '/';
        const bool empty = !text.empty() && text.back() == '/';
        if (closing) text.remove_prefix(1);
        const std::string_view name = text.substr(0, text.find_first_of(" \t\r\n/"));
        if (!closing) ++depth_;
        if (depth_ > max_depth) return "its elements lie too deep in each other";
        const char* fault = nullptr;
        if (!closing && notes_ == 0) fault = begin(name, text);
        if (fault == nullptr && (closing || empty)) fault = end(name);
        return fault;
    }
    bool whole() const { return networks_.empty(); }

private:
    struct Network {
        int depth = 0;                                // of its <layers>, and so of its <edges>
        std::unordered_map<std::string, int> needed;  // inputs that each layer still needs
    };

    const char* begin(std::string_view name, std::string_view text) {
        if (name == "rt_info") notes_ = depth_;
        if (name == "layers") networks_.push_back({depth_, {}});
        if (name == "edges") {
            if (!inside(0)) return edges_missing;
            in_edges_ = true;
        }
        if (name == "layer") return layer(attribute(text, "id"), attribute(text, "type"));
        if (name == "edge") return edge(attribute(text, "to-layer"));
        return nullptr;
    }

    bool inside(int levels) const { return !networks_.empty() && networks_.back().depth + levels == depth_; }

    const char* layer(std::string_view id, std::string_view type) {
        const bool plain = id.find('&') == id.npos && type.find('&') == type.npos;
        if (!inside(1) || id.empty() || !plain) return edges_missing;
        if (type == "ReadValue" || type == "Assign") return "its network keeps a state from one image to the next";
        const bool source = type == "Parameter" || type == "Const";
        const int needed = source ? 0 : (type == "Broadcast" ? 2 : 1);
        const bool added = networks_.back().needed.try_emplace(std::string(id), needed).second;
        return added ? nullptr : "two of its layers have the same number";
    }

    const char* edge(std::string_view to) {
        if (!in_edges_ || !inside(1)) return nullptr;  // a loop's back edges, or where OpenVINO does not look
        const auto found = networks_.back().needed.find(std::string(to));
        if (found == networks_.back().needed.end()) return edges_missing;
        --found->second;
        return nullptr;
    }

    const char* end(std::string_view name) {
        const char* fault = nullptr;
        if (notes_ == 0 && name == "edges") {
            if (!inside(0)) return edges_missing;
            const auto& needed = networks_.back().needed;
            const auto lacks = [](const auto& layer) { return layer.second > 0; };
            if (std::any_of(needed.begin(), needed.end(), lacks)) fault = "one of its operations has too few inputs";
            networks_.pop_back();
            in_edges_ = false;
        } else if (inside(-1)) {
            fault = edges_missing;  // what holds the layers ends without their edges
        }
        if (depth_ == notes_) notes_ = 0;
        --depth_;
        return fault;
    }

    std::vector<Network> networks_;
    bool in_edges_ = false;
    int depth_ = 0;  // of the element that we are in
    int notes_ = 0;  // the depth of the rt_info that we are in; OpenVINO looks for no layers there
};

}  // namespace

std::string fault_of(std::string_view xml) {
    // OpenVINO also reads UTF-16 and UTF-32, in which no element would be seen here.
    if (xml.find('\0') != xml.npos) return "it is not UTF-8";
    const auto starts = [&](std::size_t position, std::string_view text) {
        return xml.compare(position, text.size(), text) == 0;
    };
    Walk walk;
    for (std::size_t position = 0; (position = xml.find('<', position)) != std::string_view::npos;) {
        if (starts(position, "<!--")) {
            position = behind(xml, position + 4, "-->");
        } else if (starts(position, "<![CDATA[")) {
            position = behind(xml, position, "]]>");
        } else if (starts(position, "<?")) {
            position = behind(xml, position, "?>");
        } else if (starts(position, "<!")) {
            return "it has a document type";
        } else {
            const std::size_t end = tag_end(xml, position);
            if (const char* fault = walk.tag(xml.substr(position + 1, end - position - 1))) return fault;
            position = end;
        }
    }
    return walk.whole() ? "" : edges_missing;
}

std::shared_ptr<ov::Model> read_ir(ov::Core& core, const std::string& xml, const ov::Tensor& weights,
                                   const std::string& name) {
    std::string why = fault_of(xml);
    try {
        if (why.empty()) return core.read_model(xml, weights);
    } catch (const std::exception& error) {
        why = last_line(error);
    }
    throw Error(ErrorKind::model, name + ": not a readable OpenVINO IR (" + why + "); export it again");
}

}  // namespace edgedistill::detail
