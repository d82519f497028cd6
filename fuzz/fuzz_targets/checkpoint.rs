//! The weights of a checkpoint: damaged files are refused with a fault, and accepted ones can be computed with.
//!
//! The input has three sections: the index of shards (empty for a single file), the header of a safetensors file, and
//! its data.

#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use moderatord::config::Quantize;
use moderatord::model::device::Placement;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::model::forward::gemma::{Gemma, PackedRow};
use moderatord::model::forward::linear::LoraMode;
use moderatord::model::forward::load::LoadOptions;
use moderatord_fuzz::{Folder, check_faults, safetensors, sections};

const INDEX: &str = "model.safetensors.index.json";

thread_local! {
    static FOLDER: LazyCell<Folder> = LazyCell::new(|| {
        let folder = Folder::new();
        folder.write("config.json", Some(include_bytes!("../seeds/config/tiny.json")));
        folder.write("tokenizer.json", Some(b"{}"));
        folder
    });
}

fuzz_target!(|data: &[u8]| {
    let Some((&raw, rest)) = data.split_first() else {
        return;
    };
    let [index, header, tensors] = sections(rest);
    let file = match raw % 2 {
        0 => safetensors(header, tensors),
        _ => [header, tensors].concat(),
    };
    FOLDER.with(|folder| {
        folder.write("model.safetensors", Some(&file));
        folder.write(INDEX, (!index.is_empty()).then_some(index));
        match Checkpoint::open(&folder.path("")) {
            Ok(checkpoint) => check(&checkpoint, data),
            Err(faults) => check_faults(&faults, data),
        }
    });
});

fn check(checkpoint: &Checkpoint, data: &[u8]) {
    assert!(checkpoint.fingerprint().starts_with("sha256:"));
    let options = LoadOptions {
        lora: LoraMode::Merged,
        quantize: Quantize::None,
        placement: Placement::cpu(),
        for_training: false,
    };
    match Gemma::load(checkpoint, None, options) {
        Ok(model) => {
            let row = PackedRow {
                own: &[2, 0, 1],
                shared: 0,
            };
            let hidden = model.forward(&[row], None).expect("the weights fit together");
            assert_eq!(hidden.dims(), [1, checkpoint.config().hidden_size]);
        }
        Err(faults) => check_faults(&faults, data),
    }
}
