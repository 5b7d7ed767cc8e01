// One AdamW update of flat float32 tensors in one pass over memory: torch.optim.AdamW's formula.
#pragma once

#include <cstdint>

#include "span.hpp"

namespace aquila {

// What is the same for all elements, rounded to float32 as torch rounds the numbers of its float32 kernels.
struct AdamwScalars {
  float factor;  // what gradients are multiplied with as they are read
  float decay;   // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;            //
  float one_minus_beta2;  //
  float rate;             // -lr / (1 - beta1^step)
  float correction;       // sqrt(1 - beta2^step)
  float eps;
};

// Element by element with nothing contracted: the bits depend neither on `threads` nor on how a tensor is cut, nor on
// the processor. All four have one size.
void adamw(Span<float> param, Span<const float> grad, Span<float> exp_avg, Span<float> exp_avg_sq,
           const AdamwScalars& scalars, int threads);

}  // namespace aquila
