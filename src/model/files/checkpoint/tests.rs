//! How tensors of a checkpoint are read together.

use candle_core::Device;

use super::*;

fn fixture(name: &str) -> PathBuf {
    crate::test_files::test_file("tests/fixtures/gemma3").join(name)
}

/// Rows of several tensors end up below each other, whatever the dtype of each tensor is.
#[test]
fn tensors_are_stacked_by_rows() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(fixture(name), folder.path().join(name)).unwrap();
    }
    let mut tensors = candle_core::safetensors::load(fixture("model.safetensors"), &Device::Cpu).unwrap();
    let key = "model.layers.0.self_attn.k_proj.weight";
    let half = tensors[key].to_dtype(DType::F16).unwrap();
    tensors.insert(key.to_owned(), half);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let upload = WeightUpload::new(&Device::Cpu);

    // The dtypes differ in the first pair and are the same in the second.
    for names in [["q_proj", "k_proj"], ["q_proj", "v_proj"]] {
        let names = names.map(|name| format!("layers.0.self_attn.{name}.weight"));
        let stored = names.clone().map(|name| tensors[&format!("model.{name}")].clone());
        let shapes = stored.clone().map(|tensor| <[usize; 2]>::from(tensor.dims2().unwrap()));
        let parts: Vec<(&str, [usize; 2])> = names.iter().map(String::as_str).zip(shapes).collect();
        let stacked = checkpoint.read_as_stored(&parts, &upload).unwrap();
        let expected = stored.map(|tensor| tensor.to_dtype(DType::F32).unwrap());
        let expected = Tensor::cat(&expected, 0).unwrap();
        let values = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&stacked), values(&expected));
    }
    let missing = checkpoint
        .read_as_stored(&[("layers.0.q.weight", [1, 1])], &upload)
        .unwrap_err();
    assert!(
        missing.to_string().contains("`model.layers.0.q.weight` is missing"),
        "{missing}"
    );
}
