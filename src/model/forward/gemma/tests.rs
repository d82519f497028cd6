//! What decoders with different adapters share.

use std::path::PathBuf;

use super::*;
use crate::config::Quantize;
use crate::model::device::Placement;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;

fn folder() -> PathBuf {
    crate::test_files::test_file("tests/fixtures/gemma3")
}

/// Returns a small Gemma 3 without an adapter.
pub fn base(quantize: Quantize) -> Gemma {
    let options = LoadOptions {
        lora: LoraMode::Unmerged,
        quantize,
        placement: Placement::cpu(),
        for_training: false,
    };
    Gemma::load(&Checkpoint::open(&folder()).unwrap(), None, options).unwrap()
}

/// Returns an adapter of [`base`].
pub fn adapter(name: &str, base: &Gemma) -> Adapter {
    Adapter::load(&folder().join(name), base.config(), "sha256:0").unwrap()
}

/// During a swap, two versions serve at once. They hold one base between them.
#[test]
fn decoders_with_different_adapters_hold_one_base() {
    for quantize in [Quantize::None, Quantize::Int8] {
        let base = base(quantize);
        let adapted = |name: &str| base.with_adapter(&adapter(name, &base)).unwrap();
        for (one, other) in [
            (adapted("lora_qv"), adapted("lora_all_rslora")),
            (base.clone(), adapted("lora_qv")),
        ] {
            assert_eq!(one.embed_tokens.id(), other.embed_tokens.id());
            for (mut one, mut other) in one.layers.into_iter().zip(other.layers) {
                for projection in Projection::ALL {
                    let (one, other) = (one.projection_mut(projection), other.projection_mut(projection));
                    assert!(one.shares_weight_with(other), "{projection:?}, {quantize:?}");
                }
            }
        }
    }
}
