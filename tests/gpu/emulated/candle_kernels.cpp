// Reimplements as plain loops the kernels of candle that scoring and training launch, with their names and arguments.
// They make it possible to test our code; they do not test candle's kernels.

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

struct bf16 {
    uint16_t bits;

    bf16() = default;
    // A double is rounded to float first, as in candle's kernels.
    bf16(float x) {
        uint32_t wide;
        memcpy(&wide, &x, 4);
        const bool is_nan = (wide & 0x7fffffff) > 0x7f800000;
        bits = is_nan ? 0x7fc0 : (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    }
    operator float() const {
        const uint32_t wide = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
};

using Size = size_t;
// The dimensions, followed by the strides of each operand. Null if all operands are contiguous.
using Layout = const size_t *;

// Returns the offset in an operand of the element with a row-major index.
static size_t at(size_t index, size_t dimensions, Layout layout, size_t operand) {
    if (!layout) return index;
    size_t found = 0;
    for (size_t n = dimensions; n-- > 0;) {
        found += index % layout[n] * layout[dimensions * (1 + operand) + n];
        index /= layout[n];
    }
    return found;
}

template <typename T, double Function(double)>
static void unary(Grid, Size count, Size dimensions, Layout layout, const T *x, T *out) {
    for (size_t i = 0; i < count; i++) out[i] = T(Function((double)(x ? x[at(i, dimensions, layout, 0)] : out[i])));
}

template <typename T>
static void copy(Grid, Size count, Size dimensions, Layout layout, const T *x, T *out) {
    for (size_t i = 0; i < count; i++) out[i] = x[at(i, dimensions, layout, 0)];
}

template <typename From, typename To>
static void cast(Grid, Size count, Size dimensions, Layout layout, const From *x, To *out) {
    for (size_t i = 0; i < count; i++) out[i] = To((double)x[at(i, dimensions, layout, 0)]);
}

template <typename T, typename Out, double Function(double, double)>
static void binary(Grid, Size count, Size dimensions, Layout layout, const T *x, const T *y, Out *out) {
    for (size_t i = 0; i < count; i++) {
        out[i] = Out(Function((double)x[at(i, dimensions, layout, 0)], (double)y[at(i, dimensions, layout, 1)]));
    }
}

template <typename T>
static void affine(Grid, Size count, Size dimensions, Layout layout, const T *x, T *out, T mul, T add) {
    for (size_t i = 0; i < count; i++) {
        const double value = (double)(x ? x[at(i, dimensions, layout, 0)] : out[i]);
        out[i] = T(value * (double)mul + (double)add);
    }
}

template <typename T>
static void power(Grid, Size count, Size dimensions, Layout layout, T exponent, const T *x, T *out) {
    for (size_t i = 0; i < count; i++) {
        out[i] = T(std::pow((double)x[at(i, dimensions, layout, 0)], (double)exponent));
    }
}

template <typename T>
static void set(Grid, Size count, Size dimensions, Layout layout, T value, T *out) {
    for (size_t i = 0; i < count; i++) out[at(i, dimensions, layout, 0)] = value;
}

template <typename T>
static void copy2d(Grid, const T *from, T *to, uint32_t rows, uint32_t columns, uint32_t from_stride,
                   uint32_t to_stride) {
    for (size_t row = 0; row < rows; row++) {
        for (size_t column = 0; column < columns; column++) {
            to[row * to_stride + column] = from[row * from_stride + column];
        }
    }
}

template <typename T>
static void index_select(Grid, Size count, Size, Layout, const uint32_t *ids, const T *x, T *out, Size left, Size source,
                         Size chosen, Size right) {
    if (count != left * chosen * right) __builtin_trap();
    for (size_t l = 0; l < left; l++) {
        for (size_t i = 0; i < chosen; i++) {
            for (size_t r = 0; r < right; r++) {
                out[(l * chosen + i) * right + r] = x[(l * source + ids[i]) * right + r];
            }
        }
    }
}

template <typename T>
static void index_add(Grid, const uint32_t *ids, Size chosen, const T *x, T *out, Size left, Size, Size target,
                      Size right) {
    for (size_t l = 0; l < left; l++) {
        for (size_t i = 0; i < chosen; i++) {
            for (size_t r = 0; r < right; r++) {
                T &sum = out[(l * target + ids[i]) * right + r];
                sum = T((double)sum + (double)x[(l * chosen + i) * right + r]);
            }
        }
    }
}

// `count` is the number of inputs, except in the kernels for small reductions, where it is the number of outputs.
template <typename T, bool IsSmall, double Function(double, double)>
static void reduce(Grid, Size count, Size each, Size dimensions, Layout layout, const T *x, T *out) {
    const size_t outputs = IsSmall ? count : count / each;
    for (size_t i = 0; i < outputs; i++) {
        double value = (double)x[at(i * each, dimensions, layout, 0)];
        for (size_t n = 1; n < each; n++) value = Function(value, (double)x[at(i * each + n, dimensions, layout, 0)]);
        out[i] = T(value);
    }
}

template <typename T>
static void where(Grid, Size count, Size dimensions, Layout layout, const uint8_t *condition, const T *x, const T *y,
                  T *out) {
    for (size_t i = 0; i < count; i++) {
        const bool first = condition[at(i, dimensions, layout, 0)];
        out[i] = first ? x[at(i, dimensions, layout, 1)] : y[at(i, dimensions, layout, 2)];
    }
}

static double negative(double x) { return -x; }
static double reciprocal(double x) { return 1 / x; }
static double square(double x) { return x * x; }
static double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)));
}
static double plus(double x, double y) { return x + y; }
static double minus(double x, double y) { return x - y; }
static double times(double x, double y) { return x * y; }
static double over(double x, double y) { return x / y; }
static double greater(double x, double y) { return x > y; }
static double greater_equal(double x, double y) { return x >= y; }
static double less(double x, double y) { return x < y; }
static double equal(double x, double y) { return x == y; }
static double highest(double x, double y) { return std::fmax(x, y); }
static double lowest(double x, double y) { return std::fmin(x, y); }

