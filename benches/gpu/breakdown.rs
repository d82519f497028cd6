//! Measures where the time of a pass goes. Each operation is timed alone at the sizes of one micro-batch and multiplied
//! by how often a pass runs it. The rest is the time of launches, copies and waits.

use candle_core::{DType, Tensor};
use moderatord::model::forward::gemma::Gemma;
use moderatord::model::kernels::{PackedAttention, RopeAngles, Span, Spans, add_rms_norm, geglu, norm_rope};
use serde_json::{Value, json};

use crate::machine::per_second;
use crate::work::{PREFIX, Work};

const SECONDS: f64 = 0.2;

pub fn measure(gemma: &Gemma, max_tokens: usize) -> Value {
    let (config, device, dtype) = (gemma.config(), gemma.device(), gemma.dtype());
    let work = Work::new(gemma, 4096);
    let batch = work.batches(max_tokens)[0];
    let tokens: usize = batch.iter().map(Vec::len).sum();
    let time = |run: &mut dyn FnMut()| 1e3 / per_second(device, SECONDS, run);
    let random = |width: usize, dtype: DType| {
        let x = Tensor::randn(0f32, 1.0, (tokens, width), device).unwrap();
        x.to_dtype(dtype).unwrap()
    };
    // In the last layer, most operations run for only one token per comment.
    let layers = config.num_layers() as f64;
    let effective_layers = layers - 1.0 + batch.len() as f64 / tokens as f64;

    let (queries, keys) = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    );
    // The products of a layer: queries, keys and values at once, the attention's output, gate and up at once, down.
    let products = [
        [queries + 2 * keys, config.hidden_size],
        [config.hidden_size, queries],
        [2 * config.intermediate_size, config.hidden_size],
        [config.hidden_size, config.intermediate_size],
    ];
    let mut linear = 0.0;
    for [outputs, inputs] in products {
        let weight = Tensor::randn(0f32, 1.0, (outputs, inputs), device).unwrap();
        let (weight, x) = (weight.to_dtype(dtype).unwrap(), random(inputs, dtype));
        linear += time(&mut || drop(x.matmul(&weight.t().unwrap()).unwrap())) * effective_layers;
    }
    let (q, k, v) = (random(queries, dtype), random(keys, dtype), random(keys, dtype));
    let mut list = Vec::new();
    let mut start = 0;
    for comment in batch {
        let count = comment.len();
        list.push(Span {
            query_start: start,
            queries: count,
            key_start: start,
            keys: count,
            shared: 0,
        });
        start += count;
    }
    let spans = Spans::new(list, device).unwrap();
    let op = PackedAttention {
        spans: &spans,
        prefix: None,
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        scale: config.query_scale,
        softcap: config.attn_logit_softcapping,
        window: config.layers[0].window,
    };
    let attention = time(&mut || drop(op.forward(&q, &k, &v).unwrap())) * effective_layers;

    let (residual, y) = (
        random(config.hidden_size, DType::F32),
        random(config.hidden_size, dtype),
    );
    let weight = Tensor::ones(config.hidden_size, DType::F32, device).unwrap();
    let post = config.family.has_post_norms().then_some(&weight);
    let norms = time(&mut || drop(add_rms_norm(&residual, &y, post, &weight, 1e-6).unwrap())) * 2.0 * effective_layers;

    let (gate, up) = (
        random(config.intermediate_size, dtype),
        random(config.intermediate_size, dtype),
    );
    let activation = time(&mut || drop(geglu(&gate, &up).unwrap())) * effective_layers;

    let half = config.head_dim / 2;
    let angles = RopeAngles {
        cos: Tensor::ones((tokens, half), DType::F32, device).unwrap(),
        sin: Tensor::zeros((tokens, half), DType::F32, device).unwrap(),
        positions: (!device.is_cpu()).then(|| Tensor::zeros(tokens, DType::U32, device).unwrap()),
    };
    let norm = Tensor::ones(config.head_dim, DType::F32, device).unwrap();
    let norm = config.family.has_qk_norm().then_some((&norm, 1e-6));
    let heads = random(queries + keys, dtype);
    let rope = time(&mut || drop(norm_rope(&heads, &angles, norm).unwrap())) * effective_layers;

    let pass = time(&mut || drop(work.score(gemma, batch)));
    let parts = [
        ("linear layers", linear),
        ("attention", attention),
        ("norms and residual", norms),
        ("geglu", activation),
        ("rope and qk norm", rope),
    ];
    let rest = pass - parts.iter().map(|(_, time)| time).sum::<f64>();
    let shares: serde_json::Map<String, Value> = parts
        .into_iter()
        .chain([("rest", rest)])
        .map(|(name, time)| (name.to_owned(), json!(time / pass)))
        .collect();
    json!({
        "max_tokens": max_tokens,
        "comments": batch.len(),
        "own_tokens": tokens,
        "prefix_tokens": PREFIX,
        "pass_ms": pass,
        "shares": shares,
    })
}
