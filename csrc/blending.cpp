#include "blending.hpp"

#include <algorithm>
#include <limits>
#include <vector>

namespace aquila {

namespace {

// The set with the largest weight * max(i, 1) - taken; sets with taken == limit are left out.
int64_t furthest_behind(Span<const double> weights, const std::vector<int64_t>& taken,
                        const std::vector<int64_t>& limit, int64_t i) {
  const double position = std::max(static_cast<double>(i), 1.0);
  double largest = std::numeric_limits<double>::lowest();
  int64_t best = 0;
  for (int64_t k = 0; k < weights.size; ++k) {
    const double lag = weights[k] * position - static_cast<double>(taken[k]);
    if (taken[k] < limit[k] && lag > largest) {
      largest = lag;
      best = k;
    }
  }
  return best;
}

void fill(Span<const double> weights, const std::vector<int64_t>& limit, Span<int16_t> dataset, Span<int64_t> sample) {
  std::vector<int64_t> taken(limit.size(), 0);
  for (int64_t i = 0; i < dataset.size; ++i) {
    const int64_t k = furthest_behind(weights, taken, limit, i);
    dataset[i] = static_cast<int16_t>(k);
    sample[i] = taken[k]++;
  }
}

}  // namespace

void fill_blending(Span<const double> weights, Span<int16_t> dataset, Span<int64_t> sample) {
  fill(weights, std::vector<int64_t>(weights.size, std::numeric_limits<int64_t>::max()), dataset, sample);
}

void fill_exhaustive_blending(Span<const int64_t> sizes, Span<int16_t> dataset, Span<int64_t> sample) {
  std::vector<double> weights(sizes.size);
  for (int64_t k = 0; k < sizes.size; ++k) {
    weights[k] = static_cast<double>(sizes[k]) / static_cast<double>(dataset.size);
  }
  fill({weights.data(), sizes.size}, {sizes.data, sizes.data + sizes.size}, dataset, sample);
}

}  // namespace aquila
