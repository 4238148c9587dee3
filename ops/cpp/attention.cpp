// Rotary positions and causal attention in bf16 on a CPU with AVX512-BF16.
//
// Legend: B batch, H heads, G key/value groups, S sequence, N width of a head.
//
// A block of queries at a time, so few that their scores with all keys stay in the second-level cache (up to some 4,000
// keys): a softmax is taken of whole rows. The backward pass takes the scores again (Dao 2023, arXiv:2307.08691,
// algorithm 2), against a block of keys at a time, and adds the gradients of keys and values up in fp32. A row forward
// and a group backward are one thread's, so that no sum depends on the threads.

#include "tiles.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <utility>

namespace switchyard {
namespace {

constexpr Index SCORE_BYTES = 192 << 10;  // of a block of scores in fp32
constexpr Index QUERIES = 4 * ROWS;       // of a block, at most
constexpr Index KEYS = 512;               // of a block in the backward pass
constexpr Index LINE = 16;                // what keeps rows of scores from falling into the same lines of a cache

Index whole(Index count, Index size) { return (count + size - 1) / size * size; }
Index half(Index count) { return (count + 1) / 2; }

// Room for so many values, aligned as tiles read them.
template <class T>
struct Room {
    std::unique_ptr<T, decltype(&std::free)> data;

    explicit Room(Index count)
        : data(static_cast<T *>(std::aligned_alloc(64, whole(std::max<Index>(1, count) * sizeof(T), 64))), std::free) {}
    operator T *() const { return data.get(); }
};

// Packed as the left operand of a product: `count` rows; as the right one: `count` columns.
Panels left(const Operand &x, Index from, Index count, Index begin, Index inner, Pair *room) {
    pack<ROWS>(x, from, count, begin, inner, room);
    return {room, half(inner)};
}
Panels right(const Operand &x, Index from, Index count, Index begin, Index inner, Pair *room) {
    pack<COLUMNS>(x, from, count, begin, inner, room);
    return {room, half(inner)};
}
Index left_room(Index count, Index inner) { return whole(count, ROWS) * half(inner); }
Index right_room(Index count, Index inner) { return whole(count, COLUMNS) * half(inner); }

// A query's row of scores becomes e^(scale (score - largest)) in bf16, with zeros for the keys from `sees` to `count`.
// Returns the logarithm of the sum of e^(scale score), and 1 / the sum of e^(scale (score - largest)).
std::pair<float, float> soften(const float *score, Index sees, Index count, float scale, Bf16 *p) {
    __m512 most = all(-INFINITY), sum = all(0);
    for (Index k = 0; k < sees; k += 16)
        most = _mm512_mask_max_ps(most, first(sees - k), _mm512_loadu_ps(score + k), most);
    const float largest = _mm512_reduce_max_ps(most);
    for (Index k = 0; k < count; k += 16) {
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(score + k), all(largest)), all(scale));
        const __m512 e = _mm512_maskz_mov_ps(first(sees - k), exponential(x));
        sum = _mm512_add_ps(sum, e);
        store(p + k, first(count - k), e);
    }
    const float total = _mm512_reduce_add_ps(sum);
    return {scale * largest + std::log(total), 1 / total};
}

// What a thread needs to attend from a block of queries.
struct Forward {
    const AttentionShape &shape;
    const Heads &q, &k, &v, &out;
    float *lse;  // [B, H, S]
    Index queries = std::clamp<Index>(SCORE_BYTES / 4 / std::max<Index>(1, shape.S) / ROWS, 1, QUERIES / ROWS) * ROWS;
    Index width = whole(shape.S, 16) + LINE;
    Room<Pair> q_room{left_room(queries, shape.N)}, k_room{right_room(shape.S, shape.N)};
    Room<Pair> p_room{left_room(queries, shape.S)}, v_room{right_room(shape.N, shape.S)};
    Room<float> scores{queries * width}, sums{queries * shape.N};
    Room<Bf16> p{queries * width};

    bool has_room() const { return q_room && k_room && p_room && v_room && scores && sums && p; }

    // Queries from .. to of a head.
    void run(Index b, Index h, Index from, Index to) {
        const Index N = shape.N, g = shape.group(h);
        const Panels keys = right({k.at(b, g), k.row, true, nullptr}, 0, to, 0, N, k_room);
        const Panels values = right({v.at(b, g), v.row, false, nullptr}, 0, N, 0, to, v_room);
        for (Index top = from; top < to; top += queries) {
            const Index rows = std::min(queries, to - top), seen = top + rows;
            const Panels asked = left({q.at(b, h, top), q.row, true, nullptr}, 0, rows, 0, N, q_room);
            multiply(asked, rows, keys, seen, {scores, width, Put::WRITE}, [&](Index r, Index c) {
                return c < top + r + ROWS ? Span{0, half(N)} : LEFT_OUT;
            });
            float inverse[QUERIES];
            for (Index r = 0; r < rows; ++r) {
                const auto [log_sum, inverted] =
                    soften(scores + r * width, top + r + 1, seen, shape.scale, p + r * width);
                lse[(b * shape.H + h) * shape.S + top + r] = log_sum;
                inverse[r] = inverted;
            }
            const Panels shares = left({p, width, true, nullptr}, 0, rows, 0, seen, p_room);
            multiply(shares, rows, values, N, {sums, N, Put::WRITE}, [&](Index r, Index) -> Span {
                return {0, half(std::min(seen, top + r + ROWS))};
            });
            for (Index r = 0; r < rows; ++r)
                for (Index n = 0; n < N; n += 16) {
                    const __m512 sum = _mm512_maskz_loadu_ps(first(N - n), sums + r * N + n);
                    store(out.at(b, h, top + r) + n, first(N - n), _mm512_mul_ps(sum, all(inverse[r])));
                }
        }
    }
};

