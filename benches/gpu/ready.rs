//! Measures the time from start to ready: loading a checkpoint that is in the page cache, and warming it up.

use std::path::Path;
use std::time::Instant;

use moderatord::config::{Config, ModelConfig, Sources};
use moderatord::serving::ModelSource;
use serde_json::{Value, json};

/// Measures the checkpoint in `folder`, which has been written or read before.
pub fn measure(folder: &Path, model: &ModelConfig) -> Value {
    let settings = Config::load(&Sources::default()).unwrap();
    let model = ModelConfig {
        path: Some(folder.to_owned()),
        ..model.clone()
    };
    let source = ModelSource::new(model, settings.prompt.clone());
    let start = Instant::now();
    let loaded = source.load_version(None, None).unwrap();
    let load = start.elapsed().as_secs_f64();
    let (_, warm) = source.warm_up(loaded, settings.batch.max_tokens).unwrap();
    json!({
        "load_s": load,
        "ready_s": start.elapsed().as_secs_f64(),
        "batch_budget_tokens": warm.max_tokens,
        "tokens_per_s": warm.tokens_per_second,
    })
}
