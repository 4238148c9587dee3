// The operators torch.ops.switchyard on a CPU: arguments are checked, results allocated, and a kernel is called. Their
// gradients, shapes and strides for torch.autograd and torch.compile are in ops/cpp/operators.py.
//
// Legend: as in kernels.h.

#include <cmath>
#include <tuple>

#include "kernels.h"
#include "tensors.h"

namespace operators {
namespace {

using switchyard::AttentionShape;
using switchyard::Bf16;
using switchyard::Heads;
using switchyard::Index;
using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

constexpr Index NORM_PART = 64;  // rows over which a norm's weight gradient is added up at once

void check_memory(bool sufficed) { check(sufficed, "not enough memory to pack the operands of a product"); }

// attention.cpp

bool is_heads(const Tensor &t, const Sizes &sizes) { return has(t, Type::BFloat16, sizes); }

// With the width side by side in memory.
Tensor readable(const Tensor &t) { return t.stride(3) == 1 ? t : torch::stable::contiguous(t); }

Heads heads(const Tensor &t_BHSN) {
    Bf16 *data = const_cast<Bf16 *>(read<Bf16>(t_BHSN));  // of a result, which is new, or read only
    return {data, t_BHSN.stride(0), t_BHSN.stride(1), t_BHSN.stride(2)};
}

// Room in which a token's heads lie side by side, as projections want them.
Tensor empty_heads(const Tensor &like_BHSN) {
    const auto sizes = like_BHSN.sizes();
    const Tensor room_SBHN = empty(like_BHSN, {sizes[2], sizes[0], sizes[1], sizes[3]}, Type::BFloat16);
    return torch::stable::transpose(torch::stable::transpose(room_SBHN, 0, 1), 1, 2);
}

AttentionShape attention_shape(const Tensor &q, const Tensor &k, const Tensor &v) {
    check(q.dim() == 4 && k.dim() == 4, "causal_attention takes query [B, H, S, N], key and value [B, G, S, N]");
    const Index B = q.size(0), H = q.size(1), G = k.size(1), S = q.size(2), N = q.size(3);
    check(is_heads(q, {B, H, S, N}) && is_heads(k, {B, G, S, N}) && is_heads(v, {B, G, S, N}),
          "causal_attention takes query [B, H, S, N], key and value [B, G, S, N] in bf16");
    check(G > 0 && H % G == 0, "causal_attention takes a multiple of the key/value heads as heads");
    return {B, H, G, S, N, 1 / std::sqrt(static_cast<float>(N))};
}

Pair causal_attention(const Tensor &query, const Tensor &key, const Tensor &value) {
    const AttentionShape shape = attention_shape(query, key, value);
    const Tensor q = readable(query), k = readable(key), v = readable(value), out = empty_heads(q);
    const Tensor lse = empty(q, {shape.B, shape.H, shape.S}, Type::Float);
    check_memory(switchyard::causal_attention(shape, heads(q), heads(k), heads(v), heads(out), write<float>(lse),
                                              threads()));
    return {out, lse};
}

Triple causal_attention_backward(const Tensor &grad, const Tensor &query, const Tensor &key, const Tensor &value,
                                 const Tensor &output, const Tensor &logsumexp) {
    const AttentionShape shape = attention_shape(query, key, value);
    const Sizes sizes{shape.B, shape.H, shape.S, shape.N}, rows{shape.B, shape.H, shape.S};
    check(is_heads(grad, sizes) && is_heads(output, sizes) && has(logsumexp, Type::Float, rows),
          "causal_attention_backward takes gradient and output as the query is, and logsumexp [B, H, S] in fp32");
    const Tensor q = readable(query), k = readable(key), v = readable(value), out = readable(output);
    const Tensor dout = readable(grad), lse = dense(logsumexp);
    const Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
    check_memory(switchyard::causal_attention_backward(shape, heads(q), heads(k), heads(v), heads(out), heads(dout),
                                                       heads(dq), heads(dk), heads(dv), read<float>(lse), threads()));
    return {dq, dk, dv};
}

void apply_rotary(const Tensor &input, const Tensor &cos, const Tensor &sin, const Tensor &out, bool backward) {
    check(input.dim() == 4, "apply_rotary takes input [S, B, H, N]");
    const Index S = input.size(0), B = input.size(1), H = input.size(2), N = input.size(3);
    check(N % 2 == 0 && is_heads(input, {S, B, H, N}) && is_heads(out, {S, B, H, N}) && out.stride(3) == 1,
          "apply_rotary takes input and out [S, B, H, N] in bf16 with an even N, and an out whose last stride is 1");
    check(has(cos, Type::Float, {S, B, 1, N / 2}) && has(sin, Type::Float, {S, B, 1, N / 2}),
          "apply_rotary takes cos and sin [S, B, 1, N / 2] in fp32");
    const auto by_head = [](const Tensor &t, Bf16 *data) {
        return Heads{data, t.stride(1), t.stride(2), t.stride(0)};
    };
    const Tensor x = readable(input), cosines = dense(cos), sines = dense(sin);
    switchyard::apply_rotary({B, H, H, S, N, 0}, by_head(x, const_cast<Bf16 *>(read<Bf16>(x))), read<float>(cosines),
                             read<float>(sines), backward ? -1 : 1, by_head(out, write<Bf16>(out)), threads());
}

// experts.cpp

// The number of experts.
Index check_groups(const Tensor &groups, Index rows) {
    check(groups.is_cpu() && groups.scalar_type() == Type::Long && groups.dim() == 1 && groups.size(0) > 0 &&
              groups.is_contiguous(),
          "groups must be int64 [experts + 1] and contiguous");
    const Index *start = read<Index>(groups), experts = groups.size(0) - 1;
    check(start[0] == 0 && start[experts] == rows && std::is_sorted(start, start + experts + 1),
          "groups must rise from 0 to the number of rows");
    return experts;
}

// x [R, K], or of x [T, K] the rows that `row` names.
Index check_rows(const Tensor &x, const std::optional<Tensor> &row) {
    check(x.dim() == 2 && has(x, Type::BFloat16, {x.size(0), x.size(1)}), "input must be [R, K] in bf16");
    if (!row) return x.size(0);
    check(row->dim() == 1 && has(*row, Type::Long, {row->size(0)}) && row->is_contiguous() &&
              within(*row, 0, x.size(0)),
          "rows must be int64 [R], contiguous, and rows of the input");
    return row->size(0);
}

Tensor grouped_product(const Tensor &input, const std::optional<Tensor> &row, const Tensor &weight,
                       const Tensor &groups) {
    const Index R = check_rows(input, row), experts = check_groups(groups, R), K = input.size(1);
    check(weight.dim() == 3, "weight must be [experts, K, N]");
    const Index N = weight.size(2);
    check(has(weight, Type::BFloat16, {experts, K, N}), "weight must be [experts, K, N] in bf16");
    const Tensor x = dense(input), y = empty(input, {R, N}, Type::BFloat16);
    Tensor w = weight;
    bool transposed = false;
    if (!w.is_contiguous()) {
        const Tensor other = torch::stable::transpose(weight, 1, 2);
        transposed = other.is_contiguous();
        w = transposed ? other : dense(weight);
    }
    check_memory(switchyard::grouped_product(experts, read<Index>(groups), read<Bf16>(x), read<Index>(row),
                                             read<Bf16>(w), transposed, K, N, write<Bf16>(y), threads()));
    return y;
}

void add_weight_gradient(const Tensor &input, const std::optional<Tensor> &row, const Tensor &grad,
                         const Tensor &groups, const Tensor &to, bool add) {
    const Index R = check_rows(input, row), experts = check_groups(groups, R);
    check(grad.dim() == 2 && has(grad, Type::BFloat16, {R, grad.size(1)}), "grad must be [R, N] in bf16");
    check(has(to, add ? Type::Float : Type::BFloat16, {experts, input.size(1), grad.size(1)}) && to.is_contiguous(),
          "sum must be [experts, K, N] in fp32 and contiguous");
    const Tensor x = dense(input), dy = dense(grad);
    check_memory(switchyard::grouped_weight_gradient(experts, read<Index>(groups), read<Bf16>(x), read<Index>(row),
                                                     read<Bf16>(dy), x.size(1), dy.size(1), to.mutable_data_ptr(), add,
                                                     threads()));
}

Tensor grouped_weight_gradient(const Tensor &input, const std::optional<Tensor> &row, const Tensor &grad,
                               const Tensor &groups) {
    check(input.dim() == 2 && grad.dim() == 2 && groups.dim() == 1 && groups.size(0) > 0,
          "grouped_weight_gradient takes input [R, K], grad [R, N] and groups [experts + 1]");
    const Tensor dw = empty(input, {groups.size(0) - 1, input.size(1), grad.size(1)}, Type::BFloat16);
    add_weight_gradient(input, row, grad, groups, dw, false);
    return dw;
}

void grouped_weight_gradient_add_(const Tensor &sum, const Tensor &input, const std::optional<Tensor> &row,
                                  const Tensor &grad, const Tensor &groups) {
    add_weight_gradient(input, row, grad, groups, sum, true);
}

void check_activation(const Tensor &input, int64_t kind, const std::optional<Tensor> &keep) {
    check(input.dim() == 3, "an activation takes input [R, gates, F]");
    const Index R = input.size(0), gates = input.size(1), F = input.size(2);
    check(switchyard::activation_gates(kind) == gates && has(input, Type::BFloat16, {R, gates, F}),
          "an activation takes input [R, gates, F] in bf16, and there is no such activation of these gates");
    check(!keep || has(*keep, Type::BFloat16, {R, F}), "keep must be [R, F] in bf16");
}

Tensor activate(const Tensor &input, int64_t kind, const std::optional<Tensor> &keep) {
    check_activation(input, kind, keep);
    const Tensor h = dense(input), a = empty(input, {h.size(0), h.size(2)}, Type::BFloat16);
    const std::optional<Tensor> mask = dense(keep);
    switchyard::activate(kind, h.size(0), h.size(2), read<Bf16>(h), read<Bf16>(mask), write<Bf16>(a), threads());
    return a;
}

Tensor activate_backward_(const Tensor &grad, const Tensor &input, int64_t kind, const std::optional<Tensor> &keep) {
    check_activation(input, kind, keep);
    const Index R = input.size(0), gates = input.size(1), F = input.size(2);
    check(has(grad, Type::BFloat16, {R, F}) && grad.is_contiguous(), "grad must be [R, F] in bf16 and contiguous");
    const Tensor h = dense(input), dh = empty(input, {R, gates, F}, Type::BFloat16);
    const std::optional<Tensor> mask = dense(keep);
    Bf16 *a = write<Bf16>(grad);  // a value is read before it is written
    switchyard::activate_backward(kind, R, F, read<Bf16>(h), a, read<Bf16>(mask), a, write<Bf16>(dh), threads());
    return dh;
}

// permutation.cpp

Tensor gather_rows(const Tensor &source, const Tensor &choice, const std::optional<Tensor> &gates, int64_t top_k) {
    check(source.dim() == 2 && choice.dim() == 1 && top_k > 0, "gather_rows takes source [T, D] and choice [R]");
    const Index T = source.size(0), D = source.size(1), R = choice.size(0);
    check(has(source, Type::BFloat16, {T, D}) && has(choice, Type::Long, {R}) &&
              (!gates || has(*gates, Type::Float, {T, top_k})),
          "gather_rows takes source [T, D] in bf16, choice [R] in int64 and gates [T, K] in fp32");
    const Tensor from = dense(source), number = dense(choice), out = empty(source, {R, D}, Type::BFloat16);
    check(within(number, 0, T * top_k + 1), "gather_rows takes choices from 0 to T * K");
    const std::optional<Tensor> factor = dense(gates);
    switchyard::gather_rows(R, T, top_k, D, read<Bf16>(from), read<Index>(number), read<float>(factor),
                            write<Bf16>(out), threads());
    return out;
}

// Contiguous: which row each choice has.
Tensor checked_slots(const Tensor &rows, const Tensor &slot, Index choices) {
    check(rows.dim() == 2 && has(rows, Type::BFloat16, {rows.size(0), rows.size(1)}) &&
              has(slot, Type::Long, {choices}),
          "rows must be [R, D] in bf16, and slot [T * K] in int64");
    const Tensor number = dense(slot);
    check(within(number, -1, rows.size(0)), "slots must be rows, or -1 for none");
    return number;
}

Tensor add_rows(const Tensor &rows, const Tensor &slot, const std::optional<Tensor> &gates, int64_t tokens,
                int64_t top_k) {
    check(tokens >= 0 && top_k > 0, "add_rows takes tokens and choices per token");
    const Tensor from = dense(rows), number = checked_slots(rows, slot, tokens * top_k);
    check(!gates || has(*gates, Type::Float, {tokens, top_k}), "gates must be [T, K] in fp32");
    const Tensor out = empty(rows, {tokens, rows.size(1)}, Type::BFloat16);
    const std::optional<Tensor> factor = dense(gates);
    switchyard::add_rows(tokens, top_k, rows.size(1), read<Bf16>(from), read<Index>(number), read<float>(factor),
                         write<Bf16>(out), threads());
    return out;
}

Tensor gate_gradient(const Tensor &rows, const Tensor &slot, const Tensor &grad, int64_t top_k) {
    check(grad.dim() == 2 && top_k > 0, "gate_gradient takes grad [T, D] and choices per token");
    const Index T = grad.size(0), D = grad.size(1);
    const Tensor from = dense(rows), number = checked_slots(rows, slot, T * top_k), above = dense(grad);
    check(rows.size(1) == D && has(grad, Type::BFloat16, {T, D}), "grad must be [T, D] in bf16");
    const Tensor out = empty(grad, {T, top_k}, Type::Float);
    switchyard::gate_gradient(T, top_k, D, read<Bf16>(from), read<Index>(number), read<Bf16>(above), write<float>(out),
                              threads());
    return out;
}

// router.cpp

void check_router(const Tensor &input, const Tensor &weight) {
    check(input.dim() == 2 && weight.dim() == 2 && has(input, Type::BFloat16, {input.size(0), input.size(1)}) &&
              has(weight, Type::Float, {weight.size(0), input.size(1)}),
          "router_logits takes input [T, D] in bf16 and weight [E, D] in fp32");
}

Tensor router_logits(const Tensor &input, const Tensor &weight) {
    check_router(input, weight);
    const Tensor x = dense(input), w = dense(weight), logits = empty(input, {x.size(0), w.size(0)}, Type::Float);
    switchyard::router_logits(x.size(0), x.size(1), w.size(0), read<Bf16>(x), read<float>(w), write<float>(logits),
                              threads());
    return logits;
}

Pair router_logits_backward(const Tensor &grad, const Tensor &input, const Tensor &weight) {
    check_router(input, weight);
    const Index T = input.size(0), D = input.size(1), E = weight.size(0);
    check(has(grad, Type::Float, {T, E}), "router_logits_backward takes grad [T, E] in fp32");
    const Tensor x = dense(input), w = dense(weight), dlogits = dense(grad);
    const Tensor dx = empty(input, {T, D}, Type::BFloat16), dw = empty(input, {E, D}, Type::Float);
    switchyard::router_logits_backward(T, D, E, read<float>(dlogits), read<Bf16>(x), read<float>(w), write<Bf16>(dx),
                                       write<float>(dw), threads());
    return {dx, dw};
}

// rows.cpp

void check_losses(const Tensor &logits, const Tensor &labels) {
    check(logits.dim() == 2 && has(logits, Type::BFloat16, {logits.size(0), logits.size(1)}) &&
              has(labels, Type::Long, {logits.size(0)}),
          "the loss takes logits [T, V] in bf16 and labels [T] in int64");
}

Triple cross_entropy_sums(const Tensor &logits, const Tensor &labels) {
    check_losses(logits, labels);
    const Index T = logits.size(0);
    const Tensor x = dense(logits), label = dense(labels), largest = empty(x, {T}, Type::Float);
    const Tensor sum = empty(x, {T}, Type::Float), label_logit = empty(x, {T}, Type::Float);
    switchyard::cross_entropy_sums(T, x.size(1), read<Bf16>(x), read<Index>(label), write<float>(largest),
                                   write<float>(sum), write<float>(label_logit), threads());
    return {largest, sum, label_logit};
}

void cross_entropy_gradient_(const Tensor &logits, const Tensor &labels, const Tensor &largest, const Tensor &sum,
                             const Tensor &grad) {
    check_losses(logits, labels);
    const Index T = logits.size(0);
    check(logits.is_contiguous() && has(largest, Type::Float, {T}) && has(sum, Type::Float, {T}) &&
              has(grad, Type::Float, {T}),
          "cross_entropy_gradient_ takes contiguous logits, and largest, sum and grad [T] in fp32");
    const Tensor label = dense(labels), top = dense(largest), total = dense(sum), above = dense(grad);
    switchyard::cross_entropy_gradient(T, logits.size(1), write<Bf16>(logits), read<Index>(label), read<float>(top),
                                       read<float>(total), read<float>(above), threads());
}

void check_norm(const Tensor &input, const Tensor &weight) {
    check(input.dim() == 2 && has(input, Type::BFloat16, {input.size(0), input.size(1)}) &&
              has(weight, Type::BFloat16, {input.size(1)}),
          "rms_norm takes input [R, D] and weight [D] in bf16");
}

Pair rms_norm(const Tensor &input, const Tensor &weight, double eps) {
    check_norm(input, weight);
    const Index R = input.size(0), D = input.size(1);
    const Tensor x = dense(input), w = dense(weight);
    const Tensor y = empty(x, {R, D}, Type::BFloat16), scale = empty(x, {R}, Type::Float);
    switchyard::rms_norm(R, D, read<Bf16>(x), read<Bf16>(w), static_cast<float>(eps), write<Bf16>(y),
                         write<float>(scale), threads());
    return {y, scale};
}

Pair rms_norm_backward(const Tensor &grad, const Tensor &input, const Tensor &weight, const Tensor &scale) {
    check_norm(input, weight);
    const Index R = input.size(0), D = input.size(1);
    check(has(grad, Type::BFloat16, {R, D}) && has(scale, Type::Float, {R}),
          "rms_norm_backward takes grad [R, D] in bf16 and scale [R] in fp32");
    const Tensor x = dense(input), w = dense(weight), dy = dense(grad), factor = dense(scale);
    const Tensor dx = empty(x, {R, D}, Type::BFloat16);
    const Tensor parts = empty(x, {(R + NORM_PART - 1) / NORM_PART, D}, Type::Float);
    switchyard::rms_norm_backward(R, D, read<Bf16>(x), read<Bf16>(w), read<float>(factor), read<Bf16>(dy),
                                  write<Bf16>(dx), write<float>(parts), NORM_PART, threads());
    const Sizes first{0};
    const Tensor dw = torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(first.data(), first.size()));
    return {dx, torch::stable::to(dw, Type::BFloat16)};
}

}  // namespace
}  // namespace operators