// What a thread needs for the gradients of a group's queries, keys and values.
struct Backward {
    const AttentionShape &shape;
    const Heads &q, &k, &v, &out, &dout, &dq, &dk, &dv;
    const float *lse;
    Index width = KEYS + LINE;
    Room<Pair> k_room{right_room(shape.S, shape.N)}, v_room{right_room(shape.S, shape.N)};
    Room<Pair> kn_room{right_room(shape.N, KEYS) * ((shape.S + KEYS - 1) / KEYS)};
    Room<Pair> q_room{left_room(QUERIES, shape.N)}, do_room{left_room(QUERIES, shape.N)};
    Room<Pair> qn_room{right_room(shape.N, QUERIES)}, don_room{right_room(shape.N, QUERIES)};
    Room<Pair> p_room{std::max(left_room(QUERIES, KEYS), left_room(KEYS, QUERIES))};
    Room<float> scores{QUERIES * width}, dp{QUERIES * width};
    Room<Bf16> p{QUERIES * width}, ds{QUERIES * width};
    Room<float> dq_sum{QUERIES * shape.N}, dk_sum{shape.S * shape.N}, dv_sum{shape.S * shape.N};

    bool has_room() const {
        return k_room && v_room && kn_room && q_room && do_room && qn_room && don_room && p_room && scores && dp &&
               p && ds && dq_sum && dk_sum && dv_sum;
    }

    void run(Index b, Index g) {
        const Index N = shape.N, S = shape.S, each = shape.H / shape.G;
        const Operand key{k.at(b, g), k.row, true, nullptr}, value{v.at(b, g), v.row, true, nullptr};
        right(key, 0, S, 0, N, k_room);
        right(value, 0, S, 0, N, v_room);
        for (Index from = 0; from < S; from += KEYS)
            right({k.at(b, g), k.row, false, nullptr}, 0, N, from, std::min(KEYS, S - from), keys_at(from));
        std::fill_n(&dk_sum[0], S * N, 0.f);
        std::fill_n(&dv_sum[0], S * N, 0.f);
        for (Index h = g * each; h < (g + 1) * each; ++h)
            for (Index top = 0; top < S; top += QUERIES) block(b, h, top, std::min(QUERIES, S - top));
        put(dk_sum, dk.at(b, g), dk.row, S);
        put(dv_sum, dv.at(b, g), dv.row, S);
    }

    Pair *keys_at(Index from) const { return kn_room + from / KEYS * right_room(shape.N, KEYS); }

    void put(const float *sum, Bf16 *to, Index row, Index rows) const {
        for (Index r = 0; r < rows; ++r)
            for (Index n = 0; n < shape.N; n += 16)
                store(to + r * row + n, first(shape.N - n),
                      _mm512_maskz_loadu_ps(first(shape.N - n), sum + r * shape.N + n));
    }

