#include "attention.cu"

#include "check.h"

// Rounding the weights and the result to bf16 explains an error of up to 2^-8.
template <typename T> constexpr double ALLOWED = TOLERANCE<T>;
template <> constexpr double ALLOWED<__nv_bfloat16> = 4e-3;

static uint32_t random_below(uint32_t count) {
    return (uint32_t)((source.next() + 1.0) / 2.0 * count) % count;
}

// Rows of `width` elements that begin `stride` elements apart. What lies between and around them is NaN.
template <typename T>
struct Matrix {
    std::vector<T> all;
    uint32_t stride;
    static constexpr uint32_t ROWS_AROUND = 20;

    Matrix(uint32_t rows, uint32_t stride) : all((rows + 2 * ROWS_AROUND) * stride, narrow<T>(NAN)), stride(stride) {}

    // Fills the columns [from, from + width) of each row with numbers and returns the first of them.
    const T *filled(uint32_t from, uint32_t width, double scale) {
        for (size_t row = ROWS_AROUND; row < all.size() / stride - ROWS_AROUND; row++) {
            for (uint32_t i = 0; i < width; i++) all[row * stride + from + i] = narrow<T>(source.next() * scale);
        }
        return &all[ROWS_AROUND * stride + from];
    }
};

// The rows of a pass and the prefix that they share.
struct Layout {
    std::vector<Span> spans;
    // The number of tokens of the prefix. If `prefix_row` is set, it is the first row of the pass.
    uint32_t prefix = 0;
    bool prefix_row = false;

    uint32_t queries() const { return spans.back().query_start + spans.back().queries; }
    uint32_t keys() const { return spans.back().key_start + spans.back().keys; }
    bool has_all_queries() const { return queries() == keys(); }

    void add(uint32_t keys, uint32_t queries, uint32_t shared) {
        const uint32_t query_start = spans.empty() ? 0 : this->queries();
        spans.push_back({query_start, queries, spans.empty() ? 0 : this->keys(), keys, shared});
    }
};

enum class Queries { ALL, LAST, SOME };

static Layout random_layout(Queries queries, uint32_t most_rows) {
    Layout layout;
    layout.prefix = random_below(4) == 0 ? 0 : 1 + random_below(random_below(2) ? 200 : 30);
    layout.prefix_row = layout.prefix != 0 && random_below(3) == 0;
    if (layout.prefix_row) layout.add(layout.prefix, queries == Queries::ALL ? layout.prefix : 1, 0);
    const bool all_share = random_below(2);
    const uint32_t most_keys = random_below(3) == 0 ? 150 : 40;
    for (uint32_t rows = 1 + random_below(most_rows); rows > 0; rows--) {
        const uint32_t keys = 1 + random_below(most_keys);
        const uint32_t some = rows == 1 ? 1 + random_below(keys) : random_below(keys + 1);
        const uint32_t own = queries == Queries::ALL ? keys : queries == Queries::LAST ? 1 : some;
        layout.add(keys, own, all_share ? layout.prefix : random_below(layout.prefix + 1));
    }
    return layout;
}

// A layout with numbers.
template <typename T>
struct Case {
    Layout layout;
    Shape shape;
    Matrix<T> own, queries, prefix;
    const T *q, *k, *v, *prefix_k = nullptr, *prefix_v = nullptr;

    // If all tokens are queries, q, k and v are slices of one matrix.
    Case(const Layout &layout, Shape given)
        : layout(layout),
          shape(given),
          own(layout.keys(), (given.heads + 2 * given.kv_heads) * given.head_dim + 8),
          queries(layout.queries(), given.heads * given.head_dim + 16),
          prefix(layout.prefix, 2 * given.kv_heads * given.head_dim + 24) {
        const uint32_t width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
        auto &with_queries = layout.has_all_queries() ? own : queries;
        q = with_queries.filled(0, width, 4.0);
        k = own.filled(width, kv_width, 4.0);
        v = own.filled(width + kv_width, kv_width, 1.0);
        shape.queries = layout.queries();
        shape.q_stride = with_queries.stride;
        shape.kv_stride = shape.prefix_stride = own.stride;
        if (layout.prefix_row) {
            prefix_k = k;
            prefix_v = v;
        } else if (layout.prefix != 0) {
            prefix_k = prefix.filled(0, kv_width, 4.0);
            prefix_v = prefix.filled(kv_width + 8, kv_width, 1.0);
            shape.prefix_stride = prefix.stride;
        }
    }

