// Runs CUDA kernels on the host, so that tests execute the same source as a GPU.
//
// The threads of a block are fibers on one OS thread, and blocks run one after another. A thread
// runs until it ends or reaches a barrier (__syncthreads, or a shuffle, which waits for all lanes of
// its warp). Two mistakes that cause a hang or undefined data on a GPU are errors here: a barrier
// that some threads never reach, and a shuffle that includes a lane which has ended.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSlotBytes = 16;  // maximum size of a shuffled value

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kEnded };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  dim3 thread;
  int shuffles = 0;  // number so far; its parity selects the set of slots
  const char* waits_for = "";
};

struct Warp {
  // Two sets, so that a lane can write its next value while another lane still reads the previous one.
  char slots[2][kWarpSize][kSlotBytes];
};

struct Machine {
  ucontext_t scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::function<void()> kernel;
  Fiber* running = nullptr;
  int running_index = 0;
  int threads = 0;
  dim3 grid, block, block_index;
  bool reversed = false;  // run the last thread first, to expose results that depend on the order
  std::string error;
};

inline Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

inline void fail(const std::string& message) {
  if (machine().error.empty()) machine().error = message;
}

inline void enter_fiber() {
  Machine& m = machine();
  m.kernel();
  m.running->state = State::kEnded;
  swapcontext(&m.running->context, &m.scheduler);
}

inline void wait_at(State state, const char* what) {
  Machine& m = machine();
  m.running->state = state;
  m.running->waits_for = what;
  swapcontext(&m.running->context, &m.scheduler);
}

inline bool all_in(int first, int last, State state, bool or_ended) {
  Machine& m = machine();
  for (int i = first; i < last; ++i) {
    const State fiber_state = m.fibers[i]->state;
    if (fiber_state != state && !(or_ended && fiber_state == State::kEnded)) return false;
  }
  return true;
}

inline void release(int first, int last, State state) {
  for (int i = first; i < last; ++i) {
    Fiber& fiber = *machine().fibers[i];
    if (fiber.state == state) fiber.state = State::kReady;
  }
}

// Resumes each thread that is ready. Returns false if there was none.
inline bool run_round() {
  Machine& m = machine();
  bool moved = false;
  for (int turn = 0; turn < m.threads; ++turn) {
    const int i = m.reversed ? m.threads - 1 - turn : turn;
    Fiber& fiber = *m.fibers[i];
    if (fiber.state != State::kReady) continue;
    m.running = &fiber;
    m.running_index = i;
    swapcontext(&m.scheduler, &fiber.context);
    moved = true;
  }
  return moved;
}

inline void open_barriers() {
  Machine& m = machine();
  if (all_in(0, m.threads, State::kAtBlockBarrier, true)) release(0, m.threads, State::kAtBlockBarrier);
  for (int first = 0; first < m.threads; first += kWarpSize) {
    const int last = first + kWarpSize < m.threads ? first + kWarpSize : m.threads;
    if (all_in(first, last, State::kAtWarpBarrier, false)) release(first, last, State::kAtWarpBarrier);
  }
}

inline void start_fiber(Fiber& fiber, int index) {
  Machine& m = machine();
  const unsigned plane = m.block.x * m.block.y;
  fiber.thread = {index % m.block.x, index / m.block.x % m.block.y, index / plane};
  fiber.state = State::kReady;
  fiber.shuffles = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter_fiber, 0);
}

inline void run_block() {
  Machine& m = machine();
  for (int i = 0; i < m.threads; ++i) start_fiber(*m.fibers[i], i);
  while (!all_in(0, m.threads, State::kEnded, true)) {
    if (!run_round()) {
      std::string what;
      for (int i = 0; i < m.threads; ++i) {
        if (m.fibers[i]->state != State::kEnded) what = m.fibers[i]->waits_for;
      }
      return fail("deadlock: not every thread reaches " + what);
    }
    open_barriers();
  }
}

template <typename Kernel>
void launch(dim3 grid, dim3 block, Kernel kernel) {
  Machine& m = machine();
  m.kernel = kernel;
  m.grid = grid;
  m.block = block;
  m.threads = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(m.fibers.size()) < m.threads) m.fibers.emplace_back(new Fiber);
  m.warps.resize((m.threads + kWarpSize - 1) / kWarpSize);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && m.error.empty(); ++x) {
        m.block_index = {x, y, z};
        run_block();
      }
    }
  }
}

// Returns the value of lane `source(lane)`, after all lanes have provided theirs.
template <typename T, typename Source>
T exchange(unsigned mask, T value, Source source, const char* what) {
  static_assert(sizeof(T) <= kSlotBytes, "a shuffle moves at most 16 bytes");
  Machine& m = machine();
  const int index = m.running_index, lane = index % kWarpSize, first = index - lane;
  const int lanes = m.threads - first < kWarpSize ? m.threads - first : kWarpSize;
  const unsigned present = lanes == kWarpSize ? 0xffffffffu : (1u << lanes) - 1u;
  if ((mask & present) != present) fail(std::string(what) + ": only masks of whole warps are supported");
  const int set = m.running->shuffles++ % 2;
  memcpy(m.warps[first / kWarpSize].slots[set][lane], &value, sizeof(T));
  wait_at(State::kAtWarpBarrier, what);
  const int from = source(lane);
  if (from < 0 || from >= lanes) return value;  // as on the hardware
  T result;
  memcpy(&result, m.warps[first / kWarpSize].slots[set][from], sizeof(T));
  return result;
}

}  // namespace simt

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define threadIdx (simt::machine().running->thread)
#define blockIdx (simt::machine().block_index)
#define blockDim (simt::machine().block)
#define gridDim (simt::machine().grid)

inline void __syncthreads() { simt::wait_at(simt::State::kAtBlockBarrier, "__syncthreads"); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return simt::exchange(mask, value, [lane](int) { return lane % simt::kWarpSize; }, "__shfl_sync");
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return simt::exchange(mask, value, [bits](int lane) { return lane ^ bits; }, "__shfl_xor_sync");
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return simt::exchange(mask, value, [delta](int lane) { return lane + static_cast<int>(delta); }, "__shfl_down_sync");
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
inline cudaError_t cudaGetLastError() {
  return simt::machine().error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
inline const char* cudaGetErrorString(cudaError_t) { return simt::machine().error.c_str(); }

#define HIERVL_UNPACK(...) __VA_ARGS__
#define HIERVL_LAUNCH(kernel, blocks, threads, stream, ...)                             \
  simt::launch(dim3{static_cast<unsigned>(blocks)}, dim3{static_cast<unsigned>(threads)}, \
               [=] { (void)(stream); (HIERVL_UNPACK kernel)(__VA_ARGS__); })
