// The kernels, as operators.cpp calls them. They check nothing: tensors are contiguous unless they come with strides,
// indices are in range, and only what packs operands can fail, by returning false where there is no memory for it.
//
// Legend: B batch, H heads, G key/value groups, S sequence, T tokens, D hidden, E experts, K choices per token or inner
// dimension of a product, N width of a head or outer dimension of a product, R rows, V vocabulary (this rank's slice).

#pragma once

#include <cstdint>

namespace switchyard {

using Bf16 = uint16_t;
using Index = int64_t;

// attention.cpp

// [B, H or G, S, N] with the width side by side in memory.
struct Heads {
    Bf16 *data;
    Index batch, head, row;

    Bf16 *at(Index b, Index h, Index s = 0) const { return data + b * batch + h * head + s * row; }
};

struct AttentionShape {
    Index B, H, G, S, N;
    float scale;

    Index group(Index h) const { return h / (H / G); }
};

// out [B, H, S, N] and lse [B, H, S] of q [B, H, S, N] and k, v [B, G, S, N].
[[nodiscard]] bool causal_attention(const AttentionShape &shape, const Heads &q, const Heads &k, const Heads &v,
                                    const Heads &out, float *lse, int threads);

// dq [B, H, S, N], dk and dv [B, G, S, N] for dout [B, H, S, N].
[[nodiscard]] bool causal_attention_backward(const AttentionShape &shape, const Heads &q, const Heads &k,
                                             const Heads &v, const Heads &out, const Heads &dout, const Heads &dq,
                                             const Heads &dk, const Heads &dv, const float *lse, int threads);

// Rotates the pairs (x[n], x[n + N/2]) of x [B, H, S, N] by angles of which it has cos and sin [S, B, N/2]; back, where
// `sign` is -1.
void apply_rotary(const AttentionShape &shape, const Heads &x, const float *cos, const float *sin, float sign,
                  const Heads &out, int threads);

// experts.cpp

// y [R, N] = each row times its expert's weight: w [E, K, N], or [E, N, K] where `transposed`. Expert e has the rows
// start[e] .. start[e + 1], which are lines `line` of x where that is not null.
[[nodiscard]] bool grouped_product(Index experts, const Index *start, const Bf16 *x, const Index *line, const Bf16 *w,
                                   bool transposed, Index K, Index N, Bf16 *y, int threads);

// dw [E, K, N] = x.T @ dy [R, N] of each expert's rows: written in bf16, or added to fp32 where `add`.
[[nodiscard]] bool grouped_weight_gradient(Index experts, const Index *start, const Bf16 *x, const Index *line,
                                           const Bf16 *dy, Index K, Index N, void *dw, bool add, int threads);

// Gates of an activation: 2 where h is a gate and what it multiplies, else 1. 0: there is no such activation.
int activation_gates(Index kind);

// a [R, N] = act(h [R, gates, N]), times keep [R, N] where that is not null.
void activate(Index kind, Index R, Index N, const Bf16 *h, const Bf16 *keep, Bf16 *a, int threads);

// a again, which may take the place of da, and dh [R, gates, N] for da [R, N].
void activate_backward(Index kind, Index R, Index N, const Bf16 *h, const Bf16 *da, const Bf16 *keep, Bf16 *a, Bf16 *dh,
                       int threads);

// permutation.cpp

// out [R, D]: the source [T, D] of each row's choice, times its gate where these are not null; zeros for choice T * K.
void gather_rows(Index R, Index T, Index K, Index D, const Bf16 *source, const Index *choice, const float *gates,
                 Bf16 *out, int threads);

// out [T, D]: the sum of the rows [R, D] of each token's choices, each times its gate where these are not null; slot
// [T, K]: which row a choice has, -1 for none.
void add_rows(Index T, Index K, Index D, const Bf16 *rows, const Index *slot, const float *gates, Bf16 *out,
              int threads);

// out [T, K]: the product of each choice's row with its token's gradient [T, D]; 0 for a choice without a row.
void gate_gradient(Index T, Index K, Index D, const Bf16 *rows, const Index *slot, const Bf16 *grad, float *out,
                   int threads);

// router.cpp

// logits [T, E] = x [T, D] @ weight.T [D, E].
void router_logits(Index T, Index D, Index E, const Bf16 *x, const float *weight, float *logits, int threads);

// dx [T, D] = dlogits [T, E] @ weight [E, D], and dweight = dlogits.T @ x.
void router_logits_backward(Index T, Index D, Index E, const float *dlogits, const Bf16 *x, const float *weight,
                            Bf16 *dx, float *dweight, int threads);

// rows.cpp

// The largest logit of each row, the sum of e^(logit - largest), and the label's logit: 0 where it is not in 0 .. V.
void cross_entropy_sums(Index T, Index V, const Bf16 *logits, const Index *label, float *largest, float *sum,
                        float *label_logit, int threads);

// Logits become their gradient: (e^(logit - largest) / sum - [it is the label's]) * grad.
void cross_entropy_gradient(Index T, Index V, Bf16 *logits, const Index *label, const float *largest, const float *sum,
                            const float *grad, int threads);

// y = x * scale * weight of each row, with scale = 1 / sqrt(mean(x^2) + eps).
void rms_norm(Index R, Index D, const Bf16 *x, const Bf16 *weight, float eps, Bf16 *y, float *scale, int threads);

// With n = x * scale and g = dy * weight: dx = scale * (g - n * mean(g * n)); dweight has the sum of dy * n over each
// part of `rows` rows.
void rms_norm_backward(Index R, Index D, const Bf16 *x, const Bf16 *weight, const float *scale, const Bf16 *dy,
                       Bf16 *dx, float *dweight, Index rows, int threads);

}  // namespace switchyard
