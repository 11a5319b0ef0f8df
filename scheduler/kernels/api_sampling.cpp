// What is seen from outside of the kernels that look at logits.
#include "api.h"
#include "sampler.h"
#include "steering.h"

namespace carousel {
namespace {

Logits logits_of(const Array& logits) {
  const float* values = data<float>(logits, "logits", {kAny, kAny});
  require(logits.sizes[1] > 0, "logits must have a vocabulary");
  return {values, logits.sizes[0], logits.sizes[1]};
}

}  // namespace

struct ArgmaxCall {
  Array logits;
  int64_t threads;
  Array values, tokens;
};

CAROUSEL_API int carousel_argmax(const ArgmaxCall* call) {
  return guarded([call] {
    const Logits logits = logits_of(call->logits);
    float* values = data<float>(call->values, "values", {logits.rows});
    int64_t* tokens = data<int64_t>(call->tokens, "tokens", {logits.rows});
    check_threads(call->threads);
    parallel(call->threads, [&](Team& team) { largest_logits(team, logits, values, tokens); });
  });
}

struct LogsumexpCall {
  Array logits, temperatures;
  int64_t threads;
  Array sums;
};

CAROUSEL_API int carousel_logsumexp(const LogsumexpCall* call) {
  return guarded([call] {
    const Logits logits = logits_of(call->logits);
    const float* over = data<float>(call->temperatures, "temperatures", {logits.rows});
    float* sums = data<float>(call->sums, "sums", {logits.rows});
    check_threads(call->threads);
    parallel(call->threads, [&](Team& team) { log_sum_exps(team, logits, over, sums); });
  });
}

struct DrawCall {
  Array logits, temperatures, numbers;
  int64_t threads;
  Array tokens;
};

CAROUSEL_API int carousel_draw(const DrawCall* call) {
  return guarded([call] {
    const Logits logits = logits_of(call->logits);
    const float* over = data<float>(call->temperatures, "temperatures", {logits.rows});
    const double* at = data<double>(call->numbers, "numbers", {logits.rows});
    int64_t* tokens = data<int64_t>(call->tokens, "tokens", {logits.rows});
    check_threads(call->threads);
    parallel(call->threads, [&](Team& team) { draw(team, logits, over, at, tokens); });
  });
}

struct DrawTruncatedCall {
  Array logits, temperatures, numbers, top_k, top_p, min_p;
  int64_t threads;
  Array tokens;
};

CAROUSEL_API int carousel_draw_truncated(const DrawTruncatedCall* call) {
  return guarded([call] {
    const Logits logits = logits_of(call->logits);
    const float* over = data<float>(call->temperatures, "temperatures", {logits.rows});
    const double* at = data<double>(call->numbers, "numbers", {logits.rows});
    const Truncation truncation{data<int64_t>(call->top_k, "top_k", {logits.rows}),
                                data<double>(call->top_p, "top_p", {logits.rows}),
                                data<double>(call->min_p, "min_p", {logits.rows})};
    int64_t* tokens = data<int64_t>(call->tokens, "tokens", {logits.rows});
    check_threads(call->threads);
    parallel(call->threads, [&](Team& team) { draw_truncated(team, logits, over, truncation, at, tokens); });
  });
}

struct TopCandidatesCall {
  Array logits;
  int64_t count, threads;
  Array values, tokens;
};

CAROUSEL_API int carousel_top_candidates(const TopCandidatesCall* call) {
  return guarded([call] {
    const Logits logits = logits_of(call->logits);
    const int64_t count = call->count;
    require(count >= 1 && count <= logits.vocabulary, "k must be in [1, ", logits.vocabulary, "], not ", count);
    float* values = data<float>(call->values, "values", {logits.rows, count});
    int64_t* tokens = data<int64_t>(call->tokens, "tokens", {logits.rows, count});
    check_threads(call->threads);
    parallel(call->threads, [&](Team& team) { top_candidates(team, logits, count, values, tokens); });
  });
}

struct SteerCall {
  Array logits, rows, penalties, seen_starts, seen, times, bias_starts, biased, biases, masks, allowed;
  int64_t threads;
};

CAROUSEL_API int carousel_steer(const SteerCall* call) {
  return guarded([call] {
    const Logits logits = logits_of(call->logits);
    const int64_t count = call->rows.sizes[0], num_seen = call->seen.sizes[0], num_biased = call->biased.sizes[0];
    const int32_t* bits = data<int32_t>(call->allowed, "allowed", {kAny, kAny});
    const Steered steered{count,
                          data<int64_t>(call->rows, "rows", {count}),
                          data<float>(call->penalties, "penalties", {count, 3}),
                          data<int64_t>(call->seen_starts, "seen_starts", {count + 1}),
                          data<int64_t>(call->seen, "seen", {num_seen}),
                          data<float>(call->times, "times", {num_seen}),
                          data<int64_t>(call->bias_starts, "bias_starts", {count + 1}),
                          data<int64_t>(call->biased, "biased", {num_biased}),
                          data<float>(call->biases, "biases", {num_biased}),
                          data<int64_t>(call->masks, "masks", {count}),
                          reinterpret_cast<const uint32_t*>(bits),
                          call->allowed.sizes[1]};
    check_steered(steered, logits, num_seen, num_biased, call->allowed.sizes[0]);
    check_threads(call->threads);
    float* values = static_cast<float*>(call->logits.data);
    parallel(call->threads, [&](Team& team) { steer(team, values, logits.vocabulary, steered); });
  });
}

}  // namespace carousel