#define OPERATOR(name, schema) {#name, #name schema, TORCH_BOX(&operators::name)}
const struct {
    const char *name, *schema;
    void (*boxed)(StableIValue *, uint64_t, uint64_t);
} OPERATORS[] = {
    OPERATOR(causal_attention, "(Tensor query, Tensor key, Tensor value) -> (Tensor output, Tensor logsumexp)"),
    OPERATOR(causal_attention_backward, "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor output, "
                                        "Tensor logsumexp) -> (Tensor, Tensor, Tensor)"),
    OPERATOR(apply_rotary, "(Tensor input, Tensor cos, Tensor sin, Tensor(a!) out, bool backward) -> ()"),
    OPERATOR(grouped_product, "(Tensor input, Tensor? rows, Tensor weight, Tensor groups) -> Tensor"),
    OPERATOR(grouped_weight_gradient, "(Tensor input, Tensor? rows, Tensor grad, Tensor groups) -> Tensor"),
    OPERATOR(grouped_weight_gradient_add_,
             "(Tensor(a!) sum, Tensor input, Tensor? rows, Tensor grad, Tensor groups) -> ()"),
    OPERATOR(activate, "(Tensor input, int kind, Tensor? keep) -> Tensor"),
    OPERATOR(activate_backward_, "(Tensor(a!) grad, Tensor input, int kind, Tensor? keep) -> Tensor"),
    OPERATOR(gather_rows, "(Tensor source, Tensor choice, Tensor? gates, int top_k) -> Tensor"),
    OPERATOR(add_rows, "(Tensor rows, Tensor slot, Tensor? gates, int tokens, int top_k) -> Tensor"),
    OPERATOR(gate_gradient, "(Tensor rows, Tensor slot, Tensor grad, int top_k) -> Tensor"),
    OPERATOR(router_logits, "(Tensor input, Tensor weight) -> Tensor"),
    OPERATOR(router_logits_backward, "(Tensor grad, Tensor input, Tensor weight) -> (Tensor, Tensor)"),
    OPERATOR(cross_entropy_sums, "(Tensor logits, Tensor labels) -> (Tensor largest, Tensor sum, Tensor label_logit)"),
    OPERATOR(cross_entropy_gradient_,
             "(Tensor(a!) logits, Tensor labels, Tensor largest, Tensor sum, Tensor grad) -> ()"),
    OPERATOR(rms_norm, "(Tensor input, Tensor weight, float eps) -> (Tensor output, Tensor scale)"),
    OPERATOR(rms_norm_backward, "(Tensor grad, Tensor input, Tensor weight, Tensor scale) -> (Tensor, Tensor)"),
};

STABLE_TORCH_LIBRARY_FRAGMENT(switchyard, m) {  // Python defines operators in the same namespace
    for (const auto &one : OPERATORS) m.def(one.schema);
}

STABLE_TORCH_LIBRARY_IMPL(switchyard, CPU, m) {
    for (const auto &one : OPERATORS) m.impl(one.name, one.boxed);
}
