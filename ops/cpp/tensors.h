// PyTorch's tensors for operators.cpp: checks, contiguous copies, pointers. Of PyTorch's headers, which take longer to
// compile than the kernels, these are the ones of its stable ABI, and no kernel includes them.

#pragma once

// The oldest PyTorch that pyproject.toml allows.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

namespace operators {
namespace {

using torch::stable::Tensor;
using Type = torch::headeronly::ScalarType;
using Sizes = std::vector<int64_t>;

void check(bool holds, const char *message) {
    if (!holds) throw std::runtime_error(message);
}

int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

bool has(const Tensor &t, Type type, const Sizes &sizes) {
    const auto own = t.sizes();
    return t.is_cpu() && t.scalar_type() == type && std::equal(own.begin(), own.end(), sizes.begin(), sizes.end());
}

Tensor dense(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> dense(const std::optional<Tensor> &t) { return t ? std::optional(dense(*t)) : t; }

Tensor empty(const Tensor &like, const Sizes &sizes, Type type) {
    return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, type);
}

template <class T>
const T *read(const Tensor &t) {
    return static_cast<const T *>(t.const_data_ptr());
}

template <class T>
const T *read(const std::optional<Tensor> &t) {
    return t ? read<T>(*t) : nullptr;
}

template <class T>
T *write(const Tensor &t) {
    return static_cast<T *>(t.mutable_data_ptr());
}

// Whether low <= i < high for each of these.
bool within(const Tensor &indices, int64_t low, int64_t high) {
    int64_t least = low, most = low;
    const int64_t *i = read<int64_t>(indices), *end = i + indices.numel();
    for (; i < end; ++i) least = std::min(least, *i), most = std::max(most, *i);
    return indices.numel() == 0 || (least >= low && most < high);
}

}  // namespace
}  // namespace operators
