// The parts of a transformer block between its matrix products, for training on CPUs: LayerNorm with the
// residual sum, GELU, and attention, each with its backward pass. build.py compiles this file.
//
// Activations are bf16, the residual stream and all arithmetic fp32. Arrays are contiguous.
// Shapes: B sequences of T positions, N = B·T rows of C channels, H query heads and K key/value heads of D
// channels, D a multiple of 16. Dropped values are a function of a seed and their place, so no mask is stored.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <omp.h>

typedef uint16_t bf16;
typedef float Floats __attribute__((vector_size(64)));      // 16 values: one register of AVX-512
typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef bf16 Halves __attribute__((vector_size(32), aligned(2), may_alias));

static const int W = 16;  // values in a vector
static const int R = 4;   // queries that attention computes at once: as many sums as there are registers
static const Words INDEX = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

static inline Floats all(float x) { return Floats{} + x; }
static inline Floats load(const float* p) { return *(const Unaligned*)p; }
static inline void store(float* p, Floats x) { *(Unaligned*)p = x; }
static inline Floats load(const bf16* p) { return (Floats)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }

// to the nearest bf16, of two the even one; the NaNs that arithmetic gives stay NaN
static inline Words rounded(Floats x) { return ((Words)x + 0x7fff + (((Words)x >> 16) & 1)) >> 16; }
static inline void store(bf16* p, Floats x) { *(Halves*)p = __builtin_convertvector(rounded(x), Halves); }

static inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}
static inline float maximum(Floats x) {
    float largest = x[0];
    for (int i = 1; i < W; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// e^x for x <= 0, with a relative error below 1e-6: 2^n times the Taylor polynomial of 2^f, |f| <= 1/2
static inline Floats exponential(Floats x) {
    x = x < -87.0f ? all(-87.0f) : x;
    Floats t = x * 1.44269504f;
    Ints n = __builtin_convertvector(t - 0.5f, Ints);  // rounds towards zero
    Floats f = t - __builtin_convertvector(n, Floats);
    Floats p = 0.00961812911f + f * (0.00133335581f + f * 0.000154035304f);
    p = 1 + f * (0.693147181f + f * (0.240226507f + f * (0.0555041087f + f * p)));
    return p * (Floats)((n + 127) << 23);
}

static inline Floats reciprocal(Floats x) {
#ifdef __AVX512F__  // an estimate of 14 bits and a step of Newton's method: a third of the time
    Floats r = (Floats)_mm512_rcp14_ps((__m512)x);
    return r * (2 - x * r);
#else
    return 1 / x;
#endif
}

// Dropout

struct Dropout {
    uint32_t low, high;  // of the seed
    uint32_t threshold;  // a random word below it drops
    float scale;         // of what is kept

    Dropout(uint64_t seed, float p)
        : low((uint32_t)seed), high((uint32_t)(seed >> 32)), threshold((uint32_t)(p * 4294967296.0)), scale(1 / (1 - p)) {}

    // Factors of the 16 values from `place` on: two rounds of multiplying and mixing, as in MurmurHash3
    Floats operator()(uint32_t row, uint32_t place) const {
        Words x = (INDEX + place) * 0x9e3779b1u + (low ^ row * 0x85ebca6bu);
        x = (x ^ (x >> 16)) * 0x85ebca6bu;
        x = (x ^ (x >> 13) ^ high) * 0xc2b2ae35u;
        x ^= x >> 16;
        return x < threshold ? all(0) : all(scale);
    }
};

// LayerNorm

// residual = x + dropout(y), normed = LayerNorm(residual). Without y, residual is x; without normed, only the sum.
// stats (2, N): means, and inverses of standard deviations.
extern "C" void add_norm(long N, long C, const float* x, const bf16* y, float* residual, const float* weight,
                         const float* bias, bf16* normed, float* stats, uint64_t seed, float p) {
    Dropout dropout(seed, p);
    bool drops = p > 0;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < N; i++) {
        const float* row = x + i * C;
        if (y) {
            float* to = residual + i * C;
            for (long c = 0; c < C; c += W) {
                Floats added = load(y + i * C + c);
                if (drops) added *= dropout(i, c);
                store(to + c, load(row + c) + added);
            }
            row = to;
        }
        if (!normed) continue;
        Floats total{}, squares{};
        for (long c = 0; c < C; c += W) total += load(row + c);
        float m = sum(total) / C;
        for (long c = 0; c < C; c += W) {
            Floats centred = load(row + c) - m;
            squares += centred * centred;
        }
        float r = 1 / sqrtf(sum(squares) / C + 1e-5f);
        for (long c = 0; c < C; c += W) {
            Floats value = (load(row + c) - m) * r * load(weight + c);
            store(normed + i * C + c, bias ? value + load(bias + c) : value);
        }
        stats[i] = m, stats[N + i] = r;
    }
}

// bf16 of dropout(x)
extern "C" void cast(long N, long C, const float* x, bf16* y, uint64_t seed, float p) {
    Dropout dropout(seed, p);
    bool drops = p > 0;
#pragma omp parallel for schedule(static)
    for (long i = 0; i < N; i++)
        for (long c = 0; c < C; c += W) {
            Floats value = load(x + i * C + c);
            store(y + i * C + c, drops ? value * dropout(i, c) : value);
        }
}

// dx = dresidual + the gradient through LayerNorm; if wanted, dy = bf16 of dropout(dx), for the branch that was
// added to x. dparameters (2, C): those of weight and bias. dx may be dresidual.
extern "C" void norm_backward(long N, long C, const bf16* dnormed, const float* x, const float* stats,
                              const float* weight, const float* dresidual, float* dx, bf16* dy, float* dparameters,
                              uint64_t seed, float p) {
    Dropout dropout(seed, p);
    bool drops = p > 0;
    int threads = omp_get_max_threads();
    std::vector<float> sums((size_t)threads * 2 * C, 0.0f);  // each thread's, added in the order of the threads
#pragma omp parallel num_threads(threads)
    {
        float* own = sums.data() + (size_t)omp_get_thread_num() * 2 * C;
#pragma omp for schedule(static)
        for (long i = 0; i < N; i++) {
            float m = stats[i], r = stats[N + i];
            Floats total{}, along{};
            for (long c = 0; c < C; c += W) {
                Floats g = load(dnormed + i * C + c) * load(weight + c);
                total += g, along += g * (load(x + i * C + c) - m);
            }
            float a = sum(total) / C, b = sum(along) * r / C;
            for (long c = 0; c < C; c += W) {
                Floats g = load(dnormed + i * C + c), n = (load(x + i * C + c) - m) * r;
                store(own + c, load(own + c) + g * n), store(own + C + c, load(own + C + c) + g);
                Floats value = load(dresidual + i * C + c) + r * (g * load(weight + c) - a - n * b);
                store(dx + i * C + c, value);
                if (dy) store(dy + i * C + c, drops ? value * dropout(i, c) : value);
            }
        }
    }
    memset(dparameters, 0, 2 * C * sizeof(float));
    for (int t = 0; t < threads; t++)
        for (long c = 0; c < 2 * C; c++) dparameters[c] += sums[(size_t)t * 2 * C + c];
}

// GELU

// GELU of x and its derivative; the exact one by Abramowitz and Stegun's 7.1.26, an error below 1e-7
static inline void gelu_parts(Floats x, bool tanh, Floats& value, Floats& slope) {
    Words sign = (Words)x & 0x80000000u;
    Floats tail, density;  // the distribution function of -|x|, and the derivative of that of x
    if (tanh) {            // the logistic function of u, whose derivative is symmetric too
        Floats u = 1.5957691f * x * (1 + 0.044715f * x * x);
        Floats e = exponential((Floats)((Words)u | 0x80000000u));
        tail = e * reciprocal(1 + e);
        density = tail * (1 - tail) * 1.5957691f * (1 + 3 * 0.044715f * x * x);
    } else {
        Floats z = (Floats)((Words)x ^ sign) * 0.70710678f, t = reciprocal(1 + 0.3275911f * z), e = exponential(-z * z);
        Floats series = 0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f)));
        tail = 0.5f * series * t * e;
        density = e * 0.39894228f;
    }
    Floats cdf = 0.5f + (Floats)((Words)(0.5f - tail) ^ sign);
    value = x * cdf, slope = cdf + x * density;
}

