// What Python sees of the kernels that look at logits.
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include "binding.h"
#include "sampler.h"
#include "steering.h"

namespace carousel {
namespace {

Logits logits_of(const at::Tensor& logits) {
  const float* values = data<float>(logits, "logits", {kAny, kAny});
  require(logits.size(1) > 0, "logits must have a vocabulary");
  return {values, logits.size(0), logits.size(1)};
}

std::pair<at::Tensor, at::Tensor> argmax(const at::Tensor& tensor, int num_threads) {
  const Logits logits = logits_of(tensor);
  at::Tensor values = at::empty({logits.rows}, at::kFloat), indices = at::empty({logits.rows}, at::kLong);
  float* to = values.data_ptr<float>();
  int64_t* to_index = indices.data_ptr<int64_t>();
  check_threads(num_threads);
  parallel(num_threads, [&](Team& team) { largest_logits(team, logits, to, to_index); });
  return {values, indices};
}

at::Tensor logsumexp(const at::Tensor& tensor, const at::Tensor& temperatures, int num_threads) {
  const Logits logits = logits_of(tensor);
  const float* over = data<float>(temperatures, "temperatures", {logits.rows});
  at::Tensor sums = at::empty({logits.rows}, at::kFloat);
  float* to = sums.data_ptr<float>();
  check_threads(num_threads);
  parallel(num_threads, [&](Team& team) { log_sum_exps(team, logits, over, to); });
  return sums;
}

at::Tensor draw_tokens(const at::Tensor& tensor, const at::Tensor& temperatures, const at::Tensor& numbers,
                       int num_threads) {
  const Logits logits = logits_of(tensor);
  const float* over = data<float>(temperatures, "temperatures", {logits.rows});
  const double* at_numbers = data<double>(numbers, "numbers", {logits.rows});
  at::Tensor tokens = at::empty({logits.rows}, at::kLong);
  int64_t* to = tokens.data_ptr<int64_t>();
  check_threads(num_threads);
  parallel(num_threads, [&](Team& team) { draw(team, logits, over, at_numbers, to); });
  return tokens;
}

at::Tensor draw_truncated_tokens(const at::Tensor& tensor, const at::Tensor& temperatures, const at::Tensor& numbers,
                                 const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p,
                                 int num_threads) {
  const Logits logits = logits_of(tensor);
  const float* over = data<float>(temperatures, "temperatures", {logits.rows});
  const double* at_numbers = data<double>(numbers, "numbers", {logits.rows});
  const Truncation truncation{data<int64_t>(top_k, "top_k", {logits.rows}), data<double>(top_p, "top_p", {logits.rows}),
                              data<double>(min_p, "min_p", {logits.rows})};
  at::Tensor tokens = at::empty({logits.rows}, at::kLong);
  int64_t* to = tokens.data_ptr<int64_t>();
  check_threads(num_threads);
  parallel(num_threads, [&](Team& team) { draw_truncated(team, logits, over, truncation, at_numbers, to); });
  return tokens;
}

std::pair<at::Tensor, at::Tensor> top_logits(const at::Tensor& tensor, int64_t count, int num_threads) {
  const Logits logits = logits_of(tensor);
  require(count >= 1 && count <= logits.vocabulary, "k must be in [1, ", logits.vocabulary, "], not ", count);
  at::Tensor values = at::empty({logits.rows, count}, at::kFloat), indices = at::empty({logits.rows, count}, at::kLong);
  float* to = values.data_ptr<float>();
  int64_t* to_index = indices.data_ptr<int64_t>();
  check_threads(num_threads);
  parallel(num_threads, [&](Team& team) { top_candidates(team, logits, count, to, to_index); });
  return {values, indices};
}

void steer_logits(at::Tensor tensor, const at::Tensor& rows, const at::Tensor& penalties, const at::Tensor& seen_starts,
                  const at::Tensor& seen, const at::Tensor& times, const at::Tensor& bias_starts,
                  const at::Tensor& biased, const at::Tensor& biases, const at::Tensor& masks,
                  const at::Tensor& allowed, int num_threads) {
  const Logits logits = logits_of(tensor);
  const int64_t count = rows.numel();
  const Steered steered{count,
                        data<int64_t>(rows, "rows", {count}),
                        data<float>(penalties, "penalties", {count, 3}),
                        data<int64_t>(seen_starts, "seen_starts", {count + 1}),
                        data<int64_t>(seen, "seen", {kAny}),
                        data<float>(times, "times", {seen.numel()}),
                        data<int64_t>(bias_starts, "bias_starts", {count + 1}),
                        data<int64_t>(biased, "biased", {kAny}),
                        data<float>(biases, "biases", {biased.numel()}),
                        data<int64_t>(masks, "masks", {count}),
                        reinterpret_cast<const uint32_t*>(data<int32_t>(allowed, "allowed", {kAny, kAny})),
                        allowed.size(1)};
  check_steered(steered, logits, seen.numel(), biased.numel(), allowed.size(0));
  check_threads(num_threads);
  float* values = tensor.data_ptr<float>();
  parallel(num_threads, [&](Team& team) { steer(team, values, logits.vocabulary, steered); });
}

}  // namespace

void bind_sampling(py::module_& module) {
  using py::arg;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  module.def("argmax", &argmax, without_gil, arg("logits"), arg("num_threads") = 1);
  module.def("logsumexp", &logsumexp, without_gil, arg("logits"), arg("temperatures"), arg("num_threads") = 1);
  module.def("draw", &draw_tokens, without_gil, arg("logits"), arg("temperatures"), arg("numbers"),
             arg("num_threads") = 1);
  module.def("draw_truncated", &draw_truncated_tokens, without_gil, arg("logits"), arg("temperatures"), arg("numbers"),
             arg("top_k"), arg("top_p"), arg("min_p"), arg("num_threads") = 1);
  module.def("top_candidates", &top_logits, without_gil, arg("logits"), arg("k"), arg("num_threads") = 1);
  module.def("steer", &steer_logits, without_gil, arg("logits"), arg("rows"), arg("penalties"), arg("seen_starts"),
             arg("seen"), arg("times"), arg("bias_starts"), arg("biased"), arg("biases"), arg("masks"), arg("allowed"),
             arg("num_threads") = 1);
}

}  // namespace carousel
