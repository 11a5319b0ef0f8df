// What sampling asks of a row of logits, each in one pass over the vocabulary, or two. A NaN counts as -inf, and of
// equal logits the one with the lower index comes first, so a row has one answer.
#pragma once

#include <cstdint>

#include "threads.h"

namespace carousel {

struct Logits {
  const float* data;  // [rows, vocabulary]
  int64_t rows, vocabulary;
  const float* row(int64_t i) const { return data + i * vocabulary; }
};

// Called by every thread of the team. A row that has a NaN anywhere has NaN for its largest value.
void largest_logits(Team& team, const Logits& logits, float* values, int64_t* indices);  // [rows]

// What follows takes logits over a temperature, one for each row.
void log_sum_exps(Team& team, const Logits& logits, const float* temperatures, float* sums);  // [rows]

// The first token at which the cumulative sum of the softmax exceeds the row's number: [rows].
void draw(Team& team, const Logits& logits, const float* temperatures, const double* numbers, int64_t* tokens);

// Narrows a choice: to the top_k likeliest tokens (0: all), of these to the smallest set whose probabilities sum to
// top_p, and of these to the ones at least min_p times as likely as the likeliest.
struct Truncation {
  const int64_t* top_k;  // [rows], each of them
  const double* top_p;
  const double* min_p;
};

// The same for rows whose choice is narrowed. Takes O(vocabulary), however many tokens are left of it: one user's
// flat distribution, which would otherwise be sorted, does not hold up the others.
void draw_truncated(Team& team, const Logits& logits, const float* temperatures, const Truncation& truncation,
                    const double* numbers, int64_t* tokens);

// The `count` largest logits of each row, in falling order: [rows, count].
void top_candidates(Team& team, const Logits& logits, int64_t count, float* values, int64_t* indices);

}  // namespace carousel