template <typename T>
static void add_for(const std::string &dtype) {
    const auto named = [&](const char *name, auto kernel) { add(name + ("_" + dtype), kernel); };
    named("uexp", unary<T, std::exp>);
    named("ulog", unary<T, std::log>);
    named("usqrt", unary<T, std::sqrt>);
    named("utanh", unary<T, std::tanh>);
    named("ucos", unary<T, std::cos>);
    named("usin", unary<T, std::sin>);
    named("uabs", unary<T, std::fabs>);
    named("uneg", unary<T, negative>);
    named("urecip", unary<T, reciprocal>);
    named("usqr", unary<T, square>);
    named("ugelu", unary<T, gelu>);
    named("ucopy", copy<T>);
    named("upowf", power<T>);
    named("badd", binary<T, T, plus>);
    named("bsub", binary<T, T, minus>);
    named("bmul", binary<T, T, times>);
    named("bdiv", binary<T, T, over>);
    named("bmaximum", binary<T, T, highest>);
    named("bminimum", binary<T, T, lowest>);
    named("gt", binary<T, uint8_t, greater>);
    named("ge", binary<T, uint8_t, greater_equal>);
    named("lt", binary<T, uint8_t, less>);
    named("eq", binary<T, uint8_t, equal>);
    named("affine", affine<T>);
    named("const_set", set<T>);
    named("copy2d", copy2d<T>);
    named("is_u32", index_select<T>);
    named("ia_u32", index_add<T>);
    named("fast_sum", reduce<T, false, plus>);
    named("fast_sum_small", reduce<T, true, plus>);
    named("fast_max", reduce<T, false, highest>);
    named("fast_min", reduce<T, false, lowest>);
    named("where_u8", where<T>);
}

void add_candle_kernels() {
    add_for<float>("f32");
    add_for<double>("f64");
    add_for<bf16>("bf16");
    add("cast_f32_f64", cast<float, double>);
    add("cast_f64_f32", cast<double, float>);
    add("cast_f32_bf16", cast<float, bf16>);
    add("cast_bf16_f32", cast<bf16, float>);
    add("cast_f32_f32", cast<float, float>);
    add("cast_bf16_bf16", cast<bf16, bf16>);
    add("cast_u8_f32", cast<uint8_t, float>);
    add("cast_u32_f32", cast<uint32_t, float>);
    add("ucopy_u32", copy<uint32_t>);
    add("copy2d_u32", copy2d<uint32_t>);
    add("is_u32_u32", index_select<uint32_t>);
}
