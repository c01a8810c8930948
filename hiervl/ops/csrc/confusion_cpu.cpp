// Counts pixels by (ground-truth class, predicted class), for integer CPU tensors.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <type_traits>

namespace hiervl {
namespace {

// Label maps are smooth, so neighboring pixels often increment the same cell, and each increment would
// wait for the previous one. If the table is small, neighbors therefore use different copies of it.
constexpr int64_t kCopies = 8;
constexpr int64_t kSmallTable = int64_t{1} << 15;  // cells
constexpr int64_t kBlock = 1024;  // pixels whose cell indices are computed at a time, in vector code
constexpr int64_t kGrain = int64_t{1} << 16;  // minimum number of pixels per thread
constexpr int64_t kMostClasses = int64_t{1} << 15;  // cell indices have 32 bits

// The type for comparisons. `int` vectorizes on every processor, and 16 bits give twice as many lanes.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 1, int16_t, std::conditional_t<sizeof(T) == 8, int64_t, int>>;

// The number of classes as an upper bound for values of type T. It is clamped to 256 for bytes.
template <typename T>
Wide<T> bound(int classes) {
  return sizeof(T) == 1 ? std::min(classes, 256) : classes;
}

// Computes the cell index of each pixel. Row K is for ignored pixels, row K + 1 and column K for values out
// of range.
template <typename Cell, typename Label, typename Prediction>
void number_cells(const Label* __restrict label, const Prediction* __restrict prediction, int64_t count, int classes,
                  int ignore_label, Cell* __restrict cell) {
  // An ignore label that does not fit into a byte matches no pixel, just like -1.
  const bool out_of_reach = sizeof(Label) == 1 && (ignore_label < 0 || ignore_label > 255);
  const Wide<Label> ignored = out_of_reach ? -1 : ignore_label, labels = bound<Label>(classes);
  const Wide<Prediction> guesses = bound<Prediction>(classes);
  for (int64_t i = 0; i < count; ++i) {
    const Wide<Label> truth = label[i];
    const Wide<Prediction> guess = prediction[i];
    const Cell outside = truth == ignored ? classes : classes + 1;
    const Cell row = truth >= 0 && truth < labels ? static_cast<Cell>(truth) : outside;
    const Cell column = guess >= 0 && guess < guesses ? static_cast<Cell>(guess) : static_cast<Cell>(classes);
    cell[i] = row * (classes + 1) + column;
  }
}

// Adds the pixels to kCopies tables that are `distance` apart; with distance 0, to a single table.
template <typename Cell, typename Label, typename Prediction>
void add_pixels(const Label* label, const Prediction* prediction, int64_t pixels, int classes, int ignore_label,
                int64_t* table, int64_t distance) {
  Cell cell[kBlock];
  for (int64_t first = 0; first < pixels; first += kBlock) {
    const int64_t count = std::min(kBlock, pixels - first);
    number_cells(label + first, prediction + first, count, classes, ignore_label, cell);
    int64_t i = 0;
    for (; i + kCopies <= count; i += kCopies) {
      for (int64_t copy = 0; copy < kCopies; ++copy) ++table[copy * distance + cell[i + copy]];
    }
    for (; i < count; ++i) ++table[cell[i]];
  }
}

template <typename Label, typename Prediction>
void count(const Label* label, const Prediction* prediction, int64_t pixels, int classes, int ignore_label,
           at::Tensor& result) {
  const int64_t cells = result.numel(), copies = cells <= kSmallTable ? kCopies : 1;
  const bool narrow = sizeof(Label) == 1 && sizeof(Prediction) == 1 && cells <= 1 << 16;
  const auto add = narrow ? add_pixels<uint16_t, Label, Prediction> : add_pixels<int, Label, Prediction>;
  std::mutex adding;
  // Clearing and summing the tables must not take longer than counting.
  at::parallel_for(0, pixels, std::max(kGrain, std::max<int64_t>(copies, 4) * cells), [&](int64_t begin, int64_t end) {
    at::Tensor tables = at::zeros({copies, cells}, at::kLong);
    int64_t* table = tables.mutable_data_ptr<int64_t>();
    add(label + begin, prediction + begin, end - begin, classes, ignore_label, table, copies > 1 ? cells : 0);
    const std::lock_guard<std::mutex> lock(adding);
    int64_t* sum = result.mutable_data_ptr<int64_t>();
    for (int64_t copy = 0; copy < copies; ++copy) {
      for (int64_t i = 0; i < cells; ++i) sum[i] += table[copy * cells + i];
    }
  });
}

// Calls f with a pointer of the tensor's element type.
template <typename F>
void with_data(const at::Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kByte: return f(tensor.const_data_ptr<uint8_t>());
    case at::kShort: return f(tensor.const_data_ptr<int16_t>());
    case at::kInt: return f(tensor.const_data_ptr<int32_t>());
    case at::kLong: return f(tensor.const_data_ptr<int64_t>());
    default:
      TORCH_CHECK(false, "confusion_counts: expected uint8, int16, int32 or int64, got ", tensor.scalar_type());
  }
}

at::Tensor confusion_counts(const at::Tensor& label_in, const at::Tensor& prediction_in, int64_t classes,
                            int64_t ignore_label) {
  TORCH_CHECK(label_in.sizes() == prediction_in.sizes(), "confusion_counts: label ", label_in.sizes(),
              " and prediction ", prediction_in.sizes(), " differ in shape");
  TORCH_CHECK(classes > 0 && classes <= kMostClasses, "confusion_counts: ", classes, " classes; at most ",
              kMostClasses, " can be counted");
  TORCH_CHECK(ignore_label == static_cast<int>(ignore_label), "confusion_counts: ignore label ", ignore_label,
              " has more than 32 bits");
  const at::Tensor label = label_in.contiguous(), prediction = prediction_in.contiguous();
  at::Tensor result = at::zeros({classes + 2, classes + 1}, at::kLong);
  with_data(label, [&](const auto* labels) {
    with_data(prediction, [&](const auto* predictions) {
      count(labels, predictions, label.numel(), static_cast<int>(classes), static_cast<int>(ignore_label), result);
    });
  });
  return result;
}

}  // namespace
}  // namespace hiervl

TORCH_LIBRARY_IMPL(hiervl, CPU, m) {
  m.impl("confusion_counts", &hiervl::confusion_counts);
}
