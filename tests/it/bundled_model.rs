//! The checkpoint inside the binary stays small, and gives sensible answers without any settings.

use std::path::Path;

use moderatord::config::Projection;
use moderatord::model::files::checkpoint::Checkpoint;

use crate::common::process::Start;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/moderatord-mini"))
}

#[test]
fn the_bundled_model_equals_the_folder_and_stays_small() {
    let bundled = Checkpoint::bundled().unwrap();
    assert_eq!(bundled.fingerprint(), Checkpoint::open(folder()).unwrap().fingerprint());
    let files = std::fs::read_dir(folder()).unwrap();
    let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 12_000_000, "{bytes} bytes");
    let config = bundled.config();
    let linear: usize = Projection::ALL
        .iter()
        .map(|projection| projection.shape(config).iter().product::<usize>())
        .sum();
    // Two FLOPs for each weight and token, and the two matrix products of attention.
    let (layers, tokens) = (config.num_layers(), 36);
    let attention = 4 * config.num_attention_heads * config.head_dim * tokens * tokens;
    let flops = layers * (2 * linear * tokens + attention);
    assert!(flops <= 500_000_000, "{flops} FLOPs for {tokens} tokens");
}

#[test]
fn a_friendly_comment_is_clearly_allowed_without_settings() {
    let mut command = crate::common::without_settings(env!("CARGO_BIN_EXE_moderatord"));
    let output = command
        .args(["score", "--text", "you look very nice today"])
        .finish()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let decision: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(decision["action"], "allow");
    assert!(decision["probability"].as_f64().unwrap() < 0.1, "{decision}");
}
