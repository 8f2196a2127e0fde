// cuBLASLt without a device, for tests: naive products in a fixed order, on the streams of the driver's double.
//
// It offers two algorithms. The first, which it recommends for few columns, splits K and therefore adds in another
// order: whoever promises the same bytes for every batch must not take it.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "mock.h"

extern "C" void mock_count_matmul(void* stream);
extern "C" int mock_is_idle(void* stream);

namespace {

enum Status { OK = 0, NOT_SUPPORTED = 15, INVALID_VALUE = 7 };
enum Type { F32 = 0, F16 = 2, BF16 = 14, E4M3 = 28 };
enum Epilogue { PLAIN = 1, BIAS = 4 };

struct Layout {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};
struct Desc {
    int transa = 0, transb = 0, epilogue = PLAIN, bias_type = -1;
    const void* bias = nullptr;
    // fp8: how scales lie (3: one for each row), and where.
    int a_scale_mode = 0, b_scale_mode = 0;
    const float *a_scales = nullptr, *b_scales = nullptr;
};
struct Algorithm {
    uint64_t data[8];  // [0]: 1 + split
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h >> 15) << 31, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000 | mantissa << 13;
    } else if (exponent != 0) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        float value = float(mantissa) / 16777216.0f;
        return sign ? -value : value;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

uint16_t float_to_half(float f) {
    _Float16 h = static_cast<_Float16>(f);
    uint16_t out;
    std::memcpy(&out, &h, 2);
    return out;
}

float e4m3_to_float(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) return NAN;
    float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
    return code & 0x80 ? -value : value;
}

