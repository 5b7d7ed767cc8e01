#include "adamw.hpp"

#include <algorithm>
#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

// Eight lanes where the processor has them, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define AQUILA_LANES __attribute__((target_clones("avx2", "default")))
#else
#define AQUILA_LANES
#endif

namespace aquila {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements below which a thread costs more than it takes over

AQUILA_LANES void update(float* __restrict param, const float* __restrict grad, float* __restrict exp_avg,
                         float* __restrict exp_avg_sq, int64_t size, const AdamwScalars& given) {
  const AdamwScalars s = given;
  for (int64_t i = 0; i < size; ++i) {
    const float g = grad[i] * s.factor;
    const float mean = exp_avg[i] + s.one_minus_beta1 * (g - exp_avg[i]);
    const float square = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(square) / s.correction + s.eps;
    exp_avg[i] = mean;
    exp_avg_sq[i] = square;
    param[i] = param[i] * s.decay + mean * s.rate / denominator;
  }
}

}  // namespace

void adamw(Span<float> param, Span<const float> grad, Span<float> exp_avg, Span<float> exp_avg_sq,
           const AdamwScalars& scalars, int threads) {
  const int64_t parts = std::clamp<int64_t>(param.size / kGrain, 1, std::max(threads, 1));
  const auto part = [&](int64_t index) {
    const int64_t begin = param.size * index / parts, end = param.size * (index + 1) / parts;
    update(param.data + begin, grad.data + begin, exp_avg.data + begin, exp_avg_sq.data + begin, end - begin, scalars);
  };
  std::vector<std::thread> others;
  others.reserve(parts);
  int64_t started = 1;
  try {
    for (; started < parts; ++started) others.emplace_back(part, started);
  } catch (const std::system_error&) {
    // The system gives no more threads, as under a limit of processes: this one does their parts, to the same bits. No
    // test: such a limit does not bind root, and it holds for all processes of a user.
  }
  part(0);
  for (int64_t index = started; index < parts; ++index) part(index);
  for (std::thread& other : others) other.join();
}

}  // namespace aquila
