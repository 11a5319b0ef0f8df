// What a request changes of its logits before a token is chosen from them.
#pragma once

#include <cstdint>

#include "sampler.h"
#include "threads.h"

namespace carousel {

// Some rows of logits and what is done to each, in this order: penalties, biases, the mask. Entries of row i are
// those from starts[i] to starts[i + 1].
struct Steered {
  int64_t count;            // rows that are changed
  const int64_t* rows;      // [count], each one once
  const float* penalties;   // [count, 3]: repetition, frequency, presence
  const int64_t* seen_starts;  // [count + 1]
  const int64_t* seen;      // tokens of the text so far, each one once
  const float* times;       // how often the answer has each
  const int64_t* bias_starts;  // [count + 1]
  const int64_t* biased;    // tokens; one may be there several times
  const float* biases;
  const int64_t* masks;     // [count]: which row of `allowed`, or -1
  const uint32_t* allowed;  // [masks, words]: a bit for each token
  int64_t words;
};

// Throws unless every row and token is one of the logits, and each entry one of the lists.
void check_steered(const Steered& steered, const Logits& logits, int64_t num_seen, int64_t num_biased,
                   int64_t num_masks);

// Called by every thread of the team. `logits` is [rows, vocabulary]; tokens are below the vocabulary.
void steer(Team& team, float* logits, int64_t vocabulary, const Steered& steered);

}  // namespace carousel