    // Computes attention by the plain formula, one query and head at a time.
    std::vector<double> expected() const {
        const uint32_t dim = shape.head_dim;
        std::vector<double> out;
        for (const Span &span : layout.spans) {
            for (uint32_t n = 0; n < span.queries; n++) {
                for (uint32_t head = 0; head < shape.heads; head++) {
                    const T *query = q + (size_t)(span.query_start + n) * shape.q_stride + head * dim;
                    const uint32_t column = head / (shape.heads / shape.kv_heads) * dim;
                    const uint32_t last = span.shared + span.keys - span.queries + n;
                    const uint32_t first = shape.window && last + 1 > shape.window ? last + 1 - shape.window : 0;
                    const auto offset = [&](uint32_t at) {
                        const size_t own = span.key_start + at - span.shared;
                        return (at < span.shared ? (size_t)at * shape.prefix_stride : own * shape.kv_stride) + column;
                    };
                    std::vector<double> scores, sum(dim);
                    for (uint32_t at = first; at <= last; at++) {
                        const T *key = (at < span.shared ? prefix_k : k) + offset(at);
                        double score = 0;
                        for (uint32_t i = 0; i < dim; i++) score += wide(query[i]) * wide(key[i]);
                        score *= shape.scale;
                        if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
                        scores.push_back(score);
                    }
                    const double highest = *std::max_element(scores.begin(), scores.end());
                    double total = 0;
                    for (uint32_t at = first; at <= last; at++) {
                        const T *value = (at < span.shared ? prefix_v : v) + offset(at);
                        const double weight = std::exp(scores[at - first] - highest);
                        total += weight;
                        for (uint32_t i = 0; i < dim; i++) sum[i] += weight * wide(value[i]);
                    }
                    for (double x : sum) out.push_back(x / total);
                }
            }
        }
        return out;
    }

    // Runs a kernel. `kernel` gets the arguments of its launch. The output is NaN where nothing has been written.
    template <typename Kernel>
    std::vector<T> run(Dim3 grid, uint32_t threads, uint32_t shared_bytes, Kernel kernel) const {
        std::vector<uint32_t> span_of;
        for (uint32_t n = 0; n < layout.spans.size(); n++) span_of.insert(span_of.end(), layout.spans[n].queries, n);
        const size_t size = (size_t)shape.queries * shape.heads * shape.head_dim, around = 4096;
        std::vector<T> out(size + 2 * around, narrow<T>(NAN));
        emulation::launch(grid, threads, [&] {
            kernel(q, k, v, prefix_k, prefix_v, layout.spans.data(), span_of.data(), out.data() + around, shape);
        }, shared_bytes);
        for (size_t i = 0; i < around; i++) {
            if (!std::isnan(wide(out[i])) || !std::isnan(wide(out[around + size + i]))) {
                printf("a kernel wrote beyond its output\n");
                failures++;
                break;
            }
        }
        return {out.begin() + around, out.end() - around};
    }

    std::string description() const {
        char text[256];
        snprintf(text, sizeof text, "%zu rows, %u queries, %u keys, prefix %u%s, heads %u/%u of %u, window %u, cap %g",
                 layout.spans.size(), layout.queries(), layout.keys(), layout.prefix,
                 layout.prefix_row ? " (a row)" : "", shape.heads, shape.kv_heads, shape.head_dim, shape.window,
                 shape.softcap);
        return text;
    }
};

// Collects the results of many cases for one line of output.
template <typename T>
struct Results {
    std::vector<T> found;
    std::vector<double> expected;

    void add(const Case<T> &one, const std::vector<T> &out) {
        const std::vector<double> correct = one.expected();
        for (size_t i = 0; i < correct.size(); i++) {
            if (!(std::fabs(wide(out[i]) - correct[i]) / (1.0 + std::fabs(correct[i])) <= ALLOWED<T>)) {
                printf("WRONG from element %zu on: %s\n", i, one.description().c_str());
                break;
            }
        }
        found.insert(found.end(), out.begin(), out.end());
        expected.insert(expected.end(), correct.begin(), correct.end());
    }
};