extern "C" void gelu_tanh(long count, const bf16* x, bf16* y) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count; i += W) {
        Floats value, slope;
        gelu_parts(load(x + i), true, value, slope);
        store(y + i, value);
    }
}

// dy is replaced by the gradient of x
extern "C" void gelu_backward(long count, const bf16* x, bf16* dy, int tanh) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < count; i += W) {
        Floats value, slope;
        gelu_parts(load(x + i), tanh, value, slope);
        store(dy + i, load(dy + i) * slope);
    }
}

// Attention

template <int S>
static inline void exchange(Floats* rows) {  // swap the blocks of S x S off the diagonal
    Ints low, high;
    for (int i = 0; i < W; i++) low[i] = i & S ? i - S + W : i, high[i] = i & S ? i + W : i + S;
    for (int i = 0; i < W; i++)
        if (!(i & S)) {
            Floats a = rows[i], b = rows[i + S];
            rows[i] = __builtin_shuffle(a, b, low), rows[i + S] = __builtin_shuffle(a, b, high);
        }
}

// fp32 copies of `from` (T, D), with rows of zeros up to `rows`: plain (rows, D) and transposed (D, rows), if wanted
static void unpack(long T, long rows, long D, long stride, const bf16* from, float* plain, float* transposed) {
    for (long t = 0; t < rows; t += W)
        for (long d = 0; d < D; d += W) {
            Floats block[W];
            for (int r = 0; r < W; r++) {
                block[r] = t + r < T ? load(from + (t + r) * stride + d) : Floats{};
                if (plain) store(plain + (t + r) * D + d, block[r]);
            }
            if (!transposed) continue;
            exchange<1>(block), exchange<2>(block), exchange<4>(block), exchange<8>(block);
            for (int r = 0; r < W; r++) store(transposed + (d + r) * rows + t, block[r]);
        }
}

static void pack(long T, long D, long stride, const float* from, bf16* to) {
    for (long t = 0; t < T; t++)
        for (long d = 0; d < D; d += W) store(to + t * stride + d, load(from + t * D + d));
}

// V vectors of columns of a (R, inner; rows lda apart) times b (inner, columns ldb apart), to out
template <int V>
static inline void multiply_columns(long inner, const float* a, long lda, const float* b, long ldb, float* out, long ldo) {
    Floats sums[R][V] = {};
    for (long k = 0; k < inner; k++)
        for (int v = 0; v < V; v++) {
            Floats column = load(b + k * ldb + v * W);
            for (int r = 0; r < R; r++) sums[r][v] += a[r * lda + k] * column;
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out + r * ldo + v * W, sums[r][v]);
}

// out (R, columns) = a (R, inner) b (inner, columns)
static void multiply(long inner, long columns, const float* a, long lda, const float* b, long ldb, float* out, long ldo) {
    long c = 0;
    for (; c + 4 * W <= columns; c += 4 * W) multiply_columns<4>(inner, a, lda, b + c, ldb, out + c, ldo);
    for (; c + 2 * W <= columns; c += 2 * W) multiply_columns<2>(inner, a, lda, b + c, ldb, out + c, ldo);
    for (; c < columns; c += W) multiply_columns<1>(inner, a, lda, b + c, ldb, out + c, ldo);
}

