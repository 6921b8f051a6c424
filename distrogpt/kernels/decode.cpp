// One decoding step of model.py's GPT on CPUs, all of it in one call and one parallel region.
//
// Decoding reads every weight for each token, so memory limits it. Weights are bf16, or 8-bit integers with a scale for
// each row; inputs of products, keys and values are bf16; sums, norms and the residual stream are fp32. Sums are added
// in the same order for any number of sequences and threads: a sequence gets the same numbers alone and in a batch.
//
// Shapes: N sequences, C channels, H query heads and K key/value heads of D channels. C and D are multiples of 32.
// build.py compiles this file, for CPUs with AVX512_BF16; native.py fills the structs.

#include <immintrin.h>
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {
typedef uint16_t bf16;
typedef __m512 Vector;  // 16 numbers
typedef uint32_t Pairs __attribute__((vector_size(64)));  // 32 bf16 numbers
constexpr int W = 16, AHEAD = 8192;  // AHEAD: bytes from what is read to what is fetched from memory

struct Linear {  // y = weight x + bias
    const void* weight;  // (rows, columns), bf16, or 8-bit integers if there is a scale
    const float *scale, *bias;  // (rows,), or null
    int64_t rows, columns;  // columns: a multiple of 32
};

struct Layer {
    const float *ln_1_weight, *ln_1_bias, *ln_2_weight, *ln_2_bias, *q_weight, *k_weight, *skip;  // or null
    Linear c_attn, attn_proj, c_fc, mlp_proj;
};

struct Model {
    const Layer* layers;
    const float *ln_f_weight, *ln_f_bias;
    const float* rotary;  // (block_size, D), cos and sin for each pair of channels; or null
    Linear lm_head;
    int64_t n_layer, C, H, K, D, width;  // width: hidden channels of the MLP, a multiple of 16
    int64_t rmsnorm, qk_norm, key_offset, activation;  // activation: 0 gelu_tanh, 1 gelu, 2 relu2, 3 swiglu
    float scale, softcap;
};

struct Cache {  // KVCache.kv, (n_layer, 2, rows, K, size, D)
    bf16* kv;
    int64_t rows, size;
};

inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Pairs load(const bf16* p) { return (Pairs)_mm512_loadu_si512(p); }
inline Pairs load(const int8_t* p) {  // all 8-bit integers are bf16 numbers
    __m512i first = _mm512_cvtepi8_epi32(_mm_loadu_si128((__m128i*)p));
    __m512i second = _mm512_cvtepi8_epi32(_mm_loadu_si128((__m128i*)(p + W)));
    return (Pairs)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(second), _mm512_cvtepi32_ps(first));
}
inline void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, Vector a, Vector b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
inline Vector even(Pairs p) { return (Vector)(p << 16); }  // every other number; bf16 is the upper half of fp32
inline Vector odd(Pairs p) { return (Vector)(p & 0xFFFF0000u); }
inline void dot(Vector& sum, Pairs a, Pairs b) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// the sums of the lanes of four vectors
inline __m128 totals(const Vector* v) {
    auto halve = [](Vector a, Vector b) { return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE); };
    Vector a = halve(v[0], v[1]), b = halve(v[2], v[3]);
    Vector s = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD);  // four lanes are left of each
    s += _mm512_permute_ps(s, 0x4E);
    s += _mm512_permute_ps(s, 0xB1);
    return __m128{s[0], s[4], s[8], s[12]};
}
inline float total(Vector v) { return _mm512_reduce_add_ps(v); }

// e^x to 1e-7, and at least 1e-38: 2^n times a polynomial of the rest
inline Vector exp(Vector x) {
    x = _mm512_max_ps(Vector{} - 87.f, x);  // in this order, NaN stays NaN
    Vector n = _mm512_roundscale_ps(x * 1.44269504f, 0), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector y = Vector{} + 1.9875691e-4f;
    for (float c : {1.3981999e-3f, 8.3334519e-3f, 4.1665795e-2f, 1.6666665e-1f, 5.0000001e-1f, 1.f, 1.f}) y = y * r + c;
    return _mm512_scalef_ps(y, n);
}
inline Vector sigmoid(Vector x) { return 1.f / (1.f + exp(-x)); }
inline Vector erf(Vector x) {  // to 2e-7: Abramowitz and Stegun, 7.1.26
    Vector a = _mm512_abs_ps(x), t = 1.f / (1.f + 0.3275911f * a), y = Vector{} + 1.061405429f;
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = y * t + c;
    y = 1.f - y * t * exp(-a * a);
    return x < 0.f ? -y : y;
}

