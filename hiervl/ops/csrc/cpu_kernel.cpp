// The CPU kernel. It is compiled once for each instruction set (HIERVL_ISA), so it must not emit shared
// inline functions: the linker could keep the copy for the wrong instruction set.
#include "cpu_kernel.h"

#include "cpu_places.h"
#include "vector.h"

namespace hiervl {
namespace HIERVL_ISA {
namespace {

// Loops over the channels of a row in pieces of constant width: 8, 4, 2 and 1 vectors, then parts of a
// vector. `body.run<N, V>(c)` processes V vectors of N lanes from channel c on.
template <int N, int V, typename Body>
HIERVL_INLINE void run_pieces(int64_t first, int64_t last, const Body& body) {
  for (; last - first >= N * V; first += N * V) body.template run<N, V>(first);
  if constexpr (V > 1) {
    run_pieces<N, V / 2>(first, last, body);
  } else if constexpr (N > 1) {
    run_pieces<N / 2, 1>(first, last, body);
  }
}

template <typename T>
struct Kernel {
  using A = typename Accumulate<T>::type;
  static constexpr int kLanes = kVectorBytes / sizeof(A);

  static int64_t row_stride(const CpuProblem& problem) { return problem.heads * problem.width; }

  // Offset of channel 0 of row 0 for one of batch * heads, in an array shaped like value.
  static int64_t head_offset(const CpuProblem& problem, int64_t head) {
    return head / problem.heads * problem.rows * row_stride(problem) + head % problem.heads * problem.width;
  }

  // Index of (query, head) in an array (batch, queries, heads).
  static int64_t slot(const CpuProblem& problem, int64_t head, int64_t query) {
    return (head / problem.heads * problem.queries + query) * problem.heads + head % problem.heads;
  }

  // Prefetches the row of output, or of its gradient, that is needed kAhead queries later.
  static void prefetch_row(const CpuProblem& problem, const T* row) {
    prefetch_bytes(row + kAhead * row_stride(problem), 0, problem.width * sizeof(T));
  }

  template <typename To, typename From>
  struct CopyRow {
    const From* from;
    To* to;

    template <int N, int V>
    HIERVL_INLINE void run(int64_t c) const {
      for (int v = 0; v < V; ++v) store<N>(load<N>(from + c + v * N), to + c + v * N);
    }
  };

  // Splits items [begin, end) by head and calls f(head, first query, last query, rows, row stride) for
  // each part. `rows` points to the head's rows of value, packed into the scratch memory unless it is null.
  template <typename F>
  static void for_each_head(const CpuProblem& problem, int64_t begin, int64_t end, void* scratch, const F& f) {
    while (begin < end) {
      const int64_t head = begin / problem.queries, head_end = (head + 1) * problem.queries;
      const int64_t stop = end < head_end ? end : head_end;
      const int64_t first = begin - head * problem.queries, last = stop - head * problem.queries;
      const T* value = static_cast<const T*>(problem.value) + head_offset(problem, head);
      if (scratch != nullptr) {
        A* packed = static_cast<A*>(scratch);
        for (int64_t row = 0; row < problem.rows; ++row) {
          const CopyRow<A, T> body{value + row * row_stride(problem), packed + row * problem.width};
          run_pieces<kLanes, 8>(0, problem.width, body);
        }
        f(head, first, last, packed, problem.width);
      } else {
        f(head, first, last, value, row_stride(problem));
      }
      begin = stop;
    }
  }

  // output[c] = sum over places and corners of weight * value[c]
  template <typename S>
  struct Gather {
    const CpuProblem& problem;
    Places<A>& places;
    const S* value;
    int64_t stride;
    int64_t offset;  // offset of the first place of this (query, head)
    T* output;

    template <int N, int V>
    __attribute__((noinline)) void run(int64_t channel) const {
      Vector<A, N> total[V];
      for (int v = 0; v < V; ++v) total[v] = Vector<A, N>{};
      for (int first = 0; first < problem.places; first += kBlock) {
        const int left = problem.places - first, count = left < kBlock ? left : kBlock;
        if (problem.places > kBlock) Geometry<A>::template locate<false>(problem, offset, first, count, places);
        add_block<N, V>(value + channel, count, total);
      }
      for (int v = 0; v < V; ++v) store<N>(total[v], output + channel + v * N);
    }

    template <int N, int V>
    HIERVL_INLINE void add_block(const S* rows, int count, Vector<A, N> total[V]) const {
      // Two sums per vector if there are enough registers, because additions to a single sum depend on each other.
      constexpr int kSums = V >= 8 ? 1 : 2;
      Vector<A, N> sum[kSums][V];
      for (int v = 0; v < V; ++v) {
        for (int s = 0; s < kSums; ++s) sum[s][v] = Vector<A, N>{};
      }
      const int64_t distance = stride;
      for (int i = 0; i < count; ++i) {
        if (!places.any[i]) continue;
        for (int c = 0; c < 4; ++c) {
          const S* row = rows + places.row[c][i] * distance;
          for (int v = 0; v < V; ++v) sum[c % kSums][v] += places.weight[c][i] * load<N>(row + v * N);
        }
      }
      for (int v = 0; v < V; ++v) {
        for (int s = 0; s < kSums; ++s) total[v] += sum[s][v];
      }
    }
  };