// out (n, D) += the transpose of a (R, n) times b (R, D)
static void add_outer(long n, long D, const float* a, long lda, const float* b, float* out) {
    for (long d = 0; d < D; d += 2 * W) {
        int vectors = d + 2 * W <= D ? 2 : 1;
        Floats rows[R][2];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < vectors; v++) rows[r][v] = load(b + r * D + d + v * W);
        for (long k = 0; k < n; k++)
            for (int v = 0; v < vectors; v++) {
                Floats total = load(out + k * D + d + v * W);
                for (int r = 0; r < R; r++) total += a[r * lda + k] * rows[r][v];
                store(out + k * D + d + v * W, total);
            }
    }
}

static float* workspace(size_t count) {  // of this thread, kept for the next call; aligned to cache lines
    static thread_local std::vector<float> memory;
    if (memory.size() < count + W) memory.resize(count + W);
    return memory.data() + (64 - (uintptr_t)memory.data() % 64) / sizeof(float) % W;
}

struct Heads {  // of qkv (N, (H + 2K)·D) and y (N, H·D)
    long T, H, K, D, stride, rows;
    Heads(long T, long H, long K, long D) : T(T), H(H), K(K), D(D), stride((H + 2 * K) * D), rows((T + W - 1) / W * W) {}
    template <typename P> P query(P qkv, long b, long h) const { return qkv + b * T * stride + h * D; }
    template <typename P> P key(P qkv, long b, long k) const { return qkv + b * T * stride + (H + k) * D; }
    template <typename P> P value(P qkv, long b, long k) const { return qkv + b * T * stride + (H + K + k) * D; }
    template <typename P> P output(P y, long b, long h) const { return y + b * T * H * D + h * D; }
};

// R rows of `from` from row i on as fp32, times `scale`; zeros beyond row T
static inline void load_rows(long T, long D, long i, long stride, const bf16* from, float scale, float* to) {
    for (int r = 0; r < R; r++)
        for (long d = 0; d < D; d += W) store(to + r * D + d, i + r < T ? load(from + (i + r) * stride + d) * scale : Floats{});
}

// softmax of R rows of scores in place, query i + r reading keys up to its own; lse: logarithms of their sums
static void causal_softmax(long i, long n, long T, float* scores, long ld, float* lse) {
    for (int r = 0; r < R; r++) {
        float* row = scores + r * ld;
        Floats largest = all(-INFINITY), total{};
        for (long c = 0; c < n; c += W) {
            Floats x = (INDEX + (uint32_t)c) > (uint32_t)(i + r) ? all(-INFINITY) : load(row + c);
            largest = x > largest ? x : largest;
            store(row + c, x);
        }
        float m = maximum(largest);
        for (long c = 0; c < n; c += W) {
            Floats e = exponential(load(row + c) - m);
            e = (INDEX + (uint32_t)c) > (uint32_t)(i + r) ? all(0) : e;
            total += e;
            store(row + c, e);
        }
        float s = sum(total);
        if (i + r < T) lse[i + r] = m + logf(s);
        for (long c = 0; c < n; c += W) store(row + c, load(row + c) * (1 / s));
    }
}

// y = dropout(softmax(scale q kᵀ)) v with a causal mask. lse (B, H, T) is for the backward pass.
extern "C" void attention(long B, long T, long H, long K, long D, const bf16* qkv, bf16* y, float* lse, float scale,
                          uint64_t seed, float p) {
    Heads at(T, H, K, D);
    Dropout dropout(seed, p);
#pragma omp parallel for schedule(static)
    for (long j = 0; j < B * K; j++) {
        long b = j / K, k = j % K, rows = at.rows;
        float* keys = workspace(2 * rows * D + R * rows + 2 * R * D);
        float *values = keys + rows * D, *scores = values + rows * D, *q = scores + R * rows, *out = q + R * D;
        unpack(T, rows, D, at.stride, at.key(qkv, b, k), nullptr, keys);
        unpack(T, rows, D, at.stride, at.value(qkv, b, k), values, nullptr);
        for (long h = k * (H / K); h < (k + 1) * (H / K); h++)
            for (long i = 0; i < T; i += R) {
                long n = ((i + R < T ? i + R : T) + W - 1) / W * W, head = b * H + h;
                load_rows(T, D, i, at.stride, at.query(qkv, b, h), scale, q);
                multiply(D, n, q, D, keys, rows, scores, rows);
                causal_softmax(i, n, T, scores, rows, lse + head * T);
                if (p > 0)
                    for (int r = 0; r < R; r++)
                        for (long c = 0; c < n; c += W)
                            store(scores + r * rows + c, load(scores + r * rows + c) * dropout(head * T + i + r, c));
                multiply(n, D, scores, rows, values, D, out, D);
                pack(i + R < T ? R : T - i, D, H * D, out, at.output(y, b, h) + i * H * D);
            }
    }
}

