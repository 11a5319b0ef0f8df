// Errors found at the boundary: they reach Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace carousel {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace carousel