// The products of R rows of weights, from `row` on, with N inputs; all sums stay in registers.
template <class T, int R, int N>
void products(const T* w, const Linear& f, int64_t row, const bf16* x, float* y, bool fetch) {
    Vector sums[N][4] = {};
    for (int64_t i = 0; i < f.columns; i += 2 * W) {
        Pairs rows[R];
        for (int r = 0; r < R; r++) rows[r] = load(w + r * f.columns + i);
        for (int r = 0; fetch && r < R; r++) __builtin_prefetch((const char*)(w + r * f.columns + i) + AHEAD);
        for (int n = 0; n < N; n++)
            for (int r = 0; r < R; r++) dot(sums[n][r], rows[r], load(x + n * f.columns + i));
    }
    __m128 scale = {1, 1, 1, 1}, bias = {};
    for (int r = 0; f.scale && r < R; r++) scale[r] = f.scale[row + r];
    for (int r = 0; f.bias && r < R; r++) bias[r] = f.bias[row + r];
    for (int n = 0; n < N; n++) {
        __m128 sum = totals(sums[n]) * scale + bias;
        std::copy_n((const float*)&sum, R, y + n * f.rows + row);
    }
}

// Rows begin to end - 1 with all inputs. One input: memory is the limit, which is read fastest one row after the other.
// More: arithmetic is, so four rows at once, and the inputs in groups of six or less.
template <class T>
void block(const T* w, const Linear& f, int64_t begin, int64_t end, const bf16* x, float* y, int64_t N, bool fetch) {
    constexpr decltype(&products<T, 4, 1>) four[] = {products<T, 4, 1>, products<T, 4, 2>, products<T, 4, 3>,
                                                     products<T, 4, 4>, products<T, 4, 5>, products<T, 4, 6>};
    for (int64_t n = 0, size, groups = (N + 5) / 6; n < N; groups--, n += size) {
        size = (N - n) / groups;
        for (int64_t row = begin, step; row < end; row += step) {
            step = N == 1 || row + 4 > end ? 1 : 4;
            for (int64_t i = n; step == 1 && i < n + size; i++)
                products<T, 1, 1>(w + (row - begin) * f.columns, f, row, x + i * f.columns, y + i * f.rows, fetch);
            if (step == 4)
                four[size - 1](w + (row - begin) * f.columns, f, row, x + n * f.columns, y + n * f.rows, fetch);
        }
    }
}

// y (N, rows) of x (N, columns); the threads share the rows. For many inputs, 8-bit weights are converted only once.
void linear(const Linear& f, const bf16* x, float* y, int64_t N) {
    int64_t step = f.scale ? 8 : 4;
    bf16 converted[f.scale && N > 6 ? step * f.columns : 1];
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < f.rows; begin += step) {
        int64_t end = std::min(begin + step, f.rows), first = begin * f.columns;
        const int8_t* small = (const int8_t*)f.weight + first;
        for (int64_t i = 0; f.scale && N > 6 && i < (end - begin) * f.columns; i += 2 * W) {
            __builtin_prefetch(small + i + AHEAD);
            _mm512_storeu_si512(&converted[i], (__m512i)load(small + i));
        }
        if (!f.scale) block((const bf16*)f.weight + first, f, begin, end, x, y, N, true);
        else if (N > 6) block(converted, f, begin, end, x, y, N, false);
        else block(small, f, begin, end, x, y, N, true);
    }
}

// LayerNorm or RMSNorm of x (C,)
void norm(const Model& m, const float* x, const float* weight, const float* bias, bf16* y) {
    Vector sum = {}, squares = {};
    for (int64_t i = 0; i < m.C && !m.rmsnorm; i += W) sum += load(x + i);
    float mean = total(sum) / m.C;
    for (int64_t i = 0; i < m.C; i += W) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float scale = 1 / std::sqrt(total(squares) / m.C + (m.rmsnorm ? 1e-6f : 1e-5f));
    auto part = [&](int64_t i) {
        Vector v = (load(x + i) - mean) * scale * (weight ? load(weight + i) : Vector{} + 1.f);
        return bias ? v + load(bias + i) : v;
    };
    for (int64_t i = 0; i < m.C; i += 2 * W) store(y + i, part(i), part(i + W));
}