static Shape random_shape(uint32_t dim) {
    constexpr uint32_t GROUPS[] = {1, 2, 3, 4, 8};
    Shape shape = {};
    shape.kv_heads = 1 + random_below(2);
    shape.heads = shape.kv_heads * GROUPS[random_below(5)];
    shape.head_dim = dim;
    shape.window = random_below(2) ? 0 : 1 + random_below(100);
    shape.scale = 1.0f / std::sqrt((float)dim);
    shape.softcap = random_below(2) ? 0.0f : 5.0f + random_below(50);
    return shape;
}

static constexpr struct {
    Queries queries;
    const char *name;
} KINDS[] = {{Queries::ALL, "all queries"}, {Queries::LAST, "last queries"}, {Queries::SOME, "some queries"}};

static void check_f32(uint32_t cases) {
    for (auto kind : KINDS) {
        Results<float> results;
        for (uint32_t n = 0; n < cases; n++) {
            const Case<float> one(random_layout(kind.queries, 5), random_shape(n % 2 ? 64 : 40));
            results.add(one, one.run({one.shape.queries, one.shape.heads}, 32, 0, attention_f32));
        }
        expect(std::string("attention_f32, ") + kind.name, results.found, results.expected);
    }
}

template <typename Kernel>
static std::vector<__nv_bfloat16> run_bf16(const Case<__nv_bfloat16> &one, Kernel kernel) {
    const uint32_t pairs = one.shape.queries * (one.shape.heads / one.shape.kv_heads);
    const Dim3 grid = {(pairs + PAIRS - 1) / PAIRS, one.shape.kv_heads};
    return one.run(grid, THREADS, shared_bytes(one.shape.head_dim), kernel);
}

template <typename Kernel>
static void check_bf16(uint32_t dim, Kernel kernel, uint32_t cases, uint32_t most_rows) {
    const std::string name = "attention_bf16_" + std::to_string(dim);
    for (auto kind : KINDS) {
        Results<__nv_bfloat16> results;
        for (uint32_t n = 0; n < cases; n++) {
            const Case<__nv_bfloat16> one(random_layout(kind.queries, most_rows), random_shape(dim));
            results.add(one, run_bf16(one, kernel));
        }
        expect(name + ", " + kind.name, results.found, results.expected, ALLOWED<__nv_bfloat16>);
    }
}

// Each row alone gives the same bits as all rows together.
template <typename Kernel>
static void check_independence(uint32_t dim, Kernel kernel) {
    size_t values = 0, different = 0;
    for (auto kind : KINDS) {
        Layout layout = random_layout(kind.queries, 1);
        while (layout.prefix == 0 || layout.prefix_row) layout = random_layout(kind.queries, 1);
        for (uint32_t row = 0; row < 8; row++) {
            const uint32_t keys = 1 + random_below(50);
            layout.add(keys, kind.queries == Queries::LAST ? 1 : keys, random_below(layout.prefix + 1));
        }
        const Case<__nv_bfloat16> together(layout, random_shape(dim));
        const auto expected = run_bf16(together, kernel);
        for (const Span &span : layout.spans) {
            Case<__nv_bfloat16> alone = together;
            alone.layout.spans = {{0, span.queries, 0, span.keys, span.shared}};
            alone.shape.queries = span.queries;
            alone.q = together.q + (size_t)span.query_start * together.shape.q_stride;
            alone.k = together.k + (size_t)span.key_start * together.shape.kv_stride;
            alone.v = together.v + (size_t)span.key_start * together.shape.kv_stride;
            alone.prefix_k = together.prefix_k;
            alone.prefix_v = together.prefix_v;
            const auto found = run_bf16(alone, kernel);
            const size_t from = (size_t)span.query_start * together.shape.heads * dim;
            for (size_t i = 0; i < found.size(); i++) different += found[i].bits != expected[from + i].bits;
            values += found.size();
        }
    }
    const bool agrees = different == 0 && values != 0;
    failures += !agrees;
    printf("%-44s %8zu values, %zu depend on other rows%s\n",
           ("attention_bf16_" + std::to_string(dim) + ", alone").c_str(), values, different, agrees ? "" : "  WRONG");
}

int main() {
    check_f32(8);
    check_bf16(32, attention_bf16_32, 24, 14);
    check_bf16(64, attention_bf16_64, 12, 10);
    check_bf16(128, attention_bf16_128, 5, 8);
    check_bf16(256, attention_bf16_256, 4, 6);
    check_independence(32, attention_bf16_32);
    check_independence(64, attention_bf16_64);
    return exit_code();
}