// The gradient of qkv from that of y. The weights are computed again, from the scores and lse.
extern "C" void attention_backward(long B, long T, long H, long K, long D, const bf16* qkv, const bf16* y, const bf16* dy,
                                   const float* lse, float scale, bf16* dqkv, uint64_t seed, float p) {
    Heads at(T, H, K, D);
    Dropout dropout(seed, p);
#pragma omp parallel for schedule(static)
    for (long j = 0; j < B * K; j++) {
        long b = j / K, k = j % K, rows = at.rows, size = rows * D;
        float* keys = workspace(5 * size + 2 * R * rows + 4 * R * D);
        float *keys_t = keys + size, *values_t = keys_t + size, *dk = values_t + size, *dv = dk + size;
        float *weights = dv + size, *ds = weights + R * rows;
        float *q = ds + R * rows, *g = q + R * D, *o = g + R * D, *dq = o + R * D;
        unpack(T, rows, D, at.stride, at.key(qkv, b, k), keys, keys_t);
        unpack(T, rows, D, at.stride, at.value(qkv, b, k), nullptr, values_t);
        memset(dk, 0, 2 * size * sizeof(float));
        for (long h = k * (H / K); h < (k + 1) * (H / K); h++)
            for (long i = 0; i < T; i += R) {
                long n = ((i + R < T ? i + R : T) + W - 1) / W * W, head = b * H + h;
                load_rows(T, D, i, at.stride, at.query(qkv, b, h), scale, q);
                load_rows(T, D, i, H * D, at.output(dy, b, h), 1, g);
                load_rows(T, D, i, H * D, at.output(y, b, h), 1, o);
                multiply(D, n, q, D, keys_t, rows, weights, rows);
                multiply(D, n, g, D, values_t, rows, ds, rows);
                for (int r = 0; r < R; r++) {
                    Floats product{};
                    for (long d = 0; d < D; d += W) product += load(g + r * D + d) * load(o + r * D + d);
                    float along = sum(product), normalizer = i + r < T ? lse[head * T + i + r] : INFINITY;
                    for (long c = 0; c < n; c += W) {
                        float *w = weights + r * rows + c, *to = ds + r * rows + c;
                        Floats weight = exponential(load(w) - normalizer);
                        weight = (INDEX + (uint32_t)c) > (uint32_t)(i + r) ? all(0) : weight;
                        Floats kept = p > 0 ? dropout(head * T + i + r, c) : all(1);
                        store(to, weight * (load(to) * kept - along));
                        store(w, weight * kept);
                    }
                }
                add_outer(n, D, weights, rows, g, dv);
                add_outer(n, D, ds, rows, q, dk);  // q is scaled
                for (int r = 0; r < R; r++)
                    for (long c = 0; c < n; c += W) store(ds + r * rows + c, load(ds + r * rows + c) * scale);
                multiply(n, D, ds, rows, keys, D, dq, D);
                pack(i + R < T ? R : T - i, D, at.stride, dq, at.query(dqkv, b, h) + i * at.stride);
            }
        pack(T, D, at.stride, dk, at.key(dqkv, b, k));
        pack(T, D, at.stride, dv, at.value(dqkv, b, k));
    }
}