// a query or key x (D,), normalised and rotated
void prepare(const Model& m, float* x, const float* weight, int64_t position, bf16* y) {
    if (m.qk_norm) {
        Vector squares = {};
        for (int64_t i = 0; i < m.D; i += W) squares += load(x + i) * load(x + i);
        float scale = 1 / std::sqrt(total(squares) / m.D + 1e-6f);
        for (int64_t i = 0; i < m.D; i++) x[i] *= weight ? scale * weight[i] : scale;
    }
    const float* angles = m.rotary + position * m.D;
    for (int64_t i = 0; i < m.D && m.rotary; i += 2) {
        float cos = angles[i], sin = angles[i + 1], a = x[i], b = x[i + 1];
        x[i] = a * cos - b * sin, x[i + 1] = a * sin + b * cos;
    }
    for (int64_t i = 0; i < m.D; i += 2 * W) store(y + i, load(x + i), load(x + i + W));
}

// one query head q (D,) over the first `length` keys and values: y (D,); `scores` has room for 16 more
template <int D>
void attend(float scale, const bf16* q, const bf16* k, const bf16* v, int64_t length, float* scores, bf16* y) {
    constexpr int PARTS = D / (2 * W);
    for (int64_t s = 0; s < length; s += 4) {
        Vector sums[4] = {};
        for (int u = 0; u < 4; u++)
            for (int i = 0; i < PARTS; i++) {
                const bf16* key = k + std::min(s + u, length - 1) * D + i * 2 * W;
                __builtin_prefetch((const char*)key + AHEAD / 2);
                dot(sums[u], load(q + i * 2 * W), load(key));
            }
        _mm_storeu_ps(scores + s, scale * totals(sums));
    }
    std::fill(scores + length, scores + length + W, -INFINITY);
    Vector sum = {}, highest = load(scores), evens[2][PARTS] = {}, odds[2][PARTS] = {};
    for (int64_t s = W; s < length; s += W) highest = _mm512_max_ps(highest, load(scores + s));
    for (int64_t s = 0; s < length; s += W) {
        Vector weight = exp(load(scores + s) - _mm512_reduce_max_ps(highest));
        store(scores + s, weight);
        sum += weight;
    }
    for (int64_t s = 0; s < length; s += 2)
        for (int u = 0; u < 2; u++)  // two sums, as each addition waits for the one before
            for (int i = 0; i < PARTS; i++) {
                const bf16* value = v + std::min(s + u, length - 1) * D + i * 2 * W;
                __builtin_prefetch((const char*)value + AHEAD / 2);
                evens[u][i] += scores[s + u] * even(load(value));
                odds[u][i] += scores[s + u] * odd(load(value));
            }
    auto round = [](Vector v) { return (Pairs)v + 0x7FFF + ((Pairs)v >> 16 & 1); };  // to bf16, in the upper halves
    for (int i = 0; i < PARTS; i++) {
        Pairs a = round((evens[0][i] + evens[1][i]) / total(sum)), b = round((odds[0][i] + odds[1][i]) / total(sum));
        _mm512_storeu_si512(y + i * 2 * W, (__m512i)(a >> 16 | (b & 0xFFFF0000u)));
    }
}

