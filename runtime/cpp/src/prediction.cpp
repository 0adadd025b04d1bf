#include <edgedistill/prediction.hpp>

#include <algorithm>
#include <numeric>

namespace edgedistill {

std::vector<Score> Prediction::top_k(int k, const std::vector<std::string>& labels) const {
    std::vector<int> order(probabilities.size());
    std::iota(order.begin(), order.end(), 0);
    const std::size_t count = std::min(order.size(), static_cast<std::size_t>(std::max(k, 0)));
    const auto likelier = [this](int one, int other) {
        const float left = probabilities[static_cast<std::size_t>(one)];
        const float right = probabilities[static_cast<std::size_t>(other)];
        return left != right ? left > right : one < other;
    };
    const auto end = order.begin() + static_cast<std::ptrdiff_t>(count);
    std::partial_sort(order.begin(), end, order.end(), likelier);
    std::vector<Score> scores;
    scores.reserve(count);
    for (std::size_t number = 0; number < count; ++number) {
        const auto place = static_cast<std::size_t>(order[number]);
        scores.push_back({order[number], place < labels.size() ? labels[place] : std::string(), probabilities[place]});
    }
    return scores;
}

}  // namespace edgedistill
