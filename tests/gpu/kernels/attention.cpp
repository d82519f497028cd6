#include "attention.cu"

#include "check.h"

// Computes attention by the plain formula, one query and head at a time.
template <typename T>
std::vector<double> formula(const std::vector<T> &q, const std::vector<T> &k, const std::vector<T> &v,
                            const std::vector<T> &prefix_k, const std::vector<T> &prefix_v,
                            const std::vector<Span> &spans, const Shape &shape) {
    std::vector<double> out(q.size());
    const uint32_t dim = shape.head_dim, kv_width = shape.kv_heads * dim;
    for (const Span &span : spans) {
        for (uint32_t n = 0; n < span.queries; n++) {
            for (uint32_t head = 0; head < shape.heads; head++) {
                const size_t row = ((span.query_start + n) * shape.heads + head) * dim;
                const size_t column = head / (shape.heads / shape.kv_heads) * dim;
                const uint32_t last = span.shared + span.keys - span.queries + n;
                const uint32_t first = shape.window && last + 1 > shape.window ? last + 1 - shape.window : 0;
                std::vector<double> weights, sum(dim);
                double highest = -1e300, total = 0;
                for (uint32_t pass = 0; pass < 2; pass++) {
                    for (uint32_t at = first; at <= last; at++) {
                        const bool is_shared = at < span.shared;
                        const size_t key = is_shared ? at : span.key_start + at - span.shared;
                        const size_t from = key * kv_width + column;
                        if (pass == 0) {
                            double score = 0;
                            for (uint32_t i = 0; i < dim; i++) {
                                score += wide(q[row + i]) * wide((is_shared ? prefix_k : k)[from + i]);
                            }
                            score *= shape.scale;
                            if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
                            weights.push_back(score);
                            highest = std::max(highest, score);
                        } else {
                            const double weight = std::exp(weights[at - first] - highest);
                            total += weight;
                            for (uint32_t i = 0; i < dim; i++) {
                                sum[i] += weight * wide((is_shared ? prefix_v : v)[from + i]);
                            }
                        }
                    }
                }
                for (uint32_t i = 0; i < dim; i++) out[row + i] = sum[i] / total;
            }
        }
    }
    return out;
}

// Returns the spans of packed rows. Each pair holds the number of a row's own keys and the number of tokens that it
// shares with the prefix of 24. Only the last `queries` tokens of each row are queries; 0 means all of them.
static std::vector<Span> packed_rows(std::vector<std::pair<uint32_t, uint32_t>> lengths, uint32_t queries) {
    std::vector<Span> spans;
    uint32_t query = 0, key = 0;
    for (auto [keys, shared] : lengths) {
        const uint32_t own = queries == 0 ? keys : queries;
        spans.push_back({query, own, key, keys, shared});
        query += own;
        key += keys;
    }
    return spans;
}

template <typename T>
struct Case {
    std::vector<Span> spans;
    Shape shape;
    std::vector<T> q, k, v, prefix_k, prefix_v;

    Case(std::vector<Span> rows, Shape shape) : spans(rows), shape(shape) {
        const uint32_t queries = rows.back().query_start + rows.back().queries;
        const uint32_t keys = rows.back().key_start + rows.back().keys;
        const uint32_t kv_width = shape.kv_heads * shape.head_dim;
        q = random<T>(queries * shape.heads * shape.head_dim, 4.0);
        k = random<T>(keys * kv_width, 4.0);
        v = random<T>(keys * kv_width);
        prefix_k = random<T>(24 * kv_width, 4.0);
        prefix_v = random<T>(24 * kv_width);
    }

    std::vector<double> expected() const { return formula(q, k, v, prefix_k, prefix_v, spans, shape); }

    std::string name(const char *kernel) const {
        char text[128];
        snprintf(text, sizeof text, "%s, %u/%u heads%s%s%s", kernel, shape.heads, shape.kv_heads,
                 shape.window ? ", window" : "", shape.softcap > 0 ? ", cap" : "",
                 spans[0].queries < spans[0].keys ? ", last" : "");
        return text;
    }
};

static void check_f32(const std::vector<Span> &spans, Shape shape) {
    const Case<float> one(spans, shape);
    std::vector<uint32_t> span_of;
    for (uint32_t n = 0; n < spans.size(); n++) span_of.insert(span_of.end(), spans[n].queries, n);
    std::vector<float> out(one.q.size());
    emulation::launch({(uint32_t)span_of.size(), shape.heads}, 32, [&] {
        attention_f32(one.q.data(), one.k.data(), one.v.data(), one.prefix_k.data(), one.prefix_v.data(),
                      spans.data(), span_of.data(), out.data(), shape);
    });
    expect(one.name("attention_f32"), out, one.expected());
}

template <typename Kernel>
static void check_bf16(const char *name, Kernel kernel, const std::vector<Span> &spans, Shape shape) {
    const Case<__nv_bfloat16> one(spans, shape);
    std::vector<Tile> tiles;
    for (uint32_t n = 0; n < spans.size(); n++) {
        const uint32_t pairs = spans[n].queries * (shape.heads / shape.kv_heads);
        for (uint32_t first = 0; first < pairs; first += WARPS * 16) tiles.push_back({n, first});
    }
    std::vector<__nv_bfloat16> out(one.q.size());
    emulation::launch({(uint32_t)tiles.size(), shape.kv_heads}, WARPS * 32, [&] {
        kernel(one.q.data(), one.k.data(), one.v.data(), one.prefix_k.data(), one.prefix_v.data(), spans.data(),
               tiles.data(), out.data(), shape);
    });
    expect(one.name(name), out, one.expected());
}

int main() {
    const std::vector<std::pair<uint32_t, uint32_t>> lengths = {{9, 24}, {1, 23}, {40, 24}, {17, 0}, {70, 11}};
    for (uint32_t queries : {0u, 1u}) {
        const auto spans = packed_rows(lengths, queries);
        for (Shape shape : {Shape{4, 1, 64, 0, 0.125f, 0}, Shape{8, 4, 64, 20, 0.125f, 5}}) {
            check_f32(spans, shape);
            check_bf16("attention_bf16_64", attention_bf16_64, spans, shape);
        }
        check_bf16("attention_bf16_32", attention_bf16_32, spans, {4, 2, 32, 7, 0.2f, 0});
        check_bf16("attention_bf16_128", attention_bf16_128, spans, {4, 4, 128, 0, 0.09f, 0});
        check_bf16("attention_bf16_256", attention_bf16_256, spans, {8, 1, 256, 33, 0.0625f, 50});
    }
    return exit_code();
}