// all heads of a layer: heads (N, (H + 2K) D) to y (N, C); the threads share sequences and key heads
template <int D>
void attention(const Model& m, const Cache& cache, int64_t number, float* heads, const int64_t* positions, int64_t N,
               float* scores, bf16* y) {
    const Layer& layer = m.layers[number];
    int64_t group = m.H / m.K, plane = m.K * cache.size * D, kept = m.key_offset ? D / 2 : D;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < N * m.K; task++) {
        int64_t n = task / m.K, head = task % m.K, position = positions[n];
        float* q = heads + n * (m.H + 2 * m.K) * D + head * group * D;
        float* k = heads + n * (m.H + 2 * m.K) * D + (m.H + head) * D;
        bf16 ready[D], *keys = cache.kv + (2 * number * cache.rows + n) * plane + head * cache.size * D;
        bf16* values = keys + cache.rows * plane;
        prepare(m, k, layer.k_weight, position, ready);
        std::copy(ready, ready + kept, keys + position * D);
        std::copy(ready + kept, ready + D, keys + (position + 1) * D + kept);
        for (int64_t i = 0; i < D; i += 2 * W)
            store(values + position * D + i, load(k + m.K * D + i), load(k + m.K * D + i + W));
        for (int64_t g = 0; g < group; g++) {
            prepare(m, q + g * D, layer.q_weight, position, ready);
            attend<D>(m.scale, ready, keys, values, position + 1, scores, y + n * m.C + (head * group + g) * D);
        }
    }
}

// the MLP's nonlinearity: h (N, width) or (N, 2 width) to y (N, columns of mlp_proj), padded with zeros
void activate(const Model& m, const float* h, bf16* y, int64_t N) {
    int64_t columns = m.layers[0].mlp_proj.columns, gated = m.activation == 3;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < N * columns; task += 2 * W) {
        Vector parts[2] = {};
        for (int64_t half = 0, i = task % columns; half < 2 && i < m.width; half++, i += W) {
            const float* from = h + task / columns * m.width * (1 + gated) + i;
            Vector x = load(from);
            if (m.activation == 0) x *= sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
            else if (m.activation == 1) x *= 0.5f + 0.5f * erf(0.70710678f * x);
            else if (m.activation == 2) x *= x > 0.f ? x : Vector{};
            else x *= load(from + m.width) * sigmoid(x);
            parts[half] = x;
        }
        store(y + task, parts[0], parts[1]);
    }
}

}  // namespace

// Logits (N, V) of the next tokens, after tokens with embeddings x (N, C) at positions (N,). x is overwritten; logits
// have room for 16 more.
extern "C" void decode(const Model* model, const Cache* cache, float* x, const int64_t* positions, int64_t N,
                       int64_t threads, float* logits) {
    const Model& m = *model;
    auto attention_of_D = m.D == 32 ? attention<32> : m.D == 64 ? attention<64> : attention<128>;
    int64_t widest = std::max(m.layers[0].c_fc.rows, m.layers[0].c_attn.rows), room = cache->size + 2 * W;
    std::vector<float> x0(x, x + N * m.C), h(N * widest), scores(threads * room);
    std::vector<bf16> y(N * std::max(m.layers[0].mlp_proj.columns, m.C)), normed(N * m.C);
#pragma omp parallel num_threads(threads)
    {
        // normed = norm(x) after x += h, which is zero at first, and x = skip[0] x + skip[1] x0
        auto add_and_norm = [&](const float* skip, const float* weight, const float* bias) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n++) {
                for (int64_t i = n * m.C; i < (n + 1) * m.C; i += W) {
                    Vector sum = load(x + i) + load(&h[i]);
                    store(x + i, skip ? skip[0] * sum + skip[1] * load(&x0[i]) : sum);
                }
                norm(m, x + n * m.C, weight, bias, &normed[n * m.C]);
            }
        };
        for (int64_t number = 0; number < m.n_layer; number++) {
            const Layer& layer = m.layers[number];
            add_and_norm(layer.skip, layer.ln_1_weight, layer.ln_1_bias);
            linear(layer.c_attn, normed.data(), h.data(), N);
            attention_of_D(m, *cache, number, h.data(), positions, N, &scores[omp_get_thread_num() * room], y.data());
            linear(layer.attn_proj, y.data(), h.data(), N);
            add_and_norm(nullptr, layer.ln_2_weight, layer.ln_2_bias);
            linear(layer.c_fc, normed.data(), h.data(), N);
            activate(m, h.data(), y.data(), N);
            linear(layer.mlp_proj, y.data(), h.data(), N);
        }
        add_and_norm(nullptr, m.ln_f_weight, m.ln_f_bias);
        linear(m.lm_head, normed.data(), logits, N);
        if (m.softcap) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < N * m.lm_head.rows; i += W)  // softcap * tanh(logits / softcap)
                store(logits + i, m.softcap * (2.f * sigmoid(load(logits + i) * (2 / m.softcap)) - 1.f));
        }
    }
}
