// A small pool of threads for loops whose iterations are independent.
//
// Iterations are handed out one by one from a counter, the calling thread takes part, and nobody
// waits for a thread that has not taken one: a worker that the system runs elsewhere costs nothing.
// Waiting is a short bounded spin (so that the ops of one forward pass find the workers awake) and
// then a block: spinning without bound collapses on a core that is shared with other processes.

#pragma once

#include <cstdint>
#include <type_traits>

namespace millrace {

// Threads that a loop may use, the caller's included; at least 1.
int num_threads();
void set_num_threads(int count);

// Run body(context, i) for all 0 <= i < count, in any order, and return when all are done.
void run_parallel(int64_t count, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel_for(int64_t count, Body&& body) {
  if (count == 1 || num_threads() == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  run_parallel(
      count, [](void* context, int64_t i) { (*static_cast<Plain*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many pieces to cut work of this many nanoseconds into, at most `most`: 1 if threads would
// cost more than they save, otherwise a few for each thread so that uneven cores even out.
int64_t pieces(double nanoseconds, int64_t most);

}  // namespace millrace
