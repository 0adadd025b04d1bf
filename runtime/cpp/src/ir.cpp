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
        if (!closing && !empty) ++depth_;
        if (depth_ > max_depth) return "its elements lie too deep in each other";
        const char* fault = nullptr;
        parent_ = empty ? depth_ : depth_ - 1;
        if (notes_ == 0 && !closing) fault = begin(name, text);
        if (fault == nullptr && notes_ == 0 && (closing || empty) && name == "edges") fault = end_of_edges();
        if (fault == nullptr && closing && !networks_.empty() && networks_.back().parent == depth_)
            fault = edges_missing;
        if (!closing && !empty && notes_ == 0 && name == "rt_info") notes_ = depth_;
        if (closing && depth_-- == notes_) notes_ = 0;
        return fault;
    }
    bool whole() const { return networks_.empty(); }

private:
    const char* begin(std::string_view name, std::string_view text) {
        if (name == "layers") networks_.push_back({parent_, {}});
        if (name == "layer") return layer(attribute(text, "id"), attribute(text, "type"));
        if (name == "edge") return edge(attribute(text, "to-layer"));
        return nullptr;
    }

    const char* layer(std::string_view id, std::string_view type) {
        if (networks_.empty() || id.empty() || (std::string(id) + std::string(type)).find('&') != std::string::npos) {
            return edges_missing;
        }
        if (type == "ReadValue" || type == "Assign") return "its network keeps a state from one image to the next";
        const bool source = type == "Parameter" || type == "Const";
        const bool added = networks_.back()
                               .needed.try_emplace(std::string(id), source                ? 0
                                                                    : type == "Broadcast" ? 2
                                                                                          : 1)
                               .second;
        return added ? nullptr : "two of its layers have the same number";
    }

    const char* edge(std::string_view to) {
        if (networks_.empty()) return edges_missing;
        auto& needed = networks_.back().needed;
        const auto found = needed.find(std::string(to));
        if (found == needed.end()) return edges_missing;
        --found->second;
        return nullptr;
    }

    const char* end_of_edges() {
        if (networks_.empty() || networks_.back().parent != parent_) return edges_missing;
        const auto& needed = networks_.back().needed;
        const bool missing =
            std::any_of(needed.begin(), needed.end(), [](const auto& layer) { return layer.second > 0; });
        networks_.pop_back();
        return missing ? "one of its operations has too few inputs" : nullptr;
    }

    struct Network {
        int parent;                                   // the depth of the element whose layers and edges these are
        std::unordered_map<std::string, int> needed;  // inputs that each layer still needs
    };
    std::vector<Network> networks_;
    int depth_ = 0;
    int parent_ = 0;  // the depth of the element around the one that we are at
    int notes_ = 0;   // the depth of the rt_info that we are in; OpenVINO looks for no layers there
};

}  // namespace

std::string fault_of(std::string_view xml) {
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
