// What the C functions that Python calls have in common.

#pragma once

#include <cstdint>

#include "vec.h"

namespace millrace {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // as in native.py

// Calls body(T{}) with the C++ type of a dtype code.
template <class Body>
inline void with_dtype(int dtype, Body&& body) {
  switch (dtype) {
    case kBfloat16:
      return body(bf16{});
    case kFloat16:
      return body(f16{});
    default:
      return body(float{});
  }
}

// Functions that look at values give 0, or which argument holds a bad value and where:
// (index + 1) * 16 + argument. The caller looks the value up for its message.
inline int64_t bad_value(int argument, int64_t index) { return (index + 1) * 16 + argument; }

}  // namespace millrace