float load(const void* base, int type, size_t i) {
    if (type == E4M3) return e4m3_to_float(static_cast<const uint8_t*>(base)[i]);
    if (type == F32) return static_cast<const float*>(base)[i];
    uint16_t bits = static_cast<const uint16_t*>(base)[i];
    if (type == F16) return half_to_float(bits);
    uint32_t wide = uint32_t(bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

void store(void* base, int type, size_t i, float value) {
    if (type == F32) {
        static_cast<float*>(base)[i] = value;
    } else if (type == F16) {
        static_cast<uint16_t*>(base)[i] = float_to_half(value);
    } else {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bool nan = (bits & 0x7fffffff) > 0x7f800000;
        bits = nan ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
        static_cast<uint16_t*>(base)[i] = uint16_t(bits >> 16);
    }
}

float dot(const float* a, const float* b, size_t n) {
    float sum = 0;
    for (size_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

struct Product {
    Desc desc;
    Layout a, b, d;
    const void *a_data, *b_data, *c_data;
    void* d_data;
    float alpha, beta;
    uint64_t split;

    // D[n, m] = alpha * sum over k of A[k, n] * B[k, m] + beta * C, column-major, plus bias[n].
    void run() const {
        size_t k = a.rows, n = a.cols, m = b.cols;
        std::vector<float> bs(k * m), as(k);
        for (size_t j = 0; j < m; ++j)
            for (size_t i = 0; i < k; ++i) bs[j * k + i] = load(b_data, b.type, j * size_t(b.ld) + i);
        for (size_t r = 0; r < n; ++r) {
            for (size_t i = 0; i < k; ++i) as[i] = load(a_data, a.type, r * size_t(a.ld) + i);
            for (size_t j = 0; j < m; ++j) {
                size_t cut = k / split;
                float sum = dot(&as[0], &bs[j * k], cut);
                if (split > 1) sum += dot(&as[cut], &bs[j * k + cut], k - cut);
                size_t at = j * size_t(d.ld) + r;
                float value = alpha * sum;
                if (a.type == E4M3) value = value * desc.b_scales[j] * desc.a_scales[r];
                if (beta != 0) value += beta * load(c_data, d.type, at);
                if (desc.epilogue == BIAS)
                    value += load(desc.bias, desc.bias_type < 0 ? d.type : desc.bias_type, r);
                store(d_data, d.type, at, value);
            }
        }
    }
};

bool supported(const Desc& desc, const Layout& a, const Layout& b, const Layout& d) {
    bool shapes = a.rows == b.rows && a.cols == d.rows && b.cols == d.cols;
    bool is_fp8 = a.type == E4M3, aligned = a.rows % 16 == 0 && a.cols % 16 == 0 && a.ld % 16 == 0 && b.ld % 16 == 0;
    bool scaled = desc.a_scale_mode == 3 && desc.b_scale_mode == 3 && desc.a_scales && desc.b_scales;
    bool types = a.type == b.type && d.type != E4M3 && (!is_fp8 || (aligned && scaled));
    bool epilogue = desc.epilogue == PLAIN || (desc.epilogue == BIAS && desc.bias);
    return shapes && types && epilogue && desc.transa == 1 && desc.transb == 0;
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return 130000; }
int cublasLtCreate(void** handle) {
    *handle = std::malloc(1);
    return OK;
}
int cublasLtDestroy(void* handle) {
    std::free(handle);
    return OK;
}
int cublasLtMatrixLayoutCreate(void** out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
    *out = new Layout{type, rows, cols, ld};
    return OK;
}
int cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* value, size_t size) {
    if (attribute != 3 || size != 8) return NOT_SUPPORTED;  // columns
    std::memcpy(&static_cast<Layout*>(layout)->cols, value, 8);
    return OK;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return OK;
}
int cublasLtMatmulDescCreate(void** out, int compute, int scale) {
    if (compute != 68 || scale != F32) return NOT_SUPPORTED;
    *out = new Desc;
    return OK;
}
int cublasLtMatmulDescDestroy(void* desc) {
    delete static_cast<Desc*>(desc);
    return OK;
}
int cublasLtMatmulDescSetAttribute(void* desc, int attribute, const void* value, size_t size) {
    auto* d = static_cast<Desc*>(desc);
    void* field = attribute == 3    ? static_cast<void*>(&d->transa)
                  : attribute == 4  ? static_cast<void*>(&d->transb)
                  : attribute == 7  ? static_cast<void*>(&d->epilogue)
                  : attribute == 8  ? static_cast<void*>(&d->bias)
                  : attribute == 17 ? static_cast<void*>(&d->a_scales)
                  : attribute == 18 ? static_cast<void*>(&d->b_scales)
                  : attribute == 26 ? static_cast<void*>(&d->bias_type)
                  : attribute == 31 ? static_cast<void*>(&d->a_scale_mode)
                  : attribute == 32 ? static_cast<void*>(&d->b_scale_mode)
                                    : nullptr;
    bool is_pointer = attribute == 8 || attribute == 17 || attribute == 18;
    if (!field || size != (is_pointer ? 8u : 4u)) return NOT_SUPPORTED;
    std::memcpy(field, value, size);
    return OK;
}
int cublasLtMatmulPreferenceCreate(void** out) {
    *out = std::malloc(1);
    return OK;
}
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return OK; }
int cublasLtMatmulPreferenceDestroy(void* preference) {
    std::free(preference);
    return OK;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void* a, void* b, void*, void* d, void*, int wanted,
                                   Heuristic* out, int* found) {
    *found = 0;
    auto& layout = *static_cast<Layout*>(b);
    if (!supported(*static_cast<Desc*>(desc), *static_cast<Layout*>(a), layout, *static_cast<Layout*>(d)))
        return NOT_SUPPORTED;
    bool split_first = layout.cols < 16;
    for (; *found < wanted && *found < 2; ++*found) {
        out[*found] = Heuristic{};
        out[*found].algorithm.data[0] = split_first == (*found == 0) ? 2 : 1;
    }
    return OK;
}
int cublasLtMatmulAlgoConfigGetAttribute(const Algorithm* algorithm, int attribute, void* value, size_t size,
                                         size_t* written) {
    if (size < 4) return INVALID_VALUE;
    int answer = attribute == 2 ? int(algorithm->data[0]) : 0;  // the number of splits
    std::memcpy(value, &answer, 4);
    if (written) *written = 4;
    return OK;
}
int cublasLtMatmulAlgoCheck(void*, void* desc, void* a, void* b, void*, void* d, const Algorithm* algorithm,
                            Heuristic* out) {
    if (!supported(*static_cast<Desc*>(desc), *static_cast<Layout*>(a), *static_cast<Layout*>(b),
                   *static_cast<Layout*>(d)))
        return NOT_SUPPORTED;
    *out = Heuristic{};
    out->algorithm = *algorithm;
    return OK;
}
int cublasLtMatmul(void*, void* desc, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                   const void* beta, const void* c, void*, void* d, void* d_layout, const Algorithm* algorithm, void*,
                   size_t, void* stream) {
    Product product{*static_cast<Desc*>(desc),
                    *static_cast<Layout*>(a_layout),
                    *static_cast<Layout*>(b_layout),
                    *static_cast<Layout*>(d_layout),
                    a,
                    b,
                    c,
                    d,
                    *static_cast<const float*>(alpha),
                    *static_cast<const float*>(beta),
                    algorithm ? algorithm->data[0] : 1};
    if (!supported(product.desc, product.a, product.b, product.d)) return NOT_SUPPORTED;
    std::function<int()> work = [product, stream] {
        mock_count_matmul(stream);
        if (!mock_is_idle(stream)) product.run();
        return 0;
    };
    return mock_enqueue(stream, &work) == 0 ? OK : 14;  // internal error
}

}  // extern "C"