  static void forward(const CpuProblem& problem, int64_t begin, int64_t end, void* scratch) {
    Places<A> places;
    const auto one_head = [&](int64_t head, int64_t first, int64_t last, const auto* value, int64_t stride) {
      for (int64_t query = first; query < last; ++query) {
        const int64_t at = slot(problem, head, query), offset = at * problem.places;
        if (problem.places <= kBlock) Geometry<A>::template locate<false>(problem, offset, 0, problem.places, places);
        T* output = static_cast<T*>(problem.output) + at * problem.width;
        prefetch_row(problem, output);
        using S = std::remove_const_t<std::remove_pointer_t<decltype(value)>>;
        run_pieces<kLanes, 8>(0, problem.width, Gather<S>{problem, places, value, stride, offset, output});
      }
    };
    for_each_head(problem, begin, end, scratch, one_head);
  }

  // dot[4 i + c] += <output gradient, corner c of place i>
  template <typename S>
  struct Dots {
    Places<A>& places;
    const S* value;
    int64_t stride;
    const T* grad_output;
    int count;

    template <int N, int V>
    __attribute__((noinline)) void run(int64_t channel) const {
      Vector<A, N> grad[V];
      for (int v = 0; v < V; ++v) grad[v] = load<N>(grad_output + channel + v * N);
      const S* rows = value + channel;
      const int64_t distance = stride;
      for (int i = 0; i < count; ++i) {
        if (!places.any[i]) continue;
        Vector<A, N> product[4];
        for (int c = 0; c < 4; ++c) {
          const S* row = rows + places.row[c][i] * distance;
          product[c] = grad[0] * load<N>(row);
          for (int v = 1; v < V; ++v) product[c] += grad[v] * load<N>(row + v * N);
        }
        store<4>(load<4>(places.dot + 4 * i) + horizontal_sums<A, N>(product), places.dot + 4 * i);
      }
    }
  };

  static void backward_places(const CpuProblem& problem, int64_t begin, int64_t end, void* scratch) {
    Places<A> places;
    const auto one_head = [&](int64_t head, int64_t first, int64_t last, const auto* value, int64_t stride) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(value)>>;
      for (int64_t query = first; query < last; ++query) {
        const int64_t at = slot(problem, head, query), offset = at * problem.places;
        const T* grad_output = static_cast<const T*>(problem.grad_output) + at * problem.width;
        prefetch_row(problem, grad_output);
        for (int block = 0; block < problem.places; block += kBlock) {
          const int left = problem.places - block, count = left < kBlock ? left : kBlock;
          Geometry<A>::template locate<true>(problem, offset, block, count, places);
          run_pieces<kLanes, 8>(0, problem.width, Dots<S>{places, value, stride, grad_output, count});
          Geometry<A>::write_gradients(problem, offset, block, count, places);
        }
      }
    };
    for_each_head(problem, begin, end, scratch, one_head);
  }

  // sums[corner][c] += weight * grad_output[c]
  struct Scatter {
    const Places<A>& places;
    A* sums;
    int64_t stride;
    const T* grad_output;
    int count;

    template <int N, int V>
    __attribute__((noinline)) void run(int64_t channel) const {
      Vector<A, N> grad[V];
      for (int v = 0; v < V; ++v) grad[v] = load<N>(grad_output + channel + v * N);
      A* rows = sums + channel;
      const int64_t distance = stride;
      for (int i = 0; i < count; ++i) {
        if (!places.any[i]) continue;
        A* row[4];
        A weight[4];
        for (int c = 0; c < 4; ++c) row[c] = rows + places.row[c][i] * distance, weight[c] = places.weight[c][i];
        for (int c = 0; c < 4; ++c) {
          // A corner outside the level has a clamped row and weight 0, so adding it has no effect.
          for (int v = 0; v < V; ++v) store<N>(load<N>(row[c] + v * N) + weight[c] * grad[v], row[c] + v * N);
        }
      }
    }
  };

  static void backward_value(const CpuProblem& problem, int64_t head, int64_t first, int64_t last, void* scratch) {
    Places<A> places;
    A* sums = static_cast<A*>(scratch);
    const int64_t channels = last - first;
    for (int64_t i = 0; i < problem.rows * channels; ++i) sums[i] = 0;
    for (int64_t query = 0; query < problem.queries; ++query) {
      const int64_t at = slot(problem, head, query);
      const T* grad_output = static_cast<const T*>(problem.grad_output) + at * problem.width + first;
      prefetch_row(problem, grad_output);
      for (int block = 0; block < problem.places; block += kBlock) {
        const int left = problem.places - block, count = left < kBlock ? left : kBlock;
        Geometry<A>::template locate<false>(problem, at * problem.places, block, count, places);
        run_pieces<kLanes, 8>(0, channels, Scatter{places, sums, channels, grad_output, count});
      }
    }
    T* grad_value = static_cast<T*>(problem.grad_value) + head_offset(problem, head) + first;
    for (int64_t row = 0; row < problem.rows; ++row) {
      const CopyRow<T, A> body{sums + row * channels, grad_value + row * row_stride(problem)};
      run_pieces<kLanes, 8>(0, channels, body);
    }
  }

  static CpuKernel table() { return {forward, backward_places, backward_value}; }
};

}  // namespace

CpuKernel cpu_kernel(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat: return Kernel<float>::table();
    case ScalarType::kDouble: return Kernel<double>::table();
    case ScalarType::kHalf: return Kernel<Half>::table();
    default: return Kernel<BFloat16>::table();
  }
}

}  // namespace HIERVL_ISA
}  // namespace hiervl
