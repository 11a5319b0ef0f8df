// Errors found at the boundary: they reach Python as ValueError.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

namespace carousel {

// No streams: they need the locales of whichever C++ library was loaded first.
template <class Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) return std::to_string(part);
  else return part;
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  throw std::invalid_argument((std::string() + ... + text_of(parts)));
}

}  // namespace carousel