    // What `rows` queries from `top` on give and get.
    void block(Index b, Index h, Index top, Index rows) {
        const Index N = shape.N, seen = top + rows;
        const Bf16 *q_at = q.at(b, h, top), *do_at = dout.at(b, h, top);
        const Panels asked = left({q_at, q.row, true, nullptr}, 0, rows, 0, N, q_room);
        const Panels above = left({do_at, dout.row, true, nullptr}, 0, rows, 0, N, do_room);
        const Panels asked_n = right({q_at, q.row, false, nullptr}, 0, N, 0, rows, qn_room);
        const Panels above_n = right({do_at, dout.row, false, nullptr}, 0, N, 0, rows, don_room);
        float inner[QUERIES];  // sum over the width of out times dout
        for (Index r = 0; r < rows; ++r) {
            __m512 sum = all(0);
            for (Index n = 0; n < N; n += 16)
                sum = _mm512_fmadd_ps(wide(do_at + r * dout.row + n, first(N - n)),
                                      wide(out.at(b, h, top + r) + n, first(N - n)), sum);
            inner[r] = _mm512_reduce_add_ps(sum);
        }
        std::fill_n(&dq_sum[0], rows * N, 0.f);
        for (Index from = 0; from < seen; from += KEYS) {
            const Index count = std::min(KEYS, seen - from);
            const auto below = [&](Index r, Index c) {
                return from + c < top + r + ROWS ? Span{0, half(N)} : LEFT_OUT;
            };
            multiply(asked, rows, {k_room + from * half(N), half(N)}, count, {scores, width, Put::WRITE}, below);
            multiply(above, rows, {v_room + from * half(N), half(N)}, count, {dp, width, Put::WRITE}, below);
            const float *log_sum = lse + (b * shape.H + h) * shape.S + top;
            for (Index r = 0; r < rows; ++r) bend(r, top + r + 1 - from, count, log_sum[r], inner[r]);

            const Panels by_query = left({ds, width, true, nullptr}, 0, rows, 0, count, p_room);
            multiply(by_query, rows, {keys_at(from), half(std::min(KEYS, shape.S - from))}, N, {dq_sum, N, Put::ADD},
                     [&](Index r, Index) -> Span { return {0, half(std::min(count, top + r + ROWS - from))}; });
            // A key is seen by the queries from its own place on.
            const auto onward = [&](Index r, Index) -> Span {
                return {std::max<Index>(0, from + r - top) / 2, half(rows)};
            };
            multiply(left({ds, width, false, nullptr}, 0, count, 0, rows, p_room), count, asked_n, N,
                     {dk_sum + from * N, N, Put::ADD}, onward);
            multiply(left({p, width, false, nullptr}, 0, count, 0, rows, p_room), count, above_n, N,
                     {dv_sum + from * N, N, Put::ADD}, onward);
        }
        put(dq_sum, dq.at(b, h, top), dq.row, rows);
    }

    // A row's shares p and ds, the gradient of its scores, from scores and dp; zeros for the keys from `sees` on.
    void bend(Index r, Index sees, Index count, float log_sum, float inner) const {
        const float *score = scores + r * width, *d = dp + r * width;
        for (Index c = 0; c < count; c += 16) {
            const __mmask16 there = first(sees - c);
            const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(score + c), all(shape.scale), all(log_sum));
            const __m512 share = _mm512_maskz_mov_ps(there, exponential(x));
            const __m512 slope = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(d + c), all(inner)), all(shape.scale));
            store(p + r * width + c, first(count - c), share);
            store(ds + r * width + c, first(count - c), _mm512_maskz_mul_ps(there, share, slope));
        }
    }
};

}  // namespace

bool causal_attention(const AttentionShape &shape, const Heads &q, const Heads &k, const Heads &v, const Heads &out,
                      float *lse, int threads) {
    const Index heads = shape.B * shape.H;
    // Where heads are few, each is cut into runs of queries.
    const Index parts = std::clamp<Index>(4 * threads / std::max<Index>(1, heads), 1,
                                          std::max<Index>(1, whole(shape.S, QUERIES) / QUERIES));
    const Index run = whole((shape.S + parts - 1) / parts, ROWS);
    std::atomic<Index> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
        Forward work{shape, q, k, v, out, lse};
        if (!work.has_room()) failed = true;
        for (Index i = next++; !failed && i < heads * parts; i = next++) {
            const Index head = i / parts, from = i % parts * run;
            if (from < shape.S) work.run(head / shape.H, head % shape.H, from, std::min(shape.S, from + run));
        }
    }
    return !failed;
}

void apply_rotary(const AttentionShape &shape, const Heads &x, const float *cos, const float *sin, float sign,
                  const Heads &out, int threads) {
    const Index half_N = shape.N / 2;
#pragma omp parallel for num_threads(threads)
    for (Index s = 0; s < shape.S; ++s)
        for (Index b = 0; b < shape.B; ++b)
            for (Index h = 0; h < shape.H; ++h) {
                const Bf16 *from = x.at(b, h, s);
                Bf16 *to = out.at(b, h, s);
                for (Index n = 0; n < half_N; n += 16) {
                    const __mmask16 there = first(half_N - n);
                    const Index angle = (s * shape.B + b) * half_N + n;
                    const __m512 c = _mm512_maskz_loadu_ps(there, cos + angle);
                    const __m512 d = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, sin + angle), all(sign));
                    const __m512 one = wide(from + n, there), other = wide(from + half_N + n, there);
                    store(to + n, there, _mm512_fmsub_ps(one, c, _mm512_mul_ps(other, d)));
                    store(to + half_N + n, there, _mm512_fmadd_ps(other, c, _mm512_mul_ps(one, d)));
                }
            }
}

bool causal_attention_backward(const AttentionShape &shape, const Heads &q, const Heads &k, const Heads &v,
                               const Heads &out, const Heads &dout, const Heads &dq, const Heads &dk, const Heads &dv,
                               const float *lse, int threads) {
    std::atomic<Index> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(threads)
    {
        Backward work{shape, q, k, v, out, dout, dq, dk, dv, lse};
        if (!work.has_room()) failed = true;
        for (Index i = next++; !failed && i < shape.B * shape.G; i = next++) work.run(i / shape.G, i % shape.G);
    }
    return !failed;
}

}  // namespace switchyard
