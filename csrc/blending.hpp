#pragma once

#include "span.hpp"

namespace aquila {

// Which data set each sample of a blend comes from, and which of that set's samples it is.
//
// Sample i goes to the set that lags furthest behind weight * max(i, 1), the first of equals. dataset and sample have
// the length of the blend.
void fill_blending(Span<const double> weights, Span<int16_t> dataset, Span<int64_t> sample);

// The same in proportion to the sizes, until every set is used up; dataset and sample have the sum of sizes.
void fill_exhaustive_blending(Span<const int64_t> sizes, Span<int16_t> dataset, Span<int64_t> sample);

}  // namespace aquila
