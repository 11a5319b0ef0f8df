#include "steering.h"

#include <limits>

#include "require.h"
#include "simd.h"

namespace carousel {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int64_t kBits = 32;

void check_entries(const int64_t* starts, int64_t count, const int64_t* tokens, int64_t num_tokens,
                   int64_t vocabulary) {
  require(starts[0] == 0 && starts[count] == num_tokens, "entries must begin at 0 and end at ", num_tokens);
  for (int64_t i = 0; i < count; ++i) require(starts[i] <= starts[i + 1], "entries decrease at ", i);
  for (int64_t i = 0; i < num_tokens; ++i)
    require(tokens[i] >= 0 && tokens[i] < vocabulary, "token ", tokens[i], " is not in [0, ", vocabulary, ")");
}

void penalize(float* logits, const Steered& steered, int64_t i) {
  const float* penalty = steered.penalties + 3 * i;
  const float repetition = penalty[0], frequency = penalty[1], presence = penalty[2];
  for (int64_t entry = steered.seen_starts[i]; entry < steered.seen_starts[i + 1]; ++entry) {
    float& logit = logits[steered.seen[entry]];
    const float times = steered.times[entry];
    logit = logit > 0 ? logit / repetition : logit * repetition;
    logit -= frequency * times + (times > 0 ? presence : 0.0f);
  }
}

void mask(float* logits, int64_t vocabulary, const uint32_t* allowed) {
  int64_t first = 0;
  for (; first + kBits <= vocabulary; first += kBits) {
    const uint32_t word = allowed[first / kBits];
    if (word == 0xffffffffu) continue;
    for (int64_t lane = 0; lane < kBits; lane += kLanes) {
      float* const at = logits + first + lane;
      const i32v bits = splat(int32_t(word)) >> (lane_index() + int32_t(lane)) & 1;
      store(at, bits != 0 ? load(at) : splat(kNever));
    }
  }
  for (int64_t token = first; token < vocabulary; ++token)
    if ((allowed[token / kBits] >> (token - first) & 1) == 0) logits[token] = kNever;
}

}  // namespace

void check_steered(const Steered& steered, const Logits& logits, int64_t num_seen, int64_t num_biased,
                   int64_t num_masks) {
  check_entries(steered.seen_starts, steered.count, steered.seen, num_seen, logits.vocabulary);
  check_entries(steered.bias_starts, steered.count, steered.biased, num_biased, logits.vocabulary);
  require(num_masks == 0 || steered.words * kBits >= logits.vocabulary, "masks of ", steered.words,
          " words are too short");
  for (int64_t i = 0; i < steered.count; ++i) {
    require(steered.rows[i] >= 0 && steered.rows[i] < logits.rows, "there is no row ", steered.rows[i]);
    require(steered.masks[i] < num_masks, "there is no mask ", steered.masks[i]);
  }
}

void steer(Team& team, float* logits, int64_t vocabulary, const Steered& steered) {
  team.for_each(steered.count, 1, [&](int64_t i) {
    float* row = logits + steered.rows[i] * vocabulary;
    penalize(row, steered, i);
    for (int64_t entry = steered.bias_starts[i]; entry < steered.bias_starts[i + 1]; ++entry)
      row[steered.biased[entry]] += steered.biases[entry];
    if (steered.masks[i] >= 0) mask(row, vocabulary, steered.allowed + steered.masks[i] * steered.words);
  });
}

}  // namespace carousel
