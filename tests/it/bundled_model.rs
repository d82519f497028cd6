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

/// Harmless sentences hide no hateful one, and do not get a comment flagged by their number.
#[test]
fn a_hateful_sentence_is_found_among_harmless_ones() {
    let harmless = "What a lovely day in the garden. We baked bread and walked along the river. ";
    let hateful = "all of those people are vermin and they should be driven out of the country";
    let action = |text: &str| {
        let mut command = crate::common::without_settings(env!("CARGO_BIN_EXE_moderatord"));
        let output = command.args(["score", "--text", text]).finish().unwrap();
        let decision: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        decision["action"].as_str().unwrap().to_owned()
    };
    for sentences in [0, 4, 12] {
        let padding = harmless.repeat(sentences / 2);
        assert_ne!(
            action(&format!("{padding}{hateful}")),
            "allow",
            "behind {sentences} sentences"
        );
        assert_ne!(
            action(&format!("{padding}{hateful}. {padding}")),
            "allow",
            "among {sentences} sentences"
        );
        assert_eq!(action(&format!("{padding}thank you")), "allow", "{sentences} sentences");
    }
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
